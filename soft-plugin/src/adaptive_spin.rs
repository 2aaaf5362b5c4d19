//! How long an I/O thread polls before it sleeps: briefly, but longer while requests follow each other so closely that sleeping and
//! waking would take most of the time between them. Pure; the caller supplies the time and the number of threads awake.

use std::time::Duration;

/// Consecutive short waits before a thread polls for longer.
const PROOF: u32 = 2;

/// The spin of one thread.
#[derive(Clone, Copy, Debug)]
pub struct AdaptiveSpin {
    /// The usual limit, and the limit while waits are short.
    limits: [Duration; 2],
    /// Consecutive waits that the longer limit would have covered.
    short: u32,
}

impl AdaptiveSpin {
    /// Polls for the first limit, or for the second where that pays.
    pub fn new(limits: [Duration; 2]) -> AdaptiveSpin {
        AdaptiveSpin { limits, short: 0 }
    }

    /// How long to poll now. `crowded`: other threads need the cores.
    pub fn limit(&self, crowded: bool) -> Duration {
        self.limits[usize::from(!crowded && self.short >= PROOF)]
    }

    /// Work arrived after a wait of this length.
    pub fn waited(&mut self, wait: Duration) {
        self.short = if wait <= self.limits[1] { self.short.saturating_add(1) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: fn(u64) -> Duration = Duration::from_micros;

    #[test]
    fn short_waits_raise_the_limit_and_a_long_one_resets_it() {
        let mut spin = AdaptiveSpin::new([US(20), US(100)]);
        assert_eq!(spin.limit(false), US(20));
        spin.waited(US(100));
        assert_eq!(spin.limit(false), US(20), "one short wait is not enough");
        spin.waited(US(60));
        assert_eq!(spin.limit(false), US(100));
        assert_eq!(spin.limit(true), US(20), "other threads need the cores");
        spin.waited(US(101));
        assert_eq!(spin.limit(false), US(20));
        spin.waited(US(1));
        assert_eq!(spin.limit(false), US(20));
    }

    #[test]
    fn a_limit_of_zero_never_polls() {
        let mut spin = AdaptiveSpin::new([Duration::ZERO; 2]);
        for wait in [0, 0, 1, 0, 0, 0] {
            spin.waited(US(wait));
            assert_eq!(spin.limit(false), Duration::ZERO);
        }
    }
}
