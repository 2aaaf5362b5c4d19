//! The progress thread of an engine: drives the connections that have something to do, spins briefly for the next piece of it, then
//! sleeps in epoll. Only what a socket, a bell, a timer or another thread names is driven; a connection that an application thread
//! polls is left to that thread. Knows nothing of frames and channels.

use super::contention::Contention;
use super::doorbell::{named, DoorbellSlot, Named};
use super::pacing::{step, Round, Step};
use super::table::Driven;
use crate::engine::connection::{Connection, ConnectionTable};
use crate::hash::Map;
use process::thread::ask_for_short_turns;
use reactor::Interest;
use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Timers go off together: those that are at least four times so far off this often. The rest is exact.
const GRIDS: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(50)];

/// Connections that are looked at while this thread spins, because something just moved on them; the others are left to epoll.
const WARM: usize = 4;
/// What of a socket wakes this thread while another one answers for its connection: the end, once.
const ELSEWHERE: Interest = Interest::ONCE;
/// Looks at warm connections between two at everything else, and the longest time between those: connections that have much to do keep
/// no other waiting.
const LOOKS: u32 = 4;
const LOOK: Duration = Duration::from_micros(50);
/// Rounds between two yields of a thread that spins: a yield costs about as much as a round.
const YIELDS: u32 = 8;

/// Default of UCCL_TCPX_SPIN_US: the time in which a peer's next small request is likely. Sleeping and waking costs tens of
/// microseconds on virtual machines.
fn default_spin() -> Duration {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    Duration::from_micros(if cores > 2 { 100 } else { 50 })
}

/// A connection that has something to do.
struct Active {
    connection: Arc<Connection>,
    /// What of its socket wakes this thread.
    interest: Interest,
    /// An application thread drives it at present.
    driven: bool,
    /// A channel rang; if nothing moves, it may have failed.
    rang: bool,
    /// When something last moved. While this thread spins it goes on looking at such a connection by itself, since that is quicker than
    /// asking epoll: whoever sends small requests sends one after the other.
    moved: Option<Instant>,
}

/// A connection in this thread's care.
struct Known {
    /// What its channels ring.
    slot: Arc<DoorbellSlot>,
    /// It has an entry among the timers.
    timed: bool,
    /// When it is to be looked at, as it was last settled: its entry may be older than that.
    next: Instant,
}

/// What the thread keeps between rounds.
struct Driving<'a> {
    table: &'a ConnectionTable,
    known: Map<u64, Known>,
    /// Those that share a descriptor for their rings.
    groups: Map<usize, Vec<u64>>,
    active: Map<u64, Active>,
    /// When connections next want to be looked at, at the earliest; at most one entry a connection.
    timers: BinaryHeap<Reverse<(Instant, u64)>>,
    start: Instant,
    /// How long the thread spins.
    spin: Duration,
}

