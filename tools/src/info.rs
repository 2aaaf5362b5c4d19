//! tcpx-info: what the library sees on this host, and whether it can move data.

use clap::Parser;
use serde::Serialize;
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use tcpx_tools::api::{self, Nic, Node, Plugin, Setting};
use tcpx_tools::error::{Context, Failure, Result};
use tcpx_tools::fail;
use tcpx_tools::inspect::{self, Congestion, Environment, Gpu};
use tcpx_tools::memory::Kind;
use tcpx_tools::probe::{self, Proof};

/// Shows plugin, network devices, GPUs and settings in effect, and proves by a loop-back transfer of 1 MiB that data moves.
///
/// Exit status: 0 when transfers work (with --no-probe: when an engine starts), 1 when not.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// Do not move data; only show what is there.
    #[arg(long)]
    no_probe: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    works: bool,
    verdict: String,
    plugin: Option<Plugin>,
    metadata: Option<String>,
    nics: Vec<Nic>,
    gpus: Vec<Gpu>,
    congestion_control: Option<Congestion>,
    proof: Option<Proof>,
    settings: Vec<Setting>,
    environment: Environment,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let report = examine(&args);
    let shown = if args.json { serde_json::to_string_pretty(&report).map_err(Failure::new) } else { Ok(text(&report)) };
    match shown {
        Ok(shown) => println!("{}", shown.trim_end()),
        Err(e) => {
            eprintln!("error: cannot write the report: {e}");
            return ExitCode::FAILURE;
        }
    }
    if report.works {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn examine(args: &Args) -> Report {
    let settings = api::settings();
    let known: Vec<&str> = settings.iter().map(|s| s.name.as_str()).collect();
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())));
    let mut report = Report {
        version: api::VERSION,
        works: false,
        verdict: String::new(),
        plugin: None,
        metadata: None,
        nics: Vec::new(),
        gpus: inspect::gpus(),
        congestion_control: inspect::congestion(),
        proof: None,
        environment: inspect::environment(variables, &known),
        settings,
    };
    match look(args, &mut report) {
        Ok(verdict) => {
            report.works = true;
            report.verdict = verdict;
        }
        Err(e) => report.verdict = format!("NOT WORKING: {e}"),
    }
    report
}

/// Starts an engine and looks at it; the verdict when all is well.
fn look(args: &Args, report: &mut Report) -> Result<String> {
    api::check_environment()?;
    api::listen_on_any_port();
    let node = Arc::new(Node::start().context("no engine starts")?);
    report.plugin = Some(node.plugin_details());
    report.metadata = Some(node.metadata());
    report.nics = node.nics();
    if report.nics.is_empty() {
        fail!("plugin {} finds no network device", node.plugin());
    }
    if args.no_probe {
        return Ok("an engine starts; that data moves was not tried (--no-probe)".to_string());
    }
    let memory = if api::emulation_is_on() { Kind::Emulated } else { Kind::Host };
    let proof = probe::loopback(&node, memory).context("the loop-back transfer failed")?;
    let verdict = format!(
        "WORKING: 1 MiB of {memory} memory written and read back over {} channels of plugin {}, every byte right",
        proof.channels,
        node.plugin()
    );
    report.proof = Some(proof);
    Ok(verdict)
}

fn text(report: &Report) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<20} {value}");
    };
    line("library", &format!("uccl-tcpx {}", report.version));
    match &report.plugin {
        Some(p) => {
            line("plugin", &format!("{}, {}, NCCL net ABI v{}", p.name, p.path.as_deref().unwrap_or("built in"), p.abi_version))
        }
        None => line("plugin", "none"),
    }
    if let Some(metadata) = &report.metadata {
        line("address", metadata);
    }
    match report.nics.len() {
        0 => line("network devices", "none"),
        n => line("network devices", &n.to_string()),
    }
    for nic in &report.nics {
        let numa = nic.numa_node.map_or("NUMA node unknown".to_string(), |n| format!("NUMA node {n}"));
        let pci = nic.pci_path.as_deref().filter(|p| !p.is_empty()).unwrap_or("no PCI device");
        line(
            "",
            &format!(
                "{}: {} Mbit/s, {numa}, {pci}, memory: {} (plugin {})",
                nic.name,
                nic.speed_mbps,
                nic.pointers.join("+"),
                nic.plugin
            ),
        );
    }
    match report.gpus.len() {
        0 => line("GPUs", "none (host memory works without)"),
        n => line("GPUs", &n.to_string()),
    }
    for gpu in &report.gpus {
        line("", &gpu.pci.as_ref().map_or(gpu.name.clone(), |pci| format!("{} at {pci}", gpu.name)));
    }
    match &report.congestion_control {
        Some(c) => line("congestion control", &format!("{} (available: {})", c.default, c.available.join(", "))),
        None => line("congestion control", "unknown"),
    }
    if let Some(proof) = &report.proof {
        line("proof", &format!("{} bytes verified, {:.0} us for write and read", proof.verified_bytes, proof.elapsed_us));
    }
    let width = report.settings.iter().map(|s| s.name.len()).max().unwrap_or(0);
    line("settings", &format!("{} (* set in the environment)", report.settings.len()));
    for s in &report.settings {
        let mark = if s.source == "default" { ' ' } else { '*' };
        let value = if s.value.is_empty() { "(unset)" } else { &s.value };
        line("", &format!("{mark} {:<width$} = {value:<12}  {}", s.name, s.doc));
    }
    let groups = [
        ("left to the plugin", &report.environment.passed_through),
        ("software plugin", &report.environment.soft_plugin),
        ("UNKNOWN", &report.environment.unknown),
    ];
    for (title, variables) in groups {
        for v in variables {
            line(title, &format!("{}={}", v.name, v.value));
        }
    }
    let unknown: BTreeSet<&str> = report.environment.unknown.iter().map(|v| v.name.as_str()).collect();
    if !unknown.is_empty() {
        line("warning", "nothing reads the UNKNOWN variables: a misspelt name, or one of another program");
    }
    line("verdict", &report.verdict);
    out
}
