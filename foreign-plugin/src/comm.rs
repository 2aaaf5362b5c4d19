//! Comms and their requests: sixteen slots, everything driven by `test`, fragments of any length and order in shared receive memory.

use crate::flows::Rules;
use crate::gpu::Gpu;
use crate::late::{self, Lent};
use crate::memory::{self, Pool, PAGE};
use crate::rules::{counters, down, lock, raise_sigpipe, refused, settings, up, violation};
use crate::setup::{Sockets, SOCKETS};
use cuda_driver::{DeviceBuffer, PinnedBuffer};
use nccl_net_abi::*;
use std::collections::{HashSet, VecDeque};
use std::ffi::c_void;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

/// Most fragments of a message; more end the process.
const MAX_FRAGMENTS: usize = MAX_SLOT_ENTRIES - 1;
const HEADER: usize = 8;

/// The target of a request handle.
pub(crate) struct Slot {
    comm: *const Comm,
    index: usize,
}

pub(crate) struct Comm {
    pub dev: usize,
    pub receives: bool,
    slots: Vec<Slot>,
    inner: Mutex<Inner>,
}

enum Inner {
    Send(Send),
    Recv(Box<Recv>),
}

static LIVE: Mutex<Option<HashSet<usize>>> = Mutex::new(None);

/// The live comm at an address, or the end of the process.
pub(crate) fn live<'a>(call: &str, comm: *mut c_void) -> &'a Comm {
    if !lock(&LIVE).get_or_insert_default().contains(&(comm as usize)) {
        violation!("{call} on {comm:?}, which is no open comm");
    }
    // SAFETY: live, as just checked; the caller closes it last.
    unsafe { &*comm.cast::<Comm>() }
}

/// The comm and number of a request.
pub(crate) fn request<'a>(call: &str, request: *mut c_void) -> (&'a Comm, usize) {
    let mut all = lock(&LIVE);
    for &comm in all.get_or_insert_default().iter() {
        // SAFETY: live, and not closed while the lock is held.
        let comm = unsafe { &*(comm as *const Comm) };
        let range = comm.slots.as_ptr_range();
        if range.contains(&request.cast_const().cast()) {
            // SAFETY: inside the slots of a live comm.
            let slot = unsafe { &*request.cast::<Slot>() };
            // SAFETY: a slot's comm lives as long as the slot.
            return (unsafe { &*slot.comm }, slot.index);
        }
    }
    violation!("{call} on request {request:?}, which belongs to no open comm");
}

impl Comm {
    fn build(dev: usize, inner: Inner) -> *mut Comm {
        let receives = matches!(inner, Inner::Recv(_));
        let comm = Box::into_raw(Box::new(Comm { dev, receives, slots: Vec::new(), inner: Mutex::new(inner) }));
        // SAFETY: just made, not shared yet.
        unsafe { (*comm).slots = (0..MAX_REQUESTS).map(|index| Slot { comm, index }).collect() };
        lock(&LIVE).get_or_insert_default().insert(comm as usize);
        up(&counters().comms, None, 1);
        comm
    }

    pub(crate) fn send(dev: usize, sockets: Sockets) -> *mut Comm {
        Comm::build(
            dev,
            Inner::Send(Send { sockets, requests: VecDeque::new(), posted: 0, dead: false, lent: Default::default() }),
        )
    }

    /// A receive comm, with the address of its device handle: `None` if the caller gave no memory for one.
    pub(crate) fn recv(dev: usize, sockets: Sockets, unpack: bool) -> (*mut Comm, *mut unpackNetDeviceHandle) {
        let pool = memory::import();
        let recv = Recv::new(sockets, pool, unpack);
        let handle = recv.handle;
        (Comm::build(dev, Inner::Recv(Box::new(recv))), handle)
    }

    /// # Safety
    /// A live comm, not in use, and never used again.
    pub(crate) unsafe fn close(comm: *mut c_void) {
        lock(&LIVE).get_or_insert_default().remove(&(comm as usize));
        down(&counters().comms, 1);
        // SAFETY: by the contract.
        let comm = unsafe { Box::from_raw(comm.cast::<Comm>()) };
        let dev = comm.dev;
        match comm.inner.into_inner().unwrap_or_else(|p| p.into_inner()) {
            Inner::Send(send) => send.requests.iter().for_each(|r| release(dev, r.mr)),
            Inner::Recv(recv) => recv.close(dev),
        }
    }

