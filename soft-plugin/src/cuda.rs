//! CUDA memory: receives land in pinned host memory that the GPU reads directly, sends leave through a pinned ring that the copy
//! engine fills. Follows the current context of the calling thread, as the contract says; makes none and touches no GPU by itself.

use std::collections::HashMap;
use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUresult, CUstream};
use nccl_net_abi::{netUnpackMeta, unpackNetDeviceHandle, MAX_REQUESTS};
use parking_lot::Mutex;

use crate::device::{DeviceMemory, SendSource, UnpackQueue};

/// CUDA as this process has it.
pub struct Cuda;

fn check(call: &str, result: CUresult) -> io::Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(io::Error::other(format!("{call}: {result:?}")))
}

fn current() -> io::Result<CUcontext> {
    let mut context = ptr::null_mut();
    // SAFETY: the library is loaded (probe) and the output is writable.
    check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&mut context) })?;
    if context.is_null() {
        return Err(io::Error::other("no CUDA context is current in the calling thread"));
    }
    Ok(context)
}

impl Cuda {
    /// CUDA, when its driver library is here and finds a GPU. Creates no context.
    pub fn probe() -> Option<Cuda> {
        // SAFETY: opening the driver library runs its initialisers; cudarc loads the same one afterwards.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let mut count = 0;
        // SAFETY: the library is present; cuInit creates no context.
        let ready =
            unsafe { sys::cuInit(0) == CUresult::CUDA_SUCCESS && sys::cuDeviceGetCount(&mut count) == CUresult::CUDA_SUCCESS };
        (ready && count > 0).then_some(Cuda)
    }
}

impl DeviceMemory for Cuda {
    fn in_context(&self) -> bool {
        current().is_ok()
    }

    fn unpack_queue(&self, bounce_len: usize) -> io::Result<UnpackQueue> {
        current()?;
        let meta = Pinned::new(size_of::<netUnpackMeta>())?;
        let bounce = Pinned::new(bounce_len)?;
        let handle = Device::new(size_of::<unpackNetDeviceHandle>())?;
        let content = unpackNetDeviceHandle { meta: meta.base.cast(), bounce_buf: bounce.base, head: u64::MAX };
        // SAFETY: a fresh device allocation of that size; the source is a local value.
        check("cuMemcpyHtoD", unsafe { sys::cuMemcpyHtoD_v2(handle.base, (&raw const content).cast(), size_of_val(&content)) })?;
        let base = handle.base as *mut c_void;
        Ok(UnpackQueue::new(meta.base.cast(), bounce.base.cast(), bounce_len, true, base, Box::new((meta, bounce, handle))))
    }

    fn send_source(&self, limit: usize) -> io::Result<Arc<dyn SendSource>> {
        let stride = limit.next_multiple_of(4096);
        Ok(Arc::new(Source {
            ring: Pinned::new(stride * MAX_REQUESTS)?,
            flags: Pinned::new(4096)?,
            stride,
            places: Mutex::new(Places { free: (0..MAX_REQUESTS).rev().collect(), of_slot: [None; MAX_REQUESTS] }),
            streams: Mutex::default(),
        }))
    }
}

/// The send side of a comm: a pinned place for each request slot.
struct Source {
    ring: Pinned,
    /// One word a slot: 1 once the copy has arrived. Written by the GPU behind the copy.
    flags: Pinned,
    stride: usize,
    places: Mutex<Places>,
    /// A stream for each context that sends; made at its first send.
    streams: Mutex<HashMap<usize, Stream>>,
}

/// Which place of the ring a slot uses. The last one freed is taken first: it is still in the CPU's cache.
struct Places {
    free: Vec<usize>,
    of_slot: [Option<usize>; MAX_REQUESTS],
}

impl Places {
    /// A place for `slot`, whose request is new: what its last request used is free.
    fn take(&mut self, slot: usize) -> Option<usize> {
        self.give_back(slot);
        let place = self.free.pop()?;
        self.of_slot[slot] = Some(place);
        Some(place)
    }

    fn give_back(&mut self, slot: usize) {
        self.free.extend(self.of_slot[slot].take());
    }
}

