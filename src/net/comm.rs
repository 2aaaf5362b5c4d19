//! Comms with the contract's rules built in: at most 16 requests, only the oldest unfinished one is tested, receives are
//! consumed in order, a listen comm accepts once, the connect handle keeps its place. Callers above cannot break them.

use super::plugin::{CommKind, Plugin};
use crate::status::{bail, Result};
use nccl_net_abi::{ncclNetDeviceHandle_v7, ucclIoVec, MAX_REQUESTS, NCCL_NET_HANDLE_MAXSIZE};
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::atomic::AtomicU32;
use std::sync::Arc;

/// A raw comm that closes itself.
struct RawComm {
    plugin: Arc<Plugin>,
    comm: *mut c_void,
    kind: CommKind,
}
// SAFETY: NCCL plugins allow a comm to be used from any thread, one at a time; `&mut` of the owners guarantees the latter.
unsafe impl Send for RawComm {}

impl Drop for RawComm {
    fn drop(&mut self) {
        // SAFETY: live until here, and dropped once.
        unsafe { self.plugin.close(self.kind, self.comm) };
    }
}

/// A listen comm and the handle to give to the peer.
pub(crate) struct ListenComm {
    raw: RawComm,
    /// The connect handle.
    pub handle: [u8; NCCL_NET_HANDLE_MAXSIZE],
}

impl ListenComm {
    pub(crate) fn new(plugin: &Arc<Plugin>, dev: usize) -> Result<ListenComm> {
        let mut handle = [0; NCCL_NET_HANDLE_MAXSIZE];
        let comm = plugin.listen(dev, &mut handle)?;
        Ok(ListenComm { raw: RawComm { plugin: plugin.clone(), comm, kind: CommKind::Listen }, handle })
    }

    /// Starts the one accept that a listen comm serves.
    pub(crate) fn accept(self) -> Accepting {
        // SAFETY: plain data for which zeros are valid.
        let dev_handle = Box::new(unsafe { std::mem::zeroed() });
        Accepting { listen: self.raw, dev_handle: Some(dev_handle) }
    }
}

/// An accept under way.
pub(crate) struct Accepting {
    listen: RawComm,
    dev_handle: Option<Box<ncclNetDeviceHandle_v7>>,
}

impl Accepting {
    /// The comm, once the peer has connected. After it or an error, further calls give an error.
    pub(crate) fn poll(&mut self) -> Result<Option<RecvComm>> {
        let Some(mut dev_handle) = self.dev_handle.take() else { bail!(Internal, "accept polled after its end") };
        // SAFETY: the listen comm is live and has not accepted yet (dev_handle was there); the box moves into the comm.
        let comm = unsafe { self.listen.plugin.accept(self.listen.comm, &mut *dev_handle) }?;
        if comm.is_null() {
            self.dev_handle = Some(dev_handle);
            return Ok(None);
        }
        let raw = RawComm { plugin: self.listen.plugin.clone(), comm, kind: CommKind::Recv };
        Ok(Some(RecvComm { raw, dev_handle, posted: VecDeque::new(), finished: VecDeque::new(), next_slot: 0 }))
    }
}

/// A connect under way. The plugin keeps its state inside the handle, which stays where it is.
pub(crate) struct Connecting {
    plugin: Arc<Plugin>,
    dev: usize,
    handle: Option<Box<[u8; NCCL_NET_HANDLE_MAXSIZE]>>,
}

impl Connecting {
    pub(crate) fn new(plugin: &Arc<Plugin>, dev: usize, handle: [u8; NCCL_NET_HANDLE_MAXSIZE]) -> Connecting {
        Connecting { plugin: plugin.clone(), dev, handle: Some(Box::new(handle)) }
    }

    /// The comm, once it is up. After it or an error, further calls give an error.
    pub(crate) fn poll(&mut self) -> Result<Option<SendComm>> {
        let Some(mut handle) = self.handle.take() else { bail!(Internal, "connect polled after its end") };
        // SAFETY: the box keeps its address while it moves in and out of the option; it is given up after an error.
        let comm = unsafe { self.plugin.connect(self.dev, handle.as_mut_ptr().cast()) }?;
        if comm.is_null() {
            self.handle = Some(handle);
            return Ok(None);
        }
        let raw = RawComm { plugin: self.plugin.clone(), comm, kind: CommKind::Send };
        Ok(Some(SendComm { raw, inflight: VecDeque::new() }))
    }
}

/// A completion doorbell: see `setDoorbell` of the extension table.
#[derive(Clone)]
pub(crate) struct Doorbell {
    /// 1 while somebody sleeps on `fd`.
    pub armed: Arc<AtomicU32>,
    /// The eventfd to write.
    pub fd: c_int,
}

