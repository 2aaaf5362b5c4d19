//! The bytes that prove a path through two NICs and two GPUs: other ones for each connection, so that what an earlier proof left behind
//! proves nothing. Pure.

/// Fills `bytes` with the pattern of a secret.
pub fn fill(secret: &[u8], bytes: &mut [u8]) {
    let mut state =
        secret.iter().fold(0xcbf2_9ce4_8422_2325u64, |state, byte| (state ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)) | 1;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()[..chunk.len()]);
    }
}

/// The first place at which `found`, which begins `at` bytes into the pattern, differs from it.
pub fn difference(expected: &[u8], at: usize, found: &[u8]) -> Option<usize> {
    let expected = expected.get(at..)?;
    found.iter().zip(expected).position(|(found, expected)| found != expected).map(|place| at + place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_secret_has_its_own() {
        let pattern = |secret: &[u8]| {
            let mut bytes = vec![0; 5000];
            fill(secret, &mut bytes);
            bytes
        };
        let (one, other) = (pattern(b"one"), pattern(b"two"));
        assert_eq!(one, pattern(b"one"));
        assert!(one.iter().zip(&other).filter(|(a, b)| a == b).count() < 100);
        assert!(one.windows(4).all(|w| w != [0; 4]));
        let mut wrong = one[1000..2000].to_vec();
        assert_eq!(difference(&one, 1000, &wrong), None);
        wrong[7] ^= 1;
        assert_eq!(difference(&one, 1000, &wrong), Some(1007));
    }
}
