//! What each frame of the peer does: transfers announced, chunks granted, verdicts, small transfers inside frames. Whatever does not
//! fit the state of the transfer that it names is a protocol violation. Knows nothing of sockets.

use super::incoming::Ending;
use super::limits::MAX_INLINE_BACKLOG;
use super::matching::Pulled;
use super::{Kind, Machine, Way};
use crate::channel::plan::Walk;
use crate::channel::router::Channels;
use crate::region::{Hold, RegionUse};
use crate::status::{bail, err, Error, ErrorKind, Result, StatusCode, UCCL_OK};
use crate::types::{Key, Part, Place, RemoteAccess, Segment, MAX_INLINE};
use crate::wire::frame::{Frame, Grant, WireRegion, WireSegment, WireSegments};
use crate::wire::text;
use std::time::Instant;

/// A message of the peer may announce this many bytes; its receive is what really bounds it.
const MAX_MESSAGE: u64 = 1 << 50;

impl Machine {
    /// Takes a frame of the peer. An error means that the connection must end.
    pub(crate) fn handle(&mut self, frame: Frame<'_>, channels: &mut Channels, now: Instant) -> Result<()> {
        // Nothing begins with these, and a heartbeat alone must not wake anybody again.
        let begins = !matches!(frame, Frame::Ping { .. } | Frame::Notify { .. });
        self.tx.answering(true);
        let handled = self.take_frame(frame, channels, now);
        self.tx.answering(false);
        if begins {
            self.attend(now);
        }
        handled?;
        self.peer.answers(self.tx.answers())
    }

    fn take_frame(&mut self, frame: Frame<'_>, channels: &mut Channels, now: Instant) -> Result<()> {
        match &frame {
            Frame::Write { .. } | Frame::Read { .. } | Frame::Message { .. } => self.counts.peer_transfers += 1,
            Frame::Notify { .. } => self.counts.notifications_received += 1,
            _ => {}
        }
        match frame {
            Frame::Write { id, regions, segments, inline } => self.on_write(id, &regions, &segments, inline, channels, now),
            Frame::Read { id, regions, segments } => self.on_read(id, &regions, &segments, channels, now),
            Frame::ReadInline { id, data } => self.on_read_inline(id, data, channels),
            Frame::Chunks { id, by_initiator, grants } => self.on_chunks(Key { id, mine: !by_initiator }, &grants, channels),
            Frame::Done { id, status, text } => self.on_done(id, status, text, now),
            Frame::Message { id, len } => self.on_message(id, len, now),
            Frame::Pull { id, status, receiver } => self.on_pull(id, status, receiver, channels, now),
            Frame::Withdraw { id, status } => self.on_withdraw(id, status, now),
            Frame::Cancel { id } => self.on_cancel(id, now),
            Frame::Notify { name, message } => self.setting.inbox.push(name, message),
            Frame::Ping { received, chunks } => self.on_ping(received, chunks, channels, now),
            Frame::Bye { status, text } => Err(farewell(status, text)),
        }
    }

    /// Resolves a peer's segments to memory of this side; every one is checked before anything moves.
    fn resolve(
        &mut self,
        regions: &[WireRegion],
        segments: &WireSegments<'_>,
        access: RemoteAccess,
    ) -> Result<(Vec<Segment>, Vec<RegionUse>)> {
        let uses = regions.iter().map(|r| self.setting.registry.remote(r.id, &r.token)).collect::<Result<Vec<_>>>()?;
        uses.iter().try_for_each(|region| region.check_access(access))?;
        let resolve = |s: WireSegment| {
            let Some(region) = uses.get(usize::from(s.region)) else { bail!(Protocol, "segment of region {}", s.region) };
            region.check_remote(s.addr, u64::from(s.len))?;
            if region.place != s.owner {
                bail!(RemoteAccess, "region {} does not lie where the FIFO item says", region.span.id);
            }
            Ok(Segment { addr: s.addr, len: u64::from(s.len), region: s.region, place: region.place, peer: s.initiator })
        };
        let mut resolved = self.spare.list(segments.count())?;
        for segment in segments.iter() {
            resolved.push(resolve(segment)?);
        }
        Ok((resolved, uses))
    }

