//! Listening, connecting and accepting, in non-blocking steps.
//! Knows the 128-byte handle and the hello; knows nothing of requests.

mod connecting;
mod listener;

pub use connecting::{abandon, connect, sweep};
pub use listener::ListenComm;

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use process::guarded::{apart, Guarded};
use ring::hmac;
use socket2::{Domain, Protocol, Socket, Type};
use zeroize::Zeroize;

use crate::config::Config;
use crate::congestion;
use crate::devmem::{Area, Payload, Proof, RECEIVE_BUFFER};
use crate::interfaces::Interface;
use crate::protect::Key;
use crate::tcp;

const HANDLE_MAGIC: u64 = 0x5446_4F53_4C43_4355;
const HELLO_MAGIC: u64 = 0x4F4C_4C45_4854_4653;
const VERSION: u32 = 3;
const COOKIE: usize = 16;
/// A hello with the cookie: magic, version, direction, cookie. With a key: magic, version, direction, HMAC-SHA256 over these and the
/// cookie, which is not sent.
const HELLO: usize = HELLO_HEAD + COOKIE;
const HELLO_HEAD: usize = 8 + 4 + 4;
const KEYED_MAGIC: u64 = u64::from_le_bytes(*b"SFTKEYED");
const KEYED_HELLO: usize = HELLO_HEAD + 32;
/// Bytes of a handle that `listen` writes; `connect` keeps its state in the word behind them.
const STATE_AT: usize = 64;
/// Where the key of a connect is kept: a mark, then the key.
const KEY_AT: usize = 72;
const KEY_MARK: u8 = 0x6B;

/// The handle buffer.
pub type Handle = [u8; NCCL_NET_HANDLE_MAXSIZE];

/// Which engine sends on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The connector.
    Forth = 0,
    /// The listener.
    Back = 1,
}

impl Direction {
    /// The connections of a comm: its own, and one for payload where that goes to and from device memory.
    fn lanes(self, payload: bool) -> impl Iterator<Item = Lane> {
        let direction = self;
        [false, true].into_iter().take(1 + usize::from(payload)).map(move |payload| Lane { direction, payload })
    }
}

/// One connection of a comm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lane {
    direction: Direction,
    /// It carries the payload of device memory alone.
    payload: bool,
}

impl Lane {
    const ALL: [Lane; LANES] = [
        Lane { direction: Direction::Forth, payload: false },
        Lane { direction: Direction::Back, payload: false },
        Lane { direction: Direction::Forth, payload: true },
        Lane { direction: Direction::Back, payload: true },
    ];

    /// Its number, which its hello has.
    fn number(self) -> usize {
        self.direction as usize + 2 * usize::from(self.payload)
    }
}

const LANES: usize = 4;

/// A socket ready to carry a comm.
pub struct Connected {
    /// The socket, non-blocking.
    pub socket: OwnedFd,
    /// The connection for the payload of device memory.
    pub payload: Option<Payload>,
    /// "local-address -> peer-address on NIC".
    pub path: String,
}

impl Connected {
    fn new(socket: Socket, peer: SocketAddr, nic: &str) -> Connected {
        let local = socket.local_addr().ok().and_then(|a| a.as_socket()).map_or("unknown".to_owned(), |a| a.to_string());
        Connected { socket: socket.into(), payload: None, path: format!("{local} -> {peer} on {nic}") }
    }
}

/// A comm whose connections are there, while the one for payload is proved.
struct Proving {
    connected: Connected,
    proof: Proof,
}

impl Proving {
    fn begin(
        area: &Arc<Area>,
        receives: bool,
        connected: Connected,
        payload: Socket,
        invitation: &Invitation,
        direction: Direction,
    ) -> io::Result<Proving> {
        let secret = [&invitation.cookie[..], &[direction as u8]].concat();
        let proof = Proof::begin(area, receives, connected.socket.as_fd(), payload.into(), &secret)?;
        Ok(Proving { connected, proof })
    }

    fn step(mut self) -> io::Result<Result<Connected, Proving>> {
        Ok(match self.proof.step(self.connected.socket.as_fd())? {
            Some(payload) => Ok(Connected { payload: Some(payload), ..self.connected }),
            None => Err(self),
        })
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, what.to_owned())
}

