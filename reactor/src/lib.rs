//! Waiting for descriptors (`Poller`, over epoll) and waking the waiting thread (`Waker`, over an eventfd).
//! Knows nothing of connections, comms or threads; the caller chooses the tokens.
//!
//! # Fork
//! A child of `fork` shares the parent's epoll set and eventfds. It must neither change nor use them, but make its own. Dropping a
//! `Poller` or a `Waker` in the child only closes the child's descriptor.

mod poller;
mod waker;

pub use poller::{Event, Events, Interest, Poller};
pub use waker::Waker;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Takes over a descriptor that a system call has just made.
fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor just created, without another owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
