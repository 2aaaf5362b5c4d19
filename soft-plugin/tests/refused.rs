//! Invalid settings fail `init`, with a line that names them.
#![allow(missing_docs)]

#[path = "common/lines.rs"]
mod log_lines;

use log_lines::{collect, lines};
use nccl_net_abi::*;

/// One test: there is one environment.
#[test]
fn init_fails_until_the_settings_are_valid() {
    collect();
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
        lines().clear();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        // SAFETY: no logger.
        assert_eq!(unsafe { init(None) }, NCCL_INVALID_ARGUMENT, "{name}={value}");
        let mut count = -1;
        // SAFETY: a live int.
        assert_eq!(unsafe { soft_plugin::table().devices.unwrap()(&mut count) }, NCCL_INVALID_ARGUMENT);
        assert_eq!(count, -1, "outputs stay untouched");
        let lines = lines();
        assert!(lines.iter().any(|l| l.contains(name) && l.contains(value)), "{name}={value}: {lines:?}");
        std::env::remove_var(name);
    }
    // SAFETY: no logger.
    assert_eq!(unsafe { init(None) }, NCCL_SUCCESS);
    assert!(lines().iter().any(|l| l.contains("UCCL_TCPX_SOFT_TREADS")), "a misspelt name is logged");
}
