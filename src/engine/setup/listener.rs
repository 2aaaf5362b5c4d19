//! The listening ports of an engine: the addresses they are bound to, and the address announced to peers. Knows nothing about
//! handshakes.

use crate::addresses::Bind;
use crate::engine::limits;
use crate::net::topology;
use crate::status::{bail, Error, Result};
use process::TcpInfo;
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

/// How many ports are tried when the system's choice is taken on the loopback address.
const TRIES: usize = 16;
/// Connections that may wait in the kernel for the accept; the system may allow fewer. The kernel drops what comes to a full queue, and TCP
/// tries again only after a second.
const BACKLOG: i32 = 4096;

/// The ports that an engine listens on.
#[derive(Debug)]
pub(crate) struct Listeners {
    /// Non-blocking; all on the same port.
    pub sockets: Vec<TcpListener>,
    /// The address announced to peers.
    pub address: SocketAddr,
    /// Where peers on other hosts can reach the engine, the announced address first.
    pub addresses: Vec<SocketAddr>,
}

/// Most addresses that an engine sends a peer.
pub(crate) const MAX_ADDRESSES: usize = crate::wire::setup::MAX_ADDRESSES;

/// Whether a peer on another host may find this engine there, without knowing an interface of its own.
pub(crate) fn is_reachable(ip: IpAddr) -> bool {
    !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast() && !is_link_local(ip)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.segments()[0] & 0xFFC0 == 0xFE80,
    }
}

/// The announced address, then the other usable ones that peers may find.
fn reachable(announced: IpAddr, usable: &[IpAddr]) -> Vec<IpAddr> {
    let others = usable.iter().copied().filter(|&ip| ip != announced && is_reachable(ip));
    std::iter::once(announced).filter(|&ip| is_reachable(ip)).chain(others).take(MAX_ADDRESSES).collect()
}

/// "ip:port?gpu", with brackets around an IPv6 address; also the name of an engine in the log.
pub(crate) fn name(address: SocketAddr, gpu: &str) -> String {
    format!("{address}?{gpu}")
}

/// "ip:port?gpu,ip,ip": the name, then the other addresses where peers find the engine. UCCL's readers take all behind the question mark for
/// the GPU, and hand it to the connect.
pub(crate) fn metadata(ports: &Listeners, gpu: &str) -> String {
    let others = ports.addresses.iter().filter(|&&address| address != ports.address);
    others.fold(name(ports.address, gpu), |text, other| format!("{text},{}", other.ip()))
}

/// Splits the GPU of metadata: the GPU alone, and the other addresses of its engine.
///
/// # Errors
/// `InvalidArgument` for what is no address, and for too many.
pub(crate) fn split_gpu(text: &str) -> Result<(&str, Vec<IpAddr>)> {
    let Some((gpu, others)) = text.split_once(',') else { return Ok((text, Vec::new())) };
    let mut found = Vec::new();
    for other in others.split(',') {
        match other.parse::<IpAddr>() {
            Ok(ip) if found.len() + 1 < MAX_ADDRESSES => found.push(ip),
            Ok(_) => bail!(InvalidArgument, "more than {MAX_ADDRESSES} addresses behind a GPU"),
            Err(_) => bail!(InvalidArgument, "{other:?} behind GPU {gpu:?} is no address"),
        }
    }
    Ok((gpu, found))
}

/// The address of the control interface among the usable ones: IPv4 if there is one, else IPv6. A link-local IPv6 address does
/// not do, since metadata has no place for its scope.
fn control_address(usable: &[IpAddr]) -> Option<IpAddr> {
    usable.iter().copied().filter(|&ip| ip.is_ipv4() || !is_link_local(ip)).min_by_key(IpAddr::is_ipv6)
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
    let usable = topology::usable(filter).map_err(|e| limits::system("network interfaces", &e));
    let (announced, usable) = match bind {
        Bind::Address(ip) => (ip, Vec::new()),
        Bind::Interface | Bind::Any => usable.and_then(|usable| Ok((announced_of(&usable, filter)?, usable)))?,
    };
    let loopback: IpAddr = if announced.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    for attempt in 0.. {
        let main = match bind {
            Bind::Any => listen_any(port)?,
            _ => listen(SocketAddr::new(announced, port), true).map_err(|e| failed(SocketAddr::new(announced, port), &e))?,
        };
        let local = main.local_addr().map_err(|e| limits::system("listening socket", &e))?;
        let address = SocketAddr::new(announced, local.port());
        let addresses = reachable(announced, &usable).into_iter().map(|ip| SocketAddr::new(ip, local.port())).collect();
        let ports = Listeners { sockets: vec![main], address, addresses };
        if bind != Bind::Interface || announced.is_loopback() {
            return Ok(ports);
        }
        // Peers on this host may connect to the loopback address.
        match listen(SocketAddr::new(loopback, local.port()), true) {
            Ok(local) => return Ok(everywhere(ports, Some(local))),
            Err(_) if port == 0 && attempt < TRIES => {}
            Err(e) => {
                log::info!(
                    "port {} is not available on {loopback}: {e}; peers on this host connect to {announced}",
                    local.port()
                );
                return Ok(everywhere(ports, None));
            }
        }
    }
    bail!(Internal, "no port")
}

