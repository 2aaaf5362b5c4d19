//! The boundary to the network: NCCL net plugins (`plugin`, with their `table`s and `traits`), comms whose types keep the rules
//! of the plugin contract (`comm`), the set-up of channels (`setup`), and the host's interfaces (`topology`, `links`). The ABI itself is
//! crate `nccl-net-abi`. Knows nothing of transfers, and of GPUs only that a plugin may need one to be current.

pub(crate) mod comm;
pub mod device;
mod handle;
pub(crate) mod links;
mod loads;
pub(crate) mod pairing;
mod pending;
pub mod plugin;
mod plugin_log;
pub(crate) mod plugin_thread;
pub(crate) mod registrations;
mod rxdm;
mod search;
pub(crate) mod secure;
pub(crate) mod setup;
pub(crate) mod signals;
mod sockets;
mod table;
mod tcpxo;
#[cfg(test)]
mod tests;
pub(crate) mod topology;
pub mod traits;

use crate::status::Result;
use std::sync::Arc;

/// A GPU that some plugins need to be current in the calling thread.
pub(crate) trait OnGpu: Send + Sync {
    /// Runs `body` with the GPU current and restores the previous one. An error means that `body` may not have run.
    fn on(&self, body: &mut dyn FnMut()) -> Result<()>;
    /// Its PCI address, if known.
    fn address(&self) -> Option<String>;
}

/// The GPU that must be current in a plugin's calls; `None` for host memory, and for plugins that take the GPU from each request.
pub(crate) type Scope = Option<Arc<dyn OnGpu>>;

/// Runs `body` with the GPU of `scope` current.
pub(crate) fn within<R>(scope: &Scope, body: impl FnOnce() -> Result<R>) -> Result<R> {
    let Some(gpu) = scope else { return body() };
    let mut body = Some(body);
    let mut result = None;
    gpu.on(&mut || {
        if let Some(body) = body.take() {
            result = Some(body());
        }
    })?;
    result.unwrap_or_else(|| Err(crate::status::err!(Internal, "a GPU scope did not run its body")))
}
