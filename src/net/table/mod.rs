//! The tables of NCCL net plugins behind one trait for all versions; `versions` adapts what differs. Calls only: `comm` keeps
//! their order, `plugin` handles locks and signals.

mod context;
mod ext;
#[cfg(test)]
mod tests;
mod versions;

pub(super) use ext::Ext;

use context::WithContext;
use nccl_net_abi as abi;
use nccl_net_abi::{ncclDebugLogger_t, ncclNetDeviceHandle_v7, ncclResult_t};
use std::ffi::{c_char, c_int, c_void, CStr};
use std::num::NonZeroUsize;

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
    /// Largest message; `None` if the table does not say.
    pub max_message: Option<NonZeroUsize>,
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
        size: usize,
        tag: c_int,
        mhandle: *mut c_void,
        request: &mut *mut c_void,
    ) -> Answer;
    unsafe fn irecv(
        &self,
        comm: *mut c_void,
        data: *mut c_void,
        size: usize,
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
    /// `size` is an int in every version: that of a larger message is wrong.
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

/// The newest table that a loaded library exports. Newest first, as NCCL looks: if an application runs NCCL over the same plugin, both
/// use one table, and only from version 11 on may `init` be called by several users of a process. Newer tables also pass more on:
/// larger sizes, and registrations that serve every comm.
///
/// # Safety
/// The library is a NCCL net plugin and is never unloaded.
pub(super) unsafe fn find(library: &'static libloading::Library) -> Option<&'static dyn NetTable> {
    // SAFETY: data symbols with the types that NCCL's ext-net contract fixes for these names.
    unsafe {
        if let Some(table) = symbol::<abi::ncclNet_v12>(library, abi::SYMBOL_V12) {
            return Some(Box::leak(Box::new(WithContext::new(table))));
        }
        if let Some(table) = symbol::<abi::ncclNet_v11>(library, abi::SYMBOL_V11) {
            return Some(Box::leak(Box::new(WithContext::new(table))));
        }
        if let Some(table) = symbol::<abi::ncclNet_v10>(library, abi::SYMBOL_V10) {
            return Some(table);
        }
        if let Some(table) = symbol::<abi::ncclNet_v9>(library, abi::SYMBOL_V9) {
            return Some(table);
        }
        if let Some(table) = symbol::<abi::ncclNet_v8>(library, abi::SYMBOL_V8) {
            return Some(table);
        }
        symbol::<abi::ncclNet_v7>(library, abi::SYMBOL_V7).map(|table| table as &dyn NetTable)
    }
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
