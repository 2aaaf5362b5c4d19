//! The channels of one set-up while they come up: one set for each plugin of the engine, and for further GPUs. Knows nothing
//! about the control connection.

pub(super) mod plan;

use super::channels::plan::{plans, Plan};
use super::context::SetupContext;
use super::control::{number, Agreed, Offers, Ready, PER_SET};
use super::lineage::{Lineage, Members, Seat};
use super::local::{self, Local};
use crate::addresses::AllowList;
use crate::host::{Opening, ProofKeys};
use crate::net::secure::ChannelKeys;
use crate::net::setup::{self, Establishing, Listening, Pair, Role};
use crate::net::traits::Traits;
use crate::status::{bail, err, Error, Result};
use std::time::{Duration, Instant};

/// How long to wait for spare sets once the others are up.
const SPARE_SETS_DEADLINE: Duration = Duration::from_secs(5);

/// How long lost channels may take to come up: a NIC that is still dead must not hold up others.
const RESTORE: Duration = Duration::from_secs(2);

/// The sets of a connection, as this engine numbers them.
pub(crate) fn planned(context: &SetupContext, agreed: &Agreed) -> Vec<Plan> {
    let plugins = (&context.plugins.device, context.plugins.host.as_ref());
    plans(plugins, &agreed.own, &agreed.peer.hello, agreed.connecting, &agreed.terms)
}

/// Descriptors of a channel's comms, and of its listening. A comm of a foreign plugin has a control socket and one or more data
/// sockets; each data socket has a stand-in where comms receive from a plugin that asks for peers.
fn channel_cost(traits: &Traits, tcpx_sockets: usize) -> (usize, usize) {
    if traits.packs_sends {
        // Each comm has a connection for payload, and what it sends from is bound by one more descriptor.
        return (5, 1);
    }
    if !traits.lingers {
        return (2, 1);
    }
    let data = if traits.sends_late { tcpx_sockets } else { 0 }.max(2);
    let stand_ins = if traits.asks_for_peers { data } else { 0 };
    (2 * (1 + data) + stand_ins, 2)
}

/// The same for all channels of a set.
fn set_cost(plan: &Plan) -> (usize, usize) {
    let (comms, listening) = channel_cost(&plan.plugin.traits, crate::config::tcpx_sockets());
    (plan.channels * comms, plan.channels * listening)
}

/// Descriptors that a set-up of these sets opens: two directions and a listening socket for each channel.
pub(crate) fn cost(plans: &[Plan]) -> usize {
    LOCAL_COST + plans.iter().map(set_cost).map(|(comms, listening)| comms + listening).sum::<usize>()
}

/// The part of them that foreign plugins open later, once all listening sockets are open.
pub(crate) fn later(plans: &[Plan]) -> usize {
    plans.iter().filter(|plan| plan.plugin.traits.lingers).map(|plan| set_cost(plan).0).sum()
}

/// Descriptors opened to meet a peer on this host: sockets, rings, and connections waiting at the listening socket.
const LOCAL_COST: usize = 6;

/// Listen comms of all sets, offered and not yet connected, and the meeting point for a peer on this host.
pub(crate) struct Opened {
    sets: Vec<(Plan, Result<Listening>)>,
    local: Result<Opening>,
    /// The deadline of its channels.
    until: Option<Instant>,
}

impl Opened {
    /// Opens the listen comms of each set, spread over the NICs near its GPU. `connecting`: this engine is the connector.
    pub(crate) fn open(context: &SetupContext, plans: Vec<Plan>, connecting: bool) -> Result<Opened> {
        let mut sets = Vec::new();
        for plan in plans {
            match listen(context, &plan, connecting) {
                Err(e) if !plan.spare => return Err(e),
                outcome => sets.push((plan, outcome)),
            }
        }
        Ok(Opened { sets, local: local::opening(context, connecting), until: None })
    }

