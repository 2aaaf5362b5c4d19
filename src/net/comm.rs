//! Comms with the rules of the plugin contract built in: at most 16 requests, only the oldest unfinished one is tested, receives
//! are consumed in order, a listen comm accepts once, and memory that the plugin keeps pointers to does not move. Callers cannot
//! break these rules. Set-up, registration and close run with the comm's GPU current.

use super::pending::{Pending, Step};
use super::plugin::{Buffer, CommKind, Plugin};
use super::plugin_thread::PluginThread;
use super::registrations::{piece, Keep, Registrar, Registration};
use super::rxdm::Asking;
use super::secure::{Guard, HalfKeys};
use super::signals::Quiet;
use super::sockets::Sockets;
use super::{handle, within, Scope};
pub(crate) use super::{handle::Handle, registrations::MHandle};
use crate::addresses::plain;
use crate::status::{bail, err, Result};
use crate::types::Span;
use nccl_net_abi::{
    ncclNetDeviceHandle_v7, ucclCommInfo, ucclFlow, ucclIoVec, MAX_REQUESTS, NCCL_NET_HANDLE_MAXSIZE, NCCL_PTR_CUDA,
};
use process::Mutex;
use std::collections::{HashMap, VecDeque};
use std::ffi::{c_int, c_void};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;
use std::sync::Arc;
use std::time::Duration;

/// A value at a stable address, for plugins that keep a pointer to it: moving the owner does not move it, and no reference to it
/// exists while the plugin may write.
struct Pinned<T>(NonNull<T>);
// SAFETY: owned plain memory; users of the pointer must order accesses.
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

/// The result of a close, once it has ended.
type Closed = Arc<Mutex<Option<Result<()>>>>;

/// A raw comm. Dropping it closes it; callers that need the result call [`RawComm::close`] first.
struct RawComm {
    plugin: Arc<Plugin>,
    comm: *mut c_void,
    kind: CommKind,
    dev: usize,
    gpu: Scope,
    /// Its data sockets: of send comms for plugins that send late, of receive comms for plugins that ask for peers.
    sockets: Sockets,
    /// Its control connection, for the same plugins.
    control: Sockets,
    /// Its close, once it has begun.
    closed: Option<Closed>,
}
// SAFETY: NCCL plugins allow a comm to be used from any thread, one at a time; `&mut` of the owners guarantees the latter.
unsafe impl Send for RawComm {}

impl RawComm {
    /// A comm that moves data.
    fn open(plugin: &Arc<Plugin>, comm: *mut c_void, kind: CommKind, dev: usize, gpu: &Scope) -> RawComm {
        plugin.registrations().opened(&**plugin, dev, comm, gpu);
        let [sockets, control] = Default::default();
        RawComm { plugin: plugin.clone(), comm, kind, dev, gpu: gpu.clone(), sockets, control, closed: None }
    }

    /// Closes it, in the plugin's thread if it has one, and then without waiting. `keep`: what it may use until its close has ended; it is
    /// dropped then, and never if the close fails.
    fn close(&mut self, keep: Keep) {
        if self.closed.is_some() {
            return;
        }
        let closed = Closed::default();
        self.closed = Some(closed.clone());
        let sockets = std::mem::take(&mut self.sockets);
        let (plugin, comm, kind) = (self.plugin.clone(), self.comm, self.kind);
        let close = Close { plugin, comm, kind, dev: self.dev, gpu: self.gpu.clone(), sockets, keep };
        match self.plugin.thread() {
            Some(thread) => thread.close(self.kind.close_name(), move || close.run(&closed)),
            None => close.run(&closed),
        }
    }

    /// Whether its close has ended.
    ///
    /// # Errors
    /// The comm stays open: it may read and write memory until the process ends.
    fn is_closed(&self) -> Result<bool> {
        match self.closed.as_ref().and_then(|closed| closed.lock().clone()) {
            Some(ended) => ended.map(|()| true),
            None => Ok(false),
        }
    }
}

impl Drop for RawComm {
    fn drop(&mut self) {
        self.close(Box::new(()));
    }
}

/// The close of a comm, with all that it needs.
struct Close {
    plugin: Arc<Plugin>,
    comm: *mut c_void,
    kind: CommKind,
    dev: usize,
    gpu: Scope,
    sockets: Sockets,
    keep: Keep,
}
// SAFETY: as for the comm that it closes, which nothing else uses.
unsafe impl Send for Close {}

