//! docs/metrics.md has every metric of the exporter, and the C structures have the members that it names.

const BEGIN: &str = "<!-- tables -->\n";
const END: &str = "<!-- end -->\n";

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    let committed = std::fs::read_to_string(path).expect("docs/metrics.md exists");
    if std::env::var_os("UPDATE_DOCS").is_none() {
        return committed;
    }
    let (before, rest) = committed.split_once(BEGIN).expect("the mark before the tables");
    let (_, after) = rest.split_once(END).expect("the mark after the tables");
    let renewed = format!("{before}{BEGIN}{}{END}{after}", uccl_p2p::stats::document());
    std::fs::write(path, &renewed).expect("docs/metrics.md is writable");
    renewed
}

#[test]
fn committed_tables_are_current() {
    let tables = format!("{BEGIN}{}{END}", uccl_p2p::stats::document());
    assert!(page().contains(&tables), "docs/metrics.md is stale: run UPDATE_DOCS=1 cargo test --release --test lints");
}

/// The members of a structure of the header.
fn members(header: &str, structure: &str) -> Vec<String> {
    let (_, body) = header.split_once(&format!("typedef struct {structure} {{\n")).expect("the structure");
    let (body, _) = body.split_once(&format!("}} {structure};")).expect("its end");
    body.lines().filter_map(|line| line.trim().strip_suffix(';')?.rsplit(' ').next().map(str::to_owned)).collect()
}

#[test]
fn named_members_exist() {
    let header = include_str!(concat!(env!("OUT_DIR"), "/uccl_engine.h"));
    let totals = members(header, "uccl_totals_t");
    let mut checked = 0;
    let mut known = Vec::new();
    for line in uccl_p2p::stats::document().lines() {
        let cells: Vec<&str> = line.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        match cells[..] {
            [_, "metric", _, title, ..] => {
                let structure = title.strip_prefix("member of `").expect("the title of the column");
                known = members(header, structure);
                known.extend(totals.iter().cloned());
            }
            [_, metric, _, member, ..] if metric.starts_with("uccl_tcpx_") && !member.is_empty() => {
                assert!(known.iter().any(|name| name == member), "{metric}: no member {member} in {known:?}");
                checked += 1;
            }
            _ => {}
        }
    }
    assert!(checked > 80, "{checked}");
}
