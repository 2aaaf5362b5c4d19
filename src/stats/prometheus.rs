//! Statistics as Prometheus and OpenMetrics read them. Each metric is declared once, for the answers and for the table in
//! docs/metrics.md.

use super::times::{bounds, names};
use super::{ChannelStats, ConnectionStats, EngineStats, Totals};
use std::fmt::{self, Write};

/// In front of every name.
const PREFIX: &str = "uccl_tcpx";

/// The text format of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The older format of Prometheus.
    Plain,
}

impl Format {
    /// As an HTTP header names it.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Plain => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Labels of a sample.
type Labels = Vec<(&'static str, String)>;

#[derive(Clone, Copy, Debug)]
enum Number {
    Whole(u64),
    Real(f64),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Number::Whole(n) => write!(f, "{n}"),
            Number::Real(n) if n.fract() == 0.0 => write!(f, "{n:.1}"),
            Number::Real(n) => write!(f, "{n}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    /// Its labels say something, and its value is 1.
    Info,
    Histogram,
}

impl Kind {
    fn name(self, format: Format) -> &'static str {
        match (self, format) {
            (Kind::Counter, _) => "counter",
            (Kind::Info, Format::OpenMetrics) => "info",
            (Kind::Gauge | Kind::Info, _) => "gauge",
            (Kind::Histogram, _) => "histogram",
        }
    }

    /// What the name of its samples ends in.
    fn suffix(self) -> &'static str {
        match self {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        }
    }
}

/// What a metric is called, and what it means.
struct About {
    name: String,
    kind: Kind,
    help: &'static str,
    /// The member of the C structure that has the number, if one does.
    member: &'static str,
}

/// The number of a thing, if it has one.
type Read<T> = Box<dyn Fn(&T) -> Option<Number>>;

/// A metric of things of one kind. A thing that has no number is left out.
struct Metric<T> {
    about: About,
    read: Read<T>,
}

impl<T> Metric<T> {
    fn new(
        (name, member): (impl Into<String>, &'static str),
        kind: Kind,
        help: &'static str,
        read: impl Fn(&T) -> Option<Number> + 'static,
    ) -> Metric<T> {
        Metric { about: About { name: name.into(), kind, help, member }, read: Box::new(read) }
    }

    fn counter(name: &'static str, help: &'static str, read: impl Fn(&T) -> u64 + 'static) -> Metric<T> {
        let (base, factor) = base(name);
        let help = help.strip_suffix(", microseconds").unwrap_or(help);
        Metric::new((base, name), Kind::Counter, help, move |thing| Some(factor.of(read(thing))))
    }

    fn gauge(name: (&'static str, &'static str), help: &'static str, read: impl Fn(&T) -> f64 + 'static) -> Metric<T> {
        Metric::new(name, Kind::Gauge, help, move |thing| Some(Number::Real(read(thing))))
    }

    fn family(&self, samples: impl Iterator<Item = (Labels, Option<Number>)>) -> Family<'_> {
        let samples = samples.filter_map(|(labels, number)| Some(("", labels, number?))).collect();
        Family { about: &self.about, samples }
    }
}

/// From the unit of a counter in C to the base unit.
#[derive(Clone, Copy)]
enum Factor {
    One,
    Microseconds,
}

impl Factor {
    fn of(self, n: u64) -> Number {
        match self {
            Factor::One => Number::Whole(n),
            Factor::Microseconds => Number::Real(n as f64 / 1e6),
        }
    }
}

/// The name of a counter of the C ABI with its unit, which is a base unit here.
fn base(name: &'static str) -> (String, Factor) {
    match (name, name.strip_suffix("_us")) {
        ("stalls", _) => ("stalled_seconds".to_owned(), Factor::One),
        (_, Some(stem)) => (format!("{stem}_seconds"), Factor::Microseconds),
        _ => (name.to_owned(), Factor::One),
    }
}

/// Samples of one name, each with what its name ends in.
struct Family<'a> {
    about: &'a About,
    samples: Vec<(&'static str, Labels, Number)>,
}

/// A label's value between its quotes.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            c => f.write_char(c),
        })
    }
}

