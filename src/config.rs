//! Every environment variable of the library, in one place: name, default, meaning. Values are read once, when an engine is
//! created; a value that cannot be understood fails the creation. docs/configuration.md is checked against this table.

use crate::addresses::{AllowList, Bind};
use crate::status::{bail, Error, Result};
use crate::types::Protect;
use std::path::PathBuf;
use std::time::Duration;

/// Which NCCL net plugin carries the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PluginChoice {
    /// TCPX where its library is found, else the software plugin.
    Auto,
    /// Google's plugin; failing to load it is an error.
    Tcpx,
    /// The software plugin over ordinary TCP.
    Soft,
}

/// Settings of an engine. Fields are documented at their variable in [`VARIABLES`].
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Config {
    pub plugin: PluginChoice,
    pub plugin_path: Option<PathBuf>,
    pub num_channels: Option<usize>,
    pub chunk_bytes: usize,
    /// NCCL_DYNAMIC_CHUNK_SIZE as the plugin reads it, where it is set and not 0.
    pub plugin_limit: Option<usize>,
    /// UCCL_P2P_TRANSPORT asks for TCPX where it is there.
    pub transport_tcpx: bool,
    pub eager_bytes: usize,
    pub port: u16,
    pub bind: Bind,
    pub allow: AllowList,
    pub socket_ifname: Option<String>,
    pub auth_key_file: Option<PathBuf>,
    pub protect: Protect,
    pub emulate_device: bool,
    /// Device memory leaves through host memory that a kernel fills, where the plugin carries host memory.
    pub stage_sends: bool,
    pub vectored: bool,
    pub spin: Option<Duration>,
    pub connect_timeout: Duration,
    pub handshake_timeout: Duration,
    pub transfer_timeout: Duration,
    pub peer_timeout: Duration,
    pub match_timeout: Duration,
    pub close_timeout: Duration,
}

/// One environment variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Its default, in words or as a value.
    pub default: &'static str,
    /// What it means.
    pub doc: &'static str,
}

const fn var(name: &'static str, default: &'static str, doc: &'static str) -> Variable {
    Variable { name, default, doc }
}

