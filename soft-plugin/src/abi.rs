//! The C entries for devices, comms and registrations, behind one panic guard and null checks; `requests` has the
//! entries for requests. Translates to calls on the inner modules and back to result codes; decides nothing about moving bytes.

pub mod device_memory;
pub mod requests;

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::os::fd::AsFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;
use std::sync::Arc;

use devmem::Binding;
use nccl_net_abi::*;

use crate::comm::Comm;
use crate::device;
use crate::devmem::Area;
use crate::interfaces::Interface;
use crate::logger::Limited;
use crate::pool::{self, Pool};
use crate::protect::{self, Guard};
use crate::rendezvous::{self, Connected, Direction, Failed, Handle, ListenComm};
use crate::state::{self, Global};

type Opaque = *mut c_void;
type Outcome = Result<(), ncclResult_t>;

/// A registration: the kind of memory, and its address.
struct Mr {
    device: bool,
    base: usize,
    size: usize,
    /// What the NIC sends from: a dma-buf over whole pages, and where it begins.
    sends: Option<(Binding, usize)>,
}

thread_local! {
    /// `errno` of the system call that failed last in an entry of this thread.
    static CAUSE: Cell<c_int> = const { Cell::new(0) };
}

/// Runs an entry: catches panics, and sets `errno` after a system error.
fn guard(entry: impl FnOnce() -> Outcome) -> ncclResult_t {
    CAUSE.set(0);
    let code = match catch_unwind(AssertUnwindSafe(entry)) {
        Ok(Ok(())) => NCCL_SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => NCCL_INTERNAL_ERROR,
    };
    if code == NCCL_SYSTEM_ERROR {
        // SAFETY: the C library's errno of this thread. Set last, since dropping the entry's values may change it.
        unsafe { *libc::__errno_location() = CAUSE.get() };
    }
    code
}

fn check(holds: bool) -> Outcome {
    if holds {
        Ok(())
    } else {
        Err(NCCL_INVALID_ARGUMENT)
    }
}

/// Logs the cause of a failed system call. The only place that does.
fn system(what: &str, error: &std::io::Error) -> ncclResult_t {
    static LINE: Limited = Limited::new();
    static DESCRIPTORS: Limited = Limited::new();
    let code = error.raw_os_error().unwrap_or(0);
    CAUSE.set(code);
    match code {
        libc::EMFILE => DESCRIPTORS.warn(&format!("{what}: the process is out of file descriptors (see ulimit -n)")),
        libc::ENFILE => DESCRIPTORS.warn(&format!("{what}: the system is out of file descriptors (see fs.file-max)")),
        _ => LINE.warn(&format!("{what}: {error}")),
    }
    if code == 0 && error.kind() == std::io::ErrorKind::InvalidInput {
        NCCL_INVALID_ARGUMENT
    } else {
        NCCL_SYSTEM_ERROR
    }
}

fn failed(failed: Failed) -> ncclResult_t {
    system(&failed.what, &failed.error)
}

