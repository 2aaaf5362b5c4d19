//! GPU memory that peers on one host share: CUDA IPC handles for memory of `cudaMalloc`, descriptors for memory that is mapped piece by
//! piece, areas for peers that push, and pulls by kernel or copy engine. Whatever else there is, is refused. Knows nothing of sockets, rings and transfers.

use super::mappings::Mappings;
use super::witness::Process;
use super::{Area, Export, ExportKind, GpuId, LocalMemory, Manner, Mapping, Piece, Pull};
use crate::gpu::{close_later, Gpu, PullOptions, Pulls};
use crate::status::{bail, Result};
use crate::types::Place;
use cuda_driver::{allocation, ipc_handle, posix_handle, shareable, Allocation, Link, Mapped, Sharing, Stream};
use process::PerProcess;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Allocations of one region at most: expandable segments map 20 MiB at a time.
const MAX_ALLOCATIONS: usize = 8192;
/// Mappings of other processes' memory that a process holds at most.
const MAX_MAPPINGS: usize = 32 << 10;
/// Areas for peers that push which a process has at most.
const MAX_AREAS: usize = 64;
/// Time that a connection's end leaves to pulls under way.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);

/// How this process pulls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CudaOptions {
    /// How pulls are spread over the GPU.
    pub pulls: PullOptions,
    /// Which side copies; `None`: as the link wants it.
    pub manner: Option<Manner>,
}

/// Exports of other processes that this one has mapped.
static MAPPED: PerProcess<Mappings<Open>> = PerProcess::new(Mappings::default);
/// Mappings of this process, and its areas.
static MAPPINGS: AtomicUsize = AtomicUsize::new(0);
static AREAS: AtomicUsize = AtomicUsize::new(0);

