//! Moves arriving bytes straight to their destination: posted host memory, or the bounce region of a slot with its descriptors.
//! Stops at a message without a posted receive, so that TCP slows the sender down.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use libc::iovec;
use nccl_net_abi::{loadMeta, MAX_REQUESTS, NCCL_INTERNAL_ERROR, NCCL_SYSTEM_ERROR};

use crate::config::Config;
use crate::device::{demote, UnpackQueue};
use crate::fragment::{self, Fragmentation, Rng};
use crate::ledger::{Failure, Ledger};
use crate::protect::{Guard, Proof, MAX_HEAD};
use crate::quantum::{DataSocket, Turn, IOV_MAX, TURN_BYTES};
use crate::slot::{Body, Cursor, Header, HEADER};

/// Size of the read-ahead buffer: small messages share system calls.
const AHEAD: usize = 16 << 10;
/// Behind a message of this size or more, only the next header is read ahead.
const LARGE: usize = 64 << 10;

const ORDERLY_END: &str = "the peer closed the connection";

/// Receive state of a comm.
pub struct RecvIo {
    ahead: Box<[u8; AHEAD]>,
    start: usize,
    end: usize,
    cursor: Cursor,
    /// Bytes still missing from the current message; none between messages.
    missing: Option<usize>,
    /// Why no more bytes will come.
    ended: Option<String>,
    batch: Vec<iovec>,
    plan: Vec<loadMeta>,
    rng: Rng,
    mode: Fragmentation,
    queue: Option<Arc<UnpackQueue>>,
    guarded: Option<Box<Guarded>>,
    /// Bytes of a message's head.
    head: usize,
}

/// State of a protected comm for the current message.
struct Guarded {
    guard: Guard,
    proof: Proof,
    /// Buffer for a sealed message that is not opened in place; else empty.
    through: Vec<iovec>,
    scratch: Vec<u8>,
}

impl Guarded {
    /// Where the bytes of the message for these segments are received.
    fn landing<'a>(&'a self, iov: &'a [iovec]) -> &'a [iovec] {
        if self.through.is_empty() {
            iov
        } else {
            &self.through
        }
    }

    /// A message of `len` bytes for these segments begins. A sealed one is opened in place only in the plugin's own memory: other
    /// writers may write to the application's memory at the same time (an abandoned earlier read among them), which would look like an
    /// altered message.
    fn begin(&mut self, proof: Proof, body: &Body, len: usize) {
        self.proof = proof;
        self.through.clear();
        if (body.iov.len() > 1 || !body.device) && matches!(self.guard, Guard::Sealed(_)) {
            self.scratch.resize(len.max(self.scratch.len()), 0);
            self.through.push(iovec { iov_base: self.scratch.as_mut_ptr().cast(), iov_len: len });
        }
    }

    /// Checks message `seq` of `len` bytes and copies it to its destination.
    ///
    /// # Safety
    /// The segments are the request's, writable, with room for `len` bytes.
    unsafe fn finish(&mut self, seq: u64, iov: &[iovec], len: usize) -> Result<(), String> {
        // SAFETY: the segments by contract; `through` is our own memory of `len` bytes.
        unsafe { self.guard.finish(seq, self.proof, self.landing(iov), len)? };
        if !self.through.is_empty() {
            // SAFETY: as above.
            unsafe { Cursor::default().scatter(iov, &self.scratch[..len]) };
        }
        Ok(())
    }
}

enum Read {
    /// Everything requested.
    Full,
    /// Less: the socket is empty.
    Short,
    /// The peer has ended its direction.
    End,
}

// SAFETY: `batch` is scratch of one turn; its pointers are not used between turns.
unsafe impl Send for RecvIo {}

impl RecvIo {
    /// The state of a new comm.
    pub fn new(config: &Config, seed: u64) -> RecvIo {
        RecvIo {
            ahead: Box::new([0; AHEAD]),
            start: 0,
            end: 0,
            cursor: Cursor::default(),
            missing: None,
            ended: None,
            batch: Vec::new(),
            plan: Vec::new(),
            rng: Rng::new(seed),
            mode: config.fragmentation,
            queue: None,
            guarded: None,
            head: HEADER,
        }
    }

    /// Protects all messages. No receive was posted yet, so nothing was read ahead.
    pub fn protect(&mut self, guard: Guard) {
        self.head = guard.head();
        let (through, scratch) = (Vec::with_capacity(1), Vec::new());
        self.guarded = Some(Box::new(Guarded { guard, proof: Proof::Checksum(0), through, scratch }));
    }

    /// Frees device memory; the comm is closed.
    pub fn release(&mut self) {
        self.queue = None;
    }

