//! Listening, connecting and accepting: how two processes come by one connected socket, step by step without blocking.
//! Knows the 128-byte handle and the hello; knows nothing of requests.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::config::Config;
use crate::congestion;
use crate::interfaces::Interface;

const HANDLE_MAGIC: u64 = 0x5446_4F53_4C43_4355;
const HELLO_MAGIC: u64 = 0x4F4C_4C45_4854_4653;
const VERSION: u32 = 1;
const COOKIE: usize = 16;
const HELLO: usize = 8 + 4 + COOKIE;
/// Bytes of a handle that `listen` writes; the word behind them is where `connect` keeps its state.
const STATE_AT: usize = 64;
/// A connection that has not said hello is dropped after this.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// Silent connections kept at once; the oldest goes first.
const MAX_SILENT: usize = 128;
/// A connect that nobody asked about for this long is given up.
const CONNECT_IDLE: Duration = Duration::from_secs(120);

/// The handle buffer.
pub type Handle = [u8; NCCL_NET_HANDLE_MAXSIZE];

/// A socket ready to carry a comm.
pub struct Connected {
    /// The socket, non-blocking.
    pub socket: OwnedFd,
    /// The peer's address.
    pub peer: String,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, what.to_owned())
}

fn random() -> io::Result<[u8; COOKIE]> {
    let mut bytes = [0; COOKIE];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}

/// What a handle says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ticket {
    address: SocketAddr,
    cookie: [u8; COOKIE],
}

impl Ticket {
    fn write(&self, handle: &mut Handle) {
        handle.fill(0);
        let (ip, scope) = match self.address {
            SocketAddr::V4(a) => (a.ip().to_ipv6_mapped(), 0),
            SocketAddr::V6(a) => (*a.ip(), a.scope_id()),
        };
        handle[..8].copy_from_slice(&HANDLE_MAGIC.to_le_bytes());
        handle[8..12].copy_from_slice(&VERSION.to_le_bytes());
        handle[12..14].copy_from_slice(&self.address.port().to_le_bytes());
        handle[16..20].copy_from_slice(&scope.to_le_bytes());
        handle[20..36].copy_from_slice(&ip.octets());
        handle[36..52].copy_from_slice(&self.cookie);
    }

    fn read(handle: &Handle) -> io::Result<Ticket> {
        if word(handle, 0) != HANDLE_MAGIC {
            return Err(invalid("not a handle of the software plugin"));
        }
        let half = |at: usize| handle[at..].first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b));
        if half(8) != VERSION {
            return Err(invalid("a handle of another version of the software plugin"));
        }
        let port = u16::from_le_bytes([handle[12], handle[13]]);
        let mut octets = [0; 16];
        octets.copy_from_slice(&handle[20..36]);
        let ip = std::net::Ipv6Addr::from(octets);
        let address = match ip.to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), port),
            None => SocketAddr::V6(SocketAddrV6::new(ip, port, 0, half(16))),
        };
        let mut cookie = [0; COOKIE];
        cookie.copy_from_slice(&handle[36..52]);
        Ok(Ticket { address, cookie })
    }

    fn hello(&self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[..8].copy_from_slice(&HELLO_MAGIC.to_le_bytes());
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..].copy_from_slice(&self.cookie);
        bytes
    }
}

fn word(handle: &Handle, at: usize) -> u64 {
    handle[at..].first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b))
}

