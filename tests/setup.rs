//! Set-ups of connections under attack and with few resources, over real sockets and between real processes: unauthenticated connections, peers that die or
//! freeze, limits of descriptors, many connects at once, fork.

mod local;

use local::{config, descriptors, port, ticks, until};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::{Connection, Direction, Engine, LocalSegment};
use uccl_p2p::status::ErrorKind;

/// Names the test that a child process runs, and is not set in the test's own process.
const CHILD: &str = "UCCL_TEST_CHILD";
/// RLIMIT_NOFILE of the child.
const NOFILE: &str = "UCCL_TEST_NOFILE";

fn set_nofile(limit: u64) {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a writable rlimit, and a readable one.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut now), 0);
        now.rlim_cur = limit.min(now.rlim_max);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &now), 0);
    }
}

fn own_test(name: &str, nofile: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, name).env(NOFILE, nofile.to_string());
    // What other tests of this process have set: this one chooses its interfaces itself.
    command.env_remove("NCCL_SOCKET_IFNAME").env_remove("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME");
    command
}

/// Whether this is the child process that runs the test's body. In the test's own process: runs the child, which must succeed.
fn isolated(name: &str, nofile: u64) -> bool {
    if std::env::var(CHILD).is_ok_and(|child| child == name) {
        set_nofile(std::env::var(NOFILE).unwrap().parse().unwrap());
        return true;
    }
    // A child of another test must not run this one.
    if std::env::var(CHILD).is_err() {
        assert!(own_test(name, nofile).status().unwrap().success(), "{name} failed in its own process");
    }
    false
}

// ---- an engine in its own process ----

/// A process with an engine that takes commands.
struct Server {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    port: u16,
    log: std::path::PathBuf,
}

impl Server {
    fn start(nofile: u64, environment: &[(&str, &str)]) -> Server {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let log = std::env::temp_dir().join(format!("uccl-setup-{}-{number}.log", std::process::id()));
        let mut command = own_test("server_process", nofile);
        // Tests read this log, whatever level the caller of the tests chose.
        command.env("UCCL_P2P_LOG_LEVEL", "warn").envs(environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(std::fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut server = Server { child, input, output, port: 0, log };
        server.port = server.answer().parse().unwrap();
        server
    }

    /// The next line that begins with "= ".
    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the server process ended: {}", self.log());
            if let Some((_, answer)) = line.split_once("= ") {
                return answer.trim().to_owned();
            }
        }
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        self.answer()
    }

    fn number(&mut self, command: &str) -> usize {
        self.ask(command).parse().unwrap()
    }

