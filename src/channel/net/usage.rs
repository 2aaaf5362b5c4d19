//! How the channels of a path are used, and what they share.

use crate::channel::path::Copier;
use crate::types::Place;
use std::time::Instant;

/// How the channels of a path are used: the plugin's traits, and what both engines agreed on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Host memory uses the vectored extension.
    pub vectored: bool,
    /// The comms carry host memory.
    pub host: bool,
    /// Device memory is sent from host memory that the GPU fills, not by the plugin's device sends.
    pub stage_sends: bool,
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
