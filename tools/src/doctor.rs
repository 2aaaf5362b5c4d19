//! tcpx-info --doctor: checks every precondition of GPUDirect-TCPX in order, and says how to fix each that is missing. Reads
//! files and variables, and connects to the receive manager's sockets; moves no data. `tcpxo` does so for GPUDirect-TCPXO.

pub mod device_memory;
mod host;
mod one_host;
mod powers;
pub mod tcpxo;

use host::{advice, missing, ok};
pub use host::{Check, Host, Status};
use std::os::unix::net::UnixStream;

/// Official values.
const CHUNK: &str = "524288";
const MANAGER: &str = "/run/tcpx";
/// The plugin's default directory of the manager's sockets.
const PLUGINS_MANAGER: &str = "/tmp";
/// Longest directory name of the manager's sockets: the plugin copies their paths unchecked into 108 bytes.
const LONGEST_FOLDER: usize = 76;
/// Limits of the plugin: data sockets of a comm, and processor ranges of a NIC.
const MAX_SOCKETS: i64 = 8;
const MAX_RANGES: usize = 8;
/// Option memory of a socket, to which zero-copy sends are charged.
const OPTMEM: u64 = 128 << 10;
const STEERING_US: u64 = 50_000;
/// Smallest MTU and socket buffers that suit a data NIC.
const MTU: u64 = 8000;
const BUFFER: u64 = 16 << 20;

/// Checks every precondition, in order of dependence.
pub fn examine(host: &Host) -> Vec<Check> {
    let mut all = vec![plugin(host), chunk_size(host)];
    all.extend(settings(host));
    all.extend(stray_settings(host));
    all.push(sockets(host));
    all.push(manager(host));
    all.push(pairing(host));
    all.extend(flow_steering(host));
    all.push(dma_buf(host));
    all.extend(network(host));
    all.extend(one_host::checks(host));
    all
}

fn plugin(host: &Host) -> Check {
    const NAME: &str = "plugin";
    match &host.plugin {
        Ok((name, Some(file))) if name.to_ascii_lowercase().contains("tcpx") => ok(NAME, format!("{name} from {file}")),
        Ok((name, file)) => missing(
            NAME,
            format!("an engine uses {name} ({})", file.as_deref().unwrap_or("built in")),
            "install libnccl-net.so in /usr/local/nvidia/lib64, /usr/local/tcpx/lib64 or /var/lib/tcpx/lib64 (Google's image \
             nccl-plugin-gpudirecttcpx-dev has it), or name its file in UCCL_TCPX_PLUGIN_PATH; UCCL_TCPX_PLUGIN=tcpx says why it cannot \
             be loaded",
        ),
        Err(e) => missing(NAME, format!("no engine starts: {e}"), "fix this first; the message names the variable or the file"),
    }
}

fn chunk_size(host: &Host) -> Check {
    const NAME: &str = "NCCL_DYNAMIC_CHUNK_SIZE";
    match host.var(NAME) {
        None => ok(NAME, format!("unset; the library sets {CHUNK} before it loads the plugin")),
        Some(value) => match host.number(NAME) {
            Some(Ok(0)) => ok(NAME, format!("0; the library sets {CHUNK} before it loads the plugin")),
            Some(Ok(524_288)) => ok(NAME, value),
            Some(Ok(4096..=524_288)) => advice(NAME, value, format!("the official value is {CHUNK}; smaller messages cost more")),
            Some(Ok(524_289..)) => {
                advice(NAME, value, format!("the official value is {CHUNK}; the library sends no larger messages"))
            }
            _ => missing(NAME, value, format!("set {CHUNK}, in digits: the plugin knows no suffixes")),
        },
    }
}

/// Settings with which the plugin does not start, crashes, or hangs.
fn stray_settings(host: &Host) -> Vec<Check> {
    type Harmful = (&'static str, fn(i64) -> bool, &'static str);
    let harmful: [Harmful; 5] = [
        ("NCCL_GPUDIRECTTCPX_SOCKET_ENABLE", |n| n == 0, "unset it: the plugin does not start with 0"),
        ("NCCL_GPUDIRECTTCPX_FLOW_STEERING_STRATEGY", |n| n >= 0 && n != 3, "unset it: the plugin has no other strategy than 3"),
        ("NCCL_USE_DMA_BUF", |n| n == 0, "unset it: the plugin registers no memory without DMA-BUF"),
        ("NCCL_INLINE_THRESHOLD", |n| n != 0, "unset it: the plugin would read GPU memory on the CPU"),
        ("NCCL_GPUDIRECTTCPX_RECV_SYNC", |n| n == 1, "unset it on both hosts: with differing values nothing arrives"),
    ];
    let found = |(name, bad, todo): &Harmful| match host.number(name) {
        Some(Ok(n)) if bad(n) => Some(missing(name, n.to_string(), *todo)),
        Some(Err(text)) => Some(missing(name, text, "a number is expected; unset it")),
        _ => None,
    };
    harmful.iter().filter_map(found).collect()
}

