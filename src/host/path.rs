//! The path to a process of the same host: the source's side describes each chunk in its ring, the destination's side copies it out of
//! the source's memory and says so. Where reads are slow the source's side first pushes the chunk into memory of the other library, and
//! the destination's side copies it from there. Only the owner of memory ever writes it. Knows nothing of transfers.

use super::exports::{Imports, Shares, Stretch};
use super::link::Linked;
use super::memory::host::{self, HostMemory};
use super::memory::pool::Bell;
use super::memory::{LocalMemory, Piece, Pull};
use super::messages::{self, Note};
use super::push::{Areas, Targets, PUSHED, SLOT, SLOTS};
use super::ring::{Descriptor, Extent, Inbox, Listening, Outbox, MAX_PIECES};
use super::shelf::Shelf;
use super::socket::{Received, Socket, MAX_MESSAGE};
use crate::channel::path::{Arrival, Copier, Departure, Dest, Direct, Event, Line, Path, Way};
use crate::channel::plan::{ChunkLimits, MAX_CROSSED};
use crate::channel::stripe::{Load, Loads, Rate};
use crate::region::{Hold, Region, RegionUse};
use crate::stats::ChannelStats;
use crate::status::{bail, Result};
use crate::types::{Key, Part, Place};
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Instant;
use unasked::Unasked;

mod pushing;
mod unasked;

/// Chunks that may be under way and not taken, and how many of them may belong to large transfers.
const WINDOW: usize = SLOTS;
const BULK_WINDOW: usize = 6;
/// Pulls under way at most.
const PULLS: usize = 16;
/// Largest chunk, bytes, and the smallest that a large transfer is cut into.
const CHUNK: usize = 64 << 20;
const SMALLEST: usize = 1 << 20;
/// Pieces that the sender makes at most, so that the first are copied while the next are told; more may come of allocations that end
/// inside a piece.
const PIECES: usize = MAX_PIECES / 2;
/// Notes of the peer that are read in one round.
const NOTES: usize = 64;
/// Notes that may wait for a peer that does not read.
const MAX_WAITING: usize = 1 << 16;

/// A chunk on its way out.
struct Leaving {
    key: Key,
    len: usize,
    bulk: bool,
    tag: i32,
    stage: Stage,
    /// Where it was pushed to: the peer's place, and a slot there.
    slot: Option<(Place, usize)>,
    hold: Hold,
}

/// How far a chunk is.
enum Stage {
    /// It is being written into its slot.
    Pushing(Pull),
    /// It is told when those before it are.
    Ready(Vec<Extent>),
    Told,
}

/// A chunk that is being copied.
struct Coming {
    arrival: Arrival,
    /// `None` where nothing is copied.
    pull: Option<Pull>,
    /// Exports that its pieces lie in, one entry for each use that was counted.
    exports: Vec<u32>,
    /// The slot that it was pushed into.
    slot: Option<(Place, usize)>,
    /// What keeps the source, where that is memory of this process.
    _source: Option<Hold>,
}

/// The path.
pub(crate) struct LocalPath {
    socket: Socket,
    pid: i32,
    pairs: Vec<(Place, Place)>,
    /// Those of them whose chunks are pushed, and where to.
    pushed: Vec<(Place, Place)>,
    areas: Areas,
    targets: Targets,
    /// GPUs of the peer whose memory is in use: what they may want to reach is told in advance.
    likely: Vec<Place>,
    outbox: Outbox,
    inbox: Inbox,
    host: Option<HostMemory>,
    device: Option<Box<dyn LocalMemory>>,
    shares: Shares,
    imports: Imports,
    /// Answers and rings for the peer.
    notes: VecDeque<Note>,
    leaving: VecDeque<Leaving>,
    /// How many of those, from the first on, are told.
    told: usize,
    bulk: usize,
    queued: u64,
    rate: Rate,
    expected: VecDeque<Arrival>,
    coming: VecDeque<Coming>,
    /// What copies use that failed when they were started: part of them may have begun.
    failed: Vec<Hold>,
    /// Holds of what was told, where the peer is this process; and the peer's.
    shelves: Option<(Shelf, Shelf)>,
    /// Something came on the socket.
    news: Arc<AtomicBool>,
    /// What goes without chunks.
    unasked: Unasked,
    scratch: Scratch,
    counts: Counts,
}

#[derive(Default)]
struct Scratch {
    extents: Vec<Extent>,
    descriptor: Descriptor,
    pieces: Vec<Piece>,
}

#[derive(Default)]
struct Counts {
    sent_bytes: u64,
    sent_chunks: u64,
    received_bytes: u64,
    received_chunks: u64,
}

/// How a path's socket is watched.
pub(crate) struct Watched {
    /// To be watched for something to read, edges only.
    pub fd: RawFd,
    /// To be set whenever there is something.
    pub news: Arc<AtomicBool>,
    /// The switch of the peer's doorbell.
    pub listening: Listening,
}

