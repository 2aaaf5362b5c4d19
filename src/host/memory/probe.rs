//! Work that another process can delay for ever: it runs on a thread of its own, with a time limit, and few at once in a process. A thread
//! that is delayed beyond its limit is left behind. Knows nothing of what the work is.

use crate::status::{bail, err, Result};
use process::{Condvar, Mutex, PerProcess};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Threads of a process at most, those that stayed behind among them.
const MOST: usize = 16;
/// How long the first look waits: the work usually takes microseconds, and then the first poll returns its result.
const AT_FIRST: Duration = Duration::from_millis(1);
/// How long the work may take, the wait for a thread included.
const LIMIT: Duration = Duration::from_secs(1);

/// A thread's place among those of the process.
struct Turn(&'static AtomicUsize);

impl Turn {
    fn take() -> Option<Turn> {
        static TAKEN: PerProcess<AtomicUsize> = PerProcess::new(AtomicUsize::default);
        let taken = TAKEN.get();
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < MOST).then_some(n + 1)).ok().map(|_| Turn(taken))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What comes of the work, and who waits for it.
struct Slot<T> {
    result: Mutex<Option<T>>,
    comes: Condvar,
}

type Work<T> = Box<dyn FnOnce() -> T + Send>;

/// The work, and how far it is.
pub(crate) struct Probe<T> {
    what: &'static str,
    until: Instant,
    /// Until a thread has it.
    work: Option<Work<T>>,
    slot: Arc<Slot<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Probe<T> {
    /// `what`: for errors, as in "`what` took longer than". Begins with the first poll.
    pub(crate) fn new(what: &'static str, now: Instant, work: impl FnOnce() -> T + Send + 'static) -> Probe<T> {
        let slot = Arc::new(Slot { result: Mutex::new(None), comes: Condvar::default() });
        Probe { what, until: now + LIMIT, work: Some(Box::new(work)), slot, thread: None }
    }

    /// What came of it, once.
    ///
    /// # Errors
    /// `TimedOut` when it has not ended in time; `Resource` without a thread.
    pub(crate) fn poll(&mut self, now: Instant) -> Result<Option<T>> {
        if self.work.is_some() {
            self.begin()?;
        }
        if let Some(result) = self.slot.result.lock().take() {
            if let Some(thread) = self.thread.take() {
                // It has nothing more to do.
                let _ = thread.join();
            }
            return Ok(Some(result));
        }
        if now >= self.until {
            bail!(TimedOut, "{} took longer than {LIMIT:?}", self.what);
        }
        Ok(None)
    }

    fn begin(&mut self) -> Result<()> {
        let Some(turn) = Turn::take() else { return Ok(()) };
        let (Some(work), slot) = (self.work.take(), self.slot.clone()) else { return Ok(()) };
        let thread = process::thread::spawn("uccl-reach", move || {
            let result = work();
            // Its place is free before anybody knows.
            drop(turn);
            *slot.result.lock() = Some(result);
            slot.comes.notify_one();
        });
        self.thread = Some(thread.map_err(|e| err!(Resource, "no thread: {e}"))?);
        let mut result = self.slot.result.lock();
        let until = Instant::now() + AT_FIRST;
        while result.is_none() && !self.slot.comes.wait_until(&mut result, until).timed_out() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::sync::mpsc;

    fn finish<T: Send + 'static>(probe: &mut Probe<T>) -> T {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            // Its own limit is not what this is about.
            if let Some(result) = probe.poll(probe.until - LIMIT).unwrap() {
                return result;
            }
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
    }

    // One test: the places are the process's.
    #[test]
    fn kept_threads_stay_behind_and_are_few() {
        let now = Instant::now();
        assert_eq!(finish(&mut Probe::new("work", now, || 7)), 7);
        let blocked = || {
            let (release, kept) = mpsc::channel::<()>();
            (release, Probe::new("a look", now, move || kept.recv().is_err()))
        };
        let mut all: Vec<_> = (0..MOST).map(|_| blocked()).collect();
        let until = now + Duration::from_secs(60);
        for (_, probe) in &mut all {
            // Other tests of this process may have places for a moment.
            while probe.work.is_some() && Instant::now() < until {
                assert!(probe.poll(now).unwrap().is_none());
            }
            assert!(probe.work.is_none());
        }
        // No place: it waits for one, and no longer than for its own end.
        let mut late = Probe::new("another", now, || 8);
        assert!(late.poll(now).unwrap().is_none() && late.work.is_some());
        let error = late.poll(now + LIMIT).unwrap_err();
        assert_eq!((error.kind(), error.to_str()), (ErrorKind::TimedOut, "another took longer than 1s"));
        let (_, probe) = &mut all[0];
        assert!(probe.poll(now + LIMIT - Duration::from_millis(1)).unwrap().is_none());
        assert_eq!(probe.poll(now + LIMIT).unwrap_err().to_str(), "a look took longer than 1s");
        for (release, mut probe) in all {
            drop(release);
            assert!(finish(&mut probe));
        }
        assert_eq!(finish(&mut late), 8);
    }
}
