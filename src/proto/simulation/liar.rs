//! One machine against a peer that speaks correct frames in wrong orders and lies about ids, lengths, sizes and verdicts. The
//! victim may lose its connection. It never reports success for bytes that did not arrive, touches memory that it has given back,
//! keeps a transfer for ever, or grows without limit.

#[cfg(test)]
use super::direct::{Lies, LIE};
use super::net::{Message, Net};
use super::positions::Content;
use super::world::{Engine, Shape, Side, DEVICE_CHANNELS, HOST_CHANNELS, MATCH_TIMEOUT, PEER_TIMEOUT, TRANSFER_TIMEOUT};
use super::{Action, Rng};
use crate::budget::Pool;
use crate::engine::fifo::{Access, FifoItem};
use crate::engine::request::{message, Built, RequestBuilder};
use crate::engine::transfer::{Direction, LocalSegment};
use crate::proto::outgoing::tag;
use crate::proto::TransferState;
use crate::types::{Key, Landing, Place, Segment};
use crate::wire::frame::{self, Frame, Grant, WireRegion, WireSegment};
use process::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHUNK: usize = 8192;
/// What the victim's memory holds before the liar's data.
const BEFORE: u8 = 0xEE;

struct Mine {
    id: u64,
    /// Memory that must be full of the liar's bytes when a read or receive succeeds, with its length or that of the message.
    target: Option<(usize, usize)>,
    ended: bool,
}

struct World {
    rng: Rng,
    net: Arc<Mutex<Net>>,
    engine: Engine,
    victim: Side,
    now: Instant,
    mine: Vec<Mine>,
    /// The next id of a transfer that the liar starts, and lengths that it has announced.
    next: u64,
    /// A set-up of a lost channel that has begun at the victim: the channel, and its generation.
    begun: Option<(u16, u32)>,
    /// How many have brought one up there.
    joins: u64,
    /// Offset of each stream as far as the liar knows, so that its tags can fit.
    offsets: Vec<(Key, u64)>,
}

pub(super) fn play(seed: u64, script: &[Action]) -> Result<(), String> {
    let mut world = World::new(seed);
    for &action in script {
        world.step(action);
        world.check()?;
    }
    world.finish()
}

/// How often the liar of a run lied about direct transfers.
#[cfg(test)]
pub(super) fn lies(seed: u64, script: &[Action]) -> Lies {
    let mut world = World::new(seed);
    script.iter().for_each(|&action| world.step(action));
    let lies = world.net.lock().direct.lies;
    lies
}

/// How often a lost channel of the victim of a run came up again.
#[cfg(test)]
pub(super) fn joins(seed: u64, script: &[Action]) -> u64 {
    let mut world = World::new(seed);
    script.iter().for_each(|&action| world.step(action));
    world.joins
}

/// The victim starts transfers of every kind and then receives these bytes on its control connection.
#[cfg(fuzzing)]
pub(super) fn recite(seed: u64, bytes: &[u8]) -> Result<(), String> {
    let mut world = World::new(seed);
    for kind in 0..8u32 {
        world.own(kind | 10_000 << 8, 1);
    }
    for piece in bytes.chunks(1 + seed as usize * 16) {
        let now = world.now;
        world.victim.hear_frames(piece, now);
        world.victim.poll(now);
        world.check()?;
    }
    world.finish()
}

impl World {
    fn new(seed: u64) -> World {
        let net = Arc::new(Mutex::new(Net::new(DEVICE_CHANNELS + HOST_CHANNELS, seed % 8 < 4)));
        let now = Instant::now();
        // All seeds of a liar leave the same rest by 5.
        net.lock().direct.on = seed / 5 % 5 < 3;
        let engine = Engine::new(0, Pool::endless());
        let shape = Shape::of(CHUNK, if seed % 3 == 0 { 0 } else { 2000 });
        let victim = Side::new(&engine, 1, &net, 0, &shape, now);
        World {
            rng: Rng::new(seed),
            net,
            engine,
            victim,
            now,
            mine: Vec::new(),
            next: 1,
            begun: None,
            joins: 0,
            offsets: Vec::new(),
        }
    }

