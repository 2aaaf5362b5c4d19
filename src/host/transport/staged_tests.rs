use super::super::areas::Kind;
use super::super::areas::{count, SLOT, SLOTS};
use super::super::link::tests::pushing;
use super::super::memory::emulated::{self, EmulatedMemory};
use super::super::memory::witness::Process;
use super::super::memory::{Export, LocalMemory};
use super::super::memory::{ExportKind, GpuId, Manner, Mapping, Pull};
use super::super::ring::Head;
use super::super::shm;
use super::*;
use crate::direct::Blocks;
use crate::status::ErrorKind;
use crate::types::{Piece, Span};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::Mutex;
use std::time::Duration;

const GPU: Place = Place(1);
const LIMIT: Duration = Duration::from_secs(60);
const AREA: u64 = SLOT * SLOTS;

/// Registered memory of a simulated GPU.
pub(super) struct Memory {
    pub bytes: Vec<u8>,
    pub region: Arc<Region>,
}

impl Memory {
    pub(super) fn new(id: u64, place: Place, len: usize, fill: u8) -> Memory {
        Memory::with(id, place, vec![fill; len], RemoteAccess::ALL)
    }

    pub(super) fn numbered(id: u64, place: Place, len: usize) -> Memory {
        let bytes = (0..len).map(|i| (i * 31 + i / 509) as u8).collect();
        Memory::with(id, place, bytes, RemoteAccess::ALL)
    }

    pub(super) fn with(id: u64, place: Place, bytes: Vec<u8>, access: RemoteAccess) -> Memory {
        let span = Span { id, addr: bytes.as_ptr() as u64, len: bytes.len() as u64 };
        Memory { bytes, region: Arc::new(Region::new(span, [id as u8; 16], place, access)) }
    }

    pub(super) fn hold(&self) -> Hold {
        Hold::new(vec![RegionUse::new(&self.region)])
    }

    pub(super) fn seen(&self) -> &[u8] {
        std::hint::black_box(&self.bytes)
    }
}

/// An end, and the regions that it has.
pub(super) struct End {
    pub host: OneHost,
    regions: Arc<Mutex<Vec<Arc<Region>>>>,
}

impl End {
    pub(super) fn new(linked: super::super::Linked) -> End {
        let regions: Arc<Mutex<Vec<Arc<Region>>>> = Arc::default();
        let of = regions.clone();
        let lookup = Box::new(move |id: u64, token: &[u8; 16]| {
            let regions = of.lock().unwrap();
            let found = regions.iter().find(|region| region.span.id == id && region.token == *token);
            found.and_then(|region| region.enter()).ok_or_else(|| err!(RemoteAccess, "region {id} is not registered"))
        });
        // SAFETY: a plain system call, whose result is fresh.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        let bell = Bell { armed: Arc::new(AtomicU32::new(0)), fd: Arc::new(fd) };
        End { host: OneHost::new(linked, bell, Vec::new(), lookup), regions }
    }

    pub(super) fn register(&self, memory: &Memory) {
        self.regions.lock().unwrap().push(memory.region.clone());
    }

    pub(super) fn step(&mut self, events: &mut Vec<Event>) -> Result<()> {
        self.host.wire.wake();
        self.host.progress(Instant::now(), events).map(drop)
    }

    pub(super) fn busy(&self) -> bool {
        self.host.activity().busy
    }
}

/// Both ends of a connection of two processes, as it were, whose transfers are staged.
pub(super) fn ends(gpus: [u8; 2]) -> (End, End) {
    let (a, b) = pushing(gpus, [true; 2]);
    (End::new(a), End::new(b))
}

/// Blocks of this many bytes, of `here` and of `there`, in an order of their own on either side.
pub(super) struct Scattered {
    way: Way,
    here: u64,
    there: u64,
    block: u64,
    count: u64,
    next: u64,
}

