//! The library's own streams, which neither wait for the application's streams nor delay them, and their operations. Knows nothing of
//! the memory's content.

use crate::context::{Context, Entered};
use crate::error::{Error, Result};
use crate::sys::{self, CUstream};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a wait polls before it sleeps between polls.
const SPIN: Duration = Duration::from_micros(200);
const NAP: Duration = Duration::from_micros(20);

/// A stream that does not wait for the legacy default stream.
pub struct Stream {
    context: Arc<Context>,
    raw: CUstream,
}
// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream of the highest priority: when the application's kernels fill the GPU, ours get the next free slot.
    pub fn new(context: &Arc<Context>) -> Result<Stream> {
        let cuda = context.enter()?;
        let (mut raw, mut least, mut greatest) = (ptr::null_mut(), 0, 0);
        // SAFETY: outputs are writable; destroyed in drop.
        unsafe {
            cuda.cuCtxGetStreamPriorityRange(&mut least, &mut greatest)?;
            cuda.cuStreamCreateWithPriority(&mut raw, sys::STREAM_NON_BLOCKING, greatest)?;
        }
        drop(cuda);
        Ok(Stream { context: context.clone(), raw })
    }

    /// Its context.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The driver's handle.
    pub fn raw(&self) -> CUstream {
        self.raw
    }

    /// Whether everything submitted so far is done; an error when a kernel or copy failed.
    pub fn idle(&self) -> Result<bool> {
        self.idle_in(&self.context.enter()?)
    }

    fn idle_in(&self, cuda: &Entered<'_>) -> Result<bool> {
        // SAFETY: the stream lives as long as self.
        match unsafe { cuda.cuStreamQuery(self.raw) } {
            Ok(()) => Ok(true),
            Err(e) if e.code() == sys::ERROR_NOT_READY => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Waits at most `limit` for everything submitted so far; false on time-out.
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        let cuda = self.context.enter()?;
        let start = Instant::now();
        loop {
            if self.idle_in(&cuda)? {
                return Ok(true);
            }
            let waited = start.elapsed();
            if waited >= limit {
                return Ok(false);
            }
            if waited > SPIN {
                std::thread::sleep(NAP);
            }
        }
    }

    /// As [`Stream::wait`], with an error on time-out.
    pub fn finish(&self, limit: Duration) -> Result<()> {
        if self.wait(limit)? {
            return Ok(());
        }
        Err(Error::Invalid(format!("the GPU has not finished its work within {limit:?}")))
    }

    /// Queues a copy from device to host memory.
    ///
    /// # Safety
    /// Both ranges are valid and stay untouched until the stream has done it.
    pub unsafe fn device_to_host(&self, dst: *mut u8, src: u64, len: usize) -> Result<()> {
        // SAFETY: by the caller's contract.
        unsafe { self.context.enter()?.cuMemcpyDtoHAsync(dst.cast(), src, len, self.raw) }
    }

    /// Queues a copy from host to device memory.
    ///
    /// # Safety
    /// Both ranges are valid and stay untouched until the stream has done it.
    pub unsafe fn host_to_device(&self, dst: u64, src: *const u8, len: usize) -> Result<()> {
        // SAFETY: by the caller's contract.
        unsafe { self.context.enter()?.cuMemcpyHtoDAsync(dst, src.cast(), len, self.raw) }
    }

    /// Queues a copy between GPU memory, also of other GPUs if mapped here.
    ///
    /// # Safety
    /// Both ranges are valid and stay untouched until the stream has done it.
    pub unsafe fn device_to_device(&self, dst: u64, src: u64, len: usize) -> Result<()> {
        // SAFETY: by the caller's contract.
        unsafe { self.context.enter()?.cuMemcpyDtoDAsync(dst, src, len, self.raw) }
    }

    /// Queues the write of a word: a thread that sees it also sees everything that the stream did before.
    ///
    /// # Safety
    /// `at` is the device address of a word of mapped memory, 4-byte aligned, that stays valid until the stream has written it.
    pub unsafe fn signal(&self, at: u64, value: u32) -> Result<()> {
        // SAFETY: by the caller's contract.
        unsafe { self.context.enter()?.cuStreamWriteValue32(self.raw, at, value, 0) }
    }

    /// [`Stream::device_to_device`] followed by [`Stream::signal`].
    ///
    /// # Safety
    /// As for both.
    pub unsafe fn device_to_device_with_signal(&self, dst: u64, src: u64, len: usize, at: u64, value: u32) -> Result<()> {
        let cuda = self.context.enter()?;
        // SAFETY: by the caller's contract.
        unsafe {
            cuda.cuMemcpyDtoDAsync(dst, src, len, self.raw)?;
            cuda.cuStreamWriteValue32(self.raw, at, value, 0)
        }
    }

    /// Queues setting `len` bytes of device memory.
    ///
    /// # Safety
    /// The range is valid and not otherwise used until the stream has done it.
    pub unsafe fn fill(&self, dst: u64, value: u8, len: usize) -> Result<()> {
        // SAFETY: by the caller's contract.
        unsafe { self.context.enter()?.cuMemsetD8Async(dst, value, len, self.raw) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(cuda) = self.context.enter() {
            // SAFETY: created in new. The driver finishes queued work first, without waiting here.
            let _ = unsafe { cuda.cuStreamDestroy(self.raw) };
        }
    }
}
