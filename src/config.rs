//! The settings of an engine, from the environment or from the caller. Values are read once, when an engine is created; an
//! invalid value fails the creation. `table` declares the variables, and docs/configuration.md is generated from it.

mod docs;
mod source;
mod table;

pub use docs::document;
pub use table::{Kind, Variable, VARIABLES};

use crate::addresses::{AllowList, Bind, Target};
use crate::require::Requirement;
use crate::status::{bail, Result};
use crate::types::Protect;
use source::{parse_number, strtoll, Source};
use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

/// Which NCCL net plugin carries the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PluginChoice {
    /// TCPXO where its receive manager runs, else TCPX, if the library is found; otherwise the software plugin.
    Auto,
    /// GPUDirect-TCPX; failing to load it is an error.
    Tcpx,
    /// GPUDirect-TCPXO; failing to load it is an error.
    Tcpxo,
    /// The software plugin over ordinary TCP.
    Soft,
}

/// Whether device memory TCP carries GPU memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceMemoryTcp {
    /// Never.
    #[default]
    Off,
    /// Where it can.
    Auto,
    /// Always; an engine without it is an error.
    Require,
}

/// Budgets of the peers; a budget that is unset follows the limits of the process. Fields are documented at their variable in
/// [`VARIABLES`].
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Budgets {
    pub connections: Option<usize>,
    pub connections_of_peer: Option<usize>,
    pub transfers: Option<usize>,
    pub peer_bytes: Option<usize>,
    pub peer_bytes_of_one: Option<usize>,
    pub notif_bytes: Option<usize>,
    pub notif_bytes_of_one: Option<usize>,
    pub log_lines: Option<usize>,
}

impl Budgets {
    fn read(source: Source<'_>) -> Result<Budgets> {
        let number = |variable| source.number(variable).map(|n: Option<u64>| n.map(|n| usize::try_from(n).unwrap_or(usize::MAX)));
        Ok(Budgets {
            connections: number(&table::MAX_CONNECTIONS)?,
            connections_of_peer: number(&table::MAX_CONNECTIONS_OF_PEER)?,
            transfers: number(&table::MAX_PEER_TRANSFERS)?,
            peer_bytes: number(&table::PEER_BYTES)?,
            peer_bytes_of_one: number(&table::PEER_BYTES_OF_ONE)?,
            notif_bytes: number(&table::NOTIF_BYTES)?,
            notif_bytes_of_one: number(&table::NOTIF_BYTES_OF_ONE)?,
            log_lines: number(&table::PEER_LOG_LINES)?,
        })
    }
}

/// Which engine copies between GPUs on one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalGpu {
    /// Decided by the link between the GPUs.
    #[default]
    Auto,
    /// The engine at the destination reads.
    Pull,
    /// Staged: the engine at the source writes into a buffer of the destination's library.
    Push,
}

/// Settings of an engine. Fields are documented at their variable in [`VARIABLES`].
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Config {
    pub plugin: PluginChoice,
    pub plugin_path: Option<PathBuf>,
    /// Device memory TCP.
    pub devmem: DeviceMemoryTcp,
    /// What must carry memory on every connection.
    pub require: Requirement,
    pub num_channels: Option<usize>,
    pub chunk_bytes: usize,
    /// NCCL_DYNAMIC_CHUNK_SIZE as the plugin reads it, if it is set and not 0.
    pub plugin_limit: Option<usize>,
    /// UCCL_P2P_TRANSPORT asks for GPUDirect-TCPX if it is installed.
    pub transport_tcpx: bool,
    pub eager_bytes: usize,
    pub port: u16,
    pub bind: Bind,
    pub allow: AllowList,
    pub socket_ifname: Option<String>,
    pub auth_key_file: Option<PathBuf>,
    pub protect: Protect,
    /// Bytes a second that a connection sends on its channels.
    pub peer_rate: Option<u64>,
    pub emulate_device: bool,
    /// Number of simulated GPUs.
    pub emulate_devices: u8,
    /// A kernel copies device memory to host memory before it is sent, if the plugin carries host memory.
    pub stage_sends: bool,
    pub vectored: bool,
    /// No direct transfers.
    pub disable_ipc: bool,
    /// Where processes on one host without a common network namespace meet.
    pub local_dir: Option<PathBuf>,
    /// Which engine copies between GPUs on one host.
    pub local_gpu: LocalGpu,
    /// Thread blocks that a copy uses on a GPU.
    pub local_blocks: u32,
    pub spin: Option<Duration>,
    pub connect_timeout: Duration,
    pub handshake_timeout: Duration,
    pub transfer_timeout: Duration,
    pub nic_timeout: Duration,
    pub peer_timeout: Duration,
    pub match_timeout: Duration,
    pub close_timeout: Duration,
    /// Budgets of the peers.
    pub budgets: Budgets,
    /// Where statistics are exported.
    pub metrics: Option<Target>,
}

