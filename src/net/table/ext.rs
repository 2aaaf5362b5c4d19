//! The extension table of the software plugin, independent of its version: a call that the plugin's table lacks is `None`.

use nccl_net_abi as abi;
use nccl_net_abi::{ncclResult_t, ucclIoVec, ucclNetExt_v2};
use std::ffi::{c_char, c_int, c_void};

type VectoredFn = unsafe extern "C" fn(*mut c_void, c_int, *const ucclIoVec, c_int, *mut *mut c_void) -> ncclResult_t;

type ConnectRecvFn =
    unsafe extern "C" fn(c_int, *mut c_void, *mut *mut c_void, *mut *mut abi::ncclNetDeviceHandle_v7) -> ncclResult_t;

/// The software plugin's extension of the NCCL contract.
#[derive(Clone, Copy)]
pub(in crate::net) struct Ext {
    /// Sends and receives with several segments.
    pub vectored: Option<(VectoredFn, VectoredFn)>,
    pub set_doorbell: Option<unsafe extern "C" fn(*mut c_void, *mut u32, c_int) -> ncclResult_t>,
    /// Bytes of a comm that were acknowledged or delivered.
    pub progress: Option<unsafe extern "C" fn(*mut c_void, *mut u64) -> ncclResult_t>,
    /// Abandons the connect with this handle buffer.
    pub abandon_connect: Option<unsafe extern "C" fn(*mut c_void) -> ncclResult_t>,
    /// The kernel's statistics of a comm's connection.
    pub info: Option<unsafe extern "C" fn(*mut c_void, *mut abi::ucclCommInfo) -> ncclResult_t>,
    /// A line about a comm, for error texts.
    pub describe: Option<unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> ncclResult_t>,
    /// Lets a listen comm accept only a peer that proves a key.
    pub key_listen: Option<unsafe extern "C" fn(*mut c_void, *const u8) -> ncclResult_t>,
    /// Lets the connect with a handle buffer prove a key.
    pub key_connect: Option<unsafe extern "C" fn(*mut c_void, *const u8) -> ncclResult_t>,
    /// Protects the messages of a comm.
    pub protect: Option<unsafe extern "C" fn(*mut c_void, c_int, *const u8) -> ncclResult_t>,
    /// Whether a device can carry new connections.
    pub ready: Option<unsafe extern "C" fn(c_int) -> ncclResult_t>,
    /// Lets a listen comm serve a connection of each direction.
    pub listen_both: Option<unsafe extern "C" fn(*mut c_void, *const u8) -> ncclResult_t>,
    /// Accept and connect with the direction reversed.
    pub accept_send: Option<unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> ncclResult_t>,
    pub connect_recv: Option<ConnectRecvFn>,
    /// Progress of a send comm's bytes.
    pub flow: Option<unsafe extern "C" fn(*mut c_void, *mut abi::ucclFlow) -> ncclResult_t>,
    /// Limits the rate of a send comm.
    pub pace: Option<unsafe extern "C" fn(*mut c_void, u64) -> ncclResult_t>,
}

impl From<&ucclNetExt_v2> for Ext {
    fn from(t: &ucclNetExt_v2) -> Ext {
        Ext {
            vectored: t.isendv.zip(t.irecvv),
            set_doorbell: t.setDoorbell,
            progress: t.progress,
            abandon_connect: t.abandonConnect,
            describe: t.describe,
            info: t.info,
            key_listen: t.keyListen,
            key_connect: t.keyConnect,
            protect: t.protect,
            ready: t.ready,
            listen_both: t.listenBoth,
            accept_send: t.acceptSend,
            connect_recv: t.connectRecv,
            flow: t.flow,
            pace: t.pace,
        }
    }
}

impl Ext {
    /// The extension of the built-in software plugin.
    pub(in crate::net) fn built_in() -> Ext {
        Ext::from(soft_plugin::ext())
    }

    /// The extension of device memory TCP.
    pub(in crate::net) fn for_device_memory() -> Ext {
        Ext::from(soft_plugin::device_ext())
    }

    /// The extension that a loaded library exports.
    ///
    /// # Safety
    /// The library is never unloaded.
    pub(in crate::net) unsafe fn find(library: &'static libloading::Library) -> Option<Ext> {
        // SAFETY: the type that this symbol has; `size` says how much of the table exists.
        let table = unsafe { super::symbol::<ucclNetExt_v2>(library, abi::SYMBOL_EXT) }?;
        (table.size >= std::mem::size_of::<ucclNetExt_v2>()).then(|| Ext::from(table))
    }
}
