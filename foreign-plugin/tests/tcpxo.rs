//! Breaks every rule of the simulated GPUDirect-TCPXO once: each case runs in its own process, which must end as expected.

mod gpus;

use gpus::{on_gpu, Driver};
use nccl_net_abi::*;
use nccl_net_strict_foreign::rules::counters;
use nccl_net_strict_foreign::tcpxo::TABLE as NET;
use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::ptr::null_mut;
use std::sync::atomic::Ordering::Acquire;
use std::time::{Duration, Instant};

const LEN: usize = 64 << 10;
const CASE: &str = "STRICT_FOREIGN_TEST_CASE";

type Opaque = *mut c_void;

// ---- running cases ----

fn run(case: &str, environment: &[(&str, &str)]) -> Output {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(CASE, case);
    child.env("STRICT_FOREIGN_CONNECT_MS", "1").env("STRICT_FOREIGN_ACCEPT_MS", "2");
    child.envs(environment.iter().copied()).output().expect("child")
}

fn aborts(case: &str, why: &str) {
    const TABLE: &str = include_str!("../src/tcpxo/mod.rs");
    assert!(TABLE.contains(&format!("`{case}`")), "{case} is not in the table of rules");
    let driver = case.ends_with("_gpu").then(Driver::build);
    let environment = driver.as_ref().map(Driver::environment);
    let out = run(case, environment.as_ref().map_or(&[], |all| &all[..]));
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{case}: {} {text}", out.status);
    assert!(text.contains("strict-foreign: VIOLATION") && text.contains(why), "{case}: {text}");
}

