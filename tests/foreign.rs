//! The whole engine over a foreign plugin: the strict foreign plugin, which simulates GPUDirect-TCPX and ends the process at the first
//! violation of its contract, with emulated device memory. Each case has its own process.

mod local;

use local::pair;
use nccl_net_strict_foreign::flows::reset_connections;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Direction, Engine, LocalSegment};

const CASE: &str = "UCCL_FOREIGN_TEST_CASE";
/// What the receive manager does wrong.
const HOW: &str = "UCCL_FOREIGN_TEST_HOW";
/// The call of the plugin that then does not return.
const CALL: &str = "UCCL_FOREIGN_CALL";
/// A call may take so much longer than its deadline.
const MARGIN: Duration = Duration::from_secs(1);
/// Places of the plugin's counters, as its `rules::Counters` lists them.
const REGISTRATIONS: usize = 0;
const REGISTRATIONS_MOST: usize = 1;
const REGISTRATIONS_EVER: usize = 2;
const DESCRIPTORS: usize = 3;
const IMPORTS: usize = 5;
const COMMS: usize = 6;
const PAGES_OUT: usize = 11;
const WARNINGS: usize = 12;
const MESSAGES_IN: usize = 14;
const FLOW_RULES: usize = 15;

fn foreign() -> PathBuf {
    let this = std::env::current_exe().expect("this program");
    let deps = this.parent().expect("folder");
    let found = [deps.join("libnccl_net_strict_foreign.so"), deps.join("../libnccl_net_strict_foreign.so")];
    found.into_iter().find(|p| p.exists()).expect("libnccl_net_strict_foreign.so: cargo build -p strict-foreign-plugin")
}

/// Runs a case, which must end well; gives its log.
fn run(case: &str, environment: &[(&str, &str)]) -> String {
    try_run(case, environment).unwrap_or_else(|log| panic!("{case} {environment:?}: {log}"))
}

/// Runs a case; gives its log, as an error where it ended badly.
fn try_run(case: &str, environment: &[(&str, &str)]) -> Result<String, String> {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    child.env_remove("UCCL_TCPX_PLUGIN").env_remove("UCCL_P2P_TRANSPORT").env_remove("NCCL_DYNAMIC_CHUNK_SIZE");
    static RUNS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = RUNS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let counters = std::env::temp_dir().join(format!("uccl-foreign-{}-{number}", std::process::id()));
    child.env("STRICT_FOREIGN_COUNTERS", &counters).env("UCCL_TCPX_PLUGIN_PATH", foreign()).env(CASE, case);
    child.env("STRICT_FOREIGN_CONNECT_MS", "30").env("STRICT_FOREIGN_ACCEPT_MS", "50");
    child
        .env("UCCL_P2P_LOG_LEVEL", "info")
        .env("UCCL_TCPX_EMULATE_DEVICE", "1")
        .env("UCCL_P2P_DISABLE_IPC", "1")
        .env("NCCL_SOCKET_IFNAME", "lo");
    let out = child.envs(environment.iter().copied()).output().expect("child");
    let _ = std::fs::remove_file(counters);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.success() {
        Ok(text)
    } else {
        Err(format!("{} {text}", out.status))
    }
}

#[test]
fn bytes_arrive_over_any_number_of_channels() {
    for channels in ["1", "3", "16"] {
        run("moves", &[("UCCL_TCPX_NUM_CHANNELS", channels)]);
    }
    // As slow as TCPX sets up.
    run("moves", &[("STRICT_FOREIGN_CONNECT_MS", "300"), ("STRICT_FOREIGN_ACCEPT_MS", "500"), ("UCCL_TCPX_NUM_CHANNELS", "8")]);
}

/// The plugin as GPUDirect-TCPXO.
const TCPXO: (&str, &str) = ("STRICT_FOREIGN_CONTRACT", "tcpxo");

fn delivers() -> bool {
    std::env::var(TCPXO.0).is_ok_and(|contract| contract == TCPXO.1)
}

#[test]
fn bytes_arrive_in_place() {
    for channels in ["1", "3", "16"] {
        let log = run("moves", &[TCPXO, ("UCCL_TCPX_NUM_CHANNELS", channels)]);
        assert!(connected(&log).contains("channels over FasTrak (simulated) on lo for GPU 0 here and GPU 0 there;"), "{log}");
    }
    run("moves", &[TCPXO, ("UCCL_TCPX_CHUNK_BYTES", "4M")]);
    run("moves", &[TCPXO, ("UCCL_TCPX_CHUNK_BYTES", "16K"), ("UCCL_TCPX_NUM_CHANNELS", "2")]);
}

#[test]
fn a_send_that_fails_costs_no_transfer() {
    // As a transfer starts, and while it runs.
    for sends in ["0", "3", "40"] {
        run("failing_send", &[("STRICT_FOREIGN_SENDS", sends), ("UCCL_TCPX_NUM_CHANNELS", "2")]);
        // The closed comms go on writing to what they had, while the chunks are sent again.
        run("failing_send", &[TCPXO, ("STRICT_FOREIGN_SENDS", sends), ("UCCL_TCPX_NUM_CHANNELS", "2")]);
    }
}

#[test]
fn what_a_comm_that_does_not_close_has_is_never_sent_again() {
    // The sending comm, or the receiving one.
    for closes in ["0", "1", "2", "3"] {
        let mut more = vec![("STRICT_FOREIGN_SENDS", "3"), ("STRICT_FOREIGN_CLOSES", closes), ("UCCL_TCPX_NUM_CHANNELS", "2")];
        let log = run("failing_close", &more);
        assert!(log.contains("a comm of plugin GPUDirectTCPX_v7 stays open: "), "{log}");
        more.push(TCPXO);
        let log = run("failing_close", &more);
        assert!(log.contains("a comm of plugin FasTrak (simulated) stays open: "), "{log}");
    }
}

#[test]
fn a_nic_that_is_no_pci_device_is_left_out() {
    let devices = "eth1@127.0.0.1,eth2@127.0.0.1@nopci";
    let log = run("moves", &[("STRICT_FOREIGN_DEVICES", devices), ("UCCL_TCPX_NUM_CHANNELS", "4")]);
    assert!(log.contains("NIC eth2 is not a PCI device and is left out"), "{log}");
}

#[test]
fn settings_that_would_end_the_process_are_refused() {
    run("inline_threshold", &[("NCCL_INLINE_THRESHOLD", "2048")]);
    run("moves", &[("NCCL_INLINE_THRESHOLD", "0")]);
}

#[test]
fn what_chunks_of_a_gpu_need_is_there_before_the_first_of_them() {
    run("ready", &[("UCCL_TCPX_NUM_CHANNELS", "4")]);
    run("ready", &[TCPXO, ("UCCL_TCPX_NUM_CHANNELS", "4")]);
}

#[test]
fn chunks_stay_within_what_the_plugin_carries() {
    run("moves", &[("UCCL_TCPX_CHUNK_BYTES", "4M")]);
    run("moves", &[("UCCL_TCPX_CHUNK_BYTES", "4M"), ("NCCL_DYNAMIC_CHUNK_SIZE", "4194304")]);
    run("moves", &[("NCCL_DYNAMIC_CHUNK_SIZE", "0x4000")]);
}

#[test]
fn encryption_is_refused_and_integrity_says_what_it_leaves_out() {
    run("refuses_encryption", &[("UCCL_TCPX_PROTECT", "encrypt")]);
    let log = run("moves", &[("UCCL_TCPX_PROTECT", "integrity")]);
    assert!(log.contains("whose data cannot be checked"), "{log}");
}