impl Close {
    fn run(mut self, closed: &Closed) {
        self.plugin.registrations().closing(&*self.plugin, self.dev, self.comm);
        let ended = self.once();
        match &ended {
            // Registrations are dropped by another comm of the NIC.
            Ok(()) => drop(self.keep),
            Err(e) => {
                log::warn!("{e}");
                std::mem::forget(self.keep);
            }
        }
        *closed.lock() = Some(ended);
    }

    fn once(&mut self) -> Result<()> {
        // Which takes long on a slow NIC.
        self.sockets.leave();
        let stays = |why: &dyn std::fmt::Display| err!(Plugin, "a comm of plugin {} stays open: {why}", self.plugin.name);
        if matches!(self.kind, CommKind::Recv) {
            let replaced = self.sockets.replace();
            replaced.map_err(|why| stays(&format_args!("its close could end the process: {why}")))?;
        }
        // SAFETY: live until here, and closed once.
        within(&self.gpu, || unsafe { self.plugin.close(self.kind, self.comm) }).map_err(|e| stays(&e))
    }
}

/// A listen comm and the handle to give to the peer.
pub(crate) struct ListenComm {
    raw: SharedComm,
    /// The connect handle.
    pub handle: Handle,
}

/// A listen comm with pending accepts; it closes when the last of them is dropped.
type SharedComm = Arc<Mutex<RawComm>>;

impl ListenComm {
    pub(crate) fn new(plugin: &Arc<Plugin>, dev: usize, gpu: &Scope) -> Result<ListenComm> {
        let (on, gpu) = (plugin.clone(), gpu.clone());
        let listen = move || {
            let mut handle = [0; NCCL_NET_HANDLE_MAXSIZE];
            let comm = within(&gpu, || on.listen(dev, &mut handle))?;
            let (kind, [sockets, control]) = (CommKind::Listen, Default::default());
            let raw = RawComm { plugin: on, comm, kind, dev, gpu, sockets, control, closed: None };
            Ok(ListenComm { raw: Arc::new(Mutex::new(raw)), handle })
        };
        match plugin.thread() {
            Some(thread) => thread.call("listen", listen),
            None => listen(),
        }
    }

    /// Accepts for both directions, from a peer that dials both. With keys, the peer proves one for each direction.
    ///
    /// # Errors
    /// When the plugin cannot do this.
    pub(crate) fn both(self, send: Option<HalfKeys>, recv: Option<HalfKeys>) -> Result<(Answering, Accepting)> {
        let (listen, (hello, guard)) = (self.raw.clone(), HalfKeys::parts(send));
        let accepting = Accepting::new(self, recv)?;
        {
            let raw = listen.lock();
            // SAFETY: a live listen comm that has not accepted.
            unsafe { raw.plugin.listen_both(raw.comm, hello.as_ref())? };
        }
        Ok((Answering { listen: Some(listen), guard }, accepting))
    }
}

/// A pending accept of a connection on which this engine sends. Only for plugins whose accepts can be abandoned at once.
pub(crate) struct Answering {
    listen: Option<SharedComm>,
    /// The protection of the comm.
    guard: Guard,
}

impl Answering {
    /// The comm, once the peer has connected. After it or an error, further calls give an error.
    pub(crate) fn poll(&mut self) -> Result<Option<SendComm>> {
        let Some(listen) = self.listen.take() else { bail!(Internal, "accept polled after its end") };
        let raw = {
            let listening = listen.lock();
            // SAFETY: the listen comm is live, and has not accepted this direction (it is there).
            let comm = within(&listening.gpu, || unsafe { listening.plugin.accept_send(listening.comm) })?;
            (!comm.is_null()).then(|| RawComm::open(&listening.plugin, comm, CommKind::Send, listening.dev, &listening.gpu))
        };
        let Some(raw) = raw else {
            self.listen = Some(listen);
            return Ok(None);
        };
        SendComm::start(raw, &self.guard).map(Some)
    }
}

struct PendingAccept {
    plugin: Arc<Plugin>,
    listen: SharedComm,
    /// The listening address, if the handle shows it.
    addresses: Vec<SocketAddr>,
    /// For plugins that ask for peers: the number of its data sockets, and the sockets that had its addresses before.
    data: Option<(usize, Sockets)>,
    /// What must be known before it begins.
    asking: Option<Asking>,
    /// `None` once it has ended.
    dev_handle: Option<Pinned<ncclNetDeviceHandle_v7>>,
    /// The protection of the comm.
    guard: Guard,
    /// The plugin has seen the accept.
    begun: bool,
    /// How often it was ended by a connect, once given up.
    poked: u32,
}

