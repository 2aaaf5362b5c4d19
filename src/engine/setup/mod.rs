//! Connection set-up. `machine` is one set-up without sockets, `control` its bytes, `channels` its channels; `driver` joins them
//! with a socket, and `build` makes the connection. `listener`, `acceptor`, `admission`, `accept_queue` and `warmup` serve
//! incoming connections, `dial` and `connect` outgoing ones. A set-up ends in a new connection, or joins one that has lost channels
//! (`restorer`) and keeps what that takes (`lineage`). All set-ups share `context`, `quota` and `shutdown`.

pub(crate) mod accept_queue;
pub(crate) mod acceptor;
mod admission;
pub(crate) mod build;
mod channels;
pub(crate) mod connect;
pub(crate) mod context;
mod control;
pub(crate) mod dial;
pub(crate) mod driver;
pub(crate) mod lineage;
pub(crate) mod listener;
mod local;
pub(crate) mod machine;
mod provided;
pub(crate) mod quota;
mod restorer;
pub(crate) mod shutdown;
pub(crate) mod warmup;