/// NCCL_DYNAMIC_CHUNK_SIZE, parsed as the plugin parses it. Refuses what the plugin would misread. 0 counts as unset.
fn plugin_limit(source: Source<'_>) -> Result<Option<usize>> {
    let Some(text) = source.get(&table::PLUGIN_LIMIT)? else { return Ok(None) };
    let name = table::PLUGIN_LIMIT.name;
    match strtoll(&text) {
        (0, "") => Ok(None),
        (n, "") if (4096..=i64::from(i32::MAX)).contains(&n) => Ok(Some(n as usize)),
        (n, "") => bail!(InvalidArgument, "{name}={text}: {n} bytes, expected 4096 to {}", i32::MAX),
        (n, _) => {
            let meant = parse_number(&text).map_or(String::new(), |n| format!("; for {text} write {n}"));
            bail!(InvalidArgument, "{name}={text}: the plugin does not know suffixes and reads this as {n} bytes{meant}")
        }
    }
}

/// Refuses settings of GPUDirect-TCPX with which it would end the process.
pub(crate) fn check_tcpx() -> Result<()> {
    let name = table::INLINE_THRESHOLD.name;
    match Source::default().get(&table::INLINE_THRESHOLD)? {
        Some(text) if strtoll(&text).0 != 0 => {
            bail!(InvalidArgument, "{name}={text}: GPUDirect-TCPX would read GPU memory on the CPU; unset it")
        }
        _ => Ok(()),
    }
}

/// Data sockets of a TCPX comm, as the plugin reads NCCL_NSOCKS_PERTHREAD and NCCL_SOCKET_NTHREADS: an invalid value counts as 1.
pub(crate) fn tcpx_sockets() -> usize {
    let number = |name: &str| std::env::var(name).ok().map_or(1, |text| strtoll(text.trim_start()).0);
    sockets_of(number("NCCL_NSOCKS_PERTHREAD"), number("NCCL_SOCKET_NTHREADS"))
}

/// Most sockets of a comm.
const MOST_SOCKETS: usize = 8;

fn sockets_of(per_thread: i64, threads: i64) -> usize {
    let taken = |n: i64, most: usize| usize::try_from(n).ok().filter(|n| (1..=most).contains(n)).unwrap_or(1);
    let (per_thread, threads) = (taken(per_thread, MOST_SOCKETS), taken(threads, 2 * MOST_SOCKETS));
    per_thread.min(MOST_SOCKETS / threads) * threads
}

/// Largest message of a plugin that starts now: the user's value, otherwise 512 KiB, or the larger chunk size of the environment
/// if the plugin `follows` it.
pub(crate) fn message_limit(follows: bool) -> Result<usize> {
    let source = Source::default();
    let usual = table::CHUNK_BYTES.number.unwrap_or(0) as usize;
    let chunk = source.number(&table::CHUNK_BYTES).ok().flatten().filter(|_| follows);
    Ok(plugin_limit(source)?.unwrap_or(usual.max(chunk.unwrap_or(0) as usize)))
}

/// Largest chunk the library accepts.
pub const MAX_CHUNK_BYTES: usize = 16 << 20;

