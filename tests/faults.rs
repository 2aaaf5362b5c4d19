//! Two honest engines under faults: memory that runs out, data paths that are lost or reset while the control path lives, many polling
//! threads, frozen peers with a backlog, small transfers behind large ones. Every transfer ends by its deadline with OK and its bytes, or
//! with an error that says where it stood still.

mod victim;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, LocalSegment};
use uccl_p2p::status::ErrorKind;
use victim::{config, pair, port, set_environment, text_of, ticks, until, Outcome, Victim};

const LIMIT: Duration = Duration::from_secs(20);

/// Every process of this file's tests but the tests' own.
#[test]
fn engine_process() {
    victim::serve("engine_process", |config| config);
}

fn start(environment: &[(&str, &str)]) -> Victim {
    Victim::start("engine_process", environment)
}

/// Memory of an engine of this process.
struct Buffer {
    bytes: Vec<u8>,
    mr: u64,
}

impl Buffer {
    fn new(engine: &Engine, bytes: Vec<u8>) -> Buffer {
        let mr = engine.register(bytes.as_ptr() as usize, bytes.len()).unwrap();
        Buffer { bytes, mr }
    }
    fn local(&self, len: usize) -> LocalSegment {
        LocalSegment { mr: self.mr, addr: self.bytes.as_ptr() as usize, len }
    }
    fn item(&self, engine: &Engine) -> FifoItem {
        engine.fifo_item(self.mr, self.bytes.as_ptr() as usize, self.bytes.len()).unwrap()
    }
}

// ---- memory ----

/// Whether this is the child process that runs the test's body. In the test's own process: runs the child, which must succeed.
fn isolated(name: &str) -> bool {
    match std::env::var(victim::CHILD) {
        Ok(child) => child == name,
        Err(_) => {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(victim::CHILD, name);
            assert!(command.status().unwrap().success(), "{name} failed in its own process");
            false
        }
    }
}

/// Limits the growth of this process's address space.
fn limit_address_space(more: u64) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().next().unwrap().parse().unwrap();
    let limit = pages * 4096 + more;
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a readable limit.
    unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) };
}

#[test]
fn memory_that_runs_out_gives_errors_and_never_wrong_bytes() {
    const NAME: &str = "memory_that_runs_out_gives_errors_and_never_wrong_bytes";
    if std::env::var_os("UCCL_TEST_SANITIZED").is_some() {
        println!("SKIPPED: AddressSanitizer needs the address space");
        return;
    }
    if !isolated(NAME) {
        return;
    }
    const LEN: usize = 40 << 20;
    // Staging of 128 MiB a channel: it suffices for none, one, two or three of four.
    const CHUNK: usize = 8 << 20;
    set_environment();
    // SAFETY: the only test of this process, before any engine exists.
    unsafe { std::env::set_var("NCCL_DYNAMIC_CHUNK_SIZE", CHUNK.to_string()) };
    let config = || Config { num_channels: Some(4), chunk_bytes: CHUNK, vectored: false, ..config() };
    let environment = [("UCCL_TCPX_NUM_CHANNELS", "4"), ("UCCL_TCPX_CHUNK_BYTES", "8M"), ("UCCL_TCPX_VECTORED", "0")];
    let mut victim = start(&environment);
    victim.ask("accept");
    let engine = Engine::new(config()).unwrap();
    let mut failed = 0;
    for enough_for in 0..4u64 {
        let (target, item) = victim.buffer(LEN, 0);
        let mut source = Buffer::new(&engine, vec![0; LEN]);
        let out = engine.connect("127.0.0.1", "", victim.port).unwrap();
        // All threads exist when it is over, and their number stays.
        let id = out.transfer(Direction::Write, std::iter::once((source.local(100), item))).unwrap();
        assert!(out.wait(id, Some(LIMIT)).unwrap().complete);
        let mut running = 0;
        while std::mem::replace(&mut running, victim::threads(std::process::id())) != victim::threads(std::process::id()) {
            std::thread::sleep(Duration::from_millis(300));
        }
        limit_address_space(enough_for * 16 * CHUNK as u64 + (64 << 20));
        for fill in 1..=5u8 {
            source.bytes.fill(fill);
            if fill == 2 {
                // There is memory again: what went wrong before must not show in later transfers.
                limit_address_space(1 << 40);
            }
            let result = out
                .transfer(Direction::Write, std::iter::once((source.local(LEN), item)))
                .and_then(|id| out.wait(id, Some(LIMIT)));
            match result {
                Ok(state) => {
                    assert!(state.complete, "a write never ends");
                    let right = victim.ask(&format!("holds {target} {LEN} {fill}"));
                    assert_eq!(
                        right, "true",
                        "write {fill} with memory for {enough_for} channels is OK, and its bytes are not there"
                    );
                }
                Err(e) => {
                    println!("write {fill}, memory for {enough_for} channels: {e}");
                    failed += 1;
                }
            }
        }
        limit_address_space(1 << 40);
        out.close();
        engine.deregister(source.mr).unwrap();
    }
    println!("{failed} of 20 writes failed");
    assert!(failed > 0, "memory did not run out: the test shows nothing");
}

