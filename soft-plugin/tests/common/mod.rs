//! A C client's view of the plugin for tests and benchmarks: every call goes through the tables.
//! Knows nothing of the crate's internals.
#![allow(dead_code, missing_docs)]

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Once;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nccl_net_abi::*;

pub type Opaque = *mut c_void;
pub type Outcome<T> = Result<T, ncclResult_t>;

/// A step that takes this long hangs.
pub const HANG: Duration = Duration::from_secs(60);

/// Sets the environment of a test binary and initialises the plugin, once.
pub fn setup(env: &[(&str, &str)]) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::env::set_var("NCCL_SOCKET_IFNAME", "lo");
        // Tests of strict mode set it themselves.
        std::env::remove_var("UCCL_TCPX_SOFT_STRICT");
        for (name, value) in env {
            std::env::set_var(name, value);
        }
        // SAFETY: no logger.
        assert_eq!(unsafe { soft_plugin::table().init.unwrap()(None) }, NCCL_SUCCESS);
    });
}

fn outcome<T>(code: ncclResult_t, value: T) -> Outcome<T> {
    if code == NCCL_SUCCESS {
        Ok(value)
    } else {
        Err(code)
    }
}

/// Repeats a step until it yields something.
pub fn until<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = step() {
            return value;
        }
        assert!(start.elapsed() < HANG, "hang: {what}");
        if start.elapsed() > Duration::from_millis(1) {
            sleep(Duration::from_micros(50));
        } else {
            std::thread::yield_now();
        }
    }
}

pub type Handle = [u8; NCCL_NET_HANDLE_MAXSIZE];

pub fn listen() -> (Opaque, Handle) {
    let (mut comm, mut handle) = (ptr::null_mut(), [0u8; NCCL_NET_HANDLE_MAXSIZE]);
    // SAFETY: live buffers.
    let code = unsafe { soft_plugin::table().listen.unwrap()(0, handle.as_mut_ptr().cast(), &mut comm) };
    assert_eq!(code, NCCL_SUCCESS);
    (comm, handle)
}

pub fn connect_step(handle: &mut Handle) -> Outcome<Opaque> {
    let mut comm = ptr::null_mut();
    // SAFETY: live buffers.
    let code = unsafe { soft_plugin::table().connect.unwrap()(0, handle.as_mut_ptr().cast(), &mut comm, ptr::null_mut()) };
    outcome(code, comm)
}

pub fn connect(handle: &mut Handle) -> Sender {
    Sender(until("connect", || Some(connect_step(handle).expect("connect")).filter(|c| !c.is_null())))
}

pub const NO_DEVICE: ncclNetDeviceHandle_v7 =
    ncclNetDeviceHandle_v7 { netDeviceType: -1, netDeviceVersion: 0, handle: ptr::null_mut(), size: 0, needsProxyProgress: 0 };

pub fn accept_step(listener: Opaque, device: &mut ncclNetDeviceHandle_v7) -> Outcome<Opaque> {
    let (mut comm, mut device) = (ptr::null_mut(), ptr::from_mut(device));
    // SAFETY: live buffers.
    let code = unsafe { soft_plugin::table().accept.unwrap()(listener, &mut comm, &mut device) };
    outcome(code, comm)
}

