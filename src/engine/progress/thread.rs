//! The progress thread of an engine: drives connections that have work, spins briefly for more, then sleeps in epoll. Only
//! connections named by a socket, doorbell, timer or another thread are driven; a connection that an application thread polls is
//! left to that thread. Knows nothing about frames and channels.

use super::contention::Contention;
use super::doorbell::{named, DoorbellSlot, Named};
use super::pacing::{step, Round, Step};
use super::table::Driven;
use crate::engine::connection::{Connection, ConnectionTable, Progress};
use crate::hash::Map;
use crate::net::links::{LinkWatch, Links};
use process::thread::ask_for_short_turns;
use reactor::Interest;
use std::collections::hash_map::Entry;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Timers at least four times this far away are rounded up to such a grid, so that they expire together; nearer ones are exact.
const GRIDS: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(50)];

/// Recently active connections that are driven in each round while this thread spins; the others are left to epoll.
const WARM: usize = 4;
/// A connection that waits for an event is driven after this time nevertheless: what it waits for besides has no events.
const CHECK: Duration = Duration::from_millis(50);
/// The events that wake this thread while another thread is responsible for the connection: its end, once.
const ELSEWHERE: Interest = Interest::ONCE;
/// Rounds over warm connections between two checks of epoll, and the longest time between those: busy connections must not starve
/// others.
const LOOKS: u32 = 4;
const LOOK: Duration = Duration::from_micros(50);
/// Rounds between two yields of a thread that spins: a yield costs about as much as a round.
const YIELDS: u32 = 8;

/// Default of UCCL_TCPX_SPIN_US: the peer's next small request is likely within this time. Sleeping and waking costs tens of
/// microseconds on virtual machines.
fn default_spin() -> Duration {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    Duration::from_micros(if cores > 2 { 100 } else { 50 })
}

/// A connection that has work.
struct Active {
    connection: Arc<Connection>,
    /// The socket events that wake this thread.
    interest: Interest,
    /// How often its socket had been replaced by then.
    sockets: u32,
    /// An application thread currently drives it.
    driven: bool,
    /// A channel rang; if nothing moves, it may have failed.
    rang: bool,
    /// When something last moved. While this thread spins it drives such a connection without asking epoll, which is quicker:
    /// small requests often come one after another.
    moved: Option<Instant>,
    /// Its doorbell is armed.
    armed: bool,
    /// Nothing moved after the doorbell was armed: until an event names the connection, or it is due, there is nothing to do.
    waits: Option<Waits>,
}

/// What a connection was found to wait for.
struct Waits {
    found: Progress,
    due: Instant,
}

impl Active {
    /// Arms or disarms the doorbell.
    fn arm(&mut self, on: bool) {
        if on || std::mem::replace(&mut self.armed, on) {
            self.connection.arm(on);
        }
        self.armed = on;
    }

    /// How long an application thread has been driving the connection, if one is. This thread leaves the events to it.
    fn driven_elsewhere(&mut self, table: &ConnectionTable) -> Option<Duration> {
        let driving = self.connection.driven_by_application();
        self.driven = driving.is_some();
        if self.driven {
            self.arm(false);
            watch(table, self, ELSEWHERE);
        }
        driving
    }
}

/// A connection that this thread has seen.
struct Known {
    /// The doorbell slot of its channels.
    slot: Arc<DoorbellSlot>,
    /// Its entry in the timers.
    timed: Option<Instant>,
    /// When its timer is due; the entry may be earlier.
    next: Instant,
}

/// The state of the progress thread between rounds.
struct Driving<'a> {
    table: &'a ConnectionTable,
    known: Map<u64, Known>,
    /// Connections by the group whose descriptor they share.
    groups: Map<usize, Vec<u64>>,
    active: Map<u64, Active>,
    /// When connections next need a check: an entry each, at most.
    timers: BTreeSet<(Instant, u64)>,
    start: Instant,
    /// How long the thread spins.
    spin: Duration,
    /// `None` where the kernel does not announce changes.
    links: Option<LinkWatch>,
    /// Connections that were being prepared when the host's interfaces changed, and what was there before.
    unchecked: Map<u64, Links>,
}

