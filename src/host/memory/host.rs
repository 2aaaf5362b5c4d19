//! Host memory of another process, read by the kernel on behalf of this one (process_vm_readv): small pulls at once, large ones in
//! slices by a few threads of the process and by whoever asks for their end. Every call reads the peer's witness too, so that bytes of
//! another process that has come to the same number, or of another program in the same process, are never taken for the peer's. Knows
//! nothing of chunks and transfers.

use super::pool::{Bell, Job, Pool, Work};
use super::{Export, GpuId, LocalMemory, Manner, Mapping, Piece, Pull};
use crate::status::{bail, err, Result};
use crate::types::{Place, Span};
use process::PerProcess;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a witness.
const WITNESS: usize = 32;
/// A pull of at most so many bytes and pieces is done at once: waking a thread takes longer.
const AT_ONCE: u64 = 128 << 10;
const AT_ONCE_PIECES: usize = 64;
/// Bytes and pieces of a slice.
const SLICE: u64 = 256 << 10;
const SLICE_PIECES: usize = 128;
/// How long the end of a connection waits for slices that are under way. A kernel that copies takes microseconds.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);

/// A few bytes of a process that no other has, and where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Witness {
    /// First byte.
    pub addr: u64,
    /// The bytes: random.
    pub bytes: [u8; WITNESS],
}

impl Witness {
    /// This process's.
    ///
    /// # Errors
    /// `Unsupported` where the kernel cannot keep it from children.
    pub(crate) fn own() -> Result<Witness> {
        static OWN: PerProcess<Option<Witness>> = PerProcess::new(|| make().ok());
        match *OWN.get() {
            Some(witness) => Ok(witness),
            None => bail!(Unsupported, "no page can be kept from children of this process"),
        }
    }
}

/// A page with random bytes that a forked child finds empty.
fn make() -> Result<Witness> {
    const PAGE: usize = 4096;
    let mut bytes = [0; WITNESS];
    getrandom::fill(&mut bytes).map_err(|e| err!(System, "random bytes: {e}"))?;
    // SAFETY: a fresh private page; it is never unmapped.
    unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0);
        if page == libc::MAP_FAILED || libc::madvise(page, PAGE, libc::MADV_WIPEONFORK) != 0 {
            bail!(Unsupported, "a page of its own: {}", std::io::Error::last_os_error());
        }
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.cast(), WITNESS);
        Ok(Witness { addr: page as u64, bytes })
    }
}

/// What often keeps one process from reading another, as it is on this machine; for a line of the log.
pub(crate) fn hint() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) => format!("ptrace_scope is {}", scope.trim()),
        Err(_) => "Yama is not there".to_owned(),
    }
}

/// Whether the kernel reads memory of this process for another one: not what a device or nobody but this process has mapped, which it
/// finds out here as there. The two ends of a region tell.
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
struct Peer {
    pid: i32,
    witness: Witness,
}

impl Peer {
    /// Copies all pieces, at most [`SLICE_PIECES`].
    ///
    /// # Safety
    /// Destinations are writable memory of this process.
    unsafe fn read(&self, pieces: &[Piece]) -> Result<()> {
        const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut witness = [0u8; WITNESS];
        let (mut here, mut there) = ([EMPTY; SLICE_PIECES + 1], [EMPTY; SLICE_PIECES + 1]);
        let n = pieces.len();
        if n > SLICE_PIECES {
            bail!(Internal, "a slice of {n} pieces");
        }
        let mut sum = WITNESS;
        for (i, piece) in pieces.iter().enumerate() {
            here[i] = libc::iovec { iov_base: piece.dst as *mut _, iov_len: piece.len as usize };
            there[i] = libc::iovec { iov_base: piece.src as *mut _, iov_len: piece.len as usize };
            sum += piece.len as usize;
        }
        // Last: the kernel holds on to the one address space for the whole call.
        here[n] = libc::iovec { iov_base: witness.as_mut_ptr().cast(), iov_len: WITNESS };
        there[n] = libc::iovec { iov_base: self.witness.addr as *mut _, iov_len: WITNESS };
        let count = n as libc::c_ulong + 1;
        // SAFETY: both lists live; the kernel checks every address, here as there.
        let got = unsafe { libc::process_vm_readv(self.pid, here.as_ptr(), count, there.as_ptr(), count, 0) };
        if got < 0 {
            let error = std::io::Error::last_os_error();
            bail!(RemoteDisconnect, "memory of process {} cannot be read: {error}", self.pid);
        }
        if got as usize != sum {
            bail!(RemoteDisconnect, "process {} gave {got} of {sum} bytes: its memory is gone", self.pid);
        }
        if witness != self.witness.bytes {
            bail!(RemoteDisconnect, "process {} is not the peer any more", self.pid);
        }
        Ok(())
    }
}

/// Slices of a large pull.
struct Slices {
    peer: Peer,
    pieces: Vec<Piece>,
    /// Where each slice ends.
    ends: Vec<usize>,
}

impl Work for Slices {
    fn len(&self) -> usize {
        self.ends.len()
    }

    fn run(&self, index: usize) -> Result<()> {
        let from = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        // SAFETY: whoever started the pull keeps the destinations until it has ended or was quiesced.
        unsafe { self.peer.read(&self.pieces[from..self.ends[index]]) }
    }
}

