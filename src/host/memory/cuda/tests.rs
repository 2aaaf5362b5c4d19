//! On GPUs: memory of another process is pulled byte for byte, what cannot be shared is refused, and nothing that its owner does harms this
//! process. Without a GPU every test says that it was skipped. UCCL_TEST_OWNER_GPUS: what the owner sees (CUDA_VISIBLE_DEVICES).

use super::super::witness::{Witness, WITNESS};
use super::owner::{byte, pattern, Block, Exported, Kind, Owner};
use super::*;
use crate::status::ErrorKind;
use cuda_driver::{sys, Context};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Instant;

const LIMIT: Duration = Duration::from_secs(60);

/// GPUs of an owner: its first and its last.
fn gpus(test: &str) -> Option<Vec<i32>> {
    let own = cuda_driver::device_count();
    if own == 0 {
        eprintln!("SKIPPED: {test} needs a GPU");
        return None;
    }
    let count = std::env::var("UCCL_TEST_OWNER_GPUS").map_or(own, |v| v.split(',').count() as i32);
    Some(if count > 1 { vec![0, count - 1] } else { vec![0] })
}

fn memory() -> CudaMemory {
    CudaMemory::new(CudaOptions { manner: Some(Manner::Pull), ..CudaOptions::default() })
}

/// The other process of [`Owner`].
#[test]
fn owner_process() {
    if std::env::var_os("UCCL_TEST_OWNER").is_some() {
        // SAFETY: no pointers; a parent that dies takes this process along.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        super::owner::serve();
    }
}

/// An owner's memory, mapped.
struct View {
    exported: Exported,
    mappings: Vec<Mapping>,
}

impl View {
    fn open(memory: &mut CudaMemory, exported: Exported, place: Place) -> View {
        View::of(memory, exported, place, None)
    }

    fn of(memory: &mut CudaMemory, exported: Exported, place: Place, owner: Option<Process>) -> View {
        let mappings = exported.exports.iter().map(|e| memory.open(e, place, owner).expect("a mapping")).collect();
        View { exported, mappings }
    }

    /// Pieces for `len` bytes at `offset` of the memory, one an allocation.
    fn pieces(&self, offset: u64, mut dst: u64, mut len: u64, out: &mut Vec<Piece>) {
        let mut at = self.exported.at + offset;
        while len > 0 {
            let holds = |e: &Export| (e.base..e.base + e.len).contains(&at);
            let i = self.exported.exports.iter().position(holds).expect("an export of every byte");
            let (export, mapping) = (&self.exported.exports[i], &self.mappings[i]);
            let n = len.min(export.base + export.len - at);
            out.push(Piece { src: mapping.addr + (at - export.base), dst, len: n });
            (at, dst, len) = (at + n, dst + n, len - n);
        }
    }

    fn close(self, memory: &mut CudaMemory) {
        self.mappings.into_iter().for_each(|m| memory.close(m));
    }
}

fn wait(memory: &mut CudaMemory, pull: Pull) {
    let start = Instant::now();
    while !memory.poll(pull).expect("a pull") {
        assert!(start.elapsed() < LIMIT, "a pull does not end");
    }
}

fn pull(memory: &mut CudaMemory, place: Place, pieces: &[Piece]) {
    // SAFETY: tests pull from open mappings into blocks that they hold, and wait.
    let pull = unsafe { memory.pull(place, pieces) }.expect("a pull");
    wait(memory, pull);
}

/// Pulls all of an owner's memory into a block here and compares.
fn all_comes(memory: &mut CudaMemory, view: &View, len: usize, seed: u64) {
    let block = Block::filled(Kind::Malloc, 0, &vec![0xEE; len]);
    let mut pieces = Vec::new();
    view.pieces(0, block.at, len as u64, &mut pieces);
    pull(memory, Place::gpu(0), &pieces);
    assert!(block.bytes() == pattern(len, seed), "{len} bytes of seed {seed}");
}

/// A number that looks random.
fn mix(i: u64) -> u64 {
    let x = (i ^ 0x5DEE_CE66_D1CE_4E5B).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^ x >> 29
}

