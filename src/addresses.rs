//! Addresses in the configuration: what the listening port is bound to, which networks may connect, and where statistics are exported.
//! Pure.

use crate::status::{bail, Result};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// What the listening port is bound to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bind {
    /// The address of the control interface, and the loopback address of its family.
    #[default]
    Interface,
    /// Every address of the host.
    Any,
    /// One address, and nothing else.
    Address(IpAddr),
}

impl Bind {
    /// Reads UCCL_TCPX_BIND.
    ///
    /// # Errors
    /// `InvalidArgument` for text that is neither `any` nor an address.
    pub fn parse(text: &str) -> Result<Bind> {
        if text.eq_ignore_ascii_case("any") {
            return Ok(Bind::Any);
        }
        match text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => Ok(Bind::Any),
            Ok(ip) => Ok(Bind::Address(ip)),
            Err(_) => bail!(InvalidArgument, "expected any, or an address of this host"),
        }
    }
}

/// A network: an address and the length of its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    first: IpAddr,
    bits: u32,
}

/// Networks that may connect; an empty list allows all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<Network>);

/// The bits of an address, left-aligned, and their number.
fn bits_of(ip: IpAddr) -> (u128, u32) {
    match ip {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
        IpAddr::V6(v6) => (u128::from(v6), 128),
    }
}

/// Maps an IPv4 address from an IPv6 socket back to IPv4.
pub(crate) fn plain(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    }
}

impl Network {
    fn parse(text: &str) -> Option<Network> {
        let (ip, bits) = match text.split_once('/') {
            Some((ip, bits)) => (ip, Some(bits)),
            None => (text, None),
        };
        let first: IpAddr = plain(ip.trim().trim_start_matches('[').trim_end_matches(']').parse().ok()?);
        let width = bits_of(first).1;
        let bits = match bits.map(str::trim) {
            // The standard parser would accept "+8".
            Some(bits) if bits.bytes().all(|b| b.is_ascii_digit()) => bits.parse().ok().filter(|&n| n <= width)?,
            Some(_) => return None,
            None => width,
        };
        Some(Network { first, bits })
    }

    fn holds(&self, ip: IpAddr) -> bool {
        let ((network, width), (address, other)) = (bits_of(self.first), bits_of(plain(ip)));
        width == other && (network ^ address).checked_shr(128 - self.bits).unwrap_or(0) == 0
    }
}

impl AllowList {
    /// Reads a list of networks in CIDR form, separated by commas; an address without a length is one host.
    ///
    /// # Errors
    /// `InvalidArgument` names the invalid item.
    pub fn parse(text: &str) -> Result<AllowList> {
        let mut list = Vec::new();
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            match Network::parse(item) {
                Some(network) => list.push(network),
                None => bail!(InvalidArgument, "\"{item}\" is not a network (such as 10.0.0.0/8 or fd00::/8)"),
            }
        }
        Ok(AllowList(list))
    }

    /// Whether a peer with this address may connect.
    pub fn admits(&self, ip: IpAddr) -> bool {
        self.0.is_empty() || self.0.iter().any(|network| network.holds(ip))
    }
}

/// Where statistics are exported.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
    /// A file.
    File(PathBuf),
}

