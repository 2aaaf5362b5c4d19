//! The seam between a connection and a direct transport: one that moves a transfer by itself, without chunks and frames, because each
//! process can copy the other's memory. Knows nothing of how it copies.
//!
//! A transfer goes one way from its first byte to its last, and [`Direct::route`] decides which before it starts. Where the peer has to
//! be asked first, the transfer waits, and is routed again at each [`Event::Answered`].

use crate::region::{Hold, Region, RegionUse};
use crate::stats::ChannelStats;
use crate::status::{Error, Result};
use crate::types::{Key, Landing, Piece, Place};
use std::time::Instant;

/// Direction of data, as this engine sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Out,
    In,
}

/// What happened on a transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A chunk left: its source may change.
    Sent(Key, u64),
    /// A chunk is in place.
    Received(Key, u64),
    /// Bytes of a direct transfer are in place.
    Moved(Key, u64),
    /// A direct transfer has ended: all bytes are in place, or the peer refused it.
    Ended(Key, bool),
    /// The peer has answered: transfers that wait are to be routed again.
    Answered,
    /// The peer claimed a region and was refused.
    Denied(Error),
}

/// The two regions, one of each engine, that blocks of a transfer lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pairing {
    /// Index of this engine's region in the transfer's table, and where it lies.
    pub local: u16,
    pub here: Place,
    /// The peer's region, its token, and where it lies.
    pub region: u64,
    pub token: [u8; 16],
    pub there: Place,
    /// First byte and end of what all blocks take, here and there.
    pub near: (u64, u64),
    pub far: (u64, u64),
}

/// The blocks of a transfer, handed out once.
pub(crate) trait Blocks {
    /// Appends the next blocks, at most `most` of them and not many more than `bytes`, all of one pairing, whose index it returns. `None`
    /// at the end. Sources and destinations are addresses in their owners' processes.
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize>;

    /// No block is left.
    fn is_done(&self) -> bool;
}

/// A transfer that is to start.
pub(crate) struct Start<'a> {
    /// Its name.
    pub key: Key,
    pub way: Way,
    /// Bytes and blocks of it.
    pub total: u64,
    pub count: usize,
    /// Every block lies in the regions of its pairing.
    pub pairings: &'a [Pairing],
    /// Holds this engine's regions.
    pub hold: &'a Hold,
    pub blocks: &'a mut dyn Blocks,
}

/// How a transfer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Directly, from now on.
    Direct,
    /// The engine has asked the peer: decide again at the next [`Event::Answered`].
    Wait,
    /// In chunks over channels.
    Channels,
    /// Not at all: the peer refuses it.
    Refused(Error),
}

/// What a direct transport is doing, for the thread that decides whether to poll, spin or sleep.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Activity {
    /// Transfers are in flight.
    pub busy: bool,
    /// [`Direct::progress`] has something to do, transfers or not.
    pub active: bool,
    /// Copies run whose end rings no doorbell.
    pub copying: bool,
    /// The end of something shows in memory: look as often as possible.
    pub wants_polling: bool,
    /// Something small has just started: spinning briefly beats returning to the caller.
    pub worth_spinning: bool,
}

/// A transport that moves whole transfers.
///
/// Use: [`Direct::route`], then [`Direct::start`] where it says so; [`Direct::progress`] as long as [`Activity::active`] holds. Dropping it ends all
/// access to registered memory on the connection's behalf.
pub(crate) trait Direct: Send {
    /// Decides how a transfer goes. Asks the peer where it must.
    ///
    /// # Errors
    /// When the connection must end.
    fn route(&mut self, way: Way, pairings: &[Pairing], hold: &Hold) -> Result<Route>;

    /// Starts a transfer that [`Direct::route`] has let through, or one into the buffer of a `landing`. [`Event::Moved`] and [`Event::Ended`]
    /// tell what becomes of it.
    ///
    /// # Errors
    /// When the connection must end.
    fn start(&mut self, transfer: &mut Start<'_>, landing: Option<Landing>) -> Result<()>;

    /// Whether a message from memory of `place`, in regions that `hold` has, can be sent into whatever landing the peer gives.
    fn can_send(&mut self, place: Place, hold: &Hold) -> bool;

    /// Grants a buffer in a region, its first byte and length, for one message from the peer's memory at `there`; `None` where that is
    /// impossible.
    fn land(&mut self, key: Key, region: &RegionUse, buffer: (u64, u64), there: Place) -> Option<Landing>;

    /// The peer gave up the message of a landing. `false` when it has begun to write.
    fn withdraw(&mut self, key: Key) -> bool;

    /// Advances everything; whether something moved.
    ///
    /// # Errors
    /// When the connection must end.
    fn progress(&mut self, now: Instant, events: &mut Vec<Event>) -> Result<bool>;

    /// What it is doing.
    fn activity(&self, now: Instant) -> Activity;

    /// Prepares the peer for a region that it may want to reach soon.
    fn offer(&mut self, region: &Region);

    /// A region has ended: nothing uses it any more.
    fn forget(&mut self, region: u64);

    /// Whether a transfer of the peer uses a region of this engine.
    fn uses_region(&self, region: u64) -> bool;

    /// Allocates what copies into memory of `place` need.
    ///
    /// # Errors
    /// Of the GPU's driver.
    fn ready(&mut self, place: Place) -> Result<()>;

    /// Bytes sent and received.
    fn flowed(&self) -> (u64, u64);

    /// Transfers in flight in a direction, for an error text; empty if there are none.
    fn describe(&self, way: Way) -> String;

    /// Its statistics.
    fn stats(&self, kernel: bool) -> ChannelStats;
}
