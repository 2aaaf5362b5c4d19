//! Connecting to a peer engine, in the caller's thread. Knows nothing of what travels on the connection.

use super::attempt::{Attempt, Progress};
use super::connection::Connection;
use super::dial;
use super::ending::canceled;
use super::setup::Setup;
use super::site::Site;
use crate::status::{Error, ErrorKind, Result};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a peer may take to read why a set-up was given up.
const LINGER: Duration = Duration::from_millis(200);

/// Connects; blocks until all channels are up, at most for the connect timeout.
///
/// # Errors
/// See [`super::Engine::connect`].
pub(crate) fn connect(site: &Site, host: &str, gpu: &str, port: u16) -> Result<Arc<Connection>> {
    let counters = &site.home.counters;
    let connected = connect_within(site, host, gpu, port);
    match &connected {
        Ok(_) => counters.setups_out.add(),
        Err(e) => {
            counters.setups_out_failed.add();
            counters.limit(e.kind());
        }
    }
    connected
}

fn connect_within(site: &Site, host: &str, gpu: &str, port: u16) -> Result<Arc<Connection>> {
    let deadline = Instant::now() + site.config.connect_timeout;
    site.ending.check()?;
    let addresses = dial::resolve(host, port, deadline, &site.ending, dial::system_lookup)?;
    let _turn = site.outgoing.enter(deadline, &site.ending)?;
    let (sock, address) = dial::connect(&addresses, deadline, &site.ending)?;
    run(site, sock, address, gpu, deadline).map_err(|e| Error::new(e.kind(), format_args!("connect to {address}: {e}")))
}

fn run(site: &Site, sock: TcpStream, address: SocketAddr, gpu: &str, deadline: Instant) -> Result<Arc<Connection>> {
    let now = Instant::now();
    let setup = Setup::new(site.link(Some(gpu))?, now, deadline, deadline);
    let mut attempt = Attempt::new(sock, address, setup, now);
    match drive(site, &mut attempt) {
        Ok(()) => attempt.finish(site),
        Err(e) => {
            let sock = attempt.give_up(&e);
            if e.kind() != ErrorKind::RemoteDisconnect {
                linger(sock);
            }
            Err(e)
        }
    }
}

/// Goes on until all is up.
pub(super) fn drive(site: &Site, attempt: &mut Attempt) -> Result<()> {
    loop {
        let now = Instant::now();
        match attempt.step(site, now)? {
            Progress::Up => return Ok(()),
            Progress::Proved => attempt.admit(site)?,
            Progress::Wait => {
                let (read, write) = attempt.interest();
                let events = if read { libc::POLLIN } else { 0 } | if write { libc::POLLOUT } else { 0 };
                let limit = attempt.wake_at().saturating_duration_since(now);
                let ready = dial::poll(&[(attempt.fd(), events), (site.ending.fd(), libc::POLLIN)], limit)?;
                if ready[1] {
                    return Err(canceled());
                }
            }
        }
    }
}

/// Keeps a socket until the peer has read its last bytes and closed, or a short time is over.
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
