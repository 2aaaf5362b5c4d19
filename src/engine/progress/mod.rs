//! Who drives the connections: the progress thread, how it sleeps and is woken, and what it watches.

pub(crate) mod connections;
pub(crate) mod contention;
pub(crate) mod context;
pub(crate) mod counters;
pub(crate) mod doorbell;
pub(crate) mod health;
pub(crate) mod heartbeat;
pub(crate) mod pacing;
pub(crate) mod restoring;
pub(crate) mod table;
pub(crate) mod thread;
