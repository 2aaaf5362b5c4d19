//! Log lines of foreign plugins: the C logger that they get, levels, and repeated lines. A plugin may write a line thousands of
//! times a second; each text is logged at most once a second, with a count of those suppressed.

use nccl_net_abi::ncclDebugLogger_t;
use process::{Mutex, PerProcess};
use std::collections::{HashMap, VecDeque};
use std::ffi::{c_char, c_int, c_ulong, CStr};
use std::panic::catch_unwind;
use std::sync::Once;
use std::time::{Duration, Instant};

extern "C" {
    fn uccl_p2p_plugin_log(level: c_int, flags: c_ulong, file: *const c_char, line: c_int, format: *const c_char, ...);
    fn uccl_p2p_plugin_log_to(
        wanted: extern "C" fn(c_int) -> c_int,
        take: unsafe extern "C" fn(c_int, *const c_char, c_int, *const c_char),
    );
}

/// The logger to give to `init`.
pub(super) fn logger() -> ncclDebugLogger_t {
    static ONCE: PerProcess<Once> = PerProcess::new(Once::new);
    // SAFETY: once, before any plugin has the logger; both functions have the declared types.
    ONCE.get().call_once(|| unsafe { uccl_p2p_plugin_log_to(wanted, take) });
    Some(uccl_p2p_plugin_log)
}

/// NCCL's levels: 1 version, 2 warning, 3 information, 4 abort, 5 trace.
fn level(nccl: c_int) -> log::Level {
    match nccl {
        4 => log::Level::Error,
        2 => log::Level::Warn,
        1 | 3 => log::Level::Info,
        _ => log::Level::Trace,
    }
}

extern "C" fn wanted(nccl: c_int) -> c_int {
    // Lines that are not enabled are not formatted, except warnings, which explain failures.
    c_int::from(level(nccl) <= log::max_level().max(log::LevelFilter::Warn))
}

/// # Safety
/// The C shim's call: strings end in a NUL; `file` may be null.
unsafe extern "C" fn take(nccl: c_int, file: *const c_char, line: c_int, text: *const c_char) {
    // SAFETY: by the contract.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let file = if file.is_null() {
        "?".into()
    } else {
        // SAFETY: by the contract.
        unsafe { CStr::from_ptr(file) }.to_string_lossy()
    };
    // A logger of the application that panics must not unwind through the plugin.
    let _ = catch_unwind(|| report(level(nccl), &file, line, &text));
}

/// A plugin's last warnings, if recent: they say more than the result code of the failing call.
pub(super) fn last_warnings() -> Option<String> {
    SEEN.get().lock().warnings.recent(Instant::now())
}

fn report(level: log::Level, file: &str, line: c_int, text: &str) {
    let site = format!("{}:{line}", file.rsplit('/').next().unwrap_or(file));
    let clean: String = text.trim_end().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let now = Instant::now();
    let mut seen = SEEN.get().lock();
    if level <= log::Level::Warn {
        seen.warnings.note(now, &site, &clean);
    }
    let written = seen.admit(now, level, &site, &clean);
    drop(seen);
    for line in written {
        log::log!(target: "nccl_net_plugin", line.level, "plugin [{}] {}", line.site, line.text);
    }
}

static SEEN: PerProcess<Mutex<Repeats>> = PerProcess::new(Mutex::default);

/// The greatest age of a warning that can explain a failure: some come from the plugin's own threads, before or after the call.
const RECENT: Duration = Duration::from_secs(5);
/// Most warnings for a failure, and most characters of each.
const CAUSES: usize = 2;
const CAUSE_CHARS: usize = 240;
/// How long a text is suppressed after it was written.
const QUIET: Duration = Duration::from_secs(1);
/// Most texts of one line of the plugin's source in that time.
const TEXTS_OF_A_SITE: u32 = 20;
/// Texts remembered at once.
const REMEMBERED: usize = 256;

#[derive(Debug, PartialEq, Eq)]
struct Line {
    level: log::Level,
    site: String,
    text: String,
}

/// When each text was written, and how many were suppressed since.
#[derive(Default)]
struct Repeats {
    texts: HashMap<(String, String), Written>,
    sites: HashMap<String, Site>,
    warnings: Warnings,
}

/// The last warnings and errors, each from a different line of the plugin's source. The last one may only say that something
/// failed, and the one before it why.
#[derive(Default)]
struct Warnings(VecDeque<(Instant, String, String)>);

impl Warnings {
    fn note(&mut self, now: Instant, site: &str, text: &str) {
        self.0.retain(|(_, of, _)| of != site);
        if self.0.len() == CAUSES {
            self.0.pop_front();
        }
        self.0.push_back((now, site.to_owned(), text.to_owned()));
    }

    /// The recent ones, oldest first.
    fn recent(&self, now: Instant) -> Option<String> {
        let fresh = self.0.iter().filter(|(at, ..)| now.saturating_duration_since(*at) < RECENT);
        let texts: Vec<String> = fresh.map(|(_, _, text)| text.chars().take(CAUSE_CHARS).collect()).collect();
        (!texts.is_empty()).then(|| texts.join("; then: "))
    }
}

