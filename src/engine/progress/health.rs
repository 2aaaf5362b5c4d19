//! Checks a connection once a second: rates for statistics, and log lines about a channel far slower than the others,
//! retransmits, and a peer that keeps silent. Time and numbers come from the caller.

use crate::channel::router::Totals;
use crate::logging::Limiter;
use crate::stats::ChannelStats;
use std::time::{Duration, Instant};

/// Time between checks.
const LOOK: Duration = Duration::from_secs(1);
/// A channel becomes slow when its NIC is below this fraction of the reference speed, and recovers above twice that.
const FAR_BELOW: f64 = 0.25;
/// Checks in a row that make a channel slow.
const LOOKS: u32 = 3;
/// A channel that was busy for less than this since its last sample says nothing about its speed yet.
const BUSY: Duration = Duration::from_millis(100);
/// Retransmits are logged above this share and this number.
const LOSS: f64 = 0.01;
const LOST: u64 = 50;
const LOSS_OVER: Duration = Duration::from_secs(5);
/// Time between two lines about retransmits.
const QUIET: Duration = Duration::from_secs(60);

/// What the last check saw of a channel.
#[derive(Clone, Debug, Default)]
struct Seen {
    sent: u64,
    received: u64,
    busy: bool,
    rates: (f64, f64),
    delivered: Delivered,
    below: u32,
    slow: bool,
    stalls: u64,
    segments: u64,
    retransmits: u64,
}

/// What the peer has acknowledged on a channel. A send may end when a kernel, or a plugin, has taken its bytes, and a short chunk passes a slow NIC
/// in a burst: neither shows a speed.
#[derive(Clone, Debug, Default)]
struct Delivered {
    /// As of the last check; `None` if the channel was lost since.
    seen: Option<(u64, Duration)>,
    /// Bytes and busy time of the sample that has begun.
    bytes: u64,
    busy: Duration,
    /// Bytes a second while it was busy, of the last sample, and in the time since the last check, busy or not.
    while_busy: f64,
    achieved: f64,
    /// The one if a sample has ended with this check, else the other.
    newest: f64,
}

impl Delivered {
    /// A check. Returns whether a sample has ended.
    fn look(&mut self, channel: &ChannelStats, elapsed: f64) -> bool {
        (self.achieved, self.newest) = (0.0, 0.0);
        let Some(now) = channel.delivered else {
            self.seen = self.seen.filter(|_| !channel.lost);
            return false;
        };
        let before = self.seen.replace(now).filter(|before| before.0 <= now.0 && before.1 <= now.1);
        let Some((bytes, busy)) = before.map(|before| (now.0 - before.0, now.1 - before.1)) else { return false };
        if elapsed > 0.0 {
            self.achieved = bytes as f64 / elapsed;
        }
        (self.bytes, self.busy) = (self.bytes + bytes, self.busy + busy);
        let ended = self.busy >= BUSY;
        if ended {
            self.while_busy = self.bytes as f64 / self.busy.as_secs_f64();
            (self.bytes, self.busy) = (0, Duration::ZERO);
        }
        self.newest = if ended { self.while_busy } else { self.achieved };
        ended
    }
}

/// The sums of a NIC's channels: see [`Delivered`].
struct Nic<'a> {
    name: &'a str,
    achieved: f64,
    newest: f64,
}

/// The health checks of one connection.
pub(crate) struct Health {
    looked: Option<Instant>,
    totals: Totals,
    channels: Vec<Seen>,
    /// The silence, and the stalled transfer, were logged and are not over.
    silence_logged: bool,
    standstill_logged: bool,
    slow_answers: u64,
    loss_logged: Option<Instant>,
    loss_looked: Option<Instant>,
    lines: Limiter,
}

impl Health {
    pub(crate) fn new() -> Health {
        Health {
            looked: None,
            totals: Totals::default(),
            channels: Vec::new(),
            silence_logged: false,
            standstill_logged: false,
            slow_answers: 0,
            loss_logged: None,
            loss_looked: None,
            lines: Limiter::new(5),
        }
    }

