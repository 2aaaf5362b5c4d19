//! How transfers start, and what becomes of direct ones. The direct transport moves a whole transfer without chunks and frames,
//! and reports its progress; the peer has no say in it on the control connection. A transfer whose regions the peer has not
//! granted yet waits, and may go in chunks in the end. Knows nothing of how bytes are moved.

use super::carriers::Carriers;
use super::incoming::Ending;
use super::listed::{listed, pairings, Kept, Waiting};
use super::request::{Request, Sketch};
use super::state::State;
use super::transfers::Kind;
use crate::channel::router::Channels;
use crate::direct::{Blocks, Direct, Event, Pairing, Route, Start, Way};
use crate::region::Hold;
use crate::status::{bail, err, Error, Result};
use crate::types::{Key, Landing, Piece, Place, Segment};
use crate::wire::frame::Frame;
use std::time::Instant;

/// The machine while it starts transfers or moves direct ones on.
pub(super) struct DirectTransfers<'a> {
    pub state: &'a mut State,
    pub channels: &'a mut Channels,
    pub now: Instant,
}

impl DirectTransfers<'_> {
    /// Starts a transfer, provided that it can go directly at once.
    pub(super) fn start_at_once(
        mut self,
        sketch: Sketch,
        way: Way,
        blocks: &mut dyn Blocks,
    ) -> Result<Option<(u64, Result<()>)>> {
        let Some(direct) = self.channels.direct() else { return Ok(None) };
        let Sketch { pairings, hold, total, count } = sketch;
        match direct.route(way, &pairings, &hold)? {
            Route::Direct => {}
            Route::Refused(error) => {
                let id = self.state.transfers.start_timed(Kind::direct(way), total, count, self.now);
                self.refused(id, &error);
                return Ok(Some((id, Ok(()))));
            }
            Route::Wait | Route::Channels => return Ok(None),
        }
        let id = self.state.transfers.start_timed(Kind::direct(way), total, count, self.now);
        let key = Key { id, mine: true };
        let begun =
            direct.start(&mut Start { key, way, total, count, pairings: &pairings, hold: &hold, blocks, now: self.now }, None);
        let by = over(&*direct, &pairings);
        self.begin(key, way, total, by, Kept { hold, receive: None });
        Ok(Some((id, begun)))
    }

    fn begin(&mut self, key: Key, way: Way, total: u64, by: Carriers, kept: Kept) {
        self.state.deadlines.start_in_order(key, way, total, self.now);
        if let Some(id) = kept.receive.or(key.mine.then_some(key.id)) {
            self.state.transfers.moved(id, 0, by);
        }
        self.state.direct.kept.insert(key, kept);
        self.state.liveness.look_soon(self.now);
    }

    /// Starts a one-sided transfer on whichever route it takes.
    pub(super) fn start(mut self, way: Way, mut request: Request) -> Result<u64> {
        let id = self.state.transfers.start_timed(Kind::direct(way), request.total, request.segments.len(), self.now);
        if request.total == 0 {
            self.state.transfers.finish(id, Ok(()));
            return Ok(id);
        }
        let hold = Hold::new(std::mem::take(&mut request.uses));
        self.proceed(Waiting { id, way, request, hold })?;
        Ok(id)
    }

    /// Starts a transfer on the route that it can take now, or lets it wait.
    fn proceed(&mut self, waiting: Waiting) -> Result<()> {
        let (id, way) = (waiting.id, waiting.way);
        let (key, total) = (Key { id, mine: true }, waiting.request.total);
        let Some(direct) = self.channels.direct() else { return self.start_chunks(waiting) };
        let (pairings, of) = pairings(&waiting.request);
        match direct.route(way, &pairings, &waiting.hold)? {
            Route::Direct => {
                let Waiting { request, hold, .. } = waiting;
                let items = of.iter().zip(request.segments.iter().zip(request.remote.iter())).map(|(&of, (near, far))| {
                    let (src, dst) = if way == Way::In { (far.addr, near.addr) } else { (near.addr, far.addr) };
                    (usize::from(of), Piece { src, dst, len: near.len })
                });
                let (mut blocks, count) = (listed(items), of.len());
                let start =
                    &mut Start { key, way, total, count, pairings: &pairings, hold: &hold, blocks: &mut blocks, now: self.now };
                let begun = direct.start(start, None);
                drop(blocks);
                begun?;
                let by = over(&*direct, &pairings);
                self.state.segment_pool.give_list(request.segments);
                self.state.segment_pool.give_wire(request.remote);
                self.begin(key, way, total, by, Kept { hold, receive: None });
            }
            // The first small write goes eagerly meanwhile: it takes one way to the peer where the answer takes two.
            Route::Wait if way == Way::Out && self.is_eager(&waiting.request) => self.start_chunks(waiting)?,
            Route::Wait => {
                self.state.deadlines.start_in_order(key, way, total, self.now);
                self.state.direct.waiting.push(waiting);
                self.state.liveness.look_soon(self.now);
            }
            Route::Refused(error) => self.refused(id, &error),
            Route::Channels => self.start_chunks(waiting)?,
        }
        Ok(())
    }

    /// Whether a write goes in one frame with its data.
    fn is_eager(&self, request: &Request) -> bool {
        self.state.eager.takes(&request.segments, request.total, self.channels)
    }

    /// Starts a transfer in chunks, or with its data in a frame.
    fn start_chunks(&mut self, waiting: Waiting) -> Result<()> {
        let Waiting { id, way, request, hold } = waiting;
        self.state.deadlines.end(Key { id, mine: true });
        let id = self.state.transfers.announced_as(id);
        let (key, now) = (Key { id, mine: true }, self.now);
        let Request { segments, remote, remote_regions: regions, total, .. } = request;
        self.state.deadlines.start(key, way, total, now);
        if way == Way::In {
            self.state.transfers.goes_in_chunks(id, Kind::Read);
            self.state.announce(Frame::Read { id, regions, segments: remote }, now);
            self.state.incoming.start(key, segments, hold, Ending::Read);
            return Ok(());
        }
        self.state.transfers.goes_in_chunks(id, Kind::Write);
        if let Some(data) = self.state.eager.load(&segments, total, self.channels)? {
            self.state.queue.push(&Frame::Write { id, regions, segments: remote, eager: Some(data) }, now);
            self.state.liveness.look_soon(now);
            self.state.counts.eager_sent_bytes += total;
            self.state.transfers.moved(id, total, Carriers::EAGER);
            return Ok(());
        }
        self.state.announce(Frame::Write { id, regions, segments: remote, eager: None }, now);
        self.state.outgoing.start(key, segments, hold, self.channels)
    }

    /// Takes an event of the direct transport.
    pub(super) fn take(mut self, event: Event) -> Result<()> {
        match event {
            Event::Moved(key, len) => self.moved(key, len),
            Event::Ended(key, done) => self.ended(key, done),
            // Transfers that waited for this answer go on.
            Event::Answered => {
                let waiting = std::mem::take(&mut self.state.direct.waiting);
                waiting.into_iter().try_for_each(|waiting| self.proceed(waiting))?;
            }
            Event::Denied(error) => {
                let State { counts, log, setting, .. } = self.state;
                counts.refused += 1;
                log.log(log::Level::Warn, self.now, format_args!("{}: refused a claim of the peer: {error}", setting.peer));
            }
            Event::Sent(..) | Event::Received(..) | Event::Closed(..) => bail!(Internal, "a chunk of the direct transport"),
        }
        Ok(())
    }

    fn refused(&mut self, id: u64, error: &Error) {
        self.state.deadlines.end(Key { id, mine: true });
        self.state.counts.refused_by_peer += 1;
        let peer = &self.state.setting.peer;
        let text = format_args!("{peer}: transfer {id} refused by the peer: {}", error.to_str());
        let error = Error::new(error.kind(), text);
        self.state.transfers.finish(id, Err(error));
    }

    fn moved(&mut self, key: Key, len: u64) {
        self.state.deadlines.moved(key, len, self.now);
        let id = if key.mine { Some(key.id) } else { self.state.direct.receive_of(key) };
        id.into_iter().for_each(|id| self.state.transfers.moved(id, len, Carriers::default()));
    }

    fn ended(&mut self, key: Key, done: bool) {
        let kept = self.state.direct.kept.remove(&key);
        self.state.deadlines.end(key);
        if let Some(receive) = kept.and_then(|kept| kept.receive) {
            self.state.load.ended(0);
            return self.state.transfers.finish(receive, Ok(()));
        }
        match done {
            true => self.state.transfers.finish(key.id, Ok(())),
            false => self.refused(key.id, &err!(RemoteAccess, "its region is no longer registered")),
        }
    }

    // ---- two-sided messages ----

    /// The peer withdraws a message that was to go into a posted buffer.
    ///
    /// # Errors
    /// `Protocol` when the peer is already sending it.
    pub(super) fn withdrawn(self, key: Key) -> Result<()> {
        if !self.channels.direct().is_some_and(|direct| direct.withdraw(key)) {
            bail!(Protocol, "message {} is withdrawn while it is being sent", key.id);
        }
        self.state.direct.kept.remove(&key);
        self.state.load.ended(0);
        self.state.deadlines.end(key);
        Ok(())
    }

    /// Where a message comes from, if it can be sent directly into any buffer that the peer grants.
    pub(super) fn sends_from(self, segments: &[Segment], hold: &Hold) -> Option<Place> {
        let place = segments.first()?.place;
        let one = segments.iter().all(|segment| segment.place == place);
        (one && self.channels.direct()?.can_send(place, hold)).then_some(place)
    }

    /// Grants the buffer of a receive for one message of the peer; `None` if the message comes in chunks.
    pub(super) fn land(
        mut self,
        (key, len, from): (Key, u64, Option<Place>),
        (receive, segment, hold): (u64, &Segment, &Hold),
    ) -> Option<Landing> {
        let region = hold.regions().get(usize::from(segment.region))?;
        let (direct, from) = (self.channels.direct()?, from?);
        let landing = direct.land(key, region, (segment.addr, len), from)?;
        let by = Carriers::direct(direct.by_nvlink(segment.place, from));
        self.begin(key, Way::In, len, by, Kept { hold: hold.clone(), receive: Some(receive) });
        Some(landing)
    }

    /// Sends a message into the buffer that the peer has granted.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn send(mut self, id: u64, segments: &[Segment], (hold, there, landing): (Hold, Place, Landing)) -> Result<()> {
        let Some(direct) = self.channels.direct() else { bail!(Protocol, "a buffer for message {id}, which comes in chunks") };
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
        let start =
            &mut Start { key, way: Way::Out, total, count, pairings: &pairings, hold: &hold, blocks: &mut blocks, now: self.now };
        direct.start(start, Some(landing))?;
        let by = over(&*direct, &pairings);
        self.state.transfers.goes_directly(id);
        self.begin(key, Way::Out, total, by, Kept { hold, receive: None });
        Ok(())
    }
}

/// What carries a direct transfer.
fn over(direct: &dyn Direct, pairings: &[Pairing]) -> Carriers {
    Carriers::direct(pairings.iter().any(|pairing| direct.by_nvlink(pairing.here, pairing.there)))
}
