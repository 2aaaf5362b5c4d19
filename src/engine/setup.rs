//! Setting up a connection, from either side: handshake, channels, and the connection that comes out.

use super::connection::{Connection, Peer};
use super::shared::Shared;
use super::state::{LaneSet, Setting, State};
use crate::channel::cuda::CudaDevice;
use crate::channel::device::{DeviceCopier, EmulatedDevice};
use crate::channel::set::Listening;
use crate::net::topology;
use crate::status::{bail, err, Error, Result};
use crate::wire::control::ControlStream;
use crate::wire::handshake::{self, Blocking, Hello};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// This side's hello.
pub(crate) fn hello(shared: &Shared, wanted_gpu: &str) -> Result<Hello> {
    let mut nonce = [0; 32];
    if let Err(e) = getrandom::fill(&mut nonce) {
        bail!(System, "random bytes for the handshake: {e}");
    }
    Ok(Hello {
        channels: channel_count(shared) as u16,
        chunk_bytes: shared.config.chunk_bytes as u32,
        gpu_index: shared.gpu.as_ref().map_or(-1, |g| g.ordinal),
        authenticated: shared.auth_key.is_some(),
        engine: shared.engine_id,
        nonce,
        plugin: shared.plugin.wire_name().to_owned(),
        gpu: shared.gpu_name(),
        wanted_gpu: wanted_gpu.to_owned(),
    })
}

/// Channels that this side asks for: as configured, else as many as help. A channel has an I/O thread's worth of work, so cores bound
/// the number: all of few, half of many; every NIC gets at least one.
pub(crate) fn channel_count(shared: &Shared) -> usize {
    let nics = shared.plugin.devices.len().max(1);
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    shared.config.num_channels.unwrap_or_else(|| cores.clamp(2, 8).max((cores / 2).min(16)).max(nics)).min(64)
}

/// Connects to a peer engine.
pub(crate) fn connect(shared: &Arc<Shared>, host: &str, gpu: &str, port: u16) -> Result<Arc<Connection>> {
    let deadline = Instant::now() + shared.config.connect_timeout;
    let addresses: Vec<SocketAddr> = match (host, port).to_socket_addrs() {
        Ok(found) => found.collect(),
        Err(e) => bail!(InvalidArgument, "{host}: {e}"),
    };
    let mut last = err!(Unreachable, "{host} has no address");
    for address in addresses {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(sock) => {
                let ours = hello(shared, gpu)?;
                let result = prepare(&sock).and_then(|()| {
                    let _guard = shared.begin_setup(&sock)?;
                    let io = Blocking { sock: &sock, deadline };
                    let theirs = handshake::connect(&io, &ours, shared.auth_key.as_deref())?;
                    establish(
                        shared,
                        sock.try_clone().map_err(|e| Error::system("control socket", &e))?,
                        deadline,
                        &ours,
                        &theirs,
                    )
                });
                return result.map_err(|e| Error::new(e.kind(), format_args!("connect to {address}: {e}")));
            }
            Err(e) if e.kind() == std::io::ErrorKind::TimedOut => {
                last = err!(TimedOut, "connect to {address}: no answer in time")
            }
            Err(e) => last = err!(Unreachable, "connect to {address}: {e}"),
        }
    }
    Err(last)
}

/// Serves an incoming connection whose hello has arrived.
pub(crate) fn accept(shared: &Arc<Shared>, sock: TcpStream, theirs: Result<Hello>) -> Result<Arc<Connection>> {
    let deadline = Instant::now() + shared.config.connect_timeout;
    prepare(&sock)?;
    let _guard = shared.begin_setup(&sock)?;
    let io = Blocking { sock: &sock, deadline };
    let ours = hello(shared, "")?;
    handshake::accept(&io, &theirs, &ours, shared.auth_key.as_deref())?;
    establish(shared, sock.try_clone().map_err(|e| Error::system("control socket", &e))?, deadline, &ours, &theirs?)
}

