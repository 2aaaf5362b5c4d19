//! The engine: the life of a request. `connection` is what an application holds, `proto` the protocol without
//! sockets and clocks, `progress` drives it, `registry` and `notify` are the engine-wide tables. `listener`, `setups`, `outgoing` and what they use bring connections up.

mod accepts;
mod attempt;
mod bell;
mod build;
mod connection;
mod connections;
mod dial;
mod driver;
mod ending;
mod fabric;
mod fifo;
mod gpus;
mod home;
mod limits;
mod link;
mod listener;
mod notify;
mod outgoing;
mod progress;
mod proto;
mod registry;
mod request;
mod setup;
mod setups;
mod site;
mod spare;
mod transfer;

pub use connection::Connection;
pub use fifo::FifoItem;
pub use notify::{next_notification_of_process, Notification};
pub use transfer::{Direction, LocalSegment, TransferState};

use crate::config::Config;
use crate::net::plugin::Plugin;
use crate::net::topology;
use crate::status::{bail, err, Result};
use crate::types::RemoteAccess;
use accepts::Accepts;
use parking_lot::Mutex;
use site::{Gate, Identity, Plugins, Site};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A network interface that a plugin offers.
#[derive(Clone, Debug)]
pub struct NicInfo {
    /// Plugin that offers it.
    pub plugin: String,
    /// Its name.
    pub name: String,
    /// Directory of its PCI device under /sys.
    pub pci_path: Option<String>,
    /// Mbit/s.
    pub speed_mbps: i32,
    /// NUMA node, when known.
    pub numa_node: Option<i32>,
    /// Or of 1 (host), 2 (CUDA), 4 (DMA-BUF).
    pub ptr_support: i32,
}

/// An engine. All methods may be called from any thread. Dropping it shuts it down. In a child of fork an engine of the parent does
/// nothing: what gives a result gives an error, and dropping it leaves the parent's alone.
pub struct Engine {
    metadata: String,
    parts: crate::fork::Local<Parts>,
}

/// What an engine is made of.
struct Parts {
    site: Arc<Site>,
    accepts: Arc<Accepts<Connection>>,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    setup: Option<JoinHandle<()>>,
    progress: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine {}", self.metadata)
    }
}

impl Engine {
    /// Creates an engine: loads the plugins, opens the listening port, starts the threads.
    ///
    /// # Errors
    /// `PluginLoad`, `Plugin`, `System` (port taken), `InvalidArgument` (configuration), `Resource`.
    pub fn new(config: Config) -> Result<Arc<Engine>> {
        crate::logging::init();
        let gpus = gpus::Gpus::new(config.emulate_device);
        let device = Plugin::choose(&config, &|| gpus.own())?;
        if device.devices.is_empty() {
            bail!(Plugin, "plugin {} found no network device", device.name);
        }
        let host = if device.traits.host_memory { None } else { Some(Plugin::soft()?) };
        let plugins = Plugins { device, host };
        plugins.can_protect(config.protect)?;
        let ports = listener::open(config.bind, config.socket_ifname.as_deref(), config.port)?;
        let metadata = listener::metadata(ports.address, &gpus.name());
        announce(&metadata, &plugins, &gpus);
        let limits = limits::Limits::of_process();
        let home = Arc::new(home::Home::new(bell::Bell::new()?, plugins.device.traits.doorbell, config.close_timeout));
        let accepts = Arc::new(Accepts::new(limits.waiting));
        let site = Arc::new(Site {
            identity: Identity::new(&config)?,
            plugins,
            gpus,
            limits,
            allow: config.allow.clone(),
            outgoing: Gate::new(limits.outgoing),
            ending: ending::Ending::new()?,
            notifications: notify::Queue::new(),
            home: home.clone(),
            config,
        });
        let spin = site.config.spin;
        let parts = Parts { site: site.clone(), accepts: accepts.clone(), threads: Mutex::default() };
        let engine = Engine { metadata, parts: crate::fork::Local::new(parts) };
        let mut threads = engine.parts.threads.lock();
        threads.progress = Some(limits::spawn("uccl-progress", move || progress::run(&home, spin))?);
        threads.setup = Some(setups::start(site, accepts, ports.sockets)?);
        drop(threads);
        Ok(Arc::new(engine))
    }

    /// "ip:port?gpu", for peers.
    pub fn metadata(&self) -> String {
        self.metadata.clone()
    }

    /// Name of the plugin that carries device memory.
    pub fn plugin_name(&self) -> &str {
        &self.parts.site.plugins.device.name
    }

    /// The plugin that carries device memory.
    pub fn plugin(&self) -> &Plugin {
        &self.parts.site.plugins.device
    }

    /// Interfaces that the plugins offer.
    pub fn nics(&self) -> Vec<NicInfo> {
        let describe = |plugin: &Arc<Plugin>| {
            let name = plugin.name.clone();
            plugin.devices.clone().into_iter().map(move |d| NicInfo {
                plugin: name.clone(),
                numa_node: topology::numa_node(d.pci_path.as_deref()),
                name: d.name,
                pci_path: d.pci_path,
                speed_mbps: d.speed_mbps,
                ptr_support: d.ptr_support,
            })
        };
        self.parts.site.plugins.all().flat_map(describe).collect()
    }

