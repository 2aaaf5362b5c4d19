//! Registered memory: regions with unguessable tokens, and the count of transfers that use each. A region in use is never
//! released, and a deregistered one is no longer found. Knows nothing of transfers.

use crate::hash::Map;
use crate::region::{Region, RegionUse};
use crate::status::{bail, Result};
use crate::types::{Place, RemoteAccess, Span};
use iset::IntervalMap;
use process::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// A deregistered region whose last uses may still be ending.
pub(crate) struct Retired(Arc<Region>);

impl Retired {
    pub(crate) fn id(&self) -> u64 {
        self.0.span.id
    }
    pub(crate) fn in_use(&self) -> bool {
        self.0.in_use()
    }
    /// Whether plugins of connections may have registered it.
    pub(crate) fn is_registered(&self) -> bool {
        self.0.is_registered()
    }
}

/// Which ranges are registered, and how often each, since regions may overlap and repeat. Every operation is logarithmic.
#[derive(Debug, Default)]
struct Cover(IntervalMap<u64, usize>);

impl Cover {
    fn add(&mut self, start: u64, end: u64) {
        match self.0.get_mut(start..end) {
            Some(count) => *count += 1,
            None => {
                self.0.insert(start..end, 1);
            }
        }
    }

    /// Removes a range that was added before.
    fn remove(&mut self, start: u64, end: u64) {
        match self.0.get_mut(start..end) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                self.0.remove(start..end);
            }
        }
    }

    fn holds(&self, addr: u64) -> bool {
        self.0.has_overlap(addr..=addr)
    }
}

#[derive(Default)]
struct Regions {
    by_id: Map<u64, Arc<Region>>,
    cover: Cover,
}

/// The regions of an engine.
pub(crate) struct Registry {
    regions: RwLock<Regions>,
    next: AtomicU64,
}

impl Registry {
    pub(crate) fn new() -> Registry {
        Registry { regions: RwLock::default(), next: AtomicU64::new(1) }
    }

