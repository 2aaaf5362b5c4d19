//! Memory for tests: host memory, or memory of the first GPU with UCCL_TEST_MEMORY=gpu.

use cudarc::driver::sys::{self, CUresult};
use std::borrow::Cow;

pub enum Memory {
    Host(Vec<u8>),
    Gpu { at: u64, len: usize },
}

fn check(call: &str, result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS, "{call}");
}

/// Makes the first GPU's primary context current. It is kept for the life of the process.
fn enter() {
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: outputs are writable; the driver is present, or the test was not asked to use it.
    unsafe {
        assert!(sys::is_culib_present(), "UCCL_TEST_MEMORY=gpu without a CUDA driver");
        check("cuInit", sys::cuInit(0));
        check("cuDeviceGet", sys::cuDeviceGet(&mut device, 0));
        check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device));
        check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context));
    }
}

impl Memory {
    pub fn new(bytes: Vec<u8>) -> Memory {
        if std::env::var("UCCL_TEST_MEMORY").as_deref() != Ok("gpu") {
            return Memory::Host(bytes);
        }
        enter();
        let mut at = 0;
        // SAFETY: a context is current; the allocation holds the bytes.
        unsafe {
            check("cuMemAlloc", sys::cuMemAlloc_v2(&mut at, bytes.len()));
            check("cuMemcpyHtoD", sys::cuMemcpyHtoD_v2(at, bytes.as_ptr().cast(), bytes.len()));
            check("cuCtxSynchronize", sys::cuCtxSynchronize());
        }
        Memory::Gpu { at, len: bytes.len() }
    }

    pub fn addr(&self) -> usize {
        match self {
            Memory::Host(bytes) => bytes.as_ptr() as usize,
            Memory::Gpu { at, .. } => *at as usize,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Memory::Host(bytes) => bytes.len(),
            Memory::Gpu { len, .. } => *len,
        }
    }

    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Memory::Host(bytes) => Cow::Borrowed(bytes),
            Memory::Gpu { at, len } => {
                enter();
                let mut copy = vec![0; *len];
                // SAFETY: the allocation holds len bytes.
                check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(copy.as_mut_ptr().cast(), *at, *len) });
                Cow::Owned(copy)
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Memory::Gpu { at, .. } = self {
            enter();
            // SAFETY: allocated in new, freed once.
            unsafe { sys::cuMemFree_v2(*at) };
        }
    }
}
