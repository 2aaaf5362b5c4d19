//! Registered regions and their use counts. A region in use is never released. Knows nothing of its users.

use crate::status::{bail, Result};
use crate::types::{Place, RemoteAccess, Span};
use process::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::Arc;

/// Permission for a peer to access a region without a request per transfer.
pub(crate) trait AccessGrant: Send + Sync + std::fmt::Debug {
    /// Ends the grant: no access starts.
    fn end(&self);
    /// Whether the peer is accessing the region.
    fn in_use(&self) -> bool;
    /// Whether its connection has ended.
    fn is_over(&self) -> bool;
}

/// A registered region.
#[derive(Debug)]
pub(crate) struct Region {
    pub span: Span,
    pub token: [u8; 16],
    pub place: Place,
    access: RemoteAccess,
    uses: AtomicUsize,
    /// A network plugin has registered it.
    registered: AtomicBool,
    /// Deregistered: no new use starts.
    ended: AtomicBool,
    grants: Mutex<Vec<Arc<dyn AccessGrant>>>,
    /// Whether other processes can read it: [`UNKNOWN`] until probed, then 0 or 1.
    readable: AtomicU8,
}

const UNKNOWN: u8 = 2;

impl Region {
    pub(crate) fn new(span: Span, token: [u8; 16], place: Place, access: RemoteAccess) -> Region {
        Region {
            span,
            token,
            place,
            access,
            uses: AtomicUsize::new(0),
            registered: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            grants: Mutex::new(Vec::new()),
            readable: AtomicU8::new(UNKNOWN),
        }
    }

    /// What peers may do with it.
    pub(crate) fn access(&self) -> RemoteAccess {
        self.access
    }

    /// Whether other processes can read it; calls `probe` the first time.
    pub(crate) fn is_readable(&self, probe: impl FnOnce(&Span) -> bool) -> bool {
        match self.readable.load(Ordering::Relaxed) {
            UNKNOWN => {
                let found = probe(&self.span);
                self.readable.store(found.into(), Ordering::Relaxed);
                found
            }
            known => known == 1,
        }
    }

    /// Starts a use, unless the region is deregistered.
    pub(crate) fn enter(self: &Arc<Region>) -> Option<RegionUse> {
        let used = RegionUse::new(self);
        // After the count: deregistration reads the two in the opposite order.
        (!self.ended.load(Ordering::SeqCst)).then_some(used)
    }

    /// Records a peer's grant; `false` if the region is deregistered.
    pub(crate) fn allow(&self, grant: Arc<dyn AccessGrant>) -> bool {
        let mut grants = self.grants.lock();
        grants.retain(|grant| !grant.is_over());
        if self.ended.load(Ordering::SeqCst) {
            return false;
        }
        grants.push(grant);
        true
    }

    /// Drops the grants of connections that have ended.
    pub(crate) fn prune(&self) {
        self.grants.lock().retain(|grant| !grant.is_over());
    }

    /// Deregisters it. The caller then waits for its uses to end.
    pub(crate) fn end(&self) {
        let grants = self.grants.lock();
        self.ended.store(true, Ordering::SeqCst);
        grants.iter().for_each(|grant| grant.end());
    }

    /// Whether `[addr, addr + len)` lies inside.
    fn holds(&self, addr: u64, len: u64) -> bool {
        addr >= self.span.addr && len <= self.span.len && addr - self.span.addr <= self.span.len - len
    }

    pub(crate) fn in_use(&self) -> bool {
        self.uses.load(Ordering::SeqCst) > 0 || self.grants.lock().iter().any(|grant| grant.in_use())
    }

    /// Whether a network plugin registered it and must deregister it.
    pub(crate) fn is_registered(&self) -> bool {
        self.registered.load(Ordering::Acquire)
    }
}

/// A region in use: while one exists, deregistration waits.
#[derive(Debug)]
pub(crate) struct RegionUse(Arc<Region>);

impl RegionUse {
    pub(crate) fn new(region: &Arc<Region>) -> RegionUse {
        region.uses.fetch_add(1, Ordering::SeqCst);
        RegionUse(region.clone())
    }

    /// The region, for a grant to a peer.
    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.0
    }

    /// The region, for an export to a process on this host, which must learn when the region ends.
    pub(crate) fn to_share(&self) -> &Region {
        self.0.registered.store(true, Ordering::Release);
        &self.0
    }

    /// Fails unless `[addr, addr + len)` lies inside the region.
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

    /// Fails unless peers may do all of `wanted` with the region.
    #[inline]
    pub(crate) fn check_access(&self, wanted: RemoteAccess) -> Result<()> {
        let RemoteAccess { read, write } = self.0.access;
        if (wanted.read && !read) || (wanted.write && !write) {
            let verb = if wanted.write { "write" } else { "read" };
            bail!(RemoteAccess, "peers may not {verb} region {}", self.0.span.id);
        }
        Ok(())
    }

    /// As [`RegionUse::check`] for a peer. The error does not reveal the region's address.
    #[inline]
    pub(crate) fn check_remote(&self, addr: u64, len: u64) -> Result<()> {
        if !self.0.holds(addr, len) {
            bail!(RemoteAccess, "[{addr:#x}, +{len}) is not inside region {}", self.0.span.id);
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

/// The regions that a transfer uses. Every posted chunk carries a clone, so that they stay in use until the last posted chunk is
/// done or its channel is closed, even if the transfer has failed.
#[derive(Clone, Debug)]
pub(crate) struct Hold(Arc<Vec<RegionUse>>);

impl Hold {
    /// Holds all of `uses`; segments and parts refer to them by index.
    pub(crate) fn new(uses: Vec<RegionUse>) -> Hold {
        Hold(Arc::new(uses))
    }

    /// The extent of a region, for its registration with a network plugin.
    pub(crate) fn span_to_register(&self, region: u16) -> Result<Span> {
        match self.0.get(usize::from(region)) {
            Some(used) => {
                used.registered.store(true, Ordering::Release);
                Ok(used.span)
            }
            None => bail!(Internal, "no region {region}: the transfer has {}", self.0.len()),
        }
    }

    /// All of its regions.
    pub(crate) fn regions(&self) -> &[RegionUse] {
        &self.0
    }

    /// A region, for an export to a process on this host, which must learn when the region ends.
    pub(crate) fn region_to_share(&self, region: u16) -> Option<&Region> {
        self.0.get(usize::from(region)).map(RegionUse::to_share)
    }

    /// Whether it holds the region with this id.
    pub(crate) fn holds(&self, id: u64) -> bool {
        self.0.iter().any(|u| u.span.id == id)
    }
}