/// The requested plugin, and whether UCCL_P2P_TRANSPORT asks for GPUDirect-TCPX if it is installed.
fn plugin_choice(source: Source<'_>) -> Result<(PluginChoice, bool)> {
    let (transport, tcpx) = match source.get(&table::TRANSPORT)?.map(|v| v.to_ascii_lowercase()).as_deref() {
        Some("tcpx") => (PluginChoice::Auto, true),
        Some("tcp") => (PluginChoice::Soft, false),
        _ => (PluginChoice::Auto, false),
    };
    let choice = match source.word(&table::PLUGIN)? {
        Some("tcpx") => PluginChoice::Tcpx,
        Some("tcpxo") => PluginChoice::Tcpxo,
        Some("soft") => PluginChoice::Soft,
        Some(_) => PluginChoice::Auto,
        None => transport,
    };
    Ok((choice, tcpx))
}

/// What carries GPU memory on every connection of an engine that requires device memory TCP.
const DEVICE_MEMORY: &str = "devmem|direct";

fn requirement(source: Source<'_>, devmem: DeviceMemoryTcp) -> Result<Requirement> {
    let required = source.parsed(&table::REQUIRE, Requirement::parse)?.unwrap_or_default();
    match devmem {
        DeviceMemoryTcp::Require => required.and(DEVICE_MEMORY),
        DeviceMemoryTcp::Off | DeviceMemoryTcp::Auto => Ok(required),
    }
}

fn device_memory_tcp(source: Source<'_>) -> Result<DeviceMemoryTcp> {
    Ok(match source.word(&table::DEVMEM)? {
        Some("auto") => DeviceMemoryTcp::Auto,
        Some("require") => DeviceMemoryTcp::Require,
        _ => DeviceMemoryTcp::Off,
    })
}

/// How data is protected on the network.
fn protect(source: Source<'_>) -> Result<Protect> {
    Ok(match source.word(&table::PROTECT)? {
        Some("integrity") => Protect::Integrity,
        Some("encrypt") => Protect::Encrypt,
        _ => Protect::Off,
    })
}

/// Which engine copies between GPUs on one host.
fn local_gpu(source: Source<'_>) -> Result<LocalGpu> {
    Ok(match source.word(&table::LOCAL_GPU)? {
        Some("pull") => LocalGpu::Pull,
        Some("push") => LocalGpu::Push,
        _ => LocalGpu::Auto,
    })
}

/// Warns about unknown variables in the environment, once a process.
fn warn_unknown() {
    static WARNED: process::PerProcess<process::Mutex<HashSet<String>>> = process::PerProcess::new(Default::default);
    let names: Vec<String> = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
    for line in source::unknown(names.iter().map(String::as_str)) {
        if WARNED.get().lock().insert(line.clone()) {
            crate::logging::init(log_level());
            log::warn!("{line}");
        }
    }
}

impl Config {
    /// Reads the environment.
    ///
    /// # Errors
    /// `InvalidArgument` names the variable whose value is invalid.
    pub fn from_env() -> Result<Config> {
        Config::from_env_with(&[])
    }

