//! Engines of this process over one interface; control of child processes, and figures from /proc.
#![allow(dead_code)] // each test target uses its part

use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::{Connection, Engine};

/// Control and data take this interface.
pub const NIC: &str = "UCCL_TEST_NIC";

pub fn set_environment() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let nic = std::env::var(NIC).unwrap_or_else(|_| "lo".to_owned());
        for name in ["NCCL_SOCKET_IFNAME", "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME"] {
            // SAFETY: before any engine exists; tests wait for this Once.
            unsafe { std::env::set_var(name, &nic) };
        }
        // Most tests are about channels. Tests of direct transfers turn them on.
        if std::env::var_os("UCCL_P2P_DISABLE_IPC").is_none() {
            // SAFETY: as above.
            unsafe { std::env::set_var("UCCL_P2P_DISABLE_IPC", "1") };
        }
    });
}

pub fn config() -> Config {
    set_environment();
    Config { plugin: PluginChoice::Soft, ..Config::from_env().expect("configuration") }
}

pub fn port(engine: &Engine) -> u16 {
    let metadata = engine.metadata();
    metadata.split('?').next().and_then(|address| address.rsplit_once(':')?.1.parse().ok()).expect("port in the metadata")
}

/// A connection between two engines of this process: both ends.
pub fn pair(a: &Engine, b: &Engine) -> (Arc<Connection>, Arc<Connection>) {
    let out = a.connect("127.0.0.1", "", port(b)).expect("connect");
    (out, b.accept().expect("accept"))
}

/// Looks until it is true, or time is over.
pub fn until(limit: Duration, mut is: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !is() {
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Sends a signal. After SIGSTOP all threads of the child stand when this returns.
pub fn signal(child: &Child, signal: i32) {
    // SAFETY: our own child, which a live `Child` has not been waited for; no status is asked for.
    unsafe {
        libc::kill(child.id() as i32, signal);
        if signal == libc::SIGSTOP {
            libc::waitid(libc::P_PID, child.id(), std::ptr::null_mut(), libc::WSTOPPED);
        }
    }
}

/// Random numbers, the same for the same seed, which is not 0.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 16) % n.max(1) as u64) as usize
    }
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

// ---- figures from /proc ----

/// Resident memory of a process in KiB.
pub fn resident(process: u32) -> usize {
    field(process, "VmRSS:")
}

/// Its threads.
pub fn threads(process: u32) -> usize {
    field(process, "Threads:")
}

fn field(process: u32, name: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Its open descriptors.
pub fn descriptors(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).map_or(0, Iterator::count)
}

/// Processor time that a process has used, in clock ticks.
pub fn ticks(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
