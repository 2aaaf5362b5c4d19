//! The I/O threads of this process: each serves its members over one edge-triggered poller, and sleeps when none has bytes
//! to move. The first one also runs the periodic chores. Knows members only as things that take turns.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use process::thread::Yields;
use process::{Mutex, PerProcess};
use reactor::{Events, Interest, Poller, Waker};

use crate::adaptive_spin::AdaptiveSpin;
use crate::config::Config;
use crate::quantum::Turn;

/// Token of the waker; members' numbers start at 1.
const WAKE: u64 = 0;
const EVENTS: usize = 64;
/// Work after which a thread yields its core. Shorter turns cost large transfers: every 100 us, a tenth of their rate on two cores.
const YIELDS: Duration = Duration::from_micros(300);
/// With so many cores the threads of an application and of its connections find one beside the I/O threads.
const ROOMY: usize = 8;

/// A comm as its I/O thread sees it.
pub trait Member: Send + Sync {
    /// Runs one turn.
    fn serve(&self) -> Turn;
    /// Fails it after its turn panicked.
    fn fail_now(&self, why: &str);
    /// The kernel reported an event; `hung_up`: a hang-up or an error.
    fn report(&self, hung_up: bool);
    /// Set while it is in its thread's list of members to serve.
    fn scheduled(&self) -> &AtomicBool;
}

/// Periodic work: does what is due, and returns when it is due again, if ever.
pub type Chores = fn() -> Option<Duration>;

/// The threads of the process.
pub struct Pool {
    workers: Vec<Arc<Worker>>,
    /// The last number assigned.
    last: Mutex<u64>,
}

#[derive(Default)]
struct Registry {
    members: HashMap<u64, Arc<dyn Member>>,
    /// Members of each direction (senders, receivers), including those assigned but not yet added.
    load: [usize; 2],
}

/// One I/O thread, as other threads see it.
pub struct Worker {
    poller: Poller,
    waker: Waker,
    inbox: Mutex<Vec<u64>>,
    has_mail: AtomicBool,
    asleep: AtomicBool,
    registry: Mutex<Registry>,
    shared: Arc<Shared>,
    chores: Option<Chores>,
}

/// State that the threads share.
struct Shared {
    /// How long each polls before it sleeps; see [`AdaptiveSpin`].
    spin: [Duration; 2],
    /// Threads that are not asleep, and how many of them may poll without crowding the cores.
    awake: AtomicUsize,
    few: usize,
    /// The threads compete for the cores with those that wait for small messages.
    yields: bool,
}

/// A member's assignment to its I/O thread.
pub struct Assignment {
    worker: Arc<Worker>,
    /// Its number.
    pub number: u64,
    receives: bool,
}

/// The pool of this process, started on first use.
pub fn get(config: &Config, chores: Chores) -> io::Result<&'static Pool> {
    static POOL: PerProcess<Mutex<Option<&'static Pool>>> = PerProcess::new(Mutex::default);
    let mut pool = POOL.get().lock();
    if let Some(pool) = *pool {
        return Ok(pool);
    }
    Ok(*pool.insert(Box::leak(Box::new(Pool::start(config, chores)?))))
}

impl Pool {
    fn start(config: &Config, chores: Chores) -> io::Result<Pool> {
        let mut workers = Vec::new();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let spin = config.spin_us.map(Duration::from_micros);
        let shared = Arc::new(Shared { spin, awake: AtomicUsize::new(0), few: (cores / 4).max(1), yields: config.cores < ROOMY });
        for number in 0..config.threads {
            match Worker::launch(number, shared.clone(), (number == 0).then_some(chores)) {
                Ok(worker) => workers.push(worker),
                Err(error) if workers.is_empty() => return Err(error),
                Err(error) => {
                    crate::logger::warn(&format!("only {number} of {} I/O threads: {error}", config.threads));
                    break;
                }
            }
        }
        Ok(Pool { workers, last: Mutex::new(WAKE) })
    }

    /// Assigns a new member to the thread that has the fewest of its direction, then the fewest overall.
    pub fn assign(&self, receives: bool) -> Assignment {
        let mut last = self.last.lock();
        *last += 1;
        let load = |w: &Arc<Worker>| {
            let load = w.registry.lock().load;
            (load[usize::from(receives)], load[0] + load[1])
        };
        // `threads` is at least one.
        let best = self.workers.iter().min_by_key(|w| load(w)).unwrap_or(&self.workers[0]);
        best.registry.lock().load[usize::from(receives)] += 1;
        Assignment { worker: best.clone(), number: *last, receives }
    }

    /// Wakes the first thread because the chores have new work.
    pub fn remind(&self) {
        self.workers[0].nudge();
    }
}

impl Assignment {
    /// Hands the member and its socket over to the thread.
    pub fn add(&self, member: Arc<dyn Member>, fd: i32) -> io::Result<()> {
        self.worker.registry.lock().members.insert(self.number, member);
        self.watch(fd).inspect_err(|_| self.remove(fd))
    }

    /// Serves the member after events of another socket too.
    pub fn watch(&self, fd: i32) -> io::Result<()> {
        let direction = if self.receives { Interest::READ } else { Interest::WRITE };
        self.worker.poller.add(fd, self.number, direction | Interest::HANG_UP | Interest::EDGE)
    }

    /// Ends [`Assignment::watch`].
    pub fn unwatch(&self, fd: i32) {
        let _ = self.worker.poller.remove(fd);
    }

