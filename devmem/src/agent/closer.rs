//! Closes what clients have passed, in threads of its own: closing may wait, for the network or for a file system in user space.

use std::os::fd::{AsRawFd, OwnedFd};
use std::thread::{Builder, JoinHandle};

/// Threads of one user, and of all together. What comes meanwhile waits for the end of one.
const OF_ONE: usize = 4;
const ALL: usize = 32;
const STACK: usize = 64 << 10;

/// See the file's head.
#[derive(Default)]
pub(super) struct Closer {
    running: Vec<(u32, JoinHandle<()>)>,
    waiting: Vec<(u32, Vec<OwnedFd>)>,
}

impl Closer {
    /// Closes these, which a user has passed.
    pub fn close(&mut self, user: u32, descriptors: Vec<OwnedFd>) {
        if !descriptors.is_empty() {
            self.waiting.push((user, descriptors));
            self.advance();
        }
    }

    /// Begins what waits, as far as threads have ended.
    pub fn advance(&mut self) {
        self.running.retain(|(_, thread)| !thread.is_finished());
        let mut at = 0;
        while at < self.waiting.len() {
            let user = self.waiting[at].0;
            if self.running.len() == ALL || self.running.iter().filter(|(of, _)| *of == user).count() >= OF_ONE {
                at += 1;
                continue;
            }
            let (_, descriptors) = self.waiting.remove(at);
            // Where there is no thread the caller's closes them: the user's bound keeps that from being usual.
            if let Ok(thread) = Builder::new().stack_size(STACK).spawn(move || close(descriptors)) {
                self.running.push((user, thread));
            }
        }
    }

    /// How many of a user's closes wait for others of it.
    pub fn waiting_of(&self, user: u32) -> usize {
        self.waiting.iter().filter(|(of, _)| *of == user).count()
    }

    /// Whether nothing is left.
    #[cfg(test)]
    pub fn is_done(&mut self) -> bool {
        self.advance();
        self.running.is_empty() && self.waiting.is_empty()
    }
}

fn close(descriptors: Vec<OwnedFd>) {
    let off = libc::linger { l_onoff: 0, l_linger: 0 };
    for fd in &descriptors {
        let size = std::mem::size_of_val(&off) as libc::socklen_t;
        // SAFETY: an option and its size. What is no socket, or does not linger, refuses or ignores it.
        unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const off).cast(), size) };
    }
}
