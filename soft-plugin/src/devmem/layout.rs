//! How an area is divided, and how many connections it admits. Pure.
//!
//! The NIC writes the front. It is what the dma-buf covers, and every connection may keep so much of it that the others still find pages:
//! its receive buffer, and the fragments of messages that are not consumed. Behind it, out of the NIC's reach, lie regions for bytes
//! that came to the host, two for each connection, and blocks from which patterns are sent.

use nccl_net_abi::PAGE;

/// SO_RCVBUF of a connection for payload; the kernel doubles it, and counts whole pages.
pub const RECEIVE_BUFFER: usize = 1 << 20;
/// Regions of a connection for bytes that came to the host.
pub const REGIONS: usize = 2;
/// Bytes of a pattern, and blocks for patterns on their way.
pub const PATTERN: usize = 16 << 10;
pub const BLOCKS: usize = 8;
/// The average fragment of a message is at least so long, or the connection fails.
const SHORT: usize = 512;

/// Most fragments of a message.
pub fn most_fragments(limit: usize) -> usize {
    (limit / SHORT).clamp(64, crate::fragment::MAX_FRAGMENTS)
}

/// With so many fragments of earlier messages, a connection begins no other message.
pub fn held_fragments(limit: usize) -> usize {
    most_fragments(limit) / 2
}

/// A divided area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes that the NIC writes, from the beginning.
    pub front: usize,
    /// Connections that it admits.
    pub connections: usize,
    /// Bytes of a region.
    pub region: usize,
    /// All bytes.
    pub len: usize,
}

impl Layout {
    /// Divides `len` bytes for messages of up to `limit` bytes and a receive ring of so many entries, which always holds pages.
    ///
    /// # Errors
    /// It admits no connection: how many bytes would.
    pub fn new(len: usize, limit: usize, ring: usize) -> Result<Layout, usize> {
        let len = len / PAGE * PAGE;
        let region = limit.next_multiple_of(PAGE);
        let pages = most_fragments(limit) + held_fragments(limit) + 2 * RECEIVE_BUFFER / PAGE;
        let (each, patterns) = (pages * PAGE + REGIONS * region, BLOCKS * PATTERN);
        // A quarter more than receive buffers promise, which the kernel exceeds a little.
        let reserve = (len / 4).max(2 * ring * PAGE) + patterns;
        let connections = len.saturating_sub(reserve) / each;
        if connections == 0 {
            return Err(((each + patterns) * 4 / 3 + PAGE).max(2 * ring * PAGE + patterns + each).next_multiple_of(1 << 20));
        }
        Ok(Layout { front: len - connections * REGIONS * region - patterns, connections, region, len })
    }

    /// Where region `number` begins.
    pub fn region_at(&self, number: usize) -> usize {
        self.front + number * self.region
    }

    /// Where the blocks begin.
    pub fn blocks_at(&self) -> usize {
        self.len - BLOCKS * PATTERN
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn admitted_connections_leave_pages_to_each_other(mib in 1usize..600, limit in 4096usize..(512 << 10), ring in 0usize..9000) {
            match Layout::new(mib << 20, limit, ring) {
                Err(needed) => {
                    prop_assert!(needed > mib << 20);
                    prop_assert!(Layout::new(needed, limit, ring).is_ok());
                }
                Ok(layout) => {
                    let most = (most_fragments(limit) + held_fragments(limit)) * PAGE + 2 * RECEIVE_BUFFER;
                    prop_assert!(layout.connections * most + ring * PAGE <= layout.front);
                    prop_assert!(layout.region >= limit && layout.front % PAGE == 0 && layout.blocks_at() % PAGE == 0);
                    prop_assert_eq!(layout.region_at(layout.connections * REGIONS), layout.blocks_at());
                }
            }
        }
    }
}
