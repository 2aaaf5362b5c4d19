//! tcpx-info: what the library finds on this host, and whether it can move data.

use clap::Parser;
use serde::Serialize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tcpx_tools::api::{self, Budget, Nic, Node, Plugin, Setting};
use tcpx_tools::carried::{carrier, Carried, DIRECT, NVLINK};
use tcpx_tools::case::{Case, Op};
use tcpx_tools::cli::parse_requirement;
use tcpx_tools::client::Client;
use tcpx_tools::doctor::{self, device_memory, tcpxo, Check, Host, Subject};
use tcpx_tools::error::{Context, Failure, Result};
use tcpx_tools::inspect::{self, Congestion, Environment, Gpu, Variable};
use tcpx_tools::measure::{measure, Measured, Options, Watcher};
use tcpx_tools::memory::Kind;
use tcpx_tools::probe::{self, Proof};
use tcpx_tools::report::Row;
use tcpx_tools::{cuda, fail, ready, say};
use uccl_p2p::require::Requirement;

/// Shows plugin, network devices, GPUs and settings in effect, and checks with a loop-back transfer of 1 MiB that data moves.
///
/// Exit status: 0 if transfers work (with --no-probe: if an engine starts; with --doctor: and what it checks can), else 1. --ready has its
/// own.
#[derive(Parser)]
#[command(version, name = "tcpx-info")]
struct Args {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// Do not move data; only show the configuration.
    #[arg(long)]
    no_probe: bool,
    /// Show every setting, and the variables that are passed to the plugin.
    #[arg(long)]
    settings: bool,
    /// Check every precondition of a plugin in order and say how to fix what is missing, after moving data as usual. Exit status 1 if one
    /// is missing, or if GPU memory was moved and not over that plugin. Without a value: GPUDirect-TCPXO where an engine uses it or would
    /// look for it first, as on A3 Mega, else GPUDirect-TCPX.
    #[arg(long, value_name = "OF")]
    doctor: Option<Option<Subject>>,
    /// Fail (exit status 1) if bytes went another way, by the counters of the connection: those moved with --peer, else those of the
    /// test inside the process. PATH is what UCCL_TCPX_REQUIRE takes: tcpx, tcpxo, devmem, tcp, direct, nvlink, several joined by |, and nics>=N.
    #[arg(long, value_name = "PATH", value_parser = parse_requirement, conflicts_with = "no_probe")]
    require: Option<Requirement>,
    /// Also move data to and from another host, with contents checked: the address that `tcpx-perf server` printed there.
    #[arg(long, value_name = "ADDRESS")]
    peer: Option<String>,
    /// Only say whether an engine could serve here, for probes of Kubernetes: exit status 0 if it is ready, 1 if it is not, 2 if the
    /// configuration is wrong and waiting does not help. Takes less than 8 s, moves no data, allocates no GPU memory, and disturbs no
    /// running engine.
    #[arg(long, conflicts_with_all = ["json", "no_probe", "settings", "doctor", "require", "peer", "memory"])]
    ready: bool,
    /// Kind of memory to move [default: GPU memory if --doctor finds a plugin of Google's and a GPU, else host memory].
    #[arg(long)]
    memory: Option<Kind>,
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
    within_host: Option<String>,
    peer: Option<Vec<Row>>,
    doctor: Option<Examination>,
    settings: Vec<Setting>,
    budgets: Vec<Budget>,
    environment: Environment,
}

/// The checks of --doctor.
#[derive(Serialize)]
#[serde(transparent)]
struct Examination {
    #[serde(skip)]
    subject: Subject,
    checks: Vec<Check>,
}