/// Every variable that the library reads. The software plugin's own (UCCL_TCPX_SOFT_*) follow the library's; NCCL_* variables that
/// only the plugin reads are passed through untouched and not listed.
pub const VARIABLES: &[Variable] = &[
    var("UCCL_TCPX_PLUGIN", "auto", "Network plugin: auto (TCPX where its library is found and works, else soft), tcpx (fail without it), soft."),
    var("UCCL_P2P_TRANSPORT", "unset", "UCCL's transport variable. UCCL's engine chooses its endpoint by it, so tcpx means UCCL_TCPX_PLUGIN=auto here: GPUDirect-TCPX where it is installed, else ordinary TCP with a warning. tcp means soft; other values are ignored. UCCL_TCPX_PLUGIN wins."),
    var("UCCL_TCPX_PLUGIN_PATH", "unset", "Path of the plugin's shared object; loaded instead of the standard places, whatever plugin it is."),
    var("UCCL_TCPX_NUM_CHANNELS", "by cores and NICs", "Data channels of a connection, 1 to 64; default: the number of cores up to 8, from 16 cores half of them up to 16, and at least one for each NIC; over TCPX 2 to 4 for each NIC that serves the GPU. The smaller of the two sides' values counts."),
    var("UCCL_TCPX_CHUNK_BYTES", "524288", "Largest message on a channel, bytes (suffixes K, M); 4 KiB to 16 MiB, and at most NCCL_DYNAMIC_CHUNK_SIZE; 512 KiB at most over a plugin other than the software plugin. The smaller side counts."),
    var("UCCL_TCPX_EAGER_BYTES", "8192", "Transfers of host memory up to this many bytes travel inside the control message; 0 to 64 KiB."),
    var("UCCL_TCPX_OOB_PORT", "0", "Listening port; 0: the system chooses."),
    var("UCCL_TCP_OOB_PORT", "0", "The same, UCCL's older name; UCCL_TCPX_OOB_PORT wins."),
    var("UCCL_TCPX_BIND", "control interface", "Address that the listening port is bound to; any: every address of the host. Default: the address of the control interface, and the loopback address so that processes of this host can use it."),
    var("UCCL_TCPX_ALLOW", "unset", "Networks that may connect, in CIDR form and separated by commas (10.0.0.0/8,fd00::/8); others are hung up on. Default: all."),
    var("UCCL_SOCKET_IFNAME", "unset", "Control interface: names or prefixes separated by commas, '=' for exact, '^' for exclusion. Default: the first that is up and not loopback, docker or a veth."),
    var("NCCL_SOCKET_IFNAME", "unset", "The same where UCCL_SOCKET_IFNAME is not set."),
    var("UCCL_TCPX_AUTH_KEY_FILE", "unset", "File with a pre-shared key of 16 to 4096 bytes, or lines NAME:KEY; for its owner only (chmod 600). Connects prove the first key, any is accepted, and a changed file counts at once. See docs/security.md."),
    var("UCCL_TCPX_PROTECT", "off", "How data of the software plugin is protected on its way: off (TCP's checksum), integrity (CRC-32C against damage; AES-256-GCM where a key is set), encrypt (AES-256-GCM; refused with other plugins). The stricter of the two sides counts. See docs/security.md."),
    var("UCCL_TCPX_EMULATE_DEVICE", "0", "1: registered host memory is treated as device memory and unpacked by the CPU. For tests without a GPU; both sides alike."),
    var("UCCL_TCPX_STAGE_SENDS", "1", "0: device memory is handed to the software plugin as device memory, as it is to TCPX; by default a kernel copies it to pinned host memory first, which is faster."),
    var("UCCL_TCPX_VECTORED", "1", "0: the vectored extension of the software plugin is not used (host memory is staged, as with a plugin that lacks it)."),
    var("UCCL_TCPX_SPIN_US", "by cores", "How long the progress thread spins after activity before it sleeps, microseconds."),
    var("UCCL_TCPX_CONNECT_TIMEOUT_MS", "30000", "Deadline of a connect, and of an incoming connection's set-up after its first message."),
    var("UCCL_TCPX_HANDSHAKE_TIMEOUT_MS", "5000", "How long an incoming connection may stay silent before it is dropped."),
    var("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "10000", "A connection with transfers in flight that moves nothing for this long is failed."),
    var("UCCL_TCPX_PEER_TIMEOUT_MS", "10000", "A peer that is silent (no heartbeat either) for this long is lost."),
    var("UCCL_TCPX_MATCH_TIMEOUT_MS", "300000", "How long a send waits for a receive, and a receive for a send."),
    var("UCCL_TCPX_CLOSE_TIMEOUT_MS", "10000", "How long deregistration and destruction wait for transfers in flight before they fail them."),
    var("UCCL_P2P_LOG_LEVEL", "warn", "error, warn, info, debug, trace or off. Log lines go to standard error."),
    var("UCCL_TCPX_DEBUG", "0", "1: the same as UCCL_P2P_LOG_LEVEL=debug."),
    var("UCCL_P2P_DISABLE_IPC", "0", "UCCL's variable; accepted. This library never uses IPC: data takes the channels also inside one host."),
    var("NCCL_DYNAMIC_CHUNK_SIZE", "unset", "Largest message of the plugin, bytes (decimal, or hexadecimal with 0x; no suffixes); at least 4096. Read by the plugin; the library sets it to 524288 before it loads a plugin of others when the user did not, since TCPX moves nothing without it."),
];

/// Where values come from: settings of one engine, by name, and behind them the environment.
#[derive(Clone, Copy, Default)]
struct Source<'a>(&'a [(&'a str, &'a str)]);

