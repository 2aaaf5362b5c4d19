//! Transfers as their initiator sees them: ids, progress, outcome. Pure bookkeeping.

use crate::status::{bail, Error, Result};
use std::collections::{HashMap, VecDeque};

/// Direction of a one-sided transfer, from the caller's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Remote memory into local memory.
    Read,
    /// Local memory into remote memory.
    Write,
}

/// Local memory of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalSegment {
    /// Region that holds it.
    pub mr: u64,
    /// First byte.
    pub addr: usize,
    /// Bytes.
    pub len: usize,
}

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

/// A transfer in flight.
#[derive(Debug)]
pub(crate) struct Local {
    total: u64,
    moved: u64,
    /// The other side's verdict, known while the source is still being sent.
    verdict: Option<Result<()>>,
}

/// Totals of ended transfers that are remembered; older ones report 0 bytes.
const REMEMBERED: usize = 1 << 14;

/// All transfers that one side of a connection started. Ids count up from 1; an id that was given out, is not in flight and has no
/// recorded error has succeeded, so success costs no memory.
#[derive(Debug, Default)]
pub(crate) struct Outcomes {
    given: u64,
    running: HashMap<u64, Local>,
    failed: HashMap<u64, Error>,
    totals: HashMap<u64, u64>,
    totals_order: VecDeque<u64>,
    ended: u64,
}

impl Outcomes {
    pub(crate) fn start(&mut self, total: u64) -> u64 {
        self.given += 1;
        self.running.insert(self.given, Local { total, moved: 0, verdict: None });
        self.given
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.running.len()
    }

    pub(crate) fn is_running(&self, id: u64) -> bool {
        self.running.contains_key(&id)
    }

    /// Number of transfers that have ended; changes when a waiter should look again.
    pub(crate) fn ended(&self) -> u64 {
        self.ended
    }

    pub(crate) fn moved(&mut self, id: u64, bytes: u64) {
        if let Some(local) = self.running.get_mut(&id) {
            local.moved += bytes;
        }
    }

    pub(crate) fn set_total(&mut self, id: u64, total: u64) {
        if let Some(local) = self.running.get_mut(&id) {
            local.total = total;
        }
    }

    pub(crate) fn finish(&mut self, id: u64, result: Result<()>) {
        let Some(local) = self.running.remove(&id) else { return };
        self.ended += 1;
        if let Err(e) = result {
            self.failed.insert(id, e);
        }
        if self.totals_order.len() == REMEMBERED {
            if let Some(old) = self.totals_order.pop_front() {
                self.totals.remove(&old);
            }
        }
        self.totals.insert(id, local.total);
        self.totals_order.push_back(id);
    }

    /// The other side's verdict. While `sending`, the source is still in use and the end waits for [`Outcomes::source_free`].
    pub(crate) fn verdict(&mut self, id: u64, result: Result<()>, sending: bool) {
        if !sending {
            self.finish(id, result);
        } else if let Some(local) = self.running.get_mut(&id) {
            local.verdict = Some(result);
        }
    }

    /// The last byte of the source has left.
    pub(crate) fn source_free(&mut self, id: u64) {
        if let Some(result) = self.running.get_mut(&id).and_then(|l| l.verdict.take()) {
            self.finish(id, result);
        }
    }

    pub(crate) fn fail_all(&mut self, error: &Error) {
        let ids: Vec<u64> = self.running.keys().copied().collect();
        for id in ids {
            // A verdict of success that only waited for the source stands: every byte was in place.
            let verdict = self.running.get_mut(&id).and_then(|l| l.verdict.take());
            self.finish(id, verdict.unwrap_or_else(|| Err(error.clone())));
        }
    }

    pub(crate) fn lookup(&self, id: u64) -> Result<TransferState> {
        if let Some(local) = self.running.get(&id) {
            return Ok(TransferState { complete: false, bytes_total: local.total, bytes_done: local.moved.min(local.total) });
        }
        if let Some(e) = self.failed.get(&id) {
            return Err(e.clone());
        }
        if id == 0 || id > self.given {
            bail!(NotFound, "transfer {id} was never started on this connection");
        }
        let total = self.totals.get(&id).copied().unwrap_or(0);
        Ok(TransferState { complete: true, bytes_total: total, bytes_done: total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{err, ErrorKind};

    #[test]
    fn answers_stay_the_same_after_the_end() {
        let mut o = Outcomes::default();
        let (a, b, c) = (o.start(10), o.start(20), o.start(30));
        assert_eq!(o.lookup(a), Ok(TransferState { complete: false, bytes_total: 10, bytes_done: 0 }));
        o.finish(a, Ok(()));
        o.finish(b, Err(err!(RemoteAccess, "no")));
        o.verdict(c, Ok(()), true);
        assert!(!o.lookup(c).unwrap().complete);
        o.source_free(c);
        for _ in 0..3 {
            assert!(o.lookup(a).unwrap().complete && o.lookup(c).unwrap().complete);
            assert_eq!(o.lookup(b).unwrap_err().kind(), ErrorKind::RemoteAccess);
        }
        for id in [0, 4, u64::MAX] {
            assert_eq!(o.lookup(id).unwrap_err().kind(), ErrorKind::NotFound);
        }
        o.finish(a, Err(err!(Internal, "late")));
        assert!(o.lookup(a).is_ok());
    }

    #[test]
    fn a_lost_connection_ends_everything_but_what_had_arrived() {
        let mut o = Outcomes::default();
        let (a, b) = (o.start(1), o.start(1));
        o.verdict(a, Ok(()), true);
        o.fail_all(&err!(RemoteDisconnect, "gone"));
        assert!(o.lookup(a).unwrap().complete);
        assert_eq!(o.lookup(b).unwrap_err().kind(), ErrorKind::RemoteDisconnect);
        assert_eq!(o.in_flight(), 0);
    }
}
