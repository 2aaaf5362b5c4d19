//! From the arguments of an application to a request for the protocol machine: local segments with their regions, and the peer's
//! segments in wire format. Everything that can be checked locally is checked here, before a transfer is admitted. Knows nothing
//! about sockets, channels or the machine's state.

use crate::direct::{Blocks, Pairing, Way};
use crate::engine::fifo::{Access, FifoItem};
use crate::engine::transfer::LocalSegment;
use crate::hash::Map;
use crate::proto::{Request, Sketch};
use crate::region::{Hold, RegionUse};
use crate::registry::Registry;
use crate::segment_pool::{SegmentPool, MANY};
use crate::status::{bail, err, Error, Result};
use crate::types::{Piece, Place, Segment};
use crate::wire::frame::{WireRegion, WireSegment, WireSegments, MAX_REGIONS, MAX_SEGMENTS, MAX_SEGMENT_BYTES};
use std::borrow::Borrow;
use std::collections::TryReserveError;

/// The result of building a request.
pub(crate) enum Built {
    Request(Request),
    /// Valid, but the peer would refuse it: becomes a transfer that has failed.
    Refused(Error),
}

/// Collects the segments of a one-sided transfer.
pub(crate) struct RequestBuilder<'a> {
    registry: &'a Registry,
    peer_engine: [u8; 16],
    locals: Numbered<u64>,
    remotes: Numbered<([u8; 16], u64)>,
    request: Request,
    /// The last item's region: consecutive items of one region are decoded once.
    last: Option<(FifoItem, Access, u16)>,
}

impl<'a> RequestBuilder<'a> {
    /// For `n` items that belong to the engine with the given id.
    ///
    /// # Errors
    /// `InvalidArgument` for too many, `Resource` when memory is short.
    pub(crate) fn new(n: usize, registry: &'a Registry, peer_engine: [u8; 16], pool: Option<&mut SegmentPool>) -> Result<Self> {
        check_count(n)?;
        let (segments, remote) = match pool {
            Some(pool) if n >= MANY => (pool.list(n)?, pool.wire(n)),
            _ => (Vec::with_capacity(n), WireSegments::default()),
        };
        let request = Request { segments, uses: Vec::new(), remote, remote_regions: Vec::new(), total: 0, pairs: Vec::new() };
        Ok(RequestBuilder { registry, peer_engine, locals: Numbered::new(), remotes: Numbered::new(), request, last: None })
    }

    /// Adds all items.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub(crate) fn build<B: Borrow<FifoItem>>(mut self, items: impl Iterator<Item = (LocalSegment, B)>) -> Result<Built> {
        for (local, item) in items {
            if let Some(refused) = self.add(local, item.borrow())? {
                return Ok(Built::Refused(refused));
            }
        }
        Ok(Built::Request(self.request))
    }

    /// Adds one item; returns an error value if the peer would refuse it.
    fn add(&mut self, local: LocalSegment, item: &FifoItem) -> Result<Option<Error>> {
        let len = local.len as u64;
        let RequestBuilder { request, registry, .. } = self;
        let region = self.locals.index(local.mr, || {
            request.uses.push(registry.local(local.mr)?);
            Ok(())
        })?;
        let used = &request.uses[usize::from(region)];
        used.check(local.addr as u64, len)?;
        let place = used.place;
        let (access, remote_region) = match self.last {
            Some((known, access, region)) if known.same_region(item) => (access, region),
            _ => match self.remote(item)? {
                Ok(known) => known,
                Err(refused) => return Ok(Some(refused)),
            },
        };
        if item.addr.checked_add(len).is_none() {
            return Ok(Some(err!(RemoteAccess, "[{:#x}, +{len}) wraps around", item.addr)));
        }
        self.push(Segment { addr: local.addr as u64, len, region, place, peer: access.place }, item.addr, remote_region)?;
        Ok(None)
    }

    /// Decodes an item's region.
    fn remote(&mut self, item: &FifoItem) -> Result<std::result::Result<(Access, u16), Error>> {
        let access = item.access()?;
        if access.engine != self.peer_engine {
            return Ok(Err(err!(
                RemoteAccess,
                "the FIFO item of region {} belongs to another engine than this peer (has it restarted?)",
                access.region
            )));
        }
        let regions = &mut self.request.remote_regions;
        let region = self.remotes.index((access.token, access.region), || {
            regions.push(WireRegion { id: access.region, token: access.token });
            Ok(())
        })?;
        self.last = Some((*item, access, region));
        Ok(Ok((access, region)))
    }

    /// Appends a segment, split into parts that fit the wire format.
    fn push(&mut self, segment: Segment, remote_addr: u64, remote_region: u16) -> Result<()> {
        let request = &mut self.request;
        let pair = (segment.place, segment.peer);
        if segment.len > 0 && !request.pairs.contains(&pair) {
            request.pairs.push(pair);
        }
        request.total += segment.len;
        let mut at = 0;
        while at < segment.len {
            let len = (segment.len - at).min(MAX_SEGMENT_BYTES);
            if request.segments.len() == MAX_SEGMENTS {
                bail!(InvalidArgument, "more than {MAX_SEGMENTS} segments of at most 1 GiB");
            }
            request.segments.push(Segment { addr: segment.addr + at, len, ..segment });
            request.remote.push(WireSegment {
                addr: remote_addr + at,
                len: len as u32,
                region: remote_region,
                initiator: segment.place,
                owner: segment.peer,
            });
            at += len;
        }
        Ok(())
    }
}

