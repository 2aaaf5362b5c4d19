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
