//! tcpx-info --ready: whether an engine could serve here, for the probes of Kubernetes. It creates an engine over the software plugin, on
//! another port than the running one, and only looks at a foreign plugin and its surroundings: their initialisation takes GPU memory.

use crate::doctor::{self, device_memory, Host, Status};
use crate::{cuda, inspect};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;
use uccl_p2p::config::{Config, DeviceMemoryTcp, PluginChoice};
use uccl_p2p::engine::Engine;
use uccl_p2p::net::plugin::Plugin;
use uccl_p2p::require::{carrier, Carries, Requirement};
use uccl_p2p::status::ErrorKind;
use uccl_p2p::types::Protect;

/// The longest that it may take.
const LIMIT: Duration = Duration::from_secs(8);

/// The word for device memory TCP.
const DEVMEM: &str = "devmem";

/// The answer.
enum Answer {
    Ready(String),
    /// Something is missing that may come.
    NotReady(String),
    /// It cannot work as it is configured.
    Wrong(String),
}

/// Looks, prints one line, and returns the exit status: 0 ready, 1 not ready, 2 wrong configuration.
pub fn tell() -> ExitCode {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(e) => return said(Answer::Wrong(e.to_string())),
    };
    let (sender, receiver) = mpsc::channel();
    // A driver or a mount may keep a call for ever: the thread ends with the process.
    std::thread::spawn(move || sender.send(look(&config).unwrap_or_else(|missing| missing)));
    let late =
        |_| Answer::NotReady(format!("no answer within {} s: a driver or a file system does not respond", LIMIT.as_secs()));
    said(receiver.recv_timeout(LIMIT).unwrap_or_else(late))
}

fn said(answer: Answer) -> ExitCode {
    let (line, status) = match answer {
        Answer::Ready(what) => (format!("READY: {what}"), 0),
        Answer::NotReady(why) => (format!("NOT READY: {why}"), 1),
        Answer::Wrong(why) => (format!("WRONG CONFIGURATION: {why}"), 2),
    };
    crate::say!("{line}");
    // Not by returning: nothing waits for a thread that is stuck.
    std::process::exit(status)
}

fn look(config: &Config) -> Result<Answer, Answer> {
    let all = inspect::gpus();
    let found =
        Plugin::look(config, all.iter().find_map(|gpu| gpu.pci.as_deref())).map_err(|e| Answer::NotReady(e.to_string()))?;
    let foreign = found.as_ref().map(|(name, _)| name.as_str());
    if let (Some(name), Protect::Encrypt) = (foreign, config.protect) {
        return Err(Answer::Wrong(format!("UCCL_TCPX_PROTECT=encrypt: plugin {name} cannot encrypt")));
    }
    let engine = Engine::new(own(config)).map_err(|e| match e.kind() {
        ErrorKind::InvalidArgument | ErrorKind::Auth => Answer::Wrong(e.to_string()),
        _ => Answer::NotReady(e.to_string()),
    })?;
    let nics: Vec<String> = engine.nics().into_iter().map(|nic| nic.name).collect();
    engine.shutdown();
    let gpus = if config.emulate_device { None } else { Some(cuda::count()) };
    let of_gpus = foreign.is_some() || config.require.needs_gpus();
    if gpus == Some(0) && of_gpus {
        let who = foreign.map_or_else(|| format!("UCCL_TCPX_REQUIRE={}", config.require), |name| format!("plugin {name}"));
        return Err(Answer::NotReady(format!("{who} needs a GPU, and none is visible")));
    }
    if let Some((name, path)) = found.as_ref().filter(|(name, _)| carrier(name) == "tcpx" && !config.emulate_device) {
        preconditions(name, &path.display().to_string())?;
    }
    let plugin = carries(config, foreign, &nics, || device_memory::able(&device_memory::look()))?;
    let gpus = gpus.map_or("simulated GPUs".to_owned(), |n| format!("{n} GPUs"));
    Ok(Answer::Ready(format!("plugin {plugin}, NICs {}, {gpus}", nics.join(" "))))
}

/// The configuration of the probe's own engine: a running one keeps its port, its statistics, and the queues of its NICs.
fn own(config: &Config) -> Config {
    Config {
        plugin: PluginChoice::Soft,
        plugin_path: None,
        devmem: DeviceMemoryTcp::Off,
        port: 0,
        metrics: None,
        protect: Protect::Off,
        require: Requirement::default(),
        ..config.clone()
    }
}

