//! Host memory: of another process, read by the kernel on behalf of this one (process_vm_readv), or, where the kernel refuses that, staged in
//! areas that both map. Small pulls are done at once, large ones in slices by a few threads of the process. Every call of the kernel reads the peer's witness too, so that bytes of
//! another process that has come to the same number, or of another program in the same process, are never taken for the peer's. Knows
//! nothing of chunks and transfers.

use super::files::Files;
use super::pool::{Bell, Flow, Job, Pool, Work};
use super::witness::{Process, Witness, WITNESS};
use super::{Area, Export, GpuId, LocalMemory, Manner, Mapping, Piece, Pull};
use crate::status::{bail, err, Error, Result};
use crate::types::{Place, Span};
use std::borrow::Cow;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a slice, and stretches of the peer's memory.
const SLICE: u64 = 256 << 10;
const STRETCHES: usize = 128;
/// A pull of one slice and at most so many bytes is done at once if its owner permits it: waking a thread takes longer.
const AT_ONCE: u64 = SLICE / 2;
/// A pull of no more slices than this is short: the thread that polls for its end copies, too, while others wake.
const FEW_SLICES: usize = 4;
/// Entries of a list for the kernel.
const PARTS: usize = 512;
/// Bytes between two sources that are read, too, and thrown away: another stretch costs more. Less than a page, so that none lies
/// between them that is not there.
const NEAR: usize = 2048;
/// Pieces that are longer on average stay in their order: each is a stretch of its own.
const LONG: u64 = 4096;
/// How long the end of a connection waits for slices that are under way. A kernel that copies takes microseconds.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);

/// What often keeps one process from reading another, as it is on this machine; for a line of the log.
pub(crate) fn hint() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) => format!("ptrace_scope is {}", scope.trim()),
        Err(_) => "Yama is not there".to_owned(),
    }
}

/// Whether the kernel reads memory of this process for another one: not what a device has mapped or this process alone can map, which it
/// finds out here as there. Testing both ends of a region suffices.
pub(crate) fn is_readable(region: &Span) -> bool {
    let mut bytes = [0u8; 2];
    let part = |base: u64, len: usize| libc::iovec { iov_base: base as *mut _, iov_len: len };
    let here = part(bytes.as_mut_ptr() as u64, bytes.len());
    let there = [part(region.addr, 1), part(region.addr + region.len.saturating_sub(1), 1)];
    // SAFETY: both lists live, and what they name here is writable; the kernel checks the rest.
    let got = unsafe { libc::process_vm_readv(libc::getpid(), &here, 1, there.as_ptr(), 2, 0) };
    got == 2
}

/// A process whose memory is read.
#[derive(Clone, Copy)]
struct Peer(Process);

impl Peer {
    /// Copies all pieces, of one [`slice`] at most.
    ///
    /// # Safety
    /// Destinations are writable memory of this process.
    unsafe fn read(&self, pieces: impl Iterator<Item = Piece> + Clone) -> Result<()> {
        // SAFETY: by the caller's contract.
        unsafe { self.try_read(pieces.clone()) }.map_err(|failed| self.blame(failed, pieces))
    }

