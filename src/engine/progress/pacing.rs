//! Who drives a connection, the progress thread or an application thread that polls in a loop, and what either does when there is
//! nothing to do. Pure; time comes from the caller. Knows nothing about sockets, channels or transfers but the numbers passed in.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A poll within this time after the last one returned belongs to a loop that drives the connection. A thread that polls less
/// often must not keep the progress thread away: the connection would move only when it polls.
const TIGHT_US: u64 = 50;
/// How long after such a poll the thread is expected to go on polling.
const WINDOW_US: u64 = 400;

/// The polls of application threads, as the progress thread sees them; times in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Polls {
    /// When the last poll returned.
    returned: AtomicU64,
    /// When a thread last polled in a loop; 0: none does.
    looping: AtomicU64,
    /// When that loop began.
    begun: AtomicU64,
    /// Until when a poll sleeps where it would yield, and for how long the last such period was.
    sleeps_until: AtomicU64,
    slept_for: AtomicU64,
}

/// A yield that takes longer, microseconds, has let a thread run that computes. The kernel gives the core back at its tick, up to 4 ms
/// later, but a thread that sleeps gets one soon after it wakes.
const LONG_YIELD_US: u64 = 500;
/// How long polls sleep instead after such a yield: at first, and at most. It doubles while each next yield is long, too.
const SLEEPS_US: [u64; 2] = [20_000, 1_280_000];

impl Polls {
    /// A poll begins.
    pub(crate) fn enter(&self, now: u64) {
        if now.saturating_sub(self.returned.load(Ordering::Relaxed)) <= TIGHT_US {
            self.looping.store(now, Ordering::Relaxed);
        } else {
            self.begun.store(now, Ordering::Relaxed);
        }
    }

    /// A poll returns. The time inside the poll does not count: it may do much work, or yield to the I/O threads.
    pub(crate) fn leave(&self, now: u64) {
        self.returned.store(now, Ordering::Relaxed);
    }

    /// The polling thread now sleeps. Returns whether it had been polling in a loop.
    pub(crate) fn stop(&self) -> bool {
        self.looping.swap(0, Ordering::Relaxed) != 0
    }

    /// A poll yielded the core from `before` until `after`.
    pub(crate) fn yielded(&self, before: u64, after: u64) {
        if after.saturating_sub(before) <= LONG_YIELD_US {
            return;
        }
        let (until, last) = (self.sleeps_until.load(Ordering::Relaxed), self.slept_for.load(Ordering::Relaxed));
        let length = if before < until + last { (2 * last).min(SLEEPS_US[1]) } else { SLEEPS_US[0] };
        self.slept_for.store(length, Ordering::Relaxed);
        self.sleeps_until.store(after + length, Ordering::Relaxed);
    }

    /// Whether threads that compute took the core at a recent yield.
    pub(crate) fn contended(&self, now: u64) -> bool {
        now < self.sleeps_until.load(Ordering::Relaxed)
    }

    /// For how long an application thread has been polling in a loop, if one is: the progress thread leaves the connection to it.
    pub(crate) fn active(&self, now: u64) -> Option<u64> {
        let at = self.looping.load(Ordering::Relaxed);
        (at != 0 && now.saturating_sub(at) < WINDOW_US).then(|| now.saturating_sub(self.begun.load(Ordering::Relaxed)))
    }
}

/// Whether a spinning thread takes a core from a working one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cores {
    /// Threads always compete for cores: no thread spins while another could work.
    Few,
    /// One core for each I/O thread. No thread spins while a large transfer keeps all of them busy.
    Some,
    /// Spinning costs no other thread its core.
    Many,
}

impl Cores {
    /// The class of this machine, by the cores that this process may use.
    pub(crate) fn here() -> Cores {
        match std::thread::available_parallelism().map_or(2, usize::from) {
            ..=2 => Cores::Few,
            3..=4 => Cores::Some,
            _ => Cores::Many,
        }
    }

    /// Bytes up to which a transfer uses one channel: where threads compete for cores, more channels only add threads that
    /// compete.
    pub(crate) fn alone(self) -> u64 {
        match self {
            Cores::Few | Cores::Some => NAP_BYTES,
            Cores::Many => 0,
        }
    }

    /// Whether a spinning thread takes the core of a working one. `large`: a large transfer is in flight.
    fn are_short(self, large: bool) -> bool {
        self == Cores::Few || (self == Cores::Some && large)
    }
}

/// A poll of a transfer, before it returns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Situation {
    pub cores: Cores,
    /// The I/O threads ring when a request has ended.
    pub doorbell: bool,
    /// The previous poll was of the same transfer.
    pub only_this: bool,
    /// The channels have chunks in flight.
    pub channels_busy: bool,
    /// A device copies, which rings no doorbell.
    pub copying: bool,
    /// A yield would give the core to a thread that computes.
    pub contended: bool,
    /// Bytes of the transfer that are not yet moved.
    pub missing: u64,
    /// Size of the transfer.
    pub total: u64,
}

