//! A TCP connection in one direction, as far as an engine feels it: a send buffer, a congestion window, losses that are found by what
//! arrives later or by a timer, and bytes that reach the receiver in order. Sequence numbers are bytes, times are nanoseconds. Pure.

use super::Rng;
use std::collections::{BTreeMap, VecDeque};

/// Most bytes that a socket takes and the peer has not acknowledged, and most that wait for the receiver to read. A send buffer grows with
/// the window.
pub(super) const SEND_BUFFER: u64 = 4 << 20;
const SMALL_BUFFER: u64 = 64 << 10;
const RECEIVE_BUFFER: u64 = 6 << 20;
/// Packets that a connection begins with.
const FIRST_WINDOW: u64 = 10;
/// A window in which something was lost shrinks to this part of itself (CUBIC).
const SHRINK: (u64, u64) = (7, 10);
/// The first timer stands for a probe of the tail, the later ones for the timeout, which doubles. Clocks of hosts tick at different moments.
const PROBE: u64 = 8_000_000;
const TIMEOUT: u64 = 200_000_000;
const TICK: u64 = 4_000_000;
const MOST_TIMEOUTS: u32 = 9;

/// Bytes that were sent together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Burst {
    pub seq: u64,
    pub len: u64,
    /// When it left.
    pub at: u64,
}

/// The sender's half.
pub(super) struct Sender {
    /// Bytes that the socket has taken in all, and the sequence number of the next that was never sent.
    offered: u64,
    next: u64,
    /// What was sent and not acknowledged, in the order of sending; and what was lost and waits to be sent again.
    flight: VecDeque<Burst>,
    again: VecDeque<(u64, u64)>,
    in_flight: u64,
    acked: u64,
    window: u64,
    threshold: u64,
    /// What was lost of the bursts up to this time has shrunk the window already.
    shrunk: u64,
    timer: Timer,
    busy: Busy,
    /// The shortest round trip.
    round_trip: u64,
    rng: Rng,
}

/// When the timer fires unless something is acknowledged, and how often it has.
#[derive(Default)]
struct Timer {
    deadline: u64,
    fired: u32,
}

/// How long there was something to send or to be acknowledged.
#[derive(Default)]
struct Busy {
    before: u64,
    since: Option<u64>,
}

impl Sender {
    /// `seed`: of its host's clock.
    pub(super) fn new(packet: u64, seed: u64) -> Sender {
        Sender {
            offered: 0,
            next: 0,
            flight: VecDeque::new(),
            again: VecDeque::new(),
            in_flight: 0,
            acked: 0,
            window: FIRST_WINDOW * packet,
            threshold: u64::MAX,
            shrunk: 0,
            timer: Timer::default(),
            busy: Busy::default(),
            round_trip: 0,
            rng: Rng::new(seed),
        }
    }

    /// Bytes for which the send buffer has room.
    pub(super) fn room(&self) -> u64 {
        (2 * self.window).clamp(SMALL_BUFFER, SEND_BUFFER).saturating_sub(self.waiting())
    }

    /// The socket takes bytes.
    pub(super) fn offer(&mut self, bytes: u64, now: u64) {
        self.offered += bytes;
        self.busy.since.get_or_insert(now);
    }

    pub(super) fn offered(&self) -> u64 {
        self.offered
    }

