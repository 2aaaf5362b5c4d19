//! Data that is sent: streams take turns on the routes to the peer. On each route small and large transfers alternate, and a
//! blocked stream holds up only its own route. Every chunk handed to a channel is announced. Knows nothing of the bytes of frames
//! and of sockets.

use super::lanes::{lane, Announced, Fate, OutLane};
use super::limits;
use crate::channel::path::Departure;
use crate::channel::plan::{Chunk, ChunkLimits, Walk};
use crate::channel::router::Channels;
use crate::channel::stripe::Want;
use crate::hash::Map;
use crate::region::Hold;
use crate::status::{bail, err, Result};
use crate::types::{Key, Place, Segment};
use crate::wire::frame::{Frame, Grant};
use crate::wire::queue::TxQueue;
use std::collections::VecDeque;
use std::time::Instant;

/// The largest transfer that goes before large ones.
const SMALL: u64 = 256 << 10;
/// How many bytes small transfers may be ahead of waiting large ones: both then get half of the route.
const SMALL_TURN: u64 = 1 << 20;
/// Chunks of one large stream before the next has its turn.
const BULK_TURN: usize = 4;
/// Chunks that one frame announces, at most.
const ANNOUNCE: usize = 8;

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Chunks wait, are being sent, or are not known to have arrived: they may have to be sent again.
    Sending,
    /// The peer says that all of it is in place. A channel may still read from it.
    Done,
    /// The peer has refused it, and no more of it is announced. A channel may still read from it.
    Cancelled,
    /// As before, and no channel reads from it. The peer still drains what was announced.
    Drained,
}

/// A stream of data that is sent.
struct OutStream {
    stream: Walk,
    hold: Hold,
    /// Bytes of the whole transfer.
    total: u64,
    small: bool,
    segments: usize,
    phase: Phase,
    /// It waits for its turn on a route.
    queued: bool,
    /// Bytes that channels have and have not sent.
    inflight: u64,
    /// Bytes announced that are not known to be in place.
    unsettled: u64,
    /// Offsets and lengths of what lost channels did not deliver.
    again: VecDeque<(u64, u64)>,
    /// The peer knows that no more of it comes.
    withdrawn: bool,
}

impl OutStream {
    /// Bytes that no channel has.
    fn unsent(&self) -> u64 {
        self.stream.remaining() + self.again.iter().map(|(_, len)| len).sum::<u64>()
    }

    /// The places of the next chunk, here and at the peer; `None` when nothing waits for a channel.
    fn next_places(&mut self) -> Option<(Place, Place)> {
        match self.again.front() {
            Some(&(offset, _)) => self.stream.places_at(offset),
            None => self.stream.next_places(),
        }
    }

    /// Cuts the next chunk within these limits. Returns its offset too.
    fn cut(&mut self, limits: ChunkLimits) -> Option<(u64, Chunk)> {
        let Some((offset, left)) = self.again.front_mut() else {
            return Some((self.stream.offset(), self.stream.take_within(limits)?));
        };
        let (at, bytes) = (*offset, limits.bytes.min(*left as usize));
        let chunk = self.stream.again_within(at, ChunkLimits { bytes, ..limits })?;
        (*offset, *left) = (at + chunk.len as u64, *left - chunk.len as u64);
        if *left == 0 {
            self.again.pop_front();
        }
        Some((at, chunk))
    }
}

/// A stream that no channel reads from.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub key: Key,
    /// Its list, so that its memory can be used again.
    pub list: Vec<Segment>,
    pub segments: usize,
}

/// What a lost channel leaves behind.
#[derive(Debug, Default)]
pub(super) struct Undelivered {
    pub left: Vec<Left>,
    /// Refused transfers that the peer must not drain any further.
    pub cancelled: Vec<Key>,
    /// Bytes that were counted as sent and are not in place, and bytes that are in place and were not counted.
    pub unmoved: Vec<(Key, u64)>,
    pub moved: Vec<(Key, u64)>,
    /// What is sent again.
    pub chunks: usize,
    pub bytes: u64,
}

/// Streams that wait for their turn on a route.
#[derive(Default)]
struct Turns {
    small: VecDeque<Key>,
    bulk: VecDeque<Key>,
    /// How many bytes small ones are ahead.
    small_bytes: u64,
    /// Chunks that the large stream at the front has sent in this turn.
    chunks: usize,
}