impl<'a> Driving<'a> {
    fn new(table: &'a ConnectionTable, spin: Duration) -> Driving<'a> {
        Driving {
            table,
            known: Map::default(),
            groups: Map::default(),
            active: Map::default(),
            timers: BinaryHeap::new(),
            start: Instant::now(),
            spin,
        }
    }

    /// Something happened to a connection: it is driven from now on until it is idle.
    fn activate(&mut self, id: u64) -> Option<&mut Active> {
        let fresh = if self.active.contains_key(&id) { None } else { self.table.connections.get(id) };
        if fresh.is_none() && !self.active.contains_key(&id) {
            self.forget(id);
        }
        match self.active.entry(id) {
            Entry::Occupied(active) => Some(active.into_mut()),
            Entry::Vacant(vacant) => {
                let connection = fresh?;
                if let Entry::Vacant(unknown) = self.known.entry(id) {
                    let slot = connection.slot().clone();
                    self.groups.entry(slot.group).or_default().push(id);
                    unknown.insert(Known { slot, timed: false, next: self.start });
                }
                Some(vacant.insert(Active { connection, interest: Interest::READ, driven: false, rang: false, moved: None }))
            }
        }
    }

    /// A connection has ended.
    fn forget(&mut self, id: u64) {
        if let Some(members) = self.known.remove(&id).and_then(|known| self.groups.get_mut(&known.slot.group)) {
            members.retain(|&other| other != id);
        }
    }

    /// Looks at the connections whose time has come. Those at rest do what is due and go on resting; others are activated.
    fn due(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied() {
            if at > now {
                return;
            }
            self.timers.pop();
            let Some(known) = self.known.get_mut(&id) else { continue };
            known.timed = false;
            if self.active.contains_key(&id) {
                continue;
            }
            if known.next > now {
                known.timed = true;
                self.timers.push(Reverse((known.next, id)));
                continue;
            }
            match self.table.connections.get(id).and_then(|connection| connection.driver().tick_at_rest(now)) {
                Some(next) => self.set_timer(id, next),
                None => {
                    self.activate(id);
                }
            }
        }
    }

    /// A connection at rest wants to be looked at then, unless it has an entry already: that one comes first.
    fn set_timer(&mut self, id: u64, next: Instant) {
        let at = self.on_grid(next);
        let Some(known) = self.known.get_mut(&id) else { return };
        known.next = at;
        if !std::mem::replace(&mut known.timed, true) {
            self.timers.push(Reverse((at, id)));
        }
    }

    /// Activates the connections of a group whose channels have rung. `armed`: bells of active ones are armed, too.
    fn listen(&mut self, group: usize, armed: bool) {
        let rang = |id: &u64| self.known.get(id).is_some_and(|known| known.slot.rang());
        let rung: Vec<u64> = self.groups.get(&group).into_iter().flatten().copied().filter(rang).collect();
        for id in rung {
            let idle = !self.active.contains_key(&id);
            if let Some(active) = self.activate(id) {
                active.rang |= idle || (armed && !active.driven);
            }
        }
    }

    /// One round over the active connections but those that an application thread drives. `must`: waits for their locks, and lets
    /// those rest that have nothing to do.
    fn round(&mut self, must: bool, now: Instant) -> Round {
        let mut round = Round { watched: !self.known.is_empty(), ..Round::default() };
        let table = self.table;
        let mut warm = if must { 0 } else { WARM };
        let mut resting = Vec::new();
        for (&id, active) in &mut self.active {
            let driven = active.connection.driven_by_application();
            active.driven = driven.is_some();
            if let Some(since) = driven {
                round.driven = Some(round.driven.map_or(since, |other| other.min(since)));
                round.active = true;
                watch(table, active, ELSEWHERE);
                continue;
            }
            let found = active.connection.driver().progress(must);
            if found.kept {
                // What comes waits until whoever keeps it asks for this thread.
                watch(table, active, ELSEWHERE);
                continue;
            }
            round.any |= found.any;
            round.channels_busy |= found.channels_busy;
            round.polled |= found.channels_busy && !table.context.doorbells;
            round.large |= found.large;
            round.copying |= found.copying;
            if std::mem::take(&mut active.rang) && !found.any {
                active.connection.driver().look_for_failure();
            }
            if found.dead {
                resting.push((id, None));
                continue;
            }
            watch(table, active, if found.backlog { Interest::READ | Interest::WRITE } else { Interest::READ });
            if found.any {
                active.moved = Some(now);
            }
            let idle = !(found.busy || found.backlog || found.any);
            let stays = warm > 0 && active.moved.is_some_and(|at| now - at < self.spin);
            round.active |= !idle;
            warm -= usize::from(stays);
            if let (true, false, Some(next)) = (idle, stays, found.next_tick) {
                resting.push((id, Some(next)));
            }
        }
        for (id, next) in resting {
            self.rest(id, next);
        }
        round
    }

    /// Something may come soon on a connection that is looked at in each round.
    fn warm(&self) -> bool {
        self.active.values().any(|active| active.moved.is_some() && !active.driven)
    }

    /// A connection has nothing to do until a socket, a bell or its timer says so; without a time it has ended.
    fn rest(&mut self, id: u64, next: Option<Instant>) {
        let Some(active) = self.active.remove(&id) else { return };
        match (next, self.known.contains_key(&id)) {
            (Some(at), true) => {
                active.connection.arm(true);
                if active.connection.driver().is_active() {
                    // Work began after the last look, and what happened to it before the arming rang nobody.
                    self.active.insert(id, active);
                    return;
                }
                self.set_timer(id, at);
            }
            _ => self.forget(id),
        }
    }

    /// A distant time, put off to where others are: a thousand heartbeats then share a few wake-ups.
    fn on_grid(&self, at: Instant) -> Instant {
        let left = at.saturating_duration_since(Instant::now());
        let Some(grid) = GRIDS.into_iter().find(|&grid| left >= 4 * grid) else { return at };
        let since = at.saturating_duration_since(self.start).as_millis() as u64;
        self.start + Duration::from_millis((since / grid.as_millis() as u64 + 1) * grid.as_millis() as u64)
    }

    /// Lets the bells of active connections ring that this thread answers for, or silences them.
    fn arm(&self, on: bool) {
        for active in self.active.values() {
            active.connection.arm(on && !active.driven);
        }
        self.table.context.queue.bell.arm(on);
    }

    /// Until the next timer.
    fn until_timer(&self, now: Instant) -> Duration {
        self.timers.peek().map_or(Duration::MAX, |Reverse((at, _))| at.saturating_duration_since(now))
    }

    /// Activates whoever has an event.
    fn notice(&mut self, tokens: &[u64], armed: bool) {
        for &token in tokens {
            match named(token) {
                // Whoever rang has left word: see `ConnectionTable::asked`.
                Named::Bell => {}
                Named::Group(group) => self.listen(group, armed),
                Named::Connection(id) => {
                    self.activate(id);
                }
                Named::Local(id) => {
                    if let Some(active) = self.activate(id) {
                        active.connection.on_host_message();
                    }
                }
            }
        }
    }
}

fn watch(table: &ConnectionTable, active: &mut Active, interest: Interest) {
    if active.interest != interest {
        active.interest = interest;
        table.context.queue.bell.change(active.connection.fd(), active.connection.id(), interest);
    }
}

/// Runs until the engine closes. A panic in a round ends the connections that it may have left half done, and not the thread.
pub(crate) fn run(table: &ConnectionTable, spin: Option<Duration>) {
    ask_for_short_turns();
    let spin = spin.unwrap_or_else(default_spin);
    while !table.ended() {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drive(table, spin)));
        if caught.is_err() {
            log::error!("the progress thread panicked: all connections of the engine are closed");
            for connection in table.connections.all() {
                connection.abandon();
            }
        }
    }
}