    fn step(&mut self, Action { kind, a, b }: Action) {
        let channel = (b as usize) % (DEVICE_CHANNELS + HOST_CHANNELS);
        match kind % 32 {
            0..=4 => self.own(a, b),
            5..=17 => {
                let frame = self.lie(a, b);
                self.say(&frame);
            }
            18..=20 => {
                // A grant, and data that may fit it.
                self.say_chunk(a, b, channel);
            }
            21 => self.fly(a, b, channel),
            22..=24 => {
                self.net.lock().deliver(channel, 1);
            }
            25 => {
                let mut net = self.net.lock();
                net.transmit(channel, 0);
                net.direct.answer(0, false, a);
                net.direct.carry(0, 1 + b as usize % 3);
                net.direct.lie(u64::from(b) % 10_000);
                if b % 3 == 0 {
                    net.direct.claim_falsely(0, 1 + u64::from(a) % 40, [7; 16]);
                }
            }
            26 => {
                let count = self.engine.memory.len();
                if count > 0 {
                    self.engine.deregister(b as usize % count);
                }
            }
            28 => self.join(channel, a),
            27 => self.now += Duration::from_millis(u64::from(b % 900)),
            _ => self.victim.poll(self.now),
        }
        self.engine.reclaim();
    }

    /// A set-up that brings a lost channel up again, or a part of it: the liar loses the channel, the victim begins and then has the channel, and
    /// the liar says that it has it too, mostly.
    fn join(&mut self, channel: usize, a: u32) {
        let (now, number) = (self.now, channel as u16);
        if self.begun.is_none() {
            if !self.victim.machine.is_lost(number) {
                self.say(&Frame::Lost { channel: number, chunks: 0, text: "so I say" });
                self.victim.poll(now);
            }
            let machine = &mut self.victim.machine;
            if machine.alive().is_ok() && machine.is_lost(number) {
                self.begun = machine.begin_restore(&[number], None).ok().map(|generation| (number, generation));
            }
            if a % 4 == 0 {
                return;
            }
        }
        if self.victim.machine.alive().is_err() {
            return;
        }
        let Some((number, generation)) = self.begun.take() else { return };
        let mut net = self.net.lock();
        let wire = net.string();
        net.restore(number.into(), 0, wire);
        net.follow(number.into(), 1, wire);
        drop(net);
        let Side { machine, channels, .. } = &mut self.victim;
        match machine.restore(number, generation, channels, now) {
            Ok(()) => self.joins += 1,
            Err(e) => self.victim.fail(e, now),
        }
        if a % 16 > 1 {
            self.say(&Frame::Up { channel: number, generation });
        }
    }

    /// The victim starts a transfer.
    fn own(&mut self, a: u32, b: u32) {
        let len = 1 + (a >> 8) as usize % 30_000;
        let place = if b % 3 == 0 { Place::gpu(0) } else { Place::HOST };
        let memory = self.engine.allocate(vec![BEFORE; len], place);
        let now = self.now;
        let (me, home) = (&mut self.victim, &self.engine);
        let (mr, addr) = (home.memory[memory].mr, home.memory[memory].addr());
        let local = LocalSegment { mr, addr: addr as usize, len };
        if me.machine.admit(1, std::iter::empty(), &me.channels).is_err() {
            return;
        }
        let (id, target) = match a % 4 {
            direction @ (0 | 1) => {
                let peer = [9; 16];
                let access = Access { region: 5 + u64::from(b >> 8) % 4, token: [3; 16], engine: peer, place };
                let item = FifoItem::new(4096, len as u64, &access);
                let builder = RequestBuilder::new(1, &home.registry, peer, None).expect("builder");
                let Ok(Built::Request(request)) = builder.build(std::iter::once((local, item))) else { return };
                let direction = if direction == 0 { Direction::Write } else { Direction::Read };
                let started = me.machine.start(direction.way(), request, &mut me.channels, now);
                let Ok(id) = started else { return };
                (id, (direction == Direction::Read).then_some((memory, len)))
            }
            2 => {
                let (segments, uses) = message(std::iter::once(local), &home.registry).expect("own memory");
                (me.machine.start_send(segments, uses, &mut me.channels, now), None)
            }
            _ => {
                let region = home.registry.local(mr).expect("own memory");
                let segment = Segment { addr, len: len as u64, region: 0, place, peer: Place::HOST };
                (me.machine.start_receive(segment, region, &mut me.channels, now), Some((memory, len)))
            }
        };
        self.mine.push(Mine { id, target, ended: false });
        self.victim.poll(now);
    }

