//! Direct transfers in flight and those that wait, and the blocks of a request in the form that a direct transport takes. Pure
//! bookkeeping.

use super::request::Request;
use crate::direct::{Blocks, Pairing, Way};
use crate::hash::Map;
use crate::region::Hold;
use crate::types::{Key, Piece};
use std::iter::Peekable;

/// A transfer that waits for the peer's answer to a claim.
pub(super) struct Waiting {
    pub id: u64,
    pub way: Way,
    pub request: Request,
    pub hold: Hold,
}

/// What is kept for a direct transfer in flight.
pub(super) struct Kept {
    pub hold: Hold,
    /// The receive that a message of the peer has met.
    pub receive: Option<u64>,
}

/// Direct transfers in flight, and those that wait.
#[derive(Default)]
pub(super) struct Pending {
    pub kept: Map<Key, Kept>,
    pub waiting: Vec<Waiting>,
}

impl Pending {
    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.kept.values().any(|kept| kept.hold.holds(id)) || self.waiting.iter().any(|waiting| waiting.hold.holds(id))
    }

    /// The receive that a message goes to.
    pub(super) fn receive_of(&self, key: Key) -> Option<u64> {
        self.kept.get(&key).and_then(|kept| kept.receive)
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.waiting.is_empty()
    }

    /// Messages of the peer that go into posted buffers.
    #[cfg(any(test, fuzzing))]
    pub(super) fn landings(&self) -> usize {
        self.kept.values().filter(|kept| kept.receive.is_some()).count()
    }

    pub(super) fn clear(&mut self) {
        *self = Pending::default();
    }
}

/// Hands out blocks from a list.
pub(super) struct Listed<I: Iterator<Item = (usize, Piece)>> {
    items: Peekable<I>,
}

impl<I: Iterator<Item = (usize, Piece)>> Blocks for Listed<I> {
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        let (pairing, first) = self.items.next()?;
        let (mut count, mut sum) = (1, first.len);
        out.push(first);
        while count < most && sum < bytes {
            let Some((_, piece)) = self.items.next_if(|(of, _)| *of == pairing) else { break };
            (count, sum) = (count + 1, sum.saturating_add(piece.len));
            out.push(piece);
        }
        Some(pairing)
    }

    fn is_done(&self) -> bool {
        // Peeking needs a unique reference; a peeked item still counts in the size hint.
        self.items.size_hint().0 == 0
    }
}

pub(super) fn listed<I: ExactSizeIterator<Item = (usize, Piece)>>(items: I) -> Listed<I> {
    Listed { items: items.peekable() }
}

/// The pairings of a request, and for each of its segments the index of its pairing.
pub(super) fn pairings(request: &Request) -> (Vec<Pairing>, Vec<u16>) {
    let (mut pairings, mut of): (Vec<Pairing>, Vec<u16>) = (Vec::new(), Vec::with_capacity(request.segments.len()));
    let mut known: Map<(u64, u64), u16> = Map::default();
    for (segment, remote) in request.segments.iter().zip(request.remote.iter()) {
        let name = (u64::from(segment.region) << 16 | u64::from(remote.region), u64::from(segment.peer.0));
        let at = *known.entry(name).or_insert_with(|| {
            let region = &request.remote_regions[usize::from(remote.region)];
            let (near, far) = ((u64::MAX, 0), (u64::MAX, 0));
            let (local, here, there) = (segment.region, segment.place, segment.peer);
            pairings.push(Pairing { local, here, region: region.id, token: region.token, there, near, far });
            (pairings.len() - 1) as u16
        });
        let Pairing { near, far, .. } = &mut pairings[usize::from(at)];
        *near = (near.0.min(segment.addr), near.1.max(segment.addr.saturating_add(segment.len)));
        *far = (far.0.min(remote.addr), far.1.max(remote.addr.saturating_add(u64::from(remote.len))));
        of.push(at);
    }
    (pairings, of)
}
