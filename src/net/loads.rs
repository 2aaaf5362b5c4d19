//! Loads each plugin once in a process. Others that want it meanwhile wait, each up to its own deadline; a load that takes longer is left
//! behind, and counts once it has ended. Knows nothing of plugins.

use crate::status::{bail, err, Result};
use process::{Condvar, Mutex};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The file of a plugin; `None` for the built-in one.
pub(super) type Name = Option<PathBuf>;

/// The second part of a load.
pub(super) enum Work<V> {
    /// In the caller's thread: it does not wait for other programs.
    Here(Box<dyn FnOnce() -> Result<V>>),
    /// In a thread of its own, which may be left behind. The name is for messages.
    Thread(String, Box<dyn FnOnce() -> Result<V> + Send>),
}

/// What was loaded, and what is being loaded.
pub(super) struct Loads<V: 'static> {
    table: Mutex<Table<V>>,
    /// Gets what was loaded, whenever there is more.
    remember: fn(&[(Name, V)]),
}

struct Table<V> {
    loaded: Vec<(Name, V)>,
    running: Vec<(Name, Arc<Running<V>>)>,
}

struct Running<V> {
    since: Instant,
    /// Its name, for messages, and the result once it has ended.
    state: Mutex<(String, Option<Result<V>>)>,
    ended: Condvar,
}

impl<V: Clone + Send + 'static> Loads<V> {
    pub(super) fn new(loaded: Vec<(Name, V)>, remember: fn(&[(Name, V)])) -> Loads<V> {
        Loads { table: Mutex::new(Table { loaded, running: Vec::new() }), remember }
    }

    /// What has this name. If it is not loaded, `prepare` begins to load it, without a lock.
    ///
    /// # Errors
    /// Those of the load: the next call tries again. `PluginLoad` when it does not end in time.
    pub(super) fn once(&'static self, name: &Name, within: Duration, prepare: impl FnOnce() -> Result<Work<V>>) -> Result<V> {
        let mut table = self.table.lock();
        if let Some((_, value)) = table.loaded.iter().find(|(known, _)| known == name) {
            return Ok(value.clone());
        }
        if let Some((_, running)) = table.running.iter().find(|(known, _)| known == name) {
            let running = running.clone();
            drop(table);
            return running.wait(within);
        }
        let state = Mutex::new((name.as_ref().map_or_else(String::new, |path| path.display().to_string()), None));
        let running = Arc::new(Running { since: Instant::now(), state, ended: Condvar::new() });
        table.running.push((name.clone(), running.clone()));
        drop(table);
        let end = End { loads: self, name: name.clone(), running: running.clone(), result: None };
        match prepare() {
            Err(e) => end.with(Err(e)),
            Ok(Work::Here(work)) => end.with(work()),
            Ok(Work::Thread(called, work)) => {
                running.state.lock().0 = called;
                let load = move || {
                    let result = catch_unwind(AssertUnwindSafe(work));
                    end.with(result.unwrap_or_else(|_| Err(err!(Internal, "a defect of the library while it was loaded"))));
                };
                // If it cannot start, what it has says so at its end.
                let _ = process::thread::spawn("uccl-plugin-init", load);
            }
        }
        running.wait(within)
    }
}

impl<V: Clone> Running<V> {
    /// Its result. A later caller waits less: the time counts from the start of the init.
    fn wait(&self, within: Duration) -> Result<V> {
        let until = self.since + within;
        let mut state = self.state.lock();
        loop {
            if let Some(result) = &state.1 {
                return result.clone();
            }
            if Instant::now() >= until {
                let time = self.since.elapsed().as_secs_f32();
                bail!(
                    PluginLoad,
                    "plugin {}: init has not returned for {time:.1} s (UCCL_TCPX_CONNECT_TIMEOUT_MS; is the receive manager frozen?)",
                    state.0
                );
            }
            self.ended.wait_until(&mut state, until);
        }
    }
}