/// Most pairs of regions in a direct transfer.
const MAX_PAIRINGS: usize = 4096;
/// Longer blocks are handed out in parts.
pub(crate) const MAX_BLOCK: u64 = 256 << 20;

/// The ranges that blocks use, here and at the peer.
#[derive(Clone, Copy)]
struct Taken {
    near: (u64, u64),
    far: (u64, u64),
}

impl Taken {
    const NOTHING: Taken = Taken { near: (u64::MAX, 0), far: (u64::MAX, 0) };
}

/// Checks all items without copying them, for a transfer that may go directly. `None` if anything is wrong, empty or unusual;
/// then [`RequestBuilder`] reports it.
pub(crate) fn sketch<B: Borrow<FifoItem>>(
    items: impl Iterator<Item = (LocalSegment, B)>,
    registry: &Registry,
    peer_engine: [u8; 16],
) -> Option<(Sketch, Known)> {
    let mut sketching = Sketching::new(registry, peer_engine);
    let (mut mr, mut last) = (0, FifoItem::EMPTY);
    // Kept in registers as long as the regions stay the same.
    let (mut taken, mut total, mut count, mut wraps) = (Taken::NOTHING, 0u64, 0, false);
    for (local, item) in items {
        let item = item.borrow();
        let (addr, len) = (local.addr as u64, local.len as u64);
        // Moves nothing, but must be checked.
        if len == 0 {
            return None;
        }
        if local.mr != mr || !last.same_region(item) || count == 0 {
            if count > 0 {
                sketching.note(mr, &last, taken.near, taken.far)?;
            }
            (mr, last, taken) = (local.mr, *item, Taken::NOTHING);
        }
        let ((end, over), (far_end, far_over)) = (addr.overflowing_add(len), item.addr.overflowing_add(len));
        wraps |= over | far_over;
        total = total.saturating_add(len);
        count += 1;
        taken.near = (taken.near.0.min(addr), taken.near.1.max(end));
        taken.far = (taken.far.0.min(item.addr), taken.far.1.max(far_end));
    }
    if wraps || count == 0 {
        return None;
    }
    sketching.note(mr, &last, taken.near, taken.far)?;
    let known = std::mem::take(&mut sketching.known);
    Some((sketching.finish(total, count)?, known))
}

/// Collects the pairings of a sketch.
pub(crate) struct Sketching<'a> {
    registry: &'a Registry,
    peer_engine: [u8; 16],
    locals: Numbered<u64>,
    uses: Vec<RegionUse>,
    pairings: Vec<Pairing>,
    known: Known,
}

impl<'a> Sketching<'a> {
    pub(crate) fn new(registry: &'a Registry, peer_engine: [u8; 16]) -> Self {
        let known = Known::default();
        Sketching { registry, peer_engine, locals: Numbered::new(), uses: Vec::new(), pairings: Vec::new(), known }
    }

