//! GPUs in use, one value each: the primary context, the copy kernel, and what connections lend each other. Knows nothing of jobs.

use super::kernels::Kernels;
use super::launcher::CopyLauncher;
use super::lent::{Idle, Lent};
use super::pull::PullLauncher;
use crate::status::Result;
use cuda_driver::{Context, DeviceBuffer, PinnedBuffer};
use nccl_net_abi::PAGE;
use parking_lot::Mutex;
use std::sync::Arc;

/// A GPU in use, one value per ordinal. It stays until the process ends, with its primary context: loading kernels and giving memory
/// back make the driver wait for the application's work.
pub(crate) struct Gpu {
    ordinal: i32,
    /// Launchers without a user.
    idle: Arc<Idle<CopyLauncher>>,
    idle_pulls: Arc<Idle<PullLauncher>>,
    /// A page that tells whether the context is still the one that was retained.
    mark: PinnedBuffer,
    kernels: Arc<Kernels>,
    context: Arc<Context>,
}

static IN_USE: Mutex<Vec<Arc<Gpu>>> = Mutex::new(Vec::new());

impl Gpu {
    /// The GPU with this CUDA ordinal. The first call retains its primary context and loads the kernels, for which the driver waits until
    /// the GPU is at rest: it belongs into a registration, never under the lock of a connection. Does not bind it to the thread.
    pub(crate) fn open(ordinal: i32) -> Result<Arc<Gpu>> {
        let mut in_use = IN_USE.lock();
        if let Some(i) = in_use.iter().position(|gpu| gpu.ordinal == ordinal) {
            if in_use[i].mark.is_known() {
                return Ok(in_use[i].clone());
            }
            // The application has reset the GPU: nothing of the old context can be used or given back.
            std::mem::forget(in_use.swap_remove(i));
        }
        let context = Context::retain(ordinal)?;
        let kernels = Arc::new(Kernels::load(&context)?);
        let mark = PinnedBuffer::new(&context, PAGE)?;
        let gpu = Arc::new(Gpu { ordinal, idle: Arc::default(), idle_pulls: Arc::default(), mark, kernels, context });
        in_use.push(gpu.clone());
        Ok(gpu)
    }

    /// Runs `f` with this GPU current and puts the caller's context back afterwards.
    pub(crate) fn with<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let _current = self.context.enter()?;
        f()
    }

    /// The primary context.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// A launcher: an idle one, else a new one.
    pub(crate) fn launcher(&self) -> Result<Lent<CopyLauncher>> {
        let launcher = match self.idle.take() {
            Some(launcher) => launcher,
            None => self.new_launcher()?,
        };
        Ok(Lent::new(launcher, &self.idle))
    }

    /// A launcher of pulls: an idle one, else a new one.
    pub(crate) fn pull_launcher(&self) -> Result<Lent<PullLauncher>> {
        let launcher = match self.idle_pulls.take() {
            Some(launcher) => launcher,
            None => PullLauncher::new(&self.context, &self.kernels)?,
        };
        Ok(Lent::new(launcher, &self.idle_pulls))
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
