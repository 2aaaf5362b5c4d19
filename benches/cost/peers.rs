//! Many connections of one process to one peer: the rate over all of them, CPU, descriptors and memory. And many processes that send to one.

use crate::fairness::Initiator;
use crate::figures::{cpu_seconds, descriptors, percentile, resident};
use crate::server::{config, Server, TOTAL};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, LocalSegment};

/// What an iteration moves.
struct Load {
    name: &'static str,
    /// Bytes of an operation, by the number of connections, and how many operations each connection has in flight.
    operation: fn(usize) -> (usize, usize),
}

const LOADS: [Load; 3] = [
    // 64 MiB, cut over the connections: the bytes in flight are the same for any number of them.
    Load { name: "cut", operation: |count| (TOTAL / count, 1) },
    // 64 operations of 1 MiB, dealt to the connections.
    Load { name: "small", operation: |count| (1 << 20, (64 / count).max(1)) },
    // Each connection moves 64 MiB.
    Load { name: "large", operation: |_| (TOTAL, 1) },
];

/// The connections of a row, and the memory that they move.
struct Crew<'a> {
    connections: &'a [Arc<Connection>],
    mr: u64,
    base: usize,
    item: FifoItem,
}

impl Crew<'_> {
    /// The bytes from `at` on, round the end of the buffer.
    fn segments(&self, at: usize, len: usize) -> Vec<(LocalSegment, FifoItem)> {
        let first = len.min(TOTAL - at);
        let parts = [(at, first), (0, len - first)].into_iter().filter(|&(_, len)| len > 0);
        let segments = parts.map(|(at, len)| {
            let local = LocalSegment { mr: self.mr, addr: self.base + at, len };
            (local, FifoItem { addr: self.item.addr + at as u64, ..self.item })
        });
        segments.collect()
    }

    /// Every operation of one iteration, from the start to the end; each begins elsewhere in the buffer.
    fn once(&self, direction: Direction, (len, each): (usize, usize)) {
        let mut ids = Vec::with_capacity(self.connections.len() * each);
        for n in 0..each {
            for (k, connection) in self.connections.iter().enumerate() {
                let at = (n * self.connections.len() + k) * TOTAL / (self.connections.len() * each);
                ids.push((connection, connection.transfer(direction, self.segments(at, len).into_iter()).expect("transfer")));
            }
        }
        for (connection, id) in ids {
            assert!(connection.wait(id, None).expect("wait").complete);
        }
    }
}

/// The rate of one process over so many connections to another, for each load.
pub fn connections(seconds: f64, counts: &[usize], loads: &str, operations: &str) {
    let server = Server::start(None);
    let engine = Engine::new(config(None)).expect("engine");
    let mut buffer = vec![4u8; TOTAL];
    let mr = engine.register(buffer.as_mut_ptr() as usize, TOTAL).expect("register");
    let base = buffer.as_mut_ptr() as usize;
    let processes = [std::process::id(), server.pid()];
    let mut connections = vec![server.connect(&engine)];
    let before = processes.map(|pid| (descriptors(pid) as f64, resident(pid)));
    for &count in counts {
        while connections.len() < count {
            connections.push(server.connect(&engine));
        }
        let crew = Crew { connections: &connections[..count], mr, base, item: server.item };
        for load in LOADS.iter().filter(|load| loads.contains(load.name)) {
            let operation = (load.operation)(count);
            for direction in [Direction::Write, Direction::Read].into_iter().filter(|&d| operations.contains(name(d))) {
                row(seconds, &crew, (load.name, operation, direction), processes);
            }
        }
    }
    let more = (connections.len() - 1).max(1) as f64;
    let after = processes.map(|pid| (descriptors(pid) as f64, resident(pid)));
    for (side, i) in [("initiator", 0), ("target", 1)] {
        println!(
            "{{\"row\": \"connection\", \"side\": \"{side}\", \"descriptors_per_connection\": {:.1}, \"kib_per_connection\": {:.1}}}",
            (after[i].0 - before[i].0) / more,
            (after[i].1 - before[i].1) / more / 1024.0
        );
    }
}

fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Write => "write",
        Direction::Read => "read",
    }
}

fn row(seconds: f64, crew: &Crew, (load, operation, direction): (&str, (usize, usize), Direction), processes: [u32; 2]) {
    let bytes = operation.0 * operation.1 * crew.connections.len();
    let cpu = || processes.map(cpu_seconds).iter().sum::<f64>();
    (0..2).for_each(|_| crew.once(direction, operation));
    let used = cpu();
    let mut times = Vec::new();
    let began = Instant::now();
    while times.len() < 3 || began.elapsed().as_secs_f64() < seconds {
        let started = Instant::now();
        crew.once(direction, operation);
        times.push(started.elapsed().as_secs_f64());
    }
    let used = cpu() - used;
    times.sort_by(f64::total_cmp);
    println!(
        "{{\"row\": \"connections\", \"load\": \"{load}\", \"op\": \"{}\", \"connections\": {}, \"channels\": {}, \"gbytes_per_s\": {:.3}, \"p99_us\": {:.0}, \
         \"cpu_s_per_gib\": {:.4}}}",
        name(direction),
        crew.connections.len(),
        crew.connections[0].channels(),
        bytes as f64 / percentile(&times, 50.0) / 1e9,
        percentile(&times, 99.0) * 1e6,
        used * (1u64 << 30) as f64 / (bytes * times.len()) as f64
    );
}

