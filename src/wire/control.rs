//! The non-blocking control connection: a socket, and the session that seals what is sent and opens what arrives. Knows nothing
//! of the meaning of frames.

use super::frame::Frame;
use super::queue::{Block, RxBuffer, TxQueue};
use super::session::{Opened, Opener, Sealer, Session, MAX_PLAIN, MAX_RECORD};
use crate::status::{err, Error, Result};
use process::Mutex;
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The sending half of a control connection. It is a separate object so that another thread can send heartbeats while the driving
/// thread is busy.
pub(crate) struct Voice {
    sock: TcpStream,
    out: Mutex<Out>,
    born: Instant,
    /// When bytes were last sent, and when the driving thread last sent frames: milliseconds since `born`.
    spoke: AtomicU64,
    driven: AtomicU64,
}

/// Data on its way to the socket.
struct Out {
    sealer: Sealer,
    /// The record being sent; the socket has taken `sent` bytes of it.
    leaving: Vec<u8>,
    sent: usize,
    /// A block of frames that is too long for one record, and how much of it is sealed.
    long: Option<(Block, usize)>,
    /// The content of the last sealed heartbeat: see [`Frame::Ping`].
    reported: u64,
    /// Bytes sent without the driving thread, which it has not counted yet.
    kept: usize,
    /// The last frame was sent.
    ended: bool,
}

impl Out {
    /// Writes the rest of the record. Returns whether all of it was sent.
    fn write(&mut self, mut sock: &TcpStream, total: &mut usize) -> Result<bool> {
        while self.sent < self.leaving.len() {
            match sock.write(&self.leaving[self.sent..]) {
                Ok(0) => return Err(err!(RemoteDisconnect, "control connection: the socket takes no data")),
                Ok(n) => {
                    self.sent += n;
                    *total += n;
                }
                Err(e) if e.kind() == Io::WouldBlock => return Ok(false),
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(err!(RemoteDisconnect, "control connection: {e}")),
            }
        }
        Ok(true)
    }

    /// Seals the next record; `false` if nothing waits. Seals no more than the socket is given next.
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
            self.reported = block.reported().unwrap_or(self.reported);
            if block.frames().len() <= MAX_PLAIN {
                tx.recycle(std::mem::replace(&mut self.leaving, block.into_bytes()));
                self.sealer.seal_in_place(&mut self.leaving)?;
                return Ok(true);
            }
            self.long = Some((block, 0));
        }
        if let Some((block, at)) = &mut self.long {
            let rest = &block.frames()[*at..];
            let n = rest.len().min(MAX_PLAIN);
            self.sealer.seal(&rest[..n], &mut self.leaving)?;
            *at += n;
            if n == rest.len() {
                self.long.take().into_iter().for_each(|(block, _)| tx.recycle(block.into_bytes()));
            }
        }
        Ok(true)
    }

    fn pending(&self) -> usize {
        self.leaving.len() - self.sent + self.long.as_ref().map_or(0, |(block, at)| block.frames().len() - at)
    }
}

impl Voice {
    /// Shows the peer that this engine is alive, if nothing was sent for `silent` and the connection was driven less than `most`
    /// ago. Sends the rest of what is being sent, or a heartbeat. Errors are left to the driving thread. Returns whether anything
    /// was sent.
    pub(crate) fn keep(&self, silent: Duration, most: Duration) -> bool {
        let now = self.clock();
        let since = |time: &AtomicU64| Duration::from_millis(now.saturating_sub(time.load(Ordering::Relaxed)));
        if since(&self.spoke) < silent || since(&self.driven) >= most {
            return false;
        }
        // The thread that holds the lock is about to send.
        let Some(mut out) = self.out.try_lock() else { return false };
        if out.ended {
            return false;
        }
        let mut total = 0;
        let said = self.heartbeat(&mut out, &mut total);
        out.kept += total;
        if total > 0 {
            self.spoke.store(now, Ordering::Relaxed);
        }
        said.is_ok() && total > 0
    }

    fn heartbeat(&self, out: &mut Out, total: &mut usize) -> Result<()> {
        if !out.write(&self.sock, total)? || *total > 0 {
            return Ok(());
        }
        let mut tx = TxQueue::default();
        // A frame must be complete before the next one starts, so of a long one the next piece is sent.
        if out.long.is_none() {
            tx.push(&Frame::Ping { received: out.reported });
        }
        out.seal_next(&mut tx)?;
        out.write(&self.sock, total).map(drop)
    }

    fn clock(&self) -> u64 {
        self.born.elapsed().as_millis() as u64
    }
}

/// The size of the receive buffer at first.
const ROOM: usize = 8 << 10;

pub(crate) struct ControlStream {
    voice: Arc<Voice>,
    opener: Opener,
    /// Opened bytes that arrived before the first read.
    early: Vec<u8>,
    /// Records that have arrived: `arrived` bytes of this buffer.
    sealed: Vec<u8>,
    arrived: usize,
    /// Bytes that were taken from the queue and not by the socket, as of the last flush.
    pending: usize,
}

