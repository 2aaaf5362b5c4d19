//! Channels: cutting a transfer's segments into chunks (`plan`), choosing a chunk's path (`router`, over the trait `path`) and
//! channel (`stripe`), the path over a plugin's comms (`net`), and unpacking and packing device memory (`device`). Knows nothing
//! of the control protocol.

pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod memory;
pub(crate) mod net;
pub(crate) mod path;
pub(crate) mod plan;
pub(crate) mod router;
pub(crate) mod stillness;
pub(crate) mod stripe;
