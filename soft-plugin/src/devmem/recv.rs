//! Receives a comm's messages: heads from one connection, payload from the other, into descriptors of what the NIC has written.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use devmem::{Piece, Received};
use nccl_net_abi::{loadMeta, MAX_REQUESTS, NCCL_INTERNAL_ERROR, NCCL_SYSTEM_ERROR};

use super::ends::check_open;
use super::layout::{held_fragments, most_fragments};
use super::lent::{Holding, Lent};
use crate::device::UnpackQueue;
use crate::ledger::{Failure, Ledger};
use crate::logger::Limited;
use crate::quantum::{DataSocket, Turn, TURN_BYTES};
use crate::recv::admit;
use crate::slot::{Header, HEADER};

/// Bytes that one call can bring to the host.
const BUFFER: usize = 256 << 10;
/// Most pieces that one call takes.
const PIECES: usize = 256;

/// A message whose payload is coming.
struct Message {
    len: usize,
    got: usize,
    plan: Vec<loadMeta>,
    holding: Holding,
    /// Bytes in the region.
    filled: usize,
}

/// Receive state of a comm.
pub struct DeviceRecv {
    /// None once the comm is closed.
    lent: Option<Arc<Lent>>,
    queue: Option<Arc<UnpackQueue>>,
    head: [u8; HEADER],
    head_got: usize,
    message: Option<Message>,
    /// What the last call has brought, as far as it is not in a message; bytes that came to the host begin at `at` of the buffer.
    pieces: VecDeque<Piece>,
    buffer: Vec<u8>,
    at: usize,
    limit: usize,
}

impl Drop for DeviceRecv {
    fn drop(&mut self) {
        self.release();
    }
}

fn broken(why: impl Into<String>) -> Failure {
    Failure::new(NCCL_INTERNAL_ERROR, why)
}

fn lost(why: impl Into<String>) -> Failure {
    Failure::new(NCCL_SYSTEM_ERROR, why)
}

impl DeviceRecv {
    /// The state of a new comm with messages of up to `limit` bytes.
    pub fn new(lent: Arc<Lent>, limit: usize) -> DeviceRecv {
        DeviceRecv {
            lent: Some(lent),
            queue: None,
            head: [0; HEADER],
            head_got: 0,
            message: None,
            pieces: VecDeque::new(),
            buffer: vec![0; BUFFER.min(limit)],
            at: 0,
            limit,
        }
    }

    /// The payload connection, while the comm is open.
    pub fn lent(&self) -> Option<&Arc<Lent>> {
        self.lent.as_ref()
    }

    /// Closes the payload connection, once nothing else refers to it.
    pub fn release(&mut self) {
        let mut tokens = self.message.take().map(|message| message.holding.tokens).unwrap_or_default();
        for piece in self.pieces.drain(..) {
            if let Piece::Device(fragment) = piece {
                tokens.add(fragment.token);
            }
        }
        if let Some(lent) = self.lent.take() {
            lent.keep(tokens);
        }
        self.queue = None;
    }

