//! The non-blocking control stream: a socket, and the session that seals what leaves through it and opens what comes. Knows nothing of
//! what frames mean.

use super::queue::{Block, RxBuffer, TxQueue};
use super::session::{Opened, Session, MAX_PLAIN, MAX_RECORD};
use crate::status::{err, Error, Result};
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};

pub(crate) struct ControlStream {
    sock: TcpStream,
    session: Session,
    /// Opened bytes that came before the first read.
    early: Vec<u8>,
    /// Records that have arrived; `arrived` bytes of it.
    sealed: Vec<u8>,
    arrived: usize,
    /// A record on its way to the socket; `sent` bytes of it have left.
    leaving: Vec<u8>,
    sent: usize,
    /// A block of frames that is too long for one record, and how much of it was sealed.
    long: Option<(Block, usize)>,
}

impl ControlStream {
    /// Takes over a connected socket and its session after the set-up, with the bytes that came behind its last message: opened ones,
    /// and received ones that were not opened.
    pub(crate) fn new(sock: TcpStream, session: Session, plain: Vec<u8>, raw: Vec<u8>) -> Result<ControlStream> {
        sock.set_nonblocking(true).map_err(|e| Error::system("control socket", &e))?;
        let arrived = raw.len();
        // Fresh pages cost no memory until something arrives in them.
        let mut sealed = vec![0; arrived.max(2 * MAX_RECORD)];
        sealed[..arrived].copy_from_slice(&raw);
        Ok(ControlStream { sock, session, early: plain, sealed, arrived, leaving: Vec::new(), sent: 0, long: None })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }

    /// Reads what is there. Returns the bytes read, and whether there may be more.
    ///
    /// # Errors
    /// `RemoteDisconnect` at the end of the stream and on socket errors, `Protocol` when the stream was changed on its way.
    pub(crate) fn read(&mut self, rx: &mut RxBuffer) -> Result<(usize, bool)> {
        rx.extend(&std::mem::take(&mut self.early));
        // The first records may have come with the set-up's last message.
        self.open(rx)?;
        let room = &mut self.sealed[self.arrived..];
        let len = room.len();
        match self.sock.read(room) {
            Ok(0) => Err(err!(RemoteDisconnect, "the peer closed the connection")),
            Ok(n) => {
                self.arrived += n;
                self.open(rx)?;
                Ok((n, n == len))
            }
            Err(e) if matches!(e.kind(), Io::WouldBlock | Io::Interrupted) => Ok((0, false)),
            Err(e) => Err(err!(RemoteDisconnect, "control connection: {e}")),
        }
    }

    /// Opens all whole records.
    fn open(&mut self, rx: &mut RxBuffer) -> Result<()> {
        let mut at = 0;
        while let Opened::Record { plain, consumed } = self.session.open(&mut self.sealed[at..self.arrived])? {
            rx.extend(&self.sealed[at..at + plain]);
            at += consumed;
        }
        if at > 0 {
            self.sealed.copy_within(at..self.arrived, 0);
            self.arrived -= at;
        }
        Ok(())
    }

