//! From a host name and a port to a connected socket, within one deadline; canceled when the engine is being destroyed. Knows
//! nothing about the use of the socket.

use super::shutdown::{canceled, Shutdown};
use crate::engine::limits;
use crate::status::{bail, err, Error, Result};
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Name look-ups in progress in this process. The system's resolver cannot be stopped: a look-up goes on after its caller has
/// given up.
static LOOKUPS: AtomicUsize = AtomicUsize::new(0);
const MAX_LOOKUPS: usize = 64;
/// How soon a caller that waits for a name notices the shutdown.
const LOOK: Duration = Duration::from_millis(50);

/// Resolves names: the system's resolver, or a test's.
pub(crate) type Lookup = fn(&str, u16) -> std::io::Result<Vec<SocketAddr>>;

/// The system's resolver; may block for any time.
pub(crate) fn system_lookup(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// Waits until one of the descriptors is ready, or for `limit`.
pub(crate) fn poll(fds: &[(RawFd, i16)], limit: Duration) -> Result<Vec<bool>> {
    let mut entries: Vec<libc::pollfd> = fds.iter().map(|&(fd, events)| libc::pollfd { fd, events, revents: 0 }).collect();
    let limit = libc::timespec { tv_sec: limit.as_secs().min(1 << 30) as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    // SAFETY: the array is writable and has that many entries; the time is readable; no signal mask is given.
    let n = unsafe { libc::ppoll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, &limit, std::ptr::null()) };
    if n < 0 {
        let e = std::io::Error::last_os_error();
        if e.kind() != std::io::ErrorKind::Interrupted {
            return Err(limits::system("poll", &e));
        }
        return Ok(vec![false; fds.len()]);
    }
    Ok(entries.iter().map(|e| e.revents != 0).collect())
}

/// The addresses of a host. Numeric addresses need no look-up; brackets around an IPv6 address are removed.
pub(crate) fn resolve(host: &str, port: u16, deadline: Instant, shutdown: &Shutdown, lookup: Lookup) -> Result<Vec<SocketAddr>> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    if LOOKUPS.fetch_add(1, Ordering::AcqRel) >= MAX_LOOKUPS {
        LOOKUPS.fetch_sub(1, Ordering::AcqRel);
        bail!(Resource, "{host}: {MAX_LOOKUPS} look-ups of host names are already in progress in this process");
    }
    let (sender, receiver) = mpsc::channel();
    let name = bare.to_owned();
    let started = limits::spawn("uccl-resolve", move || {
        let found = lookup(&name, port);
        LOOKUPS.fetch_sub(1, Ordering::AcqRel);
        // The caller may have given up.
        let _ = sender.send(found);
    });
    if let Err(e) = started {
        LOOKUPS.fetch_sub(1, Ordering::AcqRel);
        return Err(e);
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left.min(LOOK)) {
            Ok(Ok(found)) if found.is_empty() => bail!(Unreachable, "{host} has no address"),
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(e)) => bail!(InvalidArgument, "{host}: {e}"),
            Err(RecvTimeoutError::Disconnected) => bail!(Internal, "{host}: the look-up of the name panicked"),
            Err(RecvTimeoutError::Timeout) if shutdown.begun() => return Err(canceled()),
            Err(RecvTimeoutError::Timeout) if left.is_zero() => bail!(TimedOut, "{host}: the name was not resolved in time"),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// Connects to the first address that answers; each address gets an equal share of the remaining time, and all but the last at most
/// [`SHARE`]. The socket does not block.
pub(crate) fn connect(addresses: &[SocketAddr], deadline: Instant, shutdown: &Shutdown) -> Result<(TcpStream, SocketAddr)> {
    let mut failed: Option<Error> = None;
    for (i, address) in addresses.iter().enumerate() {
        let now = Instant::now();
        let (left, others) = (deadline.saturating_duration_since(now), addresses.len() - i - 1);
        let share = if others == 0 { left } else { (left / (others + 1) as u32).min(SHARE) };
        match connect_to(*address, now + share, shutdown) {
            Ok(sock) => return Ok((sock, *address)),
            Err(e) if matches!(e.kind(), crate::status::ErrorKind::Canceled | crate::status::ErrorKind::Resource) => {
                return Err(e)
            }
            Err(e) => {
                failed = Some(match failed {
                    Some(before) => Error::new(before.kind(), format_args!("{before}; {e}")),
                    None => e,
                })
            }
        }
    }
    Err(failed.unwrap_or_else(|| err!(Unreachable, "no address")))
}

/// How long an address may leave a connect without an answer while there is another: the kernel asks twice in this time.
const SHARE: Duration = Duration::from_secs(2);
const WHAT: &str = "socket of the control connection";

/// Begins a connect that does not block.
pub(super) fn begin(address: SocketAddr) -> Result<Socket> {
    let what = WHAT;
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).map_err(|e| limits::system(what, &e))?;
    socket.set_nonblocking(true).and_then(|()| socket.set_tcp_nodelay(true)).map_err(|e| limits::system(what, &e))?;
    match socket.connect(&address.into()) {
        Ok(()) => Ok(socket),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINPROGRESS | libc::EINTR)) => Ok(socket),
        Err(e) if limits::is_exhaustion(&e) => Err(limits::system("connect", &e)),
        Err(e) => bail!(Unreachable, "connect to {address}: {e}"),
    }
}

