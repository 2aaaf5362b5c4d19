//! The listening ports of an engine: the addresses they are bound to, and the address announced to peers. Knows nothing about
//! handshakes.

use crate::addresses::Bind;
use crate::engine::limits;
use crate::net::topology;
use crate::status::{bail, Error, Result};
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

/// How many ports are tried when the system's choice is taken on the loopback address.
const TRIES: usize = 16;
/// Length of the kernel's accept backlog.
pub(crate) const BACKLOG: i32 = 1024;

/// The ports that an engine listens on.
#[derive(Debug)]
pub(crate) struct Listeners {
    /// Non-blocking; all on the same port.
    pub sockets: Vec<TcpListener>,
    /// The address announced to peers.
    pub address: SocketAddr,
}

/// "ip:port?gpu", with brackets around an IPv6 address.
pub(crate) fn metadata(address: SocketAddr, gpu: &str) -> String {
    format!("{address}?{gpu}")
}

/// The address of the control interface among the usable ones: IPv4 if there is one, else IPv6. A link-local IPv6 address does
/// not do, since metadata has no place for its scope.
fn control_address(usable: &[IpAddr]) -> Option<IpAddr> {
    let link_local = |ip: IpAddr| matches!(ip, IpAddr::V6(v6) if v6.segments()[0] & 0xFFC0 == 0xFE80);
    usable.iter().copied().filter(|&ip| !link_local(ip)).min_by_key(IpAddr::is_ipv6)
}

/// The address announced to peers.
///
/// # Errors
/// `InvalidArgument` when the requested interfaces have none.
fn announced_address(filter: Option<&str>) -> Result<IpAddr> {
    announced_of(&topology::usable(filter).map_err(|e| limits::system("network interfaces", &e))?, filter)
}

/// The one of these addresses to announce.
fn announced_of(usable: &[IpAddr], filter: Option<&str>) -> Result<IpAddr> {
    match (control_address(usable), filter) {
        (Some(ip), Some(_)) => Ok(ip),
        (Some(ip), None) if !ip.is_loopback() => Ok(ip),
        (None, Some(filter)) => {
            bail!(InvalidArgument, "no interface with a usable address matches {filter:?}{}", topology::others())
        }
        (found, None) => {
            log::warn!("this host has no IPv4 or global IPv6 address but the loopback one: only peers on this host can connect");
            Ok(found.unwrap_or(Ipv4Addr::LOCALHOST.into()))
        }
    }
}

/// Opens the listening port.
///
/// # Errors
/// `InvalidArgument` when no interface fits, `System` (port taken, address not of this host), `Resource`.
pub(crate) fn open(bind: Bind, filter: Option<&str>, port: u16) -> Result<Listeners> {
    let announced = match bind {
        Bind::Address(ip) => ip,
        Bind::Interface | Bind::Any => announced_address(filter)?,
    };
    let loopback: IpAddr = if announced.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    for attempt in 0.. {
        let main = match bind {
            Bind::Any => listen_any(port)?,
            _ => listen(SocketAddr::new(announced, port), true).map_err(|e| failed(SocketAddr::new(announced, port), &e))?,
        };
        let local = main.local_addr().map_err(|e| limits::system("listening socket", &e))?;
        let address = SocketAddr::new(announced, local.port());
        if bind != Bind::Interface || announced.is_loopback() {
            return Ok(Listeners { sockets: vec![main], address });
        }
        // Peers on this host may connect to the loopback address.
        match listen(SocketAddr::new(loopback, local.port()), true) {
            Ok(local) => return Ok(Listeners { sockets: vec![main, local], address }),
            Err(_) if port == 0 && attempt < TRIES => {}
            Err(e) => {
                log::info!(
                    "port {} is not available on {loopback}: {e}; peers on this host connect to {announced}",
                    local.port()
                );
                return Ok(Listeners { sockets: vec![main], address });
            }
        }
    }
    bail!(Internal, "no port")
}

fn failed(address: SocketAddr, e: &std::io::Error) -> Error {
    limits::system(&format!("listening on {address}"), e)
}

fn listen_any(port: u16) -> Result<TcpListener> {
    let (v6, v4) = (SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
    // Hosts without IPv6 are common in containers.
    listen(v6, false).or_else(|_| listen(v4, false)).map_err(|e| failed(v4, &e))
}

fn listen(address: SocketAddr, only_v6: bool) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn the_control_address_can_be_written_into_metadata() {
        let address =
            |all: &[&str]| control_address(&all.iter().map(|a| a.parse().unwrap()).collect::<Vec<_>>()).map(|ip| ip.to_string());
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(address(&["10.0.1.1", "10.0.0.1"]), some("10.0.1.1"), "the order counts");
        assert_eq!(address(&["fd00::7", "10.0.0.1"]), some("10.0.0.1"));
        assert_eq!(address(&["fe80::1", "fd00::7"]), some("fd00::7"));
        assert_eq!(address(&["fe80::1"]), None);
        let announced = |all: &[&str], filter| {
            announced_of(&all.iter().map(|a| a.parse().unwrap()).collect::<Vec<_>>(), filter).unwrap().to_string()
        };
        assert_eq!(announced(&["10.0.0.1"], None), "10.0.0.1");
        assert_eq!(announced(&["127.0.0.2"], Some("lo")), "127.0.0.2");
        assert_eq!(announced(&["fe80::1"], None), "127.0.0.1", "peers on this host can connect still");
        assert_eq!(announced_address(Some("=no-such-interface")).unwrap_err().kind(), crate::status::ErrorKind::InvalidArgument);
    }

    #[test]
    fn only_the_bound_addresses_listen() {
        let reaches = |ip: &str, port| TcpStream::connect((ip, port)).is_ok();
        let one = open(Bind::Address("127.0.0.2".parse().unwrap()), None, 0).unwrap();
        let port = one.address.port();
        assert_eq!(one.address.to_string(), format!("127.0.0.2:{port}"));
        assert!(reaches("127.0.0.2", port) && !reaches("127.0.0.1", port) && !reaches("127.0.0.3", port));
        let any = open(Bind::Any, Some("=lo"), 0).unwrap();
        let port = any.address.port();
        assert!(reaches("127.0.0.1", port) && reaches("127.0.0.3", port));
        let interface = open(Bind::Interface, None, 0).unwrap();
        let port = interface.address.port();
        assert!(reaches(&interface.address.ip().to_string(), port) && reaches("127.0.0.1", port) && !reaches("127.0.0.3", port));
        assert_eq!(
            open(Bind::Address("192.0.2.1".parse().unwrap()), None, 0).unwrap_err().kind(),
            crate::status::ErrorKind::System
        );
    }

    #[test]
    fn metadata_brackets_ipv6() {
        assert_eq!(metadata("10.0.0.1:77".parse().unwrap(), "-1"), "10.0.0.1:77?-1");
        assert_eq!(metadata("[fd00::1]:77".parse().unwrap(), "0000:4a:00.0"), "[fd00::1]:77?0000:4a:00.0");
    }
}