    /// Bytes that the socket has taken and the peer has not acknowledged, those of them that are on their way, and those acknowledged.
    pub(super) fn waiting(&self) -> u64 {
        self.offered - self.acked
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    pub(super) fn acked(&self) -> u64 {
        self.acked
    }

    pub(super) fn round_trip(&self) -> u64 {
        self.round_trip
    }

    /// How long it was busy.
    pub(super) fn busy(&self, now: u64) -> u64 {
        self.busy.before + self.busy.since.map_or(0, |since| now.saturating_sub(since))
    }

    /// The next bytes to send. `read`: how much the receiver has read. `most`, `packet`: bytes that leave together, and of a packet.
    pub(super) fn burst(&mut self, read: u64, most: u64, packet: u64, now: u64) -> Option<Burst> {
        let room = match self.window.saturating_sub(self.in_flight) {
            room if room < packet && self.in_flight > 0 => return None,
            room => room.max(packet).min(most),
        };
        let (seq, len) = match self.again.front_mut() {
            Some((seq, left)) => {
                let len = room.min(*left);
                let from = *seq;
                (*seq, *left) = (*seq + len, *left - len);
                if *left == 0 {
                    self.again.pop_front();
                }
                (from, len)
            }
            None => {
                let open = (read + RECEIVE_BUFFER).saturating_sub(self.next);
                let len = room.min(self.offered - self.next).min(open);
                self.next += len;
                (self.next - len, len)
            }
        };
        if len == 0 {
            return None;
        }
        if self.flight.is_empty() {
            self.timer.deadline = now + self.patience();
        }
        self.in_flight += len;
        let burst = Burst { seq, len, at: now };
        self.flight.push_back(burst);
        Some(burst)
    }

    fn patience(&mut self) -> u64 {
        let patience = match self.timer.fired {
            0 => PROBE,
            n => TIMEOUT << (n - 1).min(MOST_TIMEOUTS),
        };
        patience + self.rng.below(TICK)
    }

    /// The receiver has `got` of the bytes of a burst. All packets take the same way, so what left earlier and was not acknowledged is lost.
    pub(super) fn acknowledged(&mut self, burst: Burst, got: u64, packet: u64, now: u64) {
        // A burst that was given up has been cut again: what was sent again will be acknowledged.
        let Some(position) = self.flight.iter().position(|sent| *sent == burst) else { return };
        let mut lost = position > 0 || got < burst.len;
        for earlier in self.flight.drain(..position) {
            self.in_flight -= earlier.len;
            self.again.push_back((earlier.seq, earlier.len));
        }
        self.flight.pop_front();
        self.in_flight -= burst.len;
        self.acked += got;
        if got < burst.len {
            self.again.push_back((burst.seq + got, burst.len - got));
        }
        // Losses of one round trip count once.
        lost &= burst.at >= self.shrunk;
        if lost {
            self.shrunk = now;
            self.shrink(packet);
        } else if self.window < self.threshold {
            self.window += got;
        } else {
            // About half a packet a round trip: what CUBIC does where round trips are short.
            self.window += (got * packet / (2 * self.window)).max(1);
        }
        self.window = self.window.min(SEND_BUFFER);
        let took = now - burst.at;
        self.round_trip = if self.round_trip == 0 { took } else { self.round_trip.min(took) };
        self.timer.fired = 0;
        self.timer.deadline = now + self.patience();
        if self.waiting() == 0 {
            self.busy.before += self.busy.since.take().map_or(0, |since| now - since);
        }
    }

    fn shrink(&mut self, packet: u64) {
        self.window = (self.window * SHRINK.0 / SHRINK.1).max(2 * packet);
        self.threshold = self.window;
    }

    /// When the timer fires; `None` while nothing is on its way.
    pub(super) fn deadline(&self) -> Option<u64> {
        (!self.flight.is_empty()).then_some(self.timer.deadline)
    }

    /// The timer has fired: what left longer ago than the network keeps anything, `oldest`, is lost.
    pub(super) fn time_out(&mut self, oldest: u64, packet: u64, now: u64) {
        let lost = self.flight.iter().take_while(|sent| sent.at + oldest <= now).count();
        let mut all: Vec<(u64, u64)> = self.flight.drain(..lost).map(|sent| (sent.seq, sent.len)).collect();
        self.in_flight -= all.iter().map(|(_, len)| len).sum::<u64>();
        all.extend(self.again.drain(..));
        self.again = all.into();
        if lost > 0 {
            // One packet asks whether the way is free.
            self.shrink(packet);
            self.window = packet;
            (self.timer.fired, self.shrunk) = (self.timer.fired + 1, now);
        }
        self.timer.deadline = now + self.patience().max(oldest);
    }
}

/// The receiver's half.
#[derive(Default)]
pub(super) struct Receiver {
    /// Bytes that are here in order, and ranges behind the first that is missing.
    got: u64,
    early: BTreeMap<u64, u64>,
}

impl Receiver {
    /// Bytes that are here in order.
    pub(super) fn got(&self) -> u64 {
        self.got
    }

    /// Bytes arrive, maybe again.
    pub(super) fn arrived(&mut self, seq: u64, len: u64) {
        let end = seq + len;
        if seq > self.got {
            let known = self.early.entry(seq).or_insert(end);
            *known = end.max(*known);
            return;
        }
        self.got = self.got.max(end);
        while let Some(entry) = self.early.first_entry().filter(|entry| *entry.key() <= self.got) {
            self.got = self.got.max(entry.remove());
        }
    }
}

#[test]
fn what_is_lost_is_sent_again_and_arrives_in_order() {
    const PACKET: u64 = 1000;
    let (mut sender, mut receiver, mut now) = (Sender::new(PACKET, 1), Receiver::default(), 0);
    sender.offer(1_000_000, 0);
    let (mut sent, mut dropped, mut least) = (0u64, 0u64, u64::MAX);
    while sender.acked() < 1_000_000 {
        let mut round = Vec::new();
        while let Some(burst) = sender.burst(receiver.got(), 3000, PACKET, now) {
            now += 1;
            round.push(burst);
        }
        now += 1000;
        if round.is_empty() {
            now = now.max(sender.deadline().expect("something waits"));
            sender.time_out(1000, PACKET, now);
            continue;
        }
        for burst in round {
            sent += 1;
            // Every seventh is lost, and of every fifth the tail.
            let got = if sent % 7 == 0 { 0 } else { burst.len - if sent % 5 == 0 { burst.len / 2 } else { 0 } };
            dropped += u64::from(got < burst.len);
            if got > 0 {
                receiver.arrived(burst.seq, got);
                sender.acknowledged(burst, got, PACKET, now);
                least = least.min(sender.window);
            }
        }
        assert!(sender.waiting() >= sender.in_flight() && now < 1_000_000_000_000);
    }
    assert_eq!((receiver.got(), sender.in_flight(), sender.waiting(), sender.deadline()), (1_000_000, 0, 0, None));
    assert!(dropped > 50 && least <= 5 * PACKET, "{dropped} bursts lost, a window of {least}");
    assert!(sender.burst(receiver.got(), 3000, PACKET, now).is_none() && sender.busy(now + 5) == sender.busy(now));
}

#[test]
fn a_receiver_that_does_not_read_stops_the_sender() {
    let (mut sender, mut now) = (Sender::new(1000, 1), 0);
    let mut sent = 0;
    while sent < 20 << 20 {
        sender.offer(sender.room(), now);
        let Some(burst) = sender.burst(0, 64 << 10, 1000, now) else { break };
        (sent, now) = (sent + burst.len, now + 1);
        sender.acknowledged(burst, burst.len, 1000, now);
    }
    assert_eq!(sent, RECEIVE_BUFFER);
    assert!(sender.burst(1000, 64 << 10, 1000, now).is_some_and(|burst| burst.len == 1000));
}
