//! Host memory that is staged in areas, since neither process may read the other.

use super::super::areas::{area_bytes, count, Kind, HOST_SLOT, SLOTS};
use super::super::link::tests::staging;
use super::super::memory::{Export, ExportKind};
use super::super::ring::Head;
use super::super::shm;
use super::staged_tests::{pairing, route, run, same, start, End, Memory, Scattered};
use super::*;
use crate::status::ErrorKind;
use crate::types::Piece;
use std::os::fd::OwnedFd;

const HOST: Place = Place::HOST;

fn ends() -> (End, End) {
    let (a, b) = staging([u64::MAX; 2]);
    (End::new(a), End::new(b))
}

/// Source and destination of a transfer, as `here` and `there`.
fn two(way: Way, len: usize) -> (Memory, Memory) {
    match way {
        Way::Out => (Memory::numbered(1, HOST, len), Memory::new(2, HOST, len, 0)),
        Way::In => (Memory::new(1, HOST, len, 0), Memory::numbered(2, HOST, len)),
    }
}

fn begun(way: Way, here: &Memory, there: &Memory, block: u64) -> (End, End) {
    let (mut a, mut b) = ends();
    b.register(there);
    assert_eq!(route(&mut a, &mut b, way, here, there), Route::Direct);
    start(&mut a, way, 5, here, there, block).unwrap();
    (a, b)
}

#[test]
fn blocks_of_all_sizes_arrive_either_way() {
    let slot = HOST_SLOT as usize;
    for (len, block) in [(1, 1), (4096, 16), (1_000_001, 1_000_001), (3 << 20, 64), (slot, slot), (10 * slot, slot / 3)] {
        for way in [Way::In, Way::Out] {
            let (here, there) = two(way, len / block * block);
            let (mut a, mut b) = begun(way, &here, &there, block as u64);
            for id in [5, 6, 7] {
                let total = here.bytes.len() as u64;
                assert_eq!(run(&mut a, &mut b, 1).unwrap(), (total, vec![(id, true)]), "{len} {block} {way:?}");
                assert!(same(&here, &there, block), "{len} {block} {way:?}");
                assert!(!here.region.in_use() && !there.region.in_use() && !a.busy() && !b.busy());
                start(&mut a, way, id + 1, &here, &there, block as u64).unwrap();
            }
        }
    }
}

/// Sends all of `from` into a landing of all of `to`, as the protocol does. What the sender knows of the landing may be changed.
fn send(a: &mut End, b: &mut End, id: u64, (from, to): (&Memory, &Memory), change: impl Fn(&mut Landing)) -> Result<()> {
    let (key, total) = (Key { id, mine: true }, from.bytes.len() as u64);
    let used = RegionUse::new(&to.region);
    let landing = b.host.land(Key { id, mine: false }, &used, (to.region.span.addr, total), HOST);
    let mut landing = landing.expect("a landing");
    change(&mut landing);
    let (near, far) = (from.region.span.addr, landing.addr);
    let mut blocks = Scattered::whole(near, far, total);
    let (hold, pairings) = (from.hold(), [Pairing { region: 0, token: [0; 16], ..pairing(from, to) }]);
    let transfer = &mut Start {
        key,
        way: Way::Out,
        total,
        count: 1,
        pairings: &pairings,
        hold: &hold,
        blocks: &mut blocks,
        now: Instant::now(),
    };
    a.host.start(transfer, Some(landing))
}

/// Two ends of which the first knows that it can send to the second.
fn speaking(from: &Memory) -> (End, End) {
    let (mut a, mut b) = ends();
    assert!(!a.host.can_send(HOST, &from.hold()), "the first message finds no area");
    for _ in 0..3 {
        a.step(&mut Vec::new()).unwrap();
        b.step(&mut Vec::new()).unwrap();
    }
    assert!(a.host.can_send(HOST, &from.hold()) && b.host.can_send(HOST, &from.hold()));
    (a, b)
}

#[test]
fn messages_land_in_posted_buffers() {
    for len in [1, 70_000, 9_000_001] {
        let (from, to) = two(Way::Out, len);
        let (mut a, mut b) = speaking(&from);
        let (mut one, mut other, begin) = (Vec::new(), Vec::new(), Instant::now());
        for id in 1..4 {
            send(&mut a, &mut b, id, (&from, &to), |_| {}).unwrap();
            let ended = |events: &[Event], mine| events.contains(&Event::Ended(Key { id, mine }, true));
            while !ended(&one, true) || !ended(&other, false) {
                a.step(&mut one).unwrap();
                b.step(&mut other).unwrap();
                assert!(begin.elapsed().as_secs() < 60);
            }
            assert!(from.seen() == to.seen() && !from.region.in_use() && !to.region.in_use());
        }
    }
}

#[test]
fn a_message_to_no_landing_and_one_without_an_area_end_the_connection() {
    let (from, to) = two(Way::Out, 1000);
    let (mut a, mut b) = speaking(&from);
    // A buffer of another place than the landing's.
    send(&mut a, &mut b, 1, (&from, &to), |landing| landing.addr += 1).unwrap();
    let error = (0..20).find_map(|_| a.step(&mut Vec::new()).and(b.step(&mut Vec::new())).err());
    assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol) && to.seen() == [0; 1000]);
    drop((a, b));
    // The peer's landing came before its area.
    let (mut a, mut b) = ends();
    let error = send(&mut a, &mut b, 1, (&from, &to), |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    drop((a, b));
    assert!(!from.region.in_use() && !to.region.in_use());
}