impl Source {
    fn flag(&self, slot: usize) -> &AtomicU32 {
        // SAFETY: the block holds 1024 words; slots are below 16.
        unsafe { &*self.flags.base.cast::<AtomicU32>().add(slot) }
    }

    fn stream(&self) -> io::Result<CUstream> {
        let context = current()?;
        let mut streams = self.streams.lock();
        if let Some(stream) = streams.get(&(context as usize)) {
            return Ok(stream.raw);
        }
        let mut raw = ptr::null_mut();
        // SAFETY: a context is current; the output is writable.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32) })?;
        streams.insert(context as usize, Stream { raw, context });
        Ok(raw)
    }
}

impl SendSource for Source {
    fn begin(&self, slot: usize, data: *const u8, len: usize) -> io::Result<*const u8> {
        if len > self.stride {
            return Err(io::Error::other("a message longer than its staging place"));
        }
        let stream = self.stream()?;
        let place = self.places.lock().take(slot).ok_or_else(|| io::Error::other("no staging place is free"))?;
        // SAFETY: inside the ring of 16 strides.
        let place = unsafe { self.ring.base.cast::<u8>().add(place * self.stride) };
        let flag = self.flag(slot);
        flag.store(0, Ordering::Release);
        // SAFETY: the caller keeps `len` bytes of device memory at `data` until the send is done; the place is free, since its slot is.
        check("cuMemcpyDtoHAsync", unsafe { sys::cuMemcpyDtoHAsync_v2(place.cast(), data as sys::CUdeviceptr, len, stream) })?;
        // SAFETY: the flag is pinned, mapped memory that outlives the stream (field order).
        let queued = unsafe { sys::cuStreamWriteValue32_v2(stream, flag.as_ptr() as sys::CUdeviceptr, 1, 0) };
        if queued != CUresult::CUDA_SUCCESS {
            // A driver without stream memory operations: right, if slower.
            // SAFETY: the stream is live.
            check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })?;
            flag.store(1, Ordering::Release);
        }
        Ok(place)
    }

    fn ready(&self, slot: usize) -> io::Result<bool> {
        Ok(self.flag(slot).load(Ordering::Acquire) == 1)
    }

    fn release(&self, slot: usize) {
        self.places.lock().give_back(slot);
    }

    fn quiesce(&self) {
        // Dropping a stream waits for it; a later send makes a new one.
        self.streams.lock().clear();
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // Copies under way write into the ring: they end before it goes.
        self.quiesce();
    }
}

struct Stream {
    raw: CUstream,
    context: CUcontext,
}
// SAFETY: streams and contexts may be used from any thread.
unsafe impl Send for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut before = ptr::null_mut();
        // SAFETY: the handles are live; errors of a context that is being torn down are of no consequence here.
        unsafe {
            let _ = sys::cuCtxGetCurrent(&mut before);
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuStreamSynchronize(self.raw);
            let _ = sys::cuStreamDestroy_v2(self.raw);
            let _ = sys::cuCtxSetCurrent(before);
        }
    }
}

/// Pinned host memory, mapped and portable: every context reaches it at its host address.
struct Pinned {
    base: *mut c_void,
}
// SAFETY: plain memory, owned.
unsafe impl Send for Pinned {}
// SAFETY: shared parts are atomics; the rest is handed out by slot.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(len: usize) -> io::Result<Pinned> {
        let mut base = ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a context is current; the output is writable.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut base, len, flags) })?;
        // SAFETY: fresh memory of that length.
        unsafe { ptr::write_bytes(base.cast::<u8>(), 0, len) };
        Ok(Pinned { base })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by cuMemHostAlloc, freed once.
        let _ = unsafe { sys::cuMemFreeHost(self.base) };
    }
}

/// Device memory.
struct Device {
    base: sys::CUdeviceptr,
}

impl Device {
    fn new(len: usize) -> io::Result<Device> {
        let mut base = 0;
        // SAFETY: a context is current; the output is writable.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut base, len) })?;
        Ok(Device { base })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: allocated by cuMemAlloc, freed once.
        let _ = unsafe { sys::cuMemFree_v2(self.base) };
    }
}
