//! Sets the SONAME of the shared library, compiles the variadic logger for plugins, and generates the C header into OUT_DIR, where `tests/lints/header.rs` compares it with
//! the committed `include/uccl_engine.h`.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=src/ffi");
    println!("cargo:rerun-if-changed=src/status.rs");
    println!("cargo:rerun-if-changed=src/engine/fifo.rs");
    println!("cargo:rerun-if-changed=cbindgen.toml");
    println!("cargo:rerun-if-changed=src/net/plugin_log.c");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libuccl_p2p.so.0");
    // Threads and a handler of forks outlive a dlclose: their code stays.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    cc::Build::new().file("src/net/plugin_log.c").warnings_into_errors(true).extra_warnings(true).compile("uccl_p2p_plugin_log");
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("uccl_engine.h");
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    // In the order of the header. tests/lints/exports.rs notices an export that is in none of them.
    for source in ["src/status.rs", "src/engine/fifo.rs"] {
        builder = builder.with_src(root.join(source));
    }
    for part in ["engine", "metadata", "connection", "memory", "transfer", "list", "notif", "logging", "stats", "info"] {
        builder = builder.with_src(root.join(format!("src/ffi/{part}.rs")));
    }
    let mut header = Vec::new();
    builder.generate().expect("the C header can be generated").write(&mut header);
    let mut header = String::from_utf8(header).expect("the header is UTF-8");
    // Upstream's tags of structures that it calls by a typedef.
    for (name, tag) in [("notify_msg_t", "notify_msg"), ("md_t", "md")] {
        header = header.replace(&format!("struct {name} "), &format!("struct {tag} "));
    }
    for part in ["MAJOR", "MINOR", "PATCH"] {
        let number = std::env::var(format!("CARGO_PKG_VERSION_{part}")).expect("cargo sets the version");
        header = header.replace(&format!("@{part}@"), &number);
    }
    for function in ["uccl_engine_get_metadata", "uccl_engine_free_metadata"] {
        header = only_in_c(&header, function);
    }
    std::fs::write(out, header).expect("OUT_DIR is writable");
}

/// Hides a declaration and its comment from C++, where the overlay has a function of the same name and parameters whose
/// memory is freed with `delete[]`.
fn only_in_c(header: &str, function: &str) -> String {
    let name = header.find(&format!("{function}(")).expect("the function is declared");
    let start = header[..name].rfind("/**").expect("the function is documented");
    let end = name + header[name..].find(";\n").expect("the declaration ends") + 2;
    format!("{}#ifndef __cplusplus\n{}#endif\n{}", &header[..start], &header[start..end], &header[end..])
}
