//! Wakes an application that sleeps in an event loop when something has happened at an engine: a descriptor becomes readable.
//! Knows nothing about what has happened.

use reactor::Waker;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::OnceLock;

/// The events of an engine. They cost nothing until the application asks for a descriptor.
#[derive(Default)]
pub(crate) struct Events(OnceLock<Waker>);

impl Events {
    /// A descriptor that becomes readable with every event, and is readable now: it does not show earlier events.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        if self.0.get().is_none() {
            let waker = Waker::new()?;
            // If another thread was first, its waker stays.
            self.0.get_or_init(|| waker);
        }
        let waker = self.0.get().expect("just made");
        // SAFETY: `waker` keeps the descriptor open for the time of the borrow.
        let copy = unsafe { BorrowedFd::borrow_raw(waker.fd()) }.try_clone_to_owned()?;
        waker.wake();
        Ok(copy)
    }

    /// Whether the application has asked for a descriptor.
    pub(crate) fn are_watched(&self) -> bool {
        self.0.get().is_some()
    }

    /// Something has happened. The caller has made the change, so that a thread that is woken finds it.
    pub(crate) fn happened(&self) {
        if let Some(waker) = self.0.get() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::{Events as Ready, Interest, Poller};
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    fn is_readable(fd: &OwnedFd) -> bool {
        let (poller, mut ready) = (Poller::new().unwrap(), Ready::with_capacity(1));
        poller.add(fd.as_raw_fd(), 1, Interest::READ).unwrap();
        poller.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        !ready.is_empty()
    }

    fn reset(fd: &OwnedFd) {
        let mut file = std::fs::File::from(fd.try_clone().unwrap());
        file.read_exact(&mut [0; 8]).unwrap();
    }

    #[test]
    fn descriptors_are_readable_at_first_and_after_each_event() {
        let events = Events::default();
        events.happened();
        let (one, two) = (events.descriptor().unwrap(), events.descriptor().unwrap());
        assert!(is_readable(&one) && is_readable(&two));
        reset(&one);
        assert!(!is_readable(&one) && !is_readable(&two), "a read resets all of them");
        events.happened();
        events.happened();
        assert!(is_readable(&one) && is_readable(&two));
        reset(&two);
        assert!(!is_readable(&one));
        drop(events);
        assert!(!is_readable(&one), "it outlives the engine");
    }
}
