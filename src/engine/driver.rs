//! Who drives a connection: the progress thread, or an application thread that polls in a loop. Pure; time is the caller's, in
//! microseconds.

use std::sync::atomic::{AtomicU64, Ordering};

/// A poll within this time after the last one returned is part of a loop that drives the connection. A thread that looks in less often
/// must not keep the progress thread away: the connection would move only when it looks in.
const TIGHT_US: u64 = 50;
/// How long after such a poll the thread is taken to go on polling.
const WINDOW_US: u64 = 400;

/// The polls of application threads, as the progress thread sees them.
#[derive(Debug, Default)]
pub(crate) struct Driver {
    /// When the last poll returned.
    returned: AtomicU64,
    /// When a thread last polled in a loop; 0: none does.
    looping: AtomicU64,
    /// When that loop began.
    begun: AtomicU64,
}

impl Driver {
    /// A poll begins.
    pub(crate) fn enter(&self, now: u64) {
        if now.saturating_sub(self.returned.load(Ordering::Relaxed)) <= TIGHT_US {
            self.looping.store(now, Ordering::Relaxed);
        } else {
            self.begun.store(now, Ordering::Relaxed);
        }
    }

    /// A poll returns. The time in it does not count: a poll may do much work, or give way to the channels' threads.
    pub(crate) fn leave(&self, now: u64) {
        self.returned.store(now, Ordering::Relaxed);
    }

    /// The thread that polled waits from now on. Whether it had been polling in a loop.
    pub(crate) fn stop(&self) -> bool {
        self.looping.swap(0, Ordering::Relaxed) != 0
    }

    /// An application thread has polled in a loop just now and is taken to go on: the progress thread leaves the connection to it. Gives
    /// for how long it has done so.
    pub(crate) fn active(&self, now: u64) -> Option<u64> {
        let at = self.looping.load(Ordering::Relaxed);
        (at != 0 && now.saturating_sub(at) < WINDOW_US).then(|| now.saturating_sub(self.begun.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(driver: &Driver, from: u64, to: u64) {
        driver.enter(from);
        driver.leave(to);
    }

    #[test]
    fn a_loop_drives_until_it_stops() {
        let driver = Driver::default();
        poll(&driver, 1000, 1001);
        assert_eq!(driver.active(1001), None, "one poll is no loop");
        // Long polls, short pauses.
        poll(&driver, 1010, 1500);
        poll(&driver, 1501, 2000);
        assert_eq!(driver.active(1510), Some(510));
        assert_eq!(driver.active(1501 + WINDOW_US - 1), Some(501 + WINDOW_US - 1));
        assert_eq!(driver.active(1501 + WINDOW_US), None);
        poll(&driver, 2001, 2002);
        assert!(driver.stop() && !driver.stop());
        assert_eq!(driver.active(2003), None);
    }

    #[test]
    fn looking_in_now_and_then_never_drives() {
        for pause in [TIGHT_US + 1, 100, 500, 1000, 1_000_000] {
            let driver = Driver::default();
            for i in 1..100 {
                poll(&driver, i * (pause + 5), i * (pause + 5) + 5);
                assert_eq!(driver.active(i * (pause + 5) + 5), None, "every {pause} us");
            }
        }
    }
}
