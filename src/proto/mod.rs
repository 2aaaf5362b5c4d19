//! The protocol of one connection as a machine without sockets, threads or clocks. It takes the application's requests, the
//! peer's frames, the events of the channels, and the time. It produces frames to send ([`Machine::tx`]), chunks for
//! [`Channels`], verdicts ([`Machine::lookup`]), and an error when the connection must end.
//!
//! Invariants, which `simulation` tries to break:
//! - I1: a transfer succeeds only when every byte of it is in place. Each chunk carries a tag that both engines compute from the
//!   transfer and the chunk's position. A chunk that fits no announcement is an error and never lands elsewhere.
//! - I2: every posted chunk keeps its regions in use. A verdict, withdrawal or announcement that does not fit the state of its
//!   transfer fails the connection, and the channels close first.
//! - I3: every transfer ends within its deadline, whatever the peer, other transfers or the network do (`deadlines`).
//! - I4: everything that a peer can make this engine keep has a limit (`limits`).
//! - I5: only [`Machine::admit`] may fail and leave the connection open. Every later error ends it.

mod carriers;
mod deadlines;
mod direct;
mod eager;
mod incoming;
mod lanes;
mod limits;
mod listed;
mod liveness;
mod losses;
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

pub use carriers::Carriers;
pub(crate) use limits::MAX_BACKLOG;
pub(crate) use liveness::heartbeat;
pub(crate) use outgoing::tag;
pub(crate) use outgoing::Scheduled;
pub(crate) use peer::is_farewell;
pub(crate) use request::{Request, Sketch};
#[cfg(fuzzing)]
pub(crate) use simulation::attacked;
pub(crate) use state::Setting;
pub(crate) use transfers::Timed;
pub use transfers::TransferState;

use crate::channel::router::Channels;
use crate::direct::{Blocks, Event, Way};
use crate::region::{Hold, RegionUse};
use crate::segment_pool::SegmentPool;
use crate::stats::Totals;
use crate::status::{bail, err, Error, Result, UCCL_OK};
use crate::types::{Place, Segment, MAX_EAGER};
use crate::wire::frame::Frame;
use crate::wire::queue::TxQueue;
use direct::DirectTransfers;
use peer::PeerFrames;
use state::State;
use std::time::{Duration, Instant};
use transfers::Kind;

