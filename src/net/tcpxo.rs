//! What GPUDirect-TCPXO needs of a machine. Its init ends the process where something of this is missing, and waits for some of it without
//! a limit, so it is looked at before. Reads files and asks the receive manager; knows nothing of the plugin's calls.

use super::rxdm::{ask, closest_nics, knock, Wants};
use crate::status::{err, Result};
use socket2::SockAddr;
use soft_plugin::interfaces::{self, NameFilter};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The receive manager's sockets: abstract ones, whose names fill the address; files where the variable names their folder.
const MAPPING: &str = "rxdm_uds_nic_mapping";
const BUFFERS: &str = "rxdm_uds_buf_op:";
const FOLDER: &str = "FILE_BASED_UDS_PATH_PREFIX";
const ADDRESS: usize = 108;
/// The question for the NICs of all GPUs: a message without content.
const WHICH_NICS: [u8; 2] = [0; 2];

/// PCI vendor and device of the GPUs that it knows, those of an A3 Mega machine, and of its low-latency devices.
const GPU: (u32, u32) = (0x10de, 0x2330);
const LOW_LATENCY: (u32, u32) = (0x1ae0, 0x0084);
/// Bytes of each window of a low-latency device.
const WINDOW: u64 = 8 << 20;

/// Its control interface by default.
const CONTROL: &str = "eth0";

/// How long the receive manager may take for each answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// One thing that GPUDirect-TCPXO needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// What was found, or what is missing.
    pub found: std::result::Result<String, String>,
}

/// What GPUDirect-TCPXO needs of this machine for a GPU, given by PCI address, in the order in which it needs it. A line that depends on a
/// missing one is left out. Takes some seconds where the receive manager does not answer.
pub fn findings(gpu: Option<&str>) -> Vec<Finding> {
    let mut all = Vec::new();
    Machine::here().look(gpu, &mut |finding| {
        all.push(finding);
        true
    });
    all
}

/// A machine, as far as TCPXO looks at it.
pub(super) struct Machine {
    root: PathBuf,
    variable: Variables,
    /// The interfaces that have addresses.
    interfaces: Box<dyn Fn() -> Vec<Interface>>,
    answers_within: Duration,
}

/// The value of a variable of the environment, if it is set and not empty.
type Variables = Box<dyn Fn(&str) -> Option<String>>;

/// An interface and its addresses.
type Interface = (String, Vec<IpAddr>);

impl Machine {
    /// This one.
    pub(super) fn here() -> Machine {
        let interfaces = || {
            let all = interfaces::list().unwrap_or_default().into_iter();
            let interface = |i: interfaces::Found| (i.name, i.addresses.iter().map(|address| address.ip).collect());
            all.map(interface).filter(|(_, addresses): &Interface| !addresses.is_empty()).collect()
        };
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Machine {
            root: "/".into(),
            variable: Box::new(variable),
            interfaces: Box::new(interfaces),
            answers_within: ANSWERS_WITHIN,
        }
    }

    /// Whether its receive manager listens.
    pub(super) fn has_manager(&self) -> bool {
        match self.socket(MAPPING).and_then(|address| knock(&address)) {
            // The backlog is full, so a process listens.
            Err(e) => e.kind() == io::ErrorKind::WouldBlock,
            Ok(()) => true,
        }
    }

    /// Checks that TCPXO can be initialised with this GPU, by PCI address, current.
    ///
    /// # Errors
    /// `PluginLoad`: what is missing. The plugin must not be initialised then.
    pub(super) fn check(&self, gpu: Option<&str>) -> Result<()> {
        let mut missing = None;
        self.look(gpu, &mut |finding| {
            missing = finding.found.err();
            missing.is_none()
        });
        missing.map_or(Ok(()), |missing| Err(err!(PluginLoad, "{missing}")))
    }

