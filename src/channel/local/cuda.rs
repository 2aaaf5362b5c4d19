//! Memory of GPUs that peers of one host share: CUDA IPC handles for memory of `cudaMalloc`, descriptors for memory that is mapped piece by
//! piece, and pulls by kernel or copy engine. Whatever else there is, is refused. Knows nothing of sockets, rings and transfers.

use super::puller::{Export, ExportKind, GpuId, LocalMemory, Mapping, Piece, Pull};
use crate::fork::PerProcess;
use crate::gpu::{Gpu, Pulls};
use crate::status::{bail, Result};
use crate::types::Place;
use cuda_driver::{allocation, ipc_handle, posix_handle, Allocation, IpcHandle, Link, Mapped, Sharing};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Allocations of one region at most: expandable segments map 20 MiB at a time.
const MAX_ALLOCATIONS: usize = 8192;
/// Mappings of other processes' memory that a process holds at most.
const MAX_MAPPINGS: usize = 32 << 10;
/// Handles of this process's own that it still knows when they come back.
const MAX_OWN: usize = 4096;
/// Time that a connection's end leaves to pulls under way.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);

/// How this process pulls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CudaOptions {
    /// Blocks of a launch at most, which is the share of the GPU that pulls take.
    pub blocks: u32,
    /// Pull over PCIe too, where reads are slow.
    pub bus: bool,
}

impl Default for CudaOptions {
    fn default() -> CudaOptions {
        CudaOptions { blocks: 66, bus: false }
    }
}

/// Handles that this process gave out. The driver opens no handle of its own process, and there is nothing to map either.
#[derive(Default)]
struct Own {
    of: HashMap<IpcHandle, (i32, Allocation)>,
    order: VecDeque<IpcHandle>,
}

impl Own {
    fn note(&mut self, handle: IpcHandle, ordinal: i32, allocation: Allocation) {
        if self.of.insert(handle, (ordinal, allocation)).is_none() {
            self.order.push_back(handle);
        }
        if self.order.len() > MAX_OWN {
            if let Some(oldest) = self.order.pop_front() {
                self.of.remove(&oldest);
            }
        }
    }
}

static OWN: PerProcess<Mutex<Own>> = PerProcess::new(Mutex::default);
/// Mappings of this process.
static MAPPINGS: AtomicUsize = AtomicUsize::new(0);

/// One mapping of the process's share.
struct Counted;

