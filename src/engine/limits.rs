//! How many of the process's descriptors and how much of its memory the engine may take for peers: shares of the limits, with a
//! reserve for the application. Knows nothing about set-ups, connections or what travels on sockets.

use crate::config::Budgets;
use crate::status::{err, Error, ErrorKind, Result};
use process::PerProcess;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the engine may have open or in progress. All but `ceiling` count objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Incoming connections whose handshake is not complete.
    pub unauthenticated: usize,
    /// Incoming set-ups of authenticated peers.
    pub incoming: usize,
    /// How many of these one address may have before it must give way to others.
    pub per_peer: usize,
    /// Outgoing set-ups.
    pub outgoing: usize,
    /// Connections that wait for the application's accept.
    pub waiting: usize,
    /// Incoming connections that are up, in total and from one address.
    pub connections: usize,
    pub of_address: usize,
    /// Transfers of all peers in flight.
    pub transfers: usize,
    /// Memory that all peers may take, and one connection: lists, unread answers, incomplete frames.
    pub peer_bytes: usize,
    pub peer_bytes_of_one: usize,
    /// Bytes of notifications that wait for the application, in total and from one connection.
    pub notif_bytes: usize,
    pub notif_bytes_of_one: usize,
    /// Log lines per second that all peers can cause.
    pub log_lines: usize,
    /// The engine opens nothing for a peer when the descriptor numbers in use reach this; the rest is left to the application.
    pub ceiling: usize,
}

/// Assumed cost of a connection that is being set up or waits for accept, at most.
const CONNECTION_BYTES: u64 = 1 << 20;
/// Assumed cost of an idle connection, and of a peer's transfer without its list, at most.
const IDLE_BYTES: u64 = 256 << 10;
const TRANSFER_BYTES: u64 = 1 << 10;
/// Upper bound for waiting notifications, however much memory there is.
const MAX_NOTIF_BYTES: u64 = 1 << 30;
/// Log lines per second that peers can cause.
const LOG_LINES: usize = 50;

impl Limits {
    /// Shares of `nofile` descriptors and of `memory` bytes.
    pub(crate) fn from(nofile: u64, memory: u64) -> Limits {
        let nofile = usize::try_from(nofile.clamp(64, 1 << 24)).unwrap_or(64);
        let affordable = usize::try_from(memory / 16 / CONNECTION_BYTES).unwrap_or(usize::MAX).max(8);
        // The kernel allocates the lowest free number: staying below a ceiling leaves the rest to the application.
        let reserve = (nofile / 4).clamp(32, 4096);
        let ceiling = nofile - reserve;
        let incoming = (ceiling / 8).clamp(8, 4096).min(affordable);
        let bytes = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (peer_bytes, notif_bytes) = (bytes((memory / 8).max(32 << 20)), bytes((memory / 8).clamp(16 << 20, MAX_NOTIF_BYTES)));
        // A connection has at least three descriptors.
        let connections = (ceiling / 3).min(bytes(memory / 4 / IDLE_BYTES)).max(16);
        Limits {
            connections,
            of_address: (connections - connections / 4).max(8),
            transfers: bytes(memory / 16 / TRANSFER_BYTES).clamp(1 << 12, 1 << 22),
            peer_bytes,
            peer_bytes_of_one: peer_bytes / 2,
            notif_bytes,
            notif_bytes_of_one: notif_bytes / 4,
            log_lines: LOG_LINES,
            unauthenticated: (ceiling / 12).clamp(8, 1024),
            incoming,
            per_peer: incoming.div_ceil(2),
            outgoing: (ceiling / 8).clamp(8, 4096).min(affordable),
            waiting: (ceiling / 8).clamp(16, 2048).min(affordable),
            ceiling,
        }
    }

    /// The shares of this process's current limits, overridden by the settings.
    pub(crate) fn of_process(budgets: &Budgets) -> Limits {
        let usual = Limits::from(descriptor_limit(), memory_limit());
        let or = |setting: Option<usize>, usual: usize| setting.unwrap_or(usual);
        // If only the total is set, the part of one peer is derived from it.
        let part = |own: Option<usize>, total: Option<usize>, usual: usize, part: fn(usize) -> usize| {
            own.or(total.map(part)).unwrap_or(usual)
        };
        Limits {
            connections: or(budgets.connections, usual.connections),
            of_address: part(budgets.connections_of_peer, budgets.connections, usual.of_address, |n| (n - n / 4).max(1)),
            transfers: or(budgets.transfers, usual.transfers),
            peer_bytes: or(budgets.peer_bytes, usual.peer_bytes),
            peer_bytes_of_one: part(budgets.peer_bytes_of_one, budgets.peer_bytes, usual.peer_bytes_of_one, |n| n / 2),
            notif_bytes: or(budgets.notif_bytes, usual.notif_bytes),
            notif_bytes_of_one: part(budgets.notif_bytes_of_one, budgets.notif_bytes, usual.notif_bytes_of_one, |n| n / 4),
            log_lines: or(budgets.log_lines, usual.log_lines),
            ..usual
        }
    }

