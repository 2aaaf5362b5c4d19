//! Setting up the lanes of a connection: listen comms, connects and accepts, all channels at once.

use super::lane::Lane;
use crate::gpu::Gpu;
use crate::net::comm::{Accepting, Connecting, ListenComm, RecvComm, SendComm};
use crate::net::plugin::Plugin;
use crate::status::{bail, err, Result};
use crate::wire::handshake::Handle;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Channels of one plugin, before they are up.
pub(crate) struct Listening {
    plugin: Arc<Plugin>,
    nics: Vec<usize>,
    comms: Vec<ListenComm>,
    gpu: Option<Arc<Gpu>>,
}

fn within<R>(gpu: &Option<Arc<Gpu>>, body: impl FnOnce() -> Result<R>) -> Result<R> {
    match gpu {
        Some(gpu) => gpu.with(body),
        None => body(),
    }
}

impl Listening {
    /// Opens `n` listen comms, spread over `nics`.
    ///
    /// `gpu`: the GPU that must be current in every thread that sets up comms; for plugins that follow the current GPU.
    pub(crate) fn open(plugin: &Arc<Plugin>, nics: &[usize], n: usize, gpu: Option<Arc<Gpu>>) -> Result<Listening> {
        if nics.is_empty() {
            bail!(Plugin, "plugin {} has no usable device", plugin.name);
        }
        let nics: Vec<usize> = (0..n).map(|i| nics[i % nics.len()]).collect();
        let comms = within(&gpu, || nics.iter().map(|&nic| ListenComm::new(plugin, nic)).collect::<Result<_>>())?;
        Ok(Listening { plugin: plugin.clone(), nics, comms, gpu })
    }

    /// The handles to give to the peer, one a channel.
    pub(crate) fn handles(&self) -> Vec<Handle> {
        self.comms.iter().map(|c| c.handle).collect()
    }

    /// Connects to the peer's handles and accepts the peer's connects. `alive` says whether to go on.
    pub(crate) fn establish(self, peers: &[Handle], deadline: Instant, alive: &(dyn Fn() -> bool + Sync)) -> Result<Vec<Lane>> {
        let connects: Vec<Half> = self
            .nics
            .iter()
            .zip(peers)
            .map(|(&nic, &handle)| Half::Connecting(Connecting::new(&self.plugin, nic, handle)))
            .collect();
        let accepts: Vec<Half> = self.comms.into_iter().map(|c| Half::Accepting(c.accept())).collect();
        let n = connects.len();
        let halves: Vec<Half> = connects.into_iter().chain(accepts).collect();
        // The software plugin's calls return at once; TCPX sleeps inside them, so there every comm gets a thread for the time.
        let threads = if self.plugin.is_soft() { 1 } else { halves.len().max(1) };
        let per_thread = halves.len().div_ceil(threads).max(1);
        let mut groups: Vec<Vec<Half>> = Vec::new();
        let mut rest = halves.into_iter();
        loop {
            let group: Vec<Half> = rest.by_ref().take(per_thread).collect();
            if group.is_empty() {
                break;
            }
            groups.push(group);
        }
        let gpu = self.gpu;
        let drive = |group: Vec<Half>| within(&gpu, || drive(group, deadline, alive));
        let done: Vec<Half> = if groups.len() <= 1 {
            groups.into_iter().map(drive).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect()
        } else {
            std::thread::scope(|scope| {
                let workers: Vec<_> = groups.into_iter().map(|g| scope.spawn(move || drive(g))).collect();
                let mut all = Vec::new();
                for worker in workers {
                    match worker.join() {
                        Ok(result) => all.extend(result?),
                        Err(_) => bail!(Internal, "a thread that sets up a channel panicked"),
                    }
                }
                Ok(all)
            })?
        };
        let mut sends: Vec<SendComm> = Vec::with_capacity(n);
        let mut recvs: Vec<RecvComm> = Vec::with_capacity(n);
        for half in done {
            match half {
                Half::Send(comm) => sends.push(comm),
                Half::Recv(comm) => recvs.push(comm),
                Half::Connecting(_) | Half::Accepting(_) => bail!(Internal, "a channel is only half set up"),
            }
        }
        Ok(sends.into_iter().zip(recvs).map(|(send, recv)| Lane::new(send, recv)).collect())
    }
}

/// One direction of a channel on its way up.
enum Half {
    Connecting(Connecting),
    Accepting(Accepting),
    Send(SendComm),
    Recv(RecvComm),
}

/// Polls a group until every half is up.
fn drive(mut group: Vec<Half>, deadline: Instant, alive: &(dyn Fn() -> bool + Sync)) -> Result<Vec<Half>> {
    loop {
        let mut waiting = 0;
        for half in &mut group {
            let next = match half {
                Half::Connecting(c) => c.poll()?.map(Half::Send),
                Half::Accepting(a) => a.poll()?.map(Half::Recv),
                Half::Send(_) | Half::Recv(_) => continue,
            };
            match next {
                Some(up) => *half = up,
                None => waiting += 1,
            }
        }
        if waiting == 0 {
            return Ok(group);
        }
        if !alive() {
            return Err(err!(Canceled, "closed while channels were set up"));
        }
        if Instant::now() >= deadline {
            return Err(err!(TimedOut, "{waiting} of {} channel directions did not come up in time", group.len()));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}
