//! The simulated direct transport: it answers claims and copies blocks when the scheduler says so, stalls on demand, and its peer
//! may lie.

use super::net::Net;
use crate::direct::{Activity, Direct, Event, Pairing, Route, Start, Way};
use crate::hash::Map;
use crate::region::{Hold, Region, RegionUse};
use crate::registry::Registry;
use crate::stats::ChannelStats;
use crate::status::{bail, err, Error, Result};
use crate::types::{Key, Landing, Piece, Place};
use process::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// The byte that a liar's memory is full of.
pub(super) const LIE: u8 = 0x11;

/// A transfer in flight: its blocks and its progress.
struct Carried {
    side: usize,
    key: Key,
    way: Way,
    blocks: VecDeque<Piece>,
    /// Bytes moved and not yet reported.
    moved: u64,
    _hold: Hold,
    /// Keeps the peer's memory in use while the peer is there, and names it.
    uses: Option<Vec<RegionUse>>,
    far: Vec<(u64, [u8; 16])>,
    landing: Option<u32>,
    begun: bool,
    refused: bool,
}

/// A buffer that a side has granted for one message.
struct Lands {
    side: usize,
    key: Key,
    _used: RegionUse,
    addr: u64,
    len: u64,
    /// Bytes that have arrived, and those not yet reported.
    got: u64,
    moved: u64,
}

#[derive(Clone)]
enum Claim {
    Asked,
    Granted,
    Channels,
    Refused(Error),
}

/// How often a liar lied.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lies {
    /// Claims of the victim that it granted, and that it did not.
    pub granted: u64,
    pub refused: u64,
    /// Claims of regions of the victim with a false token.
    pub claimed: u64,
    /// Blocks of direct transfers that it filled with other bytes, or took nothing of.
    pub blocks: u64,
    /// Writes into buffers that the victim granted for a message.
    pub landings: u64,
}

/// What the two sides share.
#[derive(Default)]
pub(super) struct DirectNet {
    /// Whether the transport exists; nothing moves once it is stalled.
    pub on: bool,
    pub stalls: bool,
    /// The registered memory of each side; `None` for a liar.
    pub registries: [Option<Arc<Registry>>; 2],
    carried: Vec<Carried>,
    landings: Map<u32, Lands>,
    given: u32,
    claims: Map<(usize, u64, [u8; 16]), Claim>,
    answered: [bool; 2],
    denied: [Vec<Error>; 2],
    pub lies: Lies,
    closed: [bool; 2],
}

impl DirectNet {
    /// Answers the claims of a side. `channels`: some of the regions cannot be reached directly. A liar answers as `lie` says.
    pub(super) fn answer(&mut self, side: usize, channels: bool, lie: u32) {
        if self.stalls || self.closed[1 - side] {
            return;
        }
        let there = self.registries[1 - side].clone();
        for (&(_, region, token), claim) in self.claims.iter_mut().filter(|((of, ..), _)| *of == side) {
            if !matches!(claim, Claim::Asked) {
                continue;
            }
            if there.is_none() {
                let lied = if lie % 3 == 0 { &mut self.lies.granted } else { &mut self.lies.refused };
                *lied += 1;
            }
            *claim = match there.as_ref().map(|there| there.remote(region, &token)) {
                None => [Claim::Granted, Claim::Channels, Claim::Refused(err!(RemoteAccess, "a lie"))][lie as usize % 3].clone(),
                Some(Ok(_)) if channels => Claim::Channels,
                Some(Ok(_)) => Claim::Granted,
                Some(Err(e)) => {
                    self.denied[1 - side].push(e.clone());
                    Claim::Refused(e)
                }
            };
            self.answered[side] = true;
        }
    }

