//! What a connection needs from its engine: the registry, the queue of the progress thread, the counters, and a clock. Knows
//! nothing about connections.

use super::counters::Counters;
use super::doorbell::Bell;
use super::pacing::Cores;
use super::restoring::Restoring;
use crate::engine::setup::accept_queue::Dead;
use crate::events::Events;
use crate::logging::Limiter;
use crate::registry::Registry;
use process::Mutex;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections that the progress thread is asked to drive, and the doorbell that wakes it.
pub(crate) struct DriveQueue {
    pub bell: Bell,
    asked: Mutex<HashSet<u64>>,
    any_asked: AtomicBool,
}

impl DriveQueue {
    fn new(bell: Bell) -> DriveQueue {
        DriveQueue { bell, asked: Mutex::default(), any_asked: AtomicBool::new(false) }
    }

    /// Asks the progress thread to drive a connection.
    pub(crate) fn request(&self, id: u64) {
        self.asked.lock().insert(id);
        self.any_asked.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    /// Whether a connection waits to be driven.
    pub(crate) fn has_asked(&self) -> bool {
        self.any_asked.load(Ordering::SeqCst)
    }

    /// Takes the connections that wait to be driven.
    pub(crate) fn asked(&self, mut each: impl FnMut(u64)) {
        if self.any_asked.swap(false, Ordering::SeqCst) {
            let ids = std::mem::take(&mut *self.asked.lock());
            ids.into_iter().for_each(&mut each);
        }
    }
}

/// What the connections of an engine share.
pub(crate) struct DriveContext {
    pub registry: Arc<Registry>,
    pub queue: DriveQueue,
    pub counters: Counters,
    /// Connections whose lost channels are to be set up again.
    pub restoring: Restoring,
    /// What the application may wait for.
    pub events: Arc<Events>,
    /// Connections that ended while they waited for accept.
    pub dead: Arc<Dead>,
    /// The channels ring the doorbell; otherwise the progress thread must poll while work is in flight.
    pub doorbells: bool,
    pub cores: Cores,
    pub close_timeout: Duration,
    /// Limits the log lines that peers can cause.
    pub lines: Arc<Limiter>,
    /// The connection and transfer that were polled last, folded into one number.
    last_polled: AtomicU64,
    start: Instant,
}

impl DriveContext {
    pub(crate) fn new(bell: Bell, doorbells: bool, close_timeout: Duration, log_lines: usize) -> DriveContext {
        DriveContext {
            registry: Arc::new(Registry::new()),
            queue: DriveQueue::new(bell),
            counters: Counters::default(),
            restoring: Restoring::default(),
            events: Arc::default(),
            dead: Arc::default(),
            doorbells,
            cores: Cores::here(),
            close_timeout,
            lines: Arc::new(Limiter::new(u32::try_from(log_lines).unwrap_or(u32::MAX))),
            last_polled: AtomicU64::new(0),
            start: Instant::now(),
        }
    }

    /// Asks the progress thread to drive a connection.
    pub(crate) fn request_drive(&self, id: u64) {
        self.queue.request(id);
    }

    /// Records a poll. Returns whether the previous poll was of the same transfer.
    pub(crate) fn polled_again(&self, connection: u64, transfer: u64) -> bool {
        let this = connection.rotate_right(16) ^ transfer;
        self.last_polled.swap(this, Ordering::Relaxed) == this
    }

    /// Time since the engine started.
    pub(crate) fn age(&self) -> Duration {
        self.start.elapsed()
    }

    /// Microseconds since the engine started, from 1.
    pub(crate) fn clock(&self) -> u64 {
        self.at(Instant::now())
    }

    /// A time on [`DriveContext::clock`].
    pub(crate) fn at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_micros() as u64 + 1
    }
}
