//! Page-aligned host memory of a channel: staging rings and discard buffers. Knows nothing of its content.

use crate::status::{bail, Result};
use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ptr::NonNull;

pub(crate) use nccl_net_abi::PAGE;

/// A zeroed, page-aligned block.
pub(crate) struct HostBlock {
    ptr: NonNull<u8>,
    layout: Layout,
}
// SAFETY: plain memory, owned.
unsafe impl Send for HostBlock {}

impl HostBlock {
    pub(crate) fn new(len: usize) -> Result<HostBlock> {
        let Ok(layout) = Layout::from_size_align(len.max(1).next_multiple_of(PAGE), PAGE) else {
            bail!(Resource, "a block of {len} bytes is impossible")
        };
        if process::ensure_space(layout.size()).is_err() {
            bail!(Resource, "no {len} bytes for staging: the address space (ulimit -v) or the host's memory is exhausted")
        }
        // SAFETY: the layout's size is not 0.
        let Some(ptr) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { bail!(Resource, "no {len} bytes for staging") };
        Ok(HostBlock { ptr, layout })
    }
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}
