//! The engine: connections and what they share. Knows nothing about C.
//!
//! - `connection`: the application's view of a connection: transfers, polling, driving, closing. `request` checks what an
//!   application starts, `list` prepares it for later, `fifo` gives a peer access. The protocol itself is `crate::proto`.
//! - `progress`: who drives the connections, sleeping and waking, and the table of an engine's connections.
//! - `setup`: sets up connections, incoming and outgoing.
//! - `gpus` and `limits`: the GPUs and the budgets of an engine.

#[doc(hidden)]
pub mod attack;
mod connection;
pub(crate) mod fifo;
mod gpus;
mod limits;
mod list;
mod progress;
pub(crate) mod request;
mod setup;
pub(crate) mod transfer;

pub use crate::notify::{next_notification_of_process, Notification};
pub use connection::{Connection, TransferPath};
pub use fifo::FifoItem;
pub use list::List;
pub use transfer::{Direction, LocalSegment, TransferState};

use crate::budget;
use crate::config::{Config, DeviceMemoryTcp};
use crate::net::plugin::Plugin;
use crate::net::topology;
use crate::notify;
use crate::stats::{export, EngineStats};
use crate::status::{bail, err, Result};
use crate::types::RemoteAccess;
use process::Mutex;
use progress::context::DriveContext;
use progress::{doorbell, heartbeat, thread};
use setup::accept_queue::Accepts;
use setup::context::{Gate, Identity, Plugins, SetupContext};
use setup::{acceptor, build, connect, listener, quota, shutdown, warmup};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What peers of an engine with these settings may take in this process: name, value, and what it counts.
pub fn budgets(config: &Config) -> Vec<(&'static str, usize, &'static str)> {
    limits::Limits::of_process(&config.budgets).list()
}

/// How long a deregistration waits for a device that still uses a region although its connections are closed.
const DEVICE_GRACE: Duration = Duration::from_secs(1);
/// The minimum time that a shutdown waits for each connection whose lock is held.
const TURN: Duration = Duration::from_millis(10);

/// Exports memory of the current GPU to NICs as device memory TCP does, and has the GPU write and read it. Binds no queue.
///
/// # Errors
/// `Unsupported`: what is missing, in the driver's words where it has some, or what came out wrong.
pub fn try_device_memory_export(config: &Config) -> Result<()> {
    let gpus = gpus::Gpus::new(config.emulate_device.then_some(config.emulate_devices));
    crate::net::within(&gpus.own()?, || soft_plugin::try_device_memory_export().map_err(|why| err!(Unsupported, "{why}")))
}

/// Device memory TCP in place of the software plugin, if it is asked for and the host can; the software plugin stays beside it.
///
/// # Errors
/// `Unsupported` where it must be there and cannot: why.
fn with_device_memory(
    config: &Config,
    gpus: &gpus::Gpus,
    device: Arc<Plugin>,
    why_soft: Option<String>,
) -> Result<(Arc<Plugin>, Option<String>)> {
    if config.devmem == DeviceMemoryTcp::Off || !device.traits.host_memory {
        return Ok((device, why_soft));
    }
    match Plugin::device_memory(&|| gpus.own()) {
        Ok(plugin) => Ok((plugin, None)),
        Err(e) if config.devmem == DeviceMemoryTcp::Require => bail!(Unsupported, "UCCL_TCPX_DEVMEM=require: {e}"),
        Err(e) => {
            log::info!("no device memory TCP, ordinary TCP carries GPU memory: {e}");
            let why = std::iter::once(format!("no device memory TCP: {e}")).chain(why_soft);
            Ok((device, Some(why.collect::<Vec<_>>().join("; "))))
        }
    }
}

/// A network interface that a plugin offers.
#[derive(Clone, Debug)]
pub struct NicInfo {
    /// The plugin that offers it.
    pub plugin: String,
    /// Its name.
    pub name: String,
    /// Directory of its PCI device under /sys.
    pub pci_path: Option<String>,
    /// Speed in Mbit/s.
    pub speed_mbps: i32,
    /// NUMA node, when known.
    pub numa_node: Option<i32>,
    /// Bitmask of 1 (host), 2 (CUDA), 4 (DMA-BUF).
    pub ptr_support: i32,
}

