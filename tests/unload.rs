//! A program that loads libuccl_p2p.so, uses it and unloads it, as plugins of other programs do: its threads and its handler of forks
//! must not be left without their code.

use std::ffi::{c_char, c_int, c_void, CString};
use std::time::Duration;

/// The shared object that cargo built for this test.
fn object() -> CString {
    let this = std::env::current_exe().expect("this program");
    let deps = this.parent().expect("folder");
    let found = [deps.join("libuccl_p2p.so"), deps.join("../libuccl_p2p.so")].into_iter().find(|p| p.exists());
    CString::new(found.expect("libuccl_p2p.so: cargo build").to_str().expect("UTF-8")).expect("no NUL")
}

fn load(object: &CString, flags: c_int) -> *mut c_void {
    // SAFETY: a terminated path; the library's initialisers may run at any time.
    unsafe { libc::dlopen(object.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | flags) }
}

fn function(library: *mut c_void, name: &str) -> *mut c_void {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: a live library, a terminated name.
    let at = unsafe { libc::dlsym(library, name.as_ptr()) };
    assert!(!at.is_null(), "{name:?}");
    at
}

fn use_it(library: *mut c_void) {
    // SAFETY: the signatures of include/uccl_engine.h; the engine is destroyed once.
    unsafe {
        let create: unsafe extern "C" fn(c_int, bool) -> *mut c_void =
            std::mem::transmute(function(library, "uccl_engine_create"));
        let destroy: unsafe extern "C" fn(*mut c_void) = std::mem::transmute(function(library, "uccl_engine_destroy"));
        let error: unsafe extern "C" fn() -> *const c_char = std::mem::transmute(function(library, "uccl_engine_last_error"));
        let engine = create(1, false);
        assert!(!engine.is_null(), "{:?}", std::ffi::CStr::from_ptr(error()));
        destroy(engine);
    }
}

#[test]
fn it_stays_mapped_after_dlclose() {
    std::env::set_var("NCCL_SOCKET_IFNAME", "lo");
    std::env::set_var("UCCL_TCPX_PLUGIN", "soft");
    let object = object();
    for round in 0..3 {
        let library = load(&object, 0);
        assert!(!library.is_null(), "{object:?} cannot be loaded");
        if round > 0 {
            // In a thread that ends: its thread-local destructors do not keep the library loaded.
            let library = library as usize;
            std::thread::spawn(move || use_it(library as *mut c_void)).join().expect("used");
        }
        // SAFETY: nothing of the library is used afterwards, by this program.
        assert_eq!(unsafe { libc::dlclose(library) }, 0);
        let still = load(&object, libc::RTLD_NOLOAD);
        assert!(!still.is_null(), "the code was unmapped");
        // SAFETY: as above.
        unsafe { libc::dlclose(still) };
        std::thread::sleep(Duration::from_millis(50));
        // The handler of forks is still there.
        // SAFETY: the child does nothing but leave.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            assert_eq!(status, 0, "the child died");
        }
    }
}
