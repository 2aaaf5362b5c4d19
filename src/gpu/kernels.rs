//! The kernels in their forms, loaded into a context. Knows nothing of what it copies.

use crate::status::{bail, Result};
use cuda_driver::sys::CUfunction;
use cuda_driver::{Context, Module};
use std::sync::Arc;

/// The committed kernels: machine code for Hopper, PTX that the driver compiles for anything from Ampere on.
const CUBIN_SM90: &[u8] = include_bytes!("kernels/copy.sm_90.cubin");
const PTX_SM80: &str = concat!(include_str!("kernels/copy.sm_80.ptx"), "\0");
const PULL_CUBIN_SM90: &[u8] = include_bytes!("kernels/pull.sm_90.cubin");
const PULL_PTX_SM80: &str = concat!(include_str!("kernels/pull.sm_80.ptx"), "\0");

/// The kernels of a context.
pub(super) struct Kernels {
    /// The copy kernel, by size of its parameters.
    pub(super) small: CUfunction,
    pub(super) large: CUfunction,
    /// The pull kernel, and the one for a few short pieces.
    pub(super) pull: CUfunction,
    pub(super) few: CUfunction,
    /// Launches may overlap: the machine code for Hopper says when the next one may start, and ends in order.
    pub(super) overlap: bool,
    _modules: [Module; 2],
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
        let (copy, pull) = if overlap { (CUBIN_SM90, PULL_CUBIN_SM90) } else { (PTX_SM80.as_bytes(), PULL_PTX_SM80.as_bytes()) };
        // SAFETY: complete cubins, or PTX that ends in a NUL.
        let (copy, pull) = unsafe { (Module::load(context, copy)?, Module::load(context, pull)?) };
        let (small, large) = (copy.function(c"uccl_copy_1k")?, copy.function(c"uccl_copy_4k")?);
        let (many, few) = (pull.function(c"uccl_pull")?, pull.function(c"uccl_pull_few")?);
        Ok(Kernels { small, large, pull: many, few, overlap, _modules: [copy, pull] })
    }
}
