//! The log callback of the C ABI. Translates only.

use super::guard::status;
use crate::status::UCCL_OK;
use std::ffi::{c_char, c_int, c_void};

/// Log level: a failure.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_ERROR: c_int = 1;
/// Log level: degraded, but continuing.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_WARN: c_int = 2;
/// Log level: main events.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_INFO: c_int = 3;
/// Log level: details for debugging.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_DEBUG: c_int = 4;
/// Log level: every transfer and frame.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_TRACE: c_int = 5;

const _: () = {
    use log::Level;
    assert!(Level::Error as c_int == UCCL_LOG_ERROR && Level::Warn as c_int == UCCL_LOG_WARN);
    assert!(Level::Info as c_int == UCCL_LOG_INFO && Level::Debug as c_int == UCCL_LOG_DEBUG);
    assert!(Level::Trace as c_int == UCCL_LOG_TRACE);
};

/// Receives a log line: its level (UCCL_LOG_*), its text (NUL-terminated, without a newline, valid during the call only) and the pointer
/// that was given to uccl_engine_set_log_callback.
///
/// One thread of the library calls it, one line at a time and without holding locks. It may block, and it may call any function of this
/// library except uccl_engine_set_log_callback; lines that its own calls log go to standard error. The library queues up to 4,096 lines
/// or 1 MiB for it, drops the rest, and logs how many it dropped. The callback must return: an exception or a longjmp out of it ends the
/// process.
#[allow(non_camel_case_types)]
pub type uccl_log_callback_t = Option<unsafe extern "C" fn(level: c_int, text: *const c_char, user: *mut c_void)>;

/// Sends the log lines of the whole process to a callback instead of standard error. UCCL_P2P_LOG_LEVEL selects the levels, as without a
/// callback.
///
/// @param callback  [in] The function; NULL restores standard error.
/// @param user      [in] Passed to every call. Keep it valid until another callback, or NULL, is set.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT inside a callback; UCCL_ERR_UNSUPPORTED in a Rust program that has set a logger of its own,
///         which then gets the lines.
///
/// The previous callback first gets the lines that are queued for it, for up to one second; uccl_engine_destroy waits in the same way. On
/// return no call of the previous callback is running, and none will start. A child of fork keeps the callback. Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_set_log_callback(callback: uccl_log_callback_t, user: *mut c_void) -> c_int {
    status(|| {
        // `user` is only passed on; NULL is allowed.
        let _ = user.is_null();
        let callback = callback.map(|call| crate::logging::Callback { call, user });
        crate::logging::set_callback(callback, crate::config::log_level())?;
        Ok(UCCL_OK)
    })
}