/// A pending accept.
pub(crate) struct Accepting(Pending<PendingAccept>);

impl Accepting {
    /// The accept of a listen comm. With keys, the peer must prove one.
    ///
    /// # Errors
    /// When the plugin cannot check keys.
    pub(crate) fn new(listen: ListenComm, keys: Option<HalfKeys>) -> Result<Accepting> {
        let (hello, guard) = HalfKeys::parts(keys);
        let raw = listen.raw.lock();
        if let Some(hello) = &hello {
            // SAFETY: a live listen comm that has not accepted.
            unsafe { raw.plugin.key_listen(raw.comm, hello)? };
        }
        let (plugin, asking, handle) = (raw.plugin.clone(), raw.plugin.asking(&raw.gpu)?, &listen.handle);
        drop(raw);
        let how = plugin.traits.handle_check;
        let addresses: Vec<SocketAddr> = handle::addresses(how, handle).collect();
        let count = handle::data_sockets(how, handle);
        let data = plugin.traits.asks_for_peers.then(|| (count, Sockets::at(&addresses)));
        let (listen, dev_handle) = (listen.raw, Some(device_handle()));
        let (begun, poked) = (false, 0);
        let accept = PendingAccept { plugin, listen, addresses, data, asking, dev_handle, guard, begun, poked };
        Ok(Accepting(Pending::new(accept)))
    }

    /// The comm, once the peer has connected. After it or an error, further calls give an error.
    pub(crate) fn poll(&mut self) -> Result<Option<RecvComm>> {
        self.0.poll()
    }
}

impl Step for PendingAccept {
    type Up = RecvComm;
    const NAME: &'static str = "accept";

    fn thread(&self) -> Option<&'static PluginThread> {
        self.plugin.thread()
    }

    fn lingers(&self) -> bool {
        self.begun && self.dev_handle.is_some() && self.plugin.traits.lingers
    }

    fn step(&mut self) -> Result<Option<RecvComm>> {
        let Some(dev_handle) = self.dev_handle.as_ref().map(Pinned::as_ptr) else {
            bail!(Internal, "accept polled after its end")
        };
        let answer = {
            let (listen, begun) = (self.listen.lock(), &mut self.begun);
            if let (false, Some(asking)) = (*begun, &mut self.asking) {
                if !asking.poll()? {
                    return Ok(None);
                }
            }
            if !self.plugin.may_accept() {
                return Ok(None);
            }
            // If the GPU cannot be made current the accept stays pending.
            let answer = within(&listen.gpu, || {
                *begun = true;
                // SAFETY: the listen comm is live and has not accepted yet (it is still here); the comm takes over the device
                // handle.
                Ok(unsafe { listen.plugin.accept(listen.comm, dev_handle) })
            })?;
            if matches!(answer, Ok(comm) if comm.is_null()) {
                return Ok(None);
            }
            answer.map(|comm| RawComm::open(&listen.plugin, comm, CommKind::Recv, listen.dev, &listen.gpu))
        };
        let Some(dev_handle) = self.dev_handle.take() else { bail!(Internal, "accept polled after its end") };
        let data = self.data.take();
        let mut raw = match answer {
            Ok(raw) => raw,
            Err(e) => {
                if let Some((_, before)) = data {
                    // SAFETY: the accept has ended, and the plugin forgets its sockets without closing them.
                    unsafe { Sockets::at(&self.addresses).since(&before).close() };
                }
                return Err(e);
            }
        };
        self.asking.iter().for_each(Asking::imported);
        if let (Some((count, before)), Some((data, control))) = (data, self.addresses.split_at_checked(1)) {
            raw.sockets = Sockets::at(data).since(&before);
            raw.sockets.make_stand_ins(count);
            raw.control = Sockets::at(control).since(&before);
        }
        RecvComm::start(raw, dev_handle, &self.guard).map(Some)
    }

    /// Ends an accept whose peer does not connect.
    fn given_up(&mut self, since: Duration) {
        if since > POKE_AFTER * (self.poked + 1) {
            self.poked += 1;
            poke(&self.addresses);
        }
    }
}

/// Memory for the device handle of a receive comm.
fn device_handle() -> Pinned<ncclNetDeviceHandle_v7> {
    // SAFETY: plain data for which zeros are valid.
    Pinned::new(unsafe { std::mem::zeroed() })
}

/// How long an abandoned accept waits for its peer before it is ended, and between further tries.
const POKE_AFTER: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(30) };

