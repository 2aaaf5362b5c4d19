use super::super::super::link::tests::pushing;
use super::super::super::memory::emulated;
use super::super::super::memory::{Export, ExportKind, GpuId, Manner, Mapping};
use super::super::super::push::{AREA, SLOTS};
use super::super::super::shm;
use super::super::tests::{bell, error_after, Memory};
use super::super::*;
use crate::status::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

const GPU: Place = Place(1);

/// Both ends of a path of two processes, as it were, that push; each has the other's areas mapped.
fn ends(gpus: [u8; 2]) -> (LocalPath, LocalPath) {
    let (a, b) = pushing(gpus, [true, true]);
    let (mut a, mut b) = (LocalPath::new(a, bell(), Vec::new()), LocalPath::new(b, bell(), Vec::new()));
    for end in [&mut a, &mut b] {
        end.shelves = None;
    }
    for (i, &count) in gpus.iter().enumerate() {
        for gpu in 0..count {
            let memory = Memory::new(u64::from(gpu) + 1, Place::gpu(gpu), 8, 0);
            [&mut a, &mut b][i].offer(&memory.region);
        }
    }
    for _ in 0..20 {
        for end in [&mut a, &mut b] {
            end.news.store(true, Ordering::Release);
            end.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        }
    }
    (a, b)
}

/// Sends chunks and expects them; both ends go on until they have arrived.
fn run(a: &mut LocalPath, b: &mut LocalPath, chunks: usize) -> Result<Vec<Event>> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while ours.len() < chunks || theirs.len() < chunks {
        a.progress(&mut None, Instant::now(), &mut ours)?;
        b.progress(&mut None, Instant::now(), &mut theirs)?;
        assert!(start.elapsed().as_secs() < 60, "{ours:?} {theirs:?}");
    }
    Ok(theirs)
}

/// Chunks that the ring of descriptors has room for.
const ROOM: usize = 7;

fn free(path: &mut LocalPath) -> usize {
    let mut loads = Loads::default();
    path.loads(GPU, false, Instant::now(), &mut loads);
    loads.channels[0].free
}

#[test]
fn pushed_chunks_arrive_and_their_slots_come_back() {
    let (mut a, mut b) = ends([1, 1]);
    assert_eq!(b.limits().bytes, SLOT);
    for (i, len) in [1, 4096, 1_000_001, SLOT].into_iter().cycle().take(5 * SLOTS).enumerate() {
        let fill = i as u8 + 1;
        let (from, to) = (Memory::new(1, GPU, len, fill), Memory::new(2, GPU, len, 0));
        assert!(a.share(&from.region, GPU) && !a.carries(GPU, Place::gpu(1)));
        b.expect(0, to.arrival(i as i32)).unwrap();
        a.submit(0, from.departure(i as i32, GPU), &mut None, Instant::now()).unwrap();
        // Nothing of the application is shared or mapped.
        assert!(b.imports.count() == 0 && a.shares.notes.is_empty());
        run(&mut a, &mut b, 1).unwrap();
        assert!(to.holds(fill) && !from.region.in_use() && !to.region.in_use());
        assert_eq!(free(&mut a), ROOM);
    }
    assert!(!a.busy() && !b.busy());
}

#[test]
fn many_at_once_over_several_gpus_keep_apart_and_in_order() {
    let (mut a, mut b) = ends([2, 2]);
    for round in 0..10 {
        let all: Vec<(Memory, Memory)> = (0..ROOM as u64)
            .map(|i| {
                // Some of host memory between them, which is pulled.
                let gpu = |n| if i % 3 == 2 { Place::HOST } else { Place::gpu(n) };
                let len = 1 + (i as usize * 77_777) % 400_000;
                (Memory::new(i, gpu(i as u8 % 2), len, i as u8 + round), Memory::new(i, gpu(i as u8 / 2 % 2), len, 0xEE))
            })
            .collect();
        for (i, (from, to)) in all.iter().enumerate() {
            assert!(free(&mut a) >= ROOM - i);
            a.submit(0, from.departure(i as i32, to.region.place), &mut None, Instant::now()).unwrap();
            b.expect(0, to.arrival(i as i32)).unwrap();
        }
        assert!(free(&mut a) <= 1);
        run(&mut a, &mut b, ROOM).unwrap();
        for (i, (from, to)) in all.iter().enumerate() {
            assert!(to.holds(i as u8 + round) && !from.region.in_use() && !to.region.in_use());
        }
    }
}

