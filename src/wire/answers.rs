//! For how long the peer's kernel has acknowledged nothing on a connection. TCP_USER_TIMEOUT would say so late: it counts from the first
//! packet that was sent again, and is looked at when the next one is. Pure; the caller looks, and passes the time.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Answers {
    /// Bytes that the peer's kernel had acknowledged at the last look, and when they last became more.
    acknowledged: u64,
    answered: Instant,
    /// Since when bytes wait for its answer.
    due: Option<Instant>,
}

impl Answers {
    pub(super) fn new(now: Instant) -> Answers {
        Answers { acknowledged: 0, answered: now, due: None }
    }

    /// A look: the bytes that were acknowledged, and whether others wait for that.
    pub(super) fn note(&mut self, acknowledged: u64, unanswered: bool, now: Instant) {
        if acknowledged != self.acknowledged {
            (self.acknowledged, self.answered, self.due) = (acknowledged, now, None);
        }
        self.due = if unanswered { self.due.or(Some(now)) } else { None };
    }

    /// How long there was no answer, if that is longer than `limit`, and one was due for at least three quarters of it: after a pause the
    /// peer has that time.
    pub(super) fn silent(&self, limit: Duration, now: Instant) -> Option<Duration> {
        let since = |time| now.saturating_duration_since(time);
        let silent = since(self.answered);
        (silent > limit && self.due.is_some_and(|due| since(due) > limit * 3 / 4)).then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);

    /// Heartbeats of 100 bytes, looks every 50 ms, and a peer that acknowledges until `until`: when it is silent for too long, ms.
    fn noticed(heartbeat: u64, from: u64, until: u64) -> Option<u64> {
        let start = Instant::now();
        let mut answers = Answers::new(start);
        (0..10_000).step_by(50).find(|&ms| {
            let now = start + Duration::from_millis(ms);
            let sent = |ms: u64| if ms < from { 0 } else { (1 + (ms - from) / heartbeat) * 100 };
            answers.note(sent(ms.min(until)), sent(ms) > sent(ms.min(until)), now);
            answers.silent(LIMIT, now).is_some()
        })
    }

    #[test]
    fn silence_is_noticed_soon_after_its_limit_wherever_between_two_heartbeats_it_begins() {
        for until in (3000..3500).step_by(10) {
            let at = noticed(500, 0, until).unwrap();
            let last = until / 500 * 500;
            assert!((last + 2000..=last + 2100).contains(&at) && at <= until + 2100, "{until}: {at}");
        }
    }

    #[test]
    fn a_peer_that_answers_or_owes_nothing_is_not_silent() {
        assert_eq!(noticed(500, 0, 10_000), None);
        assert_eq!(noticed(3000, 0, 10_000), None, "idle");
        assert_eq!(noticed(100_000, 0, 5000), None, "nothing was sent");
        // After a pause it has most of the limit to answer.
        let at = noticed(500, 5000, 4999).unwrap();
        assert!((6500..=6650).contains(&at), "{at}");
    }
}
