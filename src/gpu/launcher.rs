//! Submits copy jobs to the GPU and observes their completion in mapped host memory: no event, no stream and no allocation
//! per job. One ring of job slots, one stream, used by one thread. Knows message layouts, not requests.

use super::context::{Gpu, Kernels, Stream};
use super::driver::check;
use super::layout::*;
use super::memory::{message_len, DeviceBuffer, MappedPtr, PinnedBuffer};
use super::plan::{cut, far_room, join, plan};
use crate::status::{bail, err, Error, Result};
use cudarc::driver::sys;
use nccl_net_abi::{loadMeta, netUnpackMeta};
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Pieces that travel inside the parameters of a launch, jobs counted as [`PIECES_PER_JOB`] of them. More are read from a table over
/// PCIe, which costs a short job much of its time.
pub(crate) const INLINE_PIECES: usize = (ARGS - HEADER) / size_of::<Item>();
/// Room of a job's description in pieces.
pub(crate) const PIECES_PER_JOB: usize = size_of::<JobArgs>().div_ceil(size_of::<Item>());

/// Jobs in flight, and how long the outcome of a finished one is remembered.
const SLOTS: usize = 1024;
/// Bytes of a slot's status: a cache line, so that the GPU's write disturbs no neighbour.
const STATUS: usize = 64;
/// Bytes of a slot's counters on the device.
const STATE: usize = 16;
/// Pinned memory for segment tables of jobs in flight.
const TABLES: u64 = 4 << 20;
/// Unfinished polls between two looks at the stream, where a failed kernel shows.
const POLLS_PER_CHECK: u32 = 8192;

/// A piece of the scattered side, in message order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// First byte: device memory, or mapped host memory by its device name.
    pub addr: u64,
    /// Bytes, more than 0.
    pub len: u64,
}

/// How the flat side holds the message.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fragments {
    /// In one piece, in order.
    Whole,
    /// As the plugin's meta queue says.
    Row {
        /// The slot's row of `loadMeta`.
        row: MappedPtr,
        /// The slot's count.
        count: MappedPtr,
        /// The kernel reads the count before it reads any flat byte, as the contract asks where the bounce buffer is device
        /// memory that a NIC writes. Costs one PCIe round trip (about 1.5 us).
        read_count: bool,
    },
}

/// One message to copy between a flat side and a scattered side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    /// How the flat side is cut.
    pub fragments: Fragments,
    /// First byte of the flat side: device memory, or mapped host memory by its device name.
    pub flat: u64,
    /// Bytes of the message, as announced.
    pub len: u64,
    /// The scattered side; lengths add up to `len`.
    pub segments: &'a [Segment],
    /// From the segments to the flat side; otherwise from the flat side to the segments.
    pub gather: bool,
}

impl<'a> Job<'a> {
    /// Unpacks the receive in `slot` of a meta queue: bounce buffer to segments.
    pub(crate) fn unpack(
        meta: MappedPtr,
        slot: usize,
        bounce: u64,
        len: u64,
        segments: &'a [Segment],
        read_count: bool,
    ) -> Job<'a> {
        let slot = slot % nccl_net_abi::MAX_REQUESTS;
        let row = meta.offset(offset_of!(netUnpackMeta, mem) + slot * MAX_ENTRIES * size_of::<loadMeta>());
        let count = meta.offset(offset_of!(netUnpackMeta, cnt) + slot * size_of::<u64>());
        Job { fragments: Fragments::Row { row, count, read_count }, flat: bounce, len, segments, gather: false }
    }
    /// Packs segments into contiguous staging.
    pub(crate) fn gather(segments: &'a [Segment], staging: u64, len: u64) -> Job<'a> {
        Job { fragments: Fragments::Whole, flat: staging, len, segments, gather: true }
    }
    /// Spreads contiguous staging over segments.
    pub(crate) fn scatter(staging: u64, segments: &'a [Segment], len: u64) -> Job<'a> {
        Job { fragments: Fragments::Whole, flat: staging, len, segments, gather: false }
    }
}

/// Jobs that were submitted together; asked for with [`CopyLauncher::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    first: u64,
    jobs: u32,
}

/// What a slot's latest job came to.
#[derive(Clone, Default)]
struct Slot {
    sequence: u32,
    len: u32,
    /// Where the tables of later jobs begin.
    tables_end: u64,
    failure: Option<Error>,
}

