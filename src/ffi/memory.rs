//! Registered memory of the C ABI, and how peers reach it: FIFO items and (empty) IPC descriptors. Translates only.

use super::engine::uccl_engine_t;
use super::guard::{guard, out_arg, status};
use super::handles::engines;
use crate::status::{bail, UCCL_OK};
use crate::types::RemoteAccess;
use std::ffi::{c_char, c_int, c_void};

pub use crate::engine::FifoItem;

/// A registered memory region. 0 is never valid.
#[allow(non_camel_case_types)]
pub type uccl_mr_t = u64;

/// Bytes of a serialised FIFO item.
#[allow(dead_code, reason = "for the header")]
pub const UCCL_FIFO_SIZE: usize = 64;
/// Bytes of an IPC descriptor.
pub const UCCL_IPC_INFO_SIZE: usize = 128;
/// Peers may read a region.
pub const UCCL_ACCESS_REMOTE_READ: u32 = 1;
/// Peers may write a region.
pub const UCCL_ACCESS_REMOTE_WRITE: u32 = 2;

const _: () = assert!(std::mem::size_of::<FifoItem>() == UCCL_FIFO_SIZE);

/// Registers memory for transfers of this engine, and for reads and writes of peers that hold a FIFO item of the region.
///
/// @param engine  [in]  The engine.
/// @param data    [in]  First byte, in host or GPU memory, any alignment.
/// @param size    [in]  Bytes, at least 1.
/// @param mr      [out] The region. Regions may overlap and repeat; each registration is a region of its own.
/// @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT (null, empty, wraps around), UCCL_ERR_GPU, UCCL_ERR_RESOURCE.
///
/// The caller keeps the memory mapped until uccl_engine_mr_destroy returns. Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_reg(engine: *mut uccl_engine_t, data: usize, size: usize, mr: *mut uccl_mr_t) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable pointer or null.
        let out = unsafe { out_arg(mr, "mr")? };
        *out = engines().get(engine.cast())?.register(data, size)?;
        Ok(UCCL_OK)
    })
}

/// Registers memory with the access that the flags give to peers.
///
/// @param engine  [in]  The engine.
/// @param data    [in]  First byte, in host or GPU memory, any alignment.
/// @param size    [in]  Bytes, at least 1.
/// @param access  [in]  UCCL_ACCESS_REMOTE_READ, UCCL_ACCESS_REMOTE_WRITE, or both; 0: peers have no access.
/// @param mr      [out] The region. uccl_engine_reg gives peers both rights.
/// @return As uccl_engine_reg; UCCL_ERR_INVALID_ARGUMENT for unknown flags.
///
/// Any other access by a peer fails with UCCL_ERR_REMOTE_ACCESS and moves nothing. The flags do not limit this engine's own transfers,
/// receives included.
///
/// The caller keeps the memory mapped until uccl_engine_mr_destroy returns. Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_reg_with(
    engine: *mut uccl_engine_t,
    data: usize,
    size: usize,
    access: u32,
    mr: *mut uccl_mr_t,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable pointer or null.
        let out = unsafe { out_arg(mr, "mr")? };
        let known = UCCL_ACCESS_REMOTE_READ | UCCL_ACCESS_REMOTE_WRITE;
        if access & !known != 0 {
            bail!(InvalidArgument, "access {access:#x} has unknown flags");
        }
        let access = RemoteAccess { read: access & UCCL_ACCESS_REMOTE_READ != 0, write: access & UCCL_ACCESS_REMOTE_WRITE != 0 };
        *out = engines().get(engine.cast())?.register_with(data, size, access)?;
        Ok(UCCL_OK)
    })
}

/// Deregisters a region. Waits for transfers that use it; after UCCL_TCPX_CLOSE_TIMEOUT_MS it fails those left and their connections.
/// Peers that use the region afterwards get UCCL_ERR_REMOTE_ACCESS.
///
/// @param engine  The engine. NULL, an engine of the parent process after a fork and a destroyed engine are no-ops. An engine that
///                another thread is destroying still has its regions.
/// @param mr      The region; an unknown one only logs an error.
///
/// Threads: any. On return the library no longer touches this memory, and the caller may free it. The exception is a GPU that does not
/// end its copies: the library then logs an error, uccl_engine_last_status() is UCCL_ERR_RESOURCE, and the caller must keep the memory
/// until the process ends.
#[no_mangle]
pub extern "C" fn uccl_engine_mr_destroy(engine: *mut uccl_engine_t, mr: uccl_mr_t) {
    guard((), || match engines().get_if_mine_or_ending(engine.cast())? {
        Some(engine) => engine.deregister(mr).inspect_err(|e| log::error!("{e}")),
        None => Ok(()),
    })
}

