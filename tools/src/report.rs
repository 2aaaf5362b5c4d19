//! Measured rows as a table for people and as JSON for programs. Pure, but for writing the file.

use crate::error::{Context, Result};
use crate::measure::Op;
use crate::memory::Kind;
use crate::units::{show_size, show_us};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One measured row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Operation.
    pub op: Op,
    /// Memory on both sides.
    pub memory: Kind,
    /// Bytes of a transfer.
    pub total_bytes: u64,
    /// Bytes of a block; equal to `total_bytes` when the transfer is one piece.
    pub block_bytes: u64,
    /// Data channels of the connection.
    pub channels: usize,
    /// Network plugin.
    pub plugin: String,
    /// Transfers in flight in one iteration.
    pub inflight: u32,
    /// Both directions at once; rates and bytes count both.
    pub bidirectional: bool,
    /// Timed iterations.
    pub iters: u64,
    /// Median of an iteration, us.
    pub p50_us: f64,
    /// 99th percentile of an iteration (nearest rank), us.
    pub p99_us: f64,
    /// 1e9 bytes a second, of the median iteration.
    pub gbytes_per_s: f64,
    /// Contents were checked, and right.
    pub verified: bool,
    /// Bytes checked.
    pub verified_bytes: u64,
}

/// Headline of the table.
pub fn headline() -> String {
    format!(
        "{:<26} {:>10} {:>10} {:>8} {:>8} {:>9} {:>10} {:>10}  {}",
        "op", "total", "block", "channels", "iters", "GB/s", "p50 us", "p99 us", "data"
    )
}

impl Row {
    /// The row as a line of the table.
    pub fn line(&self) -> String {
        let mut op = format!("{} {}", self.op, self.memory);
        if self.inflight > 1 {
            op += &format!(" x{}", self.inflight);
        }
        if self.bidirectional {
            op += " both ways";
        }
        format!(
            "{op:<26} {:>10} {:>10} {:>8} {:>8} {:>9.3} {:>10} {:>10}  {}",
            show_size(self.total_bytes),
            show_size(self.block_bytes),
            self.channels,
            self.iters,
            self.gbytes_per_s,
            show_us(self.p50_us),
            show_us(self.p99_us),
            if self.verified { "verified" } else { "not checked" },
        )
    }
}

/// Writes rows as a JSON array.
pub fn write_json(path: &Path, rows: &[Row]) -> Result<()> {
    let mut text = serde_json::to_string_pretty(rows).context("cannot write rows as JSON")?;
    text.push('\n');
    std::fs::write(path, text).context(format_args!("cannot write {}", path.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row() -> Row {
        Row {
            op: Op::Write,
            memory: Kind::Host,
            total_bytes: 64 << 20,
            block_bytes: 4096,
            channels: 4,
            plugin: "soft".into(),
            inflight: 1,
            bidirectional: false,
            iters: 100,
            p50_us: 10_000.0,
            p99_us: 12_345.6,
            gbytes_per_s: 6.7108864,
            verified: true,
            verified_bytes: 128 << 20,
        }
    }

    #[test]
    fn json_rows_have_the_agreed_names() {
        let value = serde_json::to_value(row()).unwrap();
        assert_eq!(value["op"], "write");
        assert_eq!(value["memory"], "host");
        assert_eq!(value["total_bytes"], 64 << 20);
        for key in ["block_bytes", "channels", "plugin", "iters", "p50_us", "p99_us", "gbytes_per_s", "verified"] {
            assert!(!value[key].is_null(), "{key}");
        }
        assert_eq!(serde_json::from_value::<Row>(value).unwrap(), row());
    }

    #[test]
    fn lines_stand_under_the_headline() {
        let (headline, line) = (headline(), row().line());
        for (title, text) in [("GB/s", "6.711"), ("p50 us", "10000"), ("p99 us", "12346"), ("block", "4 KiB")] {
            let end = |s: &str, part: &str| s.find(part).unwrap() + part.len();
            assert_eq!(end(&headline, title), end(&line, text), "{title}");
        }
    }
}
