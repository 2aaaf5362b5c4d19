//! The payload connection of a receive comm, and what its receives hold of the area until they are consumed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use devmem::Tokens;
use nccl_net_abi::MAX_REQUESTS;
use process::Mutex;

use super::area::{Area, Seat};
use super::ends::reset;
use super::host::Steered;
use crate::device::Lender;

/// What a receive holds.
#[derive(Default)]
pub struct Holding {
    /// Fragments to give back.
    pub tokens: Tokens,
    /// The region with its bytes that came to the host.
    pub region: Option<usize>,
}

#[derive(Default)]
struct Held {
    rows: [Holding; MAX_REQUESTS],
    /// Fragments of no complete message.
    rest: Tokens,
    fragments: usize,
    /// Regions that hold nothing.
    regions: Vec<usize>,
}

impl Held {
    /// Everything that is to be given back.
    fn take_all(&mut self) -> Tokens {
        let mut all = std::mem::take(&mut self.rest);
        self.rows.iter_mut().for_each(|row| all.append(&mut row.tokens));
        all
    }
}

/// See the file's head.
pub struct Lent {
    /// The process that made it: a forked child has a copy of the connection, which is not the child's to end.
    generation: u64,
    // Field order is drop order: the connection ends, and with it what it holds; then its rule and its place.
    connection: OwnedFd,
    _rule: Steered,
    seat: Seat,
    area: Arc<Area>,
    held: Mutex<Held>,
    /// The comm waits until something is consumed.
    waits: AtomicBool,
}

impl Lent {
    /// A connection that the area admits and that is steered to its queue.
    pub fn new(connection: OwnedFd, rule: Steered, seat: Seat, area: Arc<Area>) -> Lent {
        let held = Mutex::new(Held { regions: seat.regions().collect(), ..Held::default() });
        Lent { generation: process::generation(), connection, _rule: rule, seat, area, held, waits: AtomicBool::new(false) }
    }

    /// Its seat.
    pub fn seat(&self) -> &Seat {
        &self.seat
    }

    /// Keeps fragments of no complete message, until the connection ends or [`Lent::give_back`].
    pub fn keep(&self, mut tokens: Tokens) {
        self.held.lock().rest.append(&mut tokens);
    }

    /// Gives back what was kept.
    pub fn give_back(&self) -> io::Result<()> {
        let mut rest = std::mem::take(&mut self.held.lock().rest);
        devmem::give_back(self.connection.as_fd(), &mut rest)
    }

    /// Its area.
    pub fn area(&self) -> &Arc<Area> {
        &self.area
    }

    /// The connection.
    pub fn connection(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Takes a region, if one is free.
    pub fn take_region(&self) -> Option<usize> {
        self.held.lock().regions.pop()
    }

    /// Whether a region is free.
    pub fn has_region(&self) -> bool {
        !self.held.lock().regions.is_empty()
    }

    /// Fragments that receives hold which are not consumed.
    pub fn fragments(&self) -> usize {
        self.held.lock().fragments
    }

    /// The comm waits for `ready`, which the next consumption may bring: whether it must.
    pub fn wait_for(&self, ready: impl Fn() -> bool) -> bool {
        self.waits.store(true, Ordering::SeqCst);
        // A consumption before the flag was visible has woken no one.
        !(ready() && self.waits.swap(false, Ordering::SeqCst))
    }

    /// The receive in this row is complete, and holds this.
    pub fn hold(&self, row: usize, holding: Holding) {
        let mut held = self.held.lock();
        held.fragments += holding.tokens.len();
        held.rows[row] = holding;
    }
}

impl Lender for Lent {
    fn base(&self) -> *mut u8 {
        self.area.memory().base()
    }

    fn consumed(&self, row: usize) -> io::Result<bool> {
        let mut holding = std::mem::take(&mut self.held.lock().rows[row]);
        let fragments = holding.tokens.len();
        if let Err(error) = devmem::give_back(self.connection.as_fd(), &mut holding.tokens) {
            self.keep(holding.tokens);
            return Err(error);
        }
        let mut held = self.held.lock();
        held.fragments -= fragments;
        held.regions.extend(holding.region);
        drop(held);
        Ok(self.waits.swap(false, Ordering::SeqCst))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.generation != process::generation() {
            return;
        }
        // The agent, or a forked child, may have a copy of the connection, and not end it: what the connection holds then would be missing
        // for others of the area, which get its seat.
        let mut all = self.held.lock().take_all();
        let _ = devmem::give_back(self.connection.as_fd(), &mut all);
        reset(self.connection.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_gives_back_every_token() {
        let mut held = Held::default();
        (0..40).for_each(|token| held.rows[token as usize % MAX_REQUESTS].tokens.add(token));
        (40..44).for_each(|token| held.rest.add(token));
        let mut all = held.take_all();
        assert_eq!((all.len(), held.take_all().len()), (44, 0));
        let (ranges, count) = all.take();
        assert_eq!((ranges.len(), ranges[0].first, count), (1, 0, 44));
    }
}