/// Cuts pieces so that each slice has its share of bytes.
fn slices(peer: Peer, pieces: &[Piece]) -> Slices {
    let (mut cut, mut ends) = (Vec::with_capacity(pieces.len() + 64), Vec::new());
    let (mut bytes, mut begin) = (0, 0);
    for piece in pieces {
        let mut rest = *piece;
        while rest.len > 0 {
            let n = rest.len.min(SLICE - bytes);
            cut.push(Piece { len: n, ..rest });
            rest = Piece { src: rest.src + n, dst: rest.dst + n, len: rest.len - n };
            bytes += n;
            if bytes == SLICE || cut.len() - begin == SLICE_PIECES {
                ends.push(cut.len());
                (bytes, begin) = (0, cut.len());
            }
        }
    }
    if cut.len() > begin {
        ends.push(cut.len());
    }
    Slices { peer, pieces: cut, ends }
}

/// Host memory of a peer's process.
pub(crate) struct HostMemory {
    peer: Peer,
    pool: Arc<Pool>,
    bell: Option<Bell>,
    jobs: HashMap<u64, Arc<Job>>,
    last: u64,
    /// This thread has copied something since it was last asked.
    worked: bool,
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
        let peer = Peer { pid, witness };
        // SAFETY: nothing but the witness is read.
        unsafe { peer.read(&[]) }?;
        Ok(HostMemory { peer, pool: Pool::of_process()?, bell: None, jobs: HashMap::new(), last: ENDED, worked: false })
    }

    /// Whether a poll has copied something since the last call.
    pub(crate) fn worked(&mut self) -> bool {
        std::mem::take(&mut self.worked)
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

    fn open(&mut self, _export: &Export, _place: Place) -> Result<Mapping> {
        bail!(Internal, "host memory needs no export")
    }

    fn close(&mut self, _mapping: Mapping) {}

    unsafe fn pull(&mut self, _place: Place, pieces: &[Piece]) -> Result<Pull> {
        let bytes: u64 = pieces.iter().map(|p| p.len).sum();
        if bytes <= AT_ONCE && pieces.len() <= AT_ONCE_PIECES {
            // SAFETY: by the caller's contract.
            unsafe { self.peer.read(pieces) }?;
            return Ok(Pull { unit: 0, job: ENDED });
        }
        self.last += 1;
        let job = Job::new(Box::new(slices(self.peer, pieces)), self.bell.clone());
        self.pool.start(&job);
        self.jobs.insert(self.last, job);
        Ok(Pull { unit: 0, job: self.last })
    }

    fn poll(&mut self, pull: Pull) -> Result<bool> {
        if pull.job == ENDED {
            return Ok(true);
        }
        let Some(job) = self.jobs.get(&pull.job) else { bail!(Internal, "pull {} was never started", pull.job) };
        // Whoever waits may as well work.
        self.worked |= job.help();
        let ended = job.ended()?;
        if ended {
            self.jobs.remove(&pull.job);
        }
        Ok(ended)
    }

    fn copied(&self, pull: Pull, bytes: u64) -> u64 {
        self.jobs.get(&pull.job).map_or(0, |job| job.done(bytes))
    }

    fn busy(&self) -> bool {
        // The threads ring.
        self.bell.is_none() && !self.jobs.is_empty()
    }

    fn quiesce(&mut self) -> Result<()> {
        self.jobs.values().for_each(|job| job.cancel());
        let deadline = std::time::Instant::now() + QUIESCE_LIMIT;
        self.jobs.retain(|_, job| !job.wait(deadline));
        if !self.jobs.is_empty() {
            bail!(System, "the kernel has been copying from process {} for {QUIESCE_LIMIT:?}", self.peer.pid);
        }
        Ok(())
    }

    fn reaches(&mut self, place: Place, _peer_gpu: &GpuId) -> Option<Manner> {
        (place == Place::HOST).then_some(Manner::Pull)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Instant;

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
        memory.peer.witness = other;
        let (source, mut dest) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
        for len in [100, 1 << 20] {
            let piece = Piece { src: source.as_ptr() as u64, dst: dest.as_mut_ptr() as u64, len };
            // SAFETY: as above.
            let result = unsafe { memory.pull(Place::HOST, &[piece]) }.and_then(|pull| finish(&mut memory, pull));
            assert!(result.is_err_and(|e| e.to_str().contains("not the peer")), "{len} bytes");
        }
    }

    #[test]
    fn memory_that_is_gone_is_an_error_at_either_end() {
        let mut memory = own();
        let mut buffer = vec![0u8; 1 << 20];
        for len in [64, 1 << 20] {
            for (src, dst) in [(8, buffer.as_mut_ptr() as u64), (buffer.as_ptr() as u64, 8)] {
                // SAFETY: address 8 is nobody's; the kernel finds out.
                let result =
                    unsafe { memory.pull(Place::HOST, &[Piece { src, dst, len }]) }.and_then(|pull| finish(&mut memory, pull));
                assert!(result.is_err(), "{len} bytes from {src:#x} to {dst:#x}");
            }
        }
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
        assert!(wrong.is_some_and(|e| e.to_str().contains("not the peer")), "the page is empty there");
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