impl LocalPath {
    /// `bell`: rung when a thread has ended a pull; `likely`: GPUs of the peer whose memory is in use.
    pub(crate) fn new(linked: Linked, bell: Bell, likely: Vec<Place>) -> LocalPath {
        let same = linked.same_process;
        let shelves = same.then(|| (Shelf::own(linked.id, linked.connecting), Shelf::of(linked.id, !linked.connecting)));
        let Linked { socket, who, mut host, mut device, inbox, outbox, pairs, pushed, .. } = linked;
        if let (true, Some(device)) = (same, &mut device) {
            device.within_process();
        }
        if let Some(host) = &mut host {
            host.set_bell(bell);
        }
        let unasked = Unasked::new(&outbox, &inbox, same);
        LocalPath {
            socket,
            pid: who.pid,
            pairs,
            pushed,
            areas: Areas::default(),
            targets: Targets::default(),
            likely,
            outbox,
            inbox,
            host,
            device,
            shares: Shares::default(),
            imports: Imports::new(same),
            notes: VecDeque::new(),
            leaving: VecDeque::new(),
            told: 0,
            bulk: 0,
            queued: 0,
            rate: Rate::default(),
            expected: VecDeque::new(),
            coming: VecDeque::new(),
            failed: Vec::new(),
            shelves,
            news: Arc::new(AtomicBool::new(true)),
            unasked,
            scratch: Scratch::default(),
            counts: Counts::default(),
        }
    }

    /// What the engine watches for it.
    pub(crate) fn watched(&self) -> Watched {
        Watched { fd: self.socket.fd(), news: self.news.clone(), listening: self.outbox.listening() }
    }

    /// Bytes came to this side without a chunk.
    fn count_received(&mut self, bytes: u64) {
        self.counts.received_bytes += bytes;
    }

    // ---- the source's side ----

    /// What was taken may change.
    fn release(&mut self, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let n = self.outbox.taken()?;
        for _ in 0..n {
            let Some(gone) = self.leaving.pop_front() else { bail!(Internal, "a chunk was taken that was never told") };
            let len = gone.len as u64;
            self.told -= 1;
            if let Some((there, slot)) = gone.slot {
                self.targets.leave(there, slot);
            }
            self.queued -= len;
            self.bulk -= usize::from(gone.bulk);
            self.rate.done(len, now, !self.leaving.is_empty());
            (self.counts.sent_bytes, self.counts.sent_chunks) = (self.counts.sent_bytes + len, self.counts.sent_chunks + 1);
            if let Some((own, _)) = &self.shelves {
                own.take_down();
            }
            events.push(Event::Sent(gone.key, len));
        }
        Ok(n > 0)
    }

    /// Where the parts of a chunk lie, for the peer.
    fn describe(&mut self, departure: &Departure) -> Result<()> {
        let extents = &mut self.scratch.extents;
        extents.clear();
        let (parts, there) = (&departure.chunk.parts, departure.chunk.peer);
        if !departure.chunk.place.is_device() {
            extents.extend(parts.iter().map(|p| Extent { addr: p.addr, len: p.len as u32, export: 0 }));
            return Ok(());
        }
        // Blocks of a transfer mostly lie in one allocation.
        let mut last: Option<(u16, Stretch)> = None;
        for part in parts {
            let (mut addr, end) = (part.addr, part.addr + part.len);
            while addr < end {
                let stretch = match last {
                    Some((region, stretch)) if region == part.region && stretch.locate(addr, 1).is_some() => stretch,
                    _ => self.shares.find(departure.hold.span_to_register(part.region)?.id, there, addr)?,
                };
                last = Some((part.region, stretch));
                let n = (stretch.base + stretch.len - addr).min(end - addr);
                extents.push(Extent { addr, len: n as u32, export: stretch.id });
                addr += n;
            }
        }
        Ok(())
    }

    // ---- the destination's side ----

    /// Starts the pulls of chunks that are announced and described.
    fn start(&mut self) -> Result<bool> {
        let mut any = false;
        while self.coming.len() < PULLS && !self.expected.is_empty() {
            if !self.inbox.next(&mut self.scratch.descriptor)? {
                break;
            }
            let Some(arrival) = self.expected.pop_front() else { break };
            let (tag, len) = (self.scratch.descriptor.tag, self.scratch.descriptor.len);
            if tag != arrival.tag || len != arrival.len as u64 {
                bail!(Protocol, "a chunk of {len} bytes with tag {tag} where {} with tag {} come", arrival.len, arrival.tag);
            }
            let coming = self.pull(arrival)?;
            self.coming.push_back(coming);
            any = true;
        }
        Ok(any)
    }

