//! Plans where the bytes of a device receive go inside its slot's bounce region. Pure: touches no memory.
//! Knows nothing of sockets.

use nccl_net_abi::{loadMeta, MAX_SLOT_ENTRIES, PAGE};

/// How the payload of a device receive is cut into bounce-buffer fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragmentation {
    /// One descriptor per message.
    Whole,
    /// Contiguous fragments of this many bytes.
    Fixed(usize),
    /// Fragments of random size, alignment and offset, described in random order.
    Random,
}

/// Most fragments of a message; by the contract 2,048 are too many.
pub const MAX_FRAGMENTS: usize = MAX_SLOT_ENTRIES - 1;
const MAX_GAP: usize = 16;

/// A small random number generator (xorshift64*), for test fragmentation only.
pub struct Rng(u64);

impl Rng {
    /// A generator with a distinct sequence for each seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Bytes of bounce memory a slot needs for messages of up to `limit` bytes.
pub fn region_len(limit: usize) -> usize {
    (limit + MAX_FRAGMENTS * MAX_GAP).next_multiple_of(PAGE)
}

/// Plans a message of `len` bytes. `plan` receives the fragments in the order of the message, with `src_off` counted from
/// `region`, the slot's offset in the bounce buffer.
pub fn plan(mode: Fragmentation, len: usize, region: usize, rng: &mut Rng, plan: &mut Vec<loadMeta>) {
    plan.clear();
    let (largest, fixed) = match mode {
        Fragmentation::Whole => (len, true),
        Fragmentation::Fixed(bytes) => (bytes, true),
        Fragmentation::Random => ([64, 1024, 4096, 16384][rng.below(4)], false),
    };
    let mut done = 0;
    while done < len {
        let left = len - done;
        let needed = left.div_ceil(MAX_FRAGMENTS - plan.len());
        let wanted = if fixed { largest } else { 1 + rng.below(largest) };
        let size = wanted.max(needed).min(left);
        plan.push(loadMeta { src_off: (region + done) as u32, len: size as u32, dst_off: done as u64 });
        done += size;
    }
    if !fixed {
        let mut places: Vec<usize> = (0..plan.len()).collect();
        rng.shuffle(&mut places);
        let mut at = region;
        for place in places {
            at += rng.below(MAX_GAP);
            plan[place].src_off = at as u32;
            at += plan[place].len as usize;
        }
    }
}

/// Puts descriptors into publishing order.
pub fn publish_order(mode: Fragmentation, rng: &mut Rng, plan: &mut [loadMeta]) {
    if mode == Fragmentation::Random {
        rng.shuffle(plan);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mode: Fragmentation, len: usize, limit: usize, rng: &mut Rng) {
        let region = region_len(limit) * 3;
        let mut entries = Vec::new();
        plan(mode, len, region, rng, &mut entries);
        assert!(!entries.is_empty() && entries.len() <= MAX_FRAGMENTS);
        let mut at = 0;
        for e in &entries {
            assert_eq!(e.dst_off, at);
            assert!(e.len > 0);
            assert!(e.src_off as usize >= region && (e.src_off + e.len) as usize <= region + region_len(limit));
            at += u64::from(e.len);
        }
        assert_eq!(at, len as u64);
        publish_order(mode, rng, &mut entries);
        entries.sort_by_key(|e| e.src_off);
        assert!(entries.windows(2).all(|w| w[0].src_off + w[0].len <= w[1].src_off), "fragments overlap");
    }

    #[test]
    fn covers_the_message_inside_the_region() {
        let mut rng = Rng::new(7);
        for limit in [4096, 512 << 10, 128 << 20] {
            for len in [1, 2, 15, 16, 4095, 4096, limit - 1, limit].into_iter().filter(|l| *l <= limit) {
                for mode in [Fragmentation::Whole, Fragmentation::Fixed(1), Fragmentation::Fixed(4096), Fragmentation::Random] {
                    for _ in 0..4 {
                        check(mode, len, limit, &mut rng);
                    }
                }
            }
        }
    }

    #[test]
    fn whole_is_one_entry() {
        let mut entries = Vec::new();
        plan(Fragmentation::Whole, 100_000, 0, &mut Rng::new(1), &mut entries);
        assert_eq!(entries, [loadMeta { src_off: 0, len: 100_000, dst_off: 0 }]);
    }
}
