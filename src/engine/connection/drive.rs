//! How the progress thread drives a connection: a round, a timer tick, a check of channels that rang without effect.

use super::core::Core;
use super::shared::Shared;
use crate::engine::progress::pacing::NAP_BYTES;
use crate::status::err;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A channel that rang without effect is checked for a failure at most this often.
const LOOK: Duration = Duration::from_millis(5);

/// What a round of the progress thread found.
pub(crate) struct Progress {
    pub any: bool,
    pub channels_busy: bool,
    /// Enough bytes are in flight to keep the I/O threads busy.
    pub large: bool,
    pub copying: bool,
    pub backlog: bool,
    /// Something waits for the network or the peer.
    pub busy: bool,
    pub dead: bool,
    /// Another thread may hold the connection for long; it requests a drive when it is done.
    pub preparing: bool,
    pub next_tick: Option<Instant>,
}

impl Progress {
    /// Another thread drives the connection.
    fn driven_elsewhere() -> Progress {
        Progress {
            any: false,
            channels_busy: true,
            large: false,
            copying: false,
            backlog: false,
            busy: true,
            dead: false,
            preparing: false,
            next_tick: None,
        }
    }

    /// Whether the next thing to do has an event. `doorbells`: channels ring when a request ends. The end of a device copy rings none, and
    /// the thread that drives the connection elsewhere says nothing.
    pub(crate) fn may_wait(&self, doorbells: bool) -> bool {
        let known = self.next_tick.is_some();
        known && !self.any && !self.copying && (doorbells || !self.channels_busy)
    }
}

/// A connection as the progress thread drives it.
pub(crate) struct Driver<'a>(pub(super) &'a Shared);

impl Driver<'_> {
    /// A round of the progress thread. With `must` it waits for the lock; otherwise it leaves the round to the lock's holder.
    pub(crate) fn progress(&self, must: bool) -> Progress {
        if self.is_preparing() {
            return Progress { channels_busy: false, busy: false, preparing: true, ..Progress::driven_elsewhere() };
        }
        let held = if must { Some(self.0.core.lock()) } else { self.0.core.try_lock() };
        let Some(mut core) = held.map(|core| self.0.hold(core)) else { return Progress::driven_elsewhere() };
        let any = self.0.drive(&mut core, Instant::now());
        Progress {
            any,
            channels_busy: core.channels.busy(),
            large: core.channels.under_way() > NAP_BYTES,
            copying: core.channels.copies_pending(),
            backlog: core.wants_room(),
            busy: core.machine.busy() || core.channels.busy(),
            dead: core.machine.dead().is_some(),
            preparing: false,
            next_tick: Some(core.machine.next_tick()),
        }
    }

    /// Whether another thread may hold the connection for long.
    pub(crate) fn is_preparing(&self) -> bool {
        self.0.preparing.load(Ordering::SeqCst) > 0
    }

    /// Whether work is in progress or data waits to be sent.
    pub(crate) fn is_active(&self) -> bool {
        // The preparing thread requests a drive when it is done.
        if self.is_preparing() {
            return false;
        }
        let core = self.0.lock();
        core.machine.dead().is_none() && core.is_active()
    }

    /// The timer of an idle connection: sends its heartbeat and checks its deadlines, nothing else. Returns when the next tick is
    /// due; `None` where the connection needs a full round.
    pub(crate) fn tick_at_rest(&self, now: Instant) -> Option<Instant> {
        let mut core = self.0.hold(self.0.core.try_lock()?);
        let (silent, limit) = core.machine.silence(now);
        // This process may not have run for a while: frames from the peer may lie unread.
        if core.machine.dead().is_some() || core.closing || core.is_active() || silent > limit / 2 {
            return None;
        }
        core.tick(now).ok()?;
        // The check may have found a channel, or the control connection, that has failed.
        (core.backlog() == 0 && !core.is_active() && core.suspended.is_none()).then(|| core.machine.next_tick())
    }

    /// NICs of the host have changed: channels over those with a fault are closed, and a control connection that may be made again is given
    /// up if nothing can be sent from its `address`. Whether there were any; `None`: a thread prepares the connection, which was not checked.
    pub(crate) fn close_faulty(
        &self,
        fault: &dyn Fn(&str, Option<IpAddr>) -> Option<String>,
        address: &dyn Fn(IpAddr) -> Option<String>,
    ) -> Option<bool> {
        if self.is_preparing() {
            return None;
        }
        let mut core = self.0.lock();
        if core.machine.dead().is_some() || core.closing {
            return Some(false);
        }
        if let Err(e) = core.channels.close_faulty(fault) {
            self.0.fail_locked(&mut core, e);
        }
        let movable = core.movable && core.control.lost().is_none();
        if let Some(why) = core.control.local_ip().filter(|_| movable).and_then(address) {
            core.control.suspend(err!(RemoteDisconnect, "control connection: {why}"));
            let _ = core.check_control(Instant::now());
            self.0.note_suspended(&core);
        }
        Some(core.is_active())
    }

    /// The doorbell of an idle connection was armed: channels that failed before rang no bell. Whether work is in progress.
    pub(crate) fn settle(&self) -> bool {
        if self.0.slot.take_failure() {
            self.look(None);
        }
        self.is_active()
    }

    /// A channel rang and nothing moved: checks whether it has failed. `false` when it is too early to check again.
    pub(crate) fn look_for_failure(&self) -> bool {
        self.look(Some(LOOK))
    }

    /// Checks whether a channel has failed. `false` when the last check was less than `pause` ago.
    fn look(&self, pause: Option<Duration>) -> bool {
        if self.is_preparing() {
            return true;
        }
        let mut core = self.0.lock();
        let now = Instant::now();
        if core.machine.dead().is_some() || core.closing {
            return true;
        }
        if pause.is_some_and(|pause| now - core.looked < pause) {
            return false;
        }
        core.looked = now;
        let Core { machine, channels, .. } = &mut *core;
        if let Err(e) = machine.note_network(channels, now) {
            let e = core.prefer_goodbye(e, now);
            self.0.fail_locked(&mut core, e);
        }
        true
    }
}
