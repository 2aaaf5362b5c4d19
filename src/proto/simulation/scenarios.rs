//! What many engines do at once: incast, all to all, KV caches from prefill to decode, and failures in the middle. Each scenario ends with
//! every byte proven, every invariant checked, equals served alike, and what an engine keeps below a bound. A row says how fast it was, in
//! virtual time.
//!
//! ```text
//! cargo test --release -p uccl-tcpx --lib simulation::scenarios -- --nocapture                                # 64 engines
//! cargo test --release -p uccl-tcpx --lib simulation::scenarios -- --nocapture --ignored --test-threads 1    # 1,000 engines
//! ```

use super::cluster::{Block, Cluster, End, Happened, Held, Scenario};
use super::fabric::Spec;
use super::world::Shape;
use crate::engine::transfer::Direction;
use crate::types::Place;
use std::time::{Duration, Instant};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const MS: u64 = 1_000_000;
/// A host with four NICs of 200 Gbit/s for data and one of 100 Gbit/s beside them.
const RATES: &[u64] = &[25_000_000_000, 25_000_000_000, 25_000_000_000, 25_000_000_000, 12_500_000_000];
const SPEC: Spec = Spec { rates: RATES, packet: 8192, latency: 10_000, queue: 4 << 20 };
/// A small operation: below what travels in a control message.
const SMALL: usize = 4 * KIB;
/// The pause of a client between two small operations.
const THINKS: u64 = MS / 2;

fn shape() -> Shape {
    let (transfer_timeout, peer_timeout) = (Duration::from_secs(4), Duration::from_secs(3));
    Shape { device: 0, host: 4, chunk_bytes: 512 * KIB, eager_bytes: 8 * KIB, transfer_timeout, peer_timeout }
}

/// What breaks.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// A host is gone without a word.
    Crash(usize),
    /// A NIC of an engine goes down, or is as slow as this.
    Down(usize, usize),
    Slow(usize, usize, u64),
}

/// A transfer that the plan starts.
struct Planned {
    at: u64,
    end: End,
    direction: Direction,
    blocks: Vec<Block>,
    /// Equals are compared by this number.
    group: usize,
    took: Option<u64>,
    failed: bool,
}

/// A client that writes a few bytes again and again, while others are busy.
struct Client {
    end: End,
    near: usize,
    far: usize,
    open: bool,
    count: u8,
}

/// Transfers with the times at which they start, clients beside them, and faults.
#[derive(Default)]
struct Plan {
    planned: Vec<Planned>,
    clients: Vec<Client>,
    faults: Vec<(u64, Fault)>,
    left: usize,
    small: Vec<u64>,
    lost: Vec<End>,
}

/// Tokens and tags: transfers, clients, faults.
const CLIENT: u64 = 1 << 32;
const FAULT: u64 = 1 << 33;

impl Plan {
    fn write(&mut self, at: u64, end: End, blocks: Vec<Block>, group: usize) {
        self.add(at, end, Direction::Write, blocks, group);
    }

    fn add(&mut self, at: u64, end: End, direction: Direction, blocks: Vec<Block>, group: usize) {
        self.planned.push(Planned { at, end, direction, blocks, group, took: None, failed: false });
    }

    fn client(&mut self, cluster: &mut Cluster, end: End) {
        let engines = cluster.links[end.0].engines;
        let near = cluster.engines[engines[end.1]].allocate(vec![0; SMALL], Place::HOST);
        let far = cluster.engines[engines[1 - end.1]].allocate(vec![0; SMALL], Place::HOST);
        self.clients.push(Client { end, near, far, open: false, count: 0 });
    }

    /// Runs all of it, and returns the virtual time.
    fn run(&mut self, cluster: &mut Cluster, within: Duration) -> Result<u64, String> {
        let began = cluster.fabric.now;
        self.left = self.planned.len();
        for (number, planned) in self.planned.iter().enumerate() {
            cluster.call(planned.at, number as u64);
        }
        for number in 0..self.clients.len() {
            // Not all in the same moment.
            cluster.call(number as u64 * THINKS / self.clients.len() as u64, CLIENT + number as u64);
        }
        for (number, (at, _)) in self.faults.iter().enumerate() {
            cluster.call(*at, FAULT + number as u64);
        }
        cluster.run(self, within)?;
        Ok(cluster.fabric.now - began)
    }

