//! The machine's network interfaces as devices: enumeration, the name filter, and properties from /sys.
//! Knows nothing of comms.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One device: an interface that is up, with one address of it.
#[derive(Debug)]
pub struct Interface {
    /// Name.
    pub name: CString,
    /// Where the PCI device lives under /sys, if it has one.
    pub pci_path: Option<CString>,
    /// The address comms of this device listen on.
    pub address: IpAddr,
    /// Length of the network prefix, bits.
    pub prefix: u32,
    /// Scope of a link-local IPv6 address.
    pub scope: u32,
    /// From the MAC address.
    pub guid: u64,
    /// Mbit/s.
    pub speed: i32,
}

impl Interface {
    /// Whether `target` is on this interface's own network.
    pub fn reaches(&self, target: IpAddr) -> bool {
        let (own, other, width) = match (self.address, target) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(u32::from(a)), u128::from(u32::from(b)), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a), u128::from(b), 128),
            _ => return false,
        };
        let free = width - self.prefix.min(width);
        free >= 128 || own >> free == other >> free
    }
}

/// An interface's address as `getifaddrs` reports it.
#[derive(Clone, Debug)]
struct Candidate {
    name: String,
    loopback: bool,
    address: IpAddr,
    prefix: u32,
    scope: u32,
}

/// The devices that `filter` selects, in order.
pub fn enumerate(filter: Option<&str>) -> io::Result<Vec<Interface>> {
    Ok(select(candidates()?, filter).into_iter().map(describe).collect())
}

fn ip_of(addr: *const libc::sockaddr) -> Option<(IpAddr, u32)> {
    if addr.is_null() {
        return None;
    }
    // SAFETY: a non-null sockaddr has at least its family; the family names the full type, which the kernel filled.
    unsafe {
        match i32::from((*addr).sa_family) {
            libc::AF_INET => {
                let v4 = &*addr.cast::<libc::sockaddr_in>();
                Some((Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into(), 0))
            }
            libc::AF_INET6 => {
                let v6 = &*addr.cast::<libc::sockaddr_in6>();
                Some((Ipv6Addr::from(v6.sin6_addr.s6_addr).into(), v6.sin6_scope_id))
            }
            _ => None,
        }
    }
}

