//! Statistics as text.

use super::{ChannelStats, ConnectionStats, EngineStats};
use std::fmt;

/// Bytes with a unit that fits.
fn bytes(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        n => format!("{n:.0} B"),
    }
}

/// A speed, for lines of the log.
pub(crate) fn speed(bytes_per_second: f64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

impl fmt::Display for EngineStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = &self.totals;
        let (metadata, plugin, up) = (&self.metadata, &self.plugin, self.uptime);
        writeln!(f, "engine {metadata}: plugin {plugin}, up {up:.1?}, {} connections", self.connections.len())?;
        writeln!(
            f,
            "  connections: {} opened, {} closed, {} lost ({} at a deadline); limits hit: {}",
            self.opened, self.closed, self.lost, self.timeouts, self.limits_hit
        )?;
        writeln!(
            f,
            "  set-ups in: {} up, {} failed, {} refused; out: {} up, {} failed",
            self.setups_in, self.setups_in_failed, self.setups_in_refused, self.setups_out, self.setups_out_failed
        )?;
        writeln!(
            f,
            "  sent {} in {} chunks, received {} in {}; notifications waiting: {}",
            bytes(t.sent_bytes as f64),
            t.sent_chunks,
            bytes(t.received_bytes as f64),
            t.received_chunks,
            self.notifications_waiting
        )?;
        self.connections.iter().try_for_each(|connection| write!(f, "{connection}"))
    }
}

impl fmt::Display for ConnectionStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = &self.totals;
        let state = self.error.as_ref().map_or("up".to_owned(), |e| format!("ended: {e}"));
        writeln!(
            f,
            "  connection {} to {}: {state}, {:.1?} old, last frame {:.1?} ago",
            self.id, self.peer, self.age, self.silent
        )?;
        writeln!(
            f,
            "    transfers: {} in flight, {} done, {} failed, {} refused by the peer; the peer's: {}, {} refused",
            self.in_flight, t.transfers_completed, t.transfers_failed, t.refused_by_peer, t.peer_transfers, t.refused
        )?;
        writeln!(
            f,
            "    control: {} out, {} in, {} waiting; inline {} out, {} in; notifications {} out, {} in; stalls {}, slow answers {}, lost channels {}, chunks sent again {}",
            bytes(t.control_sent_bytes as f64),
            bytes(t.control_received_bytes as f64),
            bytes(self.backlog_bytes as f64),
            bytes(t.eager_sent_bytes as f64),
            bytes(t.eager_received_bytes as f64),
            t.notifications_sent,
            t.notifications_received,
            t.stalls,
            t.slow_answers,
            t.lost_channels,
            t.resent_chunks
        )?;
        self.channels.iter().enumerate().try_for_each(|(i, channel)| writeln!(f, "    channel {i} {channel}"))
    }
}

impl fmt::Display for ChannelStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.route.is_empty() { &self.nic } else { &self.route };
        let way = |total: u64, chunks: u64, rate: f64| format!("{} in {chunks} chunks ({})", bytes(total as f64), speed(rate));
        let (out, window) = (way(self.sent_bytes, self.sent_chunks, self.sent_per_second), self.window);
        let into = way(self.received_bytes, self.received_chunks, self.received_per_second);
        let plugin = if self.plugin.is_empty() { String::new() } else { format!("{} ", self.plugin) };
        write!(
            f,
            "{plugin}{place}: out {out}, in {into}, window {}/{window} out {}/{window} in",
            self.window_out, self.window_in
        )?;
        write!(f, ", queue {}, stalls {}", bytes(self.queued_bytes as f64), self.stalls)?;
        for (what, us, chunks) in [("pack", self.pack_us, self.packed_chunks), ("unpack", self.unpack_us, self.unpacked_chunks)] {
            if let Some(each) = us.checked_div(chunks) {
                write!(f, ", {what} {chunks} chunks at {each} us")?;
            }
        }
        if self.nvlink_bytes > 0 {
            write!(f, ", {} over NVLink", bytes(self.nvlink_bytes as f64))?;
        }
        if self.speed > 0.0 {
            write!(f, ", speed {}", speed(self.speed))?;
        }
        if let Some(network) = &self.network {
            let (rtt, again, of) = (f64::from(network.rtt_us) / 1e3, network.retransmits, network.segments);
            write!(f, ", rtt {rtt:.2} ms, {again} of {of} segments sent again")?;
        }
        write!(f, "{}{}", if self.slow { " SLOW" } else { "" }, if self.lost { " LOST" } else { "" })
    }
}