    fn pull(&mut self, arrival: Arrival) -> Result<Coming> {
        let source = match &self.shelves {
            Some((_, peers)) => Some(peers.take()?),
            None => None,
        };
        let Dest::Memory { place, parts, .. } = &arrival.dest else {
            return Ok(Coming { arrival, pull: None, exports: Vec::new(), slot: None, _source: source });
        };
        let place = *place;
        let pieces = &mut self.scratch.descriptor.pieces;
        let (exports, slot) = match &pieces[..] {
            [Extent { export: PUSHED, .. }] => {
                let (slot, addr) = self.areas.enter(place, pieces, arrival.len)?;
                (pieces[0].addr, pieces[0].export) = (addr, 0);
                (Vec::new(), Some((place, slot)))
            }
            _ => (locate(pieces, place, &mut self.imports)?, None),
        };
        join(&self.scratch.descriptor.pieces, parts, &mut self.scratch.pieces)?;
        let Some(memory) = memory(&mut self.host, &mut self.device, place) else {
            bail!(Protocol, "a chunk for memory of {place:?}, which is not shared")
        };
        // SAFETY: sources lie in the peer's process, in open mappings, which `exports` keeps, or in an area of ours; destinations are held
        // by the arrival, which stays until the pull has ended, or for ever where it does not end.
        let pull = match unsafe { memory.pull(place, &self.scratch.pieces) } {
            Ok(pull) => pull,
            Err(e) => {
                self.failed.extend(source);
                if let Dest::Memory { hold, .. } = arrival.dest {
                    self.failed.push(hold);
                }
                return Err(e);
            }
        };
        Ok(Coming { arrival, pull: Some(pull), exports, slot, _source: source })
    }

    /// Reports the pulls that have ended, in their order.
    fn finish(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = false;
        while let Some(front) = self.coming.front() {
            if let (Some(pull), Dest::Memory { place, .. }) = (front.pull, &front.arrival.dest) {
                let Some(memory) = memory(&mut self.host, &mut self.device, *place) else { bail!(Internal, "a pull of nobody") };
                if !memory.poll(pull)? {
                    break;
                }
                // What was copied counts only if its owner left it alone until here.
                if self.inbox.closed() {
                    bail!(RemoteDisconnect, "the peer's process has closed the connection");
                }
            }
            let Some(Coming { arrival, exports, slot, .. }) = self.coming.pop_front() else { break };
            if let Some(device) = &mut self.device {
                exports.into_iter().for_each(|id| self.imports.release(id, &mut **device));
            }
            if let Some((place, slot)) = slot {
                self.areas.leave(place, slot);
            }
            if self.inbox.take() {
                self.notes.push_back(Note::Ring);
            }
            let len = arrival.len as u64;
            (self.counts.received_bytes, self.counts.received_chunks) =
                (self.counts.received_bytes + len, self.counts.received_chunks + 1);
            events.push(Event::Received(arrival.key, len));
            any = true;
        }
        Ok(any)
    }

    // ---- notes ----

    /// Reads what the peer's process says; whether there may be more.
    fn hear(&mut self) -> Result<bool> {
        let mut buffer = [0; MAX_MESSAGE];
        for _ in 0..NOTES {
            if self.imports.is_full() {
                break;
            }
            let note = match self.socket.receive(&mut buffer)? {
                Received::Message(n, fds) => Note::decode(&buffer[..n], fds)?,
                Received::Cut(n) => {
                    // Other channels carry what it would have shared.
                    if let Some(id) = messages::share_of(&buffer[..n]) {
                        self.notes.push_back(self.imports.missed(id)?);
                    }
                    continue;
                }
                Received::Nothing => return Ok(false),
                // The control connection tells why.
                Received::End => return Ok(false),
            };
            let device = &mut self.device;
            match (note, device) {
                (Note::Ring, _) => {}
                (Note::Answer { id, open }, _) => self.shares.answered(id, open)?,
                (Note::Area { there, here, export }, Some(_)) if self.pushed.contains(&(here, there)) => {
                    self.targets.told(here, there, export)?;
                }
                (Note::Share { id, there, here, export }, Some(_)) if pulls(&self.pairs, &self.pushed, (here, there)) => {
                    self.imports.told(id, here, export)?;
                }
                (Note::End { id }, Some(device)) => self.imports.ended(id, &mut **device)?,
                (Note::Grant(granted), _) if pulls(&self.pairs, &self.pushed, (granted.here, granted.there)) => {
                    self.unasked.leases.told(*granted)?;
                }
                (Note::Revoke { slot, generation }, _) => self.unasked.leases.ended(slot, generation)?,
                (note, _) => bail!(Protocol, "the peer's process says what was not agreed: {note:?}"),
            }
        }
        self.news.store(true, Ordering::Release);
        Ok(true)
    }

    /// Opens what the peer shares, one at a time, and sends what waits.
    fn answer(&mut self) -> Result<bool> {
        let mut any = false;
        if let (Some(device), true) = (&mut self.device, self.imports.waiting()) {
            self.notes.extend(self.imports.open_one(&mut **device));
            any = true;
        }
        if let (Some(device), true) = (&mut self.device, self.targets.waiting()) {
            self.targets.open_one(&mut **device);
            any = true;
        }
        let LocalPath { socket, areas, shares, unasked, notes, device, .. } = self;
        while send(socket, &mut areas.notes)? {}
        loop {
            if let Some(device) = device {
                shares.prepare(&mut **device);
            }
            if !send(socket, &mut shares.notes)? {
                break;
            }
        }
        for queue in [&mut unasked.grants.notes, notes] {
            while send(socket, queue)? {}
        }
        Ok(any)
    }
}

