//! Locks behind `lock_api`'s interface: words that the kernel waits on, which keep nothing outside of themselves and survive a fork, are
//! not poisoned by a panic, and are fair to a thread that has waited. A reader that must know of a panic under a lock looks for itself.

use lock_api::{GuardNoSend, RawMutex};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{self, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

/// A lock for one thread at a time. A thread that unlocks and locks again may overtake one that waits, which is fast, but only for
/// [`OVERTAKEN`].
pub type Mutex<T> = lock_api::Mutex<Raw, T>;
/// Access to what a [`Mutex`] guards, until it is dropped.
pub type MutexGuard<'a, T> = lock_api::MutexGuard<'a, Raw, T>;

/// A thread that has waited this long for a lock is not overtaken any more.
const OVERTAKEN: Duration = Duration::from_micros(500);
/// Attempts at a lock that another thread has, before this one sleeps: some after a moment each, some after others had the CPU.
const SPINS: u32 = 3;
const YIELDS: u32 = 7;

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and a thread may wait for it.
const AWAITED: u32 = 2;

/// Sleeps while the word has this value. `false` when `most` is over.
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

/// Wakes threads that sleep on the word, as many at most.
fn wake(word: &AtomicU32, most: i32) {
    // SAFETY: the kernel takes the address as a name only.
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

    /// The same; whether it was free in time.
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

/// What a [`Mutex`] is made of.
pub struct Raw {
    lock: Word,
    /// Held by the one thread that waits for `lock`; all others wait for this.
    front: Word,
    /// The thread at the front has waited long enough: no other takes the lock.
    overdue: AtomicBool,
}

impl Raw {
    fn attempt(&self) -> bool {
        !self.overdue.load(Ordering::Relaxed) && self.lock.attempt()
    }

    /// Most holders are done in less time than it takes to fall asleep and to be woken.
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

// SAFETY: `lock` is one word that a single thread at a time changes from FREE; taking it acquires what giving it back released.
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

/// Whether a wait ended by its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// It did; what was waited for may have come at the same moment.
    pub fn timed_out(self) -> bool {
        self.0
    }
}

/// Waiting for what other threads do under a [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(AtomicU32);

impl Condvar {
    /// No thread waits.
    pub const fn new() -> Condvar {
        Condvar(AtomicU32::new(0))
    }

    /// Unlocks, waits to be notified and locks again. It may come back without cause.
    pub fn wait<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>) {
        self.wait_at_most(guard, None);
    }

    /// As `wait`, until a time at most.
    pub fn wait_until<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, until: Instant) -> WaitTimeoutResult {
        self.wait_for(guard, until.saturating_duration_since(Instant::now()))
    }

    /// As `wait`, for a time at most.
    pub fn wait_for<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, most: Duration) -> WaitTimeoutResult {
        self.wait_at_most(guard, Some(most))
    }

    fn wait_at_most<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, most: Option<Duration>) -> WaitTimeoutResult {
        // Whatever is notified once the lock is free changes the number, and the kernel looks at it again.
        let seen = self.0.load(Ordering::Relaxed);
        WaitTimeoutResult(!MutexGuard::unlocked(guard, || sleep(&self.0, seen, most)))
    }

    /// Wakes one that waits.
    pub fn notify_one(&self) {
        self.notify(1);
    }

    /// Wakes all that wait.
    pub fn notify_all(&self) {
        self.notify(i32::MAX);
    }

    fn notify(&self, most: i32) {
        self.0.fetch_add(1, Ordering::Relaxed);
        wake(&self.0, most);
    }
}

/// A lock for one that writes or several that read: the standard library's, without poison.
#[derive(Debug, Default)]
pub struct RwLock<T: ?Sized>(sync::RwLock<T>);

impl<T> RwLock<T> {
    /// An unlocked one.
    pub const fn new(value: T) -> RwLock<T> {
        RwLock(sync::RwLock::new(value))
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Waits until no thread writes.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value, where no thread writes or waits to.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        match self.0.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Waits until no thread reads or writes.
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

    /// Threads that never leave the lock alone for long, and one that wants it: it must get it again and again.
    #[test]
    fn one_that_waits_is_not_overtaken_for_ever() {
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
    fn one_that_has_waited_comes_before_those_that_try() {
        let lock = Arc::new(Mutex::new(()));
        let held = lock.lock();
        let other = lock.clone();
        let waits = std::thread::spawn(move || drop(other.lock()));
        // SAFETY: not locked or unlocked by it.
        let overdue = || unsafe { lock.raw() }.overdue.load(Ordering::Relaxed);
        while !overdue() {
            std::thread::yield_now();
        }
        // It has the front now, and the lock next.
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
    fn unlocked_gives_the_lock_to_others_and_takes_it_back() {
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
    fn a_wait_ends_when_notified_or_at_its_time() {
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
