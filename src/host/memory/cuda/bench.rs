//! How fast memory of another process is pulled, beside the copy engine; prints a table. UCCL_TEST_BENCH=1 runs it.

use super::owner::{Block, Kind, Owner};
use super::*;
use crate::benchmarks::{median_and_least, wanted};
use cuda_driver::Stream;
use std::collections::VecDeque;
use std::time::Instant;

const MIB: u64 = 1 << 20;

/// Median and least time of `body` in microseconds.
fn timed(rounds: usize, mut body: impl FnMut()) -> (f64, f64) {
    (0..rounds / 5 + 1).for_each(|_| body());
    let times = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            body();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    median_and_least(times)
}

fn line(what: &str, bytes: u64, (median, least): (f64, f64)) {
    println!("{what:<46} {bytes:>10} B {median:>9.1} us {least:>9.1} us {:>8.1} GB/s", bytes as f64 / median / 1e3);
}

/// Blocks in an order of their own on either side.
fn scattered(src: u64, dst: u64, total: u64, block: u64) -> Vec<Piece> {
    let count = total / block;
    let place = |i: u64, step: u64| if count > 1 { i * step % count * block } else { 0 };
    // Steps that share no factor with a power of two, nor with 656.
    (0..count).map(|i| Piece { src: src + place(i, 7919), dst: dst + place(i, 104_729), len: block }).collect()
}

/// Pulls lists one after another, as many at once as `depth`.
fn pull_lists(memory: &mut CudaMemory, lists: &[&[Piece]], depth: usize) {
    let mut under_way = VecDeque::new();
    for list in lists {
        // SAFETY: the mapping is open and the block held until the pulls have ended.
        under_way.push_back(unsafe { memory.pull(Place::gpu(0), list) }.expect("a pull"));
        while under_way.len() >= depth && memory.poll(under_way[0]).expect("a pull") || under_way.len() > 64 {
            under_way.pop_front();
        }
    }
    for pull in under_way {
        while !memory.poll(pull).expect("a pull") {
            std::hint::spin_loop();
        }
    }
}

/// Where the time of a small pull goes: one byte off the alignment takes the larger kernel, and an application that works in between
/// takes the caches.
fn starts(memory: &mut CudaMemory, name: &str, src: u64, dst: u64) {
    let mut junk = vec![0u64; 1 << 20];
    for (what, offset, cold) in [("4096", 0, false), ("4096, off by 1", 1, false), ("4096, cold", 0, true)] {
        let list = [Piece { src: src + offset, dst, len: 4096 }];
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for _ in 0..1000 {
            if cold {
                junk.iter_mut().step_by(8).for_each(|word| *word += 1);
                std::hint::black_box(&junk);
            }
            let begin = Instant::now();
            // SAFETY: the mapping is open and the block held until the pull has ended.
            let pull = unsafe { memory.pull(Place::gpu(0), &list) }.expect("a pull");
            starts.push(begin.elapsed().as_nanos());
            while !memory.poll(pull).expect("a pull") {}
            ends.push(begin.elapsed().as_nanos());
        }
        starts.sort_unstable();
        ends.sort_unstable();
        println!("{name}, {what}: started after {} ns, over after {} ns", starts[500], ends[500]);
    }
}