fn passes(case: &str, environment: &[(&str, &str)]) {
    let out = run(case, environment);
    assert!(out.status.success(), "{case}: {} {}", out.status, String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_contract_violation_ends_the_process() {
    for (case, why) in [
        ("null_logger", "the logger is NULL"),
        ("no_manager", "init without the receive manager"),
        ("two_threads", "is inside another set-up call"),
        ("close_listen_early", "closeListen while an accept is pending"),
        ("accept_twice", "accepts once"),
        ("null_device_handle", "connect with a null pointer for the device handle"),
        ("null_device_handle_of_accept", "accept with a null pointer for the device handle"),
        ("forged_state", "which it never put there"),
        ("connect_after_its_end", "connect with a handle in state 3"),
        ("another_rail", "rail alignment takes another NIC"),
        ("init_without_a_gpu", "init without a current GPU"),
        ("properties_without_a_gpu", "getProperties without a current GPU"),
        ("listen_without_a_gpu", "listen without a current GPU"),
        ("connect_with_another_gpu", "connect with GPU 1 current: the comm was made with GPU 0"),
        ("accept_with_another_gpu", "accept with GPU 1 current: the comm was made with GPU 0"),
        ("close_listen_with_another_gpu", "closeListen with GPU 1 current: the comm was made with GPU 0"),
        ("misaligned_base", "not whole pages"),
        ("misaligned_size", "not whole pages"),
        ("beyond_the_end", "reaches beyond"),
        ("freed_before_it_was_dropped", "which was not dropped"),
        ("came_back_before_it_was_dropped", "which was not dropped"),
        ("dropped_again_after_an_error", "which is not registered"),
        ("init_without_an_answer", "the plugin ends the process"),
        ("used_after_deregistration", "does not exist (or was dropped)"),
        ("deregistered_in_flight", "requests in flight"),
        ("deregistered_with_another_nic", "it belongs to NIC 0"),
        ("outside_of_registration", "outside of the registration"),
        ("host_send", "isend of 100 bytes of host memory"),
        ("host_receive", "irecv of 100 bytes of host memory"),
        ("receive_outside", "irecv of 65537 bytes"),
        ("two_at_once", "irecv of 2 messages"),
        ("empty_message", "isend of 0 bytes"),
        ("tested_twice", "it was done, or never posted"),
        ("tested_after_an_error", "an earlier test has said that it failed"),
        ("used_after_close", "no open comm"),
        ("tested_after_close", "it was done, or never posted"),
        ("closed_as_the_other", "a comm of the other direction"),
        ("other_order", "not in the same order and number"),
        ("too_small", "a message of 200 bytes for a receive of 100"),
        ("flush_with_a_request", "iflush leaves the request as it was"),
    ] {
        aborts(case, why);
    }
}

#[test]
fn other_behaviour_matches_tcpxo() {
    passes("table", &[]);
    passes("messages_arrive_in_place", &[]);
    passes("any_order_of_tests", &[]);
    passes("many_in_flight", &[]);
    passes("a_dead_peer_is_an_error_of_test", &[]);
    passes("writes_after_the_close", &[]);
    passes("sends_after_the_close", &[]);
    passes("answers_that_are_none", &[]);
    passes("a_listen_waits_for_the_offload", &[]);
}

// ---- the cases ----

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    match case.as_str() {
        "null_logger" => drop(init_with(None)),
        "no_manager" => {
            std::env::set_var("STRICT_FOREIGN_MANAGER", "none");
            init();
        }
        "two_threads" => two_threads(),
        "close_listen_early" => {
            init();
            let listen = listen(0, &mut [0; 128]);
            assert!(accept(listen).is_null());
            // SAFETY: as the case breaks the contract.
            unsafe { NET.closeListen.expect("closeListen")(listen) };
        }
        "accept_twice" => {
            let pair = Pair::new();
            accept(pair.listen);
        }
        "null_device_handle" => {
            init();
            let (mut handle, mut comm) = ([0; 128], null_mut());
            listen(0, &mut handle);
            // SAFETY: as the case breaks the contract.
            unsafe { NET.connect.expect("connect")(0, handle.as_mut_ptr().cast(), &mut comm, null_mut()) };
        }
        "null_device_handle_of_accept" => {
            init();
            let (listen, mut comm) = (listen(0, &mut [0; 128]), null_mut());
            // SAFETY: as the case breaks the contract.
            unsafe { NET.accept.expect("accept")(listen, &mut comm, null_mut()) };
        }
        "forged_state" => {
            init();
            let mut handle = [0; 128];
            listen(0, &mut handle);
            (handle[88], handle[97]) = (1, 7);
            connect(0, &mut handle);
        }
        "connect_after_its_end" => {
            let mut pair = Pair::new();
            connect(0, &mut pair.handle);
        }
        "another_rail" => {
            std::env::set_var("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2");
            init();
            let mut handle = [0; 128];
            listen(1, &mut handle);
            connect(0, &mut handle);
        }
        "init_without_a_gpu" => init(),
        "properties_without_a_gpu" | "listen_without_a_gpu" => {
            on_gpu(0, init);
            if case == "listen_without_a_gpu" {
                listen(0, &mut [0; 128]);
            }
            // SAFETY: as the case breaks the contract.
            unsafe { NET.getProperties.expect("getProperties")(0, &mut std::mem::zeroed()) };
        }
        "connect_with_another_gpu" | "accept_with_another_gpu" | "close_listen_with_another_gpu" => {
            on_gpu(0, init);
            let mut handle = [0; 128];
            let listen = on_gpu(0, || listen(0, &mut handle));
            on_gpu(0, || assert!(connect(0, &mut handle).is_null()));
            match case.as_str() {
                "connect_with_another_gpu" => drop(on_gpu(1, || connect(0, &mut handle))),
                "accept_with_another_gpu" => drop(on_gpu(1, || accept(listen))),
                // SAFETY: as the case breaks the contract.
                _ => drop(on_gpu(1, || unsafe { NET.closeListen.expect("closeListen")(listen) })),
            }
        }
        "misaligned_base" => register_at(52, LEN),
        "misaligned_size" => register_at(0, 1000),
        "beyond_the_end" => register_at(0, 1 << 30),
        "freed_before_it_was_dropped" => {
            let (pair, memory, _) = registered();
            // It came back as a part of a larger block.
            pair.register_at(pair.send, memory.0, 8192, NCCL_PTR_CUDA);
        }
        "used_after_deregistration" => {
            let (pair, memory, mr) = registered();
            pair.deregister(pair.send, mr);
            pair.isend(&memory, 100, 0, mr);
        }
        "deregistered_in_flight" => {
            let (pair, memory, mr) = registered();
            pair.irecv(&memory, 100, 0, mr);
            pair.deregister(pair.recv, mr);
        }
        "deregistered_with_another_nic" => {
            std::env::set_var("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2");
            let (_first, _memory, mr) = registered();
            let other = Pair::on(1);
            other.deregister(other.send, mr);
        }
        "outside_of_registration" => drop(with_mr(|pair, memory, mr| pair.isend(memory, LEN + 1, 0, mr))),
        "receive_outside" => drop(with_mr(|pair, memory, mr| pair.irecv(memory, LEN + 1, 0, mr))),
        "host_send" | "host_receive" => {
            let (pair, memory) = (Pair::new(), Memory::new());
            let mr = pair.register_at(pair.send, memory.0, LEN, NCCL_PTR_HOST);
            match case.as_str() {
                "host_send" => pair.isend(&memory, 100, 0, mr),
                _ => pair.irecv(&memory, 100, 0, mr),
            };
        }
        "two_at_once" => {
            let (pair, memory, mut mr) = registered();
            let (mut data, mut size, mut tag, mut request) = (memory.0.cast(), 10, 0, null_mut());
            // SAFETY: arrays of one, of which no more is read.
            unsafe { NET.irecv.expect("irecv")(pair.recv, 2, &mut data, &mut size, &mut tag, &mut mr, &mut request) };
        }
        "empty_message" => drop(with_mr(|pair, memory, mr| pair.isend(memory, 0, 0, mr))),
        "tested_twice" => {
            let (pair, memory, mr) = registered();
            let (recv, send) = (pair.irecv(&memory, 100, 0, mr), pair.isend(&memory, 100, 0, mr));
            finish(&[recv, send]);
            let _ = test(recv);
        }
        "tested_after_an_error" => {
            let recv = dead_peer();
            let _ = test(recv);
        }
        "used_after_close" => {
            let (pair, memory, mr) = registered();
            pair.close(false);
            pair.isend(&memory, 10, 0, mr);
        }
        "tested_after_close" => {
            let (pair, memory, mr) = registered();
            let recv = pair.irecv(&memory, 100, 0, mr);
            pair.close(true);
            let _ = test(recv);
        }
        "closed_as_the_other" => {
            let pair = Pair::new();
            // SAFETY: as the case breaks the contract.
            unsafe { NET.closeRecv.expect("closeRecv")(pair.send) };
        }
        "other_order" => {
            let (pair, memory, mr) = registered();
            let recvs: Vec<_> = [1, 2].map(|tag| pair.irecv(&memory, 100, tag, mr)).into();
            let sends: Vec<_> = [2, 1].map(|tag| pair.isend(&memory, 100, tag, mr)).into();
            finish(&[recvs, sends].concat());
        }
        "too_small" => {
            let (pair, memory, mr) = registered();
            let (recv, send) = (pair.irecv(&memory, 100, 0, mr), pair.isend(&memory, 200, 0, mr));
            finish(&[send, recv]);
        }
        "flush_with_a_request" => {
            let (pair, memory, mut mr) = registered();
            let (mut data, mut size, mut request) = (memory.0.cast(), 10, 8 as Opaque);
            // SAFETY: arrays of one.
            unsafe { NET.iflush.expect("iflush")(pair.recv, 1, &mut data, &mut size, &mut mr, &mut request) };
        }
        "table" => table(),
        "messages_arrive_in_place" => messages_arrive_in_place(),
        "any_order_of_tests" => any_order_of_tests(),
        "many_in_flight" => {
            let (pair, memory, mr) = registered();
            let mut all: Vec<_> = (0..40).map(|i| pair.irecv(&memory, 100, i, mr)).collect();
            all.extend((0..40).map(|i| pair.isend(&memory, 100, i, mr)));
            finish(&all);
        }
        // At the same address and size: the plugin finds the old entry.
        "came_back_before_it_was_dropped" => {
            let (pair, memory, _mr) = registered();
            // SAFETY: own memory, replaced by a fresh mapping.
            let again = unsafe {
                let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                libc::mmap(memory.0.cast(), LEN, libc::PROT_READ | libc::PROT_WRITE, kind, -1, 0)
            };
            pair.register_at(pair.recv, again.cast(), LEN, NCCL_PTR_CUDA);
        }
        "dropped_again_after_an_error" => {
            let answers = Answers::set();
            let (pair, _memory, mr) = registered();
            answers.are("deregMr=refusal");
            assert_ne!(pair.try_deregister(pair.send, mr), NCCL_SUCCESS);
            pair.try_deregister(pair.send, mr);
        }
        "init_without_an_answer" => {
            let answers = Answers::set();
            answers.are("init=hangup");
            init();
        }
        "answers_that_are_none" => answers_that_are_none(),
        "a_listen_waits_for_the_offload" => {
            let answers = Answers::set();
            init();
            answers.are("listen=refusal");
            let mut comm = null_mut();
            // SAFETY: as the contract says.
            let code = unsafe { NET.listen.expect("listen")(0, [0u8; 128].as_mut_ptr().cast(), &mut comm) };
            assert!(code != NCCL_SUCCESS && comm.is_null());
            let before = answers.go_on_after("listen", Duration::from_millis(50));
            listen(0, &mut [0; 128]);
            assert!(before.elapsed() >= Duration::from_millis(50), "listen had an answer");
        }
        "a_dead_peer_is_an_error_of_test" => {
            dead_peer();
        }
        "writes_after_the_close" => writes_after_the_close(),
        "sends_after_the_close" => sends_after_the_close(),
        other => panic!("no case {other}"),
    }
}

fn table() {
    // SAFETY: C strings of the table and of the properties.
    unsafe {
        let name = std::ffi::CStr::from_ptr(NET.name).to_str().expect("name");
        assert!(name.starts_with("FasTrak") && name.contains("simulated"), "{name}");
        assert!(NET.irecvConsumed.is_none());
        Pair::new();
        let mut properties: ncclNetProperties_v7 = std::mem::zeroed();
        assert_eq!(NET.getProperties.expect("getProperties")(0, &mut properties), 0);
        assert_eq!((properties.netDeviceType, properties.ptrSupport), (NCCL_NET_DEVICE_HOST, NCCL_PTR_HOST | NCCL_PTR_CUDA));
        // A receive comm names no device memory.
        let mut device: ncclNetDeviceHandle_v7 = std::mem::zeroed();
        device.handle = 8 as Opaque;
        let (mut handle, mut recv, mut target): (_, Opaque, _) = ([0; 128], null_mut(), &raw mut device);
        let listen = listen(0, &mut handle);
        let mut send: Opaque = null_mut();
        while recv.is_null() {
            if send.is_null() {
                send = connect(0, &mut handle);
            }
            assert_eq!(NET.accept.expect("accept")(listen, &mut recv, &mut target), 0);
        }
        assert_eq!((device.netDeviceType, device.handle), (NCCL_NET_DEVICE_HOST, null_mut()));
    }
}

fn messages_arrive_in_place() {
    let (pair, from, out) = registered();
    let to = Memory::new();
    let inward = pair.register_at(pair.recv, to.0, LEN, NCCL_PTR_CUDA);
    for (round, len) in [1, 100, 4096, LEN].into_iter().enumerate() {
        // SAFETY: own memory, which nothing uses now.
        let (source, target) = unsafe { (from.bytes(), to.bytes()) };
        source.iter_mut().for_each(|byte| *byte = byte.wrapping_add(round as u8 + 1));
        target.fill(0);
        // A receive may be larger than its message: its size is what came.
        let (recv, send) = (pair.irecv(&to, LEN, 7, inward), pair.isend(&from, len, 7, out));
        assert_eq!(finish(&[recv, send]), [len, len]);
        assert!(source[..len] == target[..len] && target[len..].iter().all(|&byte| byte == 0), "{len} bytes");
    }
    assert_eq!(counters().messages_in.load(Acquire), 4);
}

fn any_order_of_tests() {
    let (pair, memory, mr) = registered();
    let recvs: Vec<_> = (0..6).map(|i| pair.irecv(&memory, 1000, i, mr)).collect();
    let sends: Vec<_> = (0..6).map(|i| pair.isend(&memory, 1000, i, mr)).collect();
    for i in [5, 0, 3, 1, 4, 2] {
        finish(&[recvs[i]]);
        finish(&[sends[5 - i]]);
    }
}

/// A receive whose peer has closed: its test has said so.
fn dead_peer() -> Opaque {
    let (pair, memory, mr) = registered();
    let recv = pair.irecv(&memory, 100, 0, mr);
    pair.close(false);
    let until = Instant::now() + Duration::from_secs(10);
    let failed = loop {
        let (mut done, mut size) = (0, -1);
        // SAFETY: a live request.
        let code = unsafe { NET.test.expect("test")(recv, &mut done, &mut size) };
        if code != 0 {
            break (code, done, size);
        }
        assert!(done == 0 && Instant::now() < until, "it ends well");
    };
    assert_eq!(failed, (NCCL_SYSTEM_ERROR, 1, 0));
    recv
}

/// A closed comm writes to the memory of its receives until it is deregistered.
fn writes_after_the_close() {
    let (pair, memory, mr) = registered();
    // SAFETY: own memory.
    let bytes = unsafe { memory.bytes() };
    pair.irecv(&memory, LEN, 0, mr);
    pair.close(true);
    let written = || {
        bytes.fill(1);
        std::thread::sleep(Duration::from_millis(20));
        // SAFETY: own memory, which only the plugin writes to.
        unsafe { memory.0.read_volatile() != 1 }
    };
    let mut written = written;
    assert!(written(), "the closed comm does not write");
    pair.deregister(pair.send, mr);
    assert!(!written(), "it writes to memory that was deregistered");
}

/// A closed comm sends on from the memory of its sends.
fn sends_after_the_close() {
    let (pair, memory, mr) = registered();
    let to = Memory::new();
    let inward = pair.register_at(pair.recv, to.0, LEN, NCCL_PTR_CUDA);
    // More than the sockets hold.
    let count = 200;
    for i in 0..count {
        pair.isend(&memory, LEN, i, mr);
    }
    pair.close(false);
    for i in 0..count {
        let recv = pair.irecv(&to, LEN, i, inward);
        assert_eq!(finish(&[recv]), [LEN]);
    }
}

/// The file that says what the receive manager does wrong.
struct Answers(std::path::PathBuf);

impl Answers {
    /// Before the first call of the plugin.
    fn set() -> Answers {
        let file = std::env::temp_dir().join(format!("strict-foreign-answers-{}", std::process::id()));
        std::env::set_var("STRICT_FOREIGN_ANSWERS", &file);
        Answers(file)
    }

    fn are(&self, words: &str) {
        std::fs::write(&self.0, words).expect("file");
    }

    /// A call has no answer until the file changes; gives when that began.
    fn go_on_after(self, call: &str, time: Duration) -> Instant {
        self.are(call);
        std::thread::spawn(move || {
            std::thread::sleep(time);
            self.are(" ");
            std::mem::forget(self);
        });
        Instant::now()
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn answers_that_are_none() {
    let answers = Answers::set();
    let (pair, memory) = (Pair::new(), Memory::new());
    for how in ["hangup", "refusal", "garbage"] {
        answers.are(&format!("regMr={how}"));
        let (code, mr) = pair.try_register_at(pair.send, memory.0, LEN, NCCL_PTR_CUDA);
        assert!(code != NCCL_SUCCESS && mr.is_null(), "{how}");
        // Of host memory the manager knows nothing.
        let (code, host) = pair.try_register_at(pair.send, memory.0, LEN, NCCL_PTR_HOST);
        assert_eq!((code, pair.try_deregister(pair.send, host)), (NCCL_SUCCESS, NCCL_SUCCESS));
    }
    for how in ["hangup", "refusal", "garbage"] {
        answers.are(" ");
        let memory = Memory::new();
        let mr = pair.register_at(pair.send, memory.0, LEN, NCCL_PTR_CUDA);
        answers.are(&format!("deregMr={how}"));
        assert_ne!(pair.try_deregister(pair.send, mr), NCCL_SUCCESS, "{how}");
    }
    let before = answers.go_on_after("regMr", Duration::from_millis(50));
    pair.register_at(pair.send, memory.0, LEN, NCCL_PTR_CUDA);
    assert!(before.elapsed() >= Duration::from_millis(50), "regMr had an answer");
}

fn two_threads() {
    init();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..1000 {
                    listen(0, &mut [0; 128]);
                }
            });
        }
    });
}

