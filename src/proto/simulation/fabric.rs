//! The network between engines in virtual time: NICs that send one burst after the other, in turns for the connections that have
//! something to send, and a switch with a queue in front of each NIC, which drops what does not fit, or holds up the senders. Knows nothing of engines and chunks.

use super::tcp::Burst;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// Identifies a direction of a TCP connection.
pub(super) type Flow = u64;

/// What the network is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spec {
    /// Bytes a second of each NIC of an engine. So many of the first ones carry data, and one the control connections.
    pub rates: &'static [u64],
    pub data: usize,
    pub control: usize,
    /// Of a packet, in bytes; of the way from NIC to NIC, in nanoseconds; of the queue in front of a NIC, in bytes.
    pub packet: u64,
    pub latency: u64,
    pub queue: u64,
    /// A queue that is full holds up the NICs that send to it, instead of dropping what does not fit.
    pub pauses: bool,
}

impl Spec {
    /// One NIC, for a simulation whose script moves the messages.
    pub(super) const NONE: Spec = Spec { rates: &[1], data: 1, control: 0, packet: 1448, latency: 0, queue: 0, pauses: false };
}

/// Most bytes that leave together, and the time that they take at most.
const BURST: u64 = 64 << 10;
const BURST_NS: u64 = 100_000;
/// A queue holds at most what its NIC moves in this time.
const QUEUE_NS: u64 = 50_000_000;
const SECOND: u64 = 1_000_000_000;

/// Something that happens at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A NIC has sent a burst to another.
    Left(Flow, Burst, [u32; 2]),
    /// The queue in front of a NIC has room for the first burst that it holds up.
    Room(usize),
    /// So many bytes of a burst arrive.
    Arrived(Flow, Burst, u64),
    Acknowledged(Flow, Burst, u64),
    /// The timer of a flow is due.
    Timer(Flow),
    /// A side asked for a tick.
    Tick(Flow),
    /// Lost channels of a connection are to be set up again.
    Retry(Flow),
    /// The scenario asked for a call.
    Call(u64),
}

struct Due {
    at: u64,
    number: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.number == other.number
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A NIC, and the queue of the switch in front of it.
pub(super) struct Nic {
    /// Bytes a second, both ways.
    pub rate: u64,
    /// Nothing leaves it or reaches it.
    pub down: bool,
    sending: bool,
    /// Connections that may have something to send.
    turns: VecDeque<Flow>,
    /// When the queue in front of it is empty, and what it holds up.
    drained: u64,
    held_up: VecDeque<(Flow, Burst, [u32; 2])>,
    /// Bytes that have passed the queue, the most that it held, and those that it dropped.
    pub passed: u64,
    pub longest: u64,
    pub dropped: u64,
}

impl Nic {
    fn time(&self, bytes: u64) -> u64 {
        (u128::from(bytes) * u128::from(SECOND) / u128::from(self.rate.max(1))) as u64
    }

    fn bytes(&self, time: u64) -> u64 {
        (u128::from(time) * u128::from(self.rate) / u128::from(SECOND)) as u64
    }
}

/// The network.
pub(super) struct Fabric {
    pub spec: Spec,
    pub now: u64,
    pub nics: Vec<Nic>,
    due: BinaryHeap<Reverse<Due>>,
    events: u64,
}

impl Fabric {
    pub(super) fn new(spec: Spec, engines: usize) -> Fabric {
        let nic = |&rate: &u64| Nic {
            rate,
            down: false,
            sending: false,
            turns: VecDeque::new(),
            drained: 0,
            held_up: VecDeque::new(),
            passed: 0,
            longest: 0,
            dropped: 0,
        };
        let nics = (0..engines).flat_map(|_| spec.rates.iter().map(nic)).collect();
        Fabric { spec, now: 0, nics, due: BinaryHeap::new(), events: 0 }
    }

    /// NICs of one engine.
    pub(super) fn width(&self) -> usize {
        self.spec.rates.len()
    }