    /// Whether [`Health::look`] is due.
    pub(crate) fn due(&self, now: Instant) -> bool {
        self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= LOOK)
    }

    /// Whether the channels have moved since the last check, or have work in flight. An idle connection costs no system call.
    pub(crate) fn worth_a_look(&mut self, totals: Totals, busy: bool) -> bool {
        let before = std::mem::replace(&mut self.totals, totals);
        busy || before != totals
    }

    /// Checks the channels; returns the lines to log.
    pub(crate) fn look(&mut self, channels: &[ChannelStats], now: Instant) -> Vec<String> {
        self.channels.resize(channels.len(), Seen::default());
        let elapsed = self.looked.map_or(0.0, |looked| now.saturating_duration_since(looked).as_secs_f64());
        let mut significant = vec![false; channels.len()];
        for ((seen, channel), significant) in self.channels.iter_mut().zip(channels).zip(&mut significant) {
            let (sent, received) = (channel.sent_bytes - seen.sent, channel.received_bytes - seen.received);
            if elapsed > 0.0 {
                seen.rates = (sent as f64 / elapsed, received as f64 / elapsed);
            }
            let busy = channel.window_out + channel.window_in > 0;
            if seen.busy && busy && sent + received == 0 && elapsed > 0.0 {
                seen.stalls += 1;
            }
            *significant = seen.delivered.look(channel, elapsed) || (channel.avoided && seen.delivered.while_busy > 0.0);
            (seen.sent, seen.received, seen.busy) = (channel.sent_bytes, channel.received_bytes, busy);
        }
        let mut lines: Vec<String> = self.compare(channels, &significant).into_iter().collect();
        lines.extend(self.retransmits(channels, now));
        self.looked = Some(now);
        lines
    }

    /// The line about channels that have become slow, if any: while they were busy their NIC brought the peer far less than others did all in all.
    /// Channels of one NIC share it, and not evenly.
    fn compare(&mut self, channels: &[ChannelStats], significant: &[bool]) -> Option<String> {
        let mut nics: Vec<Nic<'_>> = Vec::new();
        for (seen, channel) in self.channels.iter().zip(channels) {
            let Delivered { achieved, newest, .. } = seen.delivered;
            match nics.iter_mut().find(|nic| nic.name == channel.nic) {
                Some(nic) => (nic.achieved, nic.newest) = (nic.achieved + achieved, nic.newest + newest),
                None => nics.push(Nic { name: &channel.nic, achieved, newest }),
            }
        }
        let mut speeds: Vec<f64> = nics.iter().map(|nic| nic.achieved).filter(|&speed| speed > 0.0).collect();
        speeds.sort_unstable_by(f64::total_cmp);
        let reference = *speeds.get((3 * speeds.len()).div_ceil(4).checked_sub(1)?)?;
        let mut fresh = Vec::new();
        for (i, (seen, channel)) in self.channels.iter_mut().zip(channels).enumerate() {
            let Delivered { while_busy, newest, .. } = seen.delivered;
            // Where nothing moves, the NIC is silent, which is another matter.
            if !significant[i] || while_busy == 0.0 {
                continue;
            }
            let of_nic = nics.iter().find(|nic| nic.name == channel.nic).map_or(0.0, |nic| nic.newest);
            let speed = of_nic - newest + while_busy;
            if speed < FAR_BELOW * reference {
                seen.below += 1;
                if seen.below >= LOOKS && !seen.slow {
                    seen.slow = true;
                    fresh.push(format!("channel {i} ({}) at {}", place(channel), crate::stats::speed(while_busy)));
                }
            } else {
                seen.below = 0;
                seen.slow &= speed < 2.0 * FAR_BELOW * reference;
            }
        }
        (!fresh.is_empty()).then(|| {
            const MOST: usize = 4;
            let more = if fresh.len() > MOST { format!(" and {} more", fresh.len() - MOST) } else { String::new() };
            let named = fresh[..fresh.len().min(MOST)].join(", ");
            format!(
                "{named}{more}: far below other NICs, which run at {}; look at that NIC and its path",
                crate::stats::speed(reference)
            )
        })
    }

    /// The line about retransmits since the kernel was last asked, if they are many.
    fn retransmits(&mut self, channels: &[ChannelStats], now: Instant) -> Option<String> {
        if self.loss_looked.is_some_and(|looked| now.saturating_duration_since(looked) < LOSS_OVER) {
            return None;
        }
        self.loss_looked = Some(now);
        let (mut again, mut of, mut worst) = (0, 0, (0, None));
        for (seen, channel) in self.channels.iter_mut().zip(channels) {
            let Some(network) = &channel.network else { continue };
            let first = seen.segments == 0;
            let (more, lost) =
                (network.segments.saturating_sub(seen.segments), network.retransmits.saturating_sub(seen.retransmits));
            (seen.segments, seen.retransmits) = (network.segments, network.retransmits);
            if first {
                continue;
            }
            (again, of) = (again + lost, of + more);
            if lost > worst.0 {
                worst = (lost, Some(channel));
            }
        }
        let logged = self.loss_logged.is_some_and(|logged| now.saturating_duration_since(logged) < QUIET);
        if logged || again < LOST || (again as f64) < LOSS * of as f64 {
            return None;
        }
        self.loss_logged = Some(now);
        let share = 100.0 * again as f64 / of.max(1) as f64;
        let worst = worst.1.map_or(String::new(), |c| format!(", most of them on {}", place(c)));
        Some(format!("{again} of {of} segments ({share:.1} %) were retransmitted recently{worst}: the network loses packets"))
    }

    /// The peer has been silent for `silent`, of at most `limit`; `standstill` describes a stalled transfer. Returns the lines to
    /// log.
    pub(crate) fn answers(&mut self, silent: Duration, limit: Duration, standstill: Option<String>) -> Vec<String> {
        let mut lines = Vec::new();
        let quiet = silent > limit / 2;
        if quiet && !self.silence_logged {
            lines.push(format!(
                "nothing was received from the peer for {silent:.1?}, not even a heartbeat: it is stopped, overloaded or cut off; \
                 the connection ends after {limit:.1?}"
            ));
        }
        self.silence_logged = quiet;
        if let (Some(text), false) = (&standstill, self.standstill_logged) {
            lines.push(text.clone());
        }
        self.standstill_logged = standstill.is_some();
        self.slow_answers += lines.len() as u64;
        lines
    }

    /// Logs lines about the peer.
    pub(crate) fn log(&self, peer: &str, lines: &[String], now: Instant) {
        for line in lines {
            self.lines.log(log::Level::Warn, now, format_args!("{peer}: {line}"));
        }
    }

    /// Fills in rates, slow channels and stalls.
    pub(crate) fn fill(&self, channels: &mut [ChannelStats], now: Instant) {
        let elapsed = self.looked.map_or(0.0, |looked| now.saturating_duration_since(looked).as_secs_f64());
        for (channel, seen) in channels.iter_mut().zip(&self.channels) {
            // Idle connections are not checked: the time since the last check has its own rate.
            (channel.sent_per_second, channel.received_per_second) = if elapsed > 2.0 * LOOK.as_secs_f64() {
                ((channel.sent_bytes - seen.sent) as f64 / elapsed, (channel.received_bytes - seen.received) as f64 / elapsed)
            } else {
                seen.rates
            };
            (channel.slow, channel.stalls) = (seen.slow, seen.stalls);
        }
    }

    /// Stalls of all channels, and log lines about slow answers.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.channels.iter().map(|c| c.stalls).sum(), self.slow_answers)
    }
}

