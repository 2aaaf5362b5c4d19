//! Incoming connections that are up and wait for the application's accept: a bounded queue. Connections that end while they wait
//! are removed in logarithmic time each. Knows nothing about sockets.

use crate::status::{bail, err, Result};
use process::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// An item of the queue, which may end while it waits.
pub(crate) trait Waiting {
    /// Its id, which rises in the order of arrival.
    fn id(&self) -> u64;
    /// Whether an application can still use it.
    fn is_up(&self) -> bool;
    /// Whether it is in the queue: if so, its end is reported to [`Dead::report`].
    fn waits(&self, on: bool);
}

/// Ids of connections that ended while they waited.
#[derive(Default)]
pub(crate) struct Dead(Mutex<Vec<u64>>);

impl Dead {
    /// Reports that a waiting connection has ended.
    pub(crate) fn report(&self, id: u64) {
        self.0.lock().push(id);
    }
}

struct Queue<T> {
    ready: BTreeMap<u64, Arc<T>>,
    stopped: bool,
}

/// Connections that wait for accept.
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

    /// Checks that one more connection may be queued, with `coming` others being set up.
    ///
    /// # Errors
    /// `Resource`, sent to the peer.
    pub(crate) fn room(&self, coming: usize) -> Result<()> {
        let full = |queue: &Queue<T>| queue.ready.len() + coming >= self.limit;
        if full(&self.queue.lock()) {
            self.sweep();
            if full(&self.queue.lock()) {
                bail!(Resource, "{} connections already wait for the application's accept", self.limit);
            }
        }
        Ok(())
    }

    /// Adds a connection.
    pub(crate) fn push(&self, connection: Arc<T>) {
        connection.waits(true);
        if !connection.is_up() {
            // It ended before its end could be reported.
            return;
        }
        self.queue.lock().ready.insert(connection.id(), connection);
        self.changed.notify_one();
    }

    /// Takes the oldest connection that is up. Blocks until there is one, or until the deadline, if there is one.
    ///
    /// # Errors
    /// `Canceled` after [`Accepts::stop`].
    pub(crate) fn take(&self, deadline: Option<Instant>) -> Result<Option<Arc<T>>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped {
                return Err(err!(Canceled, "accept was stopped"));
            }
            match queue.ready.pop_first() {
                Some((_, connection)) if connection.is_up() => {
                    connection.waits(false);
                    return Ok(Some(connection));
                }
                Some((_, dead)) => {
                    // Closing takes time: do it now, and outside the lock.
                    drop(queue);
                    drop(dead);
                    queue = self.queue.lock();
                }
                None => match deadline {
                    None => self.changed.wait(&mut queue),
                    Some(deadline) if Instant::now() < deadline => drop(self.changed.wait_until(&mut queue, deadline)),
                    Some(_) => return Ok(None),
                },
            }
        }
    }

    /// Drops connections that ended while they waited, which frees their descriptors. Returns whether others still wait.
    pub(crate) fn sweep(&self) -> bool {
        let reported = std::mem::take(&mut *self.dead.0.lock());
        let mut queue = self.queue.lock();
        let dead: Vec<_> = reported.iter().filter_map(|id| queue.ready.remove(id)).collect();
        let any = !queue.ready.is_empty();
        drop(queue);
        // Closing takes time: do it outside the lock.
        drop(dead);
        any
    }

    /// Wakes blocked calls of [`Accepts::take`]; they and later ones fail.
    pub(crate) fn stop(&self) {
        self.queue.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Takes all waiting connections.
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
    fn ended_connections_leave_and_make_room() {
        let dead = Arc::<Dead>::default();
        let accepts = Accepts::new(3, dead.clone());
        let all = simulated(3);
        accepts.room(2).unwrap();
        assert_eq!(accepts.room(3).unwrap_err().kind(), ErrorKind::Resource);
        all.iter().for_each(|c| accepts.push(c.clone()));
        assert_eq!(accepts.room(0).unwrap_err().kind(), ErrorKind::Resource);
        all[0].dead.store(true, Ordering::SeqCst);
        dead.report(0);
        accepts.room(0).unwrap();
        assert_eq!(Arc::strong_count(&all[0]), 1, "dropped while it waited");
        all[1].dead.store(true, Ordering::SeqCst);
        assert!(Arc::ptr_eq(&accepts.take(None).unwrap().unwrap(), &all[2]), "ended connections are not handed out");
        assert!(!accepts.sweep());
    }

    #[test]
    fn a_sweep_touches_only_ended_connections() {
        let dead = Arc::<Dead>::default();
        let accepts = Accepts::new(2000, dead.clone());
        let all = simulated(1000);
        all.iter().for_each(|c| accepts.push(c.clone()));
        let looked = || all.iter().map(|c| c.looked_at.load(Ordering::SeqCst)).sum::<usize>();
        let before = looked();
        all[7].dead.store(true, Ordering::SeqCst);
        dead.report(7);
        assert!(accepts.sweep() && Arc::strong_count(&all[7]) == 1);
        (0..100).for_each(|_| assert!(accepts.sweep()));
        assert_eq!(looked(), before);
        // A connection that has already ended is not queued.
        all[8].dead.store(true, Ordering::SeqCst);
        let held = Arc::strong_count(&all[8]);
        accepts.push(all[8].clone());
        assert_eq!(Arc::strong_count(&all[8]), held);
    }

    #[test]
    fn a_blocked_take_drops_ended_connections() {
        let accepts = Arc::new(Accepts::new(3, Arc::default()));
        let all = simulated(2);
        all.iter().for_each(|c| accepts.push(c.clone()));
        // They end without a report.
        all.iter().for_each(|c| c.dead.store(true, Ordering::SeqCst));
        let other = accepts.clone();
        let waits = std::thread::spawn(move || other.take(None).map(|_| ()));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let kept = || all.iter().map(Arc::strong_count).max();
        while kept() > Some(1) && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let kept = kept();
        accepts.stop();
        assert_eq!(waits.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
        assert_eq!(kept, Some(1), "it keeps a descriptor and a connection's place until the next connection arrives");
    }

    #[test]
    fn a_deadline_ends_a_take() {
        let accepts = Accepts::new(3, Arc::default());
        assert!(accepts.take(Some(Instant::now())).unwrap().is_none());
        let soon = Instant::now() + std::time::Duration::from_millis(20);
        assert!(accepts.take(Some(soon)).unwrap().is_none() && Instant::now() >= soon);
        let all = simulated(1);
        accepts.push(all[0].clone());
        assert!(accepts.take(Some(soon)).unwrap().is_some(), "what is there is handed out after the deadline too");
        accepts.stop();
        assert_eq!(accepts.take(Some(soon)).map(drop).unwrap_err().kind(), ErrorKind::Canceled);
    }

    #[test]
    fn stop_wakes_blocked_takes() {
        let accepts = Arc::new(Accepts::<Simulated>::new(1, Arc::default()));
        let other = accepts.clone();
        let waits = std::thread::spawn(move || other.take(None).map(|_| ()));
        accepts.stop();
        assert_eq!(waits.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
    }
}