/// The protocol of a connection.
///
/// One thread at a time drives it, with these calls in this order:
/// 1. [`Machine::on_received`] for bytes that arrived, and [`Machine::handle`] for each frame in them;
/// 2. [`Machine::drive_channels`] for the events of the channels;
/// 3. [`Machine::schedule`] until it returns [`Scheduled::Blocked`]. After each call, send what is in [`Machine::tx`] and report
///    it with [`Machine::on_sent`]: the peer can post nothing that it does not know of;
/// 4. [`Machine::tick`] once [`Machine::next_tick`] has passed, which each of the calls above may change.
///
/// An error of any of them means that the connection must end. [`Machine::say_bye`] queues the goodbye, and [`Machine::fail`]
/// closes the channels and ends every transfer. Only the getters may be called after that.
///
/// The application's requests come in between. [`Machine::admit`] comes before every `start_*`; it alone may fail and leave the
/// connection open. After a start, step 3 hands out the first chunks.
///
/// The getters are [`Machine::dead`], [`Machine::alive`], [`Machine::lookup`], [`Machine::in_flight`], [`Machine::busy`],
/// [`Machine::counts`], [`Machine::silence`] and [`Machine::next_tick`].
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

    /// Why the connection ended; `None` while it is open.
    pub(crate) fn dead(&self) -> Option<&Error> {
        self.dead.as_ref()
    }

    /// Fails once the connection has ended.
    pub(crate) fn alive(&self) -> Result<()> {
        match &self.dead {
            Some(e) => Err(e.clone()),
            None => Ok(()),
        }
    }

    /// Whether anything waits for the network or the peer.
    pub(crate) fn busy(&self) -> bool {
        self.state.busy()
    }

    /// Whether a transfer of this connection uses a region of this engine.
    pub(crate) fn uses_region(&self, id: u64) -> bool {
        self.state.uses_region(id)
    }

    /// Transfers that this engine started and that have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.state.transfers.in_flight()
    }

    /// How many transfers of this engine have ended; a waiter looks again when it changes.
    pub(crate) fn ended(&self) -> u64 {
        self.state.transfers.ended()
    }

    /// Why a transfer of this engine failed, if the log does not have it yet.
    pub(crate) fn take_failure(&mut self, id: u64) -> Option<Error> {
        self.state.transfers.take_failure(id)
    }

    /// Where a transfer of this engine stands, or why it failed.
    pub(crate) fn lookup(&self, id: u64) -> Result<TransferState> {
        let state = self.state.transfers.lookup(id)?;
        match &self.dead {
            Some(e) if !state.complete => Err(e.clone()),
            _ => Ok(state),
        }
    }

    /// What has carried bytes of a transfer of this engine.
    ///
    /// # Errors
    /// `NotFound` for an id that was never given out.
    pub(crate) fn carriers(&self, id: u64) -> Result<Carriers> {
        self.state.transfers.carriers(id)
    }

    /// Whether nothing is kept of ended transfers of either engine.
    #[cfg(any(test, fuzzing))]
    fn is_idle(&self) -> bool {
        self.state.is_idle()
    }

    /// Whether every count agrees with what it counts, and every stream has a deadline.
    #[cfg(any(test, fuzzing))]
    fn audit(&self) -> std::result::Result<(), String> {
        match self.dead {
            Some(_) => Ok(()),
            None => self.state.audit(),
        }
    }

    /// Frames that wait to be sent.
    pub(crate) fn tx(&mut self) -> &mut TxQueue {
        &mut self.state.queue.tx
    }

    /// How many bytes wait to be sent.
    pub(crate) fn unsent(&self) -> usize {
        self.state.queue.tx.pending()
    }

    /// Segment lists of ended transfers, to be used again.
    pub(crate) fn segment_pool(&mut self) -> &mut SegmentPool {
        &mut self.state.segment_pool
    }

    // ---- starting transfers ----

    /// Whether one more transfer with `segments` segments between these places may start. Only this step may fail and leave the
    /// connection open.
    ///
    /// # Errors
    /// The error that ended the connection; `Resource` at a limit; `Unsupported` for places that no channel connects.
    pub(crate) fn admit(&self, segments: usize, pairs: impl Iterator<Item = (Place, Place)>, channels: &Channels) -> Result<()> {
        self.alive()?;
        limits::admit(self.state.transfers.in_flight(), self.state.transfers.segments(), segments)?;
        match channels.unreachable(pairs) {
            Some((local, peer)) => Err(err!(Unsupported, "no channel connects {local:?} here with {peer:?} at the peer")),
            None => Ok(()),
        }
    }

    /// Starts an admitted one-sided transfer on whichever route it takes. An error ends the connection.
    pub(crate) fn start(&mut self, way: Way, request: Request, channels: &mut Channels, now: Instant) -> Result<u64> {
        DirectTransfers { state: &mut self.state, channels, now }.start(way, request)
    }

    /// Records a transfer that fails before anything moves.
    pub(crate) fn start_failed(&mut self, error: Error) -> u64 {
        let id = self.state.transfers.start(Kind::Write, 0, 0);
        self.state.transfers.finish(id, Err(error));
        // The caller reports the failure.
        self.state.transfers.take_failure(id);
        id
    }

    /// Starts an admitted two-sided send. The peer's answer names its place.
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

    /// Starts an admitted two-sided receive.
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

    /// Starts an admitted transfer if it can go directly at once. Returns its id, and the error if the connection must end; some
    /// of it may have moved by then. `None`: nothing has started, and the caller uses [`Machine::start`].
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

    // ---- channels that come back ----

    /// A channel has not come up at all.
    pub(crate) fn leave_out(&mut self, channel: u16, now: Instant) {
        self.state.losses.never_up(channel, now);
    }

    /// Whether a channel is closed at both engines, and may be set up again.
    pub(crate) fn is_lost(&self, channel: u16) -> bool {
        self.dead.is_none() && self.state.losses.is_lost(channel)
    }

    /// Whether a lost channel was of no use since it came up: of the chunks announced on it none has arrived, at either engine.
    pub(crate) fn was_useless(&self, channel: u16) -> bool {
        self.state.losses.was_useless(channel)
    }

    /// Why no channel is open; `None` while one is.
    pub(crate) fn without_channels(&self, channels: &Channels) -> Option<Error> {
        let open = self.state.losses.open(channels.count());
        (open == 0).then(|| err!(RemoteDisconnect, "no channel is open{}", self.state.describe_lost(channels)))
    }

    /// Whether [`Machine::is_lost`] has come to hold for a channel; says so once.
    pub(crate) fn has_lost(&mut self) -> bool {
        self.dead.is_none() && self.state.losses.take_news()
    }

    /// This engine takes part in a set-up of lost channels. Returns its number: the next one, or the one that the peer has chosen.
    ///
    /// # Errors
    /// Why it cannot; the connection stays as it is.
    pub(crate) fn begin_restore(&mut self, channels: &[u16], number: Option<u32>) -> Result<u32> {
        self.alive()?;
        self.state.losses.begin(channels, number)
    }

    /// A lost channel is up at this engine; [`Channels`] has it already, and no chunk goes over it until the peer says the same.
    ///
    /// # Errors
    /// `Internal` where there was no such set-up.
    pub(crate) fn restore(&mut self, channel: u16, number: u32, channels: &mut Channels, now: Instant) -> Result<()> {
        let open = self.state.losses.up_here(channel, number, now)?;
        self.state.push(&Frame::Up { channel, generation: number }, now);
        if open {
            self.state.restored(channel, channels, now);
        }
        Ok(())
    }

    // ---- progress ----

    /// Takes a frame of the peer. An error means that the connection must end.
    pub(crate) fn handle(&mut self, frame: Frame<'_>, channels: &mut Channels, now: Instant) -> Result<()> {
        PeerFrames { state: &mut self.state, channels, now }.handle(frame)
    }

    /// Takes the events of the channels. Returns whether there were any.
    pub(crate) fn drive_channels(&mut self, channels: &mut Channels, now: Instant) -> Result<bool> {
        let mut events = std::mem::take(&mut self.events);
        let any = channels.progress(now, &mut events)?;
        for event in events.drain(..) {
            match event {
                Event::Sent(channel, key, len) => self.state.chunk_sent(channel, key, len, now)?,
                Event::Received(channel, key, len) => self.state.chunk_received(channel, key, len, now)?,
                Event::Closed(channel, why) => self.state.channel_closed(channel, why, channels, now)?,
                event => DirectTransfers { state: &mut self.state, channels, now }.take(event)?,
            }
        }
        self.events = events;
        // A decrease never fails.
        let _ = self.state.load.chunks(self.state.incoming.outstanding());
        if self.state.incoming.must_report() {
            self.state.report_chunks(now);
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

    /// The interval of this engine's heartbeats.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.state.setting.heartbeat
    }

    /// How long a transfer may go without progress.
    pub(crate) fn patience(&self) -> Duration {
        self.state.setting.transfer_timeout
    }

    // ---- time ----

    /// `bytes` are kept of incomplete frames.
    ///
    /// # Errors
    /// `Resource` when that exceeds the memory that peers may use.
    pub(crate) fn keeps(&mut self, bytes: usize) -> Result<()> {
        self.state.load.arriving(bytes)
    }

    /// Bytes arrived on the control connection. `arriving`: the size of the frame that they belong to.
    pub(crate) fn on_received(&mut self, bytes: usize, arriving: usize, now: Instant) {
        self.state.liveness.on_received(now);
        self.state.counts.control_received_bytes += bytes as u64;
        // Answers wait behind a large frame that is arriving. They also wait behind everything that arrives while the peer has a
        // backlog; the peer's heartbeats are late then.
        if arriving > MAX_EAGER || self.state.liveness.is_late(now) {
            self.state.deadlines.waited(bytes as u64, now);
        }
    }

    /// The control socket took bytes. `leaving`: bytes that were taken from the queue and not by the socket.
    pub(crate) fn on_sent(&mut self, bytes: usize, leaving: usize, now: Instant) {
        self.state.queue.on_sent(bytes, leaving, now);
        // A decrease never fails.
        let _ = self.state.load.answers(self.state.queue.tx.answers());
        self.state.counts.control_sent_bytes += bytes as u64;
        if self.state.queue.backlog() > 0 {
            self.state.deadlines.waited(bytes as u64, now);
            self.state.liveness.look_soon(now);
        }
    }

    /// The control connection goes on over another socket. `leaving`: bytes that were taken from the queue and not by this socket.
    pub(crate) fn on_moved(&mut self, leaving: usize, now: Instant) {
        self.state.queue.on_moved(leaving, now);
        // The peer has proved itself.
        self.state.liveness.on_received(now);
        self.state.liveness.look_soon(now);
        self.state.counts.control_moves += 1;
    }

    /// How long a NIC may bring nothing that is due.
    pub(crate) fn nic_timeout(&self) -> Duration {
        self.state.setting.nic_timeout
    }

    /// When to call [`Machine::tick`] next.
    pub(crate) fn next_tick(&self) -> Instant {
        self.state.liveness.next_tick
    }

    /// Heartbeats and deadlines. An error means that the connection must end.
    pub(crate) fn tick(&mut self, channels: &mut Channels, now: Instant) -> Result<()> {
        let timeout = self.state.setting.transfer_timeout;
        let silence = |e: Error| Error::new(e.kind(), format_args!("{e}{}", channels.faults()));
        self.state.liveness.check(now).map_err(silence)?;
        self.state.queue.check(timeout, now)?;
        // While nothing must move, a plugin with doorbells reports a failed channel by itself.
        if self.state.deadlines.must_look(timeout, now) && (self.state.deadlines.any() || !self.state.setting.doorbells) {
            self.note_network(channels, now)?;
            let (nic_timeout, received) = (self.state.setting.nic_timeout, self.state.liveness.received());
            channels.close_silent([nic_timeout, nic_timeout.max(timeout / 2)], received, now)?;
            if let Some(why) = channels.dead_nic(timeout, now) {
                bail!(TimedOut, "{why}");
            }
        }
        for channel in self.state.losses.overdue(now).collect::<Vec<_>>() {
            channels.close_channel(channel, err!(RemoteDisconnect, "the peer did not open it"));
        }
        if let Some(overdue) = self.state.deadlines.overdue(timeout, now) {
            return Err(self.state.describe(overdue, channels, now));
        }
        if self.state.incoming.owes_report() {
            self.state.report_chunks(now);
        }
        self.state.expire_matches(now);
        limits::withdrawn(self.state.matching.withdrawn())?;
        let waits = self.state.queue.backlog() > 0 || self.state.matching.waiting() > 0;
        let cut = self.state.losses.open(channels.count()) == 0;
        let active = channels.relieve(now) || waits || cut || self.state.deadlines.any();
        // A heartbeat needs another check only if it stays in the queue, see [`Machine::on_sent`].
        self.state.report(channels, now);
        self.state.liveness.plan(active, timeout.min(self.state.setting.match_timeout) / 3, now);
        Ok(())
    }

    /// Counts what the network has moved since the last look. Fails when a channel has failed.
    pub(crate) fn note_network(&mut self, channels: &mut Channels, now: Instant) -> Result<()> {
        self.state.deadlines.note_network(channels.look(now)?, now);
        Ok(())
    }

    // ---- statistics ----

    /// The machine's counters.
    pub(crate) fn counts(&self) -> Totals {
        let (transfers_started, transfers_completed, transfers_failed) = self.state.transfers.outcomes();
        Totals { transfers_started, transfers_completed, transfers_failed, ..self.state.counts }
    }

    /// Transfers of this engine that have succeeded since the last call, with the time when each began. Messages are left out.
    pub(crate) fn take_timed(&mut self) -> impl Iterator<Item = Timed> + '_ {
        self.state.transfers.take_timed()
    }

    /// The peer's name.
    pub(crate) fn peer(&self) -> &str {
        &self.state.setting.peer
    }

    /// How long the peer has been silent, and how long it may be.
    pub(crate) fn silence(&self, now: Instant) -> (Duration, Duration) {
        self.state.liveness.silence(now)
    }

    /// Describes a transfer that has not moved for half of its timeout.
    pub(crate) fn standstill(&mut self, channels: &Channels, now: Instant) -> Option<String> {
        let overdue = self.state.deadlines.overdue(self.state.setting.transfer_timeout / 2, now)?;
        let limit = self.state.setting.transfer_timeout;
        Some(format!("{}; the connection ends after {limit:.1?}", self.state.describe(overdue, channels, now).to_str()))
    }

    // ---- the end ----

    /// Queues the goodbye, with the cause.
    pub(crate) fn say_bye(&mut self, error: Option<&Error>, now: Instant) {
        let (status, text) = error.map_or((UCCL_OK, String::new()), |e| (e.code(), e.to_string()));
        self.state.push(&Frame::Bye { status, text: &text }, now);
    }

    /// Ends the connection. The channels close first, so that nothing touches memory any more; then every transfer ends with
    /// `error`.
    pub(crate) fn fail(&mut self, error: Error, channels: &mut Channels) {
        if self.dead.is_some() {
            return;
        }
        channels.close();
        self.state.fail(&error);
        self.dead = Some(error);
    }

    /// Marks the connection as ended without any clean-up: only for a defect that [`Machine::fail`] itself ran into.
    pub(crate) fn give_up(&mut self, error: Error) {
        self.dead.get_or_insert(error);
    }
}
