//! The non-blocking control connection: a socket, and the session that seals what is sent and opens what arrives. When the socket fails,
//! the stream waits for another one and goes on there: what the peer has not opened is kept for that. Knows nothing of the meaning of
//! frames.

use super::answers::Answers;
use super::frame::Frame;
use super::queue::{Block, RxBuffer, TxQueue, MAX_FRAMES, OPENED, ROOM};
use super::sent::SentRecords;
use super::session::{Opened, Opener, Sealer, Session, MAX_RECORD, RECORD_HEADER};
use crate::addresses::plain;
use crate::status::{bail, err, Error, Result};
use process::{Mutex, TcpInfo};
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After so many bytes of the peer at the latest it learns that they were opened.
const ACKNOWLEDGE: usize = 64 << 10;
/// While the peer has not acknowledged so many bytes, no more frames are sealed. More than the buffers of two sockets usually hold.
const WINDOW: usize = 16 << 20;

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
    /// The sealed records that the socket has yet to take, or that the peer has not acknowledged.
    sent: SentRecords,
    /// A block of frames that is too long for one record, and how much of it is sealed.
    long: Option<(Block, usize)>,
    /// The content of the last sealed heartbeat: see [`Frame::Ping`].
    reported: u64,
    /// How many records of the peer were opened, and how many bytes of those the peer has not been sent this number for.
    opened: u64,
    news: usize,
    /// Bytes sent without the driving thread, which it has not counted yet.
    kept: usize,
    /// The last frame was sent.
    ended: bool,
    /// Why the socket is of no use any more.
    lost: Option<Error>,
}

impl Out {
    /// Writes what is sealed. Returns whether all of it was sent.
    fn write(&mut self, mut sock: &TcpStream, total: &mut usize) -> bool {
        while self.lost.is_none() {
            let Some(bytes) = self.sent.next() else { return true };
            match sock.write(bytes) {
                Ok(0) => self.lost = Some(err!(RemoteDisconnect, "control connection: the socket takes no data")),
                Ok(n) => {
                    self.sent.wrote(n);
                    *total += n;
                }
                Err(e) if e.kind() == Io::WouldBlock => return false,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => self.lost = Some(err!(RemoteDisconnect, "control connection: {e}")),
            }
        }
        false
    }

