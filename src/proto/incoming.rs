//! Data that arrives: streams that the peer announced or this engine asked for, and their chunks in flight. A chunk that fits no
//! stream is a violation. Knows nothing of the bytes of frames, of sockets or of time.

use super::lanes::{lane, Announced, InLane};
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
use std::collections::BTreeMap;

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
    /// The data is dropped; `left` bytes may still be announced. `cancelled`: the peer announces no more.
    Nowhere {
        total: u64,
        left: u64,
        had_room: bool,
        cancelled: bool,
    },
}

struct InStream {
    target: Target,
    /// Bytes announced and not yet in place.
    arriving: u64,
    /// Offsets and lengths of what lost channels did not deliver, and the peer has not announced again.
    holes: BTreeMap<u64, u64>,
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

    /// The offset of the next bytes that were never announced.
    fn offset(&self) -> u64 {
        match &self.target {
            Target::Memory { stream, .. } => stream.offset(),
            Target::Nowhere { total, left, .. } => *total - *left,
        }
    }

    /// Takes a chunk out of a hole; `false` when it does not lie in one.
    fn refill(&mut self, offset: u64, len: u64) -> bool {
        let Some((&start, &hole)) = self.holes.range(..=offset).next_back() else { return false };
        let (end, over) = (start + hole, offset.checked_add(len));
        if over.is_none_or(|over| over > end) {
            return false;
        }
        self.holes.remove(&start);
        let rest = [(start, offset - start), (offset + len, end - offset - len)];
        self.holes.extend(rest.into_iter().filter(|&(_, len)| len > 0));
        true
    }