    fn think(&mut self, cluster: &mut Cluster, number: usize) {
        if self.left == 0 {
            return;
        }
        let client = &mut self.clients[number];
        let (place, side) = client.end;
        let link = &cluster.links[place];
        if cluster.crashed[link.engines[side]] || link.sides[side].machine.dead().is_some() {
            return;
        }
        (client.open, client.count) = (true, client.count.wrapping_add(1));
        let (near, far, engine) = (client.near, client.far, link.engines[side]);
        cluster.engines[engine].memory[near].bytes.fill(client.count);
        let block = Block { near: (near, 0), far: (far, 0), len: SMALL };
        cluster.transfer((place, side), Direction::Write, vec![block], CLIENT + number as u64);
    }

    fn goodputs(&self) -> Vec<f64> {
        let groups = self.planned.iter().map(|planned| planned.group + 1).max().unwrap_or(0);
        let mut all = vec![(0usize, 0u64, u64::MAX); groups];
        for planned in self.planned.iter().filter(|planned| !planned.failed) {
            let (bytes, end, begin) = &mut all[planned.group];
            *bytes += planned.blocks.iter().map(|block| block.len).sum::<usize>();
            *end = (*end).max(planned.at + planned.took.unwrap_or(0));
            *begin = (*begin).min(planned.at);
        }
        all.into_iter().filter(|all| all.0 > 0).map(|(bytes, end, begin)| bytes as f64 / (end - begin) as f64).collect()
    }
}

impl Scenario for Plan {
    fn on(&mut self, cluster: &mut Cluster, what: Happened) {
        match what {
            Happened::Called(token) if token >= FAULT => match self.faults[(token - FAULT) as usize].1 {
                Fault::Crash(engine) => {
                    cluster.crash(engine);
                    // What it was about to do is not awaited.
                    for planned in self.planned.iter_mut().filter(|planned| planned.took.is_none()) {
                        if cluster.links[planned.end.0].engines[planned.end.1] == engine {
                            (planned.failed, planned.took) = (true, Some(0));
                            self.left -= 1;
                        }
                    }
                    for client in &mut self.clients {
                        client.open &= cluster.links[client.end.0].engines[client.end.1] != engine;
                    }
                }
                Fault::Down(engine, nic) => {
                    let nic = engine * cluster.fabric.width() + nic;
                    cluster.fabric.nics[nic].down = true;
                }
                Fault::Slow(engine, nic, rate) => {
                    let nic = engine * cluster.fabric.width() + nic;
                    cluster.fabric.nics[nic].rate = rate;
                }
            },
            Happened::Called(token) if token >= CLIENT => self.think(cluster, (token - CLIENT) as usize),
            Happened::Called(token) => {
                let planned = &self.planned[token as usize];
                if planned.took.is_none() {
                    cluster.transfer(planned.end, planned.direction, planned.blocks.clone(), token);
                }
            }
            Happened::Ended { tag, took, failed, .. } if tag >= CLIENT => {
                let client = &mut self.clients[(tag - CLIENT) as usize];
                client.open = false;
                if failed.is_none() {
                    self.small.push(took);
                    cluster.call(THINKS, tag);
                }
            }
            Happened::Ended { tag, took, failed, .. } => {
                let planned = &mut self.planned[tag as usize];
                assert!(planned.took.is_none(), "transfer {tag} ends twice");
                (planned.took, planned.failed) = (Some(took), failed.is_some());
                self.left -= 1;
            }
            Happened::Lost(end) => self.lost.push(end),
        }
    }

    fn is_done(&self) -> bool {
        self.left == 0 && self.clients.iter().all(|client| !client.open)
    }
}

/// Jain's index: 1 if all are equal, 1/n if one has everything.
fn jain(all: &[f64]) -> f64 {
    let (sum, squares) = all.iter().fold((0.0, 0.0), |(a, b), x| (a + x, b + x * x));
    sum * sum / (all.len() as f64 * squares)
}