    fn id(&mut self, b: u32) -> u64 {
        match b % 8 {
            // An id of the victim's, one of the liar's, or nonsense.
            0..=3 => 1 + u64::from(b >> 8) % (self.mine.len() as u64 + 1),
            4..=6 => 1 + u64::from(b >> 8) % self.next.max(2),
            _ => self.rng.next() >> (b % 64),
        }
    }

    /// A well-formed frame whose content may or may not fit.
    fn lie(&mut self, a: u32, b: u32) -> Frame<'static> {
        const DATA: [u8; 4096] = [LIE; 4096];
        let id = self.id(b);
        let status = [0, 0, -31, -12, -41, 7][a as usize % 6];
        match (a >> 4) % 16 {
            0..=3 => self.announce(a, b),
            4 | 5 => Frame::Done { id, status, text: "so I say" },
            6 => Frame::ReadInline { id, data: &DATA[..(a >> 8) as usize % 2000] },
            7 | 8 => {
                self.next += 1;
                let id = if a % 5 == 0 { id } else { self.next };
                let from = [None, Some(Place::HOST), Some(Place::gpu(0))][b as usize % 3];
                Frame::Message { id, len: u64::from(a >> 12) % 20_000, from }
            }
            9 | 10 => Frame::Pull {
                id,
                status,
                receiver: Place((a % 3) as u8),
                landing: (a % 4 == 0).then_some(Landing { slot: b, generation: 1, addr: 4096 }),
            },
            11 => Frame::Withdraw { id, status },
            12 => Frame::Cancel { id },
            13 => match a % 3 {
                0 => Frame::Ping { received: if b % 2 == 0 { 0 } else { u64::from(b) } },
                1 if b % 3 == 0 => Frame::Up { channel: (b % 8) as u16, generation: a >> 8 & 3 },
                1 => Frame::Arrived { channel: (b % 8) as u16, chunks: u64::from(a >> 8) % 4 },
                _ => Frame::Lost { channel: (b % 8) as u16, chunks: u64::from(a >> 8) % 4, text: "so I say" },
            },
            14 => Frame::Notify { name: b"liar", message: &DATA[..(b as usize) % 3000] },
            _ if a % 64 == 0 => Frame::Bye { status, text: "enough\u{1b}[2J\nforged line" },
            _ => {
                let grant = Grant { len: a % (2 * CHUNK as u32), channel: (b % 8) as u16 };
                Frame::Chunks {
                    id,
                    by_initiator: a % 2 == 0,
                    offset: u64::from(a >> 4) % 5000,
                    grants: vec![grant; 1 + a as usize % 3],
                }
            }
        }
    }

    /// A write or read of the victim's memory, mostly with the right token.
    fn announce(&mut self, a: u32, b: u32) -> Frame<'static> {
        if self.engine.memory.is_empty() {
            return Frame::Ping { received: 0 };
        }
        let index = b as usize % self.engine.memory.len();
        let memory = &self.engine.memory[index];
        let (addr, mr, place, whole) = (memory.addr(), memory.mr, memory.place, memory.bytes.len() as u32);
        let token = match self.engine.item(index).and_then(|item| item.access().ok()) {
            Some(access) if a % 9 != 0 => access.token,
            _ => [7; 16],
        };
        let id = if a % 7 == 0 {
            self.id(b)
        } else {
            self.next += 1;
            self.next
        };
        let len = if a % 5 == 0 { whole.saturating_add(a % 3) } else { 1 + (b >> 4) % whole };
        let owner = if a % 11 == 0 { Place(3) } else { place };
        let segment = WireSegment { addr, len, region: 0, initiator: Place((b % 2) as u8), owner };
        let regions = vec![WireRegion { id: mr, token }];
        let segments = std::iter::repeat_n(segment, 1 + a as usize % 3).collect();
        match b % 3 {
            0 => Frame::Read { id, regions, segments },
            1 if len <= 4096 && a % 3 == 0 => {
                const DATA: [u8; 4096] = [LIE; 4096];
                Frame::Write { id, regions, segments, eager: Some(&DATA[..len as usize]) }
            }
            _ => Frame::Write { id, regions, segments, eager: None },
        }
    }

    fn say(&mut self, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame::encode(frame, &mut bytes);
        let now = self.now;
        self.victim.hear_frames(&bytes, now);
    }

    /// Announces a chunk of some stream, and sends what mostly fits it.
    fn say_chunk(&mut self, a: u32, b: u32, channel: usize) {
        let id = self.id(b);
        let by_initiator = a % 2 == 0;
        let len = 1 + (a >> 4) % CHUNK as u32;
        let key = Key { id, mine: !by_initiator };
        let offset = match self.offsets.iter_mut().find(|(k, _)| *k == key) {
            Some((_, offset)) => std::mem::replace(offset, *offset + u64::from(len)),
            None => {
                self.offsets.push((key, u64::from(len)));
                0
            }
        };
        // Now and then bytes that a lost channel may not have delivered.
        let offset = if b % 5 == 0 { u64::from(a >> 8) % (offset + 1) } else { offset };
        self.say(&Frame::Chunks { id, by_initiator, offset, grants: vec![Grant { len, channel: channel as u16 }] });
        let tag = tag(key, false, offset);
        let lies = a % 13 == 0;
        let len = if lies { len / 2 + 1 } else { len };
        let message =
            Message { tag: if b % 17 == 0 { !tag & 0x7FFF_FFFF } else { tag }, content: Content::Bytes(vec![LIE; len as usize]) };
        self.net.lock().wires[channel][1].flying.push_back(message);
    }

    /// Sends data that was not announced.
    fn fly(&mut self, a: u32, b: u32, channel: usize) {
        let message = Message { tag: (b & 0x7FFF_FFFF) as i32, content: Content::Bytes(vec![LIE; 1 + a as usize % CHUNK]) };
        self.net.lock().wires[channel][1].flying.push_back(message);
    }

    fn check(&mut self) -> Result<(), String> {
        self.victim.machine.audit()?;
        if let Some(memory) = self.engine.written_after_free() {
            return Err(format!("memory {memory} was written after it was given back"));
        }
        if self.victim.machine.dead().is_some() && !self.net.lock().closed[0] {
            return Err("the connection has ended, but its channels are open".to_owned());
        }
        for mine in self.mine.iter_mut().filter(|m| !m.ended) {
            match self.victim.machine.lookup(mine.id) {
                Ok(TransferState { complete: false, .. }) => continue,
                Ok(state) => {
                    if let Some((memory, len)) = mine.target {
                        let memory = &self.engine.memory[memory];
                        let len = if state.bytes_total > 0 { state.bytes_total as usize } else { 0 }.min(len);
                        if !memory.freed && memory.now()[..len].iter().any(|&b| b != LIE) {
                            return Err(format!("transfer {} is OK, but its bytes never arrived", mine.id));
                        }
                    }
                }
                Err(e) if e.to_string().contains(|c: char| c.is_control()) => {
                    return Err(format!("an error text contains the peer's control characters: {e:?}"));
                }
                Err(_) => {}
            }
            mine.ended = true;
        }
        Ok(())
    }

    /// The liar sends only heartbeats from now on: everything must end all the same.
    fn finish(mut self) -> Result<(), String> {
        let limit = self.now + MATCH_TIMEOUT + PEER_TIMEOUT + 3 * TRANSFER_TIMEOUT;
        while self.mine.iter().any(|m| !m.ended) {
            if self.now > limit {
                let open = self.mine.iter().find(|m| !m.ended).map(|m| m.id);
                return Err(format!("transfer {open:?} never ends"));
            }
            self.now += Duration::from_millis(500);
            self.say(&Frame::Notify { name: b"", message: b"still here" });
            while self.engine.queue.pop().is_some() {}
            for channel in 0..DEVICE_CHANNELS + HOST_CHANNELS {
                let mut net = self.net.lock();
                net.transmit(channel, 0);
                net.deliver(channel, 1);
            }
            self.victim.poll(self.now);
            self.engine.reclaim();
            self.check()?;
        }
        // The application closes the connection and takes its memory back.
        let now = self.now;
        self.victim.fail(crate::status::err!(Canceled, "closed"), now);
        (0..self.engine.memory.len()).for_each(|index| self.engine.deregister(index));
        self.engine.reclaim();
        if self.engine.memory.iter().any(|m| !m.freed) {
            return Err("memory is in use although the connection has ended".to_owned());
        }
        for channel in 0..DEVICE_CHANNELS + HOST_CHANNELS {
            (0..20).for_each(|_| {
                self.net.lock().deliver(channel, 1);
            });
        }
        self.check()
    }
}

