//! How a list of pieces is cut for the pull kernel: joins neighbours, splits long pieces, and picks very long ones for the copy engine.
//! Pure arithmetic; knows nothing of launches.

use crate::types::Piece;

/// Runs from this length on take the copy engine, which is as fast there and leaves the multiprocessors to the application.
pub(crate) const ENGINE: u64 = 4 << 20;
/// Pieces below this length on average are short.
const SHORT: u64 = 512;
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

/// Cuts a list, in its order.
pub(super) struct Cutter<'a> {
    rest: &'a [Piece],
    /// The joined run at hand, as far as it is not given yet.
    run: Piece,
    unit: u64,
    engine: u64,
    short: bool,
}

const NOTHING: Piece = Piece { src: 0, dst: 0, len: 0 };

/// Whether `next` begins where `run` ends, in source and destination.
#[inline]
fn joins(run: &Piece, next: &Piece) -> bool {
    next.src == run.src.wrapping_add(run.len) && next.dst == run.dst.wrapping_add(run.len)
}

impl<'a> Cutter<'a> {
    /// Of a list of `total` bytes; runs of at least `engine` bytes are for the copy engine.
    pub(super) fn new(pieces: &'a [Piece], total: u64, engine: u64) -> Cutter<'a> {
        let short = total < SHORT * pieces.len() as u64;
        Cutter { rest: pieces, run: NOTHING, unit: unit_of(total), engine, short }
    }

    /// Whether most pieces are of a few bytes.
    pub(super) fn is_short(&self) -> bool {
        self.short
    }

    /// Takes the next run, as long as its neighbours allow. False at the end.
    #[inline]
    fn join(&mut self) -> bool {
        while self.run.len == 0 {
            let Some((first, rest)) = self.rest.split_first() else { return false };
            (self.run, self.rest) = (*first, rest);
        }
        while let Some((next, rest)) = self.rest.split_first().filter(|(next, _)| joins(&self.run, next)) {
            self.run.len += next.len;
            self.rest = rest;
        }
        true
    }

    /// Writes what comes next for the kernel, as far as there is room and up to the next run for the copy engine. Returns the pieces
    /// written.
    pub(super) fn fill(&mut self, out: &mut [Piece]) -> usize {
        let mut n = 0;
        while n < out.len() {
            n += self.fill_short(&mut out[n..]);
            if n == out.len() || self.run.len == 0 && !self.join() || self.run.len >= self.engine {
                break;
            }
            n += self.fill_split(&mut out[n..]);
        }
        n
    }

    /// The same for the run at hand, in units.
    fn fill_split(&mut self, out: &mut [Piece]) -> usize {
        let (Piece { mut src, mut dst, mut len }, unit) = (self.run, self.unit);
        let mut n = 0;
        for to in out {
            let part = if len <= unit { len } else { unit - (dst & (LINE - 1)) };
            *to = Piece { src, dst, len: part };
            (src, dst, len, n) = (src + part, dst + part, len - part, n + 1);
            if len == 0 {
                break;
            }
        }
        self.run = Piece { src, dst, len };
        n
    }

    /// The same for pieces that stay as they are, which most are.
    fn fill_short(&mut self, out: &mut [Piece]) -> usize {
        if self.run.len != 0 {
            return 0;
        }
        let unit = self.unit;
        let plain = |(_, pair): &(&mut Piece, &[Piece])| pair[0].len.wrapping_sub(1) < unit && !joins(&pair[0], &pair[1]);
        let n = out.iter_mut().zip(self.rest.windows(2)).take_while(plain).map(|(to, pair)| *to = pair[0]).count();
        self.rest = &self.rest[n..];
        n
    }

    /// The next piece, if it is for the copy engine.
    pub(super) fn long(&mut self) -> Option<Piece> {
        let long = (self.run.len > 0 || self.join()) && self.run.len >= self.engine;
        long.then(|| std::mem::replace(&mut self.run, NOTHING))
    }

    /// Whether everything has been given.
    pub(super) fn is_done(&self) -> bool {
        self.run.len == 0 && self.rest.iter().all(|p| p.len == 0)
    }

    /// The pieces not yet returned, as a new list.
    pub(super) fn remainder(&self) -> Vec<Piece> {
        let run = (self.run.len > 0).then_some(self.run);
        run.into_iter().chain(self.rest.iter().copied().filter(|p| p.len > 0)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Cut {
        Unit(Piece),
        Long(Piece),
    }

    fn cut_some(cutter: &mut Cutter<'_>, most: usize) -> Vec<Cut> {
        let mut out = Vec::new();
        while out.len() < most {
            let mut units = vec![NOTHING; (most - out.len()).min(7)];
            let n = cutter.fill(&mut units);
            out.extend(units[..n].iter().map(|&p| Cut::Unit(p)));
            if n == units.len() {
                continue;
            }
            match cutter.long() {
                Some(long) => out.push(Cut::Long(long)),
                None => break,
            }
        }
        out
    }

    fn cut(pieces: &[Piece]) -> Vec<Cut> {
        cut_some(&mut Cutter::new(pieces, pieces.iter().map(|p| p.len).sum(), ENGINE), usize::MAX)
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
        // Source or destination scattered: nothing joins, and no block is cut.
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
            let mut cutter = Cutter::new(&pieces, total, ENGINE);
            let first = cut_some(&mut cutter, stop);
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
