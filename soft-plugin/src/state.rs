//! What the process has once: settings, devices, device memory.
//! Built by the first `init` (or the first call that needs it) and kept for good; a child of `fork` builds its own.

use std::sync::Arc;

use nccl_net_abi::{ncclResult_t, NCCL_INVALID_ARGUMENT};
use parking_lot::Mutex;

use crate::config::Config;
use crate::congestion;
use crate::device::{self, DeviceMemory};
use crate::fork::PerProcess;
use crate::interfaces::{self, Interface};
use crate::logger;

/// The process-wide state.
pub struct Global {
    /// Settings.
    pub config: Config,
    /// Devices; a device number is an index.
    pub devices: Vec<Interface>,
    /// Device memory, if the process has any.
    pub device: Option<Arc<dyn DeviceMemory>>,
}

/// The state, built if need be.
pub fn get() -> Result<&'static Global, ncclResult_t> {
    static GLOBAL: PerProcess<Mutex<Option<&'static Global>>> = PerProcess::new();
    let mut global = GLOBAL.get(Mutex::default).lock();
    if let Some(global) = *global {
        return Ok(global);
    }
    let built = build().map_err(|why| {
        static LINE: logger::Limited = logger::Limited::new();
        LINE.warn(&why);
        NCCL_INVALID_ARGUMENT
    })?;
    Ok(*global.insert(Box::leak(Box::new(built))))
}

fn build() -> Result<Global, String> {
    let config = Config::from_env()?;
    congestion::check(&config).map_err(|e| format!("UCCL_TCPX_SOFT_CONGESTION: {e}"))?;
    let devices = interfaces::usable(config.interfaces.as_deref()).unwrap_or_else(|error| {
        logger::warn(&format!("cannot list the network interfaces: {error}"));
        Vec::new()
    });
    if devices.is_empty() {
        logger::warn(&format!("no usable network interface matches {:?}", config.interfaces.as_deref().unwrap_or("(default)")));
    }
    let device = device::probe(&config);
    let names: Vec<_> = devices.iter().map(|d| format!("{}({})", d.name.to_string_lossy(), d.address)).collect();
    logger::info(&format!(
        "software plugin: devices {}; {} I/O threads; messages up to {} bytes; device memory {}",
        names.join(" "),
        config.threads,
        config.message_limit,
        if device.is_some() { "yes" } else { "no" },
    ));
    Ok(Global { config, devices, device })
}
