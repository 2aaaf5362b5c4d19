//! The host's network interfaces and PCI devices: the control interface, NUMA nodes, distance of NICs to a GPU.

use super::pairing::shared_depth;
use super::plugin::Device;
use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// An address of an interface that is up.
#[derive(Clone, Debug)]
pub(crate) struct Interface {
    pub name: String,
    pub addr: IpAddr,
    pub loopback: bool,
}

/// Addresses of all interfaces that are up, in the kernel's order.
pub(crate) fn interfaces() -> Vec<Interface> {
    let mut head: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: head is writable; the list is freed below.
    if unsafe { libc::getifaddrs(&mut head) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut at = head;
    // SAFETY: a linked list that getifaddrs made; valid until freeifaddrs.
    while let Some(entry) = unsafe { at.as_ref() } {
        at = entry.ifa_next;
        if entry.ifa_addr.is_null() || entry.ifa_flags & (libc::IFF_UP as u32) == 0 {
            continue;
        }
        // SAFETY: ifa_addr points to a sockaddr of the family it names.
        let addr = match unsafe { i32::from((*entry.ifa_addr).sa_family) } {
            libc::AF_INET => {
                // SAFETY: as above.
                let a = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in>() };
                IpAddr::V4(Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr)))
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let a = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in6>() };
                IpAddr::V6(Ipv6Addr::from(a.sin6_addr.s6_addr))
            }
            _ => continue,
        };
        // SAFETY: a C string.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        found.push(Interface { name, addr, loopback: entry.ifa_flags & (libc::IFF_LOOPBACK as u32) != 0 });
    }
    // SAFETY: head came from getifaddrs.
    unsafe { libc::freeifaddrs(head) };
    found
}

/// A filter in NCCL's form: names or prefixes separated by commas; a leading '=' makes them exact, '^' excludes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NameFilter<'a> {
    exclude: bool,
    exact: bool,
    names: Vec<&'a str>,
}

impl<'a> NameFilter<'a> {
    pub(crate) fn parse(text: &'a str) -> NameFilter<'a> {
        let (exclude, text) = text.strip_prefix('^').map_or((false, text), |t| (true, t));
        let (exact, text) = text.strip_prefix('=').map_or((false, text), |t| (true, t));
        NameFilter { exclude, exact, names: text.split(',').map(str::trim).filter(|n| !n.is_empty()).collect() }
    }

    pub(crate) fn admits(&self, name: &str) -> bool {
        let listed = self.names.iter().any(|n| if self.exact { name == *n } else { name.starts_with(n) });
        listed != self.exclude
    }
}

/// The address that peers are told: IPv4, since the metadata text separates address and port by the first colon.
pub(crate) fn control_address(filter: Option<&str>) -> Option<Interface> {
    let v4: Vec<Interface> = interfaces().into_iter().filter(|i| i.addr.is_ipv4()).collect();
    if let Some(text) = filter {
        let filter = NameFilter::parse(text);
        return v4.into_iter().find(|i| filter.admits(&i.name));
    }
    let virtual_name =
        |name: &str| ["docker", "veth", "br-", "virbr", "cni", "flannel", "cali"].iter().any(|p| name.starts_with(p));
    let rank = |i: &Interface| (i.loopback, virtual_name(&i.name));
    v4.into_iter().min_by_key(rank)
}

/// Whether `ip` is an address of this host.
pub(crate) fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || interfaces().iter().any(|i| i.addr == ip)
}

/// NUMA node of a PCI device directory under /sys; `None` when unknown.
pub(crate) fn numa_node(pci_path: Option<&str>) -> Option<i32> {
    let text = std::fs::read_to_string(format!("{}/numa_node", pci_path?)).ok()?;
    text.trim().parse().ok().filter(|&n| n >= 0)
}

/// Whether an interface has a link. `true` where nothing is known of it: names of plugins need not be those of the host.
pub(crate) fn has_carrier(root: &Path, name: &str) -> bool {
    let at = root.join("sys/class/net").join(name);
    // An interface that is down refuses the read.
    !at.exists() || std::fs::read_to_string(at.join("carrier")).is_ok_and(|text| text.trim() == "1")
}

/// The devices to use for a GPU whose PCI directory is given, nearest first: those of its NUMA node, sorted by how much of the PCI
/// path they share. Without a GPU, or when nothing is known about distances, all devices in the plugin's order.
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
    fn filters_take_the_forms_of_nccl() {
        let admits = |f: &str, n: &str| NameFilter::parse(f).admits(n);
        assert!(admits("eth", "eth0") && admits("eth", "eth10") && !admits("eth", "lo"));
        assert!(admits("=eth1", "eth1") && !admits("=eth1", "eth10"));
        assert!(admits("^docker,lo", "eth0") && !admits("^docker,lo", "docker0") && !admits("^docker,lo", "lo"));
        assert!(admits("^=lo", "lo1") && !admits("^=lo", "lo"));
        assert!(admits("ens, eth", "eth3"));
    }

    #[test]
    fn every_host_has_a_control_address() {
        assert!(control_address(None).is_some());
        assert!(control_address(Some("=lo")).is_some_and(|i| i.loopback));
        assert!(control_address(Some("=no-such-interface")).is_none());
        assert!(is_local(IpAddr::from([127, 0, 0, 1])) && !is_local(IpAddr::from([192, 0, 2, 1])));
    }

    #[test]
    fn without_a_gpu_all_devices_serve() {
        let device = |name: &str| Device { name: name.into(), pci_path: None, speed_mbps: 1, ptr_support: 1, unpack: false };
        assert_eq!(nearest(&[device("a"), device("b")], None), [0, 1]);
        assert_eq!(nearest(&[device("a"), device("b")], Some("/sys/devices/none")), [0, 1]);
        assert_eq!(shared_depth("/sys/a/b/c", "/sys/a/b/d"), 4);
    }
}
