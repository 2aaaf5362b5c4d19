//! Setting up channels with a peer, without blocking: first listen comms and their offers, then connects and accepts that are
//! polled until the channels are up. If the plugin supports it, the listener listens for the connections of both directions and
//! the connector dials them. An unusable NIC is left out; in the end the two engines agree on the channels that both have. Knows
//! nothing of chunks, and of time only how long to wait for a NIC when others are up.

use super::comm::{Accepting, Answering, Calling, Connecting, Doorbell, Handle, ListenComm, RecvComm, SendComm};
use super::pairing;
use super::plugin::{Device, Plugin};
use super::plugin_thread::PluginThread;
use super::secure::{ChannelKeys, HalfKeys, KeysOf};
use super::{handle, topology, Scope};
use crate::addresses::AllowList;
use crate::logging::Limiter;
use crate::status::{bail, err, Error, ErrorKind, Result};
use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where the peer can connect one channel.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    /// The NIC's name at the engine that offers it.
    pub nic: String,
    /// Its connect handle; zeros from an engine that dials.
    pub handle: Handle,
}

/// Which comms an engine dials and for which it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Listens, and dials the comms that it sends on.
    Both,
    /// Dials all.
    Dials,
    /// Listens for all.
    Listens,
}

impl Role {
    /// The role of the connector, or of the listener.
    pub(crate) fn of(plugin: &Plugin, connecting: bool) -> Role {
        match (plugin.traits.dials_both, connecting) {
            (false, _) => Role::Both,
            (true, true) => Role::Dials,
            (true, false) => Role::Listens,
        }
    }
}

fn unusable(nic: &str) -> Error {
    err!(Plugin, "NIC {nic} cannot be used at present")
}

/// A channel that is up: both directions.
pub(crate) struct Pair {
    /// The channel's number, the same at both engines.
    pub index: usize,
    /// Towards the peer.
    pub send: SendComm,
    /// From the peer.
    pub recv: RecvComm,
    /// The NICs of this engine and of the peer.
    pub nic: String,
    pub peer_nic: String,
    /// The address of this engine, if it is known.
    pub local: Option<IpAddr>,
}

impl Pair {
    /// Makes it part of a connection: sets its doorbell, and limits the bytes that it sends a second.
    pub(crate) fn join(&self, doorbell: &Doorbell, pace: Option<u64>) -> Result<()> {
        self.send.set_doorbell(doorbell)?;
        self.recv.set_doorbell(doorbell)?;
        pace.map_or(Ok(()), |rate| self.send.pace(rate))
    }
}

/// Keeps the channels that came up at both engines, once the peer has named its own, and closes the rest. Both engines call it.
pub(crate) fn agree(pairs: Vec<Pair>, theirs: &[usize]) -> Vec<Pair> {
    pairs.into_iter().filter(|p| theirs.contains(&p.index)).collect()
}

/// A NIC's part in one channel.
struct Listener {
    dev: usize,
    nic: String,
    /// None if this engine dials.
    comm: Option<ListenComm>,
    /// Why the NIC cannot be used.
    failed: Option<Error>,
}

impl Listener {
    /// `looked`: this NIC was just found usable.
    fn open(plugin: &Arc<Plugin>, dev: usize, nic: &str, gpu: &Scope, role: Role, looked: bool) -> Result<Listener> {
        let comm = match role {
            Role::Dials if looked => Ok(None),
            Role::Dials => plugin.ready(dev).map(|()| None),
            Role::Both | Role::Listens => ListenComm::new(plugin, dev, gpu).map(Some),
        };
        Ok(Listener { dev, nic: nic.to_owned(), comm: comm?, failed: None })
    }

    /// One of a NIC that cannot be used.
    fn failed(nic: &str, why: Error) -> Listener {
        Listener { dev: usize::MAX, nic: nic.to_owned(), comm: None, failed: Some(why) }
    }

    fn handle(&self) -> Handle {
        self.comm.as_ref().map_or([0; NCCL_NET_HANDLE_MAXSIZE], |comm| comm.handle)
    }
}

