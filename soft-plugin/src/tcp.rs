//! TCP socket statistics from the kernel, and the options of data sockets that `socket2` lacks.

use std::ffi::c_char;
use std::io;
use std::time::Duration;

use nccl_net_abi::{ucclCommInfo, ucclFlow};
use process::TcpInfo;
use socket2::{Socket, TcpKeepalive};

/// Bytes of the stream that the peer's kernel has acknowledged; 0 where the kernel, or an emulation of it, says less about sockets.
pub fn bytes_acked(fd: i32) -> Option<u64> {
    Some(TcpInfo::of(fd)?.acknowledged().unwrap_or(0))
}

/// The smallest round trip seen, microseconds.
pub fn min_rtt(fd: i32) -> Option<u32> {
    TcpInfo::of(fd)?.min_rtt()
}

/// Bytes a second that the peer acknowledged recently.
pub fn delivery_rate(fd: i32) -> Option<u64> {
    TcpInfo::of(fd)?.delivery_rate()
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
    let info = TcpInfo::of(fd)?;
    let micros = |time: Option<Duration>| time.map_or(0, |time| time.as_micros() as u64);
    let mut waiting: libc::c_int = 0;
    // SAFETY: a socket and an int.
    let known = unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut waiting) };
    Some(ucclFlow {
        size: size_of::<ucclFlow>(),
        acknowledged: info.acknowledged().unwrap_or(0),
        waiting: if known == 0 { waiting.max(0) as u64 } else { 0 },
        min_rtt_us: info.min_rtt().unwrap_or(0),
        stale: 0,
        unanswered: info.unanswered(),
        retries: info.retries().into(),
        packet: info.packet(),
        tick_us: info.window_limited().map_or(0, |_| tick_us()),
        busy_us: micros(info.busy()),
        limited_us: micros(info.window_limited()),
        begun: 0,
    })
}

/// Statistics of a socket; 0 for values that an old kernel lacks.
pub fn describe(fd: i32) -> Option<ucclCommInfo> {
    let info = TcpInfo::of(fd)?;
    let mut congestion: [c_char; 16] = [0; 16];
    let mut len = (congestion.len() - 1) as libc::socklen_t;
    // SAFETY: a buffer and its length; its last byte stays 0. On failure the name stays empty.
    unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, congestion.as_mut_ptr().cast(), &mut len) };
    Some(ucclCommInfo {
        size: size_of::<ucclCommInfo>(),
        segments: info.segments().into(),
        retransmits: info.retransmits().into(),
        rtt_us: info.rtt(),
        min_rtt_us: info.min_rtt().unwrap_or(0),
        delivery_rate: info.delivery_rate().unwrap_or(0),
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
