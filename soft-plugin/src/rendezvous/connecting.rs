//! Pending connects: their limit, the table that polls find them in, and when they are abandoned.
//! They are kept here rather than in the handle, whose bytes came over the network; the handle holds only their number.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use process::{Mutex, PerProcess};
use socket2::Socket;

use super::{descriptors, invalid, new_socket, own_address, random, take_key, tune, word};
use super::{Connected, Direction, Failed, Handle, Hello, Invitation, Proving, STATE_AT};
use crate::config::Config;
use crate::devmem::Area;
use crate::interfaces::Interface;
use crate::pool::Pool;

/// A connect that was not polled for this long is abandoned; the listener does the same.
const IDLE: Duration = Duration::from_secs(10);
/// How often to look for idle connects.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// The limit when there are too many.
const IDLE_WHEN_FULL: Duration = Duration::from_secs(1);

/// A pending connect.
struct Connecting {
    invitation: Invitation,
    direction: Direction,
    /// Its connections: the comm's own, and one for payload with its area.
    dials: Vec<Dial>,
    area: Option<Arc<Area>>,
    /// All are connected, and the one for payload is being proved.
    proving: Option<Proving>,
    asked: Instant,
}

/// One connection.
struct Dial {
    socket: Socket,
    target: SocketAddr,
    hello: Hello,
    connected: bool,
    said: usize,
}

#[derive(Default)]
struct Table {
    all: HashMap<u64, Connecting>,
    /// When to look for idle ones; none while no sweep is scheduled.
    due: Option<Instant>,
}

impl Table {
    fn drop_idle(&mut self, idle: Duration) {
        self.all.retain(|_, c| c.asked.elapsed() < idle);
    }

    fn sweep(&mut self, now: Instant) -> Option<Duration> {
        let due = self.due?;
        if now >= due {
            self.drop_idle(IDLE);
            self.due = (!self.all.is_empty()).then_some(now + SWEEP_EVERY);
        }
        Some(self.due?.saturating_duration_since(now))
    }

    /// True when the caller must schedule a sweep.
    fn insert(&mut self, key: u64, attempt: Connecting) -> bool {
        self.all.insert(key, attempt);
        self.due.is_none() && self.due.replace(Instant::now() + SWEEP_EVERY).is_none()
    }

    /// Makes room for one more; connects use at most half of the process's descriptors.
    fn make_room(&mut self, most: usize) -> io::Result<()> {
        if self.all.len() >= most {
            self.drop_idle(IDLE_WHEN_FULL);
        }
        if self.all.len() >= most {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Ok(())
    }
}

fn table() -> &'static Mutex<Table> {
    static TABLE: PerProcess<Mutex<Table>> = PerProcess::new(Mutex::default);
    TABLE.get()
}

/// Abandons idle connects; returns when to look again, if any are left.
pub fn sweep() -> Option<Duration> {
    table().lock().sweep(Instant::now())
}

/// Abandons the pending connect with this handle, if any. The handle cannot be used afterwards.
pub fn abandon(handle: &Handle) {
    let key = word(handle, STATE_AT);
    let given_up = table().lock().all.remove(&key);
    drop(given_up);
}

/// One step of a connect: `None` means call again with the same buffer. After an error the buffer cannot be used.
pub fn connect(
    device: &Interface,
    config: &Config,
    pool: &Pool,
    handle: &mut Handle,
    direction: Direction,
    area: Option<&Arc<Area>>,
) -> Result<Option<Connected>, Failed> {
    let key = word(handle, STATE_AT);
    if key == 0 {
        if start(device, config, handle, direction, area)? {
            pool.remind();
        }
        // Like TCPX, the first call never finishes: this exercises the caller's polling on the fastest network too.
        return Ok(None);
    }
    let known = table().lock().all.remove(&key).filter(|attempt| attempt.direction == direction);
    let nothing = || invalid("the handle's connect has failed, is finished, was abandoned, or was never started here");
    let mut attempt = known.ok_or_else(|| Failed::new("connect", nothing()))?;
    let (peer, nic) = (attempt.invitation.address, device.name.to_string_lossy());
    if let Some(connected) = attempt.step(&nic).map_err(|e| Failed::new(format!("connect to {peer} on {nic}"), e))? {
        return Ok(Some(connected));
    }
    attempt.asked = Instant::now();
    if table().lock().insert(key, attempt) {
        pool.remind();
    }
    Ok(None)
}

/// Begins; true when the caller must schedule a sweep.
fn start(
    device: &Interface,
    config: &Config,
    handle: &mut Handle,
    direction: Direction,
    area: Option<&Arc<Area>>,
) -> Result<bool, Failed> {
    let invitation = Invitation::read(handle).map_err(|e| Failed::new("connect", e))?;
    let what = format!("connect to {} on {}", invitation.address, device.name.to_string_lossy());
    let secret = take_key(handle).map_err(|e| Failed::new(&what, e))?;
    let attempt = || -> io::Result<(u64, bool)> {
        let [a, b, c, d, e, f, g, h, ..] = random()?;
        let key = u64::from_le_bytes([a, b, c, d, e, f, g, h]) | 1;
        let most = (descriptors() / 2).max(16);
        table().lock().make_room(most)?;
        let dial = |lane| {
            let hello = invitation.hello(lane, secret.as_deref())?;
            dial(device, config, invitation.address, hello, lane.payload && direction == Direction::Back)
        };
        let dials = direction.lanes(area.is_some()).map(dial).collect::<io::Result<_>>()?;
        let attempt = Connecting {
            invitation: invitation.clone(),
            direction,
            dials,
            area: area.cloned(),
            proving: None,
            asked: Instant::now(),
        };
        Ok((key, table().lock().insert(key, attempt)))
    };
    let (key, first) = attempt().map_err(|e| Failed::new(what, e))?;
    handle[STATE_AT..STATE_AT + 8].copy_from_slice(&key.to_le_bytes());
    Ok(first)
}

