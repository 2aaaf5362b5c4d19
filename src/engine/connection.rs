//! A connection as the application holds it: the machine, its channels and its socket under one lock; progress from the caller's
//! thread; waiting; the end. Knows nothing of how it was set up.

use super::bell::Seat;
use super::budget::Counted;
use super::fifo::FifoItem;
use super::home::{self, Driven};
use super::list::List;
use super::pacing::{pause, Cores, Pause, Polls, Situation, NAP_BYTES};
use super::proto::{is_farewell, Machine, Scheduled, Sketch, TransferState, MAX_BACKLOG};
use super::request::{self, Built, RequestBuilder};
use super::transfer::{Direction, LocalSegment};
use super::watch::Watch;
use crate::channel::local::Watched;
use crate::channel::path::{Blocks, Way};
use crate::channel::router::Channels;
use crate::region::RegionUse;
use crate::stats::{ChannelStats, ConnectionStats, Totals};
use crate::status::{bail, err, Error, ErrorKind, Result};
use crate::types::{Place, Segment};
use crate::wire::control::{ControlStream, Voice};
use crate::wire::frame::{Frame, MAX_NOTIFICATION, MAX_SEGMENTS};
use crate::wire::queue::RxBuffer;
use process::{Condvar, Local, Mutex, MutexGuard};
use std::borrow::Borrow;
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where connections live.
pub(crate) type Home = home::Home<Connection>;

/// How long a close takes at most, and how much of it waits for the peer to hang up.
pub(crate) const CLOSING: Duration = Duration::from_secs(1);
const HANG_UP: Duration = Duration::from_millis(100);
/// Chunks handed out before what they announce is flushed: the receiver can post nothing before it knows.
const BURST: usize = 8;
/// While something goes without chunks, its end is looked for in between and the control stream is read this often.
const READ_PAUSE: Duration = Duration::from_micros(10);
/// For so long an application thread that looks in stays for the end of something small.
const LINGER: Duration = Duration::from_micros(20);
/// Reads of the control stream in one round, so that a peer that floods it does not starve the channels.
const READS: usize = 16;
/// Bytes of the control stream that leave in one hold of the lock: a large notification is sealed piece by piece, and others have their
/// turn at the lock meanwhile.
const FLUSH: usize = 1 << 20;
/// The same at the end of a connection: what waits before the reason, as far as the socket takes it.
const FAREWELL: usize = 16 << 20;
/// A thread that waits for a transfer drives this long before it sleeps.
const WAIT_SPIN: Duration = Duration::from_micros(50);
/// A channel that rang for nothing is looked at for a failure this often at most.
const LOOK: Duration = Duration::from_millis(5);

/// Facts about a peer from the handshake.
pub(crate) struct Peer {
    pub ip: IpAddr,
    pub name: String,
    pub gpu_index: i32,
    /// Name of the key that it has proved.
    pub key: Option<String>,
    pub engine: [u8; 16],
    /// Of an incoming connection: its place among those.
    pub _counted: Option<Local<Counted>>,
}

/// What the lock guards.
pub(crate) struct Core {
    machine: Machine,
    channels: Channels,
    control: ControlStream,
    rx: RxBuffer,
    /// When it was last read.
    read: Instant,
    /// This side has said goodbye: nothing is read or started any more.
    closing: bool,
    looked: Instant,
    watch: Watch,
    born: Instant,
    /// What was counted, once the connection has ended.
    past: Option<Totals>,
}

impl Core {
    pub(crate) fn new(machine: Machine, channels: Channels, control: ControlStream) -> Core {
        let now = Instant::now();
        let (rx, watch) = (RxBuffer::default(), Watch::new());
        Core { machine, channels, control, rx, read: now, closing: false, looked: now, watch, born: now, past: None }
    }

    /// Reads the control stream, advances the channels, hands out chunks, flushes, looks at deadlines. `true` when something moved; an
    /// error means that the connection must end.
    fn round(&mut self, now: Instant) -> Result<bool> {
        let hurries = self.channels.hurries() && now.saturating_duration_since(self.read) < READ_PAUSE;
        let heard = !hurries && self.read(now)?;
        let moved = self.advance(now).map_err(|e| self.last_words(e, now))?;
        Ok(heard || moved)
    }

    /// Everything of a round but reading.
    fn advance(&mut self, now: Instant) -> Result<bool> {
        let any = self.channels.stirs() && self.machine.drive_channels(&mut self.channels, now)?;
        let more = self.pump(now)?;
        self.tick(now)?;
        Ok(any || more)
    }

