//! The state of a connection's protocol: parts that each own their fields, and the steps that several parts take together. Knows
//! nothing of who asks for a step: the application, the peer ([`super::peer`]), or the time.

use super::carriers::Carriers;
use super::deadlines::{Deadlines, Overdue};
use super::eager::Eager;
use super::incoming::{Ended, Ending, Incoming};
use super::limits::PeerLoad;
use super::listed::Pending;
use super::liveness::Liveness;
use super::losses::{cause, for_peer, Back, Closed, Losses};
use super::matching::Matching;
use super::outgoing::{Left, Outgoing, Undelivered};
use super::queue::ControlQueue;
use super::transfers::Transfers;
use crate::budget::{Account, Share};
use crate::channel::router::Channels;
use crate::direct::Way;
use crate::logging::Limiter;
use crate::notify::Inbox;
use crate::registry::Registry;
use crate::segment_pool::SegmentPool;
use crate::stats::Totals;
use crate::status::{err, Error, ErrorKind, Result, UCCL_OK};
use crate::types::Key;
use crate::wire::frame::Frame;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Log lines a second that the peer of one connection may cause.
const PEER_LINES: u32 = 5;

/// What both engines agreed on, and what the machine needs from its engine.
pub(crate) struct Setting {
    pub registry: Arc<Registry>,
    pub inbox: Inbox,
    /// The budget of peers at this address, and the log lines that all peers of the engine may cause.
    pub account: Arc<Account>,
    pub lines: Arc<Limiter>,
    /// The largest eager transfer, in bytes.
    pub eager_bytes: usize,
    /// Names the peer in errors.
    pub peer: String,
    pub transfer_timeout: Duration,
    /// How long a NIC may bring nothing that is due while the peer lives.
    pub nic_timeout: Duration,
    /// Silence after which the peer is lost; the smaller of both engines' values sets the heartbeat.
    pub peer_timeout: Duration,
    pub heartbeat: Duration,
    pub match_timeout: Duration,
    /// The plugin rings a doorbell when a channel fails.
    pub doorbells: bool,
}

/// The parts of a machine.
pub(super) struct State {
    pub setting: Setting,
    pub queue: ControlQueue,
    pub liveness: Liveness,
    pub transfers: Transfers,
    pub outgoing: Outgoing,
    pub incoming: Incoming,
    pub losses: Losses,
    pub matching: Matching,
    /// Direct transfers.
    pub direct: Pending,
    pub deadlines: Deadlines,
    /// What the peer has in flight.
    pub load: PeerLoad,
    /// Segment lists of ended transfers, to be used again.
    pub segment_pool: SegmentPool,
    pub eager: Eager,
    pub log: Limiter,
    pub counts: Totals,
}

impl State {
    pub(super) fn new(setting: Setting, now: Instant) -> State {
        State {
            queue: ControlQueue::new(now),
            liveness: Liveness::new(setting.peer_timeout, setting.heartbeat, now),
            transfers: Transfers::default(),
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            losses: Losses::default(),
            matching: Matching::default(),
            direct: Pending::default(),
            deadlines: Deadlines::new(now),
            load: PeerLoad::new(Share::new(&setting.account)),
            segment_pool: SegmentPool::default(),
            eager: Eager::new(setting.eager_bytes),
            log: Limiter::within(&setting.lines, PEER_LINES),
            counts: Totals::default(),
            setting,
        }
    }

    /// How often this engine must send something at least: while data is due, the peer distinguishes a silent NIC from a silent peer by that,
    /// and both kernels have something to acknowledge all the time.
    fn must_hear(&self) -> Duration {
        match self.deadlines.any() {
            true => self.setting.heartbeat.min(self.setting.nic_timeout / 4),
            false => self.setting.heartbeat,
        }
    }

    /// Queues a frame.
    pub(super) fn push(&mut self, frame: &Frame<'_>, now: Instant) {
        if self.incoming.owes_report() {
            // It goes along.
            self.report_chunks(now);
        }
        self.queue.push(frame, now);
        self.liveness.look_soon(now);
    }

    /// Whether anything waits for the network or the peer.
    pub(super) fn busy(&self) -> bool {
        let streams = !self.incoming.is_empty() || !self.outgoing.is_empty();
        streams || self.transfers.in_flight() > 0
    }

