//! The engine through its Rust API, inside one process over loopback: unauthenticated connections, limits, closing in any order.

mod local;
mod memory;

use local::{pair, port};
use memory::Place;
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, List, LocalSegment};
use uccl_p2p::status::ErrorKind;

fn environment() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let nic = std::env::var(local::NIC).unwrap_or_else(|_| "lo".to_owned());
        for (name, value) in
            [("UCCL_TCPX_SOFT_STRICT", "1"), ("NCCL_SOCKET_IFNAME", &nic), ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", &nic)]
        {
            // SAFETY: before any engine exists; tests wait for this Once.
            unsafe { std::env::set_var(name, value) };
        }
    });
}

fn config() -> Config {
    environment();
    Config { plugin: PluginChoice::Soft, ..Config::from_env().expect("configuration") }
}

/// A buffer with its registration and FIFO item; where nothing else is said, on the first GPU. Its registration ends before its memory.
struct Buffer {
    engine: Weak<Engine>,
    memory: memory::Memory,
    mr: u64,
    item: FifoItem,
}

impl Buffer {
    fn new(engine: &Arc<Engine>, len: usize, fill: impl Fn(usize) -> u8) -> Buffer {
        Buffer::of(engine, (0..len).map(fill).collect())
    }
    fn of(engine: &Arc<Engine>, bytes: Vec<u8>) -> Buffer {
        Buffer::at(engine, Place::FirstGpu, bytes)
    }
    fn at(engine: &Arc<Engine>, place: Place, bytes: Vec<u8>) -> Buffer {
        let len = bytes.len();
        let memory = memory::Memory::new(place, bytes);
        let mr = engine.register(memory.addr(), len).expect("register");
        let item = engine.fifo_item(mr, memory.addr(), len).expect("item");
        Buffer { engine: Arc::downgrade(engine), memory, mr, item }
    }
    fn len(&self) -> usize {
        self.memory.len()
    }
    fn bytes(&self) -> std::borrow::Cow<'_, [u8]> {
        self.memory.bytes()
    }
    fn local(&self, at: usize, len: usize) -> LocalSegment {
        LocalSegment { mr: self.mr, addr: self.memory.addr() + at, len }
    }
    fn remote(&self, at: usize) -> FifoItem {
        FifoItem { addr: self.item.addr + at as u64, ..self.item }
    }
    fn whole(&self) -> LocalSegment {
        self.local(0, self.len())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Some tests have ended the registration before.
        let _ = self.engine.upgrade().map(|engine| engine.deregister(self.mr));
    }
}

fn write_all(conn: &Connection, from: &Buffer, to: &Buffer) -> Result<(), ErrorKind> {
    let id = conn.transfer(Direction::Write, std::iter::once((from.whole(), to.item))).map_err(|e| e.kind())?;
    conn.wait(id, None).map(|s| assert!(s.complete)).map_err(|e| e.kind())
}

#[test]
fn unauthenticated_connections_neither_crash_nor_delay() {
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let address = ("127.0.0.1", port(&b));
    let silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut garbage = TcpStream::connect(address).unwrap();
    let mut seed = 12345u64;
    let noise: Vec<u8> = (0..1 << 20)
        .map(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 56) as u8
        })
        .collect();
    // The engine hangs up early; the rest of the noise then has nowhere to go.
    let _ = garbage.write_all(&noise);
    // Half a hello, and one whose tail is garbage.
    let mut half = TcpStream::connect(address).unwrap();
    half.write_all(b"UCCLTCPX\x01\x00").unwrap();
    let mut tail = TcpStream::connect(address).unwrap();
    let _ = tail.write_all(b"UCCLTCPX").and_then(|()| tail.write_all(&noise[..4096]));
    let started = Instant::now();
    let (out, _inc) = pair(&a, &b);
    // Well under the handshake timeout that the silent ones sit out.
    assert!(started.elapsed() < Duration::from_secs(3), "a real peer waited {:?}", started.elapsed());
    let (from, to) = (Buffer::new(&a, 1 << 20, |i| i as u8), Buffer::new(&b, 1 << 20, |_| 0));
    write_all(&out, &from, &to).unwrap();
    assert!(from.bytes() == to.bytes());
    drop(silent);
}

#[test]
fn a_closed_connection_leaves_the_others_alone() {
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (first, inc) = pair(&a, &b);
    let (second, _keep) = pair(&a, &b);
    inc.close();
    let (from, to) = (Buffer::new(&a, 100_000, |i| i as u8), Buffer::new(&b, 100_000, |_| 0));
    let lost = write_all(&first, &from, &to);
    assert_eq!(lost, Err(ErrorKind::RemoteDisconnect));
    write_all(&second, &from, &to).unwrap();
    assert!(from.bytes() == to.bytes());
}

