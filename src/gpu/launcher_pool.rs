//! Launchers that connections of a GPU hand on to each other: making one takes memory and a stream, which should not happen while data
//! moves. Knows nothing of which GPU it is.

use process::Mutex;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Something that can be reused.
pub(crate) trait Reusable: Sized {
    /// Ready for another user, with nothing left of the last one; `None` when it is not fit for one.
    fn reset(self) -> Option<Self>;
}

/// Launchers of a GPU without a user.
pub(super) struct Idle<T>(Mutex<Vec<T>>);

impl<T> Default for Idle<T> {
    fn default() -> Idle<T> {
        Idle(Mutex::new(Vec::new()))
    }
}

impl<T> Idle<T> {
    pub(super) fn take(&self) -> Option<T> {
        self.0.lock().pop()
    }

    pub(super) fn put(&self, launcher: T) {
        self.0.lock().push(launcher);
    }

    pub(super) fn count(&self) -> usize {
        self.0.lock().len()
    }
}

/// A launcher that goes back to the idle ones when dropped. By then its user has waited for its jobs.
pub(crate) struct PooledLauncher<T: Reusable> {
    launcher: ManuallyDrop<T>,
    idle: Arc<Idle<T>>,
}

impl<T: Reusable> PooledLauncher<T> {
    pub(super) fn new(launcher: T, idle: &Arc<Idle<T>>) -> PooledLauncher<T> {
        PooledLauncher { launcher: ManuallyDrop::new(launcher), idle: idle.clone() }
    }
}

impl<T: Reusable> Deref for PooledLauncher<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.launcher
    }
}

impl<T: Reusable> DerefMut for PooledLauncher<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.launcher
    }
}

impl<T: Reusable> Drop for PooledLauncher<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here; self is not used afterwards.
        let launcher = unsafe { ManuallyDrop::take(&mut self.launcher) };
        if let Some(launcher) = launcher.reset() {
            self.idle.put(launcher);
        }
    }
}
