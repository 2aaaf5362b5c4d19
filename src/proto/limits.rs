//! What may be in flight on a connection. An engine admits no more than this of its own. It tolerates twice as much of its peer,
//! which may learn of an end later, and treats more as an attack. Pure.

use crate::budget::{Part, Share};
use crate::status::{bail, Result};
use crate::types::{Segment, MAX_EAGER};

/// Transfers in flight that one engine started.
const MAX_TRANSFERS: usize = 1 << 16;
/// Segments of all of them together.
const MAX_SEGMENTS_IN_FLIGHT: usize = 4 << 20;
/// Chunks that an engine may announce before the peer reports that they have arrived.
const MAX_ANNOUNCED: u64 = 1 << 17;
/// After so many new chunks an engine reports again, early enough for a sender at its limit.
const REPORTED_AFTER: u64 = MAX_ANNOUNCED / 8;
/// Bytes of frames that may wait to be sent, apart from the application's notifications: answers to a peer that does not read.
const MAX_ANSWERS: usize = 64 << 20;
/// Bytes of the control connection that may wait to be sent.
pub(crate) const MAX_BACKLOG: usize = 256 << 20;
/// With a larger backlog than this, the answer to a read goes over the channels and not over the control connection.
pub(super) const MAX_INLINE_BACKLOG: usize = 1 << 20;

/// Whether this engine may start one more transfer.
pub(super) fn admit(transfers: usize, segments: usize, more: usize) -> Result<()> {
    if transfers >= MAX_TRANSFERS {
        bail!(Resource, "{MAX_TRANSFERS} transfers are in flight on this connection");
    }
    if segments + more > MAX_SEGMENTS_IN_FLIGHT {
        bail!(Resource, "transfers in flight on this connection would have more than {MAX_SEGMENTS_IN_FLIGHT} segments");
    }
    Ok(())
}

/// How many more chunks this engine may announce while `announced` of its chunks have not been reported.
pub(super) fn may_announce(announced: u64) -> usize {
    MAX_ANNOUNCED.saturating_sub(announced) as usize
}

/// Whether to report `fresh` chunks that have arrived since the last report.
pub(super) fn must_report(fresh: u64) -> bool {
    fresh >= REPORTED_AFTER
}

/// Fails when the peer announces more chunks than an honest one does.
pub(super) fn expected(chunks: usize) -> Result<()> {
    if chunks as u64 >= 2 * MAX_ANNOUNCED {
        bail!(Protocol, "the peer has announced {chunks} chunks that have not arrived");
    }
    Ok(())
}

/// Fails when too many messages that this engine withdrew are unanswered.
pub(super) fn withdrawn(waiting: usize) -> Result<()> {
    if waiting > 2 * MAX_TRANSFERS {
        bail!(Protocol, "the peer has not answered {waiting} messages");
    }
    Ok(())
}

/// Fails when too many answers wait: the peer does not read them.
pub(super) fn answers(waiting: usize) -> Result<()> {
    if waiting > MAX_ANSWERS {
        bail!(Resource, "{waiting} bytes of answers wait: the peer does not read them");
    }
    Ok(())
}

/// Memory of an announced chunk, and the number of chunks from which on they count.
const CHUNK_BYTES: usize = 256;
const MANY_CHUNKS: usize = 4096;
/// Memory of a transfer of the peer, apart from its list, at most.
const TRANSFER_BYTES: usize = 512;

/// What the peer has in flight.
#[derive(Debug)]
pub(super) struct PeerLoad {
    last_id: u64,
    transfers: usize,
    segments: usize,
    /// Its share of what all peers may take.
    share: Share,
}

fn cost(segments: usize) -> usize {
    segments * size_of::<Segment>()
}

impl PeerLoad {
    pub(super) fn new(share: Share) -> PeerLoad {
        PeerLoad { last_id: 0, transfers: 0, segments: 0, share }
    }

    /// Answers that wait for the peer to read them.
    ///
    /// # Errors
    /// `Resource` when there are too many.
    pub(super) fn answers(&mut self, bytes: usize) -> Result<()> {
        answers(bytes)?;
        // Small amounts are not worth counting.
        self.share.set(Part::Answers, if bytes < MAX_EAGER { 0 } else { bytes })
    }

