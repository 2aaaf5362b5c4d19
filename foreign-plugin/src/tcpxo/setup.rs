//! Listening, connecting and accepting: nothing waits, and nothing runs between the calls but the dialling of sockets. Connect keeps
//! its state and a pointer in the handle, and follows the pointer in any state but that of a new handle.

use crate::gpu::Gpu;
use crate::rules::{counters, lock, settings, up, violation, Device};
use crate::setup::Greeting;
use nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Flows of a comm, each a connection.
pub(super) const FLOWS: usize = 2;

const VERSION: u8 = 1;
/// The number of the GPU whose NIC listens.
const INDEX: usize = 1;
const ADDRESS: std::ops::Range<usize> = 32..72;
const PORTS: usize = 72;
const STATE: usize = 88;
const POINTER: usize = 96;
/// States of a handle.
const NEW: u8 = 0;
const CONNECTING: u8 = 1;
const DONE: u8 = 3;

type Handle = [u8; NCCL_NET_HANDLE_MAXSIZE];
type Outcome = Arc<Mutex<Option<Result<Vec<TcpStream>, String>>>>;

pub(super) struct ListenComm {
    pub dev: usize,
    pub gpu: Option<&'static Gpu>,
    listeners: Vec<TcpListener>,
    ports: [u16; FLOWS],
    flows: Vec<Option<TcpStream>>,
    begun: Option<Instant>,
    accepted: bool,
}

impl ListenComm {
    pub(super) fn new(dev: usize, gpu: Option<&'static Gpu>, handle: &mut Handle) -> Option<ListenComm> {
        let device = settings().devices.get(dev)?;
        if counters().listens.load(Ordering::Acquire) >= settings().listens {
            return None;
        }
        let listener = |_| TcpListener::bind((device.address, 0)).and_then(|l| l.set_nonblocking(true).map(|()| l)).ok();
        let listeners: Vec<TcpListener> = (0..FLOWS).map(listener).collect::<Option<_>>()?;
        // The plugin's structure lies on the stack: what it does not write to is litter.
        handle[..POINTER].fill(std::process::id() as u8 | 1);
        handle[POINTER..].fill(0);
        (handle[0], handle[INDEX], handle[STATE]) = (VERSION, rail(device), NEW);
        let text = device.address.to_string();
        handle[ADDRESS][..text.len()].copy_from_slice(text.as_bytes());
        handle[ADDRESS.start + text.len()] = 0;
        for (flow, listener) in listeners.iter().enumerate() {
            let at = PORTS + 2 * flow;
            handle[at..at + 2].copy_from_slice(&listener.local_addr().ok()?.port().to_ne_bytes());
        }
        up(&counters().listens, None, 1);
        let flows = (0..FLOWS).map(|_| None).collect();
        Some(ListenComm { dev, gpu, listeners, ports: ports(handle), flows, begun: None, accepted: false })
    }

    /// One step of the accept: the flows, once the peer has connected them.
    pub(super) fn accept(&mut self) -> Result<Option<Vec<TcpStream>>, String> {
        if self.accepted {
            violation!("a listen comm accepts once; this one was polled again");
        }
        if self.begun.is_none() {
            up(&counters().accepts_begun, None, 1);
        }
        let begun = *self.begun.get_or_insert_with(Instant::now);
        if settings().devices[self.dev].dead || begun.elapsed() < settings().accept_time {
            return Ok(None);
        }
        let step = self.step();
        if !matches!(step, Ok(None)) {
            self.accepted = true;
            up(&counters().accepts_ended, None, 1);
        }
        step
    }

    fn step(&mut self) -> Result<Option<Vec<TcpStream>>, String> {
        for (flow, place) in self.flows.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
            let mut stream = match self.listeners[flow].accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e.to_string()),
            };
            // The peer sends it at once.
            stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_read_timeout(Some(Duration::from_secs(1))))
                .map_err(|e| e.to_string())?;
            let greeting = Greeting::receive(&mut stream)?;
            if greeting.socket != flow || greeting.ports != self.ports {
                return Ok(None);
            }
            *place = Some(ready(stream)?);
        }
        Ok(Some(self.flows.iter_mut().filter_map(Option::take).collect()))
    }

    pub(super) fn is_pending(&self) -> bool {
        self.begun.is_some() && !self.accepted
    }
}

