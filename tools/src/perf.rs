//! tcpx-perf: measures transfers between two engines and checks what they moved.

use clap::{Args, Parser, Subcommand};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tcpx_tools::api::{emulation_is_on, listen_on_any_port, Node, CHANNELS_VARIABLE};
use tcpx_tools::client::Client;
use tcpx_tools::error::{Context, Result};
use tcpx_tools::measure::{measure, random_seed, Case, Op, Options};
use tcpx_tools::memory::Kind;
use tcpx_tools::report::{headline, write_json, Row};
use tcpx_tools::units::{parse_size, show_size};
use tcpx_tools::{cuda, fail};
use tcpx_tools::{plot, server, suite};

/// Measures transfers between two engines and checks what they moved.
///
/// Exit status: 0 when everything worked and every checked byte was right, 1 when not, 2 for a wrong command line.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Starts both ends on this host and measures between them, contents checked: writes, reads, scattered blocks, notifications.
    Demo(DemoArgs),
    /// Serves clients until Ctrl-C. Prints its address, "ip:port", as the first line.
    Server(ServerArgs),
    /// Measures against a server.
    Client(ClientArgs),
}

#[derive(Args, Clone)]
struct Common {
    /// Memory of the buffers; the same on both sides [default: host, or emulated where UCCL_TCPX_EMULATE_DEVICE is set].
    #[arg(long)]
    memory: Option<Kind>,
    /// GPU of the buffers, by CUDA index; with `demo` that of the client, the server takes the next one where there are several.
    #[arg(long, default_value_t = 0)]
    gpu: i32,
    /// Data channels of a connection [default: UCCL_TCPX_NUM_CHANNELS, else 4 for `demo` and the library's choice for the others].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: Option<u16>,
}

/// Channels of a demo, where neither option nor environment tells.
const DEMO_CHANNELS: u16 = 4;

#[derive(Args)]
struct ServerArgs {
    #[command(flatten)]
    common: Common,
    /// End when the first client has left.
    #[arg(long)]
    once: bool,
}

#[derive(Args)]
struct ClientArgs {
    /// Address that the server printed.
    address: String,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    measuring: Measuring,
    /// Check contents, outside the timed region: fresh random pattern, poisoned target, the whole buffer compared where it arrived.
    #[arg(long)]
    verify: bool,
}

#[derive(Args)]
struct DemoArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    measuring: Measuring,
    /// Contents are always checked here; accepted for symmetry with `client`.
    #[arg(long)]
    verify: bool,
}

#[derive(Args, Clone)]
struct Measuring {
    /// Operation.
    #[arg(long)]
    op: Option<Op>,
    /// Bytes of a transfer; suffixes K, M, G are powers of 1024 [default: 64M].
    #[arg(long, value_parser = parse_size)]
    total: Option<u64>,
    /// Bytes of a block; blocks smaller than the total lie in random order at the server [default: one block].
    #[arg(long, value_parser = parse_size)]
    block: Option<u64>,
    /// Timed iterations [default: as many as fit about a second].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    iters: Option<u64>,
    /// Iterations before the timed ones [default: a tenth of the time].
    #[arg(long)]
    warmup: Option<u64>,
    /// Transfers in flight: an iteration starts this many and ends with the last of them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    inflight: u32,
    /// Move the same amount the other way at the same time: a read beside each write, a message beside each message.
    #[arg(long)]
    bidirectional: bool,
    /// Block in the library until transfers have ended, instead of polling.
    #[arg(long)]
    wait: bool,
    /// Measure the standard list of rows.
    #[arg(long, conflicts_with_all = ["op", "total", "block"])]
    suite: bool,
    /// Write the rows to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the rows into this file as SVG: GB/s over block size.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl Common {
    fn memory(&self) -> Kind {
        self.memory.unwrap_or_else(|| if emulation_is_on() { Kind::Emulated } else { Kind::Host })
    }

