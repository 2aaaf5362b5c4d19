//! What all set-ups of an engine share: its identity, plugins and GPUs, its limits, and the table of connections. Knows nothing
//! about a single set-up.

use super::control::SealedLink;
use super::quota::ConnectionQuota;
use super::shutdown::Shutdown;
use crate::addresses::AllowList;
use crate::budget::Pool;
use crate::config::Config;
use crate::engine::connection::ConnectionTable;
use crate::engine::gpus::Gpus;
use crate::engine::limits::Limits;
use crate::net::plugin::Plugin;
use crate::net::setup::{channel_count, nics_for};
use crate::notify::Queue;
use crate::require::{carrier, Carries};
use crate::status::{bail, Result};
use crate::types::Protect;
use crate::wire::handshake::{self, Handshake};
use crate::wire::hello::Hello;
use crate::wire::keys::KeyStore;
use process::{Condvar, Mutex};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// The engine's identity towards its peers.
pub(crate) struct Identity {
    own: Arc<handshake::Identity>,
    keys: KeyStore,
}

impl Identity {
    pub(crate) fn new(config: &Config) -> Result<Identity> {
        Ok(Identity { own: Arc::new(handshake::Identity::generate()?), keys: KeyStore::open(config.auth_key_file.as_deref())? })
    }

    /// The id of the engine instance.
    pub(crate) fn engine(&self) -> [u8; 16] {
        self.own.engine()
    }
}

/// The plugins of an engine.
pub(crate) struct Plugins {
    /// Carries GPU memory; the software plugin carries host memory too.
    pub device: Arc<Plugin>,
    /// Carries host memory when `device` does not.
    pub host: Option<Arc<Plugin>>,
    /// Why `device` is the software plugin, if it is.
    pub why_soft: Option<String>,
}

impl Plugins {
    /// Whether this level of protection is possible.
    ///
    /// # Errors
    /// `Unsupported`: the NIC writes into GPU memory, so nothing can be decrypted on the way.
    pub(crate) fn can_protect(&self, level: Protect) -> Result<()> {
        if self.device.traits.secured || level == Protect::Off {
            return Ok(());
        }
        let name = &self.device.name;
        if level == Protect::Encrypt {
            bail!(Unsupported, "UCCL_TCPX_PROTECT=encrypt: plugin {name} cannot encrypt; UCCL_TCPX_PLUGIN=soft can");
        }
        log::warn!(
            "UCCL_TCPX_PROTECT=integrity: GPU memory goes over plugin {name}, whose data cannot be checked; all other data is"
        );
        Ok(())
    }

    /// Whether a connection can ever meet what the engine requires.
    ///
    /// # Errors
    /// The term that cannot be met, and what is there in its place.
    pub(crate) fn forecast(&self, config: &Config) -> std::result::Result<(), String> {
        let channels = Carries {
            memory: "memory".to_owned(),
            carrier: carrier(&self.device.name).to_owned(),
            nics: self.device.devices.iter().map(|device| device.name.clone()).collect(),
            no_plugin: self.why_soft.iter().cloned().collect(),
            no_direct: config.disable_ipc.then(|| "UCCL_P2P_DISABLE_IPC is set".to_owned()),
            absent: Vec::new(),
        };
        config.require.forecast(&channels, !config.disable_ipc)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Plugin>> {
        std::iter::once(&self.device).chain(&self.host)
    }
}

pub(crate) struct SetupContext {
    pub config: Config,
    pub identity: Identity,
    pub plugins: Plugins,
    pub gpus: Gpus,
    pub limits: Limits,
    pub allow: AllowList,
    /// Where peers on other hosts reach this engine.
    pub addresses: Vec<SocketAddr>,
    pub outgoing: Gate,
    /// Cores of this process; read once, since it takes several files.
    pub cores: usize,
    pub shutdown: Shutdown,
    pub notifications: Arc<Queue>,
    pub pool: Arc<Pool>,
    pub quota: Arc<ConnectionQuota>,
    pub table: Arc<ConnectionTable>,
    /// Simulated delay of preparing a new connection, milliseconds.
    pub simulated_delay_ms: std::sync::atomic::AtomicU64,
}

impl SetupContext {
    /// Channels of each set that this engine asks for.
    fn channels(&self) -> usize {
        let plugin = &self.plugins.device;
        let nics = nics_for(plugin, &plugin.devices, self.gpus.pci_path(None).as_deref()).usable;
        channel_count(plugin, self.config.num_channels, nics.len().max(1), self.cores)
    }