/// Listen comms, before the peer's offers are known.
pub(crate) struct Listening {
    plugin: Arc<Plugin>,
    gpu: Scope,
    role: Role,
    listeners: Vec<Listener>,
    /// The numbers of the channels, if they are given: the engines' offers are then joined in their order.
    numbers: Option<Vec<usize>>,
}

impl Listening {
    /// Opens `n` listen comms, alternating between the usable NICs. One whose ports are all in use keeps the channels that it has. A NIC that
    /// fails, or is absent, is offered nevertheless: its channels do not come up now, and may be set up later.
    ///
    /// `gpu`: the GPU whose memory the channels will carry, for plugins that follow the current GPU.
    pub(crate) fn open(
        plugin: &Arc<Plugin>,
        devices: &[Device],
        nics: &Nics,
        n: usize,
        gpu: Scope,
        role: Role,
    ) -> Result<Listening> {
        let Nics { usable, absent } = nics;
        let (mut nics, mut listeners) = (usable.clone(), Vec::with_capacity(n));
        let mut absent: Vec<(String, Error)> = absent.iter().map(|nic| (nic.clone(), unusable(nic))).collect();
        let each = n.div_ceil((nics.len() + absent.len()).max(1));
        let mut last = err!(Plugin, "plugin {} has no usable device", plugin.name);
        while listeners.len() < n && !nics.is_empty() {
            let at = listeners.len() % nics.len();
            let (dev, nic) = (nics[at], devices[nics[at]].name.clone());
            let looked = listeners.iter().any(|l: &Listener| l.dev == dev);
            match Listener::open(plugin, dev, &nic, &gpu, role, looked) {
                Ok(listener) => listeners.push(listener),
                Err(e) if e.kind() == ErrorKind::Resource => return Err(e),
                Err(e) => {
                    let what = if role == Role::Dials { "connect" } else { "listen" };
                    last = Error::new(e.kind(), format_args!("{what} on {nic}: {e}"));
                    nics.remove(at);
                    if e.kind() == ErrorKind::System {
                        warn_of_fewer(format_args!("NIC {nic} has fewer channels than requested: {last}"));
                    } else {
                        listeners.retain(|l: &Listener| l.dev != dev);
                        absent.push((nic, last.clone()));
                    }
                }
            }
        }
        if listeners.is_empty() {
            return Err(last);
        }
        let failed = absent.iter().flat_map(|(nic, why)| (0..each).map(|_| Listener::failed(nic, why.clone())));
        listeners.extend(failed.take(MAX_CHANNELS.saturating_sub(listeners.len())));
        Ok(Listening { plugin: plugin.clone(), gpu, role, listeners, numbers: None })
    }

    /// Opens a listen comm for each of these channels of an earlier set-up, given by number and NIC. One whose NIC fails is offered
    /// nevertheless, and does not come up.
    ///
    /// # Errors
    /// When none can be opened.
    pub(crate) fn reopen(
        plugin: &Arc<Plugin>,
        devices: &[Device],
        wanted: Vec<(usize, &str)>,
        gpu: Scope,
        role: Role,
    ) -> Result<Listening> {
        let (mut listeners, mut last) = (Vec::with_capacity(wanted.len()), err!(Plugin, "no channel is wanted"));
        let (numbers, nics): (Vec<usize>, Vec<&str>) = wanted.into_iter().unzip();
        for nic in nics {
            let opened = match devices.iter().position(|device| device.name == nic && topology::has_carrier(Path::new("/"), nic))
            {
                Some(dev) => Listener::open(plugin, dev, nic, &gpu, role, false),
                None => Err(unusable(nic)),
            };
            listeners.push(opened.unwrap_or_else(|e| {
                last = e.clone();
                Listener::failed(nic, e)
            }));
        }
        if listeners.iter().all(|l| l.failed.is_some()) {
            return Err(last);
        }
        Ok(Listening { plugin: plugin.clone(), gpu, role, listeners, numbers: Some(numbers) })
    }

    /// The offers for the peer.
    pub(crate) fn offers(&self) -> Vec<Offer> {
        self.listeners.iter().map(|l| Offer { nic: l.nic.clone(), handle: l.handle() }).collect()
    }