    /// Looks at one thing after another, as long as `take` returns `true`.
    fn look(&self, gpu: Option<&str>, take: &mut dyn FnMut(Finding) -> bool) {
        let mut goes_on = true;
        let mut found = |what, found: std::result::Result<String, String>| {
            goes_on = goes_on && take(Finding { what, found });
            goes_on
        };
        if !found("switch", self.switch()) {
            return;
        }
        let nics = self.nics();
        let count = |nics: &Vec<Mapped>| format!("the receive manager answers; it has NICs for {} GPUs", nics.len());
        if !found("receive manager", nics.as_ref().map(count).map_err(Clone::clone)) {
            return;
        }
        let known = self.gpu(gpu);
        let gpu = known.as_ref().ok().cloned();
        if !found("GPU", known.map(|gpu| format!("GPU {gpu} is one that GPUDirect-TCPXO knows"))) {
            return;
        }
        let there = (self.interfaces)();
        if !found("control interface", self.control(&there)) {
            return;
        }
        let (Ok(nics), Some(gpu)) = (nics, gpu) else { return };
        let nic = self.nic(&gpu, &nics, &there);
        let address = nic.as_ref().ok().map(|(_, address)| *address);
        if !found("data NIC", nic.map(|(name, address)| format!("GPU {gpu} uses {name}, {address}"))) {
            return;
        }
        let Some(address) = address else { return };
        if !found("receive manager's socket of the NIC", self.buffers(address)) || !self.is_on("NCCL_FASTRAK_USE_LLCM", false) {
            return;
        }
        found("low-latency device", self.low_latency(address));
    }

    /// A parameter of the plugin that is 0 or 1.
    fn is_on(&self, name: &str, default: bool) -> bool {
        match (self.variable)(name).as_deref().map(str::trim) {
            Some("0") => false,
            Some("1") => true,
            _ => default,
        }
    }

    fn switch(&self) -> std::result::Result<String, String> {
        match self.is_on("NCCL_FASTRAK_ENABLE", true) {
            true => Ok("not turned off".to_owned()),
            false => Err("NCCL_FASTRAK_ENABLE=0 turns GPUDirect-TCPXO off".to_owned()),
        }
    }

    /// The address of a socket of the receive manager.
    fn socket(&self, name: &str) -> io::Result<SockAddr> {
        use std::os::unix::ffi::OsStrExt;
        match (self.variable)(FOLDER) {
            Some(folder) => SockAddr::unix(Path::new(&folder).join(name)),
            None => {
                let mut address = [0; ADDRESS];
                let Some(place) = address.get_mut(1..=name.len()) else { return Err(io::ErrorKind::InvalidInput.into()) };
                place.copy_from_slice(name.as_bytes());
                SockAddr::unix(std::ffi::OsStr::from_bytes(&address))
            }
        }
    }

    /// Its name, for messages.
    fn named(&self, name: &str) -> String {
        match (self.variable)(FOLDER) {
            Some(folder) => format!("{folder}/{name}"),
            None => format!("abstract socket {name}"),
        }
    }

    /// Asks the receive manager for the NICs of all GPUs.
    fn nics(&self) -> std::result::Result<Vec<Mapped>, String> {
        let answer = self.socket(MAPPING).and_then(|address| ask(address, &WHICH_NICS, Wants::Text, self.answers_within));
        let why = |e: io::Error| format!("the receive manager of GPUDirect-TCPXO does not answer: {}: {e}", self.named(MAPPING));
        let nics = answer.map_err(why)?;
        let Some(nics) = closest_nics(&nics) else {
            return Err(format!(
                "the receive manager of GPUDirect-TCPXO is another version: {}: the answer is none",
                self.named(MAPPING)
            ));
        };
        // The plugin takes the first of each without looking.
        match nics.iter().find(|(_, nics)| nics.is_empty()) {
            Some((gpu, _)) => Err(format!("the receive manager of GPUDirect-TCPXO lists GPU {} without a NIC", printable(gpu))),
            None => Ok(nics),
        }
    }

    fn gpu(&self, gpu: Option<&str>) -> std::result::Result<String, String> {
        let Some(gpu) = gpu else { return Err("GPUDirect-TCPXO needs a GPU, and none can be used here".to_owned()) };
        let gpu = gpu.to_ascii_lowercase();
        match pci_id(&self.devices().join(&gpu)) {
            Some(GPU) => Ok(gpu),
            Some((vendor, device)) => {
                Err(format!("GPUDirect-TCPXO does not know GPU {gpu} (PCI device {vendor:04x}:{device:04x})"))
            }
            None => Err(format!("GPUDirect-TCPXO does not know GPU {gpu} (no such PCI device)")),
        }
    }

