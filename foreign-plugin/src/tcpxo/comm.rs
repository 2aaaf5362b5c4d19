//! Comms and their requests. Requests take the flows of a comm in turn, at both ends: sends and receives must be posted in the same order
//! and number. They may be tested in any order. Each is a new object, which is gone once a test has said that it is done.

use super::memory;
use super::setup::FLOWS;
use crate::gpu::Gpu;
use crate::rules::{counters, down, lock, settings, up, violation};
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{c_int, c_void};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Instant;

/// Before each message: its length, its tag, and its number on the comm.
const HEADER: usize = 16;

pub(super) struct Comm {
    pub dev: usize,
    pub gpu: Option<&'static Gpu>,
    pub receives: bool,
    inner: Mutex<Inner>,
}

/// The flows of a comm and its requests on each.
struct Inner {
    flows: Vec<Flow>,
    posted: u64,
    /// Of a comm that sends over a slow NIC.
    shaper: Option<Shaper>,
}

/// How much a slow NIC has let through since when.
struct Shaper {
    since: Instant,
    passed: usize,
}

/// What a slow NIC carries in a millisecond.
const SLOW: usize = 4000;

impl Shaper {
    /// The bytes that may go now.
    fn room(&self) -> usize {
        (self.since.elapsed().as_millis() as usize * SLOW).saturating_sub(self.passed)
    }
}

struct Flow {
    stream: TcpStream,
    requests: VecDeque<Request>,
    dead: bool,
}

struct Request {
    id: usize,
    number: u64,
    tag: c_int,
    data: usize,
    len: usize,
    mr: usize,
    header: [u8; HEADER],
    /// Bytes moved, of header and message.
    moved: usize,
    /// The length of the message that arrives.
    size: Option<usize>,
    /// A host copy, for memory of a real GPU.
    copy: Option<Vec<u8>>,
    /// A test has reported an error.
    failed: bool,
}

static LIVE: Mutex<Option<HashSet<usize>>> = Mutex::new(None);
/// The comm of each request that no test has reported as done.
static REQUESTS: Mutex<Option<HashMap<usize, usize>>> = Mutex::new(None);

/// The live comm at an address, or the end of the process.
pub(super) fn live<'a>(call: &str, comm: *mut c_void) -> &'a Comm {
    if !lock(&LIVE).get_or_insert_default().contains(&(comm as usize)) {
        violation!("{call} on {comm:?}, which is no open comm");
    }
    // SAFETY: live, as just checked; the caller closes it last.
    unsafe { &*comm.cast::<Comm>() }
}

/// The size of a request that is done; an error leaves it behind.
pub(super) fn test(request: usize) -> Result<Option<usize>, ()> {
    let Some(comm) = lock(&REQUESTS).get_or_insert_default().get(&request).copied() else {
        violation!("test of request {request:#x}, which does not exist: it was done, or never posted");
    };
    live("test", comm as *mut c_void).test(request)
}

impl Comm {
    pub(super) fn send(dev: usize, gpu: Option<&'static Gpu>, flows: Vec<TcpStream>) -> *mut Comm {
        Comm::build(dev, gpu, flows, false)
    }

    pub(super) fn recv(dev: usize, gpu: Option<&'static Gpu>, flows: Vec<TcpStream>) -> *mut Comm {
        Comm::build(dev, gpu, flows, true)
    }

    fn build(dev: usize, gpu: Option<&'static Gpu>, flows: Vec<TcpStream>, receives: bool) -> *mut Comm {
        let flow = |stream| Flow { stream, requests: VecDeque::new(), dead: false };
        let slow = !receives && settings().devices.get(dev).is_some_and(|device| device.slow);
        let shaper = slow.then(|| Shaper { since: Instant::now(), passed: 0 });
        let inner = Mutex::new(Inner { flows: flows.into_iter().map(flow).collect(), posted: 0, shaper });
        let comm = Box::into_raw(Box::new(Comm { dev, gpu, receives, inner }));
        lock(&LIVE).get_or_insert_default().insert(comm as usize);
        up(&counters().comms, None, 1);
        comm
    }

