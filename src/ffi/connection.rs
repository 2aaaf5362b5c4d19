//! Connections of the C ABI. Translates only.

use super::engine::uccl_engine_t;
use super::guard::{deadline, guard, out_arg, status, str_arg};
use super::handles::{connections, engines};
use crate::engine::Connection;
use crate::status::{bail, UCCL_IN_PROGRESS, UCCL_OK};
use std::ffi::{c_char, c_int};
use std::sync::atomic::Ordering;
use std::sync::Arc;

/// A connection to a peer engine: one control connection and one or more channels.
#[allow(non_camel_case_types)]
pub struct uccl_conn_t {
    _opaque: [u8; 0],
}

/// Connects to a peer engine. Blocks until all channels are up. The peer's application does not need to call accept.
///
/// @param engine        [in] The engine.
/// @param ip_addr       [in] The peer's IPv4 or IPv6 address or host name, NUL-terminated.
/// @param remote_gpu    [in] The peer's GPU as its metadata names it: a PCI address ("0000:4a:00.0", any case, 4- or 8-digit domain),
///                      a CUDA index ("0"), or "-1" for a host without a GPU. NULL or "": not given. Behind it may follow what the
///                      metadata has there: other addresses of the peer, which are tried if it does not answer at the first.
/// @param remote_port   [in] The peer's port, 1 to 65535.
/// @param same_process  [in] Ignored; accepted for compatibility.
/// @return The connection; the caller owns it and ends it with uccl_engine_conn_destroy. NULL on failure (uccl_engine_last_error).
///
/// Threads: any; several connects may run in parallel. Deadline: UCCL_TCPX_CONNECT_TIMEOUT_MS.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_connect(
    engine: *mut uccl_engine_t,
    ip_addr: *const c_char,
    remote_gpu: *const c_char,
    remote_port: c_int,
    same_process: bool,
) -> *mut uccl_conn_t {
    guard(std::ptr::null_mut(), || {
        let _ = same_process;
        let engine = engines().get(engine.cast())?;
        // SAFETY: the caller passes NUL-terminated strings or null.
        let (ip, gpu) =
            unsafe { (str_arg(ip_addr, "ip_addr")?, if remote_gpu.is_null() { "" } else { str_arg(remote_gpu, "remote_gpu")? }) };
        let Ok(port @ 1..) = u16::try_from(remote_port) else {
            bail!(InvalidArgument, "remote_port {remote_port} is not in 1..=65535")
        };
        Ok(connections().insert(engine.connect(ip, gpu, port)?).cast())
    })
}

/// Returns the next connection that a peer opened. Blocks until there is one or uccl_engine_stop_accept is called.
///
/// @param engine          [in]  The engine.
/// @param ip_addr_buf     [out] The peer's address as text, always NUL-terminated, cut to fit.
/// @param ip_addr_buf_len [in]  Size of ip_addr_buf in bytes, at least 1; 46 holds every address.
/// @param remote_gpu_idx  [out] CUDA index of the peer's GPU in the peer's process, -1 if it has none.
/// @return The connection; the caller owns it and ends it with uccl_engine_conn_destroy. NULL after uccl_engine_stop_accept or on
///         failure; ip_addr_buf then contains an empty string and remote_gpu_idx is unchanged.
///
/// Threads: any. The peer can transfer data as soon as its connect returned, before this call.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_accept(
    engine: *mut uccl_engine_t,
    ip_addr_buf: *mut c_char,
    ip_addr_buf_len: usize,
    remote_gpu_idx: *mut c_int,
) -> *mut uccl_conn_t {
    guard(std::ptr::null_mut(), || {
        if ip_addr_buf_len == 0 {
            bail!(InvalidArgument, "ip_addr_buf_len is 0");
        }
        // SAFETY: the caller passes writable memory of that size, or null.
        let (buf, gpu) = unsafe { (out_arg(ip_addr_buf, "ip_addr_buf")?, out_arg(remote_gpu_idx, "remote_gpu_idx")?) };
        *buf = 0;
        let conn = engines().get(engine.cast())?.accept()?;
        *gpu = conn.peer_gpu_index();
        // SAFETY: ip_addr_buf_len bytes are writable.
        unsafe { cut_text(&conn.peer_ip().to_string(), ip_addr_buf, ip_addr_buf_len) };
        Ok(hand_out(conn))
    })
}

fn hand_out(conn: Arc<Connection>) -> *mut uccl_conn_t {
    connections().insert(conn).cast()
}

/// Writes a text, NUL-terminated and cut to fit.
unsafe fn cut_text(text: &str, buf: *mut c_char, len: usize) {
    let n = text.len().min(len - 1);
    // SAFETY: the caller passes `len` writable bytes, at least 1.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buf, n);
        *buf.add(n) = 0;
    }
}

