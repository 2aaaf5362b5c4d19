//! The receive manager, simulated by a file that `STRICT_FOREIGN_ANSWERS` names. While the file exists, it says what the manager does
//! wrong: words `call` or `call=how`, separated by spaces. The calls are `import`, `rule` and `close` of TCPX, and `init`, `regMr` and `deregMr` of
//! TCPXO, whose `listen` waits for the NIC's offload engine in the same way. Without `how` there is no answer until the file has changed, for which both plugins wait without a limit. `hangup`, `refusal` and
//! `garbage` come at once.

use crate::rules::settings;
use std::fmt;
use std::time::Duration;

/// An answer that is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Hangup,
    Refusal,
    Garbage,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Hangup => "the receive manager has closed the connection",
            Fault::Refusal => "the receive manager refuses",
            Fault::Garbage => "malformed answer from the receive manager",
        })
    }
}

/// Waits for the answer to a call.
pub(crate) fn answer(call: &str) -> Result<(), Fault> {
    let Some(file) = &settings().manager.answers else { return Ok(()) };
    while let Ok(words) = std::fs::read_to_string(file) {
        let how = words.split(' ').find_map(|word| word.strip_prefix(call)).filter(|how| how.is_empty() || how.starts_with('='));
        match how {
            None => break,
            Some("=hangup") => return Err(Fault::Hangup),
            Some("=refusal") => return Err(Fault::Refusal),
            Some("=garbage") => return Err(Fault::Garbage),
            Some(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    Ok(())
}

/// As [`answer`], for TCPX's calls for flow rules and receive memory: it asks again for ever, at full speed, if the manager hangs up.
pub(crate) fn answer_or_spin(call: &str) -> Result<(), Fault> {
    match answer(call) {
        Err(Fault::Hangup) => loop {
            std::hint::spin_loop();
        },
        answer => answer,
    }
}
