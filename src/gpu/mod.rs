//! GPUs as the engine uses them: one value a GPU, with the copy kernel loaded, and the launchers of that kernel.
//! Knows nothing of connections or plugins: it copies between addresses and reads `loadMeta` rows.

mod closer;
mod device;
mod grid;
mod job;
mod kernels;
mod launcher;
mod launcher_pool;
mod layout;
mod pieces;
mod pull_launcher;
mod pull_scheduler;

pub(crate) use closer::close_later;
#[cfg(test)]
pub(crate) use closer::is_done as nothing_is_closed;
pub(crate) use cuda_driver::{available, current_name, gpu_name, in_use, GpuName, MappedPtr, MemoryKind};
pub(crate) use device::Gpu;
pub(crate) use job::{Extent, Job};
pub(crate) use launcher::{CopyLauncher, Launched, INLINE_PIECES, PIECES_PER_JOB};
pub(crate) use launcher_pool::PooledLauncher;
pub(crate) use pull_scheduler::{PullOptions, Pulls};

use crate::status::{bail, err, Error, Result};
use cuda_driver::Stream;
use std::time::Duration;

impl From<cuda_driver::Error> for Error {
    fn from(error: cuda_driver::Error) -> Error {
        if error.out_of_memory() {
            err!(Resource, "{error}")
        } else {
            err!(Gpu, "{error}")
        }
    }
}

/// The kind of memory at `ptr`. Makes no context.
pub(crate) fn memory_kind(ptr: u64) -> Result<MemoryKind> {
    Ok(cuda_driver::memory_kind(ptr)?)
}

/// Waits until nothing of a launcher's stream runs any more, at most `limit`. A context that is broken for good runs nothing: that is as
/// well. After an error work may still run; the driver's is left in `broken`.
fn quiesce(stream: &Stream, limit: Duration, what: &str, broken: &mut Option<Error>) -> Result<()> {
    match stream.wait(limit) {
        Ok(true) => Ok(()),
        Ok(false) => bail!(TimedOut, "the GPU has not ended its {what} in {limit:?}"),
        Err(error) => {
            let dead = error.context_is_dead();
            let error = Error::from(error);
            *broken = Some(error.clone());
            if dead {
                Ok(())
            } else {
                Err(error)
            }
        }
    }
}
