//! Engines with a connection between some of them, in virtual time. Real are the protocol machines, the choice of channels (`channel/stripe`),
//! the windows, the frames on the control connections, registries and budgets. Simulated are the kernel's sockets (`tcp`), NICs and the switch
//! (`fabric`), and memory (`positions`). Computing takes no time.
//!
//! A chunk goes from the machine into the window of a channel, from there into the socket as far as that has room ("sent"), from the socket
//! in bursts through NIC, queue and NIC, and from the receiving socket into the receive that the announcement has posted. The announcement
//! goes the same way over the control connection, so it can come later than the chunk.

use super::fabric::{Event, Fabric, Flow, Spec};
use super::net::{Net, Stream};
use super::positions::Positions;
use super::world::{Engine, Shape, Side};
use crate::budget::Pool;
use crate::engine::request::{Built, RequestBuilder};
use crate::engine::transfer::{Direction, LocalSegment};
use crate::proto::TransferState;
use crate::status::{err, Error, ErrorKind};
use process::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Memory that all peers of an engine may use, one of them, and their transfers.
const PEER_BYTES: [usize; 3] = [256 << 20, 128 << 20, 1 << 20];
/// How long after a loss, and after an attempt without success, lost channels are set up again: the first pause of an engine.
const RETRY: u64 = 200_000_000;
/// Every so many polls a machine is audited.
const AUDIT: u64 = 32;

/// A side of a connection: the connection's place, and 0 or 1.
pub(super) type End = (usize, usize);

/// A piece of a transfer: memory of the initiator and of its peer with the offset of the piece in each, and its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub near: (usize, usize),
    pub far: (usize, usize),
    pub len: usize,
}

/// A transfer that has not ended.
struct Open {
    id: u64,
    tag: u64,
    began: u64,
    direction: Direction,
    blocks: Vec<Block>,
}

/// What a side keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// Bytes of the control connection that the peer has not acknowledged, and chunks that it has announced and that have not arrived.
    pub frames: usize,
    pub chunks: usize,
    /// Transfers of this engine.
    pub transfers: usize,
}

/// A connection.
pub(super) struct Link {
    pub net: Arc<Mutex<Net>>,
    pub sides: [Side; 2],
    pub engines: [usize; 2],
    /// Counts the connections that had this place.
    generation: u64,
    control: [Box<Stream>; 2],
    /// When each side's next tick is due.
    ticks: [u64; 2],
    /// An attempt to restore lost channels is due.
    retries: bool,
    open: [Vec<Open>; 2],
    ended: [u64; 2],
    held: [Held; 2],
    notified: [bool; 2],
}

impl Link {
    /// Sets channels up again, which takes no time. The side that has connected begins.
    ///
    /// # Errors
    /// The other side does not know of a loss yet.
    fn restore(&mut self, channels: &[u16], now: Instant) -> Result<(), Error> {
        let [connector, listener] = &mut self.sides;
        let number = connector.machine.begin_restore(channels, None)?;
        listener.machine.begin_restore(channels, Some(number))?;
        for &channel in channels {
            let wires = self.net.lock().string();
            for (which, side) in self.sides.iter_mut().enumerate() {
                self.net.lock().restore(channel.into(), which, wires);
                side.machine.restore(channel, number, &mut side.channels, now).expect("a set-up that has begun");
            }
        }
        Ok(())
    }
}

/// What a scenario is notified of.
#[derive(Debug)]
pub(super) enum Happened {
    /// A transfer has ended: its tag, the time that it took, and why it failed.
    Ended { tag: u64, took: u64, failed: Option<Error> },
    /// The connection has ended at a side that lives.
    Lost(End),
    /// The time has come that the scenario asked for.
    Called(u64),
}

/// Starts transfers, breaks things, and says when all is done.
pub(super) trait Scenario {
    fn on(&mut self, cluster: &mut Cluster, what: Happened);
    fn is_done(&self) -> bool;
}

