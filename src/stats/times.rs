//! How long transfers took: classes of sizes, and buckets of times. A fixed table, so that neither memory nor the number of series
//! grows. Knows nothing of how it is filled or shown.

use std::time::Duration;

/// The classes: a name, and the largest number of bytes.
const SIZES: [(&str, u64); CLASSES] =
    [("to_64KiB", 64 << 10), ("to_1MiB", 1 << 20), ("to_64MiB", 64 << 20), ("larger", u64::MAX)];
/// How many classes there are.
pub(crate) const CLASSES: usize = 4;

/// The upper bounds of the buckets: microseconds, and the same in seconds as OpenMetrics writes them.
const BOUNDS: [(u64, &str); BUCKETS] = [
    (10, "1e-05"),
    (25, "2.5e-05"),
    (50, "5e-05"),
    (100, "0.0001"),
    (250, "0.00025"),
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (500_000, "0.5"),
    (1_000_000, "1.0"),
    (2_500_000, "2.5"),
    (5_000_000, "5.0"),
    (10_000_000, "10.0"),
    (u64::MAX, "+Inf"),
];
/// How many buckets there are.
pub(crate) const BUCKETS: usize = 20;

/// How many transfers of each class took how long, and how long all of a class took together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeTable {
    /// Transfers by class of sizes and bucket, not summed up.
    pub counts: [[u64; BUCKETS]; CLASSES],
    /// Nanoseconds by class.
    pub nanoseconds: [u64; CLASSES],
}

/// The class of a transfer of so many bytes.
pub(crate) fn class(bytes: u64) -> usize {
    SIZES.iter().position(|&(_, most)| bytes <= most).unwrap_or(CLASSES - 1)
}

/// The bucket of a transfer that took so long.
pub(crate) fn bucket(took: Duration) -> usize {
    let nanoseconds = took.as_nanos();
    BOUNDS.partition_point(|&(most, _)| u128::from(most) * 1000 < nanoseconds).min(BUCKETS - 1)
}

/// The names of the classes.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    SIZES.iter().map(|&(name, _)| name)
}

/// The upper bounds of the buckets, in seconds.
pub(crate) fn bounds() -> impl Iterator<Item = &'static str> {
    BOUNDS.iter().map(|&(_, bound)| bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_belong_to_their_bucket_and_rise() {
        for (at, &(most, bound)) in BOUNDS.iter().enumerate() {
            let Ok(seconds) = bound.parse::<f64>() else { panic!("{bound}") };
            if seconds.is_finite() {
                assert!((seconds * 1e6 - most as f64).abs() < 1e-6, "{bound}");
                assert_eq!(bucket(Duration::from_micros(most)), at);
                assert_eq!(bucket(Duration::from_micros(most) + Duration::from_nanos(1)), at + 1);
            }
        }
        assert!(BOUNDS.windows(2).all(|pair| pair[0].0 < pair[1].0) && SIZES.windows(2).all(|pair| pair[0].1 < pair[1].1));
        assert_eq!((bucket(Duration::ZERO), bucket(Duration::MAX)), (0, BUCKETS - 1));
        let sizes = [0, 64 << 10, (64 << 10) + 1, 1 << 20, 64 << 20, (64 << 20) + 1, u64::MAX];
        assert_eq!(sizes.map(class), [0, 0, 1, 1, 2, 3, 3]);
    }
}