    /// A NIC is so fast from now on. What the queue in front of it holds passes at that rate.
    pub(super) fn set_rate(&mut self, nic: usize, rate: u64) {
        let (now, nic) = (self.now, &mut self.nics[nic]);
        let held = nic.bytes(nic.drained.saturating_sub(now));
        nic.rate = rate;
        nic.drained = now + nic.time(held);
    }

    /// How many events there were.
    pub(super) fn events(&self) -> u64 {
        self.events
    }

    pub(super) fn at(&mut self, at: u64, event: Event) {
        self.events += 1;
        self.due.push(Reverse(Due { at: at.max(self.now), number: self.events, event }));
    }

    /// When the next event is due.
    pub(super) fn next_at(&self) -> Option<u64> {
        self.due.peek().map(|Reverse(due)| due.at)
    }

    /// The next event; the time advances to it.
    pub(super) fn next(&mut self) -> Option<Event> {
        let Reverse(due) = self.due.pop()?;
        self.now = due.at;
        Some(due.event)
    }

    /// A connection has something to send. Returns whether the NIC is free, so that it sends at once.
    pub(super) fn wants(&mut self, nic: usize, flow: Flow) -> bool {
        let nic = &mut self.nics[nic];
        nic.turns.push_back(flow);
        !nic.sending
    }

    /// The connection whose turn it is on a NIC that has sent its burst.
    pub(super) fn turn(&mut self, nic: usize) -> Option<Flow> {
        self.nics[nic].sending = false;
        self.nics[nic].turns.pop_front()
    }

    /// Most bytes that leave a NIC together.
    pub(super) fn most(&self, nic: usize) -> u64 {
        let packet = self.spec.packet;
        (self.nics[nic].bytes(BURST_NS).min(BURST) / packet * packet).max(packet)
    }

    /// The longest time that the network keeps a burst to a NIC, and its acknowledgement.
    pub(super) fn oldest(&self, from: usize, to: usize) -> u64 {
        // A pause has no bound.
        let pause = if self.spec.pauses { SECOND } else { 0 };
        pause
            + 2 * self.spec.latency
            + self.longest(to).1
            + self.nics[to].time(self.most(from))
            + self.nics[from].time(self.most(from))
            + 1000
    }

    /// Most bytes in the queue in front of a NIC, and the time that they take.
    fn longest(&self, nic: usize) -> (u64, u64) {
        let nic = &self.nics[nic];
        let bytes = self.spec.queue.min(nic.bytes(QUEUE_NS).max(4 * self.spec.packet));
        (bytes, nic.time(bytes))
    }

    /// A NIC begins to send a burst to another.
    pub(super) fn send(&mut self, from: usize, to: usize, flow: Flow, burst: Burst) {
        self.nics[from].sending = true;
        self.at(self.now + self.nics[from].time(burst.len), Event::Left(flow, burst, [from as u32, to as u32]));
    }

    /// A burst has left a NIC: it passes the queue in front of the other as far as it fits. All ways are equally long, so bursts reach the
    /// queue in the order in which they leave. Returns whether the NIC is free.
    pub(super) fn left(&mut self, flow: Flow, burst: Burst, way: [u32; 2]) -> bool {
        let (to, now) = (way[1] as usize, self.now);
        let (most, _) = self.longest(to);
        let nic = &mut self.nics[to];
        let fits = most.saturating_sub(nic.bytes(nic.drained.saturating_sub(now)));
        if self.spec.pauses && (burst.len > fits || !nic.held_up.is_empty()) {
            nic.held_up.push_back((flow, burst, way));
            if nic.held_up.len() == 1 {
                self.plan_room(to);
            }
            return false;
        }
        let got = if burst.len <= fits { burst.len } else { fits / self.spec.packet * self.spec.packet };
        self.pass(flow, burst, got, way);
        true
    }

    /// The first burst that a queue has held up passes it. Returns the NIC that is free now.
    pub(super) fn room(&mut self, to: usize) -> Option<usize> {
        let (flow, burst, way) = self.nics[to].held_up.pop_front()?;
        self.pass(flow, burst, burst.len, way);
        if !self.nics[to].held_up.is_empty() {
            self.plan_room(to);
        }
        Some(way[0] as usize)
    }

