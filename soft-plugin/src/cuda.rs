//! CUDA memory: receives land in pinned host memory that the GPU reads directly, sends leave through a pinned ring that the copy
//! engine fills. Follows the current context of the calling thread, as the contract says; makes none and touches no GPU by itself.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use cuda_driver::{Absence, Context, DeviceBuffer, PinnedBuffer, Stream};
use nccl_net_abi::{netUnpackMeta, unpackNetDeviceHandle, MAX_REQUESTS, PAGE};
use process::{Mutex, PerProcess};

use crate::device::{AreaMemory, Bounce, DeviceMemory, SendSource, UnpackQueue};

/// Copies of one message that take longer have failed.
const COPY_LIMIT: Duration = Duration::from_secs(5);
/// Large pages of the GPU, so that the dma-buf has few segments.
const AREA_ALIGN: usize = 2 << 20;

/// CUDA device memory.
pub struct Cuda;

fn failed(error: cuda_driver::Error) -> io::Error {
    io::Error::other(error.to_string())
}

impl Cuda {
    /// CUDA, if the driver is installed and finds a GPU. Creates no context.
    pub fn probe() -> Option<Cuda> {
        match cuda_driver::driver() {
            Ok(_) => Some(Cuda),
            Err(Absence::NoGpu(_) | Absence::Forked) => None,
            Err(Absence::Failing(why)) => {
                crate::logger::warn(&format!("device memory is off: the CUDA driver fails: {why}"));
                None
            }
        }
    }
}

impl DeviceMemory for Cuda {
    fn in_context(&self) -> bool {
        Context::current_id().is_ok()
    }

    fn unpack_queue(&self, bounce: Bounce) -> io::Result<UnpackQueue> {
        let context = Context::current().map_err(failed)?;
        let meta = PinnedBuffer::new(&context, size_of::<netUnpackMeta>()).map_err(failed)?;
        let len = size_of::<unpackNetDeviceHandle>();
        let handle = DeviceBuffer::new(&context, len, 1).map_err(failed)?;
        let meta_at = meta.mapped().host.cast();
        let handle_at = handle.ptr() as *mut c_void;
        let fill = |bounce_buf: *mut u8| -> io::Result<()> {
            let content = unpackNetDeviceHandle { meta: meta_at, bounce_buf: bounce_buf.cast(), head: u64::MAX };
            let stream = Stream::new(&context).map_err(failed)?;
            // SAFETY: a new device allocation of that size; the source is a local value that outlives the copy, which the next line waits
            // for. After a time-out nothing uses the destination, and the driver has staged the source.
            unsafe { stream.host_to_device(handle.ptr(), (&raw const content).cast(), len) }.map_err(failed)?;
            stream.finish(COPY_LIMIT).map_err(failed)
        };
        match bounce {
            Bounce::Own(bytes) => {
                let bounce = PinnedBuffer::new(&context, bytes).map_err(failed)?;
                let bounce_at = bounce.mapped().host;
                fill(bounce_at)?;
                Ok(UnpackQueue::new(meta_at, bounce_at, bytes, true, handle_at, Box::new((meta, bounce, handle))))
            }
            Bounce::Lent(lent) => {
                fill(lent.base())?;
                Ok(UnpackQueue::lent(meta_at, lent, handle_at, Box::new((meta, handle))))
            }
        }
    }

    fn current(&self) -> io::Result<usize> {
        Context::current_id().map_err(failed)
    }

    fn area(&self, len: usize) -> io::Result<Box<dyn AreaMemory>> {
        let context = Context::current().map_err(failed)?;
        let memory = DeviceBuffer::new(&context, len, AREA_ALIGN).map_err(failed)?;
        Ok(Box::new(Area { stream: Stream::new(&context).map_err(failed)?, memory }))
    }

    fn export(&self, at: usize, len: usize) -> io::Result<OwnedFd> {
        let context = Context::current().map_err(failed)?;
        cuda_driver::dmabuf(&context, at as u64, len).map_err(failed)
    }

    fn send_source(&self, limit: usize) -> io::Result<Arc<dyn SendSource>> {
        let context = Context::current().map_err(failed)?;
        let stride = limit.next_multiple_of(PAGE);
        let memory = Ring {
            places: PinnedBuffer::new(&context, stride * MAX_REQUESTS).map_err(failed)?,
            flags: PinnedBuffer::new(&context, PAGE).map_err(failed)?,
        };
        Ok(Arc::new(Source {
            memory: ManuallyDrop::new(memory),
            stride,
            places: Mutex::new(Places { free: (0..MAX_REQUESTS).rev().collect(), of_slot: [None; MAX_REQUESTS] }),
            streams: Mutex::default(),
            stuck: AtomicBool::new(false),
        }))
    }
}

/// GPU memory that a NIC writes and reads.
struct Area {
    stream: Stream,
    memory: DeviceBuffer,
}

impl AreaMemory for Area {
    fn base(&self) -> *mut u8 {
        self.memory.ptr() as *mut u8
    }

    fn write(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the caller names bytes of the area that nothing else uses; the next line waits for the copy.
        unsafe { self.stream.host_to_device(self.memory.ptr() + at as u64, bytes.as_ptr(), bytes.len()) }.map_err(failed)?;
        self.stream.finish(COPY_LIMIT).map_err(failed)
    }

