//! A send or receive comm: sixteen slots, the counters that order caller and I/O thread, failure, doorbell and closing.
//! Moving bytes is the business of `send` and `recv`; threads are that of `pool`; C is that of `abi`.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{fence, AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nccl_net_abi::{
    ncclNetDeviceHandle_v7, ncclResult_t, MAX_REQUESTS, NCCL_INTERNAL_ERROR, NCCL_INVALID_ARGUMENT, NCCL_SUCCESS,
    NCCL_SYSTEM_ERROR,
};
use parking_lot::Mutex;

use crate::device::{SendSource, UnpackQueue};
use crate::pool::Worker;
use crate::recv::RecvIo;
use crate::send::SendIo;
use crate::slot::{Body, Slot, NO_REGION};
use crate::state::Global;

/// Bytes a comm moves before another comm of its thread has its turn.
pub const TURN_BYTES: usize = 1 << 20;
/// Completions that share a ring while a comm has more to move at once.
const RING_EVERY: u64 = MAX_REQUESTS as u64 / 4;
/// Segments of one system call.
pub const IOV_MAX: usize = 1024;

const ALIVE: u32 = 0x534F_4654;
const CLOSED: u32 = 0x4445_4144;

/// How a turn of a comm ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to move at once.
    More,
    /// Nothing is posted, or the kernel has to report first.
    Wait,
}

/// The direction of a comm.
pub enum Side {
    /// It sends.
    Send(SendIo),
    /// It receives.
    Recv(Box<RecvIo>),
}

/// What only the holder of the I/O lock touches.
pub struct Io {
    /// The data socket; none once the comm is closed.
    pub socket: Option<OwnedFd>,
    /// The kernel reported a hang-up or an error: read on until it says which.
    pub hung_up: bool,
    side: Side,
    doorbell: Option<Doorbell>,
    /// Completions that have been rung for.
    rung: u64,
}

impl Io {
    /// The socket's descriptor, -1 once closed (every system call on it then fails).
    pub fn fd(&self) -> i32 {
        self.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

struct Doorbell {
    armed: *const AtomicU32,
    fd: i32,
}
// SAFETY: the pointer is the caller's promise of setDoorbell: valid until the comm is closed.
unsafe impl Send for Doorbell {}

/// A counter on a cache line of its own.
#[repr(align(64))]
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Its value, with everything that led to it.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Publishes a value, with everything that led to it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }

