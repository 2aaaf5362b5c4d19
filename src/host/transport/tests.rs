//! Direct transfers of host memory between both ends of a link in this process.

use super::super::link::tests::{linked, staging};
use super::super::memory::host::COPIED;
use super::super::ring::Head;
use super::staged_tests::{pairing, route, run, same, start, End, Memory};
use super::*;
use crate::direct::Blocks;
use crate::status::ErrorKind;
use crate::types::{Piece, Span};
use std::time::Duration;

const HOST: Place = Place::HOST;
const LIMIT: Duration = Duration::from_secs(60);

fn ends() -> (End, End) {
    let (a, b) = linked([0, 0]);
    (End::new(a), End::new(b))
}

/// Source and destination of a transfer, as `here` and `there`.
fn two(way: Way, len: usize) -> (Memory, Memory) {
    match way {
        Way::Out => (Memory::numbered(1, HOST, len), Memory::new(2, HOST, len, 0)),
        Way::In => (Memory::new(1, HOST, len, 0), Memory::numbered(2, HOST, len)),
    }
}

/// Ends of which the second has granted `there`.
fn granted(way: Way, here: &Memory, there: &Memory) -> (End, End) {
    let (mut a, mut b) = ends();
    b.register(there);
    assert_eq!(route(&mut a, &mut b, way, here, there), Route::Direct);
    (a, b)
}

#[test]
fn blocks_of_all_sizes_arrive_either_way() {
    for (len, block) in [(1, 1), (4096, 4096), (64 << 10, 64), (1_000_001, 1_000_001), (3 << 20, 512), (40 << 20, 4096)] {
        for way in [Way::In, Way::Out] {
            let (here, there) = two(way, len / block * block);
            let (mut a, mut b) = granted(way, &here, &there);
            for id in [5, 6] {
                start(&mut a, way, id, &here, &there, block as u64).unwrap();
                let total = here.bytes.len() as u64;
                assert_eq!(run(&mut a, &mut b, 1).unwrap(), (total, vec![(id, true)]), "{len} {block} {way:?}");
                assert!(same(&here, &there, block) && !here.region.in_use() && !there.region.in_use());
            }
            let (sent, received) = (a.host.stats(false).sent_bytes, a.host.stats(false).received_bytes);
            let both = 2 * here.bytes.len() as u64;
            assert_eq!((sent, received), if way == Way::In { (0, both) } else { (both, 0) });
        }
    }
}

/// Simulated: GPU memory that another process can map.
fn shareable(id: u64, fill: u8, len: usize) -> Memory {
    // SAFETY: a terminated name; a new mapping that stays until the test ends.
    let at = unsafe {
        let fd = libc::memfd_create(c"GPU".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0 && libc::ftruncate(fd, len as libc::off_t) == 0);
        let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0);
        assert!(at != libc::MAP_FAILED);
        at.cast::<u8>().write_bytes(fill, len);
        at as u64
    };
    let span = Span { id, addr: at, len: len as u64 };
    Memory { bytes: vec![0; len], region: Arc::new(Region::new(span, [id as u8; 16], Place::gpu(0), RemoteAccess::ALL)) }
}

#[test]
fn bytes_between_gpus_that_nvlink_joins_count_apart() {
    const LEN: usize = 1 << 20;
    for joined in [false, true] {
        for way in [Way::In, Way::Out] {
            let (mut a, mut b) = linked([1, 1]);
            let pairs = if joined { vec![(Place::gpu(0), Place::gpu(0))] } else { Vec::new() };
            assert!(a.nvlink.is_empty() && b.nvlink.is_empty(), "emulated GPUs have no NVLink");
            (a.nvlink, b.nvlink) = (pairs.clone(), pairs);
            let (mut a, mut b) = (End::new(a), End::new(b));
            let (here, there) = (shareable(1, 3, LEN), shareable(2, 4, LEN));
            b.register(&there);
            assert_eq!(route(&mut a, &mut b, way, &here, &there), Route::Direct);
            start(&mut a, way, 5, &here, &there, 4096).unwrap();
            assert_eq!(run(&mut a, &mut b, 1).unwrap(), (LEN as u64, vec![(5, true)]));
            let of = |end: &End| {
                let stats = end.host.stats(false);
                (stats.sent_bytes + stats.received_bytes, stats.nvlink_bytes)
            };
            let nvlink = if joined { LEN as u64 } else { 0 };
            assert_eq!(of(&a), (LEN as u64, nvlink), "{way:?}");
            // The peer of a read learns how many bytes were read, and no more.
            assert_eq!(of(&b), (LEN as u64, if way == Way::Out { nvlink } else { 0 }), "{way:?}");
            assert_eq!(a.host.stats(false).plugin, "direct");
            // Host memory beside it does not count.
            let (small, to) = (Memory::numbered(3, HOST, 4096), Memory::new(4, HOST, 4096, 0));
            b.register(&to);
            assert_eq!(route(&mut a, &mut b, Way::Out, &small, &to), Route::Direct);
            start(&mut a, Way::Out, 6, &small, &to, 4096).unwrap();
            run(&mut a, &mut b, 1).unwrap();
            assert_eq!(of(&a), (LEN as u64 + 4096, nvlink));
        }
    }
}