    /// Extends the ranges of a pairing; returns its index, or `None` where the regions cannot be paired.
    pub(crate) fn note(&mut self, mr: u64, item: &FifoItem, near: (u64, u64), far: (u64, u64)) -> Option<usize> {
        let at = self.pairing(mr, item)?;
        let pairing = self.pairings.get_mut(at)?;
        pairing.near = (pairing.near.0.min(near.0), pairing.near.1.max(near.1));
        pairing.far = (pairing.far.0.min(far.0), pairing.far.1.max(far.1));
        Some(at)
    }

    /// The sketch, if all blocks lie inside the local regions.
    pub(crate) fn finish(self, total: u64, count: usize) -> Option<Sketch> {
        let Sketching { uses, pairings, .. } = self;
        let inside = |p: &Pairing| uses[usize::from(p.local)].check(p.near.0, p.near.1 - p.near.0).is_ok();
        pairings.iter().all(inside).then(|| Sketch { pairings, hold: Hold::new(uses), total, count })
    }

    /// The index of an item's pairing; `None` where the regions cannot be paired.
    fn pairing(&mut self, mr: u64, item: &FifoItem) -> Option<usize> {
        if let Some(at) = self.known.find(mr, item) {
            return Some(at);
        }
        let access = item.access().ok().filter(|access| access.engine == self.peer_engine)?;
        let Sketching { locals, uses, registry, .. } = self;
        let index = locals.index(mr, || {
            uses.push(registry.local(mr)?);
            Ok(())
        });
        let (Ok(local), true) = (index, self.pairings.len() < MAX_PAIRINGS) else { return None };
        let Taken { near, far } = Taken::NOTHING;
        let here = self.uses.get(usize::from(local))?.place;
        self.pairings.push(Pairing { local, here, region: access.region, token: access.token, there: access.place, near, far });
        self.known.add(mr, item).ok()
    }
}

/// Maps items to their pairings.
#[derive(Default)]
pub(crate) struct Known {
    list: Vec<(u64, FifoItem)>,
    /// By the two region ids, once there are several entries; items of the same region may still differ.
    all: Map<(u64, u64), usize>,
}

impl Known {
    pub(crate) fn find(&self, mr: u64, item: &FifoItem) -> Option<usize> {
        if let [(only, known)] = &self.list[..] {
            return (*only == mr && known.same_region(item)).then_some(0);
        }
        let &at = self.all.get(&(mr, item.idx))?;
        // A different item of the same region becomes another pairing, which the peer's grant then does not match.
        self.list.get(at).filter(|(_, known)| known.same_region(item)).map(|_| at)
    }

    /// Adds an item; returns its index.
    pub(crate) fn add(&mut self, mr: u64, item: &FifoItem) -> std::result::Result<usize, TryReserveError> {
        let at = self.list.len();
        self.list.try_reserve_exact(if at == 0 { 1 } else { at })?;
        if at > 0 {
            self.all.try_reserve(2)?;
        }
        if let [(first, known)] = &self.list[..] {
            self.all.insert((*first, known.idx), 0);
        }
        if at > 0 {
            self.all.insert((mr, item.idx), at);
        }
        self.list.push((mr, *item));
        Ok(at)
    }
}

/// Hands out the blocks of items that [`sketch`] has checked.
pub(crate) struct Feed<I> {
    items: I,
    known: Known,
    way: Way,
    /// A block that was read but not handed out, with its pairing.
    held: Option<(usize, Piece)>,
    /// Blocks not read yet.
    left: usize,
}

impl<B: Borrow<FifoItem>, I: Iterator<Item = (LocalSegment, B)>> Feed<I> {
    pub(crate) fn new(items: I, known: Known, way: Way, count: usize) -> Feed<I> {
        Feed { items, known, way, held: None, left: count }
    }

    /// The next block and its pairing.
    fn next(&mut self) -> Option<(usize, Piece)> {
        if let Some(held) = self.held.take() {
            return Some(held);
        }
        let (local, item) = self.items.next()?;
        self.left = self.left.saturating_sub(1);
        Some((self.known.find(local.mr, item.borrow())?, block(self.way, &local, item.borrow())))
    }
}

#[inline]
fn block(way: Way, local: &LocalSegment, item: &FifoItem) -> Piece {
    let (near, far, len) = (local.addr as u64, item.addr, local.len as u64);
    match way {
        Way::In => Piece { src: far, dst: near, len },
        Way::Out => Piece { src: near, dst: far, len },
    }
}

