//! GPU memory that one queue of a NIC writes, shared by the connections that it admits.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use devmem::{Binding, Calls, Fragment, Nic};
use process::Mutex;

use super::ends::reset;
use super::host::{Bound, Host, Steered};
use super::layout::{Layout, BLOCKS, PATTERN, REGIONS};
use super::pattern;
use super::seats::{Refusal, Seats, Taken};
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
    seats: Seats,
    blocks: Mutex<Blocks>,
}

struct Blocks {
    free: Vec<usize>,
    /// Blocks of proofs that have failed, whose packets may still be on their way.
    late: Vec<Late>,
}

struct Late {
    number: usize,
    connection: OwnedFd,
    calls: Calls,
}

/// A connection that the area admits, with its regions.
pub struct Seat {
    area: Arc<Area>,
    taken: Taken,
}

impl Seat {
    /// Where its regions begin.
    pub fn regions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..REGIONS).map(|i| self.area.layout.region_at(self.taken.number * REGIONS + i))
    }

    /// No pattern from its peer has come out wrong since it was admitted.
    pub fn is_trusted(&self) -> bool {
        self.taken.is_trusted()
    }

    /// Its pattern came out wrong: nothing that comes from this peer to this area can be trusted.
    pub fn distrust(&self) {
        self.area.seats.distrust(self.taken.peer, Instant::now());
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.area.seats.leave(self.taken.number);
    }
}

/// Room for a pattern on its way.
pub struct Block {
    area: Arc<Area>,
    number: usize,
    /// Packets may still be sent from it.
    late: bool,
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
        if !self.late {
            self.area.blocks.lock().free.push(self.number);
        }
    }
}

