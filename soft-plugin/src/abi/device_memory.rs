//! The C entries of the table for device memory TCP, as far as they differ from those of the software plugin: its devices are the NICs
//! whose queues can write device memory, and each of its comms has a second connection.

use std::ffi::c_int;
use std::sync::Arc;

use nccl_net_abi::*;

use super::{check, device_handle, dial, failed, guard, interface, properties, start_recv, start_send, Opaque};
use crate::devmem::Area;
use crate::interfaces::Interface;
use crate::rendezvous::{self, Direction, Handle, ListenComm};
use crate::state::{self, Global};

/// Opens the area of the current GPU on every NIC: the names of those that have one.
///
/// # Errors
/// Why no NIC has one, each in the kernel's words.
pub fn prepare() -> Result<Vec<String>, String> {
    let global = state::get().map_err(|_| "the settings of the software plugin are wrong".to_owned())?;
    global.refresh();
    let (mut usable, mut names, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    for dev in 0..global.devices.len() {
        let Some(nic) = global.devices.get(dev) else { continue };
        match global.areas.of(nic, global.device.as_deref(), &global.config) {
            Ok(_) => {
                usable.push(dev);
                names.push(nic.name.to_string_lossy().into_owned());
            }
            Err(why) => missing.push(why),
        }
    }
    if names.is_empty() {
        return Err(if missing.is_empty() { "there is no NIC".to_owned() } else { missing.join("; ") });
    }
    *global.areas.usable.lock() = usable;
    Ok(names)
}

/// Exports an area of the current GPU, as [`prepare`] does for each NIC, and has the GPU write and read it. Binds no queue.
///
/// # Errors
/// What is missing, or what came out wrong.
pub fn try_export() -> Result<(), String> {
    let global = state::get().map_err(|_| "the settings of the software plugin are wrong".to_owned())?;
    let Some(device) = global.device.as_deref() else { return Err("there is no GPU".to_owned()) };
    crate::devmem::try_export(device, global.config.devmem_bytes, crate::devmem::limit(&global.config))
}

/// The number that the software plugin has for a device of this table.
fn device(global: &Global, dev: c_int) -> Result<c_int, ncclResult_t> {
    let dev = usize::try_from(dev).map_err(|_| NCCL_INVALID_ARGUMENT)?;
    let found = global.areas.usable.lock().get(dev).copied().ok_or(NCCL_INVALID_ARGUMENT)?;
    Ok(found as c_int)
}

/// A device and the area of the current GPU on it.
fn area(global: &'static Global, dev: c_int) -> Result<(&'static Interface, Arc<Area>), ncclResult_t> {
    let nic = interface(global, device(global, dev)?)?;
    // Areas log what they lack.
    let area = global.areas.of(nic, global.device.as_deref(), &global.config).map_err(|_| NCCL_SYSTEM_ERROR)?;
    Ok((nic, area))
}

pub unsafe extern "C" fn init(logger: ncclDebugLogger_t) -> ncclResult_t {
    guard(|| {
        crate::logger::set(logger);
        prepare().map(drop).map_err(|_| NCCL_SYSTEM_ERROR)
    })
}

pub unsafe extern "C" fn devices(count: *mut c_int) -> ncclResult_t {
    guard(|| {
        check(!count.is_null())?;
        // SAFETY: not null; the caller's int.
        unsafe { *count = state::get()?.areas.usable.lock().len() as c_int };
        Ok(())
    })
}

fn of_devices(dev: c_int) -> Result<ncclNetProperties_v8, ncclResult_t> {
    let found = properties(device(state::get()?, dev)?)?;
    Ok(ncclNetProperties_v8 { ptrSupport: NCCL_PTR_CUDA, netDeviceType: NCCL_NET_DEVICE_UNPACK, ..found })
}

pub unsafe extern "C" fn properties_v7(dev: c_int, props: *mut ncclNetProperties_v7) -> ncclResult_t {
    guard(|| {
        check(!props.is_null())?;
        // SAFETY: not null; the caller's struct.
        unsafe { *props = of_devices(dev)?.into() };
        Ok(())
    })
}

pub unsafe extern "C" fn listen(dev: c_int, handle: Opaque, listen_comm: *mut Opaque) -> ncclResult_t {
    guard(|| {
        check(!handle.is_null() && !listen_comm.is_null())?;
        let global = state::get()?;
        let (nic, area) = area(global, dev)?;
        // SAFETY: the caller's 128 bytes.
        let handle = unsafe { &mut *handle.cast::<Handle>() };
        let listener = ListenComm::open(nic, &global.config, handle, Some(area)).map_err(failed)?;
        // SAFETY: not null; the caller's pointer.
        unsafe { *listen_comm = Box::into_raw(Box::new(listener)).cast() };
        Ok(())
    })
}

pub unsafe extern "C" fn connect(
    dev: c_int,
    handle: Opaque,
    send_comm: *mut Opaque,
    _dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t {
    guard(|| {
        let (nic, area) = area(state::get()?, dev)?;
        // SAFETY: the caller's buffers.
        match unsafe { dial(nic, handle, send_comm, Direction::Forth, Some(&area)) }? {
            // SAFETY: as above.
            Some((global, pool, connected)) => unsafe { start_send(global, pool, connected, send_comm) },
            None => Ok(()),
        }
    })
}

pub unsafe extern "C" fn connect_recv(
    dev: c_int,
    handle: Opaque,
    recv_comm: *mut Opaque,
    dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t {
    guard(|| {
        let (nic, area) = area(state::get()?, dev)?;
        // SAFETY: the caller's buffers.
        let target = unsafe { device_handle(state::get()?, dev_handle) }?;
        // SAFETY: as above.
        match unsafe { dial(nic, handle, recv_comm, Direction::Back, Some(&area)) }? {
            // SAFETY: as above.
            Some((global, pool, connected)) => unsafe { start_recv(global, pool, connected, target, recv_comm) },
            None => Ok(()),
        }
    })
}

pub unsafe extern "C" fn ready(dev: c_int) -> ncclResult_t {
    guard(|| {
        let (nic, _) = area(state::get()?, dev)?;
        rendezvous::ready(nic).map_err(failed)
    })
}
