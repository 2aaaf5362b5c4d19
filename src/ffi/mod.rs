//! The C ABI: `extern "C"` functions only. Every export's body is one call of a guard of `guard.rs` (null checks and
//! panics end there); handles are looked up in `handles.rs`. Nothing outside this module knows C.
//!
//! The doc comments here are the documentation of `include/uccl_engine.h`.

mod guard;
mod handles;
mod notif;
mod transfer;

use crate::engine::Engine;
use crate::status::{bail, ErrorKind, StatusCode, UCCL_IN_PROGRESS, UCCL_OK};
use guard::{guard, out_arg, status, str_arg};
use handles::{CONNECTIONS, ENGINES};
use std::ffi::{c_char, c_int, CStr};
use std::sync::atomic::Ordering;

/// An engine: a listening port, a registry of memory, connections, and the threads that move data.
#[allow(non_camel_case_types)]
pub struct uccl_engine_t {
    _opaque: [u8; 0],
}

/// A connection to a peer engine: one control connection and several data channels.
#[allow(non_camel_case_types)]
pub struct uccl_conn_t {
    _opaque: [u8; 0],
}

/// A registered memory region. 0 is never valid.
#[allow(non_camel_case_types)]
pub type uccl_mr_t = u64;

/// Creates an engine: loads the network plugin, finds the NICs, opens the listening port and starts the progress thread.
///
/// @param num_cpus   Accepted for compatibility, as upstream; the library decides by the machine (UCCL_TCPX_SOFT_THREADS overrides).
/// @param in_python  The caller is a Python process. Accepted for compatibility; the library installs no signal handlers either way.
/// @return The engine, owned by the caller, to be ended with uccl_engine_destroy; NULL on failure (uccl_engine_last_error tells why:
///         the plugin cannot be loaded, the port is taken, an environment variable cannot be understood).
///
/// Threads: any. Configuration comes from the environment (docs/configuration.md), read at this call.
#[no_mangle]
pub extern "C" fn uccl_engine_create(num_cpus: c_int, in_python: bool) -> *mut uccl_engine_t {
    guard(std::ptr::null_mut(), || {
        let _ = (num_cpus, in_python);
        Ok(ENGINES.insert(Engine::new(crate::config::Config::from_env()?)?).cast())
    })
}

/// Ends an engine: wakes blocked accepts, fails transfers in flight with UCCL_ERR_CANCELED, closes its connections, and joins its
/// threads. Connection handles of this engine stay valid (every call on them fails) until uccl_engine_conn_destroy.
///
/// @param engine  The engine; NULL is a no-op; a handle already destroyed is an error that is logged, nothing else.
///
/// Threads: any, once. Returns within the close deadline (UCCL_TCPX_CLOSE_TIMEOUT_MS). On return nothing touches registered memory.
#[no_mangle]
pub extern "C" fn uccl_engine_destroy(engine: *mut uccl_engine_t) {
    guard((), || {
        if engine.is_null() {
            return Ok(());
        }
        ENGINES.remove(engine.cast())?.shutdown();
        Ok(())
    })
}

/// Connects to a peer engine. Blocks until all channels are up; needs no call of the peer's application.
///
/// @param engine        [in] The engine.
/// @param ip_addr       [in] The peer's IPv4 or IPv6 address or host name, NUL-terminated.
/// @param remote_gpu    [in] The peer's GPU as its metadata names it: a PCI address ("0000:4a:00.0", any case, 4- or 8-digit domain),
///                      a CUDA index ("0"), or "-1" for a host without a GPU. NULL or "": not given.
/// @param remote_port   [in] The peer's port, 1 to 65535.
/// @param same_process  [in] The peer is an engine of this process; accepted for compatibility, data takes the same path.
/// @return The connection, owned by the caller, to be ended with uccl_engine_conn_destroy; NULL on failure (uccl_engine_last_error).
///
/// Threads: any; several connects may run at once. Deadline: UCCL_TCPX_CONNECT_TIMEOUT_MS.
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
        let engine = ENGINES.get(engine.cast())?;
        // SAFETY: the caller passes NUL-terminated strings or null.
        let (ip, gpu) =
            unsafe { (str_arg(ip_addr, "ip_addr")?, if remote_gpu.is_null() { "" } else { str_arg(remote_gpu, "remote_gpu")? }) };
        let Ok(port @ 1..) = u16::try_from(remote_port) else {
            bail!(InvalidArgument, "remote_port {remote_port} is not in 1..=65535")
        };
        Ok(CONNECTIONS.insert(engine.connect(ip, gpu, port)?).cast())
    })
}

