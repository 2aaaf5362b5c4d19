//! Free allocations that wait for their next user. Freeing memory would wait for all work of the GPU, including the application's, and
//! block every other call to the driver meanwhile; so an allocation is kept until the process ends, and reused. Knows nothing of the
//! memory's use.

use crate::context::Context;
use crate::pointer::attribute;
use crate::sys::{self, Functions};
use process::{Mutex, PerProcess};
use std::sync::Arc;

/// How memory was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    /// By `cuMemHostAlloc`, portable: usable in every context.
    Pinned,
    /// By `cuMemAlloc`.
    Device,
}

/// An allocation, with the context it belongs to.
#[derive(Clone)]
pub(crate) struct Kept {
    pub(crate) context: Arc<Context>,
    pub(crate) at: u64,
    pub(crate) len: usize,
    pub(crate) sort: Sort,
}

impl Kept {
    /// Whether the driver still knows it.
    pub(crate) fn is_known(&self, cuda: &Functions) -> bool {
        let expected = if self.sort == Sort::Pinned { sys::MEMORYTYPE_HOST } else { sys::MEMORYTYPE_DEVICE };
        let mut kind = 0u32;
        attribute(cuda, sys::POINTER_MEMORY_TYPE, self.at, &mut kind) == Ok(true) && kind == expected
    }
}

static CACHE: PerProcess<Mutex<Vec<Kept>>> = PerProcess::new(Mutex::default);

/// Puts an unused allocation back.
pub(crate) fn put(kept: Kept) {
    CACHE.get().lock().push(kept);
}

/// An allocation of exactly this length that `context` can use. The last one put back is taken first: it may still be in the CPU's
/// caches.
pub(crate) fn take(cuda: &Functions, context: &Context, len: usize, sort: Sort) -> Option<Kept> {
    let suits = |k: &Kept| k.len == len && k.sort == sort && (sort == Sort::Pinned || k.context.id() == context.id());
    loop {
        let kept = {
            let mut cache = CACHE.get().lock();
            let i = cache.iter().rposition(suits)?;
            cache.swap_remove(i)
        };
        // If the application has reset its GPU or destroyed the context, the memory no longer exists.
        if kept.is_known(cuda) {
            return Some(kept);
        }
    }
}
