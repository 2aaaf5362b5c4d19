//! The lines of tcpx-perf's --interval: rate and latency of all clients of a row, from the warm-up on.

use crate::api::Link;
use crate::case::Case;
use crate::stats::{gbytes_per_s, Times};
use crate::units::show_us;
use std::sync::{mpsc, Arc, Mutex};
use std::time::{Duration, Instant};

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It allocates and fills buffers.
    Preparing,
    /// Its iterations do not count for the row.
    WarmUp,
    /// It waits for the other clients.
    Ready,
    /// Its iterations count.
    Timed,
    /// It compares contents, or has ended.
    Over,
}

/// A client, as the lines see it.
struct Seat {
    phase: Phase,
    /// When bytes were last seen to move, or could not yet.
    moved: Instant,
    /// Bytes by the counters of its connection at the last line.
    bytes: u64,
}

/// What happened since the last line.
struct Since {
    times: Times,
    /// Some of the iterations were of the warm-up.
    warm_up: bool,
    seats: Vec<Seat>,
}

/// Collects the iterations of all clients of a row.
pub struct Meter {
    case: Case,
    links: Vec<Arc<Link>>,
    since: Mutex<Since>,
}

impl Meter {
    /// For clients with these connections.
    pub fn new(case: &Case, links: Vec<Arc<Link>>) -> Meter {
        let now = Instant::now();
        let seat = |link: &Arc<Link>| Seat { phase: Phase::Preparing, moved: now, bytes: link.carried().sum() };
        let seats = links.iter().map(seat).collect();
        Meter { case: *case, since: Mutex::new(Since { times: Times::new(), warm_up: false, seats }), links }
    }

    /// Client number `client` has completed an iteration.
    pub fn record(&self, client: usize, time: Duration) {
        let mut since = self.since.lock().expect("no holder panics");
        let seat = &mut since.seats[client];
        seat.moved = Instant::now();
        let phase = seat.phase;
        if phase < Phase::Over {
            since.times.record(time);
            since.warm_up |= phase < Phase::Timed;
        }
    }

    /// Client number `client` begins a phase.
    pub fn enter(&self, client: usize, phase: Phase) {
        let seat = &mut self.since.lock().expect("no holder panics").seats[client];
        (seat.phase, seat.moved) = (phase, Instant::now());
    }

    /// Calls `body`, and prints a line to standard error at each interval until it has returned: a transfer that stands ends no iteration.
    pub fn watch<T>(&self, every: Duration, body: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            let (_over, ended) = mpsc::channel::<()>();
            scope.spawn(move || {
                let started = Instant::now();
                let mut last = started;
                while let Err(mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(every.saturating_sub(last.elapsed())) {
                    let now = Instant::now();
                    eprintln!("{:8.1} s  {}", (now - started).as_secs_f64(), self.line(now - last));
                    last = now;
                }
            });
            body()
        })
    }

    /// What happened in the last `span`, as text; begins anew.
    fn line(&self, span: Duration) -> String {
        let sums: Vec<u64> = self.links.iter().map(|link| link.carried().sum()).collect();
        let mut since = self.since.lock().expect("no holder panics");
        let now = Instant::now();
        for (seat, sum) in since.seats.iter_mut().zip(sums) {
            if sum != seat.bytes {
                (seat.moved, seat.bytes) = (now, sum);
            }
        }
        let (times, warm_up) = (std::mem::take(&mut since.times), std::mem::take(&mut since.warm_up));
        let seats: Vec<(Phase, Duration)> = since.seats.iter().map(|seat| (seat.phase, now - seat.moved)).collect();
        drop(since);
        said(&self.case, &times, warm_up, &seats, span)
    }
}

