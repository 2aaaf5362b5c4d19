//! What the README shows is cut from an example that is built and run.

use std::fs::read_to_string;

fn read(path: &str) -> String {
    read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The marked pieces of a C source, without the indentation of a function's body, a blank line between them.
fn shown(source: &str) -> String {
    let mut pieces = Vec::new();
    for piece in source.split("    /* [readme] */\n").skip(1) {
        let (piece, _) = piece.split_once("    /* [end] */\n").expect("a mark for the end");
        pieces.push(piece.lines().map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line))).collect::<String>());
    }
    assert!(pieces.len() >= 2, "the marks are gone");
    pieces.join("\n")
}

#[test]
fn the_fragment_is_the_examples() {
    let fragment = format!("```c\n{}```\n", shown(&read("examples/two_processes.c")));
    let readme = read("README.md");
    assert!(readme.contains(&fragment), "README.md should show\n{fragment}");
    assert_eq!(readme.matches("```c\n").count(), 1, "a fragment in C that is not cut from an example");
}

#[test]
fn a_changed_example_is_noticed() {
    let source = read("examples/two_processes.c");
    let changed = source.replace("uccl_engine_connect(engine, ip", "uccl_engine_connect(engine, host");
    assert!(changed != source && shown(&changed) != shown(&source));
}
