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
mod limits;
mod listed;
mod matching;
mod outgoing;
mod peer;
mod request;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(dead_code, unused_imports))]
mod simulation;
mod transfers;

pub(crate) use limits::MAX_BACKLOG;
pub(crate) use outgoing::tag;
pub(crate) use outgoing::Scheduled;
pub(crate) use peer::is_farewell;
pub(crate) use request::{Request, Sketch};
#[cfg(fuzzing)]
pub(crate) use simulation::attacked;
pub use transfers::TransferState;

use crate::budget::{Account, Share};
use crate::channel::plan::Walk;
use crate::channel::router::Channels;
use crate::direct::{Event, Way};
use crate::logging::Limiter;
use crate::notify::Inbox;
use crate::region::{Hold, RegionUse};
use crate::registry::Registry;
use crate::segment_pool::SegmentPool;
use crate::stats::Totals;
use crate::status::{bail, err, Error, ErrorKind, Result, UCCL_OK};
use crate::types::{Key, Place, Segment, MAX_INLINE};
use crate::wire::frame::Frame;
use crate::wire::queue::TxQueue;
use deadlines::{Deadlines, Overdue};
use incoming::{Ended, Ending, Incoming};
use limits::PeerLoad;
use listed::DirectTransfers;
use matching::Matching;
use outgoing::{Gone, Outgoing};
use std::sync::Arc;
use std::time::{Duration, Instant};
use transfers::{Kind, Transfers};

/// What both sides agreed on, and what the machine needs of its engine.
pub(crate) struct Setting {
    pub registry: Arc<Registry>,
    pub inbox: Inbox,
    /// What peers of this address may take, and how many lines of the log all peers of the engine may cause.
    pub account: Arc<Account>,
    pub lines: Arc<Limiter>,
    /// Largest transfer inside a control frame, bytes.
    pub eager_bytes: usize,
    /// Names the peer in errors.
    pub peer: String,
    pub transfer_timeout: Duration,
    /// Silence after which the peer is lost; the smaller of both sides' values sets the heartbeat.
    pub peer_timeout: Duration,
    pub heartbeat: Duration,
    pub match_timeout: Duration,
    /// Whoever drives is told when a channel fails.
    pub doorbells: bool,
}

/// Deadlines of transfers are looked at this often while there are any.
const TICK: Duration = Duration::from_millis(50);
/// The network's counters are looked at this often while there are any.
const LOOK: Duration = Duration::from_millis(500);
/// The peer is told this often how much has arrived, while data arrives.
const REPORT: Duration = Duration::from_secs(1);

/// How often a heartbeat goes to a peer that gives this side up after so much silence: two may be late.
pub(crate) fn heartbeat(peer_timeout: Duration) -> Duration {
    peer_timeout / 3
}

/// Log lines a second that the peer of one connection can cause.
const PEER_LINES: u32 = 5;

/// The protocol state of a connection.
pub(crate) struct Machine {
    setting: Setting,
    /// Frames that wait to leave.
    pub tx: TxQueue,
    transfers: Transfers,
    outgoing: Outgoing,
    incoming: Incoming,
    matching: Matching,
    direct: DirectTransfers,
    deadlines: Deadlines,
    peer: PeerLoad,
    /// Lists of ended transfers for the next ones.
    pub segment_pool: SegmentPool,
    events: Vec<Event>,
    /// Room for the bytes of a small transfer.
    gathered: Vec<u8>,
    clock: Clock,
    /// Bytes that the peer says have arrived there.
    peer_received: u64,
    /// Bytes that [`Frame::Ping`] has reported, and that the network had taken and brought at the last look.
    reported: u64,
    /// Chunks that it has reported.
    reported_chunks: u64,
    network: (u64, u64),
    /// Bytes of frames that are neither queued any more nor with the socket.
    leaving: usize,
    log: Limiter,
    counts: Totals,
    dead: Option<Error>,
}

/// When what last happened.
struct Clock {
    rx: Instant,
    /// The last heartbeat of the peer, and of this side.
    ping: Instant,
    report: Instant,
    network: Instant,
    /// When the socket had last taken enough of the queued frames, or had nothing to take; and what it has taken since.
    drained: Instant,
    trickled: u64,
    next_tick: Instant,
    /// The peer's heartbeat has come, and this side's is due before long: it goes along, so that one look serves both.
    echo: bool,
}

