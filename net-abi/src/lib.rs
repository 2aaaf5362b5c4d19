//! The NCCL net plugin ABI as `repr(C)` types: tables v7 and v8, the unpack device handle of GPUDirect-TCPX, and the one
//! extension table of the software plugin. Layouts only; no behaviour lives here, and nothing here allocates.
//!
//! Sources: NCCL's `ext-net` headers (`net_v7.h`, `net_v8.h`, `net_device.h`) and `unpack_defs.h` of GPUDirect-TCPX.
#![allow(non_camel_case_types, non_snake_case)]

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
/// Version of the unpack device handle.
pub const NCCL_NET_DEVICE_UNPACK_VERSION: c_int = 7;
/// Most requests of a comm in flight or awaiting consumption.
pub const MAX_REQUESTS: usize = 16;
/// Alignment that plugins require of registered memory.
pub const PAGE: usize = 4096;
/// `loadMeta` entries of a receive slot.
pub const MAX_SLOT_ENTRIES: usize = 2048;

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

macro_rules! net_properties {
    ($(#[$doc:meta])* $name:ident { $($(#[$extra_doc:meta])* $extra:ident)? }) => {
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
            $($(#[$extra_doc])* pub $extra: c_int,)?
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
        }
    };
}

net_properties!(
    /// Properties of a device, v7.
    ncclNetProperties_v7 {}
);
net_properties!(
    /// Properties of a device, v8: v7 plus `regIsGlobal` after `ptrSupport`.
    ncclNetProperties_v8 {
        /// A registration of one comm serves every comm of the device.
        regIsGlobal
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

/// Handle to the device side of a comm (v7 and v8). The caller of `accept` provides the memory, the plugin fills it.
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

/// One fragment of a receive: `len` bytes at `src_off` of the bounce buffer belong at `dst_off` of the message.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct loadMeta {
    /// Offset from the bounce buffer's base, bytes.
    pub src_off: u32,
    /// Length, bytes.
    pub len: u32,
    /// Offset from the start of this receive, bytes.
    pub dst_off: u64,
}

/// The meta queue: one row of descriptors per receive slot, then their counts. Mapped host memory.
#[repr(C)]
pub struct netUnpackMeta {
    /// Descriptors of each slot.
    pub mem: [[loadMeta; MAX_SLOT_ENTRIES]; MAX_REQUESTS],
    /// Valid descriptors of each slot.
    pub cnt: [u64; MAX_REQUESTS],
}

/// What `ncclNetDeviceHandle_v7::handle` points at.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unpackNetDeviceHandle {
    /// The meta queue.
    pub meta: *mut netUnpackMeta,
    /// Base of the bounce buffer.
    pub bounce_buf: *mut c_void,
    /// Used by NCCL's kernels only.
    pub head: u64,
}

type Opaque = *mut c_void;
type InitFn = unsafe extern "C" fn(ncclDebugLogger_t) -> ncclResult_t;
type DevicesFn = unsafe extern "C" fn(*mut c_int) -> ncclResult_t;
type ListenFn = unsafe extern "C" fn(dev: c_int, handle: Opaque, listen_comm: *mut Opaque) -> ncclResult_t;
type ConnectFn = unsafe extern "C" fn(
    dev: c_int,
    handle: Opaque,
    send_comm: *mut Opaque,
    dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t;
type AcceptFn = unsafe extern "C" fn(
    listen_comm: Opaque,
    recv_comm: *mut Opaque,
    dev_handle: *mut *mut ncclNetDeviceHandle_v7,
) -> ncclResult_t;
type RegDmaBufFn = unsafe extern "C" fn(Opaque, Opaque, usize, c_int, u64, c_int, *mut Opaque) -> ncclResult_t;
type DeregFn = unsafe extern "C" fn(comm: Opaque, mhandle: Opaque) -> ncclResult_t;
type IsendFn = unsafe extern "C" fn(
    comm: Opaque,
    data: Opaque,
    size: c_int,
    tag: c_int,
    mhandle: Opaque,
    request: *mut Opaque,
) -> ncclResult_t;
type IrecvFn = unsafe extern "C" fn(
    comm: Opaque,
    n: c_int,
    data: *mut Opaque,
    sizes: *mut c_int,
    tags: *mut c_int,
    mhandles: *mut Opaque,
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

macro_rules! net_table {
    ($(#[$doc:meta])* $name:ident, $props:ty, $reg_size:ty) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name {
            /// Name of the plugin, for logs.
            pub name: *const c_char,
            /// Initialises the plugin; called once, first.
            pub init: Option<InitFn>,
            /// Number of devices.
            pub devices: Option<DevicesFn>,
            /// Properties of a device.
            pub getProperties: Option<unsafe extern "C" fn(dev: c_int, props: *mut $props) -> ncclResult_t>,
            /// Opens a listen comm and writes the 128-byte handle.
            pub listen: Option<ListenFn>,
            /// Connects to a handle; success with a null comm means call again with the same buffer.
            pub connect: Option<ConnectFn>,
            /// Accepts on a listen comm; success with a null comm means call again.
            pub accept: Option<AcceptFn>,
            /// Registers memory.
            pub regMr: Option<unsafe extern "C" fn(comm: Opaque, data: Opaque, size: $reg_size, ptr_type: c_int, mhandle: *mut Opaque) -> ncclResult_t>,
            /// Registers a DMA-BUF.
            pub regMrDmaBuf: Option<RegDmaBufFn>,
            /// Drops a registration.
            pub deregMr: Option<DeregFn>,
            /// Starts a send; success with a null request means try again.
            pub isend: Option<IsendFn>,
            /// Starts a receive; success with a null request means try again.
            pub irecv: Option<IrecvFn>,
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
        }
        // SAFETY: the table is immutable data and function pointers; the plugin's functions have their own thread rules.
        unsafe impl Sync for $name {}
        // SAFETY: as above.
        unsafe impl Send for $name {}
        const _: () = {
            assert!(size_of::<$name>() == 19 * 8);
            assert!(offset_of!($name, regMr) == 7 * 8);
            assert!(offset_of!($name, test) == 13 * 8);
            assert!(offset_of!($name, irecvConsumed) == 18 * 8);
        };
    };
}

net_table!(
    /// The plugin table, v7 (`regMr` takes an int).
    ncclNet_v7, ncclNetProperties_v7, c_int
);
net_table!(
    /// The plugin table, v8 (`regMr` takes a size_t).
    ncclNet_v8, ncclNetProperties_v8, usize
);

/// Name of the data symbol of the v7 table.
pub const SYMBOL_V7: &[u8] = b"ncclNetPlugin_v7\0";
/// Name of the data symbol of the v8 table.
pub const SYMBOL_V8: &[u8] = b"ncclNetPlugin_v8\0";
/// Name of the data symbol of the software plugin's extension table.
pub const SYMBOL_EXT: &[u8] = b"ucclNetExt_v2\0";

/// The software plugin's extension of v7. Comms are those of the plugin's own tables.
///
/// The plugin makes two more guarantees. The `tag` of a send travels with the message, and the matching receive must have
/// been posted with the same tag; otherwise the receive comm fails. After `NCCL_SYSTEM_ERROR` of `listen`, `connect`, `accept` or
/// `regMr`, `errno` has the cause (`EMFILE` and `ENFILE`: out of descriptors), or 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ucclNetExt_v2 {
    /// `sizeof` this table; a reader takes only members that lie inside.
    pub size: usize,
    /// Vectored send of host memory: one message gathered from `n` segments. Segments stay untouched by the caller until
    /// the request is done; the iovec array itself is copied. One of the 16 requests of the comm; same rules as `isend`.
    pub isendv: Option<
        unsafe extern "C" fn(comm: Opaque, n: c_int, iov: *const ucclIoVec, tag: c_int, request: *mut Opaque) -> ncclResult_t,
    >,
    /// Vectored receive into host memory: one message scattered to `n` segments. The message must have exactly the sum of their
    /// lengths, otherwise the comm fails. One of the 16 requests; same rules as `irecv`, including `irecvConsumed`.
    pub irecvv: Option<
        unsafe extern "C" fn(comm: Opaque, n: c_int, iov: *const ucclIoVec, tag: c_int, request: *mut Opaque) -> ncclResult_t,
    >,
    /// Doorbell of a comm: whenever a request of the comm becomes done, or the comm fails (with requests or idle), the plugin swaps
    /// `*armed` to 0 and, if it was 1, writes 1 to eventfd `fd`. Both stay valid until the comm is closed. `fd` -1 removes it.
    /// A comm that fails while `*armed` is not 1 sets [`UCCL_DOORBELL_FAILED`] in it, so that a failure before the arming is seen.
    pub setDoorbell: Option<unsafe extern "C" fn(comm: Opaque, armed: *mut u32, fd: c_int) -> ncclResult_t>,
    /// Network progress of a comm: bytes that the peer's kernel has acknowledged (send comm), or that were read from
    /// the socket (receive comm). Grows within messages too, counts a few bytes of framing, and never falls. For a failed comm
    /// returns the result of its requests and leaves `*bytes` untouched. One system call at most.
    pub progress: Option<unsafe extern "C" fn(comm: Opaque, bytes: *mut u64) -> ncclResult_t>,
    /// Abandons the pending connect with this 128-byte handle buffer: closes its socket before the call returns; the
    /// buffer cannot be used afterwards. Also succeeds when no connect is pending.
    pub abandonConnect: Option<unsafe extern "C" fn(handle: Opaque) -> ncclResult_t>,
    /// Writes "local-address -> peer-address on NIC" for error texts, NUL-terminated, truncated to `len` bytes.
    pub describe: Option<unsafe extern "C" fn(comm: Opaque, text: *mut c_char, len: usize) -> ncclResult_t>,
    /// The kernel's statistics of the comm's connection. The caller sets `size` of the structure.
    pub info: Option<unsafe extern "C" fn(comm: Opaque, info: *mut ucclCommInfo) -> ncclResult_t>,
    /// Before the first `accept`: the listen comm accepts only a peer that proves the 32 bytes at `key`.
    pub keyListen: Option<unsafe extern "C" fn(listen_comm: Opaque, key: *const u8) -> ncclResult_t>,
    /// Before the first `connect` with this 128-byte handle buffer: the connect proves the 32 bytes at `key`. They are stored in the
    /// buffer until then.
    pub keyConnect: Option<unsafe extern "C" fn(handle: Opaque, key: *const u8) -> ncclResult_t>,
    /// Before the first request of a comm, and equally at both ends: protects its messages by [`UCCL_PROTECT_CHECKSUM`], or by
    /// [`UCCL_PROTECT_SEAL`] under the 32 bytes at `key` (ignored otherwise), which no other comm or direction may use. A message that
    /// was altered, repeated, dropped or truncated fails the receiving comm before the receive is done and its descriptors are published.
    pub protect: Option<unsafe extern "C" fn(comm: Opaque, level: c_int, key: *const u8) -> ncclResult_t>,
    /// Success when the device can carry new connections now; else the result of `listen` on it.
    pub ready: Option<unsafe extern "C" fn(dev: c_int) -> ncclResult_t>,
    /// Before the first `accept`, and after `keyListen` if that is called: the listen comm also serves one `acceptSend`, of a peer
    /// that proves the 32 bytes at `key`; null if and only if `keyListen` was not called.
    pub listenBoth: Option<unsafe extern "C" fn(listen_comm: Opaque, key: *const u8) -> ncclResult_t>,
    /// Accepts a peer's `connectRecv`: as `accept`, with the direction reversed. In any order with `accept` of the same listen comm.
    pub acceptSend: Option<unsafe extern "C" fn(listen_comm: Opaque, send_comm: *mut Opaque) -> ncclResult_t>,
    /// Connects to a handle to receive from it: as `connect`, with the direction reversed, and a device handle as for `accept`.
    pub connectRecv: Option<
        unsafe extern "C" fn(
            dev: c_int,
            handle: Opaque,
            recv_comm: *mut Opaque,
            dev_handle: *mut *mut ncclNetDeviceHandle_v7,
        ) -> ncclResult_t,
    >,
    /// The kernel's progress with a send comm's bytes. The caller sets `size` of the structure. Never waits: while the
    /// comm is busy it returns the last known values.
    pub flow: Option<unsafe extern "C" fn(comm: Opaque, flow: *mut ucclFlow) -> ncclResult_t>,
}

/// Progress of a send comm's bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ucclFlow {
    /// `sizeof` this structure; a writer fills only members that lie inside.
    pub size: usize,
    /// Bytes that the peer's kernel has acknowledged, with a little framing.
    pub acknowledged: u64,
    /// Bytes in the kernel that the peer's kernel has not acknowledged.
    pub waiting: u64,
    /// Smallest round trip seen, microseconds; 0 while unknown.
    pub min_rtt_us: u32,
    /// 1: the comm is busy, and these are the last known values.
    pub stale: u32,
    /// Packets that were sent, and that the peer's kernel has not acknowledged: 0 where bytes wait for room at the peer.
    pub unanswered: u32,
    /// How often in a row such packets were sent again in vain.
    pub retries: u32,
    /// Bytes of the largest packet that the kernel sends.
    pub packet: u32,
    /// 0.
    pub reserved: u32,
    /// Time in which it had bytes to send or to be acknowledged, microseconds, and the part of it in which the peer's receive window
    /// held them up.
    pub busy_us: u64,
    /// See `busy_us`.
    pub limited_us: u64,
    /// Bytes of the oldest unfinished request that the kernel has: `waiting` or `acknowledged` counts them.
    pub begun: u64,
}

/// The kernel's statistics of a comm's connection. Unknown values are 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ucclCommInfo {
    /// `sizeof` this structure; a writer fills only members that lie inside.
    pub size: usize,
    /// Segments sent, and how many of them were retransmitted.
    pub segments: u64,
    /// See `segments`.
    pub retransmits: u64,
    /// Smoothed round trip, microseconds.
    pub rtt_us: u32,
    /// Smallest round trip seen, microseconds.
    pub min_rtt_us: u32,
    /// Bytes per second that the peer acknowledged recently.
    pub delivery_rate: u64,
    /// Name of the congestion control, NUL-terminated.
    pub congestion: [c_char; 16],
}

/// The bit of a doorbell's word that says that a comm has failed.
pub const UCCL_DOORBELL_FAILED: u32 = 2;

/// Level of `protect`: CRC-32C of each message, against damage.
pub const UCCL_PROTECT_CHECKSUM: c_int = 1;
/// Level of `protect`: AES-256-GCM.
pub const UCCL_PROTECT_SEAL: c_int = 2;

// SAFETY: immutable data and function pointers.
unsafe impl Sync for ucclNetExt_v2 {}
// SAFETY: as above.
unsafe impl Send for ucclNetExt_v2 {}

/// One segment of host memory; layout of `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ucclIoVec {
    /// First byte.
    pub base: *mut c_void,
    /// Length, bytes.
    pub len: usize,
}
// SAFETY: a pointer and a length; code that dereferences it must justify it.
unsafe impl Send for ucclIoVec {}