impl Scattered {
    /// One block of `src`, for `dst`.
    pub(super) fn whole(src: u64, dst: u64, len: u64) -> Scattered {
        Scattered { way: Way::Out, here: src, there: dst, block: len, count: 1, next: 0 }
    }
}

impl Blocks for Scattered {
    fn fill(&mut self, most: usize, _bytes: u64, out: &mut Vec<Piece>) -> Option<usize> {
        let n = (most as u64).min(self.count - self.next);
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

/// The bytes of both sides are the same in the sequence of the blocks.
pub(super) fn same(a: &Memory, b: &Memory, block: usize) -> bool {
    let count = a.bytes.len() / block;
    (0..count).all(|i| {
        let (x, y) = (i * 7919 % count * block, i * 104_729 % count * block);
        a.seen()[x..x + block] == b.seen()[y..y + block]
    })
}

pub(super) fn pairing(here: &Memory, there: &Memory) -> Pairing {
    let range = |memory: &Memory| (memory.region.span.addr, memory.region.span.addr + memory.region.span.len);
    let Region { span, token, place, .. } = &*there.region;
    let (region, token, there_place) = (span.id, *token, *place);
    Pairing { local: 0, here: here.region.place, region, token, there: there_place, near: range(here), far: range(there) }
}

/// How a transfer of all of both would go, once the peer has answered.
pub(super) fn route(a: &mut End, b: &mut End, way: Way, here: &Memory, there: &Memory) -> Route {
    let begin = Instant::now();
    loop {
        let route = a.host.route(way, &[pairing(here, there)], &here.hold()).unwrap();
        if route != Route::Wait {
            return route;
        }
        b.step(&mut Vec::new()).unwrap();
        a.step(&mut Vec::new()).unwrap();
        assert!(begin.elapsed() < LIMIT);
    }
}

/// Starts a transfer of all of both.
pub(super) fn start(a: &mut End, way: Way, id: u64, here: &Memory, there: &Memory, block: u64) -> Result<()> {
    let total = here.bytes.len() as u64;
    let (at, remote, count) = (here.region.span.addr, there.region.span.addr, total / block);
    let mut blocks = Scattered { way, here: at, there: remote, block, count, next: 0 };
    let (pairings, hold, key) = ([pairing(here, there)], here.hold(), Key { id, mine: true });
    let transfer = &mut Start {
        key,
        way,
        total,
        count: count as usize,
        pairings: &pairings,
        hold: &hold,
        blocks: &mut blocks,
        now: Instant::now(),
    };
    a.host.start(transfer, None)
}

/// Both go on until this many transfers have ended; bytes that moved, and how each ended.
pub(super) fn run(a: &mut End, b: &mut End, ends: usize) -> Result<(u64, Vec<(u64, bool)>)> {
    let (mut events, begin) = (Vec::new(), Instant::now());
    let ended = |events: &[Event]| events.iter().filter(|e| matches!(e, Event::Ended(..))).count();
    while ended(&events) < ends {
        a.step(&mut events)?;
        b.step(&mut Vec::new())?;
        assert!(begin.elapsed() < LIMIT, "{events:?}");
    }
    let moved = events.iter().map(|e| if let Event::Moved(_, n) = e { *n } else { 0 }).sum();
    let how = events.iter().filter_map(|e| if let Event::Ended(key, done) = e { Some((key.id, *done)) } else { None });
    Ok((moved, how.collect()))
}

/// A transfer of all of both has begun, between ends that `there` is registered at.
fn begun(way: Way, here: &Memory, there: &Memory, block: u64) -> (End, End) {
    let (mut a, mut b) = ends([1, 1]);
    b.register(there);
    assert_eq!(route(&mut a, &mut b, way, here, there), Route::Direct);
    start(&mut a, way, 5, here, there, block).unwrap();
    (a, b)
}

/// Source and destination of a transfer, as `here` and `there`.
fn two(way: Way, len: usize) -> (Memory, Memory) {
    match way {
        Way::Out => (Memory::numbered(1, GPU, len), Memory::new(2, GPU, len, 0)),
        Way::In => (Memory::new(1, GPU, len, 0), Memory::numbered(2, GPU, len)),
    }
}

#[test]
fn blocks_of_all_sizes_arrive_either_way_and_slots_come_back() {
    let slot = SLOT as usize;
    for (len, block) in
        [(1, 1), (4096, 16), (1_000_001, 1_000_001), (3 << 20, 64), (slot, slot), (11 * slot, slot / 3), (5 << 20, 128)]
    {
        for way in [Way::In, Way::Out] {
            let (here, there) = two(way, len / block * block);
            let (mut a, mut b) = begun(way, &here, &there, block as u64);
            assert!(here.region.in_use() && a.busy());
            for id in [5, 6, 7] {
                let total = here.bytes.len() as u64;
                assert_eq!(run(&mut a, &mut b, 1).unwrap(), (total, vec![(id, true)]), "{len} {block} {way:?}");
                assert!(same(&here, &there, block), "{len} {block} {way:?}");
                assert!(!here.region.in_use() && !there.region.in_use() && !a.busy() && !b.busy());
                start(&mut a, way, id + 1, &here, &there, block as u64).unwrap();
            }
            // Nothing of the application is shared or mapped.
            assert!([&a, &b].iter().all(|end| end.host.imports.count() == 0 && end.host.shares.outbox.is_empty()));
            let (sent, received) = (a.host.stats(false).sent_bytes, a.host.stats(false).received_bytes);
            let three = 3 * here.bytes.len() as u64;
            assert_eq!((sent, received), if way == Way::Out { (three, 0) } else { (0, three) });
        }
    }
}

#[test]
fn many_at_once_over_several_gpus_and_both_ways_keep_apart() {
    let (mut a, mut b) = ends([2, 2]);
    let (mut all, mut starts) = (Vec::new(), Vec::new());
    for id in 0..60u64 {
        let gpu = |n: u64| Place::gpu((n % 2) as u8);
        let block = if id % 10 == 0 { 1 << 20 } else { 500 };
        let len = block * if id % 10 == 0 { 9 } else { 7 };
        let (from, to) = (Memory::numbered(2 * id, gpu(id), len), Memory::new(2 * id + 1, gpu(id / 2), len, 0));
        a.register(if id % 4 < 2 { &to } else { &from });
        b.register(if id % 4 < 2 { &to } else { &from });
        all.push((from, to, block));
    }
    for (id, (from, to, block)) in all.iter().enumerate() {
        let (way, here, there) = if id % 4 < 2 { (Way::Out, from, to) } else { (Way::In, to, from) };
        let mine = id % 3 == 0;
        let (one, other) = if mine { (&mut a, &mut b) } else { (&mut b, &mut a) };
        assert_eq!(route(one, other, way, here, there), Route::Direct, "{id}");
        starts.push((mine, way, id as u64, here, there, *block as u64));
    }
    for &(mine, way, id, here, there, block) in &starts {
        start(if mine { &mut a } else { &mut b }, way, id, here, there, block).unwrap();
    }
    let (mut events, begin) = (Vec::new(), Instant::now());
    while a.busy() || b.busy() {
        a.step(&mut events).unwrap();
        b.step(&mut events).unwrap();
        assert!(begin.elapsed() < LIMIT, "{events:?}");
    }
    let mut done: Vec<u64> =
        events.iter().filter_map(|e| if let Event::Ended(key, true) = e { Some(key.id) } else { None }).collect();
    done.sort_unstable();
    assert_eq!(done, (0..60).collect::<Vec<_>>());
    for (from, to, block) in &all {
        let (a, b) = if from.region.span.id / 2 % 4 < 2 { (from, to) } else { (to, from) };
        assert!(same(a, b, *block) && !from.region.in_use() && !to.region.in_use());
    }
}

#[test]
fn a_small_transfer_does_not_wait_for_a_large_one() {
    for way in [Way::In, Way::Out] {
        let ((here, there), (small, other)) = (two(way, 40 * SLOT as usize), two(way, 100));
        let other = Memory {
            region: Arc::new(Region::new(Span { id: 9, ..other.region.span }, [9; 16], GPU, RemoteAccess::ALL)),
            ..other
        };
        let (mut a, mut b) = begun(way, &here, &there, SLOT);
        b.register(&other);
        assert_eq!(route(&mut a, &mut b, way, &small, &other), Route::Direct);
        start(&mut a, way, 6, &small, &other, 100).unwrap();
        assert_eq!(run(&mut a, &mut b, 1).unwrap().1, [(6, true)], "{way:?}");
        assert_eq!(run(&mut a, &mut b, 1).unwrap().1, [(5, true)]);
        assert!(same(&here, &there, SLOT as usize) && same(&small, &other, 100));
    }
}

#[test]
fn what_the_peer_does_not_allow_is_refused() {
    let here = Memory::new(1, GPU, 1000, 0);
    let (mut a, mut b) = ends([1, 1]);
    let unknown = Memory::new(7, GPU, 1000, 1);
    let read_only = Memory::with(2, GPU, vec![1; 1000], RemoteAccess::READ);
    let write_only = Memory::with(3, GPU, vec![1; 1000], RemoteAccess::WRITE);
    b.register(&read_only);
    b.register(&write_only);
    for (way, there) in [(Way::In, &unknown), (Way::Out, &unknown), (Way::Out, &read_only), (Way::In, &write_only)] {
        assert!(matches!(route(&mut a, &mut b, way, &here, there), Route::Refused(e) if e.kind() == ErrorKind::RemoteAccess));
    }
    assert_eq!(route(&mut a, &mut b, Way::In, &here, &read_only), Route::Direct);
    assert_eq!(route(&mut a, &mut b, Way::Out, &here, &write_only), Route::Direct);
    // A message takes the channels.
    assert!(!a.host.can_send(GPU, &here.hold()));
    let used = RegionUse::new(&read_only.region);
    assert!(b.host.land(Key { id: 1, mine: false }, &used, (read_only.region.span.addr, 10), GPU).is_none());
}

/// A peer that asks for what its grant does not allow, although its own check says so.
#[test]
fn the_owner_checks_each_record_itself() {
    for (way, access) in [(Way::In, RemoteAccess::WRITE), (Way::Out, RemoteAccess::READ)] {
        let (here, there) = (Memory::new(1, GPU, 1000, 1), Memory::with(2, GPU, vec![2; 1000], access));
        let (mut a, mut b) = ends([1, 1]);
        b.register(&there);
        route(&mut a, &mut b, way, &here, &there);
        start(&mut a, way, 5, &here, &there, 10).unwrap();
        assert_eq!(run(&mut a, &mut b, 1).unwrap(), (0, vec![(5, false)]), "{way:?}");
        assert!(there.seen() == [2; 1000] && here.seen() == [1; 1000] && !here.region.in_use() && !b.busy());
    }
}

#[test]
fn a_region_that_ends_refuses_what_comes_later() {
    for way in [Way::In, Way::Out] {
        let (here, there) = two(way, 20 * SLOT as usize);
        let (mut a, mut b) = begun(way, &here, &there, SLOT / 4);
        while !there.region.in_use() {
            a.step(&mut Vec::new()).unwrap();
            b.step(&mut Vec::new()).unwrap();
        }
        there.region.end();
        start(&mut a, way, 6, &here, &there, SLOT).unwrap();
        let (_, mut how) = run(&mut a, &mut b, 2).unwrap();
        how.sort_unstable();
        // The first holds it; no other begins.
        assert_eq!(how, [(5, true), (6, false)], "{way:?}");
        assert!(!there.region.in_use() && !here.region.in_use());
        b.host.forget(2);
        // Slots were not lost.
        let (next, other) = (Memory::numbered(3, GPU, 1000), Memory::new(4, GPU, 1000, 0));
        b.register(&other);
        assert_eq!(route(&mut a, &mut b, Way::Out, &next, &other), Route::Direct);
        for id in 0..2 * SLOTS {
            start(&mut a, Way::Out, id, &next, &other, 10).unwrap();
        }
        assert!(run(&mut a, &mut b, 2 * SLOTS as usize).unwrap().1.iter().all(|(_, done)| *done) && same(&next, &other, 10));
    }
}

/// A stopped source goes on after the peer has ended the connection: it writes to pages that no process reads, and that are not
/// those of a later connection.
#[test]
fn late_writes_of_a_source_reach_no_memory_in_use() {
    let (from, to) = (Memory::new(1, GPU, 1000, 5), Memory::new(2, GPU, 1000, 0));
    let (mut a, b) = begun(Way::Out, &from, &to, 1000);
    drop(b);
    assert!(!to.region.in_use());
    let later = Memory::new(3, GPU, 1000, 1);
    let (mut next, mut other) = ends([1, 1]);
    other.register(&later);
    assert_eq!(route(&mut next, &mut other, Way::Out, &from, &later), Route::Direct);
    for _ in 0..9 {
        let _ = a.step(&mut Vec::new());
    }
    assert!(to.seen() == [0; 1000] && later.seen() == [1; 1000]);
    let (_, area) = other.host.staged.enter(GPU).unwrap();
    // SAFETY: a slot of the area.
    assert_eq!(unsafe { *(area.addr as *const [u8; 1000]) }, [0; 1000], "zeros, as its own peer has left them");
    drop(a);
    assert!(!from.region.in_use());
}

#[test]
fn an_end_that_goes_in_the_middle_lets_memory_go() {
    for way in [Way::In, Way::Out] {
        for steps in 0..24 {
            let (here, there) = two(way, 1000);
            let (mut a, mut b) = begun(way, &here, &there, 10);
            for _ in 0..steps / 2 {
                a.step(&mut Vec::new()).unwrap();
                b.step(&mut Vec::new()).unwrap();
            }
            let (first, mut second) = if steps % 2 == 0 { (a, b) } else { (b, a) };
            drop(first);
            for _ in 0..9 {
                let _ = second.step(&mut Vec::new());
            }
            drop(second);
            assert!(!here.region.in_use() && !there.region.in_use());
            let to = if way == Way::In { &here } else { &there };
            assert!(to.seen() == [0; 1000] || same(&here, &there, 10), "{way:?} {steps}");
        }
    }
}

/// The error that ends the owner of the destination when the peer's ring says this of a write of 100 bytes to a region of 1000.
fn lie(change: impl Fn(&mut Head, &mut Vec<Piece>), times: usize) -> Option<crate::status::Error> {
    let (here, there) = (Memory::new(1, GPU, 1000, 1), Memory::new(2, GPU, 1000, 2));
    let (mut a, mut b) = ends([1, 1]);
    b.register(&there);
    assert_eq!(route(&mut a, &mut b, Way::Out, &here, &there), Route::Direct);
    let granted = a.host.leases.claim(2, there.region.token, GPU);
    let Claim::Granted(granted) = granted else { panic!("a grant") };
    for _ in 0..times {
        let order = a.host.writes.out.begin().unwrap();
        let (slot, generation) = (granted.slot, granted.generation);
        let mut head = Head { order, slot, generation, export: Kind::Write.export(GPU), last: true, bulk: false };
        let mut blocks = vec![Piece { src: 0, dst: granted.addr, len: 100 }];
        change(&mut head, &mut blocks);
        a.host.writes.out.announce(head, &blocks).unwrap();
    }
    let error = (0..20).find_map(|_| b.step(&mut Vec::new()).err());
    drop(b);
    assert!(error.is_none() || there.seen() == [2; 1000]);
    assert!(!there.region.in_use());
    error
}

#[test]
fn a_ring_that_lies_is_found_out() {
    assert!(lie(|_, _| {}, 1).is_none(), "what no GPU has written are zeros");
    let place = |kind: Kind, place| move |head: &mut Head, _: &mut Vec<Piece>| head.export = kind.export(place);
    let wrong: Vec<(&str, Option<_>)> = vec![
        ("a slot out of turn", lie(|_, blocks| blocks[0].src = SLOT, 1)),
        ("beyond its slot", lie(|_, blocks| blocks[0].src = SLOT - 99, 1)),
        ("far outside", lie(|_, blocks| blocks[0].src = u64::MAX - 50, 1)),
        ("the same slot again", lie(|_, _| {}, 2)),
        ("longer than a slot", lie(|_, blocks| blocks[0].len = SLOT + 1, 1)),
        ("no bytes", lie(|_, blocks| blocks[0].len = 0, 1)),
        ("before the region", lie(|_, blocks| blocks[0].dst -= 1, 1)),
        ("behind the region", lie(|_, blocks| blocks[0].dst += 901, 1)),
        ("another GPU", lie(place(Kind::Write, Place::gpu(3)), 1)),
        ("host memory", lie(place(Kind::Write, Place::HOST), 1)),
        ("an export", lie(|head, _| head.export = 1, 1)),
        ("an address", lie(|head, _| head.export = 0, 1)),
        ("a read for another GPU", lie(place(Kind::Fetch, Place::gpu(1)), 1)),
        ("a read outside", lie(|head, _| head.export = Kind::Fetch.export(GPU), 1)),
        ("an answer for another GPU", lie(place(Kind::Answer, Place::gpu(3)), 1)),
        (
            "an answer of two blocks",
            lie(
                |head, blocks| {
                    head.export = Kind::Answer.export(GPU);
                    blocks.push(blocks[0]);
                },
                1,
            ),
        ),
        (
            "an answer out of turn",
            lie(
                |head, blocks| {
                    head.export = Kind::Answer.export(GPU);
                    blocks[0].src = SLOT;
                },
                1,
            ),
        ),
    ];
    for (what, error) in wrong {
        assert!(error.as_ref().is_some_and(|e| e.kind() == ErrorKind::Protocol), "{what}: {error:?}");
    }
}

#[test]
fn slots_that_are_in_use_are_not_filled_again() {
    let (here, there) = (Memory::new(1, GPU, 1000, 1), Memory::new(2, GPU, 1000, 2));
    let (mut a, mut b) = ends([1, 1]);
    b.register(&there);
    assert_eq!(route(&mut a, &mut b, Way::Out, &here, &there), Route::Direct);
    let Claim::Granted(granted) = a.host.leases.claim(2, there.region.token, GPU) else { panic!("a grant") };
    for i in 0..=SLOTS {
        let (order, slot, generation) = (a.host.writes.out.begin().unwrap(), granted.slot, granted.generation);
        let head = Head { order, slot, generation, export: Kind::Write.export(GPU), last: true, bulk: false };
        a.host.writes.out.announce(head, &[Piece { src: i % SLOTS * SLOT, dst: granted.addr, len: 100 }]).unwrap();
    }
    assert!(b.step(&mut Vec::new()).is_err_and(|e| e.kind() == ErrorKind::Protocol));
}

/// An answer of more than was asked for, and counts that cannot be.
#[test]
fn a_reader_and_a_writer_believe_nothing_either() {
    let (here, there) = two(Way::In, 1000);
    let (mut a, mut b) = begun(Way::In, &here, &there, 10);
    b.register(&there);
    let head = Head { order: 1, export: Kind::Answer.export(GPU), last: true, ..Head::default() };
    b.host.writes.out.announce(head, &[Piece { src: 0, dst: 0, len: 1001 }]).unwrap();
    b.host.staged.provide(GPU, &mut b.host.copies);
    let error = (0..9).find_map(|_| a.step(&mut Vec::new()).err());
    assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol) && here.seen() == [0; 1000]);

