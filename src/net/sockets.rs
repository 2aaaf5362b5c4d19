//! The data sockets that a plugin keeps to itself: found once a comm is up, and made ready for its close. Knows nothing of comms.
//!
//! GPUDirect-TCPX needs two things at a close, and this file is where both are kept.
//!
//! 1. **No byte leaves memory after its region was released.** The kernel sends from the memory of a send until the peer has acknowledged
//!    it, and a plain close leaves it to that. So a send comm that closes with sends under way has its connections reset: the kernel drops
//!    what it had still to send. The reset is asked for with a connect to no address, which acts on the connection itself. SO_LINGER would
//!    act on the close of its last descriptor, and a child that was forked meanwhile may keep one for long. What the interface had in its
//!    queue by then still leaves, and is read from memory only then: the close waits until that has left.
//! 2. **No receive comm closes with a socket that was reset.** The plugin takes the flow rule of each data socket back at the close, asks the
//!    socket for its peer's address to do so, and ends the process where there is no peer any more. Resets cannot be kept away from it:
//!    the peer's side of the first rule is one, and networks reset connections too, also between any check and the close. So every data
//!    socket gets a stand-in when its comm comes up: a UDP socket that is bound and connected to the same two addresses, and that no network
//!    can reset. It takes the socket's number just before the close: the plugin finds the peer's address and takes the right rule
//!    back, and what the connection had in receive memory goes with the connection. It is made early because later there may be neither
//!    descriptors nor a route to the peer. A comm with a socket that has no stand-in stays open: memory is lost, and not the process.

use socket2::{Domain, Protocol, SockAddr, SockFilter, SockRef, Socket, Type};
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

/// Of the kernel's socket.h: what memory a socket has taken.
const SO_MEMINFO: libc::c_int = 55;

/// How long a close waits for what its interface has queued: some milliseconds on links of 100 Mbit/s and more.
const LEAVES_WITHIN: Duration = Duration::from_secs(1);

/// A connection of this process, as it was when it was found.
struct Found {
    fd: RawFd,
    /// Tells the socket from another that has its number later.
    cookie: u64,
    here: SocketAddr,
    /// None where it had been reset by then.
    there: Option<SocketAddr>,
    stand_in: Option<Socket>,
}

impl Found {
    /// What has this number, where that is a TCP socket.
    fn look(fd: RawFd) -> Option<Found> {
        // SAFETY: only asked about itself, and not kept; what is no socket answers with an error.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let socket = SockRef::from(&borrowed);
        let here = socket.local_addr().ok()?.as_socket()?;
        if socket.protocol().ok()? != Some(Protocol::TCP) {
            return None;
        }
        let there = socket.peer_addr().ok().and_then(|address| address.as_socket());
        Some(Found { fd, cookie: socket.cookie().ok()?, here, there, stand_in: None })
    }

    /// Whether it still has its number: the plugin may have closed it.
    fn is_open(&self) -> bool {
        Found::look(self.fd).is_some_and(|now| now.cookie == self.cookie)
    }

    fn make_stand_in(&mut self) -> Result<()> {
        if self.stand_in.is_some() {
            return Ok(());
        }
        let socket = Socket::new(Domain::for_address(self.here), Type::DGRAM, Some(Protocol::UDP))?;
        // The plugin's threads may still read from the number, and take what they get for data: nothing arrives.
        let nothing = SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
        socket.attach_filter(&[nothing])?;
        socket.set_nonblocking(true)?;
        // All data sockets of a comm have one address here.
        socket.set_reuse_address(true)?;
        match socket.bind(&self.here.into()) {
            // A UDP socket of another program has the port. The receive manager then keeps a rule that no connection uses.
            Err(e) if e.kind() == ErrorKind::AddrInUse => socket.bind(&SocketAddr::new(self.here.ip(), 0).into())?,
            result => result?,
        }
        // No connection has one address at both of its ends, so no rule is that of a socket whose peer is unknown.
        socket.connect(&self.there.unwrap_or(self.here).into())?;
        self.stand_in = Some(socket);
        Ok(())
    }

