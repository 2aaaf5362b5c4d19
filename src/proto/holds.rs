//! What keeps the regions of transfers that go without chunks and frames. Knows nothing of what they are.

use crate::hash::Map;
use crate::region::Hold;

/// Them, by their ids.
#[derive(Default)]
pub(super) struct Holds(Map<u64, Hold>);

impl Holds {
    pub(super) fn insert(&mut self, id: u64, hold: Hold) {
        self.0.insert(id, hold);
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.0.remove(&id);
    }

    pub(super) fn uses_region(&self, id: u64) -> bool {
        self.0.values().any(|hold| hold.holds(id))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
