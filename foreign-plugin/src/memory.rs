//! Registrations, checked as the driver would, and the receive memory: one pool of pages for all comms, imported at the first accept.

use crate::gpu::{self, Gpu};
use crate::rules::{counters, down, lock, settings, up, violation};
use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

pub(crate) use nccl_net_abi::PAGE;

/// A registration.
pub(crate) struct Mr {
    pub dev: usize,
    pub base: usize,
    pub size: usize,
    pub device: bool,
    pub in_flight: usize,
    /// Its GPU, if GPUs are real.
    pub gpu: Option<&'static Gpu>,
    /// The descriptor that a DMA-BUF costs.
    _descriptors: Vec<OwnedFd>,
}

static LIVE: Mutex<Option<HashMap<usize, Mr>>> = Mutex::new(None);

/// Whether every page of a range is mapped.
pub(crate) fn mapped(base: usize, size: usize) -> bool {
    let mut state = vec![0u8; size.div_ceil(PAGE)];
    // SAFETY: the array has an entry for each page; addresses that are not mapped give ENOMEM.
    unsafe { libc::mincore(base as *mut _, size, state.as_mut_ptr()) == 0 }
}

/// Registers memory; the number is the mhandle. `None` if the process is out of descriptors.
pub(crate) fn register(dev: usize, base: usize, size: usize, device: bool) -> Option<usize> {
    let mut descriptors = Vec::new();
    if device {
        if settings().devices.get(dev).is_none_or(|d| d.pci_path.is_none()) {
            violation!("regMr for device {dev}, which has no PCI path (the plugin would read a null pointer)");
        }
        if base % PAGE != 0 || size % PAGE != 0 || size == 0 {
            violation!("regMr of {size} bytes at {base:#x}: not whole pages (the plugin would close descriptor 0)");
        }
        if settings().cuda {
            gpu::current("regMr").check("regMr", base, size);
        } else if !mapped(base, size) {
            violation!("regMr of {size} bytes at {base:#x}: reaches beyond mapped memory");
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
    let gpu = (device && settings().cuda).then(|| gpu::current("regMr"));
    live.insert(id, Mr { dev, base, size, device, in_flight: 0, gpu, _descriptors: descriptors });
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
        None => violation!("{call} with registration {id:#x}, which does not exist (or was dropped)"),
    }
}

/// The receive memory.
pub(crate) struct Pool {
    /// At the readers' address.
    pub base: *mut u8,
    /// At the address that this plugin writes: on a real GPU a mirror, from which pages are copied.
    pub mirror: *mut u8,
    pub gpu: Option<&'static Gpu>,
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

/// The pool, imported on first use: looked up and stored in two steps, as in TCPX.
pub(crate) fn import() -> &'static Pool {
    if settings().cuda {
        return import_of(gpu::current("accept"));
    }
    let there = POOL.load(Ordering::Acquire);
    if !there.is_null() {
        // SAFETY: set, and never freed.
        return unsafe { &*there };
    }
    if let Err(fault) = crate::manager::answer_or_spin("import") {
        violation!("accept cannot import receive memory ({fault}): the plugin ends the process");
    }
    let pool = Box::into_raw(Box::new(Pool::new(settings().pages)));
    IMPORTING.fetch_add(1, Ordering::AcqRel);
    // A thread that comes now imports as well; if calls are not serialised, the test needs one to.
    let end = Instant::now() + if settings().unlocked { Duration::from_secs(10) } else { Duration::from_millis(5) };
    while Instant::now() < end && IMPORTING.load(Ordering::Acquire) < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    up(&counters().imports, None, 1);
    let before = POOL.swap(pool, Ordering::AcqRel);
    if !before.is_null() {
        // SAFETY: never freed; comms that point to it must crash on the unmapped memory.
        unsafe { (*before).unmap() };
    }
    // SAFETY: made above, and never freed.
    unsafe { &*pool }
}

/// The pool of a real GPU.
fn import_of(gpu: &'static Gpu) -> &'static Pool {
    static POOLS: Mutex<Option<HashMap<i32, &'static Pool>>> = Mutex::new(None);
    lock(&POOLS).get_or_insert_default().entry(gpu.ordinal).or_insert_with(|| {
        up(&counters().imports, None, 1);
        let pages = settings().pages.min(1 << 14);
        let (memory, mirror) = (gpu.device(pages * PAGE), gpu.pinned(pages * PAGE));
        let (base, mirror_at) = (memory.ptr() as *mut u8, mirror.mapped().host);
        std::mem::forget((memory, mirror));
        let free = Mutex::new((0..pages as u32).rev().collect());
        Box::leak(Box::new(Pool { base, mirror: mirror_at, gpu: Some(gpu), pages, free }))
    })
}

impl Pool {
    fn new(pages: usize) -> Pool {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            violation!("no receive memory of {pages} pages");
        }
        Pool { base: base.cast(), mirror: base.cast(), gpu: None, pages, free: Mutex::new((0..pages as u32).rev().collect()) }
    }

    /// # Safety
    /// The memory is not used afterwards; an access crashes.
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

    /// Returns pages to the pool and overwrites them, as the next message would.
    pub(crate) fn give_back(&self, pages: &[u32]) {
        let place = |page: u32| self.base.wrapping_add(page as usize * PAGE);
        match self.gpu {
            // SAFETY: pages of the pool that their comm no longer uses.
            Some(gpu) => unsafe { gpu.fill(pages.iter().map(|&page| place(page) as u64), 0xDD, PAGE) },
            None => {
                for &page in pages {
                    // SAFETY: as above.
                    unsafe { std::ptr::write_bytes(place(page), 0xDD, PAGE) };
                }
            }
        }
        down(&counters().pages_out, pages.len() as u64);
        lock(&self.free).extend_from_slice(pages);
    }
}
