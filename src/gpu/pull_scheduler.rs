//! Pulls in flight on one GPU, over a few streams, so that one list's start hides behind another's end. Knows addresses, not whose they
//! are.

use super::closer;
use super::launcher_pool::PooledLauncher;
use super::pieces::{Cutter, ENGINE};
use super::pull_launcher::{PullLauncher, LAUNCH};
use super::Gpu;
use crate::status::{bail, Result};
use crate::types::Piece;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Streams that launches take in turn.
const STREAMS: usize = 2;
/// Pieces of a long list's first launch where nothing else is in flight; each further one takes twice as many. The GPU is at work while
/// the rest is prepared.
const FIRST: usize = 2048;

/// Lists of so few pieces take the copy engine for runs of any length.
const FEW_RUNS: usize = 2;

struct Lane {
    launcher: PooledLauncher<PullLauncher>,
    /// Launches in flight, in order, each with its pull.
    launches: VecDeque<(u64, u64)>,
}

/// A pull, from its start until its end was reported.
struct Job {
    /// Launches in flight, and lists that wait for room.
    left: u32,
    reported: bool,
}

/// A list that waits for room, or the rest of one.
struct Waiting {
    job: u64,
    pieces: Vec<Piece>,
    total: u64,
}

/// How pulls are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PullOptions {
    /// Blocks of a launch at most, which is the share of the GPU that pulls take.
    pub blocks: u32,
    /// Contiguous bytes from which on the copy engine is used.
    pub engine: u64,
    /// Lists of so few pieces take it for runs of any length.
    pub few_runs: usize,
}

impl Default for PullOptions {
    fn default() -> PullOptions {
        PullOptions { blocks: 66, engine: ENGINE, few_runs: FEW_RUNS }
    }
}

/// The pulls. One thread at a time.
pub(crate) struct Pulls {
    lanes: Vec<Lane>,
    turn: usize,
    grid: PullOptions,
    waiting: VecDeque<Waiting>,
    jobs: VecDeque<Job>,
    /// Number of the first of `jobs`.
    first: u64,
    under_way: usize,
}

impl Pulls {
    /// Pulls into memory of this GPU.
    pub(crate) fn new(gpu: &Arc<Gpu>, grid: PullOptions) -> Result<Pulls> {
        let lane = |_| Ok(Lane { launcher: gpu.pull_launcher()?, launches: VecDeque::new() });
        Ok(Pulls {
            lanes: (0..STREAMS).map(lane).collect::<Result<_>>()?,
            turn: 0,
            grid,
            waiting: VecDeque::new(),
            jobs: VecDeque::new(),
            first: 0,
            under_way: 0,
        })
    }

    /// Starts a pull: its number, to be given to [`Pulls::poll`]. Lists without room start at a later poll.
    ///
    /// # Safety
    /// Until it has ended: sources are readable by this GPU, destinations are its memory and have no other user, and they do not overlap.
    pub(crate) unsafe fn start(&mut self, pieces: &[Piece]) -> Result<u64> {
        closer::stir();
        let total = pieces.iter().map(|p| p.len).fold(0, u64::saturating_add);
        let job = self.first + self.jobs.len() as u64;
        self.jobs.push_back(Job { left: 0, reported: false });
        self.under_way += 1;
        let mut cutter = Cutter::new(pieces, total, self.engine_from(pieces.len()));
        if self.waiting.is_empty() {
            // SAFETY: by the caller's contract.
            unsafe { self.hand_out(&mut cutter, job) }?;
        }
        if !cutter.is_done() {
            self.waiting.push_back(Waiting { job, pieces: cutter.remainder(), total });
            self.job(job).left += 1;
        }
        self.settle(job);
        Ok(job)
    }

    /// Launches what the lanes have room for.
    ///
    /// # Safety
    /// As [`Pulls::start`].
    unsafe fn hand_out(&mut self, cutter: &mut Cutter<'_>, job: u64) -> Result<()> {
        let idle = self.lanes.iter().all(|lane| lane.launches.is_empty());
        let (mut full, mut most) = (0, if idle { FIRST } else { LAUNCH });
        while full < self.lanes.len() && !cutter.is_done() {
            let lane = &mut self.lanes[self.turn % STREAMS];
            // SAFETY: by the caller's contract.
            match unsafe { lane.launcher.submit(cutter, self.grid.blocks, most) }? {
                Some(launch) => {
                    lane.launches.push_back((launch, job));
                    self.job(job).left += 1;
                    (full, most) = (0, (2 * most).min(LAUNCH));
                }
                None => full += 1,
            }
            self.turn += 1;
        }
        Ok(())
    }

    /// Contiguous bytes from which on a list's run takes the copy engine. Lists of few runs end sooner that way.
    fn engine_from(&self, pieces: usize) -> u64 {
        if pieces <= self.grid.few_runs {
            1
        } else {
            self.grid.engine
        }
    }

    fn job(&mut self, job: u64) -> &mut Job {
        &mut self.jobs[(job - self.first) as usize]
    }

    /// Counts a pull that has ended.
    fn settle(&mut self, job: u64) {
        if self.job(job).left == 0 {
            self.under_way -= 1;
        }
    }

    /// Takes note of launches that are over and starts what waited for them.
    fn advance(&mut self) -> Result<()> {
        for i in 0..self.lanes.len() {
            let lane = &mut self.lanes[i];
            let mut over = Vec::new();
            while let Some(&(launch, job)) = lane.launches.front() {
                if !lane.launcher.is_over(launch)? {
                    break;
                }
                lane.launches.pop_front();
                over.push(job);
            }
            for job in over {
                self.job(job).left -= 1;
                self.settle(job);
            }
        }
        while let Some(Waiting { job, pieces, total }) = self.waiting.pop_front() {
            let mut cutter = Cutter::new(&pieces, total, self.grid.engine);
            // SAFETY: the caller of start keeps the memory until the pull has ended.
            unsafe { self.hand_out(&mut cutter, job) }?;
            if !cutter.is_done() {
                let pieces = cutter.remainder();
                self.waiting.push_front(Waiting { job, pieces, total });
                break;
            }
            self.job(job).left -= 1;
            self.settle(job);
        }
        Ok(())
    }

    /// Whether a pull has ended; then its number is forgotten. An error is that of the GPU, which ends no pull any more.
    pub(crate) fn poll(&mut self, job: u64) -> Result<bool> {
        let known = job.checked_sub(self.first).is_some_and(|i| self.jobs.get(i as usize).is_some_and(|j| !j.reported));
        if !known {
            bail!(Internal, "internal error: unknown pull {job}");
        }
        closer::stir();
        self.advance()?;
        if self.job(job).left > 0 {
            return Ok(false);
        }
        self.job(job).reported = true;
        while self.jobs.front().is_some_and(|j| j.reported) {
            self.jobs.pop_front();
            self.first += 1;
        }
        Ok(true)
    }

    /// Whether pulls are in flight.
    pub(crate) fn busy(&self) -> bool {
        self.under_way > 0
    }

    /// Drops what has not been started and waits for the rest, at most `limit`. After an error some may still run.
    pub(crate) fn quiesce(&mut self, limit: Duration) -> Result<()> {
        self.waiting.clear();
        let deadline = Instant::now() + limit;
        let each = |lane: &mut Lane| lane.launcher.quiesce(deadline.saturating_duration_since(Instant::now()));
        let results: Vec<Result<()>> = self.lanes.iter_mut().map(each).collect();
        results.into_iter().collect()
    }
}
