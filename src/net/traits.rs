//! What a plugin can do and what it requires of its caller, decided once when it is loaded. Code above `net` checks these and
//! never the plugin's name.

use super::table::{Ext, Properties};
use nccl_net_abi::{NCCL_NET_DEVICE_UNPACK, NCCL_PTR_CUDA};

/// How the bytes of a peer's handle are checked before the plugin sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleCheck {
    /// The plugin checks them itself and keeps only a key in the handle.
    Own,
    /// A socket address, a socket count, and room for the plugin's state that is zero in a fresh handle.
    Tcpx,
    /// An index, an address as text, ports, and room for the plugin's state and a pointer.
    Tcpxo,
    /// Unknown layout: the second half must be zero, as far as it is in a new handle of this engine.
    Tail,
}

/// Properties of a plugin that its callers depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Comms carry host memory.
    pub host_memory: bool,
    /// Comms carry device memory.
    pub device_memory: bool,
    /// One message can be gathered from and scattered to many pieces of host memory.
    pub vectored: bool,
    /// A doorbell rings when a request ends or a comm fails.
    pub doorbell: bool,
    /// Data moves only while requests are tested.
    pub polled: bool,
    /// A comm can report how many bytes were acknowledged or delivered.
    pub progress_bytes: bool,
    /// Calls need the memory's GPU current in the calling thread, starting with set-up; comms belong to one GPU.
    pub follows_gpu: bool,
    /// Listen, connect, accept, registration and close run one at a time in the process.
    pub serial_setup: bool,
    /// Calls may raise SIGPIPE in the calling thread.
    pub raises_sigpipe: bool,
    /// Device memory may be sent from host memory that the GPU fills, instead of by the plugin's device sends.
    pub stage_sends: bool,
    /// Device memory is sent only from staging memory of this library, on the GPU: the application's is never exported to a NIC.
    pub packs_sends: bool,
    /// A connection does without it where the peer has another plugin or data is to be protected: the software plugin carries all then.
    pub optional: bool,
    /// Device memory is received at the posted address, and nothing is unpacked. A comm that was closed may go on reading and writing
    /// the memory of its requests until that memory is deregistered, so it is given staging memory of this library alone.
    pub delivers: bool,
    /// One registration serves all comms of a NIC.
    pub shared_registrations: bool,
    /// Messages above 512 KiB may end the process, whatever the limit.
    pub small_messages: bool,
    /// Abandoned connects and accepts must be polled until they end.
    pub lingers: bool,
    /// The kernel sends from the memory of a send until the peer has acknowledged it, even if the comm was closed meanwhile. A
    /// send is done once it is acknowledged.
    pub sends_late: bool,
    /// A closing receive comm asks its data sockets for their peers, and ends the process if one has none.
    pub asks_for_peers: bool,
    /// An accept ends the process if it cannot get a GPU's receive memory: without descriptors, or without the receive manager.
    pub imports: bool,
    /// Only equal NIC names can reach each other, and a GPU uses the NICs nearest to it.
    pub paired_nics: bool,
    /// A NIC without a PCI path makes a registration crash.
    pub pci_nics: bool,
    /// The devices may change from one set-up to the next.
    pub devices_change: bool,
    /// Channels prove a key of their control connection, and their messages can be protected.
    pub secured: bool,
    /// One engine can dial the connections of both directions.
    pub dials_both: bool,
    /// How a peer's handle is checked.
    pub handle_check: HandleCheck,
}

impl Traits {
    /// Traits of a plugin with this table name, with or without the extension of the software plugin.
    pub(super) fn of(name: &str, ext: Option<&Ext>, devices: DeviceTraits) -> Traits {
        let DeviceTraits { global, ptr_support, unpack } = devices;
        let (soft, devmem) = (ext.is_some(), name == soft_plugin::DEVICE_MEMORY);
        let (tcpx, tcpxo) = (is_tcpx(name), is_tcpxo(name));
        Traits {
            host_memory: soft && !devmem,
            device_memory: ptr_support & NCCL_PTR_CUDA != 0,
            vectored: ext.is_some_and(|e| e.vectored.is_some()),
            doorbell: ext.is_some_and(|e| e.set_doorbell.is_some()),
            polled: ext.is_none_or(|e| e.set_doorbell.is_none()),
            progress_bytes: ext.is_some_and(|e| e.progress.is_some()),
            follows_gpu: !soft || devmem,
            serial_setup: !soft,
            raises_sigpipe: !soft,
            stage_sends: soft && !devmem,
            packs_sends: devmem,
            optional: devmem,
            delivers: !soft && !unpack,
            shared_registrations: soft || tcpx || tcpxo || global,
            small_messages: !soft || devmem,
            lingers: !soft,
            sends_late: !soft && tcpx,
            asks_for_peers: !soft && tcpx,
            imports: !soft && tcpx,
            paired_nics: !soft && (tcpx || tcpxo),
            pci_nics: !soft && tcpx,
            devices_change: soft && !devmem,
            secured: ext.is_some_and(|e| e.key_listen.is_some() && e.key_connect.is_some() && e.protect.is_some()),
            dials_both: ext.is_some_and(|e| {
                e.listen_both.is_some() && e.accept_send.is_some() && e.connect_recv.is_some() && e.ready.is_some()
            }),
            handle_check: match name {
                _ if soft => HandleCheck::Own,
                _ if tcpx => HandleCheck::Tcpx,
                _ if tcpxo => HandleCheck::Tcpxo,
                _ => HandleCheck::Tail,
            },
        }
    }