    /// The handshake of a set-up that joins a connection.
    pub(crate) fn joining_link(&self) -> Result<SealedLink> {
        let hello = Hello { joins: true, ..self.hello("")? };
        Ok(SealedLink::new(Handshake::connecting(&self.identity.own, hello, self.identity.keys.current())?))
    }

    /// The handshake of a new set-up. `wanted_gpu`: the GPU that a connector asks for.
    pub(crate) fn link(&self, wanted_gpu: Option<&str>) -> Result<SealedLink> {
        let (own, keys) = (&self.identity.own, self.identity.keys.current());
        let hello = self.hello(wanted_gpu.unwrap_or(""))?;
        Ok(SealedLink::new(match wanted_gpu {
            Some(_) => Handshake::connecting(own, hello, keys)?,
            None => Handshake::listening(own, hello, keys)?,
        }))
    }

    /// Largest chunk that every plugin can carry as one message.
    fn chunk_bytes(&self) -> usize {
        self.plugins.all().fold(self.config.chunk_bytes, |chunk, plugin| chunk.min(plugin.max_message()))
    }

    fn hello(&self, wanted_gpu: &str) -> Result<Hello> {
        Ok(Hello {
            channels: self.channels() as u16,
            chunk_bytes: self.chunk_bytes() as u32,
            gpu_index: self.gpus.index(),
            peer_timeout_ms: Hello::peer_timeout_ms(self.config.peer_timeout),
            protect: self.config.protect,
            plugin: self.plugins.device.wire_name().to_owned(),
            gpu: self.gpus.name(),
            wanted_gpu: wanted_gpu.to_owned(),
            further_gpus: self.gpus.further(),
            joins: false,
        })
    }
}

/// Limits how many outgoing set-ups run at once; the others wait for their turn.
pub(crate) struct Gate {
    free: Mutex<usize>,
    freed: Condvar,
}

/// A turn; dropping it admits the next set-up.
pub(crate) struct Turn<'a>(&'a Gate);

impl Gate {
    pub(crate) fn new(limit: usize) -> Gate {
        Gate { free: Mutex::new(limit), freed: Condvar::new() }
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// `Resource` at the deadline, or `Canceled` when the engine is being destroyed.
    pub(crate) fn enter(&self, deadline: Instant, shutdown: &Shutdown) -> Result<Turn<'_>> {
        let mut free = self.free.lock();
        while *free == 0 {
            shutdown.check()?;
            if self.freed.wait_until(&mut free, deadline).timed_out() && *free == 0 {
                bail!(Resource, "too many connects of this engine are in progress; none of them ended in time");
            }
        }
        shutdown.check()?;
        *free -= 1;
        Ok(Turn(self))
    }

    /// Wakes all waiting threads when the engine is being destroyed.
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
    fn a_gate_admits_as_many_as_its_limit() {
        let (gate, shutdown) = (Gate::new(2), Shutdown::new().unwrap());
        let soon = || Instant::now() + Duration::from_millis(20);
        let first = gate.enter(soon(), &shutdown).unwrap();
        let _second = gate.enter(soon(), &shutdown).unwrap();
        assert_eq!(gate.enter(soon(), &shutdown).err().unwrap().kind(), ErrorKind::Resource);
        drop(first);
        let _third = gate.enter(soon(), &shutdown).unwrap();
        std::thread::scope(|s| {
            let waits = s.spawn(|| gate.enter(Instant::now() + Duration::from_secs(60), &shutdown).err().unwrap().kind());
            shutdown.begin();
            gate.wake();
            assert_eq!(waits.join().unwrap(), ErrorKind::Canceled);
        });
    }
}
