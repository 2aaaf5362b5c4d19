//! Breaks every rule of the strict foreign plugin once: each case runs in its own process, which must end as expected.

mod gpus;

use gpus::{on_gpu, Driver};
use nccl_net_abi::*;
use nccl_net_strict_foreign::flows::reset_connections;
use nccl_net_strict_foreign::rules::counters;
use nccl_net_strict_foreign::TCPX as NET;
use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::ptr::null_mut;
use std::sync::atomic::Ordering::Acquire;
use std::time::{Duration, Instant};

const LEN: usize = 64 << 10;
const CASE: &str = "STRICT_FOREIGN_TEST_CASE";

const LENIENT: (&str, &str) = ("STRICT_FOREIGN_LENIENT", "1");

// ---- running cases ----

fn run(case: &str, environment: &[(&str, &str)]) -> Output {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(CASE, case);
    child.env("STRICT_FOREIGN_CONNECT_MS", "1").env("STRICT_FOREIGN_ACCEPT_MS", "2").env("NCCL_DYNAMIC_CHUNK_SIZE", "0x80000");
    child.envs(environment.iter().copied()).output().expect("child")
}

fn aborts(case: &str, why: &str) {
    const TABLE: &str = include_str!("../src/lib.rs");
    assert!(TABLE.contains(&format!("`{case}`")), "{case} is not in the table of rules");
    let environment: &[(&str, &str)] = match case {
        "too_long" => &[("NCCL_DYNAMIC_CHUNK_SIZE", "4096")],
        "no_pci_device" => &[("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1@nopci")],
        _ => &[],
    };
    let driver = case.ends_with("_gpu").then(Driver::build);
    let of_gpus = driver.as_ref().map(Driver::environment);
    let out = run(case, of_gpus.as_ref().map_or(environment, |all| &all[..]));
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
        ("two_threads", "is inside another set-up call"),
        ("close_listen_early", "closeListen while an accept is pending"),
        ("accept_twice", "accepts once"),
        ("wild_handle", "never put there"),
        ("stale_handle", "no fresh handle reached connect"),
        ("forged_pointer", "never put there"),
        ("wrong_socket_count", "no fresh handle reached connect"),
        ("wrong_thread_count", "no fresh handle reached connect"),
        ("moved_handle", "was moved"),
        ("init_without_a_gpu", "init without a current GPU"),
        ("listen_without_a_gpu", "listen without a current GPU"),
        ("connect_without_a_gpu", "connect without a current GPU"),
        ("no_descriptors", "regMr without a free descriptor"),
        ("no_pci_device", "has no PCI path"),
        ("misaligned_base", "not whole pages"),
        ("misaligned_size", "not whole pages"),
        ("beyond_the_end", "reaches beyond"),
        ("registered_twice", "registered twice"),
        ("used_after_deregistration", "does not exist (or was dropped)"),
        ("deregistered_in_flight", "requests in flight"),
        ("outside_of_registration", "outside of the registration"),
        ("no_device_handle", "without a device handle"),
        ("used_after_close", "no open comm"),
        ("empty_message", "isend of 0 bytes"),
        ("empty_receive", "irecv of 0 bytes"),
        ("seventeenth_send", "a 17th send"),
        ("seventeenth_receive", "a 17th receive"),
        ("done_is_not_consumed", "a 17th receive"),
        ("send_tested_out_of_order", "not the oldest"),
        ("receive_tested_out_of_order", "not the oldest"),
        ("consumed_out_of_order", "not done, or not the oldest"),
        ("too_long", "it would never be whole"),
        ("two_at_once", "irecv of 2 messages"),
        ("host_receive", "a host receive on a data socket"),
        ("reset", "closeRecv on a data socket that has no peer"),
    ] {
        aborts(case, why);
    }
}

