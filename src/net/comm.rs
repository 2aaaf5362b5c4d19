//! Comms with the contract's rules built in: at most 16 requests, only the oldest unfinished one is tested, receives are
//! consumed in order, a listen comm accepts once, the memory that the plugin keeps pointers to keeps its place. Callers above
//! cannot break them. Set-up, registration and close run with the comm's GPU current.

use super::plugin::{CommKind, Plugin};
use super::{reaper, within, Scope};
use crate::status::{bail, Result};
use nccl_net_abi::{ncclNetDeviceHandle_v7, ucclIoVec, MAX_REQUESTS, NCCL_NET_HANDLE_MAXSIZE};
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;
use std::sync::Arc;

/// The 128 bytes that name a listen comm to the peer.
pub(crate) type Handle = [u8; NCCL_NET_HANDLE_MAXSIZE];

/// A value at an address of its own, for plugins that keep a pointer to it: moving the owner does not move it, and no reference to it
/// exists while the plugin may write.
struct Pinned<T>(NonNull<T>);
// SAFETY: owned plain memory; whoever uses the pointer owes the order of accesses.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T> Pinned<T> {
    fn new(value: T) -> Pinned<T> {
        Pinned(NonNull::from(Box::leak(Box::new(value))))
    }
    fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: the box that `new` leaked, taken back once.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// A raw comm that closes itself.
struct RawComm {
    plugin: Arc<Plugin>,
    comm: *mut c_void,
    kind: CommKind,
    gpu: Scope,
}
// SAFETY: NCCL plugins allow a comm to be used from any thread, one at a time; `&mut` of the owners guarantees the latter.
unsafe impl Send for RawComm {}

impl Drop for RawComm {
    fn drop(&mut self) {
        let closed = within(&self.gpu, || {
            // SAFETY: live until here, and dropped once.
            unsafe { self.plugin.close(self.kind, self.comm) };
            Ok(())
        });
        if let Err(e) = closed {
            log::warn!("a comm of plugin {} was not closed: {e}", self.plugin.name);
        }
    }
}

/// A listen comm and the handle to give to the peer.
pub(crate) struct ListenComm {
    raw: RawComm,
    /// The connect handle.
    pub handle: Handle,
}

impl ListenComm {
    pub(crate) fn new(plugin: &Arc<Plugin>, dev: usize, gpu: &Scope) -> Result<ListenComm> {
        let mut handle = [0; NCCL_NET_HANDLE_MAXSIZE];
        let comm = within(gpu, || plugin.listen(dev, &mut handle))?;
        Ok(ListenComm { raw: RawComm { plugin: plugin.clone(), comm, kind: CommKind::Listen, gpu: gpu.clone() }, handle })
    }
}

struct PendingAccept {
    listen: RawComm,
    dev_handle: Pinned<ncclNetDeviceHandle_v7>,
    /// The plugin has seen the accept.
    begun: bool,
}

/// An accept under way. Given up before its end it is polled on in the background, where the plugin asks for that.
pub(crate) struct Accepting(Option<PendingAccept>);

impl Accepting {
    /// The one accept that a listen comm serves.
    pub(crate) fn new(listen: ListenComm) -> Accepting {
        // SAFETY: plain data for which zeros are valid.
        let dev_handle = Pinned::new(unsafe { std::mem::zeroed() });
        Accepting(Some(PendingAccept { listen: listen.raw, dev_handle, begun: false }))
    }

    /// The comm, once the peer has connected. After it or an error, further calls give an error.
    pub(crate) fn poll(&mut self) -> Result<Option<RecvComm>> {
        let Some(pending) = &mut self.0 else { bail!(Internal, "accept polled after its end") };
        let (listen, begun, dev_handle) = (&pending.listen, &mut pending.begun, pending.dev_handle.as_ptr());
        // Where the GPU cannot be made current the accept stays as it is.
        let answer = within(&listen.gpu, || {
            *begun = true;
            // SAFETY: the listen comm is live and has not accepted yet (it is there); the device handle goes on with the comm.
            Ok(unsafe { listen.plugin.accept(listen.comm, dev_handle) })
        })?;
        if matches!(answer, Ok(comm) if comm.is_null()) {
            return Ok(None);
        }
        let Some(pending) = self.0.take() else { bail!(Internal, "accept polled after its end") };
        let (comm, listen) = (answer?, &pending.listen);
        let raw = RawComm { plugin: listen.plugin.clone(), comm, kind: CommKind::Recv, gpu: listen.gpu.clone() };
        let dev_handle = pending.dev_handle;
        Ok(Some(RecvComm { raw, dev_handle, posted: VecDeque::new(), finished: VecDeque::new(), next_slot: 0, tag: 0 }))
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        // The plugin's threads may still use the listen comm and the device handle.
        if let Some(pending) = self.0.take_if(|p| p.begun && p.listen.plugin.traits.lingers) {
            let mut rest = Accepting(Some(pending));
            reaper::keep(Box::new(move || !matches!(rest.poll(), Ok(None))));
        }
    }
}