fn dial(device: &Interface, config: &Config, target: SocketAddr, hello: Hello, bounded: bool) -> io::Result<Dial> {
    let socket = new_socket(&target)?;
    tune(&socket, config, bounded)?;
    socket.set_tcp_nodelay(true)?;
    if device.reaches(target.ip()) {
        crate::interfaces::check_link(device, socket.as_fd())?;
        bind_source(&socket, device)?;
    }
    match socket.connect(&target.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    Ok(Dial { socket, target, hello, connected: false, said: 0 })
}

/// Binds the socket to the device. The port is chosen only at the connect, so that ports do not run out.
fn bind_source(socket: &Socket, device: &Interface) -> io::Result<()> {
    let one: libc::c_int = 1;
    // SAFETY: an int of that size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const one).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set < 0 {
        crate::logger::info("IP_BIND_ADDRESS_NO_PORT is not available; each connect reserves a port");
    }
    socket.bind(&own_address(device).into())
}

impl Connecting {
    /// The comm's connections, once they are there.
    fn step(&mut self, nic: &str) -> io::Result<Option<Connected>> {
        if let Some(proving) = self.proving.take() {
            return Ok(proving.step()?.map_or_else(
                |proving| {
                    self.proving = Some(proving);
                    None
                },
                Some,
            ));
        }
        let mut all = true;
        for dial in &mut self.dials {
            all &= dial.step()?;
        }
        if !all {
            return Ok(None);
        }
        let mut sockets = std::mem::take(&mut self.dials).into_iter().map(|dial| dial.socket);
        let Some(socket) = sockets.next() else { return Err(ErrorKind::InvalidInput.into()) };
        let connected = Connected::new(socket, self.invitation.address, nic);
        let (Some(payload), Some(area)) = (sockets.next(), &self.area) else { return Ok(Some(connected)) };
        let receives = self.direction == Direction::Back;
        self.proving = Some(Proving::begin(area, receives, connected, payload, &self.invitation, self.direction)?);
        Ok(None)
    }
}

impl Dial {
    /// True when the socket is connected and the hello is in the kernel.
    fn step(&mut self) -> io::Result<bool> {
        if !self.connected {
            let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
            // SAFETY: one entry.
            if unsafe { libc::poll(&mut poll, 1, 0) } <= 0 {
                return Ok(false);
            }
            if let Some(error) = self.socket.take_error()? {
                return Err(error);
            }
            // TCP can connect an ephemeral port to itself when no socket listens there.
            if self.socket.local_addr()?.as_socket() == Some(self.target) {
                return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
            }
            self.connected = true;
        }
        let hello = self.hello.bytes();
        while self.said < hello.len() {
            match self.socket.send_with_flags(&hello[self.said..], libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) {
                Ok(sent) => self.said += sent,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(age: Duration) -> Connecting {
        let invitation = Invitation { address: "127.0.0.1:9".parse().unwrap(), cookie: [0; 16] };
        let asked = Instant::now() - age;
        Connecting { invitation, direction: Direction::Forth, dials: Vec::new(), area: None, proving: None, asked }
    }

    #[test]
    fn idle_connects_make_room() {
        let mut table = Table::default();
        table.all.insert(1, attempt(Duration::ZERO));
        table.all.insert(3, attempt(Duration::from_secs(2)));
        table.make_room(3).unwrap();
        assert_eq!(table.all.len(), 2, "there is room");
        table.make_room(2).unwrap();
        assert_eq!(table.all.keys().collect::<Vec<_>>(), [&1]);
        assert_eq!(table.make_room(1).unwrap_err().raw_os_error(), Some(libc::EMFILE), "the one that is polled stays");
    }

    #[test]
    fn sweeping_continues_while_connects_are_left() {
        let mut table = Table::default();
        let start = Instant::now();
        assert_eq!(table.sweep(start), None);
        assert!(table.insert(1, attempt(IDLE)), "the first one schedules a sweep");
        assert!(!table.insert(3, attempt(Duration::ZERO)));
        assert!(table.sweep(start).is_some_and(|wait| wait <= SWEEP_EVERY + Duration::from_secs(1)) && table.all.len() == 2);
        let later = start + 2 * SWEEP_EVERY;
        assert_eq!(table.sweep(later), Some(SWEEP_EVERY));
        assert_eq!(table.all.keys().collect::<Vec<_>>(), [&3]);
        table.all.clear();
        assert_eq!(table.sweep(later + SWEEP_EVERY), None);
        assert!(table.insert(5, attempt(Duration::ZERO)), "and so does the first one after a pause");
    }
}
