//! A one-sided transfer as its caller describes it. Types only.

use crate::direct::Pairing;
use crate::region::{Hold, RegionUse};
use crate::types::{Place, Segment};
use crate::wire::frame::{WireRegion, WireSegments};

/// A one-sided transfer as the caller describes it: local segments with their regions, and the remote side's.
pub(crate) struct Request {
    pub segments: Vec<Segment>,
    pub uses: Vec<RegionUse>,
    pub remote: WireSegments<'static>,
    pub remote_regions: Vec<WireRegion>,
    pub total: u64,
    /// The pairs of places (here, at the peer) that occur.
    pub pairs: Vec<(Place, Place)>,
}

/// A transfer as the caller describes it, if it is to go directly.
pub(crate) struct Sketch {
    pub pairings: Vec<Pairing>,
    /// Keeps this side's regions.
    pub hold: Hold,
    pub total: u64,
    /// Blocks.
    pub count: usize,
}

impl Sketch {
    /// The pairs of places (here, at the peer) that occur.
    pub(crate) fn places(&self) -> Vec<(Place, Place)> {
        self.pairings.iter().map(|p| (p.here, p.there)).collect()
    }
}
