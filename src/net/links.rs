//! Changes of the host's network interfaces, as the kernel announces them over netlink: links that go down, addresses that are removed.

use soft_plugin::interfaces::{list, Found};
use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A socket that becomes readable when an interface or an address changes.
pub(crate) struct LinkWatch {
    socket: OwnedFd,
    /// The interfaces at the last look.
    before: HashSet<String>,
    /// Those that could carry data.
    usable: HashSet<String>,
}

/// The interfaces after a change, and the names of those before it: a plugin's device names need not be names of interfaces.
#[derive(Default)]
pub(crate) struct Links {
    before: HashSet<String>,
    now: Vec<Found>,
    /// An interface can carry data that could not before.
    pub came_back: bool,
}

impl LinkWatch {
    /// # Errors
    /// The system's, where netlink cannot be used.
    pub(crate) fn new() -> io::Result<LinkWatch> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: plain numbers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor just created, without another owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain data for which zeros are valid.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = (libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR) as u32;
        // SAFETY: an address of this size.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_nl>() as u32) };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        let now = list()?;
        Ok(LinkWatch { socket, before: names(&now), usable: usable(&now) })
    }

    /// Becomes readable at a change.
    pub(crate) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Takes the announcements, and returns the interfaces as they are now. What was announced is not read: only the result counts, and
    /// announcements may be lost.
    ///
    /// # Errors
    /// The kernel cannot list its interfaces.
    pub(crate) fn changed(&mut self) -> io::Result<Links> {
        let mut buffer = [0u8; 8192];
        // SAFETY: a buffer of this size.
        while unsafe { libc::recv(self.fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) } > 0
            || io::Error::last_os_error().raw_os_error() == Some(libc::ENOBUFS)
        {}
        let now = list()?;
        let came_back = usable(&now).iter().any(|name| !self.usable.contains(name));
        self.usable = usable(&now);
        Ok(Links { before: std::mem::replace(&mut self.before, names(&now)), now, came_back })
    }
}

fn names(interfaces: &[Found]) -> HashSet<String> {
    interfaces.iter().map(|interface| interface.name.clone()).collect()
}

impl Links {
    /// Adds the names before a later change.
    pub(crate) fn add(&mut self, later: &Links) {
        self.before.extend(later.before.iter().cloned());
    }

    /// The interfaces as they are now, after changes that were seen before.
    ///
    /// # Errors
    /// The kernel cannot list its interfaces.
    pub(crate) fn renewed(self) -> io::Result<Links> {
        Ok(Links { now: list()?, ..self })
    }

    /// Why nothing can be sent from an address of this host; `None` if it can.
    pub(crate) fn fault_of(&self, ip: IpAddr) -> Option<String> {
        if ip.is_loopback() {
            return None;
        }
        let holds = |interface: &&Found| interface.addresses.iter().any(|address| address.ip == ip);
        match self.now.iter().find(holds) {
            None => Some(format!("no interface has the address {ip} now")),
            Some(Found { up: false, name, .. }) => Some(format!("{name} is down")),
            Some(Found { carrier: false, name, .. }) => Some(format!("{name} has no carrier")),
            Some(_) => None,
        }
    }

    /// Why a NIC cannot carry the data of a channel, which has the address `local`; `None` if it can, or if it is no interface.
    pub(crate) fn fault(&self, nic: &str, local: Option<IpAddr>) -> Option<String> {
        let Some(interface) = self.now.iter().find(|interface| interface.name == nic) else {
            return self.before.contains(nic).then(|| "was removed".to_owned());
        };
        let holds = |ip| self.now.iter().flat_map(|interface| &interface.addresses).any(|address| address.ip == ip);
        match (fault(interface), local) {
            (Some(fault), _) => Some(fault.to_owned()),
            // Another address of the NIC is of no use to it.
            (None, Some(ip)) if !ip.is_loopback() && !holds(ip) => Some(format!("has no address {ip} any more")),
            _ => None,
        }
    }
}

fn fault(interface: &Found) -> Option<&'static str> {
    match interface {
        Found { up: false, .. } => Some("is down"),
        Found { carrier: false, .. } => Some("has no carrier"),
        // A link-local address says nothing.
        Found { addresses, .. } if !addresses.iter().any(|address| is_routed(address.ip)) => Some("has no address"),
        _ => None,
    }
}

fn usable(interfaces: &[Found]) -> HashSet<String> {
    interfaces.iter().filter(|interface| fault(interface).is_none()).map(|interface| interface.name.clone()).collect()
}

fn is_routed(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use soft_plugin::interfaces::Address;

    fn interface(name: &str, [up, carrier]: [bool; 2], address: Option<&str>) -> Found {
        let parsed =
            |ip: &str| Address { ip: ip.parse().expect("address"), prefix: 24, scope: 0, tentative: false, deprecated: false };
        let addresses = address.map_or_else(Vec::new, |ip| ip.split(' ').map(parsed).collect());
        Found { name: name.into(), up, carrier, loopback: false, empty_bridge: false, addresses }
    }

    #[test]
    fn a_fault_names_what_is_missing() {
        let before = ["eth4"].map(String::from).into();
        let now = vec![
            interface("eth0", [true, true], Some("fe80::1 10.0.0.1")),
            interface("eth1", [false, false], Some("10.0.0.2")),
            interface("eth2", [true, false], Some("10.0.0.3")),
            interface("eth3", [true, true], None),
            interface("eth5", [true, true], Some("fe80::2")),
        ];
        let links = Links { before, now, came_back: false };
        let faults = ["eth0", "eth1", "eth2", "eth3", "eth4", "eth5", "mlx5_0"].map(|nic| links.fault(nic, None));
        let faults = faults.each_ref().map(|fault| fault.as_deref());
        let of = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "127.0.0.1", "fe80::1"];
        let of = of.map(|ip| links.fault_of(ip.parse().expect("address")));
        let gone = Some("no interface has the address 10.0.0.4 now".to_owned());
        assert_eq!(of, [None, Some("eth1 is down".to_owned()), Some("eth2 has no carrier".to_owned()), gone, None, None]);
        let no_address = Some("has no address");
        assert_eq!(faults, [None, Some("is down"), Some("has no carrier"), no_address, Some("was removed"), no_address, None]);
        // The NIC of a channel keeps another address than the one that the channel has.
        let of = |nic, ip: &str| links.fault(nic, Some(ip.parse().expect("address")));
        assert_eq!(of("eth0", "10.0.0.9"), Some("has no address 10.0.0.9 any more".to_owned()));
        assert_eq!(["10.0.0.1", "fe80::1", "10.0.0.2", "127.0.0.1"].map(|ip| of("eth0", ip)), [const { None }; 4]);
    }

    #[test]
    fn what_was_removed_in_an_earlier_change_is_known_later() {
        let before = |name: &str| Links { before: [name.to_owned()].into(), ..Links::default() };
        let mut links = Links::default();
        links.add(&before("removed-1"));
        links.add(&before("lo"));
        let links = links.renewed().expect("interfaces");
        assert_eq!(["removed-1", "lo", "other"].map(|nic| links.fault(nic, None)), [Some("was removed".to_owned()), None, None]);
    }

    #[test]
    fn the_loopback_is_there() {
        let mut watch = LinkWatch::new().expect("netlink");
        assert_eq!(watch.changed().expect("interfaces").fault("lo", None), None);
    }
}
