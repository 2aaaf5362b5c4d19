//! Channels: how a transfer's segments are cut into chunks (`plan`), which channel carries a chunk (`stripe`), where device
//! memory is unpacked and packed (`device`), and one channel over a comm pair (`lane`). Knows nothing of the control protocol.

pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod lane;
pub(crate) mod memory;
pub(crate) mod plan;
pub(crate) mod stripe;