fn new_socket(address: &SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Options that matter before the connection exists (window scale follows the buffers).
fn tune(socket: &Socket, config: &Config) -> io::Result<()> {
    if config.socket_buffer > 0 {
        socket.set_send_buffer_size(config.socket_buffer)?;
        socket.set_recv_buffer_size(config.socket_buffer)?;
    }
    congestion::prepare(socket.as_raw_fd(), config)
}

/// A listen comm.
pub struct Listener {
    socket: Socket,
    ticket: Ticket,
    used: bool,
    silent: Vec<Silent>,
}

/// A connection that has not said all of its hello.
struct Silent {
    socket: Socket,
    peer: SocketAddr,
    got: usize,
    hello: [u8; HELLO],
    since: Instant,
}

impl Silent {
    /// Reads on: `None` while the hello is incomplete, else whether it is the expected one.
    fn listen(&mut self, expected: &[u8; HELLO]) -> Option<bool> {
        while self.got < HELLO {
            let rest = &mut self.hello[self.got..];
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
        Some(self.hello == *expected)
    }
}

impl Listener {
    /// Listens on the device's address and writes the handle.
    pub fn new(device: &Interface, config: &Config, handle: &mut Handle) -> io::Result<Listener> {
        let address = match device.address {
            IpAddr::V4(ip) => SocketAddr::new(ip.into(), 0),
            IpAddr::V6(ip) => SocketAddr::V6(SocketAddrV6::new(ip, 0, 0, device.scope)),
        };
        let socket = new_socket(&address)?;
        tune(&socket, config)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        let address = socket.local_addr()?.as_socket().ok_or_else(|| invalid("no address"))?;
        let ticket = Ticket { address, cookie: random()? };
        ticket.write(handle);
        Ok(Listener { socket, ticket, used: false, silent: Vec::new() })
    }

    /// Whether an accept has already succeeded.
    pub fn used(&self) -> bool {
        self.used
    }

    /// The genuine peer's connection, once it has said hello.
    pub fn accept(&mut self) -> io::Result<Option<Connected>> {
        loop {
            match self.socket.accept() {
                Ok((socket, peer)) => {
                    socket.set_nonblocking(true)?;
                    let Some(peer) = peer.as_socket() else { continue };
                    if self.silent.len() == MAX_SILENT {
                        self.silent.remove(0);
                    }
                    self.silent.push(Silent { socket, peer, got: 0, hello: [0; HELLO], since: Instant::now() });
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => break,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
        let expected = self.ticket.hello();
        let mut at = 0;
        while at < self.silent.len() {
            match self.silent[at].listen(&expected) {
                Some(true) => {
                    let genuine = self.silent.swap_remove(at);
                    genuine.socket.set_tcp_nodelay(true)?;
                    self.used = true;
                    self.silent.clear();
                    return Ok(Some(Connected { socket: genuine.socket.into(), peer: genuine.peer.to_string() }));
                }
                Some(false) => {
                    let stranger = self.silent.remove(at);
                    crate::logger::info(&format!("dropped a stranger's connection from {}", stranger.peer));
                }
                None if self.silent[at].since.elapsed() > HELLO_TIME => {
                    let stranger = self.silent.remove(at);
                    crate::logger::info(&format!("dropped a silent connection from {}", stranger.peer));
                }
                None => at += 1,
            }
        }
        Ok(None)
    }
}

/// A connect under way. It lives here and not in the handle, whose bytes came over the network; the handle holds its key.
struct Connecting {
    socket: Socket,
    ticket: Ticket,
    connected: bool,
    said: usize,
    asked: Instant,
}

static CONNECTING: Mutex<Option<HashMap<u64, Connecting>>> = Mutex::new(None);

/// One step of a connect: `None` means call again with the same buffer. After an error the buffer is of no more use.
pub fn connect(device: &Interface, config: &Config, handle: &mut Handle) -> io::Result<Option<Connected>> {
    let key = word(handle, STATE_AT);
    let (key, mut attempt) = if key == 0 {
        let [a, b, c, d, e, f, g, h, ..] = random()?;
        let key = u64::from_le_bytes([a, b, c, d, e, f, g, h]) | 1;
        (key, begin(device, config, Ticket::read(handle)?)?)
    } else {
        let known = CONNECTING.lock().as_mut().and_then(|all| all.remove(&key));
        let mut attempt =
            known.ok_or_else(|| invalid("the handle's connect has failed, is finished, or was never started here"))?;
        let peer = attempt.ticket.address;
        let step = attempt.step().map_err(|e| io::Error::new(e.kind(), format!("connect to {peer}: {e}")));
        if step? {
            return Ok(Some(Connected { socket: attempt.socket.into(), peer: peer.to_string() }));
        }
        (key, attempt)
    };
    // Like TCPX, the first call never finishes: what polls is then exercised on the fastest network too.
    attempt.asked = Instant::now();
    handle[STATE_AT..STATE_AT + 8].copy_from_slice(&key.to_le_bytes());
    let mut all = CONNECTING.lock();
    let all = all.get_or_insert_with(HashMap::new);
    all.retain(|_, c| c.asked.elapsed() < CONNECT_IDLE);
    all.insert(key, attempt);
    Ok(None)
}

fn begin(device: &Interface, config: &Config, ticket: Ticket) -> io::Result<Connecting> {
    let target = ticket.address;
    let attempt = || -> io::Result<Socket> {
        let socket = new_socket(&target)?;
        tune(&socket, config)?;
        socket.set_tcp_nodelay(true)?;
        if device.reaches(target.ip()) {
            bind_source(&socket, device)?;
        }
        match socket.connect(&target.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        Ok(socket)
    };
    let socket = attempt().map_err(|e| io::Error::new(e.kind(), format!("connect to {target}: {e}")))?;
    Ok(Connecting { socket, ticket, connected: false, said: 0, asked: Instant::now() })
}

/// Leaves through the device itself. The port stays open until the connect, so that ports do not run out.
fn bind_source(socket: &Socket, device: &Interface) -> io::Result<()> {
    let one: libc::c_int = 1;
    // SAFETY: an int of that size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const one).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set < 0 {
        crate::logger::info("IP_BIND_ADDRESS_NO_PORT is not available");
    }
    let source: SockAddr = match device.address {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), 0).into(),
        IpAddr::V6(ip) => SocketAddr::V6(SocketAddrV6::new(ip, 0, 0, device.scope)).into(),
    };
    socket.bind(&source)
}

impl Connecting {
    /// True when the socket is connected and the hello is in the kernel.
    fn step(&mut self) -> io::Result<bool> {
        if !self.connected {
            let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
            // SAFETY: one entry.
            if unsafe { libc::poll(&mut poll, 1, 0) } <= 0 {
                return Ok(false);
            }
            if let Some(error) = self.socket.take_error()? {
                return Err(error);
            }
            // TCP can connect an ephemeral port to itself when nobody listens there.
            if self.socket.local_addr()?.as_socket() == Some(self.ticket.address) {
                return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
            }
            self.connected = true;
        }
        let hello = self.ticket.hello();
        while self.said < HELLO {
            match self.socket.send_with_flags(&hello[self.said..], libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) {
                Ok(sent) => self.said += sent,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_survive_the_handle() {
        for address in ["10.1.2.3:4567", "[fd00::12]:9", "[fe80::1%3]:77"] {
            let ticket = Ticket { address: address.parse().unwrap(), cookie: *b"0123456789abcdef" };
            let mut handle = [0xFF; NCCL_NET_HANDLE_MAXSIZE];
            ticket.write(&mut handle);
            assert_eq!(word(&handle, STATE_AT), 0);
            assert_eq!(Ticket::read(&handle).unwrap(), ticket);
        }
        assert!(Ticket::read(&[0; NCCL_NET_HANDLE_MAXSIZE]).is_err());
    }
}
