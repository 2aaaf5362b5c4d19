//! Moves the bytes of posted sends into the kernel, many messages per system call.
//! A message is done when its last byte is in the kernel. Knows nothing of the caller.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use libc::iovec;
use nccl_net_abi::{MAX_REQUESTS, NCCL_INTERNAL_ERROR, NCCL_SYSTEM_ERROR, NCCL_UNHANDLED_CUDA_ERROR};

use crate::config::Config;
use crate::congestion::Rule;
use crate::device::SendSource;
use crate::ledger::{Failure, Ledger};
use crate::protect::{Guard, Outgoing};
use crate::quantum::{DataSocket, Turn, IOV_MAX, TURN_BYTES};
use crate::slot::Cursor;
use crate::unsent::Unsent;

/// The source of device sends, once built.
pub type Source = OnceLock<Arc<dyn SendSource>>;

/// Send state of a comm.
#[derive(Default)]
pub struct SendIo {
    /// Position in the oldest unfinished message, and how many of its bytes are in the kernel.
    cursor: Cursor,
    sent: usize,
    batch: Vec<iovec>,
    congestion: Rule,
    unsent: Unsent,
    guard: Option<Box<Outgoing>>,
}

// SAFETY: `batch` is scratch of one turn; its pointers are not used between turns.
unsafe impl Send for SendIo {}

impl SendIo {
    /// The state of a new comm.
    pub fn new(config: &Config) -> SendIo {
        SendIo { congestion: Rule::new(config), unsent: Unsent::new(config), ..SendIo::default() }
    }

    /// Protects all messages; none has been posted.
    pub fn protect(&mut self, guard: Guard) {
        self.guard = Some(Box::new(Outgoing::new(guard)));
    }

    /// Bytes of the oldest unfinished message that are in the kernel.
    pub fn begun(&self) -> usize {
        self.sent
    }

    /// One turn.
    pub fn turn(&mut self, ledger: &Ledger, socket: DataSocket, source: &Source) -> Result<Turn, Failure> {
        if socket.hung_up {
            return Err(Failure::new(NCCL_SYSTEM_ERROR, hang_up_cause(socket.fd)));
        }
        let mut budget = TURN_BYTES;
        loop {
            let (completed, posted) = (ledger.completed(), ledger.posted());
            if completed == posted {
                if ledger.rest(completed) {
                    return Ok(Turn::Wait);
                }
                continue;
            }
            if budget == 0 {
                return Ok(Turn::More);
            }
            if ledger.should_stop() {
                return Ok(Turn::Wait);
            }
            let bytes = self.gather(ledger, source, completed, posted, budget)?;
            if bytes == 0 {
                return Ok(Turn::More);
            }
            match send(socket.fd, &mut self.batch) {
                Ok(sent) => {
                    self.account(ledger, source, completed, sent);
                    self.congestion.sent(socket.fd, sent);
                    budget = budget.saturating_sub(sent);
                    // A short write means that the socket buffer is full; the kernel reports when it is not.
                    if sent < bytes {
                        self.unsent.full(socket.fd, Instant::now());
                        return Ok(Turn::Wait);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.unsent.full(socket.fd, Instant::now());
                    return Ok(Turn::Wait);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::new(NCCL_SYSTEM_ERROR, error.to_string())),
            }
        }
    }

    /// Collects unsent segments of messages `completed..posted`. 0 bytes: the next message is not in host memory yet.
    fn gather(&mut self, ledger: &Ledger, source: &Source, completed: u64, posted: u64, budget: usize) -> Result<usize, Failure> {
        self.batch.clear();
        let mut bytes = 0;
        for seq in completed..posted {
            // SAFETY: posted, not completed, and the I/O lock is held.
            let body = unsafe { ledger.slot(seq).body() };
            if let (true, Some(source)) = (body.device, source.get()) {
                let unreadable = |e| Failure::new(NCCL_UNHANDLED_CUDA_ERROR, format!("device memory could not be read: {e}"));
                if !source.ready((seq % MAX_REQUESTS as u64) as usize).map_err(unreadable)? {
                    break;
                }
            }
            let iov = match &mut self.guard {
                None => &body.iov[..],
                // SAFETY: the message's own memory, which the poster does not touch until the request is done or the comm is closed.
                Some(guard) => unsafe { guard.message(seq, body) }.map_err(|why| Failure::new(NCCL_INTERNAL_ERROR, why))?,
            };
            let cursor = if seq == completed { self.cursor } else { Cursor::default() };
            bytes += cursor.collect(iov, budget - bytes, IOV_MAX, &mut self.batch);
            if bytes == budget || self.batch.len() == IOV_MAX {
                break;
            }
        }
        Ok(bytes)
    }

    /// Advances by `sent` bytes and completes the messages that they finish.
    fn account(&mut self, ledger: &Ledger, source: &Source, mut seq: u64, mut sent: usize) {
        let first = seq;
        while sent > 0 {
            // SAFETY: posted, not completed, and the I/O lock is held.
            let body = unsafe { ledger.slot(seq).body() };
            let (iov, total) = match &self.guard {
                None => (&body.iov[..], body.total),
                Some(guard) => guard.oldest(),
            };
            let left = total - self.sent;
            if sent < left {
                self.cursor.advance(iov, sent);
                self.sent += sent;
                break;
            }
            sent -= left;
            if let (true, Some(source)) = (body.device, source.get()) {
                source.release((seq % MAX_REQUESTS as u64) as usize);
            }
            if let Some(guard) = &mut self.guard {
                guard.oldest_sent();
            }
            (self.cursor, self.sent) = (Cursor::default(), 0);
            seq += 1;
        }
        if seq > first {
            ledger.complete(seq);
        }
    }
}

fn send(fd: i32, batch: &mut [iovec]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = batch.as_mut_ptr();
    message.msg_iovlen = batch.len() as _;
    // SAFETY: every segment is memory that the poster keeps valid until the request is done or the comm is closed.
    let sent = unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// The cause of a hang-up.
fn hang_up_cause(fd: i32) -> String {
    let mut code: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: an int of that size.
    let known = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut code).cast(), &mut len) };
    if known == 0 && code != 0 {
        io::Error::from_raw_os_error(code).to_string()
    } else {
        "the peer closed the connection".to_owned()
    }
}