/// How much address space a process gets beyond what it has when it starts, in steps of 256 KiB: the least suffices for no thread of an
/// engine, more for some of the threads that a connection wants, and the most for a connection.
const SPACES: std::ops::Range<u64> = 32..160;
const LITTLE: &str = "UCCL_TEST_ADDRESS_SPACE";

/// The work of a process with little address space: two engines, a connection, a write.
fn live_with_little() -> uccl_p2p::status::Result<()> {
    let (a, b) = (Engine::new(config())?, Engine::new(config())?);
    let out = a.connect("127.0.0.1", "", port(&b))?;
    let inc = b.accept()?;
    let (from, to) = (vec![7u8; 1 << 20], vec![0u8; 1 << 20]);
    let source =
        LocalSegment { mr: a.register(from.as_ptr() as usize, from.len())?, addr: from.as_ptr() as usize, len: from.len() };
    let mr = b.register(to.as_ptr() as usize, to.len())?;
    let item = b.fifo_item(mr, to.as_ptr() as usize, to.len())?;
    let id = out.transfer(Direction::Write, std::iter::once((source, item)))?;
    assert!(out.wait(id, Some(LIMIT))?.complete, "a write never ends");
    assert_eq!(to, from);
    drop((out, inc));
    Ok(())
}

#[test]
fn process_with_little_address_space() {
    let Some(more) = std::env::var(LITTLE).ok().and_then(|more| more.parse().ok()) else { return };
    // What the test itself has read and written is no part of it.
    let _ = config();
    println!();
    limit_address_space(more);
    let result = live_with_little();
    limit_address_space(1 << 40);
    println!("= {}", result.map_or_else(|e| format!("{:?}: {e}", e.kind()), |()| "done".to_owned()));
}

/// Wherever the address space ends, calls fail and the process continues; and the error names the address space, not a limit of threads.
#[test]
fn no_limit_of_the_address_space_ends_the_process() {
    if std::env::var_os("UCCL_TEST_SANITIZED").is_some() {
        println!("SKIPPED: AddressSanitizer needs the address space");
        return;
    }
    let run = |more: u64, ipc: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["process_with_little_address_space", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(LITTLE, more.to_string()).env("UCCL_P2P_DISABLE_IPC", ipc).env("RUST_LOG", "off");
        command.output().unwrap()
    };
    let (mut done, mut failed) = (0, 0);
    for (step, ipc) in SPACES.flat_map(|step| [(step, "0"), (step, "1")]) {
        let output = run(step << 18, ipc);
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let case = format!("{} KiB, UCCL_P2P_DISABLE_IPC={ipc}: {}: {text}{errors}", step << 8, output.status);
        assert!(output.status.success(), "{case}");
        let Some((_, answer)) = text.lines().find_map(|line| line.split_once("= ")) else { panic!("{case}") };
        assert!(answer == "done" || answer.contains("address space"), "{case}");
        *(if answer == "done" { &mut done } else { &mut failed }) += 1;
    }
    assert!(done > 0 && failed > 0, "{done} went well and {failed} failed: the limits are not those at which memory runs out");
}

// ---- threads ----

