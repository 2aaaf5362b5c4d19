//! The progress thread of an engine: drives every connection while there is work, spins briefly for the next piece of it, then
//! sleeps in epoll. While an application thread polls, it stays out of the way.

use super::connection::Connection;
use super::shared::{Shared, WAKE};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Deadlines and heartbeats are looked at this often.
const TICK: Duration = Duration::from_millis(50);
/// Sleep while an application thread drives.
const STAND_BY: Duration = Duration::from_micros(200);
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

/// Runs until the engine closes.
pub(crate) fn run(shared: &Arc<Shared>) {
    block_signals();
    let spin = shared.config.spin.unwrap_or_else(default_spin);
    let few_cores = std::thread::available_parallelism().map_or(2, usize::from) <= 2;
    let doorbells = shared.plugin.is_soft();
    let mut connections: Vec<Arc<Connection>> = Vec::new();
    let mut backlogged: HashMap<u64, bool> = HashMap::new();
    let mut seen = u64::MAX;
    let mut last_activity = Instant::now();
    let mut last_tick = Instant::now();
    let mut tokens = Vec::new();
    while !shared.closing.load(Ordering::Acquire) {
        let generation = shared.generation.load(Ordering::Acquire);
        if generation != seen {
            seen = generation;
            connections = shared.all();
        }
        let now = Instant::now();
        if now - last_tick >= TICK {
            last_tick = now;
            for connection in &connections {
                connection.tick(now);
            }
        }
        if shared.driven_by_application() {
            std::thread::sleep(STAND_BY);
            continue;
        }
        let round = drive(shared, &connections, &mut backlogged);
        if round.any {
            last_activity = Instant::now();
            continue;
        }
        // With doorbells the channels' threads wake us; on few cores spinning would only take theirs.
        let wait_for_lanes = round.lanes_busy && doorbells && few_cores;
        if !wait_for_lanes && now - last_activity < spin {
            std::hint::spin_loop();
            continue;
        }
        if round.busy && !doorbells {
            // A plugin that must be polled to move.
            std::thread::yield_now();
            continue;
        }
        shared.arm(true);
        // What happened before the arming rang nobody.
        if drive(shared, &connections, &mut backlogged).any || shared.generation.load(Ordering::Acquire) != seen {
            shared.arm(false);
            last_activity = Instant::now();
            continue;
        }
        shared.wait_events(if connections.is_empty() { IDLE } else { TICK }, &mut tokens);
        shared.arm(false);
        if tokens.iter().any(|&t| t != WAKE) {
            last_activity = Instant::now();
        }
    }
}

struct Round {
    any: bool,
    busy: bool,
    lanes_busy: bool,
}

fn drive(shared: &Shared, connections: &[Arc<Connection>], backlogged: &mut HashMap<u64, bool>) -> Round {
    let mut round = Round { any: false, busy: false, lanes_busy: false };
    for connection in connections {
        let p = connection.progress();
        round.any |= p.any;
        round.busy |= p.busy;
        round.lanes_busy |= p.lanes_busy;
        let was = backlogged.entry(connection.id).or_insert(false);
        if *was != p.backlog {
            *was = p.backlog;
            shared.watch_writable(connection, p.backlog);
        }
    }
    round
}
