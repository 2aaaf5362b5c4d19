//! Zero-copy sends, which the kernel may read from the memory later, and its completion notices.

use std::io::{Error, ErrorKind, Result};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// How many zero-copy sends a data socket was given, and how many the kernel has completed.
#[derive(Clone, Copy, Default)]
pub(crate) struct Lent {
    pub given: u32,
    pub done: u32,
}

impl Lent {
    /// Whether the kernel has completed the first `calls`.
    pub(crate) fn past(self, calls: u32) -> bool {
        self.done.wrapping_sub(calls) as i32 >= 0
    }
}

/// Enables zero-copy sends on a socket.
pub(crate) fn allow(stream: &TcpStream) -> Result<()> {
    let one: libc::c_int = 1;
    // SAFETY: an int and its size.
    let result = unsafe {
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, (&raw const one).cast(), size)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

/// Sends from the memory without a copy. Returns the bytes accepted.
pub(crate) fn lend(stream: &TcpStream, data: usize, len: usize, lent: &mut Lent) -> Result<usize> {
    // SAFETY: registered memory of that length; the kernel may read it later, as with TCPX.
    let n = unsafe { libc::send(stream.as_raw_fd(), data as *const _, len, libc::MSG_DONTWAIT | libc::MSG_ZEROCOPY) };
    if let Ok(n) = usize::try_from(n) {
        lent.given = lent.given.wrapping_add(1);
        return Ok(n);
    }
    match Error::last_os_error() {
        // No room for more notices or locked memory until the kernel completes some.
        e if e.kind() == ErrorKind::WouldBlock || e.raw_os_error() == Some(libc::ENOBUFS) => Ok(0),
        e => Err(e),
    }
}

/// Reads the kernel's notices.
pub(crate) fn settle(stream: &TcpStream, lent: &mut Lent) {
    while let Some(calls) = notice(stream) {
        lent.done = lent.done.wrapping_add(calls);
    }
}

/// The number of calls that one notice covers.
fn notice(stream: &TcpStream) -> Option<u32> {
    let mut control = [0u64; 16];
    // SAFETY: plain data for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: a message without data buffers, and room for the kernel's notice.
    let result = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
    if result < 0 {
        return None;
    }
    // SAFETY: the message that recvmsg filled.
    let header = unsafe { libc::CMSG_FIRSTHDR(&message).as_ref() }?;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_IP, libc::IP_RECVERR) {
        return None;
    }
    // SAFETY: what follows a header of this type.
    let error = unsafe { libc::CMSG_DATA(header).cast::<libc::sock_extended_err>().read_unaligned() };
    Some(error.ee_data.wrapping_sub(error.ee_info).wrapping_add(1))
}
