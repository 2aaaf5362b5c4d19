//! The channels of one set-up on their way up, over all plugins of the engine: one set of channels for each. Knows nothing of the
//! control connection.

use super::link::{number, Agreed, Offers, Ready, PER_SET};
use super::local::{self, Local};
use super::sets::{plans, Plan};
use super::site::Site;
use crate::addresses::AllowList;
use crate::host::{Opening, ProofKeys};
use crate::net::secure::ChannelKeys;
use crate::net::setup::{self, Establishing, Listening, Pair, Role};
use crate::net::traits::Traits;
use crate::status::{bail, Error, Result};
use std::time::{Duration, Instant};

/// How long sets that are not needed are waited for when the others are up.
const SPARE_PATIENCE: Duration = Duration::from_secs(5);

/// The sets of a connection, here.
pub(crate) fn planned(site: &Site, agreed: &Agreed) -> Vec<Plan> {
    let channels = agreed.terms.channels.into();
    plans(&site.plugins, &agreed.own, &agreed.peer.hello, agreed.connecting, channels)
}

/// Descriptors of the comms of a channel, and of what it listens with: a comm of a plugin of others has a control socket, and one of data
/// or more, each of which has a stand-in where it receives from a plugin that asks for peers.
fn of_a_channel(traits: &Traits, tcpx_sockets: usize) -> (usize, usize) {
    if !traits.lingers {
        return (2, 1);
    }
    let data = if traits.sends_late { tcpx_sockets } else { 0 }.max(2);
    let stand_ins = if traits.asks_for_peers { data } else { 0 };
    (2 * (1 + data) + stand_ins, 2)
}

/// Of all channels of a set: of the comms, and of what is listened with.
fn of_a_set(plan: &Plan) -> (usize, usize) {
    let (comms, listening) = of_a_channel(&plan.plugin.traits, crate::config::tcpx_sockets());
    (plan.channels * comms, plan.channels * listening)
}

/// Descriptors that a set-up of these sets opens: two directions and a listening socket for each channel.
pub(crate) fn cost(plans: &[Plan]) -> usize {
    LOCAL_COST + plans.iter().map(of_a_set).map(|(comms, listening)| comms + listening).sum::<usize>()
}

/// Those of them that plugins of others open in their own time, once all is listened at.
pub(crate) fn later(plans: &[Plan]) -> usize {
    plans.iter().filter(|plan| plan.plugin.traits.lingers).map(|plan| of_a_set(plan).0).sum()
}

/// Descriptors that meeting a peer on this host opens: sockets, rings, and what waits at the listening socket.
const LOCAL_COST: usize = 6;

/// Listen comms of all sets, offered and not yet connected, and where a peer of this host is waited for.
pub(crate) struct Opened {
    sets: Vec<(Plan, Result<Listening>)>,
    local: Result<Opening>,
}

impl Opened {
    /// Opens the listen comms of each set, spread over the NICs near its GPU. `connecting`: this side made the control connection.
    pub(crate) fn open(site: &Site, plans: Vec<Plan>, connecting: bool) -> Result<Opened> {
        let mut sets = Vec::new();
        for plan in plans {
            match listen(site, &plan, connecting) {
                Err(e) if !plan.spare => return Err(e),
                outcome => sets.push((plan, outcome)),
            }
        }
        Ok(Opened { sets, local: local::opening(site, connecting) })
    }

    /// What the peer is told, by set.
    pub(crate) fn offers(&self) -> Offers {
        let sets = self.sets.iter().map(|(_, set)| set.as_ref().map_or_else(|_| Vec::new(), Listening::offers)).collect();
        Offers { sets, local: self.local.as_ref().ok().map(Opening::invitation) }
    }

    /// Connects to the peer's offers and accepts the peer's connects from now on. `keys` gives those of a channel by set and number,
    /// `proof` those of a process of this host; nothing outside `allowed` is dialled.
    ///
    /// # Errors
    /// `Protocol` when the peer has other sets.
    pub(crate) fn establish(
        self,
        site: &Site,
        offers: &Offers,
        keys: impl Fn(usize, usize) -> Result<ChannelKeys>,
        proof: ProofKeys,
        allowed: &AllowList,
    ) -> Result<Raising> {
        let peers = &offers.sets;
        if peers.len() != self.sets.len() {
            bail!(Protocol, "the peer offers {} sets of channels, this side {}", peers.len(), self.sets.len());
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
        let local = Local::begin(site, self.local, offers.local.as_ref(), proof);
        Ok(Raising { sets, needed_up: None, local })
    }
}

fn listen(site: &Site, plan: &Plan, connecting: bool) -> Result<Listening> {
    let plugin = &plan.plugin;
    if plan.channels == 0 {
        bail!(Resource, "too few file descriptors (ulimit -n)");
    }
    // A NIC may have come or gone since the last set-up.
    let devices = plugin.current_devices()?;
    let near = setup::nics_for(plugin, &devices, site.gpus.pci_path(plan.own()).as_deref());
    let gpu = site.gpus.followed_by(plugin, plan.own())?;
    Listening::open(plugin, &devices, &near, plan.channels, gpu, Role::of(plugin, connecting))
}

struct Set {
    plan: Plan,
    /// `None` where this side could not listen.
    coming: Option<Establishing>,
    /// What came up, once that is settled.
    up: Option<Vec<Pair>>,
    /// Why nothing did.
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

