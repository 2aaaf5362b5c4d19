//! What processes on one host can share: containers and pods of one node. Data moves without any of it, so nothing is ever missing here.

use super::host::{advice, ok, Check, Host};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// Inode of the first PID namespace of a kernel.
const FIRST_PIDS: &str = "pid:[4026531836]";

pub(super) fn checks(host: &Host) -> Vec<Check> {
    vec![host_memory(host), directory(host), fabric(host)]
}

/// Whether one copy is possible between processes, or two through shared areas.
fn host_memory(host: &Host) -> Check {
    const NAME: &str = "host memory on one host";
    const STAGED: &str = "host memory is staged in shared areas: two copies instead of one";
    let scope = host.read("/proc/sys/kernel/yama/ptrace_scope").filter(|scope| scope != "0");
    let pids = fs::read_link(host.path("/proc/self/ns/pid")).ok().filter(|link| link.as_os_str() != FIRST_PIDS);
    match (&host.powers.refused, scope, pids) {
        (Some(why), ..) => advice(
            NAME,
            format!("process_vm_readv: {why}; {STAGED}"),
            "permit process_vm_readv in the container's seccomp profile",
        ),
        (None, Some(scope), _) => advice(
            NAME,
            format!("ptrace_scope is {scope}; {STAGED}"),
            "sysctl kernel.yama.ptrace_scope=0, or give the processes CAP_SYS_PTRACE",
        ),
        (None, None, Some(_)) => ok(
            NAME,
            format!("process_vm_readv works between processes of this PID namespace; with those of other containers {STAGED}"),
        ),
        (None, None, None) => ok(NAME, "process_vm_readv works between processes of one user"),
    }
}

/// How processes of separate network namespaces meet.
fn directory(host: &Host) -> Check {
    const NAME: &str = "UCCL_TCPX_LOCAL_DIR";
    const TODO: &str =
        "name a volume that both containers mount, such as an emptyDir or a hostPath, and that only their user may write";
    let Some(path) = host.var(NAME) else {
        return ok(NAME, "unset; containers without a common network namespace meet over TCP alone");
    };
    let found = match fs::metadata(host.path(path)) {
        Err(e) => return advice(NAME, format!("{path}: {e}"), TODO),
        Ok(found) if !found.is_dir() => return advice(NAME, format!("{path} is no directory"), TODO),
        Ok(found) => found,
    };
    if found.permissions().mode() & 0o022 != 0 {
        return advice(NAME, format!("{path}: other users may write there (mode {:o})", found.mode() & 0o7777), TODO);
    }
    ok(NAME, path)
}

/// Handles of type FABRIC would carry GPU memory between pods that do not see each other's GPUs. The library has no use for them yet.
fn fabric(host: &Host) -> Check {
    const NAME: &str = "GPU memory between pods";
    const CHANNELS: &str = "/dev/nvidia-caps-imex-channels";
    let imex = match host.names(CHANNELS).len() {
        0 => format!("no IMEX channel ({CHANNELS})"),
        n => format!("{n} IMEX channels in {CHANNELS}"),
    };
    let handles = match host.powers.fabric {
        None => "no CUDA driver".to_owned(),
        Some((all, with)) => format!("{with} of {all} GPUs have handles of type FABRIC"),
    };
    ok(NAME, format!("{handles}; {imex}; the library shares GPU memory where a process sees both GPUs"))
}

#[cfg(test)]
mod tests {
    use super::super::host::Status;
    use super::super::powers::Powers;
    use super::*;
    use std::collections::BTreeMap;

    fn host(name: &str) -> Host {
        let root = std::env::temp_dir().join(format!("tcpx-doctor-one-host-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        Host { root, variables: BTreeMap::new(), plugin: Err(String::new()), gpus: Vec::new(), powers: Powers::default() }
    }

    fn file(host: &Host, path: &str, text: &str) {
        fs::create_dir_all(host.path(path).parent().unwrap()).unwrap();
        fs::write(host.path(path), text).unwrap();
    }

    #[test]
    fn what_keeps_processes_apart_is_said() {
        let mut it = host("memory");
        assert!(host_memory(&it).found.contains("between processes of one user"));
        fs::create_dir_all(it.path("/proc/self/ns")).unwrap();
        std::os::unix::fs::symlink("pid:[4026532999]", it.path("/proc/self/ns/pid")).unwrap();
        let own = host_memory(&it);
        assert!(own.status == Status::Ok && own.found.contains("with those of other containers"), "{own:?}");
        file(&it, "/proc/sys/kernel/yama/ptrace_scope", "1\n");
        let scope = host_memory(&it);
        assert!(scope.status == Status::Advice && scope.found.contains("ptrace_scope is 1"), "{scope:?}");
        it.powers.refused = Some("Operation not permitted".to_owned());
        assert!(host_memory(&it).todo.contains("seccomp"));
        fs::remove_dir_all(&it.root).unwrap();
    }

    #[test]
    fn directories_that_do_not_serve_are_found_out() {
        let mut it = host("directory");
        assert_eq!(directory(&it).status, Status::Ok);
        it.variables.insert("UCCL_TCPX_LOCAL_DIR".to_owned(), "/shared".to_owned());
        assert!(directory(&it).found.contains("No such file"));
        file(&it, "/shared", "");
        assert!(directory(&it).found.contains("no directory"));
        fs::remove_file(it.path("/shared")).unwrap();
        fs::create_dir(it.path("/shared")).unwrap();
        for (mode, status) in [(0o777, Status::Advice), (0o700, Status::Ok)] {
            fs::set_permissions(it.path("/shared"), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(directory(&it).status, status);
        }
        fs::remove_dir_all(&it.root).unwrap();
    }

    #[test]
    fn channels_of_imex_are_counted() {
        let mut it = host("imex");
        assert!(fabric(&it).found.starts_with("no CUDA driver; no IMEX channel"));
        file(&it, "/dev/nvidia-caps-imex-channels/channel0", "");
        it.powers.fabric = Some((8, 8));
        assert!(fabric(&it).found.starts_with("8 of 8 GPUs have handles of type FABRIC; 1 IMEX channels in"));
        fs::remove_dir_all(&it.root).unwrap();
    }

    #[test]
    fn this_process_may_read_itself_unless_a_profile_forbids_it() {
        let powers = Powers::of_this_process();
        assert!(powers.refused.is_none_or(|why| why.contains("not permitted") || why.contains("not implemented")));
    }
}
