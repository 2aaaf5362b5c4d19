//! Frames that wait to be sent, and how long they have waited for the peer to read. Knows nothing of their content.

use super::deadlines;
use crate::status::{bail, Result};
use crate::wire::frame::Frame;
use crate::wire::queue::TxQueue;
use std::time::{Duration, Instant};

/// The queue of frames, and how much of it the socket has taken.
pub(super) struct ControlQueue {
    pub tx: TxQueue,
    /// Bytes that were taken from the queue and that the socket has not taken.
    leaving: usize,
    /// When the socket had last taken enough of the queued frames, or nothing was queued; and the bytes that it has taken since.
    drained: Instant,
    trickled: u64,
}

impl ControlQueue {
    pub(super) fn new(now: Instant) -> ControlQueue {
        ControlQueue { tx: TxQueue::default(), leaving: 0, drained: now, trickled: 0 }
    }

    /// Bytes that the socket has not taken.
    pub(super) fn backlog(&self) -> usize {
        self.tx.pending() + self.leaving
    }

    pub(super) fn push(&mut self, frame: &Frame<'_>, now: Instant) {
        if self.backlog() == 0 {
            self.drained = now;
        }
        self.tx.push(frame);
    }

    /// Lets another module append frames.
    pub(super) fn append<R>(&mut self, now: Instant, append: impl FnOnce(&mut TxQueue) -> R) -> R {
        let (before, backlog) = (self.tx.pending(), self.backlog());
        let result = append(&mut self.tx);
        if self.tx.pending() > before && backlog == 0 {
            self.drained = now;
        }
        result
    }

    /// The socket took bytes. `leaving`: bytes that were taken from the queue and not by the socket.
    pub(super) fn on_sent(&mut self, bytes: usize, leaving: usize, now: Instant) {
        self.leaving = leaving;
        self.trickled += bytes as u64;
        // A peer that reads byte by byte does not hold up what waits for room.
        if bytes > 0 && (self.backlog() == 0 || self.trickled >= deadlines::FLOOR) {
            (self.drained, self.trickled) = (now, 0);
        }
    }

    /// Another socket begins to take what waits, and of what was taken all that the peer did not get.
    pub(super) fn on_moved(&mut self, leaving: usize, now: Instant) {
        (self.leaving, self.drained, self.trickled) = (leaving, now, 0);
    }

    /// # Errors
    /// `TimedOut` when the peer reads nothing for longer than `timeout`.
    pub(super) fn check(&self, timeout: Duration, now: Instant) -> Result<()> {
        let stuck = now.saturating_duration_since(self.drained);
        if self.backlog() > 0 && stuck > timeout {
            let read = self.trickled;
            bail!(
                TimedOut,
                "the peer has read {read} bytes of the control connection in {stuck:.1?}; {} bytes wait",
                self.backlog()
            );
        }
        Ok(())
    }
}
