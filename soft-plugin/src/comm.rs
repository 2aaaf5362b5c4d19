//! A send or receive comm: its ledger, its socket, its I/O thread, failure, doorbell and closing.
//! `send` and `recv` move the bytes, `pool` has the threads, `abi` the C entries.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{fence, AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use nccl_net_abi::{
    ncclNetDeviceHandle_v7, ncclResult_t, ucclCommInfo, ucclFlow, MAX_REQUESTS, NCCL_INTERNAL_ERROR, NCCL_INVALID_ARGUMENT,
    NCCL_INVALID_USAGE, NCCL_SYSTEM_ERROR, UCCL_DOORBELL_FAILED,
};
use process::Mutex;

use crate::device::{self, Bounce, Lender, SendSource, UnpackQueue};
use crate::devmem::{self, DeviceRecv, DeviceSend, Payload};
use crate::ledger::{Failure, Ledger};
use crate::logger::Limited;
use crate::pool::{Assignment, Member, Pool};
use crate::protect::Guard;
use crate::quantum::{DataSocket, Turn};
use crate::recv::RecvIo;
use crate::rendezvous::Connected;
use crate::send::{SendIo, Source};
use crate::slot::{Body, Slot, NO_REGION};
use crate::state::Global;
use crate::tcp;

/// Completions per doorbell signal while a comm has more to move.
const RING_EVERY: u64 = MAX_REQUESTS as u64 / 4;

const ALIVE: u32 = 0x534F_4654;
const CLOSED: u32 = 0x4445_4144;

/// The direction of a comm.
enum Side {
    Send(SendIo),
    Recv(Box<RecvIo>),
    /// With payload on a connection of its own.
    DeviceSend(Box<DeviceSend>),
    DeviceRecv(Box<DeviceRecv>),
}

impl Side {
    /// The connection for payload, if there is one.
    fn payload(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Side::DeviceSend(send) => send.connection(),
            Side::DeviceRecv(recv) => recv.lent().map(|lent| lent.connection()),
            Side::Send(_) | Side::Recv(_) => None,
        }
    }
}

/// State under the I/O lock.
struct Io {
    /// The data socket; none once the comm is closed.
    socket: Option<OwnedFd>,
    hung_up: bool,
    side: Side,
    doorbell: Option<Doorbell>,
    /// Completions signalled so far.
    rung: u64,
}

impl Io {
    /// The connection whose progress is that of the comm.
    fn data(&self) -> Result<i32, ncclResult_t> {
        let socket = self.socket.as_ref().ok_or(NCCL_INVALID_ARGUMENT)?;
        Ok(self.side.payload().unwrap_or(socket.as_fd()).as_raw_fd())
    }
}

struct Doorbell {
    armed: *const AtomicU32,
    fd: i32,
}
// SAFETY: the caller of setDoorbell keeps the pointer valid until the comm is closed.
unsafe impl Send for Doorbell {}

/// A comm.
pub struct Comm {
    alive: AtomicU32,
    /// The process that made it; a forked child only has a copy.
    generation: u64,
    /// The socket's descriptor, for a child that closes its copy; -1 once closed.
    fd: AtomicI32,
    /// "local-address -> peer-address on NIC".
    path: String,
    /// Why it has failed.
    failed: OnceLock<String>,
    /// Settings and device memory.
    pub global: &'static Global,
    /// Requests and their state.
    pub ledger: Ledger,
    /// It is in its I/O thread's list of comms to serve.
    scheduled: AtomicBool,
    /// The kernel reported a hang-up or an error that no turn has handled yet.
    hung_up: AtomicBool,
    io: Mutex<Io>,
    source: Source,
    /// The last known progress of the sent bytes.
    flow: Mutex<ucclFlow>,
    /// The unpack queue that device receives use.
    queue: Mutex<Option<Arc<UnpackQueue>>>,
    /// The caller's device handle, which the first use of device memory fills; null once filled, or without one.
    late_handle: AtomicPtr<ncclNetDeviceHandle_v7>,
    assignment: Assignment,
}

