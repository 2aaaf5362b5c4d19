//! Device memory for the tools: allocate, fill, read. Through the CUDA driver, found at run time; absent on most machines.

use crate::error::{Failure, Result};
use crate::fail;
use cudarc::driver::sys::{self, CUresult};
use std::sync::atomic::{AtomicI32, Ordering};

static ORDINAL: AtomicI32 = AtomicI32::new(0);

/// Chooses the GPU of this process's buffers by CUDA index.
pub fn choose(ordinal: i32) {
    ORDINAL.store(ordinal, Ordering::Relaxed);
}

/// GPUs of this machine; 0 without a driver.
pub fn count() -> i32 {
    let mut n = 0;
    // SAFETY: the driver is looked for before it is called; the output is writable.
    let ok = unsafe {
        sys::is_culib_present()
            && sys::cuInit(0) == CUresult::CUDA_SUCCESS
            && sys::cuDeviceGetCount(&mut n) == CUresult::CUDA_SUCCESS
    };
    if ok {
        n
    } else {
        0
    }
}

fn check(call: &str, result: CUresult) -> Result<()> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(Failure::new(format!("{call}: {other:?}"))),
    }
}

/// Makes the primary context of the chosen GPU current in the calling thread.
fn enter() -> Result<()> {
    let ordinal = ORDINAL.load(Ordering::Relaxed);
    let n = count();
    if ordinal >= n {
        fail!("--memory gpu: GPU {ordinal} was asked for, the CUDA driver sees {n}");
    }
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: the driver is initialised (count); outputs are writable. The context is kept for the life of the process.
    unsafe {
        check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal))?;
        check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
        check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))
    }
}

/// Allocates device memory.
pub fn allocate(len: usize) -> Result<u64> {
    enter()?;
    let mut at = 0;
    // SAFETY: a context is current; the output is writable.
    check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut at, len) })?;
    Ok(at)
}

/// Frees what `allocate` gave.
pub fn free(at: u64) {
    // SAFETY: allocated by cuMemAlloc and freed once; an error at this point changes nothing.
    let _ = enter().map(|()| unsafe { sys::cuMemFree_v2(at) });
}

/// Copies to device memory and waits until it is visible to everybody.
pub fn store(at: u64, bytes: &[u8]) -> Result<()> {
    enter()?;
    // SAFETY: the caller's range of an allocation.
    unsafe {
        check("cuMemcpyHtoD", sys::cuMemcpyHtoD_v2(at, bytes.as_ptr().cast(), bytes.len()))?;
        check("cuCtxSynchronize", sys::cuCtxSynchronize())
    }
}

/// Copies device memory to the host.
pub fn load(at: u64, out: &mut [u8]) -> Result<()> {
    enter()?;
    // SAFETY: the caller's range of an allocation.
    check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), at, out.len()) })
}

/// Sets every byte.
pub fn fill(at: u64, len: usize, value: u8) -> Result<()> {
    enter()?;
    // SAFETY: the caller's range of an allocation.
    unsafe {
        check("cuMemsetD8", sys::cuMemsetD8_v2(at, value, len))?;
        check("cuCtxSynchronize", sys::cuCtxSynchronize())
    }
}
