//! The log: lines go to standard error through env_logger, or to a function of the application; where
//! the process has a logger of its own, that one gets them. And the limit on lines that a peer can cause. Knows nothing of settings,
//! engines and connections.

use crate::fork::PerProcess;
use crate::status::{bail, Result};
use parking_lot::{Mutex, RwLock};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void, CString};
use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::Once;
use std::time::{Duration, Instant};

/// The application's function for log lines, and its argument.
#[derive(Clone, Copy)]
pub(crate) struct Callback {
    pub call: unsafe extern "C" fn(level: c_int, text: *const c_char, user: *mut c_void),
    pub user: *mut c_void,
}

/// The callback in force, or null. Read and freed under `CALLING`; a child of fork begins with its parent's.
static CALLBACK: AtomicPtr<Callback> = AtomicPtr::new(std::ptr::null_mut());
/// Held for reading while the callback runs.
static CALLING: PerProcess<RwLock<()>> = PerProcess::new(RwLock::default);
/// Whether this library's logger is the one of the process.
static OURS: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// This thread is inside the callback. Has no destructor, so it is there to the thread's end.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

struct Log {
    stderr: env_logger::Logger,
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.stderr.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.stderr.matches(record) || to_callback(record) {
            return;
        }
        self.stderr.log(record);
    }

    fn flush(&self) {}
}

/// Hands a line to the callback; `false` where there is none, or this thread is inside of it.
fn to_callback(record: &log::Record<'_>) -> bool {
    if CALLBACK.load(Ordering::Acquire).is_null() || INSIDE.get() {
        return false;
    }
    // Recursive: a line must not wait for another thread that waits for the end of all calls.
    let _calling = CALLING.get().read_recursive();
    // SAFETY: null, or a box that set_callback frees only while nobody holds the lock.
    let Some(callback) = (unsafe { CALLBACK.load(Ordering::Acquire).as_ref() }) else { return false };
    let text = CString::new(record.args().to_string().replace('\0', " ")).unwrap_or_default();
    INSIDE.set(true);
    // SAFETY: the application gave both, for calls from any thread with a NUL-terminated text.
    unsafe { (callback.call)(record.level() as c_int, text.as_ptr(), callback.user) };
    INSIDE.set(false);
    true
}

/// Puts another callback in force, or none; `level` as for [`init`]. On return no call of the one before runs.
pub(crate) fn set_callback(callback: Option<Callback>, level: log::LevelFilter) -> Result<()> {
    init(level);
    if INSIDE.get() {
        bail!(InvalidArgument, "the log callback cannot be changed inside a log callback");
    }
    if !OURS.load(Ordering::Acquire) {
        bail!(Unsupported, "the process has a logger of its own, which gets the lines");
    }
    let fresh = callback.map_or(std::ptr::null_mut(), |callback| Box::into_raw(Box::new(callback)));
    let old = CALLBACK.swap(fresh, Ordering::AcqRel);
    let _nobody_calls = CALLING.get().write();
    if !old.is_null() {
        // SAFETY: a box made above, replaced by now, and no call uses it while this thread holds the lock.
        drop(unsafe { Box::from_raw(old) });
    }
    Ok(())
}

/// Installs the logger at this level, once. Done by the first engine.
pub(crate) fn init(level: log::LevelFilter) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // RUST_LOG, where it is set, narrows modules further.
        let env = env_logger::Env::default();
        let mut builder = env_logger::Builder::new();
        builder.filter_level(level);
        if std::env::var_os("RUST_LOG").is_some() {
            builder.parse_env(env);
        }
        builder.format(|out, record| {
            writeln!(out, "{} uccl_p2p[{}] {} {}", out.timestamp_millis(), std::process::id(), record.level(), record.args())
        });
        let stderr = builder.build();
        let most = stderr.filter();
        // An embedding Rust program may have installed its logger first; that one then serves.
        if log::set_boxed_logger(Box::new(Log { stderr })).is_ok() {
            log::set_max_level(most);
            OURS.store(true, Ordering::Release);
        }
    });
}

