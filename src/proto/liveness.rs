//! Whether the peer is alive and knows that this engine is: silence, heartbeats, and the totals that they report. Pure; the
//! caller passes the time. Knows nothing of transfers.

use crate::status::{bail, Result};
use std::time::{Duration, Instant};

/// How often the deadlines of transfers are checked while there are any.
const TICK: Duration = Duration::from_millis(50);
/// How often the peer learns how much has arrived, while data arrives.
const REPORT: Duration = Duration::from_secs(1);

/// The heartbeat interval for a peer that gives up after `peer_timeout` of silence: two heartbeats may be late.
pub(crate) fn heartbeat(peer_timeout: Duration) -> Duration {
    peer_timeout / 3
}

/// When each event last happened, and when to check again.
#[derive(Debug)]
pub(super) struct Liveness {
    /// Silence after which the peer is lost, and the interval of this engine's heartbeats.
    peer_timeout: Duration,
    heartbeat: Duration,
    /// When the peer last sent anything.
    received: Instant,
    /// The last heartbeat of the peer, and of this engine.
    ping: Instant,
    pub report: Instant,
    pub next_tick: Instant,
    /// The peer's heartbeat has arrived and this engine's is due soon: it is sent now, so that both engines wake up once.
    echo: bool,
    /// Bytes that the peer has reported as arrived.
    peer_received: u64,
    /// Bytes that this engine's last heartbeat reported.
    reported: u64,
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
            reported: 0,
        }
    }

    /// The peer sent something.
    pub(super) fn on_received(&mut self, now: Instant) {
        self.received = now;
    }

    /// The peer's heartbeat says that `received` of `sent` bytes have arrived. Returns how many of them are new.
    ///
    /// # Errors
    /// `Protocol` for a number that is impossible.
    pub(super) fn on_ping(&mut self, received: u64, sent: u64, now: Instant) -> Result<u64> {
        if received < self.peer_received || received > sent {
            bail!(Protocol, "the peer reports {received} bytes received after {}, of {sent} sent", self.peer_received);
        }
        let news = received - self.peer_received;
        (self.ping, self.peer_received) = (now, received);
        // This engine's heartbeat goes along if half of its interval has passed.
        if now.saturating_duration_since(self.report) >= self.heartbeat / 2 {
            self.echo = true;
            self.next_tick = self.next_tick.min(now);
        }
        Ok(news)
    }

    /// The peer's heartbeats are late: everything that it sends waits behind other data.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.ping) > self.peer_timeout / 2
    }

    /// When something of the peer last arrived.
    pub(super) fn received(&self) -> Instant {
        self.received
    }

    /// How long the peer has been silent, and how long it may be.
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

    /// Something started: its deadlines are checked soon.
    pub(super) fn look_soon(&mut self, now: Instant) {
        self.next_tick = self.next_tick.min(now + TICK);
    }

    /// Plans the next check: soon if anything is `active`, otherwise when a heartbeat is due, but within `at_most`.
    pub(super) fn plan(&mut self, active: bool, at_most: Duration, now: Instant) {
        self.next_tick = if active {
            now + TICK
        } else {
            // The driving thread learns of what starts meanwhile at this time at the latest.
            let heartbeat = self.report + self.heartbeat;
            heartbeat.min(self.received + self.peer_timeout).min(now + at_most).max(now + TICK)
        };
    }

    /// Whether a heartbeat is due, either by its interval or to report incoming data.
    /// `most`: the longest time between two of them.
    pub(super) fn must_ping(&mut self, received: u64, most: Duration, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.report);
        let news = received > self.reported && since >= REPORT.min(most);
        let due = if std::mem::take(&mut self.echo) { self.heartbeat / 2 } else { self.heartbeat };
        news || since >= due.min(most)
    }

    /// A heartbeat that reports so many bytes is being sent.
    pub(super) fn on_ping_sent(&mut self, received: u64, now: Instant) {
        self.reported = received;
        self.report = now;
    }
}