/// Ends an accept whose peer does not connect: connects to it and closes at once. Uses all addresses, since the accept may wait
/// for control or for data.
fn poke(addresses: &[SocketAddr]) {
    for address in addresses {
        // A failed connect does not matter: the accept is polled on.
        let _ = TcpStream::connect_timeout(address, Duration::from_millis(200));
    }
}

/// A pending connect. The plugin keeps its state inside the handle, which does not move. If it is dropped early it is ended, where the
/// plugin can do so.
struct Dialling {
    plugin: Arc<Plugin>,
    dev: usize,
    gpu: Scope,
    handle: Option<Pinned<Handle>>,
    /// The protection of the comm.
    guard: Guard,
    begun: bool,
    /// Its addresses, of data and control, and the sockets connected there before, for plugins that send late.
    late: Option<(Vec<SocketAddr>, Sockets)>,
}

impl Dialling {
    fn new(plugin: &Arc<Plugin>, dev: usize, gpu: &Scope, handle: Handle, keys: Option<HalfKeys>) -> Result<Dialling> {
        let (handle, (hello, guard)) = (Pinned::new(handle), HalfKeys::parts(keys));
        if let Some(hello) = &hello {
            // SAFETY: a writable handle buffer with which nothing has begun.
            unsafe { plugin.key_connect(handle.as_ptr().cast(), hello)? };
        }
        Ok(Dialling { plugin: plugin.clone(), dev, gpu: gpu.clone(), handle: Some(handle), guard, begun: false, late: None })
    }

    /// One step with `call`, whose argument is the handle. Returns the comm once it is connected.
    fn dial(
        &mut self,
        kind: CommKind,
        call: impl FnOnce(&Plugin, usize, *mut c_void) -> Result<*mut c_void>,
    ) -> Result<Option<RawComm>> {
        let Some(handle) = self.handle.as_ref().map(Pinned::as_ptr) else { bail!(Internal, "connect polled after its end") };
        let (plugin, dev, begun) = (&self.plugin, self.dev, &mut self.begun);
        if !*begun && plugin.traits.sends_late && matches!(kind, CommKind::Send) {
            // SAFETY: live memory that the plugin has not seen yet.
            let addresses: Vec<SocketAddr> = handle::addresses(plugin.traits.handle_check, unsafe { &*handle }).collect();
            let before = Sockets::connected_to(&addresses);
            self.late = Some((addresses, before));
        }
        // If the GPU cannot be made current the connect stays pending.
        let answer = within(&self.gpu, || {
            *begun = true;
            Ok(call(plugin, dev, handle.cast()))
        })?;
        if matches!(answer, Ok(comm) if comm.is_null()) {
            return Ok(None);
        }
        self.handle = None;
        let mut raw = RawComm::open(&self.plugin, answer?, kind, self.dev, &self.gpu);
        if let Some((addresses, before)) = self.late.take() {
            let (data, control) = addresses.split_at(addresses.len().min(1));
            raw.sockets = Sockets::connected_to(data).since(&before);
            raw.control = Sockets::connected_to(control).since(&before);
        }
        Ok(Some(raw))
    }
}

impl Drop for Dialling {
    fn drop(&mut self) {
        if !self.begun {
            return;
        }
        if let Some(handle) = self.handle.take() {
            // SAFETY: a pending connect that is not polled again.
            unsafe { self.plugin.abandon_connect(handle.as_ptr().cast()) };
        }
    }
}

impl Step for Dialling {
    type Up = SendComm;
    const NAME: &'static str = "connect";

    fn thread(&self) -> Option<&'static PluginThread> {
        self.plugin.thread()
    }

    fn lingers(&self) -> bool {
        self.begun && self.handle.is_some() && self.plugin.traits.lingers
    }

    fn step(&mut self) -> Result<Option<SendComm>> {
        // SAFETY: the handle keeps its address while its owner moves; it is not used after an error.
        let raw = self.dial(CommKind::Send, |plugin, dev, handle| unsafe { plugin.connect(dev, handle) })?;
        raw.map(|raw| SendComm::start(raw, &self.guard)).transpose()
    }
}

/// A connect to send.
pub(crate) struct Connecting(Pending<Dialling>);

impl Connecting {
    /// A connect to this handle; it proves the key, if given.
    ///
    /// # Errors
    /// When the plugin cannot prove keys.
    pub(crate) fn new(
        plugin: &Arc<Plugin>,
        dev: usize,
        gpu: &Scope,
        handle: Handle,
        keys: Option<HalfKeys>,
    ) -> Result<Connecting> {
        Dialling::new(plugin, dev, gpu, handle, keys).map(|dialling| Connecting(Pending::new(dialling)))
    }

