//! A connection as the application holds it. Its threads share `shared`; the lock in there guards `core`. `submit`, `poll`,
//! `drive` and `close` borrow those to start transfers, wait for them, make progress and end the connection. Knows nothing about
//! how a connection was set up.

mod close;
mod core;
mod drive;
mod path;
mod poll;
mod restore;
mod shared;
mod submit;

pub(crate) use core::Core;
pub(crate) use drive::{Driver, Progress};
pub use path::TransferPath;
pub(crate) use restore::{ends, Begun, Counts, Restorer, Socket};
pub(crate) use shared::Peer;

use crate::engine::fifo::FifoItem;
use crate::engine::list::List;
use crate::engine::progress::doorbell::DoorbellSlot;
use crate::engine::progress::table::{self, Driven};
use crate::engine::setup::lineage::Lineage;
use crate::engine::transfer::{Direction, LocalSegment};
use crate::host::Watched;
use crate::proto::TransferState;
use crate::stats::ConnectionStats;
use crate::status::{Error, Result};
use crate::types::Place;
use crate::wire::control::Voice;
use close::Closing;
use poll::Waiter;
use shared::{Preparing, Shared};
use std::borrow::Borrow;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use submit::Submission;

/// The connections of an engine.
pub(crate) type ConnectionTable = table::ConnectionTable<Connection>;

/// The longest that a close takes.
pub(crate) const CLOSING: Duration = Duration::from_secs(1);

/// A connection to a peer engine. All methods may be called from any thread.
///
/// - Getters take no part in the protocol: [`Connection::peer_ip`] and the following, [`Connection::stats`], [`Connection::path`],
///   [`Connection::status`].
/// - [`Connection::transfer`], [`Connection::transfer_list`], [`Connection::send`], [`Connection::recv`] and [`Connection::notify`]
///   start something. An error leaves the connection as it was, unless [`Connection::status`] says that it is lost. From then on the
///   transfer owns the memory that it names.
/// - [`Connection::poll`] or [`Connection::wait`], with the id, until the transfer is complete or has failed: then the memory is free
///   again. They drive the connection, but it moves without them: the progress thread drives it meanwhile.
/// - [`Connection::close`], or dropping it, comes last: transfers that have not ended by then fail.
pub struct Connection {
    shared: Shared,
    table: Arc<ConnectionTable>,
    pulse: Pulse,
    channels: usize,
    /// Set by uccl_engine_start_listener; nothing depends on it.
    pub listener_started: AtomicBool,
}

/// Sends heartbeats for a connection whose lock is held by another thread.
struct Pulse {
    voice: Arc<Voice>,
    heartbeat: Duration,
    /// For how long heartbeats are sent without the lock.
    limit: Duration,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection to {}", self.shared.peer.name)
    }
}

impl Connection {
    pub(crate) fn new(
        table: Arc<ConnectionTable>,
        core: Core,
        peer: Peer,
        slot: Arc<DoorbellSlot>,
        one_host: Option<Watched>,
    ) -> Connection {
        let machine = &core.machine;
        let pulse = Pulse { voice: core.control.voice(), heartbeat: machine.heartbeat(), limit: machine.patience() };
        Connection {
            pulse,
            channels: (0..core.channels.count()).filter(|&channel| !machine.is_lost(channel as u16)).count(),
            shared: Shared::new(table.connections.next_id(), &table.context, core, peer, slot, one_host),
            table,
            listener_started: AtomicBool::new(false),
        }
    }

    pub(crate) fn id(&self) -> u64 {
        self.shared.id
    }

    /// The control socket.
    pub(crate) fn fd(&self) -> RawFd {
        self.shared.fd
    }

    /// How often another socket has taken the place of the control socket, under the same number.
    pub(crate) fn sockets(&self) -> u32 {
        self.shared.moves.sockets.load(Ordering::SeqCst)
    }

    /// The peer's address.
    pub fn peer_ip(&self) -> IpAddr {
        self.shared.peer.ip
    }
    /// CUDA index of the peer's GPU on its host, -1 without one.
    pub fn peer_gpu_index(&self) -> i32 {
        self.shared.peer.gpu_index
    }
    /// Local name of the key that the peer has proved; none for a peer without a key, and for keys without names.
    pub fn peer_key(&self) -> Option<&str> {
        self.shared.peer.key.as_deref()
    }
    /// The peer runs on this host.
    pub fn is_local(&self) -> bool {
        crate::net::topology::is_local(self.shared.peer.ip)
    }
    /// Data channels that came up.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Statistics of the connection, and what the kernel reports about its channels. A connection that has ended keeps its
    /// totals.
    ///
    /// # Errors
    /// In a forked child.
    pub fn stats(&self) -> Result<ConnectionStats> {
        self.shared.core.check("connection")?;
        let core = self.shared.lock();
        let now = Instant::now();
        let mut channels = core.channels.stats(true, now);
        core.health.fill(&mut channels, now);
        Ok(ConnectionStats {
            id: self.shared.id,
            peer: self.shared.peer.name.clone(),
            host: self.shared.peer.ip.to_string(),
            error: core.machine.dead().map(|e| e.to_str().to_owned()),
            age: now.saturating_duration_since(core.born),
            silent: core.machine.silence(now).0,
            in_flight: core.machine.in_flight() as u64,
            backlog_bytes: core.backlog() as u64,
            totals: core.past.unwrap_or_else(|| core.totals(&channels)),
            channels,
        })
    }

