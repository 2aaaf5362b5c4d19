//! From a finished set-up to a connection that the engine drives. Knows nothing about how set-ups run.

use super::channels::Raised;
use super::context::SetupContext;
use super::control::{Agreed, Sealed};
use super::lineage::{Lineage, Members, Seat as Member};
use super::local::Local;
use crate::addresses::plain;
use crate::channel::cuda::CudaDevice;
use crate::channel::device::EmulatedDevice;
use crate::channel::net::{DeviceMode, NetPath, Seat, Usage};
use crate::channel::path::{Copier, Path};
use crate::channel::router::Channels;
use crate::direct::Direct;
use crate::engine::connection::{ends, Connection, Core, Peer};
use crate::engine::setup::quota::Counted;
use crate::host::OneHost;
use crate::net::comm::Doorbell;
use crate::net::plugin_thread::limited;
use crate::net::setup::Pair;
use crate::notify::Inbox;
use crate::proto::{heartbeat, Machine, Setting};
use crate::status::Result;
use crate::types::Place;
use crate::wire::control::ControlStream;
use crate::wire::join::Ticket;
use crate::wire::keys::Proof;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The result of a set-up.
pub(crate) struct Up {
    pub sock: TcpStream,
    pub address: SocketAddr,
    /// Where the connector finds the listener later.
    pub addresses: Vec<SocketAddr>,
    pub agreed: Agreed,
    /// The control connection from here on.
    pub sealed: Sealed,
    /// Channels by set, ordered by number.
    pub sets: Vec<Raised>,
    /// The direct path, if the peer is on this host.
    pub local: Local,
}

/// The copier of GPU memory; none on a machine without a GPU.
fn copier(context: &SetupContext) -> Copier {
    if context.config.emulate_device {
        return Some(Box::new(EmulatedDevice { exports: context.plugins.device.traits.packs_sends }));
    }
    match crate::gpu::available() {
        true => Some(Box::new(CudaDevice::default())),
        false => None,
    }
}

/// The share of one of so many channels in the rate of a connection.
fn pace(context: &SetupContext, channels: usize) -> Option<u64> {
    context.config.peer_rate.map(|rate| (rate / channels.max(1) as u64).max(1))
}

/// A path over the channels of each set that has any, up or not.
fn paths(context: &SetupContext, sets: Vec<Raised>, chunk_bytes: usize, doorbell: &Doorbell) -> Result<Vec<Box<dyn Path>>> {
    let config = &context.config;
    let path = |set: Raised| -> Result<Box<dyn Path>> {
        let pace = pace(context, set.names.len());
        let mut seats: Vec<Seat> = set.names.into_iter().map(|(here, there)| Seat::Lost(here, there)).collect();
        for pair in set.pairs {
            pair.join(doorbell, pace)?;
            if let Some(seat) = seats.get_mut(pair.index) {
                *seat = Seat::Up(Box::new(pair));
            }
        }
        let traits = &set.plan.plugin.traits;
        let (vectored, device) = (traits.vectored && config.vectored, DeviceMode::of(traits, config.stage_sends));
        let alone = context.table.context.cores.alone();
        let usage = Usage { vectored, host: traits.host_memory, device, gpus: set.plan.gpus, chunk_bytes, alone };
        Ok(Box::new(NetPath::new(&set.plan.plugin.name, seats, usage)))
    };
    // A set without channels is skipped; another set carries its traffic.
    sets.into_iter().filter(|set| !set.names.is_empty()).map(path).collect()
}

