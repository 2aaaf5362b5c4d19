//! The caller's logger, used as TCPX uses it.

use crate::rules::{counters, lock, up, violation};
use nccl_net_abi::{ncclDebugLogger_t, NCCL_LOG_WARN};
use std::ffi::{c_int, CString};
use std::sync::Mutex;

static LOGGER: Mutex<ncclDebugLogger_t> = Mutex::new(None);

/// Sets the logger of `init`.
pub(crate) fn set(logger: ncclDebugLogger_t) {
    *lock(&LOGGER) = logger;
}

/// Calls the logger as TCPX does: unchecked, with arguments.
pub(crate) fn log(level: c_int, what: &str, number: i32) {
    let Some(logger) = *lock(&LOGGER) else {
        violation!("the logger is NULL: calling it crashes");
    };
    let what = CString::new(what).unwrap_or_default();
    // SAFETY: a format with matching arguments; strings end in a NUL.
    unsafe {
        logger(
            level,
            16,
            c"src/strict_foreign.cc".as_ptr(),
            1000 + level,
            c"NET/TCPX : %s %d (%lu, %.1f)".as_ptr(),
            what.as_ptr(),
            number,
            7u64,
            0.5f64,
        )
    };
}

/// Logs and counts a warning.
pub(crate) fn warn(what: &str, number: i32) {
    up(&counters().warnings, None, 1);
    log(NCCL_LOG_WARN, what, number);
}