const _: () = {
    assert!(size_of::<ncclNetProperties_v7>() == 56);
    assert!(offset_of!(ncclNetProperties_v7, guid) == 16);
    assert!(offset_of!(ncclNetProperties_v7, latency) == 36);
    assert!(offset_of!(ncclNetProperties_v7, netDeviceVersion) == 52);
    assert!(size_of::<ncclNetProperties_v8>() == 64);
    assert!(offset_of!(ncclNetProperties_v8, regIsGlobal) == 28);
    assert!(offset_of!(ncclNetProperties_v8, netDeviceVersion) == 56);
    assert!(size_of::<ncclNetDeviceHandle_v7>() == 32);
    assert!(offset_of!(ncclNetDeviceHandle_v7, handle) == 8);
    assert!(offset_of!(ncclNetDeviceHandle_v7, needsProxyProgress) == 24);
    assert!(size_of::<loadMeta>() == 16);
    assert!(offset_of!(loadMeta, dst_off) == 8);
    assert!(offset_of!(netUnpackMeta, cnt) == MAX_REQUESTS * MAX_SLOT_ENTRIES * 16);
    assert!(size_of::<unpackNetDeviceHandle>() == 24);
    assert!(size_of::<ucclIoVec>() == 16);
    assert!(size_of::<ucclNetExt_v2>() == 16 * 8);
    assert!(offset_of!(ucclNetExt_v2, progress) == 4 * 8);
    assert!(offset_of!(ucclNetExt_v2, describe) == 6 * 8);
    assert!(offset_of!(ucclNetExt_v2, info) == 7 * 8);
    assert!(offset_of!(ucclNetExt_v2, protect) == 10 * 8);
    assert!(offset_of!(ucclNetExt_v2, connectRecv) == 14 * 8);
    assert!(size_of::<ucclFlow>() == 72);
    assert!(size_of::<ucclCommInfo>() == 56);
};