#[test]
fn too_many_fragments_end_the_process_with_status_1() {
    let out = run("one_message", &[("STRICT_FOREIGN_FRAGMENT", "16")]);
    assert_eq!(out.status.code(), Some(1), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(String::from_utf8_lossy(&out.stderr).contains("more than 2047 fragments"));
}

#[test]
fn a_double_import_unmaps_what_the_first_comm_reads() {
    let out = run("double_import", &[("STRICT_FOREIGN_UNLOCKED", "1")]);
    assert_eq!(out.status.signal(), Some(libc::SIGSEGV), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_meta_queue_is_unmapped_with_its_comm() {
    let out = run("meta_after_close", &[]);
    assert_eq!(out.status.signal(), Some(libc::SIGSEGV), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn sigpipe_reaches_the_caller() {
    let out = run("sigpipe_of_the_sender", &[]);
    assert_eq!(out.status.signal(), Some(libc::SIGPIPE), "{}", String::from_utf8_lossy(&out.stderr));
    let out = run("sigpipe_of_the_receiver", &[]);
    assert_eq!(out.status.signal(), Some(libc::SIGPIPE), "{}", String::from_utf8_lossy(&out.stderr));
    let out = run("sigpipe_of_set_up", &[]);
    assert_eq!(out.status.signal(), Some(libc::SIGPIPE), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn other_behaviour_matches_tcpx() {
    passes("one_message", &[]);
    passes("one_message", &[("STRICT_FOREIGN_LATE", "1")]);
    passes("windows_and_order", &[LENIENT]);
    passes("sizes_are_not_enforced", &[]);
    passes("host_receives_are_refused", &[LENIENT]);
    passes("silence_after_death", &[LENIENT, ("NCCL_DYNAMIC_CHUNK_SIZE", "4096")]);
    passes("a_warning_every_test", &[]);
    passes("nothing_moves", &[LENIENT, ("NCCL_DYNAMIC_CHUNK_SIZE", "0")]);
    passes("nothing_moves", &[LENIENT, ("NCCL_DYNAMIC_CHUNK_SIZE", "")]);
    passes("too_long_hangs", &[LENIENT, ("NCCL_DYNAMIC_CHUNK_SIZE", "4096")]);
    passes("set_up_takes_its_time", &[("STRICT_FOREIGN_CONNECT_MS", ""), ("STRICT_FOREIGN_ACCEPT_MS", "")]);
    passes("counts", &[]);
}

// ---- the cases ----

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    // SAFETY: this process' own disposition: as in a C program.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match case.as_str() {
        "null_logger" => drop(unsafe_init(None)),
        "two_threads" => two_threads(),
        "close_listen_early" => close_listen_early(),
        "accept_twice" => accept_twice(),
        "wild_handle" => connect_to(&mut [0x41; 128]),
        "stale_handle" => connect_to(&mut altered(77, 1)),
        "forged_pointer" => connect_to(&mut altered(80, 8)),
        "wrong_socket_count" => connect_to(&mut altered(36, 7)),
        "wrong_thread_count" => connect_to(&mut altered(40, 17)),
        "moved_handle" => moved_handle(),
        "init_without_a_gpu" => init(),
        "listen_without_a_gpu" => {
            on_gpu(0, init);
            listen(&mut [0; 128]);
        }
        "connect_without_a_gpu" => {
            on_gpu(0, init);
            let mut handle = [0; 128];
            on_gpu(0, || listen(&mut handle));
            connect(&mut handle);
        }
        "no_descriptors" => {
            let (pair, memory) = (Pair::new(), Memory::new());
            while std::fs::File::open("/dev/null").map(std::mem::forget).is_ok() {}
            pair.register(&memory);
        }
        "no_pci_device" => register_at(0, LEN),
        "misaligned_base" => register_at(52, LEN),
        "misaligned_size" => register_at(0, 1000),
        "beyond_the_end" => register_at(0, 1 << 30),
        "registered_twice" => {
            let pair = Pair::new();
            let memory = Memory::new();
            pair.register(&memory);
            pair.register(&memory);
        }
        "used_after_deregistration" => {
            let pair = Pair::new();
            let memory = Memory::new();
            let mr = pair.register(&memory);
            pair.deregister(mr);
            let _ = pair.send(&memory, 100, mr);
        }
        "deregistered_in_flight" => {
            let pair = Pair::new();
            let memory = Memory::new();
            let mr = pair.register(&memory);
            pair.send(&memory, 100, mr).expect("send");
            pair.deregister(mr);
        }
        "outside_of_registration" => {
            let pair = Pair::new();
            let memory = Memory::new();
            let mr = pair.register(&memory);
            let _ = pair.send(&memory, LEN + 1, mr);
        }
        "no_device_handle" => no_device_handle(),
        "used_after_close" => {
            let pair = Pair::new();
            let memory = Memory::new();
            let mr = pair.register(&memory);
            pair.close_send();
            let _ = pair.send(&memory, 10, mr);
        }
        "empty_message" => {
            let pair = Pair::new();
            let memory = Memory::new();
            let mr = pair.register(&memory);
            let _ = pair.send(&memory, 0, mr);
        }
        "empty_receive" => {
            let pair = Pair::new();
            let mr = pair.register(&Memory::new());
            let _ = pair.recv(0, mr);
        }
        "seventeenth_send" => sends(17).clear(),
        "seventeenth_receive" => receives(17).1.clear(),
        "done_is_not_consumed" => {
            let (pair, memory, mr) = registered();
            let recvs: Vec<_> = (0..16).map(|_| pair.recv(100, mr).expect("irecv")).collect();
            let send = pair.send(&memory, 100, mr).expect("isend");
            assert!(finish(recvs[0], Some(send)));
            let _ = pair.recv(100, mr);
        }
        "send_tested_out_of_order" => drop(test(sends(2)[1])),
        "receive_tested_out_of_order" => drop(test(receives(2).1[1])),
        "consumed_out_of_order" => {
            let (pair, recvs) = receives(1);
            pair.consumed(recvs[0]);
        }
        "too_long" => {
            let (pair, memory, mr) = registered();
            let _ = pair.send(&memory, LEN, mr);
        }
        "two_at_once" => {
            let (pair, _, mut mr) = registered();
            let (mut data, mut size, mut tag, mut request) = (null_mut(), 10, 0, null_mut());
            // SAFETY: arrays of one, of which no more is read.
            unsafe { NET.irecv.expect("irecv")(pair.recv, 2, &mut data, &mut size, &mut tag, &mut mr, &mut request) };
        }
        "host_receive" => host_receives_are_refused(),
        "reset" => {
            let pair = Pair::new();
            assert_eq!(counters().flow_rules.load(Acquire), 2);
            assert_eq!(reset_connections(|_, _| true), 3, "of 6: each reset also closes the other end");
            pair.close_recv();
        }
        "sigpipe_of_set_up" => drop(Pair::new()),
        "one_message" => one_message(),
        "double_import" => double_import(),
        "meta_after_close" => meta_after_close(),
        "sigpipe_of_the_sender" => sigpipe_of_the_sender(),
        "sigpipe_of_the_receiver" => death(false),
        "silence_after_death" => death(true),
        "windows_and_order" => windows_and_order(),
        "sizes_are_not_enforced" => sizes_are_not_enforced(),
        "host_receives_are_refused" => host_receives_are_refused(),
        "a_warning_every_test" => a_warning_every_test(),
        "nothing_moves" => nothing_moves(LEN),
        "too_long_hangs" => nothing_moves(8192),
        "set_up_takes_its_time" => {
            let begun = Instant::now();
            init();
            Pair::new();
            assert!(begun.elapsed() >= Duration::from_millis(500));
        }
        "counts" => counts(),
        other => panic!("no case {other}"),
    }
}

fn registered() -> (Pair, Memory, *mut c_void) {
    let (pair, memory) = (Pair::new(), Memory::new());
    let mr = pair.register(&memory);
    (pair, memory, mr)
}

fn sends(n: usize) -> Vec<*mut c_void> {
    let (pair, memory, mr) = registered();
    (0..n).map(|_| pair.send(&memory, 100, mr).expect("isend")).collect()
}

fn receives(n: usize) -> (Pair, Vec<*mut c_void>) {
    let (pair, _, mr) = registered();
    let requests = (0..n).map(|_| pair.recv(100, mr).expect("irecv")).collect();
    (pair, requests)
}

/// A logger that is not variadic: on supported systems a caller may pass more arguments than it takes.
unsafe extern "C" fn quiet(_level: c_int, _flags: c_ulong, _file: *const c_char, _line: c_int, _format: *const c_char) {}

fn unsafe_init(logger: ncclDebugLogger_t) -> c_int {
    // SAFETY: the first call of the plugin.
    unsafe { NET.init.expect("init")(logger) }
}

fn init() {
    // SAFETY: the fixed arguments are the same.
    let logger = unsafe { std::mem::transmute::<*const (), ncclDebugLogger_t>(quiet as *const ()) };
    assert_eq!(unsafe_init(logger), 0);
}

/// Page-aligned memory.
struct Memory(*mut u8);
impl Memory {
    fn new() -> Memory {
        // SAFETY: a fresh mapping with a hole behind it.
        unsafe {
            let at = libc::mmap(
                null_mut(),
                LEN + 4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            libc::munmap(at.cast::<u8>().add(LEN).cast(), 4096);
            for i in 0..LEN {
                at.cast::<u8>().add(i).write((i * 7 + i / 251) as u8);
            }
            Memory(at.cast())
        }
    }
}

fn listen(handle: &mut [u8; 128]) -> *mut c_void {
    let mut comm = null_mut();
    // SAFETY: as the contract says.
    assert_eq!(unsafe { NET.listen.expect("listen")(0, handle.as_mut_ptr().cast(), &mut comm) }, 0);
    comm
}

/// Calls with SIGPIPE blocked; threads that the plugin starts inherit the mask.
fn quietly<R>(call: impl FnOnce() -> R) -> R {
    if std::env::var(CASE).as_deref() == Ok("sigpipe_of_set_up") {
        return call();
    }
    // SAFETY: this thread's own mask.
    unsafe {
        let (mut set, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut before);
        let result = call();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, null_mut());
        result
    }
}

fn connect(handle: &mut [u8; 128]) -> *mut c_void {
    let mut comm = null_mut();
    // SAFETY: as the contract says, or as a case breaks it.
    let code = quietly(|| unsafe { NET.connect.expect("connect")(0, handle.as_mut_ptr().cast(), &mut comm, &mut null_mut()) });
    assert_eq!(code, 0);
    comm
}

fn accept(listen: *mut c_void, device: *mut ncclNetDeviceHandle_v7) -> *mut c_void {
    let (mut comm, mut device) = (null_mut(), device);
    // SAFETY: as above.
    let code = quietly(|| unsafe { NET.accept.expect("accept")(listen, &mut comm, &mut device) });
    assert_eq!(code, 0);
    comm
}

/// Both ends of a channel in one process.
struct Pair {
    listen: *mut c_void,
    send: *mut c_void,
    recv: *mut c_void,
    device: Box<ncclNetDeviceHandle_v7>,
}

impl Pair {
    fn new() -> Pair {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(init);
        Pair::with(true)
    }
    fn with(device_handle: bool) -> Pair {
        let mut handle = Box::new([0; 128]);
        let listen = listen(&mut handle);
        // SAFETY: plain data.
        let mut device: Box<ncclNetDeviceHandle_v7> = Box::new(unsafe { std::mem::zeroed() });
        let target = if device_handle { &raw mut *device } else { null_mut() };
        let (mut send, mut recv): (*mut c_void, *mut c_void) = (null_mut(), null_mut());
        while send.is_null() || recv.is_null() {
            if send.is_null() {
                send = connect(&mut handle);
            }
            if recv.is_null() {
                recv = accept(listen, target);
            }
        }
        Pair { listen, send, recv, device }
    }
    fn register_kind(&self, data: *mut u8, len: usize, kind: c_int) -> *mut c_void {
        let mut mr = null_mut();
        // SAFETY: as the contract says, or as a case breaks it.
        assert_eq!(unsafe { NET.regMr.expect("regMr")(self.send, data.cast(), len as c_int, kind, &mut mr) }, 0);
        mr
    }
    fn register(&self, memory: &Memory) -> *mut c_void {
        self.register_kind(memory.0, LEN, NCCL_PTR_CUDA)
    }
    fn deregister(&self, mr: *mut c_void) {
        // SAFETY: as above.
        assert_eq!(unsafe { NET.deregMr.expect("deregMr")(self.send, mr) }, 0);
    }
    fn send(&self, memory: &Memory, len: usize, mr: *mut c_void) -> Result<*mut c_void, c_int> {
        let mut request = null_mut();
        // SAFETY: as above.
        match unsafe { NET.isend.expect("isend")(self.send, memory.0.cast(), len as c_int, 0, mr, &mut request) } {
            0 => Ok(request),
            code => Err(code),
        }
    }
    fn recv(&self, len: usize, mr: *mut c_void) -> Result<*mut c_void, c_int> {
        let (mut request, mut data, mut size, mut tag, mut mr) = (null_mut(), null_mut(), len as c_int, 0, mr);
        // SAFETY: as above.
        match unsafe { NET.irecv.expect("irecv")(self.recv, 1, &mut data, &mut size, &mut tag, &mut mr, &mut request) } {
            0 => Ok(request),
            code => Err(code),
        }
    }
    fn consumed(&self, request: *mut c_void) -> c_int {
        // SAFETY: as above.
        unsafe { NET.irecvConsumed.expect("irecvConsumed")(self.recv, 1, request) }
    }
    fn close_send(&self) {
        // SAFETY: as above.
        assert_eq!(unsafe { NET.closeSend.expect("closeSend")(self.send) }, 0);
    }
    fn close_recv(&self) {
        // SAFETY: as above.
        assert_eq!(unsafe { NET.closeRecv.expect("closeRecv")(self.recv) }, 0);
    }
    /// The message in a slot, put together from its fragments, and their number.
    fn message(&self, slot: usize) -> (Vec<u8>, usize) {
        // SAFETY: the receive in the slot is done and not consumed.
        unsafe {
            let device = self.device.handle.cast::<unpackNetDeviceHandle>().read();
            let count = (&raw const (*device.meta).cnt[slot]).read() as usize;
            let mut bytes = vec![0; LEN * 16];
            let mut end = 0;
            for i in 0..count {
                let entry = (&raw const (*device.meta).mem[slot][i]).read();
                let (at, len) = (entry.dst_off as usize, entry.len as usize);
                std::ptr::copy_nonoverlapping(
                    device.bounce_buf.cast::<u8>().add(entry.src_off as usize),
                    bytes.as_mut_ptr().add(at),
                    len,
                );
                end = end.max(at + len);
            }
            bytes.truncate(end);
            (bytes, count)
        }
    }
}

fn test(request: *mut c_void) -> Result<bool, c_int> {
    let (mut done, mut size) = (0, -12345);
    // SAFETY: as above.
    let code = unsafe { NET.test.expect("test")(request, &mut done, &mut size) };
    assert_eq!(size, -12345, "test writes nothing to its size");
    if code == 0 {
        Ok(done != 0)
    } else {
        Err(code)
    }
}

/// Tests until it is done; `false` on time-out.
fn finish(request: *mut c_void, partner: Option<*mut c_void>) -> bool {
    let mut partner = partner;
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        if partner.is_some_and(|p| test(p) == Ok(true)) {
            partner = None;
        }
        if test(request).expect("test") {
            while partner.is_some_and(|p| test(p) != Ok(true)) && Instant::now() < until {}
            return true;
        }
    }
    false
}

fn two_threads() {
    init();
    let registering = || {
        for _ in 0..1000 {
            listen(&mut [0; 128]);
        }
    };
    std::thread::scope(|s| {
        s.spawn(registering);
        registering();
    });
}

fn close_listen_early() {
    init();
    let comm = listen(&mut [0; 128]);
    // SAFETY: plain data.
    let mut device = unsafe { std::mem::zeroed() };
    assert!(accept(comm, &mut device).is_null());
    // SAFETY: what the contract forbids.
    unsafe { NET.closeListen.expect("closeListen")(comm) };
}

fn accept_twice() {
    let pair = Pair::new();
    // SAFETY: plain data.
    accept(pair.listen, &mut unsafe { std::mem::zeroed() });
}

fn connect_to(handle: &mut [u8; 128]) {
    if counters().listens.load(Acquire) == 0 {
        init();
    }
    connect(handle);
}

/// A fresh handle with a byte changed.
fn altered(at: usize, value: u8) -> [u8; 128] {
    init();
    let mut handle = [0; 128];
    listen(&mut handle);
    handle[at] = value;
    handle
}

fn moved_handle() {
    init();
    let mut handle = [0; 128];
    listen(&mut handle);
    connect(&mut handle);
    let mut other = Box::new(handle);
    connect(&mut other);
}

fn register_at(offset: usize, len: usize) {
    let pair = Pair::new();
    pair.register_kind(Memory::new().0.wrapping_add(offset), len, NCCL_PTR_CUDA);
}

fn no_device_handle() {
    init();
    let pair = Pair::with(false);
    let mr = pair.register(&Memory::new());
    let _ = pair.recv(100, mr);
}

fn one_message() {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register(&memory);
    for round in 0..40 {
        let recv = pair.recv(LEN, mr).expect("irecv");
        let send = pair.send(&memory, LEN, mr).expect("isend");
        assert!(finish(recv, Some(send)));
        let (bytes, fragments) = pair.message(round % 16);
        assert!(fragments > LEN / 4096);
        // SAFETY: LEN bytes of the test.
        assert!(bytes == unsafe { std::slice::from_raw_parts(memory.0, LEN) });
        assert_eq!(pair.consumed(recv), 0);
        // Consumed memory is overwritten.
        assert!(pair.message(round % 16).0.iter().all(|&b| b == 0xDD));
    }
    assert_eq!(counters().pages_out.load(Acquire), 0);
}

fn double_import() {
    init();
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                let pair = Pair::with(true);
                std::thread::sleep(Duration::from_millis(300));
                // SAFETY: reads the bounce buffer as an unpack does.
                unsafe {
                    let device = pair.device.handle.cast::<unpackNetDeviceHandle>().read();
                    std::hint::black_box(device.bounce_buf.cast::<u8>().read_volatile());
                }
                std::mem::forget(pair);
            });
        }
    });
    assert_eq!(counters().imports.load(Acquire), 2, "the threads did not race");
}

