//! What tcpx-info finds without moving data: GPUs, congestion control, the environment. Does not use an engine.

use serde::Serialize;
use std::fs;
use std::path::Path;

/// A GPU as the NVIDIA driver reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// PCI address, if the driver reports it.
    pub pci: Option<String>,
    /// Model, or the device file.
    pub name: String,
}

/// The GPUs of this host, from /proc/driver/nvidia/gpus or else from the device files; there may be none.
pub fn gpus() -> Vec<Gpu> {
    let mut gpus = gpus_of_driver(Path::new("/proc/driver/nvidia/gpus"));
    if gpus.is_empty() {
        gpus = gpus_of_device_files(Path::new("/dev"));
    }
    gpus
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn gpus_of_driver(folder: &Path) -> Vec<Gpu> {
    let gpu = |pci: String| {
        let text = fs::read_to_string(folder.join(&pci).join("information")).unwrap_or_default();
        let model = text.lines().find_map(|line| line.strip_prefix("Model:")).map(|model| model.trim().to_string());
        Gpu { pci: Some(pci), name: model.unwrap_or_else(|| "NVIDIA GPU".to_string()) }
    };
    names_in(folder).into_iter().map(gpu).collect()
}

fn gpus_of_device_files(folder: &Path) -> Vec<Gpu> {
    let is_gpu =
        |name: &String| name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    names_in(folder)
        .into_iter()
        .filter(is_gpu)
        .map(|name| Gpu { pci: None, name: format!("{}/{name}", folder.display()) })
        .collect()
}

/// TCP congestion control of this host's network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Congestion {
    /// The default of new sockets.
    pub default: String,
    /// What a socket may choose.
    pub available: Vec<String>,
}

/// Reads the congestion control; none where the system does not report it.
pub fn congestion() -> Option<Congestion> {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok();
    let default = read("tcp_congestion_control")?.trim().to_string();
    let available = read("tcp_available_congestion_control").unwrap_or_default().split_whitespace().map(str::to_string).collect();
    Some(Congestion { default, available })
}

/// A variable of the environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Variable {
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
}

/// Variables that are set but not in `known`, in three groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Environment {
    /// `NCCL_*`, `CUDA_*` and the like: passed to the plugin and the driver.
    pub passed_through: Vec<Variable>,
    /// `UCCL_TCPX_SOFT_*`: read by the software plugin.
    pub soft_plugin: Vec<Variable>,
    /// Other `UCCL_*`: unknown, perhaps misspelt.
    pub unknown: Vec<Variable>,
}

/// Where GPUDirect-TCPXO looks for the sockets of its receive manager.
const TCPXO_FOLDER: &str = "FILE_BASED_UDS_PATH_PREFIX";

/// Sorts `variables` into groups.
pub fn environment(variables: impl Iterator<Item = (String, String)>, known: &[&str]) -> Environment {
    let mut groups = Environment::default();
    let mut variables: Vec<(String, String)> = variables.filter(|(name, _)| !known.contains(&name.as_str())).collect();
    variables.sort();
    for (name, value) in variables {
        let group = match &name {
            n if n.starts_with("NCCL_") || n.starts_with("CUDA_") || n == TCPXO_FOLDER => &mut groups.passed_through,
            n if n.starts_with("UCCL_TCPX_SOFT_") => &mut groups.soft_plugin,
            n if n.starts_with("UCCL_") => &mut groups.unknown,
            _ => continue,
        };
        group.push(Variable { name, value });
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_sorted_into_groups() {
        let set = [
            "NCCL_SOCKET_IFNAME",
            "NCCL_FASTRAK_IFNAME",
            TCPXO_FOLDER,
            "UCCL_TCPX_SOFT_THREADS",
            "UCCL_TCPX_NUM_CHANELS",
            "UCCL_TCPX_PLUGIN",
            "HOME",
        ];
        let groups = environment(set.iter().map(|n| (n.to_string(), "x".to_string())), &["UCCL_TCPX_PLUGIN"]);
        let names = |group: &[Variable]| group.iter().map(|v| v.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&groups.passed_through), [TCPXO_FOLDER, "NCCL_FASTRAK_IFNAME", "NCCL_SOCKET_IFNAME"]);
        assert_eq!(names(&groups.soft_plugin), ["UCCL_TCPX_SOFT_THREADS"]);
        assert_eq!(names(&groups.unknown), ["UCCL_TCPX_NUM_CHANELS"]);
    }

    #[test]
    fn gpus_are_found_by_driver_or_device_file() {
        let root = std::env::temp_dir().join(format!("tcpx-info-test-{}", std::process::id()));
        let gpu = root.join("gpus/0000:4a:00.0");
        fs::create_dir_all(&gpu).unwrap();
        fs::write(gpu.join("information"), "Model: \t\t NVIDIA X100\nIRQ: 1\n").unwrap();
        for name in ["nvidia0", "nvidiactl", "nvidia-uvm", "null"] {
            fs::write(root.join(name), "").unwrap();
        }
        assert_eq!(gpus_of_driver(&root.join("gpus")), [Gpu { pci: Some("0000:4a:00.0".into()), name: "NVIDIA X100".into() }]);
        let files = gpus_of_device_files(&root);
        assert_eq!(files.len(), 1);
        assert!(files[0].name.ends_with("/nvidia0"));
        assert!(gpus_of_driver(&root.join("missing")).is_empty());
        fs::remove_dir_all(&root).unwrap();
    }
}
