//! Received notifications: a queue per engine, drained per engine or over the whole process in order of arrival. Threads may wait for
//! the next one. Knows nothing of sockets.

use crate::budget::{part_of_address, Account};
use crate::events::Events;
use crate::status::{bail, err, Result};
use process::{Condvar, Mutex, PerProcess};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

/// A notification as the peer sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Name, any bytes.
    pub name: Vec<u8>,
    /// Message, any bytes.
    pub msg: Vec<u8>,
}

/// What a notification costs besides its bytes.
const OVERHEAD: usize = 128;

#[derive(Default)]
struct Waiting {
    items: VecDeque<Item>,
    bytes: usize,
    /// Threads that wait for the next one.
    waiters: usize,
    closed: bool,
}

impl Waiting {
    fn take(&mut self) -> Option<Notification> {
        let item = self.items.pop_front()?;
        self.bytes -= item.cost();
        item.of_one.fetch_sub(item.cost(), Ordering::Relaxed);
        item.account.notifications.fetch_sub(item.cost(), Ordering::Relaxed);
        Some(item.notification)
    }
}

struct Item {
    /// Its number in the process's order of arrival.
    number: u64,
    notification: Notification,
    /// The bytes that its connection and its address have waiting.
    of_one: Arc<AtomicUsize>,
    account: Arc<Account>,
}

impl Item {
    fn cost(&self) -> usize {
        cost(&self.notification)
    }
}

fn cost(notification: &Notification) -> usize {
    notification.name.len() + notification.msg.len() + OVERHEAD
}

/// Copies bytes of a peer, whose number the peer decides.
fn copy(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    if copy.try_reserve_exact(bytes.len()).is_err() {
        bail!(Resource, "no memory for a notification of {} bytes", bytes.len());
    }
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// The queue of an engine.
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    events: Arc<Events>,
    /// Most bytes that may wait: of all, of one address, and of one connection. If the application drains nothing, the connection
    /// that exceeds its limit fails with an error; no notification is dropped.
    most: usize,
    of_address: usize,
    of_one: usize,
}

static ARRIVALS: AtomicU64 = AtomicU64::new(0);
static QUEUES: PerProcess<Mutex<Vec<Weak<Queue>>>> = PerProcess::new(Mutex::default);

impl Queue {
    /// A queue that reports to `events` what comes.
    pub(crate) fn new(most: usize, of_one: usize, events: &Arc<Events>) -> Arc<Queue> {
        let of_address = part_of_address(most).max(of_one);
        let (waiting, changed, events) = (Mutex::default(), Condvar::new(), events.clone());
        let queue = Arc::new(Queue { waiting, changed, events, most, of_address, of_one });
        let mut all = QUEUES.get().lock();
        all.retain(|q| q.strong_count() > 0);
        all.push(Arc::downgrade(&queue));
        queue
    }

    /// Adds a notification.
    fn push(&self, notification: Notification, inbox: &Inbox) -> Result<()> {
        let cost = cost(&notification);
        let (of_one, account) = (&inbox.waiting, &inbox.account);
        let mut waiting = self.waiting.lock();
        // These numbers change only under the queue's lock.
        let fits = |used: &AtomicUsize, limit| used.load(Ordering::Relaxed) + cost <= limit;
        if !fits(of_one, self.of_one) || !fits(&account.notifications, self.of_address) || waiting.bytes + cost > self.most {
            bail!(Resource, "the application does not take its notifications: {} bytes of them wait", waiting.bytes);
        }
        waiting.bytes += cost;
        of_one.fetch_add(cost, Ordering::Relaxed);
        account.notifications.fetch_add(cost, Ordering::Relaxed);
        // The number is drawn under the queue's lock, so numbers rise within a queue.
        let number = ARRIVALS.fetch_add(1, Ordering::Relaxed);
        waiting.items.push_back(Item { number, notification, of_one: of_one.clone(), account: account.clone() });
        let waits = waiting.waiters > 0;
        drop(waiting);
        if waits {
            self.changed.notify_one();
        }
        self.events.happened();
        Ok(())
    }

    pub(crate) fn pop(&self) -> Option<Notification> {
        self.waiting.lock().take()
    }

    /// The oldest notification, waiting for it until the deadline, if there is one.
    ///
    /// # Errors
    /// `Canceled` after [`Queue::close`].
    pub(crate) fn pop_until(&self, deadline: Option<Instant>) -> Result<Option<Notification>> {
        let mut waiting = self.waiting.lock();
        waiting.waiters += 1;
        let found = loop {
            if let Some(notification) = waiting.take() {
                break Ok(Some(notification));
            }
            if waiting.closed {
                break Err(err!(Canceled, "the engine was destroyed"));
            }
            match deadline {
                None => self.changed.wait(&mut waiting),
                Some(deadline) if Instant::now() < deadline => drop(self.changed.wait_until(&mut waiting, deadline)),
                Some(_) => break Ok(None),
            }
        };
        waiting.waiters -= 1;
        found
    }

    /// Wakes the threads that wait; they fail.
    pub(crate) fn close(&self) {
        self.waiting.lock().closed = true;
        self.changed.notify_all();
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.lock().items.len()
    }

    fn oldest(&self) -> Option<u64> {
        self.waiting.lock().items.front().map(|item| item.number)
    }
}

/// A connection's access to the queue of its engine.
pub(crate) struct Inbox {
    queue: Arc<Queue>,
    waiting: Arc<AtomicUsize>,
    account: Arc<Account>,
}

