//! What NCCL's `ext-net` headers define (`net_v7.h` to `net_v12.h`, `net_device.h`): results, properties, and the plugin's table in each
//! version. A version is a table of its own: members were added at its end, and some take other arguments.
//!
//! | | init | regMr | isend, irecv | listen, connect | new members |
//! |---|---|---|---|---|---|
//! | 7 | logger | size is an int | size is an int | | |
//! | 8 | | size_t | | | |
//! | 9 | | | size_t | | makeVDevice |
//! | 10 | logger, profiler | | size_t, a handle for the profiler | connect takes a configuration | |
//! | 11, 12 | context, id, configuration, logger, profiler | | | both take the context | finalize, setNetAttr |
//!
//! Version 12 has other properties than version 11 and the same functions.

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::mem::{offset_of, size_of};

/// Bytes of a connect handle that peers exchange out of band.
pub const NCCL_NET_HANDLE_MAXSIZE: usize = 128;
/// Pointer type: host memory.
pub const NCCL_PTR_HOST: c_int = 1;
/// Pointer type: CUDA memory.
pub const NCCL_PTR_CUDA: c_int = 2;
/// Pointer type: DMA-BUF.
pub const NCCL_PTR_DMABUF: c_int = 4;
/// `netDeviceType`: receives land in the posted memory.
pub const NCCL_NET_DEVICE_HOST: c_int = 0;
/// `netDeviceType`: receives land in a bounce buffer and must be unpacked.
pub const NCCL_NET_DEVICE_UNPACK: c_int = 1;
/// `trafficClass` of a caller that asks for none.
pub const NCCL_NET_TRAFFIC_CLASS_UNDEF: c_int = -1;

/// `ncclResult_t`.
pub type ncclResult_t = c_int;
/// Success.
pub const NCCL_SUCCESS: ncclResult_t = 0;
/// A CUDA call failed.
pub const NCCL_UNHANDLED_CUDA_ERROR: ncclResult_t = 1;
/// A system call failed, or the connection was lost.
pub const NCCL_SYSTEM_ERROR: ncclResult_t = 2;
/// A violation of the plugin's contract, or an internal error.
pub const NCCL_INTERNAL_ERROR: ncclResult_t = 3;
/// Invalid argument.
pub const NCCL_INVALID_ARGUMENT: ncclResult_t = 4;
/// Invalid usage.
pub const NCCL_INVALID_USAGE: ncclResult_t = 5;
/// The peer reported an error.
pub const NCCL_REMOTE_ERROR: ncclResult_t = 6;

/// Level passed to the logger: error.
pub const NCCL_LOG_WARN: c_int = 2;
/// Level passed to the logger: information.
pub const NCCL_LOG_INFO: c_int = 3;
/// Level passed to the logger: trace.
pub const NCCL_LOG_TRACE: c_int = 5;

/// The logger of `init`: a C variadic of (level, flags, file, line, printf format, ...).
pub type ncclDebugLogger_t =
    Option<unsafe extern "C" fn(level: c_int, flags: c_ulong, file: *const c_char, line: c_int, fmt: *const c_char, ...)>;

/// The profiler's callback of `init` from v10 on: a plugin reports events of requests whose profiler handle is not null.
pub type ncclProfilerCallback_t = Option<
    unsafe extern "C" fn(
        event: *mut *mut c_void,
        kind: c_int,
        profiler_handle: *mut c_void,
        plugin_id: i64,
        data: *mut c_void,
    ) -> ncclResult_t,
>;

/// What the caller asks of its connections, from v10 on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ncclNetCommConfig_v10 {
    /// A number that the plugin knows, or [`NCCL_NET_TRAFFIC_CLASS_UNDEF`].
    pub trafficClass: c_int,
}

/// The physical devices behind a device, from v9 on: up to 4, in v12 up to 8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ncclNetVDeviceProps<const N: usize> {
    /// Number of physical devices; 1 for an ordinary device.
    pub ndevs: c_int,
    /// Their indices.
    pub devs: [c_int; N],
}

