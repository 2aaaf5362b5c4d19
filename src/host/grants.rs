//! Grants: what a peer may read and write by direct transfers. An engine grants a region once the peer has shown its token, and the grant ends
//! with the region. Of two words in memory that both map, the first says that the grant stands, the second counts reads under way. An engine that ends a region
//! clears the first and waits until the second is zero; a reader counts itself before it looks. So no read that found the grant standing
//! outlives it. A landing is a grant of one posted buffer for one message. Knows nothing of sockets and of what is copied.

use super::layout::{GRANT, GRANTS};
use super::messages::{Granted, Message};
use super::shm::Shared;
use crate::hash::Map;
use crate::region::{AccessGrant, Region, RegionUse};
use crate::status::{bail, Error, ErrorKind, Result, StatusCode};
use crate::types::{Key, Place, RemoteAccess};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

fn stands(shared: &Shared, slot: u32) -> &AtomicU64 {
    shared.word(GRANT + 2 * (slot as usize % GRANTS))
}

fn reads(shared: &Shared, slot: u32) -> &AtomicU64 {
    shared.word(GRANT + 2 * (slot as usize % GRANTS) + 1)
}

/// The word of a slot while this grant stands.
fn standing(generation: u64) -> u64 {
    generation << 1 | 1
}

/// A grant's words in its owner's file.
#[derive(Debug)]
struct Slot {
    shared: Arc<Shared>,
    slot: u32,
    generation: u64,
    over: AtomicBool,
}

impl AccessGrant for Slot {
    fn end(&self) {
        let ours = standing(self.generation);
        let _ = stands(&self.shared, self.slot).compare_exchange(ours, ours - 1, Ordering::SeqCst, Ordering::SeqCst);
    }
    fn in_use(&self) -> bool {
        // The connection's end is the reader's: what it reads from then on does not count.
        !self.is_over() && reads(&self.shared, self.slot).load(Ordering::SeqCst) != 0
    }
    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

/// What a grant is of.
enum Of {
    /// A region, until it ends.
    Region(Arc<Region>, Arc<Slot>),
    /// A posted buffer, for one message.
    Landing(Key, RegionUse),
}

/// A grant of this engine.
struct Given {
    of: Of,
    generation: u64,
    /// Where the peer's memory lies that it is for.
    there: Place,
    /// What may be written.
    addr: u64,
    len: u64,
}

/// Memory of this engine that a record of the peer writes.
pub(crate) struct Target {
    /// Keeps it registered.
    pub used: RegionUse,
    /// Where the peer's memory must lie.
    pub there: Place,
    pub addr: u64,
    pub len: u64,
    /// The message that it is for.
    pub landing: Option<Key>,
}

/// What this engine has granted.
pub(crate) struct Grants {
    shared: Arc<Shared>,
    by_region: Map<(u64, Place), u32>,
    slots: Map<u32, Given>,
    free: Vec<u32>,
    last: u64,
    /// Messages for the peer.
    pub outbox: VecDeque<Message>,
}

impl Grants {
    /// In this engine's file.
    pub(crate) fn new(shared: &Arc<Shared>) -> Grants {
        let free = (0..GRANTS as u32).rev().collect();
        let (by_region, slots) = (Map::default(), Map::default());
        Grants { shared: shared.clone(), by_region, slots, free, last: 0, outbox: VecDeque::new() }
    }

    /// Whether a region is granted for the peer's memory at `there` already.
    pub(crate) fn has(&self, region: u64, there: Place) -> bool {
        self.by_region.contains_key(&(region, there))
    }