impl Family<'_> {
    fn write(&self, format: Format, out: &mut String) -> fmt::Result {
        if self.samples.is_empty() {
            return Ok(());
        }
        let About { name, kind, help, .. } = self.about;
        let suffix = kind.suffix();
        // OpenMetrics names the family, the older format the sample.
        let family = if format == Format::Plain { suffix } else { "" };
        writeln!(out, "# HELP {PREFIX}_{name}{family} {help}")?;
        writeln!(out, "# TYPE {PREFIX}_{name}{family} {}", kind.name(format))?;
        for (end, labels, number) in &self.samples {
            write!(out, "{PREFIX}_{name}{suffix}{end}")?;
            for (i, (label, value)) in labels.iter().enumerate() {
                write!(out, "{}{label}=\"{}\"", if i == 0 { '{' } else { ',' }, Escaped(value))?;
            }
            writeln!(out, "}} {number}")?;
        }
        Ok(())
    }
}

// ---- the metrics ----

fn of_engines() -> Vec<Metric<EngineStats>> {
    let some = EngineStats::default();
    let mut all = vec![
        Metric::gauge(("uptime_seconds", "uptime_ms"), "Since the engine was created", |e: &EngineStats| e.uptime.as_secs_f64()),
        Metric::gauge(("connections", "connections"), "Open connections", |e: &EngineStats| e.connections.len() as f64),
        Metric::gauge(
            ("notifications_waiting", "notifications_waiting"),
            "Notifications that the application has not taken",
            |e: &EngineStats| e.notifications_waiting as f64,
        ),
    ];
    let counters = some.counters().into_iter().enumerate();
    all.extend(counters.map(|(i, (name, _, help))| Metric::counter(name, help, move |e: &EngineStats| e.counters()[i].1)));
    all.extend(of_totals("", |e: &EngineStats| &e.totals));
    all
}

/// A metric for each of the totals.
fn of_totals<T: 'static>(prefix: &'static str, totals: fn(&T) -> &Totals) -> impl Iterator<Item = Metric<T>> {
    Totals::default().each().into_iter().enumerate().map(move |(i, (name, _, help))| {
        let mut metric = Metric::counter(name, help, move |thing| totals(thing).each()[i].1);
        metric.about.name.insert_str(0, prefix);
        metric
    })
}

fn of_connections() -> Vec<Metric<ConnectionStats>> {
    type Stats = ConnectionStats;
    let mut all = vec![
        Metric::gauge(("connection_up", "up"), "1 while the connection is up", |c: &Stats| {
            f64::from(u8::from(c.error.is_none()))
        }),
        Metric::gauge(("connection_silent_seconds", "silent_ms"), "Time since the last frame of the peer", |c: &Stats| {
            c.silent.as_secs_f64()
        }),
        Metric::gauge(
            ("connection_transfers_in_flight", "transfers_in_flight"),
            "Transfers of this engine in flight",
            |c: &Stats| c.in_flight as f64,
        ),
        Metric::gauge(("connection_backlog_bytes", "backlog_bytes"), "Bytes queued on the control connection", |c: &Stats| {
            c.backlog_bytes as f64
        }),
    ];
    all.extend(of_totals("connection_", |c: &Stats| &c.totals));
    all
}

