//! The data sockets inside a plugin: found once a comm is up, and prepared for its close. Knows nothing of comms.
//!
//! Closing a comm of GPUDirect-TCPX has two requirements, which this file ensures.
//!
//! 1. **No byte is sent from memory after its region was released.** The kernel sends from the memory of a send until the peer
//!    has acknowledged it, even after a plain close. So a send comm that closes with sends in flight has its connections reset,
//!    and the kernel drops unsent data (`process::reset`). Packets already in the interface's queue are still sent, and their memory
//!    is read only then, so the close waits for them, where no lock of a connection is held.
//! 2. **No receive comm closes with a socket that was reset.** At the close the plugin removes the flow rule of each data socket.
//!    To do so it asks the socket for its peer's address, and ends the process if the socket has no peer. Resets cannot be
//!    prevented: the first rule causes them at the peer, and networks reset connections too, also between any check and the
//!    close. So every data socket gets a stand-in when its comm comes up: a UDP socket that is bound and connected to the same
//!    two addresses, and that no network can reset. It takes over the socket's descriptor number just before the close. The
//!    plugin then finds the peer's address and removes the right rule, and the connection's data in receive memory is freed with
//!    the connection. The stand-in is made early because later there may be neither descriptors nor a route to the peer. A comm
//!    with a socket without a stand-in stays open: that leaks memory, but keeps the process alive.

use process::TcpInfo;
use socket2::{Domain, Protocol, SockAddr, SockFilter, SockRef, Socket, Type};
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// From the kernel's socket.h: a socket's memory use.
const SO_MEMINFO: libc::c_int = 55;

/// How long a close waits for the interface's queue. It takes a few milliseconds on links of 100 Mbit/s and more.
const LEAVES_WITHIN: Duration = Duration::from_secs(1);

/// What the network has of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// Bytes that the peer has acknowledged.
    pub acknowledged: u64,
    /// Bytes that have come in.
    pub received: u64,
    /// An acknowledgement is due.
    pub unanswered: bool,
    /// How long the network was busy with what is acknowledged, on average for each connection.
    pub busy: Duration,
}

/// A connection of this process, in the state in which it was found.
struct Found {
    fd: RawFd,
    /// Distinguishes the socket from a later one with the same number.
    cookie: u64,
    here: SocketAddr,
    /// `None` if it was already reset.
    there: Option<SocketAddr>,
    stand_in: Option<Socket>,
}

impl Found {
    /// The TCP socket with this number, if any.
    fn look(fd: RawFd) -> Option<Found> {
        // SAFETY: only queried, and not kept; other files give an error.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let socket = SockRef::from(&borrowed);
        let here = socket.local_addr().ok()?.as_socket()?;
        if socket.protocol().ok()? != Some(Protocol::TCP) {
            return None;
        }
        let there = socket.peer_addr().ok().and_then(|address| address.as_socket());
        Some(Found { fd, cookie: socket.cookie().ok()?, here, there, stand_in: None })
    }

    /// Whether the number still belongs to it: the plugin may have closed it.
    fn is_open(&self) -> bool {
        Found::look(self.fd).is_some_and(|now| now.cookie == self.cookie)
    }

    fn make_stand_in(&mut self) -> Result<()> {
        if self.stand_in.is_some() {
            return Ok(());
        }
        let socket = Socket::new(Domain::for_address(self.here), Type::DGRAM, Some(Protocol::UDP))?;
        // The plugin's threads may still read from the number and would take any bytes for data, so nothing may arrive.
        let nothing = SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
        socket.attach_filter(&[nothing])?;
        socket.set_nonblocking(true)?;
        // All data sockets of a comm have the same local address.
        socket.set_reuse_address(true)?;
        match socket.bind(&self.here.into()) {
            // Another program's UDP socket has the port. The receive manager then keeps a rule that no connection uses.
            Err(e) if e.kind() == ErrorKind::AddrInUse => socket.bind(&SocketAddr::new(self.here.ip(), 0).into())?,
            result => result?,
        }
        // No connection has the same address at both ends, so the pair of a socket with an unknown peer matches no rule.
        socket.connect(&self.there.unwrap_or(self.here).into())?;
        self.stand_in = Some(socket);
        Ok(())
    }

