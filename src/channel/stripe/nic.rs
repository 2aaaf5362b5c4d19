//! The speed of a NIC over all its channels, from acknowledgements: bytes that the kernel holds are not yet sent. Pure.
//!
//! A NIC that holds bytes all the time shows its speed, up or down, and also by what does not move. One that runs empty shows only that it is
//! at least so fast. What waits for the receiver says nothing about the NIC.

use super::{NicLoad, Probe, SHORTEST};
use std::time::{Duration, Instant};

/// Samples further apart than this show the interval of sampling no more.
const GAP: Duration = Duration::from_millis(100);
/// A sample spans this much time and volume, or `LONG` for a NIC that hardly moves; also some round trips.
const SPAN: Duration = Duration::from_millis(20);
const VOLUME: u64 = 64 << 10;
const LONG: Duration = Duration::from_millis(50);
const SPAN_ROUND_TRIPS: u32 = 2;
/// Where only whole chunks count, nothing may move between two of them for this long.
const CHUNK_LONG: Duration = Duration::from_millis(500);
/// A NIC that ran empty between two samples shows its speed, too, if it was busy for so long: then neither round trips nor the
/// kernel's coarse clock count.
const DRAINED: Duration = Duration::from_millis(10);
const DRAINED_ROUND_TRIPS: u32 = 8;
/// A NIC was busy all the time if it still holds this much of what it held before: the last few bytes may only wait for a late
/// acknowledgement.
const TAIL: u64 = 16 << 10;
/// While the receiver holds bytes up, no channel has more than this in flight.
const HELD_UP: u64 = 16 << 10;
/// A NIC with idle time in between still gives a lower bound on its speed. It is used only after this volume, since a shaper lets
/// bursts through, and raises the estimate by at most this factor at a time.
const BURST: u64 = 256 << 10;
const RISE: f64 = 4.0;
/// A NIC of unknown speed may have this much in flight. The amount doubles each time all of it is acknowledged by the next
/// sample.
const TRUST: u64 = 256 << 10;
/// The weight of a new sample: falling speeds count quickly, rising ones slowly, and a NIC below this part of its speed has nearly stopped.
const DOWN: f64 = 0.6;
const NEARLY: f64 = 0.25;
const STOPPED: f64 = 0.9;
const UP: f64 = 0.3;
/// The slowest NIC, bytes a second: no standstill shows less.
pub(super) const SLOWEST: f64 = 16e3;
/// The shortest time between samples of a NIC of unknown speed, and of other NICs.
const FIRST_LOOKS: Duration = Duration::from_micros(100);
const LOOKS: Duration = Duration::from_millis(1);
/// A NIC's speed is known after this many sampling intervals plus this many round trips.
const DELAY_LOOKS: u32 = 3;
const ROUND_TRIPS: u32 = 4;
/// A slow NIC is probed with a short chunk. At the known speed the chunk would take this many sampling intervals; if it is acknowledged in half
/// of the time, the NIC may be faster, and the next follows at once. Where the kernel reports how long it was busy, long intervals do not count.
const PROBE_LOOKS: f64 = 4.0;
/// Transfers wait for a probe. The pause after it is this many times as long, within limits, and at most four times the last: a short
/// outage slows a probe or two, and is over soon.
const PROBE_SHARE: u32 = 48;
const PROBE_LEAST: Duration = Duration::from_millis(500);
const PROBE_MOST: Duration = Duration::from_secs(4);
/// A NIC that nearly stops twice within so many of the longest pauses is not believed to be fast again before the pause is over, which doubles
/// each time. A single stop may be an accident.
const SEVERAL: u32 = 2;
/// A probe is not shorter than `SHORTEST`, or than what the NIC moves in this time, but never shorter than `PROBE_SHORTEST`.
const PROBE_TIME: f64 = 0.03;
const PROBE_SHORTEST: u64 = 16 << 10;
/// A NIC that for this long has needed at least `STUCK` seconds for what it held has become too slow for it. A lost packet may
/// hold up a fast one for shorter.
const WAITED: Duration = Duration::from_millis(500);
const STUCK: f64 = 1.0;

/// What the network has done with the bytes of a channel, or of all channels of a NIC.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flow {
    /// Bytes that the peer has acknowledged.
    pub acknowledged: u64,
    /// Bytes that the channel has taken and the peer has not acknowledged, and those of them that were sent.
    pub backlog: u64,
    pub in_flight: u64,
    /// Time with bytes to send or to be acknowledged, and the part of it in which the peer's receive window held them up.
    pub busy: Duration,
    pub limited: Duration,
    /// The shortest seen; zero while unknown.
    pub round_trip: Duration,
    /// The kernel's counters say so, and this is their unit of time; without, a byte counts as acknowledged when its chunk is done.
    pub tick: Option<Duration>,
}

