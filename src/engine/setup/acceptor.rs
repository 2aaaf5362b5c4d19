//! The thread that brings up all incoming connections of an engine, driven by what their sockets report. Strangers, whose handshake is
//! not proved, have a small budget and little time; proved peers have theirs, shared between their addresses. Knows nothing of what the
//! bytes mean.

use super::accept_queue::{Accepts, Waiting};
use super::admission::Admission;
use super::context::SetupContext;
use super::driver::{Progress, SetupDriver};
use super::listener::BACKLOG;
use super::machine::Setup;
use super::shutdown::canceled;
use crate::engine::connection::Connection;
use crate::engine::limits;
use crate::engine::setup::quota::Counted;
use crate::logging::Limiter;
use crate::status::{err, Error, ErrorKind, Result};
use reactor::{Events, Interest, Poller};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc::SyncSender;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Token of the engine's end; the listening sockets follow it, then the set-ups.
const ENDING: u64 = 0;
const FIRST_LISTENER: u64 = 1;
const FIRST_SETUP: u64 = 16;
/// Sockets taken from one listening socket before the others have their turn.
const ACCEPT_BURST: usize = 64;
/// Strangers that may be there while the process is short of descriptors: enough to tell peers why they are refused.
const STRANGERS_IN_NEED: usize = 8;
/// How long no sockets are accepted after descriptors ran out.
const PAUSE: Duration = Duration::from_millis(100);
/// How long strangers may stay at most when others wait for their places: those whose first message is not complete, and the others.
const SILENCE: Duration = Duration::from_millis(20);
const HESITATION: Duration = Duration::from_millis(200);
/// The strangers that wait in a full queue of the kernel all have had their place after this time.
const QUEUE_TIME: Duration = Duration::from_millis(500);
/// How often connections that wait for the application are looked at.
const SWEEP: Duration = Duration::from_millis(100);
/// A proved peer that has said nothing for this long gives way when others wait for their turn.
const STALE: Duration = Duration::from_secs(2);
/// How long a refused peer may take to read why.
const FAREWELL: Duration = Duration::from_secs(1);
/// Lines a second about set-ups that failed, and about descriptors that ran out.
const LINES: u32 = 5;

impl Waiting for Connection {
    fn id(&self) -> u64 {
        Connection::id(self)
    }
    fn is_up(&self) -> bool {
        Connection::is_up(self)
    }
    fn waits(&self, on: bool) {
        self.set_waits(on);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The handshake is not proved.
    Stranger,
    /// Proved, and waits for its turn.
    Queued,
    /// Its channels may come up.
    Admitted,
}

struct Entry {
    driver: SetupDriver,
    role: Role,
    interest: Interest,
    timer: Instant,
    /// When it came.
    since: Instant,
    /// Its place among the stale ones.
    waits_since: Option<Instant>,
    /// Its place among connections.
    counted: Option<Counted>,
}

/// The thread's things.
struct Acceptor {
    context: Arc<SetupContext>,
    accepts: Arc<Accepts<Connection>>,
    listeners: Vec<TcpListener>,
    poller: Poller,
    last: u64,
    /// By id, which is the order of arrival.
    entries: BTreeMap<u64, Entry>,
    timers: BTreeSet<(Instant, u64)>,
    strangers: Strangers,
    admission: Admission,
    /// Admitted ones, by when their peers last said something while that is all that is missing.
    stale: BTreeSet<(Instant, u64)>,
    /// Refused peers that may still read why.
    farewells: BTreeMap<u64, (TcpStream, Instant)>,
    /// Connections that are to be made ready for memory of GPUs.
    fresh: SyncSender<u64>,
    paused_until: Option<Instant>,
    sweep_at: Option<Instant>,
    logs: Logs,
}

/// Strangers, by ids: those whose first message is not complete, and the others.
#[derive(Default)]
struct Strangers {
    beginning: BTreeSet<u64>,
    answered: BTreeSet<u64>,
}

impl Strangers {
    fn count(&self) -> usize {
        self.beginning.len() + self.answered.len()
    }

    fn remove(&mut self, id: u64) {
        if !self.beginning.remove(&id) {
            self.answered.remove(&id);
        }
    }

