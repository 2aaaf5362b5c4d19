//! Engines of the C ABI: creating one with the environment's settings or the caller's, and destroying it. Translates only.

use super::guard::{array_arg, guard, out_arg, status, str_arg};
use super::handles::engines;
use crate::config::Config;
use crate::engine::Engine;
use crate::status::{Result, UCCL_OK};
use std::ffi::{c_char, c_int};
use std::os::fd::IntoRawFd;

/// An engine: a listening port, registered memory, connections, and the threads that move data.
#[allow(non_camel_case_types)]
pub struct uccl_engine_t {
    _opaque: [u8; 0],
}

/// Creates an engine: loads the network plugin, finds the NICs, opens the listening port and starts the progress thread.
///
/// @param num_cpus   Ignored; accepted for compatibility. The library counts the cores itself (UCCL_TCPX_SOFT_THREADS overrides).
/// @param in_python  Ignored; accepted for compatibility. The library never installs signal handlers.
/// @return The engine; the caller owns it and ends it with uccl_engine_destroy. NULL on failure; uccl_engine_last_error has the cause,
///         such as a plugin that cannot be loaded, a port in use or an invalid environment variable.
///
/// Threads: any. This call reads the configuration from the environment (docs/configuration.md).
#[no_mangle]
pub extern "C" fn uccl_engine_create(num_cpus: c_int, in_python: bool) -> *mut uccl_engine_t {
    guard(std::ptr::null_mut(), || {
        let _ = (num_cpus, in_python);
        Ok(engines().insert(Engine::new(Config::from_env()?)?).cast())
    })
}

/// A setting of an engine: the name of an environment variable, and the value that overrides it.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uccl_option_t {
    /// Name of a variable of docs/configuration.md, NUL-terminated, such as "UCCL_TCPX_NUM_CHANNELS".
    pub name: *const c_char,
    /// Its value, NUL-terminated. NULL or "" means that the variable is not set.
    pub value: *const c_char,
}

/// Creates an engine like uccl_engine_create, with settings that override the environment. The environment itself does not change, so
/// the engines of one process may have different settings.
///
/// @param options      [in]  num_options settings; the last one of a name counts. Copied. May be NULL if num_options is 0.
/// @param num_options  [in]  Number of settings.
/// @param engine       [out] The engine; the caller owns it and ends it with uccl_engine_destroy.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for an unknown name, an invalid value, or a variable that applies to the whole process
///         (the log's, and those that only the network plugin reads); another negative status if the engine cannot be created.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_create_with(
    options: *const uccl_option_t,
    num_options: usize,
    engine: *mut *mut uccl_engine_t,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes that many options and a writable handle, or null.
        let (options, out) = unsafe { (array_arg(options, num_options, "options")?, out_arg(engine, "engine")?) };
        let settings = options.iter().map(setting).collect::<Result<Vec<_>>>()?;
        *out = engines().insert(Engine::new(Config::from_env_with(&settings)?)?).cast();
        Ok(UCCL_OK)
    })
}

fn setting(option: &uccl_option_t) -> Result<(&str, &str)> {
    // SAFETY: the caller of uccl_engine_create_with passes NUL-terminated texts or null.
    unsafe {
        let name = str_arg(option.name, "the name of an option")?;
        let value = if option.value.is_null() { "" } else { str_arg(option.value, name)? };
        Ok((name, value))
    }
}

/// Ends an engine: wakes blocked accepts, fails transfers in flight with UCCL_ERR_CANCELED, closes its connections, and joins its
/// threads. Its connection handles stay valid until uccl_engine_conn_destroy, but every call on them fails.
///
/// @param engine  The engine. NULL and an engine of the parent process after a fork are no-ops. A handle already destroyed only logs an
///                error.
///
/// Threads: any, once. Returns within the close deadline (UCCL_TCPX_CLOSE_TIMEOUT_MS, but at most one second), except that it also waits
/// for connections that are inside a call of the CUDA driver or of the network plugin; these have their own deadline. On return the
/// library no longer touches registered memory.
#[no_mangle]
pub extern "C" fn uccl_engine_destroy(engine: *mut uccl_engine_t) {
    guard((), || {
        engines().end(engine.cast(), |engine| {
            engine.shutdown();
            crate::logging::flush();
        })
    })
}

/// Returns a descriptor with which an event loop (poll, epoll, asyncio) waits for an engine. It becomes readable when a notification has
/// come, a transfer has ended, a connection has come or ended, and at uccl_engine_stop_accept and uccl_engine_destroy.
///
/// @param engine  [in]  The engine.
/// @param fd      [out] The descriptor, an eventfd, non-blocking and closed on exec. The caller owns it and closes it; it stays open when
///                      the engine is destroyed. It is readable at first, because it does not show what happened before.
/// @return UCCL_OK; UCCL_ERR_RESOURCE without a free descriptor; another negative status.
///
/// When it is readable, first read its 8 bytes, which resets it, then look: uccl_engine_poll for each transfer in flight,
/// uccl_engine_notif_next until there is none, uccl_engine_accept_for with timeout 0. An event between the read and the look makes it
/// readable again. All descriptors of an engine are duplicates of one: a read resets them all, so one thread reads and wakes the others.
/// Each event costs a system call from the first call of this function on. A thread that waits for one transfer needs no descriptor
/// (uccl_engine_wait), nor does one that waits for notifications (uccl_engine_notif_wait).
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_event_fd(engine: *mut uccl_engine_t, fd: *mut c_int) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable number or null.
        let out = unsafe { out_arg(fd, "fd")? };
        *out = engines().get(engine.cast())?.event_descriptor()?.into_raw_fd();
        Ok(UCCL_OK)
    })
}
