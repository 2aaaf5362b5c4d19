//! The listening port. Incoming sockets are watched until a whole hello is here; only then do they cost a thread. Strangers are
//! dropped at the first wrong byte, silent ones at the handshake timeout; neither delays anybody else.

use super::setup;
use super::shared::Shared;
use crate::status::{Error, Result};
use crate::wire::handshake::{HelloV1 as Hello, HELLO_BYTES};
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

/// Sockets without a whole hello; beyond this the oldest is dropped.
const MAX_PENDING: usize = 1024;
/// Handshakes under way at once; further peers wait in the pending list.
const MAX_SETUPS: usize = 256;

/// Opens the listening port on all addresses.
pub(crate) fn open(port: u16) -> Result<TcpListener> {
    let what = || format!("listening on port {port}");
    let open = |v6: bool| -> std::io::Result<TcpListener> {
        use socket2::{Domain, Protocol, Socket, Type};
        let socket = Socket::new(if v6 { Domain::IPV6 } else { Domain::IPV4 }, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        let any = if v6 {
            socket.set_only_v6(false)?;
            SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port))
        } else {
            SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, port))
        };
        socket.bind(&any.into())?;
        socket.listen(1024)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    // Hosts without IPv6 are common in containers.
    open(true).or_else(|_| open(false)).map_err(|e| Error::system(what(), &e))
}

struct Pending {
    sock: TcpStream,
    address: SocketAddr,
    since: Instant,
    bytes: [u8; HELLO_BYTES],
    filled: usize,
}

enum Next {
    Wait,
    Drop(String),
    Serve,
}

impl Pending {
    fn read(&mut self) -> Next {
        while self.filled < HELLO_BYTES {
            match self.sock.read(&mut self.bytes[self.filled..]) {
                Ok(0) => return Next::Drop("closed before its hello".into()),
                Ok(n) => {
                    self.filled += n;
                    if !Hello::plausible(&self.bytes[..self.filled.min(8)]) {
                        return Next::Drop("does not speak this protocol".into());
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Next::Wait,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Next::Drop(e.to_string()),
            }
        }
        Next::Serve
    }
}

/// Runs until the engine closes.
pub(crate) fn run(shared: &Arc<Shared>, listener: &TcpListener, wake: &impl AsRawFd) {
    let mut pending: Vec<Pending> = Vec::new();
    while !shared.closing.load(Ordering::Acquire) {
        wait(listener, wake, &pending);
        admit(listener, &mut pending);
        let mut kept = Vec::with_capacity(pending.len());
        for mut p in pending {
            match p.read() {
                Next::Drop(why) => log::info!("{}: dropped: {why}", p.address),
                Next::Wait if p.since.elapsed() > shared.config.handshake_timeout => log::info!("{}: dropped: silent", p.address),
                Next::Wait => kept.push(p),
                Next::Serve if shared.setups_running() >= MAX_SETUPS => {
                    std::thread::sleep(setup::RETRY);
                    kept.push(p);
                }
                Next::Serve => serve(shared, p),
            }
        }
        pending = kept;
    }
}

fn wait(listener: &TcpListener, wake: &impl AsRawFd, pending: &[Pending]) {
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds: Vec<libc::pollfd> = [listener.as_raw_fd(), wake.as_raw_fd()].into_iter().map(entry).collect();
    // A whole hello that waits for a thread would make poll return at once.
    fds.extend(pending.iter().filter(|p| p.filled < HELLO_BYTES).map(|p| entry(p.sock.as_raw_fd())));
    let timeout = if pending.is_empty() { -1 } else { 20 };
    // SAFETY: the array is writable and has that many entries.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
}

fn admit(listener: &TcpListener, pending: &mut Vec<Pending>) {
    loop {
        match listener.accept() {
            Ok((sock, address)) => {
                if sock.set_nonblocking(true).is_err() {
                    continue;
                }
                if pending.len() == MAX_PENDING {
                    let oldest = pending.remove(0);
                    log::warn!("{}: dropped: {MAX_PENDING} connections wait for their hello", oldest.address);
                }
                pending.push(Pending { sock, address, since: Instant::now(), bytes: [0; HELLO_BYTES], filled: 0 });
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) => {
                log::error!("accepting a connection: {e}");
                std::thread::sleep(setup::RETRY);
                return;
            }
            // The peer went away between its connect and our accept.
            Err(_) => {}
        }
    }
}

fn serve(shared: &Arc<Shared>, p: Pending) {
    let shared = shared.clone();
    let address = p.address;
    let work = move || {
        let theirs = Hello::decode(&p.bytes);
        match setup::accept(&shared, p.sock, theirs) {
            Ok(connection) => {
                let mut accepts = shared.accepts.lock();
                accepts.ready.push_back(connection);
                drop(accepts);
                shared.accept_ready.notify_one();
            }
            Err(e) => log::warn!("{address}: connection not set up: {e}"),
        }
    };
    if let Err(e) = std::thread::Builder::new().name("uccl-setup".into()).spawn(work) {
        log::error!("{address}: no thread for its set-up: {e}");
    }
}
