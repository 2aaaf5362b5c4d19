//! Transfers of the C ABI. Translates only.

use super::connection::uccl_conn_t;
use super::guard::{array_arg, guard, optional_out_arg, out_arg, status};
use super::handles::connections;
use super::memory::{uccl_mr_t, FifoItem};
use crate::engine::{Direction, LocalSegment, TransferState};
use crate::status::{bail, Result, StatusCode, UCCL_IN_PROGRESS, UCCL_OK};
use std::ffi::{c_int, c_void};
use std::time::Duration;

/// State of a transfer.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uccl_xfer_info_t {
    /// UCCL_OK, UCCL_IN_PROGRESS or the error, as uccl_engine_poll returns it.
    pub status: i32,
    /// 0; reserved.
    pub reserved: u32,
    /// Bytes of the whole transfer. For a receive: the length of the message, 0 until it is known. 0 for a failed transfer, and for a
    /// completed one after 16,384 later transfers of its connection have ended.
    pub bytes_total: u64,
    /// Bytes sent (write, send) or received (read, receive) so far; bytes_total when complete.
    pub bytes_done: u64,
}

pub(super) fn local(mr: uccl_mr_t, data: *const c_void, len: usize) -> LocalSegment {
    LocalSegment { mr, addr: data as usize, len }
}

fn one_sided(
    conn: *mut uccl_conn_t,
    dir: Direction,
    mr: uccl_mr_t,
    data: *const c_void,
    size: usize,
    item: FifoItem,
    id: *mut u64,
) -> StatusCode {
    status(|| {
        // SAFETY: the caller passes a writable id or null.
        let id = unsafe { out_arg(id, "transfer_id")? };
        *id = connections().get(conn.cast())?.transfer(dir, std::iter::once((local(mr, data, size), item)))?;
        Ok(UCCL_OK)
    })
}

#[allow(clippy::too_many_arguments)]
unsafe fn one_sided_vector(
    conn: *mut uccl_conn_t,
    dir: Direction,
    mrs: *const uccl_mr_t,
    data: *const *mut c_void,
    sizes: *const usize,
    items: *const FifoItem,
    n: c_int,
    id: *mut u64,
) -> StatusCode {
    status(|| {
        let n = count(n)?;
        if n == 0 {
            bail!(InvalidArgument, "the number of segments is 0");
        }
        // SAFETY: the caller passes arrays of n values and a writable id, or null.
        let (mrs, data, sizes, items, id) = unsafe {
            (
                array_arg(mrs, n, "mr_ids")?,
                array_arg(data, n, "data_v")?,
                array_arg(sizes, n, "size_v")?,
                array_arg(items, n, "fifo_items")?,
                out_arg(id, "transfer_id")?,
            )
        };
        *id = connections().get(conn.cast())?.transfer(dir, (0..n).map(|i| (local(mrs[i], data[i], sizes[i]), &items[i])))?;
        Ok(UCCL_OK)
    })
}

pub(super) fn count(n: c_int) -> Result<usize> {
    match usize::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!(InvalidArgument, "the number of segments is {n}"),
    }
}

/// Starts a read, from the peer's memory into local memory.
///
/// @param conn         [in]  The connection.
/// @param mr           [in]  Local region that contains [data, data + size).
/// @param data         [in]  Local destination.
/// @param size         [in]  Bytes; 0 completes at once.
/// @param fifo_item    [in]  Remote source: addr and the region's token. Its size field is ignored.
/// @param transfer_id  [out] Id for uccl_engine_poll, uccl_engine_wait and uccl_engine_xfer_status.
/// @return UCCL_OK when it has started; UCCL_ERR_INVALID_ARGUMENT, UCCL_ERR_NOT_FOUND (region), UCCL_ERR_RESOURCE (too many
///         transfers in flight), UCCL_ERR_UNSUPPORTED (no channel carries such memory), or the status of a lost connection
///         (uccl_engine_conn_status). On failure *transfer_id is unchanged and nothing moves.
///
/// The destination is undefined until the transfer is complete, and after a failure. Keep the region registered until it has ended.
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_read(
    conn: *mut uccl_conn_t,
    mr: uccl_mr_t,
    data: *mut c_void,
    size: usize,
    fifo_item: FifoItem,
    transfer_id: *mut u64,
) -> c_int {
    one_sided(conn, Direction::Read, mr, data, size, fifo_item, transfer_id)
}