fn candidates() -> io::Result<Vec<Candidate>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` receives a list that is freed below.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found: Vec<Candidate> = Vec::new();
    let mut cursor = list;
    while !cursor.is_null() {
        // SAFETY: a node of the list, valid until freeifaddrs.
        let node = unsafe { &*cursor };
        cursor = node.ifa_next;
        let flags = node.ifa_flags as i32;
        let Some((address, scope)) = ip_of(node.ifa_addr) else { continue };
        if flags & libc::IFF_UP == 0 {
            continue;
        }
        let prefix = ip_of(node.ifa_netmask).map_or(0, |(mask, _)| match mask {
            IpAddr::V4(m) => u32::from(m).count_ones(),
            IpAddr::V6(m) => u128::from(m).count_ones(),
        });
        // SAFETY: the name of a node is a terminated string.
        let name = unsafe { CStr::from_ptr(node.ifa_name) }.to_string_lossy().into_owned();
        let candidate = Candidate { name, loopback: flags & libc::IFF_LOOPBACK != 0, address, prefix, scope };
        match found.iter_mut().find(|c| c.name == candidate.name) {
            None => found.push(candidate),
            Some(known) if rank(&candidate) < rank(known) => *known = candidate,
            Some(_) => {}
        }
    }
    // SAFETY: the list came from getifaddrs, and no node is used any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// Which address of an interface is taken: IPv4, else global IPv6, else link-local.
fn rank(c: &Candidate) -> u32 {
    match c.address {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) if c.scope == 0 => 1,
        IpAddr::V6(_) => 2,
    }
}

fn select(all: Vec<Candidate>, filter: Option<&str>) -> Vec<Candidate> {
    let names = |list: &str| list.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect::<Vec<_>>();
    let Some(filter) = filter else {
        let virt = ["docker", "veth", "virbr", "br-"];
        let named = |c: &&Candidate| !virt.iter().any(|p| c.name.starts_with(p));
        let real: Vec<_> = all.iter().filter(|c| !c.loopback).filter(named).cloned().collect();
        if !real.is_empty() {
            return real;
        }
        let any: Vec<_> = all.iter().filter(|c| !c.loopback).cloned().collect();
        return if any.is_empty() { all } else { any };
    };
    if let Some(exact) = filter.strip_prefix('=') {
        return names(exact).iter().filter_map(|n| all.iter().find(|c| c.name == *n).cloned()).collect();
    }
    if let Some(excluded) = filter.strip_prefix('^') {
        let excluded = names(excluded);
        let left: Vec<_> = all.into_iter().filter(|c| !excluded.iter().any(|n| c.name.starts_with(n.as_str()))).collect();
        let real: Vec<_> = left.iter().filter(|c| !c.loopback).cloned().collect();
        return if real.is_empty() { left } else { real };
    }
    let wanted = names(filter);
    all.into_iter().filter(|c| wanted.iter().any(|n| c.name.starts_with(n.as_str()))).collect()
}

fn describe(c: Candidate) -> Interface {
    let sys = format!("/sys/class/net/{}", c.name);
    let read = |file: &str| fs::read_to_string(format!("{sys}/{file}")).unwrap_or_default().trim().to_owned();
    let mac = read("address").split(':').filter_map(|b| u64::from_str_radix(b, 16).ok()).fold(0, |acc, b| acc << 8 | b);
    let speed = read("speed").parse::<i32>().ok().filter(|s| *s > 0).unwrap_or(10_000);
    let pci_path = fs::canonicalize(format!("{sys}/device")).ok().and_then(|p| CString::new(p.to_string_lossy().as_bytes()).ok());
    // The name came from a C string, so it holds no NUL.
    let name = CString::new(c.name).unwrap_or_default();
    Interface { name, pci_path, address: c.address, prefix: c.prefix, scope: c.scope, guid: mac, speed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(names: &[&str]) -> Vec<Candidate> {
        let of = |(i, n): (usize, &&str)| Candidate {
            name: (*n).to_owned(),
            loopback: *n == "lo",
            address: Ipv4Addr::new(10, 0, i as u8, 1).into(),
            prefix: 24,
            scope: 0,
        };
        names.iter().enumerate().map(of).collect()
    }

    fn pick(names: &[&str], filter: Option<&str>) -> Vec<String> {
        select(machine(names), filter).into_iter().map(|c| c.name).collect()
    }

    #[test]
    fn filters_by_name() {
        let all = ["lo", "docker0", "eth0", "eth1", "ens3", "veth12", "br-9"];
        assert_eq!(pick(&all, None), ["eth0", "eth1", "ens3"]);
        assert_eq!(pick(&all, Some("eth")), ["eth0", "eth1"]);
        assert_eq!(pick(&all, Some("=eth1,lo,eth0")), ["eth1", "lo", "eth0"]);
        assert_eq!(pick(&all, Some("^docker,veth,br-,ens")), ["eth0", "eth1"]);
        assert_eq!(pick(&all, Some("lo")), ["lo"]);
        assert_eq!(pick(&["lo", "veth1"], None), ["veth1"]);
        assert_eq!(pick(&["lo"], None), ["lo"]);
        assert!(pick(&all, Some("ib")).is_empty());
    }

    #[test]
    fn knows_its_own_network() {
        let device = describe(machine(&["nosuch0"]).remove(0));
        assert!(device.reaches("10.0.0.200".parse().unwrap()));
        assert!(!device.reaches("10.0.1.1".parse().unwrap()));
        assert!(!device.reaches("::1".parse().unwrap()));
    }
}
