//! The library behind tcpx-info, tcpx-perf and tcpx-top.
//!
//! - `api`: the only module that uses the library's types
//! - `memory`: the buffers that transfers move
//! - `pattern`, `units`, `stats`, `case`: pure logic: contents and block order, sizes, percentiles, what a row measures
//! - `proto`: the messages between tcpx-perf's client and server
//! - `server`, `client`, `measure`, `interval`, `suite`: the two programs, one measured row, lines while it is measured, the lists of rows
//! - `host`, `out`: circumstances of a measurement; standard output and Ctrl-C
//! - `carried`: which plugins and NICs carried the bytes of a row
//! - `report`, `plot`: table, JSON, CSV and SVG
//! - `scrape`, `view`, `picture`: what tcpx-top reads, shows, and draws into a file
//! - `inspect`, `doctor`, `probe`, `ready`: what tcpx-info finds, the preconditions of TCPX, the loop-back transfer, and the probe of Kubernetes

pub mod api;
pub mod carried;
pub mod case;
pub mod cli;
pub mod client;
pub mod cuda;
pub mod doctor;
pub mod error;
pub mod host;
pub mod inspect;
pub mod interval;
pub mod measure;
pub mod memory;
pub mod out;
pub mod pattern;
pub mod picture;
pub mod plot;
pub mod probe;
pub mod proto;
pub mod ready;
pub mod report;
pub mod scrape;
pub mod server;
pub mod stats;
pub mod suite;
pub mod units;
pub mod view;