#[test]
fn a_dead_nic_leaves_fewer_channels() {
    let log = run("moves", &[("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2@dead"), ("UCCL_TCPX_NUM_CHANNELS", "4")]);
    assert!(log.contains("NIC eth2 is left out"), "{log}");
}

#[test]
fn where_no_nics_meet_the_software_plugin_carries() {
    for more in [None, Some(TCPXO)] {
        let mut environment = vec![("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1")];
        environment.extend(more);
        let log = run("no_nic_in_common", &environment);
        assert!(log.contains("no NIC in common") && log.contains("[eth1] here, [eth2] at the peer"), "{log}");
    }
}

/// TCPXO connects over the NIC of the peer's number, whatever NIC it is asked for: only NICs of one number are asked for.
#[test]
fn channels_join_nics_of_one_rail() {
    let two = ("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2");
    let log = run("moves", &[TCPXO, two, ("UCCL_TCPX_NUM_CHANNELS", "4")]);
    assert!(connected(&log).contains("4 channels over FasTrak (simulated) on eth1, eth2 for"), "{log}");
}

/// TCPXO does not report how fast its flows are, so that what waits on a slow NIC stays there: transfers take longer, and none fails.
#[test]
fn a_slow_nic_costs_no_channel_and_no_byte() {
    let devices = ("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2@slow");
    let log = run("slow_nic", &[TCPXO, devices, ("UCCL_TCPX_NUM_CHANNELS", "4")]);
    assert!(!log.contains("is lost"), "{log}");
}

#[test]
fn registrations_are_one_a_region_and_nic() {
    run("registrations", &[("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1,eth2@127.0.0.2"), ("UCCL_TCPX_NUM_CHANNELS", "16")]);
}

/// A closed comm of TCPXO may go on using registered memory, so the plugin gets no memory of the application.
#[test]
fn a_plugin_that_delivers_registers_no_region() {
    run("staging_alone", &[TCPXO, ("UCCL_TCPX_NUM_CHANNELS", "3")]);
}

#[test]
fn memory_of_two_gpus_of_a_process_takes_comms_of_its_own_gpu() {
    for (more, name) in [(None, "GPUDirectTCPX_v7"), (Some(TCPXO), "FasTrak (simulated)")] {
        let mut environment = vec![("UCCL_TCPX_EMULATE_DEVICES", "2"), ("UCCL_TCPX_NUM_CHANNELS", "3")];
        environment.extend(more);
        let log = run("two_gpus", &environment);
        let line = connected(&log);
        for (here, there) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let carried = format!("3 channels over {name} on lo for GPU {here} here and GPU {there} there;");
            assert!(line.contains(&carried), "{carried} {line}");
        }
        assert!(line.contains("all else: host memory, GPUs without registered memory at this time"), "{line}");
    }
}

