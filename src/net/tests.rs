//! The code of this folder over foreign plugins: the strict foreign plugin, which ends the process at the first violation of the
//! contract, and a table of version 8. Each case has its own process, since a plugin is initialised once.

use super::comm::{Connecting, ListenComm, RecvComm, SendComm};
use super::plugin::Plugin;
use super::plugin_thread::PluginThread;
use super::registrations::Keep;
use super::setup::{agree, nics_for, Establishing, Listening, Nics, Offer, Pair, Role};
use super::traits::{HandleCheck, Traits};
use super::Scope;
use crate::addresses::AllowList;
use crate::status::ErrorKind;
use crate::types::Span;
use nccl_net_abi::NCCL_PTR_CUDA;
use nccl_net_strict_foreign::flows::reset_connections;
use nccl_net_strict_foreign::rules::counters;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CASE: &str = "UCCL_NET_TEST_CASE";
const BREAK: &str = "UCCL_NET_TEST_BREAK";
const TWO_NICS: &str = "eth1@127.0.0.1,eth2@127.0.0.2";
const LATE: (&str, &str) = ("STRICT_FOREIGN_LATE", "1");
const TCPXO: (&str, &str) = ("STRICT_FOREIGN_CONTRACT", "tcpxo");
const ANSWERS: &str = "STRICT_FOREIGN_ANSWERS";
const HOW: &str = "UCCL_NET_TEST_HOW";
const LEAKED: &str = "bytes left the memory after its release";
const ONE_DEAD: &str = "eth1@127.0.0.1,eth2@127.0.0.2@dead";

fn run(case: &str, devices: &str, more: &[(&str, &str)]) {
    let out = output(case, devices, more);
    assert!(out.status.success(), "{case}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
}

fn output(case: &str, devices: &str, more: &[(&str, &str)]) -> std::process::Output {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "net::tests::child", "--nocapture", "--test-threads=1"]);
    environment(&mut child, case, devices, more).output().expect("child")
}

fn environment<'a>(child: &'a mut Command, case: &str, devices: &str, more: &[(&str, &str)]) -> &'a mut Command {
    child.env(CASE, case);
    child.env("STRICT_FOREIGN_DEVICES", devices).env("STRICT_FOREIGN_CONNECT_MS", "20").env("STRICT_FOREIGN_ACCEPT_MS", "30");
    child.env("NCCL_DYNAMIC_CHUNK_SIZE", "524288").envs(more.iter().copied())
}

#[test]
fn tcpxo_is_set_up_and_given_up() {
    for case in ["two_nics", "many_set_ups_at_once", "abandoned", "never_begun", "the_peer_never_comes", "peer_says_less"] {
        run(case, TWO_NICS, &[TCPXO]);
    }
    run("dead_nic", ONE_DEAD, &[TCPXO]);
    run("wild_handles_of_tcpxo", TWO_NICS, &[TCPXO]);
    run("sigpipe", TWO_NICS, &[TCPXO]);
    for (case, missing, why) in [
        ("many_set_ups_at_once", "serial_setup", "inside another set-up call"),
        ("abandoned", "lingers", "while an accept is pending"),
        ("wild_handles_of_tcpxo", "handle_check", "which it never put there"),
    ] {
        let out = output(case, TWO_NICS, &[TCPXO, (BREAK, missing)]);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{case} without {missing}: {} {text}", out.status);
        assert!(text.contains(why), "{case} without {missing}: {text}");
    }
}

/// A closed comm of TCPXO goes on writing to the memory of its receives.
#[test]
fn memory_lasts_until_the_plugin_has_dropped_its_registration() {
    run("memory_after_the_close", "eth1@127.0.0.1", &[TCPXO]);
    for how in ["hangup", "refusal", "garbage"] {
        let answers = format!("{}-{how}", answers("never-dropped"));
        run("memory_is_never_dropped", "eth1@127.0.0.1", &[TCPXO, (ANSWERS, &answers), (HOW, how)]);
    }
}

/// A receive manager that does not answer costs a caller no more than the limit of a call, and no call its memory.
#[test]
fn a_registration_that_stands_still_is_left_behind() {
    for case in ["register_stands_still", "deregister_stands_still"] {
        run(case, "eth1@127.0.0.1", &[TCPXO, (ANSWERS, &answers(case))]);
    }
}

/// A file that says what the receive manager does wrong.
fn answers(case: &str) -> String {
    std::env::temp_dir().join(format!("uccl-answers-{case}-{}", std::process::id())).display().to_string()
}

/// Sets what the receive manager does wrong.
fn manager_answers(words: &str) {
    std::fs::write(std::env::var(ANSWERS).expect("file"), words).expect("file");
}

/// Shows that every protection is needed: without it the process of the case ends.
#[test]
fn without_its_protection_each_case_ends_the_process() {
    for (case, missing, signal, why) in [
        ("many_set_ups_at_once", "serial_setup", libc::SIGABRT, "inside another set-up call"),
        ("abandoned", "lingers", libc::SIGABRT, "while an accept is pending"),
        ("wild_handles", "handle_check", libc::SIGABRT, "connect"),
        ("registrations", "shared_registrations", libc::SIGABRT, "registered twice"),
        ("sigpipe", "raises_sigpipe", libc::SIGPIPE, ""),
        ("reset_before_the_close", "asks_for_peers", libc::SIGABRT, "closeRecv on a data socket that has no peer"),
    ] {
        let out = output(case, TWO_NICS, &[(BREAK, missing)]);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.signal(), Some(signal), "{case} without {missing}: {} {text}", out.status);
        assert!(text.contains(why), "{case} without {missing}: {text}");
    }
}

