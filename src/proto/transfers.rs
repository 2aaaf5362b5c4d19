//! Transfers that this engine started: ids, kinds, progress, outcome. Decides which verdicts of the peer fit. Pure bookkeeping.

use super::carriers::Carriers;
use crate::direct::Way;
use crate::hash::Map;
use crate::status::{bail, Error, ErrorKind, Result};
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// Where a transfer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferState {
    /// Every byte is in place.
    pub complete: bool,
    /// Bytes of the whole transfer; for a receive 0 until the message is known.
    pub bytes_total: u64,
    /// Bytes moved so far.
    pub bytes_done: u64,
}

/// The kind of a transfer. It decides which frames the peer may send about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Read,
    /// A two-sided send; `pulled` once the peer has asked for its data.
    Send {
        pulled: bool,
    },
    /// A two-sided receive: the peer does not know the id.
    Receive,
    /// A direct transfer, or one that may become one: the peer does not know the id.
    Direct(Op),
}

/// What the application asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Write,
    Read,
    Send,
    Receive,
}

impl Kind {
    /// A one-sided transfer whose route is undecided.
    pub(super) fn direct(way: Way) -> Kind {
        Kind::Direct(if way == Way::Out { Op::Write } else { Op::Read })
    }

    /// As the log names it.
    fn op(self) -> Op {
        match self {
            Kind::Write => Op::Write,
            Kind::Read => Op::Read,
            Kind::Send { .. } => Op::Send,
            Kind::Receive => Op::Receive,
            Kind::Direct(op) => op,
        }
    }
}

/// A transfer in flight.
#[derive(Debug)]
pub(super) struct Running {
    pub kind: Kind,
    total: u64,
    moved: u64,
    carriers: Carriers,
    /// Segments of its lists, for the budget.
    segments: usize,
    /// The peer's verdict, if it arrived while the source was still being sent.
    verdict: Option<Result<()>>,
    /// The id that the application knows, if it is a different one.
    alias: Option<u64>,
    /// When it began, if its time is counted.
    begun: Option<Instant>,
}

/// For so many ended transfers the number of bytes and what carried them is remembered, and for so many failed ones the text of the error. Older ones
/// report 0 bytes and no carrier, or the kind of the error alone.
const REMEMBERED: usize = 1 << 14;

/// Why a transfer failed.
#[derive(Debug)]
struct Failure {
    error: Error,
    /// The log has it.
    reported: bool,
}

/// Failed transfers beyond [`REMEMBERED`]: ranges of ids with the kind of error, first -> (last, kind).
#[derive(Debug, Default)]
struct OldFailures(BTreeMap<u64, (u64, ErrorKind)>);

impl OldFailures {
    fn add(&mut self, id: u64, kind: ErrorKind) {
        if let Some((_, (last, known))) = self.0.range_mut(..id).next_back() {
            if *last + 1 == id && *known == kind {
                *last = id;
                return;
            }
        }
        self.0.insert(id, (id, kind));
    }

    fn get(&self, id: u64) -> Option<ErrorKind> {
        let (_, &(last, kind)) = self.0.range(..=id).next_back()?;
        (id <= last).then_some(kind)
    }
}

/// Bytes of ended transfers, and what carried them. Each id has an entry that later ids overwrite.
#[derive(Debug, Default)]
struct Ended(Vec<(u64, u64, Carriers)>);

impl Ended {
    fn place(id: u64) -> usize {
        (id % REMEMBERED as u64) as usize
    }

    fn set(&mut self, id: u64, total: u64, carriers: Carriers) {
        let place = Ended::place(id);
        if self.0.len() <= place {
            self.0.resize(place + 1, (0, 0, Carriers::default()));
        }
        self.0[place] = (id, total, carriers);
    }

    fn get(&self, id: u64) -> (u64, Carriers) {
        let kept = self.0.get(Ended::place(id)).filter(|&&(of, ..)| of == id);
        kept.map_or_else(Default::default, |&(_, total, carriers)| (total, carriers))
    }
}

/// A transfer that has succeeded and whose time is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timed {
    pub bytes: u64,
    pub begun: Instant,
}

/// All transfers that this engine started on one connection. Ids count up from 1. An id that was given out, is not in flight and
/// has no recorded error has succeeded, so success costs no memory.
#[derive(Debug, Default)]
pub(super) struct Transfers {
    given: u64,
    running: Map<u64, Running>,
    segments: usize,
    failed: Map<u64, Failure>,
    failed_order: VecDeque<u64>,
    failed_before: OldFailures,
    totals: Ended,
    /// For transfers that were announced under a later id: that id, by the id that the application knows.
    aliases: Map<u64, u64>,
    renumbered: u64,
    ended: u64,
    failures: u64,
    timed: Vec<Timed>,
}