    /// One call at a time on a comm.
    fn with<R>(&self, call: &str, body: impl FnOnce(&mut Inner) -> R) -> R {
        let Ok(mut inner) = self.inner.try_lock() else { violation!("{call} while another thread uses the comm") };
        body(&mut inner)
    }

    fn handle(&self, number: u64) -> *mut c_void {
        std::ptr::from_ref(&self.slots[(number % MAX_REQUESTS as u64) as usize]).cast_mut().cast()
    }

    pub(crate) fn isend(&self, data: usize, len: usize, mr: usize) -> Result<*mut c_void, ncclResult_t> {
        memory::with("isend", self.dev, mr, |mr| {
            if data < mr.base || data + len > mr.base + mr.size {
                violation!("isend of {len} bytes at {data:#x}: outside of the registration of {} at {:#x}", mr.size, mr.base);
            }
        });
        self.with("isend", |inner| {
            let Inner::Send(send) = inner else { violation!("isend on a receive comm") };
            static SENDS: AtomicU64 = AtomicU64::new(0);
            if SENDS.fetch_add(1, Ordering::Relaxed) >= settings().sends {
                return Err(NCCL_SYSTEM_ERROR);
            }
            let gpu = memory::with("isend", self.dev, mr, |mr| mr.gpu);
            let number = send.post(data, len, mr, gpu)?;
            memory::with("isend", self.dev, mr, |mr| mr.in_flight += 1);
            Ok(self.handle(number))
        })
    }

    pub(crate) fn irecv(&self, len: usize, mr: usize) -> Result<*mut c_void, ncclResult_t> {
        let device = memory::with("irecv", self.dev, mr, |mr| mr.device);
        if !device {
            crate::logger::warn("a host receive on a data socket", 0);
            return Err(refused!("a host receive on a data socket"));
        }
        self.with("irecv", |inner| {
            let Inner::Recv(recv) = inner else { violation!("irecv on a send comm") };
            let number = recv.post(len, mr)?;
            memory::with("irecv", self.dev, mr, |mr| mr.in_flight += 1);
            Ok(self.handle(number))
        })
    }

    pub(crate) fn test(&self, index: usize) -> Result<bool, ncclResult_t> {
        let dev = self.dev;
        self.with("test", |inner| match inner {
            Inner::Send(send) => send.test(index, dev),
            Inner::Recv(recv) => recv.test(index, dev),
        })
    }

    pub(crate) fn consumed(&self, index: usize) -> Result<(), ncclResult_t> {
        self.with("irecvConsumed", |inner| {
            let Inner::Recv(recv) = inner else { violation!("irecvConsumed on a send comm") };
            recv.consumed(index)
        })
    }
}

fn release(dev: usize, mr: usize) {
    memory::with("the end of a request", dev, mr, |mr| mr.in_flight -= 1);
}

/// The share of a message that each data socket carries: contiguous.
fn share(len: usize, socket: usize) -> std::ops::Range<usize> {
    len * socket / SOCKETS..len * (socket + 1) / SOCKETS
}

// ---- sending ----

struct Send {
    sockets: Sockets,
    requests: VecDeque<SendRequest>,
    posted: u64,
    dead: bool,
    lent: [Lent; SOCKETS],
}

struct SendRequest {
    number: u64,
    data: usize,
    len: usize,
    mr: usize,
    /// A host copy of real GPU memory; `data` then points to it.
    _bytes: Vec<u8>,
    header: usize,
    sent: [usize; SOCKETS],
    /// The number of calls on each socket, including its last bytes.
    given: [u32; SOCKETS],
}

impl SendRequest {
    /// Everything is sent, and the kernel no longer needs the memory.
    fn done(&self, lent: &[Lent; SOCKETS]) -> bool {
        self.header == HEADER && (0..SOCKETS).all(|s| self.sent[s] == share(self.len, s).len() && lent[s].past(self.given[s]))
    }
}

/// Writes without MSG_NOSIGNAL: a dead peer raises SIGPIPE.
fn write(stream: &TcpStream, data: usize, len: usize) -> std::io::Result<usize> {
    // SAFETY: registered memory, or a header on the stack, of that length.
    let n = unsafe { libc::send(stream.as_raw_fd(), data as *const _, len, libc::MSG_DONTWAIT) };
    match usize::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => match std::io::Error::last_os_error() {
            e if e.kind() == std::io::ErrorKind::WouldBlock => Ok(0),
            e => Err(e),
        },
    }
}

