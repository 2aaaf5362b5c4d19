//! The receive manager, for whose answers TCPX waits without a limit. `STRICT_FOREIGN_FROZEN` names a file: while it exists, the calls
//! whose names it holds (`import`, `rule`, `close`) get no answer.

use crate::rules::settings;
use std::time::Duration;

/// Waits for the answer to a call.
pub(crate) fn answer(call: &str) {
    let Some(file) = &settings().manager.frozen else { return };
    while std::fs::read_to_string(file).is_ok_and(|calls| calls.split(' ').any(|frozen| frozen == call)) {
        std::thread::sleep(Duration::from_millis(1));
    }
}
