//! The direct transport to a process of the same host: what its two flows, its grants and its messages are for, joined. Knows nothing of
//! channels, frames and transfers but their keys.

use super::blocks::SMALL;
use super::copies::{Copies, Done, Owner};
use super::exports::{Imports, Reach, Shares, Stretch};
use super::gather;
use super::grants::{Claim, Grants, Leases};
use super::layout::WINDOW;
use super::link::Linked;
use super::locate::cover;
use super::memory::host::{self, HostMemory};
use super::memory::pool::Bell;
use super::messages::{self, Granted, Message, MAX_EXPORTS};
use super::orders::{self, Orders};
use super::read::{self, Reads, Source};
use super::ring::Listening;
use super::socket::{Received, Socket, Who, MAX_MESSAGE};
use super::staged::Staged;
use super::write::{Target, Writes};
use crate::direct::{Activity, Direct, Event, Pairing, Route, Start, Way};
use crate::region::{Hold, Region, RegionUse};
use crate::stats::{ChannelStats, DIRECT};
use crate::status::{bail, err, Error, Result};
use crate::types::{Key, Landing, Place, RemoteAccess};
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Instant;

/// Messages of the peer that are read in one round.
const MESSAGES: usize = 64;
/// Messages that may wait for a peer that does not read.
const MAX_WAITING: usize = 1 << 16;

/// Finds a registered region by its id and token.
pub(crate) type Lookup = Box<dyn Fn(u64, &[u8; 16]) -> Result<RegionUse> + Send>;

/// How the transport's socket is watched.
pub(crate) struct Watched {
    /// To be watched for something to read, edges only.
    pub fd: RawFd,
    /// To be set whenever there is something.
    pub news: Arc<AtomicBool>,
    /// The switch of the peer's doorbell.
    pub listening: Listening,
}

/// The peer's process, and what waits to be sent to it.
struct Wire {
    socket: Socket,
    who: Who,
    /// Pairs of places, here and there, between which the engine at the destination copies out of the other's memory.
    pairs: Vec<(Place, Place)>,
    /// Pairs that NVLink joins.
    nvlink: Vec<(Place, Place)>,
    /// Answers and rings.
    outbox: VecDeque<Message>,
    /// Something came on the socket, or waits to leave.
    news: Arc<AtomicBool>,
}

impl Wire {
    fn joins(&self, here: Place, there: Place) -> bool {
        self.pairs.contains(&(here, there))
    }

    /// Whether bytes of such a pair of places cross NVLink.
    fn by_nvlink(&self, here: Place, there: Place) -> bool {
        self.nvlink.contains(&(here, there))
    }

    fn wake(&self) {
        self.news.store(true, Ordering::Release);
    }
}

/// The transport of one connection. One caller at a time uses it, under the lock of the connection.
///
/// - Decide and start: [`Direct::route`] says how a transfer can go and claims what it needs of the peer. After `Direct`, and only then,
///   [`Direct::start`] begins it, in the same call of the machine, since a grant may end between two. After `Wait`, ask again at
///   [`Event::Answered`].
/// - Messages: [`Direct::can_send`] before a message is offered; [`Direct::land`] grants the buffer that it goes to, and
///   [`Direct::withdraw`] takes the grant back. The sender starts with the landing and needs no route.
/// - Drive: the thread that drives the connection calls [`Direct::progress`] while [`Activity::active`] holds. It reads what the peer says,
///   starts copies for orders in the ring, and reports copies that have moved or ended. Small copies are made by the thread that calls, large
///   ones by threads of the pool. The engine sets `news` of [`OneHost::watched`] when the socket has something: the peer wakes a sleeping
///   engine by a message there. The pool rings the engine's bell.
/// - Regions: [`Direct::offer`] when one is registered, [`Direct::forget`] when one has ended, and memory is given back only when
///   [`Direct::uses_region`] is false.
/// - The getters, [`Direct::activity`], [`Direct::uses_region`], [`Direct::flowed`], [`Direct::describe`] and [`Direct::stats`], never change
///   anything.
/// - An error ends the connection. Dropping it comes last: it closes the ring, waits for its own copies, and keeps for ever the memory of
///   those that do not end.
pub(crate) struct OneHost {
    wire: Wire,
    lookup: Lookup,
    /// GPUs of the peer whose memory is in use: regions are announced for them in advance.
    likely: Vec<Place>,
    copies: Copies,
    shares: Shares,
    imports: Imports,
    grants: Grants,
    leases: Leases,
    reads: Reads,
    writes: Writes,
    orders: Orders,
    staged: Staged,
    /// Bytes that arrived at this engine.
    received: u64,
    /// The peer has answered a claim, or said that it can reach an allocation.
    answered: bool,
    /// Reads whose region had ended when they were started.
    late: Vec<Key>,
}

