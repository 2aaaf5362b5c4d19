//! Loading a NCCL net plugin and calling its table. A plugin is initialised once per process and never unloaded.

use crate::config::{Config, PluginChoice};
use crate::status::{bail, err, Result};
use nccl_net_abi as abi;
use nccl_net_abi::{ncclNetDeviceHandle_v7, ncclNet_v7, ncclNet_v8, ncclResult_t, ucclNetExt_v2};
use parking_lot::Mutex;
use std::ffi::{c_int, c_void, CStr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

/// Where Google's installer puts the TCPX plugin, in the order of trying.
pub const TCPX_PATHS: [&str; 2] = ["/usr/local/tcpx/lib64/libnccl-net-tcpx.so", "/var/lib/tcpx/lib64/libnccl-net.so"];

/// The two versions of the table that are understood.
#[derive(Clone, Copy)]
enum Table {
    V7(&'static ncclNet_v7),
    V8(&'static ncclNet_v8),
}

/// A member that both versions have alike.
macro_rules! member {
    ($plugin:expr, $name:ident) => {
        match $plugin.table {
            Table::V7(t) => t.$name,
            Table::V8(t) => t.$name,
        }
        .ok_or_else(|| err!(Plugin, "plugin {} has no {}", $plugin.name, stringify!($name)))
    };
}

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
    table: Table,
    ext: Option<&'static ucclNetExt_v2>,
    /// Name of the plugin's table.
    pub name: String,
    /// Where it was loaded from; `None` for the built-in software plugin.
    pub path: Option<PathBuf>,
    /// Version of the table, 7 or 8.
    pub abi_version: u32,
    /// Its devices.
    pub devices: Vec<Device>,
}

/// Turns a result into an error that names the call.
fn check(plugin: &Plugin, call: &str, result: ncclResult_t) -> Result<()> {
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
        return Err(err!(RemoteDisconnect, "plugin {}: {call} returned {result} ({why})", plugin.name));
    }
    Err(err!(Plugin, "plugin {}: {call} returned {result} ({why})", plugin.name))
}

impl Plugin {
    pub(super) fn check(&self, call: &str, result: ncclResult_t) -> Result<()> {
        check(self, call, result)
    }

    /// The built-in software plugin.
    pub(crate) fn soft(config: &Config) -> Result<Arc<Plugin>> {
        prepare_environment(config);
        load_once(None, || Plugin::start(Table::V7(soft_plugin::table()), Some(soft_plugin::ext()), None))
    }

    /// The plugin that the configuration chooses for device memory.
    pub(crate) fn choose(config: &Config) -> Result<Arc<Plugin>> {
        prepare_environment(config);
        let candidates: Vec<PathBuf> = match &config.plugin_path {
            Some(path) => vec![path.clone()],
            None => TCPX_PATHS.iter().map(PathBuf::from).collect(),
        };
        let found = candidates.iter().find(|p| p.exists());
        match (config.plugin, found, &config.plugin_path) {
            // An explicit path is taken at its word, whichever plugin it holds.
            (_, Some(path), Some(_)) => Plugin::load(path),
            (_, None, Some(path)) => bail!(PluginLoad, "UCCL_TCPX_PLUGIN_PATH={} does not exist", path.display()),
            (PluginChoice::Soft, _, None) => Plugin::soft(config),
            (PluginChoice::Auto, None, None) => Plugin::soft(config),
            (PluginChoice::Auto | PluginChoice::Tcpx, Some(path), None) => Plugin::load(path),
            (PluginChoice::Tcpx, None, None) => bail!(
                PluginLoad,
                "UCCL_TCPX_PLUGIN=tcpx, but the GPUDirect-TCPX plugin is not installed: looked for {} (set UCCL_TCPX_PLUGIN_PATH to name it, or UCCL_TCPX_PLUGIN=soft for ordinary TCP)",
                candidates.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" and ")
            ),
        }
    }

    fn load(path: &Path) -> Result<Arc<Plugin>> {
        load_once(Some(path), || {
            // SAFETY: loading runs the library's initialisers; the user chose the library.
            let library = match unsafe { libloading::Library::new(path) } {
                Ok(library) => library,
                Err(e) => bail!(PluginLoad, "{}: {e}", path.display()),
            };
            // A plugin has threads of its own and cannot be unloaded.
            let library: &'static libloading::Library = Box::leak(Box::new(library));
            // SAFETY: data symbols with the types that NCCL's ext-net contract fixes for these names.
            let (v8, v7, ext) = unsafe {
                (
                    library.get::<*const ncclNet_v8>(abi::SYMBOL_V8).ok().map(|s| s.into_raw().into_raw()),
                    library.get::<*const ncclNet_v7>(abi::SYMBOL_V7).ok().map(|s| s.into_raw().into_raw()),
                    library.get::<*const ucclNetExt_v2>(abi::SYMBOL_EXT).ok().map(|s| s.into_raw().into_raw()),
                )
            };
            // SAFETY: the symbols' addresses are the tables themselves; the library is never unloaded.
            let table = unsafe {
                match (v8, v7) {
                    (Some(v8), _) if !v8.is_null() => Table::V8(&*v8.cast::<ncclNet_v8>()),
                    (_, Some(v7)) if !v7.is_null() => Table::V7(&*v7.cast::<ncclNet_v7>()),
                    _ => bail!(PluginLoad, "{}: exports neither ncclNetPlugin_v8 nor ncclNetPlugin_v7", path.display()),
                }
            };
            // SAFETY: as above; `size` says how much of the table exists.
            let ext = ext.filter(|p| !p.is_null()).map(|p| unsafe { &*p.cast::<ucclNetExt_v2>() });
            Plugin::start(table, ext.filter(|e| e.size >= std::mem::size_of::<ucclNetExt_v2>()), Some(path.to_owned()))
        })
    }

    fn start(table: Table, ext: Option<&'static ucclNetExt_v2>, path: Option<PathBuf>) -> Result<Plugin> {
        let (name, abi_version) = match table {
            Table::V7(t) => (t.name, 7),
            Table::V8(t) => (t.name, 8),
        };
        let name = if name.is_null() {
            "unnamed".to_owned()
        } else {
            // SAFETY: the table's name is a C string where it is not null.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        let mut plugin = Plugin { table, ext, name, path, abi_version, devices: Vec::new() };
        let init = member!(plugin, init)?;
        // SAFETY: called once per process (load_once), first; the plugin accepts a null logger and logs by itself.
        let call = || check(&plugin, "init", unsafe { init(None) });
        match crate::gpu::current_name() {
            // Google's plugin follows the current GPU from its init on.
            Some(gpu) if ext.is_none() => crate::gpu::Gpu::open(gpu.ordinal)?.with(call)?,
            _ => call()?,
        }
        let mut n: c_int = 0;
        let devices = member!(plugin, devices)?;
        // SAFETY: n is writable.
        check(&plugin, "devices", unsafe { devices(&mut n) })?;
        plugin.devices = (0..n).map(|dev| plugin.properties(dev)).collect::<Result<_>>()?;
        Ok(plugin)
    }

    fn properties(&self, dev: c_int) -> Result<Device> {
        // SAFETY: strings of the properties are C strings owned by the plugin, or null.
        let text =
            |p: *const std::ffi::c_char| (!p.is_null()).then(|| unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned());
        macro_rules! read {
            ($table:expr, $props:ty) => {{
                let Some(get) = $table.getProperties else { bail!(Plugin, "plugin {} has no getProperties", self.name) };
                // SAFETY: plain data for which zeros are valid.
                let mut p: $props = unsafe { std::mem::zeroed() };
                // SAFETY: p is writable and dev below the number of devices.
                check(self, "getProperties", unsafe { get(dev, &mut p) })?;
                Device {
                    name: text(p.name).unwrap_or_else(|| format!("dev{dev}")),
                    pci_path: text(p.pciPath),
                    speed_mbps: p.speed,
                    ptr_support: p.ptrSupport,
                    unpack: p.netDeviceType == abi::NCCL_NET_DEVICE_UNPACK,
                }
            }};
        }
        Ok(match self.table {
            Table::V7(t) => read!(t, abi::ncclNetProperties_v7),
            Table::V8(t) => read!(t, abi::ncclNetProperties_v8),
        })
    }

    /// Whether the plugin offers the vectored extension.
    pub(crate) fn ext(&self) -> Option<&'static ucclNetExt_v2> {
        self.ext
    }

    /// The software plugin (built in or loaded), known by its extension.
    pub fn is_soft(&self) -> bool {
        self.ext.is_some()
    }

    /// "soft", "tcpx" or the table's name: what both sides of a connection must agree on.
    pub fn wire_name(&self) -> &str {
        if self.is_soft() {
            "soft"
        } else if self.name.to_ascii_lowercase().contains("tcpx") {
            "tcpx"
        } else {
            &self.name
        }
    }
}