    /// Returns what was under way.
    ///
    /// # Safety
    /// A live comm, not in use, and never used again.
    pub(super) unsafe fn close(comm: *mut c_void) -> Option<Unfinished> {
        lock(&LIVE).get_or_insert_default().remove(&(comm as usize));
        down(&counters().comms, 1);
        // SAFETY: by the contract.
        let comm = unsafe { Box::from_raw(comm.cast::<Comm>()) };
        let inner = comm.inner.into_inner().unwrap_or_else(|p| p.into_inner());
        let mut requests = lock(&REQUESTS);
        let requests = requests.get_or_insert_default();
        let left = inner.flows.iter().flat_map(|flow| &flow.requests);
        let unfinished = left.inspect(|request| {
            requests.remove(&request.id);
            memory::end(request.mr);
        });
        (unfinished.count() > 0).then_some(Unfinished { inner, receives: comm.receives, cuda: comm.gpu.is_some() })
    }

    /// One call at a time on a comm.
    fn with<R>(&self, call: &str, body: impl FnOnce(&mut Inner) -> R) -> R {
        let Ok(mut inner) = self.inner.try_lock() else { violation!("{call} while another thread uses the comm") };
        body(&mut inner)
    }

    /// Posts a message; gives its request.
    pub(super) fn post(&self, call: &str, receives: bool, data: usize, len: c_int, tag: c_int, mr: usize) -> usize {
        if self.receives != receives {
            violation!("{call} on a comm of the other direction");
        }
        let Ok(len @ 1..) = usize::try_from(len) else { violation!("{call} of {len} bytes") };
        memory::begin(call, self.dev, mr, data, len);
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed) * 8;
        lock(&REQUESTS).get_or_insert_default().insert(id, std::ptr::from_ref(self) as usize);
        let copy = self.gpu.map(|gpu| if receives { vec![0; len] } else { gpu.fetch(data, len) });
        self.with(call, |inner| {
            let number = inner.posted;
            let mut header = [0; HEADER];
            if !receives {
                header[..4].copy_from_slice(&(len as u32).to_ne_bytes());
                header[4..8].copy_from_slice(&tag.to_ne_bytes());
                header[8..].copy_from_slice(&number.to_ne_bytes());
            }
            let size = (!receives).then_some(len);
            let request = Request { id, number, tag, data, len, mr, header, moved: 0, size, copy, failed: false };
            inner.flows[(number % FLOWS as u64) as usize].requests.push_back(request);
            inner.posted += 1;
            inner.progress(receives);
        });
        id
    }

    fn test(&self, id: usize) -> Result<Option<usize>, ()> {
        self.with("test", |inner| {
            inner.progress(self.receives);
            let found = inner.flows.iter_mut().find_map(|flow| {
                let at = flow.requests.iter().position(|request| request.id == id)?;
                Some((flow, at))
            });
            let Some((flow, at)) = found else { violation!("a request without a flow") };
            let request = &mut flow.requests[at];
            if request.failed {
                violation!("test of request {id:#x}, of which an earlier test has said that it failed");
            }
            if !request.complete() {
                request.failed = flow.dead;
                return if flow.dead { Err(()) } else { Ok(None) };
            }
            let Some(request) = flow.requests.remove(at) else { violation!("a request without a place") };
            lock(&REQUESTS).get_or_insert_default().remove(&id);
            if self.receives {
                up(&counters().messages_in, None, 1);
                if let (Some(gpu), Some(bytes)) = (self.gpu, &request.copy) {
                    gpu.put(request.data, &bytes[..request.size.unwrap_or(0)]);
                }
            }
            memory::end(request.mr);
            Ok(request.size)
        })
    }
}

impl Request {
    fn complete(&self) -> bool {
        self.size.is_some_and(|size| self.moved == HEADER + size)
    }

