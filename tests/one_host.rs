//! Two engines of one host: what goes between them without the network, what does not and why, and what is left when one of them is
//! killed, stopped, or takes its memory back.

mod victim;

use std::time::Duration;
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, LocalSegment};
use uccl_p2p::require::Requirement;
use victim::{pair, text_of, until, Outcome, Victim, SHARED_MEMORY};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// For a child: the kernel forbids it to read other processes' memory, or it becomes another user.
const FORBID: &str = "UCCL_TEST_FORBID";
/// For a child: it runs on the first of its cores only.
const ONE_CORE: &str = "UCCL_TEST_ONE_CORE";
const USER: &str = "UCCL_TEST_USER";

#[test]
fn engine_process() {
    if std::env::var(victim::CHILD).as_deref() == Ok("engine_process") {
        if std::env::var_os(ONE_CORE).is_some() {
            keep_to_one_core();
        }
        if std::env::var_os(FORBID).is_some() {
            forbid_reading_processes();
        }
        if let Some(most) = std::env::var(NOFILE).ok().and_then(|most| most.parse().ok()) {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            // SAFETY: a complete limit.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
        }
        if let Some(most) = std::env::var(FSIZE).ok().and_then(|most| most.parse().ok()) {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            // SAFETY: a complete limit.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
        }
        if let Some(user) = std::env::var(USER).ok().and_then(|user| user.parse().ok()) {
            // SAFETY: plain system calls, of all threads.
            assert_eq!(unsafe { libc::setresuid(user, user, user) }, 0);
        }
    }
    victim::serve("engine_process", |config| config);
}

fn keep_to_one_core() {
    // SAFETY: sets of cores of this call, of the size given; the threads to come inherit it.
    unsafe {
        let (mut all, mut one): (libc::cpu_set_t, libc::cpu_set_t) = (std::mem::zeroed(), std::mem::zeroed());
        assert_eq!(libc::sched_getaffinity(0, size_of_val(&all), &raw mut all), 0);
        let first = (0..libc::CPU_SETSIZE as usize).find(|&core| libc::CPU_ISSET(core, &all)).expect("a core");
        libc::CPU_SET(first, &mut one);
        assert_eq!(libc::sched_setaffinity(0, size_of_val(&one), &raw const one), 0);
    }
}

/// A filter of system calls as containers have: process_vm_readv is not permitted.
fn forbid_reading_processes() {
    let load = |k| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k };
    let unless = |k| libc::sock_filter { code: 0x15, jt: 0, jf: 1, k };
    let give = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let mut filter =
        [load(0), unless(libc::SYS_process_vm_readv as u32), give(0x0005_0000 | libc::EPERM as u32), give(0x7FFF_0000)];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: a complete program, which lives during the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program, 0, 0), 0);
    }
}

/// Direct transfers are used.
const ON: (&str, &str) = ("UCCL_P2P_DISABLE_IPC", "0");
const EMULATED: [(&str, &str); 3] = [ON, ("UCCL_TCPX_EMULATE_DEVICE", "1"), (SHARED_MEMORY, "1")];

/// Simulated GPUs between which bytes are pushed.
const PUSHED: [(&str, &str); 4] = [EMULATED[0], EMULATED[1], EMULATED[2], ("UCCL_TCPX_LOCAL_GPU", "push")];

/// The kernel refuses to read another process, as in containers: host memory is staged.
const STAGED: [(&str, &str); 2] = [ON, (FORBID, "1")];

fn start(environment: &[(&str, &str)]) -> Victim {
    Victim::start("engine_process", &[&[("UCCL_P2P_LOG_LEVEL", "info")], environment].concat())
}

/// Two processes, the first connected to the second.
fn two(first: &[(&str, &str)], second: &[(&str, &str)]) -> (Victim, Victim) {
    let (mut a, mut b) = (start(first), start(second));
    b.ask("accept");
    let answer = a.ask(&format!("connect 127.0.0.1 {}", b.port));
    assert_eq!(answer, "0", "{}", a.log());
    assert!(until(LIMIT, || b.number("connections") == 1));
    (a, b)
}

/// A transfer between buffers of the two, and whether the bytes are right.
fn moves(a: &mut Victim, b: &mut Victim, direction: &str, len: usize, fill: u8) -> Outcome {
    let write = direction == "write";
    let (local, _) = a.buffer(len, if write { fill } else { 0 });
    let (remote, item) = b.buffer(len, if write { 0 } else { fill });
    again(a, b, direction, len, fill, local, remote, &item)
}

#[allow(clippy::too_many_arguments)]
fn again(
    a: &mut Victim,
    b: &mut Victim,
    direction: &str,
    len: usize,
    fill: u8,
    local: usize,
    remote: usize,
    item: &FifoItem,
) -> Outcome {
    let id = match a.start_transfer(&format!("{direction} 0 {local} {len} {}", text_of(item))) {
        Ok(id) => id,
        Err(e) => return Outcome::Failed(e),
    };
    let outcome = a.wait(0, id, LIMIT);
    if outcome == Outcome::Done(len as u64) {
        let (holder, buffer) = if direction == "write" { (b, remote) } else { (a, local) };
        assert_eq!(holder.ask(&format!("holds {buffer} {len} {fill}")), "true", "{direction} of {len} bytes");
    }
    outcome
}

/// Bytes that the first engine has sent and received by direct transfers, and over channels.
fn carried(a: &mut Victim) -> [u64; 4] {
    let answer = a.ask("carried 0");
    let mut numbers = answer.split(' ').map(|n| n.parse().unwrap_or_else(|_| panic!("{answer}")));
    std::array::from_fn(|_| numbers.next().unwrap())
}

#[test]
fn host_memory_is_copied_within_the_host() {
    let (mut a, mut b) = two(&[ON], &[ON]);
    let mut sum = [0; 2];
    for (fill, len) in [70 << 10, 100_001, 300 << 10, 5 * MIB + 3, 64 * MIB].into_iter().enumerate() {
        for (way, direction) in ["write", "read"].into_iter().enumerate() {
            assert_eq!(moves(&mut a, &mut b, direction, len, fill as u8 + 1), Outcome::Done(len as u64));
            sum[way] += len as u64;
        }
    }
    assert_eq!(carried(&mut a), [sum[0], sum[1], 0, 0]);
    assert!(until(LIMIT, || carried(&mut b) == [sum[1], sum[0], 0, 0]));
    for victim in [&a, &b] {
        assert!(victim.log().contains("direct transfers with process"), "{}", victim.log());
    }
    assert!(a.end(LIMIT) && b.end(LIMIT));
}

/// What a connect between two engines of this process says where the first requires something, or the second.
fn required([first, second]: [&str; 2], [ipc_here, ipc_there]: [bool; 2], emulated: bool) -> Result<(), String> {
    let engine = |text: &str, ipc: bool| {
        let require = if text.is_empty() { Requirement::default() } else { Requirement::parse(text).unwrap() };
        let config = Config { disable_ipc: !ipc, emulate_device: emulated, require, ..victim::config() };
        Engine::new(config).unwrap()
    };
    let (a, b) = (engine(first, ipc_here), engine(second, ipc_there));
    let out = a.connect("127.0.0.1", "", victim::port(&b)).map_err(|e| e.to_string())?;
    let inn = b.accept_until(Some(std::time::Instant::now() + LIMIT)).unwrap().expect("it comes");
    assert!(out.stats().unwrap().error.is_none() && inn.stats().unwrap().error.is_none());
    Ok(())
}

