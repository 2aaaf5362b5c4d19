//! Device memory TCP of Linux: received payload lands in a dma-buf, and payload is sent from one. `Binding` ties a dma-buf to a NIC, `receive`
//! returns where the bytes of a connection lie, `give_back` returns the fragments to the NIC, `send` and `completed` send.
//! `nic` says how a NIC is set up, and steers connections to queues. Knows nothing of the library and of GPUs.
//!
//! `netlink`, `control`, `calls`, `tokens` and `rules` read and write the bytes of the interface without any system call.

pub mod agent;
mod binding;
mod calls;
mod control;
mod netlink;
mod nic;
mod rules;
mod socket;
mod tokens;

pub use binding::{Binding, Refused};
pub use calls::{Calls, Unknown};
pub use control::{pieces, Fragment, Malformed, Piece, PIECE_SPACE};
pub use netlink::{Attributes, Exchange, Outcome, Request};
pub use nic::{Nic, Rings, Rule};
pub use rules::{Flow, RULE_BYTES};
pub use socket::{completed, give_back, receive, send, Received};
pub use tokens::{Range, Tokens};