/// What the destination makes of a chunk of 100 bytes whose pieces are these.
fn told(pieces: &[Extent], len: usize, place: Place) -> Result<Memory> {
    let (mut a, mut b) = ends([1, 1]);
    let to = Memory::new(2, place, len, 0);
    a.outbox.tell(7, pieces.iter().map(|p| u64::from(p.len)).sum(), pieces)?;
    b.expect(0, to.arrival(7))?;
    let start = Instant::now();
    while b.counts.received_chunks == 0 {
        b.progress(&mut None, Instant::now(), &mut Vec::new())?;
        assert!(start.elapsed().as_secs() < 60);
    }
    Ok(to)
}

#[test]
fn only_slots_are_taken_for_what_is_pushed() {
    let at = |slot, len| Extent { addr: slot, len, export: PUSHED };
    assert!(told(&[at(SLOTS as u64 - 1, 100)], 100, GPU).unwrap().holds(0), "what nobody has pushed are zeros");
    for (pieces, len, place) in [
        (&[at(SLOTS as u64, 100)][..], 100, GPU),
        (&[at(u64::MAX - 200, 100)], 100, GPU),
        (&[at(0, 50), at(1, 50)], 100, GPU),
        (&[at(0, SLOT as u32 + 1)], SLOT + 1, GPU),
        (&[at(0, 100)], 100, Place::gpu(3)),
        (&[at(0, 100)], 100, Place::HOST),
        // Nothing is pulled there.
        (&[Extent { addr: 4096, len: 100, export: 0 }], 100, GPU),
        (&[Extent { addr: 4096, len: 100, export: 1 }], 100, GPU),
    ] {
        let error = told(pieces, len, place).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{pieces:?}");
    }
}

#[test]
fn a_slot_that_is_being_copied_is_not_taken_twice() {
    let (mut a, mut b) = ends([1, 1]);
    let to = [Memory::new(1, GPU, 100, 0), Memory::new(2, GPU, 100, 0)];
    for (i, to) in to.iter().enumerate() {
        a.outbox.tell(i as i32, 100, &[Extent { addr: 3, len: 100, export: PUSHED }]).unwrap();
        b.expect(0, to.arrival(i as i32)).unwrap();
    }
    let error = (0..9).find_map(|_| b.progress(&mut None, Instant::now(), &mut Vec::new()).err());
    assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol));
}

#[test]
fn a_peer_that_takes_what_was_not_told_is_found_out() {
    let (mut a, mut b) = ends([1, 1]);
    let from = Memory::new(1, GPU, 100, 5);
    a.submit(0, from.departure(1, GPU), &mut None, Instant::now()).unwrap();
    // It is being written into its slot.
    b.inbox.take();
    assert_eq!(a.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap_err().kind(), ErrorKind::Protocol);
    assert!(from.region.in_use());
    drop(a);
    assert!(!from.region.in_use());
}

#[test]
fn a_refused_chunk_gives_its_slot_back() {
    let (mut a, mut b) = ends([1, 1]);
    for i in 0..3 * SLOTS as i32 {
        let from = Memory::new(1, GPU, 100, 5);
        a.submit(0, from.departure(i, GPU), &mut None, Instant::now()).unwrap();
        b.expect(0, Arrival { key: Key { id: 1, mine: false }, len: 100, tag: i, dest: Dest::Discard }).unwrap();
        run(&mut a, &mut b, 1).unwrap();
        assert!(!from.region.in_use());
    }
    assert_eq!(free(&mut a), ROOM);
}