macro_rules! net_properties {
    ($(#[$doc:meta])* $name:ident { $($(#[$new_doc:meta])* $new:ident),* } { $($(#[$last_doc:meta])* $last:ident: $kind:ty),* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name {
            /// Name for logs; owned by the plugin.
            pub name: *mut c_char,
            /// Path of the PCI device under /sys, or null; owned by the plugin.
            pub pciPath: *mut c_char,
            /// Unique id of the NIC.
            pub guid: u64,
            /// Or of the `NCCL_PTR_*` kinds that can be registered.
            pub ptrSupport: c_int,
            $($(#[$new_doc])* pub $new: c_int,)*
            /// Mbit/s; 0 or less if unknown.
            pub speed: c_int,
            /// Port number.
            pub port: c_int,
            /// Network latency, us.
            pub latency: f32,
            /// Most comms of the device.
            pub maxComms: c_int,
            /// Receives that can be grouped (1 for TCPX).
            pub maxRecvs: c_int,
            /// `NCCL_NET_DEVICE_*`.
            pub netDeviceType: c_int,
            /// Version of the device handle.
            pub netDeviceVersion: c_int,
            $($(#[$last_doc])* pub $last: $kind,)*
        }
    };
}

net_properties!(
    /// Properties of a device, v7.
    ncclNetProperties_v7 {} {}
);
net_properties!(
    /// Properties of a device, v8.
    ncclNetProperties_v8 {
        /// A registration of one comm serves every comm of the device.
        regIsGlobal
    } {}
);
net_properties!(
    /// Properties of a device, v9 and v10.
    ncclNetProperties_v9 {
        /// As in v8.
        regIsGlobal,
        /// 1: receives into CUDA memory need a flush, whatever the GPU.
        forceFlush
    } {
        /// The physical devices behind it.
        vProps: ncclNetVDeviceProps<4>,
        /// Largest message, bytes.
        maxP2pBytes: usize,
        /// Largest message of a collective operation, bytes.
        maxCollBytes: usize
    }
);
net_properties!(
    /// Properties of a device, v11.
    ncclNetProperties_v11 {
        /// As in v8.
        regIsGlobal,
        /// As in v9.
        forceFlush
    } {
        /// The physical devices behind it.
        vProps: ncclNetVDeviceProps<4>,
        /// Largest message, bytes.
        maxP2pBytes: usize,
        /// Largest message of a collective operation, bytes.
        maxCollBytes: usize,
        /// Requests that one can stand for.
        maxMultiRequestSize: c_int
    }
);
net_properties!(
    /// Properties of a device, v12.
    ncclNetProperties_v12 {
        /// As in v8.
        regIsGlobal,
        /// As in v9.
        forceFlush
    } {
        /// The physical devices behind it.
        vProps: ncclNetVDeviceProps<8>,
        /// Largest message, bytes.
        maxP2pBytes: usize,
        /// Largest message of a collective operation, bytes.
        maxCollBytes: usize,
        /// Requests that one can stand for.
        maxMultiRequestSize: c_int,
        /// Number of the rail, or -1.
        railId: i16,
        /// Number of the plane, or -1.
        planeId: i16
    }
);

impl From<ncclNetProperties_v8> for ncclNetProperties_v7 {
    fn from(p: ncclNetProperties_v8) -> ncclNetProperties_v7 {
        ncclNetProperties_v7 {
            name: p.name,
            pciPath: p.pciPath,
            guid: p.guid,
            ptrSupport: p.ptrSupport,
            speed: p.speed,
            port: p.port,
            latency: p.latency,
            maxComms: p.maxComms,
            maxRecvs: p.maxRecvs,
            netDeviceType: p.netDeviceType,
            netDeviceVersion: p.netDeviceVersion,
        }
    }
}

/// Handle to the device side of a comm, in every version. The caller of `accept` provides the memory, the plugin fills it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ncclNetDeviceHandle_v7 {
    /// `NCCL_NET_DEVICE_*`.
    pub netDeviceType: c_int,
    /// Version of the layout behind `handle`.
    pub netDeviceVersion: c_int,
    /// Pointer to [`unpackNetDeviceHandle`]: device memory with a GPU, host memory when device memory is emulated.
    pub handle: *mut c_void,
    /// Bytes behind `handle`.
    pub size: usize,
    /// The caller must keep calling `test`.
    pub needsProxyProgress: c_int,
}

// SAFETY: plain data; code that dereferences the pointer must justify it.
unsafe impl Send for ncclNetDeviceHandle_v7 {}

type Opaque = *mut c_void;
type DeviceHandle = *mut ncclNetDeviceHandle_v7;

/// `init` of v7 to v9.
pub type InitFn = unsafe extern "C" fn(ncclDebugLogger_t) -> ncclResult_t;
/// `init` of v10.
pub type ProfiledInitFn = unsafe extern "C" fn(ncclDebugLogger_t, ncclProfilerCallback_t) -> ncclResult_t;
/// `init` from v11 on: called for each user of the plugin, and writes the user's context.
pub type ContextInitFn = unsafe extern "C" fn(
    context: *mut Opaque,
    id: u64,
    config: *mut ncclNetCommConfig_v10,
    ncclDebugLogger_t,
    ncclProfilerCallback_t,
) -> ncclResult_t;
/// `listen` of v7 to v10.
pub type ListenFn = unsafe extern "C" fn(dev: c_int, handle: Opaque, listen_comm: *mut Opaque) -> ncclResult_t;
/// `listen` from v11 on.
pub type ContextListenFn =
    unsafe extern "C" fn(context: Opaque, dev: c_int, handle: Opaque, listen_comm: *mut Opaque) -> ncclResult_t;
/// `connect` of v7 to v9.
pub type ConnectFn =
    unsafe extern "C" fn(dev: c_int, handle: Opaque, send_comm: *mut Opaque, dev_handle: *mut DeviceHandle) -> ncclResult_t;
/// `connect` of v10.
pub type ConfiguredConnectFn = unsafe extern "C" fn(
    dev: c_int,
    config: *mut ncclNetCommConfig_v10,
    handle: Opaque,
    send_comm: *mut Opaque,
    dev_handle: *mut DeviceHandle,
) -> ncclResult_t;
/// `connect` from v11 on.
pub type ContextConnectFn = unsafe extern "C" fn(
    context: Opaque,
    dev: c_int,
    handle: Opaque,
    send_comm: *mut Opaque,
    dev_handle: *mut DeviceHandle,
) -> ncclResult_t;
type DevicesFn = unsafe extern "C" fn(*mut c_int) -> ncclResult_t;
type AcceptFn = unsafe extern "C" fn(listen_comm: Opaque, recv_comm: *mut Opaque, dev_handle: *mut DeviceHandle) -> ncclResult_t;
/// `regMr`, with a size of type `S`.
pub type RegFn<S> =
    unsafe extern "C" fn(comm: Opaque, data: Opaque, size: S, ptr_type: c_int, mhandle: *mut Opaque) -> ncclResult_t;
type RegDmaBufFn = unsafe extern "C" fn(Opaque, Opaque, usize, c_int, u64, c_int, *mut Opaque) -> ncclResult_t;
type DeregFn = unsafe extern "C" fn(comm: Opaque, mhandle: Opaque) -> ncclResult_t;
/// `isend` of v7 to v9, with a size of type `S`.
pub type IsendFn<S> =
    unsafe extern "C" fn(comm: Opaque, data: Opaque, size: S, tag: c_int, mhandle: Opaque, request: *mut Opaque) -> ncclResult_t;
/// `isend` from v10 on.
pub type ProfiledIsendFn = unsafe extern "C" fn(
    comm: Opaque,
    data: Opaque,
    size: usize,
    tag: c_int,
    mhandle: Opaque,
    profiler_handle: Opaque,
    request: *mut Opaque,
) -> ncclResult_t;
/// `irecv` of v7 to v9, with sizes of type `S`.
pub type IrecvFn<S> = unsafe extern "C" fn(
    comm: Opaque,
    n: c_int,
    data: *mut Opaque,
    sizes: *mut S,
    tags: *mut c_int,
    mhandles: *mut Opaque,
    request: *mut Opaque,
) -> ncclResult_t;
/// `irecv` from v10 on.
pub type ProfiledIrecvFn = unsafe extern "C" fn(
    comm: Opaque,
    n: c_int,
    data: *mut Opaque,
    sizes: *mut usize,
    tags: *mut c_int,
    mhandles: *mut Opaque,
    profiler_handles: *mut Opaque,
    request: *mut Opaque,
) -> ncclResult_t;
type IflushFn = unsafe extern "C" fn(
    comm: Opaque,
    n: c_int,
    data: *mut Opaque,
    sizes: *mut c_int,
    mhandles: *mut Opaque,
    request: *mut Opaque,
) -> ncclResult_t;
type TestFn = unsafe extern "C" fn(request: Opaque, done: *mut c_int, sizes: *mut c_int) -> ncclResult_t;
type CloseFn = unsafe extern "C" fn(comm: Opaque) -> ncclResult_t;
type GetDeviceMrFn = unsafe extern "C" fn(comm: Opaque, mhandle: Opaque, dptr_mhandle: *mut Opaque) -> ncclResult_t;
type ConsumedFn = unsafe extern "C" fn(recv_comm: Opaque, n: c_int, request: Opaque) -> ncclResult_t;
/// `makeVDevice`, with properties of type `V`.
pub type MakeVDeviceFn<V> = unsafe extern "C" fn(dev: *mut c_int, props: *mut V) -> ncclResult_t;
type FinalizeFn = unsafe extern "C" fn(context: Opaque) -> ncclResult_t;
type SetNetAttrFn = unsafe extern "C" fn(context: Opaque, attributes: Opaque) -> ncclResult_t;

macro_rules! net_table {
    (
        $(#[$doc:meta])* $name:ident, $props:ty, $init:ty, $listen:ty, $connect:ty, $reg:ty, $isend:ty, $irecv:ty
        $(, $(#[$new_doc:meta])* $new:ident: $kind:ty)*
    ) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name {
            /// Name of the plugin, for logs.
            pub name: *const c_char,
            /// Initialises the plugin; called first.
            pub init: Option<$init>,
            /// Number of devices.
            pub devices: Option<DevicesFn>,
            /// Properties of a device.
            pub getProperties: Option<unsafe extern "C" fn(dev: c_int, props: *mut $props) -> ncclResult_t>,
            /// Opens a listen comm and writes the 128-byte handle.
            pub listen: Option<$listen>,
            /// Connects to a handle; success with a null comm means call again with the same buffer.
            pub connect: Option<$connect>,
            /// Accepts on a listen comm; success with a null comm means call again.
            pub accept: Option<AcceptFn>,
            /// Registers memory.
            pub regMr: Option<$reg>,
            /// Registers a DMA-BUF.
            pub regMrDmaBuf: Option<RegDmaBufFn>,
            /// Drops a registration.
            pub deregMr: Option<DeregFn>,
            /// Starts a send; success with a null request means try again.
            pub isend: Option<$isend>,
            /// Starts a receive; success with a null request means try again.
            pub irecv: Option<$irecv>,
            /// Flushes received data towards the GPU.
            pub iflush: Option<IflushFn>,
            /// Tests the oldest unfinished request.
            pub test: Option<TestFn>,
            /// Closes a send comm.
            pub closeSend: Option<CloseFn>,
            /// Closes a receive comm.
            pub closeRecv: Option<CloseFn>,
            /// Closes a listen comm.
            pub closeListen: Option<CloseFn>,
            /// Device handle of a registration.
            pub getDeviceMr: Option<GetDeviceMrFn>,
            /// Releases a receive that has been unpacked; in order.
            pub irecvConsumed: Option<ConsumedFn>,
            $($(#[$new_doc])* pub $new: Option<$kind>,)*
        }
        // SAFETY: the table is immutable data and function pointers; the plugin's functions have their own thread rules.
        unsafe impl Sync for $name {}
        // SAFETY: as above.
        unsafe impl Send for $name {}
        const _: () = {
            assert!(offset_of!($name, regMr) == 7 * 8);
            assert!(offset_of!($name, test) == 13 * 8);
            assert!(offset_of!($name, irecvConsumed) == 18 * 8);
        };
    };
}

net_table!(
    /// The plugin's table, v7.
    ncclNet_v7, ncclNetProperties_v7, InitFn, ListenFn, ConnectFn, RegFn<c_int>, IsendFn<c_int>, IrecvFn<c_int>
);
net_table!(
    /// The plugin's table, v8.
    ncclNet_v8, ncclNetProperties_v8, InitFn, ListenFn, ConnectFn, RegFn<usize>, IsendFn<c_int>, IrecvFn<c_int>
);
net_table!(
    /// The plugin's table, v9.
    ncclNet_v9, ncclNetProperties_v9, InitFn, ListenFn, ConnectFn, RegFn<usize>, IsendFn<usize>, IrecvFn<usize>,
    /// Makes one device of several.
    makeVDevice: MakeVDeviceFn<ncclNetVDeviceProps<4>>
);
net_table!(
    /// The plugin's table, v10.
    ncclNet_v10, ncclNetProperties_v9, ProfiledInitFn, ListenFn, ConfiguredConnectFn, RegFn<usize>, ProfiledIsendFn, ProfiledIrecvFn,
    /// Makes one device of several.
    makeVDevice: MakeVDeviceFn<ncclNetVDeviceProps<4>>
);
net_table!(
    /// The plugin's table, v11.
    ncclNet_v11, ncclNetProperties_v11, ContextInitFn, ContextListenFn, ContextConnectFn, RegFn<usize>, ProfiledIsendFn, ProfiledIrecvFn,
    /// Makes one device of several.
    makeVDevice: MakeVDeviceFn<ncclNetVDeviceProps<4>>,
    /// Ends the use of a context.
    finalize: FinalizeFn,
    /// Describes the traffic that a context expects.
    setNetAttr: SetNetAttrFn
);
net_table!(
    /// The plugin's table, v12.
    ncclNet_v12, ncclNetProperties_v12, ContextInitFn, ContextListenFn, ContextConnectFn, RegFn<usize>, ProfiledIsendFn, ProfiledIrecvFn,
    /// Makes one device of several.
    makeVDevice: MakeVDeviceFn<ncclNetVDeviceProps<8>>,
    /// Ends the use of a context.
    finalize: FinalizeFn,
    /// Describes the traffic that a context expects.
    setNetAttr: SetNetAttrFn
);

const _: () = {
    assert!(size_of::<ncclNetDeviceHandle_v7>() == 32);
    assert!(size_of::<ncclNetProperties_v7>() == 56);
    assert!(size_of::<ncclNetProperties_v8>() == 64);
    assert!(size_of::<ncclNetProperties_v9>() == 104);
    assert!(size_of::<ncclNetProperties_v11>() == 112);
    assert!(size_of::<ncclNetProperties_v12>() == 128);
    assert!(size_of::<ncclNet_v8>() == 19 * 8 && size_of::<ncclNet_v7>() == 19 * 8);
    assert!(size_of::<ncclNet_v9>() == 20 * 8 && size_of::<ncclNet_v10>() == 20 * 8);
    assert!(size_of::<ncclNet_v11>() == 22 * 8 && size_of::<ncclNet_v12>() == 22 * 8);
};

/// Name of the data symbol of the v7 table.
pub const SYMBOL_V7: &[u8] = b"ncclNetPlugin_v7\0";
/// Name of the data symbol of the v8 table.
pub const SYMBOL_V8: &[u8] = b"ncclNetPlugin_v8\0";
/// Name of the data symbol of the v9 table.
pub const SYMBOL_V9: &[u8] = b"ncclNetPlugin_v9\0";
/// Name of the data symbol of the v10 table.
pub const SYMBOL_V10: &[u8] = b"ncclNetPlugin_v10\0";
/// Name of the data symbol of the v11 table.
pub const SYMBOL_V11: &[u8] = b"ncclNetPlugin_v11\0";
/// Name of the data symbol of the v12 table.
pub const SYMBOL_V12: &[u8] = b"ncclNetPlugin_v12\0";