    /// One turn. `queue` gives the unpack queue of device receives, once one was posted.
    pub fn turn(
        &mut self,
        ledger: &Ledger,
        socket: DataSocket,
        queue: &dyn Fn() -> Option<Arc<UnpackQueue>>,
    ) -> Result<Turn, Failure> {
        let mut budget = TURN_BYTES;
        let mut drained = false;
        loop {
            let seq = ledger.completed();
            if seq == ledger.posted() {
                if !ledger.rest(seq) {
                    continue;
                }
                self.watch_for_end(seq, socket)?;
                return Ok(Turn::Wait);
            }
            if ledger.should_stop() {
                return Ok(Turn::Wait);
            }
            // SAFETY: posted, not completed, and the I/O lock is held.
            let body = unsafe { ledger.slot(seq).body() };
            if self.missing.is_none() {
                let broken = |why: String| Failure::new(NCCL_INTERNAL_ERROR, why);
                if let Some((header, proof)) = self.peek_header(seq).map_err(broken)? {
                    self.begin(ledger, seq, header, body, queue).map_err(broken)?;
                    if let Some(guarded) = &mut self.guarded {
                        guarded.begin(proof, body, header.len);
                    }
                }
            }
            if self.missing.is_some() && self.take_ahead(body) {
                self.finish(ledger, seq, body).map_err(|why| Failure::new(NCCL_INTERNAL_ERROR, why))?;
                continue;
            }
            if let Some(why) = &self.ended {
                return Err(Failure::new(NCCL_SYSTEM_ERROR, why.as_str()));
            }
            if drained && !socket.hung_up {
                return Ok(Turn::Wait);
            }
            if budget == 0 {
                return Ok(Turn::More);
            }
            match self.read(ledger, socket.fd, body, &mut budget) {
                Ok(Read::Full) => {}
                // The next arrival raises a new event of the edge-triggered epoll.
                Ok(Read::Short) => drained = true,
                Ok(Read::End) => self.ended = Some(ORDERLY_END.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Wait),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.ended = Some(error.to_string()),
            }
        }
    }