impl Send {
    fn post(&mut self, data: usize, len: usize, mr: usize, gpu: Option<&'static Gpu>) -> Result<u64, ncclResult_t> {
        if len == 0 {
            violation!("isend of 0 bytes");
        }
        let limit = settings().chunk;
        if len > limit && !settings().lenient {
            violation!("isend of {len} bytes with NCCL_DYNAMIC_CHUNK_SIZE {limit}: it would never be whole");
        }
        if self.dead {
            raise_sigpipe();
            return Err(NCCL_SYSTEM_ERROR);
        }
        if self.requests.len() == MAX_REQUESTS {
            return Err(refused!("a 17th send"));
        }
        let number = self.posted;
        let bytes = gpu.map_or_else(Vec::new, |gpu| gpu.fetch(data, len));
        let data = if gpu.is_some() { bytes.as_ptr() as usize } else { data };
        self.requests.push_back(SendRequest {
            number,
            data,
            len,
            mr,
            _bytes: bytes,
            header: 0,
            sent: [0; SOCKETS],
            given: self.lent.map(|l| l.given),
        });
        self.posted += 1;
        self.progress().inspect_err(|_| {
            self.requests.pop_back();
        })?;
        Ok(number)
    }

    fn progress(&mut self) -> Result<(), ncclResult_t> {
        let chunk = settings().chunk;
        let moved = if chunk == 0 { Ok(()) } else { self.push(chunk) };
        moved.map_err(|_| {
            self.dead = true;
            NCCL_SYSTEM_ERROR
        })
    }

    fn push(&mut self, chunk: usize) -> std::io::Result<()> {
        let (mut control_open, mut open) = (true, [true; SOCKETS]);
        for request in &mut self.requests {
            let mut header = [0u8; HEADER];
            header[..4].copy_from_slice(&(request.len as u32).to_ne_bytes());
            header[4..].copy_from_slice(&(request.number as u32).to_ne_bytes());
            if control_open && request.header < HEADER {
                let rest = &header[request.header..];
                request.header += write(&self.sockets.control, rest.as_ptr() as usize, rest.len())?;
                control_open = request.header == HEADER;
            }
            // Only one piece of a message that is too long is sent.
            let reach = request.len.min(chunk);
            for (socket, open) in open.iter_mut().enumerate() {
                let part = share(request.len, socket);
                let whole = part.len();
                let end = part.end.min(reach).max(part.start);
                let at = part.start + request.sent[socket];
                if *open && at < end {
                    let (stream, from, len) = (&self.sockets.data[socket], request.data + at, end - at);
                    request.sent[socket] += if settings().late {
                        let sent = late::lend(stream, from, len, &mut self.lent[socket])?;
                        request.given[socket] = self.lent[socket].given;
                        sent
                    } else {
                        write(stream, from, len)?
                    };
                }
                *open &= request.sent[socket] == whole;
            }
        }
        Ok(())
    }

    fn test(&mut self, index: usize, dev: usize) -> Result<bool, ncclResult_t> {
        let Some(oldest) = self.requests.front() else { violation!("test of a send that has ended") };
        if oldest.number as usize % MAX_REQUESTS != index {
            return Err(refused!("test of a send that is not the oldest"));
        }
        if self.dead {
            raise_sigpipe();
            return Err(NCCL_SYSTEM_ERROR);
        }
        self.progress()?;
        self.sockets.data.iter().zip(&mut self.lent).for_each(|(socket, lent)| late::settle(socket, lent));
        let done = self.requests.front().is_some_and(|r| r.done(&self.lent));
        if done {
            if let Some(request) = self.requests.pop_front() {
                release(dev, request.mr);
            }
        }
        Ok(done)
    }
}

// ---- receiving ----

struct Recv {
    sockets: Sockets,
    rules: Rules,
    pool: &'static Pool,
    unpack: bool,
    meta: *mut netUnpackMeta,
    handle: *mut unpackNetDeviceHandle,
    /// The GPU memory of both, on a real GPU.
    real: Option<(PinnedBuffer, DeviceBuffer)>,
    /// Posted and not consumed, oldest first.
    requests: VecDeque<RecvRequest>,
    posted: u64,
    header: Vec<u8>,
    dead: bool,
    seed: u64,
}
// SAFETY: the pointers are its own mappings.
unsafe impl std::marker::Send for Recv {}

