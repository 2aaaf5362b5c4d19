//! SIGPIPE around calls of plugins that write to sockets without MSG_NOSIGNAL: blocked in the calling thread, and consumed if the
//! call raised it. A SIGPIPE that was pending before, or that the application blocks, stays as it was.

use std::cell::Cell;
use std::marker::PhantomData;

thread_local! {
    /// Guards alive in this thread; only the outermost one acts.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// While it exists, SIGPIPE raised by the thread's calls does not reach the process. Nesting is free: hold one around many calls.
pub(crate) struct Quiet {
    /// In the outermost guard: the previous mask, and whether a SIGPIPE was pending.
    before: Option<(libc::sigset_t, bool)>,
    /// Not Send: the mask belongs to the thread.
    _thread: PhantomData<*const ()>,
}

fn sigpipe() -> libc::sigset_t {
    // SAFETY: plain data, initialised by the calls.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGPIPE);
        set
    }
}

fn pending() -> bool {
    // SAFETY: the set is written by the call before it is read.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&mut set) == 0 && libc::sigismember(&set, libc::SIGPIPE) == 1
    }
}

impl Quiet {
    pub(crate) fn begin() -> Quiet {
        let depth = DEPTH.get();
        DEPTH.set(depth + 1);
        if depth > 0 {
            return Quiet { before: None, _thread: PhantomData };
        }
        // SAFETY: plain data for which zeros are valid.
        let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: both sets are this thread's locals. The call cannot fail with these arguments.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &sigpipe(), &mut mask) };
        // Only a blocked signal can be pending here.
        // SAFETY: mask was written by the call above.
        let blocked = unsafe { libc::sigismember(&mask, libc::SIGPIPE) } == 1;
        Quiet { before: Some((mask, blocked && pending())), _thread: PhantomData }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        let Some((mask, was_pending)) = self.before else { return };
        if !was_pending && pending() {
            let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the set and the time are readable; the info pointer is null.
            unsafe { libc::sigtimedwait(&sigpipe(), std::ptr::null_mut(), &none) };
        }
        // SAFETY: restores the mask of this thread.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &mask, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Raises SIGPIPE, as a plugin's write does.
    fn write_to_closed_socket() {
        let mut ends = [0; 2];
        // SAFETY: two writable descriptors, closed here; one byte is readable.
        unsafe {
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            libc::close(ends[0]);
            assert_eq!(libc::write(ends[1], b"x".as_ptr().cast(), 1), -1);
            libc::close(ends[1]);
        }
    }

    fn with_default_action(body: impl FnOnce() + Send + 'static) {
        // Rust's runtime ignores SIGPIPE; a C application does not. The body runs in a child, which the signal would kill.
        // SAFETY: the child only calls what is safe after fork in a test without other threads' locks, and leaves with _exit.
        unsafe {
            let child = libc::fork();
            assert!(child >= 0);
            if child == 0 {
                libc::signal(libc::SIGPIPE, libc::SIG_DFL);
                body();
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            assert_eq!(status, 0, "the child ended with status {status:#x}");
        }
    }

    #[test]
    fn a_sigpipe_of_the_call_is_consumed() {
        with_default_action(|| {
            let quiet = Quiet::begin();
            let inner = Quiet::begin();
            write_to_closed_socket();
            drop(inner);
            drop(quiet);
            if pending() {
                // SAFETY: ends the child.
                unsafe { libc::_exit(1) };
            }
        });
    }

    #[test]
    fn a_signal_that_was_pending_stays() {
        with_default_action(|| {
            // SAFETY: this thread's mask and signal.
            unsafe {
                libc::pthread_sigmask(libc::SIG_BLOCK, &sigpipe(), std::ptr::null_mut());
                libc::pthread_kill(libc::pthread_self(), libc::SIGPIPE);
            }
            {
                let _quiet = Quiet::begin();
                write_to_closed_socket();
            }
            if !pending() {
                // SAFETY: ends the child.
                unsafe { libc::_exit(1) };
            }
        });
    }

    #[test]
    fn a_thread_that_blocks_it_sees_no_change() {
        with_default_action(|| {
            // SAFETY: this thread's mask.
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &sigpipe(), std::ptr::null_mut()) };
            {
                let _quiet = Quiet::begin();
                write_to_closed_socket();
            }
            if pending() {
                // SAFETY: ends the child.
                unsafe { libc::_exit(1) };
            }
        });
    }
}