/// The line about `span`: iterations, whether some were of the warm-up, and for each client its phase and for how long nothing has moved.
fn said(case: &Case, times: &Times, warm_up: bool, seats: &[(Phase, Duration)], span: Duration) -> String {
    let clients = seats.len();
    let bytes = case.total * u64::from(case.inflight) * (1 + u64::from(case.bidirectional)) * times.count();
    let rate = gbytes_per_s(bytes, span.as_secs_f64() * 1e6);
    let moving = |&&(phase, _): &&(Phase, Duration)| phase == Phase::WarmUp || phase == Phase::Timed;
    let least = seats.iter().map(|&(phase, _)| phase).min().unwrap_or(Phase::Over);
    let standing: Vec<Duration> =
        seats.iter().filter(moving).map(|&(_, stands)| stands).filter(|&stands| stands >= span).collect();
    let longest = standing.iter().max().map_or(0.0, Duration::as_secs_f64);
    let mut what = match times.count() {
        0 if least == Phase::Preparing => "preparing".to_owned(),
        0 if least == Phase::Over => "checking".to_owned(),
        0 if standing.len() == clients => format!("stands for {longest:.1} s"),
        0 => "under way".to_owned(),
        _ => format!("p50 {:>10} us  p99 {:>10} us", show_us(times.at(0.5)), show_us(times.at(0.99))),
    };
    if clients > 1 && !standing.is_empty() && standing.len() < clients {
        what += &format!("  {} of {clients} clients: stands for {longest:.1} s", standing.len());
    }
    let mut line = format!("{rate:9.3} GB/s  {what}  {case}");
    if clients > 1 {
        line += &format!(", {clients} clients");
    }
    if warm_up || (times.count() == 0 && least == Phase::WarmUp) {
        line += ", warm-up";
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Op;

    const CASE: Case = Case { op: Op::Write, total: 1_000_000, block: 1_000_000, inflight: 1, bidirectional: false };
    const SECOND: Duration = Duration::from_secs(1);

    fn line(iterations: u64, warm_up: bool, seats: &[(Phase, u64)]) -> String {
        let mut times = Times::new();
        (0..iterations).for_each(|_| times.record(Duration::from_micros(500)));
        let seats: Vec<(Phase, Duration)> = seats.iter().map(|&(phase, ms)| (phase, Duration::from_millis(ms))).collect();
        said(&CASE, &times, warm_up, &seats, SECOND)
    }

    #[test]
    fn a_line_says_what_happens() {
        use Phase::{Over, Preparing, Ready, Timed, WarmUp};
        for (iterations, warm_up, seats, says) in [
            (0, false, &[(Preparing, 5000)][..], "    0.000 GB/s  preparing  write 1000000 B"),
            (0, false, &[(WarmUp, 0)], "    0.000 GB/s  under way  write 1000000 B, warm-up"),
            (0, false, &[(WarmUp, 1500)], "    0.000 GB/s  stands for 1.5 s  write 1000000 B, warm-up"),
            (0, false, &[(Timed, 2500)], "    0.000 GB/s  stands for 2.5 s  write 1000000 B"),
            (0, false, &[(Over, 9000)], "    0.000 GB/s  checking  write 1000000 B"),
            (0, false, &[(Ready, 9000), (Preparing, 9000)], "    0.000 GB/s  preparing  write 1000000 B, 2 clients"),
            (0, false, &[(Timed, 2000), (Timed, 3000)], "    0.000 GB/s  stands for 3.0 s  write 1000000 B, 2 clients"),
        ] {
            assert_eq!(line(iterations, warm_up, seats), says);
        }
        let all = line(2000, false, &[(Timed, 0), (Timed, 0)]);
        assert!(all.starts_with("    2.000 GB/s  p50      ") && all.ends_with(" us  write 1000000 B, 2 clients"), "{all}");
        let one = line(2000, false, &[(Timed, 0), (Timed, 4000), (Timed, 0)]);
        assert!(one.contains("  1 of 3 clients: stands for 4.0 s  write"), "{one}");
        // One that waits for the others does not stand.
        assert!(!line(10, true, &[(WarmUp, 0), (Ready, 4000)]).contains("stands"));
        assert!(line(10, true, &[(Timed, 0)]).ends_with("write 1000000 B, warm-up"));
    }
}
