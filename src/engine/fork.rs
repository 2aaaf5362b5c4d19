//! What a fork leaves behind: objects that belong to the parent must not be torn down in the child, since the sockets are shared and
//! the threads and the holders of locks are not there. Knows nothing of engines and connections.

use crate::status::{bail, Result};
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Once;

/// The process id as of the last look; 0 before the first one.
static CURRENT: AtomicU32 = AtomicU32::new(0);

/// Runs in the child of every fork, where only async-signal-safe calls are allowed.
extern "C" fn in_child() {
    CURRENT.store(std::process::id(), Ordering::Relaxed);
}

/// This process's id, as cheap as a load. Children of vfork and of raw clone calls are not told apart from their parent.
pub(crate) fn current_pid() -> u32 {
    static ONCE: Once = Once::new();
    let known = CURRENT.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    ONCE.call_once(|| {
        // SAFETY: the handler lives as long as the library, which holds threads and is not unloaded, and is async-signal-safe.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        CURRENT.store(std::process::id(), Ordering::Relaxed);
    });
    CURRENT.load(Ordering::Relaxed)
}

/// A value of the process that made it. A forked child can look at it, and never drops it: what it holds stays as it is, down to
/// the descriptors, which the child closes when it ends.
pub(crate) struct Local<T> {
    pid: u32,
    value: ManuallyDrop<T>,
}

impl<T> Local<T> {
    /// Wraps a value of this process.
    pub(crate) fn new(value: T) -> Local<T> {
        Local { pid: current_pid(), value: ManuallyDrop::new(value) }
    }

    /// Whether the calling process made it. Where not, none of its locks may be taken: who held one may not be in this process.
    pub(crate) fn is_here(&self) -> bool {
        self.pid == current_pid()
    }

    /// An error in a forked child.
    ///
    /// # Errors
    /// `Unsupported`.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        if !self.is_here() {
            bail!(Unsupported, "this {what} belongs to process {}; a forked child has to make its own", self.pid);
        }
        Ok(())
    }
}

impl<T> Deref for Local<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Local<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> Drop for Local<T> {
    fn drop(&mut self) {
        if self.is_here() {
            // SAFETY: dropped once, here; nobody uses the value after drop.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    static DROPS: AtomicUsize = AtomicUsize::new(0);
    struct Counted;
    impl Drop for Counted {
        fn drop(&mut self) {
            DROPS.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_child_never_drops_what_its_parent_made() {
        let (one, two) = (Local::new(Counted), Local::new(Counted));
        let parent = current_pid();
        assert!(one.is_here() && one.check("thing").is_ok() && parent == std::process::id());
        // SAFETY: the child only runs plain code and _exit.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let told = !one.is_here() && one.check("thing").is_err() && current_pid() == std::process::id();
            drop(one);
            let kept = DROPS.load(Ordering::SeqCst) == 0;
            drop(Local::new(Counted));
            let own = DROPS.load(Ordering::SeqCst) == 1;
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(if told && kept && own { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: a writable status.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        drop((one, two));
        assert_eq!(DROPS.load(Ordering::SeqCst), 2);
    }
}