/// Whether a connect ended because no engine listens there.
pub(super) fn is_refusal(error: &Error) -> bool {
    error.to_str().ends_with(&std::io::Error::from_raw_os_error(libc::ECONNREFUSED).to_string())
}

/// Ends a connect once its socket is writable.
pub(super) fn end(socket: Socket, address: SocketAddr) -> Result<TcpStream> {
    if let Some(e) = socket.take_error().map_err(|e| limits::system(WHAT, &e))? {
        bail!(Unreachable, "connect to {address}: {e}");
    }
    // TCP can connect a port to itself when no socket listens there.
    if socket.local_addr().ok().and_then(|a| a.as_socket()) == Some(address) {
        bail!(Unreachable, "connect to {address}: no listener on that port");
    }
    Ok(socket.into())
}

fn connect_to(address: SocketAddr, deadline: Instant, shutdown: &Shutdown) -> Result<TcpStream> {
    let socket = begin(address)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = poll(&[(socket.as_raw_fd(), libc::POLLOUT), (shutdown.fd(), libc::POLLIN)], left)?;
        if ready[1] {
            return Err(canceled());
        }
        if ready[0] {
            return end(socket, address);
        }
        if left.is_zero() {
            bail!(TimedOut, "connect to {address}: no answer in time");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::sync::Arc;

    fn simulated_slow_lookup(_: &str, _: u16) -> std::io::Result<Vec<SocketAddr>> {
        std::thread::sleep(Duration::from_secs(3));
        Ok(Vec::new())
    }

    fn simulated_panic(_: &str, _: u16) -> std::io::Result<Vec<SocketAddr>> {
        panic!("in the resolver")
    }

    #[test]
    fn numbers_need_no_lookup() {
        let shutdown = Shutdown::new().unwrap();
        let now = Instant::now();
        for (host, address) in [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("[fd00::2]", "[fd00::2]:7")] {
            assert_eq!(resolve(host, 7, now, &shutdown, simulated_panic).unwrap(), [address.parse().unwrap()]);
        }
    }

    #[test]
    fn a_slow_resolver_costs_no_more_than_the_deadline() {
        let shutdown = Shutdown::new().unwrap();
        let start = Instant::now();
        let error = resolve("a.name", 7, start + Duration::from_millis(100), &shutdown, simulated_slow_lookup).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }

    #[test]
    fn a_shutdown_ends_the_wait() {
        let shutdown = Arc::new(Shutdown::new().unwrap());
        let other = shutdown.clone();
        let start = Instant::now();
        let ends = std::thread::spawn(move || other.begin());
        let error = resolve("a.name", 7, start + Duration::from_secs(60), &shutdown, simulated_slow_lookup).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Canceled);
        assert!(start.elapsed() < Duration::from_secs(2));
        ends.join().unwrap();
        // No host answers at this address: the shutdown ends this wait, too.
        let silent = "192.0.2.1:9".parse().unwrap();
        let error = connect(&[silent], start + Duration::from_secs(60), &shutdown).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Canceled | ErrorKind::Unreachable), "{error}");
    }

    #[test]
    fn an_address_that_answers_is_found_behind_one_that_does_not() {
        let shutdown = Shutdown::new().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let good = listener.local_addr().unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        assert_eq!(connect(&[closed, good], deadline, &shutdown).unwrap().1, good);
        let error = connect(&[closed, closed], deadline, &shutdown).unwrap_err();
        assert_eq!((error.kind(), error.to_str().matches(&closed.to_string()).count()), (ErrorKind::Unreachable, 2), "{error}");
    }
}
