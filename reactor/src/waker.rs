//! An eventfd that makes a poller's wait return. Knows nothing of the waiting thread's work.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Wakes the threads that wait for its descriptor to become readable. Any thread may wake.
#[derive(Debug)]
pub struct Waker {
    eventfd: OwnedFd,
}

impl Waker {
    /// A waker that is not signalled.
    ///
    /// # Errors
    /// The process or the system is out of descriptors.
    pub fn new() -> io::Result<Waker> {
        // SAFETY: a plain system call.
        let eventfd = crate::owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        Ok(Waker { eventfd })
    }

    /// The descriptor to add to a poller with [`Interest::READ`](crate::Interest::READ).
    pub fn fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// Makes the descriptor readable until [`Waker::drain`].
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes to our eventfd. It fails only when the counter is full, and then the descriptor is readable already.
        unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Makes the descriptor unreadable. Without edge-triggered interest, call it before looking for work.
    pub fn drain(&self) {
        let mut count = [0u8; 8];
        // SAFETY: room for eight bytes. It fails only when the waker is not signalled.
        unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}