/// The engines and their connections.
pub(super) struct Cluster {
    pub engines: Vec<Engine>,
    pub links: Vec<Link>,
    /// Places of connections that have been closed.
    free: Vec<usize>,
    connected: u64,
    pub fabric: Fabric,
    pub positions: Arc<Mutex<Positions>>,
    pub shape: Shape,
    start: Instant,
    /// Engines that have crashed.
    pub crashed: Vec<bool>,
    /// What each engine keeps for all of its connections, and the most that it kept.
    held: Vec<Held>,
    most: Vec<Held>,
    happened: VecDeque<Happened>,
    polls: u64,
    broken: Option<String>,
}

/// `wires`: those that the channel has now. A restored one has others.
fn flow_of(link: usize, generation: u64, channel: usize, wires: usize, side: usize) -> Flow {
    generation << 48 | (link as u64) << 28 | (wires as u64) << 12 | (channel as u64) << 1 | side as u64
}

/// The connection, its generation, the channel and the side of a flow.
fn parts_of(flow: Flow) -> (usize, u64, usize, usize) {
    ((flow >> 28) as usize & 0xF_FFFF, flow >> 48, (flow >> 1) as usize & 0x7FF, flow as usize & 1)
}

fn wires_of(flow: Flow) -> usize {
    (flow >> 12) as usize & 0xFFFF
}

impl Cluster {
    pub(super) fn new(engines: usize, spec: Spec, shape: Shape) -> Cluster {
        let [bytes, of_one, transfers] = PEER_BYTES;
        let engine = |number| Engine::new(number, Pool::new(bytes, of_one, transfers));
        Cluster {
            engines: (0..engines).map(engine).collect(),
            links: Vec::new(),
            free: Vec::new(),
            connected: 0,
            fabric: Fabric::new(spec, engines),
            positions: Arc::default(),
            shape,
            start: Instant::now(),
            crashed: vec![false; engines],
            held: vec![Held::default(); engines],
            most: vec![Held::default(); engines],
            happened: VecDeque::new(),
            polls: 0,
            broken: None,
        }
    }

    pub(super) fn now(&self) -> Instant {
        self.start + Duration::from_nanos(self.fabric.now)
    }

    /// Channels of a connection; the number behind the last means its control connection.
    fn channels(&self) -> usize {
        self.shape.device + self.shape.host
    }

    /// Connects two engines. Returns the place of the connection.
    pub(super) fn connect(&mut self, engines: [usize; 2]) -> usize {
        let Spec { data, packet, .. } = self.fabric.spec;
        self.connected += 1;
        let net = Net::in_cluster(self.channels(), data, &self.positions, self.start).over_tcp(packet, self.connected);
        self.join(engines, net, [self.shape; 2])
    }

    /// Connects two engines with these channels; the sides may differ in their limits.
    pub(super) fn join(&mut self, engines: [usize; 2], net: Net, shapes: [Shape; 2]) -> usize {
        let (now, packet, net) = (self.now(), self.fabric.spec.packet, Arc::new(Mutex::new(net)));
        let sides = [0, 1].map(|side| {
            let (own, peer) = (engines[side], engines[1 - side]);
            Side::new(&self.engines[own], peer, &net, side, &shapes[side], now)
        });
        let place = self.free.pop().unwrap_or(self.links.len());
        let link = Link {
            net,
            sides,
            engines,
            generation: self.links.get(place).map_or(0, |old| (old.generation + 1) & 0xFFFF),
            control: [0, 1].map(|side| Box::new(Stream::new(packet, (self.connected << 8) + 254 + side))),
            ticks: [u64::MAX; 2],
            retries: false,
            open: Default::default(),
            ended: [0; 2],
            held: [Held::default(); 2],
            notified: [false; 2],
        };
        match self.links.get_mut(place) {
            Some(old) => *old = link,
            None => self.links.push(link),
        }
        [0, 1].into_iter().for_each(|side| self.plan_tick((place, side)));
        place
    }

    /// Closes a connection at both sides; another one may take its place.
    pub(super) fn close(&mut self, link: usize) {
        let now = self.now();
        for side in [0, 1] {
            self.links[link].sides[side].fail(err!(Canceled, "closed"), now);
            self.measure((link, side));
        }
        self.links[link].notified = [true; 2];
        self.free.push(link);
    }

