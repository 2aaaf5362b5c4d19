//! How long channels have been stalled: the bytes that the network moved on each, and the chunks that wait for it. Pure; the
//! caller passes the time.

use super::path::{Line, Outbound};
use crate::direct::Way;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One direction of a channel.
#[derive(Clone, Copy, Debug)]
struct Half {
    bytes: u64,
    /// When bytes last moved.
    moved: Instant,
    /// The later of the last movement and the start of the wait; `None` while nothing waits.
    since: Option<Instant>,
    chunks: usize,
}

impl Half {
    fn note(&mut self, bytes: u64, chunks: usize, waits: bool, now: Instant) {
        if bytes != self.bytes {
            (self.bytes, self.moved, self.since) = (bytes, now, None);
        }
        self.chunks = chunks;
        self.since = if waits { self.since.or(Some(now)) } else { None };
    }

    fn still(&self, now: Instant) -> Duration {
        self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

#[derive(Debug)]
struct Seen {
    nic: String,
    out: Half,
    incoming: Half,
    /// What the peer's kernel acknowledges; waits while an acknowledgement is due.
    answers: Half,
    outbound: Outbound,
    /// The plugin reports bytes.
    reports_moved: bool,
    open: bool,
}

/// A NIC over which the peer answers nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Silent<'a> {
    pub nic: &'a str,
    pub still: Duration,
    /// Its plugin reports bytes.
    pub reports_moved: bool,
    /// See [`Outbound::too_large`].
    pub too_large: Option<u32>,
}

impl Seen {
    /// The directions in which the network owes something: where no bytes are reported, a send may be over before its bytes have left, and
    /// only the receiver knows that a chunk is missing.
    fn owed(&self) -> impl Iterator<Item = &Half> {
        [Some(&self.answers), (!self.reports_moved).then_some(&self.incoming)].into_iter().flatten()
    }

    fn still(&self, now: Instant) -> Duration {
        self.owed().map(|half| half.still(now)).max().unwrap_or_default()
    }
}

/// All channels of a connection, in the order of their numbers.
#[derive(Debug, Default)]
pub(crate) struct Stillness(Vec<Seen>);

impl Stillness {
    /// Samples a channel.
    pub(crate) fn note(&mut self, channel: usize, line: &Line<'_>, now: Instant) {
        if self.0.len() <= channel {
            let half = Half { bytes: 0, moved: now, since: None, chunks: 0 };
            let (nic, reports_moved) = (line.nic.to_owned(), line.moved.is_some());
            let (outbound, open) = (line.outbound, line.open);
            self.0.push(Seen { nic, out: half, incoming: half, answers: half, outbound, reports_moved, open });
        }
        let Some(seen) = self.0.get_mut(channel) else { return };
        // What a closed channel says of its bytes is no movement, and nothing of the channel that will take its place.
        let (taken, brought, acknowledged) = match (line.open, line.moved) {
            (false, _) => (seen.out.bytes, seen.incoming.bytes, seen.answers.bytes),
            (true, Some((taken, brought))) => (taken, brought, line.outbound.acknowledged),
            (true, None) => (seen.out.bytes, line.arrived, line.outbound.acknowledged),
        };
        seen.reports_moved = if line.open { line.moved.is_some() } else { seen.reports_moved };
        let (out, incoming) = line.under_way;
        // Bytes that are in this host's kernel alone have not left.
        seen.out.note(taken, out, out > 0 || line.outbound.waiting > 0, now);
        seen.answers.note(acknowledged, out, line.outbound.due, now);
        (seen.outbound, seen.open) = (line.outbound, line.open);
        // Chunks that wait for this engine's own copies do not wait for the network.
        seen.incoming.note(brought, incoming, line.posted > 0, now);
    }

    fn half(&self, channel: usize, way: Way) -> Option<&Half> {
        self.0.get(channel).map(|seen| match way {
            Way::Out => &seen.out,
            Way::In => &seen.incoming,
        })
    }

    /// Chunks in flight on a channel, and how long they have been stalled.
    pub(crate) fn of(&self, channel: usize, way: Way, now: Instant) -> (usize, Duration) {
        self.half(channel, way).map_or((0, Duration::ZERO), |half| (half.chunks, half.still(now)))
    }

    /// What the network has of a channel's sent bytes.
    pub(crate) fn outbound(&self, channel: usize) -> Outbound {
        self.0.get(channel).map_or_else(Outbound::default, |seen| seen.outbound)
    }

