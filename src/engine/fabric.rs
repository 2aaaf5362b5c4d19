//! The channels of one set-up on their way up, over all plugins of the engine: one set of channels for each. Knows nothing of the
//! control connection.

use super::link::{number, PER_SET};
use super::site::Site;
use crate::net::secure::ChannelKeys;
use crate::net::setup::{self, Establishing, Listening, Offer, Pair};
use crate::status::{bail, Error, Result};
use std::time::Duration;

/// Listen comms of all plugins, offered and not yet connected.
pub(crate) struct Opened(Vec<Listening>);

impl Opened {
    /// Opens `n` listen comms of each plugin, spread over the NICs near the engine's GPU.
    pub(crate) fn open(site: &Site, n: usize) -> Result<Opened> {
        let mut sets = Vec::new();
        for plugin in site.plugins.all() {
            // A NIC may have come or gone since the last set-up.
            let devices = plugin.current_devices()?;
            let near = setup::nics_for(plugin, &devices, site.gpus.pci_path().as_deref());
            sets.push(Listening::open(plugin, &devices, &near, n, site.gpus.followed_by(plugin)?)?);
        }
        Ok(Opened(sets))
    }

    /// What the peer is told, by set.
    pub(crate) fn offers(&self) -> Vec<Vec<Offer>> {
        self.0.iter().map(Listening::offers).collect()
    }

    /// Connects to the peer's offers and accepts the peer's connects from now on. `keys` gives those of a channel by set and number.
    ///
    /// # Errors
    /// `Protocol` when the peer has other sets.
    pub(crate) fn establish(self, peers: &[Vec<Offer>], keys: impl Fn(usize, usize) -> Result<ChannelKeys>) -> Result<Raising> {
        if peers.len() != self.0.len() {
            bail!(Protocol, "the peer offers {} sets of channels, this side {}", peers.len(), self.0.len());
        }
        let start = |(number, (set, peer)): (usize, (Listening, &Vec<Offer>))| {
            let coming = set.establish(peer, Some(&|index| keys(number, index)));
            Set { coming, up: None }
        };
        Ok(Raising(self.0.into_iter().zip(peers).enumerate().map(start).collect()))
    }
}

struct Set {
    coming: Establishing,
    /// What came up, once that is settled.
    up: Option<Vec<Pair>>,
}

/// Channels on their way up. Dropping it gives up those that are not there yet.
pub(crate) struct Raising(Vec<Set>);

/// What came up, by set.
pub(crate) type Raised = Vec<Vec<Pair>>;

impl Raising {
    /// Goes on; whether it is settled what is up.
    ///
    /// # Errors
    /// Why nothing of a set could come up.
    pub(crate) fn poll(&mut self) -> Result<bool> {
        let mut settled = true;
        for set in &mut self.0 {
            if set.up.is_none() {
                set.up = set.coming.poll()?;
                settled &= set.up.is_some();
            }
        }
        Ok(settled)
    }

    /// The peer has said what came up on its side: nothing else is waited for.
    pub(crate) fn peer_has(&mut self, numbers: &[u16]) {
        for (set, theirs) in self.0.iter_mut().zip(by_set(numbers)) {
            set.coming.peer_has(&theirs);
        }
    }

    /// When to poll again.
    pub(crate) fn retry_in(&self) -> Duration {
        self.0.iter().filter(|s| s.up.is_none()).map(|s| s.coming.retry_in()).min().unwrap_or(Duration::ZERO)
    }

    /// The error at the deadline: what is missing.
    pub(crate) fn missing(&self) -> Option<Error> {
        self.0.iter().find(|s| s.up.is_none()).map(|s| s.coming.missing())
    }

    /// What came up, and its numbers for the peer.
    ///
    /// # Errors
    /// When nothing could be joined at all.
    pub(crate) fn finish(self) -> Result<(Raised, Vec<u16>)> {
        let reason = self.0.iter().find_map(|s| s.coming.reason()).map(str::to_owned);
        let raised: Raised = self.0.into_iter().map(|s| s.up.unwrap_or_default()).collect();
        let numbers: Vec<u16> =
            raised.iter().enumerate().flat_map(|(set, pairs)| pairs.iter().map(move |p| number(set, p.index))).collect();
        match reason {
            Some(reason) if numbers.is_empty() => bail!(Unsupported, "{reason}"),
            Some(reason) => log::warn!("{reason}: what it would carry takes the other channels"),
            None => {}
        }
        Ok((raised, numbers))
    }
}

/// Leaves the channels that are up on both sides.
///
/// # Errors
/// `Unreachable` when a set has lost all of its channels.
pub(crate) fn agree(raised: Raised, theirs: &[u16]) -> Result<Raised> {
    let mut agreed = Vec::new();
    for (pairs, theirs) in raised.into_iter().zip(by_set(theirs)) {
        let before = pairs.len();
        let pairs = setup::agree(pairs, &theirs);
        if pairs.is_empty() && before > 0 {
            bail!(Unreachable, "none of {before} channels is up on both sides");
        }
        if pairs.len() < before {
            log::warn!("{} of {before} channels are up on both sides: the connection uses these", pairs.len());
        }
        agreed.push(pairs);
    }
    Ok(agreed)
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
