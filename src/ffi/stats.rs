//! Statistics of the C ABI: of an engine, a connection and a channel, and as text.

use super::connection::uccl_conn_t;
use super::engine::uccl_engine_t;
use super::guard::{out_arg, status};
use super::handles::{connections, engines};
use super::metadata::copy_text;
use crate::stats::{ChannelStats, ConnectionStats, EngineStats};
use crate::status::{bail, Result, UCCL_OK};
use std::ffi::{c_char, c_int};

/// What an engine counts. Set `size` to sizeof(uccl_stats_t) before the call: that is how the library knows what the caller has room for.
/// Later versions only append members. Counters begin at 0 with the engine and never fall; those of connections include the
/// connections that have ended.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uccl_stats_t {
    /// In: bytes of the caller's structure. Out: bytes that were filled.
    pub size: usize,
    /// Milliseconds since the engine was created.
    pub uptime_ms: u64,
    /// Connections that are there.
    pub connections: u64,
    /// Connections that came up.
    pub connections_opened: u64,
    /// Connections that one of the sides closed.
    pub connections_closed: u64,
    /// Connections that failed.
    pub connections_lost: u64,
    /// Incoming set-ups that succeeded.
    pub setups_in: u64,
    /// Incoming set-ups that failed.
    pub setups_in_failed: u64,
    /// Incoming set-ups refused for lack of a permission or of room.
    pub setups_in_refused: u64,
    /// Outgoing set-ups that succeeded.
    pub setups_out: u64,
    /// Outgoing set-ups that failed.
    pub setups_out_failed: u64,
    /// Times that a limit was hit: of set-ups, descriptors, transfers, notifications.
    pub limits_hit: u64,
    /// Connections that ended at a deadline.
    pub timeouts: u64,
    /// Notifications that the application has not taken.
    pub notifications_waiting: u64,
    /// Bytes that channels have sent.
    pub sent_bytes: u64,
    /// Chunks that channels have sent.
    pub sent_chunks: u64,
    /// Bytes that channels have received.
    pub received_bytes: u64,
    /// Chunks that channels have received.
    pub received_chunks: u64,
    /// Bytes of small transfers sent inside control frames.
    pub inline_sent_bytes: u64,
    /// Bytes of small transfers received inside control frames.
    pub inline_received_bytes: u64,
    /// Transfers that this side started.
    pub transfers_started: u64,
    /// Transfers of this side that succeeded.
    pub transfers_completed: u64,
    /// Transfers of this side that failed.
    pub transfers_failed: u64,
    /// Transfers that the peer announced.
    pub peer_transfers: u64,
    /// Transfers of the peer that this side refused.
    pub refused: u64,
    /// Transfers of this side that the peer refused.
    pub refused_by_peer: u64,
    /// Bytes sent on the control stream.
    pub control_sent_bytes: u64,
    /// Bytes received on the control stream.
    pub control_received_bytes: u64,
    /// Notifications sent.
    pub notifications_sent: u64,
    /// Notifications received.
    pub notifications_received: u64,
    /// Seconds in which a channel with chunks under way moved none.
    pub stalls: u64,
    /// Times that the peer, or a transfer, kept silent for half of its timeout.
    pub slow_answers: u64,
    /// Chunks gathered from device memory.
    pub packed_chunks: u64,
    /// Chunks scattered to device memory.
    pub unpacked_chunks: u64,
    /// Microseconds from handing a chunk over for gathering until it was gathered, of all chunks together.
    pub pack_us: u64,
    /// Microseconds from handing a chunk over for scattering until it was in place, of all chunks together.
    pub unpack_us: u64,
}

