//! Percentiles and rates. Pure.

/// The `p`-th percentile (0 to 100) by nearest rank: the smallest sample that at least `p` percent of the samples do not exceed.
/// `sorted` is ascending; an empty one gives NaN.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    if sorted.is_empty() {
        return f64::NAN;
    }
    let rank = (p / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Bytes in microseconds as GB/s (1e9).
pub fn gbytes_per_s(bytes: u64, us: f64) -> f64 {
    bytes as f64 / us / 1e3
}

/// How many timed iterations fill `budget_us`, within bounds that give a median and a p99 a meaning without taking for ever.
pub fn iterations_for(budget_us: f64, one_us: f64) -> u64 {
    ((budget_us / one_us.max(0.1)) as u64).clamp(10, 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&samples, 50.0), 50.0);
        assert_eq!(percentile(&samples, 99.0), 99.0);
        assert_eq!(percentile(&samples, 100.0), 100.0);
        assert_eq!(percentile(&samples, 0.0), 1.0);
        assert_eq!(percentile(&[5.0], 99.0), 5.0);
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 50.0), 2.0);
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn rates() {
        assert_eq!(gbytes_per_s(1_000_000_000, 1e6), 1.0);
        assert_eq!(gbytes_per_s(4096, 4.096), 1.0);
    }

    #[test]
    fn iteration_counts_are_bounded() {
        assert_eq!(iterations_for(1e6, 1e9), 10);
        assert_eq!(iterations_for(1e6, 1000.0), 1000);
        assert_eq!(iterations_for(1e6, 0.0), 10_000);
    }
}
