//! Two honest machines over a network of known speed, for minutes of virtual time. A slow and healthy transfer goes on, and one
//! that has stopped fails by its own deadline, whatever else moves.

use super::cluster::{Block, Cluster};
use super::fabric::Spec;
use super::world::{Shape, Side, DEVICE_CHANNELS, PEER_TIMEOUT, TRANSFER_TIMEOUT};
use crate::engine::transfer::Direction;
use crate::proto::TransferState;
use crate::types::Place;
use process::MutexGuard;
use std::time::{Duration, Instant};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// The virtual time that one step takes.
const STEP: Duration = Duration::from_millis(50);

/// A cluster of two engines, each with a piece of host memory and one of device memory that all transfers share.
struct Paced {
    cluster: Cluster,
    start: Instant,
}

/// The shared pieces of memory.
const HOST: usize = 0;
const DEVICE: usize = 1;

impl Paced {
    /// Bytes a second of data and of the control connection, each way.
    fn new(data: u64, control: u64, timeouts: [Duration; 2]) -> Paced {
        Paced::with_nics(&[0; 2], data, control, timeouts)
    }

    /// `nics`: one for each NIC of an engine, that of the control connection included.
    fn with_nics(nics: &'static [u64], data: u64, control: u64, [transfer_timeout, peer_timeout]: [Duration; 2]) -> Paced {
        let (data_nics, control_nic) = (nics.len() - 1, nics.len() - 1);
        let spec = Spec {
            rates: nics,
            data: data_nics,
            control: control_nic,
            packet: 1448,
            latency: 50_000,
            queue: 1 << 20,
            pauses: false,
        };
        let mut cluster = Cluster::new(2, spec, Shape { transfer_timeout, peer_timeout, ..Shape::of(512 * KIB, 8 * KIB) });
        for (number, nic) in cluster.fabric.nics.iter_mut().enumerate() {
            nic.rate = if (number + 1) % nics.len() == 0 { control } else { data };
        }
        cluster.connect([0, 1]);
        for engine in &mut cluster.engines {
            engine.allocate(vec![1; 2 * MIB], Place::HOST);
            engine.allocate(vec![1; 2 * MIB], Place::gpu(0));
        }
        Paced { start: cluster.now(), cluster }
    }

    fn now(&self) -> Instant {
        self.cluster.now()
    }

    fn side(&mut self, side: usize) -> &mut Side {
        &mut self.cluster.links[0].sides[side]
    }

    fn net(&self) -> MutexGuard<'_, super::net::Net> {
        self.cluster.links[0].net.lock()
    }

    fn notify(&mut self, side: usize, name: &[u8], message: &[u8]) {
        let now = self.now();
        self.side(side).machine.notify(name, message, now);
    }

    fn transfer(&mut self, side: usize, direction: Direction, memory: usize, len: usize) -> (usize, u64) {
        let block = Block { near: (memory, 0), far: (memory, 0), len };
        (side, self.cluster.transfer((0, side), direction, vec![block], 0).expect("started"))
    }

    fn step(&mut self) {
        (0..2).for_each(|side| self.cluster.poll((0, side)));
        self.cluster.pass(STEP).unwrap_or_else(|e| panic!("{e}"));
        self.cluster.engines.iter().for_each(|engine| while engine.queue.pop().is_some() {});
    }

    fn seconds(&self) -> f64 {
        (self.now() - self.start).as_secs_f64()
    }

    fn alive(&self) {
        for side in &self.cluster.links[0].sides {
            if let Some(e) = side.machine.dead() {
                panic!("after {:.1} s: {e}", self.seconds());
            }
        }
    }

    fn complete(&self, (side, id): (usize, u64)) -> bool {
        matches!(self.cluster.links[0].sides[side].machine.lookup(id), Ok(TransferState { complete: true, .. }))
    }

    /// Runs until all are complete, with `meanwhile` in every step.
    fn until_complete(&mut self, mut open: Vec<(usize, u64)>, mut meanwhile: impl FnMut(&mut Paced)) {
        while !open.is_empty() {
            assert!(self.seconds() < 1000.0, "{} transfers do not end", open.len());
            meanwhile(self);
            self.step();
            self.alive();
            open.retain(|&t| !self.complete(t));
        }
    }

    /// Runs until the side's connection has ended, and returns how long that took.
    fn until_dead(&mut self, side: usize, mut meanwhile: impl FnMut(&mut Paced)) -> Duration {
        let from = self.now();
        while self.side(side).machine.dead().is_none() {
            assert!(self.now() - from < Duration::from_secs(500), "the connection does not end");
            meanwhile(self);
            self.step();
        }
        self.now() - from
    }
}

