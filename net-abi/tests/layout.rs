//! Compares the types of this crate with what a C compiler makes of `net_tables.h`: the size of each and the offset of every member.

use nccl_net_abi as abi;
use std::mem::{offset_of, size_of};
use std::process::Command;

/// Lines of C that print the sizes and offsets of types, and the lines that they should print.
#[derive(Default)]
struct Layout {
    program: String,
    expected: String,
}

macro_rules! compare {
    ($layout:ident, $rust:ty, $c:literal, $($member:ident)*) => {
        $layout.program += &format!("printf(\"{0} %zu\\n\", sizeof({0}));\n", $c);
        $layout.expected += &format!("{} {}\n", $c, size_of::<$rust>());
        $(
            let member = stringify!($member);
            $layout.program += &format!("printf(\"{0}.{member} %zu\\n\", offsetof({0}, {member}));\n", $c);
            $layout.expected += &format!("{}.{member} {}\n", $c, offset_of!($rust, $member));
        )*
    };
}

macro_rules! compare_properties {
    ($layout:ident, $rust:ty, $c:literal, $($new:ident)*) => {
        compare!($layout, $rust, $c, name pciPath guid ptrSupport speed port latency maxComms maxRecvs netDeviceType netDeviceVersion
            $($new)*);
    };
}

macro_rules! compare_table {
    ($layout:ident, $rust:ty, $c:literal, $($new:ident)*) => {
        compare!($layout, $rust, $c, name init devices getProperties listen connect accept regMr regMrDmaBuf deregMr isend irecv iflush test
            closeSend closeRecv closeListen getDeviceMr irecvConsumed $($new)*);
    };
}

fn all() -> Layout {
    let mut l = Layout::default();
    compare!(l, abi::ncclNetDeviceHandle_v7, "device_handle", netDeviceType netDeviceVersion handle size needsProxyProgress);
    compare!(l, abi::ncclNetCommConfig_v10, "comm_config", trafficClass);
    compare!(l, abi::ncclNetVDeviceProps<4>, "virtual_device_4", ndevs devs);
    compare!(l, abi::ncclNetVDeviceProps<8>, "virtual_device_8", ndevs devs);
    compare_properties!(l, abi::ncclNetProperties_v7, "properties_v7",);
    compare_properties!(l, abi::ncclNetProperties_v8, "properties_v8", regIsGlobal);
    compare_properties!(l, abi::ncclNetProperties_v9, "properties_v9", regIsGlobal forceFlush vProps maxP2pBytes maxCollBytes);
    compare_properties!(l, abi::ncclNetProperties_v9, "properties_v10", regIsGlobal forceFlush vProps maxP2pBytes maxCollBytes);
    compare_properties!(l, abi::ncclNetProperties_v11, "properties_v11", regIsGlobal forceFlush vProps maxP2pBytes maxCollBytes
        maxMultiRequestSize);
    compare_properties!(l, abi::ncclNetProperties_v12, "properties_v12", regIsGlobal forceFlush vProps maxP2pBytes maxCollBytes
        maxMultiRequestSize railId planeId);
    compare_table!(l, abi::ncclNet_v7, "table_v7",);
    compare_table!(l, abi::ncclNet_v8, "table_v8",);
    compare_table!(l, abi::ncclNet_v9, "table_v9", makeVDevice);
    compare_table!(l, abi::ncclNet_v10, "table_v10", makeVDevice);
    compare_table!(l, abi::ncclNet_v11, "table_v11", makeVDevice finalize setNetAttr);
    compare_table!(l, abi::ncclNet_v12, "table_v12", makeVDevice finalize setNetAttr);
    l
}

#[test]
fn a_c_compiler_lays_the_types_out_alike() {
    let Layout { program, expected } = all();
    let stem = std::env::temp_dir().join(format!("net-abi-layout-{}", std::process::id()));
    let source = stem.with_extension("c");
    let main = format!("#include \"net_tables.h\"\n#include <stdio.h>\nint main(void) {{\n{program}return 0;\n}}\n");
    std::fs::write(&source, main).expect("source");
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let built = Command::new("cc").args(["-Wall", "-Wextra", "-Werror", "-I", tests, "-o"]).arg(&stem).arg(&source).status();
    assert!(built.expect("a C compiler").success());
    let out = Command::new(&stem).output().expect("program");
    for file in [stem, source] {
        let _ = std::fs::remove_file(file);
    }
    let printed = String::from_utf8(out.stdout).expect("text");
    let different: Vec<_> = printed.lines().zip(expected.lines()).filter(|(c, rust)| c != rust).collect();
    assert!(printed.lines().count() == expected.lines().count() && different.is_empty(), "C, here: {different:#?}");
}
