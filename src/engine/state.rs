//! The state of one connection: transfers, streams, matching of sends and receives, and what each control frame does to them.
//! Runs under the connection's lock; never blocks. Timers and locks live in `connection`, set-up in `setup`.

use super::notify::{Notification, Queue};
use super::registry::{RegionUse, Registry};
use super::transfer::{Outcomes, TransferState};
use crate::channel::device::{spread, DeviceCopier};
use crate::channel::lane::{Context, Dest, Event, Key, Lane, Span};
use crate::channel::plan::{chunk_len, Chunk, Segment, Stream};
use crate::channel::stripe;
use crate::status::{bail, err, Error, ErrorKind, Result, UCCL_OK};
use crate::wire::control::{ControlStream, RxBuffer};
use crate::wire::frame::{Frame, Grant, Place, WireRegion, WireSegment, WireSegments, MAX_INLINE};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Lanes of one plugin and how to use them.
pub(crate) struct LaneSet {
    pub lanes: Vec<Lane>,
    pub vectored: bool,
    pub host: bool,
    pub stage_sends: bool,
}

impl LaneSet {
    /// The lanes, and what they need to work.
    fn split<'a>(
        &'a mut self,
        copier: &'a mut Option<Box<dyn DeviceCopier>>,
        chunk_bytes: usize,
    ) -> (Context<'a>, &'a mut [Lane]) {
        let copier = copier.as_mut().map(|copier| &mut **copier as &mut dyn DeviceCopier);
        let LaneSet { lanes, vectored, host, stage_sends } = self;
        (Context { copier, vectored: *vectored, host: *host, stage_sends: *stage_sends, chunk_bytes }, lanes)
    }
}

/// What both sides agreed on, and what the state needs of its engine.
pub(crate) struct Setting {
    pub registry: Arc<Registry>,
    pub notifications: Arc<Queue>,
    pub chunk_bytes: usize,
    pub eager_bytes: usize,
    pub peer: String,
    pub transfer_timeout: Duration,
    pub peer_timeout: Duration,
    pub match_timeout: Duration,
}

/// Data that leaves.
struct OutStream {
    stream: Stream,
    uses: Vec<RegionUse>,
    chunk_len: usize,
    /// Bytes announced and not yet gone.
    inflight: u64,
}

/// What the end of an incoming stream means.
enum Ending {
    /// The peer's write: tell it.
    Write,
    /// Our read.
    Read,
    /// Our receive `id` of the peer's message: tell the peer too.
    Receive(u64),
}

/// Data that arrives.
struct InStream {
    stream: Stream,
    uses: Vec<RegionUse>,
    /// Bytes not yet in place.
    missing: u64,
    ending: Ending,
}

struct WaitingSend {
    segments: Vec<Segment>,
    uses: Vec<RegionUse>,
    since: Instant,
}

struct WaitingReceive {
    id: u64,
    segment: Segment,
    region: RegionUse,
    since: Instant,
}

/// Two-sided messages of the peer that wait for a receive; each is a few bytes.
const MAX_MESSAGES: usize = 1 << 20;
/// Chunks that are announced together.
const ANNOUNCE: usize = 8;
/// Transfers in flight on a connection.
const MAX_TRANSFERS: usize = 1 << 16;

/// A transfer as the caller describes it: local segments with their regions, and the remote side's.
pub(crate) struct Request {
    pub segments: Vec<Segment>,
    pub uses: Vec<RegionUse>,
    pub remote: WireSegments<'static>,
    pub remote_regions: Vec<WireRegion>,
    pub total: u64,
}

pub(crate) struct State {
    pub control: ControlStream,
    rx: RxBuffer,
    // The lanes close before the copier and the streams' region uses go (field order).
    sets: Vec<LaneSet>,
    copier: Option<Box<dyn DeviceCopier>>,
    queue: VecDeque<Key>,
    outgoing: HashMap<Key, OutStream>,
    incoming: HashMap<Key, InStream>,
    pub outcomes: Outcomes,
    waiting_sends: HashMap<u64, WaitingSend>,
    waiting_receives: VecDeque<WaitingReceive>,
    messages: VecDeque<(u64, u64)>,
    events: Vec<Event>,
    loads: Vec<stripe::Load>,
    last_rx: Instant,
    last_tx: Instant,
    last_progress: Instant,
    dead: Option<Error>,
    setting: Setting,
}