/// How late a deadline may fire.
const LATE: Duration = Duration::from_millis(1100);

const DEFAULT: [Duration; 2] = [TRANSFER_TIMEOUT, PEER_TIMEOUT];

#[test]
fn a_slow_network_moves_many_transfers_to_their_end() {
    for memory in [HOST, DEVICE] {
        let mut world = Paced::new(125_000, 125_000, DEFAULT);
        let mut open: Vec<_> = (0..10).map(|_| world.transfer(0, Direction::Write, memory, MIB)).collect();
        open.extend((0..10).map(|_| world.transfer(1, Direction::Write, memory, 100 * KIB)));
        open.extend((0..4).map(|_| world.transfer(1, Direction::Read, memory, MIB)));
        world.until_complete(open, |_| {});
    }
}

#[test]
fn large_transfers_go_on_beside_a_flood_of_small_ones() {
    let mut world = Paced::new(2 * MIB as u64, 10 * MIB as u64, DEFAULT);
    let large: Vec<_> = (0..60).map(|_| world.transfer(0, Direction::Write, HOST, 2 * MIB)).collect();
    let (mut small, total) = (Vec::new(), 60.0 * 2.0);
    let ends = large.clone();
    world.until_complete(large, |world| {
        small.retain(|&t| !world.complete(t));
        while small.len() < 64 {
            small.push(world.transfer(0, Direction::Write, HOST, 64 * KIB));
        }
    });
    // Both kinds get half of the network.
    let alone = total / 2.0;
    assert!(ends.len() == 60 && world.seconds() < 3.0 * alone, "{} s, alone {alone} s", world.seconds());
}

#[test]
fn a_read_waits_behind_what_the_peer_started_at_the_same_moment() {
    let mut world = Paced::new(2 * MIB as u64, 10 * MIB as u64, DEFAULT);
    let mut open = vec![world.transfer(0, Direction::Read, HOST, 2 * MIB)];
    open.extend((0..200).map(|_| world.transfer(1, Direction::Write, HOST, 300 * KIB)));
    world.until_complete(open, |_| {});
}

#[test]
fn answers_wait_behind_notifications_on_a_slow_network() {
    for (count, len) in [(1, 8 * MIB), (4, 3 * MIB), (200, 40 * KIB)] {
        let mut world = Paced::new(125_000, 125_000, DEFAULT);
        (0..count).for_each(|_| world.notify(1, b"name", &vec![7; len]));
        let mut open = vec![world.transfer(0, Direction::Write, HOST, 4 * KIB)];
        open.push(world.transfer(0, Direction::Read, HOST, 4 * KIB));
        open.push(world.transfer(0, Direction::Read, HOST, 100 * KIB));
        world.until_complete(open, |_| {});
    }
}

/// Heartbeats and small talk on the control connection, both ways.
fn chatter(world: &mut Paced) {
    for side in 0..2 {
        if world.side(side).machine.alive().is_ok() {
            world.notify(side, b"still", b"here");
        }
    }
}

#[test]
fn a_dead_data_path_ends_transfers_although_the_control_connection_lives() {
    for direction in [Direction::Write, Direction::Read] {
        let mut world = Paced::new(MIB as u64, MIB as u64, DEFAULT);
        (0..8).for_each(|_| {
            world.transfer(0, direction, HOST, 2 * MIB);
        });
        for _ in 0..100 {
            chatter(&mut world);
            world.step();
            world.alive();
        }
        world.net().wires.iter_mut().for_each(|w| (w[0].stalled, w[1].stalled) = (true, true));
        for side in [0, 1] {
            let took = world.until_dead(side, chatter);
            assert!(took <= TRANSFER_TIMEOUT + LATE, "{direction:?}: side {side} took {took:?}");
        }
    }
}