impl Source<'_> {
    fn get(self, name: &str) -> Result<Option<String>> {
        debug_assert!(VARIABLES.iter().any(|v| v.name == name), "{name} is not in the table");
        let given = self.0.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| Ok((*value).to_owned()));
        match given.unwrap_or_else(|| std::env::var(name)) {
            Ok(value) if value.trim().is_empty() => Ok(None),
            Ok(value) => Ok(Some(value.trim().to_owned())),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => bail!(InvalidArgument, "{name} is not UTF-8"),
        }
    }

    fn number(self, name: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(text) = self.get(name)? else { return Ok(None) };
        match parse_number(&text) {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => bail!(InvalidArgument, "{name}={text}: expected a number from {} to {}", range.start(), range.end()),
        }
    }

    fn flag(self, name: &str, default: bool) -> Result<bool> {
        match self.get(name)?.map(|v| v.to_ascii_lowercase()).as_deref() {
            None => Ok(default),
            Some("1" | "true" | "yes" | "on") => Ok(true),
            Some("0" | "false" | "no" | "off") => Ok(false),
            Some(other) => bail!(InvalidArgument, "{name}={other}: expected 0 or 1"),
        }
    }

    fn millis(self, name: &str, default: u64) -> Result<Duration> {
        Ok(Duration::from_millis(self.number(name, 1..=86_400_000)?.unwrap_or(default)))
    }
}

/// Variables that hold for the whole process, so that no engine can have a setting of its own: the log's, and what the plugin reads.
const OF_THE_PROCESS: &[&str] = &["UCCL_P2P_LOG_LEVEL", "UCCL_TCPX_DEBUG", "NCCL_DYNAMIC_CHUNK_SIZE"];

/// A number with an optional suffix K, M or G (powers of 1024).
fn parse_number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The leading number of a text, as C's strtoll reads it with base 0, and what follows it.
fn strtoll(text: &str) -> (i64, &str) {
    let (negative, rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let hex = rest.strip_prefix("0x").or_else(|| rest.strip_prefix("0X"));
    let (base, digits) = match hex {
        Some(digits) if digits.starts_with(|c: char| c.is_ascii_hexdigit()) => (16, digits),
        _ if rest.starts_with('0') => (8, rest),
        _ => (10, rest),
    };
    let end = digits.find(|c: char| !c.is_digit(base)).unwrap_or(digits.len());
    let number = match i64::from_str_radix(&digits[..end], base) {
        Ok(n) => n,
        Err(_) if end == 0 => 0,
        Err(_) => i64::MAX,
    };
    (if negative { -number } else { number }, &digits[end..])
}

/// NCCL_DYNAMIC_CHUNK_SIZE, read as the plugin reads it: what it would misunderstand is refused. 0 counts as unset.
fn plugin_limit(source: Source<'_>) -> Result<Option<usize>> {
    const NAME: &str = "NCCL_DYNAMIC_CHUNK_SIZE";
    let Some(text) = source.get(NAME)? else { return Ok(None) };
    match strtoll(&text) {
        (0, "") => Ok(None),
        (n, "") if (4096..=i64::from(i32::MAX)).contains(&n) => Ok(Some(n as usize)),
        (n, "") => bail!(InvalidArgument, "{NAME}={text}: {n} bytes, expected 4096 to {}", i32::MAX),
        (n, _) => {
            let meant = parse_number(&text).map_or(String::new(), |n| format!("; {n} would be what {text} means"));
            bail!(InvalidArgument, "{NAME}={text}: the plugin takes this for {n} bytes, since it knows no suffixes{meant}")
        }
    }
}

fn protect(source: Source<'_>) -> Result<Protect> {
    const NAME: &str = "UCCL_TCPX_PROTECT";
    match source.get(NAME)?.map(|v| v.to_ascii_lowercase()).as_deref() {
        None => Ok(Protect::default()),
        Some("off") => Ok(Protect::Off),
        Some("integrity") => Ok(Protect::Integrity),
        Some("encrypt") => Ok(Protect::Encrypt),
        Some(other) => bail!(InvalidArgument, "{NAME}={other}: expected off, integrity or encrypt"),
    }
}

/// A value that another module reads; its default when the variable is not set.
fn parsed<T: Default>(source: Source<'_>, name: &str, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    match source.get(name)? {
        Some(text) => parse(&text).map_err(|e| Error::new(e.kind(), format_args!("{name}={text}: {e}"))),
        None => Ok(T::default()),
    }
}

