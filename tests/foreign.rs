//! The engine over a plugin of others, whole: the strict foreign plugin, which simulates GPUDirect-TCPX and ends the process at the first
//! breach of its contract, with emulated device memory. Each case has a process of its own.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Direction, Engine, LocalSegment};

const CASE: &str = "UCCL_FOREIGN_TEST_CASE";
/// Places of the plugin's counters, as its `rules::Counters` lists them.
const REGISTRATIONS: usize = 0;
const REGISTRATIONS_MOST: usize = 1;
const DESCRIPTORS: usize = 3;
const IMPORTS: usize = 5;
const COMMS: usize = 6;
const PAGES_OUT: usize = 11;
const WARNINGS: usize = 12;

fn foreign() -> PathBuf {
    let this = std::env::current_exe().expect("this program");
    let deps = this.parent().expect("folder");
    let found = [deps.join("libnccl_net_strict_foreign.so"), deps.join("../libnccl_net_strict_foreign.so")];
    found.into_iter().find(|p| p.exists()).expect("libnccl_net_strict_foreign.so: cargo build -p strict-foreign-plugin")
}

/// Runs a case; gives its log.
fn run(case: &str, environment: &[(&str, &str)]) -> String {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    child.env_remove("UCCL_TCPX_PLUGIN").env_remove("UCCL_P2P_TRANSPORT").env_remove("NCCL_DYNAMIC_CHUNK_SIZE");
    static RUNS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = RUNS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let counters = std::env::temp_dir().join(format!("uccl-foreign-{}-{number}", std::process::id()));
    child.env("STRICT_FOREIGN_COUNTERS", &counters).env("UCCL_TCPX_PLUGIN_PATH", foreign()).env(CASE, case);
    child.env("STRICT_FOREIGN_CONNECT_MS", "30").env("STRICT_FOREIGN_ACCEPT_MS", "50");
    child.env("UCCL_P2P_LOG_LEVEL", "info").env("UCCL_TCPX_EMULATE_DEVICE", "1").env("NCCL_SOCKET_IFNAME", "lo");
    let out = child.envs(environment.iter().copied()).output().expect("child");
    let _ = std::fs::remove_file(counters);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{case} {environment:?}: {} {text}", out.status);
    text
}

#[test]
fn bytes_arrive_over_any_number_of_channels() {
    for channels in ["1", "3", "16"] {
        run("moves", &[("UCCL_TCPX_NUM_CHANNELS", channels)]);
    }
    // As slow as TCPX sets up.
    run("moves", &[("STRICT_FOREIGN_CONNECT_MS", "300"), ("STRICT_FOREIGN_ACCEPT_MS", "500"), ("UCCL_TCPX_NUM_CHANNELS", "8")]);
}

#[test]
fn chunks_stay_within_what_the_plugin_carries() {
    run("moves", &[("UCCL_TCPX_CHUNK_BYTES", "4M")]);
    run("moves", &[("UCCL_TCPX_CHUNK_BYTES", "4M"), ("NCCL_DYNAMIC_CHUNK_SIZE", "4194304")]);
    run("moves", &[("NCCL_DYNAMIC_CHUNK_SIZE", "0x4000")]);
}

#[test]
fn encryption_is_refused_and_integrity_says_what_it_leaves_out() {
    run("refuses_encryption", &[("UCCL_TCPX_PROTECT", "encrypt")]);
    let log = run("moves", &[("UCCL_TCPX_PROTECT", "integrity")]);
    assert!(log.contains("which cannot be checked"), "{log}");
}

#[test]
fn a_dead_nic_leaves_fewer_channels() {
    let log = run("moves", &[("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2@dead"), ("UCCL_TCPX_NUM_CHANNELS", "4")]);
    assert!(log.contains("NIC eth2 is left out"), "{log}");
}

