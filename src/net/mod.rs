//! The boundary to the network: NCCL net plugins (`plugin`), comms whose types keep the contract's rules (`comm`), and the
//! host's interfaces (`topology`). The ABI itself is crate `nccl-net-abi`. Knows nothing of transfers.

pub(crate) mod comm;
pub mod plugin;
pub(crate) mod topology;
