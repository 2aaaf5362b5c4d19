//! What the repository says about itself: generated files are current, the documentation and the C ABI keep their rules.
//! `scripts/lint` runs it. It needs no network and no device.

mod configuration;
mod docs;
mod exports;
mod header;
mod metrics;
mod readme;
