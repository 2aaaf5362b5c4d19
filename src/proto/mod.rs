//! The protocol of one connection as a machine without sockets, threads or clocks. In: requests of the application, the peer's frames,
//! what happened on channels, the time. Out: frames to send ([`Machine::tx`]), chunks handed to [`Channels`], verdicts
//! ([`Machine::lookup`]), and an error when the connection must end.
//!
//! Invariants, which `simulation` tries to break:
//! - I1: a transfer is OK only when every byte of it is in place. Chunks bear a tag of transfer and place that both sides compute; what
//!   fits no announcement is an error, never a shift.
//! - I2: every posted chunk holds the use of its regions. A verdict, withdrawal or announcement that does not fit the state of its
//!   transfer fails the connection, channels first.
//! - I3: every transfer ends within its deadline, whatever the peer, its neighbours or the network do (`deadlines`).
//! - I4: whatever a peer can feed has a limit (`limits`).
//! - I5: only [`Machine::admit`] may fail and leave the connection alive. Every later error ends it.

mod deadlines;
mod direct;
mod incoming;
mod inline;
mod limits;
mod listed;
mod liveness;
mod matching;
mod outgoing;
mod peer;
mod queue;
mod request;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(dead_code, unused_imports))]
mod simulation;
mod state;
mod transfers;

pub(crate) use limits::MAX_BACKLOG;
pub(crate) use liveness::heartbeat;
pub(crate) use outgoing::tag;
pub(crate) use outgoing::Scheduled;
pub(crate) use peer::is_farewell;
pub(crate) use request::{Request, Sketch};
#[cfg(fuzzing)]
pub(crate) use simulation::attacked;
pub(crate) use state::Setting;
pub use transfers::TransferState;

use crate::channel::router::Channels;
use crate::direct::{Blocks, Event, Way};
use crate::region::{Hold, RegionUse};
use crate::segment_pool::SegmentPool;
use crate::stats::Totals;
use crate::status::{bail, err, Error, Result, UCCL_OK};
use crate::types::{Place, Segment, MAX_INLINE};
use crate::wire::frame::Frame;
use crate::wire::queue::TxQueue;
use direct::DirectTransfers;
use peer::PeerFrames;
use state::State;
use std::time::{Duration, Instant};
use transfers::Kind;

/// The protocol of a connection.
///
/// Whoever drives it calls, in this order, and at most one thread at a time:
/// 1. [`Machine::on_received`] for bytes that came, and [`Machine::handle`] for each frame among them;
/// 2. [`Machine::drive_channels`] for what happened on the channels;
/// 3. [`Machine::schedule`] until it says [`Scheduled::Blocked`], and after each call sends what [`Machine::tx`] has, and reports that by
///    [`Machine::on_sent`]: the peer can post nothing before it knows of it;
/// 4. [`Machine::tick`] once [`Machine::next_tick`] has come, which any of the above may have moved.
///
/// An error of any of them means that the connection must end: [`Machine::say_bye`] queues the reason for the peer, and
/// [`Machine::fail`] closes the channels and ends every transfer. Afterwards nothing but the getters may be called.
///
/// The application's requests come in between. [`Machine::admit`] goes before every `start_*` and is the only one that may fail and leave
/// the connection alive. After a start, step 3 hands out the first chunks.
///
/// Getters never change anything: [`Machine::dead`], [`Machine::alive`], [`Machine::lookup`], [`Machine::in_flight`], [`Machine::busy`],
/// [`Machine::counts`], [`Machine::silence`], [`Machine::next_tick`].
pub(crate) struct Machine {
    state: State,
    events: Vec<Event>,
    dead: Option<Error>,
}

impl Machine {
    pub(crate) fn new(setting: Setting, now: Instant) -> Machine {
        Machine { state: State::new(setting, now), events: Vec::new(), dead: None }
    }

    // ---- getters ----

    /// Why the connection ended, once it has.
    pub(crate) fn dead(&self) -> Option<&Error> {
        self.dead.as_ref()
    }

