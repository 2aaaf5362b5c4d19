//! Staging buffers of a channel: a ring in registered memory. Knows nothing of chunks.

use crate::channel::device::StagingMemory;
use crate::net::comm::MHandle;
use crate::net::registrations::Registration;
use crate::status::Result;

/// Chunks of device memory in flight on a channel that sends from host memory. Enough to keep copies and socket busy, and few
/// enough that the memory of all channels fits the CPU's cache.
pub(super) const STAGED_WINDOW: usize = 8;

/// A ring of staging buffers, registered with the plugin. Messages use the buffers in turn. No more are in flight than there are
/// buffers, and they complete in order, so the next buffer is always free.
pub(super) struct Staging {
    // Dropped before the memory.
    registration: Registration,
    memory: Box<dyn StagingMemory>,
    stride: usize,
    places: usize,
    turn: usize,
}

impl Staging {
    pub(super) fn new(
        memory: Box<dyn StagingMemory>,
        stride: usize,
        places: usize,
        register: impl FnOnce(*mut u8, usize) -> Result<Registration>,
    ) -> Result<Staging> {
        let registration = register(memory.ptr(), stride * places)?;
        Ok(Staging { memory, registration, stride, places, turn: 0 })
    }

    pub(super) fn mhandle(&self) -> MHandle {
        self.registration.mhandle()
    }

    /// The next buffer.
    pub(super) fn next(&mut self) -> *mut u8 {
        let place = self.turn % self.places;
        self.turn += 1;
        // SAFETY: place * stride is inside the block of so many strides.
        unsafe { self.memory.ptr().add(place * self.stride) }
    }

    /// Takes back the last [`Staging::next`]: its buffer was not used.
    pub(super) fn undo(&mut self) {
        self.turn -= 1;
    }
}