impl OneHost {
    /// `bell`: rung when a thread has ended a copy; `likely`: GPUs of the peer whose memory is in use.
    pub(crate) fn new(linked: Linked, bell: Bell, likely: Vec<Place>, lookup: Lookup) -> OneHost {
        let Linked { socket, who, mut host, device, inn, out, mut pairs, pushed, nvlink, .. } = linked;
        pairs.retain(|pair| !pushed.contains(pair));
        if let Some(host) = &mut host {
            host.set_bell(bell);
        }
        let (grants, leases) = (Grants::new(out.shared()), Leases::new(inn.shared()));
        let imports = Imports::of(host.as_ref().and_then(HostMemory::process));
        let news = Arc::new(AtomicBool::new(true));
        OneHost {
            wire: Wire { socket, who, pairs, nvlink, outbox: VecDeque::new(), news },
            lookup,
            likely,
            copies: Copies::new(host, device),
            shares: Shares::default(),
            imports,
            grants,
            leases,
            reads: Reads::default(),
            writes: Writes::new(out),
            orders: Orders::new(inn),
            staged: Staged::new(pushed),
            received: 0,
            answered: false,
            late: Vec::new(),
        }
    }

    /// What the engine watches for it.
    pub(crate) fn watched(&self) -> Watched {
        Watched { fd: self.wire.socket.fd(), news: self.wire.news.clone(), listening: self.writes.out.listening() }
    }

    // ---- which way a transfer goes ----

    /// Whether the peer can read a region of this engine for its memory at `there`.
    fn share(&mut self, region: &Region, there: Place) -> Reach<()> {
        match (region.place.is_device(), &mut self.copies.device) {
            (false, _) if region.is_readable(host::is_readable) => Reach::Yes(()),
            (true, Some(device)) if self.wire.joins(region.place, there) => self.shares.share(region, there, &mut **device),
            _ => Reach::No,
        }
    }

    /// Where a pairing's blocks are read from.
    fn source(&self, pairing: &Pairing, granted: &Granted) -> Reach<Source> {
        if !granted.direct.read {
            return Reach::No;
        }
        let stretches = match self.imports.range(&granted.exports, pairing.here, pairing.far) {
            Reach::Yes(stretches) if !pairing.here.is_device() || cover(&stretches, pairing.far) => stretches,
            Reach::Pending => return Reach::Pending,
            _ => return Reach::No,
        };
        Reach::Yes(Source { slot: granted.slot, generation: granted.generation, stretches })
    }

    /// Where a pairing's blocks come from, for the peer. `slot`, `generation`: the grant that it writes.
    fn target(&mut self, pairing: &Pairing, (slot, generation): (u32, u64), hold: &Hold) -> Reach<Target> {
        let Some(region) = hold.region_to_share(pairing.local) else { return Reach::No };
        match self.share(region, pairing.there) {
            Reach::Yes(()) => {}
            Reach::Pending => {
                // It is announced for the first time.
                self.wire.wake();
                return Reach::Pending;
            }
            Reach::No => return Reach::No,
        }
        let mut stretches: Vec<Stretch> = Vec::new();
        if pairing.here.is_device() {
            stretches = self.shares.stretches(region.span.id, pairing.there, pairing.near).to_vec();
            if !cover(&stretches, pairing.near) {
                return Reach::No;
            }
        }
        Reach::Yes(Target { slot, generation, stretches })
    }

