//! Measured rows as a table for people, and as JSON and CSV for programs. Pure, except for writing.

use crate::carried::Carried;
use crate::case::Op;
use crate::error::{Context, Result};
use crate::fail;
use crate::memory::Kind;
use crate::stats::Times;
use crate::units::{show_rate, show_size, show_us};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::Path;

/// One measured row. Times are per iteration, in us.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Operation.
    pub op: Op,
    /// Memory of client and server.
    pub memory: Kind,
    /// Bytes per transfer.
    pub total_bytes: u64,
    /// Bytes per block; equal to `total_bytes` when the transfer is one block.
    pub block_bytes: u64,
    /// Data channels of the connection over plugins; 0 if none carried bytes of the row.
    pub channels: usize,
    /// What carried the bytes, from the counters of the connection: plugins and NICs, direct transfers, control messages.
    pub path: String,
    /// The same with the number of bytes of each, at the client.
    pub path_bytes: String,
    /// Transfers in flight in one iteration.
    pub inflight: u32,
    /// Both directions at once; rates and bytes count both.
    pub bidirectional: bool,
    /// Connections that measured at once; rates are their sum.
    pub clients: u32,
    /// Timed iterations.
    pub iters: u64,
    /// Time of all timed iterations, seconds.
    pub seconds: f64,
    /// Shortest.
    pub min_us: f64,
    /// Mean.
    pub avg_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Longest.
    pub max_us: f64,
    /// All bytes by all time, in 1e9 bytes per second.
    pub gbytes_per_s: f64,
    /// Rate of the median iteration, in 1e9 bytes per second.
    pub gbytes_per_s_median: f64,
    /// `gbytes_per_s` in 1e9 bits per second.
    #[serde(default)]
    pub gbits_per_s: f64,
    /// Transfers per second: all of them, by all time.
    #[serde(default)]
    pub ops_per_s: f64,
    /// Processor time used by this process meanwhile, in seconds.
    pub cpu_s: f64,
    /// TCP segments that this host retransmitted meanwhile.
    pub retransmits: u64,
    /// Contents were checked and correct.
    pub verified: bool,
    /// Bytes checked.
    pub verified_bytes: u64,
    /// The user stopped it early.
    pub interrupted: bool,
    /// Name of this host.
    pub host: String,
    /// The server's address.
    pub peer: String,
    /// When it was measured, UTC.
    pub date: String,
    /// Version of this program and the library.
    pub version: String,
    /// Congestion control of the data sockets; empty if no channel carried bytes of the row, or the plugin does not report it.
    pub congestion_control: String,
}

/// A row is marked where its two rates differ by more than this.
const EVEN: f64 = 0.2;

/// Headline of the table.
pub fn headline() -> String {
    format!(
        "{:<26} {:>10} {:>10} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8} {:>6}  {:<12}  {}",
        "op",
        "total",
        "block",
        "channels",
        "iters",
        "GB/s",
        "median",
        "Gbit/s",
        "ops/s",
        "min us",
        "avg us",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "cpu s",
        "resent",
        "data",
        "path"
    )
}

impl Row {
    /// Sets the times from those of the iterations; 0 without any, never NaN.
    pub fn set_times(&mut self, times: &Times) {
        self.min_us = times.least();
        self.avg_us = times.mean();
        [self.p50_us, self.p99_us, self.p999_us] = [0.5, 0.99, 0.999].map(|quantile| times.at(quantile));
        self.max_us = times.most();
    }

    /// Sets the rates: bytes and transfers per second.
    pub fn set_rates(&mut self, gbytes_per_s: f64, ops_per_s: f64) {
        (self.gbytes_per_s, self.gbits_per_s, self.ops_per_s) = (gbytes_per_s, 8.0 * gbytes_per_s, ops_per_s);
    }

    /// Sets what carried the bytes.
    pub fn set_path(&mut self, carried: &Carried) {
        (self.path, self.path_bytes) = (carried.to_string(), carried.bytes());
        if !carried.has_channels() {
            self.channels = 0;
            self.congestion_control.clear();
        }
    }

    /// Whether some iterations took so much longer or shorter than the others that the median does not stand for them.
    pub fn is_uneven(&self) -> bool {
        let (all, median) = (self.gbytes_per_s, self.gbytes_per_s_median);
        all.min(median) < (1.0 - EVEN) * all.max(median)
    }

    /// The measurement in words.
    pub fn name(&self) -> String {
        format!("{} of {} in blocks of {}", self.operation(), show_size(self.total_bytes), show_size(self.block_bytes))
    }

    fn operation(&self) -> String {
        let mut op = format!("{} {}", self.op, self.memory);
        if self.inflight > 1 {
            op += &format!(" x{}", self.inflight);
        }
        if self.bidirectional {
            op += " both ways";
        }
        if self.clients > 1 {
            op += &format!(", {} clients", self.clients);
        }
        op
    }

