//! Times of iterations, and rates. Pure.

use hdrhistogram::Histogram;
use std::time::Duration;

/// Longer times are recorded as this.
const MOST_NS: u64 = 3_600_000_000_000;

/// Times of iterations, to three digits, in constant memory.
#[derive(Clone, Debug)]
pub struct Times {
    histogram: Histogram<u64>,
    sum: Duration,
}

impl Default for Times {
    fn default() -> Times {
        Times::new()
    }
}

impl Times {
    /// No times yet.
    pub fn new() -> Times {
        // The bounds are constants that the crate accepts.
        Times { histogram: Histogram::new_with_bounds(1, MOST_NS, 3).expect("good bounds"), sum: Duration::ZERO }
    }

    /// Adds a time.
    pub fn record(&mut self, time: Duration) {
        self.histogram.saturating_record((time.as_nanos() as u64).clamp(1, MOST_NS));
        self.sum += time;
    }

    /// Adds the times of another series.
    pub fn add(&mut self, other: &Times) {
        // Equal bounds always fit.
        let _ = self.histogram.add(&other.histogram);
        self.sum += other.sum;
    }

    /// The number of times.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The sum, in seconds.
    pub fn seconds(&self) -> f64 {
        self.sum.as_secs_f64()
    }

    /// The quantile, in us; 0 without times.
    pub fn at(&self, quantile: f64) -> f64 {
        us(self.histogram.value_at_quantile(quantile))
    }

    /// The shortest, in us; 0 without times.
    pub fn least(&self) -> f64 {
        if self.count() == 0 {
            0.0
        } else {
            us(self.histogram.min())
        }
    }

    /// The longest, in us; 0 without times.
    pub fn most(&self) -> f64 {
        us(self.histogram.max())
    }

    /// The mean, in us; 0 without times.
    pub fn mean(&self) -> f64 {
        self.sum.as_secs_f64() * 1e6 / self.count().max(1) as f64
    }
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1e3
}

/// The rate of `bytes` in `us` microseconds, in GB/s (1e9).
pub fn gbytes_per_s(bytes: u64, us: f64) -> f64 {
    if us > 0.0 {
        bytes as f64 / us / 1e3
    } else {
        0.0
    }
}

/// The number of timed iterations that fill `budget_us`: enough for a meaningful p99, and not so many that they take too long.
pub fn iterations_for(budget_us: f64, one_us: f64) -> u64 {
    ((budget_us / one_us.max(0.1)) as u64).clamp(10, 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_three_digits() {
        let mut times = Times::new();
        (1..=10_000).for_each(|us| times.record(Duration::from_micros(us)));
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 2e-3, "{a} for {b}");
        near(times.least(), 1.0);
        near(times.mean(), 5000.5);
        for (quantile, time) in [(0.5, 5000.0), (0.99, 9900.0), (0.999, 9990.0)] {
            near(times.at(quantile), time);
        }
        near(times.most(), 10_000.0);
        let mut more = times.clone();
        more.add(&times);
        assert_eq!((more.count(), more.seconds()), (20_000, 2.0 * times.seconds()));
        let none = Times::new();
        assert_eq!([none.least(), none.mean(), none.at(0.5), none.most()], [0.0; 4]);
    }

    #[test]
    fn rates() {
        assert_eq!(gbytes_per_s(1_000_000_000, 1e6), 1.0);
        assert_eq!(gbytes_per_s(4096, 4.096), 1.0);
        assert_eq!(gbytes_per_s(4096, 0.0), 0.0);
    }

    #[test]
    fn iteration_counts_are_bounded() {
        assert_eq!(iterations_for(1e6, 1e9), 10);
        assert_eq!(iterations_for(1e6, 1000.0), 1000);
        assert_eq!(iterations_for(1e6, 0.0), 10_000);
    }
}
