//! The engine as a guest on the application's GPU: every kind of memory, while graphs are captured, while the default stream is busy.
//! Needs a GPU: UCCL_TEST_MEMORY=gpu.

mod local;
mod memory;

use cuda_driver::sys;
use local::pair;
use memory::{Memory, Place};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, LocalSegment};

/// Whether the test can run.
fn gpu(test: &str) -> bool {
    if !memory::gpus_wanted() {
        eprintln!("SKIPPED: {test} needs a GPU and UCCL_TEST_MEMORY=gpu");
    }
    memory::gpus_wanted()
}

fn engine() -> Arc<Engine> {
    engine_with(|_| ())
}

fn engine_with(change: impl FnOnce(&mut Config)) -> Arc<Engine> {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        for (name, value) in
            [("UCCL_TCPX_SOFT_STRICT", "1"), ("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo")]
        {
            // SAFETY: before any engine exists; tests wait for this Once.
            unsafe { std::env::set_var(name, value) };
        }
        // SAFETY: as above.
        unsafe { std::env::set_var("STRICT_FOREIGN_COUNTERS", counters()) };
    });
    let mut config = Config { plugin: PluginChoice::Soft, ..Config::from_env().expect("configuration") };
    change(&mut config);
    Engine::new(config).expect("engine")
}

/// Where the strict foreign plugin counts.
fn counters() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("uccl-gpu-engine-{}", std::process::id()))
}

/// Receive memories that the strict foreign plugin imported, and messages that it brought: places in its `rules::Counters`.
fn foreign_counts() -> [u64; 2] {
    let bytes = std::fs::read(counters()).expect("the counters of the strict foreign plugin");
    [5, 14].map(|i: usize| bytes[i * 8..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b)))
}

/// Of device memory TCP what needs no NIC: dma-bufs over the bounce area, and a pattern that the GPU writes there and reads.
#[test]
fn the_area_of_device_memory_tcp_is_exported_and_carries_a_pattern() {
    if !gpu("the export of GPU memory to NICs") {
        return;
    }
    memory::enter(0);
    let config = Config { plugin: PluginChoice::Soft, ..Config::from_env().expect("configuration") };
    uccl_p2p::engine::try_device_memory_export(&config).expect("dma-bufs over GPU memory, and the pattern");
}

struct Buffer {
    memory: Memory,
    mr: u64,
    item: FifoItem,
}

impl Buffer {
    fn new(engine: &Engine, place: Place, bytes: Vec<u8>) -> Buffer {
        let len = bytes.len();
        let memory = Memory::new(place, bytes);
        Buffer::of(engine, memory, len)
    }

    fn of(engine: &Engine, memory: Memory, len: usize) -> Buffer {
        let mr = engine.register(memory.addr(), len).expect("register");
        let item = engine.fifo_item(mr, memory.addr(), len).expect("item");
        Buffer { memory, mr, item }
    }

    fn whole(&self) -> LocalSegment {
        LocalSegment { mr: self.mr, addr: self.memory.addr(), len: self.memory.len() }
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + seed) as u8).collect()
}

fn run(conn: &Connection, direction: Direction, local: &Buffer, remote: &Buffer) {
    let id = conn.transfer(direction, std::iter::once((local.whole(), remote.item))).expect("transfer");
    assert!(conn.wait(id, Some(Duration::from_secs(60))).expect("transfer").complete);
}

/// Moves a pattern both ways and compares it.
fn exchange(conn: &Connection, near: &Buffer, far: &Buffer) {
    run(conn, Direction::Write, near, far);
    assert!(near.memory.bytes() == far.memory.bytes());
    run(conn, Direction::Read, near, far);
    assert!(near.memory.bytes() == far.memory.bytes());
}