impl Comm {
    /// Builds a comm over a connected non-blocking socket and gives it to an I/O thread.
    pub fn start(
        global: &'static Global,
        pool: &Pool,
        connected: Connected,
        queue: Option<UnpackQueue>,
        late_handle: *mut ncclNetDeviceHandle_v7,
        receives: bool,
    ) -> std::io::Result<Arc<Comm>> {
        let assignment = pool.assign(receives);
        let limit = devmem::limit(&global.config);
        let side = match connected.payload {
            Some(Payload::Receives(lent)) => Side::DeviceRecv(Box::new(DeviceRecv::new(lent, limit))),
            Some(Payload::Sends(socket, area, calls)) => Side::DeviceSend(Box::new(DeviceSend::new(socket, area, calls))),
            None if receives => Side::Recv(Box::new(RecvIo::new(&global.config, assignment.number))),
            None => Side::Send(SendIo::new(&global.config)),
        };
        let fd = connected.socket.as_raw_fd();
        let payload = side.payload().map(|payload| payload.as_raw_fd());
        let comm = Arc::new(Comm {
            alive: AtomicU32::new(ALIVE),
            generation: process::generation(),
            fd: AtomicI32::new(fd),
            path: connected.path,
            failed: OnceLock::new(),
            global,
            ledger: Ledger::new(receives, global.config.strict, payload.is_some()),
            scheduled: AtomicBool::new(false),
            hung_up: AtomicBool::new(false),
            io: Mutex::new(Io { socket: Some(connected.socket), hung_up: false, side, doorbell: None, rung: 0 }),
            source: Source::new(),
            flow: Mutex::default(),
            queue: Mutex::new(queue.map(Arc::new)),
            late_handle: AtomicPtr::new(late_handle),
            assignment,
        });
        for slot in comm.ledger.slots() {
            slot.owner.store(Arc::as_ptr(&comm).cast_mut().cast(), Ordering::Release);
        }
        comm.assignment.add(comm.clone(), fd)?;
        if let Some(Err(error)) = payload.map(|payload| comm.assignment.watch(payload)) {
            comm.close();
            return Err(error);
        }
        Ok(comm)
    }

    /// Whether this is a live comm of this direction; the first check of every C entry that takes a comm.
    pub fn is(&self, receives: bool) -> bool {
        self.alive.load(Ordering::Acquire) == ALIVE && self.ledger.receives() == receives
    }

    /// Its two addresses and its NIC, and why it has failed if it has.
    pub fn describe(&self) -> String {
        match self.failed.get() {
            Some(why) => format!("{} ({why})", self.path),
            None => self.path.clone(),
        }
    }

    /// Whether a parent process made it.
    pub fn is_inherited(&self) -> bool {
        self.generation != process::generation()
    }

    /// Prepares device receives, if the caller gave a device handle.
    pub fn prepare_unpack(&self) -> Result<(), ncclResult_t> {
        if self.queue.lock().is_some() {
            return Ok(());
        }
        // First: a turn takes the queue's lock under this one.
        let bounce = match &self.io.lock().side {
            Side::DeviceRecv(recv) => Bounce::Lent(recv.lent().ok_or(NCCL_INVALID_ARGUMENT)?.clone()),
            _ => Bounce::Own(self.global.config.bounce_len()),
        };
        let mut queue = self.queue.lock();
        if queue.is_some() {
            return Ok(());
        }
        let handle = self.late_handle.load(Ordering::Acquire);
        let (false, Some(memory)) = (handle.is_null(), &self.global.device) else { return Err(NCCL_INVALID_ARGUMENT) };
        let built = memory.unpack_queue(bounce).map_err(|e| {
            static LINE: Limited = Limited::new();
            LINE.warn(&format!("cannot set up device receives of {}: {e}", self.path));
            NCCL_SYSTEM_ERROR
        })?;
        // SAFETY: by contract the caller's device handle keeps its address as long as the comm lives.
        unsafe { *handle = device::handle(true, Some(&built)) };
        self.late_handle.store(std::ptr::null_mut(), Ordering::Release);
        *queue = Some(Arc::new(built));
        Ok(())
    }

