//! One measured row: buffers at client and server, a timed loop, and the check of contents outside the timed part.

use crate::api::{Direction, FifoItem, Link, LocalSegment};
use crate::carried::Carried;
use crate::case::{Case, Op};
use crate::client::{Client, RemoteBuffer};
use crate::error::{Context, Failure, Result};
use crate::fail;
use crate::interval::{Meter, Phase};
use crate::memory::Region;
use crate::pattern::{self, Shape, Side};
use crate::proto::{Reply, Request};
use crate::report::Row;
use crate::stats::{gbytes_per_s, iterations_for, Times};
use crate::{host, out};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// How long the counters may be behind the end of a transfer.
const COUNTED_WITHIN: Duration = Duration::from_millis(100);

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Timed iterations; none: as many as fit `budget`.
    pub iters: Option<u64>,
    /// Untimed iterations before them; none: a few.
    pub warmup: Option<u64>,
    /// Time for the timed iterations of a row, when their number is not given.
    pub budget: Duration,
    /// Check contents.
    pub verify: bool,
    /// Block in the library instead of polling.
    pub wait: bool,
    /// Notifications to send with each batch of iterations; their echoes are checked.
    pub notify: u32,
    /// Measure for this long, whatever the number of iterations.
    pub time: Option<Duration>,
    /// Show progress when standard error is a terminal.
    pub progress: bool,
}

/// What follows a row while a client measures it.
pub struct Watcher<'a> {
    /// Called before the timed part, so that several clients can start it together.
    pub ready: &'a dyn Fn(),
    /// Counts the iterations as those of this client.
    pub meter: Option<(&'a Meter, usize)>,
}

impl Watcher<'_> {
    /// Nothing does.
    pub fn none() -> Watcher<'static> {
        Watcher { ready: &|| (), meter: None }
    }

    fn record(&self, time: Duration) {
        if let Some((meter, client)) = self.meter {
            meter.record(client, time);
        }
    }

    fn enter(&self, phase: Phase) {
        if let Some((meter, client)) = self.meter {
            meter.enter(client, phase);
        }
    }
}

/// A row, and what is behind it.
pub struct Measured {
    /// The row.
    pub row: Row,
    /// The times of its iterations.
    pub times: Times,
    /// What carried its bytes.
    pub carried: Carried,
}

/// Merges rows of the same case measured by several clients at once.
pub fn together(all: Vec<Measured>) -> Option<Measured> {
    let clients = all.len() as u32;
    all.into_iter()
        .reduce(|mut sum, one| {
            sum.times.add(&one.times);
            sum.carried.merge(&one.carried);
            sum.row.iters += one.row.iters;
            sum.row.set_rates(sum.row.gbytes_per_s + one.row.gbytes_per_s, sum.row.ops_per_s + one.row.ops_per_s);
            sum.row.gbytes_per_s_median += one.row.gbytes_per_s_median;
            sum.row.verified_bytes += one.row.verified_bytes;
            sum.row.retransmits += one.row.retransmits;
            // Each client reports the time of the whole process.
            sum.row.cpu_s = sum.row.cpu_s.max(one.row.cpu_s);
            sum.row.seconds = sum.row.seconds.max(one.row.seconds);
            sum.row.interrupted |= one.row.interrupted;
            sum
        })
        .map(|mut sum| {
            sum.row.clients = clients;
            sum.row.set_times(&sum.times);
            sum.row.set_path(&sum.carried);
            sum
        })
}

/// A direction, from the client's view.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Write,
    Read,
    Send,
    Receive,
}

impl Way {
    /// The directions of a case.
    fn of(case: &Case) -> &'static [Way] {
        match (case.op, case.bidirectional) {
            (Op::Write, false) => &[Way::Write],
            (Op::Read, false) => &[Way::Read],
            (Op::Write | Op::Read, true) => &[Way::Write, Way::Read],
            (Op::Send, false) => &[Way::Send],
            (Op::Send, true) => &[Way::Receive, Way::Send],
        }
    }

    /// The side whose memory is written.
    fn target(self) -> Side {
        match self {
            Way::Write | Way::Send => Side::Remote,
            Way::Read | Way::Receive => Side::Local,
        }
    }
}

