//! The thread that sets up all incoming connections of an engine, driven by epoll. Unauthenticated connections have a small
//! budget and little time; authenticated peers have their own budget, shared fairly between addresses. Knows nothing about the
//! protocol.

use super::accept_queue::{Accepts, Waiting};
use super::admission::Admission;
use super::context::SetupContext;
use super::driver::{Finished, Progress, SetupDriver};
use super::listener;
use super::machine::Setup;
use super::restorer::{Answer, Restorer};
use super::shutdown::canceled;
use crate::engine::connection::Connection;
use crate::engine::limits;
use crate::engine::setup::quota::Counted;
use crate::logging::Limiter;
use crate::net::plugin_thread::{be_impatient, IMPATIENT};
use crate::status::{err, Error, ErrorKind, Result};
use reactor::{Events, Interest, Poller, Waker};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc::SyncSender;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Token of the engine's shutdown; the listening sockets follow, then the set-ups.
const ENDING: u64 = 0;
const FIRST_LISTENER: u64 = 1;
const FIRST_SETUP: u64 = 16;
/// Token of connections that ask for lost channels.
const LOST: u64 = FIRST_SETUP - 1;
/// Sockets accepted from one listening socket before the others get their turn.
const ACCEPT_BURST: usize = 64;
/// Unauthenticated connections allowed while descriptors are short: enough to send peers the reason of a refusal.
const UNAUTHENTICATED_WHEN_SHORT: usize = 8;
/// How long accepting pauses after descriptors ran out.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest that unauthenticated connections may stay when others wait for their places: without a complete first message, and
/// with one.
const SILENT_STAY: Duration = Duration::from_millis(20);
const ANSWERED_STAY: Duration = Duration::from_millis(200);
/// Within this time every connection that waits in the kernel gets a place: so many, or as many as there are if they are more.
const QUEUE_TIME: Duration = Duration::from_millis(500);
const USUAL_QUEUE: usize = 1024;
/// How often connections that wait for accept are checked.
const SWEEP: Duration = Duration::from_millis(100);
/// An authenticated peer that has been silent for this long gives way to waiting ones.
const STALE: Duration = Duration::from_secs(2);
/// How long a refused peer may take to read the reason.
const LINGER: Duration = Duration::from_secs(1);
/// Log lines per second about failed set-ups, and about a shortage of descriptors.
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
    /// The handshake is not complete.
    Unauthenticated,
    /// Authenticated, waits for its turn.
    Queued,
    /// Admitted: its channels may come up.
    Admitted,
    /// Of this engine: brings up lost channels of the connection of this id.
    Outgoing(u64),
}

struct Entry {
    driver: SetupDriver,
    role: Role,
    interest: Interest,
    timer: Instant,
    /// When it arrived.
    since: Instant,
    /// Its key in `stale`.
    waits_since: Option<Instant>,
    /// Its place in the quota.
    counted: Option<Counted>,
}

/// The state of the thread.
struct Acceptor {
    context: Arc<SetupContext>,
    accepts: Arc<Accepts<Connection>>,
    listeners: Vec<TcpListener>,
    poller: Poller,
    last: u64,
    /// By id, in the order of arrival.
    entries: BTreeMap<u64, Entry>,
    timers: BTreeSet<(Instant, u64)>,
    unauthenticated: Unauthenticated,
    admission: Admission,
    /// Admitted set-ups that wait for their peers alone, by the time of the peer's last bytes.
    stale: BTreeSet<(Instant, u64)>,
    /// Sockets of refused peers, which may still read the reason.
    lingering: BTreeMap<u64, (TcpStream, Instant)>,
    /// Connections whose GPU memory is to be prepared.
    fresh: SyncSender<u64>,
    pauses: Pauses,
    restorer: Restorer,
    logs: Logs,
}

/// When accepting goes on, and when connections that wait for accept are checked.
#[derive(Default)]
struct Pauses {
    paused_until: Option<Instant>,
    sweep_at: Option<Instant>,
}

/// Unauthenticated connections by id: without a complete first message, and with one.
#[derive(Default)]
struct Unauthenticated {
    beginning: BTreeSet<u64>,
    answered: BTreeSet<u64>,
}

impl Unauthenticated {
    fn count(&self) -> usize {
        self.beginning.len() + self.answered.len()
    }

    fn remove(&mut self, id: u64) {
        if !self.beginning.remove(&id) {
            self.answered.remove(&id);
        }
    }

