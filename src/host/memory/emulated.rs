//! Simulated: GPU memory on one host without a GPU. What an application has mapped from memory files is shared by their
//! descriptors, as a driver does with allocations; all else cannot be shared. Copies end later than they begin, as on a GPU. Knows
//! nothing of chunks.

use super::mappings::Mappings;
use super::witness::Process;
use super::{Area, Export, ExportKind, GpuId, LocalMemory, Manner, Mapping, Piece, Pull};
use crate::host::shm::{self, Shared};
use crate::status::{bail, Result};
use crate::types::Place;
use process::PerProcess;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// Exports of other processes that this one has mapped.
static MAPPED: PerProcess<Mappings<Shared>> = PerProcess::new(Mappings::default);

const ID: &[u8; 15] = b"simulated GPU  ";

/// The id of a simulated GPU.
pub(crate) fn gpu(index: u8) -> GpuId {
    let mut id = [index; 16];
    id[..15].copy_from_slice(ID);
    id
}

/// Simulated GPU memory.
#[derive(Default)]
pub(crate) struct EmulatedMemory {
    last: u64,
    /// Whether its GPUs are such that bytes are pushed.
    push: bool,
    /// Areas, with their descriptors.
    areas: HashMap<u64, (Shared, OwnedFd, GpuId)>,
    open: HashMap<u64, Arc<Shared>>,
    /// Pulls that were started, and how often they were polled.
    pulls: HashMap<u64, (Vec<Piece>, u32)>,
}

impl EmulatedMemory {
    /// `push`: bytes are pushed.
    pub(crate) fn new(push: bool) -> EmulatedMemory {
        EmulatedMemory { push, ..EmulatedMemory::default() }
    }

    /// Maps an export of another process, or of an area.
    fn map(&mut self, export: &Export, (place, writable): (Place, bool), owner: Option<Process>) -> Result<Mapping> {
        let (ExportKind::SharedMemory, Some(fd)) = (export.kind, &export.fd) else {
            bail!(Unsupported, "simulated: an export of kind {:?}", export.kind)
        };
        let mut offset = [0; 8];
        offset.copy_from_slice(&export.handle[..8]);
        let offset = u64::from_le_bytes(offset);
        let Some(end) = offset.checked_add(export.len).filter(|&end| end <= 1 << 40) else {
            bail!(Protocol, "simulated: {} bytes at {offset} of a memory file", export.len)
        };
        let shared = MAPPED.get().open(owner, export, place, || {
            shm::check(fd.as_fd(), end)?;
            Shared::map(fd.as_fd(), end as usize, writable)
        })?;
        let addr = shared.addr() + offset;
        self.last += 1;
        self.open.insert(self.last, shared);
        Ok(Mapping { id: self.last, addr })
    }
}

/// A part of the address space that shows a memory file.
struct Mapped {
    start: u64,
    end: u64,
    offset: u64,
    device: String,
    inode: u64,
}

/// The line of /proc/self/maps that holds an address, if it shows a shared memory file.
fn mapped(addr: u64) -> Option<Mapped> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (range, access, offset) = (words.next()?, words.next()?, words.next()?);
        let (device, inode, name) = (words.next()?, words.next()?, words.next()?);
        let (start, end) = range.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let found = Mapped {
            start: hex(start)?,
            end: hex(end)?,
            offset: hex(offset)?,
            device: device.into(),
            inode: inode.parse().ok()?,
        };
        let fits = (found.start..found.end).contains(&addr) && access.ends_with('s') && name.starts_with("/memfd:");
        fits.then_some(found)
    })
}

/// A duplicate of the descriptor of a memory file that this process has mapped.
fn duplicate(of: &Mapped) -> Option<OwnedFd> {
    std::fs::read_dir("/proc/self/fd").ok()?.flatten().find_map(|entry| {
        let fd: RawFd = entry.file_name().to_str()?.parse().ok()?;
        let found = std::fs::metadata(entry.path()).ok()?;
        let device = format!("{:02x}:{:02x}", libc::major(found.dev()), libc::minor(found.dev()));
        if found.ino() != of.inode || device != of.device {
            return None;
        }
        // SAFETY: a plain system call; the result is fresh.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        // SAFETY: as above.
        (copy >= 0).then(|| unsafe { OwnedFd::from_raw_fd(copy) })
    })
}

fn seal(fd: BorrowedFd<'_>) {
    // SAFETY: a plain system call; where it fails, the check of the peer does too.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
}

