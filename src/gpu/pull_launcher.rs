//! Copies lists of pieces into GPU memory: the kernel reads the list from mapped memory, long runs take the copy engine, and the end is
//! a word in mapped memory. One stream and one ring of lists, used by one thread. Knows addresses, not whose they are.

use super::closer;
use super::kernels::Kernels;
use super::launcher_pool::Reusable;
use super::pieces::Cutter;
use crate::status::{err, Error, Result};
use crate::types::Piece;
use cuda_driver::{sys, Context, DeviceBuffer, PinnedBuffer, Stream};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Threads of a block, and pieces inside the parameters: as in kernels/pull.cu.
const THREADS: u32 = 512;
const NEAR: usize = 40;
const WARPS: u32 = THREADS / 32;
/// Pieces that the smaller kernel takes, and bytes of one.
const FEW: usize = 8;
const FEW_UNIT: u64 = 2048;
/// Pieces in the ring of lists, and most pieces of a launch.
const RING: usize = 64 << 10;
pub(super) const LAUNCH: usize = RING / 2;
/// Launches and copies in flight.
const DEPTH: usize = 256;
/// Unfinished polls between two looks at the stream, where a failed kernel shows.
const POLLS_PER_CHECK: u32 = 8192;

/// `UcclPullArgs`.
#[repr(C, align(16))]
struct Args {
    pieces: u64,
    state: u64,
    status: u64,
    count: u32,
    batch: u32,
    sequence: u32,
    reserved: u32,
    unused: u64,
    near: [Piece; NEAR],
}

/// `UcclFewArgs`.
#[repr(C, align(16))]
struct FewArgs {
    status: u64,
    count: u32,
    sequence: u32,
    near: [Piece; FEW],
}

const NONE: Piece = Piece { src: 0, dst: 0, len: 0 };
/// `UcclPullState`.
const STATE: usize = 16;
const _: () = {
    assert!(size_of::<Piece>() == 24 && size_of::<Args>() == 48 + 24 * NEAR);
    assert!(size_of::<FewArgs>() == 16 + 24 * FEW && std::mem::offset_of!(FewArgs, near) == 16);
    assert!(std::mem::offset_of!(Args, near) == 48 && std::mem::offset_of!(Args, count) == 24);
};

struct Buffers {
    status: PinnedBuffer,
    lists: PinnedBuffer,
    state: DeviceBuffer,
}

/// The launcher. One thread at a time.
pub(crate) struct PullLauncher {
    stream: Stream,
    kernels: Arc<Kernels>,
    /// Never given back while a kernel may run.
    buffers: ManuallyDrop<Buffers>,
    args: Box<Args>,
    /// Number of the next launch, and of the oldest that is not known to be over.
    head: u64,
    tail: u64,
    /// Pieces written to the ring since the beginning, those of launches that are over, and where each launch in flight ends.
    written: u64,
    freed: u64,
    ends: VecDeque<u64>,
    unfinished_polls: u32,
    /// The stream failed: nothing ends any more.
    broken: Option<Error>,
}

/// Blocks of a launch and the pieces a warp takes at a time. Short pieces are copied several at once by a warp, and more blocks cost more
/// than they bring.
fn grid(count: u32, blocks: u32, short: bool) -> (u32, u32) {
    let least = if short { 8 } else { 1 };
    let grid = count.div_ceil(WARPS * least).clamp(1, blocks.max(1));
    (grid, (count / (grid * WARPS * 4)).clamp(least, 32))
}

impl PullLauncher {
    /// A launcher with its own stream.
    pub(super) fn new(context: &Arc<Context>, kernels: &Arc<Kernels>) -> Result<PullLauncher> {
        let stream = Stream::new(context)?;
        let buffers = Buffers {
            status: PinnedBuffer::new(context, nccl_net_abi::PAGE)?,
            lists: PinnedBuffer::new(context, RING * size_of::<Piece>())?,
            state: DeviceBuffer::new(context, STATE, STATE)?,
        };
        // SAFETY: the range is owned, and used first by kernels that the stream runs later.
        unsafe { stream.fill(buffers.state.ptr(), 0, STATE) }?;
        let args = Args {
            pieces: 0,
            state: buffers.state.ptr(),
            status: buffers.status.mapped().device,
            count: 0,
            batch: 0,
            sequence: 0,
            reserved: 0,
            unused: 0,
            near: [NONE; NEAR],
        };
        Ok(PullLauncher {
            stream,
            kernels: kernels.clone(),
            buffers: ManuallyDrop::new(buffers),
            args: Box::new(args),
            head: 0,
            tail: 0,
            written: 0,
            freed: 0,
            ends: VecDeque::with_capacity(DEPTH),
            unfinished_polls: 0,
            broken: None,
        })
    }

