//! The payload connection of a receive comm, and what its receives hold of the area until they are consumed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use devmem::Tokens;
use nccl_net_abi::MAX_REQUESTS;
use process::Mutex;

use super::area::{Area, Seat};
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

struct Held {
    rows: [Holding; MAX_REQUESTS],
    fragments: usize,
    /// Regions that hold nothing.
    regions: Vec<usize>,
}

/// See the file's head.
pub struct Lent {
    // Field order is drop order: the connection ends, and with it what it holds; then its rule and its place.
    connection: OwnedFd,
    _rule: Steered,
    _seat: Seat,
    area: Arc<Area>,
    held: Mutex<Held>,
    /// The comm waits until something is consumed.
    waits: AtomicBool,
}

impl Lent {
    /// A connection that the area admits and that is steered to its queue.
    pub fn new(connection: OwnedFd, rule: Steered, seat: Seat, area: Arc<Area>) -> Lent {
        let held = Held { rows: Default::default(), fragments: 0, regions: seat.regions().collect() };
        Lent { connection, _rule: rule, _seat: seat, area, held: Mutex::new(held), waits: AtomicBool::new(false) }
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
        devmem::give_back(self.connection.as_fd(), &mut holding.tokens)?;
        let mut held = self.held.lock();
        held.fragments -= fragments;
        held.regions.extend(holding.region);
        drop(held);
        Ok(self.waits.swap(false, Ordering::SeqCst))
    }
}