/// Memory aligned for a strict plugin.
#[repr(align(4096))]
struct Page(#[allow(dead_code)] [u8; PAGE]);

pub fn accept(listener: Opaque) -> Receiver {
    receiver("accept", |device| accept_step(listener, device))
}

/// The listen comm serves both directions.
pub fn listen_both(listener: Opaque, key: Option<&[u8; 32]>) -> ncclResult_t {
    // SAFETY: a live listen comm; null or 32 bytes.
    unsafe { soft_plugin::ext().listenBoth.unwrap()(listener, key.map_or(ptr::null(), |k| k.as_ptr())) }
}

pub fn accept_send_step(listener: Opaque) -> Outcome<Opaque> {
    let mut comm = ptr::null_mut();
    // SAFETY: live buffers.
    let code = unsafe { soft_plugin::ext().acceptSend.unwrap()(listener, &mut comm) };
    outcome(code, comm)
}

pub fn accept_send(listener: Opaque) -> Sender {
    Sender(until("accept to send", || Some(accept_send_step(listener).expect("accept")).filter(|c| !c.is_null())))
}

pub fn connect_recv_step(handle: &mut Handle, device: &mut ncclNetDeviceHandle_v7) -> Outcome<Opaque> {
    let (mut comm, mut device) = (ptr::null_mut(), ptr::from_mut(device));
    // SAFETY: live buffers.
    let code = unsafe { soft_plugin::ext().connectRecv.unwrap()(0, handle.as_mut_ptr().cast(), &mut comm, &mut device) };
    outcome(code, comm)
}

pub fn connect_recv(handle: &mut Handle) -> Receiver {
    receiver("connect to receive", |device| connect_recv_step(handle, device))
}

fn receiver(what: &str, mut step: impl FnMut(&mut ncclNetDeviceHandle_v7) -> Outcome<Opaque>) -> Receiver {
    let mut device = Box::new(NO_DEVICE);
    let comm = until(what, || Some(step(&mut device).expect("comm")).filter(|c| !c.is_null()));
    let mut unpack = unpackNetDeviceHandle { meta: ptr::null_mut(), bounce_buf: ptr::null_mut(), head: 0 };
    if device.netDeviceType == NCCL_NET_DEVICE_UNPACK {
        assert_eq!(device.netDeviceVersion, NCCL_NET_DEVICE_UNPACK_VERSION);
        assert_eq!(device.size, size_of::<unpackNetDeviceHandle>());
        assert!(device.handle.is_null(), "device memory was allocated before its first use");
        let page = [Page([0; PAGE])];
        let mhandle = reg(comm, page.as_ptr().cast(), PAGE, NCCL_PTR_CUDA).expect("registration");
        dereg(comm, mhandle);
        // SAFETY: emulated device memory is host memory.
        unpack = unsafe { *device.handle.cast() };
    }
    Receiver { comm, unpack }
}

pub fn close_listen(listener: Opaque) {
    // SAFETY: a live listen comm.
    assert_eq!(unsafe { soft_plugin::table().closeListen.unwrap()(listener) }, NCCL_SUCCESS);
}

pub fn pair() -> (Sender, Receiver) {
    let (listener, mut handle) = listen();
    let sender = connect(&mut handle);
    let receiver = accept(listener);
    close_listen(listener);
    (sender, receiver)
}

pub fn reg(comm: Opaque, data: *const u8, size: usize, kind: c_int) -> Outcome<Opaque> {
    let mut mhandle = ptr::null_mut();
    // SAFETY: a live comm.
    let code = unsafe { soft_plugin::table().regMr.unwrap()(comm, data.cast_mut().cast(), size as c_int, kind, &mut mhandle) };
    outcome(code, mhandle)
}

pub fn dereg(comm: Opaque, mhandle: Opaque) {
    // SAFETY: a live comm and registration.
    assert_eq!(unsafe { soft_plugin::table().deregMr.unwrap()(comm, mhandle) }, NCCL_SUCCESS);
}

/// `test`: the received or sent size when done.
pub fn test(request: Opaque) -> Outcome<Option<usize>> {
    let (mut done, mut size) = (-1, -1);
    // SAFETY: a live request.
    let code = unsafe { soft_plugin::table().test.unwrap()(request, &mut done, &mut size) };
    outcome(code, (done == 1).then_some(size as usize))
}

pub fn wait(request: Opaque) -> Outcome<usize> {
    until("request", || match test(request) {
        Ok(None) => None,
        Ok(Some(size)) => Some(Ok(size)),
        Err(code) => Some(Err(code)),
    })
}

fn iov(segments: &[&[u8]]) -> Vec<ucclIoVec> {
    segments.iter().map(|s| ucclIoVec { base: s.as_ptr().cast_mut().cast(), len: s.len() }).collect()
}

/// The extension's `progress` of a comm.
pub fn progress(comm: Opaque) -> Outcome<u64> {
    let mut bytes = u64::MAX;
    // SAFETY: a live comm.
    let code = unsafe { soft_plugin::ext().progress.unwrap()(comm, &mut bytes) };
    outcome(code, bytes)
}

/// The extension's `describe` of a comm.
pub fn describe(comm: Opaque) -> String {
    let mut text = [1u8; 200];
    // SAFETY: a live comm, and room.
    assert_eq!(unsafe { soft_plugin::ext().describe.unwrap()(comm, text.as_mut_ptr().cast(), text.len()) }, NCCL_SUCCESS);
    std::ffi::CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap().to_owned()
}

/// Abandons a pending connect.
pub fn abandon(handle: &mut Handle) {
    // SAFETY: a live buffer.
    assert_eq!(unsafe { soft_plugin::ext().abandonConnect.unwrap()(handle.as_mut_ptr().cast()) }, NCCL_SUCCESS);
}

/// The process's open descriptors.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A send comm; closed when dropped.
pub struct Sender(pub Opaque);
// SAFETY: any thread may use a comm.
unsafe impl Send for Sender {}

impl Sender {
    pub fn isend(&self, data: *const u8, size: usize, mhandle: Opaque) -> Outcome<Opaque> {
        let mut request = ptr::null_mut();
        // SAFETY: the test keeps the buffer.
        let code = unsafe {
            soft_plugin::table().isend.unwrap()(self.0, data.cast_mut().cast(), size as c_int, 0, mhandle, &mut request)
        };
        outcome(code, request)
    }

    pub fn isendv(&self, segments: &[&[u8]]) -> Outcome<Opaque> {
        self.isendv_tagged(segments, 0)
    }

    pub fn isendv_tagged(&self, segments: &[&[u8]], tag: c_int) -> Outcome<Opaque> {
        let (iov, mut request) = (iov(segments), ptr::null_mut());
        // SAFETY: the test keeps the buffers; the vector is copied.
        let code = unsafe { soft_plugin::ext().isendv.unwrap()(self.0, iov.len() as c_int, iov.as_ptr(), tag, &mut request) };
        outcome(code, request)
    }

    pub fn reg(&self, data: &[u8], kind: c_int) -> Opaque {
        reg(self.0, data.as_ptr(), data.len(), kind).unwrap()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // SAFETY: a live comm.
        assert_eq!(unsafe { soft_plugin::table().closeSend.unwrap()(self.0) }, NCCL_SUCCESS);
    }
}

/// A receive comm; closed when dropped.
pub struct Receiver {
    pub comm: Opaque,
    pub unpack: unpackNetDeviceHandle,
}
// SAFETY: any thread may use a comm.
unsafe impl Send for Receiver {}

impl Receiver {
    pub fn irecv_n(&self, n: c_int, data: *mut u8, size: usize, mhandle: Opaque) -> Outcome<Opaque> {
        let mut request = ptr::null_mut();
        let (mut data, mut size, mut tag, mut mhandle) = (data.cast(), size as c_int, 0, mhandle);
        // SAFETY: the test keeps the buffer.
        let code = unsafe {
            soft_plugin::table().irecv.unwrap()(self.comm, n, &mut data, &mut size, &mut tag, &mut mhandle, &mut request)
        };
        outcome(code, request)
    }

    pub fn irecv(&self, data: *mut u8, size: usize, mhandle: Opaque) -> Outcome<Opaque> {
        self.irecv_n(1, data, size, mhandle)
    }

    pub fn irecvv(&self, segments: &mut [&mut [u8]]) -> Outcome<Opaque> {
        self.irecvv_tagged(segments, 0)
    }

    pub fn irecvv_tagged(&self, segments: &mut [&mut [u8]], tag: c_int) -> Outcome<Opaque> {
        let iov: Vec<_> = segments.iter_mut().map(|s| ucclIoVec { base: s.as_mut_ptr().cast(), len: s.len() }).collect();
        let mut request = ptr::null_mut();
        // SAFETY: the test keeps the buffers; the vector is copied.
        let code = unsafe { soft_plugin::ext().irecvv.unwrap()(self.comm, iov.len() as c_int, iov.as_ptr(), tag, &mut request) };
        outcome(code, request)
    }

    pub fn consumed(&self, request: Opaque) -> Outcome<()> {
        // SAFETY: a live comm and request.
        outcome(unsafe { soft_plugin::table().irecvConsumed.unwrap()(self.comm, 1, request) }, ())
    }

    pub fn reg(&self, data: &[u8], kind: c_int) -> Opaque {
        reg(self.comm, data.as_ptr(), data.len(), kind).unwrap()
    }

    /// The published descriptors of a slot.
    pub fn entries(&self, slot: usize) -> Vec<loadMeta> {
        // SAFETY: the meta queue of a live comm; the slot is done.
        unsafe {
            let meta = &*self.unpack.meta;
            meta.mem[slot][..meta.cnt[slot] as usize].to_vec()
        }
    }

    /// The reference unpacker: assembles a done receive, and checks that the entries cover it exactly.
    pub fn unpack(&self, slot: usize, size: usize) -> Vec<u8> {
        let mut message = vec![0; size];
        let mut covered = vec![false; size];
        for e in self.entries(slot) {
            let at = e.dst_off as usize;
            let target = &mut message[at..at + e.len as usize];
            // SAFETY: the descriptor's range is inside the bounce buffer by contract.
            unsafe {
                let source = self.unpack.bounce_buf.cast::<u8>().add(e.src_off as usize);
                ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len());
            }
            for seen in &mut covered[at..at + e.len as usize] {
                assert!(!std::mem::replace(seen, true), "a byte is described twice");
            }
        }
        assert!(covered.into_iter().all(|c| c), "a byte is not described");
        message
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // SAFETY: a live comm.
        assert_eq!(unsafe { soft_plugin::table().closeRecv.unwrap()(self.comm) }, NCCL_SUCCESS);
    }
}