    /// Removes the member from its thread, once. A running turn ends before the caller (who holds the I/O lock) gets here.
    pub fn remove(&self, fd: i32) {
        // It is not in the set if adding it failed.
        let _ = self.worker.poller.remove(fd);
        let mut registry = self.worker.registry.lock();
        registry.load[usize::from(self.receives)] -= 1;
        registry.members.remove(&self.number);
    }

    /// Schedules a turn.
    pub fn schedule(&self) {
        self.worker.inbox.lock().push(self.number);
        self.worker.nudge();
    }
}

impl Worker {
    fn launch(number: usize, shared: Arc<Shared>, chores: Option<Chores>) -> io::Result<Arc<Worker>> {
        let worker = Arc::new(Worker {
            poller: Poller::new()?,
            waker: Waker::new()?,
            inbox: Mutex::new(Vec::new()),
            has_mail: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            registry: Mutex::new(Registry::default()),
            shared,
            chores,
        });
        worker.poller.add(worker.waker.fd(), WAKE, Interest::READ | Interest::EDGE)?;
        let own = worker.clone();
        process::thread::spawn(format!("uccl-soft-{number}"), move || own.run())?;
        Ok(worker)
    }

    /// Wakes the thread for new mail or chores.
    fn nudge(&self) {
        self.has_mail.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.waker.wake();
        }
    }

    fn run(&self) {
        let mut ready: VecDeque<Arc<dyn Member>> = VecDeque::new();
        let (mut mail, mut events) = (Vec::new(), Events::with_capacity(EVENTS));
        let mut spin = AdaptiveSpin::new(self.shared.spin);
        let mut yields = self.shared.yields.then(|| Yields::new(Instant::now(), YIELDS));
        self.shared.awake.fetch_add(1, Ordering::Relaxed);
        loop {
            self.collect_mail(&mut mail, &mut ready);
            for _ in 0..ready.len() {
                let Some(member) = ready.pop_front() else { break };
                member.scheduled().store(false, Ordering::Relaxed);
                let turn = catch_unwind(AssertUnwindSafe(|| member.serve())).unwrap_or_else(|_| {
                    member.fail_now("internal error in the software plugin (a panic)");
                    Turn::Wait
                });
                if turn == Turn::More {
                    schedule(&mut ready, &member);
                }
                if let Some(yields) = &mut yields {
                    yields.pass(Instant::now());
                }
            }
            let idle = ready.is_empty() && !self.has_mail.load(Ordering::Acquire);
            if !idle {
                self.poll(Some(Duration::ZERO), &mut events, &mut ready);
                continue;
            }
            let begun = Instant::now();
            if !self.spin_finds_work(&spin, begun, &mut events, &mut ready) {
                self.sleep(&mut events, &mut ready);
            }
            spin.waited(begun.elapsed());
        }
    }

    fn sleep(&self, events: &mut Events, ready: &mut VecDeque<Arc<dyn Member>>) {
        let due = self.chores.and_then(|chores| catch_unwind(chores).unwrap_or(None));
        self.asleep.store(true, Ordering::SeqCst);
        // Mail that came before the flag was visible did not wake the thread.
        let timeout = if self.has_mail.load(Ordering::SeqCst) { Some(Duration::ZERO) } else { due };
        self.shared.awake.fetch_sub(1, Ordering::Relaxed);
        self.poll(timeout, events, ready);
        self.shared.awake.fetch_add(1, Ordering::Relaxed);
        self.asleep.store(false, Ordering::SeqCst);
    }

    fn collect_mail(&self, mail: &mut Vec<u64>, ready: &mut VecDeque<Arc<dyn Member>>) {
        if !self.has_mail.swap(false, Ordering::SeqCst) {
            return;
        }
        std::mem::swap(mail, &mut *self.inbox.lock());
        let registry = self.registry.lock();
        for number in mail.drain(..) {
            if let Some(member) = registry.members.get(&number) {
                schedule(ready, member);
            }
        }
    }

    fn spin_finds_work(
        &self,
        spin: &AdaptiveSpin,
        begun: Instant,
        events: &mut Events,
        ready: &mut VecDeque<Arc<dyn Member>>,
    ) -> bool {
        while begun.elapsed() < spin.limit(self.shared.awake.load(Ordering::Relaxed) > self.shared.few) {
            self.poll(Some(Duration::ZERO), events, ready);
            if !ready.is_empty() || self.has_mail.load(Ordering::Acquire) {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn poll(&self, timeout: Option<Duration>, events: &mut Events, ready: &mut VecDeque<Arc<dyn Member>>) {
        if let Err(error) = self.poller.wait(events, timeout) {
            static LINE: crate::logger::Limited = crate::logger::Limited::new();
            LINE.warn(&format!("an I/O thread cannot wait: {error}"));
            std::thread::sleep(Duration::from_millis(1));
        }
        if events.is_empty() {
            return;
        }
        let registry = self.registry.lock();
        for event in events.iter() {
            // The waker's token is not a member's number.
            if let Some(member) = registry.members.get(&event.token()) {
                member.report(event.hung_up());
                schedule(ready, member);
            }
        }
    }
}

fn schedule(ready: &mut VecDeque<Arc<dyn Member>>, member: &Arc<dyn Member>) {
    if !member.scheduled().swap(true, Ordering::Relaxed) {
        ready.push_back(member.clone());
    }
}
