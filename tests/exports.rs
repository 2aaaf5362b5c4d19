//! Every export of the C ABI is documented and is nothing but one call of a guard.

use std::collections::BTreeMap;

/// Exported functions of `src/ffi`: name -> (doc comment, body).
fn exports() -> BTreeMap<String, (String, String)> {
    let mut found = BTreeMap::new();
    for file in ["mod.rs", "transfer.rs", "notif.rs"] {
        let text = std::fs::read_to_string(format!("{}/src/ffi/{file}", env!("CARGO_MANIFEST_DIR"))).expect("source");
        for piece in text.split("#[no_mangle]\n").skip(1) {
            let start = piece.find("fn ").expect("a function") + 3;
            let name: String = piece[start..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let open = piece.find(" {\n").expect("a body");
            let body = piece[open + 3..].split("\n}\n").next().expect("an end").to_owned();
            let before = text.split(&format!("fn {name}(")).next().expect("text before");
            let doc: Vec<&str> =
                before.trim_end().lines().rev().skip(1).take_while(|l| l.starts_with("///") || l.starts_with("#[")).collect();
            found.insert(name, (doc.into_iter().rev().collect::<Vec<_>>().join("\n"), body));
        }
    }
    found
}

/// Calls that catch panics and turn errors into a status or a default.
const GUARDS: [&str; 6] = ["guard(", "status(", "one_sided(", "unsafe { one_sided_vector(", "send(", "// SAFETY"];

#[test]
fn every_export_is_guarded() {
    let exports = exports();
    assert!(exports.len() >= 35, "only {} exports found", exports.len());
    for (name, (_, body)) in exports {
        let body = body.trim();
        assert!(GUARDS.iter().any(|g| body.starts_with(g)), "{name} is not one call of a guard:\n{body}");
    }
}

#[test]
fn every_export_documents_result_and_threads() {
    for (name, (doc, _)) in exports() {
        assert!(name.starts_with("uccl_engine_"), "{name}");
        assert!(doc.contains("Threads:"), "{name} does not say from which threads it may be called:\n{doc}");
    }
}

#[test]
fn every_status_is_in_the_header() {
    let header = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/include/uccl_engine.h")).expect("header");
    for kind in uccl_p2p::status::ErrorKind::ALL {
        assert!(
            header.lines().any(|l| l.starts_with("#define UCCL_ERR_") && l.ends_with(&format!(" {}", kind.code()))),
            "{kind:?}"
        );
    }
    for name in exports().keys() {
        assert!(header.contains(&format!("{name}(")), "{name} is not in the header");
    }
}

#[test]
fn every_variable_is_documented() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md")).expect("docs/configuration.md");
    for v in uccl_p2p::config::VARIABLES {
        let row = format!("| `{}` | {} | {} |", v.name, v.default, v.doc);
        assert!(text.contains(&row), "docs/configuration.md lacks:\n{row}");
    }
}
