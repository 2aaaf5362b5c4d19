//! Notifications of the C ABI. Translates only.

use super::connection::uccl_conn_t;
use super::engine::uccl_engine_t;
use super::guard::{array_arg, bytes_arg, deadline, guard, in_arg, out_arg, status};
use super::handles::{connections, engines, notifications};
use crate::engine::Notification;
use crate::status::{UCCL_IN_PROGRESS, UCCL_OK};
use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

/// Bytes of the name and msg fields of notify_msg_t.
pub const UCCL_MSG_SIZE: usize = 256;

/// A fixed-size notification.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy)]
pub struct notify_msg_t {
    /// Name that the sender gave, NUL-terminated.
    pub name: [c_char; UCCL_MSG_SIZE],
    /// The message: 256 bytes, padded with zeros.
    pub msg: [c_char; UCCL_MSG_SIZE],
}

/// Unused; kept for compatibility with code that names it.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(dead_code)]
pub struct md_t {
    /// The notification.
    pub notify_data: notify_msg_t,
}

/// A received notification of any length.
#[allow(non_camel_case_types)]
pub struct uccl_notif_t {
    _opaque: [u8; 0],
}

/// Sends a fixed-size notification. It arrives after the data of every transfer that was complete before this call.
///
/// @param conn        [in] The connection.
/// @param notify_msg  [in] name up to its first NUL, and all 256 bytes of msg. Copied; may be reused at once.
/// @return UCCL_OK once it is queued for the peer; a negative status if the connection is lost or an argument is bad.
///
/// Threads: any; the notifications of one thread arrive in order.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_send_notif(conn: *mut uccl_conn_t, notify_msg: *const notify_msg_t) -> c_int {
    status(|| {
        // SAFETY: the caller passes a readable notify_msg_t or null.
        let msg = unsafe { in_arg(notify_msg, "notify_msg")? };
        // SAFETY: c_char arrays viewed as bytes.
        let (name, body) = unsafe {
            (
                array_arg(msg.name.as_ptr().cast::<u8>(), UCCL_MSG_SIZE, "name")?,
                array_arg(msg.msg.as_ptr().cast::<u8>(), UCCL_MSG_SIZE, "msg")?,
            )
        };
        let end = name.iter().position(|&b| b == 0).unwrap_or(UCCL_MSG_SIZE);
        connections().get(conn.cast())?.notify(&name[..end], body)?;
        Ok(UCCL_OK)
    })
}

/// Sends a notification of any length up to 64 MiB (name and message together). Ordering as uccl_engine_send_notif.
///
/// @param conn      [in] The connection.
/// @param name      [in] Bytes of the name; may be NULL if name_len is 0.
/// @param name_len  [in] Bytes.
/// @param msg       [in] Bytes of the message; may be NULL if msg_len is 0.
/// @param msg_len   [in] Bytes.
/// @return UCCL_OK once it is queued for the peer; -1 (UCCL_ERR_INVALID_ARGUMENT) above 64 MiB; another negative status.
///
/// The bytes are copied; the caller may reuse them at once. Blocks only while more than 256 MiB of this connection wait to be sent.
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_send_notif_bytes(
    conn: *mut uccl_conn_t,
    name: *const c_void,
    name_len: usize,
    msg: *const c_void,
    msg_len: usize,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes that many readable bytes.
        let (name, msg) = unsafe { (bytes_arg(name, name_len, "name")?, bytes_arg(msg, msg_len, "msg")?) };
        connections().get(conn.cast())?.notify(name, msg)?;
        Ok(UCCL_OK)
    })
}

/// Takes up to max notifications of any engine of this process, oldest first. Names are cut to 255 bytes and messages to 256;
/// uccl_engine_notif_next returns them whole.
///
/// @param out    [out] Array of max items. May be NULL if max is 0.
/// @param max    [in]  Items in out.
/// @param count  [out] Items written, 0 to max.
/// @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT. The rest stays for the next call.
///
/// Threads: any; each notification is handed out once.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_get_notifs(out: *mut notify_msg_t, max: usize, count: *mut usize) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable count, and max writable items.
        let count = unsafe { out_arg(count, "count")? };
        if max > 0 {
            // SAFETY: as above.
            unsafe { out_arg(out, "out")? };
        }
        let mut n = 0;
        while n < max {
            let Some(notif) = next_of_process() else { break };
            let mut msg = notify_msg_t { name: [0; UCCL_MSG_SIZE], msg: [0; UCCL_MSG_SIZE] };
            copy_prefix(&mut msg.name[..UCCL_MSG_SIZE - 1], &notif.name);
            copy_prefix(&mut msg.msg, &notif.msg);
            // SAFETY: n < max items are writable.
            unsafe { out.add(n).write(msg) };
            n += 1;
        }
        *count = n;
        Ok(UCCL_OK)
    })
}

