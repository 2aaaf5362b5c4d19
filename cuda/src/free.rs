//! Gives memory and modules back on a thread of its own: the driver waits for every stream of the GPU before it frees, the
//! application's included.

use crate::context::Context;
use crate::sys::{CUdeviceptr, CUmodule};
use parking_lot::{Condvar, Mutex};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time that the end of the process leaves to frees under way.
const AT_EXIT: Duration = Duration::from_secs(2);

/// What to give back, with the context it belongs to. Nobody uses it any more.
pub(crate) enum Freed {
    /// Of `cuMemAlloc`.
    Device(Arc<Context>, CUdeviceptr),
    /// Of `cuMemHostAlloc`.
    Pinned(Arc<Context>, *mut c_void),
    /// A module.
    Module(Arc<Context>, CUmodule),
}
// SAFETY: handles and addresses that nobody else uses any more.
unsafe impl Send for Freed {}

impl Freed {
    fn free(self) {
        let (Freed::Device(context, _) | Freed::Pinned(context, _) | Freed::Module(context, _)) = &self;
        let Ok(cuda) = context.enter() else { return };
        // SAFETY: made in this context, given back once. A driver that is shutting down answers with an error of no interest.
        let _ = unsafe {
            match &self {
                Freed::Device(_, at) => cuda.cuMemFree(*at),
                Freed::Pinned(_, at) => cuda.cuMemFreeHost(*at),
                Freed::Module(_, module) => cuda.cuModuleUnload(*module),
            }
        };
    }
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Freed>,
    /// A thread works on it.
    running: bool,
    /// The end of the process waits for it.
    hooked: bool,
    /// The process ends: the driver may be gone.
    ending: bool,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue { waiting: Vec::new(), running: false, hooked: false, ending: false });
static IDLE: Condvar = Condvar::new();

/// Frees soon, without making the caller wait.
pub(crate) fn later(freed: Freed) {
    let mut queue = QUEUE.lock();
    if queue.ending {
        // The driver frees everything with the process.
        std::mem::forget(freed);
        return;
    }
    if !queue.hooked {
        // SAFETY: the handler has the signature asked for and stays as long as this library.
        queue.hooked = unsafe { libc::atexit(at_exit) } == 0;
    }
    queue.waiting.push(freed);
    if !queue.running {
        // Without a thread it stays queued for the next one.
        queue.running = std::thread::Builder::new().name("uccl-gpu-free".into()).spawn(work).is_ok();
    }
}

fn work() {
    loop {
        let next = {
            let mut queue = QUEUE.lock();
            let next = if queue.ending { None } else { queue.waiting.pop() };
            if next.is_none() {
                queue.running = false;
                IDLE.notify_all();
            }
            next
        };
        match next {
            Some(freed) => freed.free(),
            None => return,
        }
    }
}

extern "C" fn at_exit() {
    let deadline = Instant::now() + AT_EXIT;
    let mut queue = QUEUE.lock();
    queue.ending = true;
    while queue.running && !IDLE.wait_until(&mut queue, deadline).timed_out() {}
}
