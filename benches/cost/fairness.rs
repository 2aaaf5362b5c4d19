//! A small operation beside a large one, and what it takes alone: on one connection, and of two processes that use one engine.

use crate::figures::{percentile, time_all};
use crate::server::{config, parse_address, Server, TOTAL};
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, LocalSegment};

/// A connection, and memory to move over it.
pub struct Initiator {
    _engine: Arc<Engine>,
    connection: Arc<Connection>,
    buffer: Vec<u8>,
    mr: u64,
    item: FifoItem,
}

impl Initiator {
    pub fn new(address: &str) -> Initiator {
        let (port, item) = parse_address(address);
        let engine = Engine::new(config(None)).expect("engine");
        let connection = engine.connect("127.0.0.1", "", port).expect("connect");
        let buffer = vec![6u8; TOTAL];
        let mr = engine.register(buffer.as_ptr() as usize, TOTAL).expect("register");
        Initiator { _engine: engine, connection, buffer, mr, item }
    }

    /// Starts a transfer of `times` blocks of `len` bytes, all of them the same memory.
    pub fn start(&self, direction: Direction, len: usize, times: usize) -> u64 {
        let local = LocalSegment { mr: self.mr, addr: self.buffer.as_ptr() as usize, len };
        self.connection.transfer(direction, std::iter::repeat_n((local, self.item), times)).expect("transfer")
    }

    fn is_complete(&self, id: u64) -> bool {
        self.connection.poll(id).expect("poll").complete
    }

    pub fn wait(&self, id: u64) {
        assert!(self.connection.wait(id, None).expect("wait").complete);
    }

    /// Whether a transfer ends within so much time.
    pub fn waits(&self, id: u64, time: Duration) -> bool {
        self.connection.wait(id, Some(time)).expect("wait").complete
    }

    /// Bytes of a transfer that are in place.
    pub fn bytes_done(&self, id: u64) -> u64 {
        self.connection.poll(id).map_or(0, |state| state.bytes_done)
    }

    /// One small operation, polled to its end.
    fn once(&self, (direction, len, _): Small) {
        let id = self.start(direction, len, 1);
        while !self.is_complete(id) {}
    }

    /// Sorted durations of small operations in microseconds, for `seconds` at least.
    pub fn alone(&self, seconds: f64, small: Small) -> Vec<f64> {
        time_all(seconds, small.2, || self.once(small))
    }

    /// At most `most` small operations until something has ended.
    pub fn until(&self, small: Small, most: usize, times: &mut Vec<f64>, mut has_ended: impl FnMut() -> bool) {
        for n in 0.. {
            if n < most {
                let posted = Instant::now();
                self.once(small);
                times.push(posted.elapsed().as_secs_f64() * 1e6);
                std::thread::sleep(small.2);
            }
            if has_ended() {
                return;
            }
        }
    }
}

/// A small operation: what, its bytes, and the pause after it.
pub type Small = (Direction, usize, Duration);

fn print(row: &str, len: usize, alone: &[f64], mut behind: Vec<f64>, large_ms: f64) {
    behind.sort_by(f64::total_cmp);
    let figures = |name: &str, sorted: &[f64]| {
        let [p50, p99, max] = [50.0, 99.0, 100.0].map(|p| percentile(sorted, p));
        format!("\"{name}_p50_us\": {p50:.1}, \"{name}_p99_us\": {p99:.1}, \"{name}_max_us\": {max:.1}")
    };
    println!(
        "{{\"row\": \"{row}\", \"bytes\": {len}, {}, {}, \"large_p50_ms\": {large_ms:.1}, \"samples\": {}}}",
        figures("alone", alone),
        figures("behind", &behind),
        behind.len()
    );
}

/// A small write behind one of 1 GiB on the same connection: how long it takes, beside what the large one takes and what it takes alone.
pub fn line(seconds: f64) {
    for len in [4096, 64 << 10] {
        behind("line", seconds, (Direction::Write, len, Duration::from_millis(1)), (TOTAL, 16), usize::MAX);
    }
}

/// A read of 5 MB behind one of 1.3 GB on the same connection.
pub fn reads(seconds: f64) {
    behind("reads", seconds, (Direction::Read, 5_000_000, Duration::ZERO), (65_000_000, 20), 1);
}

/// Large transfers one after another, and at most `most` small ones behind each.
fn behind(row: &str, seconds: f64, small: Small, (large, blocks): (usize, usize), most: usize) {
    let server = Server::start(None);
    let initiator = Initiator::new(&server.address);
    let alone = initiator.alone(seconds / 4.0, small);
    let (mut times, mut larges) = (Vec::new(), Vec::new());
    let began = Instant::now();
    while larges.len() < 3 || began.elapsed().as_secs_f64() < seconds {
        let started = Instant::now();
        let id = initiator.start(small.0, large, blocks);
        initiator.until(small, most, &mut times, || initiator.is_complete(id));
        larges.push(started.elapsed().as_secs_f64() * 1e3);
    }
    larges.sort_by(f64::total_cmp);
    print(row, small.1, &alone, times, percentile(&larges, 50.0));
}

/// A 4 KiB write every 2 ms, beside another process that writes 512 MiB into the same engine again and again.
pub fn neighbour(seconds: f64) {
    let server = Server::start(None);
    let initiator = Initiator::new(&server.address);
    let small = (Direction::Write, 4096, Duration::from_millis(2));
    let alone = initiator.alone(seconds / 4.0, small);
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args(["flood", &server.address, &seconds.to_string()]).stdout(Stdio::piped());
    let mut flood = command.spawn().expect("the other process");
    let mut output = BufReader::new(flood.stdout.take().expect("piped"));
    let mut line = || {
        let mut line = String::new();
        output.read_line(&mut line).expect("the other process speaks");
        line.trim().to_owned()
    };
    assert_eq!(line(), "flooding");
    let mut times = Vec::new();
    initiator.until(small, usize::MAX, &mut times, || flood.try_wait().expect("a child").is_some());
    print("neighbour", small.1, &alone, times, line().parse().expect("the median of the other process"));
}

/// The other process of [`neighbour`]. Says when its first write has ended, and at the end how long one took, in milliseconds.
pub fn flood(address: &str, seconds: f64) -> ExitCode {
    let initiator = Initiator::new(address);
    let write = || initiator.wait(initiator.start(Direction::Write, TOTAL, 8));
    write();
    println!("flooding");
    let (mut times, began) = (Vec::new(), Instant::now());
    while times.is_empty() || began.elapsed().as_secs_f64() < seconds {
        let started = Instant::now();
        write();
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    println!("{}", percentile(&times, 50.0));
    ExitCode::SUCCESS
}
