//! The engine's end as something to wait for: a flag, and a descriptor that stays readable from then on. Knows nothing of engines.

use crate::status::{err, Error, Result};
use reactor::Waker;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) struct Shutdown {
    begun: AtomicBool,
    /// Never drained: once woken it ends every wait, for ever.
    waker: Waker,
}

impl Shutdown {
    pub(crate) fn new() -> Result<Shutdown> {
        let waker = Waker::new().map_err(|e| crate::engine::limits::system("eventfd", &e))?;
        Ok(Shutdown { begun: AtomicBool::new(false), waker })
    }

    /// Begins the end; whether it had begun before.
    pub(crate) fn begin(&self) -> bool {
        let before = self.begun.swap(true, Ordering::AcqRel);
        self.waker.wake();
        before
    }

    pub(crate) fn begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Readable once the end has begun.
    pub(crate) fn fd(&self) -> RawFd {
        self.waker.fd()
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