fn register_at(offset: usize, len: usize) {
    let (pair, memory) = (Pair::new(), Memory::new());
    pair.register_at(pair.send, memory.0.wrapping_add(offset), len, NCCL_PTR_CUDA);
}

fn registered() -> (Pair, Memory, Opaque) {
    let (pair, memory) = (Pair::new(), Memory::new());
    let mr = pair.register_at(pair.send, memory.0, LEN, NCCL_PTR_CUDA);
    (pair, memory, mr)
}

fn with_mr<R>(body: impl FnOnce(&Pair, &Memory, Opaque) -> R) -> R {
    let (pair, memory, mr) = registered();
    body(&pair, &memory, mr)
}

/// A logger that is not variadic: on supported systems a caller may pass more arguments than it takes.
unsafe extern "C" fn quiet(_level: c_int, _flags: c_ulong, _file: *const c_char, _line: c_int, _format: *const c_char) {}

fn init_with(logger: ncclDebugLogger_t) -> c_int {
    // SAFETY: the first call of the plugin.
    unsafe { NET.init.expect("init")(logger) }
}

fn init() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: the fixed arguments are the same.
        let logger = unsafe { std::mem::transmute::<*const (), ncclDebugLogger_t>(quiet as *const ()) };
        assert_eq!(init_with(logger), 0);
    });
}