    /// Opens the listen comms of lost channels of a connection, each on its own NIC. They have a deadline: what is up then is taken.
    ///
    /// # Errors
    /// When none can be opened.
    pub(crate) fn reopen(context: &SetupContext, lineage: &Lineage, seats: &[Seat], now: Instant) -> Result<Opened> {
        let (mut sets, mut any, mut last) = (Vec::new(), false, None);
        for (number, members) in lineage.sets.iter().enumerate() {
            let wanted: Vec<usize> = seats.iter().filter(|seat| seat.set == number).map(|seat| seat.index).collect();
            // Other channels carry what it does.
            let plan = Plan { channels: wanted.len(), spare: true, ..members.plan.clone() };
            let opened = relisten(context, members, wanted, lineage.agreed.connecting);
            any |= opened.is_ok();
            last = opened.as_ref().err().cloned().or(last);
            sets.push((plan, opened));
        }
        match (any, last) {
            (false, Some(why)) => Err(why),
            _ => {
                Ok(Opened { sets, local: Err(err!(Unsupported, "the connection has met its peer")), until: Some(now + RESTORE) })
            }
        }
    }

    /// A set-up without channels.
    pub(crate) fn none() -> Opened {
        Opened { sets: Vec::new(), local: Err(err!(Unsupported, "the connection has met its peer")), until: None }
    }

    /// The offers to send to the peer, by set.
    pub(crate) fn offers(&self) -> Offers {
        let sets = self.sets.iter().map(|(_, set)| set.as_ref().map_or_else(|_| Vec::new(), Listening::offers)).collect();
        Offers { sets, local: self.local.as_ref().ok().map(Opening::invitation), ..Offers::default() }
    }

    /// Connects to the peer's offers and accepts its connects. `keys` returns the keys of a channel by set and number, `proof`
    /// those for a peer on this host; nothing outside `allowed` is dialled.
    ///
    /// # Errors
    /// `Protocol` when the peer has a different number of sets.
    pub(crate) fn establish(
        self,
        context: &SetupContext,
        offers: &Offers,
        keys: impl Fn(usize, usize) -> Result<ChannelKeys>,
        proof: ProofKeys,
        allowed: &AllowList,
    ) -> Result<Raising> {
        let peers = &offers.sets;
        if peers.len() != self.sets.len() {
            bail!(Protocol, "the peer offers {} sets of channels, this engine {}", peers.len(), self.sets.len());
        }
        let mut sets = Vec::new();
        for (number, ((plan, set), peer)) in self.sets.into_iter().zip(peers).enumerate() {
            sets.push(match set {
                Ok(listening) => {
                    let coming = listening.establish(peer, Some(&|index| keys(number, index)), allowed);
                    Set { plan, coming: Some(coming), up: None, why: None }
                }
                Err(e) => Set { plan, coming: None, up: Some(Vec::new()), why: Some(e.to_string()) },
            });
        }
        let local = Local::begin(context, self.local, offers.local.as_ref(), proof);
        Ok(Raising { sets, needed_up: None, local, until: self.until })
    }
}

fn listen(context: &SetupContext, plan: &Plan, connecting: bool) -> Result<Listening> {
    let plugin = &plan.plugin;
    if plan.channels == 0 {
        bail!(Resource, "too few file descriptors (ulimit -n)");
    }
    // A NIC may have appeared or disappeared since the last set-up.
    let devices = plugin.current_devices()?;
    let mut near = setup::nics_for(plugin, &devices, context.gpus.pci_path(plan.own()).as_deref());
    if plan.spare {
        // An Offer has no room for channels of NICs that may come back in every further set.
        near.absent.clear();
    }
    let gpu = context.gpus.followed_by(plugin, plan.own())?;
    Listening::open(plugin, &devices, &near, plan.channels, gpu, Role::of(plugin, connecting))
}

