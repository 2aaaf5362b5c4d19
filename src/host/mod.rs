//! The path between two processes of one host: the side where the data goes copies it straight out of the other's memory. Knows nothing
//! of transfers.
//!
//! `link` finds out whether both sides share a host and prove it, over a `socket`; `path` carries chunks, told in a `ring` of a
//! `memfile`, and what needs no asking: reads under `grants`, writes as `orders`; `puller` is what a kind of memory must do, `host`, `cuda`
//! and `emulated` do it, `pool` has the threads of `host`, and `probe` looks
//! at it for the first time. `sharing` keeps which allocations either side may
//! pull from, told in `notes`. Where reads are slow the source's side pushes instead, into memory of the other library (`push`), from where
//! the destination's side copies.

mod exports;
mod grants;
mod layout;
mod link;
pub(crate) mod memory;
mod messages;
mod orders;
mod path;
mod push;
mod ring;
mod shelf;
mod shm;
mod socket;

pub(crate) use link::{Have, Linked, Meeting, Opening, ProofKeys};
pub(crate) use memory::emulated::{gpu as emulated_gpu, EmulatedMemory};
pub(crate) use memory::pool::Bell;
pub(crate) use path::{LocalPath, Watched};

/// What the path is called among NICs and plugins.
pub(crate) const NAME: &str = "local";