    let (here, there) = two(Way::Out, 1000);
    let (mut a, b) = begun(Way::Out, &here, &there, 10);
    // A slot that is being filled.
    b.host.orders.inn.shared().word(super::super::layout::scattered(0)).store(1, std::sync::atomic::Ordering::SeqCst);
    assert!(a.step(&mut Vec::new()).is_err_and(|e| e.kind() == ErrorKind::Protocol));
    assert!(here.region.in_use());
    drop(a);
    assert!(!here.region.in_use());

    let (here, there) = two(Way::Out, 1000);
    let (mut a, mut b) = begun(Way::Out, &here, &there, 10);
    b.host.orders.inn.end(1, true);
    assert!(a.step(&mut Vec::new()).is_err_and(|e| e.kind() == ErrorKind::Protocol));
}

#[test]
fn answers_to_no_read_are_dropped_and_their_slots_come_back() {
    let (here, there) = (Memory::new(1, GPU, 1000, 1), Memory::new(2, GPU, 1000, 2));
    let (mut a, mut b) = ends([1, 1]);
    b.register(&there);
    assert_eq!(route(&mut a, &mut b, Way::Out, &here, &there), Route::Direct);
    for i in 0..3 * SLOTS {
        let head = Head { order: 77, export: Kind::Answer.export(GPU), last: true, ..Head::default() };
        a.host.writes.out.announce(head, &[Piece { src: i % SLOTS * SLOT, dst: 0, len: SLOT }]).unwrap();
        b.step(&mut Vec::new()).unwrap();
    }
    assert_eq!(count(a.host.writes.out.shared(), GPU).unwrap(), 3 * SLOTS);
    assert!(there.seen() == [2; 1000]);
}