    /// Copies up to `blocks` blocks of the transfers that a side has in flight. A transfer whose memory the peer gave back before
    /// the first block is refused.
    pub(super) fn carry(&mut self, side: usize, blocks: usize) {
        // A peer that has ended carries out nothing, and takes its grants back.
        if self.stalls || self.closed[1 - side] {
            return;
        }
        let DirectNet { carried, landings, registries, lies, .. } = self;
        for carried in carried.iter_mut().filter(|c| c.side == side && c.uses.is_some() && !c.refused) {
            let gone = |(region, token): &(u64, [u8; 16])| match &registries[1 - side] {
                Some(there) => there.remote(*region, token).is_err(),
                None => false,
            };
            if !carried.begun && carried.landing.is_none() && carried.far.iter().any(gone) {
                (carried.refused, carried.uses) = (true, Some(Vec::new()));
                continue;
            }
            for _ in 0..blocks {
                let Some(Piece { src, dst, len }) = carried.blocks.pop_front() else { break };
                match (&registries[1 - side], carried.way) {
                    // SAFETY: memory of the harness, which outlives the simulation.
                    (Some(_), _) => unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, len as usize) },
                    // SAFETY: as above.
                    (None, Way::In) => unsafe { std::ptr::write_bytes(dst as *mut u8, LIE, len as usize) },
                    (None, Way::Out) => {}
                }
                lies.blocks += u64::from(registries[1 - side].is_none());
                carried.moved += len;
                carried.begun = true;
                if let Some(lands) = carried.landing.and_then(|slot| landings.get_mut(&slot)) {
                    (lands.got, lands.moved) = (lands.got + len, lands.moved + len);
                }
            }
        }
    }

    /// The liar writes into a buffer that it was granted.
    pub(super) fn lie(&mut self, bytes: u64) {
        if let Some(lands) = self.landings.values_mut().find(|lands| lands.got < lands.len) {
            let more = bytes.min(lands.len - lands.got);
            // SAFETY: the buffer lies in a region that `_used` holds.
            unsafe { std::ptr::write_bytes((lands.addr + lands.got) as *mut u8, LIE, more as usize) };
            (lands.got, lands.moved) = (lands.got + more, lands.moved + more);
            self.lies.landings += 1;
        }
    }

    /// The liar claims a region of a side.
    pub(super) fn claim_falsely(&mut self, side: usize, region: u64, token: [u8; 16]) {
        let denied = self.registries[side].as_ref().and_then(|registry| registry.remote(region, &token).err());
        if let (true, Some(error)) = (self.on, denied) {
            self.denied[side].push(error);
            self.lies.claimed += 1;
        }
    }
}

/// One side of the transport.
pub(super) struct SimulatedDirect {
    net: Arc<Mutex<Net>>,
    side: usize,
}

impl SimulatedDirect {
    pub(super) fn new(net: &Arc<Mutex<Net>>, side: usize) -> SimulatedDirect {
        SimulatedDirect { net: net.clone(), side }
    }
}

fn joins(here: Place, there: Place) -> bool {
    here.is_device() == there.is_device()
}

impl Direct for SimulatedDirect {
    fn route(&mut self, _way: Way, pairings: &[Pairing], _hold: &Hold) -> Result<Route> {
        let mut net = self.net.lock();
        net.allocate(self.side)?;
        let net = &mut net.direct;
        if !net.on || net.closed[1 - self.side] || !pairings.iter().all(|p| joins(p.here, p.there)) {
            return Ok(Route::Channels);
        }
        let mut route = Route::Direct;
        for pairing in pairings {
            let name = (self.side, pairing.region, pairing.token);
            match net.claims.entry(name).or_insert(Claim::Asked).clone() {
                Claim::Asked => route = Route::Wait,
                Claim::Channels => return Ok(Route::Channels),
                Claim::Refused(error) => {
                    net.claims.remove(&name);
                    return Ok(Route::Refused(error));
                }
                Claim::Granted => {
                    let Some(there) = &net.registries[1 - self.side] else { continue };
                    let (begin, end) = pairing.far;
                    let checked = there.remote(pairing.region, &pairing.token).and_then(|r| r.check_remote(begin, end - begin));
                    if let Err(e) = checked {
                        return Ok(Route::Refused(e));
                    }
                }
            }
        }
        Ok(route)
    }

    fn start(&mut self, transfer: &mut Start<'_>, landing: Option<Landing>) -> Result<()> {
        let mut net = self.net.lock();
        net.allocate(self.side)?;
        let net = &mut net.direct;
        let mut uses = Vec::new();
        if let (Some(there), None) = (&net.registries[1 - self.side], landing) {
            for pairing in transfer.pairings {
                uses.extend(there.remote(pairing.region, &pairing.token));
            }
        }
        let mut blocks = Vec::new();
        while let Some(at) = transfer.blocks.fill(3, 10_000, &mut blocks) {
            assert!(transfer.hold.span_to_register(transfer.pairings[at].local).is_ok(), "a block in memory that is not held");
        }
        assert!(transfer.blocks.is_done());
        assert_eq!(blocks.iter().map(|block| block.len).sum::<u64>(), transfer.total);
        net.carried.push(Carried {
            side: self.side,
            key: transfer.key,
            way: transfer.way,
            blocks: blocks.into(),
            moved: 0,
            _hold: transfer.hold.clone(),
            uses: Some(uses),
            far: transfer.pairings.iter().map(|p| (p.region, p.token)).collect(),
            landing: landing.map(|landing| landing.slot),
            begun: false,
            refused: false,
        });
        Ok(())
    }

