//! The I/O threads of this process: each serves its members over one edge-triggered poller, and sleeps when none has anything
//! to move. The first one also does the chores that need a clock. Knows members only as things that take turns.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use process::{Mutex, PerProcess};
use reactor::{Events, Interest, Poller, Waker};

use crate::adaptive_spin::AdaptiveSpin;
use crate::config::Config;
use crate::quantum::Turn;

/// Token of the waker; members' numbers start at 1.
const WAKE: u64 = 0;
const EVENTS: usize = 64;

/// Something that takes turns on an I/O thread.
pub trait Member: Send + Sync {
    /// Serves it for a turn.
    fn serve(&self) -> Turn;
    /// Ends it after a panic of its turn.
    fn fail_now(&self, why: &str);
    /// The kernel reported something; `hung_up` when it was an end or an error.
    fn report(&self, hung_up: bool);
    /// Set while its thread has it in the list of members to serve.
    fn scheduled(&self) -> &AtomicBool;
}

/// Work that is due now and then: does it, and says when it is due again, if ever.
pub type Chores = fn() -> Option<Duration>;

/// The threads of the process.
pub struct Pool {
    workers: Vec<Arc<Worker>>,
    /// The number given last.
    last: Mutex<u64>,
}

#[derive(Default)]
struct Registry {
    members: HashMap<u64, Arc<dyn Member>>,
    /// Members of each direction (senders, receivers), promised ones included.
    load: [usize; 2],
}

/// One I/O thread, as the others see it.
pub struct Worker {
    poller: Poller,
    waker: Waker,
    inbox: Mutex<Vec<u64>>,
    has_mail: AtomicBool,
    asleep: AtomicBool,
    registry: Mutex<Registry>,
    crew: Arc<Crew>,
    chores: Option<Chores>,
}

/// What the threads know of each other.
struct Crew {
    /// How long each polls before it sleeps; see [`AdaptiveSpin`].
    spin: [Duration; 2],
    /// Threads that are not asleep, and how many of them leave cores to others even while they poll.
    awake: AtomicUsize,
    few: usize,
}

/// A member's place with its I/O thread.
pub struct Seat {
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
        let crew = Arc::new(Crew { spin, awake: AtomicUsize::new(0), few: (cores / 4).max(1) });
        for number in 0..config.threads {
            match Worker::launch(number, crew.clone(), (number == 0).then_some(chores)) {
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

    /// A seat for a new member: with the thread that has the fewest of that direction, then the fewest at all.
    pub fn assign(&self, receives: bool) -> Seat {
        let mut last = self.last.lock();
        *last += 1;
        let load = |w: &Arc<Worker>| {
            let load = w.registry.lock().load;
            (load[usize::from(receives)], load[0] + load[1])
        };
        // `threads` is at least one.
        let best = self.workers.iter().min_by_key(|w| load(w)).unwrap_or(&self.workers[0]);
        best.registry.lock().load[usize::from(receives)] += 1;
        Seat { worker: best.clone(), number: *last, receives }
    }

    /// Something was left that the chores will have to look after.
    pub fn remind(&self) {
        self.workers[0].nudge();
    }
}

impl Seat {
    /// Hands the member and its socket over to the thread.
    pub fn take(&self, member: Arc<dyn Member>, fd: i32) -> io::Result<()> {
        self.worker.registry.lock().members.insert(self.number, member);
        let direction = if self.receives { Interest::READ } else { Interest::WRITE };
        let interest = direction | Interest::HANG_UP | Interest::EDGE;
        self.worker.poller.add(fd, self.number, interest).inspect_err(|_| self.leave(fd))
    }

    /// The thread forgets the member, once. A turn that is under way ends before the caller (who holds its I/O lock) gets here.
    pub fn leave(&self, fd: i32) {
        // It is not in the set when adding it failed.
        let _ = self.worker.poller.remove(fd);
        let mut registry = self.worker.registry.lock();
        registry.load[usize::from(self.receives)] -= 1;
        registry.members.remove(&self.number);
    }

    /// Asks for a turn.
    pub fn ask(&self) {
        self.worker.inbox.lock().push(self.number);
        self.worker.nudge();
    }
}

impl Worker {
    fn launch(number: usize, crew: Arc<Crew>, chores: Option<Chores>) -> io::Result<Arc<Worker>> {
        let worker = Arc::new(Worker {
            poller: Poller::new()?,
            waker: Waker::new()?,
            inbox: Mutex::new(Vec::new()),
            has_mail: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            registry: Mutex::new(Registry::default()),
            crew,
            chores,
        });
        worker.poller.add(worker.waker.fd(), WAKE, Interest::READ | Interest::EDGE)?;
        let own = worker.clone();
        process::thread::spawn(format!("uccl-soft-{number}"), move || own.run())?;
        Ok(worker)
    }

    /// There is mail; also wakes a thread whose chores have changed.
    fn nudge(&self) {
        self.has_mail.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.waker.wake();
        }
    }

    fn run(&self) {
        let mut ready: VecDeque<Arc<dyn Member>> = VecDeque::new();
        let (mut mail, mut events) = (Vec::new(), Events::with_capacity(EVENTS));
        let mut spin = AdaptiveSpin::new(self.crew.spin);
        self.crew.awake.fetch_add(1, Ordering::Relaxed);
        loop {
            self.collect_mail(&mut mail, &mut ready);
            for _ in 0..ready.len() {
                let Some(member) = ready.pop_front() else { break };
                member.scheduled().store(false, Ordering::Relaxed);
                let turn = catch_unwind(AssertUnwindSafe(|| member.serve())).unwrap_or_else(|_| {
                    member.fail_now("a defect in the software plugin");
                    Turn::Wait
                });
                if turn == Turn::More {
                    schedule(&mut ready, &member);
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
        // Mail that came before the flag was visible rang no bell.
        let timeout = if self.has_mail.load(Ordering::SeqCst) { Some(Duration::ZERO) } else { due };
        self.crew.awake.fetch_sub(1, Ordering::Relaxed);
        self.poll(timeout, events, ready);
        self.crew.awake.fetch_add(1, Ordering::Relaxed);
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
        while begun.elapsed() < spin.limit(self.crew.awake.load(Ordering::Relaxed) > self.crew.few) {
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
            // The waker's token is no member's number.
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
