//! The tables of versions 7 to 12 as [`NetTable`]. What several versions have alike is written once, below.

use super::context::WithContext;
use super::{Answer, NetTable, Properties};
use nccl_net_abi as abi;
use nccl_net_abi::{ncclDebugLogger_t, ncclNetDeviceHandle_v7, ncclResult_t};
use std::ffi::{c_int, c_void};

/// The configuration of connections: none.
const UNCONFIGURED: abi::ncclNetCommConfig_v10 = abi::ncclNetCommConfig_v10 { trafficClass: abi::NCCL_NET_TRAFFIC_CLASS_UNDEF };

/// A plugin may call its profiler unchecked. This one ignores all events.
unsafe extern "C" fn no_profiler(_: *mut *mut c_void, _: c_int, _: *mut c_void, _: i64, _: *mut c_void) -> ncclResult_t {
    abi::NCCL_SUCCESS
}

/// A size as the type that a version has for it.
fn fit<T: TryFrom<usize>>(size: usize) -> Option<T> {
    T::try_from(size).ok()
}

/// The calls that are the same in all versions.
macro_rules! calls_alike {
    ($version:literal) => {
        fn version(&self) -> u32 {
            $version
        }
        fn name(&self) -> String {
            super::text(self.name).unwrap_or_else(|| "unnamed".to_owned())
        }
        unsafe fn devices(&self, n: &mut c_int) -> Answer {
            // SAFETY: by the trait's contract, here and below; n is writable.
            self.devices.map(|call| unsafe { call(n) })
        }
        unsafe fn accept(&self, listen: *mut c_void, dev_handle: *mut ncclNetDeviceHandle_v7, comm: &mut *mut c_void) -> Answer {
            let mut dev_handle = dev_handle;
            // SAFETY: as above.
            self.accept.map(|call| unsafe { call(listen, comm, &mut dev_handle) })
        }
        unsafe fn dereg_mr(&self, comm: *mut c_void, mhandle: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.deregMr.map(|call| unsafe { call(comm, mhandle) })
        }
        unsafe fn flush(
            &self,
            comm: *mut c_void,
            data: *mut c_void,
            size: c_int,
            mhandle: *mut c_void,
            request: &mut *mut c_void,
        ) -> Answer {
            let (mut data, mut size, mut mhandle) = (data, size, mhandle);
            // SAFETY: as above; arrays of one.
            self.iflush.map(|call| unsafe { call(comm, 1, &mut data, &mut size, &mut mhandle, request) })
        }
        unsafe fn test(&self, request: *mut c_void, done: &mut c_int, size: &mut c_int) -> Answer {
            // SAFETY: as above.
            self.test.map(|call| unsafe { call(request, done, size) })
        }
        unsafe fn close_send(&self, comm: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.closeSend.map(|call| unsafe { call(comm) })
        }
        unsafe fn close_recv(&self, comm: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.closeRecv.map(|call| unsafe { call(comm) })
        }
        unsafe fn close_listen(&self, comm: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.closeListen.map(|call| unsafe { call(comm) })
        }
        unsafe fn consumed(&self, comm: *mut c_void, request: *mut c_void) -> Answer {
            // SAFETY: as above.
            self.irecvConsumed.map(|call| unsafe { call(comm, 1, request) })
        }
    };
}

