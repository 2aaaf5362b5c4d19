//! Starts every thread of the library. Knows nothing of their work.

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of a thread's stack.
const STACK: usize = 2 << 20;

/// Starts a thread with all signals blocked. Its first steps allocate, and a failed allocation aborts the process, so this first
/// checks that there is room.
///
/// # Errors
/// `OutOfMemory` if the address space has no room for it; else the system's error, `EAGAIN` for too many threads.
pub fn spawn(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    crate::ensure_space(STACK)?;
    std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(|| {
        block_signals();
        body();
    })
}

/// Blocks every signal in the calling thread: plugins raise SIGPIPE, and signal handlers belong to the application.
fn block_signals() {
    // SAFETY: a local, fully initialised set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Defers cancellation (`pthread_cancel`) of the calling thread while it lives: cancellation unwinds a thread from where it waits,
/// through Rust frames that do not allow it, which aborts the process. A pending cancellation takes effect afterwards.
pub struct Uncancelled {
    before: libc::c_int,
    /// Not Send: the state is the thread's own.
    _here: std::marker::PhantomData<*const ()>,
}

extern "C" {
    fn pthread_setcancelstate(state: libc::c_int, before: *mut libc::c_int) -> libc::c_int;
}

/// As both glibc and musl number it.
const PTHREAD_CANCEL_DISABLE: libc::c_int = 1;

impl Uncancelled {
    /// Defers cancellation until dropped.
    #[allow(clippy::new_without_default, reason = "it does something")]
    pub fn new() -> Uncancelled {
        let mut before = 0;
        // SAFETY: a state of the calling thread, and a writable number.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &raw mut before) };
        Uncancelled { before, _here: std::marker::PhantomData }
    }
}

impl Drop for Uncancelled {
    fn drop(&mut self) {
        // SAFETY: the calling thread's previous state; the returned state is written to a local and ignored.
        unsafe { pthread_setcancelstate(self.before, &raw mut self.before) };
    }
}

/// Asks the scheduler for short time slices: a thread with short bursts of work then runs soon beside CPU-bound threads, without taking
/// a larger share. An older kernel ignores it.
pub fn ask_for_short_turns() {
    ask_for_turns(100_000);
}

/// Asks the scheduler for long time slices: threads that wake then run before this one, which keeps its share. An older kernel ignores
/// it.
pub fn ask_for_long_turns() {
    ask_for_turns(5_000_000);
}

/// A yield that takes longer has let a thread run that computes. The next one comes after so many times as long as it took: a thread that
/// computes gets little of the yielding thread's share by it.
const COMPUTES: Duration = Duration::from_millis(1);
const BACK_OFF: u32 = 16;

/// When a thread that moves bytes next yields its core, so that threads with short work run soon beside it. The kernel looks for another thread
/// only at a wake-up and at its tick, which is 4 ms apart where CONFIG_HZ is 250.
#[derive(Debug)]
pub struct Yields {
    turn: Duration,
    next: Instant,
}

impl Yields {
    /// The thread begins to work, and yields after each `turn`.
    pub fn new(now: Instant, turn: Duration) -> Yields {
        Yields { turn, next: now + turn }
    }

    /// Yields if it is time. Returns how long the thread was away.
    pub fn pass(&mut self, now: Instant) -> Duration {
        if !self.is_due(now) {
            return Duration::ZERO;
        }
        std::thread::yield_now();
        let after = Instant::now();
        self.yielded(now, after);
        after - now
    }

    fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// The thread yielded from `before` until `after`.
    fn yielded(&mut self, before: Instant, after: Instant) {
        let took = after - before;
        self.next = after + if took > COMPUTES { took * BACK_OFF } else { self.turn };
    }
}

/// Asks for time slices of so many nanoseconds.
fn ask_for_turns(runtime: u64) {
    /// `struct sched_attr` in its first version.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let size = size_of::<Attributes>() as u32;
    let mut attributes = Attributes { size, ..Attributes::default() };
    // SAFETY: reads the calling thread's attributes into a struct of the given size; then writes them with another time slice.
    unsafe {
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) == 0
            && attributes.policy == libc::SCHED_OTHER as u32
        {
            attributes.runtime = runtime;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_is_blocked() {
        let (tell, told) = std::sync::mpsc::channel();
        let thread = spawn("test", move || {
            // SAFETY: a local set, filled by the call.
            unsafe {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set);
                let blocked = [libc::SIGPIPE, libc::SIGINT, libc::SIGUSR1, libc::SIGCHLD]
                    .map(|signal| libc::sigismember(&raw const set, signal));
                tell.send(blocked).unwrap();
            }
        });
        thread.unwrap().join().unwrap();
        assert_eq!(told.recv().unwrap(), [1; 4]);
    }

    #[test]
    fn cancellation_is_deferred() {
        let state = || {
            let mut now = -1;
            // SAFETY: sets what it reads back, in the calling thread.
            unsafe {
                pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &raw mut now);
                pthread_setcancelstate(now, std::ptr::null_mut());
            }
            now
        };
        let before = state();
        {
            let _outer = Uncancelled::new();
            drop(Uncancelled::new());
            assert_eq!(state(), PTHREAD_CANCEL_DISABLE);
        }
        assert!(before != PTHREAD_CANCEL_DISABLE && state() == before);
    }

    #[test]
    fn a_thread_yields_often_but_seldom_beside_one_that_computes() {
        let (start, us) = (Instant::now(), Duration::from_micros);
        let mut yields = Yields::new(start, us(100));
        let (mut now, mut count) = (start, 0);
        let mut lost = Duration::ZERO;
        // Slices of 20 us for 10 ms; another thread runs briefly at each yield.
        while now < start + us(10_000) {
            now += us(20);
            if yields.is_due(now) {
                yields.yielded(now, now + us(50));
                (now, count) = (now + us(50), count + 1);
            }
        }
        assert!((60..=70).contains(&count), "{count}");
        // One that computes takes 4 ms at each.
        let from = now;
        while now < from + us(1_000_000) {
            now += us(20);
            if yields.is_due(now) {
                yields.yielded(now, now + us(4000));
                (now, lost) = (now + us(4000), lost + us(4000));
            }
        }
        assert!(lost < (now - from) / 15, "{lost:?}");
    }

    /// The calling thread's policy, nice value and time slice (0 if the kernel does not tell).
    fn attributes() -> (u32, i32, u64) {
        let mut words = [0u32; 12];
        // SAFETY: room for the 48 bytes.
        assert_eq!(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, words.as_mut_ptr(), 48, 0) }, 0);
        (words[1], words[4] as i32, u64::from(words[6]) | u64::from(words[7]) << 32)
    }

    #[test]
    fn asking_for_time_slices_changes_nothing_else() {
        for (ask, wanted) in [(ask_for_short_turns as fn(), 100_000), (ask_for_long_turns, 5_000_000)] {
            let thread = std::thread::spawn(move || {
                // SAFETY: a plain call; a higher nice value than before is always allowed.
                let lowered = unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::syscall(libc::SYS_gettid) as libc::id_t, 15) };
                assert_eq!(lowered, 0);
                let (policy, nice, turn) = attributes();
                ask();
                let after = attributes();
                assert_eq!((after.0, after.1), (policy, nice));
                // An older kernel keeps the old value.
                assert!(after.2 == wanted || after.2 == turn, "{} ns after {turn}", after.2);
            });
            thread.join().unwrap();
        }
    }
}
