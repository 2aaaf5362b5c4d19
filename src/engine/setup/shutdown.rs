//! The engine's shutdown as an event: a flag, and a descriptor that stays readable afterwards. Knows nothing about engines.

use crate::status::{err, Error, Result};
use reactor::Waker;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) struct Shutdown {
    begun: AtomicBool,
    /// Never drained: once woken it ends every wait, forever.
    waker: Waker,
}

impl Shutdown {
    pub(crate) fn new() -> Result<Shutdown> {
        let waker = Waker::new().map_err(|e| crate::engine::limits::system("eventfd", &e))?;
        Ok(Shutdown { begun: AtomicBool::new(false), waker })
    }

    /// Begins the shutdown; returns whether it had already begun.
    pub(crate) fn begin(&self) -> bool {
        let before = self.begun.swap(true, Ordering::AcqRel);
        self.waker.wake();
        before
    }

    pub(crate) fn begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Readable once the shutdown has begun.
    pub(crate) fn fd(&self) -> RawFd {
        self.waker.fd()
    }

    /// # Errors
    /// `Canceled` once the shutdown has begun.
    pub(crate) fn check(&self) -> Result<()> {
        if self.begun() {
            return Err(canceled());
        }
        Ok(())
    }
}

/// The error of calls that wait when the engine is destroyed.
pub(crate) fn canceled() -> Error {
    err!(Canceled, "the engine is being destroyed")
}
