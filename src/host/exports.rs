//! Which GPU allocations of this engine the peer can read from, and which of the peer's this engine has mapped. An allocation is announced once and
//! used only after the peer has said that it can reach it. Knows nothing of sockets and of what is copied.

use super::memory::witness::Process;
use super::memory::{Export, LocalMemory, Mapping};
use super::messages::Message;
use crate::hash::Map;
use crate::region::Region;
use crate::status::{bail, Result};
use crate::types::Place;
use std::collections::VecDeque;

/// Allocations that are shared on a connection at once, each way.
const MAX_SHARED: usize = 8192;
/// Allocations of the peer that wait to be opened at most, each with a descriptor of this process: the next are read when these are open.
const MAX_UNOPENED: usize = 16;
/// Shorter allocations would cut transfers into too many pieces.
const SHORTEST: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Announced,
    Open,
    Refused,
    /// Its descriptor could not be made.
    Failed,
}

/// An allocation: where it begins, its length, its place, and the peer's place.
type Key = (u64, u64, Place, Place);

struct Allocation {
    id: u32,
    state: State,
    /// Regions that lie in it.
    regions: usize,
}

/// Whether memory of one engine can be reached from the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach<T> {
    Yes(T),
    /// The peer has not answered, or this engine has not mapped it yet.
    Pending,
    No,
}

impl<T> Reach<T> {
    /// The same without its value.
    pub(crate) fn drop_value(self) -> Reach<()> {
        match self {
            Reach::Yes(_) => Reach::Yes(()),
            Reach::Pending => Reach::Pending,
            Reach::No => Reach::No,
        }
    }
}

/// A shared allocation: `len` bytes from `base` in its owner's address space, which are visible at `addr` here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub id: u32,
    pub base: u64,
    pub len: u64,
    pub addr: u64,
}

impl Stretch {
    /// Where a piece of it lies here; `None` when the piece does not lie in it.
    #[inline]
    pub(crate) fn locate(&self, addr: u64, len: u64) -> Option<u64> {
        let at = addr.checked_sub(self.base)?;
        (at < self.len && len <= self.len - at).then(|| self.addr + at)
    }
}

/// A region that can be shared.
struct Shared {
    /// The allocations that it lies in, rising, and as this engine sees them.
    keys: Vec<Key>,
    stretches: Vec<Stretch>,
    /// The peer has opened all of them, which stays so.
    open: bool,
}

/// Of allocations, rising, those that a range touches.
fn touched(all: &[Stretch], (begin, end): (u64, u64)) -> &[Stretch] {
    let first = all.partition_point(|stretch| stretch.base <= begin).saturating_sub(1);
    let after = all.partition_point(|stretch| stretch.base < end);
    all.get(first..after).unwrap_or_default()
}

/// Allocations of this engine.
#[derive(Default)]
pub(crate) struct Shares {
    allocations: Map<Key, Allocation>,
    ids: Map<u32, Key>,
    /// By region and the peer's place; `None` where it cannot be shared.
    regions: Map<(u64, Place), Option<Shared>>,
    last: u32,
    /// Messages for the peer.
    pub outbox: VecDeque<Message>,
}

impl Shares {
    /// Whether the peer can read all of a region into its `there`. The first call announces it.
    pub(crate) fn share(&mut self, region: &Region, there: Place, memory: &mut dyn LocalMemory) -> Reach<()> {
        let name = (region.span.id, there);
        if !self.regions.contains_key(&name) {
            let keys = self.announce(region, there, memory);
            if let Err(e) = &keys {
                log::debug!("region {} is not shared with processes on this host: {e}", region.span.id);
            }
            self.regions.insert(name, keys.ok().map(|keys| self.shared(keys)));
        }
        let Shares { regions, allocations, .. } = self;
        let Some(Some(shared)) = regions.get_mut(&name) else { return Reach::No };
        let state = |key: &Key| allocations.get(key).map_or(State::Failed, |allocation| allocation.state);
        shared.open = shared.open || shared.keys.iter().all(|key| state(key) == State::Open);
        match shared.open {
            true => Reach::Yes(()),
            false if shared.keys.iter().any(|key| matches!(state(key), State::Refused | State::Failed)) => Reach::No,
            false => Reach::Pending,
        }
    }

    fn shared(&self, keys: Vec<Key>) -> Shared {
        let stretch = |key: &Key| {
            let &(base, len, ..) = key;
            self.allocations.get(key).map(|allocation| Stretch { id: allocation.id, base, len, addr: base })
        };
        Shared { stretches: keys.iter().filter_map(stretch).collect(), keys, open: false }
    }