    /// Device memory was registered: prepares device receives now, so that the device handle can be read before the first.
    pub fn expect_device_receives(&self) -> Result<(), ncclResult_t> {
        let wanted = self.ledger.receives() && !self.late_handle.load(Ordering::Acquire).is_null();
        let can = self.global.device.as_ref().is_some_and(|memory| memory.in_context());
        if wanted && can {
            self.prepare_unpack()
        } else {
            Ok(())
        }
    }

    /// Device memory was registered: prepares device sends from the current GPU now rather than at the first send.
    pub fn expect_device_sends(&self) -> Result<(), ncclResult_t> {
        let can = self.global.device.as_ref().is_some_and(|memory| memory.in_context());
        if self.ledger.receives() || !can || self.sends_by().is_some() {
            return Ok(());
        }
        self.send_source()?.prepare().map_err(|e| {
            static LINE: Limited = Limited::new();
            LINE.warn(&format!("cannot set up device sends of {}: {e}", self.path));
            NCCL_SYSTEM_ERROR
        })
    }

    /// The NIC by which it sends from device memory, if it does.
    pub fn sends_by(&self) -> Option<u32> {
        match &self.io.lock().side {
            Side::DeviceSend(send) => Some(send.interface()),
            _ => None,
        }
    }

    /// Posts a request; see [`Ledger::post`].
    pub fn post(&self, fill: impl FnOnce(u64, &mut Body) -> Result<(), ncclResult_t>) -> Result<Option<&Slot>, ncclResult_t> {
        let Some(posted) = self.ledger.post(fill)? else { return Ok(None) };
        if posted.was_idle {
            self.start_moving(posted.bytes);
        }
        Ok(Some(posted.slot))
    }

    /// The comm was idle: a small send goes out at once; the I/O thread handles anything else.
    fn start_moving(&self, bytes: usize) {
        if !self.ledger.receives() && bytes <= self.global.config.inline_bytes {
            if let Some(mut io) = self.io.try_lock() {
                if self.turn(&mut io) == Turn::Wait {
                    return;
                }
            }
        }
        self.assignment.schedule();
    }

    /// `irecvConsumed` of request `slot`.
    pub fn consume(&self, slot: &Slot) -> Result<(), ncclResult_t> {
        if !std::ptr::eq(slot.owner.load(Ordering::Acquire).cast(), self) {
            return Err(NCCL_INVALID_ARGUMENT);
        }
        let seq = self.ledger.consumable(slot)?;
        let extent = slot.extent.swap(0, Ordering::Relaxed);
        let place = slot.region.swap(NO_REGION, Ordering::Relaxed);
        let queue = self.queue.lock().clone();
        if let (true, Some(queue)) = (place != NO_REGION, &queue) {
            if self.global.config.strict {
                poison(queue, place, extent);
            }
            queue.free.lock().push(place);
        }
        if let Some(lender) = queue.as_ref().and_then(|queue| queue.lent.as_ref()) {
            self.give_back(&**lender, seq);
        }
        // Last: from here on another receive may use the slot.
        self.ledger.consume(seq)
    }

    fn give_back(&self, lender: &dyn Lender, seq: u64) {
        match lender.consumed((seq % MAX_REQUESTS as u64) as usize) {
            Ok(false) => {}
            Ok(true) => self.assignment.schedule(),
            // What is not given back is missing for others: the connection's end frees it.
            Err(error) => self.fail(&self.io.lock(), &Failure::new(NCCL_INTERNAL_ERROR, format!("giving back: {error}"))),
        }
    }

    /// The source of device sends, built by the first registration of device memory, or else by the first send of it.
    pub fn send_source(&self) -> Result<&Arc<dyn SendSource>, ncclResult_t> {
        if let Some(source) = self.source.get() {
            return Ok(source);
        }
        let device = self.global.device.as_ref().ok_or(NCCL_INVALID_ARGUMENT)?;
        let source = device.send_source(self.global.config.message_limit).map_err(|e| {
            static LINE: Limited = Limited::new();
            LINE.warn(&format!("cannot set up device sends of {}: {e}", self.path));
            NCCL_SYSTEM_ERROR
        })?;
        Ok(self.source.get_or_init(|| source))
    }