/// Listens at the other addresses too, where peers look for the engine when they have lost it at the announced one.
fn everywhere(mut ports: Listeners, loopback: Option<TcpListener>) -> Listeners {
    ports.sockets.extend(loopback);
    let Listeners { sockets, address, addresses } = &mut ports;
    addresses.retain(|other| {
        let listens = other == address || listen(*other, true).map(|socket| sockets.push(socket)).is_ok();
        if !listens {
            log::info!("port {} is not available on {}: no control connection can move there", other.port(), other.ip());
        }
        listens
    });
    ports
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

/// How many connections wait in the kernel for the accept; 0 where it does not say.
pub(crate) fn waiting(listener: &TcpListener) -> usize {
    TcpInfo::of(listener.as_raw_fd()).map_or(0, |info| info.waiting() as usize)
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
        let none = open(Bind::Interface, Some("=no-such-interface"), 0).unwrap_err();
        assert_eq!(none.kind(), crate::status::ErrorKind::InvalidArgument);
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
    fn the_queue_in_the_kernel_is_counted() {
        let listeners = open(Bind::Address("127.0.0.2".parse().unwrap()), None, 0).unwrap();
        let listener = &listeners.sockets[0];
        let _waiting: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(listeners.address).unwrap()).collect();
        assert_eq!(waiting(listener), 3);
        let _first = listener.accept().unwrap();
        assert_eq!(waiting(listener), 2);
    }

    #[test]
    fn peers_learn_of_addresses_that_they_can_reach() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let found = |announced: &str, all: &[&str]| {
            reachable(ip(announced), &all.iter().map(|a| ip(a)).collect::<Vec<_>>())
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        let all = ["10.0.1.1", "10.0.0.1", "fe80::1", "169.254.0.7", "127.0.0.1", "fd00::7", "::1"];
        assert_eq!(found("10.0.0.1", &all), ["10.0.0.1", "10.0.1.1", "fd00::7"]);
        assert_eq!(found("127.0.0.1", &["127.0.0.1"]), [""; 0]);
        let many: Vec<String> = (1..20).map(|i| format!("10.0.{i}.1")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(found("10.0.9.1", &many)[..2], ["10.0.9.1", "10.0.1.1"]);
        assert_eq!(found("10.0.9.1", &many).len(), MAX_ADDRESSES);
        let ports = open(Bind::Address(ip("127.0.0.2")), None, 0).unwrap();
        assert_eq!((ports.sockets.len(), ports.addresses.len()), (1, 0));
        let ports = open(Bind::Interface, None, 0).unwrap();
        assert!(ports.addresses.iter().all(|&address| TcpStream::connect(address).is_ok()), "{:?}", ports.addresses);
    }

    #[test]
    fn metadata_brackets_ipv6() {
        assert_eq!(name("10.0.0.1:77".parse().unwrap(), "-1"), "10.0.0.1:77?-1");
        assert_eq!(name("[fd00::1]:77".parse().unwrap(), "0000:4a:00.0"), "[fd00::1]:77?0000:4a:00.0");
    }

    #[test]
    fn metadata_carries_the_other_addresses_behind_the_gpu() {
        let ports = |all: &[&str]| {
            let addresses: Vec<SocketAddr> = all.iter().map(|text| text.parse().unwrap()).collect();
            Listeners { sockets: Vec::new(), address: addresses[0], addresses }
        };
        assert_eq!(metadata(&ports(&["10.0.0.1:77"]), "-1"), "10.0.0.1:77?-1");
        let text = metadata(&ports(&["10.0.0.1:77", "10.0.1.1:77", "[fd00::7]:77"]), "0000:4a:00.0");
        assert_eq!(text, "10.0.0.1:77?0000:4a:00.0,10.0.1.1,fd00::7");
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(split_gpu("0000:4a:00.0,10.0.1.1,fd00::7"), Ok(("0000:4a:00.0", vec![ip("10.0.1.1"), ip("fd00::7")])));
        assert_eq!((split_gpu("-1"), split_gpu("")), (Ok(("-1", vec![])), Ok(("", vec![]))));
        let many = |n: usize| format!("0{}", ",10.0.0.1".repeat(n));
        assert!(split_gpu(&many(MAX_ADDRESSES - 1)).is_ok());
        for wrong in ["0,", "0,10.0.0.1,", "0,,10.0.0.1", "0,x", "0,10.0.0.1:77", "0,[fd00::7]", &many(MAX_ADDRESSES)] {
            assert_eq!(split_gpu(wrong).unwrap_err().kind(), crate::status::ErrorKind::InvalidArgument, "{wrong}");
        }
    }
}
