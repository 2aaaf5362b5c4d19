//! The 128-byte handle of a listen comm: which of the peer's bytes the plugin sees, and the address inside. TCPX and TCPXO keep
//! pointers in handles, so the plugin sees as few of the peer's bytes as possible.

use super::traits::HandleCheck;
use crate::status::{bail, Result};
use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The 128 bytes that name a listen comm to the peer.
pub(crate) type Handle = [u8; NCCL_NET_HANDLE_MAXSIZE];

/// Bytes of a socket address in a TCPX handle. The data address is at the start, the control address after the numbers of sockets
/// and threads and a flag.
const ADDRESS: usize = 28;
const SOCKETS_AT: usize = 36;
const THREADS_AT: usize = 40;
const REDIRECT_AT: usize = 44;
const CONTROL_AT: usize = 48;

/// Where the state of a connect is in handles of unknown plugins, at the earliest: that of aws-ofi-nccl, behind an address of 56 bytes, any of
/// which may be zero, and a number of 8.
const STATE_AT: usize = 64;

/// A TCPXO handle: the version of its layout, the number of the GPU, a socket address that is not used, an address as text, ports,
/// the state of a connect, and a pointer to its comm.
mod tcpxo {
    use std::ops::Range;

    pub const VERSION: usize = 0;
    pub const GPU: usize = 1;
    pub const ADDRESS: Range<usize> = 32..72;
    pub const PORTS: Range<usize> = 72..88;
    pub const STATE: usize = 88;
    pub const END: usize = 104;
}

fn word(handle: &Handle, at: usize) -> [u8; 4] {
    handle[at..].first_chunk().copied().unwrap_or_default()
}

fn family(handle: &Handle, at: usize) -> i32 {
    i32::from(u16::from_ne_bytes([handle[at], handle[at + 1]]))
}

/// The handle to connect with: the peer's addresses in the form of `own`, a new handle of this engine. Refuses a handle of
/// another form.
pub(super) fn admit(how: HandleCheck, own: &Handle, peer: &Handle) -> Result<Handle> {
    match how {
        HandleCheck::Own => Ok(*peer),
        HandleCheck::Tcpx => admit_tcpx(own, peer),
        HandleCheck::Tcpxo => admit_tcpxo(own, peer),
        HandleCheck::Tail => {
            let used = own.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1).next_multiple_of(16);
            fresh_from(used.max(STATE_AT), peer)?;
            Ok(*peer)
        }
    }
}

fn fresh_from(used: usize, peer: &Handle) -> Result<()> {
    match peer[used..].iter().position(|&b| b != 0) {
        Some(at) => bail!(Protocol, "the peer's handle is not a new one: byte {} is set", used + at),
        None => Ok(()),
    }
}

/// Takes the two addresses from the peer and everything else from `own`. The bytes behind an IPv4 address are uninitialised stack
/// memory of the plugin and mean nothing.
fn admit_tcpx(own: &Handle, peer: &Handle) -> Result<Handle> {
    let mut admitted = *own;
    for at in [0, CONTROL_AT] {
        let (ours, theirs) = (family(own, at), family(peer, at));
        if ours != theirs {
            bail!(Protocol, "the peer's handle has an address of family {theirs}, ours has {ours}");
        }
        let len = match ours {
            libc::AF_INET => 8,
            libc::AF_INET6 => ADDRESS,
            other => bail!(Protocol, "a handle of this plugin has an address of family {other}"),
        };
        admitted[at..at + len].copy_from_slice(&peer[at..at + len]);
    }
    for (at, what) in [(SOCKETS_AT, "sockets"), (THREADS_AT, "threads")] {
        let [a, b] = [own, peer].map(|handle| u32::from_ne_bytes(word(handle, at)));
        if a != b {
            bail!(
                Protocol,
                "the peer uses {b} {what} per channel (NCCL_NSOCKS_PERTHREAD, NCCL_SOCKET_NTHREADS), this engine {a}"
            );
        }
    }
    if own[REDIRECT_AT] != peer[REDIRECT_AT] {
        bail!(Protocol, "NCCL_GPUDIRECTTCPX_CTRL_DEV is set on one engine only");
    }
    fresh_from(CONTROL_AT + ADDRESS, peer)?;
    Ok(admitted)
}

