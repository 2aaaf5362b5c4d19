//! One side of a simulated connection: a machine with its channels, memory that knows when it was given back, and the bytes
//! between it and its peer.

use super::direct::SimulatedDirect;
use super::net::{Net, SimulatedPath};
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
    pub bytes: Box<[u8]>,
    pub mr: u64,
    pub place: Place,
    retired: Option<Retired>,
    pub freed: bool,
}

impl Memory {
    pub(super) fn addr(&self) -> u64 {
        self.bytes.as_ptr() as u64
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

/// One side of the connection.
pub(super) struct Side {
    pub machine: Machine,
    pub channels: Channels,
    pub registry: Arc<Registry>,
    pub queue: Arc<Queue>,
    pub engine: [u8; 16],
    pub memory: Vec<Memory>,
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
    pub(super) fn new(net: &Arc<Mutex<Net>>, side: usize, chunk_bytes: usize, eager_bytes: usize, now: Instant) -> Side {
        Side::with_timeouts(net, side, [chunk_bytes, eager_bytes], [TRANSFER_TIMEOUT, PEER_TIMEOUT], now)
    }

    /// `sizes`: of chunks and of eager transfers. `timeouts`: of transfers, and of the peer.
    pub(super) fn with_timeouts(
        net: &Arc<Mutex<Net>>,
        side: usize,
        [chunk_bytes, eager_bytes]: [usize; 2],
        [transfer_timeout, peer_timeout]: [Duration; 2],
        now: Instant,
    ) -> Side {
        let registry = Arc::new(Registry::new());
        net.lock().direct.registries[side] = Some(registry.clone());
        let queue = Queue::new(1 << 30, 256 << 20, &Arc::default());
        let account = Pool::endless().account([127, 0, 0, 1].into());
        let setting = Setting {
            registry: registry.clone(),
            inbox: Inbox::new(&queue, &account),
            account,
            lines: Arc::new(Limiter::new(1000)),
            eager_bytes,
            peer: format!("side {}", 1 - side),
            transfer_timeout,
            nic_timeout: transfer_timeout / 4,
            peer_timeout,
            heartbeat: crate::proto::heartbeat(peer_timeout),
            match_timeout: MATCH_TIMEOUT,
            doorbells: false,
        };
        let paths: Vec<Box<dyn crate::channel::path::Path>> = vec![
            Box::new(SimulatedPath::new(net, side, 0, DEVICE_CHANNELS, true, chunk_bytes)),
            Box::new(SimulatedPath::new(net, side, DEVICE_CHANNELS, HOST_CHANNELS, false, chunk_bytes)),
        ];
        Side {
            machine: Machine::new(setting, now),
            channels: Channels::new(Some(Box::new(SimulatedDirect::new(net, side))), paths, Some(Box::new(EmulatedDevice))),
            registry,
            queue,
            engine: [side as u8 + 1; 16],
            memory: Vec::new(),
            rx: RxBuffer::default(),
            sent: SentRecords::new(0),
            partial: Vec::new(),
            opened: 0,
            news: 0,
            suspended: false,
            out: VecDeque::new(),
            room: 64 << 10,
            mute: false,
        }
    }

    /// Registers new memory and returns its index.
    pub(super) fn allocate(&mut self, bytes: Vec<u8>, place: Place) -> usize {
        let bytes = bytes.into_boxed_slice();
        let mr = self
            .registry
            .add(bytes.as_ptr() as u64, bytes.len() as u64, place, crate::types::RemoteAccess::ALL)
            .expect("register");
        self.memory.push(Memory { bytes, mr, place, retired: None, freed: false });
        self.memory.len() - 1
    }

    /// The FIFO item by which the peer reaches some memory.
    pub(super) fn item(&self, index: usize) -> Option<FifoItem> {
        let memory = &self.memory[index];
        let token = self.registry.local(memory.mr).ok()?.token;
        let access = Access { region: memory.mr, token, engine: self.engine, place: memory.place };
        Some(FifoItem::new(memory.addr(), memory.bytes.len() as u64, &access))
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
    pub(super) fn hear(&mut self, bytes: &[u8], now: Instant) {
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