    /// One turn. `queue` gives the unpack queue, once a receive was posted.
    pub fn turn(
        &mut self,
        ledger: &Ledger,
        socket: DataSocket,
        queue: &dyn Fn() -> Option<Arc<UnpackQueue>>,
    ) -> Result<Turn, Failure> {
        let Some(lent) = self.lent.clone() else { return Ok(Turn::Wait) };
        if !lent.seat().is_trusted() {
            return Err(broken("a pattern from the same peer came out wrong since: what the NIC writes cannot be trusted"));
        }
        let mut budget = TURN_BYTES;
        loop {
            let seq = ledger.completed();
            if seq == ledger.posted() {
                if !ledger.rest(seq) {
                    continue;
                }
                self.watch_for_end(socket)?;
                return Ok(Turn::Wait);
            }
            if ledger.should_stop() {
                return Ok(Turn::Wait);
            }
            if budget == 0 {
                return Ok(Turn::More);
            }
            if self.message.is_none() && !self.begin(ledger, &lent, socket, seq)? {
                return Ok(Turn::Wait);
            }
            let Some(message) = &mut self.message else { return Err(broken("a message vanished")) };
            if message.got == message.len {
                self.finish(ledger, &lent, seq, queue)?;
                continue;
            }
            if !self.pieces.is_empty() {
                if !self.place(&lent)? {
                    return Ok(Turn::Wait);
                }
                continue;
            }
            let room = (message.len - message.got).min(self.buffer.len()).min(budget);
            match devmem::receive(lent.connection(), &mut self.buffer[..room], PIECES) {
                Ok(Received::End) => return Err(lost("the peer closed the connection for payload")),
                Ok(Received::Plain(len)) => self.pieces.push_back(Piece::Linear(len as u32)),
                Ok(Received::Pieces(pieces)) => self.pieces.extend(pieces),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Turn::Wait),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(lost(format!("device memory: {e}"))),
            }
            self.at = 0;
            let came: usize = self.pieces.iter().map(Piece::length).sum();
            ledger.received.set(ledger.received.get() + came as u64);
            budget = budget.saturating_sub(came);
        }
    }

    /// Reads the next head, and begins its message: false if that must wait.
    fn begin(&mut self, ledger: &Ledger, lent: &Lent, socket: DataSocket, seq: u64) -> Result<bool, Failure> {
        let roomy = || lent.fragments() <= held_fragments(self.limit);
        if !roomy() && lent.wait_for(roomy) {
            return Ok(false);
        }
        while self.head_got < HEADER {
            let rest = &mut self.head[self.head_got..];
            // SAFETY: the rest of the head is writable.
            let got = unsafe { libc::recv(socket.fd, rest.as_mut_ptr().cast(), rest.len(), libc::MSG_DONTWAIT) };
            match (usize::try_from(got), io::Error::last_os_error()) {
                (Ok(0), _) => return Err(lost("the peer closed the connection")),
                (Ok(got), _) => self.head_got += got,
                (Err(_), e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                (Err(_), e) if e.kind() == ErrorKind::Interrupted => {}
                (Err(_), e) => return Err(lost(e.to_string())),
            }
        }
        self.head_got = 0;
        let header = Header::parse(self.head);
        // SAFETY: posted, not completed, and the I/O lock is held.
        let body = unsafe { ledger.slot(seq).body() };
        admit(header, seq, body).map_err(broken)?;
        ledger.slot(seq).received.store(header.len, Ordering::Relaxed);
        self.message = Some(Message { len: header.len, got: 0, plan: Vec::new(), holding: Holding::default(), filled: 0 });
        Ok(true)
    }

    /// Adds what has come to the message: false if that must wait for a region.
    fn place(&mut self, lent: &Lent) -> Result<bool, Failure> {
        let Some(message) = &mut self.message else { return Err(broken("payload without a message")) };
        while let Some(piece) = self.pieces.front() {
            let len = piece.length();
            if len > message.len - message.got {
                return Err(broken("the kernel brings more bytes than were asked for"));
            }
            let at = match piece {
                Piece::Device(fragment) => {
                    lent.area().check(fragment).map_err(broken)?;
                    message.holding.tokens.add(fragment.token);
                    fragment.offset as usize
                }
                Piece::Linear(_) => {
                    if message.holding.region.is_none() {
                        message.holding.region = lent.take_region();
                    }
                    let Some(region) = message.holding.region else {
                        let free = || lent.has_region();
                        match lent.wait_for(free) {
                            true => return Ok(false),
                            false => continue,
                        }
                    };
                    static LINE: Limited = Limited::new();
                    LINE.info("payload came to the host and was copied to device memory: it was not steered, or not split from its headers");
                    let bytes = &self.buffer[self.at..self.at + len];
                    let at = region + message.filled;
                    lent.area().memory().write(at, bytes).map_err(|e| broken(format!("device memory cannot be written: {e}")))?;
                    message.filled += len;
                    self.at += len;
                    at
                }
            };
            describe(&mut message.plan, at, len, message.got);
            message.got += len;
            self.pieces.pop_front();
            let most = most_fragments(self.limit);
            if message.plan.len() > most || message.holding.tokens.len() > most {
                return Err(broken(format!("a message of {} bytes came in more than {most} fragments", message.len)));
            }
        }
        Ok(true)
    }

    /// The message is complete: publishes its descriptors, then its completion.
    fn finish(
        &mut self,
        ledger: &Ledger,
        lent: &Lent,
        seq: u64,
        queue: &dyn Fn() -> Option<Arc<UnpackQueue>>,
    ) -> Result<(), Failure> {
        if self.queue.is_none() {
            self.queue = queue();
        }
        let Some(queue) = &self.queue else { return Err(broken("a device receive without an unpack queue")) };
        let Some(message) = self.message.take() else { return Err(broken("a message vanished")) };
        let row = (seq % MAX_REQUESTS as u64) as usize;
        lent.hold(row, message.holding);
        // SAFETY: the queue is ours, the row belongs to a slot that is not done, and a plan has fewer entries than a row.
        unsafe {
            let entries = (&raw mut (*queue.meta).mem[row]).cast::<loadMeta>();
            std::ptr::copy_nonoverlapping(message.plan.as_ptr(), entries, message.plan.len());
            let count = AtomicU64::from_ptr(&raw mut (*queue.meta).cnt[row]);
            count.store(message.plan.len() as u64, Ordering::Release);
        }
        ledger.complete(seq + 1);
        Ok(())
    }

    /// Nothing is posted: fails once the peer has closed the connection and everything was read.
    fn watch_for_end(&self, socket: DataSocket) -> Result<(), Failure> {
        if !socket.hung_up || self.head_got > 0 {
            return Ok(());
        }
        let mut byte = 0u8;
        // SAFETY: one byte of room.
        let got = unsafe { libc::recv(socket.fd, (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        match (got, io::Error::last_os_error()) {
            (0, _) => Err(lost("the peer closed the connection")),
            (..0, e) if e.kind() != ErrorKind::WouldBlock => Err(lost(e.to_string())),
            (..0, _) => self.lent.as_ref().map_or(Ok(()), |lent| check_open(lent.connection())),
            _ => Ok(()),
        }
    }
}

/// Adds a descriptor for `len` bytes at `at` of the area, which are the next of the message; what continues the last one joins it.
fn describe(plan: &mut Vec<loadMeta>, at: usize, len: usize, done: usize) {
    match plan.last_mut() {
        Some(last) if last.src_off as usize + last.len as usize == at => last.len += len as u32,
        _ => plan.push(loadMeta { src_off: at as u32, len: len as u32, dst_off: done as u64 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_together_is_described_together() {
        let mut plan = Vec::new();
        let mut done = 0;
        for (at, len) in [(0, 4096), (4096, 100), (8192, 4096), (12288, 4), (0, 9)] {
            describe(&mut plan, at, len, done);
            done += len;
        }
        let entry = |src_off, len, dst_off| loadMeta { src_off, len, dst_off };
        assert_eq!(plan, [entry(0, 4196, 0), entry(8192, 4100, 4196), entry(0, 9, 8296)]);
    }
}