    /// One step from `from`; false when another thread took it.
    pub fn step(&self, from: u64) -> bool {
        self.0.compare_exchange(from, from + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

/// A comm. Requests are numbered from 0; request k uses slot k % 16. Always
/// `freed <= reported <= completed <= posted <= freed + 16`, where a send is freed when it is reported.
pub struct Comm {
    alive: AtomicU32,
    receives: bool,
    /// Peer address, for logs.
    pub peer: String,
    /// Settings and device memory.
    pub global: &'static Global,
    /// Requests the caller posted.
    pub posted: Counter,
    /// Requests whose bytes have been moved.
    pub completed: Counter,
    /// Requests that `test` reported done.
    reported: Counter,
    /// Receives that were consumed.
    consumed: Counter,
    /// 0, or the result every unfinished request ends in.
    failed: AtomicI32,
    /// Nobody looks at this comm until a post or the kernel says so.
    idle: AtomicBool,
    /// Its worker has it in the list of comms to serve.
    pub scheduled: AtomicBool,
    /// Events the kernel reported and no turn has seen.
    pub events: AtomicU32,
    closing: AtomicBool,
    post: Mutex<()>,
    slots: [Slot; MAX_REQUESTS],
    io: Mutex<Io>,
    source: OnceLock<Arc<dyn SendSource>>,
    /// Where device receives land.
    queue: Mutex<Option<Arc<UnpackQueue>>>,
    /// The caller's device handle, to be filled by the first use of device memory; null once it is, or when there is none.
    late_handle: AtomicPtr<ncclNetDeviceHandle_v7>,
    worker: Arc<Worker>,
    /// The worker's name for it.
    pub id: u64,
}

impl Comm {
    /// Builds a comm over a connected non-blocking socket and gives it to an I/O thread.
    pub fn start(
        global: &'static Global,
        socket: OwnedFd,
        peer: String,
        queue: Option<UnpackQueue>,
        late_handle: *mut ncclNetDeviceHandle_v7,
        receives: bool,
    ) -> std::io::Result<Arc<Comm>> {
        let pool = crate::pool::get(&global.config)?;
        let (worker, id) = pool.assign(receives);
        let side = if receives {
            Side::Recv(Box::new(RecvIo::new(&global.config, id)))
        } else {
            Side::Send(SendIo::new(&global.config))
        };
        let fd = socket.as_raw_fd();
        let comm = Arc::new(Comm {
            alive: AtomicU32::new(ALIVE),
            receives,
            peer,
            global,
            posted: Counter::default(),
            completed: Counter::default(),
            reported: Counter::default(),
            consumed: Counter::default(),
            failed: AtomicI32::new(NCCL_SUCCESS),
            idle: AtomicBool::new(true),
            scheduled: AtomicBool::new(false),
            events: AtomicU32::new(0),
            closing: AtomicBool::new(false),
            post: Mutex::new(()),
            slots: std::array::from_fn(|_| Slot::new()),
            io: Mutex::new(Io { socket: Some(socket), hung_up: false, side, doorbell: None, rung: 0 }),
            source: OnceLock::new(),
            queue: Mutex::new(queue.map(Arc::new)),
            late_handle: AtomicPtr::new(late_handle),
            worker: worker.clone(),
            id,
        });
        for slot in &comm.slots {
            slot.comm.store(Arc::as_ptr(&comm).cast_mut(), Ordering::Release);
        }
        worker.adopt(&comm, fd)?;
        Ok(comm)
    }

    /// Whether this is a live comm of that direction; the first check of every entry that receives one from C.
    pub fn is(&self, receives: bool) -> bool {
        self.alive.load(Ordering::Acquire) == ALIVE && self.receives == receives
    }

    /// Makes device receives possible, where the caller gave a device handle for them.
    pub fn prepare_unpack(&self) -> Result<(), ncclResult_t> {
        let mut queue = self.queue.lock();
        if queue.is_some() {
            return Ok(());
        }
        let handle = self.late_handle.load(Ordering::Acquire);
        let (false, Some(memory)) = (handle.is_null(), &self.global.device) else { return Err(NCCL_INVALID_ARGUMENT) };
        let bounce = crate::fragment::region_len(self.global.config.message_limit) * MAX_REQUESTS;
        let built = memory.unpack_queue(bounce).map_err(|e| {
            crate::logger::warn(&format!("cannot set up device receives from {}: {e}", self.peer));
            NCCL_SYSTEM_ERROR
        })?;
        // SAFETY: by contract the caller's device handle stays where it is as long as the comm.
        unsafe { *handle = crate::abi::device_handle(true, Some(&built)) };
        self.late_handle.store(std::ptr::null_mut(), Ordering::Release);
        *queue = Some(Arc::new(built));
        Ok(())
    }

    /// Device memory was registered: makes device receives possible now, so that the device handle can be read before the first.
    pub fn expect_device_receives(&self) -> Result<(), ncclResult_t> {
        let wanted = self.receives && !self.late_handle.load(Ordering::Acquire).is_null();
        let can = self.global.device.as_ref().is_some_and(|memory| memory.in_context());
        if wanted && can {
            self.prepare_unpack()
        } else {
            Ok(())
        }
    }

    /// Where device receives land, once there was one.
    pub fn unpack_queue(&self) -> Option<Arc<UnpackQueue>> {
        self.queue.lock().clone()
    }

    /// The slot of request `seq`.
    pub fn slot(&self, seq: u64) -> &Slot {
        &self.slots[(seq % MAX_REQUESTS as u64) as usize]
    }

    /// Posts a request: `Ok(None)` when all slots are taken and the comm is lenient. `fill` describes the memory; it gets
    /// the request's number and runs under the posting lock.
    pub fn post(&self, fill: impl FnOnce(u64, &mut Body) -> Result<(), ncclResult_t>) -> Result<Option<&Slot>, ncclResult_t> {
        let guard = self.post.lock();
        let failed = self.failed.load(Ordering::Acquire);
        if failed != NCCL_SUCCESS {
            return Err(failed);
        }
        let seq = self.posted.get();
        let freed = if self.receives { self.consumed.get() } else { self.reported.get() };
        if seq - freed >= MAX_REQUESTS as u64 {
            return if self.global.config.strict { Err(NCCL_INTERNAL_ERROR) } else { Ok(None) };
        }
        let slot = self.slot(seq);
        // SAFETY: the slot is free (seq - freed < 16) and posts are serialised by the lock.
        let bytes = unsafe {
            let body = slot.body();
            fill(seq, body)?;
            body.total
        };
        slot.seq.store(seq, Ordering::Release);
        self.posted.set(seq + 1);
        drop(guard);
        fence(Ordering::SeqCst);
        if self.idle.load(Ordering::Relaxed) && self.idle.swap(false, Ordering::AcqRel) {
            self.start_moving(bytes);
        }
        Ok(Some(slot))
    }

    /// The comm was idle: a small send goes out at once, anything else is the I/O thread's.
    fn start_moving(self: &Comm, bytes: usize) {
        if !self.receives && bytes <= self.global.config.inline_bytes {
            if let Some(mut io) = self.io.try_lock() {
                if self.turn(&mut io) == Turn::Wait {
                    return;
                }
            }
        }
        self.worker.submit(self.id);
    }

    /// `test` of request `slot`: `Ok(Some(bytes))` when it is done.
    pub fn test(&self, slot: &Slot) -> Result<Option<usize>, ncclResult_t> {
        let seq = slot.seq();
        let reported = self.reported.get();
        if seq < self.completed.get() {
            let received = slot.received.load(Ordering::Relaxed);
            return if seq == reported && self.reported.step(seq) { Ok(Some(received)) } else { Err(NCCL_INTERNAL_ERROR) };
        }
        let failed = self.failed.load(Ordering::Acquire);
        if failed != NCCL_SUCCESS {
            // The request may have been completed between the two loads.
            return if seq < self.completed.get() { self.test(slot) } else { Err(failed) };
        }
        if seq != reported {
            return Err(NCCL_INTERNAL_ERROR);
        }
        Ok(None)
    }

    /// `irecvConsumed` of request `slot`.
    pub fn consume(&self, slot: &Slot) -> Result<(), ncclResult_t> {
        if !std::ptr::eq(slot.comm.load(Ordering::Acquire), self) {
            return Err(NCCL_INVALID_ARGUMENT);
        }
        let seq = slot.seq();
        if seq != self.consumed.get() || seq >= self.reported.get() {
            return Err(NCCL_INTERNAL_ERROR);
        }
        let extent = slot.extent.swap(0, Ordering::Relaxed);
        let place = slot.region.swap(NO_REGION, Ordering::Relaxed);
        if let (true, Some(queue)) = (place != NO_REGION, self.unpack_queue()) {
            if self.global.config.strict {
                poison(&queue, place, extent);
            }
            queue.free.lock().push(place);
        }
        if self.consumed.step(seq) {
            Ok(())
        } else {
            Err(NCCL_INTERNAL_ERROR)
        }
    }

    /// The send side's device memory, built on first use.
    pub fn send_source(&self) -> Result<&Arc<dyn SendSource>, ncclResult_t> {
        if let Some(source) = self.source.get() {
            return Ok(source);
        }
        let device = self.global.device.as_ref().ok_or(NCCL_INVALID_ARGUMENT)?;
        let source = device.send_source(self.global.config.message_limit).map_err(|e| {
            crate::logger::warn(&format!("cannot set up device sends to {}: {e}", self.peer));
            NCCL_SYSTEM_ERROR
        })?;
        Ok(self.source.get_or_init(|| source))
    }

    /// The send side's device memory if a device send was posted.
    pub fn posted_source(&self) -> Option<&Arc<dyn SendSource>> {
        self.source.get()
    }

    /// Serves the comm for a turn; called by its worker.
    pub fn serve(&self) -> Turn {
        let mut io = self.io.lock();
        self.turn(&mut io)
    }

    fn turn(&self, io: &mut Io) -> Turn {
        if self.leave() || io.socket.is_none() {
            return Turn::Wait;
        }
        let events = self.events.swap(0, Ordering::AcqRel);
        if events & (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0 {
            io.hung_up = true;
        }
        self.idle.store(false, Ordering::Release);
        // The side is lent out so that it can use the rest of `io`.
        let mut side = std::mem::replace(&mut io.side, Side::Send(SendIo::default()));
        let turn = match &mut side {
            Side::Send(send) => send.turn(self, io),
            Side::Recv(recv) => recv.turn(self, io),
        };
        io.side = side;
        // Waking the caller costs as much as moving a small message: while more moves at once, several completions share a ring.
        let completed = self.completed.get();
        if completed - io.rung >= if turn == Turn::More { RING_EVERY } else { 1 } {
            io.rung = completed;
            ring(io);
        }
        turn
    }

    /// Whether a turn should end at once: the comm is being closed or has failed.
    pub fn leave(&self) -> bool {
        self.closing.load(Ordering::Acquire) || self.failed.load(Ordering::Acquire) != NCCL_SUCCESS
    }

    /// Nothing is posted beyond `completed`: true when the comm may rest, false when a post came in between.
    pub fn rest(&self, completed: u64) -> bool {
        self.idle.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // If the poster saw the flag first, it has submitted the comm again.
        self.posted.get() == completed || !self.idle.swap(false, Ordering::AcqRel)
    }

    /// Publishes that every request below `completed` is done. The I/O lock is held. The bell rings at the end of the turn.
    pub fn complete(&self, completed: u64) {
        self.completed.set(completed);
    }

    /// The comm is finished: every request that is not done ends in `result`. The I/O lock is held.
    pub fn fail(&self, io: &Io, result: ncclResult_t, why: &str) {
        if self.failed.compare_exchange(NCCL_SUCCESS, result, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return;
        }
        let direction = if self.receives { "receiving from" } else { "sending to" };
        let open = self.posted.get() - self.completed.get();
        let line = format!("{direction} {}: {why}; {open} requests unfinished", self.peer);
        if open > 0 || result != NCCL_SYSTEM_ERROR {
            crate::logger::warn(&line);
        } else {
            crate::logger::info(&line);
        }
        ring(io);
    }

    /// Fails the comm from outside of a turn.
    pub fn fail_now(&self, why: &str) {
        let io = self.io.lock();
        self.fail(&io, NCCL_INTERNAL_ERROR, why);
    }

    /// Sets or, with a negative `fd`, removes the doorbell.
    pub fn set_doorbell(&self, armed: *const AtomicU32, fd: i32) {
        let mut io = self.io.lock();
        io.doorbell = (fd >= 0).then_some(Doorbell { armed, fd });
        ring(&io);
    }

    /// Closes: on return no thread of ours touches the caller's memory. Bytes already in the kernel are still delivered.
    pub fn close(&self) {
        self.alive.store(CLOSED, Ordering::Release);
        self.closing.store(true, Ordering::Release);
        let mut io = self.io.lock();
        io.doorbell = None;
        if let Some(source) = self.source.get() {
            source.quiesce();
        }
        if let Some(socket) = io.socket.take() {
            self.worker.drop_comm(self.id, socket.as_raw_fd(), self.receives);
        }
        if let Side::Recv(recv) = &mut io.side {
            recv.release();
        }
        *self.queue.lock() = None;
    }
}

/// Overwrites consumed bounce memory, so that a late reader finds out.
fn poison(queue: &UnpackQueue, place: usize, extent: usize) {
    let region = queue.bounce_len / MAX_REQUESTS;
    // SAFETY: inside the place's region, which no message has before it is freed.
    unsafe { std::ptr::write_bytes(queue.bounce.add(place * region), 0xDB, extent.min(region)) };
}

/// Rings the doorbell after a change was published.
fn ring(io: &Io) {
    let Some(bell) = &io.doorbell else { return };
    fence(Ordering::SeqCst);
    // SAFETY: the caller of setDoorbell keeps it valid until the comm is closed; closing takes the I/O lock we hold.
    let armed = unsafe { &*bell.armed };
    if armed.load(Ordering::Relaxed) == 1 && armed.swap(0, Ordering::AcqRel) == 1 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes to an eventfd. A full counter means it is readable, which is all that is wanted.
        unsafe { libc::write(bell.fd, one.as_ptr().cast(), one.len()) };
    }
}