    fn devices(&self) -> PathBuf {
        self.root.join("sys/bus/pci/devices")
    }

    fn control(&self, there: &[Interface]) -> std::result::Result<String, String> {
        let control = (self.variable)("NCCL_FASTRAK_CTRL_DEV").unwrap_or(CONTROL.into());
        match there.iter().find(|(name, _)| NameFilter::parse(&control).admits(name)) {
            Some((name, _)) => Ok(format!("{name} has an address")),
            None => Err(format!(
                "the control interface of GPUDirect-TCPXO, {control}, is not there or has no address (NCCL_FASTRAK_CTRL_DEV)"
            )),
        }
    }

    /// The NIC that the plugin would use for a GPU, and its address.
    fn nic(&self, gpu: &str, nics: &[Mapped], there: &[Interface]) -> std::result::Result<(String, IpAddr), String> {
        // The last entry counts.
        let mapped = nics.iter().rev().find(|(name, _)| name.eq_ignore_ascii_case(gpu)).and_then(|(_, nics)| nics.first());
        let Some(address) = mapped else {
            return Err(format!(
                "GPUDirect-TCPXO finds no data NIC for GPU {gpu}: the receive manager lists none (its NIC has no address, or had none when the manager started)"
            ));
        };
        let named = ["NCCL_FASTRAK_IFNAME", "NCCL_FASTRAK_SOCKET_IFNAME"].into_iter().find_map(&self.variable);
        let filter = named.as_deref().map(NameFilter::parse);
        // The plugin knows an interface by its first address.
        let owner = there.iter().find(|(_, addresses)| first(addresses).is_some_and(|first| first.to_string() == *address));
        match owner {
            Some((name, _)) if filter.is_some_and(|filter| !filter.admits(name)) => Err(format!(
                "GPUDirect-TCPXO cannot use {name}, the data NIC of GPU {gpu}: NCCL_FASTRAK_IFNAME leaves it out"
            )),
            Some((name, addresses)) => match first(addresses) {
                Some(address) => Ok((name.clone(), address)),
                None => Err(format!("{name} has no address")),
            },
            None => Err(format!(
                "GPUDirect-TCPXO cannot use the data NIC of GPU {gpu}: the receive manager says {}, and no interface here has this address (another network namespace?)",
                printable(address)
            )),
        }
    }

    /// Whether the receive manager takes connections for the memory of a NIC.
    fn buffers(&self, nic: IpAddr) -> std::result::Result<String, String> {
        let (name, until) = (format!("{BUFFERS}{nic}"), Instant::now() + self.answers_within);
        loop {
            match self.socket(&name).and_then(|address| knock(&address)) {
                Ok(()) => return Ok(format!("{} takes connections", self.named(&name))),
                // The backlog is full.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(e) => {
                    return Err(format!(
                        "the receive manager of GPUDirect-TCPXO takes no connection for {nic}: {}: {e}",
                        self.named(&name)
                    ))
                }
            }
        }
    }

    /// The device of a NIC that the plugin opens for its control path.
    fn low_latency(&self, nic: IpAddr) -> std::result::Result<String, String> {
        let folder = (self.variable)("NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY").unwrap_or_default();
        let folder: String = folder.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        let folder = if folder.is_empty() { self.devices() } else { folder.into() };
        let missing = |what: &dyn std::fmt::Display| {
            format!("{what} (NCCL_FASTRAK_USE_LLCM=1, NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY); NCCL_FASTRAK_USE_LLCM=0 does without")
        };
        let listed = std::fs::read_dir(&folder).map_err(|e| missing(&format_args!("{}: {e}", folder.display())))?;
        let devices = listed.flatten().map(|entry| entry.path()).filter(|path| pci_id(path) == Some(LOW_LATENCY));
        let devices: Vec<PathBuf> = devices.collect();
        let device = devices.iter().find(|path| owner(path).ok().map(IpAddr::V4) == Some(nic));
        let Some(device) = device else {
            let why = devices.iter().find_map(|path| Some(format!("; {}", owner(path).err()?)));
            let (count, folder) = (devices.len(), folder.display());
            let (v, d) = LOW_LATENCY;
            let why = why.unwrap_or_default();
            return Err(missing(&format_args!(
                "no low-latency device (PCI {v:04x}:{d:04x}) of {nic} in {folder}, which has {count}{why}"
            )));
        };
        for window in ["resource0_wc", "resource2_wc"].map(|name| device.join(name)) {
            let opened = File::options().read(true).write(true).open(&window).and_then(|file| file.metadata());
            match opened {
                Ok(found) if found.len() >= WINDOW => {}
                Ok(found) => return Err(missing(&format_args!("{} has {} bytes, too few", window.display(), found.len()))),
                Err(e) => return Err(missing(&format_args!("{}: {e}", window.display()))),
            }
        }
        Ok(format!("{} is that of {nic}", device.display()))
    }
}

