//! Channels: cutting a transfer's segments into chunks (`plan`), choosing the path of a chunk (`router`, over the trait `path`) and its
//! channel (`stripe`), the path over a network plugin's comms (`net`), and unpacking and packing device memory (`device`). Knows
//! nothing of the control protocol.

pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod memory;
pub(crate) mod net;
pub(crate) mod path;
pub(crate) mod plan;
pub(crate) mod router;
pub(crate) mod stillness;
pub(crate) mod stripe;
