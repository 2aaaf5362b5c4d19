//! The thread that prepares incoming connections for GPU memory. The CUDA driver may block it for as long as the application
//! copies; the set-up thread does not wait for that. Knows nothing about set-ups.

use super::build;
use super::context::SetupContext;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::Receiver;

/// Connections that may wait for this thread; further ones are prepared with their first chunk.
pub(crate) const WAITING: usize = 256;

/// Runs until the sender is dropped.
pub(crate) fn run(context: &SetupContext, fresh: &Receiver<u64>) {
    for id in fresh {
        let connection = context.table.connections.get(id).filter(|connection| connection.is_up());
        if let (Some(connection), false) = (connection, context.shutdown.begun()) {
            // A panic ends the connection, not this thread.
            if catch_unwind(AssertUnwindSafe(|| build::prepare(context, &connection))).is_err() {
                log::error!("{connection:?}: a panic while it was prepared for GPU memory");
            }
        }
    }
}