impl Flow {
    /// Both together.
    pub(crate) fn and(self, other: Flow) -> Flow {
        Flow {
            acknowledged: self.acknowledged + other.acknowledged,
            backlog: self.backlog + other.backlog,
            in_flight: self.in_flight.max(other.in_flight),
            busy: self.busy + other.busy,
            limited: self.limited + other.limited,
            // A channel whose set-up waited in a full queue has seen no shorter one than that.
            round_trip: [self.round_trip, other.round_trip].into_iter().filter(|time| !time.is_zero()).min().unwrap_or_default(),
            tick: self.tick.zip(other.tick).map(|(a, b)| a.max(b)),
        }
    }
}

/// A NIC that has become too slow for what it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stuck {
    pub bytes: u64,
    /// How long they would take.
    pub seconds: f64,
}

/// Bytes that moved in a time; for part of it the receiver held them up.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    bytes: u64,
    time: Duration,
    held: Duration,
}

impl Span {
    fn add(&mut self, bytes: u64, time: Duration, held: Duration) {
        *self = Span { bytes: self.bytes + bytes, time: self.time + time, held: self.held + held };
    }

    /// Bytes per second.
    fn rate(&self) -> f64 {
        self.bytes as f64 / (self.time - self.held.min(self.time)).max(Duration::from_micros(1)).as_secs_f64()
    }
}

/// A probe in flight.
#[derive(Clone, Copy, Debug)]
struct Probing {
    since: Instant,
    len: u64,
    /// The busy time since then.
    busy: Duration,
}

/// Quick probes, one after the other.
#[derive(Debug, Default)]
struct Train {
    shown: Span,
    /// Bytes that a shaper may have saved up between them and let through at once.
    saved: u64,
    /// When the last one ended.
    last: Option<Instant>,
}

impl Train {
    /// What a shaper of this speed has saved up since the last probe.
    fn saving(&self, speed: f64, now: Instant) -> u64 {
        self.last.map_or(0, |last| (speed * now.saturating_duration_since(last).as_secs_f64()) as u64)
    }

    /// Another one, which begins at `begun`.
    fn add(&mut self, shown: Span, speed: f64, (begun, end): (Instant, Instant)) {
        self.saved += self.saving(speed, begun).min(shown.bytes / 2);
        self.shown.add(shown.bytes, shown.time, Duration::ZERO);
        self.last = Some(end);
    }

    /// Whether its volume is no burst.
    fn shows(&self) -> bool {
        self.shown.bytes >= BURST + self.saved
    }
}

/// When a NIC is probed if it is slow, and what has shown that.
#[derive(Debug, Default)]
struct Probes {
    /// When it was last probed or measured, and how long to wait after that.
    tried: Option<Instant>,
    pause: Duration,
    in_flight: Option<Probing>,
    /// The probes since the last one that was slow, or showed the speed.
    train: Train,
    /// When it nearly stopped.
    stopped: Option<Instant>,
}

impl Probes {
    /// The probe in flight took so long, and showed no higher speed.
    fn slow(&mut self, took: Duration) {
        let pause = self.pause.max(PROBE_LEAST);
        self.pause = (PROBE_SHARE * took).clamp(pause, 4 * pause).min(PROBE_MOST);
        self.train = Train::default();
    }

    /// A probe was quick: the next follows at once. Returns the rate once the volume is no burst. `speed`: what the NIC had until now.
    fn quick(&mut self, shown: Span, speed: f64, times: (Instant, Instant)) -> Option<f64> {
        self.tried = None;
        self.train.add(shown, speed, times);
        self.train.shows().then(|| std::mem::take(&mut self.train).shown.rate())
    }

    /// Its NIC has nearly stopped. One that does so again and again costs more than it carries. A probe is judged alone.
    fn stop(&mut self, now: Instant) {
        let since = self.stopped.map(|stopped| now.saturating_duration_since(stopped));
        if self.in_flight.is_some() || since.is_some_and(|since| since < self.pause.max(PROBE_LEAST)) {
            return;
        }
        let again = since.is_some_and(|since| since < SEVERAL * PROBE_MOST);
        self.pause = if again { (2 * self.pause).clamp(PROBE_LEAST, PROBE_MOST) } else { Duration::ZERO };
        (self.tried, self.stopped) = (Some(now), Some(now));
    }

    /// A probe is in flight that has not taken long yet.
    fn has_just_begun(&self, now: Instant) -> bool {
        self.in_flight.is_some_and(|probe| now.saturating_duration_since(probe.since) < LONG)
    }

    /// It nearly stopped so shortly ago that what follows says nothing.
    fn distrusted(&self, now: Instant) -> bool {
        self.stopped.is_some_and(|stopped| now.saturating_duration_since(stopped) < self.pause)
    }

    /// Whether so much time has passed since the last.
    fn rested(&self, pause: Duration, now: Instant) -> bool {
        self.tried.is_none_or(|tried| now.saturating_duration_since(tried) >= pause)
    }
}

