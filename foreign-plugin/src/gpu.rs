//! Memory of real GPUs, with `STRICT_FOREIGN_CUDA=1`: registrations, receive memory and device handles are then as real as possible
//! without the kernel's device memory sockets. Knows nothing of comms.

use crate::rules::{lock, settings, violation};
use cuda_driver::{current_name, memory_kind, Context, DeviceBuffer, MemoryKind, PinnedBuffer, Stream};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Copies of one message that take longer have failed.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of the staging memory.
const STAGE: usize = 1 << 20;

/// The GPU that was current in the thread that set up a comm.
pub(crate) struct Gpu {
    pub context: Arc<Context>,
    pub ordinal: i32,
    queue: OnceLock<Mutex<CopyQueue>>,
}

struct CopyQueue {
    stream: Stream,
    stage: PinnedBuffer,
}

fn must<T>(what: &str, result: cuda_driver::Result<T>) -> T {
    result.unwrap_or_else(|e| violation!("{what}: {e}"))
}

static KNOWN: Mutex<Option<HashMap<usize, &'static Gpu>>> = Mutex::new(None);

/// The calling thread's current GPU, which TCPX uses; ends the process without one.
pub(crate) fn current(call: &str) -> &'static Gpu {
    let id = must(&format!("{call} without a current GPU"), Context::current_id());
    let mut known = lock(&KNOWN);
    known.get_or_insert_default().entry(id).or_insert_with(|| {
        let context = must(call, Context::current());
        let Some(name) = current_name() else { violation!("{call}: the current GPU has no name") };
        Box::leak(Box::new(Gpu { context, ordinal: name.ordinal, queue: OnceLock::new() }))
    })
}

/// As [`current`], where GPUs are real: a call of set-up follows the current GPU.
pub(crate) fn in_use(call: &str) -> Option<&'static Gpu> {
    settings().cuda.then(|| current(call))
}

impl Gpu {
    /// Made at the first copy.
    fn queue(&self) -> MutexGuard<'_, CopyQueue> {
        lock(self.queue.get_or_init(|| {
            let stream = must("a stream", Stream::new(&self.context));
            Mutex::new(CopyQueue { stream, stage: must("staging memory", PinnedBuffer::new(&self.context, STAGE)) })
        }))
    }

    /// Ends the process unless this GPU is current in the calling thread.
    pub(crate) fn must_be_current(&self, call: &str) {
        let now = current(call).ordinal;
        if now != self.ordinal {
            violation!("{call} with GPU {now} current: the comm was made with GPU {}", self.ordinal);
        }
    }

    /// Ends the process unless the whole range is memory of this GPU. The driver exports whole granules: the range may also reach past an
    /// allocation's end within its last granule.
    pub(crate) fn check(&self, call: &str, base: usize, size: usize) {
        const GRANULE: usize = 2 << 20;
        let last = base + size - 1;
        for at in [base, base.max(last - last % GRANULE)] {
            match memory_kind(at as u64) {
                Ok(MemoryKind::Device { ordinal }) if ordinal == self.ordinal => {}
                other => {
                    violation!("{call} of {size} bytes at {base:#x} with GPU {} current: {at:#x} is {other:?}", self.ordinal)
                }
            }
        }
    }

    /// The bytes at a device address.
    pub(crate) fn fetch(&self, at: usize, len: usize) -> Vec<u8> {
        let queue = self.queue();
        let host = queue.stage.mapped().host;
        let mut bytes = Vec::with_capacity(len);
        for start in (0..len).step_by(STAGE) {
            let n = STAGE.min(len - start);
            // SAFETY: registered memory of this GPU; the stage holds that many bytes and `finish` waits for the copy.
            unsafe {
                must("a send", queue.stream.device_to_host(host, (at + start) as u64, n));
                must("a send", queue.stream.finish(LIMIT));
                bytes.extend_from_slice(std::slice::from_raw_parts(host, n));
            }
        }
        bytes
    }

    /// Writes bytes to a device address.
    pub(crate) fn put(&self, at: usize, bytes: &[u8]) {
        let queue = self.queue();
        let host = queue.stage.mapped().host;
        for (i, part) in bytes.chunks(STAGE).enumerate() {
            // SAFETY: registered memory of this GPU; the stage holds that many bytes and `finish` waits for the copy.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), host, part.len());
                must("a receive", queue.stream.host_to_device((at + i * STAGE) as u64, host, part.len()));
                must("a receive", queue.stream.finish(LIMIT));
            }
        }
    }

    /// Queues copies from pinned memory and waits for them.
    ///
    /// # Safety
    /// Sources are pinned memory, destinations this GPU's memory, of those lengths and not otherwise used.
    pub(crate) unsafe fn store(&self, copies: impl Iterator<Item = (u64, *const u8, usize)>) {
        let queue = self.queue();
        for (to, from, len) in copies {
            // SAFETY: by the contract.
            must("a receive", unsafe { queue.stream.host_to_device(to, from, len) });
        }
        must("a receive", queue.stream.finish(LIMIT));
    }

    /// Sets pages of its memory.
    ///
    /// # Safety
    /// They are this GPU's and not otherwise used.
    pub(crate) unsafe fn fill(&self, at: impl Iterator<Item = u64>, value: u8, len: usize) {
        let queue = self.queue();
        for at in at {
            // SAFETY: by the contract.
            must("a page", unsafe { queue.stream.fill(at, value, len) });
        }
        must("pages", queue.stream.finish(LIMIT));
    }

    pub(crate) fn device(&self, len: usize) -> DeviceBuffer {
        must("device memory", DeviceBuffer::new(&self.context, len, 4096))
    }

    pub(crate) fn pinned(&self, len: usize) -> PinnedBuffer {
        must("pinned memory", PinnedBuffer::new(&self.context, len))
    }
}
