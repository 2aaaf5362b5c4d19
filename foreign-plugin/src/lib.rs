//! A plugin for tests that behaves towards its caller like GPUDirect-TCPX, and ends the process where that would crash, corrupt data
//! or hang. It exports only `ncclNetPlugin_v7`, with Google's table name. Device memory is simulated by host memory, and so are the
//! bounce buffers.
//!
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

use nccl_net_abi::ncclNet_v7;

/// The plugin table, v7.
#[no_mangle]
#[allow(non_upper_case_globals)]
pub static ncclNetPlugin_v7: ncclNet_v7 = ncclNet_v7 {
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
