//! The C ABI: `extern "C"` functions only, one file per type. Every export's body is one call of a guard from `guard.rs`, which checks
//! for null and catches panics. `handles.rs` looks up handles. Nothing outside this module knows C.
//!
//! The doc comments here are the documentation of `include/uccl_engine.h`.

mod connection;
mod engine;
mod guard;
mod handles;
mod info;
mod list;
mod logging;
mod memory;
mod metadata;
mod notif;
mod stats;
mod transfer;