/// One direction: a buffer at each end and the transfers between them.
struct Flow {
    way: Way,
    shape: Shape,
    local: Region,
    remote: RemoteBuffer,
    /// Segments of each transfer in flight.
    slices: Vec<Vec<(LocalSegment, FifoItem)>>,
}

impl Flow {
    fn open(client: &mut Client, way: Way, shape: Shape) -> Result<Flow> {
        let Some(len) = shape.buffer_len() else {
            fail!("{} transfers of {} bytes do not fit 64 bits", shape.inflight, shape.total)
        };
        let whole = Shape { block: shape.total, ..shape };
        let pieces = if way == Way::Receive { whole } else { shape }.pieces().map_err(Failure::new)?;
        let local = Region::new(&client.node, client.memory, len)?;
        let remote = client.open(len)?;
        let slices = (0..u64::from(shape.inflight))
            .map(|k| {
                let base = shape.slice(k);
                let segment = |p: &pattern::Piece| {
                    let mut item = remote.item;
                    item.addr = remote.addr + base + p.remote;
                    item.size = u32::try_from(p.len).unwrap_or(u32::MAX);
                    (local.segment(base + p.local, p.len), item)
                };
                pieces.iter().map(segment).collect()
            })
            .collect();
        Ok(Flow { way, shape, local, remote, slices })
    }

    fn start(&self, client: &Client, slice: usize) -> Result<u64> {
        let segments = &self.slices[slice];
        match self.way {
            Way::Write => client.link.transfer(Direction::Write, segments),
            Way::Read => client.link.transfer(Direction::Read, segments),
            Way::Send => client.link.send(segments.iter().map(|(local, _)| *local)),
            Way::Receive => client.link.recv(segments[0].0),
        }
    }

    /// Fills the source with a fresh pattern and poisons the destination.
    fn arm(&mut self, client: &Client, seed: u64) -> Result<()> {
        let buffer = self.remote.number;
        match self.way.target() {
            Side::Remote => {
                self.local.buffer_mut().fill(seed);
                client.command(&Request::Poison { buffer })
            }
            Side::Local => {
                self.local.buffer_mut().poison();
                client.command(&Request::Fill { buffer, seed })
            }
        }
    }

    /// Compares the whole destination buffer, at the receiver.
    fn check(&self, client: &Client, seed: u64) -> Result<u64> {
        let side = self.way.target();
        let result = match side {
            Side::Local => pattern::compare(&self.local.buffer().contents(), &self.shape, side, seed),
            Side::Remote => match client.ask(&Request::Check { buffer: self.remote.number, seed, shape: self.shape, side })? {
                Reply::Checked { bytes, mismatch: None } => Ok(bytes),
                Reply::Checked { mismatch: Some(mismatch), .. } => Err(mismatch),
                other => fail!("the server answered {other:?} to a request to check a buffer"),
            },
        };
        let receiver = if side == Side::Local { "client" } else { "server" };
        result.map_err(|mismatch| Failure::new(format_args!("WRONG DATA at the {receiver}: {mismatch}")))
    }
}

/// A random seed; it only has to differ each time.
pub fn random_seed() -> Result<u64> {
    getrandom::u64().context("the system provides no random numbers")
}

/// A row in progress.
struct Run<'a> {
    client: &'a Client,
    watcher: &'a Watcher<'a>,
    flows: Vec<Flow>,
    shape: Shape,
    wait: bool,
    ids: Vec<u64>,
}