    /// Puts the stand-in where the socket was.
    fn replace(&mut self) -> Result<()> {
        self.make_stand_in()?;
        let Some(stand_in) = self.stand_in.take().filter(|_| self.is_open()) else { return Ok(()) };
        // SAFETY: the number is the plugin's, which closes it; what it was is closed here, and its user finds a socket in its place.
        if unsafe { libc::dup3(stand_in.as_raw_fd(), self.fd, libc::O_CLOEXEC) } < 0 {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    /// Bytes of memory that packets in the interface's queue still take.
    fn queued(&self) -> u32 {
        let mut memory = [0u32; 9];
        let mut size = size_of_val(&memory) as libc::socklen_t;
        // SAFETY: as many bytes as are told.
        let result = unsafe { libc::getsockopt(self.fd, libc::SOL_SOCKET, SO_MEMINFO, memory.as_mut_ptr().cast(), &mut size) };
        if result == 0 {
            memory[libc::SK_MEMINFO_WMEM_ALLOC as usize]
        } else {
            0
        }
    }

    fn reset(&self) -> Result<()> {
        // SAFETY: plain data for which zeros are valid.
        let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
        nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
        // SAFETY: an address and its size; the descriptor is the plugin's, which finds a connection that was reset.
        if unsafe { libc::connect(self.fd, &nowhere, size_of::<libc::sockaddr>() as libc::socklen_t) } < 0 {
            return Err(Error::last_os_error());
        }
        Ok(())
    }
}

/// Connections of this process that have one address at one of their ends.
#[derive(Default)]
pub(super) struct Sockets {
    found: Vec<Found>,
    /// So many more there should have been.
    missing: usize,
}

/// A scope or a flow label is no part of what a plugin's handle names.
fn same(a: SocketAddr, b: SocketAddr) -> bool {
    (a.ip(), a.port()) == (b.ip(), b.port())
}

impl Sockets {
    /// Those of which the end that `ask` asks for is `address`.
    fn with(address: SocketAddr, ask: fn(&Socket) -> Result<SockAddr>) -> Sockets {
        let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") else { return Sockets::default() };
        let numbers = descriptors.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
        let is = |fd: &RawFd| {
            // SAFETY: only asked for an address, and not kept; what is no socket answers with an error.
            let borrowed = unsafe { BorrowedFd::borrow_raw(*fd) };
            ask(&SockRef::from(&borrowed)).ok().and_then(|found| found.as_socket()).is_some_and(|found| same(found, address))
        };
        Sockets { found: numbers.filter(is).filter_map(Found::look).collect(), missing: 0 }
    }

    /// Those that are connected to this address now.
    pub(super) fn connected_to(there: SocketAddr) -> Sockets {
        Sockets::with(there, Socket::peer_addr)
    }

    /// Those that have this address at their own end, reset or not.
    pub(super) fn at(here: SocketAddr) -> Sockets {
        Sockets::with(here, Socket::local_addr)
    }

    /// Without those that were there before: what the peer's handle names may be an address to which the application is connected, and a
    /// port may be listened at again while connections of earlier comms live.
    pub(super) fn since(mut self, before: &Sockets) -> Sockets {
        self.found.retain(|found| !before.found.iter().any(|old| old.cookie == found.cookie));
        self
    }

    /// Makes the stand-ins for a comm of so many data sockets. What fails now is tried again at the close.
    pub(super) fn make_stand_ins(&mut self, count: usize) {
        self.missing = count.saturating_sub(self.found.len());
        for found in &mut self.found {
            if let Err(e) = found.make_stand_in() {
                log::debug!("no stand-in for the socket at {}: {e}", found.here);
            }
        }
    }

    /// Puts the stand-ins in the sockets' places. An error, in words: the comm must not be closed.
    pub(super) fn replace(&mut self) -> std::result::Result<(), String> {
        if self.missing > 0 {
            return Err(format!("{} of its data sockets were not found", self.missing));
        }
        for found in &mut self.found {
            found.replace().map_err(|e| format!("its data socket at {} has no stand-in: {e}", found.here))?;
        }
        Ok(())
    }

    /// Resets them: the kernel drops what it still has to send, or to send again. When this returns nothing leaves any more.
    pub(super) fn reset(&self) {
        let open = || self.found.iter().filter(|found| found.is_open());
        for found in open() {
            if let Err(e) = found.reset() {
                log::warn!("a data socket of a channel at {} may still send: {e}", found.here);
            }
        }
        let until = Instant::now() + LEAVES_WITHIN;
        while let Some(found) = open().find(|found| found.queued() > 0) {
            if Instant::now() > until {
                log::warn!(
                    "the interface with {} holds up what a channel has sent; it may leave after the channel's close",
                    found.here.ip()
                );
                break;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::OwnedFd;

    fn pair(address: &str) -> (TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).expect("listener");
        let here = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let there = listener.accept().expect("accept").0;
        (listener, here, there)
    }

    fn numbers(sockets: &Sockets) -> Vec<RawFd> {
        sockets.found.iter().map(|found| found.fd).collect()
    }

    fn reset_by_its_peer(socket: TcpStream) {
        SockRef::from(&socket).set_linger(Some(Duration::ZERO)).expect("linger");
        drop(socket);
    }

    fn wait_for_the_reset(socket: &mut TcpStream) {
        assert_eq!(socket.read(&mut [0]).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
        assert!(socket.peer_addr().is_err());
    }

    #[test]
    fn a_socket_that_is_reset_sends_no_more() {
        let (listener, mut kept, mut beside) = pair("127.0.0.1:0");
        let address = listener.local_addr().expect("address");
        let before = Sockets::connected_to(address);
        assert_eq!(numbers(&before), [kept.as_raw_fd()], "not the accepted one");
        let (mut reset, mut there) = (TcpStream::connect(address).expect("connect"), listener.accept().expect("accept").0);
        let found = Sockets::connected_to(address).since(&before);
        assert_eq!(numbers(&found), [reset.as_raw_fd()]);
        // More than both kernels' buffers hold. A copy, as in a child, keeps nothing alive.
        reset.set_nonblocking(true).expect("nonblocking");
        while reset.write(&[7; 65536]).is_ok() {}
        kept.write_all(b"all of it").expect("write");
        let copy = reset.try_clone().expect("copy");
        found.reset();
        drop((reset, kept));
        let mut bytes = Vec::new();
        assert_eq!(there.read_to_end(&mut bytes).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
        bytes.clear();
        assert_eq!(beside.read_to_end(&mut bytes).map_err(|e| e.kind()), Ok(9));
        drop(copy);
    }

    #[test]
    fn a_number_that_is_anothers_by_now_is_left_alone() {
        let (listener, mut here, mut there) = pair("127.0.0.1:0");
        let mut found = Sockets::connected_to(listener.local_addr().expect("address"));
        found.make_stand_ins(1);
        found.found[0].cookie += 1;
        found.reset();
        assert_eq!(found.replace(), Ok(()));
        here.write_all(b"12").expect("write");
        drop(here);
        let mut bytes = Vec::new();
        assert_eq!(there.read_to_end(&mut bytes).map_err(|e| e.kind()), Ok(2));
    }

    #[test]
    fn a_stand_in_names_both_ends_whatever_became_of_the_socket() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (listener, peer, mut socket) = pair(address);
            let here = listener.local_addr().expect("address");
            let second = (TcpStream::connect(here).expect("connect"), listener.accept().expect("accept").0);
            let ends = [&socket, &second.1].map(|s| (s.peer_addr().expect("peer"), s.local_addr().expect("address")));
            let mut found = Sockets::at(here);
            // The listening one has the address too.
            let listening = Sockets { found: vec![Found::look(listener.as_raw_fd()).expect("listener")], missing: 0 };
            found = found.since(&listening);
            assert_eq!(found.found.len(), 2, "{address}");
            found.make_stand_ins(2);
            reset_by_its_peer(peer);
            wait_for_the_reset(&mut socket);
            assert_eq!(found.replace(), Ok(()));
            for (socket, ends) in [&socket, &second.1].into_iter().zip(ends) {
                assert_eq!((socket.peer_addr().expect("peer"), socket.local_addr().expect("address")), ends);
                // SAFETY: this process' own descriptor.
                let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFD) };
                assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
            }
            // The connection went with the number.
            assert_eq!((&second.0).read(&mut [0]).map_err(|e| e.kind()), Ok(0));
        }
    }

    #[test]
    fn nothing_arrives_at_a_stand_in() {
        let (listener, peer, socket) = pair("127.0.0.1:0");
        let from = UdpSocket::bind(peer.local_addr().expect("address")).expect("the peer's port");
        let mut found = Sockets::at(listener.local_addr().expect("address"));
        found.found.retain(|found| found.fd == socket.as_raw_fd());
        found.make_stand_ins(1);
        assert_eq!(found.replace(), Ok(()));
        from.connect(listener.local_addr().expect("address")).expect("connect");
        from.send(b"data?").expect("send");
        let at = UdpSocket::from(OwnedFd::from(socket));
        assert_eq!(at.recv(&mut [0; 16]).map_err(|e| e.kind()), Err(ErrorKind::WouldBlock));
        drop(peer);
    }

    #[test]
    fn a_socket_whose_peer_is_unknown_names_itself() {
        let (listener, peer, mut socket) = pair("127.0.0.1:0");
        let here = listener.local_addr().expect("address");
        reset_by_its_peer(peer);
        wait_for_the_reset(&mut socket);
        let mut found = Sockets::at(here);
        found.found.retain(|found| found.fd != listener.as_raw_fd());
        assert_eq!(numbers(&found), [socket.as_raw_fd()]);
        found.make_stand_ins(1);
        assert_eq!(found.replace(), Ok(()));
        assert_eq!(socket.peer_addr().expect("peer"), here);
    }

    #[test]
    fn a_udp_socket_of_another_program_on_the_port_changes_no_more_than_the_rule() {
        let (listener, peer, socket) = pair("127.0.0.1:0");
        let here = listener.local_addr().expect("address");
        let other = UdpSocket::bind(("0.0.0.0", here.port())).expect("port");
        let mut found = Sockets::at(here);
        found.found.retain(|found| found.fd == socket.as_raw_fd());
        found.make_stand_ins(1);
        assert_eq!(found.replace(), Ok(()));
        assert_eq!(socket.peer_addr().expect("peer"), peer.local_addr().expect("address"));
        assert_eq!(socket.local_addr().expect("address").ip(), here.ip());
        drop(other);
    }

    #[test]
    fn a_comm_whose_sockets_are_not_all_known_says_so() {
        let (listener, _peer, _socket) = pair("127.0.0.1:0");
        let mut found = Sockets::connected_to(listener.local_addr().expect("address"));
        found.make_stand_ins(2);
        assert_eq!(found.replace(), Err("1 of its data sockets were not found".to_owned()));
    }
}
