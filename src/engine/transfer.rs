//! What an application names when it asks for a transfer. Types only.

pub use crate::proto::TransferState;

use crate::direct::Way;

/// Direction of a one-sided transfer, from the caller's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Remote memory into local memory.
    Read,
    /// Local memory into remote memory.
    Write,
}

impl Direction {
    /// Where the data goes.
    pub(crate) fn way(self) -> Way {
        match self {
            Direction::Read => Way::In,
            Direction::Write => Way::Out,
        }
    }
}

/// Local memory of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalSegment {
    /// Region that holds it.
    pub mr: u64,
    /// First byte.
    pub addr: usize,
    /// Bytes.
    pub len: usize,
}