    /// The destination of a chunk at `offset`; `None` when it does not fit the plan.
    fn dest(&mut self, offset: u64, len: usize, crossed: usize) -> Option<Dest> {
        let next = offset == self.offset();
        if !next && !self.refill(offset, len as u64) {
            return None;
        }
        match &mut self.target {
            Target::Memory { stream, hold, .. } => {
                let chunk = if next { stream.take_exact(len, crossed)? } else { stream.again_exact(offset, len, crossed)? };
                Some(Dest::Memory { place: chunk.place, parts: chunk.parts, hold: hold.clone() })
            }
            Target::Nowhere { left, .. } => {
                *left = if next { left.checked_sub(len as u64)? } else { *left };
                Some(Dest::Discard)
            }
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
    /// By channel.
    lanes: Vec<InLane>,
    /// Chunks in flight, and holes that lost ones have left.
    expected: usize,
    holes: usize,
    /// Chunks that have arrived and that were not reported to the peer.
    unreported: u64,
    /// A read has ended since the last report: the peer keeps its memory in use until that is reported.
    owes: bool,
}

impl Incoming {
    /// Starts a stream into memory. There must be none with this key.
    pub(super) fn start(&mut self, key: Key, segments: Vec<Segment>, hold: Hold, ending: Ending) {
        let stream = Walk::new(segments);
        let segments = stream.segments();
        let target = Target::Memory { stream, hold, ending };
        self.streams.insert(key, InStream { target, arriving: 0, holes: BTreeMap::new(), begun: false, segments });
    }

    /// Starts a stream of at most `total` bytes that is drained. `had_room`: the budgets count it.
    pub(super) fn refuse(&mut self, key: Key, total: u64, had_room: bool) {
        let target = Target::Nowhere { total, left: total, had_room, cancelled: false };
        self.streams.insert(key, InStream { target, arriving: 0, holes: BTreeMap::new(), begun: false, segments: 0 });
    }

    pub(super) fn contains(&self, key: Key) -> bool {
        self.streams.contains_key(&key)
    }

    /// Whether a chunk of the stream was announced.
    pub(super) fn begun(&self, key: Key) -> bool {
        self.streams.get(&key).is_some_and(|s| s.begun)
    }

    /// The peer announces a chunk at `offset` of its stream: the next one, or one that a lost channel did not deliver. `delivers`: this
    /// engine has not closed the channel, which would make it a lost one.
    ///
    /// # Errors
    /// `Protocol` when it does not fit its stream, its channel or a limit.
    pub(super) fn announce(
        &mut self,
        key: Key,
        offset: u64,
        grant: Grant,
        delivers: bool,
        channels: &mut Channels,
    ) -> Result<()> {
        let len = grant.len as usize;
        let Some(limits) = channels.limits(grant.channel) else { bail!(Protocol, "channel {} does not exist", grant.channel) };
        if len == 0 || len > limits.bytes {
            bail!(Protocol, "a chunk of {len} bytes; the agreed limit is {}", limits.bytes);
        }
        limits::expected(self.outstanding())?;
        let Some(inc) = self.streams.get_mut(&key) else {
            bail!(Protocol, "a chunk of transfer {}, which expects no data", key.id)
        };
        let before = inc.holes.len();
        let Some(dest) = inc.dest(offset, len, limits.crossed) else {
            bail!(Protocol, "a chunk of {len} bytes at {offset} does not fit the plan of transfer {}", key.id)
        };
        self.holes = self.holes + inc.holes.len() - before;
        inc.begun = true;
        inc.arriving += len as u64;
        self.expected += 1;
        lane(&mut self.lanes, grant.channel).push(Announced { key, offset, len: len as u64 });
        match delivers {
            true => channels.expect(grant.channel, Arrival { key, len, tag: tag(key, false, offset), dest }),
            false => Ok(()),
        }
    }

    /// A chunk is in place or drained. Returns the end of the stream if it was the last one.
    ///
    /// # Errors
    /// `Internal` for a chunk that was not expected.
    pub(super) fn arrived(&mut self, channel: u16, key: Key, len: u64) -> Result<Option<Ended>> {
        lane(&mut self.lanes, channel).pop(key, len)?;
        let Some(inc) = self.streams.get_mut(&key) else { bail!(Internal, "a chunk has arrived that belongs to no stream") };
        let Some(left) = inc.arriving.checked_sub(len) else { bail!(Internal, "more bytes have arrived than were announced") };
        inc.arriving = left;
        self.expected -= 1;
        self.unreported += 1;
        Ok(self.ended(key))
    }

    /// This engine has closed a channel. Returns how many of its chunks have arrived, and the bytes of the others.
    pub(super) fn close(&mut self, channel: u16) -> (u64, u64) {
        let lane = lane(&mut self.lanes, channel);
        // What has arrived is said along with the loss.
        lane.report();
        (lane.arrived(), lane.missing())
    }

    /// Both engines have closed a channel: the chunks of it that have not arrived are announced again. Returns streams that have ended,
    /// since the peer announces no more of them.
    pub(super) fn lose(&mut self, channel: u16) -> Vec<(Key, Ended)> {
        let mut touched = Vec::new();
        for Announced { key, offset, len } in lane(&mut self.lanes, channel).lose() {
            self.expected -= 1;
            let Some(inc) = self.streams.get_mut(&key) else { continue };
            inc.arriving -= len;
            match inc.target {
                Target::Nowhere { cancelled: true, .. } => touched.push(key),
                _ => {
                    inc.holes.insert(offset, len);
                    self.holes += 1;
                }
            }
        }
        touched.dedup();
        touched.into_iter().filter_map(|key| Some((key, self.ended(key)?))).collect()
    }

    /// Whether so many chunks have arrived since the last report that they must be reported now.
    pub(super) fn must_report(&self) -> bool {
        limits::must_report(self.unreported)
    }

    /// Whether the peer waits for a report, since a read has ended. It goes with the next frame, or soon.
    pub(super) fn owes_report(&self) -> bool {
        self.owes
    }

    /// Channels on which chunks have arrived that were not reported to the peer, and how many have arrived there in all.
    pub(super) fn report(&mut self) -> impl Iterator<Item = (u16, u64)> + '_ {
        (self.unreported, self.owes) = (0, false);
        self.lanes.iter_mut().enumerate().filter_map(|(channel, lane)| Some((channel as u16, lane.report()?)))
    }

    /// Chunks in flight, and those that lost channels did not deliver.
    pub(super) fn outstanding(&self) -> usize {
        self.expected + self.holes
    }

    /// Ends a stream of which nothing is in flight or still to come.
    fn ended(&mut self, key: Key) -> Option<Ended> {
        let inc = self.streams.get(&key)?;
        (inc.arriving == 0 && inc.unannounced() == 0 && inc.holes.is_empty()).then(|| self.remove(key)).flatten()
    }

    /// Removes a stream, however much of it is missing. No chunk of it may be in flight.
    fn remove(&mut self, key: Key) -> Option<Ended> {
        let inc = self.streams.remove(&key)?;
        self.owes |= matches!(inc.target, Target::Memory { ending: Ending::Read, .. });
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
        match self.streams.get_mut(&key) {
            Some(InStream { target: Target::Nowhere { left, cancelled, .. }, holes, .. })
                if !*cancelled && (*left > 0 || !holes.is_empty()) =>
            {
                (*left, *cancelled) = (0, true);
                self.holes -= holes.len();
                holes.clear();
            }
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
        let holes: usize = self.streams.values().map(|inc| inc.holes.len()).sum();
        if holes != self.holes {
            return Err(format!("{} holes are counted of {holes}", self.holes));
        }
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