    /// Grants a region, whose token the peer has shown. `direct`: what can be done directly; `exports`: what it lies in where the peer has to map
    /// it. `false` where no grant is left, or the region has ended.
    pub(crate) fn give(&mut self, region: &Arc<Region>, there: Place, direct: RemoteAccess, exports: Vec<u32>) -> bool {
        let Some(slot) = self.free.pop() else { return false };
        self.last += 1;
        let generation = self.last;
        let words = Arc::new(Slot { shared: self.shared.clone(), slot, generation, over: AtomicBool::new(false) });
        stands(&self.shared, slot).store(standing(generation), Ordering::SeqCst);
        if !region.allow(words.clone()) {
            words.end();
            self.free.push(slot);
            return false;
        }
        let (addr, len) = (region.span.addr, region.span.len);
        self.by_region.insert((region.span.id, there), slot);
        self.slots.insert(slot, Given { of: Of::Region(region.clone(), words), generation, there, addr, len });
        self.outbox.push_back(Message::Grant(Box::new(Granted {
            slot,
            generation,
            region: region.span.id,
            token: region.token,
            addr,
            len,
            there: region.place,
            here: there,
            access: region.access(),
            direct,
            exports,
        })));
        true
    }

    /// Grants a posted buffer for one message: its slot and generation; `None` where no grant is left.
    pub(crate) fn land(&mut self, key: Key, used: RegionUse, there: Place, (addr, len): (u64, u64)) -> Option<(u32, u64)> {
        let slot = self.free.pop()?;
        self.last += 1;
        self.slots.insert(slot, Given { of: Of::Landing(key, used), generation: self.last, there, addr, len });
        Some((slot, self.last))
    }

    /// Ends the landing of a message; whether there was one.
    pub(crate) fn end_landing(&mut self, key: Key) -> bool {
        let slot =
            self.slots.iter().find(|(_, given)| matches!(&given.of, Of::Landing(of, _) if *of == key)).map(|(&slot, _)| slot);
        slot.inspect(|&slot| self.free_slot(slot)).is_some()
    }

    fn free_slot(&mut self, slot: u32) {
        self.slots.remove(&slot);
        self.free.push(slot);
    }

    /// What a record writes, with a use of its region; `None` when the grant does not stand, or allows no writing.
    pub(crate) fn target(&self, slot: u32, generation: u64) -> Option<Target> {
        let &Given { ref of, there, addr, len, .. } = self.slots.get(&slot).filter(|given| given.generation == generation)?;
        let (used, landing) = match of {
            Of::Region(region, _) if region.access().write => (region.enter()?, None),
            Of::Region(..) => return None,
            Of::Landing(key, used) => (RegionUse::new(used.region()), Some(*key)),
        };
        Some(Target { used, there, addr, len, landing })
    }

    /// What a staged read of the peer reads, with a use of its region; `None` when the grant does not stand, or allows no reading.
    pub(crate) fn source(&self, slot: u32, generation: u64) -> Option<Target> {
        let &Given { ref of, there, addr, len, .. } = self.slots.get(&slot).filter(|given| given.generation == generation)?;
        match of {
            Of::Region(region, _) if region.access().read => {
                Some(Target { used: region.enter()?, there, addr, len, landing: None })
            }
            _ => None,
        }
    }

    /// Where the memory of a grant lies.
    pub(crate) fn place(&self, slot: u32, generation: u64) -> Option<Place> {
        self.slots.get(&slot).filter(|given| given.generation == generation).map(|given| match &given.of {
            Of::Region(region, _) => region.place,
            Of::Landing(_, used) => used.place,
        })
    }

    /// Whether the peer reads a region just now.
    pub(crate) fn is_read(&self, region: u64) -> bool {
        let reads = |given: &Given| matches!(&given.of, Of::Region(of, words) if of.span.id == region && words.in_use());
        self.slots.values().any(reads)
    }

    /// A region has ended: nothing uses it.
    pub(crate) fn forget(&mut self, region: u64) {
        let names: Vec<(u64, Place)> = self.by_region.keys().copied().filter(|&(id, _)| id == region).collect();
        for name in names {
            let Some(slot) = self.by_region.remove(&name) else { continue };
            let Some(Given { of: Of::Region(_, words), generation, .. }) = self.slots.remove(&slot) else { continue };
            words.end();
            words.over.store(true, Ordering::SeqCst);
            self.outbox.push_back(Message::Revoke { slot, generation });
            self.free.push(slot);
        }
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        for given in self.slots.values() {
            if let Of::Region(region, words) = &given.of {
                words.end();
                words.over.store(true, Ordering::SeqCst);
                // Regions outlive connections, and would keep the file of each.
                region.prune();
            }
        }
    }
}

/// How a claim of this engine stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Granted.
    Granted(Arc<Granted>),
    /// The peer has not answered.
    Asked,
    /// Direct transfers cannot reach it.
    Channels,
    /// The peer refuses it.
    Refused(Error),
}