impl Target {
    /// Reads unix:PATH, HOST:PORT, PORT or FILE. %p in a path is the process id.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub(crate) fn parse(text: &str) -> Result<Target> {
        let path = |text: &str| PathBuf::from(text.replace("%p", &std::process::id().to_string()));
        if let Some(rest) = text.strip_prefix("unix:") {
            // The kernel's limit, less the terminator.
            if rest.is_empty() || path(rest).as_os_str().len() > 107 {
                bail!(InvalidArgument, "a Unix socket needs a path of 1 to 107 bytes");
            }
            return Ok(Target::Unix(path(rest)));
        }
        if text.contains('/') {
            return Ok(Target::File(path(text)));
        }
        let port = text.strip_prefix(':').or_else(|| text.strip_prefix("localhost:")).unwrap_or(text);
        if let Ok(port @ 1..) = port.parse::<u16>() {
            return Ok(Target::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => Ok(Target::Tcp(address)),
            _ => bail!(
                InvalidArgument,
                "expected unix:PATH, ADDRESS:PORT, PORT (of the loopback address), or the path of a file with a /"
            ),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Unix(path) => write!(f, "unix:{}", path.display()),
            Target::Tcp(address) => write!(f, "{address}"),
            Target::File(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn admits(list: &str, ip: &str) -> bool {
        AllowList::parse(list).unwrap().admits(ip.parse().unwrap())
    }

    #[test]
    fn bind_takes_any_or_an_address() {
        assert_eq!(Bind::parse("any").unwrap(), Bind::Any);
        assert_eq!(Bind::parse("::").unwrap(), Bind::Any);
        assert_eq!(Bind::parse("10.0.0.1").unwrap(), Bind::Address("10.0.0.1".parse().unwrap()));
        assert_eq!(Bind::parse("[fd00::1]").unwrap(), Bind::Address("fd00::1".parse().unwrap()));
        assert!(Bind::parse("eth0").is_err());
    }

    #[test]
    fn networks_hold_their_addresses_and_no_others() {
        assert!(admits("", "192.0.2.1") && admits(" , ", "::1"));
        assert!(admits("10.0.0.0/8", "10.255.255.255") && !admits("10.0.0.0/8", "11.0.0.0"));
        assert!(admits("10.1.2.3", "10.1.2.3") && !admits("10.1.2.3", "10.1.2.2"));
        assert!(admits("10.1.2.77/24", "10.1.2.1"), "host bits of the network do not count");
        assert!(admits("0.0.0.0/0", "203.0.113.7") && !admits("0.0.0.0/0", "fd00::1"));
        assert!(admits("fd00::/8, 10.0.0.0/8", "fdff::1") && !admits("fd00::/8", "fe00::1") && !admits("fd00::/8", "10.0.0.1"));
        assert!(admits("::/0", "2001:db8::1") && admits("[::1]/128", "::1") && !admits("::1", "::2"));
        // As a dual-stack socket reports it.
        assert!(admits("10.0.0.0/8", "::ffff:10.1.1.1") && admits("::ffff:10.0.0.0", "10.0.0.0"));
    }

    #[test]
    fn invalid_networks_are_refused() {
        for bad in ["10.0.0.0/33", "10.0.0/8", "eth0", "10.0.0.0/-1", "10.0.0.0/+8", "::/129", "10.0.0.0/", "10.0.0.1/8/8", "/8"]
        {
            assert!(AllowList::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn targets_are_parsed() {
        let ok = |text: &str| Target::parse(text).unwrap();
        assert_eq!(ok("9400").to_string(), "127.0.0.1:9400");
        assert_eq!(ok(":9400"), ok("localhost:9400"));
        assert_eq!(ok("[::1]:9400").to_string(), "[::1]:9400");
        assert_eq!(ok("0.0.0.0:9400").to_string(), "0.0.0.0:9400");
        assert_eq!(ok("unix:/run/x.sock"), Target::Unix("/run/x.sock".into()));
        assert_eq!(ok("/run/x-%p.prom"), Target::File(format!("/run/x-{}.prom", std::process::id()).into()));
        for bad in ["", "0", "host:9400", "1.2.3.4", "1.2.3.4:0", "70000", "unix:", "file", &format!("unix:/{}", "x".repeat(120))]
        {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_network_of_n_bits_holds_what_shares_them(a: u32, b: u32, bits in 0u32..=32) {
            let list = AllowList::parse(&format!("{}/{bits}", std::net::Ipv4Addr::from(a))).unwrap();
            let same = bits == 0 || (a ^ b) >> (32 - bits) == 0;
            prop_assert_eq!(list.admits(IpAddr::from(b.to_be_bytes())), same);
        }

        #[test]
        fn text_never_panics(text in "[0-9a-f:./, ]{0,40}") {
            let _ = AllowList::parse(&text);
        }
    }
}