    fn signal(&self, signal: i32) {
        local::signal(&self.child, signal);
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

/// The body of a [`Server`]'s process. Run as a test it does nothing.
#[test]
fn server_process() {
    if std::env::var(CHILD).as_deref() != Ok("server_process") {
        return;
    }
    set_nofile(std::env::var(NOFILE).unwrap().parse().unwrap());
    let engine = Engine::new(config()).unwrap();
    println!("= {}", port(&engine));
    let kept: Arc<std::sync::Mutex<Vec<Arc<Connection>>>> = Arc::default();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (command, argument) = line.split_once(' ').unwrap_or((&line, "0"));
        let argument: usize = argument.parse().unwrap();
        match command {
            "accept" => {
                let (engine, kept) = (engine.clone(), kept.clone());
                std::thread::spawn(move || {
                    while let Ok(connection) = engine.accept() {
                        kept.lock().unwrap().push(connection);
                    }
                });
                println!("= accepting");
            }
            "descriptors" => println!("= {}", descriptors(std::process::id())),
            "list" => {
                let target = |fd: std::fs::DirEntry| std::fs::read_link(fd.path()).unwrap_or_default().display().to_string();
                let all: Vec<String> = std::fs::read_dir("/proc/self/fd").unwrap().map(|fd| target(fd.unwrap())).collect();
                println!("= {}", all.join(" "));
            }
            "files" => {
                let files: Vec<_> = (0..argument).map_while(|_| std::fs::File::open("/dev/null").ok()).collect();
                println!("= {}", files.len());
            }
            "connect" => {
                let connected = engine.connect("127.0.0.1", "", argument as u16);
                println!("= {}", connected.is_ok());
                kept.lock().unwrap().extend(connected);
            }
            other => panic!("{other}"),
        }
    }
}

/// The first bytes that an engine sends to whom it connects.
fn opening(config: Config) -> Vec<u8> {
    let trap = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = trap.local_addr().unwrap().port();
    let connects = std::thread::spawn(move || {
        let engine = Engine::new(config).unwrap();
        assert!(engine.connect("127.0.0.1", "", port).is_err());
    });
    let mut sock = trap.accept().unwrap().0;
    sock.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut bytes = Vec::new();
    let _ = sock.read_to_end(&mut bytes);
    drop(sock);
    connects.join().unwrap();
    assert!(bytes.starts_with(b"UCCLTCPX"));
    bytes
}

fn key_file(text: &str) -> std::path::PathBuf {
    use std::os::unix::fs::OpenOptionsExt;
    let path = std::env::temp_dir().join(format!("uccl-setup-key-{}-{text}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    path
}

// ---- unauthenticated connections ----

/// Unauthenticated connections that send `words` and stay open neither block a peer nor use up the application's descriptors.
fn unauthenticated_connections_take_little(nofile: u64, count: usize, key: bool) {
    let path = key_file("0123456789abcdef0123456789abcdef");
    let environment = [("UCCL_TCPX_AUTH_KEY_FILE", path.to_str().unwrap()), ("UCCL_TCPX_NUM_CHANNELS", "2")];
    let mut server = Server::start(nofile, &environment[if key { 0 } else { 1 }..]);
    let mine = Config { num_channels: Some(2), auth_key_file: key.then(|| path.clone()), ..config() };
    server.ask("accept");
    let engine = Engine::new(mine.clone()).unwrap();
    let words = if key { opening(mine) } else { Vec::new() };
    let attack = |server: &Server| -> Vec<TcpStream> {
        (0..count)
            .filter_map(|_| {
                let mut sock = TcpStream::connect(("127.0.0.1", server.port)).ok()?;
                let _ = sock.write_all(&words);
                Some(sock)
            })
            .collect()
    };
    let held = attack(&server);
    let start = Instant::now();
    let connection = engine.connect("127.0.0.1", "", server.port).expect("a peer beside unauthenticated connections");
    assert!(start.elapsed() < Duration::from_secs(3), "a peer beside unauthenticated connections waited {:?}", start.elapsed());
    assert_eq!(server.number("files 32"), 32, "the application has descriptors left");
    connection.status().unwrap();
    drop(held);
}

#[test]
fn silent_connections_at_a_limit_of_256_descriptors() {
    unauthenticated_connections_take_little(256, 300, false);
}

#[test]
fn silent_connections_at_a_limit_of_1024_descriptors() {
    unauthenticated_connections_take_little(1024, 1100, false);
}

#[test]
fn connections_that_say_hello_but_prove_no_key() {
    unauthenticated_connections_take_little(1024, 300, true);
}

#[test]
fn unauthenticated_connections_cannot_fill_the_log() {
    let mut server = Server::start(1024, &[("UCCL_P2P_LOG_LEVEL", "info")]);
    for _ in 0..2000 {
        if let Ok(mut sock) = TcpStream::connect(("127.0.0.1", server.port)) {
            let _ = sock.write_all(b"GET / HTTP/1.1\r\n\r\n");
        }
    }
    server.number("descriptors");
    let lines = server.log().lines().count();
    assert!(lines < 200, "{lines} lines about 2000 unauthenticated connections");
}

/// Both engines say which versions they speak; what is no engine does not fill the listener's log.
#[test]
fn a_peer_of_another_version_is_in_the_log_of_the_listener() {
    let server = Server::start(1024, &[]);
    let mut of_another_version = opening(config());
    of_another_version[8..10].copy_from_slice(&9u16.to_le_bytes());
    for words in [&of_another_version[..], b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"] {
        let mut sock = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        sock.write_all(words).unwrap();
        let _ = sock.read_to_end(&mut Vec::new());
    }
    let said = || server.log().lines().filter(|line| line.contains("127.0.0.1:")).map(str::to_owned).collect::<Vec<_>>();
    assert!(until(Duration::from_secs(20), || !said().is_empty()), "{}", server.log());
    let said = said();
    assert!(said.len() == 1 && said[0].contains("the peer speaks version 9 of the control protocol, this library"), "{said:?}");
}

/// A listener answers nothing to bytes that are not this protocol's, so the connector has to say what that may mean.
#[test]
fn a_damaged_first_byte_is_named_as_a_possible_cause() {
    let mut server = Server::start(1024, &[]);
    server.ask("accept");
    let relay = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, there) = (relay.local_addr().unwrap().port(), server.port);
    // A connector may try again.
    std::thread::spawn(move || {
        for from in relay.incoming() {
            let (mut from, mut to) = (from.unwrap(), TcpStream::connect(("127.0.0.1", there)).unwrap());
            let mut words = [0; 16];
            from.read_exact(&mut words).unwrap();
            words[0] ^= 1;
            to.write_all(&words).unwrap();
            let _ = std::io::copy(&mut to, &mut from);
        }
    });
    let error = Engine::new(config()).unwrap().connect("127.0.0.1", "", port).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RemoteDisconnect, "{error}");
    for part in ["during the handshake", "had not answered", "were damaged on the way", "UCCL_TCPX_ALLOW"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

// ---- many at once ----

#[test]
fn a_thousand_connects_each_way_come_up() {
    const EACH: usize = 1000;
    const THREADS: usize = 260;
    if !isolated("a_thousand_connects_each_way_come_up", 1 << 20) {
        return;
    }
    own_ports();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a writable rlimit.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    if limit.rlim_cur < 20_000 {
        println!("SKIPPED: {} descriptors do not suffice", limit.rlim_cur);
        return;
    }
    let few = || Config { num_channels: Some(1), connect_timeout: Duration::from_secs(60), ..config() };
    let engines = [Engine::new(few()).unwrap(), Engine::new(few()).unwrap()];
    let connect = |from: &Arc<Engine>, to: &Arc<Engine>| -> Vec<Arc<Connection>> {
        let to = port(to);
        (0..EACH / THREADS + 1).map(|_| from.connect("127.0.0.1", "", to).expect("connect")).collect()
    };
    let accept = |engine: &Arc<Engine>| -> Vec<Arc<Connection>> {
        (0..(EACH / THREADS + 1) * THREADS).map(|_| engine.accept().expect("accept")).collect()
    };
    let all: Vec<Arc<Connection>> = std::thread::scope(|s| {
        let mut threads = Vec::new();
        for (k, engine) in engines.iter().enumerate() {
            threads.push(s.spawn(move || accept(engine)));
            let other = &engines[1 - k];
            threads.extend((0..THREADS).map(|_| s.spawn(move || connect(engine, other))));
        }
        threads.into_iter().flat_map(|t| t.join().expect("all come up")).collect()
    });
    assert!(all.len() >= 4 * EACH);
    assert!(all.iter().all(|c| c.status().is_ok()));
}

#[test]
fn a_burst_of_peers_is_not_refused() {
    // More than the limit of unauthenticated connections, 256 here: a refused connector tries again.
    const BURST: usize = 600;
    if !isolated("a_burst_of_peers_is_not_refused", 1 << 20) {
        return;
    }
    own_ports();
    let mut server = Server::start(4096, &[("UCCL_TCPX_NUM_CHANNELS", "1")]);
    server.ask("accept");
    let engine = Engine::new(Config { num_channels: Some(1), ..config() }).unwrap();
    let barrier = std::sync::Barrier::new(BURST);
    let all: Vec<_> = std::thread::scope(|s| {
        let connect = || {
            barrier.wait();
            engine.connect("127.0.0.1", "", server.port)
        };
        let threads: Vec<_> = (0..BURST).map(|_| s.spawn(connect)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let failed: Vec<_> = all.iter().filter_map(|c| c.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {BURST} failed: {}", failed.len(), failed[0]);
}

/// A listening side that answers each connect as `answers` say in turn, and how many came.
fn listener_that(answers: Vec<fn(TcpStream)>, times: impl FnOnce(u16) -> ErrorKind) -> (ErrorKind, usize, Duration) {
    let trap = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = trap.local_addr().unwrap().port();
    let came = std::sync::atomic::AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| loop {
            let sock = trap.accept().unwrap().0;
            if over.load(Ordering::SeqCst) {
                return;
            }
            let n = came.fetch_add(1, Ordering::SeqCst);
            answers[n.min(answers.len() - 1)](sock);
        });
        let start = Instant::now();
        let kind = times(port);
        let took = start.elapsed();
        over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(("127.0.0.1", port)));
        (kind, came.load(Ordering::SeqCst), took)
    })
}

/// A refusal in clear, as a listening side says it before the proof.
fn refuse(mut sock: TcpStream, kind: ErrorKind) {
    let mut opening = [0; 136];
    sock.read_exact(&mut opening).unwrap();
    let mut refusal = opening[..10].to_vec();
    refusal.extend_from_slice(&[255, 0, 10, 0, 0, 0]);
    refusal.extend_from_slice(&kind.code().to_le_bytes());
    refusal.extend_from_slice(&[opening[8], 0, opening[8], 0]);
    refusal.extend_from_slice(b"no");
    sock.write_all(&refusal).unwrap();
    let _ = sock.read(&mut opening);
}

#[test]
fn a_connect_is_tried_again_where_places_were_short_and_after_no_refusal() {
    let connect = |timeout: u64| {
        move |port| {
            let engine = Engine::new(Config { connect_timeout: Duration::from_millis(timeout), ..config() }).unwrap();
            engine.connect("127.0.0.1", "", port).unwrap_err().kind()
        }
    };
    // Closed without an answer: a temporary error.
    let (kind, came, took) = listener_that(vec![drop], connect(30_000));
    assert!(kind == ErrorKind::RemoteDisconnect && came > 3 && took < Duration::from_secs(8), "{kind:?}, {came} in {took:?}");
    // No place at present: to the end.
    let (kind, came, took) = listener_that(vec![|sock| refuse(sock, ErrorKind::Resource)], connect(4000));
    assert!(kind == ErrorKind::Resource && came > 5, "{kind:?}, {came} in {took:?}");
    assert!(took > Duration::from_secs(3) && took < Duration::from_secs(12), "{took:?}");
    // No place at present, and the time is over in the middle of the next try: the first is the cause.
    let answers: Vec<fn(TcpStream)> =
        vec![|sock| refuse(sock, ErrorKind::Resource), |_sock| std::thread::sleep(Duration::from_secs(2))];
    let (kind, came, _) = listener_that(answers, connect(1000));
    assert_eq!((kind, came), (ErrorKind::Resource, 2));
    // A refusal is final, also after others were not.
    let answers: Vec<fn(TcpStream)> = vec![drop, |sock| refuse(sock, ErrorKind::Resource), |sock| refuse(sock, ErrorKind::Auth)];
    let (kind, came, _) = listener_that(answers, connect(30_000));
    assert_eq!((kind, came), (ErrorKind::Auth, 3));
}

#[test]
fn too_few_threads_are_a_resource_error() {
    if !isolated("too_few_threads_are_a_resource_error", 1024) {
        return;
    }
    let _ = config();
    // SAFETY: a plain system call; the limit counts for the user that this process becomes.
    let lowered = |most: u64| unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &libc::rlimit { rlim_cur: most, rlim_max: 64 }) == 0 };
    // SAFETY: plain system calls; the rights of user nobody suffice from here on.
    if !lowered(64) || unsafe { libc::setresuid(65_533, 65_533, 65_533) } != 0 {
        println!("SKIPPED: this process cannot become another user");
        return;
    }
    let mut came_up = false;
    for most in 2..40 {
        assert!(lowered(most));
        let connected = Engine::new(config()).and_then(|a| Ok((Engine::new(config())?, a))).and_then(|(b, a)| {
            let out = a.connect("127.0.0.1", "", port(&b))?;
            out.status()
        });
        match connected {
            Ok(()) => came_up = true,
            Err(e) => assert_eq!(e.kind(), ErrorKind::Resource, "with {most} threads: {e}"),
        }
    }
    assert!(came_up);
}

// ---- connections that the application does not accept ----

#[test]
fn connections_that_die_before_accept_give_back_their_descriptors() {
    let mut server = Server::start(4096, &[("UCCL_TCPX_NUM_CHANNELS", "2")]);
    let engine = Engine::new(Config { num_channels: Some(2), ..config() }).unwrap();
    drop(engine.connect("127.0.0.1", "", server.port).unwrap());
    let before = server.number("descriptors");
    for _ in 0..200 {
        drop(engine.connect("127.0.0.1", "", server.port).expect("the dead make room"));
    }
    let given_back = until(Duration::from_secs(10), || server.number("descriptors") <= before + 8);
    assert!(given_back, "{} descriptors, {before} before", server.number("descriptors"));
}

#[test]
fn too_many_that_wait_for_accept_are_refused_with_a_reason() {
    let mut server = Server::start(1024, &[("UCCL_TCPX_NUM_CHANNELS", "1")]);
    let engine = Engine::new(Config { num_channels: Some(1), ..config() }).unwrap();
    let mut kept = Vec::new();
    let error = loop {
        match engine.connect("127.0.0.1", "", server.port) {
            Ok(connection) => kept.push(connection),
            Err(e) => break e,
        }
        assert!(kept.len() < 1000, "no limit");
    };
    assert_eq!(error.kind(), ErrorKind::Resource, "{error}");
    assert!(error.to_string().contains("wait for the application's accept"), "{error}");
    assert!(kept.len() >= 16, "{} waited", kept.len());
    assert_eq!(server.number("files 100"), 100);
    // Once the application accepts, peers come in again.
    server.ask("accept");
    let again = || engine.connect("127.0.0.1", "", server.port).is_ok();
    assert!(until(Duration::from_secs(10), again));
}

// ---- peers that die, freeze or refuse ----

#[test]
fn a_refusal_for_lack_of_descriptors_says_so_at_both_ends() {
    let mut server = Server::start(128, &[("UCCL_TCPX_NUM_CHANNELS", "64")]);
    server.ask("accept");
    let engine = Engine::new(Config { num_channels: Some(64), ..config() }).unwrap();
    let start = Instant::now();
    let error = engine.connect("127.0.0.1", "", server.port).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(error.kind(), ErrorKind::Resource, "{error}");
    assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
    assert!(server.log().contains("RLIMIT_NOFILE"), "{}", server.log());
}

#[test]
fn a_process_out_of_descriptors_reports_a_resource_error() {
    if !isolated("a_process_out_of_descriptors_reports_a_resource_error", 128) {
        return;
    }
    let server = Server::start(1024, &[]);
    let engine = Engine::new(Config { num_channels: Some(4), ..config() }).unwrap();
    let mut files = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        files.push(file);
    }
    for free in 0..20 {
        let error = engine.connect("127.0.0.1", "", server.port).expect_err("no descriptors");
        assert_eq!(error.kind(), ErrorKind::Resource, "with {free} free: {error}");
        files.pop();
    }
    drop(files);
    engine.connect("127.0.0.1", "", server.port).expect("descriptors are back");
}