/// Takes the address and the ports from the peer and everything else from `own`. The number of the peer's GPU must be ours: for another the
/// plugin takes the NIC of that GPU here, while memory is registered for the NIC that it was asked for. The state is that of a new handle: in
/// any other the plugin follows the pointer behind it. What no value was written to is uninitialised memory.
fn admit_tcpxo(own: &Handle, peer: &Handle) -> Result<Handle> {
    if own[tcpxo::VERSION] != peer[tcpxo::VERSION] {
        let [ours, theirs] = [own, peer].map(|handle| handle[tcpxo::VERSION]);
        bail!(Protocol, "the peer's plugin makes handles of version {theirs}, ours of version {ours}");
    }
    if own[tcpxo::STATE] != 0 || peer[tcpxo::STATE] != 0 {
        bail!(Protocol, "the peer's handle is not a new one: its state is {}", peer[tcpxo::STATE]);
    }
    if own[tcpxo::GPU] != peer[tcpxo::GPU] {
        bail!(
            Protocol,
            "the peer's GPU has number {} on its machine, ours number {}: GPUDirect-TCPXO would use the NIC of another GPU (are both machines A3 Mega?)",
            peer[tcpxo::GPU],
            own[tcpxo::GPU]
        );
    }
    let Some(ip) = text_address(peer) else { bail!(Protocol, "the peer's handle has no address") };
    let mut admitted = *own;
    admitted[tcpxo::PORTS].copy_from_slice(&peer[tcpxo::PORTS]);
    admitted[tcpxo::ADDRESS].fill(0);
    let text = ip.to_string();
    admitted[tcpxo::ADDRESS][..text.len()].copy_from_slice(text.as_bytes());
    admitted[tcpxo::STATE..tcpxo::END].fill(0);
    Ok(admitted)
}

/// The address in a TCPXO handle.
fn text_address(handle: &Handle) -> Option<IpAddr> {
    std::ffi::CStr::from_bytes_until_nul(&handle[tcpxo::ADDRESS]).ok()?.to_str().ok()?.parse().ok()
}

/// The data address of a handle, if its layout is known.
pub(super) fn address(how: HandleCheck, handle: &Handle) -> Option<SocketAddr> {
    addresses(how, handle).next()
}

/// The number of data sockets of a comm of this engine's handle, if its layout is known.
pub(super) fn data_sockets(how: HandleCheck, own: &Handle) -> usize {
    match how {
        HandleCheck::Tcpx => u32::from_ne_bytes(word(own, SOCKETS_AT)) as usize,
        HandleCheck::Own | HandleCheck::Tcpxo | HandleCheck::Tail => 0,
    }
}