/// The launcher. One thread at a time.
pub(crate) struct CopyLauncher {
    gpu: Arc<Gpu>,
    stream: Stream,
    kernels: Kernels,
    status: PinnedBuffer,
    tables: PinnedBuffer,
    state: DeviceBuffer,
    args: Box<Args>,
    /// Pieces of the job at hand.
    items: Vec<Item>,
    slots: Vec<Slot>,
    /// Number of the next job, and of the oldest that is not known to be finished.
    head: u64,
    tail: u64,
    tables_head: u64,
    tables_tail: u64,
    unfinished_polls: u32,
    /// The stream failed: nothing completes any more.
    broken: Option<Error>,
}

impl CopyLauncher {
    /// A launcher on `gpu` with a stream of its own; loads the kernels if nobody has.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<CopyLauncher> {
        let kernels = gpu.kernels()?;
        let state = DeviceBuffer::new(gpu, SLOTS * STATE)?;
        state.fill(0)?;
        Ok(CopyLauncher {
            gpu: gpu.clone(),
            stream: Stream::new(gpu)?,
            kernels,
            status: PinnedBuffer::new(gpu, SLOTS * STATUS)?,
            tables: PinnedBuffer::new(gpu, TABLES as usize)?,
            state,
            args: Box::new(Args { jobs: 0, reserved: [0; 3], blob: [0; ARGS - HEADER] }),
            items: Vec::with_capacity(ARGS / size_of::<Item>()),
            slots: vec![Slot::default(); SLOTS],
            head: 0,
            tail: 0,
            tables_head: 0,
            tables_tail: 0,
            unfinished_polls: 0,
            broken: None,
        })
    }

    /// The stream jobs run on, in order of submission.
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Submits jobs: one launch where they fit one. `None` when the ring has no room now: poll, then try again. An error means
    /// that nothing of the call was submitted, unless the GPU itself failed.
    ///
    /// # Safety
    /// Until the ticket is done: flat sides and segments are valid memory of this GPU (or mapped host memory), sources are not
    /// written and destinations are used by nobody else, other jobs in flight included (they may run at the same time), and rows
    /// and counts are a live meta queue whose receive is done and not consumed.
    pub(crate) unsafe fn submit(&mut self, jobs: &[Job<'_>]) -> Result<Option<Ticket>> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if jobs.is_empty() || jobs.len() > SLOTS {
            bail!(InvalidArgument, "{} copy jobs in one call, the limit is {SLOTS}", jobs.len());
        }
        let counts = jobs.iter().map(|job| checked_count(job)).collect::<Result<Vec<_>>>()?;
        self.retire()?;
        if self.head + jobs.len() as u64 - self.tail > SLOTS as u64 {
            return Ok(None);
        }
        let before = self.tables_head;
        let mut places = Vec::with_capacity(jobs.len());
        for (job, &count) in jobs.iter().zip(&counts) {
            let bytes = table_bytes(count as usize, job.segments.len());
            if bytes > TABLES {
                bail!(InvalidArgument, "{} segments in one copy job", job.segments.len());
            }
            match self.take_table(bytes) {
                Some(at) => places.push((at, self.tables_head)),
                None => {
                    self.tables_head = before;
                    return Ok(None);
                }
            }
        }
        let first = self.head;
        for (i, batch) in jobs.chunks(MAX_JOBS).enumerate() {
            let at = i * MAX_JOBS..i * MAX_JOBS + batch.len();
            // SAFETY: by the caller's contract.
            if let Err(error) = unsafe { self.launch(batch, &counts[at.clone()], &places[at]) } {
                // Earlier batches of this call may run; without a ticket nobody waits for them, so the launcher stops here.
                self.broken = Some(error.clone());
                return Err(error);
            }
        }
        Ok(Some(Ticket { first, jobs: jobs.len() as u32 }))
    }

    /// Whether every job of the ticket has finished. An error is that of the first failed job: an entry outside the message,
    /// a wrong total, or the GPU itself.
    pub(crate) fn poll(&mut self, ticket: Ticket) -> Result<bool> {
        if ticket.first + SLOTS as u64 <= self.head.saturating_sub(1) {
            bail!(Internal, "copy ticket {} was asked for {} jobs later", ticket.first, self.head - ticket.first);
        }
        self.retire()?;
        if ticket.first + u64::from(ticket.jobs) > self.tail {
            return Ok(false);
        }
        for number in ticket.first..ticket.first + u64::from(ticket.jobs) {
            if let Some(failure) = &self.slots[number as usize % SLOTS].failure {
                return Err(failure.clone());
            }
        }
        Ok(true)
    }

    /// Waits for everything submitted, by the stream instead of the status words.
    pub(crate) fn synchronize(&mut self) -> Result<()> {
        let done = self.stream.synchronize();
        if let Err(error) = &done {
            self.broken = Some(error.clone());
        }
        done.and_then(|()| self.retire())
    }

    /// Takes note of finished jobs, oldest first: a launch may overtake the one ahead of it, but not by much.
    fn retire(&mut self) -> Result<()> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        while self.tail < self.head {
            let index = self.tail as usize % SLOTS;
            let word = self.status.ptr().host.wrapping_add(index * STATUS).cast::<u64>();
            // SAFETY: inside the status buffer, 8-byte aligned; only the kernel writes it, and atomics are how both sides use it.
            let status = unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Acquire);
            let slot = &mut self.slots[index];
            if (status >> 32) as u32 != slot.sequence {
                return self.watch();
            }
            self.unfinished_polls = 0;
            // SAFETY: the second word was written with the first.
            let bytes = unsafe { word.add(1).read_volatile() };
            slot.failure = failure(status as u32, bytes, slot.len);
            self.tables_tail = slot.tables_end;
            self.tail += 1;
        }
        Ok(())
    }

    /// Looks at the stream once in a while: a kernel that failed never writes its status.
    fn watch(&mut self) -> Result<()> {
        self.unfinished_polls += 1;
        if self.unfinished_polls < POLLS_PER_CHECK {
            return Ok(());
        }
        self.unfinished_polls = 0;
        if let Err(error) = self.stream.idle() {
            self.broken = Some(error.clone());
            return Err(error);
        }
        Ok(())
    }

    /// Space in the table ring: its offset.
    fn take_table(&mut self, bytes: u64) -> Option<u64> {
        let at = self.tables_head % TABLES;
        let start = if at + bytes > TABLES { self.tables_head + (TABLES - at) } else { self.tables_head };
        if start + bytes - self.tables_tail > TABLES {
            return None;
        }
        self.tables_head = start + bytes;
        Some(start % TABLES)
    }

    /// Launches up to [`MAX_JOBS`] jobs; their tables may lie at `places`.
    ///
    /// # Safety
    /// As [`CopyLauncher::submit`].
    unsafe fn launch(&mut self, jobs: &[Job<'_>], counts: &[u32], places: &[(u64, u64)]) -> Result<()> {
        let total = jobs.iter().map(|j| j.len).sum();
        let mut used = size_of_val(jobs) / size_of::<Job<'_>>() * size_of::<JobArgs>();
        let mut grid = 1;
        for (i, (job, &count)) in jobs.iter().zip(counts).enumerate() {
            let number = self.head + i as u64;
            let index = number as usize % SLOTS;
            let mut args = JobArgs {
                flat: job.flat,
                size: message_len(job.len)?,
                entry_count: count,
                segments: job.segments.len() as u32,
                state: self.state.ptr() + (index * STATE) as u64,
                status: self.status.ptr().device + (index * STATUS) as u64,
                sequence: (number % u64::from(u32::MAX)) as u32 + 1,
                flags: if job.gather { GATHER } else { 0 },
                ..JobArgs::default()
            };
            let whole = [loadMeta { src_off: 0, len: args.size, dst_off: 0 }];
            let entries = match job.fragments {
                Fragments::Whole => &whole[..],
                Fragments::Row { row, count: counter, read_count } => {
                    args.count = if read_count { counter.device } else { 0 };
                    // SAFETY: the row holds `count` entries, by the caller's contract; count is at most its length. The plugin may be
                    // wrong about them: whoever uses them checks them, join here or the kernel, which may read them again.
                    unsafe { std::slice::from_raw_parts(row.host.cast::<loadMeta>(), count as usize) }
                }
            };
            used = used.next_multiple_of(16);
            let room = (ARGS - HEADER).saturating_sub(used) / (jobs.len() - i) / size_of::<Item>();
            let far = far_room(entries.len(), job.segments.len());
            let items = &mut self.items;
            let joined = join(entries, job.segments, args.size, room.max(far), items);
            if joined && cut(&mut args, total, room, items) {
                args.entries = used as u64;
                args.flags |= ENTRIES_INLINE;
                // SAFETY: inside the blob, which has room for so many.
                unsafe {
                    std::ptr::copy_nonoverlapping(items.as_ptr(), self.args.blob.as_mut_ptr().add(used).cast(), items.len())
                };
                used += size_of_val(&items[..]);
            } else if joined && args.size as usize / items.len() >= 1024 && cut(&mut args, total, far, items) {
                let place = self.tables.ptr().offset(places[i].0 as usize);
                // SAFETY: the place was taken with room for so many, and is 16-byte aligned.
                unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), place.host.cast(), items.len()) };
                args.entries = place.device;
            } else {
                self.put_table(job, places[i].0, &mut args, &mut used);
                if let Fragments::Row { row, .. } = job.fragments {
                    let (at, bytes) = (used.next_multiple_of(16), size_of_val(entries));
                    if at + bytes <= ARGS - HEADER {
                        // SAFETY: inside the blob, from a live slice of plain bytes.
                        unsafe { std::ptr::copy_nonoverlapping(row.host, self.args.blob.as_mut_ptr().add(at), bytes) };
                        used = at + bytes;
                        args.entries = at as u64;
                        args.flags |= ENTRIES_INLINE;
                    } else {
                        args.entries = row.device;
                    }
                }
                let longest = entries.iter().map(|e| e.len).max().unwrap_or(0).min(args.size);
                plan(&mut args, total, longest);
            }
            grid = grid.max(args.blocks);
            let at = i * size_of::<JobArgs>();
            // SAFETY: the first jobs.len() * 88 bytes of the blob are the jobs' own; blob is 16-aligned and 88 is a multiple of 8.
            unsafe { self.args.blob.as_mut_ptr().add(at).cast::<JobArgs>().write(args) };
            self.slots[index] = Slot { sequence: args.sequence, len: args.size, tables_end: places[i].1, failure: None };
        }
        self.args.jobs = jobs.len() as u32;
        let kernel = if HEADER + used <= ARGS_SMALL { self.kernels.small } else { self.kernels.large };
        let mut params = [(&raw mut *self.args).cast::<std::ffi::c_void>()];
        // Jobs in flight do not depend on each other, so a launch may start before the one ahead of it has ended.
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: jobs.len() as u32,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: self.stream.raw(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.kernels.overlap),
        };
        self.gpu.with(|| {
            // SAFETY: the parameter is the kernel's one struct and is copied by the call; what it points at stays by the caller's
            // contract, and the launcher's own buffers until drop has waited.
            let result = unsafe { sys::cuLaunchKernelEx(&config, kernel, params.as_mut_ptr(), std::ptr::null_mut()) };
            check("launch of the copy kernel", result)
        })?;
        self.head += jobs.len() as u64;
        Ok(())
    }

    /// Writes a job's segment table, inside the parameters where it fits, else into the table ring at `place`.
    fn put_table(&mut self, job: &Job<'_>, place: u64, args: &mut JobArgs, used: &mut usize) {
        let n = job.segments.len();
        let at = used.next_multiple_of(8);
        let end = at + n * 8 + (n + 1) * 4;
        let (addrs, base) = if end <= ARGS - HEADER {
            *used = end;
            args.flags |= SEGMENTS_INLINE;
            (self.args.blob.as_mut_ptr().wrapping_add(at), at as u64)
        } else {
            let ring = self.tables.ptr().offset(place as usize);
            (ring.host, ring.device)
        };
        args.seg_addr = base;
        args.seg_start = base + n as u64 * 8;
        let starts = addrs.wrapping_add(n * 8).cast::<u32>();
        let (addrs, mut start) = (addrs.cast::<u64>(), 0u32);
        for (i, segment) in job.segments.iter().enumerate() {
            // SAFETY: n addresses and n + 1 starts fit the place, both aligned: places are multiples of 8.
            unsafe {
                addrs.add(i).write(segment.addr);
                starts.add(i).write(start);
            }
            start += segment.len as u32;
        }
        // SAFETY: as above.
        unsafe { starts.add(n).write(start) };
    }
}

