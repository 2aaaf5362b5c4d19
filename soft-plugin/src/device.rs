//! Device memory behind one narrow interface: the unpack queue of a receive comm and the source of device sends.
//! Knows nothing of sockets, slot life cycles or device names; the I/O threads use what it returns as host memory.

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;

use nccl_net_abi::{
    ncclNetDeviceHandle_v7, netUnpackMeta, unpackNetDeviceHandle, MAX_REQUESTS, NCCL_NET_DEVICE_HOST, NCCL_NET_DEVICE_UNPACK,
    NCCL_NET_DEVICE_UNPACK_VERSION,
};
use process::Mutex;

use crate::emulated::{self, Block};

/// The bounce buffer of a receive comm.
#[derive(Clone)]
pub enum Bounce {
    /// A new one of so many bytes.
    Own(usize),
    /// Memory that the NIC writes.
    Lent(Arc<dyn Lender>),
}

/// Memory that device receives and device sends pass through.
pub trait DeviceMemory: Send + Sync {
    /// Whether the calling thread can build an unpack queue (a GPU is current).
    fn in_context(&self) -> bool {
        true
    }

    /// Builds the unpack queue of a receive comm: meta queue, bounce buffer, and the device handle.
    /// Called on the caller's thread (whose current GPU it uses) at the first use of device memory: a registration, or else a receive.
    /// Connections that only move host memory touch no GPU.
    fn unpack_queue(&self, bounce: Bounce) -> io::Result<UnpackQueue>;

    /// Builds the source of device sends of up to `limit` bytes for a comm. Called by the first registration of device memory, or else
    /// by the first device send of the comm.
    fn send_source(&self, limit: usize) -> io::Result<Arc<dyn SendSource>>;

    /// The GPU that is current in the calling thread, if there are several.
    fn current(&self) -> io::Result<usize>;

    /// Memory of the current GPU that a NIC can write: `len` bytes, in whole pages.
    fn area(&self, len: usize) -> io::Result<Box<dyn AreaMemory>>;

    /// A dma-buf over whole pages of device memory.
    fn export(&self, at: usize, len: usize) -> io::Result<OwnedFd>;
}

/// Lends the NIC's memory to the receives of a comm.
pub trait Lender: Send + Sync {
    /// Where offsets of descriptors count from.
    fn base(&self) -> *mut u8;

    /// Nothing reads the receive in this row any more: returns whether the comm waits for that.
    fn consumed(&self, row: usize) -> io::Result<bool>;
}

/// Device memory that a NIC writes and reads.
pub trait AreaMemory: Send + Sync {
    /// Its first byte, as an address of its GPU.
    fn base(&self) -> *mut u8;

    /// Writes to it by the GPU, and returns when the bytes are in place.
    fn write(&self, at: usize, bytes: &[u8]) -> io::Result<()>;

    /// Reads it by the GPU.
    fn read(&self, at: usize, bytes: &mut [u8]) -> io::Result<()>;
}

/// Turns device memory into bytes that an I/O thread can hand to the kernel.
pub trait SendSource: Send + Sync {
    /// Allocates everything for sends from the calling thread's current GPU: afterwards [`SendSource::begin`] allocates nothing.
    fn prepare(&self) -> io::Result<()>;

    /// Called by `isend` on the caller's thread. Returns the host address of the `len` bytes at device address `data`, readable once
    /// [`SendSource::ready`] is true and valid until the slot is used again.
    fn begin(&self, slot: usize, data: *const u8, len: usize) -> io::Result<*const u8>;

    /// Called by the I/O thread, repeatedly: whether the bytes of `slot` have arrived.
    fn ready(&self, slot: usize) -> io::Result<bool>;

    /// Called by the I/O thread when the last byte of `slot` is in the kernel: its buffer is free for another slot.
    fn release(&self, slot: usize);

    /// Waits until no copy reads the caller's memory.
    fn quiesce(&self);
}

/// The unpack queue of a receive comm. Pointers stay valid as long as this value.
pub struct UnpackQueue {
    /// The meta queue, at the CPU's address.
    pub meta: *mut netUnpackMeta,
    /// The bounce buffer, at the CPU's address.
    pub bounce: *mut u8,
    /// Bytes of the bounce buffer.
    pub bounce_len: usize,
    /// Regions of the bounce buffer that hold no message. The last one freed is taken first: it is still in the CPU's cache.
    pub free: Mutex<Vec<usize>>,
    /// A device reads the bounce buffer by DMA: received bytes belong in the cache that all cores share (see [`demote`]).
    pub read_by_bus: bool,
    /// Who lends the bounce buffer, if the NIC writes it.
    pub lent: Option<Arc<dyn Lender>>,
    /// The value of `ncclNetDeviceHandle_v7::handle`: the address of an [`unpackNetDeviceHandle`] in device memory.
    pub handle: *mut c_void,
    /// Frees all of the above when dropped.
    _owner: Box<dyn Send>,
}
// SAFETY: the pointers refer to memory owned by `_owner`, which is Send; the comm orders accesses.
unsafe impl Send for UnpackQueue {}
// SAFETY: as above; `_owner` is only dropped.
unsafe impl Sync for UnpackQueue {}

