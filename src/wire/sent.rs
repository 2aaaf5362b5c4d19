//! The records that an engine has sealed, until the peer has acknowledged them. When the control connection moves to another socket, those
//! that the peer has not opened are written again, byte by byte the same: no record number is used for two contents. Pure.

use crate::status::{bail, Result};
use std::collections::VecDeque;

/// Memory of an acknowledged record is used again up to this size.
const KEEP_BYTES: usize = 1 << 20;

/// Records in the order of their numbers: written ones that are not acknowledged, then those that the socket has yet to take.
#[derive(Debug, Default)]
pub(crate) struct SentRecords {
    records: VecDeque<Vec<u8>>,
    /// The number of the first one: all before it are acknowledged.
    first: u64,
    /// How many of them the socket has taken, and how many bytes of the next one.
    written: usize,
    part: usize,
    /// Bytes of all, and those that the socket has not taken.
    bytes: usize,
    unwritten: usize,
    /// The last acknowledgement inside the stream.
    said: u64,
    /// Memory of an acknowledged record.
    spare: Vec<u8>,
}

impl SentRecords {
    /// `first`: the number of the next record.
    pub(crate) fn new(first: u64) -> SentRecords {
        SentRecords { first, ..SentRecords::default() }
    }

    /// Adds the next record.
    pub(crate) fn push(&mut self, record: Vec<u8>) {
        self.bytes += record.len();
        self.unwritten += record.len();
        self.records.push_back(record);
    }

    /// The next bytes for the socket.
    pub(crate) fn next(&self) -> Option<&[u8]> {
        self.records.get(self.written)?.get(self.part..)
    }

    /// The socket has taken so many of these bytes.
    pub(crate) fn wrote(&mut self, n: usize) {
        self.unwritten -= n;
        self.part += n;
        if self.records.get(self.written).is_some_and(|record| record.len() == self.part) {
            (self.written, self.part) = (self.written + 1, 0);
        }
    }

    /// Bytes that the socket has not taken.
    pub(crate) fn unwritten(&self) -> usize {
        self.unwritten
    }

    /// Bytes that are kept.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The peer says in the stream that it has opened all records below `number`.
    ///
    /// # Errors
    /// `Protocol` for a number that is impossible.
    pub(crate) fn acknowledged(&mut self, number: u64) -> Result<()> {
        // Records that are written again repeat what they said before.
        if number < self.said {
            bail!(Protocol, "the peer has opened {number} records of the control connection, after {}", self.said);
        }
        self.check(number)?;
        self.said = number;
        self.drop_below(number);
        Ok(())
    }

    /// Another socket takes the place of the old one. The peer has opened all records below `number`: the others are written to it.
    ///
    /// # Errors
    /// `Protocol` for a number that is impossible; nothing has changed then.
    pub(crate) fn resume(&mut self, number: u64) -> Result<()> {
        if number < self.first {
            bail!(Protocol, "the peer has opened {number} records of the control connection, after {}", self.first);
        }
        self.check(number)?;
        self.drop_below(number);
        (self.written, self.part, self.unwritten) = (0, 0, self.bytes);
        Ok(())
    }

    fn check(&self, number: u64) -> Result<()> {
        let written = self.first + self.written as u64;
        if number > written {
            bail!(Protocol, "the peer has opened {number} records of the control connection, of {written} sent");
        }
        Ok(())
    }

    fn drop_below(&mut self, number: u64) {
        while self.first < number {
            let Some(record) = self.records.pop_front() else { break };
            self.bytes -= record.len();
            (self.first, self.written) = (self.first + 1, self.written - 1);
            if (self.spare.capacity() + 1..=KEEP_BYTES).contains(&record.capacity()) {
                self.spare = record;
            }
        }
    }

    /// Memory for another record.
    pub(crate) fn spare(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.spare)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use proptest::prelude::*;

    /// The records `first..end`, of which each is its number in some bytes.
    fn with(first: u64, end: u64) -> SentRecords {
        let mut sent = SentRecords::new(first);
        (first..end).for_each(|n| sent.push(vec![n as u8; 1 + n as usize % 7]));
        sent
    }

    fn write(sent: &mut SentRecords, mut most: usize) -> Vec<u8> {
        let mut out = Vec::new();
        while let Some(bytes) = sent.next().filter(|_| most > 0) {
            let n = bytes.len().min(most);
            out.extend_from_slice(&bytes[..n]);
            sent.wrote(n);
            most -= n;
        }
        out
    }

    #[test]
    fn impossible_numbers_are_violations() {
        let violates = |found: Result<()>| assert_eq!(found.unwrap_err().kind(), ErrorKind::Protocol);
        let mut sent = with(5, 10);
        violates(sent.acknowledged(6));
        assert_eq!((sent.acknowledged(3), sent.acknowledged(5)), (Ok(()), Ok(())), "the last records of the set-up");
        let first = sent.next().map_or(0, <[u8]>::len);
        write(&mut sent, first);
        violates(sent.acknowledged(7));
        sent.acknowledged(6).unwrap();
        violates(sent.acknowledged(5));
        violates(sent.resume(5));
        violates(sent.resume(7));
        sent.resume(6).unwrap();
        // A record that comes again says what it said before.
        sent.acknowledged(6).unwrap();
    }

    #[test]
    fn what_was_said_before_a_move_may_be_repeated_after_it() {
        let mut sent = with(0, 20);
        write(&mut sent, usize::MAX);
        sent.acknowledged(4).unwrap();
        sent.resume(10).unwrap();
        assert_eq!((sent.acknowledged(4), sent.acknowledged(7), sent.bytes()), (Ok(()), Ok(()), with(10, 20).bytes()));
        assert_eq!(sent.acknowledged(6).unwrap_err().kind(), ErrorKind::Protocol);
        assert_eq!(sent.acknowledged(11).unwrap_err().kind(), ErrorKind::Protocol, "not written again yet");
    }

    proptest! {
        /// However often the stream is cut, and wherever, the peer opens each record once and in order.
        #[test]
        fn every_record_arrives_once(cuts in proptest::collection::vec((0usize..60, 0u8..4), 0..40)) {
            let mut sent = with(0, 100);
            let all = write(&mut with(0, 100), usize::MAX);
            let (mut opened, mut got) = (0u64, Vec::new());
            let mut wire = Vec::new();
            for (most, what) in cuts.into_iter().chain([(usize::MAX, 0)]) {
                wire.extend(write(&mut sent, most));
                // The peer opens what is whole.
                while let Some(&n) = wire.first() {
                    let len = 1 + usize::from(n) % 7;
                    if wire.len() < len {
                        break;
                    }
                    prop_assert_eq!(u64::from(n), opened);
                    got.extend(wire.drain(..len));
                    opened += 1;
                }
                match what {
                    1 => sent.acknowledged(opened).unwrap(),
                    2 => {
                        wire.clear();
                        sent.resume(opened).unwrap();
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(got, all);
            sent.acknowledged(100).unwrap();
            prop_assert_eq!((sent.bytes(), sent.unwritten()), (0, 0));
        }
    }
}