    /// How one pairing of a transfer can go.
    fn route_pairing(&mut self, way: Way, pairing: &Pairing, hold: &Hold) -> Route {
        let staged = self.staged.joins(pairing.here, pairing.there);
        if staged {
            self.staged.provide(pairing.here, &mut self.copies);
        }
        let granted = match self.leases.claim(pairing.region, pairing.token, pairing.here) {
            Claim::Granted(granted) => granted,
            Claim::Asked => {
                self.wire.wake();
                // Meanwhile the source is announced, which the peer is to read.
                if !staged && way == Way::Out && self.target(pairing, (0, 0), hold) == Reach::No {
                    return Route::Channels;
                }
                return Route::Wait;
            }
            Claim::Channels => return Route::Channels,
            Claim::Refused(error) => return Route::Refused(error),
        };
        if let Some(error) = forbidden(way, pairing, &granted) {
            return Route::Refused(error);
        }
        if !self.leases.stands(granted.slot, granted.generation) {
            return Route::Refused(err!(RemoteAccess, "region {} is no longer registered", granted.region));
        }
        if staged {
            return self.staged.route(way, pairing, &granted);
        }
        let reach = match way {
            Way::In => self.source(pairing, &granted).drop_value(),
            Way::Out if !granted.direct.write => Reach::No,
            Way::Out => self.target(pairing, (granted.slot, granted.generation), hold).drop_value(),
        };
        match reach {
            Reach::Yes(()) => Route::Direct,
            Reach::Pending => Route::Wait,
            Reach::No => Route::Channels,
        }
    }

    fn start_read(&mut self, transfer: &mut Start<'_>) -> Result<()> {
        let mut sources = Vec::with_capacity(transfer.pairings.len());
        for pairing in transfer.pairings {
            let Claim::Granted(granted) = self.leases.claim(pairing.region, pairing.token, pairing.here) else {
                bail!(Internal, "a read of region {}, which is not granted", pairing.region)
            };
            match self.source(pairing, &granted) {
                Reach::Yes(source) => sources.push(source),
                _ => bail!(Internal, "a read of region {}, which cannot be reached", pairing.region),
            }
        }
        let place = transfer.pairings.first().map_or(Place::HOST, |pairing| pairing.here);
        let mut around = read::Around { copies: &mut self.copies, imports: &mut self.imports, leases: &self.leases };
        if !self.reads.start(transfer, sources, place, &mut around)? {
            self.late.push(transfer.key);
        }
        Ok(())
    }

    /// Slot and generation of the grant that a transfer uses: the peer's landing for a message, which has no region to claim, or that of
    /// the region.
    fn granted(&mut self, landing: Option<Landing>, pairing: &Pairing) -> Result<(u32, u64)> {
        if let Some(landing) = landing {
            return Ok((landing.slot, landing.generation));
        }
        match self.leases.claim(pairing.region, pairing.token, pairing.here) {
            Claim::Granted(granted) => Ok((granted.slot, granted.generation)),
            _ => bail!(Internal, "a transfer of region {}, which is not granted", pairing.region),
        }
    }

    fn start_write(&mut self, transfer: &mut Start<'_>, landing: Option<Landing>) -> Result<()> {
        let mut targets = Vec::with_capacity(transfer.pairings.len());
        for pairing in transfer.pairings {
            let grant = self.granted(landing, pairing)?;
            match self.target(pairing, grant, transfer.hold) {
                Reach::Yes(target) => targets.push(target),
                _ => bail!(Internal, "a write from region {}, which the peer cannot read", pairing.local),
            }
        }
        let nvlink = transfer.pairings.iter().any(|pairing| self.wire.by_nvlink(pairing.here, pairing.there));
        self.writes.start(transfer, targets, nvlink)?;
        self.ring_if(true);
        Ok(())
    }

    fn start_staged(&mut self, transfer: &mut Start<'_>, landing: Option<Landing>) -> Result<()> {
        let mut sources = Vec::with_capacity(transfer.pairings.len());
        for pairing in transfer.pairings {
            let (slot, generation) = self.granted(landing, pairing)?;
            sources.push(gather::Source { slot, generation, here: pairing.here });
        }
        let OneHost { copies, imports, writes, staged, .. } = self;
        staged.start(transfer, sources, &mut gather::Around { copies, imports, out: &mut writes.out })?;
        self.ring_if(true);
        Ok(())
    }

    // ---- messages ----

    /// Reads messages of the peer's process; whether there may be more.
    fn receive(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        let mut buffer = [0; MAX_MESSAGE];
        for _ in 0..MESSAGES {
            if self.imports.is_full() {
                break;
            }
            let message = match self.wire.socket.receive(&mut buffer)? {
                Received::Message(n, fds) => Message::decode(&buffer[..n], fds)?,
                Received::Cut(n) => {
                    // Channels carry what it would have shared.
                    if let Some(id) = messages::share_of(&buffer[..n]) {
                        self.wire.outbox.push_back(self.imports.missed(id)?);
                    }
                    continue;
                }
                // The control connection reports why it ended.
                Received::Nothing | Received::End => return Ok(false),
            };
            self.take(message, events)?;
        }
        self.wire.wake();
        Ok(true)
    }