/// Writes a FIFO item for [data, data + size) of a region. A peer that has it can read or write the region.
///
/// @param engine    [in]  The engine.
/// @param mr        [in]  The region.
/// @param data      [in]  First byte, inside the region.
/// @param size      [in]  Bytes; the range must lie inside the region. A size over 4 GiB - 1 is stored as 4 GiB - 1: the field has 32
///                  bits, and transfers take their length from their own argument.
/// @param fifo_buf  [out] UCCL_FIFO_SIZE (64) bytes: a FifoItem in memory order. It contains the region's secret token: every holder
///                  can access the whole region, within its access rights, until the region is deregistered.
/// @return UCCL_OK, UCCL_ERR_NOT_FOUND, UCCL_ERR_INVALID_ARGUMENT.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_prepare_fifo(
    engine: *mut uccl_engine_t,
    mr: uccl_mr_t,
    data: *const c_void,
    size: usize,
    fifo_buf: *mut c_char,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes 64 writable bytes or null.
        let out = unsafe { out_arg(fifo_buf, "fifo_buf")? } as *mut c_char;
        let item = engines().get(engine.cast())?.fifo_item(mr, data as usize, size)?;
        // SAFETY: FifoItem is 64 bytes without padding; the destination holds 64 bytes of any alignment.
        unsafe { out.cast::<FifoItem>().write_unaligned(item) };
        Ok(UCCL_OK)
    })
}

/// Points a FIFO item at another range of its region. Changes addr and size only; needs no engine and no connection.
///
/// @param fifo_item    [in,out] The item.
/// @param remote_addr  [in] New address in the peer's address space; the peer checks it when it is used.
/// @param size         [in] New size in bytes.
/// @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT for an item that is NULL or not aligned to 8 bytes.
///
/// Threads: any, one at a time per item.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_update_fifo(fifo_item: *mut FifoItem, remote_addr: u64, size: u32) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable item or null.
        let item = unsafe { out_arg(fifo_item, "fifo_item")? };
        item.addr = remote_addr;
        item.size = size;
        Ok(UCCL_OK)
    })
}

/// Returns an empty IPC descriptor, for compatibility. No descriptor is needed: between engines on one host, ordinary reads and writes are
/// direct transfers where the memory allows it (see UCCL_P2P_DISABLE_IPC).
///
/// @param engine   [in]  The engine.
/// @param addr     [in]  Address inside a registered region.
/// @param ipc_buf  [out] UCCL_IPC_INFO_SIZE (128) bytes, zeroed.
/// @param has_ipc  [out] false.
/// @return UCCL_OK, UCCL_ERR_NOT_FOUND if no region contains addr, UCCL_ERR_INVALID_ARGUMENT.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_get_ipc_info(
    engine: *mut uccl_engine_t,
    addr: usize,
    ipc_buf: *mut c_char,
    has_ipc: *mut bool,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes 128 writable bytes and a writable bool, or null.
        let (buf, flag) = unsafe { (out_arg(ipc_buf, "ipc_buf")? as *mut c_char, out_arg(has_ipc, "has_ipc")?) };
        if !engines().get(engine.cast())?.is_registered(addr) {
            bail!(NotFound, "no registered region contains address {addr:#x}");
        }
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(buf, 0, UCCL_IPC_INFO_SIZE) };
        *flag = false;
        Ok(UCCL_OK)
    })
}

/// Checks a sub-range for an IPC descriptor. Descriptors of this library are empty, so the buffer does not change.
///
/// @param ipc_buf    [in,out] UCCL_IPC_INFO_SIZE (128) bytes.
/// @param addr       [in] Address inside the registered buffer.
/// @param base_addr  [in] Base address of the registered buffer, not above addr.
/// @param size       [in] Bytes.
/// @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_update_ipc_info(ipc_buf: *mut c_char, addr: usize, base_addr: usize, size: usize) -> c_int {
    status(|| {
        // SAFETY: the caller passes a valid pointer or null; it is only compared with null.
        unsafe { out_arg(ipc_buf, "ipc_buf")? };
        if addr < base_addr || addr.checked_add(size).is_none() {
            bail!(InvalidArgument, "range {addr:#x}+{size} does not lie above base {base_addr:#x}");
        }
        Ok(UCCL_OK)
    })
}