fn of_channels() -> Vec<Metric<ChannelStats>> {
    let counter = |name, help, of: fn(&ChannelStats) -> u64| Metric::counter(name, help, of);
    let gauge = |name, help, of: fn(&ChannelStats) -> f64| Metric::gauge((name, name), help, of);
    let network = |name, member, kind, help, of: fn(&super::Network) -> Number| {
        Metric::new((name, member), kind, help, move |c: &ChannelStats| c.network.as_ref().map(of))
    };
    let mut all = vec![
        counter("sent_bytes", "Bytes sent", |c| c.sent_bytes),
        counter("sent_chunks", "Chunks sent", |c| c.sent_chunks),
        counter("received_bytes", "Bytes received", |c| c.received_bytes),
        counter("received_chunks", "Chunks received", |c| c.received_chunks),
        counter("nvlink_bytes", "Bytes of direct transfers that were copied over NVLink", |c| c.nvlink_bytes),
        counter("stalls", "Seconds in which the channel had chunks in flight and moved none", |c| c.stalls),
        counter("packed_chunks", "Chunks packed from GPU memory", |c| c.packed_chunks),
        counter("unpacked_chunks", "Chunks unpacked into GPU memory", |c| c.unpacked_chunks),
        counter("pack_us", "Time from submitting a chunk until it was packed, summed over all chunks", |c| c.pack_us),
        counter("unpack_us", "Time from submitting a chunk until it was unpacked, summed over all chunks", |c| c.unpack_us),
        gauge("sent_bytes_per_second", "Over the last second or so", |c| c.sent_per_second),
        gauge("received_bytes_per_second", "Over the last second or so", |c| c.received_per_second),
        gauge("speed_bytes_per_second", "While the channel was busy sending; 0: unknown", |c| c.speed),
        gauge("queued_bytes", "Bytes queued on the channel and not sent yet", |c| c.queued_bytes as f64),
        gauge("window_out", "Places of the window in use for sending", |c| f64::from(c.window_out)),
        gauge("window_in", "Places of the window in use for receiving", |c| f64::from(c.window_in)),
        gauge("window", "Places of the window", |c| f64::from(c.window)),
        gauge("slow", "1 while the peer gets far less over the NIC of the channel, while that is busy, than over others", |c| {
            f64::from(u8::from(c.slow))
        }),
        gauge("lost", "1 while the channel is lost", |c| f64::from(u8::from(c.lost))),
        network("segments", "segments", Kind::Counter, "TCP segments sent", |n| Number::Whole(n.segments)),
        network("retransmits", "retransmits", Kind::Counter, "TCP segments sent again", |n| Number::Whole(n.retransmits)),
        network("rtt_seconds", "rtt_us", Kind::Gauge, "Smoothed round trip", |n| Number::Real(f64::from(n.rtt_us) / 1e6)),
        network("min_rtt_seconds", "min_rtt_us", Kind::Gauge, "Smallest round trip", |n| {
            Number::Real(f64::from(n.min_rtt_us) / 1e6)
        }),
    ];
    all.iter_mut().for_each(|metric| metric.about.name.insert_str(0, "channel_"));
    all
}

/// The metrics that are no single number of a structure.
fn engine_info() -> About {
    About { name: "engine".into(), kind: Kind::Info, help: "What the engine is; its value is 1", member: "" }
}

fn connection_info() -> About {
    About { name: "connection".into(), kind: Kind::Info, help: "The peer's address with its port; its value is 1", member: "" }
}

fn transfer_seconds() -> About {
    let help = "Time of a read or write that succeeded, from the call that started it until every byte was in place";
    About { name: "transfer_seconds".into(), kind: Kind::Histogram, help, member: "" }
}

// ---- their labels ----

/// Statistics of the engines of a process, each with its number.
struct Snapshot(Vec<(u64, EngineStats)>);

fn engine_labels(number: u64) -> Labels {
    vec![("engine", number.to_string())]
}

fn connection_labels(engine: u64, connection: &ConnectionStats) -> Labels {
    vec![("engine", engine.to_string()), ("connection", connection.id.to_string()), ("peer", connection.host.clone())]
}

fn channel_labels(engine: u64, connection: &ConnectionStats, number: usize, channel: &ChannelStats) -> Labels {
    let mut labels = connection_labels(engine, connection);
    labels.extend([("channel", number.to_string()), ("plugin", channel.plugin.clone()), ("nic", channel.nic.clone())]);
    let joined = Some(&channel.peer_nic).filter(|nic| !nic.is_empty());
    labels.extend(joined.map(|nic| ("peer_nic", nic.clone())));
    labels
}

impl Snapshot {
    fn connections(&self) -> impl Iterator<Item = (u64, &ConnectionStats)> {
        self.0.iter().flat_map(|(number, engine)| engine.connections.iter().map(|connection| (*number, connection)))
    }