impl State {
    pub(crate) fn new(
        control: ControlStream,
        sets: Vec<LaneSet>,
        copier: Option<Box<dyn DeviceCopier>>,
        setting: Setting,
    ) -> State {
        let now = Instant::now();
        State {
            control,
            rx: RxBuffer::default(),
            sets,
            copier,
            queue: VecDeque::new(),
            outgoing: HashMap::new(),
            incoming: HashMap::new(),
            outcomes: Outcomes::default(),
            waiting_sends: HashMap::new(),
            waiting_receives: VecDeque::new(),
            messages: VecDeque::new(),
            events: Vec::new(),
            loads: Vec::new(),
            last_rx: now,
            last_tx: now,
            last_progress: now,
            dead: None,
            setting,
        }
    }

    pub(crate) fn dead(&self) -> Option<&Error> {
        self.dead.as_ref()
    }
    pub(crate) fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.sets.iter().flat_map(|s| &s.lanes)
    }
    /// Chunks are announced, in flight or expected on some channel.
    pub(crate) fn lanes_busy(&self) -> bool {
        self.lanes().any(Lane::busy)
    }
    /// A GPU copies for this connection; nobody is woken when it ends.
    pub(crate) fn copies_pending(&self) -> bool {
        self.copier.as_ref().is_some_and(|c| c.busy())
    }
    /// Something waits for the network or the peer.
    pub(crate) fn busy(&self) -> bool {
        self.outcomes.in_flight() > 0 || !self.incoming.is_empty() || !self.outgoing.is_empty() || self.lanes_busy()
    }
    pub(crate) fn last_rx(&self) -> Instant {
        self.last_rx
    }

    fn alive(&self) -> Result<()> {
        match &self.dead {
            Some(e) => Err(e.clone()),
            None => Ok(()),
        }
    }

    fn push(&mut self, frame: &Frame<'_>) {
        self.control.push(frame);
        self.last_tx = Instant::now();
    }

    // ---- starting transfers ----

    fn admit(&mut self, now: Instant) -> Result<()> {
        self.alive()?;
        if self.outcomes.in_flight() >= MAX_TRANSFERS {
            bail!(Resource, "{MAX_TRANSFERS} transfers are in flight on this connection");
        }
        if !self.busy() {
            self.last_progress = now;
        }
        Ok(())
    }

    pub(crate) fn start_write(&mut self, request: Request, now: Instant) -> Result<u64> {
        self.admit(now)?;
        let id = self.outcomes.start(request.total);
        if request.total == 0 {
            self.outcomes.finish(id, Ok(()));
            return Ok(id);
        }
        let Request { segments, uses, remote, remote_regions, total } = request;
        if let Some(data) = self.load_inline(&segments, total)? {
            self.push(&Frame::Write { id, regions: remote_regions, segments: remote, inline: Some(&data) });
            self.outcomes.moved(id, total);
        } else {
            self.push(&Frame::Write { id, regions: remote_regions, segments: remote, inline: None });
            self.start_stream(Key { id, mine: true }, segments, uses);
        }
        self.pump(now)?;
        Ok(id)
    }

    pub(crate) fn start_read(&mut self, request: Request, now: Instant) -> Result<u64> {
        self.admit(now)?;
        let id = self.outcomes.start(request.total);
        if request.total == 0 {
            self.outcomes.finish(id, Ok(()));
            return Ok(id);
        }
        let Request { segments, uses, remote, remote_regions, total } = request;
        self.push(&Frame::Read { id, regions: remote_regions, segments: remote });
        let stream = InStream { stream: Stream::new(segments), uses, missing: total, ending: Ending::Read };
        self.incoming.insert(Key { id, mine: true }, stream);
        self.pump(now)?;
        Ok(id)
    }

    /// Records a transfer that fails before anything moves.
    pub(crate) fn start_failed(&mut self, error: Error, now: Instant) -> Result<u64> {
        self.admit(now)?;
        let id = self.outcomes.start(0);
        self.outcomes.finish(id, Err(error));
        Ok(id)
    }

    pub(crate) fn start_send(&mut self, segments: Vec<Segment>, uses: Vec<RegionUse>, now: Instant) -> Result<u64> {
        self.admit(now)?;
        let total = segments.iter().map(|s| s.len).sum();
        let id = self.outcomes.start(total);
        self.waiting_sends.insert(id, WaitingSend { segments, uses, since: now });
        self.push(&Frame::Message { id, len: total });
        self.pump(now)?;
        Ok(id)
    }

    pub(crate) fn start_receive(&mut self, segment: Segment, region: RegionUse, now: Instant) -> Result<u64> {
        self.admit(now)?;
        let id = self.outcomes.start(0);
        self.waiting_receives.push_back(WaitingReceive { id, segment, region, since: now });
        self.match_receives();
        self.pump(now)?;
        Ok(id)
    }

    pub(crate) fn notify(&mut self, name: &[u8], message: &[u8], now: Instant) -> Result<()> {
        self.alive()?;
        self.push(&Frame::Notify { name, message });
        self.pump(now)
    }

    fn start_stream(&mut self, key: Key, segments: Vec<Segment>, uses: Vec<RegionUse>) {
        let stream = Stream::new(segments);
        let lanes = self.sets.first().map_or(1, |s| s.lanes.len());
        let chunk_len = chunk_len(stream.remaining(), lanes, self.setting.chunk_bytes);
        self.outgoing.insert(key, OutStream { stream, uses, chunk_len, inflight: 0 });
        self.queue.push_back(key);
    }

    // ---- progress ----

    /// Reads the control stream, advances the channels, cuts new chunks, flushes. An error means that the connection must fail.
    pub(crate) fn progress(&mut self, read_control: bool, now: Instant) -> Result<bool> {
        let mut any = false;
        if read_control {
            any |= self.read_control(now)?;
        }
        if self.lanes_busy() {
            any |= self.progress_lanes(now)?;
        }
        if any || !self.queue.is_empty() || self.control.pending() > 0 {
            self.pump(now)?;
        }
        if any {
            self.last_progress = now;
        }
        Ok(any)
    }

    /// Cuts chunks as far as windows allow, and flushes the control stream.
    fn pump(&mut self, now: Instant) -> Result<()> {
        self.schedule(now)?;
        self.control.flush()?;
        Ok(())
    }

    fn read_control(&mut self, now: Instant) -> Result<bool> {
        let mut rx = std::mem::take(&mut self.rx);
        let result = self.read_frames(&mut rx, now);
        self.rx = rx;
        result
    }

    fn read_frames(&mut self, rx: &mut RxBuffer, now: Instant) -> Result<bool> {
        let mut any = false;
        // A bounded number of reads, so that a peer that floods the control stream does not starve the channels.
        for _ in 0..16 {
            let (n, more) = self.control.read(rx)?;
            if n == 0 {
                break;
            }
            self.last_rx = now;
            any = true;
            while let Some((frame, len)) = rx.next()? {
                self.handle(frame)?;
                rx.consume(len);
            }
            if !more {
                break;
            }
        }
        Ok(any)
    }

    fn progress_lanes(&mut self, now: Instant) -> Result<bool> {
        let mut events = std::mem::take(&mut self.events);
        let mut any = false;
        let chunk_bytes = self.setting.chunk_bytes;
        for set in &mut self.sets {
            let (mut ctx, lanes) = set.split(&mut self.copier, chunk_bytes);
            for lane in lanes {
                any |= lane.progress(&mut ctx, now, &mut events)?;
            }
        }
        if let Some(copier) = &mut self.copier {
            copier.flush()?;
        }
        for event in events.drain(..) {
            match event {
                Event::Sent(key, len) => self.chunk_sent(key, len),
                Event::Received(key, len) => self.chunk_received(key, len),
            }
        }
        self.events = events;
        Ok(any)
    }

    fn chunk_sent(&mut self, key: Key, len: u64) {
        let Some(out) = self.outgoing.get_mut(&key) else { return };
        out.inflight -= len;
        if key.mine {
            self.outcomes.moved(key.id, len);
        }
        if out.inflight == 0 && out.stream.remaining() == 0 {
            self.outgoing.remove(&key);
            if key.mine {
                self.outcomes.source_free(key.id);
            }
        }
    }

    fn chunk_received(&mut self, key: Key, len: u64) {
        // Chunks of refused transfers have no stream.
        let Some(inc) = self.incoming.get_mut(&key) else { return };
        inc.missing -= len;
        match inc.ending {
            Ending::Read => self.outcomes.moved(key.id, len),
            Ending::Receive(id) => self.outcomes.moved(id, len),
            Ending::Write => {}
        }
        if inc.missing == 0 {
            self.stream_complete(key);
        }
    }

    fn stream_complete(&mut self, key: Key) {
        let Some(inc) = self.incoming.remove(&key) else { return };
        match inc.ending {
            Ending::Read => self.outcomes.finish(key.id, Ok(())),
            Ending::Write => self.push(&Frame::Done { id: key.id, status: UCCL_OK, text: "" }),
            Ending::Receive(id) => {
                self.outcomes.finish(id, Ok(()));
                self.push(&Frame::Done { id: key.id, status: UCCL_OK, text: "" });
            }
        }
    }

    /// Hands out chunks of the waiting streams, first come first served, to the channels that would finish them first.
    fn schedule(&mut self, now: Instant) -> Result<()> {
        while let Some(&key) = self.queue.front() {
            let Some(out) = self.outgoing.get_mut(&key) else {
                self.queue.pop_front();
                continue;
            };
            let mut grants = Vec::new();
            let mut blocked = false;
            while let Some((place, peer)) = out.stream.next_places() {
                // The first set carries device memory; a second one, where it exists, everything else.
                let index = if self.sets.len() > 1 && !(place.is_device() && peer.is_device()) { 1 } else { 0 };
                let base: usize = self.sets[..index].iter().map(|s| s.lanes.len()).sum();
                let Some(set) = self.sets.get_mut(index) else { bail!(Internal, "a connection without channels") };
                let expected_len = out.chunk_len as u64;
                self.loads.clear();
                self.loads.extend(set.lanes.iter().map(|lane| lane.load(place, set.stage_sends, now)));
                let Some(lane) = stripe::pick(&self.loads, expected_len) else {
                    blocked = true;
                    break;
                };
                let Some(chunk) = out.stream.take(out.chunk_len) else { break };
                let len = chunk.len;
                let (mut ctx, lanes) = set.split(&mut self.copier, self.setting.chunk_bytes);
                let uses = &out.uses;
                let span = |region: u16| uses.get(usize::from(region)).map_or(Span { id: 0, addr: 0, len: 0 }, |u| u.span);
                // SAFETY: the parts lie in regions that `uses` holds; the stream, and with it `uses`, stays until its last chunk is sent
                // or the lanes are closed.
                unsafe { lanes[lane].submit(key, chunk, span, &mut ctx, now) }?;
                out.inflight += len as u64;
                grants.push(Grant { len: len as u32, channel: (base + lane) as u16 });
                // The receiver can post nothing before it knows: announce while the rest is still being posted.
                if grants.len() == ANNOUNCE {
                    self.control.push(&Frame::Chunks { id: key.id, by_initiator: key.mine, grants: std::mem::take(&mut grants) });
                    self.control.flush()?;
                }
            }
            if !grants.is_empty() {
                self.control.push(&Frame::Chunks { id: key.id, by_initiator: key.mine, grants });
                self.last_tx = now;
            }
            if blocked {
                break;
            }
            self.queue.pop_front();
        }
        match &mut self.copier {
            Some(copier) => copier.flush(),
            None => Ok(()),
        }
    }

    // ---- control frames ----

    fn handle(&mut self, frame: Frame<'_>) -> Result<()> {
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
    fn resolve(&self, regions: &[WireRegion], segments: &WireSegments<'_>) -> Result<(Vec<Segment>, Vec<RegionUse>)> {
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
        let mut resolved = Vec::with_capacity(segments.count());
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
    fn load_inline(&mut self, segments: &[Segment], total: u64) -> Result<Option<Vec<u8>>> {
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

    // ---- two-sided ----

    fn match_receives(&mut self) {
        while let (Some(&(message, len)), Some(_)) = (self.messages.front(), self.waiting_receives.front()) {
            self.messages.pop_front();
            let Some(receive) = self.waiting_receives.pop_front() else { return };
            self.outcomes.set_total(receive.id, len);
            if len > receive.segment.len {
                let error = err!(Truncated, "a message of {len} bytes met a receive of {}", receive.segment.len);
                log::error!("{}: {error}", self.setting.peer);
                self.outcomes.finish(receive.id, Err(error));
                self.push(&Frame::Pull { id: message, status: ErrorKind::Truncated.code(), receiver: Place::HOST });
                continue;
            }
            self.push(&Frame::Pull { id: message, status: UCCL_OK, receiver: receive.segment.place });
            if len == 0 {
                self.outcomes.finish(receive.id, Ok(()));
                self.push(&Frame::Done { id: message, status: UCCL_OK, text: "" });
                continue;
            }
            let segment = Segment { len, ..receive.segment };
            let stream = InStream {
                stream: Stream::new(vec![segment]),
                uses: vec![receive.region],
                missing: len,
                ending: Ending::Receive(receive.id),
            };
            self.incoming.insert(Key { id: message, mine: false }, stream);
        }
    }

    fn on_pull(&mut self, id: u64, status: i32, receiver: Place) -> Result<()> {
        let Some(send) = self.waiting_sends.remove(&id) else {
            // The send timed out here, and its withdrawal is on the way to the peer.
            return Ok(());
        };
        if status != UCCL_OK {
            let error = Error::new(
                ErrorKind::from_code(status),
                format_args!("{}: the peer's receive is smaller than message {id}", self.setting.peer),
            );
            log::error!("{error}");
            self.outcomes.finish(id, Err(error));
            return Ok(());
        }
        let mut segments = send.segments;
        segments.iter_mut().for_each(|s| s.peer = receiver);
        if !segments.is_empty() {
            self.start_stream(Key { id, mine: true }, segments, send.uses);
        }
        Ok(())
    }

    /// The peer gave up a message: it waits here no more, and a receive that it was matched with fails.
    fn on_withdraw(&mut self, id: u64) {
        self.messages.retain(|&(message, _)| message != id);
        let key = Key { id, mine: false };
        if let Some(InStream { ending: Ending::Receive(receive), .. }) = self.incoming.get(&key) {
            let error = err!(TimedOut, "message {id} was withdrawn: its send had waited too long for this receive");
            self.outcomes.finish(*receive, Err(error));
            self.incoming.remove(&key);
        }
    }

    // ---- time and end ----

    /// Heartbeats and deadlines. An error means that the connection must fail.
    pub(crate) fn tick(&mut self, now: Instant) -> Result<()> {
        let s = &self.setting;
        let silent = now.saturating_duration_since(self.last_rx);
        if silent > s.peer_timeout {
            bail!(RemoteDisconnect, "the peer has been silent for {silent:.1?}");
        }
        let moving = self.outcomes.in_flight() > self.waiting_sends.len() + self.waiting_receives.len()
            || !self.incoming.is_empty()
            || !self.outgoing.is_empty();
        let stalled = now.saturating_duration_since(self.last_progress);
        if moving && stalled > s.transfer_timeout {
            bail!(TimedOut, "no transfer has moved for {stalled:.1?}");
        }
        let match_timeout = s.match_timeout;
        let heartbeat = s.peer_timeout / 4;
        if !moving {
            self.last_progress = now;
        }
        self.expire_matches(now, match_timeout);
        if now.saturating_duration_since(self.last_tx) > heartbeat && self.control.pending() == 0 {
            self.push(&Frame::Ping);
        }
        self.pump(now)
    }

    fn expire_matches(&mut self, now: Instant, timeout: Duration) {
        let late: Vec<u64> = self
            .waiting_sends
            .iter()
            .filter(|(_, s)| now.saturating_duration_since(s.since) > timeout)
            .map(|(&id, _)| id)
            .collect();
        for id in late {
            self.waiting_sends.remove(&id);
            self.push(&Frame::Withdraw { id });
            self.outcomes.finish(id, Err(err!(TimedOut, "no receive was posted for message {id} within {timeout:?}")));
        }
        while self.waiting_receives.front().is_some_and(|r| now.saturating_duration_since(r.since) > timeout) {
            if let Some(receive) = self.waiting_receives.pop_front() {
                self.outcomes
                    .finish(receive.id, Err(err!(TimedOut, "no message came for receive {} within {timeout:?}", receive.id)));
            }
        }
    }

    /// Ends the connection: closes the channels first, so that nothing touches memory any more, then ends every transfer with `error`.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.dead.is_some() {
            return;
        }
        if let Some(copier) = &mut self.copier {
            copier.quiesce();
        }
        self.sets.clear();
        self.copier = None;
        self.queue.clear();
        self.outgoing.clear();
        self.incoming.clear();
        self.waiting_sends.clear();
        self.waiting_receives.clear();
        self.messages.clear();
        self.outcomes.fail_all(&error);
        self.control.shutdown();
        self.dead = Some(error);
    }

    /// Sends the orderly end, as far as the socket takes it.
    pub(crate) fn say_bye(&mut self) {
        if self.dead.is_none() {
            self.push(&Frame::Bye);
            let _ = self.control.flush();
        }
    }

    /// Whether a transfer of this connection uses a region of this side.
    pub(crate) fn uses_region(&self, id: u64) -> bool {
        let any = |uses: &[RegionUse]| uses.iter().any(|u| u.span.id == id);
        self.outgoing.values().any(|s| any(&s.uses))
            || self.incoming.values().any(|s| any(&s.uses))
            || self.waiting_sends.values().any(|s| any(&s.uses))
            || self.waiting_receives.iter().any(|r| r.region.span.id == id)
    }

    pub(crate) fn forget_region(&mut self, id: u64) {
        for lane in self.sets.iter_mut().flat_map(|s| &mut s.lanes) {
            lane.forget_region(id);
        }
    }

    pub(crate) fn lookup(&self, id: u64) -> Result<TransferState> {
        self.outcomes.lookup(id)
    }
}
