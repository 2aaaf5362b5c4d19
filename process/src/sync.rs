//! Futex locks behind `lock_api`'s interface: their whole state is inside them, so they survive a fork; a panic does not poison them,
//! and they are fair to a thread that has waited. Code that must know of a panic under a lock checks for it.

use lock_api::{GuardNoSend, RawMutex};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{self, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

/// A mutual exclusion lock. A thread that unlocks and locks again may overtake a waiting one, which is fast, but only for
/// [`OVERTAKEN`].
pub type Mutex<T> = lock_api::Mutex<Raw, T>;
/// Access to what a [`Mutex`] guards, until it is dropped.
pub type MutexGuard<'a, T> = lock_api::MutexGuard<'a, Raw, T>;

/// A thread that has waited this long for a lock is no longer overtaken.
const OVERTAKEN: Duration = Duration::from_micros(500);
/// Attempts at a held lock before a thread sleeps: first spinning, then yielding the CPU.
const SPINS: u32 = 3;
const YIELDS: u32 = 7;

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and a thread may be waiting.
const AWAITED: u32 = 2;

/// Sleeps while the word has this value. `false` when `most` has passed.
fn sleep(word: &AtomicU32, value: u32, most: Option<Duration>) -> bool {
    let most = most.map(|most| libc::timespec {
        tv_sec: libc::time_t::try_from(most.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: most.subsec_nanos() as libc::c_long,
    });
    let timeout = most.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: a word that lives during the call, and a time or null.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, value, timeout) };
    result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
}

/// Wakes at most this many threads that sleep on the word.
fn wake(word: &AtomicU32, most: i32) {
    // SAFETY: the kernel uses the address only as a key.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, most) };
}

/// A lock of one word.
struct Word(AtomicU32);

impl Word {
    fn attempt(&self) -> bool {
        self.0.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    fn take(&self) {
        while self.0.swap(AWAITED, Ordering::Acquire) != FREE {
            sleep(&self.0, AWAITED, None);
        }
    }

    /// The same with a time-out; whether the lock was taken.
    fn take_within(&self, most: Duration) -> bool {
        let until = Instant::now() + most;
        while self.0.swap(AWAITED, Ordering::Acquire) != FREE {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            sleep(&self.0, AWAITED, Some(left));
        }
        true
    }

    fn give_back(&self) {
        if self.0.swap(FREE, Ordering::Release) == AWAITED {
            wake(&self.0, 1);
        }
    }
}

/// The raw lock of a [`Mutex`].
pub struct Raw {
    lock: Word,
    /// Held by the one thread that waits for `lock`; all other waiters wait for this.
    front: Word,
    /// The thread at the front has waited long enough: no other takes the lock.
    overdue: AtomicBool,
}

impl Raw {
    fn attempt(&self) -> bool {
        !self.overdue.load(Ordering::Relaxed) && self.lock.attempt()
    }

    /// Most holders finish in less time than it takes to sleep and wake.
    #[cold]
    fn persist(&self) -> bool {
        (0..SPINS + YIELDS).any(|round| {
            match round {
                0..SPINS => (0..8 << round).for_each(|_| std::hint::spin_loop()),
                _ => std::thread::yield_now(),
            }
            self.attempt()
        })
    }

    #[cold]
    fn wait(&self) {
        self.front.take();
        if !self.lock.take_within(OVERTAKEN) {
            self.overdue.store(true, Ordering::Relaxed);
            self.lock.take();
            self.overdue.store(false, Ordering::Relaxed);
        }
        self.front.give_back();
    }
}

// SAFETY: `lock` is one word that a single thread at a time changes from FREE; locking acquires what unlocking released.
unsafe impl RawMutex for Raw {
    #[allow(clippy::declare_interior_mutable_const, reason = "each use is a lock of its own")]
    const INIT: Raw =
        Raw { lock: Word(AtomicU32::new(FREE)), front: Word(AtomicU32::new(FREE)), overdue: AtomicBool::new(false) };

    type GuardMarker = GuardNoSend;

    #[inline]
    fn lock(&self) {
        if !self.attempt() && !self.persist() {
            self.wait();
        }
    }

    #[inline]
    fn try_lock(&self) -> bool {
        self.attempt()
    }

    #[inline]
    unsafe fn unlock(&self) {
        self.lock.give_back();
    }

    fn is_locked(&self) -> bool {
        self.lock.0.load(Ordering::Relaxed) != FREE
    }
}

/// Whether a wait timed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// The wait timed out; a notification may have come at the same moment.
    pub fn timed_out(self) -> bool {
        self.0
    }
}

/// A condition variable for a [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(AtomicU32);

impl Condvar {
    /// One without waiters.
    pub const fn new() -> Condvar {
        Condvar(AtomicU32::new(0))
    }

