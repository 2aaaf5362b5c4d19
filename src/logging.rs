//! The log, at the level of UCCL_P2P_LOG_LEVEL: lines go to standard error through env_logger, or to a function of the application.
//! Where the process has a logger of its own, that one gets them.

use crate::fork::PerProcess;
use crate::status::{bail, Result};
use parking_lot::RwLock;
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void, CString};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::Once;

/// The application's function for log lines, and its argument.
#[derive(Clone, Copy)]
pub(crate) struct Callback {
    pub call: unsafe extern "C" fn(level: c_int, text: *const c_char, user: *mut c_void),
    pub user: *mut c_void,
}

/// The callback in force, or null. Read and freed under `CALLING`; a child of fork begins with its parent's.
static CALLBACK: AtomicPtr<Callback> = AtomicPtr::new(std::ptr::null_mut());
/// Held for reading while the callback runs.
static CALLING: PerProcess<RwLock<()>> = PerProcess::new(RwLock::default);
/// Whether this library's logger is the one of the process.
static OURS: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// This thread is inside the callback. Has no destructor, so it is there to the thread's end.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

struct Log {
    stderr: env_logger::Logger,
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.stderr.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.stderr.matches(record) || to_callback(record) {
            return;
        }
        self.stderr.log(record);
    }

    fn flush(&self) {}
}

/// Hands a line to the callback; `false` where there is none, or this thread is inside of it.
fn to_callback(record: &log::Record<'_>) -> bool {
    if CALLBACK.load(Ordering::Acquire).is_null() || INSIDE.get() {
        return false;
    }
    // Recursive: a line must not wait for another thread that waits for the end of all calls.
    let _calling = CALLING.get().read_recursive();
    // SAFETY: null, or a box that set_callback frees only while nobody holds the lock.
    let Some(callback) = (unsafe { CALLBACK.load(Ordering::Acquire).as_ref() }) else { return false };
    let text = CString::new(record.args().to_string().replace('\0', " ")).unwrap_or_default();
    INSIDE.set(true);
    // SAFETY: the application gave both, for calls from any thread with a NUL-terminated text.
    unsafe { (callback.call)(record.level() as c_int, text.as_ptr(), callback.user) };
    INSIDE.set(false);
    true
}

/// Puts another callback in force, or none. On return no call of the one before runs.
pub(crate) fn set_callback(callback: Option<Callback>) -> Result<()> {
    init();
    if INSIDE.get() {
        bail!(InvalidArgument, "the log callback cannot be changed inside a log callback");
    }
    if !OURS.load(Ordering::Acquire) {
        bail!(Unsupported, "the process has a logger of its own, which gets the lines");
    }
    let fresh = callback.map_or(std::ptr::null_mut(), |callback| Box::into_raw(Box::new(callback)));
    let old = CALLBACK.swap(fresh, Ordering::AcqRel);
    let _nobody_calls = CALLING.get().write();
    if !old.is_null() {
        // SAFETY: a box made above, replaced by now, and no call uses it while this thread holds the lock.
        drop(unsafe { Box::from_raw(old) });
    }
    Ok(())
}

/// Installs the logger, once. Done by the first engine.
pub(crate) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let level = crate::config::log_level();
        // RUST_LOG, where it is set, narrows modules further.
        let env = env_logger::Env::default();
        let mut builder = env_logger::Builder::new();
        builder.filter_level(level);
        if std::env::var_os("RUST_LOG").is_some() {
            builder.parse_env(env);
        }
        builder.format(|out, record| {
            writeln!(out, "{} uccl_p2p[{}] {} {}", out.timestamp_millis(), std::process::id(), record.level(), record.args())
        });
        let stderr = builder.build();
        let most = stderr.filter();
        // An embedding Rust program may have installed its logger first; that one then serves.
        if log::set_boxed_logger(Box::new(Log { stderr })).is_ok() {
            log::set_max_level(most);
            OURS.store(true, Ordering::Release);
        }
    });
}
