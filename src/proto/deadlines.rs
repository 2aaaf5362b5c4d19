//! Finds transfers that have stopped moving. Progress is counted in bytes, per transfer and per direction of the connection. A
//! transfer is overdue when it has not moved for the timeout and, in that time, either nothing else moved in its direction or
//! more moved than fair turns would have let go before it. Pure; the caller passes the time.

use super::limits::MAX_BACKLOG;
use crate::direct::Way;
use crate::hash::Map;
use crate::types::Key;
use std::time::{Duration, Instant};

/// Fewer bytes than this in one timeout are no progress, unless they are all that is left: a peer cannot keep a transfer alive
/// byte by byte.
pub(super) const FLOOR: u64 = 64 << 10;
/// Bytes of one transfer that may be in flight before another has its turn.
const TURN: u64 = 64 << 20;
/// The same for transfers that run one after the other: the whole transfer, and more than any memory holds.
const WHOLE: u64 = 1 << 44;
/// Slack in the bound on what may go before a transfer.
const SLACK: u64 = 1 << 20;
/// Bytes on the control connection that an announcement and its answer may wait behind: a full backlog at either engine.
const CONTROL: u64 = 2 * MAX_BACKLOG as u64;
/// How often in a row a lost channel may give a transfer that has not moved its whole time again: a path that comes back only to be lost
/// again keeps none alive.
const RESTARTS: u8 = 8;
/// How often the network's counters are read while any transfer must move.
const LOOK: Duration = Duration::from_millis(500);

/// Bytes that moved in one direction of the connection.
#[derive(Debug)]
struct Flow {
    bytes: u64,
    /// Bytes that show that the direction is alive: what moved, what arrived at the peer, and what it waits for. Then their
    /// number when it last counted as moving, and the time of that.
    signs: u64,
    counted: u64,
    last: Instant,
    /// Bytes that all transfers of this direction together may send before another one of it moves.
    ahead: u64,
    /// The same, summed over all transfers that ever started.
    begun: u64,
}

/// What a transfer with `left` bytes to go may send before another one moves. Twice what it may have in flight, since small and
/// large transfers alternate.
fn turn(left: u64, most: u64) -> u64 {
    2 * left.min(most)
}

impl Flow {
    fn note_alive(&mut self, signs: u64, now: Instant) {
        self.signs += signs;
        if self.signs - self.counted >= FLOOR {
            self.counted = self.signs;
            self.last = now;
        }
    }
}

/// A transfer that must move.
#[derive(Debug)]
struct Mark {
    way: Way,
    /// When it last moved enough, and how much its direction had moved by then.
    since: Instant,
    flow: u64,
    /// Bytes on the control connection at that time.
    control: u64,
    /// What all transfers of its direction might send first, at that time.
    ahead: u64,
    /// What had started in its direction by then, and what has started since and early enough to go first: the peer may have
    /// queued it before it learned of this transfer.
    begun: u64,
    late: u64,
    /// How often lost channels have given it its whole time again since it moved.
    restarts: u8,
    /// Bytes moved since then, and bytes to go.
    moved: u64,
    left: u64,
    /// The most bytes of it that go before another transfer has its turn.
    most: u64,
}

impl Mark {
    /// See [`turn`].
    fn turn(&self) -> u64 {
        turn(self.left, self.most)
    }

    /// Its time begins.
    fn begin(&mut self, flow: &Flow, control: u64, now: Instant) {
        (self.moved, self.since, self.flow, self.control) = (0, now, flow.bytes, control);
        (self.ahead, self.begun, self.late) = (flow.ahead, flow.begun, 0);
    }
}

/// A transfer that has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overdue {
    pub key: Key,
    pub way: Way,
    /// How long it has not moved.
    pub still: Duration,
    /// Other transfers moved in its direction.
    pub others_moved: bool,
}

#[derive(Debug)]
pub(super) struct Deadlines {
    out: Flow,
    incoming: Flow,
    /// Bytes on the control connection that transfers may have waited behind.
    control: u64,
    marks: Map<Key, Mark>,
    /// Bytes that the network had sent and received at the last look, and the time of that look.
    network: (u64, u64),
    looked: Instant,
}

impl Deadlines {
    pub(super) fn new(now: Instant) -> Deadlines {
        let flow = || Flow { bytes: 0, signs: 0, counted: 0, last: now, ahead: 0, begun: 0 };
        Deadlines { out: flow(), incoming: flow(), control: 0, marks: Map::default(), network: (0, 0), looked: now }
    }

    fn flow(&mut self, way: Way) -> &mut Flow {
        match way {
            Way::Out => &mut self.out,
            Way::In => &mut self.incoming,
        }
    }