fn part(sorted: &[u64], part: f64) -> u64 {
    sorted.get((sorted.len() as f64 * part) as usize).or(sorted.last()).copied().unwrap_or(0)
}

/// What a run has shown.
struct Row {
    what: &'static str,
    engines: usize,
    bytes: u64,
    time: u64,
    /// Of what the NICs that limit it could move.
    share: f64,
    jain: f64,
    small: [u64; 2],
    most: Held,
    longest: u64,
    dropped: f64,
    seconds: f64,
    events: u64,
    polls: u64,
}

impl Row {
    /// `limit`: bytes a second that the limiting NICs move together.
    fn new(what: &'static str, cluster: &Cluster, plan: &mut Plan, time: u64, limit: f64, began: Instant) -> Row {
        plan.small.sort_unstable();
        let moved = plan.planned.iter().filter(|planned| !planned.failed).flat_map(|planned| &planned.blocks);
        let bytes = moved.map(|block| block.len as u64).sum();
        let nics = &cluster.fabric.nics;
        let (passed, dropped) = nics.iter().fold((0, 0), |(a, b), nic| (a + nic.passed, b + nic.dropped));
        let most = cluster.most().iter().fold(Held::default(), |a, b| Held {
            frames: a.frames.max(b.frames),
            chunks: a.chunks.max(b.chunks),
            transfers: a.transfers.max(b.transfers),
        });
        let row = Row {
            what,
            engines: cluster.engines.len(),
            bytes,
            time,
            share: bytes as f64 * 1e9 / time as f64 / limit,
            jain: jain(&plan.goodputs()),
            small: [part(&plan.small, 0.5), part(&plan.small, 0.99)],
            most,
            longest: nics.iter().map(|nic| nic.longest).max().unwrap_or(0),
            dropped: dropped as f64 / (passed + dropped).max(1) as f64,
            seconds: began.elapsed().as_secs_f64(),
            events: cluster.fabric.events(),
            polls: cluster.polls(),
        };
        println!("{}", row.text());
        row
    }

    fn text(&self) -> String {
        format!(
            "| {} | {} | {:.2} GB | {:.1} ms | {:.0} % | {:.3} | {} / {} us | {} KiB | {} | {} | {} KiB | {:.2} % | {:.1} s, {} events, {} polls |",
            self.what,
            self.engines,
            self.bytes as f64 / 1e9,
            self.time as f64 / 1e6,
            100.0 * self.share,
            self.jain,
            self.small[0] / 1000,
            self.small[1] / 1000,
            self.most.frames / KIB,
            self.most.chunks,
            self.most.transfers,
            self.longest / KIB as u64,
            100.0 * self.dropped,
            self.seconds,
            self.events,
            self.polls
        )
    }
}

/// All engines but one write to that one.
fn incast(engines: usize, bytes: usize) -> Row {
    let began = Instant::now();
    let (mut cluster, mut plan) = (Cluster::new(engines, SPEC, shape()), Plan::default());
    let positions = cluster.positions.clone();
    let target = cluster.engines[0].reserve(&positions, (engines - 1) * bytes);
    for sender in 1..engines {
        let source = cluster.engines[sender].reserve(&positions, bytes);
        let link = cluster.connect([sender, 0]);
        let block = Block { near: (source, 0), far: (target, (sender - 1) * bytes), len: bytes };
        plan.write(0, (link, 0), vec![block], sender - 1);
        plan.client(&mut cluster, (link, 0));
    }
    let time = plan.run(&mut cluster, Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
    assert!(plan.planned.iter().all(|planned| !planned.failed) && plan.lost.is_empty());
    let row = Row::new("incast", &cluster, &mut plan, time, 1e11, began);
    cluster.settle(true).unwrap_or_else(|e| panic!("{e}"));
    row
}

#[test]
fn sixty_four_engines_incast() {
    let row = incast(64, 32 * MIB);
    assert!(row.jain > 0.8, "{}", row.text());
}
