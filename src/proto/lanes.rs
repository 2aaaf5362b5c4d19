//! The chunks that were announced on each channel, in order, until both engines know what became of them. The chunks of a channel arrive in
//! order, so a count says which are in place. Pure bookkeeping.

use crate::status::{bail, Result};
use crate::types::Key;
use std::collections::VecDeque;

/// A chunk that was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Announced {
    pub key: Key,
    /// Where it begins in its stream, and its bytes.
    pub offset: u64,
    pub len: u64,
}

/// What became of a chunk on a channel that was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fate {
    pub chunk: Announced,
    /// The channel had sent it.
    pub sent: bool,
    pub arrived: bool,
}

/// The chunks that this engine sends on one channel.
#[derive(Debug, Default)]
pub(super) struct OutLane {
    /// From number `first` on; earlier ones were sent and have arrived.
    log: VecDeque<Announced>,
    first: u64,
    /// How many were sent, and how many have arrived as far as the peer has reported.
    sent: u64,
    arrived: u64,
}

impl OutLane {
    pub(super) fn push(&mut self, chunk: Announced) {
        self.log.push_back(chunk);
    }

    /// Chunks that the peer has not reported as arrived.
    pub(super) fn unreported(&self) -> u64 {
        self.announced() - self.arrived
    }

    /// Chunks announced since the channel came up.
    pub(super) fn announced(&self) -> u64 {
        self.first + self.log.len() as u64
    }

    /// One more chunk was sent. Calls `done` for each that was sent and has arrived.
    ///
    /// # Errors
    /// `Internal` for a chunk that was never announced.
    pub(super) fn sent(&mut self, done: impl FnMut(Announced)) -> Result<()> {
        if self.sent == self.announced() {
            bail!(Internal, "a chunk was sent that was never announced");
        }
        self.sent += 1;
        self.settle(done);
        Ok(())
    }

    /// The peer reports that so many chunks have arrived. Calls `done` for each that was sent and has arrived.
    ///
    /// # Errors
    /// `Protocol` for a number that cannot be.
    pub(super) fn arrived(&mut self, chunks: u64, done: impl FnMut(Announced)) -> Result<()> {
        self.check(chunks)?;
        self.arrived = chunks;
        self.settle(done);
        Ok(())
    }

    fn check(&self, chunks: u64) -> Result<()> {
        if chunks < self.arrived || chunks > self.announced() {
            bail!(Protocol, "{chunks} chunks have arrived after {}, of {} announced", self.arrived, self.announced());
        }
        Ok(())
    }

    fn settle(&mut self, mut done: impl FnMut(Announced)) {
        while self.first < self.sent.min(self.arrived) {
            let Some(chunk) = self.log.pop_front() else { return };
            self.first += 1;
            done(chunk);
        }
    }

    /// The chunks that were not sent. Where the channel is closed at this engine, they are not sent any more.
    pub(super) fn unsent(&self) -> impl Iterator<Item = Announced> + '_ {
        self.log.iter().skip((self.sent - self.first) as usize).copied()
    }

    /// The channel is closed at both engines, and so many chunks had arrived. Returns those of which that was not known, or that have
    /// not; the lane is as new.
    ///
    /// # Errors
    /// As of [`OutLane::arrived`].
    pub(super) fn lose(&mut self, chunks: u64) -> Result<impl Iterator<Item = Fate>> {
        self.check(chunks)?;
        let OutLane { log, first, sent, .. } = std::mem::take(self);
        let fate = move |(number, chunk)| Fate { chunk, sent: number < sent, arrived: number < chunks };
        Ok((first..).zip(log).map(fate))
    }
}

/// The chunks that the peer sends on one channel.
#[derive(Debug, Default)]
pub(super) struct InLane {
    /// Those that have not arrived.
    log: VecDeque<Announced>,
    arrived: u64,
    /// What the peer was sent last.
    reported: u64,
}

impl InLane {
    pub(super) fn push(&mut self, chunk: Announced) {
        self.log.push_back(chunk);
    }

