//! What the threads of a connection share: its lock, facts about the peer, its doorbell, and the end of the connection. Knows
//! nothing about transfers of the application or about other connections.

use super::core::{Core, FLUSH};
use crate::engine::progress::context::DriveContext;
use crate::engine::progress::doorbell::DoorbellSlot;
use crate::engine::progress::pacing::Polls;
use crate::engine::progress::restoring::LostChannel;
use crate::engine::setup::lineage::Lineage;
use crate::engine::setup::quota::Counted;
use crate::host::Watched;
use crate::status::{err, Error, ErrorKind, Result};
use process::{Condvar, Mutex, MutexGuard, ProcessOwned};
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of the control connection flushed at its end: the frames queued before the goodbye, as far as the socket takes them.
const GOODBYE_BYTES: usize = 16 << 20;

/// Facts about a peer from the handshake.
pub(crate) struct Peer {
    pub ip: IpAddr,
    pub name: String,
    pub gpu_index: i32,
    /// Name of the key that the peer has proved.
    pub key: Option<String>,
    pub engine: [u8; 16],
    /// What a later set-up needs to bring lost channels up again.
    pub lineage: Option<Arc<Lineage>>,
    /// An incoming connection's place in the quota.
    pub _counted: Option<ProcessOwned<Counted>>,
}

/// What the threads of a connection share.
pub(super) struct Shared {
    pub id: u64,
    pub fd: RawFd,
    pub context: Arc<DriveContext>,
    /// Bound to the process that made the connection: a forked child neither uses nor ends it.
    pub core: ProcessOwned<Mutex<Core>>,
    pub ended: Condvar,
    pub waiters: AtomicU32,
    pub polls: Polls,
    /// Threads that hold the lock or wait for it, and may block for long: the progress thread does not wait for them.
    pub preparing: AtomicU32,
    /// The doorbell slot of the channels.
    pub slot: ProcessOwned<Arc<DoorbellSlot>>,
    /// The direct path to a peer on this host, if any.
    pub one_host: Option<Watched>,
    /// The socket of that path is watched.
    watching: AtomicBool,
    pub peer: Peer,
    /// The connection waits for the application's accept.
    pub waits: AtomicBool,
    /// The connection has ended; read without the lock.
    pub gone: AtomicBool,
    pub moves: Moves,
}

/// What other threads know of a control connection that is made again.
#[derive(Default)]
pub(super) struct Moves {
    /// It waits to be.
    pub suspended: AtomicBool,
    /// How often its socket was replaced.
    pub sockets: AtomicU32,
}

#[cfg(test)]
thread_local! {
    /// How often this thread has taken the lock of a connection.
    pub(super) static LOCKS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// The locked core. If the holder panics, the connection ends before another thread gets the lock.
pub(super) struct Held<'a> {
    shared: &'a Shared,
    pub core: MutexGuard<'a, Core>,
    /// The thread was already unwinding when it took the lock.
    unwinding: bool,
}

impl Held<'_> {
    /// Releases the lock for a while.
    pub(super) fn pause(&mut self, time: Duration) {
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
            self.shared.abandon_locked(&mut self.core);
        }
        self.shared.context.counters.times.record(self.core.machine.take_timed());
    }
}

/// While this exists the progress thread does not wait for the connection; when dropped it requests a drive.
pub(super) struct Preparing<'a>(&'a Shared);

impl Preparing<'_> {
    pub(super) fn new(shared: &Shared) -> Preparing<'_> {
        shared.preparing.fetch_add(1, Ordering::SeqCst);
        Preparing(shared)
    }
}

impl Drop for Preparing<'_> {
    fn drop(&mut self) {
        self.0.preparing.fetch_sub(1, Ordering::SeqCst);
        self.0.context.request_drive(self.0.id);
    }
}

impl Shared {
    pub(super) fn new(
        id: u64,
        context: &Arc<DriveContext>,
        core: Core,
        peer: Peer,
        slot: Arc<DoorbellSlot>,
        one_host: Option<Watched>,
    ) -> Shared {
        Shared {
            id,
            fd: core.control.fd(),
            context: context.clone(),
            core: ProcessOwned::new(Mutex::new(core)),
            ended: Condvar::new(),
            waiters: AtomicU32::new(0),
            polls: Polls::default(),
            preparing: AtomicU32::new(0),
            slot: ProcessOwned::new(slot),
            one_host,
            watching: AtomicBool::new(false),
            peer,
            waits: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            moves: Moves::default(),
        }
    }

