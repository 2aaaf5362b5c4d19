//! Loading a NCCL net plugin and calling its table. A plugin is initialised once per process and never unloaded. All calls go
//! through here, with the locks and the signal mask that the plugin's traits require; `comm` keeps the order of calls.

pub use super::device::Device;
use super::loads::{Loads, Name, Work};
use super::plugin_thread::PluginThread;
use super::registrations::{End, MHandle, Registrar, Registrations};
use super::rxdm::Asking;
use super::search::{self, Kind};
use super::secure::{Guard, Secret};
use super::signals::Quiet;
use super::table::{Answer, Ext, NetTable, Properties};
use super::tcpxo::Machine;
pub use super::tcpxo::{findings as tcpxo_findings, Finding};
use super::traits::{is_tcpx, is_tcpxo, DeviceTraits, Traits};
use super::{within, Scope};
use crate::config::{Config, PluginChoice};
use crate::status::{bail, err, Error, ErrorKind, Result};
use crate::types::{DEVMEM, SOFT};
use nccl_net_abi as abi;
use nccl_net_abi::{ncclNetDeviceHandle_v7, ncclResult_t, ucclIoVec};
use process::PerProcess;
use std::ffi::{c_int, c_void, CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

/// Folders and file names searched for GPUDirect-TCPX and GPUDirect-TCPXO, in order; LD_LIBRARY_PATH follows.
pub const PLACES: [(&[&str], &[&str]); 2] = [(search::TCPX.dirs, search::TCPX.files), (search::TCPXO.dirs, search::TCPXO.files)];

/// The socket of the agent for device memory TCP, if there is one.
pub fn device_memory_agent() -> Option<String> {
    soft_plugin::device_memory_agent().map(|path| path.display().to_string())
}

/// How long to wait while another thread loads a plugin of this library.
const LOAD_WITHIN: Duration = Duration::from_secs(30);

/// Largest message of a foreign plugin. A larger one could need more fragments than TCPX has room for, and TCPX would end the
/// process.
const FOREIGN_CHUNK: usize = 512 << 10;

/// Most descriptors that TCPX opens to import a GPU's receive memory.
const IMPORT: usize = 4;

/// The value of NCCL_DYNAMIC_CHUNK_SIZE for TCPX if it is not set.
const DEFAULT_LIMIT: usize = 512 << 10;

/// The variable that limits the messages of TCPX.
const CHUNK_VARIABLE: &CStr = c"NCCL_DYNAMIC_CHUNK_SIZE";

/// A loaded and initialised plugin.
pub struct Plugin {
    table: &'static dyn NetTable,
    ext: Option<Ext>,
    /// Name of the plugin's table.
    pub name: String,
    /// The file it was loaded from; `None` for the built-in software plugin.
    pub path: Option<PathBuf>,
    /// Version of the table, 7 to 12.
    pub abi_version: u32,
    /// Its devices.
    pub devices: Vec<Device>,
    /// Its traits.
    pub traits: Traits,
    /// Largest message, as set when the plugin started.
    limit: usize,
    registrations: PerProcess<Registrations>,
    /// Where set-up calls run, if they must run one at a time.
    thread: PerProcess<PluginThread>,
}

/// Turns a result into an error that names the call.
fn check(plugin: &str, call: &str, result: ncclResult_t) -> Result<()> {
    let why = match result {
        abi::NCCL_SUCCESS => return Ok(()),
        abi::NCCL_UNHANDLED_CUDA_ERROR => "unhandled CUDA error",
        abi::NCCL_SYSTEM_ERROR => "system error (the peer may be gone)",
        abi::NCCL_INTERNAL_ERROR => "internal error",
        abi::NCCL_INVALID_ARGUMENT => "invalid argument",
        abi::NCCL_INVALID_USAGE => "invalid usage",
        abi::NCCL_REMOTE_ERROR => "remote error",
        _ => "unknown error",
    };
    // Once a comm is up, a plugin reports a lost peer as a system or remote error of a request.
    let asks_a_comm = matches!(call, "test" | "isend" | "irecv" | "iflush" | "irecvConsumed" | "progress");
    if asks_a_comm && matches!(result, abi::NCCL_SYSTEM_ERROR | abi::NCCL_REMOTE_ERROR) {
        return Err(err!(RemoteDisconnect, "plugin {plugin}: {call} returned {result} ({why})"));
    }
    Err(err!(Plugin, "plugin {plugin}: {call} returned {result} ({why})"))
}

/// As [`check`], for a call that the table may lack.
fn answered(plugin: &str, call: &str, answer: Answer) -> Result<()> {
    match answer {
        Some(result) => check(plugin, call, result),
        None => bail!(Plugin, "plugin {plugin} has no {call}"),
    }
}

impl Plugin {
    /// The built-in software plugin.
    pub(crate) fn soft() -> Result<Arc<Plugin>> {
        load_once(None, LOAD_WITHIN, || {
            Ok(Work::Here(Box::new(|| Plugin::start(soft_plugin::table(), Some(Ext::built_in()), None, &None).map(Arc::new))))
        })
    }

    /// Device memory TCP. `gpu` returns the GPU whose memory the NICs first get.
    ///
    /// # Errors
    /// `Unsupported`: what it lacks, in the kernel's words where it has some.
    pub(crate) fn device_memory(gpu: &dyn Fn() -> Result<Scope>) -> Result<Arc<Plugin>> {
        load_once(Some(Path::new(soft_plugin::DEVICE_MEMORY)), LOAD_WITHIN, || {
            let scope = gpu()?;
            within(&scope, || soft_plugin::prepare_device_memory().map_err(|why| err!(Unsupported, "{why}")))?;
            let start = move || Plugin::start(soft_plugin::device_table(), Some(Ext::for_device_memory()), None, &scope);
            Ok(Work::Here(Box::new(move || start().map(Arc::new))))
        })
    }

    /// A foreign plugin whose table is linked into a test, with traits that the test may change. Called once per process.
    #[cfg(test)]
    pub(super) fn for_test(table: &'static dyn NetTable, change: impl FnOnce(&mut Traits)) -> Result<Arc<Plugin>> {
        let mut plugin = Plugin::start(table, None, Some("linked".into()), &None)?;
        change(&mut plugin.traits);
        Ok(Arc::new(plugin))
    }

    /// The plugin that the configuration chooses for device memory, and why it is the software plugin, if it is. `gpu` returns the
    /// GPU that should be current when it is initialised.
    pub(crate) fn choose(config: &Config, gpu: &dyn Fn() -> Result<Scope>) -> Result<(Arc<Plugin>, Option<String>)> {
        // An explicit path is used, whatever plugin it holds.
        if let Some(path) = &config.plugin_path {
            if !path.exists() {
                bail!(PluginLoad, "UCCL_TCPX_PLUGIN_PATH={} does not exist", path.display());
            }
            return Ok((Plugin::load(path, None, config, gpu)?, None));
        }
        if config.plugin == PluginChoice::Soft {
            return Ok((Plugin::soft()?, Some("UCCL_TCPX_PLUGIN=soft or UCCL_P2P_TRANSPORT=tcp asks for it".to_owned())));
        }
        let (machine, must) = (Machine::here(), config.plugin != PluginChoice::Auto);
        let wanted = wanted(config, &machine);
        let library_path = std::env::var("LD_LIBRARY_PATH").ok();
        let mut left_out = Vec::new();
        for kind in wanted {
            let load = |path: &Path| Plugin::load(path, Some(kind), config, gpu);
            if let Some(plugin) = first_usable(kind, &kind.candidates(library_path.as_deref()), must, load, &mut left_out)? {
                return Ok((plugin, None));
            }
        }
        match wanted {
            [kind] if must => Err(not_installed(kind)),
            _ => {
                warn_about_soft(config, &machine);
                let titles: Vec<&str> = wanted.iter().map(|kind| kind.title).collect();
                let missing = format!("no usable {} plugin is installed", titles.join(" or "));
                Ok((Plugin::soft()?, Some(if left_out.is_empty() { missing } else { left_out.join("; ") })))
            }
        }
    }

    /// The foreign plugin that an engine with this configuration would use: its name and file. `None`: the software plugin. Its file is
    /// opened, but it is not initialised. `gpu`: the PCI address of a GPU, for what GPUDirect-TCPXO needs of the machine.
    ///
    /// # Errors
    /// `PluginLoad`: it must be there, and is not, or cannot be opened.
    pub fn look(config: &Config, gpu: Option<&str>) -> Result<Option<(String, PathBuf)>> {
        let found = |path: &Path| {
            let (table, ext) = open(path)?;
            let name = table.name();
            if is_tcpxo(&name) && !config.emulate_device {
                Machine::here().check(gpu)?;
            }
            Ok((ext.is_none()).then(|| (name, path.to_owned())))
        };
        if let Some(path) = &config.plugin_path {
            return found(path);
        }
        if config.plugin == PluginChoice::Soft {
            return Ok(None);
        }
        let must = config.plugin != PluginChoice::Auto;
        let wanted = wanted(config, &Machine::here());
        let library_path = std::env::var("LD_LIBRARY_PATH").ok();
        for kind in wanted {
            for path in kind.candidates(library_path.as_deref()) {
                match found(&path) {
                    Ok(Some((name, path))) if (kind.is)(&name) => return Ok(Some((name, path))),
                    Err(e) if must => return Err(e),
                    _ => {}
                }
            }
        }
        match wanted {
            [kind] if must => Err(not_installed(kind)),
            _ => Ok(None),
        }
    }

    /// Whether an engine with this configuration would look for GPUDirect-TCPXO first: it is in the named file, is asked for, or its
    /// receive manager listens on this machine. A file is opened, and not initialised.
    pub fn looks_for_tcpxo(config: &Config) -> bool {
        match (&config.plugin_path, config.plugin) {
            (Some(path), _) => open(path).is_ok_and(|(table, _)| is_tcpxo(&table.name())),
            (None, PluginChoice::Soft) => false,
            (None, _) => wanted(config, &Machine::here()).first().is_some_and(|kind| kind.word == search::TCPXO.word),
        }
    }

    /// Loads a plugin of any kind, or of the given one.
    ///
    /// # Errors
    /// `Unsupported` where the file holds a plugin of another kind, which is then not initialised.
    fn load(path: &Path, kind: Option<&Kind>, config: &Config, gpu: &dyn Fn() -> Result<Scope>) -> Result<Arc<Plugin>> {
        let admit = |name: &str| match kind.filter(|kind| !(kind.is)(name)) {
            Some(kind) => Err(err!(Unsupported, "{}: holds plugin {name}, which is not {}", path.display(), kind.title)),
            None => Ok(()),
        };
        let plugin = load_once(Some(path), config.connect_timeout, || {
            let ((table, ext), path) = (open(path)?, path.to_owned());
            if ext.is_some() {
                return Ok(Work::Here(Box::new(move || Plugin::start(table, ext, Some(path), &None).map(Arc::new))));
            }
            admit(&table.name())?;
            if is_tcpx(&table.name()) {
                crate::config::check_tcpx()?;
            }
            set_chunk_size(config);
            // Google's plugins use the current GPU from their init on.
            let scope = gpu()?;
            if is_tcpxo(&table.name()) && !config.emulate_device {
                Machine::here().check(scope.as_ref().and_then(|gpu| gpu.address()).as_deref())?;
            }
            // It may wait for other programs without a limit.
            let start = move || Plugin::start(table, ext, Some(path), &scope).map(Arc::new);
            Ok(Work::Thread(table.name(), Box::new(start)))
        })?;
        admit(&plugin.name)?;
        Ok(plugin)
    }

    /// Largest message that its comms carry.
    pub(crate) fn max_message(&self) -> usize {
        if self.traits.small_messages {
            self.limit.min(FOREIGN_CHUNK)
        } else {
            self.limit
        }
    }

    fn start(table: &'static dyn NetTable, ext: Option<Ext>, path: Option<PathBuf>, scope: &Scope) -> Result<Plugin> {
        let name = table.name();
        let traits = Traits::of(&name, ext.as_ref(), DeviceTraits::default());
        let mut plugin = Plugin {
            table,
            ext,
            name,
            path,
            abi_version: table.version(),
            devices: Vec::new(),
            traits,
            limit: crate::config::message_limit(ext.is_some())?,
            registrations: PerProcess::new(Registrations::default),
            thread: PerProcess::new(PluginThread::default),
        };
        within(scope, || {
            // A plugin calls its logger unchecked. The built-in one writes to this library's log directly.
            let logger = if plugin.path.is_some() { super::plugin_log::logger() } else { None };
            // SAFETY: called once per process (load_once), first.
            plugin.set_up("init", || unsafe { table.init(logger) })
        })?;
        let listed = within(scope, || plugin.list())?;
        plugin.traits = Traits::of(&plugin.name, plugin.ext.as_ref(), DeviceTraits::of(&listed));
        plugin.limit = listed.iter().filter_map(|p| p.max_message).fold(plugin.limit, |limit, most| limit.min(most.get()));
        plugin.devices = listed.into_iter().enumerate().map(|(dev, p)| Device::new(dev, p)).collect();
        Ok(plugin)
    }

    /// The devices as the plugin lists them now.
    fn list(&self) -> Result<Vec<Properties>> {
        let mut n: c_int = 0;
        // SAFETY: the plugin is initialised.
        self.set_up("devices", || unsafe { self.table.devices(&mut n) })?;
        let properties = |dev| {
            let mut found = Properties::default();
            // SAFETY: as above; dev is below the number of devices.
            self.set_up("getProperties", || unsafe { self.table.properties(dev, &mut found) })?;
            Ok(found)
        };
        (0..n).map(properties).collect()
    }

    /// The devices to set up channels on: those found at the start, or the plugin's current list if it may change.
    pub(crate) fn current_devices(&self) -> Result<Vec<Device>> {
        if !self.traits.devices_change {
            return Ok(self.devices.clone());
        }
        Ok(self.list()?.into_iter().enumerate().map(|(dev, p)| Device::new(dev, p)).collect())
    }

    /// "soft", "devmem", "tcpx", "tcpxo" or the table's name: both engines of a connection must have the same, or one of the first two.
    pub fn wire_name(&self) -> &str {
        match &self.name {
            name if name == soft_plugin::DEVICE_MEMORY => DEVMEM,
            _ if self.ext.is_some() => SOFT,
            name if is_tcpx(name) => "tcpx",
            name if is_tcpxo(name) => "tcpxo",
            name => name,
        }
    }

    /// The thread on which set-up, registration and close run, if the plugin needs them one at a time.
    pub(super) fn thread(&self) -> Option<&'static PluginThread> {
        self.traits.serial_setup.then(|| self.thread.get().named(&self.name))
    }

    /// Waits until what was closed in its thread is closed, for a short time.
    pub(crate) fn settle(&self) {
        self.thread().into_iter().for_each(PluginThread::settle);
    }

    /// A call of set-up, registration or close, in the plugin's thread if it has one.
    fn set_up(&self, name: &str, call: impl FnOnce() -> Answer) -> Result<()> {
        let _quiet = self.traits.raises_sigpipe.then(Quiet::begin);
        let answer = if self.traits.serial_setup {
            // A child forked during the call would find the plugin's own locks held for ever.
            process::without_fork(call)
        } else {
            call()
        };
        let failed = matches!(answer, Some(abi::NCCL_SYSTEM_ERROR | abi::NCCL_INTERNAL_ERROR));
        if failed && matches!(name, "listen" | "connect" | "accept" | "regMr" | "ready" | "acceptSend" | "connectRecv") {
            // The software plugin leaves the cause in errno.
            let errno = std::io::Error::last_os_error().raw_os_error();
            let reported = self.ext.is_some() && matches!(errno, Some(libc::EMFILE | libc::ENFILE));
            if reported || !descriptors_left(1) {
                bail!(Resource, "plugin {}: {name} failed: out of file descriptors (ulimit -n)", self.name);
            }
            if let (true, Some(libc::EADDRINUSE), Some(range)) = (self.ext.is_some(), errno, soft_plugin::port_range()) {
                let (low, high) = (range.start(), range.end());
                bail!(System, "plugin {}: {name}: every port of UCCL_TCPX_PORT_RANGE={low}-{high} is in use", self.name);
            }
            if let (true, Some(errno @ 1..)) = (self.ext.is_some(), errno) {
                bail!(Plugin, "plugin {}: {name}: {}", self.name, std::io::Error::from_raw_os_error(errno));
            }
        }
        answered(&self.name, name, answer).map_err(|e| match super::plugin_log::last_warnings().filter(|_| self.ext.is_none()) {
            Some(text) => crate::status::Error::new(e.kind(), format_args!("{e}; the plugin's last warnings: {text}")),
            None => e,
        })
    }

    /// A call on the requests of a comm.
    fn request(&self, name: &str, call: impl FnOnce() -> Answer) -> Result<()> {
        let _quiet = self.traits.raises_sigpipe.then(Quiet::begin);
        answered(&self.name, name, call())
    }
}

