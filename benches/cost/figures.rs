//! Figures of processes and of times.

use std::time::{Duration, Instant};

/// CPU seconds of a process: the kernel's CPU clock of it, in nanoseconds.
pub fn cpu_seconds(pid: u32) -> f64 {
    let clock = (!(pid as libc::clockid_t) << 3) | 2;
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: t is writable.
    assert_eq!(unsafe { libc::clock_gettime(clock, &mut t) }, 0, "CPU clock of process {pid}");
    t.tv_sec as f64 + 1e-9 * t.tv_nsec as f64
}

/// Resident bytes of a process.
pub fn resident(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
    let line = text.lines().find(|l| l.starts_with("Rss:")).expect("Rss");
    line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).expect("a number") * 1024.0
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count()
}

/// The value that so many percent do not exceed.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    sorted[((sorted.len() as f64 * p / 100.0).ceil() as usize).clamp(1, sorted.len()) - 1]
}

/// Sorted durations of an operation in microseconds, for `seconds` at least; a pause after each.
pub fn time_all(seconds: f64, pause: Duration, mut once: impl FnMut()) -> Vec<f64> {
    (0..50).for_each(|_| once());
    let mut times = Vec::new();
    let began = Instant::now();
    while times.len() < 200 || began.elapsed().as_secs_f64() < seconds {
        let started = Instant::now();
        once();
        times.push(started.elapsed().as_secs_f64() * 1e6);
        std::thread::sleep(pause);
    }
    times.sort_by(f64::total_cmp);
    times
}