impl<B: Borrow<FifoItem>, I: Iterator<Item = (LocalSegment, B)>> Blocks for Feed<I> {
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        let (at, mut first) = self.next()?;
        if first.len > MAX_BLOCK {
            let (src, dst, len) = (first.src + MAX_BLOCK, first.dst + MAX_BLOCK, first.len - MAX_BLOCK);
            self.held = Some((at, Piece { src, dst, len }));
            first.len = MAX_BLOCK;
        }
        out.reserve(most.min(self.left + 1));
        out.push(first);
        if self.held.is_some() {
            return Some(at);
        }
        let Some((mr, known)) = self.known.list.get(at) else { return Some(at) };
        let (way, mut sum, mut taken) = (self.way, first.len, 0);
        let mut other = None;
        while taken + 1 < most && sum < bytes {
            let Some((local, item)) = self.items.next() else { break };
            taken += 1;
            let piece = block(way, &local, item.borrow());
            if local.mr != *mr || !known.same_region(item.borrow()) || piece.len > MAX_BLOCK {
                other = self.known.find(local.mr, item.borrow()).map(|at| (at, piece));
                break;
            }
            sum += piece.len;
            out.push(piece);
        }
        self.left = self.left.saturating_sub(taken);
        self.held = other;
        Some(at)
    }

    fn is_done(&self) -> bool {
        self.left == 0 && self.held.is_none()
    }
}

/// # Errors
/// `InvalidArgument` for more segments than a transfer may have.
pub(crate) fn check_count(n: usize) -> Result<()> {
    if n > MAX_SEGMENTS {
        bail!(InvalidArgument, "{n} segments, at most {MAX_SEGMENTS}");
    }
    Ok(())
}

/// The segments of a two-sided message; the peer's places are unknown.
///
/// # Errors
/// `NotFound`, `InvalidArgument`.
pub(crate) fn message(
    items: impl ExactSizeIterator<Item = LocalSegment>,
    registry: &Registry,
) -> Result<(Vec<Segment>, Vec<RegionUse>)> {
    check_count(items.len())?;
    let mut locals = Numbered::new();
    let (mut segments, mut uses, mut total) = (Vec::with_capacity(items.len()), Vec::new(), 0u64);
    for local in items {
        let region = locals.index(local.mr, || {
            uses.push(registry.local(local.mr)?);
            Ok(())
        })?;
        let used: &RegionUse = &uses[usize::from(region)];
        used.check(local.addr as u64, local.len as u64)?;
        if local.len > 0 {
            let (addr, len) = (local.addr as u64, local.len as u64);
            // Segments may overlap, so their sum may exceed the address space.
            total = match total.checked_add(len) {
                Some(sum) => sum,
                None => bail!(InvalidArgument, "a message of more than {} bytes", u64::MAX),
            };
            segments.push(Segment { addr, len, region, place: used.place, peer: Place::HOST });
        }
    }
    Ok((segments, uses))
}

/// Numbers distinct keys in order of appearance; fast when the same key repeats.
struct Numbered<K> {
    last: Option<(K, u16)>,
    count: usize,
    /// All keys, once there are two.
    all: Option<Map<K, u16>>,
}

impl<K: Copy + Eq + std::hash::Hash> Numbered<K> {
    fn new() -> Self {
        Numbered { last: None, count: 0, all: None }
    }

    fn index(&mut self, key: K, add: impl FnOnce() -> Result<()>) -> Result<u16> {
        if let Some((last, index)) = self.last {
            if last == key {
                return Ok(index);
            }
        }
        if let (Some(first), None) = (self.last, &self.all) {
            self.all = Some(Map::from_iter([first]));
        }
        let index = match self.all.as_ref().and_then(|all| all.get(&key)) {
            Some(&index) => index,
            None => {
                if self.count == MAX_REGIONS {
                    bail!(InvalidArgument, "more than {MAX_REGIONS} regions in one transfer");
                }
                add()?;
                let index = self.count as u16;
                self.count += 1;
                if let Some(all) = &mut self.all {
                    all.insert(key, index);
                }
                index
            }
        };
        self.last = Some((key, index));
        Ok(index)
    }
}

#[cfg(test)]
pub(crate) mod tests;