    /// Counts the bytes that are kept of an incomplete frame. What was announced of it and has not arrived costs nothing.
    ///
    /// # Errors
    /// `Resource` when peers use too much memory already.
    pub(super) fn arriving(&mut self, bytes: usize) -> Result<()> {
        self.share.set(Part::Frame, if bytes <= 2 * MAX_EAGER { 0 } else { bytes })
    }

    /// Counts the chunks that are announced and have not arrived.
    ///
    /// # Errors
    /// As above.
    pub(super) fn chunks(&mut self, chunks: usize) -> Result<()> {
        // In steps, since chunks come and go one by one.
        let steps = if chunks < MANY_CHUNKS { 0 } else { chunks / MANY_CHUNKS };
        self.share.set(Part::Chunks, steps * MANY_CHUNKS * CHUNK_BYTES)
    }

    /// The peer announces a new transfer. The inner result says whether there is room for it. If not, the transfer has to be
    /// refused, and counts as one of this connection until it has ended.
    ///
    /// # Errors
    /// `Protocol` when its id does not rise, or the peer has too much in flight.
    pub(super) fn begin(&mut self, id: u64, segments: usize) -> Result<Result<()>> {
        if id <= self.last_id {
            bail!(Protocol, "transfer {id} is announced after transfer {}", self.last_id);
        }
        self.last_id = id;
        self.transfers += 1;
        self.segments += segments;
        if self.transfers > 2 * MAX_TRANSFERS || self.segments > 2 * MAX_SEGMENTS_IN_FLIGHT {
            bail!(Protocol, "the peer has {} transfers of {} segments in flight", self.transfers, self.segments);
        }
        Ok(self.share.begin(TRANSFER_BYTES + cost(segments)).inspect_err(|_| self.segments -= segments))
    }

    /// A transfer for which there was no room has ended here.
    pub(super) fn ended_without_room(&mut self) {
        self.transfers = self.transfers.saturating_sub(1);
    }

    /// Whether the peer has announced a transfer with this id or a later one.
    pub(super) fn has_named(&self, id: u64) -> bool {
        id > 0 && id <= self.last_id
    }

    /// A transfer of the peer has ended here.
    pub(super) fn ended(&mut self, segments: usize) {
        self.transfers = self.transfers.saturating_sub(1);
        self.segments = self.segments.saturating_sub(segments);
        self.share.end(TRANSFER_BYTES + cost(segments));
    }

    /// The segments of a transfer are no longer kept, although it goes on.
    pub(super) fn without_list(&mut self, segments: usize) {
        self.segments = self.segments.saturating_sub(segments);
        self.share.shrink(cost(segments));
    }