/// Takes the next connection that a peer opened. Blocks until there is one or uccl_engine_stop_accept is called.
///
/// @param engine          [in]  The engine.
/// @param ip_addr_buf     [out] The peer's address as text, always NUL-terminated, cut to fit.
/// @param ip_addr_buf_len [in]  Size of ip_addr_buf in bytes, at least 1; 46 holds every address.
/// @param remote_gpu_idx  [out] CUDA index of the peer's GPU as the peer counts, -1 when it has none.
/// @return The connection, owned by the caller, to be ended with uccl_engine_conn_destroy; NULL after uccl_engine_stop_accept or on
///         failure, and then the outputs are untouched except that ip_addr_buf holds an empty string.
///
/// Threads: any. Data moves over a connection from the moment the peer's connect returned, accepted or not.
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
        let engine = ENGINES.get(engine.cast())?;
        let conn = engine.accept()?;
        let ip = conn.peer_ip().to_string();
        let n = ip.len().min(ip_addr_buf_len - 1);
        // SAFETY: n + 1 <= ip_addr_buf_len bytes are writable.
        unsafe {
            std::ptr::copy_nonoverlapping(ip.as_ptr().cast(), ip_addr_buf, n);
            *ip_addr_buf.add(n) = 0;
        }
        *gpu = conn.peer_gpu_index();
        Ok(CONNECTIONS.insert(conn).cast())
    })
}

/// Wakes every blocked uccl_engine_accept of the engine; these and later ones return NULL. Connections that exist stay.
///
/// @param engine  The engine; NULL is a no-op.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_stop_accept(engine: *mut uccl_engine_t) {
    guard((), || {
        if !engine.is_null() {
            ENGINES.get(engine.cast())?.stop_accept();
        }
        Ok(())
    })
}

/// Marks the connection as listened to. Kept for compatibility: notifications and data arrive without it.
///
/// @param conn  The connection.
/// @return UCCL_OK; -1 when it was started already; another negative status for a bad handle or a lost connection.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_start_listener(conn: *mut uccl_conn_t) -> c_int {
    status(|| {
        let conn = CONNECTIONS.get(conn.cast())?;
        conn.status()?;
        if conn.listener_started.swap(true, Ordering::AcqRel) {
            bail!(InvalidArgument, "the listener of this connection was started already");
        }
        Ok(UCCL_OK)
    })
}

/// Undoes uccl_engine_start_listener. Stopping what was not started is not an error.
///
/// @param conn  The connection.
/// @return UCCL_OK, or a negative status for a bad handle or a lost connection.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_stop_listener(conn: *mut uccl_conn_t) -> c_int {
    status(|| {
        let conn = CONNECTIONS.get(conn.cast())?;
        conn.listener_started.store(false, Ordering::Release);
        conn.status()?;
        Ok(UCCL_OK)
    })
}

/// Closes a connection. Transfers in flight end with UCCL_ERR_CANCELED here and UCCL_ERR_REMOTE_DISCONNECT at the peer.
///
/// @param conn  The connection; NULL is a no-op; a handle already destroyed is an error that is logged, nothing else.
///
/// Threads: any, once, in any order with engine and regions. On return nothing of this connection touches registered memory.
#[no_mangle]
pub extern "C" fn uccl_engine_conn_destroy(conn: *mut uccl_conn_t) {
    guard((), || {
        if conn.is_null() {
            return Ok(());
        }
        CONNECTIONS.remove(conn.cast())?.close();
        Ok(())
    })
}

/// Tells whether a connection is up.
///
/// @param conn  [in] The connection.
/// @return UCCL_OK while it is; why not once it is lost or closed: UCCL_ERR_REMOTE_DISCONNECT, UCCL_ERR_TIMED_OUT, UCCL_ERR_CANCELED,
///         UCCL_ERR_PROTOCOL and so on; UCCL_ERR_NOT_FOUND or UCCL_ERR_INVALID_ARGUMENT for a bad handle. A lost connection stays lost:
///         destroy it and connect anew.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_conn_status(conn: *mut uccl_conn_t) -> c_int {
    status(|| {
        CONNECTIONS.get(conn.cast())?.status()?;
        Ok(UCCL_OK)
    })
}

