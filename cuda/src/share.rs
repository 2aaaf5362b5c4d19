//! GPU memory that two processes share: exporting an allocation, and mapping the allocations of other processes.
//! Knows nothing of how handles reach other processes or which of them may have one.

use crate::context::Context;
use crate::error::{Error, Result};
use crate::pointer::attribute;
use crate::sys::{
    self, CUipcMemHandle, CUmemAccessDesc, CUmemAllocationProp, CUmemGenericAllocationHandle, CUmemLocation, Functions,
};
use std::ffi::{c_uint, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// A handle of `cuIpcGetMemHandle`.
pub type IpcHandle = [u8; 64];

/// How an allocation can be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// By an IPC handle: memory of `cudaMalloc`.
    Ipc,
    /// By a file descriptor: memory of `cuMemCreate` that was created for sharing.
    Posix,
    /// Cannot be shared, for this reason.
    No(&'static str),
}

/// An allocation, or one mapping of a range that is mapped piece by piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// First byte.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// The driver's id for it, unique in this process.
    pub id: u64,
    /// How other processes can map it.
    pub sharing: Sharing,
}

/// The allocation that `addr` lies in, memory of the context's GPU.
pub fn allocation(context: &Context, addr: u64) -> Result<Allocation> {
    let cuda = context.enter()?;
    let (mut base, mut len, mut id) = (0, 0, 0u64);
    // SAFETY: outputs are writable; the address is only looked up.
    unsafe { cuda.cuMemGetAddressRange(&mut base, &mut len, addr) }?;
    let known = attribute(&cuda, sys::POINTER_BUFFER_ID, addr, &mut id)?;
    let inside = addr >= base && addr - base < len as u64;
    if !known || !inside {
        return Err(Error::Invalid(format!("the driver knows no allocation at {addr:#x}")));
    }
    Ok(Allocation { base, len: len as u64, id, sharing: sharing(&cuda, addr)? })
}

fn sharing(cuda: &Functions, addr: u64) -> Result<Sharing> {
    let (mut pool, mut legacy, mut allowed) = (0u64, 0u32, 0u64);
    if attribute(cuda, sys::POINTER_MEMPOOL_HANDLE, addr, &mut pool)? && pool != 0 {
        return Ok(Sharing::No("it comes from a memory pool (cudaMallocAsync)"));
    }
    if attribute(cuda, sys::POINTER_IPC_CAPABLE, addr, &mut legacy)? && legacy != 0 {
        return Ok(Sharing::Ipc);
    }
    let asked = attribute(cuda, sys::POINTER_ALLOWED_HANDLE_TYPES, addr, &mut allowed)?;
    if asked && allowed & u64::from(sys::HANDLE_POSIX) != 0 {
        return Ok(Sharing::Posix);
    }
    Ok(Sharing::No("it was allocated without a handle type that can be shared"))
}

/// A handle of the allocation at `base`, which is [`Sharing::Ipc`].
pub fn ipc_handle(context: &Context, base: u64) -> Result<IpcHandle> {
    let mut handle = CUipcMemHandle([0; 64]);
    // SAFETY: the output is writable; the address is only looked up.
    unsafe { context.enter()?.cuIpcGetMemHandle(&mut handle, base) }?;
    Ok(handle.0)
}

