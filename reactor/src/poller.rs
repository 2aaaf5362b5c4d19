//! An epoll set with tokens and time-outs of microsecond precision. Knows nothing of the descriptors' owners.

use std::io;
use std::ops::BitOr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The events to report for a descriptor; combine with `|`. Errors and full hang-ups are always reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest(u32);

impl Interest {
    /// Nothing but errors and full hang-ups.
    pub const NONE: Interest = Interest(0);
    /// There are bytes to read, or a connection to accept.
    pub const READ: Interest = Interest(libc::EPOLLIN as u32);
    /// There is room to write.
    pub const WRITE: Interest = Interest(libc::EPOLLOUT as u32);
    /// The peer will send no more.
    pub const HANG_UP: Interest = Interest(libc::EPOLLRDHUP as u32);
    /// Edge-triggered: report changes only.
    pub const EDGE: Interest = Interest(libc::EPOLLET as u32);
    /// Report once, then nothing, not even errors and hang-ups, until the descriptor is modified.
    pub const ONCE: Interest = Interest(libc::EPOLLONESHOT as u32);
}

impl BitOr for Interest {
    type Output = Interest;

    fn bitor(self, other: Interest) -> Interest {
        Interest(self.0 | other.0)
    }
}

/// An event of one descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    token: u64,
    bits: u32,
}

impl Event {
    /// The token that the descriptor was added with.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// A read will not block: there is data, an end or an error.
    pub fn readable(&self) -> bool {
        self.has(libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR)
    }

    /// A write will not block: there is room or an error.
    pub fn writable(&self) -> bool {
        self.has(libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR)
    }

    /// The peer has closed at least its direction, or the descriptor has an error.
    pub fn hung_up(&self) -> bool {
        self.has(libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR)
    }

    fn has(&self, bits: libc::c_int) -> bool {
        self.bits & bits as u32 != 0
    }
}

/// Room for the events of one wait.
pub struct Events {
    list: Vec<libc::epoll_event>,
    filled: usize,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Events {
    /// Room for `capacity` events per wait, at least one; further events come with the next wait.
    pub fn with_capacity(capacity: usize) -> Events {
        Events { list: vec![libc::epoll_event { events: 0, u64: 0 }; capacity.clamp(1, 1 << 16)], filled: 0 }
    }

    /// The events of the last wait.
    pub fn iter(&self) -> impl Iterator<Item = Event> + '_ {
        self.list[..self.filled].iter().map(|e| Event { token: e.u64, bits: e.events })
    }

    /// Number of events of the last wait.
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether the last wait ended without an event.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }
}

/// An epoll set. Any thread may add, modify, remove and wait.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
    /// `epoll_pwait2` has failed: the kernel is too old, or a filter forbids it.
    milliseconds_only: AtomicBool,
}

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// The process or the system is out of descriptors.
    pub fn new() -> io::Result<Poller> {
        // SAFETY: a plain system call.
        let epoll = crate::owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        Ok(Poller { epoll, milliseconds_only: AtomicBool::new(false) })
    }

    /// Watches a descriptor, until [`Poller::remove`] or until its last duplicate is closed.
    ///
    /// # Errors
    /// The descriptor is in the set already, is not open or cannot be watched, or the limit of watches is reached.
    pub fn add(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, Some((token, interest)))
    }

    /// Changes token and interest of a watched descriptor.
    ///
    /// # Errors
    /// The descriptor is not in the set.
    pub fn modify(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, Some((token, interest)))
    }

    /// Stops watching a descriptor. Events that another thread has already collected may still name its token.
    ///
    /// # Errors
    /// The descriptor is not in the set.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, None)
    }

    fn control(&self, operation: libc::c_int, fd: RawFd, entry: Option<(u64, Interest)>) -> io::Result<()> {
        let mut event = entry.map(|(token, interest)| libc::epoll_event { events: interest.0, u64: token });
        let event = event.as_mut().map_or(ptr::null_mut(), ptr::from_mut);
        // SAFETY: `event` is null, which a deletion may pass, or valid for the call.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits for events, at most for `timeout` (`None`: for ever), and stores them in `events`. A signal ends the wait early without
    /// an event. If only whole milliseconds are possible, the time-out is rounded up.
    ///
    /// # Errors
    /// The kernel refuses every wait call, which does not happen to a working poller.
    pub fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        events.filled = 0;
        let fine = timeout.filter(|t| t.subsec_nanos() % 1_000_000 != 0);
        if let (Some(timeout), false) = (fine, self.milliseconds_only.load(Ordering::Relaxed)) {
            match collect(self.wait_fine(events, timeout)) {
                Ok(filled) => {
                    events.filled = filled;
                    return Ok(());
                }
                // A system call filter may return any error: the older call decides.
                Err(_) => {
                    events.filled = collect(self.wait_coarse(events, Some(timeout)))?;
                    self.milliseconds_only.store(true, Ordering::Relaxed);
                    return Ok(());
                }
            }
        }
        events.filled = collect(self.wait_coarse(events, timeout))?;
        Ok(())
    }

    fn wait_fine(&self, events: &mut Events, timeout: Duration) -> libc::c_long {
        let limit = libc::timespec { tv_sec: timeout.as_secs().min(1 << 30) as _, tv_nsec: timeout.subsec_nanos().into() };
        let (list, room) = (events.list.as_mut_ptr(), events.list.len() as libc::c_int);
        let no_mask: *const libc::sigset_t = ptr::null();
        // SAFETY: `list` has `room` entries, `limit` lives through the call, and a null mask keeps the signal mask. Called by
        // number: only recent C libraries have a function for it.
        unsafe { libc::syscall(libc::SYS_epoll_pwait2, self.epoll.as_raw_fd(), list, room, &raw const limit, no_mask, 0usize) }
    }

    fn wait_coarse(&self, events: &mut Events, timeout: Option<Duration>) -> libc::c_long {
        let limit = match timeout {
            None => -1,
            Some(t) => libc::c_int::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX),
        };
        let (list, room) = (events.list.as_mut_ptr(), events.list.len() as libc::c_int);
        // SAFETY: `list` has `room` entries.
        libc::c_long::from(unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), list, room, limit) })
    }
}

