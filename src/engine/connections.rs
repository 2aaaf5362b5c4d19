//! The table of an engine's connections, by id. Does not keep them alive.

use super::connection::Connection;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

#[derive(Default)]
struct Table {
    live: HashMap<u64, Weak<Connection>>,
    /// No more are taken in: the engine ends.
    closed: bool,
}

/// The table.
#[derive(Default)]
pub(crate) struct Connections {
    table: Mutex<Table>,
    last: AtomicU64,
}

impl Connections {
    /// A new connection's id, from 1.
    pub(crate) fn next_id(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Takes a connection in; `false` when the engine ends.
    pub(crate) fn insert(&self, connection: &Arc<Connection>) -> bool {
        let mut table = self.table.lock();
        if table.closed {
            return false;
        }
        table.live.insert(connection.id, Arc::downgrade(connection));
        true
    }

    /// Takes a connection out; it may be out already.
    pub(crate) fn remove(&self, id: u64) {
        self.table.lock().live.remove(&id);
    }

    /// From now on nothing is taken in.
    pub(crate) fn close(&self) {
        self.table.lock().closed = true;
    }

    /// A connection by its id.
    pub(crate) fn get(&self, id: u64) -> Option<Arc<Connection>> {
        self.table.lock().live.get(&id).and_then(Weak::upgrade)
    }

    /// All that are alive.
    pub(crate) fn all(&self) -> Vec<Arc<Connection>> {
        self.table.lock().live.values().filter_map(Weak::upgrade).collect()
    }
}
