//! Memory that is described in place of being kept: which bytes of which source lie where. Source and destination are addresses, so a range
//! that was written holds a run of the source's addresses. Thousands of gigabytes cost a few entries, and a byte that is missing, at a
//! wrong place or of a wrong source is found as in real memory.

use crate::types::Part;
use std::collections::BTreeMap;

/// Addresses from here on are described; below them lies memory of this process.
const FIRST: u64 = 1 << 60;

/// Whether an address belongs to described memory.
pub(super) fn is_described(addr: u64) -> bool {
    addr >= FIRST
}

/// What a message carries.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Bytes(Vec<u8>),
    /// Ranges of described memory.
    Ranges(Vec<Part>),
}

impl Content {
    pub(super) fn len(&self) -> usize {
        match self {
            Content::Bytes(bytes) => bytes.len(),
            Content::Ranges(ranges) => ranges.iter().map(|range| range.len as usize).sum(),
        }
    }
}

/// All described memory of a simulation.
#[derive(Default)]
pub(super) struct Positions {
    /// Bytes of addresses that were handed out.
    reserved: u64,
    /// Registered memory, by its first address: how long it is.
    live: BTreeMap<u64, u64>,
    /// What was written: by its first address, how long it is, and the first address of its source.
    runs: BTreeMap<u64, (u64, u64)>,
    /// The first write outside of registered memory.
    stray: Option<String>,
    /// Messages until one arrives with a wrong byte, for a test of the test.
    pub twist: Option<u32>,
}

impl Positions {
    /// Hands out memory.
    pub(super) fn reserve(&mut self, len: u64) -> u64 {
        const GUARD: u64 = 4096;
        let addr = FIRST + self.reserved;
        self.reserved += (len + GUARD).next_multiple_of(GUARD);
        self.live.insert(addr, len);
        addr
    }

    /// Takes memory back: nothing may write it any more.
    pub(super) fn release(&mut self, addr: u64) {
        let Some(len) = self.live.remove(&addr) else { return };
        self.cut(addr, addr + len);
    }

    /// A message arrives in pieces of memory.
    pub(super) fn place(&mut self, ranges: &[Part], parts: &[Part]) {
        let (mut ranges, mut parts) = (ranges.iter(), parts.iter());
        let (mut from, mut to) = (ranges.next().copied(), parts.next().copied());
        let twisted = u64::from(self.twist == Some(0));
        self.twist = self.twist.map(|left| left.wrapping_sub(1));
        while let (Some(source), Some(target)) = (&mut from, &mut to) {
            let len = source.len.min(target.len);
            self.write(target.addr, len, source.addr + twisted);
            for (part, rest) in [(&mut from, &mut ranges), (&mut to, &mut parts)] {
                let Some(left) = part else { continue };
                (left.addr, left.len) = (left.addr + len, left.len - len);
                if left.len == 0 {
                    *part = rest.next().copied();
                }
            }
        }
    }

    fn write(&mut self, to: u64, len: u64, from: u64) {
        let end = to + len;
        let inside = self.live.range(..=to).next_back().is_some_and(|(&addr, &size)| end <= addr + size);
        if !inside {
            self.stray.get_or_insert_with(|| format!("{len} bytes were written at {to:#x}, which is not registered"));
            return;
        }
        self.cut(to, end);
        let (mut to, mut len, mut from) = (to, len, from);
        if let Some((&addr, &(size, source))) = self.runs.range(..to).next_back() {
            if addr + size == to && source + size == from {
                (to, len, from) = (addr, len + size, source);
            }
        }
        if let Some(&(size, source)) = self.runs.get(&end) {
            if from + len == source {
                self.runs.remove(&end);
                len += size;
            }
        }
        self.runs.insert(to, (len, from));
    }

    /// Forgets what lies in a range.
    fn cut(&mut self, start: u64, end: u64) {
        if let Some((&addr, &(size, source))) = self.runs.range(..start).next_back() {
            if addr + size > start {
                self.runs.insert(addr, (start - addr, source));
            }
            if addr + size > end {
                self.runs.insert(end, (addr + size - end, source + end - addr));
            }
        }
        while let Some((&addr, &(size, source))) = self.runs.range(start..end).next() {
            self.runs.remove(&addr);
            if addr + size > end {
                self.runs.insert(end, (addr + size - end, source + end - addr));
            }
        }
    }

    /// Whether a range holds all the bytes of a source.
    pub(super) fn holds(&self, to: u64, len: u64, from: u64) -> bool {
        let run = self.runs.range(..=to).next_back();
        len == 0 || run.is_some_and(|(&addr, &(size, source))| to + len <= addr + size && source + (to - addr) == from)
    }

    /// Why a byte was written where none may be.
    pub(super) fn stray(&self) -> Option<&str> {
        self.stray.as_deref()
    }
}

#[test]
fn described_memory_knows_what_was_written_where() {
    let part = |addr, len| Part { addr, len, region: 0 };
    let mut all = Positions::default();
    let (from, to) = (all.reserve(1000), all.reserve(1000));
    assert!(is_described(from) && to >= from + 1000 && !all.holds(to, 1, from));
    // Out of order, in pieces of other lengths, and twice.
    all.place(&[part(from + 500, 500)], &[part(to + 500, 200), part(to + 700, 300)]);
    assert!(all.holds(to + 600, 400, from + 600) && !all.holds(to + 499, 2, from + 499) && !all.holds(to, 1000, from));
    for _ in 0..2 {
        all.place(&[part(from, 100), part(from + 100, 400)], &[part(to, 500)]);
        assert!(all.holds(to, 1000, from) && all.runs.len() == 1);
    }
    // A byte of another place.
    all.place(&[part(from, 1)], &[part(to + 300, 1)]);
    assert!(all.holds(to, 300, from) && all.holds(to + 301, 699, from + 301) && !all.holds(to, 301, from) && all.runs.len() == 3);
    assert!(all.stray().is_none());
    all.place(&[part(from, 2)], &[part(to + 999, 2)]);
    assert!(all.stray().is_some());
    all.stray = None;
    all.release(to);
    assert!(all.runs.is_empty() && !all.holds(to, 1, from));
    all.place(&[part(from, 1)], &[part(to, 1)]);
    assert!(all.stray().is_some());
}