#[test]
fn gpu_memory_of_another_process_is_pulled_byte_for_byte() {
    let Some(gpus) = gpus("gpu_memory_of_another_process_is_pulled_byte_for_byte") else { return };
    let (owner, mut memory) = (Owner::new(), memory());
    for gpu in gpus {
        for kind in [Kind::Malloc, Kind::Segments] {
            for (seed, len) in [(1, 1000), (2, 4096), (3, (5 << 20) + 17), (4, 40 << 20)] {
                let exported = owner.allocate(kind, gpu, len, seed);
                assert!(exported.exports.iter().all(|e| memory.reaches(Place::gpu(0), &e.gpu).is_some()));
                let view = View::open(&mut memory, exported, Place::gpu(0));
                all_comes(&mut memory, &view, len, seed);
                let number = view.exported.number;
                view.close(&mut memory);
                owner.free(number);
            }
        }
    }
    assert!(memory.open.is_empty() && !memory.busy());
}

#[test]
fn gpu_connections_with_a_process_share_mappings_and_take_none_for_another() {
    let Some(gpus) = gpus("gpu_connections_with_a_process_share_mappings_and_take_none_for_another") else { return };
    const LEN: usize = 4 << 20;
    let (owner, mut first, mut second) = (Owner::new(), memory(), memory());
    let (place, process) = (Place::gpu(0), Some(Process { pid: 7, witness: Witness { addr: 0, bytes: [7; WITNESS] } }));
    for gpu in gpus {
        for kind in [Kind::Malloc, Kind::Segments] {
            let exported = owner.allocate(kind, gpu, LEN, 1);
            let number = exported.number;
            let one = View::of(&mut first, exported, place, process);
            let two = View::of(&mut second, owner.export_again(gpu), place, process);
            let addresses = |view: &View| view.mappings.iter().map(|mapping| mapping.addr).collect::<Vec<_>>();
            assert_eq!(addresses(&one), addresses(&two), "{kind:?}");
            one.close(&mut first);
            all_comes(&mut second, &two, LEN, 1);
            // What lies at its address next, while a connection has it open.
            owner.free(number);
            let exported = owner.allocate(kind, gpu, LEN, 2);
            let number = exported.number;
            let next = View::of(&mut first, exported, place, process);
            all_comes(&mut first, &next, LEN, 2);
            two.close(&mut second);
            all_comes(&mut first, &next, LEN, 2);
            next.close(&mut first);
            owner.free(number);
        }
    }
}

#[test]
fn gpu_pieces_of_any_alignment_and_length_arrive_and_touch_nothing_else() {
    let Some(gpus) = gpus("gpu_pieces_of_any_alignment_and_length_arrive_and_touch_nothing_else") else { return };
    const LENS: [u64; 16] = [1, 2, 15, 16, 17, 31, 33, 100, 513, 1000, 1024, 1025, 2049, 4096, 4099, 70_001];
    const SRC: u64 = 1 << 20;
    let (owner, mut memory) = (Owner::new(), memory());
    for gpu in gpus {
        let view = View::open(&mut memory, owner.allocate(Kind::Malloc, gpu, SRC as usize, 9), Place::gpu(0));
        // Lists of one length, which the kernel copies in its several ways, and one of all.
        for group in LENS.iter().map(std::slice::from_ref).chain([&LENS[..]]) {
            let (mut pieces, mut expected, mut at) = (Vec::new(), vec![0xEE; 64], 64u64);
            let total: u64 = group.iter().map(|l| l + 16 + 33).sum::<u64>() * 256 + 128;
            let block = Block::new(Kind::Malloc, 0, total as usize);
            for &len in group {
                for (s, d) in (0..16).flat_map(|s| (0..16).map(move |d| (s, d))) {
                    let src = mix(at) % (SRC - len - 32) / 16 * 16 + s;
                    let dst = (at + 33) / 16 * 16 + d;
                    expected.resize(dst as usize, 0xEE);
                    expected.extend((src..src + len).map(|i| byte(i, 9)));
                    view.pieces(src, block.at + dst, len, &mut pieces);
                    at = dst + len;
                }
            }
            expected.resize(total as usize, 0xEE);
            block.store(&vec![0xEE; total as usize]);
            pieces.sort_by_key(|p| mix(p.dst));
            pull(&mut memory, Place::gpu(0), &pieces);
            assert!(block.bytes() == expected, "lengths {group:?} from GPU {gpu}");
        }
    }
}

