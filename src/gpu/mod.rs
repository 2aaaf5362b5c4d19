//! GPUs through the CUDA driver API: memory kinds, contexts, pinned and device memory, and the launcher of the copy kernel.
//! The driver is opened at run time and its absence is a normal state; no context is made before memory on a GPU is used.
//! Knows nothing of connections or plugins: it copies between addresses and reads `loadMeta` rows.

pub(crate) mod bdf;
mod context;
mod driver;
mod launcher;
mod layout;
mod memory;
mod plan;

pub(crate) use context::{current_name, Gpu, GpuName};
pub(crate) use driver::available;
pub(crate) use launcher::{CopyLauncher, Job, Segment, Ticket, INLINE_PIECES, PIECES_PER_JOB};
pub(crate) use memory::{
    device_to_host, host_to_device, memory_kind, read_device, DeviceBuffer, MappedPtr, MemoryKind, PinnedBuffer,
};