    /// Tells the peer that its transfer is refused. It learns what it did wrong, and nothing else.
    fn refuse(&mut self, id: u64, error: &Error, now: Instant) {
        self.counts.refused += 1;
        self.log.log(log::Level::Warn, now, format_args!("{}: transfer {id} of the peer refused: {error}", self.setting.peer));
        self.push(&Frame::Done { id, status: error.code(), text: &error.to_string() }, now);
    }

    fn on_write(
        &mut self,
        id: u64,
        regions: &[WireRegion],
        segments: &WireSegments<'_>,
        inline: Option<&[u8]>,
        channels: &mut Channels,
        now: Instant,
    ) -> Result<()> {
        let count = segments.count();
        let total: u64 = segments.iter().map(|s| u64::from(s.len)).sum();
        let room = self.peer.begin(id, count)?;
        if total == 0 {
            bail!(Protocol, "write {id} is empty");
        }
        let key = Key { id, mine: false };
        if let Err(e) = room {
            if inline.is_none() {
                self.deadlines.start(key, Way::In, total, now);
                self.incoming.refuse(key, total, false);
            } else {
                self.peer.ended_without_room();
            }
            self.refuse(id, &e, now);
            return Ok(());
        }
        let resolved = self.resolve(regions, segments, RemoteAccess::WRITE);
        if let Ok((segments, uses)) = &resolved {
            grant(segments, uses, channels);
        }
        match (resolved, inline) {
            (Ok((segments, uses)), Some(data)) => {
                self.counts.inline_received_bytes += total;
                self.store_inline(segments, data, channels)?;
                drop(uses);
                self.peer.ended(count);
                self.push(&Frame::Done { id, status: UCCL_OK, text: "" }, now);
            }
            (Ok((segments, uses)), None) => {
                self.deadlines.start(key, Way::In, total, now);
                self.incoming.start(key, segments, Hold::new(uses), Ending::Write);
            }
            (Err(e), Some(_)) => {
                self.peer.ended(count);
                self.refuse(id, &e, now);
            }
            (Err(e), None) => {
                self.peer.without_list(count);
                self.deadlines.start(key, Way::In, total, now);
                self.incoming.refuse(key, total, true);
                self.refuse(id, &e, now);
            }
        }
        Ok(())
    }

    /// Puts the bytes of a control frame in place. The caller holds the segments' regions.
    fn store_inline(&mut self, segments: Vec<Segment>, mut data: &[u8], channels: &mut Channels) -> Result<()> {
        let total: u64 = segments.iter().map(|s| s.len).sum();
        if total != data.len() as u64 {
            bail!(Protocol, "{} bytes inside a frame for {total} bytes of memory", data.len());
        }
        if let [Segment { addr, len, region, place, .. }] = segments[..] {
            // SAFETY: the part lies in a registered region that the caller holds.
            return unsafe { channels.store(&[Part { addr, len, region }], place, data) };
        }
        let mut stream = Walk::new(segments);
        while let Some(chunk) = stream.take(MAX_INLINE) {
            let Some((head, tail)) = data.split_at_checked(chunk.len) else { bail!(Protocol, "inline data is too short") };
            // SAFETY: the parts lie in registered regions that the caller holds.
            unsafe { channels.store(&chunk.parts, chunk.place, head) }?;
            data = tail;
        }
        Ok(())
    }

