//! docs/configuration.md, from the tables of variables.

use super::table::VARIABLES;

/// What stands before, between and behind the tables.
const HEAD: &str = "# Configuration

<!-- Generated from src/config/table.rs: `UPDATE_DOCS=1 cargo test --release --test lints` renews it. -->

Everything is configured through the environment, read when an engine is created; uccl_engine_create_with takes the same names as
settings of one engine, but for those of the process: PROCESS
and what the software plugin has of its own. A value that cannot be understood fails the creation with a message that names the variable. A name that
begins with UCCL_TCPX_ or UCCL_P2P_ and is none of these is a line of the log, with the nearest name there is. `tcpx-info --settings`
prints what is in effect. Numbers take the suffixes K, M and G (powers of 1024).

## The library

| variable | values | default | meaning |
|---|---|---|---|
";
const MIDDLE: &str = "
`RUST_LOG`, where it is set, stands before `UCCL_P2P_LOG_LEVEL`, by module: `RUST_LOG=uccl_p2p::engine=trace` shows every transfer of
the engine, and of the other modules what the level says; a level without a module, as in `RUST_LOG=info`, takes the level's place.
Modules are `engine`, `channel`, `net`, `wire`, `gpu` and `stats`; the syntax is that of the crate env_logger.

## The software plugin

| variable | values | default | meaning |
|---|---|---|---|
";
const TAIL: &str = include_str!("docs_tail.md");

/// The whole page.
pub fn document() -> String {
    let of_the_process: Vec<&str> = VARIABLES.iter().filter(|v| v.of_the_process).map(|v| v.name).collect();
    let mut page = HEAD.replace("PROCESS", &of_the_process.join(", "));
    for v in VARIABLES {
        page += &format!("| `{}` | {} | {} | {} |\n", v.name, v.kind, v.default, v.doc);
    }
    page += MIDDLE;
    for v in soft_plugin::VARIABLES {
        page += &format!("| `{}` | {} | {} | {} |\n", v.name, v.kind, v.default, v.doc);
    }
    page + "\n" + TAIL
}
