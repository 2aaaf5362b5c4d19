//! What a turn of a comm is: the terms on which sending, receiving and the I/O threads meet.

/// Bytes a comm moves before another comm of its thread has its turn.
pub const TURN_BYTES: usize = 1 << 20;
/// Segments of one system call.
pub const IOV_MAX: usize = 1024;

/// How a turn of a comm ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to move at once.
    More,
    /// Nothing is posted, or the kernel has to report first.
    Wait,
}

/// The data socket as a turn sees it.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Its descriptor.
    pub fd: i32,
    /// The kernel reported a hang-up or an error: read on until it says which.
    pub hung_up: bool,
}
