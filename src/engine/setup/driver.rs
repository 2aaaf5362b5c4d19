//! A set-up with its socket and its channels: moves bytes between the socket and the machine and does what the machine asks for.
//! The set-up thread drives incoming set-ups, a connecting thread its own. Knows nothing about frames.

use super::build::{self, Up};
use super::channels::plan::Plan;
use super::channels::{self, Opened, Raising};
use super::context::SetupContext;
use super::control::{Agreed, Link, Offers, SealedLink};
use super::listener::is_reachable;
use super::machine::{Next, Setup, JOINED};
use super::provided;
use crate::addresses::{plain, AllowList};
use crate::engine::connection::{Begun, Connection, Counts, Socket};
use crate::engine::limits;
use crate::engine::setup::quota::Counted;
use crate::status::{err, Error, ErrorKind, Result};
use crate::wire::control::reset_at_close;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The shortest pause between two polls of channels that are coming up: they send no events. On a fast network all of them are up
/// after two polls.
const LOOK: Duration = Duration::from_micros(20);
/// The pause once channels have been missing for `SLOW_AFTER`: a peer does not answer, and there may be many such set-ups.
const SLOW: Duration = Duration::from_millis(50);
const SLOW_AFTER: Duration = Duration::from_secs(1);
/// Bytes read at once.
const READ: usize = 4096;

enum Channels {
    None,
    Opened(Opened),
    Raising(Raising),
    Up(channels::Up),
}

/// What the set-up is for.
enum Purpose {
    /// A new connection.
    Connection,
    /// The connection of this id, which has lost channels.
    Joins(u64, Begun),
}

/// What a set-up has brought.
pub(crate) enum Finished {
    Connection(Arc<Connection>),
    /// It has joined a connection.
    Joined,
}

/// The result of a step.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Call again when the socket is ready, or at [`SetupDriver::wake_at`].
    Wait,
    /// The peer is authenticated and waits for [`SetupDriver::admit`].
    Proved,
    /// Everything is up: call [`SetupDriver::finish`].
    Up,
}

/// Channels of all sets.
fn count(up: &channels::Up) -> usize {
    up.sets.iter().map(|set| set.pairs.len()).sum()
}

pub(crate) struct SetupDriver {
    sock: TcpStream,
    /// The peer's address.
    pub address: SocketAddr,
    setup: Setup<SealedLink>,
    purpose: Purpose,
    channels: Channels,
    /// Addresses that may be dialled.
    allowed: AllowList,
    /// Where the connector finds the listener later.
    addresses: Vec<SocketAddr>,
    out: Vec<u8>,
    sent: usize,
    /// The peer has closed the connection; what it sent before still counts.
    ended: Option<Error>,
    /// When to poll the channels again, and when they began to come up.
    look_at: Instant,
    began: Instant,
    started: Instant,
    /// Descriptors that its channels will still open.
    promise: Option<limits::Promise>,
}

impl SetupDriver {
    /// Takes over a connected, non-blocking socket.
    pub(crate) fn new(sock: TcpStream, address: SocketAddr, setup: Setup<SealedLink>, now: Instant) -> SetupDriver {
        let address = SocketAddr::new(plain(address.ip()), address.port());
        SetupDriver {
            sock,
            address,
            setup,
            purpose: Purpose::Connection,
            channels: Channels::None,
            allowed: AllowList::default(),
            addresses: Vec::new(),
            out: Vec::new(),
            sent: 0,
            ended: None,
            look_at: now,
            began: now,
            started: now,
            promise: None,
        }
    }

    /// Takes over a socket that was dialled to bring up lost channels of a connection.
    pub(crate) fn joining(
        sock: TcpStream,
        address: SocketAddr,
        setup: Setup<SealedLink>,
        connection: u64,
        begun: Begun,
        now: Instant,
    ) -> SetupDriver {
        SetupDriver { purpose: Purpose::Joins(connection, begun), ..SetupDriver::new(sock, address, setup, now) }
    }

    /// Whether it brings up channels of a connection, or wants to.
    pub(crate) fn joins(&self) -> bool {
        matches!(self.purpose, Purpose::Joins(..)) || self.setup.link.proved().is_some_and(|agreed| agreed.peer.hello.joins)
    }

    /// Logs a step at trace level.
    fn trace(&self, step: std::fmt::Arguments<'_>) {
        log::trace!("set-up with {}: {step}, {:.1?} after its start", self.address, self.started.elapsed());
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }

    pub(crate) fn setup(&self) -> &Setup<SealedLink> {
        &self.setup
    }

    /// Whether to wait for readability, and for writability.
    pub(crate) fn interest(&self) -> (bool, bool) {
        (self.setup.link.wants() > 0, self.sent < self.out.len())
    }

