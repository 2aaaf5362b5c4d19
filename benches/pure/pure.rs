//! The pure parts of a transfer, without a network: the chunk plan of 16,384 segments, frames of the control stream, and region lookup
//! among 10,000 regions.

use criterion::{BatchSize, Criterion, Throughput};
use std::hint::black_box;
use std::time::Duration;
use uccl_p2p::bench_api::{decode, OwnFrame, Plan};
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::Engine;

const SEGMENTS: u64 = 16_384;
const REGIONS: usize = 10_000;
/// From one region of 64 bytes to the next: with a gap, so that each is one of its own.
const STRIDE: usize = 128;

fn chunk_plan(c: &mut Criterion) {
    let plan = Plan::scattered(SEGMENTS, 4096);
    let mut group = c.benchmark_group("chunk plan");
    group.throughput(Throughput::Elements(SEGMENTS));
    group.bench_function("16384 segments of 4 KiB", |b| b.iter(|| black_box(&plan).cut(512 << 10)));
    group.finish();
}

fn frames(c: &mut Criterion) {
    for (name, frame) in [("write of 16384 segments", OwnFrame::write(SEGMENTS)), ("16 chunks", OwnFrame::chunks(16))] {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let mut group = c.benchmark_group("frame");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        let len = bytes.len();
        group.bench_function(format!("encode {name}"), |b| {
            b.iter_batched_ref(|| Vec::with_capacity(len), |out| black_box(&frame).encode(out), BatchSize::SmallInput)
        });
        group.bench_function(format!("decode {name}"), |b| b.iter(|| decode(black_box(&bytes))));
        group.finish();
    }
}

fn regions(c: &mut Criterion) {
    std::env::set_var("NCCL_SOCKET_IFNAME", "lo");
    let config = Config::from_env().expect("the environment is understood");
    let engine = Engine::new(Config { plugin: PluginChoice::Soft, port: 0, ..config }).expect("engine");
    let memory = vec![0u8; REGIONS * STRIDE];
    let base = memory.as_ptr() as usize;
    let ids: Vec<u64> = (0..REGIONS).map(|i| engine.register(base + STRIDE * i, 64).expect("register")).collect();
    let mut group = c.benchmark_group("among 10000 regions");
    let mut at = 0;
    group.bench_function("region of an id, bounds, FIFO item", |b| {
        b.iter(|| {
            at = (at + 7919) % REGIONS;
            engine.fifo_item(ids[at], base + STRIDE * at, 64).expect("registered")
        })
    });
    group.bench_function("is an address registered", |b| {
        b.iter(|| {
            at = (at + 7919) % REGIONS;
            engine.is_registered(black_box(base + STRIDE * at))
        })
    });
    group.finish();
    engine.shutdown();
}

fn main() {
    let (warm_up, measurement) = (Duration::from_millis(500), Duration::from_secs(2));
    let mut c = Criterion::default().warm_up_time(warm_up).measurement_time(measurement).configure_from_args();
    chunk_plan(&mut c);
    frames(&mut c);
    regions(&mut c);
    c.final_summary();
}