fn interface(global: &'static Global, dev: c_int) -> Result<&'static Interface, ncclResult_t> {
    usize::try_from(dev).ok().and_then(|d| global.devices.get(d)).ok_or(NCCL_INVALID_ARGUMENT)
}

/// The comm behind the caller's handle, if it has this direction. It may belong to the parent process.
///
/// # Safety
/// `handle` is null, or a comm of this plugin that is not closed.
unsafe fn comm_or_copy<'a>(handle: Opaque, receives: bool) -> Result<&'a Comm, ncclResult_t> {
    check(!handle.is_null())?;
    // SAFETY: by contract a live comm.
    let comm = unsafe { &*handle.cast::<Comm>() };
    check(comm.is(receives))?;
    Ok(comm)
}

/// A comm of this process; safety as for [`comm_or_copy`].
unsafe fn comm<'a>(handle: Opaque, receives: bool) -> Result<&'a Comm, ncclResult_t> {
    // SAFETY: passed on.
    let comm = unsafe { comm_or_copy(handle, receives)? };
    own(!comm.is_inherited())?;
    Ok(comm)
}

/// A comm of either direction; safety as for [`comm_or_copy`].
unsafe fn any_comm<'a>(handle: Opaque) -> Result<&'a Comm, ncclResult_t> {
    // SAFETY: passed on.
    let comm = unsafe { comm_or_copy(handle, false).or_else(|_| comm_or_copy(handle, true))? };
    own(!comm.is_inherited())?;
    Ok(comm)
}

/// Refuses objects that the parent process made before a `fork`.
fn own(holds: bool) -> Outcome {
    if holds {
        Ok(())
    } else {
        Err(NCCL_INVALID_USAGE)
    }
}

pub unsafe extern "C" fn init(logger: ncclDebugLogger_t) -> ncclResult_t {
    guard(|| {
        crate::logger::set(logger);
        state::get().map(drop)
    })
}

pub unsafe extern "C" fn devices(count: *mut c_int) -> ncclResult_t {
    guard(|| {
        check(!count.is_null())?;
        let global = state::get()?;
        global.refresh();
        // SAFETY: not null; the caller's int.
        unsafe { *count = global.devices.len() as c_int };
        Ok(())
    })
}

fn properties(dev: c_int) -> Result<ncclNetProperties_v8, ncclResult_t> {
    let global = state::get()?;
    let interface = interface(global, dev)?;
    let unpack = global.device.is_some();
    Ok(ncclNetProperties_v8 {
        name: interface.name.as_ptr().cast_mut(),
        pciPath: interface.pci_path.as_ref().map_or(ptr::null_mut(), |p| p.as_ptr().cast_mut()),
        guid: interface.guid,
        ptrSupport: NCCL_PTR_HOST | if unpack { NCCL_PTR_CUDA } else { 0 },
        regIsGlobal: 0,
        speed: interface.speed,
        port: 1,
        latency: 0.0,
        maxComms: 65536,
        maxRecvs: 1,
        netDeviceType: if unpack { NCCL_NET_DEVICE_UNPACK } else { NCCL_NET_DEVICE_HOST },
        netDeviceVersion: NCCL_NET_DEVICE_UNPACK_VERSION,
    })
}

pub unsafe extern "C" fn properties_v7(dev: c_int, props: *mut ncclNetProperties_v7) -> ncclResult_t {
    guard(|| {
        check(!props.is_null())?;
        // SAFETY: not null; the caller's struct.
        unsafe { *props = properties(dev)?.into() };
        Ok(())
    })
}

pub unsafe extern "C" fn properties_v8(dev: c_int, props: *mut ncclNetProperties_v8) -> ncclResult_t {
    guard(|| {
        check(!props.is_null())?;
        // SAFETY: not null; the caller's struct.
        unsafe { *props = properties(dev)? };
        Ok(())
    })
}

pub unsafe extern "C" fn listen(dev: c_int, handle: Opaque, listen_comm: *mut Opaque) -> ncclResult_t {
    guard(|| {
        check(!handle.is_null() && !listen_comm.is_null())?;
        let global = state::get()?;
        let interface = interface(global, dev)?;
        // SAFETY: the caller's 128 bytes.
        let handle = unsafe { &mut *handle.cast::<Handle>() };
        let listener = ListenComm::open(interface, &global.config, handle, None).map_err(failed)?;
        // SAFETY: not null; the caller's pointer.
        unsafe { *listen_comm = Box::into_raw(Box::new(listener)).cast() };
        Ok(())
    })
}

/// The I/O threads, started on first use, with their chores.
fn pool(global: &'static Global) -> Result<&'static Pool, ncclResult_t> {
    pool::get(&global.config, rendezvous::sweep).map_err(|e| system("I/O threads", &e))
}

/// One step of a connect in either direction; the socket once it is connected.
///
/// # Safety
/// `handle` is null or the caller's 128 bytes, `comm` null or writable.
unsafe fn dial(
    interface: &Interface,
    handle: Opaque,
    comm: *mut Opaque,
    direction: Direction,
    area: Option<&Arc<Area>>,
) -> Result<Option<(&'static Global, &'static Pool, Connected)>, ncclResult_t> {
    check(!handle.is_null() && !comm.is_null())?;
    // SAFETY: not null; the caller's pointer.
    unsafe { *comm = ptr::null_mut() };
    let global = state::get()?;
    // SAFETY: the caller's 128 bytes.
    let handle = unsafe { &mut *handle.cast::<Handle>() };
    let pool = pool(global)?;
    let connected = rendezvous::connect(interface, &global.config, pool, handle, direction, area).map_err(failed)?;
    Ok(connected.map(|connected| (global, pool, connected)))
}

pub unsafe extern "C" fn connect(
    dev: c_int,
    handle: Opaque,
    send_comm: *mut Opaque,
    _dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t {
    guard(|| {
        let interface = interface(state::get()?, dev)?;
        // SAFETY: the caller's buffers.
        match unsafe { dial(interface, handle, send_comm, Direction::Forth, None) }? {
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
        // SAFETY: the caller's buffers.
        let target = unsafe { device_handle(state::get()?, dev_handle) }?;
        let interface = interface(state::get()?, dev)?;
        // SAFETY: as above.
        match unsafe { dial(interface, handle, recv_comm, Direction::Back, None) }? {
            // SAFETY: as above.
            Some((global, pool, connected)) => unsafe { start_recv(global, pool, connected, target, recv_comm) },
            None => Ok(()),
        }
    })
}

/// Makes a send comm from a socket.
///
/// # Safety
/// `comm` is writable.
unsafe fn start_send(global: &'static Global, pool: &Pool, connected: Connected, comm: *mut Opaque) -> Outcome {
    let started = Comm::start(global, pool, connected, None, ptr::null_mut(), false).map_err(|e| system("send comm", &e))?;
    // SAFETY: by contract.
    unsafe { *comm = Arc::into_raw(started).cast_mut().cast() };
    Ok(())
}

/// The caller's memory for a device handle; strict mode requires it.
///
/// # Safety
/// `dev_handle` is null, or points to null or to a writable device handle.
unsafe fn device_handle<'a>(
    global: &Global,
    dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> Result<Option<&'a mut ncclNetDeviceHandle_v7>, ncclResult_t> {
    // SAFETY: by contract.
    let target = unsafe { dev_handle.as_ref().and_then(|p| p.as_mut()) };
    check(target.is_some() || global.device.is_none() || !global.config.strict)?;
    Ok(target)
}

/// Makes a receive comm from a socket. The unpack queue is built when device memory is first used: host memory needs none.
///
/// # Safety
/// `comm` is writable; the device handle keeps its address as long as the comm lives.
unsafe fn start_recv(
    global: &'static Global,
    pool: &Pool,
    connected: Connected,
    target: Option<&mut ncclNetDeviceHandle_v7>,
    comm: *mut Opaque,
) -> Outcome {
    let mut late_handle = ptr::null_mut();
    if let Some(target) = target {
        *target = device::handle(global.device.is_some(), None);
        if global.device.is_some() {
            late_handle = target;
        }
    }
    let started = Comm::start(global, pool, connected, None, late_handle, true).map_err(|e| system("receive comm", &e))?;
    // SAFETY: by contract.
    unsafe { *comm = Arc::into_raw(started).cast_mut().cast() };
    Ok(())
}

/// One step of an accept in either direction; the socket once the peer has connected.
///
/// # Safety
/// `listen_comm` is null or a listen comm that is not closed, `comm` null or writable.
unsafe fn answer(
    listen_comm: Opaque,
    comm: *mut Opaque,
    direction: Direction,
) -> Result<Option<(&'static Global, &'static Pool, Connected)>, ncclResult_t> {
    check(!listen_comm.is_null() && !comm.is_null())?;
    // SAFETY: not null; the caller's pointer.
    unsafe { *comm = ptr::null_mut() };
    let global = state::get()?;
    // SAFETY: by contract a listen comm that is not closed.
    let listening = unsafe { &*listen_comm.cast::<ListenComm>() };
    own(!listening.is_inherited())?;
    if listening.is_used(direction) {
        return Err(NCCL_INVALID_USAGE);
    }
    let pool = pool(global)?;
    let connected = listening.accept(direction).map_err(failed)?;
    Ok(connected.map(|connected| (global, pool, connected)))
}

pub unsafe extern "C" fn accept(
    listen_comm: Opaque,
    recv_comm: *mut Opaque,
    dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t {
    guard(|| {
        check(!listen_comm.is_null() && !recv_comm.is_null())?;
        // SAFETY: null, or the caller's pointer to memory of its own.
        let target = unsafe { device_handle(state::get()?, dev_handle) }?;
        // SAFETY: the caller's listen comm and pointer.
        match unsafe { answer(listen_comm, recv_comm, Direction::Forth) }? {
            // SAFETY: as above.
            Some((global, pool, connected)) => unsafe { start_recv(global, pool, connected, target, recv_comm) },
            None => Ok(()),
        }
    })
}

pub unsafe extern "C" fn accept_send(listen_comm: Opaque, send_comm: *mut Opaque) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's listen comm and pointer.
        match unsafe { answer(listen_comm, send_comm, Direction::Back) }? {
            // SAFETY: as above.
            Some((global, pool, connected)) => unsafe { start_send(global, pool, connected, send_comm) },
            None => Ok(()),
        }
    })
}

pub unsafe extern "C" fn listen_both(listen_comm: Opaque, key: *const u8) -> ncclResult_t {
    guard(|| {
        check(!listen_comm.is_null())?;
        // SAFETY: the caller's listen comm and key.
        let (listening, key) = unsafe { (&*listen_comm.cast::<ListenComm>(), key_at(key)) };
        own(!listening.is_inherited())?;
        listening.expect_back(key).then_some(()).ok_or(NCCL_INVALID_USAGE)
    })
}

pub unsafe extern "C" fn ready(dev: c_int) -> ncclResult_t {
    guard(|| {
        let interface = interface(state::get()?, dev)?;
        rendezvous::ready(interface).map_err(failed)
    })
}

pub unsafe extern "C" fn flow(handle: Opaque, flow: *mut ucclFlow) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { comm(handle, false)? };
        check(!flow.is_null())?;
        // SAFETY: not null; the caller's structure begins with its size.
        check(unsafe { (*flow).size } >= size_of::<ucclFlow>())?;
        // SAFETY: as above, and large enough.
        unsafe { *flow = comm.flow()? };
        Ok(())
    })
}