    fn on_read(
        &mut self,
        id: u64,
        regions: &[WireRegion],
        segments: &WireSegments<'_>,
        channels: &mut Channels,
        now: Instant,
    ) -> Result<()> {
        let count = segments.count();
        if let Err(e) = self.peer.begin(id, count)? {
            self.peer.ended_without_room();
            self.refuse(id, &e, now);
            return Ok(());
        }
        let answered = self.resolve(regions, segments, RemoteAccess::READ).and_then(|(segments, uses)| {
            let unreachable = segments.iter().find(|s| channels.route(s.place, s.peer, false).is_none());
            match unreachable {
                Some(s) => Err(err!(Unsupported, "no channel carries memory of {:?} to {:?}", s.place, s.peer)),
                None => Ok((segments, uses)),
            }
        });
        let (segments, uses) = match answered {
            Ok(resolved) => resolved,
            Err(e) => {
                self.peer.ended(count);
                self.refuse(id, &e, now);
                return Ok(());
            }
        };
        grant(&segments, &uses, channels);
        let total: u64 = segments.iter().map(|s| s.len).sum();
        if total == 0 {
            bail!(Protocol, "read {id} is empty");
        }
        let hold = Hold::new(uses);
        if self.tx.pending() < MAX_INLINE_BACKLOG {
            let mut gathered = std::mem::take(&mut self.gathered);
            if let Some(data) = self.load_inline(&segments, &hold, total, channels, &mut gathered)? {
                self.counts.inline_sent_bytes += total;
                self.push(&Frame::ReadInline { id, data }, now);
                self.gathered = gathered;
                self.peer.ended(count);
                return Ok(());
            }
        }
        let key = Key { id, mine: false };
        self.deadlines.start(key, Way::Out, total, now);
        self.outgoing.start(key, segments, hold, channels)
    }

    fn on_read_inline(&mut self, id: u64, data: &[u8], channels: &mut Channels) -> Result<()> {
        if self.transfers.kind(id) != Some(Kind::Read) {
            bail!(Protocol, "data of read {id}, which is not in flight");
        }
        let key = Key { id, mine: true };
        let (stream, hold, ..) = self.incoming.take_unbegun(key)?;
        self.counts.inline_received_bytes += data.len() as u64;
        self.store_inline(stream.into_list(), data, channels)?;
        drop(hold);
        self.deadlines.end(key);
        self.transfers.moved(id, data.len() as u64);
        self.transfers.finish(id, Ok(()));
        Ok(())
    }

    fn on_chunks(&mut self, key: Key, grants: &[Grant], channels: &mut Channels) -> Result<()> {
        grants.iter().try_for_each(|&grant| self.incoming.announce(key, grant, channels))?;
        self.peer.chunks(self.incoming.expected())
    }

    /// The peer's verdict on a transfer of this side. Which ones fit depends on its kind and on how far it is.
    fn on_done(&mut self, id: u64, status: StatusCode, text: &str, now: Instant) -> Result<()> {
        let key = Key { id, mine: true };
        let Some(kind) = self.transfers.kind(id) else { bail!(Protocol, "a verdict on transfer {id}, which is not in flight") };
        let ok = status == UCCL_OK;
        let unsent = self.outgoing.unsent(key);
        match (kind, ok) {
            // Done before its data has left, or a verdict that only we can give.
            (Kind::Write | Kind::Send { pulled: true }, true) if unsent.is_none_or(|n| n == 0) => {}
            (Kind::Write, false) => {}
            (Kind::Read, false) => {
                // The owner answers with data or with a refusal, never with both.
                self.incoming.take_unbegun(key)?;
            }
            _ => bail!(Protocol, "a verdict ({status}) on transfer {id} that does not fit its state"),
        }
        let result = if ok { Ok(()) } else { Err(self.refused(id, status, text)) };
        let sending = if ok {
            unsent.is_some()
        } else {
            // What was announced is on its way, and the peer drains it.
            if unsent.is_some_and(|n| n > 0) {
                self.push(&Frame::Cancel { id }, now);
            }
            self.outgoing.cancel(key)
        };
        self.transfers.verdict(id, result, sending)?;
        if !sending {
            self.deadlines.end(key);
        }
        Ok(())
    }