    /// Heartbeat and deadlines, where it is time to look at them.
    fn tick(&mut self, now: Instant) -> Result<()> {
        if now >= self.machine.next_tick() {
            self.machine.tick(&mut self.channels, now)?;
            self.flush(now, FLUSH)?;
            self.watch(now);
        }
        Ok(())
    }

    /// Whether something is under way, or waits to leave.
    fn stirs(&self) -> bool {
        self.machine.busy() || self.channels.stirs() || self.backlog() > 0
    }

    /// A channel that the peer has closed tells less than the peer's farewell, which may be here.
    fn last_words(&mut self, error: Error, now: Instant) -> Error {
        if !matches!(error.kind(), ErrorKind::RemoteDisconnect | ErrorKind::Plugin) {
            return error;
        }
        match self.read(now) {
            // What a plugin says of a failure counts for more than a bare end of the stream.
            Err(e) if is_farewell(&e) || error.kind() == ErrorKind::RemoteDisconnect => match e.kind() {
                ErrorKind::RemoteDisconnect | ErrorKind::TimedOut => e,
                _ => error,
            },
            _ => error,
        }
    }

    fn read(&mut self, now: Instant) -> Result<bool> {
        self.read = now;
        let mut any = false;
        for _ in 0..READS {
            let (n, more) = self.control.read(&mut self.rx)?;
            if n > 0 {
                self.machine.heard(n, self.rx.arriving(), now);
                // Part of a large frame.
                any |= self.rx.arriving() > 0;
            }
            // Frames may be there that came with the end of the set-up.
            while let Some((frame, len)) = self.rx.next()? {
                // A heartbeat is nothing that more would follow soon.
                any |= !matches!(frame, Frame::Ping { .. });
                self.machine.handle(frame, &mut self.channels, now)?;
                self.rx.consume(len);
            }
            self.machine.keeps(self.rx.kept())?;
            if !more {
                break;
            }
        }
        Ok(any)
    }

    /// Hands out chunks as far as windows allow, and flushes. `true` when the socket would take more of a backlog.
    fn pump(&mut self, now: Instant) -> Result<bool> {
        let mut room = FLUSH;
        loop {
            let scheduled = self.machine.schedule(&mut self.channels, BURST, now)?;
            room = room.saturating_sub(self.flush(now, room)?);
            if scheduled == Scheduled::Blocked {
                return Ok(room == 0 && self.backlog() > 0);
            }
        }
    }

    /// Sends of the control stream what the socket takes, about `most` bytes of it. Returns the bytes that left.
    fn flush(&mut self, now: Instant, most: usize) -> Result<usize> {
        if self.backlog() == 0 || most == 0 {
            return Ok(0);
        }
        let sent = self.control.flush(&mut self.machine.tx, most)?;
        self.machine.told(sent, self.control.pending(), now);
        Ok(sent)
    }

    /// Looks at how the connection fares, once a second at most; what is worth it becomes a line of the log.
    fn watch(&mut self, now: Instant) {
        if !self.watch.due(now) {
            return;
        }
        let mut lines = match self.watch.worth_a_look(self.channels.totals(), self.channels.busy()) {
            true => self.watch.look(&self.channels.stats(true, now), now),
            false => Vec::new(),
        };
        let (silent, limit) = self.machine.silence(now);
        lines.extend(self.watch.answers(silent, limit, self.machine.standstill(&self.channels, now)));
        self.watch.tell(self.machine.peer(), &lines, now);
    }

    /// What is counted up to now.
    fn totals(&self, channels: &[ChannelStats]) -> Totals {
        let mut totals = self.machine.counts();
        for c in channels {
            totals.sent_bytes += c.sent_bytes;
            totals.sent_chunks += c.sent_chunks;
            totals.received_bytes += c.received_bytes;
            totals.received_chunks += c.received_chunks;
            totals.packed_chunks += c.packed_chunks;
            totals.unpacked_chunks += c.unpacked_chunks;
            totals.pack_us += c.pack_us;
            totals.unpack_us += c.unpack_us;
        }
        (totals.stalls, totals.slow_answers) = self.watch.counts();
        totals
    }

    /// Bytes that wait to leave on the control stream.
    fn backlog(&self) -> usize {
        self.machine.tx.pending() + self.control.pending()
    }
}

/// The core, locked. A panic while it is held has left it half done: then the connection ends before anybody else gets it.
struct Held<'a> {
    connection: &'a Connection,
    core: MutexGuard<'a, Core>,
    /// The thread was unwinding already.
    unwinding: bool,
}

impl Held<'_> {
    /// Gives the lock to others for a while.
    fn pause(&mut self, time: Duration) {
        MutexGuard::unlocked(&mut self.core, || std::thread::sleep(time));
    }
}

