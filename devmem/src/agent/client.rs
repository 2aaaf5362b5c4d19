//! The side of a process without privileges.

use super::passing;
use super::protocol::{Answer, Request, ANSWER_BYTES};
use crate::binding::Refused;
use crate::socket::returned;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// How long an answer may take. A queue restarts for a binding.
const ANSWER_SECONDS: i64 = 2;

/// A connection to the agent. When it ends, the agent ends its binding and its rules.
#[derive(Debug)]
pub struct Agent {
    pub(super) socket: OwnedFd,
    failed: bool,
}

/// A Unix socket that keeps datagrams apart, and an address for it.
pub(crate) fn socket_for(path: &Path) -> io::Result<(OwnedFd, libc::sockaddr_un)> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all zeros is an empty address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as _;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as _;
    }
    // SAFETY: a call without pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    returned(fd as isize)?;
    // SAFETY: a descriptor just created, without another owner.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, address))
}

impl Agent {
    /// Connects to the agent's socket.
    ///
    /// # Errors
    /// It is not there, or does not let this process in.
    pub fn connect(path: &Path) -> io::Result<Agent> {
        let (socket, address) = socket_for(path)?;
        let time = libc::timeval { tv_sec: ANSWER_SECONDS, tv_usec: 0 };
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let size = std::mem::size_of_val(&time) as u32;
            // SAFETY: the option is read during the call.
            unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const time).cast(), size) };
        }
        let size = std::mem::size_of_val(&address) as u32;
        // SAFETY: the address is read during the call.
        returned(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) } as isize)?;
        Ok(Agent { socket, failed: false })
    }

    /// Has a dma-buf bound to a spare queue of a NIC: the queue, and the number of the binding.
    ///
    /// # Errors
    /// The agent's or the kernel's.
    pub fn bind(&mut self, nic: &str, dmabuf: BorrowedFd<'_>) -> Result<(u32, u32), Refused> {
        self.ask(&Request::Bind(nic.to_owned()), Some(dmabuf))
    }

    /// Has a connection steered to the bound queue: the number of the rule. The agent keeps the connection open until it is released.
    ///
    /// # Errors
    /// The agent's or the kernel's.
    pub fn steer(&mut self, connection: BorrowedFd<'_>) -> Result<u32, Refused> {
        Ok(self.ask(&Request::Steer, Some(connection))?.0)
    }

    /// Has a rule deleted.
    ///
    /// # Errors
    /// The agent is gone, and the rule with it.
    pub fn release(&mut self, rule: u32) -> Result<(), Refused> {
        self.ask(&Request::Release(rule), None).map(drop)
    }

    pub(super) fn ask(&mut self, request: &Request, with: Option<BorrowedFd<'_>>) -> Result<(u32, u32), Refused> {
        match self.exchange(request, with) {
            Ok(Answer::Done(one, other)) => Ok((one, other)),
            Ok(Answer::Refused(error, text)) => Err(Refused { error: io::Error::from_raw_os_error(error), text }),
            Err(error) => {
                self.failed = true;
                Err(error.into())
            }
        }
    }

    fn exchange(&mut self, request: &Request, with: Option<BorrowedFd<'_>>) -> io::Result<Answer> {
        passing::send(self.socket.as_fd(), &request.encode(), with, 0)?;
        let mut buffer = [0; ANSWER_BYTES];
        let answer = passing::receive(self.socket.as_fd(), &mut buffer, 0)?;
        let none = if answer.len == 0 { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData };
        Answer::decode(&buffer[..answer.len]).filter(|_| !answer.cut).ok_or_else(|| none.into())
    }

    /// Whether the agent has ended, or did not answer in time: a later answer could be that of an earlier request.
    pub fn has_failed(&self) -> bool {
        self.failed
    }
}
