//! The engine: the life of a request. `connection` is what an application holds, `state` what happens on the wire, `setup` and
//! `listener` bring connections up, `progress` drives them, `registry` and `notify` are the engine-wide tables.

mod connection;
mod driver;
mod fifo;
mod listener;
mod notify;
mod progress;
mod registry;
mod setup;
mod shared;
mod spare;
mod state;
mod transfer;

pub use connection::Connection;
pub use fifo::FifoItem;
pub use notify::{next_notification_of_process, Notification};
pub use transfer::{Direction, LocalSegment, TransferState};

use crate::config::Config;
use crate::net::plugin::Plugin;
use crate::net::topology;
use crate::status::{bail, err, Error, Result};
use crate::types::RemoteAccess;
use parking_lot::Mutex;
use shared::Shared;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
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

/// An engine. All methods may be called from any thread. Dropping it shuts it down.
pub struct Engine {
    shared: Arc<Shared>,
    metadata: String,
    listener_wake: OwnedFd,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine {}", self.metadata)
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(body).map_err(|e| Error::system("thread", &e))
}

impl Engine {
    /// Creates an engine: loads the plugins, opens the listening port, starts the threads.
    ///
    /// # Errors
    /// `PluginLoad`, `Plugin`, `System` (port taken), `InvalidArgument` (configuration).
    pub fn new(config: Config) -> Result<Arc<Engine>> {
        crate::logging::init();
        let plugin = Plugin::choose(&config)?;
        if plugin.devices.is_empty() {
            bail!(Plugin, "plugin {} found no network device", plugin.name);
        }
        let host_plugin = if plugin.is_soft() { None } else { Some(Plugin::soft(&config)?) };
        let filter = config.socket_ifname.clone();
        let Some(interface) = topology::control_address(filter.as_deref()) else {
            bail!(InvalidArgument, "no interface with an IPv4 address matches {:?}", filter.unwrap_or_default())
        };
        let listener = listener::open(config.port)?;
        let port = listener.local_addr().map_err(|e| Error::system("listening socket", &e))?.port();
        let shared = Arc::new(Shared::new(config, plugin, host_plugin)?);
        let metadata = format!("{}:{port}?{}", interface.addr, shared.gpu_name());
        // SAFETY: a plain system call; the descriptor is checked and owned at once.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if wake < 0 {
            return Err(Error::system("eventfd", &std::io::Error::last_os_error()));
        }
        // SAFETY: a fresh descriptor.
        let listener_wake = unsafe { OwnedFd::from_raw_fd(wake) };
        let clone = listener_wake.try_clone().map_err(|e| Error::system("eventfd", &e))?;
        let nics: Vec<String> = shared.plugin.devices.iter().map(|d| format!("{} ({} Mbit/s)", d.name, d.speed_mbps)).collect();
        let origin = shared.plugin.path.as_ref().map_or("built in".to_owned(), |p| p.display().to_string());
        log::info!(
            "engine {metadata}: plugin {} ({origin}), NICs {}, GPU {}",
            shared.plugin.name,
            nics.join(", "),
            shared.gpu_name()
        );
        let engine = Engine { shared: shared.clone(), metadata, listener_wake, threads: Mutex::default() };
        let listening = shared.clone();
        engine.threads.lock().push(spawn("uccl-listen", move || {
            progress::block_signals();
            listener::run(&listening, &listener, &clone);
        })?);
        engine.threads.lock().push(spawn("uccl-progress", move || progress::run(&shared))?);
        Ok(Arc::new(engine))
    }

    /// "ip:port?gpu", for peers.
    pub fn metadata(&self) -> String {
        self.metadata.clone()
    }

    /// Name of the plugin that carries device memory.
    pub fn plugin_name(&self) -> &str {
        &self.shared.plugin.name
    }

    /// The plugin that carries device memory.
    pub fn plugin(&self) -> &Plugin {
        &self.shared.plugin
    }

    /// Interfaces that the plugins offer.
    pub fn nics(&self) -> Vec<NicInfo> {
        let plugins = std::iter::once(&self.shared.plugin).chain(&self.shared.host_plugin);
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
        plugins.flat_map(describe).collect()
    }

    /// Connects to a peer engine; blocks until all channels are up.
    ///
    /// # Errors
    /// `Unreachable`, `TimedOut`, `Auth`, `Protocol`, `Unsupported` (other plugin), `Plugin`.
    pub fn connect(&self, ip: &str, remote_gpu: &str, port: u16) -> Result<Arc<Connection>> {
        setup::connect(&self.shared, ip, remote_gpu, port)
    }

    /// Takes the next incoming connection; blocks.
    ///
    /// # Errors
    /// `Canceled` after [`Engine::stop_accept`].
    pub fn accept(&self) -> Result<Arc<Connection>> {
        let mut accepts = self.shared.accepts.lock();
        loop {
            if accepts.stopped {
                return Err(err!(Canceled, "accept was stopped"));
            }
            if let Some(connection) = accepts.ready.pop_front() {
                return Ok(connection);
            }
            self.shared.accept_ready.wait(&mut accepts);
        }
    }

    /// Wakes blocked accepts; they and later ones end.
    pub fn stop_accept(&self) {
        self.shared.accepts.lock().stopped = true;
        self.shared.accept_ready.notify_all();
    }

    /// Registers memory; gives the region's id.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty or wrapping range, `Gpu`, `System`.
    pub fn register(&self, addr: usize, len: usize) -> Result<u64> {
        if addr == 0 || len == 0 || addr.checked_add(len).is_none() {
            bail!(InvalidArgument, "cannot register {len} bytes at {addr:#x}");
        }
        self.alive()?;
        let place = self.shared.place_of(addr as u64)?;
        self.shared.registry.add(addr as u64, len as u64, place)
    }

    /// Registers memory that peers may use only so far.
    ///
    /// # Errors
    /// As [`Engine::register`]; `Unsupported` for a limit that cannot be kept.
    pub fn register_with(&self, addr: usize, len: usize, access: RemoteAccess) -> Result<u64> {
        if access != RemoteAccess::ALL {
            bail!(Unsupported, "regions that peers may only read, only write or not use at all");
        }
        self.register(addr, len)
    }

    /// Ends a registration. Waits for transfers that use it; what has not ended by the close deadline is failed with its connection.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn deregister(&self, mr: u64) -> Result<()> {
        let retired = self.shared.registry.retire(mr)?;
        let deadline = Instant::now() + self.shared.config.close_timeout;
        let mut pause = Duration::from_micros(20);
        while retired.in_use() {
            if Instant::now() >= deadline {
                // Closing the channels is the only way to be sure that nothing touches the memory any more.
                for connection in self.shared.all() {
                    connection.fail_if_using(mr, err!(Canceled, "region {mr} was deregistered while transfers used it"));
                }
                break;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        for connection in self.shared.all() {
            connection.forget_region(retired.id());
        }
        Ok(())
    }

    /// A FIFO item for a range of a region.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub fn fifo_item(&self, mr: u64, addr: usize, len: usize) -> Result<FifoItem> {
        let region = self.shared.registry.local(mr)?;
        region.check(addr as u64, len as u64)?;
        let access = fifo::Access { region: mr, token: region.token, engine: self.shared.engine_id, place: region.place };
        Ok(FifoItem::new(addr as u64, len as u64, &access))
    }

    /// Whether some region holds the address.
    pub fn is_registered(&self, addr: usize) -> bool {
        self.shared.registry.holds_address(addr as u64)
    }

    /// Takes this engine's oldest notification.
    pub fn next_notification(&self) -> Option<Notification> {
        self.shared.notifications.pop().or_else(|| {
            self.drive();
            self.shared.notifications.pop()
        })
    }

    /// Drives all connections once: whoever asks for notifications and finds none is about to ask again.
    pub(crate) fn drive(&self) {
        for connection in self.shared.all() {
            connection.drive_for_application();
        }
    }

    fn alive(&self) -> Result<()> {
        if self.shared.closing.load(Ordering::Acquire) {
            bail!(Canceled, "the engine is shut down");
        }
        Ok(())
    }

    /// Shuts the engine down: see uccl_engine_destroy. Later calls do nothing.
    pub fn shutdown(&self) {
        // Connections that are up go first, orderly, while the threads still run.
        self.stop_accept();
        let waiting = std::mem::take(&mut self.shared.accepts.lock().ready);
        for connection in waiting {
            connection.close();
        }
        for connection in self.shared.all() {
            connection.close();
        }
        if self.shared.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.shared.abort_setups();
        self.shared.arm(true);
        self.shared.ring();
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes, a live eventfd.
        unsafe { libc::write(self.listener_wake.as_raw_fd(), one.as_ptr().cast(), 8) };
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
        let deadline = Instant::now() + self.shared.config.close_timeout;
        while self.shared.setups_running() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        // A set-up that ended between the two steps above.
        for connection in self.shared.all() {
            connection.close();
        }
        let lost = self.shared.notifications.len();
        if lost > 0 {
            log::warn!("engine {}: {lost} notifications were never taken", self.metadata);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}
