//! tcpx-info --doctor on a machine of GPUDirect-TCPXO: what the library looks at before it initialises that plugin, for every GPU, and how to
//! fix what is missing.

use super::host::{missing, ok, Check, Host};
use super::one_host;
use uccl_p2p::config::Config;
use uccl_p2p::net::plugin::{tcpxo_findings, Finding, Plugin};
use uccl_p2p::require::carrier;

/// Whether GPUDirect-TCPXO is what an engine uses here (`plugin`), or would look for first.
pub fn is_meant(plugin: &Result<(String, Option<String>), String>) -> bool {
    match plugin.as_ref().map(|(name, _)| carrier(name)) {
        Ok("tcpxo") => true,
        Ok("tcpx") => false,
        _ => Config::from_env().is_ok_and(|config| Plugin::looks_for_tcpxo(&config)),
    }
}

/// Every precondition, in order of dependence.
pub fn examine(host: &Host) -> Vec<Check> {
    let mut all = vec![plugin(host)];
    all.extend(machine(&host.gpus, tcpxo_findings));
    all.extend(one_host::checks(host));
    all
}

fn plugin(host: &Host) -> Check {
    const NAME: &str = "plugin";
    match &host.plugin {
        Ok((name, Some(file))) if carrier(name) == "tcpxo" => ok(NAME, format!("{name} from {file}")),
        Ok((name, file)) => missing(
            NAME,
            format!("an engine uses {name} ({})", file.as_deref().unwrap_or("built in")),
            "install libnccl-net_internal.so (docs/tcpxo.md, step 3), or name its file in UCCL_TCPX_PLUGIN_PATH; UCCL_TCPX_PLUGIN=tcpxo \
             says why it cannot be loaded",
        ),
        Err(e) => missing(NAME, format!("no engine starts: {e}"), "fix what is missing below; else the message names the variable or the file"),
    }
}

/// The findings for every GPU; those that do not depend on the GPU once.
fn machine(gpus: &[String], find: impl Fn(Option<&str>) -> Vec<Finding>) -> Vec<Check> {
    let mut all = find(gpus.first().map(String::as_str));
    // Without an answer of the receive manager each GPU takes some seconds, and has no findings of its own.
    if all.iter().all(|finding| finding.what != MANAGER || finding.found.is_ok()) {
        for gpu in gpus.iter().skip(1) {
            let of_gpu = find(Some(gpu)).into_iter().filter(|finding| ![SWITCH, MANAGER, CONTROL].contains(&finding.what));
            all.extend(of_gpu);
        }
    }
    all.into_iter().map(check).collect()
}

const SWITCH: &str = "switch";
const MANAGER: &str = "receive manager";
const CONTROL: &str = "control interface";

fn check(finding: Finding) -> Check {
    let todo = match finding.what {
        SWITCH => "unset NCCL_FASTRAK_ENABLE",
        MANAGER => {
            "start Google's receive manager (fastrak_gpumem_manager, v1.0.20 or newer) on this host, in the network namespace of this \
             process or with one FILE_BASED_UDS_PATH_PREFIX for both; if it runs, read its log"
        }
        "GPU" => "use a machine a3-megagpu-8g, load the NVIDIA driver, and give the container its GPUs",
        CONTROL => "name the control NIC in NCCL_FASTRAK_CTRL_DEV, eth0 on A3 Mega",
        "data NIC" => {
            "give this network namespace all data NICs, name them in NCCL_FASTRAK_IFNAME (eth1 to eth8), and restart the receive manager \
             if a NIC got its address later"
        }
        "low-latency device" => "bind the devices (docs/tcpxo.md, step 1) and mount their folder, or unset NCCL_FASTRAK_USE_LLCM",
        _ => "read the receive manager's log, and restart it",
    };
    match finding.found {
        Ok(found) => ok(finding.what, found),
        Err(found) => missing(finding.what, found, todo),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{conclusion, Status, Subject};
    use super::*;

    fn finding(what: &'static str, found: Result<&str, &str>) -> Finding {
        Finding { what, found: found.map(str::to_owned).map_err(str::to_owned) }
    }

    const GPUS: [&str; 2] = ["0000:04:00.0", "0000:05:00.0"];

    fn gpus() -> Vec<String> {
        GPUS.map(str::to_owned).to_vec()
    }

    #[test]
    fn every_gpu_is_examined_and_the_machine_once() {
        let find = |gpu: Option<&str>| {
            let nic = if gpu == Some(GPUS[1]) { Err("no NIC") } else { Ok("eth1") };
            vec![
                finding(SWITCH, Ok("on")),
                finding(MANAGER, Ok("answers")),
                finding(CONTROL, Ok("eth0")),
                finding("data NIC", nic),
            ]
        };
        let checks = machine(&gpus(), find);
        let lines: Vec<_> = checks.iter().map(|check| (check.name, check.status)).collect();
        let good = [SWITCH, MANAGER, CONTROL, "data NIC"].map(|name| (name, Status::Ok));
        assert_eq!(lines, [&good[..], &[("data NIC", Status::Missing)]].concat());
        assert!(checks[4].found == "no NIC" && checks[4].todo.contains("NCCL_FASTRAK_IFNAME"), "{:?}", checks[4]);
        let says = conclusion(Subject::Tcpxo, &checks);
        assert_eq!(says, Err("GPUDirect-TCPXO cannot work here, missing: data NIC".to_owned()));
    }

    #[test]
    fn a_manager_without_an_answer_is_waited_for_once() {
        let asked = std::cell::Cell::new(0);
        let find = |_: Option<&str>| {
            asked.set(asked.get() + 1);
            vec![finding(MANAGER, Err("no answer in 5s")), finding("GPU", Ok("known"))]
        };
        assert_eq!((machine(&gpus(), find).len(), asked.get()), (2, 1));
        // Without a GPU the findings say so.
        let none = machine(&[], |gpu| vec![finding("GPU", if gpu.is_none() { Err("none") } else { Ok("known") })]);
        assert_eq!((none.len(), none[0].status), (1, Status::Missing));
    }
}
