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

/// Measured speeds within this factor count as equal.
const ALIKE: f64 = 2.0;

/// The channel for a chunk of `len` bytes: of those with a free place the one that would finish it first. `None` when none is free, or
/// only channels so slow that waiting for a fast one beats them.
pub(crate) fn pick(loads: impl Iterator<Item = Load> + Clone, len: u64) -> Option<usize> {
    let known = loads.clone().map(|l| l.rate).filter(|&r| r > 0.0);
    let (slowest, fastest, sum, n) =
        known.fold((f64::MAX, 0.0f64, 0.0, 0), |(lo, hi, sum, n), r| (lo.min(r), hi.max(r), sum + r, n + 1));
    // Speeds that differ by less are one speed and its noise; acting on it would make the busier channel look ever faster.
    let alike = n == 0 || fastest <= ALIKE * slowest;
    // A channel without a measurement is taken to be as fast as the others.
    let assumed = if alike { 1.0 } else { sum / f64::from(n) };
    let finish = |l: &Load| (l.queued + len) as f64 / if l.rate > 0.0 && !alike { l.rate } else { assumed };
    let soonest = loads.clone().map(|l| finish(&l)).min_by(f64::total_cmp)?;
    let free = loads.enumerate().filter(|(_, l)| l.free > 0);
    let (index, load) = free.min_by(|(_, a), (_, b)| finish(a).total_cmp(&finish(b)))?;
    (finish(&load) <= PATIENCE * soonest).then_some(index)
}

/// Measures a channel's speed from its completions. These come in bursts, so a sample spans at least [`SAMPLE`].
#[derive(Debug, Default)]
pub(crate) struct Rate {
    bytes_per_second: f64,
    since: Option<Instant>,
    bytes: u64,
}

/// Shortest time that a sample spans.
const SAMPLE: Duration = Duration::from_millis(2);

impl Rate {
    /// Bytes per second; 0 while unknown.
    pub(crate) fn get(&self) -> f64 {
        self.bytes_per_second
    }

    /// The channel got work after having had none: idle time is not slowness.
    pub(crate) fn start(&mut self, now: Instant) {
        self.since = Some(now);
        self.bytes = 0;
    }

    /// `bytes` were done by `now`.
    pub(crate) fn done(&mut self, bytes: u64, now: Instant) {
        self.bytes += bytes;
        let Some(since) = self.since else { return };
        let span = now.saturating_duration_since(since);
        if span < SAMPLE {
            return;
        }
        let sample = self.bytes as f64 / span.as_secs_f64();
        const WEIGHT: f64 = 0.3;
        let before = self.bytes_per_second;
        self.bytes_per_second = if before == 0.0 { sample } else { before * (1.0 - WEIGHT) + sample * WEIGHT };
        self.start(now);
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
                while let Some(c) = pick(queued.iter().zip(&rates).map(|(&q, &r)| Load { free: 16 - q as usize, queued: q, rate: f64::from(r) }), CHUNK) {
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
            if let Some(c) = pick(loads.iter().copied(), 10) {
                prop_assert!(loads[c].free > 0);
            }
        }
    }

    #[test]
    fn idle_channels_share_evenly_before_anything_is_known() {
        let mut queued = [0u64; 4];
        for _ in 0..8 {
            let c = pick(queued.iter().map(|&q| Load { free: 16 - q as usize, queued: q, rate: 0.0 }), 1).unwrap();
            queued[c] += 1;
        }
        assert_eq!(queued, [2; 4]);
    }
}
