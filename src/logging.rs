//! The log: lines go to standard error through env_logger, or to a function of the application (`delivery`). A process with its
//! own logger gets them there. Also limits the lines that a peer can cause. Knows nothing of settings, engines and connections.

mod delivery;

pub(crate) use delivery::{flush, Callback};

use crate::status::{bail, Result};
use process::{Mutex, PerProcess};
use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

/// The logger of the process, if it is this library's.
struct Log;

/// Writes lines to standard error. A forked child has its own, since a thread of the parent may have been writing a line.
static STDERR: PerProcess<env_logger::Logger> = PerProcess::new(to_stderr);
/// The level that the first engine asked for.
static LEVEL: AtomicUsize = AtomicUsize::new(0);

fn to_stderr() -> env_logger::Logger {
    let mut builder = env_logger::Builder::new();
    let asked = log::LevelFilter::iter().nth(LEVEL.load(Ordering::Acquire));
    builder.filter_level(asked.unwrap_or(log::LevelFilter::Off));
    // RUST_LOG takes precedence, module by module.
    if std::env::var_os("RUST_LOG").is_some() {
        builder.parse_env(env_logger::Env::default());
    }
    builder.target(env_logger::Target::Pipe(Box::new(Unlocked)));
    builder.format(|out, record| {
        writeln!(out, "{} uccl_p2p[{}] {} {}", out.timestamp_millis(), std::process::id(), record.level(), record.args())
    });
    builder.build()
}

/// Standard error without the standard library's lock, which may stay locked in a forked child.
struct Unlocked;

impl Write for Unlocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: readable bytes and their number.
        let written = unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        STDERR.get().enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        let stderr = STDERR.get();
        if !stderr.matches(record) || delivery::queue(record.level(), record.args()) {
            return;
        }
        stderr.log(record);
    }

    fn flush(&self) {}
}

/// Sets or clears the callback; `level` as for [`init`]. The previous callback first gets the queued lines, for a limited time,
/// and is no longer running when this returns.
///
/// # Errors
/// `InvalidArgument` inside a callback, `Unsupported` if the process has its own logger, `Resource` if no thread can be started.
pub(crate) fn set_callback(callback: Option<Callback>, level: log::LevelFilter) -> Result<()> {
    init(level);
    if delivery::inside() {
        bail!(InvalidArgument, "the log callback cannot be changed inside a log callback");
    }
    if !OURS.load(Ordering::Acquire) {
        bail!(Unsupported, "the process has its own logger, which gets the lines");
    }
    delivery::set(callback)
}

/// Whether this library's logger is the one of the process.
static OURS: AtomicBool = AtomicBool::new(false);

/// Installs the logger at this level, once. The first engine does it.
pub(crate) fn init(level: log::LevelFilter) {
    static ONCE: PerProcess<Once> = PerProcess::new(Once::new);
    ONCE.get().call_once(|| {
        if OURS.load(Ordering::Acquire) {
            return;
        }
        LEVEL.store(level as usize, Ordering::Release);
        // An embedding Rust program may have installed its logger first; the lines then go there.
        if log::set_logger(&Log).is_ok() {
            log::set_max_level(STDERR.get().filter());
            OURS.store(true, Ordering::Release);
        }
    });
}

/// The period over which a [`Limiter`] counts its lines.
const WINDOW: Duration = Duration::from_secs(1);

/// Passes a few log lines per second and counts the others: for every line that a peer, an unauthenticated connection or an
/// exhausted resource can cause repeatedly. Use one object for each kind of line, for as long as the lines can come (a
/// connection, an engine, a static).
pub(crate) struct Limiter {
    lines: u32,
    state: Mutex<Window>,
    /// A limit shared with others.
    within: Option<Arc<Limiter>>,
}

struct Window {
    /// When the current window began; `None` before the first line.
    since: Option<Instant>,
    /// Lines that passed in it.
    shown: u32,
    /// Lines suppressed since the last one that passed.
    held: u64,
}

impl Limiter {
    /// At most `lines` lines per second.
    pub(crate) const fn new(lines: u32) -> Limiter {
        Limiter { lines, state: Mutex::new(Window { since: None, shown: 0, held: 0 }), within: None }
    }

    /// The same, also bounded by a shared limit.
    pub(crate) fn within(all: &Arc<Limiter>, lines: u32) -> Limiter {
        Limiter { within: Some(all.clone()), ..Limiter::new(lines) }
    }

    /// Asks for a line at `now`. `Some(n)`: write it, and say that `n` others were suppressed before it. `None`: it was counted.
    pub(crate) fn admit(&self, now: Instant) -> Option<u64> {
        let mut window = self.state.lock();
        if window.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            window.since = Some(now);
            window.shown = 0;
        }
        // The next writer reports the lines that all of them suppressed, once.
        let others = match &self.within {
            _ if window.shown >= self.lines => None,
            Some(all) => all.admit(now),
            None => Some(0),
        };
        let Some(others) = others else {
            window.held = window.held.saturating_add(u64::from(self.within.is_none() || window.shown >= self.lines));
            return None;
        };
        window.shown += 1;
        Some(std::mem::take(&mut window.held).saturating_add(others))
    }

    /// The count of suppressed lines after they have stopped; for periodic checks and the end.
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
            Some(held) => log::log!(level, "{line} (suppressed {held} similar lines)"),
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
        let (mut shown, mut announced) = (0u64, 0u64);
        for i in 0..100_000u64 {
            // Ten seconds, 10,000 lines in each.
            if let Some(held) = limiter.admit(start + Duration::from_micros(i * 100)) {
                shown += 1;
                announced += held;
            }
        }
        announced += limiter.rest(start + Duration::from_secs(20)).unwrap_or(0);
        assert_eq!((shown, shown + announced), (30, 100_000));
    }

    #[test]
    fn a_hundred_within_one_limit_write_its_lines_and_lose_no_count() {
        let all = Arc::new(Limiter::new(20));
        let limiters: Vec<Limiter> = (0..100).map(|_| Limiter::within(&all, 5)).collect();
        let start = Instant::now();
        let (mut shown, mut announced) = (0u64, 0u64);
        for millis in 0..5000u64 {
            for limiter in &limiters {
                if let Some(held) = limiter.admit(start + Duration::from_millis(millis)) {
                    shown += 1;
                    announced += held;
                }
            }
        }
        let late = start + Duration::from_secs(60);
        announced += limiters.iter().filter_map(|l| l.rest(late)).sum::<u64>() + all.rest(late).unwrap_or(0);
        assert_eq!((shown, shown + announced), (5 * 20, 500_000));
    }

    #[test]
    fn a_clock_that_runs_back_opens_no_new_window() {
        let limiter = Limiter::new(1);
        let start = Instant::now() + Duration::from_secs(100);
        assert_eq!(limiter.admit(start), Some(0));
        assert_eq!(limiter.admit(start - Duration::from_secs(50)), None);
    }
}
