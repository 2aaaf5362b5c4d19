//! Reads interfaces from the kernel: getifaddrs, /proc/thread-self/net/if_inet6 and /sys/class/net. Applies no rules.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use super::kinds::{Address, Found, Interface};

/// `IFA_F_*` of linux/if_addr.h.
const DADFAILED: u32 = 0x08;
const DEPRECATED: u32 = 0x20;
const TENTATIVE: u32 = 0x40;

/// Every interface that has an address, in the kernel's order.
pub fn list() -> io::Result<Vec<Found>> {
    let mut head: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `head` receives a list that is freed below.
    if unsafe { libc::getifaddrs(&mut head) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // A thread may be in another network namespace than its process.
    let flags_v6 = flags(&fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default());
    let mut found: Vec<Found> = Vec::new();
    let mut cursor = head;
    while !cursor.is_null() {
        // SAFETY: a node of the list, valid until freeifaddrs.
        let node = unsafe { &*cursor };
        cursor = node.ifa_next;
        // SAFETY: the name of a node is a terminated string.
        let name = unsafe { CStr::from_ptr(node.ifa_name) }.to_string_lossy().into_owned();
        let at = found.iter().position(|f| f.name == name).unwrap_or_else(|| {
            found.push(interface(name.clone(), node.ifa_flags));
            found.len() - 1
        });
        let Some((ip, scope)) = ip_of(node.ifa_addr) else { continue };
        let prefix = ip_of(node.ifa_netmask).map_or(0, |(mask, _)| match mask {
            IpAddr::V4(m) => u32::from(m).count_ones(),
            IpAddr::V6(m) => u128::from(m).count_ones(),
        });
        let flags = match ip {
            IpAddr::V6(v6) => flags_v6.get(&(v6, name)).copied().unwrap_or(0),
            IpAddr::V4(_) => 0,
        };
        let (tentative, deprecated) = (flags & (TENTATIVE | DADFAILED) != 0, flags & DEPRECATED != 0);
        found[at].addresses.push(Address { ip, prefix, scope, tentative, deprecated });
    }
    // SAFETY: the list came from getifaddrs, and no node is used afterwards.
    unsafe { libc::freeifaddrs(head) };
    Ok(found)
}

fn interface(name: String, flags: libc::c_uint) -> Found {
    let has = |flag: libc::c_int| flags & flag as libc::c_uint != 0;
    Found {
        up: has(libc::IFF_UP),
        carrier: has(libc::IFF_RUNNING),
        loopback: has(libc::IFF_LOOPBACK),
        empty_bridge: is_empty_bridge(Path::new("/sys/class/net"), &name),
        addresses: Vec::new(),
        name,
    }
}

/// Whether it is a bridge whose ports are all virtual.
pub fn is_empty_bridge(sys: &Path, name: &str) -> bool {
    let bridge = sys.join(name);
    let physical = |port: fs::DirEntry| sys.join(port.file_name()).join("device").exists();
    bridge.join("bridge").exists()
        && !fs::read_dir(bridge.join("brif")).is_ok_and(|mut ports| ports.any(|p| p.is_ok_and(physical)))
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

/// An error unless the interface is up and has a carrier.
pub fn check_link(name: &CStr, socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain data for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.to_bytes()) {
        *to = *from as libc::c_char;
    }
    // SAFETY: a live descriptor and a request with a terminated name, into which the kernel writes the flags.
    let flags = unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
        i32::from(request.ifr_ifru.ifru_flags)
    };
    match flags & libc::IFF_UP != 0 && flags & libc::IFF_RUNNING != 0 {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::ENETDOWN)),
    }
}

/// Address and name to flags, from the text of if_inet6: address, index, prefix, scope, flags, name.
pub fn flags(text: &str) -> HashMap<(Ipv6Addr, String), u32> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [address, _, _, _, flags, name] = fields[..] else { return None };
        let address = Ipv6Addr::from(u128::from_str_radix(address, 16).ok()?);
        Some(((address, name.to_owned()), u32::from_str_radix(flags, 16).ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// The properties of a selected interface.
pub fn describe(found: &Found, address: Address) -> Interface {
    let sys = format!("/sys/class/net/{}", found.name);
    let read = |file: &str| fs::read_to_string(format!("{sys}/{file}")).unwrap_or_default().trim().to_owned();
    Interface {
        // The name came from a C string, so it holds no NUL.
        name: CString::new(found.name.as_str()).unwrap_or_default(),
        pci_path: fs::canonicalize(format!("{sys}/device")).ok().and_then(|p| CString::new(p.to_string_lossy().as_bytes()).ok()),
        address: address.ip,
        prefix: address.prefix,
        scope: address.scope,
        loopback: found.loopback,
        guid: read("address").split(':').filter_map(|b| u64::from_str_radix(b, 16).ok()).fold(0, |acc, b| acc << 8 | b),
        speed: speed(&read("speed")),
    }
}

/// Mbit/s from a speed file; 0 if unknown: empty, -1 or -1 as an unsigned number.
pub fn speed(text: &str) -> i32 {
    text.parse::<i32>().ok().filter(|s| *s > 0).unwrap_or(0)
}