    /// Joins the offers of both engines to channels and starts them. If nothing can be joined, the result is complete at once,
    /// empty, with a reason. With `keys` the channels are tied to the control connection if the plugin supports that. Addresses
    /// outside `allowed` are not dialled, as far as the peer's handles can be read.
    pub(crate) fn establish(self, peer: &[Offer], keys: Option<KeysOf<'_>>, allowed: &AllowList) -> Establishing {
        let keys = keys.filter(|_| self.plugin.traits.secured);
        let names: Vec<&str> = self.listeners.iter().map(|l| l.nic.as_str()).collect();
        let theirs: Vec<&str> = peer.iter().map(|o| o.nic.as_str()).collect();
        let joined = match &self.numbers {
            None => pairing::join(&names, &theirs, self.plugin.traits.paired_nics),
            Some(_) => (0..names.len().min(theirs.len())).map(|i| (i, i)).collect(),
        };
        let reason = joined.is_empty().then(|| match theirs.is_empty() {
            true => format!("the peer offers no channels of plugin {}", self.plugin.name),
            false => format!(
                "no NIC in common for plugin {}: [{}] here, [{}] at the peer",
                self.plugin.name,
                list(&names),
                list(&theirs)
            ),
        });
        let mut listeners: Vec<Option<Listener>> = self.listeners.into_iter().map(Some).collect();
        let mut channels = Vec::with_capacity(joined.len());
        for (index, (ours, theirs)) in joined.into_iter().enumerate() {
            let Some(listener) = listeners[ours].take() else { continue };
            let index = self.numbers.as_ref().map_or(index, |numbers| numbers[index]);
            let keys = keys.map(|keys| keys(index)).transpose();
            let on = On { plugin: &self.plugin, gpu: &self.gpu, role: self.role, allowed };
            channels.push(Channel::start(index, &on, listener, &peer[theirs], keys));
        }
        let names = channels.iter().map(|c: &Channel| (c.nic.clone(), c.peer_nic.clone())).collect();
        let again = self.numbers.is_some();
        let began = Instant::now();
        let progress = (!again).then_some((0, began));
        Establishing { plugin: self.plugin, channels, names, began, first_up: None, progress, reason, again }
    }
}

/// Distinct names in order, for log lines. A peer's names are truncated and sanitised.
fn list(names: &[&str]) -> String {
    let mut seen: Vec<String> = Vec::new();
    for name in names.iter().take(64) {
        let clean = printable(name);
        if !seen.contains(&clean) {
            seen.push(clean);
        }
    }
    seen.join(", ")
}

/// A peer's name, sanitised for a log line.
fn printable(name: &str) -> String {
    name.chars().take(32).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// Peers can repeat set-ups at will, so these lines are rate-limited.
static LEFT_OUT: Limiter = Limiter::new(8);
static NO_CARRIER: Limiter = Limiter::new(2);

/// Logs missing channels, rate-limited.
pub(crate) fn warn_of_fewer(what: std::fmt::Arguments<'_>) {
    LEFT_OUT.log(log::Level::Warn, Instant::now(), what);
}

fn left_out(nic: &str, cause: &Error) {
    LEFT_OUT.log(log::Level::Warn, Instant::now(), format_args!("NIC {nic} is left out of a connection: {cause}"));
}

/// One direction of a channel during set-up.
enum Half<P, U> {
    Pending(P),
    Up(U),
    Failed(Error),
    /// Abandoned, or already returned to the caller.
    Gone,
}

impl<P, U> Half<P, U> {
    fn begun(pending: Result<P>) -> Self {
        pending.map_or_else(Half::Failed, Half::Pending)
    }

    /// Polls a pending half once.
    fn step(&mut self, poll: impl FnOnce(&mut P) -> Result<Option<U>>) {
        if let Half::Pending(pending) = self {
            match poll(pending) {
                Ok(None) => {}
                Ok(Some(up)) => *self = Half::Up(up),
                Err(e) => *self = Half::Failed(e),
            }
        }
    }
    fn pending(&self) -> bool {
        matches!(self, Half::Pending(_))
    }
}

/// A send comm during set-up.
enum Outward {
    Dial(Connecting),
    Answer(Answering),
}

impl Outward {
    fn poll(&mut self) -> Result<Option<SendComm>> {
        match self {
            Outward::Dial(connecting) => connecting.poll(),
            Outward::Answer(answering) => answering.poll(),
        }
    }
}

/// A receive comm during set-up.
enum Inward {
    Accept(Accepting),
    Call(Calling),
}

impl Inward {
    fn poll(&mut self) -> Result<Option<RecvComm>> {
        match self {
            Inward::Accept(accepting) => accepting.poll(),
            Inward::Call(calling) => calling.poll(),
        }
    }
}

/// State that the channels of one set-up share.
struct On<'a> {
    plugin: &'a Arc<Plugin>,
    gpu: &'a Scope,
    role: Role,
    allowed: &'a AllowList,
}