    fn plan_room(&mut self, to: usize) {
        let (most, nic) = (self.longest(to).0, &self.nics[to]);
        let Some((_, first, _)) = nic.held_up.front() else { return };
        let at = nic.drained.saturating_sub(nic.time(most.saturating_sub(first.len)));
        self.at(at, Event::Room(to));
    }

    fn pass(&mut self, flow: Flow, burst: Burst, got: u64, [from, to]: [u32; 2]) {
        let (now, lost) = (self.now, self.nics[from as usize].down || self.nics[to as usize].down);
        let nic = &mut self.nics[to as usize];
        if lost {
            return;
        }
        let held = nic.bytes(nic.drained.saturating_sub(now));
        (nic.passed, nic.dropped, nic.longest) = (nic.passed + got, nic.dropped + burst.len - got, nic.longest.max(held + got));
        if got == 0 {
            return;
        }
        nic.drained = nic.drained.max(now) + nic.time(got);
        let arrives = nic.drained + self.spec.latency;
        self.at(arrives, Event::Arrived(flow, burst, got));
    }
}

#[test]
fn a_queue_passes_what_fits_in_order_and_drops_the_rest() {
    const RATES: &[u64] = &[1_000_000_000];
    let spec = Spec { rates: RATES, data: 1, control: 0, packet: 1000, latency: 5000, queue: 100_000, pauses: false };
    let mut fabric = Fabric::new(spec, 11);
    // Ten NICs send 20,000 bytes each to one, whose queue takes 100,000.
    for from in 0..10 {
        fabric.send(from, 10, from as Flow, Burst { seq: 0, len: 20_000, at: 0 });
    }
    let mut arrived = Vec::new();
    while let Some(event) = fabric.next() {
        match event {
            Event::Arrived(flow, _, got) => arrived.push((flow, got, fabric.now)),
            Event::Left(flow, burst, way) => {
                assert!(fabric.left(flow, burst, way));
                assert!(fabric.turn(way[0] as usize).is_none() && fabric.now == 20_000);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(arrived.iter().map(|a| a.1).sum::<u64>(), 100_000);
    assert_eq!(arrived.iter().map(|a| a.0).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!((arrived[0].2, arrived[4].2), (20_000 + 20_000 + 5000, 20_000 + 100_000 + 5000));
    let nic = &fabric.nics[10];
    assert_eq!((nic.passed, nic.dropped, nic.longest), (100_000, 100_000, 100_000));
}

#[test]
fn a_queue_that_pauses_drops_nothing_and_holds_up_the_senders() {
    const RATES: &[u64] = &[1_000_000_000];
    let spec = Spec { rates: RATES, data: 1, control: 0, packet: 1000, latency: 5000, queue: 100_000, pauses: true };
    let mut fabric = Fabric::new(spec, 11);
    for from in 0..10 {
        fabric.send(from, 10, from as Flow, Burst { seq: 0, len: 20_000, at: 0 });
    }
    let (mut arrived, mut free) = (Vec::new(), Vec::new());
    while let Some(event) = fabric.next() {
        match event {
            Event::Arrived(flow, _, got) => arrived.push((flow, got, fabric.now)),
            Event::Left(flow, burst, way) => free.extend(fabric.left(flow, burst, way).then_some((flow, fabric.now))),
            Event::Room(nic) => free.extend(fabric.room(nic).map(|from| (from as Flow, fabric.now))),
            other => panic!("{other:?}"),
        }
    }
    let at = |flow: u64| 20_000 + 20_000 * (flow + 1) + 5000;
    assert_eq!(arrived, (0..10).map(|flow| (flow, 20_000, at(flow))).collect::<Vec<_>>());
    let freed = |flow: u64| 20_000 + 20_000 * flow.saturating_sub(4);
    assert_eq!(free, (0..10).map(|flow| (flow, freed(flow))).collect::<Vec<_>>());
    assert_eq!((fabric.nics[10].dropped, fabric.nics[10].longest), (0, 100_000));
}