impl Registrar for Plugin {
    fn name(&self) -> &str {
        &self.name
    }

    fn shared(&self) -> bool {
        self.traits.shared_registrations
    }

    fn registrations(&self) -> &Registrations {
        self.registrations.get()
    }

    fn end_registration(self: Arc<Self>, end: End) {
        match self.thread() {
            Some(thread) => thread.close("deregMr", move || end(&*self)),
            None => end(&*self),
        }
    }

    unsafe fn reg_mr(&self, comm: *mut c_void, data: *mut c_void, size: usize, kind: c_int) -> Result<MHandle> {
        let mut mhandle = std::ptr::null_mut();
        // Without free descriptors, TCPX closes a descriptor that it does not own.
        if self.traits.serial_setup && !descriptors_left(4) {
            bail!(Resource, "plugin {}: no file descriptors left to register memory (ulimit -n)", self.name);
        }
        // SAFETY: by the caller's contract.
        self.set_up("regMr", || unsafe { self.table.reg_mr(comm, data, size, kind, &mut mhandle) })?;
        Ok(mhandle)
    }

    unsafe fn dereg_mr(&self, comm: *mut c_void, mhandle: MHandle) -> Result<()> {
        // SAFETY: by the caller's contract.
        self.set_up("deregMr", || unsafe { self.table.dereg_mr(comm, mhandle) })
    }
}

