//! Per-process values, which a child of `fork` makes again: locks that another thread may hold, handles, tables of threads.
//! And locks whose whole state is inside them, memory that no core dump contains ([`guarded`]), and connections: their end though a child may
//! have inherited them ([`reset`]), and what the kernel says of them ([`TcpInfo`]). Knows nothing of the values.
//!
//! # Fork
//! `fork` copies the memory of a process and one thread. A lock that another thread held stays locked in the child. Where waiting
//! threads are in a table of the process, the child's table lists threads that do not exist; new threads, whose stacks have the same
//! addresses, then corrupt its lists. So each process makes its own values ([`PerProcess`], [`ProcessOwned`]), and nothing here or in
//! the crates above uses locks that share a table: this crate's locks keep all their state inside themselves.

mod fork;
mod fork_guard;
pub mod guarded;
mod socket;
mod space;
mod sync;
mod tcp_info;
pub mod thread;

pub use fork::{close_copy, generation, Parents, PerProcess, ProcessOwned};
pub use socket::reset;
pub use space::ensure_space;
pub use sync::{Condvar, Mutex, MutexGuard, RwLock, WaitTimeoutResult};
pub use tcp_info::TcpInfo;

/// Runs a critical section that `fork` in other threads waits for, at most 10 s. The section itself may fork.
pub fn without_fork<R>(work: impl FnOnce() -> R) -> R {
    // Registers the fork handlers.
    generation();
    fork_guard::run(work)
}