pub unsafe extern "C" fn pace(handle: Opaque, bytes_a_second: u64) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { comm(handle, false)? };
        check(bytes_a_second > 0)?;
        comm.pace(bytes_a_second)
    })
}

pub unsafe extern "C" fn reg_mr_v7(comm: Opaque, data: Opaque, size: c_int, kind: c_int, mhandle: *mut Opaque) -> ncclResult_t {
    match usize::try_from(size) {
        // SAFETY: passed on.
        Ok(size) => unsafe { reg_mr_v8(comm, data, size, kind, mhandle) },
        Err(_) => NCCL_INVALID_ARGUMENT,
    }
}

pub unsafe extern "C" fn reg_mr_v8(comm: Opaque, data: Opaque, size: usize, kind: c_int, mhandle: *mut Opaque) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { any_comm(comm)? };
        check(!data.is_null() && size > 0 && !mhandle.is_null())?;
        let base = data as usize;
        let mut sends = None;
        let device = match kind {
            NCCL_PTR_HOST => {
                check(!comm.ledger.devices())?;
                false
            }
            NCCL_PTR_CUDA => {
                check(comm.global.device.is_some())?;
                check(!comm.global.config.strict || (base % PAGE == 0 && size % PAGE == 0))?;
                comm.expect_device_receives()?;
                comm.expect_device_sends()?;
                sends = comm.sends_by().map(|nic| bind_sends(comm, nic, base, size)).transpose()?;
                true
            }
            _ => return Err(NCCL_INVALID_ARGUMENT),
        };
        // SAFETY: not null; the caller's pointer.
        unsafe { *mhandle = Box::into_raw(Box::new(Mr { device, base, size, sends })).cast() };
        Ok(())
    })
}

