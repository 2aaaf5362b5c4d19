//! Incoming connections that are up and wait for the application: a bounded queue that the dead leave, each in logarithmic time. Knows
//! nothing of sockets.

use crate::status::{bail, err, Result};
use process::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What can wait: something that may die while it does.
pub(crate) trait Waiting {
    /// Its number, which rises in the order of arrival.
    fn id(&self) -> u64;
    /// Whether an application could still use it.
    fn is_up(&self) -> bool;
    /// From now on its death is told by [`Dead::tell`], or no longer.
    fn waits(&self, on: bool);
}

/// Numbers of connections that died while they waited.
#[derive(Default)]
pub(crate) struct Dead(Mutex<Vec<u64>>);

impl Dead {
    /// One that waits has died.
    pub(crate) fn tell(&self, id: u64) {
        self.0.lock().push(id);
    }
}

struct Queue<T> {
    ready: BTreeMap<u64, Arc<T>>,
    stopped: bool,
}

/// The queue.
pub(crate) struct Accepts<T> {
    limit: usize,
    dead: Arc<Dead>,
    queue: Mutex<Queue<T>>,
    changed: Condvar,
}

impl<T: Waiting> Accepts<T> {
    /// A queue in which at most `limit` connections wait.
    pub(crate) fn new(limit: usize, dead: Arc<Dead>) -> Accepts<T> {
        Accepts { limit, dead, queue: Mutex::new(Queue { ready: BTreeMap::new(), stopped: false }), changed: Condvar::new() }
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
        connection.waits(true);
        if !connection.is_up() {
            // It died before anybody was told of it.
            return;
        }
        self.queue.lock().ready.insert(connection.id(), connection);
        self.changed.notify_one();
    }

    /// Takes the oldest connection that is up; blocks until there is one.
    ///
    /// # Errors
    /// `Canceled` after [`Accepts::stop`].
    pub(crate) fn take(&self) -> Result<Arc<T>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped {
                return Err(err!(Canceled, "accept was stopped"));
            }
            match queue.ready.pop_first() {
                Some((_, connection)) if connection.is_up() => {
                    connection.waits(false);
                    return Ok(connection);
                }
                Some((_, dead)) => {
                    // Closing takes its time, outside of the lock; and it is not put off until another one comes.
                    drop(queue);
                    drop(dead);
                    queue = self.queue.lock();
                }
                None => self.changed.wait(&mut queue),
            }
        }
    }

    /// Drops the connections that have died while they waited, and with them their descriptors. Whether any wait.
    pub(crate) fn sweep(&self) -> bool {
        let reported = std::mem::take(&mut *self.dead.0.lock());
        let mut queue = self.queue.lock();
        let dead: Vec<_> = reported.iter().filter_map(|id| queue.ready.remove(id)).collect();
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
        std::mem::take(&mut self.queue.lock().ready).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Default)]
    struct Simulated {
        id: u64,
        dead: AtomicBool,
        looked_at: AtomicUsize,
    }
    impl Waiting for Simulated {
        fn id(&self) -> u64 {
            self.id
        }
        fn is_up(&self) -> bool {
            self.looked_at.fetch_add(1, Ordering::SeqCst);
            !self.dead.load(Ordering::SeqCst)
        }
        fn waits(&self, _on: bool) {}
    }

    fn simulated(n: u64) -> Vec<Arc<Simulated>> {
        (0..n).map(|id| Arc::new(Simulated { id, ..Simulated::default() })).collect()
    }

    #[test]
    fn the_dead_leave_and_make_room() {
        let dead = Arc::<Dead>::default();
        let accepts = Accepts::new(3, dead.clone());
        let all = simulated(3);
        accepts.room(2).unwrap();
        assert_eq!(accepts.room(3).unwrap_err().kind(), ErrorKind::Resource);
        all.iter().for_each(|c| accepts.push(c.clone()));
        assert_eq!(accepts.room(0).unwrap_err().kind(), ErrorKind::Resource);
        all[0].dead.store(true, Ordering::SeqCst);
        dead.tell(0);
        accepts.room(0).unwrap();
        assert_eq!(Arc::strong_count(&all[0]), 1, "given up while it waited");
        all[1].dead.store(true, Ordering::SeqCst);
        assert!(Arc::ptr_eq(&accepts.take().unwrap(), &all[2]), "the dead are not handed out");
        assert!(!accepts.sweep());
    }

    #[test]
    fn the_living_are_not_looked_at_for_the_dead() {
        let dead = Arc::<Dead>::default();
        let accepts = Accepts::new(2000, dead.clone());
        let all = simulated(1000);
        all.iter().for_each(|c| accepts.push(c.clone()));
        let looked = || all.iter().map(|c| c.looked_at.load(Ordering::SeqCst)).sum::<usize>();
        let before = looked();
        all[7].dead.store(true, Ordering::SeqCst);
        dead.tell(7);
        assert!(accepts.sweep() && Arc::strong_count(&all[7]) == 1);
        (0..100).for_each(|_| assert!(accepts.sweep()));
        assert_eq!(looked(), before);
        // One that is dead already does not come to wait.
        all[8].dead.store(true, Ordering::SeqCst);
        let held = Arc::strong_count(&all[8]);
        accepts.push(all[8].clone());
        assert_eq!(Arc::strong_count(&all[8]), held);
    }

    #[test]
    fn whoever_waits_keeps_none_of_the_dead() {
        let accepts = Arc::new(Accepts::new(3, Arc::default()));
        let all = simulated(2);
        all.iter().for_each(|c| accepts.push(c.clone()));
        // They die before anybody looks for them.
        all.iter().for_each(|c| c.dead.store(true, Ordering::SeqCst));
        let other = accepts.clone();
        let waits = std::thread::spawn(move || other.take().map(|_| ()));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let kept = || all.iter().map(Arc::strong_count).max();
        while kept() > Some(1) && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let kept = kept();
        accepts.stop();
        assert_eq!(waits.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
        assert_eq!(kept, Some(1), "a descriptor, and a place among the connections, until somebody else comes");
    }

    #[test]
    fn stopping_wakes_whoever_waits() {
        let accepts = Arc::new(Accepts::<Simulated>::new(1, Arc::default()));
        let other = accepts.clone();
        let waits = std::thread::spawn(move || other.take().map(|_| ()));
        accepts.stop();
        assert_eq!(waits.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
    }
}