    /// Bytes that the network has taken or delivered, or the result that the comm has failed with.
    pub fn progress(&self) -> Result<u64, ncclResult_t> {
        self.ledger.check()?;
        if self.ledger.receives() {
            return Ok(self.ledger.received.get());
        }
        let io = self.io.lock();
        tcp::bytes_acked(io.data()?).ok_or(NCCL_INTERNAL_ERROR)
    }

    /// How far the sent bytes have come; the last known value while a turn is running.
    pub fn flow(&self) -> Result<ucclFlow, ncclResult_t> {
        if let Some(io) = self.io.try_lock() {
            let flow = tcp::flow(io.data()?).ok_or(NCCL_INTERNAL_ERROR)?;
            let begun = match &io.side {
                Side::Send(send) => send.begun() as u64,
                Side::DeviceSend(send) => send.begun(self.ledger.completed()) as u64,
                Side::Recv(_) | Side::DeviceRecv(_) => 0,
            };
            let flow = ucclFlow { begun, ..flow };
            *self.flow.lock() = flow;
            return Ok(flow);
        }
        Ok(ucclFlow { stale: 1, ..*self.flow.lock() })
    }

    pub fn info(&self) -> Result<ucclCommInfo, ncclResult_t> {
        let io = self.io.lock();
        tcp::describe(io.data()?).ok_or(NCCL_INTERNAL_ERROR)
    }

    fn turn(&self, io: &mut Io) -> Turn {
        let Some(fd) = io.socket.as_ref().map(AsRawFd::as_raw_fd).filter(|_| !self.ledger.should_stop()) else {
            return Turn::Wait;
        };
        io.hung_up |= self.hung_up.swap(false, Ordering::AcqRel);
        self.ledger.begin_turn();
        let socket = DataSocket { fd, hung_up: io.hung_up };
        let turn = match &mut io.side {
            Side::Send(send) => send.turn(&self.ledger, socket, &self.source),
            Side::Recv(recv) => recv.turn(&self.ledger, socket, &|| self.queue.lock().clone()),
            Side::DeviceSend(send) => {
                // What it looked at.
                io.hung_up = false;
                send.turn(&self.ledger, socket)
            }
            Side::DeviceRecv(recv) => recv.turn(&self.ledger, socket, &|| self.queue.lock().clone()),
        };
        let turn = turn.unwrap_or_else(|failure| {
            self.fail(io, &failure);
            Turn::Wait
        });
        // Waking the caller costs as much as moving a small message: while more is moving, several completions share a signal.
        let completed = self.ledger.completed();
        if completed - io.rung >= if turn == Turn::More { RING_EVERY } else { 1 } {
            io.rung = completed;
            ring(io);
        }
        turn
    }

    /// Fails the comm: every unfinished request ends in the failure's result. Rings the doorbell even if no request is open.
    fn fail(&self, io: &Io, failure: &Failure) {
        static LINE: Limited = Limited::new();
        if !self.ledger.fail(failure.result) {
            return;
        }
        let _ = self.failed.set(failure.why.clone());
        let direction = if self.ledger.receives() { "receiving" } else { "sending" };
        // A connection that ends is its user's to judge: the peer may just have closed.
        let ended = failure.result == NCCL_SYSTEM_ERROR;
        let open = self.ledger.posted() - self.ledger.completed();
        let text = format!("{direction}, {}: {}; {open} requests unfinished", self.path, failure.why);
        if ended {
            LINE.info(&text);
        } else {
            LINE.warn(&text);
        }
        ring_failure(io);
    }

    /// Sets or, with a negative `fd`, removes the doorbell.
    pub fn set_doorbell(&self, armed: *const AtomicU32, fd: i32) {
        let mut io = self.io.lock();
        io.doorbell = (fd >= 0).then_some(Doorbell { armed, fd });
        match self.ledger.check() {
            Ok(()) => ring(&io),
            Err(_) => ring_failure(&io),
        }
    }

    /// Limits what it sends to so many bytes a second.
    pub fn pace(&self, rate: u64) -> Result<(), ncclResult_t> {
        tcp::pace(self.io.lock().data()?, rate).map_err(|e| {
            static LINE: Limited = Limited::new();
            LINE.warn(&format!("cannot limit the rate of {}: {e}", self.path));
            NCCL_SYSTEM_ERROR
        })
    }