/// Processes that send to one, and the sizes of their writes in turn. Each has so many bytes in flight.
const SENDERS: usize = 16;
const SIZES: [usize; 4] = [256 << 10, 1 << 20, 4 << 20, 16 << 20];
const IN_FLIGHT: usize = 32 << 20;
/// Time after the start that does not count, and the time over which shares are compared.
const WARM_UP: Duration = Duration::from_millis(500);
const WINDOW: Duration = Duration::from_secs(1);

/// A process that sends.
struct Sender {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Sender {
    fn start(address: &str, size: usize, windows: usize) -> Sender {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command.args(["stream", address, &size.to_string(), &windows.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a sender");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut sender = Sender { child, output };
        assert_eq!(sender.line(), "ready");
        sender
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the sender speaks");
        line.trim().to_owned()
    }

    fn go(&mut self) {
        writeln!(self.child.stdin.as_mut().expect("piped"), "go").expect("the sender reads");
    }
}

/// Jain's index: 1 where all get the same, 1/n where one gets everything.
fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = (shares.iter().sum::<f64>(), shares.iter().map(|x| x * x).sum::<f64>());
    sum * sum / (shares.len() as f64 * squares)
}

/// Sixteen processes write to one, with mixed sizes: how equal their shares are each second, and a 4 KiB write of this process beside them.
pub fn senders(seconds: f64) {
    let windows = (seconds.ceil() as usize).max(3);
    let server = Server::start(None);
    let initiator = Initiator::new(&server.address);
    let small = (Direction::Write, 4096, Duration::from_millis(1));
    let alone = initiator.alone(seconds / 2.0, small);
    let sizes = SIZES.iter().cycle().take(SENDERS);
    let mut senders: Vec<Sender> = sizes.map(|&size| Sender::start(&server.address, size, windows)).collect();
    senders.iter_mut().for_each(Sender::go);
    let mut beside = Vec::new();
    let until = Instant::now() + WARM_UP + WINDOW * windows as u32;
    initiator.until(small, usize::MAX, &mut beside, || Instant::now() >= until);
    beside.sort_by(f64::total_cmp);
    let number = |word: &str| word.parse::<f64>().expect("bytes of a window");
    let shares: Vec<Vec<f64>> = senders.iter_mut().map(|sender| sender.line().split(' ').map(number).collect()).collect();
    senders.iter_mut().for_each(|sender| assert!(sender.child.wait().expect("a sender").success()));
    let each = |window: usize| shares.iter().map(|of| of[window]).collect::<Vec<f64>>();
    let mut indices: Vec<f64> = (0..windows).map(|window| jain(&each(window))).collect();
    indices.sort_by(f64::total_cmp);
    let total: f64 = shares.iter().flatten().sum();
    println!(
        "{{\"row\": \"senders\", \"senders\": {SENDERS}, \"gbytes_per_s\": {:.3}, \"jain_p50\": {:.3}, \"jain_worst\": {:.3}, \
         \"alone_p50_us\": {:.1}, \"alone_p99_us\": {:.1}, \"beside_p50_us\": {:.1}, \"beside_p99_us\": {:.1}, \"samples\": {}}}",
        total / (WINDOW.as_secs_f64() * windows as f64) / 1e9,
        percentile(&indices, 50.0),
        indices[0],
        percentile(&alone, 50.0),
        percentile(&alone, 99.0),
        percentile(&beside, 50.0),
        percentile(&beside, 99.0),
        beside.len()
    );
}

/// One of the senders: writes of so many bytes, one after another, until told to begin and for so many windows; prints the bytes of each.
pub fn stream(address: &str, size: usize, windows: usize) -> ExitCode {
    let initiator = Initiator::new(address);
    initiator.wait(initiator.start(Direction::Write, size, 1));
    println!("ready");
    std::io::stdin().lock().read_line(&mut String::new()).expect("go");
    let began = Instant::now();
    let (mut flying, mut done, mut marks) = (VecDeque::new(), 0u64, Vec::new());
    while marks.len() <= windows {
        while flying.len() < IN_FLIGHT / size {
            flying.push_back(initiator.start(Direction::Write, size, 1));
        }
        if let Some(&oldest) = flying.front() {
            if initiator.waits(oldest, Duration::from_millis(5)) {
                flying.pop_front();
                done += size as u64;
            }
        }
        if began.elapsed() >= WARM_UP + WINDOW * marks.len() as u32 {
            // What is in flight counts as far as it has come.
            marks.push(done + flying.iter().map(|&id| initiator.bytes_done(id)).sum::<u64>());
        }
    }
    let moved: Vec<String> = marks.windows(2).map(|pair| (pair[1] - pair[0]).to_string()).collect();
    println!("{}", moved.join(" "));
    ExitCode::SUCCESS
}
