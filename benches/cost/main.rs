//! What the engine costs beside moving bytes: CPU while idle, time to connect, memory of connections and channels, the round trip of a
//! notification, the rate over many connections, the shares of many senders, a small operation beside a thousand idle connections, and one
//! beside a large transfer. Several processes; this program starts itself again as the passive side and as further senders.
//!
//! usage: cargo bench --bench cost -- [idle] [connect] [memory] [notify] [connections] [senders] [crowd] [line] [reads] [neighbour]
//!        [--seconds S] [--connections N,N] [--loads cut,small,large] [--ops write,read]
//!
//! Default: all of them, over channels; UCCL_P2P_DISABLE_IPC=0 measures direct transfers.
//!
//! Prints one JSON object a row. Exit status 1 when an idle engine uses more than half a percent of a core.

mod fairness;
mod figures;
mod peers;
mod server;

use figures::{cpu_seconds, percentile, resident, time_all};
use server::{config, Server, STOP};
use std::collections::VecDeque;
use std::io::BufRead;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, LocalSegment};

const IDLE_SECONDS: u64 = 5;
/// Some times of the time between heartbeats: a thousand connections that came up together are heard of together.
const CROWD_SECONDS: u64 = 20;
const IDLE_LIMIT_PERCENT: f64 = 0.5;

fn main() -> ExitCode {
    let mut words: VecDeque<String> = std::env::args().skip(1).filter(|w| w != "--bench").collect();
    // Both processes are on this host; the bench measures channels.
    for (name, value) in [("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo"), ("UCCL_P2P_DISABLE_IPC", "1")]
    {
        if std::env::var_os(name).is_none() {
            std::env::set_var(name, value);
        }
    }
    match words.make_contiguous() {
        [what, rest @ ..] if what == "serve" => return server::serve(rest.first().and_then(|w| w.parse().ok())),
        [what, address, seconds] if what == "flood" => return fairness::flood(address, seconds.parse().expect("seconds")),
        [what, address, size, windows] if what == "stream" => {
            let number = |word: &String| word.parse().expect("a number");
            return peers::stream(address, number(size), number(windows));
        }
        _ => {}
    }
    let mut seconds = 1.0;
    let mut counts = vec![1, 8, 64];
    let (mut loads, mut operations) = ("cut,small,large".to_owned(), "write,read".to_owned());
    let mut parts = Vec::new();
    while let Some(word) = words.pop_front() {
        if word == "--seconds" {
            seconds = words.pop_front().and_then(|w| w.parse().ok()).expect("--seconds S");
        } else if word == "--connections" {
            let words = words.pop_front().expect("--connections N,N");
            counts = words.split(',').map(|n| n.parse().expect("a number of connections")).collect();
        } else if word == "--loads" {
            loads = words.pop_front().expect("--loads cut,small,large");
        } else if word == "--ops" {
            operations = words.pop_front().expect("--ops write,read");
        } else {
            parts.push(word);
        }
    }
    run(&parts, seconds, &counts, [&loads, &operations])
}

