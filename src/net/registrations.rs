//! Registered memory of a plugin: one registration per NIC and range, shared by all users and dropped after the last use. Any
//! open comm of the NIC can drop it; if none is open, the next one does. Knows of a plugin only its registration calls.

use super::{within, Scope};
use crate::config::MAX_CHUNK_BYTES;
use crate::status::{bail, Result};
use crate::types::Span;
use nccl_net_abi::NCCL_PTR_CUDA;
use process::Mutex;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// Registered memory of a comm.
pub(crate) type MHandle = *mut c_void;

/// The end of a registration.
pub(super) type End = Box<dyn FnOnce(&dyn Registrar) + Send>;

/// A plugin's registration calls.
pub(super) trait Registrar: Send + Sync {
    /// For messages.
    fn name(&self) -> &str;
    /// A registration serves every comm of its NIC, not only the one through which it was made.
    fn shared(&self) -> bool;
    /// The registrations of this process; a parent's belong to the parent.
    fn registrations(&self) -> &Registrations;
    /// Calls `end` where registrations may be dropped: in the plugin's thread, if it has one, and then without waiting.
    fn end_registration(self: Arc<Self>, end: End);
    /// # Safety
    /// `comm` is live; `[data, data + size)` stays mapped until the registration is dropped.
    unsafe fn reg_mr(&self, comm: *mut c_void, data: *mut c_void, size: usize, kind: c_int) -> Result<MHandle>;
    /// # Safety
    /// `comm` and `mhandle` are live and no request uses the registration.
    ///
    /// # Errors
    /// The plugin's: it may go on using the memory.
    unsafe fn dereg_mr(&self, comm: *mut c_void, mhandle: MHandle) -> Result<()>;
}

/// Alignment that plugins require of the base and the size of device memory.
const PAGE: u64 = nccl_net_abi::PAGE as u64;

/// Regions are registered in pieces that start this far apart, since plugins address by 31-bit offsets. Pieces overlap by a
/// chunk, so that every chunk lies within one piece.
const PIECE: u64 = 1 << 30;
const OVERLAP: u64 = MAX_CHUNK_BYTES as u64;

/// The piece of a region that contains a chunk starting at `addr`: its number and its range in whole pages.
pub(super) fn piece(span: Span, addr: u64) -> (u64, u64, u64) {
    let first = span.addr & !(PAGE - 1);
    let end = (span.addr + span.len).next_multiple_of(PAGE);
    let piece = addr.saturating_sub(first) / PIECE;
    let start = first + piece * PIECE;
    (piece, start, (PIECE + OVERLAP).min(end.saturating_sub(start)))
}

/// A registered range, with the comm if the plugin ties registrations to comms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    dev: usize,
    base: usize,
    len: usize,
    kind: c_int,
    comm: usize,
}

struct Entry {
    mhandle: usize,
    users: usize,
    /// Memory of the library that lasts as long as the registration.
    kept: Kept,
}

/// Something that keeps memory mapped.
pub(crate) type Keep = Box<dyn Send>;

/// What is dropped after a registration.
type Kept = Vec<Keep>;

/// A registration without users that no open comm could drop.
struct Left {
    dev: usize,
    mhandle: usize,
    kept: Kept,
}

/// An open comm through which registrations of its NIC can be dropped.
struct Open {
    dev: usize,
    comm: usize,
    gpu: Scope,
}

#[derive(Default)]
struct Table {
    entries: HashMap<Key, Entry>,
    open: Vec<Open>,
    left: Vec<Left>,
}

/// The registrations of a plugin. The lock is held during the plugin's calls: if the plugin has a thread, no other takes it.
#[derive(Default)]
pub(super) struct Registrations(Mutex<Table>);

/// A shared registration, released when dropped. It may outlive the comm it came from.
pub(crate) struct Registration {
    plugin: Arc<dyn Registrar>,
    key: Key,
    mhandle: usize,
}

impl Registration {
    /// The mhandle for requests.
    pub(crate) fn mhandle(&self) -> MHandle {
        self.mhandle as MHandle
    }
}

impl Registrations {
    /// A comm was opened: drops registrations that waited for one.
    pub(super) fn opened(&self, plugin: &dyn Registrar, dev: usize, comm: *mut c_void, gpu: &Scope) {
        let mut table = self.0.lock();
        table.open.push(Open { dev, comm: comm as usize, gpu: gpu.clone() });
        let unused = table.settle(plugin, dev);
        drop((table, unused));
    }

    /// A comm is about to be closed: nothing is dropped through it from now on.
    pub(super) fn closing(&self, plugin: &dyn Registrar, dev: usize, comm: *mut c_void) {
        let mut table = self.0.lock();
        let unused = table.settle(plugin, dev);
        table.open.retain(|o| o.comm != comm as usize);
        drop((table, unused));
    }

