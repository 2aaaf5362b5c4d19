//! Throughput of the software plugin between two processes on this machine:
//! `loopback_bench CHANNELS BYTES_PER_ROUND ROUNDS [CHUNK_BYTES]`. Prints the median round and its GB/s, and with
//! `CHUNK_BYTES` of 0 the latency of a small message instead. `PROTECT=1` in the environment protects messages by checksums,
//! `PROTECT=2` by AES-256-GCM. CPU seconds are those of both processes.

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::ptr;
use std::time::Instant;

use common::*;
use nccl_net_abi::*;

struct Flow {
    comm: Opaque,
    mhandle: Opaque,
    /// Requests that are posted and not done.
    open: std::collections::VecDeque<Opaque>,
    left: usize,
    at: usize,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize, default| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (channels, total, rounds, chunk) = (number(1, 4), number(2, 64 << 20), number(3, 50), number(4, 512 << 10));
    if args.get(5).map(String::as_str) == Some("receive") {
        receive(channels, total, rounds, chunk);
    } else {
        send(channels, total, rounds, chunk, &args);
    }
}

fn init() {
    if std::env::var_os("NCCL_SOCKET_IFNAME").is_none() {
        std::env::set_var("NCCL_SOCKET_IFNAME", "lo");
    }
    // SAFETY: no logger.
    assert_eq!(unsafe { soft_plugin::table().init.unwrap()(None) }, NCCL_SUCCESS);
}

/// Sets the protection of a comm from the environment.
fn protect(comm: Opaque) {
    let level = std::env::var("PROTECT").ok().and_then(|level| level.parse().ok()).unwrap_or(0);
    if level > 0 {
        // One key for all comms is safe only because the bytes are always the same.
        let key = [7u8; 32];
        // SAFETY: a live comm and key.
        assert_eq!(unsafe { soft_plugin::ext().protect.unwrap()(comm, level, key.as_ptr()) }, NCCL_SUCCESS);
    }
}

/// CPU seconds of this process, or of its children that have ended.
fn cpu_seconds(whose: i32) -> f64 {
    // SAFETY: plain data for which zeros are valid, and a place for it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(whose, &mut usage), 0);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn flows(comms: Vec<Opaque>, buffer: &[u8], share: usize) -> Vec<Flow> {
    let flow = |(i, comm)| Flow {
        comm,
        mhandle: reg(comm, buffer.as_ptr(), buffer.len(), NCCL_PTR_HOST).unwrap(),
        open: Default::default(),
        left: 0,
        at: i * share,
    };
    comms.into_iter().enumerate().map(flow).collect()
}

/// Moves `share` bytes over every channel.
fn round(flows: &mut [Flow], share: usize, chunk: usize, base: *mut u8, bell: &Doorbell, receiving: bool) {
    for flow in flows.iter_mut() {
        flow.left = share;
    }
    loop {
        let moved = pass(flows, share, chunk, base, receiving);
        if flows.iter().all(|f| f.left == 0 && f.open.is_empty()) {
            return;
        }
        if !moved {
            bell.sleep_unless(|| pass(flows, share, chunk, base, receiving));
        }
    }
}

fn pass(flows: &mut [Flow], share: usize, chunk: usize, base: *mut u8, receiving: bool) -> bool {
    let mut moved = false;
    for flow in flows.iter_mut() {
        while let Some(&request) = flow.open.front() {
            if test(request).expect("test").is_none() {
                break;
            }
            moved = true;
            flow.open.pop_front();
            if receiving {
                // SAFETY: a live comm and its request.
                assert_eq!(unsafe { soft_plugin::table().irecvConsumed.unwrap()(flow.comm, 1, request) }, NCCL_SUCCESS);
            }
        }
        while flow.left > 0 && flow.open.len() < MAX_REQUESTS {
            let len = flow.left.min(chunk);
            let mut data = base.wrapping_add(flow.at + share - flow.left).cast();
            let (mut size, mut tag, mut request) = (len as i32, 0, ptr::null_mut());
            // SAFETY: inside the buffer, which lives until the end.
            let code = unsafe {
                if receiving {
                    let net = soft_plugin::table();
                    net.irecv.unwrap()(flow.comm, 1, &mut data, &mut size, &mut tag, &mut flow.mhandle, &mut request)
                } else {
                    soft_plugin::table().isend.unwrap()(flow.comm, data, size, 0, flow.mhandle, &mut request)
                }
            };
            assert_eq!(code, NCCL_SUCCESS);
            assert!(!request.is_null());
            flow.open.push_back(request);
            flow.left -= len;
            moved = true;
        }
    }
    moved
}

