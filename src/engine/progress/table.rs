//! The connections of an engine, and how a thread that looks for notifications drives them. Knows about connections only that
//! they can be driven.

use super::connections::Connections;
use super::context::DriveContext;
use super::doorbell::{named, Named};
use process::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

/// A connection without anything to read for this many microseconds is left to the progress thread again.
const RECENT_US: u64 = 1000;

/// A connection, as the table sees it.
pub(crate) trait Driven {
    /// A round by an application thread that waits for something other than a transfer. Whether something moved or is in flight.
    fn drive_for_application(&self) -> bool;

    /// A peer on this host has sent a message.
    fn on_host_message(&self) {}
}

/// A connection driven by a thread that looks for notifications. Held weakly: the thread may never come back.
struct Recent<T> {
    id: u64,
    connection: Weak<T>,
    /// When the connection last had something to read.
    last: u64,
}

/// The state of threads that look for notifications.
struct Looking<T> {
    list: Vec<Recent<T>>,
    tokens: Vec<u64>,
}

/// The connections of an engine, and the context that they share.
pub(crate) struct ConnectionTable<T> {
    pub context: Arc<DriveContext>,
    pub connections: Connections<T>,
    looking: Mutex<Looking<T>>,
    /// The progress thread shall end.
    ended: AtomicBool,
}

impl<T: Driven> ConnectionTable<T> {
    pub(crate) fn new(context: DriveContext) -> ConnectionTable<T> {
        ConnectionTable {
            context: Arc::new(context),
            connections: Connections::new(),
            looking: Mutex::new(Looking { list: Vec::new(), tokens: Vec::new() }),
            ended: AtomicBool::new(false),
        }
    }

    /// A round by an application thread that looks for notifications: drives the connections with something to read, and for a
    /// while those that recently had something.
    pub(crate) fn drive_ready(&self) {
        let Some(mut looking) = self.looking.try_lock() else { return };
        let now = self.context.clock();
        let Looking { list, tokens } = &mut *looking;
        tokens.clear();
        self.context.queue.bell.ready(tokens);
        for &token in tokens.iter() {
            let id = match named(token) {
                Named::Connection(id) => id,
                Named::Local(id) => {
                    // The edge-triggered event was taken here: have the progress thread check as well.
                    if let Some(connection) = self.connections.get(id) {
                        connection.on_host_message();
                        self.context.request_drive(id);
                    }
                    id
                }
                Named::Bell | Named::Group(_) | Named::Links => continue,
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

    /// Ends the progress thread.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.context.queue.bell.arm(true);
        self.context.queue.bell.ring();
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}