#[test]
fn a_connection_fails_where_it_lacks_what_an_engine_requires() {
    for text in ["direct", "nvlink|direct", "direct,nics>=1", "tcpx|direct"] {
        required([text, ""], [true, true], false).unwrap_or_else(|e| panic!("{text}: {e}"));
        required(["", text], [true, true], true).unwrap_or_else(|e| panic!("{text}: {e}"));
    }
    required(["tcp", "tcp|nvlink"], [true, false], false).unwrap();
    for (text, ipc, emulated, why) in [
        (
            "direct",
            [true, false],
            false,
            "direct is required, but host memory takes tcp lo (no direct transfers: the peer takes no part)",
        ),
        ("direct", [false, true], false, "takes tcp lo (no direct transfers: UCCL_P2P_DISABLE_IPC is set)"),
        ("tcp", [true, true], false, "tcp is required, but host memory takes direct"),
        ("nvlink", [true, true], true, "nvlink is required, but memory of GPU 0 here and GPU 0 there takes direct"),
        ("tcpx", [true, false], true, "tcpx is required, but host memory takes tcp lo (UCCL_TCPX_PLUGIN"),
        ("nics>=2,direct", [true, true], false, "nics>=2 is required, but channels use lo"),
    ] {
        // Each engine may require it, and the connector's error has the reason.
        for who in [[text, ""], ["", text]] {
            let ipc = if who[0].is_empty() { [ipc[1], ipc[0]] } else { ipc };
            let error = required(who, ipc, emulated).unwrap_err();
            let of_peer = who[0].is_empty();
            assert!(error.contains(&format!("UCCL_TCPX_REQUIRE={text}: ")) && error.contains(why), "{who:?}: {error}");
            assert_eq!(error.contains("peer"), of_peer || error.contains("the peer"), "{who:?}: {error}");
        }
    }
}

#[test]
fn where_it_is_switched_off_channels_carry_everything() {
    for (first, second) in [(&[ON][..], &[][..]), (&[][..], &[ON][..])] {
        let (mut a, mut b) = two(first, second);
        assert_eq!(moves(&mut a, &mut b, "write", MIB, 3), Outcome::Done(MIB as u64));
        assert_eq!(carried(&mut a), [0, 0, MIB as u64, 0]);
        assert!(a.log().contains("UCCL_P2P_DISABLE_IPC is set") != b.log().contains("UCCL_P2P_DISABLE_IPC is set"));
    }
}

#[test]
fn where_the_kernel_forbids_reading_host_memory_is_staged_and_a_line_says_so() {
    for (first, second) in [(&[ON][..], &STAGED[..]), (&STAGED[..], &[ON][..]), (&STAGED[..], &STAGED[..])] {
        let (mut a, mut b) = two(first, second);
        for direction in ["write", "read"] {
            assert_eq!(moves(&mut a, &mut b, direction, MIB, 3), Outcome::Done(MIB as u64));
        }
        assert_eq!(carried(&mut a), [MIB as u64, MIB as u64, 0, 0]);
        let why = ["Operation not permitted", "the peer's process may not read this one"];
        for victim in [&a, &b] {
            let log = victim.log();
            assert!(log.contains("staged in shared areas") && why.iter().any(|why| log.contains(why)), "{log}");
        }
        assert!(a.number("areas") == 2 && b.number("areas") == 2, "one of each process");
        assert!(a.end(LIMIT) && b.end(LIMIT));
    }
    // Simulated GPUs do not need it.
    let (first, second) = ([&EMULATED[..], &[(FORBID, "1")]].concat(), EMULATED);
    let (mut a, mut b) = two(&first, &second);
    shared_in_the_end(&mut a, &mut b);
}

/// Messages either way, until they go directly.
fn sends_directly(a: &mut Victim, b: &mut Victim) {
    const LEN: usize = 3 * MIB + 5;
    let before = carried(a);
    let (source, _) = a.buffer(LEN, 6);
    let (sink, _) = b.buffer(LEN, 0);
    let (back, _) = a.buffer(LEN, 0);
    assert!(until(LIMIT, || {
        let recv = b.ask(&format!("recv 0 {sink} {LEN}")).parse().unwrap();
        let send = a.start_transfer(&format!("send 0 {source} {LEN}")).unwrap();
        assert_eq!(a.wait(0, send, LIMIT), Outcome::Done(LEN as u64));
        assert_eq!(b.wait(0, recv, LIMIT), Outcome::Done(LEN as u64));
        assert_eq!(b.ask(&format!("holds {sink} {LEN} 6")), "true");
        let recv = a.ask(&format!("recv 0 {back} {LEN}")).parse().unwrap();
        let send = b.start_transfer(&format!("send 0 {sink} {LEN}")).unwrap();
        assert_eq!(b.wait(0, send, LIMIT), Outcome::Done(LEN as u64));
        assert_eq!(a.wait(0, recv, LIMIT), Outcome::Done(LEN as u64));
        assert_eq!(a.ask(&format!("holds {back} {LEN} 6")), "true");
        let after = carried(a);
        after[0] > before[0] && after[1] > before[1]
    }));
    // A message has no region: its landing is its grant.
    assert!(!a.log().contains("refused") && !b.log().contains("refused"), "{}\n{}", a.log(), b.log());
}

#[test]
fn messages_go_directly_without_a_claim() {
    let (mut a, mut b) = two(&[ON], &[ON]);
    sends_directly(&mut a, &mut b);
    assert!(a.end(LIMIT) && b.end(LIMIT));
}

#[test]
fn messages_of_host_memory_are_staged_too() {
    let (mut a, mut b) = two(&STAGED, &STAGED);
    sends_directly(&mut a, &mut b);
    assert!(a.end(LIMIT) && b.end(LIMIT));
}

#[test]
fn another_users_process_is_not_let_near() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: only root can become another user");
        return;
    }
    let other = [ON, (USER, "65534")];
    for (first, second) in [(&[ON][..], &other[..]), (&other[..], &[ON][..])] {
        let (mut a, mut b) = two(first, second);
        assert_eq!(moves(&mut a, &mut b, "write", MIB, 3), Outcome::Done(MIB as u64));
        assert_eq!(carried(&mut a), [0, 0, MIB as u64, 0]);
        assert!(a.log().contains("no direct transfers: "), "{}", a.log());
    }
}

/// The first transfers of memory go over channels, until the peer has said that it can reach it.
fn shared_in_the_end(a: &mut Victim, b: &mut Victim) -> (usize, usize, FifoItem) {
    const LEN: usize = 3 * MIB;
    let (local, _) = a.buffer(LEN, 5);
    let (remote, item) = b.buffer(LEN, 0);
    let shared = until(LIMIT, || {
        assert_eq!(again(a, b, "write", LEN, 5, local, remote, &item), Outcome::Done(LEN as u64));
        carried(a)[0] > 0
    });
    assert!(shared, "{}", a.log());
    (local, remote, item)
}