/// A stopped source goes on after the other side has ended the connection: it writes to pages that nobody reads, and that are not those
/// of a later connection.
#[test]
fn late_writes_of_a_source_reach_nobody() {
    let (mut a, mut b) = ends([1, 1]);
    let (from, to) = (Memory::new(1, GPU, 1000, 5), Memory::new(2, GPU, 1000, 0));
    b.expect(0, to.arrival(1)).unwrap();
    a.submit(0, from.departure(1, GPU), &mut None, Instant::now()).unwrap();
    b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
    drop(b);
    assert!(!to.region.in_use());
    let (mut next, mut other) = ends([1, 1]);
    for _ in 0..9 {
        a.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
    }
    assert!(a.told == 1 && to.holds(0), "it was written");
    let later = Memory::new(3, GPU, 1000, 1);
    next.outbox.tell(1, 1000, &[Extent { addr: 0, len: 1000, export: PUSHED }]).unwrap();
    other.expect(0, later.arrival(1)).unwrap();
    while other.counts.received_chunks == 0 {
        other.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
    }
    assert!(later.holds(0), "zeros, as its own peer has left them");
    drop(a);
    assert!(!from.region.in_use());
}

#[test]
fn a_path_that_ends_during_either_copy_lets_memory_go() {
    for steps in 0..12 {
        let (mut a, mut b) = ends([1, 1]);
        let (from, to) = (Memory::new(1, GPU, 1000, 5), Memory::new(2, GPU, 1000, 0));
        b.expect(0, to.arrival(1)).unwrap();
        a.submit(0, from.departure(1, GPU), &mut None, Instant::now()).unwrap();
        for _ in 0..steps {
            a.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
            b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        }
        if steps % 2 == 0 {
            drop(a);
            // It goes on with what is in its own slot, or is told that the peer is gone.
            for _ in 0..9 {
                let _ = b.progress(&mut None, Instant::now(), &mut Vec::new());
            }
            drop(b);
        } else {
            drop(b);
            drop(a);
        }
        assert!(!from.region.in_use() && !to.region.in_use());
        assert!(to.holds(0) || to.holds(5));
    }
}

#[test]
fn areas_that_were_not_agreed_are_violations() {
    let export = |len: usize| Export {
        kind: ExportKind::CudaIpc,
        handle: [0; 64],
        fd: None,
        base: 4096,
        len: len as u64,
        gpu: emulated::gpu(0),
    };
    let area = |there, here, len| Note::Area { there, here, export: export(len) };
    for (push, notes) in [
        (true, vec![area(GPU, GPU, AREA - 1)]),
        (true, vec![area(GPU, GPU, AREA + 1)]),
        (true, vec![area(Place::gpu(1), GPU, AREA)]),
        (true, vec![area(GPU, GPU, AREA), area(GPU, GPU, AREA)]),
        (true, vec![Note::Share { id: 1, there: GPU, here: GPU, export: export(4096) }]),
        (false, vec![area(GPU, GPU, AREA)]),
    ] {
        let (a, b) = pushing([1, 1], [push; 2]);
        let (a, mut b) = (LocalPath::new(a, bell(), Vec::new()), LocalPath::new(b, bell(), Vec::new()));
        let error = error_after(&notes, &a, &mut b);
        assert!(error.is_some_and(|e| e.kind() == ErrorKind::Protocol), "{push} {notes:?}");
    }
}

#[test]
fn an_area_that_cannot_be_opened_leaves_chunks_to_others() {
    let (a, b) = pushing([1, 1], [true, true]);
    let (a, mut b) = (LocalPath::new(a, bell(), Vec::new()), LocalPath::new(b, bell(), Vec::new()));
    let export = Export { kind: ExportKind::CudaIpc, handle: [0; 64], fd: None, base: 0, len: AREA as u64, gpu: [0; 16] };
    assert!(a.socket.send(&Note::Area { there: GPU, here: GPU, export }.encode(), None).unwrap());
    let from = Memory::new(1, GPU, 100, 5);
    for _ in 0..5 {
        // It is opened when there is something to push.
        assert!(!b.share(&from.region, GPU));
        b.news.store(true, Ordering::Release);
        b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
    }
    assert!(!b.targets.waiting() && !b.share(&from.region, GPU));
}

