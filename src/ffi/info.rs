//! Status texts, the last error of a thread, and the version. Translates only.

use super::guard::{self, guard};
use crate::status::{ErrorKind, StatusCode, UCCL_IN_PROGRESS, UCCL_OK};
use std::ffi::{c_char, c_int, CStr};

/// Returns a text for a status number.
///
/// @param status  UCCL_OK, UCCL_IN_PROGRESS or UCCL_ERR_*; any other number gives "unknown status".
/// @return Static text, never NULL. Do not free it.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_strerror(status: StatusCode) -> *const c_char {
    guard(c"unknown status".as_ptr(), || {
        let text: &'static CStr = match status {
            UCCL_OK => c"success",
            UCCL_IN_PROGRESS => c"in progress",
            code => match ErrorKind::ALL.into_iter().find(|k| k.code() == code) {
                Some(kind) => kind.describe(),
                None => c"unknown status",
            },
        };
        Ok(text.as_ptr())
    })
}

/// Returns the cause of the last failed call of this thread, as text with addresses and names.
///
/// @return NUL-terminated text, cut to 2047 bytes; empty if no call failed yet. Valid until the next failing call of this thread, or the
///         thread's end. Do not free it.
///
/// Threads: each has its own.
#[no_mangle]
pub extern "C" fn uccl_engine_last_error() -> *const c_char {
    guard(c"".as_ptr(), || Ok(guard::last_error()))
}

/// Returns the status of the last failed call of this thread, for functions that return a handle, a bool or nothing.
///
/// @return UCCL_OK if no call failed yet, else a negative UCCL_ERR_*.
///
/// Threads: each has its own.
#[no_mangle]
pub extern "C" fn uccl_engine_last_status() -> c_int {
    guard(UCCL_OK, || Ok(guard::last_status()))
}

/// Returns the version of the library.
///
/// @return "major.minor.patch", static text. Do not free it.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_version() -> *const c_char {
    guard(c"".as_ptr(), || Ok(concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()))
}