impl Run<'_> {
    /// One iteration: starts every transfer, returns when all are complete.
    fn once(&mut self) -> Result<Duration> {
        self.ids.clear();
        let started = Instant::now();
        for slice in 0..self.shape.inflight as usize {
            for flow in &self.flows {
                self.ids.push(flow.start(self.client, slice)?);
            }
        }
        for &id in &self.ids {
            if self.wait {
                if !self.client.link.wait(id, None)? {
                    fail!("waiting without a time limit returned before the transfer had ended");
                }
            } else {
                while !self.client.link.poll(id)? {
                    std::hint::spin_loop();
                }
            }
        }
        Ok(started.elapsed())
    }

    /// `count` iterations; with two-sided messages the server takes part.
    fn repeat(&mut self, count: u64, mut each: impl FnMut(Duration)) -> Result<()> {
        let with_way = |way| self.flows.iter().find(|flow| flow.way == way).map(|flow| flow.remote.number);
        let (receive, send) = (with_way(Way::Send), with_way(Way::Receive));
        let two_sided = count > 0 && (receive.is_some() || send.is_some());
        if two_sided {
            self.client.command(&Request::Exchange {
                receive,
                send,
                shape: self.shape,
                messages: count * u64::from(self.shape.inflight),
            })?;
        }
        for _ in 0..count {
            let time = self.once()?;
            self.watcher.record(time);
            each(time);
        }
        if two_sided {
            self.client.finish_exchange()?;
        }
        Ok(())
    }

    /// Up to `count` iterations, in batches between which the user may stop. `one`: the approximate duration of the next.
    fn batches(&mut self, count: u64, mut one: Duration, mut each: impl FnMut(Duration)) -> Result<()> {
        let mut left = count;
        while left > 0 && !out::is_stopping() {
            let (begin, batch) = (Instant::now(), batch(one, left));
            self.repeat(batch, &mut each)?;
            one = begin.elapsed().div_f64(batch as f64);
            left -= batch;
        }
        Ok(())
    }

    /// Untimed iterations; returns the duration of the last one.
    fn warm_up(&mut self, options: &Options) -> Result<Duration> {
        let mut last = Duration::ZERO;
        let first = options.warmup.unwrap_or(5).max(u64::from(options.iters.is_none()));
        self.batches(first, Duration::from_secs(1), |t| last = t)?;
        if options.warmup.is_none() {
            // Small transfers need more than a few iterations until caches, windows and clock rates have settled.
            let more = iterations_for(options.budget.as_secs_f64() * 1e5, last.as_secs_f64() * 1e6).min(1000) - 10;
            self.batches(more, last, |t| last = t)?;
        }
        Ok(last)
    }

    /// One seed per direction.
    fn fresh_seeds(&self) -> Result<Vec<u64>> {
        self.flows.iter().map(|_| random_seed()).collect()
    }

    fn arm(&mut self, seeds: &[u64]) -> Result<()> {
        let client = self.client;
        self.flows.iter_mut().zip(seeds).try_for_each(|(flow, &seed)| flow.arm(client, seed))
    }

    fn check(&self, seeds: &[u64]) -> Result<u64> {
        self.flows.iter().zip(seeds).map(|(flow, &seed)| flow.check(self.client, seed)).sum()
    }

    /// Checks the result of the timed iterations, then of a single one into poisoned memory: stale data cannot pass for new.
    /// Returns the bytes checked.
    fn verify(&mut self, seeds: &[u64]) -> Result<u64> {
        let checked = self.check(seeds)?;
        let seeds = self.fresh_seeds()?;
        self.arm(&seeds)?;
        self.repeat(1, |_| ())?;
        Ok(checked + self.check(&seeds)?)
    }
}

/// Measures one row.
pub fn measure(client: &mut Client, case: &Case, options: &Options, watcher: &Watcher<'_>) -> Result<Measured> {
    let measured = measure_case(client, case, options, watcher).context(case);
    watcher.enter(Phase::Over);
    measured
}

