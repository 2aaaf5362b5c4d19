//! Engines, and the connections between them. An engine has memory that knows when it was given back, and what its connections share. A
//! side of a connection is a machine with its channels, and the bytes between it and its peer.

use super::direct::SimulatedDirect;
use super::net::{Net, SimulatedPath};
use super::positions::Positions;
use crate::budget::Pool;
use crate::channel::device::EmulatedDevice;
use crate::channel::router::Channels;
use crate::engine::fifo::{Access, FifoItem};
use crate::logging::Limiter;
use crate::notify::{Inbox, Queue};
use crate::proto::{Machine, Scheduled, Setting};
use crate::registry::{Registry, Retired};
use crate::status::{Error, Result};
use crate::types::Place;
use crate::wire::queue::{RxBuffer, MAX_FRAMES};
use crate::wire::sent::SentRecords;
use process::Mutex;
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) const TRANSFER_TIMEOUT: Duration = Duration::from_secs(10);
pub(super) const PEER_TIMEOUT: Duration = Duration::from_secs(12);
pub(super) const MATCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Fills memory that was given back to its owner.
const FREED: u8 = 0xDD;

/// Bytes in front of the frames of a record: their number, and how many records of the peer were opened.
const RECORD: usize = 16;
/// So many bytes of the peer are acknowledged at once.
const ACKNOWLEDGE: usize = 4 << 10;

/// A piece of memory, registered until it is given back.
pub(super) struct Memory {
    /// Empty where it has positions instead.
    pub bytes: Box<[u8]>,
    addr: u64,
    pub len: usize,
    pub mr: u64,
    pub place: Place,
    retired: Option<Retired>,
    pub freed: bool,
}

impl Memory {
    pub(super) fn addr(&self) -> u64 {
        self.addr
    }

    /// The current bytes; the network writes them through pointers.
    pub(super) fn now(&self) -> &[u8] {
        let from = std::hint::black_box(self.bytes.as_ptr());
        // SAFETY: the box's own memory, and nothing writes it while the harness looks.
        unsafe { std::slice::from_raw_parts(from, self.bytes.len()) }
    }

    pub(super) fn is_registered(&self) -> bool {
        self.retired.is_none()
    }
}

/// An engine.
pub(super) struct Engine {
    pub registry: Arc<Registry>,
    pub queue: Arc<Queue>,
    pub id: [u8; 16],
    pub memory: Vec<Memory>,
    /// What its peers may use, and the log lines that they may cause.
    pub pool: Arc<Pool>,
    lines: Arc<Limiter>,
    /// Numbers its connections, from its own number on.
    connections: AtomicUsize,
}

impl Engine {
    pub(super) fn new(number: usize, pool: Arc<Pool>) -> Engine {
        let mut id = [1; 16];
        id[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
        Engine {
            registry: Arc::new(Registry::new()),
            queue: Queue::new(1 << 30, 256 << 20, &Arc::default()),
            id,
            memory: Vec::new(),
            pool,
            lines: Arc::new(Limiter::new(1000)),
            connections: AtomicUsize::new(number),
        }
    }

    /// Registers new memory and returns its index.
    pub(super) fn allocate(&mut self, bytes: Vec<u8>, place: Place) -> usize {
        let bytes = bytes.into_boxed_slice();
        self.register(bytes.as_ptr() as u64, bytes.len(), bytes, place)
    }

    /// Registers memory that has positions in place of bytes.
    pub(super) fn reserve(&mut self, positions: &Mutex<Positions>, len: usize) -> usize {
        let addr = positions.lock().reserve(len as u64);
        self.register(addr, len, Box::default(), Place::HOST)
    }

    fn register(&mut self, addr: u64, len: usize, bytes: Box<[u8]>, place: Place) -> usize {
        let mr = self.registry.add(addr, len as u64, place, crate::types::RemoteAccess::ALL).expect("register");
        self.memory.push(Memory { bytes, addr, len, mr, place, retired: None, freed: false });
        self.memory.len() - 1
    }

    /// The FIFO item by which a peer reaches some memory.
    pub(super) fn item(&self, index: usize) -> Option<FifoItem> {
        let memory = &self.memory[index];
        let token = self.registry.local(memory.mr).ok()?.token;
        let access = Access { region: memory.mr, token, engine: self.id, place: memory.place };
        Some(FifoItem::new(memory.addr(), memory.len as u64, &access))
    }

    /// Starts to give memory back.
    pub(super) fn deregister(&mut self, index: usize) {
        let memory = &mut self.memory[index];
        if memory.retired.is_none() {
            memory.retired = self.registry.retire(memory.mr).ok();
        }
    }

    /// Returns memory that is no longer used to its owner, who may use it for something else.
    pub(super) fn reclaim(&mut self) {
        for memory in &mut self.memory {
            if !memory.freed && memory.retired.as_ref().is_some_and(|r| !r.in_use()) {
                memory.freed = true;
                memory.bytes.fill(FREED);
            }
        }
    }

    /// Freed memory that was written since.
    pub(super) fn written_after_free(&self) -> Option<usize> {
        const BLOCK: [u8; 4096] = [FREED; 4096];
        let intact = |m: &Memory| m.now().chunks(BLOCK.len()).all(|piece| piece == &BLOCK[..piece.len()]);
        self.memory.iter().position(|m| m.freed && !intact(m))
    }
}

/// How the connections of a simulation are made.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Channels for device memory, and for the rest.
    pub device: usize,
    pub host: usize,
    /// Bytes of a chunk and of an eager transfer, at most.
    pub chunk_bytes: usize,
    pub eager_bytes: usize,
    /// Bytes of the control connection that its socket holds.
    pub room: usize,
    pub transfer_timeout: Duration,
    pub peer_timeout: Duration,
}