fn prepare(sock: &TcpStream) -> Result<()> {
    sock.set_nodelay(true).and_then(|()| sock.set_nonblocking(false)).map_err(|e| Error::system("control socket", &e))
}

/// The part that both sides do alike, after the handshake: exchange handles, bring up the channels, agree that they are up.
fn establish(shared: &Arc<Shared>, sock: TcpStream, deadline: Instant, ours: &Hello, theirs: &Hello) -> Result<Arc<Connection>> {
    let address = sock.peer_addr().map_err(|e| Error::system("control socket", &e))?;
    let peer_ip = match address.ip() {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 => v4,
    };
    let io = Blocking { sock: &sock, deadline };
    let n = usize::from(ours.channels.min(theirs.channels));
    let mut listening = Vec::new();
    for plugin in std::iter::once(&shared.plugin).chain(&shared.host_plugin) {
        let nics = topology::nearest(&plugin.devices, shared.gpu_pci_path().as_deref());
        listening.push(Listening::open(plugin, &nics, n, shared.gpu_of(plugin)?)?);
    }
    let handles: Vec<_> = listening.iter().flat_map(Listening::handles).collect();
    let peers = handshake::exchange_handles(&io, &handles)?;
    let alive = || !shared.closing.load(Ordering::Acquire);
    let mut sets = Vec::new();
    let mut outcome = Ok(());
    for (listening, peers) in listening.into_iter().zip(peers.chunks(n)) {
        match listening.establish(peers, deadline, &alive) {
            Ok(lanes) => sets.push(lanes),
            Err(e) => {
                outcome = Err(e);
                break;
            }
        }
    }
    handshake::exchange_ready(&io, outcome)?;
    let doorbell = shared.doorbell();
    let sets = sets
        .into_iter()
        .zip(std::iter::once(&shared.plugin).chain(&shared.host_plugin))
        .map(|(lanes, plugin)| {
            for lane in &lanes {
                lane.set_doorbell(&doorbell)?;
            }
            let vectored = plugin.is_soft() && shared.config.vectored;
            let host = plugin.is_soft();
            Ok(LaneSet { lanes, vectored, host, stage_sends: host && shared.config.stage_sends })
        })
        .collect::<Result<Vec<_>>>()?;
    let copier: Option<Box<dyn DeviceCopier>> = if shared.config.emulate_device {
        Some(Box::new(EmulatedDevice))
    } else if crate::gpu::available() {
        shared.warm_gpus()?;
        Some(Box::new(CudaDevice::default()))
    } else {
        None
    };
    let name = SocketAddr::new(peer_ip, address.port()).to_string();
    let config = &shared.config;
    let setting = Setting {
        registry: shared.registry.clone(),
        notifications: shared.notifications.clone(),
        chunk_bytes: ours.chunk_bytes.min(theirs.chunk_bytes) as usize,
        eager_bytes: config.eager_bytes,
        peer: name.clone(),
        transfer_timeout: config.transfer_timeout,
        peer_timeout: config.peer_timeout,
        match_timeout: config.match_timeout,
    };
    let clear = sock.set_read_timeout(None).and_then(|()| sock.set_write_timeout(None));
    clear.map_err(|e| Error::system("control socket", &e))?;
    let channels = n;
    let state = State::new(ControlStream::new(sock)?, sets, copier, setting);
    let peer_name = name.clone();
    let peer = Peer { ip: peer_ip, name, gpu_index: theirs.gpu_index, engine: theirs.engine };
    let connection = Arc::new(Connection::new(shared.connection_id(), shared.clone(), state, peer, channels, doorbell.armed));
    shared.adopt(&connection)?;
    log::info!("connected with {}: {channels} channels over {}, GPU {}", peer_name, shared.plugin.name, theirs.gpu);
    Ok(connection)
}

/// How often a set-up that is refused for lack of threads is tried again.
pub(crate) const RETRY: Duration = Duration::from_millis(10);
