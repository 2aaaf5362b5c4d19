//! The C entries: they pass their arguments to the other modules, which check them.

use crate::comm::{live, request, Comm};
use crate::gpu;
use crate::logger::{self, warn};
use crate::memory;
use crate::rules::{refused, settings, violation, SetupCall};
use crate::setup::{self, ListenComm};
use nccl_net_abi::*;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

type Opaque = *mut c_void;

fn code(result: Result<(), ncclResult_t>) -> ncclResult_t {
    result.err().unwrap_or(NCCL_SUCCESS)
}

/// Writes a request, or returns the error code.
unsafe fn give(out: *mut Opaque, result: Result<Opaque, ncclResult_t>) -> ncclResult_t {
    code(result.map(|request| {
        // SAFETY: the caller's pointer.
        unsafe { *out = request }
    }))
}

pub unsafe extern "C" fn init(logger: ncclDebugLogger_t) -> ncclResult_t {
    logger::set(logger);
    gpu::in_use("init");
    logger::log(NCCL_LOG_INFO, "initialised, devices", settings().devices.len() as i32);
    NCCL_SUCCESS
}

pub unsafe extern "C" fn devices(count: *mut c_int) -> ncclResult_t {
    // SAFETY: the caller's pointer.
    unsafe { *count = settings().devices.len() as c_int };
    NCCL_SUCCESS
}

pub unsafe extern "C" fn properties(dev: c_int, out: *mut ncclNetProperties_v7) -> ncclResult_t {
    let Some(device) = usize::try_from(dev).ok().and_then(|d| settings().devices.get(d)) else { return NCCL_INTERNAL_ERROR };
    let properties = ncclNetProperties_v7 {
        name: device.name.as_ptr().cast_mut(),
        pciPath: device.pci_path.as_ref().map_or(ptr::null_mut(), |p| p.as_ptr().cast_mut()),
        guid: dev as u64,
        ptrSupport: NCCL_PTR_HOST | NCCL_PTR_CUDA,
        speed: 100_000,
        port: 0,
        latency: 0.0,
        maxComms: 65536,
        maxRecvs: 1,
        netDeviceType: NCCL_NET_DEVICE_UNPACK,
        netDeviceVersion: NCCL_NET_DEVICE_UNPACK_VERSION,
    };
    // SAFETY: the caller's memory.
    unsafe { *out = properties };
    NCCL_SUCCESS
}

pub unsafe extern "C" fn listen(dev: c_int, handle: Opaque, out: *mut Opaque) -> ncclResult_t {
    let _call = SetupCall::enter("listen");
    gpu::in_use("listen");
    // SAFETY: the caller's 128 bytes.
    let handle = unsafe { &mut *handle.cast::<[u8; NCCL_NET_HANDLE_MAXSIZE]>() };
    let Some(comm) = usize::try_from(dev).ok().and_then(|dev| ListenComm::new(dev, handle)) else { return NCCL_SYSTEM_ERROR };
    // SAFETY: the caller's pointer.
    unsafe { *out = Box::into_raw(Box::new(comm)).cast() };
    NCCL_SUCCESS
}

