//! The non-blocking control stream: a socket, the session that seals what goes through it, and the queue of frames that leave. Knows
//! nothing of what frames mean.

use super::queue::{RxBuffer, TxQueue};
use super::session::{Session, MAX_PLAIN};
use crate::status::{err, Error, Result};
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};

/// Plain bytes sealed at once: what the socket does not take now can wait unsealed.
const SEAL_STEP: usize = 4 * MAX_PLAIN;

pub(crate) struct ControlStream {
    sock: TcpStream,
    session: Option<Session>,
    /// A block of frames that is being sealed, and how much of it is.
    block: Vec<u8>,
    done: usize,
    /// Bytes on their way to the socket.
    leaving: Vec<u8>,
    sent: usize,
}

impl ControlStream {
    /// Takes over a connected socket after the handshake.
    pub(crate) fn new(sock: TcpStream) -> Result<ControlStream> {
        sock.set_nonblocking(true).map_err(|e| Error::system("control socket", &e))?;
        Ok(ControlStream { sock, session: None, block: Vec::new(), done: 0, leaving: Vec::new(), sent: 0 })
    }

    /// Takes over a connected socket and the session of its handshake.
    pub(crate) fn sealed(sock: TcpStream, session: Session) -> Result<ControlStream> {
        Ok(ControlStream { session: Some(session), ..ControlStream::new(sock)? })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }

    /// Reads what is there. Returns the bytes read, and whether there may be more.
    ///
    /// # Errors
    /// `RemoteDisconnect` at the end of the stream and on socket errors; `Protocol` when the bytes are not what the peer sealed.
    pub(crate) fn read(&mut self, rx: &mut RxBuffer) -> Result<(usize, bool)> {
        let room = rx.room();
        let len = room.len();
        match self.sock.read(room) {
            Ok(0) => Err(err!(RemoteDisconnect, "the peer closed the connection")),
            Ok(n) => {
                match &mut self.session {
                    Some(session) => rx.arrived(n, &mut session.opener)?,
                    None => rx.filled(n),
                }
                Ok((n, n == len))
            }
            Err(e) if matches!(e.kind(), Io::WouldBlock | Io::Interrupted) => Ok((0, false)),
            Err(e) => Err(err!(RemoteDisconnect, "control connection: {e}")),
        }
    }

    /// Fills `leaving` anew. `false` when nothing is left to send.
    fn refill(&mut self, tx: &mut TxQueue) -> Result<bool> {
        self.sent = 0;
        let Some(session) = &mut self.session else {
            tx.recycle(std::mem::take(&mut self.leaving));
            self.leaving = tx.take().unwrap_or_default();
            return Ok(!self.leaving.is_empty());
        };
        self.leaving.clear();
        if self.done == self.block.len() {
            self.done = 0;
            tx.recycle(std::mem::take(&mut self.block));
            match tx.take() {
                Some(block) => self.block = block,
                None => return Ok(false),
            }
        }
        let piece = self.done..self.block.len().min(self.done + SEAL_STEP);
        self.done = piece.end;
        session.sealer.seal(&self.block[piece], &mut self.leaving)?;
        Ok(true)
    }

    /// Sends of `tx` what the socket takes. Returns the bytes that left.
    pub(crate) fn flush(&mut self, tx: &mut TxQueue) -> Result<usize> {
        let mut total = 0;
        loop {
            if self.sent == self.leaving.len() && !self.refill(tx)? {
                return Ok(total);
            }
            match self.sock.write(&self.leaving[self.sent..]) {
                Ok(0) => return Err(err!(RemoteDisconnect, "control connection: nothing can be written")),
                Ok(n) => {
                    self.sent += n;
                    total += n;
                }
                Err(e) if e.kind() == Io::WouldBlock => return Ok(total),
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(err!(RemoteDisconnect, "control connection: {e}")),
            }
        }
    }

    /// Bytes taken from the queue that the socket has not.
    pub(crate) fn pending(&self) -> usize {
        self.leaving.len() - self.sent + self.block.len() - self.done
    }

    /// Ends the sending direction: the peer sees the end of the stream after everything that was sent.
    pub(crate) fn shutdown_write(&self) {
        let _ = self.sock.shutdown(Shutdown::Write);
    }

    /// Reads and drops what the peer still sends; whether it has hung up.
    pub(crate) fn hung_up(&mut self) -> bool {
        let mut sink = [0; 4096];
        for _ in 0..256 {
            match self.sock.read(&mut sink) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return e.kind() != Io::WouldBlock,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::Frame;
    use crate::wire::session::{Direction, RECORD_OVERHEAD};
    use std::net::TcpListener;

    fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sock = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (sock, listener.accept().unwrap().0)
    }

    fn session(direction: Direction) -> Session {
        Session::new(direction, &[7; 64], b"test").unwrap()
    }

    #[test]
    fn frames_of_all_sizes_survive_a_slow_reader() {
        let (a, b) = sockets();
        all_sizes(ControlStream::new(a).unwrap(), ControlStream::new(b).unwrap(), 0);
        let (a, b) = sockets();
        let a = ControlStream::sealed(a, session(Direction::ToListening)).unwrap();
        all_sizes(a, ControlStream::sealed(b, session(Direction::ToConnecting)).unwrap(), RECORD_OVERHEAD);
    }

    #[test]
    fn a_byte_that_nobody_sealed_ends_the_stream() {
        let (mut a, b) = sockets();
        let mut b = ControlStream::sealed(b, session(Direction::ToConnecting)).unwrap();
        let (mut bytes, mut rx) = (Vec::new(), RxBuffer::default());
        session(Direction::ToListening).seal(&[1; 40], &mut bytes).unwrap();
        bytes[30] ^= 1;
        a.write_all(&bytes).unwrap();
        let error = loop {
            match b.read(&mut rx) {
                Ok(_) => std::thread::yield_now(),
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), crate::status::ErrorKind::Protocol);
        assert!(rx.next().unwrap().is_none());
    }

    /// `overhead`: what a record adds.
    fn all_sizes(mut a: ControlStream, mut b: ControlStream, overhead: usize) {
        let sizes = [0usize, 1, 100, 65536, 3 << 20, 17, 9 << 20, 0];
        let bodies: Vec<Vec<u8>> = sizes.iter().map(|&n| (0..n).map(|i| (i * 31 + n) as u8).collect()).collect();
        let mut tx = TxQueue::default();
        for body in &bodies {
            tx.push(&Frame::Notify { name: b"n", message: body });
        }
        let queued = tx.pending();
        let (mut rx, mut got, mut left) = (RxBuffer::default(), 0, 0);
        while got < bodies.len() {
            left += a.flush(&mut tx).unwrap();
            b.read(&mut rx).unwrap();
            while let Some((frame, len)) = rx.next().unwrap() {
                assert_eq!(frame, Frame::Notify { name: b"n", message: &bodies[got] });
                got += 1;
                rx.consume(len);
            }
        }
        assert_eq!((a.pending(), tx.pending()), (0, 0));
        assert!(if overhead == 0 { left == queued } else { left > queued + overhead }, "{left} of {queued}");
        assert!(!b.hung_up());
        a.shutdown_write();
        while b.read(&mut rx).is_ok() {}
        assert!(b.hung_up());
    }
}
