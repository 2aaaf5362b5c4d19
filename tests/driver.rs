//! Which CUDA driver the library takes, and what a broken one means. The drivers here are simulated: libraries that this test builds.

use std::path::{Path, PathBuf};
use std::process::Command;
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::Engine;

/// Set in the process that plays the application.
const APPLICATION: &str = "UCCL_TEST_DRIVER_APPLICATION";

/// Builds a simulated driver library.
fn library(dir: &Path, name: &str, source: &str) {
    let file = dir.join(format!("{name}.c"));
    let text = "int cuGetErrorString(int error, const char **text) { *text = \"simulated\"; return 0; }\n";
    std::fs::write(&file, format!("{text}{source}")).expect("source");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(dir.join(name)).arg(&file).status().expect("cc");
    assert!(built.success());
}

fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("driver-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("folder");
    dir
}

/// Runs this file's application with the libraries of `dir`, and returns its output about the registration.
fn application(dir: &Path) -> String {
    let run = Command::new(std::env::current_exe().expect("this program"))
        .args(["the_application", "--exact", "--nocapture", "--include-ignored"])
        .env(APPLICATION, "1")
        .env("LD_LIBRARY_PATH", dir)
        .env("NCCL_SOCKET_IFNAME", "lo")
        .env("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "lo")
        .output()
        .expect("run");
    let text = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{text}");
    text
}

#[test]
#[ignore = "the other tests run it in its own process"]
fn the_application() {
    if std::env::var_os(APPLICATION).is_none() {
        return;
    }
    let config = Config { plugin: PluginChoice::Soft, ..Config::from_env().expect("configuration") };
    let engine = Engine::new(config).expect("engine");
    let memory = vec![0u8; 10_000];
    match engine.register(memory.as_ptr() as usize, memory.len()) {
        Ok(_) => println!("REGISTERED"),
        Err(e) => println!("REFUSED with {}: {e}", e.code()),
    }
}

#[test]
fn a_simulated_driver_that_fails_refuses_registrations() {
    let dir = folder("fails");
    library(&dir, "libcuda.so.1", "int cuInit(unsigned f) { return 999; }\n");
    let said = application(&dir);
    assert!(said.contains("REFUSED with -32") && said.contains("999") && said.contains("libcuda.so.1"), "{said}");
}

#[test]
fn a_simulated_driver_without_gpus_leaves_host_memory() {
    let dir = folder("no-gpu");
    library(&dir, "libcuda.so.1", "int cuInit(unsigned f) { return 100; }\n");
    let said = application(&dir);
    assert!(said.contains("REGISTERED"), "{said}");
}

#[test]
fn a_simulated_toolkit_stub_is_never_loaded() {
    let dir = folder("stub");
    let mark =
        "#include <stdio.h>\n__attribute__((constructor)) static void loaded(void) { puts(\"STUB LOADED\"); fflush(stdout); }\n";
    library(&dir, "libcuda.so", &format!("{mark}int cuInit(unsigned f) {{ return 34; }}\n"));
    library(&dir, "libcuda.so.1", "int cuInit(unsigned f) { return 100; }\n");
    let said = application(&dir);
    assert!(said.contains("REGISTERED") && !said.contains("STUB LOADED"), "{said}");
}
