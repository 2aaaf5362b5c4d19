//! A connection as the application holds it: validates requests, guards the state with one lock, drives progress from the
//! caller's thread, waits.

use super::driver::Driver;
use super::fifo::{Access, FifoItem};
use super::shared::Shared;
use super::spare;
use super::state::{Request, State};
use super::transfer::{Direction, LocalSegment, TransferState};
use crate::region::RegionUse;
use crate::status::{bail, err, Error, ErrorKind, Result};
use crate::types::Place;
use crate::types::Segment;
use crate::wire::frame::{WireRegion, WireSegment, WireSegments, MAX_NOTIFICATION, MAX_REGIONS, MAX_SEGMENTS, MAX_SEGMENT_BYTES};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of notifications that may wait to leave before `notify` blocks.
const MAX_PENDING: usize = 256 << 20;
/// On a machine with few cores a poll of a transfer that still lacks this many bytes naps, so that the channels' threads get the core.
const NAP_BYTES: u64 = 1 << 20;
/// Bytes that no channel moves in a microsecond: a nap as long as they would take ends before the transfer does.
const NAP_BYTES_PER_US: u64 = 32 << 10;
/// Longest nap, microseconds; the nap where several transfers are polled in turn.
const NAP_MAX_US: u64 = 300;
const NAP_AMONG_US: u64 = 20;

/// A connection to a peer engine. All methods may be called from any thread.
pub struct Connection {
    pub(crate) id: u64,
    pub(crate) fd: RawFd,
    shared: Arc<Shared>,
    state: Mutex<State>,
    ended: Condvar,
    waiters: AtomicU32,
    driver: Driver,
    /// Set while the progress thread sleeps and answers for this connection: the channels' doorbell.
    armed: Arc<AtomicU32>,
    peer_ip: IpAddr,
    peer: String,
    peer_gpu_index: i32,
    peer_engine: [u8; 16],
    channels: usize,
    local: bool,
    /// Set by uccl_engine_start_listener; nothing depends on it.
    pub listener_started: AtomicBool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection to {}", self.peer)
    }
}

/// Facts about a peer from the handshake.
pub(crate) struct Peer {
    pub ip: IpAddr,
    pub name: String,
    pub gpu_index: i32,
    pub engine: [u8; 16],
}

impl Connection {
    pub(crate) fn new(
        id: u64,
        shared: Arc<Shared>,
        state: State,
        peer: Peer,
        channels: usize,
        armed: Arc<AtomicU32>,
    ) -> Connection {
        Connection {
            id,
            fd: state.control.fd(),
            local: crate::net::topology::is_local(peer.ip),
            shared,
            state: Mutex::new(state),
            ended: Condvar::new(),
            waiters: AtomicU32::new(0),
            driver: Driver::default(),
            armed,
            peer_ip: peer.ip,
            peer: peer.name,
            peer_gpu_index: peer.gpu_index,
            peer_engine: peer.engine,
            channels,
            listener_started: AtomicBool::new(false),
        }
    }

    /// The peer's address.
    pub fn peer_ip(&self) -> IpAddr {
        self.peer_ip
    }
    /// CUDA index of the peer's GPU as it counts, -1 without one.
    pub fn peer_gpu_index(&self) -> i32 {
        self.peer_gpu_index
    }
    /// The peer runs on this host.
    pub fn is_local(&self) -> bool {
        self.local
    }
    /// Data channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    // ---- requests ----

    /// Starts a read or write of several segments as one transfer; gives its id.
    ///
    /// # Errors
    /// `InvalidArgument`, `NotFound` (region), `Resource`, or why the connection is lost. Nothing moves then.
    pub fn transfer(&self, direction: Direction, items: impl ExactSizeIterator<Item = (LocalSegment, FifoItem)>) -> Result<u64> {
        let n = items.len();
        if n > MAX_SEGMENTS {
            bail!(InvalidArgument, "{n} segments, at most {MAX_SEGMENTS}");
        }
        let built = self.build(items)?;
        let now = Instant::now();
        let mut state = self.state.lock();
        let request = match built {
            Built::Request(request) => request,
            Built::Refused(error) => {
                log::error!("{}: {error}", self.peer);
                return state.start_failed(error, now);
            }
        };
        let result = match direction {
            Direction::Write => state.start_write(request, now),
            Direction::Read => state.start_read(request, now),
        };
        self.started(state, result)
    }