#[test]
fn a_peer_that_dies_in_the_middle_leaves_nothing_behind() {
    for (gpus, more) in [("1", None), ("2", None), ("1", Some(TCPXO)), ("2", Some(TCPXO))] {
        let mut environment =
            vec![("UCCL_TCPX_NUM_CHANNELS", "4"), ("UCCL_TCPX_EMULATE_DEVICES", gpus), ("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "3000")];
        environment.extend(more);
        run("peer_dies", &environment);
    }
}

/// Rounds of the tests in which connections close while data moves; UCCL_FOREIGN_ROUNDS sets more.
fn rounds() -> u32 {
    std::env::var("UCCL_FOREIGN_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12)
}

#[test]
fn a_close_in_the_middle_of_transfers_ends_neither_process() {
    for late in [None, Some(("STRICT_FOREIGN_LATE", "1")), Some(TCPXO)] {
        let mut environment = vec![("UCCL_TCPX_NUM_CHANNELS", "4")];
        environment.extend(late);
        run("closes", &environment);
    }
}

#[test]
fn a_reset_by_the_network_ends_neither_process() {
    run("network_resets", &[("UCCL_TCPX_NUM_CHANNELS", "4")]);
    run("network_resets", &[TCPXO, ("UCCL_TCPX_NUM_CHANNELS", "4")]);
}

/// A file for STRICT_FOREIGN_ANSWERS, which does not exist yet.
fn frozen_file(case: &str) -> PathBuf {
    let file = std::env::temp_dir().join(format!("uccl-frozen-{case}-{}", std::process::id()));
    let _ = std::fs::remove_file(&file);
    file
}

fn run_frozen(case: &str, more: &[(&str, &str)]) -> String {
    let file = frozen_file(case);
    let mut environment = vec![("STRICT_FOREIGN_ANSWERS", file.to_str().expect("path")), ("UCCL_TCPX_NUM_CHANNELS", "4")];
    environment.extend(more);
    run(case, &environment)
}

/// The lines that say that a call has stalled.
fn standing(log: &str) -> usize {
    log.lines()
        .filter(|line| line.contains("WARN") && line.contains("nothing is set up over the plugin until it returns"))
        .count()
}

#[test]
fn a_frozen_receive_manager_keeps_no_close() {
    let short = [("UCCL_TCPX_CLOSE_TIMEOUT_MS", "1000"), ("UCCL_TCPX_CONNECT_TIMEOUT_MS", "6000")];
    let log = run_frozen("frozen_close", &short);
    assert_eq!(standing(&log), 1, "{log}");
    assert!(log.contains("GPUDirectTCPX_v7: closeRecv has returned after"), "{log}");
    let log = run_frozen("frozen_close", &[&short[..], &[TCPXO]].concat());
    assert_eq!(standing(&log), 1, "{log}");
    assert!(log.contains("FasTrak (simulated): ") && log.contains(" has returned after"), "{log}");
}

#[test]
fn a_frozen_receive_manager_keeps_no_connect() {
    let log = run_frozen("frozen_import", &[("UCCL_TCPX_CONNECT_TIMEOUT_MS", "6000")]);
    assert_eq!(standing(&log), 1, "{log}");
    // The deadline is before the time after which a call stands still.
    let log = run_frozen("frozen_import", &[("UCCL_TCPX_CONNECT_TIMEOUT_MS", "1500")]);
    assert!(standing(&log) <= 1, "{log}");
    // The plugin's own threads wait for rules.
    run_frozen("frozen_rule", &[("UCCL_TCPX_CONNECT_TIMEOUT_MS", "1000")]);
    for timeout in ["1500", "8000"] {
        run_frozen("frozen_register", &[TCPXO, ("UCCL_TCPX_CONNECT_TIMEOUT_MS", timeout)]);
    }
}

#[test]
fn a_call_that_does_not_return_holds_up_no_other_plugin_and_no_open_connection() {
    let short = ("UCCL_TCPX_CONNECT_TIMEOUT_MS", "1500");
    run_frozen("stuck_call", &[short, (HOW, "import"), (CALL, "accept")]);
    for call in ["listen", "regMr"] {
        run_frozen("stuck_call", &[TCPXO, short, (HOW, call), (CALL, call)]);
    }
}

#[test]
fn a_plugin_whose_init_stands_still_holds_up_no_other() {
    run_frozen("frozen_init", &[TCPXO, ("UCCL_TCPX_CONNECT_TIMEOUT_MS", "1000")]);
}

/// A manager that hangs up makes TCPX compute for ever.
#[test]
fn a_receive_manager_that_hangs_up_or_refuses_or_talks_nonsense_keeps_no_caller() {
    let short = [("UCCL_TCPX_CLOSE_TIMEOUT_MS", "1000"), ("UCCL_TCPX_CONNECT_TIMEOUT_MS", "2000")];
    for how in ["import=hangup", "rule=hangup", "rule=refusal", "rule=garbage", "close=hangup", "close=refusal"] {
        run_frozen("wrong_answers", &[&short[..], &[(HOW, how)]].concat());
    }
    for how in ["hangup", "refusal", "garbage"] {
        for call in ["regMr", "deregMr"] {
            let log = run_frozen("wrong_answers", &[&short[..], &[(HOW, &format!("{call}={how}")), TCPXO]].concat());
            let kept = log.contains("blocks of staging memory are never freed, since the plugin may go on using them");
            assert_eq!(kept, call == "deregMr", "{log}");
        }
    }
}

#[test]
fn a_slow_receive_manager_keeps_no_close() {
    let log = run("slow_close", &[("STRICT_FOREIGN_CLOSE_MS", "400"), ("UCCL_TCPX_NUM_CHANNELS", "8")]);
    assert_eq!(standing(&log), 0, "{log}");
}

#[test]
fn gpus_that_came_too_late_take_the_software_plugins_channels() {
    let log = run("late_gpu", &[("UCCL_TCPX_EMULATE_DEVICES", "2"), ("UCCL_TCPX_NUM_CHANNELS", "2")]);
    assert!(!connected(&log).contains("GPU 1"), "{log}");
    // If an engine has no region on that GPU, only the pairs that exist get channels.
    let log = run("gpu_of_one_side", &[("UCCL_TCPX_EMULATE_DEVICES", "2"), ("UCCL_TCPX_NUM_CHANNELS", "2")]);
    let pair = |here, there| log.contains(&format!("GPU {here} here and GPU {there} there"));
    assert!(pair(1, 0) && pair(0, 1) && !pair(1, 1), "{log}");
}

#[test]
fn a_connection_lives_without_the_channels_of_further_gpus() {
    // One engine opens all of its eight, the other its own two and some of the rest.
    for listens in ["10", "11", "13"] {
        let more = [("UCCL_TCPX_EMULATE_DEVICES", "2"), ("UCCL_TCPX_NUM_CHANNELS", "2"), ("STRICT_FOREIGN_LISTENS", listens)];
        let log = run("few_listens", &more);
        assert!(connected(&log).contains("(not over GPUDirectTCPX_v7: "), "{log}");
    }
}

#[test]
fn a_connection_fails_where_gpu_memory_would_not_go_over_the_required_plugin() {
    const TWO: [(&str, &str); 2] = [("UCCL_TCPX_EMULATE_DEVICES", "2"), ("UCCL_TCPX_NUM_CHANNELS", "2")];
    let answer = |required: &'static str, environment: &[(&str, &str)]| {
        let log = run("required", &[environment, &[("UCCL_TCPX_REQUIRE", required)]].concat());
        let line = log.lines().find_map(|line| Some(line.split_once("= ")?.1.to_owned()));
        (line.unwrap_or_else(|| panic!("no answer: {log}")), log)
    };
    for (required, environment) in [("tcpx", &[][..]), ("tcpx|nvlink,nics>=1", &TWO), ("tcpxo", &[TCPXO])] {
        assert_eq!(answer(required, environment).0, "met", "{required}");
    }
    let (error, log) = answer("tcpxo", &[]);
    assert!(
        error.contains("UCCL_TCPX_REQUIRE=tcpxo: tcpxo is required, but memory of GPU 0 here and GPU 0 there takes tcpx lo"),
        "{error}"
    );
    assert!(log.contains("WARN") && log.contains("tcpxo is required, but memory takes tcpx lo"), "at creation: {log}");
    // The channels of a further GPU are missing, and the reason is told.
    let few = [&TWO[..], &[("STRICT_FOREIGN_LISTENS", "11")]].concat();
    let (error, _) = answer("tcpx", &few);
    assert!(
        error.contains("tcpx is required, but memory of GPU ") && error.contains(" takes tcp lo (not over GPUDirectTCPX_v7: "),
        "{error}"
    );
    assert_eq!(answer("tcpx|tcp", &few).0, "met");
}

#[test]
fn further_gpus_take_no_descriptors_that_a_connection_needs() {
    // Both ends share the limit: where one has taken descriptors for further GPUs and not given them back yet, the other may refuse.
    let refused = |result: &Result<String, String>| {
        result.as_ref().is_err_and(|log| log.contains("more file descriptors would take this process above"))
    };
    let tries = || try_run("few_descriptors", &[("UCCL_TCPX_EMULATE_DEVICES", "2"), ("UCCL_TCPX_NUM_CHANNELS", "4")]);
    let log = (0..5).map(|_| tries()).find(|result| !refused(result)).expect("refused each time").expect("a connection");
    assert!(log.contains("too few file descriptors") && log.contains("4 channels over GPUDirectTCPX_v7"), "{log}");
}

#[test]
fn every_connection_says_once_what_carries_what() {
    let log = run("moves", &[("UCCL_TCPX_NUM_CHANNELS", "1")]);
    assert_eq!(log.matches("connected with").count(), 2, "one line on each side: {log}");
    let line = connected(&log);
    assert!(line.contains("1 channels over GPUDirectTCPX_v7 on lo for GPU 0 here and GPU 0 there; 1 channels over"), "{line}");
    assert!(line.contains("chunks of up to 524288 bytes"), "{line}");
    let log = run("no_nic_in_common", &[("STRICT_FOREIGN_DEVICES", "eth1@127.0.0.1")]);
    assert!(connected(&log).contains("GPU 0 here and GPU 0 there (not over GPUDirectTCPX_v7: no NIC in common"), "{log}");
    assert!(!log.lines().any(|l| l.contains("WARN") && l.contains("no NIC in common")), "{log}");
}

/// The line of the first connection.
fn connected(log: &str) -> &str {
    log.lines().find(|l| l.contains("connected with")).unwrap_or_else(|| panic!("no line: {log}"))
}

#[test]
fn the_plugins_lines_are_written_once_a_second() {
    let log = run("moves", &[("UCCL_TCPX_NUM_CHANNELS", "8")]);
    assert!(log.contains("plugin [strict_foreign.cc:1003] NET/TCPX : initialised, devices 1 (7, 0.5)"), "{log}");
    let lines = log.lines().filter(|l| l.contains("No free space")).count();
    assert!(lines < 100, "{lines} lines");
}

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    // SAFETY: this process' own disposition: as in a C program.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match case.as_str() {
        "moves" => moves(),
        "failing_send" => failing_send(),
        "failing_close" => failing_close(),
        "refuses_encryption" => refuses_encryption(),
        "registrations" => registrations(),
        "ready" => ready(),
        "staging_alone" => staging_alone(),
        "inline_threshold" => inline_threshold(),
        "no_nic_in_common" => no_nic_in_common(),
        "two_gpus" => two_gpus(2, 2, Carried::Early),
        "few_descriptors" => {
            let limit = libc::rlimit { rlim_cur: 200, rlim_max: 200 };
            // SAFETY: this process' own limit.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
            two_gpus(2, 2, Carried::Engines);
        }
        "few_listens" => two_gpus(2, 2, Carried::Engines),
        "late_gpu" => two_gpus(1, 1, Carried::Early),
        "gpu_of_one_side" => two_gpus(2, 1, Carried::Early),
        "peer_on_eth2" => peer_on_eth2(),
        "peer_dies" => peer_dies(),
        "frozen_close" => frozen_close(),
        "frozen_import" => frozen_set_up("import"),
        "frozen_rule" => frozen_set_up("rule"),
        "frozen_register" => frozen_register(),
        "frozen_init" => frozen_init(),
        "wrong_answers" => wrong_answers(),
        "slow_close" => slow_close(),
        "slow_nic" => slow_nic(),
        "stuck_call" => stuck_call(),
        "closes" => closes(false),
        "network_resets" => closes(true),
        "required" => required(),
        "peer_that_closes" => peer_that_closes(),
        "peer_that_dies" => peer_that_dies(),
        other => panic!("no case {other}"),
    }
}