fn measure_case(client: &mut Client, case: &Case, options: &Options, watcher: &Watcher<'_>) -> Result<Measured> {
    let scattered = case.block < case.total && case.op != Op::Send;
    let order = if scattered { Some(random_seed()?) } else { None };
    let shape = Shape { total: case.total, block: case.block.min(case.total), inflight: case.inflight, order };
    let ways = Way::of(case);
    let mut flows = Vec::new();
    for &way in ways {
        flows.push(Flow::open(client, way, shape)?);
    }
    let client = &*client;
    let mut run = Run { client, watcher, flows, shape, wait: options.wait, ids: Vec::new() };
    // The destination is poisoned once, and checked after all timed iterations.
    let seeds = run.fresh_seeds()?;
    run.arm(&seeds)?;
    watcher.enter(Phase::WarmUp);
    let last = run.warm_up(options)?;
    let moved = shape.total * u64::from(shape.inflight) * ways.len() as u64;
    let iters = options.iters.unwrap_or_else(|| iterations_for(options.budget.as_secs_f64() * 1e6, last.as_secs_f64() * 1e6));
    watcher.enter(Phase::Ready);
    (watcher.ready)();
    watcher.enter(Phase::Timed);
    let (cpu, network, before) = (host::cpu_seconds(), client.link.network(), client.link.carried());
    let timed = Timed { case, options, iters, one: last }.iterate(&mut run)?;
    watcher.enter(Phase::Over);
    let (cpu_s, after) = (host::cpu_seconds() - cpu, client.link.network());
    let carried = carried(&client.link, &before, moved * timed.times.count());
    let verified_bytes = if options.verify { run.verify(&seeds)? } else { 0 };
    for flow in run.flows {
        client.command(&Request::Close { buffer: flow.remote.number })?;
    }
    let mut row = Row {
        op: case.op,
        memory: client.memory,
        total_bytes: shape.total,
        block_bytes: shape.block,
        channels: client.link.channels(),
        inflight: case.inflight,
        bidirectional: case.bidirectional,
        clients: 1,
        iters: timed.times.count(),
        seconds: timed.seconds,
        cpu_s,
        retransmits: after.retransmits.saturating_sub(network.retransmits),
        verified: options.verify,
        verified_bytes,
        interrupted: timed.interrupted,
        host: host::name(),
        peer: client.link.peer(),
        date: host::date(),
        version: crate::api::VERSION.to_owned(),
        congestion_control: after.congestion,
        ..Row::default()
    };
    row.set_times(&timed.times);
    row.set_path(&carried);
    let transfers = u64::from(shape.inflight) * ways.len() as u64 * timed.times.count();
    row.set_rates(gbytes_per_s(moved * timed.times.count(), timed.seconds * 1e6), transfers as f64 / timed.seconds.max(1e-9));
    row.gbytes_per_s_median = gbytes_per_s(moved, row.p50_us);
    Ok(Measured { row, times: timed.times, carried })
}

/// What has carried `moved` bytes of a connection since `before`.
pub fn carried(link: &Link, before: &Carried, moved: u64) -> Carried {
    let asked = Instant::now();
    loop {
        let carried = link.carried().since(before);
        if carried.sum() >= moved || asked.elapsed() > COUNTED_WITHIN {
            return carried.out_of(moved);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Iterations between two checks of the clock and of Ctrl-C, when one currently takes `one`. Few: on a busy machine the next ones may
/// take many times as long.
fn batch(one: Duration, left: u64) -> u64 {
    const PAUSE: f64 = 0.0125;
    ((PAUSE / one.as_secs_f64().max(1e-7)) as u64).clamp(1, left.max(1))
}

/// The timed part of a row.
struct Timed<'a> {
    case: &'a Case,
    options: &'a Options,
    iters: u64,
    /// The approximate duration of an iteration.
    one: Duration,
}

/// The result of the timed part.
struct Outcome {
    times: Times,
    seconds: f64,
    interrupted: bool,
}

impl Timed<'_> {
    fn iterate(&self, run: &mut Run<'_>) -> Result<Outcome> {
        let started = Instant::now();
        let limit = if self.options.time.is_some() { u64::MAX } else { self.iters };
        let bar = progress_bar(self.case, limit, self.options.progress && limit < u64::MAX);
        let mut times = Times::new();
        let mut one = self.one;
        let lengths: Vec<usize> = (0..self.options.notify as usize).map(|i| i * 997 % 8192).collect();
        let over = |done: u64| done >= limit || self.options.time.is_some_and(|time| started.elapsed() >= time);
        while !over(times.count()) && !out::is_stopping() {
            let seed = random_seed()?;
            run.client.notify(&lengths, seed)?;
            let (begin, batch) = (Instant::now(), batch(one, limit - times.count()));
            run.repeat(batch, |time| times.record(time))?;
            one = begin.elapsed().div_f64(batch as f64);
            run.client.check_echoes(&lengths, seed)?;
            bar.set_position(times.count());
        }
        bar.finish_and_clear();
        if times.count() == 0 {
            fail!("interrupted before the first iteration");
        }
        let interrupted = !over(times.count());
        Ok(Outcome { seconds: times.seconds(), times, interrupted })
    }
}

fn progress_bar(case: &Case, iters: u64, wanted: bool) -> ProgressBar {
    // If standard error is not a terminal, indicatif shows nothing.
    let bar = if wanted { ProgressBar::new(iters) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}") {
        bar.set_style(style);
    }
    bar.set_message(case.to_string());
    bar
}