    /// The row as a line of the table.
    pub fn line(&self) -> String {
        format!(
            "{:<26} {:>10} {:>10} {:>8} {:>8} {:>9.3} {:>9.3} {:>9.2} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8.2} {:>6}  {:<12}  {}{}{}",
            self.operation(),
            show_size(self.total_bytes),
            show_size(self.block_bytes),
            self.channels,
            self.iters,
            self.gbytes_per_s,
            self.gbytes_per_s_median,
            self.gbits_per_s,
            show_rate(self.ops_per_s),
            show_us(self.min_us),
            show_us(self.avg_us),
            show_us(self.p50_us),
            show_us(self.p99_us),
            show_us(self.p999_us),
            self.cpu_s,
            self.retransmits,
            if self.verified { "verified" } else { "not checked" },
            self.path,
            if self.is_uneven() { ", UNEVEN" } else { "" },
            if self.interrupted { ", interrupted" } else { "" },
        )
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    if path == Path::new("-") {
        crate::say!("{}", text.trim_end());
        return Ok(());
    }
    let mut file = std::fs::File::create(path).context(format_args!("cannot write {}", path.display()))?;
    file.write_all(text.as_bytes()).context(format_args!("cannot write {}", path.display()))
}

/// Writes rows as a JSON array; `-` is standard output.
pub fn write_json(path: &Path, rows: &[Row]) -> Result<()> {
    let text = serde_json::to_string_pretty(rows).context("cannot write rows as JSON")?;
    write(path, &(text + "\n"))
}

/// Writes rows as CSV with a headline; `-` is standard output.
pub fn write_csv(path: &Path, rows: &[Row]) -> Result<()> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.serialize(row).context("cannot write rows as CSV")?;
    }
    match writer.into_inner().map(String::from_utf8) {
        Ok(Ok(text)) => write(path, &text),
        _ => fail!("cannot write rows as CSV"),
    }
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
            path: "tcp eth1 60% eth2 40%".into(),
            path_bytes: "tcp eth1 60, tcp eth2 40".into(),
            inflight: 1,
            clients: 1,
            iters: 100,
            min_us: 9000.0,
            avg_us: 10_100.0,
            p50_us: 10_000.0,
            p99_us: 12_345.6,
            p999_us: 13_000.0,
            max_us: 14_000.0,
            gbytes_per_s: 6.5,
            gbytes_per_s_median: 6.7108864,
            gbits_per_s: 52.0,
            ops_per_s: 96.86,
            verified: true,
            verified_bytes: 128 << 20,
            ..Row::default()
        }
    }

    #[test]
    fn json_rows_have_the_agreed_names() {
        let mut value = serde_json::to_value(row()).unwrap();
        assert_eq!(value["op"], "write");
        assert_eq!(value["memory"], "host");
        assert_eq!(value["total_bytes"], 64 << 20);
        for key in
            ["block_bytes", "channels", "iters", "p50_us", "p99_us", "gbytes_per_s", "gbits_per_s", "ops_per_s", "verified"]
        {
            assert!(!value[key].is_null(), "{key}");
        }
        assert_eq!((&value["path"], &value["path_bytes"]), (&"tcp eth1 60% eth2 40%".into(), &"tcp eth1 60, tcp eth2 40".into()));
        for key in ["host", "date", "version", "congestion_control", "min_us", "avg_us", "p999_us", "cpu_s", "retransmits"] {
            assert!(!value[key].is_null(), "{key}");
        }
        assert_eq!(serde_json::from_value::<Row>(value.clone()).unwrap(), row());
        // Rows of earlier versions lack some.
        let fields = value.as_object_mut().unwrap();
        assert!(fields.remove("gbits_per_s").is_some() && fields.remove("ops_per_s").is_some());
        assert_eq!(serde_json::from_value::<Row>(value).unwrap(), Row { gbits_per_s: 0.0, ops_per_s: 0.0, ..row() });
    }

    #[test]
    fn csv_rows_have_a_headline_and_quotes() {
        let path = std::env::temp_dir().join(format!("tcpx-perf-rows-{}.csv", std::process::id()));
        write_csv(&path, &[Row { host: "a,\"b\"".into(), ..row() }]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines = text.lines();
        let names: Vec<&str> = lines.next().unwrap().split(',').collect();
        assert!(names.starts_with(&["op", "memory"]) && names.contains(&"p999_us"), "{names:?}");
        assert!(lines.next().unwrap().contains("\"a,\"\"b\"\"\""), "{text}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn lines_stand_under_the_headline() {
        let (headline, line) = (headline(), row().line());
        for (title, text) in [
            ("GB/s", "6.500"),
            ("median", "6.711"),
            ("Gbit/s", "52.00"),
            ("ops/s", "96.86"),
            ("p50 us", "10000"),
            ("p99 us", "12346"),
            ("block", "4 KiB"),
            ("min us", "9000.0"),
        ] {
            let end = |s: &str, part: &str| s.find(part).unwrap() + part.len();
            assert_eq!(end(&headline, title), end(&line, text), "{title}");
        }
        assert_eq!(headline.find("path"), line.find("tcp eth1 60% eth2 40%"));
    }

    #[test]
    fn rows_whose_median_does_not_stand_for_them_are_marked() {
        let marked = |all, median| {
            let row = Row { gbytes_per_s: all, gbytes_per_s_median: median, ..row() };
            row.line().ends_with(", UNEVEN")
        };
        assert!(!marked(2.0, 2.0) && !marked(1.7, 2.0) && !marked(2.0, 1.7) && !marked(0.0, 0.0));
        assert!(marked(0.56, 2.226) && marked(1.5, 2.0) && marked(2.0, 1.5));
    }
}
