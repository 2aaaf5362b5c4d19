//! Per-process state: settings, devices, device memory.
//! Built by the first `init` (or the first call that needs it) and kept until the process ends; a forked child builds its own.

use std::ffi::CStr;
use std::net::IpAddr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::Arc;

use nccl_net_abi::{ncclResult_t, NCCL_INVALID_ARGUMENT};
use process::{Mutex, PerProcess, RwLock};

use crate::config::Config;
use crate::congestion;
use crate::cuda::Cuda;
use crate::device::{DeviceMemory, Emulated};
use crate::devmem::Areas;
use crate::interfaces::{self, Interface};
use crate::logger;

/// The process-wide state.
pub struct Global {
    /// Settings.
    pub config: Config,
    /// Devices by number.
    pub devices: Devices,
    /// Device memory, if available.
    pub device: Option<Arc<dyn DeviceMemory>>,
    /// GPU memory that NICs write.
    pub areas: Areas,
}

/// The devices found so far. A device keeps its number: new ones are appended, and one whose address has changed is replaced.
/// References stay valid: the old value of a changed device is never freed.
#[derive(Default)]
pub struct Devices {
    list: RwLock<Vec<&'static Interface>>,
    absent: Mutex<Vec<String>>,
}

impl Devices {
    /// Names of the interfaces that could be devices but for their link or address, when the host's were last listed.
    pub fn absent(&self) -> Vec<String> {
        self.absent.lock().clone()
    }

    /// The name of the device with an address.
    pub fn name_of(&self, ip: IpAddr) -> Option<String> {
        self.list.read().iter().find(|device| device.address == ip).map(|device| device.name.to_string_lossy().into_owned())
    }

    /// Device number `dev`.
    pub fn get(&self, dev: usize) -> Option<&'static Interface> {
        self.list.read().get(dev).copied()
    }

    /// Number of devices.
    pub fn len(&self) -> usize {
        self.list.read().len()
    }

    /// Merges the interfaces that the host has now.
    fn merge(&self, found: Vec<Interface>) {
        let mut list = self.list.write();
        for interface in found {
            let name: &CStr = &interface.name;
            match list.iter_mut().find(|known| *known.name == *name) {
                Some(known) if (known.address, known.scope) == (interface.address, interface.scope) => {}
                Some(known) => *known = Box::leak(Box::new(interface)),
                None => list.push(Box::leak(Box::new(interface))),
            }
        }
    }
}

impl Global {
    /// Lists the host's interfaces again.
    pub fn refresh(&self) {
        if let Ok((found, absent)) = interfaces::look(self.config.interfaces.as_deref()) {
            self.devices.merge(found);
            *self.devices.absent.lock() = absent;
        }
    }
}

/// The state, built on first use.
pub fn get() -> Result<&'static Global, ncclResult_t> {
    static GLOBAL: PerProcess<Mutex<Option<&'static Global>>> = PerProcess::new(Mutex::default);
    /// The last state built, by this process or its parent.
    static LAST: AtomicPtr<Global> = AtomicPtr::new(std::ptr::null_mut());
    let mut global = GLOBAL.get().lock();
    if let Some(global) = *global {
        return Ok(global);
    }
    // SAFETY: a built state is never freed, nor is a child's copy.
    let built = match unsafe { LAST.load(Ordering::Acquire).as_ref() } {
        Some(parent) => inherit(parent),
        None => build().map_err(|why| {
            static LINE: logger::Limited = logger::Limited::new();
            LINE.warn(&why);
            NCCL_INVALID_ARGUMENT
        })?,
    };
    let built = Box::into_raw(Box::new(built));
    LAST.store(built, Ordering::Release);
    // SAFETY: as above.
    Ok(global.insert(unsafe { &*built }))
}

fn build() -> Result<Global, String> {
    let config = Config::from_env()?;
    congestion::check(&config).map_err(|e| format!("UCCL_TCPX_SOFT_CONGESTION: {e}"))?;
    let (devices, absent) = interfaces::look(config.interfaces.as_deref()).unwrap_or_else(|error| {
        logger::warn(&format!("cannot list the network interfaces: {error}"));
        Default::default()
    });
    if devices.is_empty() {
        logger::warn(&format!("no usable network interface matches {:?}", config.interfaces.as_deref().unwrap_or("(default)")));
    }
    let device = device_memory(&config);
    let names: Vec<_> = devices.iter().map(|d| format!("{}({})", d.name.to_string_lossy(), d.address)).collect();
    logger::info(&format!(
        "software plugin: devices {}; {} I/O threads; messages up to {} bytes; device memory {}",
        names.join(" "),
        config.threads,
        config.message_limit,
        if device.is_some() { "yes" } else { "no" },
    ));
    let known = Devices { list: RwLock::default(), absent: Mutex::new(absent) };
    known.merge(devices);
    Ok(Global { config, devices: known, device, areas: Areas::default() })
}

/// The state of a child: settings and device numbers are the parent's, because the parent's callers still use them in the child.
/// Device memory is detected again, since CUDA does not survive a fork.
fn inherit(parent: &Global) -> Global {
    let config = parent.config.clone();
    // A thread of the parent may have held the lock at the fork.
    let known = parent.devices.list.try_read().map(|list| list.clone()).unwrap_or_default();
    let devices = Devices { list: RwLock::new(known), ..Devices::default() };
    let child = Global { device: device_memory(&config), devices, config, areas: Areas::default() };
    child.refresh();
    child
}

/// The device memory of this process, if available.
fn device_memory(config: &Config) -> Option<Arc<dyn DeviceMemory>> {
    if config.emulate_device {
        return Some(Arc::new(Emulated));
    }
    Some(Arc::new(Cuda::probe()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_keep_their_numbers() {
        let lo = interfaces::usable(Some("=lo")).unwrap().remove(0);
        let named = |name: &str, address: &str| Interface {
            name: std::ffi::CString::new(name).unwrap(),
            address: address.parse().unwrap(),
            ..lo.clone()
        };
        let devices = Devices::default();
        devices.merge(vec![named("eth0", "10.0.0.1"), named("eth1", "10.0.1.1")]);
        let first = devices.get(0).unwrap();
        devices.merge(vec![named("eth2", "10.0.2.1"), named("eth1", "10.0.1.9")]);
        assert_eq!(devices.len(), 3);
        assert!(std::ptr::eq(first, devices.get(0).unwrap()));
        assert_eq!(devices.get(1).unwrap().address.to_string(), "10.0.1.9");
        assert_eq!(&*devices.get(2).unwrap().name, c"eth2");
        assert!(devices.get(3).is_none());
    }
}
