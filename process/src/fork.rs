//! A counter of forks, and values that belong to the process that made them.

use crate::fork_guard;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};

/// Counts the forks between this process and the one that loaded the library.
static GENERATION: AtomicU64 = AtomicU64::new(0);

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    fork_guard::in_child();
}

/// States of fork counting: off, on. Any other value is the process that is turning it on.
const NOT_WATCHED: u64 = 0;
const WATCHED: u64 = u64::MAX;
static WATCH: AtomicU64 = AtomicU64::new(NOT_WATCHED);

/// A number that differs between a process and its parent, starting with the first call. Costs no system call.
pub fn generation() -> u64 {
    if WATCH.load(Ordering::Acquire) != WATCHED {
        watch();
    }
    GENERATION.load(Ordering::Relaxed)
}

/// Turns fork counting on. Starts over if a thread of the parent had begun and does not exist in this process.
#[cold]
fn watch() {
    let own = u64::from(std::process::id());
    loop {
        match WATCH.load(Ordering::Acquire) {
            WATCHED => return,
            begun if begun == own => std::thread::yield_now(),
            before => {
                if WATCH.compare_exchange(before, own, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    // SAFETY: the handlers count, store and sleep, which is allowed around a fork. It fails only when memory runs out,
                    // and then a child is not distinguished. Registered twice they count twice, which differs too.
                    unsafe { libc::pthread_atfork(Some(fork_guard::before), Some(fork_guard::in_parent), Some(in_child)) };
                    WATCH.store(WATCHED, Ordering::Release);
                    return;
                }
            }
        }
    }
}

/// A per-process value: made at the first use, and made again at the first use in a child. The child never reads or drops the
/// parent's value: its locks may be held for ever, and its sockets are the parent's.
pub struct PerProcess<T> {
    current: AtomicPtr<(u64, T)>,
    make: fn() -> T,
}

impl<T: Send + Sync + 'static> PerProcess<T> {
    /// A value that `make` makes.
    pub const fn new(make: fn() -> T) -> PerProcess<T> {
        PerProcess { current: AtomicPtr::new(std::ptr::null_mut()), make }
    }

    /// This process's value.
    pub fn get(&self) -> &'static T {
        let generation = generation();
        let mut seen = self.current.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or a box that was leaked below.
            match unsafe { seen.as_ref() } {
                Some((made_in, value)) if *made_in == generation => return value,
                _ => {}
            }
            let fresh = Box::into_raw(Box::new((generation, (self.make)())));
            match self.current.compare_exchange(seen, fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: just leaked, and never freed from here on.
                Ok(_) => return unsafe { &(*fresh).1 },
                Err(other) => {
                    // SAFETY: no other thread saw it.
                    drop(unsafe { Box::from_raw(fresh) });
                    seen = other;
                }
            }
        }
    }
}

/// The error of using a value of the parent process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parents {
    what: &'static str,
    pid: u32,
}

impl fmt::Display for Parents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this {} belongs to process {}; a forked child must make its own", self.what, self.pid)
    }
}

impl std::error::Error for Parents {}

/// A value of the process that made it. A forked child can read it but never drops it: everything in it stays as it is, including
/// the descriptors, which are closed when the child ends.
pub struct ProcessOwned<T> {
    generation: u64,
    pid: u32,
    value: ManuallyDrop<T>,
}

impl<T> ProcessOwned<T> {
    /// Wraps a value of this process.
    pub fn new(value: T) -> ProcessOwned<T> {
        ProcessOwned { generation: generation(), pid: std::process::id(), value: ManuallyDrop::new(value) }
    }

    /// Whether the calling process made it. If not, none of its locks may be taken: the thread that held one may not exist here.
    pub fn is_here(&self) -> bool {
        self.generation == generation()
    }

    /// An error in a forked child; `what` names the value in its text.
    ///
    /// # Errors
    /// The value belongs to the parent.
    pub fn check(&self, what: &'static str) -> Result<(), Parents> {
        if self.is_here() {
            return Ok(());
        }
        Err(Parents { what, pid: self.pid })
    }
}

impl<T> Deref for ProcessOwned<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for ProcessOwned<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> Drop for ProcessOwned<T> {
    fn drop(&mut self) {
        if self.is_here() {
            // SAFETY: dropped once, here; not used after drop.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

/// Closes this process's copy of a descriptor of its parent, once.
pub fn close_copy(fd: &AtomicI32) {
    let fd = fd.swap(-1, Ordering::AcqRel);
    if fd >= 0 {
        // SAFETY: the descriptor was inherited, and nothing of this process uses it. The parent's own stays open.
        unsafe { libc::close(fd) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_process_makes_its_value_once() {
        static VALUE: PerProcess<AtomicUsize> = PerProcess::new(|| AtomicUsize::new(7));
        let first = VALUE.get();
        let look = || std::ptr::from_ref(VALUE.get()) as usize;
        let seen: Vec<_> = (0..8).map(|_| std::thread::spawn(look)).collect();
        assert!(seen.into_iter().all(|t| t.join().unwrap() == std::ptr::from_ref(first) as usize));
        assert_eq!(first.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_child_finishes_what_a_thread_of_the_parent_had_begun() {
        generation();
        // The state in a child whose parent was turning it on.
        WATCH.store(u64::from(std::process::id()) + 1, Ordering::Release);
        generation();
        assert_eq!(WATCH.load(Ordering::Acquire), WATCHED);
    }

    #[test]
    fn a_child_has_values_of_its_own() {
        static VALUE: PerProcess<Mutex<Vec<u32>>> = PerProcess::new(Mutex::default);
        let before = generation();
        VALUE.get().lock().unwrap().push(1);
        assert_eq!(*VALUE.get().lock().unwrap(), [1]);
        let held = VALUE.get().lock().unwrap();
        // SAFETY: the child makes system calls, allocates little and ends.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            // The lock that is held here would never be released.
            let fresh = generation() != before && VALUE.get().try_lock().is_ok_and(|v| v.is_empty());
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(if fresh { 0 } else { 1 }) };
        }
        drop(held);
        let mut status = 0;
        // SAFETY: a child of this process, a writable status.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        assert_eq!(generation(), before);
        assert_eq!(*VALUE.get().lock().unwrap(), [1]);
    }

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
        let (one, two) = (ProcessOwned::new(Counted), ProcessOwned::new(Counted));
        assert!(one.is_here() && one.check("thing").is_ok());
        // SAFETY: the child only runs plain code and _exit.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let refused = !one.is_here() && one.check("thing").is_err();
            drop(one);
            let kept = DROPS.load(Ordering::SeqCst) == 0;
            drop(ProcessOwned::new(Counted));
            let own = DROPS.load(Ordering::SeqCst) == 1;
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(if refused && kept && own { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: a writable status.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        drop((one, two));
        assert_eq!(DROPS.load(Ordering::SeqCst), 2);
    }
}