impl On<'_> {
    /// The handle to connect with, if the peer's address may be dialled.
    fn admit(&self, own: &Handle, peer: &Handle) -> Result<Handle> {
        let how = self.plugin.traits.handle_check;
        let admitted = handle::admit(how, own, peer)?;
        match handle::addresses(how, &admitted).find(|address| !self.allowed.admits(address.ip())) {
            Some(_) => bail!(Unreachable, "the address is not in UCCL_TCPX_ALLOW on this host"),
            None => Ok(admitted),
        }
    }

    fn dial(&self, dev: usize, own: &Handle, peer: &Handle, keys: Option<HalfKeys>) -> Result<Outward> {
        Connecting::new(self.plugin, dev, self.gpu, self.admit(own, peer)?, keys).map(Outward::Dial)
    }

    fn call(&self, dev: usize, own: &Handle, peer: &Handle, keys: Option<HalfKeys>) -> Result<Inward> {
        Calling::new(self.plugin, dev, self.gpu, self.admit(own, peer)?, keys).map(Inward::Call)
    }

    /// Both directions of a channel.
    fn start(&self, listener: Listener, peer: &Handle, keys: Option<ChannelKeys>) -> (Result<Outward>, Result<Inward>) {
        if let Some(e) = listener.failed {
            return (Err(e.clone()), Err(e));
        }
        if self.role != Role::Listens && peer.iter().all(|&byte| byte == 0) {
            let error = err!(Unreachable, "the peer's NIC cannot be used at present");
            return (Err(error.clone()), Err(error));
        }
        let (dev, own) = (listener.dev, listener.handle());
        let (send, recv) = keys.map_or((None, None), |k| (Some(k.send), Some(k.recv)));
        match (listener.comm, self.role) {
            (Some(comm), Role::Listens) => match comm.both(send, recv) {
                Ok((answering, accepting)) => (Ok(Outward::Answer(answering)), Ok(Inward::Accept(accepting))),
                Err(e) => (Err(e.clone()), Err(e)),
            },
            (Some(comm), _) => (self.dial(dev, &own, peer, send), Accepting::new(comm, recv).map(Inward::Accept)),
            (None, _) => (self.dial(dev, &own, peer, send), self.call(dev, &own, peer, recv)),
        }
    }
}

struct Channel {
    index: usize,
    nic: String,
    peer_nic: String,
    role: Role,
    /// The listening addresses of the peer and of this engine.
    address: Option<SocketAddr>,
    own: Option<SocketAddr>,
    send: Half<Outward, SendComm>,
    recv: Half<Inward, RecvComm>,
    /// The steps that were pending when the peer abandoned it.
    lost: Option<String>,
    /// Its failure was logged.
    reported: bool,
}

impl Channel {
    fn start(index: usize, on: &On<'_>, listener: Listener, offer: &Offer, keys: Result<Option<ChannelKeys>>) -> Channel {
        let how = on.plugin.traits.handle_check;
        let (nic, own) = (listener.nic.clone(), handle::address(how, &listener.handle()));
        let (send, recv) = match keys {
            Err(e) => (Half::Failed(e), Half::Gone),
            Ok(keys) => {
                let (send, recv) = on.start(listener, &offer.handle, keys);
                (Half::begun(send), Half::begun(recv))
            }
        };
        let peer_nic = printable(&offer.nic);
        Channel {
            index,
            nic,
            peer_nic,
            role: on.role,
            address: handle::address(how, &offer.handle),
            own,
            send,
            recv,
            lost: None,
            reported: false,
        }
    }

