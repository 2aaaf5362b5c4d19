//! An application thread that asks for a transfer or waits for it: it drives the connection meanwhile, or leaves the core to others. Knows
//! nothing of the progress thread but that it can be asked to drive.

use super::core::Core;
use super::shared::Shared;
use crate::engine::progress::pacing::{pause, Cores, Pause, Situation};
use crate::proto::TransferState;
use crate::status::Result;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A thread that waits for a transfer drives this long before it sleeps.
const WAIT_SPIN: Duration = Duration::from_micros(50);
/// For so long an application thread that looks in stays for the end of something small.
const LINGER: Duration = Duration::from_micros(20);

/// A connection as an application thread waits for it.
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
        let situation = self.situation(&core, id, &before);
        let planned = pause(&situation);
        if let Pause::HandOver(nap) = planned {
            drop(core);
            // Rung by the channels, the progress thread does the same with fewer rounds, and this core is theirs.
            if self.0.polls.stop() {
                self.0.context.request_drive(self.0.id);
            }
            std::thread::sleep(nap);
            self.0.polls.leave(self.0.context.clock());
            return self.0.lock().machine.lookup(id);
        }
        let now = Instant::now();
        self.0.polls.enter(self.0.context.at(now));
        let any = self.drive_on(&mut core, now);
        let after = core.machine.lookup(id)?;
        drop(core);
        match planned {
            // A poll that found nothing took no time.
            Pause::None if !any => {
                self.0.polls.leave(self.0.context.at(now));
                return Ok(after);
            }
            _ if any || after.complete => {}
            Pause::Nap(nap) => std::thread::sleep(nap),
            Pause::Yield => std::thread::yield_now(),
            Pause::None | Pause::HandOver(_) => {}
        }
        self.0.polls.leave(self.0.context.clock());
        Ok(after)
    }

    /// Has the log say why a transfer failed, unless it has done so.
    pub(super) fn tell_failure(&self, id: u64) {
        if !self.0.core.is_here() {
            return;
        }
        let failure = self.0.lock().machine.tell(id);
        if let Some(error) = failure {
            self.0.context.lines.log(log::Level::Error, Instant::now(), format_args!("{error}"));
        }
    }

    fn situation(&self, core: &Core, id: u64, state: &TransferState) -> Situation {
        Situation {
            cores: self.0.context.cores,
            doorbell: self.0.context.doorbells,
            only_this: self.0.context.polled_again(self.0.id, id),
            channels_busy: core.channels.busy(),
            copying: core.channels.copies_pending(),
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
            // Sleep; the progress thread drives from here and wakes us when something has ended.
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

    /// A round of progress by an application thread, and further ones while something small is about to end: going away and coming back
    /// takes longer. Whatever a peer orders meanwhile keeps nobody here.
    fn drive_on(&self, core: &mut Core, now: Instant) -> bool {
        let ended = core.machine.ended();
        let mut any = self.0.drive(core, now);
        while core.machine.ended() == ended && self.0.context.cores == Cores::Many {
            let at = Instant::now();
            if at.saturating_duration_since(now) >= LINGER || !core.channels.activity(at).worth_spinning {
                break;
            }
            std::hint::spin_loop();
            any |= self.0.drive(core, at);
        }
        any
    }

    /// A round by an application thread that looks for notifications. Whether something moved, or is under way.
    pub(super) fn look_in(&self) -> bool {
        let Some(mut core) = self.0.core.try_lock().map(|core| self.0.hold(core)) else { return true };
        let now = Instant::now();
        self.0.polls.enter(self.0.context.at(now));
        let any = self.drive_on(&mut core, now) || (core.machine.busy() && core.machine.dead().is_none());
        drop(core);
        self.0.polls.leave(self.0.context.clock());
        any
    }
}
