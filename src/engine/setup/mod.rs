//! Connection set-up. `machine` is one set-up without sockets, `control` its bytes, `channels` its channels; `driver` joins them
//! with a socket, and `build` makes the connection. `listener`, `acceptor`, `admission`, `accept_queue` and `warmup` serve
//! incoming connections, `dial` and `connect` outgoing ones. All set-ups share `context`, `quota` and `shutdown`.

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
pub(crate) mod listener;
mod local;
pub(crate) mod machine;
pub(crate) mod quota;
pub(crate) mod shutdown;
pub(crate) mod warmup;