/// What comes before the next round that follows at once, the `looks`th.
fn give_way(step: Step, looks: u32, contention: &mut Contention) -> Instant {
    let before = Instant::now();
    match step {
        Step::Yield if looks % YIELDS == 0 => {
            std::thread::yield_now();
            let now = Instant::now();
            contention.yielded(before, now);
            return now;
        }
        Step::Spin | Step::Yield => std::hint::spin_loop(),
        Step::Again | Step::Sleep(_) => {}
    }
    before
}

fn drive(table: &ConnectionTable, spin: Duration) {
    let mut driving = Driving::new(table, spin);
    // What was there before: after a panic, and connections that came up before this thread.
    for connection in table.connections.all() {
        driving.activate(connection.id());
    }
    let mut last_activity = Instant::now();
    let (mut tokens, mut looks, mut looked) = (Vec::new(), 0u32, last_activity);
    let mut contention = Contention::new(last_activity);
    while !table.ended() {
        table.context.queue.asked(|id| {
            driving.activate(id);
        });
        let now = Instant::now();
        driving.due(now);
        let round = driving.round(false, now);
        let spin = if contention.may_spin(now) { spin } else { Duration::ZERO };
        match step(&round, now - last_activity, spin, table.context.cores) {
            again @ (Step::Again | Step::Spin | Step::Yield) => {
                looks = looks.wrapping_add(1);
                let now = give_way(again, looks, &mut contention);
                if again == Step::Again {
                    last_activity = now;
                }
                let warm = again == Step::Again || (looks % LOOKS != 0 && driving.warm());
                if warm && now - looked < LOOK {
                    continue;
                }
                looked = now;
                table.context.queue.bell.wait(Duration::ZERO, &mut tokens);
                driving.notice(&tokens, false);
            }
            Step::Sleep(limit) => {
                driving.arm(true);
                // What happened before the arming rang nobody.
                let again = driving.round(true, now);
                if again.any || table.context.queue.has_asked() {
                    driving.arm(false);
                    last_activity = Instant::now();
                    continue;
                }
                // Who drives may have changed since.
                let limit = match step(&again, Duration::MAX, spin, table.context.cores) {
                    Step::Sleep(now) => limit.min(now),
                    _ => Duration::ZERO,
                };
                table.context.queue.bell.wait(limit.min(driving.until_timer(Instant::now())), &mut tokens);
                driving.notice(&tokens, true);
                driving.arm(false);
            }
        }
    }
}
