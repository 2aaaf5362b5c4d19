//! A few threads of the process that copy large pulls in slices. Each free thread takes a slice of the connection that has had the
//! least of the threads' time, and there of the transfer that has had the least: many or large pulls take nothing from others. A thread
//! that a peer's memory holds up is replaced. They end with the last connection that uses them. Knows nothing of what a slice is.

use crate::status::{Error, ErrorKind, Result};
use process::thread::Yields;
use process::{generation, Condvar, Mutex, MutexGuard, PerProcess};
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Threads at most: pieces of a page each take so many to fill the memory's bandwidth.
const MOST: usize = 16;
/// Threads at most, those that are held up among them.
const MOST_IN_ALL: usize = 64;
/// Idle threads that one thread wakes at most: it takes some microseconds for each.
const WAKES: usize = 2;
/// Slices that are worth another thread.
const SLICES_PER_THREAD: usize = 4;
/// Slices that a thread takes at once at most, where no other transfer waits. Threads that read neighbouring pages wait for each other in the
/// kernel, which has a lock for the page table of each 2 MiB.
const AT_ONCE: usize = 16;
/// Work after which a thread yields its core.
const TURN: Duration = Duration::from_micros(100);
/// A slice that takes longer than this holds its thread up. A usual one takes microseconds.
const HELD_UP: Duration = Duration::from_millis(20);
/// What a slice is taken to cost until it has ended, nanoseconds.
const EXPECTED: u64 = 20_000;

/// Wakes the thread that sleeps for a connection. It owns what it writes to: a thread may ring after the connection has ended.
#[derive(Clone)]
pub(crate) struct Bell {
    /// 1 while a thread sleeps.
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

/// Which connection and which of its transfers a job belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub connection: u64,
    pub transfer: u64,
}

impl Flow {
    /// A number for a connection, which no other one of the process has.
    pub(crate) fn connection() -> u64 {
        static LAST: AtomicU64 = AtomicU64::new(0);
        LAST.fetch_add(1, Ordering::Relaxed)
    }
}

