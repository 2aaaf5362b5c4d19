//! The speed of a NIC over all its channels, from acknowledgements: bytes that the kernel holds are not yet sent. Pure.

use super::{NicLoad, Probe, SHORTEST};
use std::time::{Duration, Instant};

/// Samples further apart than this say nothing about the time in between.
const GAP: Duration = Duration::from_millis(100);
/// A sample spans this much busy time and volume, or `LONG` for a NIC that hardly moves.
const SPAN: Duration = Duration::from_millis(20);
const VOLUME: u64 = 64 << 10;
const LONG: Duration = Duration::from_millis(200);
/// A NIC with idle time in between still gives a lower bound on its speed. It is used only after this volume, since a shaper lets
/// bursts through, and raises the estimate by at most a factor of two at a time.
const BURST: u64 = 256 << 10;
/// A NIC of unknown speed may have this much in flight. The amount doubles each time all of it is acknowledged by the next
/// sample.
const TRUST: u64 = 256 << 10;
/// The weight of a new sample: falling speeds count quickly, rising ones slowly.
const DOWN: f64 = 0.6;
const UP: f64 = 0.3;
/// The shortest time between samples of a NIC of unknown speed, and of other NICs.
const FIRST_LOOKS: Duration = Duration::from_micros(100);
const LOOKS: Duration = Duration::from_millis(1);
/// A NIC's speed is known after this many sampling intervals plus this many round trips.
const DELAY_LOOKS: u32 = 3;
const ROUND_TRIPS: u32 = 4;
/// A slow NIC is probed with one short chunk, which takes at most this fraction of its time. At the known speed the chunk would
/// take this many sampling intervals; if it is acknowledged sooner, the NIC is faster.
const PROBE_LOOKS: f64 = 4.0;
const PROBE_SHARE: f64 = 64.0;
const PROBE_LEAST: Duration = Duration::from_secs(1);
const PROBE_MOST: Duration = Duration::from_secs(60);

/// A pair of NICs, one at each engine.
#[derive(Debug, Default)]
pub(crate) struct Nic {
    speed: f64,
    /// How often its limit was doubled.
    trusted: u32,
    looked: Option<Instant>,
    postponed: Option<Instant>,
    acknowledged: u64,
    /// Its backlog at the last sample, and the bytes added since.
    backlog: u64,
    given: u64,
    /// Busy time since the last sample.
    bytes: u64,
    busy: Duration,
    /// Time since then, idle time included, and the bytes in it.
    least_bytes: u64,
    least_time: Duration,
    /// The interval between the last two related samples.
    gap: Duration,
    /// When it was last probed or measured.
    tried: Option<Instant>,
    round_trip: Duration,
}