#[test]
fn kills_during_set_up_leave_no_descriptors() {
    if !isolated("kills_during_set_up_leave_no_descriptors", 8192) {
        return;
    }
    own_ports();
    let many = || Config { num_channels: Some(64), ..config() };
    let engine = Engine::new(many()).unwrap();
    std::thread::scope(|s| {
        let accepts = engine.clone();
        s.spawn(move || while accepts.accept().is_ok() {});
        // What the process opens once and keeps.
        let mut first = Server::start(8192, &[("UCCL_TCPX_NUM_CHANNELS", "64")]);
        drop(engine.connect("127.0.0.1", "", first.port).unwrap());
        assert_eq!(first.ask(&format!("connect {}", port(&engine))), "true");
        drop(first);
        let mut before = 0;
        // The open connection is closed too.
        assert!(until(Duration::from_secs(10), || std::mem::replace(&mut before, descriptors(std::process::id()))
            == descriptors(std::process::id())
            && before < 100));
        for k in 0..300u64 {
            let mut server = Server::start(8192, &[("UCCL_TCPX_NUM_CHANNELS", "64")]);
            let delay = Duration::from_micros(k * 53 % 12_000);
            let start = Instant::now();
            if k % 2 == 0 {
                // It dies while this engine connects.
                let connects = s.spawn({
                    let (engine, port) = (&engine, server.port);
                    move || drop(engine.connect("127.0.0.1", "", port))
                });
                std::thread::sleep(delay);
                drop(server);
                connects.join().unwrap();
            } else {
                // It dies while it connects to this engine.
                writeln!(server.input, "connect {}", port(&engine)).unwrap();
                std::thread::sleep(delay);
                drop(server);
            }
            assert!(start.elapsed() < Duration::from_secs(10), "round {k} took {:?}", start.elapsed());
        }
        let given_back = until(Duration::from_secs(15), || descriptors(std::process::id()) <= before + 4);
        let after = descriptors(std::process::id());
        engine.shutdown();
        assert!(given_back, "{after} descriptors, {before} before");
    });
}