#[test]
fn simulated_gpu_memory_is_mapped_once_and_let_go_with_its_region() {
    let (mut a, mut b) = two(&EMULATED, &EMULATED);
    let (local, remote, item) = shared_in_the_end(&mut a, &mut b);
    let before = carried(&mut a);
    for _ in 0..5 {
        assert_eq!(again(&mut a, &mut b, "write", 3 * MIB, 5, local, remote, &item), Outcome::Done(3 * MIB as u64));
    }
    assert_eq!(carried(&mut a)[2..], before[2..], "nothing more goes over the channels");
    assert!(until(LIMIT, || b.number("mappings") == 1));
    // The other direction, with the memory of the other engine.
    assert!(until(LIMIT, || {
        assert_eq!(again(&mut a, &mut b, "read", 3 * MIB, 5, local, remote, &item), Outcome::Done(3 * MIB as u64));
        carried(&mut a)[1] > 0
    }));
    assert_eq!((a.number("mappings"), b.number("mappings")), (1, 1));
    a.ask(&format!("destroy {local}"));
    assert!(until(LIMIT, || b.number("mappings") == 0), "the mapping ends with the region");
    b.ask(&format!("destroy {remote}"));
    assert!(until(LIMIT, || a.number("mappings") == 0));
    // And the memory of an ended process goes with the connection.
    shared_in_the_end(&mut a, &mut b);
    assert!(until(LIMIT, || b.number("mappings") == 1));
    drop(a);
    assert!(until(LIMIT, || b.ask("status 0").starts_with("error")));
    assert!(until(LIMIT, || b.number("mappings") == 0));
    assert!(b.end(LIMIT));
}

/// Bytes that a connection has sent and received by direct transfers.
fn directly(connection: &Connection) -> [u64; 2] {
    let stats = connection.stats().unwrap();
    let local = stats.channels.iter().filter(|channel| channel.nic == "local");
    local.fold([0; 2], |[sent, received], channel| [sent + channel.sent_bytes, received + channel.received_bytes])
}

/// Transfers until one goes directly.
fn until_direct(connection: &Connection, way: Direction, local: LocalSegment, item: FifoItem) {
    let before = directly(connection);
    assert!(until(LIMIT, || {
        let id = connection.transfer(way, std::iter::once((local, item))).unwrap();
        connection.wait(id, Some(LIMIT)).unwrap().complete && directly(connection) != before
    }));
}

/// Two engines here, with three connections to one process.
#[test]
fn connections_of_a_pair_of_processes_map_an_allocation_once() {
    const LEN: usize = MIB;
    let mut b = start(&EMULATED);
    b.ask("accept");
    let config = || Config { disable_ipc: false, emulate_device: true, ..victim::config() };
    let engines = [Engine::new(config()).unwrap(), Engine::new(config()).unwrap()];
    let mut connections = [0, 0, 1].map(|i| engines[i].connect("127.0.0.1", "", b.port).unwrap()).to_vec();
    let mut ours = victim::Bytes::shared(LEN, 5);
    let addr = ours.as_ptr() as usize;
    let [first, second] = std::array::from_fn(|i| engines[i].register(addr, LEN).unwrap());
    let (theirs, item) = b.buffer(LEN, 0);
    for (connection, mr) in connections.iter().zip([first, first, second]) {
        for way in [Direction::Write, Direction::Read] {
            until_direct(connection, way, LocalSegment { mr, addr, len: LEN }, item);
        }
    }
    assert_eq!((b.number("mappings"), victim::mappings()), (1, 1));
    // It stays for those that are left: another connection of that engine, then one of another engine.
    drop(connections.remove(0));
    until_direct(&connections[0], Direction::Write, LocalSegment { mr: first, addr, len: LEN }, item);
    engines[0].deregister(first).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!((b.number("mappings"), victim::mappings()), (1, 1));
    // Other memory at its place is not mistaken for it.
    ours.replace(6);
    let third = engines[0].register(addr, LEN).unwrap();
    until_direct(&connections[0], Direction::Write, LocalSegment { mr: third, addr, len: LEN }, item);
    assert_eq!((b.ask(&format!("holds {theirs} {LEN} 6")).as_str(), b.number("mappings")), ("true", 2));
    // It ends with the last region, or with the last connection.
    engines[0].deregister(third).unwrap();
    engines[1].deregister(second).unwrap();
    assert!(until(LIMIT, || b.number("mappings") == 0), "a mapping outlives its regions");
    drop(connections);
    assert!(until(LIMIT, || victim::mappings() == 0), "a mapping outlives its connections");
    assert!(b.end(LIMIT));
}

#[test]
fn memory_is_announced_in_advance_whenever_it_is_registered() {
    const LEN: usize = 2 * MIB;
    let (mut a, mut b) = (start(&EMULATED), start(&EMULATED));
    let (local, _) = a.buffer(LEN, 5);
    let (remote, item) = b.buffer(LEN, 0);
    b.ask("accept");
    assert_eq!(a.ask(&format!("connect 127.0.0.1 {}", b.port)), "0");
    assert!(until(LIMIT, || a.number("mappings") == 1 && b.number("mappings") == 1));
    // The answers are on their way.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(again(&mut a, &mut b, "write", LEN, 5, local, remote, &item), Outcome::Done(LEN as u64));
    assert_eq!(carried(&mut a), [LEN as u64, 0, 0, 0]);
    let (later, _) = a.buffer(LEN, 6);
    assert!(until(LIMIT, || b.number("mappings") == 2));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(again(&mut a, &mut b, "write", LEN, 6, later, remote, &item), Outcome::Done(LEN as u64));
    assert_eq!(carried(&mut a), [2 * LEN as u64, 0, 0, 0]);
    for buffer in [local, later] {
        a.ask(&format!("destroy {buffer}"));
    }
    assert!(until(LIMIT, || b.number("mappings") == 0));
}

