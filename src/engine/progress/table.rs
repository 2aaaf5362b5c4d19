//! What a connection needs of its engine while it lives: the registry, the bell of the progress thread, the list that it leaves at its
//! end, and a clock. Knows of connections only that they can be driven.

use super::connections::Connections;
use super::counters::Counters;
use super::doorbell::{named, Bell, Named};
use super::pacing::Cores;
use crate::engine::setup::accept_queue::Dead;
use crate::logging::Limiter;
use crate::registry::Registry;
use process::Mutex;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// A connection without anything to read for so long is left to the progress thread again, microseconds.
const RECENT_US: u64 = 1000;

/// What lives here.
pub(crate) trait Driven {
    /// A round of progress by an application thread that waits for something other than a transfer. Whether something moved, or is
    /// under way.
    fn drive_for_application(&self) -> bool;

    /// A process of this host has said something.
    fn on_host_message(&self) {}
}

/// A connection that a thread drives while it looks for notifications. Not kept alive: nobody may ask again.
struct Recent<T> {
    id: u64,
    connection: Weak<T>,
    /// When it last had something.
    last: u64,
}

/// All of them.
struct Looking<T> {
    list: Vec<Recent<T>>,
    tokens: Vec<u64>,
}

pub(crate) struct ConnectionTable<T> {
    pub registry: Arc<Registry>,
    pub connections: Connections<T>,
    pub bell: Bell,
    pub counters: Counters,
    /// Those that died while they waited for accept.
    pub dead: Arc<Dead>,
    /// The channels ring the bell; without, the progress thread must poll while work is in flight.
    pub doorbells: bool,
    pub cores: Cores,
    pub close_timeout: Duration,
    /// Lines of the log that peers cause.
    pub lines: Arc<Limiter>,
    /// The connection and transfer that was polled last, as one number.
    last_polled: AtomicU64,
    /// Connections that the progress thread is asked to drive.
    asked: Mutex<HashSet<u64>>,
    any_asked: AtomicBool,
    looking: Mutex<Looking<T>>,
    /// The progress thread is to end.
    ended: AtomicBool,
    start: Instant,
}

impl<T: Driven> ConnectionTable<T> {
    pub(crate) fn new(bell: Bell, doorbells: bool, close_timeout: Duration, log_lines: usize) -> ConnectionTable<T> {
        ConnectionTable {
            registry: Arc::new(Registry::new()),
            connections: Connections::new(),
            bell,
            counters: Counters::default(),
            dead: Arc::default(),
            doorbells,
            cores: Cores::here(),
            close_timeout,
            lines: Arc::new(Limiter::new(u32::try_from(log_lines).unwrap_or(u32::MAX))),
            last_polled: AtomicU64::new(0),
            asked: Mutex::default(),
            any_asked: AtomicBool::new(false),
            looking: Mutex::new(Looking { list: Vec::new(), tokens: Vec::new() }),
            ended: AtomicBool::new(false),
            start: Instant::now(),
        }
    }

    /// Asks the progress thread to drive a connection.
    pub(crate) fn request_drive(&self, id: u64) {
        self.asked.lock().insert(id);
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
        let Some(mut looking) = self.looking.try_lock() else { return };
        let now = self.clock();
        let Looking { list, tokens } = &mut *looking;
        tokens.clear();
        self.bell.ready(tokens);
        for &token in tokens.iter() {
            let id = match named(token) {
                Named::Connection(id) => id,
                Named::Local(id) => {
                    // The event came once, and here: the progress thread looks, too.
                    if let Some(connection) = self.connections.get(id) {
                        connection.on_host_message();
                        self.request_drive(id);
                    }
                    id
                }
                Named::Bell | Named::Group(_) => continue,
            };
            if list.iter().all(|recent| recent.id != id) {
                let connection = self.connections.get(id).map(|connection| Arc::downgrade(&connection));
                list.extend(connection.map(|connection| Recent { id, connection, last: now }));
            }
        }
        list.retain_mut(|recent| {
            let Some(connection) = recent.connection.upgrade() else { return false };
            if connection.drive_for_application() {
                recent.last = now;
            }
            now.saturating_sub(recent.last) < RECENT_US
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
        self.at(Instant::now())
    }

    /// A time on [`ConnectionTable::clock`].
    pub(crate) fn at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_micros() as u64 + 1
    }
}
