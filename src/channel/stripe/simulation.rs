//! Striping over simulated NICs, in whole bytes and microseconds: shapers with token buckets, socket buffers of limited size, and
//! windows of chunks. As in reality, the scheduler runs only when the kernel has taken a chunk.

use super::nic::SLOWEST;
use super::{pick, stuck, Flow, Load, Loads, Nic, Want};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

const STEP_US: u64 = 50;
const CHUNK: u64 = 512 << 10;
const WINDOW: usize = 8;
const BULK_BYTES: u64 = 2 << 20;
/// How often a machine looks for NICs that are stuck.
const TICK_US: u64 = 50_000;
const MIB: u64 = 1 << 20;
/// The kernel counts busy time in ticks.
const KERNEL_TICK_US: u64 = 4000;
/// The shortest retransmission timeout.
const TIMEOUT_US: u64 = 200_000;
/// The round trip of a NIC with an empty queue, and what a queue holds at most.
const ROUND_TRIP_US: u64 = 100;
const QUEUE: u64 = 128 << 10;

struct SimulatedChannel {
    nic: usize,
    /// For each chunk that the kernel has not fully taken, the bytes that are left of it.
    chunks: VecDeque<u64>,
    queued: u64,
    /// Bytes in the kernel.
    buffer: u64,
    /// Time with such bytes since the last look.
    busy_us: u64,
    /// The shortest round trip that it has seen; its set-up is the first.
    round_trip_us: u64,
}

impl SimulatedChannel {
    /// One that was set up through an empty queue.
    fn new(nic: usize) -> SimulatedChannel {
        SimulatedChannel { nic, chunks: VecDeque::new(), queued: 0, buffer: 0, busy_us: 0, round_trip_us: ROUND_TRIP_US }
    }
}

struct SimulatedNic {
    /// Bytes a second.
    rate: u64,
    /// The tokens in the bucket, in millionths of a byte, and the bucket's size.
    tokens: u64,
    bucket: u64,
    sent: u64,
    turn: usize,
    /// Bytes of closed channels in the queue before the shaper: they pass before all others.
    queue: u64,
    /// On average it loses one segment of so many in a way that only the retransmission timer notices; 0: none. Until when it waits for that.
    loses: u64,
    random: u64,
    waits_us: u64,
}

impl SimulatedNic {
    /// Whether the next segment is lost.
    fn loses(&mut self) -> bool {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.loses > 0 && (self.random >> 33) % self.loses == 0
    }
}

struct World {
    start: Instant,
    us: u64,
    buffer: u64,
    /// How often a NIC was relieved of what it held.
    relieved: usize,
    channels: Vec<SimulatedChannel>,
    nics: Vec<SimulatedNic>,
    learned: Vec<Nic>,
}

fn mbit(rate: u64) -> u64 {
    rate * 1_000_000 / 8
}

impl World {
    fn new(mbits: &[u64], channels: usize, buffer: u64) -> World {
        let nic = |&rate| SimulatedNic {
            rate: mbit(rate),
            tokens: 0,
            bucket: 128 << 10,
            sent: 0,
            turn: 0,
            queue: 0,
            loses: 0,
            random: 1,
            waits_us: 0,
        };
        World {
            start: Instant::now(),
            us: 0,
            buffer,
            relieved: 0,
            channels: (0..mbits.len() * channels).map(|i| SimulatedChannel::new(i % mbits.len())).collect(),
            nics: mbits.iter().map(nic).collect(),
            learned: mbits.iter().map(|_| Nic::default()).collect(),
        }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_micros(self.us)
    }

