//! From a finished set-up to a connection that the engine drives.

use super::connection::{Connection, Core, Peer};
use super::fabric::Pair;
use super::notify::Inbox;
use super::proto::{Machine, Setting};
use super::site::Site;
use crate::channel::cuda::CudaDevice;
use crate::channel::device::{DeviceCopier, EmulatedDevice};
use crate::channel::net::{Channel, NetPath, Usage};
use crate::channel::path::Path;
use crate::channel::router::Channels;
use crate::net::comm::Doorbell;
use crate::status::Result;
use crate::wire::control::ControlStream;
use crate::wire::handshake_v1::Hello;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

/// What a set-up leaves.
pub(crate) struct Up {
    pub sock: TcpStream,
    pub address: SocketAddr,
    pub theirs: Hello,
    /// Channels of each plugin, in the plugins' order.
    pub sets: Vec<Vec<Pair>>,
}

fn copier(emulated: bool) -> Option<Box<dyn DeviceCopier>> {
    if emulated {
        Some(Box::new(EmulatedDevice))
    } else if crate::gpu::available() {
        Some(Box::new(CudaDevice::default()))
    } else {
        None
    }
}

/// A path over the channels of each plugin.
fn paths(site: &Site, sets: Vec<Vec<Pair>>, chunk_bytes: usize, doorbell: &Doorbell) -> Result<Vec<Box<dyn Path>>> {
    let config = &site.config;
    let path = |(pairs, plugin): (Vec<Pair>, &Arc<crate::net::plugin::Plugin>)| -> Result<Box<dyn Path>> {
        let channels: Vec<Channel> = pairs.into_iter().map(|pair| Channel::new(pair.send, pair.recv)).collect();
        for channel in &channels {
            channel.set_doorbell(doorbell)?;
        }
        let host = plugin.is_soft();
        let (vectored, stage_sends) = (host && config.vectored, host && config.stage_sends);
        Ok(Box::new(NetPath::new(channels, Usage { vectored, host, stage_sends, gpus: None, chunk_bytes })))
    };
    sets.into_iter().zip(site.plugins.all()).map(path).collect()
}

/// Builds the connection and puts it under the progress thread's care.
///
/// # Errors
/// `Canceled` when the engine ends, `Resource`.
pub(crate) fn connection(site: &Site, up: Up) -> Result<Arc<Connection>> {
    let config = &site.config;
    let home = &site.home;
    let (n, chunk_bytes) = site.agreed(&up.theirs);
    let doorbell = home.bell.doorbell();
    let channels = Channels::new(paths(site, up.sets, chunk_bytes, &doorbell)?, copier(config.emulate_device));
    let name = up.address.to_string();
    let setting = Setting {
        registry: home.registry.clone(),
        inbox: Inbox::new(&site.notifications),
        chunk_bytes,
        eager_bytes: config.eager_bytes,
        peer: name.clone(),
        transfer_timeout: config.transfer_timeout,
        peer_timeout: config.peer_timeout,
        heartbeat: config.peer_timeout / 4,
        match_timeout: config.match_timeout,
    };
    log::info!("connected with {name}: {n} channels over {}, GPU {}", site.plugins.device.name, up.theirs.gpu);
    let core = Core::new(Machine::new(setting, Instant::now()), channels, ControlStream::new(up.sock)?);
    let peer = Peer { ip: up.address.ip(), name, gpu_index: up.theirs.gpu_index, engine: up.theirs.engine };
    let connection = Arc::new(Connection::new(home.clone(), core, peer, doorbell.armed));
    if !home.connections.insert(&connection) {
        return Err(super::ending::canceled());
    }
    home.bell.watch(connection.fd, connection.id)?;
    home.attend(connection.id);
    Ok(connection)
}