#[test]
fn fifo_items_of_another_engine_are_refused() {
    let (a, b, c) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _inc) = pair(&a, &b);
    let from = Buffer::new(&a, 100, |_| 1);
    let elsewhere = Buffer::new(&c, 100, |_| 2);
    assert_eq!(write_all(&out, &from, &elsewhere), Err(ErrorKind::RemoteAccess));
    assert!(elsewhere.bytes().iter().all(|&b| b == 2));
}

#[test]
fn a_rate_limits_what_an_engine_sends_to_a_peer() {
    const RATE: u64 = 40_000_000;
    if std::env::var_os("UCCL_TCPX_PLUGIN_PATH").is_some_and(|path| path.to_string_lossy().contains("foreign")) {
        println!("SKIPPED: the limit is for the software plugin");
        return;
    }
    let limited = |peer_rate| Config { peer_rate, disable_ipc: true, num_channels: Some(2), ..config() };
    // Bytes a second of the same bytes: written by the limited engine, read from it, and written to it.
    let rates = |rate| {
        let (a, b) = (Engine::new(limited(Some(rate))).unwrap(), Engine::new(limited(None)).unwrap());
        let (out, inc) = pair(&a, &b);
        let (here, there) = (Buffer::new(&a, 20 << 20, |i| i as u8), Buffer::new(&b, 20 << 20, |_| 0));
        let timed = |connection: &Connection, direction, from: &Buffer, to: &Buffer| {
            let started = Instant::now();
            let id = connection.transfer(direction, std::iter::once((from.whole(), to.item))).unwrap();
            assert!(connection.wait(id, None).unwrap().complete);
            (from.len() as f64 / started.elapsed().as_secs_f64(), here.bytes() == there.bytes())
        };
        let written = timed(&out, Direction::Write, &here, &there);
        let read = timed(&inc, Direction::Read, &there, &here);
        let back = timed(&inc, Direction::Write, &there, &here);
        assert!(written.1 && read.1 && back.1);
        [written.0, read.0, back.0]
    };
    // The limit is the reason: what it does not limit is faster, and so is a higher limit. A busy machine may be slower than both, for a time.
    let mut seen = Vec::new();
    let faster = (0..3).any(|_| {
        let (slow, fast) = (rates(RATE), rates(4 * RATE));
        assert!(slow[..2].iter().all(|&rate| rate < 1.25 * RATE as f64), "{slow:?} bytes a second, limited to {RATE}");
        seen.push((slow, fast));
        slow[2] > 2.0 * slow[0] && fast[0] > 2.0 * slow[0] && fast[1] > 2.0 * slow[1]
    });
    assert!(faster, "{seen:?} bytes a second");
}