    /// The channel whose control connection inside the plugin has had no answer for longest, and for how long, if that is a second or more.
    pub(crate) fn silent_control(&self) -> Option<(usize, Duration)> {
        let silent = self.0.iter().enumerate().filter_map(|(channel, seen)| Some((channel, seen.outbound.control_silent?)));
        silent.max_by_key(|&(_, time)| time).filter(|&(_, time)| time >= Duration::from_secs(1))
    }

    /// The channels with chunks, or bytes of them, in flight in a direction, the longest stalled first. If some are stalled, those that
    /// moved a moment ago are left out, since they are not the cause.
    pub(crate) fn stillest(&self, way: Way, now: Instant) -> Vec<usize> {
        let waits = |channel: usize| way == Way::Out && self.outbound(channel).waiting > 0;
        let busy = |&channel: &usize| self.half(channel, way).is_some_and(|half| half.chunks > 0) || waits(channel);
        let mut all: Vec<usize> = (0..self.0.len()).filter(busy).collect();
        all.sort_by_key(|&channel| std::cmp::Reverse(self.of(channel, way, now).1));
        let longest = all.first().map_or(Duration::ZERO, |&channel| self.of(channel, way, now).1);
        all.retain(|&channel| self.of(channel, way, now).1 >= longest / 2);
        all
    }

    /// Whether data or answers have come over another NIC than this after a time.
    pub(crate) fn moved_beside(&self, nic: &str, time: Instant) -> bool {
        self.0.iter().any(|seen| seen.nic != nic && seen.incoming.moved.max(seen.answers.moved) > time)
    }

    /// Whether another NIC than this has open channels and waits for no answer.
    pub(crate) fn is_free_beside(&self, nic: &str) -> bool {
        let waits = |nic: &str| self.0.iter().any(|seen| seen.nic == nic && seen.owed().any(|half| half.since.is_some()));
        self.0.iter().any(|seen| seen.nic != nic && seen.open && !waits(&seen.nic))
    }

    /// A NIC on which the peer has acknowledged nothing for longer than `timeout` although an acknowledgement was due all the time; for
    /// a plugin that does not report bytes, on which no chunk has been finished for longer than `chunk_timeout`, in either direction. The receiver's slowness is no such case: its kernel
    /// acknowledges what it has room for, and then none is due.
    pub(crate) fn silent_nic(&self, timeout: Duration, chunk_timeout: Duration, now: Instant) -> Option<Silent<'_>> {
        let limit = |seen: &Seen| if seen.reports_moved { timeout } else { chunk_timeout };
        let moved = |seen: &Seen| seen.owed().map(|half| half.moved).max();
        let answered = |nic: &str| self.0.iter().filter(|seen| seen.nic == nic).filter_map(moved).max();
        let silent = |seen: &&Seen| {
            let limit = limit(seen);
            let last = || answered(&seen.nic).is_some_and(|last| now.saturating_duration_since(last) > limit);
            seen.still(now) > limit && last()
        };
        let seen = self.0.iter().filter(silent).max_by_key(|seen| seen.still(now))?;
        Some(Silent {
            nic: &seen.nic,
            still: seen.still(now),
            reports_moved: seen.reports_moved,
            too_large: seen.outbound.too_large,
        })
    }

