//! Striping: which channel carries the next chunk. Channels run at their own speed; the one that would finish the chunk first
//! gets it. Pure.

use std::time::{Duration, Instant};

/// State of a channel as striping sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Free places of its window.
    pub free: usize,
    /// Bytes posted and not yet done.
    pub queued: u64,
    /// Measured speed, bytes per second; 0 while unknown.
    pub rate: f64,
}

/// A free channel is passed over when it would finish a chunk this many times later than the best one: then waiting is faster.
const PATIENCE: f64 = 2.0;

/// A channel counts as slow when its speed is less than this part of the reference: smaller differences are noise, and acting on noise
/// would make the busier channel look ever faster.
const SLOW: f64 = 0.5;

/// The channel for a chunk of `len` bytes: of those with a free place the one that would finish it first. `None` when none is free, or
/// only channels so slow that waiting for a fast one beats them.
pub(crate) fn pick(loads: &[Load], len: u64) -> Option<usize> {
    let reference = reference(loads);
    let finish = |l: &Load| {
        // A channel without a measurement is taken to be as fast as the others.
        let slow = l.rate > 0.0 && l.rate < SLOW * reference;
        (l.queued + len) as f64 / if slow { l.rate / reference } else { 1.0 }
    };
    let soonest = loads.iter().map(finish).min_by(f64::total_cmp)?;
    let free = loads.iter().enumerate().filter(|(_, l)| l.free > 0);
    let (index, load) = free.min_by(|(_, a), (_, b)| finish(a).total_cmp(&finish(b)))?;
    (finish(load) <= PATIENCE * soonest).then_some(index)
}

/// The speed that others are compared with: the upper quartile of the measured ones, so that one lucky measurement slows nobody down.
fn reference(loads: &[Load]) -> f64 {
    const MOST: usize = 64;
    let mut known = [0.0f64; MOST];
    let mut n = 0;
    for load in loads.iter().filter(|l| l.rate > 0.0).take(MOST) {
        known[n] = load.rate;
        n += 1;
    }
    let known = &mut known[..n];
    known.sort_unstable_by(f64::total_cmp);
    known.get((3 * n).div_ceil(4).saturating_sub(1)).copied().unwrap_or(0.0)
}

/// Measures a channel's speed while it has requests in flight: idle time is not slowness.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    bytes_per_second: f64,
    /// When the current busy interval began; `None` while idle.
    since: Option<Instant>,
    /// Bytes and time of the sample at hand.
    bytes: u64,
    busy: Duration,
    /// The last completion.
    last: Option<Instant>,
}

/// Shortest busy time that a sample spans: completions come in bursts.
const SAMPLE: Duration = Duration::from_millis(2);
/// After this much idle time a measurement is forgotten.
const FORGET: Duration = Duration::from_millis(100);
/// A request this many times slower than predicted marks the channel stalled.
const STALL: f64 = 4.0;

impl Rate {
    /// Bytes per second; 0 while unknown. `oldest`: length of the oldest request in flight.
    pub(crate) fn get(&self, oldest: u64, now: Instant) -> f64 {
        match (self.since, self.last) {
            (Some(since), _) => {
                let waited = now.saturating_duration_since(since);
                if waited <= SAMPLE {
                    return self.bytes_per_second;
                }
                self.bytes_per_second.min(STALL * oldest as f64 / waited.as_secs_f64())
            }
            (None, Some(last)) if now.saturating_duration_since(last) < FORGET => self.bytes_per_second,
            _ => 0.0,
        }
    }

    /// The speed as it was last measured, or less for a channel that has stalled since.
    pub(crate) fn last(&self, oldest: u64, now: Instant) -> f64 {
        match self.since {
            Some(_) => self.get(oldest, now),
            None => self.bytes_per_second,
        }
    }