    /// An error once the connection has ended.
    pub(crate) fn alive(&self) -> Result<()> {
        match &self.dead {
            Some(e) => Err(e.clone()),
            None => Ok(()),
        }
    }

    /// Something waits for the network or the peer.
    pub(crate) fn busy(&self) -> bool {
        self.state.busy()
    }

    /// Whether a transfer of this connection uses a region of this side.
    pub(crate) fn uses_region(&self, id: u64) -> bool {
        self.state.uses_region(id)
    }

    /// Transfers that this side started and that have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.state.transfers.in_flight()
    }

    /// A number that changes whenever a transfer of this side ends.
    pub(crate) fn ended(&self) -> u64 {
        self.state.transfers.ended()
    }

    /// Why a transfer of this side failed, where the log does not have it yet: for the log.
    pub(crate) fn tell(&mut self, id: u64) -> Option<Error> {
        self.state.transfers.tell(id)
    }

    /// Where a transfer of this side stands, or what it failed with.
    pub(crate) fn lookup(&self, id: u64) -> Result<TransferState> {
        let state = self.state.transfers.lookup(id)?;
        match &self.dead {
            Some(e) if !state.complete => Err(e.clone()),
            _ => Ok(state),
        }
    }

    /// Nothing is kept of transfers that have ended, on either side's account.
    #[cfg(any(test, fuzzing))]
    fn is_idle(&self) -> bool {
        self.state.is_idle()
    }

    /// Whether every account agrees with what is really there, and every stream has a deadline.
    #[cfg(any(test, fuzzing))]
    fn audit(&self) -> std::result::Result<(), String> {
        match self.dead {
            Some(_) => Ok(()),
            None => self.state.audit(),
        }
    }

    /// Frames that wait to leave.
    pub(crate) fn tx(&mut self) -> &mut TxQueue {
        &mut self.state.queue.tx
    }

    /// Bytes of them.
    pub(crate) fn unsent(&self) -> usize {
        self.state.queue.tx.pending()
    }

    /// Lists of ended transfers for the next ones.
    pub(crate) fn segment_pool(&mut self) -> &mut SegmentPool {
        &mut self.state.segment_pool
    }

    // ---- starting transfers ----

    /// Whether one more transfer of this many segments between these places may start. The only step that can fail and leave the
    /// connection alive.
    ///
    /// # Errors
    /// Why the connection has ended; `Resource` at a limit; `Unsupported` for places that no channel connects.
    pub(crate) fn admit(&self, segments: usize, pairs: &[(Place, Place)], channels: &Channels) -> Result<()> {
        self.alive()?;
        limits::admit(self.state.transfers.in_flight(), self.state.transfers.segments(), segments)?;
        match pairs.iter().find(|&&(local, peer)| channels.route(local, peer).is_none()) {
            Some((local, peer)) => Err(err!(Unsupported, "no channel carries memory of {local:?} here and {peer:?} at the peer")),
            None => Ok(()),
        }
    }

    /// Starts a one-sided transfer that was admitted, whichever way it goes. An error ends the connection, here as below.
    pub(crate) fn start(&mut self, way: Way, request: Request, channels: &mut Channels, now: Instant) -> Result<u64> {
        DirectTransfers { state: &mut self.state, channels, now }.start(way, request)
    }

    /// Records a transfer that fails before anything moves.
    pub(crate) fn start_failed(&mut self, error: Error) -> u64 {
        let id = self.state.transfers.start(Kind::Write, 0, 0);
        self.state.transfers.finish(id, Err(error));
        // Whoever starts it says so.
        self.state.transfers.tell(id);
        id
    }

    /// Starts a two-sided send that was admitted. The peer's places are known when it answers.
    pub(crate) fn start_send(
        &mut self,
        segments: Vec<Segment>,
        uses: Vec<RegionUse>,
        channels: &mut Channels,
        now: Instant,
    ) -> u64 {
        let total = segments.iter().map(|s| s.len).sum();
        let id = self.state.transfers.start(Kind::Send { pulled: false }, total, segments.len());
        let hold = Hold::new(uses);
        let from = DirectTransfers { state: &mut self.state, channels, now }.sends_from(&segments, &hold);
        self.state.matching.send(id, segments, hold, from.is_some(), now);
        self.state.push(&Frame::Message { id, len: total, from }, now);
        id
    }

    /// Starts a two-sided receive that was admitted.
    pub(crate) fn start_receive(&mut self, segment: Segment, region: RegionUse, channels: &mut Channels, now: Instant) -> u64 {
        let id = self.state.transfers.start(Kind::Receive, 0, 1);
        self.state.matching.receive(id, segment, Hold::new(vec![region]), now);
        self.state.liveness.look_soon(now);
        PeerFrames { state: &mut self.state, channels, now }.match_receives();
        id
    }

    /// Queues a notification.
    pub(crate) fn notify(&mut self, name: &[u8], message: &[u8], now: Instant) {
        self.state.counts.notifications_sent += 1;
        self.state.push(&Frame::Notify { name, message }, now);
    }

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
        DirectTransfers { state: &mut self.state, channels, now }.start_at_once(sketch, way, blocks)
    }

    // ---- progress ----

    /// Takes a frame of the peer. An error means that the connection must end.
    pub(crate) fn handle(&mut self, frame: Frame<'_>, channels: &mut Channels, now: Instant) -> Result<()> {
        PeerFrames { state: &mut self.state, channels, now }.handle(frame)
    }

    /// Takes what happened on the channels. `true` when something did.
    pub(crate) fn drive_channels(&mut self, channels: &mut Channels, now: Instant) -> Result<bool> {
        let mut events = std::mem::take(&mut self.events);
        let any = channels.progress(now, &mut events)?;
        for event in events.drain(..) {
            match event {
                Event::Sent(key, len) => self.state.chunk_sent(key, len, now)?,
                Event::Received(key, len) => self.state.chunk_received(key, len, now)?,
                event => DirectTransfers { state: &mut self.state, channels, now }.take(event)?,
            }
        }
        self.events = events;
        // Fewer than before never fails.
        let _ = self.state.load.chunks(self.state.incoming.expected());
        if self.state.liveness.must_report(self.state.incoming.chunks()) {
            self.state.ping(channels.totals().received, now);
        }
        Ok(any)
    }

    /// Hands at most `limit` chunks to channels with room.
    pub(crate) fn schedule(&mut self, channels: &mut Channels, limit: usize, now: Instant) -> Result<Scheduled> {
        if !self.state.outgoing.waiting() {
            return Ok(Scheduled::Blocked);
        }
        let State { outgoing, queue, .. } = &mut self.state;
        let scheduled = queue.append(now, |tx| outgoing.schedule(channels, tx, limit, now))?;
        channels.flush()?;
        Ok(scheduled)
    }

    /// How often the peer hears of this side.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.state.setting.heartbeat
    }

    /// How long a transfer may stand still.
    pub(crate) fn patience(&self) -> Duration {
        self.state.setting.transfer_timeout
    }

    // ---- time ----

    /// So many bytes are kept of frames that have not come as a whole.
    ///
    /// # Errors
    /// `Resource` when that is more memory than peers may take.
    pub(crate) fn keeps(&mut self, bytes: usize) -> Result<()> {
        self.state.load.arriving(bytes)
    }

    /// Bytes came in on the control stream; `arriving`: size of the frame they belong to.
    pub(crate) fn on_received(&mut self, bytes: usize, arriving: usize, now: Instant) {
        self.state.liveness.on_received(now);
        self.state.counts.control_received_bytes += bytes as u64;
        // Answers wait behind a large frame that is on its way, and behind all that comes while the peer has a backlog: then its
        // heartbeats stay away.
        if arriving > MAX_INLINE || self.state.liveness.is_late(now) {
            self.state.deadlines.waited(bytes as u64, now);
        }
    }

    /// The control socket took bytes; `leaving`: bytes taken from the queue that it has not.
    pub(crate) fn on_sent(&mut self, bytes: usize, leaving: usize, now: Instant) {
        self.state.queue.on_sent(bytes, leaving, now);
        // Fewer than before never fails.
        let _ = self.state.load.answers(self.state.queue.tx.answers());
        self.state.counts.control_sent_bytes += bytes as u64;
        if self.state.queue.backlog() > 0 {
            self.state.deadlines.waited(bytes as u64, now);
            self.state.liveness.look_soon(now);
        }
    }

    /// When [`Machine::tick`] wants to be called next.
    pub(crate) fn next_tick(&self) -> Instant {
        self.state.liveness.next_tick
    }

    /// Heartbeats and deadlines. An error means that the connection must end.
    pub(crate) fn tick(&mut self, channels: &mut Channels, now: Instant) -> Result<()> {
        let timeout = self.state.setting.transfer_timeout;
        self.state.liveness.check(now)?;
        self.state.queue.check(timeout, now)?;
        // While nothing must move, a channel that fails says so by itself where its plugin can.
        if self.state.deadlines.must_look(timeout, now) && (self.state.deadlines.any() || !self.state.setting.doorbells) {
            self.note_network(channels, now)?;
            if let Some(why) = channels.dead_nic(timeout, now) {
                bail!(TimedOut, "{why}");
            }
        }
        if let Some(overdue) = self.state.deadlines.overdue(timeout, now) {
            return Err(self.state.describe(overdue, channels, now));
        }
        self.state.expire_matches(now);
        limits::withdrawn(self.state.matching.withdrawn())?;
        let active = self.state.deadlines.any() || self.state.queue.backlog() > 0 || self.state.matching.waiting() > 0;
        // A heartbeat needs another look only if it stays in the queue, see [`Machine::on_sent`].
        self.state.report(channels, now);
        self.state.liveness.plan(active, timeout.min(self.state.setting.match_timeout) / 3, now);
        Ok(())
    }

    /// Counts what the network has moved since the last look. An error when a channel has failed.
    pub(crate) fn note_network(&mut self, channels: &mut Channels, now: Instant) -> Result<()> {
        self.state.deadlines.note_network(channels.look(now)?, now);
        Ok(())
    }

    // ---- statistics ----

    /// What the machine counts.
    pub(crate) fn counts(&self) -> Totals {
        let (transfers_started, transfers_completed, transfers_failed) = self.state.transfers.outcomes();
        Totals { transfers_started, transfers_completed, transfers_failed, ..self.state.counts }
    }

    /// Names the peer.
    pub(crate) fn peer(&self) -> &str {
        &self.state.setting.peer
    }

    /// Since when nothing was heard of the peer, and how long that may last.
    pub(crate) fn silence(&self, now: Instant) -> (Duration, Duration) {
        self.state.liveness.silence(now)
    }

    /// A transfer that has not moved for half of its timeout, in words.
    pub(crate) fn standstill(&mut self, channels: &Channels, now: Instant) -> Option<String> {
        let overdue = self.state.deadlines.overdue(self.state.setting.transfer_timeout / 2, now)?;
        let limit = self.state.setting.transfer_timeout;
        Some(format!("{}; the connection ends after {limit:.1?}", self.state.describe(overdue, channels, now).to_str()))
    }

    // ---- the end ----

    /// Says that this side ends the connection, and why.
    pub(crate) fn say_bye(&mut self, error: Option<&Error>, now: Instant) {
        let (status, text) = error.map_or((UCCL_OK, String::new()), |e| (e.code(), e.to_string()));
        self.state.push(&Frame::Bye { status, text: &text }, now);
    }

    /// Ends the connection: closes the channels first, so that nothing touches memory any more, then ends every transfer with `error`.
    pub(crate) fn fail(&mut self, error: Error, channels: &mut Channels) {
        if self.dead.is_some() {
            return;
        }
        channels.close();
        self.state.fail(&error);
        self.dead = Some(error);
    }

    /// It has ended, whatever of it is in order: only for a defect that even [`Machine::fail`] met.
    pub(crate) fn give_up(&mut self, error: Error) {
        self.dead.get_or_insert(error);
    }
}
