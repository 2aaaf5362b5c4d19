//! What a connection keeps of its set-up, so that lost channels can be set up again by a later one. Knows nothing about how set-ups run.

use super::channels::plan::Plan;
use super::control::{number, Agreed, PER_SET};
use crate::status::{bail, Result};
use crate::wire::join::Ticket;
use process::Mutex;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Marks the number of a set-up that makes the control connection again.
const MOVES: u64 = 1 << 63;

/// A set of a connection's channels.
pub(crate) struct Members {
    pub plan: Plan,
    /// The NICs of each channel, here and at the peer.
    pub nics: Vec<(String, String)>,
    /// Bytes a second that each channel may send.
    pub pace: Option<u64>,
}

/// Where a connection comes from.
pub(crate) struct Lineage {
    pub ticket: Ticket,
    /// The peer's end of the control connection, which may move; and where the connector finds the listener.
    address: Mutex<SocketAddr>,
    pub addresses: Vec<SocketAddr>,
    pub agreed: Agreed,
    pub sets: Vec<Members>,
    /// The set-up that joins the connection, if one is under way, and how many there were.
    joining: AtomicU64,
    begun: AtomicU64,
}

/// A channel of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    /// Its number in frames.
    pub channel: u16,
    /// Its set, and its number there.
    pub set: usize,
    pub index: usize,
}

impl Seat {
    /// Its number in messages of a set-up.
    pub(crate) fn number(self) -> u16 {
        number(self.set, self.index)
    }
}

impl Lineage {
    /// `address`: the peer's end of the control connection; `addresses`: where the connector finds the listener.
    pub(crate) fn new(
        ticket: Ticket,
        address: SocketAddr,
        addresses: Vec<SocketAddr>,
        agreed: Agreed,
        sets: Vec<Members>,
    ) -> Lineage {
        let (joining, begun) = (AtomicU64::new(0), AtomicU64::new(0));
        Lineage { ticket, address: Mutex::new(address), addresses, agreed, sets, joining, begun }
    }

    /// The peer's end of the control connection.
    pub(crate) fn address(&self) -> SocketAddr {
        *self.address.lock()
    }

    /// The control connection has moved.
    pub(crate) fn moved(&self, address: SocketAddr) {
        *self.address.lock() = address;
    }

    /// Where to look for the listener once the control connection has failed: at the other addresses, then where it was.
    pub(crate) fn elsewhere(&self) -> Vec<SocketAddr> {
        let now = self.address();
        self.addresses.iter().copied().filter(|&address| address != now).chain([now]).collect()
    }

    /// All channels, in the order of their numbers in frames.
    pub(crate) fn seats(&self) -> impl Iterator<Item = Seat> + '_ {
        let all = self.sets.iter().enumerate().flat_map(|(set, members)| (0..members.nics.len()).map(move |index| (set, index)));
        (0..).zip(all).map(|(channel, (set, index))| Seat { channel, set, index })
    }

    /// The channels of these numbers in messages of a set-up.
    ///
    /// # Errors
    /// `Protocol` for one that does not exist.
    pub(crate) fn seats_of(&self, numbers: &[u16]) -> Result<Vec<Seat>> {
        let seat = |&number: &u16| {
            let (set, index) = (usize::from(number) / PER_SET, usize::from(number) % PER_SET);
            match self.seats().find(|seat| (seat.set, seat.index) == (set, index)) {
                Some(seat) => Ok(seat),
                None => bail!(Protocol, "channel {index} of set {set} does not exist"),
            }
        };
        numbers.iter().map(seat).collect()
    }

    /// Checks that a set-up is one with the same peer, under the same terms.
    ///
    /// # Errors
    /// `Auth` for another peer or key, `Unsupported` for other terms.
    pub(crate) fn admits(&self, agreed: &Agreed) -> Result<()> {
        if (&agreed.peer.engine, &agreed.peer.proof) != (&self.agreed.peer.engine, &self.agreed.peer.proof) {
            bail!(Auth, "another engine, or one with another key, wants to join a connection");
        }
        // The channels of each set are given; how many an engine would ask for now may depend on its NICs.
        let terms = |agreed: &Agreed| (agreed.terms.protect, agreed.terms.chunk_bytes, agreed.connecting);
        if terms(agreed) != terms(&self.agreed) {
            bail!(Unsupported, "a set-up under other terms cannot join a connection");
        }
        Ok(())
    }

    /// Begins a set-up that joins the connection; `None` while another is under way.
    pub(crate) fn begin(self: &Arc<Lineage>) -> Option<Joining> {
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let begun = self.joining.compare_exchange(0, number, Ordering::AcqRel, Ordering::Acquire);
        begun.is_ok().then(|| Joining { lineage: self.clone(), number })
    }

    /// Begins one that cannot wait for another.
    pub(crate) fn begin_instead(self: &Arc<Lineage>) -> Joining {
        let number = (self.begun.fetch_add(1, Ordering::AcqRel) + 1) | MOVES;
        self.joining.store(number, Ordering::Release);
        Joining { lineage: self.clone(), number }
    }

    /// Whether one that cannot wait is under way.
    pub(crate) fn is_moving(&self) -> bool {
        self.joining.load(Ordering::Acquire) & MOVES != 0
    }
}