impl Inbox {
    /// For a connection of the account's address.
    pub(crate) fn new(queue: &Arc<Queue>, account: &Arc<Account>) -> Inbox {
        Inbox { queue: queue.clone(), waiting: Arc::default(), account: account.clone() }
    }

    /// Adds a notification of this connection.
    ///
    /// # Errors
    /// `Resource` when too much waits, or there is no memory.
    pub(crate) fn push(&self, name: &[u8], message: &[u8]) -> Result<()> {
        self.queue.push(Notification { name: copy(name)?, msg: copy(message)? }, self)
    }
}

/// The oldest notification of any engine of the process.
pub fn next_notification_of_process() -> Option<Notification> {
    let queues: Vec<Arc<Queue>> = QUEUES.get().lock().iter().filter_map(Weak::upgrade).collect();
    // If another thread takes the oldest first, look again.
    loop {
        let (_, queue) = queues.iter().filter_map(|q| Some((q.oldest()?, q))).min_by_key(|(n, _)| *n)?;
        if let Some(notification) = queue.pop() {
            return Some(notification);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Pool;
    use crate::status::ErrorKind;

    fn queue(most: usize, of_one: usize) -> Arc<Queue> {
        Queue::new(most, of_one, &Arc::default())
    }

    fn inbox(queue: &Arc<Queue>, pool: &Arc<Pool>, address: u8) -> Inbox {
        Inbox::new(queue, &pool.account([10, 0, 0, address].into()))
    }

    #[test]
    fn one_connection_fills_its_own_share_only_and_empty_ones_count() {
        let queue = queue(8 << 20, 2 << 20);
        let pool = Pool::endless();
        let (greedy, other) = (inbox(&queue, &pool, 1), inbox(&queue, &pool, 1));
        let mut taken = 0usize;
        let error = loop {
            match greedy.push(b"", b"") {
                Ok(()) => taken += 1,
                Err(e) => break e,
            }
        };
        assert_eq!((error.kind(), taken), (ErrorKind::Resource, (2 << 20) / OVERHEAD));
        other.push(b"n", b"m").unwrap();
        for _ in 0..taken {
            assert_eq!(queue.pop().unwrap().name, b"");
        }
        assert_eq!(queue.pop(), Some(Notification { name: b"n".to_vec(), msg: b"m".to_vec() }));
        assert_eq!((queue.pop(), queue.len()), (None, 0));
        greedy.push(b"", b"").unwrap();
    }

    #[test]
    fn a_hundred_connections_together_stay_below_the_total() {
        let queue = queue(1 << 20, 1 << 18);
        let pool = Pool::endless();
        let all: Vec<Inbox> = (0..100).map(|n| inbox(&queue, &pool, n)).collect();
        let taken = (0..100).flat_map(|_| &all).filter(|inbox| inbox.push(b"", &[0; 1000]).is_ok()).count();
        assert_eq!(taken, (1 << 20) / (1000 + OVERHEAD));
        queue.pop().unwrap();
        assert!(all[99].push(b"", &[0; 1000]).is_ok() && all[0].push(b"", &[0; 1000]).is_err());
    }
    #[test]
    fn an_address_leaves_a_quarter_to_others() {
        let (queue, pool) = (queue(1 << 20, 1 << 18), Pool::endless());
        let greedy: Vec<Inbox> = (0..100).map(|_| inbox(&queue, &pool, 1)).collect();
        let fill = |greedy: &[Inbox]| (0..100).flat_map(|_| greedy).filter(|inbox| inbox.push(b"", &[0; 1000]).is_ok()).count();
        let most = (3 << 18) / (1000 + OVERHEAD);
        assert_eq!(fill(&greedy), most);
        inbox(&queue, &pool, 2).push(b"", &[0; 1000]).unwrap();
        // The notifications of closed connections stay in the queue and count for their address.
        drop(greedy);
        assert!(inbox(&queue, &pool, 1).push(b"", &[0; 1000]).is_err());
        while queue.pop().is_some() {}
        assert_eq!(fill(&[inbox(&queue, &pool, 1)]), 100);
    }

    #[test]
    fn a_thread_that_waits_is_woken_by_the_next_one_and_by_the_end() {
        let (queue, pool) = (queue(1 << 20, 1 << 18), Pool::endless());
        let past = Some(Instant::now());
        assert_eq!(queue.pop_until(past).unwrap(), None);
        let waiter = |queue: &Arc<Queue>| {
            let other = queue.clone();
            std::thread::spawn(move || other.pop_until(None))
        };
        let waiting = |queue: &Queue| {
            let until = Instant::now() + std::time::Duration::from_secs(10);
            while queue.waiting.lock().waiters == 0 && Instant::now() < until {
                std::thread::yield_now();
            }
        };
        let first = waiter(&queue);
        waiting(&queue);
        inbox(&queue, &pool, 1).push(b"n", b"m").unwrap();
        assert_eq!(first.join().unwrap().unwrap().unwrap().name, b"n");
        let second = waiter(&queue);
        waiting(&queue);
        inbox(&queue, &pool, 1).push(b"last", b"").unwrap();
        assert_eq!(second.join().unwrap().unwrap().unwrap().name, b"last");
        inbox(&queue, &pool, 1).push(b"kept", b"").unwrap();
        queue.close();
        assert_eq!(queue.pop_until(None).unwrap().unwrap().name, b"kept");
        assert_eq!(queue.pop_until(None).unwrap_err().kind(), ErrorKind::Canceled);
        let third = waiter(&queue);
        assert_eq!(third.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
        assert_eq!(queue.waiting.lock().waiters, 0);
    }
}
