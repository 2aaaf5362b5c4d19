//! Listening, connecting and accepting. The plugin's own threads wait, and keep using the listen comm and the
//! handle; connect keeps a pointer in the handle. Checks here what TCPX would trust.

use crate::rules::{counters, lock, settings, up, violation};
use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Data sockets of a comm, and threads that serve them.
pub(crate) const SOCKETS: usize = 2;
const THREADS: u32 = 1;
/// Offset of numbers that TCPX does not use, -1 each.
const UNUSED_AT: usize = 28;
const SOCKETS_AT: usize = 36;
const THREADS_AT: usize = 40;
/// Offsets of the flag for a separate control interface, and of the control address.
const REDIRECT_AT: usize = 44;
const CONTROL_AT: usize = 48;
/// Offset at which connect keeps its pointer.
const STATE_AT: usize = 80;

type Handle = [u8; NCCL_NET_HANDLE_MAXSIZE];

/// The sockets of a comm.
pub(crate) struct Sockets {
    pub control: TcpStream,
    pub data: Vec<TcpStream>,
}

/// The result that a set-up thread leaves for the poller.
type Outcome = Arc<Mutex<Option<Result<Sockets, String>>>>;

pub(crate) struct ListenComm {
    pub dev: usize,
    listeners: Arc<Listeners>,
    outcome: Option<Outcome>,
    accepted: bool,
}

/// The listening sockets: a peer connects its control socket first, then the data sockets.
struct Listeners {
    control: TcpListener,
    data: TcpListener,
}

/// Pending connects, by the value in the handle.
struct Connect {
    outcome: Outcome,
    buffer: usize,
}
static CONNECTS: Mutex<Option<HashMap<u64, Connect>>> = Mutex::new(None);

fn put(handle: &mut Handle, at: usize, bytes: &[u8]) {
    handle[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Bytes of a socket address; IPv4 uses the first eight.
const ADDRESS: usize = 28;

/// Uninitialised stack bytes in the addresses of TCPX's interfaces: different in every process.
fn litter() -> &'static [u8; ADDRESS] {
    static LITTER: OnceLock<[u8; ADDRESS]> = OnceLock::new();
    LITTER.get_or_init(|| {
        let mut bytes = [0; ADDRESS];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&RandomState::new().hash_one(0).to_ne_bytes()[..chunk.len()]);
        }
        bytes
    })
}

fn put_address(handle: &mut Handle, at: usize, address: Ipv4Addr, port: u16) {
    put(handle, at, litter());
    put(handle, at, &(libc::AF_INET as u16).to_ne_bytes());
    put(handle, at + 2, &port.to_be_bytes());
    put(handle, at + 4, &address.octets());
}

impl ListenComm {
    pub(crate) fn new(dev: usize, handle: &mut Handle) -> Option<ListenComm> {
        let device = settings().devices.get(dev)?;
        if counters().listens.load(Ordering::Acquire) >= settings().listens {
            return None;
        }
        let listener = || TcpListener::bind((device.address, 0)).ok();
        let listeners = Listeners { control: listener()?, data: listener()? };
        handle.fill(0);
        put_address(handle, 0, device.address, listeners.data.local_addr().ok()?.port());
        put(handle, UNUSED_AT, &[0xFF; 8]);
        put_address(handle, CONTROL_AT, device.address, listeners.control.local_addr().ok()?.port());
        put(handle, SOCKETS_AT, &(SOCKETS as u32).to_ne_bytes());
        put(handle, THREADS_AT, &THREADS.to_ne_bytes());
        up(&counters().listens, None, 1);
        Some(ListenComm { dev, listeners: Arc::new(listeners), outcome: None, accepted: false })
    }

    /// One step of the accept: the sockets, once the peer has connected.
    pub(crate) fn accept(&mut self) -> Result<Option<Sockets>, String> {
        if self.accepted {
            violation!("a listen comm accepts once; this one was polled again");
        }
        let Some(outcome) = &self.outcome else {
            let outcome = Outcome::default();
            self.outcome = Some(outcome.clone());
            up(&counters().accepts_begun, None, 1);
            let (listeners, dead) = (self.listeners.clone(), settings().devices[self.dev].dead);
            std::thread::spawn(move || {
                // These threads write to sockets too, with the signal mask of the calling thread.
                crate::rules::raise_sigpipe();
                std::thread::sleep(settings().accept_time);
                if !dead {
                    let sockets = gather(&listeners);
                    let ruled = crate::manager::answer_or_spin("rule").map_err(|fault| format!("no flow rule: {fault}"));
                    *lock(&outcome) = Some(ruled.and(sockets));
                }
            });
            return Ok(None);
        };
        let Some(result) = lock(outcome).take() else { return Ok(None) };
        self.accepted = true;
        up(&counters().accepts_ended, None, 1);
        result.map(Some)
    }

    /// Checks that it may be closed.
    pub(crate) fn check_close(&self) {
        if self.outcome.is_some() && !self.accepted {
            violation!("closeListen while an accept is pending: its thread uses the listen comm");
        }
    }
}

/// Accepts the connections of one peer: the control socket, then the data sockets. As with TCPX, they stay open if that fails.
fn gather(listeners: &Listeners) -> Result<Sockets, String> {
    let mut all: Vec<Option<TcpStream>> = (0..=SOCKETS).map(|_| None).collect();
    gather_all(listeners, &mut all).inspect_err(|_| std::mem::forget(std::mem::take(&mut all)))?;
    finish(all.into_iter().flatten().collect())
}