/// Measures what is wanted; all of it where nothing is named.
fn run(parts: &[String], seconds: f64, counts: &[usize], [loads, operations]: [&str; 2]) -> ExitCode {
    let wanted = |name: &str| parts.is_empty() || parts.iter().any(|p| p == name);
    let mut good = true;
    if wanted("connect") {
        connect(seconds);
    }
    if wanted("memory") {
        memory();
    }
    if wanted("notify") {
        notify(seconds);
    }
    if wanted("connections") {
        peers::connections(seconds, counts, loads, operations);
    }
    if wanted("line") {
        fairness::line(seconds);
    }
    if wanted("reads") {
        fairness::reads(seconds);
    }
    if wanted("neighbour") {
        fairness::neighbour(seconds);
    }
    if wanted("senders") {
        peers::senders(seconds);
    }
    if wanted("crowd") {
        crowd(seconds);
    }
    if wanted("idle") {
        good &= idle();
    }
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn idle() -> bool {
    const CONNECTIONS: usize = 8;
    let server = Server::start(None);
    let engine = Engine::new(config(None)).expect("engine");
    let connections: Vec<_> = (0..CONNECTIONS).map(|_| server.connect(&engine)).collect();
    let mut buffer = vec![2u8; 1 << 20];
    let mr = engine.register(buffer.as_mut_ptr() as usize, buffer.len()).expect("register");
    for connection in &connections {
        move_slice(
            connection,
            Direction::Write,
            LocalSegment { mr, addr: buffer.as_ptr() as usize, len: buffer.len() },
            server.item,
        );
    }
    // Spinning after activity ends well before.
    std::thread::sleep(Duration::from_secs(1));
    let ids = [std::process::id(), server.pid()];
    let before = ids.map(cpu_seconds);
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(IDLE_SECONDS));
    let elapsed = started.elapsed().as_secs_f64();
    let after = ids.map(cpu_seconds);
    let percent: Vec<f64> = before.iter().zip(after).map(|(b, a)| (a - b) / elapsed * 100.0).collect();
    let good = percent.iter().all(|&p| p < IDLE_LIMIT_PERCENT);
    println!(
        "{{\"row\": \"idle\", \"connections\": {CONNECTIONS}, \"channels\": {}, \"seconds\": {elapsed:.2}, \"initiator_percent\": {:.4}, \
         \"target_percent\": {:.4}, \"limit_percent\": {IDLE_LIMIT_PERCENT}}}",
        connections[0].channels(),
        percent[0],
        percent[1]
    );
    good
}

fn connect(seconds: f64) {
    const CHANNELS: usize = 8;
    const REPEATS: usize = 20;
    let server = Server::start(Some(CHANNELS));
    let engine = Engine::new(config(Some(CHANNELS))).expect("engine");
    server.connect(&engine).close();
    let mut times = Vec::new();
    let began = Instant::now();
    while times.len() < REPEATS || began.elapsed().as_secs_f64() < seconds {
        let started = Instant::now();
        let connection = server.connect(&engine);
        times.push(started.elapsed().as_secs_f64() * 1e3);
        assert_eq!(connection.channels(), CHANNELS);
        connection.close();
    }
    times.sort_by(f64::total_cmp);
    println!(
        "{{\"row\": \"connect\", \"channels\": {CHANNELS}, \"repeats\": {}, \"p50_ms\": {:.3}, \"max_ms\": {:.3}}}",
        times.len(),
        percentile(&times, 50.0),
        times[times.len() - 1]
    );
}

/// Resident memory per connection, at both engines, with 1 and with 8 channels, after each connection has moved data both ways; what a
/// channel adds is the difference over seven.
fn memory() {
    const CONNECTIONS: usize = 32;
    let per_connection = |channels: usize| {
        let server = Server::start(Some(channels));
        let engine = Engine::new(config(Some(channels))).expect("engine");
        let mut buffer = vec![3u8; 8 << 20];
        let mr = engine.register(buffer.as_mut_ptr() as usize, buffer.len()).expect("register");
        let local = LocalSegment { mr, addr: buffer.as_mut_ptr() as usize, len: buffer.len() };
        let exercise = |c: &Connection| {
            move_slice(c, Direction::Write, local, server.item);
            move_slice(c, Direction::Read, local, server.item);
        };
        // The first one pays for what belongs to the process.
        let first = server.connect(&engine);
        exercise(&first);
        let ids = [std::process::id(), server.pid()];
        let before = ids.map(resident);
        let all: Vec<_> = (0..CONNECTIONS).map(|_| server.connect(&engine)).collect();
        let fresh = ids.map(resident);
        all.iter().for_each(|c| exercise(c));
        let used = ids.map(resident);
        let each = |now: [f64; 2]| [0, 1].map(|i| ((now[i] - before[i]) / CONNECTIONS as f64).max(0.0));
        (each(fresh), each(used))
    };
    let (one, eight) = (per_connection(1), per_connection(8));
    let kib = |bytes: f64| bytes / 1024.0;
    for (state, one, eight) in [("connected", one.0, eight.0), ("after 8 MiB each way", one.1, eight.1)] {
        for (side, i) in [("initiator", 0), ("target", 1)] {
            println!(
                "{{\"row\": \"memory\", \"state\": \"{state}\", \"side\": \"{side}\", \"kib_per_connection_1_channel\": {:.1}, \
                 \"kib_per_connection_8_channels\": {:.1}, \"kib_per_channel\": {:.1}}}",
                kib(one[i]),
                kib(eight[i]),
                kib((eight[i] - one[i]) / 7.0)
            );
        }
    }
}

