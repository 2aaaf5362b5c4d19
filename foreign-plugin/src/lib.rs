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
//!
//! # The contract of GPUDirect-TCPX, and the case of tests/rules.rs that breaks or shows each rule
//! | rule | case |
//! |---|---|
//! | init has a logger | `null_logger` |
//! | init, listen, connect, accept and regMr follow the current GPU | `init_without_a_gpu`, `listen_without_a_gpu`, `connect_without_a_gpu`; accept and regMr over real GPUs |
//! | connect keeps a pointer in the handle: a fresh one of this plugin with equal numbers of sockets and threads, always at one address | `wild_handle`, `stale_handle`, `forged_pointer`, `wrong_socket_count`, `wrong_thread_count`, `moved_handle` |
//! | a listen comm accepts once, with a device handle, and is not closed while it does | `accept_twice`, `no_device_handle`, `close_listen_early` |
//! | set-up calls run one at a time; the import of receive memory races otherwise | `two_threads`, `a_double_import_unmaps_what_the_first_comm_reads` |
//! | set-up takes its time in threads of the plugin | `set_up_takes_its_time` |
//! | without NCCL_DYNAMIC_CHUNK_SIZE nothing moves; a longer message is never whole; 2,048 fragments end the process | `nothing_moves`, `too_long`, `too_long_hangs`, `too_many_fragments_end_the_process_with_status_1` |
//! | registrations are whole pages on NICs with a PCI path, with descriptors free | `misaligned_base`, `misaligned_size`, `beyond_the_end`, `no_pci_device`, `no_descriptors`, `registered_twice`, `used_after_deregistration`, `deregistered_in_flight`, `outside_of_registration` |
//! | 16 requests a comm; the oldest is tested; a receive is consumed in order | `seventeenth_send`, `seventeenth_receive`, `done_is_not_consumed`, `send_tested_out_of_order`, `receive_tested_out_of_order`, `consumed_out_of_order`, `windows_and_order` |
//! | one message at a time, of 1 byte or more, into GPU memory; the posted size is not enforced | `two_at_once`, `empty_message`, `empty_receive`, `host_receive`, `host_receives_are_refused`, `sizes_are_not_enforced` |
//! | entries of any length, not sorted, in a queue that is unmapped with its comm | `one_message`, `a_meta_queue_is_unmapped_with_its_comm` |
//! | a dead peer is silence for what was announced; SIGPIPE reaches the caller; each test warns where memory lacks | `silence_after_death`, `sigpipe_reaches_the_caller`, `a_warning_every_test` |
//! | a comm is not used after its close; closeRecv on a data socket that was reset ends the process | `used_after_close`, `reset` |
//! | sends are read until the peer has acknowledged them (`STRICT_FOREIGN_LATE`) | `one_message`; tests/foreign.rs of the library |
//! | the receive manager is asked without a deadline, and accepts that fail keep their sockets | tests/foreign.rs: `frozen_*`, `wrong_answers`, `peer_dies` |
//!
//! Not modelled: that memory of another GPU is not unpacked from a comm's receive memory, since the caller's kernel unpacks; that the GPU
//! must order its reads of receive memory after the count of entries; cores that unfinished requests keep busy.

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
