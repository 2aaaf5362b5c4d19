//! The log lines of the process, for tests that read them.

use std::sync::{Mutex, MutexGuard};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collect;

impl log::Log for Collect {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        lines().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// Starts keeping lines of level info and above.
pub fn collect() {
    log::set_logger(&Collect).unwrap();
    log::set_max_level(log::LevelFilter::Info);
}

/// The lines so far.
pub fn lines() -> MutexGuard<'static, Vec<String>> {
    LINES.lock().unwrap()
}
