//! How GPUs of one host reach each other. Creates no context unless documented; knows nothing of transfers.

use crate::context::{device_of, Context};
use crate::driver::{driver, functions};
use crate::error::Result;
use crate::sys::{self, CUuuid};

/// UUID of the GPU with this CUDA ordinal; each MIG slice has its own.
pub fn uuid_of(ordinal: i32) -> Result<[u8; 16]> {
    let cuda = functions()?;
    let mut uuid = CUuuid::default();
    // SAFETY: the output is writable, the device valid.
    unsafe { cuda.cuDeviceGetUuid(&mut uuid, device_of(&cuda, ordinal)?) }?;
    Ok(uuid.0)
}

/// CUDA ordinal of the GPU with this UUID; `None` if not visible to this process.
pub fn ordinal_of_uuid(uuid: &[u8; 16]) -> Result<Option<i32>> {
    for ordinal in 0..driver()?.devices() {
        if uuid_of(ordinal)? == *uuid {
            return Ok(Some(ordinal));
        }
    }
    Ok(None)
}

/// Whether GPU memory can be exported by handles of type FABRIC, which cross containers and hosts.
pub fn has_fabric_handles(ordinal: i32) -> Result<bool> {
    let cuda = functions()?;
    let mut supported = 0;
    // SAFETY: the output is writable, the device valid.
    unsafe { cuda.cuDeviceGetAttribute(&mut supported, sys::HANDLE_TYPE_FABRIC_SUPPORTED, device_of(&cuda, ordinal)?) }?;
    Ok(supported != 0)
}

/// The link between two GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// They are the same.
    Same,
    /// One reads the other's memory over a link with atomics, such as NVLink.
    Fast,
    /// One reads the other's memory over PCIe, where reads are slow.
    Bus,
    /// Neither reaches the other's memory.
    None,
}

/// How the GPU `from` reaches the memory of the GPU `to`.
pub fn link(from: i32, to: i32) -> Result<Link> {
    if from == to {
        return Ok(Link::Same);
    }
    let cuda = functions()?;
    let (from, to) = (device_of(&cuda, from)?, device_of(&cuda, to)?);
    let (mut can, mut atomics) = (0, 0);
    // SAFETY: outputs are writable, devices valid.
    unsafe { cuda.cuDeviceCanAccessPeer(&mut can, from, to) }?;
    if can == 0 {
        return Ok(Link::None);
    }
    // SAFETY: as above.
    unsafe { cuda.cuDeviceGetP2PAttribute(&mut atomics, sys::P2P_NATIVE_ATOMICS, from, to) }?;
    Ok(if atomics != 0 { Link::Fast } else { Link::Bus })
}

/// Lets kernels of `from` use this process's allocations on the GPU of `to`, as long as both contexts live.
pub fn enable_peer_access(from: &Context, to: &Context) -> Result<()> {
    let cuda = from.enter()?;
    // SAFETY: both contexts are live.
    match unsafe { cuda.cuCtxEnablePeerAccess(to.id() as *mut _, 0) } {
        Err(e) if e.code() == sys::ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        result => result,
    }
}
