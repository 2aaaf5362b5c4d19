//! GPU memory through CUDA: the copies of a round are launched together, and completion is read from mapped memory.
//! Knows jobs and places, nothing of connections and plugins.

use super::device::{DeviceCopier, StagingMemory, Ticket, View};
use crate::gpu::{
    CopyLauncher, Extent, Gpu, Job, Launched, MappedPtr, MemoryKind, PooledLauncher, INLINE_PIECES, PIECES_PER_JOB,
};
use crate::status::{bail, err, Result};
use crate::types::{Part, Place, MAX_EAGER};
use cuda_driver::{DeviceBuffer, PinnedBuffer};
use nccl_net_abi::{unpackNetDeviceHandle, MAX_SLOT_ENTRIES};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A small copy that takes longer has failed.
const SMALL_COPY_LIMIT: Duration = Duration::from_secs(5);
/// How long a closing connection waits for running jobs, which copy a few chunks.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);

/// A job waiting for the end of the round.
struct Queued {
    kind: Kind,
    segments: Vec<Extent>,
    len: u64,
}

enum Kind {
    Unpack { meta: MappedPtr, slot: usize, bounce: u64, read_count: bool },
    Pack { staging: u64 },
    Scatter { staging: u64 },
}

impl Queued {
    fn job(&self) -> Job<'_> {
        match self.kind {
            Kind::Unpack { meta, slot, bounce, read_count } => {
                Job::unpack(meta, slot, bounce, self.len, &self.segments, read_count)
            }
            Kind::Pack { staging } => Job::gather(&self.segments, staging, self.len),
            Kind::Scatter { staging } => Job::scatter(staging, &self.segments, self.len),
        }
    }
}

/// One GPU of a connection.
struct Unit {
    place: Place,
    gpu: Arc<Gpu>,
    // Dropped before the buffers that their jobs use.
    unpacking: Jobs,
    packing: Jobs,
    scratch: PinnedBuffer,
}

/// Jobs of one direction, launched in submission order. Each direction has its own streams: an unpack does not wait for
/// earlier packs.
struct Jobs {
    launchers: Vec<PooledLauncher<CopyLauncher>>,
    turn: usize,
    /// Most jobs of a launch.
    batch: usize,
    queued: Vec<Queued>,
    launched: VecDeque<Batch>,
    /// The number of the next job, and of the oldest one not known to be complete.
    next: u64,
    finished: u64,
}

/// Jobs that were launched together.
struct Batch {
    first: u64,
    jobs: u64,
    launcher: usize,
    launched: Launched,
}

/// Streams that launches use in turn: a launch of one chunk over PCIe is mostly latency, and several at once hide it.
const UNPACK_STREAMS: usize = 4;
const PACK_STREAMS: usize = 2;
/// Most jobs per launch. Packs are launched few at a time: chunks of one launch share the bus, and the first should be sent soon.
const UNPACK_BATCH: usize = 16;
const PACK_BATCH: usize = 2;
/// Most pieces of a small copy that go to the copy engine one by one; more become one kernel.
const FEW: usize = 2;

impl Jobs {
    fn new(gpu: &Arc<Gpu>, streams: usize, batch: usize) -> Result<Jobs> {
        Ok(Jobs {
            launchers: (0..streams).map(|_| gpu.launcher()).collect::<Result<_>>()?,
            turn: 0,
            batch,
            queued: Vec::new(),
            launched: VecDeque::new(),
            next: 0,
            finished: 0,
        })
    }

    fn queue(&mut self, job: Queued) -> Result<u64> {
        self.queued.push(job);
        self.next += 1;
        if self.queued.len() >= self.batch {
            self.flush()?;
        }
        Ok(self.next - 1)
    }

    /// Jobs of the next launch: as many as its parameters describe, at least one.
    fn next_batch(&self) -> usize {
        let mut pieces = 0;
        let fits = |job: &&Queued| {
            pieces += job.segments.len() + PIECES_PER_JOB;
            pieces <= INLINE_PIECES
        };
        self.queued.iter().take(self.batch).take_while(fits).count().max(1)
    }