impl Turns {
    fn queue(&mut self, small: bool) -> &mut VecDeque<Key> {
        if small {
            &mut self.small
        } else {
            &mut self.bulk
        }
    }

    /// Whether a small stream is next; `None` when no waiting stream may go. `blocked`: large ones, small ones.
    fn next(&self, blocked: [bool; 2]) -> Option<bool> {
        let may = |queue: &VecDeque<Key>, blocked: bool| !queue.is_empty() && !blocked;
        match (may(&self.small, blocked[1]), may(&self.bulk, blocked[0])) {
            (true, true) => Some(self.small_bytes < SMALL_TURN),
            (true, false) => Some(true),
            (false, true) => Some(false),
            (false, false) => None,
        }
    }

    /// A chunk of the stream at the front was sent. `goes_on`: the stream has more on this route.
    fn took(&mut self, small: bool, len: u64, goes_on: bool) {
        if small {
            self.small_bytes += len;
        } else {
            self.small_bytes = self.small_bytes.saturating_sub(len);
            self.chunks += 1;
        }
        let turn_over = small || self.chunks >= BULK_TURN;
        if !goes_on || turn_over {
            let queue = self.queue(small);
            let key = queue.pop_front();
            if goes_on {
                queue.extend(key);
            }
            if !small {
                self.chunks = 0;
            }
        }
    }
}

#[derive(Default)]
pub(super) struct Outgoing {
    streams: Map<Key, OutStream>,
    routes: Vec<Turns>,
    /// By channel.
    lanes: Vec<OutLane>,
    /// Bytes of large streams that no channel has yet.
    bulk_left: u64,
    /// Chunks that the peer has not reported as arrived.
    unreported: u64,
}

/// How a round of scheduling ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheduled {
    /// It handed out as many chunks as it was allowed to; there may be more.
    Limit,
    /// Nothing more can be sent now.
    Blocked,
}

/// How the turn of a stream ended.
enum Step {
    /// A chunk was sent, or the stream has nothing to send.
    Went,
    /// No channel takes a chunk now.
    Blocked,
    /// The stream goes on over another route, maybe after a chunk.
    Moved(usize),
}

impl Outgoing {
    /// Starts a stream; its places must have routes.
    pub(super) fn start(&mut self, key: Key, segments: Vec<Segment>, hold: Hold, channels: &Channels) -> Result<()> {
        let stream = Walk::new(segments);
        let Some((place, peer)) = stream.next_places() else { bail!(Internal, "an empty stream") };
        let Some(route) = channels.route(place, peer) else {
            bail!(Unsupported, "no channel connects {place:?} here with {peer:?} at the peer")
        };
        self.routes.resize_with(channels.routes(), Turns::default);
        let (total, segments) = (stream.remaining(), stream.segments());
        let small = total <= SMALL;
        self.bulk_left += if small { 0 } else { total };
        let out = OutStream {
            stream,
            hold,
            total,
            small,
            segments,
            phase: Phase::Sending,
            queued: true,
            inflight: 0,
            unsettled: 0,
            again: VecDeque::new(),
            withdrawn: false,
        };
        self.streams.insert(key, out);
        self.routes[route].queue(small).push_back(key);
        Ok(())
    }

    /// Hands at most `limit` chunks to channels that have room, and queues their announcements.
    pub(super) fn schedule(
        &mut self,
        channels: &mut Channels,
        tx: &mut TxQueue,
        limit: usize,
        now: Instant,
    ) -> Result<Scheduled> {
        let mut announcing = Announcing::default();
        let may = limits::may_announce(self.unreported);
        let mut route = 0;
        while route < self.routes.len() {
            let (mut blocked, mut next_route) = ([false; 2], route + 1);
            while let Some(small) = self.routes[route].next(blocked) {
                if announcing.chunks == limit {
                    announcing.flush(tx);
                    return Ok(Scheduled::Limit);
                }
                if announcing.chunks >= may {
                    break;
                }
                match self.chunk(route, small, channels, &mut announcing, tx, now)? {
                    Step::Blocked => blocked[usize::from(small)] = true,
                    Step::Went => {}
                    // A route that was visited before is visited again.
                    Step::Moved(to) => next_route = next_route.min(to),
                }
            }
            route = next_route;
        }
        announcing.flush(tx);
        Ok(Scheduled::Blocked)
    }

