//! Kernels loaded into a context, for the life of the process.

use crate::context::{Context, Entered};
use crate::error::Result;
use crate::sys::{self, CUfunction, CUlibrary, CUmodule};
use std::ffi::{c_void, CStr};
use std::ptr;
use std::sync::Arc;

/// Loaded code. Stays loaded.
pub struct Module {
    context: Arc<Context>,
    code: Code,
}

enum Code {
    /// Loaded without a context; kernels are loaded into ours one by one, which needs no GPU that is at rest.
    Library(CUlibrary),
    /// For drivers that know no libraries.
    Module(CUmodule),
}
// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads an image.
    ///
    /// # Safety
    /// `image` is a complete cubin, or PTX that ends in a NUL.
    pub unsafe fn load(context: &Arc<Context>, image: &'static [u8]) -> Result<Module> {
        let cuda = context.enter()?;
        let at = image.as_ptr().cast::<c_void>();
        let (mut library, mut module, none) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        // SAFETY: by the caller's contract; no options are given.
        let loaded = unsafe { cuda.cuLibraryLoadData(&mut library, at, ptr::null_mut(), none, 0, ptr::null_mut(), none, 0) };
        let code = match loaded {
            Ok(()) => Code::Library(library),
            Err(e) if e.code() == sys::ERROR_NOT_FOUND => {
                // SAFETY: by the caller's contract.
                unsafe { cuda.cuModuleLoadData(&mut module, at) }?;
                Code::Module(module)
            }
            Err(e) => return Err(e),
        };
        drop(cuda);
        Ok(Module { context: context.clone(), code })
    }

    /// A kernel, loaded now: the first launch finds it ready.
    pub fn function(&self, name: &CStr) -> Result<CUfunction> {
        let cuda = self.context.enter()?;
        let function = self.find(&cuda, name)?;
        let mut registers = 0;
        // SAFETY: the function is valid, the output writable. Drivers that load lazily load a function when its attributes are asked for.
        unsafe { cuda.cuFuncGetAttribute(&mut registers, sys::FUNC_NUM_REGS, function) }?;
        Ok(function)
    }

    fn find(&self, cuda: &Entered<'_>, name: &CStr) -> Result<CUfunction> {
        let (mut kernel, mut function) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the code is loaded, the name ends in a NUL, outputs are writable, the context is current.
        unsafe {
            match self.code {
                Code::Library(library) => {
                    cuda.cuLibraryGetKernel(&mut kernel, library, name.as_ptr())?;
                    cuda.cuKernelGetFunction(&mut function, kernel)?;
                }
                Code::Module(module) => cuda.cuModuleGetFunction(&mut function, module, name.as_ptr())?,
            }
        }
        Ok(function)
    }
}