/// Starts a read of several segments as one transfer.
///
/// @param conn         [in]  The connection.
/// @param mr_ids       [in]  num_iovs local regions.
/// @param dst_v        [in]  num_iovs local destinations, each inside its region.
/// @param size_v       [in]  num_iovs lengths in bytes; zero lengths are skipped.
/// @param fifo_items   [in]  num_iovs remote sources.
/// @param num_iovs     [in]  Segments, 1 to 1,048,576 in at most 65,536 remote regions. A segment above 1 GiB counts once for each GiB or
///                     part of one. 0 is UCCL_ERR_INVALID_ARGUMENT; for an empty transfer give a segment of length 0.
/// @param transfer_id  [out] Id of the transfer.
/// @return As uccl_engine_read. The arrays are copied. Where destinations overlap, the bytes are undefined.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_read_vector(
    conn: *mut uccl_conn_t,
    mr_ids: *const uccl_mr_t,
    dst_v: *const *mut c_void,
    size_v: *const usize,
    fifo_items: *const FifoItem,
    num_iovs: c_int,
    transfer_id: *mut u64,
) -> c_int {
    // SAFETY: forwarded; the caller's contract is the same.
    unsafe { one_sided_vector(conn, Direction::Read, mr_ids, dst_v, size_v, fifo_items, num_iovs, transfer_id) }
}

/// Starts a write, from local memory into the peer's memory. It is complete when every byte is in place at the peer.
///
/// @param conn         [in]  The connection.
/// @param mr           [in]  Local region that contains [data, data + size).
/// @param data         [in]  Local source; must not change until the transfer ends.
/// @param size         [in]  Bytes; 0 completes at once.
/// @param fifo_item    [in]  Remote destination: addr and the region's token. Its size field is ignored.
/// @param transfer_id  [out] Id of the transfer.
/// @return As uccl_engine_read.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_write(
    conn: *mut uccl_conn_t,
    mr: uccl_mr_t,
    data: *const c_void,
    size: usize,
    fifo_item: FifoItem,
    transfer_id: *mut u64,
) -> c_int {
    one_sided(conn, Direction::Write, mr, data, size, fifo_item, transfer_id)
}

/// Starts a write of several segments as one transfer.
///
/// @param conn         [in]  The connection.
/// @param mr_ids       [in]  num_iovs local regions.
/// @param src_v        [in]  num_iovs local sources, each inside its region.
/// @param size_v       [in]  num_iovs lengths in bytes; zero lengths are skipped.
/// @param fifo_items   [in]  num_iovs remote destinations.
/// @param num_iovs     [in]  Segments, 1 to 1,048,576 in at most 65,536 remote regions. A segment above 1 GiB counts once for each GiB or
///                     part of one. 0 is UCCL_ERR_INVALID_ARGUMENT; for an empty transfer give a segment of length 0.
/// @param transfer_id  [out] Id of the transfer.
/// @return As uccl_engine_read. The arrays are copied. Where destinations overlap, the bytes are undefined.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_write_vector(
    conn: *mut uccl_conn_t,
    mr_ids: *const uccl_mr_t,
    src_v: *const *mut c_void,
    size_v: *const usize,
    fifo_items: *const FifoItem,
    num_iovs: c_int,
    transfer_id: *mut u64,
) -> c_int {
    // SAFETY: forwarded; the caller's contract is the same.
    unsafe { one_sided_vector(conn, Direction::Write, mr_ids, src_v, size_v, fifo_items, num_iovs, transfer_id) }
}

