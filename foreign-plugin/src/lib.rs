//! A plugin for tests that behaves as GPUDirect-TCPX does towards its caller, and ends the process where that would crash, corrupt or
//! hang. It exports `ncclNetPlugin_v7` under Google's table name and nothing else. Device memory is simulated: host memory serves as
//! such, and the bounce buffers are host memory too.
//!
//! - `rules`: the end of the process, the one-thread rule of set-up, settings and counters
//! - `setup`: listen, connect and accept, with threads of their own
//! - `memory`: registrations, and the receive memory that comms share
//! - `comm`: requests and their bytes
//! - `late`: sends from memory that the kernel reads until the peer has acknowledged them
//! - `flows`: the flow rule of each data socket
//! - `logger`: the logger that it was given
//! - `abi`: the C entries

#[allow(missing_docs, clippy::missing_safety_doc, reason = "the entries are documented by the tables of nccl-net-abi")]
mod abi;
mod comm;
pub mod flows;
mod gpu;
mod late;
mod logger;
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
