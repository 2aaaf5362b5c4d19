//! What the threads of an engine share: configuration, plugins, registry, the table of connections, the epoll set and the
//! doorbell of the progress thread.

use super::connection::Connection;
use super::notify::Queue;
use super::registry::Registry;
use crate::config::Config;
use crate::gpu::{Gpu, GpuName, MemoryKind};
use crate::net::comm::Doorbell;
use crate::net::plugin::Plugin;
use crate::status::{bail, Error, Result};
use crate::types::Place;
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Incoming connections that are up and wait for `accept`.
#[derive(Default)]
pub(crate) struct Accepts {
    pub ready: VecDeque<Arc<Connection>>,
    pub stopped: bool,
}

pub(crate) struct Shared {
    pub config: Config,
    pub engine_id: [u8; 16],
    /// Carries device memory; the software plugin carries host memory too.
    pub plugin: Arc<Plugin>,
    /// Carries host memory when `plugin` does not.
    pub host_plugin: Option<Arc<Plugin>>,
    pub auth_key: Option<Vec<u8>>,
    /// The engine's GPU, where there is one. Named, not touched.
    pub gpu: Option<GpuName>,
    /// GPUs of registered memory: their contexts stay until the engine's end.
    pub gpus: Mutex<HashMap<u8, Arc<Gpu>>>,
    pub registry: Arc<Registry>,
    pub notifications: Arc<Queue>,
    pub accepts: Mutex<Accepts>,
    pub accept_ready: Condvar,
    pub closing: AtomicBool,
    /// Threads compete for cores: nobody spins while another could work.
    pub few_cores: bool,
    /// The connection and transfer that was polled last, as one number.
    last_polled: AtomicU64,
    connections: Mutex<HashMap<u64, Weak<Connection>>>,
    next_connection: AtomicU64,
    /// Changes whenever the table of connections does.
    pub generation: AtomicU64,
    /// Sockets of handshakes under way, so that the engine's end can end them.
    setups: Mutex<HashMap<u64, TcpStream>>,
    next_setup: AtomicU64,
    epoll: OwnedFd,
    wake: OwnedFd,
    armed: AtomicU32,
    start: Instant,
}