    /// Sends the next chunk of a class on a route.
    fn chunk(
        &mut self,
        route: usize,
        small: bool,
        channels: &mut Channels,
        announcing: &mut Announcing,
        tx: &mut TxQueue,
        now: Instant,
    ) -> Result<Step> {
        let Some(&key) = self.routes[route].queue(small).front() else { return Ok(Step::Blocked) };
        let next = self.streams.get_mut(&key).and_then(|out| out.next_places().map(|places| (out, places)));
        let Some((out, (place, peer))) = next else {
            // It was cancelled, or is in place.
            self.routes[route].took(small, 0, false);
            self.streams.get_mut(&key).into_iter().for_each(|out| out.queued = false);
            return Ok(Step::Went);
        };
        let best = route_of((place, peer), channels)?;
        if best != route {
            // Channels were lost: what is next goes over another route.
            self.routes[route].took(small, 0, false);
            self.routes[best].queue(small).push_back(key);
            return Ok(Step::Moved(best));
        }
        let limits = channels.cut(route, out.total);
        let rest = if small { out.unsent() } else { self.bulk_left };
        let want = Want { len: limits.bytes as u64, rest, total: out.total };
        let Some((channel, most)) = channels.pick(route, place, want, !small, now) else { return Ok(Step::Blocked) };
        let limits = ChunkLimits { bytes: most.min(limits.bytes), ..limits };
        let Some((offset, chunk)) = out.cut(limits) else { bail!(Internal, "a stream ended early") };
        debug_assert_eq!((chunk.place, chunk.peer), (place, peer));
        let (len, tag) = (chunk.len as u64, tag(key, true, offset));
        lane(&mut self.lanes, channel).push(Announced { key, offset, len });
        (out.inflight, out.unsettled) = (out.inflight + len, out.unsettled + len);
        self.unreported += 1;
        self.bulk_left -= if small { 0 } else { len };
        channels.submit(channel, Departure { key, chunk, hold: out.hold.clone(), bulk: !small, tag }, now)?;
        announcing.push(key, offset, Grant { len: len as u32, channel }, tx);
        let next_route = out.next_places().map(|places| route_of(places, channels)).transpose()?;
        out.queued = next_route.is_some();
        self.routes[route].took(small, len, next_route == Some(route));
        let Some(other) = next_route.filter(|&next| next != route) else { return Ok(Step::Went) };
        self.routes[other].queue(small).push_back(key);
        Ok(Step::Moved(other))
    }

    /// A channel has sent a chunk. Returns its stream if no channel reads from it.
    ///
    /// # Errors
    /// `Internal` for a chunk that was never handed to the channel.
    pub(super) fn sent(&mut self, channel: u16, key: Key, len: u64) -> Result<Option<Left>> {
        let Outgoing { streams, lanes, .. } = self;
        lane(lanes, channel).sent(|chunk| settle(streams, &chunk))?;
        let Some(out) = streams.get_mut(&key) else { bail!(Internal, "a chunk was sent that belongs to no stream") };
        let Some(left) = out.inflight.checked_sub(len) else { bail!(Internal, "more bytes were sent than channels had") };
        out.inflight = left;
        Ok(self.left(key))
    }

    /// The peer reports how many chunks of a channel have arrived. Appends the streams that no channel reads from.
    ///
    /// # Errors
    /// `Protocol` when that is fewer than before, or more than were announced.
    pub(super) fn arrived(&mut self, channel: u16, chunks: u64, all: &mut Vec<Left>) -> Result<()> {
        let Outgoing { streams, lanes, unreported, .. } = self;
        let (lane, mut touched) = (lane(lanes, channel), Vec::new());
        let before = lane.unreported();
        lane.arrived(chunks, |chunk| {
            settle(streams, &chunk);
            touched.push(chunk.key);
        })?;
        *unreported -= before - lane.unreported();
        touched.dedup();
        all.extend(touched.into_iter().filter_map(|key| self.left(key)));
        Ok(())
    }

    /// This engine has closed a channel, which sends nothing more. Appends the streams that no channel reads from, and returns the
    /// bytes that the channel had and did not send, and whether chunks were announced on it.
    pub(super) fn close(&mut self, channel: u16, all: &mut Vec<Left>) -> (u64, bool) {
        let Outgoing { streams, lanes, .. } = self;
        let (lane, mut touched, mut bytes) = (lane(lanes, channel), Vec::new(), 0);
        for chunk in lane.unsent() {
            bytes += chunk.len;
            if let Some(out) = streams.get_mut(&chunk.key) {
                out.inflight -= chunk.len;
                touched.push(chunk.key);
            }
        }
        touched.dedup();
        let announced = lane.announced() > 0;
        all.extend(touched.into_iter().filter_map(|key| self.left(key)));
        (bytes, announced)
    }