    /// When to call [`SetupDriver::step`] even without an event.
    pub(crate) fn wake_at(&self) -> Instant {
        let deadline = self.setup.deadline();
        match self.channels {
            Channels::Raising(_) => self.look_at.min(deadline),
            _ => deadline,
        }
    }

    /// Goes as far as possible without waiting.
    ///
    /// # Errors
    /// Why the set-up has failed.
    pub(crate) fn step(&mut self, context: &SetupContext, now: Instant) -> Result<Progress> {
        loop {
            self.read(now)?;
            self.flush()?;
            if self.look(context, now)? {
                continue;
            }
            match self.setup.next(now) {
                Ok(Next::Wait | Next::Admit) if self.ended.is_some() => {
                    return Err(self.ended.take().unwrap_or_else(|| self.setup.hung_up()));
                }
                Ok(Next::Wait) => return Ok(Progress::Wait),
                Ok(Next::Admit) => return Ok(Progress::Proved),
                Ok(Next::Finish(theirs)) => {
                    self.flush()?;
                    if let Channels::Up(raised) = std::mem::replace(&mut self.channels, Channels::None) {
                        let raised = channels::agree(raised, &theirs)?;
                        self.trace(format_args!("{} channels are up on both sides", count(&raised)));
                        self.check_provided(context, &raised)?;
                        self.channels = Channels::Up(raised);
                    }
                    return Ok(Progress::Up);
                }
                Ok(Next::PeerHas(theirs)) => {
                    if let Channels::Raising(raising) = &mut self.channels {
                        raising.peer_has(&theirs);
                        self.look_at = now;
                    }
                }
                Ok(Next::Raise(offers)) => {
                    self.check_joined(&offers)?;
                    self.keep_addresses(&offers);
                    self.trace(format_args!("the peer offers {} channels", offers.sets.iter().map(Vec::len).sum::<usize>()));
                    if let Channels::Opened(opened) = std::mem::replace(&mut self.channels, Channels::None) {
                        let link = &self.setup.link;
                        let proof = link.local_keys()?;
                        let keys = |set, index| link.channel_keys(set, index);
                        let raising = opened.establish(context, &offers, keys, proof, &self.allowed)?;
                        self.channels = Channels::Raising(raising);
                        (self.look_at, self.began) = (now, now);
                    }
                }
                Err(e) => return Err(self.with_missing(e)),
            }
        }
    }

    /// Names the missing channels when the deadline has passed.
    fn with_missing(&self, error: Error) -> Error {
        match (&self.channels, error.kind()) {
            (Channels::Raising(raising), ErrorKind::TimedOut) => raising.missing().unwrap_or(error),
            _ => error,
        }
    }

    /// Polls channels that are coming up, when due. Whether they are all up now.
    fn look(&mut self, context: &SetupContext, now: Instant) -> Result<bool> {
        let Channels::Raising(raising) = &mut self.channels else { return Ok(false) };
        if now < self.look_at {
            return Ok(false);
        }
        if raising.poll().map_err(|e| limits::explain(e, self.sock.as_fd()))? {
            if let Channels::Raising(raising) = std::mem::replace(&mut self.channels, Channels::None) {
                let (up, ready) = raising.finish()?;
                // Before this engine says that it is ready, so that the peer's set-up fails with this cause too.
                self.check_provided(context, &up)?;
                self.trace(format_args!("{} channels are up here", ready.numbers.len()));
                self.channels = Channels::Up(up);
                self.setup.raised(ready);
            }
            return Ok(true);
        }
        let slow = now.saturating_duration_since(self.began) > SLOW_AFTER;
        self.look_at = now + raising.retry_in().max(if slow { SLOW } else { LOOK });
        Ok(false)
    }

    /// Checks that what is up is what the engine requires. Channels that come back were there before.
    fn check_provided(&self, context: &SetupContext, up: &channels::Up) -> Result<()> {
        match (&self.purpose, self.setup.link.proved()) {
            (Purpose::Connection, Some(agreed)) => provided::check(context, agreed, up),
            _ => Ok(()),
        }
    }

    fn read(&mut self, now: Instant) -> Result<()> {
        let mut buffer = [0; READ];
        while self.ended.is_none() {
            let wanted = self.setup.link.wants().min(READ);
            if wanted == 0 {
                self.ended = self.gone();
                break;
            }
            match self.sock.read(&mut buffer[..wanted]) {
                Ok(0) => self.ended = Some(self.setup.hung_up()),
                Ok(n) => self.setup.received(&buffer[..n], now)?,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => self.ended = Some(err!(RemoteDisconnect, "{} ({e})", self.setup.hung_up())),
            }
        }
        Ok(())
    }

