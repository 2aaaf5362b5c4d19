//! Host memory that stands for GPU memory and can be exported as a dma-buf: a memory file and a udmabuf over it. Knows no sockets.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use nccl_net_abi::PAGE;
use process::{Mutex, PerProcess};

/// UDMABUF_CREATE, and its flag that closes the dma-buf in programs that this one starts.
const CREATE: u64 = 0x4018_7542;
const CLOSE_ON_EXEC: u32 = 1;

/// Blocks by their first address: a dma-buf is asked for by address.
fn blocks() -> &'static Mutex<BTreeMap<usize, (usize, OwnedFd)>> {
    static BLOCKS: PerProcess<Mutex<BTreeMap<usize, (usize, OwnedFd)>>> = PerProcess::new(Mutex::default);
    BLOCKS.get()
}

/// Zeroed memory in whole pages, which [`export`] finds by its address.
pub struct Block {
    base: *mut u8,
    len: usize,
}
// SAFETY: plain memory, owned.
unsafe impl Send for Block {}
// SAFETY: as above; it is reached by its address alone.
unsafe impl Sync for Block {}

impl Block {
    /// At least `len` bytes.
    ///
    /// # Errors
    /// Those of the kernel: no memory, no descriptor.
    pub fn new(len: usize) -> io::Result<Block> {
        let len = len.max(1).next_multiple_of(PAGE);
        // SAFETY: a name that ends in a zero byte.
        let fd = unsafe { libc::memfd_create(c"emulated GPU".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor just created, without another owner.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: calls on a descriptor of ours.
        let sized =
            unsafe { libc::ftruncate(fd, len as i64) == 0 && libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) == 0 };
        if !sized {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        blocks().lock().insert(base as usize, (len, file));
        Ok(Block { base: base.cast(), len })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        blocks().lock().remove(&(self.base as usize));
        // SAFETY: the mapping made in `new`, unmapped once.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A dma-buf over whole pages of a block.
pub(crate) fn export(at: usize, len: usize) -> io::Result<OwnedFd> {
    let blocks = blocks().lock();
    let found = blocks.range(..=at).next_back().filter(|(base, (size, _))| at - **base + len <= *size);
    let Some((base, (_, file))) = found else {
        return Err(io::Error::other("this memory of an emulated GPU cannot be exported as a dma-buf"));
    };
    udmabuf(file.as_fd(), at - base, len)
}

fn udmabuf(file: BorrowedFd<'_>, offset: usize, len: usize) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        file: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    let open = std::fs::File::options().read(true).write(true).open("/dev/udmabuf");
    let device = open.map_err(|e| io::Error::new(e.kind(), format!("/dev/udmabuf: {e}")))?;
    let create = Create { file: file.as_raw_fd() as u32, flags: CLOSE_ON_EXEC, offset: offset as u64, size: len as u64 };
    // SAFETY: the kernel reads the structure during the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), CREATE as _, &raw const create) } {
        // SAFETY: a descriptor just created, without another owner.
        fd @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_by_its_address_alone() {
        let block = Block::new(3 * PAGE).unwrap();
        let at = block.as_ptr() as usize;
        // SAFETY: a byte of the block.
        unsafe { block.as_ptr().add(3 * PAGE - 1).write(7) };
        for (at, len) in [(at, 4 * PAGE), (at + PAGE, 3 * PAGE), (at + 3 * PAGE, PAGE), (PAGE, PAGE)] {
            assert!(export(at, len).unwrap_err().to_string().contains("cannot be exported"), "{len} bytes");
        }
        let inside = export(at + PAGE, 2 * PAGE);
        assert!(inside.map_or_else(|e| !e.to_string().contains("cannot be exported"), |_| true));
        drop(block);
        assert!(export(at, PAGE).is_err());
    }
}
