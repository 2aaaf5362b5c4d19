//! Compares the constants and layouts of `sys` with those that cudarc generates from NVIDIA's header. Only this test links cudarc.

use cuda_driver::sys;
use cudarc::driver::sys as theirs;
use std::mem::{offset_of, size_of};

/// Our constants, with NVIDIA's values.
macro_rules! beside {
    ($($ours:ident = $type:ident::$theirs:ident,)*) => {
        [$((stringify!($ours), i64::from(sys::$ours), theirs::$type::$theirs as i64),)*]
    };
}

#[test]
fn constants_have_the_values_of_the_header() {
    let results = beside! {
        ERROR_INVALID_VALUE = CUresult::CUDA_ERROR_INVALID_VALUE,
        ERROR_OUT_OF_MEMORY = CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        ERROR_NOT_INITIALIZED = CUresult::CUDA_ERROR_NOT_INITIALIZED,
        ERROR_STUB_LIBRARY = CUresult::CUDA_ERROR_STUB_LIBRARY,
        ERROR_NO_DEVICE = CUresult::CUDA_ERROR_NO_DEVICE,
        ERROR_INVALID_CONTEXT = CUresult::CUDA_ERROR_INVALID_CONTEXT,
        ERROR_NOT_FOUND = CUresult::CUDA_ERROR_NOT_FOUND,
        ERROR_NOT_READY = CUresult::CUDA_ERROR_NOT_READY,
        ERROR_PEER_ACCESS_ALREADY_ENABLED = CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED,
    };
    let attributes = beside! {
        COMPUTE_CAPABILITY_MAJOR = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        FUNC_NUM_REGS = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS,
        POINTER_MEMORY_TYPE = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        POINTER_DEVICE_POINTER = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER,
        POINTER_HOST_POINTER = CUpointer_attribute::CU_POINTER_ATTRIBUTE_HOST_POINTER,
        POINTER_IS_MANAGED = CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
        POINTER_DEVICE_ORDINAL = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        POINTER_BUFFER_ID = CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID,
        POINTER_IPC_CAPABLE = CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
        POINTER_ALLOWED_HANDLE_TYPES = CUpointer_attribute::CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES,
        POINTER_MEMPOOL_HANDLE = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
        P2P_PERFORMANCE_RANK = CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK,
        P2P_NATIVE_ATOMICS = CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED,
        MEMORYTYPE_HOST = CUmemorytype::CU_MEMORYTYPE_HOST,
        MEMORYTYPE_DEVICE = CUmemorytype::CU_MEMORYTYPE_DEVICE,
    };
    let flags = beside! {
        CAPTURE_GLOBAL = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        CAPTURE_RELAXED = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
        STREAM_NON_BLOCKING = CUstream_flags::CU_STREAM_NON_BLOCKING,
        MEM_ATTACH_GLOBAL = CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL,
        HANDLE_POSIX = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        IPC_LAZY_PEER_ACCESS = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS,
        ALLOCATION_PINNED = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        LOCATION_DEVICE = CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        ACCESS_READ = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ,
        ACCESS_READ_WRITE = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
    };
    for (name, ours, theirs) in results.into_iter().chain(attributes).chain(flags) {
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn errors_of_a_dead_context_have_the_numbers_of_the_header() {
    use theirs::CUresult as E;
    let fatal = [
        E::CUDA_ERROR_DEINITIALIZED,
        E::CUDA_ERROR_INVALID_CONTEXT,
        E::CUDA_ERROR_ECC_UNCORRECTABLE,
        E::CUDA_ERROR_NVLINK_UNCORRECTABLE,
        E::CUDA_ERROR_ILLEGAL_ADDRESS,
        E::CUDA_ERROR_LAUNCH_TIMEOUT,
        E::CUDA_ERROR_CONTEXT_IS_DESTROYED,
        E::CUDA_ERROR_ASSERT,
        E::CUDA_ERROR_HARDWARE_STACK_ERROR,
        E::CUDA_ERROR_ILLEGAL_INSTRUCTION,
        E::CUDA_ERROR_MISALIGNED_ADDRESS,
        E::CUDA_ERROR_INVALID_ADDRESS_SPACE,
        E::CUDA_ERROR_INVALID_PC,
        E::CUDA_ERROR_LAUNCH_FAILED,
    ];
    assert_eq!(sys::FATAL, fatal.map(|code| code as u32));
}

/// Asserts that our structure and cudarc's have the same size and field offsets.
macro_rules! same_layout {
    ($($ours:ident = $theirs:ident { $($field:ident = $their_field:ident),* })*) => {
        $(
            assert_eq!(size_of::<sys::$ours>(), size_of::<theirs::$theirs>(), stringify!($ours));
            $(assert_eq!(
                offset_of!(sys::$ours, $field),
                offset_of!(theirs::$theirs, $their_field),
                "{}.{}", stringify!($ours), stringify!($field)
            );)*
        )*
    };
}

#[test]
fn structures_have_the_layout_of_the_header() {
    same_layout! {
        CUlaunchAttribute = CUlaunchAttribute { id = id, value = value }
        CUlaunchConfig = CUlaunchConfig {
            gridDimX = gridDimX, gridDimZ = gridDimZ, blockDimX = blockDimX, blockDimZ = blockDimZ, sharedMemBytes = sharedMemBytes,
            hStream = hStream, attrs = attrs, numAttrs = numAttrs
        }
        CUmemLocation = CUmemLocation { kind = type_, id = id }
        CUmemAllocationProp = CUmemAllocationProp {
            kind = type_, handle_types = requestedHandleTypes, location = location, win32 = win32HandleMetaData,
            compression = allocFlags
        }
        CUmemAccessDesc = CUmemAccessDesc { location = location, flags = flags }
        CUuuid = CUuuid {}
        CUipcMemHandle = CUipcMemHandle {}
        CUdeviceptr = CUdeviceptr {}
        CUmemGenericAllocationHandle = CUmemGenericAllocationHandle {}
    }
}
