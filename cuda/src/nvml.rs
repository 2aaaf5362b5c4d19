//! The link between two GPUs, of which CUDA may show this process only one: from NVML, if installed. Creates no context.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use process::PerProcess;
use std::ffi::{c_char, c_int, c_uint, c_void, CString};

/// Status and kind of NVML's answers: NVML_SUCCESS, NVML_P2P_STATUS_OK, NVML_P2P_CAPS_INDEX_READ and _NVLINK.
const SUCCESS: c_int = 0;
const OK: c_uint = 0;
const READ: c_uint = 0;
const NVLINK: c_uint = 2;

type Device = *mut c_void;

type Init = unsafe extern "C" fn() -> c_int;
type ByUuid = unsafe extern "C" fn(*const c_char, *mut Device) -> c_int;
type P2p = unsafe extern "C" fn(Device, Device, c_uint, *mut c_uint) -> c_int;

/// The NVML functions in use. NVML stays loaded.
#[derive(Clone, Copy)]
struct Nvml {
    by_uuid: ByUuid,
    p2p: P2p,
}

impl Nvml {
    fn load() -> Option<Nvml> {
        // SAFETY: NVML's initialisers have no requirements.
        let library =
            process::without_fork(|| unsafe { Library::open(Some("libnvidia-ml.so.1"), RTLD_NOW | RTLD_LOCAL) }).ok()?;
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: these are the signatures of NVML, which promises to keep them; the library stays open.
        unsafe {
            let init = library.get::<Init>(b"nvmlInit_v2\0").ok()?;
            let by_uuid = *library.get::<ByUuid>(b"nvmlDeviceGetHandleByUUID\0").ok()?;
            let p2p = *library.get::<P2p>(b"nvmlDeviceGetP2PStatus\0").ok()?;
            (init() == SUCCESS).then_some(Nvml { by_uuid, p2p })
        }
    }

    fn device(&self, uuid: &[u8; 16]) -> Option<Device> {
        let name = CString::new(name_of(uuid)).ok()?;
        let mut device = std::ptr::null_mut();
        // SAFETY: a terminated name, a writable output.
        let result = unsafe { (self.by_uuid)(name.as_ptr(), &mut device) };
        (result == SUCCESS).then_some(device)
    }

    fn says_yes(&self, (a, b): (Device, Device), what: c_uint) -> Option<bool> {
        let mut status = c_uint::MAX;
        // SAFETY: handles of NVML, a writable output.
        let result = unsafe { (self.p2p)(a, b, what, &mut status) };
        (result == SUCCESS).then_some(status == OK)
    }
}

/// NVML's name of a GPU.
fn name_of(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Whether NVLink connects two GPUs of this host that reach each other's memory; `None` if unknown.
pub fn joined_by_nvlink(a: &[u8; 16], b: &[u8; 16]) -> Option<bool> {
    static NVML: PerProcess<Option<Nvml>> = PerProcess::new(Nvml::load);
    let nvml = (*NVML.get())?;
    let pair = (nvml.device(a)?, nvml.device(b)?);
    nvml.says_yes(pair, READ)?.then(|| nvml.says_yes(pair, NVLINK))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_have_their_usual_names() {
        let uuid = std::array::from_fn(|i| i as u8 * 17);
        assert_eq!(name_of(&uuid), "GPU-00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(joined_by_nvlink(&[0; 16], &uuid), None);
    }
}