    fn loads(&mut self, bulk: bool) -> Loads {
        let now = self.now();
        for (n, learned) in self.learned.iter_mut().enumerate() {
            if learned.due(now) {
                let busy =
                    self.channels.iter_mut().filter(|c| c.nic == n).map(|c| std::mem::take(&mut c.busy_us)).max().unwrap_or(0);
                let tick = Some(Duration::from_micros(KERNEL_TICK_US));
                let flow = |c: &SimulatedChannel| Flow {
                    backlog: c.queued + c.buffer,
                    round_trip: Duration::from_micros(c.round_trip_us),
                    tick,
                    ..Flow::default()
                };
                let all = Flow { acknowledged: self.nics[n].sent, tick, ..Flow::default() };
                let flow = self.channels.iter().filter(|c| c.nic == n).map(flow).fold(all, Flow::and);
                learned.look(flow, Duration::from_micros(busy), now);
            }
        }
        let window = if bulk { WINDOW } else { 2 * WINDOW };
        let free = |c: &SimulatedChannel| if bulk && c.queued >= BULK_BYTES { 0 } else { window - c.chunks.len() };
        let load = |c: &SimulatedChannel| Load { free: free(c), queued: c.queued, rate: 0.0, nic: c.nic };
        Loads {
            channels: self.channels.iter().map(load).collect(),
            nics: self.learned.iter().map(|nic| nic.load(now)).collect(),
            ..Loads::default()
        }
    }

    /// Hands out chunks while there is room.
    fn schedule(&mut self, rest: &mut u64, bulk: bool) {
        while *rest > 0 {
            let loads = self.loads(bulk);
            let Some(pick) = pick(&loads, Want { len: CHUNK.min(*rest), rest: *rest, total: *rest }) else { break };
            let len = pick.len.min(*rest);
            assert!(len > 0 && loads.channels[pick.channel].free > 0);
            let channel = &mut self.channels[pick.channel];
            channel.chunks.push_back(len);
            channel.queued += len;
            let nic = channel.nic;
            *rest -= len;
            let now = self.now();
            self.learned[nic].gave(len, now);
        }
    }

    /// Closes the channels of a NIC that is stuck, and opens them again at once. Returns the bytes that have to be sent again.
    fn relieve(&mut self) -> u64 {
        self.loads(true);
        let now = self.now();
        let Some((nic, _)) = stuck(&self.learned, |_| true, now) else { return 0 };
        self.learned[nic].emptied(now);
        self.relieved += 1;
        let holding: Vec<_> =
            self.channels.iter_mut().filter(|channel| channel.nic == nic && channel.queued + channel.buffer > 0).collect();
        let again = holding.iter().map(|channel| channel.queued + channel.buffer).sum();
        let state = &mut self.nics[nic];
        state.queue = (state.queue + holding.iter().map(|channel| channel.buffer).sum::<u64>()).min(QUEUE);
        let round_trip_us = ROUND_TRIP_US + state.queue * 1_000_000 / state.rate;
        for channel in holding {
            *channel = SimulatedChannel { round_trip_us, ..SimulatedChannel::new(nic) };
        }
        again
    }

    /// Advances the time by one step; returns whether a chunk was sent.
    fn step(&mut self) -> bool {
        self.us += STEP_US;
        if self.us % KERNEL_TICK_US == 0 {
            self.channels.iter_mut().filter(|channel| channel.buffer > 0).for_each(|channel| channel.busy_us += KERNEL_TICK_US);
        }
        for (n, nic) in self.nics.iter_mut().enumerate() {
            nic.tokens = (nic.tokens + nic.rate * STEP_US).min(nic.bucket.max(nic.rate * STEP_US / 1_000_000 + 1) * 1_000_000);
            let mut mine: Vec<&mut SimulatedChannel> = self.channels.iter_mut().filter(|c| c.nic == n).collect();
            let channels = mine.len();
            let old = nic.queue.min(nic.tokens / 1_000_000);
            (nic.queue, nic.tokens) = (nic.queue - old, nic.tokens - old * 1_000_000);
            let mut idle = 0;
            while nic.tokens >= 1_000_000 && idle < channels && nic.waits_us <= self.us {
                nic.turn += 1;
                let channel = &mut mine[nic.turn % channels];
                let segment = channel.buffer.min(1448).min(nic.tokens / 1_000_000);
                idle = if segment == 0 { idle + 1 } else { 0 };
                if segment > 0 && nic.loses() {
                    nic.waits_us = self.us + TIMEOUT_US;
                    break;
                }
                channel.buffer -= segment;
                nic.tokens -= segment * 1_000_000;
                nic.sent += segment;
                if segment > 0 {
                    channel.round_trip_us = ROUND_TRIP_US;
                }
            }
        }
        let mut gone = false;
        for channel in &mut self.channels {
            while let Some(front) = channel.chunks.front_mut() {
                let taken = (*front).min(self.buffer.saturating_sub(channel.buffer));
                *front -= taken;
                channel.buffer += taken;
                if *front > 0 {
                    break;
                }
                gone = true;
                channel.chunks.pop_front();
                channel.queued = channel.chunks.iter().sum();
            }
        }
        gone
    }

