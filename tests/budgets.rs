//! A hundred peers that all follow the protocol, and together want more than an engine's budgets: each budget holds in all, what is beyond is
//! refused or fails alone, and the others go on.

mod local;

use local::{port, until};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::addresses::Bind;
use uccl_p2p::config::{Budgets, Config};
use uccl_p2p::engine::{Connection, Direction, Engine, LocalSegment};
use uccl_p2p::status::ErrorKind;

const PEERS: usize = 100;
const LIMIT: Duration = Duration::from_secs(60);

/// Counts the lines that the library writes.
struct Lines;

static WARNINGS: AtomicUsize = AtomicUsize::new(0);
static REFUSALS: AtomicUsize = AtomicUsize::new(0);

impl log::Log for Lines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            WARNINGS.fetch_add(1, Ordering::Relaxed);
            REFUSALS.fetch_add(usize::from(record.args().to_string().contains("refused")), Ordering::Relaxed);
        }
    }
    fn flush(&self) {}
}

fn config(budgets: Budgets) -> Config {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        log::set_boxed_logger(Box::new(Lines)).expect("the only logger");
        log::set_max_level(log::LevelFilter::Warn);
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: a writable rlimit, and a readable one.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
            limit.rlim_cur = limit.rlim_max.min(16_384);
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        }
    });
    Config { num_channels: Some(1), budgets, ..local::config() }
}

/// An address of this host from which a connect does not come from 127.0.0.1.
fn second_address() -> Option<String> {
    let bound = |ip: &str| std::net::TcpListener::bind((ip, 0)).is_ok().then(|| ip.to_owned());
    let towards = |ip: &str| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect((ip, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback()).map(|ip| ip.to_string())
    };
    bound("::1").or_else(|| towards("192.0.2.1"))
}

/// A target with these budgets, peers that are connected to it, and its ends of their connections.
struct Crowd {
    target: Arc<Engine>,
    peers: Arc<Engine>,
    out: Vec<Arc<Connection>>,
    inc: Vec<Arc<Connection>>,
    memory: Vec<u8>,
    mr: u64,
}

impl Crowd {
    fn new(budgets: Budgets) -> Crowd {
        let all = Config { bind: Bind::Any, ..config(budgets) };
        let (target, peers) = (Engine::new(all).unwrap(), Engine::new(config(Budgets::default())).unwrap());
        let memory = vec![7u8; 1 << 16];
        let mr = peers.register(memory.as_ptr() as usize, memory.len()).unwrap();
        let (mut out, mut inc) = (Vec::new(), Vec::new());
        for _ in 0..PEERS {
            out.push(peers.connect("127.0.0.1", "", port(&target)).expect("a peer"));
            inc.push(target.accept().unwrap());
        }
        Crowd { target, peers, out, inc, memory, mr }
    }

    fn local(&self, len: usize) -> LocalSegment {
        LocalSegment { mr: self.mr, addr: self.memory.as_ptr() as usize, len }
    }

    fn all_up(&self) -> bool {
        self.out.iter().chain(&self.inc).all(|c| c.status().is_ok())
    }
}

#[test]
fn connections_have_a_limit_in_all_and_by_address() {
    for (budgets, most, name) in [
        (
            Budgets { connections: Some(30), connections_of_peer: Some(99), ..Budgets::default() },
            30,
            "UCCL_TCPX_MAX_CONNECTIONS ",
        ),
        (Budgets { connections_of_peer: Some(20), ..Budgets::default() }, 20, "UCCL_TCPX_MAX_CONNECTIONS_OF_PEER "),
    ] {
        let (target, peers) = (Engine::new(config(budgets)).unwrap(), Engine::new(config(Budgets::default())).unwrap());
        let (mut up, mut kept, mut refused) = (Vec::new(), Vec::new(), 0);
        for _ in 0..PEERS {
            match peers.connect("127.0.0.1", "", port(&target)) {
                Ok(connection) => {
                    up.push(connection);
                    kept.push(target.accept().unwrap());
                }
                Err(e) => {
                    assert!(e.kind() == ErrorKind::Resource && e.to_string().contains(name), "{e}");
                    refused += 1;
                }
            }
        }
        assert_eq!((up.len(), refused), (most, PEERS - most));
        assert!(up.iter().all(|c| c.status().is_ok()));
        // One that goes makes room for one.
        drop((up.pop(), kept.pop()));
        assert!(until(LIMIT, || peers.connect("127.0.0.1", "", port(&target)).is_ok()));
        // The engine's own connects do not count.
        let back: Vec<_> = (0..40).map(|_| target.connect("127.0.0.1", "", port(&peers)).expect("an own connect")).collect();
        assert_eq!(back.len(), 40);
    }
}