    /// The comm, once it is up. After it or an error, further calls give an error.
    pub(crate) fn poll(&mut self) -> Result<Option<SendComm>> {
        self.0.poll()
    }
}

/// A connect to receive, for engines that dial both directions.
pub(crate) struct Calling {
    // Dropped, and so ended, before the device handle.
    dialling: Dialling,
    dev_handle: Option<Pinned<ncclNetDeviceHandle_v7>>,
}

impl Calling {
    /// As [`Connecting::new`].
    ///
    /// # Errors
    /// As [`Connecting::new`].
    pub(crate) fn new(plugin: &Arc<Plugin>, dev: usize, gpu: &Scope, handle: Handle, keys: Option<HalfKeys>) -> Result<Calling> {
        Ok(Calling { dialling: Dialling::new(plugin, dev, gpu, handle, keys)?, dev_handle: Some(device_handle()) })
    }

    /// As [`Connecting::poll`].
    pub(crate) fn poll(&mut self) -> Result<Option<RecvComm>> {
        let Some(dev_handle) = self.dev_handle.as_ref().map(Pinned::as_ptr) else {
            bail!(Internal, "connect polled after its end")
        };
        // SAFETY: as for a connect to send; the comm takes over the device handle.
        let step = |plugin: &Plugin, dev, handle| unsafe { plugin.connect_recv(dev, handle, dev_handle) };
        let Some(raw) = self.dialling.dial(CommKind::Recv, step)? else { return Ok(None) };
        let Some(dev_handle) = self.dev_handle.take() else { bail!(Internal, "connect polled after its end") };
        RecvComm::start(raw, dev_handle, &self.dialling.guard).map(Some)
    }
}

/// A completion doorbell: see `setDoorbell` of the extension table.
#[derive(Clone)]
pub(crate) struct Doorbell {
    /// 1 while a thread sleeps on `fd`.
    pub armed: Arc<AtomicU32>,
    /// The eventfd to write.
    pub fd: c_int,
}

/// What keeps memory mapped while it is registered.
enum Memory {
    /// Until the plugin has dropped the registration.
    Kept(Keep),
    /// While the call runs.
    Held(Keep),
}

impl RawComm {
    fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        // SAFETY: the comm is live; the owner of the comm keeps `armed` and `fd` alive until it is closed.
        unsafe { self.plugin.set_doorbell(self.comm, doorbell.armed.as_ptr(), doorbell.fd) }
    }

    /// Registers memory. The call may be left behind while it runs: it owns what keeps the memory mapped.
    ///
    /// # Safety
    /// `memory` keeps the memory mapped; after the call, if that is [`Memory::Held`], the caller does, until the registration is dropped
    /// and the comms that use it are closed.
    unsafe fn register(&self, data: *mut c_void, len: usize, kind: c_int, memory: Memory) -> Result<Registration> {
        let (plugin, gpu, dev, comm) = (self.plugin.clone(), self.gpu.clone(), self.dev, self.comm as usize);
        let data = data as usize;
        let register = move || {
            let at = (dev, comm as *mut c_void);
            let (keep, _held) = match memory {
                Memory::Kept(keep) => (Some(keep), None),
                Memory::Held(held) => (None, Some(held)),
            };
            // SAFETY: by the caller's contract; the comm is open.
            within(&gpu, || unsafe { plugin.registrations().acquire(&plugin, at, data, len, kind, keep) })
        };
        match self.plugin.thread() {
            Some(thread) => thread.call("regMr", register),
            None => register(),
        }
    }

    /// Bytes that the network has moved: as the plugin says, else as its sockets do.
    fn progress_bytes(&self) -> Result<Option<u64>> {
        // SAFETY: the comm is live.
        if let Some(bytes) = unsafe { self.plugin.progress(self.comm) }? {
            return Ok(Some(bytes));
        }
        let moved = self.sockets.moved().map_err(|e| err!(RemoteDisconnect, "a data socket: {e}"))?;
        Ok(moved.map(|moved| if matches!(self.kind, CommKind::Recv) { moved.received } else { moved.acknowledged }))
    }

    fn describe(&self) -> Option<String> {
        // SAFETY: the comm is live.
        unsafe { self.plugin.describe(self.comm) }
    }

    fn info(&self) -> Option<ucclCommInfo> {
        // SAFETY: the comm is live.
        unsafe { self.plugin.info(self.comm) }
    }
}