struct Written {
    level: log::Level,
    at: Instant,
    held: u64,
}

struct Site {
    since: Instant,
    texts: u32,
    held: u64,
}

impl Repeats {
    /// The lines to write for a new one: the line itself, and counts of suppressed lines.
    fn admit(&mut self, now: Instant, level: log::Level, site: &str, text: &str) -> Vec<Line> {
        let mut out = Vec::new();
        self.settle(now, &mut out);
        let key = (site.to_owned(), text.to_owned());
        if let Some(written) = self.texts.get_mut(&key) {
            written.held += 1;
            return out;
        }
        let place = self.sites.entry(site.to_owned()).or_insert(Site { since: now, texts: 0, held: 0 });
        if place.texts >= TEXTS_OF_A_SITE || self.texts.len() >= REMEMBERED {
            place.held += 1;
            return out;
        }
        place.texts += 1;
        self.texts.insert(key, Written { level, at: now, held: 0 });
        out.push(Line { level, site: site.to_owned(), text: text.to_owned() });
        out
    }

    /// Forgets texts older than a second, and reports how often they were suppressed.
    fn settle(&mut self, now: Instant, out: &mut Vec<Line>) {
        let over = |since: Instant| now.saturating_duration_since(since) >= QUIET;
        self.texts.retain(|(site, text), written| {
            if !over(written.at) {
                return true;
            }
            if written.held == 0 {
                return false;
            }
            out.push(Line { level: written.level, site: site.clone(), text: format!("{text} ({} times more)", written.held) });
            // The text was just written again.
            (written.at, written.held) = (now, 0);
            true
        });
        self.sites.retain(|site, place| {
            if over(place.since) && place.held > 0 {
                let text = format!("(suppressed {} other lines)", place.held);
                out.push(Line { level: log::Level::Info, site: site.clone(), text });
            }
            !over(place.since)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;

    fn texts(lines: Vec<Line>) -> Vec<String> {
        lines.into_iter().map(|l| l.text).collect()
    }

    #[test]
    fn a_repeated_line_appears_once_a_second_with_a_count() {
        let mut seen = Repeats::default();
        let start = Instant::now();
        let mut written = Vec::new();
        for i in 0..30_000u64 {
            written.extend(texts(seen.admit(start + Duration::from_micros(i * 100), Level::Warn, "work.cc:7", "No free space")));
        }
        assert_eq!(written, ["No free space", "No free space (9999 times more)", "No free space (10000 times more)"]);
        let later = start + Duration::from_secs(60);
        assert_eq!(texts(seen.admit(later, Level::Info, "b", "x")), ["No free space (10000 times more)", "x"]);
    }

    #[test]
    fn texts_that_differ_are_bounded_too() {
        let mut seen = Repeats::default();
        let start = Instant::now();
        let mut written = 0;
        for i in 0..100_000u64 {
            written += seen.admit(start + Duration::from_micros(i), Level::Warn, "work.cc:7", &format!("task {i}")).len();
        }
        assert_eq!(written, TEXTS_OF_A_SITE as usize);
        let rest = texts(seen.admit(start + Duration::from_secs(5), Level::Warn, "other", "y"));
        assert_eq!(rest, ["(suppressed 99980 other lines)", "y"]);
    }

    #[test]
    fn a_failure_is_explained_by_the_cause_and_not_by_its_last_symptom_alone() {
        let (mut warnings, start) = (Warnings::default(), Instant::now());
        assert_eq!(warnings.recent(start), None);
        for (line, text) in
            [(900, "long ago"), (581, "the manager refused"), (581, "the manager refused again"), (497, "accept failed")]
        {
            warnings.note(start, &format!("connect.cc:{line}"), text);
        }
        assert_eq!(warnings.recent(start).as_deref(), Some("the manager refused again; then: accept failed"));
        // A new warning of the same source line is now the last one.
        warnings.note(start + RECENT / 2, "connect.cc:581", &"x".repeat(1000));
        let text = warnings.recent(start + RECENT / 2).unwrap();
        assert!(text.starts_with("accept failed; then: xxx") && text.len() < 300, "{text}");
        assert_eq!(warnings.recent(start + RECENT).unwrap().len(), CAUSE_CHARS);
        assert_eq!(warnings.recent(start + 2 * RECENT), None);
    }

    #[test]
    fn arguments_are_formatted() {
        let Some(call) = logger() else { panic!("no logger") };
        log::set_max_level(log::LevelFilter::Trace);
        // SAFETY: a format with matching arguments.
        unsafe {
            call(2, 16, c"a/net.cc".as_ptr(), 31, c"%s: %d of %lu, %.1f".as_ptr(), c"eth1".as_ptr(), 3i32, 4u64, 1.5f64);
            call(2, 16, std::ptr::null(), 0, c"no file".as_ptr());
            call(2, 16, c"net.cc".as_ptr(), 1, std::ptr::null::<c_char>());
        }
        let seen = SEEN.get().lock();
        assert!(seen.texts.contains_key(&("net.cc:31".to_owned(), "eth1: 3 of 4, 1.5".to_owned())));
        assert!(seen.texts.contains_key(&("?:0".to_owned(), "no file".to_owned())));
    }
}
