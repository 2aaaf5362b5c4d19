//! Transfers of this side that go without chunks and frames: a path of the channels carries all of them, and says how far they are. The
//! peer has no say in them on the control stream. Knows nothing of how they are carried.

use super::state::State;
use super::transfers::Kind;
use crate::channel::path::{Blocks, Direct, Pairing, Way};
use crate::channel::router::Channels;
use crate::region::Hold;
use crate::status::{err, Result};
use crate::types::{Key, Place};
use std::time::Instant;

/// A transfer as the caller describes it, if it is to go without chunks.
pub(crate) struct Sketch {
    pub pairings: Vec<Pairing>,
    /// What keeps this side's regions.
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

/// The machine as those transfers move it on.
pub(super) struct DirectTransfers<'a>(pub &'a mut State);

impl DirectTransfers<'_> {
    /// Starts a transfer that was admitted, if it can go without chunks: its id, and why the connection must end if it must. Some of it may
    /// have moved by then. `None`: nothing has begun.
    pub(super) fn start(
        self,
        sketch: Sketch,
        way: Way,
        blocks: &mut dyn Blocks,
        channels: &mut Channels,
        now: Instant,
    ) -> Option<(u64, Result<()>)> {
        let Sketch { pairings, hold, total, count } = sketch;
        let key = Key { id: self.0.transfers.next(), mine: true };
        let mut direct = Direct { key, way, total, pairings: &pairings, hold: &hold, blocks };
        let begun = match channels.start_direct(&mut direct) {
            Ok(false) => return None,
            Ok(true) => Ok(()),
            Err(e) => Err(e),
        };
        let id = self.0.transfers.start(Kind::Direct, total, count);
        debug_assert_eq!(id, key.id);
        self.0.deadlines.start_in_order(key, way, total, now);
        self.0.holds.insert(id, hold);
        self.0.liveness.look_soon(now);
        Some((id, begun))
    }

    /// Bytes of such a transfer are in place.
    pub(super) fn moved(self, key: Key, len: u64, now: Instant) {
        self.0.deadlines.moved(key, len, now);
        self.0.transfers.moved(key.id, len);
    }

    /// Such a transfer has ended.
    pub(super) fn ended(self, key: Key, done: bool) {
        self.0.holds.remove(key.id);
        self.0.deadlines.end(key);
        let result = if done {
            Ok(())
        } else {
            self.0.counts.refused_by_peer += 1;
            let (peer, id) = (&self.0.setting.peer, key.id);
            Err(err!(RemoteAccess, "{peer}: transfer {id} refused by the peer: its region is not registered any more"))
        };
        self.0.transfers.finish(key.id, result);
    }
}