/// Lets a NIC send from device memory.
fn bind_sends(comm: &Comm, nic: u32, base: usize, size: usize) -> Result<(Binding, usize), ncclResult_t> {
    let device = comm.global.device.as_ref().ok_or(NCCL_INVALID_ARGUMENT)?;
    let begin = base / PAGE * PAGE;
    let len = (base + size).next_multiple_of(PAGE) - begin;
    let dmabuf = device.export(begin, len).map_err(|e| system("a dma-buf over device memory", &e))?;
    let binding = Binding::sending(nic, dmabuf.as_fd())
        .map_err(|refused| system(&format!("sending from device memory: {refused}"), &refused.error))?;
    Ok((binding, begin))
}

pub unsafe extern "C" fn dereg_mr(comm: Opaque, mhandle: Opaque) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm. A registration is plain memory: a child may drop its copy.
        unsafe { comm_or_copy(comm, false).or_else(|_| comm_or_copy(comm, true))? };
        check(!mhandle.is_null())?;
        // SAFETY: a registration of regMr, dropped once.
        drop(unsafe { Box::from_raw(mhandle.cast::<Mr>()) });
        Ok(())
    })
}

unsafe fn close(handle: Opaque, receives: bool) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { comm_or_copy(handle, receives)? };
        if comm.is_inherited() {
            comm.close_copy();
            return Ok(());
        }
        let over = comm.close();
        // SAFETY: the reference that `connect` or `accept` gave to the caller, returned once.
        drop(unsafe { Arc::from_raw(handle.cast_const().cast::<Comm>()) });
        // The NIC may go on reading memory.
        over.then_some(()).ok_or(NCCL_SYSTEM_ERROR)
    })
}

pub unsafe extern "C" fn close_send(comm: Opaque) -> ncclResult_t {
    // SAFETY: passed on.
    unsafe { close(comm, false) }
}

