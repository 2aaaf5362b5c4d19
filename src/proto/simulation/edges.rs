//! Two honest machines in corner cases: more chunks in flight than either wants, and memory that no channel connects.

use super::cluster::Cluster;
use super::fabric::Spec;
use super::net::{Net, SimulatedPath};
use super::world::{Shape, DEVICE_CHANNELS, HOST_CHANNELS};
use crate::channel::device::EmulatedDevice;
use crate::channel::router::Channels;
use crate::direct::Way;
use crate::engine::request::{message, Built, RequestBuilder};
use crate::engine::transfer::LocalSegment;
use crate::proto::TransferState;
use crate::status::ErrorKind;
use crate::types::{Place, Segment};
use std::time::{Duration, Instant};

const CHANNELS: usize = DEVICE_CHANNELS + HOST_CHANNELS;

struct Both {
    cluster: Cluster,
    now: Instant,
}

impl Both {
    fn new() -> Both {
        let shape = Shape::of(8192, 0);
        let mut cluster = Cluster::new(2, Spec::NONE, shape);
        cluster.join([0, 1], Net::new(CHANNELS, true), [shape; 2]);
        Both { now: cluster.now(), cluster }
    }

    /// Moves everything until nothing is left but the data that `hold` keeps in flight.
    fn settle(&mut self, hold: bool) {
        loop {
            let mut moved = false;
            for side in [0, 1] {
                self.cluster.links[0].sides[side].poll(self.now);
                self.cluster.links[0].sides[side].flush(self.now);
                let bytes: Vec<u8> = self.cluster.links[0].sides[side].out.drain(..).collect();
                moved |= !bytes.is_empty();
                if !bytes.is_empty() {
                    let now = self.now;
                    self.cluster.links[0].sides[1 - side].receive(&bytes, now);
                }
                let mut net = self.cluster.links[0].net.lock();
                for channel in 0..CHANNELS {
                    for _ in 0..16 {
                        moved |= net.transmit(channel, side);
                        moved |= !hold && net.deliver(channel, side);
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn alive(&self) {
        for side in &self.cluster.links[0].sides {
            assert!(side.machine.alive().is_ok(), "{:?}", side.machine.dead());
        }
    }

    fn outcome(&self, side: usize, id: u64) -> Result<bool, ErrorKind> {
        self.cluster.links[0].sides[side].machine.lookup(id).map(|TransferState { complete, .. }| complete).map_err(|e| e.kind())
    }

    /// A send of some bytes of device memory.
    fn send(&mut self, side: usize, len: usize, place: Place) -> u64 {
        let memory = self.cluster.engines[side].allocate(vec![7; len], place);
        let now = self.now;
        let (me, home) = (&mut self.cluster.links[0].sides[side], &self.cluster.engines[side]);
        let local = LocalSegment { mr: home.memory[memory].mr, addr: home.memory[memory].addr() as usize, len };
        let (segments, uses) = message(std::iter::once(local), &home.registry).expect("own memory");
        me.machine.start_send(segments, uses, &mut me.channels, now)
    }

    fn receive(&mut self, side: usize, len: usize, place: Place) -> u64 {
        let memory = self.cluster.engines[side].allocate(vec![0; len], place);
        let now = self.now;
        let (me, home) = (&mut self.cluster.links[0].sides[side], &self.cluster.engines[side]);
        let region = home.registry.local(home.memory[memory].mr).expect("own memory");
        let segment = Segment { addr: home.memory[memory].addr(), len: len as u64, region: 0, place, peer: Place::HOST };
        me.machine.start_receive(segment, region, &mut me.channels, now)
    }
}

/// A write of `pieces` bytes. Each is a chunk, since they alternate between two devices.
fn tiny_chunks(both: &mut Both, pieces: usize) -> u64 {
    let places = [Place::HOST, Place::gpu(0)];
    let here = places.map(|place| both.cluster.engines[0].allocate(vec![7; pieces], place));
    let there = places.map(|place| both.cluster.engines[1].allocate(vec![0; pieces], place));
    let items = there.map(|memory| both.cluster.engines[1].item(memory).expect("registered"));
    let now = both.now;
    let peer = both.cluster.engines[1].id;
    let (me, home) = (&mut both.cluster.links[0].sides[0], &both.cluster.engines[0]);
    let segments: Vec<_> = (0..pieces)
        .map(|i| {
            let (memory, mut item) = (&home.memory[here[i % 2]], items[i % 2]);
            item.addr += i as u64;
            item.size = 1;
            (LocalSegment { mr: memory.mr, addr: memory.addr() as usize + i, len: 1 }, item)
        })
        .collect();
    let builder = RequestBuilder::new(pieces, &home.registry, peer, None).expect("builder");
    let Ok(Built::Request(request)) = builder.build(segments.into_iter()) else { panic!("a good request") };
    me.machine.admit(request.segments.len(), request.pairs.iter().copied(), &me.channels).expect("admitted");
    me.machine.start(Way::Out, request, &mut me.channels, now).expect("started")
}

#[test]
fn a_sender_of_tiny_chunks_stays_below_what_its_peer_keeps() {
    let mut both = Both::new();
    // More than either side expects at once, and no data arrives while they are announced.
    let id = tiny_chunks(&mut both, 300_000);
    both.settle(true);
    both.alive();
    assert_eq!(both.outcome(0, id), Ok(false));
    both.settle(false);
    both.alive();
    assert_eq!(both.outcome(0, id), Ok(true));
    assert!(both.cluster.links[0].sides.iter().all(|side| side.machine.is_idle()));
}

#[test]
fn a_stream_goes_on_over_a_lower_route_at_once() {
    let mut both = Both::new();
    tiny_chunks(&mut both, 6);
    let (now, me) = (both.now, &mut both.cluster.links[0].sides[0]);
    me.machine.schedule(&mut me.channels, 100, now).expect("scheduled");
    assert_eq!(me.channels.under_way(), 6);
}

#[test]
fn a_message_that_no_channel_carries_fails_alone_at_both_sides() {
    let mut both = Both::new();
    // The channels for host memory are missing.
    for side in [0, 1] {
        let device = SimulatedPath::new(&both.cluster.links[0].net, side, 0, DEVICE_CHANNELS, true, 4096);
        both.cluster.links[0].sides[side].channels =
            Channels::new(None, vec![Box::new(device)], Some(Box::<EmulatedDevice>::default()));
    }
    both.cluster.links[0].net.lock().open();
    let gpu = Place::gpu(0);
    let good = (both.send(0, 9000, gpu), both.receive(1, 9000, gpu));
    let bad = (both.send(0, 9000, gpu), both.receive(1, 9000, Place::HOST));
    let after = (both.send(0, 9000, gpu), both.receive(1, 9000, gpu));
    both.settle(false);
    both.alive();
    for (send, receive) in [good, after] {
        assert_eq!((both.outcome(0, send), both.outcome(1, receive)), (Ok(true), Ok(true)));
    }
    let unsupported = Err(ErrorKind::Unsupported);
    assert_eq!((both.outcome(0, bad.0), both.outcome(1, bad.1)), (unsupported, unsupported));
    assert!(both.cluster.links[0].sides.iter().all(|side| side.machine.is_idle()));
}

/// How many seconds, at most a thousand, a connection stays open whose peer reads `rate` bytes a second of a notification.
fn read_at(rate: usize) -> (u64, Option<ErrorKind>) {
    let mut both = Both::new();
    let (start, me) = (both.now, &mut both.cluster.links[0].sides[0]);
    me.room = 0;
    me.machine.notify(b"name", &[7; 1 << 20], start);
    for second in 1..1000 {
        let now = start + Duration::from_secs(second);
        // The peer's heartbeats still arrive.
        me.machine.on_received(1, 0, now);
        me.room += rate;
        me.flush(now);
        me.poll(now);
        if let Some(e) = me.machine.dead() {
            return (second, Some(e.kind()));
        }
    }
    (1000, None)
}

#[test]
fn a_peer_that_reads_a_notification_byte_by_byte_loses_the_connection() {
    for rate in [0, 1, 1000] {
        let (lasted, end) = read_at(rate);
        assert!(lasted <= 40 && end == Some(ErrorKind::TimedOut), "{rate} bytes a second: {lasted} s, {end:?}");
    }
    assert_eq!(read_at(16 << 10), (1000, None), "slow and steady");
}
