//! The NCCL net plugin ABI over ordinary kernel TCP, with the request semantics of GPUDirect-TCPX: sixteen requests a comm,
//! FIFO completion, bounce buffers with descriptors for device memory, `irecvConsumed`.
//!
//! - `abi`: the entries of the C tables; `state`, `config`, `logger`: per-process state
//! - `interfaces`, `rendezvous`, `tcp`, `congestion`, `unsent`: devices, connecting two of them, and their sockets
//! - `slot`, `ledger`: requests and their states; `send`, `recv`, `quantum`, `fragment`: moving their bytes; `pool`,
//!   `adaptive_spin`: the I/O threads; `comm` combines them
//! - `protect`: checksums and encryption of messages
//! - `device`, `cuda`, `emulated`: the interface to device memory
//! - `devmem`: device memory TCP, where the NIC reads and writes device memory
//!
//! # Fork
//! A forked child may make its own comms. Calls on its parent's comms are errors there, and closing them closes only the child's copy.
//!
//! # Thread rules
//! Any thread may post to, test or consume a comm. Closing a comm must be the last call on it and its requests.

#[allow(missing_docs, reason = "the entries are documented by the tables of nccl-net-abi")]
mod abi;
mod adaptive_spin;
mod comm;
mod config;
mod congestion;
mod cuda;
mod device;
mod devmem;
mod emulated;
mod fragment;
pub mod interfaces;
mod ledger;
mod logger;
mod pool;
mod protect;
mod quantum;
mod recv;
mod rendezvous;
mod send;
mod slot;
mod state;
mod tcp;
mod unsent;

pub use abi::device_memory::{prepare as prepare_device_memory, try_export as try_device_memory_export};
pub use config::{default_number, Kind, Variable, VARIABLES};
pub use emulated::Block as EmulatedMemory;

/// The name of the table for device memory TCP.
pub const DEVICE_MEMORY: &str = "TCP-devmem";

/// The address that a handle of the software plugin names; `None` for other bytes.
pub fn address_of(handle: &[u8; nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE]) -> Option<std::net::SocketAddr> {
    rendezvous::address_of(handle)
}

/// The range of UCCL_TCPX_PORT_RANGE in the environment now; `None` if unset or invalid.
pub fn port_range() -> Option<std::ops::RangeInclusive<u16>> {
    config::Config::from_env().ok()?.ports
}

/// The socket of the agent for device memory TCP, if there is one.
pub fn device_memory_agent() -> Option<std::path::PathBuf> {
    devmem::agent(&config::Config::from_env().ok()?)
}

/// The interfaces that would be devices, too, but cannot carry data at present; `listed`: as the last call of `devices` found them.
pub fn absent_devices(listed: bool) -> Vec<String> {
    let Ok(global) = state::get() else { return Vec::new() };
    if !listed {
        global.refresh();
    }
    global.devices.absent()
}

/// The device with an address; `None` if the plugin has not found one yet.
pub fn device_of(ip: std::net::IpAddr) -> Option<String> {
    state::get().ok()?.devices.name_of(ip)
}

/// Checks every variable of the software plugin. The error names the variable.
///
/// # Errors
/// Those of `init`.
pub fn check_environment() -> Result<(), String> {
    let config = config::Config::from_env()?;
    congestion::check(&config).map_err(|e| format!("UCCL_TCPX_SOFT_CONGESTION: {e}"))
}

use abi::{device_memory, requests};
use nccl_net_abi::{ncclNet_v7, ncclNet_v8, ucclNetExt_v2};

macro_rules! net_table {
    ($table:ident, $properties:ident, $reg_mr:ident) => {
        $table {
            name: c"TCPX-soft".as_ptr(),
            init: Some(abi::init),
            devices: Some(abi::devices),
            getProperties: Some(abi::$properties),
            listen: Some(abi::listen),
            connect: Some(abi::connect),
            accept: Some(abi::accept),
            regMr: Some(abi::$reg_mr),
            regMrDmaBuf: None,
            deregMr: Some(abi::dereg_mr),
            isend: Some(requests::isend),
            irecv: Some(requests::irecv),
            iflush: Some(requests::iflush),
            test: Some(requests::test),
            closeSend: Some(abi::close_send),
            closeRecv: Some(abi::close_recv),
            closeListen: Some(abi::close_listen),
            getDeviceMr: Some(abi::get_device_mr),
            irecvConsumed: Some(requests::consumed),
        }
    };
}

/// The v7 table, as a value for a data symbol.
pub const TABLE_V7: ncclNet_v7 = net_table!(ncclNet_v7, properties_v7, reg_mr_v7);
/// The table for device memory TCP, as a value for a data symbol.
pub const DEVICE_TABLE: ncclNet_v7 = ncclNet_v7 {
    name: c"TCP-devmem".as_ptr(),
    init: Some(device_memory::init),
    devices: Some(device_memory::devices),
    getProperties: Some(device_memory::properties_v7),
    listen: Some(device_memory::listen),
    connect: Some(device_memory::connect),
    ..TABLE_V7
};
const DEVICE_EXT: ucclNetExt_v2 = ucclNetExt_v2 {
    isendv: None,
    irecvv: None,
    ready: Some(device_memory::ready),
    connectRecv: Some(device_memory::connect_recv),
    ..EXT_V2
};
/// The extension table, as a value for a data symbol.
pub const EXT_V2: ucclNetExt_v2 = ucclNetExt_v2 {
    size: size_of::<ucclNetExt_v2>(),
    isendv: Some(requests::isendv),
    irecvv: Some(requests::irecvv),
    setDoorbell: Some(requests::set_doorbell),
    progress: Some(abi::progress),
    abandonConnect: Some(abi::abandon_connect),
    describe: Some(abi::describe),
    info: Some(abi::info),
    keyListen: Some(abi::key_listen),
    keyConnect: Some(abi::key_connect),
    protect: Some(abi::protect),
    ready: Some(abi::ready),
    listenBoth: Some(abi::listen_both),
    acceptSend: Some(abi::accept_send),
    connectRecv: Some(abi::connect_recv),
    flow: Some(abi::flow),
    pace: Some(abi::pace),
};

/// The plugin's v7 table.
pub fn table() -> &'static ncclNet_v7 {
    static TABLE: ncclNet_v7 = TABLE_V7;
    &TABLE
}

/// The table for device memory TCP: the comms of the software plugin, but that the NIC writes and reads device memory, and they carry no other.
pub fn device_table() -> &'static ncclNet_v7 {
    static TABLE: ncclNet_v7 = DEVICE_TABLE;
    &TABLE
}

/// The extension table for device memory TCP.
pub fn device_ext() -> &'static ucclNetExt_v2 {
    static TABLE: ucclNetExt_v2 = DEVICE_EXT;
    &TABLE
}

/// The plugin's v8 table.
pub fn table_v8() -> &'static ncclNet_v8 {
    static TABLE: ncclNet_v8 = net_table!(ncclNet_v8, properties_v8, reg_mr_v8);
    &TABLE
}

/// The plugin's extension table.
pub fn ext() -> &'static ucclNetExt_v2 {
    static TABLE: ucclNetExt_v2 = EXT_V2;
    &TABLE
}
