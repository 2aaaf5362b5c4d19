//! Runs the two programs as a user does: what must work exits 0 and says so, what must fail exits with another status and says why.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

const PERF: &str = env!("CARGO_BIN_EXE_tcpx-perf");
const INFO: &str = env!("CARGO_BIN_EXE_tcpx-info");

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
    let out = must_work(PERF, &line, "no difference; host memory, 4 channels");
    assert!(!out.contains("not checked"), "{out}");
    let rows: Vec<tcpx_tools::report::Row> = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(rows.len(), tcpx_tools::suite::demo().len());
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
    must_work(INFO, "", "WORKING: 1 MiB of host memory");
    must_work(INFO, "--no-probe", "was not tried");
    let report: serde_json::Value = serde_json::from_str(&must_work(INFO, "--json", "WORKING")).unwrap();
    assert_eq!(report["works"], true);
    assert!(!report["nics"].as_array().unwrap().is_empty());
    must_fail(INFO, "", &[("UCCL_TCPX_NUM_CHANNELS", "many")], "UCCL_TCPX_NUM_CHANNELS");
}

#[test]
fn fixed_ports_do_not_matter_and_what_cannot_work_fails_with_a_reason() {
    // The demo's two engines are not in each other's way when a port is fixed for services.
    let output = run(PERF, "demo --op write --iters 2 --warmup 1", &[("UCCL_TCPX_OOB_PORT", "1")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    must_fail(PERF, "client 127.0.0.1:1 --op write", &[], "cannot connect to 127.0.0.1:1");
    must_fail(PERF, "demo --total 0", &[], "moves nothing");
    must_fail(PERF, "demo --total 100000G --block 1G", &[], "too large");
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
    must_fail(PERF, &format!("client {address} --memory emulated"), &[], "both sides need the same");
}
