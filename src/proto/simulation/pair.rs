//! Two honest machines. Without faults every transfer succeeds with the right bytes. With faults every transfer ends in time,
//! none succeeds with a wrong byte, and no memory is touched after it was given back.

use super::cluster::Cluster;
use super::fabric::Spec;
use super::net::Net;
use super::world::{Engine, Shape, DEVICE_CHANNELS, HOST_CHANNELS, MATCH_TIMEOUT, PEER_TIMEOUT, TRANSFER_TIMEOUT};
use super::{Action, Rng};
use crate::engine::fifo::FifoItem;
use crate::engine::request::{message, sketch, Built, Feed, RequestBuilder};
use crate::engine::transfer::{Direction, LocalSegment};
use crate::proto::TransferState;
use crate::status::{err, ErrorKind};
use crate::types::{Place, Segment};
use process::MutexGuard;
use std::time::{Duration, Instant};

/// A range of a side's memory, and the bytes that it must hold when the transfer succeeds.
struct Expected {
    side: usize,
    memory: usize,
    at: usize,
    bytes: Vec<u8>,
}

struct Transfer {
    side: usize,
    id: u64,
    expected: Vec<Expected>,
    begun: Instant,
    /// A healthy run may end it with an error.
    excused: bool,
    ended: bool,
}

struct World {
    rng: Rng,
    /// Two engines with one connection. The script moves its messages, so the network of the cluster has nothing to do.
    cluster: Cluster,
    start: Instant,
    transfers: Vec<Transfer>,
    /// Sends and receives that wait for each other, by receiving side: (send, receive).
    sent: [Vec<(usize, Vec<u8>)>; 2],
    received: [Vec<(usize, usize)>; 2],
    notified: [Vec<Vec<u8>>; 2],
    heard: [usize; 2],
    faulty: bool,
    lossy: bool,
    reorders: bool,
    join: Option<Join>,
    cut: Option<Cut>,
    /// Times that a side has sent records again over another control connection.
    again: usize,
}

/// The control connection has failed, and is being made again.
#[derive(Default)]
struct Cut {
    /// Sides that have given up the old one, and how many records of the other they have opened.
    frozen: [bool; 2],
    opened: [u64; 2],
    /// Sides that go on over the new one.
    resumed: [bool; 2],
}

/// A set-up of a lost channel that is under way.
struct Join {
    channel: u16,
    number: u32,
    wire: usize,
    /// Sides that have not ended their part.
    left: [bool; 2],
}

/// What breaks in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Faults {
    None,
    /// Channels, all of them at times. They come back.
    Channels,
    All,
}

pub(super) fn play(seed: u64, script: &[Action], faults: Faults) -> Result<(), String> {
    World::new(seed, faults).run(script)
}

/// Chunks that both sides send again in a run that loses channels, channels that come back at a side, chunks that those carry, and times
/// that a side sends records of the control connection again.
#[cfg(test)]
pub(super) fn losses(seed: u64, script: &[Action]) -> [u64; 4] {
    let mut world = World::new(seed, Faults::Channels);
    script.iter().for_each(|&action| world.step(action));
    world.mend();
    world.revive();
    world.busy(20);
    let counts: Vec<_> = world.cluster.links[0].sides.iter().map(|side| side.machine.counts()).collect();
    let carried = world.net().restored_chunks();
    [counts.iter().map(|c| c.resent_chunks).sum(), counts.iter().map(|c| c.restored_channels).sum(), carried, world.again as u64]
}

/// A run without faults, but over a network that reorders.
pub(super) fn play_reordering(seed: u64, script: &[Action]) -> Result<(), String> {
    let mut world = World::new(seed, Faults::None);
    world.reorders = true;
    world.run(script)
}

