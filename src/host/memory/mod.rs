//! What direct transfers need of memory: exports for a peer, mappings of a peer's memory, and
//! pulls from there into memory of this process; areas into which a peer pushes. One trait, so that the flow is the same for GPUs and for emulated device
//! memory. Knows nothing of sockets, rings, chunks or transfers.

pub(crate) mod cuda;
pub(crate) mod emulated;
mod files;
pub(crate) mod host;
mod mappings;
pub(crate) mod pool;
pub(crate) mod probe;
pub(crate) mod witness;

use crate::status::{bail, Result};
pub(crate) use crate::types::Piece;
use crate::types::Place;
use std::os::fd::OwnedFd;
use witness::Process;

/// How an export is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum ExportKind {
    /// A CUDA IPC handle: memory of `cudaMalloc`.
    CudaIpc = 1,
    /// A file descriptor of the driver: virtual memory management and pools.
    Posix = 2,
    /// A memory file: emulated device memory, and areas of host memory.
    SharedMemory = 3,
}

impl ExportKind {
    /// The kind with this number on the wire.
    pub(crate) fn from_number(number: u8) -> Option<ExportKind> {
        [ExportKind::CudaIpc, ExportKind::Posix, ExportKind::SharedMemory].into_iter().find(|&kind| kind as u8 == number)
    }

    /// Whether a descriptor travels with it.
    pub(crate) fn has_fd(self) -> bool {
        matches!(self, ExportKind::Posix | ExportKind::SharedMemory)
    }
}

/// UUID of a GPU; zeros where there is none.
pub(crate) type GpuId = [u8; 16];

/// What another process needs to map an allocation of ours.
#[derive(Debug)]
pub(crate) struct Export {
    /// How it is opened.
    pub kind: ExportKind,
    /// A handle, for kinds that have one.
    pub handle: [u8; 64],
    /// A descriptor, for kinds that have one, once it is about to leave or has come.
    pub fd: Option<OwnedFd>,
    /// First byte in the owner's address space that the mapping shows.
    pub base: u64,
    /// Bytes that the mapping shows.
    pub len: u64,
    /// The owner's GPU.
    pub gpu: GpuId,
}

/// An allocation of a peer, mapped here. Given back with [`LocalMemory::close`].
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Names it among those of its [`LocalMemory`].
    pub id: u64,
    /// Where the export's `base` is visible here: a source address of a pull is `addr + (owner's address - base)`.
    pub addr: u64,
}

/// Which side copies between two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Manner {
    /// The destination's, out of the source.
    Pull = 1,
    /// The source's into an area of the destination's library, and the destination's from there.
    Push = 2,
}

impl Manner {
    /// The one with this number on the wire.
    pub(crate) fn from_number(number: u8) -> Option<Manner> {
        [Manner::Pull, Manner::Push].into_iter().find(|&manner| manner as u8 == number)
    }
}

/// Memory of this library that peers write to. Given back with [`LocalMemory::drop_area`].
#[derive(Debug)]
pub(crate) struct Area {
    /// Names it among those of its [`LocalMemory`].
    pub id: u64,
    /// First byte.
    pub addr: u64,
}

/// A pull that was started; ask for its end with [`LocalMemory::poll`] until it says yes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pull {
    /// Which of the memory's units runs it: a GPU, or 0.
    pub unit: u32,
    /// Its number there.
    pub job: u64,
}

/// Memory of one kind on a connection between processes on one host. One object a connection; used by one thread at a time. Only
/// `export`, `open`, `close` and `quiesce` may take long.
pub(crate) trait LocalMemory: Send {
    /// Allocations that cover `[addr, addr + len)`, memory of a registered region, in rising order, to announce to a peer. Without
    /// descriptors: there may be more allocations than this process may have of those.
    ///
    /// # Errors
    /// `Unsupported` where it cannot be shared: other channels carry it.
    fn export(&mut self, place: Place, addr: u64, len: u64) -> Result<Vec<Export>>;