    fn take(&mut self, message: Message, events: &mut Vec<Event>) -> Result<()> {
        match (message, &mut self.copies.device) {
            (Message::Ring, _) => {}
            (Message::Answer { id, open }, _) => {
                self.shares.answered(id, open)?;
                self.answered = true;
            }
            (Message::Share { id, there, here, export }, Some(_)) if self.wire.joins(here, there) => {
                self.imports.announced(id, (here, self.wire.by_nvlink(here, there)), export)?;
            }
            (Message::End { id }, Some(device)) => self.imports.ended(id, &mut **device)?,
            (Message::Claim { region, token, place }, _) => self.claimed((region, token, place), events)?,
            (Message::Area { there, here, export }, _) if self.staged.joins(here, there) => {
                self.staged.announced(here, there, export)?;
                if self.staged.takes_messages(here, there) {
                    self.staged.provide(here, &mut self.copies);
                }
            }
            (Message::Grant(granted), _) if self.staged.joins(granted.here, granted.there) => {
                self.staged.open(granted.here, granted.there, &mut self.copies);
                self.leases.granted(*granted)?;
                self.answered = true;
            }
            (Message::Grant(granted), _) if self.wire.joins(granted.here, granted.there) => {
                self.leases.granted(*granted)?;
                self.answered = true;
            }
            (Message::Refuse { region, token, place, why }, _) => {
                self.leases.refused((region, token, place), why)?;
                self.answered = true;
            }
            (Message::Revoke { slot, generation }, _) => self.leases.revoked(slot, generation)?,
            (message, _) => bail!(Protocol, "the peer's process sent a message that was not agreed on: {message:?}"),
        }
        Ok(())
    }

    /// The peer claims a region for its memory at `there`.
    fn claimed(&mut self, (region, token, there): (u64, [u8; 16], Place), events: &mut Vec<Event>) -> Result<()> {
        let why = match (self.lookup)(region, &token) {
            Ok(used) if self.grants.has(region, there) => {
                bail!(Protocol, "the peer claims region {} again", used.span.id)
            }
            Ok(used) => match self.grant(&used, there) {
                true => return Ok(()),
                false => None,
            },
            Err(e) => {
                events.push(Event::Denied(e.clone()));
                Some((e.code(), e.to_str().to_owned()))
            }
        };
        self.wire.outbox.push_back(Message::Refuse { region, token, place: there, why });
        Ok(())
    }

    /// Grants a region whose token the peer has shown; `false` where direct transfers cannot reach it.
    fn grant(&mut self, region: &RegionUse, there: Place) -> bool {
        if self.staged.joins(region.place, there) {
            let direct = self.staged.access(region.place, there, &mut self.copies);
            // The peer must learn of its end.
            region.to_share();
            return (direct.read || direct.write) && self.grants.give(region.region(), there, direct, Vec::new());
        }
        if !self.wire.joins(region.place, there) {
            return false;
        }
        // The peer must learn of its end.
        let readable = self.share(region.to_share(), there) != Reach::No;
        let exports = match region.place.is_device() {
            true => self.shares.exports(region.span.id, there).filter(|ids| ids.len() <= MAX_EXPORTS),
            false => Some(Vec::new()),
        };
        let direct = RemoteAccess { read: readable && exports.is_some(), write: true };
        self.grants.give(region.region(), there, direct, exports.filter(|_| readable).unwrap_or_default())
    }

    /// Opens what the peer shares, one allocation at a time, and sends what waits; whether something was opened.
    fn answer(&mut self) -> Result<bool> {
        let mut opened = false;
        if let (Some(device), true) = (&mut self.copies.device, self.imports.waiting()) {
            self.wire.outbox.extend(self.imports.open_one(&mut **device));
            (self.answered, opened) = (true, true);
        }
        let OneHost { wire: Wire { socket, outbox, .. }, shares, grants, leases, copies, staged, .. } = self;
        // A claim and a grant need areas: the peer learns of them first.
        while send(socket, staged.outbox())? {}
        if staged.speaks() {
            return Ok(opened);
        }
        loop {
            if let Some(device) = &mut copies.device {
                shares.prepare(&mut **device);
            }
            if !send(socket, &mut shares.outbox)? {
                break;
            }
        }
        // A grant names exports: the peer learns of them first.
        if shares.outbox.is_empty() {
            while send(socket, &mut grants.outbox)? {}
        }
        for queue in [&mut leases.outbox, outbox] {
            while send(socket, queue)? {}
        }
        Ok(opened)
    }

