//! The path between two processes of one host: the side where the data goes copies it straight out of the other's memory. Knows nothing
//! of transfers.
//!
//! `link` finds out whether both sides share a host and prove it, over a `socket`; `path` carries chunks, told in a `ring` of a
//! `memfile`, and what needs no asking: reads under `grants`, writes as `orders`; `puller` is what a kind of memory must do, `host`, `cuda`
//! and `emulated` do it, `pool` has the threads of `host`, and `probe` looks
//! at it for the first time. `sharing` keeps which allocations either side may
//! pull from, told in `notes`. Where reads are slow the source's side pushes instead, into memory of the other library (`push`), from where
//! the destination's side copies.

pub(crate) mod cuda;
mod emulated;
mod front;
mod grants;
mod host;
mod link;
mod memfile;
mod notes;
mod orders;
mod path;
mod pool;
mod probe;
pub(crate) mod puller;
mod push;
mod ring;
mod sharing;
mod shelf;
mod socket;

pub(crate) use emulated::{gpu as emulated_gpu, EmulatedMemory};
pub(crate) use link::{Have, Linked, Meeting, Opening, ProofKeys};
pub(crate) use path::{LocalPath, Watched};
pub(crate) use pool::Bell;

/// What the path is called among NICs and plugins.
pub(crate) const NAME: &str = "local";
