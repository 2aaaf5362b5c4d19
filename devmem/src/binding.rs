//! A dma-buf tied to a NIC, and questions to the kernel by generic netlink.

use crate::netlink::{Exchange, Outcome, Request};
use crate::socket::returned;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const FAMILY_OF_FAMILIES: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const QUEUE_GET: u8 = 10;
const BIND_RX: u8 = 13;
const BIND_TX: u8 = 15;
const INTERFACE: u16 = 1;
const QUEUES: u16 = 2;
const DMABUF: u16 = 3;
const BINDING: u16 = 4;
const QUEUE_ID: u16 = 1;
const QUEUE_TYPE: u16 = 3;
const QUEUE_INTERFACE: u16 = 2;
/// In an answer about a queue: whose memory it has, a dma-buf's, io_uring's or AF_XDP's.
const QUEUE_MEMORY: [u16; 3] = [5, 6, 7];
const RECEIVING: u32 = 0;
/// Longer than any answer to our requests.
const DATAGRAM: usize = 32 << 10;

/// A request that the kernel refused.
#[derive(Debug)]
pub struct Refused {
    /// The error.
    pub error: io::Error,
    /// What the kernel says about it.
    pub text: Option<String>,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        Refused { error, text: None }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.text {
            Some(text) => write!(f, "{text} ({})", self.error),
            None => self.error.fmt(f),
        }
    }
}

/// A socket to one family of the kernel.
pub(crate) struct Family {
    socket: OwnedFd,
    id: u16,
    sequence: u32,
}

impl Family {
    pub(crate) fn open(name: &str) -> Result<Family, Refused> {
        // SAFETY: a call without pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_GENERIC) };
        returned(fd as isize)?;
        // SAFETY: a descriptor just created, without another owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let yes = 1i32;
        // SAFETY: the option is read during the call. Without it the kernel gives no texts.
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, (&raw const yes).cast(), 4) };
        let mut family = Family { socket, id: FAMILY_OF_FAMILIES, sequence: 0 };
        let id = family.ask(GET_FAMILY, 2, |request| request.text(FAMILY_NAME, name))?;
        family.id = number(&id, FAMILY_ID)? as u16;
        Ok(family)
    }

    /// Sends a request and returns the answer.
    pub(crate) fn ask(&mut self, command: u8, version: u8, fill: impl FnOnce(Request) -> Request) -> Result<Outcome, Refused> {
        self.sequence += 1;
        let request = fill(Request::new(self.id, command, version, self.sequence)).finish();
        let (mut exchange, mut datagram) = (Exchange::new(self.sequence), vec![0u8; DATAGRAM]);
        // SAFETY: the bytes are read during the call.
        returned(unsafe { libc::send(self.socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) })?;
        loop {
            // SAFETY: the buffer is written during the call, at most its length.
            let length = returned(unsafe { libc::recv(self.socket.as_raw_fd(), datagram.as_mut_ptr().cast(), DATAGRAM, 0) })?;
            match exchange.read(&datagram[..length]) {
                None => {}
                Some(Outcome::Refused(errno, text)) => return Err(Refused { error: io::Error::from_raw_os_error(errno), text }),
                Some(done) => return Ok(done),
            }
        }
    }
}

/// Whether a receive queue has the memory of a process.
pub(crate) fn is_taken(interface: u32, queue: u32) -> Result<bool, Refused> {
    let answer = Family::open("netdev")?.ask(QUEUE_GET, 1, |request| {
        request.number(QUEUE_ID, queue).number(QUEUE_INTERFACE, interface).number(QUEUE_TYPE, RECEIVING)
    })?;
    Ok(QUEUE_MEMORY.iter().any(|kind| answer.bytes(*kind).is_some()))
}

fn number(answer: &Outcome, kind: u16) -> Result<u32, Refused> {
    answer.number(kind).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData).into())
}

/// A dma-buf tied to a NIC, as long as this lives. The kernel unbinds when the process ends.
#[derive(Debug)]
pub struct Binding {
    id: u32,
    _netlink: OwnedFd,
}

impl Binding {
    /// Payload that arrives in the queue lands in the dma-buf. Needs CAP_NET_ADMIN, header split, and a queue without a binding.
    ///
    /// # Errors
    /// With the kernel's text.
    pub fn receiving(interface: u32, queue: u32, dmabuf: BorrowedFd<'_>) -> Result<Binding, Refused> {
        Binding::new(BIND_RX, |request| {
            let queue = [(QUEUE_ID, queue), (QUEUE_TYPE, RECEIVING)];
            request.number(INTERFACE, interface).nested(QUEUES, &queue).number(DMABUF, dmabuf.as_raw_fd() as u32)
        })
    }

    /// Connections that leave by the interface can send from the dma-buf.
    ///
    /// # Errors
    /// With the kernel's text.
    pub fn sending(interface: u32, dmabuf: BorrowedFd<'_>) -> Result<Binding, Refused> {
        Binding::new(BIND_TX, |request| request.number(INTERFACE, interface).number(DMABUF, dmabuf.as_raw_fd() as u32))
    }

    /// Its number, which fragments carry and `send` takes.
    pub fn id(&self) -> u32 {
        self.id
    }

    fn new(command: u8, fill: impl FnOnce(Request) -> Request) -> Result<Binding, Refused> {
        let mut family = Family::open("netdev")?;
        let answer = family.ask(command, 1, fill)?;
        Ok(Binding { id: number(&answer, BINDING)?, _netlink: family.socket })
    }
}
