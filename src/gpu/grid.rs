//! Divides the work of a job among the blocks of a launch. Pure arithmetic; the kernel is correct for every division, only its speed depends
//! on it.

use super::job::Extent;
use super::layout::{Item, JobArgs, ITEMS, THREADS, UNIT_SHIFT};
use nccl_net_abi::loadMeta;

/// Blocks of one job at most, split strips included.
const MAX_BLOCKS: u32 = 4096;
/// Launches from which a block takes four times the least work.
const LARGE: u64 = 12 << 20;
/// Blocks that a large GPU runs at a time (two on each multiprocessor), and the least work of one.
const WAVE: u64 = 264;
const LEAST: u64 = 32 << 10;
/// Entries and segments of a job that the host joins.
const MAX_JOINED: usize = 4096;

/// Times the least work a block gets, by the bytes of a launch: a block's start costs about as much as copying 16 KiB, and a second
/// wave of blocks as much as the first.
fn times(launch_bytes: u64) -> u32 {
    let wave = launch_bytes.div_ceil(WAVE * LEAST).min(64) as u32;
    wave.max(if launch_bytes < LARGE { 1 } else { 4 })
}

/// Items that a job may come to where they do not travel in the parameters.
pub(super) fn far_room(entries: usize, segments: usize) -> usize {
    if entries + segments <= MAX_JOINED {
        entries + segments
    } else {
        0
    }
}

/// Joins a job's entries and segments to pieces that lie in one segment each. False when there would be more than `room`, when it
/// takes too long, or when the entries are wrong: then the kernel is to say so.
pub(super) fn join(entries: &[loadMeta], segments: &[Extent], size: u32, room: usize, items: &mut Vec<Item>) -> bool {
    items.clear();
    let (mut begin, mut i, mut sum, mut steps) = (0u64, 0, 0u64, 0);
    for e in entries {
        let (mut x, mut flat, mut left) = (e.dst_off, u64::from(e.src_off), u64::from(e.len));
        if x > u64::from(size) || left > u64::from(size) - x {
            return false;
        }
        sum += left;
        if x < begin {
            (begin, i) = (0, 0);
        }
        while left > 0 {
            let Some(segment) = segments.get(i) else { return false };
            steps += 1;
            if steps > 4 * room {
                return false;
            }
            let end = begin + segment.len;
            if x < end {
                let n = left.min(end - x);
                if items.len() == room || flat + n > 1 << 32 {
                    return false;
                }
                items.push(Item { src_off: flat as u32, len: n as u32, addr: segment.addr + (x - begin) });
                (x, flat, left) = (x + n, flat + n, left - n);
                if left == 0 {
                    break;
                }
            }
            begin = end;
            i += 1;
        }
    }
    sum == u64::from(size)
}

/// Lays out a job of joined pieces: cuts them to items of at most 2^p units, which the kernel finds without a search. False
/// when that takes more than `room` items.
pub(super) fn cut(job: &mut JobArgs, launch_bytes: u64, room: usize, items: &mut Vec<Item>) -> bool {
    // Few bytes have to fill the GPU; but every block reads the count over PCIe, one after another.
    let shift = if launch_bytes > 1 << 20 || job.count != 0 { 12 } else { 10 };
    let longest = items.iter().map(|i| i.len).max().unwrap_or(0).max(1);
    let mut p = (u64::from(longest).next_power_of_two().trailing_zeros()).saturating_sub(shift);
    loop {
        let piece = 1u64 << (shift + p);
        let n: u64 = items.iter().map(|i| u64::from(i.len).div_ceil(piece)).sum();
        if n > room as u64 {
            return false;
        }
        let slots = n << p;
        if p > 0 && slots > 2 * ((u64::from(job.size) >> shift) + 1) + 64 {
            p -= 1; // too many warps would find nothing
            continue;
        }
        let mut at = 0;
        while at < items.len() {
            let Item { src_off, len, addr } = items[at];
            if u64::from(len) > piece {
                items[at].len = piece as u32;
                items.push(Item { src_off: src_off + piece as u32, len: len - piece as u32, addr: addr + piece });
            }
            at += 1;
        }
        job.segments = job.entry_count;
        job.entry_count = items.len() as u32;
        job.parts = p;
        // A warp to a unit, but no more than that many full ones: four times as many where units are short and nothing is read first.
        let per_block = u64::from(THREADS / 32 * times(launch_bytes));
        let full = u64::from(job.size).div_ceil(per_block << shift) * if job.count != 0 { 1 } else { 4 };
        job.blocks = slots.div_ceil(per_block).min(full).min(u64::from(MAX_BLOCKS)) as u32;
        job.flags |= ITEMS | shift << UNIT_SHIFT;
        return true;
    }
}