const LEN: usize = 5 << 20;

fn pattern() -> Vec<u8> {
    (0..LEN).map(|i| (i * 13 + i / 997) as u8).collect()
}

/// Whether a connection has what the engines require.
fn required() {
    let (a, b) = (engine(), engine());
    let memory = vec![0u8; LEN];
    let gpus = if std::env::var_os("UCCL_TCPX_EMULATE_DEVICES").is_some() { 2 } else { 1 };
    for engine in [&a, &b] {
        for _ in 0..gpus {
            engine.register(memory.as_ptr() as usize, LEN).expect("register");
        }
    }
    match a.connect("127.0.0.1", "", local::port(&b)) {
        Ok(connection) => println!("= met{}", connection.stats().expect("statistics").error.map_or("", |_| ", and lost")),
        Err(e) => println!("= {e}"),
    }
}

fn failing_send() {
    let (a, b) = (engine(), engine());
    let (connection, other) = pair(&a, &b);
    let mut memory = [vec![3u8; 64 << 20], vec![0; 64 << 20]];
    memory[0].iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 13 + i / 997) as u8);
    let [from, to] = [0, 1].map(|i| memory[i].as_mut_ptr() as usize);
    let (near, far) = (a.register(from, 64 << 20).expect("register"), b.register(to, 64 << 20).expect("register"));
    let item = b.fifo_item(far, to, 64 << 20).expect("item");
    let local = LocalSegment { mr: near, addr: from, len: 64 << 20 };
    let id = connection.transfer(Direction::Write, std::iter::once((local, item))).expect("start");
    assert!(connection.wait(id, Some(Duration::from_secs(30))).expect("the software plugin takes over").complete);
    let totals = connection.stats().expect("statistics").totals;
    assert!(totals.lost_channels > 0 && totals.resent_chunks > 0, "{totals:?}");
    // They are set up again, whatever becomes of what they send.
    let until = Instant::now() + Duration::from_secs(20);
    let restored = || connection.stats().expect("statistics").totals.restored_channels;
    while restored() == 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(restored() > 0, "no channel came back");
    a.deregister(near).expect("deregister");
    b.deregister(far).expect("deregister");
    assert!(memory[0] == memory[1], "wrong bytes");
    drop(other);
}

fn failing_close() {
    let (a, b) = (engine(), engine());
    let (connection, other) = pair(&a, &b);
    // The comms may use it until the process ends.
    let memory: [&'static mut [u8]; 2] = [vec![3u8; 64 << 20].leak(), vec![0; 64 << 20].leak()];
    let [from, to] = [0, 1].map(|i| memory[i].as_ptr() as usize);
    let (near, far) = (a.register(from, 64 << 20).expect("register"), b.register(to, 64 << 20).expect("register"));
    let item = b.fifo_item(far, to, 64 << 20).expect("item");
    let local = LocalSegment { mr: near, addr: from, len: 64 << 20 };
    let id = connection.transfer(Direction::Write, std::iter::once((local, item))).expect("start");
    let error = connection.wait(id, Some(Duration::from_secs(30))).expect_err("the comm may still be used").to_string();
    assert!(error.contains(" on lo was lost (") && error.contains("and cannot be closed: a comm of plugin "), "{error}");
    for connection in [&connection, &other] {
        let totals = connection.stats().expect("statistics").totals;
        assert_eq!(totals.resent_chunks, 0, "{totals:?}");
    }
    // The sender's comm has the chunk that failed.
    if std::env::var("STRICT_FOREIGN_CLOSES").is_ok_and(|closes| closes == "0") {
        let error = a.deregister(near).expect_err("the comm may still read it").to_string();
        assert!(error.contains("a plugin has not closed a channel"), "{error}");
    }
}

fn no_nic_in_common() {
    let b = engine();
    let mut peer = Command::new(std::env::current_exe().expect("this program"));
    peer.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(CASE, "peer_on_eth2");
    peer.env_remove("STRICT_FOREIGN_COUNTERS").env("STRICT_FOREIGN_DEVICES", "eth2@127.0.0.2").env("PEER", b.metadata());
    let mut peer = peer.spawn().expect("peer");
    let connection = b.accept().expect("accept");
    let mut memory = vec![0u8; LEN];
    let mr = b.register(memory.as_mut_ptr() as usize, LEN).expect("register");
    let id = connection.recv(LocalSegment { mr, addr: memory.as_ptr() as usize, len: LEN }).expect("recv");
    connection.wait(id, Some(Duration::from_secs(30))).expect("received");
    assert!(memory == pattern());
    assert_eq!(counter(COMMS), 0, "the foreign plugin carries nothing");
    drop((connection, b));
    assert!(peer.wait().expect("peer").success());
}

/// A peer is killed while it sends and receives. All transfers end with an error; comms, pages, registrations and descriptors go.
fn peer_dies() {
    let b = engine();
    let len = 64 << 20;
    let mut memory = vec![1u8; len];
    let mr = b.register(memory.as_mut_ptr() as usize, len).expect("register");
    for _ in 0..3 {
        let mut peer = Command::new(std::env::current_exe().expect("this program"));
        peer.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(CASE, "peer_that_dies");
        let mut peer = peer.env_remove("STRICT_FOREIGN_COUNTERS").env("PEER", b.metadata()).spawn().expect("peer");
        let connection = b.accept().expect("accept");
        let half = len / 2;
        let (out, inc) = (memory.as_ptr() as usize, memory.as_ptr() as usize + half);
        let ids: Vec<u64> = (0..20)
            .flat_map(|_| {
                let send = connection.send(std::iter::once(LocalSegment { mr, addr: out, len: half })).expect("send");
                [send, connection.recv(LocalSegment { mr, addr: inc, len: half }).expect("recv")]
            })
            .collect();
        let before = counter(MESSAGES_IN);
        let until = Instant::now() + Duration::from_secs(20);
        while counter(MESSAGES_IN) < before + 40 {
            assert!(Instant::now() < until, "nothing arrives");
            std::thread::sleep(Duration::from_millis(1));
        }
        peer.kill().expect("kill");
        peer.wait().expect("peer");
        let failed = ids.iter().filter(|&&id| connection.wait(id, Some(Duration::from_secs(30))).is_err()).count();
        assert!(failed > 0, "all transfers ended well");
        drop(connection);
        settles("comms are closed", COMMS, 0);
        settles("receive pages are given back", PAGES_OUT, 0);
    }
    b.deregister(mr).expect("deregister");
    // A registration that the last request of a NIC's last comm used waits for the next comm there.
    assert!(counter(REGISTRATIONS) <= 1, "{} registrations", counter(REGISTRATIONS));
    let (c, d) = (engine(), engine());
    drop(pair(&c, &d));
    settles("registrations are dropped", REGISTRATIONS, 0);
    settles("descriptors are closed", DESCRIPTORS, 0);
}

/// A receive manager that answers calls of some kinds not or wrongly, until it is dropped or for a minute: a call that waits for it goes on
/// then.
struct Frozen {
    file: PathBuf,
}

impl Frozen {
    fn new(calls: &str) -> Frozen {
        let file = PathBuf::from(std::env::var("STRICT_FOREIGN_ANSWERS").expect("file"));
        std::fs::write(&file, calls).expect("file");
        let frozen = Frozen { file: file.clone() };
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(60));
            let _ = std::fs::remove_file(file);
        });
        frozen
    }
}

