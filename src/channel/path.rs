//! The interface below the router: a path is a set of channels to the peer over one plugin. Each channel carries chunks in order.
//! Knows nothing of transfers beyond a chunk's key and tag.

use super::device::DeviceCopier;
use super::plan::{Chunk, ChunkLimits};
use super::stripe::Loads;
use crate::direct::{Event, Way};
use crate::net::setup::Pair;
use crate::region::Hold;
use crate::stats::ChannelStats;
use crate::status::{Error, Result};
use crate::types::{Key, Part, Place};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A chunk to send.
pub(crate) struct Departure {
    /// Its transfer.
    pub key: Key,
    /// Its bytes.
    pub chunk: Chunk,
    /// Keeps its memory registered; dropped when the chunk is sent or its channel is closed.
    pub hold: Hold,
    /// Part of a large transfer.
    pub bulk: bool,
    /// Identifies the transfer and the position in it; both engines compute the same.
    pub tag: i32,
}

/// A chunk to receive.
pub(crate) struct Arrival {
    /// Its transfer.
    pub key: Key,
    /// Bytes, exactly.
    pub len: usize,
    /// As in the departure.
    pub tag: i32,
    /// Its destination.
    pub dest: Dest,
}

/// The destination of a chunk.
pub(crate) enum Dest {
    /// Registered memory of one place; the hold is dropped when the chunk is in place or its channel is closed.
    Memory {
        /// The place of the parts.
        place: Place,
        /// The pieces, in order.
        parts: Vec<Part>,
        /// Keeps them registered; never read.
        #[allow(dead_code)]
        hold: Hold,
    },
    /// The transfer was refused, but its data is in flight and must be drained.
    Discard,
}

/// What the network has of the bytes that a channel sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outbound {
    /// Bytes that the peer's kernel has acknowledged; those of whole chunks if the plugin does not report them.
    pub acknowledged: u64,
    /// Bytes in this host's kernel that the peer's has not acknowledged.
    pub waiting: u64,
    /// An acknowledgement is due: the network has some of them, and they do not wait for room at the peer. Without reports: the plugin
    /// has not finished a chunk.
    pub due: bool,
    /// No packet of so many bytes, the full size, has passed, though the smaller ones of the set-up did.
    pub too_large: Option<u32>,
    /// For how long the plugin's own control connections have had no answer, though one is due.
    pub control_silent: Option<Duration>,
}

/// The network's progress on a channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line<'a> {
    /// The NIC of this engine, and the address that the channel has there; `None` if it is closed or the plugin does not say.
    pub nic: &'a str,
    pub local: Option<IpAddr>,
    /// Bytes sent and received, including partial chunks; `None` if the plugin does not report them.
    pub moved: Option<(u64, u64)>,
    /// Bytes of whole chunks that have come in.
    pub arrived: u64,
    pub outbound: Outbound,
    /// Chunks in flight, sent and received.
    pub under_way: (usize, usize),
    /// How many of the incoming chunks have a posted receive.
    pub posted: usize,
    /// The channel is open.
    pub open: bool,
}

/// What becomes of a channel.
pub(crate) enum Change {
    /// It is closed, because of this, as if it had failed.
    Close(Error),
    /// It is closed, and these comms take its place. It receives; it is not chosen for sending before `Open`.
    Restore(Box<Pair>),
    /// The peer has opened its end too.
    Open,
}

/// Whether a path carries memory between two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carries {
    No,
    /// Once one of its channels, all of which are lost, has come back.
    Later,
    Now,
}

impl Carries {
    /// `fits`: its channels are made for it; `open`: one of them is open.
    pub(crate) fn of(fits: bool, open: bool) -> Carries {
        match (fits, open) {
            (false, _) => Carries::No,
            (true, false) => Carries::Later,
            (true, true) => Carries::Now,
        }
    }
}

/// The device copier of a connection; absent if device memory cannot be registered.
pub(crate) type Copier = Option<Box<dyn DeviceCopier>>;

/// A path to the peer. Dropping it closes its channels: afterwards it does not touch registered memory.
pub(crate) trait Path: Send {
    /// The number of its channels.
    fn channels(&self) -> usize;

    /// The limits of the chunks of a transfer of `total` bytes. Those of the largest are the limits of all.
    fn limits(&self, total: u64) -> ChunkLimits;

    /// Whether its channels carry memory between the place `local` here and the place `peer` at the peer.
    fn carries(&self, local: Place, peer: Place) -> Carries;

    /// Fills empty lists with the load of each open channel for a chunk from `place`, and of the NICs. `bulk`: the chunk is part of a
    /// large transfer. All of those together leave room in the window for small ones, which do not count against them.
    fn loads(&mut self, place: Place, bulk: bool, now: Instant, out: &mut Loads);

    /// Takes a chunk for sending on a channel with a free window slot. It is lost if the channel fails.
    fn submit(&mut self, channel: usize, departure: Departure, copier: &mut Copier, now: Instant) -> Result<()>;

    /// Takes a chunk that the peer announced on a channel. It is lost if the channel has failed.
    ///
    /// # Errors
    /// `Protocol` for a destination that the channel cannot carry.
    fn expect(&mut self, channel: usize, arrival: Arrival) -> Result<()>;

    /// Advances all channels; returns whether anything advanced. A channel that fails is closed, which an event reports; an error ends
    /// the connection.
    fn progress(&mut self, copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool>;

    /// Closes a channel, or opens it again.
    ///
    /// # Errors
    /// `Internal` for a channel that cannot be restored, since it is not closed.
    fn change(&mut self, channel: usize, change: Change) -> Result<()>;

    /// Whether chunks are announced, in flight or expected, or a channel is about to close.
    fn busy(&self) -> bool;

    /// The network's progress on each channel, in the order of their numbers. A channel that has failed, idle or not, is closed.
    ///
    /// # Errors
    /// When the connection must end.
    fn network(&mut self, each: &mut dyn FnMut(Line<'_>)) -> Result<()>;

    /// Closes the channels of a NIC that has become so slow that others deliver sooner what it holds. Returns whether several NICs have
    /// something to deliver, so that it must be called again soon.
    fn relieve(&mut self, _now: Instant) -> bool {
        false
    }

    /// The two addresses of a channel in a direction, for an error text.
    fn describe(&self, channel: usize, way: Way) -> String;

    /// Appends the statistics of each channel. `kernel`: including the kernel's.
    fn stats(&self, kernel: bool, now: Instant, out: &mut Vec<ChannelStats>);

    /// Allocates and registers everything for chunks of `place`, so that later chunks cause no allocation in the GPU driver. Does
    /// nothing for memory that the path does not carry.
    fn ready(&mut self, _place: Place, _copier: &mut Copier) -> Result<()> {
        Ok(())
    }

    /// Drops the registrations of a region that is no longer used.
    fn forget_region(&mut self, id: u64);
}
