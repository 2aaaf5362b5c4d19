//! Primary contexts, retained only for GPUs in use, and what lives in them once: the kernel module and streams.

use super::bdf::Bdf;
use super::driver::{check, device_count, require};
use crate::status::{bail, Result};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUfunction, CUmodule, CUstream};
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock, Weak};

/// The committed kernels: machine code for Hopper, PTX that the driver compiles for anything from Ampere on.
const CUBIN_SM90: &[u8] = include_bytes!("kernels/copy.sm_90.cubin");
const PTX_SM80: &str = concat!(include_str!("kernels/copy.sm_80.ptx"), "\0");

/// A GPU in use: holds its primary context. One per ordinal while anyone holds it.
pub(crate) struct Gpu {
    ordinal: i32,
    device: CUdevice,
    context: CUcontext,
    bdf: Bdf,
    kernels: OnceLock<Kernels>,
    loading: Mutex<()>,
}
// SAFETY: contexts, modules and functions are handles that the driver lets any thread use.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// The copy kernel, by size of its parameters.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    module: CUmodule,
    pub(super) small: CUfunction,
    pub(super) large: CUfunction,
    /// Launches may overlap: the machine code for Hopper says when the next one may start, and ends in order.
    pub(super) overlap: bool,
}
// SAFETY: handles, as above.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

static IN_USE: Mutex<Vec<Weak<Gpu>>> = Mutex::new(Vec::new());

impl Gpu {
    /// The GPU with this CUDA ordinal; retains its primary context if nobody holds it yet. Does not bind it to the thread.
    pub(crate) fn open(ordinal: i32) -> Result<Arc<Gpu>> {
        require()?;
        if !(0..device_count()).contains(&ordinal) {
            bail!(InvalidArgument, "GPU {ordinal} of {}", device_count());
        }
        let mut in_use = IN_USE.lock();
        in_use.retain(|w| w.strong_count() > 0);
        if let Some(gpu) = in_use.iter().filter_map(Weak::upgrade).find(|g| g.ordinal == ordinal) {
            return Ok(gpu);
        }
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: out pointers are locals.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        let bdf = bdf_of_device(device)?;
        // SAFETY: the device is valid; released in drop.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let gpu = Arc::new(Gpu { ordinal, device, context, bdf, kernels: OnceLock::new(), loading: Mutex::new(()) });
        in_use.push(Arc::downgrade(&gpu));
        Ok(gpu)
    }

    /// Runs `f` with this GPU current and puts the caller's context back afterwards.
    pub(crate) fn with<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        // SAFETY: the context is retained as long as self lives.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        let result = f();
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what was pushed above.
        let pop = check("cuCtxPopCurrent", unsafe { sys::cuCtxPopCurrent_v2(&mut popped) });
        result.and_then(|r| pop.map(|()| r))
    }

    /// The copy kernel, loaded into this context at its first use.
    pub(super) fn kernels(&self) -> Result<Kernels> {
        let _one = self.loading.lock();
        if let Some(k) = self.kernels.get() {
            return Ok(*k);
        }
        let loaded = self.with(|| {
            let mut major = 0;
            let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
            // SAFETY: out pointer is a local, the device is valid.
            check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut major, attribute, self.device) })?;
            if major < 8 {
                bail!(Unsupported, "GPU {} has compute capability {major}.x; the kernels need 8.0", self.bdf);
            }
            let overlap = major == 9;
            let image = if overlap { CUBIN_SM90.as_ptr() } else { PTX_SM80.as_ptr() };
            let mut module = std::ptr::null_mut();
            // SAFETY: the image is a complete cubin, or PTX that ends in a NUL.
            check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, image.cast()) })?;
            let function = |name: &std::ffi::CStr| {
                let mut f = std::ptr::null_mut();
                // SAFETY: the module is loaded, the name ends in a NUL.
                check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut f, module, name.as_ptr()) }).map(|()| f)
            };
            Ok(Kernels { module, small: function(c"uccl_copy_1k")?, large: function(c"uccl_copy_4k")?, overlap })
        })?;
        Ok(*self.kernels.get_or_init(|| loaded))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let Some(k) = self.kernels.get() {
            // SAFETY: nobody launches any more: launchers hold an Arc of self. At process exit the driver may already be gone
            // and answer with an error, which is then of no interest.
            let _ = self.with(|| check("cuModuleUnload", unsafe { sys::cuModuleUnload(k.module) }));
        }
        // SAFETY: retained once in open.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

fn bdf_of_device(device: CUdevice) -> Result<Bdf> {
    let mut text = [0 as std::ffi::c_char; 32];
    // SAFETY: the buffer's length is passed.
    check("cuDeviceGetPCIBusId", unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as i32, device) })?;
    // SAFETY: the driver ended the text with a NUL inside the buffer.
    let text = unsafe { std::ffi::CStr::from_ptr(text.as_ptr()) }.to_string_lossy();
    match Bdf::parse(&text) {
        Some(bdf) => Ok(bdf),
        None => bail!(Gpu, "the driver names a PCI address {text:?}"),
    }
}

/// CUDA ordinal of the GPU at a PCI address; `None` when no visible GPU is there. Makes no context.
pub(crate) fn ordinal_of(bdf: Bdf) -> Result<Option<i32>> {
    for ordinal in 0..device_count() {
        let mut device = 0;
        // SAFETY: out pointer is a local.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        if bdf_of_device(device)? == bdf {
            return Ok(Some(ordinal));
        }
    }
    Ok(None)
}

/// A stream that does not wait for the legacy default stream.
pub(crate) struct Stream {
    gpu: Arc<Gpu>,
    raw: CUstream,
}
// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream on `gpu`.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Stream> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: out pointer is a local; destroyed in drop.
        gpu.with(|| check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) }))?;
        Ok(Stream { gpu: gpu.clone(), raw })
    }
    /// The GPU it belongs to.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }
    pub(super) fn raw(&self) -> CUstream {
        self.raw
    }
    /// Waits for everything submitted so far.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as self.
        self.gpu.with(|| check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) }))
    }
    /// Whether everything submitted so far is done; an error when a kernel or copy failed.
    pub(crate) fn idle(&self) -> Result<bool> {
        self.gpu.with(|| {
            // SAFETY: the stream lives as long as self.
            match unsafe { sys::cuStreamQuery(self.raw) } {
                sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
                result => check("stream", result).map(|()| true),
            }
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in new; the driver finishes queued work first.
        let _ = self.gpu.with(|| check("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(self.raw) }));
    }
}

/// A GPU by name, without touching it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GpuName {
    /// CUDA ordinal.
    pub ordinal: i32,
    /// PCI address.
    pub bdf: Bdf,
}

/// The GPU of the calling thread's current context, else the first one; `None` without a GPU. Makes no context.
pub(crate) fn current_name() -> Option<GpuName> {
    if device_count() == 0 {
        return None;
    }
    let mut device = 0;
    // SAFETY: out pointers are locals; without a current context the call fails and the first GPU is taken.
    let current = unsafe { sys::cuCtxGetDevice(&mut device) } == sys::CUresult::CUDA_SUCCESS;
    // SAFETY: as above.
    if !current && unsafe { sys::cuDeviceGet(&mut device, 0) } != sys::CUresult::CUDA_SUCCESS {
        return None;
    }
    let bdf = bdf_of_device(device).ok()?;
    let ordinal = ordinal_of(bdf).ok()??;
    Some(GpuName { ordinal, bdf })
}
