//! A few threads of the process that copy slices of large pulls; all connections share them, slice by slice in turns. They end with the
//! last connection that uses them. Knows nothing of what a slice is.

use crate::status::{Error, ErrorKind, Result};
use process::{generation, Condvar, Mutex, PerProcess};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

/// Threads at most: pieces of a page each take so many to fill the memory's bandwidth.
const MOST: usize = 16;
/// Slices that are worth another thread.
const SLICES_PER_THREAD: usize = 4;

/// Wakes whoever sleeps for a connection. It owns what it writes to: a thread may ring after the connection has ended.
#[derive(Clone)]
pub(crate) struct Bell {
    /// 1 while somebody sleeps.
    pub armed: Arc<AtomicU32>,
    /// An eventfd.
    pub fd: Arc<OwnedFd>,
}

impl Bell {
    fn ring(&self) {
        if self.armed.load(Ordering::SeqCst) == 1 && self.armed.swap(0, Ordering::SeqCst) == 1 {
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight bytes to our eventfd. A full counter means it is readable, which is all that is wanted.
            unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }
}

/// Something that is done in slices, in any order.
pub(crate) trait Work: Send + Sync {
    /// How many.
    fn len(&self) -> usize;
    /// Does one.
    fn run(&self, index: usize) -> Result<()>;
}

/// Work under way.
pub(crate) struct Job {
    work: Box<dyn Work>,
    /// The next slice that nobody has.
    next: AtomicUsize,
    /// Slices that are not done.
    left: AtomicUsize,
    running: AtomicUsize,
    cancelled: AtomicBool,
    error: Mutex<Option<Error>>,
    waiting: Mutex<()>,
    rests: Condvar,
    bell: Option<Bell>,
}

impl Job {
    /// `bell`: rung when it ends.
    pub(crate) fn new(work: Box<dyn Work>, bell: Option<Bell>) -> Arc<Job> {
        let left = AtomicUsize::new(work.len());
        Arc::new(Job {
            work,
            next: AtomicUsize::new(0),
            left,
            running: AtomicUsize::new(0),
            cancelled: AtomicBool::new(false),
            error: Mutex::new(None),
            waiting: Mutex::new(()),
            rests: Condvar::new(),
            bell,
        })
    }

    /// Does a slice, if one is left that nobody has. Whether it did.
    pub(crate) fn help(&self) -> bool {
        self.running.fetch_add(1, Ordering::SeqCst);
        let index = match self.cancelled.load(Ordering::SeqCst) {
            true => usize::MAX,
            false => self.next.fetch_add(1, Ordering::SeqCst),
        };
        let mine = index < self.work.len();
        let mut last = false;
        if mine {
            if let Err(e) = self.work.run(index) {
                self.error.lock().get_or_insert(e);
                self.cancelled.store(true, Ordering::SeqCst);
                last = true;
            }
            last |= self.left.fetch_sub(1, Ordering::SeqCst) == 1;
        }
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 && self.cancelled.load(Ordering::SeqCst) {
            drop(self.waiting.lock());
            self.rests.notify_all();
            last = true;
        }
        if let (true, Some(bell)) = (last, &self.bell) {
            bell.ring();
        }
        mine
    }

    /// The part of `bytes` that those slices have that are done, if all are alike.
    pub(crate) fn done(&self, bytes: u64) -> u64 {
        let all = self.work.len();
        let done = all.saturating_sub(self.left.load(Ordering::Relaxed));
        (u128::from(bytes) * done as u128 / all.max(1) as u128) as u64
    }

    /// Slices that nobody has.
    fn unclaimed(&self) -> usize {
        self.work.len().saturating_sub(self.next.load(Ordering::Relaxed))
    }

    /// Whether all of it is done.
    ///
    /// # Errors
    /// Of the first slice that failed, once nobody is at any slice.
    pub(crate) fn ended(&self) -> Result<bool> {
        if self.left.load(Ordering::SeqCst) == 0 && !self.cancelled.load(Ordering::SeqCst) {
            return Ok(true);
        }
        if self.cancelled.load(Ordering::SeqCst) && self.running.load(Ordering::SeqCst) == 0 {
            let unknown = || Error::new(ErrorKind::Canceled, "a pull was cancelled");
            return Err(self.error.lock().clone().unwrap_or_else(unknown));
        }
        Ok(false)
    }

    /// Begins no more slices.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Waits until nobody is at any slice, after [`Job::cancel`]; `false` when somebody still is at the deadline.
    pub(crate) fn wait(&self, deadline: Instant) -> bool {
        let mut held = self.waiting.lock();
        while self.running.load(Ordering::SeqCst) > 0 {
            if self.rests.wait_until(&mut held, deadline).timed_out() {
                return self.running.load(Ordering::SeqCst) == 0;
            }
        }
        true
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    /// Threads that wait for work.
    idle: usize,
    ended: bool,
}

#[derive(Default)]
struct Inner {
    queue: Mutex<Queue>,
    comes: Condvar,
}

/// The threads.
pub(crate) struct Pool {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    most: usize,
    generation: u64,
}

impl Pool {
    /// The process's pool.
    ///
    /// # Errors
    /// None at present.
    pub(crate) fn of_process() -> Result<Arc<Pool>> {
        static POOL: PerProcess<Mutex<Weak<Pool>>> = PerProcess::new(Mutex::default);
        let mut pool = POOL.get().lock();
        if let Some(pool) = pool.upgrade() {
            return Ok(pool);
        }
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let fresh = Arc::new(Pool {
            inner: Arc::default(),
            threads: Mutex::default(),
            // Whoever waits for the end works, too.
            most: (cores * 3 / 4).clamp(1, MOST),
            generation: generation(),
        });
        *pool = Arc::downgrade(&fresh);
        Ok(fresh)
    }