#[test]
fn a_transfer_may_mix_regions_and_sizes() {
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _inc) = pair(&a, &b);
    let sources: Vec<Buffer> = (0..5).map(|k| Buffer::new(&a, 50_000 * (k + 1), move |i| (i * (k + 3)) as u8)).collect();
    let targets: Vec<Buffer> = (0..5).map(|k| Buffer::new(&b, 50_000 * (k + 1), |_| 0xEE)).collect();
    // Every third byte range of each region, odd offsets, lengths 0 to 9,999.
    let mut items = Vec::new();
    for (s, t) in sources.iter().zip(&targets) {
        let (mut at, mut len) = (1, 0);
        while at + len < s.len() {
            items.push((s.local(at, len), t.remote(at)));
            at += len + 17;
            len = (len * 7 + 13) % 10_000;
        }
    }
    let expected: Vec<Vec<u8>> = sources
        .iter()
        .map(|s| {
            let (mut e, bytes) = (vec![0xEE; s.len()], s.bytes());
            for (l, _) in items.iter().filter(|(l, _)| l.mr == s.mr) {
                let at = l.addr - s.local(0, 0).addr;
                e[at..at + l.len].copy_from_slice(&bytes[at..at + l.len]);
            }
            e
        })
        .collect();
    let id = out.transfer(Direction::Write, items.clone().into_iter()).unwrap();
    let state = out.wait(id, None).unwrap();
    assert_eq!((state.bytes_done, state.bytes_total), (state.bytes_total, items.iter().map(|(l, _)| l.len as u64).sum()));
    for (t, e) in targets.iter().zip(&expected) {
        assert!(*t.bytes() == **e);
    }
    // And back with reads into fresh memory.
    let back: Vec<Buffer> = sources.iter().map(|s| Buffer::new(&a, s.len(), |_| 0xEE)).collect();
    let reads = items.iter().map(|(l, r)| {
        let k = sources.iter().position(|s| s.mr == l.mr).unwrap();
        (back[k].local(l.addr - sources[k].local(0, 0).addr, l.len), *r)
    });
    let reads: Vec<(LocalSegment, FifoItem)> = reads.collect();
    let id = out.transfer(Direction::Read, reads.clone().into_iter()).unwrap();
    out.wait(id, None).unwrap();
    for (k, e) in expected.iter().enumerate() {
        assert!(*back[k].bytes() == **e);
    }
    // The same as a list, as often as one likes.
    let list = List::new(reads.len(), reads.iter().map(|(l, r)| (*l, r))).unwrap();
    for round in 0..3u8 {
        let fresh: Vec<Buffer> = sources.iter().map(|s| Buffer::new(&a, s.len(), |i| i as u8 ^ round)).collect();
        let writes: Vec<(LocalSegment, FifoItem)> = items
            .iter()
            .map(|(l, r)| {
                let k = sources.iter().position(|s| s.mr == l.mr).unwrap();
                (fresh[k].local(l.addr - sources[k].local(0, 0).addr, l.len), *r)
            })
            .collect();
        let write = List::new(writes.len(), writes.iter().map(|(l, r)| (*l, r))).unwrap();
        for (direction, list) in [(Direction::Write, &write), (Direction::Read, &list)] {
            let id = out.transfer_list(direction, list).unwrap();
            let state = out.wait(id, None).unwrap();
            assert_eq!(state.bytes_total, items.iter().map(|(l, _)| l.len as u64).sum());
        }
        for (s, (back, fresh)) in sources.iter().zip(back.iter().zip(&fresh)) {
            let (back, fresh, first) = (back.bytes(), fresh.bytes(), s.local(0, 0).addr);
            let moved = items.iter().filter(|(l, _)| l.mr == s.mr).map(|(l, _)| l.addr - first..l.addr - first + l.len);
            moved.for_each(|range| assert!(back[range.clone()] == fresh[range]));
        }
    }
    // A deregistered region is detected when the list is started, whether it moves bytes or not.
    let gone = sources[0].local(0, 0);
    a.deregister(sources[0].mr).unwrap();
    for len in [0, 16] {
        let list = List::new(1, std::iter::once((LocalSegment { len, ..gone }, &targets[0].item))).unwrap();
        assert_eq!(out.transfer_list(Direction::Write, &list).unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
fn five_gibibytes_in_one_transfer() {
    const LEN: usize = 5 << 30;
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _inc) = pair(&a, &b);
    // A few significant offsets, on both sides of every 1 GiB and 4 GiB boundary; the rest is compared too.
    let mut bytes = vec![0u8; LEN];
    let marks: Vec<usize> = (0..5).flat_map(|g| [(g << 30) + 7, ((g + 1) << 30) - 1]).collect();
    for (i, &m) in marks.iter().enumerate() {
        bytes[m] = i as u8 + 1;
    }
    let (from, to) = (Buffer::of(&a, bytes), Buffer::of(&b, vec![0u8; LEN]));
    assert_eq!(to.item.size, u32::MAX);
    let id = out.transfer(Direction::Write, std::iter::once((from.whole(), to.item))).unwrap();
    assert_eq!(out.wait(id, None).unwrap().bytes_total, LEN as u64);
    let got = to.bytes();
    for (i, &m) in marks.iter().enumerate() {
        assert_eq!(got[m], i as u8 + 1, "at {m}");
    }
    assert!(from.bytes() == got);
}

#[test]
fn deregistration_waits_for_the_peers_transfers() {
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _inc) = pair(&a, &b);
    let from = Buffer::new(&a, 64 << 20, |i| (i >> 3) as u8);
    let to = Buffer::new(&b, 64 << 20, |_| 0);
    let id = out.transfer(Direction::Write, std::iter::once((from.whole(), to.item))).unwrap();
    let result = std::thread::scope(|s| {
        let waiting = s.spawn(|| out.wait(id, None));
        b.deregister(to.mr).unwrap();
        // From here on nothing may write to it, whether the transfer completed or not.
        let before = to.bytes().into_owned();
        let result = waiting.join().unwrap();
        assert!(before == *to.bytes());
        result
    });
    match result {
        Ok(state) => assert!(state.complete && from.bytes() == to.bytes()),
        Err(e) => assert_eq!(e.kind(), ErrorKind::RemoteAccess),
    }
    assert_eq!(write_all(&out, &from, &to), Err(ErrorKind::RemoteAccess));
}