/// Forwards at most `most` bytes, and what comes the other way for a little longer; then cuts both.
fn forward(mut from: &TcpStream, mut to: &TcpStream, most: usize) {
    let (mut buffer, mut passed) = ([0; 4096], 0);
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let n = n.min(most - passed);
        let _ = to.write_all(&buffer[..n]);
        passed += n;
        if passed == most {
            std::thread::sleep(Duration::from_millis(100));
            break;
        }
    }
    for sock in [from, to] {
        let _ = sock.shutdown(std::net::Shutdown::Both);
    }
}

#[test]
fn a_peer_that_is_cut_off_anywhere_in_the_set_up_is_noticed_at_once() {
    let config = || Config { num_channels: Some(2), ..config() };
    let (here, there) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let relay = TcpListener::bind("127.0.0.1:0").unwrap();
    let (at, target) = (relay.local_addr().unwrap().port(), port(&there));
    // Closer and closer to the end of the handshake bytes.
    for (most, forth) in (0..13).flat_map(|k| [(k * 120, true), (k * 120, false)]) {
        let over = AtomicBool::new(false);
        std::thread::scope(|s| {
            let (over, relay) = (&over, &relay);
            // One that is cut off before its proof tries again for a moment.
            s.spawn(move || {
                while let (near, false) = (relay.accept().unwrap().0, over.load(Ordering::SeqCst)) {
                    let far = TcpStream::connect(("127.0.0.1", target)).unwrap();
                    std::thread::scope(|s| {
                        s.spawn(|| forward(&near, &far, if forth { most } else { usize::MAX }));
                        forward(&far, &near, if forth { usize::MAX } else { most });
                    });
                }
            });
            let start = Instant::now();
            // It may come up where all was said.
            drop(here.connect("127.0.0.1", "", at));
            over.store(true, Ordering::SeqCst);
            drop(TcpStream::connect(("127.0.0.1", at)));
            assert!(start.elapsed() < Duration::from_secs(8), "cut after {most} bytes, {forth}: {:?}", start.elapsed());
        });
    }
}

