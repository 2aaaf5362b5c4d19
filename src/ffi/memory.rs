//! Registered memory of the C ABI, and what peers need to reach it: FIFO items and (empty) IPC descriptors. Translates only.

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

/// Registers memory for transfers, both as local side and as target of the peers that get its FIFO item.
///
/// @param engine  [in]  The engine.
/// @param data    [in]  First byte, host or CUDA device memory, any alignment.
/// @param size    [in]  Bytes, at least 1.
/// @param mr      [out] The region. Regions may overlap and repeat; each registration is a region of its own.
/// @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT (null, empty, wraps around), UCCL_ERR_GPU, UCCL_ERR_RESOURCE.
///
/// The memory stays the caller's and must stay mapped until uccl_engine_mr_destroy returns. Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_reg(engine: *mut uccl_engine_t, data: usize, size: usize, mr: *mut uccl_mr_t) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable pointer or null.
        let out = unsafe { out_arg(mr, "mr")? };
        *out = engines().get(engine.cast())?.register(data, size)?;
        Ok(UCCL_OK)
    })
}

/// Registers memory that peers may use only so far as the flags say.
///
/// @param engine  [in]  The engine.
/// @param data    [in]  First byte, host or CUDA device memory, any alignment.
/// @param size    [in]  Bytes, at least 1.
/// @param access  [in]  Or of UCCL_ACCESS_REMOTE_READ and UCCL_ACCESS_REMOTE_WRITE; 0: the region is only a local side of transfers.
/// @param mr      [out] The region, as of uccl_engine_reg, which allows peers both.
/// @return As uccl_engine_reg; UCCL_ERR_INVALID_ARGUMENT for unknown flags.
///
/// A peer that does more gets UCCL_ERR_REMOTE_ACCESS, whatever FIFO item it has, and nothing moves. What this side does itself, receives
/// into the region among it, is not limited.
///
/// The memory stays the caller's and must stay mapped until uccl_engine_mr_destroy returns. Threads: any.
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
            bail!(InvalidArgument, "access {access:#x} has flags that are not known");
        }
        let access = RemoteAccess { read: access & UCCL_ACCESS_REMOTE_READ != 0, write: access & UCCL_ACCESS_REMOTE_WRITE != 0 };
        *out = engines().get(engine.cast())?.register_with(data, size, access)?;
        Ok(UCCL_OK)
    })
}

/// Ends a registration. Waits for transfers that use the region; what is not finished within UCCL_TCPX_CLOSE_TIMEOUT_MS is failed
/// together with its connection. Peers that use the region afterwards get UCCL_ERR_REMOTE_ACCESS.
///
/// @param engine  The engine; NULL is a no-op, and so is an engine of the parent process after a fork. One already destroyed
///                has no regions any more: nothing is done. One that another thread is destroying still has them.
/// @param mr      The region; an unknown one is an error that is logged, nothing else.
///
/// Threads: any. On return the library touches this memory no more, and the caller may free it. Where a device does not end its copies
/// even then, an error is logged and uccl_engine_last_status() is UCCL_ERR_RESOURCE: such memory must stay until the process ends.
#[no_mangle]
pub extern "C" fn uccl_engine_mr_destroy(engine: *mut uccl_engine_t, mr: uccl_mr_t) {
    guard((), || match engines().get_if_mine_or_ending(engine.cast())? {
        Some(engine) => engine.deregister(mr).inspect_err(|e| log::error!("{e}")),
        None => Ok(()),
    })
}

/// Serialises a FIFO item for [data, data + size) of a region: what a peer needs to read or write it.
///
/// @param engine    [in]  The engine.
/// @param mr        [in]  The region.
/// @param data      [in]  First byte, inside the region.
/// @param size      [in]  Bytes; the range must lie inside the region. A size over 4 GiB - 1 is stored as 4 GiB - 1: the field has 32
///                  bits, and transfers take their length from their own argument.
/// @param fifo_buf  [out] UCCL_FIFO_SIZE (64) bytes: a FifoItem in memory order. It carries the region's secret token: whoever has it may
///                  access the whole region until the region is deregistered.
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

/// Points a FIFO item at another range of its region. Changes addr and size, nothing else; needs no engine and no connection.
///
/// @param fifo_item    [in,out] The item.
/// @param remote_addr  [in] New address in the peer's address space; checked by the peer when it is used.
/// @param size         [in] New size in bytes.
/// @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT for an item that is NULL or does not lie at a multiple of 8.
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

/// IPC descriptor of a registered buffer. There is none to pass on: engines of one host find out by themselves what each can copy from the
/// other (see UCCL_P2P_DISABLE_IPC), and ordinary reads and writes take that way.
///
/// @param engine   [in]  The engine.
/// @param addr     [in]  Address inside a registered region.
/// @param ipc_buf  [out] UCCL_IPC_INFO_SIZE (128) bytes, zeroed.
/// @param has_ipc  [out] false.
/// @return UCCL_OK, UCCL_ERR_NOT_FOUND when no region holds addr, UCCL_ERR_INVALID_ARGUMENT.
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
            bail!(NotFound, "no registered region holds address {addr:#x}");
        }
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(buf, 0, UCCL_IPC_INFO_SIZE) };
        *flag = false;
        Ok(UCCL_OK)
    })
}

/// Points an IPC descriptor at a sub-range. Descriptors of this library are empty; the range is checked, the buffer stays as it is.
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