    /// Launches queued jobs as far as the launchers have room.
    fn flush(&mut self) -> Result<()> {
        while !self.queued.is_empty() {
            let n = self.next_batch();
            let jobs: Vec<Job<'_>> = self.queued[..n].iter().map(Queued::job).collect();
            let launcher = self.turn % self.launchers.len();
            // SAFETY: the caller of `unpack`, `pack` or `scatter` keeps the jobs' memory until they are done.
            let Some(launched) = (unsafe { self.launchers[launcher].submit(&jobs) })? else { return Ok(()) };
            drop(jobs);
            self.turn += 1;
            let first = self.next - self.queued.len() as u64;
            self.launched.push_back(Batch { first, jobs: n as u64, launcher, launched });
            self.queued.drain(..n);
        }
        Ok(())
    }

    fn poll(&mut self, job: u64) -> Result<bool> {
        while job >= self.finished {
            let Some(batch) = self.launched.front() else { break };
            if !self.launchers[batch.launcher].poll(batch.launched)? {
                break;
            }
            self.finished = batch.first + batch.jobs;
            self.launched.pop_front();
        }
        Ok(job < self.finished)
    }

    fn busy(&self) -> bool {
        !self.queued.is_empty() || !self.launched.is_empty()
    }

    /// Drops jobs not yet launched and waits for the rest until `deadline`.
    fn quiesce(&mut self, deadline: Instant) -> Result<()> {
        self.queued.clear();
        let each =
            |launcher: &mut PooledLauncher<CopyLauncher>| launcher.quiesce(deadline.saturating_duration_since(Instant::now()));
        let results: Vec<Result<()>> = self.launchers.iter_mut().map(each).collect();
        results.into_iter().collect()
    }
}

impl Unit {
    fn new(place: Place) -> Result<Unit> {
        let Some(ordinal) = place.ordinal() else { bail!(Internal, "a GPU copy of host memory") };
        let gpu = Gpu::open(i32::from(ordinal))?;
        Ok(Unit {
            place,
            unpacking: Jobs::new(&gpu, UNPACK_STREAMS, UNPACK_BATCH)?,
            packing: Jobs::new(&gpu, PACK_STREAMS, PACK_BATCH)?,
            scratch: gpu.pinned(MAX_EAGER)?,
            gpu,
        })
    }

    fn jobs(&mut self, pack: bool) -> &mut Jobs {
        if pack {
            &mut self.packing
        } else {
            &mut self.unpacking
        }
    }

    /// The stream of small, synchronous copies.
    fn small(&mut self) -> &mut CopyLauncher {
        &mut self.unpacking.launchers[0]
    }

    /// The scratch buffer, which holds `len` bytes.
    fn scratch_for(&self, len: usize) -> Result<*mut u8> {
        if len > self.scratch.len() {
            bail!(Internal, "a small copy of {len} bytes is too large");
        }
        Ok(self.scratch.mapped().host)
    }

    /// Copies `len` bytes between `parts` and the scratch buffer (from the parts if `fetch`), and waits.
    ///
    /// # Safety
    /// `parts` are registered memory of this GPU and hold `len` bytes, as the scratch buffer does.
    unsafe fn copy_small(&mut self, parts: &[Part], len: usize, fetch: bool) -> Result<()> {
        let scratch = self.scratch.mapped();
        if parts.len() > FEW {
            let list = segments(parts);
            let len = len as u64;
            let job = if fetch { Job::gather(&list, scratch.device, len) } else { Job::scatter(scratch.device, &list, len) };
            // SAFETY: by the caller's contract; this waits for the job.
            return unsafe { self.run(job) };
        }
        // The copy engine starts sooner than a kernel, and does not wait for busy multiprocessors.
        let (stream, mut at) = (self.small().stream(), scratch.host);
        for part in parts {
            let n = part.len as usize;
            // SAFETY: by the caller's contract.
            unsafe {
                if fetch {
                    stream.device_to_host(at, part.addr, n)?;
                } else {
                    stream.host_to_device(part.addr, at, n)?;
                }
            }
            at = at.wrapping_add(n);
        }
        Ok(stream.finish(SMALL_COPY_LIMIT)?)
    }

    /// Reads a plain value from this GPU's memory, and waits for it.
    ///
    /// # Safety
    /// `src` holds a `T`, and any bytes there are a valid `T`.
    unsafe fn read<T: Copy>(&mut self, src: u64) -> Result<T> {
        let scratch = self.scratch_for(size_of::<T>())?;
        let stream = self.small().stream();
        // SAFETY: the scratch holds a T; by the caller's contract the source does.
        unsafe { stream.device_to_host(scratch, src, size_of::<T>()) }?;
        stream.finish(SMALL_COPY_LIMIT)?;
        // SAFETY: filled above; valid by the caller's contract; the scratch is page-aligned.
        Ok(unsafe { scratch.cast::<T>().read() })
    }