/// The one set-up that joins a connection at a time, until this is dropped or another takes its place.
pub(crate) struct Joining {
    lineage: Arc<Lineage>,
    number: u64,
}

impl Joining {
    /// Whether none has taken its place.
    pub(crate) fn holds(&self) -> bool {
        self.lineage.joining.load(Ordering::Acquire) == self.number
    }
}

impl std::ops::Deref for Joining {
    type Target = Arc<Lineage>;
    fn deref(&self) -> &Arc<Lineage> {
        &self.lineage
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        let _ = self.lineage.joining.compare_exchange(self.number, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::plugin::Plugin;
    use crate::status::ErrorKind;
    use crate::wire::handshake::Peer;
    use crate::wire::hello::tests::sample;
    use crate::wire::keys::Proof;
    use crate::wire::session::{Direction, Session};

    fn agreed(engine: u8, proof: Proof) -> Agreed {
        let peer = Peer { hello: sample(), engine: [engine; 16], proof };
        Agreed { peer, own: sample(), connecting: true, terms: sample().agree(&sample()).unwrap() }
    }

    fn lineage() -> Arc<Lineage> {
        let ticket = Ticket::new(&Session::new(Direction::ToListening, &[7; 64], b"test").unwrap()).unwrap();
        let set = |n| Members {
            plan: Plan { plugin: Plugin::soft().unwrap(), gpus: None, channels: n, spare: false },
            nics: vec![("eth1".to_owned(), "eth2".to_owned()); n],
            pace: None,
        };
        let address = ([127, 0, 0, 1], 1).into();
        let addresses = vec!["10.0.0.1:1".parse().unwrap(), "10.0.0.2:1".parse().unwrap()];
        Arc::new(Lineage::new(ticket, address, addresses, agreed(1, Proof::Key), vec![set(2), set(0), set(3)]))
    }

    #[test]
    fn channels_are_numbered_over_all_sets() {
        let lineage = lineage();
        let numbers: Vec<u16> = lineage.seats().map(Seat::number).collect();
        assert_eq!(numbers, [0, 1, 128, 129, 130]);
        let found = lineage.seats_of(&[1, 130]).unwrap();
        assert_eq!(found.iter().map(|seat| seat.channel).collect::<Vec<_>>(), [1, 4]);
        for wrong in [2, 64, 131, 1023] {
            assert_eq!(lineage.seats_of(&[0, wrong]).unwrap_err().kind(), ErrorKind::Protocol, "{wrong}");
        }
    }

    #[test]
    fn only_the_same_engine_with_the_same_key_joins_and_one_set_up_at_a_time() {
        let lineage = lineage();
        assert!(lineage.admits(&agreed(1, Proof::Key)).is_ok());
        for other in [agreed(2, Proof::Key), agreed(1, Proof::Nothing), agreed(1, Proof::Named("a".into()))] {
            assert_eq!(lineage.admits(&other).unwrap_err().kind(), ErrorKind::Auth);
        }
        let reversed = Agreed { connecting: false, ..agreed(1, Proof::Key) };
        assert_eq!(lineage.admits(&reversed).unwrap_err().kind(), ErrorKind::Unsupported);
        let joining = lineage.begin().unwrap();
        assert!(lineage.begin().is_none());
        let instead = lineage.begin_instead();
        assert!(!joining.holds() && instead.holds() && lineage.is_moving());
        drop(joining);
        assert!(lineage.begin().is_none() && instead.holds());
        drop(instead);
        assert!(lineage.begin().is_some() && !lineage.is_moving());
    }

    #[test]
    fn a_lost_listener_is_looked_for_elsewhere_first() {
        let lineage = lineage();
        let all = || lineage.elsewhere().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(all(), ["10.0.0.1:1", "10.0.0.2:1", "127.0.0.1:1"]);
        lineage.moved("10.0.0.1:1".parse().unwrap());
        assert_eq!(
            (all(), lineage.address().to_string()),
            (vec!["10.0.0.2:1".to_owned(), "10.0.0.1:1".to_owned()], "10.0.0.1:1".to_owned())
        );
    }
}
