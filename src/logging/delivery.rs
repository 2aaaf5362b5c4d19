//! From a line of the log to the application's function: a bounded queue and a thread that empties it. Lines are logged under locks and
//! by threads that move data; the function may take its time and use the library. Knows nothing of who logs.

use crate::status::Result;
use process::{Condvar, Mutex, MutexGuard, PerProcess};
use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::{c_char, c_int, c_void, CString};
use std::fmt::Arguments;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

/// Most lines and bytes that wait for the callback. Further ones are counted, and a line reports the count.
const MAX_LINES: usize = 4096;
const MAX_BYTES: usize = 1 << 20;
/// How long a new function, or the end of an engine, waits for the function before to take what was logged.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// The application's function for log lines, and its argument.
#[derive(Clone, Copy)]
pub(crate) struct Callback {
    pub call: unsafe extern "C" fn(level: c_int, text: *const c_char, user: *mut c_void),
    pub user: *mut c_void,
}

/// The function in force, or null. Read and freed under the lock of [`LINES`]; a child of fork begins with its parent's.
static CALLBACK: AtomicPtr<Callback> = AtomicPtr::new(std::ptr::null_mut());
/// The queue of this process.
static LINES: PerProcess<Delivery> = PerProcess::new(Delivery::default);

thread_local! {
    /// This thread is inside the callback. Has no destructor, so it lives until the thread ends.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

#[derive(Default)]
struct Delivery {
    waiting: Mutex<Waiting>,
    /// The thread has something to do; something is done.
    more: Condvar,
    done: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: VecDeque<(log::Level, String)>,
    bytes: usize,
    /// Lines dropped since the last report.
    missed: u64,
    /// The thread runs; it is inside the function.
    thread: bool,
    calling: bool,
    /// Calls that have ended, and lines that were forgotten.
    over: u64,
}

impl Waiting {
    fn push(&mut self, level: log::Level, text: String) {
        if self.lines.len() >= MAX_LINES || self.bytes + text.len() > MAX_BYTES {
            self.missed += 1;
            return;
        }
        self.bytes += text.len();
        self.lines.push_back((level, text));
    }

    /// The next line. The report of dropped lines comes after all that wait.
    fn pop(&mut self) -> Option<(log::Level, String)> {
        if let Some(line) = self.lines.pop_front() {
            self.bytes -= line.1.len();
            return Some(line);
        }
        match std::mem::take(&mut self.missed) {
            0 => None,
            missed => Some((log::Level::Warn, format!("dropped {missed} lines: the log callback is too slow"))),
        }
    }

    /// What [`Waiting::over`] is when the call that runs has ended.
    fn begun(&self) -> u64 {
        self.over + u64::from(self.calling)
    }

    /// What [`Waiting::over`] is when all that was logged so far has been handed over.
    fn all(&self) -> u64 {
        self.begun() + self.lines.len() as u64 + u64::from(self.missed > 0)
    }

    fn forget(&mut self) {
        self.over += self.all() - self.begun();
        self.lines.clear();
        (self.bytes, self.missed) = (0, 0);
    }
}

/// Whether the calling thread is inside the function.
pub(super) fn inside() -> bool {
    INSIDE.get()
}

/// Takes a line for the function; `false` where there is none, or this thread is inside of it.
pub(super) fn queue(level: log::Level, text: &Arguments<'_>) -> bool {
    if CALLBACK.load(Ordering::Acquire).is_null() || inside() {
        return false;
    }
    // Formatted first: that may log too.
    let text = text.to_string();
    let delivery = LINES.get();
    let mut waiting = delivery.waiting.lock();
    if CALLBACK.load(Ordering::Acquire).is_null() || !begin(&mut waiting) {
        return false;
    }
    waiting.push(level, text);
    delivery.more.notify_one();
    true
}

/// Starts the thread, where it does not run: at the first callback, and in a child of fork. Whether it runs.
fn begin(waiting: &mut Waiting) -> bool {
    if !waiting.thread {
        waiting.thread = process::thread::spawn("uccl-log", || run(LINES.get())).is_ok();
    }
    waiting.thread
}

/// Hands lines over as long as there is a function.
fn run(delivery: &Delivery) {
    INSIDE.set(true);
    let mut waiting = delivery.waiting.lock();
    loop {
        // SAFETY: null, or a box that `set` frees only under this lock.
        let Some(callback) = (unsafe { CALLBACK.load(Ordering::Acquire).as_ref() }).copied() else {
            waiting.thread = false;
            return;
        };
        let Some((level, text)) = waiting.pop() else {
            delivery.done.notify_all();
            delivery.more.wait(&mut waiting);
            continue;
        };
        waiting.calling = true;
        MutexGuard::unlocked(&mut waiting, || {
            let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
            // SAFETY: the application gave both, for calls from any thread with a NUL-terminated text; `set` waits for the end.
            unsafe { (callback.call)(level as c_int, text.as_ptr(), callback.user) };
        });
        waiting.calling = false;
        waiting.over += 1;
        delivery.done.notify_all();
    }
}

/// Waits until all lines that are queued now have been delivered, or `until`. Does not wait for lines logged meanwhile.
fn settle(delivery: &Delivery, waiting: &mut MutexGuard<'_, Waiting>, until: Instant) {
    let all = waiting.all();
    while waiting.over < all && waiting.thread {
        if delivery.done.wait_until(waiting, until).timed_out() {
            return;
        }
    }
}

/// Waits, for a moment at most, until what was logged has been handed over. Does nothing inside the function.
pub(crate) fn flush() {
    if CALLBACK.load(Ordering::Acquire).is_null() || inside() {
        return;
    }
    let delivery = LINES.get();
    settle(delivery, &mut delivery.waiting.lock(), Instant::now() + FLUSH_DEADLINE);
}

/// See [`super::set_callback`].
pub(super) fn set(callback: Option<Callback>) -> Result<()> {
    let fresh = callback.map_or(std::ptr::null_mut(), |callback| Box::into_raw(Box::new(callback)));
    let delivery = LINES.get();
    let mut waiting = delivery.waiting.lock();
    settle(delivery, &mut waiting, Instant::now() + FLUSH_DEADLINE);
    waiting.forget();
    let old = CALLBACK.swap(fresh, Ordering::AcqRel);
    if !old.is_null() {
        // SAFETY: a box made above, replaced by now, and read under the lock only, which this thread holds.
        drop(unsafe { Box::from_raw(old) });
    }
    let started = fresh.is_null() || begin(&mut waiting);
    delivery.more.notify_one();
    // Of the old function only a call that had begun can still run; the new one may be called all the time.
    let begun = waiting.begun();
    while waiting.over < begun {
        delivery.done.wait(&mut waiting);
    }
    if !started {
        log::debug!("no thread for the log callback: lines go to standard error until there is one");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_takes_little_and_is_counted() {
        let mut waiting = Waiting::default();
        (0..10_000).for_each(|i| waiting.push(log::Level::Info, format!("line {i}")));
        assert_eq!((waiting.lines.len(), waiting.missed), (MAX_LINES, 10_000 - MAX_LINES as u64));
        let taken: Vec<_> = std::iter::from_fn(|| waiting.pop()).collect();
        assert_eq!(taken.len(), MAX_LINES + 1);
        assert!(taken[0].1 == "line 0" && taken[MAX_LINES].1.starts_with("dropped 5904 lines"), "{:?}", taken.last());
        assert!(waiting.all() == 0 && waiting.bytes == 0);
        (0..10).for_each(|_| waiting.push(log::Level::Info, "x".repeat(MAX_BYTES / 4)));
        assert_eq!((waiting.lines.len(), waiting.missed), (4, 6));
        waiting.calling = true;
        assert_eq!((waiting.begun(), waiting.all()), (1, 6));
        waiting.forget();
        assert_eq!((waiting.over, waiting.begun(), waiting.all(), waiting.bytes), (5, 6, 6, 0));
    }
}
