//! Where blocks lie among the allocations of their owner. Pure arithmetic.

use super::exports::Stretch;
use crate::status::{bail, Result};
use crate::types::Piece;

/// Whether `len` bytes at `at` lie inside of `room`. Without branches: it is asked for every block.
#[inline]
pub(super) fn holds(room: u64, at: u64, len: u64) -> bool {
    (len != 0) & (at < room) & (len <= room.wrapping_sub(at))
}

/// The stretch that begins last at or before an address.
fn before(stretches: &[Stretch], addr: u64) -> Option<Stretch> {
    let after = stretches.partition_point(|stretch| stretch.base <= addr);
    after.checked_sub(1).map(|at| stretches[at])
}

/// Turns `src` of the pieces from `begin` on into where it is visible here, each inside one allocation, and calls `each` with their exports.
///
/// # Errors
/// `Internal` for a piece outside of all allocations.
pub(super) fn locate(pieces: &mut Vec<Piece>, begin: usize, stretches: &[Stretch], mut each: impl FnMut(u32)) -> Result<()> {
    if let [only] = stretches {
        each(only.id);
        let mut inside = true;
        for piece in &mut pieces[begin..] {
            let at = piece.src.wrapping_sub(only.base);
            inside &= holds(only.len, at, piece.len);
            piece.src = only.addr.wrapping_add(at);
        }
        if !inside {
            bail!(Internal, "a block outside of its allocation");
        }
        return Ok(());
    }
    let mut last: Option<Stretch> = None;
    for mut piece in pieces.split_off(begin) {
        while piece.len > 0 {
            let known = last.filter(|stretch| stretch.locate(piece.src, 1).is_some());
            let Some(stretch) = known.or_else(|| before(stretches, piece.src).filter(|s| s.locate(piece.src, 1).is_some()))
            else {
                bail!(Internal, "a block outside of its allocations")
            };
            if last.is_none_or(|last| last.id != stretch.id) {
                each(stretch.id);
                last = Some(stretch);
            }
            let at = piece.src - stretch.base;
            let len = piece.len.min(stretch.len - at);
            pieces.push(Piece { src: stretch.addr + at, dst: piece.dst, len });
            piece = Piece { src: piece.src + len, dst: piece.dst + len, len: piece.len - len };
        }
    }
    Ok(())
}

/// The export in which a piece of this engine begins; 0 where there is none.
pub(super) fn export_of(stretches: &[Stretch], piece: &Piece) -> u32 {
    before(stretches, piece.src).map_or(0, |stretch| stretch.id)
}

/// Whether allocations, rising, hold all of a range without a gap.
pub(super) fn cover(stretches: &[Stretch], (begin, end): (u64, u64)) -> bool {
    let mut at = begin;
    if !stretches.windows(2).all(|pair| pair[0].base < pair[1].base) {
        return false;
    }
    for stretch in stretches {
        if stretch.base <= at && at - stretch.base < stretch.len {
            at = stretch.base + stretch.len;
        }
    }
    at >= end
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 100;

    /// Two allocations that touch, from 1000 to 1200, and one after a gap, from 1300 on. Here they lie apart.
    fn allocations() -> Vec<Stretch> {
        let stretch = |id, base, addr| Stretch { id, base, len: LEN, addr };
        vec![stretch(7, 1000, 50_000), stretch(8, 1100, 20_000), stretch(9, 1300, 70_000)]
    }

    /// Pieces as source, destination and length, and the exports.
    type Located = (Vec<(u64, u64, u64)>, Vec<u32>);

    fn located(stretches: &[Stretch], src: u64, len: u64) -> Result<Located> {
        let before = Piece { src: 1, dst: 2, len: 3 };
        let (mut pieces, mut exports) = (vec![before, Piece { src, dst: 5, len }], Vec::new());
        locate(&mut pieces, 1, stretches, |id| exports.push(id))?;
        assert_eq!(pieces.remove(0), before, "pieces before the first are left alone");
        Ok((pieces.iter().map(|piece| (piece.src, piece.dst, piece.len)).collect(), exports))
    }

    #[test]
    fn a_piece_is_cut_where_one_allocation_ends_and_the_next_begins() {
        let all = allocations();
        assert_eq!(located(&all, 1010, 90).unwrap(), (vec![(50_010, 5, 90)], vec![7]));
        assert_eq!(located(&all, 1010, 91).unwrap(), (vec![(50_010, 5, 90), (20_000, 95, 1)], vec![7, 8]));
        assert_eq!(located(&all, 1000, 200).unwrap(), (vec![(50_000, 5, 100), (20_000, 105, 100)], vec![7, 8]));
        assert_eq!(located(&all, 1399, 1).unwrap(), (vec![(70_099, 5, 1)], vec![9]));
        assert_eq!(located(&all[..1], 1099, 1).unwrap(), (vec![(50_099, 5, 1)], vec![7]));
    }

    #[test]
    fn an_export_is_named_when_the_pieces_enter_it() {
        let mut pieces: Vec<Piece> = [1000, 1050, 1150, 1020].map(|src| Piece { src, dst: 0, len: 10 }).to_vec();
        let mut exports = Vec::new();
        locate(&mut pieces, 0, &allocations(), |id| exports.push(id)).unwrap();
        assert_eq!(exports, [7, 8, 7]);
        assert_eq!(pieces.iter().map(|piece| piece.src).collect::<Vec<_>>(), [50_000, 50_050, 20_050, 50_020]);
    }

    #[test]
    fn a_piece_outside_of_all_allocations_is_an_error() {
        let all = allocations();
        for (src, len) in [(999, 1), (1100, 101), (1200, 1), (1299, 2), (1300, 101), (1400, 1), (u64::MAX, 1)] {
            assert!(located(&all, src, len).is_err(), "{len} bytes from {src}");
        }
        for (src, len) in [(999, 2), (1000, 101), (1100, 1)] {
            assert!(located(&all[..1], src, len).is_err(), "{len} bytes from {src}");
        }
        assert!(located(&[], 1000, 1).is_err());
    }

    #[test]
    fn a_stretch_holds_what_lies_in_it_whole() {
        let stretch = allocations()[0];
        let found = [(1000, 100), (1000, 1), (1099, 1), (1040, 60)].map(|(addr, len)| stretch.locate(addr, len));
        assert_eq!(found, [Some(50_000), Some(50_000), Some(50_099), Some(50_040)]);
        for (addr, len) in [(999, 1), (1100, 0), (1100, 1), (1000, 101), (1099, 2), (1040, u64::MAX)] {
            assert_eq!(stretch.locate(addr, len), None, "{len} bytes from {addr}");
        }
    }

    #[test]
    fn the_export_of_a_piece_is_where_it_begins() {
        let export = |src| export_of(&allocations(), &Piece { src, dst: 0, len: 1 });
        assert_eq!([999, 1000, 1099, 1100, 1300].map(export), [0, 7, 7, 8, 9]);
    }

    #[test]
    fn allocations_cover_a_range_when_they_leave_no_gap() {
        let mut all = allocations();
        for (range, covered) in [
            ((1000, 1200), true),
            ((1050, 1101), true),
            ((1300, 1400), true),
            ((999, 1100), false),
            ((1000, 1201), false),
            ((1150, 1350), false),
            ((1200, 1201), false),
            ((1300, 1401), false),
        ] {
            assert_eq!(cover(&all, range), covered, "{range:?}");
        }
        all.swap(0, 1);
        assert!(!cover(&all, (1000, 1200)), "not in rising order");
        assert!(!cover(&[all[0], all[0]], (1100, 1200)), "one allocation twice");
    }
}