/// The raw calls, one per member that the comms need. Rules of order live in `comm`.
impl Plugin {
    pub(super) fn listen(&self, dev: usize, handle: &mut [u8; abi::NCCL_NET_HANDLE_MAXSIZE]) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        let call = member!(self, listen)?;
        // SAFETY: handle is 128 writable bytes, comm is writable.
        check(self, "listen", unsafe { call(dev as c_int, handle.as_mut_ptr().cast(), &mut comm) })?;
        if comm.is_null() {
            bail!(Plugin, "plugin {}: listen gave no comm", self.name);
        }
        Ok(comm)
    }

    /// # Safety
    /// `handle` stays at its address between calls and is not used again after an error.
    pub(super) unsafe fn connect(&self, dev: usize, handle: *mut c_void) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        let mut dev_handle: *mut ncclNetDeviceHandle_v7 = std::ptr::null_mut();
        let call = member!(self, connect)?;
        // SAFETY: by the caller's contract; outputs are writable.
        check(self, "connect", unsafe { call(dev as c_int, handle, &mut comm, &mut dev_handle) })?;
        Ok(comm)
    }

    /// # Safety
    /// `listen` is a live listen comm that has not accepted yet; `dev_handle` outlives the resulting comm.
    pub(super) unsafe fn accept(&self, listen: *mut c_void, dev_handle: *mut ncclNetDeviceHandle_v7) -> Result<*mut c_void> {
        let mut comm = std::ptr::null_mut();
        let mut handle = dev_handle;
        let call = member!(self, accept)?;
        // SAFETY: by the caller's contract; outputs are writable.
        check(self, "accept", unsafe { call(listen, &mut comm, &mut handle) })?;
        Ok(comm)
    }

    /// # Safety
    /// `comm` is live; `[data, data + size)` stays mapped until the registration is dropped.
    pub(super) unsafe fn reg_mr(&self, comm: *mut c_void, data: *mut c_void, size: usize, kind: c_int) -> Result<*mut c_void> {
        let mut mhandle = std::ptr::null_mut();
        let result = match self.table {
            Table::V7(t) => {
                let Ok(size) = c_int::try_from(size) else { bail!(Internal, "piece of {size} bytes registered under v7") };
                let Some(call) = t.regMr else { bail!(Plugin, "plugin {} has no regMr", self.name) };
                // SAFETY: by the caller's contract.
                unsafe { call(comm, data, size, kind, &mut mhandle) }
            }
            Table::V8(t) => {
                let Some(call) = t.regMr else { bail!(Plugin, "plugin {} has no regMr", self.name) };
                // SAFETY: by the caller's contract.
                unsafe { call(comm, data, size, kind, &mut mhandle) }
            }
        };
        check(self, "regMr", result)?;
        Ok(mhandle)
    }

    /// # Safety
    /// `comm` and `mhandle` are live and no request uses the registration.
    pub(super) unsafe fn dereg_mr(&self, comm: *mut c_void, mhandle: *mut c_void) {
        let result = member!(self, deregMr).and_then(|call| {
            // SAFETY: by the caller's contract.
            check(self, "deregMr", unsafe { call(comm, mhandle) })
        });
        if let Err(e) = result {
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
        let call = member!(self, isend)?;
        // SAFETY: by the caller's contract.
        check(self, "isend", unsafe { call(comm, data, size as c_int, tag, mhandle, &mut request) })?;
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
        let (mut data, mut size, mut tag, mut mhandle) = (data, size as c_int, tag, mhandle);
        let call = member!(self, irecv)?;
        // SAFETY: by the caller's contract; arrays of one.
        check(self, "irecv", unsafe { call(comm, 1, &mut data, &mut size, &mut tag, &mut mhandle, &mut request) })?;
        Ok(request)
    }

    /// # Safety
    /// `request` is the oldest unfinished request of its comm.
    pub(super) unsafe fn test(&self, request: *mut c_void) -> Result<Option<Option<usize>>> {
        let (mut done, mut size): (c_int, c_int) = (0, -1);
        let call = member!(self, test)?;
        // SAFETY: by the caller's contract; outputs are writable.
        check(self, "test", unsafe { call(request, &mut done, &mut size) })?;
        // Some plugins write no size.
        Ok((done != 0).then(|| usize::try_from(size).ok()))
    }

    /// # Safety
    /// `request` is the oldest completed and unconsumed receive of `comm`, and nothing reads its bounce memory any more.
    pub(super) unsafe fn consumed(&self, comm: *mut c_void, request: *mut c_void) -> Result<()> {
        // Plugins without a device side have no such call, and nothing to consume.
        let Ok(call) = member!(self, irecvConsumed) else { return Ok(()) };
        // SAFETY: by the caller's contract.
        check(self, "irecvConsumed", unsafe { call(comm, 1, request) })
    }

    /// # Safety
    /// `comm` is a live comm of that kind; it is not used afterwards.
    pub(super) unsafe fn close(&self, kind: CommKind, comm: *mut c_void) {
        let call = match kind {
            CommKind::Send => member!(self, closeSend),
            CommKind::Recv => member!(self, closeRecv),
            CommKind::Listen => member!(self, closeListen),
        };
        let result = call.and_then(|call| {
            // SAFETY: by the caller's contract.
            check(self, "close", unsafe { call(comm) })
        });
        if let Err(e) = result {
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
