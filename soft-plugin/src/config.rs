//! Every environment variable of the software plugin: each is declared once, with its values, default and meaning; read at `init`.
//! An invalid value is an error. Nothing else in the crate reads the environment.

use std::fmt;
use std::ops::RangeInclusive;

use nccl_net_abi::MAX_REQUESTS;

use crate::fragment::{region_len, Fragmentation};

/// Largest message limit: sixteen slot regions must stay addressable by the u32 `src_off` of a descriptor.
pub const MAX_MESSAGE: usize = 128 << 20;
const DEFAULT_MESSAGE: usize = 512 << 10;
/// What UCCL_TCPX_CHUNK_BYTES can raise the default to.
const MAX_CHUNK: usize = 16 << 20;

/// The values that a variable takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number in this range, with an optional suffix K, M or G.
    Number(u64, u64),
    /// 0 or 1 (also no, yes, false, true, off, on).
    Flag,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A text that another module parses.
    Text,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Number(from, to) => write!(f, "{from} to {to}"),
            Kind::Flag => f.write_str("0, 1"),
            Kind::Word(words) => f.write_str(&words.join(", ")),
            Kind::Text => f.write_str("text"),
        }
    }
}

/// One environment variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Its values.
    pub kind: Kind,
    /// Its default, in words or as a value.
    pub default: &'static str,
    /// Its default as a number, where it has one.
    pub number: Option<u64>,
    /// Its meaning.
    pub doc: &'static str,
}