/// The plugin whose channels would carry memory, if that can meet what is required. `foreign`: the one that an engine would use in place of
/// the software plugin; `able`: the NICs that device memory TCP can use, or what it lacks.
fn carries(
    config: &Config,
    foreign: Option<&str>,
    nics: &[String],
    able: impl FnOnce() -> Result<Vec<String>, String>,
) -> Result<String, Answer> {
    const SOFT: &str = "TCPX-soft";
    let required = &config.require;
    let channels = |plugin: &str, nics: &[String], no_plugin: Vec<String>| Carries {
        memory: "memory".to_owned(),
        carrier: carrier(plugin).to_owned(),
        nics: nics.to_vec(),
        no_plugin,
        no_direct: config.disable_ipc.then(|| "UCCL_P2P_DISABLE_IPC is set".to_owned()),
        absent: Vec::new(),
    };
    let met = |channels: &Carries| required.forecast(channels, !config.disable_ipc);
    let mut why = Vec::new();
    let device_memory = match (foreign, config.devmem, config.protect) {
        (Some(_), ..) => None,
        (None, DeviceMemoryTcp::Off, _) => None,
        (None, _, Protect::Off) => match able() {
            Ok(nics) => Some(nics),
            Err(missing) if config.devmem == DeviceMemoryTcp::Require => {
                return Err(Answer::NotReady(format!("UCCL_TCPX_DEVMEM=require: {missing}")))
            }
            Err(missing) => {
                why.push(format!("no device memory TCP: {missing}"));
                None
            }
        },
        (None, ..) => {
            why.push("no device memory TCP: UCCL_TCPX_PROTECT protects data".to_owned());
            None
        }
    };
    // GPU memory takes device memory TCP, host memory the software plugin.
    if device_memory.is_some_and(|nics| met(&channels(DEVMEM, &nics, Vec::new())).is_ok()) {
        return Ok(DEVMEM.to_owned());
    }
    let plugin = foreign.unwrap_or(SOFT);
    if foreign.is_none() {
        why.push(format!("an engine would use {plugin}"));
    }
    match met(&channels(plugin, nics, why)) {
        Ok(()) => Ok(plugin.to_owned()),
        Err(unmet) => Err(Answer::NotReady(format!("UCCL_TCPX_REQUIRE={required}: {unmet}"))),
    }
}

/// The receive manager and whatever else GPUDirect-TCPX needs of the host.
fn preconditions(name: &str, path: &str) -> Result<(), Answer> {
    let gpus = inspect::gpus().into_iter().filter_map(|gpu| gpu.pci).collect();
    let checks = doctor::examine(&Host::here(Ok((name.to_owned(), Some(path.to_owned()))), gpus));
    let missing = checks.iter().filter(|check| check.status == Status::Missing);
    let missing: Vec<String> = missing.map(|check| format!("{}: {} ({})", check.name, check.found, check.todo)).collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Answer::NotReady(missing.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(devmem: DeviceMemoryTcp, require: &str) -> Config {
        let require = Requirement::parse(require).unwrap_or_else(|e| panic!("{require}: {e}"));
        let environment = Config::from_env().expect("the environment of the tests is valid");
        Config { devmem, require, disable_ipc: false, protect: Protect::Off, ..environment }
    }

    fn answer(config: &Config, foreign: Option<&str>, able: Result<&str, &str>) -> String {
        let able = able.map(|nic| vec![nic.to_owned()]).map_err(str::to_owned);
        match carries(config, foreign, &["eth0".to_owned()], || able) {
            Ok(plugin) => plugin,
            Err(Answer::NotReady(why)) => why,
            Err(_) => panic!("it is not wrong"),
        }
    }

    #[test]
    fn the_probes_engine_leaves_the_running_one_what_it_has() {
        let own = own(&Config { port: 7, ..config(DeviceMemoryTcp::Require, "devmem") });
        assert_eq!((own.devmem, own.port, own.metrics.is_none(), own.require.is_empty()), (DeviceMemoryTcp::Off, 0, true, true));
    }

    #[test]
    fn device_memory_tcp_meets_what_it_would_meet() {
        use DeviceMemoryTcp::{Auto, Off, Require};
        for required in ["devmem", "devmem|direct", "nics>=1", "devmem|tcpx,nics>=1"] {
            assert_eq!(answer(&config(Require, required), None, Ok("eth1")), DEVMEM, "{required}");
            assert_eq!(answer(&config(Auto, required), None, Ok("eth1")), DEVMEM, "{required}");
        }
        // Host memory may meet it, too.
        assert_eq!(answer(&config(Auto, "tcp"), None, Ok("eth1")), "TCPX-soft");
        assert_eq!(answer(&config(Auto, "tcp"), None, Err("old kernel")), "TCPX-soft");
        let says = [
            (config(Require, "devmem"), Err("old kernel"), "UCCL_TCPX_DEVMEM=require: old kernel"),
            (
                config(Auto, "devmem"),
                Err("old kernel"),
                "UCCL_TCPX_REQUIRE=devmem: devmem is required, but memory takes tcp eth0 (no device memory TCP: old kernel; an engine \
                 would use TCPX-soft)",
            ),
            (
                config(Off, "devmem"),
                Ok("eth1"),
                "UCCL_TCPX_REQUIRE=devmem: devmem is required, but memory takes tcp eth0 (an engine would use TCPX-soft)",
            ),
            (
                Config { protect: Protect::Integrity, ..config(Auto, "devmem") },
                Ok("eth1"),
                "UCCL_TCPX_REQUIRE=devmem: devmem is required, but memory takes tcp eth0 (no device memory TCP: UCCL_TCPX_PROTECT \
                 protects data; an engine would use TCPX-soft)",
            ),
        ];
        for (config, able, why) in says {
            assert_eq!(answer(&config, None, able), why);
        }
        assert_eq!(answer(&config(Auto, "tcpx"), Some("GPUDirectTCPX_v7"), Ok("eth1")), "GPUDirectTCPX_v7");
    }
}