    fn channels(&self) -> impl Iterator<Item = (Labels, &ChannelStats)> {
        self.connections().flat_map(|(engine, connection)| {
            let channels = connection.channels.iter().enumerate();
            channels.map(move |(i, channel)| (channel_labels(engine, connection, i, channel), channel))
        })
    }

    fn engine_info(&self) -> Vec<(&'static str, Labels, Number)> {
        let info = |(number, engine): &(u64, EngineStats)| {
            let (address, gpu) = engine.metadata.rsplit_once('?').unwrap_or((&engine.metadata, "-1"));
            let mut labels = engine_labels(*number);
            labels.extend([("address", address), ("gpu", gpu)].map(|(label, value)| (label, value.to_owned())));
            labels.extend([("plugin", engine.plugin.clone()), ("version", env!("CARGO_PKG_VERSION").to_owned())]);
            ("", labels, Number::Whole(1))
        };
        self.0.iter().map(info).collect()
    }

    fn connection_info(&self) -> Vec<(&'static str, Labels, Number)> {
        let info = |(engine, connection): (u64, &ConnectionStats)| {
            let mut labels = connection_labels(engine, connection);
            labels.push(("address", connection.peer.clone()));
            ("", labels, Number::Whole(1))
        };
        self.connections().map(info).collect()
    }

    fn transfer_seconds(&self) -> Vec<(&'static str, Labels, Number)> {
        let mut samples = Vec::new();
        for (number, engine) in &self.0 {
            for (class, name) in names().enumerate() {
                let labels = || [engine_labels(*number), vec![("size", name.to_owned())]].concat();
                let mut below = 0;
                for (bound, count) in bounds().zip(engine.times.counts[class]) {
                    below += count;
                    samples.push(("_bucket", [labels(), vec![("le", bound.to_owned())]].concat(), Number::Whole(below)));
                }
                samples.push(("_sum", labels(), Number::Real(engine.times.nanoseconds[class] as f64 / 1e9)));
                samples.push(("_count", labels(), Number::Whole(below)));
            }
        }
        samples
    }
}

/// The statistics of engines as text. The last line shows a reader that the text is whole.
pub(super) fn exposition(engines: Vec<(u64, EngineStats)>, format: Format) -> String {
    let snapshot = Snapshot(engines);
    let mut out = String::new();
    let mut write = |family: Family<'_>| {
        // Writing to a string does not fail.
        let _ = family.write(format, &mut out);
    };
    write(Family { about: &engine_info(), samples: snapshot.engine_info() });
    for metric in of_engines() {
        write(metric.family(snapshot.0.iter().map(|(number, engine)| (engine_labels(*number), (metric.read)(engine)))));
    }
    write(Family { about: &transfer_seconds(), samples: snapshot.transfer_seconds() });
    write(Family { about: &connection_info(), samples: snapshot.connection_info() });
    for metric in of_connections() {
        write(metric.family(snapshot.connections().map(|(engine, c)| (connection_labels(engine, c), (metric.read)(c)))));
    }
    for metric in of_channels() {
        write(metric.family(snapshot.channels().map(|(labels, channel)| (labels, (metric.read)(channel)))));
    }
    out.push_str("# EOF\n");
    out
}