    /// Seals the next record; `false` if nothing waits. Seals no more than the socket is given next.
    fn seal_next(&mut self, tx: &mut TxQueue) -> Result<bool> {
        let full = self.sent.bytes() >= WINDOW;
        if self.long.is_none() && !full {
            if let Some(block) = tx.take() {
                self.reported = block.reported().unwrap_or(self.reported);
                if block.frames().len() <= MAX_FRAMES {
                    self.seal(block.into_bytes())?;
                    tx.recycle(self.sent.spare());
                    return Ok(true);
                }
                self.long = Some((block, 0));
            }
        }
        if let Some((block, at)) = self.long.as_mut().filter(|_| !full) {
            let rest = &block.frames()[*at..];
            let n = rest.len().min(MAX_FRAMES);
            let mut record = self.sent.spare();
            record.clear();
            record.resize(ROOM, 0);
            record.extend_from_slice(&rest[..n]);
            *at += n;
            if n == rest.len() {
                self.long = None;
            }
            self.seal(record)?;
            return Ok(true);
        }
        if self.owes() {
            self.seal(vec![0; ROOM])?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Seals a record, behind whose room the frames lie.
    fn seal(&mut self, mut record: Vec<u8>) -> Result<()> {
        if let Some(room) = record.get_mut(RECORD_HEADER..ROOM) {
            room.copy_from_slice(&self.opened.to_le_bytes());
        }
        self.news = 0;
        self.sealer.seal_in_place(&mut record)?;
        self.sent.push(record);
        Ok(())
    }

    /// Whether the peer must learn how much was opened.
    fn owes(&self) -> bool {
        self.news >= ACKNOWLEDGE && !self.ended
    }

    /// Whether the peer has to acknowledge something before more is sent.
    fn is_full(&self) -> bool {
        self.sent.unwritten() == 0 && self.sent.bytes() >= WINDOW
    }

    fn pending(&self) -> usize {
        self.sent.unwritten() + self.long.as_ref().map_or(0, |(block, at)| block.frames().len() - at)
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
        if !out.write(&self.sock, total) || *total > 0 {
            return Ok(());
        }
        let mut tx = TxQueue::default();
        // A frame must be complete before the next one starts, so of a long one the next piece is sent.
        if out.long.is_none() {
            tx.push(&Frame::Ping { received: out.reported });
        }
        out.seal_next(&mut tx)?;
        out.write(&self.sock, total);
        Ok(())
    }

    fn clock(&self) -> u64 {
        self.born.elapsed().as_millis() as u64
    }
}

/// A socket that the stream does not go on over is reset when it is closed: the peer must not take that for the end of the stream.
pub(crate) fn reset_at_close(sock: &TcpStream) {
    let _ = socket2::SockRef::from(sock).set_linger(Some(Duration::ZERO));
}

/// The size of the receive buffer at first.
const BUFFER: usize = 8 << 10;

pub(crate) struct ControlStream {
    voice: Arc<Voice>,
    opener: Opener,
    /// Records that have arrived: `arrived` bytes of this buffer.
    sealed: Vec<u8>,
    arrived: usize,
    /// Bytes that were taken from the queue and not by the socket, as of the last flush.
    pending: usize,
    /// The peer has to acknowledge something before more is sent.
    full: bool,
    /// The socket has failed as it was written to. What has arrived before is still read.
    failing: bool,
    /// How long the peer's kernel may leave data unanswered, and what it has answered.
    patience: Option<Duration>,
    answers: Answers,
    /// Why the socket is of no use any more.
    lost: Option<Error>,
}

impl ControlStream {
    /// Takes over a connected socket and its session after the set-up, with the records that arrived behind its last message.
    pub(crate) fn new(sock: TcpStream, session: Session, raw: Vec<u8>) -> Result<ControlStream> {
        sock.set_nonblocking(true).map_err(|e| Error::system("control socket", &e))?;
        let arrived = raw.len();
        let mut sealed = raw;
        sealed.resize(arrived + BUFFER, 0);
        let Session { sealer, opener, .. } = session;
        let (sent, opened) = (SentRecords::new(sealer.number()), opener.number());
        let out = Out { sealer, sent, long: None, reported: 0, opened, news: 0, kept: 0, ended: false, lost: None };
        let (out, born) = (Mutex::new(out), Instant::now());
        let voice = Arc::new(Voice { sock, out, born, spoke: AtomicU64::new(0), driven: AtomicU64::new(0) });
        Ok(ControlStream {
            voice,
            opener,
            sealed,
            arrived,
            pending: 0,
            full: false,
            failing: false,
            patience: None,
            answers: Answers::new(born),
            lost: None,
        })
    }

    /// From now on the socket fails if the peer's kernel does not answer for so long, this one and those that replace it. Between looks the
    /// kernel notices that too, a while later.
    pub(crate) fn fail_after(&mut self, time: Duration) {
        self.patience = Some(time);
        // Without it the silence of the peer ends the connection.
        let _ = socket2::SockRef::from(&self.voice.sock).set_tcp_user_timeout(self.patience);
    }

    /// Gives up the socket if the peer's kernel has acknowledged nothing for too long.
    pub(crate) fn look(&mut self, now: Instant) {
        let Some(patience) = self.patience.filter(|_| self.lost.is_none()) else { return };
        let Some(info) = TcpInfo::of(self.fd()) else { return };
        let Some(acknowledged) = info.acknowledged() else { return };
        self.answers.note(acknowledged, info.unanswered() > 0, now);
        if let Some(silent) = self.answers.silent(patience, now) {
            self.suspend(err!(
                RemoteDisconnect,
                "control connection: the peer's kernel has acknowledged nothing for {silent:.1?}"
            ));
        }
    }

    /// Its sending half, for the thread that sends heartbeats.
    pub(crate) fn voice(&self) -> Arc<Voice> {
        self.voice.clone()
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.voice.sock.as_raw_fd()
    }

    /// The address of this end; none once the kernel has forgotten it.
    pub(crate) fn local_ip(&self) -> Option<IpAddr> {
        self.voice.sock.local_addr().ok().map(|address| plain(address.ip()))
    }

    /// Reads what has arrived. Returns the number of bytes, and whether there may be more. A socket that fails brings nothing more:
    /// [`ControlStream::lost`] says why.
    ///
    /// # Errors
    /// `RemoteDisconnect` when the peer has closed the stream, `Protocol` when the data was changed in transit.
    pub(crate) fn read(&mut self, rx: &mut RxBuffer) -> Result<(usize, bool)> {
        if self.lost.is_some() {
            return Ok((0, false));
        }
        // The first records may have arrived with the set-up's last message.
        self.open(rx)?;
        let room = &mut self.sealed[self.arrived..];
        let len = room.len();
        match (&self.voice.sock).read(room) {
            // Only an engine that ends does that: its goodbye came before, or its process has died.
            Ok(0) if !self.has_failed() => Err(err!(RemoteDisconnect, "the peer closed the connection")),
            Ok(0) => Ok((0, false)),
            Ok(n) => {
                self.arrived += n;
                if n == len {
                    self.make_room();
                }
                self.open(rx)?;
                Ok((n, n == len))
            }
            Err(e) if matches!(e.kind(), Io::WouldBlock | Io::Interrupted) => {
                self.has_failed();
                Ok((0, false))
            }
            Err(e) => {
                self.suspend(err!(RemoteDisconnect, "control connection: {e}"));
                Ok((0, false))
            }
        }
    }

    /// Whether the socket has failed as it was written to. What had arrived until then is read.
    fn has_failed(&mut self) -> bool {
        let why = self.voice.out.lock().lost.clone();
        why.map(|why| self.suspend(why)).is_some()
    }

    /// Grows the buffer when more arrives than fits: most connections never need room for two records.
    fn make_room(&mut self) {
        let len = (2 * self.sealed.len()).min((2 * MAX_RECORD).max(self.sealed.len()));
        self.sealed.resize(len, 0);
    }

    /// Opens all complete records.
    fn open(&mut self, rx: &mut RxBuffer) -> Result<()> {
        let (mut at, mut acknowledged) = (0, 0);
        while let Opened::Record { plain, consumed } = self.opener.open(&mut self.sealed[at..self.arrived])? {
            let Some((opened, frames)) = self.sealed[at..at + plain].split_first_chunk::<OPENED>() else {
                bail!(Protocol, "a record of {plain} bytes on the control connection")
            };
            acknowledged = u64::from_le_bytes(*opened);
            rx.extend(frames)?;
            at += consumed;
        }
        if at > 0 {
            self.sealed.copy_within(at..self.arrived, 0);
            self.arrived -= at;
            self.acknowledge(at, acknowledged)?;
        }
        Ok(())
    }

    /// Records of so many bytes were opened. The peer says in the last one that it has opened all of this engine below `acknowledged`.
    fn acknowledge(&mut self, bytes: usize, acknowledged: u64) -> Result<()> {
        let mut out = self.voice.out.lock();
        (out.opened, out.news) = (self.opener.number(), out.news + bytes);
        out.sent.acknowledged(acknowledged)?;
        if out.owes() {
            let mut total = 0;
            if out.write(&self.voice.sock, &mut total) && out.seal_next(&mut TxQueue::default())? {
                out.write(&self.voice.sock, &mut total);
            }
            out.kept += total;
            (self.pending, self.full) = (out.pending(), out.is_full());
        }
        Ok(())
    }

    /// Sends what the socket takes of `tx`, until `most` bytes or one record more have been sent. Returns the bytes sent since
    /// the last call.
    pub(crate) fn flush(&mut self, tx: &mut TxQueue, most: usize) -> Result<usize> {
        let mut out = self.voice.out.lock();
        let mut total = 0;
        let flushed = loop {
            if !out.write(&self.voice.sock, &mut total) || total >= most {
                break Ok(());
            }
            match out.seal_next(tx) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        (self.pending, self.full, self.failing) = (out.pending(), out.is_full(), out.lost.is_some());
        let kept = std::mem::take(&mut out.kept);
        drop(out);
        if total > 0 {
            let now = self.voice.clock();
            self.voice.spoke.store(now, Ordering::Relaxed);
            self.voice.driven.store(now, Ordering::Relaxed);
        }
        flushed.map(|()| total + kept)
    }

    /// Whether the socket has failed as it was written to, and a read finds the rest.
    pub(crate) fn is_failing(&self) -> bool {
        self.failing && self.lost.is_none()
    }

    /// Why the socket is of no use any more, if it is so. Then nothing is read or sent until [`ControlStream::resume`].
    pub(crate) fn lost(&self) -> Option<&Error> {
        self.lost.as_ref()
    }

    /// Whether nothing can be sent, however much room the socket has.
    pub(crate) fn is_stuck(&self) -> bool {
        self.lost.is_some() || self.full
    }

    /// Gives up the socket. Returns how many records of the peer were opened; no more of it will be, so the peer may send the others again.
    /// The kernel must not go on acknowledging them: a peer that the socket still answers would wait on it instead of making another.
    pub(crate) fn suspend(&mut self, why: Error) -> u64 {
        // An error means that the connection is gone already.
        let _ = process::reset(self.voice.sock.as_fd());
        self.voice.out.lock().lost.get_or_insert_with(|| why.clone());
        self.lost.get_or_insert(why);
        // The record that has arrived in part comes again.
        self.arrived = 0;
        self.opener.number()
    }

    /// Goes on over another socket, under the number of the old one. `opened`: how many records the peer has opened; `raw`: the bytes
    /// that have arrived on the new socket.
    ///
    /// # Errors
    /// `Protocol` for a number of records that is impossible, `System`.
    pub(crate) fn resume(&mut self, sock: &TcpStream, opened: u64, raw: Vec<u8>) -> Result<()> {
        let mut out = self.voice.out.lock();
        out.sent.resume(opened)?;
        (self.pending, self.full) = (out.pending(), out.is_full());
        let set = sock.set_nonblocking(true).and_then(|()| socket2::SockRef::from(sock).set_tcp_user_timeout(self.patience));
        set.map_err(|e| Error::system("control socket", &e))?;
        reset_at_close(&self.voice.sock);
        // SAFETY: two open descriptors; the old one keeps its owner and gets another socket.
        if unsafe { libc::dup3(sock.as_raw_fd(), self.fd(), libc::O_CLOEXEC) } < 0 {
            return Err(Error::system("control socket", &std::io::Error::last_os_error()));
        }
        // From here on its end is that of the stream.
        let _ = socket2::SockRef::from(sock).set_linger(None);
        (self.arrived, self.sealed) = (raw.len(), raw);
        self.sealed.resize(self.arrived + BUFFER, 0);
        (out.lost, self.lost, self.failing, self.answers) = (None, None, false, Answers::new(Instant::now()));
        let now = self.voice.clock();
        self.voice.spoke.store(now, Ordering::Relaxed);
        self.voice.driven.store(now, Ordering::Relaxed);
        Ok(())
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
        if self.lost.is_some() {
            return true;
        }
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
        let a = ControlStream::new(sock, session(Direction::ToListening), Vec::new()).unwrap();
        let sock = listener.accept().unwrap().0;
        [a, ControlStream::new(sock, session(Direction::ToConnecting), Vec::new()).unwrap()]
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
            let sealed = a.voice.out.lock().sent.unwritten();
            assert!(sealed <= MAX_RECORD, "{sealed} bytes are sealed");
            left += sent;
            assert!(left + a.pending() + tx.pending() >= queued, "everything that waits counts");
            b.read(&mut rx).unwrap();
            a.read(&mut RxBuffer::default()).unwrap();
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
        for early in [1, BUFFER - 1, BUFFER, BUFFER + 1, 40_000] {
            let [mut a, b] = pair();
            let mut tx = TxQueue::default();
            tx.push(&Frame::Notify { name: b"n", message: &[7; 60_000] });
            let Voice { out, .. } = &*a.voice;
            assert!(out.lock().seal_next(&mut tx).unwrap());
            // The first bytes of the record arrive with the set-up's last message.
            let raw = out.lock().sent.next().unwrap()[..early].to_vec();
            out.lock().sent.wrote(early);
            let Ok(Voice { sock, .. }) = Arc::try_unwrap(b.voice) else { panic!("another reference is left") };
            let session = Session::new(Direction::ToConnecting, &[7; 32], b"test").unwrap();
            let mut b = ControlStream::new(sock, session, raw).unwrap();
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

    /// Connects both ends again, and says to each how much the other one has opened.
    fn reconnect([a, b]: [&mut ControlStream; 2]) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sock = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let opened = [&mut *a, &mut *b].map(|end| end.suspend(err!(RemoteDisconnect, "simulated")));
        a.resume(&sock, opened[1], Vec::new()).unwrap();
        b.resume(&listener.accept().unwrap().0, opened[0], Vec::new()).unwrap();
    }

    fn take(rx: &mut RxBuffer, got: &mut Vec<Vec<u8>>) {
        while let Some((frame, len)) = rx.next().unwrap() {
            if let Frame::Notify { message, .. } = frame {
                got.push(message.to_vec());
            }
            rx.consume(len);
        }
    }

    #[test]
    fn frames_of_both_ends_arrive_once_and_in_order_however_often_the_socket_is_replaced() {
        const MANY: usize = 200;
        let [mut a, mut b] = pair();
        let bodies: Vec<Vec<u8>> = (0..MANY).map(|i| vec![i as u8; (i * i * 37) % 90_000]).collect();
        let (mut tx, mut rx, mut got) = <([TxQueue; 2], [RxBuffer; 2], [Vec<Vec<u8>>; 2])>::default();
        for body in &bodies {
            tx.iter_mut().for_each(|tx| tx.push(&Frame::Notify { name: b"n", message: body }));
        }
        let mut moves = 0;
        for round in 1..100_000 {
            a.flush(&mut tx[0], 1 + round % 100_000).unwrap();
            b.flush(&mut tx[1], 1).unwrap();
            if round % 3 > 0 {
                a.read(&mut rx[0]).unwrap();
            }
            b.read(&mut rx[1]).unwrap();
            if round % 23 == 0 {
                reconnect([&mut a, &mut b]);
                moves += 1;
            }
            rx.iter_mut().zip(&mut got).for_each(|(rx, got)| take(rx, got));
            if got.iter().all(|got| got.len() >= MANY) {
                break;
            }
        }
        assert!(got.iter().all(|got| *got == bodies) && moves > 3, "{moves} moves");
    }

    #[test]
    fn little_is_kept_of_what_the_peer_has_opened() {
        let [mut a, mut b] = pair();
        let (mut tx, mut rx, mut got, mut most) = (TxQueue::default(), RxBuffer::default(), Vec::new(), 0);
        for size in (0..2000).map(|i| (i * 97) % 3000) {
            tx.push(&Frame::Notify { name: b"n", message: &vec![7; size] });
            a.flush(&mut tx, usize::MAX).unwrap();
            b.read(&mut rx).unwrap();
            take(&mut rx, &mut got);
            a.read(&mut RxBuffer::default()).unwrap();
            most = most.max(a.voice.out.lock().sent.bytes());
        }
        assert!(got.len() > 1900 && (ACKNOWLEDGE..4 * ACKNOWLEDGE).contains(&most), "{most} bytes are kept");
    }

    /// A peer that opens what it gets, and never says so.
    #[test]
    fn a_peer_that_acknowledges_nothing_gets_no_more_than_a_window() {
        let [mut a, mut b] = pair();
        let (mut tx, mut rx, mut got) = (TxQueue::default(), RxBuffer::default(), Vec::new());
        for _ in 0..2 * WINDOW / 60_000 {
            tx.push(&Frame::Notify { name: b"n", message: &[7; 60_000] });
        }
        for _ in 0..50_000 {
            a.flush(&mut tx, usize::MAX).unwrap();
            b.read(&mut rx).unwrap();
            take(&mut rx, &mut got);
        }
        let kept = a.voice.out.lock().sent.bytes();
        assert!((WINDOW..WINDOW + 2 * MAX_RECORD).contains(&kept) && tx.pending() > WINDOW / 2, "{kept} bytes are kept");
        assert!(a.is_stuck(), "room in the socket would not help");
        // It goes on once the peer says what it has opened.
        while got.len() < 2 * WINDOW / 60_000 {
            a.read(&mut RxBuffer::default()).unwrap();
            a.flush(&mut tx, usize::MAX).unwrap();
            b.read(&mut rx).unwrap();
            take(&mut rx, &mut got);
        }
    }

    #[test]
    fn a_reset_suspends_the_stream_and_an_end_of_the_peer_does_not() {
        let [a, mut b] = pair();
        socket2::SockRef::from(&a.voice.sock).set_linger(Some(Duration::ZERO)).unwrap();
        drop(a);
        let (mut rx, mut tx) = (RxBuffer::default(), TxQueue::default());
        let until = Instant::now() + Duration::from_secs(60);
        while b.lost().is_none() {
            assert_eq!(b.read(&mut rx), Ok((0, false)));
            assert!(Instant::now() < until);
        }
        tx.push(&Frame::Ping { received: 1 });
        assert_eq!((b.flush(&mut tx, usize::MAX), b.read(&mut rx), b.is_stuck()), (Ok(0), Ok((0, false)), true));
        assert!(!b.voice().keep(Duration::ZERO, Duration::from_secs(3600)) && b.hung_up());
        let [a, mut b] = pair();
        drop(a);
        let ended = std::iter::from_fn(|| Some(b.read(&mut rx))).find(Result::is_err).unwrap();
        assert_eq!(ended.unwrap_err().kind(), crate::status::ErrorKind::RemoteDisconnect);
        assert!(b.lost().is_none());
    }

    #[test]
    fn a_stream_that_is_suspended_stops_answering_its_peer() {
        let [mut a, mut b] = pair();
        let mut rx = RxBuffer::default();
        a.suspend(err!(RemoteDisconnect, "simulated"));
        let until = Instant::now() + Duration::from_secs(60);
        while b.lost().is_none() {
            assert_eq!(b.read(&mut rx), Ok((0, false)), "an end of the stream");
            assert!(Instant::now() < until, "the peer does not learn of it");
        }
    }

    /// A socket that fails as it is written to still brings what the peer sent before.
    #[test]
    fn what_had_arrived_when_a_write_failed_is_read() {
        let [mut a, mut b] = pair();
        let (mut rx, mut tx, mut got) = (RxBuffer::default(), TxQueue::default(), Vec::new());
        tx.push(&Frame::Notify { name: b"n", message: b"goodbye" });
        a.flush(&mut tx, usize::MAX).unwrap();
        b.voice.out.lock().lost = Some(err!(RemoteDisconnect, "simulated"));
        b.flush(&mut tx, usize::MAX).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while b.lost().is_none() || got.is_empty() {
            b.read(&mut rx).unwrap();
            take(&mut rx, &mut got);
            assert!(Instant::now() < until && (b.lost().is_none() || !got.is_empty()));
        }
    }

    #[test]
    fn a_lie_about_opened_records_is_a_violation() {
        let kind = |found: Result<()>| found.unwrap_err().kind();
        let [mut a, b] = pair();
        let mut tx = TxQueue::default();
        for _ in 0..3 {
            tx.push(&Frame::Notify { name: b"n", message: &[7; 60_000] });
        }
        a.flush(&mut tx, usize::MAX).unwrap();
        let sock = b.voice.sock.try_clone().unwrap();
        a.suspend(err!(RemoteDisconnect, "simulated"));
        assert_eq!(kind(a.resume(&sock, u64::MAX, Vec::new())), crate::status::ErrorKind::Protocol);
        assert!(a.lost().is_some());
        // In the stream: one record of this end was sent, and the peer says that it has opened two.
        let [mut a, mut b] = pair();
        tx = TxQueue::default();
        tx.push(&Frame::Ping { received: 1 });
        a.flush(&mut tx, usize::MAX).unwrap();
        b.voice.out.lock().opened = 2;
        tx.push(&Frame::Ping { received: 1 });
        b.flush(&mut tx, usize::MAX).unwrap();
        let found =
            std::iter::from_fn(|| Some(a.read(&mut RxBuffer::default()))).find(|found| !matches!(found, Ok((0, _)))).unwrap();
        assert_eq!(kind(found.map(drop)), crate::status::ErrorKind::Protocol);
    }
}
