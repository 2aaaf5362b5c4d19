//! Runs the two programs as a user does: what must work exits 0 and says so, what must fail exits with another status and says why.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use tcpx_tools::report::Row;

const PERF: &str = env!("CARGO_BIN_EXE_tcpx-perf");
const INFO: &str = env!("CARGO_BIN_EXE_tcpx-info");
const TOP: &str = env!("CARGO_BIN_EXE_tcpx-top");

fn run(program: &str, line: &str, variables: &[(&str, &str)]) -> Output {
    Command::new(program).args(line.split_whitespace()).envs(variables.iter().copied()).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn must_work(program: &str, line: &str, says: &str) -> String {
    let output = run(program, line, &[]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && out.contains(says), "{line}: {}\n{out}\n{err}", output.status);
    out
}

#[track_caller]
fn must_fail(program: &str, line: &str, variables: &[(&str, &str)], says: &str) {
    let output = run(program, line, variables);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(!output.status.success() && (out.contains(says) || err.contains(says)), "{line}: {}\n{out}\n{err}", output.status);
}

#[test]
fn demo_proves_host_memory_and_writes_its_files() {
    let folder = std::env::temp_dir().join(format!("tcpx-perf-test-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (json, svg) = (folder.join("rows.json"), folder.join("rows.svg"));
    let line = format!("demo --iters 3 --warmup 1 --channels 4 --json {} --plot {}", json.display(), svg.display());
    let out = must_work(PERF, &line, "no difference; host memory, ");
    assert!(!out.contains("not checked"), "{out}");
    let rows: Vec<Row> = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(rows.len(), tcpx_tools::suite::demo().len() + tcpx_tools::suite::demo_on_one_host().len());
    assert!(rows.iter().all(|row| row.verified && row.iters == 3 && row.gbytes_per_s > 0.0));
    assert!(std::fs::read_to_string(svg).unwrap().contains("write 64 MiB"));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn demo_proves_emulated_memory() {
    must_work(PERF, "demo --memory emulated --iters 3 --warmup 1", "no difference; emulated memory");
}

#[test]
fn odd_shapes_and_modes_bring_the_right_bytes() {
    for options in [
        "--op write --total 1000003 --block 4097 --inflight 3",
        "--op read --total 1000003 --block 4097 --inflight 3 --wait",
        "--op write --total 1M --block 32K --bidirectional",
        "--op send --total 1M --inflight 2 --bidirectional",
        "--op send --total 1M --block 1000",
        "--op read --total 1",
    ] {
        for memory in ["host", "emulated"] {
            must_work(PERF, &format!("demo --memory {memory} --iters 10 --warmup 2 {options}"), "no difference");
        }
    }
}

#[test]
fn info_proves_a_transfer_or_says_why_not() {
    must_work(INFO, "", "WORKING: 1 MiB of host memory written and read back over tcp ");
    assert!(must_work(INFO, "--no-probe", "was not tried").starts_with("verdict"));
    assert!(!must_work(INFO, "--no-probe", "--settings shows all").contains("Network plugin:"));
    let settings = must_work(INFO, "--no-probe --settings", "Network plugin:");
    assert!(settings.contains("budgets") && settings.contains("bytes of waiting notifications"), "{settings}");
    let report: serde_json::Value = serde_json::from_str(&must_work(INFO, "--json", "WORKING")).unwrap();
    assert_eq!(report["works"], true);
    assert!(!report["nics"].as_array().unwrap().is_empty());
    must_fail(INFO, "", &[("UCCL_TCPX_NUM_CHANNELS", "many")], "UCCL_TCPX_NUM_CHANNELS");
}

#[test]
fn a_probe_tells_ready_from_not_ready_and_from_wrong() {
    let answer = |variables: &[(&str, &str)]| {
        let output = run(INFO, "--ready", &[&[("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo")], variables].concat());
        (output.status.code().expect("it ends by itself"), text(&output.stdout).trim().to_owned())
    };
    assert_eq!(
        answer(&[("UCCL_TCPX_PLUGIN", "soft"), ("UCCL_TCPX_EMULATE_DEVICE", "1")]),
        (0, "READY: plugin TCPX-soft, NICs lo, simulated GPUs".to_owned())
    );
    let path = foreign().map(|path| path.display().to_string());
    for (variables, status, says) in [
        (vec![("UCCL_TCPX_REQUIRE", "tcp|direct,nics>=1")], 0, "READY: plugin TCPX-soft, NICs lo, "),
        (
            vec![("UCCL_TCPX_REQUIRE", "nics>=2")],
            1,
            "NOT READY: UCCL_TCPX_REQUIRE=nics>=2: nics>=2 is required, but channels use lo",
        ),
        (
            vec![("UCCL_TCPX_REQUIRE", "tcpx"), ("UCCL_TCPX_EMULATE_DEVICE", "1")],
            1,
            "tcpx is required, but memory takes tcp lo (an engine would use TCPX-soft)",
        ),
        (
            vec![("UCCL_TCPX_REQUIRE", "direct"), ("UCCL_P2P_DISABLE_IPC", "1")],
            1,
            "(no direct transfers: UCCL_P2P_DISABLE_IPC is set)",
        ),
        (vec![("UCCL_TCPX_PLUGIN_PATH", "/no/such/plugin.so")], 1, "NOT READY: /no/such/plugin.so"),
        (vec![("UCCL_TCPX_REQUIRE", "fast")], 2, "WRONG CONFIGURATION: UCCL_TCPX_REQUIRE=fast: 'fast': expected tcpx, "),
        (
            vec![("UCCL_TCPX_REQUIRE", "devmem"), ("UCCL_TCPX_EMULATE_DEVICE", "1")],
            1,
            "devmem is required, but memory takes tcp lo (an engine would use TCPX-soft)",
        ),
        (vec![("UCCL_TCPX_NUM_CHANNELS", "many")], 2, "WRONG CONFIGURATION: UCCL_TCPX_NUM_CHANNELS=many"),
        (vec![("UCCL_TCPX_AUTH_KEY_FILE", "/no/such/key")], 2, "WRONG CONFIGURATION: "),
        (vec![("UCCL_SOCKET_IFNAME", "=none7")], 2, "WRONG CONFIGURATION: no interface with a usable address matches"),
    ] {
        let (code, line) = answer(&variables);
        assert!(code == status && line.contains(says), "{variables:?}: {code}, {line}");
    }
    let Some(path) = path else {
        println!("SKIPPED: libnccl_net_strict_foreign.so is not built: cargo build -p strict-foreign-plugin");
        return;
    };
    // Without its receive manager the plugin cannot work; a simulated GPU needs none.
    let tcpx = [("UCCL_TCPX_PLUGIN_PATH", &*path), ("UCCL_TCPX_REQUIRE", "tcpx")];
    let (code, line) = answer(&tcpx);
    assert!(code == 1 && line.starts_with("NOT READY: "), "{code}, {line}");
    let simulated = answer(&[&tcpx[..], &[("UCCL_TCPX_EMULATE_DEVICE", "1")]].concat());
    assert_eq!(simulated, (0, "READY: plugin GPUDirectTCPX_v7, NICs lo, simulated GPUs".to_owned()));
    // Beside an engine that has the port and offers its statistics.
    let metrics = std::env::temp_dir().join(format!("tcpx-ready-{}", std::process::id()));
    let metrics = metrics.display().to_string();
    let both = [("UCCL_TCPX_OOB_PORT", "1"), ("UCCL_TCPX_METRICS", &*metrics)];
    assert_eq!(answer(&both).0, 0);
    assert!(!std::path::Path::new(&metrics).exists(), "the statistics are those of the running engine");
}

#[test]
fn fixed_ports_do_not_matter_and_what_cannot_work_fails_with_a_reason() {
    // The demo's two engines are not in each other's way when a port is fixed for services.
    let output = run(PERF, "demo --op write --iters 2 --warmup 1", &[("UCCL_TCPX_OOB_PORT", "1")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    must_fail(PERF, "client 127.0.0.1:1 --op write", &[], "cannot connect to 127.0.0.1:1");
    must_fail(PERF, "demo --total 0", &[], "must be larger than 0");
    must_fail(PERF, "demo --total 100000G --block 1G", &[], "too large");
    must_fail(PERF, "demo --total 1G --block 3", &[], "at most 1048576 segments");
    must_fail(PERF, "demo --total 1M --block 1 --inflight 1024", &[], "at most 4194304 are in flight");
    must_fail(PERF, "demo --op read --total 16000000000G --block 1 --bidirectional", &[], "at most 1048576 segments");
}

/// Ends the server when the test ends, however it ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_serves_several_clients_and_refuses_other_memory() {
    let mut child =
        Command::new(PERF).args(["server", "--memory", "host"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    let _server = Server(child);
    let mut address = String::new();
    BufReader::new(stdout).read_line(&mut address).unwrap();
    let address = address.trim();
    std::thread::scope(|scope| {
        for op in ["write", "read", "send"] {
            scope.spawn(move || {
                must_work(PERF, &format!("client {address} --op {op} --total 1M --iters 20 --verify"), "verified")
            });
        }
    });
    must_fail(PERF, &format!("client {address} --memory emulated"), &[], "both must use the same");
}

#[test]
fn rows_go_where_they_are_asked_to() {
    let line = |options: &str| format!("demo --iters 5 --warmup 1 --channels 2 {options}");
    let json = must_work(PERF, &line("--sweep 4K..32K --json -"), "\"congestion_control\"");
    let rows: Vec<Row> = serde_json::from_str(&json).expect("nothing but JSON");
    assert_eq!(rows.iter().map(|r| r.total_bytes >> 10).collect::<Vec<_>>(), [4, 8, 16, 32, 4, 8, 16, 32]);
    assert!(rows.iter().all(|r| !r.host.is_empty() && r.date.starts_with("20") && !r.version.is_empty() && r.min_us <= r.p50_us));
    let csv = must_work(PERF, &line("--op write --total 4K --csv -"), "op,memory,total_bytes");
    assert_eq!(csv.trim_end().lines().count(), 3, "{csv}");
    assert!(csv.lines().next().is_some_and(|names| names.contains(",path,path_bytes,")), "{csv}");
    must_fail(PERF, &line("--op write --expect-gbps 100000"), &[], "write host of 64 MiB in blocks of 64 MiB: ");
    must_work(PERF, &line("--op write --expect-gbps 0.0000001"), "verified");
}

#[test]
fn time_and_intervals_bound_a_row() {
    for op in ["write", "send"] {
        let line = format!("demo --op {op} --total 64K --time 1 --interval 0.2 --json -");
        let began = std::time::Instant::now();
        let output = run(PERF, &line, &[]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let rows: Vec<Row> = serde_json::from_slice(&output.stdout).unwrap();
        // What a row counts is the transfers alone; the time is that of the whole of it.
        assert!(
            began.elapsed().as_secs_f64() > 1.0 && rows[0].seconds > 0.0 && rows[0].iters > 1 && rows[0].cpu_s > 0.0,
            "{:?}",
            rows[0]
        );
        assert!(text(&output.stderr).lines().filter(|l| l.contains(" GB/s  p50")).count() >= 2, "{}", text(&output.stderr));
    }
}

#[test]
fn whoever_reads_no_more_ends_the_program_quietly() {
    for (program, line) in [(INFO, "--no-probe --settings"), (PERF, "demo --op write --iters 2"), (TOP, "--manual-page")] {
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(reader);
        let child = Command::new(program)
            .args(line.split_whitespace())
            .stdout(std::os::fd::OwnedFd::from(writer))
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let output = child.wait_with_output().unwrap();
        assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&output.status),
            Some(libc::SIGPIPE),
            "{line}: {}",
            output.status
        );
    }
}

#[test]
fn a_result_that_cannot_be_written_is_no_success() {
    for (program, line) in [(INFO, "--no-probe"), (PERF, "demo --op write --iters 2"), (TOP, "--manual-page")] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let output = Command::new(program).args(line.split_whitespace()).stdout(full).output().expect("the program starts");
        assert_eq!(output.status.code(), Some(1), "{line}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("standard output: No space left"), "{line}: {}", text(&output.stderr));
    }
}

#[test]
fn an_interrupt_tells_what_was_measured() {
    let mut child = Command::new(PERF)
        .args("demo --op write --total 1M --time 600 --interval 0.1 --json -".split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("GB/s  p50") || line.contains("warm-up") {
        line.clear();
        assert!(told.read_line(&mut line).unwrap() > 0, "it ended before it was interrupted");
    }
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
    let drain = std::thread::spawn(move || std::io::copy(&mut told, &mut std::io::sink()));
    let output = child.wait_with_output().unwrap();
    drain.join().unwrap().unwrap();
    assert!(output.status.success(), "{}", output.status);
    let rows: Vec<Row> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(rows.len() == 1 && rows[0].interrupted && rows[0].iters > 0, "{rows:?}");
}

/// A server on a chosen address and port, its statistics, several clients at once, tcpx-info's peer and tcpx-top.
#[test]
fn a_server_is_seen_from_everywhere() {
    let folder = std::env::temp_dir().join(format!("tcpx-top-test-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let metrics = format!("unix:{}", folder.join("metrics.sock").display());
    let svg = folder.join("top.svg");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child = Command::new(PERF)
        .args(["server", "--memory", "host", "--bind", "127.0.0.1", "--port", &port.to_string()])
        .env("UCCL_TCPX_METRICS", &metrics)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    let _server = Server(child);
    let mut address = String::new();
    BufReader::new(stdout).read_line(&mut address).unwrap();
    assert_eq!(address.trim(), format!("127.0.0.1:{port}"));
    let address = address.trim();
    // They measure until they were seen.
    let client = format!("client {address} --clients 3 --op write --total 1M --time 600 --verify --json -");
    let measuring = Command::new(PERF).args(client.split(' ')).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let seen = text(&run(TOP, &metrics, &[]).stdout);
        if seen.contains(" 3 connections") && ["kB/s", "MB/s", "GB/s"].iter().any(|unit| seen.contains(unit)) {
            must_work(TOP, &format!("--svg {} {metrics}", svg.display()), "");
            break;
        }
        assert!(std::time::Instant::now() < until, "{seen}");
    }
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(measuring.id() as libc::pid_t, libc::SIGINT) };
    let measured = measuring.wait_with_output().unwrap();
    assert!(measured.status.success(), "{}", measured.status);
    let rows: Vec<Row> = serde_json::from_slice(&measured.stdout).unwrap();
    assert!(rows.len() == 1 && rows[0].clients == 3 && rows[0].verified, "{rows:?}");
    let picture = std::fs::read_to_string(svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains(">resent<"), "{picture}");
    must_work(INFO, &format!("--memory host --peer {address}"), "every byte correct");
    must_fail(INFO, "--memory host --peer 127.0.0.1:1", &[], "with 127.0.0.1:1");
    must_fail(TOP, "unix:/nonexistent.sock", &[], "cannot connect");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn top_refuses_what_are_no_statistics() {
    for interval in ["nan", "inf", "0", "-1", "x"] {
        must_fail(TOP, &format!("--once --interval={interval} /dev/null"), &[], "from 0.1 to 3600");
    }
    must_fail(TOP, "/proc/version", &[], "/proc/version provides no statistics");
    must_fail(TOP, "/nonexistent/file", &[], "cannot read");
    // What a process has left that has ended.
    let folder = std::env::temp_dir().join(format!("tcpx-top-file-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("metrics.prom");
    std::fs::write(&path, "uccl_tcpx_uptime_seconds{engine=\"1\"} 9\n# EOF\n").unwrap();
    must_work(TOP, &path.display().to_string(), "engine 1: up 9 s");
    let hour = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(hour).unwrap();
    must_fail(TOP, &path.display().to_string(), &[], "its process has ended, or hangs");
    std::fs::remove_dir_all(&folder).unwrap();
}

/// The verdict and the exit status agree with the checks.
#[test]
fn the_doctor_says_what_is_missing() {
    for line in ["--doctor --memory host", "--doctor --no-probe"] {
        let output = run(INFO, line, &[]);
        let out = text(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{out}");
        assert!(out.starts_with("verdict              NOT WORKING: GPUDirect-TCPX cannot work here, missing: plugin"), "{out}");
        assert!(out.contains("MISSING  plugin") && out.contains("receive manager"), "{out}");
        assert!(
            out.ends_with(", net.core.optmem_max\n") || out.contains("\nGPUDirect-TCPX cannot work here, missing: plugin"),
            "{out}"
        );
    }
}

/// The strict foreign plugin, which names itself as GPUDirect-TCPX does.
fn foreign() -> Option<PathBuf> {
    let here = PathBuf::from(PERF);
    let folder = here.parent().expect("a folder");
    let found = ["libnccl_net_strict_foreign.so", "deps/libnccl_net_strict_foreign.so"].map(|name| folder.join(name));
    found.into_iter().find(|path| path.exists())
}

/// A machine that looks like an A3 Mega, all of it simulated, and each fault of it: the checks, the verdict and the exit status agree.
#[test]
fn the_doctor_examines_tcpxo_where_an_engine_takes_it() {
    const AS_A3_MEGA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/gpu/as_a3_mega.sh");
    let Some(plugin) = foreign() else {
        println!("SKIPPED: libnccl_net_strict_foreign.so is not built: cargo build -p strict-foreign-plugin");
        return;
    };
    let plugin = plugin.display().to_string();
    let named = [
        ("UCCL_TCPX_PLUGIN_PATH", &*plugin),
        ("STRICT_FOREIGN_CONTRACT", "tcpxo"),
        ("STRICT_FOREIGN_CONNECT_MS", "1"),
        ("STRICT_FOREIGN_ACCEPT_MS", "2"),
        ("UCCL_TCPX_EMULATE_DEVICE", "1"),
        ("NCCL_SOCKET_IFNAME", "lo"),
        ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo"),
    ];
    // Something that the simulated machine lacks is taken from it inside.
    let there = |inside: &str, options: &str, variables: &[(&str, &str)]| {
        let mut command = Command::new(AS_A3_MEGA);
        command.args(["sh", "-c", &format!("{inside} exec {INFO} --doctor {options}")]);
        let output = command.env_remove("UCCL_TCPX_PLUGIN").envs(variables.iter().copied()).output().expect("the script runs");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (status, out, err) = there("", "", &named);
    if status == Some(77) {
        println!("SKIPPED: {out}");
        return;
    }
    const MET: &str = "over tcpxo lo, every byte correct; every precondition of GPUDirect-TCPXO is met";
    let good = out.lines().next().is_some_and(|verdict| verdict.contains("WORKING: 1 MiB") && verdict.ends_with(MET));
    assert!(status == Some(0) && good && !out.contains("MISSING"), "{out}{err}");
    let faults: [(&str, &str); 8] = [
        ("receive manager", "FILE_BASED_UDS_PATH_PREFIX=/nonexistent"),
        ("switch", "NCCL_FASTRAK_ENABLE=0"),
        ("GPU", "echo 0x1234 >/sys/bus/pci/devices/0000:91:00.0/device;"),
        ("control interface", "NCCL_FASTRAK_CTRL_DEV=eth77"),
        ("data NIC", "NCCL_FASTRAK_IFNAME=eth77"),
        ("receive manager's socket of the NIC", "rm $FILE_BASED_UDS_PATH_PREFIX/rxdm_uds_buf_op:127.0.0.1;"),
        ("low-latency device", "NCCL_FASTRAK_USE_LLCM=1"),
        ("plugin", "STRICT_FOREIGN_CONTRACT=tcpx UCCL_TCPX_PLUGIN_PATH="),
    ];
    for (missing, fault) in faults {
        let (status, out, err) = there(fault, "--no-probe", &named);
        let verdict = format!(
            "verdict              NOT WORKING: GPUDirect-TCPXO cannot work here, missing: {missing}. Without it: an engine starts"
        );
        assert!(status == Some(1) && out.starts_with(&verdict), "{fault}: {status:?} {out}{err}");
        let line = format!("\nMISSING  {missing}: ");
        assert!(out.contains(&line) && out.ends_with(&format!("cannot work here, missing: {missing}\n")), "{fault}: {out}");
    }
    // All is there, and the plugin's sends fail, so that GPU memory goes another way.
    let (status, out, _) = there("STRICT_FOREIGN_SENDS=0", "", &named);
    const OTHERWISE: &str = "NOT WORKING: every precondition of GPUDirect-TCPXO is met, but emulated memory went over tcp lo\n";
    assert!(status == Some(1) && out.contains(OTHERWISE), "{out}");
    // Asked for, and not there.
    let (status, out, _) = there("", "", &[("UCCL_TCPX_PLUGIN", "tcpxo"), ("LD_LIBRARY_PATH", "")]);
    let says = "NOT WORKING: no engine starts: UCCL_TCPX_PLUGIN=tcpxo, but the GPUDirect-TCPXO plugin is not installed";
    assert!(
        status == Some(1) && out.contains(says) && out.ends_with("GPUDirect-TCPXO cannot work here, missing: plugin\n"),
        "{out}"
    );
    // Another plugin is examined as before, here too.
    for other in [("UCCL_TCPX_PLUGIN", "tcpx"), ("UCCL_TCPX_PLUGIN", "soft"), ("STRICT_FOREIGN_CONTRACT", "tcpx")] {
        let variables = if other.0 == "UCCL_TCPX_PLUGIN" { vec![other] } else { [&named[..], &[other]].concat() };
        let (status, out, _) = there("", "--no-probe", &variables);
        assert!(status == Some(1) && out.contains("\nGPUDirect-TCPX cannot work here, missing: "), "{other:?}: {out}");
    }
}

#[test]
fn host_memory_is_never_said_to_go_over_a_plugin_for_gpus() {
    let Some(plugin) = foreign() else {
        println!("SKIPPED: libnccl_net_strict_foreign.so is not built: cargo build -p strict-foreign-plugin");
        return;
    };
    let plugin = plugin.display().to_string();
    let variables =
        [("UCCL_TCPX_PLUGIN_PATH", &*plugin), ("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo")];
    let output = run(INFO, "--memory host", &variables);
    let out = text(&output.stdout);
    assert!(output.status.success(), "{out}{}", text(&output.stderr));
    let verdict = out.lines().next().unwrap_or_default();
    assert!(verdict.contains("over tcp lo, every byte correct; not over GPUDirectTCPX_v7, which"), "{out}");
    must_fail(
        INFO,
        "--memory host --require tcpx",
        &variables,
        "bytes of host memory took tcp lo, and --require tcpx forbids that",
    );
}

/// Simulated GPU memory goes over the plugin, whose name says which of Google's two it is.
#[test]
fn required_plugins_are_told_apart() {
    let Some(plugin) = foreign() else {
        println!("SKIPPED: libnccl_net_strict_foreign.so is not built: cargo build -p strict-foreign-plugin");
        return;
    };
    let plugin = plugin.display().to_string();
    for (contract, other) in [("tcpx", "tcpxo"), ("tcpxo", "tcpx")] {
        let variables = [
            ("UCCL_TCPX_PLUGIN_PATH", &*plugin),
            ("STRICT_FOREIGN_CONTRACT", contract),
            ("NCCL_SOCKET_IFNAME", "lo"),
            ("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo"),
        ];
        let perf =
            |required: &str| format!("demo --memory emulated --op write --total 1M --iters 3 --require {required} --json -");
        let output = run(PERF, &perf(contract), &variables);
        let rows: Vec<Row> = serde_json::from_slice(&output.stdout).expect("rows");
        let (path, channels_alone) = (format!("{contract} lo"), |row: &Row| row.channels > 0);
        assert!(
            output.status.success() && !rows.is_empty() && rows.iter().all(|row| row.path == path && channels_alone(row)),
            "{rows:?}{}",
            text(&output.stderr)
        );
        let refused = format!("its bytes took {path}, and --require {other} forbids that");
        must_fail(PERF, &perf(other), &variables, &refused);
        let info = |required: &str| format!("--memory emulated --require {required}");
        let output = run(INFO, &info(contract), &variables);
        let verdict = text(&output.stdout);
        assert!(output.status.success() && verdict.contains(&format!("read back over {path}, every byte")), "{verdict}");
        let refused = format!("bytes of emulated memory took {path}, and --require {other} forbids that");
        must_fail(INFO, &info(other), &variables, &refused);
        // --ready foresees the same.
        let simulated = [&variables[..], &[("UCCL_TCPX_EMULATE_DEVICE", "1")]].concat();
        for (required, status) in [(contract, 0), (other, 1)] {
            let output = run(INFO, "--ready", &[&simulated[..], &[("UCCL_TCPX_REQUIRE", required)]].concat());
            assert_eq!(output.status.code(), Some(status), "{contract}, {required} required: {}", text(&output.stdout));
        }
    }
}

#[test]
fn rows_say_what_carried_their_bytes() {
    const ITERS: u64 = 7;
    let rows = |options: &str, variables: &[(&str, &str)]| -> Vec<Row> {
        let line = format!("demo --iters {ITERS} --warmup 1 --channels 2 --json - {options}");
        let output = run(PERF, &line, &[&[("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo")], variables].concat());
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("rows")
    };
    for (op, factor) in
        [("--op write", 1), ("--op read", 1), ("--op send", 1), ("--op write --bidirectional", 2), ("--op send --inflight 2", 2)]
    {
        let bytes = (ITERS * factor) << 20;
        let all = rows(&format!("{op} --total 1M"), &[]);
        let paths: Vec<(&str, &str, usize)> = all.iter().map(|row| (&*row.path, &*row.path_bytes, row.channels)).collect();
        let (network, direct) = (format!("tcp lo {bytes}"), format!("direct {bytes}"));
        assert_eq!(paths, [("tcp lo", &*network, 2), ("direct (one host)", &*direct, 0)], "{op}");
        for row in &all {
            let ops = (ITERS * factor) as f64 / row.seconds;
            assert!(
                (row.ops_per_s / ops - 1.0).abs() < 1e-6 && (row.gbits_per_s / row.gbytes_per_s - 8.0).abs() < 1e-6,
                "{row:?}"
            );
        }
    }
    let eager = rows("--op write --total 4K", &[("UCCL_P2P_DISABLE_IPC", "1")]);
    assert_eq!((eager.len(), &*eager[0].path), (1, "eager (control message)"));
    // A row that no channel carried says nothing of the channels' sockets.
    let both = rows("--op write --total 1M", &[]);
    let congestion: Vec<bool> = both.iter().chain(&eager).map(|row| row.congestion_control.is_empty()).collect();
    assert_eq!(congestion, [false, true, true], "{both:?}");
}

#[test]
fn bytes_that_went_another_way_than_required_fail_the_run() {
    let line = |options: &str| format!("demo --op write --total 1M --iters 3 --warmup 1 {options}");
    let network = [("UCCL_P2P_DISABLE_IPC", "1")];
    let output = run(PERF, &line("--require tcp"), &network);
    assert!(output.status.success(), "{}", text(&output.stderr));
    must_fail(PERF, &line("--require tcpx"), &network, "write host of 1 MiB in blocks of 1 MiB: its bytes took tcp ");
    must_fail(PERF, &line("--require direct"), &network, "UCCL_P2P_DISABLE_IPC=1 forbids direct transfers");
    // A demo leaves out the other half.
    must_work(PERF, &line("--require tcp"), "over tcp ");
    assert!(!must_work(PERF, &line("--require direct"), "over direct (one host); ").contains("tcp "));
    must_fail(PERF, &line("--require nvlink"), &[], "its bytes took direct (one host), and --require nvlink forbids that");
    must_fail(PERF, &line("--total 4K --require tcp").replace("--total 1M ", ""), &[], "took eager (control message)");
    must_work(INFO, "--memory host --require tcp", "WORKING");
    must_work(INFO, "--memory host --require direct", "WORKING");
    must_fail(INFO, "--memory host --require nvlink", &[], "took direct (one host), and --require nvlink forbids that");
}

/// A simulated CUDA driver of two GPUs, as far as an engine asks when it is created.
const DRIVER: &str = include_str!("../../foreign-plugin/tests/gpus/two_gpus.c");

#[test]
fn the_engine_belongs_to_the_chosen_gpu() {
    let folder = std::env::temp_dir().join(format!("tcpx-perf-gpus-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("driver.c"), DRIVER).unwrap();
    let cc =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([folder.join("libcuda.so.1"), folder.join("driver.c")]).status();
    assert!(cc.expect("a C compiler").success());
    for (line, gpu) in
        [("server --gpu 1", "0000:05:00.0"), ("server --gpu 0", "0000:04:00.0"), ("server --memory gpu", "0000:04:00.0")]
    {
        let mut child = Command::new(PERF)
            .args(line.split(' '))
            .env("LD_LIBRARY_PATH", &folder)
            .env("UCCL_P2P_LOG_LEVEL", "info")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let _server = Server(child);
        let engine = log.lines().map_while(Result::ok).find(|line| line.contains(" GPU ")).unwrap_or_default();
        assert!(engine.ends_with(&format!("GPU {gpu}")), "{line}: {engine}");
    }
    must_fail(PERF, "server --gpu 2", &[("LD_LIBRARY_PATH", folder.to_str().unwrap())], "no GPU 2: the CUDA driver sees 2");
    std::fs::remove_dir_all(&folder).unwrap();
}

/// While the server is stopped, lines say how long nothing moves; the row's rate counts that time, and its median does not stand for it.
#[test]
fn a_transfer_that_stands_is_told_and_counted() {
    const STANDS: f64 = 2.0;
    let stop = |id: u32, signal| {
        // SAFETY: a signal to our own child.
        unsafe { libc::kill(id as libc::pid_t, signal) };
    };
    let mut server = Command::new(PERF)
        .args(["server", "--memory", "host"])
        .env("UCCL_P2P_DISABLE_IPC", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let server = Server(server);
    let mut client = Command::new(PERF)
        .args(["client", address.trim()])
        .args("--op write --total 1M --time 4 --interval 0.2 --json -".split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stderr.take().unwrap()).lines().map_while(Result::ok);
    lines.find(|line| line.contains("GB/s  p50") && !line.ends_with("warm-up")).expect("a line about bytes that move");
    stop(server.0.id(), libc::SIGSTOP);
    let stands = |line: &str| line.split("0.000 GB/s  stands for ").nth(1)?.split(' ').next()?.parse::<f64>().ok();
    let told = lines.by_ref().filter_map(|line| stands(&line)).find(|&seconds| seconds >= STANDS);
    stop(server.0.id(), libc::SIGCONT);
    assert!(told.is_some(), "no line said that the transfer stands");
    let drain = std::thread::spawn(move || lines.count());
    let output = client.wait_with_output().unwrap();
    drain.join().unwrap();
    let rows: Vec<Row> = serde_json::from_slice(&output.stdout).unwrap();
    let [row] = &rows[..] else { panic!("{rows:?}") };
    let by_time = (row.iters * row.total_bytes) as f64 / row.seconds / 1e9;
    assert!((row.gbytes_per_s / by_time - 1.0).abs() < 1e-6 && row.seconds > STANDS, "{row:?}");
    assert!(row.is_uneven() && row.gbytes_per_s < row.gbytes_per_s_median, "{row:?}");
}

/// Lines of --interval count all clients, from the warm-up on.
#[test]
fn intervals_count_every_client_and_the_warm_up() {
    let mut child =
        Command::new(PERF).args(["server", "--memory", "host"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut address = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let _server = Server(child);
    // More iterations of the warm-up than end before the program is stopped.
    let warm = Command::new(PERF)
        .args(["client", address.trim()])
        .args("--op write --total 1M --warmup 1000000000 --interval 0.1".split(' '))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut warm = Server(warm);
    let mut lines = BufReader::new(warm.0.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains(" GB/s  p50") && line.ends_with("write 1 MiB, warm-up")), "no line of the warm-up");
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(warm.0.id() as libc::pid_t, libc::SIGINT) };
    let drain = std::thread::spawn(move || lines.count());
    assert!(warm.0.wait().unwrap().success(), "it can be stopped in the warm-up");
    drain.join().unwrap();
    let line = format!("client {} --clients 3 --op write --total 64K --time 1 --interval 0.2 --json -", address.trim());
    let output = run(PERF, &line, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rows: Vec<Row> = serde_json::from_slice(&output.stdout).unwrap();
    let err = text(&output.stderr);
    let rates: Vec<f64> = err
        .lines()
        .filter(|line| line.contains(" GB/s  p50") && line.ends_with("write 64 KiB, 3 clients"))
        .filter_map(|line| line.split(" s ").nth(1)?.split_whitespace().next()?.parse().ok())
        .collect();
    assert!(rates.len() >= 2 && rates.iter().all(|&rate| rate > 0.0), "{err}");
    assert!(rows.len() == 1 && rows[0].clients == 3, "{rows:?}");
    // Each of their rates is by its own time, so the sum is that of one transfer's bytes.
    let by_ops = rows[0].ops_per_s * 65_536.0 / 1e9;
    assert!((rows[0].gbytes_per_s / by_ops - 1.0).abs() < 1e-6, "{rows:?}");
}

/// The committed manual pages are what the command lines say.
#[test]
fn manual_pages_are_current() {
    let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/man"));
    for (program, name) in [(PERF, "tcpx-perf"), (INFO, "tcpx-info"), (TOP, "tcpx-top")] {
        let output = run(program, "--manual-page", &[]);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        let path = folder.join(format!("{name}.1"));
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(&path, &output.stdout).unwrap();
        }
        let committed = std::fs::read(&path).unwrap_or_default();
        assert!(committed == output.stdout, "{} is stale: run UPDATE_DOCS=1 cargo test -p tcpx-tools", path.display());
    }
}