/// A descriptor of the memory mapped at `base`, which is [`Sharing::Posix`].
pub fn posix_handle(context: &Context, base: u64) -> Result<OwnedFd> {
    let cuda = context.enter()?;
    let mut handle = 0;
    let mut fd = -1i32;
    // SAFETY: the output is writable; the guard releases the handle.
    unsafe { cuda.cuMemRetainAllocationHandle(&mut handle, base as *mut c_void) }?;
    let physical = Physical { cuda: &cuda, handle };
    // SAFETY: the handle is retained; the driver writes an int.
    unsafe { cuda.cuMemExportToShareableHandle((&raw mut fd).cast(), physical.handle, sys::HANDLE_POSIX, 0) }?;
    if fd < 0 {
        return Err(Error::Invalid(format!("the driver exports memory as descriptor {fd}")));
    }
    // SAFETY: the driver made it for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A dma-buf over device memory: `at` and `len` are multiples of the host's page size, inside of one allocation. It keeps the memory.
///
/// # Errors
/// The driver or the GPU cannot export memory.
pub fn dmabuf(context: &Context, at: u64, len: usize) -> Result<OwnedFd> {
    let mut fd = -1i32;
    // SAFETY: the driver looks the range up and writes an int.
    unsafe { context.enter()?.cuMemGetHandleForAddressRange((&raw mut fd).cast(), at, len, sys::RANGE_DMABUF, 0) }?;
    if fd < 0 {
        return Err(Error::Invalid(format!("the driver exports memory as descriptor {fd}")));
    }
    // SAFETY: the driver made it for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A retained handle of physical memory.
struct Physical<'a> {
    cuda: &'a Functions,
    handle: CUmemGenericAllocationHandle,
}

impl Drop for Physical<'_> {
    fn drop(&mut self) {
        // SAFETY: retained or imported once.
        let _ = unsafe { self.cuda.cuMemRelease(self.handle) };
    }
}

enum How {
    Ipc,
    Posix,
}

/// Maps physical memory at an address that the driver chooses.
fn map(cuda: &Functions, handle: CUmemGenericAllocationHandle, len: usize) -> Result<u64> {
    let mut at = 0;
    // SAFETY: the output is writable, the handle live; the reservation is released if mapping fails.
    unsafe {
        cuda.cuMemAddressReserve(&mut at, len, 0, 0, 0)?;
        if let Err(e) = cuda.cuMemMap(at, len, 0, handle, 0) {
            let _ = cuda.cuMemAddressFree(at, len);
            return Err(e);
        }
    }
    Ok(at)
}

/// New memory of a context's GPU that other processes can map by [`posix_handle`]. Its pages are reused only after the last mapping
/// in any process has ended, even if this one ended long before.
pub fn shareable(context: &Arc<Context>, len: usize) -> Result<Mapped> {
    let cuda = context.enter()?;
    let location = CUmemLocation { kind: sys::LOCATION_DEVICE, id: context.device() };
    // SAFETY: plain data, for which zeros are valid.
    let mut prop: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    (prop.kind, prop.location, prop.handle_types) = (sys::ALLOCATION_PINNED, location, sys::HANDLE_POSIX);
    let (mut step, mut handle) = (0, 0);
    // SAFETY: outputs are writable, the description complete; the guard releases the handle.
    unsafe {
        cuda.cuMemGetAllocationGranularity(&mut step, &prop, 0)?;
        if step == 0 || len % step != 0 {
            return Err(Error::Invalid(format!("{len} bytes of memory: not a multiple of the granularity {step}")));
        }
        cuda.cuMemCreate(&mut handle, len, &prop, 0)?;
    }
    let physical = Physical { cuda: &cuda, handle };
    let at = map(&cuda, physical.handle, len)?;
    drop(physical);
    drop(cuda);
    let mapped = Mapped { context: context.clone(), at, len, how: How::Posix };
    mapped.allow(&[sys::ACCESS_READ_WRITE])?;
    Ok(mapped)
}

/// Memory of another process, or new memory that other processes can map, mapped into a context of this process until dropped. It
/// stays valid even if its owner ends.
pub struct Mapped {
    context: Arc<Context>,
    at: u64,
    len: usize,
    how: How,
}

