//! The log of the C ABI: where its lines go. Translates only.

use super::guard::status;
use crate::status::UCCL_OK;
use std::ffi::{c_char, c_int, c_void};

/// Level of a log line: something failed.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_ERROR: c_int = 1;
/// Level of a log line: something is not as it should be, and the library goes on.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_WARN: c_int = 2;
/// Level of a log line: what happens, in large steps.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_INFO: c_int = 3;
/// Level of a log line: what happens, in small steps.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_DEBUG: c_int = 4;
/// Level of a log line: everything.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_LOG_TRACE: c_int = 5;

const _: () = {
    use log::Level;
    assert!(Level::Error as c_int == UCCL_LOG_ERROR && Level::Warn as c_int == UCCL_LOG_WARN);
    assert!(Level::Info as c_int == UCCL_LOG_INFO && Level::Debug as c_int == UCCL_LOG_DEBUG);
    assert!(Level::Trace as c_int == UCCL_LOG_TRACE);
};

/// Takes a log line: its level (UCCL_LOG_*), its text (NUL-terminated, without a newline, valid during the call only) and the pointer
/// that was given with the callback.
///
/// It is called by one thread of the library's, a line after the other, and outside of all locks: it may take its time, and call any
/// function of this library but uccl_engine_set_log_callback; lines that come of its own calls go to standard error. Up to 4,096
/// lines, or 1 MiB of them, wait for it; what comes beyond is left out, and a line says how many these were. It must return: an
/// exception or a longjmp out of it ends the process.
#[allow(non_camel_case_types)]
pub type uccl_log_callback_t = Option<unsafe extern "C" fn(level: c_int, text: *const c_char, user: *mut c_void)>;

/// Hands log lines to the application instead of standard error, for the whole process. Which levels are logged at all is the
/// matter of UCCL_P2P_LOG_LEVEL, as without a callback.
///
/// @param callback  [in] The function; NULL: back to standard error.
/// @param user      [in] Given to every call. Must stay valid until another callback, or NULL, was set.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT inside a callback; UCCL_ERR_UNSUPPORTED where the program is written in Rust and has a
///         logger of its own, which then gets the lines.
///
/// What was logged before is handed to the callback before, as far as that takes it within a second; uccl_engine_destroy waits for as
/// much. On return no call of the callback before is running and none will begin. A child of fork keeps the callback. Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_set_log_callback(callback: uccl_log_callback_t, user: *mut c_void) -> c_int {
    status(|| {
        // `user` is only handed on: NULL is as good as any.
        let _ = user.is_null();
        let callback = callback.map(|call| crate::logging::Callback { call, user });
        crate::logging::set_callback(callback, crate::config::log_level())?;
        Ok(UCCL_OK)
    })
}
