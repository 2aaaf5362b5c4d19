//! Enforces the contract: ends the process with a line on standard error. The one-thread rule of set-up calls, the settings
//! and the counters.

use nccl_net_abi::{ncclResult_t, NCCL_INTERNAL_ERROR};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Ends the process: the caller broke the contract.
macro_rules! violation {
    ($($arg:tt)*) => { $crate::rules::abort_with(format_args!($($arg)*)) };
}
pub(crate) use violation;

pub(crate) fn abort_with(what: std::fmt::Arguments<'_>) -> ! {
    eprintln!("strict-foreign: VIOLATION: {what}");
    std::process::abort()
}

/// A call for which TCPX returns an error: returns it if the plugin is lenient, else ends the process.
macro_rules! refused {
    ($($arg:tt)*) => { $crate::rules::refuse(format_args!($($arg)*)) };
}
pub(crate) use refused;

pub(crate) fn refuse(what: std::fmt::Arguments<'_>) -> ncclResult_t {
    if !settings().lenient {
        abort_with(what);
    }
    NCCL_INTERNAL_ERROR
}

/// Raises SIGPIPE in the calling thread, as a write to a closed connection does.
pub(crate) fn raise_sigpipe() {
    // SAFETY: the calling thread's own signal.
    unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGPIPE) };
}

/// Locks, ignoring poison.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The thread inside a set-up call, 0 for none.
static INSIDE: AtomicI32 = AtomicI32::new(0);

/// A running set-up call.
pub(crate) struct SetupCall;

impl SetupCall {
    pub(crate) fn enter(name: &str) -> SetupCall {
        if settings().unlocked {
            return SetupCall;
        }
        // SAFETY: a plain system call.
        let me = unsafe { libc::gettid() };
        if let Err(other) = INSIDE.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire) {
            violation!("thread {me} is inside {name} while thread {other} is inside another set-up call");
        }
        // Unserialised calls meet here.
        std::thread::sleep(Duration::from_micros(30));
        SetupCall
    }
}

impl Drop for SetupCall {
    fn drop(&mut self) {
        if !settings().unlocked {
            INSIDE.store(0, Ordering::Release);
        }
    }
}

/// A device: a name and a loopback address, or a network interface.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub name: std::ffi::CString,
    pub pci_path: Option<std::ffi::CString>,
    pub address: Ipv4Addr,
    /// It drops everything sent through it.
    pub dead: bool,
    /// It carries 4 MB a second for each comm that sends, with TCPXO.
    pub slow: bool,
}

/// What the receive manager does wrong.
pub(crate) struct Manager {
    /// `STRICT_FOREIGN_CLOSE_MS`: how long it takes to remove the rules of a comm.
    pub close_time: Duration,
    /// `STRICT_FOREIGN_ANSWERS`: see `manager`.
    pub answers: Option<std::path::PathBuf>,
    /// `STRICT_FOREIGN_MANAGER=none`: there is none, for which TCPXO ends the process at its init.
    pub missing: bool,
}

/// Settings of the process, read at `init`.
pub(crate) struct Settings {
    /// `NCCL_DYNAMIC_CHUNK_SIZE`, as strtoll reads it.
    pub chunk: usize,
    /// `STRICT_FOREIGN_CONNECT_MS` (300) and `STRICT_FOREIGN_ACCEPT_MS` (500).
    pub connect_time: Duration,
    pub accept_time: Duration,
    /// `STRICT_FOREIGN_DEVICES`: `name@address[@pci path][@nopci][@dead][@slow],...`; default one device `lo`. TCPX registers memory for the
    /// PCI device of a NIC, and crashes where there is none.
    pub devices: Vec<Device>,
    /// `STRICT_FOREIGN_LISTENS`: the number of listens that succeed.
    pub listens: u64,
    /// `STRICT_FOREIGN_SENDS`: the number of sends that succeed.
    pub sends: u64,
    /// `STRICT_FOREIGN_CLOSES`: the number of comms that close; the others stay open, with an error.
    pub closes: u64,
    /// `STRICT_FOREIGN_PAGES`: pages of the receive memory.
    pub pages: usize,
    /// `STRICT_FOREIGN_FRAGMENT`: largest fragment, bytes.
    pub fragment: usize,
    /// `STRICT_FOREIGN_LENIENT=1`: calls that make TCPX fail or hang do not end the process.
    pub lenient: bool,
    /// `STRICT_FOREIGN_CUDA=1`: use the memory of real GPUs.
    pub cuda: bool,
    /// `STRICT_FOREIGN_LATE=1`: the kernel sends from the memory of a send until the peer has acknowledged it, as with TCPX.
    pub late: bool,
    pub manager: Manager,
    /// `STRICT_FOREIGN_UNLOCKED=1`: set-up calls of several threads race instead of ending the process.
    pub unlocked: bool,
}