/// An engine. All methods may be called from any thread. Dropping it shuts it down. In a forked child an engine of the parent
/// does nothing: its methods return errors, and dropping it leaves the parent's engine alone.
pub struct Engine {
    /// Its address and GPU.
    name: String,
    metadata: String,
    parts: process::ProcessOwned<Parts>,
}

/// The parts of an engine.
struct Parts {
    context: Arc<SetupContext>,
    accepts: Arc<Accepts<Connection>>,
    threads: Mutex<Threads>,
    /// Serves the statistics while the engine lives.
    _export: Option<Arc<export::Exporter>>,
}

#[derive(Default)]
struct Threads {
    setup: Option<JoinHandle<()>>,
    progress: Option<JoinHandle<()>>,
    heartbeat: Option<JoinHandle<()>>,
    warmup: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine {}", self.name)
    }
}

impl Engine {
    /// Creates an engine: loads the plugins, opens the listening port, starts the threads.
    ///
    /// # Errors
    /// `PluginLoad`, `Plugin`, `System` (port taken), `InvalidArgument` (configuration), `Resource`.
    pub fn new(config: Config) -> Result<Arc<Engine>> {
        crate::logging::init(crate::config::log_level());
        let gpus = gpus::Gpus::new(config.emulate_device.then_some(config.emulate_devices));
        let (device, why_soft) = Plugin::choose(&config, &|| gpus.own())?;
        let (device, why_soft) = with_device_memory(&config, &gpus, device, why_soft)?;
        if device.devices.is_empty() {
            bail!(Plugin, "plugin {} found no network device{}", device.name, chosen_nics());
        }
        let host = if device.traits.host_memory { None } else { Some(Plugin::soft()?) };
        let plugins = Plugins { device, host, why_soft };
        plugins.can_protect(config.protect)?;
        let ports = listener::open(config.bind, config.socket_ifname.as_deref(), config.port)?;
        let (name, metadata) = (listener::name(ports.address, &gpus.name()), listener::metadata(&ports, &gpus.name()));
        announce(&name, &plugins, &gpus);
        if let Err(unmet) = plugins.forecast(&config) {
            log::warn!("UCCL_TCPX_REQUIRE={}: {unmet}; connections fail until that changes", config.require);
        }
        let limits = limits::Limits::of_process(&config.budgets);
        let (bell, doorbells) = (doorbell::Bell::new()?, plugins.device.traits.doorbell);
        let table = Arc::new(connection::ConnectionTable::new(DriveContext::new(
            bell,
            doorbells,
            config.close_timeout,
            limits.log_lines,
        )));
        let accepts = Arc::new(Accepts::new(limits.waiting, table.context.dead.clone()));
        let context = Arc::new(SetupContext {
            identity: Identity::new(&config)?,
            plugins,
            gpus,
            limits,
            allow: config.allow.clone(),
            addresses: ports.addresses,
            outgoing: Gate::new(limits.outgoing),
            cores: std::thread::available_parallelism().map_or(2, usize::from),
            shutdown: shutdown::Shutdown::new()?,
            notifications: notify::Queue::new(limits.notif_bytes, limits.notif_bytes_of_one, &table.context.events),
            pool: budget::Pool::new(limits.peer_bytes, limits.peer_bytes_of_one, limits.transfers),
            quota: quota::ConnectionQuota::new(limits.connections, limits.of_address),
            table: table.clone(),
            simulated_delay_ms: Default::default(),
            config,
        });
        let spin = context.config.spin;
        let _export = offer(&context, &name);
        let parts = Parts { context: context.clone(), accepts: accepts.clone(), threads: Mutex::default(), _export };
        let engine = Engine { name, metadata, parts: process::ProcessOwned::new(parts) };
        let mut threads = engine.parts.threads.lock();
        threads.progress = Some(limits::spawn("uccl-progress", move || thread::run(&table, spin))?);
        let watched = context.clone();
        threads.heartbeat = Some(limits::spawn("uccl-heartbeat", move || heartbeat::run(&watched))?);
        let (fresh, ids) = std::sync::mpsc::sync_channel(warmup::WAITING);
        let prepared = context.clone();
        threads.warmup = Some(limits::spawn("uccl-warmup", move || warmup::run(&prepared, &ids))?);
        threads.setup = Some(acceptor::start(context, accepts, ports.sockets, fresh)?);
        drop(threads);
        Ok(Arc::new(engine))
    }

