//! How a connection ends: closed on this side, failed with a cause that both sides are told, or given up after a defect.

use super::core::{Core, FLUSH};
use super::{Connection, Held, CLOSING};
use crate::status::{err, Error, ErrorKind};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How much of a close waits for the peer to hang up.
const HANG_UP: Duration = Duration::from_millis(100);
/// Bytes of the control stream that leave at the end of a connection: what waits before the reason, as far as the socket takes it.
const FAREWELL: usize = 16 << 20;

impl Connection {
    /// A defect of this library has left the connection in an unknown state.
    pub(crate) fn abandon(&self) {
        let mut core = self.core.lock();
        self.unwatch_local();
        self.abandon_locked(&mut core);
    }

    /// What is done first is done, whatever of it panics once more: nothing touches memory from here on, and nobody waits for ever.
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
        self.table.bell.unwatch(self.fd);
        core.control.shutdown_write();
        self.ended.notify_all();
    }

    /// Ends the connection, unless it has ended. Whether all that was queued for the peer has left.
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
        self.table.counters.ended(totals, error.kind(), in_order || core.closing, silent > limit);
        let (lines, now) = (&self.table.lines, Instant::now());
        match (error.kind(), lost) {
            (ErrorKind::Canceled, 0) => log::debug!("{error}"),
            (ErrorKind::Canceled, n) => log::info!("{n} transfers canceled: {error}"),
            // A peer may come and go as often as it likes.
            (ErrorKind::RemoteDisconnect, 0) => lines.log(log::Level::Info, now, format_args!("{error}")),
            (_, n) => {
                lines.log(log::Level::Error, now, format_args!("connection failed with {n} transfers in flight: {error}"));
            }
        }
        self.table.bell.unwatch(self.fd);
        self.unwatch_local();
        // Whoever has it wait for accept asks afterwards.
        self.gone.store(true, Ordering::SeqCst);
        if self.waits.load(Ordering::SeqCst) {
            self.table.dead.tell(self.id);
        }
        // The peer learns what this side knows, as far as the socket takes it, before it sees its channels end.
        let now = Instant::now();
        if !core.closing {
            core.machine.say_bye(Some(&error), now);
        }
        core.control.end();
        let _ = core.flush(now, FAREWELL);
        let left = core.backlog() == 0;
        core.machine.fail(error, &mut core.channels);
        core.control.shutdown_write();
        self.ended.notify_all();
        left
    }

    /// Closes the connection: what is queued for the peer leaves first (for a second at most), then transfers in flight are canceled.
    pub fn close(&self) {
        self.insist_on_goodbye();
        self.finish_close(Instant::now() + CLOSING.min(self.table.close_timeout));
    }

    /// Tells the peer that no more comes, without waiting for it. [`Connection::finish_close`] does the rest. `false` where somebody
    /// keeps the connection, or has it until the deadline: nothing was said.
    pub(crate) fn say_goodbye(&self, deadline: Instant) -> bool {
        if !self.core.is_here() {
            return true;
        }
        let Some(mut core) = self.lock_unless_kept(deadline) else { return false };
        self.goodbye(&mut core);
        true
    }

    /// The same; whoever keeps the connection is waited for.
    pub(crate) fn insist_on_goodbye(&self) {
        if self.core.is_here() {
            let mut core = self.lock();
            self.goodbye(&mut core);
        }
    }

    fn goodbye(&self, core: &mut Core) {
        if core.machine.dead().is_none() && !core.closing {
            // What has arrived still counts.
            let now = Instant::now();
            self.drive(core, now);
            core.machine.say_bye(None, now);
            core.control.end();
            core.closing = true;
            // Nothing is read any more; what still comes must not wake anybody.
            self.table.bell.unwatch(self.fd);
            let _ = core.flush(now, FLUSH);
        }
    }

    /// Ends the connection, which has said goodbye: once what is queued has left and the peer has hung up, or at the deadline.
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
        self.table.connections.remove(self.id);
    }

    /// Fails the connection if a transfer of it still uses the region. `false`: it was not asked, since somebody keeps it, or has it at
    /// this moment. `queue`: only the former; who merely tries can be overtaken for ever.
    pub(crate) fn fail_if_using(&self, region: u64, queue: bool, error: Error) -> bool {
        let mut core = match self.core.try_lock() {
            Some(core) => self.hold(core),
            None if queue && self.preparing.load(Ordering::SeqCst) == 0 => self.lock(),
            None => return false,
        };
        if core.machine.uses_region(region) || core.channels.uses_region(region) {
            self.fail_locked(&mut core, error);
        }
        true
    }

    /// Drops the plugin's registrations of a region that has ended, and what a process of this host was told of it. That is waited for,
    /// whoever keeps the connection: other memory may come to lie there next, and must not be taken for it.
    pub(crate) fn forget_region(&self, id: u64) {
        self.lock().channels.forget_region(id);
    }

    /// The lock, unless the deadline comes first or somebody keeps the connection, which may be for long.
    fn lock_unless_kept(&self, deadline: Instant) -> Option<Held<'_>> {
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
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}