/// Passes one message of the handshake, whose header says how long it is.
fn pass_message(mut from: &TcpStream, mut to: &TcpStream) -> std::io::Result<()> {
    let mut header = [0; 16];
    from.read_exact(&mut header)?;
    let mut body = vec![0; usize::from(u16::from_le_bytes([header[12], header[13]]))];
    from.read_exact(&mut body)?;
    to.write_all(&header)?;
    to.write_all(&body)
}

/// Runs `body` while `count` set-ups with the server hang: they are proved, and the server's channels wait for connects that are not
/// made, because its offers never come back.
fn while_set_ups_hang(target: u16, count: usize, channels: usize, body: impl FnOnce()) {
    let engine = Engine::new(Config { num_channels: Some(channels), ..config() }).unwrap();
    let relay = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = relay.local_addr().unwrap().port();
    std::thread::scope(|s| {
        s.spawn(|| {
            for _ in 0..count {
                let near = relay.accept().unwrap().0;
                s.spawn(move || {
                    let far = TcpStream::connect(("127.0.0.1", target)).unwrap();
                    let (there, back) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                    let forth = std::thread::spawn(move || std::io::copy(&mut &near, &mut &far));
                    let _ = pass_message(&back, &there).and_then(|()| pass_message(&back, &there));
                    let _ = forth.join();
                });
            }
        });
        for _ in 0..count {
            s.spawn(|| assert!(engine.connect("127.0.0.1", "", at).is_err()));
        }
        std::thread::sleep(Duration::from_secs(1));
        body();
        engine.shutdown();
    });
}

#[test]
fn set_ups_that_hang_cost_little() {
    let mut server = Server::start(16384, &[("UCCL_TCPX_NUM_CHANNELS", "8")]);
    server.ask("accept");
    while_set_ups_hang(server.port, 100, 8, || {
        std::thread::sleep(Duration::from_secs(1));
        let before = ticks(server.child.id());
        std::thread::sleep(Duration::from_secs(2));
        let used = ticks(server.child.id()) - before;
        // SAFETY: a plain system call.
        let second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as u64;
        assert!(used < second, "{used} of {} ticks for 100 set-ups that hang", 2 * second);
    });
}