    /// The descriptor that travels with such an export of memory at `place`, whose region is still registered.
    fn descriptor(&mut self, _place: Place, _export: &Export) -> Result<OwnedFd> {
        bail!(Internal, "an export without a descriptor")
    }

    /// Whether this process can map its own exports as it maps those of another.
    fn maps_own(&self) -> bool {
        false
    }

    /// Maps a peer's allocation for pulls into memory of `place`. Everything in `export` is the peer's word; the peer has proved that
    /// it may talk to us, and may still lie. `owner`: which process it has proved to be; what others of its connections have opened is
    /// not mapped again.
    ///
    /// # Errors
    /// `Unsupported` where it cannot be reached from here.
    fn open(&mut self, export: &Export, place: Place, owner: Option<Process>) -> Result<Mapping>;

    /// Ends a mapping that no pull uses.
    fn close(&mut self, mapping: Mapping);

    /// Memory of `place` that a peer may write to: zeros, page-aligned. Its pages are used for nothing else as long as a peer
    /// has it mapped, even after it was given back.
    ///
    /// # Errors
    /// `Unsupported` where there is none.
    fn area(&mut self, place: Place, _len: usize) -> Result<Area> {
        bail!(Unsupported, "nothing is pushed into memory of {place:?}")
    }

    /// What a peer needs to map an area.
    fn export_area(&mut self, _area: &Area) -> Result<Export> {
        bail!(Internal, "this memory has no areas")
    }

    /// Ends an area that no pull uses.
    fn drop_area(&mut self, _area: Area) {}

    /// Maps a peer's area for pulls that write to it from `place`. As with `open`, everything in `export` is the peer's word.
    ///
    /// # Errors
    /// `Unsupported` where it cannot be reached from here.
    fn open_area(&mut self, _export: &Export, place: Place) -> Result<Mapping> {
        bail!(Unsupported, "nothing is pushed from memory of {place:?}")
    }

    /// Starts copying all pieces into memory of `place`, or from there into an open area; they do not overlap. The list may be changed once it returns. The pull runs
    /// without polls; many may be under way, and they end in any order.
    ///
    /// # Safety
    /// Sources lie in open mappings of this object, in its areas or in registered memory of `place`, destinations in registered memory of
    /// `place` or in open areas of the peer; all stay until the pull has ended.
    unsafe fn pull(&mut self, place: Place, pieces: &[Piece]) -> Result<Pull>;

    /// Pulls that start from now on belong to this transfer: where many compete for threads, each transfer has its share, however many
    /// pulls it has. `at_once`: the thread that starts a short one may copy it before the call returns; else other threads copy.
    fn belongs_to(&mut self, _transfer: u64, _at_once: bool) {}

    /// Whether a pull has ended. After `true` or an error its number is forgotten.
    ///
    /// # Errors
    /// When the bytes are not all in place and never will be: the connection ends.
    fn poll(&mut self, pull: Pull) -> Result<bool>;

    /// Of the `bytes` of a pull that has not ended, about how many are copied: what shows that it goes on.
    fn copied(&self, _pull: Pull, _bytes: u64) -> u64 {
        0
    }

    /// Pulls are under way whose end wakes no thread.
    fn busy(&self) -> bool;

    /// Waits, for a bounded time, until no pull touches memory. After an error some may still run: then this object, its
    /// mappings and the memory of the pulls must stay.
    fn quiesce(&mut self) -> Result<()>;

    /// Whether and how bytes get from memory of the peer's GPU into memory of `place`; asked once for each pair at set-up. Host memory: the
    /// peer's GPU is zeros.
    fn reaches(&mut self, place: Place, peer_gpu: &GpuId) -> Option<Manner>;

    /// Whether NVLink joins the GPU of `place` and the peer's GPU.
    fn by_nvlink(&self, _place: Place, _peer_gpu: &GpuId) -> bool {
        false
    }

    /// Has what pulls into `place` need made: no pull makes a GPU's driver allocate from then on.
    fn ready(&mut self, _place: Place) -> Result<()> {
        Ok(())
    }
}