struct RecvRequest {
    number: u64,
    mr: usize,
    len: Option<usize>,
    got: [usize; SOCKETS],
    entries: Vec<loadMeta>,
    pages: Vec<u32>,
    reported: bool,
}

impl RecvRequest {
    fn complete(&self) -> bool {
        self.len.is_some_and(|len| (0..SOCKETS).all(|s| self.got[s] == share(len, s).len()))
    }
}

fn map(len: usize) -> *mut c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        violation!("no memory for a meta queue");
    }
    at
}

/// Bytes of the mapping that holds a comm's meta queue and device handle. Unmapped at the close: a later read crashes.
const META: usize = (size_of::<netUnpackMeta>() + size_of::<unpackNetDeviceHandle>()).next_multiple_of(PAGE);

impl Recv {
    fn new(sockets: Sockets, pool: &'static Pool, unpack: bool) -> Recv {
        let real = pool.gpu.map(|gpu| (gpu.pinned(META), gpu.device(PAGE)));
        let meta = real.as_ref().map_or_else(|| map(META), |(host, _)| host.mapped().host.cast()).cast::<netUnpackMeta>();
        // SAFETY: the mapping has room for both.
        let mut handle = unsafe { meta.add(1).cast::<unpackNetDeviceHandle>() };
        // SAFETY: as above.
        unsafe { handle.write(unpackNetDeviceHandle { meta, bounce_buf: pool.base.cast(), head: u64::MAX }) };
        if let (Some(gpu), Some((_, device))) = (pool.gpu, &real) {
            // SAFETY: a page of this comm's own, and the value written above, in pinned memory.
            unsafe { gpu.store(std::iter::once((device.ptr(), handle.cast_const().cast(), size_of::<unpackNetDeviceHandle>()))) };
            handle = device.ptr() as *mut unpackNetDeviceHandle;
        }
        let (requests, header, rules) = (VecDeque::new(), Vec::new(), Rules::make(&sockets.data));
        Recv { sockets, rules, pool, unpack, meta, handle, real, requests, posted: 0, header, dead: false, seed: meta as u64 | 1 }
    }

    fn close(self, dev: usize) {
        self.rules.take_back(&self.sockets.data);
        for request in &self.requests {
            self.pool.give_back(&request.pages);
            if !request.reported {
                release(dev, request.mr);
            }
        }
        if self.real.is_none() {
            // SAFETY: the mapping of `new`.
            unsafe { libc::munmap(self.meta.cast(), META) };
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 11) as usize % below.max(1)
    }

    fn post(&mut self, len: usize, mr: usize) -> Result<u64, ncclResult_t> {
        if len == 0 {
            violation!("irecv of 0 bytes");
        }
        if !self.unpack {
            violation!("a receive on a comm that was accepted without a device handle crashes");
        }
        if self.requests.len() == MAX_REQUESTS {
            return Err(refused!("a 17th receive: those that are done hold their slots until they are consumed"));
        }
        let number = self.posted;
        let (entries, pages) = (Vec::new(), Vec::new());
        self.requests.push_back(RecvRequest { number, mr, len: None, got: [0; SOCKETS], entries, pages, reported: false });
        self.posted += 1;
        Ok(number)
    }

    /// Reads announcements for receives that have none.
    fn read_control(&mut self) {
        while !self.dead && self.requests.iter().any(|r| r.len.is_none()) {
            let mut buffer = [0u8; HEADER];
            let rest = HEADER - self.header.len();
            // SAFETY: a buffer of that length.
            let n = unsafe { libc::recv(self.sockets.control.as_raw_fd(), buffer.as_mut_ptr().cast(), rest, libc::MSG_DONTWAIT) };
            match n {
                1.. => self.header.extend_from_slice(&buffer[..n as usize]),
                0 => self.dead = true,
                _ if std::io::Error::last_os_error().kind() == std::io::ErrorKind::WouldBlock => return,
                _ => self.dead = true,
            }
            if let Some(bytes) = self.header.first_chunk::<4>().filter(|_| self.header.len() == HEADER) {
                let len = u32::from_ne_bytes(*bytes) as usize;
                self.header.clear();
                if let Some(request) = self.requests.iter_mut().find(|r| r.len.is_none()) {
                    request.len = Some(len);
                }
            }
        }
    }

