//! Which congestion control a data socket uses. By default it depends on the path: on a short one cubic instead of bbr, whose pacing
//! (done by TCP itself without an fq queue) costs most of the rate there; on a long one bbr instead of cubic and reno, which read every
//! lost packet as congestion. Any other choice of the administrator (dctcp, say) stays.

use std::io;
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, Socket, Type};

use crate::config::Config;
use crate::tcp::min_rtt;

/// Paths with a shorter round trip are on one host or in one data centre.
const SHORT_PATH_US: u32 = 1000;
/// The path is judged after this many bytes: the first round trip alone may be long because a core was busy.
const JUDGED_AFTER: usize = 256 << 10;

/// The default rule on one socket, until it has decided.
#[derive(Debug, Default)]
pub struct Rule {
    /// Bytes still to send before it decides; none once it has, or when the user chose.
    wait: Option<usize>,
}

impl Rule {
    /// The rule of a new socket.
    pub fn new(config: &Config) -> Rule {
        Rule { wait: config.congestion.is_none().then_some(JUDGED_AFTER) }
    }

    /// `sent` more bytes were sent: decides once.
    pub fn sent(&mut self, fd: i32, sent: usize) {
        let Some(wait) = self.wait else { return };
        self.wait = wait.checked_sub(sent).filter(|&left| left > 0);
        if self.wait.is_none() && min_rtt(fd).is_some_and(|us| us >= SHORT_PATH_US) && uses(fd, &["cubic", "reno"]) {
            // Where bbr is missing or not permitted, the socket keeps its congestion control.
            let _ = set(fd, "bbr");
        }
    }
}

/// Configures a socket before it connects. Every path counts as short at first, because pacing stays on after bbr was set once.
pub fn prepare(fd: i32, config: &Config) -> io::Result<()> {
    match config.congestion.as_deref() {
        Some("system") => Ok(()),
        Some(name) => set(fd, name).map_err(|e| io::Error::new(e.kind(), format!("congestion control {name}: {e}"))),
        None => {
            if uses(fd, &["bbr"]) {
                // A system without cubic keeps bbr.
                let _ = set(fd, "cubic");
            }
            Ok(())
        }
    }
}

/// Whether this system offers the configured choice.
pub fn check(config: &Config) -> io::Result<()> {
    if config.congestion.is_none() {
        return Ok(());
    }
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP));
    prepare(socket.or_else(|_| Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)))?.as_raw_fd(), config)
}

fn set(fd: i32, name: &str) -> io::Result<()> {
    // SAFETY: a buffer and its length.
    match unsafe {
        libc::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.as_ptr().cast(), name.len() as libc::socklen_t)
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the socket's congestion control is one of these.
fn uses(fd: i32, names: &[&str]) -> bool {
    let mut name = [0u8; 16];
    let mut len = name.len() as libc::socklen_t;
    // SAFETY: a buffer and its length.
    let known = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.as_mut_ptr().cast(), &mut len) };
    let name = name.split(|&b| b == 0).next().unwrap_or_default();
    known == 0 && names.iter().any(|n| n.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_short_path_keeps_cubic() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut b = listener.accept().unwrap().0;
        let fd = a.as_raw_fd();
        let config = Config { congestion: None, ..Config::from_env().unwrap() };
        prepare(fd, &config).unwrap();
        assert!(!uses(fd, &["bbr"]));
        let mut rule = Rule::new(&config);
        for _ in 0..64 {
            a.write_all(&[1; 8192]).unwrap();
            b.read_exact(&mut [0; 8192]).unwrap();
            rule.sent(fd, 8192);
        }
        assert!(rule.wait.is_none() && !uses(fd, &["bbr"]));
        assert!(min_rtt(fd).is_some_and(|us| us < 100_000), "{:?}", min_rtt(fd));
    }

    #[test]
    fn an_unknown_name_is_refused_with_its_name() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = Config { congestion: Some("nonsense".to_owned()), ..Config::from_env().unwrap() };
        assert!(prepare(listener.as_raw_fd(), &config).unwrap_err().to_string().contains("nonsense"));
        assert!(check(&config).unwrap_err().to_string().contains("nonsense"));
        assert!(Rule::new(&config).wait.is_none());
    }
}
