use super::*;
use crate::types::RemoteAccess;
use proptest::prelude::*;
use std::time::Instant;

pub(in super::super) const ENGINE: [u8; 16] = [3; 16];

pub(in super::super) fn item(region: u64, addr: u64) -> FifoItem {
    let access = Access { region, token: [region as u8; 16], engine: ENGINE, place: Place::gpu(region as u8 % 2) };
    FifoItem::new(addr, 0, &access)
}

/// Two local regions of 1 MiB, at 1 MiB and at 8 MiB.
pub(in super::super) fn registry() -> (Registry, [u64; 2]) {
    let registry = Registry::new();
    let add = |addr| registry.add(addr, 1 << 20, Place::HOST, RemoteAccess::ALL).unwrap();
    let ids = [add(1 << 20), add(8 << 20)];
    (registry, ids)
}

fn fed<I: Iterator<Item = (LocalSegment, FifoItem)>>(mut feed: Feed<I>, most: usize) -> Vec<(usize, Piece)> {
    let (mut all, mut out) = (Vec::new(), Vec::new());
    while let Some(at) = feed.fill(most, 1 << 30, &mut out) {
        assert!(out.len() <= most && !out.is_empty());
        all.extend(out.drain(..).map(|piece| (at, piece)));
    }
    assert!(feed.is_done() && out.is_empty());
    all
}

proptest! {
    /// Whatever the order of regions: each block is handed out once, in order, with its own pairing, which contains it.
    #[test]
    fn a_feed_is_the_list(
        blocks in proptest::collection::vec((0usize..2, 0u64..3, 0u64..1000, 1usize..1000), 1..100), most in 1usize..40, read in any::<bool>(),
    ) {
        let (registry, ids) = registry();
        let items: Vec<(LocalSegment, FifoItem)> = blocks.iter().map(|&(mine, region, at, len)| {
            let addr = [1 << 20, 8 << 20][mine] + at as usize * 7;
            (LocalSegment { mr: ids[mine], addr, len }, item(region + 1, 5000 + at * 3))
        }).collect();
        let total: u64 = items.iter().map(|(l, _)| l.len as u64).sum();
        let sketch = sketch(items.iter().copied(), &registry, ENGINE);
        let (sketch, known) = sketch.unwrap();
        let way = if read { Way::In } else { Way::Out };
        let got = fed(Feed::new(items.iter().copied(), known, way, sketch.count), most);
        prop_assert_eq!((sketch.total, sketch.count, got.len()), (total, items.len(), items.len()));
        for ((at, piece), (local, item)) in got.into_iter().zip(&items) {
            let pairing = sketch.pairings[at];
            let (near, far) = if read { (piece.dst, piece.src) } else { (piece.src, piece.dst) };
            prop_assert_eq!((near, far, piece.len), (local.addr as u64, item.addr, local.len as u64));
            prop_assert_eq!((pairing.region, pairing.token), (item.idx, [item.idx as u8; 16]));
            prop_assert!(pairing.near.0 <= near && near + piece.len <= pairing.near.1);
            prop_assert!(pairing.far.0 <= far && far + piece.len <= pairing.far.1);
        }
    }
}

/// Lists that cannot be sketched, over the first region of [`registry`].
pub(in super::super) fn wrong(mr: u64) -> Vec<Vec<(LocalSegment, FifoItem)>> {
    let local = |addr, len| LocalSegment { mr, addr, len };
    let good = (local(1 << 20, 16), item(1, 100));
    let foreign = FifoItem::new(100, 0, &Access { region: 1, token: [1; 16], engine: [4; 16], place: Place::HOST });
    let bad = [
        (local((1 << 20) - 1, 16), good.1),
        (local(2 << 20, 1), good.1),
        (local(usize::MAX - 3, 16), good.1),
        (LocalSegment { mr: 99, ..good.0 }, good.1),
        // Moves nothing, and names no region.
        (LocalSegment { mr: 99, len: 0, ..good.0 }, good.1),
        (good.0, foreign),
        (good.0, item(1, u64::MAX - 3)),
        (good.0, FifoItem { rid: 0, ..good.1 }),
    ];
    let mut lists: Vec<_> = bad.into_iter().flat_map(|bad| [vec![bad], vec![good, bad], vec![bad, good]]).collect();
    // Nothing to move.
    lists.push(vec![(local(1 << 20, 0), good.1)]);
    lists
}

