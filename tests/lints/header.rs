//! The committed C header is what the sources generate.

#[test]
fn committed_header_is_current() {
    let generated = include_str!(concat!(env!("OUT_DIR"), "/uccl_engine.h"));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/include/uccl_engine.h");
    if std::env::var_os("UPDATE_HEADER").is_some() {
        std::fs::write(path, generated).expect("include/uccl_engine.h is writable");
    }
    let committed = std::fs::read_to_string(path).expect("include/uccl_engine.h exists");
    assert!(committed == generated, "include/uccl_engine.h is stale: run UPDATE_HEADER=1 cargo test --release --test lints");
}
