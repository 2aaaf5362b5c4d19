//! A connection as the application holds it. What its threads share is `shared`, and what the lock among that guards is `core`. What is
//! asked of a connection (`submit`), how it is waited for (`poll`), driven (`drive`) and ended (`close`) borrow that. Knows nothing of how a
//! connection was set up.

mod close;
mod core;
mod drive;
mod poll;
mod shared;
mod submit;

pub(crate) use core::Core;
pub(crate) use drive::Driver;
pub(crate) use shared::Peer;

use crate::engine::fifo::FifoItem;
use crate::engine::list::List;
use crate::engine::progress::doorbell::DoorbellSlot;
use crate::engine::progress::table::{self, Driven};
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

/// Where connections live.
pub(crate) type ConnectionTable = table::ConnectionTable<Connection>;

/// How long a close takes at most.
pub(crate) const CLOSING: Duration = Duration::from_secs(1);

/// A connection to a peer engine. All methods may be called from any thread.
///
/// - Getters take no part in the protocol: [`Connection::peer_ip`] and those after it, [`Connection::stats`], [`Connection::status`].
/// - [`Connection::transfer`], [`Connection::transfer_list`], [`Connection::send`], [`Connection::recv`] and [`Connection::notify`] begin
///   something. An error leaves the connection as it was, unless [`Connection::status`] says that it is lost. Memory that a transfer names
///   belongs to the transfer from there on.
/// - [`Connection::poll`] or [`Connection::wait`], with the id, until the transfer is complete or has failed: then the memory is free again.
///   They drive the connection, but need not be called for it to move: the progress thread drives it meanwhile.
/// - [`Connection::close`], or dropping it, comes last: what has not ended by then has failed.
pub struct Connection {
    shared: Shared,
    table: Arc<ConnectionTable>,
    pulse: Pulse,
    channels: usize,
    local: bool,
    /// Set by uccl_engine_start_listener; nothing depends on it.
    pub listener_started: AtomicBool,
}

/// What says that this side is alive, whoever has the lock.
struct Pulse {
    voice: Arc<Voice>,
    heartbeat: Duration,
    /// For how long that goes on without the lock.
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
            channels: core.channels.count(),
            local: crate::net::topology::is_local(peer.ip),
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

    /// The peer's address.
    pub fn peer_ip(&self) -> IpAddr {
        self.shared.peer.ip
    }
    /// CUDA index of the peer's GPU as it counts, -1 without one.
    pub fn peer_gpu_index(&self) -> i32 {
        self.shared.peer.gpu_index
    }
    /// This side's name of the key that the peer has proved; none for a peer without a key, and for keys without names.
    pub fn peer_key(&self) -> Option<&str> {
        self.shared.peer.key.as_deref()
    }
    /// The peer runs on this host.
    pub fn is_local(&self) -> bool {
        self.local
    }
    /// Data channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// What the connection counts, and what the kernel knows of its channels. An ended one still tells its totals.
    ///
    /// # Errors
    /// In a child of fork.
    pub fn stats(&self) -> Result<ConnectionStats> {
        self.shared.core.check("connection")?;
        let core = self.shared.lock();
        let now = Instant::now();
        let mut channels = core.channels.stats(true, now);
        core.health.fill(&mut channels, now);
        Ok(ConnectionStats {
            id: self.shared.id,
            peer: self.shared.peer.name.clone(),
            error: core.machine.dead().map(|e| e.to_str().to_owned()),
            age: now.saturating_duration_since(core.born),
            silent: core.machine.silence(now).0,
            in_flight: core.machine.in_flight() as u64,
            backlog_bytes: core.backlog() as u64,
            totals: core.past.unwrap_or_else(|| core.totals(&channels)),
            channels,
        })
    }

    /// Whether the connection is up.
    ///
    /// # Errors
    /// Why it is not, once it is lost or closed.
    pub fn status(&self) -> Result<()> {
        self.shared.core.check("connection")?;
        self.shared.lock().machine.alive()
    }

    /// From now on it waits for the application's accept, or no longer.
    pub(crate) fn set_waits(&self, on: bool) {
        self.shared.waits.store(on, Ordering::SeqCst);
    }

    /// Whether it has not ended, without its lock: somebody may keep that for long.
    pub(crate) fn is_up(&self) -> bool {
        self.shared.core.is_here() && !self.shared.gone.load(Ordering::SeqCst)
    }

    /// What the channels ring with.
    pub(crate) fn slot(&self) -> &Arc<DoorbellSlot> {
        &self.shared.slot
    }

    /// Has what chunks of `place` need allocated, which may take as long as the application keeps the driver.
    pub(crate) fn ready(&self, place: Place) -> Result<()> {
        let _preparing = Preparing::new(&self.shared);
        let mut core = self.shared.lock();
        if core.closing {
            return Ok(());
        }
        core.channels.ready(place)
    }

    /// Has the peer hear of this side, where whoever should speak is kept. Whether something was said.
    pub(crate) fn keep(&self) -> bool {
        self.shared.core.is_here() && self.pulse.voice.keep(self.pulse.heartbeat * 3 / 2, self.pulse.limit)
    }

    /// Simulates a thread that the driver of a GPU keeps while it prepares the connection.
    #[doc(hidden)]
    pub fn simulate_kept_preparing(&self, time: Duration) {
        let _preparing = Preparing::new(&self.shared);
        let _core = self.shared.lock();
        std::thread::sleep(time);
    }

