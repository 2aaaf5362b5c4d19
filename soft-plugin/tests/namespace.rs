//! Real interfaces in a network namespace of the test: IPv6 only, tentative, without a carrier.
#![allow(missing_docs)]

mod common;

use std::process::Command;

use common::*;
use nccl_net_abi::*;

/// Runs commands of `ip` in the calling thread's namespace; false when one fails.
fn ip(commands: &[&str]) -> bool {
    commands.iter().all(|c| Command::new("ip").args(c.split(' ')).status().is_ok_and(|s| s.success()))
}

fn prepare() -> bool {
    // SAFETY: moves this thread, and those that it starts, to a new namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return false;
    }
    let made = ip(&[
        "link set lo up",
        "link add eth7 type veth peer name px7",
        "addr add 10.77.0.1/24 dev eth7",
        "link set eth7 up",
        "link add eth8 type veth peer name px8",
        "link add eth9 type veth peer name px9",
    ]);
    // Its duplicate address detection does not end during the test.
    let slow = std::fs::write("/proc/sys/net/ipv6/conf/eth8/dad_transmits", "100000").is_ok();
    made && slow
        && ip(&[
            "link set px8 up",
            "link set eth8 up",
            "addr add fd00:8::1/64 dev eth8",
            "link set px9 up",
            "link set eth9 up",
            "addr add fd00:9::1/64 dev eth9 nodad",
        ])
}

/// Whether packets to this host's own IPv6 address stay on it. The kernel adds that route some time after the address: it waits for a lock that
/// namespaces of other processes may hold. Until then it asks the neighbours for the address, and a connect fails after 3 s.
fn is_routed(address: &str) -> bool {
    let route = Command::new("ip").args(["-6", "route", "get", address]).output().expect("ip");
    route.stdout.starts_with(b"local ")
}

fn devices() -> Vec<String> {
    let net = soft_plugin::table();
    let mut count = 0;
    // SAFETY: live outputs; zeroed properties are valid, and names are the plugin's.
    unsafe {
        assert_eq!(net.devices.unwrap()(&mut count), NCCL_SUCCESS);
        let name = |dev| {
            let mut p: ncclNetProperties_v7 = std::mem::zeroed();
            assert_eq!(net.getProperties.unwrap()(dev, &mut p), NCCL_SUCCESS);
            std::ffi::CStr::from_ptr(p.name).to_str().unwrap().to_owned()
        };
        (0..count).map(name).collect()
    }
}

#[test]
fn only_interfaces_that_can_carry_data_are_devices() {
    if !prepare() {
        eprintln!("SKIPPED: no network namespace can be made here");
        return;
    }
    std::env::set_var("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME", "eth");
    setup(&[("UCCL_TCPX_SOFT_THREADS", "1")]);
    assert_eq!(devices(), ["eth9"]);
    until("a route to the address of eth9", || is_routed("fd00:9::1").then_some(()));
    let (sender, receiver) = pair();
    assert!(describe(sender.0).starts_with("[fd00:9::1]:") && describe(sender.0).ends_with(" on eth9"), "{}", describe(sender.0));
    let mut landing = [0u8; 5];
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    sender.isendv(&[b"hello"]).unwrap();
    assert_eq!(wait(request), Ok(5));

    // A link that comes up later is appended to the devices; one that goes down is an error at once.
    assert!(ip(&["link set px7 up"]));
    until("eth7", || (devices() == ["eth9", "eth7"]).then_some(()));
    assert!(ip(&["link set px9 down"]));
    let (mut comm, mut handle) = (std::ptr::null_mut(), [0u8; 128]);
    let refused = until("the link to go down", || {
        // SAFETY: live buffers.
        let code = unsafe { soft_plugin::table().listen.unwrap()(0, handle.as_mut_ptr().cast(), &mut comm) };
        let errno = std::io::Error::last_os_error().raw_os_error();
        if code == NCCL_SUCCESS {
            close_listen(comm);
            return None;
        }
        Some((code, errno))
    });
    assert_eq!(refused, (NCCL_SYSTEM_ERROR, Some(libc::ENETDOWN)));
    assert_eq!(devices(), ["eth9", "eth7"], "a device keeps its number");
}