/// Ends a load, with an error if it is dropped without a result.
struct End<V: Clone + 'static> {
    loads: &'static Loads<V>,
    name: Name,
    running: Arc<Running<V>>,
    result: Option<Result<V>>,
}

impl<V: Clone> End<V> {
    fn with(mut self, result: Result<V>) {
        self.result = Some(result);
    }
}

impl<V: Clone> Drop for End<V> {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or_else(|| Err(err!(Resource, "cannot start a thread for a plugin's init")));
        let mut table = self.loads.table.lock();
        table.running.retain(|(name, _)| *name != self.name);
        if let Ok(value) = &result {
            table.loaded.push((self.name.take(), value.clone()));
            (self.loads.remember)(&table.loaded);
        }
        drop(table);
        self.running.state.lock().1 = Some(result);
        self.running.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    const SHORT: Duration = Duration::from_secs(1);
    const LONG: Duration = Duration::from_secs(20);

    fn loads() -> &'static Loads<u32> {
        Box::leak(Box::new(Loads::new(Vec::new(), |_| ())))
    }

    fn name(file: &str) -> Name {
        Some(file.into())
    }

    #[test]
    fn a_load_that_stands_still_holds_up_no_other() {
        let (loads, (goes_on, stands)) = (loads(), channel::<()>());
        let work = move || {
            let _ = stands.recv();
            Ok(7)
        };
        let error =
            loads.once(&name("one"), SHORT, || Ok(Work::Thread("One".into(), Box::new(work)))).expect_err("it stands still");
        assert_eq!(error.kind(), ErrorKind::PluginLoad);
        assert!(error.to_string().contains("plugin One: init has not returned for 1.0 s"), "{error}");
        // From now on at once, without a second init.
        let before = Instant::now();
        assert!((0..100).all(|_| loads.once(&name("one"), SHORT, || panic!("a second init")).is_err()));
        assert!(before.elapsed() < SHORT);
        assert_eq!(loads.once(&None, SHORT, || Ok(Work::Here(Box::new(|| Ok(1))))), Ok(1), "another plugin");
        // One with more time gets it.
        let waits = std::thread::spawn(move || loads.once(&name("one"), LONG, || panic!("a second init")));
        goes_on.send(()).expect("its receiver");
        assert_eq!(waits.join().expect("no panic"), Ok(7));
        assert_eq!(loads.once(&name("one"), SHORT, || panic!("a second init")), Ok(7));
    }

    #[test]
    fn a_load_that_fails_is_tried_again() {
        let loads = loads();
        let fails = || -> Result<Work<u32>> { Err(err!(PluginLoad, "no such file")) };
        assert!(loads.once(&name("one"), LONG, fails).is_err());
        let panics = || -> Result<u32> { panic!("in a load") };
        let error = loads.once(&name("one"), LONG, || Ok(Work::Thread("One".into(), Box::new(panics)))).expect_err("a panic");
        assert_eq!(error.kind(), ErrorKind::Internal);
        let panics = || -> Result<Work<u32>> { panic!("in the caller") };
        assert!(catch_unwind(AssertUnwindSafe(|| loads.once(&name("one"), LONG, panics))).is_err());
        assert_eq!(loads.once(&name("one"), LONG, || Ok(Work::Here(Box::new(|| Ok(3))))), Ok(3));
    }

    #[test]
    fn many_at_once_load_it_once() {
        static INITS: AtomicU32 = AtomicU32::new(0);
        let loads = loads();
        let load = || {
            let work = || {
                std::thread::sleep(Duration::from_millis(20));
                Ok(INITS.fetch_add(1, Ordering::SeqCst))
            };
            loads.once(&name("one"), LONG, || Ok(Work::Thread("One".into(), Box::new(work))))
        };
        std::thread::scope(|s| {
            let all: Vec<_> = (0..8).map(|_| s.spawn(load)).collect();
            assert!(all.into_iter().all(|one| one.join().expect("no panic") == Ok(0)));
        });
        assert_eq!(INITS.load(Ordering::SeqCst), 1);
    }
}
