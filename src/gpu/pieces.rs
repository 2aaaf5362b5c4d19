//! How a list of pieces is cut for the pull kernel: neighbours joined, long ones split, very long ones told apart for the copy engine.
//! Pure arithmetic; knows nothing of launches.

use crate::types::Piece;

/// Runs from this length on take the copy engine, which is as fast there and leaves the multiprocessors to the application.
pub(super) const ENGINE: u64 = 4 << 20;
/// Where pieces are split, the next one's destination is a multiple of this.
const LINE: u64 = 128;

/// What a warp copies at a time, by the bytes of a pull: few bytes are spread over many warps, many bytes need no more of them.
fn unit_of(total: u64) -> u64 {
    match total {
        0..=0x3_ffff => 2 << 10,
        0x4_0000..=0x7f_ffff => 4 << 10,
        _ => 16 << 10,
    }
}

/// What [`Cutter::next`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// For the kernel.
    Unit(Piece),
    /// For the copy engine.
    Long(Piece),
}

/// Cuts a list, in its order.
pub(super) struct Cutter<'a> {
    rest: std::slice::Iter<'a, Piece>,
    /// The joined run at hand, as far as it is not given yet.
    run: Piece,
    unit: u64,
}

const NOTHING: Piece = Piece { src: 0, dst: 0, len: 0 };

impl<'a> Cutter<'a> {
    /// Of a list of `total` bytes.
    pub(super) fn new(pieces: &'a [Piece], total: u64) -> Cutter<'a> {
        Cutter { rest: pieces.iter(), run: NOTHING, unit: unit_of(total) }
    }

    /// The next run that is as long as its neighbours allow.
    fn join(&mut self) -> Option<()> {
        self.run = *self.rest.find(|p| p.len != 0)?;
        while let Some(next) = self.rest.as_slice().first() {
            let run = &mut self.run;
            let joins = next.src == run.src.wrapping_add(run.len) && next.dst == run.dst.wrapping_add(run.len);
            if !joins {
                break;
            }
            run.len += next.len;
            self.rest.next();
        }
        Some(())
    }

    /// Whether everything has been given.
    pub(super) fn is_done(&self) -> bool {
        self.run.len == 0 && self.rest.as_slice().iter().all(|p| p.len == 0)
    }

    /// What has not been given, as a list of its own.
    pub(super) fn remainder(&self) -> Vec<Piece> {
        let run = (self.run.len > 0).then_some(self.run);
        run.into_iter().chain(self.rest.as_slice().iter().copied().filter(|p| p.len > 0)).collect()
    }

    /// Gives the last answer back, which was [`Cut::Long`].
    pub(super) fn put_back(&mut self, long: Piece) {
        self.run = long;
    }
}

impl Iterator for Cutter<'_> {
    type Item = Cut;

    #[inline]
    fn next(&mut self) -> Option<Cut> {
        if self.run.len == 0 {
            self.join()?;
        }
        let run = &mut self.run;
        if run.len >= ENGINE {
            return Some(Cut::Long(std::mem::replace(run, NOTHING)));
        }
        if run.len <= self.unit {
            return Some(Cut::Unit(std::mem::replace(run, NOTHING)));
        }
        let len = self.unit - (run.dst & (LINE - 1));
        let unit = Piece { len, ..*run };
        *run = Piece { src: run.src + len, dst: run.dst + len, len: run.len - len };
        Some(Cut::Unit(unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(pieces: &[Piece]) -> Vec<Cut> {
        Cutter::new(pieces, pieces.iter().map(|p| p.len).sum()).collect()
    }

    /// Source of every destination byte, in 64-byte steps plus both edges.
    fn spread(pieces: impl Iterator<Item = Piece>) -> Vec<(u64, u64, u64)> {
        let mut out: Vec<(u64, u64, u64)> = Vec::new();
        for p in pieces.filter(|p| p.len > 0) {
            match out.last_mut() {
                Some((dst, src, len)) if *dst + *len == p.dst && *src + *len == p.src => *len += p.len,
                _ => out.push((p.dst, p.src, p.len)),
            }
        }
        out
    }

    #[test]
    fn neighbours_are_joined_and_long_runs_go_to_the_copy_engine() {
        let blocks: Vec<Piece> =
            (0..2048).map(|i| Piece { src: 0x1000 + i * 4096, dst: 0x90_0000 + i * 4096, len: 4096 }).collect();
        assert_eq!(cut(&blocks), [Cut::Long(Piece { src: 0x1000, dst: 0x90_0000, len: 8 << 20 })]);
        // One side scattered: nothing joins, and no block is cut.
        let apart: Vec<Piece> = blocks.iter().map(|p| Piece { src: p.src * 2, ..*p }).collect();
        assert_eq!(cut(&apart), apart.iter().map(|&p| Cut::Unit(p)).collect::<Vec<_>>());
    }

    #[test]
    fn few_bytes_are_spread_over_warps() {
        let units = |len| cut(&[Piece { src: 5, dst: 4096, len }]).len();
        assert_eq!((units(16), units(2048), units(4096), units(64 << 10)), (1, 1, 2, 32));
        assert_eq!(units(1 << 20), 256);
    }

    proptest! {
        /// Every byte goes where it belongs, once and in order, whatever joins; no unit is longer than it may be; and what is left at any
        /// moment is the rest.
        #[test]
        fn cuts_are_the_list(
            lens in proptest::collection::vec((0u64..70_000, any::<bool>(), any::<bool>()), 1..60), long in 0u64..12 << 20, stop in 0usize..200,
        ) {
            let (mut src, mut dst) = (1 << 40, 3);
            let mut pieces = Vec::new();
            for (i, &(len, a, b)) in lens.iter().enumerate() {
                let len = if i == lens.len() / 2 { len + long } else { len };
                pieces.push(Piece { src, dst, len });
                src += len + u64::from(a) * 7;
                dst += len + u64::from(b) * 13;
            }
            let total = pieces.iter().map(|p| p.len).sum();
            let flat = |c: Cut| match c { Cut::Unit(p) | Cut::Long(p) => p };
            let mut cutter = Cutter::new(&pieces, total);
            let first: Vec<Cut> = cutter.by_ref().take(stop).collect();
            for c in &first {
                match c {
                    Cut::Unit(p) => prop_assert!(p.len > 0 && p.len <= 16 << 10),
                    Cut::Long(p) => prop_assert!(p.len >= ENGINE),
                }
            }
            let rest = cutter.remainder();
            prop_assert_eq!(rest.is_empty(), cutter.is_done());
            let given = first.into_iter().map(flat).chain(rest);
            prop_assert_eq!(spread(given), spread(pieces.iter().copied()));
        }
    }
}