/// Memory that goes while a connection comes up, and other memory at its place: the peer gets the bytes that are there now.
#[test]
fn memory_that_takes_the_place_of_other_during_a_set_up_is_not_mistaken_for_it() {
    const LEN: usize = 2 * MIB;
    let (mut a, mut b) = (start(&EMULATED), start(&EMULATED));
    let (sink, _) = a.buffer(LEN, 0);
    let (source, _) = b.buffer(LEN, 1);
    b.ask("accept");
    // The set-up stops where it writes its line.
    b.ask("hold-log");
    assert_eq!(a.ask(&format!("connect 127.0.0.1 {}", b.port)), "0");
    std::thread::sleep(Duration::from_millis(500));
    let item = victim::item_of(&b.ask(&format!("replace {source} 2")));
    b.ask("let-log-go");
    assert!(until(LIMIT, || b.number("connections") == 1));
    for _ in 0..5 {
        assert_eq!(again(&mut a, &mut b, "read", LEN, 2, sink, source, &item), Outcome::Done(LEN as u64));
        // The engines' messages to each other are in flight.
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(carried(&mut a)[1] > 0, "{}", a.log());
}

/// Memory of devices and secret memory are read by the process that has them mapped and by no other one.
#[test]
fn host_memory_that_no_other_process_can_read_keeps_its_channels() {
    const LEN: usize = MIB;
    let (mut a, mut b) = two(&[ON], &[ON]);
    for side in 0..2 {
        let (one, other) = if side == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let answer = other.ask(&format!("secret {LEN} 9"));
        let Some((secret, item)) = answer.split_once(' ').map(|(n, item)| (n.parse().unwrap(), victim::item_of(item))) else {
            println!("SKIPPED: the kernel has no secret memory");
            return;
        };
        let (plain, there) = one.buffer(LEN, 0);
        for _ in 0..4 {
            // Out of it, started by either engine; then into it.
            assert_eq!(again(one, other, "read", LEN, 9, plain, secret, &item), Outcome::Done(LEN as u64), "{}", one.log());
            assert_eq!(again(other, one, "write", LEN, 9, secret, plain, &there), Outcome::Done(LEN as u64), "{}", one.log());
            assert_eq!(again(one, other, "write", LEN, 9, plain, secret, &item), Outcome::Done(LEN as u64), "{}", one.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A page that does not come while the first process copies from it. docs/security.md says what waits for it.
#[test]
fn memory_that_does_not_answer_holds_no_transfer_that_is_waited_for() {
    for len in [64 << 10, 512 << 10, 8 * MIB] {
        let (mut a, mut slow) = two(&[ON], &[ON]);
        let mut c = start(&[ON]);
        c.ask("accept");
        assert_eq!(a.ask(&format!("connect 127.0.0.1 {}", c.port)), "1");
        assert!(until(LIMIT, || c.number("connections") == 1));
        let (sink, item) = a.buffer(len, 0);
        let (there, there_item) = a.buffer(MIB, 0);
        let (source, source_item) = c.buffer(MIB, 3);
        let write = format!("write 0 {source} {MIB} {}", text_of(&there_item));
        let read = format!("read 1 {there} {MIB} {}", text_of(&source_item));
        // Both are granted before.
        let id = c.start_transfer(&write).unwrap();
        assert_eq!(c.wait(0, id, LIMIT), Outcome::Done(MIB as u64));
        let id = a.start_transfer(&read).unwrap();
        assert_eq!(a.wait(1, id, LIMIT), Outcome::Done(MIB as u64));
        let answer = slow.ask(&format!("absent-page {len} 7"));
        let Ok(absent) = answer.parse::<usize>() else {
            println!("SKIPPED: no userfaultfd for this user");
            return;
        };
        let held = slow.start_transfer(&format!("write 0 {absent} {len} {}", text_of(&item))).unwrap();
        assert_eq!(slow.wait(0, held, Duration::from_millis(500)), Outcome::Pending);
        // A thread that waits for a transfer drives its connection.
        for _ in 0..3 {
            let id = a.start_transfer(&read).unwrap();
            assert_eq!(a.wait(1, id, LIMIT), Outcome::Done(MIB as u64), "beside {len} bytes");
        }
        // What the progress thread is to do waits where it copies itself, and never behind threads of the pool.
        let id = c.start_transfer(&write).unwrap();
        if len > MIB {
            assert_eq!(c.wait(0, id, LIMIT), Outcome::Done(MIB as u64), "beside {len} bytes");
        }
        slow.ask("let-page-come");
        assert_eq!(slow.wait(0, held, LIMIT), Outcome::Done(len as u64));
        assert_eq!(c.wait(0, id, LIMIT), Outcome::Done(MIB as u64));
        assert_eq!(a.ask(&format!("holds {sink} {} 7", len / 2)), "true");
        assert_eq!([a.ask("status 0"), a.ask("status 1")], ["up", "up"]);
        assert!(a.end(LIMIT) && slow.end(LIMIT) && c.end(LIMIT));
    }
}

/// For how long threads of a process have had a core, in nanoseconds.
fn on_core(process: &Victim) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.id())).unwrap().flatten();
    let of = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
    tasks.filter_map(|task| of(task).split_whitespace().next()?.parse::<u64>().ok()).sum()
}

/// Two processes on one core, with so long a spin of the progress thread; a buffer of either, and the item of the second one's. What a
/// write needs is granted.
fn on_one_core(spin: &str, len: usize) -> (Victim, Victim, [usize; 2], FifoItem) {
    let environment = [ON, (ONE_CORE, "1"), ("UCCL_TCPX_SPIN_US", spin)];
    let (mut a, mut b) = two(&environment, &environment);
    let (source, _) = a.buffer(len, 7);
    let (target, item) = b.buffer(len, 0);
    assert_eq!(a.ask(&format!("writes 0 {source} {len} {} 100", text_of(&item))), "written");
    (a, b, [source, target], item)
}

/// Where both processes share a core, a thread that spins there keeps the other process from it: small writes cost as much time of the core
/// whether the progress thread may spin for 5 ms or not at all. Time on the core is compared, which other programs do not add to.
#[test]
fn the_progress_thread_does_not_spin_on_a_core_that_both_processes_share() {
    const WRITES: usize = 2000;
    const LEN: usize = 4096;
    let [sleeps, spins] = ["0", "5000"].map(|spin| {
        let (mut a, mut b, [source, target], item) = on_one_core(spin, LEN);
        let [direct, ..] = carried(&mut a);
        let before = on_core(&a) + on_core(&b);
        assert_eq!(a.ask(&format!("writes 0 {source} {LEN} {} {WRITES}", text_of(&item))), "written");
        let cost = on_core(&a) + on_core(&b) - before;
        assert_eq!(b.ask(&format!("holds {target} {LEN} 7")), "true");
        assert_eq!(carried(&mut a)[0] - direct, (WRITES * LEN) as u64, "bytes of direct writes");
        cost
    });
    println!("{WRITES} writes took {sleeps} ns of the core without spinning, {spins} ns with it");
    // A thread that spins to the end takes 5 ms for each write: some 200 times as much.
    assert!(spins < 8 * sleeps, "{spins} ns of the core with spinning, {sleeps} without");
}

/// Neither a caller that waits for something that does not come nor an idle engine spins: both engines together take a small part of their
/// one core.
#[test]
fn engines_that_wait_on_one_core_leave_it_to_others() {
    const WAIT: Duration = Duration::from_secs(2);
    let (mut a, b, [source, _], _) = on_one_core("100", 4096);
    for waits in [true, false] {
        let receive = a.ask(&format!("recv 0 {source} 4096"));
        let (start, before) = (std::time::Instant::now(), on_core(&a) + on_core(&b));
        match waits {
            true => assert_eq!(a.wait(0, receive.parse().unwrap(), WAIT), Outcome::Pending),
            false => std::thread::sleep(WAIT),
        }
        let (cost, took) = (on_core(&a) + on_core(&b) - before, start.elapsed().as_nanos() as u64);
        println!("{cost} ns of the core in {took} ns, a caller waits: {waits}");
        assert!(
            took >= WAIT.as_nanos() as u64 && cost < took / 20,
            "{cost} ns of the core in {took} ns, a caller waits: {waits}"
        );
    }
}

/// For a child: its limit of descriptors.
const NOFILE: &str = "UCCL_TEST_NOFILE";

/// A process that shares many allocations with one that may not have as many descriptors, and that does not run for a while.
#[test]
fn more_allocations_than_descriptors_are_shared_one_after_the_other() {
    const COUNT: usize = 300;
    const LEN: usize = 64 << 10;
    let patient = [&EMULATED[..], &[("UCCL_TCPX_PEER_TIMEOUT_MS", "60000")]].concat();
    let few = [&patient[..], &[(NOFILE, "128")]].concat();
    let (mut a, mut b) = two(&few, &patient);
    let before = [a.number("descriptors"), b.number("descriptors")];
    a.signal(libc::SIGSTOP);
    assert_eq!(b.number(&format!("allocations {COUNT} {LEN} 7")), COUNT);
    let waiting = b.number("descriptors");
    assert!(waiting < before[1] + 16, "{waiting} descriptors after {}, for a peer that takes none", before[1]);
    a.signal(libc::SIGCONT);
    let mut most = 0;
    let all = until(LIMIT, || {
        most = most.max(a.number("descriptors"));
        a.number("mappings") == COUNT
    });
    assert!(all, "{} mappings, {}: {}", a.number("mappings"), a.ask("status 0"), a.log());
    assert!(most < before[0] + 64, "{most} descriptors after {}", before[0]);
    let (sink, _) = a.buffer(LEN, 0);
    let item = victim::item_of(&b.ask(&format!("item {}", COUNT - 1)));
    assert_eq!(again(&mut a, &mut b, "read", LEN, 7, sink, COUNT - 1, &item), Outcome::Done(LEN as u64));
    assert!(a.end(LIMIT) && b.end(LIMIT));
}

/// Transfers with a process that has no descriptor left go over the channels, and the connection stays.
#[test]
fn a_process_without_descriptors_loses_no_connection() {
    let few = [&EMULATED[..], &[(NOFILE, "160"), ("UCCL_P2P_LOG_LEVEL", "debug")]].concat();
    let (mut a, mut b) = two(&few, &EMULATED);
    let (sink, _) = a.buffer(MIB, 0);
    let mut shared = None;
    let refused = until(LIMIT, || {
        // The set-up may have given one back since.
        a.number("exhaust");
        shared = Some(b.buffer(MIB, 7));
        until(Duration::from_secs(2), || a.log().contains("this process has no descriptor left"))
    });
    let Some((source, item)) = shared.filter(|_| refused) else { panic!("{}", a.log()) };
    assert_eq!(a.ask("status 0"), "up", "{}", a.log());
    a.ask("relent");
    for _ in 0..3 {
        assert_eq!(again(&mut a, &mut b, "read", MIB, 7, sink, source, &item), Outcome::Done(MIB as u64));
    }
    assert_eq!(carried(&mut a)[1], 0);
    b.ask(&format!("destroy {source}"));
    let (source, item) = b.buffer(MIB, 8);
    assert!(until(LIMIT, || {
        assert_eq!(again(&mut a, &mut b, "read", MIB, 8, sink, source, &item), Outcome::Done(MIB as u64));
        carried(&mut a)[1] > 0
    }));
    assert!(a.end(LIMIT) && b.end(LIMIT));
}

/// For a child: its limit of file lengths.
const FSIZE: &str = "UCCL_TEST_FSIZE";

/// The limit applies to memory files too, and a process that exceeds it is killed (SIGXFSZ).
#[test]
fn a_process_that_may_make_no_large_files_uses_its_channels() {
    let small = [ON, (FSIZE, "65536")];
    for (first, second) in [(&small[..], &[ON][..]), (&[ON][..], &small[..])] {
        let (mut a, mut b) = two(first, second);
        assert_eq!(moves(&mut a, &mut b, "read", MIB, 3), Outcome::Done(MIB as u64));
        assert_eq!(carried(&mut a), [0, 0, 0, MIB as u64]);
        let limited = if first.len() > second.len() { &a } else { &b };
        assert!(limited.log().contains("RLIMIT_FSIZE"), "{}", limited.log());
        assert!(a.end(LIMIT) && b.end(LIMIT));
    }
}

/// Areas for pairs of GPUs that are never used.
#[test]
fn what_is_offered_and_not_wanted_takes_few_descriptors() {
    let many = [&PUSHED[..], &[("UCCL_TCPX_EMULATE_DEVICES", "8")]].concat();
    let (mut a, mut b) = two(&many, &many);
    let (_, item) = b.buffer(MIB, 7);
    let buffers: Vec<usize> = (0..8).map(|_| a.buffer(MIB, 0).0).collect();
    assert!(until(LIMIT, || {
        assert_eq!(again(&mut a, &mut b, "read", MIB, 7, buffers[0], 0, &item), Outcome::Done(MIB as u64));
        carried(&mut a)[1] > 0
    }));
    std::thread::sleep(Duration::from_millis(500));
    let all = std::fs::read_dir(format!("/proc/{}/fd", b.id())).unwrap().flatten();
    let areas = all.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("uccl-area")));
    let count = areas.count();
    assert!(count <= 1 + 8, "{count} descriptors of areas");
}

