//! The environment variables of the library: each is declared once, with its name, what it takes, its default and its meaning. Reading
//! them, refusing what does not fit and docs/configuration.md all follow from here.

pub use soft_plugin::Kind;

/// One environment variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// Its default, in words or as a value.
    pub default: &'static str,
    /// Its default as a number, where it has one.
    pub number: Option<u64>,
    /// It holds for the whole process: no engine can have a setting of its own.
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
        /// only the plugin reads are passed through untouched and not listed.
        pub const VARIABLES: &[Variable] = &[$($name),*];
    };
}

table! {
    PLUGIN = var("UCCL_TCPX_PLUGIN", Kind::Word(&["auto", "tcpx", "soft"]), "auto", "Network plugin: auto (TCPX where its library is found and works, else soft), tcpx (fail without it), soft.");
    TRANSPORT = var("UCCL_P2P_TRANSPORT", Kind::Text, "unset", "UCCL's transport variable. UCCL's engine chooses its endpoint by it, so tcpx means UCCL_TCPX_PLUGIN=auto here: GPUDirect-TCPX where it is installed, else ordinary TCP with a warning. tcp means soft; other values are ignored. UCCL_TCPX_PLUGIN wins.");
    PLUGIN_PATH = var("UCCL_TCPX_PLUGIN_PATH", Kind::Text, "unset", "Path of the plugin's shared object; loaded instead of the standard places, whatever plugin it is.");
    NUM_CHANNELS = var("UCCL_TCPX_NUM_CHANNELS", Kind::Number(1, 64), "by cores and NICs", "Data channels of a connection; default: the number of cores up to 8, from 16 cores half of them up to 16, and at least one for each NIC; over TCPX 2 to 4 for each NIC that serves the GPU. The smaller of the two sides' values counts.");
    CHUNK_BYTES = var("UCCL_TCPX_CHUNK_BYTES", Kind::Number(4096, super::MAX_CHUNK_BYTES as u64), "524288", "Largest message on a channel, bytes (suffixes K, M); at most NCCL_DYNAMIC_CHUNK_SIZE; 512 KiB at most over a plugin other than the software plugin, whose limit follows the value in the environment when it starts. The smaller side counts.");
    EAGER_BYTES = var("UCCL_TCPX_EAGER_BYTES", Kind::Number(0, 65536), "8192", "Transfers of host memory up to this many bytes travel inside the control message.");
    OOB_PORT = var("UCCL_TCPX_OOB_PORT", Kind::Number(0, 65535), "0", "Listening port; 0: the system chooses.");
    PORT_RANGE = process(var("UCCL_TCPX_PORT_RANGE", Kind::Text, "unset", "Ports of this host that data connections of the software plugin come to, LOW-HIGH (40000-40999); default: the system chooses. A connection of n channels needs n of them on the listening host while it comes up, and none afterwards. Read when the software plugin starts."));
    OLD_OOB_PORT = var("UCCL_TCP_OOB_PORT", Kind::Number(0, 65535), "0", "The same, UCCL's older name; UCCL_TCPX_OOB_PORT wins.");
    BIND = var("UCCL_TCPX_BIND", Kind::Text, "control interface", "Address that the listening port is bound to; any: every address of the host. Default: the address of the control interface, and the loopback address so that processes of this host can use it.");
    ALLOW = var("UCCL_TCPX_ALLOW", Kind::Text, "unset", "Networks that may connect, in CIDR form and separated by commas (10.0.0.0/8,fd00::/8); others are hung up on, and no data connection is made to them. Default: all.");
    SOCKET_IFNAME = var("UCCL_SOCKET_IFNAME", Kind::Text, "unset", "Control interface: names or prefixes separated by commas, '=' for exact, '^' for exclusion. Default: the first of those that the software plugin takes where none are named (below), IPv4 before IPv6.");
    NCCL_SOCKET_IFNAME = var("NCCL_SOCKET_IFNAME", Kind::Text, "unset", "The same where UCCL_SOCKET_IFNAME is not set.");
    AUTH_KEY_FILE = var("UCCL_TCPX_AUTH_KEY_FILE", Kind::Text, "unset", "File with a pre-shared key of 16 to 4096 bytes, or lines NAME:KEY; for its owner only (chmod 600). Connects prove the first key, any is accepted, and a changed file counts at once. See docs/security.md.");
    PROTECT = var("UCCL_TCPX_PROTECT", Kind::Word(&["off", "integrity", "encrypt"]), "off", "How data of the software plugin is protected on its way: off (TCP's checksum), integrity (CRC-32C against damage; AES-256-GCM where a key is set), encrypt (AES-256-GCM; refused with other plugins). The stricter of the two sides counts. See docs/security.md.");
    EMULATE_DEVICE = var("UCCL_TCPX_EMULATE_DEVICE", Kind::Flag, "0", "1: registered host memory is treated as device memory and unpacked by the CPU. For tests without a GPU; both sides alike.");
    EMULATE_DEVICES = var("UCCL_TCPX_EMULATE_DEVICES", Kind::Number(1, 8), "1", "With UCCL_TCPX_EMULATE_DEVICE: so many GPUs are simulated; regions lie on them in turn, in the order of their registration.");
    STAGE_SENDS = var("UCCL_TCPX_STAGE_SENDS", Kind::Flag, "1", "0: device memory is handed to the software plugin as device memory, as it is to TCPX; by default a kernel copies it to pinned host memory first, which is faster.");
    VECTORED = var("UCCL_TCPX_VECTORED", Kind::Flag, "1", "0: the vectored extension of the software plugin is not used (host memory is staged, as with a plugin that lacks it).");
    SPIN_US = var("UCCL_TCPX_SPIN_US", Kind::Number(0, 1_000_000), "by cores", "How long the progress thread spins after activity before it sleeps, microseconds.");
    CONNECT_TIMEOUT = var("UCCL_TCPX_CONNECT_TIMEOUT_MS", Kind::Number(1, DAY_MS), "30000", "Deadline of a connect, and of an incoming connection's set-up after its first message.");
    HANDSHAKE_TIMEOUT = var("UCCL_TCPX_HANDSHAKE_TIMEOUT_MS", Kind::Number(1, DAY_MS), "5000", "How long an incoming connection may stay silent before it is dropped.");
    TRANSFER_TIMEOUT = var("UCCL_TCPX_TRANSFER_TIMEOUT_MS", Kind::Number(1, DAY_MS), "10000", "A connection with transfers in flight that moves nothing for this long is failed.");
    PEER_TIMEOUT = var("UCCL_TCPX_PEER_TIMEOUT_MS", Kind::Number(1, DAY_MS), "10000", "A peer that is silent (no heartbeat either) for this long is lost; less than 100 counts as 100. The smaller of the two sides' values counts.");
    MATCH_TIMEOUT = var("UCCL_TCPX_MATCH_TIMEOUT_MS", Kind::Number(1, DAY_MS), "300000", "How long a send waits for a receive, and a receive for a send.");
    CLOSE_TIMEOUT = var("UCCL_TCPX_CLOSE_TIMEOUT_MS", Kind::Number(1, DAY_MS), "10000", "How long deregistration and destruction wait for transfers in flight before they fail them.");
    MAX_CONNECTIONS = var("UCCL_TCPX_MAX_CONNECTIONS", Kind::Number(1, 1 << 24), "by the limits of the process", "Incoming connections that are up at once; default: what RLIMIT_NOFILE and memory allow. tcpx-info --settings shows the numbers in effect.");
    MAX_CONNECTIONS_OF_PEER = var("UCCL_TCPX_MAX_CONNECTIONS_OF_PEER", Kind::Number(1, 1 << 24), "three quarters of all", "The same of one address.");
    MAX_PEER_TRANSFERS = var("UCCL_TCPX_MAX_PEER_TRANSFERS", Kind::Number(1, 1 << 32), "by memory", "Transfers in flight that all peers together have begun; those of one address at most three quarters. What comes beyond is refused with UCCL_ERR_RESOURCE.");
    PEER_BYTES = var("UCCL_TCPX_PEER_BYTES", Kind::Number(65536, 1 << 44), "an eighth of memory", "Memory that all peers together may take, bytes: lists of their transfers, answers that they do not read, parts of frames. Peers of one address take at most three quarters. Memory is the machine's, the control group's or RLIMIT_AS, whichever is least.");
    PEER_BYTES_OF_ONE = var("UCCL_TCPX_PEER_BYTES_OF_ONE", Kind::Number(65536, 1 << 44), "half of all", "The same of one connection.");
    NOTIF_BYTES = var("UCCL_TCPX_NOTIF_BYTES", Kind::Number(65536, 1 << 44), "an eighth of memory, at most 1G", "Notifications that wait for the application, bytes; those of one address at most three quarters. A connection that brings more is failed.");
    NOTIF_BYTES_OF_ONE = var("UCCL_TCPX_NOTIF_BYTES_OF_ONE", Kind::Number(65536, 1 << 44), "a quarter of all", "The same of one connection.");
    PEER_LOG_LINES = var("UCCL_TCPX_PEER_LOG_LINES", Kind::Number(1, 1_000_000), "50", "Log lines a second that all peers together can cause; one connection causes 5. Others are counted.");
    METRICS = var("UCCL_TCPX_METRICS", Kind::Text, "unset", "Where the statistics of the process are offered to Prometheus and tcpx-top: unix:PATH (a Unix socket), ADDRESS:PORT or PORT (HTTP; a port alone is one of the loopback address), or the path of a file, which is replaced each second (nothing but a regular file is). %p in a path stands for the number of the process.");
    LOG_LEVEL = process(var("UCCL_P2P_LOG_LEVEL", Kind::Word(LEVELS), "warn", "Which lines of the log are written: to standard error, or to the application's function (uccl_engine_set_log_callback). RUST_LOG, where it is set, stands before it, for all or by module."));
    DEBUG = process(var("UCCL_TCPX_DEBUG", Kind::Flag, "0", "1: the same as UCCL_P2P_LOG_LEVEL=debug."));
    DISABLE_IPC = var("UCCL_P2P_DISABLE_IPC", Kind::Flag, "0", "1: data takes the channels also between processes of one host. By default the side where the data goes copies it straight out of the other's memory, once both have proved that they share the host and the user: host memory with process_vm_readv, memory of GPUs that reach each other over NVLink or PCIe with CUDA IPC.");
    LOCAL_DIR = var("UCCL_TCPX_LOCAL_DIR", Kind::Text, "unset", "A directory that processes of one host share which have no network namespace in common (containers with a volume in common): they find each other there by the names of sockets. Only its user may be able to write to it.");
    LOCAL_GPU = var("UCCL_TCPX_LOCAL_GPU", Kind::Word(&["auto", "pull", "push"]), "auto", "How memory of GPUs goes between processes of one host: pull (the destination's side copies it out of the source), push (the source's side writes it into memory of the destination's library, 32 MiB a connection and GPU, from where the destination's side copies it), auto (pull over NVLink and on one GPU; push over PCIe, where reads are slow). Push on either side counts for both. Where CUDA_VISIBLE_DEVICES hides the other GPU, NVML tells what lies between them; without it auto is pull.");
    LOCAL_BLOCKS = var("UCCL_TCPX_LOCAL_BLOCKS", Kind::Number(1, 1024), "66", "Blocks of threads that copies within a host take of a GPU at most: its share of the GPU's multiprocessors.");
    PLUGIN_LIMIT = process(var("NCCL_DYNAMIC_CHUNK_SIZE", Kind::Text, "unset", "Largest message of the plugin, bytes (decimal, or hexadecimal with 0x; no suffixes); at least 4096. Read by the plugin; the library sets it to 524288 before it loads a plugin of others when the user did not, since TCPX moves nothing without it."));
    INLINE_THRESHOLD = process(var("NCCL_INLINE_THRESHOLD", Kind::Text, "unset", "Read by GPUDirect-TCPX, which sends messages of at most so many bytes from the CPU. Memory of a GPU cannot be read that way: anything but 0 keeps the plugin from being loaded."));
}
