//! Statistics of a channel, a connection and an engine, as text and for Prometheus. Knows nothing of how they are counted.

pub(crate) mod export;
mod prometheus;
mod text;
pub(crate) mod times;

pub use prometheus::document;
pub(crate) use text::speed;
pub use times::TimeTable;

use std::ops::AddAssign;
use std::time::Duration;

/// The totals, declared once: the structure, the list of them with names and meanings, and their sum.
macro_rules! totals {
    ($($name:ident: $meaning:literal,)*) => {
        /// Counters that start at 0 and never decrease.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Totals {
            $(#[doc = $meaning] pub $name: u64,)*
        }

        impl Totals {
            /// How many there are.
            pub const COUNT: usize = [$($meaning),*].len();

            /// Every number with its name and what it means, in one order.
            pub fn each(&self) -> [(&'static str, u64, &'static str); Totals::COUNT] {
                [$((stringify!($name), self.$name, $meaning),)*]
            }
        }

        impl AddAssign for Totals {
            fn add_assign(&mut self, other: Totals) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

// Names and meanings are those of uccl_totals_t in uccl_engine.h.
totals! {
    sent_bytes: "Bytes that channels have sent",
    sent_chunks: "Chunks that channels have sent",
    received_bytes: "Bytes that channels have received",
    received_chunks: "Chunks that channels have received",
    eager_sent_bytes: "Bytes of small transfers sent inside control frames",
    eager_received_bytes: "Bytes of small transfers received inside control frames",
    transfers_started: "Transfers that this engine started",
    transfers_completed: "Transfers of this engine that succeeded",
    transfers_failed: "Transfers of this engine that failed",
    peer_transfers: "Transfers that peers started",
    refused: "Transfers of peers that this engine refused",
    refused_by_peer: "Transfers of this engine that peers refused",
    control_sent_bytes: "Bytes sent on control connections",
    control_received_bytes: "Bytes received on control connections",
    notifications_sent: "Notifications sent",
    notifications_received: "Notifications received",
    stalls: "Seconds in which a channel had chunks in flight and moved none",
    slow_answers: "Times that a peer was silent, or a transfer moved nothing, for half of its timeout",
    lost_channels: "Channels that were lost, and whose undelivered chunks were sent again on others",
    restored_channels: "Lost channels that came back",
    resent_chunks: "Chunks sent again after their channel was lost",
    control_moves: "Times that a control connection was made again over another socket",
    packed_chunks: "Chunks packed from GPU memory",
    unpacked_chunks: "Chunks unpacked into GPU memory",
    pack_us: "Time from submitting a chunk until it was packed, summed over all chunks, microseconds",
    unpack_us: "Time from submitting a chunk until it was unpacked, summed over all chunks, microseconds",
}

/// TCP statistics of the connection that a channel sends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Segments sent.
    pub segments: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Smoothed round trip, microseconds.
    pub rtt_us: u32,
    /// Smallest round trip, microseconds.
    pub min_rtt_us: u32,
    /// Bytes per second that the peer acknowledged lately.
    pub delivery_rate: u64,
    /// Congestion control.
    pub congestion: String,
}

/// In place of a plugin's name: direct transfers between two processes on one host.
pub const DIRECT: &str = "direct";

/// A channel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChannelStats {
    /// The plugin that carries it, or [`DIRECT`].
    pub plugin: String,
    /// Its NIC.
    pub nic: String,
    /// The peer's NIC, if it has another name.
    pub peer_nic: String,
    /// Its two ends, where the plugin reports them. Filled only when statistics are read.
    pub route: String,
    /// Chunks and bytes sent.
    pub sent_bytes: u64,
    /// See `sent_bytes`.
    pub sent_chunks: u64,
    /// Chunks and bytes received.
    pub received_bytes: u64,
    /// See `received_bytes`.
    pub received_chunks: u64,
    /// Bytes of direct transfers that were copied over NVLink.
    pub nvlink_bytes: u64,
    /// Bytes per second over the last second or so.
    pub sent_per_second: f64,
    /// As `sent_per_second`.
    pub received_per_second: f64,
    /// Bytes per second while it was busy sending; 0 while unknown.
    pub speed: f64,
    /// Bytes queued on the channel and not sent yet.
    pub queued_bytes: u64,
    /// Places of the window in use for sending, and for receiving.
    pub window_out: u32,
    /// See `window_out`.
    pub window_in: u32,
    /// Places of the window.
    pub window: u32,
    /// Seconds in which it had chunks in flight and moved none.
    pub stalls: u64,
    /// Chunks packed from GPU memory, and unpacked into it.
    pub packed_chunks: u64,
    /// See `packed_chunks`.
    pub unpacked_chunks: u64,
    /// Time from submitting a chunk until it was packed, summed over all chunks, microseconds.
    pub pack_us: u64,
    /// As `pack_us`, until it was unpacked.
    pub unpack_us: u64,
    /// It was lost, and is closed.
    pub lost: bool,
    /// Its NIC runs far below the others of the connection.
    pub slow: bool,
    /// Its NIC is so slow that it is hardly used.
    pub avoided: bool,
    /// The kernel's statistics. Filled only when statistics are read.
    pub network: Option<Network>,
    /// Bytes that the peer's kernel has acknowledged on the present connection, and how long the network was busy with them. Filled as
    /// `network`, where a kernel says so.
    pub delivered: Option<(u64, Duration)>,
}

impl ChannelStats {
    /// With what an earlier channel in its place has moved.
    pub(crate) fn and(mut self, past: &ChannelStats) -> ChannelStats {
        self.sent_bytes += past.sent_bytes;
        self.sent_chunks += past.sent_chunks;
        self.received_bytes += past.received_bytes;
        self.received_chunks += past.received_chunks;
        self.packed_chunks += past.packed_chunks;
        self.unpacked_chunks += past.unpacked_chunks;
        self.pack_us += past.pack_us;
        self.unpack_us += past.unpack_us;
        self
    }
}

/// A connection.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConnectionStats {
    /// Number within the engine, from 1.
    pub id: u64,
    /// The peer's address.
    pub peer: String,
    /// The address of the peer's host, without a port.
    pub host: String,
    /// Why it has ended, once it has.
    pub error: Option<String>,
    /// Since it came up.
    pub age: Duration,
    /// Since the last frame of the peer.
    pub silent: Duration,
    /// Transfers of this engine in flight.
    pub in_flight: u64,
    /// Bytes queued on the control connection.
    pub backlog_bytes: u64,
    /// Counters.
    pub totals: Totals,
    /// Data channels; none once it has ended.
    pub channels: Vec<ChannelStats>,
}

