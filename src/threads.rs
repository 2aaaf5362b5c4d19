//! What every thread of the library's own does first. Knows nothing of what they do then.

/// Blocks every signal in the calling thread: plugins raise SIGPIPE, and handlers are the application's.
pub(crate) fn block_signals() {
    // SAFETY: a local, fully initialised set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}