/// One of the process's share of something.
struct Counted(&'static AtomicUsize);

impl Counted {
    fn new(count: &'static AtomicUsize, most: usize, what: &str) -> Result<Counted> {
        let before = count.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(count);
        if before >= most {
            bail!(Resource, "this process has {most} {what}");
        }
        Ok(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a mapping's id stands for.
struct Open(Option<(Mapped, Counted)>);

impl Open {
    fn new(mapped: Mapped) -> Result<Open> {
        Ok(Open(Some((mapped, Counted::new(&MAPPINGS, MAX_MAPPINGS, "allocations of others mapped")?))))
    }

    fn ptr(&self) -> u64 {
        self.0.as_ref().map_or(0, |(mapped, _)| mapped.ptr())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        close_later(self.0.take());
    }
}

/// What an area's id stands for.
struct OwnArea {
    place: Place,
    mapped: Mapped,
    _counted: Counted,
}

/// Pulls into memory of one GPU.
struct Unit {
    place: Place,
    pulls: Pulls,
}

/// GPU memory of a connection on one host.
pub(crate) struct CudaMemory {
    options: CudaOptions,
    // Dropped before the mappings that its pulls read.
    units: Vec<Unit>,
    open: HashMap<u64, Arc<Open>>,
    areas: HashMap<u64, OwnArea>,
    next: u64,
}

impl CudaMemory {
    /// Nothing is opened or allocated before it is needed.
    pub(crate) fn new(options: CudaOptions) -> CudaMemory {
        CudaMemory { options, units: Vec::new(), open: HashMap::new(), areas: HashMap::new(), next: 0 }
    }

    /// The unit that pulls into memory of `place`.
    fn unit(&mut self, place: Place) -> Result<usize> {
        if let Some(i) = self.units.iter().position(|u| u.place == place) {
            return Ok(i);
        }
        self.units.push(Unit { place, pulls: Pulls::new(&gpu(place)?, self.options.pulls)? });
        Ok(self.units.len() - 1)
    }

    /// How bytes get from memory of `from` into memory of `to`, if at all.
    fn manner(&self, to: i32, from: i32) -> Result<Option<Manner>> {
        let by_link = match cuda_driver::link(to, from)? {
            Link::Same | Link::Fast => Manner::Pull,
            Link::Bus => Manner::Push,
            Link::None => return Ok(None),
        };
        Ok(Some(self.options.manner.unwrap_or(by_link)))
    }

    fn add(&mut self, open: Arc<Open>) -> Mapping {
        let addr = open.ptr();
        self.next += 1;
        self.open.insert(self.next, open);
        Mapping { id: self.next, addr }
    }
}

fn ordinal(place: Place) -> Result<i32> {
    match place.ordinal() {
        Some(ordinal) => Ok(ordinal.into()),
        None => bail!(Unsupported, "internal error: {place:?} is no GPU"),
    }
}

/// Whether NVLink joins a GPU of this process and another one; `None` where NVML is missing.
fn joined_by_nvlink(own: i32, other: &GpuId) -> Option<bool> {
    cuda_driver::uuid_of(own).ok().and_then(|own| cuda_driver::joined_by_nvlink(&own, other))
}

/// How bytes get from a GPU that this process does not see: where it is unknown what lies between the two they are pulled.
fn manner_by_nvlink(to: i32, from: &GpuId) -> Manner {
    match joined_by_nvlink(to, from) {
        Some(false) if cuda_driver::uuid_of(to).ok().as_ref() != Some(from) => Manner::Push,
        _ => Manner::Pull,
    }
}

fn gpu(place: Place) -> Result<Arc<Gpu>> {
    Gpu::open(ordinal(place)?)
}

/// An allocation as it is announced to a peer.
fn export_of(gpu: &Gpu, uuid: GpuId, found: Allocation) -> Result<Export> {
    let Allocation { base, len, id, sharing } = found;
    let (kind, handle) = match sharing {
        Sharing::Ipc => (ExportKind::CudaIpc, ipc_handle(gpu.context(), base)?),
        Sharing::Posix => {
            let mut handle = [0; 64];
            handle[..8].copy_from_slice(&id.to_le_bytes());
            (ExportKind::Posix, handle)
        }
        Sharing::No(why) => bail!(Unsupported, "GPU memory at {base:#x} cannot be shared with another process: {why}"),
    };
    Ok(Export { kind, handle, fd: None, base, len, gpu: uuid })
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
            exports.push(export_of(&gpu, uuid, found)?);
            at = next;
        }
        Ok(exports)
    }

    fn descriptor(&mut self, place: Place, export: &Export) -> Result<OwnedFd> {
        Ok(posix_handle(gpu(place)?.context(), export.base)?)
    }

    fn open(&mut self, export: &Export, place: Place, owner: Option<Process>) -> Result<Mapping> {
        let to = ordinal(place)?;
        // What a pull needs is made now, not when data is to move.
        self.unit(place)?;
        let open = MAPPED.get().open(owner, export, place, || Open::new(open_foreign(export, &*Gpu::open(to)?)?))?;
        Ok(self.add(open))
    }

    fn close(&mut self, mapping: Mapping) {
        self.open.remove(&mapping.id);
    }

    fn area(&mut self, place: Place, len: usize) -> Result<Area> {
        // What copies from there is made now, too.
        self.unit(place)?;
        let counted = Counted::new(&AREAS, MAX_AREAS, "areas that peers push into")?;
        let gpu = gpu(place)?;
        let mapped = shareable(gpu.context(), len)?;
        let stream = Stream::new(gpu.context())?;
        // The peer must not see what was there before.
        // SAFETY: the range is this call's own; where the fill does not end it stays for ever.
        let filled = unsafe { stream.fill(mapped.ptr(), 0, len) }.and_then(|()| stream.finish(QUIESCE_LIMIT));
        if let Err(e) = filled {
            std::mem::forget((mapped, stream));
            return Err(e.into());
        }
        self.next += 1;
        let area = Area { id: self.next, addr: mapped.ptr() };
        self.areas.insert(self.next, OwnArea { place, mapped, _counted: counted });
        Ok(area)
    }

    fn export_area(&mut self, area: &Area) -> Result<Export> {
        let Some(own) = self.areas.get(&area.id) else { bail!(Internal, "unknown area {}", area.id) };
        let fd = posix_handle(gpu(own.place)?.context(), own.mapped.ptr())?;
        let (base, len) = (own.mapped.ptr(), own.mapped.len() as u64);
        let gpu = cuda_driver::uuid_of(ordinal(own.place)?)?;
        Ok(Export { kind: ExportKind::Posix, handle: [0; 64], fd: Some(fd), base, len, gpu })
    }

    fn drop_area(&mut self, area: Area) {
        if let Some(own) = self.areas.remove(&area.id) {
            close_later(own);
        }
    }

    fn open_area(&mut self, export: &Export, place: Place) -> Result<Mapping> {
        self.unit(place)?;
        let (ExportKind::Posix, Some(fd), Ok(len)) = (export.kind, &export.fd, usize::try_from(export.len)) else {
            bail!(Protocol, "an area of kind {:?} for a GPU", export.kind)
        };
        let mapped = Mapped::posix_writable(gpu(place)?.context(), fd.as_fd(), len)?;
        Ok(self.add(Arc::new(Open::new(mapped)?)))
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

    fn ready(&mut self, place: Place) -> Result<()> {
        self.unit(place).map(drop)
    }

    fn reaches(&mut self, place: Place, peer_gpu: &GpuId) -> Option<Manner> {
        let ordinal = place.ordinal().map(i32::from).filter(|_| *peer_gpu != GpuId::default())?;
        match cuda_driver::ordinal_of_uuid(peer_gpu) {
            Ok(Some(peer)) => self.manner(ordinal, peer).ok()?,
            // Hidden from this process (CUDA_VISIBLE_DEVICES), which does not keep it from opening memory there: opening shows.
            Ok(None) => Some(self.options.manner.unwrap_or_else(|| manner_by_nvlink(ordinal, peer_gpu))),
            Err(_) => None,
        }
    }

    fn by_nvlink(&self, place: Place, peer_gpu: &GpuId) -> bool {
        let own = ordinal(place).ok().and_then(|ordinal| Some((ordinal, cuda_driver::uuid_of(ordinal).ok()?)));
        let Some((ordinal, _)) = own.filter(|(_, uuid)| uuid != peer_gpu) else { return false };
        joined_by_nvlink(ordinal, peer_gpu).unwrap_or_else(|| {
            // Without NVML: no other link has atomics.
            let peer = cuda_driver::ordinal_of_uuid(peer_gpu).ok().flatten();
            peer.is_some_and(|peer| cuda_driver::link(ordinal, peer).is_ok_and(|link| link == Link::Fast))
        })
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        // A kernel that reads a mapping while it ends would end the application's context: then mappings stay.
        let quiet = self.units.iter_mut().all(|u| u.pulls.quiesce(Duration::ZERO).is_ok());
        let (open, areas) = (std::mem::take(&mut self.open), std::mem::take(&mut self.areas));
        match quiet {
            true if areas.is_empty() => {}
            true => close_later(areas),
            false => std::mem::forget((open, areas)),
        }
    }
}

#[cfg(test)]
mod bench;
#[cfg(test)]
mod owner;
#[cfg(test)]
mod tests;
