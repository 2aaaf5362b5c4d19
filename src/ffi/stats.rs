//! Statistics of the C ABI, as structures and as text. Translates only.

use super::connection::uccl_conn_t;
use super::engine::uccl_engine_t;
use super::guard::{out_arg, status};
use super::handles::{connections, engines};
use super::metadata::copy_text;
use crate::engine::TransferPath;
use crate::stats::{ChannelStats, ConnectionStats, EngineStats, Totals};
use crate::status::{bail, Result, UCCL_OK};
use std::ffi::{c_char, c_int};

/// What an engine or a connection has counted. Each counter starts at 0 and never decreases. This structure never changes: later versions
/// append new counters to the structures that contain it.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uccl_totals_t {
    /// Bytes that channels have sent.
    pub sent_bytes: u64,
    /// Chunks that channels have sent.
    pub sent_chunks: u64,
    /// Bytes that channels have received.
    pub received_bytes: u64,
    /// Chunks that channels have received.
    pub received_chunks: u64,
    /// Bytes of small transfers sent inside control frames.
    pub eager_sent_bytes: u64,
    /// Bytes of small transfers received inside control frames.
    pub eager_received_bytes: u64,
    /// Transfers that this engine started.
    pub transfers_started: u64,
    /// Transfers of this engine that succeeded.
    pub transfers_completed: u64,
    /// Transfers of this engine that failed.
    pub transfers_failed: u64,
    /// Transfers that peers started.
    pub peer_transfers: u64,
    /// Transfers of peers that this engine refused.
    pub refused: u64,
    /// Transfers of this engine that peers refused.
    pub refused_by_peer: u64,
    /// Bytes sent on control connections.
    pub control_sent_bytes: u64,
    /// Bytes received on control connections.
    pub control_received_bytes: u64,
    /// Notifications sent.
    pub notifications_sent: u64,
    /// Notifications received.
    pub notifications_received: u64,
    /// Seconds in which a channel had chunks in flight and moved none.
    pub stalls: u64,
    /// Times that a peer was silent, or a transfer moved nothing, for half of its timeout.
    pub slow_answers: u64,
    /// Channels that were lost, and whose undelivered chunks were sent again on others.
    pub lost_channels: u64,
    /// Lost channels that came back.
    pub restored_channels: u64,
    /// Chunks sent again after their channel was lost.
    pub resent_chunks: u64,
    /// Times that a control connection was made again over another socket.
    pub control_moves: u64,
    /// Chunks packed from GPU memory.
    pub packed_chunks: u64,
    /// Chunks unpacked into GPU memory.
    pub unpacked_chunks: u64,
    /// Time from submitting a chunk until it was packed, summed over all chunks, microseconds.
    pub pack_us: u64,
    /// Time from submitting a chunk until it was unpacked, summed over all chunks, microseconds.
    pub unpack_us: u64,
}

// Members of later versions lie behind it and must not move.
const _: () = assert!(size_of::<uccl_totals_t>() == 26 * size_of::<u64>());

/// Statistics of an engine. Set `size` to sizeof(uccl_stats_t) before the call; the library fills no more than that. Later versions only
/// append members. The library copies numbers into the structure and keeps no pointer to it. Counters start when the engine is created and
/// include connections that have ended.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uccl_stats_t {
    /// In: size of the caller's structure, bytes. Out: bytes filled.
    pub size: usize,
    /// Milliseconds since the engine was created.
    pub uptime_ms: u64,
    /// Open connections.
    pub connections: u64,
    /// Connections opened so far.
    pub connections_opened: u64,
    /// Connections closed by either engine.
    pub connections_closed: u64,
    /// Connections that failed.
    pub connections_lost: u64,
    /// Incoming set-ups that succeeded.
    pub setups_in: u64,
    /// Incoming set-ups that failed.
    pub setups_in_failed: u64,
    /// Incoming set-ups refused, because the peer was not authorised or a limit was reached.
    pub setups_in_refused: u64,
    /// Outgoing set-ups that succeeded.
    pub setups_out: u64,
    /// Outgoing set-ups that failed.
    pub setups_out_failed: u64,
    /// Times that a limit was reached: on set-ups, file descriptors, transfers or notifications.
    pub limits_hit: u64,
    /// Connections that failed at a deadline.
    pub timeouts: u64,
    /// Notifications that the application has not taken yet.
    pub notifications_waiting: u64,
    /// Sums over all connections.
    pub totals: uccl_totals_t,
}