/// One line: which channels carry what, and why others do not.
fn describe(sets: &[Raised]) -> String {
    let mut carried: Vec<String> = Vec::new();
    let mut missed: Vec<String> = Vec::new();
    for set in sets {
        let (plan, n) = (&set.plan, set.pairs.len());
        if n == 0 {
            missed.push(format!("{} (not over {}: {})", plan.purpose(), plan.plugin.name, set.why_not()));
            continue;
        }
        let named = |pair: &Pair| match pair.nic == pair.peer_nic {
            true => pair.nic.clone(),
            false => format!("{} ({} of the peer)", pair.nic, pair.peer_nic),
        };
        let mut nics: Vec<String> = set.pairs.iter().map(named).collect();
        nics.sort_unstable();
        nics.dedup();
        let purpose = match plan.gpus {
            Some(_) => plan.purpose(),
            None if sets.len() == 1 => "all memory".to_owned(),
            None => {
                missed.insert(0, "host memory".to_owned());
                missed.push("GPUs without registered memory at this time".to_owned());
                format!("all else: {}", std::mem::take(&mut missed).join(", "))
            }
        };
        carried.push(format!("{n} channels over {} on {} for {purpose}", plan.plugin.name, nics.join(", ")));
    }
    carried.append(&mut missed);
    carried.join("; ")
}

/// What the connection keeps of its set-up, and the channels that did not come up.
pub(crate) fn lineage(context: &SetupContext, up: &Up) -> Result<(Lineage, Vec<u16>)> {
    let pace = |set: &Raised| pace(context, set.names.len());
    let members = |set: &Raised| Members { plan: set.plan.clone(), nics: set.names.clone(), pace: pace(set) };
    let ticket = Ticket::new(&up.sealed.session)?;
    let lineage =
        Lineage::new(ticket, up.address, up.addresses.clone(), up.agreed.clone(), up.sets.iter().map(members).collect());
    let is_up = |seat: &Member| up.sets[seat.set].pairs.iter().any(|pair| pair.index == seat.index);
    let missing = lineage.seats().filter(|seat| !is_up(seat)).map(|seat| seat.channel).collect();
    Ok((lineage, missing))
}

/// Whether a control connection can be made again elsewhere: the listener has more addresses than the one that it uses.
fn movable(sock: &TcpStream, peer: SocketAddr, addresses: &[SocketAddr], connecting: bool) -> bool {
    let listener = match (connecting, sock.local_addr()) {
        (true, _) => peer.ip(),
        (false, Ok(here)) => plain(here.ip()),
        (false, Err(_)) => return false,
    };
    !listener.is_loopback() && addresses.iter().any(|address| address.ip() != listener)
}

/// This many connections of an engine allocate everything that chunks of GPU memory need from the start. A process with more
/// peers mostly talks to few of them: further connections allocate with the first chunk.
const READY: usize = 8;

/// An error here recurs with the first chunk, and is reported there.
fn log_unprepared(place: Place, result: Result<()>) {
    if let Err(e) = result {
        log::debug!("memory for chunks of {place:?} will be allocated with the first one: {e}");
    }
}

/// How long the calls of a plugin may take that prepare connections.
const READY_WITHIN: Duration = Duration::from_secs(5);

/// Prepares the first connections for a GPU that was not used before.
pub(crate) fn ready(context: &SetupContext, place: Place) {
    let _limited = limited(Instant::now() + READY_WITHIN);
    let mut all = context.table.connections.all();
    all.sort_by_key(|connection| connection.id());
    all.iter().take(READY).for_each(|connection| log_unprepared(place, connection.ready(place)));
}

/// The settings of a connection's protocol machine, from the engine and from the agreed terms.
fn setting(context: &SetupContext, agreed: &Agreed, address: SocketAddr) -> Setting {
    let (config, table) = (&context.config, &context.table);
    let account = context.pool.account(address.ip());
    Setting {
        registry: table.context.registry.clone(),
        inbox: Inbox::new(&context.notifications, &account),
        account,
        lines: table.context.lines.clone(),
        eager_bytes: config.eager_bytes,
        peer: address.to_string(),
        transfer_timeout: config.transfer_timeout,
        nic_timeout: config.nic_timeout,
        peer_timeout: agreed.terms.peer_timeout,
        heartbeat: heartbeat(agreed.terms.peer_timeout),
        match_timeout: config.match_timeout,
        doorbells: table.context.doorbells,
    }
}

