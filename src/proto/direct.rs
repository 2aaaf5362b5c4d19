//! Direct transfers: a transport carries all of each, without chunks and frames, and says how far it is. The peer has no say in them on the
//! control stream. One whose regions the peer has not granted yet waits here, and may go in chunks in the end. Knows nothing of how bytes
//! are moved.

use super::transfers::Kind;
use super::{Machine, Request};
use crate::channel::router::Channels;
use crate::direct::{Blocks, Pairing, Route, Start, Way};
use crate::hash::Map;
use crate::region::Hold;
use crate::status::{bail, err, Error, Result};
use crate::types::{Key, Landing, Piece, Place, Segment};
use std::iter::Peekable;
use std::time::Instant;

/// A transfer as the caller describes it, if it is to go directly.
pub(crate) struct Sketch {
    pub pairings: Vec<Pairing>,
    /// Keeps this side's regions.
    pub hold: Hold,
    pub total: u64,
    /// Blocks.
    pub count: usize,
}

impl Sketch {
    /// The pairs of places (here, at the peer) that occur.
    pub(crate) fn places(&self) -> Vec<(Place, Place)> {
        self.pairings.iter().map(|p| (p.here, p.there)).collect()
    }
}

/// A transfer that waits for the peer's answer.
struct Waiting {
    id: u64,
    way: Way,
    request: Request,
    hold: Hold,
}

/// What a direct transfer keeps.
struct Kept {
    hold: Hold,
    /// The receive that a message of the peer has met.
    receive: Option<u64>,
}

/// Direct transfers under way, and those that wait.
#[derive(Default)]
pub(super) struct DirectTransfers {
    kept: Map<Key, Kept>,
    waiting: Vec<Waiting>,
}

impl DirectTransfers {
    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.kept.values().any(|kept| kept.hold.holds(id)) || self.waiting.iter().any(|waiting| waiting.hold.holds(id))
    }

    /// The receive that a message goes to.
    pub(super) fn receive_of(&self, key: Key) -> Option<u64> {
        self.kept.get(&key).and_then(|kept| kept.receive)
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.waiting.is_empty()
    }

    /// Messages of the peer that go to posted buffers.
    #[cfg(any(test, fuzzing))]
    pub(super) fn landings(&self) -> usize {
        self.kept.values().filter(|kept| kept.receive.is_some()).count()
    }

    pub(super) fn clear(&mut self) {
        *self = DirectTransfers::default();
    }
}

/// Hands out listed blocks.
struct Listed<I: Iterator<Item = (usize, Piece)>> {
    items: Peekable<I>,
}

impl<I: Iterator<Item = (usize, Piece)>> Blocks for Listed<I> {
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        let (pairing, first) = self.items.next()?;
        let (mut count, mut sum) = (1, first.len);
        out.push(first);
        while count < most && sum < bytes {
            let Some((_, piece)) = self.items.next_if(|(of, _)| *of == pairing) else { break };
            (count, sum) = (count + 1, sum.saturating_add(piece.len));
            out.push(piece);
        }
        Some(pairing)
    }

    fn is_done(&self) -> bool {
        // Peeking needs a unique reference; what was peeked is what is left.
        self.items.size_hint().0 == 0
    }
}

fn listed<I: ExactSizeIterator<Item = (usize, Piece)>>(items: I) -> Listed<I> {
    Listed { items: items.peekable() }
}

/// The pairings of a request, and that of each of its segments.
fn pairings(request: &Request) -> (Vec<Pairing>, Vec<u16>) {
    let (mut pairings, mut of): (Vec<Pairing>, Vec<u16>) = (Vec::new(), Vec::with_capacity(request.segments.len()));
    let mut known: Map<(u64, u64), u16> = Map::default();
    for (segment, remote) in request.segments.iter().zip(request.remote.iter()) {
        let name = (u64::from(segment.region) << 16 | u64::from(remote.region), u64::from(segment.peer.0));
        let at = *known.entry(name).or_insert_with(|| {
            let region = &request.remote_regions[usize::from(remote.region)];
            let (near, far) = ((u64::MAX, 0), (u64::MAX, 0));
            let (local, here, there) = (segment.region, segment.place, segment.peer);
            pairings.push(Pairing { local, here, region: region.id, token: region.token, there, near, far });
            (pairings.len() - 1) as u16
        });
        let Pairing { near, far, .. } = &mut pairings[usize::from(at)];
        *near = (near.0.min(segment.addr), near.1.max(segment.addr.saturating_add(segment.len)));
        *far = (far.0.min(remote.addr), far.1.max(remote.addr.saturating_add(u64::from(remote.len))));
        of.push(at);
    }
    (pairings, of)
}

