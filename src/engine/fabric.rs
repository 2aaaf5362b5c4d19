//! The channels of one set-up on their way up, over all plugins of the engine. Knows nothing of the control connection.

use super::link::Offer;
use super::site::Site;
use crate::gpu::Gpu;
use crate::net::comm::{Accepting, Connecting, ListenComm, RecvComm, SendComm};
use crate::net::plugin::Plugin;
use crate::net::topology;
use crate::status::{bail, err, Error, Result};
use std::sync::Arc;

/// A channel: both directions.
pub(crate) struct Pair {
    pub send: SendComm,
    pub recv: RecvComm,
}

/// Listen comms of one plugin.
struct Listening {
    plugin: Arc<Plugin>,
    gpu: Option<Arc<Gpu>>,
    nics: Vec<usize>,
    comms: Vec<ListenComm>,
}

/// Listen comms of all plugins, offered and not yet connected.
pub(crate) struct Opened(Vec<Listening>);

fn within<R>(gpu: &Option<Arc<Gpu>>, body: impl FnOnce() -> Result<R>) -> Result<R> {
    match gpu {
        Some(gpu) => gpu.with(body),
        None => body(),
    }
}

fn at(error: &Error, direction: &str, nic: &str) -> Error {
    Error::new(error.kind(), format_args!("{direction} on {nic}: {error}"))
}

impl Opened {
    /// Opens `n` listen comms of each plugin, spread over the NICs near the engine's GPU.
    pub(crate) fn open(site: &Site, n: usize) -> Result<Opened> {
        let mut sets = Vec::new();
        for plugin in site.plugins.all() {
            let near = topology::nearest(&plugin.devices, site.gpus.pci_path().as_deref());
            if near.is_empty() {
                bail!(Plugin, "plugin {} has no usable device", plugin.name);
            }
            let nics: Vec<usize> = (0..n).map(|i| near[i % near.len()]).collect();
            let gpu = site.gpus.followed_by(plugin)?;
            let listen = |&nic: &usize| ListenComm::new(plugin, nic).map_err(|e| at(&e, "listening", &plugin.devices[nic].name));
            let comms = within(&gpu, || nics.iter().map(listen).collect::<Result<_>>())?;
            sets.push(Listening { plugin: plugin.clone(), gpu, nics, comms });
        }
        Ok(Opened(sets))
    }

    /// What the peer is told.
    pub(crate) fn offers(&self) -> Vec<Offer> {
        let of = |set: &Listening| -> Vec<Offer> {
            let name = |nic: usize| set.plugin.devices[nic].name.clone();
            set.nics.iter().zip(&set.comms).map(|(&nic, comm)| Offer { nic: name(nic), handle: comm.handle }).collect()
        };
        self.0.iter().flat_map(of).collect()
    }

    /// Connects to the peer's offers and accepts the peer's connects from now on.
    ///
    /// # Errors
    /// `Protocol` when the peer offers another number of channels.
    pub(crate) fn establish(self, peers: &[Offer]) -> Result<Raising> {
        let wanted: usize = self.0.iter().map(|set| set.comms.len()).sum();
        if peers.len() != wanted {
            bail!(Protocol, "the peer offers {} channels, {wanted} were agreed", peers.len());
        }
        let mut peers = peers.iter();
        let sets = self.0.into_iter().map(|set| {
            let channels = set.comms.into_iter().zip(&set.nics).zip(peers.by_ref()).map(|((comm, &nic), peer)| Channel {
                nic: set.plugin.devices[nic].name.clone(),
                peer_nic: peer.nic.clone(),
                send: Half::Coming(Connecting::new(&set.plugin, nic, peer.handle)),
                recv: Half::Coming(comm.accept()),
            });
            (set.gpu, channels.collect())
        });
        Ok(Raising(sets.collect()))
    }
}

/// One direction of a channel.
enum Half<C, D> {
    Coming(C),
    Up(D),
}

struct Channel {
    nic: String,
    peer_nic: String,
    send: Half<Connecting, SendComm>,
    recv: Half<Accepting, RecvComm>,
}

impl Channel {
    /// Whether a direction came up.
    fn poll(&mut self) -> Result<bool> {
        let mut moved = false;
        if let Half::Coming(connect) = &mut self.send {
            let up = connect.poll().map_err(|e| at(&e, &format!("connecting to {} of the peer", self.peer_nic), &self.nic))?;
            if let Some(comm) = up {
                self.send = Half::Up(comm);
                moved = true;
            }
        }
        if let Half::Coming(accept) = &mut self.recv {
            if let Some(comm) = accept.poll().map_err(|e| at(&e, "accepting", &self.nic))? {
                self.recv = Half::Up(comm);
                moved = true;
            }
        }
        Ok(moved)
    }

    fn missing(&self) -> impl Iterator<Item = String> + '_ {
        let send = matches!(self.send, Half::Coming(_)).then(|| format!("{} to the peer's {}", self.nic, self.peer_nic));
        let recv = matches!(self.recv, Half::Coming(_)).then(|| format!("the peer's {} to {}", self.peer_nic, self.nic));
        send.into_iter().chain(recv)
    }
}

/// Channels on their way up. Dropping it gives up those that are not there yet.
pub(crate) struct Raising(Vec<(Option<Arc<Gpu>>, Vec<Channel>)>);

impl Raising {
    /// Goes on; whether anything moved, and whether all are up.
    ///
    /// # Errors
    /// The first failure of a channel, with its NIC and direction.
    pub(crate) fn poll(&mut self) -> Result<(bool, bool)> {
        let mut moved = false;
        for (gpu, channels) in &mut self.0 {
            within(gpu, || {
                for channel in channels {
                    moved |= channel.poll()?;
                }
                Ok(())
            })?;
        }
        Ok((moved, self.missing().next().is_none()))
    }

    fn missing(&self) -> impl Iterator<Item = String> + '_ {
        self.0.iter().flat_map(|(_, channels)| channels.iter().flat_map(Channel::missing))
    }

    /// What is missing, for people.
    pub(crate) fn describe(&self) -> String {
        let all: Vec<String> = self.missing().collect();
        let shown = all.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
        format!("{} channel directions are missing: {shown}{}", all.len(), if all.len() > 4 { ", ..." } else { "" })
    }

    /// The channels of each plugin, once all are up.
    pub(crate) fn finish(self) -> Result<Vec<Vec<Pair>>> {
        let pair = |channel: Channel| match (channel.send, channel.recv) {
            (Half::Up(send), Half::Up(recv)) => Ok(Pair { send, recv }),
            _ => Err(err!(Internal, "a channel is only half set up")),
        };
        self.0.into_iter().map(|(_, channels)| channels.into_iter().map(pair).collect()).collect()
    }
}
