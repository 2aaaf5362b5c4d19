//! How the work of a job is cut over blocks. Pure arithmetic; the kernel is right for every plan, only its speed depends on it.

use super::layout::{JobArgs, UNIT_SHIFT};

/// Blocks of one job at most, split strips included.
const MAX_BLOCKS: u32 = 4096;
/// Launches from which blocks take two and four times the work; measured on an H200.
const LARGE: u64 = 12 << 20;
const HUGE: u64 = 48 << 20;

/// Sets the plan of a job whose size, entry count and segment count stand. `launch_bytes`: of all jobs of the launch;
/// `longest`: bytes of the longest entry, as far as known.
pub(super) fn plan(job: &mut JobArgs, launch_bytes: u64, longest: u32) {
    let count = job.entry_count.max(1);
    let pieces = count.max(job.segments);
    // Small pieces are copied by groups of 8 lanes, 512 bytes a unit; otherwise a warp takes a unit, finer when few bytes
    // have to fill the GPU.
    let shift = if job.size / pieces < 1024 {
        9
    } else if launch_bytes <= 4 << 20 {
        11
    } else {
        12
    };
    // A large launch gives each block more: its start (entries, table, prefix sum) costs as much as copying 16 KiB.
    let times = match launch_bytes {
        0..LARGE => 1,
        LARGE..HUGE => 2,
        HUGE.. => 4,
    };
    let per_block = if shift == 9 { 32u32 << 9 } else { (8u32 << shift) * times };
    let want = job.size.div_ceil(per_block).clamp(1, MAX_BLOCKS / 2);
    let strips = count.min(want.max(count.div_ceil(64)));
    job.entries_per_strip = count.div_ceil(strips);
    let strips = count.div_ceil(job.entries_per_strip);
    // One long entry among short ones must not stay with one block.
    let by_longest = (u64::from(longest).div_ceil(2 * u64::from(per_block)) as u32).min((MAX_BLOCKS / strips).max(1));
    job.parts = want.div_ceil(strips).max(by_longest);
    job.blocks = strips * job.parts;
    job.flags |= shift << UNIT_SHIFT;
}

#[cfg(test)]
mod tests {
    use super::super::layout::{MAX_ENTRIES, THREADS};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every entry is in exactly one strip, the kernel's limits hold, and large jobs are spread.
        #[test]
        fn plans_cover_the_job(size in 1u32.., count in 1u32..=MAX_ENTRIES as u32, segments in 1u32..50_000, total in any::<u64>(), longest in any::<u32>()) {
            let mut job = JobArgs { size, entry_count: count, segments, ..JobArgs::default() };
            plan(&mut job, total.max(u64::from(size)), longest.min(size));
            let strips = job.blocks / job.parts;
            prop_assert_eq!(strips * job.parts, job.blocks);
            prop_assert!(strips * job.entries_per_strip >= count && (strips - 1) * job.entries_per_strip < count);
            prop_assert!(job.parts == 1 || job.entries_per_strip <= THREADS);
            prop_assert!((1..8192).contains(&job.blocks)); // the kernel counts them in 13 bits
            prop_assert!((9..32).contains(&((job.flags >> UNIT_SHIFT) & 31)));
            prop_assert!(longest < 4 << 20 || size < 4 << 20 || job.blocks >= 16);
        }
    }
}