fn meta_after_close() {
    let pair = Pair::new();
    pair.close_recv();
    pair.message(0);
}

fn sigpipe_of_the_sender() {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register(&memory);
    pair.close_recv();
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(5));
        if let Ok(request) = pair.send(&memory, LEN, mr) {
            let _ = test(request);
        }
    }
}

/// The sender dies. `silent`: every posted receive is announced, and none ends; else one is not, and the plugin raises SIGPIPE.
fn death(silent: bool) {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register(&memory);
    let recv = pair.recv(LEN, mr).expect("irecv");
    if silent {
        // Announced, with a part of its data: the message is too long.
        pair.send(&memory, LEN, mr).expect("isend");
    }
    pair.close_send();
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        assert_eq!(test(recv), Ok(false));
    }
}

fn windows_and_order() {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register(&memory);
    let recvs: Vec<_> = (0..16).map(|_| pair.recv(LEN, mr).expect("irecv")).collect();
    assert_eq!(pair.recv(LEN, mr), Err(3), "the 17th receive");
    let sends: Vec<_> = (0..16).map(|_| pair.send(&memory, LEN, mr).expect("isend")).collect();
    assert_eq!(pair.send(&memory, LEN, mr), Err(3), "the 17th send");
    assert_eq!((test(sends[3]), test(recvs[1])), (Err(3), Err(3)), "not the oldest");
    for (send, recv) in sends.iter().zip(&recvs) {
        assert!(finish(*recv, Some(*send)));
    }
    assert_eq!(pair.recv(LEN, mr), Err(3), "done is not consumed");
    assert_eq!(pair.consumed(recvs[1]), 3, "out of order");
    assert!(recvs.iter().all(|&r| pair.consumed(r) == 0));
    assert!(pair.recv(LEN, mr).is_ok());
}

