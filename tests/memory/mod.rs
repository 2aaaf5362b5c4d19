//! Memory for tests: host memory, or memory of GPUs with UCCL_TEST_MEMORY=gpu.

use cudarc::driver::sys::{self, CUresult};
use std::borrow::Cow;

/// Where a test wants memory. GPUs are real ones with UCCL_TEST_MEMORY=gpu (one that is alone is both); else they are host memory, which
/// an engine with UCCL_TCPX_EMULATE_DEVICE=1 takes for a GPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Host,
    FirstGpu,
    LastGpu,
}

impl Place {
    pub const ALL: [Place; 3] = [Place::Host, Place::FirstGpu, Place::LastGpu];
}

pub enum Memory {
    Host(Vec<u8>),
    Gpu { at: u64, len: usize, ordinal: i32 },
}

fn check(call: &str, result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS, "{call}");
}

/// Makes the driver ready; the number of GPUs.
fn gpus() -> i32 {
    let mut count = 0;
    // SAFETY: the output is writable; the driver is present, or the test was not asked to use it.
    unsafe {
        assert!(sys::is_culib_present(), "UCCL_TEST_MEMORY=gpu without a CUDA driver");
        check("cuInit", sys::cuInit(0));
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count));
    }
    count
}

/// Makes the GPU's primary context current. It is kept for the life of the process.
fn enter(ordinal: i32) {
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: outputs are writable; the driver is ready.
    unsafe {
        check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal));
        check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device));
        check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context));
    }
}

impl Memory {
    pub fn new(place: Place, bytes: Vec<u8>) -> Memory {
        if place == Place::Host || std::env::var("UCCL_TEST_MEMORY").as_deref() != Ok("gpu") {
            return Memory::Host(bytes);
        }
        let last = gpus() - 1;
        let ordinal = if place == Place::FirstGpu { 0 } else { last };
        enter(ordinal);
        let mut at = 0;
        // SAFETY: a context is current; the allocation holds the bytes.
        unsafe {
            check("cuMemAlloc", sys::cuMemAlloc_v2(&mut at, bytes.len()));
            check("cuMemcpyHtoD", sys::cuMemcpyHtoD_v2(at, bytes.as_ptr().cast(), bytes.len()));
            check("cuCtxSynchronize", sys::cuCtxSynchronize());
        }
        Memory::Gpu { at, len: bytes.len(), ordinal }
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
            Memory::Gpu { at, len, ordinal } => {
                enter(*ordinal);
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
        if let Memory::Gpu { at, ordinal, .. } = self {
            enter(*ordinal);
            // SAFETY: allocated in new, freed once.
            unsafe { sys::cuMemFree_v2(*at) };
        }
    }
}