#[test]
fn invalid_segments_are_left_to_the_builder() {
    let (registry, [mr, _]) = registry();
    for list in wrong(mr) {
        assert!(sketch(list.iter().copied(), &registry, ENGINE).is_none(), "{list:?}");
    }
}

#[test]
fn long_blocks_are_handed_out_in_parts() {
    let registry = Registry::new();
    let mr = registry.add(1 << 20, 1 << 40, Place::gpu(0), RemoteAccess::ALL).unwrap();
    let list = [(LocalSegment { mr, addr: 1 << 20, len: (5 << 28) + 7 }, item(1, 100))];
    let (sketch, known) = sketch(list.into_iter(), &registry, ENGINE).unwrap();
    let got = fed(Feed::new(list.into_iter(), known, Way::In, sketch.count), 100);
    assert_eq!(got.len(), 6);
    let mut at = 0;
    for (_, piece) in got {
        assert_eq!((piece.src, piece.dst), (100 + at, (1 << 20) + at));
        assert!(piece.len <= MAX_BLOCK);
        at += piece.len;
    }
    assert_eq!(at, (5 << 28) + 7);
}

/// Cost of checking a block and handing it out; UCCL_TEST_BENCH=1 runs it.
#[test]
fn cost_of_a_block() {
    if !crate::benchmarks::wanted("cost_of_a_block") {
        return;
    }
    const COUNT: usize = 16_384;
    let registry = Registry::new();
    let mr = registry.add(1 << 20, 1 << 30, Place::gpu(0), RemoteAccess::ALL).unwrap();
    let (mrs, lens) = (vec![mr; COUNT], vec![4096usize; COUNT]);
    let addrs: Vec<usize> = (0..COUNT).map(|i| (1 << 20) + i * 7919 % COUNT * 4096).collect();
    let items: Vec<FifoItem> = (0..COUNT as u64).map(|i| item(1, i * 4096)).collect();
    let list = || (0..COUNT).map(|i| (LocalSegment { mr: mrs[i], addr: addrs[i], len: lens[i] }, &items[i]));
    let (mut looks, mut feeds, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..200 {
        let begin = Instant::now();
        let (sketch, known) = sketch(list(), &registry, ENGINE).unwrap();
        looks.push(begin.elapsed().as_nanos() as f64 / COUNT as f64);
        let begin = Instant::now();
        let mut feed = Feed::new(list(), known, Way::In, sketch.count);
        while feed.fill(1024, 1 << 30, &mut out).is_some() {
            std::hint::black_box(&out);
            out.clear();
        }
        feeds.push(begin.elapsed().as_nanos() as f64 / COUNT as f64);
    }
    for (what, times) in [("look", looks), ("feed", feeds)] {
        crate::benchmarks::line_of_blocks(what, times);
    }
}

#[test]
fn a_fill_ends_by_blocks_and_by_bytes() {
    let (registry, ids) = registry();
    let items: Vec<_> =
        (0..10).map(|i| (LocalSegment { mr: ids[0], addr: (1 << 20) + i * 60, len: 60 }, item(1, i as u64 * 60))).collect();
    let fills = |most: usize, bytes: u64| {
        let (sketch, known) = sketch(items.iter().copied(), &registry, ENGINE).unwrap();
        let mut feed = Feed::new(items.iter().copied(), known, Way::Out, sketch.count);
        let mut out = Vec::new();
        let mut sizes = Vec::new();
        while feed.fill(most, bytes, &mut out).is_some() {
            sizes.push(out.drain(..).count());
        }
        sizes
    };
    assert_eq!(fills(100, 1 << 30), [10]);
    assert_eq!(fills(4, 1 << 30), [4, 4, 2]);
    assert_eq!(fills(100, 100), [2; 5], "the block that reaches the limit is the last");
    assert_eq!(fills(100, 1), [1; 10]);
}