    /// Puts the options where the engine reads them. To be called before there are threads.
    fn prepare_process(&self) -> Result<Kind> {
        if let Some(channels) = self.channels {
            std::env::set_var(CHANNELS_VARIABLE, channels.to_string());
        }
        cuda::choose(self.gpu);
        self.memory().prepare_process()?;
        Ok(self.memory())
    }
}

impl Measuring {
    /// The rows asked for; `default_rows` when none are named.
    fn cases(&self, default_rows: fn() -> Vec<Case>) -> Vec<Case> {
        let named = self.op.is_some() || self.total.is_some() || self.block.is_some();
        let mut cases = match (self.suite, named) {
            (true, _) => suite::suite(),
            (false, true) => {
                let total = self.total.unwrap_or(64 << 20);
                vec![Case {
                    op: self.op.unwrap_or(Op::Write),
                    total,
                    block: self.block.unwrap_or(total).min(total),
                    inflight: 1,
                    bidirectional: false,
                }]
            }
            (false, false) => default_rows(),
        };
        for case in &mut cases {
            case.inflight = self.inflight;
            case.bidirectional = self.bidirectional;
        }
        cases
    }

    fn options(&self, verify: bool, budget: Duration) -> Options {
        Options { iters: self.iters, warmup: self.warmup, budget, verify, wait: self.wait, progress: true }
    }

