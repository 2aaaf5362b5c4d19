//! Eager transfers, whose data travels in a control frame: where the bytes are taken from and where they go. Knows nothing of
//! frames.

use crate::channel::plan::Walk;
use crate::channel::router::Channels;
use crate::status::{bail, Result};
use crate::types::{Part, Segment, MAX_EAGER};

/// The limit, and room for the bytes of one transfer.
pub(super) struct Eager {
    limit: usize,
    gathered: Vec<u8>,
}

impl Eager {
    /// For transfers of at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Eager {
        Eager { limit: limit.min(MAX_EAGER), gathered: Vec::new() }
    }

    /// Whether a transfer is small enough.
    pub(super) fn takes(&self, segments: &[Segment], total: u64, channels: &Channels) -> bool {
        total <= self.limit as u64 && total <= channels.eager_bytes(segments) as u64
    }

    /// The bytes of a transfer that is small enough: where they lie if that is one piece of host memory, otherwise gathered in
    /// this buffer.
    pub(super) fn load<'a>(
        &'a mut self,
        segments: &'a [Segment],
        total: u64,
        channels: &mut Channels,
    ) -> Result<Option<&'a [u8]>> {
        if !self.takes(segments, total, channels) {
            return Ok(None);
        }
        let device = segments.iter().any(|s| s.place.is_device());
        if let ([only], false) = (segments, device) {
            // SAFETY: the segment lies in a registered region that the caller's uses hold.
            return Ok(Some(unsafe { std::slice::from_raw_parts(only.addr as *const u8, only.len as usize) }));
        }
        self.gathered.clear();
        self.gathered.reserve(total as usize);
        let mut stream = Walk::new(segments.to_vec());
        while let Some(chunk) = stream.take(MAX_EAGER) {
            // SAFETY: the parts lie in registered regions that the caller's uses hold.
            unsafe { channels.fetch(&chunk, &mut self.gathered) }?;
        }
        Ok(Some(&self.gathered))
    }
}

/// Puts the bytes of a control frame in place. The caller holds the segments' regions.
pub(super) fn store(segments: Vec<Segment>, mut data: &[u8], channels: &mut Channels) -> Result<()> {
    let total: u64 = segments.iter().map(|s| s.len).sum();
    if total != data.len() as u64 {
        bail!(Protocol, "{} bytes inside a frame for {total} bytes of memory", data.len());
    }
    if let [Segment { addr, len, region, place, .. }] = segments[..] {
        // SAFETY: the part lies in a registered region that the caller holds.
        return unsafe { channels.store(&[Part { addr, len, region }], place, data) };
    }
    let mut stream = Walk::new(segments);
    while let Some(chunk) = stream.take(MAX_EAGER) {
        let Some((head, tail)) = data.split_at_checked(chunk.len) else { bail!(Protocol, "eager data is too short") };
        // SAFETY: the parts lie in registered regions that the caller holds.
        unsafe { channels.store(&chunk.parts, chunk.place, head) }?;
        data = tail;
    }
    Ok(())
}
