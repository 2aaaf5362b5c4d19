//! Layouts shared with kernels/copy.cu, which asserts the same sizes. Nothing else.

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Entries a receive may have.
pub(super) const MAX_ENTRIES: usize = nccl_net_abi::MAX_SLOT_ENTRIES;
/// Bytes of the larger kernel's parameters.
pub(super) const ARGS: usize = 4096;
/// Bytes of the smaller kernel's parameters.
pub(super) const ARGS_SMALL: usize = 1024;
/// Bytes of parameters before the blob.
pub(super) const HEADER: usize = 16;
/// Most jobs of a launch.
pub(super) const MAX_JOBS: usize = (ARGS - HEADER) / size_of::<JobArgs>();

/// `UCCL_GATHER`: segments to flat.
pub(super) const GATHER: u32 = 1;
/// `UCCL_ENTRIES_INLINE`: the entries lie in the parameters.
pub(super) const ENTRIES_INLINE: u32 = 2;
/// `UCCL_SEGMENTS_INLINE`: the table lies in the parameters.
pub(super) const SEGMENTS_INLINE: u32 = 4;
/// `UCCL_ITEMS`: the host has joined entries and segments to [`Item`]s.
pub(super) const ITEMS: u32 = 8;
/// `UCCL_UNIT_SHIFT`: bit position of the unit size in the flags.
pub(super) const UNIT_SHIFT: u32 = 8;

/// `UCCL_ERROR_RANGE`: an entry leaves the message; its index is in bits 8..31.
pub(super) const ERROR_RANGE: u32 = 1;
/// `UCCL_ERROR_COUNT`: the plugin's count changed or is over the limit.
pub(super) const ERROR_COUNT: u32 = 2;
/// `UCCL_ERROR_TOTAL`: entries do not add up to the message.
pub(super) const ERROR_TOTAL: u32 = 3;

/// `UcclJob`; the fields are explained there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct JobArgs {
    pub(super) entries: u64,
    pub(super) count: u64,
    pub(super) flat: u64,
    pub(super) seg_start: u64,
    pub(super) seg_addr: u64,
    pub(super) state: u64,
    pub(super) status: u64,
    pub(super) size: u32,
    pub(super) entry_count: u32,
    pub(super) segments: u32,
    pub(super) entries_per_strip: u32,
    pub(super) parts: u32,
    pub(super) blocks: u32,
    pub(super) flags: u32,
    pub(super) sequence: u32,
}

/// `UcclItem`: a piece that lies in one segment.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) src_off: u32,
    pub(super) len: u32,
    pub(super) addr: u64,
}

/// `UcclArgs<4096>`; the smaller kernel reads the first 1024 bytes.
#[repr(C, align(16))]
pub(super) struct Args {
    pub(super) jobs: u32,
    pub(super) reserved: [u32; 3],
    pub(super) blob: [u8; ARGS - HEADER],
}

const _: () = {
    assert!(size_of::<JobArgs>() == 88);
    assert!(std::mem::offset_of!(JobArgs, size) == 56);
    assert!(std::mem::offset_of!(JobArgs, sequence) == 84);
    assert!(size_of::<Args>() == ARGS && std::mem::offset_of!(Args, blob) == HEADER);
    assert!(size_of::<nccl_net_abi::loadMeta>() == 16 && size_of::<Item>() == 16);
};
