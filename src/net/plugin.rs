//! Loading a NCCL net plugin and calling its table. A plugin is initialised once per process and never unloaded. Every call of a
//! plugin goes through here, with the locks and the signal mask that its traits ask for; rules of order live in `comm`.

use super::signals::Quiet;
use super::table::{Answer, Ext, NetTable, Properties};
use super::traits::{is_tcpx, Traits};
use super::{within, Scope};
use crate::config::{Config, PluginChoice};
use crate::status::{bail, err, Result};
use nccl_net_abi as abi;
use nccl_net_abi::{ncclNetDeviceHandle_v7, ncclResult_t, ucclIoVec};
use parking_lot::Mutex;
use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

/// Where Google's installer puts the TCPX plugin, in the order of trying.
pub const TCPX_PATHS: [&str; 2] = ["/usr/local/tcpx/lib64/libnccl-net-tcpx.so", "/var/lib/tcpx/lib64/libnccl-net.so"];

/// A device of a plugin.
#[derive(Clone, Debug)]
pub struct Device {
    /// Name, as the plugin gives it.
    pub name: String,
    /// Directory of the PCI device under /sys, if it is one.
    pub pci_path: Option<String>,
    /// Mbit/s.
    pub speed_mbps: i32,
    /// Or of NCCL_PTR_HOST (1), NCCL_PTR_CUDA (2), NCCL_PTR_DMABUF (4).
    pub ptr_support: i32,
    /// Receives of CUDA memory must be unpacked from a bounce buffer.
    pub unpack: bool,
}

/// A loaded and initialised plugin.
pub struct Plugin {
    table: &'static dyn NetTable,
    ext: Option<Ext>,
    /// Name of the plugin's table.
    pub name: String,
    /// Where it was loaded from; `None` for the built-in software plugin.
    pub path: Option<PathBuf>,
    /// Version of the table, 7 or 8.
    pub abi_version: u32,
    /// Its devices.
    pub devices: Vec<Device>,
    /// What it can do and asks for.
    pub traits: Traits,
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
    // Once a comm is up, a system or remote error of a request is how a plugin says that the peer is gone.
    if matches!((call, result), ("test" | "isend" | "irecv", abi::NCCL_SYSTEM_ERROR | abi::NCCL_REMOTE_ERROR)) {
        return Err(err!(RemoteDisconnect, "plugin {plugin}: {call} returned {result} ({why})"));
    }
    Err(err!(Plugin, "plugin {plugin}: {call} returned {result} ({why})"))
}

/// As [`check`], where the table may lack the call.
fn answered(plugin: &str, call: &str, answer: Answer) -> Result<()> {
    match answer {
        Some(result) => check(plugin, call, result),
        None => bail!(Plugin, "plugin {plugin} has no {call}"),
    }
}

/// Held during set-up calls of plugins that want them one at a time.
static SETUP: Mutex<()> = Mutex::new(());

impl Plugin {
    /// The built-in software plugin.
    pub(crate) fn soft(config: &Config) -> Result<Arc<Plugin>> {
        prepare_environment(config);
        load_once(None, || Plugin::start(soft_plugin::table(), Some(Ext::built_in()), None, &None))
    }