/// The raw calls, one per member that the comms need.
impl Plugin {
    pub(super) fn listen(&self, dev: usize, handle: &mut [u8; abi::NCCL_NET_HANDLE_MAXSIZE]) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: handle is 128 writable bytes.
        self.set_up("listen", || unsafe { self.table.listen(dev as c_int, handle.as_mut_ptr().cast(), &mut comm) })?;
        if comm.is_null() {
            bail!(Plugin, "plugin {}: listen returned no comm", self.name);
        }
        Ok(comm)
    }

    /// # Safety
    /// `handle` stays at its address between calls and is not used again after an error.
    pub(super) unsafe fn connect(&self, dev: usize, handle: *mut c_void) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: by the caller's contract.
        self.set_up("connect", || unsafe { self.table.connect(dev as c_int, handle, &mut comm) })?;
        Ok(comm)
    }

    /// # Safety
    /// `handle` is the buffer of a pending connect, which is not polled again.
    pub(super) unsafe fn abandon_connect(&self, handle: *mut c_void) {
        let Some(call) = self.ext.and_then(|e| e.abandon_connect) else { return };
        // SAFETY: by the caller's contract.
        if let Err(e) = self.set_up("abandonConnect", || Some(unsafe { call(handle) })) {
            log::debug!("{e}");
        }
    }

    /// What to ask before the first poll of an accept, if the plugin imports receive memory.
    pub(super) fn asking(&self, gpu: &Scope) -> Result<Option<Asking>> {
        let address = || gpu.as_ref().and_then(|gpu| gpu.address());
        self.traits.imports.then(|| Asking::new(address().as_deref())).transpose()
    }

    /// Whether an accept can be polled now. `false` if polling could end the process.
    pub(super) fn may_accept(&self) -> bool {
        !self.traits.imports || descriptors_left(IMPORT)
    }

    /// # Safety
    /// `listen` is a live listen comm that has not accepted yet; `dev_handle` outlives the resulting comm.
    pub(super) unsafe fn accept(&self, listen: *mut c_void, dev_handle: *mut ncclNetDeviceHandle_v7) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: by the caller's contract.
        self.set_up("accept", || unsafe { self.table.accept(listen, dev_handle, &mut comm) })?;
        Ok(comm)
    }

    /// Fails unless the device can carry new connections now. Succeeds if the plugin cannot tell.
    pub(super) fn ready(&self, dev: usize) -> Result<()> {
        // SAFETY: the plugin is initialised, and checks the number.
        let call = || Some(self.ext.and_then(|e| e.ready).map_or(abi::NCCL_SUCCESS, |call| unsafe { call(dev as c_int) }));
        self.set_up("ready", call)
    }

    /// Lets the listen comm serve a connection of each direction, with a key that both prove or without one.
    ///
    /// # Safety
    /// `listen` is a live listen comm that was not asked to accept yet.
    pub(super) unsafe fn listen_both(&self, listen: *mut c_void, key: Option<&Secret>) -> Result<()> {
        let (call, key) = (self.ext.and_then(|e| e.listen_both), key.map_or(std::ptr::null(), |key| key.as_ptr()));
        // SAFETY: by the caller's contract; null or 32 readable bytes.
        self.set_up("listenBoth", || call.map(|call| unsafe { call(listen, key) }))
    }

    /// # Safety
    /// `listen` is a live listen comm that serves both directions and has not accepted this one.
    pub(super) unsafe fn accept_send(&self, listen: *mut c_void) -> Result<*mut c_void> {
        let (call, mut comm) = (self.ext.and_then(|e| e.accept_send), std::ptr::null_mut());
        // SAFETY: by the caller's contract.
        self.set_up("acceptSend", || call.map(|call| unsafe { call(listen, &mut comm) }))?;
        Ok(comm)
    }

    /// # Safety
    /// `handle` as for [`Plugin::connect`]; `dev_handle` outlives the resulting comm.
    pub(super) unsafe fn connect_recv(
        &self,
        dev: usize,
        handle: *mut c_void,
        dev_handle: *mut ncclNetDeviceHandle_v7,
    ) -> Result<*mut c_void> {
        let (call, mut comm, mut dev_handle) = (self.ext.and_then(|e| e.connect_recv), std::ptr::null_mut(), dev_handle);
        // SAFETY: by the caller's contract.
        self.set_up("connectRecv", || call.map(|call| unsafe { call(dev as c_int, handle, &mut comm, &mut dev_handle) }))?;
        Ok(comm)
    }

    /// Progress of a send comm's bytes; `None` if the plugin does not report it.
    ///
    /// # Safety
    /// `comm` is a live send comm.
    pub(super) unsafe fn flow(&self, comm: *mut c_void) -> Option<abi::ucclFlow> {
        let call = self.ext.and_then(|e| e.flow)?;
        let mut flow = abi::ucclFlow { size: size_of::<abi::ucclFlow>(), ..Default::default() };
        // SAFETY: by the caller's contract; the structure says its size.
        let result = unsafe { call(comm, &mut flow) };
        (result == abi::NCCL_SUCCESS).then_some(flow)
    }

    /// # Safety
    /// As `isend` of the contract: comm live, memory registered under `mhandle` and untouched until done, window open.
    pub(super) unsafe fn isend(
        &self,
        comm: *mut c_void,
        data: *mut c_void,
        size: usize,
        tag: c_int,
        mhandle: *mut c_void,
    ) -> Result<*mut c_void> {
        let mut request = std::ptr::null_mut();
        // SAFETY: by the caller's contract.
        self.request("isend", || unsafe { self.table.isend(comm, data, size, tag, mhandle, &mut request) })?;
        Ok(request)
    }

    /// # Safety
    /// As [`Plugin::isend`], for every segment.
    pub(super) unsafe fn isendv(&self, comm: *mut c_void, iov: &[ucclIoVec], tag: c_int) -> Result<*mut c_void> {
        let mut request = std::ptr::null_mut();
        let call = self.ext.and_then(|e| e.vectored).map(|(send, _)| send);
        // SAFETY: by the caller's contract; the array is copied by the call.
        self.request("isend", || call.map(|call| unsafe { call(comm, iov.len() as c_int, iov.as_ptr(), tag, &mut request) }))?;
        Ok(request)
    }

    /// # Safety
    /// As `irecv` of the contract, n = 1.
    pub(super) unsafe fn irecv(
        &self,
        comm: *mut c_void,
        data: *mut c_void,
        size: usize,
        tag: c_int,
        mhandle: *mut c_void,
    ) -> Result<*mut c_void> {
        let mut request = std::ptr::null_mut();
        // SAFETY: by the caller's contract.
        self.request("irecv", || unsafe { self.table.irecv(comm, data, size, tag, mhandle, &mut request) })?;
        Ok(request)
    }

    /// # Safety
    /// As [`Plugin::irecv`], for every segment.
    pub(super) unsafe fn irecvv(&self, comm: *mut c_void, iov: &[ucclIoVec], tag: c_int) -> Result<*mut c_void> {
        let mut request = std::ptr::null_mut();
        let call = self.ext.and_then(|e| e.vectored).map(|(_, receive)| receive);
        // SAFETY: by the caller's contract; the array is copied by the call.
        self.request("irecv", || call.map(|call| unsafe { call(comm, iov.len() as c_int, iov.as_ptr(), tag, &mut request) }))?;
        Ok(request)
    }

    /// Whether the request is done, and the size that the plugin reports, if any.
    ///
    /// # Safety
    /// `request` is the oldest unfinished request of its comm.
    pub(super) unsafe fn test(&self, request: *mut c_void) -> Result<Option<Option<usize>>> {
        let (mut done, mut size): (c_int, c_int) = (0, -1);
        // SAFETY: by the caller's contract.
        self.request("test", || unsafe { self.table.test(request, &mut done, &mut size) })?;
        // Some plugins write no size.
        Ok((done != 0).then(|| usize::try_from(size).ok()))
    }

    /// # Safety
    /// `request` is the oldest completed and unconsumed receive of `comm`, and nothing reads its bounce memory afterwards.
    pub(super) unsafe fn consumed(&self, comm: *mut c_void, request: *mut c_void) -> Result<()> {
        // Plugins without a device side have no such call, and nothing to consume.
        // SAFETY: by the caller's contract.
        self.request("irecvConsumed", || Some(unsafe { self.table.consumed(comm, request) }.unwrap_or(abi::NCCL_SUCCESS)))
    }

    /// Lets the GPU see a received message, as far as the plugin must do something for it: the request of that, or null.
    ///
    /// # Safety
    /// As [`Plugin::irecv`], for a receive of `comm` that is done.
    pub(super) unsafe fn flush(&self, comm: *mut c_void, posted: &Buffer) -> Result<*mut c_void> {
        let mut request = std::ptr::null_mut();
        let Buffer { data, len, mhandle } = *posted;
        // SAFETY: by the caller's contract.
        let call =
            || Some(unsafe { self.table.flush(comm, data, len as c_int, mhandle, &mut request) }.unwrap_or(abi::NCCL_SUCCESS));
        self.request("iflush", call)?;
        Ok(request)
    }

    /// Sets a doorbell; `false` when the plugin has none.
    ///
    /// # Safety
    /// `comm` is live; `armed` and `fd` stay valid until it is closed.
    pub(super) unsafe fn set_doorbell(&self, comm: *mut c_void, armed: *mut u32, fd: c_int) -> Result<bool> {
        let Some(call) = self.ext.and_then(|e| e.set_doorbell) else { return Ok(false) };
        // SAFETY: by the caller's contract.
        self.request("setDoorbell", || Some(unsafe { call(comm, armed, fd) }))?;
        Ok(true)
    }

    /// Limits the bytes a second of a send comm. A plugin that cannot does not.
    ///
    /// # Safety
    /// `comm` is live.
    pub(super) unsafe fn pace(&self, comm: *mut c_void, rate: u64) -> Result<()> {
        let Some(call) = self.ext.and_then(|e| e.pace) else { return Ok(()) };
        // SAFETY: by the caller's contract.
        self.request("pace", || Some(unsafe { call(comm, rate) }))
    }

    /// Bytes of the comm that the peer has acknowledged (send) or that were delivered (receive); `None` if the plugin does not
    /// report them.
    ///
    /// # Safety
    /// `comm` is live.
    pub(super) unsafe fn progress(&self, comm: *mut c_void) -> Result<Option<u64>> {
        let Some(call) = self.ext.and_then(|e| e.progress) else { return Ok(None) };
        let mut bytes = 0;
        // SAFETY: by the caller's contract; bytes is writable.
        self.request("progress", || Some(unsafe { call(comm, &mut bytes) }))?;
        Ok(Some(bytes))
    }

    /// A line about the comm for error texts; `None` if the plugin has none.
    ///
    /// # Safety
    /// `comm` is live.
    pub(super) unsafe fn describe(&self, comm: *mut c_void) -> Option<String> {
        let call = self.ext.and_then(|e| e.describe)?;
        let mut text = [0u8; 256];
        // SAFETY: by the caller's contract; the buffer's length is passed.
        let result = unsafe { call(comm, text.as_mut_ptr().cast(), text.len()) };
        let text = std::ffi::CStr::from_bytes_until_nul(&text).ok()?;
        (result == abi::NCCL_SUCCESS).then(|| text.to_string_lossy().into_owned())
    }

    /// The kernel's statistics of the comm's connection; `None` if the plugin does not report them.
    ///
    /// # Safety
    /// `comm` is live.
    pub(super) unsafe fn info(&self, comm: *mut c_void) -> Option<abi::ucclCommInfo> {
        let call = self.ext.and_then(|e| e.info)?;
        let mut info = abi::ucclCommInfo { size: size_of::<abi::ucclCommInfo>(), ..Default::default() };
        // SAFETY: by the caller's contract; the structure says its size.
        let result = unsafe { call(comm, &mut info) };
        (result == abi::NCCL_SUCCESS).then_some(info)
    }

    /// # Safety
    /// `listen` is a live listen comm that was not asked to accept yet.
    pub(super) unsafe fn key_listen(&self, listen: *mut c_void, key: &Secret) -> Result<()> {
        let call = self.ext.and_then(|e| e.key_listen);
        // SAFETY: by the caller's contract; 32 readable bytes.
        self.request("keyListen", || call.map(|call| unsafe { call(listen, key.as_ptr()) }))
    }

    /// # Safety
    /// `handle` is a writable handle buffer with which no connect has begun.
    pub(super) unsafe fn key_connect(&self, handle: *mut c_void, key: &Secret) -> Result<()> {
        let call = self.ext.and_then(|e| e.key_connect);
        // SAFETY: by the caller's contract; 32 readable bytes.
        self.request("keyConnect", || call.map(|call| unsafe { call(handle, key.as_ptr()) }))
    }

    /// Protects the messages of a comm.
    ///
    /// # Safety
    /// `comm` is live and has had no request.
    pub(super) unsafe fn protect(&self, comm: *mut c_void, guard: &Guard) -> Result<()> {
        let (level, key) = match guard {
            Guard::None => return Ok(()),
            Guard::Checksum => (abi::UCCL_PROTECT_CHECKSUM, std::ptr::null()),
            Guard::Seal(key) => (abi::UCCL_PROTECT_SEAL, key.as_ptr()),
        };
        let call = self.ext.and_then(|e| e.protect);
        // SAFETY: by the caller's contract; null or 32 readable bytes.
        self.request("protect", || call.map(|call| unsafe { call(comm, level, key) }))
    }

    /// # Safety
    /// `comm` is a live comm of that kind; it is not used afterwards.
    ///
    /// # Errors
    /// The plugin's: the comm may still read and write memory.
    pub(super) unsafe fn close(&self, kind: CommKind, comm: *mut c_void) -> Result<()> {
        // SAFETY: by the caller's contract.
        let call = || unsafe {
            match kind {
                CommKind::Send => self.table.close_send(comm),
                CommKind::Recv => self.table.close_recv(comm),
                CommKind::Listen => self.table.close_listen(comm),
            }
        };
        self.set_up("close", call)
    }
}

