//! How the channels of a path are used, and what they share.

use crate::channel::path::Copier;
use crate::net::traits::Traits;
use crate::types::Place;
use std::time::Instant;

/// How device memory is given to the plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceMode {
    /// A chunk of one piece is sent from its region, others are packed on the GPU first. Received chunks are unpacked from bounce buffers.
    Regions,
    /// Chunks are sent from host memory that the GPU fills, and unpacked from bounce buffers.
    HostStaging,
    /// Chunks are packed on the GPU before they are sent, and unpacked from bounce buffers.
    Packed,
    /// The plugin sees only staging memory on the GPU: chunks are packed before they are sent, and scattered once received.
    GpuStaging,
}

impl DeviceMode {
    /// For a plugin with these traits. `host`: host memory may be used.
    pub(crate) fn of(traits: &Traits, host: bool) -> DeviceMode {
        match traits {
            Traits { delivers: true, .. } => DeviceMode::GpuStaging,
            Traits { packs_sends: true, .. } => DeviceMode::Packed,
            Traits { stage_sends: true, .. } if host => DeviceMode::HostStaging,
            _ => DeviceMode::Regions,
        }
    }
}

/// How the channels of a path are used: the plugin's traits, and what both engines agreed on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Host memory uses the vectored extension.
    pub vectored: bool,
    /// The comms carry host memory.
    pub host: bool,
    /// How device memory is sent and received.
    pub device: DeviceMode,
    /// The GPU whose memory the comms receive into, here and at the peer; `None` if any.
    pub gpus: Option<(Place, Place)>,
    /// Largest chunk, bytes.
    pub chunk_bytes: usize,
    /// See [`Loads::alone`].
    pub alone: u64,
}

/// What the channels of a path share while they advance.
pub(super) struct Resources<'a> {
    pub copier: &'a mut Copier,
    pub usage: &'a Usage,
    pub now: Instant,
}

/// What a comm may use until its close has ended, which another thread may see.
pub(super) struct Used<T> {
    _kept: T,
}
// SAFETY: by the contract of `new`.
unsafe impl<T> Send for Used<T> {}

impl<T> Used<T> {
    /// # Safety
    /// It may be dropped by any thread.
    pub(super) unsafe fn new(kept: T) -> Used<T> {
        Used { _kept: kept }
    }
}