    /// The time of one transfer from start to complete arrival, in microseconds.
    fn transfer(&mut self, bytes: u64) -> u64 {
        let (began, mut rest) = (self.us, bytes);
        let bulk = bytes > 256 << 10;
        self.schedule(&mut rest, bulk);
        while rest > 0 || self.channels.iter().any(|c| c.queued + c.buffer > 0) {
            assert!(
                rest == 0 || self.channels.iter().any(|c| !c.chunks.is_empty()),
                "nothing is in flight and nothing would retry"
            );
            assert!(self.us - began < 600_000_000, "the transfer never ends");
            let gone = self.step();
            let relieved = if self.us % TICK_US == 0 { self.relieve() } else { 0 };
            rest += relieved;
            if gone || relieved > 0 {
                self.loads(bulk);
                self.schedule(&mut rest, bulk);
            }
        }
        self.us - began
    }

    /// Seconds that `n` transfers of this size take.
    fn transfers(&mut self, n: u64, bytes: u64) -> f64 {
        (0..n).map(|_| self.transfer(bytes)).sum::<u64>() as f64 / 1e6
    }

    /// Seconds that these bytes would take over all NICs together.
    fn ideal(&self, bytes: u64) -> f64 {
        bytes as f64 / self.nics.iter().map(|nic| nic.rate).sum::<u64>() as f64
    }

    fn pause(&mut self, ms: u64) {
        for _ in 0..ms * 1000 / STEP_US {
            self.step();
        }
    }
}

/// Runs each case with several numbers of channels per NIC and sizes of socket buffers.
fn each(slow: &[u64], mut body: impl FnMut(&mut World, String)) {
    for &slow in slow {
        for channels in [1, 2, 4] {
            for buffer in [128 << 10, 1 << 20, 4 << 20] {
                let what = format!("1000 and {slow} Mbit/s, {channels} channels, buffers of {} KiB", buffer >> 10);
                body(&mut World::new(&[1000, slow], channels, buffer), what);
            }
        }
    }
}

#[test]
fn simulated_slow_nics_cost_nothing_after_64_mib() {
    each(&[500, 250, 100, 20, 5], |world, what| {
        let first = world.transfers(1, 64 * MIB);
        let took = world.transfers(8, 64 * MIB);
        let part = world.ideal(8 * 64 * MIB) / took;
        println!("{what}: {:.1} % of all NICs; while it learned {:.1} %", 100.0 * part, 100.0 * world.ideal(64 * MIB) / first);
        assert!(part >= 0.9, "{what}: {:.1} %", 100.0 * part);
    });
}

#[test]
fn simulated_slow_nics_cost_little_at_other_sizes() {
    each(&[100, 20, 5], |world, what| {
        world.transfers(1, 64 * MIB);
        for (n, bytes, least) in [(400, 256 << 10, 0.8), (200, MIB, 0.8), (60, 8 * MIB, 0.8), (2, 512 * MIB, 0.9)] {
            let took = world.transfers(n, bytes);
            // Relative to the time of the fast NIC alone.
            let part = (n * bytes) as f64 / mbit(1000) as f64 / took;
            println!("{what}: {} KiB: {:.1} % of the fast one", bytes >> 10, 100.0 * part);
            assert!(part >= least, "{what}: {} KiB: {:.1} %", bytes >> 10, 100.0 * part);
        }
    });
}

