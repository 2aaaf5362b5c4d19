//! Memory of a chosen GPU. Copies run on a stream of the block and are awaited.

use crate::error::{Failure, Result};
use crate::fail;
use cuda_driver::{Context, DeviceBuffer, Stream};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

static ORDINAL: AtomicI32 = AtomicI32::new(0);
/// Work that takes longer than this has hung.
const LIMIT: Duration = Duration::from_secs(60);

impl From<cuda_driver::Error> for Failure {
    fn from(error: cuda_driver::Error) -> Failure {
        Failure::new(error.to_string())
    }
}

/// Chooses the GPU of this process's buffers by CUDA index.
pub fn choose(ordinal: i32) {
    ORDINAL.store(ordinal, Ordering::Relaxed);
}

/// The number of GPUs of this machine; 0 without a driver.
pub fn count() -> i32 {
    cuda_driver::device_count()
}

/// Fails with the reason where no GPU can be used.
pub fn require() -> Result<()> {
    match cuda_driver::driver() {
        Ok(_) => Ok(()),
        Err(absence) => fail!("--memory gpu: {}", cuda_driver::Error::from(absence)),
    }
}

/// A block of GPU memory.
pub struct Block {
    stream: Stream,
    memory: ManuallyDrop<DeviceBuffer>,
}

impl Block {
    /// Allocates on the chosen GPU.
    pub fn new(len: usize) -> Result<Block> {
        let ordinal = ORDINAL.load(Ordering::Relaxed);
        require()?;
        if ordinal >= count() {
            fail!("--memory gpu: no GPU {ordinal}; the CUDA driver sees {}", count());
        }
        let context = Context::retain(ordinal)?;
        Ok(Block {
            stream: Stream::new(&context)?,
            memory: ManuallyDrop::new(DeviceBuffer::new(&context, len, nccl_net_abi::PAGE)?),
        })
    }

    /// First byte.
    pub fn addr(&self) -> u64 {
        self.memory.ptr()
    }

    fn at(&self, offset: usize, len: usize) -> u64 {
        assert!(offset <= self.memory.len() && len <= self.memory.len() - offset);
        self.memory.ptr() + offset as u64
    }

    /// Copies to GPU memory and waits for the end.
    pub fn store(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: the range lies inside the block (see `at`); the copy is awaited.
        unsafe { self.stream.host_to_device(self.at(offset, bytes.len()), bytes.as_ptr(), bytes.len()) }?;
        Ok(self.stream.finish(LIMIT)?)
    }

    /// Copies the start of the block to the host.
    pub fn load(&self, out: &mut [u8]) -> Result<()> {
        // SAFETY: as in store.
        unsafe { self.stream.device_to_host(out.as_mut_ptr(), self.at(0, out.len()), out.len()) }?;
        Ok(self.stream.finish(LIMIT)?)
    }

    /// Sets every byte.
    pub fn fill(&mut self, value: u8) -> Result<()> {
        // SAFETY: the block is owned.
        unsafe { self.stream.fill(self.memory.ptr(), value, self.memory.len()) }?;
        Ok(self.stream.finish(LIMIT)?)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: taken once, here. An error at this point changes nothing.
        let _ = unsafe { ManuallyDrop::take(&mut self.memory) }.free();
    }
}