fn place(channel: &ChannelStats) -> &str {
    if channel.route.is_empty() {
        &channel.nic
    } else {
        &channel.route
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Network;

    fn channel(nic: &str, sent: u64) -> ChannelStats {
        ChannelStats { nic: nic.into(), sent_bytes: sent, window_out: 1, window: 16, ..ChannelStats::default() }
    }

    /// A channel that in each second until now was busy for so many milliseconds, at this speed.
    fn moving(nic: &str, second: u64, busy_ms: u64, speed: u64) -> ChannelStats {
        let delivered = Some((second * speed / 1000 * busy_ms, Duration::from_millis(second * busy_ms)));
        ChannelStats { delivered, ..channel(nic, second * 1000) }
    }

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_channel_far_below_the_others_is_logged_once_and_may_recover() {
        let (start, mut health) = (Instant::now(), Health::new());
        let mut bytes = 0;
        let mut look = |health: &mut Health, second: u64, slow: u64| {
            bytes += slow;
            let slow = ChannelStats { delivered: Some((bytes, Duration::from_secs(second))), ..channel("eth2", second * 1000) };
            health.look(
                &[moving("eth1", second, 900, 60_000_000), slow, moving("eth1", second, 900, 40_000_000)],
                at(start, second),
            )
        };
        let lines: Vec<String> = (0..10).flat_map(|s| look(&mut health, s, 2_000_000)).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("channel 1 (eth2) at 2.0 MB/s") && lines[0].contains("90.0 MB/s"), "{}", lines[0]);
        let mut stats = [channel("eth1", 0), channel("eth2", 0)].map(|c| ChannelStats { sent_bytes: 9000, ..c });
        health.fill(&mut stats, at(start, 9));
        assert!(!stats[0].slow && stats[1].slow && stats[1].sent_per_second == 1000.0);
        // Near the others it is no longer slow; half their speed is not worth a line.
        assert!((10..20).all(|s| look(&mut health, s, 60_000_000).is_empty()));
        health.fill(&mut stats, at(start, 19));
        assert!(!stats[1].slow);
        assert_eq!((20..30).flat_map(|s| look(&mut health, s, 2_000_000)).count(), 1);
    }

    #[test]
    fn a_channel_is_judged_by_what_the_peer_got_while_it_was_busy() {
        let start = Instant::now();
        let lines = |pair: &dyn Fn(u64) -> [ChannelStats; 2]| {
            let mut health = Health::new();
            (0..30).flat_map(|s| health.look(&pair(s), at(start, s))).collect::<Vec<String>>()
        };
        // It got little to do.
        assert!(lines(&|s| [moving("eth1", s, 1000, 6_000_000), moving("eth2", s, 20, 6_000_000)]).is_empty());
        // The other one's short chunks pass in bursts.
        assert!(lines(&|s| [moving("eth1", s, 5, 200_000_000), moving("eth2", s, 900, 6_000_000)]).is_empty());
        // A plugin took the bytes of the other one, and no kernel says that the peer has them.
        let took = |nic: &str, s: u64, speed| ChannelStats { speed, delivered: None, ..channel(nic, s << 30) };
        assert!(lines(&|s| [took("eth1", s, 300e6), took("eth2", s, 5e6)]).is_empty());
        // It is lost and comes back each second.
        let lost = |s: u64| ChannelStats { delivered: None, lost: true, ..channel("eth2", s) };
        let back = |s: u64| ChannelStats { delivered: Some((s, Duration::from_millis(200 * s))), ..channel("eth2", s) };
        let flaps = |s: u64| if s % 2 == 0 { lost(s) } else { back(s) };
        assert!(lines(&|s| [moving("eth1", s, 1000, 6_000_000), flaps(s)]).is_empty());
        // Channels of one NIC share it, and not evenly.
        let shared =
            |s: u64| [moving("eth1", s, 1000, 400_000), moving("eth1", s, 1000, 5_600_000), moving("eth2", s, 1000, 6_000_000)];
        let mut health = Health::new();
        assert!((0..30).all(|s| health.look(&shared(s), at(start, s)).is_empty()));
        // An idle channel of a slow NIC does not speak for it.
        let idle = |s: u64| {
            [moving("eth1", s, 1000, 6_000_000), moving("eth2", s, 1000, 400_000), moving("eth2", s.min(2), 1000, 6_000_000)]
        };
        let mut health = Health::new();
        assert_eq!((0..30).flat_map(|s| health.look(&idle(s), at(start, s))).count(), 1);
        // A slow NIC that is only probed.
        let probed = |s: u64| ChannelStats { avoided: true, ..moving("eth2", s, 30, 100_000) };
        assert_eq!(lines(&|s| [moving("eth1", s, 1000, 6_000_000), probed(s)]).len(), 1);
    }

    #[test]
    fn a_line_names_a_few_of_many_slow_channels() {
        let (start, mut health) = (Instant::now(), Health::new());
        let speed = |i: usize| if i < 5 { 1_000_000 } else { 100_000_000 };
        let all = |s: u64| -> Vec<ChannelStats> { (1..31).map(|i| moving(&format!("eth{i}"), s, 1000, speed(i - 1))).collect() };
        let lines: Vec<String> = (0..10).flat_map(|s| health.look(&all(s), at(start, s))).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("channel 3 (eth4)") && !lines[0].contains("channel 4 ("), "{}", lines[0]);
        assert!(lines[0].contains(" and 1 more: far below"), "{}", lines[0]);
    }

    #[test]
    fn rates_cover_the_time_since_the_last_look() {
        let (start, mut health) = (Instant::now(), Health::new());
        let both = |bytes: u64| [ChannelStats { received_bytes: 2 * bytes, ..channel("eth1", bytes) }];
        health.look(&both(1000), at(start, 0));
        health.look(&both(2000), at(start, 1));
        let mut stats = both(22_000);
        health.fill(&mut stats, at(start, 11));
        assert_eq!((stats[0].sent_per_second, stats[0].received_per_second), (2000.0, 4000.0));
    }

    #[test]
    fn a_channel_that_moves_nothing_stalls_and_an_idle_one_does_not() {
        let (start, mut health) = (Instant::now(), Health::new());
        for second in 0..5 {
            let idle = ChannelStats { window_out: 0, ..channel("eth2", 7) };
            health.look(&[channel("eth1", 7), idle, channel("eth3", 7 + second)], at(start, second));
        }
        let mut stats = vec![channel("", 7), channel("", 7), channel("", 11)];
        health.fill(&mut stats, at(start, 4));
        assert_eq!(stats.iter().map(|c| c.stalls).collect::<Vec<_>>(), [4, 0, 0]);
        assert_eq!(health.counts(), (4, 0));
    }

    #[test]
    fn loss_is_logged_once_a_minute() {
        let (start, mut health) = (Instant::now(), Health::new());
        let lossy = |second: u64, percent: u64| {
            let network = Network { segments: second * 10_000, retransmits: second * 100 * percent, ..Network::default() };
            [ChannelStats { network: Some(network), ..channel("eth1", second) }]
        };
        assert!((1..30).all(|s| health.look(&lossy(s, 0), at(start, s)).is_empty()));
        let mut health = Health::new();
        let lines: Vec<String> = (1..100).flat_map(|s| health.look(&lossy(s, 2), at(start, s))).collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("1000 of 50000 segments (2.0 %)") && lines[0].contains("eth1"), "{}", lines[0]);
    }

    #[test]
    fn a_silence_is_logged_once_at_half_of_the_limit() {
        let (mut health, limit) = (Health::new(), Duration::from_secs(10));
        let silent = |health: &mut Health, s: u64| health.answers(Duration::from_secs(s), limit, None).len();
        assert_eq!([1, 5, 6, 9, 0, 6].map(|s| silent(&mut health, s)), [0, 0, 1, 0, 0, 1]);
        assert_eq!(health.counts().1, 2);
        assert_eq!(health.answers(Duration::ZERO, limit, Some("transfer 3".into())), ["transfer 3"]);
        assert!(health.answers(Duration::ZERO, limit, Some("transfer 3".into())).is_empty());
    }
}