/// An error with the operation that failed; it keeps its errno, which distinguishes exhausted descriptors from a lost peer.
pub struct Failed {
    /// The operation.
    pub what: String,
    /// Its error.
    pub error: io::Error,
}

impl Failed {
    fn new(what: impl Into<String>, error: io::Error) -> Failed {
        Failed { what: what.into(), error }
    }
}

fn random() -> io::Result<[u8; COOKIE]> {
    let mut bytes = [0; COOKIE];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}

/// The process's limit of descriptors.
fn descriptors() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is writable.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX),
        _ => 1024,
    }
}

/// The content of a handle.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Invitation {
    address: SocketAddr,
    cookie: [u8; COOKIE],
}

impl Invitation {
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

    fn read(handle: &Handle) -> io::Result<Invitation> {
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
        Ok(Invitation { address, cookie })
    }

    fn hello(&self, lane: Lane, key: Option<&Key>) -> io::Result<Hello> {
        let mut hello = Hello { bytes: [0; KEYED_HELLO], len: HELLO };
        let bytes = &mut hello.bytes;
        let magic = if key.is_some() { KEYED_MAGIC } else { HELLO_MAGIC };
        bytes[..8].copy_from_slice(&magic.to_le_bytes());
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..HELLO_HEAD].copy_from_slice(&(lane.number() as u32).to_le_bytes());
        bytes[HELLO_HEAD..HELLO].copy_from_slice(&self.cookie);
        if let Some(key) = key {
            let proof = apart(|| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), &bytes[..HELLO]))?;
            bytes[HELLO_HEAD..].copy_from_slice(proof.as_ref());
            hello.len = KEYED_HELLO;
        }
        Ok(hello)
    }
}

/// What the connecting side says first.
#[derive(Clone, Copy)]
struct Hello {
    bytes: [u8; KEYED_HELLO],
    len: usize,
}

impl Hello {
    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Whether it proves a key.
    fn is_keyed(&self) -> bool {
        self.len == KEYED_HELLO
    }

    /// Whether these are its bytes. Every byte is compared, whatever the first differences.
    fn is(&self, bytes: &[u8]) -> bool {
        bytes.len() == self.len && self.bytes().iter().zip(bytes).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
    }
}

/// The address in a handle.
pub fn address_of(handle: &Handle) -> Option<SocketAddr> {
    Some(Invitation::read(handle).ok()?.address)
}

/// Stores the key that the connect with this handle proves.
pub fn set_key(handle: &mut Handle, key: &Key) {
    handle[KEY_AT] = KEY_MARK;
    handle[KEY_AT + 1..KEY_AT + 1 + key.len()].copy_from_slice(key);
}

/// Takes the key out of the handle, if there is one.
fn take_key(handle: &mut Handle) -> io::Result<Option<Guarded<Key>>> {
    let place = &mut handle[KEY_AT..KEY_AT + 1 + size_of::<Key>()];
    let mut key = None;
    if place[0] == KEY_MARK {
        key.insert(Guarded::<Key>::zeroed()?).copy_from_slice(&place[1..]);
    }
    place.zeroize();
    Ok(key)
}

fn word(handle: &Handle, at: usize) -> u64 {
    handle[at..].first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b))
}