    /// Nothing is posted: checks whether anything can still come. Fails if the stream has ended before a whole message `seq`.
    fn watch_for_end(&mut self, seq: u64, socket: DataSocket) -> Result<(), Failure> {
        if socket.hung_up && self.ended.is_none() {
            let mut byte = 0u8;
            // SAFETY: one byte of room.
            let got = unsafe { libc::recv(socket.fd, (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
            let error = io::Error::last_os_error();
            if got == 0 {
                self.ended = Some(ORDERLY_END.to_owned());
            } else if got < 0 && error.kind() != io::ErrorKind::WouldBlock {
                self.ended = Some(error.to_string());
            }
        }
        if self.ended.is_none() {
            return Ok(());
        }
        let left = self.end - self.start;
        // A head that does not open is not a message.
        let whole = match self.peek_header(seq) {
            Ok(Some((header, _))) => header.seq == seq as u32 && left - self.head >= header.len,
            Ok(None) | Err(_) => false,
        };
        if whole {
            return Ok(());
        }
        Err(Failure::new(NCCL_SYSTEM_ERROR, self.ended.as_deref().unwrap_or(ORDERLY_END)))
    }

    /// The header of message `seq`, once its head is complete, and what its payload must match.
    fn peek_header(&mut self, seq: u64) -> Result<Option<(Header, Proof)>, String> {
        let bytes = &self.ahead[self.start..self.end];
        match &mut self.guarded {
            None => Ok(bytes.first_chunk::<HEADER>().map(|bytes| (Header::parse(*bytes), Proof::Checksum(0)))),
            Some(guarded) => bytes.get(..self.head).map(|head| guarded.guard.open(seq, head)).transpose(),
        }
    }

    /// Checks a complete header against the posted receive and lays out a device receive.
    fn begin(
        &mut self,
        ledger: &Ledger,
        seq: u64,
        header: Header,
        body: &mut Body,
        queue: &dyn Fn() -> Option<Arc<UnpackQueue>>,
    ) -> Result<(), String> {
        admit(header, seq, body)?;
        let (len, slot) = (header.len, ledger.slot(seq));
        self.start += self.head;
        self.missing = Some(len);
        self.cursor = Cursor::default();
        if body.device {
            if self.queue.is_none() {
                self.queue = queue();
            }
            let queue = self.queue.as_ref().ok_or("a device receive without an unpack queue")?;
            let region = queue.bounce_len / MAX_REQUESTS;
            let place = queue.free.lock().pop().ok_or("no region of the bounce buffer is free")?;
            slot.region.store(place, Ordering::Relaxed);
            let at = place * region;
            fragment::plan(self.mode, len, at, &mut self.rng, &mut self.plan);
            body.iov.clear();
            let place =
                |e: &loadMeta| iovec { iov_base: queue.bounce.wrapping_add(e.src_off as usize).cast(), iov_len: e.len as usize };
            body.iov.extend(self.plan.iter().map(place));
            let extent = self.plan.iter().map(|e| (e.src_off + e.len) as usize - at).max().unwrap_or(0);
            slot.extent.store(extent, Ordering::Relaxed);
        }
        slot.received.store(len, Ordering::Relaxed);
        Ok(())
    }

    /// Copies read-ahead bytes to their destination; true when the message is complete.
    fn take_ahead(&mut self, body: &Body) -> bool {
        let missing = self.missing.unwrap_or(0);
        let len = missing.min(self.end - self.start);
        let iov = self.guarded.as_ref().map_or(&body.iov[..], |g| g.landing(&body.iov));
        // SAFETY: the segments have room for the message, of which `missing` bytes are still to come; the poster keeps them
        // valid until the request is done or the comm is closed.
        unsafe { self.cursor.scatter(iov, &self.ahead[self.start..self.start + len]) };
        self.start += len;
        self.missing = Some(missing - len);
        missing == len
    }

    /// One system call: the rest of the message up to the budget, and what follows it into the read-ahead buffer.
    fn read(&mut self, ledger: &Ledger, fd: i32, body: &Body, budget: &mut usize) -> io::Result<Read> {
        debug_assert!(self.head <= MAX_HEAD && MAX_HEAD < AHEAD);
        self.ahead.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        self.batch.clear();
        let missing = self.missing.unwrap_or(0);
        let iov = self.guarded.as_ref().map_or(&body.iov[..], |g| g.landing(&body.iov));
        let payload = self.cursor.collect(iov, missing.min(*budget), IOV_MAX - 1, &mut self.batch);
        let room = AHEAD - self.end;
        let ahead = match payload {
            _ if payload < missing => 0,
            LARGE.. => self.head,
            _ => room,
        };
        if ahead > 0 {
            let base = self.ahead[self.end..].as_mut_ptr();
            self.batch.push(iovec { iov_base: base.cast(), iov_len: ahead });
        }
        // SAFETY: an all-zero msghdr is a valid empty one.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.batch.as_mut_ptr();
        message.msg_iovlen = self.batch.len() as _;
        // SAFETY: every segment is writable: our own buffer, or memory that the poster keeps valid until the request is done
        // or the comm is closed.
        let got = unsafe { libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        let direct = got.min(payload);
        if body.device && self.queue.as_ref().is_some_and(|q| q.read_by_bus) {
            let mut left = direct;
            for segment in &self.batch {
                let len = segment.iov_len.min(left);
                demote(segment.iov_base.cast_const().cast(), len);
                left -= len;
            }
        }
        self.cursor.advance(iov, direct);
        self.missing = self.missing.map(|m| m - direct);
        self.end += got - direct;
        *budget = budget.saturating_sub(got);
        ledger.received.set(ledger.received.get() + got as u64);
        Ok(match got {
            0 => Read::End,
            _ if got == payload + ahead => Read::Full,
            _ => Read::Short,
        })
    }

    /// The message is complete: verifies it if protected, publishes its descriptors, then its completion.
    fn finish(&mut self, ledger: &Ledger, seq: u64, body: &Body) -> Result<(), String> {
        self.missing = None;
        if let Some(guarded) = &mut self.guarded {
            let len = ledger.slot(seq).received.load(Ordering::Relaxed);
            // SAFETY: the request's own memory, which has room for the message; the poster does not touch it until the request is done.
            unsafe { guarded.finish(seq, &body.iov, len)? };
        }
        if let (true, Some(queue)) = (body.device, &self.queue) {
            let row = (seq % MAX_REQUESTS as u64) as usize;
            fragment::publish_order(self.mode, &mut self.rng, &mut self.plan);
            // SAFETY: the queue is ours, the row belongs to a slot that is not done, and a plan has fewer entries than a row.
            unsafe {
                let entries = (&raw mut (*queue.meta).mem[row]).cast::<loadMeta>();
                std::ptr::copy_nonoverlapping(self.plan.as_ptr(), entries, self.plan.len());
                let count = AtomicU64::from_ptr(&raw mut (*queue.meta).cnt[row]);
                count.store(self.plan.len() as u64, Ordering::Release);
            }
        }
        ledger.complete(seq + 1);
        Ok(())
    }
}

/// Whether the message matches the posted receive.
pub fn admit(header: Header, seq: u64, body: &Body) -> Result<(), String> {
    let Header { len, tag, .. } = header;
    if header.seq != seq as u32 {
        return Err(format!("expected message {seq}, got message {} or other bytes", header.seq));
    }
    if tag != body.tag {
        return Err(format!("message {seq} has tag {tag}, but the receive was posted for tag {}", body.tag));
    }
    if len == 0 || len > body.total || (body.exact && len != body.total) {
        return Err(format!("message {seq} has {len} bytes, but the receive was posted for {}", body.total));
    }
    Ok(())
}
