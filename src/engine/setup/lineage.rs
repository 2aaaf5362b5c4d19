//! What a connection keeps of its set-up, so that lost channels can be set up again by a later one. Knows nothing about how set-ups run.

use super::channels::plan::Plan;
use super::control::{number, Agreed, PER_SET};
use crate::status::{bail, Result};
use crate::wire::join::Ticket;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// A set of a connection's channels.
pub(crate) struct Members {
    pub plan: Plan,
    /// The NICs of each channel, here and at the peer.
    pub nics: Vec<(String, String)>,
}

/// Where a connection comes from.
pub(crate) struct Lineage {
    pub ticket: Ticket,
    /// The peer's end of the control connection.
    pub address: SocketAddr,
    pub agreed: Agreed,
    pub sets: Vec<Members>,
    /// A set-up that joins the connection is under way.
    joining: AtomicBool,
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
    pub(crate) fn new(ticket: Ticket, address: SocketAddr, agreed: Agreed, sets: Vec<Members>) -> Lineage {
        Lineage { ticket, address, agreed, sets, joining: AtomicBool::new(false) }
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
        (!self.joining.swap(true, Ordering::AcqRel)).then(|| Joining(self.clone()))
    }
}

/// The one set-up that joins a connection at a time, until this is dropped.
pub(crate) struct Joining(Arc<Lineage>);

impl std::ops::Deref for Joining {
    type Target = Arc<Lineage>;
    fn deref(&self) -> &Arc<Lineage> {
        &self.0
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        self.0.joining.store(false, Ordering::Release);
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
        };
        let address = ([127, 0, 0, 1], 1).into();
        Arc::new(Lineage::new(ticket, address, agreed(1, Proof::Key), vec![set(2), set(0), set(3)]))
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
        drop(joining);
        assert!(lineage.begin().is_some());
    }
}