/// Tells whether the peer runs on this host (its address is one of this host's).
///
/// @param conn  The connection.
/// @return true when it does; false otherwise, for a bad handle, and once the connection is lost or closed.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_conn_is_local(conn: *mut uccl_conn_t) -> bool {
    guard(false, || {
        let conn = CONNECTIONS.get(conn.cast())?;
        conn.status()?;
        Ok(conn.is_local())
    })
}

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
        *out = ENGINES.get(engine.cast())?.register(data, size)?;
        Ok(UCCL_OK)
    })
}

/// Ends a registration. Waits for transfers that use the region; what is not finished within UCCL_TCPX_CLOSE_TIMEOUT_MS is failed
/// together with its connection. Peers that use the region afterwards get UCCL_ERR_REMOTE_ACCESS.
///
/// @param engine  The engine; NULL is a no-op.
/// @param mr      The region; an unknown one is an error that is logged, nothing else.
///
/// Threads: any. On return the library touches this memory no more, and the caller may free it.
#[no_mangle]
pub extern "C" fn uccl_engine_mr_destroy(engine: *mut uccl_engine_t, mr: uccl_mr_t) {
    guard((), || {
        if engine.is_null() {
            return Ok(());
        }
        ENGINES.get(engine.cast())?.deregister(mr)
    })
}

/// Describes the engine to peers as "ip:port?gpu": gpu is the PCI address of the engine's GPU, or "-1" without one.
///
/// @param engine    [in]  The engine.
/// @param metadata  [out] NUL-terminated text, owned by the caller, to be freed with uccl_engine_free_metadata.
/// @return UCCL_OK or a negative status; on failure *metadata is untouched.
///
/// Threads: any. C++: the overload of the same name allocates with new[], to be freed with delete[].
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_get_metadata(engine: *mut uccl_engine_t, metadata: *mut *mut c_char) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable pointer or null.
        let out = unsafe { out_arg(metadata, "metadata")? };
        let text = ENGINES.get(engine.cast())?.metadata();
        let Ok(text) = std::ffi::CString::new(text) else { bail!(Internal, "metadata holds a NUL") };
        *out = text.into_raw();
        Ok(UCCL_OK)
    })
}

/// Frees what uccl_engine_get_metadata of the C face returned.
///
/// @param metadata  The text; NULL is a no-op.
///
/// Threads: any, once per text.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_free_metadata(metadata: *mut c_char) {
    guard((), || {
        if !metadata.is_null() {
            // SAFETY: it came from CString::into_raw in uccl_engine_get_metadata.
            drop(unsafe { std::ffi::CString::from_raw(metadata) });
        }
        Ok(())
    })
}

/// The text of uccl_engine_get_metadata, written into the caller's buffer.
///
/// @param engine  [in]  The engine.
/// @param buf     [out] NUL-terminated text. May be NULL when len is 0.
/// @param len     [in]  Size of buf in bytes.
/// @param needed  [out] Bytes needed with the NUL, written on success and when buf is too small. May be NULL.
/// @return UCCL_OK; UCCL_ERR_RESOURCE when buf is too small (nothing is written to it); another negative status.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_metadata_into(
    engine: *mut uccl_engine_t,
    buf: *mut c_char,
    len: usize,
    needed: *mut usize,
) -> c_int {
    status(|| {
        let text = ENGINES.get(engine.cast())?.metadata();
        // SAFETY: the caller passes a writable pointer or null.
        if let Some(needed) = unsafe { needed.as_mut() } {
            *needed = text.len() + 1;
        }
        if len < text.len() + 1 {
            bail!(Resource, "metadata needs {} bytes, the buffer has {len}", text.len() + 1);
        }
        // SAFETY: the caller passes len writable bytes.
        let out = unsafe { out_arg(buf, "buf")? } as *mut c_char;
        // SAFETY: text.len() + 1 <= len bytes are writable.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr().cast(), out, text.len());
            *out.add(text.len()) = 0;
        }
        Ok(UCCL_OK)
    })
}