    /// Each budget: its name, its value and what it counts.
    pub(crate) fn list(&self) -> Vec<(&'static str, usize, &'static str)> {
        vec![
            ("UCCL_TCPX_MAX_CONNECTIONS", self.connections, "incoming connections"),
            ("UCCL_TCPX_MAX_CONNECTIONS_OF_PEER", self.of_address, "of them from one address"),
            ("UCCL_TCPX_MAX_PEER_TRANSFERS", self.transfers, "transfers of peers in flight; one address may use three quarters"),
            ("UCCL_TCPX_PEER_BYTES", self.peer_bytes, "bytes of memory that peers take; one address may use three quarters"),
            ("UCCL_TCPX_PEER_BYTES_OF_ONE", self.peer_bytes_of_one, "of them from one connection"),
            ("UCCL_TCPX_NOTIF_BYTES", self.notif_bytes, "bytes of waiting notifications; one address may use three quarters"),
            ("UCCL_TCPX_NOTIF_BYTES_OF_ONE", self.notif_bytes_of_one, "of them from one connection"),
            ("UCCL_TCPX_PEER_LOG_LINES", self.log_lines, "log lines per second that peers can cause"),
            ("unauthenticated", self.unauthenticated, "incoming connections whose handshake is not complete"),
            ("set-ups", self.incoming, "incoming set-ups, and as many outgoing ones"),
            ("accept", self.waiting, "connections that wait for accept"),
            ("descriptors", self.ceiling, "descriptor numbers; the rest is the application's"),
        ]
    }
}

/// RLIMIT_NOFILE, the soft limit.
fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a writable rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return 1024;
    }
    limit.rlim_cur
}

/// Memory of the machine, of the control group, or of the address space (RLIMIT_AS), whichever is smallest.
fn memory_limit() -> u64 {
    // SAFETY: plain system calls.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let machine = u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(4096));
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    let mut space = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: 0 };
    // SAFETY: a writable rlimit.
    let space = match unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut space) } {
        0 => space.rlim_cur,
        _ => libc::RLIM_INFINITY,
    };
    group.map_or(machine, |group: u64| group.min(machine)).min(space).max(64 << 20)
}

/// The lowest free descriptor number, found by opening and closing one; at least as many are in use.
///
/// # Errors
/// `Resource` when none is free.
pub(crate) fn lowest_free(fd: RawFd) -> Result<usize> {
    // SAFETY: a plain system call; `fd` is checked by the kernel.
    let got = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if got < 0 {
        return Err(exhausted("descriptors", &std::io::Error::last_os_error()));
    }
    // SAFETY: fresh, with no other owner.
    let _own = unsafe { OwnedFd::from_raw_fd(got) };
    Ok(got as usize)
}

/// Descriptors reserved by set-ups of this process and not opened yet.
static PROMISED: PerProcess<AtomicUsize> = PerProcess::new(AtomicUsize::default);

/// Reserves descriptors that a set-up opens later, until it has ended.
#[derive(Debug)]
pub(crate) struct Promise(usize);

impl Promise {
    pub(crate) fn new(descriptors: usize) -> Promise {
        PROMISED.get().fetch_add(descriptors, Ordering::Relaxed);
        Promise(descriptors)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        // The count of a forked child does not include what its parent reserved.
        let less = |n: usize| Some(n.saturating_sub(self.0));
        let _ = PROMISED.get().fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// Checks that `more` descriptors fit below the ceiling in addition to the reserved ones, by opening and closing as many. `fd` is
/// any open descriptor. Counting from the lowest free number would not do: numbers above it may be in use.
///
/// # Errors
/// `Resource`, with the numbers.
pub(crate) fn room_for(limits: &Limits, fd: BorrowedFd<'_>, more: usize) -> Result<()> {
    let promised = PROMISED.get().load(Ordering::Relaxed);
    let mut taken = Vec::new();
    while taken.len() < more + promised {
        // SAFETY: a plain system call; the descriptor is open.
        let got = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
        if got < 0 {
            return Err(exhausted("descriptors", &std::io::Error::last_os_error()));
        }
        // SAFETY: fresh, with no other owner.
        let own = unsafe { OwnedFd::from_raw_fd(got) };
        // Never hold descriptors of the reserve, not even for a moment.
        if got as usize >= limits.ceiling {
            drop(own);
            return Err(err!(
                Resource,
                "{more} more file descriptors would take this process above {} (RLIMIT_NOFILE less a reserve for the application; {} are free)",
                limits.ceiling,
                taken.len().saturating_sub(promised)
            ));
        }
        taken.push(own);
    }
    Ok(())
}

/// Whether a failed system call ran out of descriptors, memory or threads, in this process or on the machine.
pub(crate) fn is_exhaustion(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS))
}

