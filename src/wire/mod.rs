//! The control protocol: the handshake (`handshake`, `hello`, `keys`), the encrypted stream after it (`session`), messages that
//! set up the channels (`setup`), frames (`frame`), what these two share (`envelope`), and the non-blocking control connection
//! (`control`), which can go on over another socket (`sent`). `join` ties a set-up to an older connection. Keys lie in guarded memory
//! (`secret`). Knows sockets and bytes, nothing of regions, channels or transfers.

mod answers;
pub(crate) mod control;
mod envelope;
pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod hello;
pub(crate) mod join;
pub(crate) mod keys;
mod primitives;
pub(crate) mod queue;
pub(crate) mod secret;
pub(crate) mod sent;
pub(crate) mod session;
pub(crate) mod setup;
pub(crate) mod text;
