//! The connections of an engine, by id. Does not keep them alive, and knows nothing of what they do.

use crate::hash::Map;
use process::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

struct Live<T> {
    by_id: Map<u64, Weak<T>>,
    /// No more are taken in: the engine ends.
    closed: bool,
}

/// The connections, `T` each.
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

    /// Takes a connection in; `false` when the engine ends.
    pub(crate) fn insert(&self, id: u64, connection: &Arc<T>) -> bool {
        let mut live = self.live.lock();
        if live.closed {
            return false;
        }
        live.by_id.insert(id, Arc::downgrade(connection));
        true
    }

    /// Takes a connection out; it may be out already.
    pub(crate) fn remove(&self, id: u64) {
        self.live.lock().by_id.remove(&id);
    }

    /// From now on nothing is taken in.
    pub(crate) fn close(&self) {
        self.live.lock().closed = true;
    }

    /// A connection by its id.
    pub(crate) fn get(&self, id: u64) -> Option<Arc<T>> {
        self.live.lock().by_id.get(&id).and_then(Weak::upgrade)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.live.lock().by_id.len()
    }

    /// All that are alive.
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.live.lock().by_id.values().filter_map(Weak::upgrade).collect()
    }
}
