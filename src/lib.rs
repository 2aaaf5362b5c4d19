//! libuccl_p2p: moves host and GPU memory between nodes without RDMA, over several channels of a NCCL net plugin: GPUDirect-TCPX
//! with a CUDA unpack kernel, or ordinary TCP. The C ABI is `include/uccl_engine.h`; docs/architecture.md explains the whole.
//!
//! | module | what it is |
//! |---|---|
//! | `ffi` | the C ABI: null and panic guard, handles, status numbers |
//! | [`engine`] | engines, connections, transfers, registered memory, notifications, progress |
//! | `wire` | control frames, the control stream, handshake and authentication |
//! | [`types`] | words that all layers share: places, spans, segments |
//! | `channel` | chunk plan, striping, one channel over a comm pair, unpacking |
//! | `gpu` | CUDA through the driver API: memory kinds, contexts, the launcher of the copy kernel |
//! | [`net`] | plugins, comms that keep the contract's rules, the host's interfaces |
//! | [`addresses`] | what the port is bound to, who may connect |
//! | `fork` | values that a child process must not share with its parent |
//! | [`config`] | every environment variable |
//! | [`stats`] | what is counted, in words and for Prometheus |
//! | [`status`] | the error type and the status numbers |
//!
//! Calls go one way: ffi -> engine -> {wire, channel} -> {net, gpu}.

pub mod addresses;
#[doc(hidden)]
pub mod bench_api;
mod channel;
pub mod config;
pub mod engine;
mod ffi;
mod fork;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzz_api;
mod gpu;
mod logging;
pub mod net;
mod region;
pub mod stats;
pub mod status;
pub mod types;
mod wire;
