//! A table from version 11 on with the context of its user. Knows nothing of what a table does.

use std::ffi::c_void;
use std::ops::Deref;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A table, and the context that its `init` wrote. The plugin gets it back at every listen and connect. A forked child has the
/// parent's, as it has the parent's plugin.
pub(super) struct WithContext<T: 'static> {
    table: &'static T,
    context: AtomicPtr<c_void>,
}

impl<T> WithContext<T> {
    pub(super) fn new(table: &'static T) -> WithContext<T> {
        WithContext { table, context: AtomicPtr::default() }
    }

    pub(super) fn context(&self) -> *mut c_void {
        self.context.load(Ordering::Acquire)
    }

    pub(super) fn set_context(&self, context: *mut c_void) {
        self.context.store(context, Ordering::Release);
    }
}

impl<T> Deref for WithContext<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.table
    }
}
