//! Data that arrives: streams that the peer announced or this engine asked for, and their chunks in flight. A chunk that fits no
//! stream is a violation. Knows nothing of the bytes of frames, of sockets or of time.

use super::limits;
use super::outgoing::tag;
use crate::channel::path::{Arrival, Dest};
use crate::channel::plan::Walk;
use crate::channel::router::Channels;
use crate::hash::Map;
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Key, Segment};
use crate::wire::frame::Grant;

/// What the end of a stream means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The peer's write: the peer gets a verdict.
    Write,
    /// A read of this engine.
    Read,
    /// A receive of this engine, with its id, that a message of the peer has met: the peer gets a verdict too.
    Receive(u64),
    /// A refused write of the peer, drained to the end. `true` if the budgets had room for it.
    Refused(bool),
}

/// Where the bytes of a stream go.
enum Target {
    Memory {
        stream: Walk,
        hold: Hold,
        ending: Ending,
    },
    /// The data is dropped; `left` bytes may still be announced.
    Nowhere {
        total: u64,
        left: u64,
        had_room: bool,
    },
}

struct InStream {
    target: Target,
    /// Bytes announced and not yet in place.
    arriving: u64,
    /// Whether a chunk was announced.
    begun: bool,
    segments: usize,
}

impl InStream {
    fn unannounced(&self) -> u64 {
        match &self.target {
            Target::Memory { stream, .. } => stream.remaining(),
            Target::Nowhere { left, .. } => *left,
        }
    }
}

/// A stream that has ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub ending: Ending,
    /// Its list of segments, so that its memory can be used again.
    pub list: Vec<Segment>,
    pub segments: usize,
}

#[derive(Default)]
pub(super) struct Incoming {
    streams: Map<Key, InStream>,
    /// Chunks in flight, and chunks that have arrived.
    expected: usize,
    arrived: u64,
}

impl Incoming {
    /// Starts a stream into memory. There must be none with this key.
    pub(super) fn start(&mut self, key: Key, segments: Vec<Segment>, hold: Hold, ending: Ending) {
        let stream = Walk::new(segments);
        let segments = stream.segments();
        let target = Target::Memory { stream, hold, ending };
        self.streams.insert(key, InStream { target, arriving: 0, begun: false, segments });
    }

    /// Starts a stream of at most `total` bytes that is drained. `had_room`: the budgets count it.
    pub(super) fn refuse(&mut self, key: Key, total: u64, had_room: bool) {
        let target = Target::Nowhere { total, left: total, had_room };
        self.streams.insert(key, InStream { target, arriving: 0, begun: false, segments: 0 });
    }

    pub(super) fn contains(&self, key: Key) -> bool {
        self.streams.contains_key(&key)
    }

    /// Whether a chunk of the stream was announced.
    pub(super) fn begun(&self, key: Key) -> bool {
        self.streams.get(&key).is_some_and(|s| s.begun)
    }

    /// The peer announces a chunk.
    ///
    /// `Protocol` when it does not fit its stream, its channel or a limit.
    /// `Protocol` when it fits no stream, no channel or no limit.
    pub(super) fn announce(&mut self, key: Key, grant: Grant, channels: &mut Channels) -> Result<()> {
        let len = grant.len as usize;
        let Some(limits) = channels.limits(grant.channel) else { bail!(Protocol, "channel {} does not exist", grant.channel) };
        if len == 0 || len > limits.bytes {
            bail!(Protocol, "a chunk of {len} bytes; the agreed limit is {}", limits.bytes);
        }
        limits::expected(self.expected)?;
        let Some(inc) = self.streams.get_mut(&key) else {
            bail!(Protocol, "a chunk of transfer {}, which expects no data", key.id)
        };
        let (tag, dest) = match &mut inc.target {
            Target::Memory { stream, hold, .. } => {
                let tag = tag(key, false, stream.offset());
                let Some(chunk) = stream.take_exact(len, limits.crossed) else {
                    bail!(Protocol, "a chunk of {len} bytes does not fit the plan of transfer {}", key.id)
                };
                (tag, Dest::Memory { place: chunk.place, parts: chunk.parts, hold: hold.clone() })
            }
            Target::Nowhere { total, left, .. } => {
                let tag = tag(key, false, *total - *left);
                let Some(rest) = left.checked_sub(len as u64) else { bail!(Protocol, "more data than transfer {} has", key.id) };
                *left = rest;
                (tag, Dest::Discard)
            }
        };
        inc.begun = true;
        inc.arriving += len as u64;
        self.expected += 1;
        channels.expect(grant.channel, Arrival { key, len, tag, dest })
    }