    /// One system call. Pieces whose sources touch are one stretch there, and pieces whose destinations touch are one here. What lies
    /// between near sources is read and thrown away: another stretch costs more than some bytes. It is on the pages of the two.
    unsafe fn try_read(&self, pieces: impl Iterator<Item = Piece>) -> std::result::Result<(), Failed> {
        let (mut here, mut there) = (Parts::room(), Parts::room());
        let (mut here, mut there) = (Parts::of(&mut here), Parts::of(&mut there));
        let mut witness = [0u8; WITNESS];
        let mut between = [const { MaybeUninit::<u8>::uninit() }; NEAR];
        let mut sum = 0;
        let mut last: Option<Piece> = None;
        for piece in pieces {
            match last.and_then(|last| gap(&last, &piece)) {
                Some(0) => there.extend(piece.len),
                Some(gap) => {
                    here.push(between.as_mut_ptr() as u64, gap);
                    there.extend(gap + piece.len);
                    sum += gap;
                }
                None => there.push(piece.src, piece.len),
            }
            here.add(piece.dst, piece.len);
            sum += piece.len;
            last = Some(piece);
        }
        // Last: the kernel holds on to the one address space for the whole call.
        here.push(witness.as_mut_ptr() as u64, WITNESS as u64);
        there.push(self.0.witness.addr, WITNESS as u64);
        sum += WITNESS as u64;
        let (Some((here, here_count)), Some((there, there_count))) = (here.list(), there.list()) else {
            return Err(Failed::TooMany);
        };
        // SAFETY: both lists live; the kernel checks every address, here as there.
        let got = unsafe { libc::process_vm_readv(self.0.pid, here, here_count, there, there_count, 0) };
        if got < 0 {
            let error = std::io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EFAULT) => Failed::Partly { got: 0, of: sum },
                _ => Failed::Call(error),
            });
        }
        if got as u64 != sum {
            return Err(Failed::Partly { got: got as u64, of: sum });
        }
        match witness == self.0.witness.bytes {
            true => Ok(()),
            false => Err(Failed::OtherProcess),
        }
    }

    /// The error that names the process whose memory failed.
    fn blame(&self, failed: Failed, pieces: impl Iterator<Item = Piece>) -> Error {
        match failed {
            Failed::TooMany => err!(Internal, "a slice has too many pieces"),
            Failed::Call(e) => err!(RemoteDisconnect, "memory of process {} cannot be read: {e}", self.0.pid),
            Failed::OtherProcess => {
                err!(RemoteDisconnect, "process {} is no longer the peer: its number was taken by another process", self.0.pid)
            }
            Failed::Partly { got, of } => match self.is_readable(pieces) {
                // A place here that the kernel cannot write: the caller has unmapped it, or made it read-only.
                true => err!(
                    InvalidArgument,
                    "registered memory of this process ({}) can no longer be written: {got} of {of} bytes came from process {}",
                    std::process::id(),
                    self.0.pid
                ),
                false => {
                    err!(RemoteDisconnect, "process {} gave {got} of {of} bytes: its memory can no longer be read", self.0.pid)
                }
            },
        }
    }

    /// Whether all sources can be read: a byte of each page is.
    fn is_readable(&self, pieces: impl Iterator<Item = Piece>) -> bool {
        const PAGE: u64 = 4096;
        for piece in pieces {
            let (first, end) = (piece.src, piece.src.saturating_add(piece.len));
            let mut at = first;
            while at < end {
                let mut byte = 0u8;
                let here = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
                let there = libc::iovec { iov_base: at as *mut _, iov_len: 1 };
                // SAFETY: one byte into a byte; the kernel checks the other address.
                if unsafe { libc::process_vm_readv(self.0.pid, &here, 1, &there, 1, 0) } != 1 {
                    return false;
                }
                at = (at / PAGE + 1) * PAGE;
            }
        }
        true
    }
}

/// Why a read failed.
enum Failed {
    /// The lists have no room. No slice is so long.
    TooMany,
    Call(std::io::Error),
    /// An address is not there, here or at the peer.
    Partly {
        got: u64,
        of: u64,
    },
    /// The witness is another.
    OtherProcess,
}

/// Bytes between two sources if both are one stretch there.
fn gap(last: &Piece, next: &Piece) -> Option<u64> {
    let gap = next.src.wrapping_sub(last.src.wrapping_add(last.len));
    (gap <= NEAR as u64).then_some(gap)
}

/// The pieces in the order of their sources, so that near ones are one stretch. Any order brings the same bytes.
fn by_source(pieces: &[Piece]) -> Cow<'_, [Piece]> {
    let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
    if bytes > LONG * pieces.len() as u64 || pieces.is_sorted_by_key(|piece| piece.src) {
        return Cow::Borrowed(pieces);
    }
    let mut ordered = pieces.to_vec();
    ordered.sort_unstable_by_key(|piece| piece.src);
    Cow::Owned(ordered)
}