/// What a connection counts. `size`: as in uccl_stats_t.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uccl_conn_stats_t {
    /// In: bytes of the caller's structure. Out: bytes that were filled.
    pub size: usize,
    /// Number of the connection within the engine, from 1.
    pub id: u64,
    /// 1 while the connection is up, 0 once it has ended.
    pub up: u64,
    /// Milliseconds since it came up.
    pub age_ms: u64,
    /// Milliseconds since anything was heard of the peer; heartbeats count.
    pub silent_ms: u64,
    /// Data channels; 0 once it has ended.
    pub channels: u64,
    /// Transfers of this side that are under way.
    pub transfers_in_flight: u64,
    /// Bytes of the control stream that wait to leave.
    pub backlog_bytes: u64,
    /// Bytes that channels have sent.
    pub sent_bytes: u64,
    /// Chunks that channels have sent.
    pub sent_chunks: u64,
    /// Bytes that channels have received.
    pub received_bytes: u64,
    /// Chunks that channels have received.
    pub received_chunks: u64,
    /// Bytes of small transfers sent inside control frames.
    pub inline_sent_bytes: u64,
    /// Bytes of small transfers received inside control frames.
    pub inline_received_bytes: u64,
    /// Transfers that this side started.
    pub transfers_started: u64,
    /// Transfers of this side that succeeded.
    pub transfers_completed: u64,
    /// Transfers of this side that failed.
    pub transfers_failed: u64,
    /// Transfers that the peer announced.
    pub peer_transfers: u64,
    /// Transfers of the peer that this side refused.
    pub refused: u64,
    /// Transfers of this side that the peer refused.
    pub refused_by_peer: u64,
    /// Bytes sent on the control stream.
    pub control_sent_bytes: u64,
    /// Bytes received on the control stream.
    pub control_received_bytes: u64,
    /// Notifications sent.
    pub notifications_sent: u64,
    /// Notifications received.
    pub notifications_received: u64,
    /// Seconds in which a channel with chunks under way moved none.
    pub stalls: u64,
    /// Times that the peer, or a transfer, kept silent for half of its timeout.
    pub slow_answers: u64,
    /// Chunks gathered from device memory.
    pub packed_chunks: u64,
    /// Chunks scattered to device memory.
    pub unpacked_chunks: u64,
    /// Microseconds from handing a chunk over for gathering until it was gathered, of all chunks together.
    pub pack_us: u64,
    /// Microseconds from handing a chunk over for scattering until it was in place, of all chunks together.
    pub unpack_us: u64,
}

/// What a data channel counts. `size`: as in uccl_stats_t.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uccl_channel_stats_t {
    /// In: bytes of the caller's structure. Out: bytes that were filled.
    pub size: usize,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Chunks sent.
    pub sent_chunks: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Chunks received.
    pub received_chunks: u64,
    /// Bytes sent per second, over the last second or so.
    pub sent_bytes_per_second: u64,
    /// Bytes received per second, over the last second or so.
    pub received_bytes_per_second: u64,
    /// Bytes per second while the channel was busy sending; 0 while unknown.
    pub speed_bytes_per_second: u64,
    /// Bytes handed to the channel and not sent.
    pub queued_bytes: u64,
    /// Places of the window in use for sending.
    pub window_out: u64,
    /// Places of the window in use for receiving.
    pub window_in: u64,
    /// Places of the window.
    pub window: u64,
    /// Seconds in which the channel had chunks under way and moved none.
    pub stalls: u64,
    /// Chunks gathered from device memory.
    pub packed_chunks: u64,
    /// Chunks scattered to device memory.
    pub unpacked_chunks: u64,
    /// 1 while the channel runs far below the others.
    pub slow: u64,
    /// TCP segments sent; 0 where the plugin does not tell, as the following.
    pub segments: u64,
    /// TCP segments sent again.
    pub retransmits: u64,
    /// Smoothed round trip, microseconds.
    pub rtt_us: u64,
    /// Smallest round trip, microseconds.
    pub min_rtt_us: u64,
    /// Name of the channel's NIC, NUL-terminated, cut to 31 bytes.
    pub nic: [c_char; 32],
    /// Microseconds from handing a chunk over for gathering until it was gathered, of all chunks together.
    pub pack_us: u64,
    /// Microseconds from handing a chunk over for scattering until it was in place, of all chunks together.
    pub unpack_us: u64,
}

/// What an engine and its connections count.
///
/// @param engine  [in]     The engine.
/// @param stats   [in,out] The numbers; its member size is set by the caller.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size without room for one number; another negative status.
///
/// Threads: any. Looks at every connection; the kernel is asked about each channel.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_stats(engine: *mut uccl_engine_t, stats: *mut uccl_stats_t) -> c_int {
    status(|| {
        let engine = engines().get(engine.cast())?;
        // SAFETY: the caller passes a structure that begins with its size, or null.
        unsafe { fill(stats, || Ok(uccl_stats_t::from(&engine.stats()?))) }
    })
}

