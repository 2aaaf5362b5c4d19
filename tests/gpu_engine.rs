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
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        for (name, value) in
            [("UCCL_TCPX_SOFT_STRICT", "1"), ("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo")]
        {
            // SAFETY: before any engine exists; tests wait for this Once.
            unsafe { std::env::set_var(name, value) };
        }
    });
    let config = Config { plugin: PluginChoice::Soft, ..Config::from_env().expect("configuration") };
    Engine::new(config).expect("engine")
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

/// Work of the application that occupies the legacy default stream until it is told to end.
struct Busy(Arc<Hold>);

#[derive(Default)]
struct Hold {
    begun: AtomicBool,
    end: AtomicBool,
    ended: AtomicBool,
}

/// The application's work lasts this long at most; whatever waits for it waits as long.
const BUSY_LIMIT: Duration = Duration::from_secs(30);

unsafe extern "C" fn hold(argument: *mut c_void) {
    // SAFETY: the Arc was given up for this call.
    let hold = unsafe { Arc::from_raw(argument.cast_const().cast::<Hold>()) };
    hold.begun.store(true, Ordering::SeqCst);
    let start = Instant::now();
    while !hold.end.load(Ordering::SeqCst) && start.elapsed() < BUSY_LIMIT {
        std::thread::sleep(Duration::from_millis(1));
    }
    hold.ended.store(true, Ordering::SeqCst);
}

impl Busy {
    fn new() -> Busy {
        let context = memory::enter(0);
        let state = Arc::new(Hold::default());
        let argument = Arc::into_raw(state.clone()).cast_mut().cast();
        // SAFETY: the function takes the Arc back; null is the legacy default stream of the current context.
        unsafe { context.enter().expect("context").cuLaunchHostFunc(std::ptr::null_mut(), hold, argument) }
            .expect("host function");
        while !state.begun.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Busy(state)
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
    // So is what the library has once a process and GPU: the driver loads kernels only while the GPU is at rest.
    drop(Buffer::new(&engine(), Place::FirstGpu, vec![0; 10]));
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
