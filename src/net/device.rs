//! A network device, as a plugin lists it. Knows no plugin.

use super::table::Properties;

/// A device of a plugin.
#[derive(Clone, Debug)]
pub struct Device {
    /// Name, as the plugin gives it.
    pub name: String,
    /// Directory of the PCI device under /sys, if it is one.
    pub pci_path: Option<String>,
    /// Mbit/s; 0 if unknown.
    pub speed_mbps: i32,
    /// Or of NCCL_PTR_HOST (1), NCCL_PTR_CUDA (2), NCCL_PTR_DMABUF (4).
    pub ptr_support: i32,
    /// Received CUDA memory must be unpacked from a bounce buffer.
    pub unpack: bool,
}

impl Device {
    /// Its speed as text.
    pub fn speed(&self) -> String {
        match self.speed_mbps {
            mbps @ 1.. => format!("{mbps} Mbit/s"),
            _ => "speed unknown".to_owned(),
        }
    }

    pub(super) fn new(dev: usize, p: Properties) -> Device {
        Device {
            name: p.name.unwrap_or_else(|| format!("dev{dev}")),
            pci_path: p.pci_path,
            speed_mbps: p.speed_mbps,
            ptr_support: p.ptr_support,
            unpack: p.device_type == nccl_net_abi::NCCL_NET_DEVICE_UNPACK,
        }
    }
}