/// Page-aligned memory with a hole behind it.
struct Memory(*mut u8);

impl Memory {
    fn new() -> Memory {
        // SAFETY: a fresh mapping.
        unsafe {
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = libc::mmap(null_mut(), LEN + 4096, libc::PROT_READ | libc::PROT_WRITE, kind, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            libc::munmap(at.cast::<u8>().add(LEN).cast(), 4096);
            for i in 0..LEN {
                at.cast::<u8>().add(i).write((i * 7 + i / 251) as u8);
            }
            Memory(at.cast())
        }
    }

    /// # Safety
    /// Nothing else uses the memory, but for bytes that the plugin writes.
    #[allow(clippy::mut_from_ref, reason = "by the contract")]
    unsafe fn bytes(&self) -> &mut [u8] {
        // SAFETY: its own mapping, which stays.
        unsafe { std::slice::from_raw_parts_mut(self.0, LEN) }
    }
}

fn listen(dev: c_int, handle: &mut [u8; 128]) -> Opaque {
    let mut comm = null_mut();
    // SAFETY: as the contract says.
    assert_eq!(unsafe { NET.listen.expect("listen")(dev, handle.as_mut_ptr().cast(), &mut comm) }, 0);
    comm
}

fn connect(dev: c_int, handle: &mut [u8; 128]) -> Opaque {
    let mut comm = null_mut();
    // SAFETY: as the contract says, or as a case breaks it.
    let code = unsafe { NET.connect.expect("connect")(dev, handle.as_mut_ptr().cast(), &mut comm, &mut null_mut()) };
    assert_eq!(code, 0);
    comm
}

fn accept(listen: Opaque) -> Opaque {
    let mut comm = null_mut();
    // SAFETY: as above.
    assert_eq!(unsafe { NET.accept.expect("accept")(listen, &mut comm, &mut null_mut()) }, 0);
    comm
}

fn test(request: Opaque) -> Option<usize> {
    let (mut done, mut size) = (0, -1);
    // SAFETY: as above.
    assert_eq!(unsafe { NET.test.expect("test")(request, &mut done, &mut size) }, 0);
    (done != 0).then_some(size as usize)
}

/// Tests requests until all are done; gives their sizes.
fn finish(requests: &[Opaque]) -> Vec<usize> {
    let until = Instant::now() + Duration::from_secs(10);
    let mut sizes = vec![None; requests.len()];
    while sizes.iter().any(Option::is_none) {
        assert!(Instant::now() < until, "nothing moves");
        for (size, &request) in sizes.iter_mut().zip(requests).filter(|(size, _)| size.is_none()) {
            *size = test(request);
        }
    }
    sizes.into_iter().flatten().collect()
}

/// Both ends of a channel in one process.
struct Pair {
    handle: [u8; 128],
    listen: Opaque,
    send: Opaque,
    recv: Opaque,
}

impl Pair {
    fn new() -> Pair {
        Pair::on(0)
    }

