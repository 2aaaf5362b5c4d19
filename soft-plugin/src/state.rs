//! What the process has once: settings, devices, device memory.
//! Built by the first `init` (or the first call that needs it) and kept for good.

use std::sync::{Arc, OnceLock};

use crate::config::Config;
use crate::device::{self, DeviceMemory};
use crate::interfaces::{self, Interface};

/// The process-wide state.
pub struct Global {
    /// Settings.
    pub config: Config,
    /// Devices; a device number is an index.
    pub devices: Vec<Interface>,
    /// Device memory, if the process has any.
    pub device: Option<Arc<dyn DeviceMemory>>,
}

static GLOBAL: OnceLock<Global> = OnceLock::new();

/// The state, built if need be.
pub fn get() -> &'static Global {
    GLOBAL.get_or_init(|| {
        let config = Config::from_env();
        let devices = interfaces::enumerate(config.interfaces.as_deref()).unwrap_or_else(|error| {
            crate::logger::warn(&format!("cannot list the network interfaces: {error}"));
            Vec::new()
        });
        if devices.is_empty() {
            crate::logger::warn(&format!(
                "no network interface matches {:?}",
                config.interfaces.as_deref().unwrap_or("(default)")
            ));
        }
        let device = device::probe(&config);
        let names: Vec<_> = devices.iter().map(|d| format!("{}({})", d.name.to_string_lossy(), d.address)).collect();
        crate::logger::info(&format!(
            "software plugin: devices {}; {} I/O threads; messages up to {} bytes; device memory {}",
            names.join(" "),
            config.threads,
            config.message_limit,
            if device.is_some() { "yes" } else { "no" },
        ));
        Global { config, devices, device }
    })
}