    /// Starts a transfer and returns its id. The scenario is notified of its end.
    pub(super) fn transfer(&mut self, end: End, direction: Direction, blocks: Vec<Block>, tag: u64) -> Option<u64> {
        let now = self.now();
        let link = &mut self.links[end.0];
        let (near, far) = (&self.engines[link.engines[end.1]], &self.engines[link.engines[1 - end.1]]);
        let items = blocks.iter().map(|block| {
            let memory = &near.memory[block.near.0];
            let local = LocalSegment { mr: memory.mr, addr: memory.addr() as usize + block.near.1, len: block.len };
            let mut item = far.item(block.far.0).expect("registered");
            (item.addr, item.size) = (item.addr + block.far.1 as u64, block.len as u32);
            (local, item)
        });
        let me = &mut link.sides[end.1];
        let builder = RequestBuilder::new(blocks.len(), &near.registry, far.id, None).expect("builder");
        let Ok(Built::Request(request)) = builder.build(items) else { panic!("a good request") };
        let began = self.fabric.now;
        let started = me.machine.admit(request.segments.len(), request.pairs.iter().copied(), &me.channels);
        let id = match started.and_then(|()| me.machine.start(direction.way(), request, &mut me.channels, now)) {
            Ok(id) => {
                link.open[end.1].push(Open { id, tag, began, direction, blocks });
                Some(id)
            }
            Err(e) => {
                self.happened.push_back(Happened::Ended { tag, took: 0, failed: Some(e) });
                None
            }
        };
        self.poll(end);
        id
    }

    /// Calls the scenario later.
    pub(super) fn call(&mut self, after: u64, token: u64) {
        self.fabric.at(self.fabric.now + after, Event::Call(token));
    }

    /// All NICs of an engine go down, and it does nothing any more.
    pub(super) fn crash(&mut self, engine: usize) {
        self.crashed[engine] = true;
        let width = self.fabric.width();
        self.fabric.nics[engine * width..(engine + 1) * width].iter_mut().for_each(|nic| nic.down = true);
    }

    /// The process of an engine ends: its kernel closes what it had open, and its peers learn of that at once.
    pub(super) fn end(&mut self, engine: usize) {
        self.crashed[engine] = true;
        let now = self.now();
        for place in 0..self.links.len() {
            let link = &mut self.links[place];
            let Some(side) = (0..2).find(|&side| link.engines[side] == engine) else { continue };
            link.net.lock().wires.iter_mut().flatten().for_each(|wire| wire.failed = true);
            link.sides[1 - side].fail(err!(RemoteDisconnect, "the peer has closed the connection"), now);
            self.poll((place, 1 - side));
        }
    }

    /// The most that each engine kept.
    pub(super) fn most(&self) -> &[Held] {
        &self.most
    }

    pub(super) fn polls(&self) -> u64 {
        self.polls
    }

    /// Runs until the scenario is done.
    ///
    /// # Errors
    /// When an invariant is broken, or the scenario is not done within so much virtual time.
    pub(super) fn run(&mut self, scenario: &mut dyn Scenario, within: Duration) -> Result<(), String> {
        let limit = self.fabric.now + within.as_nanos() as u64;
        loop {
            while let Some(what) = self.happened.pop_front() {
                scenario.on(self, what);
            }
            if let Some(broken) = self.broken.take() {
                return Err(broken);
            }
            if scenario.is_done() {
                return self.check();
            }
            let Some(event) = self.fabric.next() else { return Err("nothing will happen any more".to_owned()) };
            if self.fabric.now > limit {
                return Err(format!("not done within {within:?}; {}", self.open()));
            }
            self.handle(event);
        }
    }

    /// Advances the time, with whatever is due in it.
    ///
    /// # Errors
    /// When an invariant is broken.
    pub(super) fn pass(&mut self, time: Duration) -> Result<(), String> {
        let until = self.fabric.now + time.as_nanos() as u64;
        while self.fabric.next_at().is_some_and(|at| at <= until) {
            let Some(event) = self.fabric.next() else { break };
            self.handle(event);
        }
        self.fabric.now = until;
        self.happened.clear();
        self.broken.take().map_or(Ok(()), Err)
    }