/// Starts a two-sided send. Sends and the peer's receives match one to one, in the order of the calls. The send is complete when the peer
/// has every byte.
///
/// @param conn         [in]  The connection.
/// @param mr           [in]  Local region that contains [data, data + size).
/// @param data         [in]  Source; must not change until the transfer ends.
/// @param size         [in]  Bytes; 0 sends an empty message.
/// @param transfer_id  [out] Id of the transfer. Ends with UCCL_ERR_TRUNCATED if the peer's receive is smaller, and with
///                     UCCL_ERR_TIMED_OUT if no receive is posted within UCCL_TCPX_MATCH_TIMEOUT_MS.
/// @return As uccl_engine_read.
///
/// Threads: any; the order is that of the calls.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_send(
    conn: *mut uccl_conn_t,
    mr: uccl_mr_t,
    data: *const c_void,
    size: usize,
    transfer_id: *mut u64,
) -> c_int {
    send(conn, mr, data, size, transfer_id)
}

/// The same as uccl_engine_send.
///
/// @param conn         [in]  The connection.
/// @param mr           [in]  Local region.
/// @param data         [in]  Source.
/// @param size         [in]  Bytes.
/// @param transfer_id  [out] Id of the transfer.
/// @return As uccl_engine_send.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_send_async(
    conn: *mut uccl_conn_t,
    mr: uccl_mr_t,
    data: *const c_void,
    size: usize,
    transfer_id: *mut u64,
) -> c_int {
    send(conn, mr, data, size, transfer_id)
}

fn send(conn: *mut uccl_conn_t, mr: uccl_mr_t, data: *const c_void, size: usize, id: *mut u64) -> StatusCode {
    status(|| {
        // SAFETY: the caller passes a writable id or null.
        let id = unsafe { out_arg(id, "transfer_id")? };
        *id = connections().get(conn.cast())?.send(std::iter::once(local(mr, data, size)))?;
        Ok(UCCL_OK)
    })
}

/// Starts a two-sided send of one message gathered from several segments.
///
/// @param conn         [in]  The connection.
/// @param mr_ids       [in]  num_iovs local regions.
/// @param src_v        [in]  num_iovs sources, each inside its region.
/// @param size_v       [in]  num_iovs lengths in bytes.
/// @param num_iovs     [in]  Segments, 0 to 1,048,576; 0 sends an empty message.
/// @param transfer_id  [out] Id of the transfer.
/// @return As uccl_engine_send. The arrays are copied.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_send_vector(
    conn: *mut uccl_conn_t,
    mr_ids: *const uccl_mr_t,
    src_v: *const *const c_void,
    size_v: *const usize,
    num_iovs: c_int,
    transfer_id: *mut u64,
) -> c_int {
    status(|| {
        let n = count(num_iovs)?;
        // SAFETY: the caller passes arrays of n values and a writable id, or null.
        let (mrs, data, sizes, id) = unsafe {
            (
                array_arg(mr_ids, n, "mr_ids")?,
                array_arg(src_v, n, "src_v")?,
                array_arg(size_v, n, "size_v")?,
                out_arg(transfer_id, "transfer_id")?,
            )
        };
        *id = connections().get(conn.cast())?.send((0..n).map(|i| local(mrs[i], data[i], sizes[i])))?;
        Ok(UCCL_OK)
    })
}

/// Receives one message. Blocks until it has arrived.
///
/// @param conn      [in] The connection.
/// @param mr        [in] Local region that contains [data, data + max_size).
/// @param data      [in] Destination.
/// @param max_size  [in] Largest message to take, bytes.
/// @return UCCL_OK; UCCL_ERR_TRUNCATED if the message is larger (the sender gets it too); UCCL_ERR_TIMED_OUT if none arrives within
///         UCCL_TCPX_MATCH_TIMEOUT_MS; otherwise as uccl_engine_read. A shorter message leaves the rest of the destination unchanged;
///         use uccl_engine_recv_async to learn its length.
///
/// Threads: any; receives of one connection match in the order of the calls.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_recv(conn: *mut uccl_conn_t, mr: uccl_mr_t, data: *mut c_void, max_size: usize) -> c_int {
    status(|| {
        let conn = connections().get(conn.cast())?;
        let id = conn.recv(local(mr, data, max_size))?;
        conn.wait(id, None)?;
        Ok(UCCL_OK)
    })
}

