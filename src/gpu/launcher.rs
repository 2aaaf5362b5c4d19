//! Submits copy jobs to the GPU and observes their completion in mapped host memory: no event, no stream and no allocation
//! per job. One ring of job slots, one stream, used by one thread. Knows message layouts, not requests.

use super::grid::{cut, far_room, join, spread};
use super::job::{checked_count, entries_of, message_len, Fragments, Job};
use super::kernels::Kernels;
use super::launcher_pool::Reusable;
use super::layout::*;
use crate::status::{bail, err, Error, Result};
use cuda_driver::{sys, Context, DeviceBuffer, PinnedBuffer, Stream};
use nccl_net_abi::loadMeta;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

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

/// Jobs that were submitted together; asked for with [`CopyLauncher::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launched {
    first: u64,
    jobs: u32,
}

/// The result of a slot's latest job.
#[derive(Clone, Default)]
struct Slot {
    sequence: u32,
    len: u32,
    /// Where the tables of later jobs begin.
    tables_end: u64,
    failure: Option<Error>,
}

/// Memory that the kernel uses besides the messages.
struct Buffers {
    status: PinnedBuffer,
    tables: PinnedBuffer,
    state: DeviceBuffer,
}

/// The launcher. One thread at a time.
pub(crate) struct CopyLauncher {
    stream: Stream,
    kernels: Arc<Kernels>,
    /// Never given back while a kernel may run.
    buffers: ManuallyDrop<Buffers>,
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

/// Where a job's description goes: what the parameters and the table ring have for it.
struct Room {
    /// Its part of the table ring.
    place: u64,
    /// Jobs that share the rest of the parameters, this one included.
    share: usize,
    /// Bytes of all jobs of the launch.
    launch_bytes: u64,
}

impl CopyLauncher {
    /// A launcher with its own stream.
    pub(super) fn new(context: &Arc<Context>, kernels: &Arc<Kernels>) -> Result<CopyLauncher> {
        let stream = Stream::new(context)?;
        let buffers = Buffers {
            status: PinnedBuffer::new(context, SLOTS * STATUS)?,
            tables: PinnedBuffer::new(context, TABLES as usize)?,
            state: DeviceBuffer::new(context, SLOTS * STATE, STATE)?,
        };
        // SAFETY: the range is owned, and used first by kernels that the stream runs later.
        unsafe { stream.fill(buffers.state.ptr(), 0, SLOTS * STATE) }?;
        Ok(CopyLauncher {
            stream,
            kernels: kernels.clone(),
            buffers: ManuallyDrop::new(buffers),
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
    /// Until they are done: flat buffers and segments are valid memory of this GPU (or mapped host memory), sources are not
    /// written and destinations have no other user, other jobs in flight included (they may run at the same time), and rows
    /// and counts are a live meta queue whose receive is done and not consumed.
    pub(crate) unsafe fn submit(&mut self, jobs: &[Job<'_>]) -> Result<Option<Launched>> {
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
                // Earlier batches of this call may run; without a launch number no caller waits for them, so the launcher stops here.
                self.broken = Some(error.clone());
                return Err(error);
            }
        }
        Ok(Some(Launched { first, jobs: jobs.len() as u32 }))
    }

    /// Whether every job of the launched has finished. An error is that of the first failed job: an entry outside the message,
    /// a wrong total, or the GPU itself.
    pub(crate) fn poll(&mut self, launched: Launched) -> Result<bool> {
        if launched.first + SLOTS as u64 <= self.head.saturating_sub(1) {
            bail!(Internal, "copy jobs from {} on were asked for {} jobs later", launched.first, self.head - launched.first);
        }
        self.retire()?;
        if launched.first + u64::from(launched.jobs) > self.tail {
            return Ok(false);
        }
        for number in launched.first..launched.first + u64::from(launched.jobs) {
            if let Some(failure) = &self.slots[number as usize % SLOTS].failure {
                return Err(failure.clone());
            }
        }
        Ok(true)
    }

    /// Waits until no job touches memory any more, at most `limit`. A context that is broken for good runs nothing: that is as well.
    /// After an error jobs may still run.
    pub(crate) fn quiesce(&mut self, limit: Duration) -> Result<()> {
        super::quiesce(&self.stream, limit, "copies", &mut self.broken)?;
        // Their results do not matter here.
        let _ = self.retire();
        Ok(())
    }

    /// Takes note of finished jobs, oldest first: a launch may overtake the one ahead of it, but not by much.
    fn retire(&mut self) -> Result<()> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        while self.tail < self.head {
            let index = self.tail as usize % SLOTS;
            let word = self.buffers.status.mapped().host.wrapping_add(index * STATUS).cast::<u64>();
            // SAFETY: inside the status buffer, 8-byte aligned; only the kernel writes it, and host and kernel both access it atomically.
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
        if let Err(error) = self.stream.idle().map_err(Error::from) {
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
        let launch_bytes = jobs.iter().map(|j| j.len).sum();
        let mut used = jobs.len() * size_of::<JobArgs>();
        let mut grid = 1;
        for (i, (job, &count)) in jobs.iter().zip(counts).enumerate() {
            let number = self.head + i as u64;
            let mut args = self.describe(job, count, number)?;
            let whole = [loadMeta { src_off: 0, len: args.size, dst_off: 0 }];
            // SAFETY: by the caller's contract; the count was checked.
            let entries = unsafe { entries_of(job, count, &whole) };
            let (place, tables_end) = places[i];
            self.write(job, entries, &mut args, &mut used, &Room { place, share: jobs.len() - i, launch_bytes });
            grid = grid.max(args.blocks);
            let at = i * size_of::<JobArgs>();
            // SAFETY: the first jobs.len() * 88 bytes of the blob are the jobs' own; blob is 16-aligned and 88 is a multiple of 8.
            unsafe { self.args.blob.as_mut_ptr().add(at).cast::<JobArgs>().write(args) };
            self.slots[number as usize % SLOTS] = Slot { sequence: args.sequence, len: args.size, tables_end, failure: None };
        }
        self.args.jobs = jobs.len() as u32;
        // SAFETY: by the caller's contract.
        unsafe { self.start(grid, jobs.len() as u32, HEADER + used) }?;
        self.head += jobs.len() as u64;
        Ok(())
    }

    /// The job as the kernel reads it, without its entries and segments.
    fn describe(&self, job: &Job<'_>, count: u32, number: u64) -> Result<JobArgs> {
        let index = number as usize % SLOTS;
        Ok(JobArgs {
            count: match job.fragments {
                Fragments::Row { count, read_count: true, .. } => count.device,
                _ => 0,
            },
            flat: job.flat,
            size: message_len(job.len)?,
            entry_count: count,
            segments: job.segments.len() as u32,
            state: self.buffers.state.ptr() + (index * STATE) as u64,
            status: self.buffers.status.mapped().device + (index * STATUS) as u64,
            sequence: (number % u64::from(u32::MAX)) as u32 + 1,
            flags: if job.gather { GATHER } else { 0 },
            ..JobArgs::default()
        })
    }

    /// Writes a job's entries and segments, joined where that is possible, and lays it out. The parameters are `used` so far.
    fn write(&mut self, job: &Job<'_>, entries: &[loadMeta], args: &mut JobArgs, used: &mut usize, room: &Room) {
        *used = used.next_multiple_of(16);
        let inline = (ARGS - HEADER).saturating_sub(*used) / room.share / size_of::<Item>();
        let far = far_room(entries.len(), job.segments.len());
        let items = &mut self.items;
        let joined = join(entries, job.segments, args.size, inline.max(far), items);
        if joined && cut(args, room.launch_bytes, inline, items) {
            args.entries = *used as u64;
            args.flags |= ENTRIES_INLINE;
            // SAFETY: inside the blob, which has room for them.
            unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), self.args.blob.as_mut_ptr().add(*used).cast(), items.len()) };
            *used += size_of_val(&items[..]);
        } else if joined && args.size as usize / items.len() >= 1024 && cut(args, room.launch_bytes, far, items) {
            let place = self.buffers.tables.mapped().offset(room.place as usize);
            // SAFETY: the place was taken with room for them, and is 16-byte aligned.
            unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), place.host.cast(), items.len()) };
            args.entries = place.device;
        } else {
            self.put_table(job, room.place, args, used);
            self.put_entries(job, entries, args, used);
            let longest = entries.iter().map(|e| e.len).max().unwrap_or(0).min(args.size);
            spread(args, room.launch_bytes, longest);
        }
    }

    /// Copies a row's entries into the parameters where they fit; else the kernel reads the row.
    fn put_entries(&mut self, job: &Job<'_>, entries: &[loadMeta], args: &mut JobArgs, used: &mut usize) {
        let Fragments::Row { row, .. } = job.fragments else { return };
        let (at, bytes) = (used.next_multiple_of(16), size_of_val(entries));
        if at + bytes > ARGS - HEADER {
            args.entries = row.device;
            return;
        }
        // SAFETY: inside the blob, from a live slice of plain bytes.
        unsafe { std::ptr::copy_nonoverlapping(entries.as_ptr().cast(), self.args.blob.as_mut_ptr().add(at), bytes) };
        *used = at + bytes;
        args.entries = at as u64;
        args.flags |= ENTRIES_INLINE;
    }

    /// Starts the kernel on the jobs in the parameters, of which it reads `bytes`.
    ///
    /// # Safety
    /// As [`CopyLauncher::submit`], for those jobs.
    unsafe fn start(&mut self, grid: u32, jobs: u32, bytes: usize) -> Result<()> {
        let kernel = if bytes <= ARGS_SMALL { self.kernels.small } else { self.kernels.large };
        let mut params = [(&raw mut *self.args).cast::<std::ffi::c_void>()];
        // Jobs in flight do not depend on each other, so a launch may start before the one ahead of it has ended.
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: [1, 0, 0, 0, 0, 0, 0, 0],
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: jobs,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: self.stream.raw(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.kernels.overlap),
        };
        let cuda = self.stream.context().enter()?;
        // SAFETY: the parameter is the kernel's one struct and is copied by the call; what it points at stays by the caller's contract,
        // and the launcher's own buffers until drop knows that no kernel runs.
        Ok(unsafe { cuda.cuLaunchKernelEx(&config, kernel, params.as_mut_ptr(), std::ptr::null_mut()) }?)
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
            let ring = self.buffers.tables.mapped().offset(place as usize);
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