/// The first address of "local-address -> peer-address on NIC".
fn local_ip(text: &str) -> Option<IpAddr> {
    text.split(" -> ").next()?.parse::<SocketAddr>().ok().map(|address| plain(address.ip()))
}

/// The sending half of a channel.
pub(crate) struct SendComm {
    // Field order is drop order: registrations are dropped after the comm if requests are in flight.
    raw: RawComm,
    /// Shared registrations of regions that this comm has sent from, by region and piece.
    regions: HashMap<(u64, u64), Registration>,
    inflight: VecDeque<*mut c_void>,
}
// SAFETY: requests are the plugin's, used only under `&mut self`.
unsafe impl Send for SendComm {}

impl SendComm {
    fn start(raw: RawComm, guard: &Guard) -> Result<SendComm> {
        // SAFETY: a live comm without requests.
        unsafe { raw.plugin.protect(raw.comm, guard)? };
        Ok(SendComm { raw, regions: HashMap::new(), inflight: VecDeque::new() })
    }

    /// Progress of its bytes, if the plugin reports it.
    pub(crate) fn flow(&self) -> Option<ucclFlow> {
        // SAFETY: the comm is live.
        unsafe { self.raw.plugin.flow(self.raw.comm) }
    }

    /// Bytes that the network has moved. Fails when the comm has failed, idle or not.
    pub(crate) fn network_bytes(&self) -> Result<Option<u64>> {
        self.raw.progress_bytes()
    }
    /// Whether the peer's kernel owes an acknowledgement, as far as the sockets inside the plugin are known.
    pub(crate) fn unanswered(&self) -> bool {
        self.raw.sockets.moved().is_ok_and(|moved| moved.is_some_and(|moved| moved.unanswered))
    }
    /// Bytes that the peer's kernel has acknowledged, and how long the network was busy with them; `None` where no kernel says so.
    pub(crate) fn delivered(&self) -> Option<(u64, Duration)> {
        let (bytes, busy) = match self.flow() {
            Some(flow) if flow.stale != 0 => return None,
            Some(flow) => (flow.acknowledged, Duration::from_micros(flow.busy_us.saturating_sub(flow.limited_us))),
            None => self.raw.sockets.moved().ok()?.map(|moved| (moved.acknowledged, moved.busy))?,
        };
        (!busy.is_zero()).then_some((bytes, busy))
    }
    /// For how long the peer has not answered on the plugin's control connection, though it should.
    pub(crate) fn control_silent(&self) -> Option<Duration> {
        self.raw.control.silent()
    }
    /// The kernel's statistics of its connection, if the plugin reports them.
    pub(crate) fn info(&self) -> Option<ucclCommInfo> {
        self.raw.info()
    }
    /// Its two addresses and its NIC as text, if the plugin reports them.
    pub(crate) fn describe(&self) -> Option<String> {
        self.raw.describe()
    }
    /// Its address on this host, with which the plugin's text begins.
    pub(crate) fn local_ip(&self) -> Option<IpAddr> {
        local_ip(&self.describe()?)
    }
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        self.raw.set_doorbell(doorbell)
    }
    /// Limits the bytes that it sends a second, if the plugin can.
    pub(crate) fn pace(&self, rate: u64) -> Result<()> {
        // SAFETY: the comm is live.
        unsafe { self.raw.plugin.pace(self.raw.comm, rate) }
    }
    /// The guard that the plugin's calls need, if any: hold it over many calls to pay once.
    pub(crate) fn quiet(&self) -> Option<Quiet> {
        self.raw.plugin.traits.raises_sigpipe.then(Quiet::begin)
    }
    /// Requests posted and not yet done.
    pub(crate) fn inflight(&self) -> usize {
        self.inflight.len()
    }

    /// Registers memory for requests of this comm. Drop the registration after the requests have ended, or after the comm. `keep` is dropped
    /// once the plugin does not use the memory any more, which may be later, or never.
    ///
    /// # Safety
    /// `keep` keeps the memory mapped.
    pub(crate) unsafe fn register(&self, data: *mut c_void, len: usize, kind: c_int, keep: Keep) -> Result<Registration> {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.register(data, len, kind, Memory::Kept(keep)) }
    }

    /// The registration of device memory for a chunk that starts at `addr` of a region. All comms of the NIC share it, and it is
    /// kept until [`SendComm::forget_region`] or the comm's end. `held` is dropped when the plugin's call has returned, which may be later
    /// than this one.
    ///
    /// # Safety
    /// The region stays mapped until then, and while `held` lasts.
    pub(crate) unsafe fn region(&mut self, span: Span, addr: u64, held: impl FnOnce() -> Keep) -> Result<MHandle> {
        let (number, base, len) = piece(span, addr);
        if let Some(share) = self.regions.get(&(span.id, number)) {
            return Ok(share.mhandle());
        }
        // SAFETY: by the caller's contract; whole pages of a mapping are mapped.
        let share = unsafe { self.raw.register(base as *mut c_void, len as usize, NCCL_PTR_CUDA, Memory::Held(held())) }?;
        let mhandle = share.mhandle();
        self.regions.insert((span.id, number), share);
        Ok(mhandle)
    }

    /// Releases a region's registrations. No request of this comm may use the region.
    pub(crate) fn forget_region(&mut self, id: u64) {
        let before = self.regions.len();
        self.regions.retain(|&(region, _), _| region != id);
        if self.regions.len() < before {
            self.settle();
        }
    }

    /// Posts one message. `false`: the plugin takes none now, try again.
    ///
    /// # Safety
    /// `[data, data + len)` is registered under `mhandle`, and stays valid and unchanged until the send is done or the comm
    /// closed.
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
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.isendv(self.raw.comm, iov, tag) }?;
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

    /// Closes it, with requests in flight or without. `keep`: what it may use until its close has ended. Nothing else may follow but
    /// [`SendComm::is_closed`] and [`SendComm::settle`].
    pub(crate) fn close(&mut self, keep: impl Send + 'static) {
        if self.raw.closed.is_none() {
            if self.inflight.is_empty() {
                self.regions.clear();
            } else {
                // The memory may change from now on, and the peer must not receive the new content.
                self.raw.sockets.reset();
            }
        }
        self.raw.close(Box::new((std::mem::take(&mut self.regions), keep)));
    }

    /// Whether its close has ended.
    ///
    /// # Errors
    /// The comm stays open: it may read memory until the process ends, and its registrations stay.
    pub(crate) fn is_closed(&self) -> Result<bool> {
        self.raw.is_closed()
    }

    /// Waits until what was closed in the plugin's thread is closed, for a short time.
    pub(crate) fn settle(&self) {
        self.raw.plugin.settle();
    }
}

