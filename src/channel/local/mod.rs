//! The path between two processes of one host: the side where the data goes copies it straight out of the other's memory. Knows nothing
//! of transfers, and of kinds of memory only what `puller` says.

mod closer;
pub(crate) mod cuda;
pub(crate) mod puller;
