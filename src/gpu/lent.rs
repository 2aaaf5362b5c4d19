//! Launchers that connections of a GPU hand on to each other: making one takes memory and a stream, which should not happen while data
//! moves.

use super::device::Gpu;
use super::launcher::CopyLauncher;
use crate::status::Result;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// A launcher that goes back to its GPU when dropped. By then its user has waited for its jobs.
pub(crate) struct Lent {
    launcher: ManuallyDrop<CopyLauncher>,
    gpu: Arc<Gpu>,
}

impl Lent {
    /// An idle one, else a new one.
    pub(super) fn take(gpu: &Arc<Gpu>) -> Result<Lent> {
        let idle = gpu.idle.lock().pop();
        let launcher = match idle {
            Some(launcher) => launcher,
            None => gpu.new_launcher()?,
        };
        Ok(Lent { launcher: ManuallyDrop::new(launcher), gpu: gpu.clone() })
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
            self.gpu.idle.lock().push(launcher);
        }
    }
}