    /// Runs one small job to completion.
    ///
    /// # Safety
    /// As `CopyLauncher::submit`.
    unsafe fn run(&mut self, job: Job<'_>) -> Result<()> {
        let deadline = Instant::now() + SMALL_COPY_LIMIT;
        let mut launched = None;
        loop {
            match launched {
                // SAFETY: by the caller's contract.
                None => launched = unsafe { self.small().submit(&[job]) }?,
                Some(submitted) if self.small().poll(submitted)? => return Ok(()),
                Some(_) => std::hint::spin_loop(),
            }
            if Instant::now() > deadline {
                bail!(Gpu, "the GPU has not copied {} bytes within {SMALL_COPY_LIMIT:?}", job.len);
            }
        }
    }
}

/// The device copier of a connection, with state for each GPU that its transfers touch.
#[derive(Default)]
pub(crate) struct CudaDevice {
    units: Vec<Unit>,
}

/// Allocates a GPU's state before a connection needs it: at registration and during set-up. The caller must hold no connection
/// lock.
pub(crate) fn warm(gpu: &Arc<Gpu>) -> Result<()> {
    gpu.reserve_launchers(UNPACK_STREAMS + PACK_STREAMS)
}

/// The GPU whose memory contains `addr`, for a kernel to read there.
fn place_of(addr: u64) -> Result<Place> {
    match crate::gpu::memory_kind(addr)? {
        MemoryKind::Device { ordinal } => match u8::try_from(ordinal) {
            Ok(ordinal) => Ok(Place::gpu(ordinal)),
            Err(_) => Err(err!(Unsupported, "GPU {ordinal}")),
        },
        _ => Ok(Place::HOST),
    }
}

fn segments(parts: &[Part]) -> Vec<Extent> {
    parts.iter().map(|p| Extent { addr: p.addr, len: p.len }).collect()
}

impl CudaDevice {
    fn index(&mut self, place: Place) -> Result<usize> {
        if let Some(i) = self.units.iter().position(|u| u.place == place) {
            return Ok(i);
        }
        self.units.push(Unit::new(place)?);
        Ok(self.units.len() - 1)
    }

    fn unit(&mut self, place: Place) -> Result<&mut Unit> {
        let i = self.index(place)?;
        match self.units.get_mut(i) {
            Some(unit) => Ok(unit),
            None => bail!(Internal, "no GPU at {place:?}"),
        }
    }

    fn gpu(&mut self, place: Place) -> Result<Arc<Gpu>> {
        Ok(self.unit(place)?.gpu.clone())
    }
}

impl DeviceCopier for CudaDevice {
    fn within(&mut self, place: Place, body: &mut dyn FnMut() -> Result<bool>) -> Result<bool> {
        let gpu = self.gpu(place)?;
        gpu.with(body)
    }

    unsafe fn view(&mut self, handle: *const c_void, place: Place) -> Result<View> {
        // The handle lies in the memory of the comm's GPU, which may differ from the receiving GPU.
        let home = place_of(handle as u64)?;
        let reader = if home.is_device() { home } else { place };
        // SAFETY: by the caller's contract the handle is device memory that holds this structure.
        let raw: unpackNetDeviceHandle = unsafe { self.unit(reader)?.read(handle as u64) }?;
        let meta = MappedPtr::resolve(self.gpu(place)?.context(), raw.meta as u64)?;
        // A NIC writes a bounce buffer in device memory: the count must be read first, so that its data is visible.
        let home = place_of(raw.bounce_buf as u64)?;
        let (meta, meta_device) = (meta.host.cast(), meta.device);
        Ok(View { meta, meta_device, bounce: raw.bounce_buf as u64, home, read_count: home.is_device() })
    }