/// A pair of NICs, one at each engine.
#[derive(Debug, Default)]
pub(crate) struct Nic {
    speed: f64,
    /// The best lower bound, as long as no sample has replaced it.
    floor: f64,
    /// How often its limit was doubled.
    trusted: u32,
    looked: Option<Instant>,
    postponed: Option<Instant>,
    /// The last sample, and the bytes added since.
    seen: Flow,
    given: u64,
    /// Busy time since the last estimate, and the time of the lower bound.
    busy: Span,
    least: Span,
    /// Since when it has needed too long for what it holds, not for the receiver's sake, and what was acknowledged then.
    slow: Option<(Instant, u64)>,
    /// At the last sample the receiver held bytes up.
    held: bool,
    /// The interval between the last two related samples.
    gap: Duration,
    probes: Probes,
}

impl Nic {
    /// Whether [`Nic::look`] is due.
    pub(crate) fn due(&self, now: Instant) -> bool {
        let pause = if self.speed == 0.0 { FIRST_LOOKS } else { LOOKS };
        let again = self.postponed.is_none_or(|at| now.saturating_duration_since(at) >= FIRST_LOOKS);
        again && self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= pause)
    }

    /// Bytes per second; 0 while unknown.
    pub(crate) fn speed(&self) -> f64 {
        self.speed
    }

    /// Bytes per second at least.
    pub(crate) fn floor(&self) -> f64 {
        self.speed.max(self.floor)
    }

    /// Bytes that its channels took and the peer has not acknowledged.
    pub(crate) fn backlog(&self) -> u64 {
        self.seen.backlog + self.given
    }

    /// Whether the receiver holds its bytes up.
    pub(crate) fn is_held(&self) -> bool {
        self.held
    }

    /// Puts off the next sample: the plugin cannot report progress now.
    pub(crate) fn postpone(&mut self, now: Instant) {
        self.postponed = Some(now);
    }

    /// Its channels were closed because it was stuck: nothing but the speed is known. What they have sent still lies in queues, and a
    /// probe behind it would show nothing else.
    pub(crate) fn emptied(&mut self, now: Instant) {
        let drained = Duration::from_secs_f64(self.drain().min(PROBE_MOST.as_secs_f64()));
        self.probes.pause = self.probes.pause.max(drained);
        self.probes.tried = Some(now);
        self.restart();
    }

    /// Its channels are others now: nothing but the speed is known.
    pub(crate) fn restart(&mut self) {
        let probes = Probes { in_flight: None, train: Train::default(), ..std::mem::take(&mut self.probes) };
        *self = Nic { speed: self.speed, probes, ..Nic::default() };
    }

    /// One of its channels took a chunk.
    pub(crate) fn gave(&mut self, len: u64, now: Instant) {
        // A probe with more behind it shows nothing.
        let alone = self.backlog() == 0 && self.load(now).probe.is_some();
        self.probes.in_flight = alone.then_some(Probing { since: now, len, busy: Duration::ZERO });
        if alone {
            self.probes.tried = Some(now);
        }
        self.given += len;
    }

    /// Takes a sample. `busy`: how long one of its channels was busy since the last.
    pub(crate) fn look(&mut self, flow: Flow, busy: Duration, now: Instant) {
        let before = self.looked.replace(now);
        let seen = std::mem::replace(&mut self.seen, flow);
        let moved = flow.acknowledged.saturating_sub(seen.acknowledged);
        if self.speed == 0.0 && moved > 0 && moved >= seen.backlog {
            self.trusted = (self.trusted + 1).min(20);
        }
        self.given = 0;
        let Some(gap) = before.map(|before| now.saturating_duration_since(before)).filter(|gap| !gap.is_zero()) else { return };
        if gap <= GAP {
            self.gap = gap;
        }
        let limited = flow.limited.saturating_sub(seen.limited).min(gap);
        let held = if flow.in_flight <= HELD_UP { limited } else { Duration::ZERO };
        if seen.backlog.saturating_sub(moved) >= TAIL {
            // A probe is judged at its end: its first bytes, which stall, would count, and what moves then would not.
            if !self.probes.has_just_begun(now) {
                self.busy.add(moved, gap, held);
                self.sample(flow.round_trip, now);
            }
        } else if moved > 0 {
            self.least.add(moved, gap, Duration::ZERO);
            self.at_least();
            // It ran empty. How long that took is known where it was long.
            if busy >= DRAINED.max(DRAINED_ROUND_TRIPS * flow.round_trip) && moved >= VOLUME {
                self.busy.add(moved, busy.min(gap), held.min(busy));
                self.sample(flow.round_trip, now);
            }
        }
        self.held = !held.is_zero();
        let slow = flow.tick.is_some() && !self.held && self.drain() >= STUCK;
        self.slow = slow.then(|| self.slow.unwrap_or((now, flow.acknowledged)));
        self.judge_probe(busy, gap, now);
    }

    /// The seconds that it needs for what it holds, as far as known.
    fn drain(&self) -> f64 {
        match self.speed {
            0.0 => 0.0,
            speed => self.seen.backlog as f64 / speed,
        }
    }

    fn sample(&mut self, round_trip: Duration, now: Instant) {
        let Span { bytes, time, held } = self.busy;
        let longest = if self.seen.tick.is_some() { LONG } else { CHUNK_LONG };
        let long = time >= longest.max(SPAN_ROUND_TRIPS * round_trip);
        if !long && (time < SPAN || bytes < VOLUME) {
            return;
        }
        if held > time / 2 {
            self.busy = Span::default();
            return;
        }
        let rate = self.busy.rate().max(SLOWEST);
        let weight = match self.speed {
            0.0 => 1.0,
            speed if rate < NEARLY * speed => {
                self.probes.stop(now);
                STOPPED
            }
            speed if rate < speed => DOWN,
            // It may be a burst.
            _ if bytes < BURST || self.probes.distrusted(now) => return,
            _ => UP,
        };
        self.speed += (rate - self.speed) * weight;
        (self.floor, self.busy, self.least) = (0.0, Span::default(), Span::default());
    }

    fn at_least(&mut self) {
        if self.least.bytes < BURST {
            return;
        }
        let least = self.least.rate();
        if self.speed > 0.0 {
            self.speed = self.speed.max(least.min(RISE * self.speed));
        } else {
            self.floor = self.floor.max(least);
        }
        self.least = Span::default();
    }

    /// A probe that is acknowledged soon is followed by others at once, until their volume shows the speed. One that takes long is no burst and shows
    /// the speed alone. `busy`: since the last sample, which was `gap` ago.
    fn judge_probe(&mut self, busy: Duration, gap: Duration, now: Instant) {
        let Some(probe) = &mut self.probes.in_flight else { return };
        probe.busy += busy;
        if self.seen.backlog > 0 {
            return;
        }
        let elapsed = now.saturating_duration_since(probe.since);
        // At most: too short a time would show a speed that no NIC has.
        let time = self.seen.tick.map_or(elapsed, |tick| elapsed.min(probe.busy + tick));
        let (shown, times) = (Span { bytes: probe.len, time, held: Duration::ZERO }, (probe.since, now));
        self.probes.in_flight = None;
        // It counts in its train alone, and what went before may have been a burst.
        self.least = Span::default();
        // Without the kernel's counters it may have been over right after the last look.
        let least = if self.seen.tick.is_some() { time } else { elapsed.saturating_sub(gap) };
        let long = least >= LONG.max(ROUND_TRIPS * self.seen.round_trip);
        if long || (Span { time: least, ..shown }).rate() < 2.0 * self.speed {
            if long {
                self.speed = self.speed.max(shown.rate());
            }
            self.probes.slow(time);
            return;
        }
        if let Some(rate) = self.probes.quick(shown, self.speed, times) {
            self.speed = self.speed.max(rate.min(RISE * self.speed));
        }
    }

    /// Whether it has needed too long for what it holds for a while, as the kernel's counters say, and the receiver is not the cause. One that
    /// moves nothing at all may be lost, and is not judged here.
    pub(crate) fn stuck(&self, now: Instant) -> Option<Stuck> {
        let (since, acknowledged) = self.slow?;
        let moves = self.seen.acknowledged > acknowledged;
        let waited = now.saturating_duration_since(since) >= WAITED;
        (moves && waited).then(|| Stuck { bytes: self.backlog(), seconds: self.drain() })
    }

    /// Its state for striping.
    pub(crate) fn load(&self, now: Instant) -> NicLoad {
        let shortest = ((PROBE_TIME * self.speed) as u64).clamp(PROBE_SHORTEST, SHORTEST);
        let looks = self.seen.tick.map_or(self.gap, |_| self.gap.min(SPAN / 2));
        // More than the last ones of its train left a shaper time for.
        let more = (2 * self.probes.train.saving(self.speed, now)).min(2 * BURST);
        let probe = ((PROBE_LOOKS * self.speed * looks.as_secs_f64()) as u64).max(shortest).max(more);
        NicLoad {
            backlog: self.backlog(),
            speed: self.speed,
            floor: self.floor(),
            trust: TRUST << self.trusted,
            moved: self.seen.acknowledged,
            delay: (DELAY_LOOKS * self.gap).max(ROUND_TRIPS * self.seen.round_trip),
            probe: self.probes.rested(PROBE_LEAST, now).then(|| Probe {
                len: probe,
                at_any_cost: self.probes.rested(self.probes.pause, now),
                beside_others: self.probes.rested(self.probes.pause / 2, now),
            }),
            probing: self.probes.in_flight.is_some(),
        }
    }
}

