//! Meeting a peer on the same host during set-up: whether this engine takes part, what it offers, and the result. Nothing here
//! fails a set-up: memory that is not shared goes over the channels.

use super::channels::plan::own_gpu;
use super::context::SetupContext;
use crate::config::LocalGpu;
use crate::gpu::PullOptions;
use crate::host::memory::cuda::{CudaMemory, CudaOptions};
use crate::host::memory::Manner;
use crate::host::{emulated_gpu, Bell, EmulatedMemory, Have, Linked, Lookup, Meeting, OneHost, Opening, ProofKeys};
use crate::status::{bail, Error, Result};
use crate::types::Place;
use crate::wire::hello::Hello;
use crate::wire::setup::Invitation;
use std::time::Instant;

/// This engine's part, before the peer's is known.
///
/// # Errors
/// Why this engine takes no part.
pub(super) fn opening(context: &SetupContext, connecting: bool) -> Result<Opening> {
    if context.config.disable_ipc {
        bail!(Unsupported, "UCCL_P2P_DISABLE_IPC is set");
    }
    Opening::new(connecting, context.config.local_dir.clone())
}

/// The memory that this engine can share and pull.
fn have(context: &SetupContext) -> Have {
    // A part of what peers may take.
    let area_bytes = context.limits.peer_bytes as u64 / 2;
    if context.config.emulate_device {
        let gpus = (0..context.config.emulate_devices).map(|i| (Place::gpu(i), emulated_gpu(i))).collect();
        let device = EmulatedMemory::new(context.config.local_gpu == LocalGpu::Push);
        return Have { gpus, device: Some(Box::new(device)), area_bytes };
    }
    if !crate::gpu::available() {
        return Have { gpus: Vec::new(), device: None, area_bytes };
    }
    let named = |ordinal: i32| Some((Place::gpu(u8::try_from(ordinal).ok()?), cuda_driver::uuid_of(ordinal).ok()?));
    let gpus = (0..cuda_driver::device_count()).filter_map(named).collect();
    let pulls = PullOptions { blocks: context.config.local_blocks, ..PullOptions::default() };
    let manner = match context.config.local_gpu {
        LocalGpu::Auto => None,
        LocalGpu::Pull => Some(Manner::Pull),
        LocalGpu::Push => Some(Manner::Push),
    };
    Have { gpus, device: Some(Box::new(CudaMemory::new(CudaOptions { pulls, manner }))), area_bytes }
}

/// The state of the meeting.
pub(crate) enum Local {
    Meeting(Box<Meeting>),
    Linked(Box<Linked>),
    /// Nothing is shared, and why. What is the usual state of things needs no line in the log.
    Not {
        why: String,
        usual: bool,
    },
}

impl Local {
    pub(super) fn begin(context: &SetupContext, own: Result<Opening>, peer: Option<&Invitation>, keys: ProofKeys) -> Local {
        let met = match (own, peer) {
            (Err(e), _) => Err(e),
            // On this host, the peer's own log line says why.
            (Ok(_), None) => return Local::usual("the peer takes no part"),
            (Ok(own), Some(peer)) if own.invitation().host != peer.host => return Local::usual("the peer is on another host"),
            (Ok(own), Some(peer)) => own.meet(peer, keys, have(context), Instant::now()),
        };
        met.map_or_else(Local::failed, |meeting| Local::Meeting(Box::new(meeting)))
    }

    fn failed(error: Error) -> Local {
        Local::Not { why: error.to_str().to_owned(), usual: false }
    }

    fn usual(why: &str) -> Local {
        Local::Not { why: why.to_owned(), usual: true }
    }

    pub(super) fn poll(&mut self) {
        if let Local::Meeting(meeting) = self {
            match meeting.poll(Instant::now()) {
                Ok(None) => {}
                Ok(Some(linked)) => *self = Local::Linked(Box::new(linked)),
                Err(e) => *self = Local::failed(e),
            }
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        !matches!(self, Local::Meeting(_))
    }

    pub(super) fn is_linked(&self) -> bool {
        matches!(self, Local::Linked(_))
    }

    /// The peer has not met this engine.
    pub(super) fn give_up(&mut self) {
        if !matches!(self, Local::Not { .. }) {
            *self = Local::Not { why: "the peer does not take part".to_owned(), usual: false };
        }
    }

    /// Whether memory of a pair of places takes direct transfers, and if so, whether over NVLink.
    pub(super) fn joins(&self, pair: (Place, Place)) -> Option<bool> {
        match self {
            Local::Linked(linked) if linked.pairs.contains(&pair) => Some(linked.nvlink.contains(&pair)),
            _ => None,
        }
    }

    /// Why there are no direct transfers of memory of a pair of places.
    pub(super) fn reason(&self) -> &str {
        match self {
            Local::Not { why, .. } => why,
            Local::Linked(_) => "not for this memory",
            Local::Meeting(_) => "the peer's process was not met in time",
        }
    }

    /// The result, to follow the description of the channels in the log.
    pub(super) fn describe(&self) -> String {
        match self {
            Local::Linked(linked) => {
                let gpu = |place: Place| place.ordinal().map_or(String::new(), |n| n.to_string());
                let word = |pair: &(Place, Place)| match (pair.0.is_device(), linked.pushed.contains(pair)) {
                    (true, pushed) => {
                        let pushed = if pushed { " (pushed)" } else { "" };
                        format!("GPU {} here and {} there{pushed}", gpu(pair.0), gpu(pair.1))
                    }
                    (false, false) => "host memory".to_owned(),
                    (false, true) => {
                        let why = linked.unread.as_deref().unwrap_or("the peer's process may not read this one");
                        format!("host memory, staged in shared areas because process_vm_readv does not work here ({why})")
                    }
                };
                let all: Vec<String> = linked.pairs.iter().map(word).collect();
                format!("; direct transfers with {}, preferred to channels: {}", linked.who, all.join(", "))
            }
            Local::Not { why, usual: false } => format!("; no direct transfers: {why}"),
            _ => String::new(),
        }
    }

    /// The transport for direct transfers, if there is one. `lookup` finds registered regions.
    pub(super) fn transport(self, bell: Bell, peer: &Hello, lookup: Lookup) -> Option<OneHost> {
        let gpus = std::iter::once(own_gpu(peer)).chain(peer.further_gpus.iter().copied());
        match self {
            Local::Linked(linked) => Some(OneHost::new(*linked, bell, gpus.map(Place::gpu).collect(), lookup)),
            _ => None,
        }
    }
}
