//! The second contract: GPUDirect-TCPXO, whose table is called FasTrak. It delivers at the posted address, in device memory alone. A
//! comm goes on reading and writing the memory of its unfinished requests after it was closed, until that memory is deregistered.
//!
//! - `setup`: listen, connect and accept; connect keeps its state and a pointer in the handle
//! - `memory`: registrations
//! - `comm`: requests and their bytes, in turn over the flows of a comm
//! - `late`: what a closed comm still does
//! - `abi`: the C entries
//!
//! # The contract, and the case of tests/tcpxo.rs that breaks or shows each rule
//! | rule | case |
//! |---|---|
//! | v7, the name begins with FasTrak, devices of type HOST, no memory behind a device handle, no irecvConsumed | `table` |
//! | init has a logger, the receive manager, an answer of it, and a current GPU, or ends the process | `null_logger`, `no_manager`, `init_without_an_answer`, `init_without_a_gpu` |
//! | getProperties, listen, connect, accept and closeListen follow the current GPU | `properties_without_a_gpu`, `listen_without_a_gpu`, `connect_with_another_gpu`, `accept_with_another_gpu`, `close_listen_with_another_gpu` |
//! | listen waits until every flow listens | `a_listen_waits_for_the_offload` |
//! | a listen comm accepts once, and is not closed while it does | `accept_twice`, `close_listen_early` |
//! | connect keeps state and a pointer in the handle, and checks no more than version and GPU | `forged_state`, `connect_after_its_end` |
//! | with rail alignment connect takes the NIC of the peer's GPU | `another_rail` |
//! | connect and accept write a device handle where they are pointed to | `null_device_handle`, `null_device_handle_of_accept` |
//! | set-up calls run one at a time | `two_threads` |
//! | registrations are whole pages of GPU memory, found by NIC and address until they are dropped | `misaligned_base`, `misaligned_size`, `beyond_the_end`, `freed_before_it_was_dropped`, `came_back_before_it_was_dropped`, `used_after_deregistration`, `deregistered_with_another_nic`, `outside_of_registration`, `receive_outside` |
//! | a deregistration that failed is over | `dropped_again_after_an_error`, `answers_that_are_none` |
//! | messages are of GPU memory, one at a time, of 1 byte or more | `host_send`, `host_receive`, `two_at_once`, `empty_message` |
//! | requests take flows in turn: same order and number at both ends, no limit, any order of tests | `other_order`, `many_in_flight`, `any_order_of_tests` |
//! | a message lies at the posted address; a receive may be larger, not smaller, and tells what came | `messages_arrive_in_place`, `too_small` |
//! | a request is not tested again once it was done or has failed | `tested_twice`, `tested_after_an_error`, `a_dead_peer_is_an_error_of_test` |
//! | iflush leaves the request as it was | `flush_with_a_request` |
//! | a closed comm goes on with its requests until the memory is deregistered | `writes_after_the_close`, `sends_after_the_close`, `deregistered_in_flight` |
//! | a comm is closed once, as what it is, and not used afterwards | `closed_as_the_other`, `used_after_close`, `tested_after_close` |
//!
//! Stricter than the plugin, which ignores them: tags must agree at both ends, and a connect that would change its NIC ends the process.
//! Not modelled: the plugin's destructor, since no plugin is ever unloaded; its own search for GPUs and NICs, for which the library looks
//! before (src/net/tcpxo.rs); how long init waits for a manager that is absent; timeouts of the offload, which are minutes and hours.

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
