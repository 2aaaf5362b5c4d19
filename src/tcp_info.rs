//! What the kernel says of a TCP connection: its tcp_info (Linux 4.1 and newer). Knows nothing of who uses the socket.

use std::os::fd::RawFd;
use std::time::Duration;

/// From the kernel's tcp_states.h, and the offsets in its tcp_info: the state and how often the oldest packet was sent again (u8), packets
/// that the peer has not acknowledged and milliseconds since its last acknowledgement (u32), and bytes that it has and that have come in
/// (u64).
const CLOSED: u8 = 7;
const STATE: usize = 0;
const RETRIES: usize = 2;
const UNANSWERED: usize = 24;
const SINCE_ANSWER: usize = 56;
const ACKNOWLEDGED: usize = 120;
const RECEIVED: usize = 128;
const LEN: usize = RECEIVED + 8;

pub(crate) struct TcpInfo([u8; LEN]);

impl TcpInfo {
    /// `None` where the kernel has none.
    pub(crate) fn of(fd: RawFd) -> Option<TcpInfo> {
        let mut info = [0u8; LEN];
        let mut size = info.len() as libc::socklen_t;
        // SAFETY: a buffer of the given length.
        let result = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut size) };
        (result == 0 && size as usize >= info.len()).then_some(TcpInfo(info))
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..].first_chunk().copied().unwrap_or([0; N])
    }

    /// The connection has ended, or was reset.
    pub(crate) fn is_closed(&self) -> bool {
        self.0[STATE] == CLOSED
    }

    /// An acknowledgement is due: the network has bytes that the peer has room for.
    pub(crate) fn is_unanswered(&self) -> bool {
        self.field(UNANSWERED) != [0; 4]
    }

    /// The oldest packet was sent again, and not acknowledged since.
    pub(crate) fn sends_again(&self) -> bool {
        self.0[RETRIES] > 0
    }

    /// The time since the peer's last acknowledgement.
    pub(crate) fn since_answer(&self) -> Duration {
        Duration::from_millis(u32::from_ne_bytes(self.field(SINCE_ANSWER)).into())
    }

    /// Bytes that the peer has acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        u64::from_ne_bytes(self.field(ACKNOWLEDGED))
    }

    /// Bytes that have come in.
    pub(crate) fn received(&self) -> u64 {
        u64::from_ne_bytes(self.field(RECEIVED))
    }
}