#[test]
fn undriven_connections_keep_each_other_alive() {
    let timeout = Duration::from_secs(5);
    let config = || Config { num_channels: Some(1), peer_timeout: timeout, ..config() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let all: Vec<_> = (0..20).map(|_| pair(&a, &b)).collect();
    std::thread::sleep(2 * timeout + timeout / 4);
    for (out, inc) in &all {
        assert!(out.status().is_ok() && inc.status().is_ok(), "{:?}, {:?}", out.status(), inc.status());
        let silent = out.stats().unwrap().silent.max(inc.stats().unwrap().silent);
        assert!(silent < timeout, "nothing was heard for {silent:?}");
    }
}

fn impatient(transfer_timeout: Duration) -> [std::sync::Arc<Engine>; 2] {
    set_environment();
    [(); 2].map(|()| {
        let config = Config { peer_timeout: Duration::from_millis(600), transfer_timeout, ..config() };
        Engine::new(config).unwrap()
    })
}

/// A thread is delayed for long while it holds a connection, as by a GPU driver while the application copies: the peer still receives
/// heartbeats, the engine's other connections continue, and so does the held one afterwards.
#[test]
fn a_held_connection_stays_alive_and_delays_no_other() {
    const KEPT: Duration = Duration::from_secs(3);
    let [a, b] = impatient(Duration::from_secs(30));
    let ((kept, inc), (other, other_inc)) = (pair(&a, &b), pair(&a, &b));
    let (from, to) = (Buffer::new(&a, vec![7; 100_000]), Buffer::new(&b, vec![0; 100_000]));
    let write = |conn: &uccl_p2p::engine::Connection| {
        let id = conn.transfer(Direction::Write, std::iter::once((from.local(100_000), to.item(&b)))).unwrap();
        conn.wait(id, None).unwrap();
    };
    std::thread::scope(|scope| {
        let keeping = scope.spawn(|| kept.simulate_kept_preparing(KEPT));
        let (start, mut slowest) = (Instant::now(), Duration::ZERO);
        while !keeping.is_finished() {
            let began = Instant::now();
            write(&other);
            slowest = slowest.max(began.elapsed());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(start.elapsed() > KEPT / 2 && slowest < KEPT / 2, "another connection was kept for {slowest:?}");
    });
    for conn in [&kept, &inc, &other, &other_inc] {
        conn.status().unwrap();
    }
    write(&kept);
    assert_eq!(to.bytes, from.bytes);
}

/// The same during set-up: peers abandon neither the connections being set up nor those set up beside them.
#[test]
fn connections_stay_alive_while_a_set_up_is_held() {
    const KEPT: Duration = Duration::from_millis(1500);
    const COUNT: usize = 4;
    let [a, b] = impatient(Duration::from_secs(30));
    b.simulate_kept_set_ups(KEPT);
    let start = Instant::now();
    let connections: Vec<_> = std::thread::scope(|scope| {
        let connects: Vec<_> = (0..COUNT).map(|_| scope.spawn(|| a.connect("127.0.0.1", "", port(&b)).unwrap())).collect();
        connects.into_iter().map(|connect| connect.join().unwrap()).collect()
    });
    let accepted: Vec<_> = (0..COUNT).map(|_| b.accept().unwrap()).collect();
    while start.elapsed() < KEPT * (COUNT as u32 + 1) {
        for conn in connections.iter().chain(&accepted) {
            conn.status().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let (from, to) = (Buffer::new(&a, vec![7; 100_000]), Buffer::new(&b, vec![0; 100_000]));
    for conn in &connections {
        let id = conn.transfer(Direction::Write, std::iter::once((from.local(100_000), to.item(&b)))).unwrap();
        conn.wait(id, None).unwrap();
    }
    assert_eq!(to.bytes, from.bytes);
}

/// Nor does a thread that sets one connection up block the set-up or use of another.
#[test]
fn a_held_set_up_delays_no_other() {
    const KEPT: Duration = Duration::from_secs(3);
    let [a, b] = impatient(Duration::from_secs(30));
    b.simulate_kept_set_ups(KEPT);
    let since = Instant::now();
    let kept = pair(&a, &b);
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    let (other, _inc) = pair(&a, &b);
    let (from, to) = (Buffer::new(&a, vec![7; 100_000]), Buffer::new(&b, vec![0; 100_000]));
    let id = other.transfer(Direction::Write, std::iter::once((from.local(100_000), to.item(&b)))).unwrap();
    other.wait(id, None).unwrap();
    assert!(begun.elapsed() < KEPT / 2, "another set-up was kept for {:?}", begun.elapsed());
    assert_eq!(to.bytes, from.bytes);
    kept.0.status().unwrap();
    // A query of its state waits for the thread that sets it up.
    kept.1.status().unwrap();
    assert!(since.elapsed() >= KEPT, "no thread set it up");
}

/// Transfers that keep a region from its end are failed, whatever keeps a connection that has nothing to do with it.
#[test]
fn a_region_ends_while_another_connection_is_held() {
    const KEPT: Duration = Duration::from_secs(4);
    set_environment();
    let config = || Config { close_timeout: Duration::from_millis(300), ..config() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let ((kept, _inc), (out, _other_inc)) = (pair(&a, &b), pair(&a, &b));
    let target = Buffer::new(&a, vec![0; 100]);
    let id = out.recv(target.local(100)).unwrap();
    std::thread::scope(|scope| {
        let keeping = scope.spawn(|| kept.simulate_kept_preparing(KEPT));
        std::thread::sleep(Duration::from_millis(100));
        a.deregister(target.mr).unwrap();
        assert!(!keeping.is_finished(), "the end of a region waited for a connection that has nothing to do with it");
    });
    assert_eq!(out.wait(id, Some(LIMIT)).unwrap_err().kind(), ErrorKind::Canceled);
    kept.status().unwrap();
}

/// When an engine ends while a thread holds one of its connections, the peers of the others learn of it at once.
#[test]
fn an_engine_with_a_held_connection_closes_the_others_when_it_ends() {
    const KEPT: Duration = Duration::from_secs(4);
    let [a, b] = impatient(Duration::from_secs(30));
    let (kept, _inc) = pair(&a, &b);
    let others: Vec<_> = (0..3).map(|_| pair(&a, &b)).collect();
    std::thread::scope(|scope| {
        let keeping = scope.spawn(|| kept.simulate_kept_preparing(KEPT));
        std::thread::sleep(Duration::from_millis(100));
        scope.spawn(|| a.shutdown());
        for (_, inc) in &others {
            assert!(until(KEPT / 2, || inc.status().is_err()), "the peer of another connection heard of the end too late");
            assert_eq!(inc.status().unwrap_err().kind(), ErrorKind::RemoteDisconnect);
        }
        assert!(!keeping.is_finished());
    });
    assert!(until(LIMIT, || kept.status().is_err()));
}

/// Clock ticks that this process uses while a thread holds a connection that has an event meanwhile, and those of a second.
fn ticks_while_kept(kept: &Connection, time: Duration, happens: impl FnOnce()) -> (u64, u64) {
    let before = ticks(std::process::id());
    std::thread::scope(|scope| {
        scope.spawn(|| kept.simulate_kept_preparing(time));
        std::thread::sleep(Duration::from_millis(100));
        happens();
    });
    let used = ticks(std::process::id()) - before;
    // SAFETY: a plain system call.
    (used, unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as u64)
}

/// Data that the peer sends to a held connection waits, and costs no CPU time meanwhile.
#[test]
fn data_for_a_held_connection_waits_without_cost() {
    const NAME: &str = "data_for_a_held_connection_waits_without_cost";
    const KEPT: Duration = Duration::from_secs(3);
    if !isolated(NAME) {
        return;
    }
    let [a, b] = impatient(Duration::from_secs(30));
    let (kept, inc) = pair(&a, &b);
    std::thread::sleep(Duration::from_millis(300));
    let (used, second) = ticks_while_kept(&kept, KEPT, || inc.notify(b"n", b"unread").unwrap());
    assert!(used < second, "{used} of {} ticks", KEPT.as_secs() * second);
    kept.status().unwrap();
    assert!(until(LIMIT, || a.next_notification().is_some()));
}

/// A socket that has hung up always has an event: that costs a held connection no CPU time either.
#[test]
fn a_lost_peer_of_a_held_connection_costs_nothing() {
    const NAME: &str = "a_lost_peer_of_a_held_connection_costs_nothing";
    const KEPT: Duration = Duration::from_secs(5);
    if !isolated(NAME) {
        return;
    }
    let peer = start(&[]);
    let engine = Engine::new(Config { peer_timeout: Duration::from_secs(1), ..config() }).unwrap();
    let kept = engine.connect("127.0.0.1", "", peer.port).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    // The first heartbeat that comes after it is answered with a reset.
    let (used, second) = ticks_while_kept(&kept, KEPT, || drop(peer));
    assert!(used < 2 * second, "{used} of {} ticks", KEPT.as_secs() * second);
    assert!(until(LIMIT, || kept.status().is_err()));
}

/// Heartbeats do not continue for ever for a thread that does not return.
#[test]
fn a_connection_that_stays_kept_is_given_up_by_its_peer() {
    let [a, b] = impatient(Duration::from_secs(1));
    let (kept, inc) = pair(&a, &b);
    std::thread::scope(|scope| {
        let keeping = scope.spawn(|| kept.simulate_kept_preparing(Duration::from_secs(8)));
        assert!(until(Duration::from_secs(6), || inc.status().is_err()), "the peer is believed for ever");
        let stats = b.stats().unwrap();
        assert_eq!((stats.lost, stats.timeouts), (1, 1), "silence is a deadline, too");
        assert!(!keeping.is_finished());
    });
    assert!(until(LIMIT, || kept.status().is_err()));
}

#[test]
fn threads_that_poll_one_connection_do_not_starve_its_heartbeat() {
    let config = || Config { num_channels: Some(1), peer_timeout: Duration::from_secs(2), ..config() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, inc) = pair(&a, &b);
    let stop = AtomicBool::new(false);
    let buffers: Vec<Buffer> = (0..4).map(|_| Buffer::new(&a, vec![0; 100])).collect();
    std::thread::scope(|s| {
        for buffer in &buffers {
            let (out, stop) = (&out, &stop);
            s.spawn(move || {
                let id = out.recv(buffer.local(100)).unwrap();
                while !stop.load(Ordering::Relaxed) && out.poll(id).is_ok_and(|state| !state.complete) {}
            });
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) && inc.status().is_ok() && out.status().is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
        let lived = start.elapsed();
        stop.store(true, Ordering::Relaxed);
        for connection in [&out, &inc] {
            assert!(connection.status().is_ok(), "after {lived:?}: {:?}", connection.status());
        }
    });
}

// ---- turns ----

#[test]
fn a_small_write_does_not_wait_for_a_large_one() {
    const BULK: usize = 64 << 20;
    const SMALL: usize = 64 << 10;
    let config = || Config { num_channels: Some(4), ..config() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _inc) = pair(&a, &b);
    let (source, target) = (Buffer::new(&a, vec![1; BULK]), Buffer::new(&b, vec![0; BULK]));
    let (small, small_target) = (Buffer::new(&a, vec![2; SMALL]), Buffer::new(&b, vec![0; SMALL]));
    let (item, small_item) = (target.item(&b), small_target.item(&b));
    let run = |id: u64| out.wait(id, Some(LIMIT)).map(|state| assert!(state.complete)).unwrap();
    let mut ratios = Vec::new();
    for _ in 0..4 {
        let begun = Instant::now();
        let large =
            out.transfer(Direction::Write, (0..16).map(|_| (source.local(BULK), item)).collect::<Vec<_>>().into_iter()).unwrap();
        let small_begun = Instant::now();
        run(out.transfer(Direction::Write, std::iter::once((small.local(SMALL), small_item))).unwrap());
        let behind = small_begun.elapsed();
        run(large);
        ratios.push(behind.as_secs_f64() / begun.elapsed().as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    println!("64 KiB took {ratios:.3?} of the time of the 1 GiB that it was behind");
    // The better half: the machine has other work too.
    assert!(ratios[1] < 0.25, "{ratios:?}");
}

#[test]
fn sends_that_time_out_cost_the_receiver_no_more_each_when_they_are_many() {
    let mut receiver = start(&[]);
    receiver.ask("accept");
    let engine = Engine::new(Config { num_channels: Some(1), match_timeout: Duration::from_millis(700), ..config() }).unwrap();
    let buffer = Buffer::new(&engine, vec![1; 16]);
    let mut cost = |n: usize| {
        let out = engine.connect("127.0.0.1", "", receiver.port).unwrap();
        let before = ticks(receiver.id());
        let ids: Vec<u64> = (0..n).map(|_| out.send(std::iter::once(buffer.local(16))).unwrap()).collect();
        let start = Instant::now();
        for id in ids {
            assert!(out.wait(id, Some(LIMIT)).is_err());
        }
        assert!(start.elapsed() < 2 * LIMIT, "{n} sends took {:?} to time out", start.elapsed());
        // The receiver is done with the withdrawals when it answers.
        let (_, item) = receiver.buffer(16, 0);
        let id = out.transfer(Direction::Write, std::iter::once((buffer.local(16), item))).unwrap();
        assert!(out.wait(id, Some(3 * LIMIT)).unwrap().complete);
        ticks(receiver.id()) - before
    };
    let (few, many) = (cost(4000).max(5), cost(60_000));
    println!("4,000 sends: {few} ticks at the receiver; 60,000: {many}");
    assert!(many <= 15 * few + 60, "4,000 sends cost {few} ticks, 60,000 {many}");
}

// ---- the end ----

#[test]
fn frozen_peers_with_a_backlog_share_one_deadline() {
    const PEERS: usize = 40;
    // On a busy host a backlog takes long to queue: no other deadline ends the connections meanwhile.
    let patience = Duration::from_secs(300);
    let mut peer = start(&[("UCCL_TCPX_NUM_CHANNELS", "1"), ("UCCL_TCPX_PEER_TIMEOUT_MS", "300000")]);
    peer.ask("accept");
    let patient = Config { peer_timeout: patience, transfer_timeout: patience, ..config() };
    let engine = Engine::new(Config { num_channels: Some(1), close_timeout: Duration::from_secs(2), ..patient }).unwrap();
    let kept: Vec<_> = (0..PEERS).map(|_| engine.connect("127.0.0.1", "", peer.port).unwrap()).collect();
    assert!(until(LIMIT, || peer.number("connections") == PEERS));
    peer.signal(libc::SIGSTOP);
    for connection in &kept {
        connection.notify(b"n", &vec![1; 8 << 20]).unwrap();
    }
    let start = Instant::now();
    engine.shutdown();
    let took = start.elapsed();
    peer.signal(libc::SIGCONT);
    // One after the other they would take twice as long, on an idle host.
    assert!(took < Duration::from_secs(20), "{PEERS} frozen peers took {took:?}");
    assert!(kept.iter().all(|c| c.status().is_err()));
}

// ---- lost paths ----

/// Two hosts as network namespaces with one NIC pair; none where that is not possible.
struct Hosts {
    names: [String; 2],
}

fn run(command: &str) -> bool {
    let words: Vec<&str> = command.split_whitespace().collect();
    Command::new(words[0]).args(&words[1..]).output().is_ok_and(|out| out.status.success())
}

impl Hosts {
    fn new() -> Option<Hosts> {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let tag = format!("{}-{number}", std::process::id());
        let hosts = Hosts { names: [format!("uccl-fa-{tag}"), format!("uccl-fb-{tag}")] };
        let [a, b] = &hosts.names;
        let made = [a, b].iter().all(|host| run(&format!("ip netns add {host}")) && run(&format!("ip -n {host} link set lo up")))
            && run(&format!("ip link add fa{tag} type veth peer name fb{tag}"))
            && run(&format!("ip link set fa{tag} netns {a} name eth1"))
            && run(&format!("ip link set fb{tag} netns {b} name eth1"))
            && run(&format!("ip -n {a} addr add 10.79.1.1/24 dev eth1"))
            && run(&format!("ip -n {b} addr add 10.79.1.2/24 dev eth1"))
            && [a, b].iter().all(|host| run(&format!("ip -n {host} link set eth1 up")));
        if !made {
            println!("SKIPPED: network namespaces and veth pairs cannot be made here");
        }
        // The kernel takes its time with the carrier of a new interface, and one without is not used.
        let carries = |host: &String| {
            let shown = Command::new("ip").args(["-n", host.as_str(), "-o", "link", "show", "dev", "eth1"]).output();
            shown.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains("state UP"))
        };
        assert!(!made || until(LIMIT, || hosts.names.iter().all(carries)), "no carrier");
        made.then_some(hosts)
    }

    /// A process on a host.
    fn start(&self, host: usize, environment: &[(&str, &str)]) -> Victim {
        let mut all = vec![(victim::NIC, "eth1")];
        all.extend(environment);
        Victim::under(&["ip", "netns", "exec", &self.names[host]], "engine_process", &all)
    }

    fn on(&self, host: usize, command: &str) -> bool {
        run(&format!("ip netns exec {} {command}", self.names[host]))
    }

    /// Makes the line slow.
    fn slow(&self, mbit: usize) -> bool {
        self.names
            .iter()
            .all(|host| run(&format!("tc -n {host} qdisc add dev eth1 root tbf rate {mbit}mbit burst 64k latency 50ms")))
    }

    /// Two processes, connected from the first to the second.
    fn pair(&self, environment: &[(&str, &str)]) -> (Victim, Victim) {
        let (mut a, mut b) = (self.start(0, environment), self.start(1, environment));
        b.ask("accept");
        assert_eq!(a.ask(&format!("connect 10.79.1.2 {}", b.port)), "0");
        assert!(until(LIMIT, || b.number("connections") == 1));
        (a, b)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            run(&format!("ip netns del {name}"));
        }
    }
}

/// The words that tell which channel is the cause.
fn names_the_path(error: &str) -> bool {
    let ends = error.matches("10.79.1.").count();
    error.contains("channel") && ends >= 2 && error.contains("on eth1")
}

#[test]
fn a_transfer_whose_data_path_is_lost_ends_although_the_control_path_lives() {
    let Some(hosts) = Hosts::new() else { return };
    if !hosts.slow(200) || !hosts.on(1, "iptables -L -n") {
        println!("SKIPPED: tc and iptables are needed");
        return;
    }
    const LEN: usize = 64 << 20;
    let environment = [("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "2000"), ("UCCL_TCPX_NUM_CHANNELS", "2")];
    for operation in ["write", "read"] {
        let (mut a, mut b) = hosts.pair(&environment);
        let (target, item) = b.buffer(LEN, 1);
        let (source, _) = a.buffer(LEN, 2);
        let id = a.start_transfer(&format!("{operation} 0 {source} {LEN} {}", text_of(&item))).unwrap();
        assert_eq!(a.wait(0, id, Duration::from_millis(300)), Outcome::Pending);
        for rule in [format!("--dport {} -j ACCEPT", b.port), format!("--sport {} -j ACCEPT", b.port), "-j DROP".to_owned()] {
            assert!(hosts.on(1, &format!("iptables -A INPUT -p tcp {rule}")));
            assert!(hosts.on(1, &format!("iptables -A OUTPUT -p tcp {rule}")));
        }
        let start = Instant::now();
        let outcome = a.wait(0, id, LIMIT);
        println!("{operation}: {outcome:?} after {:?}", start.elapsed());
        let Outcome::Failed(error) = outcome else { panic!("{operation}: {outcome:?}") };
        assert!(names_the_path(&error), "{operation}: {error}");
        // The peer has learnt of it, too.
        assert!(until(LIMIT, || b.ask("status 0").starts_with("error")));
        let _ = target;
        assert!(hosts.on(1, "iptables -F"));
        assert!(a.end(LIMIT) && b.end(LIMIT));
    }
}

/// Resets all data sockets of a host, as a middlebox would; false where the kernel cannot.
fn reset_data(hosts: &Hosts, host: usize, control: u16) -> bool {
    let filter = format!("ss -K -t state established sport != :{control} and dport != :{control}");
    let before = format!("ss -Htn state established sport != :{control} and dport != :{control}");
    let listed = || {
        let out = Command::new("ip").args(["netns", "exec", &hosts.names[host]]).args(before.split(' ')).output();
        out.map_or(0, |out| String::from_utf8_lossy(&out.stdout).lines().count())
    };
    let n = listed();
    hosts.on(host, &filter) && n > 0 && listed() == 0
}

/// All data channels at once: the control connection lives, so they are set up again, and transfers wait for them.
#[test]
fn a_reset_of_all_data_channels_is_noticed_at_once_and_costs_no_transfer() {
    let Some(hosts) = Hosts::new() else { return };
    const LEN: usize = 600 << 10;
    // Long deadlines, so that only the reset is noticed.
    let environment =
        [("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "60000"), ("UCCL_TCPX_PEER_TIMEOUT_MS", "60000"), ("UCCL_TCPX_NUM_CHANNELS", "2")];
    for what in ["idle", "in flight"] {
        let (mut a, mut b) = hosts.pair(&environment);
        let (target, item) = b.buffer(LEN, 1);
        let (source, _) = a.buffer(LEN, 2);
        let write = |fill: usize| format!("write 0 {fill} {LEN} {}", text_of(&item));
        let id = a.start_transfer(&write(source)).unwrap();
        assert_eq!(a.wait(0, id, LIMIT), Outcome::Done(LEN as u64));
        let control = b.port;
        let (last, _) = a.buffer(LEN, 3);
        let mut open = None;
        if what == "in flight" {
            // Frozen, the peer takes nothing, and its kernel takes all of it.
            b.signal(libc::SIGSTOP);
            open = Some(a.start_transfer(&write(last)).unwrap());
            std::thread::sleep(Duration::from_millis(300));
        }
        if !reset_data(&hosts, 1, control) {
            b.signal(libc::SIGCONT);
            println!("SKIPPED: this kernel cannot reset sockets (ss -K)");
            return;
        }
        let start = Instant::now();
        b.signal(libc::SIGCONT);
        let id = open.unwrap_or_else(|| a.start_transfer(&write(last)).unwrap());
        assert_eq!(a.wait(0, id, LIMIT), Outcome::Done(LEN as u64), "{what}");
        println!("{what}: done {:?} after the reset", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(5), "{what}: {:?}", start.elapsed());
        assert_eq!(b.ask(&format!("holds {target} {LEN} 3")), "true", "{what}");
        for victim in [&mut a, &mut b] {
            assert_eq!(victim.ask("status 0"), "up");
            let both = |victim: &mut Victim| victim.ask("losses 0") == "2 2";
            assert!(until(LIMIT, || both(victim)), "{what}: {}", victim.ask("losses 0"));
            // Both say what was lost, and where, in one line for the NIC.
            let said = |log: &str| names_the_path(log) && log.contains(" is lost: ");
            assert!(until(LIMIT, || said(&victim.log())), "{what}: {}", victim.log());
            assert_eq!(victim.log().matches(" is lost: ").count(), 1, "{what}: {}", victim.log());
        }
        assert!(a.end(LIMIT) && b.end(LIMIT));
    }
}

/// Where the channels cannot come back, a transfer ends by its timeout, and says what was lost.
#[test]
fn a_transfer_waits_for_channels_that_do_not_come_back_up_to_its_timeout() {
    let Some(hosts) = Hosts::new() else { return };
    if !hosts.on(1, "iptables -L -n") {
        println!("SKIPPED: iptables is needed");
        return;
    }
    const LEN: usize = 600 << 10;
    let (mut a, mut b) = hosts.pair(&[("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "3000"), ("UCCL_TCPX_NUM_CHANNELS", "2")]);
    let (_, item) = b.buffer(LEN, 1);
    let (source, _) = a.buffer(LEN, 2);
    let write = format!("write 0 {source} {LEN} {}", text_of(&item));
    // The listening sockets of new channels are out of reach.
    for rule in [format!("--dport {} -j ACCEPT", b.port), "--syn -j DROP".to_owned()] {
        assert!(hosts.on(1, &format!("iptables -A INPUT -p tcp {rule}")));
    }
    if !reset_data(&hosts, 1, b.port) {
        println!("SKIPPED: this kernel cannot reset sockets (ss -K)");
        return;
    }
    assert!(until(LIMIT, || a.ask("losses 0") == "2 0" && b.ask("losses 0") == "2 0"));
    // Idle, the connection stays.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!((a.ask("status 0"), b.ask("status 0")), ("up".to_owned(), "up".to_owned()));
    let (id, start) = (a.start_transfer(&write).unwrap(), Instant::now());
    let Outcome::Failed(error) = a.wait(0, id, LIMIT) else { panic!("the write did not fail") };
    println!("{error} after {:?}", start.elapsed());
    assert!(start.elapsed() > Duration::from_secs(2) && start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert!(names_the_path(&error) && error.contains("lost and not back"), "{error}");
    assert!(a.end(LIMIT) && b.end(LIMIT));
}

/// Chunks larger than the plugin's messages are no configuration that fails at the first transfer.
#[test]
fn chunks_are_never_larger_than_the_plugins_messages() {
    const LEN: usize = 20 << 20;
    let config = || Config { num_channels: Some(2), chunk_bytes: 8 << 20, vectored: false, ..config() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _inc) = pair(&a, &b);
    let (source, target) = (Buffer::new(&a, vec![1; LEN]), Buffer::new(&b, vec![0; LEN]));
    let id = out.transfer(Direction::Write, std::iter::once((source.local(LEN), target.item(&b)))).unwrap();
    assert!(out.wait(id, Some(LIMIT)).unwrap().complete);
    assert!(source.bytes == target.bytes);
}

#[test]
fn one_lost_channel_of_several_ends_the_transfer_and_says_which() {
    let Some(hosts) = Hosts::new() else { return };
    if !hosts.slow(200) || !hosts.on(1, "iptables -L -n") {
        println!("SKIPPED: tc and iptables are needed");
        return;
    }
    const LEN: usize = 32 << 20;
    let (mut a, mut b) = hosts.pair(&[("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "3000"), ("UCCL_TCPX_NUM_CHANNELS", "4")]);
    let (_, item) = b.buffer(LEN, 1);
    let (source, _) = a.buffer(LEN, 2);
    let id = a.start_transfer(&format!("write 0 {source} {LEN} {}", text_of(&item))).unwrap();
    assert_eq!(a.wait(0, id, Duration::from_millis(200)), Outcome::Pending);
    // One data port of the receiving host.
    let out = Command::new("ip").args(["netns", "exec", &hosts.names[1], "ss", "-Htn", "state", "established"]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let ends = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).filter(|w| !l_has_port(w, b.port));
    // The channel with the most unread or sent bytes is one of this transfer's.
    let lost: Vec<String> = ends.map(|w| w[2].rsplit(':').next().unwrap().to_owned()).take(1).collect();
    for port in &lost {
        for side in ["--dport", "--sport"] {
            assert!(hosts.on(1, &format!("iptables -A INPUT -p tcp {side} {port} -j DROP")));
        }
    }
    let start = Instant::now();
    match a.wait(0, id, LIMIT) {
        // The lost one carried nothing of it.
        Outcome::Done(_) => assert_eq!(b.ask(&format!("holds 0 {LEN} 2")), "true"),
        Outcome::Failed(error) => assert!(names_the_path(&error) && error.contains(&lost[0]), "{error}; lost: {lost:?}"),
        Outcome::Pending => panic!("the write is still pending after {:?}", start.elapsed()),
    }
    assert!(a.end(LIMIT) && b.end(LIMIT));
}

fn l_has_port(words: &[&str], port: u16) -> bool {
    let port = format!(":{port}");
    words.iter().any(|w| w.ends_with(&port))
}