/// What a poll does besides driving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// Drives and returns at once.
    None,
    /// Drives, and yields the core if nothing moved.
    Yield,
    /// Drives, and sleeps if nothing moved.
    Nap(Duration),
    /// Leaves driving to the progress thread and sleeps: the I/O threads need the core.
    HandOver(Duration),
}

/// A transfer that still lacks more bytes than this is large: its poll may sleep.
pub(crate) const NAP_BYTES: u64 = 1 << 20;
/// More bytes than a channel moves in a microsecond: a nap of the missing bytes divided by this ends before the transfer does.
const NAP_BYTES_PER_US: u64 = 32 << 10;
/// Longest nap, microseconds; the nap where several transfers are polled in turn.
const NAP_MAX_US: u64 = 300;
const NAP_AMONG_US: u64 = 20;

/// What a poll does while the transfer is incomplete.
pub(crate) fn pause(s: &Situation) -> Pause {
    let large = s.missing > NAP_BYTES;
    if !s.cores.are_short(large) || s.copying {
        return Pause::None;
    }
    if large && s.only_this && s.channels_busy && s.doorbell {
        return Pause::HandOver(Duration::from_micros((s.missing / NAP_BYTES_PER_US).min(NAP_MAX_US)));
    }
    // The I/O threads, or a peer on this host, are working. Among several transfers polled in turn, none may hold up the others
    // for long.
    match (s.channels_busy || s.total > NAP_BYTES, large) {
        _ if s.cores != Cores::Few => Pause::None,
        (true, true) => Pause::Nap(Duration::from_micros(NAP_AMONG_US)),
        (true, false) if s.contended => Pause::Nap(Duration::from_micros(NAP_AMONG_US)),
        (true, false) => Pause::Yield,
        (false, _) => Pause::None,
    }
}

/// What the progress thread found in a round.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Round {
    /// Something moved.
    pub any: bool,
    /// A connection waits for channels that have no doorbell.
    pub polled: bool,
    /// A channel has chunks in flight.
    pub channels_busy: bool,
    /// Enough bytes are in flight to keep the I/O threads busy.
    pub large: bool,
    /// A device copies.
    pub copying: bool,
    /// The shortest time for which an application thread has been driving a connection, if any is.
    pub driven: Option<Duration>,
    /// A connection has work, or waits for its peer.
    pub active: bool,
    /// The engine has connections.
    pub watched: bool,
}

/// What the progress thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Another round at once.
    Again,
    /// Another round at once, since spinning is cheaper than waking.
    Spin,
    /// Another round after yielding the core.
    Yield,
    /// Waits for an event, at most this long.
    Sleep(Duration),
}

/// Bounds of the sleep while an application thread drives a connection. Each check takes the application's core for a moment, so
/// the sleep is as long as the application has been driving, within these bounds.
const STAND_BY: [Duration; 2] = [Duration::from_micros(400), Duration::from_millis(2)];
/// Longest sleep with work in flight, and without.
const BUSY_SLEEP: Duration = Duration::from_millis(50);
const IDLE_SLEEP: Duration = Duration::from_secs(10);