    /// The shared registration of a range, made through `comm` on first use. `keep` is dropped after the plugin has dropped the
    /// registration: once the comm is closed, that may be later than the end of the result. It is never dropped if the plugin fails to.
    ///
    /// # Safety
    /// `comm` is open. The memory stays mapped until the registration and all comms that use it are dropped, or `keep` is.
    pub(super) unsafe fn acquire(
        &self,
        plugin: &Arc<impl Registrar + 'static>,
        at: (usize, *mut c_void),
        base: usize,
        len: usize,
        kind: c_int,
        keep: Option<Keep>,
    ) -> Result<Registration> {
        let (dev, comm) = at;
        let tied = if plugin.shared() { 0 } else { comm as usize };
        let key = Key { dev, base, len, kind, comm: tied };
        if kind == NCCL_PTR_CUDA && (base as u64 % PAGE != 0 || len as u64 % PAGE != 0) {
            bail!(Internal, "{len} bytes of device memory at {base:#x} are not whole pages and cannot be registered");
        }
        let mut table = self.0.lock();
        if let Some(entry) = table.entries.get_mut(&key) {
            entry.users += 1;
            entry.kept.extend(keep);
            return Ok(Registration { plugin: plugin.clone(), key, mhandle: entry.mhandle });
        }
        // SAFETY: by the caller's contract.
        let mhandle = unsafe { plugin.reg_mr(comm, base as *mut c_void, len, kind) }? as usize;
        table.entries.insert(key, Entry { mhandle, users: 1, kept: keep.into_iter().collect() });
        Ok(Registration { plugin: plugin.clone(), key, mhandle })
    }

    fn release(&self, plugin: &dyn Registrar, key: &Key) {
        let mut table = self.0.lock();
        let Some(entry) = table.entries.get_mut(key) else { return };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        let Some(Entry { mhandle, kept, .. }) = table.entries.remove(key) else { return };
        // Registrations that are tied to a comm ended when it was closed.
        if key.comm == 0 || table.open.iter().any(|o| o.comm == key.comm) {
            table.left.push(Left { dev: key.dev, mhandle, kept });
            let unused = table.settle(plugin, key.dev);
            drop((table, unused));
        }
    }
}

impl Table {
    /// Drops unused registrations, if the NIC has an open comm. Returns what they kept, to be dropped without the lock.
    fn settle(&mut self, plugin: &dyn Registrar, dev: usize) -> Kept {
        let mut unused = Kept::new();
        let Some(open) = self.open.iter().find(|o| o.dev == dev) else { return unused };
        let drop_one = |mhandle: usize| {
            // SAFETY: the comm is open while it is in the table; the registration has no users, so no request uses it.
            within(&open.gpu, || Ok(unsafe { plugin.dereg_mr(open.comm as *mut c_void, mhandle as MHandle) }))
        };
        self.left.retain_mut(|left| {
            if left.dev != dev {
                return true;
            }
            match drop_one(left.mhandle) {
                Ok(Ok(())) => unused.append(&mut left.kept),
                Ok(Err(e)) => {
                    let kept = std::mem::take(&mut left.kept);
                    if kept.is_empty() {
                        log::warn!("{e}; the plugin may go on using the memory");
                    } else {
                        log::warn!(
                            "{e}; {} blocks of staging memory are never freed, since the plugin may go on using them",
                            kept.len()
                        );
                    }
                    std::mem::forget(kept);
                }
                Err(e) => {
                    log::debug!("a registration with plugin {} waits: {e}", plugin.name());
                    return true;
                }
            }
            false
        });
        unused
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let key = self.key;
        self.plugin.clone().end_registration(Box::new(move |plugin| plugin.registrations().release(plugin, &key)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every chunk of a region lies in its piece. Pieces are whole pages, below 2 GiB, and end at the region's last page at
        /// most.
        #[test]
        fn chunks_lie_in_their_piece(addr in 1u64..1 << 40, len in 1u64..5 << 30, at in any::<prop::sample::Index>(), chunk in 1u64..=OVERLAP) {
            let span = Span { id: 1, addr, len };
            let start = addr + at.index(len as usize) as u64;
            let chunk = chunk.min(addr + len - start);
            let (_, base, size) = piece(span, start);
            prop_assert!(base <= start && start + chunk <= base + size);
            prop_assert!(base % PAGE == 0 && size % PAGE == 0 && size < 1 << 31);
            prop_assert!(base + PAGE > addr.min(base + PAGE - 1) && base + size <= (addr + len).next_multiple_of(PAGE));
        }
    }
}