/// Sockets and threads of a comm: both hosts must use the same numbers.
fn sockets(host: &Host) -> Check {
    const NAME: &str = "NCCL_NSOCKS_PERTHREAD x NCCL_SOCKET_NTHREADS";
    let value = |name| host.number(name).map_or(Ok(1), |n| n.map_err(str::to_owned));
    let todo = "set NCCL_NSOCKS_PERTHREAD=2 and NCCL_SOCKET_NTHREADS=1, on both hosts alike";
    match (value("NCCL_NSOCKS_PERTHREAD"), value("NCCL_SOCKET_NTHREADS")) {
        (Ok(sockets), Ok(threads)) if sockets >= 1 && threads >= 1 && sockets.saturating_mul(threads) <= MAX_SOCKETS => {
            let found = format!("{sockets} x {threads}");
            if (sockets, threads) == (1, 1) {
                return advice(NAME, found, format!("{todo}: one flow per NIC is slower than two"));
            }
            ok(NAME, found)
        }
        (Ok(sockets), Ok(threads)) => missing(NAME, format!("{sockets} x {threads}: more than {MAX_SOCKETS}, or none"), todo),
        (Err(text), _) | (_, Err(text)) => missing(NAME, text, todo),
    }
}

fn settings(host: &Host) -> Vec<Check> {
    let mut all = Vec::new();
    const DATA: &str = "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME";
    let nics = host.data_nics();
    all.push(match host.var(DATA) {
        None => missing(DATA, "unset", "name the data NICs, such as eth1,eth2,eth3,eth4"),
        Some(list) if nics.is_empty() => {
            missing(DATA, format!("{list}: no NIC of this host"), format!("NICs here: {}", host.nics("^").join(", ")))
        }
        Some(list) => ok(DATA, format!("{list}: {}", nics.join(", "))),
    });
    const CONTROL: &str = "NCCL_GPUDIRECTTCPX_CTRL_DEV";
    all.push(match host.var(CONTROL) {
        None => missing(CONTROL, "unset", "name the control NIC, eth0 on A3"),
        // The plugin treats the value as a list of prefixes, as for the data NICs.
        Some(nic) if host.nics(nic).is_empty() => {
            missing(CONTROL, format!("{nic}: no NIC of this host"), "name the control NIC, eth0 on A3")
        }
        Some(nic) if host.nics(nic).iter().any(|control| nics.contains(control)) => {
            missing(CONTROL, format!("{nic} is a data NIC"), "the control NIC carries no data: use the first NIC, eth0 on A3")
        }
        Some(nic) => ok(CONTROL, nic),
    });
    for name in ["NCCL_GPUDIRECTTCPX_TX_BINDINGS", "NCCL_GPUDIRECTTCPX_RX_BINDINGS"] {
        all.push(match host.var(name) {
            None => advice(name, "unset", "bind each data NIC to processors of its NUMA node: eth1:8-21;eth2:22-35;..."),
            Some(value) => match bad_binding(value, &nics) {
                Some(part) => missing(
                    name,
                    format!("{value}: cannot parse '{part}'"),
                    "write NIC:FIRST-LAST,FIRST-LAST for each data NIC, separated by semicolons; a single processor is 8-8",
                ),
                None => ok(name, value),
            },
        });
    }
    all
}

/// The first part of NIC:CORES;NIC:CORES that is invalid.
fn bad_binding(value: &str, nics: &[String]) -> Option<String> {
    let number = |n: &str| n.parse::<u32>().ok();
    let range = |text: &str| text.split_once('-').is_some_and(|(a, b)| number(a).zip(number(b)).is_some_and(|(a, b)| a <= b));
    let cores = |text: &str| text.split(',').count() <= MAX_RANGES && text.split(',').all(range);
    let fine = |part: &&str| {
        part.split_once(':').is_some_and(|(nic, list)| (nics.is_empty() || nics.iter().any(|n| n == nic)) && cores(list))
    };
    value.split(';').map(str::trim).filter(|part| !part.is_empty()).find(|part| !fine(part)).map(str::to_owned)
}

