//! A listen comm: one accept of each direction, which recognises the peer among other connections by its hello.
//! Other connections cost a bounded number of descriptors, for a bounded time.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use process::{Mutex, PerProcess};
use socket2::Socket;

use super::{descriptors, invalid, new_socket, own_address, random, tune};
use super::{Connected, Direction, Failed, Handle, Hello, Invitation, Lane, Proving, KEYED_HELLO, LANES};
use crate::config::Config;
use crate::devmem::Area;
use crate::interfaces::Interface;
use crate::logger::Limited;
use crate::protect::Key;

/// A connection without a complete hello is dropped after this time.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// Connections without a hello that a listener keeps at once; it drops the oldest first.
const MAX_SILENT: usize = 64;
/// Connections accepted per call.
const ACCEPTS_A_CALL: usize = 128;

/// A listener as C code holds it.
pub struct ListenComm {
    /// The process that made it.
    generation: u64,
    /// Its descriptor, for a child that closes its copy.
    fd: AtomicI32,
    listener: Mutex<Listener>,
}

impl ListenComm {
    /// Listens on the device's address and writes the handle. `area`: the comms carry device memory alone, received into it.
    pub fn open(device: &Interface, config: &Config, handle: &mut Handle, area: Option<Arc<Area>>) -> Result<ListenComm, Failed> {
        let listener = Listener::new(device, config, handle, area).map_err(|e| {
            let range = config.ports.as_ref().map(|r| format!(", UCCL_TCPX_PORT_RANGE={}-{}", r.start(), r.end()));
            let what = format!("listen on {} ({}){}", device.name.to_string_lossy(), device.address, range.unwrap_or_default());
            Failed::new(what, e)
        })?;
        let fd = listener.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        Ok(ListenComm { generation: process::generation(), fd: AtomicI32::new(fd), listener: Mutex::new(listener) })
    }

    /// Whether a parent process made it.
    pub fn is_inherited(&self) -> bool {
        self.generation != process::generation()
    }

    /// Closes a child's copy of the parent's listener: only the child's descriptor, without a lock.
    pub fn close_copy(&self) {
        process::close_copy(&self.fd);
    }

    /// Whether no connection of this direction is expected.
    pub fn is_used(&self, direction: Direction) -> bool {
        self.listener.lock().is_used(direction)
    }

    /// The peer has to prove this key. Whether it was in time.
    pub fn expect_key(&self, key: &Key) -> bool {
        self.listener.lock().expect(Direction::Forth, Some(key))
    }

    /// A connection back is expected too, with a key where there is one. Whether it was in time, and both directions have a key or none.
    pub fn expect_back(&self, key: Option<&Key>) -> bool {
        self.listener.lock().expect(Direction::Back, key)
    }

    /// One step of an accept.
    pub fn accept(&self, direction: Direction) -> Result<Option<Connected>, Failed> {
        let mut listener = self.listener.lock();
        let connected = listener.accept(direction).map_err(|e| Failed::new(format!("accept on {}", listener.nic), e))?;
        if listener.socket.is_none() {
            // From now on the number may belong to another file.
            self.fd.store(-1, Ordering::Release);
        }
        Ok(connected)
    }
}

/// The peer's connection of one direction.
enum Awaited {
    /// None is expected, or it was returned already.
    Nobody,
    /// It says this, which proves the cookie, and a key where there is one.
    Peer(Hello),
    Here(Socket, SocketAddr),
}

/// The expected hello of each lane.
type Expected = [Option<Hello>; LANES];

/// A listening socket with its connections that have not sent a complete hello.
struct Listener {
    /// None once all of the peer's connections have come.
    socket: Option<Socket>,
    nic: String,
    invitation: Invitation,
    /// By lane.
    awaited: [Awaited; LANES],
    silent: Vec<Silent>,
    /// Where device memory is received, if the comms carry it alone.
    area: Option<Arc<Area>>,
    /// By direction: both connections are there, and the one for payload is being proved.
    proving: [Option<Proving>; 2],
}

/// A connection without a complete hello.
struct Silent {
    socket: Socket,
    peer: SocketAddr,
    got: usize,
    hello: [u8; KEYED_HELLO],
    since: Instant,
    _permit: Permit,
}

