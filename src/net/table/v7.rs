//! The table of version 7.

use super::{calls_alike, Answer, NetTable, Properties};
use nccl_net_abi::{ncclDebugLogger_t, ncclNetDeviceHandle_v7, ncclNetProperties_v7, ncclNet_v7};
use std::ffi::{c_int, c_void};

impl NetTable for ncclNet_v7 {
    calls_alike!();

    fn version(&self) -> u32 {
        7
    }

    unsafe fn properties(&self, dev: c_int, out: &mut Properties) -> Answer {
        let call = self.getProperties?;
        // SAFETY: plain data for which zeros are valid.
        let mut p: ncclNetProperties_v7 = unsafe { std::mem::zeroed() };
        // SAFETY: p is writable; dev is below the number of devices by the trait's contract.
        let result = unsafe { call(dev, &mut p) };
        *out = Properties {
            name: super::text(p.name),
            pci_path: super::text(p.pciPath),
            speed_mbps: p.speed,
            ptr_support: p.ptrSupport,
            reg_is_global: false,
            device_type: p.netDeviceType,
        };
        Some(result)
    }

    unsafe fn reg_mr(&self, comm: *mut c_void, data: *mut c_void, size: usize, kind: c_int, out: &mut *mut c_void) -> Answer {
        // The size is an int here: larger sizes are refused.
        let Ok(size) = c_int::try_from(size) else { return Some(nccl_net_abi::NCCL_INVALID_ARGUMENT) };
        // SAFETY: by the trait's contract.
        self.regMr.map(|call| unsafe { call(comm, data, size, kind, out) })
    }
}
