//! Standard output with the conventions of Unix filters: when the reader closes it, the program ends silently. Also handles
//! Ctrl-C.

use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Writes a line to standard output and flushes it.
pub fn line(text: fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => end_by_sigpipe(),
        // A lost result must not look like success.
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: cannot write to standard output: {e}");
            std::process::exit(1);
        }
    }
}

/// `println!` that ends the program quietly when the reader has closed the pipe.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::out::line(format_args!($($arg)*)) };
}

/// Ends the process by SIGPIPE, as callers of a filter expect. Until here the signal is ignored: sockets report an error instead.
fn end_by_sigpipe() -> ! {
    // SAFETY: plain system calls.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::raise(libc::SIGPIPE);
    }
    std::process::exit(0)
}

static STOPPING: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(signal: libc::c_int) {
    STOPPING.store(true, Ordering::Release);
    // SAFETY: async-signal-safe. The second signal ends the process at once.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Makes Ctrl-C and SIGTERM set [`stopping`]; a second one ends the process.
pub fn stop_on_interrupt() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler stores to an atomic and calls signal, both safe there.
        unsafe { libc::signal(signal, on_interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
}

/// Set once the user has asked to stop.
pub fn stopping() -> &'static AtomicBool {
    &STOPPING
}

/// Whether the user has asked to stop.
pub fn is_stopping() -> bool {
    STOPPING.load(Ordering::Acquire)
}
