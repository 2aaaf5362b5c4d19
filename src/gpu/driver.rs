//! The CUDA driver as a library that may be missing: probed once, then every call's result becomes an [`Error`].

use crate::status::{err, Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::CStr;
use std::sync::OnceLock;

static STATE: OnceLock<std::result::Result<i32, String>> = OnceLock::new();

/// Opens and initialises the driver once: the number of GPUs, or why there is none to use.
fn state() -> &'static std::result::Result<i32, String> {
    STATE.get_or_init(|| {
        // cudarc panics at its first call when the library is missing, so nothing else of it runs before this answer.
        // SAFETY: opens libcuda by name; its initialisers have no requirement on the caller.
        if !unsafe { sys::is_culib_present() } {
            return Err("the CUDA driver library (libcuda.so.1) is not installed".into());
        }
        let mut count = 0;
        // SAFETY: cuInit takes 0; it makes no context.
        check("cuInit", unsafe { sys::cuInit(0) }).map_err(|e| e.to_string())?;
        // SAFETY: the out pointer is a local.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) }).map_err(|e| e.to_string())?;
        Ok(count)
    })
}

/// Whether the driver is there and sees at least one GPU. Makes no context.
pub(crate) fn available() -> bool {
    matches!(state(), Ok(n) if *n > 0)
}

/// GPUs the driver sees; 0 without a driver.
pub(crate) fn device_count() -> i32 {
    state().as_ref().copied().unwrap_or(0)
}

/// An error that says why, when no GPU can be used.
pub(super) fn require() -> Result<()> {
    match state() {
        Ok(n) if *n > 0 => Ok(()),
        Ok(_) => Err(err!(Gpu, "the CUDA driver sees no GPU")),
        Err(why) => Err(err!(Gpu, "no GPU can be used: {why}")),
    }
}

/// Turns a driver result into ours.
pub(super) fn check(what: &str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(describe(what, result))
}

#[cold]
fn describe(what: &str, result: CUresult) -> Error {
    let mut text = std::ptr::null();
    // SAFETY: the driver is loaded (it returned `result`); on success text is a static C string.
    let text = unsafe {
        if sys::cuGetErrorString(result, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null() {
            CStr::from_ptr(text).to_string_lossy()
        } else {
            "unknown error".into()
        }
    };
    match result {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => err!(Resource, "{what}: {text}"),
        _ => err!(Gpu, "{what}: {text} ({})", result as u32),
    }
}
