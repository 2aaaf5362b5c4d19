//! The only module that uses the library's types; everything else in the tools goes through it. Adds no behaviour except context
//! for errors.

use crate::carried::{carrier, Carried, EAGER, NVLINK};
use crate::cuda;
use crate::error::{Context, Failure, Result};
use crate::fail;
use std::sync::Arc;
use std::time::Duration;
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Engine};
use uccl_p2p::stats::DIRECT;

pub use uccl_p2p::engine::{Direction, FifoItem, LocalSegment};

/// Version of the library (all packages of the workspace share one).
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Variable with the number of channels of a connection.
pub const CHANNELS_VARIABLE: &str = "UCCL_TCPX_NUM_CHANNELS";
/// Variable that turns emulation of GPU memory on.
pub const EMULATE_VARIABLE: &str = "UCCL_TCPX_EMULATE_DEVICE";
/// Variable with the address that the listening port is bound to.
pub const BIND_VARIABLE: &str = "UCCL_TCPX_BIND";
/// Variable with the listening port.
pub const PORT_VARIABLE: &str = "UCCL_TCPX_OOB_PORT";
/// Variable with what must carry memory.
pub const REQUIRE_VARIABLE: &str = "UCCL_TCPX_REQUIRE";
const PORT_VARIABLES: [&str; 2] = ["UCCL_TCPX_OOB_PORT", "UCCL_TCP_OOB_PORT"];

/// An environment variable of the library and its value in effect.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Setting {
    /// Name of the variable.
    pub name: String,
    /// Value in effect.
    pub value: String,
    /// `default` or `environment`.
    pub source: String,
    /// What it does.
    pub doc: String,
}

/// A budget: how much of something peers may take.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Budget {
    /// Name of its variable, or a word for a budget that follows from the process's limits.
    pub name: String,
    /// The value in effect.
    pub number: u64,
    /// What it counts.
    pub counts: String,
}

/// The budgets in effect; empty if a setting is invalid.
pub fn budgets() -> Vec<Budget> {
    let all = Config::from_env().map(|config| uccl_p2p::engine::budgets(&config)).unwrap_or_default();
    all.into_iter()
        .map(|(name, number, counts)| Budget { name: name.into(), number: number as u64, counts: counts.into() })
        .collect()
}

/// The network plugin that carries GPU memory (and host memory, unless a second plugin does).
#[derive(Clone, Debug, serde::Serialize)]
pub struct Plugin {
    /// The plugin's name.
    pub name: String,
    /// File it was loaded from; none for the built-in software plugin.
    pub path: Option<String>,
    /// Version of the NCCL net ABI that it implements.
    pub abi_version: u32,
}

/// A network device of the plugin.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Nic {
    /// The plugin that offers it.
    pub plugin: String,
    /// Name of the interface.
    pub name: String,
    /// Path under /sys of a PCI device.
    pub pci_path: Option<String>,
    /// Speed in Mbit/s, if known.
    pub speed_mbps: Option<i64>,
    /// NUMA node, if known.
    pub numa_node: Option<i32>,
    /// Kinds of memory it carries: `host`, `cuda`, `dmabuf`.
    pub pointers: Vec<String>,
}

/// Every variable of the library, with its value in effect.
pub fn settings() -> Vec<Setting> {
    let setting = |(name, value, source, doc): (&str, String, &str, &str)| Setting {
        name: name.into(),
        value,
        source: source.into(),
        doc: doc.into(),
    };
    Config::describe().into_iter().map(setting).collect()
}

/// Lets engines of this process listen on any port: a service may use the configured one on this host. Call it before threads
/// exist.
pub fn listen_on_any_port() {
    for name in PORT_VARIABLES {
        std::env::remove_var(name);
    }
}

/// Lets connections of this process take any path. Call it before threads exist.
pub fn require_nothing() {
    std::env::remove_var(REQUIRE_VARIABLE);
}

/// Checks that the library accepts the environment.
pub fn check_environment() -> Result<()> {
    Config::from_env().map(|_| ()).context("invalid setting in the environment")
}