impl Reusable for CopyLauncher {
    fn reset(mut self) -> Option<CopyLauncher> {
        let quiet = self.broken.is_none() && self.quiesce(Duration::ZERO).is_ok() && self.broken.is_none();
        (quiet && self.tail == self.head).then_some(self)
    }
}

impl Drop for CopyLauncher {
    fn drop(&mut self) {
        // Kernels in flight write to the buffers: those of a launcher that is dropped in spite of them stay.
        if self.quiesce(Duration::ZERO).is_ok() {
            // SAFETY: dropped once, here; no kernel runs any more.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        }
    }
}

/// Bytes a job's table or items take in the ring, a multiple of 64.
fn table_bytes(entries: usize, segments: usize) -> u64 {
    (segments * 12 + 4).max(far_room(entries, segments) * size_of::<Item>()).next_multiple_of(64) as u64
}

/// The meaning of a status word.
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
    use super::super::{Extent, Gpu};
    use super::*;
    use cuda_driver::MappedPtr;
    use nccl_net_abi::netUnpackMeta;

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
        if !cuda_driver::available() {
            eprintln!("SKIPPED: no GPU here, the launcher was not run");
            return;
        }
        let gpu = Gpu::open(0).expect("GPU 0");
        let name = cuda_driver::current_name().expect("GPU 0");
        assert_eq!(cuda_driver::ordinal_of(name.bdf).expect("bdf"), Some(name.ordinal));
        let mut launcher = gpu.launcher().expect("launcher");
        const LEN: usize = 200_000;
        let (bounce, dest, meta) = (
            gpu.device_memory(LEN).unwrap(),
            gpu.device_memory(2 * LEN).unwrap(),
            gpu.pinned(size_of::<netUnpackMeta>()).unwrap(),
        );
        let (staging, host) = (gpu.pinned(LEN).unwrap(), gpu.pinned(LEN).unwrap());
        assert_eq!(cuda_driver::memory_kind(dest.ptr()), Ok(cuda_driver::MemoryKind::Device { ordinal: 0 }));
        assert_eq!(cuda_driver::memory_kind(host.mapped().host as u64), Ok(cuda_driver::MemoryKind::PinnedHost));
        assert_eq!(MappedPtr::resolve(gpu.context(), host.mapped().host as u64), Ok(host.mapped()));
        // SAFETY: the buffers are owned by this test and large enough; the GPU is idle or waited for at each access.
        unsafe {
            let data = std::slice::from_raw_parts_mut(host.mapped().host, LEN);
            data.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 7 + i / 251) as u8);
            launcher.stream().host_to_device(bounce.ptr(), host.mapped().host, LEN).unwrap();
            let queue = &mut *meta.mapped().host.cast::<netUnpackMeta>();
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
            let segments: Vec<Extent> = lens
                .iter()
                .scan(dest.ptr() + 3, |at, &len| {
                    let s = Extent { addr: *at, len };
                    *at += len + 5;
                    Some(s)
                })
                .collect();
            for round in 0..3 * SLOTS {
                let staged = [Extent { addr: staging.mapped().device, len: LEN as u64 }];
                let jobs = [
                    Job::unpack(meta.mapped(), round % 16, bounce.ptr(), LEN as u64, &segments, round % 2 == 0),
                    Job::scatter(bounce.ptr(), &staged, LEN as u64),
                ];
                let launched = loop {
                    if let Some(t) = launcher.submit(&jobs[..1 + round % 2]).unwrap() {
                        break t;
                    }
                };
                if round % 700 == 0 {
                    while !launcher.poll(launched).unwrap() {}
                    let back =
                        launcher.submit(&[Job::gather(&segments, staging.mapped().device, LEN as u64)]).unwrap().expect("room");
                    while !launcher.poll(back).unwrap() {}
                    let got = std::slice::from_raw_parts(staging.mapped().host, LEN);
                    for i in 0..131 {
                        let (from, to) = (i * LEN / 131, (i + 1) * LEN / 131);
                        assert_eq!(&got[from..to], &data[LEN - to..LEN - from], "fragment {i} of round {round}");
                    }
                }
            }
            launcher.quiesce(Duration::from_secs(20)).unwrap();
            assert_eq!(launcher.head, launcher.tail);
            queue.mem[3][9].dst_off = LEN as u64;
            let launched = launcher
                .submit(&[Job::unpack(meta.mapped(), 3, bounce.ptr(), LEN as u64, &segments, true)])
                .unwrap()
                .expect("room");
            let failed = loop {
                match launcher.poll(launched) {
                    Ok(true) => panic!("a broken row was accepted"),
                    Ok(false) => continue,
                    Err(e) => break e,
                }
            };
            assert!(failed.to_string().contains("fragment 9"), "{failed}");
            // Cost of a 512 KiB chunk as the engine sees it.
            let t = std::time::Instant::now();
            for _ in 0..500 {
                let launched = launcher
                    .submit(&[Job::unpack(meta.mapped(), 5, bounce.ptr(), LEN as u64, &segments[..], false)])
                    .unwrap()
                    .expect("room");
                while !launcher.poll(launched).unwrap() {}
            }
            eprintln!("submit to observed, 200 KB, 131 fragments to 400 segments: {:.2} us", t.elapsed().as_secs_f64() * 2e3);
        }
    }
}
