//! Sends a comm's messages: heads on one connection, payload from a dma-buf on the other. A message is done when no packet refers to its
//! memory any more.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devmem::Calls;
use nccl_net_abi::{MAX_REQUESTS, NCCL_SYSTEM_ERROR};
use socket2::{SockRef, TcpKeepalive};

use super::area::Area;
use super::ends::{check_open, reset};
use crate::ledger::{Failure, Ledger};
use crate::quantum::{DataSocket, Turn, TURN_BYTES};
use crate::slot::{Body, HEADER};

/// How long a closed comm waits for packets that refer to its memory.
const SETTLE: Duration = Duration::from_secs(1);
/// How long a NIC may be down, and how often sends are tried again meanwhile.
const OUTAGE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(1);
/// Keepalive probes of a connection for payload.
const PROBE: Duration = Duration::from_secs(1);
const PROBES: u32 = 30;

/// Send state of a comm.
pub struct DeviceSend {
    /// None once the comm is closed.
    connection: Option<OwnedFd>,
    area: Arc<Area>,
    calls: Calls,
    /// The first message that is not with the kernel as a whole, and how many bytes of its head and payload are.
    next: u64,
    head: usize,
    payload: usize,
    /// Since when the kernel refuses sends because the NIC is down.
    outage: Option<Instant>,
    /// Calls made when the last byte of each message in the window was with the kernel.
    last: [u32; MAX_REQUESTS],
}

fn lost(why: impl Into<String>) -> Failure {
    Failure::new(NCCL_SYSTEM_ERROR, why)
}

impl DeviceSend {
    /// The state of a new comm, on whose payload connection these calls were made.
    pub fn new(connection: OwnedFd, area: Arc<Area>, calls: Calls) -> DeviceSend {
        // Best effort: without probes an idle connection stays unusable after its NIC was down.
        let probes = TcpKeepalive::new().with_time(PROBE).with_interval(PROBE).with_retries(PROBES);
        let _ = SockRef::from(&connection).set_tcp_keepalive(&probes);
        DeviceSend {
            connection: Some(connection),
            area,
            calls,
            next: 0,
            head: 0,
            payload: 0,
            outage: None,
            last: [0; MAX_REQUESTS],
        }
    }

    /// The payload connection, while the comm is open.
    pub fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    /// The area's NIC, from whose memory bindings it can send.
    pub fn interface(&self) -> u32 {
        self.area.nic().interface()
    }

    /// Bytes of the oldest unfinished message that are in the kernel.
    pub fn begun(&self, completed: u64) -> usize {
        if completed == self.next {
            self.payload
        } else {
            0
        }
    }

    /// One turn.
    pub fn turn(&mut self, ledger: &Ledger, socket: DataSocket) -> Result<Turn, Failure> {
        let Some(connection) = self.connection.take() else { return Ok(Turn::Wait) };
        let turn = self.advance(ledger, socket, connection.as_fd());
        self.connection = Some(connection);
        turn
    }

    fn advance(&mut self, ledger: &Ledger, socket: DataSocket, connection: BorrowedFd<'_>) -> Result<Turn, Failure> {
        if socket.hung_up {
            // Also the way in which the kernel says that calls have ended.
            // SAFETY: the comm's socket, which outlives its turn.
            check_open(unsafe { BorrowedFd::borrow_raw(socket.fd) })?;
            check_open(connection)?;
        }
        let mut budget = TURN_BYTES;
        loop {
            self.collect(ledger, connection)?;
            if ledger.should_stop() {
                return Ok(Turn::Wait);
            }
            if self.next == ledger.posted() {
                match ledger.rest(self.next) {
                    true => return Ok(Turn::Wait),
                    false => continue,
                }
            }
            if budget == 0 {
                return Ok(Turn::More);
            }
            let seq = self.next;
            // SAFETY: posted, not completed, and the I/O lock is held.
            let body = unsafe { ledger.slot(seq).body() };
            let before = self.payload;
            if !self.push(socket, connection, body)? {
                return Ok(Turn::Wait);
            }
            if self.outage.is_some() {
                return Ok(Turn::More);
            }
            budget = budget.saturating_sub(self.payload - before);
            if self.head == HEADER && self.payload == body.total - HEADER {
                self.last[(seq % MAX_REQUESTS as u64) as usize] = self.calls.made();
                (self.next, self.head, self.payload) = (seq + 1, 0, 0);
            }
        }
    }