/// A connect under way. The plugin keeps its state inside the handle, which stays where it is. Given up before its end it is ended at
/// once, or polled on in the background, as the plugin asks.
pub(crate) struct Connecting {
    plugin: Arc<Plugin>,
    dev: usize,
    gpu: Scope,
    handle: Option<Pinned<Handle>>,
    begun: bool,
}

impl Connecting {
    pub(crate) fn new(plugin: &Arc<Plugin>, dev: usize, gpu: &Scope, handle: Handle) -> Connecting {
        Connecting { plugin: plugin.clone(), dev, gpu: gpu.clone(), handle: Some(Pinned::new(handle)), begun: false }
    }

    /// The comm, once it is up. After it or an error, further calls give an error.
    pub(crate) fn poll(&mut self) -> Result<Option<SendComm>> {
        let Some(handle) = self.handle.as_ref().map(Pinned::as_ptr) else { bail!(Internal, "connect polled after its end") };
        let (plugin, dev, begun) = (&self.plugin, self.dev, &mut self.begun);
        // Where the GPU cannot be made current the connect stays as it is.
        let answer = within(&self.gpu, || {
            *begun = true;
            // SAFETY: the handle keeps its address while its owner moves; it is given up after an error.
            Ok(unsafe { plugin.connect(dev, handle.cast()) })
        })?;
        if matches!(answer, Ok(comm) if comm.is_null()) {
            return Ok(None);
        }
        self.handle = None;
        let comm = answer?;
        let raw = RawComm { plugin: self.plugin.clone(), comm, kind: CommKind::Send, gpu: self.gpu.clone() };
        Ok(Some(SendComm { raw, inflight: VecDeque::new(), tag: 0 }))
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        if !self.begun {
            return;
        }
        let Some(handle) = self.handle.take() else { return };
        if self.plugin.traits.lingers {
            let (plugin, gpu) = (self.plugin.clone(), self.gpu.clone());
            let mut rest = Connecting { plugin, dev: self.dev, gpu, handle: Some(handle), begun: true };
            reaper::keep(Box::new(move || !matches!(rest.poll(), Ok(None))));
        } else {
            // SAFETY: a connect under way that is not polled again.
            unsafe { self.plugin.abandon_connect(handle.as_ptr().cast()) };
        }
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

impl RawComm {
    fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        // SAFETY: the comm is live; the owner of the comm keeps `armed` and `fd` alive until it is closed.
        unsafe { self.plugin.set_doorbell(self.comm, doorbell.armed.as_ptr(), doorbell.fd) }
    }

    /// # Safety
    /// The memory stays mapped until the registration is dropped.
    unsafe fn register(&self, data: *mut c_void, len: usize, kind: c_int) -> Result<MHandle> {
        // SAFETY: by the caller's contract.
        within(&self.gpu, || unsafe { self.plugin.reg_mr(self.comm, data, len, kind) })
    }

    /// # Safety
    /// `mhandle` came from `register` of a comm of the same NIC, once, and no request uses it.
    unsafe fn deregister(&self, mhandle: MHandle) {
        let done = within(&self.gpu, || {
            // SAFETY: by the caller's contract.
            unsafe { self.plugin.dereg_mr(self.comm, mhandle) };
            Ok(())
        });
        if let Err(e) = done {
            log::warn!("a registration with plugin {} stays: {e}", self.plugin.name);
        }
    }

    fn progress_bytes(&self) -> Result<Option<u64>> {
        // SAFETY: the comm is live.
        unsafe { self.plugin.progress(self.comm) }
    }

    fn describe(&self) -> Option<String> {
        // SAFETY: the comm is live.
        unsafe { self.plugin.describe(self.comm) }
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
    tag: c_int,
}
// SAFETY: requests are the plugin's, used only under `&mut self`.
unsafe impl Send for SendComm {}

impl SendComm {
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        self.raw.set_doorbell(doorbell)
    }
    /// Bytes that the peer's kernel has acknowledged; `None` where the plugin cannot say.
    pub(crate) fn progress_bytes(&self) -> Result<Option<u64>> {
        self.raw.progress_bytes()
    }
    /// Addresses and NIC, for error texts; `None` where the plugin cannot say.
    pub(crate) fn describe(&self) -> Option<String> {
        self.raw.describe()
    }
    /// The plugin that carries this comm.
    pub(crate) fn plugin(&self) -> &Arc<Plugin> {
        &self.raw.plugin
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
        unsafe { self.raw.register(data, len, kind) }
    }

    /// # Safety
    /// `mhandle` came from `register` of a comm of the same NIC, once, and no request uses it.
    pub(crate) unsafe fn deregister(&self, mhandle: MHandle) {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.deregister(mhandle) }
    }