    /// Replaces the socket by the stand-in.
    fn replace(&mut self) -> Result<()> {
        self.make_stand_in()?;
        let Some(stand_in) = self.stand_in.take().filter(|_| self.is_open()) else { return Ok(()) };
        // SAFETY: the plugin owns and closes the number; dup3 closes the old socket, and users of the number find the stand-in.
        if unsafe { libc::dup3(stand_in.as_raw_fd(), self.fd, libc::O_CLOEXEC) } < 0 {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    /// For how long the peer has not answered, though packets were sent again.
    fn silent(&self) -> Option<Duration> {
        let info = TcpInfo::of(self.fd)?;
        info.received()?;
        (info.retries() > 0 && info.unanswered() > 0).then(|| info.since_answer())
    }

    /// `None` where the kernel cannot say. An error if the connection was reset: nothing moves.
    fn moved(&self) -> Result<Option<Moved>> {
        let Some(info) = TcpInfo::of(self.fd) else { return Ok(None) };
        let (Some(acknowledged), Some(received)) = (info.acknowledged(), info.received()) else { return Ok(None) };
        if info.is_closed() {
            return Err(ErrorKind::ConnectionReset.into());
        }
        let busy = info.busy().zip(info.window_limited()).map_or(Duration::ZERO, |(busy, limited)| busy.saturating_sub(limited));
        Ok(Some(Moved { acknowledged, received, unanswered: info.unanswered() > 0, busy }))
    }

    /// Bytes of memory of packets in the interface's queue.
    fn queued(&self) -> u32 {
        let mut memory = [0u32; 9];
        let mut size = size_of_val(&memory) as libc::socklen_t;
        // SAFETY: a buffer of the given length.
        let result = unsafe { libc::getsockopt(self.fd, libc::SOL_SOCKET, SO_MEMINFO, memory.as_mut_ptr().cast(), &mut size) };
        if result == 0 {
            memory[libc::SK_MEMINFO_WMEM_ALLOC as usize]
        } else {
            0
        }
    }

    fn reset(&self) -> Result<()> {
        // SAFETY: open, as its callers have found; the descriptor is the plugin's, which then meets a reset connection.
        process::reset(unsafe { BorrowedFd::borrow_raw(self.fd) })
    }
}

/// Connections of this process that have a given address at one end.
#[derive(Default)]
pub(super) struct Sockets {
    found: Vec<Found>,
    /// How many expected sockets were not found.
    missing: usize,
    /// They were reset, and packets of theirs may still be in an interface's queue.
    leaving: bool,
}

/// Compares IP and port only: a plugin's handle has no scope or flow label.
fn same(a: SocketAddr, b: SocketAddr) -> bool {
    (a.ip(), a.port()) == (b.ip(), b.port())
}

impl Sockets {
    /// The connections for which `ask` returns one of the addresses.
    fn with(addresses: &[SocketAddr], ask: fn(&Socket) -> Result<SockAddr>) -> Sockets {
        let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") else { return Sockets::default() };
        let numbers = descriptors.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
        let is = |fd: &RawFd| {
            // SAFETY: only queried for an address, and not kept; other files give an error.
            let borrowed = unsafe { BorrowedFd::borrow_raw(*fd) };
            let found = ask(&SockRef::from(&borrowed)).ok().and_then(|found| found.as_socket());
            found.is_some_and(|found| addresses.iter().any(|&address| same(found, address)))
        };
        Sockets { found: numbers.filter(is).filter_map(Found::look).collect(), ..Sockets::default() }
    }

    /// The connections to one of these addresses.
    pub(super) fn connected_to(there: &[SocketAddr]) -> Sockets {
        Sockets::with(there, Socket::peer_addr)
    }

    /// The connections with one of these local addresses, reset or not, and sockets that listen there.
    pub(super) fn at(here: &[SocketAddr]) -> Sockets {
        Sockets::with(here, Socket::local_addr)
    }

    /// Closes them.
    ///
    /// # Safety
    /// Nothing uses their numbers.
    pub(super) unsafe fn close(self) {
        for found in self.found.iter().filter(|found| found.is_open()) {
            // SAFETY: by the caller's contract.
            drop(unsafe { OwnedFd::from_raw_fd(found.fd) });
        }
    }

    /// Removes those that existed before. The application may be connected to the address in the peer's handle, and a port may be
    /// reused for listening while connections of earlier comms live.
    pub(super) fn since(mut self, before: &Sockets) -> Sockets {
        self.found.retain(|found| !before.found.iter().any(|old| old.cookie == found.cookie));
        self
    }

    /// Makes the stand-ins for a comm with `count` data sockets. Failures are retried at the close.
    pub(super) fn make_stand_ins(&mut self, count: usize) {
        self.missing = count.saturating_sub(self.found.len());
        for found in &mut self.found {
            if let Err(e) = found.make_stand_in() {
                log::debug!("no stand-in for the socket at {}: {e}", found.here);
            }
        }
    }

    /// Replaces the sockets by their stand-ins. An error means that the comm must not be closed.
    pub(super) fn replace(&mut self) -> std::result::Result<(), String> {
        if self.missing > 0 {
            return Err(format!("{} of its data sockets were not found", self.missing));
        }
        for found in &mut self.found {
            found.replace().map_err(|e| format!("its data socket at {} has no stand-in: {e}", found.here))?;
        }
        Ok(())
    }

    /// What all of them have moved; `None` where that is unknown.
    ///
    /// # Errors
    /// One of them was reset. Not every plugin says so: a receive of GPUDirect-TCPX waits for ever.
    pub(super) fn moved(&self) -> Result<Option<Moved>> {
        if self.missing > 0 || self.found.is_empty() {
            return Ok(None);
        }
        let mut sum = Moved::default();
        for found in &self.found {
            let Some(moved) = (if found.is_open() { found.moved()? } else { None }) else { return Ok(None) };
            sum.acknowledged += moved.acknowledged;
            sum.received += moved.received;
            sum.unanswered |= moved.unanswered;
            sum.busy += moved.busy / self.found.len() as u32;
        }
        Ok(Some(sum))
    }

    /// For how long a peer has not answered on one of them, though it should.
    pub(super) fn silent(&self) -> Option<Duration> {
        self.found.iter().filter(|found| found.is_open()).filter_map(Found::silent).max()
    }

    /// Resets the connections: the kernel drops unsent and unacknowledged data, but what [`Sockets::leave`] waits for.
    pub(super) fn reset(&mut self) {
        self.leaving = true;
        for found in self.found.iter().filter(|found| found.is_open()) {
            if let Err(e) = found.reset() {
                log::warn!("a data socket of a channel at {} may still send: {e}", found.here);
            }
        }
    }

    /// Waits until packets of connections that were reset have left the interface's queue. Nothing more is sent after this returns.
    pub(super) fn leave(&self) {
        let open = || self.found.iter().filter(|found| found.is_open());
        let until = Instant::now() + LEAVES_WITHIN;
        while let Some(found) = open().filter(|_| self.leaving).find(|found| found.queued() > 0) {
            if Instant::now() > until {
                log::warn!(
                    "the interface with {} still queues data of a channel, which may be sent after the channel's close",
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
        let before = Sockets::connected_to(&[address]);
        assert_eq!(numbers(&before), [kept.as_raw_fd()], "not the accepted one");
        let (mut reset, mut there) = (TcpStream::connect(address).expect("connect"), listener.accept().expect("accept").0);
        let mut found = Sockets::connected_to(&[address]).since(&before);
        assert_eq!(numbers(&found), [reset.as_raw_fd()]);
        // More than both kernels' buffers hold. A copy of the descriptor, as in a child, does not keep the connection alive.
        reset.set_nonblocking(true).expect("nonblocking");
        while reset.write(&[7; 65536]).is_ok() {}
        kept.write_all(b"all of it").expect("write");
        let copy = reset.try_clone().expect("copy");
        found.reset();
        found.leave();
        drop((reset, kept));
        let mut bytes = Vec::new();
        assert_eq!(there.read_to_end(&mut bytes).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
        bytes.clear();
        assert_eq!(beside.read_to_end(&mut bytes).map_err(|e| e.kind()), Ok(9));
        drop(copy);
    }

    #[test]
    fn a_reset_is_noticed_though_no_call_says_so() {
        let (listener, mut peer, mut socket) = pair("127.0.0.1:0");
        let mut found = Sockets::at(&[listener.local_addr().expect("address")]);
        found.found.retain(|found| found.fd == socket.as_raw_fd());
        assert_eq!(found.moved().expect("open"), Some(Moved::default()));
        peer.write_all(b"123").expect("write");
        socket.read_exact(&mut [0; 3]).expect("read");
        assert_eq!(found.moved().expect("open"), Some(Moved { received: 3, ..Moved::default() }));
        reset_by_its_peer(peer);
        wait_for_the_reset(&mut socket);
        assert_eq!(found.moved().map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
        found.missing = 1;
        assert_eq!(found.moved().expect("unknown"), None);
    }

    #[test]
    fn a_reused_descriptor_number_is_left_alone() {
        let (listener, mut here, mut there) = pair("127.0.0.1:0");
        let mut found = Sockets::connected_to(&[listener.local_addr().expect("address")]);
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
    fn a_stand_in_has_both_addresses_whatever_happened_to_the_socket() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (listener, peer, mut socket) = pair(address);
            let here = listener.local_addr().expect("address");
            let second = (TcpStream::connect(here).expect("connect"), listener.accept().expect("accept").0);
            let ends = [&socket, &second.1].map(|s| (s.peer_addr().expect("peer"), s.local_addr().expect("address")));
            let mut found = Sockets::at(&[here]);
            // The listening socket has the address too.
            let listening = Sockets { found: vec![Found::look(listener.as_raw_fd()).expect("listener")], ..Sockets::default() };
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
            // The connection was closed with the number.
            assert_eq!((&second.0).read(&mut [0]).map_err(|e| e.kind()), Ok(0));
        }
    }

    #[test]
    fn nothing_arrives_at_a_stand_in() {
        let (listener, peer, socket) = pair("127.0.0.1:0");
        let from = UdpSocket::bind(peer.local_addr().expect("address")).expect("the peer's port");
        let mut found = Sockets::at(&[listener.local_addr().expect("address")]);
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
        let mut found = Sockets::at(&[here]);
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
        let mut found = Sockets::at(&[here]);
        found.found.retain(|found| found.fd == socket.as_raw_fd());
        found.make_stand_ins(1);
        assert_eq!(found.replace(), Ok(()));
        assert_eq!(socket.peer_addr().expect("peer"), peer.local_addr().expect("address"));
        assert_eq!(socket.local_addr().expect("address").ip(), here.ip());
        drop(other);
    }

    #[test]
    fn a_comm_with_missing_sockets_reports_it() {
        let (listener, _peer, _socket) = pair("127.0.0.1:0");
        let mut found = Sockets::connected_to(&[listener.local_addr().expect("address")]);
        found.make_stand_ins(2);
        assert_eq!(found.replace(), Err("1 of its data sockets were not found".to_owned()));
    }
}