impl Machine {
    pub(crate) fn new(setting: Setting, now: Instant) -> Machine {
        let (share, log) = (Share::new(&setting.account), Limiter::within(&setting.lines, PEER_LINES));
        Machine {
            setting,
            tx: TxQueue::default(),
            transfers: Transfers::default(),
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            matching: Matching::default(),
            direct: DirectTransfers::default(),
            deadlines: Deadlines::new(now),
            peer: PeerLoad::new(share),
            segment_pool: SegmentPool::default(),
            events: Vec::new(),
            gathered: Vec::new(),
            clock: Clock {
                rx: now,
                ping: now,
                report: now,
                network: now,
                drained: now,
                trickled: 0,
                next_tick: now,
                echo: false,
            },
            peer_received: 0,
            reported: 0,
            reported_chunks: 0,
            network: (0, 0),
            leaving: 0,
            log,
            counts: Totals::default(),
            dead: None,
        }
    }

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

    /// Transfers that this side started and that have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.transfers.in_flight()
    }

    /// A number that changes whenever a transfer of this side ends.
    pub(crate) fn ended(&self) -> u64 {
        self.transfers.ended()
    }

    /// The peer has sent its heartbeat: this side's goes with the same look if it has waited for half of its time.
    fn echo(&mut self, now: Instant) {
        if now.saturating_duration_since(self.clock.report) >= self.setting.heartbeat / 2 {
            self.clock.echo = true;
            self.clock.next_tick = self.clock.next_tick.min(now);
        }
    }

    /// Something waits for the network or the peer.
    pub(crate) fn busy(&self) -> bool {
        self.transfers.in_flight() > 0 || !self.incoming.is_empty() || !self.outgoing.is_empty()
    }

    /// Why a transfer of this side failed, where the log does not have it yet: for the log.
    pub(crate) fn tell(&mut self, id: u64) -> Option<Error> {
        self.transfers.tell(id)
    }

    /// Where a transfer of this side stands, or what it failed with.
    pub(crate) fn lookup(&self, id: u64) -> Result<TransferState> {
        let state = self.transfers.lookup(id)?;
        match &self.dead {
            Some(e) if !state.complete => Err(e.clone()),
            _ => Ok(state),
        }
    }

    /// Whether a transfer of this connection uses a region of this side.
    pub(crate) fn uses_region(&self, id: u64) -> bool {
        let direct = self.direct.uses_region(id);
        direct || self.outgoing.uses_region(id) || self.incoming.uses_region(id) || self.matching.uses_region(id)
    }

    /// Bytes of the control stream that the socket has not taken.
    fn backlog(&self) -> usize {
        self.tx.pending() + self.leaving
    }

    fn push(&mut self, frame: &Frame<'_>, now: Instant) {
        if self.backlog() == 0 {
            self.clock.drained = now;
        }
        self.tx.push(frame);
        self.look_soon(now);
    }

    /// Something began: its deadlines are looked at soon.
    fn look_soon(&mut self, now: Instant) {
        self.clock.next_tick = self.clock.next_tick.min(now + TICK);
    }

    /// Nothing is kept of transfers that have ended, on either side's account.
    #[cfg(any(test, fuzzing))]
    fn is_idle(&self) -> bool {
        let empty = self.incoming.is_empty() && self.outgoing.is_empty() && !self.outgoing.waiting();
        let matched = self.matching.waiting() == 0 && self.matching.messages() == 0;
        empty
            && matched
            && self.direct.is_empty()
            && !self.deadlines.any()
            && self.peer.is_idle()
            && self.transfers.segments() == 0
    }

    /// Whether every account agrees with what is really there, and every stream has a deadline.
    #[cfg(any(test, fuzzing))]
    fn audit(&self) -> std::result::Result<(), String> {
        if self.dead.is_some() {
            return Ok(());
        }
        let theirs = |keys: Vec<(Key, usize)>| keys.into_iter().filter(|(key, _)| !key.mine).collect::<Vec<_>>();
        let (incoming, outgoing) = (self.incoming.keys(), self.outgoing.keys());
        if let Some((key, _)) = incoming.iter().chain(&outgoing).find(|(key, _)| !self.deadlines.has(*key)) {
            return Err(format!("{key:?} has no deadline"));
        }
        let streams: Vec<_> = theirs(incoming).into_iter().chain(theirs(outgoing)).collect();
        let messages = self.matching.messages() + self.direct.landings();
        let (transfers, segments) = (messages + streams.len(), streams.iter().map(|(_, n)| n).sum::<usize>());
        if self.peer.load() != (transfers, segments) {
            return Err(format!("the peer's account says {:?}, of {:?}", self.peer.load(), (transfers, segments)));
        }
        self.incoming.audit()
    }

    // ---- starting transfers ----

    /// Whether one more transfer of this many segments between these places may start. The only step that can fail and leave the
    /// connection alive.
    ///
    /// # Errors
    /// Why the connection has ended; `Resource` at a limit; `Unsupported` for places that no channel connects.
    pub(crate) fn admit(&self, segments: usize, pairs: &[(Place, Place)], channels: &Channels) -> Result<()> {
        self.alive()?;
        limits::admit(self.transfers.in_flight(), self.transfers.segments(), segments)?;
        match pairs.iter().find(|&&(local, peer)| channels.route(local, peer).is_none()) {
            Some((local, peer)) => Err(err!(Unsupported, "no channel carries memory of {local:?} here and {peer:?} at the peer")),
            None => Ok(()),
        }
    }

    /// Starts a write in chunks, or inside a frame. An error ends the connection.
    fn start_write(&mut self, id: u64, request: Request, hold: Hold, channels: &mut Channels, now: Instant) -> Result<()> {
        let Request { segments, remote, remote_regions, total, .. } = request;
        let key = Key { id, mine: true };
        self.transfers.goes_in_chunks(id, Kind::Write);
        self.deadlines.start(key, Way::Out, total, now);
        let mut gathered = std::mem::take(&mut self.gathered);
        if let Some(data) = self.load_inline(&segments, total, channels, &mut gathered)? {
            self.counts.inline_sent_bytes += total;
            self.push(&Frame::Write { id, regions: remote_regions, segments: remote, inline: Some(data) }, now);
            self.transfers.moved(id, total);
            self.gathered = gathered;
            drop(hold);
            return Ok(());
        }
        self.gathered = gathered;
        self.announce(Frame::Write { id, regions: remote_regions, segments: remote, inline: None }, now);
        self.outgoing.start(key, segments, hold, channels)
    }

    /// Starts a read in chunks, or inside a frame.
    fn start_read(&mut self, id: u64, request: Request, hold: Hold, now: Instant) {
        let Request { segments, remote, remote_regions, total, .. } = request;
        let key = Key { id, mine: true };
        self.transfers.goes_in_chunks(id, Kind::Read);
        self.deadlines.start(key, Way::In, total, now);
        self.announce(Frame::Read { id, regions: remote_regions, segments: remote }, now);
        self.incoming.start(key, segments, hold, Ending::Read);
    }

    /// Records a transfer that fails before anything moves.
    pub(crate) fn start_failed(&mut self, error: Error) -> u64 {
        let id = self.transfers.start(Kind::Write, 0, 0);
        self.transfers.finish(id, Err(error));
        // Whoever starts it says so.
        self.transfers.tell(id);
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
        let id = self.transfers.start(Kind::Send { pulled: false }, total, segments.len());
        let hold = Hold::new(uses);
        let from = Machine::sends_from(&segments, &hold, channels);
        self.matching.send(id, segments, hold, from.is_some(), now);
        self.push(&Frame::Message { id, len: total, from }, now);
        id
    }

    /// Starts a two-sided receive that was admitted.
    pub(crate) fn start_receive(&mut self, segment: Segment, region: RegionUse, channels: &mut Channels, now: Instant) -> u64 {
        let id = self.transfers.start(Kind::Receive, 0, 1);
        self.matching.receive(id, segment, Hold::new(vec![region]), now);
        self.look_soon(now);
        self.match_receives(channels, now);
        id
    }

    /// Queues a notification.
    pub(crate) fn notify(&mut self, name: &[u8], message: &[u8], now: Instant) {
        self.counts.notifications_sent += 1;
        self.push(&Frame::Notify { name, message }, now);
    }

    /// Queues the announcement of a transfer and keeps the memory of its list.
    fn announce(&mut self, frame: Frame<'static>, now: Instant) {
        self.push(&frame, now);
        if let Frame::Write { segments, .. } | Frame::Read { segments, .. } = frame {
            self.segment_pool.give_wire(segments);
        }
    }

    /// The bytes of a transfer that is small enough to travel inside a control frame: where they lie, if that is one
    /// piece of host memory, else in `gathered`.
    fn load_inline<'a>(
        &self,
        segments: &'a [Segment],
        total: u64,
        channels: &mut Channels,
        gathered: &'a mut Vec<u8>,
    ) -> Result<Option<&'a [u8]>> {
        if total > self.setting.eager_bytes.min(MAX_INLINE) as u64 {
            return Ok(None);
        }
        if total > channels.inline_bytes(segments) as u64 {
            return Ok(None);
        }
        let device = segments.iter().any(|s| s.place.is_device());
        if let ([only], false) = (segments, device) {
            // SAFETY: the segment lies in a registered region that the caller's uses hold.
            return Ok(Some(unsafe { std::slice::from_raw_parts(only.addr as *const u8, only.len as usize) }));
        }
        gathered.clear();
        gathered.reserve(total as usize);
        let mut stream = Walk::new(segments.to_vec());
        while let Some(chunk) = stream.take(MAX_INLINE) {
            // SAFETY: the parts lie in registered regions that the caller's uses hold.
            unsafe { channels.fetch(&chunk, gathered) }?;
        }
        Ok(Some(gathered))
    }

    // ---- progress ----

    /// Takes what happened on the channels. `true` when something did.
    pub(crate) fn drive_channels(&mut self, channels: &mut Channels, now: Instant) -> Result<bool> {
        let mut events = std::mem::take(&mut self.events);
        let any = channels.progress(now, &mut events)?;
        for event in events.drain(..) {
            match event {
                Event::Sent(key, len) => self.chunk_sent(key, len, now)?,
                Event::Received(key, len) => self.chunk_received(key, len, now)?,
                Event::Moved(key, len) => self.direct_moved(key, len, now),
                Event::Ended(key, done) => self.direct_ended(key, done),
                Event::Answered => self.direct_answered(channels, now)?,
                Event::Denied(error) => self.direct_denied(&error, now),
            }
        }
        self.events = events;
        // Fewer than before never fails.
        let _ = self.peer.chunks(self.incoming.expected());
        if limits::must_report(self.incoming.chunks() - self.reported_chunks) {
            self.ping(channels.totals().received, now);
        }
        Ok(any)
    }

    /// Hands at most `limit` chunks to channels with room.
    pub(crate) fn schedule(&mut self, channels: &mut Channels, limit: usize, now: Instant) -> Result<Scheduled> {
        if !self.outgoing.waiting() {
            return Ok(Scheduled::Blocked);
        }
        let (before, backlog) = (self.tx.pending(), self.backlog());
        let scheduled = self.outgoing.schedule(channels, &mut self.tx, limit, now)?;
        if self.tx.pending() > before && backlog == 0 {
            self.clock.drained = now;
        }
        channels.flush()?;
        Ok(scheduled)
    }

    fn chunk_sent(&mut self, key: Key, len: u64, now: Instant) -> Result<()> {
        self.deadlines.moved(key, len, now);
        if key.mine {
            self.transfers.moved(key.id, len);
        }
        let segments = self.outgoing.segments(key);
        if let Gone::Last(list) = self.outgoing.gone(key, len)? {
            self.segment_pool.give_list(list);
            if key.mine {
                self.transfers.source_free(key.id);
                if self.transfers.kind(key.id).is_none() {
                    self.deadlines.end(key);
                }
            } else {
                self.peer.ended(segments);
                self.deadlines.end(key);
            }
        }
        Ok(())
    }

    fn chunk_received(&mut self, key: Key, len: u64, now: Instant) -> Result<()> {
        self.deadlines.moved(key, len, now);
        if let Some(receive) = self.incoming.receive_of(key) {
            self.transfers.moved(receive, len);
        } else if key.mine {
            self.transfers.moved(key.id, len);
        }
        if let Some(ended) = self.incoming.arrived(key, len)? {
            self.stream_ended(key, ended, now);
        }
        Ok(())
    }

    /// Tells the peer how much has arrived.
    fn ping(&mut self, received: u64, now: Instant) {
        (self.reported, self.reported_chunks) = (received, self.incoming.chunks());
        self.clock.report = now;
        self.push(&Frame::Ping { received, chunks: self.reported_chunks }, now);
    }

    /// How often the peer hears of this side.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.setting.heartbeat
    }

    /// How long a transfer may stand still.
    pub(crate) fn patience(&self) -> Duration {
        self.setting.transfer_timeout
    }

    /// Everything of an incoming stream is in place, or drained.
    fn stream_ended(&mut self, key: Key, ended: Ended, now: Instant) {
        let Ended { ending, list, segments } = ended;
        self.segment_pool.give_list(list);
        self.deadlines.end(key);
        match ending {
            Ending::Read => self.transfers.finish(key.id, Ok(())),
            Ending::Refused(true) => self.peer.ended(0),
            Ending::Refused(false) => self.peer.ended_without_room(),
            Ending::Write => {
                self.peer.ended(segments);
                self.push(&Frame::Done { id: key.id, status: UCCL_OK, text: "" }, now);
            }
            Ending::Receive(id) => {
                self.peer.ended(0);
                self.transfers.finish(id, Ok(()));
                self.push(&Frame::Done { id: key.id, status: UCCL_OK, text: "" }, now);
            }
        }
    }

    // ---- time ----

    /// So many bytes are kept of frames that have not come as a whole.
    ///
    /// # Errors
    /// `Resource` when that is more memory than peers may take.
    pub(crate) fn keeps(&mut self, bytes: usize) -> Result<()> {
        self.peer.arriving(bytes)
    }

    /// Bytes came in on the control stream; `arriving`: size of the frame they belong to.
    pub(crate) fn on_received(&mut self, bytes: usize, arriving: usize, now: Instant) {
        self.clock.rx = now;
        self.counts.control_received_bytes += bytes as u64;
        // Answers wait behind a large frame that is on its way, and behind all that comes while the peer has a backlog: then its
        // heartbeats stay away.
        if arriving > MAX_INLINE || now.saturating_duration_since(self.clock.ping) > self.setting.peer_timeout / 2 {
            self.deadlines.waited(bytes as u64, now);
        }
    }

    /// The control socket took bytes; `leaving`: bytes taken from the queue that it has not.
    pub(crate) fn on_sent(&mut self, bytes: usize, leaving: usize, now: Instant) {
        self.leaving = leaving;
        // Fewer than before never fails.
        let _ = self.peer.answers(self.tx.answers());
        self.counts.control_sent_bytes += bytes as u64;
        self.clock.trickled += bytes as u64;
        // A peer that reads byte by byte keeps nobody who waits for room.
        if bytes > 0 && (self.backlog() == 0 || self.clock.trickled >= deadlines::FLOOR) {
            (self.clock.drained, self.clock.trickled) = (now, 0);
        }
        if self.backlog() > 0 {
            self.deadlines.waited(bytes as u64, now);
            self.look_soon(now);
        }
    }

    /// When [`Machine::tick`] wants to be called next.
    pub(crate) fn next_tick(&self) -> Instant {
        self.clock.next_tick
    }

    /// Heartbeats and deadlines. An error means that the connection must end.
    pub(crate) fn tick(&mut self, channels: &mut Channels, now: Instant) -> Result<()> {
        let silent = now.saturating_duration_since(self.clock.rx);
        if silent > self.setting.peer_timeout {
            bail!(RemoteDisconnect, "the peer has been silent for {silent:.1?}");
        }
        let stuck = now.saturating_duration_since(self.clock.drained);
        if self.backlog() > 0 && stuck > self.setting.transfer_timeout {
            let read = self.clock.trickled;
            bail!(TimedOut, "the peer has read {read} bytes of the control stream in {stuck:.1?}; {} bytes wait", self.backlog());
        }
        // While nothing must move, a channel that fails says so by itself where its plugin can.
        let due = now.saturating_duration_since(self.clock.network) >= LOOK.min(self.setting.transfer_timeout / 8);
        if due && (self.deadlines.any() || !self.setting.doorbells) {
            self.note_network(channels, now)?;
            if let Some(why) = channels.dead_nic(self.setting.transfer_timeout, now) {
                bail!(TimedOut, "{why}");
            }
        }
        if let Some(overdue) = self.deadlines.overdue(self.setting.transfer_timeout, now) {
            return Err(self.describe(overdue, channels, now));
        }
        self.expire_matches(now);
        limits::withdrawn(self.matching.withdrawn())?;
        let active = self.deadlines.any() || self.backlog() > 0 || self.matching.waiting() > 0;
        // A heartbeat needs another look only if it stays in the queue, see [`Machine::on_sent`].
        self.report(channels, now);
        self.clock.next_tick = if active {
            now + TICK
        } else {
            // Whoever drives learns of what begins meanwhile at this time at the latest.
            let look = now + self.setting.transfer_timeout.min(self.setting.match_timeout) / 3;
            let heartbeat = self.clock.report + self.setting.heartbeat;
            heartbeat.min(self.clock.rx + self.setting.peer_timeout).min(look).max(now + TICK)
        };
        Ok(())
    }

    /// Counts what the network has moved since the last look. An error when a channel has failed.
    pub(crate) fn note_network(&mut self, channels: &mut Channels, now: Instant) -> Result<()> {
        let (taken, brought) = channels.look(now)?;
        self.deadlines.flowed(Way::Out, taken.saturating_sub(self.network.0), now);
        self.deadlines.flowed(Way::In, brought.saturating_sub(self.network.1), now);
        self.network = (taken.max(self.network.0), brought.max(self.network.1));
        self.clock.network = now;
        Ok(())
    }

    /// A heartbeat, whatever else is said, and the progress of incoming data. None where a backlog waits.
    fn report(&mut self, channels: &Channels, now: Instant) {
        let received = channels.totals().received;
        let news = received > self.reported
            && now.saturating_duration_since(self.clock.report) >= REPORT.min(self.setting.transfer_timeout / 4);
        let due = if std::mem::take(&mut self.clock.echo) { self.setting.heartbeat / 2 } else { self.setting.heartbeat };
        let quiet = now.saturating_duration_since(self.clock.report) >= due;
        if self.backlog() == 0 && (news || quiet) {
            self.ping(received, now);
        }
    }

    /// Which transfer stands still, in which direction, and on which channels.
    fn describe(&self, overdue: Overdue, channels: &Channels, now: Instant) -> Error {
        let Overdue { key, way, still, others_moved } = overdue;
        let whose = if key.mine { "transfer" } else { "the peer's transfer" };
        let direction = match way {
            Way::Out => "to",
            Way::In => "from",
        };
        let rest = if others_moved { ", while others went on" } else { "" };
        let on = channels.describe_busy(way, now);
        let on = if on.is_empty() { "nothing is under way on the channels".to_owned() } else { format!("under way: {on}") };
        err!(TimedOut, "{whose} {} {direction} the peer has not moved for {still:.1?}{rest}; {on}", key.id)
    }

    fn expire_matches(&mut self, now: Instant) {
        let timeout = self.setting.match_timeout;
        for id in self.matching.expire_sends(timeout, now) {
            self.push(&Frame::Withdraw { id, status: ErrorKind::TimedOut.code() }, now);
            self.transfers.finish(id, Err(err!(TimedOut, "no receive was posted for message {id} within {timeout:?}")));
        }
        for id in self.matching.expire_receives(timeout, now) {
            self.transfers.finish(id, Err(err!(TimedOut, "no message came for receive {id} within {timeout:?}")));
        }
    }

    // ---- statistics ----

    /// What the machine counts.
    pub(crate) fn counts(&self) -> Totals {
        let (transfers_started, transfers_completed, transfers_failed) = self.transfers.outcomes();
        Totals { transfers_started, transfers_completed, transfers_failed, ..self.counts }
    }

    /// Names the peer.
    pub(crate) fn peer(&self) -> &str {
        &self.setting.peer
    }

    /// Since when nothing was heard of the peer, and how long that may last.
    pub(crate) fn silence(&self, now: Instant) -> (Duration, Duration) {
        (now.saturating_duration_since(self.clock.rx), self.setting.peer_timeout)
    }

    /// A transfer that has not moved for half of its timeout, in words.
    pub(crate) fn standstill(&mut self, channels: &Channels, now: Instant) -> Option<String> {
        let overdue = self.deadlines.overdue(self.setting.transfer_timeout / 2, now)?;
        let limit = self.setting.transfer_timeout;
        Some(format!("{}; the connection ends after {limit:.1?}", self.describe(overdue, channels, now).to_str()))
    }

    // ---- the end ----

    /// Says that this side ends the connection, and why.
    pub(crate) fn say_bye(&mut self, error: Option<&Error>, now: Instant) {
        let (status, text) = error.map_or((UCCL_OK, String::new()), |e| (e.code(), e.to_string()));
        self.push(&Frame::Bye { status, text: &text }, now);
    }

    /// Ends the connection: closes the channels first, so that nothing touches memory any more, then ends every transfer with `error`.
    pub(crate) fn fail(&mut self, error: Error, channels: &mut Channels) {
        if self.dead.is_some() {
            return;
        }
        channels.close();
        self.outgoing.clear();
        self.incoming.clear();
        self.matching.clear();
        self.direct.clear();
        self.deadlines.clear();
        // What the peer took is free for others, whenever the application closes its handle.
        self.peer = PeerLoad::new(Share::new(&self.setting.account));
        self.transfers.fail_all(&error);
        self.dead = Some(error);
    }

    /// It has ended, whatever of it is in order: only for a defect that even [`Machine::fail`] met.
    pub(crate) fn give_up(&mut self, error: Error) {
        self.dead.get_or_insert(error);
    }
}