/// A list for the kernel, in memory of its caller: a short one touches little of it, and it is never moved.
struct Parts<'a> {
    parts: &'a mut [MaybeUninit<libc::iovec>; PARTS],
    len: usize,
    end: u64,
    full: bool,
}

impl<'a> Parts<'a> {
    fn room() -> [MaybeUninit<libc::iovec>; PARTS] {
        [const { MaybeUninit::uninit() }; PARTS]
    }

    fn of(parts: &'a mut [MaybeUninit<libc::iovec>; PARTS]) -> Parts<'a> {
        Parts { parts, len: 0, end: 0, full: false }
    }

    fn push(&mut self, addr: u64, len: u64) {
        match self.parts.get_mut(self.len) {
            Some(part) => {
                part.write(libc::iovec { iov_base: addr as *mut _, iov_len: len as usize });
                (self.len, self.end) = (self.len + 1, addr.wrapping_add(len));
            }
            None => self.full = true,
        }
    }

    /// Makes the last part longer.
    fn extend(&mut self, len: u64) {
        if let Some(part) = self.len.checked_sub(1).map(|at| &mut self.parts[at]) {
            // SAFETY: entries below `len` are written.
            unsafe { part.assume_init_mut() }.iov_len += len as usize;
            self.end = self.end.wrapping_add(len);
        }
    }

    fn add(&mut self, addr: u64, len: u64) {
        match self.len > 0 && self.end == addr {
            true => self.extend(len),
            false => self.push(addr, len),
        }
    }

    /// For the call; `None` where not all had room.
    fn list(&self) -> Option<(*const libc::iovec, libc::c_ulong)> {
        (!self.full).then(|| (self.parts.as_ptr().cast(), self.len as libc::c_ulong))
    }
}

/// A place in a list of pieces: the piece, and bytes of it that lie before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Mark {
    piece: usize,
    at: u64,
}

/// Where the slice that begins at `from` ends: so many bytes, and no more stretches than a system call of usual length reads. `None` at
/// the end of the list.
fn slice(pieces: &[Piece], from: Mark) -> Option<Mark> {
    let (mut bytes, mut stretches, mut parts) = (0, 0, 0);
    let mut last: Option<Piece> = None;
    let mut end = from;
    while let Some(&whole) = pieces.get(end.piece) {
        let piece = Piece { src: whole.src + end.at, dst: whole.dst + end.at, len: whole.len - end.at };
        let near = last.and_then(|last| gap(&last, &piece));
        let touches = near == Some(0) && last.is_some_and(|last| last.dst + last.len == piece.dst);
        stretches += usize::from(near.is_none());
        parts += if touches { 0 } else { 1 + usize::from(near.is_some_and(|gap| gap > 0)) };
        if stretches > STRETCHES || parts > PARTS - 2 {
            break;
        }
        let len = piece.len.min(SLICE - bytes);
        bytes += len;
        end = if len == piece.len { Mark { piece: end.piece + 1, at: 0 } } else { Mark { at: end.at + len, ..end } };
        if bytes >= SLICE {
            break;
        }
        last = Some(piece);
    }
    (end != from).then_some(end)
}

/// The pieces between two marks.
fn between(pieces: &[Piece], from: Mark, to: Mark) -> impl Iterator<Item = Piece> + Clone + '_ {
    let last = pieces.len().min(to.piece + usize::from(to.at > 0));
    pieces[from.piece.min(last)..last].iter().enumerate().map(move |(i, piece)| {
        let begin = if i == 0 { from.at } else { 0 };
        let end = if from.piece + i == to.piece { to.at } else { piece.len };
        Piece { src: piece.src + begin, dst: piece.dst + begin, len: end - begin }
    })
}

/// Where the sources of pulls lie.
#[derive(Clone, Copy)]
enum Sources {
    /// In the peer's process.
    Peer(Peer),
    /// In this process: an area, or memory of which an area is filled.
    Here,
}

