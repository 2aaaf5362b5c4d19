//! The thread that sends heartbeats for connections whose own threads are blocked: in the CUDA driver while the application
//! copies for seconds, in a page fault, in a plugin. Knows nothing about what blocks them.

use crate::engine::connection::Connection;
use crate::engine::setup::context::SetupContext;
use crate::engine::setup::dial;
use std::time::Duration;

/// Bounds of the time between two rounds.
const ROUND: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Runs until the engine ends.
pub(crate) fn run(context: &SetupContext) {
    // A new connection may be blocked from its first moment on.
    let most = context.config.peer_timeout / 12;
    let mut pause = most;
    loop {
        let wait = pause.clamp(ROUND.0, ROUND.1);
        match dial::poll(&[(context.shutdown.fd(), libc::POLLIN)], wait) {
            Ok(ready) if ready[0] => return,
            Ok(_) => {}
            Err(_) => std::thread::sleep(wait),
        }
        pause = context
            .table
            .connections
            .all()
            .iter()
            .map(|connection| keep_alive(connection))
            .min()
            .map_or(most, |soonest| soonest.min(most));
    }
}

/// Sends a heartbeat if one is overdue; returns how soon to check again.
fn keep_alive(connection: &Connection) -> Duration {
    if connection.keep_alive() {
        log::debug!("{connection:?}: sent a heartbeat although the thread that drives the connection is blocked");
    }
    connection.heartbeat() / 4
}