/// The registered memory of a posted receive.
#[derive(Clone, Copy)]
pub(super) struct Buffer {
    pub data: *mut c_void,
    pub len: usize,
    pub mhandle: MHandle,
}

/// Which close function a comm needs.
#[derive(Clone, Copy)]
pub(super) enum CommKind {
    Send,
    Recv,
    Listen,
}

impl CommKind {
    /// The name of the close function.
    pub(super) fn close_name(self) -> &'static str {
        match self {
            CommKind::Send => "closeSend",
            CommKind::Recv => "closeRecv",
            CommKind::Listen => "closeListen",
        }
    }
}

/// The plugins of this process, each with its path.
type Loaded = Vec<(Name, Arc<Plugin>)>;

/// Kinds of plugins of Google's that the configuration asks for, in this order.
fn wanted(config: &Config, machine: &Machine) -> &'static [&'static Kind] {
    match config.plugin {
        PluginChoice::Tcpx => &[&search::TCPX],
        PluginChoice::Tcpxo => &[&search::TCPXO],
        // Where both are installed the machine decides.
        _ if machine.has_manager() => &[&search::TCPXO, &search::TCPX],
        _ => &[&search::TCPX],
    }
}

fn not_installed(kind: &Kind) -> Error {
    err!(
        PluginLoad,
        "UCCL_TCPX_PLUGIN={}, but the {} plugin is not installed: looked for {} in {} and LD_LIBRARY_PATH (set UCCL_TCPX_PLUGIN_PATH to name it, or UCCL_TCPX_PLUGIN=soft for ordinary TCP)",
        kind.word,
        kind.title,
        kind.files.join(" and "),
        kind.dirs.join(", ")
    )
}

