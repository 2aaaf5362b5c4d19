//! Connects and accepts that were abandoned while the plugin's own threads still use their memory: one background thread polls them
//! until they end. Knows nothing of what it polls.

use process::{Condvar, Mutex, PerProcess};
use std::time::{Duration, Instant};

/// A poll function, given how long it has been polled: `true` when it has ended.
pub(super) type Abandoned = Box<dyn FnMut(Duration) -> bool + Send>;

/// The first poll interval; it grows with age up to [`SLOW`].
const FAST: Duration = Duration::from_millis(5);
const SLOW: Duration = Duration::from_millis(500);

struct Kept {
    abandoned: Abandoned,
    since: Instant,
    due: Instant,
}

#[derive(Default)]
struct Polled {
    kept: Vec<Kept>,
    running: bool,
}

/// The entries of this process, and the condition for new ones. A forked child has its own list and thread.
static POLLED: PerProcess<(Mutex<Polled>, Condvar)> = PerProcess::new(Default::default);

/// Polls `abandoned` in the background until it has ended.
pub(super) fn keep(abandoned: Abandoned) {
    let (polled, arrived) = POLLED.get();
    let mut polled = polled.lock();
    let now = Instant::now();
    polled.kept.push(Kept { abandoned, since: now, due: now });
    if !polled.running {
        match process::thread::spawn("uccl-abandoned", run) {
            Ok(_) => polled.running = true,
            // The entry stays in memory, and the next call tries again.
            Err(e) => log::warn!("cannot start the thread for abandoned connects: {e}"),
        }
    }
    arrived.notify_one();
}

/// Number of entries that have not ended.
#[cfg(test)]
pub(super) fn kept() -> usize {
    POLLED.get().0.lock().kept.len()
}

fn run() {
    let (polled, arrived) = POLLED.get();
    let mut polled = polled.lock();
    loop {
        let now = Instant::now();
        let Some(at) = polled.kept.iter().position(|k| k.due <= now) else {
            match polled.kept.iter().map(|k| k.due).min() {
                Some(due) => drop(arrived.wait_until(&mut polled, due)),
                None => arrived.wait(&mut polled),
            }
            continue;
        };
        let mut kept = polled.kept.swap_remove(at);
        // The plugin's call runs without the lock, so that `abandon` does not wait for it.
        process::MutexGuard::unlocked(&mut polled, || {
            if !(kept.abandoned)(kept.since.elapsed()) {
                let pause = (kept.since.elapsed() / 16).clamp(FAST, SLOW);
                kept.due = Instant::now() + pause;
                Some(kept)
            } else {
                drop(kept);
                None
            }
        })
        .into_iter()
        .for_each(|kept| polled.kept.push(kept));
    }
}