fn gather_all(listeners: &Listeners, all: &mut [Option<TcpStream>]) -> Result<(), String> {
    let port = |listener: &TcpListener| listener.local_addr().map(|address| address.port()).map_err(|e| e.to_string());
    let ports = [port(&listeners.data)?, port(&listeners.control)?];
    while all.iter().any(Option::is_none) {
        let listener = if all[0].is_none() { &listeners.control } else { &listeners.data };
        let (mut stream, _) = listener.accept().map_err(|e| e.to_string())?;
        let greeting = match Greeting::receive(&mut stream) {
            Ok(greeting) => greeting,
            Err(e) => {
                std::mem::forget(stream);
                return Err(e);
            }
        };
        if let Some(place) = all.get_mut(greeting.socket).filter(|_| greeting.ports == ports) {
            *place = Some(stream);
        }
    }
    Ok(())
}

const MAGIC: u16 = 0x5258;

/// What a dial of a simulated plugin says first: a constant, which socket it is, and the ports of the listen comm. A dial is repeated while its
/// peer does not listen, so it can reach a listen comm that was given the port since. That one knows it by the ports.
pub(crate) struct Greeting {
    pub socket: usize,
    pub ports: [u16; 2],
}

impl Greeting {
    pub(crate) fn send(&self, stream: &mut TcpStream) -> Result<(), String> {
        let mut bytes = [0; 8];
        for (place, number) in bytes.chunks_mut(2).zip([MAGIC, self.socket as u16, self.ports[0], self.ports[1]]) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        stream.write_all(&bytes).map_err(|e| e.to_string())
    }

    pub(crate) fn receive(stream: &mut TcpStream) -> Result<Greeting, String> {
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes).map_err(|_| "the peer disconnected during the accept")?;
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        match number(0) {
            MAGIC => Ok(Greeting { socket: usize::from(number(2)), ports: [number(4), number(6)] }),
            _ => Err("not a peer of this plugin".to_owned()),
        }
    }
}

fn finish(mut all: Vec<TcpStream>) -> Result<Sockets, String> {
    for stream in &all {
        stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).map_err(|e| e.to_string())?;
    }
    let control = all.remove(0);
    if settings().late {
        all.iter().try_for_each(crate::late::allow).map_err(|e| e.to_string())?;
    }
    Ok(Sockets { control, data: all })
}

/// One step of a connect.
pub(crate) fn connect(dev: usize, handle: &mut Handle) -> Result<Option<Sockets>, String> {
    let buffer = handle.as_ptr() as usize;
    let word = |h: &Handle, at: usize| h[at..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
    let state = word(handle, STATE_AT);
    let mut connects = lock(&CONNECTS);
    let connects = connects.get_or_insert_default();
    if state == 0 {
        let target = check_fresh(handle);
        let outcome = Outcome::default();
        let key = Arc::as_ptr(&outcome) as u64;
        put(handle, STATE_AT, &key.to_ne_bytes());
        up(&counters().connects_begun, None, 1);
        connects.insert(key, Connect { outcome: outcome.clone(), buffer });
        let (from, dead) = settings().devices.get(dev).map_or((Ipv4Addr::LOCALHOST, true), |d| (d.address, d.dead));
        std::thread::spawn(move || {
            crate::rules::raise_sigpipe();
            std::thread::sleep(settings().connect_time);
            if !dead {
                let result = dial(from, target);
                *lock(&outcome) = Some(result);
            }
        });
        return Ok(None);
    }
    let Some(known) = connects.get(&state) else {
        violation!("connect finds the pointer {state:#x} in the handle, which it never put there (or which has ended)");
    };
    if known.buffer != buffer {
        violation!("the handle of a connect was moved from {:#x} to {buffer:#x}", known.buffer);
    }
    let Some(result) = lock(&known.outcome).take() else { return Ok(None) };
    connects.remove(&state);
    up(&counters().connects_ended, None, 1);
    result.map(Some)
}

/// The addresses of a fresh handle of this plugin; ends the process for any other bytes.
fn check_fresh(handle: &Handle) -> [SocketAddr; 2] {
    let u32_at = |at: usize| handle[at..].first_chunk().map_or(0, |b| u32::from_ne_bytes(*b));
    let inet = |at: usize| i32::from(u16::from_ne_bytes([handle[at], handle[at + 1]])) == libc::AF_INET;
    let empty = |range: std::ops::Range<usize>| handle[range].iter().all(|&b| b == 0);
    let fresh = inet(0)
        && u32_at(SOCKETS_AT) == SOCKETS as u32
        && u32_at(THREADS_AT) == THREADS
        && empty(REDIRECT_AT..CONTROL_AT)
        && inet(CONTROL_AT)
        && empty(CONTROL_AT + ADDRESS..NCCL_NET_HANDLE_MAXSIZE);
    if !fresh {
        violation!("bytes that are no fresh handle reached connect: {handle:02x?}");
    }
    [0, CONTROL_AT].map(|at| {
        let ip: [u8; 4] = handle[at + 4..].first_chunk().copied().unwrap_or_default();
        SocketAddrV4::new(ip.into(), u16::from_be_bytes([handle[at + 2], handle[at + 3]])).into()
    })
}

/// Connects all sockets. The peer may be slow to listen, so a refused connect is retried for a while, as TCPX does.
fn dial(_from: Ipv4Addr, [data, control]: [SocketAddr; 2]) -> Result<Sockets, String> {
    let until = Instant::now() + Duration::from_secs(2);
    let mut all = Vec::new();
    while all.len() <= SOCKETS {
        match TcpStream::connect(if all.is_empty() { control } else { data }) {
            Ok(mut stream) => {
                Greeting { socket: all.len(), ports: [data.port(), control.port()] }.send(&mut stream)?;
                all.push(stream);
            }
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(e.to_string()),
        }
    }
    finish(all)
}
