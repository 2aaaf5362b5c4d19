//! One of the sixteen request slots of a comm, the header of a message, and the cursor that walks a slot's segments.
//! The ledger decides which thread may touch a slot; nothing here knows sockets, comms or completion.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use libc::iovec;

/// Bytes before each message on the wire: length u32, sequence u32 (the request's number xor [`WIRE_MARK`]), tag i32.
pub const HEADER: usize = 12;
const WIRE_MARK: u32 = 0x7C9A_51E3;

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the message.
    pub len: usize,
    /// The low half of the sender's request number.
    pub seq: u32,
    /// The tag that the send was posted with.
    pub tag: i32,
}

impl Header {
    /// The header of the `seq`-th message of a comm.
    pub fn new(len: usize, seq: u64, tag: i32) -> Header {
        Header { len, seq: seq as u32, tag }
    }

    /// Its wire form.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&(self.len as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.seq ^ WIRE_MARK).to_le_bytes());
        bytes[8..].copy_from_slice(&self.tag.to_le_bytes());
        bytes
    }

    /// Decodes twelve bytes, unchecked.
    pub fn parse(bytes: [u8; HEADER]) -> Header {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        Header {
            len: u32::from_le_bytes([a, b, c, d]) as usize,
            seq: u32::from_le_bytes([e, f, g, h]) ^ WIRE_MARK,
            tag: i32::from_le_bytes([i, j, k, l]),
        }
    }
}

/// The memory a request reads from or writes to.
#[derive(Default)]
pub struct Body {
    /// Header of a send, in wire form.
    pub header: [u8; HEADER],
    /// Segments: of a send, the header first; of a device receive, filled in when the message's length is known.
    pub iov: Vec<iovec>,
    /// Send: bytes on the wire with header. Receive: bytes that were posted.
    pub total: usize,
    /// The segments are device memory.
    pub device: bool,
    /// Receive: the tag the message must have.
    pub tag: i32,
    /// Receive: the message must have exactly the posted size.
    pub exact: bool,
    /// Send from a dma-buf: the number of its binding, and where the payload begins in it.
    pub binding: u32,
    pub offset: usize,
}

/// No region of the bounce buffer.
pub const NO_REGION: usize = usize::MAX;

/// A request slot. A request handed to the caller is the address of its slot.
pub struct Slot {
    /// Its comm, for code that gets the slot as a request; set once, when the comm is built.
    pub owner: AtomicPtr<c_void>,
    /// Number of the request that uses or last used it.
    pub seq: AtomicU64,
    /// Bytes of the message that arrived.
    pub received: AtomicUsize,
    /// Region of the bounce buffer that the receive lies in; [`NO_REGION`] for a host receive.
    pub region: AtomicUsize,
    /// Bytes of the bounce region that the receive covers.
    pub extent: AtomicUsize,
    body: UnsafeCell<Body>,
}
// SAFETY: `body` is touched by the posting thread while the slot is free and by the holder of the comm's I/O lock between
// posting and completion; the comm's `posted` and `completed` counters order the two.
unsafe impl Sync for Slot {}
// SAFETY: as above; the pointers inside are only used under that protocol.
unsafe impl Send for Slot {}

impl Slot {
    /// A free slot.
    pub fn new() -> Slot {
        Slot {
            owner: AtomicPtr::new(ptr::null_mut()),
            seq: AtomicU64::new(u64::MAX),
            received: AtomicUsize::new(0),
            region: AtomicUsize::new(NO_REGION),
            extent: AtomicUsize::new(0),
            body: UnsafeCell::new(Body::default()),
        }
    }

    /// The request's memory.
    ///
    /// # Safety
    /// The caller posts to a free slot, or holds the I/O lock and the slot is posted and not completed; one reference at a time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn body(&self) -> &mut Body {
        // SAFETY: exclusive by this function's contract.
        unsafe { &mut *self.body.get() }
    }

    /// The request handle: the slot's address.
    pub fn as_request(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// Number of the request.
    pub fn seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }
}

/// A position in a list of segments.
#[derive(Clone, Copy, Default)]
pub struct Cursor {
    segment: usize,
    offset: usize,
}

impl Cursor {
    /// Advances by `bytes`, which the list must still have.
    pub fn advance(&mut self, iov: &[iovec], mut bytes: usize) {
        while bytes > 0 {
            let left = iov[self.segment].iov_len - self.offset;
            if bytes < left {
                self.offset += bytes;
                return;
            }
            bytes -= left;
            self.segment += 1;
            self.offset = 0;
        }
    }

    /// Appends what follows to `out`: at most `bytes` bytes and `out` no longer than `max` segments. Returns the bytes added.
    pub fn collect(&self, iov: &[iovec], bytes: usize, max: usize, out: &mut Vec<iovec>) -> usize {
        let mut added = 0;
        let mut skip = self.offset;
        for segment in &iov[self.segment.min(iov.len())..] {
            if added == bytes || out.len() >= max {
                break;
            }
            let len = (segment.iov_len - skip).min(bytes - added);
            // The address arithmetic stays inside the segment: skip < iov_len.
            out.push(iovec { iov_base: segment.iov_base.cast::<u8>().wrapping_add(skip).cast(), iov_len: len });
            added += len;
            skip = 0;
        }
        added
    }

    /// Copies `bytes` into the following segments and advances past them.
    ///
    /// # Safety
    /// The segments are writable and have room for `bytes`.
    pub unsafe fn scatter(&mut self, iov: &[iovec], mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let segment = &iov[self.segment];
            let len = (segment.iov_len - self.offset).min(bytes.len());
            // SAFETY: inside the segment, writable by contract; the source is our own buffer.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), segment.iov_base.cast::<u8>().add(self.offset), len) };
            self.advance(iov, len);
            bytes = &bytes[len..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trip() {
        for (len, seq, tag) in [(1, 0, 0), (512 << 10, 17, i32::MAX), (77, 1 << 33, -1)] {
            let header = Header::new(len, seq, tag);
            assert_eq!(Header::parse(header.bytes()), header);
            assert_ne!(Header::parse(header.bytes()), Header::new(len, seq + 1, tag));
        }
    }

    #[test]
    fn cursor_walks_every_split() {
        let mut memory = [[0u8; 5], [0; 5], [0; 5]];
        let iov: Vec<iovec> = memory.iter_mut().map(|m| iovec { iov_base: m.as_mut_ptr().cast(), iov_len: 5 }).collect();
        for first in 0..=15 {
            let source: Vec<u8> = (1..=15).collect();
            let mut cursor = Cursor::default();
            // SAFETY: fifteen bytes of room.
            unsafe {
                cursor.scatter(&iov, &source[..first]);
                let mut rest = Vec::new();
                assert_eq!(cursor.collect(&iov, 100, 100, &mut rest), 15 - first);
                cursor.scatter(&iov, &source[first..]);
            }
            assert_eq!(memory.concat(), source);
        }
    }

    #[test]
    fn collect_respects_its_limits() {
        let mut memory = [0u8; 30];
        let base = memory.as_mut_ptr();
        let iov: Vec<iovec> = (0..3).map(|i| iovec { iov_base: base.wrapping_add(i * 10).cast(), iov_len: 10 }).collect();
        let mut out = Vec::new();
        assert_eq!(Cursor::default().collect(&iov, 15, 9, &mut out), 15);
        assert_eq!(out.iter().map(|s| s.iov_len).collect::<Vec<_>>(), [10, 5]);
        out.clear();
        assert_eq!(Cursor::default().collect(&iov, 30, 2, &mut out), 20);
    }
}