/// Sends the first note of a queue; `false` where none waits, or there is no room now.
fn send(socket: &Socket, queue: &mut VecDeque<Note>) -> Result<bool> {
    if queue.len() > MAX_WAITING {
        bail!(Resource, "{} notes wait: the peer's process does not read them", queue.len());
    }
    let Some(note) = queue.front() else { return Ok(false) };
    match socket.send(&note.encode(), note.fd()) {
        Ok(true) => {
            queue.pop_front();
            Ok(true)
        }
        Ok(false) => Ok(false),
        // The control connection tells why it is gone.
        Err(_) => {
            queue.clear();
            Ok(false)
        }
    }
}

/// Whether the destination's side pulls between two places.
fn pulls(pairs: &[(Place, Place)], pushed: &[(Place, Place)], pair: (Place, Place)) -> bool {
    pairs.contains(&pair) && !pushed.contains(&pair)
}

/// The memory that pulls into a place.
fn memory<'a>(
    host: &'a mut Option<HostMemory>,
    device: &'a mut Option<Box<dyn LocalMemory>>,
    place: Place,
) -> Option<&'a mut dyn LocalMemory> {
    match place.is_device() {
        true => device.as_mut().map(|device| &mut **device as &mut dyn LocalMemory),
        false => host.as_mut().map(|host| host as &mut dyn LocalMemory),
    }
}

/// Turns the addresses of a peer's pieces into those where they are visible here; gives the exports that they lie in.
///
/// # Errors
/// `Protocol` for a piece that lies in no export that is open for memory of `place`.
fn locate(pieces: &mut [Extent], place: Place, imports: &mut Imports) -> Result<Vec<u32>> {
    let mut exports = Vec::new();
    let mut last: Option<Stretch> = None;
    for piece in pieces {
        match (piece.export, place.is_device()) {
            (0, false) => continue,
            (0, true) | (_, false) => bail!(Protocol, "a piece of export {} for memory of {place:?}", piece.export),
            (_, true) => {}
        }
        let stretch = match last {
            Some(stretch) if stretch.id == piece.export => stretch,
            _ => {
                let stretch = imports.enter(piece.export, place)?;
                exports.push(piece.export);
                stretch
            }
        };
        last = Some(stretch);
        let Some(addr) = stretch.locate(piece.addr, piece.len.into()) else {
            bail!(Protocol, "{} bytes at {:#x} are not inside export {}", piece.len, piece.addr, piece.export)
        };
        piece.addr = addr;
    }
    Ok(exports)
}

/// Lays the source's pieces beside the destination's: one piece for each stretch that is whole on both sides.
fn join(sources: &[Extent], parts: &[Part], out: &mut Vec<Piece>) -> Result<()> {
    out.clear();
    let (mut sources, mut parts) = (sources.iter().copied(), parts.iter().copied());
    let (mut source, mut part) = (sources.next(), parts.next());
    while let (Some(from), Some(to)) = (&mut source, &mut part) {
        let n = u64::from(from.len).min(to.len);
        match out.last_mut() {
            Some(last) if last.src + last.len == from.addr && last.dst + last.len == to.addr => last.len += n,
            _ => out.push(Piece { src: from.addr, dst: to.addr, len: n }),
        }
        (from.addr, from.len) = (from.addr + n, from.len - n as u32);
        (to.addr, to.len) = (to.addr + n, to.len - n);
        if from.len == 0 {
            source = sources.next();
        }
        if to.len == 0 {
            part = parts.next();
        }
    }
    match source.is_none() && part.is_none() {
        true => Ok(()),
        false => bail!(Internal, "the two sides of a chunk have different lengths"),
    }
}

impl Path for LocalPath {
    fn channels(&self) -> usize {
        1
    }

    fn limits(&self) -> ChunkLimits {
        // Both sides have agreed on the pairs.
        let bytes = if self.pushed.is_empty() { CHUNK } else { SLOT };
        ChunkLimits { bytes, pieces: PIECES, crossed: MAX_CROSSED }
    }

    fn chunk_len(&self, total: u64) -> usize {
        // Few bytes in one piece are copied faster than many chunks; what is in many pieces is cut by their number.
        // What is pushed is copied twice, one after the other: of several chunks both at once.
        let (parts, most) = if self.pushed.is_empty() { (2, CHUNK) } else { (4, SLOT) };
        usize::try_from(total.div_ceil(parts)).unwrap_or(most).next_multiple_of(4096).clamp(SMALLEST, most)
    }

    fn carries(&self, local: Place, peer: Place) -> bool {
        self.pairs.contains(&(local, peer))
    }

    fn carries_local(&self, local: Place) -> bool {
        self.pairs.iter().any(|&(here, _)| here == local)
    }

    fn needs_sharing(&self, _local: Place) -> bool {
        true
    }

