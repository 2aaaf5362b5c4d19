//! Leave to read and order writes of a region without asking each time. A side gives it once the peer has shown the region's token,
//! and it ends with the region: a word in memory that both map tells that it stands, another how many reads are under way. Whoever ends a
//! region clears the first and waits until the second is zero; whoever reads counts itself before it looks. So no read that found leave
//! outlives it. Knows nothing of sockets and of what is read.

use super::memfile::Shared;
use super::notes::{Granted, Note};
use super::orders;
use crate::hash::Map;
use crate::region::{AccessGrant, Region};
use crate::status::{bail, Result};
use crate::types::{Place, RemoteAccess};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Grants at once, each way.
const SLOTS: usize = 4096;
/// Where its words begin in the file, behind those of orders: of each slot, whether it stands (written by the owner), and reads under way
/// (by the other side). And where they end.
const GRANTS_AT: usize = orders::END;
pub(super) const END: usize = GRANTS_AT + 2 * SLOTS;

fn stands(shared: &Shared, slot: u32) -> &std::sync::atomic::AtomicU64 {
    shared.word(GRANTS_AT + 2 * (slot as usize % SLOTS))
}

fn reads(shared: &Shared, slot: u32) -> &std::sync::atomic::AtomicU64 {
    shared.word(GRANTS_AT + 2 * (slot as usize % SLOTS) + 1)
}

/// The word of a slot while this grant stands, and afterwards.
fn standing(generation: u64) -> u64 {
    generation << 1 | 1
}

/// A grant in its owner's file.
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

/// A grant of this side.
struct Given {
    region: Arc<Region>,
    /// Where the peer's memory lies that it is for.
    there: Place,
    leave: Arc<Slot>,
}

/// What this side has granted.
pub(crate) struct Grants {
    shared: Arc<Shared>,
    by_region: Map<(u64, Place), u32>,
    slots: Map<u32, Given>,
    free: Vec<u32>,
    last: u64,
    /// What the peer has to be told.
    pub notes: VecDeque<Note>,
}

impl Grants {
    /// In this side's file.
    pub(crate) fn new(shared: &Arc<Shared>) -> Grants {
        let free = (0..SLOTS as u32).rev().collect();
        Grants { shared: shared.clone(), by_region: Map::default(), slots: Map::default(), free, last: 0, notes: VecDeque::new() }
    }

    /// Whether a region is granted for the peer's memory at `there` already.
    pub(crate) fn has(&self, region: u64, there: Place) -> bool {
        self.by_region.contains_key(&(region, there))
    }

    /// Grants a region, whose token the peer has shown. `exports`: what it lies in where the peer has to map it; `None` where it cannot
    /// be read.
    pub(crate) fn give(&mut self, region: &Arc<Region>, there: Place, exports: Option<Vec<u32>>) {
        let Some(slot) = self.free.pop() else { return };
        self.last += 1;
        let leave = Arc::new(Slot { shared: self.shared.clone(), slot, generation: self.last, over: AtomicBool::new(false) });
        stands(&self.shared, slot).store(standing(self.last), Ordering::SeqCst);
        if !region.allow(leave.clone()) {
            leave.end();
            self.free.push(slot);
            return;
        }
        let RemoteAccess { read, write } = region.access();
        self.by_region.insert((region.span.id, there), slot);
        self.slots.insert(slot, Given { region: region.clone(), there, leave });
        self.notes.push_back(Note::Grant(Box::new(Granted {
            slot,
            generation: self.last,
            region: region.span.id,
            token: region.token,
            addr: region.span.addr,
            len: region.span.len,
            there: region.place,
            here: there,
            access: RemoteAccess { read: read && exports.is_some(), write },
            exports: exports.unwrap_or_default(),
        })));
    }

    /// The region of a grant, and where the peer's memory lies that it is for; `None` when it does not stand.
    pub(crate) fn region(&self, slot: u32, generation: u64) -> Option<(&Arc<Region>, Place)> {
        let given = self.slots.get(&slot).filter(|given| given.leave.generation == generation)?;
        Some((&given.region, given.there))
    }

    /// Whether the peer reads a region just now.
    pub(crate) fn is_read(&self, region: u64) -> bool {
        self.slots.values().any(|given| given.region.span.id == region && given.leave.in_use())
    }

    /// A region has ended: nothing uses it any more.
    pub(crate) fn forget(&mut self, region: u64) {
        let names: Vec<(u64, Place)> = self.by_region.keys().copied().filter(|&(id, _)| id == region).collect();
        for name in names {
            let Some(slot) = self.by_region.remove(&name) else { continue };
            let Some(Given { leave, .. }) = self.slots.remove(&slot) else { continue };
            leave.end();
            leave.over.store(true, Ordering::SeqCst);
            self.notes.push_back(Note::Revoke { slot, generation: leave.generation });
            self.free.push(slot);
        }
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        for given in self.slots.values() {
            given.leave.end();
            given.leave.over.store(true, Ordering::SeqCst);
            // Regions outlive connections, and would keep the file of each.
            given.region.prune();
        }
    }
}

/// What the peer has granted.
pub(crate) struct Leases {
    shared: Arc<Shared>,
    /// By region, its place, and the place of this side that it is for.
    all: Map<(u64, Place, Place), Granted>,
    slots: Map<u32, (u64, Place, Place)>,
}

impl Leases {
    /// In the peer's file.
    pub(crate) fn new(shared: &Arc<Shared>) -> Leases {
        Leases { shared: shared.clone(), all: Map::default(), slots: Map::default() }
    }