fn main() -> ExitCode {
    let args: Args = tcpx_tools::cli::parse();
    if args.ready {
        return ready::tell();
    }
    let report = examine(&args);
    let shown =
        if args.json { serde_json::to_string_pretty(&report).map_err(Failure::new) } else { Ok(text(&report, args.settings)) };
    match shown {
        Ok(shown) => say!("{}", shown.trim_end()),
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
        within_host: None,
        peer: None,
        doctor: None,
        environment: inspect::environment(variables, &known),
        settings,
        budgets: api::budgets(),
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

/// Starts an engine and examines it; returns the verdict if all is well.
fn look(args: &Args, report: &mut Report) -> Result<String> {
    let started = api::check_environment().and_then(|()| {
        api::listen_on_any_port();
        // Each test here takes a path of its own; the report says which.
        api::require_nothing();
        // Engines learn here that they simulate GPUs.
        args.memory.map_or(Ok(()), Kind::prepare_process)?;
        Node::start().context("no engine starts")
    });
    if let Some(subject) = args.doctor {
        let plugin = started.as_ref().map(Node::plugin_details);
        let plugin = plugin.map(|p| (p.name, p.path)).map_err(|e| e.to_string());
        let subject = subject.unwrap_or(if tcpxo::is_meant(&plugin) { Subject::Tcpxo } else { Subject::Tcpx });
        let gpus = report.gpus.iter().filter_map(|gpu| gpu.pci.clone()).collect();
        let checks = match subject {
            Subject::Tcpx => doctor::examine(&Host::here(plugin, gpus)),
            Subject::Tcpxo => tcpxo::examine(&Host::here(plugin, gpus)),
            Subject::Devmem => device_memory::examine(&device_memory::find()),
        };
        report.doctor = Some(Examination { subject, checks });
    }
    let node = Arc::new(started?);
    report.plugin = Some(node.plugin_details());
    report.metadata = Some(node.metadata());
    report.nics = node.nics();
    if report.nics.is_empty() {
        fail!("plugin {} finds no network device", node.plugin());
    }
    if args.no_probe {
        return agree(report, None, "an engine starts; a transfer was not tried (--no-probe)".to_owned());
    }
    let memory = memory(args, report.doctor.as_ref(), &node);
    memory.prepare_process()?;
    let (proof, network) = probe::loopback(&node, memory).context("the loop-back transfer failed")?;
    let mut verdict = format!("WORKING: 1 MiB of {memory} memory written and read back over {}, every byte correct", proof.path);
    if !network.has(carrier(&node.plugin())) {
        let alone = if memory == Kind::Host { ", which carries GPU memory alone" } else { "" };
        verdict += &format!("; not over {}{alone}", node.plugin());
    }
    report.proof = Some(proof);
    let on_one_host = probe::within_host(&node, memory).context("on one host")?;
    report.within_host = Some(within_host(&on_one_host, memory));
    let mut judged = match args.require.as_ref().and_then(Requirement::wants_network) {
        Some(false) => on_one_host,
        _ => network.clone(),
    };
    if let Some(address) = &args.peer {
        let all = with_peer(&node, address, memory).context(format_args!("with {address}"))?;
        judged = Carried::default();
        all.iter().for_each(|measured| judged.merge(&measured.carried));
        let rows: Vec<Row> = all.into_iter().map(|measured| measured.row).collect();
        let rates: Vec<String> = rows.iter().map(|row| format!("{} {:.3} GB/s", row.op, row.gbytes_per_s)).collect();
        verdict += &format!("; with {address}: {} of {memory} memory over {judged}, every byte correct", rates.join(", "));
        report.peer = Some(rows);
    }
    if let Some(wanted) = args.require.as_ref().filter(|wanted| !judged.meets(wanted)) {
        fail!("bytes of {memory} memory took {judged}, and --require {wanted} forbids that");
    }
    agree(report, (memory != Kind::Host).then_some((memory, &network)), verdict)
}

/// The verdict, unless the checks of --doctor contradict it. `moved`: what carried GPU memory, if some was moved.
fn agree(report: &Report, moved: Option<(Kind, &Carried)>, verdict: String) -> Result<String> {
    let Some(Examination { subject, checks }) = &report.doctor else { return Ok(verdict) };
    match (doctor::conclusion(*subject, checks), moved) {
        (Err(missing), _) => fail!("{missing}. Without it: {verdict}"),
        (Ok(met), Some((memory, carried))) if subject.carrier().is_some_and(|carrier| !carried.is_all(carrier)) => {
            fail!("{met}, but {memory} memory went over {carried}")
        }
        (Ok(met), _) => Ok(format!("{verdict}; {met}")),
    }
}

/// Whether data between processes on this host bypasses the network, as text.
fn within_host(carried: &Carried, memory: Kind) -> String {
    match (carried.has(DIRECT) || carried.has(NVLINK), memory) {
        (true, _) => {
            format!("direct transfers of {memory} memory between processes of one user (UCCL_P2P_DISABLE_IPC=1 disables them)")
        }
        (false, Kind::Gpu) => {
            "not tested: inside of one process GPU memory uses channels (tcpx-perf demo --memory gpu tests two processes)"
                .to_owned()
        }
        (false, _) => {
            format!(
                "{memory} memory uses {carried} even between processes on this host (UCCL_P2P_LOG_LEVEL=info logs the reason)"
            )
        }
    }
}

/// The kind of memory to move.
fn memory(args: &Args, doctor: Option<&Examination>, node: &Node) -> Kind {
    let foreign = node.plugin_details().path.is_some();
    match args.memory {
        Some(memory) => memory,
        None if api::emulation_is_on() => Kind::Emulated,
        None if doctor.is_some_and(|doctor| doctor.subject.carrier().is_some()) && foreign && cuda::count() > 0 => Kind::Gpu,
        None => Kind::Host,
    }
}

/// Writes to another host and reads back, with contents checked.
fn with_peer(node: &Arc<Node>, address: &str, memory: Kind) -> Result<Vec<Measured>> {
    let mut client = Client::connect(node, address, memory)?;
    let options = Options {
        iters: Some(20),
        warmup: Some(5),
        budget: Duration::from_secs(1),
        verify: true,
        wait: true,
        notify: 0,
        time: None,
        progress: false,
    };
    let case = |op| Case { op, total: 16 << 20, block: 1 << 20, inflight: 1, bidirectional: false };
    let rows = [Op::Write, Op::Read].map(|op| measure(&mut client, &case(op), &options, &Watcher::none()));
    client.bye();
    rows.into_iter().collect()
}

/// The report, line by line: a title and a text each.
fn text(report: &Report, settings: bool) -> String {
    let mut lines = vec![("verdict", report.verdict.clone()), ("library", format!("uccl-tcpx {}", report.version))];
    lines.extend(devices(report));
    if let Some(proof) = &report.proof {
        lines.push((
            "proof",
            format!(
                "{} bytes verified, {:.0} us for write and read, over {}",
                proof.verified_bytes, proof.elapsed_us, proof.path
            ),
        ));
    }
    lines.extend(report.within_host.iter().map(|within_host| ("on one host", within_host.clone())));
    for row in report.peer.iter().flatten() {
        lines.push(("peer", row.line().trim().to_owned()));
    }
    lines.extend(if settings { all_settings(report) } else { settings_in_effect(report) });
    let variables =
        |title, found: &[Variable]| -> Vec<Line> { found.iter().map(|v| (title, format!("{}={}", v.name, v.value))).collect() };
    if settings {
        lines.extend(variables("passed to the plugin", &report.environment.passed_through));
    }
    if !report.environment.unknown.is_empty() {
        lines.extend(variables("UNKNOWN", &report.environment.unknown));
        lines.push(("warning", "no program here reads the UNKNOWN variables: check their spelling".to_owned()));
    }
    let mut out: String = lines.iter().map(|(name, value)| format!("{name:<20} {value}\n")).collect();
    if let Some(Examination { subject, checks }) = &report.doctor {
        out += "\n";
        out += &doctor::text(*subject, checks);
    }
    out
}

type Line = (&'static str, String);

/// Plugin, address, NICs and GPUs.
fn devices(report: &Report) -> Vec<Line> {
    let plugin = report.plugin.as_ref().map_or("none".to_owned(), |p| {
        format!("{}, {}, NCCL net ABI v{}", p.name, p.path.as_deref().unwrap_or("built in"), p.abi_version)
    });
    let mut lines = vec![("plugin", plugin)];
    lines.extend(report.metadata.iter().map(|metadata| ("address", metadata.clone())));
    let count = |n: usize, none: &str| if n == 0 { none.to_owned() } else { n.to_string() };
    lines.push(("network devices", count(report.nics.len(), "none")));
    for nic in &report.nics {
        let numa = nic.numa_node.map_or("NUMA node unknown".to_string(), |n| format!("NUMA node {n}"));
        let speed = nic.speed_mbps.map_or("speed unknown".to_owned(), |speed| format!("{speed} Mbit/s"));
        let pci = nic.pci_path.as_deref().filter(|p| !p.is_empty()).unwrap_or("no PCI device");
        let memory = nic.pointers.join("+");
        lines.push(("", format!("{}: {speed}, {numa}, {pci}, memory: {memory} (plugin {})", nic.name, nic.plugin)));
    }
    if let Some(range) = report.settings.iter().find(|s| s.name == "UCCL_TCPX_PORT_RANGE" && s.source != "default") {
        lines.push(("data ports", format!("{} (UCCL_TCPX_PORT_RANGE)", range.value)));
    }
    lines.push(("GPUs", count(report.gpus.len(), "none (host memory works without)")));
    for gpu in &report.gpus {
        lines.push(("", gpu.pci.as_ref().map_or(gpu.name.clone(), |pci| format!("{} at {pci}", gpu.name))));
    }
    let congestion = report.congestion_control.as_ref();
    let congestion = congestion.map(|c| format!("{} (available: {})", c.default, c.available.join(", ")));
    lines.push(("congestion control", congestion.unwrap_or_else(|| "unknown".to_owned())));
    lines
}

fn settings_in_effect(report: &Report) -> Vec<Line> {
    let set = report.settings.iter().filter(|s| s.source != "default").map(|s| format!("{}={}", s.name, s.value));
    let set = set.collect::<Vec<_>>().join(" ");
    vec![("settings", format!("{} (--settings shows all)", if set.is_empty() { "defaults" } else { &set }))]
}

fn all_settings(report: &Report) -> Vec<Line> {
    let width = report.settings.iter().map(|s| s.name.len()).max().unwrap_or(0);
    let mut lines = vec![("settings", format!("{} (* set in the environment)", report.settings.len()))];
    for s in &report.settings {
        let mark = if s.source == "default" { ' ' } else { '*' };
        let value = if s.value.is_empty() { "(unset)" } else { &s.value };
        lines.push(("", format!("{mark} {:<width$} = {value:<12}  {}", s.name, s.doc)));
    }
    lines.push(("budgets", "what peers may take in a process with these limits".to_owned()));
    lines.extend(report.budgets.iter().map(|b| ("", format!("  {:<width$} = {:<12}  {}", b.name, b.number, b.counts))));
    lines
}