#[test]
fn simulated_nics_that_recover_are_used_again() {
    each(&[100, 20, 5], |world, what| {
        world.transfers(3, 64 * MIB);
        world.nics[1].rate = mbit(1000);
        let began = world.us;
        while world.learned[1].speed() < 0.8 * mbit(1000) as f64 {
            world.transfer(64 * MIB);
            assert!(world.us - began < 40_000_000, "{what}: {:?}", world.learned);
        }
        println!("{what}: found after {:.1} s", (world.us - began) as f64 / 1e6);
        let took = world.transfers(4, 64 * MIB);
        let part = world.ideal(4 * 64 * MIB) / took;
        println!("{what}, recovered: {:.1} %", 100.0 * part);
        assert!(part >= 0.9, "{what}: {:.1} %", 100.0 * part);
        // It becomes slow again.
        let slow = world.nics[0].rate / 50;
        world.nics[1].rate = slow;
        world.transfers(2, 64 * MIB);
        let part = world.ideal(4 * 64 * MIB) / world.transfers(4, 64 * MIB);
        assert!(part >= 0.9, "{what}, slow again: {:.1} %", 100.0 * part);
    });
}

#[test]
fn simulated_probes_find_a_nic_that_recovered_although_transfers_are_small() {
    for slow in [20, 5] {
        let mut world = World::new(&[1000, slow], 2, 1 << 20);
        world.transfers(1, 64 * MIB);
        world.nics[1].rate = mbit(1000);
        let began = world.us;
        loop {
            let before = world.nics[1].sent;
            (0..10).for_each(|_| {
                world.transfer(2 * MIB);
                world.pause(5);
            });
            if world.nics[1].sent - before >= MIB {
                break;
            }
            assert!(world.us - began < 240_000_000, "{slow} Mbit/s: {:?}", world.learned);
        }
        println!("{slow} Mbit/s: found after {:.1} s", (world.us - began) as f64 / 1e6);
    }
}

#[test]
fn simulated_equal_nics_share_alike() {
    for nics in [2, 4] {
        let mut world = World::new(&vec![1000; nics], 2, 1 << 20);
        let took = world.transfers(6, 64 * MIB);
        let part = world.ideal(6 * 64 * MIB) / took;
        assert!(part >= 0.95, "{:.1} %", 100.0 * part);
        let all: u64 = world.nics.iter().map(|nic| nic.sent).sum();
        for nic in &world.nics {
            let share = nic.sent as f64 * nics as f64 / all as f64;
            assert!((0.9..1.1).contains(&share), "{share}");
        }
    }
}

/// Bytes a second in transfers of this size, for so long, and the worst second.
fn rates(world: &mut World, bytes: u64, seconds: u64) -> (f64, f64) {
    let (began, mut done, mut worst, mut second, mut last) = (world.us, 0, f64::INFINITY, 1_000_000, 0);
    while world.us - began < seconds * 1_000_000 {
        world.transfer(bytes);
        done += bytes;
        if world.us - began >= second {
            worst = worst.min((done - last) as f64 * 1e6 / (world.us - began + 1_000_000 - second) as f64);
            (last, second) = (done, world.us - began + 1_000_000);
        }
    }
    (done as f64 * 1e6 / (world.us - began) as f64, worst)
}