    /// The traits of a foreign plugin with this name, whose devices have bounce buffers.
    #[cfg(test)]
    pub(crate) fn of_others(name: &str) -> Traits {
        Traits::of(name, None, DeviceTraits { global: false, ptr_support: NCCL_PTR_CUDA, unpack: true })
    }
}

/// What all devices of a plugin have in common.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DeviceTraits {
    /// They report global registrations.
    pub global: bool,
    /// The kinds of memory that they can register.
    pub ptr_support: i32,
    /// Received device memory must be unpacked.
    pub unpack: bool,
}

impl DeviceTraits {
    pub(super) fn of(devices: &[Properties]) -> DeviceTraits {
        DeviceTraits {
            global: !devices.is_empty() && devices.iter().all(|p| p.reg_is_global),
            ptr_support: devices.iter().fold(0, |all, p| all | p.ptr_support),
            unpack: devices.iter().any(|p| p.device_type == NCCL_NET_DEVICE_UNPACK),
        }
    }
}

/// Whether a table's name is one of GPUDirect-TCPX.
pub(crate) fn is_tcpx(name: &str) -> bool {
    name.to_ascii_lowercase().contains("tcpx")
}

/// Whether a table's name is that of GPUDirect-TCPXO.
pub(crate) fn is_tcpxo(name: &str) -> bool {
    name.to_ascii_lowercase().starts_with("fastrak")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_of_a_foreign_plugin_follow_from_its_table() {
        let [other, tcpx] = ["Other", "GPUDirectTCPX"].map(Traits::of_others);
        for of_others in [other, tcpx] {
            let can = [of_others.host_memory, of_others.vectored, of_others.doorbell, of_others.progress_bytes];
            assert_eq!((can, of_others.device_memory), ([false; 4], true));
            let more = [of_others.stage_sends, of_others.devices_change, of_others.secured, of_others.dials_both];
            assert_eq!(more, [false; 4], "{of_others:?}");
            let needs = [of_others.polled, of_others.follows_gpu, of_others.serial_setup, of_others.raises_sigpipe];
            assert_eq!(needs, [true; 4], "{of_others:?}");
            assert!(of_others.small_messages && of_others.lingers, "{of_others:?}");
        }
        let of_tcpx = |t: Traits| [t.shared_registrations, t.sends_late, t.asks_for_peers, t.imports, t.paired_nics, t.pci_nics];
        assert_eq!((of_tcpx(other), other.handle_check), ([false; 6], HandleCheck::Tail));
        assert_eq!((of_tcpx(tcpx), tcpx.handle_check), ([true; 6], HandleCheck::Tcpx));
        let devices = DeviceTraits { global: true, ptr_support: NCCL_PTR_CUDA, unpack: false };
        assert!(Traits::of("Other", None, devices).shared_registrations, "its devices report it");
        assert!(!Traits::of("Other", None, DeviceTraits::default()).device_memory);
    }

    #[test]
    fn device_memory_tcp_is_the_software_plugin_for_pairs_of_gpus() {
        let devices = DeviceTraits { global: false, ptr_support: NCCL_PTR_CUDA, unpack: true };
        let [soft, devmem] = [("TCPX-soft", Ext::built_in()), (soft_plugin::DEVICE_MEMORY, Ext::for_device_memory())]
            .map(|(name, ext)| Traits::of(name, Some(&ext), devices));
        let both = |t: Traits| [t.device_memory, t.doorbell, t.progress_bytes, t.secured, t.dials_both, t.shared_registrations];
        assert_eq!((both(soft), both(devmem)), ([true; 6], [true; 6]));
        let of_soft = |t: Traits| [t.host_memory, t.vectored, t.stage_sends, t.devices_change];
        assert_eq!((of_soft(soft), of_soft(devmem)), ([true; 4], [false; 4]));
        let of_devmem = |t: Traits| [t.follows_gpu, t.packs_sends, t.optional, t.small_messages];
        assert_eq!((of_devmem(soft), of_devmem(devmem)), ([false; 4], [true; 4]));
        assert!(!devmem.delivers && !devmem.lingers && !devmem.serial_setup && !devmem.polled);
    }

    #[test]
    fn a_plugin_without_bounce_buffers_delivers() {
        let host = DeviceTraits { global: false, ptr_support: NCCL_PTR_CUDA, unpack: false };
        let [other, tcpxo] = ["Other", "FasTrak"].map(|name| Traits::of(name, None, host));
        assert_eq!([other, tcpxo, Traits::of_others("GPUDirectTCPX")].map(|t| t.delivers), [true, true, false]);
        for t in [other, tcpxo] {
            assert!(t.device_memory && t.follows_gpu && t.serial_setup && t.lingers && !t.host_memory && !t.stage_sends, "{t:?}");
            assert!(!t.sends_late && !t.asks_for_peers && !t.imports && !t.pci_nics, "{t:?}");
        }
        let of_tcpxo = |t: Traits| (t.shared_registrations, t.paired_nics, t.handle_check);
        assert_eq!(of_tcpxo(tcpxo), (true, true, HandleCheck::Tcpxo));
        assert_eq!(of_tcpxo(other), (false, false, HandleCheck::Tail));
    }
}
