//! The kind of memory at an address; GPU memory and pinned, mapped host memory that the library owns. Knows nothing of its use.

use crate::allocation_cache::{self, Kept, Sort};
use crate::context::{in_use, Context};
use crate::driver::{driver, Absence};
use crate::error::{Error, Result};
use crate::pointer::attribute;
use crate::sys::{self, Functions};
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::Arc;

/// The kind of memory at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Ordinary host memory, unknown to CUDA (or CUDA is absent).
    Host,
    /// Pinned host memory.
    PinnedHost,
    /// Managed memory: the driver moves it.
    Managed,
    /// GPU memory, however it was allocated.
    Device {
        /// CUDA ordinal.
        ordinal: i32,
    },
}

/// The kind of memory at `ptr`. Asks the driver if there is one; an error if the driver fails, since then the kind is
/// unknown. Creates no context. In the child of a process that used CUDA all accessible memory is host memory.
pub fn memory_kind(ptr: u64) -> Result<MemoryKind> {
    let cuda = match driver() {
        Ok(driver) => driver.relaxed(),
        Err(Absence::NoGpu(_)) => return Ok(MemoryKind::Host),
        // The parent's GPU memory is not mapped here: an access would crash.
        Err(Absence::Forked) if is_readable(ptr) => return Ok(MemoryKind::Host),
        Err(failing) => return Err(failing.into()),
    };
    match kind_of(&cuda, ptr) {
        // The driver looks the address up in a context: any context of the process will do.
        Err(e) if e.code() == sys::ERROR_INVALID_CONTEXT => in_any_context(ptr),
        kind => kind,
    }
}

/// Whether this process can read the memory at an address: a system call copies a byte of it.
fn is_readable(ptr: u64) -> bool {
    let mut ends = [-1; 2];
    // SAFETY: the output is writable; the kernel checks the address and fails if nothing is mapped; both ends are closed once.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) != 0 {
            return false;
        }
        let readable = libc::write(ends[1], ptr as *const _, 1) == 1;
        let _ = ends.map(|end| libc::close(end));
        readable
    }
}

fn in_any_context(ptr: u64) -> Result<MemoryKind> {
    // Without any context there is no GPU memory.
    let Some(&ordinal) = in_use().first() else { return Ok(MemoryKind::Host) };
    let context = Context::retain(ordinal)?;
    let cuda = context.enter()?;
    kind_of(&cuda, ptr)
}

fn kind_of(cuda: &Functions, ptr: u64) -> Result<MemoryKind> {
    let mut kind = 0u32;
    if !attribute(cuda, sys::POINTER_MEMORY_TYPE, ptr, &mut kind)? {
        return Ok(MemoryKind::Host);
    }
    let mut managed = 0u32;
    if attribute(cuda, sys::POINTER_IS_MANAGED, ptr, &mut managed)? && managed != 0 {
        return Ok(MemoryKind::Managed);
    }
    match kind {
        sys::MEMORYTYPE_HOST => Ok(MemoryKind::PinnedHost),
        sys::MEMORYTYPE_DEVICE => {
            let mut ordinal = -1i32;
            if !attribute(cuda, sys::POINTER_DEVICE_ORDINAL, ptr, &mut ordinal)? || ordinal < 0 {
                return Err(Error::Invalid(format!("the driver names no GPU for device memory at {ptr:#x}")));
            }
            Ok(MemoryKind::Device { ordinal })
        }
        other => Err(Error::Invalid(format!("memory at {ptr:#x} is of CUDA type {other}"))),
    }
}

/// The two addresses of mapped host memory. With unified addressing they are equal for memory of `cuMemHostAlloc`, but not for
/// memory that was registered later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedPtr {
    /// For the CPU.
    pub host: *mut u8,
    /// For kernels.
    pub device: u64,
}
// SAFETY: two addresses; code that dereferences one must justify it.
unsafe impl Send for MappedPtr {}
// SAFETY: as above.
unsafe impl Sync for MappedPtr {}

impl MappedPtr {
    /// Both addresses of mapped host memory, given either. Fails for memory that is not mapped. Called once per comm, not per chunk.
    pub fn resolve(context: &Context, ptr: u64) -> Result<MappedPtr> {
        let (mut host, mut device) = (0u64, 0u64);
        // The device address of host memory can only be queried in a context.
        let cuda = context.enter()?;
        let known = attribute(&cuda, sys::POINTER_HOST_POINTER, ptr, &mut host)?
            && attribute(&cuda, sys::POINTER_DEVICE_POINTER, ptr, &mut device)?;
        if !known || host == 0 || device == 0 {
            return Err(Error::Invalid(format!("memory at {ptr:#x} is not host memory mapped for the GPU")));
        }
        Ok(MappedPtr { host: host as *mut u8, device })
    }

