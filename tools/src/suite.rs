//! The rows that `--suite` and `demo` measure. Pure.

use crate::case::{Case, Op};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn case(op: Op, total: u64, block: u64) -> Case {
    Case { op, total, block, inflight: 1, bidirectional: false }
}

/// The rows of `--suite`: one block, 64 x 1 MiB, 2048 x 32 KiB, 16384 x 4 KiB, a single 4 KiB, a message of 1 MiB.
pub fn suite() -> Vec<Case> {
    let one_sided = |total, block| [case(Op::Write, total, block), case(Op::Read, total, block)];
    let mut cases = Vec::new();
    for block in [64 * MIB, MIB, 32 * KIB, 4 * KIB] {
        cases.extend(one_sided(64 * MIB, block));
    }
    cases.extend(one_sided(4 * KIB, 4 * KIB));
    cases.push(case(Op::Send, MIB, MIB));
    cases
}

/// The rows of `demo` over channels.
pub fn demo() -> Vec<Case> {
    vec![
        case(Op::Write, 64 * MIB, 64 * MIB),
        case(Op::Read, 64 * MIB, 64 * MIB),
        case(Op::Write, 64 * MIB, 4 * KIB),
        case(Op::Read, 64 * MIB, 32 * KIB),
        case(Op::Write, 4 * KIB, 4 * KIB),
        case(Op::Send, MIB, MIB),
    ]
}

/// The rows of `demo` for direct transfers.
pub fn demo_on_one_host() -> Vec<Case> {
    vec![case(Op::Write, 64 * MIB, 64 * MIB), case(Op::Read, 64 * MIB, 32 * KIB), case(Op::Write, 64 * KIB, 64 * KIB)]
}

/// Lengths of the notifications that `demo` sends.
pub fn demo_notifications() -> Vec<usize> {
    let mut lengths: Vec<usize> = (0..64).map(|i| i * 37).collect();
    lengths.extend([0, 1, 255, 256, 257, 4096, 65_537, 1 << 20, 8 << 20]);
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_covers_its_description() {
        let counts: Vec<(Op, u64)> = suite().iter().map(|c| (c.op, c.total / c.block)).collect();
        for count in [1, 64, 2048, 16384] {
            assert!(counts.contains(&(Op::Write, count)) && counts.contains(&(Op::Read, count)), "{count}");
        }
        assert!(suite().iter().any(|c| c.op == Op::Send && c.total == MIB));
        assert!(suite().iter().any(|c| c.total == 4096));
    }
}
