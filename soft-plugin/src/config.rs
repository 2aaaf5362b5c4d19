//! Every environment variable of the software plugin, read once at `init`.
//! Nothing else in the crate reads the environment.

use std::env;
use std::str::FromStr;

/// Largest message limit: sixteen slot regions must stay addressable by the u32 `src_off` of a descriptor.
pub const MAX_MESSAGE: usize = 128 << 20;
const DEFAULT_MESSAGE: usize = 512 << 10;

/// How the payload of a device receive is cut into bounce-buffer fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragmentation {
    /// One descriptor a message.
    Whole,
    /// Fragments of this many bytes, laid out one behind the other.
    Fixed(usize),
    /// Fragments of random size, alignment and place, described in random order.
    Random,
}

/// The settings of a process.
#[derive(Clone, Debug)]
pub struct Config {
    /// `NCCL_GPUDIRECTTCPX_SOCKET_IFNAME`, else `NCCL_SOCKET_IFNAME`: which interfaces are devices. `eth,ens` are prefixes,
    /// `=eth0,eth1` exact names in that order, `^docker,lo` prefixes to leave out.
    pub interfaces: Option<String>,
    /// `NCCL_DYNAMIC_CHUNK_SIZE`: message limit, bytes (default 524288; 0 counts as unset).
    pub message_limit: usize,
    /// `UCCL_TCPX_SOFT_STRICT=1`: refuse what TCPX would crash or corrupt on, and poison consumed bounce memory.
    pub strict: bool,
    /// `UCCL_TCPX_SOFT_THREADS`: I/O threads of the process (default: cores, at most 16).
    pub threads: usize,
    /// `UCCL_TCPX_SOFT_SPIN_US`: how long an I/O thread polls before it sleeps (default 20, or 0 with fewer than 4 cores).
    pub spin_us: u64,
    /// `UCCL_TCPX_SOFT_INLINE`: sends of up to this many bytes on an idle comm are handed to the kernel by the caller's
    /// thread, without waking an I/O thread (default 8192; 0 turns it off).
    pub inline_bytes: usize,
    /// `UCCL_TCPX_SOFT_CONGESTION`: congestion control of the data sockets by name, or `system` (default: by the path: below 1 ms of round trip the system's, but cubic for bbr; above, the system's, but bbr for cubic and reno where it is available).
    pub congestion: Option<String>,
    /// `UCCL_TCPX_SOFT_SOCKBUF`: socket buffer size, bytes; the system caps it at net.core.{r,w}mem_max (default 0: the kernel
    /// tunes it).
    pub socket_buffer: usize,
    /// `UCCL_TCPX_SOFT_FRAGMENT`: `random`, or a fragment size in bytes (default: one fragment a message).
    pub fragmentation: Fragmentation,
    /// `UCCL_TCPX_EMULATE_DEVICE=1`: host memory is treated as device memory.
    pub emulate_device: bool,
}

fn text(name: &str) -> Option<String> {
    env::var(name).ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
}

fn number<T: FromStr>(name: &str) -> Option<T> {
    let value = text(name)?;
    let parsed = value.parse().ok();
    if parsed.is_none() {
        crate::logger::warn(&format!("{name}={value} is not a number; using the default"));
    }
    parsed
}

fn flag(name: &str) -> bool {
    matches!(text(name).as_deref(), Some("1" | "true" | "yes" | "on"))
}

fn fragmentation() -> Fragmentation {
    match text("UCCL_TCPX_SOFT_FRAGMENT").as_deref() {
        None => Fragmentation::Whole,
        Some("random") => Fragmentation::Random,
        Some(value) => match value.parse() {
            Ok(0) => Fragmentation::Whole,
            Ok(bytes) => Fragmentation::Fixed(bytes),
            Err(_) => {
                crate::logger::warn(&format!("UCCL_TCPX_SOFT_FRAGMENT={value} is neither `random` nor a size; ignored"));
                Fragmentation::Whole
            }
        },
    }
}

impl Config {
    /// Reads the environment.
    pub fn from_env() -> Config {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Config {
            interfaces: text("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME").or_else(|| text("NCCL_SOCKET_IFNAME")),
            message_limit: number("NCCL_DYNAMIC_CHUNK_SIZE").filter(|n| *n > 0).unwrap_or(DEFAULT_MESSAGE).min(MAX_MESSAGE),
            strict: flag("UCCL_TCPX_SOFT_STRICT"),
            threads: number("UCCL_TCPX_SOFT_THREADS").filter(|n| *n > 0).unwrap_or(cores.min(16)).min(256),
            spin_us: number("UCCL_TCPX_SOFT_SPIN_US").unwrap_or(if cores < 4 { 0 } else { 20 }),
            inline_bytes: number("UCCL_TCPX_SOFT_INLINE").unwrap_or(8192),
            congestion: text("UCCL_TCPX_SOFT_CONGESTION"),
            socket_buffer: number("UCCL_TCPX_SOFT_SOCKBUF").unwrap_or(0),
            fragmentation: fragmentation(),
            emulate_device: flag("UCCL_TCPX_EMULATE_DEVICE"),
        }
    }
}
