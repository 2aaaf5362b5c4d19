//! The areas of a process: one for each NIC and GPU, opened when it is first needed and kept until the process ends.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use devmem::agent::SOCKET;
use devmem::Nic;
use process::Mutex;

use super::area::Area;
use super::host::{Asked, Host, Own};
use crate::config::Config;
use crate::device::DeviceMemory;
use crate::interfaces::Interface;
use crate::logger;

/// Largest message: a chunk of a foreign plugin.
const MESSAGE: usize = 512 << 10;

/// Largest message of a comm.
pub fn limit(config: &Config) -> usize {
    config.message_limit.min(MESSAGE)
}

/// An area, or what is missing for it.
type Opened = Result<Arc<Area>, String>;

/// See the file's head. An area that cannot be opened stays so: what it lacks is set up before a process starts.
#[derive(Default)]
pub struct Areas {
    /// By the NIC's name and the GPU's number.
    open: Mutex<HashMap<(String, usize), Opened>>,
    /// The devices of the table for device memory, by their numbers in the software plugin's.
    pub usable: Mutex<Vec<usize>>,
}

impl Areas {
    /// The area of a NIC and the current GPU.
    ///
    /// # Errors
    /// What is missing.
    pub fn of(&self, nic: &Interface, device: Option<&dyn DeviceMemory>, config: &Config) -> Result<Arc<Area>, String> {
        let name = nic.name.to_string_lossy().into_owned();
        let Some(device) = device else { return Err("there is no GPU".to_owned()) };
        let gpu = device.current().map_err(|e| format!("no GPU is current: {e}"))?;
        let mut all = self.open.lock();
        if let Some(known) = all.get(&(name.clone(), gpu)) {
            return known.clone();
        }
        let opened = open(nic, &name, device, config).map(Arc::new).map_err(|why| format!("{name}: {why}"));
        match &opened {
            Ok(area) => logger::info(&format!("device memory TCP (experimental): {}", area.describe())),
            Err(why) => logger::info(&format!("no device memory TCP on {why}")),
        }
        all.insert((name, gpu), opened.clone());
        opened
    }
}

fn open(nic: &Interface, name: &str, device: &dyn DeviceMemory, config: &Config) -> Result<Area, String> {
    if let IpAddr::V6(address) = nic.address {
        return Err(format!("its address is {address}; steering needs IPv4"));
    }
    let nic = Nic::named(name).map_err(|e| e.to_string())?;
    Area::open(device, nic, host(config)?, config.devmem_bytes, limit(config))
}

/// The agent, where there is one; otherwise this process does it itself, and the kernel says whether it may.
fn host(config: &Config) -> Result<Box<dyn Host>, String> {
    match agent(config) {
        None => Ok(Box::new(Own)),
        Some(path) => match Asked::connect(&path) {
            Ok(asked) => Ok(Box::new(asked)),
            Err(e) => Err(format!("the agent at {}: {e}", path.display())),
        },
    }
}

/// The agent's socket, if a setting names it or it is in its usual place.
pub fn agent(config: &Config) -> Option<PathBuf> {
    let usual = || Some(PathBuf::from(SOCKET)).filter(|path| path.exists());
    config.devmem_agent.as_ref().map(PathBuf::from).or_else(usual)
}
