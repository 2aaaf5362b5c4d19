//! The host's network interfaces: which of them can carry data, and their properties from /sys. The rules are pure functions over
//! [`Found`], so that the control connection uses the same list. Knows nothing of comms.

mod kinds;
mod system;

pub use kinds::{Address, Found, Interface};
pub use system::list;

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::BorrowedFd;

/// Whether an interface is up and has a carrier at this moment; `socket` is any socket.
///
/// # Errors
/// `ENETDOWN` when it is not, `ENODEV` when it is gone.
pub fn check_link(interface: &Interface, socket: BorrowedFd<'_>) -> io::Result<()> {
    system::check_link(&interface.name, socket)
}

/// A filter in NCCL's form: names or prefixes separated by commas; `=` in front makes them exact, `^` excludes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameFilter {
    exclude: bool,
    exact: bool,
    names: Vec<String>,
}

impl NameFilter {
    /// Parses a filter.
    pub fn parse(text: &str) -> NameFilter {
        let text = text.trim();
        let (exclude, text) = text.strip_prefix('^').map_or((false, text), |t| (true, t));
        let (exact, text) = text.strip_prefix('=').map_or((false, text), |t| (true, t));
        let names = text.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::to_owned).collect();
        NameFilter { exclude, exact, names }
    }

    /// Whether it admits a name.
    pub fn admits(&self, name: &str) -> bool {
        self.place(name).is_some() != self.exclude
    }

    /// Whether it asks for this name, not only fails to exclude it.
    fn asks_for(&self, name: &str) -> bool {
        !self.exclude && self.admits(name)
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|n| if self.exact { name == n } else { name.starts_with(n.as_str()) })
    }
}

/// Name prefixes of interfaces that container, pod, tunnel and virtual machine software creates.
const VIRTUAL: [&str; 29] = [
    "azv",
    "br-",
    "cali",
    "cilium",
    "cni",
    "docker",
    "dummy",
    "eni",
    "flannel",
    "gke",
    "ifb",
    "ip6tnl",
    "kube",
    "lxc",
    "lxd",
    "nerdctl",
    "nodelocaldns",
    "podman",
    "sit",
    "tailscale",
    "tap",
    "tun",
    "tunl",
    "veth",
    "virbr",
    "vnet",
    "vxlan",
    "wg",
    "zt",
];

fn is_virtual(found: &Found) -> bool {
    found.empty_bridge || VIRTUAL.iter().any(|p| found.name.starts_with(p))
}

/// Why an interface cannot carry data at all.
fn defect(found: &Found) -> Option<&'static str> {
    match best_address(found) {
        _ if !found.up => Some("it is down"),
        _ if !found.carrier => Some("it has no carrier"),
        None if found.addresses.is_empty() => Some("it has no address"),
        None => Some("its address is tentative"),
        Some(_) => None,
    }
}

/// The address to use of an interface: IPv4, else IPv6, global before link-local.
fn best_address(found: &Found) -> Option<Address> {
    let rank = |a: &Address| (is_link_local(a.ip), a.deprecated, a.ip.is_ipv6());
    found.addresses.iter().filter(|a| !a.tentative).copied().min_by_key(rank)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => is_link_local_v6(ip),
    }
}

fn is_link_local_v6(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xFFC0 == 0xFE80
}

/// The rank of an interface that no filter names: only interfaces of the lowest rank found are used.
fn reserve(found: &Found) -> u32 {
    let link_local = best_address(found).is_none_or(|a| is_link_local(a.ip));
    match () {
        _ if found.loopback => 3,
        _ if link_local => 2,
        _ if is_virtual(found) => 1,
        _ => 0,
    }
}

/// The interfaces that the rules select.
#[derive(Clone, Debug)]
pub struct Selection<'a> {
    /// Those to use, each with its address.
    pub taken: Vec<(&'a Found, Address)>,
    /// Those that the filter names and that cannot be used, with the reason.
    pub refused: Vec<(&'a str, &'static str)>,
    /// Those that cannot be used now, and would be taken if they were up and had a carrier, or were named and had an address.
    pub absent: Vec<&'a str>,
}

/// The interfaces that can be used, each with its address, in the order of the filter if it gives one, else the kernel's; and
/// the name of each that the filter names and that cannot be used, with the reason.
pub fn select<'a>(all: &'a [Found], filter: Option<&NameFilter>) -> Selection<'a> {
    let admitted: Vec<&Found> = all.iter().filter(|f| filter.is_none_or(|filter| filter.admits(&f.name))).collect();
    let asked = |f: &Found| filter.is_some_and(|filter| filter.asks_for(&f.name));
    let refused = admitted.iter().filter(|f| asked(f)).filter_map(|f| Some((f.name.as_str(), defect(f)?))).collect();
    let (usable, others): (Vec<&Found>, Vec<&Found>) = admitted.into_iter().partition(|f| defect(f).is_none());
    let least = usable.iter().map(|f| reserve(f)).min().unwrap_or(0);
    let wanted = |f: &Found| asked(f) || reserve(f) == least;
    let absent = others.into_iter().filter(|f| wanted(f)).map(|f| f.name.as_str()).collect();
    let mut taken: Vec<&Found> = usable.into_iter().filter(|f| wanted(f)).collect();
    if let Some(filter) = filter.filter(|f| f.exact && !f.exclude) {
        taken.sort_by_key(|f| filter.place(&f.name));
    }
    Selection { taken: taken.into_iter().filter_map(|f| Some((f, best_address(f)?))).collect(), refused, absent }
}

/// The interfaces of this host that can carry data now: those that `filter` (in the form of [`NameFilter`]) admits, else
/// those that the rules select. Each call asks the kernel again and logs interfaces that the filter names and that cannot be used.
///
/// # Errors
/// The kernel cannot list its interfaces.
pub fn usable(filter: Option<&str>) -> io::Result<Vec<Interface>> {
    Ok(look(filter)?.0)
}

/// [`usable`], and the names of those that it leaves out only because they are down, or have no carrier or address, at present.
pub(crate) fn look(filter: Option<&str>) -> io::Result<(Vec<Interface>, Vec<String>)> {
    static REFUSED: crate::logger::Limited = crate::logger::Limited::new();
    let filter = filter.map(NameFilter::parse);
    let all = system::list()?;
    let Selection { taken, refused, absent } = select(&all, filter.as_ref());
    for (name, why) in refused {
        REFUSED.warn(&format!("network interface {name} is left out: {why}"));
    }
    let absent = absent.into_iter().map(str::to_owned).collect();
    Ok((taken.into_iter().map(|(found, address)| system::describe(found, address)).collect(), absent))
}

#[cfg(test)]
mod tests;