    /// Its first message is complete, and was answered.
    fn answered(&mut self, id: u64) {
        if self.beginning.remove(&id) {
            self.answered.insert(id);
        }
    }
}

/// Lines about peers, and about what this process is short of.
struct Logs {
    lines: Limiter,
    shortage: Limiter,
}

/// Starts the thread. It names the connections that are up to `fresh`.
///
/// # Errors
/// `Resource`.
pub(crate) fn start(
    context: Arc<SetupContext>,
    accepts: Arc<Accepts<Connection>>,
    listeners: Vec<TcpListener>,
    fresh: SyncSender<u64>,
) -> Result<std::thread::JoinHandle<()>> {
    let mut acceptor = Acceptor::new(context, accepts, listeners, fresh).map_err(|e| limits::system("epoll", &e))?;
    limits::spawn("uccl-setup", move || {
        while !acceptor.context.shutdown.begun() {
            // A defect in one set-up must not close the port for good.
            let round = std::panic::AssertUnwindSafe(|| acceptor.run());
            if std::panic::catch_unwind(round).is_err() {
                log::error!("a set-up of a connection panicked; all that were under way are dropped");
                acceptor.forget_all();
                std::thread::sleep(PAUSE);
            }
        }
        acceptor.end();
    })
}

/// How long strangers may stay, by kind, where there are so many places and others wait. With few places it is short: a peer that waits in
/// the kernel's queue gets a place soon, and what it has sent meanwhile is there when it does.
fn stays(places: usize) -> [Duration; 2] {
    let share = QUEUE_TIME.saturating_mul(u32::try_from(places).unwrap_or(u32::MAX)) / BACKLOG.unsigned_abs();
    [share.min(SILENCE), share.min(HESITATION)]
}

fn interest_of(driver: &SetupDriver) -> Interest {
    match driver.interest() {
        (true, true) => Interest::READ | Interest::WRITE,
        (true, false) => Interest::READ,
        (false, true) => Interest::WRITE,
        (false, false) => Interest::NONE,
    }
}

impl Acceptor {
    fn new(
        context: Arc<SetupContext>,
        accepts: Arc<Accepts<Connection>>,
        listeners: Vec<TcpListener>,
        fresh: SyncSender<u64>,
    ) -> std::io::Result<Acceptor> {
        let poller = Poller::new()?;
        poller.add(context.shutdown.fd(), ENDING, Interest::READ)?;
        for (listener, token) in listeners.iter().zip(FIRST_LISTENER..FIRST_SETUP) {
            poller.add(listener.as_raw_fd(), token, Interest::READ)?;
        }
        let limits = context.limits;
        Ok(Acceptor {
            context,
            accepts,
            listeners,
            poller,
            last: FIRST_SETUP,
            entries: BTreeMap::new(),
            timers: BTreeSet::new(),
            strangers: Strangers::default(),
            admission: Admission::new(limits.incoming, limits.per_peer),
            stale: BTreeSet::new(),
            farewells: BTreeMap::new(),
            fresh,
            paused_until: None,
            sweep_at: None,
            logs: Logs { lines: Limiter::new(LINES), shortage: Limiter::new(1) },
        })
    }

    fn run(&mut self) {
        let mut events = Events::with_capacity(256);
        while !self.context.shutdown.begun() {
            if let Err(e) = self.poller.wait(&mut events, self.timeout()) {
                self.logs.shortage.log(log::Level::Error, Instant::now(), format_args!("waiting for set-ups: {e}"));
                std::thread::sleep(PAUSE);
            }
            let now = Instant::now();
            for event in events.iter() {
                match event.token() {
                    ENDING => return,
                    token if token < FIRST_SETUP => self.arrivals((token - FIRST_LISTENER) as usize, now),
                    id if self.farewells.contains_key(&id) => self.farewell(id, now),
                    id => self.advance(id, now),
                }
            }
            self.on_time(now);
            self.admit(now);
        }
    }