/// Statistics of a connection. `size`: as in uccl_stats_t.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uccl_conn_stats_t {
    /// In: size of the caller's structure, bytes. Out: bytes filled.
    pub size: usize,
    /// Number of the connection in its engine, from 1.
    pub id: u64,
    /// 1 while the connection is open, 0 once it has ended.
    pub up: u64,
    /// Milliseconds since it was opened.
    pub age_ms: u64,
    /// Milliseconds since the last frame of the peer, heartbeats included.
    pub silent_ms: u64,
    /// Channels; 0 once it has ended.
    pub channels: u64,
    /// Transfers of this engine in flight.
    pub transfers_in_flight: u64,
    /// Bytes queued on the control connection.
    pub backlog_bytes: u64,
    /// Counters of the connection.
    pub totals: uccl_totals_t,
}

/// Statistics of a channel. `size`: as in uccl_stats_t.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uccl_channel_stats_t {
    /// In: size of the caller's structure, bytes. Out: bytes filled.
    pub size: usize,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Chunks sent.
    pub sent_chunks: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Chunks received.
    pub received_chunks: u64,
    /// Bytes sent per second, averaged over about one second.
    pub sent_bytes_per_second: u64,
    /// Bytes received per second, averaged over about one second.
    pub received_bytes_per_second: u64,
    /// Bytes per second while the channel is busy sending; 0 if unknown.
    pub speed_bytes_per_second: u64,
    /// Bytes queued on the channel and not sent yet.
    pub queued_bytes: u64,
    /// Chunks in the send window.
    pub window_out: u64,
    /// Chunks in the receive window.
    pub window_in: u64,
    /// Size of each window, chunks.
    pub window: u64,
    /// Seconds in which the channel had chunks in flight and moved none.
    pub stalls: u64,
    /// Chunks packed from GPU memory.
    pub packed_chunks: u64,
    /// Chunks unpacked into GPU memory.
    pub unpacked_chunks: u64,
    /// 1 while the NIC of the channel is much slower than the others.
    pub slow: u64,
    /// TCP segments sent. 0 if the plugin does not report it; the same holds for the next three.
    pub segments: u64,
    /// TCP segments retransmitted.
    pub retransmits: u64,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u64,
    /// Smallest round-trip time, microseconds.
    pub min_rtt_us: u64,
    /// Name of the channel's NIC, NUL-terminated, cut to 31 bytes.
    pub nic: [c_char; 32],
    /// Time from submitting a chunk until it was packed, summed over all chunks, microseconds.
    pub pack_us: u64,
    /// Time from submitting a chunk until it was unpacked, summed over all chunks, microseconds.
    pub unpack_us: u64,
    /// 1 while the channel is lost: it failed, or the peer lost it, and it has not come back.
    pub lost: u64,
    /// Of the bytes of direct transfers: those that were copied over NVLink. Reads of the peer count at the peer alone.
    pub nvlink_bytes: u64,
    /// Name of the plugin that carries the channel, or "direct" for direct transfers between two processes on one host; NUL-terminated,
    /// cut to 31 bytes.
    pub plugin: [c_char; 32],
    /// The word for what carries the channel, as in UCCL_TCPX_REQUIRE: "tcp", "devmem", "tcpx", "tcpxo" or "direct", else the plugin's name;
    /// NUL-terminated, cut to 15 bytes. Of "direct", nvlink_bytes are "nvlink".
    pub carrier: [c_char; 16],
}

// Programs built with an older header pass a structure that ends earlier: no member moves.
const _: () = {
    assert!(std::mem::offset_of!(uccl_channel_stats_t, nic) == 20 * size_of::<u64>());
    assert!(std::mem::offset_of!(uccl_channel_stats_t, lost) == 26 * size_of::<u64>());
    assert!(std::mem::offset_of!(uccl_channel_stats_t, carrier) == 32 * size_of::<u64>());
};

/// Returns the statistics of an engine, summed over its connections.
///
/// @param engine  [in]     The engine.
/// @param stats   [in,out] The statistics; the caller sets the member size.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
///
/// Threads: any. The cost grows with the number of channels: each one takes a system call.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_stats(engine: *mut uccl_engine_t, stats: *mut uccl_stats_t) -> c_int {
    status(|| {
        let engine = engines().get(engine.cast())?;
        // SAFETY: the caller passes a structure that begins with its size, or null.
        unsafe { fill(stats, || Ok(uccl_stats_t::from(&engine.stats()?))) }
    })
}

/// Returns the statistics of a connection, also of one that has ended.
///
/// @param conn   [in]     The connection.
/// @param stats  [in,out] The statistics; the caller sets the member size.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_conn_stats(conn: *mut uccl_conn_t, stats: *mut uccl_conn_stats_t) -> c_int {
    status(|| {
        let conn = connections().get(conn.cast())?;
        // SAFETY: the caller passes a structure that begins with its size, or null.
        unsafe { fill(stats, || Ok(uccl_conn_stats_t::from(&conn.stats()?))) }
    })
}

