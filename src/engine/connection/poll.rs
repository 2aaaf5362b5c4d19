//! An application thread that asks for a transfer or waits for it: it drives the connection meanwhile, or leaves the core to others. Knows
//! nothing of the progress thread but that it can be asked to drive.

use super::core::Core;
use super::Connection;
use crate::engine::progress::pacing::{pause, Cores, Pause, Situation};
use crate::proto::TransferState;
use crate::status::Result;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A thread that waits for a transfer drives this long before it sleeps.
const WAIT_SPIN: Duration = Duration::from_micros(50);
/// For so long an application thread that looks in stays for the end of something small.
const LINGER: Duration = Duration::from_micros(20);

impl Connection {
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
                self.table.request_drive(self.id);
            }
            std::thread::sleep(nap);
            self.polls.leave(self.table.clock());
            return self.lock().machine.lookup(id);
        }
        let now = Instant::now();
        self.polls.enter(self.table.at(now));
        let any = self.drive_on(&mut core, now);
        let after = core.machine.lookup(id)?;
        drop(core);
        match planned {
            // A poll that found nothing took no time.
            Pause::None if !any => {
                self.polls.leave(self.table.at(now));
                return Ok(after);
            }
            _ if any || after.complete => {}
            Pause::Nap(nap) => std::thread::sleep(nap),
            Pause::Yield => std::thread::yield_now(),
            Pause::None | Pause::HandOver(_) => {}
        }
        self.polls.leave(self.table.clock());
        Ok(after)
    }

    /// Has the log say why a transfer failed, unless it has done so.
    pub fn tell_failure(&self, id: u64) {
        if !self.core.is_here() {
            return;
        }
        let failure = self.lock().machine.tell(id);
        if let Some(error) = failure {
            self.table.lines.log(log::Level::Error, Instant::now(), format_args!("{error}"));
        }
    }

    fn situation(&self, core: &Core, id: u64, state: &TransferState) -> Situation {
        Situation {
            cores: self.table.cores,
            doorbell: self.table.doorbells,
            only_this: self.table.polled_again(self.id, id),
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
            self.table.request_drive(self.id);
            let mut core = self.lock();
            self.waiters.fetch_add(1, Ordering::AcqRel);
            let until = deadline.unwrap_or(now + Duration::from_millis(100)).min(now + Duration::from_millis(100));
            let running = |core: &Core| matches!(core.machine.lookup(id), Ok(TransferState { complete: false, .. }));
            while running(&core) && !self.ended.wait_until(&mut core.core, until).timed_out() {}
            self.waiters.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A round of progress by an application thread, and further ones while something small is about to end: going away and coming back
    /// takes longer. Whatever a peer orders meanwhile keeps nobody here.
    pub(super) fn drive_on(&self, core: &mut Core, now: Instant) -> bool {
        let ended = core.machine.ended();
        let mut any = self.drive(core, now);
        while core.machine.ended() == ended && self.table.cores == Cores::Many {
            let at = Instant::now();
            if at.saturating_duration_since(now) >= LINGER || !core.channels.activity(at).worth_spinning {
                break;
            }
            std::hint::spin_loop();
            any |= self.drive(core, at);
        }
        any
    }
}
