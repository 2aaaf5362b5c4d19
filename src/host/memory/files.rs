//! Areas of host memory: memory files that this process makes for a peer to write to, and such files of a peer, mapped to write to them.
//! They are sealed, so that no access of this process can lie beyond their end, whatever a peer does. Knows nothing of what lies in them.

use super::{Area, Export, ExportKind, Mapping};
use crate::host::shm::{self, Shared};
use crate::status::{bail, err, Result};
use process::PerProcess;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the areas that all connections of this process have made.
static MADE: PerProcess<AtomicU64> = PerProcess::new(AtomicU64::default);

/// A part of those bytes.
struct Budgeted(&'static AtomicU64, u64);

impl Budgeted {
    fn take(len: u64, most: u64) -> Result<Budgeted> {
        let made = MADE.get();
        let taken = made.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(len).filter(|&n| n <= most));
        match taken {
            Ok(_) => Ok(Budgeted(made, len)),
            Err(n) => Err(err!(Resource, "areas of host memory have {n} bytes, and may have {most}")),
        }
    }
}

impl Drop for Budgeted {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// A file of this process.
struct Made {
    shared: Shared,
    /// Until the peer has it.
    fd: Option<OwnedFd>,
    _budgeted: Budgeted,
}

/// Memory files of a connection.
pub(super) struct Files {
    made: HashMap<u64, Made>,
    open: HashMap<u64, Shared>,
    last: u64,
    most: u64,
}

impl Files {
    /// `most`: bytes that the areas of this process may have.
    pub(super) fn new(most: u64) -> Files {
        Files { made: HashMap::new(), open: HashMap::new(), last: 0, most }
    }

    /// A new area of zeros.
    ///
    /// # Errors
    /// `Resource` beyond the limit, or when the system has no memory for it.
    pub(super) fn make(&mut self, len: usize) -> Result<Area> {
        let budgeted = Budgeted::take(len as u64, self.most)?;
        let fd = shm::create(c"uccl-area", len)?;
        // All pages now, on this process's account: where the system has none left, an access would end the process.
        // SAFETY: a plain system call on our descriptor.
        if unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, len as libc::off_t) } != 0 {
            bail!(Resource, "no memory for an area of {len} bytes: {}", std::io::Error::last_os_error());
        }
        let shared = Shared::map(fd.as_fd(), len, true)?;
        self.last += 1;
        let area = Area { id: self.last, addr: shared.addr() };
        self.made.insert(self.last, Made { shared, fd: Some(fd), _budgeted: budgeted });
        Ok(area)
    }

    /// What a peer needs to map an area, once.
    ///
    /// # Errors
    /// `Internal` the second time.
    pub(super) fn export(&mut self, area: &Area) -> Result<Export> {
        let made = self.made.get_mut(&area.id).and_then(|made| Some((made.fd.take()?, made.shared.len())));
        let Some((fd, len)) = made else { bail!(Internal, "an area that is not there, or is exported again") };
        Ok(Export { kind: ExportKind::SharedMemory, handle: [0; 64], fd: Some(fd), base: area.addr, len, gpu: [0; 16] })
    }

    /// Ends an area. Its pages stay as long as the peer has them mapped.
    pub(super) fn drop_area(&mut self, area: &Area) {
        self.made.remove(&area.id);
    }

    /// Maps an area of a peer.
    ///
    /// # Errors
    /// `Protocol` for what is no sealed memory file of that length.
    pub(super) fn open(&mut self, export: &Export) -> Result<Mapping> {
        let (ExportKind::SharedMemory, Some(fd)) = (export.kind, &export.fd) else {
            bail!(Protocol, "an area of host memory of kind {:?}", export.kind)
        };
        shm::check(fd.as_fd(), export.len)?;
        let shared = Shared::map(fd.as_fd(), export.len as usize, true)?;
        self.last += 1;
        let mapping = Mapping { id: self.last, addr: shared.addr() };
        self.open.insert(self.last, shared);
        Ok(mapping)
    }

    /// Ends a mapping.
    pub(super) fn close(&mut self, mapping: &Mapping) {
        self.open.remove(&mapping.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_shared_and_limited() {
        let mut files = Files::new(u64::MAX);
        let area = files.make(1 << 20).unwrap();
        let export = files.export(&area).unwrap();
        assert!(files.export(&area).is_err(), "its descriptor has left");
        let mapping = files.open(&export).unwrap();
        // SAFETY: two mappings of one file of this test.
        unsafe {
            (mapping.addr as *mut u8).add(4097).write_volatile(9);
            assert_eq!((area.addr as *const u8).add(4097).read_volatile(), 9);
        }
        let least = MADE.get().load(Ordering::Relaxed);
        assert!(least >= 1 << 20);
        assert!(Files::new((1 << 20) - 1).make(1 << 20).is_err_and(|e| e.to_str().contains("may have")));
        files.drop_area(&area);
        // SAFETY: the mapping stays.
        assert_eq!(unsafe { (mapping.addr as *const u8).add(4097).read_volatile() }, 9);
        files.close(&mapping);
        assert!(files.made.is_empty() && files.open.is_empty());
    }
}