impl Area {
    /// Binds `len` bytes of the current GPU to a spare queue of a NIC.
    ///
    /// # Errors
    /// What is missing, in the kernel's words where it has some.
    pub fn open(device: &dyn DeviceMemory, nic: Nic, host: Box<dyn Host>, len: usize, limit: usize) -> Result<Area, String> {
        let rings = nic.rings().map_err(|e| format!("the driver does not describe its rings: {e}"))?;
        let layout = layout(len, limit, rings.entries as usize)?;
        let Exported { memory, front, blocks } = exported(device, &layout)?;
        let bound = host.bind(&nic, front.as_fd())?;
        let sends = Binding::sending(nic.interface(), blocks.as_fd()).map_err(|e| format!("sending from device memory: {e}"))?;
        let (seats, blocks) = (Seats::new(layout.connections), Blocks { free: (0..BLOCKS).rev().collect(), late: Vec::new() });
        Ok(Area { nic, bound, sends, host, memory, layout, seats, blocks: Mutex::new(blocks) })
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

    /// Admits a connection from a peer.
    ///
    /// # Errors
    /// There is no room, or the peer is not to be trusted.
    pub fn admit(self: &Arc<Area>, peer: IpAddr) -> io::Result<Seat> {
        let taken = self.seats.take(peer, Instant::now()).map_err(|refusal| {
            io::Error::other(match refusal {
                Refusal::Wrong => format!("a pattern from {peer} through {} came out wrong before", self.nic.name()),
                Refusal::Full => format!("all {} connections that the area admits are there", self.layout.connections),
            })
        })?;
        Ok(Seat { area: self.clone(), taken })
    }

    /// Room for a pattern; `None`: later.
    pub fn block(self: &Arc<Area>) -> Option<Block> {
        let mut blocks = self.blocks.lock();
        let Blocks { free, late } = &mut *blocks;
        late.retain_mut(|late| {
            // Other errors than those of calls are of no interest any more.
            let _ = devmem::completed(late.connection.as_fd(), &mut late.calls);
            if late.calls.all_ended() {
                free.push(late.number);
            }
            !late.calls.all_ended()
        });
        Some(Block { area: self.clone(), number: free.pop()?, late: false })
    }

    /// A pattern that was being sent is not needed any more: its block is used again once no packet is sent from it.
    pub fn settle(&self, connection: OwnedFd, mut block: Block, calls: Calls) {
        if !calls.all_ended() {
            reset(connection.as_fd());
            block.late = true;
            self.blocks.lock().late.push(Late { number: block.number, connection, calls });
        }
    }

    /// Steers a connection to its queue.
    pub fn steer(&self, connection: BorrowedFd<'_>) -> io::Result<Steered> {
        self.host.steer(&self.nic, self.bound.queue, connection)
    }

    /// Whether a fragment lies where this area's queue writes.
    pub fn check(&self, fragment: &Fragment) -> Result<(), String> {
        check(fragment, self.bound.id, self.layout.front as u64)
    }
}

/// The memory of an area, and dma-bufs over what a NIC writes and over the blocks for patterns.
struct Exported {
    memory: Box<dyn AreaMemory>,
    front: OwnedFd,
    blocks: OwnedFd,
}

fn layout(len: usize, limit: usize, entries: usize) -> Result<Layout, String> {
    Layout::new(len, limit, entries).map_err(|needed| format!("an area of {len} bytes admits no connection: {needed} are needed"))
}

fn exported(device: &dyn DeviceMemory, layout: &Layout) -> Result<Exported, String> {
    let memory = device.area(layout.len).map_err(|e| format!("no memory: {e}"))?;
    let at = memory.base() as usize;
    let export = |at, len| device.export(at, len).map_err(|e| format!("no dma-buf over device memory: {e}"));
    let (front, blocks) = (export(at, layout.front)?, export(at + layout.blocks_at(), BLOCKS * PATTERN)?);
    Ok(Exported { memory, front, blocks })
}

/// Exports an area of the current GPU as for a NIC, has the GPU write a pattern where a NIC reads it and where a NIC writes, and read both back.
///
/// # Errors
/// What is missing, or what came out wrong.
pub fn try_export(device: &dyn DeviceMemory, len: usize, limit: usize) -> Result<(), String> {
    let layout = layout(len, limit, 0)?;
    let Exported { memory, front, blocks } = exported(device, &layout)?;
    for (name, dmabuf, at, len) in [("front", front, 0, layout.front), ("blocks", blocks, layout.blocks_at(), BLOCKS * PATTERN)] {
        // SAFETY: a descriptor of ours. The end of a dma-buf is its size.
        let size = unsafe { libc::lseek(dmabuf.as_raw_fd(), 0, libc::SEEK_END) };
        if size != len as i64 {
            return Err(format!("the dma-buf over the {name} of an area of {len} bytes has {size}"));
        }
        let (mut sent, mut found) = (vec![0; PATTERN], vec![0; PATTERN]);
        pattern::fill(name.as_bytes(), &mut sent);
        let io = memory.write(at, &sent).and_then(|()| memory.read(at, &mut found));
        io.map_err(|e| format!("the GPU does not write and read the {name} of an area: {e}"))?;
        if let Some(place) = pattern::difference(&sent, 0, &found) {
            return Err(format!("a pattern that the GPU wrote to the {name} of an area came out wrong at byte {place}"));
        }
    }
    Ok(())
}

fn check(fragment: &Fragment, binding: u32, front: u64) -> Result<(), String> {
    if fragment.binding != binding {
        return Err(format!("a fragment of binding {}, not of this area's {binding}", fragment.binding));
    }
    let end = fragment.offset.checked_add(u64::from(fragment.length));
    match end.filter(|end| *end <= front) {
        Some(_) => Ok(()),
        None => Err(format!("a fragment of {} bytes at {}, outside of the area", fragment.length, fragment.offset)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fragments_of_its_own_binding_and_within_it_are_taken() {
        let at = |offset, length, binding| check(&Fragment { offset, length, token: 1, binding }, 7, 1 << 20);
        assert!(at(0, 4096, 7).is_ok() && at((1 << 20) - 1, 1, 7).is_ok());
        for (offset, length, binding) in [(0, 4096, 8), (0, 4096, 0), (1 << 20, 1, 7), ((1 << 20) - 1, 2, 7), (u64::MAX, 2, 7)] {
            assert!(at(offset, length, binding).is_err(), "{length} bytes at {offset} of {binding}");
        }
    }
}