    fn build(&self, items: impl ExactSizeIterator<Item = (LocalSegment, FifoItem)>) -> Result<Built> {
        let mut locals = Table::new();
        let mut remotes: Table<([u8; 16], u64)> = Table::new();
        let n = items.len();
        let (segments, remote) = if n < spare::MANY {
            (Vec::with_capacity(n), WireSegments::default())
        } else {
            let kept = &mut self.state.lock().spare;
            (kept.list(n), kept.wire(n))
        };
        let mut request = Request { segments, uses: Vec::new(), remote, remote_regions: Vec::new(), total: 0 };
        // Blocks of one region follow each other: what the last item said about the region need not be worked out again.
        let mut last: Option<(FifoItem, Access, u16)> = None;
        for (local, item) in items {
            let len = local.len as u64;
            let region = locals.index(local.mr, || {
                request.uses.push(self.shared.registry.local(local.mr)?);
                Ok(())
            })?;
            request.uses[usize::from(region)].check(local.addr as u64, len)?;
            let (access, remote_region) = match last {
                Some((known, access, region)) if known.same_region(&item) => (access, region),
                _ => {
                    let access = item.access()?;
                    if access.engine != self.peer_engine {
                        return Ok(Built::Refused(err!(
                            RemoteAccess,
                            "the FIFO item of region {} belongs to another engine than this peer (has it restarted?)",
                            access.region
                        )));
                    }
                    let region = remotes.index((access.token, access.region), || {
                        request.remote_regions.push(WireRegion { id: access.region, token: access.token });
                        Ok(())
                    })?;
                    last = Some((item, access, region));
                    (access, region)
                }
            };
            if item.addr.checked_add(len).is_none() {
                return Ok(Built::Refused(err!(RemoteAccess, "[{:#x}, +{len}) wraps around", item.addr)));
            }
            let place = request.uses[usize::from(region)].place;
            request.total += len;
            let mut at = 0;
            while at < len {
                let piece = (len - at).min(MAX_SEGMENT_BYTES);
                if request.segments.len() == MAX_SEGMENTS {
                    bail!(InvalidArgument, "more than {MAX_SEGMENTS} segments of at most 1 GiB");
                }
                request.segments.push(Segment { addr: local.addr as u64 + at, len: piece, region, place, peer: access.place });
                request.remote.push(WireSegment {
                    addr: item.addr + at,
                    len: piece as u32,
                    region: remote_region,
                    initiator: place,
                    owner: access.place,
                });
                at += piece;
            }
        }
        Ok(Built::Request(request))
    }

