//! What connections of a GPU hand on to each other: launchers and staging memory. Neither is made or freed while data moves, since the
//! driver may wait for the application's work at both.

use super::device::Gpu;
use super::launcher::CopyLauncher;
use crate::status::Result;
use cuda_driver::{DeviceBuffer, PinnedBuffer};
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Launchers that a GPU keeps.
const LAUNCHERS: usize = 24;
/// Bytes of pinned and of device memory that a GPU keeps.
const BYTES: usize = 128 << 20;

/// What a GPU keeps for its next users.
#[derive(Default)]
pub(crate) struct Idle {
    launchers: Vec<CopyLauncher>,
    pinned: Vec<PinnedBuffer>,
    device: Vec<DeviceBuffer>,
}

impl Idle {
    /// Launchers at hand.
    pub(super) fn launchers(&self) -> usize {
        self.launchers.len()
    }
}

/// Something that can be handed on.
pub(crate) trait Keep: Sized {
    /// Where it waits for its next user.
    fn shelf(idle: &mut Idle) -> &mut Vec<Self>;
    /// Whether it fits the shelf.
    fn fits(&self, shelf: &[Self]) -> bool;
    /// Makes it ready for the next user; `None`: it cannot have one.
    fn settle(self) -> Option<Self>;
}

impl Keep for CopyLauncher {
    fn shelf(idle: &mut Idle) -> &mut Vec<CopyLauncher> {
        &mut idle.launchers
    }
    fn fits(&self, shelf: &[CopyLauncher]) -> bool {
        shelf.len() < LAUNCHERS
    }
    fn settle(self) -> Option<CopyLauncher> {
        CopyLauncher::settle(self)
    }
}

impl Keep for PinnedBuffer {
    fn shelf(idle: &mut Idle) -> &mut Vec<PinnedBuffer> {
        &mut idle.pinned
    }
    fn fits(&self, shelf: &[PinnedBuffer]) -> bool {
        shelf.iter().map(PinnedBuffer::len).sum::<usize>() + self.len() <= BYTES
    }
    fn settle(self) -> Option<PinnedBuffer> {
        Some(self)
    }
}

impl Keep for DeviceBuffer {
    fn shelf(idle: &mut Idle) -> &mut Vec<DeviceBuffer> {
        &mut idle.device
    }
    fn fits(&self, shelf: &[DeviceBuffer]) -> bool {
        shelf.iter().map(DeviceBuffer::len).sum::<usize>() + self.len() <= BYTES
    }
    fn settle(self) -> Option<DeviceBuffer> {
        Some(self)
    }
}

/// Something of a GPU that goes back to it when dropped. By then its user has waited for work that uses it.
pub(crate) struct Lent<T: Keep> {
    item: ManuallyDrop<T>,
    gpu: Arc<Gpu>,
}

impl<T: Keep> Lent<T> {
    pub(super) fn of(gpu: &Arc<Gpu>, item: T) -> Lent<T> {
        Lent { item: ManuallyDrop::new(item), gpu: gpu.clone() }
    }

    /// An idle one that suits, else a new one.
    pub(super) fn take(gpu: &Arc<Gpu>, suits: impl Fn(&T) -> bool, new: impl FnOnce() -> Result<T>) -> Result<Lent<T>> {
        let found = {
            let mut idle = gpu.idle.lock();
            let shelf = T::shelf(&mut idle);
            shelf.iter().rposition(suits).map(|i| shelf.swap_remove(i))
        };
        let item = match found {
            Some(item) => item,
            None => new()?,
        };
        Ok(Lent::of(gpu, item))
    }
}

impl<T: Keep> Deref for Lent<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.item
    }
}

impl<T: Keep> DerefMut for Lent<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.item
    }
}

impl<T: Keep> Drop for Lent<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nobody sees self afterwards.
        let item = unsafe { ManuallyDrop::take(&mut self.item) };
        let Some(item) = item.settle() else { return };
        let mut idle = self.gpu.idle.lock();
        let shelf = T::shelf(&mut idle);
        if item.fits(shelf) {
            shelf.push(item);
        }
    }
}