    /// Says which transfers have not ended.
    fn open(&self) -> String {
        let open = |link: &Link| [0, 1].map(|side| link.open[side].iter().map(|open| open.tag).collect::<Vec<_>>());
        let all: Vec<_> = self.links.iter().filter(|link| link.open.iter().any(|open| !open.is_empty())).collect();
        let first = all.first().map(|link| (link.engines, open(link), [0, 1].map(|side| link.sides[side].machine.dead())));
        format!("{} connections have open transfers; the first (engines, tags, ends): {first:?}", all.len())
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Left(flow, burst, way) => {
                if self.fabric.left(flow, burst, way) {
                    self.serve(way[0] as usize);
                }
            }
            Event::Room(nic) => {
                if let Some(from) = self.fabric.room(nic) {
                    self.serve(from);
                }
            }
            Event::Arrived(flow, burst, got) => self.arrived(flow, burst, got),
            Event::Acknowledged(flow, burst, got) => {
                let (packet, now) = (self.fabric.spec.packet, self.fabric.now);
                let known = self.with(flow, |stream, _| stream.sender.acknowledged(burst, got, packet, now)).is_some();
                let (link, _, channel, side) = parts_of(flow);
                if known {
                    let took = match channel == self.channels() {
                        true => self.links[link].sides[side].unheard() > 0,
                        false => self.links[link].net.lock().wire(channel, side).pump(now),
                    };
                    if took {
                        self.poll((link, side));
                    }
                    self.want(flow);
                }
            }
            Event::Timer(flow) => self.timer(flow),
            Event::Tick(flow) => {
                let (link, generation, _, side) = parts_of(flow);
                let (now, link_) = (self.fabric.now, &mut self.links[link]);
                if link_.generation == generation && link_.ticks[side] == now {
                    link_.ticks[side] = u64::MAX;
                    self.poll((link, side));
                }
            }
            Event::Retry(flow) => {
                let (link, generation, ..) = parts_of(flow);
                if self.links[link].generation == generation {
                    self.links[link].retries = false;
                    self.restore(link);
                }
            }
            Event::Call(token) => self.happened.push_back(Happened::Called(token)),
        }
    }

    /// Another attempt follows later.
    fn retry(&mut self, place: usize) {
        if !std::mem::replace(&mut self.links[place].retries, true) {
            let flow = flow_of(place, self.links[place].generation, 0, 0, 0);
            self.fabric.at(self.fabric.now + RETRY, Event::Retry(flow));
        }
    }

    /// Sets lost channels up again whose NICs are up at both ends.
    fn restore(&mut self, place: usize) {
        let (now, connector) = (self.now(), &self.links[place].sides[0].machine);
        let lost = |&channel: &u16| connector.dead().is_none() && connector.is_lost(channel);
        let (up, down): (Vec<u16>, Vec<u16>) = (0..self.channels() as u16).filter(lost).partition(|&channel| {
            let (from, to) = self.way(self.flow((place, 0), channel.into()));
            !self.fabric.nics[from].down && !self.fabric.nics[to].down
        });
        let refused = !up.is_empty() && self.links[place].restore(&up, now).is_err();
        if refused || !down.is_empty() {
            self.retry(place);
        }
        [0, 1].into_iter().for_each(|side| self.poll((place, side)));
    }

    fn flow(&self, (place, side): End, channel: usize) -> Flow {
        let link = &self.links[place];
        let wires = if channel == self.channels() { 0 } else { link.net.lock().wires_of(channel, side) };
        flow_of(place, link.generation, channel, wires, side)
    }

    /// The NICs that a flow leaves and reaches.
    fn way(&self, flow: Flow) -> (usize, usize) {
        let (link, _, channel, side) = parts_of(flow);
        let (width, Spec { data, control, .. }) = (self.fabric.width(), self.fabric.spec);
        let nic = if channel == self.channels() { control } else { channel % data };
        let engines = self.links[link].engines;
        (engines[side] * width + nic, engines[1 - side] * width + nic)
    }

    /// Looks at the stream of a flow, and how much of it the receiver has read; `None` if it is closed.
    fn with<R>(&mut self, flow: Flow, look: impl FnOnce(&mut Stream, u64) -> R) -> Option<R> {
        let (link, generation, channel, side) = parts_of(flow);
        let channels = self.channels();
        let link = self.links.get_mut(link).filter(|link| link.generation == generation)?;
        if channel == channels {
            let read = link.control[side].receiver.got();
            return Some(look(&mut link.control[side], read));
        }
        let mut net = link.net.lock();
        if net.wires_of(channel, side) != wires_of(flow) {
            return None;
        }
        let wire = net.wire(channel, side);
        let read = wire.read();
        if wire.failed {
            return None;
        }
        wire.stream.as_deref_mut().map(|stream| look(stream, read))
    }

    /// A flow may have something to send.
    fn want(&mut self, flow: Flow) {
        if self.with(flow, |stream, _| std::mem::replace(&mut stream.queued, true)) == Some(false) {
            let (from, _) = self.way(flow);
            if self.fabric.wants(from, flow) {
                self.serve(from);
            }
        }
    }

    /// A NIC that is free sends the next burst.
    fn serve(&mut self, nic: usize) {
        let (most, packet, now) = (self.fabric.most(nic), self.fabric.spec.packet, self.fabric.now);
        while let Some(flow) = self.fabric.turn(nic) {
            let burst = self.with(flow, |stream, read| {
                let burst = stream.sender.burst(read, most, packet, now);
                stream.queued = burst.is_some();
                let timed = stream.timed;
                stream.timed |= burst.is_some();
                burst.map(|burst| (burst, stream.sender.deadline().filter(|_| !timed)))
            });
            if let Some((burst, deadline)) = burst.flatten() {
                let (from, to) = self.way(flow);
                self.fabric.send(from, to, flow, burst);
                self.fabric.wants(from, flow);
                if let Some(at) = deadline {
                    self.fabric.at(at, Event::Timer(flow));
                }
                return;
            }
        }
    }

    fn timer(&mut self, flow: Flow) {
        let (link, generation, ..) = parts_of(flow);
        if self.links[link].generation != generation {
            return;
        }
        let (from, to) = self.way(flow);
        let (oldest, packet, now) = (self.fabric.oldest(from, to), self.fabric.spec.packet, self.fabric.now);
        let next = self.with(flow, |stream, _| {
            let fires = stream.sender.deadline().is_some_and(|deadline| deadline <= now);
            if fires {
                stream.sender.time_out(oldest, packet, now);
            }
            let next = stream.sender.deadline();
            stream.timed = next.is_some();
            (fires, next)
        });
        let Some((fires, next)) = next else { return };
        if let Some(at) = next {
            self.fabric.at(at, Event::Timer(flow));
        }
        if fires {
            self.want(flow);
        }
    }

    fn arrived(&mut self, flow: Flow, burst: super::tcp::Burst, got: u64) {
        let (from, to) = {
            let (link, generation, ..) = parts_of(flow);
            if self.links[link].generation != generation {
                return;
            }
            self.way(flow)
        };
        let (link, _, channel, side) = parts_of(flow);
        let stalled = channel < self.channels() && self.links[link].net.lock().wire(channel, side).stalled;
        if stalled || self.fabric.nics[from].down || self.fabric.nics[to].down {
            return;
        }
        let Some(fresh) = self.with(flow, |stream, _| {
            let before = stream.receiver.got();
            stream.receiver.arrived(burst.seq, got);
            stream.receiver.got() - before
        }) else {
            return;
        };
        let at = self.fabric.now + self.fabric.spec.latency;
        self.fabric.at(at, Event::Acknowledged(flow, burst, got));
        if channel == self.channels() {
            let (now, link_) = (self.now(), &mut self.links[link]);
            let fresh = (fresh as usize).min(link_.sides[side].out.len());
            let bytes: Vec<u8> = link_.sides[side].out.drain(..fresh).collect();
            if !bytes.is_empty() && !self.crashed[link_.engines[1 - side]] {
                link_.sides[1 - side].receive(&bytes, now);
                self.poll((link, 1 - side));
            }
        } else if fresh > 0 && self.links[link].net.lock().deliver(channel, side) {
            self.poll((link, 1 - side));
        }
    }

    /// Drives a side until nothing changes, and hands what it sends to the sockets.
    pub(super) fn poll(&mut self, (place, side): End) {
        let (now, ns, channels) = (self.now(), self.fabric.now, self.channels());
        let link = &mut self.links[place];
        if self.crashed[link.engines[side]] {
            return;
        }
        let mut arrives = false;
        loop {
            link.sides[side].poll(now);
            // An engine counts them.
            link.sides[side].machine.take_timed().for_each(drop);
            let mut net = link.net.lock();
            let mut again = false;
            for channel in 0..channels {
                again |= net.wire(channel, side).pump(ns);
                while net.deliver(channel, 1 - side) {
                    (again, arrives) = (true, true);
                }
            }
            if !again || link.sides[side].machine.dead().is_some() {
                break;
            }
        }
        let sender = &mut link.control[side].sender;
        let fresh = link.sides[side].out.len() as u64 - (sender.offered() - link.control[side].receiver.got());
        if fresh > 0 {
            sender.offer(fresh, ns);
        }
        for channel in 0..=channels {
            self.want(self.flow((place, side), channel));
            if arrives {
                self.want(self.flow((place, 1 - side), channel));
            }
        }
        if side == 0 && self.links[place].sides[0].machine.has_lost() {
            self.retry(place);
        }
        self.look((place, side));
        self.plan_tick((place, side));
        self.measure((place, side));
        self.polls += 1;
        if self.polls % AUDIT == 0 {
            let audit = self.links[place].sides[side].machine.audit();
            self.note(audit.map_err(|e| format!("engine {}: {e}", self.links[place].engines[side])));
        }
    }

    fn note(&mut self, result: Result<(), String>) {
        if let Err(e) = result {
            self.broken.get_or_insert(e);
        }
    }

    fn plan_tick(&mut self, (place, side): End) {
        let link = &mut self.links[place];
        if link.sides[side].machine.dead().is_some() {
            return;
        }
        let due = link.sides[side].machine.next_tick().saturating_duration_since(self.start).as_nanos() as u64;
        let due = due.max(self.fabric.now);
        if due < link.ticks[side] {
            link.ticks[side] = due;
            let flow = flow_of(place, link.generation, 0, 0, side);
            self.fabric.at(due, Event::Tick(flow));
        }
    }

    /// Finds transfers that have ended.
    fn look(&mut self, end: End) {
        let (place, side) = end;
        let link = &mut self.links[place];
        let dead = link.sides[side].machine.dead().is_some();
        if dead && !std::mem::replace(&mut link.notified[side], true) {
            self.happened.push_back(Happened::Lost(end));
        }
        let ended = link.sides[side].machine.ended();
        if std::mem::replace(&mut link.ended[side], ended) == ended && !dead {
            return;
        }
        let mut at = 0;
        while at < self.links[place].open[side].len() {
            let link = &mut self.links[place];
            let failed = match link.sides[side].machine.lookup(link.open[side][at].id) {
                Ok(TransferState { complete: false, .. }) => {
                    at += 1;
                    continue;
                }
                Ok(_) => None,
                Err(e) => Some(e),
            };
            let open = link.open[side].swap_remove(at);
            let took = self.fabric.now - open.began;
            let proven = match &failed {
                None => self.prove(end, &open),
                Some(e) if matches!(e.kind(), ErrorKind::Protocol | ErrorKind::Internal) => {
                    Err(format!("a violation between two honest engines: {e}"))
                }
                Some(_) => Ok(()),
            };
            self.note(proven);
            self.happened.push_back(Happened::Ended { tag: open.tag, took, failed });
        }
    }

    /// I1: every byte of a transfer that is OK is in place.
    fn prove(&mut self, (place, side): End, open: &Open) -> Result<(), String> {
        let engines = self.links[place].engines;
        let (here, there) = (engines[side], engines[1 - side]);
        for block in &open.blocks {
            let (near, far) = ((here, block.near), (there, block.far));
            let ((from, source), (to, target)) = if open.direction == Direction::Write { (near, far) } else { (far, near) };
            let (source_memory, target_memory) = (&self.engines[from].memory[source.0], &self.engines[to].memory[target.0]);
            let right = match source_memory.bytes.is_empty() {
                true => {
                    let [target, source] =
                        [(target_memory, target.1), (source_memory, source.1)].map(|(m, at)| m.addr() + at as u64);
                    // Described memory.
                    self.positions.lock().holds(target, block.len as u64, source)
                }
                false => target_memory.now()[target.1..][..block.len] == source_memory.now()[source.1..][..block.len],
            };
            if !right {
                return Err(format!(
                    "transfer {} from engine {from} to engine {to} is OK with wrong bytes in {block:?}",
                    open.tag
                ));
            }
        }
        Ok(())
    }

    /// Counts what a side keeps.
    fn measure(&mut self, (place, side): End) {
        let link = &mut self.links[place];
        let me = &link.sides[side];
        let held = match me.machine.dead() {
            Some(_) => Held::default(),
            None => Held {
                frames: me.machine.unsent() + me.sent.bytes(),
                chunks: me.machine.state.incoming.outstanding(),
                transfers: me.machine.in_flight(),
            },
        };
        let before = std::mem::replace(&mut link.held[side], held);
        let engine = link.engines[side];
        let (all, most) = (&mut self.held[engine], &mut self.most[engine]);
        all.frames = all.frames + held.frames - before.frames;
        all.chunks = all.chunks + held.chunks - before.chunks;
        all.transfers = all.transfers + held.transfers - before.transfers;
        most.frames = most.frames.max(all.frames);
        most.chunks = most.chunks.max(all.chunks);
        most.transfers = most.transfers.max(all.transfers);
    }

    /// What holds at any time.
    pub(super) fn check(&mut self) -> Result<(), String> {
        for link in &self.links {
            for (side, own) in link.sides.iter().enumerate().filter(|(side, _)| !self.crashed[link.engines[*side]]) {
                let engine = link.engines[side];
                own.machine.audit().map_err(|e| format!("engine {engine}: {e}"))?;
                if own.machine.dead().is_some() && !link.net.lock().closed[side] {
                    return Err(format!("engine {engine} has ended a connection, but its channels are open"));
                }
                if own.machine.dead().is_some() && own.machine.in_flight() > 0 {
                    return Err(format!("engine {engine} has ended a connection, but transfers are in flight"));
                }
            }
        }
        for (number, engine) in self.engines.iter().enumerate() {
            if let Some(memory) = engine.written_after_free() {
                return Err(format!("memory {memory} of engine {number} was written after it was given back"));
            }
        }
        match self.positions.lock().stray() {
            Some(stray) => Err(stray.to_owned()),
            None => Ok(()),
        }
    }

    /// When all transfers have ended: engines that live keep nothing of them, and give their memory back. `lossless`: no connection may
    /// have ended.
    #[cfg(test)]
    pub(super) fn settle(&mut self, lossless: bool) -> Result<(), String> {
        // The owner of memory that was read hears at the reader's next look that it is in place.
        self.pass(Duration::from_millis(200))?;
        self.check()?;
        for link in &self.links {
            for (side, own) in link.sides.iter().enumerate().filter(|(side, _)| !self.crashed[link.engines[*side]]) {
                let engine = link.engines[side];
                match own.machine.dead() {
                    Some(e) if lossless && e.kind() != ErrorKind::Canceled => {
                        return Err(format!("engine {engine} lost a connection without a fault: {e}"));
                    }
                    Some(_) => continue,
                    None => {}
                }
                if own.channels.under_way() > 0 || !own.machine.is_idle() {
                    let bytes = own.channels.under_way();
                    return Err(format!(
                        "engine {engine} keeps state of transfers that have ended, and counts {bytes} bytes in flight"
                    ));
                }
            }
        }
        for (number, engine) in self.engines.iter_mut().enumerate().filter(|(number, _)| !self.crashed[*number]) {
            (0..engine.memory.len()).for_each(|index| engine.deregister(index));
            engine.reclaim();
            if let Some(memory) = engine.memory.iter().position(|memory| !memory.freed) {
                return Err(format!("engine {number} still uses memory {memory} although all transfers have ended"));
            }
            let used = engine.pool.used();
            if used != (0, 0) {
                return Err(format!("engine {number} still counts {used:?} bytes and transfers of its peers"));
            }
            let mut positions = self.positions.lock();
            engine.memory.iter().for_each(|memory| positions.release(memory.addr()));
        }
        // Nothing is written any more.
        self.pass(Duration::from_millis(500))?;
        self.check()
    }
}