    /// What has carried the bytes of a transfer that this engine started, also of one that has ended.
    ///
    /// # Errors
    /// `NotFound` for an unknown id; an error in a forked child.
    pub fn path(&self, id: u64) -> Result<TransferPath> {
        self.shared.core.check("connection")?;
        let core = self.shared.lock();
        Ok(TransferPath::new(core.machine.carriers(id)?, &core.channels.stats(false, Instant::now())))
    }

    /// Whether the connection is up.
    ///
    /// # Errors
    /// Why it is not, once it is lost or closed.
    pub fn status(&self) -> Result<()> {
        self.shared.core.check("connection")?;
        self.shared.lock().machine.alive()
    }

    /// Whether the connection waits for the application's accept.
    pub(crate) fn set_waits(&self, on: bool) {
        self.shared.waits.store(on, Ordering::SeqCst);
    }

    /// Whether the connection is up. Does not take its lock, which another thread may hold for long.
    pub(crate) fn is_up(&self) -> bool {
        self.shared.core.is_here() && !self.shared.gone.load(Ordering::SeqCst)
    }

    /// The doorbell slot of the channels.
    pub(crate) fn slot(&self) -> &Arc<DoorbellSlot> {
        &self.shared.slot
    }

    /// Allocates what chunks of `place` need. This can block for as long as the application keeps the CUDA driver busy.
    pub(crate) fn ready(&self, place: Place) -> Result<()> {
        let _preparing = Preparing::new(&self.shared);
        let mut core = self.shared.lock();
        if core.closing {
            return Ok(());
        }
        core.channels.ready(place)
    }

    /// Sends a heartbeat if one is overdue because the thread that should send it is blocked. Returns whether one was sent.
    pub(crate) fn keep_alive(&self) -> bool {
        self.shared.core.is_here() && self.pulse.voice.keep(self.pulse.heartbeat * 3 / 2, self.pulse.limit)
    }

    /// Simulates a thread that the CUDA driver blocks while it prepares the connection.
    #[doc(hidden)]
    pub fn simulate_kept_preparing(&self, time: Duration) {
        let _preparing = Preparing::new(&self.shared);
        let _core = self.shared.lock();
        std::thread::sleep(time);
    }

