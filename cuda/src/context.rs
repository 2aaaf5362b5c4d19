//! Contexts: a GPU's primary context, retained while in use, or the thread's current context. GPU names. Knows nothing of
//! memory and kernels.

use crate::bdf::Bdf;
use crate::driver::{driver, functions, Relaxed};
use crate::error::{Error, Result};
use crate::sys::{self, CUcontext, CUdevice, Functions};
use std::ops::Deref;
use std::ptr;
use std::sync::Arc;

/// A context that lives as long as this value.
pub struct Context {
    raw: CUcontext,
    device: CUdevice,
    /// It is its GPU's primary context, retained here.
    retained: bool,
}
// SAFETY: contexts are handles that the driver lets any thread use.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of the GPU with this CUDA ordinal. Does not make it current.
    pub fn retain(ordinal: i32) -> Result<Arc<Context>> {
        let driver = driver()?;
        if !(0..driver.devices()).contains(&ordinal) {
            return Err(Error::Invalid(format!("GPU {ordinal} of {}", driver.devices())));
        }
        let cuda = driver.relaxed();
        let device = device_of(&cuda, ordinal)?;
        let mut raw = ptr::null_mut();
        // SAFETY: the device is valid, the output writable; released in drop.
        unsafe { cuda.cuDevicePrimaryCtxRetain(&mut raw, device) }?;
        Ok(Arc::new(Context { raw, device, retained: true }))
    }

    /// The calling thread's current context. If it is not its GPU's primary context, the application must keep it
    /// until everything made in it is freed.
    pub fn current() -> Result<Arc<Context>> {
        let cuda = functions()?;
        let (raw, device) = current(&cuda)?;
        let mut primary = ptr::null_mut();
        // SAFETY: the device is valid, the output writable. A retained context is released here or in drop.
        let retained = unsafe {
            if cuda.cuDevicePrimaryCtxRetain(&mut primary, device).is_ok() && primary != raw {
                let _ = cuda.cuDevicePrimaryCtxRelease(device);
            }
            primary == raw
        };
        Ok(Arc::new(Context { raw, device, retained }))
    }

    /// The id of the calling thread's current context, for look-ups.
    pub fn current_id() -> Result<usize> {
        let cuda = functions()?;
        Ok(current(&cuda)?.0 as usize)
    }

    /// The context's id for look-ups, as from [`Context::current_id`].
    pub fn id(&self) -> usize {
        self.raw as usize
    }

    /// The driver's name of its GPU.
    pub(crate) fn device(&self) -> CUdevice {
        self.device
    }

    /// The GPU's PCI address.
    pub fn bdf(&self) -> Result<Bdf> {
        let cuda = functions()?;
        bdf_of(&cuda, self.device)
    }

    /// The major number of the GPU's compute capability.
    pub fn compute_major(&self) -> Result<i32> {
        let mut major = 0;
        // SAFETY: the output is writable, the device valid.
        unsafe { functions()?.cuDeviceGetAttribute(&mut major, sys::COMPUTE_CAPABILITY_MAJOR, self.device) }?;
        Ok(major)
    }

    /// Makes it current in this thread until the value is dropped; drop in the reverse order of entering.
    pub fn enter(&self) -> Result<Entered<'_>> {
        let cuda = functions()?;
        let mut now = ptr::null_mut();
        // SAFETY: the output is writable.
        let pushed = unsafe { cuda.cuCtxGetCurrent(&mut now) }.is_err() || now != self.raw;
        if pushed {
            // SAFETY: the context is live (retained, or by the contract of `current`).
            unsafe { cuda.cuCtxPushCurrent(self.raw) }?;
        }
        Ok(Entered { cuda, pushed, _context: self })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if !self.retained {
            return;
        }
        if let Ok(cuda) = functions() {
            // SAFETY: retained once.
            let _ = unsafe { cuda.cuDevicePrimaryCtxRelease(self.device) };
        }
    }
}

/// A context that is current in this thread, and the driver's functions. Dropping it restores the previous context.
pub struct Entered<'a> {
    cuda: Relaxed,
    /// Another context was current.
    pushed: bool,
    _context: &'a Context,
}

impl Deref for Entered<'_> {
    type Target = Functions;

    fn deref(&self) -> &Functions {
        &self.cuda
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if !self.pushed {
            return;
        }
        let mut popped = ptr::null_mut();
        // SAFETY: pops what enter pushed.
        let _ = unsafe { self.cuda.cuCtxPopCurrent(&mut popped) };
    }
}

