//! The second contract: GPUDirect-TCPXO, whose table is called FasTrak. It delivers at the posted address, in device memory alone. A
//! comm goes on reading and writing the memory of its unfinished requests after it was closed, until that memory is deregistered.
//!
//! - `setup`: listen, connect and accept; connect keeps its state and a pointer in the handle
//! - `memory`: registrations
//! - `comm`: requests and their bytes, in turn over the flows of a comm
//! - `late`: what a closed comm still does
//! - `abi`: the C entries

#[allow(missing_docs, clippy::missing_safety_doc, reason = "the entries are documented by the tables of nccl-net-abi")]
mod abi;
mod comm;
mod late;
mod memory;
mod setup;

use nccl_net_abi::ncclNet_v7;

/// The plugin table, v7.
pub static TABLE: ncclNet_v7 = ncclNet_v7 {
    name: c"FasTrak (simulated)".as_ptr(),
    init: Some(abi::init),
    devices: Some(crate::abi::devices),
    getProperties: Some(abi::properties),
    listen: Some(abi::listen),
    connect: Some(abi::connect),
    accept: Some(abi::accept),
    regMr: Some(abi::reg_mr),
    regMrDmaBuf: None,
    deregMr: Some(abi::dereg_mr),
    isend: Some(abi::isend),
    irecv: Some(abi::irecv),
    iflush: Some(abi::iflush),
    test: Some(abi::test),
    closeSend: Some(abi::close_send),
    closeRecv: Some(abi::close_recv),
    closeListen: Some(abi::close_listen),
    getDeviceMr: None,
    irecvConsumed: None,
};