    fn refused(&mut self, id: u64, status: StatusCode, text: &str) -> Error {
        self.counts.refused_by_peer += 1;
        let peer = &self.setting.peer;
        Error::new(ErrorKind::from_code(status), format_args!("{peer}: transfer {id} refused by the peer: {}", printable(text)))
    }

    // ---- two-sided messages ----

    fn on_message(&mut self, id: u64, len: u64, now: Instant) -> Result<()> {
        let room = self.peer.begin(id, 0)?;
        if len > MAX_MESSAGE {
            bail!(Protocol, "message {id} of {len} bytes");
        }
        if let Err(e) = room {
            self.peer.ended_without_room();
            self.counts.refused += 1;
            self.log.log(log::Level::Warn, now, format_args!("{}: message {id} of the peer refused: {e}", self.setting.peer));
            self.push(&Frame::Pull { id, status: e.code(), receiver: Place::HOST }, now);
            return Ok(());
        }
        self.matching.message(id, len);
        self.match_receives(now);
        Ok(())
    }

    pub(super) fn match_receives(&mut self, now: Instant) {
        while let Some(((message, len), receive)) = self.matching.next_match() {
            self.transfers.set_total(receive.id, len);
            if len > receive.segment.len {
                let error = err!(Truncated, "a message of {len} bytes met a receive of {}", receive.segment.len);
                self.transfers.finish(receive.id, Err(error));
                self.peer.ended(0);
                self.push(&Frame::Pull { id: message, status: ErrorKind::Truncated.code(), receiver: Place::HOST }, now);
                continue;
            }
            self.push(&Frame::Pull { id: message, status: UCCL_OK, receiver: receive.segment.place }, now);
            if len == 0 {
                self.peer.ended(0);
                self.transfers.finish(receive.id, Ok(()));
                continue;
            }
            let key = Key { id: message, mine: false };
            let segment = Segment { len, ..receive.segment };
            self.deadlines.start(key, Way::In, len, now);
            self.incoming.start(key, vec![segment], receive.hold, Ending::Receive(receive.id));
        }
    }

    fn on_pull(&mut self, id: u64, status: StatusCode, receiver: Place, channels: &mut Channels, now: Instant) -> Result<()> {
        let Pulled::Waiting(send) = self.matching.pull(id)? else { return Ok(()) };
        if status != UCCL_OK {
            let peer = &self.setting.peer;
            let error =
                Error::new(ErrorKind::from_code(status), format_args!("{peer}: the peer's receive does not fit message {id}"));
            self.transfers.finish(id, Err(error));
            return Ok(());
        }
        let mut segments = send.segments;
        segments.iter_mut().for_each(|s| s.peer = receiver);
        if segments.is_empty() {
            self.transfers.finish(id, Ok(()));
            return Ok(());
        }
        if let Some(s) = segments.iter().find(|s| channels.route(s.place, receiver, false).is_none()) {
            // Where its receive lies was not known before. Nothing was announced: the peer gives up the receive as it would late.
            let error =
                err!(Unsupported, "no channel carries memory of {:?} here to {receiver:?}, where the receive lies", s.place);
            self.push(&Frame::Withdraw { id, status: error.code() }, now);
            self.transfers.finish(id, Err(error));
            return Ok(());
        }
        self.transfers.pulled(id);
        let key = Key { id, mine: true };
        self.deadlines.start(key, Way::Out, segments.iter().map(|s| s.len).sum(), now);
        self.outgoing.start(key, segments, send.hold, channels)
    }

