//! The C boundary: catches panics, defers cancellation, turns errors into status numbers and the thread's last error, and checks
//! pointers. Knows nothing of engines.

use crate::status::{bail, Error, ErrorKind, Result, StatusCode, UCCL_OK};
use std::cell::{Cell, UnsafeCell};
use std::ffi::{c_char, c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

/// Longest text of a last error, with its NUL; longer ones are cut.
const TEXT_BYTES: usize = 2048;

// Neither has a destructor, so both live as long as the thread: programs call the library from destructors of static objects and of
// thread-specific data, which run after the destructors of thread locals.
thread_local! {
    static LAST_ERROR: UnsafeCell<[u8; TEXT_BYTES]> = const { UnsafeCell::new([0; TEXT_BYTES]) };
    static LAST_STATUS: Cell<StatusCode> = const { Cell::new(UCCL_OK) };
}

/// When a wait of this many milliseconds ends; `None`: negative or beyond what a clock shows, so it does not end.
pub(super) fn deadline(timeout_ms: i64) -> Option<Instant> {
    Instant::now().checked_add(Duration::from_millis(u64::try_from(timeout_ms).ok()?))
}

pub(super) fn last_status() -> StatusCode {
    LAST_STATUS.try_with(Cell::get).unwrap_or(UCCL_OK)
}

pub(super) fn last_error() -> *const c_char {
    LAST_ERROR.try_with(|text| text.get().cast_const().cast()).unwrap_or(c"".as_ptr())
}

/// Keeps an error for `last_error`. Nothing here panics or allocates.
fn remember(error: &Error) {
    let text = error.to_str();
    let mut len = text.len().min(TEXT_BYTES - 1);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    let _ = LAST_ERROR.try_with(|kept| {
        // SAFETY: only this thread has the array, and no reference to it outlives this closure. The application holds a
        // raw pointer, whose text this call replaces, as its documentation says.
        let kept = unsafe { &mut *kept.get() };
        for (to, from) in kept.iter_mut().zip(&text.as_bytes()[..len]) {
            *to = if *from == 0 { b' ' } else { *from };
        }
        kept[len] = 0;
    });
    let _ = LAST_STATUS.try_with(|status| status.set(error.code()));
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
    let _whole = process::thread::Uncancelled::new();
    // AssertUnwindSafe: shared state is behind locks that do not poison; a panic is reported as an internal error.
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        let error = Error::new(ErrorKind::Internal, format_args!("panic: {}", text.unwrap_or("no message")));
        // The payload's destructor may panic too.
        let _ = catch_unwind(AssertUnwindSafe(move || drop(panic)));
        let _ = catch_unwind(AssertUnwindSafe(|| log::error!("{error}")));
        Err(error)
    });
    if let Err(error) = &result {
        remember(error);
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
/// `ptr` is null, badly aligned, or valid for writes of a `T` for the duration of the call.
pub(super) unsafe fn out_arg<'a, T>(ptr: *mut T, name: &str) -> Result<&'a mut T> {
    // SAFETY: by the caller's contract.
    match unsafe { optional_out_arg(ptr, name)? } {
        Some(out) => Ok(out),
        None => bail!(InvalidArgument, "{name} is NULL"),
    }
}

/// An output argument that may be NULL.
///
/// # Safety
/// As [`out_arg`].
pub(super) unsafe fn optional_out_arg<'a, T>(ptr: *mut T, name: &str) -> Result<Option<&'a mut T>> {
    if !ptr.is_aligned() {
        bail!(InvalidArgument, "{name} is {ptr:?}, which is not a multiple of {}", align_of::<T>());
    }
    // SAFETY: by the caller's contract, and aligned.
    Ok(unsafe { ptr.as_mut() })
}

/// An input argument.
///
/// # Safety
/// `ptr` is null, badly aligned, or points to a `T` that outlives the call and does not change during it.
pub(super) unsafe fn in_arg<'a, T>(ptr: *const T, name: &str) -> Result<&'a T> {
    if ptr.is_null() {
        bail!(InvalidArgument, "{name} is NULL");
    }
    if !ptr.is_aligned() {
        bail!(InvalidArgument, "{name} is {ptr:?}, which is not a multiple of {}", align_of::<T>());
    }
    // SAFETY: by the caller's contract, non-null and aligned.
    Ok(unsafe { &*ptr })
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
        assert_eq!(text(), "panic: boom 7");
    }

    fn text() -> &'static str {
        // SAFETY: last_error returns a valid C string of this thread, which ends after the test.
        unsafe { CStr::from_ptr(last_error()) }.to_str().expect("UTF-8")
    }

    #[test]
    fn a_text_of_any_length_and_content_is_a_c_string() {
        let long = "ä".repeat(TEXT_BYTES);
        assert_eq!(status(|| bail!(System, "a{long}")), crate::status::UCCL_ERR_SYSTEM);
        assert!(text().len() < TEXT_BYTES && text().len() > TEXT_BYTES - 4 && text().starts_with("aä"));
        assert_eq!(status(|| bail!(System, "x\0y")), crate::status::UCCL_ERR_SYSTEM);
        assert_eq!(text(), "x y");
        assert_eq!(last_status(), crate::status::UCCL_ERR_SYSTEM);
    }

    #[test]
    fn badly_aligned_pointers_are_refused() {
        let mut words = [0u64; 2];
        for shift in 0..8 {
            let ptr = words.as_mut_ptr().cast::<u8>().wrapping_add(shift).cast::<u64>();
            // SAFETY: inside the array; those that are not aligned are never followed.
            let taken = unsafe { (out_arg(ptr, "p").is_ok(), optional_out_arg(ptr, "p").is_ok(), in_arg(ptr, "p").is_ok()) };
            assert_eq!(taken, (shift == 0, shift == 0, shift == 0), "{shift}");
        }
        // SAFETY: null is allowed.
        unsafe {
            assert!(optional_out_arg::<u64>(std::ptr::null_mut(), "p").is_ok_and(|p| p.is_none()));
            assert!(out_arg::<u64>(std::ptr::null_mut(), "p").is_err() && in_arg::<u64>(std::ptr::null(), "p").is_err());
        }
    }
}