/// Returns the next connection that a peer opened, like uccl_engine_accept, waiting for it at most for the given time.
///
/// @param engine          [in]  The engine.
/// @param timeout_ms      [in]  Longest wait in milliseconds; 0: does not block; negative: until there is one.
/// @param ip_addr_buf     [out] The peer's address as text, always NUL-terminated, cut to fit.
/// @param ip_addr_buf_len [in]  Size of ip_addr_buf in bytes, at least 1; 46 holds every address.
/// @param remote_gpu_idx  [out] CUDA index of the peer's GPU in the peer's process, -1 if it has none.
/// @param conn            [out] The connection; the caller owns it and ends it with uccl_engine_conn_destroy.
/// @return UCCL_OK; UCCL_IN_PROGRESS if timeout_ms passed first; UCCL_ERR_CANCELED after uccl_engine_stop_accept or
///         uccl_engine_destroy; another negative status. Unless it is UCCL_OK, all outputs are unchanged.
///
/// Threads: any; each connection is handed out once, by this call or by uccl_engine_accept.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_accept_for(
    engine: *mut uccl_engine_t,
    timeout_ms: i64,
    ip_addr_buf: *mut c_char,
    ip_addr_buf_len: usize,
    remote_gpu_idx: *mut c_int,
    conn: *mut *mut uccl_conn_t,
) -> c_int {
    status(|| {
        if ip_addr_buf_len == 0 {
            bail!(InvalidArgument, "ip_addr_buf_len is 0");
        }
        // SAFETY: the caller passes writable memory of that size, or null.
        let (buf, gpu, out) =
            unsafe { (out_arg(ip_addr_buf, "ip_addr_buf")?, out_arg(remote_gpu_idx, "remote_gpu_idx")?, out_arg(conn, "conn")?) };
        let engine = engines().get(engine.cast())?;
        let Some(conn) = engine.accept_until(deadline(timeout_ms))? else { return Ok(UCCL_IN_PROGRESS) };
        *gpu = conn.peer_gpu_index();
        // SAFETY: ip_addr_buf_len bytes are writable.
        unsafe { cut_text(&conn.peer_ip().to_string(), std::ptr::from_mut(buf), ip_addr_buf_len) };
        *out = hand_out(conn);
        Ok(UCCL_OK)
    })
}

/// Wakes every blocked uccl_engine_accept of the engine; these and later ones return NULL. Open connections stay open.
///
/// @param engine  The engine. NULL and an engine of the parent process after a fork are no-ops.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_stop_accept(engine: *mut uccl_engine_t) {
    guard((), || {
        if let Some(engine) = engines().get_if_mine(engine.cast())? {
            engine.stop_accept();
        }
        Ok(())
    })
}

/// Marks the connection as listened to. Kept for compatibility: notifications and data arrive without it.
///
/// @param conn  The connection.
/// @return UCCL_OK; -1 if it was already started; another negative status for a bad handle or a lost connection.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_start_listener(conn: *mut uccl_conn_t) -> c_int {
    status(|| {
        let conn = connections().get(conn.cast())?;
        conn.status()?;
        if conn.listener_started.swap(true, Ordering::AcqRel) {
            bail!(InvalidArgument, "the listener of this connection is already started");
        }
        Ok(UCCL_OK)
    })
}

/// Undoes uccl_engine_start_listener. Stopping a listener that was not started is not an error.
///
/// @param conn  The connection.
/// @return UCCL_OK, or a negative status for a bad handle or a lost connection.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_stop_listener(conn: *mut uccl_conn_t) -> c_int {
    status(|| {
        let conn = connections().get(conn.cast())?;
        conn.listener_started.store(false, Ordering::Release);
        conn.status()?;
        Ok(UCCL_OK)
    })
}

/// Closes a connection. Transfers in flight end with UCCL_ERR_CANCELED here and UCCL_ERR_REMOTE_DISCONNECT at the peer.
///
/// @param conn  The connection. NULL and a connection of the parent process after a fork are no-ops; the latter stays open in the parent.
///              A handle already destroyed only logs an error.
///
/// Threads: any, once, before or after its engine and regions. On return this connection no longer touches registered memory.
#[no_mangle]
pub extern "C" fn uccl_engine_conn_destroy(conn: *mut uccl_conn_t) {
    guard((), || {
        if let Some(conn) = connections().remove(conn.cast())? {
            conn.close();
        }
        Ok(())
    })
}

/// Returns whether a connection is open.
///
/// @param conn  [in] The connection.
/// @return UCCL_OK while it is open; the cause once it is lost or closed: UCCL_ERR_REMOTE_DISCONNECT, UCCL_ERR_TIMED_OUT,
///         UCCL_ERR_CANCELED, UCCL_ERR_PROTOCOL and so on; UCCL_ERR_NOT_FOUND or UCCL_ERR_INVALID_ARGUMENT for a bad handle. A lost
///         connection does not recover: destroy it and connect again. Until it is destroyed it keeps a file descriptor, and an incoming
///         one counts towards UCCL_TCPX_MAX_CONNECTIONS.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_conn_status(conn: *mut uccl_conn_t) -> c_int {
    status(|| {
        connections().get(conn.cast())?.status()?;
        Ok(UCCL_OK)
    })
}

/// Returns the name of the pre-shared key that the peer proved, as this engine's key file names it (docs/security.md).
///
/// @param conn  [in]  The connection.
/// @param buf   [out] The name, NUL-terminated, cut to fit; empty if the peer has no key or the key has no name.
/// @param len   [in]  Bytes of buf, at least 1; 33 hold every name.
/// @return UCCL_OK, also for a lost connection; UCCL_ERR_NOT_FOUND or UCCL_ERR_INVALID_ARGUMENT, and then buf is unchanged.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_conn_peer_name(conn: *mut uccl_conn_t, buf: *mut c_char, len: usize) -> c_int {
    status(|| {
        if len == 0 {
            bail!(InvalidArgument, "len is 0");
        }
        // SAFETY: the caller passes writable memory of that size, or null.
        let buf = unsafe { out_arg(buf, "buf")? };
        let conn = connections().get(conn.cast())?;
        // SAFETY: len bytes are writable.
        unsafe { cut_text(conn.peer_key().unwrap_or_default(), std::ptr::from_mut(buf), len) };
        Ok(UCCL_OK)
    })
}

/// Returns whether the peer runs on this host, which means that its address is one of this host's.
///
/// @param conn  The connection.
/// @return true if it does; false otherwise, for a bad handle, and once the connection is lost or closed.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_conn_is_local(conn: *mut uccl_conn_t) -> bool {
    guard(false, || {
        let conn = connections().get(conn.cast())?;
        conn.status()?;
        Ok(conn.is_local())
    })
}