/// Has the second side grant its memory: the first transfer shows the token.
fn granted(a: &mut Victim, b: &mut Victim, len: usize, fill: u8) -> (usize, usize, FifoItem) {
    let (sink, _) = a.buffer(len, 0);
    let (source, item) = b.buffer(len, fill);
    for _ in 0..3 {
        assert_eq!(again(a, b, "read", len, fill, sink, source, &item), Outcome::Done(len as u64));
        // The engines' messages to each other are in flight.
        std::thread::sleep(Duration::from_millis(100));
    }
    (sink, source, item)
}

#[test]
fn memory_that_was_granted_is_read_while_its_owner_sleeps() {
    for environment in [&[ON][..], &EMULATED[..]] {
        let (mut a, mut b) = two(environment, environment);
        // A memory file of less than a page cannot be shared.
        for len in [if environment.len() == 1 { 1 } else { 8192 }, 4096, 3 * MIB] {
            let (sink, _, item) = granted(&mut a, &mut b, len, 9);
            let before = carried(&mut a);
            b.signal(libc::SIGSTOP);
            for _ in 0..5 {
                let id = a.start_transfer(&format!("read 0 {sink} {len} {}", text_of(&item))).unwrap();
                assert_eq!(a.wait(0, id, LIMIT), Outcome::Done(len as u64), "{}", a.log());
            }
            b.signal(libc::SIGCONT);
            assert_eq!(a.ask(&format!("holds {sink} {len} 9")), "true");
            let after = carried(&mut a);
            assert_eq!([after[1] - before[1], after[3] - before[3]], [5 * len as u64, 0]);
        }
        assert!(a.end(LIMIT) && b.end(LIMIT));
    }
}

