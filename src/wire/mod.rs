//! The control protocol: framing and messages (`frame`), the non-blocking control stream (`control`), and the handshake with
//! authentication (`handshake`). Knows sockets and bytes, nothing of regions, channels or transfers.

pub(crate) mod control;
pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod queue;