    fn announce(&mut self, region: &Region, there: Place, memory: &mut dyn LocalMemory) -> Result<Vec<Key>> {
        let exports = memory.export(region.place, region.span.addr, region.span.len)?;
        let inner = exports.len().saturating_sub(1);
        if exports.is_empty() || exports[..inner].iter().any(|e| e.len < SHORTEST) {
            bail!(Unsupported, "it lies in {} allocations", exports.len());
        }
        if self.allocations.len() + exports.len() > MAX_SHARED {
            bail!(Resource, "more than {MAX_SHARED} allocations");
        }
        let mut keys = Vec::with_capacity(exports.len());
        for export in exports {
            let key = (export.base, export.len, region.place, there);
            keys.push(key);
            if let Some(known) = self.allocations.get_mut(&key) {
                known.regions += 1;
                continue;
            }
            self.last += 1;
            let id = self.last;
            self.allocations.insert(key, Allocation { id, state: State::Announced, regions: 1 });
            self.ids.insert(id, key);
            self.outbox.push_back(Message::Share { id, there: region.place, here: there, export });
        }
        Ok(keys)
    }

    /// The peer has answered.
    ///
    /// # Errors
    /// `Protocol` for an answer to no question.
    pub(crate) fn answered(&mut self, id: u32, open: bool) -> Result<()> {
        if id == 0 || id > self.last {
            bail!(Protocol, "an answer to export {id} of {}", self.last);
        }
        // It may have ended meanwhile.
        if let Some(allocation) = self.ids.get(&id).and_then(|key| self.allocations.get_mut(key)) {
            if allocation.state != State::Announced {
                bail!(Protocol, "export {id} is answered twice");
            }
            allocation.state = if open { State::Open } else { State::Refused };
        }
        Ok(())
    }

    /// Makes the descriptor of the next announcement: at most one waits here, however slow the peer is. Without a descriptor it is not announced.
    pub(crate) fn prepare(&mut self, memory: &mut dyn LocalMemory) {
        while let Some(Message::Share { id, there, export, .. }) = self.outbox.front_mut() {
            if export.fd.is_some() || !export.kind.has_fd() {
                return;
            }
            match memory.descriptor(*there, export) {
                Ok(fd) => export.fd = Some(fd),
                Err(e) => {
                    log::debug!("export {id} is not shared with a process on this host: {e}");
                    if let Some(allocation) = self.ids.get(id).and_then(|key| self.allocations.get_mut(key)) {
                        allocation.state = State::Failed;
                    }
                    self.outbox.pop_front();
                }
            }
        }
    }

    /// The allocations of a region that a range touches, rising, as this engine sees them; none where it is not shared.
    pub(crate) fn stretches(&self, region: u64, there: Place, range: (u64, u64)) -> &[Stretch] {
        let shared = self.regions.get(&(region, there)).and_then(Option::as_ref);
        shared.map_or(&[], |shared| touched(&shared.stretches, range))
    }

    /// The exports that a region lies in, rising; `None` where it cannot be shared.
    pub(crate) fn exports(&self, region: u64, there: Place) -> Option<Vec<u32>> {
        let shared = self.regions.get(&(region, there))?.as_ref()?;
        Some(shared.stretches.iter().map(|stretch| stretch.id).collect())
    }

    /// A region has ended: nothing uses it.
    pub(crate) fn forget(&mut self, region: u64) {
        let names: Vec<(u64, Place)> = self.regions.keys().copied().filter(|&(id, _)| id == region).collect();
        for name in names {
            for key in self.regions.remove(&name).flatten().map(|shared| shared.keys).unwrap_or_default() {
                let Some(allocation) = self.allocations.get_mut(&key) else { continue };
                allocation.regions -= 1;
                if allocation.regions == 0 {
                    let Allocation { id, state, .. } = *allocation;
                    self.allocations.remove(&key);
                    self.ids.remove(&id);
                    // Its descriptor would be of whatever lies there next.
                    let waiting = self.outbox.len();
                    self.outbox.retain(|message| !matches!(message, Message::Share { id: other, .. } if *other == id));
                    if state != State::Failed && self.outbox.len() == waiting {
                        self.outbox.push_back(Message::End { id });
                    }
                }
            }
        }
    }
}

struct Import {
    /// Taken out when it is closed.
    mapping: Mapping,
    base: u64,
    len: u64,
    here: Place,
    /// NVLink joins its GPU and that of `here`.
    nvlink: bool,
    /// Copies that use it.
    copies: usize,
    ended: bool,
}

/// Where the copies of an allocation go: the place here, and whether NVLink joins the two.
type Reader = (Place, bool);

/// Allocations of the peer.
#[derive(Default)]
pub(crate) struct Imports {
    open: Map<u32, Import>,
    /// Announced, and not opened yet: opening takes long.
    waiting: VecDeque<(u32, Reader, Export)>,
    last: u32,
    /// The peer's process, if it is proved.
    owner: Option<Process>,
}

