//! What each control frame of the peer does to the state: transfers announced, chunks granted, verdicts, small transfers inside frames.

use super::{Ending, InStream, State, MAX_MESSAGES};
use crate::channel::device::spread;
use crate::channel::lane::Dest;
use crate::channel::plan::{Chunk, Stream};
use crate::engine::notify::Notification;
use crate::region::RegionUse;
use crate::status::{bail, Error, ErrorKind, Result, UCCL_OK};
use crate::types::Key;
use crate::types::Segment;
use crate::wire::frame::{Frame, Grant, WireRegion, WireSegment, WireSegments, MAX_INLINE};

impl State {
    pub(super) fn handle(&mut self, frame: Frame<'_>) -> Result<()> {
        match frame {
            Frame::Write { id, regions, segments, inline } => self.on_write(id, &regions, &segments, inline),
            Frame::Read { id, regions, segments } => self.on_read(id, &regions, &segments),
            Frame::ReadInline { id, data } => self.on_read_inline(id, data),
            Frame::Chunks { id, by_initiator, grants } => self.on_chunks(Key { id, mine: !by_initiator }, &grants),
            Frame::Done { id, status, text } => self.on_done(id, status, text),
            Frame::Message { id, len } => {
                if self.messages.len() >= MAX_MESSAGES {
                    bail!(Protocol, "{MAX_MESSAGES} messages wait for a receive");
                }
                self.messages.push_back((id, len));
                self.match_receives();
                Ok(())
            }
            Frame::Pull { id, status, receiver } => self.on_pull(id, status, receiver),
            Frame::Withdraw { id } => {
                self.on_withdraw(id);
                Ok(())
            }
            Frame::Notify { name, message } => {
                if !self.setting.notifications.push(Notification { name: name.to_vec(), msg: message.to_vec() }) {
                    bail!(Resource, "the application drains no notifications and its queue is full");
                }
                Ok(())
            }
            Frame::Ping => Ok(()),
            Frame::Bye => bail!(RemoteDisconnect, "the peer closed the connection"),
        }
    }

    /// Resolves a peer's segments to memory of this side; every one is checked before anything moves.
    fn resolve(&mut self, regions: &[WireRegion], segments: &WireSegments<'_>) -> Result<(Vec<Segment>, Vec<RegionUse>)> {
        let uses = regions.iter().map(|r| self.setting.registry.remote(r.id, &r.token)).collect::<Result<Vec<_>>>()?;
        let resolve = |s: WireSegment| {
            let Some(region) = uses.get(usize::from(s.region)) else { bail!(Protocol, "segment of region {}", s.region) };
            if let Err(e) = region.check(s.addr, u64::from(s.len)) {
                bail!(RemoteAccess, "{e}");
            }
            if region.place != s.owner {
                bail!(RemoteAccess, "region {} does not lie where the FIFO item says", region.span.id);
            }
            Ok(Segment { addr: s.addr, len: u64::from(s.len), region: s.region, place: region.place, peer: s.initiator })
        };
        let mut resolved = self.spare.list(segments.count());
        for segment in segments.iter() {
            resolved.push(resolve(segment)?);
        }
        Ok((resolved, uses))
    }

    fn refuse(&mut self, id: u64, error: &Error) {
        log::warn!("{}: transfer {id} of the peer refused: {error}", self.setting.peer);
        self.push(&Frame::Done { id, status: error.code(), text: &error.to_string() });
    }

    fn on_write(&mut self, id: u64, regions: &[WireRegion], segments: &WireSegments<'_>, inline: Option<&[u8]>) -> Result<()> {
        let (segments, uses) = match self.resolve(regions, segments) {
            Ok(resolved) => resolved,
            Err(e) => {
                self.refuse(id, &e);
                return Ok(());
            }
        };
        if let Some(mut data) = inline {
            let mut stream = Stream::new(segments);
            while let Some(chunk) = stream.take(MAX_INLINE) {
                let Some((head, tail)) = data.split_at_checked(chunk.len) else { bail!(Protocol, "inline write is too short") };
                self.store(&chunk, head)?;
                data = tail;
            }
            self.push(&Frame::Done { id, status: UCCL_OK, text: "" });
            return Ok(());
        }
        let key = Key { id, mine: false };
        let stream = Stream::new(segments);
        let missing = stream.remaining();
        let stream = InStream { stream, uses, missing, ending: Ending::Write };
        if missing == 0 || self.incoming.insert(key, stream).is_some() {
            bail!(Protocol, "transfer {id} announced twice, or empty");
        }
        Ok(())
    }

    /// The bytes of a transfer that is small enough to travel inside a control frame.
    pub(super) fn load_inline(&mut self, segments: &[Segment], total: u64) -> Result<Option<Vec<u8>>> {
        let device = segments.iter().any(|s| s.place.is_device());
        let limit = match &self.copier {
            Some(copier) if device => copier.inline_bytes(),
            _ => usize::MAX,
        };
        if total > self.setting.eager_bytes.min(limit) as u64 {
            return Ok(None);
        }
        let mut data = Vec::with_capacity(total as usize);
        let mut stream = Stream::new(segments.to_vec());
        while let Some(chunk) = stream.take(MAX_INLINE) {
            match &mut self.copier {
                // SAFETY: the parts lie in registered regions that the caller holds in use.
                Some(copier) if chunk.place.is_device() => unsafe { copier.fetch(&chunk.parts, chunk.place, &mut data) }?,
                None if chunk.place.is_device() => bail!(Gpu, "device memory without a device"),
                _ => {
                    for part in &chunk.parts {
                        // SAFETY: as above.
                        data.extend_from_slice(unsafe { std::slice::from_raw_parts(part.addr as *const u8, part.len as usize) });
                    }
                }
            }
        }
        Ok(Some(data))
    }

