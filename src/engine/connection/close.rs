//! How a connection ends: by a local close, by an error, or by a panic in this library.

use super::core::{Core, FLUSH};
use super::shared::Shared;
use crate::status::{err, Error};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a close waits for the peer to close its end.
const HANG_UP: Duration = Duration::from_millis(100);
/// Ends a connection on behalf of its owner.
pub(super) struct Closing<'a>(pub &'a Shared);

impl Closing<'_> {
    /// See `Connection::say_goodbye`.
    pub(super) fn say_goodbye(&self, deadline: Instant) -> bool {
        if !self.0.core.is_here() {
            return true;
        }
        let Some(mut core) = self.0.lock_unless_preparing(deadline) else { return false };
        self.goodbye(&mut core);
        true
    }

    /// See `Connection::insist_on_goodbye`.
    pub(super) fn insist_on_goodbye(&self) {
        if self.0.core.is_here() {
            let mut core = self.0.lock();
            self.goodbye(&mut core);
        }
    }

    fn goodbye(&self, core: &mut Core) {
        if core.machine.dead().is_none() && !core.closing {
            // Data that has arrived still counts.
            let now = Instant::now();
            self.0.drive(core, now);
            core.machine.say_bye(None, now);
            core.control.end();
            core.closing = true;
            // Nothing is read from here on; later arrivals must not wake the progress thread.
            self.0.context.queue.bell.unwatch(self.0.fd);
            let _ = core.flush(now, FLUSH);
        }
    }

    /// See `Connection::finish_close`. `false` in a forked child, where it does nothing.
    pub(super) fn finish(&self, deadline: Instant) -> bool {
        if !self.0.core.is_here() {
            return false;
        }
        let mut core = self.0.lock();
        while core.machine.dead().is_none() && core.backlog() > 0 && Instant::now() < deadline {
            if core.flush(Instant::now(), FLUSH).is_err() || core.control.hung_up() {
                break;
            }
            core.pause(Duration::from_micros(50));
        }
        if core.machine.dead().is_none() {
            let left = core.backlog();
            if left > 0 {
                log::warn!("{}: closed with {left} bytes of the control connection unsent", self.0.peer.name);
            }
            core.control.shutdown_write();
            // Closing a socket with unread bytes resets it, and the peer could lose our last frames: read until it closes its
            // end.
            let until = deadline.min(Instant::now() + HANG_UP);
            while !core.control.hung_up() && Instant::now() < until {
                core.pause(Duration::from_micros(50));
            }
            self.0.fail_locked(&mut core, err!(Canceled, "closed on this side"));
        }
        true
    }

    /// See `Connection::fail_if_using`.
    pub(super) fn fail_if_using(&self, region: u64, queue: bool, error: Error) -> bool {
        let mut core = match self.0.core.try_lock() {
            Some(core) => self.0.hold(core),
            None if queue && self.0.preparing.load(Ordering::SeqCst) == 0 => self.0.lock(),
            None => return false,
        };
        if core.machine.uses_region(region) || core.channels.uses_region(region) {
            self.0.fail_locked(&mut core, error);
        }
        true
    }

    /// See `Connection::forget_region`.
    pub(super) fn forget_region(&self, id: u64) {
        self.0.lock().channels.forget_region(id);
    }
}
