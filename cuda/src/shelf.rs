//! Memory that waits for its next user. Freeing it would wait for all work of the GPU, the application's included, and hold up every
//! other call to the driver meanwhile; so what was once taken is kept until the process ends, and taken again. Knows nothing of what
//! the memory is for.

use crate::context::Context;
use crate::pointer::attribute;
use crate::sys::{self, Functions};
use process::{Mutex, PerProcess};
use std::sync::Arc;

/// How memory was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    /// By `cuMemHostAlloc`, portable: of use in every context.
    Pinned,
    /// By `cuMemAlloc`.
    Device,
}

/// An allocation, with the context that it lives as long as.
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

static SHELF: PerProcess<Mutex<Vec<Kept>>> = PerProcess::new(Mutex::default);

/// Puts an allocation back that nobody uses any more.
pub(crate) fn put(kept: Kept) {
    SHELF.get().lock().push(kept);
}

/// An allocation of exactly this length that `context` can use. The last one put back is taken first: the CPU's caches know it.
pub(crate) fn take(cuda: &Functions, context: &Context, len: usize, sort: Sort) -> Option<Kept> {
    let suits = |k: &Kept| k.len == len && k.sort == sort && (sort == Sort::Pinned || k.context.id() == context.id());
    loop {
        let kept = {
            let mut shelf = SHELF.get().lock();
            let i = shelf.iter().rposition(suits)?;
            shelf.swap_remove(i)
        };
        // Where the application has reset its GPU or destroyed the context, the memory is gone.
        if kept.is_known(cuda) {
            return Some(kept);
        }
    }
}