    unsafe fn unpack(&mut self, view: &View, slot: usize, len: usize, parts: &[Part], place: Place) -> Result<Ticket> {
        if !view.reaches(place) {
            bail!(Unsupported, "comms of {:?} cannot receive into memory of {place:?}", view.home);
        }
        let meta = MappedPtr { host: view.meta.cast_mut().cast(), device: view.meta_device };
        // SAFETY: the meta queue is live and the receive is done.
        let count = unsafe { super::device::entry_count(view.meta, slot) };
        if count > MAX_SLOT_ENTRIES as u64 {
            bail!(Plugin, "the plugin describes a receive with {count} fragments");
        }
        let kind = Kind::Unpack { meta, slot, bounce: view.bounce, read_count: view.read_count };
        let unit = self.index(place)?;
        let job = self.units[unit].unpacking.queue(Queued { kind, segments: segments(parts), len: len as u64 })?;
        Ok(Ticket::Job { unit, pack: false, job })
    }

    unsafe fn pack(&mut self, parts: &[Part], staging: *mut u8, place: Place) -> Result<Ticket> {
        let len = parts.iter().map(|p| p.len).sum();
        let unit = self.index(place)?;
        let kind = Kind::Pack { staging: staging as u64 };
        let job = self.units[unit].packing.queue(Queued { kind, segments: segments(parts), len })?;
        Ok(Ticket::Job { unit, pack: true, job })
    }

    unsafe fn scatter(&mut self, staging: *const u8, parts: &[Part], place: Place) -> Result<Ticket> {
        let len = parts.iter().map(|p| p.len).sum();
        let unit = self.index(place)?;
        let kind = Kind::Scatter { staging: staging as u64 };
        let job = self.units[unit].unpacking.queue(Queued { kind, segments: segments(parts), len })?;
        Ok(Ticket::Job { unit, pack: false, job })
    }

    fn flush(&mut self) -> Result<()> {
        self.units.iter_mut().try_for_each(|unit| {
            unit.packing.flush()?;
            unit.unpacking.flush()
        })
    }

    fn poll(&mut self, ticket: Ticket) -> Result<bool> {
        match ticket {
            Ticket::Done => Ok(true),
            Ticket::Job { unit, pack, job } => match self.units.get_mut(unit) {
                Some(unit) => unit.jobs(pack).poll(job),
                None => bail!(Internal, "a job without a GPU"),
            },
        }
    }

    fn busy(&self) -> bool {
        self.units.iter().any(|u| u.packing.busy() || u.unpacking.busy())
    }

    fn eager_bytes(&self) -> usize {
        MAX_EAGER
    }

    unsafe fn store(&mut self, bytes: &[u8], parts: &[Part], place: Place) -> Result<()> {
        let unit = self.unit(place)?;
        let scratch = unit.scratch_for(bytes.len())?;
        // SAFETY: the scratch has room for them, and no job uses it: small copies run to their end.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), scratch, bytes.len()) };
        // SAFETY: by the caller's contract.
        unsafe { unit.copy_small(parts, bytes.len(), false) }
    }

    unsafe fn fetch(&mut self, parts: &[Part], place: Place, out: &mut Vec<u8>) -> Result<()> {
        let len = parts.iter().map(|p| p.len as usize).sum();
        let unit = self.unit(place)?;
        let scratch = unit.scratch_for(len)?;
        // SAFETY: by the caller's contract.
        unsafe { unit.copy_small(parts, len, true) }?;
        // SAFETY: the copy has filled len bytes of the scratch.
        out.extend_from_slice(unsafe { std::slice::from_raw_parts(scratch, len) });
        Ok(())
    }

    fn staging(&mut self, len: usize, place: Place) -> Result<Box<dyn StagingMemory>> {
        Ok(Box::new(self.gpu(place)?.device_memory(len)?))
    }

    fn host_staging(&mut self, len: usize, place: Place) -> Result<Box<dyn StagingMemory>> {
        let memory = self.gpu(place)?.pinned(len)?;
        if memory.mapped().host as u64 != memory.mapped().device {
            bail!(Gpu, "pinned memory has different addresses on the GPU and the host");
        }
        Ok(Box::new(memory))
    }

    fn quiesce(&mut self) -> Result<()> {
        let deadline = Instant::now() + QUIESCE_LIMIT;
        let each = |unit: &mut Unit| unit.packing.quiesce(deadline).and(unit.unpacking.quiesce(deadline));
        let results: Vec<Result<()>> = self.units.iter_mut().map(each).collect();
        results.into_iter().collect()
    }
}

impl StagingMemory for PinnedBuffer {
    fn ptr(&self) -> *mut u8 {
        self.mapped().host
    }
}

impl StagingMemory for DeviceBuffer {
    fn ptr(&self) -> *mut u8 {
        DeviceBuffer::ptr(self) as *mut u8
    }
}