const fn var(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Variable {
    Variable { name, kind, default, number: default_number(default), doc }
}

/// A default that is written as a number.
pub const fn default_number(text: &str) -> Option<u64> {
    let (bytes, mut at, mut number) = (text.as_bytes(), 0, 0u64);
    while at < bytes.len() {
        if !bytes[at].is_ascii_digit() {
            return None;
        }
        number = number * 10 + (bytes[at] - b'0') as u64;
        at += 1;
    }
    if bytes.is_empty() {
        None
    } else {
        Some(number)
    }
}

const STRICT: Variable = var(
    "UCCL_TCPX_SOFT_STRICT",
    Kind::Flag,
    "0",
    "1: refuse calls on which TCPX would crash or corrupt data, and poison consumed bounce memory.",
);
const THREADS: Variable =
    var("UCCL_TCPX_SOFT_THREADS", Kind::Number(1, 256), "by cores", "I/O threads of the process; default: cores, at most 16.");
const SPIN_US: Variable = var(
    "UCCL_TCPX_SOFT_SPIN_US",
    Kind::Number(0, 1_000_000),
    "by cores",
    "How long an I/O thread polls before it sleeps, microseconds; default 20, or 100 while requests come at that rate and few threads are awake; 0 with fewer than 4 cores.",
);
const INLINE: Variable = var("UCCL_TCPX_SOFT_INLINE", Kind::Number(0, 1 << 20), "8192", "Sends of up to this many bytes on an idle comm are handed to the kernel by the caller's thread, without waking an I/O thread; 0 turns it off.");
const CONGESTION: Variable = var("UCCL_TCPX_SOFT_CONGESTION", Kind::Text, "by the path", "Congestion control of the data sockets by name, or `system`. Default: below 1 ms of round trip the system's, but cubic for bbr; above, the system's, but bbr for cubic and reno where it is available.");
const SOCKBUF: Variable = var(
    "UCCL_TCPX_SOFT_SOCKBUF",
    Kind::Number(0, 1 << 30),
    "0",
    "Socket buffer size, bytes; the system caps it at net.core.{r,w}mem_max; 0: the kernel tunes it, but with fewer than 4 cores a send buffer has 256 KiB where the round trip is below 50 us.",
);
const KEEPALIVE_S: Variable = var("UCCL_TCPX_SOFT_KEEPALIVE_S", Kind::Number(0, 32_000), "15", "Idle seconds after which TCP keepalive probes the peer of a data socket; the connection fails when three more probes in as long again have no answer; 0 turns it off.");
const USER_TIMEOUT_MS: Variable = var("UCCL_TCPX_SOFT_USER_TIMEOUT_MS", Kind::Number(0, i32::MAX as u64), "0", "TCP_USER_TIMEOUT of the data sockets: how long sent bytes may stay unacknowledged, and how long a receiver may leave its window closed; 0: the system's limit.");
const FRAGMENT: Variable = var(
    "UCCL_TCPX_SOFT_FRAGMENT",
    Kind::Text,
    "0",
    "How receives of device memory are split into fragments, for tests: `random`, or a fragment size in bytes; 0: one fragment per message.",
);

const DEVMEM_BYTES: Variable = var(
    "UCCL_TCPX_SOFT_DEVMEM_BYTES",
    Kind::Number(1 << 20, 4 << 30),
    "268435456",
    "Device memory TCP: GPU memory of each NIC and GPU that the NIC writes received payload to, bytes. It limits the receiving channels, to 21 with the default.",
);

const DEVMEM_AGENT: Variable = var(
    "UCCL_TCPX_SOFT_DEVMEM_AGENT",
    Kind::Text,
    "by its socket",
    "Device memory TCP: the socket of uccl-devmem-agent. Default: /run/uccl-devmem/agent.sock where it exists; otherwise the process binds and steers itself, which takes CAP_NET_ADMIN.",
);

/// Variables that the library declares and this plugin reads too.
const MESSAGE: Variable = var("NCCL_DYNAMIC_CHUNK_SIZE", Kind::Number(0, i32::MAX as u64), "0", "");
const EMULATE: Variable = var("UCCL_TCPX_EMULATE_DEVICE", Kind::Flag, "0", "");

/// Every variable of the software plugin's own. It also reads `NCCL_GPUDIRECTTCPX_SOCKET_IFNAME`, `NCCL_SOCKET_IFNAME`,
/// `NCCL_DYNAMIC_CHUNK_SIZE`, `UCCL_TCPX_CHUNK_BYTES`, `UCCL_TCPX_PORT_RANGE` and `UCCL_TCPX_EMULATE_DEVICE`.
pub const VARIABLES: &[Variable] =
    &[STRICT, THREADS, SPIN_US, INLINE, CONGESTION, SOCKBUF, KEEPALIVE_S, USER_TIMEOUT_MS, FRAGMENT, DEVMEM_BYTES, DEVMEM_AGENT];

/// The settings of a process.
#[derive(Clone, Debug)]
pub struct Config {
    /// `NCCL_GPUDIRECTTCPX_SOCKET_IFNAME`, else `NCCL_SOCKET_IFNAME`: which interfaces are devices; see
    /// [`NameFilter`](crate::interfaces::NameFilter).
    pub interfaces: Option<String>,
    /// `NCCL_DYNAMIC_CHUNK_SIZE`: message limit, bytes (0 counts as unset; default 524288, or `UCCL_TCPX_CHUNK_BYTES` where that is more).
    pub message_limit: usize,
    /// `UCCL_TCPX_PORT_RANGE`: ports of listen comms; `None`: the system chooses.
    pub ports: Option<RangeInclusive<u16>>,
    /// `UCCL_TCPX_SOFT_STRICT`.
    pub strict: bool,
    /// Cores that the process may use.
    pub cores: usize,
    /// `UCCL_TCPX_SOFT_THREADS`.
    pub threads: usize,
    /// `UCCL_TCPX_SOFT_SPIN_US`: the usual limit, and the limit while requests come at that rate.
    pub spin_us: [u64; 2],
    /// `UCCL_TCPX_SOFT_INLINE`.
    pub inline_bytes: usize,
    /// `UCCL_TCPX_SOFT_CONGESTION`.
    pub congestion: Option<String>,
    /// `UCCL_TCPX_SOFT_SOCKBUF`.
    pub socket_buffer: usize,
    /// `UCCL_TCPX_SOFT_KEEPALIVE_S`.
    pub keepalive_s: u64,
    /// `UCCL_TCPX_SOFT_USER_TIMEOUT_MS`.
    pub user_timeout_ms: u64,
    /// `UCCL_TCPX_SOFT_FRAGMENT`.
    pub fragmentation: Fragmentation,
    /// `UCCL_TCPX_SOFT_DEVMEM_BYTES`.
    pub devmem_bytes: usize,
    /// `UCCL_TCPX_SOFT_DEVMEM_AGENT`.
    pub devmem_agent: Option<String>,
    /// `UCCL_TCPX_EMULATE_DEVICE=1`: host memory serves as device memory.
    pub emulate_device: bool,
}

/// Looks a variable up in the environment, or in a test's table.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Parses variables.
struct Reader<'a>(Lookup<'a>);

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        self.0(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    /// The value that is set, or a numeric default.
    fn number(&self, variable: &Variable) -> Result<Option<u64>, String> {
        let Some(text) = self.text(variable.name) else { return Ok(variable.number) };
        match (parse_number(&text), variable.kind) {
            (Some(n), Kind::Number(from, to)) if RangeInclusive::new(from, to).contains(&n) => Ok(Some(n)),
            _ => Err(format!("{}={text}: expected a number from {}", variable.name, variable.kind)),
        }
    }

    /// As [`Reader::number`]; `usual` where the default is not a number.
    fn size(&self, variable: &Variable, usual: usize) -> Result<usize, String> {
        Ok(self.number(variable)?.map_or(usual, |n| n as usize))
    }

    fn flag(&self, variable: &Variable) -> Result<bool, String> {
        match self.text(variable.name).map(|v| v.to_ascii_lowercase()).as_deref() {
            None => Ok(variable.number == Some(1)),
            Some("0" | "false" | "no" | "off") => Ok(false),
            Some("1" | "true" | "yes" | "on") => Ok(true),
            Some(other) => Err(format!("{}={other}: expected {}", variable.name, variable.kind)),
        }
    }

    fn fragmentation(&self) -> Result<Fragmentation, String> {
        if self.text(FRAGMENT.name).as_deref() == Some("random") {
            return Ok(Fragmentation::Random);
        }
        let sizes = Variable { kind: Kind::Number(0, MAX_MESSAGE as u64), ..FRAGMENT };
        let bytes = self.size(&sizes, 0).map_err(|e| format!("{e}, or random"))?;
        Ok(if bytes == 0 { Fragmentation::Whole } else { Fragmentation::Fixed(bytes) })
    }

    fn ports(&self, name: &str) -> Result<Option<RangeInclusive<u16>>, String> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let port = |text: &str| {
            let text = text.trim();
            text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten().filter(|&port| port > 0)
        };
        match text.split_once('-').map(|(low, high)| (port(low), port(high))) {
            Some((Some(low), Some(high))) if low <= high => Ok(Some(low..=high)),
            _ => Err(format!("{name}={text}: expected LOW-HIGH, two ports from 1 to 65535, the lower first")),
        }
    }

    /// The limit where NCCL_DYNAMIC_CHUNK_SIZE does not set one: enough for the chunks that UCCL_TCPX_CHUNK_BYTES makes the library send.
    /// The library validates that variable.
    fn default_limit(&self) -> usize {
        let chunk = self.text("UCCL_TCPX_CHUNK_BYTES").and_then(|text| parse_number(&text)).unwrap_or(0);
        DEFAULT_MESSAGE.max(usize::try_from(chunk).unwrap_or(0).min(MAX_CHUNK))
    }

    fn config(&self) -> Result<Config, String> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let message = self.size(&MESSAGE, 0)?;
        let spin = self.number(&SPIN_US)?;
        Ok(Config {
            interfaces: self.text("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME").or_else(|| self.text("NCCL_SOCKET_IFNAME")),
            message_limit: if message == 0 { self.default_limit() } else { message.min(MAX_MESSAGE) },
            ports: self.ports("UCCL_TCPX_PORT_RANGE")?,
            strict: self.flag(&STRICT)?,
            cores,
            threads: self.size(&THREADS, cores.min(16))?,
            spin_us: spin.map_or(if cores < 4 { [0, 0] } else { [20, 100] }, |us| [us, us]),
            inline_bytes: self.size(&INLINE, 0)?,
            congestion: self.text(CONGESTION.name),
            socket_buffer: self.size(&SOCKBUF, 0)?,
            keepalive_s: self.number(&KEEPALIVE_S)?.unwrap_or(0),
            user_timeout_ms: self.number(&USER_TIMEOUT_MS)?.unwrap_or(0),
            fragmentation: self.fragmentation()?,
            devmem_bytes: self.size(&DEVMEM_BYTES, 0)?,
            devmem_agent: self.text(DEVMEM_AGENT.name),
            emulate_device: self.flag(&EMULATE)?,
        })
    }
}