    /// Reads the environment. `settings` (name, value) override variables of the same name; an empty value unsets one.
    ///
    /// # Errors
    /// `InvalidArgument` names the variable or setting that is unknown, invalid, or applies to the whole process.
    pub fn from_env_with(settings: &[(&str, &str)]) -> Result<Config> {
        check_settings(settings)?;
        let source = Source(settings);
        check_process(source)?;
        let (plugin, transport_tcpx) = plugin_choice(source)?;
        let port = match source.number(&table::OOB_PORT)? {
            Some(port) => port,
            None => source.number_or_default(&table::OLD_OOB_PORT)?,
        };
        let socket_ifname = match source.get(&table::SOCKET_IFNAME)? {
            Some(names) => Some(names),
            None => source.get(&table::NCCL_SOCKET_IFNAME)?,
        };
        let devmem = device_memory_tcp(source)?;
        let plugin_limit = plugin_limit(source)?;
        let chunk = source.number_or_default(&table::CHUNK_BYTES)? as usize;
        Ok(Config {
            plugin,
            plugin_path: source.get(&table::PLUGIN_PATH)?.map(PathBuf::from),
            devmem,
            require: requirement(source, devmem)?,
            num_channels: source.number(&table::NUM_CHANNELS)?.map(|n| n as usize),
            chunk_bytes: plugin_limit.map_or(chunk, |limit| chunk.min(limit)),
            plugin_limit,
            transport_tcpx,
            eager_bytes: source.number_or_default(&table::EAGER_BYTES)? as usize,
            port: port as u16,
            bind: source.parsed(&table::BIND, Bind::parse)?.unwrap_or_default(),
            allow: source.parsed(&table::ALLOW, AllowList::parse)?.unwrap_or_default(),
            socket_ifname,
            auth_key_file: source.get(&table::AUTH_KEY_FILE)?.map(PathBuf::from),
            protect: protect(source)?,
            peer_rate: source.number(&table::PEER_RATE)?.filter(|&rate| rate > 0),
            emulate_device: source.flag(&table::EMULATE_DEVICE)?,
            emulate_devices: source.number_or_default(&table::EMULATE_DEVICES)? as u8,
            stage_sends: source.flag(&table::STAGE_SENDS)?,
            vectored: source.flag(&table::VECTORED)?,
            disable_ipc: source.flag(&table::DISABLE_IPC)?,
            local_dir: source.get(&table::LOCAL_DIR)?.map(PathBuf::from),
            local_gpu: local_gpu(source)?,
            local_blocks: source.number_or_default(&table::LOCAL_BLOCKS)? as u32,
            spin: source.number(&table::SPIN_US)?.map(Duration::from_micros),
            connect_timeout: source.millis(&table::CONNECT_TIMEOUT)?,
            handshake_timeout: source.millis(&table::HANDSHAKE_TIMEOUT)?,
            transfer_timeout: source.millis(&table::TRANSFER_TIMEOUT)?,
            nic_timeout: source.millis(&table::NIC_TIMEOUT)?,
            peer_timeout: source.millis(&table::PEER_TIMEOUT)?,
            match_timeout: source.millis(&table::MATCH_TIMEOUT)?,
            close_timeout: source.millis(&table::CLOSE_TIMEOUT)?,
            budgets: Budgets::read(source)?,
            metrics: source.parsed(&table::METRICS, Target::parse)?,
        })
    }

    /// Every variable with the value in effect and where it comes from ("default" or "environment").
    pub fn describe() -> Vec<(&'static str, String, &'static str, &'static str)> {
        let row = |name, default: &str, doc| match std::env::var(name) {
            Ok(value) if !value.trim().is_empty() => (name, value, "environment", doc),
            _ => (name, default.to_owned(), "default", doc),
        };
        let ours = VARIABLES.iter().map(|v| row(v.name, v.default, v.doc));
        ours.chain(soft_plugin::VARIABLES.iter().map(|v| row(v.name, v.default, v.doc))).collect()
    }
}

/// Refuses settings of one engine that are unknown, or apply to the whole process.
fn check_settings(settings: &[(&str, &str)]) -> Result<()> {
    for (name, _) in settings {
        match VARIABLES.iter().find(|v| v.name == *name) {
            Some(v) if v.of_the_process => {
                bail!(InvalidArgument, "{name} applies to the whole process and cannot be set for one engine")
            }
            Some(_) => {}
            None => bail!(InvalidArgument, "no variable is named {name:?}"),
        }
    }
    Ok(())
}

/// Refuses invalid values of variables that apply to the whole process, and warns about unknown names.
fn check_process(source: Source<'_>) -> Result<()> {
    warn_unknown();
    source.word(&table::LOG_LEVEL)?;
    source.flag(&table::DEBUG)?;
    soft_plugin::check_environment().map_err(|e| crate::status::err!(InvalidArgument, "{e}"))
}

