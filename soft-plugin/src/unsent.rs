//! How much of a data socket's bytes the kernel keeps unsent: no more than the connection delivers in a moment. What is in a socket buffer
//! cannot go another way, and a small message behind it waits. A fast connection fills its buffer in less than that moment, so nothing
//! changes for it.
//!
//! Where threads compete for few cores, a sender fills its buffers before a receiver runs, and the bytes of many of them exceed the caches:
//! the receiver then reads from memory what the sender wrote there. On a path of tens of microseconds a large buffer gains nothing either,
//! so there it stays small.

use std::time::{Duration, Instant};

use crate::config::Config;
use crate::tcp;

/// So much time of the delivery rate may lie unsent, but at least so many bytes, and up to so many it is not worth a limit.
const MOMENT: f64 = 0.25;
const LEAST: u64 = 64 << 10;
const MOST: u64 = 16 << 20;
/// A path with a shorter round trip is so short, and the buffer that it gets. The kernel doubles that for its own overhead: about 350 KiB in
/// each round trip are more than one connection moves.
const NEAR_US: u32 = 50;
const NEAR_BUFFER: usize = 256 << 10;
/// Fewer cores are few.
const MANY_CORES: usize = 4;
/// How often the rate is read, while the buffer is full.
const PAUSE: Duration = Duration::from_millis(100);

/// The limit of one socket.
#[derive(Debug, Default)]
pub struct Unsent {
    looked: Option<Instant>,
    limit: u64,
    /// The buffer is made small once the path is known to be near.
    shrinks: bool,
}

impl Unsent {
    /// The limit of a new socket.
    pub fn new(config: &Config) -> Unsent {
        Unsent { shrinks: config.socket_buffer == 0 && config.cores < MANY_CORES, ..Unsent::default() }
    }

    /// The socket takes no more bytes now.
    pub fn full(&mut self, fd: i32, now: Instant) {
        if self.looked.is_some_and(|looked| now.saturating_duration_since(looked) < PAUSE) {
            return;
        }
        self.looked = Some(now);
        if self.shrinks && tcp::min_rtt(fd).is_some_and(|us| us < NEAR_US) {
            self.shrinks = false;
            tcp::limit_buffer(fd, NEAR_BUFFER);
        }
        let Some(limit) = tcp::delivery_rate(fd).map(limit) else { return };
        // Rates waver; a system call each time would not pay.
        if limit != self.limit && (limit == 0 || self.limit == 0 || limit >= 2 * self.limit || limit <= self.limit / 2) {
            self.limit = limit;
            tcp::limit_unsent(fd, limit as u32);
        }
    }
}

/// Bytes that may be unsent at so many bytes a second; 0: as many as the buffer holds.
fn limit(rate: u64) -> u64 {
    match ((rate as f64 * MOMENT) as u64).max(LEAST) {
        limit if limit >= MOST => 0,
        limit => limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_connections_keep_little_unsent_and_fast_ones_as_much_as_fits() {
        assert_eq!([125_000, 2_500_000, 12_500_000, 125_000_000].map(limit), [64 << 10, 625_000, 3_125_000, 0]);
    }
}
