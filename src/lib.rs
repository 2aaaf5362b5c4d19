//! libuccl_p2p: moves host and GPU memory between hosts without RDMA, over several channels of a NCCL net plugin: GPUDirect-TCPX
//! with a CUDA unpack kernel, or ordinary TCP. The C ABI is `include/uccl_engine.h`; docs/architecture.md explains the whole.
//!
//! | module | what it does |
//! |---|---|
//! | `ffi` | the C ABI: null and panic guard, handles, status numbers |
//! | [`engine`] | engines, connections, set-up, progress |
//! | `proto` | the protocol of a connection as a machine without sockets, threads or clocks |
//! | `channel` | chunk plan, striping, and the channels of a connection over the seam `channel::path`; `channel::net` is the path over a plugin's comms; device memory is packed and unpacked here |
//! | [`net`] | network plugins: their tables and traits, comms that keep the contract's rules, the set-up of channels, the host's interfaces |
//! | `wire` | the control connection as bytes: handshake, keys, sealed records, set-up messages, frames |
//! | `gpu` | the copy kernel and its launchers, over the crate `cuda-driver` |
//! | `registry`, `region` | registered memory and its use counts |
//! | `notify`, `budget`, `segment_pool` | notifications queued for the application; budgets of the peers; reuse of segment lists |
//! | [`types`] | types that all layers share: places, spans, segments, keys |
//! | [`config`], [`addresses`] | every environment variable; the listening address and the allowed networks |
//! | [`require`] | what must carry memory, and whether it does |
//! | `logging`, [`status`] | the log and its limits; the error type and the status numbers |
//! | `hash` | a fast hash for maps |
//! | [`stats`] | statistics, as text and for Prometheus |
//!
//! Calls go one way: ffi -> engine -> proto -> channel -> {net, wire, gpu} -> the modules after them. Crates: `nccl-net-abi` has
//! the layouts of the plugin interface, `soft-plugin` is the plugin over ordinary TCP, `reactor` waits for descriptors,
//! `cuda-driver` opens the CUDA driver.

pub mod addresses;
#[doc(hidden)]
pub mod bench_api;
#[cfg(test)]
mod benchmarks;
mod budget;
mod channel;
pub mod config;
mod direct;
pub mod engine;
mod events;
mod ffi;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzz_api;
mod gpu;
mod hash;
mod host;
mod logging;
pub mod net;
mod notify;
mod proto;
mod region;
mod registry;
pub mod require;
mod segment_pool;
pub mod stats;
pub mod status;
pub mod types;
mod wire;