    fn poll(&mut self) {
        self.send.step(Outward::poll);
        if !matches!(self.send, Half::Failed(_)) {
            self.recv.step(Inward::poll);
        }
    }

    fn up(&self) -> bool {
        matches!((&self.send, &self.recv), (Half::Up(_), Half::Up(_)))
    }

    fn pending(&self) -> bool {
        !self.failed() && (self.send.pending() || self.recv.pending())
    }

    fn failed(&self) -> bool {
        matches!(self.send, Half::Failed(_) | Half::Gone) || matches!(self.recv, Half::Failed(_) | Half::Gone)
    }

    /// The peer's end, as text.
    fn target(&self) -> String {
        match self.address {
            Some(address) => format!("{address} ({})", self.peer_nic),
            None => format!("the peer's {}", self.peer_nic),
        }
    }

    /// The pending steps for data to the peer and from it, as text.
    fn doing(&self) -> (String, String) {
        let dial = format!("connect to {}", self.target());
        let wait = match self.own {
            Some(own) => format!("wait at {own} for a connection from the peer's {}", self.peer_nic),
            None => format!("wait for a connection from {}", self.target()),
        };
        match self.role {
            Role::Both => (dial, wait),
            Role::Dials => (dial.clone(), dial),
            Role::Listens => (wait.clone(), wait),
        }
    }

    /// Why the channel is not up, with NIC, address and direction.
    fn cause(&self) -> Option<Error> {
        let name = format!("channel {} on {}", self.index, self.nic);
        let (out, inward) = self.doing();
        match (&self.send, &self.recv) {
            (Half::Failed(e), _) => Some(Error::new(e.kind(), format_args!("{name}: {out}, for data to the peer: {e}"))),
            (_, Half::Failed(e)) => Some(Error::new(e.kind(), format_args!("{name}: {inward}, for data from the peer: {e}"))),
            _ => None,
        }
    }

    /// The directions that are still pending, as text.
    fn missing(&self) -> Option<String> {
        let (out, inward) = self.doing();
        let what = match (self.send.pending(), self.recv.pending()) {
            (true, true) if out == inward => format!("{out}, for both directions"),
            (true, true) => format!("{out}, for data to the peer, and {inward}, for data from it"),
            (true, false) => format!("{out}, for data to the peer"),
            (false, true) => format!("{inward}, for data from the peer"),
            (false, false) => return None,
        };
        Some(format!("{}: {what}", self.nic))
    }

    /// Drops both directions. A failure keeps its cause.
    fn give_up(&mut self) {
        if !matches!(self.send, Half::Failed(_)) {
            self.send = Half::Gone;
        }
        if !matches!(self.recv, Half::Failed(_)) {
            self.recv = Half::Gone;
        }
    }
}

/// Channels during set-up. If it is dropped early it releases everything: at once if the plugin supports that, otherwise on a
/// background thread when the plugin no longer uses it.
pub(crate) struct Establishing {
    plugin: Arc<Plugin>,
    channels: Vec<Channel>,
    /// The NICs of each channel, here and at the peer.
    names: Vec<(String, String)>,
    began: Instant,
    first_up: Option<Instant>,
    /// How many channels are up and when the last came up; `None` once it was logged that others do not.
    progress: Option<(usize, Instant)>,
    reason: Option<String>,
    /// They were lost, and it is no news that some are.
    again: bool,
}

/// How long to wait for other NICs once the first channel is up: this many times what that took, within bounds.
const STRAGGLER_WAIT_FACTOR: u32 = 4;
const MIN_STRAGGLER_WAIT: Duration = Duration::from_secs(3);

impl Establishing {
    /// One step. `Some` once it is settled which channels are up, by number. They may be fewer than were offered, and none if
    /// nothing could be joined (then [`Establishing::reason`] says why). An error means that every channel has failed. After the
    /// end, further calls return no channels.
    pub(crate) fn poll(&mut self) -> Result<Option<Vec<Pair>>> {
        self.poll_at(Instant::now())
    }