    /// Unlocks, waits for a notification and locks again. It may wake spuriously.
    pub fn wait<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>) {
        self.wait_at_most(guard, None);
    }

    /// As `wait`, with a deadline.
    pub fn wait_until<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, until: Instant) -> WaitTimeoutResult {
        self.wait_for(guard, until.saturating_duration_since(Instant::now()))
    }

    /// As `wait`, with a time-out.
    pub fn wait_for<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, most: Duration) -> WaitTimeoutResult {
        self.wait_at_most(guard, Some(most))
    }

    fn wait_at_most<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, most: Option<Duration>) -> WaitTimeoutResult {
        // A notification after the unlock changes the number, and the kernel compares it again.
        let seen = self.0.load(Ordering::Relaxed);
        WaitTimeoutResult(!MutexGuard::unlocked(guard, || sleep(&self.0, seen, most)))
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.notify(1);
    }

    /// Wakes all waiters.
    pub fn notify_all(&self) {
        self.notify(i32::MAX);
    }

    fn notify(&self, most: i32) {
        self.0.fetch_add(1, Ordering::Relaxed);
        wake(&self.0, most);
    }
}

/// A reader-writer lock: the standard library's, without poisoning.
#[derive(Debug, Default)]
pub struct RwLock<T: ?Sized>(sync::RwLock<T>);

impl<T> RwLock<T> {
    /// An unlocked lock.
    pub const fn new(value: T) -> RwLock<T> {
        RwLock(sync::RwLock::new(value))
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Locks for reading.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks for reading unless a thread writes or waits to.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        match self.0.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Locks for writing.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn one_at_a_time() {
        let count = Arc::new(Mutex::new(0u64));
        let add = |count: Arc<Mutex<u64>>| move || (0..20_000).for_each(|_| *count.lock() += 1);
        let threads: Vec<_> = (0..8).map(|_| std::thread::spawn(add(count.clone()))).collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*count.lock(), 160_000);
        // SAFETY: not locked or unlocked by it.
        assert!(!count.is_locked() && !unsafe { count.raw() }.overdue.load(Ordering::Relaxed));
    }

    /// Several threads lock all the time, and one more wants the lock: it must get it again and again.
    #[test]
    fn a_waiting_thread_is_not_overtaken_for_ever() {
        let lock = Arc::new(Mutex::new(()));
        let stop = Arc::new(AtomicBool::new(false));
        let greedy = |lock: Arc<Mutex<()>>, stop: Arc<AtomicBool>| {
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let _held = lock.lock();
                    let until = Instant::now() + Duration::from_micros(50);
                    while Instant::now() < until {}
                }
            }
        };
        let threads: Vec<_> = (0..3).map(|_| std::thread::spawn(greedy(lock.clone(), stop.clone()))).collect();
        let start = Instant::now();
        (0..50).for_each(|_| drop(lock.lock()));
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn a_thread_that_has_waited_comes_before_try_lock() {
        let lock = Arc::new(Mutex::new(()));
        let held = lock.lock();
        let other = lock.clone();
        let waits = std::thread::spawn(move || drop(other.lock()));
        // SAFETY: not locked or unlocked by it.
        let overdue = || unsafe { lock.raw() }.overdue.load(Ordering::Relaxed);
        while !overdue() {
            std::thread::yield_now();
        }
        // It is at the front now, and gets the lock next.
        drop(held);
        assert!(lock.try_lock().is_none() || !overdue());
        waits.join().unwrap();
        assert!(lock.try_lock().is_some() && !overdue());
    }

    #[test]
    fn a_panic_under_a_lock_leaves_it_usable() {
        let lock = Arc::new(Mutex::new(1));
        let other = lock.clone();
        let died = std::thread::spawn(move || {
            let mut value = other.lock();
            *value = 2;
            panic!("under the lock, as this test wants it");
        });
        assert!(died.join().is_err());
        assert_eq!(lock.try_lock().as_deref(), Some(&2));
        assert_eq!(*lock.lock(), 2);
    }

    #[test]
    fn unlocked_releases_the_lock_and_takes_it_again() {
        let lock = Mutex::new(1);
        let mut guard = lock.lock();
        assert!(lock.is_locked());
        MutexGuard::unlocked(&mut guard, || *lock.try_lock().expect("given to others") += 1);
        assert!(lock.is_locked() && *guard == 2);
        let work = std::panic::AssertUnwindSafe(|| MutexGuard::unlocked(&mut guard, || panic!("as this test wants it")));
        assert!(std::panic::catch_unwind(work).is_err());
        assert!(lock.is_locked() && *guard == 2);
        drop(guard);
        assert!(!lock.is_locked());
    }

    #[test]
    fn a_wait_ends_when_notified_or_at_its_time_out() {
        let shared = Arc::new((Mutex::new(false), Condvar::new()));
        let other = shared.clone();
        let mut set = shared.0.lock();
        let sets = std::thread::spawn(move || {
            *other.0.lock() = true;
            other.1.notify_all();
        });
        while !*set {
            shared.1.wait(&mut set);
        }
        sets.join().unwrap();
        assert!(shared.1.wait_for(&mut set, Duration::from_millis(1)).timed_out());
        assert!(shared.1.wait_until(&mut set, Instant::now()).timed_out());
        assert!(shared.0.is_locked());
    }
}
