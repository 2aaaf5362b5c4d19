//! Settings that cannot be understood fail `init`, with a line that names them.
#![allow(missing_docs)]

use std::sync::Mutex;

use nccl_net_abi::*;

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collect;

impl log::Log for Collect {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LINES.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// One test: there is one environment.
#[test]
fn init_fails_until_the_settings_are_understood() {
    log::set_logger(&Collect).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    std::env::set_var("NCCL_SOCKET_IFNAME", "lo");
    std::env::set_var("UCCL_TCPX_SOFT_TREADS", "4");
    let init = soft_plugin::table().init.unwrap();
    for (name, value) in [
        ("UCCL_TCPX_SOFT_THREADS", "many"),
        ("UCCL_TCPX_SOFT_CONGESTION", "nonsense"),
        ("UCCL_TCPX_SOFT_STRICT", "perhaps"),
        ("NCCL_DYNAMIC_CHUNK_SIZE", "-1"),
    ] {
        std::env::set_var(name, value);
        LINES.lock().unwrap().clear();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        // SAFETY: no logger.
        assert_eq!(unsafe { init(None) }, NCCL_INVALID_ARGUMENT, "{name}={value}");
        let mut count = -1;
        // SAFETY: a live int.
        assert_eq!(unsafe { soft_plugin::table().devices.unwrap()(&mut count) }, NCCL_INVALID_ARGUMENT);
        assert_eq!(count, -1, "outputs stay untouched");
        let lines = LINES.lock().unwrap();
        assert!(lines.iter().any(|l| l.contains(name) && l.contains(value)), "{name}={value}: {lines:?}");
        std::env::remove_var(name);
    }
    // SAFETY: no logger.
    assert_eq!(unsafe { init(None) }, NCCL_SUCCESS);
    assert!(LINES.lock().unwrap().iter().any(|l| l.contains("UCCL_TCPX_SOFT_TREADS")), "a misspelt name is told");
}