#[test]
fn gpu_lists_of_a_million_pieces_end() {
    let Some(gpus) = gpus("gpu_lists_of_a_million_pieces_end") else { return };
    let (owner, mut memory) = (Owner::new(), memory());
    let gpu = gpus[gpus.len() - 1];
    for (count, len) in [(100_000u64, 512u64), (1_000_000, 16)] {
        let total = count * len;
        let view = View::open(&mut memory, owner.allocate(Kind::Malloc, gpu, total as usize, count), Place::gpu(0));
        let block = Block::filled(Kind::Malloc, 0, &vec![0xEE; total as usize]);
        // A permutation: count is no multiple of the step.
        let from = |i: u64| i * 7919 % count;
        let mapping = view.mappings[0].addr + (view.exported.at - view.exported.exports[0].base);
        let pieces: Vec<Piece> =
            (0..count).map(|i| Piece { src: mapping + from(i) * len, dst: block.at + i * len, len }).collect();
        let start = Instant::now();
        pull(&mut memory, Place::gpu(0), &pieces);
        eprintln!("{count} pieces of {len} bytes: {:.0} us", start.elapsed().as_secs_f64() * 1e6);
        let got = block.bytes();
        for i in (0..count).step_by(997).chain([count - 1]) {
            let (at, src) = ((i * len) as usize, from(i) * len);
            let expected: Vec<u8> = (src..src + len).map(|b| byte(b, count)).collect();
            assert!(got[at..at + len as usize] == expected, "piece {i} of {count}");
        }
        let number = view.exported.number;
        view.close(&mut memory);
        owner.free(number);
    }
}

#[test]
fn gpu_memory_that_cannot_be_shared_is_refused() {
    let Some(_) = gpus("gpu_memory_that_cannot_be_shared_is_refused") else { return };
    let mut memory = memory();
    for kind in [Kind::Closed, Kind::Pool, Kind::Managed] {
        let block = Block::new(kind, 0, 3 << 20);
        let refused = memory.export(Place::gpu(0), block.at, block.len as u64).expect_err("no export");
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{kind:?}: {refused}");
        eprintln!("{kind:?}: {refused}");
    }
    assert!(memory.export(Place::gpu(0), 0x1000, 100).is_err());
    let block = Block::new(Kind::Malloc, 0, 3 << 20);
    assert!(memory.export(Place::gpu(0), block.at, 4 << 30).is_err());
    assert_eq!(memory.export(Place::gpu(0), block.at + 5, 100).expect("an export").len(), 1);
}

#[test]
fn gpu_lies_about_an_allocation_are_errors_and_harm_nothing() {
    let Some(gpus) = gpus("gpu_lies_about_an_allocation_are_errors_and_harm_nothing") else { return };
    let (owner, mut memory) = (Owner::new(), memory());
    let mut failed = |mut exported: Exported, lie: &dyn Fn(&mut Export)| {
        lie(&mut exported.exports[0]);
        let error = memory.open(&exported.exports[0], Place::gpu(0), None).expect_err("a lie");
        eprintln!("{error}");
    };
    for &gpu in &gpus {
        for kind in [Kind::Malloc, Kind::Segments] {
            owner.allocate(kind, gpu, 2 << 20, 1);
            failed(owner.export_again(gpu), &|e| e.len += 2 << 20);
            failed(owner.export_again(gpu), &|e| e.len = u64::MAX);
            failed(owner.export_again(gpu), &|e| {
                e.fd = if e.fd.is_some() { None } else { std::fs::File::open("/dev/zero").ok().map(Into::into) }
            });
        }
        owner.allocate(Kind::Segments, gpu, 2 << 20, 1);
        failed(owner.export_again(gpu), &|e| e.len = 0);
        failed(owner.export_again(gpu), &|e| e.len = 4097);
        failed(owner.export_again(gpu), &|e| e.fd = std::fs::File::open("/dev/zero").ok().map(Into::into));
        owner.allocate(Kind::Malloc, gpu, 2 << 20, 1);
        failed(owner.export_again(gpu), &|e| e.handle = [0; 64]);
        failed(owner.export_again(gpu), &|e| e.handle = [0xFF; 64]);
    }
    for i in 0..64 {
        // A handle with one byte changed opens or does not; either way this process goes on.
        let mut exported = owner.export_again(gpus[gpus.len() - 1]);
        exported.exports[0].handle[i] ^= 0x41;
        if let Ok(mapping) = memory.open(&exported.exports[0], Place::gpu(0), None) {
            eprintln!("byte {i} of a handle says nothing");
            memory.close(mapping);
        }
    }
    ended();
    let view = View::open(&mut memory, owner.export_again(gpus[gpus.len() - 1]), Place::gpu(0));
    all_comes(&mut memory, &view, 2 << 20, 1);
}