/// Largest chunk the library accepts, and the default.
pub const MAX_CHUNK_BYTES: usize = 16 << 20;
const DEFAULT_CHUNK_BYTES: usize = 512 << 10;

impl Config {
    /// Reads the environment.
    ///
    /// # Errors
    /// `InvalidArgument` names the variable whose value cannot be understood.
    pub fn from_env() -> Result<Config> {
        Config::from_env_with(&[])
    }

    /// Reads the environment, where `settings` (name, value) stand before variables of the same name; an empty value unsets one.
    ///
    /// # Errors
    /// `InvalidArgument` names the variable or setting that is not known, holds for the whole process, or cannot be understood.
    pub fn from_env_with(settings: &[(&str, &str)]) -> Result<Config> {
        for (name, _) in settings {
            if OF_THE_PROCESS.contains(name) {
                bail!(InvalidArgument, "{name} holds for the whole process and cannot be a setting of one engine");
            }
            if !VARIABLES.iter().any(|v| v.name == *name) {
                bail!(InvalidArgument, "no variable is named {name:?}");
            }
        }
        let source = Source(settings);
        let get = |name| source.get(name);
        let number = |name, range| source.number(name, range);
        let flag = |name, default| source.flag(name, default);
        let millis = |name, default| source.millis(name, default);
        let (transport, transport_tcpx) = match get("UCCL_P2P_TRANSPORT")?.map(|v| v.to_ascii_lowercase()).as_deref() {
            Some("tcpx") => (PluginChoice::Auto, true),
            Some("tcp") => (PluginChoice::Soft, false),
            _ => (PluginChoice::Auto, false),
        };
        let plugin = match get("UCCL_TCPX_PLUGIN")?.map(|v| v.to_ascii_lowercase()).as_deref() {
            None => transport,
            Some("auto") => PluginChoice::Auto,
            Some("tcpx") => PluginChoice::Tcpx,
            Some("soft") => PluginChoice::Soft,
            Some(other) => bail!(InvalidArgument, "UCCL_TCPX_PLUGIN={other}: expected auto, tcpx or soft"),
        };
        let port = match number("UCCL_TCPX_OOB_PORT", 0..=65535)? {
            Some(port) => port,
            None => number("UCCL_TCP_OOB_PORT", 0..=65535)?.unwrap_or(0),
        };
        let socket_ifname = match get("UCCL_SOCKET_IFNAME")? {
            Some(names) => Some(names),
            None => get("NCCL_SOCKET_IFNAME")?,
        };
        let plugin_limit = plugin_limit(source)?;
        let chunk = number("UCCL_TCPX_CHUNK_BYTES", 4096..=MAX_CHUNK_BYTES as u64)?.map_or(DEFAULT_CHUNK_BYTES, |n| n as usize);
        let chunk_bytes = plugin_limit.map_or(chunk, |limit| chunk.min(limit));
        Ok(Config {
            plugin,
            plugin_path: get("UCCL_TCPX_PLUGIN_PATH")?.map(PathBuf::from),
            num_channels: number("UCCL_TCPX_NUM_CHANNELS", 1..=64)?.map(|n| n as usize),
            chunk_bytes,
            plugin_limit,
            transport_tcpx,
            eager_bytes: number("UCCL_TCPX_EAGER_BYTES", 0..=65536)?.unwrap_or(8192) as usize,
            port: port as u16,
            bind: parsed(source, "UCCL_TCPX_BIND", Bind::parse)?,
            allow: parsed(source, "UCCL_TCPX_ALLOW", AllowList::parse)?,
            socket_ifname,
            auth_key_file: get("UCCL_TCPX_AUTH_KEY_FILE")?.map(PathBuf::from),
            protect: protect(source)?,
            emulate_device: flag("UCCL_TCPX_EMULATE_DEVICE", false)?,
            stage_sends: flag("UCCL_TCPX_STAGE_SENDS", true)?,
            vectored: flag("UCCL_TCPX_VECTORED", true)?,
            spin: number("UCCL_TCPX_SPIN_US", 0..=1_000_000)?.map(Duration::from_micros),
            connect_timeout: millis("UCCL_TCPX_CONNECT_TIMEOUT_MS", 30_000)?,
            handshake_timeout: millis("UCCL_TCPX_HANDSHAKE_TIMEOUT_MS", 5_000)?,
            transfer_timeout: millis("UCCL_TCPX_TRANSFER_TIMEOUT_MS", 10_000)?,
            peer_timeout: millis("UCCL_TCPX_PEER_TIMEOUT_MS", 10_000)?,
            match_timeout: millis("UCCL_TCPX_MATCH_TIMEOUT_MS", 300_000)?,
            close_timeout: millis("UCCL_TCPX_CLOSE_TIMEOUT_MS", 10_000)?,
        })
    }