#[cfg(test)]
thread_local! {
    /// Bytes that this thread has copied.
    pub(crate) static COPIED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

impl Sources {
    /// Copies all pieces, of one [`slice`] at most.
    ///
    /// # Safety
    /// Destinations are writable memory of this process, and so are sources that lie here readable.
    unsafe fn copy(&self, pieces: impl Iterator<Item = Piece> + Clone) -> Result<()> {
        #[cfg(test)]
        COPIED.set(COPIED.get() + pieces.clone().map(|piece| piece.len).sum::<u64>());
        match self {
            // SAFETY: by the caller's contract.
            Sources::Peer(peer) => unsafe { peer.read(pieces) },
            Sources::Here => {
                for Piece { src, dst, len } in pieces {
                    // SAFETY: by the caller's contract; an area is no memory of the application.
                    unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, len as usize) };
                }
                Ok(())
            }
        }
    }
}

/// Slices of a large pull.
struct Slices {
    sources: Sources,
    pieces: Vec<Piece>,
    /// Where each begins, and the last one ends.
    marks: Vec<Mark>,
}

impl Slices {
    fn new(sources: Sources, pieces: Vec<Piece>) -> Slices {
        let mut marks = vec![Mark::default()];
        let mut at = Mark::default();
        while let Some(end) = slice(&pieces, at) {
            marks.push(end);
            at = end;
        }
        Slices { sources, pieces, marks }
    }
}

impl Work for Slices {
    fn len(&self) -> usize {
        self.marks.len() - 1
    }

    fn run(&self, index: usize) -> Result<()> {
        let (from, to) = (self.marks[index], self.marks[index + 1]);
        // SAFETY: the caller of `pull` keeps both until it has ended or was quiesced.
        unsafe { self.sources.copy(between(&self.pieces, from, to)) }
    }
}

/// Host memory on a connection with a peer's process.
pub(crate) struct HostMemory {
    sources: Sources,
    files: Files,
    pool: Arc<Pool>,
    bell: Option<Bell>,
    jobs: HashMap<u64, Arc<Job>>,
    last: u64,
    /// What the next pulls belong to, and whether those of one slice are copied by the thread that starts them.
    flow: Flow,
    at_once: bool,
}

/// A pull that had ended when it was started.
const ENDED: u64 = 0;

impl HostMemory {
    /// Memory of the process `pid`, if this process may read it and it has this witness.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn new(pid: i32, witness: Witness) -> Result<HostMemory> {
        if pid <= 0 {
            bail!(Unsupported, "the peer's process has no number in this PID namespace");
        }
        let peer = Peer(Process { pid, witness });
        // SAFETY: nothing but the witness is read.
        unsafe { peer.read(std::iter::empty()) }?;
        HostMemory::from(Sources::Peer(peer), 0)
    }

    /// Memory that is staged in areas. `most`: bytes that all areas of this process may have.
    ///
    /// # Errors
    /// `Resource` without a thread.
    pub(crate) fn staged(most: u64) -> Result<HostMemory> {
        HostMemory::from(Sources::Here, most)
    }

    fn from(sources: Sources, most: u64) -> Result<HostMemory> {
        let flow = Flow { connection: Flow::connection(), transfer: 0 };
        let (files, pool) = (Files::new(most), Pool::of_process()?);
        Ok(HostMemory { sources, files, pool, bell: None, jobs: HashMap::new(), last: ENDED, flow, at_once: true })
    }

    /// The process, as the kernel and its own memory say; `None` where that memory cannot be read.
    pub(crate) fn process(&self) -> Option<Process> {
        match self.sources {
            Sources::Peer(peer) => Some(peer.0),
            Sources::Here => None,
        }
    }

    /// Rung when a large pull has ended.
    pub(crate) fn set_bell(&mut self, bell: Bell) {
        self.bell = Some(bell);
    }
}

impl LocalMemory for HostMemory {
    fn export(&mut self, _place: Place, _addr: u64, _len: u64) -> Result<Vec<Export>> {
        bail!(Internal, "host memory needs no export")
    }

    fn open(&mut self, _export: &Export, _place: Place, _owner: Option<Process>) -> Result<Mapping> {
        bail!(Internal, "host memory needs no export")
    }

    fn close(&mut self, mapping: Mapping) {
        self.files.close(&mapping);
    }

    fn area(&mut self, _place: Place, len: usize) -> Result<Area> {
        self.files.make(len)
    }

