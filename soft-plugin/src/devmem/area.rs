//! GPU memory that one queue of a NIC writes, shared by the connections that it admits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use devmem::{Binding, Fragment, Nic};
use process::Mutex;

use super::host::{Bound, Host, Steered};
use super::layout::{Layout, BLOCKS, PATTERN, REGIONS};
use crate::device::{AreaMemory, DeviceMemory};

/// An area.
pub struct Area {
    nic: Nic,
    bound: Bound,
    /// For patterns, from the blocks.
    sends: Binding,
    host: Box<dyn Host>,
    memory: Box<dyn AreaMemory>,
    layout: Layout,
    free: Mutex<Free>,
    /// A pattern came out wrong: nothing that passes this NIC and this GPU can be trusted.
    untrusted: AtomicBool,
}

struct Free {
    seats: Vec<usize>,
    blocks: Vec<usize>,
}

/// A connection that the area admits, with its regions.
pub struct Seat {
    area: Arc<Area>,
    number: usize,
}

impl Seat {
    /// Where its regions begin.
    pub fn regions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..REGIONS).map(|i| self.area.layout.region_at(self.number * REGIONS + i))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.area.free.lock().seats.push(self.number);
    }
}

/// Room for a pattern on its way.
pub struct Block {
    area: Arc<Area>,
    number: usize,
}

impl Block {
    /// Where it begins in the area.
    pub fn at(&self) -> usize {
        self.area.layout.blocks_at() + self.offset()
    }

    /// Where it begins in the dma-buf that patterns are sent from.
    pub fn offset(&self) -> usize {
        self.number * PATTERN
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.area.free.lock().blocks.push(self.number);
    }
}

impl Area {
    /// Binds `len` bytes of the current GPU to a spare queue of a NIC.
    ///
    /// # Errors
    /// What is missing, in the kernel's words where it has some.
    pub fn open(device: &dyn DeviceMemory, nic: Nic, host: Box<dyn Host>, len: usize, limit: usize) -> Result<Area, String> {
        let rings = nic.rings().map_err(|e| format!("the driver does not describe its rings: {e}"))?;
        let layout = Layout::new(len, limit, rings.entries as usize)
            .map_err(|needed| format!("an area of {len} bytes admits no connection: {needed} are needed"))?;
        let memory = device.area(layout.len).map_err(|e| format!("no memory: {e}"))?;
        let at = memory.base() as usize;
        let export = |at, len| device.export(at, len).map_err(|e| format!("no dma-buf over device memory: {e}"));
        let (front, blocks) = (export(at, layout.front)?, export(at + layout.blocks_at(), BLOCKS * PATTERN)?);
        let bound = host.bind(&nic, front.as_fd())?;
        let sends = Binding::sending(nic.interface(), blocks.as_fd()).map_err(|e| format!("sending from device memory: {e}"))?;
        let free = Free { seats: (0..layout.connections).rev().collect(), blocks: (0..BLOCKS).rev().collect() };
        Ok(Area { nic, bound, sends, host, memory, layout, free: Mutex::new(free), untrusted: AtomicBool::new(false) })
    }

    /// One line about it.
    pub fn describe(&self) -> String {
        let Area { nic, bound, layout, .. } = self;
        format!(
            "queue {} of {} writes {} bytes, for {} receiving connections",
            bound.queue,
            nic.name(),
            layout.front,
            layout.connections
        )
    }

    /// Its NIC.
    pub fn nic(&self) -> &Nic {
        &self.nic
    }

    /// Its memory.
    pub fn memory(&self) -> &dyn AreaMemory {
        &*self.memory
    }

    /// Its queue.
    pub fn queue(&self) -> u32 {
        self.bound.queue
    }

    /// The binding for patterns.
    pub fn sends(&self) -> u32 {
        self.sends.id()
    }

    /// Admits a connection.
    ///
    /// # Errors
    /// There is no room, or the area is not to be trusted.
    pub fn admit(self: &Arc<Area>) -> io::Result<Seat> {
        if self.untrusted.load(Ordering::Acquire) {
            return Err(io::Error::other(format!("a pattern through {} came out wrong before", self.nic.name())));
        }
        match self.free.lock().seats.pop() {
            Some(number) => Ok(Seat { area: self.clone(), number }),
            None => Err(io::Error::other(format!("all {} connections that the area admits are there", self.layout.connections))),
        }
    }

    /// Nothing that comes through here can be trusted.
    pub fn distrust(&self) {
        self.untrusted.store(true, Ordering::Release);
    }

    /// Room for a pattern; `None`: later.
    pub fn block(self: &Arc<Area>) -> Option<Block> {
        let number = self.free.lock().blocks.pop()?;
        Some(Block { area: self.clone(), number })
    }

    /// Steers a connection to its queue.
    pub fn steer(&self, connection: BorrowedFd<'_>) -> io::Result<Steered> {
        self.host.steer(&self.nic, self.bound.queue, connection)
    }

    /// Whether a fragment lies where this area's queue writes.
    pub fn check(&self, fragment: &Fragment) -> Result<(), String> {
        if fragment.binding != self.bound.id {
            return Err(format!("a fragment of binding {}, not of this area's {}", fragment.binding, self.bound.id));
        }
        let end = fragment.offset.checked_add(u64::from(fragment.length));
        match end.filter(|end| *end <= self.layout.front as u64) {
            Some(_) => Ok(()),
            None => Err(format!("a fragment of {} bytes at {}, outside of the area", fragment.length, fragment.offset)),
        }
    }
}
