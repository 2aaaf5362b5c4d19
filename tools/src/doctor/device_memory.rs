//! tcpx-info --doctor devmem: what device memory TCP needs of a host, and a trial of it. The trial binds a queue of each NIC for a moment and moves
//! no data.

use super::host::{advice, missing, ok, Check, Status};
use devmem::{Nic, Rings};
use std::path::Path;
use uccl_p2p::config::{Config, DeviceMemoryTcp, PluginChoice};
use uccl_p2p::engine::{try_device_memory_export, Engine};
use uccl_p2p::net::plugin::device_memory_agent;

/// Kernels with both directions.
const KERNEL: (u32, u32) = (6, 16);
/// Drivers that are known to have both directions.
const DRIVERS: [&str; 5] = ["gve", "bnxt_en", "mlx5_core", "fbnic", "uccl_vmnic"];
/// What a receive buffer of a payload connection asks for.
const RECEIVE_BUFFER: u64 = 1 << 20;
/// Payload of an MTU below this leaves much of each page unused.
const MTU: u64 = 4096;
const CAP_NET_ADMIN: u64 = 1 << 12;

/// A NIC, as its driver and the kernel describe it.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Its driver.
    pub driver: Option<String>,
    /// Its receive rings.
    pub rings: Result<Rings, String>,
    /// Queues that no ordinary connection uses.
    pub spare_queues: Result<Vec<u32>, String>,
    /// Steering rules, and for how many there is room.
    pub rules: Result<(u32, u32), String>,
    /// Its MTU.
    pub mtu: Option<u64>,
    /// The kind of its IOMMU group, if it is in one.
    pub iommu: Option<String>,
}

/// What was found on a host.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its release.
    pub kernel: String,
    /// This process may bind queues and steer.
    pub privileged: bool,
    /// The agent's socket.
    pub agent: Option<String>,
    /// The largest receive buffer.
    pub receive_limit: Option<u64>,
    /// NICs with hardware queues.
    pub nics: Vec<Facts>,
    /// GPU memory can be exported as a dma-buf, or why not; `None`: not tried.
    pub export: Option<Result<(), String>>,
    /// The NICs that an engine uses, or why it uses none; `None`: not tried.
    pub trial: Option<Result<Vec<String>, String>>,
}

/// Looks at this host, and tries an engine.
pub fn find() -> Found {
    let export = Config::from_env().and_then(|config| try_device_memory_export(&config)).map_err(|e| e.to_string());
    Found { export: Some(export), trial: Some(trial()), ..look() }
}

/// Looks at this host. Binds no queue: a running engine keeps what it has.
pub fn look() -> Found {
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let capabilities = read("/proc/self/status").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    });
    let mut nics: Vec<String> = std::fs::read_dir("/sys/class/net")
        .map(|all| all.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    // Others have no hardware queues.
    nics.retain(|nic| Path::new("/sys/class/net").join(nic).join("device").exists());
    nics.sort();
    Found {
        kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
        privileged: capabilities.unwrap_or(0) & CAP_NET_ADMIN != 0,
        agent: device_memory_agent(),
        receive_limit: read("/proc/sys/net/core/rmem_max").and_then(|text| text.parse().ok()),
        nics: nics.into_iter().map(facts).collect(),
        export: None,
        trial: None,
    }
}

fn facts(name: String) -> Facts {
    let at = |path: &str| Path::new("/sys/class/net").join(&name).join(path);
    let link = |path| std::fs::read_link(at(path)).ok().and_then(|to| Some(to.file_name()?.to_string_lossy().into_owned()));
    let text = |path| std::fs::read_to_string(at(path)).ok().map(|text| text.trim().to_owned());
    let nic = Nic::named(&name).map_err(|e| e.to_string());
    let (driver, mtu, iommu) =
        (link("device/driver"), text("mtu").and_then(|mtu| mtu.parse().ok()), text("device/iommu_group/type"));
    Facts {
        driver,
        rings: nic.clone().and_then(|nic| nic.rings().map_err(|e| e.to_string())),
        spare_queues: nic.clone().and_then(|nic| nic.spare_queues().map_err(|e| e.to_string())),
        rules: nic.and_then(|nic| nic.rules().map_err(|e| e.to_string())),
        mtu,
        iommu,
        name,
    }
}

