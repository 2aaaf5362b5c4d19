//! Counters of an engine that no single connection keeps, the times of its transfers, and the totals of connections that have ended.

use crate::proto::Timed;
use crate::stats::times::{bucket, class, TimeTable, BUCKETS, CLASSES};
use crate::stats::{EngineStats, Totals};
use crate::status::ErrorKind;
use process::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A counter that only rises.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many transfers of each class of sizes took how long, and the nanoseconds of each class.
#[derive(Debug, Default)]
pub(crate) struct Times {
    counts: [[Counter; BUCKETS]; CLASSES],
    nanoseconds: [AtomicU64; CLASSES],
}

impl Times {
    /// Counts transfers that have just succeeded.
    pub(crate) fn record(&self, ended: impl Iterator<Item = Timed>) {
        let mut now = None;
        for Timed { bytes, begun } in ended {
            let took = now.get_or_insert_with(Instant::now).saturating_duration_since(begun);
            let class = class(bytes);
            self.counts[class][bucket(took)].add();
            self.nanoseconds[class].fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    fn table(&self) -> TimeTable {
        let counts = std::array::from_fn(|class| std::array::from_fn(|bucket| self.counts[class][bucket].get()));
        TimeTable { counts, nanoseconds: std::array::from_fn(|class| self.nanoseconds[class].load(Ordering::Relaxed)) }
    }
}

/// The counters of an engine.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub opened: Counter,
    closed: Counter,
    lost: Counter,
    pub setups_in: Counter,
    pub setups_in_failed: Counter,
    pub setups_in_refused: Counter,
    pub setups_out: Counter,
    pub setups_out_failed: Counter,
    pub limits_hit: Counter,
    timeouts: Counter,
    pub times: Times,
    past: Mutex<Totals>,
}

impl Counters {
    /// Adds the totals of a connection that has ended: with an error of this kind, orderly if `closed`, with a peer that was
    /// `silent` for too long.
    pub(crate) fn ended(&self, totals: Totals, kind: ErrorKind, closed: bool, silent: bool) {
        *self.past.lock() += totals;
        if closed { &self.closed } else { &self.lost }.add();
        match kind {
            ErrorKind::TimedOut => self.timeouts.add(),
            ErrorKind::RemoteDisconnect if silent => self.timeouts.add(),
            ErrorKind::Resource => self.limits_hit.add(),
            _ => {}
        }
    }

    /// Counts an incoming set-up that failed.
    pub(crate) fn setup_failed(&self, kind: ErrorKind) {
        match kind {
            ErrorKind::Auth | ErrorKind::Resource => self.setups_in_refused.add(),
            _ => self.setups_in_failed.add(),
        }
        self.limit(kind);
    }

    /// Counts an error that reports a limit.
    pub(crate) fn limit(&self, kind: ErrorKind) {
        if kind == ErrorKind::Resource {
            self.limits_hit.add();
        }
    }

    /// The totals of connections that have ended. Read it before the totals of open connections: one that ends in between is then
    /// missed for a moment, and never counted twice.
    pub(crate) fn past(&self) -> Totals {
        *self.past.lock()
    }

    /// Fills in the counters kept here.
    pub(crate) fn fill(&self, stats: &mut EngineStats) {
        stats.opened = self.opened.get();
        stats.closed = self.closed.get();
        stats.lost = self.lost.get();
        stats.setups_in = self.setups_in.get();
        stats.setups_in_failed = self.setups_in_failed.get();
        stats.setups_in_refused = self.setups_in_refused.get();
        stats.setups_out = self.setups_out.get();
        stats.setups_out_failed = self.setups_out_failed.get();
        stats.limits_hit = self.limits_hit.get();
        stats.timeouts = self.timeouts.get();
        stats.times = self.times.table();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_counted_by_size_and_bucket() {
        let times = Times::default();
        let ago = |time: Duration| Instant::now().checked_sub(time).unwrap_or_else(Instant::now);
        let ended = [(1, Duration::ZERO), (64 << 10, Duration::ZERO), (2 << 20, Duration::from_secs(60))];
        let ended = ended.map(|(bytes, time)| Timed { bytes, begun: ago(time) });
        times.record(ended.into_iter());
        // From a clock that is ahead.
        times.record(std::iter::once(Timed { bytes: 1 << 20, begun: Instant::now() + Duration::from_secs(60) }));
        let table = times.table();
        assert_eq!(table.counts.map(|of_class| of_class.iter().sum::<u64>()), [2, 1, 1, 0]);
        assert_eq!((table.counts[1][0], table.counts[2][BUCKETS - 1]), (1, 1));
        assert!(table.nanoseconds[2] >= 60_000_000_000 && table.nanoseconds[1] == 0, "{table:?}");
    }
}
