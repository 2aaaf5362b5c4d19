//! tcpx-info --ready: whether an engine could serve here, for the probes of Kubernetes. It creates an engine over the software plugin, on
//! another port than the running one, and only looks at a foreign plugin and its surroundings: their initialisation takes GPU memory.

use crate::doctor::{self, Host, Status};
use crate::{cuda, inspect};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::Engine;
use uccl_p2p::net::plugin::Plugin;
use uccl_p2p::require::{carrier, Carries, Requirement};
use uccl_p2p::status::ErrorKind;
use uccl_p2p::types::Protect;

/// The longest that it may take.
const LIMIT: Duration = Duration::from_secs(8);

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
    let own = Config {
        plugin: PluginChoice::Soft,
        plugin_path: None,
        port: 0,
        metrics: None,
        protect: Protect::Off,
        require: Requirement::default(),
        ..config.clone()
    };
    let engine = Engine::new(own).map_err(|e| match e.kind() {
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
    let plugin = foreign.unwrap_or("TCPX-soft");
    let channels = Carries {
        memory: "memory".to_owned(),
        carrier: carrier(plugin).to_owned(),
        nics: nics.clone(),
        no_plugin: if found.is_none() { vec![format!("an engine would use {plugin}")] } else { Vec::new() },
        no_direct: config.disable_ipc.then(|| "UCCL_P2P_DISABLE_IPC is set".to_owned()),
        absent: Vec::new(),
    };
    let required = &config.require;
    required
        .forecast(&channels, !config.disable_ipc)
        .map_err(|unmet| Answer::NotReady(format!("UCCL_TCPX_REQUIRE={required}: {unmet}")))?;
    let gpus = gpus.map_or("simulated GPUs".to_owned(), |n| format!("{n} GPUs"));
    Ok(Answer::Ready(format!("plugin {plugin}, NICs {}, {gpus}", nics.join(" "))))
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