/// The receive manager's sockets: two for each GPU, and two for flow rules. Each must accept a connection.
fn manager(host: &Host) -> Check {
    const NAME: &str = "receive manager";
    const PREFIX: &str = "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX";
    let folder = host.var(PREFIX).unwrap_or(PLUGINS_MANAGER).trim_end_matches('/');
    let start = "start Google's receive-datapath-manager (tcpgpudmarxd) on this host, and let this process see its folder (a volume in Kubernetes)";
    if folder.len() > LONGEST_FOLDER {
        return missing(
            NAME,
            format!("{PREFIX} has {} characters", folder.len()),
            format!("at most {LONGEST_FOLDER}; {MANAGER} is usual"),
        );
    }
    let of_gpus = |folder: &str| host.names(folder).into_iter().filter(|n| n.starts_with("get_gpu_fd_")).count();
    if of_gpus(folder) == 0 {
        let todo = match host.var(PREFIX) {
            None if of_gpus(MANAGER) > 0 => format!("set {PREFIX}={MANAGER}, where the manager's sockets are"),
            _ => format!("{start}; {PREFIX} names the folder"),
        };
        let unset = if host.var(PREFIX).is_none() { " (the plugin's default)" } else { "" };
        return missing(NAME, format!("no sockets get_gpu_fd_* in {folder}{unset}"), todo);
    }
    let gpus = host.gpus.iter().map(|gpu| gpu.to_lowercase());
    let mut expected: Vec<String> =
        gpus.flat_map(|gpu| [format!("get_gpu_fd_{gpu}"), format!("get_gpu_metadata_{gpu}")]).collect();
    expected.extend(["rx_rule_manager", "rx_rule_uninstall"].map(str::to_owned));
    if host.number("NCCL_GPUDIRECTTCPX_REPORT_LIFECYCLE") == Some(Ok(1)) {
        expected.push("rxdm_application_registry".to_owned());
    }
    let there = host.names(folder);
    let absent: Vec<&str> = expected.iter().map(String::as_str).filter(|name| !there.iter().any(|t| t == name)).collect();
    if !absent.is_empty() {
        return missing(
            NAME,
            format!("no sockets {} in {folder}", absent.join(", ")),
            "the manager must serve every GPU and the flow rules: check its --gpu_nic_preset, its version and its log",
        );
    }
    let silent: Vec<&str> =
        expected.iter().filter(|s| UnixStream::connect(host.path(folder).join(s)).is_err()).map(String::as_str).collect();
    if !silent.is_empty() {
        return missing(
            NAME,
            format!("no process answers at {} in {folder}", silent.join(", ")),
            format!("{start}; these sockets are stale, or belong to another user"),
        );
    }
    ok(NAME, format!("{} sockets in {folder} answer", expected.len()))
}

