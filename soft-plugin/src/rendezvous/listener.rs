//! A listen comm: one accept, which finds the genuine peer among strangers by the hello.
//! Strangers cost a bounded number of descriptors, for a bounded time.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use socket2::Socket;

use super::{descriptors, invalid, new_socket, own_address, random, tune};
use super::{Connected, Failed, Handle, Hello, Invitation, KEYED_HELLO};
use crate::config::Config;
use crate::fork::{self, PerProcess};
use crate::interfaces::Interface;
use crate::logger::Limited;
use crate::protect::Key;

/// A connection that has not said hello is dropped after this.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// Silent connections that a listener keeps at once; the oldest goes first.
const MAX_SILENT: usize = 64;
/// Connections that one call accepts.
const ACCEPTS_A_CALL: usize = 128;

/// What C holds of a listener.
pub struct ListenComm {
    /// The process that made it.
    generation: u64,
    /// For a child that closes its copy.
    fd: AtomicI32,
    listener: Mutex<Listener>,
}

impl ListenComm {
    /// Listens on the device's address and writes the handle.
    pub fn open(device: &Interface, config: &Config, handle: &mut Handle) -> Result<ListenComm, Failed> {
        let listener = Listener::new(device, config, handle)
            .map_err(|e| Failed::new(format!("listen on {} ({})", device.name.to_string_lossy(), device.address), e))?;
        let fd = listener.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        Ok(ListenComm { generation: fork::generation(), fd: AtomicI32::new(fd), listener: Mutex::new(listener) })
    }

    /// Whether another process made it, of which this one is a child.
    pub fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    /// Closes a child's copy of the parent's listener: the child's descriptor only, without a lock.
    pub fn close_copy(&self) {
        fork::close_copy(&self.fd);
    }

    /// Whether the peer was accepted already.
    pub fn is_used(&self) -> bool {
        self.listener.lock().socket.is_none()
    }

    /// The peer has to prove this key.
    pub fn expect_key(&self, key: Key) {
        self.listener.lock().key = Some(key);
    }

    /// One look for the peer.
    pub fn accept(&self) -> Result<Option<Connected>, Failed> {
        let mut listener = self.listener.lock();
        let connected = listener.accept().map_err(|e| Failed::new(format!("accept on {}", listener.nic), e))?;
        if connected.is_some() {
            // The number may belong to another file from now on.
            self.fd.store(-1, Ordering::Release);
        }
        Ok(connected)
    }
}

/// A listening socket with the connections that have not said who they are.
struct Listener {
    /// None once the peer was accepted: nobody else is expected.
    socket: Option<Socket>,
    nic: String,
    invitation: Invitation,
    /// What the peer has to prove besides.
    key: Option<Key>,
    silent: Vec<Silent>,
}

/// A connection that has not said all of its hello.
struct Silent {
    socket: Socket,
    peer: SocketAddr,
    got: usize,
    hello: [u8; KEYED_HELLO],
    since: Instant,
    _place: Place,
}

/// Counts one silent connection of the process.
struct Place(&'static AtomicUsize);

impl Place {
    /// All listeners together keep a sixteenth of the process's descriptors for silent connections; one that keeps none yet always
    /// has a place, so that strangers at other listeners do not shut its peer out.
    fn take(first: bool) -> Option<Place> {
        static TAKEN: PerProcess<AtomicUsize> = PerProcess::new();
        let taken = TAKEN.get(AtomicUsize::default);
        let most = if first { usize::MAX } else { (descriptors() / 16).max(8) };
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < most).then_some(n + 1)).ok().map(|_| Place(taken))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Silent {
    /// Reads on: `None` while the hello is incomplete, else whether it is the expected one.
    fn listen(&mut self, expected: &Hello) -> Option<bool> {
        while self.got < expected.len {
            let rest = &mut self.hello[self.got..expected.len];
            // SAFETY: a buffer and its length.
            let got = unsafe { libc::recv(self.socket.as_raw_fd(), rest.as_mut_ptr().cast(), rest.len(), libc::MSG_DONTWAIT) };
            match usize::try_from(got) {
                Ok(0) => return Some(false),
                Ok(got) => self.got += got,
                Err(_) => {
                    let kind = io::Error::last_os_error().kind();
                    return if matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted) { None } else { Some(false) };
                }
            }
        }
        Some(expected.is(&self.hello[..expected.len]))
    }
}