    /// Wakes the peer where it sleeps. `now`: without waiting for the next round.
    fn ring_if(&mut self, now: bool) {
        if self.orders.inn.wakes() {
            self.wire.outbox.push_back(Message::Ring);
            if now {
                // What the socket does not take waits for the next round.
                let _ = self.answer();
            }
        }
    }

    // ---- copies ----

    /// Reports copies that have moved on or ended.
    fn report_copies(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        let mut done = self.copies.poll(&mut self.imports)?;
        let any = !done.is_empty();
        for happened in done.drain(..) {
            let (owner, bytes, ended) = match happened {
                Done::Moved(owner, bytes) => (owner, bytes, None),
                Done::Ended { owner, rest, pieces } => (owner, rest, Some(pieces)),
            };
            // What was copied counts only if its owner left it alone until here.
            if ended.is_some() && self.orders.inn.closed() {
                bail!(RemoteDisconnect, "the peer's process has closed the connection");
            }
            self.received += if matches!(owner, Owner::Gather(_)) { 0 } else { bytes };
            match (owner, ended) {
                (Owner::Read(key), ended) => {
                    self.orders.inn.read(bytes);
                    if bytes > 0 {
                        events.push(Event::Moved(key, bytes));
                    }
                    if ended.is_some() {
                        self.reads.copied(key, &self.leases, events);
                    }
                }
                (Owner::Answer(slot, key), ended) => {
                    self.orders.inn.read(bytes);
                    if bytes > 0 {
                        events.push(Event::Moved(key, bytes));
                    }
                    if ended.is_some() {
                        self.staged.copied(slot, key, &self.orders.inn)?;
                    }
                }
                (Owner::Gather(slot), Some(_)) => self.staged.gathered(slot),
                (Owner::Gather(_), None) => {}
                (Owner::Orders(parts) | Owner::Staged(_, parts), None) => self.orders.moved(&parts, bytes, events),
                (Owner::Orders(parts), Some(pieces)) => {
                    self.orders.copied(&parts, bytes, pieces, &mut self.grants, events)?;
                }
                (Owner::Staged(slot, parts), Some(pieces)) => {
                    self.staged.leave(slot, &self.orders.inn)?;
                    self.orders.copied(&parts, bytes, pieces, &mut self.grants, events)?;
                }
            }
        }
        self.copies.done = done;
        Ok(any)
    }

    /// Advances all flows.
    fn advance(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = false;
        if self.orders.inn.waiting() {
            let OneHost { copies, imports, grants, orders, staged, .. } = self;
            any |= orders.advance(&mut orders::Around { copies, imports, grants, staged }, events)?;
        }
        if self.copies.any() {
            any |= self.report_copies(events)?;
        }
        let OneHost { copies, imports, leases, reads, .. } = self;
        any |= reads.advance(&mut read::Around { copies, imports, leases })?;
        any |= self.writes.report(events)?;
        if self.writes.wait() && self.writes.advance()? {
            self.ring_if(false);
            any = true;
        }
        any |= self.advance_staged(events)?;
        if self.orders.rings() {
            self.wire.outbox.push_back(Message::Ring);
        }
        Ok(any)
    }

    fn advance_staged(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        let OneHost { copies, imports, writes, staged, orders, grants, .. } = self;
        let announced = staged.advance(&mut gather::Around { copies, imports, out: &mut writes.out })?;
        for (number, bytes) in staged.take_answered() {
            orders.answered(number, bytes, grants, events)?;
        }
        let ended = staged.report(&mut writes.out, events)?;
        if announced || staged.rings() {
            self.ring_if(false);
        }
        Ok(announced || ended)
    }
}