impl Transfers {
    pub(super) fn start(&mut self, kind: Kind, total: u64, segments: usize) -> u64 {
        self.add(kind, total, segments, None)
    }

    /// As [`Transfers::start`], for a transfer whose time counts. That of a two-sided message depends on the peer's application.
    pub(super) fn start_timed(&mut self, kind: Kind, total: u64, segments: usize, now: Instant) -> u64 {
        self.add(kind, total, segments, Some(now))
    }

    fn add(&mut self, kind: Kind, total: u64, segments: usize, begun: Option<Instant>) -> u64 {
        self.given += 1;
        self.segments += segments;
        log::trace!("transfer {} starts: {:?}, {total} bytes in {segments} segments", self.given, kind.op());
        self.running.insert(
            self.given,
            Running { kind, total, moved: 0, carriers: Carriers::default(), segments, verdict: None, alias: None, begun },
        );
        self.given
    }

    /// Transfers that have succeeded since the last call, those whose time is counted.
    pub(super) fn take_timed(&mut self) -> impl Iterator<Item = Timed> + '_ {
        self.timed.drain(..)
    }

    /// The id under which a transfer can be announced. The peer takes ids in rising order, and other transfers may have been
    /// announced while this one waited.
    pub(super) fn announced_as(&mut self, id: u64) -> u64 {
        if id == self.given {
            return id;
        }
        let Some(mut running) = self.running.remove(&id) else { return id };
        running.alias = Some(id);
        (self.given, self.renumbered) = (self.given + 1, self.renumbered + 1);
        self.running.insert(self.given, running);
        self.aliases.insert(id, self.given);
        self.given
    }

    /// Transfers in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.running.len()
    }

    /// Segments of all transfers in flight.
    pub(super) fn segments(&self) -> usize {
        self.segments
    }

    /// How many transfers have ended; a waiter looks again when it changes.
    pub(super) fn ended(&self) -> u64 {
        self.ended
    }

    /// The numbers of transfers that were started, that succeeded, and that failed.
    pub(super) fn outcomes(&self) -> (u64, u64, u64) {
        (self.given - self.renumbered, self.ended - self.failures, self.failures)
    }

    pub(super) fn kind(&self, id: u64) -> Option<Kind> {
        self.running.get(&id).map(|r| r.kind)
    }

    /// The peer has asked for the data of a send.
    pub(super) fn pulled(&mut self, id: u64) {
        if let Some(running) = self.running.get_mut(&id) {
            running.kind = Kind::Send { pulled: true };
        }
    }

    /// The message goes straight into the buffer that the peer has granted.
    pub(super) fn goes_directly(&mut self, id: u64) {
        self.goes_in_chunks(id, Kind::Direct(Op::Send));
    }

    /// A transfer whose route was undecided goes in chunks, as one of this kind.
    pub(super) fn goes_in_chunks(&mut self, id: u64, kind: Kind) {
        if let Some(running) = self.running.get_mut(&id) {
            running.kind = kind;
        }
    }

    pub(super) fn moved(&mut self, id: u64, bytes: u64, by: Carriers) {
        if let Some(running) = self.running.get_mut(&id) {
            running.moved += bytes;
            running.carriers = running.carriers.and(by);
        }
    }

    /// Bytes that were counted as moved are lost.
    pub(super) fn unmoved(&mut self, id: u64, bytes: u64) {
        if let Some(running) = self.running.get_mut(&id) {
            running.moved = running.moved.saturating_sub(bytes);
        }
    }

    /// Bytes that a transfer in flight has moved, and all of its bytes.
    #[cfg(any(test, fuzzing))]
    pub(super) fn progress(&self, id: u64) -> Option<(u64, u64)> {
        self.running.get(&id).map(|running| (running.moved, running.total))
    }

    pub(super) fn set_total(&mut self, id: u64, total: u64) {
        if let Some(running) = self.running.get_mut(&id) {
            running.total = total;
        }
    }

    pub(super) fn finish(&mut self, id: u64, result: Result<()>) {
        let Some(running) = self.running.remove(&id) else { return };
        let id = running.alias.unwrap_or(id);
        self.aliases.remove(&id);
        self.ended += 1;
        self.segments -= running.segments;
        log::trace!(
            "transfer {id} ({:?}, {} bytes) ended: {}",
            running.kind.op(),
            running.total,
            match &result {
                Ok(()) => "ok",
                Err(e) => e.to_str(),
            }
        );
        if let Err(e) = result {
            self.failures += 1;
            if self.failed_order.len() == REMEMBERED {
                if let Some((old, failure)) = self.failed_order.pop_front().and_then(|id| self.failed.remove_entry(&id)) {
                    self.failed_before.add(old, failure.error.kind());
                }
            }
            self.failed.insert(id, Failure { error: e, reported: false });
            self.failed_order.push_back(id);
        } else if let Some(begun) = running.begun {
            self.timed.push(Timed { bytes: running.total, begun });
        }
        self.totals.set(id, running.total, running.carriers);
    }

    /// Why a transfer failed, for the log. Returned once, and not if the transfer failed with its connection: the log has the end
    /// of that.
    pub(super) fn take_failure(&mut self, id: u64) -> Option<Error> {
        let failure = self.failed.get_mut(&id).filter(|failure| !failure.reported)?;
        failure.reported = true;
        Some(failure.error.clone())
    }

    /// The peer's verdict. While `sending`, the source is still in use and the transfer ends with [`Transfers::source_free`].
    ///
    /// # Errors
    /// `Protocol` for a second verdict.
    pub(super) fn verdict(&mut self, id: u64, result: Result<()>, sending: bool) -> Result<()> {
        if !sending {
            self.finish(id, result);
        } else if let Some(running) = self.running.get_mut(&id) {
            if running.verdict.is_some() {
                bail!(Protocol, "two verdicts on transfer {id}");
            }
            running.verdict = Some(result);
        }
        Ok(())
    }

    /// The last byte of the source was sent.
    pub(super) fn source_free(&mut self, id: u64) {
        if let Some(result) = self.running.get_mut(&id).and_then(|r| r.verdict.take()) {
            self.finish(id, result);
        }
    }

    /// Ends everything with `error`, except transfers that the peer has already reported done.
    pub(super) fn fail_all(&mut self, error: &Error) {
        let mut ids: Vec<(u64, u64)> = self.running.iter().map(|(&id, running)| (id, running.alias.unwrap_or(id))).collect();
        ids.sort_unstable();
        for (id, known) in ids {
            // A verdict of success that only waited for the source stands: every byte was in place.
            let verdict = self.running.get_mut(&id).and_then(|r| r.verdict.take());
            let alone = verdict.is_some();
            self.finish(id, verdict.unwrap_or_else(|| Err(error.clone())));
            if !alone {
                self.take_failure(known);
            }
        }
    }

    pub(super) fn lookup(&self, id: u64) -> Result<TransferState> {
        if let Some(running) = self.running.get(self.aliases.get(&id).unwrap_or(&id)) {
            let bytes_done = running.moved.min(running.total);
            return Ok(TransferState { complete: false, bytes_total: running.total, bytes_done });
        }
        if let Some(failure) = self.failed.get(&id) {
            return Err(failure.error.clone());
        }
        if id == 0 || id > self.given {
            bail!(NotFound, "transfer {id} was never started on this connection");
        }
        if let Some(kind) = self.failed_before.get(id) {
            return Err(Error::new(kind, format_args!("transfer {id} failed; the cause is no longer remembered")));
        }
        let (total, _) = self.totals.get(id);
        Ok(TransferState { complete: true, bytes_total: total, bytes_done: total })
    }

    /// What has carried bytes of a transfer, also of one that has ended or failed.
    ///
    /// # Errors
    /// `NotFound` for an id that was never given out.
    pub(super) fn carriers(&self, id: u64) -> Result<Carriers> {
        if id == 0 || id > self.given {
            bail!(NotFound, "transfer {id} was never started on this connection");
        }
        let running = self.running.get(self.aliases.get(&id).unwrap_or(&id));
        Ok(running.map_or_else(|| self.totals.get(id).1, |running| running.carriers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::err;

    fn write(t: &mut Transfers, total: u64) -> u64 {
        t.start(Kind::Write, total, 1)
    }

    #[test]
    fn answers_stay_the_same_after_the_end() {
        let mut t = Transfers::default();
        let (a, b, c) = (write(&mut t, 10), write(&mut t, 20), write(&mut t, 30));
        t.moved(a, 4, Carriers::channel(2));
        assert_eq!(t.lookup(a), Ok(TransferState { complete: false, bytes_total: 10, bytes_done: 4 }));
        t.moved(a, 400, Carriers::channel(4));
        assert_eq!(t.lookup(a).unwrap().bytes_done, 10);
        t.finish(a, Ok(()));
        t.finish(b, Err(err!(RemoteAccess, "no")));
        t.verdict(c, Ok(()), true).unwrap();
        assert!(!t.lookup(c).unwrap().complete);
        assert!(t.verdict(c, Ok(()), true).is_err(), "a second verdict");
        t.source_free(c);
        for _ in 0..3 {
            assert_eq!(t.lookup(a), Ok(TransferState { complete: true, bytes_total: 10, bytes_done: 10 }));
            assert!(t.lookup(c).unwrap().complete);
            assert_eq!(t.lookup(b).unwrap_err().kind(), ErrorKind::RemoteAccess);
        }
        for id in [0, 4, u64::MAX] {
            assert_eq!(t.lookup(id).unwrap_err().kind(), ErrorKind::NotFound);
        }
        t.finish(a, Err(err!(Internal, "late")));
        assert!(t.lookup(a).is_ok());
        let by = Carriers::channel(2).and(Carriers::channel(4));
        assert_eq!([a, b].map(|id| t.carriers(id)), [Ok(by), Ok(Carriers::default())]);
        assert_eq!([0, 4].map(|id| t.carriers(id).unwrap_err().kind()), [ErrorKind::NotFound; 2]);
        assert_eq!((t.in_flight(), t.segments(), t.ended()), (0, 0, 3));
    }

    #[test]
    fn a_failure_is_reported_once_and_not_after_the_connection_ended() {
        let mut t = Transfers::default();
        let (good, bad, lost) = (write(&mut t, 1), write(&mut t, 1), write(&mut t, 1));
        t.finish(good, Ok(()));
        t.finish(bad, Err(err!(RemoteAccess, "no")));
        assert_eq!(t.take_failure(lost), None);
        t.fail_all(&err!(RemoteDisconnect, "gone"));
        assert_eq!(
            [good, bad, bad, lost, 9].map(|id| t.take_failure(id).map(|e| e.kind())),
            [None, Some(ErrorKind::RemoteAccess), None, None, None]
        );
        assert_eq!(t.lookup(lost).unwrap_err().kind(), ErrorKind::RemoteDisconnect);
    }

    #[test]
    fn a_lost_connection_ends_everything_but_what_had_arrived() {
        let mut t = Transfers::default();
        let (a, b) = (write(&mut t, 1), write(&mut t, 1));
        t.verdict(a, Ok(()), true).unwrap();
        t.fail_all(&err!(RemoteDisconnect, "gone"));
        assert!(t.lookup(a).unwrap().complete);
        assert_eq!(t.lookup(b).unwrap_err().kind(), ErrorKind::RemoteDisconnect);
        assert_eq!(t.in_flight(), 0);
    }

    #[test]
    fn a_failure_is_never_forgotten_and_costs_little_once_it_is_old() {
        let mut t = Transfers::default();
        let n = 3 * REMEMBERED as u64;
        for i in 0..n {
            let id = write(&mut t, 1);
            t.finish(id, if i % 1000 == 999 { Ok(()) } else { Err(err!(TimedOut, "late")) });
        }
        for id in 1..=n {
            match t.lookup(id) {
                Ok(state) => assert!(state.complete && id % 1000 == 0, "{id}"),
                Err(e) => assert!(e.kind() == ErrorKind::TimedOut && id % 1000 != 0, "{id}"),
            }
        }
        assert_eq!((t.failed.len(), t.totals.0.len()), (REMEMBERED, REMEMBERED));
        assert!(t.failed_before.0.len() < 50, "{}", t.failed_before.0.len());
    }

    #[test]
    fn the_time_of_what_succeeds_is_counted_once_and_of_messages_never() {
        let (mut t, begun) = (Transfers::default(), Instant::now());
        let timed = |t: &mut Transfers| t.take_timed().map(|timed| timed.bytes).collect::<Vec<_>>();
        let ids = [10, 20, 30].map(|total| t.start_timed(Kind::Direct(Op::Write), total, 1, begun));
        let message = t.start(Kind::Receive, 0, 1);
        assert_eq!(timed(&mut t), [0; 0]);
        // Under a later id.
        let later = t.announced_as(ids[1]);
        t.finish(later, Ok(()));
        t.finish(ids[0], Err(err!(RemoteAccess, "no")));
        t.finish(message, Ok(()));
        assert_eq!(timed(&mut t), [20]);
        t.finish(ids[2], Ok(()));
        t.finish(ids[2], Ok(()));
        assert_eq!((timed(&mut t), timed(&mut t)), (vec![30], vec![]));
    }

    #[test]
    fn a_transfer_that_is_announced_late_keeps_its_id() {
        let mut t = Transfers::default();
        let (first, second) = (t.start(Kind::Direct(Op::Read), 10, 1), write(&mut t, 20));
        assert_eq!(t.announced_as(second), second, "the newest");
        let late = t.announced_as(first);
        assert!(late > second && t.kind(late) == Some(Kind::Direct(Op::Read)) && t.kind(first).is_none());
        t.moved(late, 4, Carriers::channel(0));
        assert_eq!(t.lookup(first).unwrap(), TransferState { complete: false, bytes_total: 10, bytes_done: 4 });
        t.finish(late, Err(err!(RemoteAccess, "no")));
        assert_eq!(t.lookup(first).unwrap_err().to_str(), "no");
        assert!(t.take_failure(first).is_some());
        t.finish(second, Ok(()));
        assert_eq!((t.outcomes(), t.in_flight()), ((2, 1, 1), 0));
    }
}