    /// Whether a transfer of this connection uses a region of this engine.
    pub(super) fn uses_region(&self, id: u64) -> bool {
        let direct = self.direct.uses_region(id);
        direct || self.outgoing.uses_region(id) || self.incoming.uses_region(id) || self.matching.uses_region(id)
    }

    /// Whether nothing is kept of ended transfers of either engine.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_idle(&self) -> bool {
        let empty = self.incoming.is_empty() && self.outgoing.is_empty() && !self.outgoing.waiting();
        let matched = self.matching.waiting() == 0 && self.matching.messages() == 0;
        empty
            && matched
            && self.direct.is_empty()
            && !self.deadlines.any()
            && self.load.is_idle()
            && self.transfers.segments() == 0
    }

    /// Whether every count agrees with what it counts, and every stream has a deadline.
    #[cfg(any(test, fuzzing))]
    pub(super) fn audit(&self) -> std::result::Result<(), String> {
        let theirs = |keys: Vec<(Key, usize)>| keys.into_iter().filter(|(key, _)| !key.mine).collect::<Vec<_>>();
        let (incoming, outgoing) = (self.incoming.keys(), self.outgoing.keys());
        if let Some((key, _)) = incoming.iter().chain(&outgoing).find(|(key, _)| !self.deadlines.has(*key)) {
            return Err(format!("{key:?} has no deadline"));
        }
        let streams: Vec<_> = theirs(incoming).into_iter().chain(theirs(outgoing)).collect();
        let messages = self.matching.messages() + self.direct.landings();
        let (transfers, segments) = (messages + streams.len(), streams.iter().map(|(_, n)| n).sum::<usize>());
        if self.load.load() != (transfers, segments) {
            return Err(format!("the peer's load is {:?}, expected {:?}", self.load.load(), (transfers, segments)));
        }
        for (key, open) in self.outgoing.open() {
            if self.deadlines.left(key).is_some_and(|left| left < open) {
                return Err(format!("{key:?} has {open} bytes to go, and its deadline counts fewer"));
            }
            match self.transfers.progress(key.id).filter(|_| key.mine) {
                Some((moved, total)) if moved + open > total => {
                    return Err(format!("{key:?} has moved {moved} of {total} bytes with {open} to go"));
                }
                _ => {}
            }
        }
        self.incoming.audit()
    }

    /// Queues the announcement of a transfer and keeps its list for the next one.
    pub(super) fn announce(&mut self, frame: Frame<'static>, now: Instant) {
        self.push(&frame, now);
        if let Frame::Write { segments, .. } | Frame::Read { segments, .. } = frame {
            self.segment_pool.give_wire(segments);
        }
    }

    /// Bytes of a stream of this engine are sent.
    fn moved(&mut self, key: Key, len: u64, by: Carriers, now: Instant) {
        self.deadlines.moved(key, len, now);
        if key.mine {
            self.transfers.moved(key.id, len, by);
        }
    }

    pub(super) fn chunk_sent(&mut self, channel: u16, key: Key, len: u64, now: Instant) -> Result<()> {
        self.moved(key, len, Carriers::channel(channel), now);
        if let Some(left) = self.outgoing.sent(channel, key, len)? {
            self.stream_left(left);
        }
        Ok(())
    }

    /// No channel reads from a stream any more, and nothing of it has to be sent again.
    fn stream_left(&mut self, Left { key, list, segments }: Left) {
        self.segment_pool.give_list(list);
        if key.mine {
            self.transfers.source_free(key.id);
            if self.transfers.kind(key.id).is_none() {
                self.deadlines.end(key);
            }
        } else {
            self.load.ended(segments);
            self.deadlines.end(key);
        }
    }

    /// The peer says that all of a stream of this engine is in place. Returns whether a channel still reads from it.
    pub(super) fn stream_done(&mut self, key: Key) -> bool {
        if let Some(left) = self.outgoing.done(key) {
            self.segment_pool.give_list(left.list);
        }
        self.outgoing.unsent(key).is_some()
    }

    pub(super) fn chunk_received(&mut self, channel: u16, key: Key, len: u64, now: Instant) -> Result<()> {
        self.deadlines.moved(key, len, now);
        if let Some(receive) = self.incoming.receive_of(key) {
            self.transfers.moved(receive, len, Carriers::channel(channel));
        } else if key.mine {
            self.transfers.moved(key.id, len, Carriers::channel(channel));
        }
        if let Some(ended) = self.incoming.arrived(channel, key, len)? {
            self.stream_ended(key, ended, now);
        }
        Ok(())
    }

    /// The peer reports how many chunks of a channel have arrived.
    pub(super) fn chunks_arrived(&mut self, channel: u16, chunks: u64) -> Result<()> {
        let mut all = Vec::new();
        self.outgoing.arrived(channel, chunks, &mut all)?;
        all.into_iter().for_each(|left| self.stream_left(left));
        Ok(())
    }

    /// Reports to the peer how many chunks have arrived on each channel.
    pub(super) fn report_chunks(&mut self, now: Instant) {
        let State { incoming, queue, .. } = self;
        for (channel, chunks) in incoming.report() {
            queue.push(&Frame::Arrived { channel, chunks }, now);
        }
    }

    /// This engine has closed a channel that it has lost: nothing touches memory for it.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn channel_closed(&mut self, channel: u16, why: Error, channels: &mut Channels, now: Instant) -> Result<()> {
        let mut all = Vec::new();
        let (unsent, announced) = self.outgoing.close(channel, &mut all);
        all.into_iter().for_each(|left| self.stream_left(left));
        let (chunks, missing) = match self.losses.expects(channel) {
            true => self.incoming.close(channel),
            // What the peer announces there belongs to an earlier end.
            false => (0, 0),
        };
        channels.lose(unsent + missing);
        self.losses.ours(channel, chunks, announced || chunks > 0 || missing > 0, why.clone());
        self.push(&Frame::Lost { channel, chunks, text: for_peer(&why) }, now);
        self.recover(channel, channels, now)
    }

    /// Once both engines have closed a channel, what it did not deliver is sent again on others.
    ///
    /// # Errors
    /// When the connection must end.
    pub(super) fn recover(&mut self, channel: u16, channels: &Channels, now: Instant) -> Result<()> {
        let Some(Closed { chunks, said }) = self.losses.recover(channel, now) else { return Ok(()) };
        let lost = self.outgoing.lose(channel, chunks, channels)?;
        let Undelivered { left, cancelled, unmoved, moved, chunks, bytes } = lost;
        moved.into_iter().for_each(|(key, len)| self.moved(key, len, Carriers::channel(channel), now));
        for (key, len) in unmoved {
            self.deadlines.unmoved(key, len);
            if key.mine {
                self.transfers.unmoved(key.id, len);
            }
        }
        left.into_iter().for_each(|left| self.stream_left(left));
        for key in cancelled {
            self.push(&Frame::Cancel { id: key.id }, now);
        }
        for (key, ended) in self.incoming.lose(channel) {
            self.stream_ended(key, ended, now);
        }
        self.liveness.look_soon(now);
        self.counts.resent_chunks += chunks as u64;
        let Some((ours, theirs)) = said else { return Ok(()) };
        self.deadlines.restart(now);
        self.counts.lost_channels += 1;
        let (peer, why) = (&self.setting.peer, cause(&ours, &theirs));
        let open = self.open_nics(channels);
        let goes = match open.is_empty() {
            true => "wait for a channel to come back".to_owned(),
            false => format!("go over {}", open.join(", ")),
        };
        let line = format!("{peer}: channel {channel} is lost: {why}; {chunks} chunks of {bytes} bytes {goes}");
        // A NIC has a line, and its other channels none: a limit of lines leaves no NIC unnamed.
        match self.losses.names(&channels.nic(channel), now) {
            true => self.setting.lines.log(log::Level::Warn, now, format_args!("{line}")),
            false => log::debug!("{line}"),
        }
        Ok(())
    }

    /// The NICs with an open channel.
    fn open_nics(&self, channels: &Channels) -> Vec<String> {
        let closed: Vec<u16> = self.losses.closed().map(|(channel, _)| channel).collect();
        let open = (0..channels.count() as u16).filter(|channel| !closed.contains(channel));
        let mut nics: Vec<String> = open.map(|channel| channels.nic(channel)).collect();
        nics.sort_unstable();
        nics.dedup();
        nics
    }

    /// A channel that was lost is open at both engines again.
    pub(super) fn restored(&mut self, channel: u16, channels: &mut Channels, now: Instant) {
        channels.open_channel(channel);
        self.counts.restored_channels += 1;
        self.liveness.look_soon(now);
        let Some(Back { channels: back, after }) = self.losses.take_back() else { return };
        let names: Vec<String> = back.iter().map(|&channel| format!("{channel} on {}", channels.nic(channel))).collect();
        self.setting.lines.log(
            log::Level::Info,
            now,
            format_args!("{}: lost channels are back after {after:.1?}: {}", self.setting.peer, names.join(", ")),
        );
    }

    /// Reports to the peer how much has arrived.
    pub(super) fn ping(&mut self, received: u64, now: Instant) {
        self.report_chunks(now);
        self.liveness.on_ping_sent(received, now);
        self.push(&Frame::Ping { received }, now);
    }

    /// Everything of an incoming stream is in place or drained.
    pub(super) fn stream_ended(&mut self, key: Key, ended: Ended, now: Instant) {
        let Ended { ending, list, segments } = ended;
        self.segment_pool.give_list(list);
        self.deadlines.end(key);
        match ending {
            Ending::Read => {
                self.transfers.finish(key.id, Ok(()));
                self.liveness.look_soon(now);
            }
            Ending::Refused(true) => self.load.ended(0),
            Ending::Refused(false) => self.load.ended_without_room(),
            Ending::Write => {
                self.load.ended(segments);
                self.push(&Frame::Done { id: key.id, status: UCCL_OK, text: "" }, now);
            }
            Ending::Receive(id) => {
                self.load.ended(0);
                self.transfers.finish(id, Ok(()));
                self.push(&Frame::Done { id: key.id, status: UCCL_OK, text: "" }, now);
            }
        }
    }

    /// Sends a heartbeat if one is due and no backlog waits.
    pub(super) fn report(&mut self, channels: &Channels, now: Instant) {
        let received = channels.totals().received;
        if self.liveness.must_ping(received, self.must_hear(), now) && self.queue.backlog() == 0 {
            self.ping(received, now);
        }
    }

    /// Describes a transfer that stalls, with its direction and channels.
    pub(super) fn describe(&self, overdue: Overdue, channels: &Channels, now: Instant) -> Error {
        let Overdue { key, way, still, others_moved } = overdue;
        let whose = if key.mine { "transfer" } else { "the peer's transfer" };
        let direction = match way {
            Way::Out => "to",
            Way::In => "from",
        };
        let rest = if others_moved { ", while others moved" } else { "" };
        let (busy, control) = (channels.describe_busy(way, now), channels.describe_control(way));
        let on = match (busy.is_empty(), control.is_empty()) {
            (true, true) => "nothing is in flight on the channels".to_owned(),
            (true, false) => control,
            (false, true) => format!("in flight: {busy}"),
            (false, false) => format!("{control}; in flight: {busy}"),
        };
        let (lost, faults) = (self.describe_lost(channels), channels.faults());
        err!(TimedOut, "{whose} {} {direction} the peer has not moved for {still:.1?}{rest}; {on}{lost}{faults}", key.id)
    }

    /// Names the NICs whose channels are lost, each with a cause, for the end of an error text.
    pub(super) fn describe_lost(&self, channels: &Channels) -> String {
        let mut nics: Vec<(String, usize, String)> = Vec::new();
        for (channel, why) in self.losses.closed() {
            let nic = channels.nic(channel);
            match nics.iter_mut().find(|(known, ..)| *known == nic) {
                Some((_, count, _)) => *count += 1,
                None => nics.push((nic, 1, why)),
            }
        }
        nics.iter().map(|(nic, count, why)| format!("; {count} channels on {nic} are lost and not back: {why}")).collect()
    }

    pub(super) fn expire_matches(&mut self, now: Instant) {
        let timeout = self.setting.match_timeout;
        for id in self.matching.expire_sends(timeout, now) {
            self.push(&Frame::Withdraw { id, status: ErrorKind::TimedOut.code() }, now);
            self.transfers.finish(id, Err(err!(TimedOut, "the peer posted no receive for message {id} within {timeout:?}")));
        }
        for id in self.matching.expire_receives(timeout, now) {
            self.transfers.finish(id, Err(err!(TimedOut, "the peer sent no message for receive {id} within {timeout:?}")));
        }
    }

    /// Ends every transfer with `error` and releases all that they held. The channels are closed by then.
    pub(super) fn fail(&mut self, error: &Error) {
        self.outgoing.clear();
        self.incoming.clear();
        self.matching.clear();
        self.direct.clear();
        self.deadlines.clear();
        // The peer's share is free for others at once, even if the application closes its handle later.
        self.load = PeerLoad::new(Share::new(&self.setting.account));
        self.transfers.fail_all(error);
    }
}