/// Init, listen and connect: of 7 to 9, of 10, and from 11 on. A sender has nothing to unpack: the plugin wants a place for a device handle
/// and leaves it alone.
macro_rules! set_up {
    (plain) => {
        unsafe fn init(&self, logger: ncclDebugLogger_t) -> Answer {
            // SAFETY: by the trait's contract, here and below.
            self.init.map(|call| unsafe { call(logger) })
        }
        set_up!(listen);
        unsafe fn connect(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer {
            let mut unused = std::ptr::null_mut();
            // SAFETY: as above.
            self.connect.map(|call| unsafe { call(dev, handle, comm, &mut unused) })
        }
    };
    (configured) => {
        unsafe fn init(&self, logger: ncclDebugLogger_t) -> Answer {
            // SAFETY: by the trait's contract, here and below.
            self.init.map(|call| unsafe { call(logger, Some(no_profiler)) })
        }
        set_up!(listen);
        unsafe fn connect(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer {
            let (mut config, mut unused) = (UNCONFIGURED, std::ptr::null_mut());
            // SAFETY: as above; the plugin reads the configuration during the call.
            self.connect.map(|call| unsafe { call(dev, &mut config, handle, comm, &mut unused) })
        }
    };
    (listen) => {
        unsafe fn listen(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer {
            // SAFETY: as above.
            self.listen.map(|call| unsafe { call(dev, handle, comm) })
        }
    };
    (context) => {
        unsafe fn init(&self, logger: ncclDebugLogger_t) -> Answer {
            let (mut context, mut config) = (std::ptr::null_mut(), UNCONFIGURED);
            // The id distinguishes NCCL's communicators; the engine has none.
            // SAFETY: by the trait's contract, here and below; the plugin reads the configuration during the call.
            let answer = self.init.map(|call| unsafe { call(&mut context, 0, &mut config, logger, Some(no_profiler)) });
            self.set_context(context);
            answer
        }
        unsafe fn listen(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer {
            // SAFETY: as above; the context is that of init.
            self.listen.map(|call| unsafe { call(self.context(), dev, handle, comm) })
        }
        unsafe fn connect(&self, dev: c_int, handle: *mut c_void, comm: &mut *mut c_void) -> Answer {
            let mut unused = std::ptr::null_mut();
            // SAFETY: as above.
            self.connect.map(|call| unsafe { call(self.context(), dev, handle, comm, &mut unused) })
        }
    };
}

/// Registration: a size that the version cannot express is refused.
macro_rules! registration {
    ($size:ty) => {
        unsafe fn reg_mr(&self, comm: *mut c_void, data: *mut c_void, size: usize, kind: c_int, out: &mut *mut c_void) -> Answer {
            let Some(size) = fit::<$size>(size) else { return Some(abi::NCCL_INVALID_ARGUMENT) };
            // SAFETY: by the trait's contract.
            self.regMr.map(|call| unsafe { call(comm, data, size, kind, out) })
        }
    };
}

/// Requests: a size that the version cannot express is refused. From 10 on each has a handle for the profiler, which is null here.
macro_rules! requests {
    ($size:ty $(, $profiler_handle:ident)?) => {
        unsafe fn isend(
            &self,
            comm: *mut c_void,
            data: *mut c_void,
            size: usize,
            tag: c_int,
            mhandle: *mut c_void,
            request: &mut *mut c_void,
        ) -> Answer {
            let Some(size) = fit::<$size>(size) else { return Some(abi::NCCL_INVALID_ARGUMENT) };
            $(let $profiler_handle = std::ptr::null_mut();)?
            // SAFETY: by the trait's contract, here and below.
            self.isend.map(|call| unsafe { call(comm, data, size, tag, mhandle, $($profiler_handle,)? request) })
        }
        unsafe fn irecv(
            &self,
            comm: *mut c_void,
            data: *mut c_void,
            size: usize,
            tag: c_int,
            mhandle: *mut c_void,
            request: &mut *mut c_void,
        ) -> Answer {
            let Some(mut size) = fit::<$size>(size) else { return Some(abi::NCCL_INVALID_ARGUMENT) };
            let (mut data, mut tag, mut mhandle) = (data, tag, mhandle);
            $(let mut $profiler_handle = std::ptr::null_mut();)?
            // SAFETY: as above; arrays of one.
            self.irecv.map(|call| unsafe {
                call(comm, 1, &mut data, &mut size, &mut tag, &mut mhandle, $(&mut $profiler_handle,)? request)
            })
        }
    };
}

/// Properties of a type: `regIsGlobal` is there from 8 on, the largest message from 9 on.
macro_rules! properties {
    ($type:ty $(, $global:ident $(, $largest:ident)?)?) => {
        unsafe fn properties(&self, dev: c_int, out: &mut Properties) -> Answer {
            let call = self.getProperties?;
            // SAFETY: plain data for which zeros are valid.
            let mut p: $type = unsafe { std::mem::zeroed() };
            // SAFETY: p is writable; dev is below the number of devices by the trait's contract.
            let result = unsafe { call(dev, &mut p) };
            *out = Properties {
                name: super::text(p.name),
                pci_path: super::text(p.pciPath),
                speed_mbps: p.speed,
                ptr_support: p.ptrSupport,
                device_type: p.netDeviceType,
                ..Properties::default()
            };
            $(
                out.reg_is_global = p.$global != 0;
                $(out.max_message = std::num::NonZeroUsize::new(p.$largest);)?
            )?
            Some(result)
        }
    };
}

impl NetTable for abi::ncclNet_v7 {
    calls_alike!(7);
    set_up!(plain);
    registration!(c_int);
    requests!(c_int);
    properties!(abi::ncclNetProperties_v7);
}

impl NetTable for abi::ncclNet_v8 {
    calls_alike!(8);
    set_up!(plain);
    registration!(usize);
    requests!(c_int);
    properties!(abi::ncclNetProperties_v8, regIsGlobal);
}

impl NetTable for abi::ncclNet_v9 {
    calls_alike!(9);
    set_up!(plain);
    registration!(usize);
    requests!(usize);
    properties!(abi::ncclNetProperties_v9, regIsGlobal, maxP2pBytes);
}

impl NetTable for abi::ncclNet_v10 {
    calls_alike!(10);
    set_up!(configured);
    registration!(usize);
    requests!(usize, profiler_handle);
    properties!(abi::ncclNetProperties_v9, regIsGlobal, maxP2pBytes);
}

impl NetTable for WithContext<abi::ncclNet_v11> {
    calls_alike!(11);
    set_up!(context);
    registration!(usize);
    requests!(usize, profiler_handle);
    properties!(abi::ncclNetProperties_v11, regIsGlobal, maxP2pBytes);
}

impl NetTable for WithContext<abi::ncclNet_v12> {
    calls_alike!(12);
    set_up!(context);
    registration!(usize);
    requests!(usize, profiler_handle);
    properties!(abi::ncclNetProperties_v12, regIsGlobal, maxP2pBytes);
}
