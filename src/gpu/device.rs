//! GPUs in use, one value each: the primary context, the copy kernel, and what connections lend each other.

use super::launcher::CopyLauncher;
use super::lent::{Idle, Lent};
use crate::status::{bail, Result};
use cuda_driver::sys::CUfunction;
use cuda_driver::{Context, DeviceBuffer, Module, PinnedBuffer};
use nccl_net_abi::PAGE;
use parking_lot::Mutex;
use std::sync::{Arc, Weak};

/// The committed kernels: machine code for Hopper, PTX that the driver compiles for anything from Ampere on.
const CUBIN_SM90: &[u8] = include_bytes!("kernels/copy.sm_90.cubin");
const PTX_SM80: &str = concat!(include_str!("kernels/copy.sm_80.ptx"), "\0");

/// A GPU in use: holds its primary context. One per ordinal while anyone holds it.
pub(crate) struct Gpu {
    ordinal: i32,
    pub(super) idle: Mutex<Idle>,
    kernels: Arc<Kernels>,
    context: Arc<Context>,
}

/// The copy kernel, by size of its parameters.
pub(super) struct Kernels {
    pub(super) small: CUfunction,
    pub(super) large: CUfunction,
    /// Launches may overlap: the machine code for Hopper says when the next one may start, and ends in order.
    pub(super) overlap: bool,
    _module: Module,
}
// SAFETY: functions are handles that the driver lets any thread use.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

static IN_USE: Mutex<Vec<Weak<Gpu>>> = Mutex::new(Vec::new());

impl Gpu {
    /// The GPU with this CUDA ordinal. The first holder retains its primary context and loads the kernels. Does not bind it to the
    /// thread.
    pub(crate) fn open(ordinal: i32) -> Result<Arc<Gpu>> {
        let mut in_use = IN_USE.lock();
        in_use.retain(|w| w.strong_count() > 0);
        if let Some(gpu) = in_use.iter().filter_map(Weak::upgrade).find(|g| g.ordinal == ordinal) {
            return Ok(gpu);
        }
        let context = Context::retain(ordinal)?;
        let kernels = Arc::new(Kernels::load(&context)?);
        let gpu = Arc::new(Gpu { ordinal, idle: Mutex::default(), kernels, context });
        in_use.push(Arc::downgrade(&gpu));
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
    pub(crate) fn launcher(self: &Arc<Gpu>) -> Result<Lent<CopyLauncher>> {
        Lent::take(self, |_| true, || CopyLauncher::new(&self.context, &self.kernels))
    }

    /// Pinned memory of at least `len` bytes; its contents are of no meaning.
    pub(crate) fn pinned(self: &Arc<Gpu>, len: usize) -> Result<Lent<PinnedBuffer>> {
        let len = pages(len);
        Lent::take(self, |b: &PinnedBuffer| b.len() == len, || Ok(PinnedBuffer::new(&self.context, len)?))
    }

    /// Device memory of at least `len` bytes that a plugin can register as it is: base and length are whole pages. Its contents are of
    /// no meaning.
    pub(crate) fn device_memory(self: &Arc<Gpu>, len: usize) -> Result<Lent<DeviceBuffer>> {
        let len = pages(len);
        Lent::take(self, |b: &DeviceBuffer| b.len() == len, || Ok(DeviceBuffer::new(&self.context, len, PAGE)?))
    }

    /// Has at least `n` launchers idle, so that the next connections need not make theirs.
    pub(crate) fn reserve_launchers(self: &Arc<Gpu>, n: usize) -> Result<()> {
        while self.idle.lock().launchers() < n {
            let new = CopyLauncher::new(&self.context, &self.kernels)?;
            drop(Lent::of(self, new));
        }
        Ok(())
    }
}

fn pages(len: usize) -> usize {
    len.max(1).next_multiple_of(PAGE)
}

impl Kernels {
    fn load(context: &Arc<Context>) -> Result<Kernels> {
        let major = context.compute_major()?;
        if major < 8 {
            bail!(Unsupported, "GPU {} has compute capability {major}.x; the kernels need 8.0", context.bdf()?);
        }
        let overlap = major == 9;
        let image = if overlap { CUBIN_SM90 } else { PTX_SM80.as_bytes() };
        // SAFETY: a complete cubin, or PTX that ends in a NUL.
        let module = unsafe { Module::load(context, image) }?;
        let (small, large) = (module.function(c"uccl_copy_1k")?, module.function(c"uccl_copy_4k")?);
        Ok(Kernels { small, large, overlap, _module: module })
    }
}
