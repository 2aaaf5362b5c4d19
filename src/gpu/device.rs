//! GPUs in use, one value each: the primary context, the copy kernel, and what connections lend each other. Knows nothing of jobs.

use super::job::{Extent, Job};
use super::kernels::Kernels;
use super::launcher::CopyLauncher;
use super::launcher_pool::{Idle, PooledLauncher, Reusable};
use super::pull_launcher::PullLauncher;
use crate::status::Result;
use cuda_driver::{Context, DeviceBuffer, PinnedBuffer};
use nccl_net_abi::PAGE;
use process::{Mutex, PerProcess};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A GPU in use, one value per ordinal. It stays until the process ends, with its primary context: loading kernels and giving memory
/// back make the driver wait for the application's work.
pub(crate) struct Gpu {
    /// Launchers without a user.
    idle: Arc<Idle<CopyLauncher>>,
    idle_pulls: Arc<Idle<PullLauncher>>,
    /// A page that shows whether the context is still the one that was retained.
    mark: PinnedBuffer,
    kernels: Arc<Kernels>,
    context: Arc<Context>,
    ordinal: i32,
}

/// A first piece of work that takes longer than this will not end.
const REHEARSAL_LIMIT: Duration = Duration::from_secs(30);

/// GPUs by ordinal. Each has its own lock: initialising one may take long and must not block the others.
static IN_USE: PerProcess<Mutex<BTreeMap<i32, Arc<Seat>>>> = PerProcess::new(Mutex::default);

/// The place of one GPU.
type Seat = Mutex<Option<Arc<Gpu>>>;

impl Gpu {
    /// The GPU with this CUDA ordinal. The first call retains its primary context, loads the kernels and runs each kind of work once. The
    /// driver waits for that until the GPU is at rest: it belongs into the creation of an engine or a registration, never under the lock
    /// of a connection. Does not bind it to the thread.
    pub(crate) fn open(ordinal: i32) -> Result<Arc<Gpu>> {
        let place = IN_USE.get().lock().entry(ordinal).or_default().clone();
        let mut place = place.lock();
        if let Some(gpu) = &*place {
            if gpu.mark.is_known() {
                return Ok(gpu.clone());
            }
            // The application has reset the GPU: nothing of the old context can be used or given back.
            std::mem::forget(place.take());
        }
        let context = Context::retain(ordinal)?;
        let kernels = Arc::new(Kernels::load(&context)?);
        let mark = PinnedBuffer::new(&context, PAGE)?;
        let gpu = Arc::new(Gpu { idle: Arc::default(), idle_pulls: Arc::default(), mark, kernels, context, ordinal });
        gpu.rehearse()?;
        *place = Some(gpu.clone());
        Ok(gpu)
    }

    /// Runs every kind of work of a transfer once, so that the driver creates its state for them now and not in the middle
    /// of a transfer, where it could wait for the application.
    fn rehearse(&self) -> Result<()> {
        const LEN: usize = 1 << 20;
        const PIECE: usize = 8;
        let (near, far) = (self.pinned(LEN)?, self.device_memory(LEN)?);
        let mut launcher = self.new_launcher()?;
        let word = near.mapped().device + (LEN - size_of::<u64>()) as u64;
        // SAFETY: both blocks are this call's own and hold LEN bytes; they go back to the cache when the stream has ended, or stay.
        let queued = unsafe {
            let stream = launcher.stream();
            let copies = stream
                .fill(far.ptr(), 0, LEN)
                .and_then(|()| stream.host_to_device(far.ptr(), near.mapped().host, LEN))
                .and_then(|()| stream.device_to_host(near.mapped().host, far.ptr(), LEN));
            // Not every driver can write a word from a stream; callers have a fallback.
            copies.map(|()| drop(stream.signal(word, 1)))
        };
        let mut result = queued.map_err(crate::status::Error::from);
        // Few pieces and many, for both sizes of parameters.
        for pieces in [1, 100] {
            let segments: Vec<Extent> =
                (0..pieces).map(|i| Extent { addr: far.ptr() + (i * 2 * PIECE) as u64, len: PIECE as u64 }).collect();
            let job = Job::gather(&segments, near.mapped().device, (pieces * PIECE) as u64);
            // SAFETY: the pieces lie in the blocks, which have no other user.
            result = result.and_then(|()| unsafe { launcher.submit(&[job]) }.map(drop));
        }
        if let Err(e) = launcher.quiesce(REHEARSAL_LIMIT) {
            std::mem::forget((near, far, launcher));
            return Err(e);
        }
        result?;
        if let Some(launcher) = launcher.reset() {
            self.idle.put(launcher);
        }
        Ok(())
    }

    /// Runs `f` with this GPU current and puts the caller's context back afterwards.
    pub(crate) fn with<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let _current = self.context.enter()?;
        f()
    }

    /// Its CUDA ordinal.
    pub(crate) fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// The primary context.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// A launcher: an idle one, else a new one.
    pub(crate) fn launcher(&self) -> Result<PooledLauncher<CopyLauncher>> {
        let launcher = match self.idle.take() {
            Some(launcher) => launcher,
            None => self.new_launcher()?,
        };
        Ok(PooledLauncher::new(launcher, &self.idle))
    }

    /// A launcher of pulls: an idle one, else a new one.
    pub(crate) fn pull_launcher(&self) -> Result<PooledLauncher<PullLauncher>> {
        let launcher = match self.idle_pulls.take() {
            Some(launcher) => launcher,
            None => PullLauncher::new(&self.context, &self.kernels)?,
        };
        Ok(PooledLauncher::new(launcher, &self.idle_pulls))
    }

    fn new_launcher(&self) -> Result<CopyLauncher> {
        CopyLauncher::new(&self.context, &self.kernels)
    }

    /// Has at least `n` launchers idle, so that the next connections need not make theirs.
    pub(crate) fn reserve_launchers(&self, n: usize) -> Result<()> {
        while self.idle.count() < n {
            self.idle.put(self.new_launcher()?);
        }
        Ok(())
    }

    /// Zeroed pinned memory of at least `len` bytes, whole pages.
    pub(crate) fn pinned(&self, len: usize) -> Result<PinnedBuffer> {
        Ok(PinnedBuffer::new(&self.context, pages(len))?)
    }

    /// Device memory of at least `len` bytes that a plugin can register as it is: base and length are whole pages.
    pub(crate) fn device_memory(&self, len: usize) -> Result<DeviceBuffer> {
        Ok(DeviceBuffer::new(&self.context, pages(len), PAGE)?)
    }
}

fn pages(len: usize) -> usize {
    len.max(1).next_multiple_of(PAGE)
}
