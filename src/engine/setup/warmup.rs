//! The thread that has incoming connections ready for memory of GPUs. The driver may keep it for as long as the application copies:
//! whoever brings up connections does not wait for that. Knows nothing of set-ups.

use super::build;
use super::context::SetupContext;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::Receiver;

/// So many connections wait at most; one that comes when there are more gets what it needs with its first chunk.
pub(crate) const WAITING: usize = 256;

/// Runs until nobody names connections any more.
pub(crate) fn run(context: &SetupContext, fresh: &Receiver<u64>) {
    for id in fresh {
        let connection = context.table.connections.get(id).filter(|connection| connection.is_up());
        if let (Some(connection), false) = (connection, context.shutdown.begun()) {
            // A defect ends the connection, and not this thread.
            if catch_unwind(AssertUnwindSafe(|| build::prepare(context, &connection))).is_err() {
                log::error!("{connection:?}: a panic while it was made ready for memory of GPUs");
            }
        }
    }
}
