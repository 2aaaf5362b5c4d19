use super::super::tests::{ends, Memory};
use super::super::LocalPath;
use super::*;
use crate::channel::path::{Blocks, Path};
use crate::region::Region;
use crate::status::ErrorKind;
use crate::types::RemoteAccess;
use std::sync::Arc;

const GPU: Place = Place(1);

/// Both ends, as if they were two processes.
fn strangers(gpus: [u8; 2]) -> (LocalPath, LocalPath) {
    let (mut a, mut b) = ends(gpus);
    for end in [&mut a, &mut b] {
        end.unasked.off = false;
        end.shelves = None;
    }
    (a, b)
}

/// Blocks of this many bytes, of `here` and of `there`, in an order of their own on either side.
struct Scattered {
    way: Way,
    here: u64,
    there: u64,
    block: u64,
    count: u64,
    next: u64,
}

impl Blocks for Scattered {
    fn fill(&mut self, most: usize, bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        let n = (most as u64).min(bytes.div_ceil(self.block)).min(self.count - self.next);
        for i in self.next..self.next + n {
            let (near, far) =
                (self.here + i * 7919 % self.count * self.block, self.there + i * 104_729 % self.count * self.block);
            let (src, dst) = if self.way == Way::In { (far, near) } else { (near, far) };
            out.push(Piece { src, dst, len: self.block });
        }
        self.next += n;
        (n > 0).then_some(0)
    }
    fn is_done(&self) -> bool {
        self.next == self.count
    }
}

fn pairing(here: &Memory, there: &Memory) -> Pairing {
    let range = |memory: &Memory| (memory.region.span.addr, memory.region.span.addr + memory.region.span.len);
    let Region { span, token, place, .. } = &*there.region;
    let (region, token, there_place) = (span.id, *token, *place);
    Pairing { local: 0, here: here.region.place, region, token, there: there_place, near: range(here), far: range(there) }
}

/// What `start_direct` says to a transfer of all of both.
fn start(path: &mut LocalPath, way: Way, id: u64, here: &Memory, there: &Memory, block: u64) -> Result<bool> {
    let total = here.bytes.len() as u64;
    let (at, remote) = (here.region.span.addr, there.region.span.addr);
    let mut blocks = Scattered { way, here: at, there: remote, block, count: total / block, next: 0 };
    let (pairings, hold) = ([pairing(here, there)], here.hold());
    let key = Key { id, mine: true };
    path.start_direct(&mut Direct { key, way, total, pairings: &pairings, hold: &hold, blocks: &mut blocks })
}

/// Both go on until this many transfers have ended; bytes that moved, and how each ended.
fn run(a: &mut LocalPath, b: &mut LocalPath, ends: usize) -> Result<(u64, Vec<(u64, bool)>)> {
    let (mut events, mut others) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    let ended = |events: &[Event]| events.iter().filter(|e| matches!(e, Event::Ended(..))).count();
    while ended(&events) < ends {
        a.progress(&mut None, Instant::now(), &mut events)?;
        b.progress(&mut None, Instant::now(), &mut others)?;
        assert!(begin.elapsed() < Duration::from_secs(60), "{events:?}");
    }
    assert!(others.is_empty(), "{others:?}");
    let moved = events.iter().map(|e| if let Event::Moved(_, n) = e { *n } else { 0 }).sum();
    let how = events.iter().filter_map(|e| if let Event::Ended(key, done) = e { Some((key.id, *done)) } else { None });
    Ok((moved, how.collect()))
}

/// Notes go both ways until nothing is left to say.
fn talk(a: &mut LocalPath, b: &mut LocalPath) {
    for _ in 0..10 {
        for end in [&mut *a, &mut *b] {
            end.news.store(true, Ordering::Release);
            end.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        }
    }
}

/// Ends of which the second has granted `there`. Device memory: both are shared as if they were memory files.
fn granted(here: &Memory, there: &Memory) -> (LocalPath, LocalPath) {
    let gpus = if here.region.place.is_device() { [1, 1] } else { [0, 0] };
    let (mut a, mut b) = strangers(gpus);
    b.grant(&RegionUse::new(&there.region), here.region.place);
    talk(&mut a, &mut b);
    (a, b)
}

/// The bytes of both sides are the same in the sequence of the blocks.
fn same(a: &Memory, b: &Memory, block: usize) -> bool {
    let count = a.bytes.len() / block;
    (0..count).all(|i| {
        let (x, y) = (i * 7919 % count * block, i * 104_729 % count * block);
        std::hint::black_box(&a.bytes)[x..x + block] == std::hint::black_box(&b.bytes)[y..y + block]
    })
}

