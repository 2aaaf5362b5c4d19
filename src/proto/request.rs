//! A one-sided transfer as its caller describes it. Types only.

use crate::direct::Pairing;
use crate::region::{Hold, RegionUse};
use crate::types::{Place, Segment};
use crate::wire::frame::{WireRegion, WireSegments};

/// A one-sided transfer: local segments with their regions, and the peer's.
pub(crate) struct Request {
    pub segments: Vec<Segment>,
    pub uses: Vec<RegionUse>,
    pub remote: WireSegments<'static>,
    pub remote_regions: Vec<WireRegion>,
    pub total: u64,
    /// The pairs of places (here, at the peer) that occur.
    pub pairs: Vec<(Place, Place)>,
}

/// A transfer that is to go directly, as its caller describes it.
pub(crate) struct Sketch {
    pub pairings: Vec<Pairing>,
    /// Keeps this engine's regions in use.
    pub hold: Hold,
    pub total: u64,
    /// Number of blocks.
    pub count: usize,
}

impl Sketch {
    /// The pairs of places (here, at the peer) that occur.
    pub(crate) fn places(&self) -> impl Iterator<Item = (Place, Place)> + '_ {
        self.pairings.iter().map(|p| (p.here, p.there))
    }
}
