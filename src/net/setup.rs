//! Setting up channels with a peer, without blocking: listen comms and their offers, then connects and accepts polled until they are up.
//! Where a plugin can do that, one side listens and the other dials the connections of both directions. A NIC that cannot be used is left out; the two sides agree afterwards on the channels that both have. Knows nothing of what travels
//! on a channel, and of time only how long to wait for a NIC when others are up.

use super::comm::{Accepting, Answering, Calling, Connecting, Handle, ListenComm, RecvComm, SendComm};
use super::pairing;
use super::plugin::{Device, Plugin};
use super::secure::{ChannelKeys, HalfKeys, KeysOf};
use super::{handle, topology, Scope};
use crate::addresses::AllowList;
use crate::logging::Limiter;
use crate::status::{bail, err, Error, ErrorKind, Result};
use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a peer can connect one channel to.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    /// The NIC's name on the side that offers.
    pub nic: String,
    /// Its connect handle; zeros of a side that dials.
    pub handle: Handle,
}

/// What a side does for its channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Listens, and dials what it sends on.
    Both,
    /// Dials all.
    Dials,
    /// Listens for all.
    Listens,
}

impl Role {
    /// Of the side that made the control connection, or of the other one.
    pub(crate) fn of(plugin: &Plugin, connecting: bool) -> Role {
        match (plugin.traits.dials_both, connecting) {
            (false, _) => Role::Both,
            (true, true) => Role::Dials,
            (true, false) => Role::Listens,
        }
    }
}

/// A channel that is up: both directions.
pub(crate) struct Pair {
    /// The channel's number, the same on both sides.
    pub index: usize,
    /// Towards the peer.
    pub send: SendComm,
    /// From the peer.
    pub recv: RecvComm,
    /// This side's NIC, and the peer's.
    pub nic: String,
    pub peer_nic: String,
}

/// What is left of the channels that came up here when the peer has named those that came up there. Both sides call it; the rest is
/// closed.
pub(crate) fn agree(pairs: Vec<Pair>, theirs: &[usize]) -> Vec<Pair> {
    pairs.into_iter().filter(|p| theirs.contains(&p.index)).collect()
}

/// A NIC's part in one channel.
struct Listener {
    dev: usize,
    nic: String,
    /// None of a side that dials.
    comm: Option<ListenComm>,
}

impl Listener {
    /// `looked`: a look at this NIC, just before, found that it can be used.
    fn open(plugin: &Arc<Plugin>, dev: usize, nic: &str, gpu: &Scope, role: Role, looked: bool) -> Result<Listener> {
        let comm = match role {
            Role::Dials if looked => Ok(None),
            Role::Dials => plugin.ready(dev).map(|()| None),
            Role::Both | Role::Listens => ListenComm::new(plugin, dev, gpu).map(Some),
        };
        Ok(Listener { dev, nic: nic.to_owned(), comm: comm? })
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
}

impl Listening {
    /// Opens `n` listen comms, in turn over the NICs of `choice`, which are indexes into `devices`. A NIC that refuses is left out; one
    /// whose ports are all in use keeps the channels that it has.
    ///
    /// `gpu`: the GPU whose memory the channels will carry, for plugins that follow the current GPU.
    pub(crate) fn open(
        plugin: &Arc<Plugin>,
        devices: &[Device],
        choice: &[usize],
        n: usize,
        gpu: Scope,
        role: Role,
    ) -> Result<Listening> {
        let mut nics: Vec<usize> = choice.iter().copied().filter(|&i| i < devices.len()).collect();
        let mut listeners = Vec::with_capacity(n);
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
                        warn_of_fewer(format_args!("NIC {nic} has fewer channels than wanted: {last}"));
                    } else {
                        left_out(&nic, &last);
                        listeners.retain(|l: &Listener| l.dev != dev);
                    }
                }
            }
        }
        if listeners.is_empty() {
            return Err(last);
        }
        Ok(Listening { plugin: plugin.clone(), gpu, role, listeners })
    }

    /// What to tell the peer.
    pub(crate) fn offers(&self) -> Vec<Offer> {
        self.listeners.iter().map(|l| Offer { nic: l.nic.clone(), handle: l.handle() }).collect()
    }

    /// Joins the offers of both sides to channels and starts them. Where nothing can be joined the result is up at once, empty, with a
    /// reason. With `keys` they are tied to a session, where the plugin can do that. Nothing outside `allowed` is dialled, as far as
    /// the peer's handles can be read.
    pub(crate) fn establish(self, peer: &[Offer], keys: Option<KeysOf<'_>>, allowed: &AllowList) -> Establishing {
        let keys = keys.filter(|_| self.plugin.traits.secured);
        let names: Vec<&str> = self.listeners.iter().map(|l| l.nic.as_str()).collect();
        let theirs: Vec<&str> = peer.iter().map(|o| o.nic.as_str()).collect();
        let joined = pairing::join(&names, &theirs, self.plugin.traits.paired_nics);
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
            let keys = keys.map(|keys| keys(index)).transpose();
            let on = On { plugin: &self.plugin, gpu: &self.gpu, role: self.role, allowed };
            channels.push(Channel::start(index, &on, listener, &peer[theirs], keys));
        }
        Establishing { plugin: self.plugin, channels, began: Instant::now(), first_up: None, reason }
    }
}

