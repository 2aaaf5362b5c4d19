//! Which sets of channels a connection has: one for each plugin, and further ones for a plugin whose comms belong to one GPU, for
//! memory registered on other GPUs. Both engines compute the same list. Pure.

use crate::net::plugin::Plugin;
use crate::types::{Place, Protect};
use crate::wire::hello::{Hello, Terms};
use crate::wire::setup::MAX_SETS;
use std::sync::Arc;

/// Most channels of a further set: each costs threads of the plugin.
const FURTHER_CHANNELS: usize = 4;

/// A set of channels that a connection should have.
#[derive(Clone)]
pub(crate) struct Plan {
    pub plugin: Arc<Plugin>,
    /// The GPUs, here and at the peer, whose memory its comms carry; `None` where they carry any.
    pub gpus: Option<(Place, Place)>,
    /// Channels to offer.
    pub channels: usize,
    /// The connection comes up without it: other channels carry its traffic.
    pub spare: bool,
}

impl Plan {
    /// This engine's GPU.
    pub(crate) fn own(&self) -> Option<Place> {
        self.gpus.map(|(here, _)| here)
    }

    /// Its purpose, for the log.
    pub(crate) fn purpose(&self) -> String {
        Plan::purpose_of(self.gpus)
    }

    /// The words for a pair of GPUs, or for host memory.
    pub(crate) fn purpose_of(gpus: Option<(Place, Place)>) -> String {
        let gpu = |place: Place| place.ordinal().unwrap_or(0);
        gpus.map_or("host memory".to_owned(), |(here, there)| format!("GPU {} here and GPU {} there", gpu(here), gpu(there)))
    }
}

/// The engine's GPU; the first one where the hello names none.
pub(crate) fn own_gpu(hello: &Hello) -> u8 {
    u8::try_from(hello.gpu_index).unwrap_or(0)
}

/// The sets of a connection with `channels` channels each, in the order in which both engines number them. The set that also
/// carries host memory comes last, since the first set that can carry a transfer does.
pub(crate) fn plans(
    (device, host): (&Arc<Plugin>, Option<&Arc<Plugin>>),
    own: &Hello,
    peer: &Hello,
    connecting: bool,
    terms: &Terms,
) -> Vec<Plan> {
    let channels = terms.channels.into();
    let optional = device.traits.optional;
    let follows = device.traits.follows_gpu;
    let plan = |plugin: &Arc<Plugin>, gpus: Option<(u8, u8)>, channels, spare| {
        let gpus = gpus.map(|(here, there)| (Place::gpu(here), Place::gpu(there)));
        Plan { plugin: plugin.clone(), gpus, channels, spare }
    };
    let own_pair = || (own_gpu(own), own_gpu(peer));
    let mut all = Vec::new();
    if !optional || takes_part(own, peer, terms.protect) {
        all.push(plan(device, follows.then(own_pair), channels, optional));
    }
    if follows && !all.is_empty() {
        let further = further(own, peer, connecting, MAX_SETS - 1 - usize::from(host.is_some()));
        all.extend(further.into_iter().map(|pair| plan(device, Some(pair), channels.min(FURTHER_CHANNELS), true)));
    }
    all.extend(host.into_iter().map(|host| plan(host, None, channels, false)));
    all
}

/// Whether a connection has channels of a plugin that it could do without. Data that the NIC writes into GPU memory cannot be protected.
fn takes_part(own: &Hello, peer: &Hello, protect: Protect) -> bool {
    own.plugin == peer.plugin && protect == Protect::Off
}

/// Pairs of GPUs, here and at the peer, other than the engines' own; the closest numbers first, since GPUs that share a NIC are
/// neighbours.
fn further(own: &Hello, peer: &Hello, connecting: bool, most: usize) -> Vec<(u8, u8)> {
    let gpus = |hello: &Hello| -> Vec<u8> { std::iter::once(own_gpu(hello)).chain(hello.further_gpus.iter().copied()).collect() };
    let (client, server) = if connecting { (own, peer) } else { (peer, own) };
    let engines = (own_gpu(client), own_gpu(server));
    let mut pairs: Vec<(u8, u8)> = gpus(client).into_iter().flat_map(|c| gpus(server).into_iter().map(move |s| (c, s))).collect();
    pairs.retain(|&pair| pair != engines);
    pairs.sort_by_key(|&(c, s)| (c.abs_diff(s), c, s));
    pairs.dedup();
    pairs.truncate(most);
    pairs.into_iter().map(|(c, s)| if connecting { (c, s) } else { (s, c) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::hello::tests::sample;
    use proptest::prelude::*;

    fn side(own: i32, further: &[u8]) -> Hello {
        Hello { gpu_index: own, further_gpus: further.to_vec(), ..sample() }
    }

    #[test]
    fn gpus_with_registered_memory_get_pairs_of_their_own() {
        let none: [(u8, u8); 0] = [];
        assert_eq!(further(&side(0, &[]), &side(3, &[]), true, 14), none);
        assert_eq!(further(&side(0, &[1]), &side(0, &[1]), true, 14), [(1, 1), (0, 1), (1, 0)]);
        assert_eq!(further(&side(-1, &[]), &side(0, &[5]), false, 14), [(0, 5)]);
        let eight = side(0, &[1, 2, 3, 4, 5, 6, 7]);
        let pairs = further(&eight, &eight, true, 14);
        assert!((1..8).all(|i| pairs.contains(&(i, i))), "{pairs:?}");
        assert_eq!(pairs.len(), 14);
    }

    #[test]
    fn a_plugin_that_both_can_do_without_needs_both_and_no_protection() {
        let with = |plugin: &str| Hello { plugin: plugin.into(), ..sample() };
        let (soft, devmem) = (with("soft"), with("devmem"));
        assert!(takes_part(&devmem, &devmem, Protect::Off));
        assert!(!takes_part(&devmem, &soft, Protect::Off) && !takes_part(&soft, &devmem, Protect::Off));
        assert!(!takes_part(&devmem, &devmem, Protect::Integrity) && !takes_part(&devmem, &devmem, Protect::Encrypt));
    }

    proptest! {
        /// Both engines number the pairs in the same order.
        #[test]
        fn both_sides_agree(
            a in -1i32..8, b in -1i32..8,
            more_a in proptest::collection::btree_set(0u8..9, 0..7), more_b in proptest::collection::btree_set(0u8..9, 0..7),
        ) {
            let (a, b) = (side(a, &more_a.into_iter().collect::<Vec<_>>()), side(b, &more_b.into_iter().collect::<Vec<_>>()));
            let (ours, theirs) = (further(&a, &b, true, 14), further(&b, &a, false, 14));
            let mirrored: Vec<_> = theirs.into_iter().map(|(x, y)| (y, x)).collect();
            prop_assert_eq!(ours, mirrored);
        }
    }
}
