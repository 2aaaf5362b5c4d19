//! The arguments of a transfer. Types only.

pub use crate::proto::TransferState;

use crate::direct::Way;

/// Direction of a one-sided transfer, seen from the initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the peer's memory to local memory.
    Read,
    /// From local memory to the peer's memory.
    Write,
}

impl Direction {
    /// The direction of the data.
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
