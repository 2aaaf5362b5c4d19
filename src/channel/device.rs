//! Copies of device memory: unpacking a bounce buffer to its destinations, and packing segments into staging memory. One trait
//! serves CUDA and emulated device memory, where the CPU does both. Knows nothing of comms and transfers.

use crate::status::{bail, Result};
use crate::types::{Part, Place};
use nccl_net_abi::{loadMeta, netUnpackMeta, unpackNetDeviceHandle, MAX_SLOT_ENTRIES};
use soft_plugin::EmulatedMemory;
use std::sync::atomic::{AtomicU64, Ordering};

/// A job of a device; checked with [`DeviceCopier::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ticket {
    /// Finished when it was submitted.
    Done,
    /// A job of one of the copier's GPUs.
    Job {
        /// Index of the GPU among those of the copier.
        unit: usize,
        /// Packing; otherwise unpacking or scattering. Each kind completes in its own order.
        pack: bool,
        /// Its number among the jobs of its kind.
        job: u64,
    },
}

/// The plugin's unpack structure of a comm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// The meta queue, for the CPU.
    pub meta: *const netUnpackMeta,
    /// The meta queue, for kernels.
    pub meta_device: u64,
    /// Base of the bounce buffer, for the copier.
    pub bounce: u64,
    /// The place of the bounce buffer: host memory, which every GPU reads, or the comm's GPU.
    pub home: Place,
    /// The count must be read before the data (a NIC writes the bounce buffer).
    pub read_count: bool,
}

impl View {
    /// Whether receives of this comm can be unpacked to memory of `place`.
    pub(crate) fn reaches(&self, place: Place) -> bool {
        !self.home.is_device() || self.home == place
    }
}

/// Copies on a device. Only `store`, `fetch` and `quiesce` block.
pub(crate) trait DeviceCopier: Send {
    /// Runs `body` with the GPU of `place` current in this thread, as plugin calls on its memory require, then restores the
    /// previous GPU.
    fn within(&mut self, place: Place, body: &mut dyn FnMut() -> Result<bool>) -> Result<bool>;

    /// The plugin's unpack structure, read once per comm.
    ///
    /// # Safety
    /// `handle` was filled by `accept` of a live comm.
    unsafe fn view(&mut self, handle: *const std::ffi::c_void, place: Place) -> Result<View>;

    /// Copies the receive in `slot` to `parts`, in stream order; every entry is checked against `len`. Starts at the next `flush`.
    ///
    /// # Safety
    /// The receive is done and not consumed; `parts` lie in registered memory of `place` and stay there until the job is done.
    unsafe fn unpack(&mut self, view: &View, slot: usize, len: usize, parts: &[Part], place: Place) -> Result<Ticket>;

    /// Gathers `parts` into `staging`, memory of [`DeviceCopier::staging`] or [`DeviceCopier::host_staging`]. Starts at the next
    /// `flush`.
    ///
    /// # Safety
    /// `parts` lie in registered memory of `place`, `staging` holds their sum, and both stay until the job is done.
    unsafe fn pack(&mut self, parts: &[Part], staging: *mut u8, place: Place) -> Result<Ticket>;

    /// Copies what `staging`, memory of [`DeviceCopier::staging`], holds to `parts`. Starts at the next `flush`.
    ///
    /// # Safety
    /// As [`DeviceCopier::pack`], the other way.
    unsafe fn scatter(&mut self, staging: *const u8, parts: &[Part], place: Place) -> Result<Ticket>;

    /// Starts the jobs submitted since the last flush.
    fn flush(&mut self) -> Result<()>;

    /// Whether a job has finished.
    fn poll(&mut self, ticket: Ticket) -> Result<bool>;

    /// Whether jobs are running; their end wakes no thread.
    fn busy(&self) -> bool;

    /// Up to this many bytes `store` and `fetch` are faster than a chunk.
    fn eager_bytes(&self) -> usize;

    /// Writes a few bytes and returns when they are in place.
    ///
    /// # Safety
    /// `parts` lie in registered memory of `place` and hold `bytes`.
    unsafe fn store(&mut self, bytes: &[u8], parts: &[Part], place: Place) -> Result<()>;