#[test]
fn a_dead_nic_is_given_up_and_another_carries_its_data() {
    for direction in [Direction::Write, Direction::Read] {
        let mut world = Paced::with_nics(&[0; 3], MIB as u64, MIB as u64, DEFAULT);
        let transfers: Vec<_> = (0..60).map(|_| world.transfer(0, direction, HOST, 2 * MIB)).collect();
        for _ in 0..100 {
            chatter(&mut world);
            world.step();
            world.alive();
        }
        // Stops the wires of one NIC.
        let mut net = world.net();
        let dead = net.wires.iter_mut().skip(1).step_by(2);
        dead.for_each(|w| (w[0].stalled, w[1].stalled) = (true, true));
        drop(net);
        let begun = world.now();
        while !transfers.iter().all(|&t| world.complete(t)) {
            chatter(&mut world);
            world.step();
            world.alive();
            assert!(world.now() - begun < Duration::from_secs(300), "{direction:?}: the transfers do not end");
        }
        for side in &world.cluster.links[0].sides {
            assert!(side.machine.counts().lost_channels > 0, "{direction:?}: no channel was given up");
        }
    }
}

#[test]
fn two_dead_nics_are_given_up_although_nothing_is_left_for_the_third() {
    for direction in [Direction::Write, Direction::Read] {
        let mut world = Paced::with_nics(&[0; 5], MIB as u64, MIB as u64, DEFAULT);
        // The channels for host memory are on three NICs.
        world.net().wires[2..4].iter_mut().for_each(|w| (w[0].stalled, w[1].stalled) = (true, true));
        let transfers = (0..3).map(|_| world.transfer(0, direction, HOST, MIB)).collect();
        world.until_complete(transfers, chatter);
        for side in &world.cluster.links[0].sides {
            assert_eq!(side.machine.counts().lost_channels, 2, "{direction:?}");
        }
    }
}

#[test]
fn a_nic_whose_chunks_wait_for_the_peers_gpu_is_not_given_up() {
    for direction in [Direction::Write, Direction::Read] {
        let mut world = Paced::with_nics(&[0; 3], MIB as u64, MIB as u64, DEFAULT);
        (0..20).for_each(|_| world.step());
        // One NIC's channels take everything, and the sender's GPU is busy.
        world.net().wires.iter_mut().for_each(|w| (w[0].packing, w[1].packing) = (true, true));
        let transfer = world.transfer(0, direction, HOST, 64 * KIB);
        let begun = world.now();
        while world.now() - begun < TRANSFER_TIMEOUT * 3 / 4 {
            chatter(&mut world);
            world.step();
            world.alive();
        }
        world.net().wires.iter_mut().for_each(|w| (w[0].packing, w[1].packing) = (false, false));
        world.until_complete(vec![transfer], chatter);
        for side in &world.cluster.links[0].sides {
            assert_eq!(side.machine.counts().lost_channels, 0, "{direction:?}");
        }
    }
}

#[test]
fn the_peers_cause_is_better_than_the_end_of_its_channels() {
    let mut world = Paced::new(MIB as u64, MIB as u64, DEFAULT);
    (0..4).for_each(|_| {
        world.transfer(0, Direction::Write, HOST, 2 * MIB);
    });
    (0..10).for_each(|_| world.step());
    let now = world.now();
    world.side(0).fail(crate::status::err!(TimedOut, "eth2 is down"), now);
    // The ends of the data channels come first.
    let now = now + Duration::from_secs(1);
    (0..3).for_each(|_| world.side(1).poll(now));
    assert!(world.side(1).machine.dead().is_none(), "{:?}", world.side(1).machine.dead());
    world.step();
    let error = world.side(1).machine.dead().expect("the goodbye has come").to_string();
    assert!(error.contains("eth2 is down"), "{error}");
}

#[test]
fn one_stuck_transfer_is_found_beside_busy_ones() {
    let mut world = Paced::new(4 * MIB as u64, MIB as u64, DEFAULT);
    world.net().wires[..DEVICE_CHANNELS].iter_mut().for_each(|w| w[0].stalled = true);
    world.transfer(0, Direction::Write, DEVICE, MIB);
    let mut busy = Vec::new();
    let took = world.until_dead(0, |world| {
        chatter(world);
        busy.retain(|&t| !world.complete(t));
        while busy.len() < 4 && world.side(0).machine.alive().is_ok() {
            busy.push(world.transfer(0, Direction::Write, HOST, 64 * KIB));
        }
    });
    assert!(took <= TRANSFER_TIMEOUT + LATE, "took {took:?}");
}

