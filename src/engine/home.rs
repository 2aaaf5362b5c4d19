//! What a connection needs of its engine while it lives: the registry, the bell of the progress thread, the table that it leaves at
//! its end, and a clock.

use super::bell::{Bell, WAKE};
use super::connection::Connection;
use super::connections::Connections;
use super::counters::Counters;
use super::registry::Registry;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A connection without anything to read for so long is left to the progress thread again, microseconds.
const RECENT_US: u64 = 1000;

/// Connections that a thread drives while it looks for notifications, and when each last had something.
#[derive(Default)]
struct Recent {
    list: Vec<(Arc<Connection>, u64)>,
    tokens: Vec<u64>,
}

pub(crate) struct Home {
    pub registry: Arc<Registry>,
    pub connections: Connections,
    pub bell: Bell,
    pub counters: Counters,
    /// The channels ring the bell; without, the progress thread must poll while work is in flight.
    pub doorbells: bool,
    /// Threads compete for cores: nobody spins while another could work.
    pub few_cores: bool,
    pub close_timeout: Duration,
    /// The connection and transfer that was polled last, as one number.
    last_polled: AtomicU64,
    /// Connections that the progress thread is asked to drive.
    asked: Mutex<Vec<u64>>,
    any_asked: AtomicBool,
    recent: Mutex<Recent>,
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
            counters: Counters::default(),
            doorbells,
            few_cores: std::thread::available_parallelism().map_or(2, usize::from) <= 2,
            close_timeout,
            last_polled: AtomicU64::new(0),
            asked: Mutex::default(),
            any_asked: AtomicBool::new(false),
            recent: Mutex::default(),
            ended: AtomicBool::new(false),
            start: Instant::now(),
        }
    }

    /// Asks the progress thread to drive a connection.
    pub(crate) fn attend(&self, id: u64) {
        let mut asked = self.asked.lock();
        if !asked.contains(&id) {
            asked.push(id);
        }
        drop(asked);
        self.any_asked.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    /// Whether some connection is to be driven.
    pub(crate) fn has_asked(&self) -> bool {
        self.any_asked.load(Ordering::SeqCst)
    }

    /// Takes the connections that are to be driven.
    pub(crate) fn asked(&self, mut each: impl FnMut(u64)) {
        if self.any_asked.swap(false, Ordering::SeqCst) {
            let ids = std::mem::take(&mut *self.asked.lock());
            ids.into_iter().for_each(&mut each);
        }
    }

    /// A round by an application thread that looks for notifications: drives the connections with something to read, and for a while
    /// those that had something before.
    pub(crate) fn drive_ready(&self) {
        let Some(mut recent) = self.recent.try_lock() else { return };
        let now = self.clock();
        recent.tokens.clear();
        let mut tokens = std::mem::take(&mut recent.tokens);
        self.bell.ready(&mut tokens);
        for &id in tokens.iter().filter(|&&id| id != WAKE) {
            if recent.list.iter().all(|(connection, _)| connection.id != id) {
                recent.list.extend(self.connections.get(id).map(|connection| (connection, now)));
            }
        }
        recent.tokens = tokens;
        recent.list.retain_mut(|(connection, last)| {
            if connection.drive_for_application() {
                *last = now;
            }
            now.saturating_sub(*last) < RECENT_US
        });
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

    /// Since the engine started.
    pub(crate) fn age(&self) -> Duration {
        self.start.elapsed()
    }

    /// Microseconds since the engine started, from 1.
    pub(crate) fn clock(&self) -> u64 {
        self.start.elapsed().as_micros() as u64 + 1
    }
}
