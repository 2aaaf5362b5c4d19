//! GPUs as the engine uses them: one value a GPU, with the copy kernel loaded, and the launchers of that kernel.
//! Knows nothing of connections or plugins: it copies between addresses and reads `loadMeta` rows.

mod closer;
mod device;
mod grid;
mod job;
mod kernels;
mod launcher;
mod layout;
mod lent;
mod pieces;
mod pull;
mod pulls;

pub(crate) use closer::close_later;
#[cfg(test)]
pub(crate) use closer::is_done as nothing_is_closed;
pub(crate) use cuda_driver::{available, current_name, gpu_name, in_use, GpuName, MappedPtr, MemoryKind};
pub(crate) use device::Gpu;
pub(crate) use job::{Extent, Job};
pub(crate) use launcher::{CopyLauncher, Launched, INLINE_PIECES, PIECES_PER_JOB};
pub(crate) use lent::Lent;
pub(crate) use pulls::{PullOptions, Pulls};

use crate::status::{err, Error, Result};

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
