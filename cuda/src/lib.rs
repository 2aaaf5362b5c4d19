//! The CUDA driver API: the driver is opened at run time, and its absence is a normal state. Calls do not disturb the
//! application's work on the GPU: none breaks a capture of a CUDA graph, and none waits for the application's streams, except loading
//! kernels and the first use of each kind of work, once per process and GPU. For this reason memory and kernels are kept for the next
//! user instead of freed: a free waits for all work of the GPU and blocks other calls to the driver meanwhile.
//! Knows nothing of plugins, connections or kernels.

mod allocation_cache;
mod bdf;
mod codes;
mod context;
mod driver;
mod error;
mod memory;
mod module;
mod nvml;
mod peer;
mod pointer;
mod share;
mod stream;
pub mod sys;

pub use bdf::Bdf;
pub use context::{current_name, gpu_name, in_use, ordinal_of, restoring, Context, Entered, GpuName};
pub use driver::{available, device_count, driver, Absence, Driver, Relaxed};
pub use error::{Error, Result};
pub use memory::{memory_kind, DeviceBuffer, MappedPtr, MemoryKind, PinnedBuffer};
pub use module::Module;
pub use nvml::joined_by_nvlink;
pub use peer::{enable_peer_access, has_fabric_handles, link, ordinal_of_uuid, uuid_of, Link};
pub use share::{allocation, dmabuf, ipc_handle, posix_handle, shareable, Allocation, IpcHandle, Mapped, Sharing};
pub use stream::Stream;