    /// Leaves what has not come up.
    fn settle(&mut self) {
        if let (None, Some(coming)) = (&self.up, &mut self.coming) {
            self.why = Some(coming.missing().to_string());
            self.up = Some(coming.finish());
        }
    }
}

/// Channels on their way up. Dropping it gives up those that are not there yet.
pub(crate) struct Raising {
    sets: Vec<Set>,
    local: Local,
    /// Since when only spare sets are missing.
    needed_up: Option<Instant>,
}

/// A set that came up.
pub(crate) struct Raised {
    pub plan: Plan,
    /// Its channels; none where other sets carry what it would.
    pub pairs: Vec<Pair>,
    /// Why there are none.
    pub why: Option<String>,
}

impl Raising {
    /// Goes on; whether it is settled what is up.
    ///
    /// # Errors
    /// Why nothing of a set could come up that the connection needs.
    pub(crate) fn poll(&mut self) -> Result<bool> {
        self.sets.iter_mut().try_for_each(Set::poll)?;
        self.local.poll();
        if self.sets.iter().all(|s| s.up.is_some() || s.plan.spare) {
            let since = *self.needed_up.get_or_insert_with(Instant::now);
            if since.elapsed() > SPARE_PATIENCE {
                self.sets.iter_mut().for_each(Set::settle);
            }
        }
        Ok(self.sets.iter().all(|s| s.up.is_some()) && self.local.is_settled())
    }

    /// The peer has said what came up on its side: nothing else is waited for.
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

    /// The error at the deadline: what is missing.
    pub(crate) fn missing(&self) -> Option<Error> {
        self.pending().next().map(Establishing::missing)
    }

    /// What came up, and what of it the peer is told.
    ///
    /// # Errors
    /// When nothing could be joined at all.
    pub(crate) fn finish(self) -> Result<(Up, Ready)> {
        let raise = |s: Set| Raised { plan: s.plan, pairs: s.up.unwrap_or_default(), why: s.why };
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

/// What a set-up has raised.
pub(crate) struct Up {
    /// Channels by set, in the order of their numbers.
    pub sets: Vec<Raised>,
    /// What was found on this host.
    pub local: Local,
}

/// Leaves what is up on both sides.
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

/// Channel numbers, apart by set.
fn by_set(numbers: &[u16]) -> impl Iterator<Item = Vec<usize>> + '_ {
    let of = |set: usize| numbers.iter().filter(move |&&n| usize::from(n) / PER_SET == set);
    (0..).map(move |set| of(set).map(|&n| usize::from(n) % PER_SET).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_of_a_plugin_of_others_has_a_control_socket_each_way() {
        let [other, tcpx] = ["Other", "GPUDirectTCPX"].map(Traits::of_others);
        assert_eq!(of_a_channel(&Traits { lingers: false, ..tcpx }, 8), (2, 1));
        assert_eq!(of_a_channel(&other, 8), (6, 2), "whatever TCPX is set to");
        assert_eq!([1, 2, 8].map(|sockets| of_a_channel(&tcpx, sockets)), [(8, 2), (8, 2), (26, 2)]);
    }

    #[test]
    fn a_set_up_costs_the_descriptors_of_all_its_channels_and_those_of_a_peer_on_this_host() {
        let set = |channels| Plan { plugin: crate::net::plugin::Plugin::soft().unwrap(), gpus: None, channels, spare: false };
        assert_eq!((of_a_set(&set(4)), of_a_set(&set(1))), ((8, 4), (2, 1)));
        assert_eq!((cost(&[]), cost(&[set(4), set(1)])), (LOCAL_COST, LOCAL_COST + 12 + 3));
        assert_eq!(later(&[set(4)]), 0, "all of its own are open at once");
    }

    #[test]
    fn numbers_name_set_and_channel() {
        let numbers = [number(0, 0), number(0, 63), number(1, 0), number(3, 7)];
        let sets: Vec<Vec<usize>> = by_set(&numbers).take(4).collect();
        assert_eq!(sets, [vec![0, 63], vec![0], vec![], vec![7]]);
    }
}