#[test]
fn a_deadline_holds_on_a_connection_that_was_idle() {
    let timeout = Duration::from_secs(2);
    for small in [true, false] {
        let mut world = Paced::new(MIB as u64, MIB as u64, [timeout, Duration::from_secs(120)]);
        (0..20).for_each(|_| world.step());
        if small {
            world.side(1).mute = true;
        } else {
            world.net().wires.iter_mut().for_each(|w| w[0].stalled = true);
        }
        world.transfer(0, Direction::Write, HOST, if small { 4 * KIB } else { MIB });
        let took = world.until_dead(0, |_| {});
        assert!(took <= timeout + LATE, "took {took:?}");
    }
}

#[test]
fn an_idle_connection_asks_for_a_tick_within_its_deadlines() {
    let timeout = Duration::from_secs(2);
    let mut world = Paced::new(MIB as u64, MIB as u64, [timeout, Duration::from_secs(120)]);
    (0..20).for_each(|_| world.step());
    assert!(world.side(0).machine.next_tick() <= world.now() + timeout / 2, "no tick comes before the deadline");
}

#[test]
fn an_idle_connection_asks_for_one_tick_a_heartbeat() {
    let mut world = Paced::new(1 << 30, 1 << 30, [4 * PEER_TIMEOUT, PEER_TIMEOUT]);
    let (mut looks, mut now, end) = (0, world.start, world.start + 100 * crate::proto::heartbeat(PEER_TIMEOUT));
    while now < end {
        now = now.max(world.side(0).machine.next_tick().min(world.side(1).machine.next_tick()));
        for side in 0..2 {
            if world.side(side).machine.next_tick() <= now {
                looks += 1;
                world.side(side).poll(now);
            }
            let bytes: Vec<u8> = world.side(side).out.drain(..).collect();
            if !bytes.is_empty() {
                world.side(1 - side).receive(&bytes, now);
            }
        }
    }
    world.alive();
    assert!((200..=220).contains(&looks), "{looks} looks in 100 heartbeats of two sides");
}

#[test]
fn heartbeats_of_both_sides_meet() {
    let mut world = Paced::new(1 << 30, 1 << 30, [4 * PEER_TIMEOUT, PEER_TIMEOUT]);
    let every = crate::proto::heartbeat(PEER_TIMEOUT);
    // One side's heartbeat is due long before the other's.
    let mut now = world.start;
    let late = now + every * 2 / 3;
    world.side(0).machine.state.liveness.next_tick = late;
    world.side(0).machine.state.liveness.report = late;
    let (mut looks, mut announced, end) = (0, [0; 2], world.start + 30 * every);
    while now < end {
        let due = world.side(0).machine.next_tick().min(world.side(1).machine.next_tick());
        looks += usize::from(due > now);
        now = now.max(due);
        for side in [0, 1, 0] {
            if world.side(side).machine.next_tick() <= now {
                world.side(side).poll(now);
            }
            let bytes: Vec<u8> = world.side(side).out.drain(..).collect();
            if !bytes.is_empty() {
                announced[side] += 1;
                world.side(1 - side).receive(&bytes, now);
            }
        }
    }
    world.alive();
    assert!((29..=32).contains(&looks), "{looks} looks in 30 heartbeats");
    assert!(announced.iter().all(|n| (29..=32).contains(n)), "{announced:?} heartbeats in the time of 30");
}

#[test]
fn answers_that_have_left_are_not_held_against_the_peer() {
    let mut world = Paced::new(MIB as u64, 200 * MIB as u64, DEFAULT);
    // The application always has more to send than the network takes, and the peer writes all the time.
    for _ in 0..600 {
        while world.side(0).machine.unsent() < 200 * KIB {
            world.notify(0, b"name", &[7; 20 * KIB]);
        }
        for _ in 0..20 {
            world.transfer(1, Direction::Write, HOST, 16);
        }
        world.step();
        world.alive();
    }
    assert!(world.side(0).machine.tx().answers() < 20 * KIB, "{} bytes", world.side(0).machine.tx().answers());
}

#[test]
fn a_peer_that_pings_and_reads_nothing_loses_the_connection() {
    let mut world = Paced::new(MIB as u64, MIB as u64, [TRANSFER_TIMEOUT, Duration::from_secs(1000)]);
    (0..20).for_each(|_| world.step());
    world.side(0).room = 0;
    world.notify(0, b"name", b"unread");
    let took = world.until_dead(0, |world| world.notify(1, b"still", b"here"));
    assert!(took <= TRANSFER_TIMEOUT + LATE, "took {took:?}");
}
