//! Copy jobs: messages between a flat buffer and scattered segments. Checks all that the host can check; knows nothing of
//! launches.

use super::layout::MAX_ENTRIES;
use crate::status::{bail, err, Result};
use cuda_driver::MappedPtr;
use nccl_net_abi::{loadMeta, netUnpackMeta};
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};

/// A scattered segment, in message order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// First byte: device memory, or mapped host memory by its device name.
    pub addr: u64,
    /// Bytes, more than 0.
    pub len: u64,
}

/// How the flat buffer holds the message.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fragments {
    /// In one piece, in order.
    Whole,
    /// As the plugin's meta queue says.
    Row {
        /// The slot's row of `loadMeta`.
        row: MappedPtr,
        /// The slot's count.
        count: MappedPtr,
        /// The kernel reads the count before it reads any flat byte, as the contract asks where the bounce buffer is device
        /// memory that a NIC writes. Costs a round trip over PCIe.
        read_count: bool,
    },
}

/// One message to copy between a flat buffer and scattered segments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    /// How the flat buffer is divided.
    pub fragments: Fragments,
    /// First byte of the flat buffer: device memory, or mapped host memory by its device name.
    pub flat: u64,
    /// Bytes of the message, as announced.
    pub len: u64,
    /// The scattered segments; their lengths add up to `len`.
    pub segments: &'a [Extent],
    /// From the segments to the flat buffer; otherwise from the flat buffer to the segments.
    pub gather: bool,
}

impl<'a> Job<'a> {
    /// Unpacks the receive in `slot` of a meta queue: bounce buffer to segments.
    pub(crate) fn unpack(
        meta: MappedPtr,
        slot: usize,
        bounce: u64,
        len: u64,
        segments: &'a [Extent],
        read_count: bool,
    ) -> Job<'a> {
        let slot = slot % nccl_net_abi::MAX_REQUESTS;
        let row = meta.offset(offset_of!(netUnpackMeta, mem) + slot * MAX_ENTRIES * size_of::<loadMeta>());
        let count = meta.offset(offset_of!(netUnpackMeta, cnt) + slot * size_of::<u64>());
        Job { fragments: Fragments::Row { row, count, read_count }, flat: bounce, len, segments, gather: false }
    }
    /// Packs segments into contiguous staging.
    pub(crate) fn gather(segments: &'a [Extent], staging: u64, len: u64) -> Job<'a> {
        Job { fragments: Fragments::Whole, flat: staging, len, segments, gather: true }
    }
    /// Spreads contiguous staging over segments.
    pub(crate) fn scatter(staging: u64, segments: &'a [Extent], len: u64) -> Job<'a> {
        Job { fragments: Fragments::Whole, flat: staging, len, segments, gather: false }
    }
}

/// Checks what the host can see of a job: its entry count, 1 for a whole message.
pub(super) fn checked_count(job: &Job<'_>) -> Result<u32> {
    let mut sum = 0u64;
    for segment in job.segments {
        if segment.len == 0 {
            bail!(InvalidArgument, "an empty segment at {:#x}", segment.addr);
        }
        sum = sum.saturating_add(segment.len);
    }
    if sum != job.len || job.len == 0 {
        bail!(InvalidArgument, "segments of {sum} bytes for a message of {}", job.len);
    }
    message_len(job.len)?;
    match job.fragments {
        Fragments::Whole => Ok(1),
        Fragments::Row { count, .. } => {
            // SAFETY: the plugin's counter, live by the contract of submit; written last, so acquire orders the entries.
            let count = unsafe { AtomicU64::from_ptr(count.host.cast()) }.load(Ordering::Acquire);
            if count == 0 || count > MAX_ENTRIES as u64 {
                bail!(Plugin, "the plugin describes a receive of {} bytes by {count} fragments", job.len);
            }
            Ok(count as u32)
        }
    }
}

/// The entries of a checked job; `whole` is that of a flat buffer in one piece.
///
/// # Safety
/// A row is live and holds `count` entries.
pub(super) unsafe fn entries_of<'a>(job: &Job<'a>, count: u32, whole: &'a [loadMeta; 1]) -> &'a [loadMeta] {
    match job.fragments {
        Fragments::Whole => whole,
        // SAFETY: by the caller's contract. The plugin may be wrong about them: their users check them, join or the kernel, which
        // may read them again.
        Fragments::Row { row, .. } => unsafe { std::slice::from_raw_parts(row.host.cast::<loadMeta>(), count as usize) },
    }
}

/// `len` as the kernel counts bytes.
pub(super) fn message_len(len: u64) -> Result<u32> {
    u32::try_from(len).map_err(|_| err!(InvalidArgument, "a message of {len} bytes is over 4 GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_checked_before_anything_is_launched() {
        let segments = [Extent { addr: 4096, len: 60 }, Extent { addr: 8192, len: 40 }];
        assert_eq!(checked_count(&Job::gather(&segments, 0, 100)), Ok(1));
        assert!(checked_count(&Job::gather(&segments, 0, 101)).is_err());
        assert!(checked_count(&Job::scatter(0, &[], 0)).is_err());
        assert!(checked_count(&Job::scatter(0, &[Extent { addr: 0, len: 1 << 32 }], 1 << 32)).is_err());
        assert!(checked_count(&Job::scatter(0, &[Extent { addr: 0, len: 0 }, Extent { addr: 0, len: 5 }], 5)).is_err());
        let mut meta = vec![0u64; size_of::<netUnpackMeta>() / 8];
        let ptr = MappedPtr { host: meta.as_mut_ptr().cast(), device: 0 };
        for (count, good) in [(0u64, false), (1, true), (2048, true), (2049, false), (u64::MAX, false)] {
            meta[(offset_of!(netUnpackMeta, cnt)) / 8 + 3] = count;
            let ptr = MappedPtr { host: meta.as_mut_ptr().cast(), ..ptr };
            assert_eq!(checked_count(&Job::unpack(ptr, 19, 0, 100, &segments, true)).is_ok(), good, "{count}");
        }
    }
}