    /// Appends a few bytes of device memory to `out`.
    ///
    /// # Safety
    /// `parts` lie in registered memory of `place`.
    unsafe fn fetch(&mut self, parts: &[Part], place: Place, out: &mut Vec<u8>) -> Result<()>;

    /// Page-aligned device memory for gathering.
    fn staging(&mut self, len: usize, place: Place) -> Result<Box<dyn StagingMemory>>;

    /// Page-aligned host memory that the device writes directly.
    fn host_staging(&mut self, len: usize, place: Place) -> Result<Box<dyn StagingMemory>>;

    /// Waits, for a bounded time, until no job touches memory; jobs not yet started never will. After an error some
    /// may still run: then comms, staging memory, this copier and the memory of their transfers must stay.
    fn quiesce(&mut self) -> Result<()>;
}

/// Memory of a staging ring.
pub(crate) trait StagingMemory: Send {
    /// First byte, page-aligned, as an address of its place.
    fn ptr(&self) -> *mut u8;
}

impl StagingMemory for EmulatedMemory {
    fn ptr(&self) -> *mut u8 {
        self.as_ptr()
    }
}

impl StagingMemory for super::memory::HostBlock {
    fn ptr(&self) -> *mut u8 {
        self.as_ptr()
    }
}

/// Host memory that emulates device memory: the CPU copies.
#[derive(Default)]
pub(crate) struct EmulatedDevice {
    /// Staging memory can be exported to NICs.
    pub exports: bool,
}

impl DeviceCopier for EmulatedDevice {
    fn within(&mut self, _place: Place, body: &mut dyn FnMut() -> Result<bool>) -> Result<bool> {
        body()
    }

    unsafe fn view(&mut self, handle: *const std::ffi::c_void, _place: Place) -> Result<View> {
        if handle.is_null() {
            bail!(Plugin, "the plugin gave no device handle");
        }
        // SAFETY: by the caller's contract; emulated device memory is host memory.
        let raw = unsafe { handle.cast::<unpackNetDeviceHandle>().read_unaligned() };
        Ok(View {
            meta: raw.meta,
            meta_device: raw.meta as u64,
            bounce: raw.bounce_buf as u64,
            home: Place::HOST,
            read_count: false,
        })
    }

    unsafe fn unpack(&mut self, view: &View, slot: usize, len: usize, parts: &[Part], _place: Place) -> Result<Ticket> {
        // SAFETY: the meta queue lives as long as the comm; slot is below 16 by the comm's type.
        let entries = unsafe { entries(view.meta, slot) }?;
        check_entries(entries, len)?;
        let starts = starts(parts);
        for entry in entries {
            // SAFETY: the plugin states that len bytes at src_off belong to this receive.
            let src = unsafe { (view.bounce as *const u8).add(entry.src_off as usize) };
            // SAFETY: entries were checked to lie inside the message, and the parts' sum is the message.
            unsafe { scatter(src, entry.dst_off as usize, entry.len as usize, parts, &starts) };
        }
        Ok(Ticket::Done)
    }

    unsafe fn pack(&mut self, parts: &[Part], staging: *mut u8, _place: Place) -> Result<Ticket> {
        // SAFETY: by the caller's contract.
        unsafe { gather(parts, staging) };
        Ok(Ticket::Done)
    }

