//! Where both ends of a path are in one process, the source's memory is kept for the puller by the source's own hold, which lies here
//! in the order of the ring. Knows nothing of chunks.

use super::socket::Name;
use crate::region::Hold;
use crate::status::{bail, Result};
use process::{Mutex, PerProcess};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

#[derive(Default)]
struct Held {
    /// Holds of chunks that are told and not taken, and how many of them the puller has seen.
    list: VecDeque<Hold>,
    seen: usize,
}

type Shared = Arc<Mutex<Held>>;
/// By link and by whether the owner is the connecting side.
type All = HashMap<(Name, bool), Weak<Mutex<Held>>>;

static ALL: PerProcess<Mutex<All>> = PerProcess::new(Mutex::default);

/// One direction's holds.
pub(crate) struct Shelf {
    name: (Name, bool),
    own: Option<Shared>,
}

impl Shelf {
    /// The shelf that this end puts its holds on.
    pub(crate) fn own(link: Name, connecting: bool) -> Shelf {
        let (name, own) = ((link, connecting), Shared::default());
        ALL.get().lock().insert(name, Arc::downgrade(&own));
        Shelf { name, own: Some(own) }
    }

    /// The other end's.
    pub(crate) fn of(link: Name, connecting: bool) -> Shelf {
        Shelf { name: (link, connecting), own: None }
    }

    /// A chunk is about to be told.
    pub(crate) fn put(&self, hold: Hold) {
        if let Some(own) = &self.own {
            own.lock().list.push_back(hold);
        }
    }

    /// The oldest chunk was taken.
    pub(crate) fn take_down(&self) {
        if let Some(own) = &self.own {
            let mut held = own.lock();
            held.list.pop_front();
            held.seen = held.seen.saturating_sub(1);
        }
    }

    /// The hold of the next chunk, for the puller.
    ///
    /// # Errors
    /// `RemoteDisconnect` when the other end is gone.
    pub(crate) fn take(&self) -> Result<Hold> {
        let shelf = ALL.get().lock().get(&self.name).and_then(Weak::upgrade);
        let Some(shelf) = shelf else { bail!(RemoteDisconnect, "the other end of the connection is gone") };
        let mut held = shelf.lock();
        let at = held.seen;
        held.seen += 1;
        match held.list.get(at) {
            Some(hold) => Ok(hold.clone()),
            None => bail!(Protocol, "a chunk was told that nobody holds"),
        }
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        if self.own.is_some() {
            ALL.get().lock().remove(&self.name);
        }
    }
}
