//! Striping: which channel carries the next chunk, and how long the chunk is. NICs differ in speed. The one that would finish the
//! chunk first gets it, unless the others, finishing all that is left, would still be sooner. The same rule applies among the
//! channels of a NIC. Pure.

mod nic;
#[cfg(test)]
mod simulation;

pub(crate) use nic::{Flow, Nic, Stuck};

use std::cmp::Ordering;
use std::time::{Duration, Instant};

/// A channel's state as striping sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Free slots of its window.
    pub free: usize,
    /// Bytes posted and not yet done.
    pub queued: u64,
    /// Measured speed, bytes per second; 0 while unknown.
    pub rate: f64,
    /// Its NIC, an index into [`Loads::nics`].
    pub nic: usize,
}

/// A NIC's state, over all of its channels.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NicLoad {
    /// Bytes that its channels took and the peer has not acknowledged, as far as known.
    pub backlog: u64,
    /// Measured speed, bytes per second; 0 while unknown.
    pub speed: f64,
    /// Bytes per second that it moves at least, even while its speed is unknown.
    pub floor: f64,
    /// While its speed is unknown: the bytes that it may have in flight.
    pub trust: u64,
    /// Bytes that have been acknowledged so far.
    pub moved: u64,
    /// The delay until the result of a chunk is known: some sampling intervals plus some round trips.
    pub delay: Duration,
    /// How to probe it now, if it is slow.
    pub probe: Option<Probe>,
    /// A probe is in flight.
    pub probing: bool,
}

/// A chunk that probes whether a slow NIC has recovered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    pub len: u64,
    /// The last probe was so long ago that this one may cost something.
    pub at_any_cost: bool,
    /// The same, beside a probe of another NIC: transfers wait for both at once.
    pub beside_others: bool,
}

/// The state of all channels of a path. With one NIC or none, NICs are not compared.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loads {
    pub channels: Vec<Load>,
    pub nics: Vec<NicLoad>,
    /// The NIC that goes first among equals: another one for each connection, else the short transfers of many connections would all take
    /// the same.
    pub first: usize,
    /// The numbers of the channels, if some of the path's are closed and so not among them.
    pub numbers: Vec<usize>,
    /// One channel carries a whole transfer of up to this many bytes, as long as at most half as many bytes of others are in
    /// flight or all together are not more. 0: channels share from the first chunk on.
    pub alone: u64,
}

/// What is to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Want {
    /// Most bytes of the next chunk.
    pub len: u64,
    /// All bytes that wait for channels, including the next chunk.
    pub rest: u64,
    /// Bytes of its whole transfer.
    pub total: u64,
}

/// The decision for the next chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pick {
    pub channel: usize,
    /// Its maximum bytes.
    pub len: u64,
}

/// A free channel is passed over if it would finish a chunk this many times later than the best one: then waiting is faster.
const WORTH_WAITING_FACTOR: f64 = 2.0;

/// A channel counts as slow below this fraction of the reference speed. Smaller differences are noise, and acting on noise would
/// make the busier channel look ever faster.
const SLOW: f64 = 0.5;
/// The same for a NIC, whose speed is measured only while it is certainly busy.
const SLOW_NIC: f64 = 0.7;

/// A NIC below this fraction of the fastest one's speed is not worth the cost of a lost packet on it; it is only probed now and
/// then.
pub(crate) const LEFT_ALONE: f64 = 1.0 / 12.0;
/// A probe is harmless if it takes at most this fraction of the time that the others need for the rest.
const HARMLESS: f64 = 0.125;
/// Chunks of a slow NIC are shorter in proportion, but not shorter than this.
const SHORTEST: u64 = 64 << 10;
const PAGE: u64 = nccl_net_abi::PAGE as u64;
/// The backlog of a NIC beside others: this long, or its delay, or one chunk. Enough to keep it busy, and little to wait for.
/// Less for a slow one.
const BACKLOG: Duration = Duration::from_millis(50);
const SLOW_BACKLOG: Duration = Duration::from_millis(20);
/// A NIC is relieved of what it holds if others would deliver that in this fraction of the time.
const SOONER: f64 = 0.125;
/// Estimates of slow NICs may be wrong by this factor before a transfer waits for one.
const CAUTION: f64 = 1.5;
/// Only transfers of at least this size probe a slow NIC.
const WORTH_A_PROBE: u64 = 1 << 20;

/// Chooses the channel of the next chunk. `None`: wait until a chunk on these channels is done.
pub(crate) fn pick(loads: &Loads, want: Want) -> Option<Pick> {
    match loads.nics.len() {
        0 | 1 => pick_alone(loads, want)
            .or_else(|| pick_channel(&loads.channels, |_| true, want.len))
            .map(|channel| Pick { channel, len: want.len }),
        _ => pick_nic(loads, want),
    }
}