/// Counts one connection without a hello.
struct Permit(&'static AtomicUsize);

impl Permit {
    /// All listeners together keep a sixteenth of the process's descriptors for connections without a hello. Each listener may always
    /// keep as many as it still awaits: its peer's may be silent for a moment, and connections at other listeners must not displace them.
    fn take(own: bool) -> Option<Permit> {
        static TAKEN: PerProcess<AtomicUsize> = PerProcess::new(AtomicUsize::default);
        let taken = TAKEN.get();
        let most = if own { usize::MAX } else { (descriptors() / 16).max(8) };
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < most).then_some(n + 1)).ok().map(|_| Permit(taken))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Silent {
    /// Reads more: `None` while the hello is incomplete, else the lane whose expected hello it matches, if any.
    fn read_hello(&mut self, expected: &Expected) -> Option<Option<Lane>> {
        // All have the same length.
        let len = expected.iter().flatten().map(|hello| hello.len).max().unwrap_or(0);
        while self.got < len {
            let rest = &mut self.hello[self.got..len];
            // SAFETY: a buffer and its length.
            let got = unsafe { libc::recv(self.socket.as_raw_fd(), rest.as_mut_ptr().cast(), rest.len(), libc::MSG_DONTWAIT) };
            match usize::try_from(got) {
                Ok(0) => return Some(None),
                Ok(got) => self.got += got,
                Err(_) => {
                    let kind = io::Error::last_os_error().kind();
                    return if matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted) { None } else { Some(None) };
                }
            }
        }
        let is = |hello: &Option<Hello>| hello.as_ref().is_some_and(|hello| hello.is(&self.hello[..len]));
        Some(Lane::ALL.into_iter().find(|lane| is(&expected[lane.number()])))
    }
}

/// A socket that listens on the device's address, at a port of the configured range, if any.
fn bind_in_range(device: &Interface, config: &Config, bounded: bool) -> io::Result<Socket> {
    /// Where the search begins: behind the last port used, and at a different port in each process.
    static NEXT: PerProcess<AtomicUsize> = PerProcess::new(|| {
        let [a, b, ..] = random().unwrap_or_default();
        AtomicUsize::new(u16::from_le_bytes([a, b]).into())
    });
    let Some(range) = &config.ports else { return listen_at(device, config, 0, bounded) };
    let next = NEXT.get();
    let count = range.len();
    for _ in 0..count {
        let port = usize::from(*range.start()) + next.fetch_add(1, Ordering::Relaxed) % count;
        match listen_at(device, config, port as u16, bounded) {
            Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) => {}
            done => return done,
        }
    }
    Err(io::Error::from_raw_os_error(libc::EADDRINUSE))
}