    /// How often the peer hears of this side.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.pulse.heartbeat
    }

    /// Tells a peer on this host of a region that it may want to reach soon.
    pub(crate) fn offer_region(&self, region: u64) {
        if self.shared.one_host.is_some() && self.shared.core.is_here() {
            // It attends to it afterwards.
            let _preparing = Preparing::new(&self.shared);
            let mut core = self.shared.lock();
            // Only now: who waits for the lock keeps no region from its end.
            match self.shared.context.registry.local(region) {
                Ok(region) if !core.closing => {
                    let region = region.to_share();
                    core.channels.direct().into_iter().for_each(|direct| direct.offer(region));
                }
                _ => {}
            }
        }
    }
    // ---- what an application asks for ----

    /// Starts a read or write of several segments as one transfer; gives its id.
    ///
    /// # Errors
    /// `InvalidArgument`, `NotFound` (region), `Resource`, or why the connection is lost. Nothing moves then.
    pub fn transfer<B: Borrow<FifoItem>>(
        &self,
        direction: Direction,
        items: impl ExactSizeIterator<Item = (LocalSegment, B)> + Clone,
    ) -> Result<u64> {
        Submission(&self.shared).transfer(direction, items)
    }

    /// As [`Connection::transfer`], of a list that is kept for several transfers.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn transfer_list(&self, direction: Direction, list: &List) -> Result<u64> {
        Submission(&self.shared).transfer_list(direction, list)
    }

    /// Starts a two-sided send of one message gathered from segments; gives its id.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn send(&self, items: impl ExactSizeIterator<Item = LocalSegment>) -> Result<u64> {
        Submission(&self.shared).send(items)
    }

    /// Starts a receive of one message of at most `local.len` bytes; gives its id.
    ///
    /// # Errors
    /// As [`Connection::transfer`].
    pub fn recv(&self, local: LocalSegment) -> Result<u64> {
        Submission(&self.shared).recv(local)
    }

    /// Queues a notification for the peer. Where a large backlog waits it waits too, until there is room or the connection has failed. One
    /// that has left is no error, though the connection is lost meanwhile: a caller that sends it again would send it twice.
    ///
    /// # Errors
    /// `InvalidArgument` above 64 MiB, `Resource` without memory for it, or why the connection is lost.
    pub fn notify(&self, name: &[u8], message: &[u8]) -> Result<()> {
        Submission(&self.shared).notify(name, message)
    }

    /// Asks for a transfer's state, after driving progress once.
    ///
    /// # Errors
    /// The error the transfer ended with, or `NotFound`.
    pub fn poll(&self, id: u64) -> Result<TransferState> {
        Waiter(&self.shared).poll(id)
    }

    /// Waits until a transfer has ended, at most `timeout`; `complete` tells whether it has.
    ///
    /// # Errors
    /// As [`Connection::poll`].
    pub fn wait(&self, id: u64, timeout: Option<Duration>) -> Result<TransferState> {
        Waiter(&self.shared).wait(id, timeout)
    }

    /// Has the log say why a transfer failed, unless it has done so.
    pub fn tell_failure(&self, id: u64) {
        Waiter(&self.shared).tell_failure(id);
    }

    // ---- who drives it ----

    /// As the progress thread drives it.
    pub(crate) fn driver(&self) -> Driver<'_> {
        Driver(&self.shared)
    }

    /// For how long an application thread has been driving it, if one does at present.
    pub(crate) fn driven_by_application(&self) -> Option<Duration> {
        self.shared.driven_by_application()
    }

    /// Lets the channels ring, or no longer.
    pub(crate) fn arm(&self, on: bool) {
        self.shared.arm(on);
    }

    /// Has the progress thread watch its sockets.
    pub(crate) fn watch(&self) -> Result<()> {
        self.shared.watch()
    }

    // ---- the end ----

    /// Closes the connection: what is queued for the peer leaves first (for a second at most), then transfers in flight are canceled.
    pub fn close(&self) {
        self.insist_on_goodbye();
        self.finish_close(Instant::now() + CLOSING.min(self.shared.context.close_timeout));
    }

    /// Tells the peer that no more comes, without waiting for it. [`Connection::finish_close`] does the rest. `false` where a
    /// thread keeps the connection, or holds its lock until the deadline: nothing was said.
    pub(crate) fn say_goodbye(&self, deadline: Instant) -> bool {
        Closing(&self.shared).say_goodbye(deadline)
    }

    /// The same, but waits for a thread that keeps the connection.
    pub(crate) fn insist_on_goodbye(&self) {
        Closing(&self.shared).insist_on_goodbye();
    }

    /// Ends the connection, which has said goodbye: once what is queued has left and the peer has hung up, or at the deadline.
    pub(crate) fn finish_close(&self, deadline: Instant) {
        if Closing(&self.shared).finish(deadline) {
            self.table.connections.remove(self.shared.id);
        }
    }

    /// Fails the connection if a transfer of it still uses the region. `false`: the connection was not asked, since a thread keeps it or holds
    /// its lock at this moment. `queue`: waits for the lock, and gives up only where a thread keeps the connection; a caller that merely
    /// tries can be overtaken for ever.
    pub(crate) fn fail_if_using(&self, region: u64, queue: bool, error: Error) -> bool {
        Closing(&self.shared).fail_if_using(region, queue, error)
    }

    /// Drops the plugin's registrations of a region that has ended, and what a process of this host was told of it. Waits even for a thread
    /// that keeps the connection: other memory may come to lie there next, and must not be taken for it.
    pub(crate) fn forget_region(&self, id: u64) {
        Closing(&self.shared).forget_region(id);
    }

    /// A defect of this library has left the connection in an unknown state.
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
        Waiter(&self.shared).look_in()
    }
}

#[cfg(test)]
mod tests;
