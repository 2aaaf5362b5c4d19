//! What attacks on an engine cost a legitimate peer, between real engines over real sockets: how long its connect takes meanwhile, and
//! how its small operations compare with those before the attack. Times are compared inside one run; a noisy machine gets several tries.

mod local;

use local::port;
use std::io::{BufRead, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Direction, Engine, LocalSegment};

/// The most that an attack may slow a legitimate peer's operation down.
const RATIO: f64 = 2.0;
/// The most that its connect may take meanwhile.
const CONNECT: Duration = Duration::from_secs(1);
const TRIES: usize = 6;
const OPERATION: usize = 4096;

/// The tests measure: one at a time.
static ONE: Mutex<()> = Mutex::new(());

fn config() -> Config {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: a writable rlimit, and a readable one.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
            let own = std::env::var(CHILD).ok().and_then(|part| part.strip_prefix("limited ")?.parse().ok());
            limit.rlim_cur = limit.rlim_max.min(own.unwrap_or(16_384));
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        }
    });
    Config { num_channels: Some(2), ..local::config() }
}

/// A connection with memory at both ends.
struct Legitimate<'a> {
    from: &'a Engine,
    to: &'a Engine,
    connection: std::sync::Arc<Connection>,
    memory: [Vec<u8>; 2],
    regions: [u64; 2],
}

impl<'a> Legitimate<'a> {
    fn connect(from: &'a Engine, to: &'a Engine) -> Legitimate<'a> {
        let connection = from.connect("127.0.0.1", "", port(to)).expect("a legitimate peer");
        let memory = [vec![7u8; OPERATION], vec![0u8; OPERATION]];
        let regions = [(from, &memory[0]), (to, &memory[1])].map(|(e, m)| e.register(m.as_ptr() as usize, OPERATION).unwrap());
        Legitimate { from, to, connection, memory, regions }
    }

    /// The median of some operations.
    fn operation(&self) -> Duration {
        let [here, there] = [0, 1].map(|i| self.memory[i].as_ptr() as usize);
        let item = self.to.fifo_item(self.regions[1], there, OPERATION).unwrap();
        let local = LocalSegment { mr: self.regions[0], addr: here, len: OPERATION };
        let mut times: Vec<Duration> = (0..400)
            .map(|_| {
                let start = Instant::now();
                let id = self.connection.transfer(Direction::Write, std::iter::once((local, item))).unwrap();
                assert!(self.connection.wait(id, None).unwrap().complete);
                start.elapsed()
            })
            .collect();
        times.sort();
        times[times.len() / 2]
    }
}

impl Drop for Legitimate<'_> {
    fn drop(&mut self) {
        let _ = (self.from.deregister(self.regions[0]), self.to.deregister(self.regions[1]));
    }
}

/// Sets the flag at its end.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `attack` (repeated until it is stopped; it counts its attempts) beside a legitimate peer.
fn endured(name: &str, target: &Engine, attack: &(dyn Fn(&AtomicBool, &AtomicUsize) + Sync)) {
    let engine = Engine::new(config()).unwrap();
    let peer = Legitimate::connect(&engine, target);
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
        let before = peer.operation();
        let (during, connect) = std::thread::scope(|s| {
            s.spawn(|| attack(&stop, &done));
            // However this ends, the attack ends with it.
            let _stop = Stop(&stop);
            let under_way = Instant::now();
            while done.load(Ordering::Relaxed) < 20 && under_way.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let during = peer.operation();
            let start = Instant::now();
            let fresh = engine.connect("127.0.0.1", "", port(target));
            let connect = start.elapsed();
            fresh.expect("a legitimate peer under attack");
            (during, connect)
        });
        let (ratio, times) = (during.as_secs_f64() / before.as_secs_f64(), done.load(Ordering::Relaxed));
        println!("{name}: {times} times, operation {before:?} before, {during:?} meanwhile ({ratio:.2} x), connect {connect:?}");
        assert!(times >= 20, "{name}: there was no attack");
        if ratio <= RATIO && connect <= CONNECT {
            return;
        }
        seen.push((ratio, connect));
    }
    panic!("{name}: at most {RATIO} x and {CONNECT:?} are allowed, {seen:?} in {TRIES} tries");
}