/// The error of an end to whose peer's socket these messages come.
fn error_after(push: bool, messages: &[Message]) -> Option<crate::status::Error> {
    let (a, b) = pushing([1, 1], [push; 2]);
    let mut b = End::new(b);
    for message in messages {
        assert!(a.socket.send(&message.encode(), message.fd()).unwrap());
    }
    b.step(&mut Vec::new()).err()
}

#[test]
fn areas_that_were_not_agreed_are_violations() {
    let export = |len| Export { kind: ExportKind::CudaIpc, handle: [0; 64], fd: None, base: 4096, len, gpu: emulated::gpu(0) };
    let area = |there, here, len| Message::Area { there, here, export: export(len) };
    for (push, messages) in [
        (true, vec![area(GPU, GPU, AREA - 1)]),
        (true, vec![area(GPU, GPU, AREA + 1)]),
        (true, vec![area(Place::gpu(1), GPU, AREA)]),
        (true, vec![area(GPU, GPU, AREA), area(GPU, GPU, AREA)]),
        (true, vec![Message::Share { id: 1, there: GPU, here: GPU, export: export(4096) }]),
        (false, vec![area(GPU, GPU, AREA)]),
    ] {
        let error = error_after(push, &messages);
        assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol), "{push} {messages:?}");
    }
    assert!(error_after(true, &[area(GPU, GPU, AREA)]).is_none());
}