    /// Transfers and segments.
    #[cfg(any(test, fuzzing))]
    pub(super) fn load(&self) -> (usize, usize) {
        (self.transfers, self.segments)
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_idle(&self) -> bool {
        self.transfers == 0 && self.segments == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Pool;
    use crate::status::ErrorKind;

    fn unloaded() -> PeerLoad {
        PeerLoad::new(Share::new(&Pool::endless().account([127, 0, 0, 1].into())))
    }

    #[test]
    fn this_side_stops_at_its_limits() {
        assert!(admit(MAX_TRANSFERS - 1, MAX_SEGMENTS_IN_FLIGHT - 5, 5).is_ok());
        for (transfers, segments, more) in [(MAX_TRANSFERS, 0, 0), (0, MAX_SEGMENTS_IN_FLIGHT, 1)] {
            assert_eq!(admit(transfers, segments, more).unwrap_err().kind(), ErrorKind::Resource);
        }
    }

    #[test]
    fn ids_of_the_peer_rise() {
        let mut load = unloaded();
        assert!(load.begin(0, 1).is_err());
        assert!(load.begin(1, 1).is_ok() && load.begin(5, 1).is_ok());
        for id in [5, 4, 1] {
            assert_eq!(load.begin(id, 1).unwrap_err().kind(), ErrorKind::Protocol);
        }
    }

    #[test]
    fn a_peer_with_too_much_in_flight_is_refused() {
        let mut load = unloaded();
        for id in 1..=2 * MAX_TRANSFERS as u64 {
            load.begin(id, 1).unwrap().unwrap();
        }
        assert!(load.begin(1 << 40, 1).is_err());
        let mut load = unloaded();
        assert!(load.begin(1, 2 * MAX_SEGMENTS_IN_FLIGHT).is_ok());
        load.without_list(1);
        assert!(load.begin(2, 1).is_ok());
        assert!(load.begin(3, 1).is_err());
        load.ended(MAX_SEGMENTS_IN_FLIGHT);
        assert!(load.begin(4, 1).is_ok());
    }

    #[test]
    fn an_honest_sender_of_chunks_never_reaches_what_its_peer_tolerates() {
        assert_eq!((may_announce(0), may_announce(MAX_ANNOUNCED - 1), may_announce(MAX_ANNOUNCED)), (1 << 17, 1, 0));
        assert_eq!(may_announce(u64::MAX), 0);
        // A sender that waits at its limit gets a report: what its peer leaves unreported is less than the limit.
        assert!(must_report(REPORTED_AFTER) && !must_report(REPORTED_AFTER - 1) && 2 * REPORTED_AFTER < MAX_ANNOUNCED);
        assert!(expected(MAX_ANNOUNCED as usize + 1).is_ok());
        assert_eq!(expected(2 * MAX_ANNOUNCED as usize).unwrap_err().kind(), ErrorKind::Protocol);
    }

    #[test]
    fn answers_have_a_limit() {
        assert!(withdrawn(2 * MAX_TRANSFERS).is_ok());
        assert_eq!(withdrawn(2 * MAX_TRANSFERS + 1).unwrap_err().kind(), ErrorKind::Protocol);
        assert!(answers(MAX_ANSWERS).is_ok());
        assert_eq!(answers(MAX_ANSWERS + 1).unwrap_err().kind(), ErrorKind::Resource);
    }

    #[test]
    fn what_is_kept_for_a_peer_counts_against_the_budget_and_is_given_back() {
        let pool = Pool::new(usize::MAX, usize::MAX, usize::MAX);
        let mut load = PeerLoad::new(Share::new(&pool.account([127, 0, 0, 1].into())));
        let used = |pool: &Pool| pool.used().0;
        assert_eq!(used(&pool), 0);
        load.chunks(MANY_CHUNKS - 1).unwrap();
        load.arriving(2 * MAX_EAGER).unwrap();
        load.answers(MAX_EAGER - 1).unwrap();
        assert_eq!(used(&pool), 0, "small amounts are not counted");
        load.chunks(MANY_CHUNKS).unwrap();
        assert_eq!(used(&pool), MANY_CHUNKS * CHUNK_BYTES);
        load.chunks(3 * MANY_CHUNKS - 1).unwrap();
        assert_eq!(used(&pool), 2 * MANY_CHUNKS * CHUNK_BYTES);
        load.chunks(0).unwrap();
        load.arriving(2 * MAX_EAGER + 1).unwrap();
        assert_eq!(used(&pool), 2 * MAX_EAGER + 1);
        load.arriving(0).unwrap();
        load.answers(MAX_EAGER).unwrap();
        assert_eq!(used(&pool), MAX_EAGER);
        load.answers(0).unwrap();
        load.begin(1, 10).unwrap().unwrap();
        assert_eq!(used(&pool), TRANSFER_BYTES + 10 * size_of::<Segment>());
        load.without_list(10);
        assert_eq!((used(&pool), load.load()), (TRANSFER_BYTES, (1, 0)));
        load.ended(0);
        assert_eq!((used(&pool), load.load()), (0, (0, 0)));
    }

    #[test]
    fn a_transfer_without_room_is_refused_and_counts_until_it_has_ended() {
        let pool = Pool::new(usize::MAX, usize::MAX, 1);
        let mut load = PeerLoad::new(Share::new(&pool.account([127, 0, 0, 1].into())));
        load.begin(1, 2).unwrap().unwrap();
        assert_eq!(load.begin(2, 5).unwrap().unwrap_err().kind(), ErrorKind::Resource);
        assert_eq!(load.load(), (2, 2), "its list is not kept");
        load.ended_without_room();
        assert_eq!(load.load(), (1, 2));
        load.ended(2);
        assert!(load.begin(3, 5).unwrap().is_ok());
    }

    #[test]
    fn a_peer_has_named_the_transfers_up_to_its_last() {
        let mut load = unloaded();
        assert!(!load.has_named(0) && !load.has_named(1));
        load.begin(5, 1).unwrap().unwrap();
        assert_eq!([0, 1, 5, 6].map(|id| load.has_named(id)), [false, true, true, false]);
    }
}
