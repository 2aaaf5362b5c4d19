//! Log lines go to the logger that `init` received, else to the `log` crate.
//! Knows nothing of comms; callers say who and why.

use std::ffi::CString;
use std::sync::atomic::{AtomicUsize, Ordering};

use nccl_net_abi::{ncclDebugLogger_t, NCCL_LOG_INFO, NCCL_LOG_WARN};

/// `NCCL_NET` of NCCL's debug subsystems.
const SUBSYSTEM_NET: std::ffi::c_ulong = 16;

/// The logger's address, 0 when there is none.
static LOGGER: AtomicUsize = AtomicUsize::new(0);

/// Takes the logger of `init`; none leaves the current one.
pub fn set(logger: ncclDebugLogger_t) {
    if let Some(function) = logger {
        LOGGER.store(function as usize, Ordering::Release);
    }
}

/// Something went wrong.
pub fn warn(message: &str) {
    if !foreign(NCCL_LOG_WARN, message) {
        log::warn!(target: "soft_plugin", "{message}");
    }
}

/// Something worth a line.
pub fn info(message: &str) {
    if !foreign(NCCL_LOG_INFO, message) {
        log::info!(target: "soft_plugin", "{message}");
    }
}

fn foreign(level: i32, message: &str) -> bool {
    let address = LOGGER.load(Ordering::Acquire);
    if address == 0 {
        return false;
    }
    // SAFETY: only `set` stores here, and it stores the address of a function of exactly this type.
    let logger: ncclDebugLogger_t = unsafe { std::mem::transmute::<usize, ncclDebugLogger_t>(address) };
    let (Some(logger), Ok(line)) = (logger, CString::new(message.replace('\0', " "))) else { return false };
    // SAFETY: the format takes one C string; all strings are terminated and outlive the call.
    unsafe { logger(level, SUBSYSTEM_NET, c"soft-plugin".as_ptr(), 0, c"%s".as_ptr(), line.as_ptr()) };
    true
}