    /// Completes the messages whose calls have ended.
    fn collect(&mut self, ledger: &Ledger, connection: BorrowedFd<'_>) -> Result<(), Failure> {
        if self.calls.all_ended() {
            return Ok(());
        }
        devmem::completed(connection, &mut self.calls).map_err(|e| lost(e.to_string()))?;
        let mut completed = ledger.completed();
        let before = completed;
        while completed < self.next && self.calls.reached(self.last[(completed % MAX_REQUESTS as u64) as usize]) {
            completed += 1;
        }
        if completed > before {
            ledger.complete(completed);
        }
        Ok(())
    }

    /// Gives the kernel more of a message: false when it takes no more now.
    fn push(&mut self, socket: DataSocket, connection: BorrowedFd<'_>, body: &Body) -> Result<bool, Failure> {
        while self.head < HEADER {
            let rest = &body.header[self.head..];
            // SAFETY: the rest of the head is read during the call.
            let sent =
                unsafe { libc::send(socket.fd, rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
            match (usize::try_from(sent), io::Error::last_os_error()) {
                (Ok(sent), _) => self.head += sent,
                (Err(_), e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                (Err(_), e) if e.kind() == ErrorKind::Interrupted => {}
                (Err(_), e) => return Err(lost(e.to_string())),
            }
        }
        let left = body.total - HEADER - self.payload;
        match devmem::send(connection, body.binding, body.offset + self.payload, left.min(TURN_BYTES)) {
            Ok(sent) => {
                self.payload += sent;
                self.outage = None;
                self.calls.add();
                Ok(true)
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == ErrorKind::Interrupted => Ok(true),
            Err(e) if self.is_outage(&e) => {
                // No event tells the end: the kernel looks for a route only for a keepalive probe.
                std::thread::sleep(RETRY);
                Ok(true)
            }
            // The end of an earlier call makes room.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) && !self.calls.all_ended() => Ok(false),
            Err(e) => Err(lost(format!("sending from device memory: {e}"))),
        }
    }

    /// Whether the kernel refuses a send because the NIC is down, which an ordinary send would not show. The connection outlasts that.
    fn is_outage(&mut self, error: &io::Error) -> bool {
        let down = match error.raw_os_error() {
            Some(libc::ENODEV | libc::ENETDOWN | libc::ENETUNREACH | libc::EHOSTUNREACH) => true,
            // What the first call afterwards says.
            Some(libc::EINVAL) => self.outage.is_some(),
            _ => false,
        };
        down && self.outage.get_or_insert_with(Instant::now).elapsed() < OUTAGE
    }

    /// Closes the payload connection: when it returns true, no packet refers to the memory of any message.
    pub fn close(&mut self) -> bool {
        let Some(connection) = self.connection.take() else { return true };
        let until = Instant::now() + SETTLE;
        if !self.calls.all_ended() {
            self.update(connection.as_fd());
        }
        if !self.calls.all_ended() {
            reset(connection.as_fd());
        }
        while !self.calls.all_ended() && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(200));
            self.update(connection.as_fd());
        }
        self.calls.all_ended()
    }

    fn update(&mut self, connection: BorrowedFd<'_>) {
        // Other errors than those of calls are of no interest any more.
        for _ in 0..MAX_REQUESTS {
            if devmem::completed(connection, &mut self.calls).is_ok() {
                return;
            }
        }
    }
}
