//! What a connection needs of its engine while it lives: the registry, the bell of the progress thread, the table that it leaves at
//! its end, and a clock.

use super::bell::Bell;
use super::connections::Connections;
use super::registry::Registry;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) struct Home {
    pub registry: Arc<Registry>,
    pub connections: Connections,
    pub bell: Bell,
    /// The channels ring the bell; without, the progress thread must poll while work is in flight.
    pub doorbells: bool,
    /// Threads compete for cores: nobody spins while another could work.
    pub few_cores: bool,
    pub close_timeout: Duration,
    /// The connection and transfer that was polled last, as one number.
    last_polled: AtomicU64,
    /// The progress thread is to end.
    ended: AtomicBool,
    start: Instant,
}

impl Home {
    pub(crate) fn new(bell: Bell, doorbells: bool, close_timeout: Duration) -> Home {
        Home {
            registry: Arc::new(Registry::new()),
            connections: Connections::default(),
            bell,
            doorbells,
            few_cores: std::thread::available_parallelism().map_or(2, usize::from) <= 2,
            close_timeout,
            last_polled: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            start: Instant::now(),
        }
    }

    /// An application thread added work. A plugin without doorbells, and a backlog on a control socket, need the progress thread.
    pub(crate) fn work_added(&self, backlog: bool) {
        if backlog || !self.doorbells {
            self.bell.ring();
        }
    }

    /// Notes a poll; whether the one before was of the same transfer.
    pub(crate) fn polled_again(&self, connection: u64, transfer: u64) -> bool {
        let this = connection.rotate_right(16) ^ transfer;
        self.last_polled.swap(this, Ordering::Relaxed) == this
    }

    /// Ends the progress thread.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.bell.arm(true);
        self.bell.ring();
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Microseconds since the engine started, from 1.
    pub(crate) fn clock(&self) -> u64 {
        self.start.elapsed().as_micros() as u64 + 1
    }
}
