//! Memory of ended transfers, kept for the next ones. The lists of a transfer of many thousand segments are so large that new
//! memory for them costs more in page faults than filling them. Knows nothing of their content.

use crate::status::{bail, Result};
use crate::types::Segment;
use crate::wire::frame::WireSegments;

/// The length from which on reuse pays. Shorter lists are not kept, since they would take the place of long ones.
pub(crate) const MANY: usize = 1 << 10;
/// Most lists kept, and the most segments of a kept list.
const LISTS: usize = 4;
const SEGMENTS: usize = 1 << 16;

/// Empty lists.
#[derive(Default)]
pub(crate) struct SegmentPool {
    lists: Vec<Vec<Segment>>,
    wire: Option<WireSegments<'static>>,
}

impl SegmentPool {
    /// An empty list with room for `n` segments.
    ///
    /// # Errors
    /// `Resource` when there is no memory for it.
    pub(crate) fn list(&mut self, n: usize) -> Result<Vec<Segment>> {
        let mut list = if n < MANY { Vec::new() } else { self.lists.pop().unwrap_or_default() };
        match list.try_reserve(n) {
            Ok(()) => Ok(list),
            Err(_) => bail!(Resource, "no memory for a list of {n} segments"),
        }
    }

    /// An empty list of wire segments with room for `n`.
    pub(crate) fn wire(&mut self, n: usize) -> WireSegments<'static> {
        let mut wire = self.wire.take().unwrap_or_default();
        wire.reserve(n);
        wire
    }

    /// Takes a list that is no longer needed.
    pub(crate) fn give_list(&mut self, mut list: Vec<Segment>) {
        if self.lists.len() < LISTS && (MANY..=SEGMENTS).contains(&list.capacity()) {
            list.clear();
            self.lists.push(list);
        }
    }

    /// Takes a list of wire segments that is no longer needed.
    pub(crate) fn give_wire(&mut self, mut wire: WireSegments<'static>) {
        wire.clear();
        if wire.room() <= SEGMENTS {
            self.wire = Some(wire);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Place;
    use crate::wire::frame::WireSegment;

    #[test]
    fn lists_come_back_empty_and_only_so_many() {
        let mut pool = SegmentPool::default();
        let segment = Segment { addr: 1, len: 2, region: 0, place: Place::HOST, peer: Place::HOST };
        pool.give_list(vec![segment; 1]);
        assert_eq!(pool.lists.len(), 0, "short lists stay out");
        for _ in 0..2 * LISTS {
            pool.give_list(vec![segment; MANY]);
        }
        pool.give_list(Vec::with_capacity(SEGMENTS + 1));
        assert_eq!(pool.lists.len(), LISTS);
        let list = pool.list(MANY).unwrap();
        assert!(list.is_empty() && list.capacity() >= MANY);
        let mut wire = pool.wire(5);
        wire.push(WireSegment { addr: 1, len: 2, region: 0, initiator: segment.place, owner: segment.peer });
        pool.give_wire(wire);
        assert_eq!(pool.wire(1).count(), 0);
    }
}