#[test]
fn a_region_is_claimed_once_and_used_as_its_owner_allows() {
    let here = Memory::new(1, HOST, 100, 0);
    let there = Memory::with(2, HOST, vec![7; 100], RemoteAccess::READ);
    let (mut a, mut b) = granted(Way::In, &here, &there);
    let kind = |route: Route| if let Route::Refused(e) = route { Some(e.kind()) } else { None };
    assert_eq!(kind(route(&mut a, &mut b, Way::Out, &here, &there)), Some(ErrorKind::RemoteAccess));
    for far in [(there.region.span.addr - 1, there.region.span.addr), (there.region.span.addr, there.region.span.addr + 101)] {
        let pairing = Pairing { far, ..pairing(&here, &there) };
        let refused = a.host.route(Way::In, &[pairing], &here.hold()).unwrap();
        assert_eq!(kind(refused), Some(ErrorKind::RemoteAccess), "{far:?}");
    }
    let elsewhere = Pairing { there: Place::gpu(0), ..pairing(&here, &there) };
    assert_eq!(a.host.route(Way::In, &[elsewhere], &here.hold()).unwrap(), Route::Channels, "places that are not joined");
    there.region.end();
    assert_eq!(kind(route(&mut a, &mut b, Way::In, &here, &there)), Some(ErrorKind::RemoteAccess));
}

#[test]
fn a_wrong_token_is_refused_and_its_owner_learns_of_it() {
    let (here, there) = two(Way::In, 100);
    let (mut a, mut b) = ends();
    b.register(&there);
    let forged = Pairing { token: [9; 16], ..pairing(&here, &there) };
    assert_eq!(a.host.route(Way::In, &[forged], &here.hold()).unwrap(), Route::Wait);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        a.step(&mut ours).unwrap();
        b.step(&mut theirs).unwrap();
    }
    a.step(&mut ours).unwrap();
    assert_eq!(ours, [Event::Answered]);
    assert!(matches!(&theirs[..], [Event::Denied(e)] if e.kind() == ErrorKind::RemoteAccess), "{theirs:?}");
    assert!(matches!(a.host.route(Way::In, &[forged], &here.hold()), Ok(Route::Refused(_))));
    assert_eq!(route(&mut a, &mut b, Way::In, &here, &there), Route::Direct, "the right one");
}

#[test]
fn a_read_whose_region_ends_before_it_starts_is_refused_alone() {
    let (here, there) = two(Way::In, 100);
    let (mut a, mut b) = granted(Way::In, &here, &there);
    there.region.end();
    start(&mut a, Way::In, 5, &here, &there, 100).unwrap();
    assert_eq!(run(&mut a, &mut b, 1).unwrap(), (0, vec![(5, false)]));
    start(&mut a, Way::Out, 6, &here, &there, 100).unwrap();
    assert_eq!(run(&mut a, &mut b, 1).unwrap(), (0, vec![(6, false)]));
    assert!(!here.region.in_use() && !there.region.in_use());
}