    /// The oldest chunk has arrived, which must be one of this stream and length.
    ///
    /// # Errors
    /// `Internal` for any other.
    pub(super) fn pop(&mut self, key: Key, len: u64) -> Result<()> {
        match self.log.pop_front() {
            Some(chunk) if (chunk.key, chunk.len) == (key, len) => {
                self.arrived += 1;
                Ok(())
            }
            _ => bail!(Internal, "a chunk has arrived out of order"),
        }
    }

    /// How many have arrived.
    pub(super) fn arrived(&self) -> u64 {
        self.arrived
    }

    /// Bytes that have not arrived.
    pub(super) fn missing(&self) -> u64 {
        self.log.iter().map(|chunk| chunk.len).sum()
    }

    /// How many have arrived, if the peer does not know.
    pub(super) fn report(&mut self) -> Option<u64> {
        (std::mem::replace(&mut self.reported, self.arrived) != self.arrived).then_some(self.arrived)
    }

    /// The channel is closed at both engines: the chunks that have not arrived never will. The lane is as new.
    pub(super) fn lose(&mut self) -> VecDeque<Announced> {
        std::mem::take(self).log
    }
}

/// The lane of a channel, made if need be.
pub(super) fn lane<L: Default>(lanes: &mut Vec<L>, channel: u16) -> &mut L {
    let index = usize::from(channel);
    if lanes.len() <= index {
        lanes.resize_with(index + 1, L::default);
    }
    &mut lanes[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(id: u64) -> Announced {
        Announced { key: Key { id, mine: true }, offset: 0, len: 10 }
    }

    /// Ids that a call hands over.
    fn ids(call: impl FnOnce(&mut dyn FnMut(Announced))) -> Vec<u64> {
        let mut ids = Vec::new();
        call(&mut |chunk: Announced| ids.push(chunk.key.id));
        ids
    }

    #[test]
    fn a_chunk_is_done_once_it_was_sent_and_has_arrived() {
        let mut lane = OutLane::default();
        (1..=4).for_each(|id| lane.push(chunk(id)));
        assert_eq!(ids(|done| lane.sent(done).unwrap()), []);
        // The report may come first.
        assert_eq!(ids(|done| lane.arrived(2, done).unwrap()), [1]);
        assert_eq!((ids(|done| lane.sent(done).unwrap()), lane.unreported()), (vec![2], 2));
        for wrong in [1, 5] {
            assert!(lane.arrived(wrong, |_| ()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_had_not_arrived_is_lost() {
        let mut lane = OutLane::default();
        (1..=5).for_each(|id| lane.push(chunk(id)));
        for _ in 0..3 {
            lane.sent(|_| ()).unwrap();
        }
        lane.arrived(1, |_| ()).unwrap();
        assert_eq!(lane.unsent().map(|chunk| chunk.key.id).collect::<Vec<_>>(), [4, 5]);
        assert!(lane.lose(6).is_err());
        let fates = lane.lose(2).unwrap().map(|fate| (fate.chunk.key.id, fate.sent, fate.arrived));
        assert_eq!(fates.collect::<Vec<_>>(), [(2, true, true), (3, true, false), (4, false, false), (5, false, false)]);
        assert_eq!(lane.unreported(), 0);
        assert!(lane.arrived(1, |_| ()).is_err(), "counts begin anew");
    }

    #[test]
    fn chunks_arrive_in_order_and_are_reported_once() {
        let mut lane = InLane::default();
        (1..=3).for_each(|id| lane.push(chunk(id)));
        assert!(lane.pop(Key { id: 1, mine: true }, 10).is_ok());
        assert_eq!((lane.report(), lane.report(), lane.missing()), (Some(1), None, 20));
        assert_eq!(lane.lose().len(), 2);
        let mut lane = InLane::default();
        lane.push(chunk(1));
        assert!(lane.pop(Key { id: 2, mine: true }, 10).is_err());
    }
}