/// Why the peer refuses a pairing, by its grant.
fn forbidden(way: Way, pairing: &Pairing, granted: &Granted) -> Option<Error> {
    let (id, (begin, end)) = (granted.region, pairing.far);
    let (allowed, verb) = match way {
        Way::In => (granted.access.read, "read"),
        Way::Out => (granted.access.write, "write"),
    };
    if !allowed {
        return Some(err!(RemoteAccess, "peers may not {verb} region {id}"));
    }
    if begin < granted.addr || end > granted.addr.saturating_add(granted.len) {
        return Some(err!(RemoteAccess, "[{begin:#x}, +{}) is not inside region {id}", end.saturating_sub(begin)));
    }
    if granted.there != pairing.there {
        return Some(err!(RemoteAccess, "region {id} does not lie where the FIFO item says"));
    }
    None
}

/// Sends the first message of a queue; `false` where none waits, or there is no room now.
fn send(socket: &Socket, queue: &mut VecDeque<Message>) -> Result<bool> {
    if queue.len() > MAX_WAITING {
        bail!(Resource, "{} messages wait: the peer's process does not read them", queue.len());
    }
    let Some(message) = queue.front() else { return Ok(false) };
    match socket.send(&message.encode(), message.fd()) {
        Ok(true) => {
            queue.pop_front();
            Ok(true)
        }
        Ok(false) => Ok(false),
        // The control connection reports why it ended.
        Err(_) => {
            queue.clear();
            Ok(false)
        }
    }
}

impl Direct for OneHost {
    fn route(&mut self, way: Way, pairings: &[Pairing], hold: &Hold) -> Result<Route> {
        let place = pairings.first().map_or(Place::HOST, |pairing| pairing.here);
        let joined = |pairing: &Pairing| self.wire.joins(pairing.here, pairing.there);
        // One copy writes memory of one place.
        let mixed = way == Way::In && pairings.iter().any(|pairing| pairing.here != place);
        let whole = self.staged.suits(way, pairings).unwrap_or_else(|| pairings.iter().all(joined));
        if mixed || !whole {
            return Ok(Route::Channels);
        }
        let mut route = Route::Direct;
        for pairing in pairings {
            match self.route_pairing(way, pairing, hold) {
                Route::Direct => {}
                Route::Wait => route = Route::Wait,
                other => return Ok(other),
            }
        }
        Ok(route)
    }

    fn start(&mut self, transfer: &mut Start<'_>, landing: Option<Landing>) -> Result<()> {
        let staged = transfer.pairings.first().is_some_and(|pairing| self.staged.joins(pairing.here, pairing.there));
        // The thread that starts a large transfer copies nothing.
        (self.copies.now, self.copies.at_once) = (transfer.now, transfer.total <= SMALL);
        match transfer.way {
            _ if staged => self.start_staged(transfer, landing),
            Way::In => self.start_read(transfer),
            Way::Out => self.start_write(transfer, landing),
        }
    }

    fn can_send(&mut self, place: Place, hold: &Hold) -> bool {
        let there: Vec<Place> = self.wire.pairs.iter().filter(|pair| pair.0 == place).map(|pair| pair.1).collect();
        let staged: Vec<Place> = self.staged.peers_of(place).collect();
        let mut open = !(there.is_empty() && staged.is_empty());
        for there in staged {
            open &= self.staged.can_send(place, there, &mut self.copies);
        }
        for &there in &there {
            for region in hold.regions() {
                open &= self.share(region.to_share(), there) == Reach::Yes(());
            }
        }
        if !open {
            self.wire.wake();
        }
        open
    }

    fn land(&mut self, key: Key, region: &RegionUse, range: (u64, u64), there: Place) -> Option<Landing> {
        let staged = self.staged.takes_messages(region.place, there) && self.staged.provide(region.place, &mut self.copies);
        if !staged && !self.wire.joins(region.place, there) {
            return None;
        }
        let (slot, generation) = self.grants.land(key, RegionUse::new(region.region()), there, range)?;
        Some(Landing { slot, generation, addr: range.0 })
    }

    fn withdraw(&mut self, key: Key) -> bool {
        !self.orders.has_landing(key) && self.grants.end_landing(key)
    }

    fn progress(&mut self, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        (self.copies.now, self.copies.at_once) = (now, true);
        let mut any = self.wire.news.swap(false, Ordering::AcqRel) && self.receive(events)?;
        any |= self.advance(events)?;
        any |= self.answer()?;
        events.extend(self.late.drain(..).map(|key| Event::Ended(key, false)));
        if std::mem::take(&mut self.answered) {
            events.push(Event::Answered);
            any = true;
        }
        Ok(any)
    }