/// Serialises a FIFO item for [data, data + size) of a region: what a peer needs to read or write it.
///
/// @param engine    [in]  The engine.
/// @param mr        [in]  The region.
/// @param data      [in]  First byte, inside the region.
/// @param size      [in]  Bytes; the range must lie inside the region. A size over 4 GiB - 1 is stored as 4 GiB - 1: the field has 32
///                  bits, and transfers take their length from their own argument.
/// @param fifo_buf  [out] FIFO_SIZE (64) bytes: a FifoItem in memory order. It carries the region's secret token: whoever has it may
///                  access the whole region until the region is deregistered.
/// @return UCCL_OK, UCCL_ERR_NOT_FOUND, UCCL_ERR_INVALID_ARGUMENT.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_prepare_fifo(
    engine: *mut uccl_engine_t,
    mr: uccl_mr_t,
    data: *const std::ffi::c_void,
    size: usize,
    fifo_buf: *mut c_char,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes 64 writable bytes or null.
        let out = unsafe { out_arg(fifo_buf, "fifo_buf")? } as *mut c_char;
        let item = ENGINES.get(engine.cast())?.fifo_item(mr, data as usize, size)?;
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
/// @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT for NULL.
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

/// IPC descriptor of a registered buffer. This library moves data through its channels also inside one host, so there is none.
///
/// @param engine   [in]  The engine.
/// @param addr     [in]  Address inside a registered region.
/// @param ipc_buf  [out] IPC_INFO_SIZE (128) bytes, zeroed.
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
        if !ENGINES.get(engine.cast())?.is_registered(addr) {
            bail!(NotFound, "no registered region holds address {addr:#x}");
        }
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(buf, 0, IPC_INFO_SIZE) };
        *flag = false;
        Ok(UCCL_OK)
    })
}

/// Points an IPC descriptor at a sub-range. Descriptors of this library are empty; the range is checked, the buffer stays as it is.
///
/// @param ipc_buf    [in,out] IPC_INFO_SIZE (128) bytes.
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

/// A sentence for a status number.
///
/// @param status  UCCL_OK, UCCL_IN_PROGRESS or UCCL_ERR_*; any other number gives "unknown status".
/// @return Static text, never NULL, never to be freed.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_strerror(status: StatusCode) -> *const c_char {
    guard(c"unknown status".as_ptr(), || {
        let text: &'static CStr = match status {
            UCCL_OK => c"success",
            UCCL_IN_PROGRESS => c"in progress",
            code => match ErrorKind::ALL.into_iter().find(|k| k.code() == code) {
                Some(kind) => kind.describe(),
                None => c"unknown status",
            },
        };
        Ok(text.as_ptr())
    })
}

/// The cause of the last failed call of this thread, in words, with addresses and names.
///
/// @return NUL-terminated text, empty when no call failed yet. Valid until this thread's next failing call; never to be freed.
///
/// Threads: each has its own.
#[no_mangle]
pub extern "C" fn uccl_engine_last_error() -> *const c_char {
    guard(c"".as_ptr(), || Ok(guard::last_error()))
}

/// The status of the last failed call of this thread: what a function that returns a handle, a bool or nothing could not say.
///
/// @return UCCL_OK when no call failed yet, else a negative UCCL_ERR_*.
///
/// Threads: each has its own.
#[no_mangle]
pub extern "C" fn uccl_engine_last_status() -> c_int {
    guard(UCCL_OK, || Ok(guard::last_status()))
}

/// Version of the library.
///
/// @return "major.minor.patch", static text, never to be freed.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn uccl_engine_version() -> *const c_char {
    guard(c"".as_ptr(), || Ok(concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()))
}

/// Bytes of the name and msg fields of notify_msg_t.
pub const MSG_SIZE: usize = 256;
/// Bytes of a serialised FIFO item.
// Older compilers do not count the assertion below as a use.
#[allow(dead_code)]
pub const FIFO_SIZE: usize = 64;
/// Bytes of an IPC descriptor.
pub const IPC_INFO_SIZE: usize = 128;

pub use crate::engine::FifoItem;
const _: () = assert!(std::mem::size_of::<FifoItem>() == FIFO_SIZE);