    /// The addresses `bytes` further on.
    pub fn offset(self, bytes: usize) -> MappedPtr {
        MappedPtr { host: self.host.wrapping_add(bytes), device: self.device + bytes as u64 }
    }
}

/// Pinned host memory, mapped for every GPU; page-aligned. Dropping it keeps it for the next user; it must be unused by then.
pub struct PinnedBuffer {
    kept: Kept,
    ptr: MappedPtr,
}
// SAFETY: plain memory, owned.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access hands out addresses only.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// `len` bytes, more than 0, all zero.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<PinnedBuffer> {
        let cuda = context.enter()?;
        let (mut host, mut device) = (ptr::null_mut(), 0);
        let kept = match allocation_cache::take(&cuda, context, len, Sort::Pinned) {
            Some(kept) => kept,
            None => {
                // SAFETY: the output is writable.
                unsafe { cuda.cuMemHostAlloc(&mut host, len, sys::HOSTALLOC_PORTABLE | sys::HOSTALLOC_DEVICEMAP) }?;
                Kept { context: context.clone(), at: host as u64, len, sort: Sort::Pinned }
            }
        };
        let host = kept.at as *mut u8;
        // SAFETY: pinned, mapped memory of len bytes not in use elsewhere.
        let named = unsafe {
            ptr::write_bytes(host, 0, len);
            cuda.cuMemHostGetDevicePointer(&mut device, host.cast(), 0)
        };
        drop(cuda);
        match named {
            Ok(()) => Ok(PinnedBuffer { kept, ptr: MappedPtr { host, device } }),
            Err(e) => {
                allocation_cache::put(kept);
                Err(e)
            }
        }
    }

    /// First byte, by both addresses.
    pub fn mapped(&self) -> MappedPtr {
        self.ptr
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.kept.len
    }

    /// Whether the driver still knows it: false after the application has reset the GPU.
    pub fn is_known(&self) -> bool {
        self.kept.context.enter().is_ok_and(|cuda| self.kept.is_known(&cuda))
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        allocation_cache::put(self.kept.clone());
    }
}

/// GPU memory. Dropping it keeps it for the next user; it must be unused by then.
pub struct DeviceBuffer {
    kept: Kept,
    base: u64,
    len: usize,
}

impl DeviceBuffer {
    /// `len` bytes, more than 0, uninitialised, aligned to `align`, a power of two.
    pub fn new(context: &Arc<Context>, len: usize, align: usize) -> Result<DeviceBuffer> {
        // Small blocks are not page-aligned: allocate that much more.
        let whole = len + if align > 256 { align } else { 0 };
        let cuda = context.enter()?;
        let kept = match allocation_cache::take(&cuda, context, whole, Sort::Device) {
            Some(kept) => kept,
            None => {
                let mut at = 0;
                // SAFETY: the output is writable.
                unsafe { cuda.cuMemAlloc(&mut at, whole) }?;
                Kept { context: context.clone(), at, len: whole, sort: Sort::Device }
            }
        };
        let base = kept.at.next_multiple_of(align.max(1) as u64);
        Ok(DeviceBuffer { kept, base, len })
    }

    /// First byte.
    pub fn ptr(&self) -> u64 {
        self.base
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Frees it, which waits for all work of the GPU: only for programs that own the GPU.
    pub fn free(self) -> Result<()> {
        let kept = ManuallyDrop::new(self).kept.clone();
        let cuda = kept.context.enter()?;
        // SAFETY: allocated by cuMemAlloc, freed once: self is not dropped.
        unsafe { cuda.cuMemFree(kept.at) }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        allocation_cache::put(self.kept.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_memory_is_host_memory() {
        if matches!(driver(), Err(Absence::Failing(_))) {
            eprintln!("SKIPPED: the CUDA driver of this machine fails");
            return;
        }
        let value = 7u64;
        assert_eq!(memory_kind((&raw const value) as u64), Ok(MemoryKind::Host));
        assert!(driver().is_ok() || Context::retain(0).is_err());
    }

    #[test]
    fn unmapped_memory_is_not_readable() {
        let value = 7u64;
        assert!(is_readable((&raw const value) as u64));
        assert!(!is_readable(8));
        // SAFETY: the test's own mapping, unmapped once.
        unsafe {
            let reserved = libc::mmap(ptr::null_mut(), 4096, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            assert!(reserved != libc::MAP_FAILED && !is_readable(reserved as u64));
            libc::munmap(reserved, 4096);
        }
    }
}