#[test]
fn set_up_of_a_foreign_plugin_is_serial() {
    run("two_nics", TWO_NICS, &[]);
    run("many_set_ups_at_once", TWO_NICS, &[]);
    run("real_delays", TWO_NICS, &[("STRICT_FOREIGN_CONNECT_MS", "300"), ("STRICT_FOREIGN_ACCEPT_MS", "500")]);
}

#[test]
fn unusable_nics_are_left_out() {
    run("dead_nic", ONE_DEAD, &[]);
    run("peer_says_less", TWO_NICS, &[]);
    run("nothing_in_common", TWO_NICS, &[]);
}

#[test]
fn abandoned_set_ups_leave_nothing() {
    run("abandoned", TWO_NICS, &[]);
    run("never_begun", TWO_NICS, &[]);
    run("the_peer_never_comes", TWO_NICS, &[]);
    run("accepts_that_fail", TWO_NICS, &[]);
}

#[test]
fn a_peers_handle_is_checked() {
    run("wild_handles", TWO_NICS, &[]);
}

#[test]
fn registrations_are_shared_and_dropped() {
    run("registrations", TWO_NICS, &[]);
    run("registrations_in_flight", TWO_NICS, &[]);
    run("registrations_without_descriptors", TWO_NICS, &[]);
}

