//! The connections of an engine, by id. Does not keep them alive, and knows nothing about what they do.

use crate::hash::Map;
use process::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

struct Live<T> {
    by_id: Map<u64, Weak<T>>,
    /// The engine is closing and accepts no more connections.
    closed: bool,
}

/// The connections of an engine, of type `T`.
pub(crate) struct Connections<T> {
    live: Mutex<Live<T>>,
    last: AtomicU64,
}

impl<T> Connections<T> {
    pub(crate) fn new() -> Connections<T> {
        Connections { live: Mutex::new(Live { by_id: Map::default(), closed: false }), last: AtomicU64::new(0) }
    }

    /// A new connection's id, from 1.
    pub(crate) fn next_id(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Adds a connection; `false` when the engine is closing.
    pub(crate) fn insert(&self, id: u64, connection: &Arc<T>) -> bool {
        let mut live = self.live.lock();
        if live.closed {
            return false;
        }
        live.by_id.insert(id, Arc::downgrade(connection));
        true
    }

    /// Removes a connection, if it is still there.
    pub(crate) fn remove(&self, id: u64) {
        self.live.lock().by_id.remove(&id);
    }

    /// Rejects all further connections.
    pub(crate) fn close(&self) {
        self.live.lock().closed = true;
    }

    /// Looks up a connection by its id.
    pub(crate) fn get(&self, id: u64) -> Option<Arc<T>> {
        self.live.lock().by_id.get(&id).and_then(Weak::upgrade)
    }

    /// The number of connections.
    pub(crate) fn count(&self) -> usize {
        self.live.lock().by_id.len()
    }

    /// All connections that are alive.
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.live.lock().by_id.values().filter_map(Weak::upgrade).collect()
    }
}
