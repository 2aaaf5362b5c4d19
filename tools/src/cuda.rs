//! Memory of a chosen GPU. Copies run on a stream of the block and are awaited.

use crate::error::{Failure, Result};
use crate::fail;
use cuda_driver::{Context, DeviceBuffer, Stream};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The chosen GPU; negative: none.
static CHOSEN: AtomicI32 = AtomicI32::new(-1);
/// Work that takes longer than this has hung.
const LIMIT: Duration = Duration::from_secs(60);

impl From<cuda_driver::Error> for Failure {
    fn from(error: cuda_driver::Error) -> Failure {
        Failure::new(error.to_string())
    }
}

/// Chooses the GPU of this process's engines and buffers by CUDA index.
pub fn choose(ordinal: i32) {
    CHOSEN.store(ordinal, Ordering::Relaxed);
}

/// The context of a GPU. It stays until the process ends.
fn context(ordinal: i32) -> Result<Arc<Context>> {
    static CONTEXT: OnceLock<Arc<Context>> = OnceLock::new();
    require()?;
    if ordinal >= count() {
        fail!("no GPU {ordinal}: the CUDA driver sees {}", count());
    }
    if let Some(context) = CONTEXT.get() {
        return Ok(context.clone());
    }
    let context = Context::retain(ordinal)?;
    Ok(CONTEXT.get_or_init(|| context).clone())
}

/// Runs `body` while the chosen GPU is current in this thread; without a choice as it is.
pub fn on_chosen<R>(body: impl FnOnce() -> R) -> Result<R> {
    let ordinal = CHOSEN.load(Ordering::Relaxed);
    if ordinal < 0 {
        return Ok(body());
    }
    let context = context(ordinal)?;
    let _current = context.enter()?;
    Ok(body())
}

/// The number of GPUs of this machine; 0 without a driver.
pub fn count() -> i32 {
    cuda_driver::device_count()
}

/// Fails with the reason where no GPU can be used.
pub fn require() -> Result<()> {
    match cuda_driver::driver() {
        Ok(_) => Ok(()),
        Err(absence) => fail!("{}", cuda_driver::Error::from(absence)),
    }
}

/// A block of GPU memory.
pub struct Block {
    stream: Stream,
    memory: ManuallyDrop<DeviceBuffer>,
}

impl Block {
    /// Allocates on the chosen GPU, or the first one.
    pub fn new(len: usize) -> Result<Block> {
        let context = context(CHOSEN.load(Ordering::Relaxed).max(0))?;
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
