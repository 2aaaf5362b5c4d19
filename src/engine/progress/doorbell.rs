//! How the progress thread sleeps and is woken: the descriptors that it watches, its own doorbell, and descriptors that the
//! channels of a few connections share, so that a ring points to few. Knows nothing about connections but their descriptors and
//! ids.

use crate::engine::limits;
use crate::host;
use crate::net::comm::Doorbell;
use crate::status::Result;
use nccl_net_abi::UCCL_DOORBELL_FAILED;
use process::Mutex;
use reactor::{Events, Interest, Poller, Waker};
use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{fence, AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Token of the progress thread's own doorbell; connections use their ids, from 1.
pub(crate) const WAKE: u64 = 0;
/// Marks the token of a connection's socket to a peer on this host.
pub(crate) const LOCAL: u64 = 1 << 62;
/// Token of the host's network interfaces.
const LINKS: u64 = 1 << 61;
/// Events taken by one wait.
const EVENTS: usize = 64;
/// Connections that share a descriptor for their channels' doorbells.
const SLOTS: usize = 16;
/// Marks the tokens of these descriptors.
const GROUP: u64 = 1 << 63;

/// Descriptors that channels ring, and how many connections use each. They stay open for later connections.
#[derive(Default)]
struct Groups {
    wakers: Vec<Waker>,
    /// Duplicates of the descriptors, which live as long as any thread holds them.
    rings: Vec<Arc<OwnedFd>>,
    served: Vec<usize>,
    /// Groups with a free slot.
    free: BTreeSet<usize>,
}

/// A connection's place in a group whose channels share a descriptor; freed when dropped.
pub(crate) struct DoorbellSlot {
    armed: Arc<AtomicU32>,
    /// A channel has failed since the last [`DoorbellSlot::take_failure`].
    failed: AtomicBool,
    pub group: usize,
    fd: RawFd,
    rings: Arc<OwnedFd>,
    groups: Arc<Mutex<Groups>>,
}

impl DoorbellSlot {
    /// The doorbell for threads that may ring after the connection, or the engine, has ended.
    pub(crate) fn local_bell(&self) -> host::Bell {
        host::Bell { armed: self.armed.clone(), fd: self.rings.clone() }
    }

    /// The doorbell for comms: rings only while the progress thread sleeps and is responsible for the connection.
    pub(crate) fn doorbell(&self) -> Doorbell {
        Doorbell { armed: self.armed.clone(), fd: self.fd }
    }

    /// Arms the doorbell for one ring, or disarms it. What the caller reads afterwards is at least as new as the arming.
    pub(crate) fn arm(&self, on: bool) {
        if self.armed.swap(u32::from(on), Ordering::SeqCst) & UCCL_DOORBELL_FAILED != 0 {
            self.failed.store(true, Ordering::SeqCst);
        }
        // A ringing thread publishes its result, passes a fence, and checks whether the doorbell is armed. With this fence one of
        // the two always sees the other's store.
        fence(Ordering::SeqCst);
    }

    /// Whether the channels may have rung: the doorbell is disarmed.
    pub(crate) fn rang(&self) -> bool {
        self.armed.load(Ordering::SeqCst) != 1
    }

    /// Whether a channel had failed when the doorbell was last armed or disarmed; said once.
    pub(crate) fn take_failure(&self) -> bool {
        self.failed.swap(false, Ordering::SeqCst)
    }
}

impl Drop for DoorbellSlot {
    fn drop(&mut self) {
        let mut groups = self.groups.lock();
        if let Some(served) = groups.served.get_mut(self.group) {
            *served = served.saturating_sub(1);
            groups.free.insert(self.group);
        }
    }
}

/// What a token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// The bell itself.
    Bell,
    /// A group of which some channel has rung.
    Group(usize),
    /// A connection whose control socket has an event.
    Connection(u64),
    /// A connection whose socket to a peer on this host has an event.
    Local(u64),
    /// A network interface of the host has changed.
    Links,
}

/// Decodes a token.
pub(crate) fn named(token: u64) -> Named {
    match token {
        WAKE => Named::Bell,
        LINKS => Named::Links,
        token if token & GROUP != 0 => Named::Group((token & !GROUP) as usize),
        token if token & LOCAL != 0 => Named::Local(token & !LOCAL),
        id => Named::Connection(id),
    }
}

pub(crate) struct Bell {
    poller: Poller,
    waker: Waker,
    armed: AtomicU32,
    groups: Arc<Mutex<Groups>>,
    /// The event buffer of the thread that waits.
    events: Mutex<Events>,
    /// The event buffer of threads that only check.
    ready_events: Mutex<Events>,
}

impl Bell {
    pub(crate) fn new() -> Result<Bell> {
        let (poller, waker) = Poller::new()
            .and_then(|poller| Waker::new().map(|waker| (poller, waker)))
            .map_err(|e| limits::system("epoll and eventfd", &e))?;
        poller.add(waker.fd(), WAKE, Interest::READ).map_err(|e| limits::system("epoll", &e))?;
        Ok(Bell {
            poller,
            waker,
            armed: AtomicU32::new(0),
            groups: Arc::default(),
            events: Mutex::new(Events::with_capacity(EVENTS)),
            ready_events: Mutex::new(Events::with_capacity(EVENTS)),
        })
    }

    /// Adds a connection's socket.
    pub(crate) fn watch(&self, fd: RawFd, id: u64) -> Result<()> {
        self.poller.add(fd, id, Interest::READ).map_err(|e| limits::system("epoll", &e))
    }

