//! What a process has once and a child of `fork` must not share: threads, locks another thread may hold, tables of sockets.
//! Knows nothing of what is kept.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, Ordering};

/// Number of this process in its line of forks, from 1.
static GENERATION: AtomicU64 = AtomicU64::new(1);

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::SeqCst);
}

/// Differs between a process and its children. One load.
pub fn generation() -> u64 {
    GENERATION.load(Ordering::Acquire)
}

/// Starts telling children from their parent; must come before the first value that is kept.
fn watch() {
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if !WATCHED.swap(true, Ordering::SeqCst) {
        // SAFETY: the handler only changes an atomic. It fails only for want of memory, and then children are not told apart.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    }
}

struct Entry<T> {
    generation: u64,
    value: T,
}

/// A value that each process makes for itself, on first use. A child leaves the parent's copy untouched, locks included.
pub struct PerProcess<T: 'static> {
    entry: AtomicPtr<Entry<T>>,
}

impl<T: Send + Sync + 'static> PerProcess<T> {
    /// Nothing made yet.
    pub const fn new() -> PerProcess<T> {
        PerProcess { entry: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// This process's value. Two threads may make one at once; one of the two is dropped, so making must be cheap.
    pub fn get(&'static self, make: impl FnOnce() -> T) -> &'static T {
        let generation = generation();
        let known = self.entry.load(Ordering::Acquire);
        // SAFETY: entries that were published are never freed.
        if let Some(entry) = unsafe { known.as_ref() }.filter(|e| e.generation == generation) {
            return &entry.value;
        }
        watch();
        let fresh = Box::into_raw(Box::new(Entry { generation, value: make() }));
        match self.entry.compare_exchange(known, fresh, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: published just now, and never freed.
            Ok(_) => unsafe { &(*fresh).value },
            Err(other) => {
                // SAFETY: not published, so nobody else has it; the other one was published by this process and is never freed.
                unsafe {
                    drop(Box::from_raw(fresh));
                    &(*other).value
                }
            }
        }
    }
}

/// Closes this process's copy of a descriptor of its parent, once.
pub fn close_copy(fd: &AtomicI32) {
    let fd = fd.swap(-1, Ordering::AcqRel);
    if fd >= 0 {
        // SAFETY: the descriptor was inherited, and nothing of this process uses it. The parent's own stays open.
        unsafe { libc::close(fd) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn a_process_makes_its_value_once() {
        static VALUE: PerProcess<AtomicUsize> = PerProcess::new();
        let first = VALUE.get(|| AtomicUsize::new(7));
        let seen: Vec<_> =
            (0..8).map(|_| std::thread::spawn(|| VALUE.get(|| AtomicUsize::new(9)) as *const _ as usize)).collect();
        assert!(seen.into_iter().all(|t| t.join().unwrap() == std::ptr::from_ref(first) as usize));
        assert_eq!(first.load(Ordering::Relaxed), 7);
    }
}