/// Runs something that has a deadline.
fn in_time<R>(what: &str, deadline: Duration, body: impl FnOnce() -> R) -> R {
    let before = Instant::now();
    let result = body();
    let (time, most) = (before.elapsed(), deadline + MARGIN);
    assert!(time < most, "{what} took {time:.1?}, of at most {most:.1?}");
    result
}

/// The deadlines of a connect and of a close.
fn deadlines() -> (Duration, Duration) {
    let config = Config::from_env().expect("configuration");
    (config.connect_timeout, config.close_timeout)
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Connects until the error says that the plugin has stalled.
fn is_refused(a: &Engine, b: &Engine, call: &str) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let connect = || a.connect("127.0.0.1", "", local::port(b));
        let error = in_time("a connect", deadlines().0, connect).expect_err("the receive manager is frozen").to_string();
        if error.contains(&format!("{call} has not returned for ")) {
            return;
        }
        assert!(Instant::now() < until, "{error}");
    }
}

fn frozen_close() {
    let (a, b) = (engine(), engine());
    let (connection, other) = pair(&a, &b);
    let (connect, close) = deadlines();
    // Comms that are not closed may use it.
    let memory: [&'static mut [u8]; 2] = [vec![3u8; 64 << 20].leak(), vec![0; 64 << 20].leak()];
    let [from, to] = [0, 1].map(|i| memory[i].as_ptr() as usize);
    let (near, far) = (a.register(from, 64 << 20).expect("register"), b.register(to, 64 << 20).expect("register"));
    let item = b.fifo_item(far, to, 64 << 20).expect("item");
    let local = LocalSegment { mr: near, addr: from, len: 64 << 20 };
    // A close of TCPXO does not ask the manager, and the end of a registration does.
    let frozen = Frozen::new(if delivers() { "deregMr" } else { "close" });
    connection.transfer(Direction::Write, std::iter::once((local, item))).expect("start");
    std::thread::sleep(Duration::from_millis(20));
    in_time("a close", close, || connection.close());
    in_time("a close", close, || other.close());
    // After the deadline the connections are closed, which has a second.
    let deregistration = close + Duration::from_secs(1);
    let results =
        [(&a, near), (&b, far)].map(|(engine, mr)| in_time("a deregistration", deregistration, || engine.deregister(mr)));
    if !delivers() {
        // The last sends of the four channels wait behind the first closeRecv, and may be read until they are closed.
        let error = results.into_iter().find_map(Result::err).expect("a comm that is not closed may use it").to_string();
        assert!(error.contains("a plugin has not closed a channel"), "{error}");
    }
    is_refused(&a, &b, if delivers() { "" } else { "closeRecv" });
    in_time("the end of two connections", 2 * close, || drop((connection, other)));
    let (c, d) = (engine(), engine());
    let connected = in_time("a connect", connect, || c.connect("127.0.0.1", "", local::port(&d)));
    connected.expect_err("the plugin is the same");
    in_time("the end of two engines", 2 * close, || drop((c, d)));
    assert!(counter(COMMS) > 0);
    drop(frozen);
    settles("comms are closed", COMMS, 0);
    settles("flow rules are taken back", FLOW_RULES, 0);
    settles("receive pages are given back", PAGES_OUT, 0);
    drop(pair(&a, &b));
    settles("comms are closed", COMMS, 0);
    // An engine of TCPXO has no registration but those of its comms.
    settles("registrations are dropped", REGISTRATIONS, 0);
}

/// A call of a set-up does not return, in the thread of its plugin. An open connection over that plugin goes on, another plugin sets up its
/// connections, both ways, and an incoming connection to an engine of this plugin is answered within its deadline.
fn stuck_call() {
    let variable = |name| std::env::var(name).expect("variable");
    let (how, call) = (variable(HOW), variable(CALL));
    let ((a, b), (connect, close)) = ((engine(), engine()), deadlines());
    // An engine of TCPX has its receive memory from its first connection on.
    let before = (call != "accept").then(|| pair(&a, &b));
    let mut memory = [pattern(), vec![0; LEN]];
    let [from, to] = [0, 1].map(|i| memory[i].as_mut_ptr() as usize);
    let (near, far) = (a.register(from, LEN).expect("register"), b.register(to, LEN).expect("register"));
    let mut transfers = |what| {
        let Some((out, _)) = &before else { return };
        let [here, there] = &mut memory;
        here.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
        let local = LocalSegment { mr: near, addr: from, len: LEN };
        let item = b.fifo_item(far, to, LEN).expect("item");
        let id = out.transfer(Direction::Write, std::iter::once((local, item))).expect("start");
        in_time(what, 5 * MARGIN, || out.wait(id, None)).expect("written");
        assert!(here == there, "wrong bytes");
    };
    transfers("a transfer");
    let frozen = Frozen::new(&how);
    // The first one comes up without the memory that chunks need.
    let first = (call == "regMr").then(|| pair(&a, &b));
    is_refused(&a, &b, &call);
    transfers("a transfer beside the call");
    let soft = || Config::from_env_with(&[("UCCL_TCPX_PLUGIN_PATH", ""), ("UCCL_TCPX_PLUGIN", "soft")]).expect("configuration");
    let (c, d) = (Engine::new(soft()).expect("engine"), Engine::new(soft()).expect("engine"));
    let both = in_time("connections over the software plugin", Duration::ZERO, || (pair(&c, &d), pair(&d, &c)));
    let e = in_time("another engine of the plugin", Duration::ZERO, engine);
    for (near, far) in [(&e, &b), (&a, &e)] {
        let connected = in_time("a connect", connect, || near.connect("127.0.0.1", "", local::port(far)));
        let error = connected.expect_err("the call has not returned").to_string();
        assert!(error.contains(&format!("{call} has not returned for ")), "{error}");
    }
    drop(frozen);
    let until = Instant::now() + Duration::from_secs(20);
    while let Err(e) = e.connect("127.0.0.1", "", local::port(&b)) {
        assert!(Instant::now() < until, "{e}");
    }
    transfers("a transfer after the call");
    in_time("the end of the engines", 6 * close, || drop((both, before, first, a, b, c, d, e)));
    settles("comms are closed", COMMS, 0);
}

fn frozen_set_up(call: &str) {
    let (a, b) = (engine(), engine());
    let (frozen, (connect, _)) = (Frozen::new(call), deadlines());
    let connected = in_time("a connect", connect, || a.connect("127.0.0.1", "", local::port(&b)));
    let error = connected.expect_err("the receive manager is frozen").to_string();
    assert!(error.contains("did not come up in time"), "{error}");
    if call == "import" {
        is_refused(&a, &b, "accept");
    }
    drop(frozen);
    let until = Instant::now() + Duration::from_secs(20);
    while let Err(e) = a.connect("127.0.0.1", "", local::port(&b)) {
        assert!(Instant::now() < until, "{e}");
    }
    drop((a, b));
    settles("comms are closed", COMMS, 0);
}

/// The connection comes up without the memory that chunks need, and gets it with the first of them.
fn frozen_register() {
    let (a, b) = (engine(), engine());
    let mut memory = [vec![3u8; LEN], vec![0; LEN]];
    let [from, to] = [0, 1].map(|i| memory[i].as_mut_ptr() as usize);
    let (near, far) = (a.register(from, LEN).expect("register"), b.register(to, LEN).expect("register"));
    let (frozen, (connect, close)) = (Frozen::new("regMr"), deadlines());
    let connection = in_time("a connect", connect, || a.connect("127.0.0.1", "", local::port(&b))).expect("connect");
    let other = b.accept().expect("accept");
    is_refused(&a, &b, "regMr");
    drop(frozen);
    let until = Instant::now() + Duration::from_secs(20);
    while a.connect("127.0.0.1", "", local::port(&b)).is_err() {
        assert!(Instant::now() < until, "the plugin does not go on");
    }
    let item = b.fifo_item(far, to, LEN).expect("item");
    let local = LocalSegment { mr: near, addr: from, len: LEN };
    let id = connection.transfer(Direction::Write, std::iter::once((local, item))).expect("start");
    assert!(connection.wait(id, Some(Duration::from_secs(30))).expect("written").complete);
    assert!(memory[0] == memory[1], "wrong bytes");
    in_time("the end of two engines", 2 * close, || drop((connection, other, a, b)));
    settles("comms are closed", COMMS, 0);
}

/// Engines with other plugins are made meanwhile, and those with this one as soon as it goes on.
fn frozen_init() {
    let (frozen, (connect, _)) = (Frozen::new("init"), deadlines());
    let create = || Engine::new(Config::from_env().expect("configuration"));
    let first = std::thread::spawn(move || in_time("an engine", connect, create).map(|_| ()));
    std::thread::sleep(Duration::from_millis(100));
    let soft = || Config::from_env_with(&[("UCCL_TCPX_PLUGIN_PATH", ""), ("UCCL_TCPX_PLUGIN", "soft")]).expect("configuration");
    in_time("an engine over the software plugin", Duration::ZERO, || {
        let (a, b) = (Engine::new(soft()).expect("engine"), Engine::new(soft()).expect("engine"));
        assert_eq!(a.plugin_name(), "TCPX-soft");
        drop(pair(&a, &b));
    });
    let second = std::thread::spawn(move || in_time("a second engine", connect, create).map(|_| ()));
    for engine in [first, second] {
        let error = engine.join().expect("in time").expect_err("the receive manager is frozen");
        assert_eq!(error.kind(), uccl_p2p::status::ErrorKind::PluginLoad);
        assert!(error.to_string().contains("plugin FasTrak (simulated): init has not returned for 1."), "{error}");
    }
    in_time("a third engine", Duration::ZERO, create).expect_err("it stands still");
    drop(frozen);
    let until = Instant::now() + Duration::from_secs(20);
    while let Err(e) = create() {
        assert!(Instant::now() < until, "{e}");
        std::thread::sleep(Duration::from_millis(1));
    }
    moves();
}

fn wrong_answers() {
    let how = std::env::var(HOW).expect("how");
    let (connect, close) = deadlines();
    let (a, b) = (engine(), engine());
    let memory: [&'static mut [u8]; 2] = [vec![3u8; LEN].leak(), vec![0; LEN].leak()];
    let [from, to] = [0, 1].map(|i| memory[i].as_ptr() as usize);
    let (near, far) = (a.register(from, LEN).expect("register"), b.register(to, LEN).expect("register"));
    let later = how.starts_with("close") || how.starts_with("deregMr");
    let before = later.then(|| pair(&a, &b));
    let frozen = Frozen::new(&how);
    let connected: uccl_p2p::status::Result<_> = before.map_or_else(
        || {
            let connection = in_time("a connect", connect, || a.connect("127.0.0.1", "", local::port(&b)))?;
            Ok((connection, b.accept().expect("accept")))
        },
        Ok,
    );
    if how.starts_with("import") || how.starts_with("rule") {
        let error = connected.as_ref().map(|_| ()).expect_err("no channel comes up").to_string();
        let refused = !how.ends_with("hangup");
        assert_eq!(error.contains("no flow rule: "), refused, "{error}");
    } else {
        let (connection, other) = connected.as_ref().expect("connected");
        let item = b.fifo_item(far, to, LEN).expect("item");
        let local = LocalSegment { mr: near, addr: from, len: LEN };
        let id = connection.transfer(Direction::Write, std::iter::once((local, item))).expect("start");
        // Without staging memory the transfer fails.
        let written = in_time("a transfer", Duration::from_secs(10), || connection.wait(id, Some(Duration::from_secs(10))));
        assert_eq!(written.is_ok(), later, "{written:?}");
        in_time("a close", close, || connection.close());
        in_time("a close", close, || other.close());
    }
    drop(frozen);
    in_time("the end of two engines", 3 * close, || drop((connected, a, b)));
    // Only a restart helps where TCPX computes for ever.
    if !how.ends_with("hangup") || delivers() {
        settles("comms are closed", COMMS, 0);
        let (c, d) = (engine(), engine());
        drop(pair(&c, &d));
    }
}

fn slow_close() {
    let (a, b) = (engine(), engine());
    drop(pair(&a, &b));
    drop((a, b));
    assert!(counter(COMMS) > 0, "the close has waited for the receive manager");
    settles("comms are closed", COMMS, 0);
}

/// A busy machine slows the fast NIC, too, for a time.
fn slow_nic() {
    let mut seen = Vec::new();
    let spared = (0..3).any(|_| {
        let shares = shares_of_nics();
        seen.push(shares);
        shares.iter().all(|&(fast, slow)| slow > 0 && fast > 4 * slow)
    });
    assert!(spared, "bytes over the fast NIC, and over the slow one: {seen:?}");
}

/// Moves bytes both ways over two connections. The bytes of each over its fast NIC, and over its slow one.
fn shares_of_nics() -> [(u64, u64); 2] {
    let (a, b) = (engine(), engine());
    let (out, inc) = pair(&a, &b);
    let len = 16 << 20;
    let (mut here, mut there) = (vec![1u8; len], vec![2u8; len]);
    for (i, byte) in here.iter_mut().enumerate() {
        *byte = (i * 31 + i / 1021) as u8;
    }
    let (near, far) =
        (a.register(here.as_mut_ptr() as usize, len).expect("near"), b.register(there.as_mut_ptr() as usize, len).expect("far"));
    both_ways(&out, (&mut here, near), &b, (&mut there, far));
    both_ways(&inc, (&mut there, far), &a, (&mut here, near));
    let shares = [&out, &inc].map(|connection| {
        let channels = connection.stats().expect("statistics").channels;
        assert!(channels.iter().all(|channel| !channel.lost), "{channels:?}");
        let over =
            |nic: &str| -> u64 { channels.iter().filter(|channel| channel.nic == nic).map(|channel| channel.sent_bytes).sum() };
        (over("eth1"), over("eth2"))
    });
    drop((out, inc, a, b));
    settles("comms are closed", COMMS, 0);
    shares
}

/// Two processes send to each other, and one closes its end in the middle, this one in every other round; or the network resets all of their
/// connections, which ends the transfers, and in every other round those for data alone, which ends none. Both go on with the next round.
fn closes(resets: bool) {
    // Memory goes last.
    let mut memory = vec![1u8; 2 * HALF];
    let b = engine();
    let mut peer = Command::new(std::env::current_exe().expect("this program"));
    peer.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(CASE, "peer_that_closes");
    peer.env_remove("STRICT_FOREIGN_COUNTERS").env("PEER", b.metadata()).env("RESETS", if resets { "1" } else { "0" });
    let mut peer = peer.spawn().expect("peer");
    let peer = std::thread::spawn(move || {
        let status = peer.wait().expect("peer");
        if !status.success() {
            eprintln!("the peer ended: {status}");
            std::process::exit(1);
        }
    });
    let mr = b.register(memory.as_mut_ptr() as usize, 2 * HALF).expect("register");
    let mut cut = 0;
    for round in 0..rounds() {
        let connection = b.accept().unwrap_or_else(|e| panic!("round {round}: {e}"));
        // A connection that ends before it is accepted is never seen: the peer waits for this.
        let _ = connection.send(std::iter::once(LocalSegment { mr, addr: memory.as_ptr() as usize, len: FIRST }));
        let ids = both_directions(&connection, mr, memory.as_ptr() as usize);
        if round % 2 == 0 && !resets {
            in_the_middle(round);
        } else {
            let failed = failed(&connection, &ids);
            assert!(!resets || (failed > 0) == (round % 2 == 0), "round {round}: {failed} of {} transfers failed", ids.len());
            cut += failed;
        }
        connection.close();
    }
    peer.join().expect("the peer ended well");
    assert!(cut > 0, "all transfers ended well");
    settles("comms are closed", COMMS, 0);
    settles("flow rules are taken back", FLOW_RULES, 0);
    settles("receive pages are given back", PAGES_OUT, 0);
}

fn peer_that_closes() {
    let mut memory = vec![2u8; 2 * HALF];
    let a = engine();
    let resets = std::env::var("RESETS").is_ok_and(|v| v == "1");
    let port = port_of_peer();
    let mr = a.register(memory.as_mut_ptr() as usize, 2 * HALF).expect("register");
    for round in 0..rounds() {
        let connection = a.connect("127.0.0.1", "", port).unwrap_or_else(|e| panic!("round {round}: {e}"));
        let first = connection.recv(LocalSegment { mr, addr: memory.as_ptr() as usize + HALF, len: FIRST });
        // An error is as good: the other side has the connection, and has closed it.
        let _ = first.and_then(|id| connection.wait(id, Some(Duration::from_secs(30))));
        let ids = both_directions(&connection, mr, memory.as_ptr() as usize);
        if round % 2 != 0 || resets {
            in_the_middle(round);
        }
        if resets {
            // Data sockets and the control connection, or data sockets alone.
            let control = |here: u16, there: u16| [here, there].contains(&port);
            let reset = reset_connections(|here, there| round % 2 == 0 || !control(here.port(), there.port()));
            // After the first of them the other engine may reset some itself.
            assert!(reset > 0, "round {round}");
        }
        if resets || round % 2 == 0 {
            let failed = failed(&connection, &ids);
            assert!(!resets || (failed > 0) == (round % 2 == 0), "round {round}: {failed} of {} transfers failed", ids.len());
        }
        connection.close();
    }
}

const HALF: usize = 16 << 20;
const FIRST: usize = 64;

/// Far more than there is time for: sends from the lower half, receives into the upper one.
fn both_directions(connection: &Connection, mr: u64, at: usize) -> Vec<u64> {
    let pair = |_| {
        let send = connection.send(std::iter::once(LocalSegment { mr, addr: at, len: HALF }));
        [send, connection.recv(LocalSegment { mr, addr: at + HALF, len: HALF })]
    };
    // The peer may have closed meanwhile.
    (0..20).flat_map(pair).flatten().collect()
}

/// Waits for transfers; how many failed.
fn failed(connection: &Connection, ids: &[u64]) -> usize {
    ids.iter().filter(|&&id| connection.wait(id, Some(Duration::from_secs(30))).is_err()).count()
}

/// Waits until data moves, for another while in each round.
fn in_the_middle(round: u32) {
    std::thread::sleep(Duration::from_micros(u64::from(round * 7919 % 40) * 500));
}

fn port_of_peer() -> u16 {
    let text = std::env::var("PEER").expect("peer");
    let address = text.split('?').next();
    address.and_then(|address| address.rsplit(':').next()).and_then(|port| port.parse().ok()).expect("port")
}

fn peer_that_dies() {
    let a = engine();
    let connection = a.connect("127.0.0.1", "", port_of_peer()).expect("connect");
    let half = 32 << 20;
    let mut memory = vec![2u8; 2 * half];
    let mr = a.register(memory.as_mut_ptr() as usize, 2 * half).expect("register");
    for _ in 0..20 {
        let at = memory.as_ptr() as usize;
        connection.send(std::iter::once(LocalSegment { mr, addr: at, len: half })).expect("send");
        connection.recv(LocalSegment { mr, addr: at + half, len: half }).expect("recv");
    }
    std::thread::sleep(Duration::from_secs(60));
}

fn peer_on_eth2() {
    let a = engine();
    let connection = a.connect("127.0.0.1", "", port_of_peer()).expect("connect");
    let mut memory = pattern();
    let mr = a.register(memory.as_mut_ptr() as usize, LEN).expect("register");
    let local = LocalSegment { mr, addr: memory.as_ptr() as usize, len: LEN };
    let id = connection.send(std::iter::once(local)).expect("send");
    connection.wait(id, Some(Duration::from_secs(30))).expect("sent");
}

/// What the foreign plugin carries.
#[derive(Clone, Copy)]
enum Carried {
    /// Pairs of GPUs with memory that was registered before, and no others.
    Early,
    /// At least the engines' own.
    Engines,
}

/// Regions on two GPUs of each side, of which so many are registered before the sides connect: every pair, both ways, and whether the
/// foreign plugin carries it.
fn two_gpus(early_here: usize, early_there: usize, carried: Carried) {
    let (a, b) = (engine(), engine());
    let len = 3 << 20;
    let mut near: Vec<Vec<u8>> = (0..2).map(|gpu| (0..len).map(|i| (i * 7 + i / 509 + gpu) as u8).collect()).collect();
    let mut far: Vec<Vec<u8>> = (0..2).map(|_| vec![0; len]).collect();
    let mut near_mr: Vec<u64> = Vec::new();
    let mut far_mr: Vec<u64> = Vec::new();
    let register = |engine: &Engine, memory: &mut [Vec<u8>], mrs: &mut Vec<u64>, upto: usize| {
        while mrs.len() < upto {
            mrs.push(engine.register(memory[mrs.len()].as_mut_ptr() as usize, len).expect("register"));
        }
    };
    register(&a, &mut near, &mut near_mr, early_here);
    register(&b, &mut far, &mut far_mr, early_there);
    let (out, inc) = pair(&a, &b);
    register(&a, &mut near, &mut near_mr, 2);
    register(&b, &mut far, &mut far_mr, 2);
    for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        near[i].iter_mut().for_each(|byte| *byte = byte.wrapping_add(1 + j as u8));
        let before = counter(MESSAGES_IN);
        let item = b.fifo_item(far_mr[j], far[j].as_ptr() as usize, len).expect("item");
        let local = LocalSegment { mr: near_mr[i], addr: near[i].as_ptr() as usize, len };
        let id = out.transfer(Direction::Write, std::iter::once((local, item))).expect("write");
        out.wait(id, Some(Duration::from_secs(60))).expect("written");
        assert!(near[i] == far[j], "GPU {i} to GPU {j}");
        near[i].fill(0);
        let item = a.fifo_item(near_mr[i], near[i].as_ptr() as usize, len).expect("item");
        let local = LocalSegment { mr: far_mr[j], addr: far[j].as_ptr() as usize, len };
        let id = inc.transfer(Direction::Write, std::iter::once((local, item))).expect("write back");
        inc.wait(id, Some(Duration::from_secs(60))).expect("written back");
        assert!(near[i] == far[j], "GPU {j} back to GPU {i}");
        let foreign = counter(MESSAGES_IN) > before;
        match carried {
            Carried::Early => assert_eq!(foreign, i < early_here && j < early_there, "GPU {i} and GPU {j}"),
            Carried::Engines => assert!(foreign || (i, j) != (0, 0), "GPU 0 and GPU 0"),
        }
    }
    drop((out, inc));
    drop((a, b));
    settles("comms are closed", COMMS, 0);
    settles("receive pages are given back", PAGES_OUT, 0);
}

fn counter(index: usize) -> u64 {
    let path = std::env::var("STRICT_FOREIGN_COUNTERS").expect("counters");
    let bytes = std::fs::read(path).expect("counters");
    bytes[index * 8..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b))
}