    /// "ip:port?gpu,ip,ip", for peers: its name, and the other addresses where they find it.
    pub fn metadata(&self) -> String {
        self.metadata.clone()
    }

    /// Name of the plugin that carries GPU memory.
    pub fn plugin_name(&self) -> &str {
        &self.parts.context.plugins.device.name
    }

    /// The plugin that carries GPU memory.
    pub fn plugin(&self) -> &Plugin {
        &self.parts.context.plugins.device
    }

    /// What peers may take: name, value, and what it counts.
    pub fn budgets(&self) -> Vec<(&'static str, usize, &'static str)> {
        self.parts.context.limits.list()
    }

    /// Statistics of the engine and its connections.
    ///
    /// # Errors
    /// In a forked child.
    pub fn stats(&self) -> Result<EngineStats> {
        self.parts.check("engine")?;
        Ok(stats(&self.parts.context, &self.name))
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
        self.parts.context.plugins.all().flat_map(describe).collect()
    }

    /// Connects to a peer engine; blocks until all channels are up. `remote_gpu`: what its metadata has behind the question mark.
    ///
    /// # Errors
    /// `Unreachable`, `TimedOut`, `Auth`, `Protocol`, `Unsupported` (other plugin), `Plugin`.
    pub fn connect(&self, ip: &str, remote_gpu: &str, port: u16) -> Result<Arc<Connection>> {
        self.alive()?;
        connect::connect(&self.parts.context, ip, remote_gpu, port)
    }

    /// Takes the next incoming connection; blocks.
    ///
    /// # Errors
    /// `Canceled` after [`Engine::stop_accept`].
    pub fn accept(&self) -> Result<Arc<Connection>> {
        let taken = self.accept_until(None)?;
        taken.ok_or_else(|| err!(Internal, "an accept without a deadline ended without a connection"))
    }

    /// Takes the next incoming connection. Blocks until the deadline, if there is one; `None`: none has come.
    ///
    /// # Errors
    /// `Canceled` after [`Engine::stop_accept`].
    pub fn accept_until(&self, deadline: Option<Instant>) -> Result<Option<Arc<Connection>>> {
        self.parts.check("engine")?;
        self.parts.accepts.take(deadline)
    }

    /// Wakes blocked accepts; they and later ones fail.
    pub fn stop_accept(&self) {
        if self.parts.is_here() {
            self.parts.accepts.stop();
            self.parts.context.table.context.events.happened();
        }
    }

    /// A descriptor, for the caller to close, that becomes readable when something has happened: a notification has come, a transfer
    /// has ended, a connection has come or ended.
    ///
    /// # Errors
    /// `Resource` without a free descriptor.
    pub fn event_descriptor(&self) -> Result<OwnedFd> {
        self.alive()?;
        self.parts.context.table.context.events.descriptor().map_err(|e| limits::system("eventfd", &e))
    }

    /// Registers memory; returns the region's id.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty or wrapping range, `Gpu`, `System`.
    pub fn register(&self, addr: usize, len: usize) -> Result<u64> {
        self.register_with(addr, len, RemoteAccess::ALL)
    }

    /// Registers memory with limited access for peers. The owner may use all of it, also as the destination of a receive.
    ///
    /// # Errors
    /// As for [`Engine::register`].
    pub fn register_with(&self, addr: usize, len: usize, access: RemoteAccess) -> Result<u64> {
        if addr == 0 || len == 0 || addr.checked_add(len).is_none() {
            bail!(InvalidArgument, "cannot register {len} bytes at {addr:#x}");
        }
        self.alive()?;
        let (place, first) = self.parts.context.gpus.place_of(addr as u64)?;
        if first {
            // Existing connections have not prepared for this GPU.
            build::ready(&self.parts.context, place);
        }
        let table = &self.parts.context.table;
        let id = table.context.registry.add(addr as u64, len as u64, place, access)?;
        if place.is_device() {
            table.connections.all().iter().for_each(|connection| connection.offer_region(id));
        }
        Ok(id)
    }