fn notify(seconds: f64) {
    let mut server = Server::start(None);
    let engine = Engine::new(config(None)).expect("engine");
    let connection = server.connect(&engine);
    server.tell("echo");
    let mut line = String::new();
    server.output.read_line(&mut line).expect("the server answers");
    let mut times = Vec::new();
    let began = Instant::now();
    for i in 0.. {
        let started = Instant::now();
        connection.notify(b"bench", b"ping").expect("notify");
        while engine.next_notification().is_none() {
            std::thread::yield_now();
        }
        if i >= 100 {
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
        if times.len() >= 100 && began.elapsed().as_secs_f64() > seconds {
            break;
        }
    }
    connection.notify(b"bench", STOP).expect("notify");
    times.sort_by(f64::total_cmp);
    println!(
        "{{\"row\": \"notify\", \"iters\": {}, \"p50_us\": {:.2}, \"p99_us\": {:.2}}}",
        times.len(),
        percentile(&times, 50.0),
        percentile(&times, 99.0)
    );
}

fn move_slice(connection: &Connection, direction: Direction, local: LocalSegment, remote: FifoItem) {
    let id = connection.transfer(direction, std::iter::once((local, remote))).expect("transfer");
    assert!(connection.wait(id, None).expect("wait").complete);
}

/// A 4 KiB write that is polled, and a look for notifications that finds none, on one connection: alone, and beside 1,000 idle ones of
/// the same engines. And what those cost while nothing happens.
fn crowd(seconds: f64) {
    const IDLE: usize = 1000;
    let server = Server::start(Some(1));
    let engine = Engine::new(config(Some(1))).expect("engine");
    let buffer = vec![5u8; 4096];
    let mr = engine.register(buffer.as_ptr() as usize, buffer.len()).expect("register");
    let local = LocalSegment { mr, addr: buffer.as_ptr() as usize, len: buffer.len() };
    let connection = server.connect(&engine);
    let mut idle = Vec::new();
    for count in [0, IDLE] {
        while idle.len() < count {
            idle.push(server.connect(&engine));
        }
        std::thread::sleep(Duration::from_secs(1));
        let ids = [std::process::id(), server.pid()];
        let used = ids.map(cpu_seconds);
        let began = Instant::now();
        std::thread::sleep(Duration::from_secs(CROWD_SECONDS));
        let percent = [0, 1].map(|i| (cpu_seconds(ids[i]) - used[i]) / began.elapsed().as_secs_f64() * 100.0);
        let used = cpu_seconds(ids[1]);
        let ops = time_all(seconds, Duration::ZERO, || {
            let id = connection.transfer(Direction::Write, std::iter::once((local, server.item))).expect("transfer");
            while !connection.poll(id).expect("poll").complete {}
        });
        let server_us = (cpu_seconds(ids[1]) - used) * 1e6 / (ops.len() + 50) as f64;
        let looks = time_all(seconds, Duration::ZERO, || assert!(engine.next_notification().is_none()));
        println!(
            "{{\"row\": \"crowd\", \"idle_connections\": {count}, \"write_4k_p50_us\": {:.2}, \"write_4k_p99_us\": {:.2}, \
             \"target_cpu_us_per_write\": {server_us:.2}, \"no_notification_us\": {:.3}, \"idle_percent\": [{:.3}, {:.3}]}}",
            percentile(&ops, 50.0),
            percentile(&ops, 99.0),
            percentile(&looks, 50.0),
            percent[0],
            percent[1]
        );
    }
}