#[test]
fn small_writes_end_before_a_large_one_and_never_run_out_of_places() {
    const SMALL: u64 = 3000;
    let (here, there) = two(Way::Out, 600 << 20);
    let (small, to) = (Memory::numbered(3, HOST, 4096), Memory::new(4, HOST, 4096, 0));
    let (mut a, mut b) = granted(Way::Out, &here, &there);
    b.register(&to);
    assert_eq!(route(&mut a, &mut b, Way::Out, &small, &to), Route::Direct);
    start(&mut a, Way::Out, 1, &here, &there, 4 << 20).unwrap();
    (2..2 + SMALL).for_each(|id| start(&mut a, Way::Out, id, &small, &to, 4096).unwrap());
    let (_, how) = run(&mut a, &mut b, SMALL as usize + 1).unwrap();
    assert!(how.iter().all(|&(_, done)| done) && same(&here, &there, 4 << 20) && same(&small, &to, 4096));
    let large = how.iter().position(|&(id, _)| id == 1).unwrap();
    assert!(large > 1000, "{large} small writes ended before the large one");
    assert!(!here.region.in_use() && !to.region.in_use() && !a.busy() && !b.busy());
}

/// The thread that starts a large transfer copies nothing, whatever the blocks are; a small read is in place when the call returns.
#[test]
fn only_a_small_transfer_is_copied_by_the_thread_that_starts_it() {
    let shapes = [
        (1, 1, true),
        (4096, 4096, true),
        (128 << 10, 128 << 10, true),
        ((128 << 10) + 1, (128 << 10) + 1, false),
        (160 << 10, 64, false),
        (1 << 20, 1 << 20, false),
        // Of these the first copies are short.
        (2 << 20, 64, false),
        // And of this the last one.
        ((4 << 20) + 4096, 4096, false),
        (16 << 20, 16 << 20, false),
    ];
    // What is read directly, and what is staged before it is written: other writes are copied by the other engine.
    for (way, staged) in [(Way::In, false), (Way::Out, true)] {
        for (len, block, small) in shapes {
            let (a, b) = if staged { staging([u64::MAX; 2]) } else { linked([0, 0]) };
            let (mut a, mut b) = (End::new(a), End::new(b));
            let (here, there) = two(way, len);
            b.register(&there);
            assert_eq!(route(&mut a, &mut b, way, &here, &there), Route::Direct);
            let before = COPIED.get();
            start(&mut a, way, 5, &here, &there, block as u64).unwrap();
            let copied = COPIED.get() - before;
            assert_eq!(copied, if small { len as u64 } else { 0 }, "{len} bytes in blocks of {block}, staged: {staged}");
            assert_eq!(run(&mut a, &mut b, 1).unwrap(), (len as u64, vec![(5, true)]));
            assert!(same(&here, &there, block));
        }
    }
}

/// Blocks that lie side by side.
struct One(Option<Piece>);

impl Blocks for One {
    fn fill(&mut self, _most: usize, _bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        out.push(self.0.take()?);
        Some(0)
    }
    fn is_done(&self) -> bool {
        self.0.is_none()
    }
}

/// Sends `len` bytes of `from` into a landing.
fn send(a: &mut End, from: &Memory, landing: Landing, len: u64) {
    let (src, key) = (from.region.span.addr, Key { id: 9, mine: true });
    let far = (landing.addr, landing.addr + len);
    let pairing = Pairing { local: 0, here: HOST, region: 0, token: [0; 16], there: HOST, near: (src, src + len), far };
    let mut blocks = One(Some(Piece { src, dst: landing.addr, len }));
    let (hold, pairings) = (from.hold(), [pairing]);
    let transfer = &mut Start {
        key,
        way: Way::Out,
        total: len,
        count: 1,
        pairings: &pairings,
        hold: &hold,
        blocks: &mut blocks,
        now: Instant::now(),
    };
    a.host.start(transfer, Some(landing)).unwrap();
}