impl Drop for SendComm {
    fn drop(&mut self) {
        self.close(());
    }
}

/// A receive that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// Its slot of the meta queue.
    pub slot: usize,
    /// Received bytes, if the plugin reports them.
    pub len: Option<usize>,
}

/// A receive that was posted.
struct PostedRecv {
    request: *mut c_void,
    slot: usize,
    /// Its memory, if the plugin writes there: it is flushed once the receive is done.
    flush: Option<Buffer>,
    /// The receive is done, with this result, and the request is that of the flush.
    done: Option<Done>,
}

/// The receiving half of a channel.
pub(crate) struct RecvComm {
    raw: RawComm,
    /// `None` once it is closed.
    dev_handle: Option<Pinned<ncclNetDeviceHandle_v7>>,
    posted: VecDeque<PostedRecv>,
    finished: VecDeque<*mut c_void>,
    next_slot: usize,
}
// SAFETY: requests are the plugin's, used only under `&mut self`.
unsafe impl Send for RecvComm {}

impl RecvComm {
    fn start(raw: RawComm, dev_handle: Pinned<ncclNetDeviceHandle_v7>, guard: &Guard) -> Result<RecvComm> {
        let comm =
            RecvComm { raw, dev_handle: Some(dev_handle), posted: VecDeque::new(), finished: VecDeque::new(), next_slot: 0 };
        // SAFETY: a live comm without requests.
        unsafe { comm.raw.plugin.protect(comm.raw.comm, guard)? };
        Ok(comm)
    }