    /// A transfer of `len` bytes must move from now on.
    pub(super) fn start(&mut self, key: Key, way: Way, len: u64, now: Instant) {
        self.mark(key, way, (len, TURN), now);
    }

    /// The same for a transfer that runs in a queue: later ones wait until it has ended, as it waits for those before it.
    pub(super) fn start_in_order(&mut self, key: Key, way: Way, len: u64, now: Instant) {
        self.mark(key, way, (len, WHOLE), now);
    }

    fn mark(&mut self, key: Key, way: Way, (len, most): (u64, u64), now: Instant) {
        let control = self.control;
        let flow = self.flow(way);
        flow.begun += turn(len, most);
        let (begun, ahead) = (flow.begun, flow.ahead);
        let mark =
            Mark { way, since: now, flow: flow.bytes, control, ahead, begun, late: 0, restarts: 0, moved: 0, left: len, most };
        flow.ahead += turn(len, most);
        if let Some(old) = self.marks.insert(key, mark) {
            self.flow(old.way).ahead -= old.turn();
        }
    }

    /// `bytes` of a transfer have moved.
    pub(super) fn moved(&mut self, key: Key, bytes: u64, now: Instant) {
        let Deadlines { out, incoming, control, marks, .. } = self;
        let Some(mark) = marks.get_mut(&key) else { return };
        let flow = match mark.way {
            Way::Out => out,
            Way::In => incoming,
        };
        flow.ahead -= mark.turn();
        mark.moved += bytes;
        mark.left = mark.left.saturating_sub(bytes);
        if mark.moved >= FLOOR || mark.left == 0 {
            mark.begin(flow, *control, now);
            mark.restarts = 0;
        }
        flow.ahead += mark.turn();
    }

    /// `bytes` of a transfer that have moved are lost, and move again: perhaps before others of its direction.
    pub(super) fn unmoved(&mut self, key: Key, bytes: u64) {
        let Some(mark) = self.marks.get_mut(&key) else { return };
        let (way, before) = (mark.way, mark.turn());
        (mark.left, mark.moved) = (mark.left + bytes, mark.moved.saturating_sub(bytes));
        let after = mark.turn();
        let flow = self.flow(way);
        flow.ahead = flow.ahead + after - before;
        self.marks.values_mut().filter(|mark| mark.way == way).for_each(|mark| mark.ahead += bytes);
    }

    /// A channel is lost: the time until this was known is not counted, since what goes on it goes again on others, where it may find the
    /// next silent NIC.
    pub(super) fn restart(&mut self, now: Instant) {
        let Deadlines { out, incoming, control, marks, .. } = self;
        for mark in marks.values_mut().filter(|mark| mark.restarts < RESTARTS) {
            let flow = match mark.way {
                Way::Out => &*out,
                Way::In => &*incoming,
            };
            // The channels of one NIC are lost together.
            mark.restarts += u8::from(now.saturating_duration_since(mark.since) > LOOK);
            mark.begin(flow, *control, now);
        }
    }

    /// A transfer has ended.
    pub(super) fn end(&mut self, key: Key) {
        if let Some(mark) = self.marks.remove(&key) {
            self.flow(mark.way).ahead -= mark.turn();
        }
    }

