//! Which GPU the engine uses, and on which GPU memory lies. Knows nothing about connections.

use crate::gpu::{Gpu, GpuName, MemoryKind};
use crate::net::plugin::Plugin;
use crate::net::{OnGpu, Scope};
use crate::status::{bail, Result};
use crate::types::Place;
use crate::wire::hello::MAX_FURTHER;
use process::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

impl OnGpu for Gpu {
    fn address(&self) -> Option<String> {
        Some(crate::gpu::gpu_name(self.ordinal()).ok()?.bdf.to_string())
    }

    fn on(&self, body: &mut dyn FnMut()) -> Result<()> {
        // A registration that TCPX refuses leaves a CUDA context pushed.
        cuda_driver::restoring(|| {
            self.with(|| {
                body();
                Ok(())
            })
        })
    }
}

pub(crate) struct Gpus {
    /// The engine's GPU, if any. Only its name; no context is created.
    own: Option<GpuName>,
    /// Host memory is treated as memory of this many GPUs, region by region in turn.
    emulated: Option<u8>,
    /// Regions registered so far, if GPUs are emulated.
    emulated_regions: AtomicU64,
    /// GPUs with registered memory: their contexts stay until the engine is destroyed.
    opened: Mutex<HashMap<u8, Arc<Gpu>>>,
}

/// Loads the kernels on GPUs that the application already uses, so that the driver waits for the application's work now and not
/// at a registration. Other GPUs are left alone: a context there would cost memory. An error recurs, and is reported, at the
/// registration that needs the GPU.
fn load_where_in_use() {
    for ordinal in crate::gpu::in_use() {
        if let Err(e) = Gpu::open(ordinal) {
            log::debug!("GPU {ordinal} is not initialised yet: {e}");
        }
    }
}

impl Gpus {
    pub(crate) fn new(emulated: Option<u8>) -> Gpus {
        let own = if emulated.is_some() { None } else { crate::gpu::current_name() };
        if emulated.is_none() {
            load_where_in_use();
        }
        Gpus { own, emulated, emulated_regions: AtomicU64::new(0), opened: Mutex::default() }
    }

    /// CUDA index of the engine's GPU, -1 without one.
    pub(crate) fn index(&self) -> i32 {
        self.own.as_ref().map_or(-1, |g| g.ordinal)
    }

    /// PCI address of the engine's GPU, as announced to peers; "-1" without one.
    pub(crate) fn name(&self) -> String {
        self.own.as_ref().map_or("-1".to_owned(), |g| g.bdf.to_string())
    }

    /// Directory under /sys of a GPU, or of the engine's GPU where none is given.
    pub(crate) fn pci_path(&self, gpu: Option<Place>) -> Option<String> {
        let own = self.own.as_ref()?;
        let bdf = match gpu.and_then(Place::ordinal).map(i32::from).filter(|&ordinal| ordinal != own.ordinal) {
            Some(other) => crate::gpu::gpu_name(other).ok()?.bdf,
            None => own.bdf,
        };
        let path = std::fs::canonicalize(format!("/sys/bus/pci/devices/{bdf}")).ok()?;
        Some(path.to_string_lossy().into_owned())
    }

    /// CUDA indices of other GPUs than the engine's that have registered memory, in ascending order.
    pub(crate) fn further(&self) -> Vec<u8> {
        let own = u8::try_from(self.index()).unwrap_or(0);
        let mut used: Vec<u8> = match self.emulated {
            Some(n) => (0..u64::from(n).min(self.emulated_regions.load(Ordering::Relaxed))).map(|i| i as u8).collect(),
            None => self.opened.lock().keys().copied().collect(),
        };
        used.retain(|&gpu| gpu != own);
        used.sort_unstable();
        used.truncate(MAX_FURTHER);
        used
    }

    /// The engine's GPU, opened; used to start a plugin.
    pub(crate) fn own(&self) -> Result<Scope> {
        match &self.own {
            Some(gpu) => Ok(Some(Gpu::open(gpu.ordinal)?)),
            None => Ok(None),
        }
    }

    /// The GPU whose context a plugin needs for memory of `gpu`; none for the software plugin, which takes the GPU from each
    /// device request.
    pub(crate) fn followed_by(&self, plugin: &Plugin, gpu: Option<Place>) -> Result<Scope> {
        match (gpu.and_then(Place::ordinal), &self.own) {
            (Some(ordinal), Some(_)) if plugin.traits.follows_gpu => Ok(Some(Gpu::open(ordinal.into())?)),
            _ => Ok(None),
        }
    }

    /// The GPUs that have registered memory.
    pub(crate) fn used(&self) -> Vec<Place> {
        match self.emulated {
            Some(n) => {
                (0..u64::from(n).min(self.emulated_regions.load(Ordering::Relaxed))).map(|i| Place::gpu(i as u8)).collect()
            }
            None => self.opened.lock().keys().map(|&ordinal| Place::gpu(ordinal)).collect(),
        }
    }

    /// Where the memory at `addr` lies, and whether it is the first region there. Initialises the GPU at its first region, which
    /// waits for the application's work there.
    pub(crate) fn place_of(&self, addr: u64) -> Result<(Place, bool)> {
        if let Some(n) = self.emulated {
            let (n, region) = (u64::from(n.max(1)), self.emulated_regions.fetch_add(1, Ordering::Relaxed));
            return Ok((Place::gpu((region % n) as u8), region < n));
        }
        // The kernel reads and writes pinned and managed memory like any other.
        let MemoryKind::Device { ordinal } = crate::gpu::memory_kind(addr)? else { return Ok((Place::HOST, false)) };
        let Ok(index) = u8::try_from(ordinal) else { bail!(Unsupported, "GPU {ordinal}") };
        let known = self.opened.lock().contains_key(&index);
        if !known {
            // The lock is not held: set-ups take it.
            let gpu = Gpu::open(ordinal)?;
            crate::channel::cuda::warm(&gpu)?;
            self.opened.lock().insert(index, gpu);
        }
        Ok((Place::gpu(index), !known))
    }

    /// Initialises what the next connection needs of the GPUs in use, so that nothing is allocated in the middle of a transfer.
    pub(crate) fn warm(&self) -> Result<()> {
        let gpus: Vec<Arc<Gpu>> = self.opened.lock().values().cloned().collect();
        gpus.iter().try_for_each(crate::channel::cuda::warm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulated_gpus_get_their_first_region_once() {
        let gpus = Gpus::new(Some(2));
        assert!(gpus.used().is_empty());
        let first = |n: u8, first: bool| (Place::gpu(n), first);
        for expected in [first(0, true), first(1, true), first(0, false), first(1, false)] {
            assert_eq!(gpus.place_of(0x1000).unwrap(), expected);
        }
        assert_eq!(gpus.used(), [Place::gpu(0), Place::gpu(1)]);
        assert_eq!(Gpus::new(Some(4)).index(), -1);
    }
}