#[test]
fn without_room_for_areas_channels_carry_it() {
    for (most, reads, writes) in
        [([0, u64::MAX], Route::Channels, Route::Direct), ([u64::MAX, 0], Route::Direct, Route::Channels)]
    {
        let (a, b) = staging(most);
        let (mut a, mut b) = (End::new(a), End::new(b));
        let (here, there) = two(Way::Out, 1000);
        b.register(&there);
        assert_eq!(route(&mut a, &mut b, Way::In, &here, &there), reads);
        assert_eq!(route(&mut a, &mut b, Way::Out, &here, &there), writes);
    }
}

/// The peer writes into an area at any time, and announces records that do not fit: nothing goes beyond what is granted.
#[test]
fn a_peer_that_lies_writes_nothing_but_what_it_may() {
    type Change = fn(&mut Head, &mut Piece);
    let lies: [Change; 7] = [
        |_, block| block.src = HOST_SLOT,
        |_, block| block.len = HOST_SLOT + 1,
        |_, block| block.src = u64::MAX - 50,
        |_, block| block.dst += 901,
        |_, block| block.dst -= 1,
        |head, _| head.export = 0,
        |head, _| head.export = Kind::Fetch.export(Place::gpu(0)),
    ];
    for (n, lie) in lies.into_iter().enumerate() {
        let (here, there) = (Memory::new(1, HOST, 1000, 1), Memory::new(2, HOST, 1000, 2));
        let (mut a, mut b) = ends();
        b.register(&there);
        assert_eq!(route(&mut a, &mut b, Way::Out, &here, &there), Route::Direct);
        let Claim::Granted(granted) = a.host.leases.claim(2, there.region.token, HOST) else { panic!("a grant") };
        let (order, slot, generation) = (a.host.writes.out.begin().unwrap(), granted.slot, granted.generation);
        let mut head = Head { order, slot, generation, export: Kind::Write.export(HOST), last: true, bulk: false };
        let mut block = Piece { src: 0, dst: granted.addr, len: 100 };
        lie(&mut head, &mut block);
        a.host.writes.out.announce(head, &[block]).unwrap();
        let error = (0..20).find_map(|_| b.step(&mut Vec::new()).err());
        drop(b);
        assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol) && there.seen() == [2; 1000], "lie {n}");
        assert!(!there.region.in_use());
    }
    // More scattered than was announced.
    let (here, there) = two(Way::Out, 1000);
    let (mut a, b) = begun(Way::Out, &here, &there, 10);
    let word = super::super::layout::scattered(super::super::layout::GPUS);
    b.host.orders.inn.shared().word(word).store(2 * SLOTS, Ordering::SeqCst);
    assert!((0..9).find_map(|_| a.step(&mut Vec::new()).err()).is_some_and(|e| e.kind() == ErrorKind::Protocol));
}

#[test]
fn slots_are_counted_in_a_word_of_their_own() {
    let (here, there) = two(Way::Out, 3 * HOST_SLOT as usize);
    let (mut a, mut b) = begun(Way::Out, &here, &there, HOST_SLOT);
    run(&mut a, &mut b, 1).unwrap();
    let counts = [HOST, Place::gpu(0), Place::gpu(31)].map(|place| count(a.host.writes.out.shared(), place).unwrap());
    assert_eq!(counts, [3, 0, 0]);
}

/// What is offered as an area may end no process, now or when something is written.
#[test]
fn an_area_that_is_no_sealed_memory_file_is_not_used() {
    let len = area_bytes(HOST);
    let file = |path| OwnedFd::from(std::fs::File::open(path).unwrap());
    let short = shm::create(c"area", len as usize - 4096).unwrap();
    for fd in [short, file("/dev/zero"), file("/proc/self/exe")] {
        let (a, b) = staging([u64::MAX; 2]);
        let (mut b, there, what) = (End::new(b), Memory::new(2, HOST, 1000, 0), format!("{fd:?}"));
        b.register(&there);
        let export = Export { kind: ExportKind::SharedMemory, handle: [0; 64], fd: Some(fd), base: 4096, len, gpu: [0; 16] };
        let claim = Message::Claim { region: 2, token: there.region.token, place: HOST };
        for message in [Message::Area { there: HOST, here: HOST, export }, claim] {
            assert!(a.socket.send(&message.encode(), message.fd()).unwrap());
        }
        b.step(&mut Vec::new()).unwrap();
        let mut buffer = [0; MAX_MESSAGE];
        let said: Vec<Message> = std::iter::from_fn(|| match a.socket.receive(&mut buffer).unwrap() {
            Received::Message(n, fds) => Some(Message::decode(&buffer[..n], fds).unwrap()),
            _ => None,
        })
        .collect();
        let granted = said.iter().find_map(|m| if let Message::Grant(granted) = m { Some(granted.direct) } else { None });
        assert_eq!(granted, Some(crate::types::RemoteAccess::WRITE), "{what}: {said:?}");
    }
}