#[test]
fn small_transfers_of_granted_memory_stay_within_the_host() {
    for environment in [&[ON][..], &EMULATED[..], &PUSHED[..]] {
        let (mut a, mut b) = two(environment, environment);
        let (mine, theirs, item) = granted(&mut a, &mut b, 4096, 9);
        // The memory of a write's source is shared at its first use.
        for _ in 0..3 {
            again(&mut a, &mut b, "write", 4096, 9, mine, theirs, &item);
            std::thread::sleep(Duration::from_millis(100));
        }
        let before = carried(&mut a);
        for _ in 0..10 {
            for direction in ["write", "read"] {
                assert_eq!(again(&mut a, &mut b, direction, 4096, 9, mine, theirs, &item), Outcome::Done(4096));
            }
        }
        let after = carried(&mut a);
        assert_eq!(std::array::from_fn(|i| after[i] - before[i]), [40960, 40960, 0, 0]);
    }
}

#[test]
fn a_grant_ends_with_its_region() {
    for environment in [&[ON][..], &EMULATED[..], &PUSHED[..]] {
        let (mut a, mut b) = two(environment, environment);
        let (mine, theirs, item) = granted(&mut a, &mut b, 3 * MIB, 9);
        assert_eq!(b.ask(&format!("free {theirs}")), "given back");
        for direction in ["read", "write", "read", "write"] {
            match again(&mut a, &mut b, direction, 3 * MIB, 9, mine, theirs, &item) {
                Outcome::Failed(why) => assert!(why.contains("not registered"), "{direction}: {why}"),
                other => panic!("{direction}: {other:?}"),
            }
        }
        assert_eq!(a.ask("status 0"), "up");
        // New memory at the same place is another region.
        let (mine, theirs, item) = granted(&mut a, &mut b, 3 * MIB, 8);
        assert_eq!(again(&mut a, &mut b, "read", 3 * MIB, 8, mine, theirs, &item), Outcome::Done(3 * MIB as u64));
    }
}

#[test]
fn a_killed_reader_holds_no_region() {
    for environment in [&[ON][..], &STAGED[..], &EMULATED[..], &PUSHED[..]] {
        for round in 0..4u64 {
            let (mut a, mut b) = two(environment, environment);
            const LEN: usize = 32 * MIB;
            let (sink, source, item) = granted(&mut a, &mut b, LEN, 9);
            for direction in ["read", "write", "read", "write"] {
                a.start_transfer(&format!("{direction} 0 {sink} {LEN} {}", text_of(&item))).unwrap();
            }
            std::thread::sleep(Duration::from_millis(2 * round));
            a.signal(libc::SIGKILL);
            assert_eq!(b.ask(&format!("destroy {source}")), "given back");
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(b.number("changed"), 0, "nothing is written afterwards");
            assert!(until(LIMIT, || b.ask("status 0").starts_with("error")) && b.end(LIMIT));
        }
    }
}

#[test]
fn memory_that_cannot_be_shared_keeps_its_channels() {
    // Simulated GPU memory that is no memory file.
    let environment = [ON, ("UCCL_TCPX_EMULATE_DEVICE", "1")];
    let (mut a, mut b) = two(&environment, &environment);
    for _ in 0..5 {
        assert_eq!(moves(&mut a, &mut b, "write", MIB, 3), Outcome::Done(MIB as u64));
        assert_eq!(moves(&mut a, &mut b, "read", MIB, 3), Outcome::Done(MIB as u64));
    }
    assert_eq!(carried(&mut a), [0, 0, 5 * MIB as u64, 5 * MIB as u64]);
}

#[test]
fn what_is_pushed_stays_within_the_host_and_maps_nothing_of_the_application() {
    // One engine that asks for it is enough. Memory that cannot be shared uses staged transfers as well.
    let alone = [PUSHED[0], PUSHED[1], PUSHED[3]];
    for (first, second) in [(&PUSHED[..], &EMULATED[..]), (&EMULATED[..], &PUSHED[..]), (&alone[..], &alone[..])] {
        let (mut a, mut b) = two(first, second);
        for victim in [&a, &b] {
            assert!(victim.log().contains("GPU 0 here and 0 there (pushed)"), "{}", victim.log());
        }
        shared_in_the_end(&mut a, &mut b);
        // The other way.
        assert!(until(LIMIT, || {
            assert_eq!(moves(&mut a, &mut b, "read", MIB, 4), Outcome::Done(MIB as u64));
            carried(&mut a)[1] > 0
        }));
        let before = carried(&mut a);
        let mut sum = 0;
        for (fill, len) in [1, 4096, 100_001, 5 * MIB + 3, 64 * MIB].into_iter().enumerate() {
            for direction in ["write", "read"] {
                assert_eq!(moves(&mut a, &mut b, direction, len, fill as u8 + 1), Outcome::Done(len as u64));
            }
            sum += len as u64;
        }
        let after = carried(&mut a);
        assert_eq!(std::array::from_fn(|i| after[i] - before[i]), [sum, sum, 0, 0]);
        for victim in [&mut a, &mut b] {
            assert_eq!((victim.number("mappings"), victim.number("areas")), (0, 2));
        }
        drop(b);
        assert!(until(LIMIT, || a.number("areas") == 0));
        assert!(a.end(LIMIT));
    }
}

