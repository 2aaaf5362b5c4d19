//! Handles of the C ABI. A handle is a number that looks like a pointer, is never dereferenced and never reused, so a stale
//! or foreign one is an error and not undefined behaviour, whatever order and thread objects are destroyed in.
//!
//! A child of fork has its own tables. Handles that it inherited are numbers from before the fork: destroying one does nothing, and any
//! other use is an error.

use crate::engine::{Connection, Engine, List, Notification};
use crate::hash::Map;
use crate::status::{bail, Result};
use process::{PerProcess, RwLock};
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Steps of 16 keep handles of all kinds distinct and plausible to a debugger.
static NEXT: AtomicUsize = AtomicUsize::new(FIRST);
const FIRST: usize = 0x1000;

static TABLES: PerProcess<Tables> = PerProcess::new(|| Tables {
    engines: Handles::new("engine"),
    connections: Handles::new("connection"),
    notifications: Handles::new("notification"),
    lists: Handles::new("list"),
});

struct Tables {
    engines: Handles<Engine>,
    connections: Handles<Connection>,
    notifications: Handles<Notification>,
    lists: Handles<List>,
}

/// Engines of this process.
pub(super) fn engines() -> &'static Handles<Engine> {
    &TABLES.get().engines
}

/// Connections of this process.
pub(super) fn connections() -> &'static Handles<Connection> {
    &TABLES.get().connections
}

/// Notifications that this process has taken and not freed.
pub(super) fn notifications() -> &'static Handles<Notification> {
    &TABLES.get().notifications
}

/// Lists of segments that this process has created and not freed.
pub(super) fn lists() -> &'static Handles<List> {
    &TABLES.get().lists
}

/// Handles of one kind.
pub(super) struct Handles<T> {
    what: &'static str,
    /// Smaller numbers belong to the parent process.
    first: usize,
    objects: RwLock<Objects<T>>,
}

struct Objects<T> {
    live: Map<usize, Arc<T>>,
    /// Objects that are still ending although their handles are gone.
    ending: Map<usize, Arc<T>>,
}

impl<T> Objects<T> {
    /// Ends a handle.
    fn end(&mut self, handle: usize, stays: bool) -> Option<Arc<T>> {
        let object = self.live.remove(&handle)?;
        if stays {
            self.ending.insert(handle, object.clone());
        }
        Some(object)
    }

    fn find(&self, handle: usize) -> Option<Arc<T>> {
        self.live.get(&handle).or_else(|| self.ending.get(&handle)).cloned()
    }
}

impl<T> Handles<T> {
    fn new(what: &'static str) -> Self {
        let objects = RwLock::new(Objects { live: Map::default(), ending: Map::default() });
        Handles { what, first: NEXT.load(Ordering::Relaxed), objects }
    }

    pub(super) fn insert(&self, object: Arc<T>) -> *mut c_void {
        let handle = NEXT.fetch_add(16, Ordering::Relaxed);
        self.objects.write().live.insert(handle, object);
        handle as *mut c_void
    }

    pub(super) fn get(&self, handle: *const c_void) -> Result<Arc<T>> {
        match self.objects.read().live.get(&(handle as usize)) {
            Some(object) => Ok(object.clone()),
            None => self.unknown(handle),
        }
    }

    /// The object; `None` for NULL and for inherited handles, with which the call does nothing.
    pub(super) fn get_if_mine(&self, handle: *const c_void) -> Result<Option<Arc<T>>> {
        if handle.is_null() || self.inherited(handle) {
            return Ok(None);
        }
        self.get(handle).map(Some)
    }

    /// The same, and also finds an object that is being ended.
    pub(super) fn get_if_mine_or_ending(&self, handle: *const c_void) -> Result<Option<Arc<T>>> {
        if handle.is_null() || self.inherited(handle) {
            return Ok(None);
        }
        let found = self.objects.read().find(handle as usize);
        found.map_or_else(|| self.unknown(handle), |object| Ok(Some(object)))
    }

    /// Ends a handle and returns its object; `None` if the handle is NULL or the parent's.
    pub(super) fn remove(&self, handle: *const c_void) -> Result<Option<Arc<T>>> {
        self.take(handle, false)
    }

    /// Ends a handle and then its object.
    pub(super) fn end(&self, handle: *const c_void, end: impl FnOnce(&T)) -> Result<()> {
        if let Some(object) = self.take(handle, true)? {
            end(&object);
            let ended = self.objects.write().ending.remove(&(handle as usize));
            drop(ended);
        }
        Ok(())
    }