    fn share(&mut self, region: &Region, peer: Place) -> bool {
        if !region.place.is_device() {
            return region.is_readable(host::is_readable);
        }
        if self.pushed.contains(&(region.place, peer)) {
            if self.targets.want(region.place) {
                self.news.store(true, Ordering::Release);
            }
            return self.targets.is_open(region.place, peer);
        }
        match &mut self.device {
            Some(device) if self.pairs.contains(&(region.place, peer)) => {
                let shared = self.shares.share(region, peer, &mut **device);
                if !self.shares.notes.is_empty() {
                    self.news.store(true, Ordering::Release);
                }
                shared
            }
            _ => false,
        }
    }

    fn offer(&mut self, region: &Region) {
        let here = region.place;
        let there = || self.pushed.iter().filter(|pair| pair.0 == here).map(|pair| pair.1);
        if let (Some(device), Some(_)) = (&mut self.device, there().next()) {
            self.areas.provide(here, there(), &mut **device);
            self.targets.want(here);
            self.news.store(true, Ordering::Release);
        }
        for i in 0..self.likely.len() {
            self.share(region, self.likely[i]);
        }
    }

    fn start_direct(&mut self, transfer: &mut Direct<'_>) -> Result<bool> {
        LocalPath::start_direct(self, transfer)
    }

    fn hurries(&self) -> bool {
        self.unasked.hurries()
    }

    fn ends_soon(&self, now: Instant) -> bool {
        self.unasked.ends_soon(now)
    }

    fn grant(&mut self, region: &RegionUse, peer: Place) {
        LocalPath::grant(self, region, peer);
    }

    fn uses_region(&self, id: u64) -> bool {
        self.unasked.uses_region(id)
    }

    fn loads(&mut self, _place: Place, bulk: bool, now: Instant, out: &mut Loads) {
        let untold = self.leaving.len() - self.told;
        let free = WINDOW.saturating_sub(self.leaving.len()).min(self.outbox.room().saturating_sub(untold));
        let free = if bulk { free.min(BULK_WINDOW.saturating_sub(self.bulk)) } else { free };
        let oldest = self.leaving.front().map_or(0, |l| l.len as u64);
        out.channels.push(Load { free, queued: self.queued, rate: self.rate.get(oldest, now), nic: 0 });
    }

    fn submit(&mut self, channel: usize, departure: Departure, _copier: &mut Copier, now: Instant) -> Result<()> {
        if channel != 0 {
            bail!(Internal, "channel {channel} does not exist");
        }
        let (stage, slot) = if self.pushed.contains(&(departure.chunk.place, departure.chunk.peer)) {
            let pushed = self.push(&departure.chunk).inspect_err(|_| self.failed.push(departure.hold.clone()));
            pushed.map(|(stage, slot)| (stage, Some((departure.chunk.peer, slot))))?
        } else {
            self.describe(&departure)?;
            (Stage::Ready(std::mem::take(&mut self.scratch.extents)), None)
        };
        let Departure { key, chunk, hold, bulk, tag } = departure;
        self.rate.posted(now);
        self.queued += chunk.len as u64;
        self.bulk += usize::from(bulk);
        self.leaving.push_back(Leaving { key, len: chunk.len, bulk, tag, stage, slot, hold });
        self.tell().map(drop)
    }

    fn expect(&mut self, channel: usize, arrival: Arrival) -> Result<()> {
        if channel != 0 {
            bail!(Internal, "channel {channel} does not exist");
        }
        self.expected.push_back(arrival);
        Ok(())
    }

    fn progress(&mut self, _copier: &mut Copier, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = self.news.swap(false, Ordering::AcqRel) && self.hear()?;
        any |= self.release(now, events)?;
        if self.told < self.leaving.len() && self.tell()? {
            // The peer has known of the chunk for a while.
            self.wake();
            any = true;
        }
        any |= self.start()?;
        any |= self.finish(events)?;
        any |= self.advance_direct(events)?;
        any |= self.answer()?;
        Ok(any)
    }

    fn busy(&self) -> bool {
        !self.leaving.is_empty() || !self.expected.is_empty() || !self.coming.is_empty() || self.unasked.busy()
    }

    fn attention(&self) -> bool {
        let notes = !self.notes.is_empty() || !self.shares.notes.is_empty() || !self.areas.notes.is_empty();
        notes || self.targets.waiting() || self.news.load(Ordering::Acquire) || self.imports.waiting() || self.unasked.attention()
    }

    fn copying(&self) -> bool {
        self.device.as_ref().is_some_and(|d| d.busy()) || self.host.as_ref().is_some_and(|h| h.busy())
    }

