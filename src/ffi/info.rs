//! What the library says about itself: statuses in words, the last error of a thread, the version. Translates only.

use super::guard::{self, guard};
use crate::status::{ErrorKind, StatusCode, UCCL_IN_PROGRESS, UCCL_OK};
use std::ffi::{c_char, c_int, CStr};

/// A sentence for a status number.
///
/// @param status  UCCL_OK, UCCL_IN_PROGRESS or UCCL_ERR_*; any other number gives "unknown status".
/// @return Static text, never NULL, never to be freed.
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

/// The cause of the last failed call of this thread, in words, with addresses and names.
///
/// @return NUL-terminated text, empty when no call failed yet, cut to 2047 bytes. Valid until this thread's next failing call or its end; never to be freed.
///
/// Threads: each has its own.
#[no_mangle]
pub extern "C" fn uccl_engine_last_error() -> *const c_char {
    guard(c"".as_ptr(), || Ok(guard::last_error()))
}

/// The status of the last failed call of this thread: what a function that returns a handle, a bool or nothing could not say.
///
/// @return UCCL_OK when no call failed yet, else a negative UCCL_ERR_*.
///
/// Threads: each has its own.
#[no_mangle]
pub extern "C" fn uccl_engine_last_status() -> c_int {
    guard(UCCL_OK, || Ok(guard::last_status()))
}

/// Version of the library.
///
/// @return "major.minor.patch", static text, never to be freed.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_version() -> *const c_char {
    guard(c"".as_ptr(), || Ok(concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()))
}
