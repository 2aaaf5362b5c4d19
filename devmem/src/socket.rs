//! The system calls on a connection: receiving, giving back, sending.

use crate::control::{pieces, Piece, PIECE_SPACE};
use crate::tokens::Tokens;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const GIVE_BACK: i32 = 80;
const FROM_DEVICE: i32 = 79;
const RECEIVE_DEVICE: i32 = 0x0200_0000;
const ORIGIN_ZEROCOPY: u8 = 5;
/// What a call of `receive` has taken off the connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// The peer has ended.
    End,
    /// So many bytes in the buffer: they did not pass the bound queue, or were not split.
    Plain(usize),
    /// These, in this order. Linear ones lie in the buffer.
    Pieces(Vec<Piece>),
}

/// Takes the next bytes off a connection, at most as many as the buffer is long, and at most `most` pieces. Does not block.
pub fn receive(connection: BorrowedFd<'_>, buffer: &mut [u8], most: usize) -> io::Result<Received> {
    let mut control = vec![0u64; most.max(1) * PIECE_SPACE / 8];
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zeros is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len() * 8;
    // SAFETY: buffer and control are exclusively ours during the call, and as long as the message says.
    let length = returned(unsafe { libc::recvmsg(connection.as_raw_fd(), &mut message, RECEIVE_DEVICE | libc::MSG_DONTWAIT) })?;
    // SAFETY: the kernel has filled this part of control.
    let control =
        unsafe { std::slice::from_raw_parts(control.as_ptr().cast::<u8>(), message.msg_controllen.min(control.len() * 8)) };
    let pieces = pieces(control).collect::<Result<Vec<_>, _>>().map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(match length {
        0 => Received::End,
        _ if pieces.is_empty() => Received::Plain(length),
        _ => Received::Pieces(pieces),
    })
}

/// Gives fragments back to the NIC, by the connection that they arrived on. An error leaves the rest waiting.
pub fn give_back(connection: BorrowedFd<'_>, tokens: &mut Tokens) -> io::Result<()> {
    while !tokens.is_empty() {
        let (ranges, count) = tokens.take();
        let size = std::mem::size_of_val(ranges.as_slice());
        // SAFETY: the ranges have the kernel's layout and are read during the call.
        let freed =
            unsafe { libc::setsockopt(connection.as_raw_fd(), libc::SOL_SOCKET, GIVE_BACK, ranges.as_ptr().cast(), size as u32) };
        if returned(freed as isize)? != count {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(())
}

/// Sends bytes of a dma-buf, by the number of its binding: how many the kernel took. They must not change until `completed` counts this call. The connection needs SO_ZEROCOPY.
pub fn send(connection: BorrowedFd<'_>, binding: u32, offset: usize, length: usize) -> io::Result<usize> {
    // SAFETY: these compute sizes.
    let (space, filled) = unsafe { (libc::CMSG_SPACE(4) as usize, libc::CMSG_LEN(4) as usize) };
    let mut control = [0u64; 4];
    // An offset stands in the place of an address.
    let mut vector = libc::iovec { iov_base: std::ptr::without_provenance_mut(offset), iov_len: length };
    // SAFETY: all zeros is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space;
    // SAFETY: control is aligned and has room for one message of four bytes.
    unsafe {
        let head = libc::CMSG_FIRSTHDR(&message);
        (*head).cmsg_level = libc::SOL_SOCKET;
        (*head).cmsg_type = FROM_DEVICE;
        (*head).cmsg_len = filled as _;
        libc::CMSG_DATA(head).cast::<u32>().write_unaligned(binding);
    }
    // SAFETY: the message and what it points to are read during the call; the kernel takes the offset as a place in the dma-buf.
    returned(unsafe {
        libc::sendmsg(connection.as_raw_fd(), &message, libc::MSG_ZEROCOPY | libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    })
}

/// How many calls of `send` on the connection are complete, of which `before` were known. Calls complete in order.
pub fn completed(connection: BorrowedFd<'_>, mut before: u32) -> io::Result<u32> {
    loop {
        let mut control = [0u64; 16];
        // SAFETY: all zeros is a message without anything.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = std::mem::size_of_val(&control);
        // SAFETY: control is exclusively ours during the call.
        match returned(unsafe { libc::recvmsg(connection.as_raw_fd(), &mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(before),
            other => other?,
        };
        // SAFETY: the kernel has filled control with one whole message, if any.
        let error = unsafe {
            let head = libc::CMSG_FIRSTHDR(&message);
            if head.is_null() {
                continue;
            }
            libc::CMSG_DATA(head).cast::<libc::sock_extended_err>().read_unaligned()
        };
        if error.ee_origin != ORIGIN_ZEROCOPY {
            return Err(io::Error::from_raw_os_error(error.ee_errno as i32));
        }
        // Numbers begin again after the largest.
        let ended = error.ee_data.wrapping_add(1);
        if ended.wrapping_sub(before) < 1 << 31 {
            before = ended;
        }
    }
}

pub(crate) fn returned(value: isize) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::Error::last_os_error())
}