/// An engine that takes all connections, as an application would, and notifications where some will come: asking for them makes the
/// application one that drives the engine now and then, with other latencies.
fn with_target(notified: bool, test: impl FnOnce(&Engine)) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let target = Engine::new(config()).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut kept = std::collections::VecDeque::new();
            while let Ok(connection) = target.accept() {
                kept.push_back(connection);
                // The first one is the legitimate peer's.
                if kept.len() > 64 {
                    kept.remove(1);
                }
            }
        });
        s.spawn(|| {
            while notified && !over.load(Ordering::Relaxed) {
                while target.next_notification().is_some() {}
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        // A test that fails ends its threads too.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&target)));
        over.store(true, Ordering::Relaxed);
        target.stop_accept();
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

/// The first message of a set-up, as an engine sends it.
fn opening() -> Vec<u8> {
    let trap = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = trap.local_addr().unwrap().port();
    let connects = std::thread::spawn(move || {
        let short_deadline = Config { connect_timeout: Duration::from_millis(500), ..config() };
        assert!(Engine::new(short_deadline).unwrap().connect("127.0.0.1", "", port).is_err());
    });
    let mut sock = trap.accept().unwrap().0;
    let mut bytes = vec![0; 136];
    sock.read_exact(&mut bytes).unwrap();
    drop(sock);
    connects.join().unwrap();
    bytes
}

/// An unauthenticated connection; a host that has run out of ports gives none for a moment.
fn raw_connection(target: &Engine) -> Option<TcpStream> {
    let sock = TcpStream::connect(("127.0.0.1", port(target))).ok();
    if sock.is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    sock
}

/// Closing it sends a reset, and leaves no port behind.
fn abrupt(sock: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: a linger struct of that size.
    let set = unsafe {
        let len = size_of::<libc::linger>() as libc::socklen_t;
        libc::setsockopt(sock.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len)
    };
    assert_eq!(set, 0);
}

#[test]
fn a_thousand_held_hellos() {
    let opening = opening();
    with_target(false, |target| {
        endured("1,000 held hellos", target, &|stop, done| {
            let hold = |_| {
                let mut sock = raw_connection(target)?;
                abrupt(&sock);
                // It is never complete.
                let _ = sock.write_all(&opening[..120]);
                Some(sock)
            };
            let held: Vec<TcpStream> = (0..1000).filter_map(hold).collect();
            done.store(held.len(), Ordering::Relaxed);
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    });
}

#[test]
fn a_flood_of_resets() {
    let opening = opening();
    with_target(false, |target| {
        endured("resets", target, &|stop, done| {
            while !stop.load(Ordering::Relaxed) {
                let Some(mut sock) = raw_connection(target) else { continue };
                abrupt(&sock);
                let n = done.fetch_add(1, Ordering::Relaxed);
                // With nothing said, a part, and a whole opening.
                let _ = sock.write_all(&opening[..[0, 60, 136][n % 3]]);
            }
        });
    });
}

#[test]
fn slow_loris() {
    let opening = opening();
    with_target(false, |target| {
        endured("slow loris", target, &|stop, done| {
            let mut all: Vec<(TcpStream, usize)> = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                all.retain_mut(|(sock, said)| {
                    *said += 1;
                    opening.get(*said - 1..*said).is_some_and(|byte| sock.write_all(byte).is_ok())
                });
                while all.len() < 200 {
                    let Some(sock) = raw_connection(target) else { break };
                    abrupt(&sock);
                    all.push((sock, 0));
                    done.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
    });
}

#[test]
fn a_proved_peer_that_floods_notifications() {
    with_target(true, |target| {
        let flooder = Engine::new(config()).unwrap();
        endured("notifications of a proved peer", target, &|stop, done| {
            let connection = flooder.connect("127.0.0.1", "", port(target)).expect("a peer");
            while !stop.load(Ordering::Relaxed) && connection.notify(b"name", &[7; 200]).is_ok() {
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    });
}

#[test]
fn a_proved_peer_that_connects_over_and_over() {
    with_target(false, |target| {
        let flooder = Engine::new(config()).unwrap();
        endured("connects of a proved peer", target, &|stop, done| {
            while !stop.load(Ordering::Relaxed) {
                drop(flooder.connect("127.0.0.1", "", port(target)));
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    });
}

// ---- in every phase, one byte at a time ----

/// Passes the first bytes of each side on at once, then those of the connecting side one by one.
fn trickle(mut from: TcpStream, mut to: TcpStream, fast: usize, stop: &AtomicBool) {
    let mut buffer = [0; 1024];
    let mut passed = 0;
    let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
    while !stop.load(Ordering::Relaxed) {
        let most = if passed < fast { (fast - passed).min(buffer.len()) } else { 1 };
        match from.read(&mut buffer[..most]) {
            Ok(0) => break,
            Ok(n) if to.write_all(&buffer[..n]).is_ok() => passed += n,
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => continue,
            _ => break,
        }
        if passed >= fast {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let _ = (from.shutdown(std::net::Shutdown::Both), to.shutdown(std::net::Shutdown::Both));
}

/// Engines whose control streams get through byte by byte from there on: proved peers, for all that the target can see.
fn loris_after(fast: usize) {
    const PEERS: usize = 24;
    with_target(false, |target| {
        endured(&format!("byte by byte after {fast}"), target, &|stop, done| {
            let relay = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let (at, there) = (relay.local_addr().unwrap().port(), port(target));
            let short_deadline = Config { connect_timeout: Duration::from_secs(3), num_channels: Some(1), ..config() };
            let slow = Engine::new(short_deadline).unwrap();
            std::thread::scope(|s| {
                for _ in 0..PEERS {
                    s.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            let Ok(connection) = slow.connect("127.0.0.1", "", at) else { continue };
                            while !stop.load(Ordering::Relaxed) && connection.notify(b"slow", &[7; 200]).is_ok() {
                                std::thread::sleep(Duration::from_millis(50));
                            }
                        }
                    });
                }
                relay.set_nonblocking(true).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let Ok((near, _)) = relay.accept() else {
                        std::thread::sleep(Duration::from_millis(2));
                        continue;
                    };
                    done.fetch_add(1, Ordering::Relaxed);
                    near.set_nonblocking(false).unwrap();
                    let Ok(far) = TcpStream::connect(("127.0.0.1", there)) else { continue };
                    let (back, forth) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                    s.spawn(move || trickle(back, forth, usize::MAX, stop));
                    s.spawn(move || trickle(near, far, fast, stop));
                }
            });
        });
    });
}

#[test]
fn slow_loris_in_the_opening() {
    loris_after(5);
}

#[test]
fn slow_loris_in_the_proof() {
    loris_after(140);
}

#[test]
fn slow_loris_in_the_set_up() {
    loris_after(420);
}

#[test]
fn slow_loris_in_the_frames() {
    loris_after(1500);
}

// ---- where descriptors are short ----

/// Names the part that a child process plays, and is not set in the test's own process.
const CHILD: &str = "UCCL_TEST_CHILD";

/// A process that keeps a number of silent connections to a port while it lives. Run as a test it does nothing.
#[test]
fn silent_process() {
    let Ok(part) = std::env::var(CHILD) else { return };
    let Some((port, count)) = part.strip_prefix("silent ").and_then(|p| p.split_once(' ')) else { return };
    let (port, count): (u16, usize) = (port.parse().unwrap(), count.parse().unwrap());
    let _ = config();
    let mut held: Vec<TcpStream> = Vec::new();
    let mut ended = [0; 1];
    loop {
        // Closed ones connect again.
        held.retain(|sock| {
            let _ = sock.set_nonblocking(true);
            matches!((&mut &*sock).read(&mut ended), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
        });
        for _ in held.len()..count {
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
            let Ok(sock) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) else { break };
            abrupt(&sock);
            held.push(sock);
        }
        println!("= {}", held.len());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that opens so many sockets a second to a port, says the same bytes on each and keeps it until the other end closes it. As a
/// test of its own it does nothing.
#[test]
fn talker_process() {
    const THREADS: u32 = 8;
    let Ok(part) = std::env::var(CHILD) else { return };
    let Some(part) = part.strip_prefix("talkers ") else { return };
    let [port, rate, bytes] = part.split(' ').collect::<Vec<_>>()[..] else { panic!("{part}") };
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()));
    let pause = Duration::from_secs(1) * THREADS / rate.parse().unwrap();
    let bytes: Vec<u8> = (0..bytes.len()).step_by(2).map(|at| u8::from_str_radix(&bytes[at..at + 2], 16).unwrap()).collect();
    let _ = config();
    let done = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..THREADS {
            s.spawn(|| {
                let (mut held, mut next) = (std::collections::VecDeque::<TcpStream>::new(), Instant::now());
                let ended = |sock: &TcpStream| !matches!((&mut &*sock).read(&mut [0; 512]), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock);
                loop {
                    if let Ok(mut sock) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
                        abrupt(&sock);
                        let _ = sock.write_all(&bytes).and_then(|()| sock.set_nonblocking(true));
                        held.push_back(sock);
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    while held.front().is_some_and(ended) || held.len() > 1000 {
                        held.pop_front();
                    }
                    next += pause;
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            });
        }
        loop {
            println!("= {}", done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

/// Runs the body in a process with a limit of so many descriptors, which attackers of other processes do not share.
fn with_descriptors(name: &str, limit: u64, body: impl FnOnce()) {
    let own = |part: &str| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, part);
        command
    };
    match std::env::var(CHILD) {
        Err(_) => assert!(own(&format!("limited {limit}")).status().unwrap().success(), "{name} failed in its own process"),
        Ok(part) if part == format!("limited {limit}") => body(),
        Ok(_) => {}
    }
}

fn silent_connections(name: &str, limit: u64, count: usize) {
    with_descriptors(name, limit, || {
        with_target(false, |target| {
            endured(&format!("{count} silent connections at {limit} descriptors"), target, &|stop, done| {
                let mut holder = Attacker::start("silent_process", &format!("silent {} {count}", port(target)));
                while !stop.load(Ordering::Relaxed) {
                    if let Some(held) = holder.count() {
                        done.store(held, Ordering::Relaxed);
                    }
                }
            });
        });
    });
}

/// A child process that plays a part against a target. It ends with this value.
struct Attacker {
    child: std::process::Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl Attacker {
    fn start(test: &str, part: &str) -> Attacker {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, part)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        Attacker { child, lines }
    }

    /// What it has counted, if its next line says so.
    fn count(&mut self) -> Option<usize> {
        self.lines.next()?.ok()?.split_once("= ")?.1.trim().parse().ok()
    }

    /// Waits until it has counted so many.
    fn reaches(&mut self, count: usize) -> bool {
        let under_way = Instant::now();
        while under_way.elapsed() < Duration::from_secs(30) {
            if self.count().is_some_and(|done| done >= count) {
                return true;
            }
        }
        false
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

/// For how long the two threads that take a connect from one step to the next, this one and the target's `uccl-setup`, have been ready to
/// run and had no core since they began: what the other programs of the machine cost a connect, and nothing else.
fn without_core() -> Duration {
    // SAFETY: a plain system call.
    let own = unsafe { libc::gettid() }.to_string();
    let mut waited = Duration::ZERO;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if task.file_name().to_string_lossy() == own || read("comm").trim() == "uccl-setup" {
            // Nanoseconds on a core, nanoseconds of waiting for one, how often.
            let nanoseconds = read("schedstat").split_whitespace().nth(1).and_then(|word| word.parse().ok());
            waited += Duration::from_nanos(nanoseconds.unwrap_or(0));
        }
    }
    waited
}

/// Every connect is quick while so many clients a second connect and each sends this, and beside them others hold silent connections.
fn talking_clients(name: &str, limit: u64, rate: usize, bytes: &[u8], held: usize) {
    const CONNECTS: usize = 16;
    with_descriptors(name, limit, || {
        with_target(false, |target| {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let engine = Engine::new(config()).unwrap();
            let mut holder = (held > 0).then(|| Attacker::start("silent_process", &format!("silent {} {held}", port(target))));
            assert!(holder.iter_mut().all(|holder| holder.reaches(held)), "{name}: {held} connections were not held");
            let mut talkers = Attacker::start("talker_process", &format!("talkers {} {rate} {hex}", port(target)));
            // By then they would fill the kernel's queue.
            assert!(talkers.reaches(2 * rate), "{name}: there was no attack");
            let connect = |_| {
                let (start, before) = (Instant::now(), without_core());
                let connected = engine.connect("127.0.0.1", "", port(target)).map(drop);
                (start.elapsed(), without_core() - before, connected)
            };
            let connects: Vec<_> = (0..CONNECTS).map(connect).collect();
            println!("{name}: {connects:?}");
            let good = |(took, waited, connected): &(Duration, Duration, uccl_p2p::status::Result<()>)| {
                connected.is_ok() && took.saturating_sub(*waited) <= CONNECT
            };
            assert!(
                connects.iter().all(good),
                "{name}: each connect may take {CONNECT:?} and its waits for a core: {connects:?}"
            );
        });
    });
}

#[test]
fn eight_hundred_clients_a_second_with_a_byte_each_at_1024_descriptors() {
    talking_clients("eight_hundred_clients_a_second_with_a_byte_each_at_1024_descriptors", 1024, 800, b"U", 1000);
}

#[test]
fn eight_hundred_clients_a_second_with_a_byte_each_at_256_descriptors() {
    talking_clients("eight_hundred_clients_a_second_with_a_byte_each_at_256_descriptors", 256, 800, b"U", 1000);
}

#[test]
fn eight_hundred_clients_a_second_with_a_whole_message_each() {
    talking_clients("eight_hundred_clients_a_second_with_a_whole_message_each", 1024, 800, &opening(), 0);
}

#[test]
fn three_hundred_silent_connections_at_256_descriptors() {
    silent_connections("three_hundred_silent_connections_at_256_descriptors", 256, 300);
}

#[test]
fn eleven_hundred_silent_connections_at_1024_descriptors() {
    silent_connections("eleven_hundred_silent_connections_at_1024_descriptors", 1024, 1100);
}

#[test]
fn a_proved_peer_whose_requests_are_refused() {
    with_target(false, |target| {
        let flooder = Engine::new(config()).unwrap();
        let memory = vec![0u8; OPERATION];
        let regions = [&flooder, target].map(|e| e.register(memory.as_ptr() as usize, OPERATION).unwrap());
        let mut item = target.fifo_item(regions[1], memory.as_ptr() as usize, OPERATION).unwrap();
        item.padding[3] ^= 1;
        let local = LocalSegment { mr: regions[0], addr: memory.as_ptr() as usize, len: OPERATION };
        endured("refused requests of a proved peer", target, &|stop, done| {
            let connection = flooder.connect("127.0.0.1", "", port(target)).expect("a peer");
            while !stop.load(Ordering::Relaxed) {
                let id = connection.transfer(Direction::Read, std::iter::once((local, item))).unwrap();
                assert!(connection.wait(id, None).is_err());
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        target.deregister(regions[1]).unwrap();
    });
}