    fn poll_at(&mut self, now: Instant) -> Result<Option<Vec<Pair>>> {
        for channel in &mut self.channels {
            channel.poll();
            if channel.failed() {
                channel.give_up();
            }
        }
        if let Some(e) = self.exhausted() {
            return Err(e);
        }
        let up = self.channels.iter().filter(|c| c.up()).count();
        if up > 0 && self.first_up.is_none() {
            self.first_up = Some(now);
        }
        let pending = self.channels.iter().any(Channel::pending);
        if let Some(late) = self.late(up, now) {
            log::warn!("{late}");
        }
        if pending && !self.straggler_wait_is_over(now) {
            return Ok(None);
        }
        if up == 0 && !self.channels.is_empty() {
            return Err(self.failure());
        }
        Ok(Some(self.finish()))
    }

    /// Describes the channels that do not come up, once, when none has for a while: the deadline of the set-up may be far away.
    pub(super) fn late(&mut self, up: usize, now: Instant) -> Option<Error> {
        let (before, since) = self.progress?;
        if up > before {
            self.progress = Some((up, now));
            return None;
        }
        let waited = now.saturating_duration_since(since);
        if waited < MIN_STRAGGLER_WAIT || !self.channels.iter().any(Channel::pending) {
            return None;
        }
        self.progress = None;
        Some(self.describe(&format!("are not up yet, and none has come up for {waited:.1?}")))
    }

    /// A lack of descriptors or memory is not the fault of a NIC.
    fn exhausted(&self) -> Option<Error> {
        self.channels.iter().filter_map(Channel::cause).find(|e| e.kind() == ErrorKind::Resource)
    }

    fn straggler_wait_is_over(&self, now: Instant) -> bool {
        let Some(first) = self.first_up else { return false };
        let wait = (first.saturating_duration_since(self.began) * STRAGGLER_WAIT_FACTOR).max(MIN_STRAGGLER_WAIT);
        now.saturating_duration_since(first) >= wait
    }

    /// Returns the channels that are up and abandons the rest, with a warning for each NIC.
    pub(crate) fn finish(&mut self) -> Vec<Pair> {
        self.report();
        let mut pairs = Vec::new();
        for channel in self.channels.drain(..) {
            if let (Half::Up(send), Half::Up(recv)) = (channel.send, channel.recv) {
                let local = send.local_ip().or(channel.own.map(|own| own.ip()));
                pairs.push(Pair { index: channel.index, send, recv, nic: channel.nic, peer_nic: channel.peer_nic, local });
            }
        }
        pairs
    }

    fn report(&mut self) {
        let mut warned: Vec<String> = Vec::new();
        for channel in &mut self.channels {
            if channel.up() || channel.reported || warned.contains(&channel.nic) {
                continue;
            }
            let waited = self.began.elapsed().as_secs_f32();
            let missing = channel.missing().or_else(|| channel.lost.take());
            let cause = channel.cause().or_else(|| missing.map(|m| err!(TimedOut, "{m}: nothing after {waited:.1} s")));
            if let Some(cause) = cause {
                match self.again {
                    true => log::debug!("NIC {} does not come back: {cause}", channel.nic),
                    false => left_out(&channel.nic, &cause),
                }
                warned.push(channel.nic.clone());
            }
            channel.reported = true;
        }
    }

    /// The error for a set-up in which no channel came up.
    fn failure(&self) -> Error {
        let causes: Vec<Error> = self.channels.iter().filter_map(Channel::cause).collect();
        match causes.first() {
            Some(first) if causes.len() > 1 => {
                Error::new(first.kind(), format_args!("{first} (and {} more channels failed)", causes.len() - 1))
            }
            Some(first) => first.clone(),
            None => err!(Plugin, "plugin {}: no channel came up", self.plugin.name),
        }
    }

    /// The peer has named its channels, so this engine stops waiting for the others.
    pub(crate) fn peer_has(&mut self, theirs: &[usize]) {
        for channel in &mut self.channels {
            if !theirs.contains(&channel.index) {
                channel.lost = channel.missing();
                channel.give_up();
            }
        }
    }

    /// The NICs of each channel, up or not, by number: here, and at the peer.
    pub(crate) fn names(&self) -> &[(String, String)] {
        &self.names
    }

    /// Why there are no channels, if nothing could be joined.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// What is still pending, for the error at the caller's deadline: NIC, address and direction of each channel.
    pub(crate) fn missing(&self) -> Error {
        self.describe("did not come up in time")
    }