/// An engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// "ip:port?gpu".
    pub metadata: String,
    /// The plugin that carries device memory.
    pub plugin: String,
    /// Since it was created.
    pub uptime: Duration,
    /// Connections that came up, ended in order, and were lost.
    pub opened: u64,
    /// See `opened`.
    pub closed: u64,
    /// See `opened`.
    pub lost: u64,
    /// Incoming set-ups that succeeded, failed, and were refused because the peer was not authorised or a limit was reached.
    pub setups_in: u64,
    /// See `setups_in`.
    pub setups_in_failed: u64,
    /// See `setups_in`.
    pub setups_in_refused: u64,
    /// Outgoing set-ups that succeeded, and that failed.
    pub setups_out: u64,
    /// See `setups_out`.
    pub setups_out_failed: u64,
    /// Times that a limit was reached: on set-ups, file descriptors, transfers or notifications.
    pub limits_hit: u64,
    /// Connections that ended at a deadline.
    pub timeouts: u64,
    /// Notifications that the application has not taken.
    pub notifications_waiting: u64,
    /// How long reads and writes of this engine took.
    pub times: TimeTable,
    /// Counters of all connections, those that have ended included.
    pub totals: Totals,
    /// Open connections.
    pub connections: Vec<ConnectionStats>,
}

impl EngineStats {
    /// Every counter besides the totals, with its name and what it means.
    pub fn counters(&self) -> [(&'static str, u64, &'static str); 10] {
        [
            ("connections_opened", self.opened, "Connections that came up"),
            ("connections_closed", self.closed, "Connections closed by either engine"),
            ("connections_lost", self.lost, "Connections that failed"),
            ("setups_in", self.setups_in, "Incoming set-ups that succeeded"),
            ("setups_in_failed", self.setups_in_failed, "Incoming set-ups that failed"),
            (
                "setups_in_refused",
                self.setups_in_refused,
                "Incoming set-ups refused, because the peer was not authorised or a limit was reached",
            ),
            ("setups_out", self.setups_out, "Outgoing set-ups that succeeded"),
            ("setups_out_failed", self.setups_out_failed, "Outgoing set-ups that failed"),
            ("limits_hit", self.limits_hit, "Times that a limit was hit"),
            ("timeouts", self.timeouts, "Connections that ended at a deadline"),
        ]
    }
}
