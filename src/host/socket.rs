//! Unix sockets that carry messages with descriptors between two processes of a host; nothing blocks. Knows nothing of what the
//! messages say.

use crate::status::{bail, Error, Result};
use std::io::{Error as Io, ErrorKind as Kind};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of a message at most.
pub(crate) const MAX_MESSAGE: usize = 4096;
/// Descriptors of a message at most; the kernel closes what comes beyond its room.
const MAX_FDS: usize = 2;
const CONTROL: usize = 64;
/// Processes that may wait to be let in.
const BACKLOG: libc::c_int = 8;

/// Names a listening socket: random.
pub(crate) type Name = [u8; 16];

/// Who is at the other end, as the kernel saw it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Who {
    /// Its process, 0 where this process cannot see it.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
}

/// Where a name is found.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// Among the names of the network namespace.
    Abstract,
    /// In a directory.
    Directory(&'a Path),
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            0 => f.write_str("a process of another PID namespace"),
            pid => write!(f, "process {pid}"),
        }
    }
}

fn hex(name: &Name) -> String {
    name.iter().map(|b| format!("{b:02x}")).collect()
}

fn path(directory: &Path, name: &Name) -> PathBuf {
    directory.join(format!("uccl-p2p-{}", hex(name)))
}

fn address(name: &Name, place: Place<'_>) -> Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: plain data, for which zeros are valid.
    let mut un: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    un.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = match place {
        Place::Abstract => format!("\0uccl-p2p-{}", hex(name)).into_bytes(),
        Place::Directory(directory) => path(directory, name).as_os_str().as_bytes().to_vec(),
    };
    if bytes.len() >= un.sun_path.len() {
        bail!(InvalidArgument, "the path of the directory for local sockets is too long");
    }
    un.sun_path.iter_mut().zip(&bytes).for_each(|(to, &from)| *to = from as libc::c_char);
    let front = std::mem::offset_of!(libc::sockaddr_un, sun_path);
    Ok((un, (front + bytes.len()) as libc::socklen_t))
}

fn fresh() -> Result<OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: a plain system call, whose result is fresh.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(Error::system("a Unix socket", &Io::last_os_error()));
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A socket that waits for one peer.
pub(crate) struct Listener {
    fd: OwnedFd,
    /// Removed at the end.
    file: Option<PathBuf>,
}

