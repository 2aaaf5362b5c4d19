//! docs/configuration.md, from the tables of variables.

use super::table::VARIABLES;

/// The text before, between and after the tables.
const HEAD: &str = "# Configuration

<!-- Generated from src/config/table.rs: `UPDATE_DOCS=1 cargo test --release --test lints` renews it. -->

The library reads its configuration from the environment when an engine is created. uccl_engine_create_with sets the same variables for
one engine, except those that apply to the whole process: PROCESS
and the software plugin's own. An invalid value fails the creation with a message that names the variable. The log warns about unknown names
that begin with UCCL_TCPX_ or UCCL_P2P_ and suggests the nearest known one. `tcpx-info --settings` prints the values in effect.
Numbers may have the suffixes K, M and G (powers of 1024).

## The library

| variable | values | default | meaning |
|---|---|---|---|
";
const MIDDLE: &str = "
`RUST_LOG` takes precedence over `UCCL_P2P_LOG_LEVEL`, module by module: `RUST_LOG=uccl_p2p::engine=trace` shows every transfer of the
engine and leaves the other modules at `UCCL_P2P_LOG_LEVEL`; a level without a module, as in `RUST_LOG=info`, applies to all of them.
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
