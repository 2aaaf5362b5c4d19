//! Flow rules of data sockets, identified by the addresses of both ends: added when a socket is accepted, removed when its comm closes.
//! TCPX then asks the socket for its addresses again, only warns if it has no peer, and passes uninitialised stack memory to a CHECK.

use crate::rules::{counters, down, up, violation};
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{FromRawFd, RawFd};

/// The rule of a data socket: source and destination. None if it was reset before a rule was added.
type Rule = Option<(SocketAddr, SocketAddr)>;

/// The rules of a receive comm.
pub(crate) struct Rules(Vec<Rule>);

impl Rules {
    pub(crate) fn make(data: &[TcpStream]) -> Rules {
        let rules: Vec<Rule> = data.iter().map(|socket| Some((socket.peer_addr().ok()?, socket.local_addr().ok()?))).collect();
        up(&counters().flow_rules, None, rules.iter().flatten().count() as u64);
        Rules(rules)
    }

    /// Removes the rules with the sockets' current addresses. Others stay.
    pub(crate) fn take_back(&self, data: &[TcpStream]) {
        if let Err(fault) = crate::manager::answer_or_spin("close") {
            return crate::logger::warn(&format!("update flow steering rule: {fault}"), 0);
        }
        std::thread::sleep(crate::rules::settings().manager.close_time);
        for (socket, rule) in data.iter().zip(&self.0) {
            let peer = socket.peer_addr().unwrap_or_else(|e| violation!("closeRecv on a data socket that has no peer: {e}"));
            let here = socket.local_addr().unwrap_or_else(|e| violation!("closeRecv on a data socket without an address: {e}"));
            if *rule == Some((peer, here)) {
                down(&counters().flow_rules, 1);
            } else {
                crate::logger::warn("update flow steering rule: there is no such rule", 0);
            }
        }
    }
}

/// Resets every TCP connection of this process whose own and peer's address `which` selects, as `ss -K` does: for tests. Returns how many.
pub fn reset_connections(which: impl Fn(SocketAddr, SocketAddr) -> bool) -> usize {
    let numbers = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
    numbers.filter(|&fd| ends(fd).is_some_and(|(here, there)| which(here, there)) && reset(fd)).count()
}

fn ends(fd: RawFd) -> Option<(SocketAddr, SocketAddr)> {
    // SAFETY: only its addresses are read, and it is never closed here; other files give an error.
    let socket = ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) });
    socket.nodelay().ok()?;
    Some((socket.local_addr().ok()?, socket.peer_addr().ok()?))
}

fn reset(fd: RawFd) -> bool {
    // SAFETY: plain data for which zeros are valid.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    // SAFETY: an address and its size.
    unsafe { libc::connect(fd, &nowhere, size_of::<libc::sockaddr>() as libc::socklen_t) == 0 }
}