/// Starts an engine that must have device memory TCP.
fn trial() -> Result<Vec<String>, String> {
    let own = Config::from_env().map_err(|e| e.to_string())?;
    let own = Config {
        plugin: PluginChoice::Soft,
        plugin_path: None,
        devmem: DeviceMemoryTcp::Require,
        port: 0,
        metrics: None,
        require: Default::default(),
        ..own
    };
    let engine = Engine::new(own).map_err(|e| e.to_string())?;
    let nics = engine.plugin().devices.iter().map(|device| device.name.clone()).collect();
    engine.shutdown();
    Ok(nics)
}

/// Every precondition, in order of dependence; the trial last.
pub fn examine(found: &Found) -> Vec<Check> {
    let mut all = vec![kernel(&found.kernel), privileges(found)];
    if found.nics.is_empty() {
        all.push(missing("NIC", "no NIC with hardware queues", "let this process see the host's network namespace"));
    }
    for nic in &found.nics {
        all.extend([driver(nic), split(nic), queues(nic), rules(nic), iommu(nic)]);
        all.extend(mtu(nic));
    }
    all.extend(buffers(found.receive_limit));
    all.extend(found.export.as_ref().map(export));
    all.extend(found.trial.as_ref().map(|trial| match trial {
        Ok(nics) => ok("trial", format!("an engine receives into device memory on {}", nics.join(", "))),
        Err(why) => missing("trial", why, "the text is the kernel's, or the driver's: docs/devmem.md says what follows from it"),
    }));
    all
}

/// The NICs that can receive into device memory, as far as that can be seen beside an engine that may have their queues and rules: these
/// must exist, and may all be taken.
///
/// # Errors
/// What is missing.
pub fn able(found: &Found) -> Result<Vec<String>, String> {
    let unmet = |checks: &[Check]| {
        let missing = checks.iter().filter(|check| check.status == Status::Missing);
        missing.map(|check| format!("{}: {} ({})", check.name, check.found, check.todo)).collect::<Vec<_>>()
    };
    let host = unmet(&[kernel(&found.kernel), privileges(found)]);
    if !host.is_empty() {
        return Err(host.join("; "));
    }
    let of_nic = |nic: &Facts| {
        let mut checks = vec![split(nic)];
        checks.extend(nic.spare_queues.is_err().then(|| queues(nic)));
        checks.extend(nic.rules.is_err().then(|| rules(nic)));
        unmet(&checks)
    };
    let (able, not): (Vec<_>, Vec<_>) = found.nics.iter().map(|nic| (nic, of_nic(nic))).partition(|(_, unmet)| unmet.is_empty());
    match (able.is_empty(), not.is_empty()) {
        (false, _) => Ok(able.into_iter().map(|(nic, _)| nic.name.clone()).collect()),
        (true, false) => Err(not.into_iter().flat_map(|(_, unmet)| unmet).collect::<Vec<_>>().join("; ")),
        (true, true) => Err("no NIC with hardware queues".to_owned()),
    }
}

fn kernel(release: &str) -> Check {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version >= KERNEL {
        true => ok("kernel", release),
        false => missing("kernel", release, format!("{}.{} receives into and sends from device memory", KERNEL.0, KERNEL.1)),
    }
}

fn privileges(found: &Found) -> Check {
    const NAME: &str = "privileges";
    match (&found.agent, found.privileged) {
        (Some(agent), _) => ok(NAME, format!("the agent at {agent}")),
        (None, true) => ok(NAME, "CAP_NET_ADMIN in this process"),
        (None, false) => {
            missing(NAME, "neither CAP_NET_ADMIN nor an agent", "start uccl-devmem-agent on this host (deploy/devmem)")
        }
    }
}

fn driver(nic: &Facts) -> Check {
    let name = &nic.name;
    match nic.driver.as_deref() {
        Some(driver) if DRIVERS.contains(&driver) => ok("driver", format!("{name}: {driver}")),
        other => advice(
            "driver",
            format!("{name}: {}", other.unwrap_or("none")),
            format!("known to work: {}", DRIVERS[..4].join(", ")),
        ),
    }
}

