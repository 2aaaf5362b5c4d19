//! Mappings of other processes' memory, by process: all connections with a peer's process use one mapping of an allocation. It ends with
//! its last user, so that no mapping keeps memory longer than the peer shares it. Knows nothing of how memory is mapped.

use super::witness::Process;
use super::{Export, ExportKind, GpuId};
use crate::hash::Map;
use crate::status::Result;
use crate::types::Place;
use process::Mutex;
use std::sync::{Arc, Weak};

/// An allocation of a process, as it is mapped for one place here. Its handle distinguishes it from what lay at its address before.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    owner: Process,
    kind: ExportKind,
    handle: [u8; 64],
    base: u64,
    len: u64,
    gpu: GpuId,
    place: Place,
}

/// Mappings of one kind in this process.
pub(super) struct Mappings<T>(Mutex<Map<Key, Weak<T>>>);

impl<T> Default for Mappings<T> {
    fn default() -> Self {
        Mappings(Mutex::default())
    }
}

impl<T> Mappings<T> {
    /// The mapping of an export for `place`, made by `map` unless a connection of the same process has it. Without a proved `owner` it
    /// is this user's alone.
    ///
    /// # Errors
    /// Of `map`.
    pub(super) fn open(
        &self,
        owner: Option<Process>,
        export: &Export,
        place: Place,
        map: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let Some(owner) = owner else { return map().map(Arc::new) };
        let &Export { kind, handle, base, len, gpu, .. } = export;
        let key = Key { owner, kind, handle, base, len, gpu, place };
        let known = |open: &Map<Key, Weak<T>>| open.get(&key).and_then(Weak::upgrade);
        if let Some(known) = known(&self.0.lock()) {
            return Ok(known);
        }
        // Not under the lock, since it may take long. Of two that map at once one mapping stays.
        let fresh = Arc::new(map()?);
        let mut open = self.0.lock();
        if let Some(known) = known(&open) {
            return Ok(known);
        }
        if open.len() == open.capacity() {
            open.retain(|_, mapping| mapping.strong_count() > 0);
        }
        open.insert(key, Arc::downgrade(&fresh));
        Ok(fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::super::witness::{Witness, WITNESS};
    use super::*;
    use crate::status::bail;

    fn process(pid: i32, first: u8) -> Process {
        Process { pid, witness: Witness { addr: 4096, bytes: [first; WITNESS] } }
    }

    fn export(change: impl FnOnce(&mut Export)) -> Export {
        let (kind, gpu) = (ExportKind::Posix, [3; 16]);
        let mut export = Export { kind, handle: [1; 64], fd: None, base: 1 << 20, len: 1 << 16, gpu };
        change(&mut export);
        export
    }

    #[test]
    fn what_differs_in_anything_is_mapped_for_itself() {
        let (mappings, place) = (Mappings::default(), Place::gpu(0));
        let (owner, mut made) = (process(7, 1), 0);
        let mut open = |owner, export: &Export, place| {
            let map = || {
                made += 1;
                Ok(made)
            };
            mappings.open(owner, export, place, map).unwrap()
        };
        let first = open(Some(owner), &export(|_| {}), place);
        assert!(Arc::ptr_eq(&first, &open(Some(owner), &export(|_| {}), place)));
        let others = [
            // Another process of the same number, and what another process knows of this one.
            open(Some(process(7, 2)), &export(|_| {}), place),
            open(Some(process(8, 1)), &export(|_| {}), place),
            open(None, &export(|_| {}), place),
            open(None, &export(|_| {}), place),
            open(Some(owner), &export(|e| e.handle[63] = 0), place),
            open(Some(owner), &export(|e| e.base += 1), place),
            open(Some(owner), &export(|e| e.len += 1), place),
            open(Some(owner), &export(|e| e.kind = ExportKind::CudaIpc), place),
            open(Some(owner), &export(|e| e.gpu[0] = 0), place),
            open(Some(owner), &export(|_| {}), Place::gpu(1)),
        ];
        assert_eq!(others.map(|other| *other), std::array::from_fn(|i| i + 2));
    }

    #[test]
    fn a_mapping_ends_with_its_last_user_and_leaves_little() {
        let (mappings, owner, place) = (Mappings::default(), Some(process(7, 1)), Place::gpu(0));
        let (value, nothing) = (Arc::new(()), export(|_| {}));
        let map = || Ok(value.clone());
        let (one, two) =
            (mappings.open(owner, &nothing, place, map).unwrap(), mappings.open(owner, &nothing, place, map).unwrap());
        drop(one);
        assert_eq!(Arc::strong_count(&value), 2);
        drop(two);
        assert_eq!(Arc::strong_count(&value), 1);
        assert!(mappings.open(owner, &nothing, place, || bail!(Unsupported, "no longer")).is_err());
        let kept = mappings.open(owner, &nothing, place, map).unwrap();
        for i in 0..10_000 {
            mappings.open(owner, &export(|e| e.base += i + 1), place, map).unwrap();
        }
        assert!(mappings.0.lock().len() < 100 && Arc::strong_count(&value) == 2);
        assert!(Arc::ptr_eq(&kept, &mappings.open(owner, &nothing, place, map).unwrap()));
    }

    #[test]
    fn of_two_that_map_at_once_one_stays() {
        let (mappings, owner, place) = (Mappings::default(), Some(process(7, 1)), Place::gpu(0));
        let mut inner = None;
        let outer = mappings.open(owner, &export(|_| {}), place, || {
            inner = Some(mappings.open(owner, &export(|_| {}), place, || Ok(1))?);
            Ok(2)
        });
        assert!(Arc::ptr_eq(&outer.unwrap(), &inner.unwrap()));
    }
}