#[test]
fn where_no_nics_meet_the_software_plugin_carries() {
    let log = run("no_nic_in_common", &[("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1")]);
    assert!(log.contains("no NIC in common") && log.contains("[eth1] here, [eth2] at the peer"), "{log}");
}

#[test]
fn registrations_are_one_a_region_and_nic() {
    run("registrations", &[("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2"), ("UCCL_TCPX_NUM_CHANNELS", "16")]);
}

#[test]
fn the_plugins_lines_are_written_once_a_second() {
    let log = run("moves", &[("UCCL_TCPX_NUM_CHANNELS", "8")]);
    assert!(log.contains("plugin [strict_foreign.cc:1003] NET/TCPX : initialised, devices 1 (7, 0.5)"), "{log}");
    let lines = log.lines().filter(|l| l.contains("No free space")).count();
    assert!(lines < 100, "{lines} lines");
}

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    // SAFETY: this process' own disposition: as in a C program.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match case.as_str() {
        "moves" => moves(),
        "refuses_encryption" => refuses_encryption(),
        "registrations" => registrations(),
        "no_nic_in_common" => no_nic_in_common(),
        "peer_on_eth2" => peer_on_eth2(),
        other => panic!("no case {other}"),
    }
}

const LEN: usize = 5 << 20;

fn pattern() -> Vec<u8> {
    (0..LEN).map(|i| (i * 13 + i / 997) as u8).collect()
}

fn no_nic_in_common() {
    let b = engine();
    let mut peer = Command::new(std::env::current_exe().expect("this program"));
    peer.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(CASE, "peer_on_eth2");
    peer.env_remove("STRICT_FOREIGN_COUNTERS").env("STRICT_FOREIGN_DEVICES", "eth2@127.0.0.2").env("PEER", b.metadata());
    let mut peer = peer.spawn().expect("peer");
    let connection = b.accept().expect("accept");
    let mut memory = vec![0u8; LEN];
    let mr = b.register(memory.as_mut_ptr() as usize, LEN).expect("register");
    let id = connection.recv(LocalSegment { mr, addr: memory.as_ptr() as usize, len: LEN }).expect("recv");
    connection.wait(id, Some(Duration::from_secs(30))).expect("received");
    assert!(memory == pattern());
    assert_eq!(counter(COMMS), 0, "the foreign plugin carries nothing");
    drop((connection, b));
    assert!(peer.wait().expect("peer").success());
}

fn peer_on_eth2() {
    let a = engine();
    let text = std::env::var("PEER").expect("peer");
    let port = text.rsplit(':').next().and_then(|p| p.split('?').next()).and_then(|p| p.parse().ok()).expect("port");
    let connection = a.connect("127.0.0.1", "", port).expect("connect");
    let mut memory = pattern();
    let mr = a.register(memory.as_mut_ptr() as usize, LEN).expect("register");
    let local = LocalSegment { mr, addr: memory.as_ptr() as usize, len: LEN };
    let id = connection.send(std::iter::once(local)).expect("send");
    connection.wait(id, Some(Duration::from_secs(30))).expect("sent");
}

fn counter(index: usize) -> u64 {
    let path = std::env::var("STRICT_FOREIGN_COUNTERS").expect("counters");
    let bytes = std::fs::read(path).expect("counters");
    bytes[index * 8..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b))
}

