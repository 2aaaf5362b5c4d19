//! Device memory TCP of Linux: received payload lands in a dma-buf, and payload is sent from one. `Binding` ties a dma-buf to a NIC, `receive`
//! returns where the bytes of a connection lie, `give_back` returns the fragments to the NIC, `send` and `completed` send.
//! Knows nothing of the library, of GPUs, or of steering: header split, rules and queues are the caller's.
//!
//! `netlink`, `control` and `tokens` read and write the bytes of the interface without any system call.

mod control;
mod netlink;
mod socket;
mod tokens;

pub use control::{pieces, Fragment, Malformed, Piece, PIECE_SPACE};
pub use netlink::{Attributes, Exchange, Outcome, Request};
pub use socket::{completed, give_back, receive, send, Binding, Received, Refused};
pub use tokens::{Range, Tokens};