/// The oldest notification of any engine. If there is none, drives all engines once and looks again.
fn next_of_process() -> Option<Notification> {
    crate::engine::next_notification_of_process().or_else(|| {
        engines().all().iter().for_each(|e| e.drive());
        crate::engine::next_notification_of_process()
    })
}

fn copy_prefix(to: &mut [c_char], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from as c_char;
    }
}

/// Takes the oldest notification.
///
/// @param engine  [in]  The engine to take from; NULL: any engine of this process.
/// @param notif   [out] The notification; the caller owns it and frees it with uccl_engine_notif_free. NULL if there is none.
/// @return UCCL_OK (also if there is none), or a negative status; on failure *notif is unchanged.
///
/// Threads: any; each notification is handed out once, by this call or by uccl_engine_get_notifs.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_notif_next(engine: *mut uccl_engine_t, notif: *mut *mut uccl_notif_t) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable pointer or null.
        let out = unsafe { out_arg(notif, "notif")? };
        let next = if engine.is_null() { next_of_process() } else { engines().get(engine.cast())?.next_notification() };
        *out = match next {
            Some(notification) => notifications().insert(Arc::new(notification)).cast(),
            None => std::ptr::null_mut(),
        };
        Ok(UCCL_OK)
    })
}

/// Takes the oldest notification of an engine, waiting for one at most for the given time.
///
/// @param engine      [in]  The engine.
/// @param timeout_ms  [in]  Longest wait in milliseconds; 0: does not block; negative: until there is one.
/// @param notif       [out] The notification; the caller owns it and frees it with uccl_engine_notif_free.
/// @return UCCL_OK; UCCL_IN_PROGRESS if timeout_ms passed first; UCCL_ERR_CANCELED if the engine is destroyed meanwhile; another negative
///         status. Unless it is UCCL_OK, *notif is unchanged.
///
/// Threads: any; each notification is handed out once.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_notif_wait(
    engine: *mut uccl_engine_t,
    timeout_ms: i64,
    notif: *mut *mut uccl_notif_t,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable pointer or null.
        let out = unsafe { out_arg(notif, "notif")? };
        let engine = engines().get(engine.cast())?;
        let Some(next) = engine.notification_until(deadline(timeout_ms))? else { return Ok(UCCL_IN_PROGRESS) };
        *out = notifications().insert(Arc::new(next)).cast();
        Ok(UCCL_OK)
    })
}

/// Returns the name of a notification.
///
/// @param notif  [in]  The notification.
/// @param len    [out] Bytes of the name.
/// @return The bytes, not NUL-terminated, valid until uccl_engine_notif_free; NULL for bad arguments.
///
/// Threads: any, but not while another thread frees the notification.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_notif_name(notif: *const uccl_notif_t, len: *mut usize) -> *const c_char {
    guard(std::ptr::null(), || {
        // SAFETY: the caller passes a writable length or null.
        let len = unsafe { out_arg(len, "len")? };
        // The table keeps the notification, and with it the bytes, until it is freed.
        let notif = notifications().get(notif.cast())?;
        *len = notif.name.len();
        Ok(notif.name.as_ptr().cast())
    })
}

/// Returns the message of a notification.
///
/// @param notif  [in]  The notification.
/// @param len    [out] Bytes of the message.
/// @return The bytes, valid until uccl_engine_notif_free; NULL for bad arguments.
///
/// Threads: any, but not while another thread frees the notification.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_notif_msg(notif: *const uccl_notif_t, len: *mut usize) -> *const c_void {
    guard(std::ptr::null(), || {
        // SAFETY: the caller passes a writable length or null.
        let len = unsafe { out_arg(len, "len")? };
        let notif = notifications().get(notif.cast())?;
        *len = notif.msg.len();
        Ok(notif.msg.as_ptr().cast())
    })
}

/// Frees a notification that uccl_engine_notif_next returned.
///
/// @param notif  The notification. NULL and a notification of the parent process after a fork are no-ops. One already freed only logs an
///               error.
///
/// Threads: any, once per notification.
#[no_mangle]
pub extern "C" fn uccl_engine_notif_free(notif: *mut uccl_notif_t) {
    guard((), || {
        notifications().remove(notif.cast())?;
        Ok(())
    })
}
