//! The end of a TCP connection whose descriptor stays.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Resets a connection: the kernel drops what is unsent or not acknowledged, and the peer meets a reset. It is a connect to AF_UNSPEC, which
/// acts on the connection itself: SO_LINGER would act on the close of the last descriptor, which a forked child may keep for long, and after
/// a close another thread could meet a descriptor of the same number.
///
/// # Errors
/// That of the kernel, which has no such connection any more.
pub fn reset(connection: BorrowedFd<'_>) -> Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: an address and its size.
    match unsafe { libc::connect(connection.as_raw_fd(), &raw const nowhere, size_of::<libc::sockaddr>() as libc::socklen_t) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn a_reset_ends_a_connection_whose_descriptor_has_a_copy() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        let mut here = TcpStream::connect(listener.local_addr().expect("address")).expect("connection");
        let (mut there, _) = listener.accept().expect("peer");
        let copy = here.try_clone().expect("copy");
        reset(here.as_fd()).expect("reset");
        assert_eq!(there.read(&mut [0]).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
        assert!(here.read(&mut [0]).is_err() && copy.peer_addr().is_err());
        // No socket.
        assert!(reset(std::fs::File::open("/dev/null").expect("file").as_fd()).is_err());
    }
}
