//! The rules on typical hosts: with containers and pods, with IPv6 only, with unusable NICs.

use super::*;
use std::ffi::CString;

fn address(text: &str) -> Address {
    let (ip, prefix) = text.split_once('/').unwrap();
    let ip: IpAddr = ip.parse().unwrap();
    let scope = if ip.is_ipv6() && is_link_local(ip) { 2 } else { 0 };
    Address { ip, prefix: prefix.parse().unwrap(), scope, tentative: false, deprecated: false }
}

fn nic(name: &str, addresses: &[&str]) -> Found {
    Found {
        name: name.to_owned(),
        up: true,
        carrier: true,
        loopback: name == "lo",
        empty_bridge: false,
        addresses: addresses.iter().map(|a| address(a)).collect(),
    }
}

fn pick(all: &[Found], filter: Option<&str>) -> Vec<String> {
    let filter = filter.map(NameFilter::parse);
    select(all, filter.as_ref()).taken.into_iter().map(|(f, a)| format!("{} {}", f.name, a.ip)).collect()
}

fn names(all: &[Found], filter: Option<&str>) -> Vec<String> {
    pick(all, filter).into_iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

fn lo() -> Found {
    nic("lo", &["127.0.0.1/8", "::1/128"])
}

#[test]
fn a_host_with_containers_and_pods() {
    let all = [
        lo(),
        nic("eth0", &["10.128.0.5/32", "fe80::1/64"]),
        nic("docker0", &["172.17.0.1/16"]),
        nic("podman1", &["10.88.0.1/16"]),
        nic("cni0", &["10.244.0.1/24"]),
        nic("cali2a9", &["169.254.1.1/32"]),
        nic("flannel.1", &["10.244.0.0/32"]),
        nic("gke52f7a1b", &["10.4.0.1/32"]),
        nic("vethb01", &["fe80::9/64"]),
        nic("virbr0", &["192.168.122.1/24"]),
        nic("br-9a8b7c", &["172.18.0.1/16"]),
        nic("tun0", &["10.8.0.2/24"]),
        Found { empty_bridge: true, ..nic("lab", &["192.168.50.1/24"]) },
        nic("ens6", &["10.1.0.5/24"]),
    ];
    assert_eq!(names(&all, None), ["eth0", "ens6"]);
    assert_eq!(names(&all, Some("^ens")), ["eth0"]);
    assert_eq!(names(&all, Some("docker,lab")), ["docker0", "lab"], "named interfaces are used");
    assert_eq!(names(&all, Some("=ens6,lo,eth0")), ["ens6", "lo", "eth0"], "in the order of the names");
    assert_eq!(names(&all, Some("^=eth0,ens6,docker0"))[..2], ["podman1", "cni0"]);
    assert!(names(&all, Some("ib")).is_empty());
}

#[test]
fn a_pod_and_a_container_keep_their_interface() {
    assert_eq!(names(&[lo(), nic("eth0", &["10.244.3.7/24"])], None), ["eth0"]);
    assert_eq!(names(&[lo(), nic("veth7", &["10.0.0.2/24"])], None), ["veth7"], "the only interface");
    assert_eq!(names(&[lo()], None), ["lo"], "a machine without a network");
    assert_eq!(names(&[lo(), nic("eth0", &["169.254.7.7/16"])], None), ["eth0"]);
}

#[test]
fn a_bridge_with_a_physical_port_is_used() {
    let bridge = nic("br0", &["192.168.1.10/24"]);
    assert_eq!(names(&[lo(), nic("eth0", &[]), bridge.clone()], None), ["br0"]);
    let sys = std::env::temp_dir().join(format!("interfaces-{}", std::process::id()));
    for path in ["br0/bridge", "br0/brif/eth0", "br0/brif/vnet1", "eth0/device", "vnet1", "lab/bridge", "lab/brif/vnet1"] {
        std::fs::create_dir_all(sys.join(path)).unwrap();
    }
    assert!(system::is_empty_bridge(&sys, "lab"));
    assert!(!system::is_empty_bridge(&sys, "br0") && !system::is_empty_bridge(&sys, "eth0"));
    std::fs::remove_dir_all(sys).unwrap();
}

#[test]
fn an_unusable_nic_is_left_out_even_when_named() {
    let mut tentative = nic("eth3", &["fd00::3/64"]);
    tentative.addresses[0].tentative = true;
    let all = [
        nic("eth0", &["10.0.0.1/24"]),
        Found { carrier: false, ..nic("eth1", &["10.0.1.1/24"]) },
        Found { up: false, ..nic("eth2", &["10.0.2.1/24"]) },
        tentative,
        nic("eth4", &[]),
        nic("eth5", &["169.254.9.9/16", "fe80::5/64"]),
    ];
    assert_eq!(names(&all, None), ["eth0"]);
    let filter = NameFilter::parse("eth");
    let Selection { taken, refused, absent } = select(&all, Some(&filter));
    assert_eq!(taken.iter().map(|(f, _)| f.name.as_str()).collect::<Vec<_>>(), ["eth0", "eth5"]);
    let expected = [
        ("eth1", "it has no carrier"),
        ("eth2", "it is down"),
        ("eth3", "its address is tentative"),
        ("eth4", "it has no address"),
    ];
    assert_eq!(refused, expected);
    assert_eq!(absent, ["eth1", "eth2", "eth3", "eth4"]);
    let unnamed = select(&all, None);
    assert!(unnamed.refused.is_empty(), "no filter names them");
    assert_eq!(unnamed.absent, ["eth1", "eth2"], "an interface without a filter and an address is not for data");
    let docker = Found { carrier: false, ..nic("docker0", &["172.17.0.1/16"]) };
    assert!(select(&[nic("eth0", &["10.0.0.1/24"]), docker], None).absent.is_empty());
}

#[test]
fn an_interface_with_ipv6_only_uses_its_global_address() {
    let mut renewed = nic("eth1", &["fe80::7/64", "2001:db8::1/64", "2001:db8::2/64"]);
    renewed.addresses[1].deprecated = true;
    let all = [lo(), nic("eth0", &["fe80::5/64", "fd00::5/64"]), renewed, nic("eth2", &["fe80::9/64"])];
    assert_eq!(pick(&all, None), ["eth0 fd00::5", "eth1 2001:db8::2"]);
    assert_eq!(pick(&[nic("eth0", &["fd00::5/64", "10.0.0.9/24"])], None), ["eth0 10.0.0.9"]);
    assert_eq!(pick(&[nic("eth0", &["169.254.0.9/16", "fd00::5/64"])], None), ["eth0 fd00::5"]);
}

#[test]
fn tentative_addresses_are_read_from_the_kernels_table() {
    let table = "fd000000000000000000000000000002 02 40 00 80     eth0\n\
                 fe8000000000000000fc00fffe000001 02 40 20 c8     eth0\nnonsense\n";
    let flags = system::flags(table);
    assert_eq!(flags[&("fd00::2".parse().unwrap(), "eth0".to_owned())], 0x80);
    assert_eq!(flags[&("fe80::fc:ff:fe00:1".parse().unwrap(), "eth0".to_owned())], 0xc8);
    assert_eq!(flags.len(), 2);
}

#[test]
fn an_unknown_speed_is_zero() {
    assert_eq!(["100000", "-1", "", "4294967295", "0"].map(system::speed), [100_000, 0, 0, 0, 0]);
}

#[test]
fn filters_have_the_forms_of_nccl() {
    let admits = |f: &str, n: &str| NameFilter::parse(f).admits(n);
    assert!(admits("eth", "eth0") && admits("eth", "eth10") && !admits("eth", "lo"));
    assert!(admits("=eth1", "eth1") && !admits("=eth1", "eth10"));
    assert!(admits("^docker,lo", "eth0") && !admits("^docker,lo", "docker0") && !admits("^docker,lo", "lo"));
    assert!(admits("^=lo", "lo1") && !admits("^=lo", "lo"));
    assert!(admits("ens, eth", "eth3"));
}

#[test]
fn this_machine_has_a_usable_interface_and_knows_its_own_network() {
    assert!(!usable(None).unwrap().is_empty());
    let lo = usable(Some("=lo")).unwrap().remove(0);
    assert!(lo.loopback && lo.speed == 0 && lo.pci_path.is_none());
    assert!(lo.reaches("127.9.9.9".parse().unwrap()));
    assert!(!lo.reaches("10.0.1.1".parse().unwrap()) && !lo.reaches("::1".parse().unwrap()));
}

#[test]
fn the_link_is_checked_again() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let lo = usable(Some("=lo")).unwrap().remove(0);
    check_link(&lo, std::os::fd::AsFd::as_fd(&socket)).unwrap();
    let gone = Interface { name: CString::new("nosuch0").unwrap(), ..lo };
    assert_eq!(check_link(&gone, std::os::fd::AsFd::as_fd(&socket)).unwrap_err().raw_os_error(), Some(libc::ENODEV));
}
