//! What kind of memory an address is, and memory the library owns on a GPU or pinned and mapped for one.

use super::context::{Gpu, Stream};
use super::driver::{available, check};
use crate::status::{bail, err, Result};
use cudarc::driver::sys::{self, CUpointer_attribute as Attribute, CUresult};
use std::ffi::c_void;
use std::sync::Arc;

/// Page of plugin registrations.
const PAGE: u64 = 4096;

/// Where an address lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryKind {
    /// Ordinary host memory, unknown to CUDA (or there is no CUDA).
    Host,
    /// Pinned host memory.
    PinnedHost,
    /// Managed memory: the driver moves it.
    Managed,
    /// Memory of the GPU with this CUDA ordinal.
    Device {
        /// CUDA ordinal.
        ordinal: i32,
    },
}

/// The kind of memory at `ptr`. Asks the driver only where there is one; makes no context.
pub(crate) fn memory_kind(ptr: u64) -> Result<MemoryKind> {
    if !available() {
        return Ok(MemoryKind::Host);
    }
    let mut kind = 0u32;
    if !attribute(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, ptr, &mut kind)? {
        return Ok(MemoryKind::Host);
    }
    let mut managed = 0u32;
    if attribute(Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED, ptr, &mut managed)? && managed != 0 {
        return Ok(MemoryKind::Managed);
    }
    const HOST: u32 = sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32;
    const DEVICE: u32 = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32;
    match kind {
        HOST => Ok(MemoryKind::PinnedHost),
        DEVICE => {
            let mut ordinal = -1i32;
            if !attribute(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, ptr, &mut ordinal)? || ordinal < 0 {
                bail!(Gpu, "the driver names no GPU for device memory at {ptr:#x}");
            }
            Ok(MemoryKind::Device { ordinal })
        }
        other => bail!(Unsupported, "memory at {ptr:#x} is of CUDA type {other}"),
    }
}

/// One pointer attribute; false when the driver does not know the address.
fn attribute<T: Copy>(which: Attribute, ptr: u64, out: &mut T) -> Result<bool> {
    // SAFETY: T is the attribute's type (u32, i32 or u64 in every call here); the address itself is not dereferenced.
    match unsafe { sys::cuPointerGetAttribute((out as *mut T).cast(), which, ptr) } {
        CUresult::CUDA_ERROR_INVALID_VALUE | CUresult::CUDA_ERROR_NOT_INITIALIZED | CUresult::CUDA_ERROR_INVALID_CONTEXT => {
            Ok(false)
        }
        result => check("cuPointerGetAttribute", result).map(|()| true),
    }
}

/// Mapped host memory by its two names. With unified addressing they are equal for what `cuMemHostAlloc` made, not for
/// memory that was registered later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MappedPtr {
    /// For the CPU.
    pub host: *mut u8,
    /// For kernels.
    pub device: u64,
}
// SAFETY: two addresses; whoever dereferences one owes the proof.
unsafe impl Send for MappedPtr {}
// SAFETY: as above.
unsafe impl Sync for MappedPtr {}

impl MappedPtr {
    /// Both names of mapped host memory, given either. Fails for memory that is not mapped. Once per comm, not per chunk.
    pub(crate) fn resolve(gpu: &Gpu, ptr: u64) -> Result<MappedPtr> {
        let (mut host, mut device) = (0u64, 0u64);
        // The device's name for host memory is asked for in a context.
        let known = gpu.with(|| {
            Ok(attribute(Attribute::CU_POINTER_ATTRIBUTE_HOST_POINTER, ptr, &mut host)?
                && attribute(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER, ptr, &mut device)?)
        })?;
        if !known || host == 0 || device == 0 {
            bail!(Gpu, "memory at {ptr:#x} is not host memory mapped for the GPU");
        }
        Ok(MappedPtr { host: host as *mut u8, device })
    }
    /// The place `bytes` further on.
    pub(crate) fn offset(self, bytes: usize) -> MappedPtr {
        MappedPtr { host: self.host.wrapping_add(bytes), device: self.device + bytes as u64 }
    }
}