#[test]
fn every_kind_of_memory_moves() {
    if !gpu("every_kind_of_memory_moves") {
        return;
    }
    let (a, b) = (engine(), engine());
    let (out, _inc) = pair(&a, &b);
    for from in Place::KINDS {
        for to in Place::KINDS {
            for len in [1000, (3 << 20) + 17] {
                let (near, far) = (Buffer::new(&a, from, pattern(len, 3)), Buffer::new(&b, to, vec![0xEE; len]));
                run(&out, Direction::Write, &near, &far);
                assert!(far.memory.bytes() == pattern(len, 3), "{from:?} to {to:?}, {len} bytes");
                let (near, far) = (Buffer::new(&a, to, vec![0xEE; len]), Buffer::new(&b, from, pattern(len, 9)));
                run(&out, Direction::Read, &near, &far);
                assert!(near.memory.bytes() == pattern(len, 9), "{to:?} from {from:?}, {len} bytes");
            }
        }
    }
}

#[test]
fn memory_is_known_on_threads_without_a_context() {
    if !gpu("memory_is_known_on_threads_without_a_context") {
        return;
    }
    let kinds: Vec<(Place, usize, Memory)> = Place::KINDS.map(|p| (p, 5000, Memory::new(p, vec![1; 5000]))).into_iter().collect();
    std::thread::spawn(move || {
        for (place, _, memory) in &kinds {
            let kind = cuda_driver::memory_kind(memory.addr() as u64).expect("kind");
            let device = matches!(kind, cuda_driver::MemoryKind::Device { .. });
            let expected = !matches!(place, Place::Host | Place::Managed | Place::Pinned);
            assert_eq!(device, expected, "{place:?} is {kind:?}");
        }
    })
    .join()
    .expect("every kind");
}

/// Behind a plugin whose comms belong to one GPU, memory that was registered on two of them before a connection moves over comms of its
/// own, in every pairing.
#[test]
fn two_gpus_of_one_process_have_comms_of_their_own() {
    if !gpu("two_gpus_of_one_process_have_comms_of_their_own") {
        return;
    }
    let foreign = std::env::var("UCCL_TCPX_PLUGIN_PATH").is_ok_and(|path| path.contains("strict_foreign"));
    if !foreign || cuda_driver::device_count() < 2 {
        eprintln!("SKIPPED: two_gpus_of_one_process_have_comms_of_their_own needs two GPUs and the strict foreign plugin");
        return;
    }
    const LEN: usize = (4 << 20) + 100;
    // The plugin must carry it, not direct transfers.
    let [a, b] = [(); 2].map(|()| engine_with(|config| config.disable_ipc = true));
    let places = [Place::FirstGpu, Place::LastGpu];
    let near: Vec<Buffer> = places.iter().map(|&place| Buffer::new(&a, place, pattern(LEN, 3))).collect();
    let far: Vec<Buffer> = places.iter().map(|&place| Buffer::new(&b, place, vec![0; LEN])).collect();
    let (out, inc) = pair(&a, &b);
    for (i, from) in near.iter().enumerate() {
        for (j, to) in far.iter().enumerate() {
            let [_, before] = foreign_counts();
            exchange(&out, from, to);
            exchange(&inc, to, from);
            let [_, after] = foreign_counts();
            assert!(after >= before + 4, "GPU {i} to GPU {j}: {} messages over the plugin", after - before);
        }
    }
    let [imports, messages] = foreign_counts();
    assert_eq!(imports, 2, "each GPU has its own receive memory");
    println!("{messages} messages over two GPUs' comms");
    let _ = std::fs::remove_file(counters());
}

/// Work of the application that occupies the legacy default stream until it is stopped.
struct Busy(Arc<Hold>);

struct Hold {
    limit: Duration,
    begun: AtomicBool,
    end: AtomicBool,
    ended: AtomicBool,
}

/// The application's work lasts this long at most; whatever waits for it waits as long.
const BUSY_LIMIT: Duration = Duration::from_secs(30);

unsafe extern "C" fn hold(argument: *mut c_void) {
    // SAFETY: the Arc was leaked for this call.
    let hold = unsafe { Arc::from_raw(argument.cast_const().cast::<Hold>()) };
    hold.begun.store(true, Ordering::SeqCst);
    let start = Instant::now();
    while !hold.end.load(Ordering::SeqCst) && start.elapsed() < hold.limit {
        std::thread::sleep(Duration::from_millis(1));
    }
    hold.ended.store(true, Ordering::SeqCst);
}

