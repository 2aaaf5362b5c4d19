//! The software plugin as a loadable object: exports the data symbols that a loader of NCCL net plugins looks for, and
//! nothing else.
#![allow(non_upper_case_globals)]

use nccl_net_abi::{ncclNet_v7, ucclNetExt_v2};

/// The plugin table, v7.
#[no_mangle]
pub static ncclNetPlugin_v7: ncclNet_v7 = soft_plugin::TABLE_V7;

/// The extension table.
#[no_mangle]
pub static ucclNetExt_v2: ucclNetExt_v2 = soft_plugin::EXT_V2;