/// Which data NICs share a PCIe switch with each GPU.
fn pairing(host: &Host) -> Check {
    const NAME: &str = "NICs beside GPUs";
    if host.gpus.is_empty() {
        return missing(NAME, "no GPU", "load the NVIDIA driver, and give the container its GPUs");
    }
    let devices = host.data_nics();
    let virtual_ones: Vec<&str> =
        devices.iter().filter(|nic| !host.path("/sys/class/net").join(nic).join("device").exists()).map(String::as_str).collect();
    if !virtual_ones.is_empty() {
        return missing(
            NAME,
            format!("{} are not PCI devices", virtual_ones.join(", ")),
            "the plugin registers memory for the PCI device of a NIC: name gVNIC NICs in NCCL_GPUDIRECTTCPX_SOCKET_IFNAME",
        );
    }
    // The plugin knows NUMA nodes 0 and 1, and crashes at start if the cpulist of a NIC's node is missing.
    let node =
        |nic: &String| host.read(&format!("/sys/class/net/{nic}/device/numa_node")).map(|n| usize::from(!n.starts_with('0')));
    let lost = |n: &usize| !host.path(&format!("/sys/devices/system/node/node{n}/cpulist")).exists();
    if let Some(n) = devices.iter().filter_map(node).find(lost) {
        return missing(
            NAME,
            format!("a data NIC on NUMA node {n}, which this machine lacks"),
            "the plugin cannot start here: use an A3 machine",
        );
    }
    let nics: Vec<(String, Vec<String>)> = host
        .data_nics()
        .into_iter()
        .map(|nic| {
            let path = host.pci_path(&host.path("/sys/class/net").join(&nic).join("device"));
            (nic, path)
        })
        .collect();
    let shared = |a: &[String], b: &[String]| a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let (mut pairs, mut alone) = (Vec::new(), Vec::new());
    for gpu in &host.gpus {
        let path = host.pci_path(&host.path("/sys/bus/pci/devices").join(gpu.to_lowercase()));
        // Sharing only the root complex does not count.
        let near = nics.iter().map(|(nic, p)| (shared(&path, p), nic)).filter(|(depth, _)| *depth > 1).max();
        match near {
            Some((_, nic)) => pairs.push(format!("{gpu}: {nic}")),
            None => alone.push(gpu.clone()),
        }
    }
    if alone.is_empty() {
        return ok(NAME, pairs.join(", "));
    }
    missing(
        NAME,
        format!("no data NIC on the PCIe switch of {}", alone.join(", ")),
        "such a GPU uses ordinary TCP: check NCCL_GPUDIRECTTCPX_SOCKET_IFNAME, and that the machine is an A3 with all its data NICs",
    )
}

fn flow_steering(host: &Host) -> Vec<Check> {
    const WAIT: &str = "NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS";
    let wait = match host.var(WAIT).map(str::parse::<u64>) {
        None | Some(Ok(0)) => advice(WAIT, "unset or 0: each accept waits for 5 s", format!("set {STEERING_US}")),
        Some(Ok(us)) if us <= 1_000_000 => ok(WAIT, us.to_string()),
        Some(Ok(us)) => advice(WAIT, us.to_string(), format!("set {STEERING_US}: each accept of a channel waits this long")),
        Some(Err(_)) => missing(WAIT, host.var(WAIT).unwrap_or_default(), format!("set {STEERING_US}")),
    };
    const ACK: &str = "NCCL_GPUDIRECTTCPX_FORCE_ACK";
    let ack = match host.var(ACK) {
        None | Some("0") => ok(ACK, host.var(ACK).unwrap_or("unset")),
        Some(value) => advice(ACK, value, "set 0, the official value"),
    };
    vec![wait, ack]
}

fn dma_buf(host: &Host) -> Check {
    const NAME: &str = "DMA-BUF of the driver";
    const INTERNAL: &str = "/proc/driver/nvp2p_dma_buf";
    if host.number("NCCL_GPUDIRECTTCPX_REG_DMABUF_USE_INTERNAL_API").is_some_and(|n| n != Ok(0)) {
        return match host.path(INTERNAL).is_dir() {
            true => ok(NAME, format!("{INTERNAL}, as NCCL_GPUDIRECTTCPX_REG_DMABUF_USE_INTERNAL_API asks")),
            false => missing(NAME, format!("no {INTERNAL}"), "unset NCCL_GPUDIRECTTCPX_REG_DMABUF_USE_INTERNAL_API"),
        };
    }
    let Some(version) = host.read("/proc/driver/nvidia/version") else {
        return missing(NAME, "no NVIDIA driver", "install driver 535 or newer with the open kernel modules");
    };
    let number = version.split_whitespace().find_map(|w| w.split('.').next().filter(|_| w.contains('.'))?.parse::<u32>().ok());
    let open = version.contains("Open Kernel Module");
    match (number, open) {
        (Some(n), true) if n >= 515 => ok(NAME, format!("driver {n}, open kernel modules")),
        (Some(n), false) => missing(
            NAME,
            format!("driver {n}, proprietary kernel modules"),
            "DMA-BUF needs the open kernel modules (nvidia-open)",
        ),
        (n, _) => missing(
            NAME,
            format!("driver {}", n.map_or("of unknown version".to_owned(), |n| n.to_string())),
            "install driver 535 or newer with the open kernel modules",
        ),
    }
}

