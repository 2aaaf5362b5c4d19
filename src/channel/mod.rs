//! Channels: how a transfer's segments are cut into chunks (`plan`), the way to the peer as the engine sees it (`router` over the seam
//! `path`), which channel carries a chunk (`stripe`), the path over a network plugin's comms (`net`), and where device memory is unpacked
//! and packed (`device`). Knows nothing of the control protocol.

pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod memory;
pub(crate) mod net;
pub(crate) mod path;
pub(crate) mod plan;
pub(crate) mod router;
pub(crate) mod stillness;
pub(crate) mod stripe;