pub(crate) fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn number(name: &str, default: u64) -> u64 {
    text(name).and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn devices(list: &str) -> Vec<Device> {
    let c = |s: &str| std::ffi::CString::new(s).unwrap_or_default();
    let device = |entry: &str| {
        let mut fields = entry.split('@');
        let name = fields.next()?;
        let address = fields.next()?.parse().ok()?;
        let rest: Vec<&str> = fields.collect();
        let pci = rest.iter().find(|f| f.starts_with('/')).copied().unwrap_or("/sys/devices/pci0000:00/0000:00:04.0");
        let pci_path = (!rest.contains(&"nopci")).then(|| c(pci));
        Some(Device { name: c(name), pci_path, address, dead: rest.contains(&"dead"), slow: rest.contains(&"slow") })
    };
    list.split(',').filter_map(device).collect()
}

/// The settings; the first call reads them.
pub(crate) fn settings() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let chunk = text("NCCL_DYNAMIC_CHUNK_SIZE").map_or(0, |v| {
            let v = std::ffi::CString::new(v).unwrap_or_default();
            // SAFETY: a C string; the end pointer is null.
            unsafe { libc::strtoll(v.as_ptr(), std::ptr::null_mut(), 0) }
        });
        Settings {
            chunk: usize::try_from(chunk).unwrap_or(0),
            connect_time: Duration::from_millis(number("STRICT_FOREIGN_CONNECT_MS", 300)),
            accept_time: Duration::from_millis(number("STRICT_FOREIGN_ACCEPT_MS", 500)),
            devices: devices(text("STRICT_FOREIGN_DEVICES").as_deref().unwrap_or("lo@127.0.0.1")),
            listens: number("STRICT_FOREIGN_LISTENS", u64::MAX),
            sends: number("STRICT_FOREIGN_SENDS", u64::MAX),
            closes: number("STRICT_FOREIGN_CLOSES", u64::MAX),
            pages: number("STRICT_FOREIGN_PAGES", 1 << 17) as usize,
            fragment: (number("STRICT_FOREIGN_FRAGMENT", 4000) as usize).clamp(1, 4096),
            lenient: text("STRICT_FOREIGN_LENIENT").is_some(),
            cuda: text("STRICT_FOREIGN_CUDA").is_some(),
            late: text("STRICT_FOREIGN_LATE").is_some(),
            manager: Manager {
                close_time: Duration::from_millis(number("STRICT_FOREIGN_CLOSE_MS", 0)),
                answers: text("STRICT_FOREIGN_ANSWERS").map(Into::into),
                missing: text("STRICT_FOREIGN_MANAGER").is_some_and(|word| word == "none"),
            },
            unlocked: text("STRICT_FOREIGN_UNLOCKED").is_some(),
        }
    })
}

/// Counters that a test can read while or after the plugin runs, from the file that `STRICT_FOREIGN_COUNTERS` names: eight bytes
/// each, in this order.
#[repr(C)]
#[derive(Default)]
#[allow(missing_docs, reason = "names say it")]
pub struct Counters {
    pub registrations: AtomicU64,
    pub registrations_most: AtomicU64,
    pub registrations_ever: AtomicU64,
    pub descriptors: AtomicU64,
    pub descriptors_most: AtomicU64,
    pub imports: AtomicU64,
    pub comms: AtomicU64,
    pub connects_begun: AtomicU64,
    pub connects_ended: AtomicU64,
    pub accepts_begun: AtomicU64,
    pub accepts_ended: AtomicU64,
    pub pages_out: AtomicU64,
    pub warnings: AtomicU64,
    pub listens: AtomicU64,
    pub messages_in: AtomicU64,
    pub flow_rules: AtomicU64,
}

/// The counters of this process.
pub fn counters() -> &'static Counters {
    static MAPPED: AtomicPtr<Counters> = AtomicPtr::new(std::ptr::null_mut());
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let mapped = text("STRICT_FOREIGN_COUNTERS").and_then(|path| map(&path));
        let counters = mapped.unwrap_or_else(|| Box::into_raw(Box::default()));
        MAPPED.store(counters, Ordering::Release);
    });
    // SAFETY: set above, never freed.
    unsafe { &*MAPPED.load(Ordering::Acquire) }
}

fn map(path: &str) -> Option<*mut Counters> {
    use std::os::fd::AsRawFd;
    let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).ok()?;
    file.set_len(4096).ok()?;
    // SAFETY: a shared mapping of a file of that length.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    (at != libc::MAP_FAILED).then_some(at.cast())
}

/// Adds to a counter and records its maximum in another.
pub(crate) fn up(counter: &AtomicU64, most: Option<&AtomicU64>, by: u64) {
    let now = counter.fetch_add(by, Ordering::AcqRel) + by;
    if let Some(most) = most {
        most.fetch_max(now, Ordering::AcqRel);
    }
}

pub(crate) fn down(counter: &AtomicU64, by: u64) {
    counter.fetch_sub(by, Ordering::AcqRel);
}
