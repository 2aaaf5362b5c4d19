//! tcpx-perf: measures transfers between two engines and checks the data.

use clap::{Args, Parser, Subcommand};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use tcpx_tools::api::{
    direct_is_off, emulation_is_on, listen_on_any_port, Node, BIND_VARIABLE, CHANNELS_VARIABLE, PORT_VARIABLE,
};
use tcpx_tools::carried::Carried;
use tcpx_tools::case::{Case, Op};
use tcpx_tools::cli::parse_requirement;
use tcpx_tools::client::Client;
use tcpx_tools::error::{Context, Result};
use tcpx_tools::interval::Meter;
use tcpx_tools::measure::{measure, random_seed, together, Measured, Options, Watcher};
use tcpx_tools::memory::Kind;
use tcpx_tools::report::{headline, write_csv, write_json, Row};
use tcpx_tools::units::{parse_size, show_size};
use tcpx_tools::{cuda, fail, out, say};
use tcpx_tools::{plot, server, suite};
use uccl_p2p::require::Requirement;

/// Measures transfers between two engines and checks the data.
///
/// GB/s is all bytes of a row by all its time, in 1e9 bytes per second; median is the rate of its median iteration. A row is marked
/// UNEVEN where the two differ by more than a fifth: some iterations took much longer than others. Gbit/s is the same as GB/s in 1e9
/// bits, ops/s the number of transfers (both directions, all clients) by all time. path says what carried the bytes,
/// from the counters of the connection: channels of a plugin (tcp, tcpx, tcpxo) by NIC, direct transfers between two processes on one
/// host (direct; nvlink between GPUs joined by NVLink), or control messages (eager, for small transfers).
///
/// Exit status: 0 if everything worked and every checked byte was correct, 1 if not, 2 for a wrong command line.
#[derive(Parser)]
#[command(version, name = "tcpx-perf")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Start both ends on this host and measure between them with contents checked: writes, reads, scattered blocks,
    /// notifications.
    Demo(DemoArgs),
    /// Serve clients until Ctrl-C. Prints the server's address, "ip:port", as the first line.
    Server(ServerArgs),
    /// Measure against a server.
    Client(ClientArgs),
}

#[derive(Args, Clone)]
struct Common {
    /// Kind of memory of the buffers, the same at client and server [default: host, or emulated if UCCL_TCPX_EMULATE_DEVICE is
    /// set].
    #[arg(short = 'm', long)]
    memory: Option<Kind>,
    /// GPU of the engine and of the buffers, by CUDA index; with `demo` the client's, and the server uses the next GPU if there is one.
    /// Implies --memory gpu unless that is given [default: the first].
    #[arg(short = 'g', long, value_parser = clap::value_parser!(i32).range(0..))]
    gpu: Option<i32>,
    /// Data channels of a connection [default: UCCL_TCPX_NUM_CHANNELS, else 4 for `demo` and the library's choice otherwise].
    #[arg(short = 'c', long, value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: Option<u16>,
    /// Address to bind the listening port to, or "any" [default: UCCL_TCPX_BIND].
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<String>,
}

/// Channels of a demo, unless an option or the environment sets them.
const DEMO_CHANNELS: u16 = 4;

#[derive(Args)]
struct ServerArgs {
    #[command(flatten)]
    common: Common,
    /// Port to listen on [default: UCCL_TCPX_OOB_PORT, else chosen by the system].
    #[arg(short = 'p', long)]
    port: Option<u16>,
    /// Exit when the first client has left.
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
    /// Clients that measure at once, each with its own engine and connection; a row is their sum.
    #[arg(short = 'P', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    clients: u32,
    /// Check contents, outside the timed part: fresh random pattern, poisoned destination, whole buffer compared at the receiver.
    #[arg(short = 'v', long)]
    verify: bool,
}

#[derive(Args)]
struct DemoArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    measuring: Measuring,
    /// Contents are always checked here; accepted for symmetry with `client`.
    #[arg(short = 'v', long)]
    verify: bool,
}

