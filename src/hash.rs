//! A quick hash for the maps that every operation looks up several times. Peers choose some of the keys, so each map has a secret of
//! its own: who does not know it cannot choose keys that collide. Knows nothing of what is hashed.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

/// A map with this hash.
pub(crate) type Map<K, V> = std::collections::HashMap<K, V, Secret>;

/// The secret of a map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Secret {
    start: u64,
    factor: u64,
}

impl Default for Secret {
    fn default() -> Secret {
        let random = RandomState::new();
        // An odd factor loses no bits.
        Secret { start: random.hash_one(0u64), factor: random.hash_one(1u64) | 1 }
    }
}

impl BuildHasher for Secret {
    type Hasher = Folded;
    fn build_hasher(&self) -> Folded {
        Folded { state: self.start, factor: self.factor }
    }
}

/// Multiplies by the secret and folds both halves of the product.
pub(crate) struct Folded {
    state: u64,
    factor: u64,
}

#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

impl Hasher for Folded {
    #[inline]
    fn write_u64(&mut self, word: u64) {
        self.state = fold(self.state ^ word, self.factor);
    }
    #[inline]
    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
    #[inline]
    fn write_u8(&mut self, byte: u8) {
        self.write_u64(u64::from(byte));
    }
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.write_u64(u64::from_le_bytes(word));
        }
    }
    #[inline]
    fn finish(&self) -> u64 {
        // Once more: keys in a row leave the first product in a row, too.
        fold(self.state, self.factor.rotate_left(31) | 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Of keys in a row, of multiples, and of keys that differ high up alone: the low bits, which choose the place in a table, and the
    /// high ones, which tell its entries apart, are as different as those of random numbers.
    #[test]
    fn keys_that_are_alike_spread() {
        let secret = Secret::default();
        for step in [1u64, 2, 16, 4096, 1 << 32, 1 << 48, (1 << 40) + 16] {
            let hashes: Vec<u64> = (0..4096u64).map(|i| secret.hash_one(i.wrapping_mul(step))).collect();
            let distinct = |shift: u32| hashes.iter().map(|h| (h >> shift) & 0xFFF).collect::<HashSet<_>>().len();
            assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), 4096, "step {step}");
            // Random numbers leave a share of 1/e out.
            assert!(distinct(0) > 2300 && distinct(52) > 2300, "step {step}: {} and {} of 4096", distinct(0), distinct(52));
        }
    }

    #[test]
    fn each_map_has_a_secret_of_its_own() {
        let (a, b) = (Secret::default(), Secret::default());
        assert!((0..100u64).all(|key| a.hash_one(key) != b.hash_one(key)));
        assert_eq!(a.hash_one([1u8; 13]), a.hash_one([1u8; 13]));
        assert_ne!(a.hash_one([1u8; 13]), a.hash_one([1u8; 14]));
    }
}