#[test]
fn keys_must_match() {
    let key = |name: &str, text: &str| {
        let path = std::env::temp_dir().join(format!("uccl-{name}-{}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        Config { auth_key_file: Some(path), ..config() }
    };
    let (good, bad) = (key("good", "0123456789abcdef0123456789abcdef"), key("bad", "fedcba9876543210fedcba9876543210"));
    let server = Engine::new(good.clone()).unwrap();
    let client = Engine::new(good).unwrap();
    let (out, _inc) = pair(&client, &server);
    out.notify(b"a", b"b").unwrap();
    for config in [bad, config()] {
        let other = Engine::new(config).unwrap();
        assert_eq!(other.connect("127.0.0.1", "", port(&server)).unwrap_err().kind(), ErrorKind::Auth);
    }
    assert!(Engine::new(key("short", "short")).is_err());
}

#[test]
fn sixty_four_connections_to_one_engine() {
    let server = Engine::new(config()).unwrap();
    let clients: Vec<_> = (0..8).map(|_| Engine::new(Config { num_channels: Some(2), ..config() }).unwrap()).collect();
    let to = Buffer::new(&server, 64 << 10, |_| 0);
    let mut connections = Vec::new();
    std::thread::scope(|s| {
        let handles: Vec<_> = clients
            .iter()
            .map(|c| {
                // A connect that fails ends the accepts, so that the test ends and tells the cause.
                let connect = || c.connect("127.0.0.1", "0", port(&server)).inspect_err(|_| server.stop_accept()).unwrap();
                s.spawn(move || (0..8).map(|_| connect()).collect::<Vec<_>>())
            })
            .collect();
        connections.extend((0..64).map_while(|_| server.accept().ok()));
        for (k, handle) in handles.into_iter().enumerate() {
            let client = &clients[k];
            for (i, conn) in handle.join().unwrap().into_iter().enumerate() {
                let from = Buffer::new(client, 1000, |_| (k * 8 + i) as u8 + 1);
                let id = conn
                    .transfer(Direction::Write, std::iter::once((from.local(0, 1000), to.remote((k * 8 + i) * 1000))))
                    .unwrap();
                conn.wait(id, None).unwrap();
                connections.push(conn);
            }
        }
    });
    assert_eq!(connections.len(), 128, "connections of both ends");
    let got = to.bytes();
    for n in 0..64 {
        assert!(got[n * 1000..(n + 1) * 1000].iter().all(|&b| b == n as u8 + 1), "client {n}");
    }
}

#[test]
fn the_tcpx_plugin_is_never_replaced_silently() {
    for (plugin, (dirs, files)) in [PluginChoice::Tcpx, PluginChoice::Tcpxo].into_iter().zip(uccl_p2p::net::plugin::PLACES) {
        if dirs.iter().any(|d| files.iter().any(|f| std::path::Path::new(d).join(f).exists())) {
            println!("SKIPPED: {plugin:?} is installed here");
            return;
        }
        let error = Engine::new(Config { plugin, plugin_path: None, ..config() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PluginLoad);
        for place in dirs.iter().chain(files) {
            assert!(error.to_string().contains(place), "{error}");
        }
    }
    let missing = Config { plugin_path: Some("/nonexistent/libnccl-net.so".into()), ..config() };
    assert_eq!(Engine::new(missing).unwrap_err().kind(), ErrorKind::PluginLoad);
}

#[test]
fn host_and_test_memory_mix_in_one_vector() {
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, inc) = pair(&a, &b);
    for len in [1000usize, 3 << 20] {
        let plain = Buffer::at(&a, Place::Host, (0..len).map(|i| (i * 7) as u8).collect());
        let landed = Buffer::at(&b, Place::Host, vec![0; len]);
        let (test, target) = (Buffer::new(&a, len, |i| (i * 5) as u8), Buffer::new(&b, len, |_| 0));
        // Crosswise: host memory into test memory and back, in one transfer.
        let items = [(plain.whole(), target.item), (test.whole(), landed.item)];
        let id = out.transfer(Direction::Write, items.into_iter()).unwrap();
        out.wait(id, None).unwrap();
        assert!(target.bytes() == plain.bytes() && landed.bytes() == test.bytes());
        // Straight, as reads.
        let back = Buffer::new(&a, len, |_| 0);
        let id = out.transfer(Direction::Read, std::iter::once((back.whole(), target.item))).unwrap();
        out.wait(id, None).unwrap();
        assert!(back.bytes() == plain.bytes());
        // As messages.
        let receive = b.register(target.local(0, len).addr, len).unwrap();
        let got = inc.recv(LocalSegment { mr: receive, ..target.whole() }).unwrap();
        let sent = out.send([test.local(0, len / 2), plain.local(0, len - len / 2)].into_iter()).unwrap();
        out.wait(sent, None).unwrap();
        assert_eq!(inc.wait(got, None).unwrap().bytes_total, len as u64);
        let want: Vec<u8> = test.bytes()[..len / 2].iter().chain(&plain.bytes()[..len - len / 2]).copied().collect();
        assert!(*target.bytes() == *want);
    }
}

/// Bytes to move from one place to another; each as an index into Place::ALL and an offset.
#[derive(Clone, Copy, Debug)]
struct Piece {
    from: (usize, usize),
    to: (usize, usize),
    len: usize,
}

/// Moves the pieces as one transfer between buffers of `len` bytes in every place, by a write to and by a read from the peer, and
/// checks every byte of all buffers.
fn move_between_places(a: &Arc<Engine>, b: &Arc<Engine>, out: &Connection, len: usize, pieces: &[Piece]) {
    const GUARD: u8 = 0xA5;
    let pattern = |place: usize| (0..len).map(|i| (i * (2 * place + 3) + (i >> 8) + place) as u8).collect::<Vec<u8>>();
    let mut expected = vec![vec![GUARD; len]; Place::ALL.len()];
    for p in pieces {
        expected[p.to.0][p.to.1..p.to.1 + p.len].copy_from_slice(&pattern(p.from.0)[p.from.1..p.from.1 + p.len]);
    }
    for direction in [Direction::Write, Direction::Read] {
        let (source, target) = if direction == Direction::Write { (a, b) } else { (b, a) };
        let from: Vec<Buffer> = Place::ALL.iter().enumerate().map(|(k, &p)| Buffer::at(source, p, pattern(k))).collect();
        let to: Vec<Buffer> = Place::ALL.iter().map(|&p| Buffer::at(target, p, vec![GUARD; len])).collect();
        let items = pieces.iter().map(|p| match direction {
            Direction::Write => (from[p.from.0].local(p.from.1, p.len), to[p.to.0].remote(p.to.1)),
            Direction::Read => (to[p.to.0].local(p.to.1, p.len), from[p.from.0].remote(p.from.1)),
        });
        let id = out.transfer(direction, items.collect::<Vec<_>>().into_iter()).unwrap();
        assert!(out.wait(id, None).unwrap().complete);
        for (k, place) in Place::ALL.iter().enumerate() {
            assert!(*to[k].bytes() == *expected[k], "{direction:?} of {pieces:?}: {place:?} has other bytes");
            assert!(*from[k].bytes() == *pattern(k), "{direction:?} of {pieces:?}: the source on {place:?} changed");
            source.deregister(from[k].mr).unwrap();
            target.deregister(to[k].mr).unwrap();
        }
    }
}

#[test]
fn one_engine_moves_memory_of_the_host_and_of_two_gpus() {
    const LEN: usize = 3 << 20;
    let places = Place::ALL.len();
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _inc) = pair(&a, &b);
    // From every place to every place alone: a small piece, and one of several chunks.
    for (from, to) in (0..places * places).map(|k| (k / places, k % places)) {
        move_between_places(&a, &b, &out, 5000, &[Piece { from: (from, 3), to: (to, 1), len: 4091 }]);
        move_between_places(&a, &b, &out, LEN, &[Piece { from: (from, 1), to: (to, 7), len: LEN - 10 }]);
    }
    // All pairs twice in one vector, in another order at the target, small pieces among large ones, and gaps everywhere.
    let count = 2 * places * places;
    let slot = LEN / (count + 2);
    let mixed: Vec<Piece> = (0..count)
        .map(|k| Piece {
            from: (k % places, k * slot + 5),
            to: (k / places % places, (count - 1 - k) * slot + 11),
            len: if k % 4 == 0 { 1 + k } else { slot - 40 - 997 * k },
        })
        .collect();
    move_between_places(&a, &b, &out, LEN, &mixed);
}

/// A thread that looks for notifications drives connections for a moment, and may never look again.
#[test]
fn a_connection_ends_although_it_was_looked_at_just_before() {
    let (a, b) = (Engine::new(config()).expect("engine"), Engine::new(config()).expect("engine"));
    let (out, inc) = pair(&a, &b);
    for _ in 0..300 {
        out.notify(b"name", b"message").expect("notify");
        while b.next_notification().is_none() {}
    }
    let left = Arc::downgrade(&inc);
    inc.close();
    drop(inc);
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while left.upgrade().is_some() {
        assert!(std::time::Instant::now() < limit, "another thread keeps the connection");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