#[test]
fn set_ups_that_hang_give_way_to_others() {
    // More than the budget of authenticated set-ups.
    let mut server = Server::start(1024, &[("UCCL_TCPX_NUM_CHANNELS", "1")]);
    server.ask("accept");
    while_set_ups_hang(server.port, 100, 1, || {
        let start = Instant::now();
        let other = Engine::new(Config { num_channels: Some(1), ..config() }).unwrap();
        other.connect("127.0.0.1", "", server.port).unwrap();
        assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
        assert_eq!(server.number("files 100"), 100);
    });
}

#[test]
fn frozen_peers_do_not_add_up_at_the_end() {
    let mut server = Server::start(4096, &[("UCCL_TCPX_NUM_CHANNELS", "1")]);
    server.ask("accept");
    let close_timeout = Duration::from_secs(1);
    let engine = Engine::new(Config { num_channels: Some(1), close_timeout, ..config() }).unwrap();
    let kept: Vec<_> = (0..80).map(|_| engine.connect("127.0.0.1", "", server.port).unwrap()).collect();
    server.signal(libc::SIGSTOP);
    let start = Instant::now();
    engine.shutdown();
    let took = start.elapsed();
    server.signal(libc::SIGCONT);
    assert!(took < Duration::from_secs(4), "80 frozen peers took {took:?}");
    assert!(kept.iter().all(|c| c.status().is_err()));
}

#[test]
fn connects_of_a_frozen_peer_do_not_keep_others_out() {
    let mut server = Server::start(8192, &[("UCCL_TCPX_NUM_CHANNELS", "1")]);
    server.ask("accept");
    // A process with pending connects when it freezes.
    let frozen: Vec<Server> = (0..8).map(|_| Server::start(4096, &[("UCCL_TCPX_NUM_CHANNELS", "1")])).collect();
    for peer in &frozen {
        let mut input = &peer.input;
        for _ in 0..4 {
            writeln!(input, "connect {}", server.port).unwrap();
        }
        peer.signal(libc::SIGSTOP);
    }
    let engine = Engine::new(Config { num_channels: Some(1), ..config() }).unwrap();
    let start = Instant::now();
    engine.connect("127.0.0.1", "", server.port).unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    frozen.iter().for_each(|peer| peer.signal(libc::SIGCONT));
}

#[test]
fn the_end_of_an_engine_ends_its_connects() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let engine = Engine::new(config()).unwrap();
    std::thread::scope(|s| {
        let connects = s.spawn(|| engine.connect("127.0.0.1", "", port).map(|_| ()));
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        engine.shutdown();
        assert_eq!(connects.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    });
}

// ---- addresses ----

#[test]
fn the_port_is_open_on_the_control_interface_alone() {
    let engine = Engine::new(config()).unwrap();
    assert!(TcpStream::connect(("127.0.0.1", port(&engine))).is_ok());
    assert!(TcpStream::connect(("127.0.0.3", port(&engine))).is_err(), "open on an address that is not the control interface's");
}

fn ip(command: &str) -> bool {
    Command::new("ip").args(command.split(' ')).status().is_ok_and(|status| status.success())
}

/// Moves this process to a new network namespace with these interfaces. Prints a message and returns `false` if that is not possible.
fn own_network(interfaces: &[&str], commands: &[&str]) -> bool {
    // SAFETY: a plain system call; this process has no other threads that open sockets yet.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!("SKIPPED: no network namespace: {}", std::io::Error::last_os_error());
        return false;
    }
    let mut all = vec!["link set lo up".to_owned()];
    for name in interfaces {
        all.push(format!("link add {name} type veth peer name p{name}"));
        all.push(format!("link set p{name} up"));
        all.push(format!("link set {name} up"));
    }
    all.extend(commands.iter().map(|c| (*c).to_owned()));
    if let Some(command) = all.iter().find(|command| !ip(command)) {
        println!("SKIPPED: ip {command} does not work");
        return false;
    }
    // The kernel takes its time with the carrier of a new interface, and one without is not used.
    let carries = |name: &&str| {
        let shown = Command::new("ip").args(["-o", "link", "show", "dev", name]).output().expect("ip");
        String::from_utf8_lossy(&shown.stdout).contains("state UP")
    };
    assert!(until(Duration::from_secs(20), || interfaces.iter().all(carries)), "no carrier on {interfaces:?}");
    true
}

/// Gives this process its own ports if possible: closed connections keep theirs for a minute.
fn own_ports() {
    // SAFETY: a plain system call; this process has no sockets yet.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 {
        assert!(ip("link set lo up"), "a network namespace without its loopback interface");
    }
}

