//! The table for device memory TCP as a plugin of its own, and a simulated CUDA driver whose memory a NIC can read: for the contract probe
//! (tests/gpu/contract_probe), which tests/vm runs over it under UCCL_TCPX_EMULATE_DEVICE=1. Device memory is host memory in a memory file.

use nccl_net_abi::ncclNet_v7;
use soft_plugin::EmulatedMemory;
use std::ffi::{c_int, c_uint, c_void};

/// The table that the probe looks for.
#[no_mangle]
pub static mut ncclNetPlugin_v7: ncclNet_v7 = soft_plugin::DEVICE_TABLE;

const OUT_OF_MEMORY: c_int = 2;

#[no_mangle]
extern "C" fn cuInit(_flags: c_uint) -> c_int {
    0
}

/// # Safety
/// `device` is writable.
#[no_mangle]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    // SAFETY: the caller's int.
    unsafe { *device = ordinal };
    0
}

/// # Safety
/// `context` is writable.
#[no_mangle]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { *context = std::ptr::without_provenance_mut(1) };
    0
}

#[no_mangle]
extern "C" fn cuCtxSetCurrent(_context: *mut c_void) -> c_int {
    0
}

#[no_mangle]
extern "C" fn cuCtxSynchronize() -> c_int {
    0
}

/// # Safety
/// `at` is writable.
#[no_mangle]
unsafe extern "C" fn cuMemAlloc_v2(at: *mut u64, size: usize) -> c_int {
    let Ok(block) = EmulatedMemory::new(size) else { return OUT_OF_MEMORY };
    // SAFETY: the caller's number.
    unsafe { *at = block.as_ptr() as u64 };
    // The probe frees nothing.
    std::mem::forget(block);
    0
}

/// # Safety
/// The bytes belong to one allocation.
#[no_mangle]
unsafe extern "C" fn cuMemsetD8_v2(at: u64, byte: u8, size: usize) -> c_int {
    // SAFETY: device memory is memory of this process.
    unsafe { std::ptr::write_bytes(at as *mut u8, byte, size) };
    0
}

/// # Safety
/// Both ranges are memory of the caller.
#[no_mangle]
unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const u8, size: usize) -> c_int {
    // SAFETY: as above.
    unsafe { std::ptr::copy(from, to as *mut u8, size) };
    0
}

/// # Safety
/// Both ranges are memory of the caller.
#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, size: usize) -> c_int {
    // SAFETY: as above.
    unsafe { std::ptr::copy(from as *const u8, to, size) };
    0
}

/// Everything is device memory. Only the kind of memory is asked for.
///
/// # Safety
/// `value` is writable.
#[no_mangle]
unsafe extern "C" fn cuPointerGetAttribute(value: *mut c_uint, attribute: c_int, at: u64) -> c_int {
    const MEMORY_TYPE: c_int = 2;
    // SAFETY: the caller's number.
    unsafe { *value = 2 };
    c_int::from(attribute != MEMORY_TYPE || at == 0)
}