fn numbered(id: u64, place: Place, len: usize) -> Memory {
    let mut memory = Memory::new(id, place, len, 0);
    memory.bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 31 + i / 509) as u8);
    memory
}

#[test]
fn reads_and_orders_of_host_memory_go_without_asking() {
    for (len, block) in [(100, 100), (4096, 16), (1 << 20, 1 << 20), (3 << 20, 256), (64 << 20, 4096)] {
        for way in [Way::In, Way::Out] {
            let (from, to) = (numbered(1, Place::HOST, len), Memory::new(2, Place::HOST, len, 0));
            let (here, there) = if way == Way::In { (&to, &from) } else { (&from, &to) };
            let (mut a, mut b) = granted(here, there);
            assert!(start(&mut a, way, 5, here, there, block).unwrap());
            assert!(there.region.in_use() == (way == Way::In));
            let count = len as u64 / block;
            assert_eq!(run(&mut a, &mut b, 1).unwrap(), (count * block, vec![(5, true)]), "{len} {block} {way:?}");
            assert!(same(here, there, block as usize), "{len} {block} {way:?}");
            assert!(!here.region.in_use() && !there.region.in_use() && !a.unasked.busy() && !b.unasked.busy());
        }
    }
}

/// Whoever orders may sleep or leave it to others to drive until something is rung.
#[test]
fn the_rest_of_an_order_that_does_not_fit_is_asked_for() {
    let (from, to) = (numbered(1, Place::HOST, 8 << 20), Memory::new(2, Place::HOST, 8 << 20, 0));
    let (mut a, mut b) = granted(&from, &to);
    assert!(start(&mut a, Way::Out, 5, &from, &to, 64).unwrap());
    let mut rounds = 0;
    while !a.unasked.unsent.is_empty() {
        a.outbox.listening().set(true);
        let begin = Instant::now();
        while b.unasked.inn.waiting() || !b.unasked.batches.is_empty() {
            b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
            assert!(begin.elapsed() < Duration::from_secs(60));
        }
        assert!(!b.inbox.wakes(), "nobody was rung for what waits for room");
        a.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        rounds += 1;
    }
    assert!(rounds > 1, "all of it fits");
    assert_eq!(run(&mut a, &mut b, 1).unwrap().1, [(5, true)]);
    assert!(same(&from, &to, 64));
}

#[test]
fn many_at_once_end_each() {
    let (from, to) = (numbered(1, Place::HOST, 1 << 20), Memory::new(2, Place::HOST, 1 << 20, 0));
    for way in [Way::In, Way::Out] {
        let (here, there) = if way == Way::In { (&to, &from) } else { (&from, &to) };
        let (mut a, mut b) = granted(here, there);
        let mut ids: Vec<u64> = Vec::new();
        for id in 0..3000 {
            if start(&mut a, way, id, here, there, if id % 100 == 0 { 64 } else { 1 << 18 }).unwrap() {
                ids.push(id);
            }
        }
        // Beyond the window others carry it.
        assert!(if way == Way::In { ids.len() == 3000 } else { ids.len() == WINDOW - 1 }, "{}", ids.len());
        let (_, mut how) = run(&mut a, &mut b, ids.len()).unwrap();
        how.sort_unstable();
        assert_eq!(how, ids.iter().map(|&id| (id, true)).collect::<Vec<_>>());
        assert!(!from.region.in_use() && !to.region.in_use());
    }
}

#[test]
fn nothing_goes_without_a_grant_that_fits() {
    let (here, there) = (numbered(1, Place::HOST, 4096), Memory::new(2, Place::HOST, 4096, 0));
    let (mut a, _b) = strangers([0, 0]);
    assert!(!start(&mut a, Way::In, 1, &here, &there, 64).unwrap() && !start(&mut a, Way::Out, 1, &here, &there, 64).unwrap());
    let (mut a, mut b) = granted(&here, &there);
    let good = pairing(&here, &there);
    let wrong = [
        Pairing { token: [9; 16], ..good },
        Pairing { region: 3, ..good },
        Pairing { far: (good.far.0, good.far.1 + 1), ..good },
        Pairing { far: (good.far.0 - 1, good.far.1), ..good },
        Pairing { there: GPU, ..good },
        Pairing { here: GPU, ..good },
    ];
    for (i, pairing) in wrong.into_iter().enumerate() {
        for way in [Way::In, Way::Out] {
            let mut blocks = Scattered { way, here: good.near.0, there: good.far.0, block: 64, count: 64, next: 0 };
            let (key, hold) = (Key { id: 1, mine: true }, here.hold());
            let (pairings, blocks) = (&[good, pairing], &mut blocks);
            let mut direct = Direct { key, way, total: 4096, pairings, hold: &hold, blocks };
            assert!(!a.start_direct(&mut direct).unwrap(), "{i} {way:?}");
        }
    }
    assert!(!there.region.in_use());
    // What peers may only read is not written, and the other way round.
    for (access, way) in [(RemoteAccess::READ, Way::Out), (RemoteAccess::WRITE, Way::In)] {
        let mut there = Memory::new(7, Place::HOST, 4096, 0);
        let region = Region::new(there.region.span, [0; 16], Place::HOST, access);
        there.region = Arc::new(region);
        b.grant(&RegionUse::new(&there.region), Place::HOST);
        talk(&mut a, &mut b);
        assert!(!start(&mut a, way, 2, &here, &there, 64).unwrap());
        there.region.end();
        Path::forget_region(&mut b, 7);
        talk(&mut a, &mut b);
    }
}