#[cfg(test)]
impl Nic {
    /// One whose speed is known, as if its channels had just been opened again.
    pub(super) fn known(speed: f64, now: Instant) -> Nic {
        Nic { speed, probes: Probes { tried: Some(now), ..Probes::default() }, ..Nic::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    fn flow(acknowledged: u64, backlog: u64) -> Flow {
        Flow { acknowledged, backlog, in_flight: backlog, tick: Some(Duration::ZERO), ..Flow::default() }
    }

    /// A NIC that has moved 1 MB a second for 200 ms and always held bytes.
    fn measured(start: Instant) -> Nic {
        let mut nic = Nic::default();
        for ms in 0..200 {
            nic.look(flow(1000 * ms, 50_000), Duration::ZERO, at(start, ms));
        }
        nic
    }

    #[test]
    fn busy_times_are_samples_and_others_a_lower_bound() {
        let start = Instant::now();
        let mut nic = measured(start);
        assert!((nic.speed() - 1e6).abs() < 1e4, "{}", nic.speed());
        // A long time in which all that it held moved says nothing, and neither does a single chunk that was no faster.
        nic.look(flow(249_000, 50_000), Duration::ZERO, at(start, 5000));
        nic.look(flow(330_000, 0), Duration::ZERO, at(start, 5090));
        nic.look(flow(930_000, 0), Duration::ZERO, at(start, 6090));
        assert!((nic.speed() - 1e6).abs() < 1e4, "{}", nic.speed());
    }

    #[test]
    fn a_standstill_shows_quickly_even_between_rare_samples() {
        let start = Instant::now();
        let mut nic = measured(start);
        for (n, most) in [(1, 0.9e6), (2, 0.2e6), (3, 0.04e6)] {
            nic.look(flow(199_000, 50_000), Duration::ZERO, at(start, 199 + 50 * n));
            assert!(nic.speed() < most, "{}", nic.speed());
        }
        // One sample after a long time, too, as long as bytes of before are left.
        let mut nic = measured(start);
        nic.look(flow(209_000, 40_000), Duration::ZERO, at(start, 5199));
        assert!(nic.speed() < 0.2e6, "{}", nic.speed());
    }

    #[test]
    fn a_speed_that_falls_a_thousandfold_is_known_within_half_a_second() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        let mut acknowledged = 0;
        for ms in 0..200 {
            acknowledged += 125_000;
            nic.look(flow(acknowledged, 4_000_000), Duration::ZERO, at(start, ms));
        }
        assert!(nic.speed() > 100e6);
        let mut known = 0;
        for ms in 1..500 {
            acknowledged += 125;
            nic.look(flow(acknowledged, 4_000_000 - 125 * ms), Duration::ZERO, at(start, 199 + ms));
            if known == 0 && nic.speed() < 2.0 * 125e3 {
                known = ms;
            }
        }
        assert!((1..=300).contains(&known), "{known} ms, {}", nic.speed());
        assert!(nic.stuck(at(start, 650)).is_none() && nic.stuck(at(start, 900)).is_some_and(|stuck| stuck.seconds > 10.0));
    }

    #[test]
    fn a_nic_that_always_runs_empty_between_samples_shows_that_it_is_slow() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        nic.look(flow(0, 0), Duration::ZERO, start);
        for n in 1..=10 {
            nic.gave(512_000, at(start, 50 * n - 45));
            nic.look(flow(512_000 * n, 0), Duration::from_millis(40), at(start, 50 * n));
        }
        assert!((nic.speed() - 12.8e6).abs() < 1e5, "{}", nic.speed());
        // Where it takes a moment, the time may be one of round trips.
        let mut nic = Nic::default();
        for n in 0..=10 {
            let far = Flow { round_trip: Duration::from_millis(10), ..flow(512_000 * n, 0) };
            nic.look(far, Duration::from_millis(40), at(start, 50 * n));
        }
        assert_eq!(nic.speed(), 0.0);
    }