/// Returns the statistics of a channel, including those that the kernel keeps.
///
/// @param conn     [in]     The connection.
/// @param channel  [in]     Number of the channel, from 0; uccl_conn_stats_t has the number of channels.
/// @param stats    [in,out] The statistics; the caller sets the member size.
/// @return UCCL_OK; UCCL_ERR_NOT_FOUND if there is no such channel (any more);
///         UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_channel_stats(
    conn: *mut uccl_conn_t,
    channel: usize,
    stats: *mut uccl_channel_stats_t,
) -> c_int {
    status(|| {
        let conn = connections().get(conn.cast())?;
        // SAFETY: the caller passes a structure that begins with its size, or null.
        unsafe { fill(stats, || nth(conn.stats()?.channels, channel)) }
    })
}

/// Writes the statistics of an engine, its connections and their channels as text for people.
///
/// @param engine  [in]  The engine.
/// @param buf     [out] NUL-terminated text. May be NULL if len is 0.
/// @param len     [in]  Size of buf in bytes.
/// @param needed  [out] Bytes needed with the NUL, also written if buf is too small. May be NULL.
/// @return UCCL_OK; UCCL_ERR_RESOURCE if buf is too small (buf is unchanged; the next text may be longer);
///         another negative status.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_stats_text(
    engine: *mut uccl_engine_t,
    buf: *mut c_char,
    len: usize,
    needed: *mut usize,
) -> c_int {
    status(|| {
        let text = engines().get(engine.cast())?.stats()?.to_string();
        // SAFETY: the caller passes writable pointers or null.
        unsafe { copy_text(&text, buf, len, needed) }
    })
}

fn nth(channels: Vec<ChannelStats>, channel: usize) -> Result<uccl_channel_stats_t> {
    match channels.get(channel) {
        Some(found) => Ok(found.into()),
        None => bail!(NotFound, "no channel {channel}: the connection has {}", channels.len()),
    }
}

/// What carried the bytes of a transfer. All empty before the first byte has moved.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uccl_xfer_path_t {
    /// Size of this structure. Set it to sizeof(uccl_xfer_path_t) before the call; the call sets it to the bytes that it filled.
    pub size: usize,
    /// Channels that moved bytes of it: bit n stands for channel n of uccl_engine_channel_stats. Channels after the 61st share its bit. A
    /// channel that was lost counts if it had sent bytes.
    pub channels: u64,
    /// The words for what carried its bytes, as in UCCL_TCPX_REQUIRE, each once, separated by commas: "eager" (in frames of the control
    /// connection: small transfers), "direct", "nvlink", and the carriers of the channels, such as "tcpx". NUL-terminated, cut to 63 bytes.
    pub carriers: [c_char; 64],
    /// This host's NICs of the channels that moved bytes, each once, separated by commas; NUL-terminated, cut to 127 bytes.
    pub nics: [c_char; 128],
}

/// Returns what carried the bytes of a transfer, counted while they moved: not what the configuration says.
///
/// @param conn         [in]     The connection that started it.
/// @param transfer_id  [in]     Its id. It may be in flight, or have ended, unless 16,384 later transfers of its connection have ended too:
///                              then nothing is known of it.
/// @param path         [in,out] The answer; the caller sets the member size. Once the connection has ended, channels have no names.
/// @return UCCL_OK; UCCL_ERR_NOT_FOUND for an id that this connection never returned;
///         UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_xfer_path(conn: *mut uccl_conn_t, transfer_id: u64, path: *mut uccl_xfer_path_t) -> c_int {
    status(|| {
        let conn = connections().get(conn.cast())?;
        // SAFETY: the caller passes a structure that begins with its size, or null.
        unsafe { fill(path, || Ok(uccl_xfer_path_t::from(&conn.path(transfer_id)?))) }
    })
}

impl From<&TransferPath> for uccl_xfer_path_t {
    fn from(of: &TransferPath) -> uccl_xfer_path_t {
        let (carriers, nics) = (name(&of.carriers.join(",")), name(&of.nics.join(",")));
        uccl_xfer_path_t { size: size_of::<uccl_xfer_path_t>(), channels: of.channels, carriers, nics }
    }
}

/// Fills as much of a structure as the caller has room for.
///
/// # Safety
/// `stats` is null, badly aligned, or points to a structure that begins with its size in bytes and is that large. `T` is plain numbers
/// after a usize.
unsafe fn fill<T: Copy>(stats: *mut T, value: impl FnOnce() -> Result<T>) -> Result<c_int> {
    // SAFETY: by the caller's contract; every version of the structure begins with its size.
    let size = *unsafe { out_arg(stats.cast::<usize>(), "stats")? };
    if size < 2 * size_of::<u64>() {
        bail!(InvalidArgument, "stats->size is {size}: set it to the size of the structure");
    }
    let value = value()?;
    let n = size.min(size_of::<T>());
    // SAFETY: both structures have n bytes, all plain numbers, and the first is the size.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), stats.cast::<u8>(), n);
        stats.cast::<usize>().write(n);
    }
    Ok(UCCL_OK)
}