fn network(host: &Host) -> Vec<Check> {
    let number = |path: &str| host.read(path).and_then(|text| text.split_whitespace().last()?.parse::<u64>().ok());
    let small: Vec<String> = host
        .data_nics()
        .into_iter()
        .filter_map(|nic| Some((number(&format!("/sys/class/net/{nic}/mtu"))?, nic)))
        .filter(|(mtu, _)| *mtu < MTU)
        .map(|(mtu, nic)| format!("{nic}: {mtu}"))
        .collect();
    let mtu = match small.is_empty() {
        true => ok("MTU of the data NICs", "large enough"),
        false => advice(
            "MTU of the data NICs",
            small.join(", "),
            "set 8244 on both hosts (ip link set ethN mtu 8244) and on the VPC network",
        ),
    };
    let mut all = vec![mtu];
    const OPTIONS: &str = "net.core.optmem_max";
    all.push(match number("/proc/sys/net/core/optmem_max") {
        Some(n) if n >= OPTMEM => ok(OPTIONS, n.to_string()),
        Some(n) => advice(OPTIONS, n.to_string(), format!("sysctl -w {OPTIONS}={OPTMEM}: zero-copy sends are charged to it")),
        None => advice(OPTIONS, "unreadable", "check it outside of this container"),
    });
    for (name, path) in
        [("net.ipv4.tcp_rmem", "/proc/sys/net/ipv4/tcp_rmem"), ("net.ipv4.tcp_wmem", "/proc/sys/net/ipv4/tcp_wmem")]
    {
        all.push(match number(path) {
            Some(n) if n >= BUFFER => ok(name, format!("up to {n} bytes")),
            Some(n) => advice(name, format!("up to {n} bytes"), format!("sysctl -w {name}='4096 1048576 {}'", 4 * BUFFER)),
            None => advice(name, "unreadable", "check it outside of this container"),
        });
    }
    all
}

/// The checks as lines of text, in the order in which to fix them.
pub fn text(subject: Subject, checks: &[Check]) -> String {
    let mut out = String::new();
    for c in checks {
        let mark = match c.status {
            Status::Ok => "OK",
            Status::Advice => "better",
            Status::Missing => "MISSING",
        };
        out += &format!("{mark:<8} {}: {}\n", c.name, c.found);
        if !c.todo.is_empty() {
            out += &format!("{:<8} -> {}\n", "", c.todo);
        }
    }
    out += &format!("{}\n", conclusion(subject, checks).unwrap_or_else(|missing| missing));
    out
}

/// What to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Subject {
    /// GPUDirect-TCPX.
    Tcpx,
    /// GPUDirect-TCPXO.
    Tcpxo,
    /// Device memory TCP of Linux (experimental).
    Devmem,
}

impl Subject {
    fn title(self) -> &'static str {
        match self {
            Subject::Tcpx => "GPUDirect-TCPX",
            Subject::Tcpxo => "GPUDirect-TCPXO",
            Subject::Devmem => "device memory TCP",
        }
    }

    /// The word for the plugin that must carry all GPU memory where this is in order.
    pub fn carrier(self) -> Option<&'static str> {
        match self {
            Subject::Tcpx => Some("tcpx"),
            Subject::Tcpxo => Some("tcpxo"),
            Subject::Devmem => None,
        }
    }
}