/// The error of a call that ran out of a resource.
fn exhausted(what: &str, e: &std::io::Error) -> Error {
    let hint = match e.raw_os_error() {
        Some(libc::EMFILE) => "; raise RLIMIT_NOFILE (ulimit -n)",
        Some(libc::ENFILE) => "; the whole machine has none left (fs.file-max)",
        Some(libc::EAGAIN) => "; the limit of threads is reached (ulimit -u, pids of the control group)",
        Some(libc::ENOMEM) => "; the address space has no room (ulimit -v), or the machine no memory",
        _ => "",
    };
    Error::new(ErrorKind::Resource, format_args!("out of {what}: {e}{hint}"))
}

/// The error of a failed system call: `Resource` with a hint when something ran out, else `System`.
pub(crate) fn system(what: &str, e: &std::io::Error) -> Error {
    if is_exhaustion(e) {
        let out = exhausted("file descriptors or memory", e);
        return Error::new(ErrorKind::Resource, format_args!("{what}: {out}"));
    }
    Error::system(what, e)
}

/// A plugin's error says little about its cause. If this process has run out of descriptors or threads, that is the cause.
pub(crate) fn explain(error: Error, fd: BorrowedFd<'_>) -> Error {
    if !matches!(error.kind(), ErrorKind::Plugin | ErrorKind::System | ErrorKind::Unreachable | ErrorKind::RemoteDisconnect) {
        return error;
    }
    // Some plugins start threads.
    let probe = || spawn("uccl-probe", || {}).map(|thread| drop(thread.join()));
    match lowest_free(fd.as_raw_fd()).and_then(|_| probe()) {
        Ok(()) => error,
        Err(out) => Error::new(ErrorKind::Resource, format_args!("{out} (seen as: {error})")),
    }
}