#[derive(Args, Clone)]
struct Measuring {
    /// Operation.
    #[arg(short = 'o', long)]
    op: Option<Op>,
    /// Bytes per transfer; suffixes K, M, G are powers of 1024 [default: 64M].
    #[arg(short = 's', long, value_parser = parse_size)]
    total: Option<u64>,
    /// Bytes per block; blocks smaller than the total are in random order at the server [default: one block].
    #[arg(short = 'b', long, value_parser = parse_size)]
    block: Option<u64>,
    /// Timed iterations [default: as many as fit into about a second].
    #[arg(short = 'n', long, value_parser = clap::value_parser!(u64).range(1..))]
    iters: Option<u64>,
    /// Untimed iterations before the timed ones [default: a tenth of the time].
    #[arg(short = 'w', long)]
    warmup: Option<u64>,
    /// Transfers in flight: an iteration starts this many and ends with the last of them.
    #[arg(short = 'q', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    inflight: u32,
    /// Also move the same amount in the other direction: a read with each write, a message with each message.
    #[arg(short = 'B', long)]
    bidirectional: bool,
    /// Block in the library until transfers have ended, instead of polling.
    #[arg(long)]
    wait: bool,
    /// Also send this many notifications with each batch of iterations, and check that their echoes return unchanged and in order.
    #[arg(long, default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(u32).range(0..=1024))]
    notify: u32,
    /// Measure the standard list of rows.
    #[arg(long, conflicts_with_all = ["op", "total", "block", "sweep"])]
    suite: bool,
    /// Measure each power of 2 in a range of sizes.
    #[arg(long, value_name = "FROM..TO", num_args = 0..=1, default_missing_value = "4K..64M", value_parser = parse_range, conflicts_with = "total")]
    sweep: Option<(u64, u64)>,
    /// Measure each row for this many seconds.
    #[arg(short = 't', long, value_name = "SECONDS", value_parser = parse_seconds, conflicts_with = "iters")]
    time: Option<Duration>,
    /// Print rate and latency to standard error at this interval, in seconds, while a row is measured, its warm-up included: of all
    /// clients together; how long a transfer stands if nothing moves.
    #[arg(short = 'i', long, value_name = "SECONDS", value_parser = parse_seconds)]
    interval: Option<Duration>,
    /// Fail (exit status 1) if a row is slower than this, in GB/s: all its bytes by all its time.
    #[arg(long, value_name = "GBPS")]
    expect_gbps: Option<f64>,
    /// Fail (exit status 1) if bytes of a row went another way, by the counters of the connection: tcpx, tcpxo, devmem, tcp, direct, nvlink,
    /// several joined by |, and nics>=N, separated by commas as in UCCL_TCPX_REQUIRE. `demo` leaves out what cannot go that way:
    /// channels or direct transfers.
    #[arg(short = 'r', long, value_name = "PATH", value_parser = parse_requirement)]
    require: Option<Requirement>,
    /// Write the rows to this file as CSV; - is standard output.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write the rows to this file as JSON; - is standard output.
    #[arg(short = 'j', long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the rows into this file as SVG: GB/s and latency over size.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl Common {
    fn memory(&self) -> Kind {
        self.memory.unwrap_or_else(|| match self.gpu {
            Some(_) => Kind::Gpu,
            None if emulation_is_on() => Kind::Emulated,
            None => Kind::Host,
        })
    }

    /// Passes the options to the engine through the environment. Call it before threads exist.
    fn prepare_process(&self) -> Result<Kind> {
        if let Some(bind) = &self.bind {
            std::env::set_var(BIND_VARIABLE, bind);
        }
        if let Some(channels) = self.channels {
            std::env::set_var(CHANNELS_VARIABLE, channels.to_string());
        }
        let memory = self.memory();
        memory.prepare_process()?;
        if let Some(gpu) = self.gpu.or((memory == Kind::Gpu).then_some(0)) {
            cuda::choose(gpu);
        }
        Ok(memory)
    }
}

impl Measuring {
    /// The requested rows; `default_rows` if none are named.
    fn cases(&self, default_rows: fn() -> Vec<Case>) -> Vec<Case> {
        let named = self.op.is_some() || self.total.is_some() || self.block.is_some();
        let sized = |total| Case {
            op: self.op.unwrap_or(Op::Write),
            total,
            block: self.block.unwrap_or(total).min(total),
            inflight: 1,
            bidirectional: false,
        };
        let mut cases = match (self.suite, named) {
            _ if self.sweep.is_some() => {
                let (from, to) = self.sweep.unwrap_or_default();
                (0..63).map(|power| 1 << power).filter(|size| (from..=to).contains(size)).map(sized).collect()
            }
            (true, _) => suite::suite(),
            (false, true) => vec![sized(self.total.unwrap_or(64 << 20))],
            (false, false) => default_rows(),
        };
        for case in &mut cases {
            case.inflight = self.inflight;
            case.bidirectional = self.bidirectional;
        }
        cases
    }

