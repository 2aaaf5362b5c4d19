//! What GPUDirect-TCPXO needs of a machine. Its init ends the process where something of this is missing, so it is looked at before. Reads
//! files and knocks at a socket; knows nothing of the plugin's answers.

use super::device::Device;
use super::pairing;
use super::rxdm::knock;
use super::topology;
use crate::status::{bail, err, Result};
use socket2::SockAddr;
use soft_plugin::interfaces::{self, NameFilter};
use std::io;
use std::path::{Path, PathBuf};

/// The receive manager's socket: an abstract one, whose name fills the address; a file where the variable names its folder.
const SOCKET: &str = "rxdm_uds_nic_mapping";
const FOLDER: &str = "FILE_BASED_UDS_PATH_PREFIX";
const ADDRESS: usize = 108;

/// PCI vendor and device of the GPUs that it knows, those of an A3 Mega machine.
const GPU: (&str, &str) = ("0x10de", "0x2330");

/// Its control interface by default.
const CONTROL: &str = "eth0";

/// A machine, as far as TCPXO looks at it.
pub(super) struct Machine {
    root: PathBuf,
    /// The value of a variable of the environment, if it is set and not empty.
    variable: fn(&str) -> Option<String>,
    /// Names of the interfaces that have an address.
    interfaces: fn() -> Vec<String>,
}

impl Machine {
    /// This one.
    pub(super) fn here() -> Machine {
        let interfaces = || {
            let all = interfaces::list().unwrap_or_default().into_iter();
            all.filter(|interface| !interface.addresses.is_empty()).map(|interface| interface.name).collect()
        };
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Machine { root: "/".into(), variable, interfaces }
    }

    /// Whether its receive manager listens.
    pub(super) fn has_manager(&self) -> bool {
        self.manager().is_ok()
    }

    fn manager(&self) -> io::Result<()> {
        match (self.variable)(FOLDER) {
            Some(folder) => knock(&SockAddr::unix(Path::new(&folder).join(SOCKET))?),
            None => {
                use std::os::unix::ffi::OsStrExt;
                let mut name = [0; ADDRESS];
                name[1..=SOCKET.len()].copy_from_slice(SOCKET.as_bytes());
                knock(&SockAddr::unix(std::ffi::OsStr::from_bytes(&name))?)
            }
        }
    }

    /// Checks that TCPXO can be initialised with this GPU, by PCI address, current.
    ///
    /// # Errors
    /// `PluginLoad`: what is missing. The plugin must not be initialised then.
    pub(super) fn check(&self, gpu: Option<&str>) -> Result<()> {
        if (self.variable)("NCCL_FASTRAK_ENABLE").is_some_and(|value| value.trim() == "0") {
            bail!(PluginLoad, "NCCL_FASTRAK_ENABLE=0 turns GPUDirect-TCPXO off");
        }
        self.manager().map_err(|e| match (self.variable)(FOLDER) {
            Some(folder) => err!(PluginLoad, "the receive manager of GPUDirect-TCPXO does not answer: {folder}/{SOCKET}: {e}"),
            None => err!(PluginLoad, "the receive manager of GPUDirect-TCPXO does not answer: abstract socket {SOCKET}: {e}"),
        })?;
        let Some(gpu) = gpu else { bail!(PluginLoad, "GPUDirect-TCPXO needs a GPU, and none can be used here") };
        let gpu = gpu.to_ascii_lowercase();
        let word = |name: &str| std::fs::read_to_string(self.root.join("sys/bus/pci/devices").join(&gpu).join(name));
        let (vendor, device) = (word("vendor").unwrap_or_default(), word("device").unwrap_or_default());
        if (vendor.trim(), device.trim()) != GPU {
            bail!(PluginLoad, "GPUDirect-TCPXO does not know GPU {gpu} (PCI device {}:{})", vendor.trim(), device.trim());
        }
        let there = (self.interfaces)();
        let control = (self.variable)("NCCL_FASTRAK_CTRL_DEV").unwrap_or(CONTROL.into());
        if !there.iter().any(|name| NameFilter::parse(&control).admits(name)) {
            bail!(
                PluginLoad,
                "the control interface of GPUDirect-TCPXO, {control}, is not there or has no address (NCCL_FASTRAK_CTRL_DEV)"
            );
        }
        self.check_nic(&gpu, &there)
    }