impl Counted {
    fn new() -> Result<Counted> {
        let before = MAPPINGS.fetch_add(1, Ordering::Relaxed);
        let counted = Counted;
        if before >= MAX_MAPPINGS {
            bail!(Resource, "this process has {MAX_MAPPINGS} allocations of others mapped");
        }
        Ok(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        MAPPINGS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a mapping's id stands for.
enum Open {
    /// Memory of this process, which needs no mapping.
    Own,
    Mapped {
        _mapped: Mapped,
        _counted: Counted,
    },
}

/// Pulls into memory of one GPU.
struct Unit {
    place: Place,
    pulls: Pulls,
}

/// Memory of GPUs on a connection within a host.
pub(crate) struct CudaMemory {
    options: CudaOptions,
    // Dropped before the mappings that its pulls read.
    units: Vec<Unit>,
    open: HashMap<u64, Open>,
    next: u64,
}

impl CudaMemory {
    /// Nothing is opened or allocated before it is needed.
    pub(crate) fn new(options: CudaOptions) -> CudaMemory {
        CudaMemory { options, units: Vec::new(), open: HashMap::new(), next: 0 }
    }

    /// The unit that pulls into memory of `place`.
    fn unit(&mut self, place: Place) -> Result<usize> {
        if let Some(i) = self.units.iter().position(|u| u.place == place) {
            return Ok(i);
        }
        self.units.push(Unit { place, pulls: Pulls::new(&gpu(place)?, self.options.blocks)? });
        Ok(self.units.len() - 1)
    }

    fn keep(&mut self, open: Open, addr: u64) -> Mapping {
        self.next += 1;
        self.open.insert(self.next, open);
        Mapping { id: self.next, addr }
    }

    fn link_allows(&self, from: i32, to: i32) -> Result<bool> {
        Ok(match cuda_driver::link(from, to)? {
            Link::Same | Link::Fast => true,
            Link::Bus => self.options.bus,
            Link::None => false,
        })
    }
}

fn ordinal(place: Place) -> Result<i32> {
    match place.ordinal() {
        Some(ordinal) => Ok(ordinal.into()),
        None => bail!(Unsupported, "host memory is not memory of a GPU"),
    }
}

fn gpu(place: Place) -> Result<Arc<Gpu>> {
    Gpu::open(ordinal(place)?)
}

/// An allocation that can be told to a peer.
fn export_of(gpu: &Gpu, ordinal: i32, uuid: GpuId, found: Allocation) -> Result<Export> {
    let Allocation { base, len, id, sharing } = found;
    let (kind, handle, fd) = match sharing {
        Sharing::Ipc => {
            let handle = ipc_handle(gpu.context(), base)?;
            OWN.get().lock().note(handle, ordinal, found);
            (ExportKind::CudaIpc, handle, None)
        }
        Sharing::Posix => {
            let mut handle = [0; 64];
            handle[..8].copy_from_slice(&id.to_le_bytes());
            (ExportKind::Posix, handle, Some(posix_handle(gpu.context(), base)?))
        }
        Sharing::No(why) => bail!(Unsupported, "GPU memory at {base:#x} cannot be shared with another process: {why}"),
    };
    Ok(Export { kind, handle, fd, base, len, gpu: uuid })
}

/// Memory of this process under a handle of its own.
fn open_own(memory: &CudaMemory, export: &Export, to: i32, owner: i32, noted: Allocation) -> Result<()> {
    let (home, here) = (Gpu::open(owner)?, Gpu::open(to)?);
    let same = allocation(home.context(), noted.base).is_ok_and(|now| now == noted);
    if !same || export.base != noted.base || export.len > noted.len {
        bail!(Gpu, "an IPC handle of memory that is gone");
    }
    if !memory.link_allows(to, owner)? {
        bail!(Unsupported, "GPU {to} does not reach GPU {owner}");
    }
    if to != owner {
        cuda_driver::enable_peer_access(here.context(), home.context())?;
    }
    Ok(())
}

/// A peer's allocation, opened, of the length that the peer says.
fn open_foreign(export: &Export, gpu: &Gpu) -> Result<Mapped> {
    let Ok(len) = usize::try_from(export.len) else { bail!(Protocol, "a mapping of {} bytes", export.len) };
    let mapped = match (export.kind, &export.fd) {
        (ExportKind::CudaIpc, None) => Mapped::ipc(gpu.context(), &export.handle)?,
        (ExportKind::Posix, Some(fd)) => Mapped::posix(gpu.context(), fd.as_fd(), len)?,
        (kind, _) => bail!(Protocol, "an export of kind {kind:?} for a GPU"),
    };
    if mapped.len() < len {
        bail!(Protocol, "a handle of {} bytes instead of {len}", mapped.len());
    }
    Ok(mapped)
}

impl LocalMemory for CudaMemory {
    fn export(&mut self, place: Place, addr: u64, len: u64) -> Result<Vec<Export>> {
        let ordinal = ordinal(place)?;
        let (gpu, uuid) = (Gpu::open(ordinal)?, cuda_driver::uuid_of(ordinal)?);
        let Some(end) = addr.checked_add(len) else { bail!(InvalidArgument, "{len} bytes at {addr:#x}") };
        let (mut exports, mut at) = (Vec::new(), addr);
        while at < end {
            if exports.len() == MAX_ALLOCATIONS {
                bail!(Unsupported, "a region of more than {MAX_ALLOCATIONS} allocations");
            }
            let found = allocation(gpu.context(), at)?;
            let next = found.base.saturating_add(found.len);
            exports.push(export_of(&gpu, ordinal, uuid, found)?);
            at = next;
        }
        Ok(exports)
    }

    fn open(&mut self, export: &Export, place: Place) -> Result<Mapping> {
        let to = ordinal(place)?;
        // What a pull needs is made now, not when data is to move.
        self.unit(place)?;
        let own = OWN.get().lock().of.get(&export.handle).copied();
        if let (ExportKind::CudaIpc, Some((owner, noted))) = (export.kind, own) {
            open_own(self, export, to, owner, noted)?;
            return Ok(self.keep(Open::Own, export.base));
        }
        let counted = Counted::new()?;
        let mapped = open_foreign(export, &*Gpu::open(to)?)?;
        let addr = mapped.ptr();
        Ok(self.keep(Open::Mapped { _mapped: mapped, _counted: counted }, addr))
    }

    fn close(&mut self, mapping: Mapping) {
        self.open.remove(&mapping.id);
    }

    unsafe fn pull(&mut self, place: Place, pieces: &[Piece]) -> Result<Pull> {
        let unit = self.unit(place)?;
        // SAFETY: by the caller's contract.
        let job = unsafe { self.units[unit].pulls.start(pieces) }?;
        Ok(Pull { unit: unit as u32, job })
    }

    fn poll(&mut self, pull: Pull) -> Result<bool> {
        match self.units.get_mut(pull.unit as usize) {
            Some(unit) => unit.pulls.poll(pull.job),
            None => bail!(Internal, "a pull of no GPU"),
        }
    }

    fn busy(&self) -> bool {
        self.units.iter().any(|u| u.pulls.busy())
    }

    fn quiesce(&mut self) -> Result<()> {
        let results: Vec<Result<()>> = self.units.iter_mut().map(|u| u.pulls.quiesce(QUIESCE_LIMIT)).collect();
        results.into_iter().collect()
    }

    fn reaches(&mut self, place: Place, peer_gpu: &GpuId) -> bool {
        let Some(ordinal) = place.ordinal().map(i32::from).filter(|_| *peer_gpu != GpuId::default()) else { return false };
        match cuda_driver::ordinal_of_uuid(peer_gpu) {
            Ok(Some(peer)) => self.link_allows(ordinal, peer).unwrap_or(false),
            // Hidden from this process (CUDA_VISIBLE_DEVICES), which keeps nobody from opening its memory: opening tells.
            Ok(None) => true,
            Err(_) => false,
        }
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        // A kernel that reads a mapping while it ends would end the application's context: then mappings stay.
        let quiet = self.units.iter_mut().all(|u| u.pulls.quiesce(Duration::ZERO).is_ok());
        if !quiet {
            std::mem::forget(std::mem::take(&mut self.open));
        }
    }
}

#[cfg(test)]
mod bench;
#[cfg(test)]
mod owner;
#[cfg(test)]
mod tests;
