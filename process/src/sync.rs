//! Locks in the shape of `lock_api`: the standard library's, without poison, and fair among threads that come back for a lock again
//! and again. Whoever needs to know of a panic under a lock looks for itself.

use crate::fork::PerProcess;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{self, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

pub use std::sync::WaitTimeoutResult;

/// A thread that has waited this long for a lock is not overtaken any more.
const FAIR_AFTER: Duration = Duration::from_micros(500);
/// Looks at a lock that another thread has, before this one sleeps: some after a moment each, some after others had the CPU.
const SPINS: u32 = 3;
const YIELDS: u32 = 7;
/// Nobody is at the front.
const NOBODY: u64 = u64::MAX;

/// Microseconds of a clock of this process.
fn clock() -> u64 {
    static START: PerProcess<Instant> = PerProcess::new(Instant::now);
    START.get().elapsed().as_micros() as u64
}

/// A lock for one thread at a time. A thread that unlocks and locks at once may do so before one that waits has woken up, which is
/// fast, but only for so long: then the one that waits comes first.
#[derive(Debug)]
pub struct Mutex<T: ?Sized> {
    /// When the first of those that wait came to the front.
    front_since: AtomicU64,
    /// Held by the one at the front, while it waits for `value`.
    front: sync::Mutex<()>,
    value: sync::Mutex<T>,
}

/// Access to what a [`Mutex`] guards, until it is dropped.
#[derive(Debug)]
pub struct MutexGuard<'a, T: ?Sized> {
    mutex: &'a Mutex<T>,
    /// Taken only for as long as the lock is given to others.
    held: Option<sync::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    /// An unlocked one.
    pub const fn new(value: T) -> Mutex<T> {
        let front_since = AtomicU64::new(NOBODY);
        Mutex { front_since, front: sync::Mutex::new(()), value: sync::Mutex::new(value) }
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let held = self.attempt().or_else(|| self.persist()).unwrap_or_else(|| self.wait());
        MutexGuard { mutex: self, held: Some(held) }
    }

    /// The lock, where nobody has it and nobody who has waited for long is before us.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.attempt().map(|held| MutexGuard { mutex: self, held: Some(held) })
    }

    /// The value, through the only reference to it.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody has the lock at this moment.
    #[cfg(test)]
    fn is_locked(&self) -> bool {
        matches!(self.value.try_lock(), Err(TryLockError::WouldBlock))
    }

    fn attempt(&self) -> Option<sync::MutexGuard<'_, T>> {
        if self.is_overdue() {
            return None;
        }
        match self.value.try_lock() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(held)) => Some(held.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether the one at the front must not be overtaken any more.
    fn is_overdue(&self) -> bool {
        let since = self.front_since.load(Ordering::Relaxed);
        since != NOBODY && clock().saturating_sub(since) >= FAIR_AFTER.as_micros() as u64
    }

    /// Most holders are done in less time than it takes to fall asleep and to be woken.
    #[cold]
    fn persist(&self) -> Option<sync::MutexGuard<'_, T>> {
        (0..SPINS + YIELDS).find_map(|round| {
            match round {
                0..SPINS => (0..8 << round).for_each(|_| std::hint::spin_loop()),
                _ => std::thread::yield_now(),
            }
            self.attempt()
        })
    }

    #[cold]
    fn wait(&self) -> sync::MutexGuard<'_, T> {
        let front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        self.front_since.store(clock(), Ordering::Relaxed);
        let held = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        self.front_since.store(NOBODY, Ordering::Relaxed);
        drop(front);
        held
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Mutex<T> {
        Mutex::new(T::default())
    }
}

impl<T: ?Sized> MutexGuard<'_, T> {
    /// Gives the lock to others while `work` runs.
    pub fn unlocked<R>(guard: &mut Self, work: impl FnOnce() -> R) -> R {
        /// Locks again, whether `work` returns or panics.
        struct Again<'b, 'a, T: ?Sized>(&'b mut MutexGuard<'a, T>);
        impl<T: ?Sized> Drop for Again<'_, '_, T> {
            fn drop(&mut self) {
                self.0.held = self.0.mutex.lock().held.take();
            }
        }
        guard.held = None;
        let _again = Again(guard);
        work()
    }
}

/// What every access finds: only `unlocked` and the waits of a [`Condvar`] take the lock out of its guard, and they put it back before
/// anybody can look.
const HELD: &str = "a guard holds its lock";

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.held.as_deref().expect(HELD)
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_deref_mut().expect(HELD)
    }
}

/// Waiting for what others do under a [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(sync::Condvar);

impl Condvar {
    /// Nobody waits.
    pub const fn new() -> Condvar {
        Condvar(sync::Condvar::new())
    }

    /// Unlocks, waits to be notified and locks again. It may come back without cause.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        if let Some(held) = guard.held.take() {
            guard.held = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// As `wait`, until a time at most.
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, until: Instant) -> WaitTimeoutResult {
        self.wait_for(guard, until.saturating_duration_since(Instant::now()))
    }

    /// As `wait`, for a time at most.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, most: Duration) -> WaitTimeoutResult {
        let held = guard.held.take().expect(HELD);
        let (held, result) = self.0.wait_timeout(held, most).unwrap_or_else(PoisonError::into_inner);
        guard.held = Some(held);
        result
    }

    /// Wakes one that waits.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all that wait.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// A lock for one that writes or several that read.
#[derive(Debug, Default)]
pub struct RwLock<T: ?Sized>(sync::RwLock<T>);

impl<T> RwLock<T> {
    /// An unlocked one.
    pub const fn new(value: T) -> RwLock<T> {
        RwLock(sync::RwLock::new(value))
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Waits until nobody writes.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where nobody writes, or waits for it.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        match self.0.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Waits until nobody reads or writes.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::sync::Arc;

    #[test]
    fn one_at_a_time() {
        let count = Arc::new(Mutex::new(0u64));
        let add = |count: Arc<Mutex<u64>>| move || (0..20_000).for_each(|_| *count.lock() += 1);
        let threads: Vec<_> = (0..8).map(|_| std::thread::spawn(add(count.clone()))).collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*count.lock(), 160_000);
        assert_eq!(count.front_since.load(Ordering::Relaxed), NOBODY);
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
        while !lock.is_overdue() {
            std::thread::yield_now();
        }
        // It has the front now, and the lock next.
        assert!(lock.attempt().is_none() && lock.try_lock().is_none());
        drop(held);
        waits.join().unwrap();
        assert!(lock.try_lock().is_some() && !lock.is_overdue());
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
