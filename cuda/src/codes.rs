//! The driver's result codes that the library distinguishes. Numbers only.

use std::ffi::c_uint;

/// Number of a result; 0 is success.
pub type CUresult = c_uint;

/// `CUDA_ERROR_INVALID_VALUE`; also the result for addresses that CUDA does not know.
pub const ERROR_INVALID_VALUE: CUresult = 1;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub const ERROR_OUT_OF_MEMORY: CUresult = 2;
/// `CUDA_ERROR_NOT_INITIALIZED`; also the result of `cuInit` in a child of a process that had called it.
pub const ERROR_NOT_INITIALIZED: CUresult = 3;
/// `CUDA_ERROR_STUB_LIBRARY`: the toolkit's library for linking, not a driver.
pub const ERROR_STUB_LIBRARY: CUresult = 34;
/// `CUDA_ERROR_NO_DEVICE`.
pub const ERROR_NO_DEVICE: CUresult = 100;
/// `CUDA_ERROR_INVALID_CONTEXT`.
pub const ERROR_INVALID_CONTEXT: CUresult = 201;
/// `CUDA_ERROR_NOT_FOUND`; also the result of functions that the driver lacks.
pub const ERROR_NOT_FOUND: CUresult = 500;
/// `CUDA_ERROR_NOT_READY`.
pub const ERROR_NOT_READY: CUresult = 600;
/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
pub const ERROR_PEER_ACCESS_ALREADY_ENABLED: CUresult = 704;
/// Errors after which a context runs nothing: deinitialised, invalid, ECC, NVLink, illegal address, time-out, destroyed,
/// assert and kernel faults.
pub const FATAL: [CUresult; 14] = [4, 201, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719];
