//! Opens the CUDA driver, and distinguishes a missing driver from one that fails. Every call goes through [`Relaxed`].
//! Knows nothing of contexts.

use crate::error::{Error, Result};
use crate::sys::{self, Functions};
use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL, RTLD_NOW};
use process::{Mutex, PerProcess};
use std::ffi::{c_int, c_uint, c_void, CStr};
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The driver's name at run time. `libcuda.so` is for linking: with a toolkit installed it may be a stub.
const LIBRARY: &str = "libcuda.so.1";
/// Exists once the driver's kernel module is loaded.
const KERNEL_DRIVER: &str = "/dev/nvidiactl";

/// The initialised driver.
pub struct Driver {
    functions: Functions,
    devices: i32,
    /// The process that initialised it.
    generation: u64,
}

/// Why no driver can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absence {
    /// No driver is installed, or it sees no GPU: this process has no GPU memory.
    NoGpu(String),
    /// A driver is installed and fails: this process may have GPU memory, and nothing can tell.
    Failing(String),
    /// The parent initialised the driver before the fork: CUDA does not work in the child, and the child has no GPU memory.
    Forked,
}

impl From<Absence> for Error {
    fn from(absence: Absence) -> Error {
        match absence {
            Absence::NoGpu(why) => Error::Unavailable(why),
            Absence::Failing(why) => Error::Unavailable(format!("the CUDA driver fails: {why}")),
            Absence::Forked => {
                Error::Unavailable("CUDA was in use before this process was forked, so it does not work here".into())
            }
        }
    }
}

/// Set once, and never freed.
static DRIVER: AtomicPtr<Driver> = AtomicPtr::new(std::ptr::null_mut());
/// The last reason for having no driver.
static ABSENT: PerProcess<Mutex<Option<Absence>>> = PerProcess::new(Mutex::default);

fn known() -> Option<std::result::Result<&'static Driver, Absence>> {
    // SAFETY: null, or a driver that was leaked.
    let driver = unsafe { DRIVER.load(Ordering::Acquire).as_ref() }?;
    Some(if driver.generation == process::generation() { Ok(driver) } else { Err(Absence::Forked) })
}

/// The driver, or why there is none. Creates no context.
pub fn driver() -> std::result::Result<&'static Driver, Absence> {
    if let Some(known) = known() {
        return known;
    }
    let mut absent = ABSENT.get().lock();
    if let Some(known) = known() {
        return known;
    }
    if let Some(known) = &*absent {
        // The application may have loaded a driver from its own folder since.
        let later = matches!(known, Absence::NoGpu(why) if why == NOT_INSTALLED) && is_loaded(LIBRARY);
        if !later {
            return Err(known.clone());
        }
    }
    match open(LIBRARY, Path::new(KERNEL_DRIVER)) {
        Ok(driver) => {
            let driver = Box::leak(Box::new(driver));
            DRIVER.store(driver, Ordering::Release);
            Ok(driver)
        }
        Err(why) => {
            if let Absence::Failing(why) = &why {
                log::warn!("the CUDA driver fails: {why}; memory cannot be registered");
            }
            *absent = Some(why.clone());
            Err(why)
        }
    }
}

/// Whether the driver works and sees at least one GPU. Creates no context.
pub fn available() -> bool {
    driver().is_ok()
}

/// GPUs the driver sees; 0 without a driver.
pub fn device_count() -> i32 {
    driver().map_or(0, |d| d.devices)
}

const NOT_INSTALLED: &str = "the CUDA driver library (libcuda.so.1) is not installed";

fn is_loaded(library: &str) -> bool {
    // SAFETY: RTLD_NOLOAD loads nothing; the drop releases the reference just taken.
    process::without_fork(|| unsafe { Library::open(Some(library), RTLD_LAZY | libc::RTLD_NOLOAD) }.is_ok())
}

/// Opens and initialises a driver library: the loaded one of that name, or else the one that the loader finds.
fn open(name: &str, kernel_driver: &Path) -> std::result::Result<Driver, Absence> {
    // An opened driver stays loaded, whatever its result.
    let library: &'static Library = Box::leak(Box::new(load(name)?));
    // SAFETY: the library stays open, and has the name of the CUDA driver.
    let functions = unsafe { Functions::load(|name| symbol(library, name)) };
    let mut devices: c_int = 0;
    // SAFETY: cuInit takes 0 and makes no context; the output is writable.
    let ready = unsafe { functions.cuInit(0).and_then(|()| functions.cuDeviceGetCount(&mut devices)) };
    match ready {
        Ok(()) if devices > 0 => Ok(Driver { functions, devices, generation: process::generation() }),
        Ok(()) => Err(Absence::NoGpu("the CUDA driver sees no GPU".into())),
        Err(e) if e.code() == sys::ERROR_NO_DEVICE => Err(Absence::NoGpu(format!("the CUDA driver sees no GPU: {e}"))),
        Err(e) if e.code() == sys::ERROR_NOT_INITIALIZED => Err(Absence::Forked),
        Err(e) if e.code() == sys::ERROR_STUB_LIBRARY => {
            let why = format!("{} is a stub of the CUDA toolkit; remove its folder from LD_LIBRARY_PATH", path_of(library, name));
            // Without the kernel module there is no GPU, whatever libraries are installed.
            Err(if kernel_driver.exists() { Absence::Failing(why) } else { Absence::NoGpu(why) })
        }
        Err(e) => Err(Absence::Failing(format!("{}: {e}", path_of(library, name)))),
    }
}

