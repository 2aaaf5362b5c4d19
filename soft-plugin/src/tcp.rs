//! TCP socket statistics from the kernel, and the options of data sockets that `socket2` lacks.

use std::ffi::c_char;
use std::io;
use std::time::Duration;

use nccl_net_abi::{ucclCommInfo, ucclFlow};
use socket2::{Socket, TcpKeepalive};

/// Offsets in the kernel's tcp_info: bytes acknowledged by the peer (u64, Linux 4.1) and the smallest round trip (u32, microseconds,
/// Linux 4.6).
const BYTES_ACKED: usize = 120;
const MIN_RTT: usize = 148;
/// Retransmissions in a row (u8), packets that are not acknowledged, and the size of the largest packet (both u32, Linux 2.6).
const RETRIES: usize = 2;
const UNANSWERED: usize = 24;
const PACKET: usize = 60;
/// The smoothed round trip, all retransmitted segments (both u32, Linux 2.6), segments sent (u32, Linux 4.2), and the recent
/// delivery rate (u64, Linux 4.9).
const RTT: usize = 68;
const RETRANSMITS: usize = 100;
const SEGMENTS: usize = 136;
const DELIVERY_RATE: usize = 160;
/// The time with bytes to send or to be acknowledged, and the part of it in which the peer's window held them up (both u64, microseconds,
/// Linux 4.9).
const BUSY: usize = 168;
const WINDOW_LIMITED: usize = 176;

/// The part of tcp_info that the kernel filled.
struct Info {
    bytes: [u8; 256],
    len: usize,
}

impl Info {
    fn read(fd: i32) -> Option<Info> {
        let mut info = Info { bytes: [0; 256], len: 0 };
        let mut len = info.bytes.len() as libc::socklen_t;
        // SAFETY: a buffer and its length.
        let known = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.bytes.as_mut_ptr().cast(), &mut len) };
        info.len = len as usize;
        (known == 0).then_some(info)
    }

    fn field<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes[..self.len.min(self.bytes.len())].get(at..)?.first_chunk::<N>().copied()
    }
}

/// Bytes of the stream that the peer's kernel has acknowledged; 0 where the kernel, or an emulation of it, says less about sockets.
pub fn bytes_acked(fd: i32) -> Option<u64> {
    Some(Info::read(fd)?.field(BYTES_ACKED).map_or(0, u64::from_ne_bytes))
}

/// The smallest round trip seen, microseconds.
pub fn min_rtt(fd: i32) -> Option<u32> {
    Info::read(fd)?.field(MIN_RTT).map(u32::from_ne_bytes).filter(|&us| us > 0 && us < u32::MAX)
}

/// Bytes a second that the peer acknowledged recently.
pub fn delivery_rate(fd: i32) -> Option<u64> {
    Info::read(fd)?.field(DELIVERY_RATE).map(u64::from_ne_bytes).filter(|&rate| rate > 0)
}

/// Limits how many bytes the kernel takes that it cannot send yet; 0: as many as the buffer holds. It matters little, so failure is ignored.
pub fn limit_unsent(fd: i32, bytes: u32) {
    // SAFETY: a buffer and its length.
    unsafe {
        libc::setsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
}

/// The unit in which the kernel counts a connection's times, microseconds: the interval of its timer interrupt, 1 to 10 ms.
fn tick_us() -> u32 {
    // SAFETY: plain data for which zeros are valid.
    let mut tick: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: a timespec.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &mut tick) };
    (tick.tv_nsec / 1000).clamp(1000, 10_000) as u32
}

/// Limits the bytes that the kernel takes before the peer has acknowledged them. It matters little, so failure is ignored.
pub fn limit_buffer(fd: i32, bytes: usize) {
    let bytes = bytes as libc::c_int;
    // SAFETY: an int and its size.
    unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
}

/// Limits the rate of a socket. The kernel's TCP paces the packets itself where the queue of the NIC does not.
pub fn pace(fd: i32, bytes_a_second: u64) -> io::Result<()> {
    // SAFETY: a buffer and its length.
    match unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const bytes_a_second).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Progress of a socket's bytes; 0 for values that an old kernel lacks.
pub fn flow(fd: i32) -> Option<ucclFlow> {
    let info = Info::read(fd)?;
    let mut waiting: libc::c_int = 0;
    // SAFETY: a socket and an int.
    let known = unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut waiting) };
    Some(ucclFlow {
        size: size_of::<ucclFlow>(),
        acknowledged: info.field(BYTES_ACKED).map_or(0, u64::from_ne_bytes),
        waiting: if known == 0 { waiting.max(0) as u64 } else { 0 },
        min_rtt_us: info.field(MIN_RTT).map(u32::from_ne_bytes).filter(|&us| us < u32::MAX).unwrap_or(0),
        stale: 0,
        unanswered: info.field(UNANSWERED).map_or(0, u32::from_ne_bytes),
        retries: info.field(RETRIES).map_or(0, u8::from_ne_bytes).into(),
        packet: info.field(PACKET).map_or(0, u32::from_ne_bytes),
        tick_us: info.field::<8>(WINDOW_LIMITED).map_or(0, |_| tick_us()),
        busy_us: info.field(BUSY).map_or(0, u64::from_ne_bytes),
        limited_us: info.field(WINDOW_LIMITED).map_or(0, u64::from_ne_bytes),
        begun: 0,
    })
}

/// Statistics of a socket; 0 for values that an old kernel lacks.
pub fn describe(fd: i32) -> Option<ucclCommInfo> {
    let info = Info::read(fd)?;
    let number = |at| info.field(at).map_or(0, u32::from_ne_bytes);
    let mut congestion: [c_char; 16] = [0; 16];
    let mut len = (congestion.len() - 1) as libc::socklen_t;
    // SAFETY: a buffer and its length; its last byte stays 0. On failure the name stays empty.
    unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, congestion.as_mut_ptr().cast(), &mut len) };
    Some(ucclCommInfo {
        size: size_of::<ucclCommInfo>(),
        segments: number(SEGMENTS).into(),
        retransmits: number(RETRANSMITS).into(),
        rtt_us: number(RTT),
        min_rtt_us: Some(number(MIN_RTT)).filter(|&us| us < u32::MAX).unwrap_or(0),
        delivery_rate: info.field(DELIVERY_RATE).map_or(0, u64::from_ne_bytes),
        congestion,
    })
}

/// Turns on TCP keepalive: the first probe after `idle`, then three more. Zero leaves it off.
pub fn keep_alive(socket: &Socket, idle: Duration) -> io::Result<()> {
    if idle.is_zero() {
        return Ok(());
    }
    let interval = (idle / 3).max(Duration::from_secs(1));
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(3))
}

/// Bounds how long sent bytes may stay unacknowledged. Zero keeps the system's default.
pub fn limit_silence(socket: &Socket, limit: Duration) -> io::Result<()> {
    if limit.is_zero() {
        return Ok(());
    }
    socket.set_tcp_user_timeout(Some(limit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_connection_that_was_busy_for_a_moment_is_timed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut there, _) = listener.accept().unwrap();
        here.write_all(&[7; 1000]).unwrap();
        there.read_exact(&mut [0; 1000]).unwrap();
        let flow = flow(here.as_raw_fd()).unwrap();
        assert!(flow.acknowledged >= 1000 && (1000..=10_000).contains(&flow.tick_us), "{flow:?}");
    }
}