/// As [`listen`], for these channels of a set.
fn relisten(context: &SetupContext, members: &Members, wanted: Vec<usize>, connecting: bool) -> Result<Listening> {
    let Plan { plugin, .. } = &members.plan;
    let devices = plugin.current_devices()?;
    let gpu = context.gpus.followed_by(plugin, members.plan.own())?;
    let wanted = wanted.into_iter().filter_map(|index| Some((index, members.nics.get(index)?.0.as_str()))).collect();
    Listening::reopen(plugin, &devices, wanted, gpu, Role::of(plugin, connecting))
}

struct Set {
    plan: Plan,
    /// `None` where this engine could not listen.
    coming: Option<Establishing>,
    /// The channels that came up, once settled.
    up: Option<Vec<Pair>>,
    /// Why none did.
    why: Option<String>,
}

impl Set {
    fn poll(&mut self) -> Result<()> {
        let (None, Some(coming)) = (&self.up, &mut self.coming) else { return Ok(()) };
        match coming.poll() {
            Ok(up) => {
                self.why = coming.reason().map(str::to_owned);
                self.up = up;
            }
            Err(e) if self.plan.spare => {
                self.why = Some(e.to_string());
                self.up = Some(Vec::new());
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Gives up on channels that have not come up.
    fn settle(&mut self) {
        if let (None, Some(coming)) = (&self.up, &mut self.coming) {
            self.why = Some(coming.missing().to_string());
            self.up = Some(coming.finish());
        }
    }
}

/// Channels coming up. Dropping it gives up those that are not up yet.
pub(crate) struct Raising {
    sets: Vec<Set>,
    local: Local,
    /// Since when only spare sets are missing.
    needed_up: Option<Instant>,
    /// When to take what is up.
    until: Option<Instant>,
}

/// A set that came up.
pub(crate) struct Raised {
    pub plan: Plan,
    /// Its channels that are up; none where other sets carry its traffic.
    pub pairs: Vec<Pair>,
    /// The NICs of all its channels by number, here and at the peer.
    pub names: Vec<(String, String)>,
    /// Why it has none.
    pub why: Option<String>,
}

impl Raised {
    /// Why it has no channels.
    pub(crate) fn why_not(&self) -> &str {
        self.why.as_deref().unwrap_or("no channels came up")
    }
}

impl Raising {
    /// Makes progress. Returns whether it is settled which channels are up.
    ///
    /// # Errors
    /// Why a set that the connection needs could not come up.
    pub(crate) fn poll(&mut self) -> Result<bool> {
        self.sets.iter_mut().try_for_each(Set::poll)?;
        self.local.poll();
        if self.until.is_none() && self.sets.iter().all(|s| s.up.is_some() || s.plan.spare) {
            let since = *self.needed_up.get_or_insert_with(Instant::now);
            if since.elapsed() > SPARE_SETS_DEADLINE {
                self.sets.iter_mut().for_each(Set::settle);
            }
        }
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.sets.iter_mut().for_each(Set::settle);
        }
        Ok(self.sets.iter().all(|s| s.up.is_some()) && self.local.is_settled())
    }

    /// The peer's channels are settled: stops waiting for any others.
    pub(crate) fn peer_has(&mut self, up: &Ready) {
        if !up.local {
            self.local.give_up();
        }
        for (set, theirs) in self.sets.iter_mut().zip(by_set(&up.numbers)) {
            if let Some(coming) = &mut set.coming {
                coming.peer_has(&theirs);
            }
        }
    }

    fn pending(&self) -> impl Iterator<Item = &Establishing> {
        self.sets.iter().filter(|s| s.up.is_none()).filter_map(|s| s.coming.as_ref())
    }

    /// When to poll again.
    pub(crate) fn retry_in(&self) -> Duration {
        self.pending().map(Establishing::retry_in).min().unwrap_or(Duration::ZERO)
    }

    /// The error at the deadline: which channels are missing.
    pub(crate) fn missing(&self) -> Option<Error> {
        self.pending().next().map(Establishing::missing)
    }

    /// The channels that came up, and the message about them for the peer.
    ///
    /// # Errors
    /// When no channel came up at all.
    pub(crate) fn finish(self) -> Result<(Up, Ready)> {
        let names = |coming: Option<Establishing>| coming.map_or_else(Vec::new, |coming| coming.names().to_vec());
        let raise = |s: Set| Raised { plan: s.plan, pairs: s.up.unwrap_or_default(), names: names(s.coming), why: s.why };
        let raised: Vec<Raised> = self.sets.into_iter().map(raise).collect();
        let numbers: Vec<u16> =
            raised.iter().enumerate().flat_map(|(set, r)| r.pairs.iter().map(move |p| number(set, p.index))).collect();
        match raised.iter().find_map(|r| r.why.as_ref()) {
            Some(why) if numbers.is_empty() => bail!(Unsupported, "{why}"),
            _ => {
                let ready = Ready { numbers, local: self.local.is_linked() };
                Ok((Up { sets: raised, local: self.local }, ready))
            }
        }
    }
}

/// The channels that a set-up brought up.
pub(crate) struct Up {
    /// Channels by set, ordered by number.
    pub sets: Vec<Raised>,
    /// The direct path, if the peer is on this host.
    pub local: Local,
}

/// Keeps the channels that are up in both engines.
///
/// # Errors
/// `Unreachable` when a set that the connection needs has lost all of its channels.
pub(crate) fn agree(mut up: Up, theirs: &Ready) -> Result<Up> {
    if !theirs.local {
        up.local.give_up();
    }
    for (set, theirs) in up.sets.iter_mut().zip(by_set(&theirs.numbers)) {
        let before = set.pairs.len();
        set.pairs = setup::agree(std::mem::take(&mut set.pairs), &theirs);
        match set.pairs.len() {
            0 if before > 0 => {
                let why = format!("none of {before} channels is up on both sides");
                if !set.plan.spare {
                    bail!(Unreachable, "{why}");
                }
                set.why = Some(why);
            }
            up if up < before => {
                setup::warn_of_fewer(format_args!("{up} of {before} channels are up on both sides: the connection uses these"));
            }
            _ => {}
        }
    }
    Ok(up)
}

/// Splits channel numbers by set.
fn by_set(numbers: &[u16]) -> impl Iterator<Item = Vec<usize>> + '_ {
    let of = |set: usize| numbers.iter().filter(move |&&n| usize::from(n) / PER_SET == set);
    (0..).map(move |set| of(set).map(|&n| usize::from(n) % PER_SET).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_of_a_foreign_plugin_has_a_control_socket_each_way() {
        let [other, tcpx] = ["Other", "GPUDirectTCPX"].map(Traits::of_others);
        assert_eq!(channel_cost(&Traits { lingers: false, ..tcpx }, 8), (2, 1));
        assert_eq!(channel_cost(&other, 8), (6, 2), "whatever the TCPX setting");
        assert_eq!([1, 2, 8].map(|sockets| channel_cost(&tcpx, sockets)), [(8, 2), (8, 2), (26, 2)]);
    }

    #[test]
    fn a_set_up_costs_the_descriptors_of_its_channels_and_of_meeting_a_peer_on_this_host() {
        let set = |channels| Plan { plugin: crate::net::plugin::Plugin::soft().unwrap(), gpus: None, channels, spare: false };
        assert_eq!((set_cost(&set(4)), set_cost(&set(1))), ((8, 4), (2, 1)));
        assert_eq!((cost(&[]), cost(&[set(4), set(1)])), (LOCAL_COST, LOCAL_COST + 12 + 3));
        assert_eq!(later(&[set(4)]), 0, "the software plugin opens all at once");
    }

    #[test]
    fn numbers_encode_set_and_channel() {
        let numbers = [number(0, 0), number(0, 63), number(1, 0), number(3, 7)];
        let sets: Vec<Vec<usize>> = by_set(&numbers).take(4).collect();
        assert_eq!(sets, [vec![0, 63], vec![0], vec![], vec![7]]);
    }
}