/// Opens the file of a plugin, which is not initialised. It stays open.
fn open(path: &Path) -> Result<(&'static dyn NetTable, Option<Ext>)> {
    // SAFETY: loading runs the library's initialisers; the user chose the library, or put it where plugins are.
    let library = match process::without_fork(|| unsafe { libloading::Library::new(path) }) {
        Ok(library) => library,
        Err(e) => bail!(PluginLoad, "{}: {e}", path.display()),
    };
    // A plugin has its own threads and cannot be unloaded.
    let library: &'static libloading::Library = Box::leak(Box::new(library));
    // SAFETY: it is a NCCL net plugin; the library is never unloaded.
    match unsafe { (super::table::find(library), Ext::find(library)) } {
        (Some(table), ext) => Ok((table, ext)),
        (None, _) => bail!(PluginLoad, "{}: exports no table of a NCCL net plugin (ncclNetPlugin_v7 to _v12)", path.display()),
    }
}

fn load_once(path: Option<&Path>, within: Duration, prepare: impl FnOnce() -> Result<Work<Arc<Plugin>>>) -> Result<Arc<Plugin>> {
    /// The latest list of this process or its parent: plugins stay loaded in a child, and are not initialised again.
    static LAST: AtomicPtr<Loaded> = AtomicPtr::new(std::ptr::null_mut());
    static LOADS: PerProcess<Loads<Arc<Plugin>>> = PerProcess::new(|| {
        // SAFETY: null, or a list that was leaked below.
        let loaded = unsafe { LAST.load(Ordering::Acquire).as_ref() }.cloned().unwrap_or_default();
        Loads::new(loaded, |loaded| LAST.store(Box::into_raw(Box::new(loaded.to_vec())), Ordering::Release))
    });
    let name = path.map(|p| p.canonicalize().unwrap_or_else(|_| p.to_owned()));
    LOADS.get().once(&name, within, prepare)
}