    /// The plugin that the configuration chooses for device memory. `gpu` gives the GPU that should be current when it is initialised.
    pub(crate) fn choose(config: &Config, gpu: &dyn Fn() -> Result<Scope>) -> Result<Arc<Plugin>> {
        prepare_environment(config);
        let candidates: Vec<PathBuf> = match &config.plugin_path {
            Some(path) => vec![path.clone()],
            None => TCPX_PATHS.iter().map(PathBuf::from).collect(),
        };
        let found = candidates.iter().find(|p| p.exists());
        match (config.plugin, found, &config.plugin_path) {
            // An explicit path is taken at its word, whichever plugin it holds.
            (_, Some(path), Some(_)) => Plugin::load(path, gpu),
            (_, None, Some(path)) => bail!(PluginLoad, "UCCL_TCPX_PLUGIN_PATH={} does not exist", path.display()),
            (PluginChoice::Soft, _, None) => Plugin::soft(config),
            (PluginChoice::Auto, None, None) => Plugin::soft(config),
            (PluginChoice::Auto | PluginChoice::Tcpx, Some(path), None) => Plugin::load(path, gpu),
            (PluginChoice::Tcpx, None, None) => bail!(
                PluginLoad,
                "UCCL_TCPX_PLUGIN=tcpx, but the GPUDirect-TCPX plugin is not installed: looked for {} (set UCCL_TCPX_PLUGIN_PATH to name it, or UCCL_TCPX_PLUGIN=soft for ordinary TCP)",
                candidates.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" and ")
            ),
        }
    }

    fn load(path: &Path, gpu: &dyn Fn() -> Result<Scope>) -> Result<Arc<Plugin>> {
        load_once(Some(path), || {
            // SAFETY: loading runs the library's initialisers; the user chose the library.
            let library = match unsafe { libloading::Library::new(path) } {
                Ok(library) => library,
                Err(e) => bail!(PluginLoad, "{}: {e}", path.display()),
            };
            // A plugin has threads of its own and cannot be unloaded.
            let library: &'static libloading::Library = Box::leak(Box::new(library));
            // SAFETY: the user chose a NCCL net plugin; the library is never unloaded.
            let (table, ext) = unsafe { (super::table::find(library), Ext::find(library)) };
            let Some(table) = table else {
                bail!(PluginLoad, "{}: exports neither ncclNetPlugin_v8 nor ncclNetPlugin_v7", path.display())
            };
            // Google's plugin follows the current GPU from its init on.
            let scope = if ext.is_none() { gpu()? } else { None };
            Plugin::start(table, ext, Some(path.to_owned()), &scope)
        })
    }

    fn start(table: &'static dyn NetTable, ext: Option<Ext>, path: Option<PathBuf>, scope: &Scope) -> Result<Plugin> {
        let name = table.name();
        let traits = Traits::of(&name, ext.as_ref(), false, 0);
        let mut plugin = Plugin { table, ext, name, path, abi_version: table.version(), devices: Vec::new(), traits };
        within(scope, || {
            // SAFETY: called once per process (load_once), first.
            plugin.set_up("init", || unsafe { table.init(None) })
        })?;
        let listed = plugin.list()?;
        let ptr_support = listed.iter().fold(0, |all, p| all | p.ptr_support);
        let global = !listed.is_empty() && listed.iter().all(|p| p.reg_is_global);
        plugin.traits = Traits::of(&plugin.name, plugin.ext.as_ref(), global, ptr_support);
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

    /// The devices to set up channels on: those of the start, or what the plugin lists now where that may change.
    pub(crate) fn current_devices(&self) -> Result<Vec<Device>> {
        if !self.traits.devices_change {
            return Ok(self.devices.clone());
        }
        Ok(self.list()?.into_iter().enumerate().map(|(dev, p)| Device::new(dev, p)).collect())
    }

    /// "soft", "tcpx" or the table's name: what both sides of a connection must agree on.
    pub fn wire_name(&self) -> &str {
        if self.ext.is_some() {
            "soft"
        } else if is_tcpx(&self.name) {
            "tcpx"
        } else {
            &self.name
        }
    }

    /// A call of set-up, registration or close.
    fn set_up(&self, name: &str, call: impl FnOnce() -> Answer) -> Result<()> {
        let _quiet = self.traits.raises_sigpipe.then(Quiet::begin);
        let _one = self.traits.serial_setup.then(|| SETUP.lock());
        answered(&self.name, name, call())
    }

    /// A call on the requests of a comm.
    fn request(&self, name: &str, call: impl FnOnce() -> Answer) -> Result<()> {
        let _quiet = self.traits.raises_sigpipe.then(Quiet::begin);
        answered(&self.name, name, call())
    }
}