#[test]
fn sends_that_end_with_their_comm_send_no_more() {
    run("sends_under_way", TWO_NICS, &[LATE]);
    let out = output("sends_under_way", TWO_NICS, &[LATE, (BREAK, "sends_late")]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(text.contains(LEAKED), "without the reset the memory is sent to the peer: {text}");
}

/// A control connection without an answer shows while nothing is in flight.
#[test]
fn a_silent_control_connection_is_noticed() {
    let up = "ip link set lo up";
    if !Command::new("unshare").args(["--net", "sh", "-c", up]).output().is_ok_and(|out| out.status.success()) {
        println!("SKIPPED: no network namespace can be made here (unshare, ip)");
        return;
    }
    let this = std::env::current_exe().expect("this program");
    let command = format!("{up} && exec {} --exact net::tests::child --nocapture --test-threads=1", this.display());
    let mut child = Command::new("unshare");
    child.args(["--net", "sh", "-c", &command]);
    let out = environment(&mut child, "silent_control", TWO_NICS, &[]).output().expect("child");
    assert!(out.status.success(), "{}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
}

/// A slow interface queues packets that read the memory only when they are sent.
#[test]
fn packets_queued_by_a_slow_interface_are_sent_before_the_close_ends() {
    let slow = "ip link set lo up && tc qdisc add dev lo root tbf rate 50mbit burst 64k latency 500ms";
    let namespace = |command: &str| {
        let mut shell = Command::new("unshare");
        shell.args(["--net", "sh", "-c", command]);
        shell
    };
    if !namespace(slow).output().is_ok_and(|out| out.status.success()) {
        println!("SKIPPED: no slow interface can be made here (unshare, ip, tc)");
        return;
    }
    let this = std::env::current_exe().expect("this program");
    let command = format!("{slow} && exec {} --exact net::tests::child --nocapture --test-threads=1", this.display());
    let out = environment(&mut namespace(&command), "sends_under_way", TWO_NICS, &[LATE]).output().expect("child");
    assert!(out.status.success(), "{}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_comm_whose_sockets_were_reset_closes() {
    run("reset_before_the_close", TWO_NICS, &[]);
}

#[test]
fn sigpipe_stays_inside() {
    run("sigpipe", TWO_NICS, &[]);
}

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    // SAFETY: this process' own disposition: as in a C program.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let plugin = foreign();
    match case.as_str() {
        "two_nics" => two_nics(&plugin),
        "many_set_ups_at_once" => many_set_ups_at_once(&plugin),
        "real_delays" => real_delays(&plugin),
        "dead_nic" => dead_nic(&plugin),
        "peer_says_less" => peer_says_less(&plugin),
        "nothing_in_common" => nothing_in_common(&plugin),
        "abandoned" => abandoned(&plugin),
        "never_begun" => never_begun(&plugin),
        "the_peer_never_comes" => the_peer_never_comes(&plugin),
        "silent_control" => silent_control(&plugin),
        "accepts_that_fail" => accepts_that_fail(&plugin),
        "wild_handles" => wild_handles(&plugin),
        "wild_handles_of_tcpxo" => wild_handles_of_tcpxo(&plugin),
        "memory_after_the_close" => memory_after_the_close(&plugin),
        "memory_is_never_dropped" => memory_is_never_dropped(&plugin),
        "register_stands_still" => register_stands_still(&plugin),
        "deregister_stands_still" => deregister_stands_still(&plugin),
        "registrations" => registrations(&plugin),
        "registrations_in_flight" => registrations_in_flight(&plugin),
        "registrations_without_descriptors" => registrations_without_descriptors(&plugin),
        "sends_under_way" => sends_under_way(&plugin),
        "reset_before_the_close" => reset_before_the_close(&plugin),
        "sigpipe" => sigpipe(&plugin),
        other => panic!("no case {other}"),
    }
}

fn foreign() -> Arc<Plugin> {
    let take_away = |t: &mut Traits| match std::env::var(BREAK).as_deref() {
        Ok("serial_setup") => t.serial_setup = false,
        Ok("lingers") => t.lingers = false,
        Ok("handle_check") => t.handle_check = HandleCheck::Own,
        Ok("shared_registrations") => t.shared_registrations = false,
        Ok("raises_sigpipe") => t.raises_sigpipe = false,
        Ok("sends_late") => t.sends_late = false,
        Ok("asks_for_peers") => t.asks_for_peers = false,
        Ok(other) => panic!("no trait {other}"),
        Err(_) => {}
    };
    let tcpxo = std::env::var(TCPXO.0).is_ok_and(|contract| contract == TCPXO.1);
    let (table, name) = match tcpxo {
        true => (&nccl_net_strict_foreign::tcpxo::TABLE, "tcpxo"),
        false => (&nccl_net_strict_foreign::TCPX, "tcpx"),
    };
    let plugin = Plugin::for_test(table, take_away).expect("plugin");
    assert_eq!((plugin.wire_name(), plugin.abi_version, plugin.traits.delivers), (name, 7, tcpxo));
    let t = &plugin.traits;
    assert!(t.follows_gpu && t.polled && t.device_memory && !t.host_memory && !t.vectored && !t.doorbell && !t.progress_bytes);
    plugin
}

fn open(plugin: &Arc<Plugin>, n: usize) -> Listening {
    let devices = plugin.current_devices().expect("devices");
    Listening::open(plugin, &devices, &nics_for(plugin, &devices, None), n, Scope::None, Role::Both).expect("listen")
}

/// Both ends of a set-up, polled until they are up.
fn both(a: Listening, b: Listening) -> (Vec<Pair>, Vec<Pair>) {
    let (ours, theirs) = (a.offers(), b.offers());
    let (mut a, mut b) = (a.establish(&theirs, None, &AllowList::default()), b.establish(&ours, None, &AllowList::default()));
    let (mut up_a, mut up_b) = (None, None);
    let until = Instant::now() + Duration::from_secs(20);
    while up_a.is_none() || up_b.is_none() {
        assert!(Instant::now() < until, "{} / {}", a.missing(), b.missing());
        poll(&mut a, &mut up_a);
        poll(&mut b, &mut up_b);
        std::thread::sleep(a.retry_in());
    }
    (up_a.unwrap_or_default(), up_b.unwrap_or_default())
}

fn poll(side: &mut Establishing, up: &mut Option<Vec<Pair>>) {
    if up.is_none() {
        *up = side.poll().expect("poll");
    }
}

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn nothing_is_left(plugin: &Arc<Plugin>) {
    let c = counters();
    let ended = || {
        let pairs = [(&c.connects_begun, &c.connects_ended), (&c.accepts_begun, &c.accepts_ended)];
        pairs.iter().all(|(begun, end)| begun.load(Acquire) == end.load(Acquire))
    };
    wait("every connect and accept was polled to its end", ended);
    wait("comms are closed", || c.comms.load(Acquire) == 0);
    wait("nothing is polled any more", || plugin.thread().map_or(0, PluginThread::tasks) == 0);
    assert_eq!(c.imports.load(Acquire).min(1), c.imports.load(Acquire), "receive memory was imported twice");
}

fn two_nics(plugin: &Arc<Plugin>) {
    let (a, b) = both(open(plugin, 4), open(plugin, 4));
    let names = |side: &[Pair]| side.iter().map(|p| (p.index, p.nic.clone())).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    assert_eq!(names(&a), [(0, "eth1".into()), (1, "eth2".into()), (2, "eth1".into()), (3, "eth2".into())]);
    for (from, to) in a.into_iter().zip(b) {
        move_some(from.send, to.recv);
        move_some(to.send, from.recv);
    }
    nothing_is_left(plugin);
}

/// Moves a message and checks it in the bounce buffer.
fn move_some(mut send: SendComm, mut recv: RecvComm) {
    let memory = Memory::new(64 << 10);
    let span = Span { id: 1, addr: memory.addr(), len: memory.len as u64 };
    // SAFETY: the memory outlives both comms.
    unsafe {
        let mhandle = send.region(span, span.addr, unheld).expect("region");
        assert!(recv.recv(memory.at.cast(), memory.len, 0, mhandle).expect("recv"));
        assert!(send.send(memory.at.cast(), memory.len, 0, mhandle).expect("send"));
    }
    let until = Instant::now() + Duration::from_secs(10);
    let mut sent = false;
    while recv.test_oldest().expect("test").is_none() {
        sent = sent || send.test_oldest().expect("test");
        assert!(Instant::now() < until, "nothing arrived");
    }
    recv.consume_oldest().expect("consumed");
    while !sent {
        sent = send.test_oldest().expect("test");
    }
}

/// A send comm to a peer of this test, and the peer's ends of its sockets: control, and data.
fn to_a_raw_peer(plugin: &Arc<Plugin>) -> (SendComm, TcpStream, Vec<TcpStream>) {
    let mut handle = open(plugin, 1).offers().swap_remove(0).handle;
    let listeners = [0, 48].map(|at| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        handle[at + 2..at + 4].copy_from_slice(&listener.local_addr().expect("address").port().to_be_bytes());
        listener
    });
    let mut connecting = Connecting::new(plugin, 0, &Scope::None, handle, None).expect("connecting");
    assert!(connecting.poll().expect("begun").is_none());
    let accept = |listener: &TcpListener| {
        let (mut socket, _) = listener.accept().expect("accept");
        socket.read_exact(&mut [0; 8]).expect("its first bytes");
        socket
    };
    let control = accept(&listeners[1]);
    let data = (0..2).map(|_| accept(&listeners[0])).collect();
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(send) = connecting.poll().expect("poll") {
            return (send, control, data);
        }
        assert!(Instant::now() < until, "the connect hangs");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The strict foreign plugin sends like TCPX here: the kernel reads the memory when the bytes are sent.
fn sends_under_way(plugin: &Arc<Plugin>) {
    const RELEASED: u8 = 0xEE;
    let memory = Memory::new(512 << 10);
    let span = Span { id: 1, addr: memory.addr(), len: memory.len as u64 };
    let end = |mut socket: TcpStream| {
        let mut bytes = Vec::new();
        // Without a reset the connection never ends, since this process has copies of its socket.
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        let end = socket.read_to_end(&mut bytes).map_err(|e| e.kind());
        assert!(!bytes.contains(&RELEASED), "{LEAKED}");
        end
    };
    // Everything was acknowledged, so the end is orderly.
    let (mut send, _control, data) = to_a_raw_peer(plugin);
    // SAFETY: the memory outlives the comm.
    unsafe {
        let mhandle = send.region(span, span.addr, unheld).expect("region");
        assert!(send.send(memory.at.cast(), 1000, 0, mhandle).expect("send"));
    }
    wait("the send is done", || send.test_oldest().expect("test"));
    drop(send);
    assert_eq!(data.into_iter().map(end).collect::<Vec<_>>(), [Ok(500), Ok(500)]);
    // More than both kernels' buffers hold: the rest is never sent, even if a child has copies of the sockets.
    let (mut send, _control, data) = to_a_raw_peer(plugin);
    let copies: Vec<OwnedFd> = data.iter().flat_map(other_ends).collect();
    assert_eq!(copies.len(), 2);
    // SAFETY: as above.
    unsafe {
        let mhandle = send.region(span, span.addr, unheld).expect("region");
        while send.inflight() < 16 {
            assert!(send.send(memory.at.cast(), memory.len, 0, mhandle).expect("send"));
        }
    }
    send.close(());
    wait("the close has ended", || send.is_closed().expect("closed"));
    // SAFETY: our own memory; only the kernel's late sends, which this test checks for, also read it.
    unsafe { memory.at.write_bytes(RELEASED, memory.len) };
    assert_eq!(data.into_iter().map(end).collect::<Vec<_>>(), [Err(std::io::ErrorKind::ConnectionReset); 2]);
    drop(copies);
    nothing_is_left(plugin);
}

/// Copies of the sockets in this process that are connected to `socket`.
fn other_ends(socket: &TcpStream) -> Vec<OwnedFd> {
    let there = socket.peer_addr().expect("peer");
    let numbers = std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
    let is = |fd: &RawFd| {
        // SAFETY: only asked for its address, and never closed here.
        let other = ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(*fd) });
        other.local_addr().is_ok_and(|here| here == there)
    };
    // SAFETY: open, as just checked.
    numbers.filter(is).map(|fd| unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().expect("copy")).collect()
}