    /// Until when nothing happens without an event.
    fn timeout(&self) -> Option<Duration> {
        let timer = self.timers.first().map(|(at, _)| *at);
        // Farewells are as old as their ids.
        let farewell = self.farewells.first_key_value().map(|(_, (_, until))| *until);
        let first = [timer, farewell, self.paused_until, self.sweep_at].into_iter().flatten().min()?;
        let left = first.saturating_duration_since(Instant::now());
        // Whoever waits for a turn gets it when another set-up has become stale.
        Some(if self.admission.waiting() == 0 { left } else { left.min(STALE / 4) })
    }

    fn on_time(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timers.first() {
            if at > now {
                break;
            }
            // Whatever comes of it, this timer is over.
            self.timers.remove(&(at, id));
            self.advance(id, now);
        }
        while self.farewells.first_key_value().is_some_and(|(_, (_, until))| *until <= now) {
            self.farewells.pop_first();
        }
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            self.listen(Interest::READ);
        }
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep_at = self.accepts.sweep().then_some(now + SWEEP);
        }
    }

    fn listen(&self, interest: Interest) {
        for (listener, token) in self.listeners.iter().zip(FIRST_LISTENER..FIRST_SETUP) {
            let _ = self.poller.modify(listener.as_raw_fd(), token, interest);
        }
    }

    // ---- strangers ----

    fn arrivals(&mut self, listener: usize, now: Instant) {
        for _ in 0..ACCEPT_BURST {
            if let Err(wait) = self.place_for_stranger(listener, now) {
                return self.pause(now, wait);
            }
            let accepted = match self.listeners.get(listener) {
                Some(listener) => listener.accept(),
                None => return,
            };
            match accepted {
                Ok((sock, address)) => self.arrived(sock, address, now),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(e) if limits::is_exhaustion(&e) => {
                    let e = limits::system("accepting a connection", &e);
                    self.context.table.context.counters.limits_hit.add();
                    self.logs.shortage.log(log::Level::Error, now, format_args!("{e}"));
                    self.drop_stranger(now, [Duration::ZERO, HESITATION], true);
                    return self.pause(now, PAUSE);
                }
                // The peer went away between its connect and our accept.
                Err(_) => {}
            }
        }
    }

    /// Accepts nothing for a while; the kernel keeps those who come.
    fn pause(&mut self, now: Instant, time: Duration) {
        self.paused_until = Some(now + time);
        self.listen(Interest::NONE);
    }

    /// Makes sure that one more stranger may come; another one gives way for it.
    ///
    /// # Errors
    /// How long to wait where none can give way yet.
    fn place_for_stranger(&mut self, listener: usize, now: Instant) -> std::result::Result<(), Duration> {
        let limits = &self.context.limits;
        let Some(listener) = self.listeners.get(listener) else { return Ok(()) };
        let short = limits::lowest_free(listener.as_raw_fd()).map_or(true, |lowest| lowest >= limits.ceiling);
        let most = if short { STRANGERS_IN_NEED.min(limits.strangers) } else { limits.strangers };
        let stays = stays(most);
        while self.strangers.count() >= most {
            if !self.drop_stranger(now, stays, short) {
                return Err(stays[0]);
            }
        }
        Ok(())
    }

    fn arrived(&mut self, sock: TcpStream, address: SocketAddr, now: Instant) {
        if !self.context.allow.admits(address.ip()) {
            self.context.table.context.counters.setups_in_refused.add();
            self.logs.lines.log(log::Level::Warn, now, format_args!("{address}: dropped: not in UCCL_TCPX_ALLOW"));
            return;
        }
        let context = &self.context;
        let prepared = sock.set_nonblocking(true).and_then(|()| sock.set_nodelay(true));
        let link = match prepared.map_err(|e| limits::system("control socket", &e)).and_then(|()| context.link(None)) {
            Ok(link) => link,
            Err(e) => return self.logs.lines.log(log::Level::Warn, now, format_args!("{address}: {e}")),
        };
        let setup = Setup::new(link, now, now + context.config.handshake_timeout, now + context.config.connect_timeout);
        let driver = SetupDriver::new(sock, address, setup, now);
        self.last += 1;
        if let Err(e) = self.poller.add(driver.fd(), self.last, Interest::READ) {
            return self.logs.shortage.log(log::Level::Error, now, format_args!("{address}: {}", limits::system("epoll", &e)));
        }
        let timer = driver.wake_at();
        self.timers.insert((timer, self.last));
        let entry =
            Entry { driver, role: Role::Stranger, interest: Interest::READ, timer, since: now, waits_since: None, counted: None };
        self.entries.insert(self.last, entry);
        self.strangers.beginning.insert(self.last);
        // An engine's first message is one packet, which is here as a rule.
        self.advance(self.last, now);
    }

    /// Drops the oldest stranger whose first message is not complete, or else the oldest of the others, if it has stayed as long as
    /// `stays` has for its kind. Whether one went. One that speaks this protocol learns that it may try again, unless descriptors are
    /// `short`.
    fn drop_stranger(&mut self, now: Instant, stays: [Duration; 2], short: bool) -> bool {
        // Ids are in the order of arrival.
        let old = |id: &u64, least| self.entries.get(id).is_some_and(|e| now.saturating_duration_since(e.since) >= least);
        let beginning = self.strangers.beginning.first().copied().filter(|id| old(id, stays[0]));
        let answered = || self.strangers.answered.first().copied().filter(|id| old(id, stays[1]));
        let Some(id) = beginning.or_else(answered) else { return false };
        if let Some(entry) = self.take(id) {
            self.context.table.context.counters.setup_failed(ErrorKind::Resource);
            let address = entry.driver.address;
            self.logs.lines.log(
                log::Level::Warn,
                now,
                format_args!("{address}: dropped: others wait, and it has not said who it is"),
            );
            if !entry.driver.setup().is_silent() {
                let sock = entry.driver.give_up(&err!(Resource, "too many others are being set up: try again"));
                if !short {
                    self.part(sock, now);
                }
            }
        }
        true
    }

    // ---- one set-up ----

    /// Takes a set-up out of all tables.
    fn take(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.timers.remove(&(entry.timer, id));
        let _ = self.poller.remove(entry.driver.fd());
        match entry.role {
            Role::Stranger => self.strangers.remove(id),
            Role::Queued => self.admission.leave(id, entry.driver.address.ip()),
            Role::Admitted => {
                self.admission.done(entry.driver.address.ip());
                entry.waits_since.map(|since| self.stale.remove(&(since, id)));
            }
        }
        Some(entry)
    }

    fn advance(&mut self, id: u64, now: Instant) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match entry.driver.step(&self.context, now) {
            Ok(Progress::Wait) => {}
            Ok(Progress::Proved) if entry.role == Role::Stranger => {
                entry.role = Role::Queued;
                let ip = entry.driver.address.ip();
                self.strangers.remove(id);
                self.admission.wait(id, ip);
                let most = self.context.limits.incoming;
                if self.admission.waiting() > most {
                    return self.fail(id, &err!(Resource, "{most} set-ups of connections wait for their turn already"), now);
                }
            }
            Ok(Progress::Proved) => {}
            Ok(Progress::Up) => return self.up(id, now),
            Err(e) => return self.fail(id, &e, now),
        }
        self.rearm(id);
    }

    /// Brings what wakes us for a set-up up to date.
    fn rearm(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let interest = interest_of(&entry.driver);
        if interest != entry.interest {
            entry.interest = interest;
            let _ = self.poller.modify(entry.driver.fd(), id, interest);
        }
        self.timers.remove(&(entry.timer, id));
        entry.timer = entry.driver.wake_at();
        self.timers.insert((entry.timer, id));
        if entry.role == Role::Stranger && entry.driver.setup().link.was_opened() {
            self.strangers.answered(id);
        }
        let waits_since = if entry.role == Role::Admitted { entry.driver.setup().waits_since() } else { None };
        if waits_since != entry.waits_since {
            entry.waits_since.map(|since| self.stale.remove(&(since, id)));
            self.stale.extend(waits_since.map(|since| (since, id)));
            entry.waits_since = waits_since;
        }
    }

    fn up(&mut self, id: u64, now: Instant) {
        let Some(entry) = self.take(id) else { return };
        let address = entry.driver.address;
        match entry.driver.finish(&self.context, entry.counted) {
            Ok(connection) => {
                self.context.table.context.counters.setups_in.add();
                // Without a place there it gets what it needs with its first chunk.
                let _ = self.fresh.try_send(connection.id());
                self.accepts.push(connection);
                self.sweep_at.get_or_insert(now + SWEEP);
            }
            Err(e) => {
                self.context.table.context.counters.setup_failed(e.kind());
                self.complain(address, &e, now);
            }
        }
    }

    fn fail(&mut self, id: u64, error: &Error, now: Instant) {
        let Some(entry) = self.take(id) else { return };
        let (address, role) = (entry.driver.address, entry.role);
        self.context.table.context.counters.setup_failed(error.kind());
        if role == Role::Stranger && error.kind() != ErrorKind::Auth {
            self.logs.lines.log(log::Level::Info, now, format_args!("{address}: dropped: {error}"));
        } else {
            self.complain(address, error, now);
        }
        let sock = entry.driver.give_up(error);
        if error.kind() != ErrorKind::RemoteDisconnect {
            self.part(sock, now);
        }
    }

    /// Keeps a socket until the peer has read its last bytes.
    fn part(&mut self, sock: TcpStream, now: Instant) {
        while self.farewells.len() >= self.context.limits.strangers {
            self.farewells.pop_first();
        }
        self.last += 1;
        if self.poller.add(sock.as_raw_fd(), self.last, Interest::READ).is_ok() {
            self.farewells.insert(self.last, (sock, now + FAREWELL));
        }
    }

    fn complain(&self, address: SocketAddr, error: &Error, now: Instant) {
        let lines = if error.kind() == ErrorKind::Resource { &self.logs.shortage } else { &self.logs.lines };
        lines.log(log::Level::Warn, now, format_args!("{address}: connection not set up: {error}"));
    }

    /// A refused peer said something, or closed.
    fn farewell(&mut self, id: u64, now: Instant) {
        let mut sink = [0; 4096];
        if let Some((sock, until)) = self.farewells.get_mut(&id) {
            let over = match sock.read(&mut sink) {
                Ok(n) => n == 0 || *until <= now,
                Err(e) => !matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted),
            };
            if over {
                self.farewells.remove(&id);
            }
        }
    }

    // ---- proved peers ----

    /// Lets proved peers begin, in their order, as far as the budgets reach.
    fn admit(&mut self, now: Instant) {
        while self.admission.waiting() > 0 {
            let coming = self.admission.admitted();
            match self.admission.admit() {
                Some(id) => self.begin(id, coming, now),
                None if self.drop_stale(now) => {}
                None => return,
            }
        }
    }

    /// It is the turn of one; `coming` others are under way.
    fn begin(&mut self, id: u64, coming: usize, now: Instant) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.role = Role::Admitted;
        let counted = self.context.quota.count(entry.driver.address.ip()).map(|counted| entry.counted = Some(counted));
        let begun = counted.and_then(|()| self.accepts.room(coming)).and_then(|()| entry.driver.admit(&self.context));
        match begun {
            Ok(()) => self.advance(id, now),
            Err(e) => self.fail(id, &e, now),
        }
    }

    /// Drops the admitted set-up whose peer has been silent the longest, if that is too long while others wait.
    fn drop_stale(&mut self, now: Instant) -> bool {
        match self.stale.first().copied() {
            Some((heard, id)) if now.saturating_duration_since(heard) > STALE => {
                let error = err!(TimedOut, "the peer said nothing for {} s while others waited for their turn", STALE.as_secs());
                self.fail(id, &error, now);
                true
            }
            _ => false,
        }
    }

    // ---- the end ----

    fn forget_all(&mut self) {
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            // What has panicked once may do so again.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(self.take(id))));
        }
    }

    fn end(&mut self) {
        let now = Instant::now();
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            if let Some(entry) = self.take(id) {
                drop(entry.driver.give_up(&canceled()));
            }
        }
        for limiter in [&self.logs.lines, &self.logs.shortage] {
            if let Some(held) = limiter.rest(now) {
                log::warn!("{held} more lines about connections that were not set up were not written");
            }
        }
    }
}