impl Deref for Held<'_> {
    type Target = Core;
    fn deref(&self) -> &Core {
        &self.core
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Core {
        &mut self.core
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.unwinding && std::thread::panicking() {
            self.connection.abandon_locked(&mut self.core);
        }
    }
}

/// Meanwhile the progress thread does not wait for the connection; then it looks at it.
struct Preparing<'a>(&'a Connection);

impl Preparing<'_> {
    fn new(connection: &Connection) -> Preparing<'_> {
        connection.preparing.fetch_add(1, Ordering::SeqCst);
        Preparing(connection)
    }
}

impl Drop for Preparing<'_> {
    fn drop(&mut self) {
        self.0.preparing.fetch_sub(1, Ordering::SeqCst);
        self.0.home.attend(self.0.id);
    }
}

/// Where a transfer's data goes.
fn way(direction: Direction) -> Way {
    match direction {
        Direction::Read => Way::In,
        Direction::Write => Way::Out,
    }
}

/// A connection to a peer engine. All methods may be called from any thread.
pub struct Connection {
    pub(crate) id: u64,
    pub(crate) fd: RawFd,
    home: Arc<Home>,
    /// Of the process that made the connection: a forked child neither uses nor ends it.
    core: Local<Mutex<Core>>,
    ended: Condvar,
    waiters: AtomicU32,
    polls: Polls,
    /// What says that this side is alive, whoever has the lock.
    voice: Arc<Voice>,
    heartbeat: Duration,
    /// For how long that goes on without the lock.
    patience: Duration,
    /// Threads that have the lock, or are about to, and may be kept for long: the progress thread has others to drive.
    preparing: AtomicU32,
    /// What the channels ring.
    seat: Local<Arc<Seat>>,
    /// The path to a process of this host, where there is one.
    one_host: Option<Watched>,
    /// Its socket is watched.
    watching: AtomicBool,
    peer: Peer,
    channels: usize,
    local: bool,
    /// It waits for the application's accept.
    pub(crate) waits: AtomicBool,
    /// Set by uccl_engine_start_listener; nothing depends on it.
    pub listener_started: AtomicBool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection to {}", self.peer.name)
    }
}

impl Connection {
    pub(crate) fn new(home: Arc<Home>, core: Core, peer: Peer, seat: Arc<Seat>, one_host: Option<Watched>) -> Connection {
        Connection {
            id: home.connections.next_id(),
            fd: core.control.fd(),
            voice: core.control.voice(),
            heartbeat: core.machine.heartbeat(),
            patience: core.machine.patience(),
            preparing: AtomicU32::new(0),
            local: crate::net::topology::is_local(peer.ip),
            channels: core.channels.count(),
            home,
            core: Local::new(Mutex::new(core)),
            ended: Condvar::new(),
            waiters: AtomicU32::new(0),
            polls: Polls::default(),
            seat: Local::new(seat),
            one_host,
            watching: AtomicBool::new(false),
            peer,
            waits: AtomicBool::new(false),
            listener_started: AtomicBool::new(false),
        }
    }