fn reset_before_the_close(plugin: &Arc<Plugin>) {
    let (a, b) = both(open(plugin, 4), open(plugin, 4));
    assert_eq!(counters().flow_rules.load(Acquire), 16);
    assert!(reset_connections(|_, _| true) >= 24);
    drop((a, b));
    plugin.settle();
    assert_eq!(counters().flow_rules.load(Acquire), 0, "flow rules were left behind");
    nothing_is_left(plugin);
}

/// For memory that is never freed.
fn unheld() -> Keep {
    Box::new(())
}

/// Page-aligned memory.
struct Memory {
    at: *mut u8,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Memory {
        let layout = std::alloc::Layout::from_size_align(len, 4096).expect("layout");
        // SAFETY: more than 0 bytes; never freed.
        Memory { at: unsafe { std::alloc::alloc_zeroed(layout) }, len }
    }
    fn addr(&self) -> u64 {
        self.at as u64
    }
}

fn many_set_ups_at_once(plugin: &Arc<Plugin>) {
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..3 {
                    let (a, b) = both(open(plugin, 4), open(plugin, 4));
                    assert_eq!((a.len(), b.len()), (4, 4));
                    for (a, b) in a.into_iter().zip(b) {
                        move_some(a.send, b.recv);
                    }
                }
            });
        }
    });
    nothing_is_left(plugin);
}