/// Work under way.
pub(crate) struct Job {
    work: Box<dyn Work>,
    flow: Flow,
    /// The next slice that no thread has.
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
    pub(crate) fn new(work: Box<dyn Work>, flow: Flow, bell: Option<Bell>) -> Arc<Job> {
        let left = AtomicUsize::new(work.len());
        Arc::new(Job {
            work,
            flow,
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

    /// How many slices it has.
    pub(crate) fn len(&self) -> usize {
        self.work.len()
    }

    /// Does a slice, if one is left that no thread has. Whether it did.
    pub(crate) fn help(&self) -> bool {
        let slices = self.claim(1);
        slices.map(|slices| self.run(slices, || ())).is_some()
    }

    /// Takes the next slices, `most` of them, which [`Job::run`] must follow.
    fn claim(&self, most: usize) -> Option<Range<usize>> {
        self.running.fetch_add(1, Ordering::SeqCst);
        if !self.cancelled.load(Ordering::SeqCst) {
            let first = self.next.fetch_add(most, Ordering::SeqCst);
            if first < self.work.len() {
                return Some(first..(first + most).min(self.work.len()));
            }
        }
        self.leave(false);
        None
    }

    /// Does these slices, and calls `between` after each.
    fn run(&self, slices: Range<usize>, mut between: impl FnMut()) {
        let mut last = false;
        for index in slices {
            if self.cancelled.load(Ordering::SeqCst) {
                break;
            }
            if let Err(e) = self.work.run(index) {
                self.error.lock().get_or_insert(e);
                self.cancelled.store(true, Ordering::SeqCst);
                last = true;
            }
            last |= self.left.fetch_sub(1, Ordering::SeqCst) == 1;
            between();
        }
        self.leave(last);
    }

    /// This thread is no longer at it. `last`: it may have ended.
    fn leave(&self, mut last: bool) {
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 && self.cancelled.load(Ordering::SeqCst) {
            drop(self.waiting.lock());
            self.rests.notify_all();
            last = true;
        }
        if let (true, Some(bell)) = (last, &self.bell) {
            bell.ring();
        }
    }

    /// The part of `bytes` that those slices have that are done, if all are alike.
    pub(crate) fn done(&self, bytes: u64) -> u64 {
        let all = self.work.len();
        let done = all.saturating_sub(self.left.load(Ordering::Relaxed));
        (u128::from(bytes) * done as u128 / all.max(1) as u128) as u64
    }

    /// Slices that no thread has.
    fn unclaimed(&self) -> usize {
        self.work.len().saturating_sub(self.next.load(Ordering::Relaxed))
    }

    /// Whether all of it is done.
    ///
    /// # Errors
    /// Of the first slice that failed, once no thread is at any slice.
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

    /// Waits until no thread is at any slice, after [`Job::cancel`]; `false` when one still is at the deadline.
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

/// Things that have a share of the threads each.
struct Shares<K, T>(Vec<Share<K, T>>);

struct Share<K, T> {
    key: K,
    /// Nanoseconds of the threads' time that it has had. One that comes begins at the least of the others.
    had: u64,
    what: T,
}

impl<K, T> Default for Shares<K, T> {
    fn default() -> Self {
        Shares(Vec::new())
    }
}

impl<K: Copy + PartialEq, T: Default> Shares<K, T> {
    fn find(&mut self, key: K) -> Option<&mut Share<K, T>> {
        self.0.iter_mut().find(|share| share.key == key)
    }

    fn enter(&mut self, key: K) -> &mut T {
        let at = self.0.iter().position(|share| share.key == key).unwrap_or_else(|| {
            let had = self.0.iter().map(|share| share.had).min().unwrap_or(0);
            self.0.push(Share { key, had, what: T::default() });
            self.0.len() - 1
        });
        &mut self.0[at].what
    }

    /// Where the one is that has had the least of those that are `fit`; among equals the newest.
    fn least(&self, fit: impl Fn(K) -> bool) -> Option<usize> {
        let fitting = self.0.iter().enumerate().rev().filter(|(_, share)| fit(share.key));
        fitting.min_by_key(|(_, share)| share.had).map(|(at, _)| at)
    }
}

type Transfers = Shares<u64, VecDeque<Arc<Job>>>;

/// A slice that a thread is at.
struct UnderWay {
    thread: usize,
    connection: u64,
    since: Instant,
}

#[derive(Default)]
struct Queue {
    connections: Shares<u64, Transfers>,
    under_way: Vec<UnderWay>,
    /// Threads, and those of them that wait for work.
    threads: usize,
    idle: usize,
    ended: bool,
}

impl Queue {
    fn push(&mut self, job: &Arc<Job>) {
        self.connections.enter(job.flow.connection).enter(job.flow.transfer).push_back(job.clone());
    }

    /// The slices that come next. A connection that holds a thread up has no other.
    fn take(&mut self, thread: usize) -> Option<(Arc<Job>, Range<usize>)> {
        let now = Instant::now();
        loop {
            let held = |id| self.under_way.iter().any(|one| one.connection == id && now - one.since >= HELD_UP);
            let at = self.connections.least(|id| !held(id))?;
            let alone = self.connections.0.len() == 1;
            let transfers = &mut self.connections.0[at].what;
            let alone = alone && transfers.0.len() == 1;
            let Some(of) = transfers.least(|_| true) else {
                self.connections.0.swap_remove(at);
                continue;
            };
            let jobs = &mut transfers.0[of].what;
            // Sources of one job are neighbours, and those of another lie elsewhere.
            let place = thread % jobs.len().max(1);
            let job = jobs.get(place).cloned();
            let waiting = || jobs.iter().map(|job| job.unclaimed()).sum::<usize>();
            let most = if alone { (waiting() / (2 * self.threads).max(1)).clamp(1, AT_ONCE) } else { 1 };
            let Some((job, slices)) = job.and_then(|job| job.claim(most).map(|slices| (job, slices))) else {
                jobs.remove(place);
                if jobs.is_empty() {
                    transfers.0.swap_remove(of);
                }
                continue;
            };
            transfers.0[of].had += EXPECTED;
            self.connections.0[at].had += EXPECTED;
            self.under_way.push(UnderWay { thread, connection: job.flow.connection, since: now });
            return Some((job, slices));
        }
    }

    /// A thread has done its slices.
    fn done(&mut self, thread: usize, flow: Flow, took: Duration) {
        self.under_way.retain(|one| one.thread != thread);
        let more = (took.as_nanos() as u64).saturating_sub(EXPECTED);
        if let Some(connection) = self.connections.find(flow.connection) {
            connection.had += more;
            connection.what.find(flow.transfer).into_iter().for_each(|transfer| transfer.had += more);
        }
    }

    /// Threads that are held up.
    fn held_up(&self) -> usize {
        self.under_way.iter().filter(|one| one.since.elapsed() >= HELD_UP).count()
    }
}

/// What the threads share.
struct Inner {
    queue: Mutex<Queue>,
    comes: Condvar,
    handles: Mutex<Vec<JoinHandle<()>>>,
    /// Threads at most, without those that are held up.
    most: usize,
    /// No thread could be made: waiting threads do the work.
    without: AtomicBool,
}

impl Inner {
    /// Has more threads work at what waits: idle ones, or a new one if there are fewer than `most`. Each thread that begins does the same, so
    /// that the caller wakes few.
    fn call(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue>, unclaimed: usize, most: usize) {
        if queue.idle > 0 {
            let wakes = queue.idle.min(WAKES);
            drop(queue);
            (0..wakes).for_each(|_| self.comes.notify_one());
        } else if !queue.ended && queue.threads < most.min(MOST_IN_ALL) && unclaimed > queue.threads * SLICES_PER_THREAD {
            queue.threads += 1;
            let number = queue.threads;
            drop(queue);
            self.spawn(number);
        }
    }

    fn spawn(self: &Arc<Self>, number: usize) {
        let inner = self.clone();
        let mut handles = self.handles.lock();
        match process::thread::spawn("uccl-pull", move || work(&inner, number)) {
            Ok(thread) => handles.push(thread),
            Err(e) => {
                log::debug!("no thread for pulls: {e}");
                self.queue.lock().threads -= 1;
            }
        }
        self.without.store(handles.is_empty(), Ordering::Relaxed);
    }
}

/// The threads.
pub(crate) struct Pool {
    inner: Arc<Inner>,
    /// When threads that are held up were last looked for, milliseconds after the start.
    looked: AtomicU64,
    start: Instant,
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
        // Of many cores some are left to the application.
        let fresh = Arc::new(Pool::new((cores * 7 / 8).max(cores.min(2)).min(MOST)));
        *pool = Arc::downgrade(&fresh);
        Ok(fresh)
    }

    fn new(most: usize) -> Pool {
        let (queue, comes, handles, without) = Default::default();
        let inner = Arc::new(Inner { queue, comes, handles, most, without });
        Pool { inner, looked: AtomicU64::new(0), start: Instant::now(), generation: generation() }
    }

    /// Has the threads work at a job.
    pub(crate) fn start(&self, job: &Arc<Job>) {
        let mut queue = self.inner.queue.lock();
        queue.push(job);
        let held = queue.held_up();
        let waits = job.work.len() + held * SLICES_PER_THREAD;
        self.inner.call(queue, waits, self.inner.most + held);
    }

    /// Whether there are no threads, so that the thread that waits for a job has to do it.
    pub(crate) fn is_without_threads(&self) -> bool {
        self.inner.without.load(Ordering::Relaxed)
    }

    /// To be called while a job does not end: replaces threads that are held up.
    pub(crate) fn look(&self) {
        let now = self.start.elapsed().as_millis() as u64;
        if self.looked.swap(now, Ordering::Relaxed) == now {
            return;
        }
        let queue = self.inner.queue.lock();
        let held = queue.held_up();
        if !queue.connections.0.is_empty() && queue.idle == 0 && held > 0 {
            self.inner.call(queue, usize::MAX, self.inner.most + held);
        }
    }
}

fn work(inner: &Arc<Inner>, number: usize) {
    process::thread::ask_for_long_turns();
    let mut yields = Yields::new(Instant::now(), TURN);
    let mut queue = inner.queue.lock();
    loop {
        let Some((job, slices)) = queue.take(number) else {
            if queue.ended {
                return;
            }
            queue.idle += 1;
            inner.comes.wait(&mut queue);
            queue.idle -= 1;
            continue;
        };
        match job.unclaimed() {
            waits if waits > SLICES_PER_THREAD => inner.call(queue, waits, inner.most),
            _ => drop(queue),
        }
        let (flow, begun) = (job.flow, Instant::now());
        let mut away = Duration::ZERO;
        job.run(slices, || away += yields.pass(Instant::now()));
        drop(job);
        let took = begun.elapsed().saturating_sub(away);
        queue = inner.queue.lock();
        queue.done(number, flow, took);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.generation != generation() {
            // The threads are the parent's, and one of them may have held a lock.
            return;
        }
        self.inner.queue.lock().ended = true;
        self.inner.comes.notify_all();
        let own = std::thread::current().id();
        loop {
            // A thread that ends may just have made another one.
            let handles = std::mem::take(&mut *self.inner.handles.lock());
            if handles.is_empty() {
                return;
            }
            for thread in handles.into_iter().filter(|thread| thread.thread().id() != own) {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::err;

    struct Counting {
        done: Vec<AtomicUsize>,
        fails_at: Option<usize>,
    }

    impl Counting {
        fn job(n: usize, fails_at: Option<usize>) -> (Arc<Counting>, Arc<Job>) {
            let work = Arc::new(Counting { done: (0..n).map(|_| AtomicUsize::new(0)).collect(), fails_at });
            let job = Job::new(Box::new(work.clone()), Flow { connection: Flow::connection(), transfer: 0 }, None);
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
    fn after_the_wait_no_thread_is_at_it() {
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

    /// Slices that note their turn and end when the test says so.
    struct Turns {
        number: usize,
        slices: usize,
        order: Arc<Mutex<Vec<usize>>>,
        gate: Option<Arc<AtomicBool>>,
    }

    impl Work for Turns {
        fn len(&self) -> usize {
            self.slices
        }
        fn run(&self, _index: usize) -> Result<()> {
            while self.gate.as_ref().is_some_and(|gate| !gate.load(Ordering::SeqCst)) {
                std::thread::yield_now();
            }
            self.order.lock().push(self.number);
            Ok(())
        }
    }

    fn turns(
        number: usize,
        slices: usize,
        flow: Flow,
        order: &Arc<Mutex<Vec<usize>>>,
        gate: Option<&Arc<AtomicBool>>,
    ) -> Arc<Job> {
        Job::new(Box::new(Turns { number, slices, order: order.clone(), gate: gate.cloned() }), flow, None)
    }

    /// A queue without threads: whose slices come when threads take turns and each slice takes as long as the next.
    fn order_of(jobs: &[Arc<Job>], takes: usize) -> Vec<u64> {
        let mut queue = Queue::default();
        jobs.iter().for_each(|job| queue.push(job));
        let mut order = Vec::new();
        for thread in (0..5).cycle().take(takes) {
            let Some((job, slices)) = queue.take(thread) else { break };
            job.run(slices, || ());
            order.push(job.flow.transfer);
            queue.done(thread, job.flow, Duration::ZERO);
        }
        order
    }

    #[test]
    fn a_short_transfer_behind_a_long_one_has_its_share() {
        let order = Arc::default();
        let flow = |connection, transfer| Flow { connection, transfer };
        // 16 pulls of a long transfer are under way before 40 slices of a short one come.
        for (connection, same) in [(1, true), (2, false)] {
            let mut jobs: Vec<_> = (0..16).map(|_| turns(0, 512, flow(1, 1), &order, None)).collect();
            jobs.push(turns(1, 40, flow(connection, 2), &order, None));
            let order = order_of(&jobs, 100);
            let short = order.iter().filter(|&&transfer| transfer == 2).count();
            assert_eq!(short, 40, "same connection: {same}; {order:?}");
        }
        // Many transfers of one connection take nothing from another one's.
        let mut jobs: Vec<_> = (0..50).map(|n| turns(0, 512, flow(1, 10 + n), &order, None)).collect();
        jobs.push(turns(1, 40, flow(2, 2), &order, None));
        let order = order_of(&jobs, 100);
        assert_eq!(order.iter().filter(|&&transfer| transfer == 2).count(), 40, "{order:?}");
    }

    #[test]
    fn threads_begin_with_different_jobs_of_a_transfer() {
        let (order, flow) = (Arc::default(), Flow { connection: 1, transfer: 1 });
        let mut queue = Queue::default();
        (0..4).for_each(|number| queue.push(&turns(number, 64, flow, &order, None)));
        let taken: Vec<_> = (0..8).map(|thread| queue.take(thread).unwrap()).collect();
        for (thread, (job, slices)) in taken.iter().enumerate() {
            assert!(Arc::ptr_eq(job, &taken[thread % 4].0), "thread {thread}");
            assert_eq!(slices.start == 0, thread < 4, "thread {thread}");
        }
        taken.into_iter().for_each(|(job, slices)| job.run(slices, || ()));
    }

    #[test]
    fn all_that_was_pushed_is_taken_once() {
        let order: Arc<Mutex<Vec<usize>>> = Arc::default();
        let flow = |n: usize| Flow { connection: n as u64 % 3, transfer: n as u64 % 7 };
        let jobs: Vec<_> = (0..40).map(|n| turns(n, n % 5 + 1, flow(n), &order, None)).collect();
        let total: usize = (0..40).map(|n| n % 5 + 1).sum();
        assert_eq!(order_of(&jobs, 1000).len(), total);
        assert!((0..40).all(|n| order.lock().iter().filter(|&&m| m == n).count() == n % 5 + 1));
    }

    #[test]
    fn a_thread_that_is_held_up_is_replaced_and_its_connection_gets_no_other() {
        let (pool, order) = (Pool::new(1), Arc::default());
        let (gate, hostile) = (Arc::new(AtomicBool::new(false)), Flow { connection: Flow::connection(), transfer: 0 });
        let held: Vec<_> = (0..30).map(|_| turns(0, 100, hostile, &order, Some(&gate))).collect();
        held.iter().for_each(|job| pool.start(job));
        for round in 0..5 {
            let job = turns(1, 100, Flow { connection: Flow::connection(), transfer: 0 }, &order, None);
            pool.start(&job);
            let start = Instant::now();
            while !job.ended().unwrap() {
                pool.look();
                assert!(start.elapsed() < Duration::from_secs(60), "round {round}");
                std::thread::yield_now();
            }
        }
        assert!(pool.inner.queue.lock().threads <= 4 && order.lock().iter().all(|&n| n == 1));
        gate.store(true, Ordering::SeqCst);
        held.iter().for_each(|job| finish(job).unwrap());
    }
}