/// Distinct names in order, for people. What a peer sent is cut and cleaned.
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

/// A name from a peer as it may stand in a log line.
fn printable(name: &str) -> String {
    name.chars().take(32).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// Set-ups come as often as peers like.
static LEFT_OUT: Limiter = Limiter::new(8);
static NO_CARRIER: Limiter = Limiter::new(2);

/// Writes a line about channels that are missing, as often as is good.
pub(crate) fn warn_of_fewer(what: std::fmt::Arguments<'_>) {
    LEFT_OUT.log(log::Level::Warn, Instant::now(), what);
}

fn left_out(nic: &str, cause: &Error) {
    LEFT_OUT.log(log::Level::Warn, Instant::now(), format_args!("NIC {nic} is left out of a connection: {cause}"));
}

/// One direction of a channel on its way up.
enum Half<P, U> {
    Pending(P),
    Up(U),
    Failed(Error),
    /// Given up, or handed over.
    Gone,
}

impl<P, U> Half<P, U> {
    fn begun(pending: Result<P>) -> Self {
        pending.map_or_else(Half::Failed, Half::Pending)
    }

    /// One step of a pending half.
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

/// The way to a send comm.
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

/// The way to a receive comm.
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

/// What the channels of one set-up share.
struct On<'a> {
    plugin: &'a Arc<Plugin>,
    gpu: &'a Scope,
    role: Role,
    allowed: &'a AllowList,
}

impl On<'_> {
    /// The handle to connect with, where the peer's may be dialled.
    fn admit(&self, own: &Handle, peer: &Handle) -> Result<Handle> {
        let how = self.plugin.traits.handle_check;
        let admitted = handle::admit(how, own, peer)?;
        match handle::addresses(how, &admitted).find(|address| !self.allowed.admits(address.ip())) {
            Some(_) => bail!(Unreachable, "the address is not in UCCL_TCPX_ALLOW of this side"),
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
    /// Where the peer listens, and where this side does.
    address: Option<SocketAddr>,
    own: Option<SocketAddr>,
    send: Half<Outward, SendComm>,
    recv: Half<Inward, RecvComm>,
    /// What was missing when the peer gave it up.
    lost: Option<String>,
    /// Its failure was reported.
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

    /// The peer's side in words.
    fn target(&self) -> String {
        match self.address {
            Some(address) => format!("{address} ({})", self.peer_nic),
            None => format!("the peer's {}", self.peer_nic),
        }
    }

    /// What is done for data to the peer, and for data from it, in words.
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

    /// The directions that are still pending, in words.
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

    /// Lets go of both directions. A failure keeps its cause.
    fn give_up(&mut self) {
        if !matches!(self.send, Half::Failed(_)) {
            self.send = Half::Gone;
        }
        if !matches!(self.recv, Half::Failed(_)) {
            self.recv = Half::Gone;
        }
    }
}

/// Channels on their way up. Dropped before its end it gives everything back: at once where the plugin can do that, else from a
/// background thread when the plugin is done with it.
pub(crate) struct Establishing {
    plugin: Arc<Plugin>,
    channels: Vec<Channel>,
    began: Instant,
    first_up: Option<Instant>,
    reason: Option<String>,
}

/// How long other NICs are waited for when the first channel is up: so many times as long as that took, within bounds.
const STRAGGLER_WAIT_FACTOR: u32 = 4;
const MIN_STRAGGLER_WAIT: Duration = Duration::from_secs(3);

impl Establishing {
    /// Takes what has happened so far. `Some` once it is settled which channels are up, by number; it may be fewer than were offered, and
    /// none where nothing could be joined (then [`Establishing::reason`] says why). An error: all that was tried has failed. After an
    /// end further calls give no channels.
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
        if pending && !self.patience_ended(now) {
            return Ok(None);
        }
        if up == 0 && !self.channels.is_empty() {
            return Err(self.failure());
        }
        Ok(Some(self.finish()))
    }

    /// Running out of descriptors or memory is no NIC's fault.
    fn exhausted(&self) -> Option<Error> {
        self.channels.iter().filter_map(Channel::cause).find(|e| e.kind() == ErrorKind::Resource)
    }

    fn patience_ended(&self, now: Instant) -> bool {
        let Some(first) = self.first_up else { return false };
        let patience = (first.saturating_duration_since(self.began) * STRAGGLER_WAIT_FACTOR).max(MIN_STRAGGLER_WAIT);
        now.saturating_duration_since(first) >= patience
    }

    /// Hands out what is up and gives up the rest, with a WARN for each NIC.
    pub(crate) fn finish(&mut self) -> Vec<Pair> {
        self.report();
        let mut pairs = Vec::new();
        for channel in self.channels.drain(..) {
            if let (Half::Up(send), Half::Up(recv)) = (channel.send, channel.recv) {
                pairs.push(Pair { index: channel.index, send, recv, nic: channel.nic, peer_nic: channel.peer_nic });
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
                left_out(&channel.nic, &cause);
                warned.push(channel.nic.clone());
            }
            channel.reported = true;
        }
    }

    /// The error when nothing came up.
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

    /// The peer has said which channels came up on its side: the others are not waited for any more.
    pub(crate) fn peer_has(&mut self, theirs: &[usize]) {
        for channel in &mut self.channels {
            if !theirs.contains(&channel.index) {
                channel.lost = channel.missing();
                channel.give_up();
            }
        }
    }

    /// Why there are no channels, where nothing could be joined.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// What is still missing, for the error at the caller's deadline: NIC, address and direction of each channel.
    pub(crate) fn missing(&self) -> Error {
        let missing: Vec<String> = self.channels.iter().filter_map(Channel::missing).collect();
        let more = missing.len().saturating_sub(4);
        let tail = if more > 0 { format!(", and {more} more") } else { String::new() };
        let failed = self.channels.iter().find_map(Channel::cause).map_or(String::new(), |e| format!("; {e}"));
        err!(
            TimedOut,
            "{} of {} channels did not come up in time: {}{tail}{failed}",
            self.channels.iter().filter(|c| !c.up()).count(),
            self.channels.len(),
            missing.iter().take(4).cloned().collect::<Vec<_>>().join(", ")
        )
    }

    /// When it makes sense to poll again: soon at first, more and more rarely later.
    pub(crate) fn retry_in(&self) -> Duration {
        let slowest = if self.plugin.traits.lingers { 5 } else { 10 };
        (self.began.elapsed() / 8).clamp(Duration::from_micros(20), Duration::from_millis(slowest))
    }
}

/// Channels to ask for on `nics` NICs with so many `cores`: as configured, else as many as help. A channel of a plugin with threads of its own is worth a
/// thread, so cores bound the number: all of few, half of many. Every NIC gets at least one; where NICs are paired each gets 2 to 4.
pub(crate) fn channel_count(plugin: &Plugin, configured: Option<usize>, nics: usize, cores: usize) -> usize {
    let default = if plugin.traits.paired_nics {
        pairing::channels_of_a_nic(cores) * nics
    } else {
        cores.clamp(2, 8).max((cores / 2).min(16)).max(nics)
    };
    configured.unwrap_or(default).min(64)
}

/// The devices that serve a GPU, or memory of the host where none is given: those whose name can reach the peer and that have a carrier.
/// Where NICs are paired a GPU uses those of its own PCIe switch; else those of its NUMA node, nearest first.
pub(crate) fn nics_for(plugin: &Plugin, devices: &[Device], gpu_pci_path: Option<&str>) -> Vec<usize> {
    let mut chosen = if plugin.traits.paired_nics {
        pairing::closest(devices, gpu_pci_path)
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
                format_args!("NIC {nic} is no PCI device and is left out: plugin {} cannot register memory for it", plugin.name),
            );
        }
        chosen.retain(named);
    }
    // Plugins of others list their devices once; the software plugin leaves such NICs out by itself.
    if !plugin.traits.devices_change {
        let all = chosen.len();
        chosen.retain(|&i| topology::has_carrier(Path::new("/"), &devices[i].name));
        if chosen.len() < all {
            NO_CARRIER.log(
                log::Level::Warn,
                Instant::now(),
                format_args!("{} NICs of plugin {} have no carrier and are left out", all - chosen.len(), plugin.name),
            );
        }
    }
    chosen
}
