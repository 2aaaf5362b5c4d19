//! The buffers that transfers move: page-aligned, touched before the timed part. The only module that knows kinds of memory; GPU
//! memory is handled in [`Buffer`] and nowhere else.

use crate::api::{FifoItem, LocalSegment, Node, EMULATE_VARIABLE};
use crate::cuda;
use crate::error::Result;
use crate::fail;
use crate::pattern;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

/// The value of poisoned bytes.
pub const POISON: u8 = 0xa5;
/// Bytes written at a time.
const STEP: usize = 1 << 20;

/// A kind of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Ordinary memory.
    #[default]
    Host,
    /// Ordinary memory that the library treats as GPU memory: bounce buffers, descriptors, unpacking on the CPU.
    Emulated,
    /// GPU memory.
    Gpu,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Host => "host",
            Kind::Emulated => "emulated",
            Kind::Gpu => "gpu",
        })
    }
}

impl Kind {
    /// Makes this process treat registered memory as this kind. Call it before the engine starts; fails for a kind that is not
    /// available here.
    pub fn prepare_process(self) -> Result<()> {
        match self {
            Kind::Host => std::env::remove_var(EMULATE_VARIABLE),
            Kind::Emulated => std::env::set_var(EMULATE_VARIABLE, "1"),
            Kind::Gpu => {
                cuda::require()?;
                std::env::remove_var(EMULATE_VARIABLE);
            }
        }
        Ok(())
    }
}

/// Memory of one kind. The methods access its contents only while no transfer uses it.
pub struct Buffer {
    addr: *mut u8,
    len: usize,
    /// GPU memory: `addr` is not an address of this process.
    gpu: Option<cuda::Block>,
}

// SAFETY: the mapping belongs to this value alone; `store` and `poison` need `&mut`.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Allocates and touches `len` bytes.
    pub fn allocate(kind: Kind, len: u64) -> Result<Buffer> {
        let Ok(size) = usize::try_from(len) else { fail!("{len} bytes do not fit the address space") };
        if size == 0 {
            fail!("a buffer of 0 bytes was requested");
        }
        if kind == Kind::Gpu {
            let block = cuda::Block::new(size)?;
            let mut buffer = Buffer { addr: block.addr() as *mut u8, len: size, gpu: Some(block) };
            buffer.poison();
            return Ok(buffer);
        }
        if let Some(free) = available_memory().filter(|free| len > free / 10 * 9) {
            fail!("a buffer of {len} bytes is too large: {free} bytes of memory are available");
        }
        // SAFETY: a new private anonymous mapping; no existing memory is affected.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if addr == libc::MAP_FAILED {
            fail!("cannot allocate {len} bytes: {}", std::io::Error::last_os_error());
        }
        let mut buffer = Buffer { addr: addr.cast(), len: size, gpu: None };
        buffer.poison();
        Ok(buffer)
    }

    /// First byte.
    pub fn addr(&self) -> usize {
        self.addr as usize
    }

    /// Bytes; never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Overwrites everything with [`POISON`].
    pub fn poison(&mut self) {
        if let Some(block) = &mut self.gpu {
            return expect(block.fill(POISON));
        }
        // SAFETY: the mapping has `len` writable bytes, and no transfer uses it now.
        unsafe { std::ptr::write_bytes(self.addr, POISON, self.len) };
    }

    /// Overwrites everything with the pattern of `seed`.
    pub fn fill(&mut self, seed: u64) {
        let mut scratch = vec![0; STEP.min(self.len)];
        for offset in (0..self.len).step_by(STEP) {
            let part = &mut scratch[..STEP.min(self.len - offset)];
            pattern::fill(seed, offset as u64, part);
            self.store(offset, part);
        }
    }

    fn store(&mut self, offset: usize, bytes: &[u8]) {
        assert!(bytes.len() <= self.len - offset);
        if let Some(block) = &mut self.gpu {
            return expect(block.store(offset, bytes));
        }
        // SAFETY: the range lies inside the mapping (checked above), and no transfer uses it now.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.addr.add(offset), bytes.len()) };
    }

    /// The contents of the buffer.
    pub fn contents(&self) -> Cow<'_, [u8]> {
        if let Some(block) = &self.gpu {
            let mut copy = vec![!POISON; self.len];
            expect(block.load(&mut copy));
            return Cow::Owned(copy);
        }
        // SAFETY: the mapping has `len` readable, initialised bytes, and no transfer changes them now.
        Cow::Borrowed(unsafe { std::slice::from_raw_parts(self.addr, self.len) })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.gpu.is_some() {
            return;
        }
        // SAFETY: the mapping of `allocate`, unmapped once.
        unsafe { libc::munmap(self.addr.cast(), self.len) };
    }
}

/// A CUDA call on memory of this process fails only if the GPU itself has failed: there is nothing left to measure.
fn expect(result: Result<()>) {
    if let Err(e) = result {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}

/// MemAvailable of /proc/meminfo, bytes.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A buffer registered with an engine.
pub struct Region {
    node: Arc<Node>,
    mr: u64,
    buffer: ManuallyDrop<Buffer>,
}

impl Region {
    /// Allocates and registers `len` bytes.
    pub fn new(node: &Arc<Node>, kind: Kind, len: u64) -> Result<Region> {
        let buffer = Buffer::allocate(kind, len)?;
        let mr = node.register(buffer.addr(), buffer.len())?;
        Ok(Region { node: node.clone(), mr, buffer: ManuallyDrop::new(buffer) })
    }

    /// The memory.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The memory, to be changed.
    pub fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    /// `len` bytes at `offset`, as the local segment of a transfer.
    pub fn segment(&self, offset: u64, len: u64) -> LocalSegment {
        LocalSegment { mr: self.mr, addr: self.buffer.addr() + offset as usize, len: len as usize }
    }

    /// The FIFO item of the whole region.
    pub fn item(&self) -> Result<FifoItem> {
        self.node.item(self.mr, self.buffer.addr(), self.buffer.len())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        match self.node.deregister(self.mr) {
            // SAFETY: dropped once, here; the engine no longer uses the memory.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.buffer) },
            // The engine may still use the memory: it stays mapped until the process ends.
            Err(e) => eprintln!("warning: {e}; the memory stays allocated"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_poisoned_and_hold_the_pattern() {
        let mut buffer = Buffer::allocate(Kind::Host, (1 << 20) + 5).unwrap();
        assert_eq!(buffer.addr() % 4096, 0);
        assert!(buffer.contents().iter().all(|&b| b == POISON));
        buffer.fill(3);
        let mut expected = vec![0; buffer.len()];
        pattern::fill(3, 0, &mut expected);
        assert!(*buffer.contents() == *expected);
        buffer.poison();
        assert!(buffer.contents().iter().all(|&b| b == POISON));
    }

    #[test]
    fn impossible_buffers_are_refused() {
        for (kind, len) in [(Kind::Host, 0), (Kind::Host, u64::MAX), (Kind::Gpu, 0)] {
            assert!(Buffer::allocate(kind, len).is_err(), "{kind} {len}");
        }
    }
}