/// A region of the peer, its token, and the place of this engine that it is claimed for.
type Name = (u64, [u8; 16], Place);

/// Claims that are remembered besides those that are granted. More than that ask again.
const MAX_CLAIMS: usize = 4 * GRANTS;

/// What the peer has granted, and what it was asked for.
pub(crate) struct Leases {
    shared: Arc<Shared>,
    granted: Map<(u64, Place), Arc<Granted>>,
    slots: Map<u32, (u64, Place)>,
    claims: Map<Name, Claim>,
    /// Messages for the peer.
    pub outbox: VecDeque<Message>,
}

impl Leases {
    /// In the peer's file.
    pub(crate) fn new(shared: &Arc<Shared>) -> Leases {
        let (granted, slots, claims) = (Map::default(), Map::default(), Map::default());
        Leases { shared: shared.clone(), granted, slots, claims, outbox: VecDeque::new() }
    }

    /// How the claim of a region for memory at `here` stands; claims it at the first call. A refusal is returned once.
    pub(crate) fn claim(&mut self, region: u64, token: [u8; 16], here: Place) -> Claim {
        if let Some(granted) = self.granted.get(&(region, here)).filter(|granted| granted.token == token) {
            return Claim::Granted(granted.clone());
        }
        let name = (region, token, here);
        match self.claims.get(&name) {
            Some(Claim::Refused(_)) => self.claims.remove(&name).unwrap_or(Claim::Asked),
            Some(known) => known.clone(),
            None => {
                if self.claims.len() >= MAX_CLAIMS {
                    self.claims.retain(|_, claim| *claim == Claim::Asked);
                }
                self.claims.insert(name, Claim::Asked);
                self.outbox.push_back(Message::Claim { region, token, place: here });
                Claim::Asked
            }
        }
    }

    /// Claims that the peer has not answered.
    pub(crate) fn asked(&self) -> usize {
        self.claims.values().filter(|claim| **claim == Claim::Asked).count()
    }

    /// The peer grants a region that was claimed.
    ///
    /// # Errors
    /// `Protocol` for one that was not, or a slot that is taken or does not exist.
    pub(crate) fn granted(&mut self, granted: Granted) -> Result<()> {
        let name = (granted.region, granted.here);
        let asked = self.claims.remove(&(granted.region, granted.token, granted.here));
        if asked != Some(Claim::Asked) {
            bail!(Protocol, "the peer grants region {}, which was not claimed", granted.region);
        }
        if granted.slot as usize >= GRANTS || self.slots.contains_key(&granted.slot) || self.granted.contains_key(&name) {
            bail!(Protocol, "the peer grants region {} in slot {}", granted.region, granted.slot);
        }
        self.slots.insert(granted.slot, name);
        self.granted.insert(name, Arc::new(granted));
        Ok(())
    }

    /// The peer refuses a claim; without a reason channels carry the region.
    ///
    /// # Errors
    /// `Protocol` for what was not claimed.
    pub(crate) fn refused(&mut self, name: Name, why: Option<(StatusCode, String)>) -> Result<()> {
        match self.claims.get_mut(&name) {
            Some(claim) if *claim == Claim::Asked => {
                *claim = match why {
                    None => Claim::Channels,
                    Some((status, text)) => Claim::Refused(Error::new(ErrorKind::from_code(status), text)),
                };
                Ok(())
            }
            _ => bail!(Protocol, "the peer refuses region {}, which was not claimed", name.0),
        }
    }