/// What a descriptor of the peer is shows when it is opened; none of these may end the process, now or when something is written.
#[test]
fn an_area_that_is_no_memory_of_its_length_leaves_transfers_to_the_channels() {
    let unsealed = || {
        // SAFETY: a terminated name; the descriptor is fresh.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"area".as_ptr(), libc::MFD_ALLOW_SEALING)) };
        // SAFETY: a plain system call.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), AREA as libc::off_t) }, 0);
        fd
    };
    let file = |path| OwnedFd::from(std::fs::File::open(path).unwrap());
    let short = shm::create(c"area", AREA as usize - 4096).unwrap();
    let stream = std::os::unix::net::UnixStream::pair().unwrap().0.into();
    for fd in [unsealed(), short, file("/dev/zero"), file("/proc/self/exe"), stream] {
        let (a, b) = pushing([1, 1], [true; 2]);
        let (mut b, there, what) = (End::new(b), Memory::new(2, GPU, 1000, 0), format!("{fd:?}"));
        b.register(&there);
        let export = Export {
            kind: ExportKind::SharedMemory,
            handle: [0; 64],
            fd: Some(fd),
            base: 4096,
            len: AREA,
            gpu: emulated::gpu(0),
        };
        let claim = Message::Claim { region: 2, token: there.region.token, place: GPU };
        for message in [Message::Area { there: GPU, here: GPU, export }, claim] {
            assert!(a.socket.send(&message.encode(), message.fd()).unwrap());
        }
        b.step(&mut Vec::new()).unwrap();
        let mut buffer = [0; MAX_MESSAGE];
        let granted = std::iter::from_fn(|| match a.socket.receive(&mut buffer).unwrap() {
            Received::Message(n, fds) => Some(Message::decode(&buffer[..n], fds).unwrap()),
            _ => None,
        });
        let said: Vec<Message> = granted.collect();
        assert!(matches!(&said[0], Message::Area { .. }), "{what}: {said:?}");
        assert!(matches!(&said[1], Message::Grant(granted) if granted.direct == RemoteAccess::WRITE), "{what}: {said:?}");
    }
}

