//! The C entries for requests: posting, testing, consuming, and the doorbell that signals completion.
//! Checks arguments and lays out segments; the comm manages slots and counters.

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::iovec;
use nccl_net_abi::*;

use super::{any_comm, check, comm, guard, own, system, Mr, Opaque, Outcome};
use crate::comm::Comm;
use crate::ledger::Ledger;
use crate::slot::{Body, Header, Slot, HEADER};

/// Posts a request and writes its handle; null when no slot is free.
fn post(comm: &Comm, request: *mut Opaque, fill: impl FnOnce(u64, &mut Body) -> Result<(), ncclResult_t>) -> Outcome {
    let slot = comm.post(fill)?;
    // SAFETY: every caller has checked that the pointer is not null.
    unsafe { *request = slot.map_or(ptr::null_mut(), Slot::as_request) };
    Ok(())
}

fn message_len(comm: &Comm, size: usize) -> Outcome {
    let limit = match comm.ledger.devices() {
        true => crate::devmem::limit(&comm.global.config),
        false => comm.global.config.message_limit,
    };
    check(size > 0 && size <= limit)
}

/// Whether memory that is registered like this can be moved by a comm: one for device memory moves no other, and sends by a binding of its
/// own NIC, which it gave the registration.
fn suits(comm: &Ledger, mr: &Mr) -> bool {
    match comm.devices() {
        true => mr.device && (comm.receives() || mr.sends.is_some()),
        false => mr.sends.is_none(),
    }
}

/// Lays out a send: the header, then the segments.
fn fill_send(header: Header, body: &mut Body, device: bool, segments: impl Iterator<Item = iovec>) {
    body.header = header.bytes();
    body.total = HEADER + header.len;
    body.device = device;
    body.iov.clear();
    body.iov.push(iovec { iov_base: body.header.as_mut_ptr().cast(), iov_len: HEADER });
    body.iov.extend(segments);
}

/// Lays out a receive of up to `size` bytes.
fn fill_recv(body: &mut Body, size: usize, tag: c_int, segments: impl Iterator<Item = iovec>) {
    body.total = size;
    body.tag = tag;
    (body.device, body.exact) = (false, false);
    body.iov.clear();
    body.iov.extend(segments);
}

pub unsafe extern "C" fn isend(
    send_comm: Opaque,
    data: Opaque,
    size: c_int,
    tag: c_int,
    mhandle: Opaque,
    request: *mut Opaque,
) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { comm(send_comm, false)? };
        check(!data.is_null() && !mhandle.is_null() && !request.is_null())?;
        let size = usize::try_from(size).map_err(|_| NCCL_INVALID_ARGUMENT)?;
        message_len(comm, size)?;
        // SAFETY: a registration of regMr that is not dropped.
        let mr = unsafe { &*mhandle.cast::<Mr>() };
        let offset = (data as usize).wrapping_sub(mr.base);
        check(!mr.device || (offset < mr.size && size <= mr.size - offset))?;
        check(suits(&comm.ledger, mr))?;
        post(comm, request, |seq, body| {
            if let Some((binding, begin)) = &mr.sends {
                fill_send(Header::new(size, seq, tag), body, true, std::iter::empty());
                (body.binding, body.offset) = (binding.id(), data as usize - begin);
                return Ok(());
            }
            let source = if mr.device {
                let slot = (seq % MAX_REQUESTS as u64) as usize;
                comm.send_source()?.begin(slot, data.cast(), size).map_err(|e| system("device send", &e))?
            } else {
                data.cast_const().cast()
            };
            let segment = iovec { iov_base: source.cast_mut().cast(), iov_len: size };
            fill_send(Header::new(size, seq, tag), body, mr.device, std::iter::once(segment));
            Ok(())
        })
    })
}

pub unsafe extern "C" fn irecv(
    recv_comm: Opaque,
    n: c_int,
    data: *mut Opaque,
    sizes: *mut c_int,
    tags: *mut c_int,
    mhandles: *mut Opaque,
    request: *mut Opaque,
) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { comm(recv_comm, true)? };
        check(n == 1 && !data.is_null() && !sizes.is_null() && !tags.is_null() && !mhandles.is_null() && !request.is_null())?;
        // SAFETY: arrays of one element, checked not to be null.
        let (data, size, tag, mhandle) = unsafe { (*data, *sizes, *tags, *mhandles) };
        check(!mhandle.is_null())?;
        // SAFETY: a registration of regMr that is not dropped.
        let mr = unsafe { &*mhandle.cast::<Mr>() };
        let size = usize::try_from(size).map_err(|_| NCCL_INVALID_ARGUMENT)?;
        message_len(comm, size)?;
        check(suits(&comm.ledger, mr))?;
        if mr.device {
            comm.prepare_unpack()?;
        } else {
            check(!data.is_null())?;
        }
        let segment = (!mr.device).then_some(iovec { iov_base: data, iov_len: size });
        post(comm, request, |_, body| {
            fill_recv(body, size, tag, segment.into_iter());
            body.device = mr.device;
            Ok(())
        })
    })
}

