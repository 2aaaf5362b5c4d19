//! A connection as the progress thread drives it: a round, a timer's tick, a look at channels that rang for nothing.

use super::core::Core;
use super::shared::Shared;
use crate::engine::progress::pacing::NAP_BYTES;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A channel that rang for nothing is looked at for a failure this often at most.
const LOOK: Duration = Duration::from_millis(5);

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

/// A connection as the progress thread drives it.
pub(crate) struct Driver<'a>(pub(super) &'a Shared);

impl Driver<'_> {
    /// A round of the progress thread. `must`: waits for the lock; otherwise leaves the round to whoever holds it.
    pub(crate) fn progress(&self, must: bool) -> Progress {
        if self.0.preparing.load(Ordering::SeqCst) > 0 {
            return Progress { channels_busy: false, busy: false, kept: true, ..Progress::left_alone() };
        }
        let held = if must { Some(self.0.core.lock()) } else { self.0.core.try_lock() };
        let Some(mut core) = held.map(|core| self.0.hold(core)) else { return Progress::left_alone() };
        let any = self.0.drive(&mut core, Instant::now());
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
    pub(crate) fn is_active(&self) -> bool {
        // It asks for the progress thread afterwards.
        if self.0.preparing.load(Ordering::SeqCst) > 0 {
            return false;
        }
        let core = self.0.lock();
        core.machine.dead().is_none() && core.is_active()
    }

    /// The timer of a connection that rests: its heartbeat leaves and its deadlines are looked at, without a look at anything else. When
    /// to do it again; none where the connection needs a whole round.
    pub(crate) fn tick_at_rest(&self, now: Instant) -> Option<Instant> {
        let mut core = self.0.hold(self.0.core.try_lock()?);
        let (silent, limit) = core.machine.silence(now);
        // What the peer has said may lie unread, where this process did not run for a while.
        if core.machine.dead().is_some() || core.closing || core.is_active() || silent > limit / 2 {
            return None;
        }
        core.tick(now).ok()?;
        (core.backlog() == 0).then(|| core.machine.next_tick())
    }

    /// A channel rang and nothing moved: it may have failed.
    pub(crate) fn look_for_failure(&self) {
        if self.0.preparing.load(Ordering::SeqCst) > 0 {
            return;
        }
        let mut core = self.0.lock();
        let now = Instant::now();
        if core.machine.dead().is_some() || core.closing || now - core.looked < LOOK {
            return;
        }
        core.looked = now;
        let Core { machine, channels, .. } = &mut *core;
        if let Err(e) = machine.note_network(channels, now) {
            let e = core.last_words(e, now);
            self.0.fail_locked(&mut core, e);
        }
    }
}