    /// Connects to a peer engine; blocks until all channels are up.
    ///
    /// # Errors
    /// `Unreachable`, `TimedOut`, `Auth`, `Protocol`, `Unsupported` (other plugin), `Plugin`.
    pub fn connect(&self, ip: &str, remote_gpu: &str, port: u16) -> Result<Arc<Connection>> {
        self.alive()?;
        outgoing::connect(&self.parts.site, ip, remote_gpu, port)
    }

    /// Takes the next incoming connection; blocks.
    ///
    /// # Errors
    /// `Canceled` after [`Engine::stop_accept`].
    pub fn accept(&self) -> Result<Arc<Connection>> {
        self.parts.check("engine")?;
        self.parts.accepts.take()
    }

    /// Wakes blocked accepts; they and later ones end.
    pub fn stop_accept(&self) {
        if self.parts.is_here() {
            self.parts.accepts.stop();
        }
    }

    /// Registers memory; gives the region's id.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty or wrapping range, `Gpu`, `System`.
    pub fn register(&self, addr: usize, len: usize) -> Result<u64> {
        self.register_with(addr, len, RemoteAccess::ALL)
    }

    /// Registers memory that peers may use only so far. Its owner may use all of it, also as the target of a receive.
    ///
    /// # Errors
    /// As [`Engine::register`].
    pub fn register_with(&self, addr: usize, len: usize, access: RemoteAccess) -> Result<u64> {
        if addr == 0 || len == 0 || addr.checked_add(len).is_none() {
            bail!(InvalidArgument, "cannot register {len} bytes at {addr:#x}");
        }
        self.alive()?;
        let place = self.parts.site.gpus.place_of(addr as u64)?;
        self.parts.site.home.registry.add(addr as u64, len as u64, place, access)
    }

    /// Ends a registration. Waits for transfers that use it; what has not ended by the close deadline is failed with its connection.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn deregister(&self, mr: u64) -> Result<()> {
        self.parts.check("engine")?;
        let retired = self.parts.site.home.registry.retire(mr)?;
        let deadline = Instant::now() + self.parts.site.config.close_timeout;
        let mut pause = Duration::from_micros(20);
        while retired.in_use() {
            if Instant::now() >= deadline {
                // Closing the channels is the only way to be sure that nothing touches the memory any more.
                for connection in self.parts.site.home.connections.all() {
                    connection.fail_if_using(mr, err!(Canceled, "region {mr} was deregistered while transfers used it"));
                }
                break;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        for connection in self.parts.site.home.connections.all() {
            connection.forget_region(retired.id());
        }
        Ok(())
    }

    /// A FIFO item for a range of a region.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub fn fifo_item(&self, mr: u64, addr: usize, len: usize) -> Result<FifoItem> {
        self.parts.check("engine")?;
        let region = self.parts.site.home.registry.local(mr)?;
        region.check(addr as u64, len as u64)?;
        let access =
            fifo::Access { region: mr, token: region.token, engine: self.parts.site.identity.engine(), place: region.place };
        Ok(FifoItem::new(addr as u64, len as u64, &access))
    }

    /// Whether some region holds the address.
    pub fn is_registered(&self, addr: usize) -> bool {
        self.parts.is_here() && self.parts.site.home.registry.holds_address(addr as u64)
    }

    /// Takes this engine's oldest notification.
    pub fn next_notification(&self) -> Option<Notification> {
        if !self.parts.is_here() {
            return None;
        }
        self.parts.site.notifications.pop().or_else(|| {
            self.drive();
            self.parts.site.notifications.pop()
        })
    }

    /// Drives what has something to read: whoever asks for notifications and finds none is about to ask again.
    pub(crate) fn drive(&self) {
        if !self.parts.is_here() {
            return;
        }
        self.parts.site.home.drive_ready();
    }

    fn alive(&self) -> Result<()> {
        self.parts.check("engine")?;
        if self.parts.site.ending.begun() {
            bail!(Canceled, "the engine is shut down");
        }
        Ok(())
    }

    /// Shuts the engine down: see uccl_engine_destroy. Later calls do nothing.
    pub fn shutdown(&self) {
        if !self.parts.is_here() {
            return;
        }
        let Parts { site, accepts, threads } = &*self.parts;
        accepts.stop();
        if site.ending.begin() {
            return;
        }
        // First nothing new comes: connects and set-ups under way end.
        site.outgoing.wake();
        site.home.connections.close();
        let mut threads = std::mem::take(&mut *threads.lock());
        join(threads.setup.take());
        // Then all say goodbye, and share one deadline.
        let waiting = accepts.drain();
        let all = site.home.connections.all();
        for connection in &all {
            connection.say_goodbye();
        }
        let deadline = Instant::now() + connection::CLOSING.min(site.config.close_timeout);
        for connection in &all {
            connection.finish_close(deadline);
        }
        drop(waiting);
        site.home.end();
        join(threads.progress.take());
        let lost = site.notifications.len();
        if lost > 0 {
            log::warn!("engine {}: {lost} notifications were never taken", self.metadata);
        }
    }
}

fn announce(metadata: &str, plugins: &Plugins, gpus: &gpus::Gpus) {
    let plugin = &plugins.device;
    let nics: Vec<String> = plugin.devices.iter().map(|d| format!("{} ({} Mbit/s)", d.name, d.speed_mbps)).collect();
    let origin = plugin.path.as_ref().map_or("built in".to_owned(), |p| p.display().to_string());
    log::info!("engine {metadata}: plugin {} ({origin}), NICs {}, GPU {}", plugin.name, nics.join(", "), gpus.name());
}

fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread {
        let _ = thread.join();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}