/// The channel that is carrying this transfer alone, while it has a free slot and is not slow.
fn pick_alone(loads: &Loads, want: Want) -> Option<usize> {
    let queued: u64 = loads.channels.iter().map(|load| load.queued).sum();
    // Bytes of the previous transfer may still count although they have arrived.
    let most = loads.alone.max(want.total.saturating_add(loads.alone / 2));
    if queued == 0 || want.total > loads.alone || queued + want.rest > most {
        return None;
    }
    let (index, busiest) =
        loads.channels.iter().enumerate().filter(|(_, load)| load.free > 0).max_by_key(|(_, load)| load.queued)?;
    let slow = busiest.rate > 0.0 && busiest.rate < SLOW * reference(loads.channels.iter().map(|load| load.rate));
    (busiest.queued > 0 && !slow).then_some(index)
}

/// A candidate NIC with a free channel. Times are in bytes at the reference speed.
struct Candidate {
    nic: usize,
    /// Its speed relative to the reference.
    share: f64,
    len: u64,
    finish: f64,
}

impl Candidate {
    fn by_finish(&self, other: &Candidate) -> Ordering {
        self.finish.total_cmp(&other.finish)
    }

    /// Fast NICs first, then those that have moved most, then those that finish sooner.
    fn by_merit(&self, other: &Candidate, nics: &[NicLoad]) -> Ordering {
        let merit = |c: &Candidate| (c.share >= 1.0, nics[c.nic].moved);
        merit(self).cmp(&merit(other)).then(other.by_finish(self))
    }
}

fn pick_nic(loads: &Loads, want: Want) -> Option<Pick> {
    const MOST: usize = 64;
    let n = loads.nics.len().min(MOST);
    let mut free = [false; MOST];
    for load in loads.channels.iter().filter(|load| load.nic < n && load.free > 0) {
        free[load.nic] = true;
    }
    let backlog = |nic: usize| loads.nics[nic].backlog;
    let fastest = loads.nics.iter().map(|nic| nic.floor).fold(0.0, f64::max);
    let share = |nic: usize| match loads.nics[nic].speed {
        speed if speed > 0.0 && speed < SLOW_NIC * fastest => speed / fastest,
        _ => 1.0,
    };
    let candidate = |nic: usize| {
        let (share, unknown) = (share(nic), loads.nics[nic].speed <= 0.0);
        let len = match () {
            _ if unknown => want.len.min(loads.nics[nic].trust / 2),
            _ if share < 1.0 => want.len.min(((want.len as f64 * share) as u64 / PAGE * PAGE).max(SHORTEST)),
            _ => want.len,
        };
        Candidate { nic, share, len, finish: (backlog(nic) + len) as f64 / share }
    };
    let soonest = (0..n).map(|nic| candidate(nic).finish).min_by(f64::total_cmp)?;
    let fits = |c: &Candidate| {
        let (state, under_way) = (&loads.nics[c.nic], backlog(c.nic) + c.len);
        let most = |time: Duration| (state.speed * time.max(state.delay).as_secs_f64()).max(c.len as f64);
        match () {
            _ if state.speed <= 0.0 => under_way <= state.trust,
            _ if c.share >= 1.0 => under_way as f64 <= most(BACKLOG) && c.finish <= WORTH_WAITING_FACTOR * soonest,
            _ if c.share < LEFT_ALONE => false,
            _ => under_way as f64 <= most(SLOW_BACKLOG) && c.finish * CAUTION <= without(c.nic, n, &backlog, &share, want.rest),
        }
    };
    let within =
        |nic: usize, len: u64| pick_channel(&loads.channels, |load| load.nic == nic, len).map(|channel| Pick { channel, len });
    let candidates = || (0..n).map(|nic| (nic + loads.first) % n).filter(|&nic| free[nic]).map(candidate);
    let probing = (0..n).any(|nic| loads.nics[nic].probing && share(nic) < LEFT_ALONE);
    let probe = |c: Candidate| {
        let probe =
            loads.nics[c.nic].probe.filter(|_| c.share < LEFT_ALONE && backlog(c.nic) == 0 && want.rest >= WORTH_A_PROBE)?;
        let harmless = HARMLESS * without(c.nic, n, &backlog, &share, want.rest) * c.share;
        let now = probe.at_any_cost || (probe.beside_others && probing);
        let len = if now { probe.len.max(harmless as u64) } else { harmless as u64 / PAGE * PAGE };
        (now || len >= SHORTEST).then(|| within(c.nic, len.min(want.len)))?
    };
    if let Some(pick) = candidates().find_map(probe) {
        return Some(pick);
    }
    if let Some(pick) = candidates().filter(fits).min_by(Candidate::by_finish).and_then(|c| within(c.nic, c.len)) {
        return Some(pick);
    }
    // With nothing in flight no later event would retry, so the NIC that has moved most continues.
    if loads.channels.iter().any(|load| load.queued > 0) {
        return None;
    }
    candidates().max_by(|a, b| a.by_merit(b, &loads.nics)).and_then(|c| within(c.nic, c.len))
}