fn sizes_are_not_enforced() {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register(&memory);
    let recv = pair.recv(100, mr).expect("irecv");
    let send = pair.send(&memory, 8192, mr).expect("isend");
    assert!(finish(recv, Some(send)));
    assert_eq!(pair.message(0).0.len(), 8192);
}

fn host_receives_are_refused() {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register_kind(memory.0.wrapping_add(5), 100, NCCL_PTR_HOST);
    assert_eq!(pair.recv(100, mr), Err(3));
}

fn a_warning_every_test() {
    let pair = Pair::new();
    let mr = pair.register(&Memory::new());
    let first = pair.recv(LEN, mr).expect("irecv");
    (0..11).for_each(|_| assert!(pair.recv(LEN, mr).is_ok()));
    assert_eq!(test(first), Ok(false));
    assert_eq!(counters().warnings.load(Acquire), 0);
    pair.recv(LEN, mr).expect("irecv");
    (0..100).for_each(|_| assert_eq!(test(first), Ok(false)));
    assert_eq!(counters().warnings.load(Acquire), 100);
}

fn nothing_moves(len: usize) {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register(&memory);
    let recv = pair.recv(len, mr).expect("irecv");
    let send = pair.send(&memory, len, mr).expect("isend");
    for _ in 0..200 {
        assert_eq!((test(send), test(recv)), (Ok(false), Ok(false)));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn counts() {
    let pair = Pair::new();
    let memory = Memory::new();
    let mr = pair.register(&memory);
    let c = counters();
    assert_eq!([&c.registrations, &c.descriptors, &c.imports, &c.comms].map(|n| n.load(Acquire)), [1, 2, 1, 2]);
    pair.deregister(mr);
    pair.close_send();
    pair.close_recv();
    assert_eq!([&c.registrations, &c.descriptors, &c.comms].map(|n| n.load(Acquire)), [0, 0, 0]);
    assert_eq!(
        [&c.registrations_most, &c.registrations_ever, &c.connects_ended, &c.accepts_ended].map(|n| n.load(Acquire)),
        [1, 1, 1, 1]
    );
}