    pub(super) fn lock(&self) -> Held<'_> {
        self.hold(self.core.lock())
    }

    pub(super) fn hold<'a>(&'a self, core: MutexGuard<'a, Core>) -> Held<'a> {
        #[cfg(test)]
        LOCKS.with(|locks| locks.set(locks.get() + 1));
        Held { shared: self, core, unwinding: std::thread::panicking() }
    }

    /// Takes the lock, unless the deadline comes first or a thread prepares the connection, which may take long.
    pub(super) fn lock_unless_preparing(&self, deadline: Instant) -> Option<Held<'_>> {
        loop {
            if let Some(core) = self.core.try_lock() {
                return Some(self.hold(core));
            }
            if self.preparing.load(Ordering::SeqCst) > 0 || Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// A round of progress; wakes waiters when a transfer has ended. `true` when something moved.
    pub(super) fn drive(&self, core: &mut Core, now: Instant) -> bool {
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
        self.note_suspended(core);
        if core.machine.has_lost() {
            let dials = self.peer.lineage.as_ref().filter(|lineage| lineage.agreed.connecting);
            let lost = |lineage: &Arc<Lineage>| {
                let lost = lineage.seats().map(|seat| seat.channel).filter(|&channel| core.machine.is_lost(channel));
                lost.map(|channel| LostChannel { channel, useless: core.machine.was_useless(channel) }).collect()
            };
            dials.map(lost).into_iter().for_each(|lost| self.context.restoring.ask(self.id, lost));
        }
        any
    }

    /// The control connection has failed: its socket, which would wake the progress thread for ever, is not watched until it is made again.
    pub(super) fn note_suspended(&self, core: &Core) {
        if core.machine.dead().is_none() && core.suspended.is_some() && !self.moves.suspended.swap(true, Ordering::SeqCst) {
            self.context.queue.bell.unwatch(self.fd);
            self.context.restoring.ask_at_once(self.id);
            log::debug!("{}: {}; it waits to be made again", self.peer.name, core.control.lost().map_or("", Error::to_str));
        }
    }

    /// Wakes waiters if a transfer has ended since the count was `before`.
    pub(super) fn wake_waiters(&self, core: &Core, before: u64) {
        if core.machine.ended() != before {
            if self.waiters.load(Ordering::Acquire) > 0 {
                self.ended.notify_all();
            }
            self.context.events.happened();
        }
    }

    /// How long an application thread has been driving the connection, if one is. One that waits for events may look at many transfers in
    /// a row, but sleeps afterwards.
    pub(super) fn driven_by_application(&self) -> Option<Duration> {
        if self.context.events.are_watched() {
            return None;
        }
        self.polls.active(self.context.clock()).map(Duration::from_micros)
    }

    /// Arms or disarms the doorbell of the channels.
    pub(super) fn arm(&self, on: bool) {
        self.slot.arm(on);
        if let Some(one_host) = &self.one_host {
            one_host.listening.set(on);
        }
    }

    /// Adds the sockets to those that the progress thread watches. A connection that has ended has closed them, and their numbers
    /// may already belong to other descriptors.
    pub(super) fn watch(&self) -> Result<()> {
        let core = self.lock();
        if core.machine.dead().is_some() || core.closing {
            return Ok(());
        }
        self.context.queue.bell.watch(self.fd, self.id)?;
        if let Some(one_host) = &self.one_host {
            self.context.queue.bell.watch_local(one_host.fd, self.id)?;
            self.watching.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Called before the socket to a peer on this host is closed.
    pub(super) fn unwatch_local(&self) {
        if let (Some(one_host), true) = (&self.one_host, self.watching.swap(false, Ordering::SeqCst)) {
            self.context.queue.bell.unwatch(one_host.fd);
        }
    }

    /// Ends the connection after a panic in this library left it in an unknown state.
    pub(super) fn abandon(&self) {
        let mut core = self.core.lock();
        self.unwatch_local();
        self.abandon_locked(&mut core);
    }

    /// Each step runs even if an earlier one panics: afterwards nothing touches the application's memory and no thread waits
    /// forever.
    pub(super) fn abandon_locked(&self, core: &mut Core) {
        let error = || err!(Internal, "{}: a defect of the library; the log has its place", self.peer.name);
        let steps: [&mut dyn FnMut(&mut Core); 4] = [
            &mut |core| core.channels.close(),
            &mut |core| {
                self.fail_locked(core, error());
            },
            &mut |core| core.machine.fail(error(), &mut core.channels),
            &mut |core| core.machine.give_up(error()),
        ];
        for step in steps {
            let _ = catch_unwind(AssertUnwindSafe(|| step(core)));
        }
        self.gone.store(true, Ordering::SeqCst);
        self.context.queue.bell.unwatch(self.fd);
        core.control.shutdown_write();
        self.ended.notify_all();
        self.context.events.happened();
    }

    /// Ends the connection, unless it has ended. Returns whether everything queued for the peer was sent.
    pub(super) fn fail_locked(&self, core: &mut Core, error: Error) -> bool {
        if core.machine.dead().is_some() {
            return false;
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
        self.context.counters.ended(totals, error.kind(), in_order || core.closing, silent > limit);
        let (lines, now) = (&self.context.lines, Instant::now());
        match (error.kind(), lost) {
            (ErrorKind::Canceled, 0) => log::debug!("{error}"),
            (ErrorKind::Canceled, n) => log::info!("{n} transfers canceled: {error}"),
            // Rate-limited: a peer may connect and disconnect as often as it likes.
            (ErrorKind::RemoteDisconnect, 0) => lines.log(log::Level::Info, now, format_args!("{error}")),
            (_, n) => {
                lines.log(log::Level::Error, now, format_args!("connection failed with {n} transfers in flight: {error}"));
            }
        }
        self.context.queue.bell.unwatch(self.fd);
        self.unwatch_local();
        // The accept queue checks this flag after it sets `waits`.
        self.gone.store(true, Ordering::SeqCst);
        if self.waits.load(Ordering::SeqCst) {
            self.context.dead.report(self.id);
        }
        // Send the cause, as far as the socket takes it, before the channels close and the peer sees only their end.
        let now = Instant::now();
        if !core.closing {
            core.machine.say_bye(Some(&error), now);
        }
        core.control.end();
        let _ = core.flush(now, GOODBYE_BYTES);
        let left = core.backlog() == 0;
        core.machine.fail(error, &mut core.channels);
        core.control.shutdown_write();
        self.ended.notify_all();
        self.context.events.happened();
        left
    }
}