    /// A granted region of the peer has ended.
    ///
    /// # Errors
    /// `Protocol` for one that it has not granted.
    pub(crate) fn revoked(&mut self, slot: u32, generation: u64) -> Result<()> {
        let granted = self.slots.remove(&slot).and_then(|name| self.granted.remove(&name));
        match granted {
            Some(granted) if granted.generation == generation => Ok(()),
            _ => bail!(Protocol, "the peer takes back what is not granted in slot {slot}"),
        }
    }

    /// Whether a grant stands.
    pub(crate) fn stands(&self, slot: u32, generation: u64) -> bool {
        stands(&self.shared, slot).load(Ordering::SeqCst) == standing(generation)
    }

    /// Begins a read; `false` when the grant does not stand. Ends with [`Leases::leave`].
    pub(crate) fn enter(&self, slot: u32, generation: u64) -> bool {
        reads(&self.shared, slot).fetch_add(1, Ordering::SeqCst);
        if self.stands(slot, generation) {
            return true;
        }
        self.leave(slot);
        false
    }

    /// A read has ended.
    pub(crate) fn leave(&self, slot: u32) {
        reads(&self.shared, slot).fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::{RingIn, RingOut};
    use super::*;
    use crate::types::Span;

    fn region(id: u64, access: RemoteAccess) -> Arc<Region> {
        Arc::new(Region::new(Span { id, addr: 0x1000, len: 100 }, [id as u8; 16], Place::HOST, access))
    }

    fn both() -> (Grants, Leases) {
        let out = RingOut::new().unwrap();
        let inn = RingIn::open(out.fd()).unwrap();
        (Grants::new(out.shared()), Leases::new(inn.shared()))
    }

    /// Everything that the owner says reaches the peer.
    fn pass(grants: &mut Grants, leases: &mut Leases) {
        for message in std::mem::take(&mut grants.outbox) {
            match Message::decode(&message.encode(), Vec::new()).unwrap() {
                Message::Grant(granted) => leases.granted(*granted).unwrap(),
                Message::Revoke { slot, generation } => leases.revoked(slot, generation).unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Claims a region and has it granted.
    fn grant(grants: &mut Grants, leases: &mut Leases, region: &Arc<Region>) -> Arc<Granted> {
        let (id, token) = (region.span.id, region.token);
        assert_eq!(leases.claim(id, token, Place::HOST), Claim::Asked);
        assert!(grants.give(region, Place::HOST, RemoteAccess::ALL, Vec::new()));
        pass(grants, leases);
        match leases.claim(id, token, Place::HOST) {
            Claim::Granted(granted) => granted,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_read_holds_the_region_and_none_begins_after_its_end() {
        let (mut grants, mut leases) = both();
        let region = region(7, RemoteAccess::READ);
        let granted = grant(&mut grants, &mut leases, &region);
        assert!(granted.access == RemoteAccess::READ && (granted.addr, granted.len) == (0x1000, 100));
        assert!(grants.target(granted.slot, granted.generation).is_none(), "it may not be written");
        assert!(leases.enter(granted.slot, granted.generation) && region.in_use() && grants.is_read(7));
        region.end();
        assert!(!leases.enter(granted.slot, granted.generation) && region.in_use());
        leases.leave(granted.slot);
        assert!(!region.in_use() && region.enter().is_none());
        grants.forget(7);
        pass(&mut grants, &mut leases);
        assert_eq!(leases.claim(7, [7; 16], Place::HOST), Claim::Asked, "from the beginning");
    }

    #[test]
    fn a_region_is_claimed_once_and_a_refusal_is_reported_once() {
        let (_grants, mut leases) = both();
        let name = (7, [7; 16], Place::HOST);
        let claim = |leases: &mut Leases| leases.claim(name.0, name.1, name.2);
        assert_eq!([claim(&mut leases), claim(&mut leases)], [Claim::Asked, Claim::Asked]);
        assert_eq!(leases.outbox.len(), 1);
        leases.refused(name, Some((-20, "no".to_owned()))).unwrap();
        assert!(matches!(claim(&mut leases), Claim::Refused(e) if e.kind() == ErrorKind::RemoteAccess));
        assert_eq!((claim(&mut leases), leases.outbox.len()), (Claim::Asked, 2));
        leases.refused(name, None).unwrap();
        assert_eq!([claim(&mut leases), claim(&mut leases)], [Claim::Channels, Claim::Channels]);
        assert!(leases.refused(name, None).is_err(), "answered twice");
        assert!(leases.refused((8, [7; 16], Place::HOST), None).is_err(), "never asked");
        // What is refused again and again takes no memory.
        for id in 0..3 * MAX_CLAIMS as u64 {
            leases.claim(100 + id, [0; 16], Place::HOST);
            leases.refused((100 + id, [0; 16], Place::HOST), None).unwrap();
        }
        assert!(leases.claims.len() <= MAX_CLAIMS);
    }

    #[test]
    fn a_slot_that_is_used_again_is_not_the_old_grant() {
        let (mut grants, mut leases) = both();
        let (a, b) = (region(1, RemoteAccess::ALL), region(2, RemoteAccess::ALL));
        let old = grant(&mut grants, &mut leases, &a);
        a.end();
        grants.forget(1);
        leases.claim(2, b.token, Place::HOST);
        assert!(grants.give(&b, Place::HOST, RemoteAccess::ALL, Vec::new()));
        // The peer has not read its messages.
        assert!(!leases.enter(old.slot, old.generation));
        pass(&mut grants, &mut leases);
        let Claim::Granted(new) = leases.claim(2, b.token, Place::HOST) else { panic!("a grant") };
        assert!(new.slot == old.slot && leases.enter(new.slot, new.generation) && b.in_use() && !a.in_use());
        // The connection's end ends all.
        drop(grants);
        assert!(!b.in_use() && !leases.enter(new.slot, new.generation));
    }

    #[test]
    fn a_region_keeps_nothing_of_a_connection_that_has_ended() {
        let out = RingOut::new().unwrap();
        let mut grants = Grants::new(out.shared());
        let region = region(1, RemoteAccess::ALL);
        grants.give(&region, Place::HOST, RemoteAccess::ALL, Vec::new());
        drop(grants);
        assert_eq!(Arc::strong_count(out.shared()), 1);
    }

    #[test]
    fn an_ended_region_is_not_granted_and_lies_are_refused() {
        let (mut grants, mut leases) = both();
        let ended = region(1, RemoteAccess::ALL);
        ended.end();
        assert!(!grants.give(&ended, Place::HOST, RemoteAccess::ALL, Vec::new()));
        assert!(grants.outbox.is_empty() && !grants.has(1, Place::HOST));
        let good = region(2, RemoteAccess::ALL);
        grants.give(&good, Place::HOST, RemoteAccess::WRITE, Vec::new());
        let Some(Message::Grant(granted)) = grants.outbox.pop_front() else { panic!("a grant") };
        assert!(leases.granted((*granted).clone()).is_err(), "not claimed");
        let claim = |leases: &mut Leases, region| leases.claim(region, granted.token, Place::HOST);
        claim(&mut leases, 2);
        leases.granted((*granted).clone()).unwrap();
        assert!(leases.granted((*granted).clone()).is_err(), "twice");
        claim(&mut leases, 9);
        assert!(leases.granted(Granted { slot: GRANTS as u32, region: 9, ..(*granted).clone() }).is_err());
        assert!(leases.revoked(granted.slot, granted.generation + 1).is_err() && leases.revoked(55, 1).is_err());
    }

    #[test]
    fn a_landing_takes_one_message_and_keeps_its_region() {
        let (mut grants, _leases) = both();
        let region = region(1, RemoteAccess::READ);
        let key = Key { id: 5, mine: false };
        let (slot, generation) = grants.land(key, RegionUse::new(&region), Place::HOST, (0x1010, 8)).unwrap();
        assert!(region.in_use() && grants.target(slot, generation + 1).is_none());
        let target = grants.target(slot, generation).unwrap();
        assert_eq!((target.addr, target.len, target.landing), (0x1010, 8, Some(key)));
        drop(target);
        assert!(grants.end_landing(key) && !grants.end_landing(key) && !region.in_use());
        assert!(grants.target(slot, generation).is_none());
    }
}
