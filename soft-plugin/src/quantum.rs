//! A turn of a comm: the types that sending, receiving and the I/O threads share.

/// Bytes that a comm moves before another comm of its thread gets a turn.
pub const TURN_BYTES: usize = 1 << 20;
/// Most segments of one system call.
pub const IOV_MAX: usize = 1024;

/// How a turn of a comm ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// More can be moved at once.
    More,
    /// Nothing is posted, or the socket is not ready.
    Wait,
}

/// The data socket during a turn.
#[derive(Clone, Copy, Debug)]
pub struct DataSocket {
    /// Its descriptor.
    pub fd: i32,
    /// The kernel reported a hang-up or an error: read on to find out which.
    pub hung_up: bool,
}
