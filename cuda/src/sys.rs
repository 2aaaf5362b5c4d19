//! Types and functions of the driver's C interface that the library uses. A function that the installed driver lacks
//! fails when it is called, not when the driver is opened.
#![allow(non_snake_case)]

pub use crate::codes::*;
use crate::error::{Error, Result};
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};

/// A GPU.
pub type CUdevice = c_int;
/// An address in device memory, or the device address of mapped host memory.
pub type CUdeviceptr = u64;
/// A context.
pub type CUcontext = *mut c_void;
/// A stream; null is the legacy default stream, which nothing here uses.
pub type CUstream = *mut c_void;
/// A loaded module.
pub type CUmodule = *mut c_void;
/// A kernel of a module.
pub type CUfunction = *mut c_void;
/// A captured graph.
pub type CUgraph = *mut c_void;
/// Physical memory of `cuMemCreate`.
pub type CUmemGenericAllocationHandle = u64;

/// `CU_STREAM_CAPTURE_MODE_GLOBAL`.
pub const CAPTURE_GLOBAL: c_uint = 0;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
pub const CAPTURE_RELAXED: c_uint = 2;
/// `CU_STREAM_NON_BLOCKING`.
pub const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_MEMHOSTALLOC_PORTABLE`.
pub const HOSTALLOC_PORTABLE: c_uint = 1;
/// `CU_MEMHOSTALLOC_DEVICEMAP`.
pub const HOSTALLOC_DEVICEMAP: c_uint = 2;
/// `CU_MEM_ATTACH_GLOBAL`.
pub const MEM_ATTACH_GLOBAL: c_uint = 1;
/// `CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED`, which drivers before 12.4 do not know.
pub const HANDLE_TYPE_FABRIC_SUPPORTED: c_int = 128;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`.
pub const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
/// `CU_FUNC_ATTRIBUTE_NUM_REGS`.
pub const FUNC_NUM_REGS: c_int = 4;
/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE`, a `u32`.
pub const POINTER_MEMORY_TYPE: c_int = 2;
/// `CU_POINTER_ATTRIBUTE_DEVICE_POINTER`, a `u64`.
pub const POINTER_DEVICE_POINTER: c_int = 3;
/// `CU_POINTER_ATTRIBUTE_HOST_POINTER`, a `u64`.
pub const POINTER_HOST_POINTER: c_int = 4;
/// `CU_POINTER_ATTRIBUTE_IS_MANAGED`, a `u32`.
pub const POINTER_IS_MANAGED: c_int = 8;
/// `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`, an `i32`.
pub const POINTER_DEVICE_ORDINAL: c_int = 9;
/// `CU_POINTER_ATTRIBUTE_BUFFER_ID`, a `u64`.
pub const POINTER_BUFFER_ID: c_int = 7;
/// `CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE`, a `u32`.
pub const POINTER_IPC_CAPABLE: c_int = 10;
/// `CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES`, a `u64`.
pub const POINTER_ALLOWED_HANDLE_TYPES: c_int = 14;
/// `CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE`, a `u64`.
pub const POINTER_MEMPOOL_HANDLE: c_int = 17;
/// `CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK`.
pub const P2P_PERFORMANCE_RANK: c_int = 1;
/// `CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED`.
pub const P2P_NATIVE_ATOMICS: c_int = 3;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub const HANDLE_POSIX: c_uint = 1;
/// `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
pub const RANGE_DMABUF: c_uint = 1;
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
pub const IPC_LAZY_PEER_ACCESS: c_uint = 1;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
pub const ALLOCATION_PINNED: c_uint = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
pub const LOCATION_DEVICE: c_uint = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READ`.
pub const ACCESS_READ: c_uint = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
pub const ACCESS_READ_WRITE: c_uint = 3;
/// `CU_MEMORYTYPE_HOST`.
pub const MEMORYTYPE_HOST: u32 = 1;
/// `CU_MEMORYTYPE_DEVICE`.
pub const MEMORYTYPE_DEVICE: u32 = 2;
/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
pub const LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;

/// `CUlaunchAttribute`, whose value is 64 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct CUlaunchAttribute {
    pub id: c_uint,
    pub pad: [u8; 4],
    pub value: [u64; 8],
}

/// `CUlaunchConfig`.
#[repr(C)]
#[allow(missing_docs)]
pub struct CUlaunchConfig {
    pub gridDimX: c_uint,
    pub gridDimY: c_uint,
    pub gridDimZ: c_uint,
    pub blockDimX: c_uint,
    pub blockDimY: c_uint,
    pub blockDimZ: c_uint,
    pub sharedMemBytes: c_uint,
    pub hStream: CUstream,
    pub attrs: *mut CUlaunchAttribute,
    pub numAttrs: c_uint,
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct CUmemLocation {
    pub kind: c_uint,
    pub id: c_int,
}

/// `CUmemAllocationProp`, with its flags spelled out.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct CUmemAllocationProp {
    pub kind: c_uint,
    pub handle_types: c_uint,
    pub location: CUmemLocation,
    pub win32: *mut c_void,
    pub compression: u8,
    pub gpu_direct_rdma: u8,
    pub usage: u16,
    pub reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct CUmemAccessDesc {
    pub location: CUmemLocation,
    pub flags: c_uint,
}

/// `CUuuid`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CUuuid(pub [u8; 16]);

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CUipcMemHandle(pub [u8; 64]);

const _: () = {
    assert!(size_of::<CUlaunchAttribute>() == 72 && std::mem::offset_of!(CUlaunchAttribute, value) == 8);
    assert!(size_of::<CUlaunchConfig>() == 56 && std::mem::offset_of!(CUlaunchConfig, hStream) == 32);
    assert!(size_of::<CUmemAllocationProp>() == 32 && size_of::<CUmemAccessDesc>() == 12);
};

/// Declares the table of functions: for each a field, and a method that calls it and converts the result.
macro_rules! functions {
    ($($name:ident = $symbol:literal ($($arg:ident: $type:ty),*);)*) => {
        struct Raw {
            $($name: unsafe extern "C" fn($($type),*) -> CUresult,)*
        }

        /// Stand-ins for functions that the driver lacks.
        mod missing {
            use super::*;
            $(pub unsafe extern "C" fn $name($(_: $type),*) -> CUresult {
                ERROR_NOT_FOUND
            })*
        }

        /// The driver's functions. Each fails with the driver's number and text; requirements are those of NVIDIA's documentation.
        pub struct Functions {
            raw: Raw,
        }

        #[allow(missing_docs, clippy::missing_safety_doc, clippy::too_many_arguments)]
        impl Functions {
            /// Looks up every function.
            ///
            /// # Safety
            /// `find` returns null, or the function of that name in a CUDA driver.
            pub(crate) unsafe fn load(find: impl Fn(&CStr) -> *mut c_void) -> Functions {
                let raw = Raw {
                    $($name: match find($symbol) {
                        f if f.is_null() => missing::$name,
                        // SAFETY: the driver's function of this name has this signature.
                        f => unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> CUresult>(f) },
                    },)*
                };
                Functions { raw }
            }

            $(pub unsafe fn $name(&self, $($arg: $type),*) -> Result<()> {
                // SAFETY: by the caller's contract.
                match unsafe { (self.raw.$name)($($arg),*) } {
                    0 => Ok(()),
                    code => Err(self.error(stringify!($name), code)),
                }
            })*
        }
    };
}

functions! {
    cuInit = c"cuInit"(flags: c_uint);
    cuGetErrorString = c"cuGetErrorString"(error: CUresult, text: *mut *const c_char);
    cuDeviceGetCount = c"cuDeviceGetCount"(count: *mut c_int);
    cuDeviceGet = c"cuDeviceGet"(device: *mut CUdevice, ordinal: c_int);
    cuDeviceGetAttribute = c"cuDeviceGetAttribute"(value: *mut c_int, attribute: c_int, device: CUdevice);
    cuDeviceGetPCIBusId = c"cuDeviceGetPCIBusId"(text: *mut c_char, len: c_int, device: CUdevice);
    cuDeviceGetUuid = c"cuDeviceGetUuid_v2"(uuid: *mut CUuuid, device: CUdevice);
    cuDeviceCanAccessPeer = c"cuDeviceCanAccessPeer"(can: *mut c_int, device: CUdevice, peer: CUdevice);
    cuDeviceGetP2PAttribute = c"cuDeviceGetP2PAttribute"(value: *mut c_int, attribute: c_int, from: CUdevice, to: CUdevice);
    cuDevicePrimaryCtxRetain = c"cuDevicePrimaryCtxRetain"(context: *mut CUcontext, device: CUdevice);
    cuDevicePrimaryCtxRelease = c"cuDevicePrimaryCtxRelease_v2"(device: CUdevice);
    cuDevicePrimaryCtxGetState = c"cuDevicePrimaryCtxGetState"(device: CUdevice, flags: *mut c_uint, active: *mut c_int);
    cuCtxGetCurrent = c"cuCtxGetCurrent"(context: *mut CUcontext);
    cuCtxSetCurrent = c"cuCtxSetCurrent"(context: CUcontext);
    cuCtxPushCurrent = c"cuCtxPushCurrent_v2"(context: CUcontext);
    cuCtxPopCurrent = c"cuCtxPopCurrent_v2"(context: *mut CUcontext);
    cuCtxGetDevice = c"cuCtxGetDevice"(device: *mut CUdevice);
    cuCtxEnablePeerAccess = c"cuCtxEnablePeerAccess"(peer: CUcontext, flags: c_uint);
    cuCtxGetStreamPriorityRange = c"cuCtxGetStreamPriorityRange"(least: *mut c_int, greatest: *mut c_int);
    cuThreadExchangeStreamCaptureMode = c"cuThreadExchangeStreamCaptureMode"(mode: *mut c_uint);
    cuStreamCreateWithPriority = c"cuStreamCreateWithPriority"(stream: *mut CUstream, flags: c_uint, priority: c_int);
    cuStreamDestroy = c"cuStreamDestroy_v2"(stream: CUstream);
    cuStreamQuery = c"cuStreamQuery"(stream: CUstream);
    cuStreamSynchronize = c"cuStreamSynchronize"(stream: CUstream);
    cuStreamWriteValue32 = c"cuStreamWriteValue32_v2"(stream: CUstream, at: CUdeviceptr, value: u32, flags: c_uint);
    cuStreamBeginCapture = c"cuStreamBeginCapture_v2"(stream: CUstream, mode: c_uint);
    cuStreamEndCapture = c"cuStreamEndCapture"(stream: CUstream, graph: *mut CUgraph);
    cuGraphDestroy = c"cuGraphDestroy"(graph: CUgraph);
    cuLaunchHostFunc = c"cuLaunchHostFunc"(stream: CUstream, function: unsafe extern "C" fn(*mut c_void), argument: *mut c_void);
    cuMemAlloc = c"cuMemAlloc_v2"(at: *mut CUdeviceptr, len: usize);
    cuMemFree = c"cuMemFree_v2"(at: CUdeviceptr);
    cuMemAllocAsync = c"cuMemAllocAsync"(at: *mut CUdeviceptr, len: usize, stream: CUstream);
    cuMemFreeAsync = c"cuMemFreeAsync"(at: CUdeviceptr, stream: CUstream);
    cuMemAllocManaged = c"cuMemAllocManaged"(at: *mut CUdeviceptr, len: usize, flags: c_uint);
    cuMemHostAlloc = c"cuMemHostAlloc"(at: *mut *mut c_void, len: usize, flags: c_uint);
    cuMemFreeHost = c"cuMemFreeHost"(at: *mut c_void);
    cuMemHostGetDevicePointer = c"cuMemHostGetDevicePointer_v2"(device: *mut CUdeviceptr, host: *mut c_void, flags: c_uint);
    cuMemGetAllocationGranularity = c"cuMemGetAllocationGranularity"(bytes: *mut usize, prop: *const CUmemAllocationProp, option: c_uint);
    cuMemAddressReserve = c"cuMemAddressReserve"(at: *mut CUdeviceptr, len: usize, align: usize, wish: CUdeviceptr, flags: u64);
    cuMemAddressFree = c"cuMemAddressFree"(at: CUdeviceptr, len: usize);
    cuMemCreate = c"cuMemCreate"(handle: *mut CUmemGenericAllocationHandle, len: usize, prop: *const CUmemAllocationProp, flags: u64);
    cuMemRelease = c"cuMemRelease"(handle: CUmemGenericAllocationHandle);
    cuMemMap = c"cuMemMap"(at: CUdeviceptr, len: usize, offset: usize, handle: CUmemGenericAllocationHandle, flags: u64);
    cuMemUnmap = c"cuMemUnmap"(at: CUdeviceptr, len: usize);
    cuMemSetAccess = c"cuMemSetAccess"(at: CUdeviceptr, len: usize, access: *const CUmemAccessDesc, count: usize);
    cuMemGetHandleForAddressRange = c"cuMemGetHandleForAddressRange"(handle: *mut c_void, at: CUdeviceptr, len: usize, kind: c_uint, flags: u64);
    cuMemGetAddressRange = c"cuMemGetAddressRange_v2"(base: *mut CUdeviceptr, len: *mut usize, at: CUdeviceptr);
    cuMemRetainAllocationHandle = c"cuMemRetainAllocationHandle"(handle: *mut CUmemGenericAllocationHandle, at: *mut c_void);
    cuMemGetAllocationPropertiesFromHandle = c"cuMemGetAllocationPropertiesFromHandle"(prop: *mut CUmemAllocationProp, handle: CUmemGenericAllocationHandle);
    cuMemExportToShareableHandle = c"cuMemExportToShareableHandle"(shareable: *mut c_void, handle: CUmemGenericAllocationHandle, kind: c_uint, flags: u64);
    cuMemImportFromShareableHandle = c"cuMemImportFromShareableHandle"(handle: *mut CUmemGenericAllocationHandle, shareable: *mut c_void, kind: c_uint);
    cuIpcGetMemHandle = c"cuIpcGetMemHandle"(handle: *mut CUipcMemHandle, at: CUdeviceptr);
    cuIpcOpenMemHandle = c"cuIpcOpenMemHandle_v2"(at: *mut CUdeviceptr, handle: CUipcMemHandle, flags: c_uint);
    cuIpcCloseMemHandle = c"cuIpcCloseMemHandle"(at: CUdeviceptr);
    cuMemcpyHtoDAsync = c"cuMemcpyHtoDAsync_v2"(to: CUdeviceptr, from: *const c_void, len: usize, stream: CUstream);
    cuMemcpyDtoHAsync = c"cuMemcpyDtoHAsync_v2"(to: *mut c_void, from: CUdeviceptr, len: usize, stream: CUstream);
    cuMemcpyDtoDAsync = c"cuMemcpyDtoDAsync_v2"(to: CUdeviceptr, from: CUdeviceptr, len: usize, stream: CUstream);
    cuMemcpyPeerAsync = c"cuMemcpyPeerAsync"(to: CUdeviceptr, to_context: CUcontext, from: CUdeviceptr, from_context: CUcontext, len: usize, stream: CUstream);
    cuMemsetD8Async = c"cuMemsetD8Async"(at: CUdeviceptr, value: u8, len: usize, stream: CUstream);
    cuPointerGetAttribute = c"cuPointerGetAttribute"(value: *mut c_void, attribute: c_int, at: CUdeviceptr);
    cuModuleLoadData = c"cuModuleLoadData"(module: *mut CUmodule, image: *const c_void);
    cuModuleGetFunction = c"cuModuleGetFunction"(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    cuFuncGetAttribute = c"cuFuncGetAttribute"(value: *mut c_int, attribute: c_int, function: CUfunction);
    cuLaunchKernelEx = c"cuLaunchKernelEx"(config: *const CUlaunchConfig, function: CUfunction, parameters: *mut *mut c_void, extra: *mut *mut c_void);
}

impl Functions {
    #[cold]
    fn error(&self, call: &'static str, code: CUresult) -> Error {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: the out pointer is a local; the driver's texts are static.
        let text = unsafe {
            if (self.raw.cuGetErrorString)(code, &mut text) == 0 && !text.is_null() {
                CStr::from_ptr(text).to_str().unwrap_or("unknown error")
            } else if code == ERROR_NOT_FOUND {
                "the installed driver is too old"
            } else {
                "unknown error"
            }
        };
        Error::Call { call, code, text }
    }
}