pub unsafe extern "C" fn connect(
    dev: c_int,
    handle: Opaque,
    out: *mut Opaque,
    _: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t {
    let _call = SetupCall::enter("connect");
    gpu::in_use("connect");
    // SAFETY: the caller's pointers.
    let handle = unsafe {
        *out = ptr::null_mut();
        &mut *handle.cast::<[u8; NCCL_NET_HANDLE_MAXSIZE]>()
    };
    match setup::connect(dev as usize, handle) {
        Ok(None) => NCCL_SUCCESS,
        Ok(Some(sockets)) => {
            // SAFETY: as above.
            unsafe { *out = Comm::send(dev as usize, sockets).cast() };
            NCCL_SUCCESS
        }
        Err(cause) => {
            warn(&format!("connect failed: {cause}"), dev);
            NCCL_INTERNAL_ERROR
        }
    }
}

pub unsafe extern "C" fn accept(listen: Opaque, out: *mut Opaque, dev_handle: *mut *mut ncclNetDeviceHandle_v7) -> ncclResult_t {
    let _call = SetupCall::enter("accept");
    // SAFETY: the caller's listen comm and pointer.
    let comm = unsafe {
        *out = ptr::null_mut();
        &mut *listen.cast::<ListenComm>()
    };
    let sockets = match comm.accept() {
        Ok(None) => return NCCL_SUCCESS,
        Ok(Some(sockets)) => sockets,
        Err(cause) => {
            warn(&format!("accept failed: {cause}"), comm.dev as c_int);
            return NCCL_INTERNAL_ERROR;
        }
    };
    // SAFETY: null, or the caller's pointer to memory of its own.
    let target = unsafe { dev_handle.as_ref().and_then(|p| p.as_mut()) };
    let (recv, handle) = Comm::recv(comm.dev, sockets, target.is_some());
    if let Some(target) = target {
        *target = ncclNetDeviceHandle_v7 {
            netDeviceType: NCCL_NET_DEVICE_UNPACK,
            netDeviceVersion: NCCL_NET_DEVICE_UNPACK_VERSION,
            handle: handle.cast(),
            size: size_of::<unpackNetDeviceHandle>(),
            needsProxyProgress: 1,
        };
    }
    // SAFETY: as above.
    unsafe { *out = recv.cast() };
    NCCL_SUCCESS
}

pub unsafe extern "C" fn reg_mr(comm: Opaque, data: Opaque, size: c_int, kind: c_int, out: *mut Opaque) -> ncclResult_t {
    let _call = SetupCall::enter("regMr");
    let comm = live("regMr", comm);
    let Ok(size) = usize::try_from(size) else { violation!("regMr of {size} bytes") };
    let device = match kind {
        NCCL_PTR_CUDA => true,
        NCCL_PTR_HOST => false,
        other => violation!("regMr of memory of kind {other}"),
    };
    match memory::register(comm.dev, data as usize, size, device) {
        Some(id) => {
            // SAFETY: the caller's pointer.
            unsafe { *out = id as Opaque };
            NCCL_SUCCESS
        }
        None => NCCL_SYSTEM_ERROR,
    }
}

pub unsafe extern "C" fn dereg_mr(comm: Opaque, mhandle: Opaque) -> ncclResult_t {
    let _call = SetupCall::enter("deregMr");
    live("deregMr", comm);
    memory::deregister(mhandle as usize);
    NCCL_SUCCESS
}

pub unsafe extern "C" fn isend(
    comm: Opaque,
    data: Opaque,
    size: c_int,
    _tag: c_int,
    mhandle: Opaque,
    out: *mut Opaque,
) -> ncclResult_t {
    let result = live("isend", comm).isend(data as usize, size.max(0) as usize, mhandle as usize);
    // SAFETY: passed on.
    unsafe { give(out, result) }
}

pub unsafe extern "C" fn irecv(
    comm: Opaque,
    n: c_int,
    _data: *mut Opaque,
    sizes: *mut c_int,
    _tags: *mut c_int,
    mhandles: *mut Opaque,
    out: *mut Opaque,
) -> ncclResult_t {
    if n != 1 {
        return refused!("irecv of {n} messages");
    }
    // SAFETY: arrays of one.
    let (size, mhandle) = unsafe { (*sizes, *mhandles) };
    let result = live("irecv", comm).irecv(size.max(0) as usize, mhandle as usize);
    // SAFETY: passed on.
    unsafe { give(out, result) }
}

pub unsafe extern "C" fn test(request_: Opaque, done: *mut c_int, _size: *mut c_int) -> ncclResult_t {
    let (comm, index) = request("test", request_);
    code(comm.test(index).map(|finished| {
        // SAFETY: the caller's pointer. The size is not reported.
        unsafe { *done = c_int::from(finished) }
    }))
}

pub unsafe extern "C" fn consumed(comm: Opaque, n: c_int, request_: Opaque) -> ncclResult_t {
    let (owner, index) = request("irecvConsumed", request_);
    if n != 1 || !ptr::eq(owner, live("irecvConsumed", comm)) {
        return refused!("irecvConsumed of {n} requests, or of another comm's");
    }
    code(owner.consumed(index))
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
    unsafe { Comm::close(comm) };
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
    comm.check_close();
    NCCL_SUCCESS
}
