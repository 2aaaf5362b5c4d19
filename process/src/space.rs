//! Room in the address space of the process. Knows nothing of what takes it.

use std::io;

/// What large takers leave. Small allocations live on it, and a process that has no room for those ends.
const RESERVE: usize = 4 << 20;

/// Whether the address space has room for `len` bytes beside the reserve. To be asked before anything large is taken, a thread's stack
/// among it.
///
/// # Errors
/// `OutOfMemory` where it has not.
pub fn ensure_space(len: usize) -> io::Result<()> {
    let len = len.checked_add(RESERVE).ok_or(io::ErrorKind::OutOfMemory)?;
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a fresh mapping where the kernel chooses, which is given back unused.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::munmap(at, len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_little_and_none_for_everything() {
        ensure_space(1).unwrap();
        for len in [usize::MAX, usize::MAX - RESERVE, 1 << 60] {
            assert_eq!(ensure_space(len).unwrap_err().kind(), io::ErrorKind::OutOfMemory, "{len}");
        }
    }
}
