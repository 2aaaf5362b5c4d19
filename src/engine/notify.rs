//! Received notifications: a queue per engine, drained per engine or over the whole process in order of arrival.

use crate::fork::PerProcess;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// A notification as the peer sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Name, any bytes.
    pub name: Vec<u8>,
    /// Message, any bytes.
    pub msg: Vec<u8>,
}

/// Bytes that may wait in one engine's queue. An application that drains nothing loses the connection that goes beyond, with an
/// error, and not its notifications.
pub(crate) const MAX_WAITING_BYTES: usize = 1 << 30;

#[derive(Default)]
struct Waiting {
    items: VecDeque<(u64, Notification)>,
    bytes: usize,
}

/// The queue of an engine.
#[derive(Default)]
pub(crate) struct Queue(Mutex<Waiting>);

static ARRIVALS: AtomicU64 = AtomicU64::new(0);
static QUEUES: PerProcess<Mutex<Vec<Weak<Queue>>>> = PerProcess::new(Mutex::default);

impl Queue {
    pub(crate) fn new() -> Arc<Queue> {
        let queue = Arc::new(Queue::default());
        let mut all = QUEUES.get().lock();
        all.retain(|q| q.strong_count() > 0);
        all.push(Arc::downgrade(&queue));
        queue
    }

    /// Adds a notification; `false` when the queue is full.
    pub(crate) fn push(&self, notification: Notification) -> bool {
        let mut waiting = self.0.lock();
        let bytes = notification.name.len() + notification.msg.len();
        if waiting.bytes + bytes > MAX_WAITING_BYTES {
            return false;
        }
        waiting.bytes += bytes;
        // The number is drawn under the queue's lock, so the numbers of one queue rise.
        waiting.items.push_back((ARRIVALS.fetch_add(1, Ordering::Relaxed), notification));
        true
    }

    pub(crate) fn pop(&self) -> Option<Notification> {
        let mut waiting = self.0.lock();
        let (_, notification) = waiting.items.pop_front()?;
        waiting.bytes -= notification.name.len() + notification.msg.len();
        Some(notification)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().items.len()
    }

    fn oldest(&self) -> Option<u64> {
        self.0.lock().items.front().map(|(n, _)| *n)
    }
}

/// The oldest notification of any engine of the process.
pub fn next_notification_of_process() -> Option<Notification> {
    let queues: Vec<Arc<Queue>> = QUEUES.get().lock().iter().filter_map(Weak::upgrade).collect();
    // Another thread may take the oldest first; then look again.
    loop {
        let (_, queue) = queues.iter().filter_map(|q| Some((q.oldest()?, q))).min_by_key(|(n, _)| *n)?;
        if let Some(notification) = queue.pop() {
            return Some(notification);
        }
    }
}
