//! Which NICs serve a GPU, how many channels they get, and which NIC is paired with which of the peer's. Pure functions that give
//! both engines the same results. Knows no plugin.

use super::device::Device;
use std::collections::BTreeMap;

/// Components that two PCI paths share from the root: more means closer.
pub(super) fn shared_depth(a: &str, b: &str) -> usize {
    a.split('/').zip(b.split('/')).take_while(|(x, y)| x == y).count()
}

/// The devices whose PCI path shares most with the GPU's: those of its own PCIe switch, if any. All devices in the plugin's order
/// if there is no GPU or distances are unknown.
pub(crate) fn closest(devices: &[Device], gpu_pci_path: Option<&str>) -> Vec<usize> {
    let depth = |d: &Device| match (gpu_pci_path, d.pci_path.as_deref()) {
        (Some(gpu), Some(nic)) => shared_depth(gpu, nic),
        _ => 0,
    };
    let most = devices.iter().map(depth).max().unwrap_or(0);
    (0..devices.len()).filter(|&i| depth(&devices[i]) == most).collect()
}

/// The devices of a GPU: the closest ones. Where a switch has several, they and its GPUs, given as directories under /sys, are paired in
/// the order of their addresses, as Google's receive managers do.
pub(crate) fn own(devices: &[Device], gpu_pci_path: Option<&str>, gpus: &[String]) -> Vec<usize> {
    let mut near = closest(devices, gpu_pci_path);
    let (Some(gpu), [first, _, ..]) = (gpu_pci_path, &near[..]) else { return near };
    let Some(nic) = devices[*first].pci_path.as_deref() else { return near };
    let depth = shared_depth(gpu, nic);
    let address = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let mut beside: Vec<&String> = gpus.iter().filter(|other| shared_depth(other, nic) == depth).collect();
    beside.sort_by_key(|other| address(other));
    near.sort_by_key(|&i| devices[i].pci_path.as_deref().map(address));
    let (number, gpus_of_a_nic) = (beside.iter().position(|other| *other == gpu), beside.len() / near.len());
    match number.filter(|_| gpus_of_a_nic > 0).and_then(|number| near.get(number / gpus_of_a_nic)) {
        Some(&own) => vec![own],
        None => near,
    }
}

/// Channels of a NIC pair by default if the plugin keeps a core busy for each: 2 to 4.
pub(crate) fn channels_of_a_nic(cores: usize) -> usize {
    (cores / 16).clamp(2, 4)
}

