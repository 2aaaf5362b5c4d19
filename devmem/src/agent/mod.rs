//! The agent: a process with CAP_NET_ADMIN binds queues and steers connections for others that have no privileges. It never touches data.
//!
//! - `protocol`: the messages; `passing`: sending them with a descriptor; `client`: the side of a transfer process; `server`: the agent;
//!   `closer`: closes what clients have passed

mod client;
mod closer;
mod passing;
mod protocol;
mod server;

/// Where the agent listens by default.
pub const SOCKET: &str = "/run/uccl-devmem/agent.sock";

pub use client::Agent;
pub use protocol::{Answer, Request, ANSWER_BYTES, REQUEST_BYTES};
pub use server::{allow_descriptors, Allowed, Kernel, Privileges, Server};