#[test]
fn a_message_lands_whole_or_ends_the_connection() {
    let message = Key { id: 9, mine: false };
    for (len, whole) in [(100, true), (99, false), (101, false)] {
        let (from, to) = (Memory::numbered(1, HOST, 200), Memory::new(2, HOST, 200, 0xEE));
        let (mut a, mut b) = ends();
        assert!(a.host.can_send(HOST, &from.hold()) && !a.host.can_send(Place::gpu(0), &from.hold()));
        let range = (to.region.span.addr + 50, 100);
        let landing = b.host.land(message, &RegionUse::new(&to.region), range, HOST).unwrap();
        assert!(to.region.in_use() && b.host.land(message, &RegionUse::new(&to.region), range, Place::gpu(0)).is_none());
        send(&mut a, &from, landing, len);
        let (mut ours, mut theirs, begin) = (Vec::new(), Vec::new(), Instant::now());
        let result = loop {
            a.step(&mut ours).unwrap();
            if let Err(e) = b.step(&mut theirs) {
                break Err(e);
            }
            if theirs.contains(&Event::Ended(message, true)) && ours.contains(&Event::Ended(Key { id: 9, mine: true }, true)) {
                break Ok(());
            }
            assert!(begin.elapsed() < LIMIT, "{ours:?} {theirs:?}");
        };
        assert_eq!(result.as_ref().err().map(Error::kind), (!whole).then_some(ErrorKind::Protocol), "{len}");
        let outside = to.seen()[..50].iter().chain(&to.seen()[150..]);
        assert!(outside.into_iter().all(|&byte| byte == 0xEE));
        if whole {
            assert!(to.seen()[50..150] == from.seen()[..100] && !to.region.in_use() && !from.region.in_use());
            assert!(!b.host.withdraw(message), "it is over");
        }
    }
}

#[test]
fn a_landing_is_taken_back_before_it_is_written() {
    let to = Memory::new(2, HOST, 100, 0);
    let (_a, mut b) = ends();
    let message = Key { id: 9, mine: false };
    b.host.land(message, &RegionUse::new(&to.region), (to.region.span.addr, 100), HOST).unwrap();
    assert!(b.host.withdraw(message) && !b.host.withdraw(message) && !to.region.in_use());
}

#[test]
fn a_lying_ring_writes_nothing_outside_of_what_is_granted() {
    let (here, there) = two(Way::Out, 4096);
    let (src, dst) = (here.region.span.addr, there.region.span.addr);
    let block = |src, dst, len| Piece { src, dst, len };
    let head = |a: &mut End, last| {
        let Claim::Granted(granted) = a.host.leases.claim(2, there.region.token, HOST) else { panic!("a grant") };
        let order = a.host.writes.out.begin().unwrap();
        Head { order, slot: granted.slot, generation: granted.generation, export: 0, last, bulk: false }
    };
    let lies: [&dyn Fn(Head) -> (Head, Vec<Piece>); 6] = [
        &|head| (head, vec![block(src, dst - 1, 10)]),
        &|head| (head, vec![block(src, dst, 10), block(src, dst + 4090, 7)]),
        &|head| (head, vec![block(src, u64::MAX - 3, 10)]),
        &|head| (head, vec![block(src, dst, 0)]),
        &|head| (Head { export: 7, ..head }, vec![block(src, dst, 10)]),
        &|head| (Head { order: head.order + 5000, ..head }, vec![block(src, dst, 10)]),
    ];
    for (i, lie) in lies.iter().enumerate() {
        let (mut a, mut b) = granted(Way::Out, &here, &there);
        let (announced, blocks) = lie(head(&mut a, true));
        a.host.writes.out.room(blocks.len(), false).unwrap();
        a.host.writes.out.announce(announced, &blocks).unwrap();
        let error = (0..100).find_map(|_| b.step(&mut Vec::new()).err());
        // An order of a number far ahead is no violation while its place is free.
        assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol) || i == 5, "lie {i}");
        drop((a, b));
        assert!(i == 5 || there.seen().iter().all(|&byte| byte == 0), "lie {i}");
        assert!(!there.region.in_use() && !here.region.in_use());
    }
}

#[test]
fn a_peer_that_ends_in_mid_transfer_leaves_an_error_and_no_use() {
    for way in [Way::In, Way::Out] {
        let (here, there) = two(way, 200 << 20);
        let (mut a, mut b) = granted(way, &here, &there);
        start(&mut a, way, 5, &here, &there, 4 << 20).unwrap();
        b.step(&mut Vec::new()).unwrap();
        drop(b);
        if way == Way::In {
            let begin = Instant::now();
            let error = loop {
                if let Err(e) = a.step(&mut Vec::new()) {
                    break e;
                }
                assert!(begin.elapsed() < LIMIT);
            };
            assert_eq!(error.kind(), ErrorKind::RemoteDisconnect);
        }
        drop(a);
        assert!(!here.region.in_use() && !there.region.in_use(), "{way:?}");
    }
}
