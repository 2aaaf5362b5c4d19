//! Direct transfers between two processes on one host: the engine at the destination copies out of the other's memory, so that only the
//! owner of memory ever writes it. Knows nothing of channels and frames.
//!
//! `link` finds out whether both engines are on one host, over a `socket`, with `messages`; `transport` is the result. `exports`
//! and `grants` record who may touch what. Blocks move in flows over one `ring` in shared memory (`shm`, `layout`): `read`, and `write`,
//! which the peer carries out as `orders`; where reading is slow, in a third,
//! `staged` through `areas` (`gather`, `fetch`, `queue`); `copies` are under way for either. `memory` is what each kind of memory must do.

mod areas;
mod blocks;
mod copies;
mod exports;
mod fetch;
mod gather;
mod grants;
mod layout;
mod link;
mod locate;
pub(crate) mod memory;
mod messages;
mod orders;
mod queue;
mod read;
mod ring;
mod shm;
mod socket;
mod staged;
mod transport;
mod write;

pub(crate) use link::{Have, Linked, Meeting, Opening, ProofKeys};
pub(crate) use memory::emulated::{gpu as emulated_gpu, EmulatedMemory};
pub(crate) use memory::pool::Bell;
pub(crate) use transport::{Lookup, OneHost, Watched};

/// What the transport is called among NICs and plugins.
pub(crate) const NAME: &str = "local";
