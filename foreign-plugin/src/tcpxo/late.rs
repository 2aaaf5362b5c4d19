//! What a closed comm still does with the memory of its unfinished requests: it sends from there, and writes there, as long as the
//! registration exists.

use super::comm::Unfinished;
use super::memory;
use std::time::{Duration, Instant};

/// How long it does so.
const LONG: Duration = Duration::from_millis(300);

/// Goes on with the requests in a thread of its own.
pub(super) fn go_on(mut unfinished: Unfinished) {
    std::thread::spawn(move || {
        let until = Instant::now() + LONG;
        while Instant::now() < until {
            unfinished.step();
            unfinished.targets().for_each(scribble);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

/// Writes bytes that no message has.
fn scribble((mr, data, len): (usize, usize, usize)) {
    memory::while_registered(&[mr], || {
        // SAFETY: registered memory of a posted receive, which lasts until the registration is dropped.
        unsafe { std::ptr::write_bytes(data as *mut u8, 0xEE, len.min(64)) };
    });
}
