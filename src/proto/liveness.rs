//! Whether the peer is alive and knows that this side is: silence, heartbeats, and the totals that they report. Pure; time is the
//! caller's. Knows nothing of transfers.

use super::limits;
use crate::status::{bail, Result};
use std::time::{Duration, Instant};

/// Deadlines of transfers are looked at this often while there are any.
const TICK: Duration = Duration::from_millis(50);
/// The peer learns this often how much has arrived, while data arrives.
const REPORT: Duration = Duration::from_secs(1);

/// How often a heartbeat goes to a peer that gives this side up after so much silence: two may be late.
pub(crate) fn heartbeat(peer_timeout: Duration) -> Duration {
    peer_timeout / 3
}

/// When what last happened, and when to look again.
#[derive(Debug)]
pub(super) struct Liveness {
    /// Silence after which the peer is lost, and how often it hears of this side.
    peer_timeout: Duration,
    heartbeat: Duration,
    /// When anything of the peer came last.
    received: Instant,
    /// The last heartbeat of the peer, and of this side.
    ping: Instant,
    pub report: Instant,
    pub next_tick: Instant,
    /// The peer's heartbeat has come, and this side's is due before long: it goes along, so that one look serves both.
    echo: bool,
    /// Bytes that the peer says have arrived there.
    peer_received: u64,
    /// Bytes and chunks that this side's last heartbeat has reported.
    reported: (u64, u64),
}

impl Liveness {
    pub(super) fn new(peer_timeout: Duration, heartbeat: Duration, now: Instant) -> Liveness {
        Liveness {
            peer_timeout,
            heartbeat,
            received: now,
            ping: now,
            report: now,
            next_tick: now,
            echo: false,
            peer_received: 0,
            reported: (0, 0),
        }
    }

    /// Something of the peer came.
    pub(super) fn on_received(&mut self, now: Instant) {
        self.received = now;
    }

    /// The peer's heartbeat says that `received` bytes have arrived there, of `sent`. How many of them are new.
    ///
    /// # Errors
    /// `Protocol` for a number that cannot be.
    pub(super) fn on_ping(&mut self, received: u64, sent: u64, now: Instant) -> Result<u64> {
        if received < self.peer_received || received > sent {
            bail!(Protocol, "the peer has received {received} bytes after {}, of {sent} sent", self.peer_received);
        }
        let news = received - self.peer_received;
        (self.ping, self.peer_received) = (now, received);
        // This side's goes with the same look if it has waited for half of its time.
        if now.saturating_duration_since(self.report) >= self.heartbeat / 2 {
            self.echo = true;
            self.next_tick = self.next_tick.min(now);
        }
        Ok(news)
    }

    /// The peer's heartbeats stay away, since all that it sends waits.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.ping) > self.peer_timeout / 2
    }

    /// Since when nothing was heard of the peer, and how long that may last.
    pub(super) fn silence(&self, now: Instant) -> (Duration, Duration) {
        (now.saturating_duration_since(self.received), self.peer_timeout)
    }

    /// # Errors
    /// `RemoteDisconnect` when the peer has been silent for too long.
    pub(super) fn check(&self, now: Instant) -> Result<()> {
        let (silent, limit) = self.silence(now);
        if silent > limit {
            bail!(RemoteDisconnect, "the peer has been silent for {silent:.1?}");
        }
        Ok(())
    }

    /// Something began: its deadlines are looked at soon.
    pub(super) fn look_soon(&mut self, now: Instant) {
        self.next_tick = self.next_tick.min(now + TICK);
    }

    /// Plans the next look: soon while something is `active`, else when a heartbeat is due, and after `at_most`.
    pub(super) fn plan(&mut self, active: bool, at_most: Duration, now: Instant) {
        self.next_tick = if active {
            now + TICK
        } else {
            // Whoever drives learns of what begins meanwhile at this time at the latest.
            let heartbeat = self.report + self.heartbeat;
            heartbeat.min(self.received + self.peer_timeout).min(now + at_most).max(now + TICK)
        };
    }

    /// Whether a heartbeat is due, whatever else is said, or one with the progress of incoming data.
    pub(super) fn must_ping(&mut self, received: u64, transfer_timeout: Duration, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.report);
        let news = received > self.reported.0 && since >= REPORT.min(transfer_timeout / 4);
        let due = if std::mem::take(&mut self.echo) { self.heartbeat / 2 } else { self.heartbeat };
        news || since >= due
    }

    /// Whether so many chunks have arrived since the last heartbeat that the peer must hear of them now.
    pub(super) fn must_report(&self, chunks: u64) -> bool {
        limits::must_report(chunks - self.reported.1)
    }

    /// A heartbeat goes out that reports so many bytes and chunks.
    pub(super) fn on_ping_sent(&mut self, received: u64, chunks: u64, now: Instant) {
        self.reported = (received, chunks);
        self.report = now;
    }
}
