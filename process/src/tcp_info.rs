//! What the kernel says of a TCP connection. Knows nothing of who uses the socket.

use std::os::fd::RawFd;
use std::time::Duration;

/// From the kernel's tcp_states.h.
const CLOSED: u8 = 7;
/// Offsets in the kernel's tcp_info. Linux 2.6: the state and how often the oldest packet was sent again (both u8), packets that the peer has
/// not acknowledged (of a listening socket the length of its queue), milliseconds since its last acknowledgement, the size of the largest
/// packet, the smoothed round trip, and all segments sent again (u32).
const STATE: usize = 0;
const RETRIES: usize = 2;
const UNANSWERED: usize = 24;
const SINCE_ANSWER: usize = 56;
const PACKET: usize = 60;
const RTT: usize = 68;
const RETRANSMITS: usize = 100;
/// Linux 4.1: bytes that the peer has acknowledged, and that have come in (u64). 4.2: segments sent (u32). 4.6: the smallest round trip (u32).
const ACKNOWLEDGED: usize = 120;
const RECEIVED: usize = 128;
const SEGMENTS: usize = 136;
const MIN_RTT: usize = 148;
/// Linux 4.9: the recent delivery rate, the time with bytes to send or to be acknowledged, and the part of it in which the peer's window held
/// them up (u64). Times are in microseconds.
const DELIVERY_RATE: usize = 160;
const BUSY: usize = 168;
const WINDOW_LIMITED: usize = 176;

/// The kernel's tcp_info, as far as the kernel filled it: `None` and 0 stand for what an older kernel, or an emulation of one, does not say.
pub struct TcpInfo {
    bytes: [u8; 256],
    len: usize,
}

impl TcpInfo {
    /// `None` for what is no TCP socket.
    pub fn of(fd: RawFd) -> Option<TcpInfo> {
        let mut bytes = [0; 256];
        let mut len = bytes.len() as libc::socklen_t;
        // SAFETY: a buffer and its length.
        let known = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, bytes.as_mut_ptr().cast(), &mut len) };
        (known == 0).then_some(TcpInfo { bytes, len: (len as usize).min(bytes.len()) })
    }

    fn field<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes[..self.len].get(at..)?.first_chunk().copied()
    }

    fn number(&self, at: usize) -> u32 {
        self.field(at).map_or(0, u32::from_ne_bytes)
    }

    fn count(&self, at: usize) -> Option<u64> {
        self.field(at).map(u64::from_ne_bytes)
    }

    /// The connection has ended, or was reset.
    pub fn is_closed(&self) -> bool {
        self.field(STATE) == Some([CLOSED])
    }

    /// How often the oldest packet was sent again, and not acknowledged since.
    pub fn retries(&self) -> u8 {
        self.field(RETRIES).map_or(0, u8::from_ne_bytes)
    }

    /// Packets that the network has, for which the peer has room, and which it has not acknowledged.
    pub fn unanswered(&self) -> u32 {
        self.number(UNANSWERED)
    }

    /// Of a listening socket: connections that wait for its accept.
    pub fn waiting(&self) -> u32 {
        self.number(UNANSWERED)
    }

    /// The time since the peer's last acknowledgement.
    pub fn since_answer(&self) -> Duration {
        Duration::from_millis(self.number(SINCE_ANSWER).into())
    }

    /// The size of the largest packet, bytes.
    pub fn packet(&self) -> u32 {
        self.number(PACKET)
    }

    /// The smoothed round trip, microseconds.
    pub fn rtt(&self) -> u32 {
        self.number(RTT)
    }

    /// The smallest round trip seen, microseconds.
    pub fn min_rtt(&self) -> Option<u32> {
        self.field(MIN_RTT).map(u32::from_ne_bytes).filter(|&us| us > 0 && us < u32::MAX)
    }

    /// Segments sent.
    pub fn segments(&self) -> u32 {
        self.number(SEGMENTS)
    }

    /// Segments sent again.
    pub fn retransmits(&self) -> u32 {
        self.number(RETRANSMITS)
    }

    /// Bytes of the stream that the peer's kernel has acknowledged.
    pub fn acknowledged(&self) -> Option<u64> {
        self.count(ACKNOWLEDGED)
    }

    /// Bytes that have come in.
    pub fn received(&self) -> Option<u64> {
        self.count(RECEIVED)
    }

    /// Bytes a second that the peer acknowledged recently.
    pub fn delivery_rate(&self) -> Option<u64> {
        self.count(DELIVERY_RATE).filter(|&rate| rate > 0)
    }

    /// How long the network had bytes to send or to be acknowledged.
    pub fn busy(&self) -> Option<Duration> {
        self.count(BUSY).map(Duration::from_micros)
    }

    /// The part of it in which the peer's window held them up.
    pub fn window_limited(&self) -> Option<Duration> {
        self.count(WINDOW_LIMITED).map(Duration::from_micros)
    }
}