/// All addresses of a handle: data and control.
pub(super) fn addresses(how: HandleCheck, handle: &Handle) -> impl Iterator<Item = SocketAddr> {
    let both = match how {
        HandleCheck::Own => [soft_plugin::address_of(handle), None],
        HandleCheck::Tcpx => [0, CONTROL_AT].map(|at| address_at(handle, at)),
        HandleCheck::Tcpxo => {
            let [low, high] = [handle[tcpxo::PORTS.start], handle[tcpxo::PORTS.start + 1]];
            [text_address(handle).map(|ip| SocketAddr::new(ip, u16::from_ne_bytes([low, high]))), None]
        }
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
    fn only_the_addresses_come_from_the_peer() {
        let own = fresh([10, 0, 0, 5], 4000, 2);
        let peer = fresh([10, 128, 3, 0], 512, 2);
        assert_eq!(admit(HandleCheck::Tcpx, &own, &peer), Ok(peer));
        assert_eq!(address(HandleCheck::Tcpx, &peer), Some("10.128.3.0:512".parse().unwrap()));
        let both: Vec<_> = addresses(HandleCheck::Tcpx, &peer).collect();
        assert_eq!(data_sockets(HandleCheck::Tcpx, &own), 2);
        assert_eq!(both, ["10.128.3.0:512", "10.128.3.0:513"].map(|a| a.parse().unwrap()));
        assert!(admit(HandleCheck::Tcpx, &own, &fresh([10, 0, 0, 6], 1, 3)).is_err(), "another number of sockets");
        assert!(admit(HandleCheck::Tcpx, &own, &[0xFF; 128]).is_err());
        assert!(admit(HandleCheck::Tcpx, &[0; 128], &[0; 128]).is_err(), "no address at all");
        // Bytes that define the form of the comm or become a pointer are refused.
        for at in (0..2).chain(36..45).chain(48..50).chain(76..128) {
            let mut bad = peer;
            bad[at] ^= 0x80;
            assert!(admit(HandleCheck::Tcpx, &own, &bad).is_err(), "byte {at}");
        }
        // The rest comes from our own handle, whatever the peer's stack memory had.
        for at in (8..36).chain(45..48).chain(56..76) {
            let mut odd = peer;
            odd[at] ^= 0x80;
            assert_eq!(admit(HandleCheck::Tcpx, &own, &odd), Ok(peer), "byte {at}");
        }
    }

    #[test]
    fn an_ipv6_address_may_have_any_bytes() {
        let mut own = fresh([0; 4], 1, 2);
        for at in [0, CONTROL_AT] {
            own[at..at + 2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            own[at + 23] = 1;
        }
        let mut peer = own;
        peer[8..24].fill(0xAB);
        peer[56..72].fill(0xCD);
        assert_eq!(admit(HandleCheck::Tcpx, &own, &peer), Ok(peer));
        peer[80] = 1;
        assert!(admit(HandleCheck::Tcpx, &own, &peer).is_err());
    }

    /// A new handle of TCPXO, with litter where no value was written to.
    fn fresh_tcpxo(ip: &str, gpu: u8, litter: u8) -> Handle {
        let mut handle = [litter; NCCL_NET_HANDLE_MAXSIZE];
        (handle[0], handle[1], handle[88]) = (1, gpu, 0);
        handle[32..32 + ip.len()].copy_from_slice(ip.as_bytes());
        handle[32 + ip.len()] = 0;
        handle[72..76].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        handle[96..].fill(0);
        handle
    }

    #[test]
    fn of_tcpxo_no_pointer_and_no_litter_come_from_the_peer() {
        let own = fresh_tcpxo("10.0.0.5", 3, 0xAA);
        let peer = fresh_tcpxo("10.128.3.10", 3, 0xBB);
        let admitted = admit(HandleCheck::Tcpxo, &own, &peer).unwrap();
        assert_eq!((admitted[0], admitted[1], &admitted[4..32]), (1, 3, &own[4..32]));
        assert_eq!((&admitted[32..44], &admitted[43..72]), (&b"10.128.3.10\0"[..], &[0; 29][..]));
        assert_eq!((&admitted[72..88], &admitted[88..]), (&peer[72..88], &[0; 40][..]));
        let port = u16::from_ne_bytes([0x34, 0x12]);
        assert_eq!(address(HandleCheck::Tcpxo, &peer), Some(SocketAddr::new([10, 128, 3, 10].into(), port)));
        // Bytes that decide what the plugin follows are refused.
        for (at, byte) in [(0, 2), (1, 4), (88, 1), (88, 3), (32, b'x'), (32, 0)] {
            let mut bad = peer;
            bad[at] = byte;
            assert!(admit(HandleCheck::Tcpxo, &own, &bad).is_err(), "byte {at}");
        }
        let mut endless = peer;
        endless[32..72].fill(b'1');
        assert!(admit(HandleCheck::Tcpxo, &own, &endless).is_err());
        // A pointer never passes, whatever the state says.
        for at in 89..128 {
            let mut odd = peer;
            odd[at] ^= 0x80;
            assert_eq!(admit(HandleCheck::Tcpxo, &own, &odd), Ok(admitted), "byte {at}");
        }
    }

    #[test]
    fn of_unknown_layouts_the_tail_is_checked() {
        // That of aws-ofi-nccl: the end of an address, or a small number, may be zero in ours and not in the peer's.
        let mut own = [0; NCCL_NET_HANDLE_MAXSIZE];
        own[..20].fill(7);
        let mut peer = [0; NCCL_NET_HANDLE_MAXSIZE];
        peer[..64].fill(9);
        assert_eq!(admit(HandleCheck::Tail, &own, &peer), Ok(peer));
        for at in 64..NCCL_NET_HANDLE_MAXSIZE {
            let mut bad = peer;
            bad[at] = 1;
            assert!(admit(HandleCheck::Tail, &own, &bad).is_err(), "byte {at}");
        }
        // A plugin whose new handles are longer.
        own[70] = 1;
        peer[79] = 1;
        assert_eq!(admit(HandleCheck::Tail, &own, &peer), Ok(peer));
        peer[80] = 1;
        assert!(admit(HandleCheck::Tail, &own, &peer).is_err());
    }
}