/// The victim starts a transfer of 30,000 bytes: 0 a write, 1 a read, 2 a send, 3 a receive.
fn own(world: &mut World, kind: u32) {
    world.own((29_999 << 8) + kind, 1);
}

/// Sends frames of which only the last must end the connection, as a violation.
fn violates(what: &str, world: &mut World, frames: &[Frame<'_>]) {
    for frame in frames {
        assert!(world.victim.machine.alive().is_ok(), "{what}: too early: {:?}", world.victim.machine.dead());
        world.say(frame);
    }
    let kind = world.victim.machine.dead().map(|e| e.kind());
    assert_eq!(kind, Some(crate::status::ErrorKind::Protocol), "{what}");
}

#[test]
fn frames_that_fit_in_another_state_only_are_violations() {
    let chunk = |id| Frame::Chunks { id, by_initiator: true, offset: 0, grants: vec![Grant { len: 1000, channel: 2 }] };
    let done = |id| Frame::Done { id, status: 0, text: "" };
    let cancel = || Frame::Cancel { id: 1 };

    let mut world = World::new(1);
    (0..40).for_each(|_| own(&mut world, 0));
    violates("a verdict on data that was not sent", &mut world, &[done(40)]);

    let mut world = World::new(1);
    own(&mut world, 1);
    violates("a verdict of success on a read", &mut world, &[done(1)]);

    let mut world = World::new(1);
    own(&mut world, 3);
    violates("a verdict on a receive", &mut world, &[Frame::Message { id: 1, len: 5000, from: None }, done(1)]);

    let mut world = World::new(1);
    own(&mut world, 3);
    violates(
        "a message withdrawn half way",
        &mut world,
        &[Frame::Message { id: 1, len: 5000, from: None }, chunk(1), Frame::Withdraw { id: 1, status: -31 }],
    );

    let mut world = World::new(1);
    let ping = |received| Frame::Ping { received };
    violates("more bytes reported than were sent", &mut world, &[ping(0), ping(1)]);

    let mut world = World::new(1);
    let arrived = |channel, chunks| Frame::Arrived { channel, chunks };
    violates("more chunks reported than were sent", &mut world, &[arrived(2, 0), arrived(2, 1)]);
    violates("chunks of a channel that does not exist", &mut World::new(1), &[arrived(60_000, 0)]);

    let lost = |chunks| Frame::Lost { channel: 2, chunks, text: "" };
    violates("a channel lost twice", &mut World::new(1), &[lost(0), lost(0)]);
    violates("a report of a channel that the peer has lost", &mut World::new(1), &[lost(0), arrived(2, 0)]);
    let message = Frame::Message { id: 1, len: 5000, from: None };
    let up = |channel, generation| Frame::Up { channel, generation };
    violates("an open channel comes back", &mut World::new(1), &[up(2, 1)]);
    violates("a channel comes back that does not exist", &mut World::new(1), &[up(60_000, 1)]);
    violates("a channel comes back without a set-up", &mut World::new(1), &[lost(0), up(2, 1)]);
    // A set-up of the channel has begun, and the victim has not said that it is up.
    let restoring = || {
        let mut world = World::new(1);
        own(&mut world, 3);
        world.say(&lost(0));
        world.victim.poll(world.now);
        assert_eq!(world.victim.machine.begin_restore(&[2], None).unwrap(), 1);
        world
    };
    violates("a later set-up than there was", &mut restoring(), &[up(2, 2)]);
    violates("a channel comes back twice", &mut restoring(), &[up(2, 1), up(2, 1)]);
    violates("a chunk before the peer's Up", &mut restoring(), &[message.clone(), chunk(1)]);
    violates("a chunk before this engine's Up", &mut restoring(), &[up(2, 1), message.clone(), chunk(1)]);
    violates("a report before the peer's Up", &mut restoring(), &[arrived(2, 0)]);
    violates("a report of a chunk that came back with nothing", &mut restoring(), &[up(2, 1), arrived(2, 1)]);
    let mut world = restoring();
    let wire = world.net.lock().string();
    world.net.lock().restore(2, 0, wire);
    let Side { machine, channels, .. } = &mut world.victim;
    machine.restore(2, 1, channels, world.now).unwrap();
    [up(2, 1), message.clone(), chunk(1)].iter().for_each(|frame| world.say(frame));
    assert!(world.victim.machine.alive().is_ok());
    let mut world = World::new(1);
    own(&mut world, 3);
    violates("a chunk on a channel that the peer has lost", &mut world, &[message.clone(), lost(0), chunk(1)]);
    let mut world = World::new(1);
    own(&mut world, 3);
    violates("a chunk announced twice", &mut world, &[message.clone(), chunk(1), chunk(1)]);
    let mut world = World::new(1);
    own(&mut world, 3);
    let later = Frame::Chunks { id: 1, by_initiator: true, offset: 1000, grants: vec![Grant { len: 1000, channel: 2 }] };
    violates("a chunk left out", &mut world, &[message, later]);

    let mut world = World::new(1);
    own(&mut world, 3);
    let silent = Frame::Withdraw { id: 1, status: 0 };
    violates("a message withdrawn without a reason", &mut world, &[Frame::Message { id: 1, len: 5000, from: None }, silent]);

    let mut world = World::new(1);
    let segment = WireSegment { addr: 4096, len: 9000, region: 0, initiator: Place::HOST, owner: Place::HOST };
    let segments = || std::iter::once(segment).collect();
    let regions = || vec![WireRegion { id: 77, token: [7; 16] }];
    let refused = || Frame::Write { id: 1, regions: regions(), segments: segments(), eager: None };
    violates("a write cancelled twice", &mut world, &[refused(), chunk(1), cancel(), cancel()]);

    let mut world = World::new(1);
    violates("more data than a refused write has", &mut world, &[refused(), cancel(), chunk(1)]);

    let mut world = World::new(1);
    violates(
        "an id that does not rise",
        &mut world,
        &[Frame::Message { id: 5, len: 1, from: None }, Frame::Message { id: 5, len: 1, from: None }],
    );
}

#[test]
fn memory_beside_a_region_is_not_written() {
    let mut world = World::new(1);
    own(&mut world, 3);
    let access = world.engine.item(0).and_then(|item| item.access().ok()).expect("registered");
    let end = world.engine.memory[0].addr() + 30_000;
    let regions = || vec![WireRegion { id: access.region, token: access.token }];
    let data = [LIE; 64];
    for (id, addr) in [(1, end - 63), (2, end), (3, end - 30_001), (4, u64::MAX - 10)] {
        let segment = WireSegment { addr, len: 64, region: 0, initiator: Place::HOST, owner: Place::HOST };
        let segments = std::iter::once(segment).collect();
        world.say(&Frame::Write { id, regions: regions(), segments, eager: Some(&data) });
    }
    assert!(world.victim.machine.alive().is_ok(), "a refusal does not end the connection");
    assert!(world.engine.memory[0].now().iter().all(|&b| b == BEFORE));
}
