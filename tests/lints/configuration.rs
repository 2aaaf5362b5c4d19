//! The committed page about configuration is what the tables of variables generate.

#[test]
fn committed_page_is_current() {
    let generated = uccl_p2p::config::document();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &generated).expect("docs/configuration.md is writable");
    }
    let committed = std::fs::read_to_string(path).expect("docs/configuration.md exists");
    assert!(committed == generated, "docs/configuration.md is stale: run UPDATE_DOCS=1 cargo test --release --test lints");
}
