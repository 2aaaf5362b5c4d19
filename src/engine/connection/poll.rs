//! An application thread that polls a transfer or waits for it: it drives the connection meanwhile, or leaves the lock to others.
//! Knows nothing about the progress thread except that it can be asked to drive.

use super::core::Core;
use super::shared::Shared;
use crate::engine::progress::pacing::{pause, Cores, Pause, Situation};
use crate::proto::TransferState;
use crate::status::Result;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A waiting thread drives for this long before it sleeps.
const WAIT_SPIN: Duration = Duration::from_micros(50);
/// How long an application thread spins for the end of a small transfer.
const LINGER: Duration = Duration::from_micros(20);

/// A connection as seen by a waiting application thread.
pub(super) struct Waiter<'a>(pub &'a Shared);

impl Waiter<'_> {
    /// See `Connection::poll`.
    pub(super) fn poll(&self, id: u64) -> Result<TransferState> {
        self.0.core.check("connection")?;
        let mut core = self.0.lock();
        let before = core.machine.lookup(id)?;
        if before.complete || core.machine.dead().is_some() {
            return Ok(before);
        }
        let now = Instant::now();
        let situation = self.situation(&core, id, &before, now);
        let planned = pause(&situation);
        if let Pause::HandOver(nap) = planned {
            drop(core);
            // Woken by doorbells, the progress thread needs fewer rounds, and the I/O threads need this core.
            if self.0.polls.stop() {
                self.0.context.request_drive(self.0.id);
            }
            std::thread::sleep(nap);
            self.0.polls.leave(self.0.context.clock());
            return self.0.lock().machine.lookup(id);
        }
        self.0.polls.enter(self.0.context.at(now));
        let any = self.drive_and_linger(&mut core, now);
        let after = core.machine.lookup(id)?;
        drop(core);
        match planned {
            // A poll that found nothing took no time worth counting.
            Pause::None if !any => {
                self.0.polls.leave(self.0.context.at(now));
                return Ok(after);
            }
            _ if any || after.complete => {}
            Pause::Nap(nap) => std::thread::sleep(nap),
            Pause::Yield => {
                let before = self.0.context.clock();
                std::thread::yield_now();
                self.0.polls.yielded(before, self.0.context.clock());
            }
            Pause::None | Pause::HandOver(_) => {}
        }
        self.0.polls.leave(self.0.context.clock());
        Ok(after)
    }

    /// See `Connection::log_failure`.
    pub(super) fn log_failure(&self, id: u64) {
        if !self.0.core.is_here() {
            return;
        }
        let failure = self.0.lock().machine.take_failure(id);
        if let Some(error) = failure {
            self.0.context.lines.log(log::Level::Error, Instant::now(), format_args!("{error}"));
        }
    }

    fn situation(&self, core: &Core, id: u64, state: &TransferState, now: Instant) -> Situation {
        Situation {
            cores: self.0.context.cores,
            doorbell: self.0.context.doorbells,
            only_this: self.0.context.polled_again(self.0.id, id),
            channels_busy: core.channels.busy(),
            copying: core.channels.copies_pending(),
            contended: self.0.polls.contended(self.0.context.at(now)),
            missing: state.bytes_total - state.bytes_done,
            total: state.bytes_total,
        }
    }

    /// See `Connection::wait`.
    pub(super) fn wait(&self, id: u64, timeout: Option<Duration>) -> Result<TransferState> {
        self.0.core.check("connection")?;
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
            // The progress thread drives from here on and wakes this thread when a transfer has ended.
            self.0.polls.stop();
            self.0.context.request_drive(self.0.id);
            let mut core = self.0.lock();
            self.0.waiters.fetch_add(1, Ordering::AcqRel);
            let until = deadline.unwrap_or(now + Duration::from_millis(100)).min(now + Duration::from_millis(100));
            let running = |core: &Core| matches!(core.machine.lookup(id), Ok(TransferState { complete: false, .. }));
            while running(&core) && !self.0.ended.wait_until(&mut core.core, until).timed_out() {}
            self.0.waiters.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A round by an application thread, and further rounds while a small transfer is about to end: returning to the caller and
    /// coming back takes longer. Work that a peer starts meanwhile does not keep the thread here.
    fn drive_and_linger(&self, core: &mut Core, now: Instant) -> bool {
        let ended = core.machine.ended();
        let mut any = self.0.drive(core, now);
        while core.machine.ended() == ended && self.0.context.cores == Cores::Many {
            let at = Instant::now();
            if at.saturating_duration_since(now) >= LINGER || core.channels.activity().spin_until.is_none_or(|until| at >= until)
            {
                break;
            }
            std::hint::spin_loop();
            any |= self.0.drive(core, at);
        }
        any
    }

    /// A round by an application thread that looks for notifications. Whether something moved or is in flight.
    pub(super) fn drive_for_notifications(&self) -> bool {
        let Some(mut core) = self.0.core.try_lock().map(|core| self.0.hold(core)) else { return true };
        let now = Instant::now();
        self.0.polls.enter(self.0.context.at(now));
        let any = self.drive_and_linger(&mut core, now) || (core.machine.busy() && core.machine.dead().is_none());
        drop(core);
        self.0.polls.leave(self.0.context.clock());
        any
    }
}
