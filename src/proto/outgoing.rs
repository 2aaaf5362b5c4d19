//! Data that is sent: streams take turns on the routes to the peer. On each route small and large transfers alternate, and a
//! blocked stream holds up only its own route. Every chunk handed to a channel is announced. Knows nothing of the bytes of frames
//! and of sockets.

use super::limits;
use crate::channel::path::Departure;
use crate::channel::plan::{ChunkLimits, Walk};
use crate::channel::router::Channels;
use crate::channel::stripe::Want;
use crate::hash::Map;
use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Key, Segment};
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

/// A stream of data that is sent.
struct OutStream {
    stream: Walk,
    hold: Hold,
    /// Bytes of the whole transfer.
    total: u64,
    small: bool,
    segments: usize,
    /// Bytes that channels have and have not sent.
    inflight: u64,
}

/// What remains of a stream when a chunk of it has been sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AfterChunk {
    /// There is more to send.
    More,
    /// That was the last chunk; here is its list.
    Last(Vec<Segment>),
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
    /// Bytes of large streams that no channel has yet.
    bulk_left: u64,
    /// Chunks announced, and how many of them the peer has reported as arrived.
    announced: u64,
    confirmed: u64,
}

/// How a round of scheduling ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheduled {
    /// It handed out as many chunks as it was allowed to; there may be more.
    Limit,
    /// Nothing more can be sent now.
    Blocked,
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
        self.streams.insert(key, OutStream { stream, hold, total, small, segments, inflight: 0 });
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
        let may = limits::may_announce(self.announced - self.confirmed);
        for route in 0..self.routes.len() {
            let mut blocked = [false; 2];
            while let Some(small) = self.routes[route].next(blocked) {
                if announcing.chunks == limit {
                    announcing.flush(tx);
                    return Ok(Scheduled::Limit);
                }
                if announcing.chunks >= may {
                    break;
                }
                if !self.chunk(route, small, channels, &mut announcing, tx, now)? {
                    blocked[usize::from(small)] = true;
                }
            }
        }
        announcing.flush(tx);
        Ok(Scheduled::Blocked)
    }

    /// Sends the next chunk of a class on a route; `false` when no channel takes it now.
    fn chunk(
        &mut self,
        route: usize,
        small: bool,
        channels: &mut Channels,
        announcing: &mut Announcing,
        tx: &mut TxQueue,
        now: Instant,
    ) -> Result<bool> {
        let Some(&key) = self.routes[route].queue(small).front() else { return Ok(false) };
        let next = self.streams.get_mut(&key).and_then(|out| out.stream.next_places().map(|places| (out, places)));
        let Some((out, (place, peer))) = next else {
            // Cancelled.
            self.routes[route].took(small, 0, false);
            return Ok(true);
        };
        let limits = channels.cut(route, out.total);
        let rest = if small { out.stream.remaining() } else { self.bulk_left };
        let want = Want { len: limits.bytes as u64, rest, total: out.total };
        let Some((channel, most)) = channels.pick(route, place, want, !small, now) else { return Ok(false) };
        let tag = tag(key, true, out.stream.offset());
        let limits = ChunkLimits { bytes: most.min(limits.bytes), ..limits };
        let Some(chunk) = out.stream.take_within(limits) else { bail!(Internal, "a stream ended early") };
        debug_assert_eq!((chunk.place, chunk.peer), (place, peer));
        let len = chunk.len as u64;
        channels.submit(channel, Departure { key, chunk, hold: out.hold.clone(), bulk: !small, tag }, now)?;
        out.inflight += len;
        self.bulk_left -= if small { 0 } else { len };
        self.announced += 1;
        announcing.push(key, Grant { len: len as u32, channel }, tx);
        let next_route = match out.stream.next_places() {
            Some((place, peer)) => match channels.route(place, peer) {
                Some(next) => Some(next),
                None => bail!(Internal, "no route from {place:?} to {peer:?}"),
            },
            None => None,
        };
        self.routes[route].took(small, len, next_route == Some(route));
        if let Some(other) = next_route.filter(|&next| next != route) {
            self.routes[other].queue(small).push_back(key);
        }
        Ok(true)
    }

    /// A channel has sent a chunk of a stream.
    ///
    /// # Errors
    /// `Internal` for a chunk that was never sent.
    pub(super) fn chunk_sent(&mut self, key: Key, len: u64) -> Result<AfterChunk> {
        let Some(out) = self.streams.get_mut(&key) else { bail!(Internal, "a chunk was sent that belongs to no stream") };
        let Some(left) = out.inflight.checked_sub(len) else { bail!(Internal, "more bytes were sent than channels had") };
        out.inflight = left;
        if left > 0 || out.stream.remaining() > 0 {
            return Ok(AfterChunk::More);
        }
        Ok(AfterChunk::Last(self.streams.remove(&key).map(|out| out.stream.into_list()).unwrap_or_default()))
    }

    /// The peer reports how many chunks have arrived in all.
    ///
    /// # Errors
    /// `Protocol` when that is fewer than before, or more than were announced.
    pub(super) fn confirm(&mut self, chunks: u64) -> Result<()> {
        if chunks < self.confirmed || chunks > self.announced {
            bail!(Protocol, "the peer reports {chunks} chunks received after {}, of {} sent", self.confirmed, self.announced);
        }
        self.confirmed = chunks;
        Ok(())
    }

    /// Bytes of a stream that no channel has yet; `None` when all have been sent or there is no such stream.
    pub(super) fn unsent(&self, key: Key) -> Option<u64> {
        self.streams.get(&key).map(|out| out.stream.remaining())
    }

    /// Stops a stream. Returns whether chunks of it are still in flight.
    pub(super) fn cancel(&mut self, key: Key) -> bool {
        if let Some(out) = self.streams.get(&key).filter(|out| !out.small) {
            self.bulk_left -= out.stream.remaining();
        }
        match self.streams.get_mut(&key) {
            Some(out) if out.inflight > 0 => {
                out.stream = Walk::new(Vec::new());
                true
            }
            Some(_) => {
                self.streams.remove(&key);
                false
            }
            None => false,
        }
    }

    /// Whether a stream waits for room on a channel.
    pub(super) fn waiting(&self) -> bool {
        self.routes.iter().any(|turns| !turns.small.is_empty() || !turns.bulk.is_empty())
    }

    /// Segments of a stream's list.
    pub(super) fn segments(&self, key: Key) -> usize {
        self.streams.get(&key).map_or(0, |out| out.segments)
    }

    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.streams.values().any(|out| out.hold.holds(id))
    }

    /// Streams and their segments.
    #[cfg(any(test, fuzzing))]
    pub(super) fn keys(&self) -> Vec<(Key, usize)> {
        self.streams.iter().map(|(&key, out)| (key, out.segments)).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Outgoing::default();
    }
}

/// Announcements being collected: chunks of one stream share a frame.
#[derive(Default)]
struct Announcing {
    key: Option<Key>,
    grants: Vec<Grant>,
    chunks: usize,
}

impl Announcing {
    fn push(&mut self, key: Key, grant: Grant, tx: &mut TxQueue) {
        if self.key != Some(key) || self.grants.len() == ANNOUNCE {
            self.flush(tx);
        }
        self.key = Some(key);
        self.grants.push(grant);
        self.chunks += 1;
    }

    fn flush(&mut self, tx: &mut TxQueue) {
        let grants = std::mem::take(&mut self.grants);
        if let (Some(key), false) = (self.key.take(), grants.is_empty()) {
            tx.push(&Frame::Chunks { id: key.id, by_initiator: key.mine, grants });
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