/// The first candidate that is a plugin of this kind and starts. One that fails is an error if it `must` start, and otherwise skipped
/// with a warning.
fn first_usable<P: std::ops::Deref<Target = Plugin>>(
    kind: &Kind,
    candidates: &[PathBuf],
    must: bool,
    load: impl Fn(&Path) -> Result<P>,
    left_out: &mut Vec<String>,
) -> Result<Option<P>> {
    for path in candidates {
        match load(path) {
            Ok(plugin) if !plugin.devices.is_empty() => return Ok(Some(plugin)),
            Ok(_) => {
                let what = format!("{}: the plugin found no network device", path.display());
                if must {
                    bail!(PluginLoad, "{what} ({})", kind.interfaces);
                }
                log::warn!("{what}; it is left out");
                left_out.push(what);
            }
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                log::info!("{e}");
                left_out.push(e.to_string());
            }
            Err(e) if must => {
                bail!(PluginLoad, "UCCL_TCPX_PLUGIN={}, but {e} (set UCCL_TCPX_PLUGIN_PATH to use another file)", kind.word)
            }
            Err(e) => {
                log::warn!("the {} plugin cannot be used and is left out: {e}", kind.title);
                left_out.push(e.to_string());
            }
        }
    }
    Ok(None)
}

/// Warns once that ordinary TCP is used although a plugin of Google's may have been intended.
fn warn_about_soft(config: &Config, machine: &Machine) {
    static ONCE: PerProcess<Once> = PerProcess::new(Once::new);
    ONCE.get().call_once(|| {
        if machine.has_manager() {
            log::warn!(
                "the receive manager of GPUDirect-TCPXO runs on this host, but data goes over ordinary TCP: the plugin is not installed, or cannot be used ({} in the usual places; UCCL_TCPX_PLUGIN_PATH names it)",
                search::TCPXO.files.join(" or ")
            );
            return;
        }
        // The folder of Google's instructions, and the plugin's default.
        let prefix = std::env::var("NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX");
        let managers = prefix.as_deref().map_or(vec!["/run/tcpx", "/tmp"], |prefix| vec![prefix]);
        let signs = search::signs(Path::new("/"), &managers);
        let missing =
            "GPUDirect-TCPX is not installed (no libnccl-net-tcpx.so in the usual places; UCCL_TCPX_PLUGIN_PATH names it)";
        if !signs.is_empty() {
            log::warn!(
                "this host looks prepared for GPUDirect-TCPX ({}), but data goes over ordinary TCP: {missing}",
                signs.join(", ")
            );
        } else if config.transport_tcpx {
            log::warn!("UCCL_P2P_TRANSPORT=tcpx: {missing}; data goes over ordinary TCP");
        }
    });
}

