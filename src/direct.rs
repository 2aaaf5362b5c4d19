//! The interface between a connection and a direct transport, which moves a whole transfer without chunks and frames because each
//! process can copy the other's memory. Knows nothing of how it copies.
//!
//! A transfer takes one route from its first byte to its last, and [`Direct::route`] decides it before the transfer starts. If
//! the peer has to be asked first, the transfer waits and is routed again at each [`Event::Answered`].

use crate::region::{Hold, Region, RegionUse};
use crate::stats::ChannelStats;
use crate::status::{Error, Result};
use crate::types::{Key, Landing, Piece, Place};
use std::time::Instant;

/// Direction of data, seen from this engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Out,
    In,
}

/// An event of a transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A chunk was sent: its source may change.
    Sent(u16, Key, u64),
    /// A chunk is in place.
    Received(u16, Key, u64),
    /// A channel has failed, or was given up, and is closed: it touches no memory.
    Closed(u16, Error),
    /// Bytes of a direct transfer are in place.
    Moved(Key, u64),
    /// A direct transfer has ended: all bytes are in place, or the peer refused it.
    Ended(Key, bool),
    /// The peer has answered: route the waiting transfers again.
    Answered,
    /// The peer claimed a region and was refused.
    Denied(Error),
}

/// The two regions, one of each engine, that blocks of a transfer lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pairing {
    /// Index of this engine's region in the transfer's table, and its place.
    pub local: u16,
    pub here: Place,
    /// The peer's region, its token, and its place.
    pub region: u64,
    pub token: [u8; 16],
    pub there: Place,
    /// First byte and end of the range that all blocks cover, here and at the peer.
    pub near: (u64, u64),
    pub far: (u64, u64),
}

/// The blocks of a transfer, handed out once.
pub(crate) trait Blocks {
    /// Appends the next blocks, at most `most` of them and not many more than `bytes`, all of one pairing, and returns its index.
    /// `None` at the end. Sources and destinations are addresses in their owners' processes.
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize>;

    /// Whether no block is left.
    fn is_done(&self) -> bool;
}

/// A transfer to start.
pub(crate) struct Start<'a> {
    /// Its name.
    pub key: Key,
    pub way: Way,
    /// Its bytes and blocks.
    pub total: u64,
    pub count: usize,
    /// Every block lies in the regions of its pairing.
    pub pairings: &'a [Pairing],
    /// Holds this engine's regions.
    pub hold: &'a Hold,
    pub blocks: &'a mut dyn Blocks,
    pub now: Instant,
}

/// The route of a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Directly, starting now.
    Direct,
    /// The peer has been asked: decide again at the next [`Event::Answered`].
    Wait,
    /// In chunks over channels.
    Channels,
    /// None: the peer refuses it.
    Refused(Error),
}

/// What a direct transport is doing, for the thread that decides whether to poll, spin or sleep.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Activity {
    /// Transfers are in flight.
    pub busy: bool,
    /// [`Direct::progress`] has something to do, transfers or not.
    pub active: bool,
    /// Copies are running whose end rings no doorbell.
    pub copying: bool,
    /// The end of a copy shows in memory only: poll as often as possible.
    pub wants_polling: bool,
    /// A small direct transfer has just started and should end by this time; spinning until then beats returning to the caller.
    pub spin_until: Option<Instant>,
}

/// A transport that moves whole transfers.
///
/// Call [`Direct::route`], then [`Direct::start`] if the answer allows it, and [`Direct::progress`] as long as
/// [`Activity::active`] holds. Dropping it ends all access to registered memory on the connection's behalf.
pub(crate) trait Direct: Send {
    /// Decides the route of a transfer. Asks the peer if necessary.
    ///
    /// # Errors
    /// When the connection must end.
    fn route(&mut self, way: Way, pairings: &[Pairing], hold: &Hold) -> Result<Route>;

    /// Starts a transfer that [`Direct::route`] lets go directly, or one into the buffer of a `landing`. [`Event::Moved`] and
    /// [`Event::Ended`] report its progress.
    ///
    /// # Errors
    /// When the connection must end.
    fn start(&mut self, transfer: &mut Start<'_>, landing: Option<Landing>) -> Result<()>;

    /// Whether a message from memory of `place`, in regions of `hold`, can be sent to any landing that the peer grants.
    fn can_send(&mut self, place: Place, hold: &Hold) -> bool;

    /// Grants a buffer in a region, given by its first byte and length, for one message from the peer's memory at `there`; `None`
    /// if that is impossible.
    fn land(&mut self, key: Key, region: &RegionUse, buffer: (u64, u64), there: Place) -> Option<Landing>;

    /// The peer withdrew the message of a landing. `false` if it has already begun to write.
    fn withdraw(&mut self, key: Key) -> bool;

    /// Advances everything. Returns whether anything moved.
    ///
    /// # Errors
    /// When the connection must end.
    fn progress(&mut self, now: Instant, events: &mut Vec<Event>) -> Result<bool>;

    /// Its current activity.
    fn activity(&self) -> Activity;

    /// Prepares the peer for a region that it may soon want to reach.
    fn offer(&mut self, region: &Region);

    /// A region has ended and is no longer used.
    fn forget(&mut self, region: u64);

    /// Whether a transfer of the peer uses a region of this engine.
    fn uses_region(&self, region: u64) -> bool;

    /// Allocates what copies into memory of `place` need.
    ///
    /// # Errors
    /// Errors of the GPU's driver.
    fn ready(&mut self, place: Place) -> Result<()>;

    /// Whether copies between these places cross NVLink.
    fn by_nvlink(&self, here: Place, there: Place) -> bool;

    /// Bytes sent and received.
    fn flowed(&self) -> (u64, u64);

    /// Transfers in flight in a direction, for an error text; empty if there are none.
    fn describe(&self, way: Way) -> String;

    /// Its statistics.
    fn stats(&self, kernel: bool) -> ChannelStats;
}