    fn on(dev: c_int) -> Pair {
        init();
        let mut pair = Pair { handle: [0; 128], listen: null_mut(), send: null_mut(), recv: null_mut() };
        pair.listen = listen(dev, &mut pair.handle);
        while pair.send.is_null() || pair.recv.is_null() {
            if pair.send.is_null() {
                pair.send = connect(dev, &mut pair.handle);
            }
            if pair.recv.is_null() {
                pair.recv = accept(pair.listen);
            }
        }
        pair
    }

    fn register_at(&self, comm: Opaque, data: *mut u8, len: usize, kind: c_int) -> Opaque {
        let (code, mr) = self.try_register_at(comm, data, len, kind);
        assert_eq!(code, 0);
        mr
    }

    fn try_register_at(&self, comm: Opaque, data: *mut u8, len: usize, kind: c_int) -> (c_int, Opaque) {
        let mut mr = null_mut();
        // SAFETY: as above.
        (unsafe { NET.regMr.expect("regMr")(comm, data.cast(), len as c_int, kind, &mut mr) }, mr)
    }

    fn deregister(&self, comm: Opaque, mr: Opaque) {
        assert_eq!(self.try_deregister(comm, mr), 0);
    }

    fn try_deregister(&self, comm: Opaque, mr: Opaque) -> c_int {
        // SAFETY: as above.
        unsafe { NET.deregMr.expect("deregMr")(comm, mr) }
    }

    fn isend(&self, memory: &Memory, len: usize, tag: c_int, mr: Opaque) -> Opaque {
        let mut request = null_mut();
        // SAFETY: as above.
        assert_eq!(unsafe { NET.isend.expect("isend")(self.send, memory.0.cast(), len as c_int, tag, mr, &mut request) }, 0);
        request
    }

    fn irecv(&self, memory: &Memory, len: usize, tag: c_int, mr: Opaque) -> Opaque {
        let (mut request, mut data, mut size, mut tag, mut mr) = (null_mut(), memory.0.cast(), len as c_int, tag, mr);
        // SAFETY: as above.
        let code = unsafe { NET.irecv.expect("irecv")(self.recv, 1, &mut data, &mut size, &mut tag, &mut mr, &mut request) };
        assert_eq!(code, 0);
        request
    }

    fn close(&self, receives: bool) {
        // SAFETY: as above.
        let code = unsafe {
            match receives {
                true => NET.closeRecv.expect("closeRecv")(self.recv),
                false => NET.closeSend.expect("closeSend")(self.send),
            }
        };
        assert_eq!(code, 0);
    }
}
