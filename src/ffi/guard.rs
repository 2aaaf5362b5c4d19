//! The boundary: catches panics, turns errors into status numbers and the thread's last-error text, checks pointers.

use crate::status::{bail, Error, ErrorKind, Result, StatusCode};
use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_void, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
    static LAST_STATUS: Cell<StatusCode> = const { Cell::new(crate::status::UCCL_OK) };
}

pub(super) fn last_status() -> StatusCode {
    LAST_STATUS.get()
}

pub(super) fn last_error() -> *const c_char {
    LAST_ERROR.with(|e| e.borrow().as_ptr())
}

/// Runs `body`; on an error or a panic records the text and returns `default`.
pub(super) fn guard<T>(default: T, body: impl FnOnce() -> Result<T>) -> T {
    run(body).unwrap_or(default)
}

/// Runs `body` and returns its status number, or that of its error.
pub(super) fn status(body: impl FnOnce() -> Result<StatusCode>) -> StatusCode {
    run(body).unwrap_or_else(|e| e.code())
}

fn run<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    // AssertUnwindSafe: shared state is behind locks that do not poison; a panic is reported as an internal error.
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        let error = Error::new(ErrorKind::Internal, format_args!("panic: {}", text.unwrap_or("no message")));
        log::error!("{error}");
        Err(error)
    });
    if let Err(error) = &result {
        let text = CString::new(error.to_string().replace('\0', " ")).unwrap_or_default();
        LAST_ERROR.with(|e| *e.borrow_mut() = text);
        LAST_STATUS.set(error.code());
    }
    result
}

/// A NUL-terminated UTF-8 argument.
///
/// # Safety
/// `ptr` is null or points to NUL-terminated text that outlives the call.
pub(super) unsafe fn str_arg<'a>(ptr: *const c_char, name: &str) -> Result<&'a str> {
    if ptr.is_null() {
        bail!(InvalidArgument, "{name} is NULL");
    }
    // SAFETY: non-null, and NUL-terminated by the caller's contract.
    match unsafe { CStr::from_ptr(ptr) }.to_str() {
        Ok(text) => Ok(text),
        Err(_) => bail!(InvalidArgument, "{name} is not UTF-8"),
    }
}

/// An output argument.
///
/// # Safety
/// `ptr` is null or valid for writes of a `T` for the duration of the call.
pub(super) unsafe fn out_arg<'a, T>(ptr: *mut T, name: &str) -> Result<&'a mut T> {
    // SAFETY: by the caller's contract.
    match unsafe { ptr.as_mut() } {
        Some(out) => Ok(out),
        None => bail!(InvalidArgument, "{name} is NULL"),
    }
}

/// An input array; null is allowed when `n` is 0.
///
/// # Safety
/// `ptr` is null or points to `n` values that outlive the call.
pub(super) unsafe fn array_arg<'a, T>(ptr: *const T, n: usize, name: &str) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() {
        bail!(InvalidArgument, "{name} is NULL");
    }
    if !ptr.is_aligned() || n.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        bail!(InvalidArgument, "{name}: {n} items at {ptr:?}");
    }
    // SAFETY: by the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts(ptr, n) })
}

/// Input bytes; null is allowed when `len` is 0.
///
/// # Safety
/// As [`array_arg`].
pub(super) unsafe fn bytes_arg<'a>(ptr: *const c_void, len: usize, name: &str) -> Result<&'a [u8]> {
    // SAFETY: by the caller's contract.
    unsafe { array_arg(ptr.cast(), len, name) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::UCCL_ERR_INTERNAL;

    #[test]
    fn a_panic_becomes_a_status_and_a_text() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let code = status(|| panic!("boom {}", 7));
        std::panic::set_hook(hook);
        assert_eq!(code, UCCL_ERR_INTERNAL);
        // SAFETY: last_error returns a valid C string of this thread.
        assert_eq!(unsafe { CStr::from_ptr(last_error()) }.to_str(), Ok("panic: boom 7"));
    }
}