/// A doorbell: an eventfd and its armed flag.
pub struct Doorbell {
    pub armed: &'static AtomicU32,
    pub fd: c_int,
}

impl Doorbell {
    pub fn new() -> Doorbell {
        // SAFETY: a plain system call.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
        assert!(fd >= 0);
        // A failing test drops its locals in any order; the flag must stay valid for the comms.
        Doorbell { armed: Box::leak(Box::new(AtomicU32::new(0))), fd }
    }

    pub fn attach(&self, comm: Opaque) {
        // SAFETY: the doorbell outlives the comm in every test.
        let code = unsafe { soft_plugin::ext().setDoorbell.unwrap()(comm, self.armed.as_ptr(), self.fd) };
        assert_eq!(code, NCCL_SUCCESS);
    }

    /// Arms the doorbell, calls `look` once more, and sleeps until the doorbell rings unless `look` found something.
    pub fn sleep_unless(&self, look: impl FnOnce() -> bool) {
        self.armed.swap(1, Ordering::SeqCst);
        if look() {
            self.armed.swap(0, Ordering::SeqCst);
            return;
        }
        let mut poll = libc::pollfd { fd: self.fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, and eight bytes for the eventfd.
        unsafe {
            assert!(libc::poll(&mut poll, 1, HANG.as_millis() as c_int) == 1, "hang: the doorbell did not ring");
            let mut count = 0u64;
            libc::read(self.fd, (&raw mut count).cast(), 8);
        }
    }
}

/// A small generator for tests.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// The bytes of message `number`.
pub fn pattern(number: usize, size: usize) -> Vec<u8> {
    let mut rng = Rng(number as u64 * 77 + 1);
    let mut bytes = Vec::with_capacity(size + 4);
    while bytes.len() < size {
        bytes.extend_from_slice(&(rng.next() as u32).to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}