impl Listener {
    fn new(device: &Interface, config: &Config, handle: &mut Handle) -> io::Result<Listener> {
        let address = own_address(device);
        let socket = new_socket(&address)?;
        device.check_link(socket.as_fd())?;
        tune(&socket, config)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        let address = socket.local_addr()?.as_socket().ok_or_else(|| invalid("no address"))?;
        let invitation = Invitation { address, cookie: random()? };
        invitation.write(handle);
        let nic = device.name.to_string_lossy().into_owned();
        Ok(Listener { socket: Some(socket), nic, invitation, key: None, silent: Vec::new() })
    }

    /// The genuine peer's connection, once it has said hello. With it everything else of the listener is given back.
    fn accept(&mut self) -> io::Result<Option<Connected>> {
        let expected = self.invitation.hello(self.key.as_ref());
        let found = self.hear_silent(&expected);
        let Some((socket, peer)) = (match found {
            Some(genuine) => Some(genuine),
            None => self.accept_new(&expected)?,
        }) else {
            return Ok(None);
        };
        self.socket = None;
        self.silent.clear();
        Ok(Some(Connected::new(socket, peer, &self.nic)))
    }

    /// Listens to those that were silent, and drops strangers and those that were silent for too long.
    fn hear_silent(&mut self, expected: &Hello) -> Option<(Socket, SocketAddr)> {
        static LINE: Limited = Limited::new();
        let mut at = 0;
        while at < self.silent.len() {
            let late = self.silent[at].since.elapsed() > HELLO_TIME;
            match self.silent[at].listen(expected) {
                Some(true) => {
                    let genuine = self.silent.remove(at);
                    return Some((genuine.socket, genuine.peer));
                }
                Some(false) => {
                    LINE.info(&format!("dropped a stranger's connection from {}", self.silent[at].peer));
                    self.silent.remove(at);
                }
                None if late => {
                    LINE.info(&format!("dropped a silent connection from {}", self.silent[at].peer));
                    self.silent.remove(at);
                }
                None => at += 1,
            }
        }
        None
    }

    /// Takes new connections; one that does not say hello at once goes to the silent ones.
    fn accept_new(&mut self, expected: &Hello) -> io::Result<Option<(Socket, SocketAddr)>> {
        for _ in 0..ACCEPTS_A_CALL {
            let Some(listening) = &self.socket else { return Ok(None) };
            let (socket, peer) = match listening.accept() {
                Ok((socket, peer)) => (socket, peer),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(None),
                    // The kernel passes on what became of the connection: the next one may be well.
                    Some(code) if PASSED_ON.contains(&code) => continue,
                    // Strangers make way.
                    Some(libc::EMFILE | libc::ENFILE) if !self.silent.is_empty() => {
                        self.silent.remove(0);
                        continue;
                    }
                    _ => return Err(error),
                },
            };
            socket.set_nonblocking(true)?;
            let Some(peer) = peer.as_socket() else { continue };
            if let Some(genuine) = self.receive(socket, peer, expected) {
                return Ok(Some(genuine));
            }
        }
        Ok(None)
    }

    fn receive(&mut self, socket: Socket, peer: SocketAddr, expected: &Hello) -> Option<(Socket, SocketAddr)> {
        if self.silent.len() == MAX_SILENT {
            self.silent.remove(0);
        }
        let mut place = Place::take(self.silent.is_empty());
        while place.is_none() {
            // The oldest makes way.
            self.silent.remove(0);
            place = Place::take(self.silent.is_empty());
        }
        let mut fresh = Silent { socket, peer, got: 0, hello: [0; KEYED_HELLO], since: Instant::now(), _place: place? };
        match fresh.listen(expected) {
            Some(true) => Some((fresh.socket, fresh.peer)),
            Some(false) => None,
            None => {
                self.silent.push(fresh);
                None
            }
        }
    }
}

/// Errors of `accept` that are those of one connection.
const PASSED_ON: [i32; 10] = [
    libc::EINTR,
    libc::ECONNABORTED,
    libc::ENETDOWN,
    libc::EPROTO,
    libc::ENOPROTOOPT,
    libc::EHOSTDOWN,
    libc::ENONET,
    libc::EHOSTUNREACH,
    libc::EOPNOTSUPP,
    libc::ENETUNREACH,
];