    /// Starts what comes next in the list: one launch of at most `most` pieces or one copy. Its number, to be given to
    /// [`PullLauncher::is_over`]; `None` when there is no room now: poll, then try again. An error ends the launcher.
    ///
    /// # Safety
    /// Until it is over: sources are readable by this GPU, destinations are its memory and have no other user, and they do not overlap.
    pub(super) unsafe fn submit(&mut self, cutter: &mut Cutter<'_>, blocks: u32, most: usize) -> Result<Option<u64>> {
        self.retire()?;
        let Some(first) = self.place().filter(|_| self.ends.len() < DEPTH) else { return Ok(None) };
        let begin = (first % RING as u64) as usize;
        let room = most.min(LAUNCH).min(RING - begin).min((RING as u64 - (first - self.freed)) as usize);
        // SAFETY: the ring's pieces from `begin` on, which no launch in flight reads.
        let list = unsafe {
            let at = self.buffers.lists.mapped().host.cast::<Piece>().add(begin);
            std::slice::from_raw_parts_mut(at, room)
        };
        let short = cutter.is_short();
        let count = cutter.fill(list);
        if count == 0 {
            let Some(long) = cutter.long() else { return Ok(None) };
            // SAFETY: by the caller's contract.
            return unsafe { self.copy(long) }.map(Some);
        }
        let aligned = |p: &Piece| (p.src | p.dst | p.len) % 16 == 0 && p.len <= FEW_UNIT;
        if count <= FEW && list[..count].iter().all(aligned) {
            // SAFETY: by the caller's contract.
            return unsafe { self.launch_few(&list[..count]) }.map(Some);
        }
        let near = count <= NEAR;
        if near {
            self.args.near[..count].copy_from_slice(&list[..count]);
        } else {
            self.written = first + count as u64;
        }
        let place = if near { 0 } else { self.buffers.lists.mapped().device + (begin * size_of::<Piece>()) as u64 };
        // SAFETY: by the caller's contract.
        unsafe { self.launch(place, count as u32, grid(count as u32, blocks, short)) }.map(Some)
    }

    /// Where the next list may begin: at least a sixteenth of the ring is free in one piece there.
    fn place(&self) -> Option<u64> {
        let least = (RING / 16) as u64;
        let left = RING as u64 - self.written % RING as u64;
        let first = if left < least { self.written + left } else { self.written };
        (first + least <= self.freed + RING as u64).then_some(first)
    }

    /// # Safety
    /// As [`PullLauncher::submit`], for `count` pieces at `place` or in the parameters.
    unsafe fn launch(&mut self, place: u64, count: u32, (grid, batch): (u32, u32)) -> Result<u64> {
        let args = &mut *self.args;
        (args.pieces, args.count, args.batch, args.sequence) = (place, count, batch, (self.head + 1) as u32);
        let (kernel, params) = (self.kernels.pull, (&raw mut *args).cast());
        // SAFETY: by the caller's contract; the parameter is the kernel's.
        unsafe { self.start(kernel, params, grid, THREADS) }
    }

    /// # Safety
    /// As [`PullLauncher::submit`], for these pieces, all aligned and short.
    unsafe fn launch_few(&mut self, pieces: &[Piece]) -> Result<u64> {
        let (status, count) = (self.buffers.status.mapped().device, pieces.len() as u32);
        let mut args = FewArgs { status, count, sequence: (self.head + 1) as u32, near: [NONE; FEW] };
        args.near[..pieces.len()].copy_from_slice(pieces);
        // SAFETY: by the caller's contract; the parameter is the kernel's.
        unsafe { self.start(self.kernels.few, (&raw mut args).cast(), 1, 32 * count) }
    }