impl Imports {
    /// Of a peer's process, if it is proved.
    pub(crate) fn of(owner: Option<Process>) -> Imports {
        Imports { owner, ..Imports::default() }
    }

    /// The peer shares an allocation.
    ///
    /// # Errors
    /// `Protocol` when its number does not rise, or there are too many.
    pub(crate) fn announced(&mut self, id: u32, reader: Reader, export: Export) -> Result<()> {
        self.number(id)?;
        if self.open.len() + self.waiting.len() >= 2 * MAX_SHARED {
            bail!(Protocol, "the peer shares {} allocations", self.open.len() + self.waiting.len());
        }
        self.waiting.push_back((id, reader, export));
        Ok(())
    }

    fn number(&mut self, id: u32) -> Result<()> {
        if id <= self.last {
            bail!(Protocol, "the peer announces export {id} after export {}", self.last);
        }
        self.last = id;
        Ok(())
    }

    /// The peer shares an allocation whose descriptor did not come; the answer for the peer.
    ///
    /// # Errors
    /// As [`Imports::announced`].
    pub(crate) fn missed(&mut self, id: u32) -> Result<Message> {
        self.number(id)?;
        log::debug!("export {id} of a process on this host cannot be opened: this process has no descriptor left");
        Ok(Message::Answer { id, open: false })
    }