impl<'a> Driving<'a> {
    fn new(table: &'a ConnectionTable, spin: Duration) -> Driving<'a> {
        let watched = LinkWatch::new().and_then(|links| table.context.queue.bell.watch_links(links.fd()).map(|()| links));
        if let Err(e) = &watched {
            log::debug!("lost links are noticed by their silence only: netlink: {e}");
        }
        Driving {
            table,
            known: Map::default(),
            groups: Map::default(),
            active: Map::default(),
            timers: BTreeSet::new(),
            start: Instant::now(),
            spin,
            links: watched.ok(),
            unchecked: Map::default(),
        }
    }

    /// Adds a connection to the active ones, until it is idle.
    fn activate(&mut self, id: u64) -> Option<&mut Active> {
        let fresh = if self.active.contains_key(&id) { None } else { self.table.connections.get(id) };
        if fresh.is_none() && !self.active.contains_key(&id) {
            self.forget(id);
        }
        match self.active.entry(id) {
            Entry::Occupied(active) => {
                let active = active.into_mut();
                active.waits = None;
                Some(active)
            }
            Entry::Vacant(vacant) => {
                let connection = fresh?;
                if let Entry::Vacant(unknown) = self.known.entry(id) {
                    let slot = connection.slot().clone();
                    self.groups.entry(slot.group).or_default().push(id);
                    unknown.insert(Known { slot, timed: None, next: self.start });
                }
                let sockets = connection.sockets();
                let interest = Interest::READ;
                // While it rested its doorbell was armed.
                let (armed, waits) = (true, None);
                Some(vacant.insert(Active {
                    connection,
                    interest,
                    sockets,
                    driven: false,
                    rang: false,
                    moved: None,
                    armed,
                    waits,
                }))
            }
        }
    }

    /// A network interface of the host has changed: connections give up the NICs that they can no longer use.
    fn check_links(&mut self) {
        let Some(links) = &mut self.links else { return };
        let Ok(links) = links.changed() else { return };
        if links.came_back {
            self.table.context.restoring.retry_now();
        }
        for connection in self.table.connections.all() {
            match close_faulty(&connection, &links) {
                Some(true) => {
                    self.activate(connection.id());
                }
                Some(false) => {}
                None => self.unchecked.entry(connection.id()).or_default().add(&links),
            }
        }
    }

    /// Checks the interfaces for a connection that is prepared now.
    fn check_missed(&mut self) {
        let prepared = |id: &u64| self.table.connections.get(*id).is_none_or(|connection| !connection.driver().is_preparing());
        let ids: Vec<u64> = self.unchecked.keys().copied().filter(prepared).collect();
        for id in ids {
            let (Some(missed), Some(connection)) = (self.unchecked.remove(&id), self.table.connections.get(id)) else { continue };
            if missed.renewed().is_ok_and(|links| close_faulty(&connection, &links) == Some(true)) {
                self.activate(id);
            }
        }
    }

    /// A connection has ended.
    fn forget(&mut self, id: u64) {
        let Some(known) = self.known.remove(&id) else { return };
        known.timed.map(|at| self.timers.remove(&(at, id)));
        if let Some(members) = self.groups.get_mut(&known.slot.group) {
            members.retain(|&other| other != id);
        }
    }

    /// Handles expired timers. Idle connections do what is due and stay idle; others are activated.
    fn due(&mut self, now: Instant) {
        while let Some((_, id)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.pop_first();
            let Some(known) = self.known.get_mut(&id) else { continue };
            known.timed = None;
            if self.active.contains_key(&id) {
                continue;
            }
            if known.next > now {
                known.timed = Some(known.next);
                self.timers.insert((known.next, id));
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

    /// Sets the timer of an idle connection. An earlier entry is moved when it expires.
    fn set_timer(&mut self, id: u64, next: Instant) {
        let at = self.on_grid(next);
        let Some(known) = self.known.get_mut(&id) else { return };
        known.next = at;
        if known.timed.is_none_or(|entry| at < entry) {
            known.timed.replace(at).map(|entry| self.timers.remove(&(entry, id)));
            self.timers.insert((at, id));
        }
    }

    /// Activates the connections of a group whose channels have rung.
    fn listen(&mut self, group: usize) {
        let rang = |id: &u64| self.known.get(id).is_some_and(|known| known.slot.rang());
        let rung: Vec<u64> = self.groups.get(&group).into_iter().flatten().copied().filter(rang).collect();
        for id in rung {
            let idle = !self.active.contains_key(&id);
            if let Some(active) = self.activate(id) {
                active.rang |= idle || active.armed;
            }
        }
    }

    /// One round over the active connections, except those that an application thread drives and those that wait for an event. `must`:
    /// waits for their locks, and deactivates those without work.
    fn round(&mut self, must: bool, now: Instant) -> Round {
        let mut round = Round { watched: !self.known.is_empty(), ..Round::default() };
        let table = self.table;
        let mut warm = if must { 0 } else { WARM };
        let (mut hot, mut resting) = (0, Vec::new());
        // Few connections are driven in each round while this thread works anyway: epoll, which it asks now and then, would name them later.
        let few = !must && self.active.len() <= WARM;
        for (&id, active) in &mut self.active {
            active.waits = active.waits.take().filter(|waits| !few && now < waits.due);
            if let Some(waits) = &active.waits {
                count(&mut round, &waits.found, table.context.doorbells);
                continue;
            }
            if let Some(driving) = active.driven_elsewhere(table) {
                round.driven = Some(round.driven.map_or(driving, |other| other.min(driving)));
                round.active = true;
                continue;
            }
            // Events before the arming ring no doorbell: it is armed before the drive that decides whether the connection waits.
            hot += 1;
            let may_wait = must || hot > WARM;
            active.arm(may_wait);
            let found = active.connection.driver().progress(must);
            if found.preparing {
                // The thread that prepares the connection requests a drive when it is done.
                watch(table, active, ELSEWHERE);
                continue;
            }
            count(&mut round, &found, table.context.doorbells);
            if active.rang && !found.any {
                active.rang = !active.connection.driver().look_for_failure();
            }
            if found.dead {
                resting.push((id, None));
                continue;
            }
            watch(table, active, if found.backlog { Interest::READ | Interest::WRITE } else { Interest::READ });
            if found.any {
                active.moved = Some(now);
            }
            let idle = !(found.busy || found.backlog || found.any || active.rang);
            let stays = warm > 0 && active.moved.is_some_and(|at| now - at < self.spin);
            round.active |= active.rang;
            warm -= usize::from(stays);
            match found.next_tick {
                Some(next) if idle && !stays => resting.push((id, Some(next))),
                Some(next) if may_wait && !idle && !active.rang && found.may_wait(table.context.doorbells) => {
                    active.waits = Some(Waits { found, due: next.min(now + CHECK) });
                }
                _ => {}
            }
        }
        for (id, next) in resting {
            self.rest(id, next);
        }
        round
    }

    /// Whether a recently active connection is driven in each round.
    fn warm(&self) -> bool {
        self.active.values().any(|active| active.moved.is_some() && !active.driven)
    }

    /// Deactivates a connection until a socket, doorbell or timer names it; without a time it has ended.
    fn rest(&mut self, id: u64, next: Option<Instant>) {
        let Some(mut active) = self.active.remove(&id) else { return };
        match (next, self.known.contains_key(&id)) {
            (Some(at), true) => {
                active.arm(true);
                if active.connection.driver().settle() {
                    // Work was added after the last round; events before the arming, and failures, rang no doorbell.
                    self.active.insert(id, active);
                    return;
                }
                self.set_timer(id, at);
            }
            _ => self.forget(id),
        }
    }

    /// Rounds a distant time up to a grid: a thousand heartbeats then share a few wake-ups.
    fn on_grid(&self, at: Instant) -> Instant {
        let left = at.saturating_duration_since(Instant::now());
        let Some(grid) = GRIDS.into_iter().find(|&grid| left >= 4 * grid) else { return at };
        let since = at.saturating_duration_since(self.start).as_millis() as u64;
        self.start + Duration::from_millis((since / grid.as_millis() as u64 + 1) * grid.as_millis() as u64)
    }

    /// Time until the next timer.
    fn until_timer(&self, now: Instant) -> Duration {
        self.timers.first().map_or(Duration::MAX, |(at, _)| at.saturating_duration_since(now))
    }

    /// Activates the connections that have events.
    fn notice(&mut self, tokens: &[u64]) {
        for &token in tokens {
            match named(token) {
                // The connections to drive are in `DriveQueue::asked`.
                Named::Bell => {}
                Named::Group(group) => self.listen(group),
                Named::Connection(id) => {
                    self.activate(id);
                }
                Named::Local(id) => {
                    if let Some(active) = self.activate(id) {
                        active.connection.on_host_message();
                    }
                }
                Named::Links => self.check_links(),
            }
        }
    }
}

/// Adds what a connection was found to do to a round.
fn count(round: &mut Round, found: &Progress, doorbells: bool) {
    round.any |= found.any;
    round.channels_busy |= found.channels_busy;
    round.polled |= found.channels_busy && !doorbells;
    round.large |= found.large;
    round.copying |= found.copying;
    round.active |= found.busy || found.backlog || found.any;
}

/// Gives up what a connection has on NICs with a fault; see [`crate::engine::connection::Driver::close_faulty`].
fn close_faulty(connection: &Connection, links: &Links) -> Option<bool> {
    let fault = |nic: &str, local| links.fault(nic, local).map(|why| format!("{why} on this host"));
    let address = |ip| links.fault_of(ip).map(|why| format!("{why} on this host"));
    connection.driver().close_faulty(&fault, &address)
}

fn watch(table: &ConnectionTable, active: &mut Active, interest: Interest) {
    let sockets = active.connection.sockets();
    if (active.interest, active.sockets) != (interest, sockets) {
        (active.interest, active.sockets) = (interest, sockets);
        table.context.queue.bell.change(active.connection.fd(), active.connection.id(), interest);
    }
}

/// Runs until the engine closes. A panic in a round closes the connections, which may be half done, and keeps the thread.
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

/// Passes the time before round number `looks`, which follows at once.
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
    // Connections from before a panic, and those opened before this thread started.
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
        // The thread that prepared a connection has asked for a drive.
        driving.check_missed();
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
                driving.notice(&tokens);
            }
            Step::Sleep(limit) => {
                table.context.queue.bell.arm(true);
                let again = driving.round(true, now);
                if again.any || table.context.queue.has_asked() {
                    table.context.queue.bell.arm(false);
                    last_activity = Instant::now();
                    continue;
                }
                // An application thread may have started or stopped driving since.
                let limit = match step(&again, Duration::MAX, spin, table.context.cores) {
                    Step::Sleep(now) => limit.min(now),
                    _ => Duration::ZERO,
                };
                table.context.queue.bell.wait(limit.min(driving.until_timer(Instant::now())), &mut tokens);
                driving.notice(&tokens);
                table.context.queue.bell.arm(false);
            }
        }
    }
}