/// The time in which a [`Limiter`] lets its lines through.
const WINDOW: Duration = Duration::from_secs(1);

/// Lets a few log lines a second through and counts the others: for every line that a peer, a stranger or an exhausted resource can
/// cause again and again. One object for each kind of line, for as long as the lines can come (a connection, an engine, a static).
pub(crate) struct Limiter {
    lines: u32,
    state: Mutex<Window>,
}

struct Window {
    /// When the current window began; none before the first line.
    since: Option<Instant>,
    /// Lines let through in it.
    shown: u32,
    /// Lines held back since the last one that was let through.
    held: u64,
}

impl Limiter {
    /// At most `lines` lines a second.
    pub(crate) const fn new(lines: u32) -> Limiter {
        Limiter { lines, state: Mutex::new(Window { since: None, shown: 0, held: 0 }) }
    }

    /// Asks for a line at `now`. `Some(n)`: write it, and say that `n` others were held back before it. `None`: it was counted.
    pub(crate) fn admit(&self, now: Instant) -> Option<u64> {
        let mut window = self.state.lock();
        if window.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            window.since = Some(now);
            window.shown = 0;
        }
        if window.shown >= self.lines {
            window.held = window.held.saturating_add(1);
            return None;
        }
        window.shown += 1;
        Some(std::mem::take(&mut window.held))
    }

    /// What was held back when the lines have stopped coming: for whoever looks in now and then, and at the end.
    pub(crate) fn rest(&self, now: Instant) -> Option<u64> {
        let mut window = self.state.lock();
        let over = window.since.is_some_and(|since| now.saturating_duration_since(since) >= WINDOW);
        (over && window.held > 0).then(|| std::mem::take(&mut window.held))
    }

    /// Writes a line, or counts it. A line that the log's level hides is not counted.
    pub(crate) fn log(&self, level: log::Level, now: Instant, line: fmt::Arguments<'_>) {
        if !log::log_enabled!(level) {
            return;
        }
        match self.admit(now) {
            Some(0) => log::log!(level, "{line}"),
            Some(held) => log::log!(level, "{line} (and {held} more such lines that were not written)"),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_a_second_and_a_count_of_the_others() {
        let limiter = Limiter::new(2);
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        assert_eq!([0, 1, 2, 3].map(|t| limiter.admit(at(t))), [Some(0), Some(0), None, None]);
        assert_eq!(limiter.admit(at(999)), None);
        assert_eq!(limiter.rest(at(999)), None, "the window still runs");
        assert_eq!(limiter.admit(at(1000)), Some(3));
        assert_eq!(limiter.admit(at(1001)), Some(0));
        assert_eq!(limiter.admit(at(1002)), None);
        assert_eq!(limiter.rest(at(2000)), Some(1));
        assert_eq!(limiter.rest(at(2001)), None);
        assert_eq!(limiter.admit(at(2002)), Some(0));
    }

    #[test]
    fn a_flood_writes_the_limit_and_loses_no_count() {
        let limiter = Limiter::new(3);
        let start = Instant::now();
        let (mut shown, mut told) = (0u64, 0u64);
        for i in 0..100_000u64 {
            // Ten seconds, 10,000 lines in each.
            if let Some(held) = limiter.admit(start + Duration::from_micros(i * 100)) {
                shown += 1;
                told += held;
            }
        }
        told += limiter.rest(start + Duration::from_secs(20)).unwrap_or(0);
        assert_eq!((shown, shown + told), (30, 100_000));
    }

    #[test]
    fn time_that_runs_back_is_no_new_window() {
        let limiter = Limiter::new(1);
        let start = Instant::now() + Duration::from_secs(100);
        assert_eq!(limiter.admit(start), Some(0));
        assert_eq!(limiter.admit(start - Duration::from_secs(50)), None);
    }
}
