//! An interface as the kernel reports it, and as the plugin uses it. Plain values.

use std::ffi::CString;
use std::net::IpAddr;

/// A usable interface with one of its addresses.
#[derive(Clone, Debug)]
pub struct Interface {
    /// Name.
    pub name: CString,
    /// Path of its PCI device under /sys, if it has one.
    pub pci_path: Option<CString>,
    /// The address to listen on.
    pub address: IpAddr,
    /// Length of the network prefix, bits.
    pub prefix: u32,
    /// Scope of a link-local IPv6 address.
    pub scope: u32,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// Derived from the MAC address.
    pub guid: u64,
    /// Mbit/s; 0 if unknown.
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

/// An interface as the kernel reports it, before any rule.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Name.
    pub name: String,
    /// It is administratively up.
    pub up: bool,
    /// It has a carrier.
    pub carrier: bool,
    /// It is the loopback interface.
    pub loopback: bool,
    /// It is a bridge without a physical port.
    pub empty_bridge: bool,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Length of the network prefix, bits.
    pub prefix: u32,
    /// Scope of a link-local IPv6 address.
    pub scope: u32,
    /// Duplicate address detection is running or has failed: it cannot be bound.
    pub tentative: bool,
    /// Deprecated: not for new connections.
    pub deprecated: bool,
}