    /// Sends of `tx` what the socket takes, until `most` bytes have left or a record more. Returns the bytes that left.
    pub(crate) fn flush(&mut self, tx: &mut TxQueue, most: usize) -> Result<usize> {
        let mut total = 0;
        while total < most {
            if self.sent == self.leaving.len() && !self.seal_next(tx)? {
                break;
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
        Ok(total)
    }

    /// Seals the next record; `false` when nothing waits. No more is sealed than the socket is given next.
    fn seal_next(&mut self, tx: &mut TxQueue) -> Result<bool> {
        self.sent = 0;
        self.leaving.clear();
        if self.long.is_none() {
            let Some(block) = tx.take() else {
                if self.leaving.capacity() > 2 * MAX_RECORD {
                    tx.recycle(std::mem::take(&mut self.leaving));
                }
                return Ok(false);
            };
            if block.frames().len() <= MAX_PLAIN {
                tx.recycle(std::mem::replace(&mut self.leaving, block.into_bytes()));
                self.session.sealer.seal_in_place(&mut self.leaving)?;
                return Ok(true);
            }
            self.long = Some((block, 0));
        }
        if let Some((block, at)) = &mut self.long {
            let rest = &block.frames()[*at..];
            let n = rest.len().min(MAX_PLAIN);
            self.session.seal(&rest[..n], &mut self.leaving)?;
            *at += n;
            if n == rest.len() {
                self.long.take().into_iter().for_each(|(block, _)| tx.recycle(block.into_bytes()));
            }
        }
        Ok(true)
    }

    /// Bytes taken from the queue that the socket has not.
    pub(crate) fn pending(&self) -> usize {
        self.leaving.len() - self.sent + self.long.as_ref().map_or(0, |(block, at)| block.frames().len() - at)
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
    use crate::wire::session::Direction;
    use std::net::TcpListener;

    fn pair() -> [ControlStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let session = |ours| Session::new(ours, &[7; 32], b"test").unwrap();
        let sock = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let a = ControlStream::new(sock, session(Direction::ToListening), Vec::new(), Vec::new()).unwrap();
        let sock = listener.accept().unwrap().0;
        [a, ControlStream::new(sock, session(Direction::ToConnecting), Vec::new(), Vec::new()).unwrap()]
    }

    #[test]
    fn a_large_frame_leaves_piece_by_piece_and_in_order() {
        const LEN: usize = 16 << 20;
        const MOST: usize = 256 << 10;
        let [mut a, mut b] = pair();
        let body: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
        let mut tx = TxQueue::default();
        for message in [b"first", &body[..], b"last"] {
            tx.push(&Frame::Notify { name: b"n", message });
        }
        let (queued, mut rx, mut got) = (tx.pending(), RxBuffer::default(), Vec::new());
        let mut left = 0;
        while got.len() < 3 {
            let sent = a.flush(&mut tx, MOST).unwrap();
            assert!(sent <= MOST + MAX_RECORD, "{sent} bytes in one go");
            // Nothing is sealed long before it leaves.
            assert!(a.leaving.len() <= MAX_RECORD, "{} bytes are sealed", a.leaving.len());
            left += sent;
            assert!(left + a.pending() + tx.pending() >= queued, "everything that waits counts");
            b.read(&mut rx).unwrap();
            while let Some((frame, len)) = rx.next().unwrap() {
                let Frame::Notify { message, .. } = frame else { panic!("{frame:?}") };
                got.push(message.to_vec());
                rx.consume(len);
            }
        }
        assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), [5, LEN, 4]);
        assert!(got[1] == body && (a.pending(), tx.pending()) == (0, 0));
    }

    #[test]
    fn frames_of_all_sizes_survive_a_slow_reader() {
        let [mut a, mut b] = pair();
        let sizes = [0usize, 1, 100, 65536, 3 << 20, 17, 9 << 20, 0];
        let bodies: Vec<Vec<u8>> = sizes.iter().map(|&n| (0..n).map(|i| (i * 31 + n) as u8).collect()).collect();
        let mut tx = TxQueue::default();
        for body in &bodies {
            tx.push(&Frame::Notify { name: b"n", message: body });
        }
        let queued = tx.pending();
        let (mut rx, mut got, mut left) = (RxBuffer::default(), 0, 0);
        while got < bodies.len() {
            left += a.flush(&mut tx, usize::MAX).unwrap();
            b.read(&mut rx).unwrap();
            while let Some((frame, len)) = rx.next().unwrap() {
                assert_eq!(frame, Frame::Notify { name: b"n", message: &bodies[got] });
                got += 1;
                rx.consume(len);
            }
        }
        assert_eq!((a.pending(), tx.pending()), (0, 0));
        assert!(left > queued, "sealing adds to {queued} bytes");
        assert!(!b.hung_up());
        a.shutdown_write();
        while b.read(&mut rx).is_ok() {}
        assert!(b.hung_up());
    }
}