    /// The interval of the heartbeats.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.pulse.heartbeat
    }

    /// Exports a region to a peer on this host, which may want to reach it soon.
    pub(crate) fn offer_region(&self, region: u64) {
        if self.shared.one_host.is_some() && self.shared.core.is_here() {
            let _preparing = Preparing::new(&self.shared);
            let mut core = self.shared.lock();
            // Looked up under the lock: a thread that waits for the lock must not keep a region from being deregistered.
            match self.shared.context.registry.local(region) {
                Ok(region) if !core.closing => {
                    let region = region.to_share();
                    core.channels.direct().into_iter().for_each(|direct| direct.offer(region));
                }
                _ => {}
            }
        }
    }

    // ---- transfers and notifications ----

    /// Starts a read or write of several segments as one transfer; returns its id.
    ///
    /// # Errors
    /// `InvalidArgument`, `NotFound` (region), `Resource`, or why the connection is lost. Nothing has moved then.
    pub fn transfer<B: Borrow<FifoItem>>(
        &self,
        direction: Direction,
        items: impl ExactSizeIterator<Item = (LocalSegment, B)> + Clone,
    ) -> Result<u64> {
        Submission(&self.shared).transfer(direction, items)
    }

    /// Like [`Connection::transfer`], with a prepared list.
    ///
    /// # Errors
    /// As for [`Connection::transfer`].
    pub fn transfer_list(&self, direction: Direction, list: &List) -> Result<u64> {
        Submission(&self.shared).transfer_list(direction, list)
    }

    /// Starts a two-sided send of one message gathered from segments; returns its id.
    ///
    /// # Errors
    /// As for [`Connection::transfer`].
    pub fn send(&self, items: impl ExactSizeIterator<Item = LocalSegment>) -> Result<u64> {
        Submission(&self.shared).send(items)
    }

    /// Starts a receive of one message of at most `local.len` bytes; returns its id.
    ///
    /// # Errors
    /// As for [`Connection::transfer`].
    pub fn recv(&self, local: LocalSegment) -> Result<u64> {
        Submission(&self.shared).recv(local)
    }

    /// Queues a notification for the peer. Behind a large backlog it waits until there is room or the connection has failed. A
    /// notification that has been sent is no error even if the connection is lost meanwhile: a caller that retries would send it
    /// twice.
    ///
    /// # Errors
    /// `InvalidArgument` above 64 MiB, `Resource` when memory is short, or why the connection is lost.
    pub fn notify(&self, name: &[u8], message: &[u8]) -> Result<()> {
        Submission(&self.shared).notify(name, message)
    }

    /// Drives progress once and returns the state of a transfer.
    ///
    /// # Errors
    /// The error the transfer ended with, or `NotFound`.
    pub fn poll(&self, id: u64) -> Result<TransferState> {
        Waiter(&self.shared).poll(id)
    }

    /// Waits until a transfer has ended, at most for `timeout`; `complete` says whether it has.
    ///
    /// # Errors
    /// As for [`Connection::poll`].
    pub fn wait(&self, id: u64, timeout: Option<Duration>) -> Result<TransferState> {
        Waiter(&self.shared).wait(id, timeout)
    }

    /// Logs why a transfer failed, once.
    pub fn log_failure(&self, id: u64) {
        Waiter(&self.shared).log_failure(id);
    }

    // ---- driving ----

    /// The progress thread's view.
    pub(crate) fn driver(&self) -> Driver<'_> {
        Driver(&self.shared)
    }

    /// How long an application thread has been driving the connection, if one is.
    pub(crate) fn driven_by_application(&self) -> Option<Duration> {
        self.shared.driven_by_application()
    }

    /// The set-up thread's view.
    pub(crate) fn restorer(&self) -> Restorer<'_> {
        Restorer(&self.shared)
    }

    /// Where the connection comes from.
    pub(crate) fn lineage(&self) -> Option<&Arc<Lineage>> {
        self.shared.peer.lineage.as_ref()
    }

    /// Arms or disarms the doorbell of the channels.
    pub(crate) fn arm(&self, on: bool) {
        self.shared.arm(on);
    }

    /// Adds the sockets to those that the progress thread watches.
    pub(crate) fn watch(&self) -> Result<()> {
        self.shared.watch()
    }

    // ---- closing ----

    /// Closes the connection: queued data is sent first (for at most a second), then transfers in flight are canceled.
    pub fn close(&self) {
        self.insist_on_goodbye();
        self.finish_close(Instant::now() + CLOSING.min(self.shared.context.close_timeout));
    }

    /// Sends the goodbye without waiting for the peer. [`Connection::finish_close`] does the rest. `false` where a thread
    /// prepares the connection, or holds its lock until the deadline: nothing was sent.
    pub(crate) fn say_goodbye(&self, deadline: Instant) -> bool {
        Closing(&self.shared).say_goodbye(deadline)
    }

    /// Like [`Connection::say_goodbye`], but waits for a thread that holds the connection.
    pub(crate) fn insist_on_goodbye(&self) {
        Closing(&self.shared).insist_on_goodbye();
    }

    /// Ends the connection after its goodbye: once queued data is sent and the peer has closed its end, or at the deadline.
    pub(crate) fn finish_close(&self, deadline: Instant) {
        if Closing(&self.shared).finish(deadline) {
            self.table.connections.remove(self.shared.id);
            if let Some(lineage) = self.lineage() {
                self.shared.context.restoring.forget(&lineage.ticket.connection());
            }
        }
    }

    /// Fails the connection if a transfer on it still uses the region. `false`: not checked, because another thread prepares the
    /// connection or holds its lock. With `queue` it waits for the lock, and gives up only where a thread prepares the
    /// connection; a caller that merely tries can be starved.
    pub(crate) fn fail_if_using(&self, region: u64, queue: bool, error: Error) -> bool {
        Closing(&self.shared).fail_if_using(region, queue, error)
    }

    /// Drops the plugin's registrations of a deregistered region, and withdraws it from the peer on this host. Waits even for a
    /// thread that prepares the connection: other memory may be mapped there next, and must not be mistaken for the region.
    pub(crate) fn forget_region(&self, id: u64) {
        Closing(&self.shared).forget_region(id);
    }

    /// Ends the connection after a panic in this library left it in an unknown state.
    pub(crate) fn abandon(&self) {
        self.shared.abandon();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Driven for Connection {
    fn on_host_message(&self) {
        if let Some(one_host) = &self.shared.one_host {
            one_host.news.store(true, Ordering::Release);
        }
    }

    fn drive_for_application(&self) -> bool {
        Waiter(&self.shared).drive_for_notifications()
    }
}

#[cfg(test)]
mod tests;
