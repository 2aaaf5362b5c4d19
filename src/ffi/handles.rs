//! Handles of the C ABI. A handle is a number that looks like a pointer, is never dereferenced and never reused, so a stale
//! or foreign one is an error and not undefined behaviour, whatever order and thread objects are destroyed in.

use crate::engine::{Connection, Engine, Notification};
use crate::status::{bail, Result};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

pub(super) static ENGINES: LazyLock<Handles<Engine>> = LazyLock::new(|| Handles::new("engine"));
pub(super) static CONNECTIONS: LazyLock<Handles<Connection>> = LazyLock::new(|| Handles::new("connection"));
pub(super) static NOTIFICATIONS: LazyLock<Handles<Notification>> = LazyLock::new(|| Handles::new("notification"));

/// Steps of 16 keep handles of all kinds distinct and plausible to a debugger.
static NEXT: AtomicUsize = AtomicUsize::new(0x1000);

pub(super) struct Handles<T> {
    what: &'static str,
    live: RwLock<HashMap<usize, Arc<T>>>,
}

impl<T> Handles<T> {
    fn new(what: &'static str) -> Self {
        Handles { what, live: RwLock::default() }
    }

    pub(super) fn insert(&self, object: Arc<T>) -> *mut c_void {
        let handle = NEXT.fetch_add(16, Ordering::Relaxed);
        self.live.write().insert(handle, object);
        handle as *mut c_void
    }

    pub(super) fn get(&self, handle: *const c_void) -> Result<Arc<T>> {
        match self.live.read().get(&(handle as usize)) {
            Some(object) => Ok(object.clone()),
            None => self.unknown(handle),
        }
    }

    pub(super) fn remove(&self, handle: *const c_void) -> Result<Arc<T>> {
        match self.live.write().remove(&(handle as usize)) {
            Some(object) => Ok(object),
            None => {
                log::error!("{} {handle:?} destroyed twice, or never created", self.what);
                self.unknown(handle)
            }
        }
    }

    pub(super) fn all(&self) -> Vec<Arc<T>> {
        self.live.read().values().cloned().collect()
    }

    fn unknown<U>(&self, handle: *const c_void) -> Result<U> {
        if handle.is_null() {
            bail!(InvalidArgument, "the {} is NULL", self.what);
        }
        bail!(NotFound, "{handle:?} is not a live {}", self.what)
    }
}
