//! How every thread of the library starts. Knows nothing of what they do then.

use std::io;
use std::thread::JoinHandle;

/// Bytes of a thread's stack.
const STACK: usize = 2 << 20;

/// Starts a thread that takes no signals. Its first steps allocate, and the process ends where they cannot: there is room for them.
///
/// # Errors
/// `OutOfMemory` where the address space has no room for it; else what the system says, `EAGAIN` where there are too many threads.
pub fn spawn(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    crate::ensure_space(STACK)?;
    std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(|| {
        block_signals();
        body();
    })
}

/// Blocks every signal in the calling thread: plugins raise SIGPIPE, and handlers are the application's.
fn block_signals() {
    // SAFETY: a local, fully initialised set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Keeps the calling thread from being cancelled (`pthread_cancel`) while it lives: a cancelled thread is unwound from wherever it waits,
/// through frames that cannot be unwound so, which ends the process. Whoever cancelled it is heard afterwards.
pub struct Uncancelled {
    before: libc::c_int,
    /// The state is the thread's own.
    _here: std::marker::PhantomData<*const ()>,
}

extern "C" {
    fn pthread_setcancelstate(state: libc::c_int, before: *mut libc::c_int) -> libc::c_int;
}

/// As both glibc and musl number it.
const PTHREAD_CANCEL_DISABLE: libc::c_int = 1;

impl Uncancelled {
    /// From here on, until it is dropped.
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
        // SAFETY: the state that the calling thread had; the one that comes back is not wanted, for which a place is given all the same.
        unsafe { pthread_setcancelstate(self.before, &raw mut self.before) };
    }
}

/// Asks for short turns on the core: a thread that works for moments only then gets one soon where others work for long. Takes nothing
/// from them in all. A kernel that cannot do it leaves things as they are.
pub fn ask_for_short_turns() {
    /// `struct sched_attr`, as long as it was at first.
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
    const SHORTEST_NS: u64 = 100_000;
    let size = size_of::<Attributes>() as u32;
    let mut attributes = Attributes { size, ..Attributes::default() };
    // SAFETY: the calling thread's attributes, into a struct of the size that is told; then the same with another length of turns.
    unsafe {
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) == 0
            && attributes.policy == libc::SCHED_OTHER as u32
        {
            attributes.runtime = SHORTEST_NS;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_signal_comes_through() {
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
    fn nobody_cancels_a_thread_in_between() {
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

    /// What the kernel says of the calling thread: policy, nice value, length of its turns (0 from one that cannot tell).
    fn attributes() -> (u32, i32, u64) {
        let mut words = [0u32; 12];
        // SAFETY: room for the 48 bytes that are told.
        assert_eq!(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, words.as_mut_ptr(), 48, 0) }, 0);
        (words[1], words[4] as i32, u64::from(words[6]) | u64::from(words[7]) << 32)
    }

    #[test]
    fn short_turns_change_nothing_else() {
        let thread = std::thread::spawn(|| {
            // SAFETY: a plain call; a higher nice value than before is always allowed.
            assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::syscall(libc::SYS_gettid) as libc::id_t, 15) }, 0);
            let (policy, nice, turn) = attributes();
            ask_for_short_turns();
            let after = attributes();
            assert_eq!((after.0, after.1), (policy, nice));
            // An older kernel keeps what it had.
            assert!(after.2 == 100_000 || after.2 == turn, "{} ns after {turn}", after.2);
        });
        thread.join().unwrap();
    }
}
