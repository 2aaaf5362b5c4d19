//! Kernels loaded into a context, for the life of the process. Knows nothing of their work.

use crate::context::Context;
use crate::error::Result;
use crate::sys::{self, CUfunction, CUmodule};
use std::ffi::{c_void, CStr};
use std::ptr;
use std::sync::Arc;

/// A loaded module. Stays loaded.
pub struct Module {
    context: Arc<Context>,
    raw: CUmodule,
}
// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads an image. The only call here that waits for the application's streams: the driver loads code only while the
    /// context is idle.
    ///
    /// # Safety
    /// `image` is a complete cubin, or PTX that ends in a NUL.
    pub unsafe fn load(context: &Arc<Context>, image: &[u8]) -> Result<Module> {
        let mut raw = ptr::null_mut();
        // SAFETY: by the caller's contract.
        unsafe { context.enter()?.cuModuleLoadData(&mut raw, image.as_ptr().cast::<c_void>()) }?;
        Ok(Module { context: context.clone(), raw })
    }

    /// A kernel of the module, loaded now rather than at the first launch.
    pub fn function(&self, name: &CStr) -> Result<CUfunction> {
        let cuda = self.context.enter()?;
        let (mut function, mut registers) = (ptr::null_mut(), 0);
        // SAFETY: the module is loaded, the name ends in a NUL, outputs are writable. Drivers that load lazily load a function when its
        // attributes are asked for.
        unsafe {
            cuda.cuModuleGetFunction(&mut function, self.raw, name.as_ptr())?;
            cuda.cuFuncGetAttribute(&mut registers, sys::FUNC_NUM_REGS, function)?;
        }
        Ok(function)
    }
}