    /// A request was handed to the channel.
    pub(crate) fn posted(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// `bytes` were done by `now`; `more` requests are in flight.
    pub(crate) fn done(&mut self, bytes: u64, now: Instant, more: bool) {
        let Some(since) = self.since else { return };
        self.since = more.then_some(now);
        self.last = Some(now);
        self.bytes += bytes;
        self.busy += now.saturating_duration_since(since);
        if self.busy < SAMPLE {
            return;
        }
        let sample = self.bytes as f64 / self.busy.as_secs_f64();
        const WEIGHT: f64 = 0.3;
        let before = self.bytes_per_second;
        self.bytes_per_second = if before == 0.0 { sample } else { before * (1.0 - WEIGHT) + sample * WEIGHT };
        (self.bytes, self.busy) = (0, Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Over a long transfer every channel is used in proportion to its speed, whatever the speeds.
        #[test]
        fn shares_follow_speed(rates in proptest::collection::vec(1u32..50, 1..8)) {
            const CHUNK: u64 = 1;
            let mut queued = vec![0u64; rates.len()];
            let mut credit = vec![0f64; rates.len()];
            let mut sent = vec![0u64; rates.len()];
            for _ in 0..2000 {
                loop {
                    let loads: Vec<_> = queued.iter().zip(&rates).map(|(&q, &r)| Load { free: 16 - q as usize, queued: q, rate: f64::from(r) }).collect();
                    let Some(c) = pick(&loads, CHUNK) else { break };
                    queued[c] += CHUNK;
                    sent[c] += CHUNK;
                }
                for c in 0..rates.len() {
                    credit[c] += f64::from(rates[c]) / 50.0;
                    let done = (credit[c] as u64).min(queued[c]);
                    credit[c] = (credit[c] - done as f64).min(1.0);
                    queued[c] -= done;
                }
            }
            let total: u64 = sent.iter().sum();
            let sum: u32 = rates.iter().sum();
            let ideal = 2000.0 * f64::from(sum) / 50.0;
            prop_assert!(total as f64 >= 0.9 * ideal - 16.0 * rates.len() as f64, "{total} of {ideal}");
        }

        #[test]
        fn never_a_full_channel(loads in proptest::collection::vec((0usize..3, 0u64..100, 0u32..5), 0..10)) {
            let loads: Vec<_> = loads.into_iter().map(|(free, queued, rate)| Load { free, queued, rate: f64::from(rate) }).collect();
            if let Some(c) = pick(&loads, 10) {
                prop_assert!(loads[c].free > 0);
            }
        }
    }

    #[test]
    fn idle_channels_share_evenly_before_anything_is_known() {
        let mut queued = [0u64; 4];
        for _ in 0..8 {
            let loads = queued.map(|q| Load { free: 16 - q as usize, queued: q, rate: 0.0 });
            let c = pick(&loads, 1).unwrap();
            queued[c] += 1;
        }
        assert_eq!(queued, [2; 4]);
    }

    #[test]
    fn a_lucky_or_noisy_measurement_slows_nobody_down() {
        // One channel looks ten times as fast, the others differ by less than a factor of two: all are used alike.
        let rates = [1.0, 1.1, 1.4, 0.9, 10.0, 1.0, 1.2, 1.3];
        let mut queued = [0u64; 8];
        for _ in 0..32 {
            let loads: Vec<_> =
                queued.iter().zip(rates).map(|(&q, rate)| Load { free: 16 - q as usize, queued: q, rate }).collect();
            queued[pick(&loads, 1).unwrap()] += 1;
        }
        assert_eq!(queued, [4; 8]);
    }

    #[test]
    fn speed_is_measured_over_busy_time_and_forgotten_when_idle() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut rate = Rate::default();
        assert_eq!(rate.get(0, start), 0.0);
        // Two bursts of 1 ms with a pause of 50 ms between them: 2,000 bytes in 2 ms.
        for begin in [0, 51] {
            rate.posted(at(begin));
            rate.done(1000, at(begin + 1), false);
        }
        let measured = rate.get(0, at(53));
        assert!((measured - 1e6).abs() < 1.0, "{measured}");
        assert_eq!(rate.get(0, at(53) + FORGET), 0.0, "idle for long");
        // In flight for 100 ms where 1 ms was to be expected: at most a quarter of what the time says.
        rate.posted(at(60));
        assert_eq!(rate.get(1000, at(62)), measured);
        let stalled = rate.get(1000, at(160));
        assert!(stalled < 0.05 * measured, "{stalled}");
    }
}
