//! The NCCL net plugin ABI as `repr(C)` types: the tables of versions 7 to 12 (`nccl`), the unpack device handle of
//! GPUDirect-TCPX, and the one extension table of the software plugin. Layouts only; no behaviour lives here, and nothing here allocates.
//!
//! Source of the unpack device handle: `unpack_defs.h` of GPUDirect-TCPX.
#![allow(non_camel_case_types, non_snake_case)]

mod nccl;

pub use nccl::*;
use std::ffi::{c_char, c_int, c_void};
use std::mem::{offset_of, size_of};

/// Version of the unpack device handle.
pub const NCCL_NET_DEVICE_UNPACK_VERSION: c_int = 7;
/// Most requests of a comm in flight or awaiting consumption.
pub const MAX_REQUESTS: usize = 16;
/// Alignment that plugins require of registered memory.
pub const PAGE: usize = 4096;
/// `loadMeta` entries of a receive slot.
pub const MAX_SLOT_ENTRIES: usize = 2048;

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
    /// Limits a send comm to so many bytes a second; the kernel paces its packets.
    pub pace: Option<unsafe extern "C" fn(comm: Opaque, bytes_a_second: u64) -> ncclResult_t>,
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
    /// The kernel's unit of `busy_us` and `limited_us`, microseconds: shorter times may count as nothing, or as a whole unit. 0: the
    /// kernel does not report them.
    pub tick_us: u32,
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
    assert!(size_of::<loadMeta>() == 16);
    assert!(offset_of!(loadMeta, dst_off) == 8);
    assert!(offset_of!(netUnpackMeta, cnt) == MAX_REQUESTS * MAX_SLOT_ENTRIES * 16);
    assert!(size_of::<unpackNetDeviceHandle>() == 24);
    assert!(size_of::<ucclIoVec>() == 16);
    assert!(size_of::<ucclNetExt_v2>() == 17 * 8);
    assert!(offset_of!(ucclNetExt_v2, progress) == 4 * 8);
    assert!(offset_of!(ucclNetExt_v2, describe) == 6 * 8);
    assert!(offset_of!(ucclNetExt_v2, info) == 7 * 8);
    assert!(offset_of!(ucclNetExt_v2, protect) == 10 * 8);
    assert!(offset_of!(ucclNetExt_v2, connectRecv) == 14 * 8);
    assert!(offset_of!(ucclNetExt_v2, pace) == 16 * 8);
    assert!(size_of::<ucclFlow>() == 72);
    assert!(size_of::<ucclCommInfo>() == 56);
};