/// What a descriptor of the peer is shows when it is opened; none of these may end the process, now or when something is written.
#[test]
fn an_area_that_is_no_memory_of_its_length_is_not_pushed_to() {
    let unsealed = || {
        // SAFETY: a terminated name; the descriptor is fresh.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"area".as_ptr(), libc::MFD_ALLOW_SEALING)) };
        // SAFETY: a plain system call.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), AREA as libc::off_t) }, 0);
        fd
    };
    let file = |path| OwnedFd::from(std::fs::File::open(path).unwrap());
    let bad = [
        unsealed(),
        shm::create(c"area", AREA - 4096).unwrap(),
        file("/dev/zero"),
        file("/proc/self/exe"),
        std::os::unix::net::UnixStream::pair().unwrap().0.into(),
    ];
    for fd in bad {
        let (a, b) = pushing([1, 1], [true, true]);
        let (a, mut b) = (LocalPath::new(a, bell(), Vec::new()), LocalPath::new(b, bell(), Vec::new()));
        let what = format!("{fd:?}");
        let kind = ExportKind::SharedMemory;
        let export = Export { kind, handle: [0; 64], fd: Some(fd), base: 4096, len: AREA as u64, gpu: emulated::gpu(0) };
        let note = Note::Area { there: GPU, here: GPU, export };
        assert!(a.socket.send(&note.encode(), note.fd()).unwrap());
        let from = Memory::new(1, GPU, 100, 5);
        for _ in 0..5 {
            assert!(!b.share(&from.region, GPU), "{what}");
            b.news.store(true, Ordering::Release);
            b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        }
        assert!(!b.targets.waiting() && !b.targets.is_open(GPU, GPU), "{what}");
    }
}

/// Simulated: a GPU on which the start of a copy fails after a part of it has begun.
struct HalfStarted(emulated::EmulatedMemory);

impl LocalMemory for HalfStarted {
    fn export(&mut self, place: Place, addr: u64, len: u64) -> Result<Vec<Export>> {
        self.0.export(place, addr, len)
    }
    fn descriptor(&mut self, place: Place, export: &Export) -> Result<OwnedFd> {
        self.0.descriptor(place, export)
    }
    fn open(&mut self, export: &Export, place: Place) -> Result<Mapping> {
        self.0.open(export, place)
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
    let broken = |path: &mut LocalPath| path.device = Some(Box::new(HalfStarted(emulated::EmulatedMemory::new(true))));
    let (from, to) = (Memory::new(1, GPU, 1000, 5), Memory::new(2, GPU, 1000, 0));
    let (mut a, _b) = ends([1, 1]);
    broken(&mut a);
    assert_eq!(a.submit(0, from.departure(1, GPU), &mut None, Instant::now()).unwrap_err().kind(), ErrorKind::Gpu);
    assert!(from.region.in_use());
    drop(a);
    assert!(!from.region.in_use());
    let (mut a, mut b) = ends([1, 1]);
    broken(&mut b);
    a.outbox.tell(7, 1000, &[Extent { addr: 0, len: 1000, export: PUSHED }]).unwrap();
    b.expect(0, to.arrival(7)).unwrap();
    assert_eq!(b.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap_err().kind(), ErrorKind::Gpu);
    assert!(to.region.in_use());
    drop(b);
    assert!(!to.region.in_use());
}

/// Both ends in this process: what keeps the source goes the same way.
#[test]
fn within_a_process_chunks_are_pushed_too() {
    let (a, b) = pushing([1, 1], [true, true]);
    let (mut a, mut b) = (LocalPath::new(a, bell(), Vec::new()), LocalPath::new(b, bell(), Vec::new()));
    let (from, to) = (Memory::new(1, GPU, 1000, 5), Memory::new(2, GPU, 1000, 0));
    b.offer(&to.region);
    for _ in 0..9 {
        for end in [&mut a, &mut b] {
            end.news.store(true, Ordering::Release);
            end.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
        }
    }
    assert!(!a.share(&from.region, GPU), "nobody has said yet that there is something to push");
    a.progress(&mut None, Instant::now(), &mut Vec::new()).unwrap();
    assert!(a.share(&from.region, GPU) && a.shelves.is_some());
    a.submit(0, from.departure(1, GPU), &mut None, Instant::now()).unwrap();
    b.expect(0, to.arrival(1)).unwrap();
    run(&mut a, &mut b, 1).unwrap();
    assert!(to.holds(5) && !from.region.in_use());
}
