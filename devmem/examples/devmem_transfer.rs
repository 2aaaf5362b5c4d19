//! Receives into, or sends from, a udmabuf over a NIC, and compares every byte: `devmem_transfer receive NIC QUEUE PORT BYTES` and
//! `devmem_transfer send NIC ADDRESS:PORT BYTES`. tests/vm runs it; the bytes are those of tests/vm/devmem.c.

use devmem::{completed, give_back, receive, send, Binding, Calls, Piece, Received, Tokens};
use std::ffi::CString;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const AREA: usize = 8 << 20;
const CHUNK: usize = 128 << 10;
const PERIOD: usize = 1_048_573;

fn pattern() -> Vec<u8> {
    let mut state = 88_172_645_463_325_252u64;
    let once: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(PERIOD)
    .collect();
    once.repeat(2)
}

/// A dma-buf over a memory file, and its bytes, which live as long as the process.
fn area() -> io::Result<(OwnedFd, &'static mut [u8])> {
    #[repr(C)]
    struct Create {
        file: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    let device = std::fs::File::options().read(true).write(true).open("/dev/udmabuf")?;
    // SAFETY: system calls on descriptors of ours; the mapping is new, and nothing else refers to it.
    unsafe {
        let file = libc::memfd_create(c"area".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(
            file >= 0
                && libc::ftruncate(file, AREA as i64) == 0
                && libc::fcntl(file, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) == 0
        );
        let create = Create { file: file as u32, flags: 1, offset: 0, size: AREA as u64 };
        let dmabuf = libc::ioctl(device.as_raw_fd(), 0x4018_7542, &create);
        let bytes = libc::mmap(std::ptr::null_mut(), AREA, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file, 0);
        if dmabuf < 0 || bytes == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(dmabuf), std::slice::from_raw_parts_mut(bytes.cast(), AREA)))
    }
}

fn interface(nic: &str) -> u32 {
    let name = CString::new(nic).unwrap();
    // SAFETY: a string that ends in a zero byte.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

fn wait(stream: &TcpStream, events: i16) {
    let mut polled = libc::pollfd { fd: stream.as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry, ours.
    unsafe { libc::poll(&mut polled, 1, 1000) };
}

fn receiver(nic: &str, queue: u32, port: u16, total: usize) -> io::Result<()> {
    let (dmabuf, area) = area()?;
    let binding = Binding::receiving(interface(nic), queue, dmabuf.as_fd()).unwrap_or_else(|refused| {
        println!("refused: {}: {}", refused.error, refused.text.unwrap_or_default());
        std::process::exit(3);
    });
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("bound to queue {queue} of {nic}: binding {}", binding.id());
    let (stream, _) = listener.accept()?;
    let (pattern, mut buffer, mut tokens) = (pattern(), vec![0u8; 256 << 10], Tokens::default());
    let (mut position, mut device, mut linear, mut plain) = (0, 0, 0, 0);
    let check = |bytes: &[u8], position: &mut usize| {
        let from = *position % PERIOD;
        assert!(bytes == &pattern[from..from + bytes.len()], "stream 0: wrong bytes after {position}");
        *position += bytes.len();
    };
    loop {
        let received = match receive(stream.as_fd(), &mut buffer, 512) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(&stream, libc::POLLIN);
                continue;
            }
            received => received?,
        };
        match received {
            Received::End => break,
            Received::Plain(length) => {
                check(&buffer[..length], &mut position);
                plain += length;
            }
            Received::Pieces(pieces) => {
                let mut copied = 0;
                for piece in pieces {
                    match piece {
                        Piece::Linear(length) => {
                            check(&buffer[copied..][..length as usize], &mut position);
                            copied += length as usize;
                        }
                        Piece::Device(fragment) => {
                            assert_eq!(fragment.binding, binding.id());
                            check(&area[fragment.offset as usize..][..fragment.length as usize], &mut position);
                            device += fragment.length as usize;
                            tokens.add(fragment.token);
                        }
                    }
                }
                linear += copied;
                give_back(stream.as_fd(), &mut tokens)?;
            }
        }
    }
    assert_eq!(position, total);
    println!("stream 0: {position} bytes right: device {device}; linear {linear}; plain {plain}");
    Ok(())
}

fn sender(nic: &str, address: &str, total: usize) -> io::Result<()> {
    let (dmabuf, area) = area()?;
    let binding = Binding::sending(interface(nic), dmabuf.as_fd()).map_err(|refused| refused.error)?;
    let (stream, pattern, yes) = (TcpStream::connect(address)?, pattern(), 1i32);
    // SAFETY: the option is read during the call.
    unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, (&raw const yes).cast(), 4) };
    let (stride, mut calls, mut sent) = (CHUNK + 4096, Calls::default(), 0);
    let mut last = vec![0; AREA / stride];
    while sent < total {
        let slot = sent / CHUNK % last.len();
        while !calls.reached(last[slot]) {
            wait(&stream, 0);
            completed(stream.as_fd(), &mut calls)?;
        }
        // At odd places.
        let (begin, length) = (slot * stride + (slot * 613 + 7) % 4096, CHUNK.min(total - sent));
        area[begin..begin + length].copy_from_slice(&pattern[sent % PERIOD..][..length]);
        let mut put = 0;
        while put < length {
            match send(stream.as_fd(), binding.id(), begin + put, length - put) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&stream, libc::POLLOUT),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => completed(stream.as_fd(), &mut calls)?,
                taken => {
                    put += taken?;
                    calls.add();
                }
            }
        }
        last[slot] = calls.made();
        sent += length;
    }
    while !calls.all_ended() {
        wait(&stream, 0);
        completed(stream.as_fd(), &mut calls)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    wait(&stream, libc::POLLIN);
    println!("sent {sent} bytes in {} calls", calls.made());
    Ok(())
}

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse().expect("a number");
    match words[..] {
        ["receive", nic, queue, port, bytes] => receiver(nic, number(queue) as u32, number(port) as u16, number(bytes)),
        ["send", nic, address, bytes] => sender(nic, address, number(bytes)),
        _ => panic!("usage: devmem_transfer receive NIC QUEUE PORT BYTES | send NIC ADDRESS:PORT BYTES"),
    }
}
