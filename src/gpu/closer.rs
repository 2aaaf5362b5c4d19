//! Ends mappings that are no longer used, in a thread of the process that ends when there are no more. The driver ends one only when the
//! GPU has done all the work that it was given before, and holds up every other call until then; work that waits for a pull would wait for
//! ever. So it is asked when nothing has been pulled for a while; but not put off for long, since a mapping keeps its owner's memory.
//! Knows nothing of what it ends.

use process::{Mutex, PerProcess};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nothing is pulled for so long before mappings end.
const QUIET: Duration = Duration::from_millis(50);
/// They end after this time in any case.
const MAX_DELAY: Duration = Duration::from_secs(2);
/// How often the thread looks.
const NAP: Duration = Duration::from_millis(10);

/// Something that dropping ends.
type Closing = Box<dyn Send>;

#[derive(Default)]
struct Queue {
    waiting: Vec<Closing>,
    running: bool,
}

static QUEUE: PerProcess<Mutex<Queue>> = PerProcess::new(Mutex::default);
/// Changes with every pull. Lost counts do no harm.
static STIRRED: AtomicU64 = AtomicU64::new(0);
static CLOSING: AtomicBool = AtomicBool::new(false);

/// Drops `closing` soon, in another thread; if there can be none, here.
pub(crate) fn close_later(closing: impl Send + 'static) {
    let mut queue = QUEUE.get().lock();
    queue.waiting.push(Box::new(closing));
    if queue.running {
        return;
    }
    match process::thread::spawn("uccl-closer", run) {
        Ok(_) => queue.running = true,
        Err(_) => drop(std::mem::take(&mut queue.waiting)),
    }
}

/// Something is pulled.
#[inline]
pub(super) fn stir() {
    STIRRED.store(STIRRED.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// Whether mappings are being ended: calls of the driver may wait.
pub(super) fn is_closing() -> bool {
    CLOSING.load(Ordering::Relaxed)
}

/// Whether nothing is left to be ended.
#[cfg(test)]
pub(crate) fn is_done() -> bool {
    !QUEUE.get().lock().running
}

/// Waits until nothing is pulled.
fn rest() {
    let begin = Instant::now();
    let (mut seen, mut since) = (STIRRED.load(Ordering::Relaxed), begin);
    while since.elapsed() < QUIET && begin.elapsed() < MAX_DELAY {
        std::thread::sleep(NAP);
        let now = STIRRED.load(Ordering::Relaxed);
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
}

fn run() {
    let queue = QUEUE.get();
    loop {
        rest();
        let mut guard = queue.lock();
        let batch = std::mem::take(&mut guard.waiting);
        if batch.is_empty() {
            guard.running = false;
            return;
        }
        drop(guard);
        CLOSING.store(true, Ordering::Relaxed);
        drop(batch);
        CLOSING.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{channel, Sender};
    use std::thread::ThreadId;

    struct Report(Sender<ThreadId>);

    impl Drop for Report {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().id());
        }
    }

    #[test]
    fn mappings_end_elsewhere_and_are_not_put_off_for_ever() {
        let (sender, receiver) = channel();
        for pulling in [false, true] {
            close_later(Report(sender.clone()));
            close_later(Report(sender.clone()));
            let begin = Instant::now();
            let mut ended = Vec::new();
            while ended.len() < 2 {
                if pulling {
                    stir();
                }
                ended.extend(receiver.try_recv());
                std::thread::sleep(Duration::from_millis(1));
                assert!(begin.elapsed() < Duration::from_secs(60));
            }
            assert!(ended.iter().all(|&thread| thread != std::thread::current().id()));
            while !is_done() {
                std::thread::sleep(NAP);
            }
        }
    }
}
