//! From a finished set-up to a connection that the engine drives.

use super::connection::{Connection, Peer};
use super::fabric::Raised;
use super::site::Site;
use super::state::{LaneSet, Setting, State};
use crate::channel::cuda::CudaDevice;
use crate::channel::device::{DeviceCopier, EmulatedDevice};
use crate::channel::lane::Lane;
use crate::net::comm::Doorbell;
use crate::net::plugin::Plugin;
use crate::net::setup::Pair;
use crate::status::Result;
use crate::wire::control::ControlStream;
use crate::wire::handshake::Hello;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

/// What a set-up leaves.
pub(crate) struct Up {
    pub sock: TcpStream,
    pub address: SocketAddr,
    pub theirs: Hello,
    /// Channels of each plugin, in the plugins' order.
    pub sets: Raised,
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

fn lanes(site: &Site, sets: Raised, doorbell: &Doorbell) -> Result<Vec<LaneSet>> {
    let config = &site.config;
    let set = |(pairs, plugin): (Vec<Pair>, &Arc<Plugin>)| {
        let lanes: Vec<Lane> = pairs.into_iter().map(|pair| Lane::new(pair.send, pair.recv)).collect();
        for lane in &lanes {
            lane.set_doorbell(doorbell)?;
        }
        let traits = &plugin.traits;
        let (vectored, stage_sends) = (traits.vectored && config.vectored, traits.stage_sends && config.stage_sends);
        Ok(LaneSet { lanes, vectored, host: traits.host_memory, stage_sends })
    };
    // A set without channels does not serve; another one carries what it would.
    sets.into_iter().zip(site.plugins.all()).filter(|(pairs, _)| !pairs.is_empty()).map(set).collect()
}

/// Builds the connection and puts it under the progress thread's care.
///
/// # Errors
/// `Canceled` when the engine ends, `Resource`.
pub(crate) fn connection(site: &Site, up: Up) -> Result<Arc<Connection>> {
    let config = &site.config;
    let home = &site.home;
    let (_, chunk_bytes) = site.agreed(&up.theirs);
    let channels = up.sets.iter().map(Vec::len).find(|&n| n > 0).unwrap_or(0);
    let doorbell = home.bell.doorbell();
    let sets = lanes(site, up.sets, &doorbell)?;
    let name = up.address.to_string();
    let setting = Setting {
        registry: home.registry.clone(),
        notifications: site.notifications.clone(),
        chunk_bytes,
        eager_bytes: config.eager_bytes,
        peer: name.clone(),
        transfer_timeout: config.transfer_timeout,
        peer_timeout: config.peer_timeout,
        match_timeout: config.match_timeout,
    };
    let state = State::new(ControlStream::new(up.sock)?, sets, copier(config.emulate_device), setting);
    log::info!("connected with {name}: {channels} channels over {}, GPU {}", site.plugins.device.name, up.theirs.gpu);
    let peer = Peer { ip: up.address.ip(), name, gpu_index: up.theirs.gpu_index, engine: up.theirs.engine };
    let connection = Arc::new(Connection::new(home.connections.next_id(), home.clone(), state, peer, channels, doorbell.armed));
    if !home.connections.insert(&connection) {
        return Err(super::ending::canceled());
    }
    home.bell.watch(connection.fd, connection.id)?;
    home.bell.ring();
    Ok(connection)
}
