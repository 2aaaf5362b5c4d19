//! Sets the SONAME of the shared library, compiles the variadic logger for plugins, and generates the C header into OUT_DIR.
//! `tests/lints/header.rs` compares it with the committed `include/uccl_engine.h`.

use std::path::PathBuf;

/// The header's sections, and what each begins with.
const SECTIONS: [(&str, &str); 12] = [
    ("Types and constants", "#define UCCL_FIFO_SIZE "),
    ("Status numbers", "#define UCCL_OK "),
    ("Engines", "uccl_engine_t *uccl_engine_create("),
    ("Metadata: how peers find an engine", "int uccl_engine_get_metadata("),
    ("Connections", "uccl_conn_t *uccl_engine_connect("),
    ("Memory and FIFO items", "int uccl_engine_reg("),
    ("Transfers", "int uccl_engine_read("),
    ("Lists: segments of a transfer that is started several times", "int uccl_engine_list_create("),
    ("Notifications", "int uccl_engine_send_notif("),
    ("Log", "int uccl_engine_set_log_callback("),
    ("Statistics", "int uccl_engine_stats("),
    ("Errors and version", "const char *uccl_engine_strerror("),
];

fn main() {
    println!("cargo:rerun-if-changed=src/ffi");
    println!("cargo:rerun-if-changed=src/status.rs");
    println!("cargo:rerun-if-changed=src/engine/fifo.rs");
    println!("cargo:rerun-if-changed=cbindgen.toml");
    println!("cargo:rerun-if-changed=src/net/plugin_log.c");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libuccl_p2p.so.0");
    // Threads and the fork handler outlive a dlclose, so their code must stay.
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
    for (heading, first) in SECTIONS {
        header = with_heading(&header, heading, first);
    }
    for function in ["uccl_engine_get_metadata", "uccl_engine_free_metadata"] {
        header = only_in_c(&header, function);
    }
    header = on_one_line(&header);
    std::fs::write(out, header).expect("OUT_DIR is writable");
}

/// Puts a heading before the comment of a declaration.
fn with_heading(header: &str, heading: &str, declaration: &str) -> String {
    let at = header.find(declaration).expect("the declaration exists");
    let start = header[..at].rfind("/**").expect("the declaration is documented");
    format!("{}/* ==== {heading} ==== */\n\n{}", &header[..start], &header[start..])
}

/// Writes each comment of a single line on one line.
fn on_one_line(header: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in header.lines() {
        let short = match &lines[..] {
            [.., open, text] if line.trim() == "*/" && open.trim() == "/**" => text.trim().strip_prefix("* ").map(str::to_owned),
            _ => None,
        };
        if let Some(text) = short {
            lines.pop();
            let open = lines.last_mut().expect("the comment was opened");
            *open += &format!(" {text} */");
        } else {
            lines.push(line.to_owned());
        }
    }
    lines.join("\n") + "\n"
}

/// Hides a declaration and its comment from C++, where the overlay has a function of the same name and parameters whose
/// memory is freed with `delete[]`.
fn only_in_c(header: &str, function: &str) -> String {
    let name = header.find(&format!("{function}(")).expect("the function is declared");
    let start = header[..name].rfind("/**").expect("the function is documented");
    let end = name + header[name..].find(";\n").expect("the declaration ends") + 2;
    format!("{}#ifndef __cplusplus\n{}#endif\n{}", &header[..start], &header[start..end], &header[end..])
}
