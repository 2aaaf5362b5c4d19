//! Checks the receive manager of GPUDirect-TCPX. At the first accept for a GPU the plugin asks it for the GPU's receive memory,
//! and ends the process if there is no answer. Knows nothing of the answer.

use crate::status::{bail, Result};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::path::{Path, PathBuf};

/// The variable that names the folder of its sockets, and its default in the plugin.
const FOLDER: (&str, &str) = ("NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX", "/tmp");
/// Its socket for flow rules. The plugin asks there first, and fails cleanly if it does not exist.
const RULES: &str = "rx_rule_manager";
/// Prefixes of its sockets for a GPU, before the GPU's PCI address.
const OF_GPU: [&str; 2] = ["get_gpu_fd_", "get_gpu_metadata_"];

/// Checks that it serves the receive memory of a GPU, by PCI address; of any GPU if the address is unknown.
///
/// # Errors
/// What is missing. The plugin must not accept then.
pub(super) fn serves(gpu: Option<&str>) -> Result<()> {
    let folder = std::env::var_os(FOLDER.0).map_or(PathBuf::from(FOLDER.1), PathBuf::from);
    serves_from(&folder, gpu)
}

fn serves_from(folder: &Path, gpu: Option<&str>) -> Result<()> {
    if !folder.join(RULES).exists() {
        return Ok(());
    }
    let first = || {
        let entries = std::fs::read_dir(folder).ok()?;
        entries.flatten().find_map(|e| Some(e.file_name().to_str()?.strip_prefix(OF_GPU[0])?.to_owned()))
    };
    let Some(gpu) = gpu.map(str::to_ascii_lowercase).or_else(first) else {
        bail!(Plugin, "the receive manager in {} serves no GPU: there is no {}* (see docs/tcpx.md)", folder.display(), OF_GPU[0])
    };
    for name in OF_GPU {
        let path = folder.join(format!("{name}{gpu}"));
        if let Err(e) = SockAddr::unix(&path).and_then(|address| knock(&address)) {
            bail!(Plugin, "the receive manager does not serve GPU {gpu}: {}: {e} (see docs/tcpx.md)", path.display());
        }
    }
    Ok(())
}

/// Connects to a socket without waiting, and closes it.
pub(super) fn knock(address: &SockAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    match socket.connect(address) {
        // The backlog is full, so a process listens.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_manager_without_a_gpus_sockets_differs_from_none() {
        let folder = std::env::temp_dir().join(format!("uccl-manager-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("folder");
        let gpu = Some("0000:0A:00.0");
        assert_eq!(serves_from(&folder, gpu), Ok(()), "no manager: the plugin says so by itself");
        let serve = |name: &str| UnixListener::bind(folder.join(name)).expect("socket");
        let _rules = serve(RULES);
        let missing = |gpu, word: &str| {
            let error = serves_from(&folder, gpu).expect_err("missing").to_string();
            assert!(error.contains(word), "{error}");
        };
        missing(None, "serves no GPU");
        missing(gpu, "get_gpu_fd_0000:0a:00.0");
        let _fd = serve("get_gpu_fd_0000:0a:00.0");
        missing(gpu, "get_gpu_metadata_0000:0a:00.0");
        let metadata = serve("get_gpu_metadata_0000:0a:00.0");
        assert_eq!((serves_from(&folder, gpu), serves_from(&folder, None)), (Ok(()), Ok(())));
        // The file exists, but no process listens.
        drop(metadata);
        missing(gpu, "refused");
        let _ = std::fs::remove_dir_all(&folder);
    }
}