    /// Reads one fragment of a socket's share; `false` when there is none.
    fn read_fragment(&mut self, socket: usize) -> bool {
        let current = self.requests.iter().position(|r| r.len.is_none_or(|len| r.got[socket] != share(len, socket).len()));
        let Some((at, len)) = current.and_then(|at| self.requests[at].len.map(|len| (at, len))) else { return false };
        let part = share(len, socket);
        let left = part.len() - self.requests[at].got[socket];
        let largest = settings().fragment;
        let size = (largest / 2 + self.random(largest / 2 + 1)).clamp(1, left);
        let Some(page) = self.pool.take() else { return false };
        let offset = self.random(PAGE - size.min(PAGE) + 1);
        let src = page as usize * PAGE + offset;
        // SAFETY: size bytes inside a page that is ours.
        let n = unsafe {
            libc::recv(self.sockets.data[socket].as_raw_fd(), self.pool.mirror.add(src).cast(), size, libc::MSG_DONTWAIT)
        };
        if n <= 0 {
            self.pool.give_back(&[page]);
            return false;
        }
        let request = &mut self.requests[at];
        let dst = part.start + request.got[socket];
        request.got[socket] += n as usize;
        request.pages.push(page);
        request.entries.push(loadMeta { src_off: src as u32, len: n as u32, dst_off: dst as u64 });
        if request.entries.len() > MAX_FRAGMENTS {
            eprintln!("strict-foreign: more than {MAX_FRAGMENTS} fragments in one receive");
            std::process::exit(1);
        }
        true
    }

    fn progress(&mut self) {
        self.read_control();
        let mut any = true;
        while any {
            // Alternates, so that fragments of the two shares mix.
            any = (0..SOCKETS).fold(false, |any, s| self.read_fragment(s) | any);
        }
    }

    fn test(&mut self, index: usize, dev: usize) -> Result<bool, ncclResult_t> {
        let Some(at) = self.requests.iter().position(|r| !r.reported) else { violation!("test of a receive that has ended") };
        if self.requests[at].number as usize % MAX_REQUESTS != index {
            return Err(refused!("test of a receive that is not the oldest"));
        }
        self.progress();
        let waiting = self.requests.iter().filter(|r| !r.complete()).count();
        if waiting > 6 * SOCKETS {
            crate::logger::warn("No free space for recv task, fd", waiting as i32);
        }
        if self.dead && self.requests.iter().any(|r| r.len.is_none()) {
            raise_sigpipe();
            return Err(NCCL_SYSTEM_ERROR);
        }
        if !self.requests[at].complete() {
            return Ok(false);
        }
        self.publish(at);
        release(dev, self.requests[at].mr);
        Ok(true)
    }

    fn publish(&mut self, at: usize) {
        let mut entries = std::mem::take(&mut self.requests[at].entries);
        for i in (1..entries.len()).rev() {
            let j = self.random(i + 1);
            entries.swap(i, j);
        }
        up(&counters().messages_in, None, 1);
        if let Some(gpu) = self.pool.gpu {
            let copy = |e: &loadMeta| {
                let at = e.src_off as usize;
                (self.pool.base as u64 + at as u64, self.pool.mirror.wrapping_add(at).cast_const(), e.len as usize)
            };
            // SAFETY: fragments in pages of this receive, filled in the mirror.
            unsafe { gpu.store(entries.iter().map(copy)) };
        }
        let request = &mut self.requests[at];
        request.reported = true;
        let slot = (request.number % MAX_REQUESTS as u64) as usize;
        // SAFETY: at most MAX_FRAGMENTS entries in a row that is not read before the count is written.
        unsafe {
            let row = (&raw mut (*self.meta).mem[slot]).cast::<loadMeta>();
            std::ptr::copy_nonoverlapping(entries.as_ptr(), row, entries.len());
            AtomicU64::from_ptr(&raw mut (*self.meta).cnt[slot]).store(entries.len() as u64, Ordering::Release);
        }
    }

    fn consumed(&mut self, index: usize) -> Result<(), ncclResult_t> {
        let oldest = self.requests.front().filter(|r| r.reported && r.number as usize % MAX_REQUESTS == index);
        if oldest.is_none() {
            return Err(refused!("irecvConsumed of a receive that is not done, or not the oldest"));
        }
        if let Some(request) = self.requests.pop_front() {
            self.pool.give_back(&request.pages);
        }
        Ok(())
    }
}