impl Drop for CopyLauncher {
    fn drop(&mut self) {
        // Kernels in flight write to buffers of self: wait. A failed stream has nothing in flight.
        let _ = self.stream.synchronize();
    }
}

/// Bytes a job's table or items take in the ring, a multiple of 64.
fn table_bytes(entries: usize, segments: usize) -> u64 {
    (segments * 12 + 4).max(far_room(entries, segments) * size_of::<Item>()).next_multiple_of(64) as u64
}

/// Checks what the host can see of a job: its entry count, 1 for a whole message.
fn checked_count(job: &Job<'_>) -> Result<u32> {
    let mut sum = 0u64;
    for segment in job.segments {
        if segment.len == 0 {
            bail!(InvalidArgument, "an empty segment at {:#x}", segment.addr);
        }
        sum = sum.saturating_add(segment.len);
    }
    if sum != job.len || job.len == 0 {
        bail!(InvalidArgument, "segments of {sum} bytes for a message of {}", job.len);
    }
    message_len(job.len)?;
    match job.fragments {
        Fragments::Whole => Ok(1),
        Fragments::Row { count, .. } => {
            // SAFETY: the plugin's counter, live by the contract of submit; written last, so acquire orders the entries.
            let count = unsafe { AtomicU64::from_ptr(count.host.cast()) }.load(Ordering::Acquire);
            if count == 0 || count > MAX_ENTRIES as u64 {
                bail!(Plugin, "the plugin describes a receive of {} bytes by {count} fragments", job.len);
            }
            Ok(count as u32)
        }
    }
}