fn set_doorbell(raw: &RawComm, doorbell: &Doorbell) -> Result<bool> {
    let Some(set) = raw.plugin.ext().and_then(|e| e.setDoorbell) else { return Ok(false) };
    // SAFETY: the comm is live; the owner of the comm keeps `armed` and `fd` alive until it is closed.
    let result = unsafe { set(raw.comm, doorbell.armed.as_ptr(), doorbell.fd) };
    if result != 0 {
        bail!(Plugin, "plugin {}: setDoorbell returned {result}", raw.plugin.name);
    }
    Ok(true)
}

/// Bytes that the network has moved for a comm; `None` where the plugin does not tell. An error when the comm has failed.
fn network_bytes(raw: &RawComm) -> Result<Option<u64>> {
    let Some(progress) = raw.plugin.ext().and_then(|e| e.progress) else { return Ok(None) };
    let mut bytes = 0;
    // SAFETY: the comm is live, the number writable.
    let result = unsafe { progress(raw.comm, &mut bytes) };
    raw.plugin.check("test", result)?;
    Ok(Some(bytes))
}

/// The two ends of a comm and its NIC, in words.
fn describe(raw: &RawComm) -> String {
    let mut text = [0u8; 256];
    let call = raw.plugin.ext().and_then(|e| e.describe);
    // SAFETY: the comm is live, the buffer writable and of that length.
    let known = call.is_some_and(|call| unsafe { call(raw.comm, text.as_mut_ptr().cast(), text.len()) } == 0);
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    if known && end > 0 {
        String::from_utf8_lossy(&text[..end]).into_owned()
    } else {
        format!("a comm of plugin {}", raw.plugin.name)
    }
}

/// Registered memory of a comm.
pub(crate) type MHandle = *mut c_void;

/// A registration with the plugin is refused above this; callers register in pieces.
pub(crate) const MAX_PIECE_BYTES: usize = 1 << 30;

/// The sending half of a channel.
pub(crate) struct SendComm {
    raw: RawComm,
    inflight: VecDeque<*mut c_void>,
}
// SAFETY: requests are the plugin's, used only under `&mut self`.
unsafe impl Send for SendComm {}

impl SendComm {
    /// As the plugin's `progress`; an error when the comm has failed, idle or not.
    pub(crate) fn network_bytes(&self) -> Result<Option<u64>> {
        network_bytes(&self.raw)
    }
    /// Its two ends and its NIC, in words.
    pub(crate) fn describe(&self) -> String {
        describe(&self.raw)
    }
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        set_doorbell(&self.raw, doorbell)
    }
    /// Requests posted and not yet done.
    pub(crate) fn inflight(&self) -> usize {
        self.inflight.len()
    }

    /// Registers memory for sends of this comm's NIC.
    ///
    /// # Safety
    /// The memory stays mapped until [`SendComm::deregister`] or the comm's end.
    pub(crate) unsafe fn register(&self, data: *mut c_void, len: usize, kind: c_int) -> Result<MHandle> {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.plugin.reg_mr(self.raw.comm, data, len, kind) }
    }

    /// # Safety
    /// `mhandle` came from `register` of a comm of the same NIC, once, and no request uses it.
    pub(crate) unsafe fn deregister(&self, mhandle: MHandle) {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.plugin.dereg_mr(self.raw.comm, mhandle) }
    }

    /// The software plugin carries this comm.
    pub(crate) fn plugin_is_soft(&self) -> bool {
        self.raw.plugin.is_soft()
    }

    /// Posts one message. `false`: the plugin takes none now, try again.
    ///
    /// # Safety
    /// `[data, data + len)` is registered under `mhandle`, and neither changes nor goes away until the send is done or the comm closed.
    pub(crate) unsafe fn send(&mut self, data: *mut c_void, len: usize, tag: c_int, mhandle: MHandle) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.isend(self.raw.comm, data, len, tag, mhandle) }?;
        Ok(self.posted(request))
    }

    /// Posts one message gathered from host memory. Only with the extension.
    ///
    /// # Safety
    /// Every segment stays readable and unchanged until the send is done or the comm closed.
    pub(crate) unsafe fn send_vectored(&mut self, iov: &[ucclIoVec], len: usize, tag: c_int) -> Result<bool> {
        self.admit(len)?;
        let Some(call) = self.raw.plugin.ext().and_then(|e| e.isendv) else { bail!(Internal, "no vectored send") };
        let mut request = std::ptr::null_mut();
        // SAFETY: by the caller's contract; the window was checked; the array is copied by the call.
        let result = unsafe { call(self.raw.comm, iov.len() as c_int, iov.as_ptr(), tag, &mut request) };
        self.raw.plugin.check("isend", result)?;
        Ok(self.posted(request))
    }

    fn admit(&self, len: usize) -> Result<()> {
        if len == 0 || self.inflight.len() >= MAX_REQUESTS {
            bail!(Internal, "send of {len} bytes with {} requests in flight", self.inflight.len());
        }
        Ok(())
    }

    fn posted(&mut self, request: *mut c_void) -> bool {
        if request.is_null() {
            return false;
        }
        self.inflight.push_back(request);
        true
    }

    /// Tests the oldest send; `true` frees its slot.
    pub(crate) fn test_oldest(&mut self) -> Result<bool> {
        let Some(&request) = self.inflight.front() else { return Ok(false) };
        // SAFETY: the front is the oldest unfinished request.
        if unsafe { self.raw.plugin.test(request) }?.is_none() {
            return Ok(false);
        }
        self.inflight.pop_front();
        Ok(true)
    }
}

