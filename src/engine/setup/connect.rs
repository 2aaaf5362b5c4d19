//! Connecting to a peer engine, in the caller's thread. Knows nothing about the protocol on the connection.

use super::build;
use super::context::SetupContext;
use super::dial;
use super::driver::{Finished, Progress, SetupDriver};
use super::listener;
use super::machine::Setup;
use super::shutdown::canceled;
use crate::engine::connection::Connection;
use crate::net::plugin_thread::limited;
use crate::net::topology;
use crate::status::{err, Error, ErrorKind, Result};
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a peer may take to read why the set-up failed.
const LINGER: Duration = Duration::from_millis(200);
/// Pauses before a retry: the first, and the longest.
const PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(500);
/// How long to retry where the listener closes the connection without a reason.
const CUT: Duration = Duration::from_secs(2);

/// Connects; blocks until all channels are up, at most for the connect timeout.
///
/// # Errors
/// See [`super::Engine::connect`].
pub(crate) fn connect(context: &SetupContext, host: &str, gpu: &str, port: u16) -> Result<Arc<Connection>> {
    let counters = &context.table.context.counters;
    let connected = connect_within(context, host, gpu, port);
    match &connected {
        Ok(_) => counters.setups_out.add(),
        Err(e) => {
            counters.setups_out_failed.add();
            counters.limit(e.kind());
        }
    }
    connected
}

fn connect_within(context: &SetupContext, host: &str, gpu: &str, port: u16) -> Result<Arc<Connection>> {
    let deadline = Instant::now() + context.config.connect_timeout;
    let _limited = limited(deadline);
    context.shutdown.check()?;
    let (gpu, others) = listener::split_gpu(gpu)?;
    let mut addresses = dial::resolve(host, port, deadline, &context.shutdown, dial::system_lookup)?;
    add_others(&mut addresses, &others, port, topology::is_local);
    let began = Instant::now();
    let mut pause = PAUSE;
    let mut before = None;
    loop {
        let (error, again) = match once(context, &addresses, gpu, deadline) {
            Ok(connection) => {
                // The turn is over: other connects may go on meanwhile.
                build::prepare(context, &connection);
                return Ok(connection);
            }
            Err(failed) => failed,
        };
        let now = Instant::now();
        let until = if again == Again::Cut { deadline.min(began + CUT) } else { deadline };
        if again == Again::Never || now + pause >= until {
            // Report the listener's own error, not the timeout that cut the last retry short.
            let cut_short = now >= deadline && error.kind() == ErrorKind::TimedOut;
            return Err(before.filter(|_| cut_short).unwrap_or(error));
        }
        log::debug!("{error}; retrying");
        before = Some(error);
        rest(context, pause)?;
        pause = (2 * pause).min(MAX_PAUSE);
    }
}

/// Adds the other addresses of a listener. Those of this host may be another engine's, if the listener is not on this host: hosts give bridges
/// for containers the same addresses.
fn add_others(addresses: &mut Vec<SocketAddr>, others: &[IpAddr], port: u16, is_local: impl Fn(IpAddr) -> bool) {
    let here = addresses.iter().any(|address| is_local(address.ip()));
    for &ip in others.iter().filter(|&&ip| here || !is_local(ip)) {
        let other = SocketAddr::new(ip, port);
        if !addresses.contains(&other) {
            addresses.push(other);
        }
    }
}

/// One attempt, when it is its turn; why it failed, and whether to retry.
fn once(
    context: &SetupContext,
    addresses: &[SocketAddr],
    gpu: &str,
    deadline: Instant,
) -> std::result::Result<Arc<Connection>, (Error, Again)> {
    let never = |e| (e, Again::Never);
    // Released at the end, so that others may go on.
    let _turn = context.outgoing.enter(deadline, &context.shutdown).map_err(never)?;
    let (sock, address) = dial::connect(addresses, deadline, &context.shutdown).map_err(never)?;
    let connected = run(context, sock, address, gpu, deadline);
    connected.map_err(|(e, again)| (Error::new(e.kind(), format_args!("connect to {address}: {e}")), again))
}

/// Whether a failed set-up is worth another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// The listener says that it has no room at present.
    Soon,
    /// It closed before authentication, or is shutting down: it may be short of places, and another engine may take over its
    /// port.
    Cut,
    Never,
}

