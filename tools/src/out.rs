//! Standard output as other Unix tools treat it: when the reader closes it, the program ends silently. Also handles Ctrl-C.

use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Writes a line to standard output, at once.
pub fn line(text: fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => end_by_sigpipe(),
        // A result that is lost must not look like success.
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

/// Ends the process by SIGPIPE, as its callers expect of a filter. Until here the signal stays ignored: sockets report it as an error.
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
    // SAFETY: safe in a handler. Whoever asks twice does not want to wait.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// From now on Ctrl-C and SIGTERM set [`stopping`]; a second one ends the process.
pub fn stop_on_interrupt() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler stores to an atomic and calls signal, both safe there.
        unsafe { libc::signal(signal, on_interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
}

/// Set once the user has asked for the end.
pub fn stopping() -> &'static AtomicBool {
    &STOPPING
}

/// Whether the user has asked for the end.
pub fn is_stopping() -> bool {
    STOPPING.load(Ordering::Acquire)
}