    fn export_area(&mut self, area: &Area) -> Result<Export> {
        self.files.export(area)
    }

    fn drop_area(&mut self, area: Area) {
        self.files.drop_area(&area);
    }

    fn open_area(&mut self, export: &Export, _place: Place) -> Result<Mapping> {
        self.files.open(export)
    }

    unsafe fn pull(&mut self, _place: Place, pieces: &[Piece]) -> Result<Pull> {
        let pieces = match self.sources {
            Sources::Peer(_) => by_source(pieces),
            Sources::Here => Cow::Borrowed(pieces),
        };
        let Some(end) = slice(&pieces, Mark::default()) else { return Ok(Pull { unit: 0, job: ENDED }) };
        let one = end.piece == pieces.len();
        if self.at_once && one && pieces.iter().map(|piece| piece.len).sum::<u64>() <= AT_ONCE {
            // SAFETY: by the caller's contract.
            unsafe { self.sources.copy(pieces.iter().copied()) }?;
            return Ok(Pull { unit: 0, job: ENDED });
        }
        self.last += 1;
        let slices = Slices::new(self.sources, pieces.into_owned());
        let job = Job::new(Box::new(slices), self.flow, self.bell.clone());
        self.pool.start(&job);
        self.jobs.insert(self.last, job);
        Ok(Pull { unit: 0, job: self.last })
    }

    fn poll(&mut self, pull: Pull) -> Result<bool> {
        if pull.job == ENDED {
            return Ok(true);
        }
        let Some(job) = self.jobs.get(&pull.job) else { bail!(Internal, "pull {} was never started", pull.job) };
        // Waiting for a thread to wake takes longer than the rest of something short. Longer ones are left to the threads: a connection's
        // lock is held meanwhile, and other connections wait.
        if (self.jobs.len() == 1 && job.len() <= FEW_SLICES) || self.pool.is_without_threads() {
            job.help();
        }
        let ended = job.ended();
        match ended {
            Ok(false) => self.pool.look(),
            _ => drop(self.jobs.remove(&pull.job)),
        }
        ended
    }

    fn belongs_to(&mut self, transfer: u64, at_once: bool) {
        (self.flow.transfer, self.at_once) = (transfer, at_once);
    }

    fn copied(&self, pull: Pull, bytes: u64) -> u64 {
        self.jobs.get(&pull.job).map_or(0, |job| job.done(bytes))
    }

    fn busy(&self) -> bool {
        // Threads ring.
        (self.bell.is_none() || self.pool.is_without_threads()) && !self.jobs.is_empty()
    }

    fn quiesce(&mut self) -> Result<()> {
        self.jobs.values().for_each(|job| job.cancel());
        let deadline = std::time::Instant::now() + QUIESCE_LIMIT;
        self.jobs.retain(|_, job| !job.wait(deadline));
        if !self.jobs.is_empty() {
            let from = self.process().map_or("an area".to_owned(), |process| format!("process {}", process.pid));
            bail!(System, "a thread has been copying from {from} for {QUIESCE_LIMIT:?}");
        }
        Ok(())
    }