/// The tables of docs/metrics.md.
pub fn document() -> String {
    let mut page = String::new();
    let mut table = |title: &str, labels: &str, structure: &str, rows: &[&About]| {
        let head = format!(
            "### {title}\n\nLabels: {labels}.\n\n| metric | type | member of `{structure}` | what it is |\n|---|---|---|---|\n"
        );
        page.push_str(&head);
        for About { name, kind, help, member } in rows {
            let (suffix, kind) = (kind.suffix(), kind.name(Format::Plain));
            let member = if member.is_empty() { String::new() } else { format!("`{member}`") };
            page.push_str(&format!("| `{PREFIX}_{name}{suffix}` | {kind} | {member} | {help} |\n"));
        }
        page.push('\n');
    };
    let (engines, connections, channels) = (of_engines(), of_connections(), of_channels());
    let (engine, connection, times) = (engine_info(), connection_info(), transfer_seconds());
    let rows: Vec<&About> = [&engine, &times].into_iter().chain(engines.iter().map(|m| &m.about)).collect();
    table("Engines", "`engine`", "uccl_stats_t", &rows);
    let rows: Vec<&About> = [&connection].into_iter().chain(connections.iter().map(|m| &m.about)).collect();
    table("Connections", "`engine`, `connection`, `peer`", "uccl_conn_stats_t", &rows);
    let rows: Vec<&About> = channels.iter().map(|m| &m.about).collect();
    let labels = "`engine`, `connection`, `peer`, `channel`, `plugin`, `nic`, and `peer_nic` where its name is another one";
    table("Channels", labels, "uccl_channel_stats_t", &rows);
    page.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use super::super::Network;
    use super::*;

    fn engine() -> EngineStats {
        let network = Some(Network { retransmits: 3, segments: 9, rtt_us: 1500, ..Network::default() });
        let (plugin, nic) = ("TCPX-soft".into(), "eth1".into());
        let channel = ChannelStats { plugin, nic, sent_bytes: 5, pack_us: 2500, slow: true, network, ..ChannelStats::default() };
        let unknown = ChannelStats { nic: "eth2".into(), peer_nic: "eth3".into(), ..ChannelStats::default() };
        let connection = ConnectionStats {
            id: 7,
            peer: "10.0.0.2:41234".into(),
            host: "10.0.0.2".into(),
            channels: vec![channel, unknown],
            totals: Totals { refused: 2, ..Totals::default() },
            ..ConnectionStats::default()
        };
        let metadata = "10.0.0.1:4000?-1".into();
        let mut engine = EngineStats { metadata, opened: 4, connections: vec![connection], ..EngineStats::default() };
        engine.times.counts[1] = std::array::from_fn(|bucket| u64::from(bucket == 2 || bucket == 4));
        engine.times.nanoseconds[1] = 250_000;
        engine
    }

    fn text(format: Format) -> String {
        exposition(vec![(1, engine()), (3, EngineStats { metadata: "::1:1?0".into(), ..EngineStats::default() })], format)
    }

    #[test]
    fn every_level_has_its_samples() {
        let text = text(Format::OpenMetrics);
        for line in [
            "# TYPE uccl_tcpx_connections_opened counter",
            "uccl_tcpx_connections_opened_total{engine=\"1\"} 4",
            "uccl_tcpx_connections_opened_total{engine=\"3\"} 0",
            "# TYPE uccl_tcpx_engine info",
            "uccl_tcpx_engine_info{engine=\"1\",address=\"10.0.0.1:4000\",gpu=\"-1\",plugin=\"\",version=\"",
            "uccl_tcpx_engine_info{engine=\"3\",address=\"::1:1\",gpu=\"0\",",
            "uccl_tcpx_connection_info{engine=\"1\",connection=\"7\",peer=\"10.0.0.2\",address=\"10.0.0.2:41234\"} 1",
            "uccl_tcpx_connection_refused_total{engine=\"1\",connection=\"7\",peer=\"10.0.0.2\"} 2",
            "uccl_tcpx_channel_pack_seconds_total{engine=\"1\",connection=\"7\",peer=\"10.0.0.2\",channel=\"0\",plugin=\"TCPX-soft\",nic=\"eth1\"} 0.0025",
            "channel=\"0\",plugin=\"TCPX-soft\",nic=\"eth1\"} 5",
            "channel=\"1\",plugin=\"\",nic=\"eth2\",peer_nic=\"eth3\"} 0",
            "# EOF",
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
        assert_eq!(text.lines().filter(|l| l.starts_with("uccl_tcpx_channel_retransmits_total{")).count(), 1, "{text}");
        assert!(text.lines().any(|l| l.starts_with("uccl_tcpx_channel_rtt_seconds{") && l.ends_with(" 0.0015")), "{text}");
    }

    /// What a restart changes must not make new series: ports are in the two metrics that exist for them.
    #[test]
    fn ports_are_in_no_label_but_those_of_infos() {
        for line in text(Format::Plain).lines().filter(|line| !line.starts_with('#') && !line.contains("_info{")) {
            assert!(!line.contains("41234") && !line.contains("4000"), "{line}");
        }
    }

    #[test]
    fn units_are_base_units_and_names_are_unique() {
        let mut names: Vec<String> = of_engines().iter().map(|m| m.about.name.clone() + m.about.kind.suffix()).collect();
        names.extend(of_connections().iter().map(|m| m.about.name.clone() + m.about.kind.suffix()));
        names.extend(of_channels().iter().map(|m| m.about.name.clone() + m.about.kind.suffix()));
        for name in &names {
            let parts: Vec<&str> = name.split('_').collect();
            let other = ["us", "ms", "ns", "kb", "mb", "microseconds", "milliseconds"];
            assert!(!parts.iter().any(|part| other.contains(part)), "{name}");
        }
        assert!(!document().contains("microsecond"), "a text names another unit");
        let all = names.len();
        names.sort();
        names.dedup();
        assert!(names.len() == all && all > 80, "{all}");
    }

    #[test]
    fn buckets_are_summed_up_and_their_number_is_fixed() {
        let text = text(Format::Plain);
        let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("uccl_tcpx_transfer_seconds_")).collect();
        assert_eq!(lines.len(), 2 * 4 * (20 + 2), "{text}");
        let of = |start: &str| lines.iter().find_map(|l| l.strip_prefix(start)).unwrap_or_else(|| panic!("{start}: {text}"));
        for (le, count) in [("2.5e-05", 0), ("5e-05", 1), ("0.0001", 1), ("0.00025", 2), ("+Inf", 2)] {
            let start = format!("uccl_tcpx_transfer_seconds_bucket{{engine=\"1\",size=\"to_1MiB\",le=\"{le}\"}} ");
            assert_eq!(of(&start), count.to_string(), "{le}");
        }
        assert_eq!(of("uccl_tcpx_transfer_seconds_sum{engine=\"1\",size=\"to_1MiB\"} "), "0.00025");
        assert_eq!(of("uccl_tcpx_transfer_seconds_count{engine=\"1\",size=\"to_1MiB\"} "), "2");
        assert!(text.contains("# TYPE uccl_tcpx_transfer_seconds histogram\n"), "{text}");
    }

    /// Names, types, escapes and numbers as both formats have them.
    #[test]
    fn both_formats_are_exact() {
        let about = |name: &str, kind| About { name: name.into(), kind, help: "What it is", member: "" };
        let labels = |peer: &str| vec![("engine", "e".to_owned()), ("peer", peer.to_owned())];
        let (sent, speed) = (about("sent", Kind::Counter), about("speed", Kind::Gauge));
        let whole = |peer: &str, n| ("", labels(peer), Number::Whole(n));
        let counter = Family { about: &sent, samples: vec![whole("a\\b\"c\nd", u64::MAX), whole("", 0)] };
        let real = [0.0, 1.5, 1e-6, 5e9].map(|n| ("", labels("p"), Number::Real(n)));
        let gauge = Family { about: &speed, samples: real.into() };
        let none = Family { about: &speed, samples: Vec::new() };
        let text = |format| {
            let mut out = String::new();
            [&counter, &gauge, &none].iter().for_each(|family| family.write(format, &mut out).unwrap());
            out
        };
        let expected = |family: &str| {
            format!(
                "# HELP uccl_tcpx_{family} What it is\n# TYPE uccl_tcpx_{family} counter\n\
                 uccl_tcpx_sent_total{{engine=\"e\",peer=\"a\\\\b\\\"c\\nd\"}} 18446744073709551615\n\
                 uccl_tcpx_sent_total{{engine=\"e\",peer=\"\"}} 0\n\
                 # HELP uccl_tcpx_speed What it is\n# TYPE uccl_tcpx_speed gauge\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 0.0\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 1.5\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 0.000001\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 5000000000.0\n"
            )
        };
        assert_eq!(text(Format::OpenMetrics), expected("sent"));
        assert_eq!(text(Format::Plain), expected("sent_total"));
    }
}
