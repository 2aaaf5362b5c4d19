//! The environment variables of the library. Each is declared once, with its name, values, default and meaning; parsing, checking and
//! docs/configuration.md follow from here.

pub use soft_plugin::Kind;

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
    /// It applies to the whole process: one engine cannot override it.
    pub of_the_process: bool,
    /// What it means.
    pub doc: &'static str,
}

const fn var(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Variable {
    Variable { name, kind, default, number: soft_plugin::default_number(default), of_the_process: false, doc }
}

const fn process(variable: Variable) -> Variable {
    Variable { of_the_process: true, ..variable }
}

/// Longest deadline, a day.
const DAY_MS: u64 = 86_400_000;
/// Words of UCCL_P2P_LOG_LEVEL.
const LEVELS: &[&str] = &["off", "fatal", "error", "warning", "warn", "info", "debug", "trace"];

macro_rules! table {
    ($($name:ident = $variable:expr;)*) => {
        $(pub(super) const $name: Variable = $variable;)*
        /// Every variable that the library reads. The software plugin's own (UCCL_TCPX_SOFT_*) follow the library's; NCCL_* variables that
        /// only the plugin reads are not listed.
        pub const VARIABLES: &[Variable] = &[$($name),*];
    };
}

table! {
    PLUGIN = var("UCCL_TCPX_PLUGIN", Kind::Word(&["auto", "tcpx", "tcpxo", "soft"]), "auto", "Network plugin: auto (GPUDirect-TCPXO where its receive manager runs, else GPUDirect-TCPX, if the library is found and works, else soft), tcpx and tcpxo (fail without it), soft.");
    TRANSPORT = var("UCCL_P2P_TRANSPORT", Kind::Text, "unset", "UCCL's transport variable. tcpx means UCCL_TCPX_PLUGIN=auto: GPUDirect-TCPX or GPUDirect-TCPXO if it is installed, else ordinary TCP with a warning. tcp means soft; other values are ignored. UCCL_TCPX_PLUGIN takes precedence.");
    PLUGIN_PATH = var("UCCL_TCPX_PLUGIN_PATH", Kind::Text, "unset", "Path of the plugin's shared object, loaded in place of the standard ones. It may be any plugin.");
    DEVMEM = var("UCCL_TCPX_DEVMEM", Kind::Word(&["off", "auto", "require"]), "off", "Experimental: device memory TCP of Linux for GPU memory, where UCCL_TCPX_PLUGIN leads to ordinary TCP: off, auto (where the host can, both engines ask for it, and data is not protected), require (an engine is not created without it, and a connection to another host over anything else fails). See docs/devmem.md.");
    REQUIRE = var("UCCL_TCPX_REQUIRE", Kind::Text, "unset", "What must carry memory: connects and incoming set-ups that bring something else fail, with the reason. See [below](#a-path-that-is-required).");
    NUM_CHANNELS = var("UCCL_TCPX_NUM_CHANNELS", Kind::Number(1, 64), "by cores and NICs", "Channels of a connection. Default: the number of cores up to 8; from 16 cores half of them, up to 16; at least one per NIC. Over GPUDirect-TCPX: 2 to 4 per NIC that serves the GPU. The smaller of the two engines' values applies.");
    CHUNK_BYTES = var("UCCL_TCPX_CHUNK_BYTES", Kind::Number(4096, super::MAX_CHUNK_BYTES as u64), "524288", "Largest message on a channel, bytes; at most NCCL_DYNAMIC_CHUNK_SIZE. Foreign plugins take at most 512 KiB; the software plugin's limit follows the value in the environment when it starts. The smaller of the two engines' values applies.");
    EAGER_BYTES = var("UCCL_TCPX_EAGER_BYTES", Kind::Number(0, 65536), "8192", "Transfers of host memory up to this many bytes are eager: they travel in the control message.");
    OOB_PORT = var("UCCL_TCPX_OOB_PORT", Kind::Number(0, 65535), "0", "Listening port; 0: the system chooses.");
    PORT_RANGE = process(var("UCCL_TCPX_PORT_RANGE", Kind::Text, "unset", "Ports on which the software plugin listens for data connections, LOW-HIGH (40000-40999); default: the system chooses. A connection of n channels needs n ports on the listening host during set-up, and none afterwards. Read when the software plugin starts."));
    OLD_OOB_PORT = var("UCCL_TCP_OOB_PORT", Kind::Number(0, 65535), "0", "UCCL's older name of UCCL_TCPX_OOB_PORT, which takes precedence.");
    BIND = var("UCCL_TCPX_BIND", Kind::Text, "control interface", "Address that the listening port is bound to; any: every address of the host. Default: the address of the control interface; those of the other interfaces that UCCL_SOCKET_IFNAME admits, where peers find the engine when they have lost its control interface; and the loopback address for processes on this host.");
    ALLOW = var("UCCL_TCPX_ALLOW", Kind::Text, "unset", "Networks that may connect, in CIDR form and separated by commas (10.0.0.0/8,fd00::/8); connections from other addresses are closed, and no data connection is made to them. Default: all.");
    SOCKET_IFNAME = var("UCCL_SOCKET_IFNAME", Kind::Text, "unset", "Control interface: names or prefixes separated by commas, '=' for exact, '^' for exclusion. Of several the first is used, and control connections move to the others when it is lost. Default: the interfaces that the software plugin would choose (below), IPv4 before IPv6.");
    NCCL_SOCKET_IFNAME = var("NCCL_SOCKET_IFNAME", Kind::Text, "unset", "The same, used if UCCL_SOCKET_IFNAME is not set.");
    AUTH_KEY_FILE = var("UCCL_TCPX_AUTH_KEY_FILE", Kind::Text, "unset", "File with a pre-shared key of 16 to 4096 bytes, or lines NAME:KEY. Only its owner may have access (chmod 600). A connector proves the first key, a listener accepts any of them, and changes take effect at once. See docs/security.md.");
    PROTECT = var("UCCL_TCPX_PROTECT", Kind::Word(&["off", "integrity", "encrypt"]), "off", "How the software plugin protects data on the network: off (TCP's checksum), integrity (CRC-32C against damage; AES-256-GCM where a key is set), encrypt (AES-256-GCM; refused with other plugins). The stricter of the two engines' values applies. See docs/security.md.");
    PEER_RATE = var("UCCL_TCPX_PEER_RATE", Kind::Number(0, 1 << 40), "0", "Most bytes a second that the engine sends to a peer on the channels of a connection over the software plugin, reads by the peer included; 0: no limit. Each channel gets the same share, and the kernel paces it (SO_MAX_PACING_RATE), so a transfer of a single channel gets one share. Transfers in the control message, direct transfers on one host and GPUDirect-TCPX are not limited.");
    EMULATE_DEVICE = var("UCCL_TCPX_EMULATE_DEVICE", Kind::Flag, "0", "1: registered host memory is treated as device memory and unpacked by the CPU. For tests without a GPU; set it for both engines.");
    EMULATE_DEVICES = var("UCCL_TCPX_EMULATE_DEVICES", Kind::Number(1, 8), "1", "Number of simulated GPUs, with UCCL_TCPX_EMULATE_DEVICE. Regions are placed on them in turn, in the order of registration.");
    STAGE_SENDS = var("UCCL_TCPX_STAGE_SENDS", Kind::Flag, "1", "0: the software plugin gets device memory as such, as GPUDirect-TCPX does. By default a kernel first copies it to pinned host memory, which is faster.");
    VECTORED = var("UCCL_TCPX_VECTORED", Kind::Flag, "1", "0: the library does not use the software plugin's vectored extension (it stages host memory, as with other plugins).");
    SPIN_US = var("UCCL_TCPX_SPIN_US", Kind::Number(0, 1_000_000), "by cores", "How long the progress thread spins after activity before it sleeps, in microseconds.");
    CONNECT_TIMEOUT = var("UCCL_TCPX_CONNECT_TIMEOUT_MS", Kind::Number(1, DAY_MS), "30000", "Deadline of a connect, and of an incoming connection's set-up after its first message.");
    HANDSHAKE_TIMEOUT = var("UCCL_TCPX_HANDSHAKE_TIMEOUT_MS", Kind::Number(1, DAY_MS), "5000", "How long an incoming connection may be silent before it is closed.");
    TRANSFER_TIMEOUT = var("UCCL_TCPX_TRANSFER_TIMEOUT_MS", Kind::Number(1, DAY_MS), "10000", "A connection fails if it has transfers in flight and moves nothing for this long.");
    NIC_TIMEOUT = var("UCCL_TCPX_NIC_TIMEOUT_MS", Kind::Number(1, DAY_MS), "2000", "A NIC on which the peer acknowledges nothing for this long, although data was sent on it and the peer lives, is given up: its channels are closed, and others carry their data. A NIC that waits for a GPU is not given up, and a slow one stays in use: only what is stuck on it is sent again over others. Over GPUDirect-TCPXO and other plugins that report no bytes, half of UCCL_TCPX_TRANSFER_TIMEOUT_MS takes its place where that is longer.");
    PEER_TIMEOUT = var("UCCL_TCPX_PEER_TIMEOUT_MS", Kind::Number(1, DAY_MS), "10000", "A peer that is silent (no heartbeat either) for this long is lost; values below 100 count as 100. The smaller of the two engines' values applies.");
    MATCH_TIMEOUT = var("UCCL_TCPX_MATCH_TIMEOUT_MS", Kind::Number(1, DAY_MS), "300000", "How long a send waits for a receive, and a receive for a send.");
    CLOSE_TIMEOUT = var("UCCL_TCPX_CLOSE_TIMEOUT_MS", Kind::Number(1, DAY_MS), "10000", "How long deregistration and destroy calls wait for transfers in flight before they fail them.");
    MAX_CONNECTIONS = var("UCCL_TCPX_MAX_CONNECTIONS", Kind::Number(1, 1 << 24), "by the limits of the process", "Open incoming connections. Default: as many as RLIMIT_NOFILE and memory allow; tcpx-info --settings shows the number in effect.");
    MAX_CONNECTIONS_OF_PEER = var("UCCL_TCPX_MAX_CONNECTIONS_OF_PEER", Kind::Number(1, 1 << 24), "three quarters of all", "The same limit for one address.");
    MAX_PEER_TRANSFERS = var("UCCL_TCPX_MAX_PEER_TRANSFERS", Kind::Number(1, 1 << 32), "by memory", "Transfers in flight that peers started, over all peers; peers of one address may have at most three quarters. Further ones are refused with UCCL_ERR_RESOURCE.");
    PEER_BYTES = var("UCCL_TCPX_PEER_BYTES", Kind::Number(65536, 1 << 44), "an eighth of memory", "Memory that all peers together may use, bytes: segments of their transfers, answers that they have not read, incomplete frames. Peers of one address may use at most three quarters. The default is relative to the machine's memory, the control group's limit or RLIMIT_AS, whichever is smallest.");
    PEER_BYTES_OF_ONE = var("UCCL_TCPX_PEER_BYTES_OF_ONE", Kind::Number(65536, 1 << 44), "half of all", "The same limit for one connection.");
    NOTIF_BYTES = var("UCCL_TCPX_NOTIF_BYTES", Kind::Number(65536, 1 << 44), "an eighth of memory, at most 1G", "Notifications queued for the application, bytes; at most three quarters from one address. A connection that exceeds this fails.");
    NOTIF_BYTES_OF_ONE = var("UCCL_TCPX_NOTIF_BYTES_OF_ONE", Kind::Number(65536, 1 << 44), "a quarter of all", "The same limit for one connection.");
    PEER_LOG_LINES = var("UCCL_TCPX_PEER_LOG_LINES", Kind::Number(1, 1_000_000), "50", "Log lines per second that all peers together can cause; one connection can cause 5. The log reports how many more it suppressed.");
    METRICS = var("UCCL_TCPX_METRICS", Kind::Text, "unset", "Where the process exports its statistics for Prometheus and tcpx-top: unix:PATH (a Unix socket), ADDRESS:PORT or PORT (HTTP; a port alone is on the loopback address), or the path of a regular file, which is replaced every second. %p in a path is the process id.");
    LOG_LEVEL = process(var("UCCL_P2P_LOG_LEVEL", Kind::Word(LEVELS), "warn", "Level of the log, which goes to standard error or to the application's callback (uccl_engine_set_log_callback). RUST_LOG takes precedence, for all modules or for some."));
    DEBUG = process(var("UCCL_TCPX_DEBUG", Kind::Flag, "0", "1: the same as UCCL_P2P_LOG_LEVEL=debug."));
    DISABLE_IPC = var("UCCL_P2P_DISABLE_IPC", Kind::Flag, "0", "1: no direct transfers; data uses channels between processes on one host too. By default processes on one host that run as one user copy memory directly: host memory with process_vm_readv, or staged in shared areas where the kernel refuses that, GPU memory over NVLink or PCIe with CUDA IPC.");
    LOCAL_DIR = var("UCCL_TCPX_LOCAL_DIR", Kind::Text, "unset", "A directory through which processes on one host find each other if they do not share a network namespace, such as a common volume of containers. Only the user may have write access.");
    LOCAL_GPU = var("UCCL_TCPX_LOCAL_GPU", Kind::Word(&["auto", "pull", "push"]), "auto", "How GPU memory moves between processes on one host: pull (the engine at the destination reads the source), push (staged: the engine at the source writes into a buffer of the destination's library, 32 MiB per connection and GPU, from which the engine at the destination copies), auto (pull over NVLink and on one GPU; push over PCIe, where reads are slow). If either engine is set to push, both push. If CUDA_VISIBLE_DEVICES hides the other GPU, NVML provides the link type; without NVML auto means pull.");
    LOCAL_BLOCKS = var("UCCL_TCPX_LOCAL_BLOCKS", Kind::Number(1, 1024), "66", "Most thread blocks that copies on one host use on a GPU, which limits their share of its multiprocessors.");
    PLUGIN_LIMIT = process(var("NCCL_DYNAMIC_CHUNK_SIZE", Kind::Text, "unset", "Largest message of the plugin, bytes (decimal, or hexadecimal with 0x; no suffixes); at least 4096. The plugin reads it. If it is unset, the library sets it to 524288 before it loads a foreign plugin, because GPUDirect-TCPX moves nothing without it."));
    INLINE_THRESHOLD = process(var("NCCL_INLINE_THRESHOLD", Kind::Text, "unset", "GPUDirect-TCPX sends messages up to this size from the CPU, which cannot read GPU memory. The library refuses to load it with any value but 0."));
}