/// The number of events of a wait; an interruption counts as none.
fn collect(result: libc::c_long) -> io::Result<usize> {
    usize::try_from(result).or_else(|_| match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        error => Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Waker;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    const SOON: Option<Duration> = Some(Duration::from_secs(20));

    fn tokens(poller: &Poller, timeout: Option<Duration>) -> Vec<u64> {
        let mut events = Events::with_capacity(8);
        poller.wait(&mut events, timeout).unwrap();
        assert_eq!(events.is_empty(), events.iter().count() == 0);
        assert_eq!(events.len(), events.iter().count());
        events.iter().map(|e| e.token()).collect()
    }

    #[test]
    fn tokens_follow_their_descriptors() {
        let poller = Poller::new().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        poller.add(far.as_raw_fd(), u64::MAX, Interest::READ).unwrap();
        assert!(poller.add(far.as_raw_fd(), 1, Interest::READ).is_err(), "it is in the set");
        assert!(tokens(&poller, Some(Duration::ZERO)).is_empty());
        near.write_all(b"x").unwrap();
        assert_eq!(tokens(&poller, SOON), [u64::MAX]);
        poller.modify(far.as_raw_fd(), 7, Interest::READ | Interest::WRITE).unwrap();
        assert_eq!(tokens(&poller, None), [7]);
        poller.remove(far.as_raw_fd()).unwrap();
        assert!(poller.remove(far.as_raw_fd()).is_err(), "it is not in the set");
        assert!(tokens(&poller, Some(Duration::from_micros(10))).is_empty());
    }

    #[test]
    fn events_have_the_right_flags() {
        let poller = Poller::new().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        poller.add(far.as_raw_fd(), 3, Interest::WRITE | Interest::HANG_UP | Interest::EDGE).unwrap();
        let mut events = Events::with_capacity(0);
        poller.wait(&mut events, SOON).unwrap();
        let first = events.iter().next().unwrap();
        assert!(first.writable() && !first.readable() && !first.hung_up());
        poller.wait(&mut events, Some(Duration::ZERO)).unwrap();
        assert!(events.is_empty(), "edges are reported once");
        drop(near);
        poller.wait(&mut events, SOON).unwrap();
        let second = events.iter().next().unwrap();
        assert!(second.hung_up() && second.readable());
    }

    #[test]
    fn a_wait_lasts_for_its_time_out() {
        let poller = Poller::new().unwrap();
        for micros in [0, 1, 300, 1000, 2500, 20_000] {
            let (start, limit) = (Instant::now(), Duration::from_micros(micros));
            assert!(tokens(&poller, Some(limit)).is_empty());
            assert!(start.elapsed() >= limit, "{micros} us ended after {:?}", start.elapsed());
        }
    }

    #[test]
    fn a_waker_ends_a_wait_until_it_is_drained() {
        let (poller, waker) = (Poller::new().unwrap(), Waker::new().unwrap());
        poller.add(waker.fd(), 0, Interest::READ).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(10));
                waker.wake();
            });
            assert_eq!(tokens(&poller, None), [0]);
        });
        waker.wake();
        assert_eq!(tokens(&poller, Some(Duration::ZERO)), [0]);
        waker.drain();
        waker.drain();
        assert!(tokens(&poller, Some(Duration::ZERO)).is_empty());
    }
}