#[test]
fn gpu_handles_of_freed_memory_and_of_dead_owners_are_errors() {
    let Some(gpus) = gpus("gpu_handles_of_freed_memory_and_of_dead_owners_are_errors") else { return };
    let mut memory = memory();
    for gpu in gpus {
        let owner = Owner::new();
        let freed = owner.allocate(Kind::Malloc, gpu, 8 << 20, 1);
        owner.free(freed.number);
        eprintln!("freed: {}", memory.open(&freed.exports[0], Place::gpu(0), None).expect_err("freed memory"));
        let orphaned = owner.allocate(Kind::Malloc, gpu, 8 << 20, 2);
        let unused = owner.allocate(Kind::Segments, gpu, 4 << 20, 4);
        drop(owner);
        eprintln!("dead: {}", memory.open(&orphaned.exports[0], Place::gpu(0), None).expect_err("a dead owner"));
        // A descriptor keeps what it names.
        let view = View::open(&mut memory, unused, Place::gpu(0));
        all_comes(&mut memory, &view, 4 << 20, 4);
        view.close(&mut memory);
        let owner = Owner::new();
        let view = View::open(&mut memory, owner.allocate(Kind::Malloc, gpu, 8 << 20, 3), Place::gpu(0));
        all_comes(&mut memory, &view, 8 << 20, 3);
        view.close(&mut memory);
    }
}

/// Memory that is freed and allocated again at the same place has another handle, even while the old one is open.
#[test]
fn gpu_new_memory_at_an_old_place_is_not_taken_for_the_old() {
    let Some(gpus) = gpus("gpu_new_memory_at_an_old_place_is_not_taken_for_the_old") else { return };
    let (owner, mut memory) = (Owner::new(), memory());
    for gpu in gpus {
        for kind in [Kind::Malloc, Kind::Segments] {
            let mut old: Vec<View> = Vec::new();
            for seed in 0..6 {
                let view = View::open(&mut memory, owner.allocate(kind, gpu, 6 << 20, seed), Place::gpu(0));
                all_comes(&mut memory, &view, 6 << 20, seed);
                owner.free(view.exported.number);
                let again = old.iter().filter(|v| v.exported.at == view.exported.at).count();
                eprintln!("{kind:?} on GPU {gpu}: at {:#x}, {again} times before", view.exported.at);
                old.push(view);
            }
            // Mappings outlive their memory's end.
            for (seed, view) in old.into_iter().enumerate() {
                all_comes(&mut memory, &view, 6 << 20, seed as u64);
                view.close(&mut memory);
            }
        }
    }
}