/// The peer's GPU and key, for the log.
fn describe_peer(agreed: &Agreed) -> String {
    let (proof, gpu) = (&agreed.peer.proof, &agreed.peer.hello.gpu);
    match (proof, proof.name()) {
        (_, Some(key)) => format!("GPU {gpu}, key {key}"),
        (Proof::Nothing, _) => format!("GPU {gpu}, no key"),
        _ => format!("GPU {gpu}, the key"),
    }
}

/// Builds the connection and hands it to the progress thread. `counted`: an incoming connection's place in the quota.
///
/// # Errors
/// `Canceled` when the engine is being destroyed, `Resource`.
pub(crate) fn connection(context: &SetupContext, up: Up, counted: Option<Counted>) -> Result<Arc<Connection>> {
    let table = &context.table;
    let (terms, theirs) = (&up.agreed.terms, &up.agreed.peer);
    let chunk_bytes = terms.chunk_bytes as usize;
    let carried = describe(&up.sets);
    let (lineage, missing) = lineage(context, &up)?;
    let slot = table.context.queue.bell.slot()?;
    let paths = paths(context, up.sets, chunk_bytes, &slot.doorbell())?;
    let found = up.local.describe();
    let registry = table.context.registry.clone();
    let lookup = Box::new(move |id, token: &[u8; 16]| registry.remote(id, token));
    let one_host = up.local.transport(slot.local_bell(), &theirs.hello, lookup);
    let watched = one_host.as_ref().map(OneHost::watched);
    let direct = one_host.map(|one_host| Box::new(one_host) as Box<dyn Direct>);
    let channels = Channels::new(direct, paths, copier(context));
    let name = up.address.to_string();
    let setting = setting(context, &up.agreed, up.address);
    let who = describe_peer(&up.agreed);
    let line = format!(
        "connected with {name}, {who}: {carried}{found}; protection {:?}, chunks of up to {chunk_bytes} bytes",
        terms.protect
    );
    table.context.lines.log(log::Level::Info, Instant::now(), format_args!("{line}"));
    let now = Instant::now();
    let mut machine = Machine::new(setting, now);
    missing.into_iter().for_each(|channel| machine.leave_out(channel, now));
    let (at, movable) = (ends(&up.sock, up.address), movable(&up.sock, up.address, &up.addresses, up.agreed.connecting));
    let core = Core::new(machine, channels, ControlStream::new(up.sock, up.sealed.session, up.sealed.raw)?, at, movable);
    let key = theirs.proof.name().map(str::to_owned);
    let peer = Peer {
        ip: up.address.ip(),
        name,
        gpu_index: theirs.hello.gpu_index,
        key,
        engine: theirs.engine,
        lineage: Some(Arc::new(lineage)),
        _counted: counted.map(process::ProcessOwned::new),
    };
    table.context.counters.opened.add();
    let connection = Arc::new(Connection::new(table.clone(), core, peer, slot, watched));
    if !table.connections.insert(connection.id(), &connection) {
        return Err(super::shutdown::canceled());
    }
    if let Some(lineage) = connection.lineage() {
        table.context.restoring.name(lineage.ticket.connection(), connection.id());
    }
    connection.watch()?;
    table.context.request_drive(connection.id());
    Ok(connection)
}

/// Prepares a new connection for GPU memory, which can block for as long as the application keeps the CUDA driver busy. The
/// connection is in the table by then: the heartbeat thread covers for it, and deregistering a region withdraws it from the peer.
pub(crate) fn prepare(context: &SetupContext, connection: &Connection) {
    let table = &context.table;
    if let time @ 1.. = context.simulated_delay_ms.load(std::sync::atomic::Ordering::Relaxed) {
        connection.simulate_kept_preparing(std::time::Duration::from_millis(time));
    }
    if let Err(e) = context.gpus.warm() {
        log::debug!("GPU copies will be initialised by the first one: {e}");
    }
    let _limited = limited(Instant::now() + READY_WITHIN);
    if table.connections.count() <= READY {
        context.gpus.used().into_iter().for_each(|place| log_unprepared(place, connection.ready(place)));
    }
    for region in table.context.registry.on_devices() {
        connection.offer_region(region);
    }
}