    unsafe fn scatter(&mut self, staging: *const u8, parts: &[Part], _place: Place) -> Result<Ticket> {
        // SAFETY: by the caller's contract.
        unsafe { spread(staging, parts) };
        Ok(Ticket::Done)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn poll(&mut self, ticket: Ticket) -> Result<bool> {
        match ticket {
            Ticket::Done => Ok(true),
            Ticket::Job { job, .. } => bail!(Internal, "job {job} of an emulated device"),
        }
    }

    fn busy(&self) -> bool {
        false
    }

    fn eager_bytes(&self) -> usize {
        // Emulation must exercise the bounce buffers, for small transfers too.
        0
    }

    unsafe fn store(&mut self, bytes: &[u8], parts: &[Part], _place: Place) -> Result<()> {
        // SAFETY: by the caller's contract; emulated device memory is host memory.
        unsafe { spread(bytes.as_ptr(), parts) };
        Ok(())
    }

    unsafe fn fetch(&mut self, parts: &[Part], _place: Place, out: &mut Vec<u8>) -> Result<()> {
        for part in parts {
            // SAFETY: by the caller's contract; emulated device memory is host memory.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(part.addr as *const u8, part.len as usize) });
        }
        Ok(())
    }

    fn staging(&mut self, len: usize, _place: Place) -> Result<Box<dyn StagingMemory>> {
        if !self.exports {
            return Ok(Box::new(super::memory::HostBlock::new(len)?));
        }
        match EmulatedMemory::new(len) {
            Ok(memory) => Ok(Box::new(memory)),
            Err(e) => bail!(Resource, "no {len} bytes for staging: {e}"),
        }
    }

    fn host_staging(&mut self, len: usize, place: Place) -> Result<Box<dyn StagingMemory>> {
        self.staging(len, place)
    }

    fn quiesce(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Number of descriptors of a slot. Read with acquire, it orders the descriptors, which the plugin writes before it.
///
/// # Safety
/// `meta` is a live meta queue and the receive in `slot` is done.
pub(crate) unsafe fn entry_count(meta: *const netUnpackMeta, slot: usize) -> u64 {
    // SAFETY: by the caller's contract.
    unsafe { AtomicU64::from_ptr((&raw const (*meta).cnt[slot]).cast_mut()) }.load(Ordering::Acquire)
}

/// The descriptors of a slot.
///
/// # Safety
/// `meta` is a live meta queue and the receive in `slot` is done.
unsafe fn entries<'a>(meta: *const netUnpackMeta, slot: usize) -> Result<&'a [loadMeta]> {
    // SAFETY: by the caller's contract.
    let count = unsafe { entry_count(meta, slot) };
    if count > MAX_SLOT_ENTRIES as u64 {
        bail!(Plugin, "the plugin describes a receive with {count} fragments");
    }
    // SAFETY: count is within the row.
    Ok(unsafe { std::slice::from_raw_parts((&raw const (*meta).mem[slot]).cast::<loadMeta>(), count as usize) })
}

/// Checks that every entry lies inside the message, and that the entries cover it.
fn check_entries(entries: &[loadMeta], len: usize) -> Result<()> {
    let mut sum = 0u64;
    for e in entries {
        let inside = e.dst_off.checked_add(u64::from(e.len)).is_some_and(|end| end <= len as u64);
        if !inside {
            bail!(Plugin, "a fragment of {} bytes at {} in a message of {len} bytes", e.len, e.dst_off);
        }
        sum += u64::from(e.len);
    }
    if sum != len as u64 {
        bail!(Plugin, "the fragments hold {sum} bytes of a message of {len} bytes");
    }
    Ok(())
}

/// The message offset of each part.
fn starts(parts: &[Part]) -> Vec<usize> {
    parts
        .iter()
        .scan(0usize, |at, p| {
            let start = *at;
            *at += p.len as usize;
            Some(start)
        })
        .collect()
}

/// Copies `len` bytes at message offset `at` to the parts that they fall into.
///
/// # Safety
/// `src` holds `len` bytes, `at + len` is at most the parts' sum, and the parts are writable.
unsafe fn scatter(mut src: *const u8, mut at: usize, mut len: usize, parts: &[Part], starts: &[usize]) {
    let mut i = starts.partition_point(|&s| s <= at).saturating_sub(1);
    while len > 0 {
        let inside = at - starts[i];
        let n = (parts[i].len as usize - inside).min(len);
        // SAFETY: n bytes lie inside part i and inside the source.
        unsafe {
            std::ptr::copy_nonoverlapping(src, (parts[i].addr as usize + inside) as *mut u8, n);
            src = src.add(n);
        }
        at += n;
        len -= n;
        i += 1;
    }
}

/// Copies parts into contiguous memory.
///
/// # Safety
/// Parts are readable and `out` holds their sum.
pub(crate) unsafe fn gather(parts: &[Part], mut out: *mut u8) {
    for part in parts {
        // SAFETY: by the caller's contract.
        unsafe {
            std::ptr::copy_nonoverlapping(part.addr as *const u8, out, part.len as usize);
            out = out.add(part.len as usize);
        }
    }
}

/// Copies contiguous memory to parts.
///
/// # Safety
/// `src` holds the parts' sum and the parts are writable.
pub(crate) unsafe fn spread(mut src: *const u8, parts: &[Part]) {
    for part in parts {
        // SAFETY: by the caller's contract.
        unsafe {
            std::ptr::copy_nonoverlapping(src, part.addr as *mut u8, part.len as usize);
            src = src.add(part.len as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(src_off: usize, len: usize, dst_off: usize) -> loadMeta {
        loadMeta { src_off: src_off as u32, len: len as u32, dst_off: dst_off as u64 }
    }

    proptest! {
        /// Unsorted fragments of any length reach destination parts of any length, byte for byte, and nothing else.
        #[test]
        fn fragments_reach_their_parts(
            cuts in proptest::collection::vec(1usize..500, 1..30), part_lens in proptest::collection::vec(1usize..700, 1..30), seed in any::<u64>(),
        ) {
            let len: usize = cuts.iter().sum::<usize>().min(part_lens.iter().sum());
            let message: Vec<u8> = (0..len).map(|i| (i as u64 ^ seed) as u8).collect();
            let mut meta: Box<netUnpackMeta> = // SAFETY: plain integers.
                unsafe { Box::new(std::mem::zeroed()) };
            let mut bounce = vec![0xEEu8; len * 2 + 64];
            let (mut at, mut list, mut src) = (0, Vec::new(), 3);
            for cut in cuts {
                let n = cut.min(len - at);
                if n == 0 { break; }
                bounce[src..src + n].copy_from_slice(&message[at..at + n]);
                list.push(entry(src, n, at));
                at += n;
                src += n + (at % 2);
            }
            // The last fragment takes what the cuts leave.
            if at < len {
                bounce[src..src + len - at].copy_from_slice(&message[at..]);
                list.push(entry(src, len - at, at));
            }
            list.reverse();
            let slot = (seed % 16) as usize;
            meta.mem[slot][..list.len()].copy_from_slice(&list);
            meta.cnt[slot] = list.len() as u64;
            let mut dest = vec![0xAAu8; part_lens.iter().map(|l| l + 2).sum::<usize>() + 2];
            let (mut parts, mut place, mut left) = (Vec::new(), 1usize, len);
            for l in part_lens {
                let n = l.min(left);
                if n > 0 { parts.push((place, n)); }
                place += l + 2;
                left -= n;
            }
            let base = dest.as_mut_ptr() as u64;
            let targets: Vec<Part> = parts.iter().map(|&(o, n)| Part { addr: base + o as u64, len: n as u64, region: 0 }).collect();
            let view = View { meta: &*meta, meta_device: 0, bounce: bounce.as_ptr() as u64, home: Place::HOST, read_count: false };
            // SAFETY: this test owns all the memory.
            let done = unsafe { EmulatedDevice::default().unpack(&view, slot, len, &targets, Place::gpu(0)) };
            prop_assert_eq!(done, Ok(Ticket::Done));
            let mut expected = vec![0xAAu8; dest.len()];
            let mut at = 0;
            for (o, n) in parts {
                expected[o..o + n].copy_from_slice(&message[at..at + n]);
                at += n;
            }
            prop_assert_eq!(dest, expected);
        }
    }

    #[test]
    fn receives_of_a_gpu_reach_only_its_own_memory() {
        let view = |home| View { meta: std::ptr::null(), meta_device: 0, bounce: 0, home, read_count: false };
        let (first, second) = (Place::gpu(0), Place::gpu(1));
        assert!(view(Place::HOST).reaches(first) && view(Place::HOST).reaches(second));
        assert!(view(first).reaches(first) && !view(first).reaches(second) && !view(second).reaches(first));
    }

    #[test]
    fn entries_outside_the_message_are_refused() {
        assert!(check_entries(&[entry(0, 100, 0)], 100).is_ok());
        for bad in [
            vec![entry(0, 101, 0)],
            vec![entry(0, 1, 100), entry(0, 99, 0)],
            vec![entry(0, 50, 0)],
            vec![entry(0, 60, 0), entry(0, 60, 40)],
            vec![],
        ] {
            assert!(check_entries(&bad, 100).is_err(), "{bad:?}");
        }
        assert!(check_entries(&[loadMeta { src_off: 0, len: 2, dst_off: u64::MAX }], 100).is_err());
    }
}