    fn can_send(&mut self, _place: Place, _hold: &Hold) -> bool {
        self.net.lock().direct.on
    }

    fn land(&mut self, key: Key, region: &RegionUse, (addr, len): (u64, u64), there: Place) -> Option<Landing> {
        let net = &mut self.net.lock().direct;
        if !net.on || net.closed[1 - self.side] || !joins(region.place, there) {
            return None;
        }
        net.given += 1;
        let lands = Lands { side: self.side, key, _used: RegionUse::new(region.region()), addr, len, got: 0, moved: 0 };
        net.landings.insert(net.given, lands);
        Some(Landing { slot: net.given, generation: 1, addr })
    }

    fn withdraw(&mut self, key: Key) -> bool {
        let net = &mut self.net.lock().direct;
        let found = net.landings.iter().find(|(_, lands)| lands.side == self.side && lands.key == key && lands.got == 0);
        match found.map(|(&slot, _)| slot) {
            Some(slot) => net.landings.remove(&slot).is_some(),
            None => false,
        }
    }

    fn progress(&mut self, _now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut net = self.net.lock();
        net.allocate(self.side)?;
        let (net, side, before) = (&mut net.direct, self.side, events.len());
        let mut lost = false;
        net.carried.retain_mut(|carried| {
            if carried.side != side {
                return true;
            }
            if carried.moved > 0 {
                events.push(Event::Moved(carried.key, std::mem::take(&mut carried.moved)));
            }
            let ended = carried.refused || carried.blocks.is_empty();
            if ended {
                events.push(Event::Ended(carried.key, !carried.refused));
            }
            lost |= !ended && carried.uses.is_none();
            !ended
        });
        if lost {
            bail!(RemoteDisconnect, "simulated: the peer's process has closed the connection");
        }
        net.landings.retain(|_, lands| {
            if lands.side == side && lands.moved > 0 {
                events.push(Event::Moved(lands.key, std::mem::take(&mut lands.moved)));
            }
            let ended = lands.side == side && lands.got == lands.len;
            if ended {
                events.push(Event::Ended(lands.key, true));
            }
            !ended
        });
        events.extend(net.denied[side].drain(..).map(Event::Denied));
        if std::mem::take(&mut net.answered[side]) {
            events.push(Event::Answered);
        }
        Ok(events.len() > before)
    }

    fn activity(&self) -> Activity {
        let net = &self.net.lock().direct;
        let busy = net.carried.iter().any(|carried| carried.side == self.side);
        let landed = net.landings.values().any(|lands| lands.side == self.side && lands.got > 0);
        let active = busy || landed || net.answered[self.side] || !net.denied[self.side].is_empty();
        Activity { busy, active, ..Activity::default() }
    }

    fn by_nvlink(&self, _here: Place, _there: Place) -> bool {
        false
    }
    fn offer(&mut self, _region: &Region) {}

    fn forget(&mut self, _region: u64) {}

    fn uses_region(&self, region: u64) -> bool {
        let net = &self.net.lock().direct;
        net.carried.iter().any(|carried| carried.side != self.side && carried.far.iter().any(|(far, _)| *far == region))
    }

    fn ready(&mut self, _place: Place) -> Result<()> {
        Ok(())
    }

    fn flowed(&self) -> (u64, u64) {
        (0, 0)
    }

    fn describe(&self, _way: Way) -> String {
        String::new()
    }

    fn stats(&self, _kernel: bool) -> ChannelStats {
        ChannelStats::default()
    }
}

impl Drop for SimulatedDirect {
    fn drop(&mut self) {
        let net = &mut self.net.lock().direct;
        let side = self.side;
        net.closed[side] = true;
        net.carried.retain(|carried| carried.side != side);
        // Nothing touches this side's memory any more.
        net.carried.iter_mut().for_each(|carried| carried.uses = None);
        net.landings.retain(|_, lands| lands.side != side);
    }
}
