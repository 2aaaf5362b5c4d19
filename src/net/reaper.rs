//! Connects and accepts that were given up while the plugin's own threads still use their memory: one background thread polls them
//! until they end. Knows nothing of what it polls.

use process::{Condvar, Mutex, PerProcess};
use std::time::{Duration, Instant};

/// Something to poll, which is told how long it has been kept: `true` when it has ended.
pub(super) type Orphan = Box<dyn FnMut(Duration) -> bool + Send>;

/// How often a young orphan is polled; older ones are polled more and more rarely, down to once in [`SLOW`].
const FAST: Duration = Duration::from_millis(5);
const SLOW: Duration = Duration::from_millis(500);

struct Kept {
    orphan: Orphan,
    since: Instant,
    due: Instant,
}

#[derive(Default)]
struct Nursery {
    kept: Vec<Kept>,
    running: bool,
}

/// Those of this process, and the bell for new ones. A forked child has a thread of its own for its own.
static NURSERY: PerProcess<(Mutex<Nursery>, Condvar)> = PerProcess::new(Default::default);

/// Polls `orphan` in the background until it has ended.
pub(super) fn keep(orphan: Orphan) {
    let (nursery, arrived) = NURSERY.get();
    let mut nursery = nursery.lock();
    let now = Instant::now();
    nursery.kept.push(Kept { orphan, since: now, due: now });
    if !nursery.running {
        match process::thread::spawn("uccl-reaper", run) {
            Ok(_) => nursery.running = true,
            // It is kept in memory, and the next arrival tries again.
            Err(e) => log::warn!("no thread for connects that were given up: {e}"),
        }
    }
    arrived.notify_one();
}

/// Number of orphans that have not ended.
#[cfg(test)]
pub(super) fn kept() -> usize {
    NURSERY.get().0.lock().kept.len()
}

fn run() {
    let (nursery, arrived) = NURSERY.get();
    let mut nursery = nursery.lock();
    loop {
        let now = Instant::now();
        let Some(at) = nursery.kept.iter().position(|k| k.due <= now) else {
            match nursery.kept.iter().map(|k| k.due).min() {
                Some(due) => drop(arrived.wait_until(&mut nursery, due)),
                None => arrived.wait(&mut nursery),
            }
            continue;
        };
        let mut kept = nursery.kept.swap_remove(at);
        // The plugin's call runs without the lock: givers do not wait for it.
        process::MutexGuard::unlocked(&mut nursery, || {
            if !(kept.orphan)(kept.since.elapsed()) {
                let pause = (kept.since.elapsed() / 16).clamp(FAST, SLOW);
                kept.due = Instant::now() + pause;
                Some(kept)
            } else {
                drop(kept);
                None
            }
        })
        .into_iter()
        .for_each(|kept| nursery.kept.push(kept));
    }
}