/// Simulated: a GPU on which the start of a copy fails after a part of it has begun.
struct HalfStarted(EmulatedMemory);

impl LocalMemory for HalfStarted {
    fn export(&mut self, place: Place, addr: u64, len: u64) -> Result<Vec<Export>> {
        self.0.export(place, addr, len)
    }
    fn open(&mut self, export: &Export, place: Place, owner: Option<Process>) -> Result<Mapping> {
        self.0.open(export, place, owner)
    }
    fn close(&mut self, mapping: Mapping) {
        self.0.close(mapping);
    }
    unsafe fn pull(&mut self, _place: Place, _pieces: &[Piece]) -> Result<Pull> {
        bail!(Gpu, "simulated")
    }
    fn poll(&mut self, pull: Pull) -> Result<bool> {
        self.0.poll(pull)
    }
    fn busy(&self) -> bool {
        true
    }
    fn quiesce(&mut self) -> Result<()> {
        self.0.quiesce()
    }
    fn reaches(&mut self, place: Place, peer_gpu: &GpuId) -> Option<Manner> {
        self.0.reaches(place, peer_gpu)
    }
}

#[test]
fn memory_of_a_copy_whose_start_failed_is_kept_until_nothing_runs() {
    let broken = |end: &mut End| end.host.copies.device.replace(Box::new(HalfStarted(EmulatedMemory::new(true))));
    for way in [Way::In, Way::Out] {
        let (here, there) = two(way, 1000);
        let (mut a, mut b) = ends([1, 1]);
        b.register(&there);
        assert_eq!(route(&mut a, &mut b, way, &here, &there), Route::Direct);
        // The source's side.
        let of = broken(if way == Way::Out { &mut a } else { &mut b });
        let mut begun = start(&mut a, way, 5, &here, &there, 10);
        if way == Way::In {
            begun = b.step(&mut Vec::new());
        }
        assert_eq!(begun.unwrap_err().kind(), ErrorKind::Gpu);
        let from = if way == Way::Out { &here } else { &there };
        assert!(from.region.in_use());
        drop((a, b));
        assert!(!from.region.in_use());
        drop(of);
        // The destination's.
        let (mut a, mut b) = self::begun(way, &here, &there, 10);
        let end = if way == Way::Out { &mut b } else { &mut a };
        let of = broken(end);
        assert_eq!(run(&mut a, &mut b, 1).unwrap_err().kind(), ErrorKind::Gpu);
        let to = if way == Way::Out { &there } else { &here };
        assert!(to.region.in_use() && to.seen() == [0; 1000]);
        drop((a, b));
        assert!(!to.region.in_use());
        drop(of);
    }
}
