//! The tables of NCCL net plugins behind one trait for all versions; `v7` and `v8` adapt what differs. Calls only: `comm` keeps
//! their order, `plugin` handles locks and signals.

mod ext;
mod v7;
mod v8;

pub(super) use ext::Ext;

use nccl_net_abi as abi;
use nccl_net_abi::{ncclDebugLogger_t, ncclNetDeviceHandle_v7, ncclResult_t};
use std::ffi::{c_char, c_int, c_void, CStr};

/// A result code, or `None` when the table lacks the call.
pub(super) type Answer = Option<ncclResult_t>;

/// A device's properties from a table.
#[derive(Clone, Debug, Default)]
pub(super) struct Properties {
    pub name: Option<String>,
    pub pci_path: Option<String>,
    pub speed_mbps: i32,
    pub ptr_support: i32,
    pub reg_is_global: bool,
    pub device_type: i32,
}

/// A plugin's table, of any version.
///
/// The unsafe calls carry the contract of the NCCL net plugin: live comms, writable outputs, the order of calls.
#[allow(clippy::missing_safety_doc, reason = "one contract for all, stated above")]
pub(super) trait NetTable: Sync {
    fn version(&self) -> u32;
    fn name(&self) -> String;
    unsafe fn init(&self, logger: ncclDebugLogger_t) -> Answer;
    unsafe fn devices(&self, n: &mut c_int) -> Answer;
    unsafe fn properties(&self, dev: c_int, out: &mut Properties) -> Answer;
    unsafe fn listen(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer;
    unsafe fn connect(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer;
    unsafe fn accept(&self, listen: *mut c_void, dev_handle: *mut ncclNetDeviceHandle_v7, comm: &mut *mut c_void) -> Answer;
    unsafe fn reg_mr(&self, comm: *mut c_void, data: *mut c_void, size: usize, kind: c_int, out: &mut *mut c_void) -> Answer;
    unsafe fn dereg_mr(&self, comm: *mut c_void, mhandle: *mut c_void) -> Answer;
    unsafe fn isend(
        &self,
        comm: *mut c_void,
        data: *mut c_void,
        size: c_int,
        tag: c_int,
        mhandle: *mut c_void,
        request: &mut *mut c_void,
    ) -> Answer;
    unsafe fn irecv(
        &self,
        comm: *mut c_void,
        data: *mut c_void,
        size: c_int,
        tag: c_int,
        mhandle: *mut c_void,
        request: &mut *mut c_void,
    ) -> Answer;
    /// Leaves `request` null where nothing is to be waited for.
    unsafe fn flush(
        &self,
        comm: *mut c_void,
        data: *mut c_void,
        size: c_int,
        mhandle: *mut c_void,
        request: &mut *mut c_void,
    ) -> Answer;
    unsafe fn test(&self, request: *mut c_void, done: &mut c_int, size: &mut c_int) -> Answer;
    unsafe fn close_send(&self, comm: *mut c_void) -> Answer;
    unsafe fn close_recv(&self, comm: *mut c_void) -> Answer;
    unsafe fn close_listen(&self, comm: *mut c_void) -> Answer;
    unsafe fn consumed(&self, comm: *mut c_void, request: *mut c_void) -> Answer;
}

/// A C string of the plugin's, or `None` for null.
fn text(p: *const c_char) -> Option<String> {
    // SAFETY: strings of tables and properties are C strings owned by the plugin, or null.
    (!p.is_null()).then(|| unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned())
}

/// The calls that are the same in all versions.
macro_rules! calls_alike {
    () => {
        fn name(&self) -> String {
            super::text(self.name).unwrap_or_else(|| "unnamed".to_owned())
        }
        unsafe fn init(&self, logger: ncclDebugLogger_t) -> Answer {
            // SAFETY: by the trait's contract, here and below.
            self.init.map(|call| unsafe { call(logger) })
        }
        unsafe fn devices(&self, n: &mut c_int) -> Answer {
            // SAFETY: as above; n is writable.
            self.devices.map(|call| unsafe { call(n) })
        }
        unsafe fn listen(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer {
            // SAFETY: as above.
            self.listen.map(|call| unsafe { call(dev, handle, comm) })
        }
        unsafe fn connect(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer {
            // Senders have nothing to unpack: the plugin requires the argument and ignores it.
            let mut dev_handle: *mut ncclNetDeviceHandle_v7 = std::ptr::null_mut();
            // SAFETY: as above.
            self.connect.map(|call| unsafe { call(dev, handle, comm, &mut dev_handle) })
        }
        unsafe fn accept(&self, listen: *mut c_void, dev_handle: *mut ncclNetDeviceHandle_v7, comm: &mut *mut c_void) -> Answer {
            let mut dev_handle = dev_handle;
            // SAFETY: as above.
            self.accept.map(|call| unsafe { call(listen, comm, &mut dev_handle) })
        }
        unsafe fn dereg_mr(&self, comm: *mut c_void, mhandle: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.deregMr.map(|call| unsafe { call(comm, mhandle) })
        }
        unsafe fn isend(
            &self,
            comm: *mut c_void,
            data: *mut c_void,
            size: c_int,
            tag: c_int,
            mhandle: *mut c_void,
            request: &mut *mut c_void,
        ) -> Answer {
            // SAFETY: as above.
            self.isend.map(|call| unsafe { call(comm, data, size, tag, mhandle, request) })
        }
        unsafe fn irecv(
            &self,
            comm: *mut c_void,
            data: *mut c_void,
            size: c_int,
            tag: c_int,
            mhandle: *mut c_void,
            request: &mut *mut c_void,
        ) -> Answer {
            let (mut data, mut size, mut tag, mut mhandle) = (data, size, tag, mhandle);
            // SAFETY: as above; arrays of one.
            self.irecv.map(|call| unsafe { call(comm, 1, &mut data, &mut size, &mut tag, &mut mhandle, request) })
        }
        unsafe fn flush(
            &self,
            comm: *mut c_void,
            data: *mut c_void,
            size: c_int,
            mhandle: *mut c_void,
            request: &mut *mut c_void,
        ) -> Answer {
            let (mut data, mut size, mut mhandle) = (data, size, mhandle);
            // SAFETY: as above; arrays of one.
            self.iflush.map(|call| unsafe { call(comm, 1, &mut data, &mut size, &mut mhandle, request) })
        }
        unsafe fn test(&self, request: *mut c_void, done: &mut c_int, size: &mut c_int) -> Answer {
            // SAFETY: as above.
            self.test.map(|call| unsafe { call(request, done, size) })
        }
        unsafe fn close_send(&self, comm: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.closeSend.map(|call| unsafe { call(comm) })
        }
        unsafe fn close_recv(&self, comm: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.closeRecv.map(|call| unsafe { call(comm) })
        }
        unsafe fn close_listen(&self, comm: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.closeListen.map(|call| unsafe { call(comm) })
        }
        unsafe fn consumed(&self, comm: *mut c_void, request: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.irecvConsumed.map(|call| unsafe { call(comm, 1, request) })
        }
    };
}
use calls_alike;

/// The newest table that a loaded library exports.
///
/// # Safety
/// The library is a NCCL net plugin and is never unloaded.
pub(super) unsafe fn find(library: &'static libloading::Library) -> Option<&'static dyn NetTable> {
    // SAFETY: data symbols with the types that NCCL's ext-net contract fixes for these names.
    if let Some(v8) = unsafe { symbol::<abi::ncclNet_v8>(library, abi::SYMBOL_V8) } {
        return Some(v8);
    }
    // SAFETY: as above.
    unsafe { symbol::<abi::ncclNet_v7>(library, abi::SYMBOL_V7) }.map(|t| t as &dyn NetTable)
}

/// A data symbol: its address is the object itself.
///
/// # Safety
/// The symbol, where it exists, has type `T`, and the library is never unloaded.
unsafe fn symbol<T>(library: &'static libloading::Library, name: &[u8]) -> Option<&'static T> {
    // SAFETY: only the address is taken here.
    let address = unsafe { library.get::<*const T>(name).ok()?.into_raw() }.into_raw();
    // SAFETY: by the caller's contract; null is refused.
    unsafe { address.cast::<T>().as_ref() }
}