    /// Adds a region that peers may use as `access` allows.
    pub(crate) fn add(&self, addr: u64, len: u64, place: Place, access: RemoteAccess) -> Result<u64> {
        let mut token = [0; 16];
        if let Err(e) = getrandom::fill(&mut token) {
            bail!(System, "random bytes for a region token: {e}");
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let region = Region::new(Span { id, addr, len }, token, place, access);
        let mut regions = self.regions.write();
        regions.cover.add(addr, addr + len);
        regions.by_id.insert(id, Arc::new(region));
        Ok(id)
    }

    /// A region of this engine, for a transfer that this engine starts.
    pub(crate) fn local(&self, id: u64) -> Result<RegionUse> {
        match self.regions.read().by_id.get(&id) {
            Some(region) => Ok(RegionUse::new(region)),
            None => bail!(NotFound, "region {id} is not registered"),
        }
    }

    /// The ids of the regions in GPU memory. Take the use of each one only when needed: a region in use cannot be deregistered.
    pub(crate) fn on_devices(&self) -> Vec<u64> {
        self.regions.read().by_id.iter().filter(|(_, region)| region.place.is_device()).map(|(&id, _)| id).collect()
    }

    /// A region for a peer that presents a token. An unknown region and a wrong token give the same answer.
    pub(crate) fn remote(&self, id: u64, token: &[u8; 16]) -> Result<RegionUse> {
        if let Some(region) = self.regions.read().by_id.get(&id) {
            // Compares every byte, so that the time reveals nothing.
            if region.token.iter().zip(token).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0 {
                return Ok(RegionUse::new(region));
            }
        }
        bail!(RemoteAccess, "region {id} is not registered, or the token is wrong")
    }

    /// Removes a region, which is no longer found.
    pub(crate) fn retire(&self, id: u64) -> Result<Retired> {
        let mut regions = self.regions.write();
        let Some(region) = regions.by_id.remove(&id) else { bail!(NotFound, "region {id} is not registered") };
        regions.cover.remove(region.span.addr, region.span.addr + region.span.len);
        region.end();
        Ok(Retired(region))
    }

    /// Whether some region contains the address.
    pub(crate) fn holds_address(&self, addr: u64) -> bool {
        self.regions.read().cover.holds(addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use proptest::prelude::*;

    proptest! {
        /// The answer is that of a search through all regions, however they overlap and repeat, and nothing is left in the end.
        #[test]
        fn addresses_are_found_as_by_looking_at_every_region(
            spans in proptest::collection::vec((1u64..60, 1u64..20, any::<prop::sample::Index>(), 0u8..3), 1..40)
        ) {
            let registry = Registry::new();
            let mut live: Vec<(u64, u64, u64)> = Vec::new();
            for (addr, len, victim, action) in spans {
                live.push((registry.add(addr, len, Place::HOST, RemoteAccess::ALL).unwrap(), addr, len));
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

    /// With 64 times as many overlapping regions, registering, looking up and retiring take a few steps more, not 64 times as
    /// long.
    #[test]
    fn the_cost_grows_as_the_logarithm_of_the_overlaps() {
        let fastest = |overlaps: u64| {
            let registry = Registry::new();
            let add = |i: u64| registry.add((1 << 40) - i, 2 * i, Place::HOST, RemoteAccess::ALL).unwrap();
            let ids: Vec<u64> = (1..=overlaps).map(|i| add(16 * i)).collect();
            let round = |k: u64| {
                let begun = std::time::Instant::now();
                for i in 0..100 {
                    let id = add(16 * ((k * 100 + i) * 7 % overlaps) + 5);
                    assert!(registry.holds_address((1 << 40) - 1) && registry.holds_address((1 << 40) + 8 * i));
                    assert!(!registry.holds_address(1) && !registry.holds_address(1 << 41));
                    registry.retire(id).unwrap();
                }
                begun.elapsed()
            };
            let best = (0..30).map(round).min().unwrap();
            ids.into_iter().for_each(|id| drop(registry.retire(id).unwrap()));
            best
        };
        let (few, many) = (fastest(1 << 10), fastest(1 << 16));
        assert!(many < 16 * few, "{few:?} among 1,024, {many:?} among 65,536");
    }

    #[test]
    fn bounds_do_not_wrap() {
        let registry = Registry::new();
        let id = registry.add(1000, 100, Place::HOST, RemoteAccess::ALL).unwrap();
        let region = registry.local(id).unwrap();
        for (addr, len) in [(1000, 100), (1000, 1), (1099, 1), (1050, 50)] {
            assert!(region.check(addr, len).is_ok(), "{addr}+{len}");
        }
        for (addr, len) in [(999, 1), (1000, 101), (1100, 1), (1050, u64::MAX), (u64::MAX, 2), (0, u64::MAX)] {
            assert!(region.check(addr, len).is_err(), "{addr}+{len}");
        }
    }

    #[test]
    fn peers_may_do_what_the_region_allows() {
        let registry = Registry::new();
        let none = RemoteAccess { read: false, write: false };
        for access in [RemoteAccess::ALL, RemoteAccess::READ, RemoteAccess::WRITE, none] {
            let id = registry.add(0x1000, 10, Place::HOST, access).unwrap();
            let region = registry.local(id).unwrap();
            assert_eq!(region.check_access(RemoteAccess::READ).is_ok(), access.read);
            assert_eq!(region.check_access(RemoteAccess::WRITE).is_ok(), access.write);
            assert_eq!(region.check_access(RemoteAccess::ALL).is_ok(), access == RemoteAccess::ALL);
            assert!(region.check(0x1000, 10).is_ok(), "its owner may do everything");
        }
    }

    #[test]
    fn tokens_guard_and_uses_are_counted() {
        let registry = Registry::new();
        let id = registry.add(0x1000, 10, Place::HOST, RemoteAccess::ALL).unwrap();
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