fn settles(what: &str, index: usize, value: u64) {
    let until = Instant::now() + Duration::from_secs(20);
    while counter(index) != value {
        assert!(Instant::now() < until, "{what}: {}", counter(index));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn engine() -> Arc<Engine> {
    Engine::new(Config::from_env().expect("configuration")).expect("engine")
}

fn pair(a: &Engine, b: &Engine) -> (Arc<Connection>, Arc<Connection>) {
    let text = b.metadata();
    let port = text.rsplit(':').next().and_then(|p| p.split('?').next()).and_then(|p| p.parse().ok()).expect("port");
    let out = a.connect("127.0.0.1", "", port).expect("connect");
    (out, b.accept().expect("accept"))
}

/// Writes and reads of many sizes, both ways, every byte compared.
fn refuses_encryption() {
    let error = Engine::new(Config::from_env().expect("configuration")).unwrap_err();
    assert_eq!(error.kind(), uccl_p2p::status::ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("cannot encrypt"), "{error}");
}

fn moves() {
    let (a, b) = (engine(), engine());
    let (out, inc) = pair(&a, &b);
    let len = 24 << 20;
    let bytes = |seed: usize| -> Vec<u8> { (0..len).map(|i| (i * 31 + i / 1021 + seed) as u8).collect() };
    let (mut here, mut there) = (bytes(1), bytes(2));
    let (near, far) =
        (a.register(here.as_mut_ptr() as usize, len).expect("near"), b.register(there.as_mut_ptr() as usize, len).expect("far"));
    both_ways(&out, (&mut here, near), &b, (&mut there, far));
    both_ways(&inc, (&mut there, far), &a, (&mut here, near));
    assert_eq!(counter(IMPORTS), 1);
    settles("receive pages are given back", PAGES_OUT, 0);
    println!("{} warnings of the plugin", counter(WARNINGS));
    drop((out, inc));
    drop((a, b));
    settles("comms are closed", COMMS, 0);
}

fn both_ways(connection: &Connection, (own, own_mr): (&mut [u8], u64), peer: &Engine, (other, other_mr): (&mut [u8], u64)) {
    let len = own.len();
    for (round, size) in [1, 100, 4096, 65_537, 3 << 20, len].into_iter().enumerate() {
        own[..size].iter_mut().for_each(|byte| *byte = byte.wrapping_add(round as u8 + 1));
        let item = peer.fifo_item(other_mr, other.as_ptr() as usize, len).expect("item");
        let local = LocalSegment { mr: own_mr, addr: own.as_ptr() as usize, len: size };
        for direction in [Direction::Write, Direction::Read] {
            let id = connection.transfer(direction, std::iter::once((local, item))).expect("transfer");
            connection.wait(id, None).expect("done");
            assert!(own[..size] == other[..size], "{size} bytes differ");
            if direction == Direction::Write {
                other[..size].iter_mut().for_each(|byte| *byte ^= 0x5A);
            }
        }
    }
}

fn registrations() {
    let (a, b) = (engine(), engine());
    let connections: Vec<_> = (0..3).map(|_| pair(&a, &b)).collect();
    let (regions, size) = (40, 1 << 20);
    let mut memory = vec![7u8; regions * size];
    let mut target = vec![0u8; size];
    let into = b.register(target.as_mut_ptr() as usize, size).expect("target");
    let item = b.fifo_item(into, target.as_ptr() as usize, size).expect("item");
    let before = counter(REGISTRATIONS_MOST);
    let sources: Vec<u64> =
        (0..regions).map(|i| a.register(memory.as_mut_ptr() as usize + i * size, size).expect("region")).collect();
    for (out, _) in &connections {
        for (i, &mr) in sources.iter().enumerate() {
            let local = LocalSegment { mr, addr: memory.as_ptr() as usize + i * size, len: size };
            let id = out.transfer(Direction::Write, std::iter::once((local, item))).expect("transfer");
            out.wait(id, None).expect("done");
        }
    }
    // Beside those of the regions each receiving comm has one small block of its own.
    let comms = counter(COMMS);
    let most = counter(REGISTRATIONS_MOST) - before;
    assert!(most >= regions as u64 && most <= 2 * regions as u64 + comms, "{most} registrations, {comms} comms");
    for mr in sources {
        a.deregister(mr).expect("deregister");
    }
    let left = counter(REGISTRATIONS);
    assert!(left <= comms, "{left} registrations after the regions are gone");
    drop(connections);
    drop((a, b));
    settles("registrations are dropped", REGISTRATIONS, 0);
    settles("descriptors are closed", DESCRIPTORS, 0);
}
