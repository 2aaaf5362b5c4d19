//! Incoming connections that are up and wait for the application: a bounded queue that the dead leave. Knows nothing of sockets.

use crate::status::{bail, err, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;

/// What can wait: something that may die while it does.
pub(crate) trait Waiting {
    /// Whether an application could still use it.
    fn is_up(&self) -> bool;
}

struct Queue<T> {
    ready: VecDeque<Arc<T>>,
    stopped: bool,
}

/// The queue.
pub(crate) struct Accepts<T> {
    limit: usize,
    queue: Mutex<Queue<T>>,
    changed: Condvar,
}

impl<T: Waiting> Accepts<T> {
    /// A queue in which at most `limit` connections wait.
    pub(crate) fn new(limit: usize) -> Accepts<T> {
        Accepts { limit, queue: Mutex::new(Queue { ready: VecDeque::new(), stopped: false }), changed: Condvar::new() }
    }

    /// Whether one more connection may come to wait when `coming` others are on their way.
    ///
    /// # Errors
    /// `Resource` for the peer to read.
    pub(crate) fn room(&self, coming: usize) -> Result<()> {
        let full = |queue: &Queue<T>| queue.ready.len() + coming >= self.limit;
        if full(&self.queue.lock()) {
            self.sweep();
            if full(&self.queue.lock()) {
                bail!(Resource, "{} connections wait for the application's accept already", self.limit);
            }
        }
        Ok(())
    }

    /// Adds a connection.
    pub(crate) fn push(&self, connection: Arc<T>) {
        self.queue.lock().ready.push_back(connection);
        self.changed.notify_one();
    }

    /// Takes the oldest connection that is up; blocks until there is one.
    ///
    /// # Errors
    /// `Canceled` after [`Accepts::stop`].
    pub(crate) fn take(&self) -> Result<Arc<T>> {
        let mut dead = Vec::new();
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped {
                return Err(err!(Canceled, "accept was stopped"));
            }
            match queue.ready.pop_front() {
                Some(connection) if connection.is_up() => return Ok(connection),
                Some(connection) => dead.push(connection),
                None => self.changed.wait(&mut queue),
            }
        }
    }

    /// Drops the connections that have died while they waited, and with them their descriptors. Whether any wait.
    pub(crate) fn sweep(&self) -> bool {
        let mut queue = self.queue.lock();
        let all = std::mem::take(&mut queue.ready);
        let (up, dead): (Vec<_>, Vec<_>) = all.into_iter().partition(|c| c.is_up());
        queue.ready = up.into();
        let any = !queue.ready.is_empty();
        drop(queue);
        // Closing takes its time, outside of the lock.
        drop(dead);
        any
    }

    /// Wakes blocked takers; they and later ones get an error.
    pub(crate) fn stop(&self) {
        self.queue.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Takes all that wait.
    pub(crate) fn drain(&self) -> Vec<Arc<T>> {
        std::mem::take(&mut self.queue.lock().ready).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Simulated {
        dead: AtomicBool,
    }
    impl Waiting for Simulated {
        fn is_up(&self) -> bool {
            !self.dead.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn the_dead_leave_and_make_room() {
        let accepts = Accepts::new(3);
        let all: Vec<_> = (0..3).map(|_| Arc::new(Simulated::default())).collect();
        accepts.room(2).unwrap();
        assert_eq!(accepts.room(3).unwrap_err().kind(), ErrorKind::Resource);
        all.iter().for_each(|c| accepts.push(c.clone()));
        assert_eq!(accepts.room(0).unwrap_err().kind(), ErrorKind::Resource);
        all[0].dead.store(true, Ordering::SeqCst);
        accepts.room(0).unwrap();
        assert_eq!(Arc::strong_count(&all[0]), 1, "given up while it waited");
        all[1].dead.store(true, Ordering::SeqCst);
        assert!(Arc::ptr_eq(&accepts.take().unwrap(), &all[2]), "the dead are not handed out");
        assert!(!accepts.sweep());
    }

    #[test]
    fn stopping_wakes_whoever_waits() {
        let accepts = Arc::new(Accepts::<Simulated>::new(1));
        let other = accepts.clone();
        let waits = std::thread::spawn(move || other.take().map(|_| ()));
        accepts.stop();
        assert_eq!(waits.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
    }
}
