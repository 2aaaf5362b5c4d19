//! What every set-up of an engine shares: who the engine is, its plugins and GPUs, its limits, and where finished connections go.

use super::ending::Ending;
use super::gpus::Gpus;
use super::home::Home;
use super::limits::Limits;
use super::link::ClearLink;
use super::notify::Queue;
use crate::addresses::AllowList;
use crate::config::Config;
use crate::net::plugin::Plugin;
use crate::status::{bail, Result};
use crate::wire::handshake_v1::Hello;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::Instant;

/// Who the engine is to its peers.
pub(crate) struct Identity {
    pub engine: [u8; 16],
    key: Option<Vec<u8>>,
}

impl Identity {
    pub(crate) fn new(config: &Config) -> Result<Identity> {
        let mut engine = [0; 16];
        if let Err(e) = getrandom::fill(&mut engine) {
            bail!(System, "random bytes for the engine id: {e}");
        }
        Ok(Identity { engine, key: config.auth_key()? })
    }
}

/// The plugins of an engine.
pub(crate) struct Plugins {
    /// Carries device memory; the software plugin carries host memory too.
    pub device: Arc<Plugin>,
    /// Carries host memory when `device` does not.
    pub host: Option<Arc<Plugin>>,
}

impl Plugins {
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Plugin>> {
        std::iter::once(&self.device).chain(&self.host)
    }
}

pub(crate) struct Site {
    pub config: Config,
    pub identity: Identity,
    pub plugins: Plugins,
    pub gpus: Gpus,
    pub limits: Limits,
    pub allow: AllowList,
    pub outgoing: Gate,
    pub ending: Ending,
    pub notifications: Arc<Queue>,
    pub home: Arc<Home>,
}

impl Site {
    /// Channels that this side asks for: as configured, else as many as help. A channel has an I/O thread's worth of work, so cores
    /// bound the number: all of few, half of many; every NIC gets at least one.
    fn channels(&self) -> usize {
        let nics = self.plugins.device.devices.len().max(1);
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        self.config.num_channels.unwrap_or_else(|| cores.clamp(2, 8).max((cores / 2).min(16)).max(nics)).min(64)
    }

    /// This side's part of the wire for a new set-up. `wanted_gpu`: of a connecting side.
    pub(crate) fn link(&self, wanted_gpu: Option<&str>) -> Result<ClearLink> {
        Ok(ClearLink::new(self.hello(wanted_gpu.unwrap_or(""))?, self.identity.key.clone(), wanted_gpu.is_some()))
    }

    fn hello(&self, wanted_gpu: &str) -> Result<Hello> {
        let mut nonce = [0; 32];
        if let Err(e) = getrandom::fill(&mut nonce) {
            bail!(System, "random bytes for the handshake: {e}");
        }
        Ok(Hello {
            channels: self.channels() as u16,
            chunk_bytes: self.config.chunk_bytes as u32,
            gpu_index: self.gpus.index(),
            authenticated: self.identity.key.is_some(),
            engine: self.identity.engine,
            nonce,
            plugin: self.plugins.device.wire_name().to_owned(),
            gpu: self.gpus.name(),
            wanted_gpu: wanted_gpu.to_owned(),
        })
    }

    /// What both sides agreed on: channels of each plugin, and bytes of a chunk.
    pub(crate) fn agreed(&self, theirs: &Hello) -> (usize, usize) {
        let channels = self.channels().min(usize::from(theirs.channels));
        (channels, self.config.chunk_bytes.min(theirs.chunk_bytes as usize))
    }

    /// Descriptors that a set-up with so many channels opens: two directions and a listening socket each.
    pub(crate) fn cost(&self, channels: usize) -> usize {
        self.plugins.all().count() * channels * 3
    }
}

/// Lets a limited number of set-ups through at once; the others wait for their turn.
pub(crate) struct Gate {
    free: Mutex<usize>,
    freed: Condvar,
}

/// A turn; dropping it lets the next one through.
pub(crate) struct Turn<'a>(&'a Gate);

impl Gate {
    pub(crate) fn new(limit: usize) -> Gate {
        Gate { free: Mutex::new(limit), freed: Condvar::new() }
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// `TimedOut`, or `Canceled` when the engine ends.
    pub(crate) fn enter(&self, deadline: Instant, ending: &Ending) -> Result<Turn<'_>> {
        let mut free = self.free.lock();
        while *free == 0 {
            ending.check()?;
            if self.freed.wait_until(&mut free, deadline).timed_out() && *free == 0 {
                bail!(Resource, "too many connects of this engine are under way; none of them ended in time");
            }
        }
        ending.check()?;
        *free -= 1;
        Ok(Turn(self))
    }

    /// Wakes all that wait, to see that the engine ends.
    pub(crate) fn wake(&self) {
        let _held = self.free.lock();
        self.freed.notify_all();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.free.lock() += 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::time::Duration;

    #[test]
    fn a_gate_lets_through_as_many_as_it_should() {
        let (gate, ending) = (Gate::new(2), Ending::new().unwrap());
        let soon = || Instant::now() + Duration::from_millis(20);
        let first = gate.enter(soon(), &ending).unwrap();
        let _second = gate.enter(soon(), &ending).unwrap();
        assert_eq!(gate.enter(soon(), &ending).err().unwrap().kind(), ErrorKind::Resource);
        drop(first);
        let _third = gate.enter(soon(), &ending).unwrap();
        std::thread::scope(|s| {
            let waits = s.spawn(|| gate.enter(Instant::now() + Duration::from_secs(60), &ending).err().unwrap().kind());
            ending.begin();
            gate.wake();
            assert_eq!(waits.join().unwrap(), ErrorKind::Canceled);
        });
    }
}
