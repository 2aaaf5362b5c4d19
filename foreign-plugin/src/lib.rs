//! A plugin for tests that behaves towards its caller like GPUDirect-TCPX, and ends the process where that would crash, corrupt data
//! or hang. It exports only `ncclNetPlugin_v7`, with Google's table name. Device memory is simulated by host memory, and so are the
//! bounce buffers. With `STRICT_FOREIGN_CONTRACT=tcpxo` it keeps the contract of GPUDirect-TCPXO in its place.
//!
//! - `tcpxo`: the second contract; everything else is of the first, or of both
//! - `rules`: violations, the one-thread rule of set-up, settings and counters
//! - `setup`: listen, connect and accept, with their own threads
//! - `memory`: registrations, and the receive memory that comms share
//! - `comm`: requests and their bytes
//! - `late`: sends from memory that the kernel reads until the peer has acknowledged them
//! - `flows`: the flow rule of each data socket
//! - `manager`: the receive manager
//! - `logger`: the caller's logger
//! - `abi`: the C entries

#[allow(missing_docs, clippy::missing_safety_doc, reason = "the entries are documented by the tables of nccl-net-abi")]
mod abi;
mod comm;
pub mod flows;
mod gpu;
mod late;
mod logger;
mod manager;
mod memory;
pub mod rules;
mod setup;
pub mod tcpxo;

use nccl_net_abi::ncclNet_v7;
use std::cell::UnsafeCell;

/// The plugin table of the first contract, v7.
pub static TCPX: ncclNet_v7 = ncclNet_v7 {
    name: c"GPUDirectTCPX_v7".as_ptr(),
    init: Some(abi::init),
    devices: Some(abi::devices),
    getProperties: Some(abi::properties),
    listen: Some(abi::listen),
    connect: Some(abi::connect),
    accept: Some(abi::accept),
    regMr: Some(abi::reg_mr),
    regMrDmaBuf: None,
    deregMr: Some(abi::dereg_mr),
    isend: Some(abi::isend),
    irecv: Some(abi::irecv),
    iflush: None,
    test: Some(abi::test),
    closeSend: Some(abi::close_send),
    closeRecv: Some(abi::close_recv),
    closeListen: Some(abi::close_listen),
    getDeviceMr: None,
    irecvConsumed: Some(abi::consumed),
};

/// A table that is decided when the library is loaded.
#[repr(transparent)]
pub struct Exported(UnsafeCell<ncclNet_v7>);
// SAFETY: written by the loader's thread alone, before any other can read it.
unsafe impl Sync for Exported {}

/// The plugin table, v7, of the contract that `STRICT_FOREIGN_CONTRACT` names.
#[no_mangle]
#[allow(non_upper_case_globals)]
pub static ncclNetPlugin_v7: Exported = Exported(UnsafeCell::new(ncclNet_v7 { ..TCPX }));

#[used]
#[link_section = ".init_array"]
static AT_LOAD: extern "C" fn() = choose;

extern "C" fn choose() {
    if rules::text("STRICT_FOREIGN_CONTRACT").is_some_and(|contract| contract == "tcpxo") {
        // SAFETY: the library is being loaded.
        unsafe { *ncclNetPlugin_v7.0.get() = tcpxo::TABLE };
    }
}
