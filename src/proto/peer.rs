//! What each frame of the peer does: it announces transfers or chunks, gives a verdict, or carries an eager transfer. A frame
//! that does not fit the state of its transfer is a violation. Knows nothing of sockets.

use super::carriers::Carriers;
use super::direct::DirectTransfers;
use super::eager;
use super::incoming::Ending;
use super::limits::MAX_INLINE_BACKLOG;
use super::losses::{self, Next};
use super::matching::{Message, Pulled};
use super::state::State;
use super::transfers::Kind;
use crate::channel::router::Channels;
use crate::direct::Way;
use crate::region::{Hold, RegionUse};
use crate::status::{bail, err, Error, ErrorKind, Result, StatusCode, UCCL_OK};
use crate::types::{Key, Landing, Place, RemoteAccess, Segment};
use crate::wire::frame::{Frame, Grant, WireRegion, WireSegment, WireSegments};
use std::time::Instant;

/// The largest message that a peer may announce; its receive is the real bound.
const MAX_MESSAGE: u64 = 1 << 50;

/// The machine while it takes frames of the peer.
pub(super) struct PeerFrames<'a> {
    pub state: &'a mut State,
    pub channels: &'a mut Channels,
    pub now: Instant,
}

impl PeerFrames<'_> {
    /// Takes a frame of the peer. An error means that the connection must end.
    pub(super) fn handle(&mut self, frame: Frame<'_>) -> Result<()> {
        // These start nothing, and a heartbeat alone must not wake the engine again.
        let begins = !matches!(frame, Frame::Ping { .. } | Frame::Arrived { .. } | Frame::Notify { .. });
        self.state.queue.tx.answering(true);
        let handled = self.take_frame(frame);
        self.state.queue.tx.answering(false);
        if begins {
            self.state.liveness.look_soon(self.now);
        }
        handled?;
        self.state.load.answers(self.state.queue.tx.answers())
    }

    fn take_frame(&mut self, frame: Frame<'_>) -> Result<()> {
        match &frame {
            Frame::Write { .. } | Frame::Read { .. } | Frame::Message { .. } => self.state.counts.peer_transfers += 1,
            Frame::Notify { .. } => self.state.counts.notifications_received += 1,
            _ => {}
        }
        match frame {
            Frame::Write { id, regions, segments, eager } => self.on_write(id, &regions, &segments, eager),
            Frame::Read { id, regions, segments } => self.on_read(id, &regions, &segments),
            Frame::ReadInline { id, data } => self.on_read_inline(id, data),
            Frame::Chunks { id, by_initiator, offset, grants } => {
                self.on_chunks(Key { id, mine: !by_initiator }, offset, &grants)
            }
            Frame::Done { id, status, text } => self.on_done(id, status, text),
            Frame::Message { id, len, from } => self.on_message(Message { id, len, from }),
            Frame::Pull { id, status, receiver, landing } => self.on_pull(id, status, receiver, landing),
            Frame::Withdraw { id, status } => self.on_withdraw(id, status),
            Frame::Cancel { id } => self.on_cancel(id),
            Frame::Notify { name, message } => self.state.setting.inbox.push(name, message),
            Frame::Ping { received } => self.on_ping(received),
            Frame::Arrived { channel, chunks } => self.on_arrived(channel, chunks),
            Frame::Lost { channel, chunks, text } => self.on_lost(channel, chunks, text),
            Frame::Up { channel, generation } => self.on_up(channel, generation),
            Frame::Bye { status, text } => Err(farewell(status, text)),
        }
    }

    /// Resolves the peer's segments to memory of this engine. Every one is checked before anything moves.
    fn resolve(
        &mut self,
        regions: &[WireRegion],
        segments: &WireSegments<'_>,
        access: RemoteAccess,
    ) -> Result<(Vec<Segment>, Vec<RegionUse>)> {
        let uses = regions.iter().map(|r| self.state.setting.registry.remote(r.id, &r.token)).collect::<Result<Vec<_>>>()?;
        uses.iter().try_for_each(|region| region.check_access(access))?;
        let resolve = |s: WireSegment| {
            let Some(region) = uses.get(usize::from(s.region)) else {
                bail!(Protocol, "a segment names region {}, which the frame does not list", s.region)
            };
            region.check_remote(s.addr, u64::from(s.len))?;
            if region.place != s.owner {
                bail!(RemoteAccess, "region {} does not lie where the FIFO item says", region.span.id);
            }
            Ok(Segment { addr: s.addr, len: u64::from(s.len), region: s.region, place: region.place, peer: s.initiator })
        };
        let mut resolved = self.state.segment_pool.list(segments.count())?;
        for segment in segments.iter() {
            resolved.push(resolve(segment)?);
        }
        Ok((resolved, uses))
    }

    /// Refuses a transfer of the peer. The peer learns what it did wrong, and nothing else.
    fn refuse(&mut self, id: u64, error: &Error) {
        self.state.counts.refused += 1;
        self.state.log.log(
            log::Level::Warn,
            self.now,
            format_args!("{}: refused transfer {id} of the peer: {error}", self.state.setting.peer),
        );
        self.state.push(&Frame::Done { id, status: error.code(), text: &error.to_string() }, self.now);
    }

    fn on_write(&mut self, id: u64, regions: &[WireRegion], segments: &WireSegments<'_>, eager: Option<&[u8]>) -> Result<()> {
        let count = segments.count();
        let total: u64 = segments.iter().map(|s| u64::from(s.len)).sum();
        let room = self.state.load.begin(id, count)?;
        if total == 0 {
            bail!(Protocol, "write {id} is empty");
        }
        let key = Key { id, mine: false };
        if let Err(e) = room {
            if eager.is_none() {
                self.state.deadlines.start(key, Way::In, total, self.now);
                self.state.incoming.refuse(key, total, false);
            } else {
                self.state.load.ended_without_room();
            }
            self.refuse(id, &e);
            return Ok(());
        }
        let resolved = self.resolve(regions, segments, RemoteAccess::WRITE);
        match (resolved, eager) {
            (Ok((segments, uses)), Some(data)) => {
                self.state.counts.eager_received_bytes += total;
                eager::store(segments, data, self.channels)?;
                drop(uses);
                self.state.load.ended(count);
                self.state.push(&Frame::Done { id, status: UCCL_OK, text: "" }, self.now);
            }
            (Ok((segments, uses)), None) => {
                self.state.deadlines.start(key, Way::In, total, self.now);
                self.state.incoming.start(key, segments, Hold::new(uses), Ending::Write);
            }
            (Err(e), Some(_)) => {
                self.state.load.ended(count);
                self.refuse(id, &e);
            }
            (Err(e), None) => {
                self.state.load.without_list(count);
                self.state.deadlines.start(key, Way::In, total, self.now);
                self.state.incoming.refuse(key, total, true);
                self.refuse(id, &e);
            }
        }
        Ok(())
    }

    fn on_read(&mut self, id: u64, regions: &[WireRegion], segments: &WireSegments<'_>) -> Result<()> {
        let count = segments.count();
        if let Err(e) = self.state.load.begin(id, count)? {
            self.state.load.ended_without_room();
            self.refuse(id, &e);
            return Ok(());
        }
        let answered = self.resolve(regions, segments, RemoteAccess::READ).and_then(|(segments, uses)| {
            match self.channels.unreachable(segments.iter().map(|s| (s.place, s.peer))) {
                Some((here, there)) => Err(err!(Unsupported, "no channel connects {here:?} here with {there:?} at the peer")),
                None => Ok((segments, uses)),
            }
        });
        let (segments, uses) = match answered {
            Ok(resolved) => resolved,
            Err(e) => {
                self.state.load.ended(count);
                self.refuse(id, &e);
                return Ok(());
            }
        };
        let total: u64 = segments.iter().map(|s| s.len).sum();
        if total == 0 {
            bail!(Protocol, "read {id} is empty");
        }
        let hold = Hold::new(uses);
        if self.state.queue.tx.pending() < MAX_INLINE_BACKLOG {
            if let Some(data) = self.state.eager.load(&segments, total, self.channels)? {
                self.state.queue.push(&Frame::ReadInline { id, data }, self.now);
                self.state.liveness.look_soon(self.now);
                self.state.counts.eager_sent_bytes += total;
                self.state.load.ended(count);
                return Ok(());
            }
        }
        let key = Key { id, mine: false };
        self.state.deadlines.start(key, Way::Out, total, self.now);
        self.state.outgoing.start(key, segments, hold, self.channels)
    }

    fn on_read_inline(&mut self, id: u64, data: &[u8]) -> Result<()> {
        if self.state.transfers.kind(id) != Some(Kind::Read) {
            bail!(Protocol, "data of read {id}, which is not in flight");
        }
        let key = Key { id, mine: true };
        let (stream, hold, ..) = self.state.incoming.take_unbegun(key)?;
        self.state.counts.eager_received_bytes += data.len() as u64;
        eager::store(stream.into_list(), data, self.channels)?;
        drop(hold);
        self.state.deadlines.end(key);
        self.state.transfers.moved(id, data.len() as u64, Carriers::EAGER);
        self.state.transfers.finish(id, Ok(()));
        Ok(())
    }

    fn on_chunks(&mut self, key: Key, mut offset: u64, grants: &[Grant]) -> Result<()> {
        for &grant in grants {
            if !self.state.losses.may_announce(grant.channel) {
                bail!(Protocol, "a chunk on channel {}, which is not open at both engines", grant.channel);
            }
            let delivers = self.state.losses.delivers(grant.channel);
            self.state.incoming.announce(key, offset, grant, delivers, self.channels)?;
            offset = offset.saturating_add(u64::from(grant.len));
        }
        self.state.load.chunks(self.state.incoming.outstanding())
    }

    /// The peer's verdict on a transfer of this engine. Which ones fit depends on the transfer's kind and progress.
    fn on_done(&mut self, id: u64, status: StatusCode, text: &str) -> Result<()> {
        let key = Key { id, mine: true };
        let Some(kind) = self.state.transfers.kind(id) else {
            bail!(Protocol, "a verdict on transfer {id}, which is not in flight")
        };
        let ok = status == UCCL_OK;
        let unsent = self.state.outgoing.unsent(key);
        match (kind, ok) {
            // Successful before its data was sent, or a verdict that only this engine can give.
            (Kind::Write | Kind::Send { pulled: true }, true) if unsent.is_none_or(|n| n == 0) => {}
            (Kind::Write, false) => {}
            (Kind::Read, false) => {
                // The target answers with data or with a refusal, never with both.
                self.state.incoming.take_unbegun(key)?;
            }
            _ => bail!(Protocol, "a verdict ({status}) on transfer {id} that does not fit its state"),
        }
        let result = if ok { Ok(()) } else { Err(self.refused(id, status, text)) };
        let sending = if ok {
            self.state.stream_done(key)
        } else {
            // The chunks that were announced are in flight, and the peer drains them.
            if unsent.is_some_and(|n| n > 0) {
                self.state.push(&Frame::Cancel { id }, self.now);
            }
            self.state.outgoing.cancel(key)
        };
        self.state.transfers.verdict(id, result, sending)?;
        if !sending {
            self.state.deadlines.end(key);
        }
        Ok(())
    }

    fn refused(&mut self, id: u64, status: StatusCode, text: &str) -> Error {
        self.state.counts.refused_by_peer += 1;
        let peer = &self.state.setting.peer;
        Error::new(ErrorKind::from_code(status), format_args!("{peer}: transfer {id} refused by the peer: {}", printable(text)))
    }

    // ---- two-sided messages ----

    fn on_message(&mut self, message: Message) -> Result<()> {
        let Message { id, len, .. } = message;
        let room = self.state.load.begin(id, 0)?;
        if len > MAX_MESSAGE {
            bail!(Protocol, "message {id} of {len} bytes");
        }
        if let Err(e) = room {
            self.state.load.ended_without_room();
            self.state.counts.refused += 1;
            self.state.log.log(
                log::Level::Warn,
                self.now,
                format_args!("{}: refused message {id} of the peer: {e}", self.state.setting.peer),
            );
            self.state.push(&Frame::Pull { id, status: e.code(), receiver: Place::HOST, landing: None }, self.now);
            return Ok(());
        }
        self.state.matching.message(message);
        self.match_receives();
        Ok(())
    }

    /// Matches messages with the receives that wait for them.
    pub(super) fn match_receives(&mut self) {
        while let Some((Message { id: message, len, from }, receive)) = self.state.matching.next_match() {
            self.state.transfers.set_total(receive.id, len);
            if len > receive.segment.len {
                let error = err!(Truncated, "a message of {len} bytes met a receive of {} bytes", receive.segment.len);
                self.state.transfers.finish(receive.id, Err(error));
                self.state.load.ended(0);
                let status = ErrorKind::Truncated.code();
                self.state.push(&Frame::Pull { id: message, status, receiver: Place::HOST, landing: None }, self.now);
                continue;
            }
            let (key, receiver) = (Key { id: message, mine: false }, receive.segment.place);
            let segment = Segment { len, ..receive.segment };
            let landing = match len {
                0 => None,
                _ => self.direct().land((key, len, from), (receive.id, &segment, &receive.hold)),
            };
            self.state.push(&Frame::Pull { id: message, status: UCCL_OK, receiver, landing }, self.now);
            if len == 0 {
                self.state.load.ended(0);
                self.state.transfers.finish(receive.id, Ok(()));
            } else if landing.is_none() {
                self.state.deadlines.start(key, Way::In, len, self.now);
                self.state.incoming.start(key, vec![segment], receive.hold, Ending::Receive(receive.id));
            }
        }
    }

    fn direct(&mut self) -> DirectTransfers<'_> {
        DirectTransfers { state: self.state, channels: self.channels, now: self.now }
    }

    fn on_pull(&mut self, id: u64, status: StatusCode, receiver: Place, landing: Option<Landing>) -> Result<()> {
        let Pulled::Waiting(send) = self.state.matching.pull(id)? else { return Ok(()) };
        if status != UCCL_OK {
            let peer = &self.state.setting.peer;
            let error =
                Error::new(ErrorKind::from_code(status), format_args!("{peer}: the peer's receive does not fit message {id}"));
            self.state.transfers.finish(id, Err(error));
            return Ok(());
        }
        let mut segments = send.segments;
        segments.iter_mut().for_each(|s| s.peer = receiver);
        if segments.is_empty() {
            self.state.transfers.finish(id, Ok(()));
            return Ok(());
        }
        if let Some(landing) = landing {
            if !send.direct {
                bail!(Protocol, "a buffer for message {id}, which comes in chunks");
            }
            return self.direct().send(id, &segments, (send.hold, receiver, landing));
        }
        if let Some((place, _)) = self.channels.unreachable(segments.iter().map(|s| (s.place, receiver))) {
            // The place of the receive was not known before. Nothing was announced: the peer ends the receive as if this send had
            // timed out.
            let error = err!(Unsupported, "no channel connects {place:?} here with {receiver:?}, where the receive lies");
            self.state.push(&Frame::Withdraw { id, status: error.code() }, self.now);
            self.state.transfers.finish(id, Err(error));
            return Ok(());
        }
        self.state.transfers.pulled(id);
        let key = Key { id, mine: true };
        self.state.deadlines.start(key, Way::Out, segments.iter().map(|s| s.len).sum(), self.now);
        self.state.outgoing.start(key, segments, send.hold, self.channels)
    }

    /// The peer withdraws a message. It is answered like any other, and a receive that it was matched with fails.
    fn on_withdraw(&mut self, id: u64, status: StatusCode) -> Result<()> {
        if status == UCCL_OK {
            bail!(Protocol, "message {id} is withdrawn without a reason");
        }
        if self.state.matching.withdraw(id) {
            self.state.load.ended(0);
            self.state
                .push(&Frame::Pull { id, status: ErrorKind::TimedOut.code(), receiver: Place::HOST, landing: None }, self.now);
            return Ok(());
        }
        let key = Key { id, mine: false };
        if let Some(receive) = self.state.direct.receive_of(key) {
            self.direct().withdrawn(key)?;
            self.fail_receive(receive, id, status);
            return Ok(());
        }
        let Some(receive) = self.state.incoming.receive_of(key) else {
            // The message was matched with a receive that was too small or empty: the answer and the withdrawal have crossed.
            return if self.state.load.has_named(id) && !self.state.incoming.contains(key) {
                Ok(())
            } else {
                Err(err!(Protocol, "message {id} is withdrawn, but is not waiting"))
            };
        };
        self.state.incoming.take_unbegun(key)?;
        self.state.load.ended(0);
        self.state.deadlines.end(key);
        self.fail_receive(receive, id, status);
        Ok(())
    }

    /// A receive whose message was withdrawn fails.
    fn fail_receive(&mut self, receive: u64, id: u64, status: StatusCode) {
        let why = match ErrorKind::from_code(status) {
            ErrorKind::TimedOut => "its send had waited too long for this receive",
            ErrorKind::Unsupported => "no channel connects the memory of its send with that of this receive",
            _ => "the peer could not send it",
        };
        let error = Error::new(ErrorKind::from_code(status), format_args!("message {id} was withdrawn: {why}"));
        self.state.transfers.finish(receive, Err(error));
    }

    fn on_cancel(&mut self, id: u64) -> Result<()> {
        let key = Key { id, mine: false };
        if let Some(ended) = self.state.incoming.cancel(key)? {
            self.state.stream_ended(key, ended, self.now);
        }
        Ok(())
    }

    /// The peer reports how much has arrived there.
    fn on_ping(&mut self, received: u64) -> Result<()> {
        let news = self.state.liveness.on_ping(received, self.channels.totals().submitted, self.now)?;
        self.state.deadlines.arrived(news, self.now);
        Ok(())
    }

    /// The peer reports how many chunks of a channel have arrived there.
    fn on_arrived(&mut self, channel: u16, chunks: u64) -> Result<()> {
        self.check_channel(channel)?;
        self.state.chunks_arrived(channel, chunks)
    }

    /// The peer has lost a channel and closed it.
    fn on_lost(&mut self, channel: u16, chunks: u64, text: &str) -> Result<()> {
        self.check_channel(channel)?;
        let text = printable(text);
        let why = losses::by_peer(&text);
        match self.state.losses.theirs(channel, chunks, text)? {
            Next::Close => {
                self.channels.close_channel(channel, why);
                Ok(())
            }
            Next::Recover => self.state.recover(channel, self.channels, self.now),
        }
    }

    /// The peer has opened its end of a channel that was lost.
    fn on_up(&mut self, channel: u16, generation: u32) -> Result<()> {
        if self.channels.limits(channel).is_none() {
            bail!(Protocol, "channel {channel} does not exist");
        }
        if self.state.losses.up_there(channel, generation, self.now)? {
            self.state.restored(channel, self.channels, self.now);
        }
        Ok(())
    }

    fn check_channel(&self, channel: u16) -> Result<()> {
        if self.channels.limits(channel).is_none() || self.state.losses.is_theirs(channel) {
            bail!(Protocol, "channel {channel} does not exist, or the peer has closed it");
        }
        Ok(())
    }
}

/// The error that the peer's goodbye stands for.
fn farewell(status: StatusCode, text: &str) -> Error {
    match status {
        UCCL_OK => err!(RemoteDisconnect, "the peer closed the connection"),
        code if ErrorKind::from_code(code) == ErrorKind::TimedOut => err!(TimedOut, "{GAVE_UP}: {}", printable(text)),
        _ => err!(RemoteDisconnect, "{GAVE_UP}: {}", printable(text)),
    }
}

const GAVE_UP: &str = "the peer gave up the connection";

/// Whether an error is a goodbye of the peer with a cause.
pub(crate) fn is_farewell(error: &Error) -> bool {
    error.to_str().starts_with(GAVE_UP)
}

/// The peer's text without characters that could steer a terminal or forge a line.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