impl Nic {
    /// Whether [`Nic::look`] is due.
    pub(crate) fn due(&self, now: Instant) -> bool {
        let pause = if self.speed == 0.0 { FIRST_LOOKS } else { LOOKS };
        let again = self.postponed.is_none_or(|at| now.saturating_duration_since(at) >= FIRST_LOOKS);
        again && self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= pause)
    }

    /// Bytes per second; 0 while unknown.
    pub(crate) fn speed(&self) -> f64 {
        self.speed
    }

    /// Puts off the next sample: the plugin cannot report progress now.
    pub(crate) fn postpone(&mut self, now: Instant) {
        self.postponed = Some(now);
    }

    /// One of its channels took a chunk.
    pub(crate) fn gave(&mut self, len: u64, now: Instant) {
        if self.backlog + self.given == 0 && self.load(now).probe.is_some() {
            self.tried = Some(now);
        }
        self.given += len;
    }

    /// Takes a sample: the bytes acknowledged by `now`, and those that its channels took and that are not acknowledged.
    /// `round_trip`: zero while unknown.
    pub(crate) fn look(&mut self, acknowledged: u64, backlog: u64, round_trip: Duration, now: Instant) {
        self.round_trip = round_trip;
        let before = self.looked.replace(now);
        let moved = acknowledged.saturating_sub(std::mem::replace(&mut self.acknowledged, acknowledged));
        let had = std::mem::replace(&mut self.backlog, backlog);
        if self.speed == 0.0 && moved > 0 && moved >= had {
            self.trusted = (self.trusted + 1).min(20);
        }
        self.given = 0;
        let Some(gap) = before.map(|before| now.saturating_duration_since(before)).filter(|gap| !gap.is_zero()) else { return };
        if gap <= GAP {
            self.gap = gap;
        }
        // The moved bytes were queued before and more are left, so it was busy all the time.
        if had > 0 && moved <= had && backlog > 0 && gap <= GAP {
            (self.bytes, self.busy) = (self.bytes + moved, self.busy + gap);
            if (self.busy >= SPAN && self.bytes >= VOLUME) || self.busy >= LONG {
                self.sample();
            }
        } else if moved > 0 {
            (self.least_bytes, self.least_time) = (self.least_bytes + moved, self.least_time + gap);
            self.at_least();
        }
    }

    fn sample(&mut self) {
        let sample = self.bytes as f64 / self.busy.as_secs_f64();
        let weight = match self.speed {
            0.0 => 1.0,
            speed if sample < speed => DOWN,
            // It may be a burst.
            _ if self.bytes < BURST => return,
            _ => UP,
        };
        self.speed += (sample - self.speed) * weight;
        (self.bytes, self.busy, self.least_bytes, self.least_time) = (0, Duration::ZERO, 0, Duration::ZERO);
    }

    fn at_least(&mut self) {
        let least = self.least_bytes as f64 / self.least_time.as_secs_f64();
        if self.least_bytes >= BURST {
            self.speed = self.speed.max(least.min(2.0 * self.speed));
            (self.least_bytes, self.least_time) = (0, Duration::ZERO);
        }
    }

    /// Its state for striping.
    pub(crate) fn load(&self, now: Instant) -> NicLoad {
        let probe = ((PROBE_LOOKS * self.speed * self.gap.as_secs_f64()) as u64).max(SHORTEST);
        let pause = match self.speed {
            speed if speed > 0.0 => Duration::try_from_secs_f64(PROBE_SHARE * probe as f64 / speed).unwrap_or(PROBE_MOST),
            _ => PROBE_LEAST,
        };
        let pause = pause.clamp(PROBE_LEAST, PROBE_MOST);
        let since = |pause: Duration| self.tried.is_none_or(|tried| now.saturating_duration_since(tried) >= pause);
        NicLoad {
            backlog: self.backlog + self.given,
            speed: self.speed,
            trust: TRUST << self.trusted,
            moved: self.acknowledged,
            delay: (DELAY_LOOKS * self.gap).max(ROUND_TRIPS * self.round_trip),
            probe: since(PROBE_LEAST).then(|| Probe { len: probe, at_any_cost: since(pause) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn busy_times_are_samples_and_others_a_lower_bound() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        // 1 MB a second, always busy.
        for ms in 0..200 {
            nic.look(1000 * ms, 5000, Duration::ZERO, at(start, ms));
        }
        assert!((nic.speed() - 1e6).abs() < 1e4, "{}", nic.speed());
        // A long time without a sample says nothing, and neither does a single chunk that was no faster.
        nic.look(201_000, 5, Duration::ZERO, at(start, 5000));
        nic.look(300_000, 0, Duration::ZERO, at(start, 5090));
        nic.look(900_000, 0, Duration::ZERO, at(start, 6090));
        assert!((nic.speed() - 1e6).abs() < 1e4, "{}", nic.speed());
        // A standstill shows quickly.
        nic.look(900_000, 9000, Duration::ZERO, at(start, 7000));
        for ms in (7050..7500).step_by(50) {
            nic.look(900_000, 9000, Duration::ZERO, at(start, ms));
        }
        assert!(nic.speed() < 0.5e6, "{}", nic.speed());
    }

    #[test]
    fn the_offered_load_does_not_count_as_the_speed() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        // A chunk each millisecond, acknowledged before the next.
        for ms in 0..500 {
            nic.look(512_000 * ms, if ms % 2 == 0 { 0 } else { 100 }, Duration::ZERO, at(start, ms));
            nic.gave(512_000, at(start, ms));
            assert!(nic.load(at(start, ms)).backlog >= 512_000);
        }
        assert_eq!(nic.speed(), 0.0);
    }

    #[test]
    fn a_burst_does_not_raise_the_estimate_but_volume_does() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        for ms in 0..200 {
            nic.look(1000 * ms, 5000, Duration::ZERO, at(start, ms));
        }
        let before = nic.speed();
        // Bursts of 192 KiB now and then.
        let mut all = 200_000;
        nic.look(all, 0, Duration::ZERO, at(start, 200));
        for burst in 0..3 {
            all += 64 << 10;
            nic.look(all, 0, Duration::ZERO, at(start, 210 + 10 * burst));
        }
        assert_eq!(nic.speed(), before);
        for burst in 0..4 {
            all += 64 << 10;
            nic.look(all, 0, Duration::ZERO, at(start, 310 + burst));
        }
        assert_eq!(nic.speed(), 2.0 * before);
    }

    #[test]
    fn slower_nics_are_probed_more_rarely() {
        let start = Instant::now();
        let pause = |speed: f64| {
            let mut nic = Nic { speed, ..Nic::default() };
            nic.gave(1, start);
            (0..100_000)
                .step_by(100)
                .find(|&ms| nic.load(at(start, ms)).probe.is_some_and(|probe| probe.at_any_cost))
                .unwrap_or(u64::MAX)
        };
        assert_eq!([1e9, 12.5e6, 1e3].map(pause), [1000, 1000, 60_000]);
        assert!((6000..8000).contains(&pause(0.625e6)), "{}", pause(0.625e6));
        assert!(Nic::default().load(start).probe.is_some());
    }
}