    /// Every variable with the value in effect and where it comes from ("default" or "environment").
    pub fn describe() -> Vec<(&'static str, String, &'static str, &'static str)> {
        let row = |v: &Variable| match std::env::var(v.name) {
            Ok(value) if !value.trim().is_empty() => (v.name, value, "environment", v.doc),
            _ => (v.name, v.default.to_owned(), "default", v.doc),
        };
        VARIABLES.iter().map(row).collect()
    }
}

/// Level of the log, from UCCL_P2P_LOG_LEVEL and UCCL_TCPX_DEBUG.
pub(crate) fn log_level() -> log::LevelFilter {
    if matches!(Source::default().flag("UCCL_TCPX_DEBUG", false), Ok(true)) {
        return log::LevelFilter::Debug;
    }
    match Source::default().get("UCCL_P2P_LOG_LEVEL") {
        Ok(Some(level)) => match level.to_ascii_lowercase().as_str() {
            "warning" => log::LevelFilter::Warn,
            "fatal" => log::LevelFilter::Error,
            other => other.parse().unwrap_or(log::LevelFilter::Warn),
        },
        _ => log::LevelFilter::Warn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugins_limit_is_read_as_the_plugin_reads_it() {
        for (text, value, rest) in [
            ("524288", 524_288, ""),
            ("0x80000", 524_288, ""),
            ("0X1f", 31, ""),
            ("1M", 1, "M"),
            ("010", 8, ""),
            ("09", 0, "9"),
            ("0x", 0, "x"),
            ("-5", -5, ""),
            ("", 0, ""),
            ("K", 0, "K"),
            ("512 K", 512, " K"),
            ("99999999999999999999", i64::MAX, ""),
        ] {
            assert_eq!(strtoll(text), (value, rest), "{text}");
        }
    }

    #[test]
    fn settings_stand_before_the_environment() {
        let read = |settings: &[(&str, &str)]| Config::from_env_with(settings);
        let plain = read(&[]).expect("the environment of the tests is understood");
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

    #[test]
    fn numbers_take_suffixes_and_refuse_the_rest() {
        assert_eq!(parse_number("512K"), Some(524288));
        assert_eq!(parse_number("1m"), Some(1 << 20));
        assert_eq!(parse_number("7"), Some(7));
        for bad in ["", "K", "-1", "1.5M", "99999999999999999999G", "18446744073709551615K"] {
            assert_eq!(parse_number(bad), None, "{bad}");
        }
    }
}