#[test]
fn gpu_owners_that_die_stop_or_free_during_a_pull_harm_nobody() {
    let Some(gpus) = gpus("gpu_owners_that_die_stop_or_free_during_a_pull_harm_nobody") else { return };
    const LEN: usize = 256 << 20;
    let place = Place::gpu(0);
    let block = Block::new(Kind::Malloc, 0, LEN);
    for gpu in gpus {
        for kind in [Kind::Malloc, Kind::Segments] {
            for event in ["kill", "stop", "free"] {
                let (owner, mut memory) = (Owner::new(), memory());
                block.store(&vec![0xEE; LEN]);
                let view = View::open(&mut memory, owner.allocate(kind, gpu, LEN, 77), place);
                // Blocks of 4 KiB in another order, and the whole once more, so often that the event comes in between.
                let (mut whole, mut pieces) = (Vec::new(), Vec::new());
                view.pieces(0, block.at, LEN as u64, &mut whole);
                for i in 0..LEN as u64 / 4096 {
                    let at = i * 4099 % (LEN as u64 / 4096) * 4096;
                    view.pieces(at, block.at + at, 4096, &mut pieces);
                }
                // SAFETY: the mappings are open and the block stays until the pulls have ended; all write the same bytes.
                let mut start = |list| unsafe { memory.pull(place, list) }.expect("a pull");
                let pulls: Vec<Pull> = (0..60).map(|i| start(if i % 2 == 0 { &pieces } else { &whole })).collect();
                match event {
                    "kill" => owner.signal(libc::SIGKILL),
                    "stop" => owner.signal(libc::SIGSTOP),
                    _ => owner.free(view.exported.number),
                }
                let left = pulls.iter().filter(|p| !memory.poll(**p).expect("a pull")).copied().collect::<Vec<_>>();
                eprintln!("{event}, {kind:?} on GPU {gpu}: {} pulls were under way", left.len());
                left.into_iter().for_each(|p| wait(&mut memory, p));
                assert!(block.bytes() == pattern(LEN, 77), "{event}");
                all_comes(&mut memory, &view, LEN, 77);
                view.close(&mut memory);
                drop(owner);
                let owner = Owner::new();
                let view = View::open(&mut memory, owner.allocate(kind, gpu, 5000, 3), place);
                all_comes(&mut memory, &view, 5000, 3);
            }
        }
    }
}

/// What NVML says of GPUs, which it knows by their UUIDs, is what CUDA says of those that it shows.
#[test]
fn gpu_links_are_known_by_uuid() {
    let Some(_) = gpus("gpu_links_are_known_by_uuid") else { return };
    let uuid = |ordinal| cuda_driver::uuid_of(ordinal).expect("a UUID");
    let count = cuda_driver::device_count();
    for (a, b) in (0..count).flat_map(|a| (0..count).map(move |b| (a, b))).filter(|(a, b)| a != b) {
        let (link, nvml) = (cuda_driver::link(a, b).expect("a link"), cuda_driver::joined_by_nvlink(&uuid(a), &uuid(b)));
        eprintln!("GPU {a} and {b}: {link:?}; joined by NVLink: {nvml:?}");
        assert!(nvml.is_none() || nvml == Some(link == Link::Fast));
        assert_eq!(manner_by_nvlink(a, &uuid(b)) == Manner::Push, nvml == Some(false));
        let memory = CudaMemory::new(CudaOptions::default());
        assert_eq!(memory.by_nvlink(Place::gpu(a as u8), &uuid(b)), nvml == Some(true) || nvml.is_none() && link == Link::Fast);
        assert!(!memory.by_nvlink(Place::gpu(a as u8), &uuid(a)), "a GPU and itself");
    }
}

/// Memory of any kind is pushed: only the area is mapped by another process.
#[test]
fn gpu_memory_of_every_kind_is_pushed_byte_for_byte() {
    let Some(gpus) = gpus("gpu_memory_of_every_kind_is_pushed_byte_for_byte") else { return };
    const AREA: usize = 8 << 20;
    let mut memory = CudaMemory::new(CudaOptions { manner: Some(Manner::Push), ..CudaOptions::default() });
    let area = memory.area(Place::gpu(0), AREA).expect("an area");
    for gpu in gpus {
        for (seed, kind) in [Kind::Malloc, Kind::Segments, Kind::Closed, Kind::Pool].into_iter().enumerate() {
            let owner = Owner::new();
            let export = memory.export_area(&area).expect("an export");
            assert_eq!(memory.reaches(Place::gpu(0), &export.gpu), Some(Manner::Push));
            assert!(owner.open_area(gpu, &export), "GPU {gpu}");
            for len in [1, 4099, AREA] {
                let seed = (seed * AREA + len) as u64;
                owner.allocate(kind, gpu, len, seed);
                owner.push(2);
                owner.pushed();
                let block = Block::filled(Kind::Malloc, 0, &vec![0xEE; len + 1]);
                let piece = |i: u64| Piece { src: area.addr + i, dst: block.at + i, len: 512.min(len as u64 - i) };
                let pieces: Vec<Piece> = (0..len).step_by(512).map(|i| piece(i as u64)).rev().collect();
                pull(&mut memory, Place::gpu(0), &pieces);
                let bytes = block.bytes();
                assert!(bytes[..len] == pattern(len, seed) && bytes[len] == 0xEE, "{len} bytes of {kind:?} of GPU {gpu}");
            }
        }
    }
    memory.drop_area(area);
}