fn listen_at(device: &Interface, config: &Config, port: u16, bounded: bool) -> io::Result<Socket> {
    let mut address = own_address(device);
    address.set_port(port);
    let socket = new_socket(&address)?;
    crate::interfaces::check_link(device, socket.as_fd())?;
    tune(&socket, config, bounded)?;
    if port != 0 {
        // Allows the port to be reused while earlier connections to it still exist.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket)
}

impl Listener {
    fn new(device: &Interface, config: &Config, handle: &mut Handle, area: Option<Arc<Area>>) -> io::Result<Listener> {
        let socket = bind_in_range(device, config, area.is_some())?;
        let address = socket.local_addr()?.as_socket().ok_or_else(|| invalid("no address"))?;
        let invitation = Invitation { address, cookie: random()? };
        invitation.write(handle);
        let nic = device.name.to_string_lossy().into_owned();
        let awaited = std::array::from_fn(|_| Awaited::Nobody);
        let (socket, silent, proving) = (Some(socket), Vec::new(), [None, None]);
        let mut listener = Listener { socket, nic, invitation, awaited, silent, area, proving };
        listener.await_lanes(Direction::Forth, None)?;
        Ok(listener)
    }

    /// The lanes of a direction.
    fn lanes(&self, direction: Direction) -> impl Iterator<Item = Lane> {
        direction.lanes(self.area.is_some())
    }

    fn await_lanes(&mut self, direction: Direction, key: Option<&Key>) -> io::Result<()> {
        for lane in self.lanes(direction) {
            self.awaited[lane.number()] = Awaited::Peer(self.invitation.hello(lane, key)?);
        }
        Ok(())
    }

    /// Whether no comm of this direction is expected.
    fn is_used(&self, direction: Direction) -> bool {
        let expected = self.lanes(direction).any(|lane| !matches!(self.awaited[lane.number()], Awaited::Nobody));
        !expected && self.proving[direction as usize].is_none()
    }

    /// Expects a connection; `false` when that makes no sense now.
    fn expect(&mut self, direction: Direction, key: Option<&Key>) -> bool {
        let keyed = match &self.awaited[Direction::Forth as usize] {
            _ if direction == Direction::Forth => key.is_some(),
            Awaited::Peer(hello) => hello.is_keyed(),
            _ => return false,
        };
        let fresh =
            self.socket.is_some() && self.silent.is_empty() && !matches!(self.awaited[direction as usize], Awaited::Here(..));
        fresh && keyed == key.is_some() && self.await_lanes(direction, key).is_ok()
    }

    /// The connections still expected.
    fn expected(&self) -> Expected {
        Lane::ALL.map(|lane| match self.awaited[lane.number()] {
            Awaited::Peer(hello) => Some(hello),
            _ => None,
        })
    }

    /// The peer's connections of a direction, once their hellos are complete. When all have come, the listener closes everything else.
    fn accept(&mut self, direction: Direction) -> io::Result<Option<Connected>> {
        if let Some(proving) = self.proving[direction as usize].take() {
            return self.prove(direction, proving);
        }
        while self.lanes(direction).any(|lane| matches!(self.awaited[lane.number()], Awaited::Peer(_))) {
            let expected = self.expected();
            let found = match self.read_silent(&expected) {
                Some(genuine) => Some(genuine),
                None => self.accept_new(&expected)?,
            };
            let Some((came, socket, peer)) = found else { return Ok(None) };
            self.awaited[came.number()] = Awaited::Here(socket, peer);
            if !self.awaited.iter().any(|awaited| matches!(awaited, Awaited::Peer(_))) {
                self.socket = None;
                self.silent.clear();
            }
        }
        let mut sockets = Vec::new();
        for lane in self.lanes(direction) {
            if let Awaited::Here(socket, peer) = std::mem::replace(&mut self.awaited[lane.number()], Awaited::Nobody) {
                socket.set_tcp_nodelay(direction == Direction::Back)?;
                sockets.push((socket, peer));
            }
        }
        let mut sockets = sockets.into_iter();
        let Some((socket, peer)) = sockets.next() else { return Ok(None) };
        let connected = Connected::new(socket, peer, &self.nic);
        let (Some((payload, _)), Some(area)) = (sockets.next(), &self.area) else { return Ok(Some(connected)) };
        let receives = direction == Direction::Forth;
        let proving = Proving::begin(area, receives, connected, payload, &self.invitation, direction)?;
        self.prove(direction, proving)
    }

    fn prove(&mut self, direction: Direction, proving: Proving) -> io::Result<Option<Connected>> {
        Ok(proving.step()?.map_or_else(
            |proving| {
                self.proving[direction as usize] = Some(proving);
                None
            },
            Some,
        ))
    }

    /// Reads from connections without a hello, and drops those with a wrong hello or none for too long.
    fn read_silent(&mut self, expected: &Expected) -> Option<(Lane, Socket, SocketAddr)> {
        static LINE: Limited = Limited::new();
        let mut at = 0;
        while at < self.silent.len() {
            let late = self.silent[at].since.elapsed() > HELLO_TIME;
            match self.silent[at].read_hello(expected) {
                Some(Some(lane)) => {
                    let genuine = self.silent.remove(at);
                    return Some((lane, genuine.socket, genuine.peer));
                }
                Some(None) => {
                    LINE.info(&format!("dropped a connection from {}: its hello is not the peer's", self.silent[at].peer));
                    self.silent.remove(at);
                }
                None if late => {
                    LINE.info(&format!("dropped a connection from {}: no hello in time", self.silent[at].peer));
                    self.silent.remove(at);
                }
                None => at += 1,
            }
        }
        None
    }

    /// Accepts new connections; one without a complete hello joins `silent`.
    fn accept_new(&mut self, expected: &Expected) -> io::Result<Option<(Lane, Socket, SocketAddr)>> {
        for _ in 0..ACCEPTS_A_CALL {
            let Some(listening) = &self.socket else { return Ok(None) };
            let (socket, peer) = match listening.accept() {
                Ok((socket, peer)) => (socket, peer),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(None),
                    // The error is the connection's own: the next one may be fine.
                    Some(code) if PASSED_ON.contains(&code) => continue,
                    // Make room by dropping a connection without a hello.
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

    fn receive(&mut self, socket: Socket, peer: SocketAddr, expected: &Expected) -> Option<(Lane, Socket, SocketAddr)> {
        if self.silent.len() == MAX_SILENT {
            self.silent.remove(0);
        }
        let awaited = self.awaited.iter().filter(|awaited| matches!(awaited, Awaited::Peer(_))).count().max(1);
        let mut permit = Permit::take(self.silent.len() < awaited);
        while permit.is_none() {
            // Drop the oldest.
            self.silent.remove(0);
            permit = Permit::take(self.silent.len() < awaited);
        }
        let mut fresh = Silent { socket, peer, got: 0, hello: [0; KEYED_HELLO], since: Instant::now(), _permit: permit? };
        match fresh.read_hello(expected) {
            Some(lane) => lane.map(|lane| (lane, fresh.socket, fresh.peer)),
            None => {
                self.silent.push(fresh);
                None
            }
        }
    }
}

/// Errors of `accept` that concern one connection only.
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