fn new_socket(address: &SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Options that must be set before the connection exists (window scale follows the buffers), and those that accepted sockets inherit.
///
/// `bounded`: the receive buffer has a fixed size, since what waits in it takes pages from other connections.
fn tune(socket: &Socket, config: &Config, bounded: bool) -> io::Result<()> {
    if bounded {
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    } else if config.socket_buffer > 0 {
        socket.set_send_buffer_size(config.socket_buffer)?;
        socket.set_recv_buffer_size(config.socket_buffer)?;
    }
    tcp::keep_alive(socket, Duration::from_secs(config.keepalive_s))?;
    tcp::limit_silence(socket, Duration::from_millis(config.user_timeout_ms))?;
    congestion::prepare(socket.as_raw_fd(), config)
}

/// Whether the device can carry new connections now: it has a carrier, and its address can be bound.
pub fn ready(device: &Interface) -> Result<(), Failed> {
    let look = || {
        let address = own_address(device);
        let socket = new_socket(&address)?;
        crate::interfaces::check_link(device, socket.as_fd())?;
        socket.bind(&address.into())
    };
    look().map_err(|e| Failed::new(format!("use {} ({})", device.name.to_string_lossy(), device.address), e))
}

fn own_address(device: &Interface) -> SocketAddr {
    match device.address {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), 0),
        IpAddr::V6(ip) => SocketAddr::V6(SocketAddrV6::new(ip, 0, 0, device.scope)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invitations_round_trip_through_the_handle() {
        for address in ["10.1.2.3:4567", "[fd00::12]:9", "[fe80::1%3]:77"] {
            let invitation = Invitation { address: address.parse().unwrap(), cookie: *b"0123456789abcdef" };
            let mut handle = [0xFF; NCCL_NET_HANDLE_MAXSIZE];
            invitation.write(&mut handle);
            assert_eq!(word(&handle, STATE_AT), 0);
            assert_eq!(Invitation::read(&handle).unwrap(), invitation);
        }
        assert!(Invitation::read(&[0; NCCL_NET_HANDLE_MAXSIZE]).is_err());
    }

    #[test]
    fn a_hello_with_a_key_shows_neither_key_nor_cookie() {
        let invitation = Invitation { address: "10.1.2.3:4567".parse().unwrap(), cookie: *b"0123456789abcdef" };
        let mut handle = [0; NCCL_NET_HANDLE_MAXSIZE];
        invitation.write(&mut handle);
        let taken = |handle: &mut Handle| take_key(handle).unwrap().map(|key| *key);
        assert_eq!(taken(&mut handle), None);
        set_key(&mut handle, &[9; 32]);
        assert_eq!(Invitation::read(&handle).unwrap(), invitation);
        assert_eq!((taken(&mut handle), taken(&mut handle)), (Some([9; 32]), None));
        assert!(!handle.contains(&9));
        use Direction::{Back, Forth};
        let hello = |direction, key| invitation.hello(Lane { direction, payload: false }, key).unwrap();
        let (plain, keyed) = (hello(Forth, None), hello(Forth, Some(&[9; 32])));
        let other = hello(Forth, Some(&[8; 32]));
        for key in [None, Some(&[9; 32])] {
            let (forth, back) = (hello(Forth, key), hello(Back, key));
            assert!(!forth.is(back.bytes()) && forth.len == back.len);
            // The proof does not match another direction in the clear bytes.
            let mut turned = forth.bytes().to_vec();
            turned[12] = 1;
            assert_eq!(back.is(&turned), key.is_none());
        }
        assert!(plain.is(plain.bytes()) && keyed.is(keyed.bytes()) && !keyed.is(other.bytes()) && !keyed.is(plain.bytes()));
        assert!(plain.bytes().ends_with(b"abcdef") && !keyed.bytes().windows(4).any(|w| w == b"0123"));
        let other = Invitation { cookie: [0; COOKIE], ..invitation.clone() };
        assert!(!keyed.is(other.hello(Lane { direction: Forth, payload: false }, Some(&[9; 32])).unwrap().bytes()));
        assert_eq!((address_of(&handle), address_of(&[0; 128])), (Some(invitation.address), None));
    }

    #[test]
    fn every_lane_has_a_hello_of_its_own() {
        let invitation = Invitation { address: "10.1.2.3:4567".parse().unwrap(), cookie: *b"0123456789abcdef" };
        for (number, lane) in Lane::ALL.into_iter().enumerate() {
            assert_eq!(lane.number(), number);
            let hello = invitation.hello(lane, None).unwrap();
            let same = Lane::ALL.into_iter().filter(|other| hello.is(invitation.hello(*other, None).unwrap().bytes())).count();
            assert_eq!(same, 1);
        }
        let of = |payload| Direction::Back.lanes(payload).map(Lane::number).collect::<Vec<_>>();
        assert_eq!((of(false), of(true)), (vec![1], vec![1, 3]));
    }

    #[test]
    fn a_handle_of_another_version_is_refused() {
        let mut handle = [0; NCCL_NET_HANDLE_MAXSIZE];
        Invitation { address: "10.1.2.3:4".parse().unwrap(), cookie: [7; COOKIE] }.write(&mut handle);
        handle[8] = 1;
        assert!(Invitation::read(&handle).unwrap_err().to_string().contains("version"));
    }
}