    /// Checks the data NIC of a GPU. It can be on another rail where the user allows a subset of the NICs.
    fn check_nic(&self, gpu: &str, there: &[String]) -> Result<()> {
        if (self.variable)("NCCL_FASTRAK_ALLOW_NIC_SUBSET").is_some_and(|value| value.trim() == "1") {
            return Ok(());
        }
        let path = std::fs::canonicalize(self.root.join("sys/bus/pci/devices").join(gpu)).unwrap_or_default();
        let (nics, gpus) = (topology::pci_interfaces(&self.root), topology::gpus(&self.root));
        let named = ["NCCL_FASTRAK_IFNAME", "NCCL_FASTRAK_SOCKET_IFNAME"].into_iter().find_map(self.variable);
        let filter = named.as_deref().map(NameFilter::parse);
        let usable = |nic: &Device| there.contains(&nic.name) && filter.as_ref().is_none_or(|filter| filter.admits(&nic.name));
        let own = pairing::own(&nics, Some(&path.to_string_lossy()), &gpus);
        match own.iter().map(|&nic| &nics[nic]).find(|nic| !usable(nic)) {
            None if own.is_empty() => bail!(PluginLoad, "GPUDirect-TCPXO finds no data NIC for GPU {gpu}"),
            None => Ok(()),
            Some(nic) => bail!(
                PluginLoad,
                "GPUDirect-TCPXO cannot use {}, the data NIC of GPU {gpu}: it has no address, or NCCL_FASTRAK_IFNAME leaves it out",
                nic.name
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixListener;

    /// Two switches of an A3 Mega machine, each with two GPUs and two data NICs, and a control NIC elsewhere.
    fn machine(root: &Path) {
        let device = |path: &str, vendor: &str, id: &str, class: &str| {
            let real = root.join("sys/devices").join(path);
            fs::create_dir_all(&real).expect("folder");
            for (name, text) in [("vendor", vendor), ("device", id), ("class", class)] {
                fs::write(real.join(name), format!("{text}\n")).expect("file");
            }
            let devices = root.join("sys/bus/pci/devices");
            fs::create_dir_all(&devices).expect("folder");
            std::os::unix::fs::symlink(&real, devices.join(real.file_name().expect("address"))).expect("link");
            real
        };
        let nic = |name: &str, path: &str| {
            let real = device(path, "0x1ae0", "0x0084", "0x020000");
            fs::create_dir_all(root.join("sys/class/net").join(name)).expect("folder");
            std::os::unix::fs::symlink(real, root.join("sys/class/net").join(name).join("device")).expect("link");
        };
        nic("eth0", "pci0000:00/0000:00:05.0");
        for switch in 0..2 {
            let at = |port: usize| format!("pci0000:80/0000:8{switch}:01.0/0000:8{switch}:0{port}.0/0000:9{switch}:0{port}.0");
            for port in 0..2 {
                device(&at(port), GPU.0, GPU.1, "0x030200");
                nic(&format!("eth{}", 1 + 2 * switch + port), &at(port + 2));
            }
        }
        fs::create_dir_all(root.join("sys/class/net/lo")).expect("folder");
    }

    #[test]
    fn what_is_missing_is_said_before_the_plugin_ends_the_process() {
        let root = std::env::temp_dir().join(format!("uccl-tcpxo-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        machine(&root);
        // Functions, and not closures: they have the variables of this test alone.
        fn variable(name: &str) -> Option<String> {
            let folder = std::env::temp_dir().join(format!("uccl-tcpxo-{}/run", std::process::id()));
            (name == FOLDER).then(|| folder.display().to_string())
        }
        fn all() -> Vec<String> {
            ["lo", "eth0", "eth1", "eth2", "eth3", "eth4"].map(str::to_owned).into()
        }
        let full = Machine { root: root.clone(), variable, interfaces: all };
        let with = |variable: fn(&str) -> Option<String>, interfaces: fn() -> Vec<String>| Machine {
            root: root.clone(),
            variable,
            interfaces,
        };
        let error = |machine: Machine, gpu: Option<&str>| machine.check(gpu).expect_err("missing").to_string();
        fs::create_dir_all(root.join("run")).expect("folder");
        assert!(error(with(variable, all), Some("0000:90:00.0")).contains("receive manager of GPUDirect-TCPXO does not answer"));
        assert!(!full.has_manager());
        let _manager = UnixListener::bind(root.join("run").join(SOCKET)).expect("socket");
        assert!(full.has_manager());
        for gpu in ["0000:90:00.0", "0000:90:01.0", "0000:91:00.0", "0000:91:01.0"] {
            assert_eq!(full.check(Some(gpu)), Ok(()), "{gpu}");
        }
        assert!(error(with(variable, all), None).contains("needs a GPU"));
        assert!(error(with(variable, all), Some("0000:00:05.0"))
            .contains("does not know GPU 0000:00:05.0 (PCI device 0x1ae0:0x0084)"));
        assert!(error(with(variable, || vec!["eth1".into()]), Some("0000:90:00.0")).contains("eth0, is not there"));
        // The second GPU of a switch has its second NIC.
        let without = || ["eth0", "eth1", "eth3", "eth4"].map(str::to_owned).into();
        assert_eq!(with(variable, without).check(Some("0000:90:00.0")), Ok(()));
        assert!(
            error(with(variable, without), Some("0000:90:01.0")).contains("cannot use eth2, the data NIC of GPU 0000:90:01.0")
        );
        let named = |name: &str| if name == "NCCL_FASTRAK_IFNAME" { Some("eth1,eth3".into()) } else { variable(name) };
        assert!(error(with(named, all), Some("0000:91:01.0")).contains("cannot use eth4"));
        let subset = |name: &str| if name == "NCCL_FASTRAK_ALLOW_NIC_SUBSET" { Some("1".into()) } else { variable(name) };
        assert_eq!(with(subset, without).check(Some("0000:90:01.0")), Ok(()));
        let off = |name: &str| if name == "NCCL_FASTRAK_ENABLE" { Some("0".into()) } else { variable(name) };
        assert!(error(with(off, all), Some("0000:90:00.0")).contains("turns GPUDirect-TCPXO off"));
        let _ = fs::remove_dir_all(&root);
    }
}