#[test]
fn a_lost_nic_costs_its_channels_but_not_the_connection() {
    if !isolated("a_lost_nic_costs_its_channels_but_not_the_connection", 1024) {
        return;
    }
    let addresses = ["addr add 10.77.0.1/24 dev eth0", "addr add 10.77.1.1/24 dev eth1"];
    if !own_network(&["eth0", "eth1"], &addresses) {
        return;
    }
    let config = || Config { num_channels: Some(4), plugin: PluginChoice::Soft, ..Config::from_env().unwrap() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let come_up = || {
        let out = a.connect("10.77.0.1", "", port(&b)).expect("comes up");
        let inc = b.accept().unwrap();
        out.notify(b"n", b"over it").unwrap();
        assert!(until(Duration::from_secs(10), || b.next_notification().is_some()));
        drop((out, inc));
    };
    come_up();
    let start = Instant::now();
    for command in ["link set eth1 down", "link del eth1"] {
        assert!(ip(command));
        come_up();
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

/// The kernel announces a change once, and a connection that a thread prepares is not checked then.
#[test]
fn a_link_that_falls_while_a_connection_is_prepared_is_noticed_afterwards() {
    if !isolated("a_link_that_falls_while_a_connection_is_prepared_is_noticed_afterwards", 1024) {
        return;
    }
    let addresses = ["addr add 10.77.0.1/24 dev eth0", "addr add 10.77.1.1/24 dev eth1"];
    if !own_network(&["eth0", "eth1"], &addresses) {
        return;
    }
    let config = || Config { num_channels: Some(4), plugin: PluginChoice::Soft, ..Config::from_env().unwrap() };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let out = a.connect("10.77.0.1", "", port(&b)).expect("comes up");
    let inc = b.accept().unwrap();
    std::thread::scope(|s| {
        for connection in [&out, &inc] {
            s.spawn(|| connection.simulate_kept_preparing(Duration::from_secs(2)));
        }
        std::thread::sleep(Duration::from_millis(500));
        assert!(ip("link set eth1 down"));
    });
    let lost = || out.stats().unwrap().totals.lost_channels;
    assert!(until(Duration::from_secs(10), || lost() == 2), "{} channels were given up", lost());
    let channels = out.stats().unwrap().channels;
    assert!(channels.iter().all(|channel| channel.lost == (channel.nic == "eth1") || channel.nic.is_empty()), "{channels:?}");
}

#[test]
fn lost_channels_come_back_with_their_nic() {
    if !isolated("lost_channels_come_back_with_their_nic", 1024) {
        return;
    }
    let addresses = ["addr add 10.77.0.1/24 dev eth0", "addr add 10.77.1.1/24 dev eth1"];
    if !own_network(&["eth0", "eth1"], &addresses) {
        return;
    }
    let config = || Config {
        num_channels: Some(4),
        plugin: PluginChoice::Soft,
        disable_ipc: true,
        eager_bytes: 0,
        ..Config::from_env().unwrap()
    };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let out = a.connect("10.77.0.1", "", port(&b)).expect("comes up");
    let inc = b.accept().unwrap();
    let mut memory = [vec![7u8; 8 << 20], vec![0; 8 << 20]];
    let [from, to] = [0, 1].map(|i| memory[i].as_mut_ptr() as usize);
    let (near, far) = (a.register(from, 8 << 20).unwrap(), b.register(to, 8 << 20).unwrap());
    let counts = |connection: &Connection| {
        let totals = connection.stats().unwrap().totals;
        (totals.lost_channels, totals.restored_channels)
    };
    let carried = || -> u64 {
        let channels = out.stats().unwrap().channels;
        channels.iter().filter(|channel| channel.nic == "eth1").map(|channel| channel.sent_bytes).sum()
    };
    let write = || {
        let item = b.fifo_item(far, to, 8 << 20).unwrap();
        let id =
            out.transfer(Direction::Write, std::iter::once((LocalSegment { mr: near, addr: from, len: 8 << 20 }, item))).unwrap();
        assert!(out.wait(id, Some(Duration::from_secs(30))).expect("the other NIC carries it").complete);
    };
    for round in 1..=2 {
        let before = carried();
        write();
        assert!(carried() > before, "round {round}: eth1 carries nothing");
        assert!(ip("link set eth1 down"));
        let lost = || counts(&out) == (2 * round, 2 * round - 2) && counts(&inc) == (2 * round, 2 * round - 2);
        assert!(until(Duration::from_secs(20), lost), "round {round}: {:?} {:?}", counts(&out), counts(&inc));
        write();
        assert!(ip("link set eth1 up"));
        let back = || counts(&out) == (2 * round, 2 * round) && counts(&inc) == (2 * round, 2 * round);
        assert!(until(Duration::from_secs(20), back), "round {round}: {:?} {:?}", counts(&out), counts(&inc));
    }
    let before = carried();
    write();
    assert!(carried() > before, "eth1 carries nothing");
    assert!(memory[0] == memory[1], "wrong bytes");
    // The set-ups that brought them are no connections.
    assert_eq!(b.stats().unwrap().connections.len(), 1);
    a.deregister(near).unwrap();
    b.deregister(far).unwrap();
}

#[test]
fn a_host_with_ipv6_alone_is_served() {
    if !isolated("a_host_with_ipv6_alone_is_served", 1024) {
        return;
    }
    let addresses = ["-6 addr add fd00::7/64 dev eth0 nodad"];
    if !own_network(&["eth0"], &addresses) {
        return;
    }
    // The kernel takes its time with the route to a new address.
    let routed = || {
        let listener = TcpListener::bind("[fd00::7]:0").ok()?;
        TcpStream::connect(listener.local_addr().ok()?).ok()
    };
    assert!(until(Duration::from_secs(20), || routed().is_some()), "no route to an address of this host");
    let config = || Config { socket_ifname: None, ..Config { plugin: PluginChoice::Soft, ..Config::from_env().unwrap() } };
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let metadata = b.metadata();
    let (address, rest) = metadata.rsplit_once("]:").expect("brackets");
    assert_eq!(address, "[fd00::7", "{metadata}");
    let port: u16 = rest.split('?').next().unwrap().parse().unwrap();
    for name in ["fd00::7", "[fd00::7]", "::1"] {
        let out = a.connect(name, "", port).unwrap();
        let _inc = b.accept().unwrap();
        assert!(out.is_local());
        out.notify(b"n", name.as_bytes()).unwrap();
        assert!(until(Duration::from_secs(10), || b.next_notification().is_some_and(|n| n.msg == name.as_bytes())));
    }
    // Without any address but the loopback one it says so.
    assert!(Command::new("ip").args(["link", "del", "eth0"]).status().unwrap().success());
    assert!(Engine::new(config()).is_ok_and(|e| e.metadata().starts_with("127.0.0.1:")));
    let named = Config { socket_ifname: Some("eth0".into()), ..config() };
    assert_eq!(Engine::new(named).unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn only_networks_of_the_list_may_connect() {
    let mut server = Server::start(1024, &[("UCCL_TCPX_BIND", "any"), ("UCCL_TCPX_ALLOW", "10.0.0.0/8, 127.0.0.2")]);
    server.ask("accept");
    let engine = Engine::new(config()).unwrap();
    let error = engine.connect("127.0.0.1", "", server.port).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RemoteDisconnect, "{error}");
    assert!(server.log().contains("UCCL_TCPX_ALLOW"), "{}", server.log());
    // An unauthenticated connection from a listed address is not closed at once.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.2:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.connect(&std::net::SocketAddr::from(([127, 0, 0, 1], server.port)).into()).unwrap();
    let mut sock = TcpStream::from(socket);
    sock.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(sock.read(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock));
}

// ---- fork ----

/// Runs `body` in a forked child; whether it returned true.
fn in_a_child(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs the body, which uses what the library promises to work after a fork, and leaves without cleaning up.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
        // SAFETY: ends the child.
        unsafe { libc::_exit(if good { 0 } else { 1 }) };
    }
    let mut status = 0;
    let ended = until(Duration::from_secs(20), || {
        // SAFETY: our child, a writable status.
        unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) == child }
    });
    if !ended {
        // SAFETY: our child.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, &mut status, 0);
        }
    }
    ended && status == 0
}

