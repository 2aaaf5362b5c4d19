//! The contents of buffers and the order of blocks. Pure: client and server compute the same from a seed.

use serde::{Deserialize, Serialize};

/// The library's limits: segments of a transfer, and of all transfers in flight on a connection.
const MAX_SEGMENTS: u64 = 1 << 20;
const MAX_IN_FLIGHT: u64 = 4 << 20;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64: every bit of the result depends on every bit of `x`.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn word(seed: u64, index: u64) -> [u8; 8] {
    mix(seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN))).to_le_bytes()
}

/// Writes bytes `offset..` of the endless random pattern of `seed` into `out`.
pub fn fill(seed: u64, offset: u64, out: &mut [u8]) {
    let mut index = offset / 8;
    let skip = (offset % 8) as usize;
    let head = if skip == 0 { 0 } else { (8 - skip).min(out.len()) };
    let (first, rest) = out.split_at_mut(head);
    if !first.is_empty() {
        first.copy_from_slice(&word(seed, index)[skip..skip + head]);
        index += 1;
    }
    for chunk in rest.chunks_mut(8) {
        chunk.copy_from_slice(&word(seed, index)[..chunk.len()]);
        index += 1;
    }
}

/// A permutation of `0..n` that depends on `seed` only (Fisher-Yates).
pub fn permutation(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let j = (u128::from(mix(seed.wrapping_add(GOLDEN.wrapping_mul(i as u64)))) * (i as u128 + 1)) >> 64;
        order.swap(i, j as usize);
    }
    order
}

/// The layout of a transfer's bytes in the two buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes of one transfer.
    pub total: u64,
    /// Bytes of a block; the last one may be shorter.
    pub block: u64,
    /// Transfers in flight, each with its own `total` bytes, one after the other.
    pub inflight: u32,
    /// Seed of the remote order; none: remote blocks are in order.
    pub order: Option<u64>,
}

/// A block: its offsets in the local and the remote buffer of one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset at the initiator.
    pub local: u64,
    /// Offset at the target.
    pub remote: u64,
    /// Bytes.
    pub len: u64,
}

impl Shape {
    /// Bytes of a buffer that holds all transfers in flight.
    pub fn buffer_len(&self) -> Option<u64> {
        self.total.checked_mul(u64::from(self.inflight))
    }

    /// Start of the bytes of transfer number `k` in the buffers.
    pub fn slice(&self, k: u64) -> u64 {
        self.total * (k % u64::from(self.inflight))
    }

    /// The blocks of one transfer, in local order. Whole blocks are permuted remotely; a shorter last one stays last.
    ///
    /// # Errors
    /// Blocks of zero bytes, or more blocks than the library takes.
    pub fn pieces(&self) -> Result<Vec<Piece>, String> {
        let block = self.block.min(self.total);
        if block == 0 {
            return Err("blocks of 0 bytes".to_owned());
        }
        let count = self.total.div_ceil(block);
        if count > MAX_SEGMENTS {
            return Err(format!("{count} blocks of {block} bytes; a transfer has at most {MAX_SEGMENTS} segments"));
        }
        if count * u64::from(self.inflight) > MAX_IN_FLIGHT {
            let all = count * u64::from(self.inflight);
            return Err(format!("{all} segments in {} transfers; at most {MAX_IN_FLIGHT} are in flight at once", self.inflight));
        }
        let whole = (self.total / block) as usize;
        let order = match self.order {
            Some(seed) => permutation(whole, seed),
            None => (0..whole).collect(),
        };
        let mut pieces: Vec<Piece> =
            (0..).zip(order).map(|(i, to)| Piece { local: i * block, remote: to as u64 * block, len: block }).collect();
        let at = whole as u64 * block;
        if at < self.total {
            pieces.push(Piece { local: at, remote: at, len: self.total - at });
        }
        Ok(pieces)
    }
}

/// One of the two buffers of a [`Piece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The initiator's.
    Local,
    /// The target's.
    Remote,
}