/// A name, cut to what leaves room for a NUL.
fn name<const N: usize>(text: &str) -> [c_char; N] {
    let mut out = [0; N];
    for (to, from) in out[..N - 1].iter_mut().zip(text.bytes()) {
        *to = from as c_char;
    }
    out
}

impl From<&Totals> for uccl_totals_t {
    fn from(totals: &Totals) -> uccl_totals_t {
        // Both have the same names.
        macro_rules! members {
            ($($name:ident)*) => { uccl_totals_t { $($name: totals.$name,)* } };
        }
        members!(
            sent_bytes sent_chunks received_bytes received_chunks eager_sent_bytes eager_received_bytes
            transfers_started transfers_completed transfers_failed peer_transfers refused refused_by_peer
            control_sent_bytes control_received_bytes notifications_sent notifications_received stalls slow_answers
            lost_channels restored_channels resent_chunks control_moves packed_chunks unpacked_chunks pack_us unpack_us
        )
    }
}

impl From<&EngineStats> for uccl_stats_t {
    fn from(stats: &EngineStats) -> uccl_stats_t {
        uccl_stats_t {
            size: size_of::<uccl_stats_t>(),
            uptime_ms: stats.uptime.as_millis() as u64,
            connections: stats.connections.len() as u64,
            connections_opened: stats.opened,
            connections_closed: stats.closed,
            connections_lost: stats.lost,
            setups_in: stats.setups_in,
            setups_in_failed: stats.setups_in_failed,
            setups_in_refused: stats.setups_in_refused,
            setups_out: stats.setups_out,
            setups_out_failed: stats.setups_out_failed,
            limits_hit: stats.limits_hit,
            timeouts: stats.timeouts,
            notifications_waiting: stats.notifications_waiting,
            totals: (&stats.totals).into(),
        }
    }
}

impl From<&ConnectionStats> for uccl_conn_stats_t {
    fn from(stats: &ConnectionStats) -> uccl_conn_stats_t {
        uccl_conn_stats_t {
            size: size_of::<uccl_conn_stats_t>(),
            id: stats.id,
            up: stats.error.is_none().into(),
            age_ms: stats.age.as_millis() as u64,
            silent_ms: stats.silent.as_millis() as u64,
            channels: stats.channels.len() as u64,
            transfers_in_flight: stats.in_flight,
            backlog_bytes: stats.backlog_bytes,
            totals: (&stats.totals).into(),
        }
    }
}

impl From<&ChannelStats> for uccl_channel_stats_t {
    fn from(stats: &ChannelStats) -> uccl_channel_stats_t {
        let network = stats.network.clone().unwrap_or_default();
        uccl_channel_stats_t {
            size: size_of::<uccl_channel_stats_t>(),
            sent_bytes: stats.sent_bytes,
            sent_chunks: stats.sent_chunks,
            received_bytes: stats.received_bytes,
            received_chunks: stats.received_chunks,
            sent_bytes_per_second: stats.sent_per_second as u64,
            received_bytes_per_second: stats.received_per_second as u64,
            speed_bytes_per_second: stats.speed as u64,
            queued_bytes: stats.queued_bytes,
            window_out: stats.window_out.into(),
            window_in: stats.window_in.into(),
            window: stats.window.into(),
            stalls: stats.stalls,
            packed_chunks: stats.packed_chunks,
            unpacked_chunks: stats.unpacked_chunks,
            slow: stats.slow.into(),
            segments: network.segments,
            retransmits: network.retransmits,
            rtt_us: network.rtt_us.into(),
            min_rtt_us: network.min_rtt_us.into(),
            nic: name(&stats.nic),
            pack_us: stats.pack_us,
            unpack_us: stats.unpack_us,
            lost: stats.lost.into(),
            nvlink_bytes: stats.nvlink_bytes,
            plugin: name(&stats.plugin),
            carrier: name(crate::require::carrier(&stats.plugin)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_reported_with_its_plugin_and_its_loss() {
        let text = |name: &[c_char]| {
            assert_eq!(name.last(), Some(&0));
            name.iter().take_while(|&&c| c != 0).map(|&c| c as u8 as char).collect::<String>()
        };
        let channel =
            ChannelStats { plugin: "GPUDirectTCPX_v7".into(), nic: "n".repeat(40), lost: true, ..ChannelStats::default() };
        let reported = uccl_channel_stats_t::from(&ChannelStats { nvlink_bytes: 7, ..channel });
        assert_eq!((reported.lost, reported.nvlink_bytes), (1, 7));
        assert_eq!((text(&reported.plugin), text(&reported.nic)), ("GPUDirectTCPX_v7".to_owned(), "n".repeat(31)));
        assert_eq!(text(&reported.carrier), "tcpx");
    }
}
