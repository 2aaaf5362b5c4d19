//! The 128 bytes that name a listen comm: what can be checked of a peer's before the plugin sees them, and the address inside. TCPX keeps
//! pointers and an index in them, so bytes of a peer must look like a fresh handle of our own.

use super::comm::Handle;
use super::traits::HandleCheck;
use crate::status::{bail, Result};
use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of a socket address in a TCPX handle: one for data at its beginning, one for control behind the numbers of sockets and threads
/// and a flag.
const ADDRESS: usize = 28;
const SOCKETS_AT: usize = 36;
const THREADS_AT: usize = 40;
const REDIRECT_AT: usize = 44;
const CONTROL_AT: usize = 48;

fn word(handle: &Handle, at: usize) -> [u8; 4] {
    handle[at..].first_chunk().copied().unwrap_or_default()
}

fn family(handle: &Handle, at: usize) -> i32 {
    i32::from(u16::from_ne_bytes([handle[at], handle[at + 1]]))
}

/// Refuses a peer's handle that is not made like `own`, a fresh one of ours.
pub(super) fn check(how: HandleCheck, own: &Handle, peer: &Handle) -> Result<()> {
    match how {
        HandleCheck::Own => Ok(()),
        HandleCheck::Tcpx => check_tcpx(own, peer),
        HandleCheck::Tail => {
            let used = own.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1).next_multiple_of(16);
            match peer[used..].iter().position(|&b| b != 0) {
                Some(at) => bail!(Protocol, "the peer's handle is not a fresh one: byte {} is set", used + at),
                None => Ok(()),
            }
        }
    }
}

fn check_tcpx(own: &Handle, peer: &Handle) -> Result<()> {
    for at in [0, CONTROL_AT] {
        let (ours, theirs) = (family(own, at), family(peer, at));
        if ours != theirs {
            bail!(Protocol, "the peer's handle has an address of family {theirs}, ours has {ours}");
        }
    }
    for at in (0..NCCL_NET_HANDLE_MAXSIZE).step_by(4) {
        let (ours, theirs) = (word(own, at), word(peer, at));
        // An IPv4 address ends after 8 bytes; what follows is as empty as ours.
        let address = [0, CONTROL_AT].into_iter().any(|start| {
            let len = if family(own, start) == libc::AF_INET6 { ADDRESS } else { 8 };
            family(own, start) != 0 && (start..start + len).contains(&at)
        });
        if address || ours == theirs {
            continue;
        }
        if at == SOCKETS_AT || at == THREADS_AT {
            let [a, b] = [ours, theirs].map(u32::from_ne_bytes);
            let what = if at == SOCKETS_AT { "sockets" } else { "threads" };
            bail!(Protocol, "the peer uses {b} {what} a channel (NCCL_NSOCKS_PERTHREAD, NCCL_SOCKET_NTHREADS), this side {a}");
        }
        if at == REDIRECT_AT && [ours[0], theirs[0]] != [1, 1] && theirs[0] <= 1 && theirs[1..] == ours[1..] {
            bail!(Protocol, "NCCL_GPUDIRECTTCPX_CTRL_DEV is set on one side only");
        }
        bail!(Protocol, "the peer's handle is not like a fresh one of ours: bytes {at} to {} differ", at + 3);
    }
    Ok(())
}

/// The address for data that a handle names, as far as its layout is known.
pub(super) fn address(how: HandleCheck, handle: &Handle) -> Option<SocketAddr> {
    addresses(how, handle).next()
}

/// All addresses that a handle names: for data, and for control.
pub(super) fn addresses(how: HandleCheck, handle: &Handle) -> impl Iterator<Item = SocketAddr> {
    let both = match how {
        HandleCheck::Own => [soft_plugin::address_of(handle), None],
        HandleCheck::Tcpx => [0, CONTROL_AT].map(|at| address_at(handle, at)),
        HandleCheck::Tail => [None, None],
    };
    both.into_iter().flatten()
}

fn address_at(handle: &Handle, at: usize) -> Option<SocketAddr> {
    let port = u16::from_be_bytes([handle[at + 2], handle[at + 3]]);
    match family(handle, at) {
        libc::AF_INET => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(word(handle, at + 4))), port)),
        libc::AF_INET6 => {
            let octets: [u8; 16] = handle[at + 8..].first_chunk().copied()?;
            Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::from(octets)), port))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh(ip: [u8; 4], port: u16, sockets: u32) -> Handle {
        let mut handle = [0; NCCL_NET_HANDLE_MAXSIZE];
        handle[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        handle[2..4].copy_from_slice(&port.to_be_bytes());
        handle[4..8].copy_from_slice(&ip);
        handle[36..40].copy_from_slice(&sockets.to_ne_bytes());
        handle[40..44].copy_from_slice(&1u32.to_ne_bytes());
        handle[28..36].fill(0xFF);
        let control: [u8; 8] = std::array::from_fn(|i| handle[i]);
        handle[48..56].copy_from_slice(&control);
        handle[51] ^= 1;
        handle
    }

    #[test]
    fn only_handles_like_our_own_pass() {
        let own = fresh([10, 0, 0, 5], 4000, 2);
        let peer = fresh([10, 128, 3, 0], 512, 2);
        assert_eq!(check(HandleCheck::Tcpx, &own, &peer), Ok(()));
        assert_eq!(address(HandleCheck::Tcpx, &peer), Some("10.128.3.0:512".parse().unwrap()));
        assert!(check(HandleCheck::Tcpx, &own, &fresh([10, 0, 0, 6], 1, 3)).is_err(), "another number of sockets");
        assert!(check(HandleCheck::Tcpx, &own, &[0xFF; 128]).is_err());
        let both: Vec<_> = addresses(HandleCheck::Tcpx, &peer).collect();
        assert_eq!(both, ["10.128.3.0:512", "10.128.3.0:513"].map(|a| a.parse().unwrap()));
        for at in (0..2).chain(8..50).chain(56..128) {
            let mut bad = peer;
            bad[at] ^= 0x80;
            assert!(check(HandleCheck::Tcpx, &own, &bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn an_ipv6_address_may_have_any_bytes() {
        let mut own = fresh([0; 4], 1, 2);
        own[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        own[23] = 1;
        let mut peer = own;
        peer[8..24].fill(0xAB);
        assert_eq!(check(HandleCheck::Tcpx, &own, &peer), Ok(()));
        peer[80] = 1;
        assert!(check(HandleCheck::Tcpx, &own, &peer).is_err());
    }

    #[test]
    fn of_unknown_layouts_the_tail_is_checked() {
        let mut own = [0; NCCL_NET_HANDLE_MAXSIZE];
        own[..20].fill(7);
        let mut peer = [0; NCCL_NET_HANDLE_MAXSIZE];
        peer[..32].fill(9);
        assert_eq!(check(HandleCheck::Tail, &own, &peer), Ok(()));
        peer[32] = 1;
        assert!(check(HandleCheck::Tail, &own, &peer).is_err());
    }
}
