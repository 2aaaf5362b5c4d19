//! The progress thread of an engine: drives every connection while there is work, spins briefly for the next piece of it, then
//! sleeps in epoll. A connection that an application thread polls is left to that thread.

use super::connection::Connection;
use super::shared::{Shared, WAKE};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Deadlines and heartbeats are looked at this often.
const TICK: Duration = Duration::from_millis(50);
/// Sleep while an application thread drives a connection: it may stop at any time, so as long as it has driven until now, within these
/// bounds. Each look takes its core for some 20 microseconds: one in two milliseconds stays outside of the p99 of small operations.
const STAND_BY: [Duration; 2] = [Duration::from_micros(400), Duration::from_millis(2)];
/// Longest sleep without a connection.
const IDLE: Duration = Duration::from_secs(10);

/// Default of UCCL_TCPX_SPIN_US: the time in which a peer's next small request is likely. Sleeping and waking costs tens of
/// microseconds on virtual machines.
fn default_spin() -> Duration {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    Duration::from_micros(if cores > 2 { 100 } else { 50 })
}

/// Blocks every signal in the calling thread: plugins raise SIGPIPE, and handlers are the application's.
pub(crate) fn block_signals() {
    // SAFETY: a local, fully initialised set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// A connection as this thread sees it.
struct Watched {
    connection: Arc<Connection>,
    /// What wakes this thread for it.
    interest: i32,
    /// An application thread drives it at present.
    driven: bool,
}

impl Watched {
    fn watch(&mut self, shared: &Shared, interest: i32) {
        if self.interest != interest {
            self.interest = interest;
            shared.watch(&self.connection, interest);
        }
    }
}

#[derive(Default)]
struct Round {
    any: bool,
    busy: bool,
    lanes_busy: bool,
    copying: bool,
    /// An application thread drives some connection; the shortest time for which one does.
    driven: Option<Duration>,
}

/// One round over all connections but those that an application thread drives.
fn drive(shared: &Shared, watched: &mut [Watched]) -> Round {
    let mut round = Round::default();
    for w in watched {
        let driven = w.connection.driven_by_application();
        w.driven = driven.is_some();
        if let Some(since) = driven {
            round.driven = Some(round.driven.map_or(since, |other| other.min(since)));
            w.watch(shared, 0);
            continue;
        }
        let p = w.connection.progress();
        round.any |= p.any;
        round.busy |= p.busy;
        round.lanes_busy |= p.lanes_busy;
        round.copying |= p.copying;
        w.watch(shared, if p.backlog { libc::EPOLLIN | libc::EPOLLOUT } else { libc::EPOLLIN });
    }
    round
}

/// Lets the doorbells ring that this thread answers for, or silences them all.
fn arm(shared: &Shared, watched: &[Watched], on: bool) {
    for w in watched {
        w.connection.arm(on && !w.driven);
    }
    shared.arm(on);
}

/// Runs until the engine closes.
pub(crate) fn run(shared: &Arc<Shared>) {
    block_signals();
    let spin = shared.config.spin.unwrap_or_else(default_spin);
    let few_cores = shared.few_cores;
    let doorbells = shared.plugin.traits.doorbell;
    let mut watched: Vec<Watched> = Vec::new();
    let mut seen = u64::MAX;
    let mut last_activity = Instant::now();
    let mut last_tick = Instant::now();
    let mut tokens = Vec::new();
    while !shared.closing.load(Ordering::Acquire) {
        let generation = shared.generation.load(Ordering::Acquire);
        if generation != seen {
            seen = generation;
            watched = shared.all().into_iter().map(|connection| Watched { connection, interest: -1, driven: false }).collect();
        }
        let now = Instant::now();
        if now - last_tick >= TICK {
            last_tick = now;
            for w in &watched {
                w.connection.tick(now);
            }
        }
        let round = drive(shared, &mut watched);
        if round.any {
            last_activity = Instant::now();
            continue;
        }
        // Nobody rings when a GPU has finished a copy.
        if round.copying {
            std::hint::spin_loop();
            continue;
        }
        // With doorbells the channels' threads wake us; on few cores spinning would only take theirs.
        let wait_for_lanes = (round.lanes_busy || round.driven.is_some()) && doorbells && few_cores;
        if !wait_for_lanes && now - last_activity < spin {
            std::hint::spin_loop();
            continue;
        }
        if round.busy && !doorbells {
            // A plugin that must be polled to move.
            std::thread::yield_now();
            continue;
        }
        arm(shared, &watched, true);
        // What happened before the arming rang nobody.
        if drive(shared, &mut watched).any || shared.generation.load(Ordering::Acquire) != seen {
            arm(shared, &watched, false);
            last_activity = Instant::now();
            continue;
        }
        let limit = if let Some(since) = round.driven {
            since.clamp(STAND_BY[0], STAND_BY[1])
        } else if watched.is_empty() {
            IDLE
        } else {
            TICK
        };
        shared.wait_events(limit, &mut tokens);
        arm(shared, &watched, false);
        if tokens.iter().any(|&t| t != WAKE) {
            last_activity = Instant::now();
        }
    }
}
