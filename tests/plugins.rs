//! Finding and loading plugins, as an application meets it: places and their order, broken files, tables of all versions, the
//! environment. Each case has its own process. The plugins are simulated: the strict foreign plugin, and two in C, one of each version and
//! one with the name of GPUDirect-TCPXO.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Direction, Engine, LocalSegment};
use uccl_p2p::status::ErrorKind;

const CASE: &str = "UCCL_PLUGINS_TEST_CASE";
/// Names the folder of the socket of TCPXO's receive manager.
const MANAGER: &str = "FILE_BASED_UDS_PATH_PREFIX";
const VERSION: &str = "UCCL_PLUGINS_TEST_VERSION";

// ---- fixtures ----

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("uccl-plugins-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("scratch folder");
        Scratch(dir)
    }
    /// A folder with files of these contents; gives its path.
    fn dir(&self, name: &str, files: &[(&str, &Path)]) -> String {
        let dir = self.0.join(name);
        std::fs::create_dir_all(&dir).expect("folder");
        for (file, source) in files {
            std::fs::copy(source, dir.join(file)).expect("copy");
        }
        dir.display().to_string()
    }
    fn broken(&self) -> PathBuf {
        let path = self.0.join("broken");
        std::fs::write(&path, b"\x7fELF and then nothing").expect("file");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The strict foreign plugin's shared object, built beside this test.
fn foreign() -> Option<PathBuf> {
    let this = std::env::current_exe().expect("this program");
    let deps = this.parent().expect("folder");
    let found = [deps.join("libnccl_net_strict_foreign.so"), deps.join("../libnccl_net_strict_foreign.so")];
    found.into_iter().find(|p| p.exists())
}

/// A simulated plugin whose table has this version; one of version 7, whose init fails, stands beside newer ones.
fn with_table(scratch: &Scratch, version: u32) -> PathBuf {
    let own = format!("-DVERSION={version}");
    compiled(scratch, "net_table", &format!("net_v{version}"), &[&own, if version > 7 { "-DOLDER=7" } else { "-DALONE" }])
}

/// A plugin of tests/plugins, compiled with these options, under a name.
fn compiled(scratch: &Scratch, source: &str, name: &str, options: &[&str]) -> PathBuf {
    let root = env!("CARGO_MANIFEST_DIR");
    let out = scratch.0.join(format!("{name}.so"));
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wall", "-Werror"]).args(options).arg(format!("-I{root}/net-abi/tests")).arg("-o").arg(&out);
    assert!(cc.arg(format!("{root}/tests/plugins/{source}.c")).status().expect("a C compiler").success());
    out
}

fn run(case: &str, environment: &[(&str, &str)]) -> Output {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    let unset = ["UCCL_TCPX_PLUGIN", "UCCL_TCPX_PLUGIN_PATH", "UCCL_P2P_TRANSPORT", "LD_LIBRARY_PATH", "NCCL_DYNAMIC_CHUNK_SIZE"];
    for name in unset.into_iter().chain([MANAGER]) {
        child.env_remove(name);
    }
    child.env(CASE, case).env("UCCL_P2P_LOG_LEVEL", "info").env("UCCL_TCPX_EMULATE_DEVICE", "1").env("NCCL_SOCKET_IFNAME", "lo");
    child.envs(environment.iter().copied()).output().expect("child")
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

fn passes(case: &str, environment: &[(&str, &str)], said: &[&str]) {
    let out = run(case, environment);
    let text = text(&out);
    assert!(out.status.success(), "{case} {environment:?}: {} {text}", out.status);
    for said in said {
        assert!(text.contains(said), "{case} {environment:?}: no {said:?} in {text}");
    }
}

// ---- tests ----

#[test]
fn candidates_are_tried_in_turn() {
    let Some(foreign) = foreign() else {
        panic!("libnccl_net_strict_foreign.so is missing: cargo build -p strict-foreign-plugin")
    };
    let s = Scratch::new("turn");
    let (broken, v8) = (s.broken(), with_table(&s, 8));
    let good = s.dir("good", &[("libnccl-net-tcpx.so", &foreign)]);
    let plain = s.dir("plain", &[("libnccl-net.so", &foreign)]);
    let bad = s.dir("bad", &[("libnccl-net-tcpx.so", &broken)]);
    let mixed = s.dir("mixed", &[("libnccl-net-tcpx.so", &broken), ("libnccl-net.so", &foreign)]);
    let other = s.dir("other", &[("libnccl-net.so", &v8)]);
    passes("is_tcpx", &[("LD_LIBRARY_PATH", &good)], &[]);
    passes("is_tcpx", &[("LD_LIBRARY_PATH", &plain), ("UCCL_TCPX_PLUGIN", "tcpx")], &[]);
    let left_out = "cannot be used and is left out";
    passes("is_soft", &[("LD_LIBRARY_PATH", &bad)], &[left_out]);
    passes("is_tcpx", &[("LD_LIBRARY_PATH", &mixed)], &[left_out]);
    passes("is_tcpx", &[("LD_LIBRARY_PATH", &format!("{bad}:/nonexistent:{good}"))], &[left_out]);
    passes(
        "load_error",
        &[("LD_LIBRARY_PATH", &format!("{bad}:{good}")), ("UCCL_TCPX_PLUGIN", "tcpx")],
        &["libnccl-net-tcpx.so"],
    );
    // A plugin that is not TCPX is taken only where it is named.
    passes("is_soft", &[("LD_LIBRARY_PATH", &other)], &["not GPUDirect-TCPX"]);
    passes("load_error", &[("LD_LIBRARY_PATH", &other), ("UCCL_TCPX_PLUGIN", "tcpx")], &["not installed"]);
    // A plugin without devices is not used.
    passes("is_soft", &[("LD_LIBRARY_PATH", &good), ("STRICT_FOREIGN_DEVICES", "none")], &["found no network device"]);
}

#[test]
fn where_both_plugins_are_installed_the_receive_manager_decides() {
    let Some(foreign) = foreign() else {
        panic!("libnccl_net_strict_foreign.so is missing: cargo build -p strict-foreign-plugin")
    };
    let s = Scratch::new("both");
    let tcpx = s.dir("tcpx", &[("libnccl-net-tcpx.so", &foreign)]);
    let tcpxo = s.dir("tcpxo", &[("libnccl-net.so", &compiled(&s, "fastrak", "fastrak", &[]))]);
    let (both, manager) = (format!("{tcpx}:{tcpxo}"), s.dir("run", &[]));
    let path = ("LD_LIBRARY_PATH", both.as_str());
    passes("is_tcpx", &[path], &[]);
    // It is looked at, and not initialised: that would end the process.
    passes("is_soft", &[("LD_LIBRARY_PATH", &tcpxo)], &["holds plugin FasTrak, which is not GPUDirect-TCPX"]);
    passes("is_soft", &[path, (MANAGER, &manager), ("UCCL_TCPX_PLUGIN", "soft")], &[]);
    passes("is_tcpx", &[path, (MANAGER, &manager)], &[]);
    let _listening = std::os::unix::net::UnixListener::bind(format!("{manager}/rxdm_uds_nic_mapping")).expect("socket");
    passes("is_tcpxo", &[path, (MANAGER, &manager)], &[]);
    passes("is_tcpx", &[path, (MANAGER, &manager), ("UCCL_TCPX_PLUGIN", "tcpx")], &[]);
    passes("is_tcpxo", &[path, (MANAGER, &manager), ("UCCL_TCPX_PLUGIN", "tcpxo")], &[]);
    // As the installer leaves it: another library under the plugin's usual name.
    let checker = with_table(&s, 8);
    let installed = s.dir(
        "installed",
        &[("libnccl-net.so", &checker), ("libnccl-net_internal.so", Path::new(&format!("{tcpxo}/libnccl-net.so")))],
    );
    passes("is_tcpxo", &[("LD_LIBRARY_PATH", &installed), (MANAGER, &manager), ("UCCL_TCPX_PLUGIN", "tcpxo")], &[]);
    let not_installed = "UCCL_TCPX_PLUGIN=tcpxo, but the GPUDirect-TCPXO plugin is not installed";
    passes("load_error", &[("LD_LIBRARY_PATH", &tcpx), ("UCCL_TCPX_PLUGIN", "tcpxo")], &[not_installed, "/var/lib/tcpxo/lib64"]);
    passes("is_soft", &[(MANAGER, &manager)], &["the receive manager of GPUDirect-TCPXO runs on this host, but"]);
}

/// Where something is missing, an init of TCPXO ends the process.
#[test]
fn tcpxo_is_not_initialised_where_it_would_end_the_process() {
    let Some(foreign) = foreign() else {
        panic!("libnccl_net_strict_foreign.so is missing: cargo build -p strict-foreign-plugin")
    };
    let s = Scratch::new("missing");
    let (dir, manager) = (s.dir("tcpxo", &[("libnccl-net.so", &foreign)]), s.dir("run", &[]));
    let path = foreign.display().to_string();
    let missing = [("STRICT_FOREIGN_CONTRACT", "tcpxo"), ("STRICT_FOREIGN_MANAGER", "none"), (MANAGER, manager.as_str())];
    let run = |case: &str, more: &[(&str, &str)], said: &str| passes(case, &[&missing, more].concat(), &[said]);
    let real = ("UCCL_TCPX_EMULATE_DEVICE", "0");
    let silent = "the receive manager of GPUDirect-TCPXO does not answer";
    run("load_error", &[real, ("UCCL_TCPX_PLUGIN_PATH", &path)], silent);
    run("load_error", &[real, ("LD_LIBRARY_PATH", &dir), ("UCCL_TCPX_PLUGIN", "tcpxo")], silent);
    let listening = std::os::unix::net::UnixListener::bind(format!("{manager}/rxdm_uds_nic_mapping")).expect("socket");
    // It listens, and does not answer.
    run("load_error", &[real, ("UCCL_TCPX_PLUGIN_PATH", &path)], "no answer in 5s");
    std::thread::spawn(move || {
        // A list without GPUs.
        listening.incoming().flatten().for_each(|mut stream| drop(std::io::Write::write_all(&mut stream, &[0, 0])));
    });
    // No GPU, or none that it knows.
    run("load_error", &[real, ("UCCL_TCPX_PLUGIN_PATH", &path)], "GPU");
    run("is_soft", &[real, ("LD_LIBRARY_PATH", &dir)], "the GPUDirect-TCPXO plugin cannot be used and is left out");
    // The simulated plugin does end it, which emulated GPU memory allows.
    let out = crate::run("is_soft", &[&missing[..], &[("UCCL_TCPX_PLUGIN_PATH", path.as_str())]].concat());
    assert!(!out.status.success() && text(&out).contains("init without the receive manager"), "{}", text(&out));
}

#[test]
fn the_transport_variable_of_uccl_never_stops_the_engine() {
    let s = Scratch::new("transport");
    let empty = s.dir("empty", &[]);
    passes(
        "is_soft",
        &[("UCCL_P2P_TRANSPORT", "tcpx"), ("LD_LIBRARY_PATH", &empty)],
        &["UCCL_P2P_TRANSPORT=tcpx", "ordinary TCP"],
    );
    passes("load_error", &[("UCCL_P2P_TRANSPORT", "tcpx"), ("UCCL_TCPX_PLUGIN", "tcpx")], &[]);
    passes("is_soft", &[("UCCL_P2P_TRANSPORT", "tcp")], &[]);
    let Some(foreign) = foreign() else {
        panic!("libnccl_net_strict_foreign.so is missing: cargo build -p strict-foreign-plugin")
    };
    let good = s.dir("good", &[("libnccl-net-tcpx.so", &foreign)]);
    passes("is_tcpx", &[("UCCL_P2P_TRANSPORT", "tcpx"), ("LD_LIBRARY_PATH", &good)], &[]);
}

#[test]
fn the_software_plugin_carries_chunks_as_large_as_the_environment_asks_for() {
    let (soft, few) = (("UCCL_TCPX_PLUGIN", "soft"), ("UCCL_TCPX_NUM_CHANNELS", "2"));
    for (chunk, bytes) in [("64K", 65536), ("1M", 1 << 20), ("4M", 4 << 20), ("16M", 16 << 20)] {
        let line = format!("chunks of up to {bytes} bytes");
        for device in [("UCCL_TCPX_EMULATE_DEVICE", "0"), ("UCCL_TCPX_EMULATE_DEVICE", "1"), ("UCCL_TCPX_STAGE_SENDS", "0")] {
            passes("chunks", &[soft, few, ("UCCL_TCPX_CHUNK_BYTES", chunk), device], &[&line]);
        }
    }
    // The plugin's value at its start counts, whatever an engine sets later.
    passes("chunk_setting", &[soft, few], &["chunks of up to 524288 bytes"]);
    let limit = ("NCCL_DYNAMIC_CHUNK_SIZE", "1048576");
    passes("chunks", &[soft, few, ("UCCL_TCPX_CHUNK_BYTES", "4M"), limit], &["chunks of up to 1048576 bytes"]);
}

/// 20 MiB from one engine to another, every byte compared.
fn moves(config: &dyn Fn() -> Config) {
    let (a, b) = (Engine::new(config()).expect("engine"), Engine::new(config()).expect("engine"));
    let metadata = b.metadata();
    let port =
        metadata.split('?').next().and_then(|address| address.rsplit(':').next()).and_then(|p| p.parse().ok()).expect("port");
    let connection = a.connect("127.0.0.1", "", port).expect("connect");
    let _other = b.accept().expect("accept");
    let len = 20 << 20;
    let from: Vec<u8> = (0..len).map(|i| (i * 31 + i / 4099) as u8).collect();
    let mut to = vec![0u8; len];
    let (near, far) = (
        a.register(from.as_ptr() as usize, len).expect("register"),
        b.register(to.as_mut_ptr() as usize, len).expect("register"),
    );
    let item = b.fifo_item(far, to.as_ptr() as usize, len).expect("item");
    let local = LocalSegment { mr: near, addr: from.as_ptr() as usize, len };
    let id = connection.transfer(Direction::Write, std::iter::once((local, item))).expect("transfer");
    connection.wait(id, Some(std::time::Duration::from_secs(60))).expect("written");
    assert!(from == to);
}

#[test]
fn the_environment_is_set_for_foreign_plugins_only() {
    let Some(foreign) = foreign() else {
        panic!("libnccl_net_strict_foreign.so is missing: cargo build -p strict-foreign-plugin")
    };
    let foreign = foreign.display().to_string();
    passes("chunk_size_unset", &[("UCCL_TCPX_PLUGIN", "soft")], &[]);
    passes("chunk_size_default", &[("UCCL_TCPX_PLUGIN_PATH", &foreign)], &[]);
    passes("chunk_size_default", &[("UCCL_TCPX_PLUGIN_PATH", &foreign), ("NCCL_DYNAMIC_CHUNK_SIZE", "0")], &[]);
    passes("chunk_size_kept", &[("UCCL_TCPX_PLUGIN_PATH", &foreign), ("NCCL_DYNAMIC_CHUNK_SIZE", "0x20000")], &[]);
    for refused in ["1M", "512K", "big", "1000", "-5", "08"] {
        passes("config_error", &[("NCCL_DYNAMIC_CHUNK_SIZE", refused)], &["NCCL_DYNAMIC_CHUNK_SIZE"]);
    }
}

#[test]
fn the_newest_table_is_preferred_and_read_right() {
    let s = Scratch::new("tables");
    for version in 7..=12 {
        let path = with_table(&s, version).display().to_string();
        let said = format!("simulated plugin: v{version} has 1 devices");
        passes("is_table", &[("UCCL_TCPX_PLUGIN_PATH", &path), (VERSION, &version.to_string())], &[&said]);
    }
}

/// Every byte compared, over the tables of all versions. With an iflush, a receive has wrong bytes until it was flushed.
#[test]
fn an_engine_transfers_over_every_table() {
    let s = Scratch::new("moves");
    for version in 7..=12 {
        for full in [&[][..], &["-DFULL"]] {
            let name = format!("moves_v{version}_{}", full.len());
            let own = format!("-DVERSION={version}");
            let options = [&["-DMOVES", &own], full].concat();
            let path = compiled(&s, "net_table", &name, &options).display().to_string();
            let carried = format!("2 channels over simulated-v{version} on ib0 for GPU 0 here and GPU 0 there");
            let environment = [("UCCL_TCPX_PLUGIN_PATH", &*path), ("UCCL_P2P_DISABLE_IPC", "1"), ("UCCL_TCPX_NUM_CHANNELS", "2")];
            passes("chunks", &environment, &[&carried]);
        }
    }
}

// ---- cases ----

fn engine() -> std::sync::Arc<Engine> {
    Engine::new(Config::from_env().expect("configuration")).expect("engine")
}

fn chunk_size() -> Option<String> {
    // What C code sees, not what Rust remembers.
    // SAFETY: a C string; no thread changes the environment now.
    let value = unsafe { libc::getenv(c"NCCL_DYNAMIC_CHUNK_SIZE".as_ptr()) };
    // SAFETY: null or a C string.
    (!value.is_null()).then(|| unsafe { std::ffi::CStr::from_ptr(value) }.to_string_lossy().into_owned())
}

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    match case.as_str() {
        "is_soft" => assert_eq!(engine().plugin_name(), "TCPX-soft"),
        "is_tcpx" => assert_eq!(engine().plugin_name(), "GPUDirectTCPX_v7"),
        "is_tcpxo" => assert_eq!((engine().plugin_name(), engine().plugin().wire_name()), ("FasTrak", "tcpxo")),
        "load_error" => {
            let error = Engine::new(Config::from_env().expect("configuration")).expect_err("no engine");
            println!("{error}");
            assert_eq!(error.kind(), ErrorKind::PluginLoad);
        }
        "config_error" => {
            let error = Config::from_env().expect_err("no configuration");
            println!("{error}");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
        "chunk_size_unset" => {
            engine();
            assert_eq!(chunk_size(), None);
        }
        "chunk_size_default" => {
            engine();
            assert_eq!(chunk_size().as_deref(), Some("524288"));
        }
        "chunk_size_kept" => {
            engine();
            assert_eq!(chunk_size().as_deref(), Some("0x20000"));
        }
        "is_table" => {
            let engine = engine();
            let version = std::env::var(VERSION).expect("set").parse().expect("number");
            let name = format!("simulated-v{version}");
            assert_eq!((engine.plugin_name(), engine.plugin().abi_version), (&*name, version));
            let nics = engine.nics();
            let nic = nics.iter().find(|n| n.plugin == name).expect("its device");
            assert_eq!((nic.name.as_str(), nic.speed_mbps, nic.ptr_support), ("ib0", 400_000, 3));
            assert_eq!(nic.pci_path.as_deref(), Some("/sys/devices/pci0000:00/0000:00:05.0"));
            assert_eq!(engine.plugin().traits.shared_registrations, version >= 8, "registrations are global");
        }
        "chunks" => moves(&|| Config::from_env().expect("configuration")),
        "chunk_setting" => moves(&|| Config::from_env_with(&[("UCCL_TCPX_CHUNK_BYTES", "4M")]).expect("configuration")),
        other => panic!("no case {other}"),
    }
}