    /// Starts a two-sided send of one message gathered from segments; gives its id.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn send(&self, items: impl ExactSizeIterator<Item = LocalSegment>) -> Result<u64> {
        let n = items.len();
        if n > MAX_SEGMENTS {
            bail!(InvalidArgument, "{n} segments, at most {MAX_SEGMENTS}");
        }
        let mut locals = Table::new();
        let (mut segments, mut uses) = (Vec::with_capacity(n), Vec::new());
        for local in items {
            let region = locals.index(local.mr, || {
                uses.push(self.shared.registry.local(local.mr)?);
                Ok(())
            })?;
            let used: &RegionUse = &uses[usize::from(region)];
            used.check(local.addr as u64, local.len as u64)?;
            if local.len > 0 {
                segments.push(Segment {
                    addr: local.addr as u64,
                    len: local.len as u64,
                    region,
                    place: used.place,
                    peer: Place::HOST,
                });
            }
        }
        let mut state = self.state.lock();
        let result = state.start_send(segments, uses, Instant::now());
        self.started(state, result)
    }

    /// Starts a receive of one message of at most `local.len` bytes; gives its id.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn recv(&self, local: LocalSegment) -> Result<u64> {
        let region = self.shared.registry.local(local.mr)?;
        region.check(local.addr as u64, local.len as u64)?;
        let segment =
            Segment { addr: local.addr as u64, len: local.len as u64, region: 0, place: region.place, peer: Place::HOST };
        let mut state = self.state.lock();
        let result = state.start_receive(segment, region, Instant::now());
        self.started(state, result)
    }

    /// Queues a notification for the peer.
    ///
    /// # Errors
    /// `InvalidArgument` above 64 MiB, or why the connection is lost.
    pub fn notify(&self, name: &[u8], message: &[u8]) -> Result<()> {
        let size = name.len().saturating_add(message.len());
        if size > MAX_NOTIFICATION {
            bail!(InvalidArgument, "a notification of {size} bytes, at most {MAX_NOTIFICATION}");
        }
        let mut state = self.state.lock();
        while state.control.pending() + size > MAX_PENDING && state.dead().is_none() {
            self.drive(&mut state);
            MutexGuard::unlocked(&mut state, || std::thread::sleep(Duration::from_micros(100)));
        }
        let result = state.notify(name, message, Instant::now());
        self.started(state, result)
    }

    /// After work was added: a failure of the connection ends it; the progress thread is told when it must poll.
    fn started<T>(&self, mut state: MutexGuard<'_, State>, result: Result<T>) -> Result<T> {
        match &result {
            Err(e) if state.dead().is_none() && !matches!(e.kind(), ErrorKind::InvalidArgument | ErrorKind::Resource) => {
                self.fail_locked(&mut state, e.clone());
            }
            Ok(_) => {
                let backlog = state.control.pending() > 0;
                drop(state);
                self.shared.work_added(backlog);
            }
            Err(_) => {}
        }
        result
    }

    /// Whether the connection is up.
    ///
    /// # Errors
    /// Why it is not, once it is lost or closed.
    pub fn status(&self) -> Result<()> {
        match self.state.lock().dead() {
            Some(e) => Err(e.clone()),
            None => Ok(()),
        }
    }

    // ---- progress ----

    /// Asks for a transfer's state, after driving progress once.
    ///
    /// # Errors
    /// The error the transfer ended with, or `NotFound`.
    pub fn poll(&self, id: u64) -> Result<TransferState> {
        let mut state = self.state.lock();
        let before = state.lookup(id)?;
        if before.complete || state.dead().is_some() {
            return Ok(before);
        }
        // Of several transfers polled in turn none may hold up the others for long.
        let only_this = self.shared.polled_again(self.id, id);
        let missing = before.bytes_total - before.bytes_done;
        let few_cores = self.shared.few_cores && !state.copies_pending();
        if few_cores && only_this && missing > NAP_BYTES && state.lanes_busy() && self.shared.plugin.is_soft() {
            drop(state);
            // Rung by the channels, the progress thread does the same with fewer rounds, and this core is theirs.
            if self.driver.stop() {
                self.shared.ring();
            }
            std::thread::sleep(Duration::from_micros((missing / NAP_BYTES_PER_US).min(NAP_MAX_US)));
            self.driver.leave(self.shared.clock());
            return self.state.lock().lookup(id);
        }
        self.driver.enter(self.shared.clock());
        let any = self.drive(&mut state);
        let after = state.lookup(id)?;
        // The channels' threads, or those of a peer on this host, are at work.
        let give_way = few_cores && !any && !after.complete && (state.lanes_busy() || after.bytes_total > NAP_BYTES);
        drop(state);
        if give_way && after.bytes_total - after.bytes_done > NAP_BYTES {
            std::thread::sleep(Duration::from_micros(NAP_AMONG_US));
        } else if give_way {
            std::thread::yield_now();
        }
        self.driver.leave(self.shared.clock());
        Ok(after)
    }

    /// Waits until a transfer has ended, at most `timeout`; `complete` tells whether it has.
    ///
    /// # Errors
    /// As [`Connection::poll`].
    pub fn wait(&self, id: u64, timeout: Option<Duration>) -> Result<TransferState> {
        let started = Instant::now();
        let deadline = timeout.map(|t| started + t);
        let spin = Duration::from_micros(50);
        loop {
            let now_state = self.poll(id)?;
            let now = Instant::now();
            if now_state.complete || deadline.is_some_and(|d| now >= d) {
                return Ok(now_state);
            }
            if now - started < spin {
                continue;
            }
            // Sleep; the progress thread drives from here and wakes us when something has ended.
            self.driver.stop();
            self.shared.ring();
            let mut state = self.state.lock();
            self.waiters.fetch_add(1, Ordering::AcqRel);
            let until = deadline.unwrap_or(now + Duration::from_millis(100)).min(now + Duration::from_millis(100));
            while state.outcomes.is_running(id) && !self.ended.wait_until(&mut state, until).timed_out() {}
            self.waiters.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// One round of progress; a failure ends the connection. Returns whether anything moved.
    fn drive(&self, state: &mut State) -> bool {
        if state.dead().is_some() {
            return false;
        }
        let before = state.outcomes.ended();
        let any = match state.progress(true, Instant::now()) {
            Ok(any) => any,
            Err(e) => {
                self.fail_locked(state, e);
                true
            }
        };
        if state.outcomes.ended() != before && self.waiters.load(Ordering::Acquire) > 0 {
            self.ended.notify_all();
        }
        any
    }

    /// A round of progress by an application thread that waits for something other than a transfer.
    pub(crate) fn drive_for_application(&self) {
        let Some(mut state) = self.state.try_lock() else { return };
        if state.dead().is_none() {
            self.driver.enter(self.shared.clock());
            self.drive(&mut state);
            self.driver.leave(self.shared.clock());
        }
    }

    /// For how long an application thread has been driving it, if one does at present.
    pub(crate) fn driven_by_application(&self) -> Option<Duration> {
        self.driver.active(self.shared.clock()).map(Duration::from_micros)
    }

    /// Lets the channels' doorbell ring, or no longer.
    pub(crate) fn arm(&self, on: bool) {
        self.armed.store(u32::from(on), Ordering::SeqCst);
    }

    /// A round of the progress thread; skipped while an application thread is at it.
    pub(crate) fn progress(&self) -> Progress {
        let Some(mut state) = self.state.try_lock() else {
            return Progress { any: false, busy: true, lanes_busy: false, copying: false, backlog: false };
        };
        let any = self.drive(&mut state);
        Progress {
            any,
            busy: state.busy(),
            lanes_busy: state.lanes_busy(),
            copying: state.copies_pending(),
            backlog: state.control.pending() > 0,
        }
    }

    /// Deadlines and heartbeats; at most every few tens of milliseconds. `false` once the connection is dead.
    pub(crate) fn tick(&self, now: Instant) -> bool {
        let Some(mut state) = self.state.try_lock() else { return true };
        if state.dead().is_some() {
            return false;
        }
        // What has arrived counts before the peer is called silent.
        self.drive(&mut state);
        if state.dead().is_none() {
            let before = state.outcomes.ended();
            // `now` may lie before what drive() saw; times compare saturating.
            let now = now.max(state.last_rx());
            if let Err(e) = state.tick(now) {
                self.fail_locked(&mut state, e);
            }
            if state.outcomes.ended() != before {
                self.ended.notify_all();
            }
        }
        state.dead().is_none()
    }

    // ---- the end ----

    fn fail_locked(&self, state: &mut State, error: Error) {
        if state.dead().is_some() {
            return;
        }
        let lost = state.outcomes.in_flight();
        let error = Error::new(error.kind(), format_args!("{}: {error}", self.peer));
        match (error.kind(), lost) {
            (ErrorKind::Canceled, 0) => log::debug!("{error}"),
            (ErrorKind::Canceled, n) => log::info!("{n} transfers canceled: {error}"),
            (ErrorKind::RemoteDisconnect, 0) => log::info!("{error}"),
            (_, n) => log::error!("connection failed with {n} transfers in flight: {error}"),
        }
        self.shared.unwatch(self.fd);
        state.fail(error);
        self.ended.notify_all();
    }

    /// Closes the connection: what is queued for the peer leaves first (for a second at most), then transfers in flight are canceled.
    pub fn close(&self) {
        let deadline = Instant::now() + Duration::from_secs(1).min(self.shared.config.close_timeout);
        let mut state = self.state.lock();
        while state.control.pending() > 0 && state.dead().is_none() && Instant::now() < deadline {
            self.drive(&mut state);
            MutexGuard::unlocked(&mut state, || std::thread::sleep(Duration::from_micros(50)));
        }
        if state.dead().is_none() {
            state.say_bye();
            // Closing a socket with unread bytes resets it, and the peer could lose what was sent last: read on until it hangs up.
            state.control.shutdown_write();
            state.control.drain(Duration::from_millis(100));
            self.fail_locked(&mut state, err!(Canceled, "closed on this side"));
        }
        drop(state);
        self.shared.forget(self.id);
    }

    /// Fails the connection if a transfer of it still uses the region.
    pub(crate) fn fail_if_using(&self, region: u64, error: Error) {
        let mut state = self.state.lock();
        if state.uses_region(region) {
            self.fail_locked(&mut state, error);
        }
    }

    /// Drops the plugin's registrations of a region.
    pub(crate) fn forget_region(&self, id: u64) {
        self.state.lock().forget_region(id);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a round of progress found.
pub(crate) struct Progress {
    pub any: bool,
    pub busy: bool,
    pub lanes_busy: bool,
    pub copying: bool,
    pub backlog: bool,
}

enum Built {
    Request(Request),
    /// Understood, and known to be refused by the peer: becomes a transfer that has failed.
    Refused(Error),
}

/// Numbers distinct keys in the order they appear; made for the common case of the same key again and again.
struct Table<K> {
    last: Option<(K, u16)>,
    all: HashMap<K, u16>,
}

impl<K: Copy + Eq + std::hash::Hash> Table<K> {
    fn new() -> Self {
        Table { last: None, all: HashMap::new() }
    }
    fn index(&mut self, key: K, add: impl FnOnce() -> Result<()>) -> Result<u16> {
        if let Some((last, index)) = self.last {
            if last == key {
                return Ok(index);
            }
        }
        let index = match self.all.get(&key) {
            Some(&index) => index,
            None => {
                if self.all.len() == MAX_REGIONS {
                    bail!(InvalidArgument, "more than {MAX_REGIONS} regions in one transfer");
                }
                add()?;
                let index = self.all.len() as u16;
                self.all.insert(key, index);
                index
            }
        };
        self.last = Some((key, index));
        Ok(index)
    }
}