impl Mapped {
    /// Opens an IPC handle of another process for kernels and copies of the context's GPU. The driver counts references: a handle may be
    /// opened several times, and has one address.
    pub fn ipc(context: &Arc<Context>, handle: &IpcHandle) -> Result<Mapped> {
        let cuda = context.enter()?;
        let (mut at, mut base, mut len) = (0, 0, 0);
        // SAFETY: the output is writable; the driver checks the handle.
        unsafe { cuda.cuIpcOpenMemHandle(&mut at, CUipcMemHandle(*handle), sys::IPC_LAZY_PEER_ACCESS) }?;
        drop(cuda);
        let mut mapped = Mapped { context: context.clone(), at, len: 0, how: How::Ipc };
        // The peer's length cannot be trusted: a kernel that accesses memory beyond the end destroys the application's context.
        // SAFETY: outputs are writable.
        unsafe { context.enter()?.cuMemGetAddressRange(&mut base, &mut len, at) }?;
        if at < base || at - base >= len as u64 {
            return Err(Error::Invalid("the driver reports no length for opened memory".into()));
        }
        mapped.len = len - (at - base) as usize;
        Ok(mapped)
    }

    /// Maps `len` bytes of the memory behind a descriptor of another process, or of this one, for reading by the context's GPU.
    pub fn posix(context: &Arc<Context>, fd: BorrowedFd<'_>, len: usize) -> Result<Mapped> {
        // Not every driver supports read-only mappings.
        Mapped::posix_for(context, fd, len, &[sys::ACCESS_READ, sys::ACCESS_READ_WRITE])
    }

    /// The same for reading and writing.
    pub fn posix_writable(context: &Arc<Context>, fd: BorrowedFd<'_>, len: usize) -> Result<Mapped> {
        Mapped::posix_for(context, fd, len, &[sys::ACCESS_READ_WRITE])
    }

    /// Maps with the first of these access modes that the driver supports.
    fn posix_for(context: &Arc<Context>, fd: BorrowedFd<'_>, len: usize, access: &[c_uint]) -> Result<Mapped> {
        let cuda = context.enter()?;
        let mut handle = 0;
        let number = fd.as_raw_fd() as usize as *mut c_void;
        // SAFETY: the output is writable; the driver checks the descriptor.
        unsafe { cuda.cuMemImportFromShareableHandle(&mut handle, number, sys::HANDLE_POSIX) }?;
        let physical = Physical { cuda: &cuda, handle };
        // SAFETY: plain data, for which zeros are valid.
        let mut prop: CUmemAllocationProp = unsafe { std::mem::zeroed() };
        // SAFETY: the output is writable, the handle imported.
        unsafe { cuda.cuMemGetAllocationPropertiesFromHandle(&mut prop, physical.handle) }?;
        if prop.location.kind != sys::LOCATION_DEVICE || len == 0 {
            return Err(Error::Invalid(format!("{len} bytes of a descriptor that is not GPU memory")));
        }
        let at = map(&cuda, physical.handle, len)?;
        drop(physical);
        drop(cuda);
        let mapped = Mapped { context: context.clone(), at, len, how: How::Posix };
        mapped.allow(access)?;
        Ok(mapped)
    }

    /// Lets the context's GPU use the mapping, with the first of these access modes that the driver supports.
    fn allow(&self, access: &[c_uint]) -> Result<()> {
        let cuda = self.context.enter()?;
        let location = CUmemLocation { kind: sys::LOCATION_DEVICE, id: self.context.device() };
        let mut result = Err(Error::Invalid("no access".into()));
        for &flags in access {
            let access = CUmemAccessDesc { location, flags };
            // SAFETY: the range is mapped, the description complete.
            result = unsafe { cuda.cuMemSetAccess(self.at, self.len, &access, 1) };
            if result.is_ok() {
                break;
            }
        }
        result
    }

    /// First byte here.
    pub fn ptr(&self) -> u64 {
        self.at
    }

    /// Its length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let Ok(cuda) = self.context.enter() else { return };
        // SAFETY: opened or mapped once, in this context, and no longer used.
        let _ = unsafe {
            match self.how {
                How::Ipc => cuda.cuIpcCloseMemHandle(self.at),
                How::Posix => cuda.cuMemUnmap(self.at, self.len).and_then(|()| cuda.cuMemAddressFree(self.at, self.len)),
            }
        };
    }
}