impl Shape {
    /// `chunk_bytes`, `eager_bytes`: at most.
    pub(super) fn of(chunk_bytes: usize, eager_bytes: usize) -> Shape {
        let (transfer_timeout, peer_timeout) = (TRANSFER_TIMEOUT, PEER_TIMEOUT);
        let (device, host) = (DEVICE_CHANNELS, HOST_CHANNELS);
        Shape { device, host, chunk_bytes, eager_bytes, room: 64 << 10, transfer_timeout, peer_timeout }
    }
}

/// One side of a connection.
pub(super) struct Side {
    pub machine: Machine,
    pub channels: Channels,
    rx: RxBuffer,
    /// Records that the socket has yet to take, or that the peer has not acknowledged.
    pub sent: SentRecords,
    /// The record of the peer that arrives, how many were opened, and how many bytes of them the peer does not know of.
    partial: Vec<u8>,
    opened: u64,
    news: usize,
    /// Its control connection has failed.
    pub suspended: bool,
    /// Bytes of its control connection that the socket has taken and that have not reached the peer, and how many the socket
    /// takes.
    pub out: VecDeque<u8>,
    pub room: usize,
    /// Nothing of it reaches the peer any more.
    pub mute: bool,
}

/// How many channels a simulated connection has for device memory, and how many for the rest.
pub(super) const DEVICE_CHANNELS: usize = 2;
pub(super) const HOST_CHANNELS: usize = 3;

impl Side {
    /// `peer`: the number of the engine at the other side.
    pub(super) fn new(engine: &Engine, peer: usize, net: &Arc<Mutex<Net>>, side: usize, shape: &Shape, now: Instant) -> Side {
        net.lock().direct.registries[side] = Some(engine.registry.clone());
        let account = engine.pool.account(Ipv4Addr::from_bits(10 << 24 | peer as u32).into());
        let setting = Setting {
            registry: engine.registry.clone(),
            inbox: Inbox::new(&engine.queue, &account),
            account,
            lines: engine.lines.clone(),
            eager_bytes: shape.eager_bytes,
            peer: format!("engine {peer}"),
            transfer_timeout: shape.transfer_timeout,
            nic_timeout: shape.transfer_timeout / 4,
            peer_timeout: shape.peer_timeout,
            heartbeat: crate::proto::heartbeat(shape.peer_timeout),
            match_timeout: MATCH_TIMEOUT,
            doorbells: false,
        };
        let number = engine.connections.fetch_add(1, Ordering::Relaxed);
        let path = |first, channels, device| -> Box<dyn crate::channel::path::Path> {
            let path = SimulatedPath::new(net, side, first, channels, device, shape.chunk_bytes);
            Box::new(path.beginning_with(number))
        };
        let mut paths = vec![path(shape.device, shape.host, false)];
        if shape.device > 0 {
            paths.insert(0, path(0, shape.device, true));
        }
        Side {
            machine: Machine::new(setting, now),
            channels: Channels::new(
                Some(Box::new(SimulatedDirect::new(net, side))),
                paths,
                Some(Box::<EmulatedDevice>::default()),
            ),
            rx: RxBuffer::default(),
            sent: SentRecords::new(0),
            partial: Vec::new(),
            opened: 0,
            news: 0,
            suspended: false,
            out: VecDeque::new(),
            room: shape.room,
            mute: false,
        }
    }