impl ControlStream {
    /// Takes over a connected socket and its session after the set-up, with the bytes that arrived behind its last message:
    /// opened ones, and those still sealed.
    pub(crate) fn new(sock: TcpStream, session: Session, plain: Vec<u8>, raw: Vec<u8>) -> Result<ControlStream> {
        sock.set_nonblocking(true).map_err(|e| Error::system("control socket", &e))?;
        let arrived = raw.len();
        let mut sealed = raw;
        sealed.resize(arrived + ROOM, 0);
        let Session { sealer, opener, .. } = session;
        let out = Out { sealer, leaving: Vec::new(), sent: 0, long: None, reported: 0, kept: 0, ended: false };
        let (out, born) = (Mutex::new(out), Instant::now());
        let voice = Arc::new(Voice { sock, out, born, spoke: AtomicU64::new(0), driven: AtomicU64::new(0) });
        Ok(ControlStream { voice, opener, early: plain, sealed, arrived, pending: 0 })
    }

    /// Its sending half, for the thread that sends heartbeats.
    pub(crate) fn voice(&self) -> Arc<Voice> {
        self.voice.clone()
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.voice.sock.as_raw_fd()
    }

    /// Reads what has arrived. Returns the number of bytes, and whether there may be more.
    ///
    /// # Errors
    /// `RemoteDisconnect` at the end of the stream and on socket errors, `Protocol` when the data was changed in transit.
    pub(crate) fn read(&mut self, rx: &mut RxBuffer) -> Result<(usize, bool)> {
        rx.extend(&std::mem::take(&mut self.early))?;
        // The first records may have arrived with the set-up's last message.
        self.open(rx)?;
        let room = &mut self.sealed[self.arrived..];
        let len = room.len();
        match (&self.voice.sock).read(room) {
            Ok(0) => Err(err!(RemoteDisconnect, "the peer closed the connection")),
            Ok(n) => {
                self.arrived += n;
                if n == len {
                    self.make_room();
                }
                self.open(rx)?;
                Ok((n, n == len))
            }
            Err(e) if matches!(e.kind(), Io::WouldBlock | Io::Interrupted) => Ok((0, false)),
            Err(e) => Err(err!(RemoteDisconnect, "control connection: {e}")),
        }
    }

    /// Grows the buffer when more arrives than fits: most connections never need room for two records.
    fn make_room(&mut self) {
        let len = (2 * self.sealed.len()).min((2 * MAX_RECORD).max(self.sealed.len()));
        self.sealed.resize(len, 0);
    }

    /// Opens all complete records.
    fn open(&mut self, rx: &mut RxBuffer) -> Result<()> {
        let mut at = 0;
        while let Opened::Record { plain, consumed } = self.opener.open(&mut self.sealed[at..self.arrived])? {
            rx.extend(&self.sealed[at..at + plain])?;
            at += consumed;
        }
        if at > 0 {
            self.sealed.copy_within(at..self.arrived, 0);
            self.arrived -= at;
        }
        Ok(())
    }

