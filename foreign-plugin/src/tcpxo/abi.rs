//! The C entries: they pass their arguments to the other modules, which check them.

use super::comm::{self, live, Comm};
use super::setup::{self, ListenComm};
use super::{late, memory};
use crate::gpu;
use crate::logger::{self, warn};
use crate::manager;
use crate::rules::{settings, violation, SetupCall};
use nccl_net_abi::*;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

type Opaque = *mut c_void;

pub unsafe extern "C" fn init(logger: ncclDebugLogger_t) -> ncclResult_t {
    logger::set(logger);
    if settings().manager.missing {
        violation!("init without the receive manager: the plugin ends the process");
    }
    gpu::in_use("init");
    if let Err(fault) = manager::answer("init") {
        violation!("init: {fault}: the plugin ends the process");
    }
    logger::log(NCCL_LOG_INFO, "simulated FasTrak initialised, devices", settings().devices.len() as i32);
    NCCL_SUCCESS
}

pub unsafe extern "C" fn properties(dev: c_int, out: *mut ncclNetProperties_v7) -> ncclResult_t {
    gpu::in_use("getProperties");
    // SAFETY: passed on.
    let result = unsafe { crate::abi::properties(dev, out) };
    if result == NCCL_SUCCESS {
        // SAFETY: the caller's memory, filled above.
        unsafe { (*out).netDeviceType = NCCL_NET_DEVICE_HOST };
    }
    result
}

pub unsafe extern "C" fn listen(dev: c_int, handle: Opaque, out: *mut Opaque) -> ncclResult_t {
    let _call = SetupCall::enter("listen");
    let gpu = gpu::in_use("listen");
    if let Err(fault) = manager::answer("listen") {
        warn(&format!("listen failed: {fault}"), dev);
        return NCCL_SYSTEM_ERROR;
    }
    // SAFETY: the caller's 128 bytes.
    let handle = unsafe { &mut *handle.cast::<[u8; NCCL_NET_HANDLE_MAXSIZE]>() };
    let listening = usize::try_from(dev).ok().and_then(|dev| ListenComm::new(dev, gpu, handle));
    let Some(comm) = listening else { return NCCL_SYSTEM_ERROR };
    // SAFETY: the caller's pointer.
    unsafe { *out = Box::into_raw(Box::new(comm)).cast() };
    NCCL_SUCCESS
}

/// A device handle that names no device memory.
fn fill(target: Option<&mut ncclNetDeviceHandle_v7>) {
    if let Some(target) = target {
        *target = ncclNetDeviceHandle_v7 {
            netDeviceType: NCCL_NET_DEVICE_HOST,
            netDeviceVersion: NCCL_NET_DEVICE_UNPACK_VERSION,
            handle: ptr::null_mut(),
            size: 0,
            needsProxyProgress: 0,
        };
    }
}