impl World {
    fn new(seed: u64, faults: Faults) -> World {
        let mut rng = Rng::new(seed ^ 0x5EED);
        let mut net = Net::new(DEVICE_CHANNELS + HOST_CHANNELS, rng.below(2) == 0);
        let chunk = 4096 << rng.below(3);
        net.direct.on = rng.below(3) > 0;
        net.nics = if faults == Faults::None { 1 } else { 1 + rng.below(3) as usize };
        let mut cluster = Cluster::new(2, Spec::NONE, Shape::of(chunk as usize, 0));
        let shapes = [0, 1].map(|_| {
            let eager = if rng.below(2) == 0 { 0 } else { 3000 };
            // A socket with little room makes a backlog.
            Shape { eager_bytes: eager, room: 1000 << rng.below(8), ..cluster.shape }
        });
        cluster.join([0, 1], net, shapes);
        World {
            start: cluster.now(),
            cluster,
            rng,
            transfers: Vec::new(),
            sent: Default::default(),
            received: Default::default(),
            notified: Default::default(),
            heard: [0; 2],
            faulty: faults == Faults::All,
            lossy: faults == Faults::Channels,
            reorders: false,
            join: None,
            cut: None,
            again: 0,
        }
    }

    fn run(mut self, script: &[Action]) -> Result<(), String> {
        for &action in script {
            self.step(action);
            self.check()?;
        }
        self.finish()
    }