/// What a source writes after the area was given back, while it dies, or when it goes on after a stop, reaches no process's memory.
#[test]
fn gpu_sources_that_write_late_reach_nobody() {
    let Some(gpus) = gpus("gpu_sources_that_write_late_reach_nobody") else { return };
    const AREA: usize = 32 << 20;
    let mut memory = memory();
    let zeros = |memory: &mut CudaMemory, area: &Area| {
        let block = Block::filled(Kind::Malloc, 0, &vec![0xEE; AREA]);
        pull(memory, Place::gpu(0), &[Piece { src: area.addr, dst: block.at, len: AREA as u64 }]);
        assert!(block.bytes().iter().all(|&b| b == 0));
    };
    for gpu in gpus {
        for event in ["kill", "stop", "nothing"] {
            let owner = Owner::new();
            let area = memory.area(Place::gpu(0), AREA).expect("an area");
            assert!(owner.open_area(gpu, &memory.export_area(&area).expect("an export")));
            owner.allocate(Kind::Malloc, gpu, AREA, 5);
            owner.push(100);
            match event {
                "kill" => owner.signal(libc::SIGKILL),
                "stop" => owner.signal(libc::SIGSTOP),
                _ => {}
            }
            memory.drop_area(area);
            ended();
            // As much as was given back, several times over.
            let next: Vec<Area> = (0..4).map(|_| memory.area(Place::gpu(0), AREA).expect("an area")).collect();
            if event == "stop" {
                owner.signal(libc::SIGCONT);
            }
            if event != "kill" {
                owner.push(100);
                owner.pushed();
            }
            next.iter().for_each(|area| zeros(&mut memory, area));
            next.into_iter().for_each(|area| memory.drop_area(area));
            ended();
        }
    }
}

#[test]
fn gpu_connections_open_the_same_memory_side_by_side() {
    let Some(gpus) = gpus("gpu_connections_open_the_same_memory_side_by_side") else { return };
    let (owner, places) = (Owner::new(), [0, cuda_driver::device_count() - 1].map(|i| Place::gpu(i as u8)));
    for gpu in gpus {
        for kind in [Kind::Malloc, Kind::Segments] {
            let (mut first, mut second) = (memory(), memory());
            let exported = owner.allocate(kind, gpu, 9 << 20, 5);
            let here = View::open(&mut first, exported, places[0]);
            let there = View::open(&mut second, owner.export_again(gpu), places[0]);
            // Into another GPU of this process, if it has one.
            let beside = View::open(&mut second, owner.export_again(gpu), places[1]);
            here.close(&mut first);
            drop(first);
            all_comes(&mut second, &there, 9 << 20, 5);
            there.close(&mut second);
            let block = Block::filled(Kind::Malloc, places[1].ordinal().unwrap_or(0).into(), &vec![0xEE; 9 << 20]);
            let mut pieces = Vec::new();
            beside.pieces(0, block.at, 9 << 20, &mut pieces);
            pull(&mut second, places[1], &pieces);
            assert!(block.bytes() == pattern(9 << 20, 5));
        }
    }
}

