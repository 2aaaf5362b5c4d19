//! The system calls on a connection: receiving, giving back, sending.

use crate::calls::Calls;
use crate::control::{pieces, Malformed, Piece, PIECE_SPACE};
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
    read(length, control).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// What a call that returned `length` has brought. Pieces must be as long together: otherwise bytes would be missing or come twice.
fn read(length: usize, control: &[u8]) -> Result<Received, Malformed> {
    let pieces = pieces(control).collect::<Result<Vec<_>, _>>()?;
    let sum = pieces.iter().try_fold(0usize, |sum, piece| sum.checked_add(piece.length()));
    match length {
        _ if !pieces.is_empty() && sum != Some(length) => Err(Malformed),
        0 => Ok(Received::End),
        _ if pieces.is_empty() => Ok(Received::Plain(length)),
        _ => Ok(Received::Pieces(pieces)),
    }
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

/// Sends bytes of a dma-buf, by the number of its binding: how many the kernel took. They must not change until
/// this call has ended by `completed`. The connection needs SO_ZEROCOPY.
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

/// Reads which calls of `send` on the connection have ended. They end in any order. The kernel may call some of them copied though they were
/// not, after the NIC was down: they have ended all the same.
pub fn completed(connection: BorrowedFd<'_>, calls: &mut Calls) -> io::Result<()> {
    while let Some(error) = next_completion(connection)? {
        if error.ee_origin != ORIGIN_ZEROCOPY {
            return Err(io::Error::from_raw_os_error(error.ee_errno as i32));
        }
        calls.end(error.ee_info, error.ee_data).map_err(|_| io::ErrorKind::InvalidData)?;
    }
    Ok(())
}

/// The next entry of the error queue.
fn next_completion(connection: BorrowedFd<'_>) -> io::Result<Option<libc::sock_extended_err>> {
    loop {
        let mut control = [0u64; 16];
        // SAFETY: all zeros is a message without anything.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = std::mem::size_of_val(&control);
        // SAFETY: control is exclusively ours during the call.
        match returned(unsafe { libc::recvmsg(connection.as_raw_fd(), &mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            other => other?,
        };
        // SAFETY: the kernel has filled control with one whole message, if any.
        unsafe {
            let head = libc::CMSG_FIRSTHDR(&message);
            if !head.is_null() {
                return Ok(Some(libc::CMSG_DATA(head).cast::<libc::sock_extended_err>().read_unaligned()));
            }
        }
    }
}

pub(crate) fn returned(value: isize) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Fragment;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    const CALLED_COPIED: u8 = 1;

    /// Sends without a copy where the kernel can, and waits for the completion.
    fn send_host_memory(connection: BorrowedFd<'_>, calls: &mut Calls) {
        static BYTES: [u8; 4096] = [1; 4096];
        let mut poll = libc::pollfd { fd: connection.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: the bytes and the entry outlive the calls.
        let (sent, ready) = unsafe {
            (libc::send(poll.fd, BYTES.as_ptr().cast(), BYTES.len(), libc::MSG_ZEROCOPY), libc::poll(&mut poll, 1, 10_000))
        };
        assert_eq!((sent, ready, poll.revents), (4096, 1, libc::POLLERR));
        calls.add();
    }

    /// The loopback interface copies every packet that was to be sent without a copy, and the kernel says so.
    #[test]
    fn a_call_that_the_kernel_says_it_copied_has_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _there = listener.accept().unwrap();
        let (connection, on, mut calls) = (here.as_fd(), 1i32, Calls::default());
        // SAFETY: an int of that size.
        let set =
            unsafe { libc::setsockopt(connection.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, (&raw const on).cast(), 4) };
        assert_eq!(set, 0);

        send_host_memory(connection, &mut calls);
        let first = next_completion(connection).unwrap().expect("a completion");
        assert_eq!((first.ee_origin, first.ee_code), (ORIGIN_ZEROCOPY, CALLED_COPIED));
        calls.end(first.ee_info, first.ee_data).unwrap();

        send_host_memory(connection, &mut calls);
        completed(connection, &mut calls).unwrap();
        assert!(calls.all_ended());
    }

    #[test]
    fn pieces_are_as_long_as_the_call_says() {
        let device = |length| Piece::Device(Fragment { offset: 4096, length, token: 1, binding: 2 });
        let control: Vec<u8> = [Piece::Linear(100), device(1448), device(52)].iter().flat_map(Piece::encode).collect();
        assert_eq!(read(1600, &control), Ok(Received::Pieces(vec![Piece::Linear(100), device(1448), device(52)])));
        for length in [0, 1599, 1601] {
            assert_eq!(read(length, &control), Err(Malformed), "{length}");
        }
        let long: Vec<u8> = [device(u32::MAX), device(u32::MAX)].iter().flat_map(Piece::encode).collect();
        assert_eq!(read(u32::MAX as usize - 1, &long), Err(Malformed));
        assert_eq!((read(7, &[]), read(0, &[])), (Ok(Received::Plain(7)), Ok(Received::End)));
    }
}