/// Sets the message limit that TCPX reads in its `init`, unless the user did: with its default of 0 TCPX never moves data.
fn set_chunk_size(config: &Config) {
    static ONCE: PerProcess<Once> = PerProcess::new(Once::new);
    ONCE.get().call_once(|| {
        if config.plugin_limit.is_none() {
            let value = CString::new(DEFAULT_LIMIT.to_string()).unwrap_or_default();
            // Not with std: a fork while another thread holds std's environment lock would leave it locked in the child.
            // SAFETY: two C strings, once per process, before a foreign plugin is initialised. The user must not read the
            // environment through the C library in another thread at the same moment, as with NCCL itself.
            if unsafe { libc::setenv(CHUNK_VARIABLE.as_ptr(), value.as_ptr(), 1) } != 0 {
                log::warn!("{} cannot be set: {}", CHUNK_VARIABLE.to_string_lossy(), std::io::Error::last_os_error());
            }
        }
    });
}

/// Whether the process can open `n` more descriptors now.
fn descriptors_left(n: usize) -> bool {
    let open = || std::fs::File::open("/dev/null");
    let opened: Vec<_> = (0..n).map_while(|_| open().ok()).collect();
    opened.len() == n
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn every_call_on_a_comm_reports_a_lost_peer() {
        let kind = |call, result| check("one", call, result).unwrap_err().kind();
        for call in ["test", "isend", "irecv", "iflush", "irecvConsumed", "progress"] {
            for result in [abi::NCCL_SYSTEM_ERROR, abi::NCCL_REMOTE_ERROR] {
                assert_eq!(kind(call, result), ErrorKind::RemoteDisconnect, "{call}");
            }
            assert_eq!(kind(call, abi::NCCL_INTERNAL_ERROR), ErrorKind::Plugin, "{call}");
        }
        assert_eq!(kind("listen", abi::NCCL_SYSTEM_ERROR), ErrorKind::Plugin);
    }

    /// A lock that another thread holds during a fork stays locked in the child.
    #[test]
    fn the_chunk_size_is_set_in_children_of_processes_whose_threads_read_the_environment() {
        let config = Config { plugin_limit: None, ..Config::from_env().unwrap() };
        let over = AtomicBool::new(false);
        let ended = std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        assert!(std::env::vars_os().count() > 0);
                    }
                });
            }
            let ended = (0..20).all(|_| {
                // SAFETY: the child makes the call under test and ends; a signal kills it if it hangs.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    // SAFETY: as above.
                    unsafe { libc::alarm(20) };
                    set_chunk_size(&config);
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(0) };
                }
                let mut status = 0;
                // SAFETY: our own child, waited for only here.
                (unsafe { libc::waitpid(child, &mut status, 0) }, status) == (child, 0)
            });
            over.store(true, Ordering::Relaxed);
            ended
        });
        assert!(ended, "a child hangs");
    }
}