/// Token of the wake eventfd in the epoll set; connections use their ids, from 1.
pub(crate) const WAKE: u64 = 0;
fn owned(fd: i32, what: &str) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::system(what, &std::io::Error::last_os_error()));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Shared {
    pub(crate) fn new(config: Config, plugin: Arc<Plugin>, host_plugin: Option<Arc<Plugin>>) -> Result<Shared> {
        let mut engine_id = [0; 16];
        if let Err(e) = getrandom::fill(&mut engine_id) {
            bail!(System, "random bytes for the engine id: {e}");
        }
        // SAFETY: plain system calls.
        let (epoll, wake) = unsafe {
            (
                owned(libc::epoll_create1(libc::EPOLL_CLOEXEC), "epoll_create1")?,
                owned(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK), "eventfd")?,
            )
        };
        let shared = Shared {
            auth_key: config.auth_key()?,
            gpu: if config.emulate_device { None } else { crate::gpu::current_name() },
            gpus: Mutex::default(),
            config,
            engine_id,
            plugin,
            host_plugin,
            registry: Arc::new(Registry::new()),
            notifications: Queue::new(),
            accepts: Mutex::default(),
            accept_ready: Condvar::new(),
            closing: AtomicBool::new(false),
            few_cores: std::thread::available_parallelism().map_or(2, usize::from) <= 2,
            last_polled: AtomicU64::new(0),
            connections: Mutex::default(),
            next_connection: AtomicU64::new(1),
            generation: AtomicU64::new(0),
            setups: Mutex::default(),
            next_setup: AtomicU64::new(1),
            epoll,
            wake,
            armed: AtomicU32::new(0),
            start: Instant::now(),
        };
        shared.control(libc::EPOLL_CTL_ADD, shared.wake.as_raw_fd(), WAKE, libc::EPOLLIN)?;
        Ok(shared)
    }

    /// PCI address of the engine's GPU for peers, "-1" without one.
    pub(crate) fn gpu_name(&self) -> String {
        self.gpu.as_ref().map_or("-1".to_owned(), |g| g.bdf.to_string())
    }

    /// Directory of the engine's GPU under /sys.
    pub(crate) fn gpu_pci_path(&self) -> Option<String> {
        let path = std::fs::canonicalize(format!("/sys/bus/pci/devices/{}", self.gpu.as_ref()?.bdf)).ok()?;
        Some(path.to_string_lossy().into_owned())
    }

    /// The GPU that a plugin's calls follow; none for the software plugin, which takes it from each device request.
    pub(crate) fn gpu_of(&self, plugin: &Plugin) -> Result<Option<Arc<Gpu>>> {
        match &self.gpu {
            Some(gpu) if !plugin.is_soft() => Ok(Some(Gpu::open(gpu.ordinal)?)),
            _ => Ok(None),
        }
    }

    /// Where the memory at `addr` lies. Retains the context of the GPU it lies on.
    pub(crate) fn place_of(&self, addr: u64) -> Result<Place> {
        if self.config.emulate_device {
            return Ok(Place::gpu(0));
        }
        // The kernel reads and writes pinned and managed memory like any other.
        let MemoryKind::Device { ordinal } = crate::gpu::memory_kind(addr)? else { return Ok(Place::HOST) };
        let Ok(index) = u8::try_from(ordinal) else { bail!(Unsupported, "GPU {ordinal}") };
        if let std::collections::hash_map::Entry::Vacant(entry) = self.gpus.lock().entry(index) {
            let gpu = Gpu::open(ordinal)?;
            crate::channel::cuda::warm(&gpu)?;
            entry.insert(gpu);
        }
        Ok(Place::gpu(index))
    }

    /// Has what the next connection needs of the GPUs in use ready.
    pub(crate) fn warm_gpus(&self) -> Result<()> {
        let gpus: Vec<Arc<Gpu>> = self.gpus.lock().values().cloned().collect();
        gpus.iter().try_for_each(crate::channel::cuda::warm)
    }

    // ---- the epoll set ----

    fn control(&self, op: i32, fd: RawFd, token: u64, interest: i32) -> Result<()> {
        let mut event = libc::epoll_event { events: interest as u32, u64: token };
        // SAFETY: the epoll descriptor is ours, the event is readable.
        if unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), op, fd, &mut event) } != 0 {
            return Err(Error::system("epoll_ctl", &std::io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Takes a connection's socket out of the set; it may be out already.
    pub(crate) fn unwatch(&self, fd: RawFd) {
        let _ = self.control(libc::EPOLL_CTL_DEL, fd, 0, 0);
    }

    /// Changes what wakes the progress thread: `interest` of EPOLLIN and EPOLLOUT, or 0.
    pub(crate) fn watch(&self, connection: &Connection, interest: i32) {
        let _ = self.control(libc::EPOLL_CTL_MOD, connection.fd, connection.id, interest);
    }

    /// Waits for events; gives the tokens that have some.
    pub(crate) fn wait_events(&self, timeout: Duration, tokens: &mut Vec<u64>) {
        const N: usize = 64;
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; N];
        let limit = libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let no_mask = std::ptr::null::<libc::sigset_t>();
        // SAFETY: the array has N writable events; the time is readable; no signal mask is given.
        let mut n = unsafe {
            libc::syscall(libc::SYS_epoll_pwait2, self.epoll.as_raw_fd(), events.as_mut_ptr(), N as i32, &limit, no_mask, 0)
        };
        if n < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) {
            // Kernels before 5.11 wait in whole milliseconds.
            let millis = timeout.as_micros().div_ceil(1000) as i32;
            // SAFETY: the array has N writable events.
            n = i64::from(unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), N as i32, millis) });
        }
        tokens.clear();
        for event in events.iter().take(usize::try_from(n).unwrap_or(0)) {
            let token = event.u64;
            if token == WAKE {
                let mut count = [0u8; 8];
                // SAFETY: eight writable bytes.
                unsafe { libc::read(self.wake.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
            }
            tokens.push(token);
        }
    }

    // ---- waking the progress thread ----

    /// A doorbell for the comms of one connection: rings only while the progress thread sleeps and answers for that connection.
    pub(crate) fn doorbell(&self) -> Doorbell {
        Doorbell { armed: Arc::new(AtomicU32::new(0)), fd: self.wake.as_raw_fd() }
    }

    pub(crate) fn arm(&self, sleeping: bool) {
        self.armed.store(u32::from(sleeping), Ordering::SeqCst);
    }

    /// Wakes the progress thread if it sleeps.
    pub(crate) fn ring(&self) {
        if self.armed.swap(0, Ordering::SeqCst) == 1 {
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight readable bytes.
            unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), 8) };
        }
    }

    /// An application thread added work. A plugin without doorbells, and a backlog on a control socket, need the progress thread.
    pub(crate) fn work_added(&self, backlog: bool) {
        if backlog || !self.plugin.is_soft() {
            self.ring();
        }
    }

    /// Notes a poll; whether the one before was of the same transfer.
    pub(crate) fn polled_again(&self, connection: u64, transfer: u64) -> bool {
        let this = connection.rotate_right(16) ^ transfer;
        self.last_polled.swap(this, Ordering::Relaxed) == this
    }

    /// Microseconds since the engine started, from 1.
    pub(crate) fn clock(&self) -> u64 {
        self.start.elapsed().as_micros() as u64 + 1
    }

    // ---- connections ----

    pub(crate) fn connection_id(&self) -> u64 {
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }

    /// Puts a new connection under the progress thread's care.
    pub(crate) fn adopt(&self, connection: &Arc<Connection>) -> Result<()> {
        let mut connections = self.connections.lock();
        if self.closing.load(Ordering::Acquire) {
            bail!(Canceled, "the engine is being destroyed");
        }
        self.control(libc::EPOLL_CTL_ADD, connection.fd, connection.id, libc::EPOLLIN)?;
        connections.insert(connection.id, Arc::downgrade(connection));
        drop(connections);
        self.generation.fetch_add(1, Ordering::Release);
        self.ring();
        Ok(())
    }

    pub(crate) fn forget(&self, id: u64) {
        self.connections.lock().remove(&id);
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn all(&self) -> Vec<Arc<Connection>> {
        self.connections.lock().values().filter_map(Weak::upgrade).collect()
    }

    // ---- handshakes under way ----

    /// Registers a socket whose handshake is under way, until the guard is dropped.
    pub(crate) fn begin_setup(self: &Arc<Shared>, sock: &TcpStream) -> Result<SetupGuard> {
        let clone = sock.try_clone().map_err(|e| Error::system("control socket", &e))?;
        let id = self.next_setup.fetch_add(1, Ordering::Relaxed);
        self.setups.lock().insert(id, clone);
        let guard = SetupGuard { shared: self.clone(), id };
        if self.closing.load(Ordering::Acquire) {
            bail!(Canceled, "the engine is being destroyed");
        }
        Ok(guard)
    }

    pub(crate) fn setups_running(&self) -> usize {
        self.setups.lock().len()
    }

    pub(crate) fn abort_setups(&self) {
        for sock in self.setups.lock().values() {
            let _ = sock.shutdown(std::net::Shutdown::Both);
        }
    }
}

pub(crate) struct SetupGuard {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for SetupGuard {
    fn drop(&mut self) {
        self.shared.setups.lock().remove(&self.id);
    }
}