/// Lays out a job whose size, entry count and segment count stand. `launch_bytes`: of all jobs of the launch;
/// `longest`: bytes of the longest entry, as far as known.
pub(super) fn spread(job: &mut JobArgs, launch_bytes: u64, longest: u32) {
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
    let per_block = if shift == 9 { 32u32 << 9 } else { 8u32 << shift } * times(launch_bytes);
    let want = job.size.div_ceil(per_block).clamp(1, MAX_BLOCKS / 2);
    let strips = count.min(want.max(count.div_ceil(THREADS)));
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
    use super::super::layout::MAX_ENTRIES;
    use super::*;
    use proptest::prelude::*;

    /// Entries of these lengths in this order of places, and the segments.
    fn job(lens: &[u32], rotate: usize, segment_lens: &[u32]) -> (Vec<loadMeta>, Vec<Extent>, u32) {
        let mut size = 0;
        let mut entries: Vec<_> = lens
            .iter()
            .map(|&len| {
                size += len;
                loadMeta { src_off: 7 * size, len, dst_off: u64::from(size - len) }
            })
            .collect();
        entries.rotate_left(rotate % lens.len());
        let (mut segments, mut left, mut i) = (Vec::new(), size, 0);
        while left > 0 {
            let len = segment_lens[i % segment_lens.len()].min(left);
            segments.push(Extent { addr: (1 << 40) + i as u64 * (1 << 20), len: len.into() });
            (left, i) = (left - len, i + 1);
        }
        (entries, segments, size)
    }

    #[test]
    fn wrong_entries_are_left_to_the_kernel() {
        let (good, segments, size) = job(&[1000, 2000, 3000], 1, &[700]);
        let mut items = Vec::new();
        assert!(join(&good, &segments, size, 100, &mut items) && !join(&good, &segments, size, items.len() - 1, &mut items));
        for (i, change) in [(0, 1u64), (1, u64::MAX), (2, 1 << 32), (1, 6000)].into_iter() {
            let mut bad = good.clone();
            bad[i].dst_off = bad[i].dst_off.wrapping_add(change).max(4001);
            assert!(!join(&bad, &segments, size, 100, &mut items), "{bad:?}");
        }
        assert!(!join(&good[1..], &segments, size, 100, &mut items));
    }

    proptest! {
        /// Items are the bytes of the entries, each once, and every one is found by the kernel's arithmetic.
        #[test]
        fn items_are_the_job(
            lens in proptest::collection::vec(1u32..70_000, 1..40),
            rotate in any::<usize>(),
            segment_lens in proptest::collection::vec(1u32..70_000, 1..20),
            total in 0u64..128 << 20,
        ) {
            let (entries, segments, size) = job(&lens, rotate, &segment_lens);
            let mut items = Vec::new();
            prop_assume!(join(&entries, &segments, size, 200, &mut items));
            let mut args = JobArgs { size, entry_count: entries.len() as u32, ..JobArgs::default() };
            prop_assume!(cut(&mut args, total.max(size.into()), 200, &mut items));
            prop_assert_eq!((args.segments as usize, args.entry_count as usize), (entries.len(), items.len()));
            let unit = 1u32 << ((args.flags >> UNIT_SHIFT) & 31);
            prop_assert!(items.len() <= 200 && (1..8192).contains(&args.blocks));
            let mut flat_of = vec![u32::MAX; size as usize];
            let starts: Vec<u64> = segments.iter().scan(0, |at, s| { *at += s.len; Some(*at - s.len) }).collect();
            for item in &items {
                prop_assert!(item.len > 0 && u64::from(item.len) <= u64::from(unit) << args.parts);
                let s = ((item.addr - (1 << 40)) >> 20) as usize;
                let within = item.addr - segments[s].addr;
                prop_assert!(within + u64::from(item.len) <= segments[s].len);
                for b in 0..item.len {
                    let x = (starts[s] + within) as usize + b as usize;
                    prop_assert_eq!(std::mem::replace(&mut flat_of[x], item.src_off + b), u32::MAX);
                }
            }
            for e in &entries {
                for b in 0..e.len {
                    prop_assert_eq!(flat_of[e.dst_off as usize + b as usize], e.src_off + b);
                }
            }
        }

        /// Every entry is in exactly one strip, the kernel's limits hold, and large jobs are spread.
        #[test]
        fn layouts_cover_the_job(size in 1u32.., count in 1u32..=MAX_ENTRIES as u32, segments in 1u32..50_000, total in any::<u64>(), longest in any::<u32>()) {
            let mut job = JobArgs { size, entry_count: count, segments, ..JobArgs::default() };
            spread(&mut job, total.max(u64::from(size)), longest.min(size));
            let strips = job.blocks / job.parts;
            prop_assert_eq!(strips * job.parts, job.blocks);
            prop_assert!(strips * job.entries_per_strip >= count && (strips - 1) * job.entries_per_strip < count);
            prop_assert!(job.parts == 1 || job.entries_per_strip <= THREADS);
            prop_assert!((1..8192).contains(&job.blocks)); // the kernel counts them in 13 bits
            prop_assert!((9..32).contains(&((job.flags >> UNIT_SHIFT) & 31)));
            // A launch with much else fills the GPU all the same.
            prop_assert!(longest < 4 << 20 || size < 4 << 20 || total > 32 << 20 || job.blocks >= 16);
        }
    }
}