    fn take(&self, handle: *const c_void, stays: bool) -> Result<Option<Arc<T>>> {
        if handle.is_null() || self.inherited(handle) {
            return Ok(None);
        }
        // The lock of the table is released here, because the log may call the application.
        let removed = self.objects.write().end(handle as usize, stays);
        if removed.is_none() {
            log::error!("{} {handle:?} destroyed twice, or never created", self.what);
            return self.unknown(handle);
        }
        Ok(removed)
    }

    pub(super) fn all(&self) -> Vec<Arc<T>> {
        self.objects.read().live.values().cloned().collect()
    }

    fn inherited(&self, handle: *const c_void) -> bool {
        (FIRST..self.first).contains(&(handle as usize)) && (handle as usize) % 16 == 0
    }

    fn unknown<U>(&self, handle: *const c_void) -> Result<U> {
        if handle.is_null() {
            bail!(InvalidArgument, "the {} is NULL", self.what);
        }
        if self.inherited(handle) {
            bail!(
                NotFound,
                "{} {handle:?}: this handle belongs to the parent process, which created it before the fork",
                self.what
            );
        }
        bail!(NotFound, "{handle:?} is not a live {}", self.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::ptr::null;

    fn kind<T>(result: Result<T>) -> Option<ErrorKind> {
        result.err().map(|e| e.kind())
    }

    #[test]
    fn a_handle_ends_once_and_its_number_does_not_come_back() {
        let handles = Handles::new("thing");
        let (one, two) = (handles.insert(Arc::new(1)), handles.insert(Arc::new(2)));
        assert_eq!((*handles.get(one).unwrap(), *handles.get(two).unwrap(), handles.all().len()), (1, 2, 2));
        assert_eq!(handles.remove(one).unwrap().as_deref(), Some(&1));
        assert_eq!([kind(handles.get(one)), kind(handles.get_if_mine(one))], [Some(ErrorKind::NotFound); 2]);
        assert_eq!(kind(handles.remove(one)), Some(ErrorKind::NotFound), "twice");
        let three = handles.insert(Arc::new(3));
        assert!(three != one && three != two);
        assert_eq!(handles.get_if_mine(two).unwrap().as_deref(), Some(&2));
        let beside = (two as usize + 8) as *const c_void;
        assert_eq!(kind(handles.get(beside)), Some(ErrorKind::NotFound));
    }

    #[test]
    fn what_is_ending_is_found_by_nobody_but_who_waits_for_it() {
        let handles = Handles::new("thing");
        let (ending, other) = (handles.insert(Arc::new(1)), handles.insert(Arc::new(2)));
        let mut ended = 0;
        handles
            .end(ending, |object| {
                ended = *object;
                assert_eq!(kind(handles.get(ending)), Some(ErrorKind::NotFound));
                assert_eq!(kind(handles.remove(ending)), Some(ErrorKind::NotFound), "ended twice");
                assert_eq!(handles.get_if_mine_or_ending(ending).unwrap().as_deref(), Some(&1));
                assert_eq!(handles.get_if_mine_or_ending(other).unwrap().as_deref(), Some(&2));
                assert_eq!(handles.all().len(), 1);
            })
            .unwrap();
        assert_eq!(ended, 1);
        assert_eq!(kind(handles.get_if_mine_or_ending(ending)), Some(ErrorKind::NotFound));
        assert_eq!(kind(handles.end(ending, |_| unreachable!())), Some(ErrorKind::NotFound));
    }

    #[test]
    fn null_and_handles_of_the_parent_are_nothing_to_end_and_errors_to_use() {
        NEXT.fetch_add(16, Ordering::Relaxed);
        let handles: Handles<u8> = Handles::new("thing");
        for (handle, used) in [(null(), ErrorKind::InvalidArgument), (FIRST as *const c_void, ErrorKind::NotFound)] {
            assert_eq!(kind(handles.get(handle)), Some(used));
            assert_eq!(handles.get_if_mine(handle).unwrap(), None);
            assert_eq!(handles.get_if_mine_or_ending(handle).unwrap(), None);
            assert_eq!(handles.remove(handle).unwrap(), None);
            handles.end(handle, |_| unreachable!()).unwrap();
        }
        let error = handles.get(FIRST as *const c_void).unwrap_err().to_string();
        assert!(error.contains("parent process"), "{error}");
        assert!(handles.remove((FIRST + 8) as *const c_void).is_err(), "no handle of any process");
    }
}