impl Busy {
    fn new() -> Busy {
        Busy::lasting(BUSY_LIMIT)
    }

    fn lasting(limit: Duration) -> Busy {
        let context = memory::enter(0);
        let [begun, end, ended] = std::array::from_fn(|_| AtomicBool::new(false));
        let state = Arc::new(Hold { limit, begun, end, ended });
        let argument = Arc::into_raw(state.clone()).cast_mut().cast();
        // SAFETY: the function takes the Arc back; null is the legacy default stream of the current context.
        unsafe { context.enter().expect("context").cuLaunchHostFunc(std::ptr::null_mut(), hold, argument) }
            .expect("host function");
        while !state.begun.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Busy(state)
    }

    fn has_ended(&self) -> bool {
        self.0.ended.load(Ordering::SeqCst)
    }

    fn still(&self, what: &str) {
        assert!(!self.0.ended.load(Ordering::SeqCst), "{what} waited for the application's default stream");
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.end.store(true, Ordering::SeqCst);
    }
}

/// Registers memory by turns with two engines.
fn by_turns(memory: Vec<Memory>, a: &Engine, b: &Engine) -> Vec<Buffer> {
    let with = |(i, m): (usize, Memory)| {
        let len = m.len();
        Buffer::of(if i % 2 == 0 { a } else { b }, m, len)
    };
    memory.into_iter().enumerate().map(with).collect()
}

/// Transfers of new engines over a GPU whose default stream is busy: if anything of the engine's waited for that stream, the work there,
/// which lasts until the end of the test, would run out of patience.
#[test]
fn a_busy_default_stream_delays_nothing() {
    if !gpu("a_busy_default_stream_delays_nothing") {
        return;
    }
    const LEN: usize = 8 << 20;
    // The application's own memory is there before it gets busy: allocating and freeing may wait.
    let memory: Vec<Memory> = (0..6).map(|i| Memory::new(Place::FirstGpu, pattern(if i < 4 { LEN } else { 700 }, i))).collect();
    // So is what the library has once a process and GPU: the driver loads kernels only while the GPU is at rest. An engine made where
    // the GPU is in use has it.
    drop(engine());
    let busy = Busy::new();
    let (a, b) = (engine(), engine());
    let buffers = by_turns(memory, &a, &b);
    busy.still("registration");
    let (out, inc) = pair(&a, &b);
    busy.still("connecting");
    exchange(&out, &buffers[0], &buffers[1]);
    busy.still("a transfer");
    exchange(&inc, &buffers[3], &buffers[2]);
    exchange(&out, &buffers[4], &buffers[5]);
    busy.still("a transfer of a few bytes");
    out.close();
    inc.close();
    busy.still("closing");
    let (out, inc) = pair(&a, &b);
    exchange(&out, &buffers[0], &buffers[1]);
    busy.still("a second connection");
    out.close();
    inc.close();
    for (i, buffer) in buffers.iter().enumerate() {
        (if i % 2 == 0 { &a } else { &b }).deregister(buffer.mr).expect("deregister");
    }
    drop((a, b));
    busy.still("destroying the engines");
    drop(busy);
}

/// What transfers ask of the driver, one call after another, each beside a default stream that is busy for a second: which of them wait
/// for it. Before the library has used the GPU the answers are only written; afterwards none may wait.
#[test]
fn each_call_of_a_transfer_beside_a_busy_default_stream() {
    if !gpu("each_call_of_a_transfer_beside_a_busy_default_stream") {
        return;
    }
    const LEN: usize = 8 << 20;
    let context = memory::enter(0);
    let first = calls_beside_a_busy_stream::<LEN>(&context);
    drop(engine());
    let then = calls_beside_a_busy_stream::<LEN>(&context);
    for ((call, before, waited_before), (_, after, waited)) in first.iter().zip(&then) {
        eprintln!("{call}: first {before:?}{}, then {after:?}{}", waits(*waited_before), waits(*waited));
    }
    let waited: Vec<&str> = then.iter().filter(|(_, _, waited)| *waited).map(|(call, _, _)| *call).collect();
    assert!(waited.is_empty(), "these wait for the application's default stream: {waited:?}");
}

