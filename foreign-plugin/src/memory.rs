//! Registrations, checked as the driver would, and the receive memory: one pool of pages for all comms, imported at the first accept.

use crate::rules::{counters, down, settings, up, violation};
use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub(crate) const PAGE: usize = 4096;

/// A registration.
#[derive(Debug)]
pub(crate) struct Mr {
    pub dev: usize,
    pub base: usize,
    pub size: usize,
    pub device: bool,
    pub in_flight: usize,
    /// What a DMA-BUF costs.
    _descriptors: Vec<OwnedFd>,
}

static LIVE: Mutex<Option<HashMap<usize, Mr>>> = Mutex::new(None);

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Whether every page of a range is mapped.
fn mapped(base: usize, size: usize) -> bool {
    let mut state = vec![0u8; size.div_ceil(PAGE)];
    // SAFETY: the array has an entry for each page; addresses that are not mapped give ENOMEM.
    unsafe { libc::mincore(base as *mut _, size, state.as_mut_ptr()) == 0 }
}

/// Registers; the number is the mhandle. `None` where the process is out of descriptors.
pub(crate) fn register(dev: usize, base: usize, size: usize, device: bool) -> Option<usize> {
    let mut descriptors = Vec::new();
    if device {
        if base % PAGE != 0 || size % PAGE != 0 || size == 0 {
            violation!("regMr of {size} bytes at {base:#x}: not whole pages (the plugin would close descriptor 0)");
        }
        if !mapped(base, size) {
            violation!("regMr of {size} bytes at {base:#x}: reaches beyond the memory that is there");
        }
        for _ in 0..2 {
            // SAFETY: a plain system call.
            let fd = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
            if fd < 0 {
                violation!("regMr without a free descriptor (the plugin would close descriptor 0)");
            }
            // SAFETY: opened above.
            descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    let mut live = lock(&LIVE);
    let live = live.get_or_insert_default();
    if device && live.values().any(|m| m.device && (m.dev, m.base, m.size) == (dev, base, size)) {
        violation!("{size} bytes at {base:#x} are registered twice with device {dev}");
    }
    let c = counters();
    up(&c.registrations, Some(&c.registrations_most), 1);
    up(&c.registrations_ever, None, 1);
    up(&c.descriptors, Some(&c.descriptors_most), descriptors.len() as u64);
    let id = c.registrations_ever.load(Ordering::Acquire) as usize * 16;
    live.insert(id, Mr { dev, base, size, device, in_flight: 0, _descriptors: descriptors });
    Some(id)
}

pub(crate) fn deregister(id: usize) {
    let Some(mr) = lock(&LIVE).get_or_insert_default().remove(&id) else {
        violation!("deregMr of {id:#x}, which is not registered");
    };
    if mr.in_flight > 0 {
        violation!("deregMr of {} bytes at {:#x} with {} requests in flight", mr.size, mr.base, mr.in_flight);
    }
    down(&counters().registrations, 1);
    down(&counters().descriptors, mr._descriptors.len() as u64);
}

/// Runs `body` on a live registration of the device.
pub(crate) fn with<R>(call: &str, dev: usize, id: usize, body: impl FnOnce(&mut Mr) -> R) -> R {
    let mut live = lock(&LIVE);
    match live.get_or_insert_default().get_mut(&id) {
        Some(mr) if mr.dev == dev => body(mr),
        Some(mr) => violation!("{call} on device {dev} with a registration of device {}", mr.dev),
        None => violation!("{call} with registration {id:#x}, which does not exist (any more)"),
    }
}

/// The receive memory.
pub(crate) struct Pool {
    pub base: *mut u8,
    pages: usize,
    free: Mutex<Vec<u32>>,
}
// SAFETY: pages are written by the comm that took them.
unsafe impl Sync for Pool {}
// SAFETY: as above.
unsafe impl Send for Pool {}

static POOL: AtomicPtr<Pool> = AtomicPtr::new(std::ptr::null_mut());

/// Threads inside an import.
static IMPORTING: AtomicUsize = AtomicUsize::new(0);

/// The pool, imported if it is not there yet: looked up and stored in two steps, as TCPX does.
pub(crate) fn import() -> &'static Pool {
    let there = POOL.load(Ordering::Acquire);
    if !there.is_null() {
        // SAFETY: set, and never freed.
        return unsafe { &*there };
    }
    let pool = Box::into_raw(Box::new(Pool::new(settings().pages)));
    IMPORTING.fetch_add(1, Ordering::AcqRel);
    // Whoever else comes now imports as well; where calls are not kept apart, somebody must.
    let end = Instant::now() + if settings().unlocked { Duration::from_secs(10) } else { Duration::from_millis(5) };
    while Instant::now() < end && IMPORTING.load(Ordering::Acquire) < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    up(&counters().imports, None, 1);
    let before = POOL.swap(pool, Ordering::AcqRel);
    if !before.is_null() {
        // SAFETY: never freed; comms that point at it are to notice that it was unmapped.
        unsafe { (*before).unmap() };
    }
    // SAFETY: made above, and never freed.
    unsafe { &*pool }
}

impl Pool {
    fn new(pages: usize) -> Pool {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            violation!("no receive memory of {pages} pages");
        }
        Pool { base: base.cast(), pages, free: Mutex::new((0..pages as u32).rev().collect()) }
    }

    /// # Safety
    /// Nobody may use the memory any more; who does dies.
    unsafe fn unmap(&self) {
        // SAFETY: the own mapping.
        unsafe { libc::mprotect(self.base.cast(), self.pages * PAGE, libc::PROT_NONE) };
    }

    pub(crate) fn take(&self) -> Option<u32> {
        let page = lock(&self.free).pop();
        if page.is_some() {
            up(&counters().pages_out, None, 1);
        }
        page
    }

    /// Gives pages back; what was in them is overwritten, as the next message would.
    pub(crate) fn give_back(&self, pages: &[u32]) {
        for &page in pages {
            // SAFETY: a page of the pool that its taker is done with.
            unsafe { std::ptr::write_bytes(self.base.add(page as usize * PAGE), 0xDD, PAGE) };
        }
        down(&counters().pages_out, pages.len() as u64);
        lock(&self.free).extend_from_slice(pages);
    }
}
