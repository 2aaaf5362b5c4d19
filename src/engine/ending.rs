//! The engine's end as something to wait for: a flag, and a descriptor that stays readable from then on. Knows nothing of engines.

use crate::status::{err, Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) struct Ending {
    begun: AtomicBool,
    /// An eventfd that nobody reads: once written it wakes every poll, for ever.
    fd: OwnedFd,
}

impl Ending {
    pub(crate) fn new() -> Result<Ending> {
        // SAFETY: a plain system call.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(super::limits::system("eventfd", &std::io::Error::last_os_error()));
        }
        // SAFETY: a fresh descriptor.
        Ok(Ending { begun: AtomicBool::new(false), fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Begins the end; whether it had begun before.
    pub(crate) fn begin(&self) -> bool {
        let before = self.begun.swap(true, Ordering::AcqRel);
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes.
        unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), 8) };
        before
    }

    pub(crate) fn begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Readable once the end has begun.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// # Errors
    /// `Canceled` once the end has begun.
    pub(crate) fn check(&self) -> Result<()> {
        if self.begun() {
            return Err(canceled());
        }
        Ok(())
    }
}

/// The error of whoever waits when the engine ends.
pub(crate) fn canceled() -> Error {
    err!(Canceled, "the engine is being destroyed")
}