impl Machine {
    /// Starts a transfer that was admitted, if it can go directly at once: its id, and why the connection must end if it must. Some of it may
    /// have moved by then. `None`: nothing has begun, and [`Machine::start`] is to be called.
    ///
    /// # Errors
    /// When the connection must end.
    pub(crate) fn start_direct(
        &mut self,
        sketch: Sketch,
        way: Way,
        blocks: &mut dyn Blocks,
        channels: &mut Channels,
        now: Instant,
    ) -> Result<Option<(u64, Result<()>)>> {
        let Some(direct) = channels.direct() else { return Ok(None) };
        let Sketch { pairings, hold, total, count } = sketch;
        match direct.route(way, &pairings, &hold)? {
            Route::Direct => {}
            Route::Refused(error) => {
                let id = self.transfers.start(Kind::Direct, total, count);
                self.refused_directly(id, &error);
                return Ok(Some((id, Ok(()))));
            }
            Route::Wait | Route::Channels => return Ok(None),
        }
        let id = self.transfers.start(Kind::Direct, total, count);
        let key = Key { id, mine: true };
        let begun = direct.start(&mut Start { key, way, total, count, pairings: &pairings, hold: &hold, blocks }, None);
        self.begin_direct(key, way, total, Kept { hold, receive: None }, now);
        Ok(Some((id, begun)))
    }

    fn begin_direct(&mut self, key: Key, way: Way, total: u64, kept: Kept, now: Instant) {
        self.deadlines.start_in_order(key, way, total, now);
        self.direct.kept.insert(key, kept);
        self.look_soon(now);
    }

    /// Starts a one-sided transfer that was admitted, whichever way it goes. An error ends the connection.
    pub(crate) fn start(&mut self, way: Way, mut request: Request, channels: &mut Channels, now: Instant) -> Result<u64> {
        let id = self.transfers.start(Kind::Direct, request.total, request.segments.len());
        if request.total == 0 {
            self.transfers.finish(id, Ok(()));
            return Ok(id);
        }
        let hold = Hold::new(std::mem::take(&mut request.uses));
        self.proceed(Waiting { id, way, request, hold }, channels, now)?;
        Ok(id)
    }

    /// Takes a transfer on the way that it can go now.
    fn proceed(&mut self, waiting: Waiting, channels: &mut Channels, now: Instant) -> Result<()> {
        let (id, way) = (waiting.id, waiting.way);
        let (key, total) = (Key { id, mine: true }, waiting.request.total);
        let Some(direct) = channels.direct() else { return self.start_chunks(waiting, channels, now) };
        let (pairings, of) = pairings(&waiting.request);
        match direct.route(way, &pairings, &waiting.hold)? {
            Route::Direct => {
                let Waiting { request, hold, .. } = waiting;
                let items = of.iter().zip(request.segments.iter().zip(request.remote.iter())).map(|(&of, (near, far))| {
                    let (src, dst) = if way == Way::In { (far.addr, near.addr) } else { (near.addr, far.addr) };
                    (usize::from(of), Piece { src, dst, len: near.len })
                });
                let (mut blocks, count) = (listed(items), of.len());
                let start = &mut Start { key, way, total, count, pairings: &pairings, hold: &hold, blocks: &mut blocks };
                let begun = direct.start(start, None);
                drop(blocks);
                begun?;
                self.segment_pool.give_list(request.segments);
                self.segment_pool.give_wire(request.remote);
                self.begin_direct(key, way, total, Kept { hold, receive: None }, now);
            }
            Route::Wait => {
                self.deadlines.start_in_order(key, way, total, now);
                self.direct.waiting.push(waiting);
                self.look_soon(now);
            }
            Route::Refused(error) => self.refused_directly(id, &error),
            Route::Channels => self.start_chunks(waiting, channels, now)?,
        }
        Ok(())
    }

    fn start_chunks(&mut self, waiting: Waiting, channels: &mut Channels, now: Instant) -> Result<()> {
        let Waiting { id, way, request, hold } = waiting;
        self.deadlines.end(Key { id, mine: true });
        let id = self.transfers.announced_as(id);
        match way {
            Way::Out => self.start_write(id, request, hold, channels, now),
            Way::In => {
                self.start_read(id, request, hold, now);
                Ok(())
            }
        }
    }

    /// The peer has answered: transfers that waited go on.
    pub(super) fn direct_answered(&mut self, channels: &mut Channels, now: Instant) -> Result<()> {
        let waiting = std::mem::take(&mut self.direct.waiting);
        waiting.into_iter().try_for_each(|waiting| self.proceed(waiting, channels, now))
    }