    #[test]
    fn a_slow_receiver_is_not_a_slow_nic() {
        let start = Instant::now();
        let mut nic = measured(start);
        for ms in 200..3000 {
            let held = Flow { in_flight: 2000, limited: Duration::from_millis(ms - 200), ..flow(199_000, 900_000_000) };
            nic.look(held, Duration::ZERO, at(start, ms));
            assert!(nic.stuck(at(start, ms)).is_none());
        }
        assert!((nic.speed() - 1e6).abs() < 1e4, "{}", nic.speed());
        // A full window of bytes in flight waits for the network, whatever its size.
        for ms in 3000..4000 {
            let full = Flow { limited: Duration::from_millis(ms - 200), ..flow(199_000, 900_000_000) };
            nic.look(full, Duration::ZERO, at(start, ms));
        }
        assert!(nic.speed() < 1e5 && nic.stuck(at(start, 4000)).is_none(), "it may be lost");
        for ms in 4000..4100 {
            nic.look(
                Flow { limited: Duration::from_millis(ms - 200), ..flow(195_000 + ms, 900_000_000) },
                Duration::ZERO,
                at(start, ms),
            );
        }
        assert!(nic.stuck(at(start, 4100)).is_some());
    }

    #[test]
    fn a_nic_is_relieved_only_if_others_deliver_sooner() {
        let start = Instant::now();
        let slow = || {
            let mut nic = Nic::default();
            for ms in 0..1000 {
                nic.look(flow(100 * ms, 2_000_000), Duration::ZERO, at(start, ms));
            }
            nic
        };
        let (now, fast) = (at(start, 1000), || Nic { speed: 100e6, ..Nic::default() });
        let relieved = |other: Nic| super::super::stuck(&[slow(), other], |_| true, now).map(|(nic, _)| nic);
        assert_eq!(relieved(fast()), Some(0));
        assert_eq!(relieved(Nic { speed: 0.0, floor: 100e6, ..Nic::default() }), Some(0));
        assert_eq!(relieved(Nic { held: true, ..fast() }), None, "the receiver may be slow");
        assert_eq!(relieved(Nic::default()), None, "nothing is known of it");
        assert_eq!(relieved(Nic { speed: 0.3e6, ..Nic::default() }), None, "hardly faster");
        assert_eq!(relieved(Nic { given: 1 << 40, ..fast() }), None, "it has more to do");
        assert!(super::super::stuck(&[slow(), fast()], |nic| nic == 0, now).is_none(), "the only one with channels");
        assert!(super::super::stuck(&[slow()], |_| true, now).is_none());
    }

