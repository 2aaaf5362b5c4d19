//! The chunk plan: a transfer is a stream of bytes over a list of segments, and chunks are cut off its front. Both engines walk
//! their own list in the same order by the same lengths, so a chunk's length alone describes it. Pure.

use crate::types::{Part, Place, Segment};

/// A chunk and its pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Its pieces, in stream order; neighbours in memory are merged.
    pub parts: Vec<Part>,
    /// Bytes of all pieces.
    pub len: usize,
    /// The place of its memory here.
    pub place: Place,
    /// The place of its memory at the peer; meaningless if unknown (see [`Walk::take_exact`]).
    pub peer: Place,
}

/// The limits of a path's chunks. Both engines compute the same limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkLimits {
    /// Bytes.
    pub bytes: usize,
    /// Pieces at the sender.
    pub pieces: usize,
    /// Segments that a chunk crosses: the most pieces at the receiver, where adjacent ones may not merge.
    pub crossed: usize,
}

/// Most pieces of one chunk at the sender; a more scattered chunk is cut shorter.
pub(crate) const MAX_PARTS: usize = 512;
/// Most segments that one chunk crosses, merged or not, and so the most pieces at the receiver.
pub(crate) const MAX_CROSSED: usize = 4096;

/// A place in a list of segments.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    next: usize,
    /// Bytes of segment `next` already taken.
    taken: u64,
}

/// A walk along a transfer's stream: the part not yet cut into chunks.
#[derive(Debug)]
pub(crate) struct Walk {
    segments: Vec<Segment>,
    at: Cursor,
    total: u64,
    remaining: u64,
    /// Where each segment begins in the stream; empty until a chunk is cut again.
    starts: Vec<u64>,
}

impl Walk {
    pub(crate) fn new(segments: Vec<Segment>) -> Walk {
        let total = segments.iter().map(|s| s.len).sum();
        Walk { segments, at: Cursor::default(), total, remaining: total, starts: Vec::new() }
    }

    /// Bytes taken so far: the offset of the next chunk.
    pub(crate) fn offset(&self) -> u64 {
        self.total - self.remaining
    }

    /// How many segments there are.
    pub(crate) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// The list of segments, to reuse its memory.
    pub(crate) fn into_list(self) -> Vec<Segment> {
        self.segments
    }

    /// Bytes not yet taken.
    pub(crate) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The places of the next chunk: here, and at the peer.
    pub(crate) fn next_places(&self) -> Option<(Place, Place)> {
        self.segments.get(self.at.next).map(|s| (s.place, s.peer))
    }

    /// The places of the byte at `offset`.
    pub(crate) fn places_at(&mut self, offset: u64) -> Option<(Place, Place)> {
        let at = self.seek(offset);
        self.segments.get(at.next).map(|s| (s.place, s.peer))
    }

    /// Cuts the next chunk: at most `max` bytes and [`MAX_PARTS`] pieces, of one place at each engine.
    pub(crate) fn take(&mut self, max: usize) -> Option<Chunk> {
        self.take_within(ChunkLimits { bytes: max, pieces: MAX_PARTS, crossed: MAX_CROSSED })
    }

    /// Cuts the next chunk within these limits, of one place at each engine.
    pub(crate) fn take_within(&mut self, limits: ChunkLimits) -> Option<Chunk> {
        let (chunk, at) = cut(&self.segments, self.at, (limits.bytes as u64, limits.pieces, limits.crossed), true)?;
        self.at = at;
        self.remaining -= chunk.len as u64;
        Some(chunk)
    }

    /// Cuts exactly `len` bytes, as the sender announced, whatever the peer's place. `None` if fewer remain, or if the chunk
    /// would mix places of local memory or cross more than `crossed` segments, which a correct sender never announces.
    pub(crate) fn take_exact(&mut self, len: usize, crossed: usize) -> Option<Chunk> {
        if len as u64 > self.remaining {
            return None;
        }
        let (chunk, at) = cut(&self.segments, self.at, (len as u64, usize::MAX, crossed), false)?;
        self.at = at;
        self.remaining -= chunk.len as u64;
        (chunk.len == len).then_some(chunk)
    }

    /// Cuts a chunk at `offset` again, within these limits.
    pub(crate) fn again_within(&mut self, offset: u64, limits: ChunkLimits) -> Option<Chunk> {
        let at = self.seek(offset);
        cut(&self.segments, at, (limits.bytes as u64, limits.pieces, limits.crossed), true).map(|(chunk, _)| chunk)
    }

    /// Cuts exactly `len` bytes at `offset` again; as [`Walk::take_exact`].
    pub(crate) fn again_exact(&mut self, offset: u64, len: usize, crossed: usize) -> Option<Chunk> {
        let at = self.seek(offset);
        let (chunk, _) = cut(&self.segments, at, (len as u64, usize::MAX, crossed), false)?;
        (chunk.len == len).then_some(chunk)
    }

