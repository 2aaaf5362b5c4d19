//! The file through which one engine, the owner, orders the other to copy: every offset in it, in words of 8 bytes. The owner
//! writes some words, the reader the rest. A page of words comes first, each in a cache line of its own.

/// Most direct writes that are announced and have not ended.
pub(super) const WINDOW: usize = 1024;
/// Standing grants at once.
pub(super) const GRANTS: usize = 4096;
/// Words of the ring of records.
pub(super) const RING: usize = 128 << 10;

/// How far the owner has written the ring.
pub(super) const TAIL: usize = 0;
/// The owner's memory is its own again: what is copied from here on does not count.
pub(super) const CLOSED: usize = 8;
/// The owner sleeps and wants to be woken.
pub(super) const LISTENS: usize = 16;
/// Written by the reader: how far it has read the ring.
pub(super) const HEAD: usize = 24;
/// Written by the reader: how many orders have ended.
pub(super) const ENDED: usize = 32;
/// Written by the reader: bytes of all orders that it has copied.
pub(super) const MOVED: usize = 40;
/// Written by the reader: bytes that its reads have copied.
pub(super) const READ: usize = 48;
/// Written by the reader, a word for each of its GPUs and one for its host memory: staged records that it has scattered.
const SCATTERED: usize = 56;
/// GPUs of a process at most.
pub(super) const GPUS: usize = 32;

/// How each order has ended, and how many bytes of it are copied; written by the reader.
pub(super) const STATUS: usize = 512;
pub(super) const PROGRESS: usize = STATUS + WINDOW;
/// Of each grant, whether it stands (written by the owner), and reads under way (by the reader).
pub(super) const GRANT: usize = PROGRESS + WINDOW;
/// The ring, and the end of all words.
pub(super) const RECORDS: usize = GRANT + 2 * GRANTS;
pub(super) const END: usize = RECORDS + RING;

/// The word that counts staged records for a GPU of the reader, or for its host memory, which comes after all GPUs.
pub(super) fn scattered(index: usize) -> usize {
    SCATTERED + 8 * (index % (GPUS + 1))
}

const _: () = assert!(SCATTERED + 8 * (GPUS + 1) <= STATUS);