#[test]
fn simulated_nics_that_become_slow_cost_nothing_after_two_seconds() {
    for (fast, nics) in [(1000, 2), (10_000, 2), (40_000, 2), (1000, 4), (40_000, 4)] {
        for (slow, channels) in [(1, 1), (5, 1), (20, 1), (100, 1), (1, 4), (20, 4)] {
            for (buffer, bytes) in [(1 << 20, 8 * MIB), (4 << 20, 8 * MIB), (4 << 20, MIB), (4 << 20, 64 * MIB)] {
                let what = format!(
                    "{nics} NICs of {fast} Mbit/s with {channels} channels each, half of them {slow} then, buffers of {} KiB, {} MiB",
                    buffer >> 10,
                    bytes / MIB
                );
                let mut alone = World::new(&vec![fast; nics / 2], channels, buffer);
                let best = rates(&mut alone, bytes, 1).0;
                let mut world = World::new(&vec![fast; nics], channels, buffer);
                let before = rates(&mut world, bytes, 1).0;
                world.nics.iter_mut().skip(nics / 2).for_each(|nic| nic.rate = mbit(slow));
                let (first, _) = rates(&mut world, bytes, 2);
                let relieved = world.relieved;
                let (rate, worst) = rates(&mut world, bytes, 6);
                println!(
                    "{what}: {:.2} before, then {:.2}, from 2 s on {:.2}, worst second {:.2}; relieved {relieved} times, then {}",
                    before / best,
                    first / best,
                    rate / best,
                    worst / best,
                    world.relieved - relieved
                );
                assert!(rate >= 0.9 * best, "{what}: {:.2}", rate / best);
            }
        }
    }
}

#[test]
fn simulated_nics_that_stay_very_slow_cost_little_whatever_was_known_of_them() {
    // A timeout is many transfers long, the more so beside two fast NICs.
    let lossy = [(2, 1000, 1000, 0.85), (2, 1000, 100, 0.9), (4, 1000, 1000, 0.75), (4, 1000, 100, 0.85)];
    for (nics, slow, loses, least) in [(2, 1, 0, 0.9), (4, 1, 0, 0.9), (2, 5, 0, 0.9), (2, 100, 0, 0.9)].into_iter().chain(lossy)
    {
        for (speed, bytes) in [(SLOWEST, 8 * MIB), (SLOWEST, MIB), (64e3, 8 * MIB), (1e6, 8 * MIB)] {
            let what = format!(
                "{slow} of 1000 Mbit/s, one segment of {loses} lost, {nics} NICs, known as {speed} B/s, {} MiB",
                bytes / MIB
            );
            let mut world = World::new(&vec![1000; nics], 1, 1 << 20);
            rates(&mut world, bytes, 1);
            for n in nics / 2..nics {
                (world.nics[n].rate, world.nics[n].loses, world.nics[n].random) = (mbit(slow), loses, n as u64);
                world.learned[n] = Nic::known(speed, world.now());
            }
            let rate = rates(&mut world, bytes, 30).0 / (mbit(1000) as f64 * nics as f64 / 2.0);
            println!("{what}: {:.1} %", 100.0 * rate);
            assert!(rate >= least, "{what}: {:.1} %", 100.0 * rate);
        }
    }
}

#[test]
fn simulated_nics_that_were_interrupted_carry_data_again_within_five_seconds() {
    for (fast, bytes) in [(1000, 8 * MIB), (50, MIB), (50, 8 * MIB)] {
        for ms in [300, 1000, 2000, 3000, 20_000] {
            let what = format!("{ms} ms, {fast} Mbit/s, {} MiB", bytes / MIB);
            let mut world = World::new(&[fast; 2], 1, 1 << 20);
            rates(&mut world, bytes, 2);
            world.nics[1].rate = mbit(1);
            rates(&mut world, bytes, 1);
            world.learned[1] = Nic::known(SLOWEST, world.now());
            let began = world.us;
            while world.us - began < ms * 1000 {
                world.transfer(bytes);
            }
            world.nics[1].rate = mbit(fast);
            let (healed, sent) = (world.us, world.nics[1].sent);
            // Several probes, of which a transfer of 1 MiB makes one.
            while world.nics[1].sent - sent < 64 << 10 {
                world.transfer(bytes);
            }
            println!("{what}: after {:.1} s", (world.us - healed) as f64 / 1e6);
            assert!(world.us - healed < 5_000_000, "{what}: {:.1} s", (world.us - healed) as f64 / 1e6);
        }
    }
}