fn settles(what: &str, index: usize, value: u64) {
    let until = Instant::now() + Duration::from_secs(20);
    while counter(index) != value {
        assert!(Instant::now() < until, "{what}: {}", counter(index));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn engine() -> Arc<Engine> {
    Engine::new(Config::from_env().expect("configuration")).expect("engine")
}

/// Writes and reads of many sizes, both ways, every byte compared.
fn refuses_encryption() {
    let error = Engine::new(Config::from_env().expect("configuration")).unwrap_err();
    assert_eq!(error.kind(), uccl_p2p::status::ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("cannot encrypt"), "{error}");
}

fn moves() {
    let (a, b) = (engine(), engine());
    let (out, inc) = pair(&a, &b);
    let len = 24 << 20;
    let bytes = |seed: usize| -> Vec<u8> { (0..len).map(|i| (i * 31 + i / 1021 + seed) as u8).collect() };
    let (mut here, mut there) = (bytes(1), bytes(2));
    let (near, far) =
        (a.register(here.as_mut_ptr() as usize, len).expect("near"), b.register(there.as_mut_ptr() as usize, len).expect("far"));
    both_ways(&out, (&mut here, near), &b, (&mut there, far));
    both_ways(&inc, (&mut there, far), &a, (&mut here, near));
    assert_eq!(counter(IMPORTS), u64::from(!delivers()));
    settles("receive pages are given back", PAGES_OUT, 0);
    println!("{} warnings of the plugin", counter(WARNINGS));
    drop((out, inc));
    drop((a, b));
    settles("comms are closed", COMMS, 0);
}

fn both_ways(connection: &Connection, (own, own_mr): (&mut [u8], u64), peer: &Engine, (other, other_mr): (&mut [u8], u64)) {
    let len = own.len();
    for (round, size) in [1, 100, 4096, 65_537, 3 << 20, len].into_iter().enumerate() {
        own[..size].iter_mut().for_each(|byte| *byte = byte.wrapping_add(round as u8 + 1));
        let item = peer.fifo_item(other_mr, other.as_ptr() as usize, len).expect("item");
        let local = LocalSegment { mr: own_mr, addr: own.as_ptr() as usize, len: size };
        for direction in [Direction::Write, Direction::Read] {
            let id = connection.transfer(direction, std::iter::once((local, item))).expect("transfer");
            connection.wait(id, None).expect("done");
            assert!(own[..size] == other[..size], "{size} bytes differ");
            if direction == Direction::Write {
                other[..size].iter_mut().for_each(|byte| *byte ^= 0x5A);
            }
        }
    }
}

/// Scattered blocks leave through staging memory, which is registered with the plugin; where all of it is there before, the transfer
/// registers nothing.
fn ready() {
    const BLOCK: usize = 8 << 10;
    let size = 2 << 20;
    let (mut from, mut to) = (vec![3u8; size], vec![0u8; size]);
    let mut first = 0;
    for early in [false, true] {
        let (a, b) = (engine(), engine());
        let register =
            |engine: &Engine, memory: &mut Vec<u8>| engine.register(memory.as_mut_ptr() as usize, size).expect("region");
        let before = early.then(|| (register(&a, &mut from), register(&b, &mut to)));
        let (out, _inc) = pair(&a, &b);
        let (source, target) = before.unwrap_or_else(|| (register(&a, &mut from), register(&b, &mut to)));
        if early {
            // A separate thread does it for the engine that was called.
            settles("the second connection has as many as the first", REGISTRATIONS_EVER, 2 * first);
        }
        let registered = counter(REGISTRATIONS_EVER);
        assert!(registered > 0);
        first = registered;
        let item = b.fifo_item(target, to.as_ptr() as usize, size).expect("item");
        let blocks = (0..size / BLOCK).step_by(2).map(|i| {
            let local = LocalSegment { mr: source, addr: from.as_ptr() as usize + i * BLOCK, len: BLOCK };
            (local, uccl_p2p::engine::FifoItem { addr: item.addr + (i * BLOCK) as u64, ..item })
        });
        let id = out.transfer(Direction::Write, blocks).expect("transfer");
        out.wait(id, None).expect("done");
        assert_eq!(counter(REGISTRATIONS_EVER), registered, "registered before the connection: {early}");
    }
}

fn staging_alone() {
    let (a, b) = (engine(), engine());
    let (out, _inc) = pair(&a, &b);
    let (size, regions) = (1 << 20, 8);
    let (from, mut to) = (vec![5u8; regions * size], vec![0u8; regions * size]);
    let mut registered = 0;
    for i in 0..regions {
        let source = a.register(from.as_ptr() as usize + i * size, size).expect("source");
        let target = b.register(to.as_mut_ptr() as usize + i * size, size).expect("target");
        let item = b.fifo_item(target, to.as_ptr() as usize + i * size, size).expect("item");
        let local = LocalSegment { mr: source, addr: from.as_ptr() as usize + i * size, len: size };
        let id = out.transfer(Direction::Write, std::iter::once((local, item))).expect("transfer");
        out.wait(id, None).expect("done");
        if i == 0 {
            registered = counter(REGISTRATIONS_EVER);
        }
    }
    assert!(from == to && registered > 0);
    // Three channels, each with a send comm and a receive comm at both ends.
    assert!(counter(REGISTRATIONS_EVER) <= 12, "{registered} registrations at first, then {}", counter(REGISTRATIONS_EVER));
}

fn inline_threshold() {
    let error = Engine::new(Config::from_env().expect("configuration")).unwrap_err();
    assert!(error.to_string().contains("NCCL_INLINE_THRESHOLD=2048"), "{error}");
}

fn registrations() {
    let (a, b) = (engine(), engine());
    let connections: Vec<_> = (0..3).map(|_| pair(&a, &b)).collect();
    let (regions, size) = (40, 1 << 20);
    let mut memory = vec![7u8; regions * size];
    let mut target = vec![0u8; size];
    let into = b.register(target.as_mut_ptr() as usize, size).expect("target");
    let item = b.fifo_item(into, target.as_ptr() as usize, size).expect("item");
    let before = counter(REGISTRATIONS_MOST);
    let sources: Vec<u64> =
        (0..regions).map(|i| a.register(memory.as_mut_ptr() as usize + i * size, size).expect("region")).collect();
    for (out, _) in &connections {
        for (i, &mr) in sources.iter().enumerate() {
            let local = LocalSegment { mr, addr: memory.as_ptr() as usize + i * size, len: size };
            let id = out.transfer(Direction::Write, std::iter::once((local, item))).expect("transfer");
            out.wait(id, None).expect("done");
        }
    }
    // Besides those of the regions each receive comm has one small block.
    let comms = counter(COMMS);
    let most = counter(REGISTRATIONS_MOST) - before;
    assert!(most >= regions as u64 && most <= 2 * regions as u64 + comms, "{most} registrations, {comms} comms");
    for mr in sources {
        a.deregister(mr).expect("deregister");
    }
    let left = counter(REGISTRATIONS);
    assert!(left <= comms, "{left} registrations after the regions are gone");
    drop(connections);
    drop((a, b));
    settles("registrations are dropped", REGISTRATIONS, 0);
    settles("descriptors are closed", DESCRIPTORS, 0);
}
