//! What a process has of its own, and a child of `fork` gets anew: locks that another thread may hold, handles, tables of threads.
//! And locks that keep nothing outside of themselves, and memory that no core dump has ([`guarded`]). Knows nothing of what is kept.
//!
//! # Fork
//! Of a process with threads, `fork` copies the memory and one thread. A lock that another thread held stays locked in the child, and
//! where threads wait in a table of the process, the child's table names threads that are not there; new ones, whose stacks take the
//! old places, then break its lists. So values are made anew in each process ([`PerProcess`], [`ProcessOwned`]), and nothing here or in the
//! crates above takes locks that share a table: those of this crate are the standard library's, which keep all that they need in
//! themselves.

mod fork;
mod fork_guard;
pub mod guarded;
mod space;
mod sync;
pub mod thread;

pub use fork::{close_copy, generation, Parents, PerProcess, ProcessOwned};
pub use space::ensure_space;
pub use sync::{Condvar, Mutex, MutexGuard, RwLock, WaitTimeoutResult};

/// Runs a critical section that `fork` in other threads waits for, at most 10 s. The section itself may fork.
pub fn without_fork<R>(work: impl FnOnce() -> R) -> R {
    // From here on forks are watched.
    generation();
    fork_guard::run(work)
}