    /// Something waits to be opened.
    pub(crate) fn waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// So much waits that no more should be read before some of it is open.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_UNOPENED
    }

    /// Opens one allocation; the answer for the peer.
    pub(crate) fn open_one(&mut self, memory: &mut dyn LocalMemory) -> Option<Message> {
        let (id, (here, nvlink), export) = self.waiting.pop_front()?;
        let open = match memory.open(&export, here, self.owner) {
            Ok(mapping) => {
                let import = Import { mapping, base: export.base, len: export.len, here, nvlink, copies: 0, ended: false };
                self.open.insert(id, import);
                true
            }
            Err(e) => {
                log::debug!("export {id} of a process on this host cannot be opened: {e}");
                false
            }
        };
        Some(Message::Answer { id, open })
    }

    /// Whether copies of an open export cross NVLink.
    pub(super) fn by_nvlink(&self, id: u32) -> bool {
        self.open.get(&id).is_some_and(|import| import.nvlink)
    }

    /// An open export, for memory of `here`.
    pub(crate) fn look(&self, id: u32, here: Place) -> Option<Stretch> {
        let import = self.open.get(&id).filter(|import| import.here == here && !import.ended)?;
        Some(Stretch { id, base: import.base, len: import.len, addr: import.mapping.addr })
    }

    /// Of exports, rising, those that a range touches, as far as they are open for memory of `here`.
    pub(crate) fn range(&self, ids: &[u32], here: Place, (begin, end): (u64, u64)) -> Reach<Vec<Stretch>> {
        if self.waiting.iter().any(|(id, ..)| ids.contains(id)) {
            return Reach::Pending;
        }
        let before = |&id: &u32| self.look(id, here).is_some_and(|stretch| stretch.base <= begin);
        let first = ids.partition_point(before).saturating_sub(1);
        let mut out = Vec::new();
        for &id in &ids[first..] {
            let Some(stretch) = self.look(id, here) else { return Reach::No };
            if stretch.base >= end {
                break;
            }
            out.push(stretch);
        }
        Reach::Yes(out)
    }

    /// An open export, for a pull into memory of `here`. Counts a use.
    ///
    /// # Errors
    /// `Protocol` when it is not open for that.
    pub(crate) fn enter(&mut self, id: u32, here: Place) -> Result<Stretch> {
        let Some(import) = self.open.get_mut(&id).filter(|import| import.here == here && !import.ended) else {
            bail!(Protocol, "a piece of export {id}, which is not open for memory of {here:?}")
        };
        import.copies += 1;
        Ok(Stretch { id, base: import.base, len: import.len, addr: import.mapping.addr })
    }

    /// A pull that used this export has ended.
    pub(crate) fn release(&mut self, id: u32, memory: &mut dyn LocalMemory) {
        if let Some(import) = self.open.get_mut(&id) {
            import.copies = import.copies.saturating_sub(1);
            if import.ended && import.copies == 0 {
                self.close(id, memory);
            }
        }
    }

    /// The peer takes an allocation back.
    ///
    /// # Errors
    /// `Protocol` for one that was never announced.
    pub(crate) fn ended(&mut self, id: u32, memory: &mut dyn LocalMemory) -> Result<()> {
        if id == 0 || id > self.last {
            bail!(Protocol, "export {id} of {} ends", self.last);
        }
        self.waiting.retain(|&(other, ..)| other != id);
        if let Some(import) = self.open.get_mut(&id) {
            import.ended = true;
            if import.copies == 0 {
                self.close(id, memory);
            }
        }
        Ok(())
    }

    fn close(&mut self, id: u32, memory: &mut dyn LocalMemory) {
        if let Some(import) = self.open.remove(&id) {
            memory.close(import.mapping);
        }
    }

    /// Closes everything; no pull is under way.
    pub(crate) fn close_all(&mut self, memory: &mut dyn LocalMemory) {
        self.waiting.clear();
        self.open.drain().for_each(|(_, import)| memory.close(import.mapping));
    }

    /// How many are open.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{ExportKind, GpuId, Manner, Piece, Pull};
    use super::*;
    use crate::types::{RemoteAccess, Span};
    use std::os::fd::OwnedFd;

    const GPU: Place = Place(1);

    /// Memory each region of which is an allocation of its own. Whether descriptors are left.
    struct Simulated(bool);

    impl LocalMemory for Simulated {
        fn export(&mut self, _place: Place, base: u64, len: u64) -> Result<Vec<Export>> {
            Ok(vec![Export { kind: ExportKind::SharedMemory, handle: [0; 64], fd: None, base, len, gpu: [0; 16] }])
        }
        fn descriptor(&mut self, _place: Place, _export: &Export) -> Result<OwnedFd> {
            match self.0 {
                true => Ok(std::fs::File::open("/dev/null").unwrap().into()),
                false => bail!(Resource, "no descriptor is left"),
            }
        }
        fn open(&mut self, _export: &Export, _place: Place, _owner: Option<Process>) -> Result<Mapping> {
            bail!(Unsupported, "nothing is opened")
        }
        fn close(&mut self, _mapping: Mapping) {}
        unsafe fn pull(&mut self, _place: Place, _pieces: &[Piece]) -> Result<Pull> {
            bail!(Unsupported, "nothing is pulled")
        }
        fn poll(&mut self, _pull: Pull) -> Result<bool> {
            Ok(true)
        }
        fn busy(&self) -> bool {
            false
        }
        fn quiesce(&mut self) -> Result<()> {
            Ok(())
        }
        fn reaches(&mut self, _place: Place, _peer_gpu: &GpuId) -> Option<Manner> {
            None
        }
    }

    fn region(id: u64) -> Region {
        Region::new(Span { id, addr: id << 20, len: 1 << 20 }, [0; 16], GPU, RemoteAccess::ALL)
    }

    /// Exports that are to be announced or ended, in order, and whether each has its descriptor.
    fn waiting(shares: &Shares) -> Vec<(&str, u32, bool)> {
        let word = |message: &Message| match message {
            Message::Share { id, export, .. } => ("share", *id, export.fd.is_some()),
            Message::End { id } => ("end", *id, false),
            other => panic!("{other:?}"),
        };
        shares.outbox.iter().map(word).collect()
    }

    #[test]
    fn a_descriptor_is_made_for_what_leaves_next_alone() {
        let (mut shares, mut memory) = (Shares::default(), Simulated(true));
        (1..=3).for_each(|id| assert_eq!(shares.share(&region(id), GPU, &mut memory), Reach::Pending));
        for _ in 0..2 {
            shares.prepare(&mut memory);
            assert_eq!(waiting(&shares), [("share", 1, true), ("share", 2, false), ("share", 3, false)]);
        }
        // The first has left; one that ends before its turn is never announced.
        shares.outbox.pop_front();
        shares.forget(2);
        shares.forget(1);
        shares.prepare(&mut memory);
        assert_eq!(waiting(&shares), [("share", 3, true), ("end", 1, false)]);
    }

    #[test]
    fn what_gets_no_descriptor_is_not_announced() {
        let (mut shares, mut memory) = (Shares::default(), Simulated(false));
        (1..=2).for_each(|id| assert_eq!(shares.share(&region(id), GPU, &mut memory), Reach::Pending));
        shares.prepare(&mut memory);
        assert!(waiting(&shares).is_empty() && shares.share(&region(1), GPU, &mut memory) == Reach::No);
        shares.forget(1);
        assert!(waiting(&shares).is_empty(), "it was never announced");
        memory.0 = true;
        shares.share(&region(3), GPU, &mut memory);
        shares.prepare(&mut memory);
        assert_eq!(waiting(&shares), [("share", 3, true)]);
    }

    #[test]
    fn an_export_whose_descriptor_is_missed_is_refused_and_may_end() {
        let (mut imports, mut memory) = (Imports::default(), Simulated(true));
        assert!(matches!(imports.missed(4), Ok(Message::Answer { id: 4, open: false })));
        assert!(imports.missed(4).is_err() && imports.look(4, GPU).is_none() && imports.ended(4, &mut memory).is_ok());
    }
}