/// Starts a thread of the library.
///
/// # Errors
/// `Resource` when there are too many threads or the address space is full.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>> {
    process::thread::spawn(name, body).map_err(|e| {
        if e.raw_os_error() == Some(libc::EAGAIN) || is_exhaustion(&e) {
            exhausted(&format!("threads (for {name})"), &e)
        } else {
            Error::system(format_args!("thread {name}"), &e)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn every_limit_leaves_a_reserve_and_lets_peers_in() {
        for nofile in [0, 64, 256, 1024, 4096, 65_536, 1 << 20, u64::MAX] {
            for memory in [0, 64 << 20, GIB, 64 * GIB, u64::MAX] {
                let l = Limits::from(nofile, memory);
                let given = usize::try_from(nofile.clamp(64, 1 << 24)).unwrap();
                assert!(given - l.ceiling >= 32, "{nofile}: {l:?}");
                assert!(
                    l.unauthenticated >= 8 && l.incoming >= 8 && l.outgoing >= 8 && l.waiting >= 8 && l.per_peer >= 4,
                    "{l:?}"
                );
                // One descriptor each: unauthenticated connections alone take a small part.
                assert!(l.unauthenticated <= given / 8, "{nofile}: {l:?}");
                // With three descriptors each, for one channel, all budgets together stay below the ceiling of usual limits.
                if nofile >= 256 {
                    assert!(l.unauthenticated + 3 * l.incoming + 3 * l.outgoing <= l.ceiling, "{nofile}: {l:?}");
                }
            }
        }
    }

    /// Serialises tests that count free descriptor numbers.
    static COUNTING: process::Mutex<()> = process::Mutex::new(());

    #[test]
    fn promised_descriptors_are_reserved() {
        use std::os::fd::AsFd;
        let _alone = COUNTING.lock();
        let file = std::fs::File::open("/dev/null").expect("file");
        let used = lowest_free(file.as_raw_fd()).expect("a free number");
        let limits = Limits { ceiling: used + 800, ..Limits::from(1 << 20, 16 * GIB) };
        assert!(room_for(&limits, file.as_fd(), 100).is_ok());
        let promise = Promise::new(800);
        let error = room_for(&limits, file.as_fd(), 100).expect_err("no room beside the promise").to_string();
        assert!(error.starts_with("100 more file descriptors") && error.contains("; 0 are free"), "{error}");
        drop(promise);
        let promise = Promise::new(400);
        assert!(room_for(&limits, file.as_fd(), 300).is_ok());
        assert!(room_for(&limits, file.as_fd(), 500).is_err(), "either alone would fit");
        drop(promise);
        assert!(room_for(&limits, file.as_fd(), 500).is_ok());
    }

    #[test]
    fn usual_limits() {
        let l = Limits::from(256, 16 * GIB);
        assert_eq!((l.unauthenticated, l.incoming, l.outgoing, l.waiting, l.ceiling), (16, 24, 24, 24, 192));
        let l = Limits::from(1024, 16 * GIB);
        assert_eq!((l.unauthenticated, l.incoming, l.outgoing, l.waiting, l.ceiling), (64, 96, 96, 96, 768));
        let l = Limits::from(1 << 20, 64 * GIB);
        assert_eq!((l.unauthenticated, l.incoming, l.outgoing, l.waiting, l.ceiling), (1024, 4096, 4096, 2048, (1 << 20) - 4096));
        // Little memory, many descriptors.
        let l = Limits::from(1 << 20, GIB);
        assert_eq!((l.incoming, l.waiting), (64, 64));
    }

    #[test]
    fn budgets_follow_the_limits_and_settings_override_them() {
        for memory in [0, 64 << 20, GIB, 64 * GIB, u64::MAX] {
            let l = Limits::from(1024, memory);
            assert!(
                l.of_address <= l.connections && l.peer_bytes_of_one <= l.peer_bytes && l.notif_bytes_of_one <= l.notif_bytes
            );
            assert!(l.connections >= 16 && l.transfers >= 4096 && l.log_lines > 0, "{l:?}");
        }
        let l = Limits::from(1024, 16 * GIB);
        assert_eq!((l.connections, l.of_address, l.transfers, l.peer_bytes), (256, 192, 1 << 20, 2 << 30));
        assert_eq!((l.notif_bytes, l.notif_bytes_of_one), (1 << 30, 256 << 20));
        let set = Budgets { connections: Some(8), peer_bytes: Some(1000), peer_bytes_of_one: Some(7), ..Budgets::default() };
        let l = Limits::of_process(&set);
        assert_eq!((l.connections, l.of_address, l.peer_bytes, l.peer_bytes_of_one), (8, 6, 1000, 7));
        let listed: Vec<usize> = l.list().iter().map(|(_, value, _)| *value).collect();
        assert_eq!(listed[..2], [8, 6]);
    }

    #[test]
    fn exhaustion_is_recognised_and_explained() {
        for (errno, kind) in [
            (libc::EMFILE, ErrorKind::Resource),
            (libc::ENFILE, ErrorKind::Resource),
            (libc::ENOMEM, ErrorKind::Resource),
            (libc::ECONNREFUSED, ErrorKind::System),
        ] {
            let error = system("socket", &std::io::Error::from_raw_os_error(errno));
            assert_eq!(error.kind(), kind, "{error}");
        }
        assert!(system("socket", &std::io::Error::from_raw_os_error(libc::EMFILE)).to_string().contains("RLIMIT_NOFILE"));
    }

    #[test]
    fn room_is_counted_below_the_ceiling() {
        use std::os::fd::AsFd;
        let _alone = COUNTING.lock();
        let any = std::fs::File::open("/dev/null").unwrap();
        let mut limits = Limits::from(1 << 20, GIB);
        room_for(&limits, any.as_fd(), 10).unwrap();
        limits.ceiling = 5;
        assert_eq!(room_for(&limits, any.as_fd(), 10).unwrap_err().kind(), ErrorKind::Resource);
    }

    #[test]
    fn free_numbers_below_used_ones_are_counted_one_by_one() {
        use std::os::fd::AsFd;
        let _alone = COUNTING.lock();
        let any = std::fs::File::open("/dev/null").unwrap();
        // All numbers up to the ceiling are taken except a few low ones, as after an application closed what it opened first.
        let mut many: Vec<OwnedFd> = (0..400).map(|_| any.as_fd().try_clone_to_owned().unwrap()).collect();
        let ceiling = many.iter().map(AsRawFd::as_raw_fd).max().unwrap() as usize + 1;
        let limits = Limits { ceiling, ..Limits::from(1 << 20, GIB) };
        many.drain(..4);
        assert!(lowest_free(any.as_raw_fd()).unwrap() + 200 < ceiling);
        assert_eq!(room_for(&limits, any.as_fd(), 200).unwrap_err().kind(), ErrorKind::Resource);
    }
}