/// A NIC that has become too slow for what it holds, if others would deliver that in a fraction of the time. Not where the receiver holds
/// bytes up: it may be the cause everywhere. `open`: which NICs have open channels.
pub(crate) fn stuck(nics: &[Nic], open: impl Fn(usize) -> bool, now: Instant) -> Option<(usize, Stuck)> {
    let slow = nics.iter().enumerate().filter(|&(nic, _)| open(nic)).filter_map(|(nic, state)| Some((nic, state.stuck(now)?)));
    let (nic, stuck) = slow.max_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds))?;
    let mut others = nics.iter().enumerate().filter(|&(other, _)| other != nic && open(other));
    if others.clone().any(|(_, other)| other.is_held()) {
        return None;
    }
    let (speed, bytes) = others.by_ref().fold((0.0, stuck.bytes), |(s, b), (_, other)| (s + other.floor(), b + other.backlog()));
    (bytes as f64 <= SOONER * stuck.seconds * speed).then_some((nic, stuck))
}

/// When the other NICs of `n` would have finished their backlog and `rest`.
fn without(nic: usize, n: usize, backlog: &impl Fn(usize) -> u64, share: &impl Fn(usize) -> f64, rest: u64) -> f64 {
    // Like pouring water into vessels of different widths that are filled to different heights: the level rises over one after
    // another.
    let others = || (0..n).filter(|&other| other != nic);
    let height = |other: usize| backlog(other) as f64 / share(other);
    let level = |top: usize| {
        let under = others().filter(|&other| height(other) <= height(top));
        let (width, amount) = under.fold((0.0, rest as f64), |(w, a), other| (w + share(other), a + backlog(other) as f64));
        amount / width
    };
    others().map(level).fold(f64::INFINITY, f64::min)
}

/// The channel for a chunk of `len` bytes among those that `admitted` selects: the one with a free slot that would finish first.
/// `None` if no slot is free, or only on channels so slow that waiting for a fast one is quicker.
fn pick_channel(loads: &[Load], admitted: impl Fn(&Load) -> bool, len: u64) -> Option<usize> {
    let admitted = || loads.iter().enumerate().filter(|(_, load)| admitted(load));
    let reference = reference(admitted().map(|(_, load)| load.rate));
    let finish = |l: &Load| {
        // A channel without a measurement counts as fast as the others.
        let slow = l.rate > 0.0 && l.rate < SLOW * reference;
        (l.queued + len) as f64 / if slow { l.rate / reference } else { 1.0 }
    };
    let soonest = admitted().map(|(_, load)| finish(load)).min_by(f64::total_cmp)?;
    let free = admitted().filter(|(_, l)| l.free > 0);
    let (index, load) = free.min_by(|(_, a), (_, b)| finish(a).total_cmp(&finish(b)))?;
    (finish(load) <= WORTH_WAITING_FACTOR * soonest).then_some(index)
}

/// The reference speed: the upper quartile of the measured ones, so that one lucky measurement makes no other channel look slow.
fn reference(rates: impl Iterator<Item = f64>) -> f64 {
    const MOST: usize = 64;
    let mut known = [0.0f64; MOST];
    let mut n = 0;
    for rate in rates.filter(|&rate| rate > 0.0).take(MOST) {
        known[n] = rate;
        n += 1;
    }
    let known = &mut known[..n];
    known.sort_unstable_by(f64::total_cmp);
    known.get((3 * n).div_ceil(4).saturating_sub(1)).copied().unwrap_or(0.0)
}

/// Measures a channel's speed while it has requests in flight; idle time does not count.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    bytes_per_second: f64,
    /// When the current busy interval began; `None` while idle.
    since: Option<Instant>,
    /// Bytes and time of the current sample.
    bytes: u64,
    busy: Duration,
    /// The last completion.
    last: Option<Instant>,
}