/// Starts a receive of one message.
///
/// @param conn         [in]  The connection.
/// @param mr           [in]  Local region that contains [data, data + max_size).
/// @param data         [in]  Destination.
/// @param max_size     [in]  Largest message to take, bytes.
/// @param transfer_id  [out] Id of the transfer; uccl_engine_poll's bytes_total is the length of the message.
/// @return As uccl_engine_read.
///
/// Threads: any; the order is that of the calls.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_recv_async(
    conn: *mut uccl_conn_t,
    mr: uccl_mr_t,
    data: *mut c_void,
    max_size: usize,
    transfer_id: *mut u64,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable id or null.
        let id = unsafe { out_arg(transfer_id, "transfer_id")? };
        *id = connections().get(conn.cast())?.recv(local(mr, data, max_size))?;
        Ok(UCCL_OK)
    })
}

/// Returns the state of a transfer, and drives the connection. Does not block.
///
/// @param conn         [in]  The connection that started it.
/// @param transfer_id  [in]  Its id.
/// @param info         [out] Details; may be NULL.
/// @return UCCL_OK when complete; UCCL_IN_PROGRESS; the error it ended with; UCCL_ERR_NOT_FOUND for an id that this connection never
///         returned. Repeated calls for an ended transfer return the same.
///
/// Unless this returns UCCL_IN_PROGRESS, the library no longer touches the transfer's memory. Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_poll(conn: *mut uccl_conn_t, transfer_id: u64, info: *mut uccl_xfer_info_t) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable info or null.
        let info = unsafe { optional_out_arg(info, "info")? };
        let result = connections().get(conn.cast())?.poll(transfer_id);
        if let Some(info) = info {
            *info = match &result {
                Ok(state) => describe(*state),
                Err(e) => uccl_xfer_info_t { status: e.code(), reserved: 0, bytes_total: 0, bytes_done: 0 },
            };
        }
        result.map(|state| describe(state).status)
    })
}

fn describe(state: TransferState) -> uccl_xfer_info_t {
    let status = if state.complete { UCCL_OK } else { UCCL_IN_PROGRESS };
    uccl_xfer_info_t { status, reserved: 0, bytes_total: state.bytes_total, bytes_done: state.bytes_done }
}

/// Waits for a transfer to end.
///
/// @param conn         [in] The connection that started it.
/// @param transfer_id  [in] Its id.
/// @param timeout_ms   [in] Longest wait in milliseconds; negative: until it ends (every transfer has its own deadline).
/// @return As uccl_engine_poll; UCCL_IN_PROGRESS if timeout_ms passed first.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_wait(conn: *mut uccl_conn_t, transfer_id: u64, timeout_ms: i64) -> c_int {
    status(|| {
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        Ok(describe(connections().get(conn.cast())?.wait(transfer_id, timeout)?).status)
    })
}

/// Returns whether a transfer is complete, and drives the connection. Does not block.
///
/// @param conn         [in] The connection that started it.
/// @param transfer_id  [in] Its id.
/// @return true once it succeeded, also in later calls; false while it runs, after a failure (logged once; uccl_engine_poll returns
///         the error), and for bad arguments.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_xfer_status(conn: *mut uccl_conn_t, transfer_id: u64) -> bool {
    guard(false, || {
        let conn = connections().get(conn.cast())?;
        Ok(conn.poll(transfer_id).inspect_err(|_| conn.log_failure(transfer_id))?.complete)
    })
}