    /// Ends the connection on this side.
    pub(super) fn fail(&mut self, error: Error, now: Instant) {
        if self.machine.dead().is_some() {
            return;
        }
        self.machine.fail(error.clone(), &mut self.channels);
        self.machine.say_bye(Some(&error), now);
        self.flush(now);
    }

    /// Bytes of the peer's control connection arrive.
    pub(super) fn receive(&mut self, bytes: &[u8], now: Instant) {
        self.partial.extend_from_slice(bytes);
        while let Some(&header) = self.partial.first_chunk::<RECORD>() {
            let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
            let len = RECORD + number(0) as usize;
            if self.partial.len() < len {
                break;
            }
            let record: Vec<u8> = self.partial.drain(..len).collect();
            (self.opened, self.news) = (self.opened + 1, self.news + len);
            if let Err(e) = self.sent.acknowledged(number(8)) {
                return self.fail(e, now);
            }
            self.hear_frames(&record[RECORD..], now);
        }
    }

    /// Seals a record without hiding anything.
    fn seal(&mut self, frames: &[u8]) {
        let mut record = (frames.len() as u64).to_le_bytes().to_vec();
        record.extend_from_slice(&self.opened.to_le_bytes());
        record.extend_from_slice(frames);
        self.news = 0;
        self.sent.push(record);
    }

    /// Its control connection has failed. Returns how many records of the peer were opened.
    pub(super) fn suspend(&mut self) -> u64 {
        self.partial.clear();
        self.suspended = true;
        self.opened
    }

    /// It goes on over another one, of which nothing has arrived. Returns how many records are sent again.
    pub(super) fn resume(&mut self, opened: u64, now: Instant) -> usize {
        let before = self.sent.unwritten();
        if let Err(e) = self.sent.resume(opened) {
            self.fail(e, now);
            return 0;
        }
        self.suspended = false;
        self.machine.on_moved(self.sent.unwritten(), now);
        usize::from(self.sent.unwritten() > before)
    }

    /// Frames of the peer arrive, without the records in which they come.
    pub(super) fn hear_frames(&mut self, bytes: &[u8], now: Instant) {
        let kept = self.rx.extend(bytes);
        if self.machine.dead().is_some() {
            return;
        }
        if let Err(e) = kept.and_then(|()| self.frames(bytes.len(), now)) {
            self.fail(e, now);
        }
    }

    fn frames(&mut self, heard: usize, now: Instant) -> Result<()> {
        self.machine.on_received(heard, self.rx.arriving(), now);
        while let Some((frame, len)) = self.rx.next()? {
            self.machine.handle(frame, &mut self.channels, now)?;
            self.rx.consume(len);
        }
        Ok(())
    }

    /// Drives this side once.
    pub(super) fn poll(&mut self, now: Instant) {
        if self.machine.dead().is_some() {
            return;
        }
        if let Err(e) = self.round(now) {
            self.fail(e, now);
        }
    }

    fn round(&mut self, now: Instant) -> Result<()> {
        self.machine.drive_channels(&mut self.channels, now)?;
        while self.machine.schedule(&mut self.channels, 3, now)? == Scheduled::Limit {}
        if now >= self.machine.next_tick() {
            self.machine.tick(&mut self.channels, now)?;
        }
        self.flush(now);
        Ok(())
    }

    /// Bytes of its control connection that have not reached the peer.
    pub(super) fn unheard(&self) -> usize {
        self.machine.unsent() + self.sent.unwritten() + self.out.len()
    }

    /// The socket takes as much of the queue as it has room for.
    pub(super) fn flush(&mut self, now: Instant) {
        let owes = self.news > ACKNOWLEDGE;
        if self.suspended || (!owes && self.machine.unsent() + self.sent.unwritten() == 0) {
            return;
        }
        let mut took = 0;
        loop {
            let Some(bytes) = self.sent.next() else {
                match self.machine.tx().take() {
                    Some(block) => {
                        block.frames().chunks(MAX_FRAMES).for_each(|frames| self.seal(frames));
                        self.machine.tx().recycle(block.into_bytes());
                    }
                    None if self.news > ACKNOWLEDGE => self.seal(&[]),
                    None => break,
                }
                continue;
            };
            let n = bytes.len().min(self.room.saturating_sub(self.out.len()));
            if n == 0 {
                break;
            }
            if !self.mute {
                self.out.extend(&bytes[..n]);
            }
            self.sent.wrote(n);
            took += n;
        }
        self.machine.on_sent(took, self.sent.unwritten(), now);
    }
}