/// Shortest busy time that a sample spans: completions come in bursts.
const SAMPLE: Duration = Duration::from_millis(2);
/// After this much idle time a measurement is forgotten.
const FORGET: Duration = Duration::from_millis(100);
/// A request that takes this many times longer than predicted marks the channel as stalled.
const STALL: f64 = 4.0;

impl Rate {
    /// Bytes per second; 0 while unknown. `oldest`: length of the oldest request in flight.
    pub(crate) fn get(&self, oldest: u64, now: Instant) -> f64 {
        match (self.since, self.last) {
            (Some(since), _) => {
                let waited = now.saturating_duration_since(since);
                if waited <= SAMPLE {
                    return self.bytes_per_second;
                }
                self.bytes_per_second.min(STALL * oldest as f64 / waited.as_secs_f64())
            }
            (None, Some(last)) if now.saturating_duration_since(last) < FORGET => self.bytes_per_second,
            _ => 0.0,
        }
    }

    /// The last measured speed, or less if the channel has stalled since.
    pub(crate) fn last(&self, oldest: u64, now: Instant) -> f64 {
        match self.since {
            Some(_) => self.get(oldest, now),
            None => self.bytes_per_second,
        }
    }

    /// The channel took a request.
    pub(crate) fn posted(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// `bytes` were done by `now`; `more` requests are in flight.
    pub(crate) fn done(&mut self, bytes: u64, now: Instant, more: bool) {
        let Some(since) = self.since else { return };
        self.since = more.then_some(now);
        self.last = Some(now);
        self.bytes += bytes;
        self.busy += now.saturating_duration_since(since);
        if self.busy < SAMPLE {
            return;
        }
        let sample = self.bytes as f64 / self.busy.as_secs_f64();
        const WEIGHT: f64 = 0.3;
        let before = self.bytes_per_second;
        self.bytes_per_second = if before == 0.0 { sample } else { before * (1.0 - WEIGHT) + sample * WEIGHT };
        (self.bytes, self.busy) = (0, Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Picks a channel as if there were one NIC.
    fn pick(channels: &[Load], len: u64) -> Option<usize> {
        super::pick(&Loads { channels: channels.to_vec(), ..Loads::default() }, Want { len, rest: len, total: len })
            .map(|pick| pick.channel)
    }

    proptest! {
        /// Over a long transfer every channel carries a share in proportion to its speed.
        #[test]
        fn shares_follow_speed(rates in proptest::collection::vec(1u32..50, 1..8)) {
            const CHUNK: u64 = 1;
            let mut queued = vec![0u64; rates.len()];
            let mut credit = vec![0f64; rates.len()];
            let mut sent = vec![0u64; rates.len()];
            for _ in 0..2000 {
                loop {
                    let loads: Vec<_> = queued.iter().zip(&rates).map(|(&q, &r)| Load { free: 16 - q as usize, queued: q, rate: f64::from(r), nic: 0 }).collect();
                    let Some(c) = pick(&loads, CHUNK) else { break };
                    queued[c] += CHUNK;
                    sent[c] += CHUNK;
                }
                for c in 0..rates.len() {
                    credit[c] += f64::from(rates[c]) / 50.0;
                    let done = (credit[c] as u64).min(queued[c]);
                    credit[c] = (credit[c] - done as f64).min(1.0);
                    queued[c] -= done;
                }
            }
            let total: u64 = sent.iter().sum();
            let sum: u32 = rates.iter().sum();
            let ideal = 2000.0 * f64::from(sum) / 50.0;
            prop_assert!(total as f64 >= 0.9 * ideal - 16.0 * rates.len() as f64, "{total} of {ideal}");
        }

        #[test]
        fn never_a_full_channel(loads in proptest::collection::vec((0usize..3, 0u64..100, 0u32..5), 0..10)) {
            let loads: Vec<_> = loads.into_iter().map(|(free, queued, rate)| Load { free, queued, rate: f64::from(rate), nic: 0 }).collect();
            if let Some(c) = pick(&loads, 10) {
                prop_assert!(loads[c].free > 0);
            }
        }
    }

    /// Hands out `total` bytes in chunks of `len` of which none completes, and returns how many each channel gets.
    fn handed_out(alone: u64, mut channels: Vec<Load>, total: u64, len: u64) -> Vec<u64> {
        let mut chunks = vec![0; channels.len()];
        for sent in 0..total / len {
            let loads = Loads { channels: channels.clone(), alone, ..Loads::default() };
            let Some(pick) = super::pick(&loads, Want { len, rest: total - sent * len, total }) else { break };
            chunks[pick.channel] += 1;
            channels[pick.channel].queued += len;
            channels[pick.channel].free -= 1;
        }
        chunks
    }

    #[test]
    fn one_channel_takes_a_small_transfer_alone() {
        const K: u64 = 1 << 10;
        let idle = Load { free: 16, queued: 0, rate: 0.0, nic: 0 };
        assert_eq!(handed_out(0, vec![idle; 4], 1024 * K, 128 * K), [2, 2, 2, 2], "not configured");
        assert_eq!(handed_out(1024 * K, vec![idle; 4], 1024 * K, 128 * K), [8, 0, 0, 0]);
        assert_eq!(handed_out(1024 * K, vec![idle; 4], 2048 * K, 256 * K), [2, 2, 2, 2], "too much for one");
        let left = |queued| [vec![idle, Load { queued, ..idle }], vec![idle; 2]].concat();
        assert_eq!(handed_out(1024 * K, left(512 * K), 1024 * K, 512 * K), [0, 2, 0, 0], "the previous one is not complete");
        assert_eq!(handed_out(1024 * K, left(513 * K), 1024 * K, 512 * K), [1, 0, 1, 0], "with too much left");
        assert_eq!(handed_out(1024 * K, left(700 * K), 700 * K, 350 * K), [1, 0, 1, 0], "two at once");
        assert_eq!(handed_out(1024 * K, left(960 * K), 64 * K, 64 * K), [0, 1, 0, 0]);
        assert_eq!(handed_out(1024 * K, left(961 * K), 64 * K, 64 * K), [1, 0, 0, 0], "a small one behind much");
        assert_eq!(handed_out(1024 * K, vec![idle; 4], 1280 * K, 160 * K), [2, 2, 2, 2], "a little too much for one");
        assert_eq!(handed_out(1024 * K, vec![Load { free: 3, ..idle }; 4], 1024 * K, 128 * K), [3, 3, 2, 0], "no slot is left");
        let slow = Load { rate: 1e6, queued: 64 * K, ..idle };
        let fast = Load { rate: 1e9, ..idle };
        assert_eq!(handed_out(1024 * K, vec![slow, fast, fast, fast], 512 * K, 128 * K)[0], 0, "a slow one");
    }

    #[test]
    fn idle_channels_share_evenly_before_anything_is_known() {
        let mut queued = [0u64; 4];
        for _ in 0..8 {
            let loads = queued.map(|q| Load { free: 16 - q as usize, queued: q, rate: 0.0, nic: 0 });
            let c = pick(&loads, 1).unwrap();
            queued[c] += 1;
        }
        assert_eq!(queued, [2; 4]);
    }

    #[test]
    fn connections_begin_with_different_nics() {
        for first in 0..9 {
            let channels = (0..6).map(|channel| Load { free: 16, queued: 0, rate: 0.0, nic: channel % 3 }).collect();
            let nics = vec![NicLoad { trust: 1 << 20, ..NicLoad::default() }; 3];
            let loads = Loads { channels, nics, first, ..Loads::default() };
            let pick = super::pick(&loads, Want { len: 1000, rest: 1000, total: 1000 }).expect("all are free");
            assert_eq!(pick.channel % 3, first % 3);
        }
    }

    #[test]
    fn a_lucky_or_noisy_measurement_slows_no_channel_down() {
        // One channel looks ten times as fast, and the others differ by less than a factor of two: all are used alike.
        let rates = [1.0, 1.1, 1.4, 0.9, 10.0, 1.0, 1.2, 1.3];
        let mut queued = [0u64; 8];
        for _ in 0..32 {
            let loads: Vec<_> =
                queued.iter().zip(rates).map(|(&q, rate)| Load { free: 16 - q as usize, queued: q, rate, nic: 0 }).collect();
            queued[pick(&loads, 1).unwrap()] += 1;
        }
        assert_eq!(queued, [4; 8]);
    }

    #[test]
    fn speed_is_measured_over_busy_time_and_forgotten_when_idle() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut rate = Rate::default();
        assert_eq!(rate.get(0, start), 0.0);
        // Two bursts of 1 ms with a pause of 50 ms between them: 2,000 bytes in 2 ms.
        for begin in [0, 51] {
            rate.posted(at(begin));
            rate.done(1000, at(begin + 1), false);
        }
        let measured = rate.get(0, at(53));
        assert!((measured - 1e6).abs() < 1.0, "{measured}");
        assert_eq!(rate.get(0, at(53) + FORGET), 0.0, "idle for a long time");
        // In flight for 100 ms instead of the expected 1 ms: at most a quarter of the speed that this time implies.
        rate.posted(at(60));
        assert_eq!(rate.get(1000, at(62)), measured);
        let stalled = rate.get(1000, at(160));
        assert!(stalled < 0.05 * measured, "{stalled}");
    }
}
