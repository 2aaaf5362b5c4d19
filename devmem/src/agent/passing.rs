//! Datagrams on a Unix socket, with at most one descriptor each.

use crate::socket::returned;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Room for more descriptors than a message may have.
const DESCRIPTORS: usize = 8;

fn room() -> [u64; 8] {
    [0; 8]
}

/// Sends a datagram.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], with: Option<BorrowedFd<'_>>, flags: i32) -> io::Result<()> {
    let mut control = room();
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all zeros is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    if let Some(fd) = with {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: control is aligned and has room for one message of four bytes.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(4) as _;
            let head = libc::CMSG_FIRSTHDR(&message);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(head).cast::<i32>().write_unaligned(fd.as_raw_fd());
        }
    }
    // SAFETY: the message and what it points to are read during the call.
    returned(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags | libc::MSG_NOSIGNAL) }).map(drop)
}

/// A datagram that has come.
#[derive(Debug)]
pub(crate) struct Datagram {
    /// Its bytes; none at the end of the connection.
    pub len: usize,
    /// The descriptors that came with it.
    pub with: Vec<OwnedFd>,
    /// It was longer than the buffer.
    pub cut: bool,
    /// Descriptors are missing: more than there is room for, or this process can open no more.
    pub missing: bool,
}

/// Receives a datagram.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<Datagram> {
    let mut control = room();
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zeros is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = std::mem::size_of_val(&control) as _;
    // SAFETY: buffer and control are exclusively ours during the call.
    let len = returned(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags | libc::MSG_CMSG_CLOEXEC) })?;
    let mut with: Vec<OwnedFd> = Vec::with_capacity(DESCRIPTORS);
    // SAFETY: the kernel has filled control; each descriptor in it is new and ours.
    unsafe {
        let mut head = libc::CMSG_FIRSTHDR(&message);
        while !head.is_null() {
            if (*head).cmsg_level == libc::SOL_SOCKET && (*head).cmsg_type == libc::SCM_RIGHTS {
                let count = ((*head).cmsg_len as usize - libc::CMSG_LEN(0) as usize) / 4;
                let data = libc::CMSG_DATA(head).cast::<i32>();
                with.extend((0..count).map(|i| OwnedFd::from_raw_fd(data.add(i).read_unaligned())));
            }
            head = libc::CMSG_NXTHDR(&message, head);
        }
    }
    let has = |flag| message.msg_flags & flag != 0;
    Ok(Datagram { len, with, cut: has(libc::MSG_TRUNC), missing: has(libc::MSG_CTRUNC) })
}