/// All checks in a sentence, as an error if something is missing.
pub fn conclusion(subject: Subject, checks: &[Check]) -> Result<String, String> {
    let title = subject.title();
    let mut missing: Vec<&str> = Vec::new();
    for check in checks.iter().filter(|c| c.status == Status::Missing) {
        if !missing.contains(&check.name) {
            missing.push(check.name);
        }
    }
    match missing.is_empty() {
        true => Ok(format!("every precondition of {title} is met")),
        false => Err(format!("{title} cannot work here, missing: {}", missing.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::powers::Powers;
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    /// A simulated A3 host with 2 GPUs and 1 data NIC on their switch, and the listeners behind its sockets.
    struct Simulated {
        host: Host,
        sockets: Vec<UnixListener>,
    }

    fn simulated(name: &str) -> Simulated {
        let root = std::env::temp_dir().join(format!("tcpx-doctor-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let folder = |path: &str| fs::create_dir_all(root.join(path)).unwrap();
        let file = |path: &str, text: &str| {
            fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            fs::write(root.join(path), text).unwrap();
        };
        let switch = "sys/devices/pci0000:00/0000:00:01.0";
        for device in ["0000:04:00.0", "0000:05:00.0", "0000:06:00.0"] {
            folder(&format!("{switch}/{device}"));
        }
        folder("sys/bus/pci/devices");
        for gpu in ["0000:04:00.0", "0000:05:00.0"] {
            symlink(root.join(switch).join(gpu), root.join("sys/bus/pci/devices").join(gpu)).unwrap();
        }
        file("sys/class/net/eth0/mtu", "1460");
        file("sys/class/net/eth1/mtu", "8244");
        symlink(root.join(switch).join("0000:06:00.0"), root.join("sys/class/net/eth1/device")).unwrap();
        file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build");
        for name in ["tcp_rmem", "tcp_wmem"] {
            file(&format!("proc/sys/net/ipv4/{name}"), "4096\t1048576\t67108864");
        }
        folder("run/tcpx");
        file("proc/sys/net/core/optmem_max", "131072");
        let of_gpus =
            ["0000:05:00.0", "0000:04:00.0"].map(|gpu| [format!("get_gpu_metadata_{gpu}"), format!("get_gpu_fd_{gpu}")]);
        let names = ["rx_rule_manager", "rx_rule_uninstall"].map(str::to_owned).into_iter().chain(of_gpus.into_iter().flatten());
        let sockets = names.map(|name| UnixListener::bind(root.join("run/tcpx").join(name)).unwrap()).collect();
        let variables = [
            ("NCCL_DYNAMIC_CHUNK_SIZE", "524288"),
            ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "eth1"),
            ("NCCL_GPUDIRECTTCPX_CTRL_DEV", "eth0"),
            ("NCCL_GPUDIRECTTCPX_TX_BINDINGS", "eth1:8-21,112-125"),
            ("NCCL_GPUDIRECTTCPX_RX_BINDINGS", "eth1:8-21,112-125"),
            ("NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS", "50000"),
            ("NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX", "/run/tcpx"),
            ("NCCL_NSOCKS_PERTHREAD", "2"),
        ];
        let variables = variables.map(|(n, v)| (n.to_owned(), v.to_owned())).into_iter().collect();
        let plugin = Ok(("TCPX".to_owned(), Some("/usr/local/nvidia/lib64/libnccl-net-tcpx.so".to_owned())));
        let gpus = ["0000:04:00.0", "0000:05:00.0"].map(str::to_owned).to_vec();
        Simulated { host: Host { root, variables, plugin, gpus, powers: Powers::default() }, sockets }
    }

    fn failing(host: &Host) -> Vec<&'static str> {
        examine(host).into_iter().filter(|c| c.status != Status::Ok).map(|c| c.name).collect()
    }

    #[test]
    fn a_complete_host_passes() {
        let it = simulated("whole");
        assert_eq!(failing(&it.host), [""; 0], "{}", text(Subject::Tcpx, &examine(&it.host)));
        assert!(text(Subject::Tcpx, &examine(&it.host)).ends_with("every precondition of GPUDirect-TCPX is met\n"));
        fs::remove_dir_all(&it.host.root).unwrap();
    }

    /// Each precondition, when it alone is broken, is the only one reported, with a fix.
    #[test]
    fn each_missing_piece_is_reported() {
        type Break = fn(&mut Simulated);
        fn set(it: &mut Simulated, name: &str, value: &str) {
            it.host.variables.insert(name.to_owned(), value.to_owned());
        }
        let cases: [(&str, Break); 30] = [
            ("plugin", |it| it.host.plugin = Ok(("TCPX-soft".into(), None))),
            ("plugin", |it| it.host.plugin = Err("cannot load".into())),
            ("NCCL_DYNAMIC_CHUNK_SIZE", |it| set(it, "NCCL_DYNAMIC_CHUNK_SIZE", "1M")),
            ("NCCL_DYNAMIC_CHUNK_SIZE", |it| set(it, "NCCL_DYNAMIC_CHUNK_SIZE", "131072")),
            ("NCCL_DYNAMIC_CHUNK_SIZE", |it| set(it, "NCCL_DYNAMIC_CHUNK_SIZE", "0x100000")),
            ("NCCL_GPUDIRECTTCPX_SOCKET_ENABLE", |it| set(it, "NCCL_GPUDIRECTTCPX_SOCKET_ENABLE", "0")),
            ("NCCL_GPUDIRECTTCPX_FLOW_STEERING_STRATEGY", |it| set(it, "NCCL_GPUDIRECTTCPX_FLOW_STEERING_STRATEGY", "1")),
            ("NCCL_USE_DMA_BUF", |it| set(it, "NCCL_USE_DMA_BUF", "0")),
            ("NCCL_INLINE_THRESHOLD", |it| set(it, "NCCL_INLINE_THRESHOLD", "1024")),
            ("NCCL_GPUDIRECTTCPX_RECV_SYNC", |it| set(it, "NCCL_GPUDIRECTTCPX_RECV_SYNC", "1")),
            ("NCCL_NSOCKS_PERTHREAD x NCCL_SOCKET_NTHREADS", |it| set(it, "NCCL_SOCKET_NTHREADS", "6")),
            ("NCCL_NSOCKS_PERTHREAD x NCCL_SOCKET_NTHREADS", |it| drop(it.host.variables.remove("NCCL_NSOCKS_PERTHREAD"))),
            ("NCCL_GPUDIRECTTCPX_TX_BINDINGS", |it| set(it, "NCCL_GPUDIRECTTCPX_TX_BINDINGS", "eth1:8")),
            ("receive manager", |it| drop(it.host.variables.remove("NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX"))),
            ("receive manager", |it| set(it, "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX", &format!("/{}", "x".repeat(100)))),
            ("receive manager", |it| fs::remove_file(it.host.root.join("run/tcpx/rx_rule_manager")).unwrap()),
            ("receive manager", |it| set(it, "NCCL_GPUDIRECTTCPX_REPORT_LIFECYCLE", "1")),
            ("NICs beside GPUs", |it| fs::remove_file(it.host.root.join("sys/class/net/eth1/device")).unwrap()),
            ("NICs beside GPUs", |it| fs::write(it.host.root.join("sys/class/net/eth1/device/numa_node"), "-1").unwrap()),
            ("net.core.optmem_max", |it| fs::write(it.host.root.join("proc/sys/net/core/optmem_max"), "20480").unwrap()),
            ("NCCL_GPUDIRECTTCPX_CTRL_DEV", |it| set(it, "NCCL_GPUDIRECTTCPX_CTRL_DEV", "eth9")),
            ("NCCL_GPUDIRECTTCPX_CTRL_DEV", |it| set(it, "NCCL_GPUDIRECTTCPX_CTRL_DEV", "eth1")),
            ("NCCL_GPUDIRECTTCPX_TX_BINDINGS", |it| set(it, "NCCL_GPUDIRECTTCPX_TX_BINDINGS", "eth2:1-2")),
            ("receive manager", |it| drop(it.sockets.pop())),
            ("receive manager", |it| fs::remove_file(it.host.root.join("run/tcpx/get_gpu_metadata_0000:05:00.0")).unwrap()),
            ("receive manager", |it| set(it, "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX", "/run/elsewhere")),
            ("NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS", |it| {
                it.host.variables.remove("NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS");
            }),
            ("DMA-BUF of the driver", |it| {
                let file = it.host.root.join("proc/driver/nvidia/version");
                fs::write(file, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01").unwrap();
            }),
            ("MTU of the data NICs", |it| fs::write(it.host.root.join("sys/class/net/eth1/mtu"), "1500").unwrap()),
            ("net.ipv4.tcp_rmem", |it| {
                fs::write(it.host.root.join("proc/sys/net/ipv4/tcp_rmem"), "4096 131072 6291456").unwrap()
            }),
        ];
        for (i, (name, break_it)) in cases.into_iter().enumerate() {
            let mut it = simulated(&i.to_string());
            break_it(&mut it);
            let checks = examine(&it.host);
            let wrong: Vec<&Check> = checks.iter().filter(|c| c.status != Status::Ok).collect();
            assert!(
                wrong.len() == 1 && wrong[0].name == name && !wrong[0].todo.is_empty(),
                "{name}: {}",
                text(Subject::Tcpx, &checks)
            );
            fs::remove_dir_all(&it.host.root).unwrap();
        }
    }

    #[test]
    fn a_gpu_without_a_nic_on_its_switch_is_reported() {
        let mut it = simulated("far");
        it.host.gpus.push("0000:84:00.0".into());
        let checks = examine(&it.host);
        let pairing = checks.iter().find(|c| c.name == "NICs beside GPUs").unwrap();
        assert!(pairing.status == Status::Missing && pairing.found.contains("0000:84:00.0"), "{pairing:?}");
        fs::remove_dir_all(&it.host.root).unwrap();
    }
}