/// Joins the offers of two engines, given as NIC names. The k-th offer of a name is joined to the peer's k-th of that name. The
/// rest is joined in order, unless only equal names can reach each other. Both engines compute the same list of (own index,
/// peer's index); its index is the channel's number.
pub(crate) fn join(ours: &[&str], theirs: &[&str], equal_only: bool) -> Vec<(usize, usize)> {
    let by_name = |names: &[&str]| {
        let mut map: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (i, name) in names.iter().enumerate() {
            map.entry((*name).to_owned()).or_default().push(i);
        }
        map
    };
    let (own, other) = (by_name(ours), by_name(theirs));
    let mut equal: Vec<(usize, &str, usize, usize)> = Vec::new();
    for (name, places) in &own {
        for (k, (&a, &b)) in places.iter().zip(other.get(name).into_iter().flatten()).enumerate() {
            equal.push((k, name, a, b));
        }
    }
    // Alternate between the NICs, so that a few channels use all of them.
    equal.sort();
    let mut joined: Vec<(usize, usize)> = equal.into_iter().map(|(_, _, a, b)| (a, b)).collect();
    if !equal_only {
        let left = |n: usize, taken: Vec<usize>| (0..n).filter(move |i| !taken.contains(i));
        let own_left = left(ours.len(), joined.iter().map(|p| p.0).collect());
        let other_left = left(theirs.len(), joined.iter().map(|p| p.1).collect());
        let rest: Vec<_> = own_left.zip(other_left).collect();
        joined.extend(rest);
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn device(name: &str, pci_path: &str) -> Device {
        let pci_path = (!pci_path.is_empty()).then(|| pci_path.to_owned());
        Device { name: name.into(), pci_path, speed_mbps: 1, ptr_support: 3, unpack: true }
    }

    /// An A3 machine as /sys shows it: two NUMA nodes, two PCIe switches on each, and on each switch two GPUs and one data NIC.
    struct A3 {
        gpus: Vec<String>,
        nics: Vec<Device>,
    }

    fn a3() -> A3 {
        let switch = |i: usize| {
            let root = ["pci0000:00", "pci0000:80"][i / 2];
            format!("/sys/devices/{root}/0000:{:02x}:0{}.0/0000:{:02x}:00.0", [0, 0x80][i / 2], 4 + i % 2, 1 + 16 * i)
        };
        let port = |i: usize, port: usize| {
            format!("{}/0000:{:02x}:{port:02x}.0/0000:{:02x}:00.0", switch(i), 2 + 16 * i, 3 + 16 * i + port)
        };
        A3 {
            gpus: (0..8).map(|gpu| port(gpu / 2, gpu % 2)).collect(),
            nics: (0..4).map(|nic| device(&format!("eth{}", nic + 1), &port(nic, 2))).collect(),
        }
    }

    /// The NIC of each channel between a GPU here and one there, `per_nic` channels a NIC.
    fn channels(here: usize, there: usize, per_nic: usize) -> Vec<(String, String)> {
        let a3 = a3();
        let offers = |gpu: usize| -> Vec<&str> {
            let nics = closest(&a3.nics, Some(&a3.gpus[gpu]));
            nics.iter().flat_map(|&n| std::iter::repeat_n(a3.nics[n].name.as_str(), per_nic)).collect()
        };
        let (ours, theirs) = (offers(here), offers(there));
        join(&ours, &theirs, true).into_iter().map(|(a, b)| (ours[a].to_owned(), theirs[b].to_owned())).collect()
    }

    #[test]
    fn on_a3_every_pair_of_gpus_joins_its_own_nic_or_none() {
        for here in 0..8 {
            for there in 0..8 {
                let nic = format!("eth{}", here / 2 + 1);
                let expected = if here / 2 == there / 2 { vec![(nic.clone(), nic); 4] } else { Vec::new() };
                assert_eq!(channels(here, there, 4), expected, "GPU {here} to GPU {there}");
            }
        }
    }

    #[test]
    fn a_plain_host_uses_all_its_nics() {
        let path = |slot: usize| format!("/sys/devices/pci0000:00/0000:00:0{slot}.0");
        let nics = [device("ens3", &path(3)), device("ens4", &path(4))];
        assert_eq!(closest(&nics, None), [0, 1]);
        assert_eq!(closest(&nics, Some(&path(5))), [0, 1], "equally near");
        // If one is nearer, only that one is used.
        let nics = [device("ens3", &path(3)), device("ens4", &format!("{}/0000:04:00.0", path(5)))];
        assert_eq!(closest(&nics, Some(&format!("{}/0000:05:00.0", path(5)))), [1]);
        let unknown = [device("a", ""), device("b", "")];
        assert_eq!(closest(&unknown, Some(&path(5))), [0, 1]);
    }

    #[test]
    fn gpus_and_nics_of_a_switch_are_paired_in_order() {
        let at = |switch: usize, port: usize| format!("/sys/devices/pci0000:80/0000:8{switch}:00.0/0000:9{switch}:{port:02x}.0");
        let gpus: Vec<String> = (0..2).flat_map(|switch| (0..2).map(move |port| at(switch, port))).collect();
        // Not in the order of their addresses.
        let nics = [device("b", &at(0, 9)), device("a", &at(0, 8)), device("d", &at(1, 9)), device("c", &at(1, 8))];
        let of = |gpu: &String| own(&nics, Some(gpu), &gpus).iter().map(|&i| nics[i].name.as_str()).collect::<Vec<_>>();
        assert_eq!(gpus.iter().map(of).collect::<Vec<_>>(), [["a"], ["b"], ["c"], ["d"]]);
        // One NIC serves both GPUs of its switch, as on A3 machines with TCPX.
        assert_eq!([0, 1].map(|gpu| own(&nics[..1], Some(&gpus[gpu]), &gpus)), [[0], [0]]);
        // Where the GPU is not listed, or none is given, nothing is paired.
        assert_eq!(own(&nics, Some(&gpus[0]), &[]), [1, 0]);
        assert_eq!(own(&nics, None, &gpus).len(), 4);
    }

    #[test]
    fn a_nic_gets_two_to_four_channels() {
        assert_eq!([1, 16, 48, 64, 208].map(channels_of_a_nic), [2, 2, 3, 4, 4]);
    }

    fn mirrored(joined: &[(usize, usize)]) -> Vec<(usize, usize)> {
        joined.iter().map(|&(a, b)| (b, a)).collect()
    }

    #[test]
    fn equal_names_meet_whatever_the_order() {
        assert_eq!(join(&["eth1", "eth2"], &["eth2", "eth1"], true), [(0, 1), (1, 0)]);
        assert_eq!(join(&["eth1", "eth1"], &["eth2", "eth2"], true), []);
        assert_eq!(join(&["eth1", "eth2", "eth1", "eth2"], &["eth2", "eth2", "eth2"], true), [(1, 0), (3, 1)]);
        assert_eq!(join(&["ens3", "ens3"], &["eth0", "eth0", "eth0"], false), [(0, 0), (1, 1)]);
        // One NIC here, two there: the equal name first, then the rest.
        assert_eq!(join(&["eth0", "eth0"], &["eth1", "eth0"], false), [(0, 1), (1, 0)]);
        assert_eq!(join(&[], &["eth0"], false), []);
    }

    proptest! {
        /// Both engines compute the same channels; no offer is used twice; if other names may be joined, at most one engine has offers left.
        #[test]
        fn both_engines_agree(ours in proptest::collection::vec(0usize..4, 0..20), theirs in proptest::collection::vec(0usize..4, 0..20), equal_only in any::<bool>()) {
            const NAMES: [&str; 4] = ["eth1", "eth2", "eth3", "eth4"];
            let a: Vec<&str> = ours.iter().map(|&i| NAMES[i]).collect();
            let b: Vec<&str> = theirs.iter().map(|&i| NAMES[i]).collect();
            let joined = join(&a, &b, equal_only);
            prop_assert_eq!(mirrored(&joined), join(&b, &a, equal_only));
            for side in [joined.iter().map(|p| p.0).collect::<Vec<_>>(), joined.iter().map(|p| p.1).collect()] {
                let mut unique = side.clone();
                unique.sort();
                unique.dedup();
                prop_assert_eq!(unique.len(), side.len());
            }
            if equal_only {
                prop_assert!(joined.iter().all(|&(i, j)| a[i] == b[j]));
            } else {
                prop_assert_eq!(joined.len(), a.len().min(b.len()));
            }
        }
    }
}