#[test]
fn an_ended_region_is_neither_read_nor_written() {
    for way in [Way::In, Way::Out] {
        let (here, there) = (numbered(1, Place::HOST, 4096), Memory::new(2, Place::HOST, 4096, 0));
        let (mut a, mut b) = granted(&here, &there);
        // An order that is told and not looked at when the region ends is refused; a read that has begun holds the region.
        assert!(start(&mut a, Way::Out, 1, &here, &there, 64).unwrap());
        there.region.end();
        if way == Way::Out {
            Path::forget_region(&mut b, 2);
        }
        assert!(!start(&mut a, Way::In, 2, &here, &there, 64).unwrap());
        assert_eq!(run(&mut a, &mut b, 1).unwrap().1, [(1, false)]);
        assert!(there.holds(0) && !here.region.in_use() && !there.region.in_use());
        Path::forget_region(&mut b, 2);
        talk(&mut a, &mut b);
        assert!(!start(&mut a, way, 3, &here, &there, 64).unwrap());
    }
}

#[test]
fn orders_that_were_not_granted_are_violations_or_refused() {
    let (here, there) = (numbered(1, Place::HOST, 4096), Memory::new(2, Place::HOST, 4096, 0));
    let (src, dst) = (here.region.span.addr, there.region.span.addr);
    let head = Head { order: 1, slot: 0, generation: 1, export: 0, last: true };
    let block = Piece { src, dst, len: 64 };
    let outcome = |heads: &[(Head, Piece)]| -> Result<bool> {
        let (mut a, mut b) = granted(&here, &there);
        for &(head, block) in heads {
            assert!(a.unasked.out.room(1).unwrap() > 0);
            a.unasked.out.tell(head, &[block]).unwrap();
        }
        let begin = Instant::now();
        loop {
            b.progress(&mut None, Instant::now(), &mut Vec::new())?;
            if let Some(done) = a.unasked.out.outcome(1) {
                return Ok(done);
            }
            assert!(begin.elapsed() < Duration::from_secs(60));
        }
    };
    assert_eq!(outcome(&[(head, block)]), Ok(true));
    for refused in [Head { slot: 1, ..head }, Head { slot: u32::MAX, ..head }, Head { generation: 2, ..head }] {
        assert_eq!(outcome(&[(refused, block)]), Ok(false), "{refused:?}");
        let first = Head { last: false, ..head };
        assert_eq!(outcome(&[(first, block), (refused, block)]), Ok(false), "the second record of {refused:?}");
    }
    for (head, block) in [
        (Head { order: 2, ..head }, block),
        (Head { order: 0, ..head }, block),
        (Head { export: 1, ..head }, block),
        (head, Piece { dst: dst + 4033, ..block }),
        (head, Piece { dst: dst - 1, ..block }),
        (head, Piece { len: 0, ..block }),
        (head, Piece { len: u64::MAX, ..block }),
        (head, Piece { src: u64::MAX - 3, ..block }),
    ] {
        let error = outcome(&[(head, block)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{head:?} {block:?}");
    }
    assert!(!there.region.in_use());
}

/// A peer names the whole of a region in each block of a record: what that costs here is known before anything is laid out.
#[test]
fn an_order_of_more_bytes_than_a_record_may_have_is_a_violation() {
    let (here, there) = (Memory::new(1, Place::HOST, 4096, 0), Memory::new(2, Place::HOST, 256 << 20, 0));
    let (src, dst, len) = (here.region.span.addr, there.region.span.addr, there.region.span.len);
    let (mut a, mut b) = granted(&here, &there);
    assert_eq!(a.unasked.out.room(MAX_BLOCKS).unwrap(), MAX_BLOCKS);
    let head = Head { order: 1, slot: 0, generation: 1, export: 0, last: true };
    a.unasked.out.tell(head, &vec![Piece { src, dst, len }; MAX_BLOCKS]).unwrap();
    let error = b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
}

#[test]
fn the_end_of_the_owner_is_an_error_and_frees_the_region() {
    let (here, there) = (Memory::new(1, Place::HOST, 32 << 20, 0), numbered(2, Place::HOST, 32 << 20));
    let (mut a, b) = granted(&here, &there);
    assert!(start(&mut a, Way::In, 1, &here, &there, 4096).unwrap() && there.region.in_use());
    drop(b);
    assert!(!there.region.in_use());
    let begin = Instant::now();
    let error = loop {
        if let Err(e) = a.progress(&mut None, Instant::now(), &mut Vec::new()) {
            break e;
        }
        assert!(begin.elapsed() < Duration::from_secs(60));
    };
    assert_eq!(error.kind(), ErrorKind::RemoteDisconnect);
    drop(a);
    assert!(!here.region.in_use());
}

#[test]
fn the_end_of_the_reader_frees_the_region() {
    let (here, there) = (Memory::new(1, Place::HOST, 32 << 20, 0), numbered(2, Place::HOST, 32 << 20));
    let (mut a, b) = granted(&here, &there);
    assert!(start(&mut a, Way::In, 1, &here, &there, 4096).unwrap() && b.uses_region(2));
    drop(a);
    assert!(!here.region.in_use() && !there.region.in_use() && !b.uses_region(2));
}

#[test]
fn blocks_are_found_in_the_allocations_that_they_cross() {
    let stretch = |id, base, len, addr| Stretch { id, base, len, addr };
    let all = [stretch(4, 1000, 100, 50_000), stretch(5, 1100, 50, 10_000), stretch(9, 1150, 1000, 90_000)];
    let mut pieces =
        vec![Piece { src: 7, dst: 7, len: 7 }, Piece { src: 1090, dst: 0, len: 80 }, Piece { src: 1100, dst: 500, len: 50 }];
    let mut used = Vec::new();
    locate(&mut pieces, 1, &all, |id| used.push(id)).unwrap();
    let piece = |src, dst, len| Piece { src, dst, len };
    assert_eq!(pieces[1..], [piece(50_090, 0, 10), piece(10_000, 10, 50), piece(90_000, 60, 20), piece(10_000, 500, 50)]);
    assert_eq!((pieces[0].src, used), (7, vec![4, 5, 9, 5]));
    for outside in [piece(999, 0, 1), piece(2149, 0, 2)] {
        assert!(locate(&mut vec![outside], 0, &all, |_| {}).is_err());
    }
    assert!(cover(&all, (1000, 2150)) && !cover(&all, (999, 1001)) && !cover(&all, (1000, 2151)));
    assert!(!cover(&[all[0], all[2]], (1090, 1160)) && cover(&[], (5, 5)) && !cover(&[all[0], all[2], all[1]], (1000, 1150)));
}

/// What the host does for each block; UCCL_TEST_BENCH=1 runs it.
#[test]
fn cost_of_a_block() {
    if !crate::benchmarks::wanted("cost_of_a_block") {
        return;
    }
    const COUNT: usize = 16_384;
    let (here, there) = (numbered(1, GPU, 16 * COUNT), Memory::new(2, GPU, 16 * COUNT, 0));
    let (mut a, mut b) = strangers([1, 1]);
    let (mut reads, mut orders, mut takes) = (Vec::new(), Vec::new(), Vec::new());
    shared(&mut a, &mut b, &here, &there, 1);
    for id in 0..200 {
        let begin = Instant::now();
        assert!(start(&mut a, Way::In, 2 * id, &here, &there, 16).unwrap());
        reads.push(begin.elapsed().as_nanos() as f64 / COUNT as f64);
        run(&mut a, &mut b, 1).unwrap();
        let begin = Instant::now();
        assert!(start(&mut a, Way::Out, 2 * id + 1, &here, &there, 16).unwrap());
        orders.push(begin.elapsed().as_nanos() as f64 / COUNT as f64);
        let begin = Instant::now();
        assert!(b.take_orders().unwrap());
        takes.push(begin.elapsed().as_nanos() as f64 / COUNT as f64);
        run(&mut a, &mut b, 1).unwrap();
    }
    for (what, times) in [("read", reads), ("order", orders), ("take", takes)] {
        crate::benchmarks::line_of_blocks(what, times);
    }
}

/// Both sides' memory, shared as simulated GPU memory that is mapped where it lies, in so many allocations.
fn shared(a: &mut LocalPath, b: &mut LocalPath, here: &Memory, there: &Memory, count: u64) {
    use super::super::super::memory::{Export, ExportKind};
    let gpu = super::super::super::memory::emulated::gpu(0);
    let export = |base, len| Export { kind: ExportKind::Own, handle: [0; 64], fd: None, base, len, gpu };
    for (id, base, len) in a.shares.pretend(&here.region, GPU, count) {
        b.imports.told(id, GPU, export(base, len)).unwrap();
    }
    for (id, base, len) in b.shares.pretend(&there.region, GPU, count) {
        a.imports.told(id, GPU, export(base, len)).unwrap();
    }
    b.grant(&RegionUse::new(&there.region), GPU);
    talk(a, b);
}

#[test]
fn device_memory_of_several_allocations_goes_without_asking() {
    const LEN: usize = 96 << 10;
    for count in [1, 2, 3, 6] {
        for block in [24 << 10, 4096, 48 << 10, LEN as u64, 32] {
            for way in [Way::In, Way::Out] {
                let (from, to) = (numbered(1, GPU, LEN), Memory::new(2, GPU, LEN, 0));
                let (here, there) = if way == Way::In { (&to, &from) } else { (&from, &to) };
                let (mut a, mut b) = strangers([1, 1]);
                shared(&mut a, &mut b, here, there, count);
                assert!(start(&mut a, way, 5, here, there, block).unwrap(), "{count} {block} {way:?}");
                assert_eq!(run(&mut a, &mut b, 1).unwrap(), (LEN as u64, vec![(5, true)]), "{count} {block} {way:?}");
                assert!(same(here, there, block as usize), "{count} {block} {way:?}");
                assert!(!here.region.in_use() && !there.region.in_use());
            }
        }
    }
    // An allocation that the peer has not opened, or has taken back.
    let (here, there) = (numbered(1, GPU, LEN), Memory::new(2, GPU, LEN, 0));
    let (mut a, mut b) = strangers([1, 1]);
    shared(&mut a, &mut b, &here, &there, 6);
    let Some(device) = &mut a.device else { panic!("a simulated GPU") };
    a.imports.ended(3, &mut **device).unwrap();
    assert!(!start(&mut a, Way::In, 1, &here, &there, 4096).unwrap());
    let Some(device) = &mut b.device else { panic!("a simulated GPU") };
    b.imports.ended(3, &mut **device).unwrap();
    assert!(start(&mut a, Way::Out, 2, &here, &there, 4096).unwrap());
    assert_eq!(run(&mut a, &mut b, 1).unwrap_err().kind(), ErrorKind::Protocol, "a peer that orders what it took back");
}

/// What stands still is ended: a transfer that takes long shows that it goes on.
#[test]
fn what_is_on_the_way_is_reported_before_its_end() {
    const LEN: usize = 256 << 20;
    for way in [Way::In, Way::Out] {
        let (from, to) = (Memory::new(1, Place::HOST, LEN, 5), Memory::new(2, Place::HOST, LEN, 0));
        let (here, there) = if way == Way::In { (&to, &from) } else { (&from, &to) };
        let (mut a, mut b) = granted(here, there);
        assert!(start(&mut a, way, 5, here, there, 64 << 10).unwrap());
        let (mut seen, mut moved, mut ended, begin) = (Vec::new(), 0, false, Instant::now());
        while !ended {
            let mut events = Vec::new();
            a.progress(&mut None, Instant::now(), &mut events).unwrap();
            b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
            for event in events {
                match event {
                    Event::Moved(_, n) => moved += n,
                    Event::Ended(_, done) => ended = done,
                    other => panic!("{other:?}"),
                }
            }
            let mut network = (0, 0);
            a.network(&mut |line| network = line.moved.unwrap()).unwrap();
            seen.push((moved, network));
            assert!(begin.elapsed() < Duration::from_secs(60), "{seen:?}");
        }
        let all = LEN as u64;
        let at_end = if way == Way::In { (0, all) } else { (all, 0) };
        let on_the_way = |(moved, network): &(u64, (u64, u64))| {
            [*moved, if way == Way::In { network.1 } else { network.0 }].iter().all(|n| (all / 8..all).contains(n))
        };
        assert!(seen.iter().any(on_the_way), "{way:?}: {} looks", seen.len());
        assert_eq!(seen.last(), Some(&(all, at_end)));
        assert!(to.holds(5) && !from.region.in_use() && !to.region.in_use());
    }
}
