//! Registered memory: regions with unguessable tokens, and the count of transfers that use each. A region that is in use is
//! never let go; one that is deregistered is found no more.

use crate::status::{bail, Result};
use crate::types::Place;
use crate::types::Span;
use parking_lot::RwLock;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

/// A registered region.
#[derive(Debug)]
pub(crate) struct Region {
    pub span: Span,
    pub token: [u8; 16],
    pub place: Place,
    uses: AtomicUsize,
}

impl Region {
    /// Whether `[addr, addr + len)` lies inside.
    fn holds(&self, addr: u64, len: u64) -> bool {
        addr >= self.span.addr && len <= self.span.len && addr - self.span.addr <= self.span.len - len
    }
}

/// A region in use: while one exists, deregistration waits.
#[derive(Debug)]
pub(crate) struct RegionUse(Arc<Region>);

impl RegionUse {
    fn new(region: &Arc<Region>) -> RegionUse {
        region.uses.fetch_add(1, Ordering::AcqRel);
        RegionUse(region.clone())
    }

    /// An error unless `[addr, addr + len)` lies inside the region.
    #[inline]
    pub(crate) fn check(&self, addr: u64, len: u64) -> Result<()> {
        if !self.0.holds(addr, len) {
            bail!(
                InvalidArgument,
                "[{addr:#x}, +{len}) is not inside region {} [{:#x}, +{})",
                self.0.span.id,
                self.0.span.addr,
                self.0.span.len
            );
        }
        Ok(())
    }
}

impl std::ops::Deref for RegionUse {
    type Target = Region;
    fn deref(&self) -> &Region {
        &self.0
    }
}