    fn reaches(&mut self, place: Place, _peer_gpu: &GpuId) -> Option<Manner> {
        let manner = if matches!(self.sources, Sources::Here) { Manner::Push } else { Manner::Pull };
        (place == Place::HOST).then_some(manner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use proptest::prelude::*;
    use std::time::Instant;

    /// A process that does not exist.
    fn no_source() -> Sources {
        Sources::Peer(Peer(Process { pid: 0, witness: Witness { addr: 0, bytes: [0; WITNESS] } }))
    }

    fn own() -> HostMemory {
        HostMemory::new(std::process::id() as i32, Witness::own().unwrap()).unwrap()
    }

    fn finish(memory: &mut HostMemory, pull: Pull) -> Result<()> {
        let start = Instant::now();
        while !memory.poll(pull)? {
            assert!(start.elapsed() < Duration::from_secs(60));
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Whatever the lengths, every byte lands in its place and nowhere else.
        #[test]
        fn pieces_of_any_length_arrive(lens in proptest::collection::vec(prop_oneof![1usize..100, 1usize..5000, 200_000usize..900_000], 1..300)) {
            let mut lens = lens;
            let mut budget = 8 << 20;
            lens.retain(|&len| { let fits = len <= budget; if fits { budget -= len; } fits });
            let total: usize = lens.iter().map(|l| l + 3).sum();
            let source: Vec<u8> = (0..total).map(|i| (i * 31 + i / 251) as u8).collect();
            let mut dest = vec![0xEEu8; total];
            let (mut at, mut pieces) = (0, Vec::new());
            for len in &lens {
                pieces.push(Piece { src: source.as_ptr() as u64 + at as u64, dst: dest.as_mut_ptr() as u64 + at as u64, len: *len as u64 });
                at += len + 3;
            }
            let mut memory = own();
            // SAFETY: all memory is this test's own and stays.
            let pull = unsafe { memory.pull(Place::HOST, &pieces) }.unwrap();
            finish(&mut memory, pull).unwrap();
            let mut at = 0;
            for len in &lens {
                prop_assert_eq!(&dest[at..at + len], &source[at..at + len]);
                prop_assert_eq!(&dest[at + len..at + len + 3], &[0xEE; 3]);
                at += len + 3;
            }
        }
    }

    #[test]
    fn another_process_under_the_same_number_is_found_out() {
        let mut other = Witness::own().unwrap();
        other.bytes[0] ^= 1;
        assert!(HostMemory::new(std::process::id() as i32, other).is_err());
        let mut memory = own();
        memory.sources = Sources::Peer(Peer(Process { pid: std::process::id() as i32, witness: other }));
        let (source, mut dest) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
        for len in [100, 1 << 20] {
            let piece = Piece { src: source.as_ptr() as u64, dst: dest.as_mut_ptr() as u64, len };
            // SAFETY: as above.
            let result = unsafe { memory.pull(Place::HOST, &[piece]) }.and_then(|pull| finish(&mut memory, pull));
            assert!(result.is_err_and(|e| e.to_str().contains("no longer the peer")), "{len} bytes");
        }
    }

    /// Pages of which every second one is there.
    struct Holes(*mut u8, usize);

    const PAGE: usize = 4096;

    impl Holes {
        fn new(pages: usize) -> Holes {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: fresh pages; every second one is made unreadable.
            unsafe {
                let at = libc::mmap(std::ptr::null_mut(), pages * PAGE, protection, flags, -1, 0);
                assert_ne!(at, libc::MAP_FAILED);
                let at: *mut u8 = at.cast();
                for page in 0..pages {
                    at.add(page * PAGE).write_bytes((page as u8).wrapping_add(1), PAGE);
                    if page % 2 == 1 {
                        assert_eq!(libc::mprotect(at.add(page * PAGE).cast(), PAGE, libc::PROT_NONE), 0);
                    }
                }
                Holes(at, pages)
            }
        }
        fn at(&self, offset: usize) -> u64 {
            self.0 as u64 + offset as u64
        }
    }

    impl Drop for Holes {
        fn drop(&mut self) {
            // SAFETY: our mapping.
            unsafe { libc::munmap(self.0.cast(), self.1 * PAGE) };
        }
    }

    fn copy(memory: &mut HostMemory, pieces: &[Piece]) -> Result<()> {
        // SAFETY: memory of the test, or such as the kernel refuses.
        unsafe { memory.pull(Place::HOST, pieces) }.and_then(|pull| finish(memory, pull))
    }

    #[test]
    fn what_lies_between_pieces_need_not_be_there() {
        let (holes, mut memory) = (Holes::new(3), own());
        let mut dest = vec![0u8; 400];
        let to = dest.as_mut_ptr() as u64;
        // The last bytes of a page, and nothing of the next one although it is near.
        let pieces = [
            Piece { src: holes.at(PAGE - 300), dst: to, len: 100 },
            Piece { src: holes.at(PAGE - 100), dst: to + 100, len: 100 },
            Piece { src: holes.at(2 * PAGE), dst: to + 200, len: 100 },
        ];
        copy(&mut memory, &pieces).unwrap();
        assert!(std::hint::black_box(&dest)[..200].iter().all(|&b| b == 1) && dest[200..300].iter().all(|&b| b == 3));
        let next = Piece { src: holes.at(2 * PAGE + PAGE - 200), dst: to, len: 100 };
        let far = Piece { src: holes.at(0), dst: to + 100, len: 100 };
        copy(&mut memory, &[next, far]).unwrap();
        assert_eq!((dest[0], dest[99], dest[100], dest[200], dest[300]), (3, 3, 1, 3, 0));
    }

    #[test]
    fn the_process_whose_memory_failed_is_named() {
        let mut memory = own();
        let (good, read_only) = (vec![0u8; 1 << 20], Holes::new(512));
        // SAFETY: our pages.
        unsafe { assert_eq!(libc::mprotect(read_only.0.cast(), 512 * PAGE, libc::PROT_READ), 0) };
        for len in [64, 1 << 20] {
            let good = good.as_ptr() as u64;
            // SAFETY of all: address 8 is not mapped, and read-only pages are not written; the kernel finds out.
            let source = copy(&mut memory, &[Piece { src: 8, dst: good, len }]).unwrap_err();
            assert_eq!(source.kind(), ErrorKind::RemoteDisconnect, "{source}");
            for dst in [8, read_only.at(0)] {
                let own = copy(&mut memory, &[Piece { src: good, dst, len }]).unwrap_err();
                assert_eq!(own.kind(), ErrorKind::InvalidArgument, "{own}");
                assert!(own.to_str().starts_with("registered memory of this process"), "{own}");
            }
            // Among others that are well, too.
            let mixed = [(good, good + 128), (good + 100, 8), (good + 64, good + 300)];
            let pieces = mixed.map(|(src, dst)| Piece { src, dst, len: 32 });
            assert_eq!(copy(&mut memory, &pieces).unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
        assert!(memory.jobs.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        /// Sources in any order, touching, near or far, over each other or not; destinations that touch or not: every byte lands in its
        /// place, and nothing else is written.
        #[test]
        fn scattered_pieces_arrive(
            lens in proptest::collection::vec(prop_oneof![8 => 1usize..700, 1 => 1usize..9000, 1 => 100_000usize..300_000], 1..700),
            gaps in proptest::collection::vec((prop_oneof![Just(0usize), 1usize..600, 0usize..5000], prop_oneof![Just(0usize), 1usize..50]), 1..50),
            rotate in 0usize..700, every in 1usize..5,
        ) {
            let mut places = Vec::new();
            let (mut src, mut dst) = (64, 64);
            for (i, &len) in lens.iter().enumerate() {
                places.push((src, dst, len));
                let (there, here) = gaps[i % gaps.len()];
                (src, dst) = (src + len + there, dst + len + here);
            }
            let source: Vec<u8> = (0..src + 64).map(|i| (i * 31 % 251) as u8).collect();
            let mut dest = vec![0xEE; dst + 64];
            let mut expected = dest.clone();
            // In rising order, or out of it.
            let by = rotate % places.len();
            places.rotate_left(by);
            if every > 2 {
                let at = places.len() / 2;
                let (front, back) = places.split_at_mut(at);
                front.iter_mut().zip(back).step_by(every).for_each(|(a, b)| std::mem::swap(a, b));
            }
            for &(src, dst, len) in &places {
                expected[dst..dst + len].copy_from_slice(&source[src..src + len]);
            }
            let (from, to) = (source.as_ptr() as u64, dest.as_mut_ptr() as u64);
            let pieces: Vec<Piece> = places.iter().map(|&(src, dst, len)| Piece { src: from + src as u64, dst: to + dst as u64, len: len as u64 }).collect();
            copy(&mut own(), &pieces).unwrap();
            prop_assert!(std::hint::black_box(&dest) == &expected);
        }

        /// Slices follow each other, hold all, and fit into a call.
        #[test]
        fn slices_fit(lens in proptest::collection::vec((1u64..2000, 0u64..1500, 0u64..3), 1..3000)) {
            let (mut src, mut dst) = (1 << 20, 1 << 30);
            let pieces: Vec<Piece> = lens.iter().map(|&(len, gap, more)| {
                let piece = Piece { src, dst, len: len * (1 + 100 * more) };
                (src, dst) = (src + piece.len + gap, dst + piece.len + gap % 2);
                piece
            }).collect();
            let slices = Slices::new(no_source(), pieces.clone());
            let mut all = Vec::new();
            for index in 0..slices.len() {
                let part: Vec<Piece> = between(&slices.pieces, slices.marks[index], slices.marks[index + 1]).collect();
                prop_assert!(part.iter().map(|p| p.len).sum::<u64>() <= SLICE && !part.is_empty());
                // SAFETY: there is no process 0.
                let failed = unsafe { slices.sources.copy(part.iter().copied()) };
                prop_assert!(failed.is_err());
                for piece in part {
                    match all.last_mut() {
                        Some(Piece { src, dst, len }) if (*src + *len, *dst + *len) == (piece.src, piece.dst) => *len += piece.len,
                        _ => all.push(piece),
                    }
                }
            }
            let mut joined: Vec<Piece> = Vec::new();
            for &piece in &pieces {
                match joined.last_mut() {
                    Some(last) if (last.src + last.len, last.dst + last.len) == (piece.src, piece.dst) => last.len += piece.len,
                    _ => joined.push(piece),
                }
            }
            prop_assert_eq!(all, joined);
        }
    }

    /// Counted, not timed: how often the kernel is asked for what lies side by side.
    #[test]
    fn neighbours_are_one_stretch() {
        let blocks = |stride: u64| -> Vec<Piece> {
            (0..200).map(|i| Piece { src: (1 << 20) + i * stride, dst: (1 << 30) + i * 1000, len: 64 }).collect()
        };
        for (stride, calls) in [(64, 1), (128, 1), (2112, 1), (2113, 2), (4096, 2)] {
            let slices = Slices::new(no_source(), blocks(stride));
            assert_eq!(slices.len(), calls, "blocks every {stride} bytes");
        }
    }

    #[test]
    fn blocks_in_any_order_are_as_few_stretches_as_in_their_own() {
        let place = |i: u64| Piece { src: (1 << 20) + i * 37 % 200 * 64, dst: (1 << 30) + i * 1000, len: 64 };
        let mixed: Vec<Piece> = (0..200).map(place).collect();
        let calls = |pieces: &[Piece]| Slices::new(no_source(), pieces.to_vec()).len();
        assert_eq!((calls(&mixed), calls(&by_source(&mixed))), (2, 1));
        let long: Vec<Piece> = mixed.iter().map(|&piece| Piece { len: LONG + 1, ..piece }).collect();
        assert_eq!(*by_source(&long), long);
    }

    #[test]
    fn a_child_has_no_witness_and_an_ended_process_no_memory() {
        let own = Witness::own().unwrap();
        // SAFETY: the child only waits and ends.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            // SAFETY: ends the child at once.
            unsafe {
                libc::pause();
                libc::_exit(0)
            };
        }
        let wrong = HostMemory::new(child, own).err();
        // SAFETY: our own child.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert!(wrong.is_some_and(|e| e.to_str().contains("no longer the peer")), "the page is empty there");
        assert!(HostMemory::new(child, own).is_err());
        assert!(HostMemory::new(0, own).is_err());
    }

    #[test]
    fn nothing_is_copied_after_the_end() {
        let mut memory = own();
        let (source, mut dest) = (vec![1u8; 64 << 20], vec![0u8; 64 << 20]);
        let piece = Piece { src: source.as_ptr() as u64, dst: dest.as_mut_ptr() as u64, len: source.len() as u64 };
        // SAFETY: as above.
        unsafe { memory.pull(Place::HOST, &[piece]) }.unwrap();
        memory.quiesce().unwrap();
        dest.fill(2);
        std::thread::sleep(Duration::from_millis(50));
        assert!(std::hint::black_box(&dest).iter().all(|&b| b == 2));
    }
}