fn load(name: &str) -> std::result::Result<Library, Absence> {
    // SAFETY: a driver's initialisers have no requirements.
    let open = |flags| process::without_fork(|| unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL | flags) });
    open(libc::RTLD_NOLOAD).or_else(|_| open(0)).map_err(|why| {
        let why = why.to_string();
        // Another text names a missing dependency of the driver, or a file that is not a library.
        match why.starts_with(&format!("{name}: cannot open shared object file: No such file")) {
            true => Absence::NoGpu(NOT_INSTALLED.into()),
            false => Absence::Failing(why),
        }
    })
}

/// The address of a library's function; null if it has none.
pub(crate) fn symbol(library: &Library, name: &CStr) -> *mut c_void {
    // SAFETY: only the address is taken; `library` is open.
    unsafe { library.get::<*mut c_void>(name.to_bytes_with_nul()) }.map_or(std::ptr::null_mut(), |found| found.as_raw_ptr())
}

/// The file that a library was loaded from.
fn path_of(library: &Library, name: &str) -> String {
    // SAFETY: plain data, for which zeros are valid.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    let symbol = symbol(library, c"cuInit");
    // SAFETY: an address of this process, a writable output; the file's name lives as long as the library.
    unsafe {
        if !symbol.is_null() && libc::dladdr(symbol, &mut info) != 0 && !info.dli_fname.is_null() {
            return CStr::from_ptr(info.dli_fname).to_string_lossy().into_owned();
        }
    }
    name.to_owned()
}

impl Driver {
    /// The number of visible GPUs, at least one.
    pub fn devices(&self) -> i32 {
        self.devices
    }

    /// Access to the driver's functions.
    pub fn relaxed(&'static self) -> Relaxed {
        let mut mode: c_uint = sys::CAPTURE_RELAXED;
        // SAFETY: the mode is writable, and this thread's own.
        let changed = unsafe { self.functions.cuThreadExchangeStreamCaptureMode(&mut mode) }.is_ok();
        Relaxed { functions: &self.functions, before: changed.then_some(mode), _of_this_thread: PhantomData }
    }
}

/// While it lives, this thread's calls neither fail because another thread captures a CUDA graph nor invalidate that capture.
/// Dropping it restores the thread's mode.
pub struct Relaxed {
    functions: &'static Functions,
    before: Option<c_uint>,
    _of_this_thread: PhantomData<*const ()>,
}

impl Deref for Relaxed {
    type Target = Functions;

    fn deref(&self) -> &Functions {
        self.functions
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Some(mut mode) = self.before {
            // SAFETY: the mode is writable, and one that the driver gave.
            let _ = unsafe { self.functions.cuThreadExchangeStreamCaptureMode(&mut mode) };
        }
    }
}

/// The functions, for calls that need no context.
pub(crate) fn functions() -> Result<Relaxed> {
    Ok(driver()?.relaxed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::process::Command;

    /// A simulated driver library with given results of cuInit and cuDeviceGetCount.
    fn simulated(name: &str, init: u32, devices: i32) -> String {
        let dir = std::env::temp_dir().join(format!("cuda-driver-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("folder");
        let (source, library) = (dir.join(format!("{name}.c")), dir.join(format!("lib{name}.so")));
        let text = format!(
            "int cuInit(unsigned f) {{ return {init}; }}\nint cuDeviceGetCount(int *n) {{ *n = {devices}; return 0; }}\n"
        );
        std::fs::write(&source, text).expect("source");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().expect("cc");
        assert!(built.success());
        library.to_str().expect("path").to_owned()
    }

    fn answer(library: &str, kernel_driver: &str) -> std::result::Result<i32, Absence> {
        open(library, &PathBuf::from(kernel_driver)).map(|d| d.devices)
    }

    #[test]
    fn a_simulated_driver_that_fails_is_not_a_machine_without_gpu() {
        let failing = |r| matches!(r, Err(Absence::Failing(why)) if why.contains("999") && why.contains("libbroken.so"));
        assert!(failing(answer(&simulated("broken", 999, 1), "/nonexistent")));
        let stub = simulated("stub", sys::ERROR_STUB_LIBRARY, 1);
        assert!(matches!(answer(&stub, "/dev/null"), Err(Absence::Failing(why)) if why.contains("stub")));
        assert!(matches!(answer(&stub, "/nonexistent"), Err(Absence::NoGpu(why)) if why.contains("stub")));
        assert!(matches!(answer(&simulated("hidden", sys::ERROR_NO_DEVICE, 0), "/dev/null"), Err(Absence::NoGpu(_))));
        assert!(matches!(answer(&simulated("none", 0, 0), "/dev/null"), Err(Absence::NoGpu(_))));
        assert_eq!(answer(&simulated("two", 0, 2), "/dev/null"), Ok(2));
        assert_eq!(answer(&simulated("forked", sys::ERROR_NOT_INITIALIZED, 2), "/dev/null"), Err(Absence::Forked));
    }

    #[test]
    fn a_missing_library_is_no_gpu_and_a_broken_file_is_a_failure() {
        assert_eq!(answer("libcuda-that-is-missing.so.1", "/dev/null"), Err(Absence::NoGpu(NOT_INSTALLED.into())));
        let file = std::env::temp_dir().join(format!("libcuda-no-library-{}", std::process::id()));
        std::fs::write(&file, "no library").expect("file");
        assert!(matches!(answer(file.to_str().expect("path"), "/dev/null"), Err(Absence::Failing(_))));
        std::fs::remove_file(file).expect("removed");
    }

    #[test]
    fn functions_that_a_simulated_driver_lacks_fail_when_called() {
        let driver = open(&simulated("small", 0, 1), Path::new("/dev/null")).expect("driver");
        // SAFETY: the stand-in reads nothing.
        let result = unsafe { driver.functions.cuMemFree(0) };
        assert!(matches!(result, Err(Error::Call { call: "cuMemFree", code: sys::ERROR_NOT_FOUND, .. })), "{result:?}");
    }
}