    /// Posts one message. `false`: the plugin takes none now, try again.
    ///
    /// # Safety
    /// `[data, data + len)` is registered under `mhandle`, and neither changes nor goes away until the send is done or the comm closed.
    pub(crate) unsafe fn send(&mut self, data: *mut c_void, len: usize, mhandle: MHandle) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.isend(self.raw.comm, data, len, self.tag, mhandle) }?;
        Ok(self.posted(request))
    }

    /// Posts one message gathered from host memory. Only with the extension.
    ///
    /// # Safety
    /// Every segment stays readable and unchanged until the send is done or the comm closed.
    pub(crate) unsafe fn send_vectored(&mut self, iov: &[ucclIoVec], len: usize) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.isendv(self.raw.comm, iov, self.tag) }?;
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
        self.tag = self.tag.wrapping_add(1) & c_int::MAX;
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

/// A receive that is done and not consumed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Its slot of the meta queue.
    pub slot: usize,
    /// Bytes that the plugin reports; 0 where it reports none.
    pub size: usize,
}

/// The receiving half of a channel.
pub(crate) struct RecvComm {
    raw: RawComm,
    dev_handle: Pinned<ncclNetDeviceHandle_v7>,
    posted: VecDeque<(*mut c_void, usize)>,
    finished: VecDeque<*mut c_void>,
    next_slot: usize,
    tag: c_int,
}
// SAFETY: requests are the plugin's, used only under `&mut self`.
unsafe impl Send for RecvComm {}

impl RecvComm {
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        self.raw.set_doorbell(doorbell)
    }
    /// Bytes received from the network, of messages under way too; `None` where the plugin cannot say.
    pub(crate) fn progress_bytes(&self) -> Result<Option<u64>> {
        self.raw.progress_bytes()
    }
    /// Addresses and NIC, for error texts; `None` where the plugin cannot say.
    pub(crate) fn describe(&self) -> Option<String> {
        self.raw.describe()
    }
    pub(crate) fn window_free(&self) -> usize {
        MAX_REQUESTS - self.posted.len() - self.finished.len()
    }
    /// Requests posted or not yet consumed.
    pub(crate) fn inflight(&self) -> usize {
        self.posted.len() + self.finished.len()
    }
    /// The device handle that `accept` filled: type, version, and a device (or emulated) pointer.
    pub(crate) fn device_handle(&self) -> ncclNetDeviceHandle_v7 {
        // SAFETY: live memory that the plugin fills during `accept` or the posting of a receive, and at no other time.
        unsafe { self.dev_handle.as_ptr().read() }
    }

    /// As [`SendComm::register`].
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn register(&self, data: *mut c_void, len: usize, kind: c_int) -> Result<MHandle> {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.register(data, len, kind) }
    }

    /// As [`SendComm::deregister`].
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn deregister(&self, mhandle: MHandle) {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.deregister(mhandle) }
    }

    /// Posts one receive. `false`: try again.
    ///
    /// # Safety
    /// For a host mhandle `[data, data + len)` stays writable and unread until the receive is done or the comm closed. For a CUDA
    /// mhandle the destination is not touched by the plugin.
    pub(crate) unsafe fn recv(&mut self, data: *mut c_void, len: usize, mhandle: MHandle) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.irecv(self.raw.comm, data, len, self.tag, mhandle) }?;
        Ok(self.accepted(request))
    }

    /// Posts one receive scattered to host memory. Only with the extension.
    ///
    /// # Safety
    /// Every segment stays writable and unread until the receive is done or the comm closed.
    pub(crate) unsafe fn recv_vectored(&mut self, iov: &[ucclIoVec], len: usize) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.irecvv(self.raw.comm, iov, self.tag) }?;
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
        self.tag = self.tag.wrapping_add(1) & c_int::MAX;
        self.posted.push_back((request, self.next_slot));
        self.next_slot = (self.next_slot + 1) % MAX_REQUESTS;
        true
    }

    /// Tests the oldest unfinished receive. Its window place stays taken until [`RecvComm::consume_oldest`].
    pub(crate) fn test_oldest(&mut self) -> Result<Option<Received>> {
        let Some(&(request, slot)) = self.posted.front() else { return Ok(None) };
        // SAFETY: the front is the oldest unfinished request.
        let Some(size) = unsafe { self.raw.plugin.test(request) }? else { return Ok(None) };
        self.posted.pop_front();
        self.finished.push_back(request);
        Ok(Some(Received { slot, size }))
    }

    /// Gives the oldest finished receive back to the plugin. Its bounce memory must not be read any more.
    pub(crate) fn consume_oldest(&mut self) -> Result<()> {
        let Some(request) = self.finished.pop_front() else { bail!(Internal, "nothing to consume") };
        // SAFETY: the front is the oldest finished request.
        unsafe { self.raw.plugin.consumed(self.raw.comm, request) }
    }
}
