//! The state of one connection: transfers, streams, matching of sends and receives, and what each control frame does to them.
//! Runs under the connection's lock; never blocks. Timers and locks live in `connection`, set-up in `setup`.
//! Here: starting transfers, progress, deadlines and the end. `peer`: what the peer's frames do. `matching`: two-sided messages.

mod matching;
mod peer;

use super::notify::Queue;
use super::registry::{RegionUse, Registry};
use super::spare::Spare;
use super::transfer::{Outcomes, TransferState};
use crate::channel::device::DeviceCopier;
use crate::channel::lane::{Context, Event, Lane};
use crate::channel::plan::{chunk_len, Stream};
use crate::channel::stripe;
use crate::status::{bail, Error, Result, UCCL_OK};
use crate::types::Segment;
use crate::types::{Key, Span};
use crate::wire::control::{ControlStream, RxBuffer};
use crate::wire::frame::{Frame, Grant, WireRegion, WireSegments};
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
    pub spare: Spare,
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
            spare: Spare::default(),
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

    /// Queues the announcement of a transfer and keeps the memory of its segments.
    fn announce(&mut self, frame: Frame<'static>) {
        self.push(&frame);
        if let Frame::Write { segments, .. } | Frame::Read { segments, .. } = frame {
            self.spare.give_wire(segments);
        }
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
            self.announce(Frame::Write { id, regions: remote_regions, segments: remote, inline: None });
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
        self.announce(Frame::Read { id, regions: remote_regions, segments: remote });
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
            if let Some(out) = self.outgoing.remove(&key) {
                self.spare.give_list(out.stream.into_list());
            }
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
        self.spare.give_list(inc.stream.into_list());
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

    /// Ends the connection: closes the channels first, so that nothing touches memory any more, then ends every transfer with `error`.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.dead.is_some() {
            return;
        }
        if let Some(Err(e)) = self.copier.as_mut().map(|copier| copier.quiesce()) {
            // Its jobs may still read bounce buffers and write to them: both stay until the process ends.
            log::error!("channels of a connection stay open: {e}");
            std::mem::forget((std::mem::take(&mut self.sets), self.copier.take()));
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