    fn read(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.stream.device_to_host(bytes.as_mut_ptr(), self.memory.ptr() + at as u64, bytes.len()) }.map_err(failed)?;
        self.stream.finish(COPY_LIMIT).map_err(failed)
    }
}

/// Pinned memory of a send comm.
struct Ring {
    places: PinnedBuffer,
    /// One word per slot: 1 once the copy is complete. The GPU writes it after the copy.
    flags: PinnedBuffer,
}

/// The source of device sends of a comm: a pinned buffer for each request slot.
struct Source {
    /// Never freed while a copy may write to it.
    memory: ManuallyDrop<Ring>,
    stride: usize,
    places: Mutex<Places>,
    /// The stream of each sending context.
    streams: Mutex<HashMap<usize, Arc<Stream>>>,
    /// A copy timed out.
    stuck: AtomicBool,
}

/// Which buffer of the ring a slot uses. The last one freed is taken first: it is still in the CPU's cache.
struct Places {
    free: Vec<usize>,
    of_slot: [Option<usize>; MAX_REQUESTS],
}

impl Places {
    /// A buffer for `slot`, whose request is new: the buffer of its last request is free.
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
        unsafe { &*self.memory.flags.mapped().host.cast::<AtomicU32>().add(slot) }
    }

    /// Queues the copy of a message, followed by the flag of its slot.
    ///
    /// # Safety
    /// As [`SendSource::begin`]; `place` holds `len` bytes.
    unsafe fn copy(&self, stream: &Stream, slot: usize, data: *const u8, len: usize, place: *mut u8) -> cuda_driver::Result<()> {
        let flag = self.flag(slot);
        flag.store(0, Ordering::Release);
        // SAFETY: by the caller's contract.
        unsafe { stream.device_to_host(place, data as u64, len) }?;
        // SAFETY: the flag is pinned, mapped memory that is freed only after the stream has ended.
        let queued = unsafe { stream.signal(flag.as_ptr() as u64, 1) };
        if queued.is_err() {
            // The driver has no stream memory operations: correct, but slower.
            stream.finish(COPY_LIMIT)?;
            flag.store(1, Ordering::Release);
        }
        Ok(())
    }

    /// Waits until no copy runs; false on time-out.
    fn settle(&self) -> bool {
        self.streams.lock().drain().fold(true, |quiet, (_, stream)| {
            let ended = match stream.wait(COPY_LIMIT) {
                Ok(done) => done,
                Err(e) => e.context_is_dead(),
            };
            if !ended {
                crate::logger::warn("GPU copies of a closed send comm have not ended: its pinned memory is leaked");
                std::mem::forget(stream);
            }
            quiet && ended
        })
    }
}

/// One stream for each context, shared by all send comms: beyond a few streams the driver creates one only while the GPU is idle.
static SHARED: PerProcess<Mutex<BTreeMap<usize, Weak<Stream>>>> = PerProcess::new(Mutex::default);

fn shared(id: usize) -> cuda_driver::Result<Arc<Stream>> {
    let mut all = SHARED.get().lock();
    if let Some(stream) = all.get(&id).and_then(Weak::upgrade) {
        return Ok(stream);
    }
    let stream = Arc::new(Stream::new(&Context::current()?)?);
    all.insert(id, Arc::downgrade(&stream));
    Ok(stream)
}

/// The stream for the calling thread's context, created if missing.
fn stream_of(streams: &mut HashMap<usize, Arc<Stream>>) -> cuda_driver::Result<&Stream> {
    let id = Context::current_id()?;
    match streams.entry(id) {
        Entry::Occupied(entry) => Ok(entry.into_mut()),
        Entry::Vacant(entry) => Ok(entry.insert(shared(id)?)),
    }
}

impl SendSource for Source {
    fn prepare(&self) -> io::Result<()> {
        stream_of(&mut self.streams.lock()).map(drop).map_err(failed)
    }

    fn begin(&self, slot: usize, data: *const u8, len: usize) -> io::Result<*const u8> {
        if len > self.stride {
            return Err(io::Error::other("a message longer than its staging buffer"));
        }
        let mut streams = self.streams.lock();
        let stream = stream_of(&mut streams).map_err(failed)?;
        let place = self.places.lock().take(slot).ok_or_else(|| io::Error::other("no staging buffer is free"))?;
        let place = self.memory.places.mapped().host.wrapping_add(place * self.stride);
        // SAFETY: the caller keeps `len` bytes of device memory at `data` until the send is done; the buffer is free, since its slot is,
        // and lies inside the ring of 16 strides.
        unsafe { self.copy(stream, slot, data, len, place) }.map_err(failed)?;
        Ok(place)
    }

    fn ready(&self, slot: usize) -> io::Result<bool> {
        Ok(self.flag(slot).load(Ordering::Acquire) == 1)
    }

    fn release(&self, slot: usize) {
        self.places.lock().give_back(slot);
    }

    fn quiesce(&self) {
        if !self.settle() {
            self.stuck.store(true, Ordering::Release);
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // Running copies write into the ring, so they must end before it is freed.
        if self.settle() && !self.stuck.load(Ordering::Acquire) {
            // SAFETY: dropped once, here; no copy runs.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