    /// While the connection is not read: the error if the peer has closed it.
    fn gone(&self) -> Option<Error> {
        let there = match (self.sock.take_error(), self.sock.peek(&mut [0])) {
            (Ok(None), Ok(n)) => n > 0,
            (Ok(None), Err(e)) => matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted),
            _ => false,
        };
        (!there).then(|| self.setup.hung_up())
    }

    fn flush(&mut self) -> Result<()> {
        self.setup.link.output(&mut self.out);
        while self.sent < self.out.len() {
            match self.sock.write(&self.out[self.sent..]) {
                Ok(0) => break,
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // What the peer sent before it closed says more than our failed write: keep reading.
                Err(e) if matches!(e.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset) => break,
                // Nothing may follow bytes that were not sent.
                Err(e) if limits::is_exhaustion(&e) => return Err(limits::system("send", &e)),
                Err(e) => return Err(err!(RemoteDisconnect, "{} ({e})", self.setup.hung_up())),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(())
    }

    /// Opens this engine's listen comms and offers them to the authenticated peer.
    ///
    /// # Errors
    /// `Resource` when descriptors are short; why a plugin cannot listen.
    pub(crate) fn admit(&mut self, context: &SetupContext) -> Result<()> {
        let Some(agreed) = self.setup.link.proved() else { return Err(err!(Internal, "admitted before its proof")) };
        let connecting = agreed.connecting;
        if !connecting && agreed.peer.hello.joins {
            self.purpose = self.joined(context, agreed)?;
        }
        if let Purpose::Joins(..) = self.purpose {
            return self.admit_join(context);
        }
        let mut plans = channels::planned(context, agreed);
        if limits::room_for(&context.limits, self.sock.as_fd(), channels::cost(&plans)).is_err() {
            // The connection comes up without the channels of further GPUs.
            plans.iter_mut().filter(|plan| plan.spare).for_each(|plan| plan.channels = 0);
            limits::room_for(&context.limits, self.sock.as_fd(), channels::cost(&plans))?;
        }
        let later = channels::later(&plans);
        let opened = Opened::open(context, plans, connecting).map_err(|e| limits::explain(e, self.sock.as_fd()))?;
        self.promise = Some(limits::Promise::new(later));
        self.addresses = if connecting { Vec::new() } else { context.addresses.clone() };
        let offers = Offers { addresses: self.addresses.clone(), ..opened.offers() };
        self.trace(format_args!("the peer is proved"));
        self.trace(format_args!("this engine offers {} channels", offers.sets.iter().map(Vec::len).sum::<usize>()));
        self.setup.offer(offers);
        self.channels = Channels::Opened(opened);
        self.allowed = context.config.allow.clone();
        Ok(())
    }

    /// The connection that an authenticated connector wants to join.
    fn joined(&self, context: &SetupContext, agreed: &Agreed) -> Result<Purpose> {
        let Some(join) = self.setup.join() else { return Err(err!(Protocol, "the peer does not say what it joins")) };
        let id = context.table.context.restoring.find(&join.connection);
        let found = id.and_then(|id| context.table.connections.get(id)).filter(|connection| connection.is_up());
        let Some((connection, lineage)) = found.as_ref().and_then(|c| Some((c, c.lineage()?))) else {
            return Err(err!(NotFound, "the connection to join is not open"));
        };
        lineage.admits(agreed)?;
        self.setup.link.check_join(&lineage.ticket, join)?;
        let seats = lineage.seats_of(&join.channels)?;
        let begun = match join.opened {
            None => connection.restorer().begin(seats, Some(join.number))?,
            Some(_) if !seats.is_empty() => return Err(err!(Protocol, "a control connection moves without channels")),
            Some(opened) => connection.restorer().begin_move(Some(join.number), Some(opened))?,
        };
        Ok(Purpose::Joins(connection.id(), begun))
    }

    /// As [`SetupDriver::admit`], for lost channels of a connection.
    fn admit_join(&mut self, context: &SetupContext) -> Result<()> {
        let (Purpose::Joins(_, begun), Some(agreed)) = (&self.purpose, self.setup.link.proved()) else { return Ok(()) };
        let now = Instant::now();
        begun.joining.admits(agreed)?;
        let wanted = |set: usize| begun.seats.iter().filter(|seat| seat.set == set).count();
        let sets = begun.joining.sets.iter().enumerate();
        let plans: Vec<_> = sets.map(|(set, members)| Plan { channels: wanted(set), ..members.plan.clone() }).collect();
        limits::room_for(&context.limits, self.sock.as_fd(), channels::cost(&plans))?;
        let opened = match begun.control {
            Some(_) => Opened::none(),
            None => Opened::reopen(context, &begun.joining, &begun.seats, now)?,
        };
        self.promise = Some(limits::Promise::new(channels::later(&plans)));
        let numbers = begun.seats.iter().map(|seat| seat.number()).collect();
        let join = self.setup.link.join(&begun.joining.ticket, begun.number, numbers, begun.control.map(|counts| counts.ours))?;
        self.setup.end_by(now + JOINED);
        self.setup.offer(Offers { join: Some(join), ..opened.offers() });
        self.channels = Channels::Opened(opened);
        self.allowed = context.config.allow.clone();
        Ok(())
    }

    /// Checks that the peer's offer is for the same connection as this set-up.
    fn check_joined(&mut self, offers: &Offers) -> Result<()> {
        match (&mut self.purpose, &offers.join) {
            (Purpose::Connection, None) => Ok(()),
            (Purpose::Joins(_, begun), Some(join))
                if join.number == begun.number && join.opened.is_some() == begun.control.is_some() =>
            {
                begun.control = begun.control.map(|counts| Counts { theirs: join.opened, ..counts });
                self.setup.link.check_join(&begun.joining.ticket, join)
            }
            _ => Err(err!(Protocol, "the engines do not agree on what the set-up joins")),
        }
    }

    /// A connector keeps the addresses of the listener that may be dialled.
    fn keep_addresses(&mut self, offers: &Offers) {
        if self.setup.link.proved().is_some_and(|agreed| agreed.connecting) {
            let usable =
                |address: &&SocketAddr| is_reachable(address.ip()) && self.allowed.admits(address.ip()) && address.port() > 0;
            self.addresses = offers.addresses.iter().filter(usable).copied().collect();
        }
    }

    /// The connection that has the channels, if it is still open.
    pub(crate) fn still_joins(&self, context: &SetupContext) -> bool {
        match &self.purpose {
            Purpose::Connection => true,
            Purpose::Joins(_, begun) if !begun.joining.holds() => false,
            Purpose::Joins(id, _) => context.table.connections.get(*id).is_some_and(|connection| connection.is_up()),
        }
    }

    /// Gives up: drops the channels and sends the peer the reason. Returns the socket, which may stay open until the peer has
    /// read it.
    pub(crate) fn give_up(mut self, error: &Error) -> TcpStream {
        self.channels = Channels::None;
        if let Purpose::Joins(_, Begun { control: Some(_), .. }) = &self.purpose {
            // The peer may go on over it already: a message or an end of the set-up would end the connection there.
            reset_at_close(&self.sock);
            return self.sock;
        }
        self.setup.fail(error);
        let _ = self.flush();
        // Closing a socket with unread bytes resets it, and the peer could lose the reason.
        let _ = self.sock.shutdown(std::net::Shutdown::Write);
        self.sock
    }

    /// Builds the connection, or hands the channels to the one that they belong to. `counted`: an incoming connection's place in the quota.
    ///
    /// # Errors
    /// `Canceled` when the engine is being destroyed, or the connection has ended; `Resource`.
    pub(crate) fn finish(mut self, context: &SetupContext, counted: Option<Counted>) -> Result<Finished> {
        match std::mem::replace(&mut self.purpose, Purpose::Connection) {
            Purpose::Connection => build::connection(context, self.parts()?, counted).map(Finished::Connection),
            Purpose::Joins(id, begun) => {
                let Up { sock, address, sealed, sets, .. } = self.parts()?;
                let pairs =
                    sets.into_iter().enumerate().flat_map(|(set, raised)| raised.pairs.into_iter().map(move |pair| (set, pair)));
                let pairs: Vec<_> = pairs.collect();
                let Some(connection) = context.table.connections.get(id) else {
                    return Err(err!(Canceled, "the connection has ended"));
                };
                match begun.control {
                    Some(_) => connection.restorer().finish_move(&begun, Socket { sock, address, raw: sealed.raw })?,
                    None if pairs.is_empty() => return Err(err!(Unreachable, "no channel is up in both engines")),
                    None => connection.restorer().finish(&begun, pairs)?,
                }
                Ok(Finished::Joined)
            }
        }
    }

    /// The parts of a connection.
    ///
    /// # Errors
    /// `Internal` before the set-up is complete.
    pub(crate) fn parts(self) -> Result<Up> {
        let (Channels::Up(channels::Up { sets, local }), Some((agreed, sealed))) = (self.channels, self.setup.link.finish())
        else {
            return Err(err!(Internal, "finished before its end"));
        };
        Ok(Up { sock: self.sock, address: self.address, addresses: self.addresses, agreed, sealed, sets, local })
    }
}