/// A number in decimal or, with 0x, in hexadecimal form, with an optional suffix K, M or G (powers of 1024).
fn parse_number(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return hex.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u64::from_str_radix(hex, 16).ok())?;
    }
    let (digits, factor) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1 << 10),
        b'm' | b'M' => (&text[..text.len() - 1], 1 << 20),
        b'g' | b'G' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u64>().ok()?.checked_mul(factor))?
}

/// Names with the software plugin's prefix that are not variables of it.
fn unknown<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.filter(|n| n.starts_with("UCCL_TCPX_SOFT_") && !VARIABLES.iter().any(|v| v.name == *n)).collect()
}

impl Config {
    /// Reads the environment. The error names the variable and the expected values.
    pub fn from_env() -> Result<Config, String> {
        let names: Vec<String> = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
        for name in unknown(names.iter().map(String::as_str)) {
            crate::logger::warn(&format!("{name} is set, but the software plugin has no such variable; it is ignored"));
        }
        let lookup = |name: &str| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned());
        Reader(&lookup).config()
    }

    /// Bytes of a comm's bounce buffer.
    pub fn bounce_len(&self) -> usize {
        region_len(self.message_limit) * MAX_REQUESTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: &str) -> Result<Config, String> {
        Reader(&|n| (n == name).then(|| value.to_owned())).config()
    }

    #[test]
    fn an_invalid_value_is_an_error_that_names_it() {
        let numbers = ["THREADS", "SPIN_US", "INLINE", "SOCKBUF", "KEEPALIVE_S", "USER_TIMEOUT_MS", "FRAGMENT", "STRICT"];
        for name in numbers.map(|n| format!("UCCL_TCPX_SOFT_{n}")) {
            for value in ["many", "-1", "1.5", "+1", "99999999999999999999", "1 2", "K", "0x"] {
                let error = with(&name, value).unwrap_err();
                assert!(error.starts_with(&format!("{name}={}", value.to_lowercase())) || error.contains(value), "{error}");
            }
        }
        assert!(with("UCCL_TCPX_SOFT_THREADS", "0").is_err() && with("UCCL_TCPX_SOFT_THREADS", "257").is_err());
        assert!(with("NCCL_DYNAMIC_CHUNK_SIZE", "big").is_err() && with("UCCL_TCPX_EMULATE_DEVICE", "maybe").is_err());
    }

    #[test]
    fn values_and_defaults() {
        let default = Reader(&|_| None).config().unwrap();
        assert_eq!((default.message_limit, default.inline_bytes, default.strict), (DEFAULT_MESSAGE, 8192, false));
        assert_eq!(with("NCCL_DYNAMIC_CHUNK_SIZE", "0").unwrap().message_limit, DEFAULT_MESSAGE);
        for (chunk, limit) in
            [("4M", 4 << 20), ("1048576", 1 << 20), ("64K", DEFAULT_MESSAGE), ("1T", DEFAULT_MESSAGE), ("9G", MAX_CHUNK)]
        {
            assert_eq!(with("UCCL_TCPX_CHUNK_BYTES", chunk).unwrap().message_limit, limit, "{chunk}");
        }
        assert_eq!(with("NCCL_DYNAMIC_CHUNK_SIZE", "0x80000").unwrap().message_limit, 512 << 10);
        assert_eq!(with("NCCL_DYNAMIC_CHUNK_SIZE", "2000000000").unwrap().message_limit, MAX_MESSAGE);
        assert_eq!(with("UCCL_TCPX_SOFT_SOCKBUF", " 4M ").unwrap().socket_buffer, 4 << 20);
        assert_eq!(with("UCCL_TCPX_SOFT_THREADS", "").unwrap().threads, default.threads);
        assert_eq!(with("UCCL_TCPX_SOFT_FRAGMENT", "random").unwrap().fragmentation, Fragmentation::Random);
        assert_eq!(with("UCCL_TCPX_SOFT_FRAGMENT", "64").unwrap().fragmentation, Fragmentation::Fixed(64));
    }

    #[test]
    fn a_port_range_is_two_ports_the_lower_first() {
        let read = |text| with("UCCL_TCPX_PORT_RANGE", text).map(|config| config.ports);
        assert_eq!((read("40000-40999"), read(" 7 - 7 "), read("")), (Ok(Some(40000..=40999)), Ok(Some(7..=7)), Ok(None)));
        for bad in ["40000", "40999-40000", "0-10", "1-65536", "-5", "5-", "a-b", "1-2-3", "+1-5", "1:2"] {
            assert!(read(bad).unwrap_err().starts_with(&format!("UCCL_TCPX_PORT_RANGE={bad}: expected LOW-HIGH")), "{bad}");
        }
    }

    #[test]
    fn misspelt_names_are_found() {
        let names = ["UCCL_TCPX_SOFT_THREAD", "UCCL_TCPX_SOFT_THREADS", "UCCL_TCPX_PLUGIN", "HOME"];
        assert_eq!(unknown(names.into_iter()), ["UCCL_TCPX_SOFT_THREAD"]);
    }

    #[test]
    fn every_variable_is_documented() {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let text = std::fs::read_to_string(docs).expect("docs/configuration.md");
        for v in VARIABLES {
            let row = format!("| `{}` | {} | {} | {} |", v.name, v.kind, v.default, v.doc);
            assert!(text.contains(&row), "docs/configuration.md lacks:\n{row}");
        }
    }
}