fn send(channels: usize, total: usize, rounds: usize, chunk: usize, args: &[String]) {
    init();
    let plain = [channels, total, rounds, chunk].map(|n| n.to_string());
    let mut child =
        Command::new(&args[0]).args(plain).arg("receive").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut senders = Vec::new();
    for _ in 0..channels {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let bytes: Vec<u8> =
            line.trim().as_bytes().chunks(2).map(|h| u8::from_str_radix(std::str::from_utf8(h).unwrap(), 16).unwrap()).collect();
        let mut handle: Handle = bytes.try_into().unwrap();
        senders.push(connect(&mut handle));
        protect(senders.last().map_or(ptr::null_mut(), |s| s.0));
    }
    let small = chunk == 0;
    let (share, chunk) = if small { (total, total) } else { (total / channels, chunk) };
    let mut buffer = vec![1u8; share * channels];
    let bell = Doorbell::new();
    let mut flows = flows(senders.iter().map(|s| s.0).collect(), &buffer, share);
    senders.iter().for_each(|s| bell.attach(s.0));
    let mut times = Vec::new();
    for i in 0..rounds + 3 {
        let start = Instant::now();
        round(&mut flows, share, chunk, buffer.as_mut_ptr(), &bell, false);
        let mut ack = [0];
        lines.read_exact(&mut ack).unwrap();
        if i >= 3 {
            times.push(start.elapsed());
        }
    }
    times.sort();
    let median = times[times.len() / 2];
    let rate = (share * channels) as f64 / median.as_secs_f64() / 1e9;
    drop(senders);
    assert!(child.wait().unwrap().success());
    let cpu = cpu_seconds(libc::RUSAGE_SELF) + cpu_seconds(libc::RUSAGE_CHILDREN);
    let gib = (share * channels * (rounds + 3)) as f64 / f64::from(1 << 30);
    println!(
        "soft plugin, {channels} channels, {} bytes: median {} us, {rate:.2} GB/s, {:.3} CPU s/GiB",
        share * channels,
        median.as_micros(),
        cpu / gib
    );
}

fn receive(channels: usize, total: usize, rounds: usize, chunk: usize) {
    init();
    let mut out = std::io::stdout();
    let listeners: Vec<_> = (0..channels).map(|_| listen()).collect();
    for (_, handle) in &listeners {
        let hex: String = handle.iter().map(|b| format!("{b:02x}")).collect();
        writeln!(out, "{hex}").unwrap();
    }
    let receivers: Vec<_> = listeners.iter().map(|(l, _)| accept(*l)).collect();
    receivers.iter().for_each(|r| protect(r.comm));
    let (share, chunk) = if chunk == 0 { (total, total) } else { (total / channels, chunk) };
    let mut buffer = vec![0u8; share * channels];
    let bell = Doorbell::new();
    let mut flows = flows(receivers.iter().map(|r| r.comm).collect(), &buffer, share);
    receivers.iter().for_each(|r| bell.attach(r.comm));
    for _ in 0..rounds + 3 {
        round(&mut flows, share, chunk, buffer.as_mut_ptr(), &bell, true);
        out.write_all(b"+").unwrap();
        out.flush().unwrap();
    }
    assert!(buffer.iter().all(|b| *b == 1));
    listeners.iter().for_each(|(l, _)| close_listen(*l));
}