/// What a connection counts. One that has ended still tells its totals.
///
/// @param conn   [in]     The connection.
/// @param stats  [in,out] The numbers; its member size is set by the caller.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size without room for one number; another negative status.
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

/// What a data channel counts, and what the kernel knows of it.
///
/// @param conn     [in]     The connection.
/// @param channel  [in]     Number of the channel, from 0; uccl_conn_stats_t has how many there are.
/// @param stats    [in,out] The numbers; its member size is set by the caller.
/// @return UCCL_OK; UCCL_ERR_NOT_FOUND for a channel that does not exist, or no longer;
///         UCCL_ERR_INVALID_ARGUMENT for a size without room for one number; another negative status.
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

/// What an engine, its connections and their channels count, in words for people: a line for each channel.
///
/// @param engine  [in]  The engine.
/// @param buf     [out] NUL-terminated text. May be NULL when len is 0.
/// @param len     [in]  Size of buf in bytes.
/// @param needed  [out] Bytes needed with the NUL, written on success and when buf is too small. May be NULL.
/// @return UCCL_OK; UCCL_ERR_RESOURCE when buf is too small (nothing is written to it; the text may be longer the next time);
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
        None => bail!(NotFound, "channel {channel} of a connection with {}", channels.len()),
    }
}

/// Fills as much of a structure as the caller has room for.
///
/// # Safety
/// `stats` is null, badly aligned, or points to a structure that begins with its size in bytes and is that large. `T` is plain numbers
/// after a usize.
unsafe fn fill<T: Copy>(stats: *mut T, value: impl FnOnce() -> Result<T>) -> Result<c_int> {
    // SAFETY: by the caller's contract; the size is there however old the caller's structure is.
    let size = *unsafe { out_arg(stats.cast::<usize>(), "stats")? };
    if size < 2 * size_of::<u64>() {
        bail!(InvalidArgument, "stats->size is {size}: set it to the size of the structure");
    }
    let value = value()?;
    let n = size.min(size_of::<T>());
    // SAFETY: n bytes are there on both sides, plain numbers, of which the first is the size.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), stats.cast::<u8>(), n);
        stats.cast::<usize>().write(n);
    }
    Ok(UCCL_OK)
}

/// A structure of the C ABI: its own numbers, then the totals, which its engine or connection has under the same names.
macro_rules! with_totals {
    ($type:ident, $totals:expr, { $($own:ident: $value:expr,)* }) => {
        with_totals!(@ $type, $totals, { $($own: $value,)* },
            sent_bytes sent_chunks received_bytes received_chunks inline_sent_bytes inline_received_bytes
            transfers_started transfers_completed transfers_failed peer_transfers refused refused_by_peer
            control_sent_bytes control_received_bytes notifications_sent notifications_received stalls slow_answers
            packed_chunks unpacked_chunks pack_us unpack_us)
    };
    (@ $type:ident, $totals:expr, { $($own:ident: $value:expr,)* }, $($name:ident)*) => {
        $type { size: size_of::<$type>(), $($own: $value,)* $($name: $totals.$name,)* }
    };
}

impl From<&EngineStats> for uccl_stats_t {
    fn from(stats: &EngineStats) -> uccl_stats_t {
        with_totals!(uccl_stats_t, stats.totals, {
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
        })
    }
}

impl From<&ConnectionStats> for uccl_conn_stats_t {
    fn from(stats: &ConnectionStats) -> uccl_conn_stats_t {
        with_totals!(uccl_conn_stats_t, stats.totals, {
            id: stats.id,
            up: stats.error.is_none().into(),
            age_ms: stats.age.as_millis() as u64,
            silent_ms: stats.silent.as_millis() as u64,
            channels: stats.channels.len() as u64,
            transfers_in_flight: stats.in_flight,
            backlog_bytes: stats.backlog_bytes,
        })
    }
}

impl From<&ChannelStats> for uccl_channel_stats_t {
    fn from(stats: &ChannelStats) -> uccl_channel_stats_t {
        let network = stats.network.clone().unwrap_or_default();
        let mut nic: [c_char; 32] = [0; 32];
        let room = nic.len() - 1;
        for (to, from) in nic[..room].iter_mut().zip(stats.nic.bytes()) {
            *to = from as c_char;
        }
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
            nic,
            pack_us: stats.pack_us,
            unpack_us: stats.unpack_us,
        }
    }
}
