//! The thread on which all set-up calls of a foreign plugin run, one at a time: listen, connect, accept, registration and close. Such a
//! call may take as long as another program likes, so a caller waits with a limit and may leave it behind: what the call uses belongs
//! to its job, which lives until the call has returned. Knows nothing of what the jobs do.

use crate::status::{err, Error, ErrorKind, Result};
use process::{Condvar, Mutex, MutexGuard};
use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A call that runs longer has stalled: callers stop waiting, and new calls are refused until it returns.
/// In tests shorter, but longer than a loaded machine keeps a thread from running.
const LIMIT: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 5 });

/// The same on a thread that serves several plugins: an engine's thread for incoming connections.
pub(crate) const IMPATIENT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 2 });

/// How long a caller waits for closes.
const SETTLE: Duration = Duration::from_secs(1);

/// Tasks that are due so soon are polled together.
const TOGETHER: Duration = Duration::from_micros(200);

/// A call that is polled: returns the pause until the next poll, or `None` when it has ended.
pub(super) type Task = Box<dyn FnMut() -> Option<Duration> + Send>;

type Work = Box<dyn FnOnce() + Send>;

struct Job {
    name: &'static str,
    number: u64,
    work: Work,
}

struct Polled {
    name: &'static str,
    task: Task,
    due: Instant,
}

/// The call that runs.
struct Running {
    name: &'static str,
    since: Instant,
    /// A line says that it has stalled.
    reported: bool,
}

#[derive(Default)]
struct State {
    /// Callers wait for these; they go first.
    calls: VecDeque<Job>,
    /// Closes and the ends of registrations, in their order.
    closes: VecDeque<Job>,
    /// A close runs.
    closing: bool,
    tasks: Vec<Polled>,
    /// How many more are being polled.
    polling: usize,
    running: Option<Running>,
    /// Numbers of jobs.
    last: u64,
    /// Its threads.
    started: bool,
    watched: bool,
    /// A caller did not wait until all closes had ended. None waits until they have.
    behind: bool,
}

/// The thread of a plugin, with its queue. It starts when it is first needed.
#[derive(Default)]
pub(super) struct PluginThread {
    name: OnceLock<String>,
    state: Mutex<State>,
    arrived: Condvar,
    ended: Condvar,
}

thread_local! {
    /// The address of the thread's queue.
    static HERE: Cell<usize> = const { Cell::new(0) };
    /// How long the thread's calls wait.
    static PATIENCE: Cell<Patience> = const { Cell::new(Patience { until: None, limit: LIMIT }) };
}

/// How long the calls of a thread wait at most, while this lives.
#[derive(Clone, Copy)]
struct Patience {
    /// A deadline.
    until: Option<Instant>,
    /// For a call that runs so long.
    limit: Duration,
}

/// Gives the calling thread its earlier patience back.
pub(crate) struct Limited(Patience, std::marker::PhantomData<*const ()>);

/// No call of the calling thread waits for a plugin's thread beyond `until`, while the result lives.
pub(crate) fn limited(until: Instant) -> Limited {
    let before = PATIENCE.get();
    let until = before.until.map_or(until, |earlier| earlier.min(until));
    Limited(PATIENCE.replace(Patience { until: Some(until), ..before }), std::marker::PhantomData)
}

/// The calling thread waits for no call of a plugin's that has run for longer than `limit`.
pub(crate) fn be_impatient(limit: Duration) {
    PATIENCE.set(Patience { limit, ..PATIENCE.get() });
}

impl Drop for Limited {
    fn drop(&mut self) {
        PATIENCE.set(self.0);
    }
}

impl PluginThread {
    /// `plugin`: its name, for messages.
    pub(super) fn named(&self, plugin: &str) -> &Self {
        self.name.get_or_init(|| plugin.to_owned());
        self
    }

    fn is_here(&'static self) -> bool {
        HERE.get() == std::ptr::from_ref(self) as usize
    }