    /// Protects the messages, starting with the first.
    pub fn protect(&self, guard: Guard) -> Result<(), ncclResult_t> {
        let mut io = self.io.lock();
        if self.ledger.posted() > 0 {
            return Err(NCCL_INVALID_USAGE);
        }
        match &mut io.side {
            Side::Send(send) => send.protect(guard),
            Side::Recv(recv) => recv.protect(guard),
            // The NIC writes and reads device memory: no one can seal it.
            Side::DeviceSend(_) | Side::DeviceRecv(_) => return Err(NCCL_INVALID_USAGE),
        }
        Ok(())
    }

    /// Closes the comm: on return no thread of ours touches the caller's memory. Bytes already in the kernel are still delivered. False if
    /// packets may still be sent from the caller's memory.
    pub fn close(&self) -> bool {
        self.alive.store(CLOSED, Ordering::Release);
        self.ledger.close();
        let mut io = self.io.lock();
        io.doorbell = None;
        if let Some(source) = self.source.get() {
            source.quiesce();
        }
        if let Some(payload) = io.side.payload() {
            self.assignment.unwatch(payload.as_raw_fd());
        }
        if let Some(socket) = io.socket.take() {
            self.fd.store(-1, Ordering::Release);
            self.assignment.remove(socket.as_raw_fd());
        }
        let mut over = true;
        match &mut io.side {
            Side::Recv(recv) => recv.release(),
            Side::DeviceRecv(recv) => recv.release(),
            Side::DeviceSend(send) => over = send.close(),
            Side::Send(_) => {}
        }
        *self.queue.lock() = None;
        over
    }

    /// Closes a child's copy of the parent's comm: only the child's descriptor. Takes no lock, since a thread of the parent may have
    /// held it at the fork, and leaves the poller alone, since the two processes share it.
    pub fn close_copy(&self) {
        self.alive.store(CLOSED, Ordering::Release);
        process::close_copy(&self.fd);
    }
}

impl Member for Comm {
    fn serve(&self) -> Turn {
        self.turn(&mut self.io.lock())
    }

    fn fail_now(&self, why: &str) {
        self.fail(&self.io.lock(), &Failure::new(NCCL_INTERNAL_ERROR, why));
    }

    fn report(&self, hung_up: bool) {
        if hung_up {
            self.hung_up.store(true, Ordering::Release);
        }
    }

    fn scheduled(&self) -> &AtomicBool {
        &self.scheduled
    }
}

/// Overwrites consumed bounce memory, to expose a reader that comes too late.
fn poison(queue: &UnpackQueue, place: usize, extent: usize) {
    let region = queue.bounce_len / MAX_REQUESTS;
    // SAFETY: inside the slot's region, which no message uses before it is freed.
    unsafe { std::ptr::write_bytes(queue.bounce.add(place * region), 0xDB, extent.min(region)) };
}

/// Rings the doorbell after a published change.
fn ring(io: &Io) {
    let Some(bell) = &io.doorbell else { return };
    fence(Ordering::SeqCst);
    // SAFETY: the caller of setDoorbell keeps it valid until the comm is closed; closing takes the I/O lock we hold.
    let armed = unsafe { &*bell.armed };
    if armed.load(Ordering::Relaxed) == 1 && armed.swap(0, Ordering::AcqRel) == 1 {
        signal(bell.fd);
    }
}

/// Rings the doorbell after a failure; one that is not armed gets a mark, since an idle comm does not ring again.
fn ring_failure(io: &Io) {
    let Some(bell) = &io.doorbell else { return };
    // SAFETY: as in `ring`.
    let armed = unsafe { &*bell.armed };
    if armed.fetch_or(UCCL_DOORBELL_FAILED, Ordering::SeqCst) & 1 == 1 {
        armed.store(0, Ordering::SeqCst);
        signal(bell.fd);
    }
}

fn signal(fd: i32) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes to an eventfd. A full counter already makes it readable.
    unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
}