    /// Its first message is complete and has been answered.
    fn answered(&mut self, id: u64) {
        if self.beginning.remove(&id) {
            self.answered.insert(id);
        }
    }
}

/// Limiters for log lines about peers, and about shortages in this process.
struct Logs {
    lines: Limiter,
    shortage: Limiter,
}

/// Starts the thread. It sends the ids of connections that are up to `fresh`.
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
        // Set-ups over other plugins go on meanwhile.
        be_impatient(IMPATIENT);
        while !acceptor.context.shutdown.begun() {
            // A panic in one set-up must not close the port for good.
            let round = std::panic::AssertUnwindSafe(|| acceptor.run());
            if std::panic::catch_unwind(round).is_err() {
                log::error!("a connection set-up panicked: all incoming set-ups in progress are dropped");
                acceptor.forget_all();
                std::thread::sleep(PAUSE);
            }
        }
        acceptor.end();
    })
}

/// How long unauthenticated connections may stay, by kind, with this many places and so many others waiting in the kernel. With few
/// places the time is short: a peer in the kernel's queue soon gets a place, and finds its bytes already received.
fn stays(places: usize, waiting: usize) -> [Duration; 2] {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let share = QUEUE_TIME.saturating_mul(number(places)) / number(waiting.max(USUAL_QUEUE));
    [share.min(SILENT_STAY), share.min(ANSWERED_STAY)]
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
        poller.add(context.table.context.restoring.wakes(Waker::new()?), LOST, Interest::READ)?;
        for (listener, token) in listeners.iter().zip(FIRST_LISTENER..LOST) {
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
            unauthenticated: Unauthenticated::default(),
            admission: Admission::new(limits.incoming, limits.per_peer),
            stale: BTreeSet::new(),
            lingering: BTreeMap::new(),
            fresh,
            pauses: Pauses::default(),
            restorer: Restorer::default(),
            logs: Logs { lines: Limiter::new(LINES), shortage: Limiter::new(1) },
        })
    }

    fn run(&mut self) {
        let mut events = Events::with_capacity(256);
        while !self.context.shutdown.begun() {
            if let Err(e) = self.poller.wait(&mut events, self.timeout()) {
                self.logs.shortage.log(log::Level::Error, Instant::now(), format_args!("cannot wait for set-ups: {e}"));
                std::thread::sleep(PAUSE);
            }
            let now = Instant::now();
            for event in events.iter() {
                match event.token() {
                    ENDING => return,
                    LOST => {}
                    token if token < FIRST_SETUP => self.arrivals((token - FIRST_LISTENER) as usize, now),
                    id if self.lingering.contains_key(&id) => self.on_lingering(id, now),
                    id if self.restorer.dials(id) => self.dialled(id, now),
                    id => self.advance(id, now),
                }
            }
            self.on_time(now);
            self.restore(now);
            self.admit(now);
        }
    }

    /// How long to wait for events before a timer is due.
    fn timeout(&self) -> Option<Duration> {
        let timer = self.timers.first().map(|(at, _)| *at);
        // Ids are in the order of age.
        let lingering = self.lingering.first_key_value().map(|(_, (_, until))| *until);
        let first = [timer, lingering, self.pauses.paused_until, self.pauses.sweep_at, self.restorer.wake_at()]
            .into_iter()
            .flatten()
            .min()?;
        let left = first.saturating_duration_since(Instant::now());
        // A waiting set-up may be admitted when another becomes stale, which has no timer.
        Some(if self.admission.waiting() == 0 { left } else { left.min(STALE / 4) })
    }

    fn on_time(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timers.first() {
            if at > now {
                break;
            }
            // The timer has expired, whatever comes of it.
            self.timers.remove(&(at, id));
            self.advance(id, now);
        }
        while self.lingering.first_key_value().is_some_and(|(_, (_, until))| *until <= now) {
            self.lingering.pop_first();
        }
        if self.pauses.paused_until.is_some_and(|until| until <= now) {
            self.pauses.paused_until = None;
            self.listen(Interest::READ);
        }
        if self.pauses.sweep_at.is_some_and(|at| at <= now) {
            self.pauses.sweep_at = self.accepts.sweep().then_some(now + SWEEP);
        }
    }

    fn listen(&self, interest: Interest) {
        for (listener, token) in self.listeners.iter().zip(FIRST_LISTENER..LOST) {
            let _ = self.poller.modify(listener.as_raw_fd(), token, interest);
        }
    }

    // ---- unauthenticated connections ----

    fn arrivals(&mut self, listener: usize, now: Instant) {
        for _ in 0..ACCEPT_BURST {
            if let Err(wait) = self.make_room(listener, now) {
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
                    self.drop_unauthenticated(now, [Duration::ZERO, ANSWERED_STAY], true);
                    return self.pause(now, PAUSE);
                }
                // The peer disconnected between its connect and our accept.
                Err(_) => {}
            }
        }
    }

    /// Stops accepting for a while; connections wait in the kernel's backlog.
    fn pause(&mut self, now: Instant, time: Duration) {
        self.pauses.paused_until = Some(now + time);
        self.listen(Interest::NONE);
    }

    /// Makes room for one more unauthenticated connection, dropping another if need be.
    ///
    /// # Errors
    /// How long to wait when none can be dropped yet.
    fn make_room(&mut self, listener: usize, now: Instant) -> std::result::Result<(), Duration> {
        let limits = &self.context.limits;
        let Some(listener) = self.listeners.get(listener) else { return Ok(()) };
        let short = limits::lowest_free(listener.as_raw_fd()).map_or(true, |lowest| lowest >= limits.ceiling);
        let most = if short { UNAUTHENTICATED_WHEN_SHORT.min(limits.unauthenticated) } else { limits.unauthenticated };
        if self.unauthenticated.count() < most {
            return Ok(());
        }
        let stays = stays(most, listener::waiting(listener));
        while self.unauthenticated.count() >= most {
            if !self.drop_unauthenticated(now, stays, short) {
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
        let entry = Entry {
            driver,
            role: Role::Unauthenticated,
            interest: Interest::READ,
            timer,
            since: now,
            waits_since: None,
            counted: None,
        };
        self.entries.insert(self.last, entry);
        self.unauthenticated.beginning.insert(self.last);
        // An engine's first message is one packet, which has usually arrived with the connection.
        self.advance(self.last, now);
    }

    /// Drops the oldest connection without a complete first message, or else the oldest with one, if it has stayed as long as
    /// `stays` allows for its kind. Returns whether one was dropped. A peer that speaks the protocol gets a refusal after which it tries again, unless
    /// descriptors are `short`.
    fn drop_unauthenticated(&mut self, now: Instant, stays: [Duration; 2], short: bool) -> bool {
        // Ids are in the order of arrival.
        let old = |id: &u64, least| self.entries.get(id).is_some_and(|e| now.saturating_duration_since(e.since) >= least);
        let beginning = self.unauthenticated.beginning.first().copied().filter(|id| old(id, stays[0]));
        let answered = || self.unauthenticated.answered.first().copied().filter(|id| old(id, stays[1]));
        let Some(id) = beginning.or_else(answered) else { return false };
        if let Some(entry) = self.take(id) {
            self.context.table.context.counters.setup_failed(ErrorKind::Resource);
            let address = entry.driver.address;
            self.logs.lines.log(
                log::Level::Warn,
                now,
                format_args!("{address}: dropped before it completed the handshake: other connections wait"),
            );
            if !entry.driver.setup().is_silent() {
                let sock = entry.driver.give_up(&err!(Resource, "too many other connections are being set up: try again"));
                if !short {
                    self.linger(sock, now);
                }
            }
        }
        true
    }

    // ---- one set-up ----

    /// Removes a set-up from all tables.
    fn take(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.timers.remove(&(entry.timer, id));
        let _ = self.poller.remove(entry.driver.fd());
        match entry.role {
            Role::Unauthenticated => self.unauthenticated.remove(id),
            Role::Queued => self.admission.leave(id, entry.driver.address.ip()),
            Role::Admitted => {
                self.admission.done(entry.driver.address.ip());
                entry.waits_since.map(|since| self.stale.remove(&(since, id)));
            }
            Role::Outgoing(_) => {}
        }
        Some(entry)
    }

    fn advance(&mut self, id: u64, now: Instant) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if !entry.driver.still_joins(&self.context) {
            return self.fail(id, &err!(Canceled, "the connection has ended"), now);
        }
        match entry.driver.step(&self.context, now) {
            Ok(Progress::Wait) => {}
            Ok(Progress::Proved) if entry.role == Role::Unauthenticated => {
                entry.role = Role::Queued;
                let ip = entry.driver.address.ip();
                self.unauthenticated.remove(id);
                self.admission.wait(id, ip);
                let most = self.context.limits.incoming;
                if self.admission.waiting() > most {
                    return self.fail(id, &err!(Resource, "{most} connection set-ups already wait for their turn"), now);
                }
            }
            Ok(Progress::Proved) if matches!(entry.role, Role::Outgoing(_)) => match entry.driver.admit(&self.context) {
                Ok(()) => return self.advance(id, now),
                Err(e) => return self.fail(id, &e, now),
            },
            Ok(Progress::Proved) => {}
            Ok(Progress::Up) => return self.up(id, now),
            Err(e) => return self.fail(id, &e, now),
        }
        self.rearm(id);
    }

    /// Updates the events, the timer and the tables of a set-up.
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
        if entry.role == Role::Unauthenticated && entry.driver.setup().link.was_opened() {
            self.unauthenticated.answered(id);
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
        let (address, joins) = (entry.driver.address, entry.driver.joins());
        match entry.driver.finish(&self.context, entry.counted) {
            Ok(Finished::Joined) => {
                if let Role::Outgoing(connection) = entry.role {
                    let lost = |c: Arc<Connection>| c.restorer().lost().ok();
                    let lost = self.context.table.connections.get(connection).and_then(lost).unwrap_or_default();
                    let still: Vec<u16> = lost.iter().map(|seat| seat.channel).collect();
                    self.restorer.restored(connection, &still, now);
                }
            }
            Ok(Finished::Connection(connection)) => {
                self.context.table.context.counters.setups_in.add();
                // If the queue is full, GPU memory is prepared with the first chunk.
                let _ = self.fresh.try_send(connection.id());
                self.accepts.push(connection);
                self.context.table.context.events.happened();
                self.pauses.sweep_at.get_or_insert(now + SWEEP);
            }
            Err(e) => match entry.role {
                Role::Outgoing(connection) => self.not_restored(connection, &e, now),
                _ => self.set_up_failed(address, joins, &e, now),
            },
        }
    }

    // ---- lost channels of this engine's connections ----

    /// Begins the set-ups that are due, and takes what was asked for.
    fn restore(&mut self, now: Instant) {
        let asked = self.context.table.context.restoring.take();
        asked.connections.iter().for_each(|(&id, channels)| self.restorer.lost(id, channels, now));
        asked.urgent.into_iter().for_each(|id| self.restorer.suspended(id, now));
        if asked.retry_now {
            self.restorer.retry_now(now);
        }
        while let Some(id) = self.restorer.next(now) {
            self.last += 1;
            let number = self.last;
            match self.restorer.dial(&self.context, id, number, now) {
                Ok(None) => self.restorer.rests(id),
                Ok(Some(fd)) => {
                    // Without an event its time runs out.
                    let _ = self.poller.add(fd, number, Interest::WRITE);
                }
                Err(e) => self.not_restored(id, &e, now),
            }
        }
        while let Some(number) = self.restorer.late(now) {
            self.dialled(number, now);
        }
    }

    /// The peer has answered a dial, or has not in time.
    fn dialled(&mut self, id: u64, now: Instant) {
        let (connection, driver) = match self.restorer.answered(&self.context, id, now) {
            None => return,
            Some(Answer::Dials(fd)) => {
                let _ = self.poller.add(fd, id, Interest::WRITE);
                return;
            }
            Some(Answer::SetUp(connection, Err(e))) => return self.not_restored(connection, &e, now),
            Some(Answer::SetUp(connection, Ok(driver))) => (connection, *driver),
        };
        let (fd, interest) = (driver.fd(), Interest::READ | Interest::WRITE);
        let timer = driver.wake_at();
        self.timers.insert((timer, id));
        let role = Role::Outgoing(connection);
        self.entries.insert(id, Entry { driver, role, interest, timer, since: now, waits_since: None, counted: None });
        match self.poller.modify(fd, id, interest) {
            Ok(()) => self.advance(id, now),
            Err(e) => self.fail(id, &limits::system("epoll", &e), now),
        }
    }

    /// A set-up that was to join a connection has failed.
    fn not_restored(&mut self, id: u64, error: &Error, now: Instant) {
        log::debug!("connection {id} stays as it is for now: {error}");
        if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Auth) {
            // Its peer has ended. That ends it only where its control connection has failed.
            self.context.table.connections.get(id).into_iter().for_each(|c| c.restorer().give_up_control(error));
        }
        self.restorer.ended(id, now);
    }

    fn fail(&mut self, id: u64, error: &Error, now: Instant) {
        let Some(entry) = self.take(id) else { return };
        let (address, role) = (entry.driver.address, entry.role);
        if let Role::Outgoing(connection) = role {
            self.not_restored(connection, error, now);
            return drop(entry.driver.give_up(error));
        }
        // An engine with another key or of another version is worth a warning; one that speaks another protocol is not.
        let is_engine = error.kind() == ErrorKind::Auth || entry.driver.setup().link.is_of_another_version();
        if role == Role::Unauthenticated && !is_engine {
            self.context.table.context.counters.setup_failed(error.kind());
            self.logs.lines.log(log::Level::Info, now, format_args!("{address}: dropped: {error}"));
        } else {
            self.set_up_failed(address, entry.driver.joins(), error, now);
        }
        let sock = entry.driver.give_up(error);
        if error.kind() != ErrorKind::RemoteDisconnect {
            self.linger(sock, now);
        }
    }

    /// Keeps a socket open until the peer has read its last bytes.
    fn linger(&mut self, sock: TcpStream, now: Instant) {
        while self.lingering.len() >= self.context.limits.unauthenticated {
            self.lingering.pop_first();
        }
        self.last += 1;
        if self.poller.add(sock.as_raw_fd(), self.last, Interest::READ).is_ok() {
            self.lingering.insert(self.last, (sock, now + LINGER));
        }
    }

    /// An authenticated set-up has failed. `joins`: it was to bring up lost channels, which the peer tries again.
    fn set_up_failed(&self, address: SocketAddr, joins: bool, error: &Error, now: Instant) {
        if joins && !matches!(error.kind(), ErrorKind::Auth | ErrorKind::Protocol) {
            return log::debug!("{address}: lost channels stay lost for now: {error}");
        }
        self.context.table.context.counters.setup_failed(error.kind());
        self.log_failure(address, error, now);
    }

    fn log_failure(&self, address: SocketAddr, error: &Error, now: Instant) {
        let lines = if error.kind() == ErrorKind::Resource { &self.logs.shortage } else { &self.logs.lines };
        lines.log(log::Level::Warn, now, format_args!("{address}: connection not set up: {error}"));
    }

    /// A refused peer has sent something, or closed.
    fn on_lingering(&mut self, id: u64, now: Instant) {
        let mut sink = [0; 4096];
        if let Some((sock, until)) = self.lingering.get_mut(&id) {
            let over = match sock.read(&mut sink) {
                Ok(n) => n == 0 || *until <= now,
                Err(e) => !matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted),
            };
            if over {
                self.lingering.remove(&id);
            }
        }
    }

    // ---- authenticated peers ----

    /// Admits authenticated peers in their order, as far as the budgets reach.
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

    /// Starts the set-up of an admitted peer; `coming` others are in progress.
    fn begin(&mut self, id: u64, coming: usize, now: Instant) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.role = Role::Admitted;
        // One that joins a connection adds none.
        let counted = match entry.driver.joins() {
            true => Ok(()),
            false => {
                let counted = self.context.quota.count(entry.driver.address.ip()).map(|counted| entry.counted = Some(counted));
                counted.and_then(|()| self.accepts.room(coming))
            }
        };
        let begun = counted.and_then(|()| entry.driver.admit(&self.context));
        match begun {
            Ok(()) => self.advance(id, now),
            Err(e) => self.fail(id, &e, now),
        }
    }

    /// Drops the admitted set-up whose peer has been silent the longest, if it is stale.
    fn drop_stale(&mut self, now: Instant) -> bool {
        match self.stale.first().copied() {
            Some((received, id)) if now.saturating_duration_since(received) > STALE => {
                let error = err!(TimedOut, "the peer was silent for {} s while other set-ups waited", STALE.as_secs());
                self.fail(id, &error, now);
                true
            }
            _ => false,
        }
    }

    // ---- shutdown ----

    fn forget_all(&mut self) {
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            if let Some(Role::Outgoing(connection)) = self.entries.get(&id).map(|entry| entry.role) {
                self.restorer.ended(connection, Instant::now());
            }
            // A set-up that has panicked may do so again.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(self.take(id))));
        }
    }

    fn end(&mut self) {
        let now = Instant::now();
        self.restorer.end();
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            if let Some(entry) = self.take(id) {
                drop(entry.driver.give_up(&canceled()));
            }
        }
        for limiter in [&self.logs.lines, &self.logs.shortage] {
            if let Some(held) = limiter.rest(now) {
                log::warn!("suppressed {held} further messages about failed connection set-ups");
            }
        }
    }
}
