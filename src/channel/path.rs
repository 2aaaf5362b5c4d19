//! The seam below the router: a path is one way from this engine to the peer, made of channels that carry chunks in order. Knows
//! nothing of transfers beyond the key and tag that a chunk bears.

use super::device::DeviceCopier;
use super::plan::{Chunk, ChunkLimits};
use super::stripe::Loads;
use crate::direct::{Event, Way};
use crate::region::Hold;
use crate::stats::ChannelStats;
use crate::status::Result;
use crate::types::{Key, Part, Place};
use std::time::Instant;

/// A chunk to send.
pub(crate) struct Departure {
    /// Its stream.
    pub key: Key,
    /// Its bytes.
    pub chunk: Chunk,
    /// What keeps its memory registered; dropped when the chunk is gone or its channel is closed.
    pub hold: Hold,
    /// Part of a large transfer.
    pub bulk: bool,
    /// Names stream and place in the stream; both sides compute the same.
    pub tag: i32,
}

/// A chunk to receive.
pub(crate) struct Arrival {
    /// Its stream.
    pub key: Key,
    /// Bytes, exactly.
    pub len: usize,
    /// As the sender's.
    pub tag: i32,
    /// Where it goes.
    pub dest: Dest,
}

/// Where a chunk goes.
pub(crate) enum Dest {
    /// Registered memory of one place; the hold is dropped when the chunk is in place or its channel is closed.
    Memory {
        /// Where the parts lie.
        place: Place,
        /// The pieces, in order.
        parts: Vec<Part>,
        /// What keeps them registered; nobody looks at it.
        #[allow(dead_code)]
        hold: Hold,
    },
    /// Nowhere: the transfer was refused, but its data is on its way and must be drained.
    Discard,
}

/// What the network has done on a channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line<'a> {
    /// This side's NIC.
    pub nic: &'a str,
    /// Bytes that it took from this side and brought to it, parts of chunks included; `None` where the plugin does not tell.
    pub moved: Option<(u64, u64)>,
    /// Chunks under way, out and in.
    pub under_way: (usize, usize),
    /// Of those that come, how many the plugin could put in place at once.
    pub posted: usize,
}

/// The device copier of a connection, absent where no device memory can be registered.
pub(crate) type Copier = Option<Box<dyn DeviceCopier>>;

/// One way to the peer. Dropping it closes its channels: afterwards nothing of it touches registered memory.
pub(crate) trait Path: Send {
    /// How many channels it has.
    fn channels(&self) -> usize;

    /// What its chunks are at most.
    fn limits(&self) -> ChunkLimits;

    /// Bytes of the chunks that a transfer of `total` bytes should be cut into.
    fn chunk_len(&self, total: u64) -> usize;

    /// Whether it carries memory of this side's `local` to or from the peer's `peer`.
    fn carries(&self, local: Place, peer: Place) -> bool;

    /// Whether it carries memory of this side's `local` to or from anywhere.
    fn carries_local(&self, local: Place) -> bool;

    /// The load of each channel for a chunk from `place`, and of the NICs, into empty lists. `bulk`: the chunk is part of a large
    /// transfer, and all of those together leave room in the window for small ones, which do not count against them.
    fn loads(&mut self, place: Place, bulk: bool, now: Instant, out: &mut Loads);

    /// Takes a chunk for sending on a channel that has a free place.
    fn submit(&mut self, channel: usize, departure: Departure, copier: &mut Copier, now: Instant) -> Result<()>;

    /// Takes a chunk that the peer has announced on a channel.
    fn expect(&mut self, channel: usize, arrival: Arrival) -> Result<()>;

    /// Advances everything that can advance; whether something did.
    fn progress(&mut self, copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool>;

    /// Chunks are announced, in flight or expected.
    fn busy(&self) -> bool;

    /// What the network has done on each channel so far, in the order of their numbers.
    ///
    /// # Errors
    /// When a channel has failed, idle or not.
    fn network(&self, each: &mut dyn FnMut(Line<'_>)) -> Result<()>;

    /// The two ends of a channel in a direction, for an error text.
    fn describe(&self, channel: usize, way: Way) -> String;

    /// What each channel counts. `kernel`: with what the kernel knows of it.
    fn stats(&self, kernel: bool, now: Instant, out: &mut Vec<ChannelStats>);

    /// Has what chunks of `place` need here allocated and registered: from then on no chunk of it makes a GPU's driver allocate. For
    /// memory that the path does not carry it does nothing.
    fn ready(&mut self, _place: Place, _copier: &mut Copier) -> Result<()> {
        Ok(())
    }

    /// Drops registrations of a region that nothing uses any more.
    fn forget_region(&mut self, id: u64);
}