/// Whether to retry after an error.
fn again(driver: &SetupDriver, error: &Error) -> Again {
    match error.kind() {
        _ if !driver.setup().is_unauthenticated() => Again::Never,
        ErrorKind::Resource => Again::Soon,
        ErrorKind::RemoteDisconnect => Again::Cut,
        _ => Again::Never,
    }
}

/// A listener answers nothing to bytes that are not of this protocol, and to hosts that may not connect: what a close without an answer
/// may mean.
fn explained(driver: &SetupDriver, error: Error) -> Error {
    let setup = driver.setup();
    match error.kind() == ErrorKind::RemoteDisconnect && setup.is_unauthenticated() && setup.is_silent() {
        true => err!(
            RemoteDisconnect,
            "{error}, and had not answered: it does not speak this protocol, its UCCL_TCPX_ALLOW does not contain this host, it has no \
             room, or the first bytes were damaged on the way; its log at level info says which"
        ),
        false => error,
    }
}

/// Sleeps for about `time`; the jitter keeps connectors that were refused together from returning together.
fn rest(context: &SetupContext, time: Duration) -> Result<()> {
    let mut random = [0; 4];
    let _ = getrandom::fill(&mut random);
    let part = f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX);
    dial::poll(&[(context.shutdown.fd(), libc::POLLIN)], time.mul_f64(0.5 + part))?;
    context.shutdown.check()
}

/// One set-up; why it failed, and whether to retry.
fn run(
    context: &SetupContext,
    sock: TcpStream,
    address: SocketAddr,
    gpu: &str,
    deadline: Instant,
) -> std::result::Result<Arc<Connection>, (Error, Again)> {
    let now = Instant::now();
    let never = |e| (e, Again::Never);
    let setup = Setup::new(context.link(Some(gpu)).map_err(never)?, now, deadline, deadline);
    let mut driver = SetupDriver::new(sock, address, setup, now);
    match drive(context, &mut driver) {
        Ok(()) => match driver.finish(context, None).map_err(never)? {
            Finished::Connection(connection) => Ok(connection),
            Finished::Joined => Err(never(err!(Internal, "a connect has joined a connection"))),
        },
        Err(e) => {
            let (again, e) = (again(&driver, &e), explained(&driver, e));
            let sock = driver.give_up(&e);
            if e.kind() != ErrorKind::RemoteDisconnect && again == Again::Never {
                linger(sock);
            }
            Err((e, again))
        }
    }
}

/// Drives a set-up until it is up.
pub(crate) fn drive(context: &SetupContext, driver: &mut SetupDriver) -> Result<()> {
    loop {
        let now = Instant::now();
        match driver.step(context, now)? {
            Progress::Up => return Ok(()),
            Progress::Proved => driver.admit(context)?,
            Progress::Wait => {
                let (read, write) = driver.interest();
                let events = if read { libc::POLLIN } else { 0 } | if write { libc::POLLOUT } else { 0 };
                let limit = driver.wake_at().saturating_duration_since(now);
                let ready = dial::poll(&[(driver.fd(), events), (context.shutdown.fd(), libc::POLLIN)], limit)?;
                if ready[1] {
                    return Err(canceled());
                }
            }
        }
    }
}

/// Keeps a socket until the peer has read its last bytes and closed, or a short time has passed.
fn linger(mut sock: TcpStream) {
    let until = Instant::now() + LINGER;
    let mut sink = [0; 4096];
    loop {
        match sock.read(&mut sink) {
            Ok(1..) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() || dial::poll(&[(sock.as_raw_fd(), libc::POLLIN)], left).is_err() {
                    return;
                }
            }
            _ => return,
        }
        if Instant::now() >= until {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_addresses_of_a_listener_are_tried_unless_they_are_those_of_this_host() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let tried = |first: &str, others: &[&str]| {
            let mut addresses = vec![SocketAddr::new(ip(first), 7)];
            let others: Vec<IpAddr> = others.iter().map(|text| ip(text)).collect();
            add_others(&mut addresses, &others, 7, |address| address == ip("172.17.0.1") || address == ip("10.0.0.9"));
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(tried("10.0.0.1", &["10.0.1.1", "172.17.0.1", "10.0.0.1"]), ["10.0.0.1:7", "10.0.1.1:7"]);
        assert_eq!(tried("10.0.0.9", &["172.17.0.1"]), ["10.0.0.9:7", "172.17.0.1:7"]);
    }
}