    /// Simulates a CUDA driver that blocks the preparation of each new connection for `time`.
    #[doc(hidden)]
    pub fn simulate_kept_set_ups(&self, time: Duration) {
        self.parts.context.simulated_delay_ms.store(time.as_millis() as u64, std::sync::atomic::Ordering::Relaxed);
    }

    /// Deregisters a region. Waits for transfers that use it; after the close deadline, connections with such transfers fail.
    ///
    /// # Errors
    /// `NotFound`; `Resource` where even that does not end its use: the memory must stay mapped.
    pub fn deregister(&self, mr: u64) -> Result<()> {
        self.parts.check("engine")?;
        let table = &self.parts.context.table;
        let retired = table.context.registry.retire(mr)?;
        let deadline = Instant::now() + self.parts.context.config.close_timeout;
        let mut pause = Duration::from_micros(20);
        // After the deadline: ids of connections not checked yet, because another thread holds them; and when all were checked.
        let (mut unasked, mut asked) = (None, None);
        while retired.in_use() {
            let now = Instant::now();
            if asked.is_some_and(|at| now >= at + DEVICE_GRACE) {
                bail!(
                    Resource,
                    "region {mr} is still in use after its connections were closed: a device does not end its copies, or a plugin has not closed a channel"
                );
            }
            if now >= deadline {
                // Closing the channels is the only way to be sure that nothing touches the memory any more. A request that
                // another thread is about to start may appear after the first check.
                let all = table.connections.all();
                let left = unasked.get_or_insert_with(|| all.iter().map(|connection| connection.id()).collect::<Vec<_>>());
                let reason = || err!(Canceled, "region {mr} was deregistered while transfers used it");
                // Queue for the locks once the free connections have been checked.
                let queue = now >= deadline + DEVICE_GRACE;
                let held: Vec<u64> = all.iter().filter(|c| !c.fail_if_using(mr, queue, reason())).map(|c| c.id()).collect();
                left.retain(|id| held.contains(id));
                if left.is_empty() {
                    asked.get_or_insert_with(Instant::now);
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(if now >= deadline { 10 } else { 1 }));
        }
        if retired.is_registered() {
            for connection in table.connections.all() {
                connection.forget_region(retired.id());
            }
        }
        Ok(())
    }

    /// A FIFO item for a range of a region.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub fn fifo_item(&self, mr: u64, addr: usize, len: usize) -> Result<FifoItem> {
        self.parts.check("engine")?;
        let region = self.parts.context.table.context.registry.local(mr)?;
        region.check(addr as u64, len as u64)?;
        let access =
            fifo::Access { region: mr, token: region.token, engine: self.parts.context.identity.engine(), place: region.place };
        Ok(FifoItem::new(addr as u64, len as u64, &access))
    }

    /// Whether the address lies in a registered region.
    pub fn is_registered(&self, addr: usize) -> bool {
        self.parts.is_here() && self.parts.context.table.context.registry.holds_address(addr as u64)
    }

    /// Takes this engine's oldest notification.
    pub fn next_notification(&self) -> Option<Notification> {
        if !self.parts.is_here() {
            return None;
        }
        self.parts.context.notifications.pop().or_else(|| {
            self.drive();
            self.parts.context.notifications.pop()
        })
    }

    /// Takes this engine's oldest notification. Blocks until the deadline, if there is one; `None`: none has come.
    ///
    /// # Errors
    /// `Canceled` when the engine is shut down.
    pub fn notification_until(&self, deadline: Option<Instant>) -> Result<Option<Notification>> {
        self.parts.check("engine")?;
        match self.next_notification() {
            None => self.parts.context.notifications.pop_until(deadline),
            found => Ok(found),
        }
    }

    /// Drives connections with something to read: an application that finds no notification is about to ask again.
    pub(crate) fn drive(&self) {
        if !self.parts.is_here() {
            return;
        }
        self.parts.context.table.drive_ready();
    }

    fn alive(&self) -> Result<()> {
        self.parts.check("engine")?;
        if self.parts.context.shutdown.begun() {
            bail!(Canceled, "the engine is shut down");
        }
        Ok(())
    }