fn split(nic: &Facts) -> Check {
    const NAME: &str = "header split";
    let name = &nic.name;
    match &nic.rings {
        Ok(Rings { split: Some(true), threshold: 0, .. }) => ok(NAME, format!("{name}: on")),
        Ok(Rings { split: Some(true), threshold, .. }) => missing(
            NAME,
            format!("{name}: from {threshold} bytes on"),
            format!("uccl-devmem-agent --split-headers {name}, or ethtool -G {name} hds-thresh 0"),
        ),
        Ok(Rings { split: Some(false), .. }) => {
            missing(NAME, format!("{name}: off"), format!("ethtool -G {name} tcp-data-split on"))
        }
        Ok(Rings { split: None, .. }) => missing(NAME, format!("{name}: the driver has none"), "another NIC or a newer driver"),
        Err(why) => missing(NAME, format!("{name}: {why}"), "another NIC or a newer driver"),
    }
}

fn queues(nic: &Facts) -> Check {
    const NAME: &str = "spare queues";
    let name = &nic.name;
    match &nic.spare_queues {
        Ok(spare) if spare.is_empty() => missing(
            NAME,
            format!("{name}: none"),
            format!("ethtool -X {name} equal N, with N below the number of queues: the rest stays free of ordinary connections"),
        ),
        Ok(spare) => ok(NAME, format!("{name}: {} (an engine takes one for each GPU)", spare.len())),
        Err(why) => missing(NAME, format!("{name}: {why}"), "the driver must show its queues and its table of receive queues"),
    }
}

fn rules(nic: &Facts) -> Check {
    const NAME: &str = "steering rules";
    let name = &nic.name;
    match &nic.rules {
        Ok((set, 0)) => ok(NAME, format!("{name}: {set}")),
        Ok((set, room)) if set < room => ok(NAME, format!("{name}: {set} of {room}")),
        Ok((set, room)) => {
            missing(NAME, format!("{name}: {set} of {room}"), format!("ethtool -n {name} shows them; delete some"))
        }
        Err(why) => missing(NAME, format!("{name}: {why}"), format!("ethtool -K {name} ntuple on")),
    }
}

fn iommu(nic: &Facts) -> Check {
    const NAME: &str = "IOMMU";
    let name = &nic.name;
    match nic.iommu.as_deref() {
        None => ok(NAME, format!("{name}: none")),
        Some("identity") => ok(NAME, format!("{name}: passes addresses through")),
        Some(kind) => advice(
            NAME,
            format!("{name}: translates ({kind})"),
            "with NVIDIA GPUs data may be lost without an error, which the pattern at each connection finds; boot with iommu=pt",
        ),
    }
}

fn mtu(nic: &Facts) -> Option<Check> {
    let mtu = nic.mtu?;
    let found = format!("{}: {mtu}", nic.name);
    Some(match mtu > MTU {
        true => ok("MTU", found),
        false => advice("MTU", found, "a packet takes a page of 4096 bytes, whatever it holds: raise it above 4148 on all hosts"),
    })
}

fn export(tried: &Result<(), String>) -> Check {
    const NAME: &str = "dma-buf export";
    match tried {
        Ok(()) => ok(NAME, "the GPU's driver exports memory, which the GPU writes and reads"),
        Err(why) => missing(NAME, why, "a GPU whose driver exports DMA-BUFs: with NVIDIA's, its open kernel modules"),
    }
}

