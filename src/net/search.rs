//! Where Google's plugins may be installed, in search order, and signs that a host is prepared for TCPX. Reads files only.

use super::traits::{is_tcpx, is_tcpxo};
use std::path::{Path, PathBuf};

/// A plugin of Google's.
pub(super) struct Kind {
    /// The value of UCCL_TCPX_PLUGIN that asks for it, and its name.
    pub word: &'static str,
    pub title: &'static str,
    /// Where Google's installers and container images put it.
    pub dirs: &'static [&'static str],
    /// Names of its file, the unambiguous one first.
    pub files: &'static [&'static str],
    /// Variables that name its interfaces.
    pub interfaces: &'static str,
    /// Whether a table's name is its own.
    pub is: fn(&str) -> bool,
}

pub(super) const TCPX: Kind = Kind {
    word: "tcpx",
    title: "GPUDirect-TCPX",
    dirs: &["/usr/local/nvidia/lib64", "/usr/local/tcpx/lib64", "/var/lib/tcpx/lib64"],
    files: &["libnccl-net-tcpx.so", "libnccl-net.so"],
    interfaces: "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
    is: is_tcpx,
};

pub(super) const TCPXO: Kind = Kind {
    word: "tcpxo",
    title: "GPUDirect-TCPXO",
    dirs: &["/usr/local/nvidia/lib64", "/usr/local/tcpxo/lib64", "/var/lib/tcpxo/lib64", "/var/lib/fastrak/lib64", "/plugins"],
    // The installer puts its configuration checker in the place of libnccl-net.so.
    files: &["libnccl-net_internal.so", "libnccl-net-tcpxo.so", "libnccl-net.so"],
    interfaces: "NCCL_FASTRAK_IFNAME",
    is: is_tcpxo,
};

impl Kind {
    /// Existing files that may be it.
    pub(super) fn candidates(&self, library_path: Option<&str>) -> Vec<PathBuf> {
        let dirs: Vec<&Path> = self.dirs.iter().map(Path::new).collect();
        candidates(&dirs, self.files, library_path)
    }
}

/// Existing files of these names in `dirs`, then in the folders of the colon-separated `library_path`.
fn candidates(dirs: &[&Path], files: &[&str], library_path: Option<&str>) -> Vec<PathBuf> {
    let more = library_path.unwrap_or_default().split(':').filter(|d| !d.is_empty()).map(Path::new);
    let mut found: Vec<PathBuf> = Vec::new();
    for dir in dirs.iter().copied().chain(more) {
        for file in files.iter().map(|f| dir.join(f)) {
            // A file under two names is tried once.
            let same = |other: &PathBuf| other == &file || (other.canonicalize().ok() == file.canonicalize().ok());
            if file.exists() && !found.iter().any(same) {
                found.push(file);
            }
        }
    }
    found
}

/// Signs that a host is prepared for TCPX: NICs of Google's gVNIC driver besides the first, and sockets of the receive manager.
/// `root` is the root of the file system, `managers` the folders in which the manager's sockets may be.
pub(super) fn signs(root: &Path, managers: &[&str]) -> Vec<String> {
    let mut signs = Vec::new();
    let mut gvnics = names(&root.join("sys/class/net"));
    gvnics.retain(|nic| {
        let driver = std::fs::read_link(root.join("sys/class/net").join(nic).join("device/driver"));
        driver.is_ok_and(|d| d.file_name().is_some_and(|n| n == "gve"))
    });
    // Every Google VM has one; more are data NICs.
    if gvnics.len() > 1 {
        signs.push(format!("gVNIC data NICs ({})", gvnics.join(", ")));
    }
    let there = |manager: &str| names(&root.join(manager.trim_start_matches('/'))).iter().any(|n| n.starts_with("get_gpu_fd_"));
    if let Some(manager) = managers.iter().find(|manager| there(manager)) {
        signs.push(format!("the receive manager's sockets in {manager}"));
    }
    signs
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    struct Scratch(PathBuf);
    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir = std::env::temp_dir().join(format!("uccl-net-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).expect("scratch folder");
            Scratch(dir)
        }
        fn file(&self, path: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().expect("parent")).expect("folder");
            fs::write(path, "").expect("file");
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn every_place_and_name_is_looked_at_in_order() {
        let s = Scratch::new("search");
        for file in ["b/libnccl-net.so", "a/libnccl-net-tcpx.so", "c/libnccl-net.so", "a/other.so"] {
            s.file(file);
        }
        std::os::unix::fs::symlink(s.0.join("c/libnccl-net.so"), s.0.join("c/libnccl-net-tcpx.so")).expect("link");
        let [a, b, c, none] = ["a", "b", "c", "none"].map(|d| s.0.join(d));
        let path = format!("::{}:{}", c.display(), none.display());
        let found = candidates(&[&none, &b, &a], TCPX.files, Some(&path));
        assert_eq!(found, [b.join("libnccl-net.so"), a.join("libnccl-net-tcpx.so"), c.join("libnccl-net-tcpx.so")]);
        assert!(candidates(&[&none], TCPX.files, None).is_empty());
    }

    #[test]
    fn a_host_shows_signs_of_tcpx() {
        let s = Scratch::new("signs");
        let nic = |name: &str, driver: &str| {
            s.file(&format!("sys/class/net/{name}/device/uevent"));
            let link = s.0.join(format!("sys/class/net/{name}/device/driver"));
            std::os::unix::fs::symlink(format!("/sys/bus/pci/drivers/{driver}"), link).expect("link");
        };
        nic("eth0", "gve");
        nic("eno1", "igb");
        assert!(signs(&s.0, &["/run/tcpx"]).is_empty(), "one gVNIC is any VM of Google's");
        nic("eth1", "gve");
        assert_eq!(signs(&s.0, &["/run/tcpx"]), ["gVNIC data NICs (eth0, eth1)"]);
        s.file("run/tcpx/get_gpu_fd_0000:04:00.0");
        assert_eq!(signs(&s.0, &["/tmp"]).len(), 1);
        assert_eq!(signs(&s.0, &["/tmp", "/run/tcpx"])[1], "the receive manager's sockets in /run/tcpx");
    }
}