/// A source that is stopped during a staged transfer, and resumes after its peer has closed the connection and has a new one with another
/// process: nothing of the application's changes, nor what the new connection brings.
#[test]
fn a_stopped_source_writes_to_no_foreign_memory() {
    let timeouts = [("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "1500"), ("UCCL_TCPX_PEER_TIMEOUT_MS", "1500")];
    let environment = [&PUSHED[..], &timeouts].concat();
    const LEN: usize = 32 * MIB;
    for round in 0..4u64 {
        let (mut a, mut b) = two(&environment, &environment);
        shared_in_the_end(&mut a, &mut b);
        let (sink, _) = a.buffer(LEN, 0);
        let (_, item) = b.buffer(LEN, 9);
        let reads: Vec<u64> =
            (0..3).map(|_| a.start_transfer(&format!("read 0 {sink} {LEN} {}", text_of(&item))).unwrap()).collect();
        std::thread::sleep(Duration::from_millis(3 * round));
        b.signal(libc::SIGSTOP);
        for id in reads {
            assert_ne!(a.wait(0, id, LIMIT), Outcome::Pending);
        }
        assert_eq!(a.ask(&format!("destroy {sink}")), "given back");
        // Another process fills the areas of that engine.
        let mut c = start(&environment);
        c.ask("accept");
        assert_eq!(a.ask(&format!("connect 127.0.0.1 {}", c.port)), "1", "{}", a.log());
        let (later, _) = a.buffer(LEN, 0);
        let (_, item) = c.buffer(LEN, 3);
        for i in 0..6 {
            if i == 3 {
                b.signal(libc::SIGCONT);
            }
            let id = a.start_transfer(&format!("read 1 {later} {LEN} {}", text_of(&item))).unwrap();
            assert_eq!(a.wait(1, id, LIMIT), Outcome::Done(LEN as u64));
            assert_eq!(a.ask(&format!("holds {later} {LEN} 3")), "true");
        }
        assert!(until(LIMIT, || b.ask("status 0").starts_with("error") && b.number("areas") == 0));
        assert_eq!((a.number("changed"), a.ask(&format!("holds {later} {LEN} 3")).as_str()), (0, "true"));
        assert!(a.end(LIMIT) && b.end(LIMIT) && c.end(LIMIT));
    }
}

#[test]
fn a_killed_process_leaves_errors_right_bytes_and_no_mappings() {
    for environment in [&[ON][..], &STAGED[..], &EMULATED[..], &PUSHED[..]] {
        for (round, direction) in ["write", "read", "write", "read"].into_iter().enumerate() {
            let (mut a, mut b) = two(environment, environment);
            if environment.len() > 1 {
                shared_in_the_end(&mut a, &mut b);
            }
            const LEN: usize = 48 * MIB;
            let write = direction == "write";
            let (local, _) = a.buffer(LEN, if write { 9 } else { 0 });
            let (_, item) = b.buffer(LEN, if write { 0 } else { 9 });
            // With a grant in the second half of the rounds.
            if round >= 2 {
                let id = a.start_transfer(&format!("{direction} 0 {local} {LEN} {}", text_of(&item))).unwrap();
                assert_eq!(a.wait(0, id, LIMIT), Outcome::Done(LEN as u64));
                std::thread::sleep(Duration::from_millis(100));
            }
            let ids: Vec<u64> = (0..6)
                .filter_map(|_| a.start_transfer(&format!("{direction} 0 {local} {LEN} {}", text_of(&item))).ok())
                .collect();
            std::thread::sleep(Duration::from_millis(3 * round as u64));
            b.signal(libc::SIGKILL);
            for id in ids {
                match a.wait(0, id, LIMIT) {
                    Outcome::Done(_) if !write => assert_eq!(a.ask(&format!("holds {local} {LEN} 9")), "true"),
                    Outcome::Pending => panic!("{direction} {id} hangs"),
                    _ => {}
                }
            }
            assert!(until(LIMIT, || a.number("mappings") == 0 && a.number("areas") == 0));
            assert!(a.end(LIMIT));
        }
    }
}

#[test]
fn a_stopped_process_is_given_up_in_time_and_does_nothing_late() {
    for environment in [&[ON][..], &STAGED[..], &EMULATED[..], &PUSHED[..]] {
        let timeouts = [
            ("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "1500"),
            ("UCCL_TCPX_PEER_TIMEOUT_MS", "1500"),
            ("UCCL_TCPX_CLOSE_TIMEOUT_MS", "1500"),
        ];
        let environment = [environment, &timeouts].concat();
        let (mut a, mut b) = two(&environment, &environment);
        if environment.len() > 4 {
            shared_in_the_end(&mut a, &mut b);
        }
        const LEN: usize = 32 * MIB;
        let (source, _) = a.buffer(LEN, 9);
        let (target, item) = b.buffer(LEN, 0);
        let (sink, _) = a.buffer(LEN, 0);
        let read = a.start_transfer(&format!("read 0 {sink} {LEN} {}", text_of(&item))).unwrap();
        // Before the write, which it could have done by now: when it continues, the request is there, and must not be carried out.
        b.signal(libc::SIGSTOP);
        let write = a.start_transfer(&format!("write 0 {source} {LEN} {}", text_of(&item))).unwrap();
        for id in [write, read] {
            assert_ne!(a.wait(0, id, LIMIT), Outcome::Pending);
        }
        // It has its memory again, and no other process writes to it.
        for buffer in [source, sink] {
            assert_eq!(a.ask(&format!("destroy {buffer}")), "given back");
        }
        b.signal(libc::SIGCONT);
        assert!(until(LIMIT, || b.ask("status 0").starts_with("error")));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(a.number("changed"), 0);
        assert_eq!(b.ask(&format!("destroy {target}")), "given back");
        assert!(a.end(LIMIT) && b.end(LIMIT));
    }
}

#[test]
fn a_region_that_goes_during_copies_waits_for_them_or_ends_them() {
    for environment in [&[ON][..], &EMULATED[..], &PUSHED[..]] {
        for round in 0..6u64 {
            let (mut a, mut b) = two(environment, environment);
            if environment.len() > 1 {
                shared_in_the_end(&mut a, &mut b);
            }
            const LEN: usize = 32 * MIB;
            let (sink, source, item) = if round < 3 {
                let (sink, _) = a.buffer(LEN, 0);
                let (source, item) = b.buffer(LEN, 9);
                (sink, source, item)
            } else {
                granted(&mut a, &mut b, LEN, 9)
            };
            let ids: Vec<u64> =
                (0..4).map(|_| a.start_transfer(&format!("read 0 {sink} {LEN} {}", text_of(&item))).unwrap()).collect();
            std::thread::sleep(Duration::from_millis(round));
            // Either the source or the destination.
            if round % 2 == 0 {
                assert_eq!(b.ask(&format!("free {source}")), "given back");
            } else {
                assert_eq!(a.ask(&format!("destroy {sink}")), "given back");
            }
            for id in ids {
                assert_ne!(a.wait(0, id, LIMIT), Outcome::Pending, "round {round}");
            }
            assert_eq!(a.number("changed"), 0);
        }
    }
}

#[test]
fn two_engines_of_one_process_copy_too() {
    let config = || Config { disable_ipc: false, ..victim::config() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, inn) = pair(&a, &b);
    let (source, target) = (vec![7u8; 9 * MIB], vec![0u8; 9 * MIB]);
    let register = |engine: &Engine, bytes: &[u8]| engine.register(bytes.as_ptr() as usize, bytes.len()).unwrap();
    let (from, to) = (register(&a, &source), register(&b, &target));
    let item = b.fifo_item(to, target.as_ptr() as usize, target.len()).unwrap();
    let local = LocalSegment { mr: from, addr: source.as_ptr() as usize, len: source.len() };
    let id = out.transfer(Direction::Write, std::iter::once((local, item))).unwrap();
    assert!(out.wait(id, Some(LIMIT)).unwrap().complete);
    assert!(std::hint::black_box(&target).iter().all(|&b| b == 7));
    let stats = inn.stats().unwrap();
    let received = |nic: &str| stats.channels.iter().filter(|c| c.nic == nic).map(|c| c.received_bytes).sum::<u64>();
    assert_eq!((received("local"), received("lo")), (9 * MIB as u64, 0));
    a.deregister(from).unwrap();
    b.deregister(to).unwrap();
}

#[test]
fn a_connection_to_oneself_copies_too() {
    let engine = Engine::new(Config { disable_ipc: false, ..victim::config() }).unwrap();
    let (out, _inn) = pair(&engine, &engine);
    let bytes = vec![3u8; 4 * MIB];
    let mr = engine.register(bytes.as_ptr() as usize, bytes.len()).unwrap();
    let half = bytes.len() / 2;
    let item = engine.fifo_item(mr, bytes.as_ptr() as usize + half, half).unwrap();
    for direction in [Direction::Write, Direction::Read] {
        let local = LocalSegment { mr, addr: bytes.as_ptr() as usize, len: half };
        let id = out.transfer(direction, std::iter::once((local, item))).unwrap();
        assert!(out.wait(id, Some(LIMIT)).unwrap().complete);
    }
    engine.deregister(mr).unwrap();
}

/// Two network namespaces with a wire between them, as of two containers. They go at the end.
struct Namespaces {
    names: [String; 2],
    wires: [String; 2],
}

impl Namespaces {
    /// `None` where this process may make none.
    fn new() -> Option<Namespaces> {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let named = |word: &str| ["a", "b"].map(|side| format!("{word}{side}{}-{number}", std::process::id()));
        let spaces = Namespaces { names: named("onehost-"), wires: named("oh") };
        let ([a, b], [wa, wb]) = (&spaces.names, &spaces.wires);
        let made = ip(&["netns", "add", a])
            && ip(&["netns", "add", b])
            && ip(&["link", "add", wa, "netns", a, "type", "veth", "peer", "name", wb, "netns", b]);
        let up = |space: &str, wire: &str, address: &str| {
            ip(&["-n", space, "addr", "add", address, "dev", wire])
                && ip(&["-n", space, "link", "set", wire, "up"])
                && ip(&["-n", space, "link", "set", "lo", "up"])
        };
        let ready = |space: &str, wire: &str| {
            let words = ["-n", space, "link", "show", "dev", wire];
            let shown = std::process::Command::new("ip").args(words).output();
            shown.is_ok_and(|shown| String::from_utf8_lossy(&shown.stdout).contains("LOWER_UP"))
        };
        let made = made && up(a, wa, "10.213.77.1/24") && up(b, wb, "10.213.77.2/24");
        (made && until(LIMIT, || ready(a, wa) && ready(b, wb))).then_some(spaces)
    }

    /// A process in each, the first connected to the second; `prefix` before its own command.
    fn two(&self, prefix: &[&str], environment: &[(&str, &str)]) -> (Victim, Victim) {
        let start = |space: &str, wire: &str| {
            let words = [&["ip", "netns", "exec", space], prefix].concat();
            let environment = [environment, &[("UCCL_P2P_LOG_LEVEL", "info"), (victim::NIC, wire)]].concat();
            Victim::under(&words, "engine_process", &environment)
        };
        let (mut a, mut b) = (start(&self.names[0], &self.wires[0]), start(&self.names[1], &self.wires[1]));
        b.ask("accept");
        let answer = a.ask(&format!("connect 10.213.77.2 {}", b.port));
        assert_eq!(answer, "0", "{}", a.log());
        assert!(until(LIMIT, || b.number("connections") == 1));
        (a, b)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        self.names.iter().for_each(|space| {
            ip(&["netns", "del", space]);
        });
    }
}

fn ip(words: &[&str]) -> bool {
    std::process::Command::new("ip").args(words).stderr(std::process::Stdio::null()).status().is_ok_and(|s| s.success())
}

/// A directory of this test's own.
struct Shared(std::path::PathBuf);

impl Shared {
    fn new() -> Shared {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("uccl-one-host-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Shared(path)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn containers_with_networks_of_their_own_share_memory_through_a_directory() {
    let Some(spaces) = Namespaces::new() else {
        println!("SKIPPED: this process may not make network namespaces");
        return;
    };
    let directory = Shared::new();
    let shared = ("UCCL_TCPX_LOCAL_DIR", directory.0.to_str().unwrap());
    // Nothing in common but the kernel.
    let (mut a, mut b) = spaces.two(&[], &[ON]);
    assert_eq!(moves(&mut a, &mut b, "write", MIB, 3), Outcome::Done(MIB as u64));
    assert_eq!(carried(&mut a), [0, 0, MIB as u64, 0]);
    assert!(a.log().contains("the peer has another network namespace"), "{}", a.log());
    drop((a, b));
    // A directory in common.
    let (mut a, mut b) = spaces.two(&[], &[ON, shared]);
    for direction in ["write", "read"] {
        assert_eq!(moves(&mut a, &mut b, direction, MIB, 3), Outcome::Done(MIB as u64));
    }
    assert_eq!(carried(&mut a), [MIB as u64, MIB as u64, 0, 0], "{}", a.log());
    drop((a, b));
    let emulated = [&EMULATED[..], &[shared]].concat();
    let (mut a, mut b) = spaces.two(&[], &emulated);
    shared_in_the_end(&mut a, &mut b);
    drop((a, b));
    assert!(until(LIMIT, || std::fs::read_dir(&directory.0).unwrap().count() == 0), "sockets are left in the directory");
    // Separate PID namespaces, too: neither process can name the other, but GPU memory does not need that.
    let (mut a, mut b) = spaces.two(&OWN_NUMBERS, &emulated);
    shared_in_the_end(&mut a, &mut b);
    let (sink, source, item) = granted(&mut a, &mut b, 3 * MIB, 9);
    assert_eq!(again(&mut a, &mut b, "read", 3 * MIB, 9, sink, source, &item), Outcome::Done(3 * MIB as u64));
    assert!(carried(&mut a)[1] > 0);
}

/// Namespaces of PIDs, IPC, names and mounts, as a container has besides that of its network.
const OWN_NUMBERS: [&str; 7] = ["unshare", "--pid", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"];
/// And a user namespace of its own.
const OWN_USERS: [&str; 9] =
    ["unshare", "--user", "--map-root-user", "--pid", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"];

#[test]
fn pods_stage_host_memory_in_areas_and_survive_a_kill() {
    let Some(spaces) = Namespaces::new() else {
        println!("SKIPPED: this process may not make network namespaces");
        return;
    };
    let directory = Shared::new();
    let environment = [ON, ("UCCL_TCPX_LOCAL_DIR", directory.0.to_str().unwrap())];
    for prefix in [&OWN_NUMBERS[..], &OWN_USERS[..]] {
        let (mut a, mut b) = spaces.two(prefix, &environment);
        let mut sum = 0;
        for (fill, len) in [70 << 10, 2 * MIB + 1, 21 * MIB + 3].into_iter().enumerate() {
            for direction in ["write", "read"] {
                assert_eq!(moves(&mut a, &mut b, direction, len, fill as u8 + 1), Outcome::Done(len as u64));
            }
            sum += len as u64;
        }
        assert_eq!(carried(&mut a), [sum, sum, 0, 0], "{}", a.log());
        sends_directly(&mut a, &mut b);
        for victim in [&a, &b] {
            let words = "direct transfers with a process of another PID namespace, preferred to channels: host memory, staged in shared areas";
            assert!(victim.log().contains(words), "{}", victim.log());
        }
        // One of the two ends in the middle.
        const LEN: usize = 48 * MIB;
        let (sink, _) = a.buffer(LEN, 0);
        let (_, item) = b.buffer(LEN, 9);
        let ids: Vec<u64> =
            (0..4).filter_map(|_| a.start_transfer(&format!("read 0 {sink} {LEN} {}", text_of(&item))).ok()).collect();
        std::thread::sleep(Duration::from_millis(3));
        b.signal(libc::SIGKILL);
        for id in ids {
            match a.wait(0, id, LIMIT) {
                Outcome::Done(_) => assert_eq!(a.ask(&format!("holds {sink} {LEN} 9")), "true"),
                Outcome::Pending => panic!("read {id} hangs"),
                Outcome::Failed(_) => {}
            }
        }
        assert!(until(LIMIT, || a.number("areas") == 0));
        assert!(a.end(LIMIT));
    }
}
