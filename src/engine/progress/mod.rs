//! Who drives the connections: the engine's thread, who sleeps and who wakes it, and what is watched meanwhile.

pub(crate) mod connections;
pub(crate) mod contention;
pub(crate) mod context;
pub(crate) mod counters;
pub(crate) mod doorbell;
pub(crate) mod health;
pub(crate) mod heartbeat;
pub(crate) mod pacing;
pub(crate) mod table;
pub(crate) mod thread;
