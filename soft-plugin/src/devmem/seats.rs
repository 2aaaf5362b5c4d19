//! Which connections an area has room for, and from which peers a pattern came out wrong. No sockets, no memory.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use process::Mutex;

/// How long nothing is taken from a peer after a wrong pattern. Other peers are not concerned: their own patterns prove their paths.
const DISTRUST: Duration = Duration::from_secs(60);

/// Why a connection is not admitted.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// All seats are taken.
    Full,
    /// A pattern from this peer came out wrong not long ago.
    Wrong,
}

struct State {
    free: Vec<usize>,
    taken: HashMap<usize, (IpAddr, Arc<AtomicBool>)>,
    wrong: HashMap<IpAddr, Instant>,
}

/// The seats of an area.
pub struct Seats(Mutex<State>);

/// A place that is taken.
pub struct Taken {
    /// Its number.
    pub number: usize,
    /// Whose connection has it.
    pub peer: IpAddr,
    wrong: Arc<AtomicBool>,
}

impl Taken {
    /// No pattern from its peer has come out wrong since it was taken.
    pub fn is_trusted(&self) -> bool {
        !self.wrong.load(Ordering::Acquire)
    }
}

impl Seats {
    /// So many.
    pub fn new(count: usize) -> Seats {
        Seats(Mutex::new(State { free: (0..count).rev().collect(), taken: HashMap::new(), wrong: HashMap::new() }))
    }

    /// Takes one for a connection of a peer.
    pub fn take(&self, peer: IpAddr, now: Instant) -> Result<Taken, Refusal> {
        let mut state = self.0.lock();
        state.wrong.retain(|_, since| now.duration_since(*since) < DISTRUST);
        if state.wrong.contains_key(&peer) {
            return Err(Refusal::Wrong);
        }
        let (number, wrong) = (state.free.pop().ok_or(Refusal::Full)?, Arc::new(AtomicBool::new(false)));
        state.taken.insert(number, (peer, wrong.clone()));
        Ok(Taken { number, peer, wrong })
    }

    /// Its connection has ended.
    pub fn leave(&self, number: usize) {
        let mut state = self.0.lock();
        if state.taken.remove(&number).is_some() {
            state.free.push(number);
        }
    }

    /// A pattern from this peer came out wrong: what its connections bring cannot be trusted.
    pub fn distrust(&self, peer: IpAddr, now: Instant) {
        let mut state = self.0.lock();
        state.taken.values().filter(|(of, _)| *of == peer).for_each(|(_, wrong)| wrong.store(true, Ordering::Release));
        state.wrong.insert(peer, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_admitted_as_there_are_seats() {
        let (seats, peer, now) = (Seats::new(2), IpAddr::from([10, 0, 0, 1]), Instant::now());
        let (one, other) = (seats.take(peer, now).unwrap(), seats.take(peer, now).unwrap());
        assert!(one.number != other.number && seats.take(peer, now).err() == Some(Refusal::Full));
        seats.leave(one.number);
        seats.leave(one.number);
        assert_eq!(seats.take(peer, now).unwrap().number, one.number);
        assert_eq!(seats.take(peer, now).err(), Some(Refusal::Full));
    }

    #[test]
    fn a_wrong_pattern_concerns_its_peer_alone_and_not_for_ever() {
        let (seats, now) = (Seats::new(8), Instant::now());
        let (liar, honest) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let (up, neighbour) = (seats.take(liar, now).unwrap(), seats.take(honest, now).unwrap());
        seats.distrust(liar, now);
        assert_eq!((up.is_trusted(), neighbour.is_trusted()), (false, true));
        assert_eq!(seats.take(liar, now).err(), Some(Refusal::Wrong));
        assert!(seats.take(honest, now).unwrap().is_trusted());
        let again = seats.take(liar, now + DISTRUST).unwrap();
        assert_eq!((again.is_trusted(), up.is_trusted()), (true, false));
    }
}
