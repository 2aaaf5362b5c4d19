//! Two-sided messages: sends wait for receives and receives for sends, in order. Each message is answered exactly once. Pure; the
//! caller passes the time.

use crate::region::Hold;
use crate::status::{bail, Result};
use crate::types::{Place, Segment};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

/// A send of this engine that the peer has not answered.
pub(super) struct WaitingSend {
    pub segments: Vec<Segment>,
    pub hold: Hold,
    /// It can be sent directly.
    pub direct: bool,
    since: Instant,
}

/// A message that the peer announced.
pub(super) struct Message {
    pub id: u64,
    pub len: u64,
    /// Where it lies, if it can be sent directly.
    pub from: Option<Place>,
}

/// A receive of this engine that no message has met.
pub(super) struct WaitingReceive {
    pub id: u64,
    pub segment: Segment,
    pub hold: Hold,
    since: Instant,
}

/// What the peer's answer to a send meets.
pub(super) enum Pulled {
    /// The send was waiting.
    Waiting(WaitingSend),
    /// The send had been withdrawn.
    Withdrawn,
}

#[derive(Default)]
pub(super) struct Matching {
    /// By id, and so by age.
    sends: BTreeMap<u64, WaitingSend>,
    /// Withdrawn here; the peer's answer has not arrived yet.
    withdrawn: HashSet<u64>,
    receives: VecDeque<WaitingReceive>,
    /// Messages of the peer that no receive has met, by id. Ids rise, so this is their order too.
    messages: BTreeMap<u64, Message>,
}

impl Matching {
    pub(super) fn send(&mut self, id: u64, segments: Vec<Segment>, hold: Hold, direct: bool, now: Instant) {
        self.sends.insert(id, WaitingSend { segments, hold, direct, since: now });
    }

    pub(super) fn receive(&mut self, id: u64, segment: Segment, hold: Hold, now: Instant) {
        self.receives.push_back(WaitingReceive { id, segment, hold, since: now });
    }

    /// The peer announced a message.
    pub(super) fn message(&mut self, message: Message) {
        self.messages.insert(message.id, message);
    }

    /// The next message and the receive that it meets.
    pub(super) fn next_match(&mut self) -> Option<(Message, WaitingReceive)> {
        if self.messages.is_empty() {
            return None;
        }
        let receive = self.receives.pop_front()?;
        Some((self.messages.pop_first()?.1, receive))
    }

    /// The peer answers send `id`.
    ///
    /// # Errors
    /// `Protocol` when no such send waits for an answer.
    pub(super) fn pull(&mut self, id: u64) -> Result<Pulled> {
        if let Some(send) = self.sends.remove(&id) {
            return Ok(Pulled::Waiting(send));
        }
        if self.withdrawn.remove(&id) {
            return Ok(Pulled::Withdrawn);
        }
        bail!(Protocol, "an answer to message {id}, which is not waiting for one")
    }

    /// The peer withdraws a message. Returns whether it was still waiting here.
    pub(super) fn withdraw(&mut self, id: u64) -> bool {
        self.messages.remove(&id).is_some()
    }

    /// Messages of the peer that wait for a receive.
    #[cfg(any(test, fuzzing))]
    pub(super) fn messages(&self) -> usize {
        self.messages.len()
    }

    /// Sends and receives of this engine that wait.
    pub(super) fn waiting(&self) -> usize {
        self.sends.len() + self.receives.len()
    }

    /// Sends of this engine that were withdrawn and that the peer has not answered.
    pub(super) fn withdrawn(&self) -> usize {
        self.withdrawn.len()
    }

    /// Withdraws the sends that have waited too long, and returns their ids.
    pub(super) fn expire_sends(&mut self, timeout: Duration, now: Instant) -> Vec<u64> {
        let mut late = Vec::new();
        while let Some(first) = self.sends.first_entry() {
            if now.saturating_duration_since(first.get().since) <= timeout {
                break;
            }
            late.push(*first.key());
            self.withdrawn.insert(*first.key());
            first.remove();
        }
        late
    }

    /// Removes the receives that have waited too long, and returns their ids.
    pub(super) fn expire_receives(&mut self, timeout: Duration, now: Instant) -> Vec<u64> {
        let mut late = Vec::new();
        while self.receives.front().is_some_and(|r| now.saturating_duration_since(r.since) > timeout) {
            late.extend(self.receives.pop_front().map(|r| r.id));
        }
        late
    }

    /// Whether a waiting send or receive uses a region.
    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.sends.values().any(|s| s.hold.holds(id)) || self.receives.iter().any(|r| r.hold.holds(id))
    }

    pub(super) fn clear(&mut self) {
        *self = Matching::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;

    const T: Duration = Duration::from_secs(1);

    fn segment(len: u64) -> Segment {
        Segment { addr: 4096, len, region: 0, place: Place::HOST, peer: Place::HOST }
    }
    fn hold() -> Hold {
        Hold::new(Vec::new())
    }

    #[test]
    fn messages_meet_receives_in_order() {
        let now = Instant::now();
        let mut m = Matching::default();
        m.message(Message { id: 3, len: 30, from: None });
        assert!(m.next_match().is_none());
        m.receive(1, segment(9), hold(), now);
        m.receive(2, segment(9), hold(), now);
        m.message(Message { id: 5, len: 50, from: None });
        m.message(Message { id: 7, len: 70, from: None });
        assert_eq!((m.messages(), m.waiting()), (3, 2));
        let ids: Vec<_> =
            std::iter::from_fn(|| m.next_match()).map(|(message, receive)| ((message.id, message.len), receive.id)).collect();
        assert_eq!(ids, [((3, 30), 1), ((5, 50), 2)]);
        assert!(m.withdraw(7) && !m.withdraw(7) && !m.withdraw(3));
        assert_eq!((m.messages(), m.waiting()), (0, 0));
    }

    #[test]
    fn each_send_is_answered_once_even_when_it_was_given_up() {
        let now = Instant::now();
        let mut m = Matching::default();
        m.send(1, vec![segment(1)], hold(), false, now);
        m.send(2, vec![segment(1)], hold(), false, now + T);
        assert!(m.expire_sends(T, now + T).is_empty());
        assert_eq!(m.expire_sends(T, now + T + Duration::from_millis(1)), [1]);
        assert!(matches!(m.pull(1), Ok(Pulled::Withdrawn)));
        assert!(matches!(m.pull(2), Ok(Pulled::Waiting(_))));
        for id in [1, 2, 3] {
            assert_eq!(m.pull(id).err().map(|e| e.kind()), Some(ErrorKind::Protocol));
        }
    }

    #[test]
    fn receives_expire_in_order() {
        let now = Instant::now();
        let mut m = Matching::default();
        m.receive(1, segment(1), hold(), now);
        m.receive(2, segment(1), hold(), now);
        m.receive(3, segment(1), hold(), now + T);
        assert!(m.expire_receives(T, now + T).is_empty());
        assert_eq!(m.expire_receives(T, now + 2 * T), [1, 2]);
        assert_eq!(m.waiting(), 1);
    }
}