impl Device {
    fn new(dev: usize, p: Properties) -> Device {
        Device {
            name: p.name.unwrap_or_else(|| format!("dev{dev}")),
            pci_path: p.pci_path,
            speed_mbps: p.speed_mbps,
            ptr_support: p.ptr_support,
            unpack: p.device_type == abi::NCCL_NET_DEVICE_UNPACK,
        }
    }
}

/// The raw calls, one per member that the comms need.
impl Plugin {
    pub(super) fn listen(&self, dev: usize, handle: &mut [u8; abi::NCCL_NET_HANDLE_MAXSIZE]) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: handle is 128 writable bytes.
        self.set_up("listen", || unsafe { self.table.listen(dev as c_int, handle.as_mut_ptr().cast(), &mut comm) })?;
        if comm.is_null() {
            bail!(Plugin, "plugin {}: listen gave no comm", self.name);
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
    /// `handle` is the buffer of a connect under way, which is not polled again.
    pub(super) unsafe fn abandon_connect(&self, handle: *mut c_void) {
        let Some(call) = self.ext.and_then(|e| e.abandon_connect) else { return };
        // SAFETY: by the caller's contract.
        if let Err(e) = self.set_up("abandonConnect", || Some(unsafe { call(handle) })) {
            log::debug!("{e}");
        }
    }

    /// # Safety
    /// `listen` is a live listen comm that has not accepted yet; `dev_handle` outlives the resulting comm.
    pub(super) unsafe fn accept(&self, listen: *mut c_void, dev_handle: *mut ncclNetDeviceHandle_v7) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: by the caller's contract.
        self.set_up("accept", || unsafe { self.table.accept(listen, dev_handle, &mut comm) })?;
        Ok(comm)
    }

    /// # Safety
    /// `comm` is live; `[data, data + size)` stays mapped until the registration is dropped.
    pub(super) unsafe fn reg_mr(&self, comm: *mut c_void, data: *mut c_void, size: usize, kind: c_int) -> Result<*mut c_void> {
        let mut mhandle = std::ptr::null_mut();
        // SAFETY: by the caller's contract.
        self.set_up("regMr", || unsafe { self.table.reg_mr(comm, data, size, kind, &mut mhandle) })?;
        Ok(mhandle)
    }

    /// # Safety
    /// `comm` and `mhandle` are live and no request uses the registration.
    pub(super) unsafe fn dereg_mr(&self, comm: *mut c_void, mhandle: *mut c_void) {
        // SAFETY: by the caller's contract.
        if let Err(e) = self.set_up("deregMr", || unsafe { self.table.dereg_mr(comm, mhandle) }) {
            log::warn!("{e}");
        }
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
        self.request("isend", || unsafe { self.table.isend(comm, data, size as c_int, tag, mhandle, &mut request) })?;
        Ok(request)
    }

    /// # Safety
    /// As [`Plugin::isend`], for every segment.
    pub(super) unsafe fn isendv(&self, comm: *mut c_void, iov: &[ucclIoVec], tag: c_int) -> Result<*mut c_void> {
        let mut request = std::ptr::null_mut();
        let call = self.ext.and_then(|e| e.isendv);
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
        self.request("irecv", || unsafe { self.table.irecv(comm, data, size as c_int, tag, mhandle, &mut request) })?;
        Ok(request)
    }

    /// # Safety
    /// As [`Plugin::irecv`], for every segment.
    pub(super) unsafe fn irecvv(&self, comm: *mut c_void, iov: &[ucclIoVec], tag: c_int) -> Result<*mut c_void> {
        let mut request = std::ptr::null_mut();
        let call = self.ext.and_then(|e| e.irecvv);
        // SAFETY: by the caller's contract; the array is copied by the call.
        self.request("irecv", || call.map(|call| unsafe { call(comm, iov.len() as c_int, iov.as_ptr(), tag, &mut request) }))?;
        Ok(request)
    }