    /// Sends what the socket takes of `tx`, until `most` bytes or one record more have been sent. Returns the bytes sent since
    /// the last call.
    pub(crate) fn flush(&mut self, tx: &mut TxQueue, most: usize) -> Result<usize> {
        let mut out = self.voice.out.lock();
        let mut total = 0;
        let flushed = loop {
            match out.write(&self.voice.sock, &mut total) {
                Ok(true) if total < most => {}
                Ok(_) => break Ok(()),
                Err(e) => break Err(e),
            }
            match out.seal_next(tx) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.pending = out.pending();
        let kept = std::mem::take(&mut out.kept);
        drop(out);
        if total > 0 {
            let now = self.voice.clock();
            self.voice.spoke.store(now, Ordering::Relaxed);
            self.voice.driven.store(now, Ordering::Relaxed);
        }
        flushed.map(|()| total + kept)
    }

    /// Bytes that were taken from the queue and not by the socket.
    pub(crate) fn pending(&self) -> usize {
        self.pending
    }

    /// What is queued now is the last data that this engine sends.
    pub(crate) fn end(&self) {
        self.voice.out.lock().ended = true;
    }

    /// Shuts down the sending direction: the peer sees the end of the stream after all data.
    pub(crate) fn shutdown_write(&self) {
        self.end();
        let _ = self.voice.sock.shutdown(Shutdown::Write);
    }

    /// Reads and drops what the peer still sends. Returns whether it has closed its end.
    pub(crate) fn hung_up(&mut self) -> bool {
        let mut sink = [0; 4096];
        for _ in 0..256 {
            match (&self.voice.sock).read(&mut sink) {
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
            // Records are sealed only shortly before they are sent.
            let sealed = a.voice.out.lock().leaving.len();
            assert!(sealed <= MAX_RECORD, "{sealed} bytes are sealed");
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

    /// The driving thread may be held up at any moment, also in the middle of a frame.
    #[test]
    fn heartbeats_go_out_between_frames_and_inside_a_long_one_while_the_driver_is_held_up() {
        const LEN: usize = 1 << 20;
        const LONG: Duration = Duration::from_secs(3600);
        let [mut a, mut b] = pair();
        let (voice, body) = (a.voice(), vec![7; LEN]);
        let (mut tx, mut rx) = (TxQueue::default(), RxBuffer::default());
        let (mut heard, mut pings, mut whole) = (0, 0, false);
        tx.push(&Frame::Ping { received: 5 });
        tx.push(&Frame::Notify { name: b"n", message: &body });
        let mut left = a.flush(&mut tx, 1).unwrap();
        assert!(left > 0 && a.pending() > LEN / 2 && !voice.keep(LONG, LONG) && !voice.keep(Duration::ZERO, Duration::ZERO));
        let until = Instant::now() + Duration::from_secs(60);
        while pings < 3 {
            assert!(Instant::now() < until, "{left} bytes left");
            left += usize::from(voice.keep(Duration::ZERO, LONG));
            let (n, _) = b.read(&mut rx).unwrap();
            heard += usize::from(n > 0);
            while let Some((frame, len)) = rx.next().unwrap() {
                match frame {
                    Frame::Notify { message, .. } if !whole => whole = message == body,
                    frame => {
                        assert_eq!(frame, Frame::Ping { received: 5 });
                        pings += usize::from(whole);
                    }
                }
                rx.consume(len);
            }
        }
        assert!(whole && heard > 3);
        // The driving thread continues where it stopped.
        tx.push(&Frame::Notify { name: b"n", message: b"after" });
        a.flush(&mut tx, usize::MAX).unwrap();
        assert_eq!((a.pending(), tx.pending()), (0, 0));
        a.end();
        while !voice.keep(Duration::ZERO, LONG) && Instant::now() < until {
            b.read(&mut rx).unwrap();
            let last = std::iter::from_fn(|| match rx.next().unwrap() {
                Some((frame, len)) => {
                    let last = matches!(frame, Frame::Notify { message: b"after", .. });
                    rx.consume(len);
                    Some(last)
                }
                None => None,
            });
            if last.last() == Some(true) {
                return;
            }
        }
        panic!("a heartbeat after the last frame");
    }

    /// A heartbeat sent for a busy driving thread reports no less than the last one, and no more than the next queued one.
    #[test]
    fn a_heartbeat_sent_for_a_busy_driver_repeats_the_last_one() {
        const LONG: Duration = Duration::from_secs(3600);
        let [mut a, mut b] = pair();
        let voice = a.voice();
        let (mut tx, mut rx, mut said) = (TxQueue::default(), RxBuffer::default(), Vec::new());
        for number in 1..=3 {
            tx.push(&Frame::Ping { received: number });
            tx.push(&Frame::Notify { name: b"n", message: &[7; 40_000] });
        }
        let until = Instant::now() + Duration::from_secs(60);
        while said.last() != Some(&3) || tx.pending() + a.pending() > 0 {
            assert!(Instant::now() < until, "{said:?}");
            a.flush(&mut tx, 1).unwrap();
            for _ in 0..3 {
                voice.keep(Duration::ZERO, LONG);
            }
            b.read(&mut rx).unwrap();
            while let Some((frame, len)) = rx.next().unwrap() {
                if let Frame::Ping { received } = frame {
                    said.push(received);
                }
                rx.consume(len);
            }
        }
        assert!(said.len() > 6 && said.is_sorted(), "{said:?}");
    }

    #[test]
    fn data_that_arrived_with_the_set_up_leaves_room_for_the_rest() {
        for early in [1, ROOM - 1, ROOM, ROOM + 1, 40_000] {
            let [mut a, b] = pair();
            let mut tx = TxQueue::default();
            tx.push(&Frame::Notify { name: b"n", message: &[7; 60_000] });
            let Voice { out, .. } = &*a.voice;
            assert!(out.lock().seal_next(&mut tx).unwrap());
            // The first bytes of the record arrive with the set-up's last message.
            let raw = out.lock().leaving[..early].to_vec();
            out.lock().sent = early;
            let Ok(Voice { sock, .. }) = Arc::try_unwrap(b.voice) else { panic!("another reference is left") };
            let session = Session::new(Direction::ToConnecting, &[7; 32], b"test").unwrap();
            let mut b = ControlStream::new(sock, session, Vec::new(), raw).unwrap();
            let mut rx = RxBuffer::default();
            while rx.next().unwrap().is_none() {
                a.flush(&mut tx, usize::MAX).unwrap();
                b.read(&mut rx).unwrap();
            }
            assert!(matches!(rx.next().unwrap(), Some((Frame::Notify { message, .. }, _)) if message == [7; 60_000]));
        }
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
