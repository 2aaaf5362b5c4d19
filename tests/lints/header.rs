//! The committed C header is what the sources generate, and explains every counter.

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

/// A counter is explained in the same words to programs and to Prometheus.
#[test]
fn header_has_every_total_and_its_meaning() {
    let header = include_str!(concat!(env!("OUT_DIR"), "/uccl_engine.h"));
    let missing: Vec<String> = uccl_p2p::stats::Totals::default()
        .each()
        .iter()
        .map(|(name, _, meaning)| format!("  /** {meaning}. */\n  uint64_t {name};"))
        .filter(|member| !header.contains(member.as_str()))
        .collect();
    assert!(missing.is_empty(), "include/uccl_engine.h lacks:\n{}", missing.join("\n"));
}