impl UnpackQueue {
    /// A queue over memory that `owner` frees.
    pub fn new(
        meta: *mut netUnpackMeta,
        bounce: *mut u8,
        bounce_len: usize,
        read_by_bus: bool,
        handle: *mut c_void,
        owner: Box<dyn Send>,
    ) -> UnpackQueue {
        let free = Mutex::new((0..MAX_REQUESTS).rev().collect());
        UnpackQueue { meta, bounce, bounce_len, free, read_by_bus, lent: None, handle, _owner: owner }
    }

    /// The queue over memory that the NIC writes; `owner` frees the rest.
    pub fn lent(meta: *mut netUnpackMeta, lent: Arc<dyn Lender>, handle: *mut c_void, owner: Box<dyn Send>) -> UnpackQueue {
        let bounce = lent.base();
        UnpackQueue { lent: Some(lent), ..UnpackQueue::new(meta, bounce, 0, false, handle, owner) }
    }
}

/// The device handle of a comm, whose queue may not exist yet.
pub fn handle(unpack: bool, queue: Option<&UnpackQueue>) -> ncclNetDeviceHandle_v7 {
    ncclNetDeviceHandle_v7 {
        netDeviceType: if unpack { NCCL_NET_DEVICE_UNPACK } else { NCCL_NET_DEVICE_HOST },
        netDeviceVersion: NCCL_NET_DEVICE_UNPACK_VERSION,
        handle: queue.map_or(ptr::null_mut(), |q| q.handle),
        size: if unpack { size_of::<unpackNetDeviceHandle>() } else { 0 },
        needsProxyProgress: 1,
    }
}

/// Moves `[at, at + len)`, just written by this core, from its own cache to the shared one. A GPU's PCIe reads then need not snoop
/// this core for each line. A hint; processors without CLDEMOTE ignore it.
pub fn demote(at: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        const LINE: usize = 64;
        let mut line = at as usize & !(LINE - 1);
        while line < at as usize + len {
            // SAFETY: cldemote [rax], a hint that changes no memory and faults on no address; spelled in bytes, since assemblers want
            // the feature enabled although processors without it take the instruction for a no-op.
            unsafe { std::arch::asm!(".byte 0x0f, 0x1c, 0x00", in("rax") line, options(nostack, preserves_flags)) };
            line += LINE;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, len);
}

/// Host memory that serves as device memory.
pub struct Emulated;

impl DeviceMemory for Emulated {
    fn unpack_queue(&self, bounce: Bounce) -> io::Result<UnpackQueue> {
        let meta = Mapping::new(size_of::<netUnpackMeta>())?;
        let handle = Mapping::new(size_of::<unpackNetDeviceHandle>())?;
        let (meta_at, handle_at) = (meta.base.cast(), handle.base);
        let fill = |bounce_buf: *mut u8| {
            let content = unpackNetDeviceHandle { meta: meta_at, bounce_buf: bounce_buf.cast(), head: u64::MAX };
            // SAFETY: a fresh, writable, page-aligned mapping of that size.
            unsafe { handle_at.cast::<unpackNetDeviceHandle>().write(content) };
        };
        Ok(match bounce {
            Bounce::Own(len) => {
                let bounce = Mapping::new(len)?;
                let at = bounce.base.cast::<u8>();
                fill(at);
                UnpackQueue::new(meta_at, at, len, false, handle_at, Box::new((meta, bounce, handle)))
            }
            Bounce::Lent(lent) => {
                fill(lent.base());
                UnpackQueue::lent(meta_at, lent, handle_at, Box::new((meta, handle)))
            }
        })
    }

    fn send_source(&self, _limit: usize) -> io::Result<Arc<dyn SendSource>> {
        Ok(Arc::new(Emulated))
    }

    fn current(&self) -> io::Result<usize> {
        Ok(0)
    }

    fn area(&self, len: usize) -> io::Result<Box<dyn AreaMemory>> {
        Ok(Box::new(Block::new(len)?))
    }

    fn export(&self, at: usize, len: usize) -> io::Result<OwnedFd> {
        emulated::export(at, len)
    }
}

impl AreaMemory for Block {
    fn base(&self) -> *mut u8 {
        self.as_ptr()
    }

    fn write(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the caller names bytes of the block that nothing else uses.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(at), bytes.len()) };
        Ok(())
    }

    fn read(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(self.as_ptr().add(at), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

impl SendSource for Emulated {
    fn prepare(&self) -> io::Result<()> {
        Ok(())
    }

    fn begin(&self, _slot: usize, data: *const u8, _len: usize) -> io::Result<*const u8> {
        Ok(data)
    }

    fn ready(&self, _slot: usize) -> io::Result<bool> {
        Ok(true)
    }

    fn release(&self, _slot: usize) {}

    fn quiesce(&self) {}
}

/// Zeroed anonymous memory; pages are allocated on first touch.
struct Mapping {
    base: *mut c_void,
    len: usize,
}
// SAFETY: plain memory, owned.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(len: usize) -> io::Result<Mapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { base, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once.
        unsafe { libc::munmap(self.base, self.len) };
    }
}