    /// Runs a call on the thread and waits for its result, as long as the calling thread may.
    ///
    /// # Errors
    /// The call's. `Plugin` when it or the one before it stands still, `TimedOut` at the deadline of the calling thread: what it returns
    /// later is dropped. `Resource` without a thread.
    pub(super) fn call<R: Send + 'static>(
        &'static self,
        name: &'static str,
        work: impl FnOnce() -> Result<R> + Send + 'static,
    ) -> Result<R> {
        if self.is_here() {
            return work();
        }
        let result = Arc::new(Mutex::new(None));
        let place = result.clone();
        let patience = PATIENCE.get();
        let mut state = self.state.lock();
        if let Some(error) = self.exhausted(&mut state, patience) {
            return Err(refused(name, &error));
        }
        self.start(&mut state)?;
        let work = Box::new(move || {
            let result = work();
            *place.lock() = Some(result);
        });
        let number = state.number();
        state.calls.push_back(Job { name, number, work });
        self.arrived.notify_one();
        loop {
            if let Some(result) = result.lock().take() {
                return result;
            }
            if let Some(error) = self.exhausted(&mut state, patience) {
                let at = state.calls.iter().position(|job| job.number == number);
                let never_begun = at.and_then(|at| state.calls.remove(at));
                drop(state);
                // What it has ends here, without the lock.
                drop(never_begun);
                return Err(refused(name, &error));
            }
            let until = state.running.as_ref().map_or_else(Instant::now, |running| running.since) + patience.limit;
            self.ended.wait_until(&mut state, patience.until.map_or(until, |deadline| deadline.min(until)));
        }
    }

    /// Runs a close or the end of a registration after those before it. Does not wait.
    pub(super) fn close(&'static self, name: &'static str, work: impl FnOnce() + Send + 'static) {
        if self.is_here() {
            return work();
        }
        let mut state = self.state.lock();
        let number = state.number();
        state.closes.push_back(Job { name, number, work: Box::new(work) });
        if let Err(e) = self.start(&mut state) {
            // The next call tries again.
            log::warn!("closes of plugin {} wait: {e}", self.plugin());
        }
        self.arrived.notify_one();
    }

    /// Polls a task until it has ended.
    ///
    /// # Errors
    /// `Resource` without a thread.
    pub(super) fn poll(&'static self, name: &'static str, task: Task) -> Result<()> {
        let mut state = self.state.lock();
        self.start(&mut state)?;
        state.tasks.push(Polled { name, task, due: Instant::now() });
        self.arrived.notify_one();
        Ok(())
    }

    /// Waits until the closes have ended, for a short time, and not again while they take longer.
    pub(super) fn settle(&'static self) {
        let mut state = self.state.lock();
        if self.is_here() || state.behind {
            return;
        }
        let until = Instant::now() + SETTLE;
        while state.closing || !state.closes.is_empty() {
            if Instant::now() >= until {
                state.behind = true;
                self.watch(&mut state);
                return;
            }
            self.ended.wait_until(&mut state, until);
        }
    }

    /// Which call has stalled, if one has.
    pub(super) fn stands_still(&'static self) -> Option<Error> {
        self.standing(&mut self.state.lock())
    }

    /// Number of tasks that have not ended.
    #[cfg(test)]
    pub(super) fn tasks(&self) -> usize {
        let state = self.state.lock();
        state.tasks.len() + state.polling
    }

    fn plugin(&self) -> &str {
        self.name.get().map_or("", String::as_str)
    }

    fn standing(&'static self, state: &mut State) -> Option<Error> {
        self.runs_longer(state, LIMIT)
    }

    /// Why a caller with this patience waits no longer, if so.
    fn exhausted(&'static self, state: &mut State, patience: Patience) -> Option<Error> {
        let late = patience.until.is_some_and(|until| Instant::now() >= until);
        let standing = self.runs_longer(state, if late { Duration::ZERO } else { patience.limit });
        let timed_out = |e: Error| Error::new(if late { ErrorKind::TimedOut } else { e.kind() }, format_args!("{e}"));
        standing.map(timed_out).or_else(|| late.then(|| err!(TimedOut, "plugin {}: no time is left", self.plugin())))
    }

    fn runs_longer(&'static self, state: &mut State, limit: Duration) -> Option<Error> {
        let running = state.running.as_ref()?;
        let time = running.since.elapsed();
        if time < limit {
            return None;
        }
        let error = err!(
            Plugin,
            "plugin {}: {} has not returned for {:.1} s (is the receive manager frozen? see docs/tcpx.md)",
            self.plugin(),
            running.name,
            time.as_secs_f32()
        );
        if time >= LIMIT {
            self.report(state);
        }
        Some(error)
    }

    /// Says once that the running call has stalled.
    fn report(&'static self, state: &mut State) {
        let Some(running) = state.running.as_mut().filter(|running| !running.reported) else { return };
        running.reported = true;
        log::warn!(
            "plugin {}: {} has not returned for {:.1} s: nothing is set up over the plugin until it returns, and what is closed keeps its memory (is the receive manager frozen? see docs/tcpx.md)",
            self.plugin(),
            running.name,
            running.since.elapsed().as_secs_f32()
        );
    }

    fn start(&'static self, state: &mut State) -> Result<()> {
        if !state.started {
            let spawned = process::thread::spawn("uccl-plugin", move || self.run());
            spawned.map_err(|e| err!(Resource, "cannot start the thread of plugin {}: {e}", self.plugin()))?;
            state.started = true;
        }
        Ok(())
    }

    fn run(&'static self) {
        HERE.set(std::ptr::from_ref(self) as usize);
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.calls.pop_front() {
                self.perform(&mut state, job.name, job.work);
                continue;
            }
            let polled = self.poll_due(&mut state);
            if let Some(job) = state.closes.pop_front() {
                state.closing = true;
                self.perform(&mut state, job.name, job.work);
                state.closing = false;
                self.ended.notify_all();
                continue;
            }
            state.behind = false;
            if polled || !state.calls.is_empty() {
                continue;
            }
            match state.tasks.iter().map(|task| task.due).min() {
                Some(due) => drop(self.arrived.wait_until(&mut state, due)),
                None => self.arrived.wait(&mut state),
            }
        }
    }

    /// Polls the tasks that are due. Whether any was.
    fn poll_due(&'static self, state: &mut MutexGuard<'_, State>) -> bool {
        let now = Instant::now();
        if !state.tasks.iter().any(|task| task.due <= now) {
            return false;
        }
        let all = std::mem::take(&mut state.tasks);
        let (due, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|task| task.due <= now + TOGETHER);
        (state.tasks, state.polling) = (rest, due.len());
        for mut polled in due {
            let mut pause = None;
            self.perform(state, polled.name, || {
                pause = (polled.task)();
                if pause.is_none() {
                    // What it has goes here, without the lock.
                    polled.task = Box::new(|| None);
                }
            });
            if let Some(pause) = pause {
                polled.due = Instant::now() + pause;
                state.tasks.push(polled);
            }
            state.polling -= 1;
        }
        true
    }

    /// Runs a call without the lock.
    fn perform(&'static self, state: &mut MutexGuard<'_, State>, name: &'static str, work: impl FnOnce()) {
        state.running = Some(Running { name, since: Instant::now(), reported: false });
        let panicked = MutexGuard::unlocked(state, || catch_unwind(AssertUnwindSafe(work)).is_err());
        if panicked {
            log::error!("plugin {}: a defect of the library in {name}; the log has its place", self.plugin());
        }
        if let Some(Running { since, reported: true, .. }) = state.running.take() {
            log::info!("plugin {}: {name} has returned after {:.1} s", self.plugin(), since.elapsed().as_secs_f32());
        }
        self.ended.notify_all();
    }

    /// Starts a thread that says when the running call has stalled, since no caller may look.
    fn watch(&'static self, state: &mut State) {
        if !state.watched {
            state.watched = process::thread::spawn("uccl-plugin-watch", move || self.run_watch()).is_ok();
        }
    }

    fn run_watch(&'static self) {
        let mut state = self.state.lock();
        while state.behind {
            let until = match &state.running {
                Some(running) if !running.reported => running.since + LIMIT,
                _ => Instant::now() + LIMIT,
            };
            self.ended.wait_until(&mut state, until);
            self.standing(&mut state);
        }
        state.watched = false;
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

fn refused(name: &str, why: &Error) -> Error {
    Error::new(why.kind(), format_args!("{name} was given up: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{channel, Receiver};

    fn thread() -> &'static PluginThread {
        let thread: &'static PluginThread = Box::leak(Box::default());
        thread.named("one")
    }

    /// Something whose end is seen.
    struct Ends(Arc<AtomicU32>);

    impl Drop for Ends {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn stand_still(thread: &'static PluginThread, receiver: Receiver<()>) {
        let (runs, begun) = channel();
        thread.close("closeRecv", move || {
            let _ = (runs.send(()), receiver.recv());
        });
        begun.recv().expect("it begins");
    }

    #[test]
    fn a_call_behind_one_that_stands_still_is_refused_until_that_returns() {
        let (thread, (goes_on, stands)) = (thread(), channel());
        assert_eq!(thread.call("listen", || Ok(1)), Ok(1));
        stand_still(thread, stands);
        let begun = Arc::new(AtomicU32::new(0));
        let ends = Ends(begun.clone());
        let error = thread.call("listen", move || Ok(ends.0.clone())).map(|_| ()).expect_err("it stands still");
        assert!(
            error.kind() == ErrorKind::Plugin && error.to_string().contains("one: closeRecv has not returned for "),
            "{error}"
        );
        assert_eq!(begun.load(Ordering::SeqCst), 1, "what is refused is dropped");
        // From now on at once.
        let before = Instant::now();
        assert!(thread.call("listen", || Ok(2)).is_err());
        assert!(before.elapsed() < LIMIT);
        goes_on.send(()).expect("its receiver");
        thread.settle();
        assert_eq!((thread.call("listen", || Ok(3)), thread.stands_still()), (Ok(3), None));
    }

    #[test]
    fn a_caller_waits_no_longer_than_its_deadline() {
        let (thread, (goes_on, stands)) = (thread(), channel());
        assert_eq!(thread.call("listen", || Ok(1)), Ok(1));
        let before = Instant::now();
        stand_still(thread, stands);
        {
            let _limited = limited(before + LIMIT / 10);
            let _later = limited(before + 2 * LIMIT);
            let error = thread.call("listen", || Ok(1)).expect_err("it stands still");
            assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains("closeRecv has not returned"), "{error}");
            assert!(before.elapsed() < LIMIT / 2, "{:?}", before.elapsed());
            assert!(thread.call("listen", || Ok(1)).is_err(), "no time is left");
        }
        // A thread that serves others too waits less, and then at once.
        let impatient = std::thread::spawn(move || {
            be_impatient(IMPATIENT);
            let waited = [0; 3].map(|_| {
                let before = Instant::now();
                assert_eq!(thread.call("listen", || Ok(1)).expect_err("it stands still").kind(), ErrorKind::Plugin);
                before.elapsed()
            });
            assert!(waited[0] < LIMIT && waited[1..].iter().all(|waited| *waited < IMPATIENT / 4), "{waited:?}");
        });
        impatient.join().expect("no panic");
        assert!(thread.call("listen", || Ok(1)).is_err(), "the limit of other callers");
        assert!(before.elapsed() >= LIMIT);
        goes_on.send(()).expect("its receiver");
        thread.settle();
        let _limited = limited(Instant::now() + LIMIT);
        assert_eq!(thread.call("listen", || Ok(3)), Ok(3));
    }

    #[test]
    fn the_result_of_a_call_that_is_left_behind_is_dropped() {
        let (thread, (goes_on, stands)) = (thread(), channel::<()>());
        let ended = Arc::new(AtomicU32::new(0));
        let ends = Ends(ended.clone());
        let result = thread.call("regMr", move || {
            let _ = stands.recv();
            Ok(ends)
        });
        assert!(result.is_err_and(|e| e.to_string().contains("regMr has not returned")));
        assert_eq!(ended.load(Ordering::SeqCst), 0);
        drop(goes_on);
        while thread.call("listen", || Ok(())).is_err() {}
        assert_eq!(ended.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn closes_keep_their_order_and_are_waited_for_once() {
        let (thread, (goes_on, stands)) = (thread(), channel());
        stand_still(thread, stands);
        let order = Arc::new(Mutex::new(Vec::new()));
        for number in 0..4 {
            let order = order.clone();
            thread.close("closeSend", move || order.lock().push(number));
        }
        thread.settle();
        let before = Instant::now();
        (0..100).for_each(|_| thread.settle());
        assert!(before.elapsed() < SETTLE, "it waits each time");
        assert!(order.lock().is_empty());
        goes_on.send(()).expect("its receiver");
        while order.lock().len() < 4 {
            std::thread::yield_now();
        }
        assert_eq!(*order.lock(), [0, 1, 2, 3]);
    }

    #[test]
    fn tasks_are_polled_until_they_end_even_after_a_panic() {
        let thread = thread();
        let polls = Arc::new(AtomicU32::new(0));
        let counted = polls.clone();
        let task = move || (counted.fetch_add(1, Ordering::SeqCst) < 4).then_some(Duration::from_micros(100));
        thread.poll("accept", Box::new(|| panic!("in a task"))).expect("thread");
        thread.poll("accept", Box::new(task)).expect("thread");
        while thread.tasks() > 0 {
            std::thread::yield_now();
        }
        thread.call("listen", || Ok(())).expect("it goes on");
        assert_eq!(polls.load(Ordering::SeqCst), 5);
    }
}