    /// Whether the request is done, and the size that the plugin reports for it: 0 where it reports none.
    ///
    /// # Safety
    /// `request` is the oldest unfinished request of its comm.
    pub(super) unsafe fn test(&self, request: *mut c_void) -> Result<Option<usize>> {
        let (mut done, mut size): (c_int, c_int) = (0, 0);
        // SAFETY: by the caller's contract.
        self.request("test", || unsafe { self.table.test(request, &mut done, &mut size) })?;
        Ok((done != 0).then_some(usize::try_from(size).unwrap_or(0)))
    }

    /// # Safety
    /// `request` is the oldest completed and unconsumed receive of `comm`, and nothing reads its bounce memory any more.
    pub(super) unsafe fn consumed(&self, comm: *mut c_void, request: *mut c_void) -> Result<()> {
        // Plugins without a device side have no such call, and nothing to consume.
        // SAFETY: by the caller's contract.
        self.request("irecvConsumed", || Some(unsafe { self.table.consumed(comm, request) }.unwrap_or(abi::NCCL_SUCCESS)))
    }

    /// Asks for a doorbell; `false` when the plugin has none.
    ///
    /// # Safety
    /// `comm` is live; `armed` and `fd` stay valid until it is closed.
    pub(super) unsafe fn set_doorbell(&self, comm: *mut c_void, armed: *mut u32, fd: c_int) -> Result<bool> {
        let Some(call) = self.ext.and_then(|e| e.set_doorbell) else { return Ok(false) };
        // SAFETY: by the caller's contract.
        self.request("setDoorbell", || Some(unsafe { call(comm, armed, fd) }))?;
        Ok(true)
    }

    /// Bytes of the comm that the network has taken over (send) or delivered (receive); `None` where the plugin cannot say.
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

    /// A line about the comm for error texts; `None` where the plugin has none.
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

    /// # Safety
    /// `comm` is a live comm of that kind; it is not used afterwards.
    pub(super) unsafe fn close(&self, kind: CommKind, comm: *mut c_void) {
        // SAFETY: by the caller's contract.
        let call = || unsafe {
            match kind {
                CommKind::Send => self.table.close_send(comm),
                CommKind::Recv => self.table.close_recv(comm),
                CommKind::Listen => self.table.close_listen(comm),
            }
        };
        if let Err(e) = self.set_up("close", call) {
            log::debug!("{e}");
        }
    }
}

/// Which close function a comm needs.
#[derive(Clone, Copy)]
pub(super) enum CommKind {
    Send,
    Recv,
    Listen,
}

fn load_once(path: Option<&Path>, load: impl FnOnce() -> Result<Plugin>) -> Result<Arc<Plugin>> {
    static LOADED: Mutex<Vec<Arc<Plugin>>> = Mutex::new(Vec::new());
    let mut loaded = LOADED.lock();
    if let Some(plugin) = loaded.iter().find(|p| p.path.as_deref() == path) {
        return Ok(plugin.clone());
    }
    let plugin = Arc::new(load()?);
    loaded.push(plugin.clone());
    Ok(plugin)
}

/// What must be in the environment before a plugin's `init`.
fn prepare_environment(config: &Config) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let set_default = |name: &str, value: String| {
            if std::env::var_os(name).is_none_or(|v| v.is_empty() || v == "0") {
                // SAFETY: once per process, before any plugin is initialised. Another thread that reads the environment through the
                // C library at this very moment is the user's to avoid, as with NCCL itself.
                unsafe { std::env::set_var(name, value) };
            }
        };
        // With its default of 0, TCPX never moves anything.
        set_default("NCCL_DYNAMIC_CHUNK_SIZE", config.chunk_bytes.max(512 << 10).to_string());
    });
}
