use super::*;
use crate::engine::request::tests::{item, registry, wrong, ENGINE};
use crate::types::{Place, RemoteAccess};
use proptest::prelude::*;

fn list(items: &[(LocalSegment, FifoItem)]) -> List {
    List::new(items.len(), items.iter().map(|(local, item)| (*local, item))).unwrap()
}

fn fed(mut feed: ListFeed<'_>, most: usize, bytes: u64) -> Vec<(usize, Piece)> {
    let (mut all, mut out) = (Vec::new(), Vec::new());
    while let Some(at) = feed.fill(most, bytes, &mut out) {
        assert!(out.len() <= most && !out.is_empty());
        let (last, before) = out.split_last().unwrap();
        assert!(before.iter().map(|piece| piece.len).sum::<u64>() < bytes && last.len <= MAX_BLOCK);
        all.extend(out.drain(..).map(|piece| (at, piece)));
    }
    assert!(feed.is_done() && out.is_empty());
    all
}

proptest! {
    /// Whatever the order of regions: a list keeps its segments, and each block is handed out once, in order, with its own
    /// pairing, which contains it.
    #[test]
    fn a_list_is_its_segments(
        blocks in proptest::collection::vec((0usize..2, 0u64..3, 0u64..1000, 0usize..1000, any::<bool>()), 1..100),
        most in 1usize..40, bytes in 1u64..20_000, read in any::<bool>(),
    ) {
        let (registry, ids) = registry();
        let items: Vec<(LocalSegment, FifoItem)> = blocks.iter().map(|&(mine, region, at, len, odd)| {
            let addr = [1 << 20, 8 << 20][mine] + at as usize * 7;
            // A different item of the same region.
            let rkey = item(region + 1, 0).rkey + u32::from(odd && at % 5 == 0);
            (LocalSegment { mr: ids[mine], addr, len }, FifoItem { rkey, ..item(region + 1, 5000 + at * 3) })
        }).collect();
        let list = list(&items);
        let (full, empty): (Vec<_>, Vec<_>) = items.iter().copied().partition(|(local, _)| local.len > 0);
        let same = |a: &(LocalSegment, FifoItem), b: &(LocalSegment, FifoItem)| a.0 == b.0 && a.1.addr == b.1.addr && a.1.same_region(&b.1);
        prop_assert_eq!(list.len(), items.len());
        prop_assert!(list.iter().zip(full.iter().chain(&empty)).all(|(a, b)| same(&a, b)) && list.iter().count() == items.len());
        let way = if read { Way::In } else { Way::Out };
        let sketch = list.sketch(way, &registry, ENGINE);
        prop_assert_eq!(sketch.is_some(), empty.is_empty());
        let Some((sketch, feed)) = sketch else { return Ok(()) };
        let got = fed(feed, most, bytes);
        let total: u64 = full.iter().map(|(local, _)| local.len as u64).sum();
        prop_assert_eq!((sketch.total, sketch.count, got.len()), (total, full.len(), full.len()));
        for ((at, piece), (local, item)) in got.into_iter().zip(full) {
            let pairing = sketch.pairings[at];
            let (near, far) = if read { (piece.dst, piece.src) } else { (piece.src, piece.dst) };
            prop_assert_eq!((near, far, piece.len), (local.addr as u64, item.addr, local.len as u64));
            prop_assert_eq!((pairing.region, pairing.token), (item.idx, [item.idx as u8; 16]));
            prop_assert_eq!(pairing.there, item.access().unwrap().place);
            prop_assert!(pairing.near.0 <= near && near + piece.len <= pairing.near.1);
            prop_assert!(pairing.far.0 <= far && far + piece.len <= pairing.far.1);
        }
    }
}

#[test]
fn invalid_segments_are_left_to_the_builder() {
    let (registry, [mr, _]) = registry();
    for segments in wrong(mr) {
        assert!(list(&segments).sketch(Way::In, &registry, ENGINE).is_none(), "{segments:?}");
    }
}

#[test]
fn a_segment_of_zero_bytes_is_checked_too() {
    let (registry, [mr, _]) = registry();
    let local = |mr, len| LocalSegment { mr, addr: 1 << 20, len };
    let segments = [(local(mr, 16), item(1, 100)), (local(u64::MAX, 0), item(1, 100))];
    assert!(list(&segments).sketch(Way::In, &registry, ENGINE).is_none());
    assert!(list(&segments[..1]).sketch(Way::In, &registry, ENGINE).is_some());
}

#[test]
fn a_deregistered_region_is_not_found() {
    let (registry, [mr, _]) = registry();
    let list = list(&[(LocalSegment { mr, addr: 1 << 20, len: 16 }, item(1, 100))]);
    assert!(list.sketch(Way::Out, &registry, ENGINE).is_some());
    registry.retire(mr).unwrap();
    assert!(list.sketch(Way::Out, &registry, ENGINE).is_none());
}

#[test]
fn long_blocks_are_handed_out_in_parts() {
    let registry = Registry::new();
    let mr = registry.add(1 << 20, 1 << 40, Place::gpu(0), RemoteAccess::ALL).unwrap();
    let local = |len| LocalSegment { mr, addr: 1 << 20, len };
    let list = list(&[(local(5), item(1, 7)), (local((5 << 28) + 7), item(1, 100)), (local(9), item(1, 8))]);
    let (_, feed) = list.sketch(Way::In, &registry, ENGINE).unwrap();
    let got = fed(feed, 100, 1 << 30);
    let (first, last) = (got[0].1, got[got.len() - 1].1);
    assert_eq!((got.len(), first.len, last.len), (8, 5, 9));
    let mut at = 0;
    for (_, piece) in &got[1..7] {
        assert_eq!((piece.src, piece.dst), (100 + at, (1 << 20) + at));
        at += piece.len;
    }
    assert_eq!(at, (5 << 28) + 7);
}

/// Cost of starting a list, for each block; UCCL_TEST_BENCH=1 runs it.
#[test]
fn cost_of_a_block() {
    if !crate::benchmarks::wanted("cost_of_a_block") {
        return;
    }
    const COUNT: usize = 16_384;
    let registry = Registry::new();
    let mr = registry.add(1 << 20, 1 << 30, Place::gpu(0), RemoteAccess::ALL).unwrap();
    let local = |i: usize| LocalSegment { mr, addr: (1 << 20) + i * 7919 % COUNT * 4096, len: 4096 };
    let items: Vec<_> = (0..COUNT).map(|i| (local(i), item(1, i as u64 * 4096))).collect();
    let (mut makes, mut feeds, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..200 {
        let begin = std::time::Instant::now();
        let list = list(&items);
        makes.push(begin.elapsed().as_nanos() as f64 / COUNT as f64);
        let begin = std::time::Instant::now();
        let (_, mut feed) = list.sketch(Way::In, &registry, ENGINE).unwrap();
        while feed.fill(512, 1 << 30, &mut out).is_some() {
            std::hint::black_box(&out);
            out.clear();
        }
        feeds.push(begin.elapsed().as_nanos() as f64 / COUNT as f64);
    }
    for (what, times) in [("list", makes), ("list feed", feeds)] {
        crate::benchmarks::line_of_blocks(what, times);
    }
}