    fn activity(&self) -> Activity {
        let waiting = self.orders.inn.waiting();
        let queues = [&self.wire.outbox, &self.shares.outbox, &self.grants.outbox, &self.leases.outbox];
        let staged = self.staged.doing();
        let busy =
            staged.busy || !self.reads.is_empty() || !self.late.is_empty() || self.writes.len() > 0 || !self.orders.is_empty();
        let news = self.wire.news.load(Ordering::Acquire) || self.imports.waiting() || self.answered;
        Activity {
            busy,
            active: busy || waiting || news || self.staged.speaks() || queues.iter().any(|queue| !queue.is_empty()),
            copying: self.copies.copying(),
            wants_polling: staged.busy || self.writes.len() > 0 || self.copies.any() || waiting,
            spin_until: self.writes.end_soon().max(self.copies.end_soon()),
        }
    }

    fn offer(&mut self, region: &Region) {
        for i in 0..self.likely.len() {
            if region.place.is_device() && self.share(region, self.likely[i]) == Reach::Pending {
                self.wire.wake();
            }
        }
    }

    fn forget(&mut self, region: u64) {
        self.grants.forget(region);
        self.shares.forget(region);
        if !self.shares.outbox.is_empty() || !self.grants.outbox.is_empty() {
            // The thread that drives next sends the rest; the mapping at the peer keeps memory until then.
            let _ = self.answer();
        }
    }

    fn uses_region(&self, region: u64) -> bool {
        self.grants.is_read(region) || self.orders.uses_region(region)
    }

    fn ready(&mut self, place: Place) -> Result<()> {
        match &mut self.copies.device {
            Some(device) if place.is_device() => {
                let direct = self.wire.pairs.iter().any(|&(here, _)| here == place);
                if direct || self.staged.peers_of(place).next().is_some() {
                    device.ready(place)
                } else {
                    Ok(())
                }
            }
            _ => Ok(()),
        }
    }

    fn by_nvlink(&self, here: Place, there: Place) -> bool {
        self.wire.by_nvlink(here, there)
    }

    fn flowed(&self) -> (u64, u64) {
        (self.writes.moved().0 + self.staged.doing().moved.0, self.received)
    }

    fn describe(&self, way: Way) -> String {
        let (who, staged) = (self.wire.who, self.staged.doing());
        match way {
            Way::Out if self.writes.len() + staged.writes > 0 => {
                format!("{} writes that {who} on this host is to copy", self.writes.len() + staged.writes)
            }
            Way::In if staged.reads > 0 => format!("{} reads that {who} on this host is to answer", staged.reads),
            Way::In if self.copies.any() => format!("copies from {who} on this host"),
            _ => match self.leases.asked() {
                0 => String::new(),
                asked => format!("{asked} claims of regions that {who} on this host has not answered"),
            },
        }
    }

    fn stats(&self, kernel: bool) -> ChannelStats {
        let staged = self.staged.doing();
        ChannelStats {
            plugin: DIRECT.to_owned(),
            nic: super::NAME.to_owned(),
            route: if kernel { format!("{} on this host", self.wire.who) } else { String::new() },
            sent_bytes: (self.writes.moved().1 + staged.moved.1).saturating_add(self.writes.out.read()),
            received_bytes: self.received,
            nvlink_bytes: self.copies.nvlink + self.writes.by_nvlink(),
            window_out: (self.writes.len() + staged.writes) as u32,
            window: WINDOW as u32,
            ..ChannelStats::default()
        }
    }
}

impl Drop for OneHost {
    fn drop(&mut self) {
        // Before the holds go: what the peer copies from here on does not count.
        self.writes.out.close();
        let ended = self.copies.quiesce();
        self.reads.end(ended.is_ok(), &self.leases);
        self.orders.end(ended.is_ok());
        match ended {
            Err(e) => {
                self.staged.end(None);
                log::error!("a copy from another process has not ended; its memory stays in use until this process ends: {e}");
                std::mem::forget((self.copies.host.take(), self.copies.device.take()));
            }
            Ok(()) => {
                self.staged.end(Some(&mut self.copies));
                self.copies.device.iter_mut().for_each(|device| self.imports.close_all(&mut **device));
            }
        }
    }
}

#[cfg(test)]
mod host_staged_tests;
#[cfg(test)]
mod staged_tests;
#[cfg(test)]
mod tests;