impl LocalMemory for EmulatedMemory {
    fn export(&mut self, place: Place, addr: u64, len: u64) -> Result<Vec<Export>> {
        let found = mapped(addr).filter(|found| addr.checked_add(len).is_some_and(|end| end <= found.end));
        let Some((found, fd)) = found.and_then(|found| duplicate(&found).map(|fd| (found, fd))) else {
            bail!(Unsupported, "simulated: {len} bytes at {addr:#x} are no part of a memory file")
        };
        seal(fd.as_fd());
        shm::check(fd.as_fd(), found.offset + (found.end - found.start))?;
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&found.offset.to_le_bytes());
        handle[8..16].copy_from_slice(&found.inode.to_le_bytes());
        let (base, len) = (found.start, found.end - found.start);
        let gpu = gpu(place.ordinal().unwrap_or(0));
        Ok(vec![Export { kind: ExportKind::SharedMemory, handle, fd: None, base, len, gpu }])
    }

    fn descriptor(&mut self, _place: Place, export: &Export) -> Result<OwnedFd> {
        match mapped(export.base).and_then(|found| duplicate(&found)) {
            Some(fd) => Ok(fd),
            None => bail!(Unsupported, "simulated: no descriptor of the memory file at {:#x}", export.base),
        }
    }

    fn maps_own(&self) -> bool {
        true
    }

    fn open(&mut self, export: &Export, place: Place, owner: Option<Process>) -> Result<Mapping> {
        self.map(export, (place, false), owner)
    }

    fn close(&mut self, mapping: Mapping) {
        self.open.remove(&mapping.id);
    }

    fn area(&mut self, place: Place, len: usize) -> Result<Area> {
        let fd = shm::create(c"uccl-area", len)?;
        let shared = Shared::map(fd.as_fd(), len, true)?;
        self.last += 1;
        let area = Area { id: self.last, addr: shared.addr() };
        self.areas.insert(self.last, (shared, fd, gpu(place.ordinal().unwrap_or(0))));
        Ok(area)
    }

    fn export_area(&mut self, area: &Area) -> Result<Export> {
        let Some((shared, fd, gpu)) = self.areas.get(&area.id) else { bail!(Internal, "simulated: unknown area {}", area.id) };
        let fd = match fd.try_clone() {
            Ok(fd) => Some(fd),
            Err(e) => bail!(System, "simulated: the descriptor of an area: {e}"),
        };
        Ok(Export { kind: ExportKind::SharedMemory, handle: [0; 64], fd, base: area.addr, len: shared.len(), gpu: *gpu })
    }

    fn drop_area(&mut self, area: Area) {
        self.areas.remove(&area.id);
    }

    fn open_area(&mut self, export: &Export, place: Place) -> Result<Mapping> {
        self.map(export, (place, true), None)
    }

    unsafe fn pull(&mut self, _place: Place, pieces: &[Piece]) -> Result<Pull> {
        self.last += 1;
        self.pulls.insert(self.last, (pieces.to_vec(), 0));
        Ok(Pull { unit: 0, job: self.last })
    }

    fn poll(&mut self, pull: Pull) -> Result<bool> {
        let Some((pieces, asked)) = self.pulls.get_mut(&pull.job) else { bail!(Internal, "pull {} was never started", pull.job) };
        *asked += 1;
        if *asked < 3 {
            return Ok(false);
        }
        for piece in pieces.iter() {
            // SAFETY: by the contract of `pull`; within one process the two may overlap.
            unsafe { std::ptr::copy(piece.src as *const u8, piece.dst as *mut u8, piece.len as usize) };
        }
        self.pulls.remove(&pull.job);
        Ok(true)
    }

    fn busy(&self) -> bool {
        !self.pulls.is_empty()
    }

    fn quiesce(&mut self) -> Result<()> {
        self.pulls.clear();
        Ok(())
    }

    fn reaches(&mut self, place: Place, peer_gpu: &GpuId) -> Option<Manner> {
        let manner = if self.push { Manner::Push } else { Manner::Pull };
        (place.is_device() && peer_gpu.starts_with(ID)).then_some(manner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mapping of a fresh memory file, as an application makes it.
    pub(crate) struct Application(*mut u8, usize, #[allow(dead_code)] OwnedFd);

    impl Application {
        fn new(len: usize) -> Application {
            // SAFETY: a terminated name, a fresh descriptor, a fresh mapping.
            unsafe {
                let fd = OwnedFd::from_raw_fd(libc::memfd_create(c"gpu".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING));
                assert_eq!(libc::ftruncate(fd.as_raw_fd(), len as i64), 0);
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                let at = libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0);
                assert_ne!(at, libc::MAP_FAILED);
                Application(at.cast(), len, fd)
            }
        }
    }

    impl Drop for Application {
        fn drop(&mut self) {
            // SAFETY: our mapping.
            unsafe { libc::munmap(self.0.cast(), self.1) };
        }
    }

    fn pull(memory: &mut EmulatedMemory, piece: Piece) {
        // SAFETY: memory of the test.
        let pull = unsafe { memory.pull(Place::gpu(0), &[piece]) }.unwrap();
        while !memory.poll(pull).unwrap() {
            assert!(memory.busy());
        }
    }

    #[test]
    fn a_mapping_shows_the_owners_bytes_and_outlives_the_owners() {
        let application = Application::new(16384);
        let at = application.0 as u64;
        // SAFETY: inside the mapping.
        unsafe { application.0.add(5000).write(42) };
        let (mut owner, mut puller) = (EmulatedMemory::default(), EmulatedMemory::default());
        let mut export = owner.export(Place::gpu(1), at + 4999, 1000).unwrap().pop().unwrap();
        assert!(export.fd.is_none() && puller.open(&export, Place::gpu(0), None).is_err());
        export.fd = Some(owner.descriptor(Place::gpu(1), &export).unwrap());
        assert!(export.base == at && export.len == 16384 && puller.reaches(Place::gpu(0), &export.gpu) == Some(Manner::Pull));
        let mapping = puller.open(&export, Place::gpu(0), None).unwrap();
        drop((application, export));
        let mut byte = 0u8;
        pull(&mut puller, Piece { src: mapping.addr + 5000, dst: &raw mut byte as u64, len: 1 });
        assert_eq!(std::hint::black_box(byte), 42);
        puller.close(mapping);
        assert!(puller.open.is_empty());
    }

    #[test]
    fn ordinary_memory_and_lies_are_refused() {
        let mut memory = EmulatedMemory::default();
        let bytes = vec![0u8; 4096];
        assert!(memory.export(Place::gpu(0), bytes.as_ptr() as u64, 4096).is_err());
        let application = Application::new(8192);
        assert!(memory.export(Place::gpu(0), application.0 as u64 + 4096, 4097).is_err());
        let mut export = memory.export(Place::gpu(0), application.0 as u64, 8192).unwrap().pop().unwrap();
        export.fd = Some(memory.descriptor(Place::gpu(0), &export).unwrap());
        for (len, offset) in [(8193, 0u64), (8192, 4096), (u64::MAX, 1), (1 << 50, 0)] {
            export.len = len;
            export.handle[..8].copy_from_slice(&offset.to_le_bytes());
            assert!(memory.open(&export, Place::gpu(0), None).is_err(), "{len} at {offset}");
        }
        export.fd = None;
        assert!(memory.open(&export, Place::gpu(0), None).is_err());
        assert_eq!((memory.reaches(Place::gpu(0), &[0; 16]), memory.reaches(Place::HOST, &gpu(0))), (None, None));
    }

    #[test]
    fn a_peer_writes_to_an_area_and_to_nothing_of_ours_after_its_end() {
        let (mut owner, mut writer) = (EmulatedMemory::new(true), EmulatedMemory::new(true));
        let area = owner.area(Place::gpu(0), 8192).unwrap();
        let export = owner.export_area(&area).unwrap();
        assert_eq!(writer.reaches(Place::gpu(0), &export.gpu), Some(Manner::Push));
        let mapping = writer.open_area(&export, Place::gpu(0)).unwrap();
        drop(export);
        let (from, mut to) = ([7u8; 100], [0u8; 100]);
        let write = Piece { src: from.as_ptr() as u64, dst: mapping.addr + 4096, len: 100 };
        pull(&mut writer, write);
        pull(&mut owner, Piece { src: area.addr + 4096, dst: to.as_mut_ptr() as u64, len: 100 });
        assert_eq!(*std::hint::black_box(&to), from);
        owner.drop_area(area);
        // The pages are the writer's now.
        let next = owner.area(Place::gpu(0), 8192).unwrap();
        pull(&mut writer, write);
        pull(&mut owner, Piece { src: next.addr + 4096, dst: to.as_mut_ptr() as u64, len: 100 });
        assert_eq!(*std::hint::black_box(&to), [0; 100]);
        writer.close(mapping);
        owner.drop_area(next);
        assert!(writer.open.is_empty() && owner.areas.is_empty());
    }
}