    /// A NIC that has received nothing for longer than `timeout` although the peer announced chunks that long ago: its name, the
    /// time, and the waiting channels, the longest first.
    pub(crate) fn dead_nic(&self, timeout: Duration, now: Instant) -> Option<(&str, Duration, Vec<usize>)> {
        let waits = |seen: &Seen| seen.reports_moved && seen.incoming.still(now) > timeout;
        self.0.iter().find(|seen| waits(seen))?;
        let mut last: BTreeMap<&str, Instant> = BTreeMap::new();
        for seen in self.0.iter().filter(|seen| seen.reports_moved) {
            let moved = last.entry(&seen.nic).or_insert(seen.incoming.moved);
            *moved = (*moved).max(seen.incoming.moved);
        }
        let dead = |seen: &&Seen| {
            waits(seen) && last.get(&*seen.nic).is_some_and(|&moved| now.saturating_duration_since(moved) > timeout)
        };
        let nic = &*self.0.iter().filter(dead).max_by_key(|seen| seen.incoming.still(now))?.nic;
        let on_it = |channel: &usize| self.0.get(*channel).is_some_and(|seen| *seen.nic == *nic);
        let channels: Vec<usize> = self.stillest(Way::In, now).into_iter().filter(on_it).collect();
        let still = channels.first().map_or(timeout, |&channel| self.of(channel, Way::In, now).1);
        Some((nic, still, channels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_secs(10);

    /// Samples once a second: bytes always arrive over eth1, and until `until` over the first channel of eth2.
    fn looks(until: u64, seconds: u64, reports_moved: bool) -> (Stillness, Instant) {
        let (mut stillness, start) = (Stillness::default(), Instant::now());
        let mut now = start;
        for second in 0..=seconds {
            now = start + Duration::from_secs(second);
            let bytes = [second * 1000, second.min(until), 0, 0];
            for (channel, nic) in ["eth1", "eth2", "eth2", "eth3"].into_iter().enumerate() {
                let waiting = if channel == 3 { 0 } else { 2 };
                let moved = reports_moved.then_some((0, bytes[channel]));
                let (under_way, outbound) = ((1, waiting), Outbound::default());
                stillness.note(
                    channel,
                    &Line { local: None, nic, moved, arrived: 0, outbound, under_way, posted: waiting, open: true },
                    now,
                );
            }
        }
        (stillness, now)
    }

    #[test]
    fn a_control_connection_without_an_answer_is_named() {
        let (mut stillness, now) = (Stillness::default(), Instant::now());
        assert_eq!(stillness.silent_control(), None);
        for (channel, millis) in [None, Some(999), Some(4000), Some(2000)].into_iter().enumerate() {
            let outbound = Outbound { control_silent: millis.map(Duration::from_millis), ..Outbound::default() };
            let line =
                Line { local: None, nic: "eth1", moved: None, arrived: 0, outbound, under_way: (0, 0), posted: 0, open: true };
            stillness.note(channel, &line, now);
            let longest = (channel >= 2).then_some((2, Duration::from_secs(4)));
            assert_eq!(stillness.silent_control(), longest);
        }
    }

    #[test]
    fn only_the_dead_nic_is_named() {
        // A stalled channel beside a moving one on the same NIC waits for its turn.
        let (stillness, now) = looks(u64::MAX, 30, true);
        assert_eq!(stillness.dead_nic(T, now), None);
        let (stillness, now) = looks(5, 15, true);
        assert_eq!(stillness.dead_nic(T, now), None);
        let (stillness, now) = looks(5, 16, true);
        let (nic, still, channels) = stillness.dead_nic(T, now).expect("eth2 is dead");
        assert_eq!((nic, still, channels), ("eth2", Duration::from_secs(16), vec![2, 1]));
        // Without byte counts no NIC can be called dead.
        let (stillness, now) = looks(5, 100, false);
        assert_eq!(stillness.dead_nic(T, now), None);
    }

    #[test]
    fn the_longest_stalled_come_first_and_moving_ones_are_not_named() {
        let (stillness, now) = looks(5, 20, true);
        assert_eq!(stillness.stillest(Way::In, now), [2, 1]);
        assert_eq!(
            (stillness.of(2, Way::In, now), stillness.of(0, Way::In, now).1),
            ((2, Duration::from_secs(20)), Duration::ZERO)
        );
        assert_eq!(stillness.stillest(Way::Out, now).len(), 4);
    }

    #[test]
    fn waits_for_own_copies_are_not_blamed_on_the_network() {
        let (mut stillness, start) = (Stillness::default(), Instant::now());
        for second in 0..100 {
            let (moved, outbound) = (Some((0, 0)), Outbound::default());
            let line = Line { local: None, nic: "eth1", moved, arrived: 0, outbound, under_way: (0, 3), posted: 0, open: true };
            stillness.note(0, &line, start + Duration::from_secs(second));
        }
        assert_eq!(stillness.dead_nic(T, start + 10 * T), None);
    }

    /// Samples once a second what is acknowledged and due on two NICs. `acknowledged`: on the second.
    fn answers(reports: bool, seconds: u64, acknowledged: impl Fn(u64) -> (u64, bool)) -> (Stillness, Instant) {
        let (mut stillness, start) = (Stillness::default(), Instant::now());
        let mut now = start;
        for second in 0..=seconds {
            now = start + Duration::from_secs(second);
            for (channel, nic) in ["eth1", "eth2"].into_iter().enumerate() {
                let (acknowledged, due) = if channel == 0 { (second * 1000, true) } else { acknowledged(second) };
                let outbound = Outbound { acknowledged, due, waiting: u64::from(due), ..Outbound::default() };
                let moved = reports.then_some((acknowledged, 0));
                stillness.note(
                    channel,
                    &Line { local: None, nic, moved, arrived: 0, outbound, under_way: (1, 0), posted: 0, open: true },
                    now,
                );
            }
        }
        (stillness, now)
    }

    #[test]
    fn a_nic_is_silent_only_while_an_acknowledgement_is_due() {
        let (two, ten) = (Duration::from_secs(2), T);
        let silent = |(stillness, now): &(Stillness, Instant)| stillness.silent_nic(two, ten, *now).map(|s| s.nic.to_owned());
        assert_eq!(silent(&answers(true, 5, |_| (7, true))), Some("eth2".to_owned()));
        // The peer's kernel has everything that it has room for.
        assert_eq!(silent(&answers(true, 50, |_| (7, false))), None);
        // Slow, and alive.
        assert_eq!(silent(&answers(true, 50, |second| (second, true))), None);
        // Without reports a chunk that is not finished says little for a while.
        assert_eq!(silent(&answers(false, 9, |_| (7, true))), None);
        assert_eq!(silent(&answers(false, 12, |_| (7, true))), Some("eth2".to_owned()));
    }

    #[test]
    fn without_reports_the_receiver_notices_too() {
        // The receiver's view: nothing is sent here, and receives are posted on the second NIC all the time.
        let waits = |seconds: u64, arrived: fn(u64) -> u64| {
            let (mut stillness, start) = (Stillness::default(), Instant::now());
            for second in 0..=seconds {
                for (channel, nic) in ["eth1", "eth2"].into_iter().enumerate() {
                    let (arrived, posted) = if channel == 0 { (0, 0) } else { (arrived(second), 3) };
                    let (outbound, under_way) = (Outbound::default(), (0, posted));
                    let line = Line { local: None, nic, moved: None, arrived, outbound, under_way, posted, open: true };
                    stillness.note(channel, &line, start + Duration::from_secs(second));
                }
            }
            let silent = stillness.silent_nic(T / 5, T, start + Duration::from_secs(seconds)).map(|silent| silent.nic.to_owned());
            (silent, stillness.is_free_beside("eth2"), stillness.is_free_beside("eth1"))
        };
        assert_eq!(waits(12, |_| 7), (Some("eth2".to_owned()), true, false));
        assert_eq!(waits(9, |_| 7).0, None, "chunks take a while");
        assert_eq!(waits(50, |second| second), (None, true, false));
    }

    #[test]
    fn a_closed_channel_moves_nothing_and_says_nothing_of_the_next_one() {
        let line = Line {
            local: None,
            nic: "eth1",
            moved: None,
            arrived: 500,
            outbound: Outbound { acknowledged: 300, ..Outbound::default() },
            under_way: (1, 1),
            posted: 1,
            open: true,
        };
        let (posted, arrived, under_way, outbound) = (0, 0, (0, 0), Outbound::default());
        let closed = Line { moved: Some((0, 0)), posted, arrived, under_way, outbound, open: false, ..line };
        let (mut stillness, start) = (Stillness::default(), Instant::now());
        let late = start + T;
        stillness.note(0, &line, start);
        stillness.note(0, &closed, late);
        assert!(!stillness.moved_beside("eth2", start + T / 2), "it was closed, and nothing moved");
        // A plugin without reports whose channel did not come up at first.
        let mut stillness = Stillness::default();
        stillness.note(0, &closed, start);
        let due = Line { outbound: Outbound { due: true, ..Outbound::default() }, moved: None, open: true, ..line };
        stillness.note(0, &due, start);
        stillness.note(0, &due, late - T / 4);
        assert_eq!(stillness.silent_nic(T / 5, T, late - T / 4), None, "a chunk takes its time");
    }

    #[test]
    fn what_a_socket_buffer_has_is_in_flight() {
        let (mut stillness, start) = (Stillness::default(), Instant::now());
        let outbound = Outbound { acknowledged: 5, waiting: 300, due: true, ..Outbound::default() };
        let line = Line {
            local: None,
            nic: "eth1",
            moved: Some((5, 0)),
            arrived: 0,
            outbound,
            under_way: (0, 0),
            posted: 0,
            open: true,
        };
        stillness.note(0, &line, start);
        stillness.note(0, &line, start + T);
        assert_eq!(stillness.stillest(Way::Out, start + T), [0]);
        assert_eq!(stillness.of(0, Way::Out, start + T), (0, T));
    }
}
