//! Loads the plugin, uses it and unloads it, as NCCL and the bootstrap code of frameworks do.

use std::ffi::{c_void, CString};
use std::path::PathBuf;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

use nccl_net_abi::{ncclNetDeviceHandle_v7, ncclNet_v7, ucclNetExt_v2, NCCL_NET_HANDLE_MAXSIZE, NCCL_SUCCESS};

/// The shared object, built from the current sources: cargo does not build it for the tests of its package.
fn object() -> CString {
    let mut path: PathBuf = std::env::current_exe().expect("a path");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--quiet", "--package", "soft-plugin-so"])
        .arg("--target-dir")
        .arg(path.parent().expect("a target directory"));
    if path.ends_with("release") {
        build.arg("--release");
    }
    // Variables of this test's package: a build script that reads one would run again, here and in the next build without it.
    let of_the_package = |name: &str| ["CARGO_PKG_", "CARGO_MANIFEST_", "OUT_DIR"].iter().any(|prefix| name.starts_with(prefix));
    for (name, _) in std::env::vars().filter(|(name, _)| of_the_package(name)) {
        build.env_remove(name);
    }
    assert!(build.status().expect("cargo").success());
    CString::new(path.join("libnccl_net_tcpx_soft.so").to_str().expect("UTF-8")).expect("no NUL")
}

fn symbol<T>(library: *mut c_void, name: &[u8]) -> &'static T {
    // SAFETY: a live library, a terminated name; the symbol is a table of that type.
    unsafe { libc::dlsym(library, name.as_ptr().cast()).cast::<T>().as_ref() }.expect("the symbol")
}

/// Connects two comms, moves a message of host memory through them, and closes everything.
fn use_it(net: &ncclNet_v7) {
    let mut handle = [0u8; NCCL_NET_HANDLE_MAXSIZE];
    let (mut listener, mut sender, mut receiver): (*mut c_void, *mut c_void, *mut c_void) =
        (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: plain data for which zeros are valid.
    let mut device: ncclNetDeviceHandle_v7 = unsafe { std::mem::zeroed() };
    let start = Instant::now();
    // SAFETY: live buffers and comms, in the order of the contract.
    unsafe {
        assert_eq!(net.init.unwrap()(None), NCCL_SUCCESS);
        assert_eq!(net.listen.unwrap()(0, handle.as_mut_ptr().cast(), &mut listener), NCCL_SUCCESS);
        while sender.is_null() || receiver.is_null() {
            assert!(start.elapsed() < Duration::from_secs(60), "hang");
            let mut target: *mut ncclNetDeviceHandle_v7 = &mut device;
            if sender.is_null() {
                assert_eq!(net.connect.unwrap()(0, handle.as_mut_ptr().cast(), &mut sender, ptr::null_mut()), NCCL_SUCCESS);
            }
            if receiver.is_null() {
                assert_eq!(net.accept.unwrap()(listener, &mut receiver, &mut target), NCCL_SUCCESS);
            }
        }
        assert_eq!(net.closeSend.unwrap()(sender), NCCL_SUCCESS);
        assert_eq!(net.closeRecv.unwrap()(receiver), NCCL_SUCCESS);
        assert_eq!(net.closeListen.unwrap()(listener), NCCL_SUCCESS);
    }
}

fn load(object: &CString, flags: i32) -> *mut c_void {
    // SAFETY: a terminated path; loading runs no initialisers of the plugin.
    unsafe { libc::dlopen(object.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | flags) }
}

#[test]
fn it_stays_mapped_after_dlclose() {
    std::env::set_var("NCCL_SOCKET_IFNAME", "lo");
    std::env::set_var("UCCL_TCPX_SOFT_SPIN_US", "2000");
    let object = object();
    for round in 0..3 {
        let library = load(&object, 0);
        assert!(!library.is_null(), "{object:?} cannot be loaded");
        assert_eq!(symbol::<ucclNetExt_v2>(library, nccl_net_abi::SYMBOL_EXT).size, size_of::<ucclNetExt_v2>());
        if round > 0 {
            use_it(symbol(library, nccl_net_abi::SYMBOL_V7));
        }
        // SAFETY: this program uses nothing of the library afterwards.
        assert_eq!(unsafe { libc::dlclose(library) }, 0);
        assert!(!load(&object, libc::RTLD_NOLOAD).is_null(), "the code is gone");
        // The plugin's threads stop polling and sleep. This crashes if their code is unmapped.
        std::thread::sleep(Duration::from_millis(50));
    }
}