    fn options(&self, verify: bool, budget: Duration) -> Options {
        Options {
            iters: self.iters,
            warmup: self.warmup,
            budget,
            verify,
            wait: self.wait,
            notify: self.notify,
            time: self.time,
            progress: self.interval.is_none(),
        }
    }

    /// Whether standard output carries JSON or CSV: the table then goes to standard error.
    fn for_programs(&self) -> bool {
        [&self.json, &self.csv].into_iter().flatten().any(|path| path.as_os_str() == "-")
    }

    /// Prints a line of the table.
    fn print(&self, line: &str) {
        if self.for_programs() {
            eprintln!("{line}");
        } else {
            say!("{line}");
        }
    }

    /// Measures the cases and prints each row when it is done; appends what was measured, also before an error.
    fn measure(&self, clients: &mut [Client], cases: &[Case], options: &Options, all: &mut Vec<Measured>) -> Result<()> {
        out::stop_on_interrupt();
        self.print(&headline());
        for case in cases {
            match measure_all(clients, case, options, self.interval) {
                Ok(measured) => {
                    self.print(&measured.row.line());
                    all.push(measured);
                }
                Err(_) if out::is_stopping() => {}
                Err(e) => return Err(e),
            }
            if out::is_stopping() {
                break;
            }
        }
        Ok(())
    }

    /// Writes the files, then judges. Files get the rows measured so far even if a later row failed or the user stopped.
    fn conclude(&self, all: &[Measured], result: Result<()>) -> Result<()> {
        let rows: Vec<Row> = all.iter().map(|measured| measured.row.clone()).collect();
        if let Some(path) = &self.json {
            write_json(path, &rows)?;
        }
        if let Some(path) = &self.csv {
            write_csv(path, &rows)?;
        }
        if let Some(path) = self.plot.as_ref().filter(|_| !rows.is_empty()) {
            plot::write_svg(path, &rows)?;
        }
        result?;
        if let Some(wanted) = &self.require {
            if let Some(other) = all.iter().find(|measured| !measured.carried.meets(wanted)) {
                fail!("{}: its bytes took {}, and --require {wanted} forbids that", other.row.name(), other.row.path);
            }
        }
        if let Some(expected) = self.expect_gbps {
            if let Some(slow) = rows.iter().find(|row| row.gbytes_per_s < expected) {
                fail!("{}: {:.3} GB/s, expected at least {expected}", slow.name(), slow.gbytes_per_s);
            }
        }
        Ok(())
    }
}

/// One row, measured by all clients at once, with lines about it to standard error.
fn measure_all(clients: &mut [Client], case: &Case, options: &Options, interval: Option<Duration>) -> Result<Measured> {
    let Some(every) = interval else { return measure_together(clients, case, options, None) };
    let meter = Meter::new(case, clients.iter().map(|client| client.link.clone()).collect());
    meter.watch(every, || measure_together(clients, case, options, Some(&meter)))
}

fn measure_together(clients: &mut [Client], case: &Case, options: &Options, meter: Option<&Meter>) -> Result<Measured> {
    if let [client] = clients {
        let watcher = Watcher { meter: meter.map(|meter| (meter, 0)), ..Watcher::none() };
        return measure(client, case, options, &watcher);
    }
    // A client that fails before the timed part must still arrive at the barrier, or the others would wait forever.
    let (barrier, options) = (&Barrier::new(clients.len()), &Options { progress: false, ..*options });
    let results: Vec<Result<Measured>> = std::thread::scope(|scope| {
        let one = |(number, client)| {
            scope.spawn(move || {
                let arrived = std::cell::Cell::new(false);
                let ready = || {
                    arrived.set(true);
                    barrier.wait();
                };
                let watcher = Watcher { ready: &ready, meter: meter.map(|meter| (meter, number)) };
                let measured = measure(client, case, options, &watcher);
                if !arrived.get() {
                    barrier.wait();
                }
                measured
            })
        };
        let threads: Vec<_> = clients.iter_mut().enumerate().map(one).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(tcpx_tools::error::Failure::new("a client panicked"))))
            .collect()
    });
    match together(results.into_iter().collect::<Result<Vec<_>>>()?) {
        Some(sum) => Ok(sum),
        None => fail!("no client measured"),
    }
}

/// Parses "FROM..TO", two sizes.
fn parse_range(text: &str) -> std::result::Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or_else(|| format!("'{text}' is not a range: write FROM..TO, such as 4K..64M"))?;
    match (parse_size(from)?, parse_size(to)?) {
        (from, to) if from.next_power_of_two() <= to => Ok((from, to)),
        _ => Err(format!("no power of 2 lies in '{text}'")),
    }
}