    /// Both engines have closed a channel, and so many of its chunks had arrived. The others are sent again on other channels.
    ///
    /// # Errors
    /// `Protocol` for a number that cannot be.
    pub(super) fn lose(&mut self, channel: u16, chunks: u64, channels: &Channels) -> Result<Undelivered> {
        let (lane, mut touched) = (lane(&mut self.lanes, channel), Vec::new());
        self.unreported -= lane.unreported();
        let mut found = Undelivered::default();
        for Fate { chunk: Announced { key, offset, len }, sent, arrived } in lane.lose(chunks)? {
            let Some(out) = self.streams.get_mut(&key) else { continue };
            out.unsettled -= len;
            touched.push(key);
            match (sent, arrived) {
                (true, false) => found.unmoved.push((key, len)),
                (false, true) => found.moved.push((key, len)),
                _ => {}
            }
            match out.phase {
                _ if arrived => {}
                Phase::Sending => {
                    (found.chunks, found.bytes) = (found.chunks + 1, found.bytes + len);
                    self.bulk_left += if out.small { 0 } else { len };
                    out.again.push_back((offset, len));
                }
                Phase::Done => {}
                Phase::Cancelled | Phase::Drained if !out.withdrawn => {
                    out.withdrawn = true;
                    found.cancelled.push(key);
                }
                Phase::Cancelled | Phase::Drained => {}
            }
        }
        touched.sort_unstable();
        touched.dedup();
        for key in touched {
            found.left.extend(self.left(key));
            self.queue(key, channels)?;
        }
        Ok(found)
    }

    /// Lets a stream wait for its turn, if some of it waits for a channel.
    fn queue(&mut self, key: Key, channels: &Channels) -> Result<()> {
        let Some(out) = self.streams.get_mut(&key).filter(|out| !out.queued) else { return Ok(()) };
        let Some(places) = out.next_places() else { return Ok(()) };
        let route = route_of(places, channels)?;
        out.queued = true;
        self.routes[route].queue(out.small).push_back(key);
        Ok(())
    }

    /// Takes out a stream that no channel reads from and of which nothing has to be sent again.
    fn left(&mut self, key: Key) -> Option<Left> {
        let out = self.streams.get_mut(&key).filter(|out| out.inflight == 0)?;
        let (before, segments) = (out.phase, out.segments);
        if before == Phase::Cancelled {
            (out.phase, out.hold) = (Phase::Drained, Hold::new(Vec::new()));
        }
        let over = before == Phase::Done || (out.unsettled == 0 && out.unsent() == 0);
        let list = if over { self.streams.remove(&key).map(|out| out.stream.into_list()) } else { None };
        match before {
            Phase::Drained => None,
            Phase::Cancelled => Some(Left { key, list: Vec::new(), segments }),
            Phase::Sending | Phase::Done => list.map(|list| Left { key, list, segments }),
        }
    }

    /// Bytes of a stream that no channel has; `None` when no channel reads from it, or there is no such stream.
    pub(super) fn unsent(&self, key: Key) -> Option<u64> {
        self.streams.get(&key).filter(|out| out.phase != Phase::Drained).map(OutStream::unsent)
    }

    /// The peer says that all of a stream is in place. Returns the stream if no channel reads from it.
    pub(super) fn done(&mut self, key: Key) -> Option<Left> {
        self.streams.get_mut(&key)?.phase = Phase::Done;
        self.left(key)
    }

    /// Stops a stream that the peer has refused, and that the peer learns of if it had bytes that no channel has. Returns whether a
    /// channel still reads from it.
    pub(super) fn cancel(&mut self, key: Key) -> bool {
        let Some(out) = self.streams.get_mut(&key) else { return false };
        out.withdrawn = out.unsent() > 0;
        self.bulk_left -= if out.small { 0 } else { out.unsent() };
        (out.stream, out.phase) = (Walk::new(Vec::new()), Phase::Cancelled);
        out.again.clear();
        self.left(key).is_none()
    }

