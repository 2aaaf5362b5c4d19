//! The non-blocking control stream: a receive buffer that grows with what really arrives, and an ordered send queue.

use super::frame::{self, Frame, HEADER_BYTES};
use crate::status::{err, Result};
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

const READ_STEP: usize = 64 << 10;
/// A receive buffer that grew beyond this is given back once it is empty.
const KEEP_BYTES: usize = 1 << 20;

/// Bytes received and not yet decoded.
#[derive(Default)]
pub(crate) struct RxBuffer {
    bytes: Vec<u8>,
    filled: usize,
    consumed: usize,
    need: usize,
}

impl RxBuffer {
    /// The next whole frame's bytes as a decoded frame, if there is one. The caller consumes it with [`RxBuffer::consume`].
    pub(crate) fn next(&mut self) -> Result<Option<(Frame<'_>, usize)>> {
        if self.filled - self.consumed < self.need.max(HEADER_BYTES) {
            return Ok(None);
        }
        match frame::decode(&self.bytes[self.consumed..self.filled])? {
            frame::Decoded::Frame(frame, len) => Ok(Some((frame, len))),
            frame::Decoded::Need(need) => {
                self.need = need;
                Ok(None)
            }
        }
    }

    pub(crate) fn consume(&mut self, len: usize) {
        self.consumed += len;
        self.need = 0;
        if self.consumed == self.filled {
            self.consumed = 0;
            self.filled = 0;
            if self.bytes.len() > KEEP_BYTES {
                self.bytes = Vec::new();
            }
        }
    }

    /// Room for the next read: grows by what has arrived, so that an announced length alone costs no memory.
    fn room(&mut self) -> &mut [u8] {
        if self.consumed > 0 {
            self.bytes.copy_within(self.consumed..self.filled, 0);
            self.filled -= self.consumed;
            self.consumed = 0;
        }
        let want = (self.filled * 2).clamp(READ_STEP, self.need.max(READ_STEP)).max(self.filled + READ_STEP);
        if self.bytes.len() < want {
            self.bytes.resize(want, 0);
        }
        &mut self.bytes[self.filled..]
    }
}

pub(crate) struct ControlStream {
    sock: TcpStream,
    tx: Vec<u8>,
    sent: usize,
}

impl ControlStream {
    /// Takes over a connected socket after the handshake.
    pub(crate) fn new(sock: TcpStream) -> Result<ControlStream> {
        sock.set_nonblocking(true).map_err(|e| crate::status::Error::system("control socket", &e))?;
        Ok(ControlStream { sock, tx: Vec::new(), sent: 0 })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }

    /// Reads what is there. Returns the bytes read, and whether there may be more.
    ///
    /// # Errors
    /// `RemoteDisconnect` at the end of the stream and on socket errors.
    pub(crate) fn read(&mut self, rx: &mut RxBuffer) -> Result<(usize, bool)> {
        let room = rx.room();
        let len = room.len();
        match self.sock.read(room) {
            Ok(0) => Err(err!(RemoteDisconnect, "the peer closed the connection")),
            Ok(n) => {
                rx.filled += n;
                Ok((n, n == len))
            }
            Err(e) if matches!(e.kind(), Io::WouldBlock | Io::Interrupted) => Ok((0, false)),
            Err(e) => Err(err!(RemoteDisconnect, "control connection: {e}")),
        }
    }

    /// Queues a frame; [`ControlStream::flush`] sends it.
    pub(crate) fn push(&mut self, frame: &Frame<'_>) {
        frame::encode(frame, &mut self.tx);
    }

    /// Sends what the socket takes. Returns whether anything left.
    pub(crate) fn flush(&mut self) -> Result<bool> {
        let mut any = false;
        while self.sent < self.tx.len() {
            match self.sock.write(&self.tx[self.sent..]) {
                Ok(0) => return Err(err!(RemoteDisconnect, "control connection: nothing can be written")),
                Ok(n) => {
                    self.sent += n;
                    any = true;
                }
                Err(e) if e.kind() == Io::WouldBlock => break,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(err!(RemoteDisconnect, "control connection: {e}")),
            }
        }
        if self.sent == self.tx.len() {
            self.sent = 0;
            if self.tx.capacity() > KEEP_BYTES {
                self.tx = Vec::new();
            } else {
                self.tx.clear();
            }
        } else if self.sent > KEEP_BYTES {
            self.tx.drain(..self.sent);
            self.sent = 0;
        }
        Ok(any)
    }

    /// Bytes queued and not yet handed to the kernel.
    pub(crate) fn pending(&self) -> usize {
        self.tx.len() - self.sent
    }

    /// Ends both directions; queued bytes of the kernel still leave.
    pub(crate) fn shutdown(&self) {
        let _ = self.sock.shutdown(Shutdown::Both);
    }

    /// Ends the sending direction: the peer sees the end of the stream after everything that was sent.
    pub(crate) fn shutdown_write(&self) {
        let _ = self.sock.shutdown(Shutdown::Write);
    }

    /// Reads and drops what the peer still sends, until it hangs up or `limit` has passed.
    pub(crate) fn drain(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut sink = [0; 4096];
        loop {
            match self.sock.read(&mut sink) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) if e.kind() == Io::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32;
                    let mut fd = libc::pollfd { fd: self.fd(), events: libc::POLLIN, revents: 0 };
                    // SAFETY: one writable pollfd.
                    if left == 0 || unsafe { libc::poll(&mut fd, 1, left) } <= 0 {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn frames_of_all_sizes_survive_a_slow_reader() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = ControlStream::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
        let mut b = ControlStream::new(listener.accept().unwrap().0).unwrap();
        let sizes = [0usize, 1, 100, 65536, 3 << 20, 17, 9 << 20, 0];
        let bodies: Vec<Vec<u8>> = sizes.iter().map(|&n| (0..n).map(|i| (i * 31 + n) as u8).collect()).collect();
        for body in &bodies {
            a.push(&Frame::Notify { name: b"n", message: body });
        }
        let (mut rx, mut got) = (RxBuffer::default(), 0);
        while got < bodies.len() {
            a.flush().unwrap();
            b.read(&mut rx).unwrap();
            while let Some((frame, len)) = rx.next().unwrap() {
                assert_eq!(frame, Frame::Notify { name: b"n", message: &bodies[got] });
                got += 1;
                rx.consume(len);
            }
        }
        assert_eq!(a.pending(), 0);
        drop(a);
        while b.read(&mut rx).is_ok() {}
    }
}
