//! Each version's table against a plugin in C (`tests/plugins/net_table.c`) that checks every argument: real shared objects, found and driven as
//! the engine does.

use super::{find, Answer, NetTable, Properties};
use nccl_net_abi as abi;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::ptr::null_mut;

/// The plugin's shared object, removed again once it is loaded.
struct Object(PathBuf);

impl Object {
    fn build(name: &str, defines: &[String]) -> Object {
        let out = Object(std::env::temp_dir().join(format!("uccl-table-{name}-{}.so", std::process::id())));
        let root = env!("CARGO_MANIFEST_DIR");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I"]).arg(format!("{root}/net-abi/tests"));
        cc.args(defines.iter().map(|d| format!("-D{d}"))).arg("-o").arg(&out.0).arg(format!("{root}/tests/plugins/net_table.c"));
        assert!(cc.status().expect("a C compiler").success(), "{defines:?}");
        out
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A loaded plugin.
struct Loaded {
    library: &'static libloading::Library,
    table: &'static dyn NetTable,
}

impl Loaded {
    fn new(name: &str, defines: &[String]) -> Loaded {
        let object = Object::build(name, defines);
        // SAFETY: our own object, without initialisers; it is never unloaded.
        let library: &'static _ = Box::leak(Box::new(unsafe { libloading::Library::new(&object.0) }.expect("loads")));
        // SAFETY: a NCCL net plugin that is never unloaded.
        Loaded { library, table: unsafe { find(library) }.expect("a table") }
    }

    /// The last size that a call of the plugin had.
    fn last_size(&self) -> usize {
        // SAFETY: a size_t of the plugin's, which no other thread changes.
        unsafe { **self.library.get::<*const usize>(b"net_table_last_size").expect("symbol") }
    }
}

fn ok(answer: Answer) {
    assert_eq!(answer, Some(abi::NCCL_SUCCESS));
}

/// A connected pair of comms, with what each has registered.
struct Pair {
    table: &'static dyn NetTable,
    /// Each end's comm and registration.
    ends: [(*mut c_void, *mut c_void); 2],
    listen: *mut c_void,
}

impl Pair {
    /// Listens, connects, accepts, and registers `size` bytes of each memory.
    ///
    /// # Safety
    /// The plugin touches no byte of memory beyond what is allocated.
    unsafe fn new(table: &'static dyn NetTable, memory: [*mut c_void; 2], size: usize) -> Pair {
        let mut handle = [0u8; abi::NCCL_NET_HANDLE_MAXSIZE];
        // SAFETY: plain data that the plugin fills.
        let mut dev_handle: abi::ncclNetDeviceHandle_v7 = unsafe { std::mem::zeroed() };
        let (mut listen, mut send, mut recv) = (null_mut(), null_mut(), null_mut());
        let handle = handle.as_mut_ptr().cast();
        // SAFETY: live comms, writable outputs, the order of the contract.
        unsafe {
            ok(table.listen(0, handle, &mut listen));
            ok(table.connect(0, handle, &mut send));
            ok(table.accept(listen, &mut dev_handle, &mut recv));
            assert!(send.is_null() && recv.is_null(), "neither is up at the first call");
            ok(table.connect(0, handle, &mut send));
            ok(table.accept(listen, &mut dev_handle, &mut recv));
            assert!(!send.is_null() && !recv.is_null());
            let ends = [send, recv].map(|comm| (comm, null_mut()));
            let mut pair = Pair { table, ends, listen };
            for ((comm, mhandle), data) in pair.ends.iter_mut().zip(memory) {
                ok(table.reg_mr(*comm, data, size, abi::NCCL_PTR_HOST, mhandle));
            }
            pair
        }
    }

    /// Sends `size` bytes from one memory to the other; gives the size that the receive's test reports.
    ///
    /// # Safety
    /// As [`Pair::new`].
    unsafe fn transfer(&self, memory: [*mut c_void; 2], size: usize, plugin: &Loaded) -> c_int {
        let [(send, from), (recv, to)] = self.ends;
        let (mut sent, mut received) = (null_mut(), null_mut());
        let (mut done, mut got) = (0, -1);
        // SAFETY: as for `new`; one request at a time.
        unsafe {
            ok(self.table.irecv(recv, memory[1], size, 9, to, &mut received));
            assert_eq!(plugin.last_size(), size);
            ok(self.table.isend(send, memory[0], size, 9, from, &mut sent));
            assert_eq!(plugin.last_size(), size);
            for expected in [0, 1] {
                ok(self.table.test(sent, &mut done, &mut got));
                assert_eq!(done, expected);
            }
            for expected in [0, 1] {
                ok(self.table.test(received, &mut done, &mut got));
                assert_eq!(done, expected);
            }
        }
        got
    }

    /// # Safety
    /// The comms have no requests.
    unsafe fn close(self) {
        let [(send, from), (recv, to)] = self.ends;
        // SAFETY: by the caller's contract.
        unsafe {
            ok(self.table.dereg_mr(send, from));
            ok(self.table.dereg_mr(recv, to));
            ok(self.table.close_send(send));
            ok(self.table.close_recv(recv));
            ok(self.table.close_listen(self.listen));
        }
    }
}

const VERSIONS: [u32; 6] = [7, 8, 9, 10, 11, 12];

#[test]
fn every_version_is_driven_with_the_arguments_that_it_takes() {
    for version in VERSIONS {
        let plugin = Loaded::new(&format!("v{version}"), &[format!("VERSION={version}"), "FULL".into()]);
        let table = plugin.table;
        assert_eq!((table.version(), table.name()), (version, format!("simulated-v{version}")));
        let (mut n, mut p) = (0, Properties::default());
        let (mut from, mut to) = ([7u8; 4096], [0u8; 4096]);
        let memory = [&mut from, &mut to].map(|m| m.as_mut_ptr().cast::<c_void>());
        // SAFETY: the order of the contract, over memory that is there; one thread.
        unsafe {
            ok(table.init(crate::net::plugin_log::logger()));
            ok(table.devices(&mut n));
            assert_eq!(n, 1);
            ok(table.properties(0, &mut p));
            let pair = Pair::new(table, memory, 4096);
            assert_eq!(pair.transfer(memory, 4000, &plugin), 4000);
            let (recv, mhandle) = pair.ends[1];
            let (mut request, mut done, mut size) = (null_mut(), 0, 0);
            ok(table.flush(recv, memory[1], 4000, mhandle, &mut request));
            ok(table.test(request, &mut done, &mut size));
            ok(table.test(request, &mut done, &mut size));
            assert_eq!(done, 1);
            ok(table.consumed(recv, request));
            pair.close();
        }
        assert!(to[..4000] == from[..4000] && to[4000..] == [0; 96]);
        assert_eq!((p.name.as_deref(), p.pci_path.as_deref()), (Some("ib0"), Some("/sys/devices/pci0000:00/0000:00:05.0")));
        assert_eq!((p.speed_mbps, p.ptr_support, p.device_type), (400_000, 3, abi::NCCL_NET_DEVICE_HOST));
        assert_eq!((p.reg_is_global, p.max_message.map(|n| n.get())), (version >= 8, (version >= 9).then_some(131_072)));
    }
}

#[test]
fn sizes_above_4_gib_reach_the_tables_that_take_them_and_no_others() {
    // Address space alone: the plugin copies no message of this size.
    const SIZE: usize = (5 << 30) + 4096;
    // SAFETY: a new mapping that nothing else uses.
    let space = unsafe {
        libc::mmap(null_mut(), 2 * SIZE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0)
    };
    assert_ne!(space, libc::MAP_FAILED);
    let memory = [space, space.wrapping_byte_add(SIZE)];
    for version in VERSIONS {
        let plugin = Loaded::new(&format!("large-v{version}"), &[format!("VERSION={version}")]);
        let table = plugin.table;
        let small = 1 << 20;
        // SAFETY: as above; the plugin touches none of the memory.
        unsafe {
            ok(table.init(crate::net::plugin_log::logger()));
            let pair = Pair::new(table, memory, if version >= 8 { SIZE } else { small });
            assert_eq!(plugin.last_size(), if version >= 8 { SIZE } else { small }, "v{version}: registered");
            let ((send, from), (recv, to), mut request) = (pair.ends[0], pair.ends[1], null_mut());
            if version < 8 {
                let mut mhandle = null_mut();
                assert_eq!(
                    table.reg_mr(send, memory[0], SIZE, abi::NCCL_PTR_HOST, &mut mhandle),
                    Some(abi::NCCL_INVALID_ARGUMENT)
                );
            }
            if version < 9 {
                let sent = table.isend(send, memory[0], SIZE, 0, from, &mut request);
                let received = table.irecv(recv, memory[1], SIZE, 0, to, &mut request);
                assert_eq!([sent, received], [Some(abi::NCCL_INVALID_ARGUMENT); 2], "v{version}");
            } else {
                pair.transfer(memory, SIZE, &plugin);
            }
            pair.close();
        }
    }
    // SAFETY: the mapping of above.
    unsafe { libc::munmap(space, 2 * SIZE) };
}

#[test]
fn members_that_may_be_null_are_left_out() {
    for version in VERSIONS {
        let plugin = Loaded::new(&format!("bare-v{version}"), &[format!("VERSION={version}")]);
        let (mut memory, mut request) = ([0u8; 64], null_mut());
        let memory = memory.as_mut_ptr().cast();
        // SAFETY: members that are null are not called.
        unsafe {
            assert_eq!(plugin.table.flush(memory, memory, 64, memory, &mut request), None, "v{version}");
            assert_eq!(plugin.table.consumed(memory, memory), None, "v{version}");
        }
    }
}

#[test]
fn the_newest_table_is_taken() {
    for (newer, older) in [(12, 11), (11, 10), (10, 9), (9, 8), (8, 7), (12, 7)] {
        let defines = [format!("VERSION={newer}"), format!("OLDER={older}")];
        let plugin = Loaded::new(&format!("newest-{newer}-{older}"), &defines);
        assert_eq!(plugin.table.version(), newer);
    }
}

#[test]
fn no_message_is_larger_than_the_devices_take() {
    for (version, most) in [(8, crate::config::message_limit(false).expect("limit")), (9, 131_072), (12, 131_072)] {
        let plugin = Loaded::new(&format!("largest-v{version}"), &[format!("VERSION={version}")]);
        let plugin = crate::net::plugin::Plugin::for_test(plugin.table, |traits| traits.small_messages = false).expect("starts");
        assert_eq!(plugin.max_message(), most, "v{version}");
    }
}

/// The argument checks of the plugin work: otherwise the tests above prove nothing.
#[test]
fn the_plugin_refuses_wrong_arguments() {
    for version in VERSIONS {
        let plugin = Loaded::new(&format!("strict-v{version}"), &[format!("VERSION={version}")]);
        let table = plugin.table;
        let (mut memory, mut request) = ([0u8; 64], null_mut());
        let data: *mut c_void = memory.as_mut_ptr().cast();
        // SAFETY: the plugin checks these before it uses them; data is valid.
        unsafe {
            ok(table.init(crate::net::plugin_log::logger()));
            let pair = Pair::new(table, [data; 2], 64);
            let ((send, from), (_, to)) = (pair.ends[0], pair.ends[1]);
            let refused = Some(abi::NCCL_INVALID_USAGE);
            assert_eq!(table.isend(send, data, 64, 0, to, &mut request), refused, "another comm's registration");
            assert_eq!(table.isend(send, data, 65, 0, from, &mut request), refused, "more than is registered");
            assert_eq!(table.irecv(send, data, 64, 0, from, &mut request), refused, "a comm of the other kind");
            assert_eq!(table.reg_mr(send, data, 0, abi::NCCL_PTR_HOST, &mut request), refused, "no bytes");
            assert_eq!(table.close_recv(send), refused, "a comm of the other kind");
            pair.close();
        }
    }
}