    /// Puts bytes of the control stream in place.
    fn store(&mut self, to: &Chunk, bytes: &[u8]) -> Result<()> {
        debug_assert_eq!(to.len, bytes.len());
        match &mut self.copier {
            // SAFETY: the parts lie in registered regions that the caller holds in use, and hold `bytes`.
            Some(copier) if to.place.is_device() => unsafe { copier.store(bytes, &to.parts, to.place) },
            None if to.place.is_device() => bail!(Gpu, "device memory without a device"),
            _ => {
                // SAFETY: as above.
                unsafe { spread(bytes.as_ptr(), &to.parts) };
                Ok(())
            }
        }
    }

    fn on_read(&mut self, id: u64, regions: &[WireRegion], segments: &WireSegments<'_>) -> Result<()> {
        let (segments, uses) = match self.resolve(regions, segments) {
            Ok(resolved) => resolved,
            Err(e) => {
                self.refuse(id, &e);
                return Ok(());
            }
        };
        let total: u64 = segments.iter().map(|s| s.len).sum();
        let key = Key { id, mine: false };
        if total == 0 || self.outgoing.contains_key(&key) {
            bail!(Protocol, "read {id} asked for twice, or empty");
        }
        if let Some(data) = self.load_inline(&segments, total)? {
            self.push(&Frame::ReadInline { id, data: &data });
            return Ok(());
        }
        self.start_stream(key, segments, uses);
        Ok(())
    }

    fn on_read_inline(&mut self, id: u64, mut data: &[u8]) -> Result<()> {
        let key = Key { id, mine: true };
        let Some(mut inc) = self.incoming.remove(&key) else { bail!(Protocol, "data of read {id}, which is not in flight") };
        if !matches!(inc.ending, Ending::Read) || inc.missing != data.len() as u64 || inc.stream.remaining() != inc.missing {
            bail!(Protocol, "data of read {id}: {} bytes, {} are missing", data.len(), inc.missing);
        }
        while let Some(chunk) = inc.stream.take(MAX_INLINE) {
            let Some((head, tail)) = data.split_at_checked(chunk.len) else { bail!(Protocol, "inline read is too short") };
            self.store(&chunk, head)?;
            data = tail;
        }
        self.outcomes.moved(id, inc.missing);
        self.outcomes.finish(id, Ok(()));
        Ok(())
    }

    fn on_chunks(&mut self, key: Key, grants: &[Grant]) -> Result<()> {
        for grant in grants {
            let len = grant.len as usize;
            if len == 0 || len > self.setting.chunk_bytes {
                bail!(Protocol, "chunk of {len} bytes, at most {} were agreed", self.setting.chunk_bytes);
            }
            let dest = match self.incoming.get_mut(&key) {
                None => Dest::Discard,
                Some(inc) => match inc.stream.take_exact(len) {
                    Some(chunk) if chunk.place.is_device() => Dest::Device(chunk.place, chunk.parts),
                    Some(chunk) => Dest::Host(chunk.parts),
                    None => bail!(Protocol, "chunk of {len} bytes of transfer {} is outside the plan", key.id),
                },
            };
            let Some(lane) = self.sets.iter_mut().flat_map(|s| &mut s.lanes).nth(usize::from(grant.channel)) else {
                bail!(Protocol, "channel {} does not exist", grant.channel)
            };
            lane.expect(key, len, dest)?;
        }
        Ok(())
    }

    fn on_done(&mut self, id: u64, status: i32, text: &str) -> Result<()> {
        let key = Key { id, mine: true };
        if status == UCCL_OK {
            if self.waiting_sends.contains_key(&id) || self.incoming.contains_key(&key) {
                bail!(Protocol, "transfer {id} reported done before its data moved");
            }
            self.outcomes.verdict(id, Ok(()), self.outgoing.contains_key(&key));
            return Ok(());
        }
        let error = Error::new(
            ErrorKind::from_code(status),
            format_args!("{}: transfer {id} refused by the peer: {text}", self.setting.peer),
        );
        log::error!("{error}");
        self.waiting_sends.remove(&id);
        // A refused read has no data under way: the owner answers with data or with the refusal, never both.
        self.incoming.remove(&key);
        // A refused write stops here; what was announced is on its way, and the peer drains it.
        let draining = match self.outgoing.get_mut(&key) {
            Some(out) if out.inflight > 0 => {
                out.stream = Stream::new(Vec::new());
                true
            }
            Some(_) => {
                self.outgoing.remove(&key);
                false
            }
            None => false,
        };
        self.outcomes.verdict(id, Err(error), draining);
        Ok(())
    }
}