    /// The place of a byte of the stream.
    fn seek(&mut self, offset: u64) -> Cursor {
        if self.starts.is_empty() {
            let mut start = 0;
            for segment in &self.segments {
                self.starts.push(start);
                start += segment.len;
            }
        }
        if offset >= self.total {
            return Cursor { next: self.segments.len(), taken: 0 };
        }
        // Segments are never empty, so no two begin at the same byte.
        let next = self.starts.partition_point(|&start| start <= offset).saturating_sub(1);
        Cursor { next, taken: self.starts.get(next).map_or(0, |start| offset - start) }
    }
}

/// Cuts a chunk of at most `max` bytes at a place in a list; the chunk, and the place behind it.
fn cut(
    segments: &[Segment],
    mut at: Cursor,
    (max, max_parts, max_crossed): (u64, usize, usize),
    split_on_peer: bool,
) -> Option<(Chunk, Cursor)> {
    let first = *segments.get(at.next)?;
    // Blocks mostly have the same length.
    let alike = (max.div_ceil(first.len) as usize).min(max_parts.min(max_crossed)).min(segments.len() - at.next);
    let mut chunk = Chunk { parts: Vec::with_capacity(alike), len: 0, place: first.place, peer: first.peer };
    let mut left = max;
    let mut crossed = 0;
    while left > 0 && crossed < max_crossed {
        let Some(segment) = segments.get(at.next) else { break };
        if segment.place != chunk.place || (split_on_peer && segment.peer != chunk.peer) {
            break;
        }
        let addr = segment.addr + at.taken;
        let len = (segment.len - at.taken).min(left);
        let full = chunk.parts.len() == max_parts;
        match chunk.parts.last_mut() {
            Some(last) if last.addr + last.len == addr && last.region == segment.region => last.len += len,
            _ if full => break,
            _ => chunk.parts.push(Part { addr, len, region: segment.region }),
        }
        left -= len;
        crossed += 1;
        at.taken += len;
        if at.taken == segment.len {
            at = Cursor { next: at.next + 1, taken: 0 };
        }
    }
    if chunk.parts.capacity() > 2 * chunk.parts.len() {
        chunk.parts.shrink_to_fit();
    }
    chunk.len = (max - left) as usize;
    (chunk.len > 0).then_some((chunk, at))
}

