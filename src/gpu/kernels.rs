//! The copy kernel in its forms, loaded into a context. Knows nothing of what it copies.

use crate::status::{bail, Result};
use cuda_driver::sys::CUfunction;
use cuda_driver::{Context, Module};
use std::sync::Arc;

/// The committed kernels: machine code for Hopper, PTX that the driver compiles for anything from Ampere on.
const CUBIN_SM90: &[u8] = include_bytes!("kernels/copy.sm_90.cubin");
const PTX_SM80: &str = concat!(include_str!("kernels/copy.sm_80.ptx"), "\0");

/// The copy kernel, by size of its parameters.
pub(super) struct Kernels {
    pub(super) small: CUfunction,
    pub(super) large: CUfunction,
    /// Launches may overlap: the machine code for Hopper says when the next one may start, and ends in order.
    pub(super) overlap: bool,
    _module: Module,
}
// SAFETY: functions are handles that the driver lets any thread use.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    pub(super) fn load(context: &Arc<Context>) -> Result<Kernels> {
        let major = context.compute_major()?;
        if major < 8 {
            bail!(Unsupported, "GPU {} has compute capability {major}.x; the kernels need 8.0", context.bdf()?);
        }
        let overlap = major == 9;
        let image = if overlap { CUBIN_SM90 } else { PTX_SM80.as_bytes() };
        // SAFETY: a complete cubin, or PTX that ends in a NUL.
        let module = unsafe { Module::load(context, image) }?;
        let (small, large) = (module.function(c"uccl_copy_1k")?, module.function(c"uccl_copy_4k")?);
        Ok(Kernels { small, large, overlap, _module: module })
    }
}