    /// The peer gave up a message. It is answered like any other; a receive that it was matched with fails.
    fn on_withdraw(&mut self, id: u64, status: StatusCode, now: Instant) -> Result<()> {
        if status == UCCL_OK {
            bail!(Protocol, "message {id} is withdrawn without a reason");
        }
        if self.matching.withdraw(id) {
            self.peer.ended(0);
            self.push(&Frame::Pull { id, status: ErrorKind::TimedOut.code(), receiver: Place::HOST }, now);
            return Ok(());
        }
        let key = Key { id, mine: false };
        let Some(receive) = self.incoming.receive_of(key) else {
            // Matched with a receive that was too small, or empty: our answer and the withdrawal have crossed.
            return if self.peer.has_named(id) && !self.incoming.contains(key) {
                Ok(())
            } else {
                Err(err!(Protocol, "message {id} is withdrawn, which does not wait"))
            };
        };
        self.incoming.take_unbegun(key)?;
        self.peer.ended(0);
        self.deadlines.end(key);
        let why = match ErrorKind::from_code(status) {
            ErrorKind::TimedOut => "its send had waited too long for this receive",
            ErrorKind::Unsupported => "no channel connects the memory of its send with that of this receive",
            _ => "its sender could not send it",
        };
        let error = Error::new(ErrorKind::from_code(status), format_args!("message {id} was withdrawn: {why}"));
        self.transfers.finish(receive, Err(error));
        Ok(())
    }

    fn on_cancel(&mut self, id: u64, now: Instant) -> Result<()> {
        let key = Key { id, mine: false };
        if let Some(ended) = self.incoming.cancel(key)? {
            self.stream_ended(key, ended, now);
        }
        Ok(())
    }

    /// The peer tells how much has arrived there.
    fn on_ping(&mut self, received: u64, chunks: u64, channels: &Channels, now: Instant) -> Result<()> {
        let sent = channels.totals().submitted;
        if received < self.peer_received || received > sent {
            bail!(Protocol, "the peer has received {received} bytes after {}, of {sent} sent", self.peer_received);
        }
        self.outgoing.confirm(chunks)?;
        self.deadlines.arrived(received - self.peer_received, now);
        self.clock.ping = now;
        self.peer_received = received;
        self.echo(now);
        Ok(())
    }
}

/// The peer has shown the tokens of these regions: a path that needs no asking may be told of them.
fn grant(segments: &[Segment], uses: &[RegionUse], channels: &mut Channels) {
    let mut last = None;
    for segment in segments {
        if last.replace((segment.region, segment.peer)) != Some((segment.region, segment.peer)) {
            if let Some(region) = uses.get(usize::from(segment.region)) {
                channels.grant(region, segment.peer);
            }
        }
    }
}

/// The error that a peer's farewell means.
fn farewell(status: StatusCode, text: &str) -> Error {
    match status {
        UCCL_OK => err!(RemoteDisconnect, "the peer closed the connection"),
        code if ErrorKind::from_code(code) == ErrorKind::TimedOut => err!(TimedOut, "{GAVE_UP}: {}", printable(text)),
        _ => err!(RemoteDisconnect, "{GAVE_UP}: {}", printable(text)),
    }
}

const GAVE_UP: &str = "the peer gave the connection up";

/// Whether an error is a peer's farewell with a cause.
pub(crate) fn is_farewell(error: &Error) -> bool {
    error.to_str().starts_with(GAVE_UP)
}

/// Bytes of a peer's text in an error.
const MAX_SHOWN: usize = 512;

/// A peer's text as it may stand in an error or a log line.
fn printable(text: &str) -> String {
    text::printable(text, MAX_SHOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_text_is_shown_as_printable_ascii() {
        let evil = "a\u{202e}b\u{200b}c\u{2028}d\u{2066}e\u{feff}f\u{e000}g\x1b[2Jh\ni\u{ad}j";
        for status in [ErrorKind::TimedOut, ErrorKind::Internal] {
            let shown = farewell(status.code(), evil).to_string();
            assert!(shown.bytes().all(text::is_printable) && shown.contains("a\\u{202e}b"), "{shown:?}");
        }
        assert!(farewell(-1, &"\u{202e}".repeat(500)).to_string().len() < 700);
    }
}