#[test]
fn transfers_of_all_peers_together_have_a_limit_and_what_is_beyond_fails_alone() {
    // Three quarters of all, since the peers have one address.
    const MOST: usize = 1000;
    let mut crowd = Crowd::new(Budgets { transfers: Some(MOST / 3 * 4 + 1), ..Budgets::default() });
    // Messages without a posted receive stay in flight.
    let send = |crowd: &Crowd, peer: usize| crowd.out[peer].send(std::iter::once(crowd.local(100))).unwrap();
    let sent: Vec<(usize, u64)> = (0..20).flat_map(|_| 0..PEERS).map(|peer| (peer, send(&crowd, peer))).collect();
    let state = |crowd: &Crowd, (peer, id): (usize, u64)| crowd.out[peer].poll(id).map(|s| s.complete).map_err(|e| e.kind());
    let refused = |crowd: &Crowd| sent.iter().filter(|&&s| state(crowd, s) == Err(ErrorKind::Resource)).count();
    assert!(until(LIMIT, || refused(&crowd) == sent.len() - MOST), "{} of {} refused", refused(&crowd), sent.len());
    assert!(sent.iter().all(|&s| matches!(state(&crowd, s), Ok(false) | Err(ErrorKind::Resource))));
    assert!(crowd.all_up(), "a refusal ends no connection");
    // Reads and writes are refused meanwhile, and go again once others have ended.
    let there = vec![0u8; 4096];
    let region = crowd.target.register(there.as_ptr() as usize, there.len()).unwrap();
    let item = crowd.target.fifo_item(region, there.as_ptr() as usize, there.len()).unwrap();
    let one = |crowd: &Crowd, direction, len| {
        let id = crowd.out[7].transfer(direction, std::iter::once((crowd.local(len), item))).unwrap();
        crowd.out[7].wait(id, Some(LIMIT)).map(|s| s.complete).map_err(|e| e.kind())
    };
    for direction in [Direction::Write, Direction::Read] {
        assert_eq!(one(&crowd, direction, 4096), Err(ErrorKind::Resource), "{direction:?}");
    }
    assert!(crowd.all_up());
    crowd.inc.truncate(PEERS / 2);
    assert!(until(LIMIT, || one(&crowd, Direction::Write, 4096) == Ok(true)));
    assert_eq!(one(&crowd, Direction::Read, 4096), Ok(true));
    crowd.target.deregister(region).unwrap();
    let _ = crowd.peers.deregister(crowd.mr);
}

#[test]
fn one_address_leaves_something_of_each_budget_to_others() {
    const MOST: usize = 1000;
    let Some(other) = second_address() else {
        println!("SKIPPED: this host has one address");
        return;
    };
    let budgets = Budgets { transfers: Some(MOST), peer_bytes: Some(8 << 20), notif_bytes: Some(4 << 20), ..Budgets::default() };
    let crowd = Crowd::new(budgets);
    let there = vec![0u8; 1 << 16];
    let region = crowd.target.register(there.as_ptr() as usize, there.len()).unwrap();
    let item = crowd.target.fifo_item(region, there.as_ptr() as usize, there.len()).unwrap();
    // Messages without a receive and notifications that are never taken, from a hundred connections of one address.
    let sent: Vec<(usize, u64)> = (0..20)
        .flat_map(|_| 0..PEERS / 2)
        .map(|peer| (peer, crowd.out[peer].send(std::iter::once(crowd.local(100))).unwrap()))
        .collect();
    let refused = || sent.iter().filter(|&&(peer, id)| crowd.out[peer].poll(id).is_err()).count();
    assert!(until(LIMIT, || refused() >= sent.len() - MOST), "{} of {} refused", refused(), sent.len());
    for connection in &crowd.out[PEERS / 2..] {
        (0..20).for_each(|_| drop(connection.notify(b"name", &[7; 10_000])));
    }
    let failed = || crowd.inc.iter().filter(|c| c.status().is_err_and(|e| e.kind() == ErrorKind::Resource)).count();
    assert!(until(LIMIT, || failed() > 0), "no peer is refused");
    // A peer at another address is served.
    let late = crowd.peers.connect(&other, "", port(&crowd.target)).expect("a connect from another address");
    let late_in = crowd.target.accept().unwrap();
    for direction in [Direction::Write, Direction::Read] {
        let id = late.transfer(direction, std::iter::once((crowd.local(1 << 16), item))).unwrap();
        assert!(late.wait(id, Some(LIMIT)).map(|s| s.complete).unwrap(), "{direction:?}");
    }
    late.notify(b"late", &[7; 10_000]).unwrap();
    let took = until(LIMIT, || crowd.target.next_notification().is_some_and(|n| n.name == b"late"));
    assert!(took && late.status().is_ok() && late_in.status().is_ok(), "{:?}", late_in.status());
    crowd.target.deregister(region).unwrap();
}

