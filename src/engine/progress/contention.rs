//! Whether other threads want the core on which the progress thread spins. Pure; time comes from the caller.
//!
//! On a shared core, a thread that spins delays the thread that it waits for: a 4 KiB write between two processes bound to one core took
//! three to four times as long as with a thread that sleeps. But each wake-up has a cost, and the kernel tends to wake a thread on
//! the core of the thread that woke it, where both then stay. So the progress thread spins until other threads have taken a share of
//! its core over a whole window, which is longer than the kernel takes to move one of two busy threads to an idle core.

use std::time::{Duration, Instant};

/// A yield that takes longer has let another thread run.
const YIELDED: Duration = Duration::from_micros(4);
/// The time over which yields are judged. Linux 6.18 needed 20 to 50 ms to separate two threads.
const WINDOW: Duration = Duration::from_millis(50);
/// A window is contended if other threads ran for more than 1 / SHARE of it. A thread alone on its core lost 1 %, one that shared
/// it 10 %: the thread yields only every few rounds, and a yield often returns at once although another thread could run.
const SHARE: u32 = 20;
/// What one yield counts at most: a thread that computed until its tick and left says nothing about the next milliseconds.
const MOST: Duration = Duration::from_millis(1);
/// How long the thread sleeps instead of spinning after a contended window: at first, and at most.
const PAUSE: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(3200)];

#[derive(Debug)]
pub(crate) struct Contention {
    /// When the window began, and for how long other threads ran in it.
    began: Instant,
    lost: Duration,
    /// The thread does not spin before then.
    until: Instant,
    /// The next pause; it doubles with each contended window in a row.
    pause: Duration,
}

impl Contention {
    pub(crate) fn new(now: Instant) -> Contention {
        Contention { began: now, lost: Duration::ZERO, until: now, pause: PAUSE[0] }
    }

    /// Whether spinning is worthwhile.
    pub(crate) fn may_spin(&self, now: Instant) -> bool {
        now >= self.until
    }

    /// The thread yielded its core from `before` until `after`.
    pub(crate) fn yielded(&mut self, before: Instant, after: Instant) {
        let took = after - before;
        if took > YIELDED {
            self.lost += took.min(MOST);
        }
        let elapsed = after - self.began;
        if elapsed < WINDOW {
            return;
        }
        // After a long time without yields the window starts anew.
        if elapsed < 2 * WINDOW + took && self.lost > elapsed / SHARE {
            self.until = after + self.pause;
            self.pause = (self.pause * 2).min(PAUSE[1]);
            self.began = self.until;
        } else {
            self.pause = PAUSE[0];
            self.began = after;
        }
        self.lost = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Yields for `time`, each of which takes `each`, with `between` them; returns the end.
    fn yields(contention: &mut Contention, from: Instant, time: Duration, each: Duration, between: Duration) -> Instant {
        let mut now = from;
        while now < from + time && contention.may_spin(now) {
            contention.yielded(now, now + each);
            now += each + between;
        }
        now
    }

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn rare_slow_yields_do_not_stop_the_spinning() {
        let start = Instant::now();
        let mut contention = Contention::new(start);
        let mut now = start;
        for _ in 0..1000 {
            now = yields(&mut contention, now, 2000 * US, US, US);
            contention.yielded(now, now + 100 * US);
            now += 100 * US;
            assert!(contention.may_spin(now));
        }
    }

    #[test]
    fn a_shared_core_ends_the_spinning_after_a_window_and_for_longer_each_time() {
        let start = Instant::now();
        let mut contention = Contention::new(start);
        let mut now = start;
        for pause in [200, 400, 800, 1600, 3200, 3200] {
            let stopped = yields(&mut contention, now, 2 * WINDOW, 50 * US, 10 * US);
            assert!(stopped - now >= WINDOW && stopped - now < WINDOW + 100 * US, "{:?}", stopped - now);
            assert!(!contention.may_spin(stopped + Duration::from_millis(pause - 1)));
            now = stopped + Duration::from_millis(pause);
            assert!(contention.may_spin(now));
        }
        // Alone again: the next pause is short.
        now = yields(&mut contention, now, 2 * WINDOW, US, US);
        let stopped = yields(&mut contention, now, 2 * WINDOW, 50 * US, 10 * US);
        assert!(!contention.may_spin(stopped));
        assert!(contention.may_spin(stopped + PAUSE[0]));
    }

    #[test]
    fn one_long_yield_does_not_stop_the_spinning_and_one_after_another_does() {
        let start = Instant::now();
        let mut contention = Contention::new(start);
        let mut now = start;
        for _ in 0..100 {
            contention.yielded(now, now + 8000 * US);
            now = yields(&mut contention, now + 8000 * US, WINDOW, US, US);
            assert!(contention.may_spin(now));
        }
        assert!(yields(&mut contention, now, 3 * WINDOW, 4000 * US, 10 * US) < now + 3 * WINDOW);
    }

    #[test]
    fn a_thread_that_rarely_yields_is_not_judged_by_one_yield() {
        let start = Instant::now();
        let mut contention = Contention::new(start);
        let later = start + Duration::from_secs(1);
        contention.yielded(later, later + 100 * US);
        assert!(contention.may_spin(later + 100 * US));
    }
}