/// A GPU and the addresses of its closest NICs, as the receive manager has them.
type Mapped = (String, Vec<String>);

/// The manager's words, sanitised for a log line.
fn printable(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// The address by which the plugin knows an interface.
fn first(addresses: &[IpAddr]) -> Option<IpAddr> {
    let routed = |address: &&IpAddr| match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => !address.is_unicast_link_local() && !address.is_loopback(),
    };
    addresses.iter().find(|address| address.is_ipv4()).or_else(|| addresses.iter().find(routed)).copied()
}

/// PCI vendor and device of a folder of a device.
fn pci_id(device: &Path) -> Option<(u32, u32)> {
    let number = |name: &str| {
        let text = std::fs::read_to_string(device.join(name)).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    Some((number("vendor")?, number("device")?))
}

/// The address of the NIC that a low-latency device belongs to, which the device itself shows.
fn owner(device: &Path) -> io::Result<Ipv4Addr> {
    let path = device.join("resource4");
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let file = File::open(&path).map_err(named)?;
    let len = size_of::<u128>();
    if file.metadata().map_err(named)?.len() < len as u64 {
        return Err(named(io::ErrorKind::UnexpectedEof.into()));
    }
    // SAFETY: a fresh mapping of bytes that the file has.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED {
        return Err(named(io::Error::last_os_error()));
    }
    // SAFETY: mapped above, and unmapped once.
    let address = unsafe {
        let address = at.cast::<u32>().read_volatile();
        libc::munmap(at, len);
        address
    };
    Ok(Ipv4Addr::from(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// Two switches of an A3 Mega machine, each with two GPUs and two data NICs, and a control NIC elsewhere.
    fn machine(root: &Path) {
        let device = |path: &str, vendor: &str, id: &str, class: &str| {
            let real = root.join("sys/devices").join(path);
            fs::create_dir_all(&real).expect("folder");
            for (name, text) in [("vendor", vendor), ("device", id), ("class", class)] {
                fs::write(real.join(name), format!("{text}\n")).expect("file");
            }
            let devices = root.join("sys/bus/pci/devices");
            fs::create_dir_all(&devices).expect("folder");
            std::os::unix::fs::symlink(&real, devices.join(real.file_name().expect("address"))).expect("link");
            real
        };
        let nic = |name: &str, path: &str| {
            let real = device(path, "0x1ae0", "0x0084", "0x020000");
            fs::create_dir_all(root.join("sys/class/net").join(name)).expect("folder");
            std::os::unix::fs::symlink(real, root.join("sys/class/net").join(name).join("device")).expect("link");
        };
        nic("eth0", "pci0000:00/0000:00:05.0");
        for switch in 0..2 {
            let at = |port: usize| format!("pci0000:80/0000:8{switch}:01.0/0000:8{switch}:0{port}.0/0000:9{switch}:0{port}.0");
            for port in 0..2 {
                device(&at(port), "0x10de", "0x2330", "0x030200");
                nic(&format!("eth{}", 1 + 2 * switch + port), &at(port + 2));
            }
        }
        fs::create_dir_all(root.join("sys/class/net/lo")).expect("folder");
    }

    /// A machine of its own, with a receive manager.
    struct Host {
        root: PathBuf,
        variables: Vec<(&'static str, String)>,
        interfaces: Vec<Interface>,
    }

    const GPU_0: &str = "0000:90:00.0";
    const NICS: [(&str, &str); 4] =
        [("0000:90:00.0", "10.0.1.2"), ("0000:90:01.0", "10.0.2.2"), ("0000:91:00.0", "10.0.3.2"), ("0000:91:01.0", "10.0.4.2")];

    /// The message that lists these GPUs.
    fn mapping(gpus: &[(&str, &[&str])]) -> Vec<u8> {
        let field = |tag: u8, bytes: &[u8]| [&[tag, bytes.len() as u8], bytes].concat();
        let nics = |all: &[&str]| all.iter().flat_map(|ip| field(0x0A, ip.as_bytes())).collect::<Vec<u8>>();
        let entry = |(gpu, ips): &(&str, &[&str])| field(0x0A, &[field(0x0A, gpu.as_bytes()), field(0x12, &nics(ips))].concat());
        let all: Vec<u8> = gpus.iter().flat_map(entry).collect();
        [&(all.len() as u16).to_be_bytes()[..], &all].concat()
    }

    fn all_nics() -> Vec<u8> {
        mapping(&NICS.each_ref().map(|(gpu, ip)| (*gpu, std::slice::from_ref(ip))))
    }

    impl Host {
        fn new(name: &str) -> Host {
            let root = std::env::temp_dir().join(format!("uccl-tcpxo-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&root);
            machine(&root);
            fs::create_dir_all(root.join("run")).expect("folder");
            let interface = |(name, ip): (&str, &str)| (name.to_owned(), vec![ip.parse().expect("address")]);
            let all = [("lo", "127.0.0.1"), ("eth0", "10.0.0.2"), ("eth1", "10.0.1.2"), ("eth2", "10.0.2.2")];
            let more = [("eth3", "10.0.3.2"), ("eth4", "10.0.4.2")];
            let interfaces = all.into_iter().chain(more).map(interface).collect();
            let variables = vec![(FOLDER, root.join("run").display().to_string())];
            Host { root, variables, interfaces }
        }

        fn with(mut self, name: &'static str, value: &str) -> Host {
            self.variables.push((name, value.to_owned()));
            self
        }

        fn without(mut self, interface: &str) -> Host {
            self.interfaces.retain(|(name, _)| name != interface);
            self
        }

        fn listen(&self, name: &str) -> UnixListener {
            let path = self.root.join("run").join(name);
            let _ = fs::remove_file(&path);
            UnixListener::bind(path).expect("socket")
        }

        /// Answers the question for NICs.
        fn serves(self, answer: impl Fn(&mut UnixStream) + Send + 'static) -> Host {
            let listener = self.listen(MAPPING);
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let mut question = [9; 2];
                    if stream.read_exact(&mut question).is_ok() && question == WHICH_NICS {
                        answer(&mut stream);
                    }
                }
            });
            self
        }

        fn gives(self, bytes: Vec<u8>) -> Host {
            self.serves(move |stream| drop(stream.write_all(&bytes)))
        }

        fn machine(&self) -> Machine {
            let (variables, interfaces) = (self.variables.clone(), self.interfaces.clone());
            let variable = move |name: &str| variables.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| value.clone());
            let answers_within = Duration::from_millis(300);
            let (variable, interfaces) = (Box::new(variable), Box::new(move || interfaces.clone()));
            Machine { root: self.root.clone(), variable, interfaces, answers_within }
        }

        fn lacks(&self, gpu: Option<&str>, what: &str) {
            let before = Instant::now();
            let error = self.machine().check(gpu).expect_err(what).to_string();
            assert!(error.contains(what), "{error}");
            assert!(before.elapsed() < Duration::from_secs(5), "{what}: {:?}", before.elapsed());
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.root);
        }
    }

    /// A receive manager with sockets for all NICs.
    fn buffers(host: &Host) -> Vec<UnixListener> {
        NICS.map(|(_, ip)| host.listen(&format!("{BUFFERS}{ip}"))).into()
    }

    #[test]
    fn what_is_missing_is_said_before_the_plugin_ends_the_process() {
        let none = Host::new("no-manager");
        assert!(!none.machine().has_manager());
        none.lacks(Some(GPU_0), "receive manager of GPUDirect-TCPXO does not answer");
        let full = Host::new("missing").gives(all_nics());
        let _sockets = buffers(&full);
        assert!(full.machine().has_manager());
        for (gpu, _) in NICS {
            assert_eq!(full.machine().check(Some(&gpu.to_uppercase())), Ok(()), "{gpu}");
        }
        full.lacks(None, "needs a GPU");
        full.lacks(Some("0000:00:05.0"), "does not know GPU 0000:00:05.0 (PCI device 1ae0:0084)");
        full.lacks(Some("0000:77:00.0"), "no such PCI device");
        let full = full.without("eth2");
        assert_eq!(full.machine().check(Some(GPU_0)), Ok(()));
        full.lacks(Some("0000:90:01.0"), "the receive manager says 10.0.2.2, and no interface here has this address");
        let full = full.with("NCCL_FASTRAK_IFNAME", "eth1,eth3");
        assert_eq!(full.machine().check(Some(GPU_0)), Ok(()));
        full.lacks(Some("0000:91:01.0"), "cannot use eth4, the data NIC of GPU 0000:91:01.0: NCCL_FASTRAK_IFNAME leaves it out");
        let full = full.with("NCCL_FASTRAK_ALLOW_NIC_SUBSET", "1").without("eth0");
        full.lacks(Some("0000:91:01.0"), "eth0, is not there or has no address");
        let full = full.with("NCCL_FASTRAK_CTRL_DEV", "eth1");
        // The plugin would listen on a NIC that it does not have.
        full.lacks(Some("0000:91:01.0"), "cannot use eth4");
        full.with("NCCL_FASTRAK_ENABLE", " 0").lacks(Some(GPU_0), "turns GPUDirect-TCPXO off");
    }

    #[test]
    fn the_plugin_knows_a_nic_by_its_first_address() {
        let mut host = Host::new("addresses").gives(all_nics());
        let _sockets = buffers(&host);
        let set = |host: &mut Host, addresses: &[&str]| {
            host.interfaces[2].1 = addresses.iter().map(|ip| ip.parse().expect("address")).collect();
        };
        set(&mut host, &["fe80::1", "2001:db8::1", "10.0.1.2"]);
        assert_eq!(host.machine().check(Some(GPU_0)), Ok(()));
        set(&mut host, &["10.0.1.3", "10.0.1.2"]);
        host.lacks(Some(GPU_0), "no interface here has this address");
    }

    #[test]
    fn a_manager_that_hangs_up_or_is_silent_or_talks_nonsense_is_refused() {
        type Answer = fn(&mut UnixStream);
        let cases: [(&str, Answer, &str); 7] = [
            ("hangs-up", |_| (), "closed the connection"),
            ("hangs-up-within", |s| drop(s.write_all(&all_nics()[..40])), "closed the connection"),
            ("silent", |_| std::thread::sleep(Duration::from_secs(60)), "no answer in 300ms"),
            ("garbage", |s| drop(s.write_all(&[0, 4, 0x0A, 9, 1, 1])), "the answer is none"),
            ("nothing", |s| drop(s.write_all(&[0, 0])), "the receive manager lists none"),
            ("others", |s| drop(s.write_all(&mapping(&[("0000:90:01.0", &["10.0.2.2"])]))), "the receive manager lists none"),
            ("without-a-nic", |s| drop(s.write_all(&mapping(&[("0000:9\n", &[])]))), "lists GPU 0000:9? without a NIC"),
        ];
        for (name, answer, why) in cases {
            let host = Host::new(name).serves(answer);
            let _sockets = buffers(&host);
            host.lacks(Some(GPU_0), why);
        }
        // It listens, and does not accept.
        let host = Host::new("full");
        let full = |name: &str| {
            let listener = host.listen(name);
            // SAFETY: an open socket.
            assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
            let first = UnixStream::connect(host.root.join("run").join(name)).expect("room for one");
            (listener, first)
        };
        let _full = full(MAPPING);
        assert!(host.machine().has_manager());
        host.lacks(Some(GPU_0), "no answer in 300ms");
        let host = Host::new("no-buffers").gives(all_nics());
        host.lacks(Some(GPU_0), "takes no connection for 10.0.1.2");
        let listener = host.listen("rxdm_uds_buf_op:10.0.1.2");
        drop(listener);
        host.lacks(Some(GPU_0), "refused");
        let listener = host.listen("rxdm_uds_buf_op:10.0.1.2");
        // SAFETY: an open socket.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let _first = UnixStream::connect(host.root.join("run/rxdm_uds_buf_op:10.0.1.2")).expect("room for one");
        host.lacks(Some(GPU_0), "takes no connection for 10.0.1.2");
    }

    #[test]
    fn the_low_latency_device_is_that_of_the_nic() {
        let host = Host::new("low-latency").gives(all_nics()).with("NCCL_FASTRAK_USE_LLCM", "1");
        let _sockets = buffers(&host);
        host.lacks(Some(GPU_0), "has 5; ");
        let folder = host.root.join("aperture");
        let host = host.with("NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY", &format!(" {}\n", folder.display()));
        host.lacks(Some(GPU_0), "No such file or directory");
        let device = |name: &str, id: &str, ip: [u8; 4]| {
            let path = folder.join(name);
            fs::create_dir_all(&path).expect("folder");
            let address = [&u32::from_be_bytes(ip).to_ne_bytes()[..], &[0; 12]].concat();
            for (name, content) in [("vendor", &b"0x1ae0\n"[..]), ("device", id.as_bytes()), ("resource4", &address[..])] {
                fs::write(path.join(name), content).expect("file");
            }
            path
        };
        device("0000:0a:00.0", "0x0084", [10, 0, 9, 2]);
        device("0000:0b:00.0", "0x0085", [10, 0, 1, 2]);
        fs::write(device("0000:0c:00.0", "0x0084", [10, 0, 1, 2]).join("resource4"), [1, 2]).expect("file");
        host.lacks(Some(GPU_0), "no low-latency device (PCI 1ae0:0084) of 10.0.1.2");
        let path = device("0000:0d:00.0", "0x0084", [10, 0, 1, 2]);
        host.lacks(Some(GPU_0), "resource0_wc: No such file");
        for name in ["resource0_wc", "resource2_wc"] {
            fs::write(path.join(name), b"").expect("file");
            host.lacks(Some(GPU_0), &format!("{name} has 0 bytes, too few"));
            File::options().write(true).open(path.join(name)).and_then(|file| file.set_len(WINDOW)).expect("size");
        }
        assert_eq!(host.machine().check(Some(GPU_0)), Ok(()));
        let host = host.with("NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY", "/nonexistent").with("NCCL_FASTRAK_USE_LLCM", "0");
        assert_eq!(host.machine().check(Some(GPU_0)), Ok(()));
    }

    #[test]
    fn findings_name_all_that_is_known() {
        let lines = |host: &Host, gpu: Option<&str>| {
            let mut all = Vec::new();
            host.machine().look(gpu, &mut |finding| {
                all.push((finding.what, finding.found.is_ok()));
                true
            });
            all
        };
        let host = Host::new("findings").without("eth0");
        let expected = [("switch", true), ("receive manager", false), ("GPU", false), ("control interface", false)];
        assert_eq!(lines(&host, None), expected);
        let host = Host::new("all-findings").gives(all_nics());
        let _sockets = buffers(&host);
        let expected =
            ["switch", "receive manager", "GPU", "control interface", "data NIC", "receive manager's socket of the NIC"];
        assert_eq!(lines(&host, Some(GPU_0)), expected.map(|what| (what, true)));
    }
}
