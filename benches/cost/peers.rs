//! Many connections of one process to one peer: the rate over all of them, CPU, descriptors and memory.

use crate::figures::{cpu_seconds, descriptors, percentile, resident};
use crate::server::{config, Server, TOTAL};
use std::sync::Arc;
use std::time::Instant;
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
pub fn connections(seconds: f64, counts: &[usize], loads: &str) {
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
            for direction in [Direction::Write, Direction::Read] {
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

fn row(seconds: f64, crew: &Crew, (name, operation, direction): (&str, (usize, usize), Direction), processes: [u32; 2]) {
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
        "{{\"row\": \"connections\", \"load\": \"{name}\", \"op\": \"{}\", \"connections\": {}, \"channels\": {}, \"gbytes_per_s\": {:.3}, \"p99_us\": {:.0}, \
         \"cpu_s_per_gib\": {:.4}}}",
        if direction == Direction::Write { "write" } else { "read" },
        crew.connections.len(),
        crew.connections[0].channels(),
        bytes as f64 / percentile(&times, 50.0) / 1e9,
        percentile(&times, 99.0) * 1e6,
        used * (1u64 << 30) as f64 / (bytes * times.len()) as f64
    );
}
