//! The sockets that a plugin keeps to itself, for plugins that send from memory until the peer has acknowledged it, also after the close of
//! their comm: found once the comm is up, and reset at its close where sends are under way. Knows nothing of comms.

use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{FromRawFd, RawFd};

/// Sockets of this process that are connected to one address, and their own ends.
#[derive(Default)]
pub(super) struct Sockets(Vec<(RawFd, SocketAddr, SocketAddr)>);

/// This end of what may be a socket that is connected to `there`.
fn here(fd: RawFd, there: SocketAddr) -> Option<SocketAddr> {
    // SAFETY: only asked for its addresses, and never closed here; what is no such socket answers with an error.
    let socket = ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) });
    (socket.peer_addr().ok()? == there).then(|| socket.local_addr().ok())?
}

impl Sockets {
    /// Those that are connected to this address now.
    pub(super) fn connected_to(there: SocketAddr) -> Sockets {
        let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") else { return Sockets::default() };
        let numbers = descriptors.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
        Sockets(numbers.filter_map(|fd| Some((fd, here(fd, there)?, there))).collect())
    }

    /// Without those that were there before: what the peer's handle names may be somebody else's address, to which the application is
    /// connected.
    pub(super) fn since(mut self, before: &Sockets) -> Sockets {
        self.0.retain(|socket| !before.0.contains(socket));
        self
    }

    /// What the kernel still has to send on them, or to send again, is thrown away when they are closed.
    pub(super) fn reset_at_close(&self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        for &(fd, here, there) in &self.0 {
            // The plugin may have closed one already, and its number may be another's.
            if self::here(fd, there) != Some(here) {
                continue;
            }
            // SAFETY: a linger structure and its size; the descriptor is the plugin's, which closes it after this.
            let result = unsafe {
                let size = size_of::<libc::linger>() as libc::socklen_t;
                libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size)
            };
            if result != 0 {
                log::debug!("a socket to {there} keeps its data: {}", std::io::Error::last_os_error());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_socket_that_is_reset_sends_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        let address = listener.local_addr().expect("address");
        let pair = || (TcpStream::connect(address).expect("connect"), listener.accept().expect("accept").0);
        let (mut kept, mut beside) = pair();
        let before = Sockets::connected_to(address);
        assert_eq!(before.0.len(), 1, "not the accepted one");
        let (mut reset, mut there) = pair();
        let found = Sockets::connected_to(address).since(&before);
        assert_eq!(found.0.iter().map(|&(fd, ..)| fd).collect::<Vec<_>>(), [reset.as_raw_fd()]);
        // More than both kernels' buffers hold.
        reset.set_nonblocking(true).expect("nonblocking");
        while reset.write(&[7; 65536]).is_ok() {}
        kept.write_all(b"all of it").expect("write");
        found.reset_at_close();
        drop((reset, kept));
        let mut bytes = Vec::new();
        assert_eq!(there.read_to_end(&mut bytes).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
        bytes.clear();
        assert_eq!(beside.read_to_end(&mut bytes).map_err(|e| e.kind()), Ok(9));
    }

    #[test]
    fn a_number_that_is_anothers_by_now_is_left_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        let address = listener.local_addr().expect("address");
        let (mut here, mut there) = (TcpStream::connect(address).expect("connect"), listener.accept().expect("accept").0);
        let mut found = Sockets::connected_to(address);
        for (_, here, _) in &mut found.0 {
            here.set_port(1);
        }
        found.reset_at_close();
        here.write_all(b"12").expect("write");
        drop(here);
        let mut bytes = Vec::new();
        assert_eq!(there.read_to_end(&mut bytes).map_err(|e| e.kind()), Ok(2));
    }
}
