//! Room in the address space of the process. Knows nothing of its use.

use std::io;

/// Room that large allocations must leave free. Small allocations need it, and a process aborts when one of those fails.
const RESERVE: usize = 8 << 20;

/// Checks that the address space has room for `len` bytes beside the reserve. Call it before every large allocation, including a
/// thread's stack.
///
/// # Errors
/// `OutOfMemory` if it has not.
pub fn ensure_space(len: usize) -> io::Result<()> {
    let len = len.checked_add(RESERVE).ok_or(io::ErrorKind::OutOfMemory)?;
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping at an address that the kernel chooses, unmapped unused.
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