    /// Shuts the engine down: see uccl_engine_destroy. Later calls do nothing.
    pub fn shutdown(&self) {
        if !self.parts.is_here() {
            return;
        }
        let Parts { context, accepts, threads, .. } = &*self.parts;
        accepts.stop();
        context.notifications.close();
        context.table.context.events.happened();
        if context.shutdown.begin() {
            return;
        }
        // First, nothing new starts: connects and set-ups in progress end.
        context.outgoing.wake();
        context.table.connections.close();
        let mut threads = std::mem::take(&mut *threads.lock());
        join(threads.setup.take());
        join(threads.heartbeat.take());
        // Then all connections say goodbye and share one deadline.
        let waiting = accepts.drain();
        let time = connection::CLOSING.min(context.config.close_timeout);
        let until = Instant::now() + time;
        let says = |c: &Arc<Connection>| c.say_goodbye(until.max(Instant::now() + TURN));
        let (free, held): (Vec<_>, Vec<_>) = context.table.connections.all().into_iter().partition(says);
        let finish = |all: &[Arc<Connection>]| {
            let deadline = Instant::now() + time;
            all.iter().for_each(|connection| connection.finish_close(deadline));
        };
        finish(&free);
        // Connections held by other threads come last, with a deadline of their own, so that no other peer waits for them.
        let (late, held): (Vec<_>, Vec<_>) = held.into_iter().partition(|c| c.say_goodbye(Instant::now() + TURN));
        finish(&late);
        held.iter().for_each(|connection| connection.insist_on_goodbye());
        finish(&held);
        drop(waiting);
        join(threads.warmup.take());
        context.table.end();
        join(threads.progress.take());
        // The application may end the process now.
        context.plugins.all().for_each(|plugin| plugin.settle());
        let lost = context.notifications.len();
        if lost > 0 {
            log::warn!("engine {}: {lost} notifications were never taken", self.name);
        }
    }
}

/// Names the variable that chooses the data NICs, for an error text.
fn chosen_nics() -> String {
    let set = |name: &&str| std::env::var(name).is_ok_and(|value| !value.trim().is_empty());
    match ["NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"].into_iter().find(set) {
        Some(name) => {
            let value = std::env::var(name).unwrap_or_default();
            format!(": {name}={value} matches no usable interface{}", crate::net::topology::others())
        }
        None => String::new(),
    }
}

fn stats(context: &SetupContext, name: &str) -> EngineStats {
    let table = &context.table;
    let mut stats = EngineStats {
        metadata: name.to_owned(),
        plugin: context.plugins.device.name.clone(),
        uptime: table.context.age(),
        notifications_waiting: context.notifications.len() as u64,
        totals: table.context.counters.past(),
        ..EngineStats::default()
    };
    table.context.counters.fill(&mut stats);
    stats.connections = table.connections.all().iter().filter_map(|connection| connection.stats().ok()).collect();
    stats.connections.sort_by_key(|connection| connection.id);
    // Ended connections are in the totals already.
    stats.connections.iter().filter(|c| c.error.is_none()).for_each(|c| stats.totals += c.totals);
    stats
}

/// Exports the statistics as UCCL_TCPX_METRICS says. An engine works without them.
fn offer(context: &Arc<SetupContext>, name: &str) -> Option<Arc<export::Exporter>> {
    let target = context.config.metrics.as_ref()?;
    let (weak, name) = (Arc::downgrade(context), name.to_owned());
    let source = Box::new(move || weak.upgrade().map(|context| stats(&context, &name)));
    match export::offer(target, source) {
        Ok(exporter) => Some(exporter),
        Err(e) => {
            log::warn!("no statistics at UCCL_TCPX_METRICS={target}: {e}");
            None
        }
    }
}

fn announce(name: &str, plugins: &Plugins, gpus: &gpus::Gpus) {
    let plugin = &plugins.device;
    let nics: Vec<String> = plugin.devices.iter().map(|d| format!("{} ({})", d.name, d.speed())).collect();
    let origin = plugin.path.as_ref().map_or("built in".to_owned(), |p| p.display().to_string());
    log::info!("engine {name}: plugin {} ({origin}), NICs {}, GPU {}", plugin.name, nics.join(", "), gpus.name());
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