impl Drop for RegionUse {
    fn drop(&mut self) {
        self.0.uses.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A deregistered region whose last uses may still be ending.
pub(crate) struct Retired(Arc<Region>);

impl Retired {
    pub(crate) fn id(&self) -> u64 {
        self.0.span.id
    }
    pub(crate) fn in_use(&self) -> bool {
        self.0.uses.load(Ordering::Acquire) > 0
    }
}

/// Which addresses are covered, by how many regions: the address where the number changes -> the number from there on. Neighbours
/// differ, the last is 0, and below the first it is 0. Regions may overlap and repeat.
#[derive(Debug, Default)]
struct Cover(BTreeMap<u64, usize>);

impl Cover {
    fn at(&self, addr: u64) -> usize {
        self.0.range(..=addr).next_back().map_or(0, |(_, &count)| count)
    }

    fn add(&mut self, start: u64, end: u64) {
        self.change(start, end, |count| *count += 1);
    }

    /// Takes out what was added before.
    fn remove(&mut self, start: u64, end: u64) {
        self.change(start, end, |count| *count -= 1);
    }

    fn change(&mut self, start: u64, end: u64, change: impl Fn(&mut usize)) {
        for edge in [start, end] {
            let count = self.at(edge);
            self.0.entry(edge).or_insert(count);
        }
        self.0.range_mut(start..end).for_each(|(_, count)| change(count));
        for edge in [start, end] {
            let before = self.0.range(..edge).next_back().map_or(0, |(_, &count)| count);
            if self.0.get(&edge) == Some(&before) {
                self.0.remove(&edge);
            }
        }
    }
}

#[derive(Default)]
struct Table {
    by_id: HashMap<u64, Arc<Region>>,
    cover: Cover,
}

/// Regions of an engine.
pub(crate) struct Registry {
    regions: RwLock<Table>,
    next: AtomicU64,
}

impl Registry {
    pub(crate) fn new() -> Registry {
        Registry { regions: RwLock::default(), next: AtomicU64::new(1) }
    }

    pub(crate) fn add(&self, addr: u64, len: u64, place: Place) -> Result<u64> {
        let mut token = [0; 16];
        if let Err(e) = getrandom::fill(&mut token) {
            bail!(System, "random bytes for a region token: {e}");
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let region = Region { span: Span { id, addr, len }, token, place, uses: AtomicUsize::new(0) };
        let mut table = self.regions.write();
        table.cover.add(addr, addr + len);
        table.by_id.insert(id, Arc::new(region));
        Ok(id)
    }

    /// A region of this engine for a transfer started here.
    pub(crate) fn local(&self, id: u64) -> Result<RegionUse> {
        match self.regions.read().by_id.get(&id) {
            Some(region) => Ok(RegionUse::new(region)),
            None => bail!(NotFound, "region {id} is not registered"),
        }
    }

    /// A region for a peer that shows a token. Unknown region and wrong token give the same answer.
    pub(crate) fn remote(&self, id: u64, token: &[u8; 16]) -> Result<RegionUse> {
        if let Some(region) = self.regions.read().by_id.get(&id) {
            // Every byte is compared, whatever the first differences.
            if region.token.iter().zip(token).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0 {
                return Ok(RegionUse::new(region));
            }
        }
        bail!(RemoteAccess, "region {id} is not registered, or the token is wrong")
    }

    /// Removes a region: from now on it is found no more.
    pub(crate) fn retire(&self, id: u64) -> Result<Retired> {
        let mut table = self.regions.write();
        let Some(region) = table.by_id.remove(&id) else { bail!(NotFound, "region {id} is not registered") };
        table.cover.remove(region.span.addr, region.span.addr + region.span.len);
        Ok(Retired(region))
    }

    /// Whether some region holds the address.
    pub(crate) fn holds_address(&self, addr: u64) -> bool {
        self.regions.read().cover.at(addr) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use proptest::prelude::*;

    proptest! {
        /// The same answer as looking at every region, whatever overlaps, repeats and goes again; and nothing is left in the end.
        #[test]
        fn addresses_are_found_as_by_looking_at_every_region(
            spans in proptest::collection::vec((1u64..60, 1u64..20, any::<prop::sample::Index>(), 0u8..3), 1..40)
        ) {
            let registry = Registry::new();
            let mut live: Vec<(u64, u64, u64)> = Vec::new();
            for (addr, len, victim, action) in spans {
                live.push((registry.add(addr, len, Place::HOST).unwrap(), addr, len));
                if action == 0 {
                    let (id, ..) = live.swap_remove(victim.index(live.len()));
                    registry.retire(id).unwrap();
                }
                for probe in 0..90 {
                    let linear = live.iter().any(|&(_, a, l)| (a..a + l).contains(&probe));
                    prop_assert_eq!(registry.holds_address(probe), linear, "at {} with {:?}", probe, live);
                }
            }
            for (id, ..) in live {
                registry.retire(id).unwrap();
            }
            prop_assert!(registry.regions.read().cover.0.is_empty());
        }
    }

    #[test]
    fn bounds_do_not_wrap() {
        let registry = Registry::new();
        let id = registry.add(1000, 100, Place::HOST).unwrap();
        let region = registry.local(id).unwrap();
        for (addr, len) in [(1000, 100), (1000, 1), (1099, 1), (1050, 50)] {
            assert!(region.check(addr, len).is_ok(), "{addr}+{len}");
        }
        for (addr, len) in [(999, 1), (1000, 101), (1100, 1), (1050, u64::MAX), (u64::MAX, 2), (0, u64::MAX)] {
            assert!(region.check(addr, len).is_err(), "{addr}+{len}");
        }
    }

    #[test]
    fn tokens_guard_and_uses_are_counted() {
        let registry = Registry::new();
        let id = registry.add(0x1000, 10, Place::HOST).unwrap();
        let token = registry.local(id).unwrap().token;
        let mut wrong = token;
        wrong[15] ^= 1;
        assert_eq!(registry.remote(id, &wrong).unwrap_err().kind(), ErrorKind::RemoteAccess);
        assert_eq!(registry.remote(id + 1, &token).unwrap_err().kind(), ErrorKind::RemoteAccess);
        let held = registry.remote(id, &token).unwrap();
        let retired = registry.retire(id).unwrap();
        assert!(retired.in_use());
        drop(held);
        assert!(!retired.in_use());
        assert!(registry.remote(id, &token).is_err() && registry.retire(id).is_err());
    }
}