impl Listener {
    pub(crate) fn open(name: &Name, place: Place<'_>) -> Result<Listener> {
        let fd = fresh()?;
        let (un, len) = address(name, place)?;
        // SAFETY: a complete address of this length.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const un).cast(), len) } != 0 {
            return Err(Error::system("the name of a Unix socket", &Io::last_os_error()));
        }
        let file = match place {
            Place::Directory(directory) => Some(path(directory, name)),
            Place::Abstract => None,
        };
        let listener = Listener { fd, file };
        // SAFETY: a plain system call.
        if unsafe { libc::listen(listener.fd.as_raw_fd(), BACKLOG) } != 0 {
            return Err(Error::system("a listening Unix socket", &Io::last_os_error()));
        }
        Ok(listener)
    }

    /// Takes the next connection; `None` when none waits.
    pub(crate) fn accept(&self) -> Option<Socket> {
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no address is asked for; the result is fresh.
        let fd = unsafe { libc::accept4(self.fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
        // SAFETY: as above.
        (fd >= 0).then(|| Socket(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// What came.
#[derive(Debug)]
pub(crate) enum Received {
    /// A message of so many bytes, at the front of the buffer, and its descriptors.
    Message(usize, Vec<OwnedFd>),
    /// The same without its descriptors: this process may have no more.
    Cut(usize),
    /// Nothing now.
    Nothing,
    /// The peer is gone.
    End,
}

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    /// Connects to a name; `None` when it has to be tried again.
    pub(crate) fn connect(name: &Name, place: Place<'_>) -> Result<Option<Socket>> {
        let fd = fresh()?;
        let (un, len) = address(name, place)?;
        // SAFETY: a complete address of this length.
        if unsafe { libc::connect(fd.as_raw_fd(), (&raw const un).cast(), len) } == 0 {
            return Ok(Some(Socket(fd)));
        }
        let error = Io::last_os_error();
        match error.kind() {
            Kind::WouldBlock | Kind::Interrupted => Ok(None),
            _ => Err(Error::system("connecting to the peer's Unix socket", &error)),
        }
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Who is at the other end.
    pub(crate) fn who(&self) -> Result<Who> {
        let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: a writable structure of this length.
        let failed =
            unsafe { libc::getsockopt(self.fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut found).cast(), &mut len) != 0 };
        if failed {
            return Err(Error::system("who is at the other end of a Unix socket", &Io::last_os_error()));
        }
        Ok(Who { pid: found.pid, uid: found.uid })
    }

    /// Sends a message; `false` when there is no room now.
    ///
    /// # Errors
    /// `RemoteDisconnect` when the peer is gone.
    pub(crate) fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<bool> {
        let mut control = [0u64; CONTROL / 8];
        let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: plain data, for which zeros are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        if let Some(fd) = fd {
            let raw = fd.as_raw_fd();
            message.msg_control = control.as_mut_ptr().cast();
            // SAFETY: the control buffer is aligned and has room for one descriptor.
            unsafe {
                message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
                let header = libc::CMSG_FIRSTHDR(&message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
                libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(raw);
            }
        }
        // SAFETY: everything the header refers to lives.
        let sent = unsafe { libc::sendmsg(self.fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        if sent >= 0 {
            return Ok(true);
        }
        let error = Io::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS) => Ok(false),
            _ => bail!(RemoteDisconnect, "the peer's process on this host is gone ({error})"),
        }
    }

    /// Takes the next message.
    ///
    /// # Errors
    /// `Protocol` for one that is too long or has too many descriptors.
    pub(crate) fn receive(&self, buffer: &mut [u8; MAX_MESSAGE]) -> Result<Received> {
        let mut control = [0u64; CONTROL / 8];
        let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: plain data, for which zeros are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: arithmetic only.
        message.msg_controllen = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as _;
        // SAFETY: everything the header refers to is writable and lives.
        let got = unsafe { libc::recvmsg(self.fd(), &mut message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
        if got < 0 {
            let error = Io::last_os_error();
            return match error.kind() {
                Kind::WouldBlock | Kind::Interrupted => Ok(Received::Nothing),
                _ => Ok(Received::End),
            };
        }
        let fds = descriptors(&message);
        let cut = message.msg_flags & libc::MSG_CTRUNC != 0;
        if message.msg_flags & libc::MSG_TRUNC != 0 || (cut && fds.len() >= MAX_FDS) {
            bail!(Protocol, "a message of the peer's process is too long");
        }
        match got {
            0 => Ok(Received::End),
            n if cut => Ok(Received::Cut(n as usize)),
            n => Ok(Received::Message(n as usize, fds)),
        }
    }
}

/// The descriptors that came with a message, each owned from here on.
fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled in the control buffer; each descriptor in it is ours alone.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = ((*header).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                fds.extend((0..bytes / size_of::<RawFd>()).map(|i| OwnedFd::from_raw_fd(data.add(i).read_unaligned())));
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    fds
}

/// Two sockets that are connected with each other.
#[cfg(test)]
pub(crate) fn pair() -> (Socket, Socket) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: room for two descriptors, which are fresh.
    unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        (Socket(OwnedFd::from_raw_fd(fds[0])), Socket(OwnedFd::from_raw_fd(fds[1])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn messages_and_descriptors_cross_under_either_kind_of_name() {
        let directory = std::env::temp_dir().join(format!("uccl-socket-test-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        for (place, name) in [(Place::Abstract, [1; 16]), (Place::Directory(&directory), [2; 16])] {
            let mut name: Name = name;
            name[..4].copy_from_slice(&std::process::id().to_le_bytes());
            let listener = Listener::open(&name, place).unwrap();
            assert!(listener.accept().is_none());
            let a = Socket::connect(&name, place).unwrap().unwrap();
            let b = listener.accept().unwrap();
            // SAFETY: plain system calls.
            let here = unsafe { Who { pid: libc::getpid(), uid: libc::geteuid() } };
            assert_eq!((a.who().unwrap(), b.who().unwrap()), (here, here));
            let file = super::super::shm::create(c"test", 4096).unwrap();
            assert!(a.send(b"hello", Some(file.as_fd())).unwrap());
            let mut buffer = [0; MAX_MESSAGE];
            match b.receive(&mut buffer).unwrap() {
                Received::Message(5, fds) if fds.len() == 1 => super::super::shm::check(fds[0].as_fd(), 4096).unwrap(),
                other => panic!("{other:?}"),
            }
            assert!(buffer.starts_with(b"hello"));
            assert!(matches!(b.receive(&mut buffer), Ok(Received::Nothing)));
            drop(a);
            assert!(matches!(b.receive(&mut buffer), Ok(Received::End)));
            assert!(b.send(b"x", None).is_err());
            drop(listener);
            assert!(Socket::connect(&name, place).is_err());
        }
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0, "names are removed");
        std::fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn a_flood_fills_the_socket_and_nothing_else() {
        let (a, b) = pair();
        let mut sent = 0;
        while a.send(&[7; 100], None).unwrap() {
            sent += 1;
            assert!(sent < 1_000_000);
        }
        let mut buffer = [0; MAX_MESSAGE];
        assert!(matches!(b.receive(&mut buffer), Ok(Received::Message(100, _))));
    }

    #[test]
    fn descriptors_beyond_the_room_are_closed() {
        let (a, b) = pair();
        let before = open_descriptors();
        let mut control = [0u64; 64];
        let mut iov = libc::iovec { iov_base: control.as_mut_ptr().cast(), iov_len: 1 };
        // SAFETY: as in send, with ten descriptors.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            (message.msg_iov, message.msg_iovlen) = (&mut iov, 1);
            let mut body = [0u64; 32];
            message.msg_control = body.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(40) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            ((*header).cmsg_level, (*header).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
            (*header).cmsg_len = libc::CMSG_LEN(40) as _;
            for i in 0..10 {
                libc::CMSG_DATA(header).cast::<RawFd>().add(i).write_unaligned(a.fd());
            }
            assert_eq!(libc::sendmsg(a.fd(), &message, 0), 1);
        }
        assert!(b.receive(&mut [0; MAX_MESSAGE]).is_err());
        // Other tests of this process open descriptors, too.
        let gone = || open_descriptors() <= before + 4;
        assert!((0..100).any(|_| gone() || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            false
        }));
    }
}
