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

pub(crate) use context::{ordinal_of, Gpu, Stream};
pub(crate) use driver::{available, device_count};
pub(crate) use launcher::{CopyLauncher, Fragments, Job, Segment, Ticket};
pub(crate) use memory::{
    device_to_host, enclosing_range, host_to_device, memory_kind, read_device, registration_pieces, DeviceBuffer, MappedPtr, MemoryKind,
    PinnedBuffer,
};