    #[test]
    fn what_is_not_measured_by_the_kernel_is_never_stuck() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        for ms in 0..2000 {
            nic.look(Flow { tick: None, ..flow(0, 1 << 30) }, Duration::ZERO, at(start, ms));
        }
        assert!(nic.speed() > 0.0 && nic.stuck(at(start, 2000)).is_none());
    }

    #[test]
    fn the_time_between_two_chunks_is_no_standstill_where_only_whole_ones_count() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        for ms in 0..2000 {
            nic.look(Flow { tick: None, ..flow(512_000 * (ms / 100), 2_000_000) }, Duration::ZERO, at(start, ms));
            assert!(ms < 300 || (4e6..7e6).contains(&nic.speed()), "{ms} ms: {}", nic.speed());
        }
        for ms in 2000..4000 {
            nic.look(Flow { tick: None, ..flow(512_000 * 20, 2_000_000) }, Duration::ZERO, at(start, ms));
        }
        assert!(nic.speed() < 1e6, "{}", nic.speed());
    }

    #[test]
    fn the_offered_load_does_not_count_as_the_speed() {
        let (start, mut nic) = (Instant::now(), Nic::default());
        // A chunk each millisecond, acknowledged before the next.
        for ms in 0..500 {
            nic.look(flow(512_000 * ms, if ms % 2 == 0 { 0 } else { 100 }), Duration::ZERO, at(start, ms));
            nic.gave(512_000, at(start, ms));
            assert!(nic.load(at(start, ms)).backlog >= 512_000);
        }
        assert_eq!(nic.speed(), 0.0);
        // But it is known to be at least so fast.
        assert!((nic.floor() - 512e6).abs() < 1e6, "{}", nic.floor());
    }

    #[test]
    fn a_burst_does_not_raise_the_estimate_but_volume_does() {
        let start = Instant::now();
        let mut nic = measured(start);
        let before = nic.speed();
        // Bursts of 192 KiB now and then.
        let mut all = 249_000;
        nic.look(flow(all, 0), Duration::ZERO, at(start, 250));
        for burst in 0..3 {
            all += 64 << 10;
            nic.look(flow(all, 0), Duration::ZERO, at(start, 260 + 10 * burst));
        }
        assert_eq!(nic.speed(), before);
        for burst in 0..4 {
            all += 64 << 10;
            nic.look(flow(all, 0), Duration::ZERO, at(start, 310 + burst));
        }
        assert!((2.0 * before..=RISE * before).contains(&nic.speed()), "{}", nic.speed());
    }

    #[test]
    fn slower_nics_are_probed_with_less() {
        let start = Instant::now();
        let probe = |speed: f64| Nic { speed, ..Nic::default() }.load(start).probe.unwrap().len >> 10;
        assert_eq!([1e9, 2.5e6, 0.8e6, 0.125e6, 1e3].map(probe), [64, 64, 23, 16, 16]);
        assert!(Nic::default().load(start).probe.is_some());
    }

    /// A probe of 16 KiB, alone, that takes so many milliseconds. Returns the moment of its end.
    fn probed(nic: &mut Nic, start: Instant, ms: u64, took: u64) -> u64 {
        let before = nic.seen.acknowledged;
        nic.gave(16 << 10, at(start, ms));
        nic.look(flow(before + 1, (16 << 10) - 1), Duration::from_millis(took / 2), at(start, ms + took / 2));
        nic.look(flow(before + (16 << 10), 0), Duration::from_millis(took - took / 2), at(start, ms + took));
        ms + took
    }

    /// The first moment, in milliseconds, at which a probe may cost something.
    fn due(nic: &Nic, start: Instant, from: u64) -> u64 {
        (from..from + 20_000).find(|&ms| nic.load(at(start, ms)).probe.is_some_and(|probe| probe.at_any_cost)).unwrap()
    }

    #[test]
    fn a_probe_that_takes_long_shows_the_speed_at_once_and_the_next_comes_later_each_time() {
        let (start, mut nic) = (Instant::now(), Nic { speed: SLOWEST, ..Nic::default() });
        nic.look(flow(0, 0), Duration::ZERO, start);
        let (mut ms, mut pauses) = (1000, Vec::new());
        for _ in 0..4 {
            let end = probed(&mut nic, start, ms, 131);
            assert!((120e3..130e3).contains(&nic.speed()), "{}", nic.speed());
            let next = due(&nic, start, end);
            pauses.push(next - ms);
            ms = next;
        }
        assert_eq!(pauses, [2000, 4000, 4000, 4000]);
    }

    #[test]
    fn probes_that_stand_still_at_first_do_not_make_the_speed_forgotten() {
        let (start, mut nic) = (Instant::now(), Nic { speed: 600e3, ..Nic::default() });
        nic.look(flow(0, 0), Duration::ZERO, start);
        let (mut ms, mut all) = (1000, 0);
        for _ in 0..20 {
            // Its shaper lets the packets pass at the end.
            nic.gave(17_000, at(start, ms));
            nic.look(flow(all, 17_000), Duration::from_millis(1), at(start, ms + 1));
            nic.look(flow(all, 17_000), Duration::from_millis(19), at(start, ms + 20));
            all += 17_000;
            nic.look(flow(all, 0), Duration::from_millis(7), at(start, ms + 27));
            assert!(nic.speed() >= 500e3, "{}", nic.speed());
            let next = due(&nic, start, ms + 27);
            assert!(next - ms >= 500, "the next after {} ms", next - ms);
            ms = next;
        }
    }

    #[test]
    fn a_nic_that_stops_again_and_again_is_not_believed_for_a_while() {
        // It holds bytes, stops for 200 ms, and moves them then.
        let believed = |stops: u64| {
            let (start, mut nic, mut all) = (Instant::now(), Nic::default(), 0);
            for ms in 0..700 * stops {
                all += if ms % 700 < 500 { 100_000 } else { 0 };
                nic.look(flow(all, 4_000_000), Duration::ZERO, at(start, ms));
            }
            (0..30_000).find(|ms| {
                all += 100_000;
                nic.look(flow(all, 4_000_000), Duration::ZERO, at(start, 700 * stops + ms));
                nic.speed() > 30e6
            })
        };
        let [one, two, five] = [1, 2, 5].map(|stops| believed(stops).unwrap());
        assert!(one < 100 && two > 3 * one && five > 3 * two, "{one} {two} {five}");
    }

    #[test]
    fn a_probe_that_is_fast_is_followed_by_others_and_a_slow_one_by_a_pause() {
        let (start, mut nic) = (Instant::now(), Nic { speed: 1e6, ..Nic::default() });
        nic.look(flow(0, 0), Duration::ZERO, start);
        let next = |nic: &Nic, ms: u64| nic.load(at(start, ms)).probe.is_some_and(|probe| probe.at_any_cost);
        // The next sample is late: the busy time counts.
        for n in 0..5 {
            nic.gave(50_000, at(start, 40 * n));
            assert!(!next(&nic, 40 * n + 20));
            nic.look(flow(50_000 * (n + 1), 0), Duration::from_millis(1), at(start, 40 * n + 39));
            assert!(next(&nic, 40 * n + 39));
        }
        assert_eq!(nic.speed(), 1e6);
        nic.gave(50_000, at(start, 200));
        nic.look(flow(300_000, 0), Duration::from_millis(1), at(start, 239));
        assert!(nic.speed() >= RISE * 1e6, "{}", nic.speed());
        nic.gave(50_000, at(start, 240));
        nic.look(flow(310_000, 40_000), Duration::from_millis(10), at(start, 250));
        nic.look(flow(350_000, 0), Duration::from_millis(10), at(start, 260));
        assert!(!next(&nic, 260) && !next(&nic, 700) && next(&nic, 3000));
    }

    #[test]
    fn what_a_shaper_saves_up_between_transfers_is_no_speed() {
        // A transfer every so many milliseconds makes a probe. A token bucket of 128 KiB lets most of them through at once.
        for (every, shaped) in [(35, true), (200, true), (35, false), (200, false)] {
            let (start, mut nic, mut tokens, mut all) = (Instant::now(), Nic { speed: 2.5e6, ..Nic::default() }, 128 << 10, 0);
            nic.look(flow(0, 0), Duration::ZERO, start);
            let (mut end, mut slow) = (0, false);
            for n in 1..100 {
                let begin = (every * n).max(end);
                tokens = (tokens + 2500 * (begin - end)).min(128 << 10);
                let Some(probe) = nic.load(at(start, begin)).probe.filter(|probe| probe.at_any_cost) else {
                    slow = true;
                    break;
                };
                let len = probe.len.min(512 << 10);
                nic.gave(len, at(start, begin));
                end = begin + 1 + if shaped { len.saturating_sub(tokens) / 2500 } else { 0 };
                tokens = tokens.saturating_sub(len);
                all += len;
                nic.look(flow(all, 0), Duration::from_millis(end - begin), at(start, end));
                if nic.speed() > 20e6 {
                    break;
                }
            }
            assert_eq!((slow, nic.speed() > 20e6), (shaped, !shaped), "every {every} ms: {}", nic.speed());
        }
    }

    #[test]
    fn a_probe_that_is_over_within_a_tick_shows_that_the_nic_is_fast_and_no_speed_that_it_may_lack() {
        let tick = Duration::from_millis(4);
        let (start, mut nic) = (Instant::now(), Nic { speed: SLOWEST, ..Nic::default() });
        nic.look(Flow { tick: Some(tick), ..flow(0, 0) }, Duration::ZERO, start);
        for n in 1..=200 {
            // It is looked at late, and its kernel saw it idle at each tick.
            nic.gave(16 << 10, at(start, 60 * n));
            nic.look(Flow { tick: Some(tick), ..flow((16 << 10) * n, 0) }, Duration::ZERO, at(start, 60 * n + 50));
            assert!(nic.load(at(start, 60 * n + 51)).probe.is_some_and(|probe| probe.at_any_cost) || nic.speed() > 1e6);
            assert!(nic.speed() <= 16384.0 / 0.004);
        }
        assert!(nic.speed() > 1e6, "{}", nic.speed());
    }

    #[test]
    fn a_probe_that_is_looked_at_late_is_slow_only_if_it_was_so_before_where_only_whole_chunks_count() {
        let (start, chunks) = (Instant::now(), |bytes, backlog| Flow { tick: None, ..flow(bytes, backlog) });
        for (first, quick) in [(1, true), (60, false)] {
            let mut nic = Nic { speed: SLOWEST, ..Nic::default() };
            nic.look(chunks(0, 0), Duration::ZERO, start);
            nic.gave(16 << 10, start);
            nic.look(chunks(0, 16 << 10), Duration::ZERO, at(start, first));
            nic.look(chunks(16 << 10, 0), Duration::ZERO, at(start, first + 60));
            let next = nic.load(at(start, first + 61)).probe.is_some_and(|probe| probe.at_any_cost);
            assert_eq!(next, quick, "{first} ms");
        }
    }

    #[test]
    fn a_probe_waits_for_the_queues_that_closed_channels_leave_behind() {
        let start = Instant::now();
        for (backlog, seconds) in [(50_000, 0), (2_000_000, 2), (1 << 30, 4)] {
            let mut nic = measured(start);
            nic.look(flow(200_000, backlog), Duration::ZERO, at(start, 200));
            nic.emptied(at(start, 200));
            let next = due(&nic, start, 200) - 200;
            assert!((1000 * seconds..=1000 * seconds + 600).contains(&next), "{backlog} bytes: after {next} ms");
        }
    }

    #[test]
    fn channels_that_were_set_up_through_a_full_queue_do_not_make_the_round_trip_longer() {
        let trip = |ms| Flow { round_trip: Duration::from_millis(ms), ..Flow::default() };
        for (flows, shortest) in [([3, 900], 3), ([900, 3], 3), ([0, 3], 3), ([3, 0], 3), ([0, 0], 0)] {
            assert_eq!(trip(flows[0]).and(trip(flows[1])).round_trip, Duration::from_millis(shortest), "{flows:?}");
        }
    }

    #[test]
    fn a_nic_whose_channels_were_closed_is_still_known_to_be_slow() {
        let start = Instant::now();
        let mut nic = measured(start);
        nic.emptied(at(start, 200));
        assert!((nic.speed() - 1e6).abs() < 1e4 && nic.backlog() == 0 && nic.load(at(start, 201)).probe.is_none());
        nic.restart();
        nic.look(flow(0, 0), Duration::ZERO, at(start, 300));
        assert!((nic.speed() - 1e6).abs() < 1e4 && nic.load(at(start, 301)).probe.is_none());
    }
}