    /// Whether a stream waits for room on a channel.
    pub(super) fn waiting(&self) -> bool {
        self.routes.iter().any(|turns| !turns.small.is_empty() || !turns.bulk.is_empty())
    }

    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.streams.values().any(|out| out.hold.holds(id))
    }

    /// Streams and their segments.
    #[cfg(any(test, fuzzing))]
    pub(super) fn keys(&self) -> Vec<(Key, usize)> {
        self.streams.iter().filter(|(_, out)| out.phase != Phase::Drained).map(|(&key, out)| (key, out.segments)).collect()
    }

    /// Bytes of streams that are still to be sent: no channel has them, or has sent them.
    #[cfg(any(test, fuzzing))]
    pub(super) fn open(&self) -> Vec<(Key, u64)> {
        let sending = self.streams.iter().filter(|(_, out)| out.phase == Phase::Sending);
        sending.map(|(&key, out)| (key, out.unsent() + out.inflight)).collect()
    }

    /// No channel reads from a stream, or will.
    pub(super) fn is_empty(&self) -> bool {
        self.streams.values().all(|out| out.phase == Phase::Drained)
    }

    pub(super) fn clear(&mut self) {
        *self = Outgoing::default();
    }
}

/// A chunk of a stream is in place.
fn settle(streams: &mut Map<Key, OutStream>, chunk: &Announced) {
    if let Some(out) = streams.get_mut(&chunk.key) {
        out.unsettled -= chunk.len;
    }
}

/// The route for chunks between these places: one on which they wait, if all channels that carry them are lost.
fn route_of((place, peer): (Place, Place), channels: &Channels) -> Result<usize> {
    let none = || err!(Internal, "no channel connects {place:?} here with {peer:?} at the peer any more");
    channels.route(place, peer).ok_or_else(none)
}

/// Announcements being collected: chunks of one stream share a frame.
#[derive(Default)]
struct Announcing {
    key: Option<Key>,
    /// Where the first of them begins, and where the stream goes on behind them.
    offset: u64,
    next: u64,
    grants: Vec<Grant>,
    chunks: usize,
}

impl Announcing {
    fn push(&mut self, key: Key, offset: u64, grant: Grant, tx: &mut TxQueue) {
        if self.key != Some(key) || self.next != offset || self.grants.len() == ANNOUNCE {
            self.flush(tx);
        }
        if self.grants.is_empty() {
            (self.key, self.offset) = (Some(key), offset);
        }
        self.next = offset + u64::from(grant.len);
        self.grants.push(grant);
        self.chunks += 1;
    }

    fn flush(&mut self, tx: &mut TxQueue) {
        let grants = std::mem::take(&mut self.grants);
        if let (Some(key), false) = (self.key.take(), grants.is_empty()) {
            tx.push(&Frame::Chunks { id: key.id, by_initiator: key.mine, offset: self.offset, grants });
        }
    }
}

/// The tag of a chunk on its channel. Both engines compute the same number from the stream and the chunk's offset, and a plugin
/// that compares tags detects a disagreement. `sending`: this engine sends it.
pub(crate) fn tag(key: Key, sending: bool, offset: u64) -> i32 {
    let by_initiator = key.mine == sending;
    let mut x = key.id.wrapping_mul(2).wrapping_add(u64::from(by_initiator)).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ offset;
    x = (x ^ (x >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((x >> 33) as u32 & 0x7FFF_FFFF) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_give_a_chunk_the_same_tag_and_other_chunks_another() {
        let mut seen = std::collections::HashSet::new();
        for id in 1..50 {
            for mine in [false, true] {
                for offset in (0..20).map(|i| i << 16) {
                    let sent = tag(Key { id, mine }, true, offset);
                    assert_eq!(sent, tag(Key { id, mine: !mine }, false, offset));
                    assert!(sent >= 0 && seen.insert(sent), "transfer {id} at {offset}");
                }
            }
        }
    }

    #[test]
    fn small_and_large_ones_have_the_same_share() {
        let (small, large) = (Key { id: 1, mine: true }, Key { id: 2, mine: true });
        let mut turns = Turns::default();
        turns.small.push_back(small);
        turns.bulk.push_back(large);
        let mut bytes = [0u64; 2];
        for _ in 0..1000 {
            let next = turns.next([false; 2]).unwrap();
            let len = if next { 4 << 10 } else { 64 << 10 };
            bytes[usize::from(next)] += len;
            turns.took(next, len, true);
        }
        assert!(bytes[0].abs_diff(bytes[1]) <= SMALL_TURN + (64 << 10), "{bytes:?}");
    }
}