    fn network(&self, each: &mut dyn FnMut(Line<'_>)) -> Result<()> {
        let coming = self.expected.len() + self.coming.len();
        each(Line {
            nic: super::NAME,
            moved: Some((self.counts.sent_bytes.saturating_add(self.unasked.moved()), self.counts.received_bytes)),
            under_way: (self.leaving.len() + self.unasked.told(), coming),
            posted: coming,
        });
        Ok(())
    }

    fn describe(&self, _channel: usize, way: Way) -> String {
        match way {
            Way::Out => format!("memory of this host that process {} is to copy", self.pid),
            Way::In => format!("memory of process {} of this host", self.pid),
        }
    }

    fn stats(&self, kernel: bool, now: Instant, out: &mut Vec<ChannelStats>) {
        let oldest = self.leaving.front().map_or(0, |l| l.len as u64);
        let Counts { sent_bytes, sent_chunks, received_bytes, received_chunks } = self.counts;
        out.push(ChannelStats {
            nic: super::NAME.to_owned(),
            route: if kernel { format!("process {} of this host", self.pid) } else { String::new() },
            sent_bytes: sent_bytes.saturating_add(self.unasked.sent()),
            sent_chunks,
            received_bytes,
            received_chunks,
            speed: self.rate.last(oldest, now),
            queued_bytes: self.queued,
            window_out: self.leaving.len() as u32,
            window_in: (self.expected.len() + self.coming.len()) as u32,
            window: WINDOW as u32,
            ..ChannelStats::default()
        });
    }

    fn ready(&mut self, place: Place, _copier: &mut Copier) -> Result<()> {
        match &mut self.device {
            Some(device) if place.is_device() && self.pairs.iter().any(|&(here, _)| here == place) => device.ready(place),
            _ => Ok(()),
        }
    }

    fn forget_region(&mut self, id: u64) {
        self.unasked.grants.forget(id);
        self.shares.forget(id);
        if !self.shares.notes.is_empty() || !self.unasked.grants.notes.is_empty() {
            // Whoever drives next sends them; the mapping at the peer keeps memory until then.
            let _ = self.answer();
        }
    }
}

impl Drop for LocalPath {
    fn drop(&mut self) {
        // Before the holds go: what the peer copies from here on does not count.
        self.outbox.close();
        let ended = self.host.as_mut().map_or(Ok(()), |host| host.quiesce());
        let ended = ended.and(self.device.as_mut().map_or(Ok(()), |device| device.quiesce()));
        self.unasked.end(ended.is_ok());
        match (ended, &mut self.device) {
            (Err(e), _) => {
                log::error!("a copy from another process has not ended; its memory stays in use: {e}");
                let chunks = (std::mem::take(&mut self.coming), std::mem::take(&mut self.leaving));
                let chunks = (chunks, std::mem::take(&mut self.failed));
                std::mem::forget((chunks, self.host.take(), self.device.take()));
            }
            (Ok(()), Some(device)) => {
                self.imports.close_all(&mut **device);
                self.targets.close_all(&mut **device);
                self.areas.end(&mut **device);
            }
            (Ok(()), None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::link::tests::linked;
    use super::super::memory::emulated;
    use super::super::memory::{Export, ExportKind};
    use super::*;
    use crate::channel::plan::Chunk;
    use crate::region::RegionUse;
    use crate::status::{Error, ErrorKind};
    use crate::types::{RemoteAccess, Span};
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::sync::atomic::AtomicU32;

    pub(super) fn bell() -> Bell {
        // SAFETY: a plain system call, whose result is fresh.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        Bell { armed: Arc::new(AtomicU32::new(0)), fd: Arc::new(fd) }
    }

    pub(super) fn ends(gpus: [u8; 2]) -> (LocalPath, LocalPath) {
        let (a, b) = linked(gpus);
        (LocalPath::new(a, bell(), Vec::new()), LocalPath::new(b, bell(), Vec::new()))
    }

    /// Registered memory.
    pub(super) struct Memory {
        pub(super) bytes: Vec<u8>,
        pub(super) region: Arc<Region>,
    }

    impl Memory {
        pub(super) fn new(id: u64, place: Place, len: usize, fill: u8) -> Memory {
            let bytes = vec![fill; len];
            let span = Span { id, addr: bytes.as_ptr() as u64, len: len as u64 };
            Memory { region: Arc::new(Region::new(span, [0; 16], place, RemoteAccess::ALL)), bytes }
        }
        pub(super) fn hold(&self) -> Hold {
            Hold::new(vec![RegionUse::new(&self.region)])
        }
        fn parts(&self) -> Vec<Part> {
            vec![Part { addr: self.bytes.as_ptr() as u64, len: self.bytes.len() as u64, region: 0 }]
        }
        pub(super) fn departure(&self, tag: i32, peer: Place) -> Departure {
            let chunk = Chunk { parts: self.parts(), len: self.bytes.len(), place: self.region.place, peer };
            Departure { key: Key { id: 1, mine: true }, chunk, hold: self.hold(), bulk: true, tag }
        }
        pub(super) fn arrival(&self, tag: i32) -> Arrival {
            let dest = Dest::Memory { place: self.region.place, parts: self.parts(), hold: self.hold() };
            Arrival { key: Key { id: 1, mine: false }, len: self.bytes.len(), tag, dest }
        }
        pub(super) fn holds(&self, value: u8) -> bool {
            std::hint::black_box(&self.bytes).iter().all(|&b| b == value)
        }
    }

    /// Both ends go on until a number of chunks has arrived and left.
    fn run(a: &mut LocalPath, b: &mut LocalPath, chunks: usize) -> Result<()> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while ours.len() < chunks || theirs.len() < chunks {
            a.progress(&mut None, Instant::now(), &mut ours)?;
            b.progress(&mut None, Instant::now(), &mut theirs)?;
            assert!(start.elapsed().as_secs() < 60, "{ours:?} {theirs:?}");
        }
        Ok(())
    }

    #[test]
    fn chunks_of_host_memory_arrive() {
        let (mut a, mut b) = ends([0, 0]);
        for (i, len) in [1, 100, 70_000, 3 << 20].into_iter().enumerate() {
            let (from, to) = (Memory::new(1, Place::HOST, len, 5), Memory::new(2, Place::HOST, len, 0));
            b.expect(0, to.arrival(i as i32)).unwrap();
            a.submit(0, from.departure(i as i32, Place::HOST), &mut None, Instant::now()).unwrap();
            run(&mut a, &mut b, 1).unwrap();
            assert!(to.holds(5) && !from.region.in_use() && !to.region.in_use());
        }
        assert!(!a.busy() && !b.busy() && a.counts.sent_chunks == 4 && b.counts.received_bytes == a.counts.sent_bytes);
    }

    #[test]
    fn a_refused_chunk_is_drained() {
        let (mut a, mut b) = ends([0, 0]);
        let from = Memory::new(1, Place::HOST, 100, 5);
        a.submit(0, from.departure(3, Place::HOST), &mut None, Instant::now()).unwrap();
        b.expect(0, Arrival { key: Key { id: 1, mine: false }, len: 100, tag: 3, dest: Dest::Discard }).unwrap();
        run(&mut a, &mut b, 1).unwrap();
        assert!(!from.region.in_use());
    }

    #[test]
    fn the_window_holds() {
        let (mut a, _b) = ends([0, 0]);
        let from = Memory::new(1, Place::HOST, 100, 5);
        let free = |a: &mut LocalPath, bulk| {
            let mut loads = Loads::default();
            a.loads(Place::HOST, bulk, Instant::now(), &mut loads);
            loads.channels[0].free
        };
        let mut n = 0;
        while free(&mut a, true) > 0 {
            a.submit(0, from.departure(n, Place::HOST), &mut None, Instant::now()).unwrap();
            n += 1;
        }
        assert_eq!(n as usize, BULK_WINDOW);
        assert!(free(&mut a, false) > 0);
    }

    #[test]
    fn what_does_not_fit_its_announcement_is_a_violation() {
        for (tag, len) in [(8, 100), (7, 99)] {
            let (mut a, mut b) = ends([0, 0]);
            let (from, to) = (Memory::new(1, Place::HOST, 100, 5), Memory::new(2, Place::HOST, len, 0));
            a.submit(0, from.departure(7, Place::HOST), &mut None, Instant::now()).unwrap();
            b.expect(0, to.arrival(tag)).unwrap();
            assert_eq!(run(&mut a, &mut b, 1).unwrap_err().kind(), ErrorKind::Protocol);
            assert!(to.holds(0));
        }
    }

    /// A path whose peer has shared an allocation of simulated GPU memory, which is `from`.
    fn sharing(from: &Memory) -> (LocalPath, LocalPath) {
        let (mut a, mut b) = ends([1, 1]);
        let export = Export {
            kind: ExportKind::SharedMemory,
            handle: [0; 64],
            fd: None,
            base: from.bytes.as_ptr() as u64,
            len: from.bytes.len() as u64,
            gpu: emulated::gpu(0),
        };
        b.imports.told(1, Place::gpu(0), export).unwrap();
        for _ in 0..3 {
            a.progress(&mut None, Instant::now(), &mut Vec::new()).ok();
            b.answer().unwrap();
        }
        assert_eq!(b.imports.count(), 1);
        (a, b)
    }

    /// What the peer makes of a chunk whose pieces are these.
    fn told(from: &Memory, to: &Memory, pieces: &[Extent]) -> Result<()> {
        let (mut a, mut b) = sharing(from);
        if let Some((own, _)) = &a.shelves {
            own.put(from.hold());
        }
        a.outbox.tell(7, pieces.iter().map(|p| u64::from(p.len)).sum(), pieces)?;
        b.expect(0, to.arrival(7))?;
        let start = Instant::now();
        while b.counts.received_chunks == 0 {
            b.progress(&mut None, Instant::now(), &mut Vec::new())?;
            assert!(start.elapsed().as_secs() < 60);
        }
        Ok(())
    }

    #[test]
    fn only_what_is_shared_is_pulled() {
        let from = Memory::new(1, Place::gpu(0), 1000, 5);
        let (gpu, host) = (Memory::new(2, Place::gpu(0), 100, 0), Memory::new(3, Place::HOST, 100, 0));
        let at = from.bytes.as_ptr() as u64;
        let piece = |addr, export| [Extent { addr, len: 100, export }];
        told(&from, &gpu, &piece(at + 900, 1)).unwrap();
        assert!(gpu.holds(5));
        for (to, piece) in [
            (&gpu, piece(at + 901, 1)),
            (&gpu, piece(at - 1, 1)),
            (&gpu, piece(0, 1)),
            (&gpu, piece(u64::MAX - 100, 1)),
            (&gpu, piece(at, 2)),
            (&gpu, piece(at, 0)),
            (&host, piece(at, 1)),
        ] {
            assert_eq!(told(&from, to, &piece).unwrap_err().kind(), ErrorKind::Protocol, "{piece:?}");
        }
        assert!(host.holds(0));
    }

    #[test]
    fn what_was_copied_after_its_owner_took_it_back_does_not_count() {
        let from = Memory::new(1, Place::gpu(0), 1000, 5);
        let to = Memory::new(2, Place::gpu(0), 1000, 0);
        let (a, mut b) = sharing(&from);
        if let Some((own, _)) = &a.shelves {
            own.put(from.hold());
        }
        let mut a = a;
        a.outbox.tell(7, 1000, &[Extent { addr: from.bytes.as_ptr() as u64, len: 1000, export: 1 }]).unwrap();
        b.expect(0, to.arrival(7)).unwrap();
        b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        assert!(b.copying() && from.region.in_use());
        drop(a);
        // The puller, which is in this process, keeps what it reads.
        assert!(from.region.in_use() && to.region.in_use());
        let error = (0..10).find_map(|_| b.progress(&mut None, Instant::now(), &mut Vec::new()).err());
        assert!(error.is_some_and(|e| e.kind() == ErrorKind::RemoteDisconnect));
        drop(b);
        assert!(!from.region.in_use() && !to.region.in_use());
    }

    #[test]
    fn a_path_that_ends_during_a_pull_touches_nothing_afterwards() {
        let from = Memory::new(1, Place::gpu(0), 1000, 5);
        let to = Memory::new(2, Place::gpu(0), 1000, 0);
        let (mut a, mut b) = sharing(&from);
        if let Some((own, _)) = &a.shelves {
            own.put(from.hold());
        }
        a.outbox.tell(7, 1000, &[Extent { addr: from.bytes.as_ptr() as u64, len: 1000, export: 1 }]).unwrap();
        b.expect(0, to.arrival(7)).unwrap();
        b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        drop(b);
        assert!(!to.region.in_use() && to.holds(0));
    }

    /// What `b` fails with once `a`'s process has said this.
    pub(super) fn error_after(notes: &[Note], a: &LocalPath, b: &mut LocalPath) -> Option<Error> {
        notes.iter().for_each(|note| assert!(a.socket.send(&note.encode(), None).unwrap()));
        (0..5).find_map(|_| {
            b.news.store(true, Ordering::Release);
            b.progress(&mut None, Instant::now(), &mut Vec::new()).err()
        })
    }

    #[test]
    fn notes_out_of_place_are_violations() {
        let export = || Export { kind: ExportKind::CudaIpc, handle: [0; 64], fd: None, base: 4096, len: 4096, gpu: [0; 16] };
        let share = |id, there, here| Note::Share { id, there, here, export: export() };
        let gpu = Place::gpu(0);
        for (gpus, notes) in [
            ([1, 1], vec![Note::Answer { id: 1, open: true }]),
            ([1, 1], vec![Note::End { id: 1 }]),
            ([1, 1], vec![share(0, gpu, gpu)]),
            ([1, 1], vec![share(5, gpu, gpu), share(5, gpu, gpu)]),
            ([1, 1], vec![share(1, Place::gpu(1), gpu)]),
            ([0, 0], vec![share(1, gpu, gpu)]),
            ([0, 0], vec![Note::End { id: 1 }]),
        ] {
            let (a, mut b) = ends(gpus);
            let error = error_after(&notes, &a, &mut b);
            assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol), "{notes:?}");
        }
    }

    #[test]
    fn a_peer_that_is_gone_is_no_error_here() {
        // Its control connection says why.
        let (a, mut b) = ends([1, 1]);
        drop(a);
        b.notes.push_back(Note::Ring);
        for _ in 0..5 {
            b.news.store(true, Ordering::Release);
            b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        }
        assert!(!b.attention());
    }

    #[test]
    fn pieces_are_laid_side_by_side() {
        let extent = |addr, len| Extent { addr, len, export: 0 };
        let part = |addr, len| Part { addr, len, region: 0 };
        let mut out = Vec::new();
        join(&[extent(100, 10), extent(110, 5), extent(500, 5)], &[part(1000, 12), part(2000, 8)], &mut out).unwrap();
        let piece = |src, dst, len| Piece { src, dst, len };
        assert_eq!(out, [piece(100, 1000, 12), piece(112, 2000, 3), piece(500, 2003, 5)]);
        assert!(
            join(&[extent(0, 1)], &[part(0, 2)], &mut out).is_err() && join(&[extent(0, 2)], &[part(0, 1)], &mut out).is_err()
        );
    }
}
