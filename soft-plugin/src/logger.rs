//! Log lines go to the logger that `init` received, else to the `log` crate. Lines that a peer or a loop can repeat are rate-limited.
//! Knows nothing of comms; callers supply the context.

use std::ffi::CString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use process::PerProcess;

use nccl_net_abi::{ncclDebugLogger_t, NCCL_LOG_INFO, NCCL_LOG_WARN};

/// `NCCL_NET` of NCCL's debug subsystems.
const SUBSYSTEM_NET: std::ffi::c_ulong = 16;
/// Limited lines of a kind appear at most once in this time, and the same line again only after the longer one: while a NIC is down each
/// attempt to use it would write the same.
const QUIET_MS: u64 = 1000;
const QUIET_SAME_MS: u64 = 60_000;

/// The logger's address, 0 without one.
static LOGGER: AtomicUsize = AtomicUsize::new(0);

/// Sets the logger of `init`; `None` keeps the current one.
pub fn set(logger: ncclDebugLogger_t) {
    if let Some(function) = logger {
        LOGGER.store(function as usize, Ordering::Release);
    }
}

/// Logs a warning.
pub fn warn(message: &str) {
    if !foreign(NCCL_LOG_WARN, message) {
        log::warn!(target: "soft_plugin", "{message}");
    }
}

/// Logs information.
pub fn info(message: &str) {
    if !foreign(NCCL_LOG_INFO, message) {
        log::info!(target: "soft_plugin", "{message}");
    }
}

/// A rate limit for one kind of line that a peer can cause repeatedly: one per second, the same one once a minute, with the number suppressed.
pub struct Limited {
    /// Milliseconds of [`now`] from which the next line may appear.
    next: AtomicU64,
    suppressed: AtomicU64,
    /// The last line's hash.
    last: AtomicU64,
}

impl Limited {
    /// A limit with no line yet.
    pub const fn new() -> Limited {
        Limited { next: AtomicU64::new(0), suppressed: AtomicU64::new(0), last: AtomicU64::new(0) }
    }

    /// As [`warn`], unless suppressed.
    pub fn warn(&self, message: &str) {
        if let Some(count) = self.admit(message, now()) {
            warn(&with_count(message, count));
        }
    }

    /// As [`info`], unless suppressed.
    pub fn info(&self, message: &str) {
        if let Some(count) = self.admit(message, now()) {
            info(&with_count(message, count));
        }
    }

    /// How many lines were suppressed before this one, if it may appear.
    fn admit(&self, message: &str, now: u64) -> Option<u64> {
        let (next, line) = (self.next.load(Ordering::Relaxed), hash(message));
        let same = next > 0 && self.last.load(Ordering::Relaxed) == line;
        let from = if same { next + QUIET_SAME_MS - QUIET_MS } else { next };
        let due = now >= from && self.next.compare_exchange(next, now + QUIET_MS, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if !due {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        self.last.store(line, Ordering::Relaxed);
        Some(self.suppressed.swap(0, Ordering::Relaxed))
    }
}

fn hash(message: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    message.hash(&mut hasher);
    hasher.finish()
}

fn with_count(message: &str, suppressed: u64) -> String {
    match suppressed {
        0 => message.to_owned(),
        n => format!("{message} (suppressed {n} similar lines)"),
    }
}

/// Milliseconds since the first use.
fn now() -> u64 {
    static START: PerProcess<Instant> = PerProcess::new(Instant::now);
    START.get().elapsed().as_millis() as u64
}

fn foreign(level: i32, message: &str) -> bool {
    let address = LOGGER.load(Ordering::Acquire);
    if address == 0 {
        return false;
    }
    // SAFETY: only `set` stores here, and it stores the address of a function of exactly this type.
    let logger: ncclDebugLogger_t = unsafe { std::mem::transmute::<usize, ncclDebugLogger_t>(address) };
    let (Some(logger), Ok(line)) = (logger, CString::new(message.replace('\0', " "))) else { return false };
    // SAFETY: the format takes one C string; all strings are terminated and outlive the call.
    unsafe { logger(level, SUBSYSTEM_NET, c"soft-plugin".as_ptr(), 0, c"%s".as_ptr(), line.as_ptr()) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_line_appears_once_a_second_with_a_count() {
        let limited = Limited::new();
        assert_eq!(limited.admit("a", 5), Some(0));
        for at in 6..=1004 {
            assert_eq!(limited.admit("b", at), None);
        }
        assert_eq!(limited.admit("b", 1005), Some(999));
        assert_eq!(limited.admit("c", 9000), Some(0));
        assert_eq!(with_count("x", 2), "x (suppressed 2 similar lines)");
    }

    #[test]
    fn the_same_line_appears_once_a_minute() {
        let limited = Limited::new();
        assert_eq!(limited.admit("down", 5), Some(0));
        for at in [2005, 4005, 60_004] {
            assert_eq!(limited.admit("down", at), None);
        }
        assert_eq!(limited.admit("down", 60_005), Some(3));
        assert_eq!(limited.admit("another", 61_005), Some(0));
        assert_eq!(limited.admit("down", 62_005), Some(0));
    }
}
