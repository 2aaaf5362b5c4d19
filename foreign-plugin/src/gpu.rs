//! Memory of real GPUs, where `STRICT_FOREIGN_CUDA=1` asks for it: registrations, receive memory and device handles are then as real as
//! without the kernel's device memory sockets they can be. Knows nothing of comms.

use crate::rules::{lock, violation};
use cuda_driver::{current_name, memory_kind, Context, DeviceBuffer, MemoryKind, PinnedBuffer, Stream};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Copies of one message that take longer will not end.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes that pass the staging memory at once.
const STAGE: usize = 1 << 20;

/// A GPU, as the thread that set up a comm had it current.
pub(crate) struct Gpu {
    pub context: Arc<Context>,
    pub ordinal: i32,
    lane: Mutex<Lane>,
}

struct Lane {
    stream: Stream,
    stage: PinnedBuffer,
}

fn must<T>(what: &str, result: cuda_driver::Result<T>) -> T {
    result.unwrap_or_else(|e| violation!("{what}: {e}"))
}

static KNOWN: Mutex<Option<HashMap<usize, &'static Gpu>>> = Mutex::new(None);

/// The calling thread's current GPU, or the end of the process: TCPX takes it from there.
pub(crate) fn current(call: &str) -> &'static Gpu {
    let id = must(&format!("{call} without a current GPU"), Context::current_id());
    let mut known = lock(&KNOWN);
    known.get_or_insert_default().entry(id).or_insert_with(|| {
        let context = must(call, Context::current());
        let Some(name) = current_name() else { violation!("{call}: the current GPU has no name") };
        let lane = Lane { stream: must(call, Stream::new(&context)), stage: must(call, PinnedBuffer::new(&context, STAGE)) };
        Box::leak(Box::new(Gpu { context, ordinal: name.ordinal, lane: Mutex::new(lane) }))
    })
}

impl Gpu {
    /// Ends the process unless all of a range is memory of this GPU. The driver exports whole granules: what lies behind an allocation's
    /// end in its last one may be named, too.
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
        let lane = lock(&self.lane);
        let host = lane.stage.mapped().host;
        let mut bytes = Vec::with_capacity(len);
        for start in (0..len).step_by(STAGE) {
            let n = STAGE.min(len - start);
            // SAFETY: registered memory of this GPU; the stage holds so many bytes and the copy is waited for.
            unsafe {
                must("a send", lane.stream.device_to_host(host, (at + start) as u64, n));
                must("a send", lane.stream.finish(LIMIT));
                bytes.extend_from_slice(std::slice::from_raw_parts(host, n));
            }
        }
        bytes
    }

    /// Queues copies from pinned memory and waits for them.
    ///
    /// # Safety
    /// Sources are pinned memory, destinations this GPU's, of those lengths and nobody else's.
    pub(crate) unsafe fn store(&self, copies: impl Iterator<Item = (u64, *const u8, usize)>) {
        let lane = lock(&self.lane);
        for (to, from, len) in copies {
            // SAFETY: by the contract.
            must("a receive", unsafe { lane.stream.host_to_device(to, from, len) });
        }
        must("a receive", lane.stream.finish(LIMIT));
    }

    /// Sets pages of its memory.
    ///
    /// # Safety
    /// They are this GPU's and nobody else's.
    pub(crate) unsafe fn fill(&self, at: impl Iterator<Item = u64>, value: u8, len: usize) {
        let lane = lock(&self.lane);
        for at in at {
            // SAFETY: by the contract.
            must("a page", unsafe { lane.stream.fill(at, value, len) });
        }
        must("pages", lane.stream.finish(LIMIT));
    }

    pub(crate) fn device(&self, len: usize) -> DeviceBuffer {
        must("device memory", DeviceBuffer::new(&self.context, len, 4096))
    }

    pub(crate) fn pinned(&self, len: usize) -> PinnedBuffer {
        must("pinned memory", PinnedBuffer::new(&self.context, len))
    }
}
