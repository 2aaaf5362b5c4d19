//! The end of a connection: found, and brought about.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nccl_net_abi::NCCL_SYSTEM_ERROR;

use crate::ledger::Failure;
use crate::logger::Limited;

/// Fails if a connection has ended. Its error queue does not count: it is how the kernel says that sends have ended.
pub fn check_open(connection: BorrowedFd<'_>) -> Result<(), Failure> {
    let mut poll = libc::pollfd { fd: connection.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one entry.
    let _ = unsafe { libc::poll(&mut poll, 1, 0) };
    if poll.revents & (libc::POLLRDHUP | libc::POLLHUP) == 0 {
        return Ok(());
    }
    let mut code: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: an int of that size.
    let known =
        unsafe { libc::getsockopt(connection.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut code).cast(), &mut len) };
    let why = match (known, code) {
        (0, 1..) => io::Error::from_raw_os_error(code).to_string(),
        _ => "the peer closed the connection".to_owned(),
    };
    Err(Failure::new(NCCL_SYSTEM_ERROR, why))
}

/// Ends a connection at once: what is not acknowledged is not sent again. The descriptor stays. A connection that has ended is left so.
pub fn reset(connection: BorrowedFd<'_>) {
    static LINE: Limited = Limited::new();
    if let Err(e) = process::reset(connection) {
        LINE.warn(&format!("a payload connection of device memory may still send, and hold a part of its area: the kernel does not reset it: {e}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn an_end_is_found_at_both_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut there, _) = listener.accept().unwrap();
        assert!(check_open(here.as_fd()).is_ok() && check_open(there.as_fd()).is_ok());
        reset(here.as_fd());
        assert!(there.read(&mut [0; 1]).is_err(), "a reset, not an end in order");
        assert!(check_open(there.as_fd()).is_err());
    }
}