    /// A chunk is in place or drained. Returns the end of the stream if it was the last one.
    ///
    /// # Errors
    /// `Internal` for a chunk that was not expected.
    pub(super) fn arrived(&mut self, key: Key, len: u64) -> Result<Option<Ended>> {
        let Some(inc) = self.streams.get_mut(&key) else { bail!(Internal, "a chunk has arrived that belongs to no stream") };
        let Some(left) = inc.arriving.checked_sub(len) else { bail!(Internal, "more bytes have arrived than were announced") };
        inc.arriving = left;
        self.expected -= 1;
        self.arrived += 1;
        Ok(self.ended(key))
    }

    /// Chunks in flight.
    pub(super) fn expected(&self) -> usize {
        self.expected
    }

    /// Chunks that have arrived so far.
    pub(super) fn chunks(&self) -> u64 {
        self.arrived
    }

    /// Ends a stream of which nothing is in flight or still to come.
    fn ended(&mut self, key: Key) -> Option<Ended> {
        let inc = self.streams.get(&key)?;
        (inc.arriving == 0 && inc.unannounced() == 0).then(|| self.remove(key)).flatten()
    }

    /// Removes a stream, however much of it is missing. No chunk of it may be in flight.
    fn remove(&mut self, key: Key) -> Option<Ended> {
        let inc = self.streams.remove(&key)?;
        Some(match inc.target {
            Target::Memory { stream, ending, .. } => Ended { ending, list: stream.into_list(), segments: inc.segments },
            Target::Nowhere { had_room, .. } => Ended { ending: Ending::Refused(had_room), list: Vec::new(), segments: 0 },
        })
    }

    /// The peer announces no more of a refused write. Returns its end if nothing is in flight.
    ///
    /// # Errors
    /// `Protocol` when there is no such write, or it was cancelled before.
    pub(super) fn cancel(&mut self, key: Key) -> Result<Option<Ended>> {
        match self.streams.get_mut(&key).map(|inc| &mut inc.target) {
            Some(Target::Nowhere { left, .. }) if *left > 0 => *left = 0,
            _ => bail!(Protocol, "the peer cancels transfer {}, which was not refused", key.id),
        }
        Ok(self.ended(key))
    }

    /// Removes a stream of which no chunk was announced: a verdict or data in a frame ends it.
    ///
    /// # Errors
    /// `Protocol` when chunks were announced, or there is no such stream.
    pub(super) fn take_unbegun(&mut self, key: Key) -> Result<(Walk, Hold, Ending, usize)> {
        if self.begun(key) || !self.contains(key) {
            bail!(Protocol, "an answer to transfer {} that does not fit its state", key.id);
        }
        match self.streams.remove(&key) {
            Some(InStream { target: Target::Memory { stream, hold, ending }, segments, .. }) => {
                Ok((stream, hold, ending, segments))
            }
            _ => bail!(Protocol, "an answer to transfer {} that does not fit its state", key.id),
        }
    }

    /// The receive of this engine that the peer's message `key` was matched with.
    pub(super) fn receive_of(&self, key: Key) -> Option<u64> {
        match self.streams.get(&key)?.target {
            Target::Memory { ending: Ending::Receive(id), .. } => Some(id),
            _ => None,
        }
    }

    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.streams.values().any(|s| matches!(&s.target, Target::Memory { hold, .. } if hold.holds(id)))
    }

    /// The keys of all streams, each with the number of segments that it keeps of the peer's announcement.
    #[cfg(any(test, fuzzing))]
    pub(super) fn keys(&self) -> Vec<(Key, usize)> {
        let announced = |inc: &InStream| match inc.target {
            Target::Memory { ending: Ending::Receive(_), .. } => 0,
            _ => inc.segments,
        };
        self.streams.iter().map(|(&key, inc)| (key, announced(inc))).collect()
    }

    /// Checks that chunks are counted exactly while bytes are in flight.
    #[cfg(any(test, fuzzing))]
    pub(super) fn audit(&self) -> std::result::Result<(), String> {
        let arriving: u64 = self.streams.values().map(|inc| inc.arriving).sum();
        if (self.expected == 0) != (arriving == 0) {
            return Err(format!("{} chunks are in flight with {arriving} bytes", self.expected));
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Incoming::default();
    }
}
