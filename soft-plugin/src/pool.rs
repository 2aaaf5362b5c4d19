//! The I/O threads: each serves its comms over one edge-triggered epoll, and sleeps when none has anything to move.
//! Knows comms only as things that take turns.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::comm::{Comm, Turn};
use crate::config::Config;

/// Epoll data of the wake-up eventfd; comm ids start at 1.
const WAKE: u64 = 0;
const EVENTS: usize = 64;

/// The threads of the process.
pub struct Pool {
    workers: Vec<Arc<Worker>>,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    last_id: u64,
}

#[derive(Default)]
struct Registry {
    comms: HashMap<u64, Arc<Comm>>,
    /// Comms of each direction (sends, receives), promised ones included.
    load: [usize; 2],
}

/// One I/O thread, as the others see it.
pub struct Worker {
    epoll: OwnedFd,
    wake: OwnedFd,
    inbox: Mutex<Vec<u64>>,
    has_mail: AtomicBool,
    asleep: AtomicBool,
    registry: Mutex<Registry>,
    spin: Duration,
}

/// The pool, started on first use.
pub fn get(config: &Config) -> io::Result<&'static Pool> {
    static POOL: OnceLock<Pool> = OnceLock::new();
    static START: Mutex<()> = Mutex::new(());
    let _once = START.lock();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let pool = Pool::start(config)?;
    Ok(POOL.get_or_init(|| pool))
}

impl Pool {
    fn start(config: &Config) -> io::Result<Pool> {
        let mut workers = Vec::new();
        for number in 0..config.threads {
            let worker = Arc::new(Worker::new(Duration::from_micros(config.spin_us))?);
            let own = worker.clone();
            let started = std::thread::Builder::new().name(format!("uccl-soft-{number}")).spawn(move || {
                block_signals();
                own.run();
            });
            match started {
                Ok(_) => workers.push(worker),
                Err(error) if workers.is_empty() => return Err(error),
                Err(error) => {
                    crate::logger::warn(&format!(
                        "only {} of {} I/O threads could be started: {error}",
                        workers.len(),
                        config.threads
                    ));
                    break;
                }
            }
        }
        Ok(Pool { workers, book: Mutex::new(Book::default()) })
    }

    /// The thread and the id of a new comm: the one with the fewest comms of that direction, then with the fewest at all.
    pub fn assign(&self, receives: bool) -> (Arc<Worker>, u64) {
        let mut book = self.book.lock();
        book.last_id += 1;
        let load = |w: &Arc<Worker>| {
            let load = w.registry.lock().load;
            (load[usize::from(receives)], load[0] + load[1])
        };
        // `threads` is at least one.
        let best = self.workers.iter().min_by_key(|w| load(w)).unwrap_or(&self.workers[0]);
        best.registry.lock().load[usize::from(receives)] += 1;
        (best.clone(), book.last_id)
    }
}

fn block_signals() {
    // SAFETY: a local signal set; only this thread's mask changes.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
    }
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor just created, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Worker {
    fn new(spin: Duration) -> io::Result<Worker> {
        // SAFETY: plain system calls without pointers.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: as above.
        let wake = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let worker = Worker {
            epoll,
            wake,
            inbox: Mutex::new(Vec::new()),
            has_mail: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            registry: Mutex::new(Registry::default()),
            spin,
        };
        worker.watch(worker.wake.as_raw_fd(), libc::EPOLLIN, WAKE)?;
        Ok(worker)
    }

    fn watch(&self, fd: i32, events: i32, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: (events | libc::EPOLLET) as u32, u64: data };
        // SAFETY: `event` is valid for the call.
        if unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Takes a comm over.
    pub fn adopt(&self, comm: &Arc<Comm>, fd: i32) -> io::Result<()> {
        self.registry.lock().comms.insert(comm.id, comm.clone());
        let direction = if comm.is(true) { libc::EPOLLIN } else { libc::EPOLLOUT };
        self.watch(fd, direction | libc::EPOLLRDHUP, comm.id).inspect_err(|_| self.drop_comm(comm.id, fd, comm.is(true)))
    }

    /// Forgets a comm. A turn that is under way ends before the caller (who holds the comm's I/O lock) gets here.
    pub fn drop_comm(&self, id: u64, fd: i32, receives: bool) {
        // SAFETY: a plain system call; the event is not used for a deletion.
        unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
        let mut registry = self.registry.lock();
        registry.load[usize::from(receives)] -= 1;
        registry.comms.remove(&id);
    }

    /// Asks for a turn of a comm.
    pub fn submit(&self, id: u64) {
        self.inbox.lock().push(id);
        self.has_mail.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight bytes to our eventfd.
            unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }

    fn run(&self) {
        let mut ready: VecDeque<Arc<Comm>> = VecDeque::new();
        let mut mail = Vec::new();
        loop {
            self.collect_mail(&mut mail, &mut ready);
            for _ in 0..ready.len() {
                let Some(comm) = ready.pop_front() else { break };
                comm.scheduled.store(false, Ordering::Relaxed);
                let turn = catch_unwind(AssertUnwindSafe(|| comm.serve())).unwrap_or_else(|_| {
                    comm.fail_now("a defect in the software plugin");
                    Turn::Wait
                });
                if turn == Turn::More {
                    schedule(&mut ready, &comm);
                }
            }
            let block = ready.is_empty() && !self.has_mail.load(Ordering::Acquire) && !self.spin_finds_work(&mut ready);
            if block {
                self.asleep.store(true, Ordering::SeqCst);
                // Mail that came before the flag was visible rang no bell.
                let timeout = if self.has_mail.load(Ordering::SeqCst) { 0 } else { -1 };
                self.poll(timeout, &mut ready);
                self.asleep.store(false, Ordering::SeqCst);
            } else {
                self.poll(0, &mut ready);
            }
        }
    }

    fn collect_mail(&self, mail: &mut Vec<u64>, ready: &mut VecDeque<Arc<Comm>>) {
        if !self.has_mail.swap(false, Ordering::SeqCst) {
            return;
        }
        std::mem::swap(mail, &mut *self.inbox.lock());
        let registry = self.registry.lock();
        for id in mail.drain(..) {
            if let Some(comm) = registry.comms.get(&id) {
                schedule(ready, comm);
            }
        }
    }

    fn spin_finds_work(&self, ready: &mut VecDeque<Arc<Comm>>) -> bool {
        if self.spin.is_zero() {
            return false;
        }
        let end = Instant::now() + self.spin;
        while Instant::now() < end {
            self.poll(0, ready);
            if !ready.is_empty() || self.has_mail.load(Ordering::Acquire) {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn poll(&self, timeout: i32, ready: &mut VecDeque<Arc<Comm>>) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        // SAFETY: room for EVENTS events.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), EVENTS as i32, timeout) };
        // An error can only be an interruption; there is nothing to collect then.
        let count = usize::try_from(count).unwrap_or(0);
        if count == 0 {
            return;
        }
        let registry = self.registry.lock();
        for event in &events[..count] {
            let (data, bits) = (event.u64, event.events);
            if data == WAKE {
                continue;
            }
            if let Some(comm) = registry.comms.get(&data) {
                comm.events.fetch_or(bits, Ordering::AcqRel);
                schedule(ready, comm);
            }
        }
    }
}

fn schedule(ready: &mut VecDeque<Arc<Comm>>, comm: &Arc<Comm>) {
    if !comm.scheduled.swap(true, Ordering::Relaxed) {
        ready.push_back(comm.clone());
    }
}