fn measure(memory: &mut CudaMemory, name: &str, src: u64, dst: u64) {
    for (total, block) in [(256 * MIB, 32 << 10), (64 * MIB, 32 << 10), (64 * MIB, 4 << 10), (64 * MIB, 1 << 10), (656 * 16, 16)]
    {
        let list = scattered(src, dst, total, block);
        line(&format!("{name}, blocks of {block}"), total, timed(40, || pull_lists(memory, &[&list], 1)));
        for chunk in [1024usize, 4096] {
            if list.len() > 4 * chunk {
                let lists: Vec<&[Piece]> = list.chunks(chunk).collect();
                line(&format!("{name}, blocks of {block}, {chunk} a pull"), total, timed(40, || pull_lists(memory, &lists, 8)));
            }
        }
    }
    starts(memory, name, src, dst);
    for len in [16, 4 << 10, 16 << 10, 64 << 10, 512 << 10, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB, 256 * MIB] {
        let list = [Piece { src, dst, len }];
        line(&format!("{name}, one piece"), len, timed(if len > 8 * MIB { 40 } else { 400 }, || pull_lists(memory, &[&list], 1)));
    }
    for (total, chunk) in [
        (64 * MIB, 2 * MIB),
        (64 * MIB, 8 * MIB),
        (64 * MIB, 16 * MIB),
        (64 * MIB, 32 * MIB),
        (256 * MIB, 8 * MIB),
        (256 * MIB, 64 * MIB),
    ] {
        let list: Vec<[Piece; 1]> =
            (0..total / chunk).map(|i| [Piece { src: src + i * chunk, dst: dst + i * chunk, len: chunk }]).collect();
        let lists: Vec<&[Piece]> = list.iter().map(|l| &l[..]).collect();
        line(&format!("{name}, pieces of {} MiB", chunk / MIB), total, timed(40, || pull_lists(memory, &lists, 8)));
    }
}

fn engine(name: &str, src: u64, dst: u64, stream: &Stream) {
    for len in [4 << 10, 64 << 10, MIB, 4 * MIB, 8 * MIB, 64 * MIB, 256 * MIB] {
        let copy = || {
            // SAFETY: both ranges are held; the copy is waited for.
            unsafe { stream.device_to_device(dst, src, len as usize) }.expect("a copy");
            while !stream.idle().expect("a copy") {}
        };
        line(name, len, timed(if len > 8 * MIB { 40 } else { 400 }, copy));
    }
}

#[test]
fn gpu_benchmark() {
    if cuda_driver::device_count() == 0 {
        eprintln!("SKIPPED: gpu_benchmark needs a GPU");
        return;
    }
    if !wanted("gpu_benchmark") {
        return;
    }
    let (owner, last) = (Owner::new(), cuda_driver::device_count() - 1);
    let block = Block::new(Kind::Malloc, 0, 256 << 20);
    println!("{:<46} {:>12} {:>12} {:>12} {:>13}", "what", "bytes", "median", "least", "of median");
    for gpu in if last > 0 { vec![last, 0] } else { vec![0] } {
        let exported = owner.allocate(Kind::Malloc, gpu, 256 << 20, 1);
        for (blocks, engine_from) in
            if gpu == 0 { vec![(66, 4 * MIB)] } else { vec![(66, 4 * MIB), (66, 1 << 30), (44, 4 * MIB)] }
        {
            let mut memory = CudaMemory::new(CudaOptions {
                pulls: PullOptions { blocks, engine: engine_from, ..PullOptions::default() },
                manner: Some(Manner::Pull),
            });
            let mapping = memory.open(&exported.exports[0], Place::gpu(0), None).expect("a mapping");
            let name = format!("GPU {gpu} to 0, {blocks} blocks, engine {} MiB", engine_from / MIB);
            measure(&mut memory, &name, mapping.addr, block.at);
            if (blocks, engine_from) == (66, 4 * MIB) {
                engine(&format!("GPU {gpu} to 0, copy engine"), mapping.addr, block.at, &block.stream);
            }
            memory.close(mapping);
        }
        // Small ones by the kernel, beside the copy engine above.
        let pulls = PullOptions { few_runs: 0, ..PullOptions::default() };
        let mut memory = CudaMemory::new(CudaOptions { pulls, manner: Some(Manner::Pull) });
        let mapping = memory.open(&exported.exports[0], Place::gpu(0), None).expect("a mapping");
        for len in [16, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10] {
            let list = [Piece { src: mapping.addr, dst: block.at, len }];
            line(&format!("GPU {gpu} to 0, one piece, by the kernel"), len, timed(400, || pull_lists(&mut memory, &[&list], 1)));
        }
        starts(&mut memory, &format!("GPU {gpu} to 0, by the kernel"), mapping.addr, block.at);
        memory.close(mapping);
        owner.free(exported.number);
    }
}
