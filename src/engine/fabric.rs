//! The channels of one set-up on their way up, over all plugins of the engine: one set of channels for each. Knows nothing of the
//! control connection.

use super::link::{number, Agreed, PER_SET};
use super::sets::{plans, Plan};
use super::site::Site;
use crate::addresses::AllowList;
use crate::net::secure::ChannelKeys;
use crate::net::setup::{self, Establishing, Listening, Offer, Pair, Role};
use crate::status::{bail, Error, Result};
use std::time::{Duration, Instant};

/// How long sets that are not needed are waited for when the others are up.
const SPARE_PATIENCE: Duration = Duration::from_secs(5);

/// The sets of a connection, here.
pub(crate) fn planned(site: &Site, agreed: &Agreed) -> Vec<Plan> {
    let channels = agreed.terms.channels.into();
    plans(&site.plugins, &agreed.own, &agreed.peer.hello, agreed.connecting, channels)
}

/// Descriptors that a set-up of these sets opens: two directions and a listening socket for each channel; a comm of a plugin of others
/// has a control socket and two of data.
pub(crate) fn cost(plans: &[Plan]) -> usize {
    plans.iter().map(|p| p.channels * if p.plugin.traits.lingers { 8 } else { 3 }).sum()
}

/// Listen comms of all sets, offered and not yet connected.
pub(crate) struct Opened(Vec<(Plan, Result<Listening>)>);

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
        Ok(Opened(sets))
    }

    /// What the peer is told, by set.
    pub(crate) fn offers(&self) -> Vec<Vec<Offer>> {
        self.0.iter().map(|(_, set)| set.as_ref().map_or_else(|_| Vec::new(), Listening::offers)).collect()
    }

    /// Connects to the peer's offers and accepts the peer's connects from now on. `keys` gives those of a channel by set and number;
    /// nothing outside `allowed` is dialled.
    ///
    /// # Errors
    /// `Protocol` when the peer has other sets.
    pub(crate) fn establish(
        self,
        peers: &[Vec<Offer>],
        keys: impl Fn(usize, usize) -> Result<ChannelKeys>,
        allowed: &AllowList,
    ) -> Result<Raising> {
        if peers.len() != self.0.len() {
            bail!(Protocol, "the peer offers {} sets of channels, this side {}", peers.len(), self.0.len());
        }
        let mut sets = Vec::new();
        for (number, ((plan, set), peer)) in self.0.into_iter().zip(peers).enumerate() {
            sets.push(match set {
                Ok(listening) => {
                    let coming = listening.establish(peer, Some(&|index| keys(number, index)), allowed);
                    Set { plan, coming: Some(coming), up: None, why: None }
                }
                Err(e) => Set { plan, coming: None, up: Some(Vec::new()), why: Some(e.to_string()) },
            });
        }
        Ok(Raising { sets, needed_up: None })
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
        if self.sets.iter().all(|s| s.up.is_some() || s.plan.spare) {
            let since = *self.needed_up.get_or_insert_with(Instant::now);
            if since.elapsed() > SPARE_PATIENCE {
                self.sets.iter_mut().for_each(Set::settle);
            }
        }
        Ok(self.sets.iter().all(|s| s.up.is_some()))
    }

    /// The peer has said what came up on its side: nothing else is waited for.
    pub(crate) fn peer_has(&mut self, numbers: &[u16]) {
        for (set, theirs) in self.sets.iter_mut().zip(by_set(numbers)) {
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

    /// What came up, and its numbers for the peer.
    ///
    /// # Errors
    /// When nothing could be joined at all.
    pub(crate) fn finish(self) -> Result<(Vec<Raised>, Vec<u16>)> {
        let raise = |s: Set| Raised { plan: s.plan, pairs: s.up.unwrap_or_default(), why: s.why };
        let raised: Vec<Raised> = self.sets.into_iter().map(raise).collect();
        let numbers: Vec<u16> =
            raised.iter().enumerate().flat_map(|(set, r)| r.pairs.iter().map(move |p| number(set, p.index))).collect();
        match raised.iter().find_map(|r| r.why.as_ref()) {
            Some(why) if numbers.is_empty() => bail!(Unsupported, "{why}"),
            _ => Ok((raised, numbers)),
        }
    }
}

/// Leaves the channels that are up on both sides.
///
/// # Errors
/// `Unreachable` when a set that the connection needs has lost all of its channels.
pub(crate) fn agree(mut raised: Vec<Raised>, theirs: &[u16]) -> Result<Vec<Raised>> {
    for (set, theirs) in raised.iter_mut().zip(by_set(theirs)) {
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
    Ok(raised)
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
    fn numbers_name_set_and_channel() {
        let numbers = [number(0, 0), number(0, 63), number(1, 0), number(3, 7)];
        let sets: Vec<Vec<usize>> = by_set(&numbers).take(4).collect();
        assert_eq!(sets, [vec![0, 63], vec![0], vec![], vec![7]]);
    }
}