    /// Where the next bytes are, or go, and how many: in the header first.
    fn next(&mut self) -> (usize, usize) {
        if self.moved < HEADER {
            return (self.header.as_mut_ptr() as usize + self.moved, HEADER - self.moved);
        }
        let (at, size) = (self.moved - HEADER, self.size.unwrap_or(0));
        let base = self.copy.as_mut().map_or(self.data, |copy| copy.as_mut_ptr() as usize);
        (base + at, size - at)
    }

    /// Reads the header of a message that arrives.
    fn learn(&mut self) {
        let word = |at: usize| self.header[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        let (size, tag, number) = (word(0) as usize, word(4) as c_int, u64::from(word(8)) | u64::from(word(12)) << 32);
        if (tag, number) != (self.tag, self.number) {
            let (own_tag, own) = (self.tag, self.number);
            violation!("receive {own} with tag {own_tag} meets send {number} with tag {tag}: not in the same order and number");
        }
        if size > self.len {
            violation!("a message of {size} bytes for a receive of {}", self.len);
        }
        self.size = Some(size);
    }
}

impl Inner {
    fn progress(&mut self, receives: bool) {
        let most = self.shaper.as_ref().map_or(usize::MAX, Shaper::room);
        let passed: usize = self.flows.iter_mut().fold(0, |passed, flow| passed + flow.progress(receives, most - passed));
        self.shaper.iter_mut().for_each(|shaper| shaper.passed += passed);
    }
}

impl Flow {
    /// Moves at most so many bytes, and returns how many.
    fn progress(&mut self, receives: bool, most: usize) -> usize {
        // A peer that closes its end ends the flow of a sender, too.
        let mut byte = 0u8;
        let peek = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: one byte of our own.
        if !receives && !self.dead && unsafe { libc::recv(self.stream.as_raw_fd(), (&raw mut byte).cast(), 1, peek) } == 0 {
            self.dead = true;
        }
        let mut passed = 0;
        for request in &mut self.requests {
            while !self.dead && !request.complete() {
                let (at, len) = request.next();
                match transfer(&self.stream, receives, at, len.min(most - passed)) {
                    Ok(0) => return passed,
                    Ok(n) => {
                        request.moved += n;
                        passed += n;
                    }
                    Err(()) => self.dead = true,
                }
                if receives && request.moved == HEADER && request.size.is_none() {
                    request.learn();
                }
            }
        }
        passed
    }
}

/// Moves bytes between a flow and memory; 0 when none can be moved now.
fn transfer(stream: &TcpStream, receives: bool, at: usize, len: usize) -> Result<usize, ()> {
    if len == 0 {
        return Ok(0);
    }
    let (fd, flags) = (stream.as_raw_fd(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
    // SAFETY: registered memory, a copy of it, or a header, of that length.
    let n = unsafe {
        match receives {
            true => libc::recv(fd, at as *mut c_void, len, flags),
            false => libc::send(fd, at as *const c_void, len, flags),
        }
    };
    match usize::try_from(n) {
        Ok(0) => Err(()),
        Ok(n) => Ok(n),
        Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::WouldBlock => Ok(0),
        Err(_) => Err(()),
    }
}

/// The requests of a comm that was closed.
pub(super) struct Unfinished {
    inner: Inner,
    receives: bool,
    /// Memory of a real GPU.
    cuda: bool,
}

impl Unfinished {
    /// Moves more bytes, where the memory is still registered.
    pub(super) fn step(&mut self) {
        let receives = self.receives;
        for flow in &mut self.inner.flows {
            let used: Vec<usize> = flow.requests.iter().map(|request| request.mr).collect();
            memory::while_registered(&used, || {
                flow.progress(receives, usize::MAX);
            });
        }
    }

    /// Registration, address and length of the receives that are not done.
    pub(super) fn targets(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let all = self.inner.flows.iter().flat_map(|flow| &flow.requests);
        all.filter(|_| self.receives && !self.cuda).map(|request| (request.mr, request.data, request.len))
    }
}