    /// Whether it is time to look at the network's counters.
    pub(super) fn must_look(&self, timeout: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.looked) >= LOOK.min(timeout / 8)
    }

    /// The network has sent and received so many bytes in all.
    pub(super) fn note_network(&mut self, (taken, brought): (u64, u64), now: Instant) {
        self.flowed(Way::Out, taken.saturating_sub(self.network.0), now);
        self.flowed(Way::In, brought.saturating_sub(self.network.1), now);
        self.network = (taken.max(self.network.0), brought.max(self.network.1));
        self.looked = now;
    }

    /// `bytes` of any transfer moved in one direction of the connection.
    pub(super) fn flowed(&mut self, way: Way, bytes: u64, now: Instant) {
        if bytes > 0 {
            let flow = self.flow(way);
            flow.bytes += bytes;
            flow.note_alive(bytes, now);
        }
    }

    /// Sent bytes have arrived at the peer. They count as a sign of life only: [`Deadlines::flowed`] has counted them before.
    pub(super) fn arrived(&mut self, bytes: u64, now: Instant) {
        if bytes > 0 {
            self.out.note_alive(bytes, now);
        }
    }

    /// Bytes moved on the control connection while announcements or answers waited behind them.
    pub(super) fn waited(&mut self, bytes: u64, now: Instant) {
        if bytes > 0 {
            self.control += bytes;
            self.out.note_alive(bytes, now);
            self.incoming.note_alive(bytes, now);
        }
    }

    /// Whether any transfer must move.
    pub(super) fn any(&self) -> bool {
        !self.marks.is_empty()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn has(&self, key: Key) -> bool {
        self.marks.contains_key(&key)
    }

    /// Bytes to go.
    #[cfg(any(test, fuzzing))]
    pub(super) fn left(&self, key: Key) -> Option<u64> {
        self.marks.get(&key).map(|mark| mark.left)
    }

    /// Drops all marks.
    pub(super) fn clear(&mut self) {
        self.marks.clear();
        (self.out.ahead, self.incoming.ahead) = (0, 0);
    }

    /// A transfer that has not moved for `timeout` although it should have. Call it several times in each timeout.
    pub(super) fn overdue(&mut self, timeout: Duration, now: Instant) -> Option<Overdue> {
        let mut others = [0usize; 2];
        self.marks.values().for_each(|mark| others[usize::from(mark.way == Way::Out)] += 1);
        let Deadlines { out, incoming, control, marks, .. } = self;
        marks.iter_mut().find_map(|(&key, mark)| {
            let flow = match mark.way {
                Way::Out => &*out,
                Way::In => &*incoming,
            };
            let still = now.saturating_duration_since(mark.since);
            if still <= timeout / 4 {
                mark.late = flow.begun - mark.begun;
            }
            if still <= timeout {
                return None;
            }
            let idle = now.saturating_duration_since(flow.last) > timeout;
            // What was in flight before it, what started soon after it, and what is in flight now.
            let passed_by = flow.bytes - mark.flow > SLACK + mark.ahead + mark.late + flow.ahead;
            let talked = *control - mark.control > CONTROL;
            // What moves beside a single transfer is its own.
            let others_moved = passed_by || (!idle && others[usize::from(mark.way == Way::Out)] > 1);
            (idle || passed_by || talked).then_some(Overdue { key, way: mark.way, still, others_moved })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_secs(10);
    const A: Key = Key { id: 1, mine: true };
    const B: Key = Key { id: 2, mine: true };

    fn at(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_transfer_that_never_moves_is_overdue_and_not_before() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(A, Way::In, 100, start);
        assert!(d.any() && d.overdue(T, at(start, 10.0)).is_none());
        let overdue = d.overdue(T, at(start, 10.1)).unwrap();
        assert_eq!((overdue.key, overdue.way, overdue.others_moved), (A, Way::In, false));
        assert!(overdue.still > T);
        d.end(A);
        assert!(!d.any() && d.overdue(T, at(start, 99.0)).is_none());
    }

    #[test]
    fn a_lost_channel_gives_its_transfers_their_time_again_but_not_for_ever() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(A, Way::In, 1 << 20, start);
        // Two channels of each NIC are lost, one NIC after the other.
        for n in 1..=u32::from(RESTARTS) {
            let now = at(start, 9.0 * f64::from(n));
            assert_eq!(d.overdue(T, now), None, "NIC {n}");
            d.restart(now);
            d.restart(now);
        }
        let last = at(start, 9.0 * f64::from(RESTARTS));
        let end = at(last, 11.0);
        d.restart(at(last, 9.0));
        assert_eq!(d.overdue(T, end).map(|overdue| overdue.still), Some(Duration::from_secs(11)));
        // What has moved may be held up again.
        d.flowed(Way::In, FLOOR, end);
        d.moved(A, FLOOR, end);
        d.restart(at(end, 9.0));
        assert_eq!(d.overdue(T, at(end, 18.0)), None);
        assert!(d.overdue(T, at(end, 20.0)).is_some());
    }

    #[test]
    fn an_idle_connection_does_not_shorten_the_first_deadline() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(A, Way::Out, 100, at(start, 1000.0));
        assert!(d.overdue(T, at(start, 1009.0)).is_none());
        assert!(d.overdue(T, at(start, 1011.0)).is_some());
    }

    #[test]
    fn slow_and_steady_survives() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        // Two transfers of 8 MiB, one after the other, at 16 KiB a second.
        d.start(A, Way::Out, 8 << 20, start);
        d.start(B, Way::Out, 8 << 20, start);
        for second in 1..1000u32 {
            let now = at(start, f64::from(second));
            d.flowed(Way::Out, 16 << 10, now);
            if second % 32 == 0 {
                d.moved(if second < 512 { A } else { B }, 512 << 10, now);
            }
            assert_eq!(d.overdue(T, now), None, "after {second} s");
        }
    }

    #[test]
    fn what_goes_one_behind_the_other_waits_for_all_before_it() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        let keys: Vec<Key> = (1..=10).map(|id| Key { id, mine: true }).collect();
        keys.iter().for_each(|&key| d.start_in_order(key, Way::Out, 4 << 30, start));
        for second in 0..40u32 {
            let now = at(start, f64::from(second));
            assert_eq!(d.overdue(T, now), None, "after {second} s");
            let key = keys[second as usize / 4];
            d.flowed(Way::Out, 1 << 30, now);
            d.moved(key, 1 << 30, now);
            if second % 4 == 3 {
                d.end(key);
            }
        }
        assert_eq!((d.out.ahead, d.any()), (0, false));
        // A transfer that others overtake is found all the same.
        d.start_in_order(A, Way::Out, 1 << 20, at(start, 40.0));
        for second in 40..60u32 {
            d.start_in_order(B, Way::Out, 1 << 30, at(start, f64::from(second)));
            d.flowed(Way::Out, 1 << 30, at(start, f64::from(second)));
            d.end(B);
        }
        assert!(d.overdue(T, at(start, 60.0)).is_some_and(|overdue| overdue.key == A && overdue.others_moved));
    }

    #[test]
    fn neighbours_hide_nothing_for_long() {
        let start = Instant::now();
        for (rate, way) in [(100u64 << 20, Way::Out), (1 << 20, Way::In)] {
            let mut d = Deadlines::new(start);
            d.start(A, way, 64 << 10, start);
            let mut ended = None;
            for second in 1..100u32 {
                let now = at(start, f64::from(second));
                // Another transfer starts and ends every second.
                d.start(B, way, rate, now);
                d.flowed(way, rate, now);
                d.moved(B, rate, now);
                d.end(B);
                if let Some(overdue) = d.overdue(T, now) {
                    assert_eq!((overdue.key, overdue.others_moved), (A, true));
                    ended = Some(second);
                    break;
                }
            }
            assert_eq!(ended, Some(11), "at {rate} bytes a second");
        }
    }

    #[test]
    fn what_was_under_way_before_may_go_first() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(B, Way::Out, 32 << 20, start);
        d.start(A, Way::Out, 64 << 10, start);
        for second in 1..=32u32 {
            let now = at(start, f64::from(second));
            d.flowed(Way::Out, 1 << 20, now);
            d.moved(B, 1 << 20, now);
            assert_eq!(d.overdue(T, now), None, "after {second} s");
        }
        d.end(B);
        assert_eq!(d.overdue(T, at(start, 33.0)), None);
        assert!(d.overdue(T, at(start, 43.0)).is_some());
        d.end(A);
        assert_eq!((d.out.ahead, d.incoming.ahead), (0, 0));
    }

    #[test]
    fn the_control_streams_hide_nothing_for_ever() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(A, Way::In, 100, start);
        let mut ended = None;
        for second in 1..10_000u32 {
            d.waited(1 << 20, at(start, f64::from(second)));
            if d.overdue(T, at(start, f64::from(second))).is_some() {
                ended = Some(u64::from(second));
                break;
            }
        }
        assert_eq!(ended, Some((CONTROL >> 20) + 1));
    }

    #[test]
    fn what_arrives_at_the_peer_shows_life_and_overtakes_nothing() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(A, Way::Out, 100, start);
        for second in 1..100u32 {
            d.arrived(100 << 20, at(start, f64::from(second)));
            assert_eq!(d.overdue(T, at(start, f64::from(second))), None);
        }
        assert!(d.overdue(T, at(start, 120.0)).is_some());
    }

    #[test]
    fn the_other_direction_does_not_count() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(A, Way::In, 1 << 20, start);
        d.flowed(Way::Out, 1 << 30, at(start, 9.0));
        let overdue = d.overdue(T, at(start, 10.5)).unwrap();
        assert!(!overdue.others_moved);
    }

    #[test]
    fn byte_by_byte_is_no_progress() {
        let start = Instant::now();
        let mut d = Deadlines::new(start);
        d.start(A, Way::In, 1 << 20, start);
        for second in 1..=10u32 {
            d.moved(A, 100, at(start, f64::from(second)));
            d.flowed(Way::In, 100, at(start, f64::from(second)));
        }
        assert!(d.overdue(T, at(start, 10.5)).is_some());
        // The last bytes always count.
        let mut d = Deadlines::new(start);
        d.start(A, Way::In, 100, start);
        d.moved(A, 100, at(start, 9.0));
        assert!(d.overdue(T, at(start, 18.0)).is_none());
        assert!(d.overdue(T, at(start, 19.5)).is_some());
    }
}
