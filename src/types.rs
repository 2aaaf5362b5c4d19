//! Types that every layer shares: places of memory, extents of regions, the segments of a transfer and the pieces of a chunk.
//! Knows nothing of wires, channels or plugins.

/// Where memory lies: the host, or one of its GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place(pub u8);

impl Place {
    /// Host memory.
    pub const HOST: Place = Place(0);

    /// GPU memory, by CUDA index.
    pub fn gpu(ordinal: u8) -> Place {
        Place(ordinal.saturating_add(1))
    }
    /// Memory of some GPU.
    pub fn is_device(self) -> bool {
        self.0 != 0
    }
    /// CUDA index of the GPU.
    pub fn ordinal(self) -> Option<u8> {
        self.0.checked_sub(1)
    }
}

/// Largest eager transfer, bytes.
pub(crate) const MAX_EAGER: usize = 64 << 10;

/// What peers may do with a registered region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteAccess {
    /// Read it.
    pub read: bool,
    /// Write it.
    pub write: bool,
}

impl RemoteAccess {
    /// Reading and writing.
    pub const ALL: RemoteAccess = RemoteAccess { read: true, write: true };
    /// Reading.
    pub const READ: RemoteAccess = RemoteAccess { read: true, write: false };
    /// Writing.
    pub const WRITE: RemoteAccess = RemoteAccess { read: false, write: true };
}

/// How the software plugin protects data on the network. The stricter of the two engines' levels applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protect {
    /// By TCP's checksum.
    #[default]
    Off,
    /// Detects changed data: a checksum, or AES-256-GCM if the engines share a key.
    Integrity,
    /// Also keeps it secret: AES-256-GCM.
    Encrypt,
}

/// Identifies a data stream of a connection: the transfer id, and which engine chose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// The initiator's transfer id.
    pub id: u64,
    /// This engine is the initiator.
    pub mine: bool,
}

impl std::hash::Hash for Key {
    /// Hashed as one word.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u64(self.id.rotate_left(1) ^ u64::from(self.mine));
    }
}

/// Extent of a registered region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Id of the region.
    pub id: u64,
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// One segment of local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// First byte.
    pub addr: u64,
    /// Bytes, more than 0.
    pub len: u64,
    /// Index of its region in the transfer's table.
    pub region: u16,
    /// Where it lies.
    pub place: Place,
    /// Where the peer's memory of it lies.
    pub peer: Place,
}

/// A piece of a segment inside a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// First byte.
    pub addr: u64,
    /// Bytes, more than 0.
    pub len: u64,
    /// Index of its region in the transfer's table.
    pub region: u16,
}

/// A contiguous run of bytes to copy, as kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Piece {
    /// First byte of the source, as the copying process or GPU addresses it.
    pub src: u64,
    /// First byte of the destination, in memory of this process.
    pub dst: u64,
    /// Bytes, more than 0.
    pub len: u64,
}

/// A grant of one posted buffer for one message. Its owner sends it when a receive has met the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landing {
    /// Identifies the grant, together with its generation.
    pub slot: u32,
    /// Which of the grants in this slot it is.
    pub generation: u64,
    /// First byte of the buffer in its owner's process.
    pub addr: u64,
}

/// The names of the plugins over ordinary TCP on the wire. An engine with device memory TCP has the software plugin, too, and uses it alone
/// with a peer that has nothing else.
pub(crate) const SOFT: &str = "soft";
pub(crate) const DEVMEM: &str = "devmem";
