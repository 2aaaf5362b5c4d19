//! Launchers that connections of a GPU hand on to each other: making one takes memory and a stream, which should not happen while data
//! moves. Knows nothing of which GPU it is.

use super::launcher::CopyLauncher;
use parking_lot::Mutex;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Launchers of a GPU without a user.
#[derive(Default)]
pub(super) struct Idle(Mutex<Vec<CopyLauncher>>);

impl Idle {
    pub(super) fn take(&self) -> Option<CopyLauncher> {
        self.0.lock().pop()
    }

    pub(super) fn put(&self, launcher: CopyLauncher) {
        self.0.lock().push(launcher);
    }

    pub(super) fn count(&self) -> usize {
        self.0.lock().len()
    }
}

/// A launcher that goes back to the idle ones when dropped. By then its user has waited for its jobs.
pub(crate) struct Lent {
    launcher: ManuallyDrop<CopyLauncher>,
    idle: Arc<Idle>,
}

impl Lent {
    pub(super) fn new(launcher: CopyLauncher, idle: &Arc<Idle>) -> Lent {
        Lent { launcher: ManuallyDrop::new(launcher), idle: idle.clone() }
    }
}

impl Deref for Lent {
    type Target = CopyLauncher;

    fn deref(&self) -> &CopyLauncher {
        &self.launcher
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut CopyLauncher {
        &mut self.launcher
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nobody sees self afterwards.
        let launcher = unsafe { ManuallyDrop::take(&mut self.launcher) };
        if let Some(launcher) = launcher.settle() {
            self.idle.put(launcher);
        }
    }
}