#[test]
fn a_forked_child_leaves_the_parents_connections_alone() {
    if !isolated("a_forked_child_leaves_the_parents_connections_alone", 1024) {
        return;
    }
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let out = a.connect("127.0.0.1", "", port(&b)).unwrap();
    let inc = b.accept().unwrap();
    let (engine, peer, outgoing, incoming) = (a.clone(), b.clone(), out.clone(), inc.clone());
    assert!(
        in_a_child(move || {
            let inert = outgoing.status().is_err()
                && outgoing.notify(b"n", b"from the child").is_err()
                && engine.connect("127.0.0.1", "", 1).is_err_and(|e| e.kind() == ErrorKind::Unsupported)
                && engine.accept().is_err()
                && engine.register(0x1000, 1).is_err();
            incoming.close();
            outgoing.close();
            engine.shutdown();
            drop((engine, peer, outgoing, incoming));
            inert
        }),
        "the child could not end"
    );
    // The child had its own four counted references; here they are still ours.
    std::thread::sleep(Duration::from_millis(300));
    out.status().expect("the parent's connection lives on");
    inc.status().expect("the parent's connection lives on");
    out.notify(b"n", b"from the parent").unwrap();
    assert!(until(Duration::from_secs(10), || b.next_notification().is_some_and(|n| n.msg == b"from the parent")));
}

#[test]
fn a_forked_child_makes_engines_of_its_own() {
    if !isolated("a_forked_child_makes_engines_of_its_own", 1024) {
        return;
    }
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let _out = a.connect("127.0.0.1", "", port(&b)).unwrap();
    let good = in_a_child(|| {
        let (c, d) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
        let out = c.connect("127.0.0.1", "", port(&d)).unwrap();
        let inc = d.accept().unwrap();
        out.notify(b"n", b"in the child").unwrap();
        let told = until(Duration::from_secs(10), || d.next_notification().is_some_and(|n| n.msg == b"in the child"));
        // Data, which needs the I/O threads of this process.
        const LEN: usize = 3 << 20;
        let (from, to) = ((0..LEN).map(|i| (i * 7) as u8).collect::<Vec<u8>>(), vec![0u8; LEN]);
        let (here, there) = (c.register(from.as_ptr() as usize, LEN).unwrap(), d.register(to.as_ptr() as usize, LEN).unwrap());
        let item = d.fifo_item(there, to.as_ptr() as usize, LEN).unwrap();
        let local = LocalSegment { mr: here, addr: from.as_ptr() as usize, len: LEN };
        let id = out.transfer(Direction::Write, std::iter::once((local, item))).unwrap();
        let done = out.wait(id, Some(Duration::from_secs(10))).is_ok_and(|state| state.complete);
        inc.close();
        // SAFETY: the vector's bytes, written by the library behind the compiler's back.
        let same = (0..LEN).all(|i| unsafe { to.as_ptr().add(i).read_volatile() } == from[i]);
        told && done && same
    });
    assert!(good, "a child's own engines do not work");
}