/// Runs `f` and restores this thread's current context: third-party code may push a context and not pop it.
pub fn restoring<R>(f: impl FnOnce() -> R) -> R {
    let now = || -> Result<CUcontext> {
        let mut raw = ptr::null_mut();
        // SAFETY: the output is writable.
        unsafe { functions()?.cuCtxGetCurrent(&mut raw) }?;
        Ok(raw)
    };
    let before = now();
    let result = f();
    let Ok(before) = before else { return result };
    // More than these are not pushed by mistake.
    for _ in 0..4 {
        let (Ok(cuda), Ok(left)) = (functions(), now()) else { return result };
        if left == before {
            return result;
        }
        let mut popped = ptr::null_mut();
        // SAFETY: the output is writable; what is popped was pushed since.
        let _ = unsafe { cuda.cuCtxPopCurrent(&mut popped) };
    }
    if let Ok(cuda) = functions() {
        // SAFETY: it was current in this thread before.
        let _ = unsafe { cuda.cuCtxSetCurrent(before) };
    }
    result
}

fn current(cuda: &Functions) -> Result<(CUcontext, CUdevice)> {
    let (mut raw, mut device) = (ptr::null_mut(), 0);
    // SAFETY: outputs are writable.
    unsafe { cuda.cuCtxGetCurrent(&mut raw) }?;
    if raw.is_null() {
        return Err(Error::Invalid("no CUDA context is current in the calling thread".into()));
    }
    // SAFETY: the output is writable, and a context is current.
    unsafe { cuda.cuCtxGetDevice(&mut device) }?;
    Ok((raw, device))
}

pub(crate) fn device_of(cuda: &Functions, ordinal: i32) -> Result<CUdevice> {
    let mut device = 0;
    // SAFETY: the output is writable.
    unsafe { cuda.cuDeviceGet(&mut device, ordinal) }?;
    Ok(device)
}

fn bdf_of(cuda: &Functions, device: CUdevice) -> Result<Bdf> {
    let mut text = [0u8; 32];
    // SAFETY: the buffer's length is passed.
    unsafe { cuda.cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as i32, device) }?;
    let text = String::from_utf8_lossy(text.split(|&b| b == 0).next().unwrap_or_default()).into_owned();
    Bdf::parse(&text).ok_or_else(|| Error::Invalid(format!("the driver names a PCI address {text:?}")))
}

/// A GPU's ordinal and PCI address.
#[derive(Clone, Copy, Debug)]
pub struct GpuName {
    /// CUDA ordinal.
    pub ordinal: i32,
    /// PCI address.
    pub bdf: Bdf,
}

/// The name of the GPU with this CUDA ordinal. Creates no context.
pub fn gpu_name(ordinal: i32) -> Result<GpuName> {
    let cuda = functions()?;
    let bdf = bdf_of(&cuda, device_of(&cuda, ordinal)?)?;
    Ok(GpuName { ordinal, bdf })
}

/// Ordinals of the GPUs whose primary context is active in this process. Creates no context.
pub fn in_use() -> Vec<i32> {
    let Ok(driver) = driver() else { return Vec::new() };
    let cuda = driver.relaxed();
    let active = |&ordinal: &i32| {
        let (mut flags, mut active) = (0, 0);
        let state = device_of(&cuda, ordinal)
            // SAFETY: the device is valid, outputs are writable.
            .and_then(|device| unsafe { cuda.cuDevicePrimaryCtxGetState(device, &mut flags, &mut active) });
        state.is_ok() && active != 0
    };
    (0..driver.devices()).filter(active).collect()
}

/// CUDA ordinal of the GPU at a PCI address; `None` if no visible GPU has it. Creates no context.
pub fn ordinal_of(bdf: Bdf) -> Result<Option<i32>> {
    for ordinal in 0..driver()?.devices() {
        if gpu_name(ordinal)?.bdf == bdf {
            return Ok(Some(ordinal));
        }
    }
    Ok(None)
}

/// The GPU of the calling thread's current context, else the first one; `None` without a GPU. Creates no context.
pub fn current_name() -> Option<GpuName> {
    let cuda = functions().ok()?;
    let Ok((_, device)) = current(&cuda) else { return gpu_name(0).ok() };
    let bdf = bdf_of(&cuda, device).ok()?;
    let ordinal = ordinal_of(bdf).ok()??;
    Some(GpuName { ordinal, bdf })
}
