//! Engines of the C ABI: creation with the environment's settings or with the caller's, and the end. Translates only.

use super::guard::{array_arg, guard, out_arg, status, str_arg};
use super::handles::engines;
use crate::config::Config;
use crate::engine::Engine;
use crate::status::{Result, UCCL_OK};
use std::ffi::{c_char, c_int};

/// An engine: a listening port, a registry of memory, connections, and the threads that move data.
#[allow(non_camel_case_types)]
pub struct uccl_engine_t {
    _opaque: [u8; 0],
}

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
        Ok(engines().insert(Engine::new(Config::from_env()?)?).cast())
    })
}

/// A setting of an engine: an environment variable, by its name, and the text that stands for it.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uccl_option_t {
    /// Name of a variable of docs/configuration.md, NUL-terminated, such as "UCCL_TCPX_NUM_CHANNELS".
    pub name: *const c_char,
    /// What the variable would hold, NUL-terminated. NULL or "": as if the variable were not set.
    pub value: *const c_char,
}

/// Creates an engine as uccl_engine_create does, with settings that override the environment. The environment itself is not changed,
/// so engines of one process may have different settings.
///
/// @param options      [in]  num_options settings; the last one of a name counts. Copied. May be NULL when num_options is 0.
/// @param num_options  [in]  Number of settings.
/// @param engine       [out] The engine, owned by the caller, to be ended with uccl_engine_destroy.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a name that no variable has, a variable of the process (the log's, and what only the
///         network plugin reads: these cannot differ between engines) or a value that cannot be understood; another negative status
///         when the engine cannot be created.
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
/// threads. Connection handles of this engine stay valid (every call on them fails) until uccl_engine_conn_destroy.
///
/// @param engine  The engine; NULL is a no-op, and so is an engine of the parent process after a fork; a handle already destroyed is an
///                error that is logged, nothing else.
///
/// Threads: any, once. Returns within the close deadline (UCCL_TCPX_CLOSE_TIMEOUT_MS, one second at most). Connections that a call of the
/// CUDA driver or of the network plugin keeps are waited for, and have a deadline of their own then. On return nothing touches
/// registered memory.
#[no_mangle]
pub extern "C" fn uccl_engine_destroy(engine: *mut uccl_engine_t) {
    guard((), || {
        engines().end(engine.cast(), |engine| {
            engine.shutdown();
            crate::logging::flush();
        })
    })
}