pub unsafe extern "C" fn connect(
    dev: c_int,
    handle: Opaque,
    out: *mut Opaque,
    dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t {
    let _call = SetupCall::enter("connect");
    let gpu = gpu::in_use("connect");
    if dev_handle.is_null() {
        violation!("connect with a null pointer for the device handle");
    }
    // SAFETY: the caller's pointers.
    let (handle, target) = unsafe {
        *out = ptr::null_mut();
        (&mut *handle.cast::<[u8; NCCL_NET_HANDLE_MAXSIZE]>(), (*dev_handle).as_mut())
    };
    match setup::connect(dev as usize, gpu, handle) {
        Ok(None) => NCCL_SUCCESS,
        Ok(Some(flows)) => {
            fill(target);
            // SAFETY: as above.
            unsafe { *out = Comm::send(dev as usize, gpu, flows).cast() };
            NCCL_SUCCESS
        }
        Err(cause) => {
            warn(&format!("connect failed: {cause}"), dev);
            NCCL_SYSTEM_ERROR
        }
    }
}

pub unsafe extern "C" fn accept(listen: Opaque, out: *mut Opaque, dev_handle: *mut *mut ncclNetDeviceHandle_v7) -> ncclResult_t {
    let _call = SetupCall::enter("accept");
    if dev_handle.is_null() {
        violation!("accept with a null pointer for the device handle");
    }
    // SAFETY: the caller's listen comm and pointers.
    let (comm, target) = unsafe {
        *out = ptr::null_mut();
        (&mut *listen.cast::<ListenComm>(), (*dev_handle).as_mut())
    };
    comm.gpu.into_iter().for_each(|gpu| gpu.must_be_current("accept"));
    match comm.accept() {
        Ok(None) => NCCL_SUCCESS,
        Ok(Some(flows)) => {
            fill(target);
            // SAFETY: as above.
            unsafe { *out = Comm::recv(comm.dev, comm.gpu, flows).cast() };
            NCCL_SUCCESS
        }
        Err(cause) => {
            warn(&format!("accept failed: {cause}"), comm.dev as c_int);
            NCCL_SYSTEM_ERROR
        }
    }
}

pub unsafe extern "C" fn reg_mr(comm: Opaque, data: Opaque, size: c_int, kind: c_int, out: *mut Opaque) -> ncclResult_t {
    let _call = SetupCall::enter("regMr");
    let comm = live("regMr", comm);
    let Ok(size) = usize::try_from(size) else { violation!("regMr of {size} bytes") };
    // Host memory is accepted, and no bytes of it are.
    let device = match kind {
        NCCL_PTR_CUDA => true,
        NCCL_PTR_HOST => false,
        other => violation!("regMr of memory of kind {other}"),
    };
    if let (true, Err(fault)) = (device, manager::answer("regMr")) {
        warn(&format!("regMr failed: {fault}"), comm.dev as c_int);
        return NCCL_INTERNAL_ERROR;
    }
    let id = memory::register(comm.dev, comm.gpu, data as usize, size, device);
    // SAFETY: the caller's pointer.
    unsafe { *out = id as Opaque };
    NCCL_SUCCESS
}

pub unsafe extern "C" fn dereg_mr(comm: Opaque, mhandle: Opaque) -> ncclResult_t {
    let _call = SetupCall::enter("deregMr");
    let dev = live("deregMr", comm).dev;
    let answer = if memory::is_device(mhandle as usize) { manager::answer("deregMr") } else { Ok(()) };
    memory::deregister(dev, mhandle as usize, answer.is_ok());
    match answer {
        Ok(()) => NCCL_SUCCESS,
        Err(fault) => {
            warn(&format!("deregMr failed: {fault}"), dev as c_int);
            NCCL_INTERNAL_ERROR
        }
    }
}

pub unsafe extern "C" fn isend(
    comm: Opaque,
    data: Opaque,
    size: c_int,
    tag: c_int,
    mhandle: Opaque,
    out: *mut Opaque,
) -> ncclResult_t {
    let comm = live("isend", comm);
    static SENDS: AtomicU64 = AtomicU64::new(0);
    if SENDS.fetch_add(1, Ordering::Relaxed) >= settings().sends {
        return NCCL_SYSTEM_ERROR;
    }
    let request = comm.post("isend", false, data as usize, size, tag, mhandle as usize);
    // SAFETY: the caller's pointer.
    unsafe { *out = request as Opaque };
    NCCL_SUCCESS
}

pub unsafe extern "C" fn irecv(
    comm: Opaque,
    n: c_int,
    data: *mut Opaque,
    sizes: *mut c_int,
    tags: *mut c_int,
    mhandles: *mut Opaque,
    out: *mut Opaque,
) -> ncclResult_t {
    if n != 1 {
        violation!("irecv of {n} messages");
    }
    // SAFETY: arrays of one.
    let (data, size, tag, mhandle) = unsafe { (*data, *sizes, *tags, *mhandles) };
    let request = live("irecv", comm).post("irecv", true, data as usize, size, tag, mhandle as usize);
    // SAFETY: the caller's pointer.
    unsafe { *out = request as Opaque };
    NCCL_SUCCESS
}

pub unsafe extern "C" fn iflush(
    comm: Opaque,
    _n: c_int,
    _data: *mut Opaque,
    _sizes: *mut c_int,
    _mhandles: *mut Opaque,
    out: *mut Opaque,
) -> ncclResult_t {
    live("iflush", comm);
    // SAFETY: the caller's pointer.
    if unsafe { !(*out).is_null() } {
        violation!("iflush leaves the request as it was, and it was not null");
    }
    NCCL_SUCCESS
}

pub unsafe extern "C" fn test(request: Opaque, done: *mut c_int, size: *mut c_int) -> ncclResult_t {
    let (finished, moved, code) = match comm::test(request as usize) {
        Ok(None) => (false, 0, NCCL_SUCCESS),
        Ok(Some(size)) => (true, size, NCCL_SUCCESS),
        // The request is leaked.
        Err(()) => (true, 0, NCCL_SYSTEM_ERROR),
    };
    // SAFETY: the caller's pointers; the second may be null.
    unsafe {
        *done = c_int::from(finished);
        size.as_mut().into_iter().for_each(|size| *size = moved as c_int);
    }
    code
}

unsafe fn close(call: &str, comm: Opaque, receives: bool) -> ncclResult_t {
    let _call = SetupCall::enter(call);
    if live(call, comm).receives != receives {
        violation!("{call} on a comm of the other direction");
    }
    static CLOSES: AtomicU64 = AtomicU64::new(0);
    if CLOSES.fetch_add(1, Ordering::Relaxed) >= settings().closes {
        return NCCL_SYSTEM_ERROR;
    }
    // SAFETY: live; the caller's last call on it.
    let unfinished = unsafe { Comm::close(comm) };
    unfinished.into_iter().for_each(late::go_on);
    NCCL_SUCCESS
}

pub unsafe extern "C" fn close_send(comm: Opaque) -> ncclResult_t {
    // SAFETY: passed on.
    unsafe { close("closeSend", comm, false) }
}

pub unsafe extern "C" fn close_recv(comm: Opaque) -> ncclResult_t {
    // SAFETY: passed on.
    unsafe { close("closeRecv", comm, true) }
}

pub unsafe extern "C" fn close_listen(comm: Opaque) -> ncclResult_t {
    let _call = SetupCall::enter("closeListen");
    // SAFETY: the box that `listen` gave.
    let comm = unsafe { Box::from_raw(comm.cast::<ListenComm>()) };
    comm.gpu.into_iter().for_each(|gpu| gpu.must_be_current("closeListen"));
    if comm.is_pending() {
        violation!("closeListen while an accept is pending: its comm is leaked, and never closed");
    }
    NCCL_SUCCESS
}