    /// Starts a kernel.
    ///
    /// # Safety
    /// `params` is the kernel's one parameter; what it points at stays until the kernel has ended.
    unsafe fn start(&mut self, kernel: sys::CUfunction, params: *mut c_void, grid: u32, threads: u32) -> Result<u64> {
        let config = sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: self.stream.raw(),
            attrs: std::ptr::null_mut(),
            numAttrs: 0,
        };
        let mut params = [params];
        let launched = self.stream.context().enter().and_then(|cuda| {
            // SAFETY: the parameter is copied by the call; what it points at stays by the caller's contract, and the launcher's own
            // buffers until drop knows that no kernel runs.
            unsafe { cuda.cuLaunchKernelEx(&config, kernel, params.as_mut_ptr(), std::ptr::null_mut()) }
        });
        self.note(launched)
    }

    /// # Safety
    /// As [`PullLauncher::submit`], for this piece.
    unsafe fn copy(&mut self, piece: Piece) -> Result<u64> {
        let (at, sequence) = (self.buffers.status.mapped().device, (self.head + 1) as u32);
        // SAFETY: by the caller's contract; the status word stays as the launcher's buffers do.
        let started = unsafe { self.stream.device_to_device_with_signal(piece.dst, piece.src, piece.len as usize, at, sequence) };
        self.note(started)
    }

    /// Counts a launch. A failed one may have started in part, so no other follows it.
    fn note(&mut self, started: cuda_driver::Result<()>) -> Result<u64> {
        if let Err(error) = started {
            let error = Error::from(error);
            self.broken = Some(error.clone());
            return Err(error);
        }
        self.ends.push_back(self.written);
        self.head += 1;
        Ok(self.head - 1)
    }

    /// Whether a launch is over: its bytes are in place.
    pub(super) fn is_over(&mut self, launch: u64) -> Result<bool> {
        self.retire()?;
        Ok(launch < self.tail)
    }

    /// Waits until nothing touches memory any more, at most `limit`. A context that is broken for good runs nothing: that is as well.
    /// After an error launches may still run.
    pub(super) fn quiesce(&mut self, limit: Duration) -> Result<()> {
        super::quiesce(&self.stream, limit, "pulls", &mut self.broken)?;
        // Their results do not matter here.
        let _ = self.retire();
        Ok(())
    }

    /// Takes note of launches that are over. They end in order.
    fn retire(&mut self) -> Result<()> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.tail == self.head {
            return Ok(());
        }
        // SAFETY: inside the status buffer, 4-byte aligned; only the GPU writes it, and host and GPU both access it atomically.
        let status = unsafe { AtomicU32::from_ptr(self.buffers.status.mapped().host.cast()) }.load(Ordering::Acquire);
        let over = status.wrapping_sub(self.tail as u32);
        if over == 0 {
            return self.watch();
        }
        if u64::from(over) > self.head - self.tail {
            let error = err!(Internal, "the pull kernel reports launch {status} of {}..{}", self.tail, self.head);
            self.broken = Some(error.clone());
            return Err(error);
        }
        self.unfinished_polls = 0;
        self.tail += u64::from(over);
        for end in self.ends.drain(..over as usize) {
            self.freed = end;
        }
        Ok(())
    }

    /// Looks at the stream once in a while: a kernel that failed never writes its status.
    fn watch(&mut self) -> Result<()> {
        self.unfinished_polls += 1;
        if self.unfinished_polls < POLLS_PER_CHECK {
            return Ok(());
        }
        // The driver would block this thread.
        if closer::is_closing() {
            return Ok(());
        }
        self.unfinished_polls = 0;
        if let Err(error) = self.stream.idle().map_err(Error::from) {
            self.broken = Some(error.clone());
            return Err(error);
        }
        Ok(())
    }
}

impl Reusable for PullLauncher {
    fn reset(mut self) -> Option<PullLauncher> {
        let quiet = self.broken.is_none() && self.quiesce(Duration::ZERO).is_ok() && self.broken.is_none();
        (quiet && self.tail == self.head).then_some(self)
    }
}

impl Drop for PullLauncher {
    fn drop(&mut self) {
        // Kernels in flight write to the buffers: those of a launcher that is dropped in spite of them stay.
        if self.quiesce(Duration::ZERO).is_ok() {
            // SAFETY: dropped once, here; no kernel runs any more.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_are_as_wide_as_their_lists() {
        assert_eq!(grid(1, 64, false), (1, 1));
        assert_eq!(grid(16, 64, false), (1, 1));
        assert_eq!(grid(656, 64, false), (41, 1));
        assert_eq!(grid(656, 64, true), (6, 8));
        assert_eq!(grid(16_384, 64, false), (64, 4));
        assert_eq!(grid(LAUNCH as u32, 64, true), (64, 8));
        assert_eq!(grid(LAUNCH as u32, 0, false), (1, 32));
    }
}