fn waits(waited: bool) -> &'static str {
    if waited {
        " (waited for the application)"
    } else {
        ""
    }
}

fn calls_beside_a_busy_stream<const LEN: usize>(context: &Arc<cuda_driver::Context>) -> Vec<(&'static str, Duration, bool)> {
    use cuda_driver::{DeviceBuffer, PinnedBuffer, Stream};
    let stream = Stream::new(context).expect("stream");
    let (pinned, device) =
        (PinnedBuffer::new(context, LEN).expect("pinned"), DeviceBuffer::new(context, LEN, 4096).expect("device"));
    let mut kept = (Vec::new(), Vec::new(), Vec::new());
    let mut all = Vec::new();
    let mut time = |call, body: &mut dyn FnMut()| {
        let busy = Busy::lasting(Duration::from_secs(1));
        let start = Instant::now();
        body();
        let (took, waited) = (start.elapsed(), busy.has_ended());
        drop(busy);
        all.push((call, took, waited));
    };
    time("create a stream", &mut || kept.0.push(Stream::new(context).expect("stream")));
    // Unique lengths, so that no kept allocation is reused.
    time("pinned memory", &mut || kept.1.push(PinnedBuffer::new(context, LEN + 4096 * (1 + kept.1.len())).expect("pinned")));
    time("device memory", &mut || kept.2.push(DeviceBuffer::new(context, LEN + 4096 * (1 + kept.2.len()), 1).expect("device")));
    let finish = || stream.finish(Duration::from_secs(20)).expect("finish");
    // SAFETY: blocks of LEN bytes not otherwise used; the test waits for every call.
    unsafe {
        time("copy to the host", &mut || stream.device_to_host(pinned.mapped().host, device.ptr(), LEN).expect("copy"));
        time("its end", &mut || finish());
        time("copy to the GPU", &mut || stream.host_to_device(device.ptr(), pinned.mapped().host, LEN).expect("copy"));
        time("its end", &mut || finish());
        time("fill", &mut || stream.fill(device.ptr(), 0, LEN).expect("fill"));
        time("its end", &mut || finish());
        time("write a word", &mut || stream.signal(pinned.mapped().device, 1).expect("write"));
        time("its end", &mut || finish());
    }
    // What went back to the cache would be taken from there the next time.
    std::mem::forget(kept);
    all
}

/// An application's thread captures graphs in global mode, one after another, while engines come up, move data and go. Neither side
/// notices the other.
#[test]
fn captures_in_global_mode_neither_fail_nor_break_transfers() {
    if !gpu("captures_in_global_mode_neither_fail_nor_break_transfers") {
        return;
    }
    const LEN: usize = 4 << 20;
    let (stop, captures) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let memory: Vec<Memory> = (0..4).map(|i| Memory::new(Place::FirstGpu, pattern(if i < 2 { LEN } else { 700 }, i))).collect();
    let application = std::thread::spawn({
        let (stop, captures) = (stop.clone(), captures.clone());
        move || {
            let context = memory::enter(0);
            let stream = cuda_driver::Stream::new(&context).expect("stream");
            let driver = cuda_driver::driver().expect("driver");
            while !stop.load(Ordering::SeqCst) {
                let mut graph = std::ptr::null_mut();
                // The guard's table is kept, its relaxed mode is not: captures here are as strict as an application's.
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
    });
    while captures.load(Ordering::SeqCst) == 0 && !application.is_finished() {
        std::thread::yield_now();
    }
    let (a, b) = (engine(), engine());
    let buffers = by_turns(memory, &a, &b);
    for _ in 0..5 {
        let (out, inc) = pair(&a, &b);
        for _ in 0..10 {
            run(&out, Direction::Write, &buffers[0], &buffers[1]);
            run(&inc, Direction::Write, &buffers[1], &buffers[0]);
            run(&out, Direction::Read, &buffers[2], &buffers[3]);
        }
        out.close();
        inc.close();
    }
    stop.store(true, Ordering::SeqCst);
    application.join().expect("the application's captures");
    assert!(captures.load(Ordering::SeqCst) >= 2);
    assert!(buffers[0].memory.bytes() == buffers[1].memory.bytes());
}
