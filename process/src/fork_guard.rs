//! What a fork must not cut in half: the loading of a library (the dynamic loader's tables, copied at that moment, make the child's first
//! look for a library crash), and calls into libraries of others that have locks and state of their own.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Threads inside [`run`]; forks that are about to happen.
static RUNNING: AtomicU32 = AtomicU32::new(0);
static FORKING: AtomicU32 = AtomicU32::new(0);
/// A fork that has waited this long happens.
const FORK_WAIT: Duration = Duration::from_secs(10);
const NAP: Duration = Duration::from_micros(100);

thread_local! {
    /// How often this thread is inside [`run`]. Has no destructor, so it is there to the thread's end.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs what a fork of another thread waits for; forks are watched.
pub(crate) fn run<R>(work: impl FnOnce() -> R) -> R {
    struct Inside;
    impl Drop for Inside {
        fn drop(&mut self) {
            DEPTH.set(DEPTH.get() - 1);
            if DEPTH.get() == 0 {
                // A child of what runs has begun anew.
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

/// Called before a fork, by the thread that forks.
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

    /// These count what runs in the process.
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
                assert!(done.load(Ordering::SeqCst), "the fork came into the middle of it");
            });
            without_fork(fork_and_reap);
            fork_and_reap();
            assert!(begin.elapsed() < FORK_WAIT, "a fork waited for nothing");
            assert_eq!((RUNNING.load(Ordering::SeqCst), DEPTH.get()), (0, 0));
        }
    }

    #[test]
    fn what_would_begin_waits_for_a_fork_that_is_about_to_happen() {
        let _one = one_at_a_time();
        // Forks are watched from here on.
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
