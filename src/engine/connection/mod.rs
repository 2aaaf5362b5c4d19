//! A connection as the application holds it: its lock, what is known of the peer, who watches and drives it. What the lock guards is
//! `core`; what is asked of a connection, how it is polled, driven and ended are files of their own. Knows nothing of how it was set up.

mod close;
mod core;
mod drive;
mod poll;
mod submit;

pub(crate) use core::Core;

use crate::engine::progress::doorbell::DoorbellSlot;
use crate::engine::progress::pacing::Polls;
use crate::engine::progress::table::{self, Driven};
use crate::engine::setup::quota::Counted;
use crate::host::Watched;
use crate::stats::ConnectionStats;
use crate::status::Result;
use crate::types::Place;
use crate::wire::control::Voice;
use core::FLUSH;
use process::{Condvar, Mutex, MutexGuard, ProcessOwned};
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where connections live.
pub(crate) type ConnectionTable = table::ConnectionTable<Connection>;

/// How long a close takes at most.
pub(crate) const CLOSING: Duration = Duration::from_secs(1);

/// Facts about a peer from the handshake.
pub(crate) struct Peer {
    pub ip: IpAddr,
    pub name: String,
    pub gpu_index: i32,
    /// Name of the key that it has proved.
    pub key: Option<String>,
    pub engine: [u8; 16],
    /// Of an incoming connection: its place among those.
    pub _counted: Option<ProcessOwned<Counted>>,
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
        self.0.table.request_drive(self.0.id);
    }
}

/// A connection to a peer engine. All methods may be called from any thread.
pub struct Connection {
    pub(crate) id: u64,
    pub(crate) fd: RawFd,
    table: Arc<ConnectionTable>,
    /// Of the process that made the connection: a forked child neither uses nor ends it.
    core: ProcessOwned<Mutex<Core>>,
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
    slot: ProcessOwned<Arc<DoorbellSlot>>,
    /// The path to a process of this host, where there is one.
    one_host: Option<Watched>,
    /// Its socket is watched.
    watching: AtomicBool,
    peer: Peer,
    channels: usize,
    local: bool,
    /// It waits for the application's accept.
    pub(crate) waits: AtomicBool,
    /// It has ended: for whoever must not wait for its lock.
    gone: AtomicBool,
    /// Set by uccl_engine_start_listener; nothing depends on it.
    pub listener_started: AtomicBool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection to {}", self.peer.name)
    }
}

impl Connection {
    pub(crate) fn new(
        table: Arc<ConnectionTable>,
        core: Core,
        peer: Peer,
        slot: Arc<DoorbellSlot>,
        one_host: Option<Watched>,
    ) -> Connection {
        Connection {
            id: table.connections.next_id(),
            fd: core.control.fd(),
            voice: core.control.voice(),
            heartbeat: core.machine.heartbeat(),
            patience: core.machine.patience(),
            preparing: AtomicU32::new(0),
            local: crate::net::topology::is_local(peer.ip),
            channels: core.channels.count(),
            table,
            core: ProcessOwned::new(Mutex::new(core)),
            ended: Condvar::new(),
            waiters: AtomicU32::new(0),
            polls: Polls::default(),
            slot: ProcessOwned::new(slot),
            one_host,
            watching: AtomicBool::new(false),
            peer,
            waits: AtomicBool::new(false),
            gone: AtomicBool::new(false),
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

    /// What the connection counts, and what the kernel knows of its channels. An ended one still tells its totals.
    ///
    /// # Errors
    /// In a child of fork.
    pub fn stats(&self) -> Result<ConnectionStats> {
        self.core.check("connection")?;
        let core = self.lock();
        let now = Instant::now();
        let mut channels = core.channels.stats(true, now);
        core.health.fill(&mut channels, now);
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

    /// Whether it has not ended, without its lock: somebody may keep that for long.
    pub(crate) fn is_up(&self) -> bool {
        self.core.is_here() && !self.gone.load(Ordering::SeqCst)
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

    /// Transfers may have ended since there were `before`.
    fn wake_waiters(&self, core: &Core, before: u64) {
        if core.machine.ended() != before && self.waiters.load(Ordering::Acquire) > 0 {
            self.ended.notify_all();
        }
    }

    /// For how long an application thread has been driving it, if one does at present.
    pub(crate) fn driven_by_application(&self) -> Option<Duration> {
        self.polls.active(self.table.clock()).map(Duration::from_micros)
    }

    /// Lets the channels ring, or no longer.
    pub(crate) fn arm(&self, on: bool) {
        self.slot.arm(on);
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
        self.table.bell.watch(self.fd, self.id)?;
        if let Some(one_host) = &self.one_host {
            self.table.bell.watch_local(one_host.fd, self.id)?;
            self.watching.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Before the socket to a process of this host is closed.
    fn unwatch_local(&self) {
        if let (Some(one_host), true) = (&self.one_host, self.watching.swap(false, Ordering::SeqCst)) {
            self.table.bell.unwatch(one_host.fd);
        }
    }

    /// What the channels ring with.
    pub(crate) fn slot(&self) -> &Arc<DoorbellSlot> {
        &self.slot
    }

    /// Has what chunks of `place` need allocated, which may take as long as the application keeps the driver.
    pub(crate) fn ready(&self, place: Place) -> Result<()> {
        let _preparing = Preparing::new(self);
        let mut core = self.lock();
        if core.closing {
            return Ok(());
        }
        core.channels.ready(place)
    }

    /// Has the peer hear of this side, where whoever should speak is kept. Whether something was said.
    pub(crate) fn keep(&self) -> bool {
        self.core.is_here() && self.voice.keep(self.heartbeat * 3 / 2, self.patience)
    }

    /// Simulates a thread that the driver of a GPU keeps while it prepares the connection.
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
    pub(crate) fn offer_region(&self, region: u64) {
        if self.one_host.is_some() && self.core.is_here() {
            // It attends to it afterwards.
            let _preparing = Preparing::new(self);
            let mut core = self.lock();
            // Only now: who waits for the lock keeps no region from its end.
            match self.table.registry.local(region) {
                Ok(region) if !core.closing => {
                    let region = region.to_share();
                    core.channels.direct().into_iter().for_each(|direct| direct.offer(region));
                }
                _ => {}
            }
        }
    }
}

impl Driven for Connection {
    fn on_host_message(&self) {
        if let Some(one_host) = &self.one_host {
            one_host.news.store(true, Ordering::Release);
        }
    }

    fn drive_for_application(&self) -> bool {
        let Some(mut core) = self.core.try_lock().map(|core| self.hold(core)) else { return true };
        let now = Instant::now();
        self.polls.enter(self.table.at(now));
        let any = self.drive_on(&mut core, now) || (core.machine.busy() && core.machine.dead().is_none());
        drop(core);
        self.polls.leave(self.table.clock());
        any
    }
}

#[cfg(test)]
mod tests;