/// The chunk length of a transfer of `total` bytes: small enough that every channel gets at least two chunks, large enough to
/// keep the cost per message small.
pub(crate) fn chunk_len(total: u64, channels: usize, max: usize) -> usize {
    const SMALLEST: u64 = 64 << 10;
    const PAGE: u64 = nccl_net_abi::PAGE as u64;
    let share = total.div_ceil(2 * channels.max(1) as u64).next_multiple_of(PAGE);
    (share.max(SMALLEST) as usize).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Segments of one transfer at both engines: the same lengths, different addresses and places.
    fn sides() -> impl Strategy<Value = (Vec<Segment>, Vec<Segment>)> {
        proptest::collection::vec((0u64..1 << 40, 0u64..1 << 40, 1u64..70_000, 0u8..3, 0u8..3, any::<bool>()), 0..200).prop_map(
            |items| {
                let (mut a, mut b): (Vec<Segment>, Vec<Segment>) = (Vec::new(), Vec::new());
                for (i, (x, y, len, dx, dy, near)) in items.into_iter().enumerate() {
                    // Adjacent blocks are common and exercise the merging.
                    let x = if near && i > 0 { a[i - 1].addr + a[i - 1].len } else { x };
                    a.push(Segment { addr: x, len, region: 0, place: Place(dx), peer: Place(dy) });
                    b.push(Segment { addr: y, len, region: 0, place: Place(dy), peer: Place(dx) });
                }
                (a, b)
            },
        )
    }

    fn bytes(parts: &[Part]) -> impl Iterator<Item = u64> + '_ {
        parts.iter().flat_map(|p| p.addr..p.addr + p.len)
    }

    proptest! {
        #[test]
        fn both_engines_cut_the_same_plan((sender, receiver) in sides(), max in 1usize..200_000) {
            let total: u64 = sender.iter().map(|s| s.len).sum();
            let (mut out, mut inc) = (Walk::new(sender.clone()), Walk::new(receiver.clone()));
            let (mut sent, mut got) = (Vec::new(), Vec::new());
            while let Some(chunk) = out.take(max) {
                prop_assert!(chunk.len <= max && chunk.parts.len() <= MAX_PARTS);
                prop_assert_eq!(chunk.parts.iter().map(|p| p.len).sum::<u64>(), chunk.len as u64);
                let theirs = inc.take_exact(chunk.len, MAX_CROSSED);
                prop_assert!(theirs.is_some());
                let theirs = theirs.unwrap();
                prop_assert_eq!((theirs.len, theirs.place), (chunk.len, chunk.peer));
                sent.extend(chunk.parts);
                got.extend(theirs.parts);
            }
            prop_assert_eq!((out.remaining(), inc.remaining()), (0, 0));
            let whole = |s: &[Segment]| s.iter().map(|s| Part { addr: s.addr, len: s.len, region: 0 }).collect::<Vec<_>>();
            if total < 300_000 {
                prop_assert!(bytes(&sent).eq(bytes(&whole(&sender))));
                prop_assert!(bytes(&got).eq(bytes(&whole(&receiver))));
            }
        }

        #[test]
        fn a_wrong_announcement_is_refused((_, receiver) in sides(), extra in 1u64..1000) {
            let mut stream = Walk::new(receiver);
            let too_much = stream.remaining() + extra;
            prop_assert_eq!(stream.take_exact(too_much as usize, MAX_CROSSED), None);
        }

        #[test]
        fn chunk_lengths_stay_in_their_limits(total in 1u64..1 << 40, channels in 1usize..64, max in 4096usize..16 << 20) {
            let len = chunk_len(total, channels, max);
            prop_assert!(len >= 4096.min(max) && len <= max);
        }
    }

    /// The peer chooses the lengths: an announcement must not cost more memory than its parts need.
    #[test]
    fn a_chunk_allocates_only_for_its_own_parts() {
        let segment = |addr, len| Segment { addr, len, region: 0, place: Place::HOST, peer: Place::HOST };
        let pair = |i: u64| [segment(i << 21, 1), segment((i << 21) + 4096, (512 << 10) - 1)];
        let mut stream = Walk::new((0..100_000).flat_map(pair).collect());
        let chunks: Vec<Chunk> = (0..1000).map(|_| stream.take_exact(512 << 10, MAX_CROSSED).unwrap()).collect();
        let room: usize = chunks.iter().map(|c| c.parts.capacity()).sum();
        assert!(room <= 8 * chunks.len(), "{room} parts");
    }

    #[test]
    fn both_engines_limit_the_segments_of_a_chunk() {
        let segment = |i: u64| Segment { addr: 10 * i, len: 10, region: 0, place: Place::HOST, peer: Place::HOST };
        let list: Vec<Segment> = (0..2 * MAX_CROSSED as u64).map(segment).collect();
        assert_eq!(Walk::new(list.clone()).take(1 << 20).unwrap().len, 10 * MAX_CROSSED);
        assert!(Walk::new(list.clone()).take_exact(10 * MAX_CROSSED, MAX_CROSSED).is_some());
        assert_eq!(Walk::new(list).take_exact(10 * MAX_CROSSED + 1, MAX_CROSSED), None);
    }

    #[test]
    fn neighbours_in_memory_become_one_part() {
        let segment = |addr, len| Segment { addr, len, region: 0, place: Place::HOST, peer: Place::HOST };
        let mut stream = Walk::new((0..1000).map(|i| segment(4096 * i, 4096)).collect());
        let chunk = stream.take(512 << 10).unwrap();
        assert_eq!(chunk.parts, [Part { addr: 0, len: 512 << 10, region: 0 }]);
    }

    #[test]
    fn every_channel_gets_two_chunks() {
        const K: usize = 1 << 10;
        let cases =
            [(64 << 20, 4, 512), (2 << 20, 4, 256), (1 << 20, 4, 128), (1 << 20, 1, 512), (100, 4, 64), (1 << 20, 16, 64)];
        for (total, channels, expected) in cases {
            assert_eq!(chunk_len(total, channels, 512 * K), expected * K, "{total} bytes over {channels}");
        }
        assert_eq!(chunk_len((600 << 10) + 1, 3, 512 * K), 104 * K, "whole pages");
        assert_eq!(chunk_len(1 << 30, 1, 8 * K), 8 * K);
    }

    #[test]
    fn only_neighbours_of_one_region_are_merged() {
        let segment = |addr, region| Segment { addr, len: 10, region, place: Place::HOST, peer: Place::HOST };
        let part = |addr, len, region| Part { addr, len, region };
        let mut stream = Walk::new(vec![segment(0, 0), segment(10, 1), segment(30, 1), segment(40, 1)]);
        let chunk = stream.take(1000).unwrap();
        assert_eq!(chunk.parts, [part(0, 10, 0), part(10, 10, 1), part(30, 20, 1)]);
    }

    #[test]
    fn the_receiver_limits_the_segments_of_a_chunk() {
        // One byte each: adjacent at the sender, scattered at the receiver.
        let segment = |addr| Segment { addr, len: 1, region: 0, place: Place::HOST, peer: Place::HOST };
        let n = MAX_CROSSED as u64 + 7;
        let mut out = Walk::new((0..n).map(segment).collect());
        let mut inc = Walk::new((0..n).map(|i| segment(2 * i)).collect());
        assert_eq!(inc.take_exact(MAX_CROSSED + 1, MAX_CROSSED), None, "a sender that ignores the limit");
        let mut inc = Walk::new((0..n).map(|i| segment(2 * i)).collect());
        let first = out.take(1 << 20).unwrap();
        assert_eq!((first.len, first.parts.len(), out.offset()), (MAX_CROSSED, 1, MAX_CROSSED as u64));
        assert_eq!(inc.take_exact(first.len, MAX_CROSSED).unwrap().parts.len(), MAX_CROSSED);
        assert_eq!((out.take(1 << 20).unwrap().len, inc.take_exact(7, MAX_CROSSED).unwrap().len), (7, 7));
        assert_eq!((out.take(1), inc.take_exact(1, MAX_CROSSED), out.segments()), (None, None, n as usize));
    }
}
