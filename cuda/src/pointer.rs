//! The driver's pointer attributes. Knows nothing of the memory's owner.

use crate::error::Result;
use crate::sys::{self, Functions};
use std::ffi::c_int;

/// One pointer attribute; false when the driver does not know the address.
pub(crate) fn attribute<T: Copy>(cuda: &Functions, which: c_int, ptr: u64, out: &mut T) -> Result<bool> {
    // SAFETY: T is the attribute's type (u32, i32 or u64 in every call here); the address itself is not dereferenced.
    match unsafe { cuda.cuPointerGetAttribute((out as *mut T).cast(), which, ptr) } {
        Ok(()) => Ok(true),
        Err(e) if e.code() == sys::ERROR_INVALID_VALUE => Ok(false),
        Err(e) => Err(e),
    }
}
