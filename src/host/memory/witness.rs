//! Which process a peer is: its number, and random bytes that only that process has at that place of its memory. Knows nothing of how
//! memory is read.

use crate::status::{bail, err, Result};
use process::PerProcess;

/// Bytes of a witness.
pub(super) const WITNESS: usize = 32;

/// A process on this host. For a peer, [`super::host::HostMemory`] alone makes one, once it has found the witness in the memory of the
/// process that the kernel names: no peer can pass for another by what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(super) pid: i32,
    pub(super) witness: Witness,
}

/// A few bytes of a process that no other has, and where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