    /// Measures all cases, printing each row as it is there; files get what was measured even when a later row fails.
    fn run(&self, client: &mut Client, cases: &[Case], options: &Options) -> Result<Vec<Row>> {
        println!("{}", headline());
        let mut rows = Vec::new();
        let mut result = Ok(());
        for case in cases {
            match measure(client, case, options) {
                Ok(row) => {
                    println!("{}", row.line());
                    rows.push(row);
                }
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
        }
        if let Some(path) = &self.json {
            write_json(path, &rows)?;
        }
        if let Some(path) = self.plot.as_ref().filter(|_| !rows.is_empty()) {
            plot::write_svg(path, &rows)?;
        }
        result.map(|()| rows)
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Server(args) => run_server(&args),
        Task::Client(args) => run_client(&args),
        Task::Demo(args) => run_demo(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

static STOPPING: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_signal: libc::c_int) {
    STOPPING.store(true, Ordering::Release);
}

fn run_server(args: &ServerArgs) -> Result<()> {
    let memory = args.common.prepare_process()?;
    let node = Arc::new(Node::start()?);
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is safe in a signal handler.
        unsafe { libc::signal(signal, on_interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
    let watched = node.clone();
    std::thread::spawn(move || {
        while !STOPPING.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(50));
        }
        watched.stop_accept();
    });
    println!("{}", address(&node));
    if !args.once {
        eprintln!("serving {memory} memory through plugin {}; Ctrl-C ends", node.plugin());
    }
    let clients = server::serve(&node, memory, args.once, &STOPPING)?;
    if !args.once {
        eprintln!("served {clients} client{}", if clients == 1 { "" } else { "s" });
    }
    Ok(())
}

/// "ip:port" of an engine.
fn address(node: &Node) -> String {
    let metadata = node.metadata();
    metadata.split('?').next().unwrap_or(&metadata).to_string()
}

fn run_client(args: &ClientArgs) -> Result<()> {
    listen_on_any_port();
    let memory = args.common.prepare_process()?;
    let node = Arc::new(Node::start()?);
    let mut client = Client::connect(&node, &args.address, memory)?;
    let default_rows = || vec![Case { op: Op::Write, total: 64 << 20, block: 64 << 20, inflight: 1, bidirectional: false }];
    let rows = args.measuring.run(
        &mut client,
        &args.measuring.cases(default_rows),
        &args.measuring.options(args.verify, Duration::from_secs(1)),
    );
    client.bye();
    rows.map(|_| ())
}

fn run_demo(args: &DemoArgs) -> Result<()> {
    let started = Instant::now();
    listen_on_any_port();
    let mut common = args.common.clone();
    if common.channels.is_none() && std::env::var_os(CHANNELS_VARIABLE).is_none() {
        common.channels = Some(DEMO_CHANNELS);
    }
    let memory = common.prepare_process()?;
    let (mut server, address) = ServerProcess::start(memory, common.gpu)?;
    let node = Arc::new(Node::start()?);
    let mut client = Client::connect(&node, &address, memory)?;
    println!(
        "server process {} at {address}, {memory} memory, plugin {}, {} channels",
        server.child.id(),
        node.plugin(),
        client.link.channels()
    );
    let rows = args.measuring.run(
        &mut client,
        &args.measuring.cases(suite::demo),
        &args.measuring.options(true, Duration::from_millis(700)),
    )?;
    let lengths = suite::demo_notifications();
    let notified = client.echo(&lengths, random_seed()?).context("notifications")?;
    client.bye();
    let (channels, plugin) = (client.link.channels(), node.plugin());
    server.finish()?;
    let verified: u64 = rows.iter().map(|row| row.verified_bytes).sum();
    println!(
        "proved: {verified} bytes compared in {} rows and {} notifications ({}) echoed in order, no difference; {memory} memory, {channels} channels, \
         plugin {plugin}, two processes, {:.1} s",
        rows.len(),
        lengths.len(),
        show_size(notified),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The other end of a demo; killed when the demo ends early.
struct ServerProcess {
    child: Child,
}

impl ServerProcess {
    /// Starts this program as server; it inherits the environment, and with it the options. Returns it and its address.
    fn start(memory: Kind, client_gpu: i32) -> Result<(ServerProcess, String)> {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut command = Command::new(program);
        let gpu = if memory == Kind::Gpu { (client_gpu + 1) % cuda::count().max(1) } else { 0 };
        command
            .args(["server", "--once", "--memory", &memory.to_string(), "--gpu", &gpu.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        // SAFETY: prctl is a plain system call, safe between fork and exec; it makes the server end with this process.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let mut child = command.spawn().context("cannot start the server process")?;
        let Some(stdout) = child.stdout.take() else { fail!("the server process has no standard output") };
        let mut server = ServerProcess { child };
        let mut address = String::new();
        BufReader::new(stdout).read_line(&mut address).context("cannot read the server's address")?;
        if address.trim().is_empty() {
            let status = server.child.wait().context("cannot wait for the server process")?;
            fail!("the server process ended before it printed its address ({status}); its own message is above");
        }
        Ok((server, address.trim().to_string()))
    }

    /// Waits for the server to end by itself.
    fn finish(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.child.try_wait().context("cannot wait for the server process")? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => fail!("the server process ended with {status}"),
                None if Instant::now() > deadline => fail!("the server process did not end within 10 s after the last request"),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // It may just have ended by itself; then there is nothing to kill.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_make_cases() {
        let cases = |line: &str| match Cli::parse_from(line.split(' ')).command {
            Task::Demo(args) => args.measuring.cases(suite::demo),
            _ => panic!("not a demo"),
        };
        assert_eq!(cases("tcpx-perf demo"), suite::demo());
        assert_eq!(cases("tcpx-perf demo --suite"), suite::suite());
        let one = cases("tcpx-perf demo --op read --total 1M --block 4K --inflight 3 --bidirectional");
        assert_eq!(one, [Case { op: Op::Read, total: 1 << 20, block: 4096, inflight: 3, bidirectional: true }]);
        assert_eq!(cases("tcpx-perf demo --total 1M --block 2M")[0].block, 1 << 20);
        assert!(Cli::try_parse_from(["tcpx-perf", "demo", "--suite", "--op", "read"]).is_err());
        assert!(Cli::try_parse_from(["tcpx-perf", "client"]).is_err());
    }
}
