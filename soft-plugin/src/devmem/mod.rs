//! Device memory TCP: the payload of GPU memory on a TCP connection of its own, which the NIC writes into an area of GPU memory and reads
//! from registered GPU memory. Heads travel on a second connection, since among the payload they would land in GPU memory too.
//! Experimental; see docs/devmem.md.
//!
//! - `layout`, `pattern`, `seats`: pure parts; `area`: GPU memory bound to a queue of a NIC; `host`: what takes privileges; `areas`: all of a process
//! - `proof`: steers a new connection and sends a pattern through both NICs and both GPUs, before anything else passes
//! - `ends`: the end of a connection; `lent`: what receives hold of an area; `recv`, `send`: moving the bytes of a comm
//!
//! # Invariants
//! - A receive is described only by fragments of its own area's binding. Any other binding fails the comm.
//! - A fragment goes back to the NIC only after `irecvConsumed`, or when its connection is closed.
//! - What all admitted connections may hold fits their area: `layout` computes it, an area's seats enforce it.
//! - A send is done when the kernel has said that no packet refers to its memory. A comm that closes earlier resets its connection and waits
//!   for that.
//! - Bytes that came to the host (no rule yet, or none any more; a packet that was not split) are copied into the area's own regions: slower,
//!   and in the same order.

mod area;
mod areas;
mod ends;
mod host;
mod layout;
mod lent;
mod pattern;
mod proof;
mod recv;
mod seats;
mod send;

pub use area::{try_export, Area};
pub use areas::{agent, limit, Areas};
pub use layout::RECEIVE_BUFFER;
pub use proof::{Payload, Proof};
pub use recv::DeviceRecv;
pub use send::DeviceSend;