/// Zeroed pinned host memory, mapped for every GPU.
pub(crate) struct PinnedBuffer {
    gpu: Arc<Gpu>,
    ptr: MappedPtr,
    len: usize,
}
// SAFETY: plain memory, owned.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access hands out addresses only.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// `len` bytes, page-aligned.
    pub(crate) fn new(gpu: &Arc<Gpu>, len: usize) -> Result<PinnedBuffer> {
        let len = len.max(1).next_multiple_of(PAGE as usize);
        let (mut host, mut device) = (std::ptr::null_mut::<c_void>(), 0);
        gpu.with(|| {
            let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
            // SAFETY: out pointer is a local; freed in drop.
            check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut host, len, flags) })?;
            // SAFETY: just allocated with DEVICEMAP.
            let mapped = check("cuMemHostGetDevicePointer", unsafe { sys::cuMemHostGetDevicePointer_v2(&mut device, host, 0) });
            if mapped.is_err() {
                // SAFETY: allocated above, used by nobody.
                let _ = unsafe { sys::cuMemFreeHost(host) };
            }
            mapped
        })?;
        // SAFETY: len bytes were allocated.
        unsafe { std::ptr::write_bytes(host.cast::<u8>(), 0, len) };
        Ok(PinnedBuffer { gpu: gpu.clone(), ptr: MappedPtr { host: host.cast(), device }, len })
    }
    /// First byte, by both names.
    pub(crate) fn ptr(&self) -> MappedPtr {
        self.ptr
    }
    /// Bytes, a multiple of 4096.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let host = self.ptr.host.cast();
        // SAFETY: allocated in new, freed once; the owner has waited for work that uses it.
        let _ = self.gpu.with(|| check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(host) }));
    }
}

/// Device memory; base and length are multiples of 4096, so that a plugin can register it as it is.
pub(crate) struct DeviceBuffer {
    gpu: Arc<Gpu>,
    raw: u64,
    base: u64,
    len: usize,
}

impl DeviceBuffer {
    /// `len` bytes, not initialised.
    pub(crate) fn new(gpu: &Arc<Gpu>, len: usize) -> Result<DeviceBuffer> {
        let len = len.max(1).next_multiple_of(PAGE as usize);
        let mut raw = 0;
        // Small blocks do not start on a page: take one page more and align.
        // SAFETY: out pointer is a local; freed in drop.
        gpu.with(|| check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut raw, len + PAGE as usize) }))?;
        Ok(DeviceBuffer { gpu: gpu.clone(), raw, base: raw.next_multiple_of(PAGE), len })
    }
    /// First byte, page-aligned.
    pub(crate) fn ptr(&self) -> u64 {
        self.base
    }
    /// Sets every byte, and waits until it is done.
    pub(crate) fn fill(&self, value: u8) -> Result<()> {
        self.gpu.with(|| {
            // SAFETY: the range is owned.
            check("cuMemsetD8", unsafe { sys::cuMemsetD8_v2(self.base, value, self.len) })?;
            // SAFETY: waits for this context; the memset may be asynchronous.
            check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
        })
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in new, freed once; cuMemFree waits for work on the device.
        let _ = self.gpu.with(|| check("cuMemFree", unsafe { sys::cuMemFree_v2(self.raw) }));
    }
}

/// Reads a plain value from device memory, and waits for it. For structures that are read once, not for data.
///
/// # Safety
/// `src` holds a `T` in memory of `gpu`, and any bytes there are a valid `T`.
pub(crate) unsafe fn read_device<T: Copy>(gpu: &Gpu, src: u64) -> Result<T> {
    let mut value = std::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the local holds size_of::<T>() bytes; the copy is synchronous.
    gpu.with(|| check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(value.as_mut_ptr().cast(), src, size_of::<T>()) }))?;
    // SAFETY: filled above, valid by the caller's contract.
    Ok(unsafe { value.assume_init() })
}

/// Queues a copy from device to host memory on `stream`.
///
/// # Safety
/// Both ranges are valid and stay untouched until the stream has done it.
pub(crate) unsafe fn device_to_host(stream: &Stream, dst: *mut u8, src: u64, len: usize) -> Result<()> {
    // SAFETY: by the caller's contract.
    stream.gpu().with(|| check("cuMemcpyDtoHAsync", unsafe { sys::cuMemcpyDtoHAsync_v2(dst.cast(), src, len, stream.raw()) }))
}

/// Queues a copy from host to device memory on `stream`.
///
/// # Safety
/// Both ranges are valid and stay untouched until the stream has done it.
pub(crate) unsafe fn host_to_device(stream: &Stream, dst: u64, src: *const u8, len: usize) -> Result<()> {
    // SAFETY: by the caller's contract.
    stream.gpu().with(|| check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(dst, src.cast(), len, stream.raw()) }))
}

/// `len` as the kernel counts bytes.
pub(super) fn message_len(len: u64) -> Result<u32> {
    u32::try_from(len).map_err(|_| err!(InvalidArgument, "a message of {len} bytes is over 4 GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_all_memory_is_host_memory() {
        let value = 7u64;
        assert_eq!(memory_kind((&raw const value) as u64), Ok(MemoryKind::Host));
        if !available() {
            assert!(Gpu::open(0).is_err());
        }
    }
}
