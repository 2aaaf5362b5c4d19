//! A process forks while its threads lock and unlock. The child's own threads, locks and waits must work,
//! at the same addresses as the parent's. (The parent's threads neither start nor end meanwhile: in programs whose `main` is Rust, the
//! standard library does both under a lock of its own.)

use process::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const CHILDREN: usize = 150;
const LIMIT: Duration = Duration::from_secs(30);

/// Threads that pass a number to each other, so that all of them wait and wake, until it reaches `rounds` or `stop` is set.
fn relay(threads: usize, rounds: usize, stop: &Arc<AtomicBool>) -> Vec<JoinHandle<()>> {
    let baton = Arc::new((Mutex::new(0usize), Condvar::new()));
    let run = |mine: usize| {
        let (baton, stop) = (baton.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut at = baton.0.lock();
            while *at < rounds && !stop.load(Ordering::Relaxed) {
                if *at % threads == mine {
                    *at += 1;
                    baton.1.notify_all();
                } else {
                    baton.1.wait(&mut at);
                }
            }
            baton.1.notify_all();
        })
    };
    (0..threads).map(run).collect()
}

fn join(threads: Vec<JoinHandle<()>>) {
    threads.into_iter().for_each(|t| t.join().expect("a thread of a relay"));
}

fn awaited(child: libc::pid_t) -> Option<i32> {
    let until = Instant::now() + LIMIT;
    let mut status = 0;
    while Instant::now() < until {
        // SAFETY: a child of this process, a writable status.
        match unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } {
            0 => std::thread::sleep(Duration::from_millis(1)),
            _ => return Some(status),
        }
    }
    // SAFETY: our own child, which hangs: ended and reaped here.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, &mut status, 0);
    }
    None
}

#[test]
fn children_of_a_busy_process_have_locks_that_work() {
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..4).flat_map(|_| relay(5, usize::MAX, &stop)).collect();
    // All have begun.
    std::thread::sleep(Duration::from_millis(500));
    for number in 0..CHILDREN {
        // SAFETY: the child makes threads and locks of its own, which is what is tested, and ends by _exit.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        if child == 0 {
            (0..2).for_each(|_| join(relay(16, 64, &stop)));
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(0) };
        }
        assert_eq!(awaited(child), Some(0), "child {number} of {CHILDREN}");
    }
    stop.store(true, Ordering::Relaxed);
    join(threads);
}
