//! The host's network interfaces and PCI devices: the control interface, NUMA nodes, distance of NICs to a GPU.

use super::device::Device;
use super::pairing::shared_depth;
use soft_plugin::interfaces;
use std::net::IpAddr;
use std::path::Path;

/// Addresses of all interfaces that are up, in the kernel's order.
fn addresses() -> Vec<IpAddr> {
    let up = interfaces::list().unwrap_or_default().into_iter().filter(|interface| interface.up);
    up.flat_map(|interface| interface.addresses).map(|address| address.ip).collect()
}

/// One address of each usable interface that `filter` (in NCCL's form) admits, by the same rules as the software plugin's
/// devices.
///
/// # Errors
/// The kernel cannot list its interfaces.
pub(crate) fn usable(filter: Option<&str>) -> std::io::Result<Vec<IpAddr>> {
    Ok(interfaces::usable(filter)?.iter().map(|i| i.address).collect())
}

/// The interface that has an address, or the address itself.
pub(crate) fn name_of(ip: IpAddr) -> String {
    let listed = || interfaces::list().ok()?.into_iter().find(|i| i.addresses.iter().any(|address| address.ip == ip));
    soft_plugin::device_of(ip).or_else(|| Some(listed()?.name)).unwrap_or_else(|| ip.to_string())
}

/// The interfaces that a filter could name, for an error text.
pub(crate) fn others() -> String {
    let all = interfaces::usable(None).unwrap_or_default();
    let names: Vec<_> = all.iter().take(16).map(|i| i.name.to_string_lossy()).collect();
    if names.is_empty() {
        return " (no interface can)".to_owned();
    }
    format!(" (there: {})", names.join(", "))
}

/// Whether `ip` is an address of this host.
pub(crate) fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || addresses().contains(&ip)
}

/// NUMA node of a PCI device directory under /sys; `None` when unknown.
pub(crate) fn numa_node(pci_path: Option<&str>) -> Option<i32> {
    let text = std::fs::read_to_string(format!("{}/numa_node", pci_path?)).ok()?;
    text.trim().parse().ok().filter(|&n| n >= 0)
}

/// Whether an interface has a carrier. `true` if unknown: a plugin's device names need not be the host's.
pub(crate) fn has_carrier(root: &Path, name: &str) -> bool {
    let at = root.join("sys/class/net").join(name);
    // An interface that is down refuses the read.
    !at.exists() || std::fs::read_to_string(at.join("carrier")).is_ok_and(|text| text.trim() == "1")
}

/// Directories under /sys of the machine's NVIDIA GPUs, those of other processes too.
pub(super) fn gpus(root: &Path) -> Vec<String> {
    let is =
        |at: &Path, name: &str, text: &str| std::fs::read_to_string(at.join(name)).is_ok_and(|found| found.starts_with(text));
    let gpu = |entry: std::fs::DirEntry| {
        let at = std::fs::canonicalize(entry.path()).ok()?;
        // 3D and VGA controllers.
        let found = is(&at, "vendor", "0x10de") && (is(&at, "class", "0x0302") || is(&at, "class", "0x0300"));
        found.then(|| at.to_string_lossy().into_owned())
    };
    let mut all: Vec<String> =
        std::fs::read_dir(root.join("sys/bus/pci/devices")).into_iter().flatten().flatten().filter_map(gpu).collect();
    all.sort_unstable();
    all
}

/// The devices to use for the GPU with this PCI directory, nearest first: those of its NUMA node, sorted by the shared length of
/// the PCI path. All devices in the plugin's order if there is no GPU or distances are unknown.
pub(crate) fn nearest(devices: &[Device], gpu_pci_path: Option<&str>) -> Vec<usize> {
    let all: Vec<usize> = (0..devices.len()).collect();
    let Some(gpu) = gpu_pci_path else { return all };
    let depth = |i: usize| devices[i].pci_path.as_deref().map_or(0, |p| shared_depth(p, gpu));
    let node = numa_node(Some(gpu));
    let mut near: Vec<usize> =
        all.iter().copied().filter(|&i| node.is_some() && numa_node(devices[i].pci_path.as_deref()) == node).collect();
    if near.is_empty() {
        return all;
    }
    near.sort_by_key(|&i| std::cmp::Reverse(depth(i)));
    near
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_an_interface() {
        assert!(!usable(None).unwrap().is_empty());
        assert!(usable(Some("=lo")).unwrap().iter().all(IpAddr::is_loopback));
        assert!(usable(Some("=no-such-interface")).unwrap().is_empty());
        assert_eq!([name_of([127, 0, 0, 1].into()), name_of([192, 0, 2, 1].into())], ["lo", "192.0.2.1"]);
        assert!(is_local(IpAddr::from([127, 0, 0, 1])) && !is_local(IpAddr::from([192, 0, 2, 1])));
    }

    #[test]
    fn the_carrier_is_checked_if_the_host_has_the_interface() {
        let root = std::env::temp_dir().join(format!("uccl-net-carrier-{}", std::process::id()));
        for (nic, text) in [("eth1", "1\n"), ("eth2", "0\n")] {
            std::fs::create_dir_all(root.join("sys/class/net").join(nic)).expect("folder");
            std::fs::write(root.join("sys/class/net").join(nic).join("carrier"), text).expect("file");
        }
        std::fs::create_dir_all(root.join("sys/class/net/down")).expect("folder");
        let known = ["eth1", "eth2", "down", "mlx5_0"].map(|nic| has_carrier(&root, nic));
        let _ = std::fs::remove_dir_all(&root);
        assert_eq!(known, [true, false, false, true]);
    }

    #[test]
    fn without_a_gpu_all_devices_serve() {
        let device = |name: &str| Device { name: name.into(), pci_path: None, speed_mbps: 1, ptr_support: 1, unpack: false };
        assert_eq!(nearest(&[device("a"), device("b")], None), [0, 1]);
        assert_eq!(nearest(&[device("a"), device("b")], Some("/sys/devices/none")), [0, 1]);
        assert_eq!(shared_depth("/sys/a/b/c", "/sys/a/b/d"), 4);
    }
}