    fn net(&self) -> MutexGuard<'_, Net> {
        self.cluster.links[0].net.lock()
    }

    fn advance(&mut self, time: Duration) {
        self.cluster.fabric.now += time.as_nanos() as u64;
    }

    fn poll(&mut self, side: usize) {
        let now = self.cluster.now();
        self.cluster.links[0].sides[side].poll(now);
    }

    fn step(&mut self, Action { kind, a, b }: Action) {
        let side = (a & 1) as usize;
        let channel = (b as usize) % (DEVICE_CHANNELS + HOST_CHANNELS);
        match kind % 32 {
            0..=2 => self.one_sided(side, Direction::Write, a, b),
            3..=5 => self.one_sided(side, Direction::Read, a, b),
            6 => self.send(side, a, b),
            7 => self.receive(side, a, b),
            8 => self.notify(side, b),
            9 => {
                let count = self.cluster.engines[side].memory.len();
                if count > 0 {
                    self.cluster.engines[side].deregister(b as usize % count);
                }
            }
            10..=14 => self.deliver_control(side, b as usize),
            15..=18 => {
                let mut net = self.net();
                net.transmit(channel, side);
                net.direct.answer(side, b % 7 == 0, b);
                net.direct.carry(side, 1 + b as usize % 3);
            }
            19..=22 => {
                self.net().deliver(channel, side);
                if self.reorders {
                    let mut net = self.net();
                    let wire = net.wire(channel, side);
                    if wire.flying.len() > 1 {
                        wire.flying.swap(0, 1);
                    }
                }
            }
            23 if self.cut.is_some() => self.cut(side, a),
            23..=26 => self.poll(side),
            27 => self.busy(20),
            28 => self.advance(Duration::from_millis(u64::from(b % 400))),
            _ if self.faulty => self.fault(side, channel, a, b),
            _ if self.lossy => self.lose(side, channel, a),
            _ => self.busy(5),
        }
        self.cluster.engines.iter_mut().for_each(Engine::reclaim);
    }

    fn fault(&mut self, side: usize, channel: usize, a: u32, b: u32) {
        // Most of a script should run before something breaks.
        if self.rng.below(4) > 0 {
            return;
        }
        let mut net = self.net();
        match (a >> 1) % 12 {
            8 | 9 => {
                drop(net);
                self.lose(side, channel, a >> 5);
            }
            10 => {
                drop(net);
                self.set_up_again(side, channel, a >> 5);
            }
            11 => {
                drop(net);
                self.cut(side, a >> 5);
            }
            0 => net.wire(channel, side).stalled = true,
            1 => net.wire(channel, side).failed = true,
            2 => net.out_of_memory[side] = Some(b % 6),
            3 => {
                drop(net);
                let now = self.cluster.now();
                self.cluster.links[0].sides[side].fail(err!(Canceled, "closed"), now);
            }
            4 => {
                drop(net);
                self.cluster.links[0].sides[side].mute = true;
            }
            5 if b % 2 == 0 => net.direct.stalls = true,
            5 => net.wires.iter_mut().for_each(|w| w[side].stalled = true),
            6 => {
                drop(net);
                self.advance(Duration::from_secs(u64::from(b % 9)));
            }
            _ => {
                net.wires.iter_mut().for_each(|w| (w[0].stalled, w[1].stalled) = (true, true));
            }
        }
    }

    /// The next use of a channel fails, or a side gives it up; or a lost one is set up again.
    fn lose(&mut self, side: usize, channel: usize, a: u32) {
        match self.rng.below(8) {
            0..=3 => return self.set_up_again(side, channel, a),
            4 => return self.cut(side, a),
            _ => {}
        }
        match (a >> 1) % 16 {
            0 => self.each_channel(|net, channel| net.wire(channel, side).failed = true),
            1 => self.silence(a >> 5),
            2..=6 => self.net().wire(channel, side).failed = true,
            7..=11 => [0, 1].into_iter().for_each(|side| self.net().wire(channel, side).failed = true),
            _ => self.cluster.links[0].sides[side]
                .channels
                .close_channel(channel as u16, err!(RemoteDisconnect, "simulated: given up")),
        }
    }

    fn each_channel(&self, step: impl Fn(&mut Net, usize)) {
        let mut net = self.net();
        (0..DEVICE_CHANNELS + HOST_CHANNELS).for_each(|channel| step(&mut net, channel));
    }

    /// A NIC moves nothing any more, without a word, or one that was so works again: what it had taken arrives then, unless it was given up.
    fn silence(&mut self, nic: u32) {
        let mut net = self.net();
        let nics = net.nics;
        // With another NIC beside it.
        net.silent = if nics > 1 && net.silent.is_none() { Some(nic as usize % nics) } else { None };
    }

    /// A step of a control connection that fails and is made again. The sides notice, and go on, one after the other; an attempt to make it
    /// again may come to nothing in between.
    fn cut(&mut self, side: usize, a: u32) {
        let now = self.cluster.now();
        let cut = self.cut.get_or_insert_default();
        if cut.frozen != [true; 2] {
            let side = if cut.frozen[side] { 1 - side } else { side };
            (cut.frozen[side], cut.opened[side]) = (true, self.cluster.links[0].sides[side].suspend());
            if cut.frozen == [true; 2] {
                self.cluster.links[0].sides.iter_mut().for_each(|side| side.out.clear());
            }
        } else if a % 4 == 0 {
            for side in [0, 1] {
                cut.opened[side] = self.cluster.links[0].sides[side].suspend();
                self.cluster.links[0].sides[side].out.clear();
            }
            cut.resumed = [false; 2];
        } else if !std::mem::replace(&mut cut.resumed[side], true) {
            self.again += self.cluster.links[0].sides[side].resume(cut.opened[1 - side], now);
            if cut.resumed == [true; 2] {
                self.cut = None;
            }
        }
    }

    /// A control connection that is being made again comes up.
    fn mend(&mut self) {
        for side in [0, 1, 0, 1] {
            if self.cut.is_some() {
                self.cut(side, 1);
            }
        }
    }

    /// Lost channels come back as soon as both sides have closed them.
    fn revive(&mut self) {
        for channel in 0..DEVICE_CHANNELS + HOST_CHANNELS {
            // One that is under way ends first.
            for side in [0, 1, 0, 1] {
                if self.join.is_some() || self.cluster.links[0].sides[0].machine.is_lost(channel as u16) {
                    self.set_up_again(side, channel, 2);
                }
            }
        }
    }

    /// A step of a set-up of lost channels: it begins, or a side ends its part, with the channel or without.
    fn set_up_again(&mut self, side: usize, channel: usize, a: u32) {
        let now = self.cluster.now();
        let Some(join) = &mut self.join else {
            let lost = (0..DEVICE_CHANNELS + HOST_CHANNELS).map(|n| (channel + n) % (DEVICE_CHANNELS + HOST_CHANNELS));
            let Some(channel) = lost.map(|n| n as u16).find(|&n| self.cluster.links[0].sides[side].machine.is_lost(n)) else {
                return self.busy(1);
            };
            let Ok(number) = self.cluster.links[0].sides[side].machine.begin_restore(&[channel], None) else { return };
            // The other side may not know of the loss yet, and refuses.
            if self.cluster.links[0].sides[1 - side].machine.begin_restore(&[channel], Some(number)).is_ok() {
                let wire = self.net().string();
                self.join = Some(Join { channel, number, wire, left: [true; 2] });
            }
            return;
        };
        if !std::mem::replace(&mut join.left[side], false) {
            return;
        }
        let Join { channel, number, wire, left } = *join;
        if left == [false; 2] {
            self.join = None;
        }
        let dark = self.net().is_silent(channel.into());
        if dark || (a >> 1) % 4 == 0 || self.cluster.links[0].sides[side].machine.dead().is_some() {
            // It ends without the channel. The other side may notice at once, or by the time alone.
            let silent = dark || (a >> 3) % 2 == 0;
            self.net().wires[wire].iter_mut().for_each(|wire| (wire.failed, wire.stalled) = (!silent, true));
            return;
        }
        self.net().restore(channel.into(), side, wire);
        let me = &mut self.cluster.links[0].sides[side];
        if let Err(e) = me.machine.restore(channel, number, &mut me.channels, now) {
            me.fail(e, now);
        }
    }

    fn place(&mut self) -> Place {
        if self.rng.below(3) == 0 {
            Place::gpu(0)
        } else {
            Place::HOST
        }
    }

    fn fill(&mut self, len: usize) -> Vec<u8> {
        // Never the byte that fills freed memory.
        let words = (0..len.div_ceil(8)).flat_map(|_| (self.rng.next() & 0x7F7F_7F7F_7F7F_7F7F).to_le_bytes());
        let mut bytes: Vec<u8> = words.collect();
        bytes.truncate(len);
        bytes
    }

    fn len(a: u32) -> usize {
        match (a >> 4) % 16 {
            0 => 0,
            1..=8 => 1 + (a >> 8) as usize % 3000,
            15 if a % 8 == 0 => 270_000 + (a >> 8) as usize % 10_000,
            _ => 1 + (a >> 8) as usize % 30_000,
        }
    }

    /// A read or write of one to five segments between new memory of both sides.
    fn one_sided(&mut self, side: usize, direction: Direction, a: u32, b: u32) {
        let (here, there) = (side, 1 - side);
        let (mut items, mut expected) = (Vec::new(), Vec::new());
        let mut excused = false;
        for segment in 0..1 + b % 5 {
            let len = Self::len(a.rotate_left(segment * 5));
            let source = self.fill(len.max(1) + 7);
            let target = vec![0xEE; len.max(1) + 7];
            let (local, remote) = match direction {
                Direction::Write => (source.clone(), target),
                Direction::Read => (target, source.clone()),
            };
            let (p, q) = (self.place(), self.place());
            let local = self.cluster.engines[here].allocate(local, p);
            let remote = self.cluster.engines[there].allocate(remote, q);
            let Some(mut item) = self.cluster.engines[there].item(remote) else { return };
            let at = (b >> 8) as usize % 7;
            item.addr += at as u64;
            if b.wrapping_add(segment) % 61 == 0 {
                // A token of another region.
                item.padding[0] = !item.padding[0];
                excused = true;
            }
            let memory = &self.cluster.engines[here].memory[local];
            items.push((LocalSegment { mr: memory.mr, addr: memory.addr() as usize + at, len }, item));
            let (to, memory) = if direction == Direction::Write { (there, remote) } else { (here, local) };
            expected.push(Expected { side: to, memory, at, bytes: source[at..at + len].to_vec() });
        }
        let now = self.cluster.now();
        if let Some(id) = self.directly(here, direction, &items) {
            self.transfers.push(Transfer { side: here, id, expected, begun: now, excused, ended: false });
            return self.cluster.links[0].sides[here].poll(now);
        }
        let peer_engine = self.cluster.engines[there].id;
        let me = &mut self.cluster.links[0].sides[here];
        let builder = RequestBuilder::new(items.len(), &self.cluster.engines[here].registry, peer_engine, None).expect("builder");
        let Ok(Built::Request(request)) = builder.build(items.into_iter()) else { return };
        if me.machine.admit(request.segments.len(), request.pairs.iter().copied(), &me.channels).is_err() {
            return;
        }
        match me.machine.start(direction.way(), request, &mut me.channels, now) {
            Ok(id) => self.transfers.push(Transfer { side: here, id, expected, begun: now, excused, ended: false }),
            Err(e) => me.fail(e, now),
        }
        self.cluster.links[0].sides[here].poll(now);
    }

    /// Starts a transfer directly if that is possible at once.
    fn directly(&mut self, side: usize, direction: Direction, items: &[(LocalSegment, FifoItem)]) -> Option<u64> {
        let (now, peer_engine) = (self.cluster.now(), self.cluster.engines[1 - side].id);
        let me = &mut self.cluster.links[0].sides[side];
        let (sketch, known) = sketch(items.iter().copied(), &self.cluster.engines[side].registry, peer_engine)?;
        let mut feed = Feed::new(items.iter().copied(), known, direction.way(), sketch.count);
        me.machine.admit(sketch.count, sketch.places(), &me.channels).ok()?;
        let started = me.machine.start_direct(sketch, direction.way(), &mut feed, &mut me.channels, now);
        let (id, begun) = match started {
            Ok(started) => started?,
            Err(e) => {
                me.fail(e, now);
                return None;
            }
        };
        if let Err(e) = begun {
            me.fail(e, now);
        }
        Some(id)
    }

    fn send(&mut self, side: usize, a: u32, b: u32) {
        let len = Self::len(a) % 50_000;
        let bytes = self.fill(len + 3);
        let place = self.place();
        let memory = self.cluster.engines[side].allocate(bytes.clone(), place);
        let now = self.cluster.now();
        let (me, home) = (&mut self.cluster.links[0].sides[side], &self.cluster.engines[side]);
        let (mr, addr) = (home.memory[memory].mr, home.memory[memory].addr() as usize);
        let half = if len == 0 { 0 } else { b as usize % len };
        let items = [LocalSegment { mr, addr, len: half }, LocalSegment { mr, addr: addr + half, len: len - half }];
        let (segments, uses) = message(items.into_iter(), &home.registry).expect("own memory");
        if me.machine.admit(segments.len(), std::iter::empty(), &me.channels).is_err() {
            return;
        }
        let id = me.machine.start_send(segments, uses, &mut me.channels, now);
        self.transfers.push(Transfer { side, id, expected: Vec::new(), begun: now, excused: true, ended: false });
        self.sent[1 - side].push((self.transfers.len() - 1, bytes[..len].to_vec()));
        self.cluster.links[0].sides[side].poll(now);
    }

    fn receive(&mut self, side: usize, a: u32, b: u32) {
        let len = if b % 9 == 0 { Self::len(a) % 50_000 } else { 50_000 } + 1;
        let place = self.place();
        let memory = self.cluster.engines[side].allocate(vec![0xEE; len], place);
        let now = self.cluster.now();
        let (me, home) = (&mut self.cluster.links[0].sides[side], &self.cluster.engines[side]);
        if me.machine.admit(1, std::iter::empty(), &me.channels).is_err() {
            return;
        }
        let region = home.registry.local(home.memory[memory].mr).expect("own memory");
        let segment = Segment { addr: home.memory[memory].addr(), len: len as u64, region: 0, place, peer: Place::HOST };
        let id = me.machine.start_receive(segment, region, &mut me.channels, now);
        self.transfers.push(Transfer { side, id, expected: Vec::new(), begun: now, excused: true, ended: false });
        self.received[side].push((self.transfers.len() - 1, memory));
        self.cluster.links[0].sides[side].poll(now);
    }

    fn notify(&mut self, side: usize, b: u32) {
        let now = self.cluster.now();
        let bytes = self.fill(b as usize % 5000);
        let me = &mut self.cluster.links[0].sides[side];
        if me.machine.alive().is_ok() {
            me.machine.notify(b"name", &bytes, now);
            self.notified[1 - side].push(bytes);
        }
    }

    /// Moves some bytes of a side's control connection to the other.
    fn deliver_control(&mut self, side: usize, limit: usize) {
        let now = self.cluster.now();
        self.cluster.links[0].sides[side].flush(now);
        if self.cut.as_ref().is_some_and(|cut| cut.frozen == [true; 2] && !cut.resumed[1 - side]) {
            // It waits in the new socket.
            return;
        }
        let n = self.cluster.links[0].sides[side].out.len().min(1 + limit % 20_000);
        let bytes: Vec<u8> = self.cluster.links[0].sides[side].out.drain(..n).collect();
        if self.cluster.links[0].sides[1 - side].suspended {
            // The old socket is not read any more.
            return;
        }
        if !bytes.is_empty() {
            let now = self.cluster.now();
            self.cluster.links[0].sides[1 - side].receive(&bytes, now);
        }
    }

    /// Moves everything for a while.
    fn busy(&mut self, rounds: usize) {
        for _ in 0..rounds {
            for side in [0, 1] {
                self.deliver_control(side, usize::MAX - 1);
                self.poll(side);
                for channel in 0..DEVICE_CHANNELS + HOST_CHANNELS {
                    let mut net = self.net();
                    net.direct.answer(side, false, 0);
                    net.direct.carry(side, 1);
                    for _ in 0..4 {
                        net.transmit(channel, side);
                        net.deliver(channel, side);
                    }
                }
            }
            self.cluster.engines.iter_mut().for_each(Engine::reclaim);
        }
    }

    /// The same, and lost channels come back in a run that loses them.
    fn go_on(&mut self, rounds: usize) {
        if self.lossy {
            self.revive();
        }
        self.busy(rounds);
    }

    fn check(&mut self) -> Result<(), String> {
        self.cluster.check()?;
        for (side, world) in self.cluster.links[0].sides.iter().enumerate() {
            if let (false, Some(e)) = (self.faulty, world.machine.dead()) {
                return Err(format!("side {side} lost the connection without a fault: {e}"));
            }
        }
        for index in 0..self.transfers.len() {
            if !self.transfers[index].ended {
                self.look_at(index)?;
            }
        }
        self.check_notifications()
    }

    fn look_at(&mut self, index: usize) -> Result<(), String> {
        let transfer = &self.transfers[index];
        let (side, id) = (transfer.side, transfer.id);
        let what = format!("transfer {id} of side {side}");
        match self.cluster.links[0].sides[side].machine.lookup(id) {
            Ok(TransferState { complete: false, .. }) => return Ok(()),
            Ok(_) => {
                for e in &transfer.expected {
                    let memory = &self.cluster.engines[e.side].memory[e.memory];
                    if !memory.freed && memory.now()[e.at..e.at + e.bytes.len()] != e.bytes[..] {
                        return Err(format!("{what} is OK with wrong bytes"));
                    }
                }
            }
            Err(e) if self.faulty => {
                if e.kind() == ErrorKind::Protocol || e.kind() == ErrorKind::Internal {
                    return Err(format!("{what}: a violation between two honest sides: {e}"));
                }
            }
            Err(e) => {
                let given_back = transfer.expected.iter().any(|e| !self.cluster.engines[e.side].memory[e.memory].is_registered());
                // The source of a read may have been given back too.
                let refused = e.kind() == ErrorKind::RemoteAccess;
                if !transfer.excused && !given_back && !refused {
                    let causes: Vec<_> =
                        self.cluster.links[0].sides.iter().map(|s| s.machine.dead().map(ToString::to_string)).collect();
                    return Err(format!("{what} failed without a fault: {e}; {causes:?}"));
                }
            }
        }
        self.transfers[index].ended = true;
        Ok(())
    }

    /// Notifications arrive whole, once and in order.
    fn check_notifications(&mut self) -> Result<(), String> {
        for side in [0, 1] {
            while let Some(got) = self.cluster.engines[side].queue.pop() {
                let expected = self.notified[side].get(self.heard[side]);
                if expected != Some(&got.msg) {
                    return Err(format!("notification {} of side {side} is not the one that was sent", self.heard[side]));
                }
                self.heard[side] += 1;
            }
        }
        Ok(())
    }

    /// Checks that messages that met a receive are whole.
    fn check_messages(&self) -> Result<(), String> {
        for side in [0, 1] {
            for (&(send, ref bytes), &(receive, memory)) in self.sent[side].iter().zip(&self.received[side]) {
                let (send, receive) = (&self.transfers[send], &self.transfers[receive]);
                let ok = |t: &Transfer| {
                    matches!(self.cluster.links[0].sides[t.side].machine.lookup(t.id), Ok(TransferState { complete: true, .. }))
                };
                let memory = &self.cluster.engines[side].memory[memory];
                // Withdrawals change which send meets which receive, so only the pairs before the first failure are compared.
                if !(ok(send) && ok(receive)) {
                    break;
                }
                if !memory.freed && memory.now()[..bytes.len()] != bytes[..] {
                    return Err(format!("message {} to side {side} is OK with wrong bytes", send.id));
                }
            }
        }
        Ok(())
    }

    /// Runs until all transfers have ended: at once without faults, by their deadlines with them.
    fn finish(mut self) -> Result<(), String> {
        self.mend();
        for _ in 0..12 {
            if self.transfers.iter().any(|t| !t.ended) {
                self.go_on(5);
                self.check()?;
            }
        }
        // What is queued arrives, however little the sockets take at once.
        for _ in 0..1000 {
            if self.cluster.links[0].sides.iter().all(|side| side.unheard() == 0 || side.mute) {
                break;
            }
            self.busy(1);
        }
        self.busy(2);
        self.check()?;
        let limit = self.cluster.now() + MATCH_TIMEOUT + PEER_TIMEOUT + 3 * TRANSFER_TIMEOUT;
        while self.transfers.iter().any(|t| !t.ended) {
            if self.cluster.now() > limit {
                let open = self.transfers.iter().find(|t| !t.ended).map(|t| (t.side, t.id, t.begun - self.start));
                return Err(format!("a transfer (side, id, begun) never ends: {open:?}"));
            }
            self.advance(Duration::from_millis(250));
            self.go_on(4);
            self.check()?;
        }
        self.check_messages()?;
        // The owner of memory that was read learns at the reader's next look that it is in place.
        for _ in 0..2 {
            self.advance(Duration::from_millis(50));
            self.busy(4);
        }
        if !self.faulty {
            for (side, world) in self.cluster.links[0].sides.iter().enumerate() {
                if let Some(e) = world.machine.dead() {
                    return Err(format!("side {side} lost the connection without a fault: {e}"));
                }
                if world.channels.under_way() > 0 {
                    return Err(format!("side {side} counts {} bytes in flight", world.channels.under_way()));
                }
                if !world.machine.is_idle() {
                    return Err(format!("side {side} keeps state of transfers that have ended"));
                }
            }
            if self.heard != [self.notified[0].len(), self.notified[1].len()] {
                return Err("a notification was lost".to_owned());
            }
        }
        self.give_back(limit)?;
        self.busy(10);
        self.check()
    }

    /// Gives back all memory. Without faults it is free at once; with them a side may not know yet that its peer is dead.
    fn give_back(&mut self, limit: Instant) -> Result<(), String> {
        for side in &mut self.cluster.engines {
            (0..side.memory.len()).for_each(|index| side.deregister(index));
            side.reclaim();
        }
        loop {
            let used = |side: &Engine| side.memory.iter().any(|m| !m.freed);
            let Some(side) = self.cluster.engines.iter().position(used) else { return Ok(()) };
            if !self.faulty || self.cluster.now() > limit {
                return Err(format!("side {side} still uses memory although all transfers have ended"));
            }
            self.advance(Duration::from_millis(250));
            self.busy(4);
            self.check()?;
        }
    }
}
