//! Lists of the C ABI: segments of a transfer that is started several times. Translates only.

use super::connection::uccl_conn_t;
use super::guard::{array_arg, guard, out_arg, status};
use super::handles::{connections, lists};
use super::memory::{uccl_mr_t, FifoItem};
use super::transfer::{count, local};
use crate::engine::{Direction, List};
use crate::status::{bail, StatusCode, UCCL_OK};
use crate::wire::frame::MAX_SEGMENTS;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// The segments of a transfer that is started several times.
#[allow(non_camel_case_types)]
pub struct uccl_list_t {
    _opaque: [u8; 0],
}

/// Prepares the segments of a transfer, so that each start takes less time. Use it for segments that are transferred repeatedly, or that
/// are known before the transfer is to start.
///
/// @param mr_ids      [in]  num_iovs local regions.
/// @param data_v      [in]  num_iovs local addresses, each inside its region.
/// @param size_v      [in]  num_iovs lengths in bytes.
/// @param fifo_items  [in]  num_iovs remote addresses.
/// @param num_iovs    [in]  Segments, 1 to 1,048,576.
/// @param list        [out] The list; the caller owns it and frees it with uccl_engine_list_free.
/// @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT, UCCL_ERR_RESOURCE. The arrays are copied. Regions, ranges and items are checked
///         when the list is started: a list belongs to no engine and holds no region. After memory is registered again, here or at
///         the peer, create a new list.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_list_create(
    mr_ids: *const uccl_mr_t,
    data_v: *const *mut c_void,
    size_v: *const usize,
    fifo_items: *const FifoItem,
    num_iovs: c_int,
    list: *mut *mut uccl_list_t,
) -> c_int {
    status(|| {
        let n = count(num_iovs)?;
        if n == 0 || n > MAX_SEGMENTS {
            bail!(InvalidArgument, "a list of {n} segments: 1 to {MAX_SEGMENTS} are allowed");
        }
        // SAFETY: the caller passes arrays of n values and a writable pointer, or null.
        let (mrs, data, sizes, items, list) = unsafe {
            (
                array_arg(mr_ids, n, "mr_ids")?,
                array_arg(data_v, n, "data_v")?,
                array_arg(size_v, n, "size_v")?,
                array_arg(fifo_items, n, "fifo_items")?,
                out_arg(list, "list")?,
            )
        };
        let made = List::new(n, (0..n).map(|i| (local(mrs[i], data[i], sizes[i]), &items[i])))?;
        *list = lists().insert(Arc::new(made)).cast();
        Ok(UCCL_OK)
    })
}

/// Frees a list. Transfers that were started with it continue.
///
/// @param list  The list. NULL and a list of the parent process after a fork are no-ops. One already freed only logs an error.
///
/// Threads: any, once per list.
#[no_mangle]
pub extern "C" fn uccl_engine_list_free(list: *mut uccl_list_t) {
    guard((), || {
        lists().remove(list.cast())?;
        Ok(())
    })
}

/// Starts a read of a list as one transfer, from the peer's memory into local memory.
///
/// @param conn         [in]  The connection.
/// @param list         [in]  The segments; may be started again at once, on this connection or another.
/// @param transfer_id  [out] Id of the transfer.
/// @return As uccl_engine_read_vector.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_list_read(conn: *mut uccl_conn_t, list: *const uccl_list_t, transfer_id: *mut u64) -> c_int {
    // SAFETY: forwarded; the caller's contract is the same.
    unsafe { start(conn, Direction::Read, list, transfer_id) }
}

/// Starts a write of a list as one transfer, from local memory into the peer's memory.
///
/// @param conn         [in]  The connection.
/// @param list         [in]  The segments; may be started again at once, on this connection or another.
/// @param transfer_id  [out] Id of the transfer.
/// @return As uccl_engine_write_vector.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_list_write(
    conn: *mut uccl_conn_t,
    list: *const uccl_list_t,
    transfer_id: *mut u64,
) -> c_int {
    // SAFETY: forwarded; the caller's contract is the same.
    unsafe { start(conn, Direction::Write, list, transfer_id) }
}

/// # Safety
/// `id` is null or writable.
unsafe fn start(conn: *mut uccl_conn_t, direction: Direction, list: *const uccl_list_t, id: *mut u64) -> StatusCode {
    status(|| {
        // SAFETY: by the caller's contract.
        let id = unsafe { out_arg(id, "transfer_id")? };
        *id = connections().get(conn.cast())?.transfer_list(direction, &*lists().get(list.cast())?)?;
        Ok(UCCL_OK)
    })
}