pub unsafe extern "C" fn close_recv(comm: Opaque) -> ncclResult_t {
    // SAFETY: passed on.
    unsafe { close(comm, true) }
}

pub unsafe extern "C" fn close_listen(listen_comm: Opaque) -> ncclResult_t {
    guard(|| {
        check(!listen_comm.is_null())?;
        // SAFETY: the box that `listen` gave to the caller.
        let listening = unsafe { &*listen_comm.cast::<ListenComm>() };
        if listening.is_inherited() {
            listening.close_copy();
            return Ok(());
        }
        // SAFETY: as above; the caller returns it once.
        drop(unsafe { Box::from_raw(listen_comm.cast::<ListenComm>()) });
        Ok(())
    })
}

pub unsafe extern "C" fn get_device_mr(comm: Opaque, mhandle: Opaque, device_mhandle: *mut Opaque) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        unsafe { any_comm(comm)? };
        check(!mhandle.is_null() && !device_mhandle.is_null())?;
        // Kernels do not use registrations.
        // SAFETY: not null; the caller's pointer.
        unsafe { *device_mhandle = ptr::null_mut() };
        Ok(())
    })
}

pub unsafe extern "C" fn progress(handle: Opaque, bytes: *mut u64) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { any_comm(handle)? };
        check(!bytes.is_null())?;
        // SAFETY: not null; the caller's number.
        unsafe { *bytes = comm.progress()? };
        Ok(())
    })
}

pub unsafe extern "C" fn abandon_connect(handle: Opaque) -> ncclResult_t {
    guard(|| {
        check(!handle.is_null())?;
        // SAFETY: the caller's 128 bytes.
        rendezvous::abandon(unsafe { &*handle.cast::<Handle>() });
        Ok(())
    })
}

pub unsafe extern "C" fn describe(handle: Opaque, text: *mut c_char, len: usize) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { any_comm(handle)? };
        check(!text.is_null() && len > 0)?;
        let described = comm.describe();
        let path = &described.as_bytes()[..described.len().min(len - 1)];
        // SAFETY: the caller's `len` bytes; one is left for the NUL.
        unsafe {
            ptr::copy_nonoverlapping(path.as_ptr(), text.cast::<u8>(), path.len());
            *text.add(path.len()) = 0;
        }
        Ok(())
    })
}

pub unsafe extern "C" fn info(handle: Opaque, info: *mut ucclCommInfo) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { any_comm(handle)? };
        check(!info.is_null())?;
        // SAFETY: not null; the caller's structure begins with its size.
        check(unsafe { (*info).size } >= size_of::<ucclCommInfo>())?;
        // SAFETY: as above, and large enough.
        unsafe { *info = comm.info()? };
        Ok(())
    })
}

/// The 32 bytes at `key`; `None` for null.
///
/// # Safety
/// `key` is null or readable, and stays so while the result is used.
unsafe fn key_at<'a>(key: *const u8) -> Option<&'a protect::Key> {
    // SAFETY: by contract; bytes have no alignment.
    unsafe { key.cast::<protect::Key>().as_ref() }
}

pub unsafe extern "C" fn key_listen(listen_comm: Opaque, key: *const u8) -> ncclResult_t {
    guard(|| {
        check(!listen_comm.is_null())?;
        // SAFETY: the caller's listen comm and key.
        let (listening, key) = unsafe { (&*listen_comm.cast::<ListenComm>(), key_at(key)) };
        own(!listening.is_inherited())?;
        listening.expect_key(key.ok_or(NCCL_INVALID_ARGUMENT)?).then_some(()).ok_or(NCCL_INVALID_USAGE)
    })
}

pub unsafe extern "C" fn key_connect(handle: Opaque, key: *const u8) -> ncclResult_t {
    guard(|| {
        check(!handle.is_null())?;
        // SAFETY: the caller's 128 bytes, and its key.
        let (handle, key) = unsafe { (&mut *handle.cast::<Handle>(), key_at(key)) };
        rendezvous::set_key(handle, key.ok_or(NCCL_INVALID_ARGUMENT)?);
        Ok(())
    })
}

pub unsafe extern "C" fn protect(handle: Opaque, level: c_int, key: *const u8) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm and key.
        let (comm, key) = unsafe { (any_comm(handle)?, key_at(key)) };
        comm.protect(Guard::new(level, key).ok_or(NCCL_INVALID_ARGUMENT)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        assert_eq!(guard(|| panic!("on purpose")), NCCL_INTERNAL_ERROR);
    }
}