/// Level of the log, from UCCL_P2P_LOG_LEVEL and UCCL_TCPX_DEBUG. An invalid value counts as the default here; creating an
/// engine refuses it.
pub(crate) fn log_level() -> log::LevelFilter {
    if matches!(Source::default().flag(&table::DEBUG), Ok(true)) {
        return log::LevelFilter::Debug;
    }
    match Source::default().word(&table::LOG_LEVEL) {
        Ok(Some("warning")) => log::LevelFilter::Warn,
        Ok(Some("fatal")) => log::LevelFilter::Error,
        Ok(Some(other)) => other.parse().unwrap_or(log::LevelFilter::Warn),
        _ => log::LevelFilter::Warn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_counted_as_the_plugin_does() {
        for (per_thread, threads, sockets) in
            [(1, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 4), (8, 8, 8), (4, 3, 6), (9, 1, 1), (-2, -2, 1), (0, 4, 4), (1, 16, 0)]
        {
            assert_eq!(sockets_of(per_thread, threads), sockets, "{per_thread} x {threads}");
        }
    }

    #[test]
    fn settings_override_the_environment() {
        let read = |settings: &[(&str, &str)]| Config::from_env_with(settings);
        let plain = read(&[]).expect("the environment of the tests is valid");
        let set = read(&[("UCCL_TCPX_NUM_CHANNELS", "3"), ("UCCL_TCPX_CHUNK_BYTES", "64K"), ("UCCL_TCPX_NUM_CHANNELS", " 5 ")]);
        let set = set.expect("good settings");
        assert_eq!((set.num_channels, set.chunk_bytes, set.port), (Some(5), 65536, plain.port));
        assert_eq!(read(&[("UCCL_TCPX_PLUGIN", ""), ("UCCL_P2P_TRANSPORT", "")]).expect("unset").plugin, PluginChoice::Auto);
        for bad in
            [("UCCL_TCPX_NUM_CHANNELS", "0"), ("UCCL_TCPX_NO_SUCH", "1"), ("", ""), ("PATH", "/"), ("UCCL_TCPX_DEBUG", "1")]
        {
            assert!(read(&[bad]).unwrap_err().to_str().contains(bad.0), "{bad:?}");
        }
    }

    /// Every variable that takes a number, a flag or a word refuses everything else, and the error names what it takes.
    #[test]
    fn every_value_is_checked() {
        for v in VARIABLES.iter().filter(|v| !v.of_the_process && v.kind != Kind::Text) {
            for value in ["many", "-1", "1.5", "99999999999999999999", "0x", "1 2"] {
                let error = Config::from_env_with(&[(v.name, value)]).unwrap_err();
                assert!(error.to_str().starts_with(&format!("{}={value}: expected", v.name)), "{error}");
            }
            if let Kind::Number(from, to) = v.kind {
                let read = |n: u64| Config::from_env_with(&[(v.name, &n.to_string())]);
                assert!(read(from).is_ok() && read(to).is_ok() && read(to + 1).is_err(), "{}", v.name);
                assert!(from == 0 || read(from - 1).is_err(), "{}", v.name);
                assert!(v.number.is_none_or(|n| (from..=to).contains(&n)), "{}", v.name);
            }
        }
        for (name, bad) in [
            ("UCCL_TCPX_BIND", "nowhere at all"),
            ("UCCL_TCPX_ALLOW", "10.0.0.0/99"),
            ("UCCL_TCPX_METRICS", "host:port"),
            ("UCCL_TCPX_PLUGIN", "hard"),
            ("UCCL_TCPX_REQUIRE", "tcpx,fast"),
            ("UCCL_TCPX_REQUIRE", "nics>=0"),
        ] {
            assert!(Config::from_env_with(&[(name, bad)]).unwrap_err().to_str().starts_with(&format!("{name}={bad}")), "{name}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_table() {
        let unset: Vec<(&str, &str)> = VARIABLES.iter().filter(|v| !v.of_the_process).map(|v| (v.name, "")).collect();
        let config = Config::from_env_with(&unset).expect("defaults");
        assert_eq!((config.chunk_bytes, config.eager_bytes, config.port), (524_288, 8192, 0));
        assert!(config.vectored && config.stage_sends && !config.emulate_device && config.metrics.is_none());
        assert_eq!((config.connect_timeout, config.close_timeout), (Duration::from_secs(30), Duration::from_secs(10)));
    }
}