    /// Bytes that the network has moved. Fails when the comm has failed, idle or not.
    pub(crate) fn network_bytes(&self) -> Result<Option<u64>> {
        self.raw.progress_bytes()
    }
    /// Its two addresses and its NIC as text, if the plugin reports them.
    pub(crate) fn describe(&self) -> Option<String> {
        self.raw.describe()
    }
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        self.raw.set_doorbell(doorbell)
    }
    /// As [`SendComm::control_silent`].
    pub(crate) fn control_silent(&self) -> Option<Duration> {
        self.raw.control.silent()
    }
    pub(crate) fn window_free(&self) -> usize {
        MAX_REQUESTS - self.posted.len() - self.finished.len()
    }
    /// Requests posted or not yet consumed.
    pub(crate) fn inflight(&self) -> usize {
        self.posted.len() + self.finished.len()
    }
    /// The device handle that `accept` filled: type, version, and a device (or emulated) pointer.
    ///
    /// # Errors
    /// `Internal` once it is closed.
    pub(crate) fn device_handle(&self) -> Result<ncclNetDeviceHandle_v7> {
        let Some(handle) = &self.dev_handle else { bail!(Internal, "the device handle of a closed comm") };
        // SAFETY: live memory that the plugin fills during `accept` or the posting of a receive, and at no other time.
        Ok(unsafe { handle.as_ptr().read() })
    }

    /// As [`SendComm::register`].
    ///
    /// # Safety
    /// As [`SendComm::register`].
    pub(crate) unsafe fn register(&self, data: *mut c_void, len: usize, kind: c_int, keep: Keep) -> Result<Registration> {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.register(data, len, kind, Memory::Kept(keep)) }
    }

    /// Posts one receive. `false`: try again.
    ///
    /// # Safety
    /// `[data, data + len)` stays writable and unread until the receive is done or the registration is dropped. For a CUDA mhandle a
    /// plugin that does not deliver never touches it.
    pub(crate) unsafe fn recv(&mut self, data: *mut c_void, len: usize, tag: c_int, mhandle: MHandle) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.irecv(self.raw.comm, data, len, tag, mhandle) }?;
        Ok(self.accepted(request, self.raw.plugin.traits.delivers.then_some(Buffer { data, len, mhandle })))
    }

    /// Posts one receive scattered to host memory. Only with the extension.
    ///
    /// # Safety
    /// Every segment stays writable and unread until the receive is done or the comm closed.
    pub(crate) unsafe fn recv_vectored(&mut self, iov: &[ucclIoVec], len: usize, tag: c_int) -> Result<bool> {
        self.admit(len)?;
        // SAFETY: by the caller's contract; the window was checked.
        let request = unsafe { self.raw.plugin.irecvv(self.raw.comm, iov, tag) }?;
        Ok(self.accepted(request, None))
    }

    fn admit(&self, len: usize) -> Result<()> {
        if len == 0 || self.window_free() == 0 {
            bail!(Internal, "receive of {len} bytes with {} requests in flight", self.inflight());
        }
        Ok(())
    }

    fn accepted(&mut self, request: *mut c_void, flush: Option<Buffer>) -> bool {
        if request.is_null() {
            return false;
        }
        self.posted.push_back(PostedRecv { request, slot: self.next_slot, flush, done: None });
        self.next_slot = (self.next_slot + 1) % MAX_REQUESTS;
        true
    }

    /// Tests the oldest unfinished receive. When done, returns its slot of the meta queue; its window slot stays taken until
    /// [`RecvComm::consume_oldest`].
    pub(crate) fn test_oldest(&mut self) -> Result<Option<Done>> {
        let Some(oldest) = self.posted.front_mut() else { return Ok(None) };
        // SAFETY: the front is the oldest unfinished request, or that of its flush.
        let Some(len) = (unsafe { self.raw.plugin.test(oldest.request) })? else { return Ok(None) };
        let (done, received) = (oldest.done.unwrap_or(Done { slot: oldest.slot, len }), oldest.request);
        if let Some(buffer) = oldest.flush.take() {
            // SAFETY: the receive is done, and its memory untouched.
            let request = unsafe { self.raw.plugin.flush(self.raw.comm, &buffer) }?;
            if !request.is_null() {
                (oldest.request, oldest.done) = (request, Some(done));
                return Ok(None);
            }
        }
        self.posted.pop_front();
        self.finished.push_back(received);
        Ok(Some(done))
    }

    /// Returns the oldest finished receive to the plugin. Its bounce memory must not be read afterwards.
    pub(crate) fn consume_oldest(&mut self) -> Result<()> {
        let Some(request) = self.finished.pop_front() else { bail!(Internal, "nothing to consume") };
        // SAFETY: the front is the oldest finished request.
        unsafe { self.raw.plugin.consumed(self.raw.comm, request) }
    }

    /// As [`SendComm::close`].
    pub(crate) fn close(&mut self, keep: impl Send + 'static) {
        // The plugin writes to the device handle.
        self.raw.close(Box::new((self.dev_handle.take(), keep)));
    }

    /// Whether its close has ended.
    ///
    /// # Errors
    /// The comm stays open: it may write memory until the process ends.
    pub(crate) fn is_closed(&self) -> Result<bool> {
        self.raw.is_closed()
    }
}

impl Drop for RecvComm {
    fn drop(&mut self) {
        self.close(());
    }
}
