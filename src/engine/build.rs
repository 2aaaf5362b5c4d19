//! From a finished set-up to a connection that the engine drives.

use super::connection::{Connection, Core, Peer};
use super::fabric::Raised;
use super::link::{Agreed, Sealed};
use super::notify::Inbox;
use super::proto::{Machine, Setting};
use super::site::Site;
use crate::channel::cuda::CudaDevice;
use crate::channel::device::EmulatedDevice;
use crate::channel::net::{Channel, NetPath, Usage};
use crate::channel::path::{Copier, Path};
use crate::channel::router::Channels;
use crate::net::comm::Doorbell;
use crate::net::plugin::Plugin;
use crate::net::setup::Pair;
use crate::status::Result;
use crate::types::Place;
use crate::wire::control::ControlStream;
use crate::wire::keys::Proof;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

/// What a set-up leaves.
pub(crate) struct Up {
    pub sock: TcpStream,
    pub address: SocketAddr,
    pub agreed: Agreed,
    /// The control stream from here on.
    pub sealed: Sealed,
    /// Channels of each plugin, in the plugins' order.
    pub sets: Raised,
}

/// What copies device memory; none on a machine without a GPU.
fn copier(site: &Site) -> Result<Copier> {
    if site.config.emulate_device {
        return Ok(Some(Box::new(EmulatedDevice)));
    }
    if !crate::gpu::available() {
        return Ok(None);
    }
    site.gpus.warm()?;
    Ok(Some(Box::new(CudaDevice::default())))
}

/// The GPUs, here and at the peer, whose memory the comms of a plugin carry; `None` where they take any. A side that does not say which
/// GPU its engine has was set up with the first one.
fn gpus(site: &Site, plugin: &Plugin, peer: i32) -> Option<(Place, Place)> {
    let place = |index: i32| Place::gpu(u8::try_from(index).unwrap_or(0));
    plugin.traits.follows_gpu.then(|| (place(site.gpus.index()), place(peer)))
}

/// A path over the channels of each plugin.
fn paths(site: &Site, sets: Raised, chunk_bytes: usize, peer_gpu: i32, doorbell: &Doorbell) -> Result<Vec<Box<dyn Path>>> {
    let config = &site.config;
    let path = |(pairs, plugin): (Vec<Pair>, &Arc<Plugin>)| -> Result<Box<dyn Path>> {
        let channels: Vec<Channel> = pairs.into_iter().map(|pair| Channel::new(pair.send, pair.recv)).collect();
        for channel in &channels {
            channel.set_doorbell(doorbell)?;
        }
        let traits = &plugin.traits;
        let (vectored, stage_sends) = (traits.vectored && config.vectored, traits.stage_sends && config.stage_sends);
        let host = traits.host_memory;
        Ok(Box::new(NetPath::new(
            channels,
            Usage { vectored, host, stage_sends, gpus: gpus(site, plugin, peer_gpu), chunk_bytes },
        )))
    };
    // A set without channels does not serve; another one carries what it would.
    sets.into_iter().zip(site.plugins.all()).filter(|(pairs, _)| !pairs.is_empty()).map(path).collect()
}

/// Builds the connection and puts it under the progress thread's care.
///
/// # Errors
/// `Canceled` when the engine ends, `Resource`.
pub(crate) fn connection(site: &Site, up: Up) -> Result<Arc<Connection>> {
    let config = &site.config;
    let home = &site.home;
    let (terms, theirs) = (&up.agreed.terms, &up.agreed.peer);
    let chunk_bytes = terms.chunk_bytes as usize;
    let n = up.sets.iter().map(Vec::len).sum::<usize>();
    let mut nics: Vec<String> = up.sets.iter().flatten().map(|pair| pair.nic.clone()).collect();
    nics.sort();
    nics.dedup();
    let doorbell = home.bell.doorbell();
    let channels = Channels::new(paths(site, up.sets, chunk_bytes, theirs.hello.gpu_index, &doorbell)?, copier(site)?);
    let name = up.address.to_string();
    let setting = Setting {
        registry: home.registry.clone(),
        inbox: Inbox::new(&site.notifications),
        chunk_bytes,
        eager_bytes: config.eager_bytes,
        peer: name.clone(),
        transfer_timeout: config.transfer_timeout,
        peer_timeout: terms.peer_timeout,
        heartbeat: terms.peer_timeout / 4,
        match_timeout: config.match_timeout,
    };
    let proof = match (&theirs.proof, theirs.proof.name()) {
        (_, Some(key)) => format!("key {key}"),
        (Proof::Nothing, _) => "no key".to_owned(),
        _ => "the key".to_owned(),
    };
    let (plugin, nics) = (&site.plugins.device.name, nics.join(", "));
    let gpu = &theirs.hello.gpu;
    log::info!("connected with {name}: {n} channels over {plugin} on {nics}, GPU {gpu}, {proof}, protection {:?}", terms.protect);
    let core = Core::new(
        Machine::new(setting, Instant::now()),
        channels,
        ControlStream::new(up.sock, up.sealed.session, up.sealed.plain, up.sealed.raw)?,
    );
    let key = theirs.proof.name().map(str::to_owned);
    let peer = Peer { ip: up.address.ip(), name, gpu_index: theirs.hello.gpu_index, key, engine: theirs.engine };
    let connection = Arc::new(Connection::new(home.clone(), core, peer, doorbell.armed));
    if !home.connections.insert(&connection) {
        return Err(super::ending::canceled());
    }
    home.bell.watch(connection.fd, connection.id)?;
    home.attend(connection.id);
    Ok(connection)
}