/// Whether the environment asks the library to treat host memory as GPU memory.
pub fn emulation_is_on() -> bool {
    let value = std::env::var(EMULATE_VARIABLE).unwrap_or_default();
    matches!(value.trim().to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

/// Whether the environment forbids direct transfers, or is invalid.
pub fn direct_is_off() -> bool {
    Config::from_env().map_or(true, |config| config.disable_ipc)
}

fn pointer_kinds(mask: i64) -> Vec<String> {
    [(1, "host"), (2, "cuda"), (4, "dmabuf")]
        .into_iter()
        .filter(|(bit, _)| mask & bit != 0)
        .map(|(_, name)| name.to_string())
        .collect()
}

/// An engine of this process.
pub struct Node {
    engine: Arc<Engine>,
}

impl Node {
    /// Starts an engine, configured by the environment, for the chosen GPU.
    pub fn start() -> Result<Node> {
        Node::with(Config::from_env().map_err(Failure::new)?)
    }

    /// The same, for an engine that uses the network even with peers on its own host.
    pub fn start_for_the_network() -> Result<Node> {
        Node::with(Config { disable_ipc: true, ..Config::from_env().map_err(Failure::new)? })
    }

    /// An engine belongs to the GPU that is current where it is created.
    fn with(config: Config) -> Result<Node> {
        Ok(Node { engine: cuda::on_chosen(|| Engine::new(config))?.map_err(Failure::new)? })
    }

    /// "ip:port?gpu".
    pub fn metadata(&self) -> String {
        self.engine.metadata()
    }

    /// Connects to `address`, which is "ip:port" or "ip:port?gpu".
    pub fn connect(&self, address: &str) -> Result<Link> {
        let (ip, port, gpu) = split_address(address)?;
        let conn = self.engine.connect(&ip, &gpu, port).context(format_args!("cannot connect to {address}"))?;
        Ok(Link { conn })
    }

    /// Takes the next incoming connection; blocks until there is one or [`Node::stop_accept`] is called.
    pub fn accept(&self) -> Result<Link> {
        Ok(Link { conn: self.engine.accept().map_err(Failure::new)? })
    }

    /// Wakes [`Node::accept`], which then fails.
    pub fn stop_accept(&self) {
        self.engine.stop_accept();
    }

    /// Registers memory.
    pub fn register(&self, addr: usize, len: usize) -> Result<u64> {
        self.engine.register(addr, len).context(format_args!("cannot register {len} bytes"))
    }

    /// Deregisters memory; afterwards the library does not touch it.
    pub fn deregister(&self, mr: u64) -> Result<()> {
        self.engine.deregister(mr).context("cannot deregister memory")
    }

    /// The FIFO item that lets a peer read or write a registered range.
    pub fn item(&self, mr: u64, addr: usize, len: usize) -> Result<FifoItem> {
        self.engine.fifo_item(mr, addr, len).map_err(Failure::new)
    }

    /// The oldest notification that arrived, as name and message.
    pub fn next_notification(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        self.engine.next_notification().map(|n| (n.name, n.msg))
    }

    /// Name of the network plugin.
    pub fn plugin(&self) -> String {
        self.engine.plugin_name().to_string()
    }

    /// The network plugin.
    pub fn plugin_details(&self) -> Plugin {
        let plugin = self.engine.plugin();
        Plugin {
            name: plugin.name.clone(),
            path: plugin.path.as_ref().map(|path| path.display().to_string()),
            abi_version: plugin.abi_version,
        }
    }

    /// The network devices.
    pub fn nics(&self) -> Vec<Nic> {
        self.engine
            .nics()
            .into_iter()
            .map(|nic| Nic {
                plugin: nic.plugin.to_string(),
                name: nic.name.to_string(),
                pci_path: nic.pci_path.map(|p| p.to_string()),
                speed_mbps: Some(i64::from(nic.speed_mbps)).filter(|&speed| speed > 0),
                numa_node: nic.numa_node,
                pointers: pointer_kinds(i64::from(nic.ptr_support)),
            })
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.engine.shutdown();
    }
}

/// The kernel's statistics of a connection's channels.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// Retransmitted TCP segments.
    pub retransmits: u64,
    /// Congestion control of the last channel; empty where the plugin does not report it.
    pub congestion: String,
}

/// A connection to a peer.
pub struct Link {
    conn: Arc<Connection>,
}

impl Link {
    /// Starts a one-sided transfer.
    pub fn transfer(&self, direction: Direction, segments: &[(LocalSegment, FifoItem)]) -> Result<u64> {
        self.conn.transfer(direction, segments.iter().copied()).map_err(Failure::new)
    }

    /// Starts a two-sided send of one message gathered from `segments`.
    pub fn send(&self, segments: impl ExactSizeIterator<Item = LocalSegment>) -> Result<u64> {
        self.conn.send(segments).map_err(Failure::new)
    }

    /// Posts a receive.
    pub fn recv(&self, segment: LocalSegment) -> Result<u64> {
        self.conn.recv(segment).map_err(Failure::new)
    }

    /// Whether a transfer is complete; its error if it failed.
    pub fn poll(&self, id: u64) -> Result<bool> {
        Ok(self.conn.poll(id).map_err(Failure::new)?.complete)
    }

    /// Blocks until a transfer has ended, or for `timeout`; returns whether it is complete.
    pub fn wait(&self, id: u64, timeout: Option<Duration>) -> Result<bool> {
        Ok(self.conn.wait(id, timeout).map_err(Failure::new)?.complete)
    }

    /// Sends a notification.
    pub fn notify(&self, name: &[u8], msg: &[u8]) -> Result<()> {
        self.conn.notify(name, msg).map_err(Failure::new)
    }

    /// The kernel's statistics of the channels that this process sends on.
    pub fn network(&self) -> Network {
        let mut sum = Network::default();
        let channels = self.conn.stats().map(|stats| stats.channels).unwrap_or_default();
        for network in channels.into_iter().filter_map(|c| c.network) {
            sum.retransmits += network.retransmits;
            sum.congestion = network.congestion;
        }
        sum
    }

    /// The peer's address.
    pub fn peer(&self) -> String {
        self.conn.peer_ip().to_string()
    }

    /// What has carried the connection's bytes so far, in both directions.
    pub fn carried(&self) -> Carried {
        let mut out = Carried::default();
        let Ok(stats) = self.conn.stats() else { return out };
        for channel in &stats.channels {
            let bytes = channel.sent_bytes + channel.received_bytes;
            if channel.plugin == DIRECT {
                let nvlink = channel.nvlink_bytes.min(bytes);
                out.add(NVLINK, "", nvlink);
                out.add(crate::carried::DIRECT, "", bytes - nvlink);
                continue;
            }
            let nic = match channel.peer_nic.is_empty() {
                true => channel.nic.clone(),
                false => format!("{}>{}", channel.nic, channel.peer_nic),
            };
            out.add(carrier(&channel.plugin), &nic, bytes);
        }
        out.add(EAGER, "", stats.totals.eager_sent_bytes + stats.totals.eager_received_bytes);
        out
    }

    /// The number of data channels over plugins.
    pub fn channels(&self) -> usize {
        self.conn.channels()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.conn.close();
    }
}

/// Splits "ip:port" or "ip:port?gpu" into its parts; an IPv6 address may be in brackets.
fn split_address(address: &str) -> Result<(String, u16, String)> {
    let (endpoint, gpu) = address.split_once('?').unwrap_or((address, ""));
    let Some((ip, port)) = endpoint.rsplit_once(':') else {
        fail!("'{address}' is not an address: it must look like 10.0.0.1:4000")
    };
    let Ok(port @ 1..) = port.parse::<u16>() else { fail!("'{address}' is not an address: the port must be 1 to 65535") };
    let ip = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
    if ip.is_empty() {
        fail!("'{address}' is not an address: there is no host before the port");
    }
    Ok((ip.to_string(), port, gpu.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_split() {
        let ok = |a| split_address(a).unwrap();
        assert_eq!(ok("10.0.0.1:4000"), ("10.0.0.1".into(), 4000, String::new()));
        assert_eq!(ok("10.0.0.1:4000?-1"), ("10.0.0.1".into(), 4000, "-1".into()));
        assert_eq!(ok("[fe80::1]:80?0000:4a:00.0"), ("fe80::1".into(), 80, "0000:4a:00.0".into()));
        for bad in ["", "10.0.0.1", ":80", "host:", "host:0", "host:70000", "host:http"] {
            assert!(split_address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pointer_kinds_have_names() {
        assert_eq!(pointer_kinds(3), ["host", "cuda"]);
        assert!(pointer_kinds(0).is_empty());
    }
}
