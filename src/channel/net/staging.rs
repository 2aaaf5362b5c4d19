//! Staging buffers of a channel: a ring in registered memory. Knows nothing of chunks.

use crate::channel::device::StagingMemory;
use crate::channel::memory::PAGE;
use crate::net::comm::MHandle;
use crate::net::registrations::{Keep, Registration};
use crate::status::Result;

/// Chunks of device memory in flight on a channel that takes them from staging memory. Enough to keep copies and network busy, and few
/// enough that host memory of all channels fits the CPU's cache.
pub(super) const STAGED_WINDOW: usize = 8;

/// A ring of staging buffers, registered with the plugin. Messages use the buffers in turn. No more are in flight than there are
/// buffers, and they complete in order, so the next buffer is always free.
pub(super) struct Staging {
    /// It keeps the memory, which a plugin may use until the registration is dropped.
    registration: Registration,
    base: *mut u8,
    stride: usize,
    places: usize,
    turn: usize,
}

impl Staging {
    /// `places` buffers in `memory`, each large enough for a chunk.
    pub(super) fn new(
        memory: Box<dyn StagingMemory>,
        chunk_bytes: usize,
        places: usize,
        register: impl FnOnce(*mut u8, usize, Keep) -> Result<Registration>,
    ) -> Result<Staging> {
        let (base, stride) = (memory.ptr(), Staging::bytes(chunk_bytes, 1));
        let registration = register(base, stride * places, Box::new(memory))?;
        Ok(Staging { registration, base, stride, places, turn: 0 })
    }

    /// The memory that so many buffers take.
    pub(super) fn bytes(chunk_bytes: usize, places: usize) -> usize {
        chunk_bytes.next_multiple_of(PAGE) * places
    }

    pub(super) fn mhandle(&self) -> MHandle {
        self.registration.mhandle()
    }

    /// The next buffer.
    pub(super) fn next(&mut self) -> *mut u8 {
        let place = self.turn % self.places;
        self.turn += 1;
        // SAFETY: place * stride is inside the block of so many strides.
        unsafe { self.base.add(place * self.stride) }
    }

    /// Takes back the last [`Staging::next`]: its buffer was not used.
    pub(super) fn undo(&mut self) {
        self.turn -= 1;
    }
}
