//! Critical sections that fork() waits for: loading a library (a copy of the dynamic loader's tables at that moment makes the child's
//! first library look-up crash), and calls into third-party libraries that have their own locks and state.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Threads inside [`run`]; forks that are waiting or running.
static RUNNING: AtomicU32 = AtomicU32::new(0);
static FORKING: AtomicU32 = AtomicU32::new(0);
/// A fork waits at most this long.
const FORK_WAIT: Duration = Duration::from_secs(10);
const NAP: Duration = Duration::from_micros(100);

thread_local! {
    /// How deep this thread is inside [`run`]. Has no destructor, so it exists until the thread's end.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs a section that a fork in another thread waits for; fork handlers must be registered.
pub(crate) fn run<R>(work: impl FnOnce() -> R) -> R {
    struct Inside;
    impl Drop for Inside {
        fn drop(&mut self) {
            DEPTH.set(DEPTH.get() - 1);
            if DEPTH.get() == 0 {
                // A child forked inside the section has reset its state.
                let _ = RUNNING.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            }
        }
    }
    if DEPTH.get() == 0 {
        RUNNING.fetch_add(1, Ordering::SeqCst);
        while FORKING.load(Ordering::SeqCst) > 0 {
            RUNNING.fetch_sub(1, Ordering::SeqCst);
            std::thread::sleep(NAP);
            RUNNING.fetch_add(1, Ordering::SeqCst);
        }
    }
    DEPTH.set(DEPTH.get() + 1);
    let _inside = Inside;
    work()
}

/// Called before a fork, in the forking thread.
pub(crate) extern "C" fn before() {
    FORKING.fetch_add(1, Ordering::SeqCst);
    let until = Instant::now() + FORK_WAIT;
    while DEPTH.get() == 0 && RUNNING.load(Ordering::SeqCst) > 0 && Instant::now() < until {
        std::thread::sleep(NAP);
    }
}

/// Called after a fork in the process that forked.
pub(crate) extern "C" fn in_parent() {
    FORKING.fetch_sub(1, Ordering::SeqCst);
}

/// Called after a fork in the child, where only one thread is left.
pub(crate) fn in_child() {
    FORKING.store(0, Ordering::SeqCst);
    RUNNING.store(u32::from(DEPTH.get() > 0), Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::without_fork;
    use std::sync::atomic::AtomicBool;

    fn fork_and_reap() {
        // SAFETY: the child ends at once.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: a child of this process, a writable status.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
    }

    /// Serialises the tests, since the counters belong to the process.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
        ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[test]
    fn a_fork_waits_for_other_threads_and_not_for_its_own() {
        let _one = one_at_a_time();
        for nested in [false, true] {
            let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
            let begin = Instant::now();
            std::thread::scope(|s| {
                s.spawn(|| {
                    without_fork(|| {
                        if nested {
                            without_fork(|| ());
                        }
                        begun.store(true, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(300));
                        done.store(true, Ordering::SeqCst);
                    })
                });
                while !begun.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                fork_and_reap();
                assert!(done.load(Ordering::SeqCst), "the fork interrupted the section");
            });
            without_fork(fork_and_reap);
            fork_and_reap();
            assert!(begin.elapsed() < FORK_WAIT, "a fork waited for nothing");
            assert_eq!((RUNNING.load(Ordering::SeqCst), DEPTH.get()), (0, 0));
        }
    }

    #[test]
    fn a_new_section_waits_for_a_pending_fork() {
        let _one = one_at_a_time();
        // Registers the fork handlers.
        without_fork(|| ());
        before();
        let begun = AtomicBool::new(false);
        let early = std::thread::scope(|s| {
            s.spawn(|| without_fork(|| begun.store(true, Ordering::SeqCst)));
            std::thread::sleep(Duration::from_millis(100));
            let early = begun.load(Ordering::SeqCst);
            in_parent();
            early
        });
        assert!(!early && begun.load(Ordering::SeqCst));
    }
}