    fn describe(&self, what: &str) -> Error {
        let missing: Vec<String> = self.channels.iter().filter_map(Channel::missing).collect();
        let more = missing.len().saturating_sub(4);
        let tail = if more > 0 { format!(", and {more} more") } else { String::new() };
        let still = || self.plugin.thread().and_then(PluginThread::stands_still);
        let failed = self.channels.iter().find_map(Channel::cause).or_else(still).map_or(String::new(), |e| format!("; {e}"));
        err!(
            TimedOut,
            "{} of {} channels {what}: {}{tail}{failed}",
            self.channels.iter().filter(|c| !c.up()).count(),
            self.channels.len(),
            missing.iter().take(4).cloned().collect::<Vec<_>>().join(", ")
        )
    }

    /// When to poll again: soon at first, then less and less often.
    pub(crate) fn retry_in(&self) -> Duration {
        let slowest = if self.plugin.traits.lingers { 5 } else { 10 };
        (self.began.elapsed() / 8).clamp(Duration::from_micros(20), Duration::from_millis(slowest))
    }
}

/// Most channels of a set.
const MAX_CHANNELS: usize = 64;

/// The number of channels for `nics` NICs and `cores` cores: as configured, otherwise as many as help. A plugin with its own
/// threads can use one thread per channel, so it gets one channel per core if there are few cores, and one per two if there are
/// many. Every NIC gets at least one channel; if NICs are paired, each gets 2 to 4.
pub(crate) fn channel_count(plugin: &Plugin, configured: Option<usize>, nics: usize, cores: usize) -> usize {
    let default = if plugin.traits.paired_nics {
        pairing::channels_of_a_nic(cores) * nics
    } else {
        cores.clamp(2, 8).max((cores / 2).min(16)).max(nics)
    };
    configured.unwrap_or(default).min(MAX_CHANNELS)
}

/// The NICs for a set of channels.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Nics {
    /// Indexes of devices.
    pub usable: Vec<usize>,
    /// The names of those that would be usable but for their link or address.
    pub absent: Vec<String>,
}

/// The devices that serve a GPU, or host memory if none is given: those whose name can reach the peer and that have a carrier. If
/// NICs are paired, a GPU uses those of its own PCIe switch, otherwise those of its NUMA node, nearest first.
pub(crate) fn nics_for(plugin: &Plugin, devices: &[Device], gpu_pci_path: Option<&str>) -> Nics {
    let mut chosen = if plugin.traits.paired_nics {
        pairing::own(devices, gpu_pci_path, &topology::gpus(Path::new("/")))
    } else {
        topology::nearest(devices, gpu_pci_path)
    };
    if plugin.traits.pci_nics {
        let named = |i: &usize| devices[*i].pci_path.is_some();
        if let Some(&without) = chosen.iter().find(|i| !named(i)) {
            let nic = &devices[without].name;
            NO_CARRIER.log(
                log::Level::Warn,
                Instant::now(),
                format_args!(
                    "NIC {nic} is not a PCI device and is left out: plugin {} cannot register memory for it",
                    plugin.name
                ),
            );
        }
        chosen.retain(named);
    }
    if plugin.traits.devices_change {
        // The software plugin leaves such NICs out by itself. Where some are too far from the GPU, an absent one may be, too.
        let absent = if chosen.len() == devices.len() { soft_plugin::absent_devices(plugin.path.is_none()) } else { Vec::new() };
        let absent = absent.into_iter().filter(|nic| devices.iter().all(|device| device.name != *nic)).collect();
        return Nics { usable: chosen, absent };
    }
    let (usable, absent): (Vec<usize>, Vec<usize>) =
        chosen.into_iter().partition(|&i| topology::has_carrier(Path::new("/"), &devices[i].name));
    if !absent.is_empty() {
        let line = format_args!("{} NICs of plugin {} have no carrier and are left out", absent.len(), plugin.name);
        NO_CARRIER.log(log::Level::Warn, Instant::now(), line);
    }
    Nics { usable, absent: absent.into_iter().map(|i| devices[i].name.clone()).collect() }
}