    /// The peer grants a region.
    ///
    /// # Errors
    /// `Protocol` for a slot that is taken or does not exist.
    pub(crate) fn told(&mut self, granted: Granted) -> Result<()> {
        let name = (granted.region, granted.there, granted.here);
        if granted.slot as usize >= SLOTS || self.slots.contains_key(&granted.slot) || self.all.contains_key(&name) {
            bail!(Protocol, "the peer grants region {} in slot {}", granted.region, granted.slot);
        }
        self.slots.insert(granted.slot, name);
        self.all.insert(name, granted);
        Ok(())
    }

    /// The peer takes a grant back.
    ///
    /// # Errors
    /// `Protocol` for one that it has not given.
    pub(crate) fn ended(&mut self, slot: u32, generation: u64) -> Result<()> {
        let granted = self.slots.remove(&slot).and_then(|name| self.all.remove(&name));
        match granted {
            Some(granted) if granted.generation == generation => Ok(()),
            _ => bail!(Protocol, "the peer takes back what is not granted in slot {slot}"),
        }
    }

    /// The grant of a region, which lies at `there`, for memory of this side at `here`.
    pub(crate) fn find(&self, region: u64, there: Place, here: Place) -> Option<&Granted> {
        self.all.get(&(region, there, here))
    }

    /// Begins a read; `false` when the grant does not stand. Ends with [`Leases::leave`].
    pub(crate) fn enter(&self, slot: u32, generation: u64) -> bool {
        reads(&self.shared, slot).fetch_add(1, Ordering::SeqCst);
        if stands(&self.shared, slot).load(Ordering::SeqCst) == standing(generation) {
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
    use super::super::ring::{Inbox, Outbox};
    use super::*;
    use crate::types::Span;

    fn region(id: u64, access: RemoteAccess) -> Arc<Region> {
        Arc::new(Region::new(Span { id, addr: 0x1000, len: 100 }, [id as u8; 16], Place::HOST, access))
    }

    fn both() -> (Grants, Leases) {
        let out = Outbox::new().unwrap();
        let inn = Inbox::open(out.fd()).unwrap();
        (Grants::new(out.shared()), Leases::new(inn.shared()))
    }

    fn pass(grants: &mut Grants, leases: &mut Leases) {
        for note in std::mem::take(&mut grants.notes) {
            match Note::decode(&note.encode(), Vec::new()).unwrap() {
                Note::Grant(granted) => leases.told(*granted).unwrap(),
                Note::Revoke { slot, generation } => leases.ended(slot, generation).unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_read_holds_the_region_and_none_begins_after_its_end() {
        let (mut grants, mut leases) = both();
        let region = region(7, RemoteAccess::READ);
        grants.give(&region, Place::HOST, Some(Vec::new()));
        pass(&mut grants, &mut leases);
        let granted = leases.find(7, Place::HOST, Place::HOST).unwrap().clone();
        assert!(granted.token == [7; 16] && granted.access == RemoteAccess::READ && (granted.addr, granted.len) == (0x1000, 100));
        assert!(leases.enter(granted.slot, granted.generation) && region.in_use() && grants.is_read(7));
        region.end();
        assert!(!leases.enter(granted.slot, granted.generation) && region.in_use());
        leases.leave(granted.slot);
        assert!(!region.in_use() && region.enter().is_none());
        grants.forget(7);
        pass(&mut grants, &mut leases);
        assert!(leases.find(7, Place::HOST, Place::HOST).is_none() && grants.region(granted.slot, granted.generation).is_none());
    }

    #[test]
    fn a_slot_that_is_used_again_is_not_the_old_grant() {
        let (mut grants, mut leases) = both();
        let (a, b) = (region(1, RemoteAccess::ALL), region(2, RemoteAccess::ALL));
        grants.give(&a, Place::HOST, Some(Vec::new()));
        pass(&mut grants, &mut leases);
        let old = leases.find(1, Place::HOST, Place::HOST).unwrap().clone();
        a.end();
        grants.forget(1);
        grants.give(&b, Place::HOST, Some(Vec::new()));
        // The peer has not read its notes.
        assert!(!leases.enter(old.slot, old.generation));
        pass(&mut grants, &mut leases);
        let new = leases.find(2, Place::HOST, Place::HOST).unwrap().clone();
        assert!(new.slot == old.slot && leases.enter(new.slot, new.generation) && b.in_use() && !a.in_use());
        // The connection's end ends all.
        drop(grants);
        assert!(!b.in_use() && !leases.enter(new.slot, new.generation));
    }

    #[test]
    fn a_region_keeps_nothing_of_a_connection_that_has_ended() {
        let out = Outbox::new().unwrap();
        let mut grants = Grants::new(out.shared());
        let region = region(1, RemoteAccess::ALL);
        grants.give(&region, Place::HOST, Some(Vec::new()));
        drop(grants);
        assert_eq!(Arc::strong_count(out.shared()), 1);
    }

    #[test]
    fn an_ended_region_is_not_granted_and_lies_are_refused() {
        let (mut grants, mut leases) = both();
        let ended = region(1, RemoteAccess::ALL);
        ended.end();
        grants.give(&ended, Place::HOST, Some(Vec::new()));
        assert!(grants.notes.is_empty() && !grants.has(1, Place::HOST));
        let good = region(2, RemoteAccess::ALL);
        grants.give(&good, Place::HOST, None);
        let Some(Note::Grant(granted)) = grants.notes.pop_front() else { panic!("a grant") };
        assert_eq!(granted.access, RemoteAccess::WRITE, "what cannot be shared cannot be read");
        leases.told((*granted).clone()).unwrap();
        assert!(leases.told((*granted).clone()).is_err(), "twice");
        assert!(leases.told(Granted { slot: SLOTS as u32, region: 9, ..(*granted).clone() }).is_err());
        assert!(leases.ended(granted.slot, granted.generation + 1).is_err() && leases.ended(55, 1).is_err());
    }
}
