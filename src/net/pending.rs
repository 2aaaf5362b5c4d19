//! Connects and accepts while they are under way. Those of a plugin that has a thread are polled there until they end, whatever their
//! owner waits for: dropping one gives it up, and it is polled on if the plugin's own threads still use its memory. Knows nothing of
//! what is polled.

use super::plugin_thread::PluginThread;
use crate::status::{bail, Result};
use process::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The pauses between polls: they grow with age.
const FAST: Duration = Duration::from_micros(100);
const SLOW: Duration = Duration::from_millis(5);
/// The longest pause once it was given up.
const ABANDONED: Duration = Duration::from_millis(500);

/// A connect or an accept.
pub(super) trait Step: Send + 'static {
    /// What it brings.
    type Up: Send;
    /// Its name, for messages.
    const NAME: &'static str;
    /// The thread that polls it; `None` if its owner does.
    fn thread(&self) -> Option<&'static PluginThread>;
    /// Polls it once.
    fn step(&mut self) -> Result<Option<Self::Up>>;
    /// Whether it has begun, not ended, and must be polled to its end.
    fn lingers(&self) -> bool;
    /// It was given up so long ago.
    fn given_up(&mut self, _since: Duration) {}
}

/// What the thread has brought.
enum Seen<T> {
    Nothing,
    Ended(Result<T>),
    GivenUp,
}

enum Place<S: Step> {
    /// Not begun, or polled by its owner.
    Here(S),
    Thread(Arc<Mutex<Seen<S::Up>>>),
    Over,
}

/// A connect or an accept under way.
pub(super) struct Pending<S: Step>(Place<S>);

impl<S: Step> Pending<S> {
    pub(super) fn new(step: S) -> Pending<S> {
        Pending(Place::Here(step))
    }

    /// What it brings, once it has ended. After that or an error, further calls give an error. Never waits for a plugin's thread.
    pub(super) fn poll(&mut self) -> Result<Option<S::Up>> {
        let ended = match std::mem::replace(&mut self.0, Place::Over) {
            Place::Over => bail!(Internal, "{} polled after its end", S::NAME),
            Place::Here(mut step) => match step.thread() {
                Some(thread) => {
                    let seen = Arc::new(Mutex::new(Seen::Nothing));
                    begin(thread, step, seen.clone())?;
                    self.0 = Place::Thread(seen);
                    return Ok(None);
                }
                None => {
                    let ended = step.step()?;
                    if ended.is_none() {
                        self.0 = Place::Here(step);
                    }
                    return Ok(ended);
                }
            },
            Place::Thread(seen) => {
                let now = std::mem::replace(&mut *seen.lock(), Seen::Nothing);
                match now {
                    Seen::Ended(result) => result,
                    _ => {
                        self.0 = Place::Thread(seen);
                        return Ok(None);
                    }
                }
            }
        };
        ended.map(Some)
    }
}

impl<S: Step> Drop for Pending<S> {
    fn drop(&mut self) {
        if let Place::Thread(seen) = &self.0 {
            let before = std::mem::replace(&mut *seen.lock(), Seen::GivenUp);
            drop(before);
        }
    }
}

fn begin<S: Step>(thread: &'static PluginThread, mut step: S, seen: Arc<Mutex<Seen<S::Up>>>) -> Result<()> {
    let began = Instant::now();
    let mut given_up = None;
    let poll = move || {
        if matches!(*seen.lock(), Seen::GivenUp) {
            if !step.lingers() {
                return None;
            }
            given_up.get_or_insert_with(Instant::now);
        }
        given_up.iter().for_each(|since| step.given_up(since.elapsed()));
        let ended = step.step().transpose();
        let goes_on = ended.is_none() || step.lingers();
        if let Some(ended) = ended {
            let mut seen = seen.lock();
            // Its owner takes the first end.
            let unseen = matches!(*seen, Seen::GivenUp) || given_up.is_some();
            if unseen {
                drop(seen);
                drop(ended);
            } else {
                *seen = Seen::Ended(ended);
            }
            given_up.get_or_insert_with(Instant::now);
        }
        let slow = if given_up.is_some() { ABANDONED } else { SLOW };
        goes_on.then(|| (began.elapsed() / 16).clamp(FAST, slow))
    };
    thread.poll(S::NAME, Box::new(poll))
}