/// What the progress thread does after a round. `quiet`: time since something moved; `spin`: how long to spin after that.
pub(crate) fn step(round: &Round, quiet: Duration, spin: Duration, cores: Cores) -> Step {
    if round.any {
        return Step::Again;
    }
    // A finished device copy rings no doorbell.
    if round.copying {
        return Step::Spin;
    }
    // The doorbells wake this thread; where cores are short, spinning would only take them from the I/O threads.
    let rung = (round.channels_busy || round.driven.is_some()) && !round.polled && cores.are_short(round.large);
    if !rung && quiet < spin && round.watched {
        // A peer on this host may need this very core.
        return if cores == Cores::Few { Step::Yield } else { Step::Spin };
    }
    if round.polled {
        return Step::Yield;
    }
    Step::Sleep(match round.driven {
        Some(since) => since.clamp(STAND_BY[0], STAND_BY[1]),
        None if round.active => BUSY_SLEEP,
        None => IDLE_SLEEP,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(polls: &Polls, from: u64, to: u64) {
        polls.enter(from);
        polls.leave(to);
    }

    #[test]
    fn a_loop_drives_until_it_stops() {
        let polls = Polls::default();
        poll(&polls, 1000, 1001);
        assert_eq!(polls.active(1001), None, "one poll is not a loop");
        // Long polls, short pauses.
        poll(&polls, 1010, 1500);
        poll(&polls, 1501, 2000);
        assert_eq!(polls.active(1510), Some(510));
        assert_eq!(polls.active(1501 + WINDOW_US - 1), Some(501 + WINDOW_US - 1));
        assert_eq!(polls.active(1501 + WINDOW_US), None);
        poll(&polls, 2001, 2002);
        assert!(polls.stop() && !polls.stop());
        assert_eq!(polls.active(2003), None);
    }

    #[test]
    fn occasional_polls_never_count_as_driving() {
        for pause in [TIGHT_US + 1, 100, 500, 1000, 1_000_000] {
            let polls = Polls::default();
            for i in 1..100 {
                poll(&polls, i * (pause + 5), i * (pause + 5) + 5);
                assert_eq!(polls.active(i * (pause + 5) + 5), None, "every {pause} us");
            }
        }
    }

    #[test]
    fn a_long_yield_makes_polls_sleep_and_longer_each_time() {
        let polls = Polls::default();
        polls.yielded(5000, 5000 + LONG_YIELD_US);
        assert!(!polls.contended(5000 + LONG_YIELD_US));
        let mut now = 10_000;
        for length in [20_000, 40_000, 80_000, 160_000, 320_000, 640_000, 1_280_000, 1_280_000] {
            polls.yielded(now, now + 4000);
            now += 4000;
            assert!(polls.contended(now) && polls.contended(now + length - 1) && !polls.contended(now + length), "{length}");
            // Short ones in between change nothing.
            now += length;
            polls.yielded(now, now + 10);
            assert!(!polls.contended(now));
            now += 1000;
        }
        // After a long time without one it begins anew.
        now += 2 * SLEEPS_US[1];
        polls.yielded(now, now + 4000);
        assert!(polls.contended(now + 4000 + SLEEPS_US[0] - 1) && !polls.contended(now + 4000 + SLEEPS_US[0]));
    }

    const FEW: Situation = Situation {
        cores: Cores::Few,
        doorbell: true,
        only_this: true,
        channels_busy: true,
        copying: false,
        contended: false,
        missing: 64 << 20,
        total: 64 << 20,
    };

    const SOME: Situation = Situation { cores: Cores::Some, ..FEW };

    #[test]
    fn a_poll_sleeps_only_where_others_need_the_core() {
        let us = Duration::from_micros;
        let cases = [
            (FEW, Pause::HandOver(us(NAP_MAX_US))),
            (Situation { missing: 2 << 20, ..FEW }, Pause::HandOver(us(64))),
            (Situation { cores: Cores::Many, ..FEW }, Pause::None),
            (SOME, Pause::HandOver(us(NAP_MAX_US))),
            (Situation { only_this: false, ..SOME }, Pause::None),
            (Situation { doorbell: false, ..SOME }, Pause::None),
            (Situation { missing: NAP_BYTES, ..SOME }, Pause::None),
            (Situation { missing: 4096, total: 4096, ..SOME }, Pause::None),
            (Situation { copying: true, ..FEW }, Pause::None),
            (Situation { only_this: false, ..FEW }, Pause::Nap(us(NAP_AMONG_US))),
            (Situation { doorbell: false, ..FEW }, Pause::Nap(us(NAP_AMONG_US))),
            (Situation { channels_busy: false, ..FEW }, Pause::Nap(us(NAP_AMONG_US))),
            (Situation { missing: NAP_BYTES, ..FEW }, Pause::Yield),
            (Situation { missing: 4096, total: 4096, ..FEW }, Pause::Yield),
            (Situation { missing: 4096, total: 4096, contended: true, ..FEW }, Pause::Nap(us(NAP_AMONG_US))),
            (Situation { missing: 4096, total: 4096, contended: true, ..SOME }, Pause::None),
            (Situation { missing: 4096, total: 4096, channels_busy: false, ..FEW }, Pause::None),
        ];
        for (situation, expected) in cases {
            assert_eq!(pause(&situation), expected, "{situation:?}");
        }
    }

    #[test]
    fn the_progress_thread_spins_only_while_that_pays() {
        let (now, later, spin) = (Duration::ZERO, Duration::from_millis(1), Duration::from_micros(100));
        let idle = Round { watched: true, ..Round::default() };
        let busy = Round { active: true, channels_busy: true, ..idle };
        let full = Round { large: true, ..busy };
        let (few, many) = (Cores::Few, Cores::Many);
        let cases = [
            (Round { any: true, ..idle }, later, few, Step::Again),
            (Round { copying: true, ..idle }, later, few, Step::Spin),
            (idle, now, few, Step::Yield),
            (idle, now, Cores::Some, Step::Spin),
            (idle, later, many, Step::Sleep(IDLE_SLEEP)),
            (Round { watched: false, ..idle }, now, many, Step::Sleep(IDLE_SLEEP)),
            (Round { active: true, ..idle }, later, many, Step::Sleep(BUSY_SLEEP)),
            (full, now, many, Step::Spin),
            (busy, now, Cores::Some, Step::Spin),
            (full, now, Cores::Some, Step::Sleep(BUSY_SLEEP)),
            (busy, now, few, Step::Sleep(BUSY_SLEEP)),
            (Round { polled: true, ..busy }, now, few, Step::Yield),
            (Round { polled: true, ..busy }, later, few, Step::Yield),
            (Round { driven: Some(now), ..idle }, now, few, Step::Sleep(STAND_BY[0])),
            (Round { driven: Some(later), ..idle }, later, many, Step::Sleep(later)),
            (Round { driven: Some(Duration::from_secs(1)), ..idle }, later, few, Step::Sleep(STAND_BY[1])),
        ];
        for (round, quiet, cores, expected) in cases {
            assert_eq!(step(&round, quiet, spin, cores), expected, "{round:?} after {quiet:?}, {cores:?} cores");
        }
    }
}