fn ready(stream: TcpStream) -> Result<TcpStream, String> {
    stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).map_err(|e| e.to_string())?;
    Ok(stream)
}

/// The rail of a NIC: the number at the end of its name.
fn rail(device: &Device) -> u8 {
    let name = device.name.to_str().unwrap_or_default();
    name[name.trim_end_matches(|c: char| c.is_ascii_digit()).len()..].parse().unwrap_or(0)
}

/// A pending connect, and the GPU that was current at its first call.
struct Connect {
    outcome: Outcome,
    gpu: Option<&'static Gpu>,
}

/// Pending connects, by the pointer in the handle.
static CONNECTS: Mutex<Option<HashMap<u64, Connect>>> = Mutex::new(None);

/// One step of a connect.
pub(super) fn connect(dev: usize, gpu: Option<&'static Gpu>, handle: &mut Handle) -> Result<Option<Vec<TcpStream>>, String> {
    if handle[0] != VERSION {
        return Err(format!("a handle of version {}", handle[0]));
    }
    let mut connects = lock(&CONNECTS);
    let connects = connects.get_or_insert_default();
    let pointer = handle[POINTER..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    match handle[STATE] {
        NEW => {
            let (ip, ports) = (address(handle).ok_or("the handle has no address")?, ports(handle));
            if let Some(device) = settings().devices.get(dev).filter(|device| rail(device) != handle[INDEX]) {
                violation!(
                    "connect on NIC {:?} with a handle of rail {}: rail alignment takes another NIC than the caller registers memory for",
                    device.name,
                    handle[INDEX]
                );
            }
            static NEXT: AtomicU64 = AtomicU64::new(1);
            let (pointer, outcome) = (NEXT.fetch_add(1, Ordering::Relaxed) << 12, Outcome::default());
            handle[STATE] = CONNECTING;
            handle[POINTER..POINTER + 8].copy_from_slice(&pointer.to_ne_bytes());
            up(&counters().connects_begun, None, 1);
            connects.insert(pointer, Connect { outcome: outcome.clone(), gpu });
            let dead = settings().devices.get(dev).is_none_or(|device| device.dead);
            std::thread::spawn(move || {
                std::thread::sleep(settings().connect_time);
                if !dead {
                    *lock(&outcome) = Some((0..FLOWS).map(|flow| dial(ip, ports, flow)).collect());
                }
            });
            Ok(None)
        }
        CONNECTING => {
            let Some(Connect { outcome, gpu }) = connects.get(&pointer) else {
                violation!("connect follows the pointer {pointer:#x} in the handle, which it never put there");
            };
            gpu.iter().for_each(|gpu| gpu.must_be_current("connect"));
            let Some(result) = lock(outcome).take() else { return Ok(None) };
            connects.remove(&pointer);
            handle[STATE] = DONE;
            up(&counters().connects_ended, None, 1);
            result.map(Some)
        }
        state => violation!("connect with a handle in state {state}"),
    }
}

fn address(handle: &Handle) -> Option<IpAddr> {
    std::ffi::CStr::from_bytes_until_nul(&handle[ADDRESS]).ok()?.to_str().ok()?.parse().ok()
}

fn ports(handle: &Handle) -> [u16; FLOWS] {
    std::array::from_fn(|flow| u16::from_ne_bytes([handle[PORTS + 2 * flow], handle[PORTS + 2 * flow + 1]]))
}

/// Connects one flow. The peer may be slow to listen.
fn dial(ip: IpAddr, ports: [u16; FLOWS], flow: usize) -> Result<TcpStream, String> {
    let until = Instant::now() + Duration::from_secs(2);
    loop {
        match TcpStream::connect((ip, ports[flow])) {
            Ok(mut stream) => {
                Greeting { socket: flow, ports }.send(&mut stream)?;
                return ready(stream);
            }
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(e.to_string()),
        }
    }
}