/// Compares a whole destination buffer with the source's pattern after the transfer. `target` names the buffer that received.
/// Returns the bytes compared, or a sentence about the first difference.
pub fn compare(contents: &[u8], shape: &Shape, target: Side, seed: u64) -> Result<u64, String> {
    const STEP: usize = 256 << 10;
    let pieces = shape.pieces()?;
    if shape.buffer_len().is_none_or(|needed| needed > contents.len() as u64) {
        return Err(format!("the buffer of {} bytes ends before its transfers do", contents.len()));
    }
    let mut expected = vec![0; STEP.min(usize::try_from(shape.block.min(shape.total)).unwrap_or(STEP))];
    let mut compared = 0;
    for k in 0..u64::from(shape.inflight) {
        let base = shape.slice(k);
        for piece in &pieces {
            let (to, from) = match target {
                Side::Local => (piece.local, piece.remote),
                Side::Remote => (piece.remote, piece.local),
            };
            let mut done = 0;
            while done < piece.len {
                let n = expected.len().min((piece.len - done) as usize);
                let expected = &mut expected[..n];
                fill(seed, base + from + done, expected);
                let at = (base + to + done) as usize;
                let found = &contents[at..at + n];
                if let Some(i) = found.iter().zip(expected.iter()).position(|(a, b)| a != b) {
                    let wrong = found.iter().zip(expected.iter()).filter(|(a, b)| a != b).count();
                    return Err(format!(
                        "byte {} is {:#04x}, must be {:#04x} (from source offset {}; {wrong} of these {n} bytes differ)",
                        at + i,
                        found[i],
                        expected[i],
                        base + from + done + i as u64
                    ));
                }
                done += n as u64;
                compared += n as u64;
            }
        }
    }
    Ok(compared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_does_not_depend_on_how_it_is_split() {
        let mut whole = vec![0; 1000];
        fill(42, 0, &mut whole);
        for (start, len) in [(0, 1), (1, 2), (3, 5), (7, 1), (7, 2), (8, 8), (13, 987), (999, 1), (5, 0)] {
            let mut part = vec![0; len];
            fill(42, start as u64, &mut part);
            assert_eq!(part, whole[start..start + len], "{start}+{len}");
        }
        let mut other = vec![0; 1000];
        fill(43, 0, &mut other);
        assert_ne!(whole, other);
    }

    #[test]
    fn permutations_are_complete_seeded_and_not_the_identity() {
        for n in [0, 1, 2, 3, 1000] {
            let order = permutation(n, 7);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            assert_eq!(order, permutation(n, 7));
        }
        assert_ne!(permutation(1000, 7), permutation(1000, 8));
        assert_ne!(permutation(1000, 7), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn pieces_cover_both_sides_once() {
        for (total, block) in [(1, 1), (10, 3), (10, 10), (10, 100), (4096, 64), (4097, 64)] {
            for order in [None, Some(5)] {
                let pieces = Shape { total, block, inflight: 1, order }.pieces().unwrap();
                let mut local = 0;
                for p in &pieces {
                    assert_eq!(p.local, local, "the local blocks are in order");
                    local += p.len;
                }
                assert_eq!(local, total);
                let mut remote: Vec<_> = pieces.iter().map(|p| (p.remote, p.len)).collect();
                remote.sort_unstable();
                assert_eq!(remote.iter().fold(0, |at, &(start, len)| if start == at { at + len } else { u64::MAX / 2 }), total);
            }
        }
    }

    #[test]
    fn impossible_shapes_are_refused_before_memory_is_allocated() {
        let shape = |total, block, inflight| Shape { total, block, inflight, order: Some(1) };
        assert_eq!(shape(1 << 20, 1, 1).pieces().map(|p| p.len()), Ok(1 << 20));
        for (total, block, inflight, why) in [
            ((1 << 20) + 1, 1, 1, "at most 1048576 segments"),
            (u64::MAX, 1, 1024, "at most 1048576 segments"),
            (1 << 20, 1, 5, "at most 4194304 are in flight"),
            (10, 0, 1, "0 bytes"),
            (0, 1, 1, "0 bytes"),
        ] {
            let refused = shape(total, block, inflight).pieces().unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
        // A peer may send such a shape.
        assert!(compare(&[0; 8], &shape(u64::MAX, 1 << 60, 1024), Side::Local, 1).is_err());
        assert!(compare(&[0; 8], &shape(8, 0, 1), Side::Local, 1).is_err());
    }

    fn moved(shape: &Shape, target: Side, seed: u64) -> Vec<u8> {
        let len = shape.buffer_len().unwrap() as usize;
        let (mut source, mut contents) = (vec![0; len], vec![0; len]);
        fill(seed, 0, &mut source);
        for k in 0..u64::from(shape.inflight) {
            let base = shape.slice(k);
            for p in shape.pieces().unwrap() {
                let (to, from) = if target == Side::Local { (p.local, p.remote) } else { (p.remote, p.local) };
                let (to, from, n) = ((base + to) as usize, (base + from) as usize, p.len as usize);
                contents[to..to + n].copy_from_slice(&source[from..from + n]);
            }
        }
        contents
    }

    #[test]
    fn comparison_accepts_a_correct_move_and_finds_one_wrong_byte() {
        let shape = Shape { total: 1003, block: 17, inflight: 3, order: Some(9) };
        for target in [Side::Local, Side::Remote] {
            let mut contents = moved(&shape, target, 1);
            assert_eq!(compare(&contents, &shape, target, 1), Ok(3009));
            assert!(compare(&contents, &shape, target, 2).is_err(), "another pattern");
            for at in [0, 1002, 1003, 3008] {
                contents[at] ^= 1;
                assert!(compare(&contents, &shape, target, 1).unwrap_err().starts_with(&format!("byte {at} ")));
                contents[at] ^= 1;
            }
            contents.pop();
            assert!(compare(&contents, &shape, target, 1).is_err(), "a short buffer");
        }
    }

    #[test]
    fn comparison_notices_blocks_in_the_wrong_order() {
        let shape = Shape { total: 4096, block: 64, inflight: 1, order: Some(9) };
        let in_order = Shape { order: None, ..shape };
        assert!(compare(&moved(&in_order, Side::Remote, 1), &shape, Side::Remote, 1).is_err());
    }
}
