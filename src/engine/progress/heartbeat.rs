//! The thread that says for connections that this side is alive, while those who drive them are kept: by the CUDA driver, where the
//! application copies for seconds, by memory that has to be found, by a plugin. Knows nothing of what keeps them.

use crate::engine::connection::Connection;
use crate::engine::setup::context::SetupContext;
use crate::engine::setup::dial;
use std::time::Duration;

/// Time between two rounds, whatever the peers agreed on.
const ROUND: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Runs until the engine ends.
pub(crate) fn run(context: &SetupContext) {
    // A new connection may be kept from its first moment on.
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
            .map(|connection| keep(connection))
            .min()
            .map_or(most, |soonest| soonest.min(most));
    }
}

/// Has a connection heard of, if its time has come; how soon to look again.
fn keep(connection: &Connection) -> Duration {
    if connection.keep() {
        log::debug!("{connection:?}: a heartbeat left although whoever drives it is kept");
    }
    connection.heartbeat() / 4
}