    /// Adds a connection's socket to a peer on this host: each message is one event.
    pub(crate) fn watch_local(&self, fd: RawFd, id: u64) -> Result<()> {
        self.poller.add(fd, id | LOCAL, Interest::READ | Interest::EDGE).map_err(|e| limits::system("epoll", &e))
    }

    /// Adds a descriptor that becomes readable when a network interface of the host changes.
    pub(crate) fn watch_links(&self, fd: RawFd) -> std::io::Result<()> {
        self.poller.add(fd, LINKS, Interest::READ)
    }

    /// Changes which events of a connection's socket wake the progress thread.
    pub(crate) fn change(&self, fd: RawFd, id: u64, interest: Interest) {
        let _ = self.poller.modify(fd, id, interest);
    }

    /// Removes a connection's socket, if it is still watched.
    pub(crate) fn unwatch(&self, fd: RawFd) {
        let _ = self.poller.remove(fd);
    }

    /// Waits for events; returns the tokens that have some.
    pub(crate) fn wait(&self, timeout: Duration, tokens: &mut Vec<u64>) {
        let mut events = self.events.lock();
        tokens.clear();
        if self.poller.wait(&mut events, Some(timeout)).is_err() {
            // The kernel refused to wait: sleep instead of spinning.
            std::thread::sleep(Duration::from_millis(1));
            return;
        }
        tokens.extend(events.iter().map(|e| e.token()));
        for &token in tokens.iter() {
            match named(token) {
                Named::Bell => self.waker.drain(),
                Named::Group(group) => self.groups.lock().wakers.get(group).map_or((), Waker::drain),
                Named::Connection(_) | Named::Local(_) | Named::Links => {}
            }
        }
    }

    /// The tokens that have events now, for a thread other than the waiting one. Rings are left to that one.
    pub(crate) fn ready(&self, tokens: &mut Vec<u64>) {
        let mut events = self.ready_events.lock();
        tokens.clear();
        if self.poller.wait(&mut events, Some(Duration::ZERO)).is_ok() {
            tokens.extend(events.iter().map(|e| e.token()));
        }
    }

    /// A slot for a new connection.
    ///
    /// # Errors
    /// `Resource`.
    pub(crate) fn slot(&self) -> Result<Arc<DoorbellSlot>> {
        let mut groups = self.groups.lock();
        let group = match groups.free.first() {
            Some(&group) => group,
            None => {
                let (waker, group) = (Waker::new().map_err(|e| limits::system("eventfd", &e))?, groups.wakers.len());
                self.poller.add(waker.fd(), GROUP | group as u64, Interest::READ).map_err(|e| limits::system("epoll", &e))?;
                // SAFETY: the waker is alive.
                let ring = unsafe { BorrowedFd::borrow_raw(waker.fd()) }.try_clone_to_owned();
                groups.rings.push(Arc::new(ring.map_err(|e| limits::system("eventfd", &e))?));
                groups.wakers.push(waker);
                groups.served.push(0);
                groups.free.insert(group);
                group
            }
        };
        groups.served[group] += 1;
        if groups.served[group] == SLOTS {
            groups.free.remove(&group);
        }
        let (fd, rings) = (groups.wakers[group].fd(), groups.rings[group].clone());
        let (armed, failed, groups) = (Arc::default(), AtomicBool::new(false), self.groups.clone());
        Ok(Arc::new(DoorbellSlot { armed, failed, group, fd, rings, groups }))
    }

    pub(crate) fn arm(&self, sleeping: bool) {
        self.armed.store(u32::from(sleeping), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Wakes the progress thread if it sleeps.
    pub(crate) fn ring(&self) {
        if self.armed.swap(0, Ordering::SeqCst) == 1 {
            self.waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(slot: &DoorbellSlot) {
        // SAFETY: an eventfd that the bell keeps open.
        unsafe { libc::write(slot.doorbell().fd, 1u64.to_ne_bytes().as_ptr().cast(), 8) };
    }

    #[test]
    fn a_ring_points_to_a_few_connections_however_many_there_are() {
        let bell = Bell::new().unwrap();
        let slots: Vec<Arc<DoorbellSlot>> = (0..1000).map(|_| bell.slot().unwrap()).collect();
        let mut tokens = Vec::new();
        for rung in [0, 500, 999] {
            ring(&slots[rung]);
            bell.wait(Duration::from_secs(10), &mut tokens);
            let named: Vec<Named> = tokens.iter().map(|&token| named(token)).collect();
            assert_eq!(named, [Named::Group(slots[rung].group)]);
            let few = slots.iter().filter(|s| s.group == slots[rung].group).count();
            assert!(few <= SLOTS, "{few} connections are checked");
            bell.wait(Duration::ZERO, &mut tokens);
            assert_eq!(tokens, [], "a ring is reported once");
        }
        bell.arm(true);
        bell.ring();
        bell.wait(Duration::from_secs(10), &mut tokens);
        assert_eq!(tokens, [WAKE]);
    }

    #[test]
    fn slots_are_reused() {
        let bell = Bell::new().unwrap();
        for _ in 0..100 {
            let slots: Vec<Arc<DoorbellSlot>> = (0..3 * SLOTS).map(|_| bell.slot().unwrap()).collect();
            assert_eq!(slots.iter().map(|s| s.group).max(), Some(2));
        }
        assert_eq!(bell.groups.lock().wakers.len(), 3);
    }
}
