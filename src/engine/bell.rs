//! How the progress thread sleeps and is woken: the set of descriptors that it watches, and its bell. Knows nothing of connections
//! but their descriptors and ids.

use super::limits;
use crate::channel::local;
use crate::net::comm::Doorbell;
use crate::status::Result;
use parking_lot::Mutex;
use reactor::{Events, Interest, Poller, Waker};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Token of the bell itself; connections use their ids, from 1.
pub(crate) const WAKE: u64 = 0;
/// Marks the token of a connection's socket to a process of this host.
pub(crate) const LOCAL: u64 = 1 << 63;
/// Events of one wait.
const EVENTS: usize = 64;

pub(crate) struct Bell {
    poller: Poller,
    waker: Waker,
    /// A duplicate of the waker's descriptor, which lives as long as somebody has it.
    rings: Arc<OwnedFd>,
    armed: AtomicU32,
    /// Room for the events of the one thread that waits.
    events: Mutex<Events>,
    /// The same for others, who only look.
    ready_events: Mutex<Events>,
}

impl Bell {
    pub(crate) fn new() -> Result<Bell> {
        let (poller, waker) = Poller::new()
            .and_then(|poller| Waker::new().map(|waker| (poller, waker)))
            .map_err(|e| limits::system("epoll and eventfd", &e))?;
        poller.add(waker.fd(), WAKE, Interest::READ).map_err(|e| limits::system("epoll", &e))?;
        // SAFETY: the waker is alive.
        let rings =
            unsafe { BorrowedFd::borrow_raw(waker.fd()) }.try_clone_to_owned().map_err(|e| limits::system("eventfd", &e))?;
        Ok(Bell {
            poller,
            waker,
            rings: Arc::new(rings),
            armed: AtomicU32::new(0),
            events: Mutex::new(Events::with_capacity(EVENTS)),
            ready_events: Mutex::new(Events::with_capacity(EVENTS)),
        })
    }

    /// Watches a connection's socket from now on.
    pub(crate) fn watch(&self, fd: RawFd, id: u64) -> Result<()> {
        self.poller.add(fd, id, Interest::READ).map_err(|e| limits::system("epoll", &e))
    }

    /// Watches a connection's socket to a process of this host: each message is one event.
    pub(crate) fn watch_local(&self, fd: RawFd, id: u64) -> Result<()> {
        self.poller.add(fd, id | LOCAL, Interest::READ | Interest::EDGE).map_err(|e| limits::system("epoll", &e))
    }

    /// Changes what of a connection's socket wakes the progress thread.
    pub(crate) fn change(&self, fd: RawFd, id: u64, interest: Interest) {
        let _ = self.poller.modify(fd, id, interest);
    }

    /// Takes a connection's socket out; it may be out already.
    pub(crate) fn unwatch(&self, fd: RawFd) {
        let _ = self.poller.remove(fd);
    }

    /// Waits for events; gives the tokens that have some.
    pub(crate) fn wait(&self, timeout: Duration, tokens: &mut Vec<u64>) {
        let mut events = self.events.lock();
        tokens.clear();
        if self.poller.wait(&mut events, Some(timeout)).is_err() {
            // The kernel refuses to wait: sleep instead of spinning.
            std::thread::sleep(Duration::from_millis(1));
            return;
        }
        tokens.extend(events.iter().map(|e| e.token()));
        if tokens.contains(&WAKE) {
            self.waker.drain();
        }
    }

    /// The tokens that have events now, for a thread other than the one that waits. A ring stays for that one.
    pub(crate) fn ready(&self, tokens: &mut Vec<u64>) {
        let mut events = self.ready_events.lock();
        tokens.clear();
        if self.poller.wait(&mut events, Some(Duration::ZERO)).is_ok() {
            tokens.extend(events.iter().map(|e| e.token()));
        }
    }

    /// A doorbell for the comms of one connection: rings only while the progress thread sleeps and answers for that connection.
    pub(crate) fn doorbell(&self) -> Doorbell {
        Doorbell { armed: Arc::new(AtomicU32::new(0)), fd: self.waker.fd() }
    }

    /// The same for threads that may ring after the connection, or the engine, has ended.
    pub(crate) fn local_bell(&self, doorbell: &Doorbell) -> local::Bell {
        local::Bell { armed: doorbell.armed.clone(), fd: self.rings.clone() }
    }

    pub(crate) fn arm(&self, sleeping: bool) {
        self.armed.store(u32::from(sleeping), Ordering::SeqCst);
    }

    /// Wakes the progress thread if it sleeps.
    pub(crate) fn ring(&self) {
        if self.armed.swap(0, Ordering::SeqCst) == 1 {
            self.waker.wake();
        }
    }
}