#[test]
fn lists_of_all_peers_together_have_a_limit_in_bytes() {
    // 100 lists of 20,000 segments would take many times as much.
    let crowd = Crowd::new(Budgets { peer_bytes: Some(8 << 20), peer_bytes_of_one: Some(4 << 20), ..Budgets::default() });
    let there = vec![0u8; 1 << 16];
    let region = crowd.target.register(there.as_ptr() as usize, there.len()).unwrap();
    let item = crowd.target.fifo_item(region, there.as_ptr() as usize, there.len()).unwrap();
    let list = |n: usize| (0..n).map(|_| (crowd.local(3), item)).collect::<Vec<_>>().into_iter();
    let started: Vec<_> = crowd.out.iter().map(|c| c.transfer(Direction::Write, list(20_000))).collect();
    let (mut good, mut refused) = (0, 0);
    for (connection, id) in crowd.out.iter().zip(started) {
        match id.and_then(|id| connection.wait(id, Some(LIMIT))) {
            Ok(state) => good += usize::from(state.complete),
            Err(e) if e.kind() == ErrorKind::Resource => refused += 1,
            // A frame for which there was no room.
            Err(e) => assert!(e.to_string().contains("memory"), "{e}"),
        }
    }
    println!("{good} of {PEERS} lists were taken, {refused} refused");
    assert!(good > 0, "some fit");
    let fits = crowd.peers.connect("127.0.0.1", "", port(&crowd.target)).unwrap();
    let _inc = crowd.target.accept().unwrap();
    let id = fits.transfer(Direction::Write, list(1000)).unwrap();
    assert!(fits.wait(id, Some(LIMIT)).unwrap().complete, "the budget is released");
    // More than one connection may have is refused whatever the others do.
    let id = fits.transfer(Direction::Write, list(200_000)).and_then(|id| fits.wait(id, Some(LIMIT)));
    assert!(id.is_err(), "{id:?}");
    crowd.target.deregister(region).unwrap();
}

#[test]
fn notifications_of_all_peers_together_have_a_limit() {
    const MOST: usize = 4 << 20;
    let crowd = Crowd::new(Budgets { notif_bytes: Some(MOST), ..Budgets::default() });
    let message = vec![7u8; 10_000];
    for _ in 0..20 {
        for connection in &crowd.out {
            let _ = connection.notify(b"name", &message);
        }
    }
    let failed = || crowd.inc.iter().filter(|c| c.status().is_err_and(|e| e.kind() == ErrorKind::Resource)).count();
    assert!(until(LIMIT, || failed() > 0), "no peer is refused");
    // Those that were not stopped yet bring no more than fits either.
    let mut most = 0;
    until(Duration::from_secs(1), || {
        most = most.max(crowd.target.stats().unwrap().notifications_waiting as usize * message.len());
        false
    });
    assert!((MOST / 2..=MOST).contains(&most), "{most} bytes waited");
}

#[test]
fn a_hundred_peers_cause_no_more_lines_than_their_budget() {
    const LINES: usize = 10;
    let crowd = Crowd::new(Budgets { log_lines: Some(LINES), ..Budgets::default() });
    let there = vec![0u8; 4096];
    let region = crowd.target.register(there.as_ptr() as usize, there.len()).unwrap();
    let mut item = crowd.target.fifo_item(region, there.as_ptr() as usize, there.len()).unwrap();
    item.padding[0] ^= 1;
    let (before, start) = (REFUSALS.load(Ordering::Relaxed), Instant::now());
    for _ in 0..20 {
        for connection in &crowd.out {
            let id = connection.transfer(Direction::Read, std::iter::once((crowd.local(64), item))).unwrap();
            assert_eq!(connection.wait(id, Some(LIMIT)).unwrap_err().kind(), ErrorKind::RemoteAccess);
        }
    }
    let (lines, seconds) = (REFUSALS.load(Ordering::Relaxed) - before, start.elapsed().as_secs() as usize + 1);
    println!("{lines} lines about 2,000 refusals of 100 peers in {seconds} s");
    // Other tests run beside this one and write lines of refusals too, a few.
    assert!(lines > 0 && lines <= LINES * (seconds + 1) + 60, "{lines} lines in {seconds} s");
    assert!(WARNINGS.load(Ordering::Relaxed) > 0 && crowd.all_up());
    crowd.target.deregister(region).unwrap();
}

#[test]
fn budgets_are_settings_and_can_be_asked_for() {
    // Before the engine installs its own logger.
    let _ = config(Budgets::default());
    let settings = [("UCCL_TCPX_PLUGIN", "soft"), ("UCCL_TCPX_MAX_CONNECTIONS", "40"), ("UCCL_TCPX_PEER_BYTES", "1M")];
    let engine = Engine::new(Config::from_env_with(&settings).unwrap()).unwrap();
    let all = engine.budgets();
    let of = |name: &str| all.iter().find(|(n, ..)| *n == name).map(|(_, value, _)| *value).expect("a budget");
    assert_eq!((of("UCCL_TCPX_MAX_CONNECTIONS"), of("UCCL_TCPX_MAX_CONNECTIONS_OF_PEER")), (40, 30));
    assert_eq!((of("UCCL_TCPX_PEER_BYTES"), of("UCCL_TCPX_PEER_BYTES_OF_ONE")), (1 << 20, 1 << 19));
    assert!(of("UCCL_TCPX_MAX_PEER_TRANSFERS") >= 4096 && of("UCCL_TCPX_PEER_LOG_LINES") == 50);
}
