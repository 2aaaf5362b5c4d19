//! Received notifications: a queue per engine, drained per engine or over the whole process in order of arrival. Knows nothing of
//! sockets.

use crate::budget::{part_of_address, Account};
use crate::status::{bail, Result};
use process::{Mutex, PerProcess};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

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
    /// Most bytes that may wait: of all, of one address, and of one connection. If the application drains nothing, the connection
    /// that exceeds its limit fails with an error; no notification is dropped.
    most: usize,
    of_address: usize,
    of_one: usize,
}

static ARRIVALS: AtomicU64 = AtomicU64::new(0);
static QUEUES: PerProcess<Mutex<Vec<Weak<Queue>>>> = PerProcess::new(Mutex::default);

impl Queue {
    pub(crate) fn new(most: usize, of_one: usize) -> Arc<Queue> {
        let queue = Arc::new(Queue { waiting: Mutex::default(), most, of_address: part_of_address(most).max(of_one), of_one });
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
        Ok(())
    }

    pub(crate) fn pop(&self) -> Option<Notification> {
        let mut waiting = self.waiting.lock();
        let item = waiting.items.pop_front()?;
        waiting.bytes -= item.cost();
        item.of_one.fetch_sub(item.cost(), Ordering::Relaxed);
        item.account.notifications.fetch_sub(item.cost(), Ordering::Relaxed);
        Some(item.notification)
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

    fn inbox(queue: &Arc<Queue>, pool: &Arc<Pool>, address: u8) -> Inbox {
        Inbox::new(queue, &pool.account([10, 0, 0, address].into()))
    }

    #[test]
    fn one_connection_fills_its_own_share_only_and_empty_ones_count() {
        let queue = Queue::new(8 << 20, 2 << 20);
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
        let queue = Queue::new(1 << 20, 1 << 18);
        let pool = Pool::endless();
        let all: Vec<Inbox> = (0..100).map(|n| inbox(&queue, &pool, n)).collect();
        let taken = (0..100).flat_map(|_| &all).filter(|inbox| inbox.push(b"", &[0; 1000]).is_ok()).count();
        assert_eq!(taken, (1 << 20) / (1000 + OVERHEAD));
        queue.pop().unwrap();
        assert!(all[99].push(b"", &[0; 1000]).is_ok() && all[0].push(b"", &[0; 1000]).is_err());
    }
    #[test]
    fn an_address_leaves_a_quarter_to_others() {
        let (queue, pool) = (Queue::new(1 << 20, 1 << 18), Pool::endless());
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
}
