//! Asks the agent to steer what it must not: `agent_liar SOCKET NIC`. tests/vm runs it in another network namespace than the agent's.

use devmem::agent::Agent;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

fn dmabuf(len: usize) -> std::io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        file: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    let device = std::fs::File::options().read(true).write(true).open("/dev/udmabuf")?;
    // SAFETY: system calls on descriptors of ours.
    unsafe {
        let file = libc::memfd_create(c"area".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(
            file >= 0 && libc::ftruncate(file, len as i64) == 0 && libc::fcntl(file, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) == 0
        );
        let create = Create { file: file as u32, flags: 1, offset: 0, size: len as u64 };
        match libc::ioctl(device.as_raw_fd(), 0x4018_7542, &create) {
            fd @ 0.. => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

fn main() -> std::io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, nic] = &words[..] else { panic!("usage: agent_liar SOCKET NIC") };
    let mut agent = Agent::connect(Path::new(socket))?;
    let file: OwnedFd = std::fs::File::open("/dev/null")?.into();
    println!("no dma-buf: {}", agent.bind(nic, file.as_fd()).expect_err("bound what is no dma-buf"));
    // A refused binding ends its client, and the kernel is asked for this user's next one a second later.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let mut agent = Agent::connect(Path::new(socket))?;
    agent.bind(nic, dmabuf(4 << 20)?.as_fd()).expect("binds a dma-buf");
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let connection = TcpStream::connect(listener.local_addr()?)?;
    println!("another namespace: {}", agent.steer(connection.as_fd()).expect_err("steered a connection of another namespace"));
    println!("a listener: {}", agent.steer(listener.as_fd()).expect_err("steered a listener"));
    println!("no TCP: {}", agent.steer(UdpSocket::bind("127.0.0.1:0")?.as_fd()).expect_err("steered UDP"));
    println!("no socket: {}", agent.steer(file.as_fd()).expect_err("steered a file"));
    println!("refused all");
    Ok(())
}