fn real_delays(plugin: &Arc<Plugin>) {
    let begun = Instant::now();
    let (a, _b) = both(open(plugin, 16), open(plugin, 16));
    assert_eq!(a.len(), 16);
    // Sleeps overlap: 32 halves take about as long as the slowest of them.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

fn dead_nic(plugin: &Arc<Plugin>) {
    let (a, b) = both(open(plugin, 4), open(plugin, 4));
    for side in [&a, &b] {
        assert_eq!(side.iter().map(|p| (p.index, p.nic.as_str())).collect::<Vec<_>>(), [(0, "eth1"), (2, "eth1")]);
    }
    // A NIC that is absent is offered behind the others, so that its channels have a place.
    let devices = plugin.current_devices().expect("devices");
    let nics = Nics { usable: vec![0], absent: vec!["eth2".to_owned()] };
    let offered = Listening::open(plugin, &devices, &nics, 4, Scope::None, Role::Both).expect("listen").offers();
    assert_eq!(offered.iter().map(|o| o.nic.as_str()).collect::<Vec<_>>(), ["eth1", "eth1", "eth1", "eth1", "eth2", "eth2"]);
    assert!(offered.iter().all(|o| (o.nic == "eth2") == o.handle.iter().all(|&byte| byte == 0)));
    // The plugin still uses the channels that did not come up. Closing them would have ended the process.
    assert!(plugin.thread().is_some_and(|thread| thread.tasks() > 0));
}

fn peer_says_less(plugin: &Arc<Plugin>) {
    let (a, b) = both(open(plugin, 4), open(plugin, 4));
    let a = agree(a, &[1, 2, 77]);
    assert_eq!(a.iter().map(|p| p.index).collect::<Vec<_>>(), [1, 2]);
    drop((a, b));
    nothing_is_left(plugin);
    // The same while channels are still coming up.
    let (a, b) = (open(plugin, 4), open(plugin, 4));
    let (ours, theirs) = (a.offers(), b.offers());
    let (mut a, mut b) = (a.establish(&theirs, None, &AllowList::default()), b.establish(&ours, None, &AllowList::default()));
    a.peer_has(&[3]);
    let (mut up_a, mut up_b) = (None, None);
    let until = Instant::now() + Duration::from_secs(10);
    while up_a.is_none() && Instant::now() < until {
        poll(&mut a, &mut up_a);
        poll(&mut b, &mut up_b);
    }
    let up = up_a.expect("engine a");
    assert_eq!(up.iter().map(|p| p.index).collect::<Vec<_>>(), [3]);
}

fn nothing_in_common(plugin: &Arc<Plugin>) {
    let foreign: Vec<Offer> = open(plugin, 4).offers().into_iter().map(|o| Offer { nic: "eth3\n".into(), ..o }).collect();
    let mut side = open(plugin, 4).establish(&foreign, None, &AllowList::default());
    assert!(side.poll().expect("no error").expect("settled").is_empty());
    let reason = side.reason().expect("a reason");
    assert!(reason.contains("eth1, eth2") && reason.contains("eth3?"), "{reason}");
    nothing_is_left(plugin);
}

fn abandoned(plugin: &Arc<Plugin>) {
    for millis in [0, 1, 5, 15, 25, 35, 60, 100] {
        let (a, b) = (open(plugin, 4), open(plugin, 4));
        let (ours, theirs) = (a.offers(), b.offers());
        let (mut a, mut b) = (a.establish(&theirs, None, &AllowList::default()), b.establish(&ours, None, &AllowList::default()));
        let until = Instant::now() + Duration::from_millis(millis);
        loop {
            let up = (a.poll().expect("a"), b.poll().expect("b"));
            if Instant::now() >= until || up.0.is_some() || up.1.is_some() {
                break;
            }
        }
        drop(a);
        drop(b);
    }
    nothing_is_left(plugin);
}

fn never_begun(plugin: &Arc<Plugin>) {
    let a = open(plugin, 4);
    drop(open(plugin, 4).establish(&a.offers(), None, &AllowList::default()));
    drop(a);
    nothing_is_left(plugin);
    assert_eq!(counters().accepts_begun.load(Acquire), 0);
}

fn the_peer_never_comes(plugin: &Arc<Plugin>) {
    let b = open(plugin, 4);
    let mut a = open(plugin, 4).establish(&b.offers(), None, &AllowList::default());
    drop(b);
    let later = Instant::now() + Duration::from_secs(4);
    let late = a.late(0, later).expect("nothing comes up").to_string();
    assert!(late.starts_with("4 of 4 channels are not up yet, and none has come up for 4.") && late.contains("eth2: "), "{late}");
    assert_eq!(a.late(0, later), None, "it is said once");
    for _ in 0..50 {
        if a.poll().is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(a);
    assert!(plugin.thread().is_some_and(|thread| thread.tasks() > 0));
    nothing_is_left(plugin);
}

fn silent_control(plugin: &Arc<Plugin>) {
    let memory = Memory::new(4096);
    let span = Span { id: 1, addr: memory.addr(), len: 4096 };
    let (mut a, mut b) = both(open(plugin, 1), open(plugin, 1));
    assert_eq!((a[0].send.control_silent(), b[0].recv.control_silent()), (None, None));
    assert!(Command::new("ip").args(["link", "set", "lo", "down"]).status().is_ok_and(|status| status.success()));
    // SAFETY: the memory outlives both comms.
    unsafe {
        let mhandle = a[0].send.region(span, span.addr, unheld).expect("region");
        assert!(a[0].send.send(memory.at.cast(), 4096, 0, mhandle).expect("send"));
        assert!(b[0].recv.recv(memory.at.cast(), 4096, 0, mhandle).expect("recv"));
    }
    wait("no silence is seen", || {
        let _ = (a[0].send.test_oldest(), b[0].recv.test_oldest());
        [a[0].send.control_silent(), b[0].recv.control_silent()].iter().any(Option::is_some)
    });
}

/// A peer that hangs up in the middle, over and over: the plugin leaves its sockets open.
fn accepts_that_fail(plugin: &Arc<Plugin>) {
    let descriptors = || std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let mut before = None;
    for _ in 0..10 {
        let listening = open(plugin, 4);
        let offers = listening.offers();
        let mut side = listening.establish(&offers, None, &AllowList::default());
        let dialled: Vec<TcpStream> = offers
            .iter()
            .map(|offer| {
                let [a, b, address @ ..] = *offer.handle[50..].first_chunk::<6>().expect("the control address");
                let mut stream = TcpStream::connect((Ipv4Addr::from(address), u16::from_be_bytes([a, b]))).expect("connect");
                stream.write_all(&[1; 8]).expect("its first bytes");
                stream
            })
            .collect();
        let until = Instant::now() + Duration::from_secs(10);
        while !matches!(side.poll(), Err(_) | Ok(Some(_))) {
            assert!(Instant::now() < until, "the accepts hang");
            std::thread::sleep(Duration::from_millis(2));
        }
        drop((side, dialled));
        nothing_is_left(plugin);
        plugin.settle();
        let now = descriptors();
        assert!(now <= *before.get_or_insert(now), "{now} descriptors are open, {before:?} after the first round");
    }
}

fn wild_handles(plugin: &Arc<Plugin>) {
    let fresh = open(plugin, 2).offers();
    let wild = |change: &dyn Fn(&mut [u8; 128])| -> Vec<Offer> {
        fresh
            .iter()
            .cloned()
            .map(|mut o| {
                change(&mut o.handle);
                o
            })
            .collect()
    };
    for offers in [
        wild(&|h| h.fill(0x41)),
        wild(&|h| h[80..88].copy_from_slice(&0x7fff_dead_beefu64.to_ne_bytes())),
        wild(&|h| h[36] = 200),
        wild(&|h| h[36] = 0),
        wild(&|h| h[40] = 17),
        wild(&|h| h[44] = 1),
        wild(&|h| h[48] = 10),
        wild(&|h| h[76] = 1),
        wild(&|h| h[127] = 1),
    ] {
        let mut side = open(plugin, 2).establish(&offers, None, &AllowList::default());
        let error = loop {
            match side.poll() {
                Ok(None) => {}
                Ok(Some(pairs)) => panic!("{} channels to a wild handle", pairs.len()),
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains("on eth1: connect to"), "{error}");
    }
    assert_eq!(counters().connects_begun.load(Acquire), 0);
}

/// No byte of a peer makes TCPXO follow a pointer.
fn wild_handles_of_tcpxo(plugin: &Arc<Plugin>) {
    let fresh = open(plugin, 2).offers();
    let wild = |change: &dyn Fn(&mut [u8; 128])| -> Vec<Offer> {
        let mut offers = fresh.clone();
        offers.iter_mut().for_each(|offer| change(&mut offer.handle));
        offers
    };
    for offers in [wild(&|h| h[88] = 1), wild(&|h| h.fill(0x41)), wild(&|h| h[0] = 2), wild(&|h| h[32] = b'x')] {
        let mut side = open(plugin, 2).establish(&offers, None, &AllowList::default());
        let error = loop {
            match side.poll() {
                Ok(None) => {}
                Ok(Some(pairs)) => panic!("{} channels to a wild handle", pairs.len()),
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    }
    assert_eq!(counters().connects_begun.load(Acquire), 0);
}

/// Memory whose end is seen.
#[derive(Clone, Default)]
struct Freed(Arc<AtomicBool>);

impl Freed {
    fn keep(&self) -> Keep {
        struct Ends(Freed);
        impl Drop for Ends {
            fn drop(&mut self) {
                self.0 .0.store(true, Release);
            }
        }
        Box::new(Ends(self.clone()))
    }

    fn is_freed(&self) -> bool {
        self.0.load(Acquire)
    }
}

/// The receive manager does not drop a registration: the closed comm goes on writing.
fn memory_is_never_dropped(plugin: &Arc<Plugin>) {
    let (mut a, b) = both(open(plugin, 1), open(plugin, 1));
    let (memory, freed) = (Memory::new(4096), Freed::default());
    let Pair { send, mut recv, .. } = a.remove(0);
    // SAFETY: the memory stays.
    let registration = unsafe { recv.register(memory.at.cast(), 4096, NCCL_PTR_CUDA, freed.keep()) }.expect("register");
    // SAFETY: as above.
    assert!(unsafe { recv.recv(memory.at.cast(), 4096, 0, registration.mhandle()) }.expect("recv"));
    manager_answers(&format!("deregMr={}", std::env::var(HOW).expect("how")));
    recv.close(());
    wait("the comm is closed", || recv.is_closed().expect("close"));
    drop(registration);
    wait("the registration is dropped", || counters().registrations.load(Acquire) == 0);
    // SAFETY: our own memory, which only the plugin writes to.
    wait("the closed comm writes", || unsafe { memory.at.read_volatile() != 0 });
    drop((send, recv, b));
    nothing_is_left(plugin);
    plugin.settle();
    assert!(!freed.is_freed(), "freed while the plugin may write");
}

/// The call owns its memory, until it has returned and what it has made is dropped.
fn register_stands_still(plugin: &Arc<Plugin>) {
    let (mut a, _b) = both(open(plugin, 1), open(plugin, 1));
    let (memory, freed) = (Memory::new(4096), Freed::default());
    let pair = &mut a[0];
    manager_answers("regMr");
    for how in ["begun", "queued"] {
        let (freed, before) = (Freed::default(), Instant::now());
        // SAFETY: the memory stays.
        let result = unsafe { pair.recv.register(memory.at.cast(), 4096, NCCL_PTR_CUDA, freed.keep()) };
        let error = result.err().expect("no answer");
        assert!(error.to_string().contains("regMr has not returned for"), "{error}");
        assert!(before.elapsed() < Duration::from_secs(12), "{:?}", before.elapsed());
        assert_eq!(freed.is_freed(), how == "queued", "{how}");
    }
    let span = Span { id: 1, addr: memory.addr(), len: memory.len as u64 };
    // SAFETY: as above.
    assert!(unsafe { pair.send.region(span, span.addr, || freed.keep()) }.is_err());
    assert!(freed.is_freed(), "it never began");
    manager_answers(" ");
    wait("what it has made is dropped", || {
        counters().registrations_ever.load(Acquire) == 1 && counters().registrations.load(Acquire) == 0
    });
    // The call holds a region while it runs, and no longer.
    let freed = Freed::default();
    manager_answers("regMr");
    // SAFETY: as above.
    assert!(unsafe { pair.send.region(span, span.addr, || freed.keep()) }.is_err());
    assert!(!freed.is_freed(), "the region is not held");
    manager_answers(" ");
    wait("the region is free", || freed.is_freed());
    wait("the call has returned", || plugin.thread().is_none_or(|thread| thread.stands_still().is_none()));
    // SAFETY: as above.
    unsafe { pair.send.region(span, span.addr, || freed.keep()) }.expect("the manager answers again");
    drop(a);
    plugin.settle();
    assert_eq!(counters().registrations.load(Acquire), 0);
}

/// A caller that has registered memory does not wait for a deregMr that begins then.
fn deregister_stands_still(plugin: &Arc<Plugin>) {
    let (mut a, b) = both(open(plugin, 1), open(plugin, 1));
    let [first, second] = [Memory::new(4096), Memory::new(4096)];
    let Pair { send, recv, .. } = a.remove(0);
    // SAFETY: the memory stays.
    let registration = unsafe { recv.register(first.at.cast(), 4096, NCCL_PTR_CUDA, unheld()) }.expect("register");
    manager_answers("regMr deregMr");
    let second = second.addr();
    let caller = std::thread::spawn(move || {
        // SAFETY: the memory stays.
        let result = unsafe { send.register(second as *mut _, 4096, NCCL_PTR_CUDA, unheld()) };
        (result.expect("register"), send)
    });
    std::thread::sleep(Duration::from_millis(50));
    drop(registration);
    manager_answers("deregMr");
    let until = Instant::now() + Duration::from_secs(3);
    while !caller.is_finished() {
        assert!(Instant::now() < until, "the caller waits for the deregistration");
        std::thread::sleep(Duration::from_millis(1));
    }
    manager_answers(" ");
    let (registration, send) = caller.join().expect("caller");
    drop((registration, send, recv, b));
    nothing_is_left(plugin);
    wait("registrations are dropped", || counters().registrations.load(Acquire) == 0);
}

fn memory_after_the_close(plugin: &Arc<Plugin>) {
    let (mut a, b) = both(open(plugin, 1), open(plugin, 1));
    let (memory, freed) = (Memory::new(4096), Freed::default());
    let pair = a.remove(0);
    let Pair { send, mut recv, .. } = pair;
    // SAFETY: the memory stays.
    let registration = unsafe { recv.register(memory.at.cast(), 4096, NCCL_PTR_CUDA, freed.keep()) }.expect("register");
    // SAFETY: as above.
    assert!(unsafe { recv.recv(memory.at.cast(), 4096, 0, registration.mhandle()) }.expect("recv"));
    let written = || {
        // SAFETY: our own memory, which only the plugin writes to.
        unsafe { memory.at.read_volatile() != 0 }
    };
    drop(b);
    drop(send);
    recv.close(());
    wait("the comm is closed", || recv.is_closed().expect("close"));
    drop((recv, registration));
    wait("the closed comm writes", written);
    assert!(!freed.is_freed(), "freed while the plugin may write");
    let again = both(open(plugin, 1), open(plugin, 1));
    assert!(freed.is_freed(), "kept after the plugin has dropped the registration");
    // SAFETY: as above.
    unsafe { memory.at.write(0) };
    std::thread::sleep(Duration::from_millis(30));
    assert!(!written(), "written to after the registration was dropped");
    drop(again);
    nothing_is_left(plugin);
}

fn registrations(plugin: &Arc<Plugin>) {
    let c = counters();
    let live = || c.registrations.load(Acquire);
    let (mut a, _b) = both(open(plugin, 8), open(plugin, 8));
    let memory = Memory::new(1 << 20);
    let regions: Vec<Span> = (0..16).map(|i| Span { id: i, addr: memory.addr() + i * 65536, len: 65536 }).collect();
    for pair in &mut a {
        for &span in &regions {
            // SAFETY: the memory stays.
            unsafe { pair.send.region(span, span.addr + 100, unheld) }.expect("region");
        }
    }
    assert_eq!(live(), 16 * 2, "one per region and NIC");
    let unaligned = Span { id: 99, addr: memory.addr() + 5000, len: 1000 };
    let nic = a[0].nic.clone();
    for pair in a.iter_mut().filter(|p| p.nic == nic) {
        // SAFETY: as above.
        unsafe { pair.send.region(unaligned, 0, unheld) }.expect("the enclosing pages");
    }
    assert_eq!(live(), 33);
    for pair in &mut a {
        pair.send.forget_region(99);
        pair.send.forget_region(3);
    }
    assert_eq!(live(), 30);
    // The registration ends with its last user.
    let settle = || plugin.settle();
    a.truncate(2);
    settle();
    assert_eq!(live(), 30);
    a.truncate(1);
    settle();
    assert_eq!(live(), 15);
    drop(a);
    settle();
    assert_eq!((live(), c.descriptors.load(Acquire)), (0, 0));
}

fn registrations_in_flight(plugin: &Arc<Plugin>) {
    let live = || counters().registrations.load(Acquire);
    let memory = Memory::new(1 << 20);
    let span = Span { id: 1, addr: memory.addr(), len: 1 << 20 };
    let (mut a, b) = both(open(plugin, 1), open(plugin, 1));
    {
        let pair = &mut a[0];
        // SAFETY: the memory stays.
        unsafe {
            let mhandle = pair.send.region(span, span.addr, unheld).expect("region");
            // More than fits, since the peer receives nothing.
            let mut posted = 0;
            while posted < 16 && pair.send.send(memory.at.cast(), 512 << 10, 0, mhandle).expect("send") {
                posted += 1;
            }
        }
        assert!(pair.send.inflight() > 0);
    }
    // The last comm of its NIC closes with requests in flight, so the registration waits for the next comm.
    drop(b);
    let Pair { send, recv, .. } = a.remove(0);
    drop(recv);
    drop(send);
    let settle = || plugin.settle();
    settle();
    assert_eq!(live(), 1);
    let (_a, _b) = both(open(plugin, 1), open(plugin, 1));
    settle();
    assert_eq!(live(), 0);
}

fn registrations_without_descriptors(plugin: &Arc<Plugin>) {
    let (mut a, _b) = both(open(plugin, 1), open(plugin, 1));
    let memory = Memory::new(4096);
    let span = Span { id: 1, addr: memory.addr(), len: 4096 };
    let mut all = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        all.push(file);
        assert!(all.len() < 2_000_000);
    }
    all.truncate(all.len() - 2);
    // SAFETY: the memory stays.
    let error = unsafe { a[0].send.region(span, span.addr, unheld) }.expect_err("no descriptors");
    assert_eq!(error.kind(), ErrorKind::Resource);
    let error = ListenComm::new(plugin, 0, &Scope::None).err();
    drop(all);
    assert!(error.is_none_or(|e| e.kind() == ErrorKind::Resource));
    // SAFETY: as above.
    unsafe { a[0].send.region(span, span.addr, unheld) }.expect("descriptors are back");
    // SAFETY: as above; a registration that is not of whole pages never reaches the plugin.
    assert!(unsafe { a[0].send.register(memory.at.cast(), 100, NCCL_PTR_CUDA, unheld()) }.is_err());
}

fn sigpipe(plugin: &Arc<Plugin>) {
    let memory = Memory::new(1 << 20);
    let span = Span { id: 1, addr: memory.addr(), len: 1 << 20 };
    let (mut a, mut b) = both(open(plugin, 2), open(plugin, 2));
    // A sender whose peer has closed.
    drop(b.remove(0));
    let first = &mut a[0];
    // SAFETY: the memory stays.
    let mhandle = unsafe { first.send.region(span, span.addr, unheld) }.expect("region");
    let until = Instant::now() + Duration::from_secs(10);
    let error = loop {
        assert!(Instant::now() < until, "the sender noticed nothing");
        std::thread::sleep(Duration::from_millis(2));
        // SAFETY: as above.
        let result = unsafe { first.send.send(memory.at.cast(), 4096, 0, mhandle) }.and_then(|_| first.send.test_oldest());
        if let Err(e) = result {
            break e;
        }
    };
    assert_eq!(error.kind(), ErrorKind::RemoteDisconnect);
    // A receiver with an unannounced receive.
    let second = &mut a[1];
    // SAFETY: as above; nothing arrives.
    unsafe {
        let registration = second.recv.register(memory.at.cast(), 4096, NCCL_PTR_CUDA, unheld()).expect("register");
        assert!(second.recv.recv(memory.at.cast(), 4096, 0, registration.mhandle()).expect("recv"));
        // It must be dropped after the comm, or never.
        std::mem::forget(registration);
    }
    drop(b);
    let error = loop {
        assert!(Instant::now() < until, "the receiver noticed nothing");
        if let Err(e) = second.recv.test_oldest() {
            break e;
        }
    };
    assert_eq!(error.kind(), ErrorKind::RemoteDisconnect);
}