/// The non-empty segments of a vector, and their total length.
///
/// # Safety
/// `iov` points at `n` segments, or is null.
unsafe fn segments<'a>(n: c_int, iov: *const ucclIoVec) -> Result<(&'a [ucclIoVec], usize), ncclResult_t> {
    let n = usize::try_from(n).map_err(|_| NCCL_INVALID_ARGUMENT)?;
    check(n > 0 && !iov.is_null())?;
    // SAFETY: by contract.
    let iov = unsafe { std::slice::from_raw_parts(iov, n) };
    check(iov.iter().all(|s| s.len == 0 || !s.base.is_null()))?;
    let sum = iov.iter().try_fold(0usize, |sum, s| sum.checked_add(s.len)).ok_or(NCCL_INVALID_ARGUMENT)?;
    Ok((iov, sum))
}

fn host_segments(iov: &[ucclIoVec]) -> impl Iterator<Item = iovec> + '_ {
    iov.iter().filter(|s| s.len > 0).map(|s| iovec { iov_base: s.base, iov_len: s.len })
}

pub unsafe extern "C" fn isendv(
    send_comm: Opaque,
    n: c_int,
    iov: *const ucclIoVec,
    tag: c_int,
    request: *mut Opaque,
) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm and vector.
        let (comm, (iov, size)) = unsafe { (comm(send_comm, false)?, segments(n, iov)?) };
        check(!request.is_null())?;
        message_len(comm, size)?;
        post(comm, request, |seq, body| {
            fill_send(Header::new(size, seq, tag), body, false, host_segments(iov));
            Ok(())
        })
    })
}

pub unsafe extern "C" fn irecvv(
    recv_comm: Opaque,
    n: c_int,
    iov: *const ucclIoVec,
    tag: c_int,
    request: *mut Opaque,
) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm and vector.
        let (comm, (iov, size)) = unsafe { (comm(recv_comm, true)?, segments(n, iov)?) };
        check(!request.is_null())?;
        message_len(comm, size)?;
        post(comm, request, |_, body| {
            fill_recv(body, size, tag, host_segments(iov));
            body.exact = true;
            Ok(())
        })
    })
}

pub unsafe extern "C" fn iflush(
    recv_comm: Opaque,
    _n: c_int,
    _data: *mut Opaque,
    _sizes: *mut c_int,
    _mhandles: *mut Opaque,
    request: *mut Opaque,
) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        unsafe { comm(recv_comm, true)? };
        check(!request.is_null())?;
        // Data of done requests is already visible: no wait is needed.
        // SAFETY: not null; the caller's pointer.
        unsafe { *request = ptr::null_mut() };
        Ok(())
    })
}

/// The slot and comm of a request.
///
/// # Safety
/// Null, or a request of a comm that is not closed.
unsafe fn slot<'a>(request: Opaque) -> Result<(&'a Slot, &'a Comm), ncclResult_t> {
    check(!request.is_null())?;
    // SAFETY: by contract a slot of a live comm, which outlives the call and is the slot's owner.
    let (slot, comm) = unsafe {
        let slot = &*request.cast::<Slot>();
        (slot, &*slot.owner.load(Ordering::Acquire).cast::<Comm>())
    };
    own(!comm.is_inherited())?;
    Ok((slot, comm))
}

pub unsafe extern "C" fn test(request: Opaque, done: *mut c_int, sizes: *mut c_int) -> ncclResult_t {
    guard(|| {
        check(!done.is_null())?;
        // SAFETY: the caller's request; not null, the caller's int.
        let (slot, comm) = unsafe {
            *done = 0;
            slot(request)?
        };
        if let Some(bytes) = comm.ledger.test(slot)? {
            // SAFETY: as above; sizes is null or the caller's array of one.
            unsafe {
                *done = 1;
                // TCPX writes nothing to it; strict mode does the same.
                if !sizes.is_null() && !comm.global.config.strict {
                    *sizes = bytes as c_int;
                }
            }
        }
        Ok(())
    })
}

pub unsafe extern "C" fn consumed(recv_comm: Opaque, n: c_int, request: Opaque) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm and request.
        let (comm, (slot, _)) = unsafe { (comm(recv_comm, true)?, slot(request)?) };
        check(n == 1)?;
        comm.consume(slot)
    })
}

pub unsafe extern "C" fn set_doorbell(handle: Opaque, armed: *mut u32, fd: c_int) -> ncclResult_t {
    guard(|| {
        // SAFETY: the caller's comm.
        let comm = unsafe { any_comm(handle)? };
        check(fd < 0 || (!armed.is_null() && armed.is_aligned()))?;
        comm.set_doorbell(armed.cast_const().cast::<AtomicU32>(), fd);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comms_for_device_memory_move_nothing_else() {
        let mr = |device| Mr { device, base: 4096, size: 4096, sends: None };
        let suits = |receives, devices, device| suits(&Ledger::new(receives, false, devices), &mr(device));
        // Without a binding nothing can be sent: the slot would name that of an earlier send.
        assert_eq!([suits(false, true, true), suits(false, true, false)], [false; 2]);
        assert_eq!([suits(true, true, true), suits(true, true, false)], [true, false]);
        for receives in [false, true] {
            assert!(suits(receives, false, true) && suits(receives, false, false));
        }
    }
}