/// A receive that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// Its slot of the meta queue.
    pub slot: usize,
    /// Bytes that came, where the plugin tells.
    pub len: Option<usize>,
}

/// The receiving half of a channel.
pub(crate) struct RecvComm {
    raw: RawComm,
    dev_handle: Box<ncclNetDeviceHandle_v7>,
    posted: VecDeque<(*mut c_void, usize)>,
    finished: VecDeque<*mut c_void>,
    next_slot: usize,
}
// SAFETY: requests are the plugin's, used only under `&mut self`.
unsafe impl Send for RecvComm {}

impl RecvComm {
    /// As the plugin's `progress`; an error when the comm has failed, idle or not.
    pub(crate) fn network_bytes(&self) -> Result<Option<u64>> {
        network_bytes(&self.raw)
    }
    /// Its two ends and its NIC, in words.
    pub(crate) fn describe(&self) -> String {
        describe(&self.raw)
    }
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        set_doorbell(&self.raw, doorbell)
    }
    pub(crate) fn window_free(&self) -> usize {
        MAX_REQUESTS - self.posted.len() - self.finished.len()
    }
    /// Requests posted or not yet consumed.
    pub(crate) fn inflight(&self) -> usize {
        self.posted.len() + self.finished.len()
    }
    /// The device handle that `accept` filled: type, version, and a device (or emulated) pointer.
    pub(crate) fn device_handle(&self) -> &ncclNetDeviceHandle_v7 {
        &self.dev_handle
    }

    /// As [`SendComm::register`].
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn register(&self, data: *mut c_void, len: usize, kind: c_int) -> Result<MHandle> {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.plugin.reg_mr(self.raw.comm, data, len, kind) }
    }

    /// As [`SendComm::deregister`].
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn deregister(&self, mhandle: MHandle) {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.plugin.dereg_mr(self.raw.comm, mhandle) }
    }

    /// Posts one receive. `false`: try again.
    ///
    /// # Safety
    /// For a host mhandle `[data, data + len)` stays writable and unread until the receive is done or the comm closed. For a CUDA
    /// mhandle the destination is not touched by the plugin.
    pub(crate) unsafe fn recv(&mut self, data: *mut c_void, len: usize, tag: c_int, mhandle: MHandle) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.irecv(self.raw.comm, data, len, tag, mhandle) }?;
        Ok(self.accepted(request))
    }

    /// Posts one receive scattered to host memory. Only with the extension.
    ///
    /// # Safety
    /// Every segment stays writable and unread until the receive is done or the comm closed.
    pub(crate) unsafe fn recv_vectored(&mut self, iov: &[ucclIoVec], len: usize, tag: c_int) -> Result<bool> {
        self.admit(len)?;
        let Some(call) = self.raw.plugin.ext().and_then(|e| e.irecvv) else { bail!(Internal, "no vectored receive") };
        let mut request = std::ptr::null_mut();
        // SAFETY: by the caller's contract; the window was checked; the array is copied by the call.
        let result = unsafe { call(self.raw.comm, iov.len() as c_int, iov.as_ptr(), tag, &mut request) };
        self.raw.plugin.check("irecv", result)?;
        Ok(self.accepted(request))
    }

    fn admit(&self, len: usize) -> Result<()> {
        if len == 0 || self.window_free() == 0 {
            bail!(Internal, "receive of {len} bytes with {} requests in flight", self.inflight());
        }
        Ok(())
    }

    fn accepted(&mut self, request: *mut c_void) -> bool {
        if request.is_null() {
            return false;
        }
        self.posted.push_back((request, self.next_slot));
        self.next_slot = (self.next_slot + 1) % MAX_REQUESTS;
        true
    }

    /// Tests the oldest unfinished receive. When it is done gives its slot of the meta queue; its window place stays taken until
    /// [`RecvComm::consume_oldest`].
    pub(crate) fn test_oldest(&mut self) -> Result<Option<Done>> {
        let Some(&(request, slot)) = self.posted.front() else { return Ok(None) };
        // SAFETY: the front is the oldest unfinished request.
        let Some(len) = (unsafe { self.raw.plugin.test(request) })? else { return Ok(None) };
        self.posted.pop_front();
        self.finished.push_back(request);
        Ok(Some(Done { slot, len }))
    }

    /// Gives the oldest finished receive back to the plugin. Its bounce memory must not be read any more.
    pub(crate) fn consume_oldest(&mut self) -> Result<()> {
        let Some(request) = self.finished.pop_front() else { bail!(Internal, "nothing to consume") };
        // SAFETY: the front is the oldest finished request.
        unsafe { self.raw.plugin.consumed(self.raw.comm, request) }
    }
}
