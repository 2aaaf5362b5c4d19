//! How long an I/O thread polls before it sleeps: briefly, but longer while requests come so soon one after the other that sleeping and
//! being woken would take most of the time between them. Pure; time and who else is awake are the caller's.

use std::time::Duration;

/// Waits in a row that must have been short before a thread polls for longer.
const PROOF: u32 = 2;

/// The spin of one thread.
#[derive(Clone, Copy, Debug)]
pub struct AdaptiveSpin {
    /// What it always polls for, and what it polls for while the waits are short.
    limits: [Duration; 2],
    /// Waits in a row that polling for longer would have covered.
    short: u32,
}

impl AdaptiveSpin {
    /// Polls for the first of these, or for the second where that pays.
    pub fn new(limits: [Duration; 2]) -> AdaptiveSpin {
        AdaptiveSpin { limits, short: 0 }
    }

    /// How long to poll now. `crowded`: other threads are at work, and need the cores.
    pub fn limit(&self, crowded: bool) -> Duration {
        self.limits[usize::from(!crowded && self.short >= PROOF)]
    }

    /// There was something to do after so long.
    pub fn waited(&mut self, wait: Duration) {
        self.short = if wait <= self.limits[1] { self.short.saturating_add(1) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: fn(u64) -> Duration = Duration::from_micros;

    #[test]
    fn short_waits_make_it_patient_and_a_long_one_ends_that() {
        let mut spin = AdaptiveSpin::new([US(20), US(100)]);
        assert_eq!(spin.limit(false), US(20));
        spin.waited(US(100));
        assert_eq!(spin.limit(false), US(20), "one short wait proves nothing");
        spin.waited(US(60));
        assert_eq!(spin.limit(false), US(100));
        assert_eq!(spin.limit(true), US(20), "others need the cores");
        spin.waited(US(101));
        assert_eq!(spin.limit(false), US(20));
        spin.waited(US(1));
        assert_eq!(spin.limit(false), US(20));
    }

    #[test]
    fn one_that_must_not_poll_never_does() {
        let mut spin = AdaptiveSpin::new([Duration::ZERO; 2]);
        for wait in [0, 0, 1, 0, 0, 0] {
            spin.waited(US(wait));
            assert_eq!(spin.limit(false), Duration::ZERO);
        }
    }
}