/// What a status word says.
fn failure(code: u32, bytes: u64, len: u32) -> Option<Error> {
    match code & 255 {
        0 => None,
        ERROR_RANGE => Some(err!(Plugin, "fragment {} leaves its message of {len} bytes", code >> 8)),
        ERROR_COUNT => Some(err!(Plugin, "the plugin changed the fragment count of a finished receive")),
        ERROR_TOTAL => Some(err!(Plugin, "fragments hold {bytes} bytes of a message of {len}")),
        other => Some(err!(Internal, "the copy kernel reports {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_checked_before_anything_is_launched() {
        let segments = [Segment { addr: 4096, len: 60 }, Segment { addr: 8192, len: 40 }];
        assert_eq!(checked_count(&Job::gather(&segments, 0, 100)), Ok(1));
        assert!(checked_count(&Job::gather(&segments, 0, 101)).is_err());
        assert!(checked_count(&Job::scatter(0, &[], 0)).is_err());
        assert!(checked_count(&Job::scatter(0, &[Segment { addr: 0, len: 1 << 32 }], 1 << 32)).is_err());
        assert!(checked_count(&Job::scatter(0, &[Segment { addr: 0, len: 0 }, Segment { addr: 0, len: 5 }], 5)).is_err());
        let mut meta = vec![0u64; size_of::<netUnpackMeta>() / 8];
        let ptr = MappedPtr { host: meta.as_mut_ptr().cast(), device: 0 };
        for (count, good) in [(0u64, false), (1, true), (2048, true), (2049, false), (u64::MAX, false)] {
            meta[(offset_of!(netUnpackMeta, cnt)) / 8 + 3] = count;
            let ptr = MappedPtr { host: meta.as_mut_ptr().cast(), ..ptr };
            assert_eq!(checked_count(&Job::unpack(ptr, 19, 0, 100, &segments, true)).is_ok(), good, "{count}");
        }
    }

    #[test]
    fn status_words_become_errors() {
        assert_eq!(failure(0, 5, 5), None);
        assert!(failure(ERROR_RANGE | 7 << 8, 0, 5).is_some_and(|e| e.to_string().contains("fragment 7")));
        assert!(failure(ERROR_TOTAL, 3, 5).is_some_and(|e| e.to_string().contains("3 bytes of a message of 5")));
        assert!(failure(ERROR_COUNT, 0, 5).is_some() && failure(77, 0, 5).is_some());
    }

    /// On a GPU: fragments in any order reach their segments, a gather brings them back, a broken row is refused, and the
    /// ring survives more jobs than it has slots.
    #[test]
    fn copies_on_a_gpu() {
        if !super::super::driver::available() {
            eprintln!("SKIPPED: no GPU here, the launcher was not run");
            return;
        }
        let gpu = Gpu::open(0).expect("GPU 0");
        let name = super::super::context::current_name().expect("GPU 0");
        assert_eq!(super::super::context::ordinal_of(name.bdf).expect("bdf"), Some(name.ordinal));
        let mut launcher = CopyLauncher::new(&gpu).expect("launcher");
        const LEN: usize = 200_000;
        let (bounce, dest, meta) = (
            DeviceBuffer::new(&gpu, LEN).unwrap(),
            DeviceBuffer::new(&gpu, 2 * LEN).unwrap(),
            PinnedBuffer::new(&gpu, size_of::<netUnpackMeta>()).unwrap(),
        );
        let (staging, host) = (PinnedBuffer::new(&gpu, LEN).unwrap(), PinnedBuffer::new(&gpu, LEN).unwrap());
        assert_eq!(super::super::memory::memory_kind(dest.ptr()), Ok(super::super::memory::MemoryKind::Device { ordinal: 0 }));
        assert_eq!(super::super::memory::memory_kind(host.ptr().host as u64), Ok(super::super::memory::MemoryKind::PinnedHost));
        assert_eq!(MappedPtr::resolve(&gpu, host.ptr().host as u64), Ok(host.ptr()));
        // SAFETY: the buffers are owned by this test and large enough; the GPU is idle or waited for at each access.
        unsafe {
            let data = std::slice::from_raw_parts_mut(host.ptr().host, LEN);
            data.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 7 + i / 251) as u8);
            super::super::memory::host_to_device(launcher.stream(), bounce.ptr(), host.ptr().host, LEN).unwrap();
            let queue = &mut *meta.ptr().host.cast::<netUnpackMeta>();
            for slot in 0..16 {
                // 131 fragments, last first, from the mirrored place of the bounce buffer.
                let n = 131;
                for i in 0..n {
                    let (from, to) = (i * LEN / n, (i + 1) * LEN / n);
                    queue.mem[slot][n - 1 - i] =
                        loadMeta { src_off: (LEN - to) as u32, len: (to - from) as u32, dst_off: from as u64 };
                }
                queue.cnt[slot] = n as u64;
            }
            let lens: Vec<u64> = (0..400).map(|i| if i % 2 == 0 { 900 } else { 100 }).collect();
            let segments: Vec<Segment> = lens
                .iter()
                .scan(dest.ptr() + 3, |at, &len| {
                    let s = Segment { addr: *at, len };
                    *at += len + 5;
                    Some(s)
                })
                .collect();
            for round in 0..3 * SLOTS {
                let staged = [Segment { addr: staging.ptr().device, len: LEN as u64 }];
                let jobs = [
                    Job::unpack(meta.ptr(), round % 16, bounce.ptr(), LEN as u64, &segments, round % 2 == 0),
                    Job::scatter(bounce.ptr(), &staged, LEN as u64),
                ];
                let ticket = loop {
                    if let Some(t) = launcher.submit(&jobs[..1 + round % 2]).unwrap() {
                        break t;
                    }
                };
                if round % 700 == 0 {
                    while !launcher.poll(ticket).unwrap() {}
                    let back =
                        launcher.submit(&[Job::gather(&segments, staging.ptr().device, LEN as u64)]).unwrap().expect("room");
                    while !launcher.poll(back).unwrap() {}
                    let got = std::slice::from_raw_parts(staging.ptr().host, LEN);
                    for i in 0..131 {
                        let (from, to) = (i * LEN / 131, (i + 1) * LEN / 131);
                        assert_eq!(&got[from..to], &data[LEN - to..LEN - from], "fragment {i} of round {round}");
                    }
                }
            }
            launcher.synchronize().unwrap();
            assert_eq!(launcher.head, launcher.tail);
            queue.mem[3][9].dst_off = LEN as u64;
            let ticket =
                launcher.submit(&[Job::unpack(meta.ptr(), 3, bounce.ptr(), LEN as u64, &segments, true)]).unwrap().expect("room");
            let failed = loop {
                match launcher.poll(ticket) {
                    Ok(true) => panic!("a broken row was accepted"),
                    Ok(false) => continue,
                    Err(e) => break e,
                }
            };
            assert!(failed.to_string().contains("fragment 9"), "{failed}");
            // Cost of a 512 KiB chunk as the engine sees it.
            let t = std::time::Instant::now();
            for _ in 0..500 {
                let ticket = launcher
                    .submit(&[Job::unpack(meta.ptr(), 5, bounce.ptr(), LEN as u64, &segments[..], false)])
                    .unwrap()
                    .expect("room");
                while !launcher.poll(ticket).unwrap() {}
            }
            eprintln!("submit to observed, 200 KB, 131 fragments to 400 segments: {:.2} us", t.elapsed().as_secs_f64() * 2e3);
        }
    }
}
