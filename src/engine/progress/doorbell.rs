//! How the progress thread sleeps and is woken: the set of descriptors that it watches, its own bell, and those that the channels of a few
//! connections share, so that a ring names few. Knows nothing of connections but their descriptors and ids.

use crate::engine::limits;
use crate::host;
use crate::net::comm::Doorbell;
use crate::status::Result;
use process::Mutex;
use reactor::{Events, Interest, Poller, Waker};
use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{fence, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Token of the bell itself; connections use their ids, from 1.
pub(crate) const WAKE: u64 = 0;
/// Marks the token of a connection's socket to a process of this host.
pub(crate) const LOCAL: u64 = 1 << 62;
/// Events of one wait.
const EVENTS: usize = 64;
/// Connections that share a descriptor for their channels' rings.
const SLOTS: usize = 16;
/// Marks the tokens of such descriptors.
const GROUP: u64 = 1 << 63;

/// Descriptors that channels ring, and how many connections each serves. They stay open for the next ones.
#[derive(Default)]
struct Groups {
    wakers: Vec<Waker>,
    /// Duplicates of their descriptors, which live as long as somebody has them.
    rings: Vec<Arc<OwnedFd>>,
    served: Vec<usize>,
    /// Groups with a free slot.
    free: BTreeSet<usize>,
}

/// A connection's place in a group of those whose channels share a descriptor; free again once it is dropped.
pub(crate) struct DoorbellSlot {
    armed: Arc<AtomicU32>,
    pub group: usize,
    fd: RawFd,
    rings: Arc<OwnedFd>,
    groups: Arc<Mutex<Groups>>,
}

impl DoorbellSlot {
    /// What threads ring that may do so after the connection, or the engine, has ended.
    pub(crate) fn local_bell(&self) -> host::Bell {
        host::Bell { armed: self.armed.clone(), fd: self.rings.clone() }
    }

    /// What comms ring: only while the progress thread sleeps and answers for the connection.
    pub(crate) fn doorbell(&self) -> Doorbell {
        Doorbell { armed: self.armed.clone(), fd: self.fd }
    }

    /// Lets the channels ring once, or no longer. What the caller looks at afterwards is not older than that.
    pub(crate) fn arm(&self, on: bool) {
        self.armed.store(u32::from(on), Ordering::SeqCst);
        // Whoever rings publishes, has a fence, and looks whether the bell is armed: one of the two sees the other on every processor.
        fence(Ordering::SeqCst);
    }

    /// Whether they may have rung: they were not armed, or have.
    pub(crate) fn rang(&self) -> bool {
        self.armed.load(Ordering::SeqCst) == 0
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

/// What a token names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// The bell itself.
    Bell,
    /// A group whose channels have rung.
    Group(usize),
    /// A connection, whose socket has something.
    Connection(u64),
    /// A connection, whose socket to a process of this host has something.
    Local(u64),
}

/// Reads a token.
pub(crate) fn named(token: u64) -> Named {
    match token {
        WAKE => Named::Bell,
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
        Ok(Bell {
            poller,
            waker,
            armed: AtomicU32::new(0),
            groups: Arc::default(),
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
        for &token in tokens.iter() {
            match named(token) {
                Named::Bell => self.waker.drain(),
                Named::Group(group) => self.groups.lock().wakers.get(group).map_or((), Waker::drain),
                Named::Connection(_) | Named::Local(_) => {}
            }
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

    /// A slot for one more connection.
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
        Ok(Arc::new(DoorbellSlot { armed: Arc::default(), group, fd, rings, groups: self.groups.clone() }))
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
    fn a_ring_names_a_few_connections_however_many_there_are() {
        let bell = Bell::new().unwrap();
        let slots: Vec<Arc<DoorbellSlot>> = (0..1000).map(|_| bell.slot().unwrap()).collect();
        let mut tokens = Vec::new();
        for rung in [0, 500, 999] {
            ring(&slots[rung]);
            bell.wait(Duration::from_secs(10), &mut tokens);
            let named: Vec<Named> = tokens.iter().map(|&token| named(token)).collect();
            assert_eq!(named, [Named::Group(slots[rung].group)]);
            let few = slots.iter().filter(|s| s.group == slots[rung].group).count();
            assert!(few <= SLOTS, "{few} connections are looked at");
            bell.wait(Duration::ZERO, &mut tokens);
            assert_eq!(tokens, [], "a ring is heard once");
        }
        bell.arm(true);
        bell.ring();
        bell.wait(Duration::from_secs(10), &mut tokens);
        assert_eq!(tokens, [WAKE]);
    }

    #[test]
    fn seats_are_given_out_again() {
        let bell = Bell::new().unwrap();
        for _ in 0..100 {
            let slots: Vec<Arc<DoorbellSlot>> = (0..3 * SLOTS).map(|_| bell.slot().unwrap()).collect();
            assert_eq!(slots.iter().map(|s| s.group).max(), Some(2));
        }
        assert_eq!(bell.groups.lock().wakers.len(), 3);
    }
}