/// An application that captures graphs in global mode on a thread of its own.
fn capturing(stop: &AtomicBool, captures: &AtomicU32) {
    let context = Context::retain(0).expect("context");
    let stream = cuda_driver::Stream::new(&context).expect("stream");
    let _current = context.enter().expect("context");
    let driver = cuda_driver::driver().expect("driver");
    while !stop.load(Ordering::SeqCst) {
        let mut graph = std::ptr::null_mut();
        let cuda = driver.relaxed();
        let mut strict = sys::CAPTURE_GLOBAL;
        // SAFETY: outputs are writable, the stream is live; the graph is destroyed once.
        unsafe {
            cuda.cuThreadExchangeStreamCaptureMode(&mut strict).expect("mode");
            cuda.cuStreamBeginCapture(stream.raw(), sys::CAPTURE_GLOBAL).expect("begin of a capture");
            std::thread::sleep(Duration::from_millis(3));
            cuda.cuStreamEndCapture(stream.raw(), &mut graph).expect("end of a capture");
            if !graph.is_null() {
                cuda.cuGraphDestroy(graph).expect("graph");
            }
        }
        captures.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn gpu_captures_in_global_mode_neither_fail_nor_break_pulls() {
    let Some(gpus) = gpus("gpu_captures_in_global_mode_neither_fail_nor_break_pulls") else { return };
    let (stop, captures) = (AtomicBool::new(false), AtomicU32::new(0));
    let (owner, block, source) = (Owner::new(), Block::new(Kind::Malloc, 0, 6 << 20), Block::new(Kind::Malloc, 0, 3 << 20));
    let shared = Block::new(Kind::Segments, 0, 3 << 20);
    let exported: Vec<Exported> =
        gpus.iter().flat_map(|&gpu| [Kind::Malloc, Kind::Segments].map(|kind| owner.allocate(kind, gpu, 6 << 20, 1))).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| capturing(&stop, &captures));
        while captures.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        for _ in 0..10 {
            let mut memory = memory();
            for e in &exported {
                let mappings: Vec<Mapping> =
                    e.exports.iter().map(|e| memory.open(e, Place::gpu(0), None).expect("a mapping")).collect();
                let mut pieces = Vec::new();
                for (export, mapping) in e.exports.iter().zip(&mappings) {
                    pieces.push(Piece {
                        src: mapping.addr,
                        dst: block.at + (export.base - e.exports[0].base),
                        len: export.len.min(2 << 20),
                    });
                }
                pull(&mut memory, Place::gpu(0), &pieces);
                mappings.into_iter().for_each(|m| memory.close(m));
            }
            for own in [&source, &shared] {
                memory.export(Place::gpu(0), own.at, own.len as u64).expect("an export");
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(captures.load(Ordering::SeqCst) > 2);
}

/// Work of the application that occupies the legacy default stream until it is ended.
struct Busy(Arc<[AtomicBool; 2]>);

/// The application's work lasts this long at most; whatever waits for it waits as long.
const BUSY_LIMIT: Duration = Duration::from_secs(5);

unsafe extern "C" fn hold(argument: *mut std::ffi::c_void) {
    // SAFETY: the Arc was given up for this call.
    let state = unsafe { Arc::from_raw(argument.cast_const().cast::<[AtomicBool; 2]>()) };
    let start = Instant::now();
    while !state[0].load(Ordering::SeqCst) && start.elapsed() < BUSY_LIMIT {
        std::thread::sleep(Duration::from_millis(1));
    }
    state[1].store(true, Ordering::SeqCst);
}

impl Busy {
    /// The legacy default stream.
    fn new(ordinal: i32) -> Busy {
        Busy::on(std::ptr::null_mut(), ordinal)
    }

    fn on(stream: sys::CUstream, ordinal: i32) -> Busy {
        let context = Context::retain(ordinal).expect("context");
        let state = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let argument = Arc::into_raw(state.clone()).cast_mut().cast();
        // SAFETY: the function takes the Arc back; the stream is of this context, null its default one.
        unsafe { context.enter().expect("context").cuLaunchHostFunc(stream, hold, argument) }.expect("host function");
        Busy(state)
    }

    fn passed(&self, what: &str, since: Instant) -> bool {
        let waited = self.0[1].load(Ordering::SeqCst);
        eprintln!(
            "{what}: {:.3} ms{}",
            since.elapsed().as_secs_f64() * 1e3,
            if waited { ", WAITED for the default stream" } else { "" }
        );
        !waited
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0[0].store(true, Ordering::SeqCst);
        while !self.0[1].load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }
}

/// Nothing waits for the application's default stream: not opening, not pulling, not exporting, not closing.
#[test]
fn gpu_a_busy_default_stream_delays_nothing() {
    let Some(gpus) = gpus("gpu_a_busy_default_stream_delays_nothing") else { return };
    let owner = Owner::new();
    let block = Block::new(Kind::Malloc, 0, 6 << 20);
    let own = [Block::new(Kind::Malloc, 0, 6 << 20), Block::new(Kind::Segments, 0, 6 << 20)];
    let mut good = true;
    for gpu in gpus {
        for kind in [Kind::Malloc, Kind::Segments] {
            let exported = owner.allocate(kind, gpu, 6 << 20, 1);
            let mut memory = memory();
            // What is made once for each process and GPU is there.
            memory.unit(Place::gpu(0)).expect("a unit");
            let step = |what: &str, body: &mut dyn FnMut()| {
                let (busy, start) = (Busy::new(0), Instant::now());
                body();
                busy.passed(&format!("{kind:?} on GPU {gpu}: {what}"), start)
            };
            let mut view = None;
            let mut exported = Some(exported);
            good &= step("open", &mut || view = exported.take().map(|e| View::open(&mut memory, e, Place::gpu(0))));
            let view = view.expect("a view");
            let mut pieces = Vec::new();
            view.pieces(0, block.at, 6 << 20, &mut pieces);
            good &= step("pull", &mut || pull(&mut memory, Place::gpu(0), &pieces));
            let mut view = Some(view);
            good &= step("close", &mut || view.take().into_iter().for_each(|v| v.close(&mut memory)));
            ended();
            good &= step("end", &mut || memory = super::tests::memory());
            ended();
            for block in &own {
                good &=
                    step("export", &mut || drop(memory.export(Place::gpu(0), block.at, block.len as u64).expect("an export")));
            }
        }
    }
    assert!(good);
}

/// Waits until no mapping is left to be ended.
fn ended() {
    while !crate::gpu::nothing_is_closed() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Ending a mapping waits for the application, and holds up others: it is not done while something is pulled.
#[test]
fn gpu_closing_holds_up_no_pulls() {
    let Some(gpus) = gpus("gpu_closing_holds_up_no_pulls") else { return };
    const LEN: usize = 6 << 20;
    let (owner, block, mut good) = (Owner::new(), Block::new(Kind::Malloc, 0, LEN), true);
    for gpu in gpus {
        for legacy in [true, false] {
            let (mut closing, mut memory) = (memory(), memory());
            let view = View::open(&mut closing, owner.allocate(Kind::Malloc, gpu, LEN, 1), Place::gpu(0));
            let used = View::open(&mut memory, owner.allocate(Kind::Malloc, gpu, LEN, 2), Place::gpu(0));
            let mut pieces = Vec::new();
            used.pieces(0, block.at, LEN as u64, &mut pieces);
            pull(&mut memory, Place::gpu(0), &pieces);
            let busy = Busy::on(if legacy { std::ptr::null_mut() } else { block.stream.raw() }, 0);
            view.close(&mut closing);
            let start = Instant::now();
            let mut count = 0;
            while start.elapsed() < Duration::from_secs(1) {
                pull(&mut memory, Place::gpu(0), &pieces);
                count += 1;
            }
            good &= busy.passed(&format!("GPU {gpu}, default stream {legacy}: {count} pulls"), start);
            if !legacy {
                // What the driver waits for, for the record: work of any stream.
                std::thread::sleep(Duration::from_millis(200));
                let start = Instant::now();
                drop(cuda_driver::Stream::new(block.stream.context()).expect("a stream"));
                eprintln!("a stream is made in {:.1} ms while a mapping ends", start.elapsed().as_secs_f64() * 1e3);
            }
            drop(busy);
            ended();

            block.store(&vec![0; LEN]);
            pull(&mut memory, Place::gpu(0), &pieces);
            assert!(block.bytes() == pattern(LEN, 2));
        }
    }
    assert!(good);
}
