//! Memory that two processes share: files without a name, sealed so that neither process can shrink them under the other, and their
//! mappings. Knows nothing of what lies in them.

use crate::status::{bail, Error, Result};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// What keeps a mapping whole: an access beyond the end of a file ends the process.
const WHOLE: libc::c_int = libc::F_SEAL_SHRINK;

fn os(what: &str) -> Error {
    Error::system(what, &std::io::Error::last_os_error())
}

/// A mapping of a memory file, page-aligned. Its bytes may change at any time: another process has them too.
#[derive(Debug)]
pub(crate) struct Shared {
    at: NonNull<u8>,
    len: usize,
}
// SAFETY: plain memory; all access goes through atomics or raw copies.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A new file of `len` zeros that keeps its length for ever.
pub(crate) fn create(name: &CStr, len: usize) -> Result<OwnedFd> {
    // SAFETY: a terminated name; the descriptor is fresh.
    let fd = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if fd < 0 {
            return Err(os("memfd_create"));
        }
        OwnedFd::from_raw_fd(fd)
    };
    // Beyond the limit of file sizes, which counts for memory files too, the kernel sends SIGXFSZ, which ends the process.
    let most = file_size_limit();
    if len as u64 > most {
        bail!(Resource, "a memory file of {len} bytes, where no file may have more than {most} (RLIMIT_FSIZE, ulimit -f)");
    }
    // SAFETY: plain system calls on our descriptor.
    unsafe {
        if libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) != 0 {
            return Err(os("the size of a memory file"));
        }
        if libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, WHOLE | libc::F_SEAL_GROW | libc::F_SEAL_SEAL) != 0 {
            return Err(os("the seals of a memory file"));
        }
    }
    Ok(fd)
}

/// The largest file that this process may make.
fn file_size_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a writable structure, which stays as it is when the call fails.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) };
    limit.rlim_cur
}

/// Whether a descriptor is a memory file that cannot shrink and holds `len` bytes.
///
/// # Errors
/// `Protocol` names what is wrong with it.
pub(crate) fn check(fd: BorrowedFd<'_>, len: u64) -> Result<()> {
    // SAFETY: plain system calls; the kernel checks the descriptor, the structures are writable and zeros are valid for them.
    let (seals, stat, fs) = unsafe {
        let (mut stat, mut fs): (libc::stat, libc::statfs) = (std::mem::zeroed(), std::mem::zeroed());
        let seals = libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS);
        if libc::fstat(fd.as_raw_fd(), &mut stat) != 0 || libc::fstatfs(fd.as_raw_fd(), &mut fs) != 0 {
            bail!(Protocol, "a descriptor of the peer cannot be looked at");
        }
        (seals, stat, fs)
    };
    // Huge pages may run out at the first access.
    if seals < 0 || fs.f_type != libc::TMPFS_MAGIC as _ {
        bail!(Protocol, "a descriptor of the peer is no memory file");
    }
    if seals & WHOLE == 0 {
        bail!(Protocol, "a memory file of the peer may shrink");
    }
    if u64::try_from(stat.st_size).unwrap_or(0) < len {
        bail!(Protocol, "a memory file of the peer has {} bytes of {len}", stat.st_size);
    }
    Ok(())
}

impl Shared {
    /// Maps the first `len` bytes of a file that was checked.
    pub(crate) fn map(fd: BorrowedFd<'_>, len: usize, writable: bool) -> Result<Shared> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        process::ensure_space(len).map_err(|e| Error::system("mapping a memory file", &e))?;
        // SAFETY: a fresh mapping of a file at an address that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(os("mapping a memory file"));
        }
        let Some(at) = NonNull::new(at.cast::<u8>()) else { bail!(System, "a memory file was mapped at address 0") };
        // A forked child has nothing to do with it. It works without, too.
        // SAFETY: the mapping just made.
        unsafe { libc::madvise(at.as_ptr().cast(), len, libc::MADV_DONTFORK) };
        Ok(Shared { at, len })
    }

    /// First byte.
    pub(crate) fn addr(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// `N` words from this one on, to go through many.
    ///
    /// # Panics
    /// When the mapping does not hold them, which is a mistake of the layout.
    pub(crate) fn words<const N: usize>(&self, from: usize) -> &[AtomicU64; N] {
        assert!(from + N <= self.len / 8, "words {from} to {} of {}", from + N, self.len / 8);
        // SAFETY: inside the mapping, which is page-aligned; all access to it is atomic.
        unsafe { &*self.at.as_ptr().cast::<u64>().add(from).cast::<[AtomicU64; N]>() }
    }

    /// The word of this number; wraps at the end.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        let index = index % (self.len / 8);
        // SAFETY: inside the mapping, which is page-aligned; all access to it is atomic.
        unsafe { AtomicU64::from_ptr(self.at.as_ptr().cast::<u64>().add(index)) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping; nothing refers to it.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;

    #[test]
    fn both_mappings_show_the_same_and_the_length_stays() {
        let fd = create(c"test", 8192).unwrap();
        check(fd.as_fd(), 8192).unwrap();
        let (a, b) = (Shared::map(fd.as_fd(), 8192, true).unwrap(), Shared::map(fd.as_fd(), 8192, false).unwrap());
        a.word(5).store(7, Ordering::Release);
        assert_eq!(b.word(5).load(Ordering::Acquire), 7);
        assert_eq!(b.word(5 + 1024).load(Ordering::Acquire), 7, "wraps");
        // SAFETY: plain system calls.
        assert!(unsafe { libc::ftruncate(fd.as_raw_fd(), 0) } < 0 && unsafe { libc::ftruncate(fd.as_raw_fd(), 1 << 20) } < 0);
    }

    #[test]
    fn what_could_shrink_or_is_no_memory_is_refused() {
        let file = |flags| {
            // SAFETY: a terminated name, a fresh descriptor.
            let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), flags)) };
            // SAFETY: a plain system call.
            assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), 4096) }, 0);
            fd
        };
        for fd in [
            file(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING),
            file(libc::MFD_CLOEXEC),
            std::fs::File::open("/proc/self/exe").unwrap().into(),
            std::fs::File::open("/dev/zero").unwrap().into(),
            std::os::unix::net::UnixStream::pair().unwrap().0.into(),
        ] {
            assert!(check(fd.as_fd(), 4096).is_err(), "{fd:?}");
        }
        let fd = create(c"test", 4096).unwrap();
        assert!(check(fd.as_fd(), 4097).is_err());
    }
}