    /// Has the threads work at a job. Without threads whoever waits for its end does it all.
    pub(crate) fn start(&self, job: &Arc<Job>) {
        let mut queue = self.inner.queue.lock();
        queue.jobs.push_back(job.clone());
        let wanted = job.work.len().div_ceil(SLICES_PER_THREAD).min(self.most);
        let idle = queue.idle;
        drop(queue);
        // Each that wakes wakes the next.
        if idle > 0 {
            self.inner.comes.notify_one();
        }
        if idle < wanted {
            self.more(wanted);
        }
    }

    /// One thread more, up to as many as are wanted.
    fn more(&self, wanted: usize) {
        let mut threads = self.threads.lock();
        if threads.len() >= wanted {
            return;
        }
        let inner = self.inner.clone();
        match process::thread::spawn("uccl-pull", move || work(&inner)) {
            Ok(thread) => threads.push(thread),
            Err(e) => log::debug!("no thread for pulls: {e}"),
        }
    }
}

fn work(inner: &Inner) {
    let mut queue = inner.queue.lock();
    loop {
        let Some(job) = queue.jobs.pop_front() else {
            if queue.ended {
                return;
            }
            queue.idle += 1;
            inner.comes.wait(&mut queue);
            queue.idle -= 1;
            continue;
        };
        // Others may work at it, too; those that wait have their turn after each slice.
        queue.jobs.push_back(job.clone());
        if queue.idle > 0 && job.unclaimed() > SLICES_PER_THREAD {
            inner.comes.notify_one();
        }
        drop(queue);
        job.help();
        queue = inner.queue.lock();
        if job.next.load(Ordering::SeqCst) >= job.work.len() || job.cancelled.load(Ordering::SeqCst) {
            queue.jobs.retain(|other| !Arc::ptr_eq(other, &job));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.generation != generation() {
            // The parent's threads.
            std::mem::forget(std::mem::take(&mut *self.threads.get_mut()));
            return;
        }
        self.inner.queue.lock().ended = true;
        self.inner.comes.notify_all();
        let own = std::thread::current().id();
        for thread in self.threads.get_mut().drain(..).filter(|thread| thread.thread().id() != own) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::err;
    use std::time::Duration;

    struct Counting {
        done: Vec<AtomicUsize>,
        fails_at: Option<usize>,
    }

    impl Counting {
        fn job(n: usize, fails_at: Option<usize>) -> (Arc<Counting>, Arc<Job>) {
            let work = Arc::new(Counting { done: (0..n).map(|_| AtomicUsize::new(0)).collect(), fails_at });
            let job = Job::new(Box::new(work.clone()), None);
            (work, job)
        }
    }

    impl Work for Arc<Counting> {
        fn len(&self) -> usize {
            self.done.len()
        }
        fn run(&self, index: usize) -> Result<()> {
            self.done[index].fetch_add(1, Ordering::SeqCst);
            match self.fails_at == Some(index) {
                true => Err(err!(System, "slice {index}")),
                false => Ok(()),
            }
        }
    }

    fn finish(job: &Job) -> Result<()> {
        let start = Instant::now();
        while !job.ended()? {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
        Ok(())
    }

    #[test]
    fn every_slice_is_done_once_with_help_or_without() {
        let pool = Pool::of_process().unwrap();
        for round in 0..200 {
            let (work, job) = Counting::job(round % 40 + 1, None);
            pool.start(&job);
            while round % 2 == 0 && job.help() {}
            finish(&job).unwrap();
            assert!(work.done.iter().all(|n| n.load(Ordering::SeqCst) == 1));
        }
    }

    #[test]
    fn many_jobs_share_the_threads() {
        let pool = Pool::of_process().unwrap();
        let jobs: Vec<_> = (0..50).map(|n| Counting::job(n + 1, None)).collect();
        jobs.iter().for_each(|(_, job)| pool.start(job));
        for (work, job) in &jobs {
            finish(job).unwrap();
            assert!(work.done.iter().all(|n| n.load(Ordering::SeqCst) == 1));
        }
    }

    #[test]
    fn the_first_failure_ends_it() {
        let pool = Pool::of_process().unwrap();
        for _ in 0..50 {
            let (_, job) = Counting::job(1000, Some(3));
            pool.start(&job);
            assert_eq!(finish(&job).unwrap_err().to_str(), "slice 3");
        }
    }

    #[test]
    fn after_the_wait_nobody_is_at_it() {
        let pool = Pool::of_process().unwrap();
        for _ in 0..50 {
            let (work, job) = Counting::job(100_000, None);
            pool.start(&job);
            job.cancel();
            assert!(job.wait(Instant::now() + Duration::from_secs(60)));
            let count = || work.done.iter().map(|n| n.load(Ordering::SeqCst)).sum::<usize>();
            let before = count();
            std::thread::yield_now();
            assert_eq!(count(), before);
        }
    }
}
