//! Lists of segments that are kept for several transfers. Translates only.

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

/// Segments of a transfer, kept for several.
#[allow(non_camel_case_types)]
pub struct uccl_list_t {
    _opaque: [u8; 0],
}

/// Keeps the segments of a transfer, so that starting it takes less time, every time that it is started. For lists that are moved
/// again and again, and for those that are known before they are to be moved.
///
/// @param mr_ids      [in]  num_iovs local regions.
/// @param data_v      [in]  num_iovs local addresses, each inside its region.
/// @param size_v      [in]  num_iovs lengths in bytes.
/// @param fifo_items  [in]  num_iovs remote addresses.
/// @param num_iovs    [in]  Segments, 1 to 1,048,576.
/// @param list        [out] The list, owned by the caller, to be freed with uccl_engine_list_free.
/// @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT, UCCL_ERR_RESOURCE. The arrays are copied. What is wrong with a region, a range or an
///         item shows when the list is started: a list belongs to no engine and keeps no region. Memory that was registered anew
///         since, here or at the peer, needs a new list.
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
            bail!(InvalidArgument, "a list of {n} segments, 1 to {MAX_SEGMENTS}");
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

/// Frees a list. Transfers that were started with it go on.
///
/// @param list  The list; NULL is a no-op, and so is one of the parent process after a fork; one already freed is an error that is
///              logged, nothing else.
///
/// Threads: any, once per list.
#[no_mangle]
pub extern "C" fn uccl_engine_list_free(list: *mut uccl_list_t) {
    guard((), || {
        lists().remove(list.cast())?;
        Ok(())
    })
}

/// Starts a read of a list as one transfer: remote memory into local memory.
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

/// Starts a write of a list as one transfer: local memory into remote memory.
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