    /// The peer's address.
    pub fn peer_ip(&self) -> IpAddr {
        self.peer.ip
    }
    /// CUDA index of the peer's GPU as it counts, -1 without one.
    pub fn peer_gpu_index(&self) -> i32 {
        self.peer.gpu_index
    }
    /// This side's name of the key that the peer has proved; none for a peer without a key, and for keys without names.
    pub fn peer_key(&self) -> Option<&str> {
        self.peer.key.as_deref()
    }
    /// The peer runs on this host.
    pub fn is_local(&self) -> bool {
        self.local
    }
    /// Data channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    fn lock(&self) -> Held<'_> {
        self.hold(self.core.lock())
    }

    fn hold<'a>(&'a self, core: MutexGuard<'a, Core>) -> Held<'a> {
        Held { connection: self, core, unwinding: std::thread::panicking() }
    }

    // ---- requests ----

    /// Starts a read or write of several segments as one transfer; gives its id.
    ///
    /// # Errors
    /// `InvalidArgument`, `NotFound` (region), `Resource`, or why the connection is lost. Nothing moves then.
    pub fn transfer<B: Borrow<FifoItem>>(
        &self,
        direction: Direction,
        items: impl ExactSizeIterator<Item = (LocalSegment, B)> + Clone,
    ) -> Result<u64> {
        self.core.check("connection")?;
        if self.one_host.is_some() {
            if let Some((sketch, known)) = request::sketch(items.clone(), &self.home.registry, self.peer.engine) {
                let way = way(direction);
                let mut feed = request::Feed::new(items.clone(), known, way, sketch.count);
                if let Some(id) = self.transfer_direct(way, sketch, &mut feed)? {
                    return Ok(id);
                }
            }
        }
        self.transfer_in_chunks(direction, items.len(), items)
    }

    /// As [`Connection::transfer`], of a list that is kept for several transfers.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn transfer_list(&self, direction: Direction, list: &List) -> Result<u64> {
        self.core.check("connection")?;
        if self.one_host.is_some() {
            let way = way(direction);
            if let Some((sketch, mut feed)) = list.sketch(way, &self.home.registry, self.peer.engine) {
                if let Some(id) = self.transfer_direct(way, sketch, &mut feed)? {
                    return Ok(id);
                }
            }
        }
        self.transfer_in_chunks(direction, list.len(), list.iter())
    }

    fn transfer_in_chunks<B: Borrow<FifoItem>>(
        &self,
        direction: Direction,
        n: usize,
        items: impl Iterator<Item = (LocalSegment, B)>,
    ) -> Result<u64> {
        let builder = if n < super::spare::MANY {
            RequestBuilder::new(n, &self.home.registry, self.peer.engine, None)
        } else {
            let spare = &mut self.lock().machine.spare;
            RequestBuilder::new(n, &self.home.registry, self.peer.engine, Some(spare))
        }?;
        let built = builder.build(items)?;
        let now = Instant::now();
        let mut core = self.lock();
        match built {
            Built::Refused(error) => {
                self.admit(&core, 0, &[])?;
                log::error!("{}: {error}", self.peer.name);
                Ok(core.machine.start_failed(error))
            }
            Built::Request(request) => {
                self.admit(&core, request.segments.len(), &request.pairs)?;
                let Core { machine, channels, .. } = &mut *core;
                let started = match direction {
                    Direction::Write => machine.start_write(request, channels, now),
                    Direction::Read => machine.start_read(request, now),
                };
                self.started(core, started, now)
            }
        }
    }

    /// Starts a transfer all of which the peer has granted, within the host. `None`: it has to go another way.
    fn transfer_direct(&self, way: Way, sketch: Sketch, blocks: &mut dyn Blocks) -> Result<Option<u64>> {
        if sketch.count > MAX_SEGMENTS {
            return Ok(None);
        }
        let now = Instant::now();
        let mut core = self.lock();
        self.admit(&core, sketch.count, &sketch.places())?;
        let at_once = way == Way::In && sketch.pairings.iter().all(|pairing| !pairing.here.is_device());
        let Core { machine, channels, .. } = &mut *core;
        match machine.start_direct(sketch, way, blocks, channels, now) {
            Ok(None) => Ok(None),
            Ok(Some(id)) => {
                // A small read of host memory is over already.
                let before = machine.ended();
                let looked = if at_once { machine.drive_channels(channels, now).map(drop) } else { Ok(()) };
                self.wake_waiters(&core, before);
                self.started(core, looked.map(|()| Some(id)), now)
            }
            Err(e) => self.started(core, Err(e), now),
        }
    }

    /// Starts a two-sided send of one message gathered from segments; gives its id.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn send(&self, items: impl ExactSizeIterator<Item = LocalSegment>) -> Result<u64> {
        self.core.check("connection")?;
        let (segments, uses) = request::message(items, &self.home.registry)?;
        let now = Instant::now();
        let mut core = self.lock();
        self.admit(&core, segments.len(), &[])?;
        let id = core.machine.start_send(segments, uses, now);
        self.started(core, Ok(id), now)
    }

    /// Starts a receive of one message of at most `local.len` bytes; gives its id.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn recv(&self, local: LocalSegment) -> Result<u64> {
        self.core.check("connection")?;
        let region = self.home.registry.local(local.mr)?;
        let (addr, len) = (local.addr as u64, local.len as u64);
        region.check(addr, len)?;
        let segment = Segment { addr, len, region: 0, place: region.place, peer: Place::HOST };
        let now = Instant::now();
        let mut core = self.lock();
        self.admit(&core, 1, &[])?;
        let id = core.machine.start_receive(segment, region, now);
        self.started(core, Ok(id), now)
    }

    /// Queues a notification for the peer. Where a large backlog waits it waits too, until there is room or the connection has failed.
    ///
    /// # Errors
    /// `InvalidArgument` above 64 MiB, or why the connection is lost.
    pub fn notify(&self, name: &[u8], message: &[u8]) -> Result<()> {
        self.core.check("connection")?;
        let size = name.len().saturating_add(message.len());
        if size > MAX_NOTIFICATION {
            bail!(InvalidArgument, "a notification of {size} bytes, at most {MAX_NOTIFICATION}");
        }
        let mut core = self.lock();
        while core.backlog() + size > MAX_BACKLOG && core.machine.dead().is_none() && !core.closing {
            self.drive(&mut core, Instant::now());
            core.pause(Duration::from_micros(100));
        }
        self.admit(&core, 0, &[])?;
        let now = Instant::now();
        core.machine.notify(name, message, now);
        self.started(core, Ok(()), now)
    }

    /// Whether a transfer may start. What fails here leaves the connection alive; what fails later ends it.
    fn admit(&self, core: &Core, segments: usize, pairs: &[(Place, Place)]) -> Result<()> {
        if core.closing {
            core.machine.alive()?;
            bail!(Canceled, "the connection is being closed");
        }
        core.machine.admit(segments, pairs, &core.channels).inspect_err(|e| self.home.counters.limit(e.kind()))
    }

    /// After work was added: the first chunks leave from here, and the progress thread is told when it must poll.
    fn started<T>(&self, mut core: Held<'_>, started: Result<T>, now: Instant) -> Result<T> {
        let result = started.and_then(|value| core.pump(now).map(|_| value)).map_err(|e| core.last_words(e, now));
        match &result {
            Err(e) => self.fail_locked(&mut core, e.clone()),
            Ok(_) => {
                let mut needs_help = core.backlog() > 0 || (core.channels.busy() && !self.home.doorbells);
                // Nobody rings when a device has copied; whoever polls in a loop looks anyway.
                needs_help |= core.channels.copies_pending() && self.driven_by_application().is_none();
                drop(core);
                if needs_help {
                    self.home.attend(self.id);
                }
            }
        }
        result
    }

    /// What the connection counts, and what the kernel knows of its channels. An ended one still tells its totals.
    ///
    /// # Errors
    /// In a child of fork.
    pub fn stats(&self) -> Result<ConnectionStats> {
        self.core.check("connection")?;
        let core = self.lock();
        let now = Instant::now();
        let mut channels = core.channels.stats(true, now);
        core.watch.fill(&mut channels, now);
        Ok(ConnectionStats {
            id: self.id,
            peer: self.peer.name.clone(),
            error: core.machine.dead().map(|e| e.to_str().to_owned()),
            age: now.saturating_duration_since(core.born),
            silent: core.machine.silence(now).0,
            in_flight: core.machine.in_flight() as u64,
            backlog_bytes: core.backlog() as u64,
            totals: core.past.unwrap_or_else(|| core.totals(&channels)),
            channels,
        })
    }

    /// Whether the connection is up.
    ///
    /// # Errors
    /// Why it is not, once it is lost or closed.
    pub fn status(&self) -> Result<()> {
        self.core.check("connection")?;
        self.lock().machine.alive()
    }

    // ---- progress ----

    /// Asks for a transfer's state, after driving progress once.
    ///
    /// # Errors
    /// The error the transfer ended with, or `NotFound`.
    pub fn poll(&self, id: u64) -> Result<TransferState> {
        self.core.check("connection")?;
        let mut core = self.lock();
        let before = core.machine.lookup(id)?;
        if before.complete || core.machine.dead().is_some() {
            return Ok(before);
        }
        let situation = self.situation(&core, id, &before);
        let planned = pause(&situation);
        if let Pause::HandOver(nap) = planned {
            drop(core);
            // Rung by the channels, the progress thread does the same with fewer rounds, and this core is theirs.
            if self.polls.stop() {
                self.home.attend(self.id);
            }
            std::thread::sleep(nap);
            self.polls.leave(self.home.clock());
            return self.lock().machine.lookup(id);
        }
        let now = Instant::now();
        self.polls.enter(self.home.at(now));
        let any = self.drive_on(&mut core, now);
        let after = core.machine.lookup(id)?;
        drop(core);
        match planned {
            // A poll that found nothing took no time.
            Pause::None if !any => {
                self.polls.leave(self.home.at(now));
                return Ok(after);
            }
            _ if any || after.complete => {}
            Pause::Nap(nap) => std::thread::sleep(nap),
            Pause::Yield => std::thread::yield_now(),
            Pause::None | Pause::HandOver(_) => {}
        }
        self.polls.leave(self.home.clock());
        Ok(after)
    }

    fn situation(&self, core: &Core, id: u64, state: &TransferState) -> Situation {
        Situation {
            cores: self.home.cores,
            doorbell: self.home.doorbells,
            only_this: self.home.polled_again(self.id, id),
            channels_busy: core.channels.busy(),
            copying: core.channels.copies_pending(),
            missing: state.bytes_total - state.bytes_done,
            total: state.bytes_total,
        }
    }

    /// Waits until a transfer has ended, at most `timeout`; `complete` tells whether it has.
    ///
    /// # Errors
    /// As [`Connection::poll`].
    pub fn wait(&self, id: u64, timeout: Option<Duration>) -> Result<TransferState> {
        self.core.check("connection")?;
        let started = Instant::now();
        let deadline = timeout.map(|t| started + t);
        loop {
            let state = self.poll(id)?;
            let now = Instant::now();
            if state.complete || deadline.is_some_and(|d| now >= d) {
                return Ok(state);
            }
            if now - started < WAIT_SPIN {
                continue;
            }
            // Sleep; the progress thread drives from here and wakes us when something has ended.
            self.polls.stop();
            self.home.attend(self.id);
            let mut core = self.lock();
            self.waiters.fetch_add(1, Ordering::AcqRel);
            let until = deadline.unwrap_or(now + Duration::from_millis(100)).min(now + Duration::from_millis(100));
            let running = |core: &Core| matches!(core.machine.lookup(id), Ok(TransferState { complete: false, .. }));
            while running(&core) && !self.ended.wait_until(&mut core.core, until).timed_out() {}
            self.waiters.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A round of progress; wakes waiters when a transfer has ended. `true` when something moved.
    fn drive(&self, core: &mut Core, now: Instant) -> bool {
        if core.machine.dead().is_some() {
            return false;
        }
        if core.closing {
            let _ = core.flush(now, FLUSH);
            return false;
        }
        let before = core.machine.ended();
        let any = match core.round(now) {
            Ok(any) => any,
            Err(e) => {
                self.fail_locked(core, e);
                true
            }
        };
        self.wake_waiters(core, before);
        any
    }

    /// A round of progress by an application thread, and further ones while something small is about to end: going away and coming back
    /// takes longer. Whatever a peer orders meanwhile keeps nobody here.
    fn drive_on(&self, core: &mut Core, now: Instant) -> bool {
        let ended = core.machine.ended();
        let mut any = self.drive(core, now);
        while core.machine.ended() == ended && self.home.cores == Cores::Many {
            let at = Instant::now();
            if at.saturating_duration_since(now) >= LINGER || !core.channels.ends_soon(at) {
                break;
            }
            std::hint::spin_loop();
            any |= self.drive(core, at);
        }
        any
    }

    /// Transfers may have ended since there were `before`.
    fn wake_waiters(&self, core: &Core, before: u64) {
        if core.machine.ended() != before && self.waiters.load(Ordering::Acquire) > 0 {
            self.ended.notify_all();
        }
    }

    /// For how long an application thread has been driving it, if one does at present.
    pub(crate) fn driven_by_application(&self) -> Option<Duration> {
        self.polls.active(self.home.clock()).map(Duration::from_micros)
    }

    /// Lets the channels ring, or no longer.
    pub(crate) fn arm(&self, on: bool) {
        self.seat.arm(on);
        if let Some(one_host) = &self.one_host {
            one_host.listening.set(on);
        }
    }

    /// Has the progress thread watch its sockets. One that has ended meanwhile has closed them, and others may have got their numbers.
    pub(crate) fn watch(&self) -> Result<()> {
        let core = self.lock();
        if core.machine.dead().is_some() || core.closing {
            return Ok(());
        }
        self.home.bell.watch(self.fd, self.id)?;
        if let Some(one_host) = &self.one_host {
            self.home.bell.watch_local(one_host.fd, self.id)?;
            self.watching.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Before the socket to a process of this host is closed.
    fn unwatch_local(&self) {
        if let (Some(one_host), true) = (&self.one_host, self.watching.swap(false, Ordering::SeqCst)) {
            self.home.bell.unwatch(one_host.fd);
        }
    }

    /// What the channels ring with.
    pub(crate) fn seat(&self) -> &Arc<Seat> {
        &self.seat
    }

    /// A round of the progress thread. `must`: waits for the lock; otherwise leaves the round to whoever holds it.
    pub(crate) fn progress(&self, must: bool) -> Progress {
        if self.preparing.load(Ordering::SeqCst) > 0 {
            return Progress { channels_busy: false, busy: false, kept: true, ..Progress::left_alone() };
        }
        let held = if must { Some(self.core.lock()) } else { self.core.try_lock() };
        let Some(mut core) = held.map(|core| self.hold(core)) else { return Progress::left_alone() };
        let any = self.drive(&mut core, Instant::now());
        Progress {
            any,
            channels_busy: core.channels.busy(),
            large: core.channels.under_way() > NAP_BYTES,
            copying: core.channels.copies_pending(),
            backlog: core.backlog() > 0,
            busy: core.machine.busy() || core.channels.busy(),
            dead: core.machine.dead().is_some(),
            kept: false,
            next_tick: Some(core.machine.next_tick()),
        }
    }

    /// Whether something is under way, or waits to leave.
    pub(crate) fn stirs(&self) -> bool {
        // It asks for the progress thread afterwards.
        if self.preparing.load(Ordering::SeqCst) > 0 {
            return false;
        }
        let core = self.lock();
        core.machine.dead().is_none() && core.stirs()
    }

    /// The timer of a connection that rests: its heartbeat leaves and its deadlines are looked at, without a look at anything else. When
    /// to do it again; none where the connection needs a whole round.
    pub(crate) fn tick_at_rest(&self, now: Instant) -> Option<Instant> {
        let mut core = self.hold(self.core.try_lock()?);
        let (silent, limit) = core.machine.silence(now);
        // What the peer has said may lie unread, where this process did not run for a while.
        if core.machine.dead().is_some() || core.closing || core.stirs() || silent > limit / 2 {
            return None;
        }
        core.tick(now).ok()?;
        (core.backlog() == 0).then(|| core.machine.next_tick())
    }

    /// A channel rang and nothing moved: it may have failed.
    pub(crate) fn look_for_failure(&self) {
        if self.preparing.load(Ordering::SeqCst) > 0 {
            return;
        }
        let mut core = self.lock();
        let now = Instant::now();
        if core.machine.dead().is_some() || core.closing || now - core.looked < LOOK {
            return;
        }
        core.looked = now;
        let Core { machine, channels, .. } = &mut *core;
        if let Err(e) = machine.note_network(channels, now) {
            let e = core.last_words(e, now);
            self.fail_locked(&mut core, e);
        }
    }

    // ---- the end ----

    /// A defect of this library has left the connection in an unknown state.
    pub(crate) fn abandon(&self) {
        let mut core = self.core.lock();
        self.unwatch_local();
        self.abandon_locked(&mut core);
    }

    /// What is done first is done, whatever of it panics once more: nothing touches memory from here on, and nobody waits for ever.
    fn abandon_locked(&self, core: &mut Core) {
        let error = || err!(Internal, "{}: a defect of the library; the log has its place", self.peer.name);
        let steps: [&mut dyn FnMut(&mut Core); 4] = [
            &mut |core| core.channels.close(),
            &mut |core| self.fail_locked(core, error()),
            &mut |core| core.machine.fail(error(), &mut core.channels),
            &mut |core| core.machine.give_up(error()),
        ];
        for step in steps {
            let _ = catch_unwind(AssertUnwindSafe(|| step(core)));
        }
        self.home.bell.unwatch(self.fd);
        core.control.shutdown_write();
        self.ended.notify_all();
    }

    fn fail_locked(&self, core: &mut Core, error: Error) {
        if core.machine.dead().is_some() {
            return;
        }
        let lost = core.machine.in_flight();
        let error = Error::new(error.kind(), format_args!("{}: {error}", self.peer.name));
        let totals = core.totals(&core.channels.stats(false, Instant::now()));
        core.past = Some(totals);
        let (silent, limit) = core.machine.silence(Instant::now());
        let in_order = match error.kind() {
            ErrorKind::Canceled => true,
            ErrorKind::RemoteDisconnect => lost == 0 && silent <= limit,
            _ => false,
        };
        self.home.counters.ended(totals, error.kind(), in_order || core.closing);
        let (lines, now) = (&self.home.lines, Instant::now());
        match (error.kind(), lost) {
            (ErrorKind::Canceled, 0) => log::debug!("{error}"),
            (ErrorKind::Canceled, n) => log::info!("{n} transfers canceled: {error}"),
            // A peer may come and go as often as it likes.
            (ErrorKind::RemoteDisconnect, 0) => lines.log(log::Level::Info, now, format_args!("{error}")),
            (_, n) => {
                lines.log(log::Level::Error, now, format_args!("connection failed with {n} transfers in flight: {error}"));
            }
        }
        self.home.bell.unwatch(self.fd);
        self.unwatch_local();
        if self.waits.load(Ordering::SeqCst) {
            self.home.dead.tell(self.id);
        }
        // The peer learns what this side knows, as far as the socket takes it, before it sees its channels end.
        let now = Instant::now();
        if !core.closing {
            core.machine.say_bye(Some(&error), now);
        }
        core.control.end();
        let _ = core.flush(now, FAREWELL);
        core.machine.fail(error, &mut core.channels);
        core.control.shutdown_write();
        self.ended.notify_all();
    }

    /// Closes the connection: what is queued for the peer leaves first (for a second at most), then transfers in flight are canceled.
    pub fn close(&self) {
        self.say_goodbye();
        self.finish_close(Instant::now() + CLOSING.min(self.home.close_timeout));
    }

    /// Tells the peer that no more comes; waits for nothing. [`Connection::finish_close`] does the rest.
    pub(crate) fn say_goodbye(&self) {
        if !self.core.is_here() {
            return;
        }
        let mut core = self.lock();
        if core.machine.dead().is_none() && !core.closing {
            // What has arrived still counts.
            let now = Instant::now();
            self.drive(&mut core, now);
            core.machine.say_bye(None, now);
            core.control.end();
            core.closing = true;
            // Nothing is read any more; what still comes must not wake anybody.
            self.home.bell.unwatch(self.fd);
            let _ = core.flush(now, FLUSH);
        }
    }

    /// Ends the connection: once what is queued has left and the peer has hung up, or at the deadline.
    pub(crate) fn finish_close(&self, deadline: Instant) {
        if !self.core.is_here() {
            return;
        }
        let mut core = self.lock();
        while core.machine.dead().is_none() && core.backlog() > 0 && Instant::now() < deadline {
            if core.flush(Instant::now(), FLUSH).is_err() || core.control.hung_up() {
                break;
            }
            core.pause(Duration::from_micros(50));
        }
        if core.machine.dead().is_none() {
            let left = core.backlog();
            if left > 0 {
                log::warn!("{}: closed with {left} bytes of the control stream unsent", self.peer.name);
            }
            core.control.shutdown_write();
            // Closing a socket with unread bytes resets it, and the peer could lose what was sent last: read on until it hangs up.
            let until = deadline.min(Instant::now() + HANG_UP);
            while !core.control.hung_up() && Instant::now() < until {
                core.pause(Duration::from_micros(50));
            }
            self.fail_locked(&mut core, err!(Canceled, "closed on this side"));
        }
        drop(core);
        self.home.connections.remove(self.id);
    }

    /// Fails the connection if a transfer of it still uses the region.
    pub(crate) fn fail_if_using(&self, region: u64, error: Error) {
        let mut core = self.lock();
        if core.machine.uses_region(region) || core.channels.uses_region(region) {
            self.fail_locked(&mut core, error);
        }
    }

    /// Has what chunks of `place` need allocated, which may take as long as the application keeps the driver.
    pub(crate) fn ready(&self, place: Place) -> Result<()> {
        let _preparing = Preparing::new(self);
        let mut core = self.lock();
        core.channels.ready(place)
    }

    /// Has the peer hear of this side, where whoever should speak is kept. Whether something was said.
    pub(crate) fn keep(&self) -> bool {
        self.core.is_here() && self.voice.keep(self.heartbeat * 3 / 2, self.patience)
    }

    /// Simulates a thread that the driver of a GPU keeps while it prepares the connection.
    #[cfg(feature = "test-api")]
    #[doc(hidden)]
    pub fn simulate_kept_preparing(&self, time: Duration) {
        let _preparing = Preparing::new(self);
        let _core = self.lock();
        std::thread::sleep(time);
    }

    /// How often the peer hears of this side.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// Tells a peer on this host of a region that it may want to reach soon.
    pub(crate) fn offer_region(&self, region: &RegionUse) {
        if self.one_host.is_some() && self.core.is_here() {
            // It attends to it afterwards.
            let _preparing = Preparing::new(self);
            let mut core = self.lock();
            core.channels.offer(region.to_share());
        }
    }

    /// Drops the plugin's registrations of a region.
    pub(crate) fn forget_region(&self, id: u64) {
        self.lock().channels.forget_region(id);
    }
}

impl Driven for Connection {
    fn heard_on_this_host(&self) {
        if let Some(one_host) = &self.one_host {
            one_host.news.store(true, Ordering::Release);
        }
    }

    fn drive_for_application(&self) -> bool {
        let Some(mut core) = self.core.try_lock().map(|core| self.hold(core)) else { return true };
        let now = Instant::now();
        self.polls.enter(self.home.at(now));
        let any = self.drive_on(&mut core, now) || (core.machine.busy() && core.machine.dead().is_none());
        drop(core);
        self.polls.leave(self.home.clock());
        any
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a round of the progress thread found.
pub(crate) struct Progress {
    pub any: bool,
    pub channels_busy: bool,
    /// So much is under way that the channels' threads are busy.
    pub large: bool,
    pub copying: bool,
    pub backlog: bool,
    /// Something waits for the network or the peer.
    pub busy: bool,
    pub dead: bool,
    /// Somebody keeps it for long, and asks for the progress thread afterwards.
    pub kept: bool,
    pub next_tick: Option<Instant>,
}

impl Progress {
    /// Another thread is at it.
    fn left_alone() -> Progress {
        Progress {
            any: false,
            channels_busy: true,
            large: false,
            copying: false,
            backlog: false,
            busy: true,
            dead: false,
            kept: false,
            next_tick: None,
        }
    }
}

#[cfg(test)]
mod tests;
