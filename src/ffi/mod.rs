//! The C ABI: `extern "C"` functions only, by what they work on, each type beside its functions. Every export's body is one call of
//! a guard of `guard.rs` (null checks and panics end there); handles are looked up in `handles.rs`. Nothing outside this module
//! knows C.
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