    /// A claim of the peer was refused.
    pub(super) fn direct_denied(&mut self, error: &Error, now: Instant) {
        self.counts.refused += 1;
        self.log.log(log::Level::Warn, now, format_args!("{}: a claim of the peer refused: {error}", self.setting.peer));
    }

    fn refused_directly(&mut self, id: u64, error: &Error) {
        self.deadlines.end(Key { id, mine: true });
        self.counts.refused_by_peer += 1;
        let peer = &self.setting.peer;
        let text = format_args!("{peer}: transfer {id} refused by the peer: {}", error.to_str());
        let error = Error::new(error.kind(), text);
        self.transfers.finish(id, Err(error));
    }

    /// Bytes of a direct transfer are in place.
    pub(super) fn direct_moved(&mut self, key: Key, len: u64, now: Instant) {
        self.deadlines.moved(key, len, now);
        let id = if key.mine { Some(key.id) } else { self.direct.receive_of(key) };
        id.into_iter().for_each(|id| self.transfers.moved(id, len));
    }

    /// A direct transfer has ended.
    pub(super) fn direct_ended(&mut self, key: Key, done: bool) {
        let kept = self.direct.kept.remove(&key);
        self.deadlines.end(key);
        if let Some(receive) = kept.and_then(|kept| kept.receive) {
            self.peer.ended(0);
            return self.transfers.finish(receive, Ok(()));
        }
        match done {
            true => self.transfers.finish(key.id, Ok(())),
            false => self.refused_directly(key.id, &err!(RemoteAccess, "its region is not registered any more")),
        }
    }

    // ---- two-sided messages ----

    /// The peer has given up a message before it began to send it.
    pub(super) fn direct_withdrawn(&mut self, key: Key) {
        self.direct.kept.remove(&key);
        self.peer.ended(0);
        self.deadlines.end(key);
    }

    /// Where a message comes from, if it can be sent into whatever buffer the peer grants.
    pub(super) fn sends_from(segments: &[Segment], hold: &Hold, channels: &mut Channels) -> Option<Place> {
        let place = segments.first()?.place;
        let one = segments.iter().all(|segment| segment.place == place);
        (one && channels.direct()?.can_send(place, hold)).then_some(place)
    }

    /// Grants the buffer of a receive for one message of the peer; `None` where it comes in chunks.
    pub(super) fn land(
        &mut self,
        (key, len, from): (Key, u64, Option<Place>),
        (receive, segment, hold): (u64, &Segment, &Hold),
        channels: &mut Channels,
        now: Instant,
    ) -> Option<Landing> {
        let region = hold.regions().get(usize::from(segment.region))?;
        let landing = channels.direct()?.land(key, region, (segment.addr, len), from?)?;
        self.begin_direct(key, Way::In, len, Kept { hold: hold.clone(), receive: Some(receive) }, now);
        Some(landing)
    }

    /// Sends a message into the buffer that the peer has granted.
    pub(super) fn send_directly(
        &mut self,
        id: u64,
        segments: &[Segment],
        (hold, there, landing): (Hold, Place, Landing),
        channels: &mut Channels,
        now: Instant,
    ) -> Result<()> {
        let Some(direct) = channels.direct() else { bail!(Protocol, "a landing for message {id}, which goes in chunks") };
        let key = Key { id, mine: true };
        let total: u64 = segments.iter().map(|segment| segment.len).sum();
        let far = (landing.addr, landing.addr.saturating_add(total));
        let mut pairings: Vec<Pairing> = Vec::new();
        let (mut of, mut dst) = (Vec::with_capacity(segments.len()), landing.addr);
        for &Segment { addr, len, region: local, place: here, .. } in segments {
            let at = pairings.iter().position(|pairing| pairing.local == local).unwrap_or_else(|| {
                pairings.push(Pairing { local, here, region: 0, token: [0; 16], there, near: (u64::MAX, 0), far });
                pairings.len() - 1
            });
            let near = &mut pairings[at].near;
            *near = (near.0.min(addr), near.1.max(addr.saturating_add(len)));
            of.push((at, Piece { src: addr, dst, len }));
            dst = dst.saturating_add(len);
        }
        let (mut blocks, count) = (listed(of.into_iter()), segments.len());
        let start = &mut Start { key, way: Way::Out, total, count, pairings: &pairings, hold: &hold, blocks: &mut blocks };
        direct.start(start, Some(landing))?;
        self.transfers.goes_directly(id);
        self.begin_direct(key, Way::Out, total, Kept { hold, receive: None }, now);
        Ok(())
    }
}