/// Parses seconds, with fractions.
fn parse_seconds(text: &str) -> std::result::Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("'{text}' is not a number of seconds from 0.01 to 86400")),
    }
}

fn main() -> ExitCode {
    let result = match tcpx_tools::cli::parse::<Cli>().command {
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

fn run_server(args: &ServerArgs) -> Result<()> {
    if let Some(port) = args.port {
        std::env::set_var(PORT_VARIABLE, port.to_string());
    }
    let memory = args.common.prepare_process()?;
    let node = Arc::new(Node::start()?);
    out::stop_on_interrupt();
    let watched = node.clone();
    std::thread::spawn(move || {
        while !out::is_stopping() {
            std::thread::sleep(Duration::from_millis(50));
        }
        watched.stop_accept();
    });
    say!("{}", address(&node));
    if node.metadata().contains(',') {
        say!("with its other addresses, for clients that cannot reach that one: {}", node.metadata());
    }
    if !args.once {
        eprintln!("serving {memory} memory; Ctrl-C ends");
    }
    let clients = server::serve(&node, memory, args.once, out::stopping())?;
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
    let client = |_| Client::connect(&Arc::new(Node::start()?), &args.address, memory);
    let mut clients = (0..args.clients).map(client).collect::<Result<Vec<_>>>()?;
    let default_rows = || vec![Case { op: Op::Write, total: 64 << 20, block: 64 << 20, inflight: 1, bidirectional: false }];
    let (mut all, cases) = (Vec::new(), args.measuring.cases(default_rows));
    let options = args.measuring.options(args.verify, Duration::from_secs(1));
    let result = args.measuring.measure(&mut clients, &cases, &options, &mut all);
    let concluded = args.measuring.conclude(&all, result);
    clients.iter().for_each(Client::bye);
    concluded
}

/// One half of a demo: what its heading says, and how its client's engine starts.
struct Half {
    title: &'static str,
    start: fn() -> Result<Node>,
    default_rows: fn() -> Vec<Case>,
}

/// The halves that can do what is required: the first shows what two hosts do, the second what two processes on one host do by default.
fn halves(required: Option<&Requirement>) -> Result<Vec<Half>> {
    let network = Half {
        title: "over channels, as between two hosts (UCCL_P2P_DISABLE_IPC=1)",
        start: Node::start_for_the_network,
        default_rows: suite::demo,
    };
    let host = Half { title: "on one host, as by default", start: Node::start, default_rows: suite::demo_on_one_host };
    match (required.and_then(Requirement::wants_network), direct_is_off()) {
        (Some(false), true) => fail!("UCCL_P2P_DISABLE_IPC=1 forbids direct transfers, which --require asks for"),
        (Some(false), false) => Ok(vec![host]),
        (None, false) => Ok(vec![network, host]),
        _ => Ok(vec![network]),
    }
}

fn run_demo(args: &DemoArgs) -> Result<()> {
    let started = Instant::now();
    listen_on_any_port();
    let mut common = args.common.clone();
    if common.channels.is_none() && std::env::var_os(CHANNELS_VARIABLE).is_none() {
        common.channels = Some(DEMO_CHANNELS);
    }
    let memory = common.prepare_process()?;
    let (mut all, mut notified, mut result) = (Vec::new(), (0, 0), Ok(()));
    for half in halves(args.measuring.require.as_ref())? {
        match run_half(args, &half, memory, &mut all) {
            Ok((count, bytes)) => notified = (notified.0 + count, notified.1 + bytes),
            // The signal ends the server process, too.
            Err(_) if out::is_stopping() => {}
            Err(e) => result = Err(e),
        }
        if out::is_stopping() || result.is_err() {
            break;
        }
    }
    args.measuring.conclude(&all, result)?;
    if out::is_stopping() {
        return Ok(());
    }
    let mut carried = Carried::default();
    all.iter().for_each(|measured| carried.merge(&measured.carried));
    let verified: u64 = all.iter().map(|measured| measured.row.verified_bytes).sum();
    let line = format!(
        "proved: {verified} bytes compared in {} rows and {} notifications ({}) echoed in order, no difference; {memory} memory, two processes, \
         over {carried}; {:.1} s",
        all.len(),
        notified.0,
        show_size(notified.1),
        started.elapsed().as_secs_f64()
    );
    args.measuring.print(&line);
    Ok(())
}

/// Measures one half of a demo against a server process of its own; appends its rows. Returns the notifications that were echoed, and
/// their bytes.
fn run_half(args: &DemoArgs, half: &Half, memory: Kind, all: &mut Vec<Measured>) -> Result<(usize, u64)> {
    let (mut server, address) = ServerProcess::start(memory, args.common.gpu.unwrap_or(0))?;
    let node = Arc::new((half.start)()?);
    let mut client = Client::connect(&node, &address, memory)?;
    args.measuring.print(&format!("{}: server process {} at {address}, {memory} memory", half.title, server.child.id()));
    let options = args.measuring.options(true, Duration::from_millis(700));
    args.measuring.measure(std::slice::from_mut(&mut client), &args.measuring.cases(half.default_rows), &options, all)?;
    if out::is_stopping() {
        return Ok((0, 0));
    }
    let lengths = suite::demo_notifications();
    let notified = client.echo(&lengths, random_seed()?).context("notifications")?;
    client.bye();
    server.finish()?;
    Ok((lengths.len(), notified))
}

/// The server process of a demo; killed if the demo ends early.
struct ServerProcess {
    child: Child,
}

impl ServerProcess {
    /// Starts this program as server; it inherits the environment and with it the options. Returns it and its address.
    fn start(memory: Kind, client_gpu: i32) -> Result<(ServerProcess, String)> {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut command = Command::new(program);
        command.args(["server", "--once", "--memory", &memory.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped());
        if memory == Kind::Gpu {
            command.args(["--gpu", &((client_gpu + 1) % cuda::count().max(1)).to_string()]);
        }
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

    /// Waits for the server to exit.
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
            // It may just have exited; then there is nothing to kill.
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

    /// Letters mean the same with every command, and the same as the long options.
    #[test]
    fn letters_stand_for_options() {
        let measuring = |line: &str| match Cli::parse_from(line.split(' ')).command {
            Task::Client(args) => (args.measuring, args.common, args.clients, args.verify),
            _ => panic!("not a client"),
        };
        let (short, common, clients, verify) =
            measuring("tcpx-perf client a:1 -m host -g 2 -c 3 -P 4 -v -o read -s 1M -b 4K -q 5 -B -w 6 -n 7 -i 0.5 -r tcp -j -");
        let long = "--op read --total 1M --block 4K --inflight 5 --bidirectional --warmup 6 --iters 7 --interval 0.5 --require tcp --json -";
        let (long, ..) = measuring(&format!("tcpx-perf client a:1 {long}"));
        let all = |m: &Measuring| (m.cases(suite::demo), m.iters, m.warmup, m.interval, m.require.clone(), m.json.clone());
        assert_eq!(all(&short), all(&long));
        assert_eq!((common.memory, common.gpu, common.channels, clients, verify), (Some(Kind::Host), Some(2), Some(3), 4, true));
        assert_eq!(measuring("tcpx-perf client a:1 -t 9").0.time, Some(Duration::from_secs(9)));
        assert!(matches!(Cli::parse_from(["tcpx-perf", "server", "-p", "7", "-g", "1"]).command,
            Task::Server(args) if args.port == Some(7) && args.common.gpu == Some(1)));
    }

    /// Every command line in code blocks of the documentation is one.
    #[test]
    fn examples_of_the_documentation_parse() {
        let root = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let mut pages = vec![root.join("README.md")];
        let docs = std::fs::read_dir(root.join("docs")).expect("docs").flatten().map(|entry| entry.path());
        pages.extend(docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
        let mut examples = 0;
        for page in pages {
            let text = std::fs::read_to_string(&page).expect("a page");
            for block in text.split("```").skip(1).step_by(2) {
                for line in block.lines().filter_map(|line| line.split_once("tcpx-perf ").map(|(_, rest)| rest)) {
                    let line = line.split(['#', '&', ';', '>', '|', '"', ')']).next().unwrap_or_default();
                    let line = line.replace("$gpu", "0").replace("$op", "write");
                    if !["demo", "server", "client"].iter().any(|task| line.starts_with(task)) || line.contains("...") {
                        continue;
                    }
                    let words = std::iter::once("tcpx-perf").chain(line.split_whitespace().filter(|&word| word != "\\"));
                    if let Err(e) = Cli::try_parse_from(words) {
                        panic!("{}: tcpx-perf {line}: {e}", page.display());
                    }
                    examples += 1;
                }
            }
        }
        assert!(examples > 10, "only {examples} examples were found");
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