fn buffers(limit: Option<u64>) -> Option<Check> {
    let limit = limit?;
    Some(match limit >= RECEIVE_BUFFER {
        true => ok("net.core.rmem_max", limit.to_string()),
        false => advice(
            "net.core.rmem_max",
            limit.to_string(),
            format!("{RECEIVE_BUFFER} or more: it limits what a connection has on its way"),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn good() -> Found {
        let rings = Ok(Rings { split: Some(true), threshold: 0, entries: 1024 });
        let nic = Facts {
            name: "eth1".into(),
            driver: Some("mlx5_core".into()),
            rings,
            spare_queues: Ok(vec![15, 14]),
            rules: Ok((3, 1024)),
            mtu: Some(9000),
            iommu: Some("identity".into()),
        };
        Found {
            kernel: "6.16.0-rc7-cloud".into(),
            privileged: true,
            agent: None,
            receive_limit: Some(4 << 20),
            nics: vec![nic],
            export: Some(Ok(())),
            trial: Some(Ok(vec!["eth1".into()])),
        }
    }

    fn faults(found: &Found) -> Vec<(&'static str, Status)> {
        examine(found).into_iter().filter(|check| check.status != Status::Ok).map(|check| (check.name, check.status)).collect()
    }

    #[test]
    fn a_host_that_can_has_no_faults() {
        assert_eq!(faults(&good()), []);
    }

    #[test]
    fn each_fault_is_named() {
        type Break = (&'static str, Status, fn(&mut Found));
        let broken: [Break; 14] = [
            ("kernel", Status::Missing, |it| it.kernel = "6.12.0".into()),
            ("kernel", Status::Missing, |it| it.kernel = "weird".into()),
            ("privileges", Status::Missing, |it| it.privileged = false),
            ("NIC", Status::Missing, |it| it.nics.clear()),
            ("driver", Status::Advice, |it| it.nics[0].driver = Some("ena".into())),
            ("header split", Status::Missing, |it| it.nics[0].rings = Ok(Rings { split: Some(false), threshold: 0, entries: 9 })),
            ("header split", Status::Missing, |it| it.nics[0].rings = Ok(Rings { split: Some(true), threshold: 99, entries: 9 })),
            ("header split", Status::Missing, |it| it.nics[0].rings = Err("no".into())),
            ("spare queues", Status::Missing, |it| it.nics[0].spare_queues = Ok(vec![])),
            ("steering rules", Status::Missing, |it| it.nics[0].rules = Ok((8, 8))),
            ("IOMMU", Status::Advice, |it| it.nics[0].iommu = Some("DMA-FQ".into())),
            ("MTU", Status::Advice, |it| it.nics[0].mtu = Some(1500)),
            ("dma-buf export", Status::Missing, |it| it.export = Some(Err("there is no GPU".into()))),
            ("trial", Status::Missing, |it| it.trial = Some(Err("tcp-data-split is disabled".into()))),
        ];
        for (name, status, harm) in broken {
            let mut found = good();
            harm(&mut found);
            assert_eq!(faults(&found), [(name, status)]);
        }
        let helped = Found { privileged: false, agent: Some("/run/x".into()), receive_limit: Some(212_992), ..good() };
        assert_eq!(faults(&helped), [("net.core.rmem_max", Status::Advice)]);
    }

    #[test]
    fn a_running_engine_may_have_all_queues_and_rules() {
        assert_eq!(able(&good()), Ok(vec!["eth1".to_owned()]));
        let mut taken = good();
        (taken.nics[0].spare_queues, taken.nics[0].rules, taken.trial) = (Ok(vec![]), Ok((8, 8)), None);
        assert_eq!(able(&taken), Ok(vec!["eth1".to_owned()]));
        assert!(examine(&taken).iter().all(|check| check.name != "trial"));
        type Break = (&'static str, fn(&mut Found));
        let broken: [Break; 6] = [
            ("kernel: 6.12.0 (", |it| it.kernel = "6.12.0".into()),
            ("privileges: neither CAP_NET_ADMIN nor an agent (", |it| it.privileged = false),
            ("no NIC with hardware queues", |it| it.nics.clear()),
            ("header split: eth1: no (", |it| it.nics[0].rings = Err("no".into())),
            ("spare queues: eth1: none shown (", |it| it.nics[0].spare_queues = Err("none shown".into())),
            ("steering rules: eth1: no rules (", |it| it.nics[0].rules = Err("no rules".into())),
        ];
        for (why, harm) in broken {
            let mut found = good();
            harm(&mut found);
            assert!(able(&found).is_err_and(|text| text.starts_with(why)), "{why}");
        }
        // One of several NICs is enough.
        let mut two = good();
        two.nics.push(Facts { name: "eth2".into(), rings: Err("no".into()), ..good().nics.remove(0) });
        assert_eq!(able(&two), Ok(vec!["eth1".to_owned()]));
    }
}
