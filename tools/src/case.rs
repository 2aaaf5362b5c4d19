//! What a row measures. Pure.

use crate::units::show_size;
use serde::{Deserialize, Serialize};
use std::fmt;

/// An operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// One-sided: client memory into server memory.
    #[default]
    Write,
    /// One-sided: server memory into client memory.
    Read,
    /// Two-sided: the client sends, the server has posted receives.
    Send,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Write => "write",
            Op::Read => "read",
            Op::Send => "send",
        })
    }
}

/// A measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Operation.
    pub op: Op,
    /// Bytes per transfer.
    pub total: u64,
    /// Bytes per block.
    pub block: u64,
    /// Transfers in flight.
    pub inflight: u32,
    /// The same amount moves in the other direction at the same time.
    pub bidirectional: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.op, show_size(self.total))?;
        if self.block < self.total {
            write!(f, " in blocks of {}", show_size(self.block))?;
        }
        if self.inflight > 1 {
            write!(f, ", {} in flight", self.inflight)?;
        }
        if self.bidirectional {
            write!(f, ", both ways")?;
        }
        Ok(())
    }
}
